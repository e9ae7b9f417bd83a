"""What a person, a log or a program sees while a run goes on; all of it on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TextIO, TypeAlias, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmevo.cli.clock import Clock, done, trial_seconds
from llmevo.report.findings import trial_json
from llmevo.report.words import counted, duration, number, signed
from llmevo.runner.observer import Observer, RunInfo, RunSummary
from llmevo.trial import State, Trial, best, trained_share

Choice: TypeAlias = Literal["auto", "rich", "plain", "json", "none"]

_ROWS = 12
_SPARKS = 60  # bars
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {State.COMPLETE: "", State.FAILED: "red", State.PENDING: "dim"}


def choose(choice: Choice, stream: TextIO | None = None) -> Observer:
    """The observer that `--display` names; `auto` is a live table on a terminal and lines elsewhere."""
    stream = sys.stderr if stream is None else stream
    if choice == "auto":
        choice = "rich" if Console(file=stream).is_terminal else "plain"
    if choice == "rich":
        return RichDisplay(Console(file=stream))
    if choice == "plain":
        return PlainDisplay(stream)
    return JsonDisplay(stream) if choice == "json" else NoDisplay()


def score_text(trial: Trial, items: int = 0) -> str:
    """A trial's score with its standard error and, where they are not all, its items; or why there is none.

    Args:
        trial: The trial.
        items: How many a score on all items rests on; 0 if unknown.
    """
    score = trial.score
    if score is None:
        return trial.error or "pending"
    text = number(score.value) + ("" if score.stderr is None else f" ± {number(score.stderr)}")
    if score.rung is None:
        return text
    share = trained_share(trial)
    if share is not None:
        return f"{text} ({share:.0%} of the tokens)"
    return f"{text} ({score.count} of {items} items)" if items else f"{text} ({score.count} items)"


def all_items(trials: Iterable[Trial]) -> int:
    """How many items a score on all items rests on; 0 while there is none."""
    return next((t.score.count for t in trials if t.score is not None and t.score.rung is None), 0)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as bars."""
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)


def _opening(info: RunInfo) -> str:
    finished = done(info.trials)
    how = f"continuing after {finished} of" if finished else "searching with"
    return (
        f"{info.run_dir}: {how} {info.genome.search.trials} trials, {counted(len(info.space), 'gene')}, "
        f"proposer {info.genome.search.proposer}"
    )


@final
class PlainDisplay:
    """A line for each event, for logs and pipes.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clock = Clock()
        self._items = 0  # of a score on all of them

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def started(self, info: RunInfo) -> None:
        """Say what begins."""
        self._clock = Clock(info)
        self._items = all_items(info.trials)
        self._say(_opening(info))

    def note(self, line: str) -> None:
        """Pass the line on."""
        self._say(line)

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        """Say who proposed."""
        origins = ", ".join(dict.fromkeys(trial.origin for trial in trials))
        self._say(f"asked {len(trials)} in {duration(seconds)}: {origins}")

    def sifted(self, reached: str, entered: Sequence[int], kept: Sequence[int]) -> None:
        """Say who goes on."""
        names = ", ".join(f"#{number}" for number in kept) or "none"
        self._say(f"after {reached} {len(kept)} of {len(entered)} go on: {names}")

    def finished(self, trial: Trial, best: Trial | None) -> None:
        """Say what the trial scored."""
        self._clock.tick(trial)
        mark = "  best" if best is not None and best.number == trial.number else ""
        failed = "failed: " if trial.state is State.FAILED else ""
        self._items = self._items or all_items([trial])
        left = self._clock.left
        eta = f"  left {duration(left)}" if left else ""
        self._say(
            f"trial {trial.number:>3}  {trial.origin:<18} {failed}{score_text(trial, self._items)}  "
            f"{duration(trial_seconds(trial))}{mark}{eta}"
        )

    def ended(self, summary: RunSummary) -> None:
        """Say why."""
        self._say(f"ended after {duration(summary.elapsed)}: {summary.reason}")


@final
class JsonDisplay:
    """A JSON object in a line for each event, for programs.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _say(self, event: str, **data: Any) -> None:
        print(json.dumps({"event": event, **data}, ensure_ascii=False), file=self._stream, flush=True)

    def started(self, info: RunInfo) -> None:
        """`started`: run_dir, budget, genes, earlier, references, batch."""
        self._say(
            "started",
            run_dir=str(info.run_dir),
            budget=info.genome.search.trials,
            genes=info.space.names,
            earlier=len(info.trials),
            references=info.references,
            batch=info.batch,
        )

    def note(self, line: str) -> None:
        """`note`: line."""
        self._say("note", line=line)

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        """`asked`: trials, seconds."""
        self._say("asked", trials=[trial_json(trial) for trial in trials], seconds=seconds)

    def sifted(self, reached: str, entered: Sequence[int], kept: Sequence[int]) -> None:
        """`sifted`: reached (`60 items`), entered, kept (numbers)."""
        self._say("sifted", reached=reached, entered=list(entered), kept=list(kept))

    def finished(self, trial: Trial, best: Trial | None) -> None:
        """`finished`: trial, best (a number)."""
        self._say("finished", trial=trial_json(trial), best=None if best is None else best.number)

    def ended(self, summary: RunSummary) -> None:
        """`ended`: exit_code, reason, elapsed."""
        self._say(
            "ended", exit_code=summary.exit_code, reason=summary.reason, elapsed=round(summary.elapsed, 3)
        )


