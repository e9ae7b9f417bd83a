"""One HTML file about a run: what came out, whether it is more than noise, and how to get it again.

The file is self-contained: no script, no font and no image from elsewhere. Everything that a genome, a model
or an error says is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from llmevo.report import figures, generations, page, scores, svg
from llmevo.report.beside import compare
from llmevo.report.findings import Findings
from llmevo.report.words import duration, interval, number, percent, signed
from llmevo.runner.adapters import BEST
from llmevo.runner.observer import Row
from llmevo.trial import Score, State, Trial

_COST_ROLES = {"evaluate": "blue", "train": "vermillion", "merge": "green", "propose": "purple"}
_FEW_FAILURES = 8


def write(findings: Findings, path: Path, others: Sequence[Findings] = ()) -> Path:
    """Write the report beside `path`, then put it in its place, so that a reader never finds half of one.

    Raises:
        LlmevoError: matplotlib is not installed.
    """
    text = render(findings, others)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
    return path


def render(findings: Findings, others: Sequence[Findings] = ()) -> str:
    """The whole report as HTML.

    Args:
        findings: Of the run.
        others: Runs to hold against it, scored on the same held-out items.

    Raises:
        LlmevoError: matplotlib is not installed, or a run cannot be compared.
    """
    template = Template(files("llmevo.report").joinpath("report.html").read_text(encoding="utf-8"))
    sections = [
        _progress(findings),
        _generations(findings),
        _held_out(findings),
        _beside(findings, others),
        _tasks(findings),
        _origins(findings),
        _parameters(findings),
        _failures(findings),
        _recipe(findings),
        _cost(findings),
        _reproduce(findings),
    ]
    return template.substitute(
        title=escape(findings.name),
        headline=escape(findings.headline()),
        verdict=escape(" ".join([findings.verdict(), *findings.notes()])),
        facts="\n".join(
            f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in _facts(findings)
        ),
        sections="\n".join(section for section in sections if section),
        version=escape(findings.versions.get("llmevo", "")),
        light=_variables(0),
        dark=_variables(1),
    )


def _variables(theme: int) -> str:
    return " ".join(f"--{role}: {colours[theme]};" for role, colours in svg.ROLES.items())


def _facts(findings: Findings) -> list[tuple[str, str]]:
    counts = findings.counts()
    best = findings.summary.best
    score = "none" if best is None or best.score is None else number(best.score.value)
    if best is not None and best.score is not None and best.score.stderr is not None:
        score += f" ± {number(best.score.stderr)} s.e."
    return [
        ("best score in the search", score),
        ("best trial", "none" if best is None else f"#{best.number}, by {best.origin}"),
        ("trials", f"{counts['complete']} ok, {counts['failed']} failed"),
        ("proposer", findings.genome.search.proposer),
        *([("language model", findings.language_model)] if findings.language_model else []),
        *([("spent on it", findings.money())] if findings.money() else []),
        *([("its own proposals", _own(findings))] if findings.summary.intended else []),
        ("seed", str(findings.genome.search.seed)),
        *_effort(findings),
        ("time in trials", duration(sum(findings.summary.seconds.values()))),
    ]


def _own(findings: Findings) -> str:
    summary = findings.summary
    return f"{summary.proposed} of {summary.intended} that it was to make"


def _effort(findings: Findings) -> list[tuple[str, str]]:
    effort = findings.effort()
    if effort is None:
        return []
    name = "item-evaluations" if effort.unit == "items" else "tokens trained on"
    saved = effort.without - effort.spent
    return [(name, f"{effort.spent}, {saved} of {effort.without} saved by halving")]


def _progress(findings: Findings) -> str:
    if not findings.trials:
        return ""
    lines = [figures.Estimate(name, value) for name, value in findings.reference_lines()]
    drawing = figures.progress(findings.trials, lines, findings.maximize)
    caption = (
        "Each mark is a trial, with one standard error. The best of many noisy scores is too good on "
        "average: only the held-out items below say what was gained."
    )
    effort = findings.effort()
    if effort is not None:
        less = "fewer items" if effort.unit == "items" else "less training"
        caption += f" Small marks dropped out early: their scores rest on {less} and are never the best."
    return page.section(
        "The search", page.figure(drawing, "Score of each trial and the best so far", caption)
    )


def _generations(findings: Findings) -> str:
    search = findings.genome.search
    found = generations.generations(findings.trials, search.direction, search.population)
    if len(found) < 2:
        return ""
    head = ("generation", "trained", "best so far", "mean", "of survivors", "distance", "of survivors")
    rows = []
    for one in found:
        apart = ("" if value is None else f"{value:.2f}" for value in (one.apart, one.alive_apart))
        scores = (number(value) for value in (one.best, one.mean, one.alive))
        rows.append(((str(one.number), str(len(one.new)), *scores, *apart), False))
    caption = (
        "Generation 0 is the default settings. Distance is that of two adapters' changes of the weights over "
        "their size, estimated by a sketch: 0 for equal ones, 1.41 for two that have nothing in common."
    )
    drawing = page.figure(
        generations.draw(found), "Score and diversity of the weights by generation", caption
    )
    details = f"<details><summary>The numbers</summary>{page.table(head, rows)}</details>"
    return page.section("The generations", drawing + details)


def _held_out(findings: Findings) -> str:
    rows = [(row, row.score) for row in findings.summary.table if row.score is not None]
    if not rows:
        return ""
    winner = findings.winner.label if findings.winner else ""
    against = findings.rival.label if findings.rival else f"the {findings.rival_name}"
    marks = [
        figures.Estimate(row.label, score.value, *(interval(score) or (None, None))) for row, score in rows
    ]
    differences = [
        figures.Estimate(row.label, row.interval.estimate, row.interval.low, row.interval.high)
        for row, _ in rows
        if row.interval is not None
    ]
    head = (
        "model",
        "score",
        "95 % interval",
        f"to the {findings.rival_name}",
        "95 % interval",
        "p",
        "optimism",
    )
    merged = "" if findings.genome.alone else ", answered by merges of mergekit's own arithmetic"
    note = page.note(
        f"{findings.held_out_items()} items that the search never saw{merged}. Differences are paired: both "
        "models answer the same items, so what is hard for both cancels. p is the chance of a difference "
        "this large between equals, with Holm's correction over the finalists. Optimism is how much better "
        "the items of the search score a model than the held-out ones."
    )
    table = page.table(head, [(_held_out_cells(row, score), row.label == winner) for row, score in rows])
    drawing = scores.intervals(marks, differences, against, winner)
    figure = page.figure(drawing, "Held-out scores and paired differences with intervals")
    return page.section("Held-out items", note + table + figure)


def _beside(findings: Findings, others: Sequence[Findings]) -> str:
    if not others:
        return ""
    rivals = compare(findings, others)
    tasks = list(rivals[0].tasks) if len(rivals[0].tasks) > 1 else []
    trained = any(rival.tokens for rival in rivals)
    head = ["run", "proposer", "trials", *(["tokens trained on"] if trained else [])]
    head += ["held-out score", *tasks, f"{findings.name} is ahead by", "95 % interval"]
    best = (max if findings.maximize else min)(rival.score for rival in rivals)
    rows = []
    for rival in rivals:
        gap = rival.lead
        cells = [escape(f"{rival.name} ({rival.label})"), escape(rival.proposer), str(rival.trials)]
        cells += [str(rival.tokens)] if trained else []
        cells += [number(rival.score), *(number(rival.tasks[task]) for task in tasks)]
        lead = None if gap is None else [signed(gap.estimate), f"{signed(gap.low)} to {signed(gap.high)}"]
        rows.append(([*cells, *(lead or ("", ""))], rival.score == best))
    note = page.note(
        "Each run's own choice on the same held-out items; differences are paired. A run without a search is "
        "its default settings."
    )
    return page.section("Beside other runs", note + page.table(head, rows))


def _held_out_cells(row: Row, score: Score) -> tuple[str, ...]:
    span, gap = interval(score), row.interval
    return (
        escape(row.label),
        number(score.value),
        "" if span is None else f"{number(span[0])} to {number(span[1])}",
        "" if gap is None else signed(gap.estimate),
        ""
        if gap is None
        else f"{signed(gap.low)} to {signed(gap.high)}"
        + ("" if gap.level == 0.95 else f" ({percent(gap.level)})"),
        "" if row.p_value is None else f"{row.p_value:.2g}",
        "" if row.optimism is None else signed(row.optimism),
    )


def _tasks(findings: Findings) -> str:
    parts = []
    for split, caption in (
        ("held-out", "On the held-out items."),
        (
            "search",
            "Every parent, on the search items, by which the evolved model was chosen.",
        ),
    ):
        means = findings.task_means(split)
        if means and len({task for by_task in means.values() for task in by_task}) > 1:
            drawing = scores.tasks(means, "evolved", "uniform", f"tasks-{split}")
            parts.append(page.figure(drawing, f"Score of each model on each task, {split} items", caption))
    return page.section("By task", "".join(parts))


def _origins(findings: Findings) -> str:
    records = findings.records()
    rows = []
    for origin, trials in findings.by_origin().items():
        values = [t.score.value for t in trials if t.score is not None and t.score.rung is None]
        failed = sum(trial.state is State.FAILED for trial in trials)
        role, _ = figures.series(figures.family(origin))
        if figures.family(origin) in figures.REFERENCES:
            role = "muted"
        best = (max if findings.maximize else min)(values) if values else None
        rows.append(
            (
                (
                    f'<span class="key" style="background:var(--{role})"></span>{escape(origin)}',
                    str(len(trials)),
                    str(failed) if failed else "",
                    "" if best is None else number(best),
                    "" if not values else number(sum(values) / len(values)),
                    str(sum(trial.number in records for trial in trials)),
                ),
                findings.summary.best is not None and findings.summary.best.origin == origin,
            )
        )
    head = ("origin", "trials", "failed", "best", "mean", "new bests")
    effort, note = findings.effort(), ""
    if effort is not None:
        whole = "scores on all items" if effort.unit == "items" else "trainings that came to their end"
        note = page.note(f"Best and mean are of {whole}.")
    return page.section("Where the trials came from", note + page.table(head, rows)) if rows else ""


def _parameters(findings: Findings) -> str:
    trials = [trial for trial in findings.trials if trial.params]
    if len(trials) < 2:
        return ""
    drawing, shown, total = figures.parameters(trials, findings.summary.best, findings.maximize)
    if not drawing:
        return ""
    few = f"{shown} of {total} genes, those whose rank goes most with the score. " if shown < total else ""
    caption = f"{few}r is Spearman's rank correlation with the score; the ring is the best trial."
    return page.section(
        "Genes against the score", page.figure(drawing, "Each gene's value against the score", caption)
    )


def _failures(findings: Findings) -> str:
    failed = [trial for trial in findings.trials if trial.state is State.FAILED]
    if not failed:
        return ""
    reasons: dict[str, list[Trial]] = {}
    for trial in failed:
        reasons.setdefault(trial.error or "unknown", []).append(trial)
    ranked = sorted(reasons.items(), key=lambda item: -len(item[1]))
    rows = [
        (
            (
                escape(reason if len(reason) <= 300 else reason[:299] + "…"),
                str(len(trials)),
                ", ".join(f"#{t.number}" for t in trials[:6]),
            ),
            False,
        )
        for reason, trials in ranked[:_FEW_FAILURES]
    ]
    more = (
        f" The {len(ranked) - _FEW_FAILURES} rarer reasons are left out." if len(ranked) > len(rows) else ""
    )
    note = page.note(f"A failed trial is a result too: the search went on.{more}")
    return page.section("Failures", note + page.table(("reason", "trials", "which"), rows))


def _recipe(findings: Findings) -> str:
    best = findings.summary.best
    if best is None:
        return ""
    parts = []
    trained = findings.genome.train is not None and "recipe" not in best.attrs
    if findings.recipe and not (trained and findings.genome.alone):
        text = "A mergekit configuration: mergekit-yaml makes the weights from it."
        if trained:
            text = "A mergekit configuration of what the adapter belongs on, as mergekit-yaml takes it."
        parts.append(page.note(text) + f"<pre>{escape(findings.recipe.rstrip())}</pre>")
    if trained:
        parts += [page.note("The adapter of the best, in peft:"), f"<pre>{escape(_peft(findings))}</pre>"]
    if best.params:
        genes = escape(json.dumps(best.params, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>Its genes</summary><pre>{genes}</pre></details>")
    what = "settings" if trained else "recipe"
    return page.section(f"The {what} of the best, trial {best.number}", "\n".join(parts))


def _peft(findings: Findings) -> str:
    """How the best adapter is loaded."""
    base = findings.genome.alone or "the merge, made by mergekit-yaml"
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {str(findings.summary.run_dir / BEST)!r})"""


