"""Results for a terminal: plain text that is aligned where a person reads it and stable where a pipe does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from llmevo.cli.display import score_text
from llmevo.cli.preview import Preview
from llmevo.genome import Genome
from llmevo.genome.own import OWN_TASKS
from llmevo.report.findings import Findings
from llmevo.report.words import duration, interval, number, percent, signed
from llmevo.runner.observer import Row
from llmevo.space import Categorical, Gene, Space
from llmevo.trial import State, Trial

_GENES = 24
_COLUMNS = 5
_WIDTH = 100


def table(head: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as their widest cell, the first to the left and numbers to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = [
        all(not line[column] or line[column][0] in "0123456789+\N{MINUS SIGN}" for line in lines[1:])
        for column in range(len(head))
    ]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if to_right and column else cell.ljust(width)
            for column, (cell, width, to_right) in enumerate(zip(line, widths, right, strict=True))
        ).rstrip()
        for line in lines
    )


def pairs(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    known = list(facts)
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in known)


def held_out(findings: Findings) -> str:
    """The table on the held-out items, or an empty string while there is none."""
    rows = findings.summary.table
    if not rows:
        return ""
    head = (
        "held-out items",
        "score",
        "95 % interval",
        f"to {findings.rival_name}",
        "interval",
        "p",
        "optimism",
    )
    return table(head, [_held_out_row(row) for row in rows])


def _held_out_row(row: Row) -> tuple[str, ...]:
    label = f"{row.label} (#{row.trial.number})" if row.label.startswith("evolved") else row.label
    if row.score is None:
        return label, "failed", row.error or "", "", "", "", ""
    span, gap = interval(row.score), row.interval
    level = "" if gap is None or gap.level == 0.95 else f" ({percent(gap.level)})"
    return (
        label,
        number(row.score.value),
        "" if span is None else f"{number(span[0])} to {number(span[1])}",
        "" if gap is None else signed(gap.estimate),
        "" if gap is None else f"{signed(gap.low)} to {signed(gap.high)}{level}",
        "" if row.p_value is None else f"{row.p_value:.2g}",
        "" if row.optimism is None else signed(row.optimism),
    )


def status(findings: Findings) -> str:
    """Where a run stands."""
    summary, counts = findings.summary, findings.counts()
    budget = findings.genome.search.trials
    best = summary.best
    facts = [
        ("run", str(summary.run_dir)),
        ("state", summary.reason),
        ("trials", _counted(counts, budget)),
        (
            "best",
            "none yet" if best is None else f"{scored(findings, best)}  (#{best.number}, {best.origin})",
        ),
        ("proposer", findings.genome.search.proposer),
        *([("language model", findings.language_model)] if findings.language_model else []),
        ("origins", origins(findings)),
        *_language_model(findings),
        *_effort(findings),
        ("time", times(findings)),
        *(("note", note) for note in findings.notes()),
    ]
    return pairs(facts)


def scored(findings: Findings, trial: Trial) -> str:
    """A trial's score, and on how many items of the search, or what of a training, where that is not all."""
    return score_text(trial, findings.rungs[-1] if findings.rungs else 0)


def _effort(findings: Findings) -> list[tuple[str, str]]:
    """What halving saved; nothing where every trial answers all items, or is trained to its end."""
    effort = findings.effort()
    if effort is None or not effort.without:
        return []
    saved = effort.without - effort.spent
    share = percent(saved / effort.without)
    done = "scored" if effort.unit == "items" else "trained on"
    return [(effort.unit, f"{effort.spent} {done}; halving saved {saved} of {effort.without} ({share})")]


def _counted(counts: dict[str, int], budget: int) -> str:
    text = f"{counts['complete']} ok, {counts['failed']} failed of {budget}"
    return text + (f", {counts['pending']} not finished" if counts["pending"] else "")


def origins(findings: Findings) -> str:
    """How many trials came from where."""
    return ", ".join(f"{count} {origin}" for origin, count in findings.summary.origins.items()) or "none"


def _language_model(findings: Findings) -> list[tuple[str, str]]:
    """What the language model took and gave; nothing if none was asked."""
    summary, facts = findings.summary, []
    if summary.llm_share is not None:
        share = f"{summary.proposed} of {summary.intended} ({percent(summary.llm_share)})"
        facts.append(("llm's own", f"{share} of the proposals that were to be the language model's"))
    return [*facts, ("spent", findings.money())] if findings.money() else facts


def times(findings: Findings) -> str:
    """Where the time went, the largest share first."""
    ranked = sorted(findings.summary.seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in ranked) or "none spent yet"


def end_of_run(findings: Findings) -> str:
    """What a run prints when it ends: the comparison, the verdict, the counts, and how to go on."""
    summary = findings.summary
    run = summary.run_dir
    best = summary.best
    facts = [
        ("trials", _counted(findings.counts(), findings.genome.search.trials)),
        ("origins", origins(findings)),
        *_language_model(findings),
        *_effort(findings),
        ("time", times(findings)),
        ("run", str(run)),
    ]
    if best is not None:
        facts.insert(0, ("best", f"{scored(findings, best)} in the search (#{best.number}, {best.origin})"))
    if summary.resumable:
        facts.append(("stopped", f"{summary.reason}; the same command goes on from here"))
    elif best is not None:
        facts += [
            ("next", f"llmevo report {run}"),
            ("", f"llmevo best {run}"),
            ("", f"llmevo export {run} --out {'my-merge' if findings.genome.train is None else 'my-model'}"),
        ]
    said = [findings.verdict(), *(f"Note: {note}" for note in findings.notes())]
    sentences = [textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False) for text in said]
    parts = [held_out(findings), *sentences, pairs(facts)]
    return "\n\n".join(part for part in parts if part)