@final
class NoDisplay:
    """Silence."""

    def started(self, info: RunInfo) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        """Nothing."""

    def sifted(self, reached: str, entered: Sequence[int], kept: Sequence[int]) -> None:
        """Nothing."""

    def finished(self, trial: Trial, best: Trial | None) -> None:
        """Nothing."""

    def ended(self, summary: RunSummary) -> None:
        """Nothing."""


@final
class RichDisplay:
    """A live table of the latest trials under a line with the best, the time and what is left.

    Args:
        console: On stderr; it honours NO_COLOR.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._info: RunInfo | None = None
        self._clock = Clock()
        self._trials: dict[int, Trial] = {}  # the pending ones and the last of the others
        self._items = 0
        self._reached: dict[int, str] = {}  # by trial that is not at its end
        self._best: Trial | None = None

    def started(self, info: RunInfo) -> None:
        """Start the table."""
        self._info, self._clock = info, Clock(info)
        self._trials = {trial.number: trial for trial in info.trials}
        self._items = all_items(info.trials)
        self._prune()
        self._best = best(info.trials, info.genome.search.direction)
        self._console.print(escape(_opening(info)), style="bold", highlight=False)
        self._live = Live(console=self._console, get_renderable=self._view, refresh_per_second=4)
        self._live.start()

    def note(self, line: str) -> None:
        """Print the line above the table."""
        self._console.print(escape(line), style="dim", highlight=False)

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        """Show the new trials as pending."""
        self._trials |= {trial.number: trial for trial in trials}

    def sifted(self, reached: str, entered: Sequence[int], kept: Sequence[int]) -> None:
        """Show who goes on as such."""
        self._reached |= dict.fromkeys(entered, reached)

    def finished(self, trial: Trial, best: Trial | None) -> None:
        """Show the result."""
        self._clock.tick(trial)
        self._trials[trial.number] = trial
        self._items = self._items or all_items([trial])
        self._reached.pop(trial.number, None)
        if len(self._trials) > 4 * _SPARKS:
            self._prune()
        self._best = best

    def _prune(self) -> None:
        """Drop what will not be shown again: drawing must not grow with the run."""
        done = sorted(n for n, t in self._trials.items() if t.state is not State.PENDING)
        for place in done[: -2 * _SPARKS]:
            del self._trials[place]

    def ended(self, summary: RunSummary) -> None:
        """Leave the last state of the table on the screen."""
        self.close()
        self._console.print(
            escape(f"ended after {duration(summary.elapsed)}: {summary.reason}"),
            style="bold",
            highlight=False,
        )

    def close(self) -> None:
        """Give the terminal back; harmless when it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _view(self) -> RenderableType:
        return Group(self._header(), self._table())

    def _header(self) -> Text:
        clock, best = self._clock, self._best
        parts = [f"{clock.done}/{clock.budget}"]
        if best is not None:
            parts.append(f"best {score_text(best)} (#{best.number} {best.origin})")
        left = f", about {duration(clock.left)} left" if clock.left else ""
        parts.append(f"{duration(clock.elapsed)}{left}")
        whole = [t.score for t in self._trials.values() if t.score is not None and t.score.rung is None]
        scores = [score.value for score in whole]
        width = max(self._console.width - 2, 1)
        header = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        return header.append(f"\n{sparkline(scores, min(width, _SPARKS))}", style="cyan")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("#", justify="right", style="dim")
        table.add_column("origin", no_wrap=True, overflow="ellipsis", max_width=24)
        table.add_column("score", no_wrap=True, overflow="ellipsis")
        table.add_column("to best", justify="right", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        recent = sorted(self._trials.values(), key=lambda t: (t.state is State.PENDING, t.number))
        pending = [trial for trial in recent if trial.state is State.PENDING]
        done = [trial for trial in recent if trial.state is not State.PENDING]
        shown = [*done[-(_ROWS - min(len(pending), 3)) :], *pending[:3]]
        for trial in shown:
            table.add_row(*self._cells(trial), style=_STYLES[trial.state])
        return table

    def _cells(self, trial: Trial) -> tuple[str, ...]:
        gap = ""
        top = None if self._best is None else self._best.score
        if trial.score is not None and top is not None and trial.score.rung == top.rung:
            # On other items a difference says nothing.
            same = self._best is not None and trial.number == self._best.number
            gap = "best" if same else signed(trial.score.value - top.value)
        spent = "" if trial.state is State.PENDING else duration(trial_seconds(trial))
        text = score_text(trial, self._items)
        if trial.state is State.PENDING and trial.number in self._reached:
            text = f"{self._reached[trial.number]} so far"
        return str(trial.number), escape(trial.origin), escape(text), gap, spent
