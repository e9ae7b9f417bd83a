"""What came out of a run in plain sentences, none of which claims more than the held-out items show.

A difference is called one where its p-value, after Holm's correction over the finalists, is at most 0.05; and
where there is no p-value, where its interval excludes zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmevo.report.words import Z95, number, percent, signed
from llmevo.runner.facts import TRUNCATED, truncated
from llmevo.runner.observer import Row
from llmevo.stats import Interval

if TYPE_CHECKING:
    from llmevo.report.findings import Findings

LLM_RUN = 0.8  # a run whose intended LLM proposals are the model's own to a lesser share is not called one
SURE = 0.05


def sure(interval: Interval | None, p_value: float | None = None) -> int:
    """1 if a difference is an improvement beyond the noise, -1 if a loss beyond it, else 0."""
    if interval is None:
        return 0
    beyond = interval.excludes_zero if p_value is None else p_value <= SURE
    if not beyond or interval.estimate == 0:
        return 0
    return 1 if interval.estimate > 0 else -1


def headline(findings: Findings) -> str:
    """A few words on what came out."""
    best, row = findings.summary.best, findings.winner
    if best is None:
        return "No trial was completed"
    if row is None or row.score is None:
        return f"Best so far: {number(best.score.value)}" if best.score else ""
    if row.interval is None:
        return f"The evolved model scores {number(row.score.value)} on held-out items"
    gap = number(abs(row.interval.estimate))
    found = sure(row.interval, row.p_value)
    if found > 0:
        return f"{_evolved(findings).capitalize()} beats the {findings.rival_name} by {gap}"
    if found < 0:
        return f"{_evolved(findings).capitalize()} is worse than the {findings.rival_name} by {gap}"
    return f"No gain over the {findings.rival_name} that is larger than the noise"


def _evolved(findings: Findings) -> str:
    return "the evolved merge" if findings.genome.train is None else "the evolved model"


def verdict(findings: Findings) -> str:
    """Whether the gain is larger than the noise, and whose it is."""
    return " ".join(part for part in (_gain(findings), _not_an_llm_run(findings)) if part)


def notes(findings: Findings) -> list[str]:
    """What a reader of the scores should know besides; a sentence each."""
    cut: dict[str, list[tuple[float, int]]] = {}
    for trial in findings.trials:
        for task, share in truncated(trial.metrics).items():
            cut.setdefault(task, []).append((share, trial.number))
    best = findings.summary.best
    own = {} if best is None else truncated(best.metrics)
    return [
        f"{task}: of the answers, {percent(max(shares)[0])} of trial {max(shares)[1]} and "
        f"{percent(own.get(task, 0.0))} of the best trial were cut off at the longest allowed length before "
        "they had ended. Such scores measure brevity; raise the task's max_gen_toks."
        for task, shares in cut.items()
        if max(shares)[0] > TRUNCATED
    ]


def _not_an_llm_run(findings: Findings) -> str:
    summary = findings.summary
    if summary.llm_share is None or summary.llm_share >= LLM_RUN:
        return ""
    return (
        f"This is not an LLM run: of {summary.intended} trials that the language model was to propose, "
        f"{summary.proposed} ({percent(summary.llm_share)}) are its own."
    )


def _gain(findings: Findings) -> str:
    row = findings.winner
    if findings.summary.best is None:
        return "Every trial so far has failed or is still to come; see the reasons below."
    if row is None or row.score is None:
        why = f" ({row.error})" if row is not None and row.error else ""
        return (
            f"The held-out items have not been scored{why}, so nothing can be said yet about a gain: the "
            "best of many noisy scores is too good on average."
        )
    parts = (
        _against_rival(findings, row),
        _finalists(findings),
        _optimism(findings, row),
        _seeds(findings, row),
        _against(findings, "uniform", "uniform merge"),
        _against(findings, "warm_start", "best warm start"),
    )
    return " ".join(part for part in parts if part)


def _against_rival(findings: Findings, row: Row) -> str:
    rival, gap = findings.rival, row.interval
    if gap is None or rival is None:
        whose = "no held-out score of the default" if findings.genome.train else "no parent's held-out score"
        return f"There is {whose} to compare the evolved model with."
    tested = "" if row.p_value is None else f", p = {row.p_value:.2g}"
    span = (
        f"{signed(gap.estimate)} on {findings.held_out_items()} held-out items "
        f"({percent(gap.level)} interval {signed(gap.low)} to {signed(gap.high)}{tested})"
    )
    _, _, name = rival.label.partition("parent:")
    against = f"Against the best parent, {name}, " if name else "Against the default settings, "
    found = sure(gap, row.p_value)
    if found > 0:
        return f"{against}{_evolved(findings)} gains {span}: more than the noise."
    if found < 0:
        return f"{against}{_evolved(findings)} loses {span}: worse, beyond the noise."
    return (
        f"{against}{_evolved(findings)} differs by {span}: no gain larger than the noise is shown. More "
        "held-out items would narrow it."
    )


def _finalists(findings: Findings) -> str:
    """How the other finalists did; each claim holds for all of them together."""
    rows = [row for row in findings.summary.table if row.p_value is not None]
    if len(rows) < 2:
        return ""
    gains = [f"{row.label} (p = {row.p_value:.2g})" for row in rows if sure(row.interval, row.p_value) > 0]
    count = len(rows)
    if not gains:
        return f"None of the {count} finalists beats it, with Holm's correction for {count} tests."
    verb = "beats" if len(gains) == 1 else "beat"
    return f"Of {count} finalists, with Holm's correction, {', '.join(gains)} {verb} it."


def _optimism(findings: Findings, row: Row) -> str:
    """How much better the items that chose the winner score it than the held-out ones, and what that says."""
    rival = findings.rival
    if row.optimism is None:
        return ""
    text = f"The search had scored the winner {_apart(row.optimism)} the held-out items do"
    if rival is not None and rival.optimism is not None:
        text += f", and the {findings.rival_name} {_apart(rival.optimism)} them"
    error = _optimism_error(row)
    if error is None:
        return f"{text}."
    if abs(row.optimism) <= Z95 * error:
        return f"{text}: no more than the noise of two sets of items."
    flattered = "the best of many noisy scores flatters itself"
    return f"{text}: {flattered if row.optimism > 0 else 'choosing it by them has not flattered it'}."


def _optimism_error(row: Row) -> float | None:
    """Standard error of the optimism: the two scores are of different items."""
    searched = row.trial.score
    if row.score is None or searched is None or row.score.stderr is None or searched.stderr is None:
        return None
    return math.hypot(row.score.stderr, searched.stderr)


def _seeds(findings: Findings, row: Row) -> str:
    """Over how many trainings the winner was averaged, and how much luck one has."""
    if row.spread is None:
        return ""
    text = (
        f"Its score is the mean of {row.seeds} trainings with different seeds; from seed to seed a score "
        f"moves by {number(row.spread.deviation)} (standard deviation), which the intervals allow for"
    )
    best = findings.summary.best
    if best is not None and best.number == row.trial.number:
        text += f". best/adapter is the training with the search's seed, {findings.genome.search.seed}"
    return f"{text}."


def _apart(optimism: float) -> str:
    return f"{number(abs(optimism))} {'better' if optimism >= 0 else 'worse'} than"


def _against(findings: Findings, kind: str, name: str) -> str:
    """What the search gained over a recipe that needs none."""
    gap = findings.gap_to(kind)
    if gap is None:
        return ""
    span = f"{signed(gap.estimate)} ({percent(gap.level)} interval {signed(gap.low)} to {signed(gap.high)})"
    found = sure(gap)
    if found > 0:
        return f"Against the {name} it gains {span}."
    if found < 0:
        return f"The {name}, which needs no search, is better: the evolved one differs by {span}."
    return f"The {name}, which needs no search, cannot be told apart: the difference is {span}."