def _cost(findings: Findings) -> str:
    seconds = {stage: value for stage, value in findings.summary.seconds.items() if value > 0}
    total = sum(seconds.values())
    if not total:
        return ""
    bars, keys = [], []
    for stage, value in sorted(seconds.items(), key=lambda item: -item[1]):
        colour = f"background:var(--{_COST_ROLES.get(stage, 'muted')})"
        bars.append(f'<span style="flex:{value / total:.4f} 0 0;{colour}"></span>')
        keys.append(
            f'<li><span class="key" style="{colour}"></span>{escape(stage)} '
            f"{duration(value)} ({100 * value / total:.0f}&nbsp;%)</li>"
        )
    body = f'<div class="bar" aria-hidden="true">{"".join(bars)}</div><ul class="keys">{"".join(keys)}</ul>'
    return page.section("Where the time went", body)


def _reproduce(findings: Findings) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in findings.versions.items())
    parts = [
        page.note("The genome as it was run, overrides included; save it as genome.yaml."),
        f"<details><summary>genome.yaml</summary><pre>{escape(findings.genome_text().rstrip())}</pre></details>",
        f"<pre>{escape(f'llmevo run genome.yaml --run-dir {findings.name}-again')}</pre>",
    ]
    if versions:
        parts.append(page.note(f"With {versions}."))
    return page.section("To run it again", "\n".join(parts))