def show(findings: Findings, trial: Trial, recipe: str | None) -> str:
    """One trial in full."""
    facts = [("trial", str(trial.number)), ("origin", trial.origin), ("state", str(trial.state))]
    if trial.state is not State.PENDING:
        facts.append(("error" if trial.score is None else "score", scored(findings, trial)))
    seconds = [f"{phase} {duration(v)}" for phase, v in trial.cost.items() if isinstance(v, float)]
    facts.append(("time", ", ".join(seconds) or "none"))
    parts = [pairs(facts)]
    if trial.metrics:
        parts.append(table(("task", "metric", "value"), _metrics(trial.metrics)))
    if trial.params:
        parts.append(
            table(("gene", "value"), [(name, value_text(value)) for name, value in trial.params.items()])
        )
    if recipe:
        parts.append(recipe.rstrip())
    return "\n\n".join(parts)


def _metrics(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (task, name, number(value)) for task, by_name in metrics.items() for name, value in by_name.items()
    ]


def value_text(value: object) -> str:
    """A gene's value, short."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def space_table(space: Space) -> str:
    """The genes with type, range and where the search starts."""
    rows = [(name, *_gene(gene), _condition(space, name)) for name, gene in space.genes.items()]
    return table(("gene", "type", "range", "init", ""), rows)


def _gene(gene: Gene) -> tuple[str, str, str]:
    if isinstance(gene, Categorical):
        return "choice", ", ".join(map(str, gene.choices)), str(gene.start)
    step = f" step {gene.step:g}" if gene.step not in (None, 1) else ""
    kind = type(gene).__name__.lower() + (" log" if gene.log else "")
    return kind, f"[{gene.low:g}, {gene.high:g}]{step}", value_text(gene.start)


def _condition(space: Space, name: str) -> str:
    condition = space.conditions.get(name)
    return "" if condition is None else f"if {condition.gene} in {', '.join(map(str, condition.values))}"


def proposals(trials: Sequence[Trial]) -> str:
    """Proposed points as columns of a table, as many points and genes as fit a screen."""
    if not trials:
        return "none"
    trials = trials[:_COLUMNS]
    names = list(trials[0].params)
    head = ("gene", *(f"#{trial.number} {trial.origin}" for trial in trials))
    rows = [(name, *(value_text(trial.params[name]) for trial in trials)) for name in names[:_GENES]]
    more = f"\n... and {len(names) - _GENES} more genes" if len(names) > _GENES else ""
    return table(head, rows) + more


def _models(genome: Genome) -> list[tuple[str, str]]:
    """What is merged and how, and what it is trained on; nothing of a merge where there is none."""
    merged = [
        ("method", ", ".join(genome.genome.methods)),
        ("models", ", ".join(genome.genome.models)),
        ("base", genome.genome.base_model or "none"),
    ]
    if genome.train is None:
        return merged
    given = genome.train.model_dump(exclude_defaults=True, exclude={"data"})
    fixed = {name: value for name, value in given.items() if not isinstance(value, dict)}
    texts = [f"{name} {' '.join(v) if isinstance(v, list) else v}" for name, v in fixed.items()]
    trained = ("training", "; ".join([f"on {genome.train.data.train}", *texts]))
    return [("model", f"{genome.alone}, not merged"), trained] if genome.alone else [*merged, trained]


def _held_out_of(genome: Genome) -> str:
    """What the table at the end is measured on: a share of lm-eval's items, and of a training's examples."""
    asked = genome.for_lm_eval() is not None
    parts = [f"{genome.evaluate.holdout:.0%} of the items"] if asked else []
    if genome.train is not None:
        data = genome.train.data
        sources: dict[str, tuple[str | float, str | None]] = {
            "test": (data.test, data.train),
            "general_test": (data.general_test, data.general),
        }
        for name in dict.fromkeys(OWN_TASKS[task.name].parts[1] for task in genome.own_tasks):
            part, whole = sources[name]
            parts.append(part if isinstance(part, str) else f"{part:.0%} of {whole}")
    return ", ".join(parts)


def preview_text(preview: Preview) -> str:
    """What `--dry-run` prints."""
    genome, search = preview.genome, preview.genome.search
    tasks = ", ".join(f"{task.name} {task.metric} x{task.weight:g}" for task in genome.tasks)
    time = "unknown" if preview.seconds is None else f"about {duration(preview.seconds)}"
    facts = [
        *_models(genome),
        ("tasks", tasks),
        ("held out", _held_out_of(genome)),
        ("search", f"{search.direction}, {search.trials} trials in batches of {preview.batch}"),
        ("rungs", preview.rungs),
        ("proposer", f"{search.proposer}, seed {search.seed}"),
        ("run", str(preview.run_dir)),
        ("first", ", ".join(reference.origin for reference in preview.references) or "no references"),
        ("time", f"{time} ({preview.source})"),
        *([("llm", preview.model.describe())] if preview.model is not None else []),
    ]
    count = len(preview.proposals)
    shown = f"first {_COLUMNS} of {count} proposals" if count > _COLUMNS else "first proposals"
    first = f"{shown} ({preview.note})"
    parts = [pairs(facts), space_table(preview.space), f"{first}\n{proposals(preview.proposals)}"]
    return "\n\n".join(parts)
