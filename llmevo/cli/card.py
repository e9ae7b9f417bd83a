"""The model card of an exported merge: what it is made of, and the evidence for it."""

from __future__ import annotations

from pathlib import Path

from llmevo.cli import trained
from llmevo.cli.console import scored
from llmevo.genome import TrainSettings
from llmevo.report.findings import Findings
from llmevo.report.words import interval, number, percent, signed
from llmevo.runner.observer import Row
from llmevo.trial import Trial

_HEAD = """---
library_name: transformers
tags:
{tags}
---
"""


def render(findings: Findings, trial: Trial, recipe: str, name: str) -> str:
    """The card as Markdown with the hub's YAML head.

    Args:
        findings: The run.
        trial: The one that is exported.
        recipe: Its mergekit configuration as YAML.
        name: What the model is called.
    """
    search = findings.genome.search
    versions = ", ".join(f"{package} {version}" for package, version in findings.versions.items())
    tasks = ", ".join(
        f"`{task.name}` ({task.metric}, weight {task.weight:g})" for task in findings.genome.tasks
    )
    models = "\n".join(f"- `{model}`" for model in findings.genome.genome.models)
    base = findings.genome.genome.base_model
    merged = findings.genome.alone is None
    settings = trained.settings_of(findings, trial)
    kinds = ["merge", "mergekit"] * merged + ["peft"] * (settings is not None) + ["llmevo"]
    head = _HEAD.format(tags="\n".join(f"- {kind}" for kind in kinds))
    return f"""{head}# {name}

{_origin(merged, settings is not None)}
It is trial {trial.number} of the run `{findings.name}`, proposed by `{trial.origin}`.

Models:

{models}

Base model: {f"`{base}`" if base else "none"}
{"" if settings is None else _training(findings, settings)}
## Evidence

{_evidence(findings, trial)}

In the search it scored {scored(findings, trial)}, on the items by which it was chosen.
Only the held-out items are evidence.

## Search

- Score: {search.direction} the weighted sum of {tasks}
- Proposer: {search.proposer}{f" ({findings.language_model})" if findings.language_model else ""}
- Budget: {search.trials} trials, of which {findings.counts()["failed"]} failed; seed {search.seed}
- Versions: {versions}
{_recipe(recipe) if merged else ""}"""


def _recipe(recipe: str) -> str:
    return f"""
## Recipe

```yaml
{recipe.rstrip()}
```
"""


def _origin(merged: bool, tuned: bool) -> str:
    if not tuned:
        return "A merge of language models, found by evolution with llmevo and computed by mergekit."
    what = "A merge of language models, computed by mergekit and fine-tuned" if merged else "A fine-tune"
    return f"{what} with an adapter that is added to the weights; its settings were found with llmevo."


def _training(findings: Findings, settings: TrainSettings) -> str:
    spec = findings.genome.train
    data = "" if spec is None else f" on `{Path(spec.data.train).name}`"
    chosen = ", ".join(f"{name} {_value(value)}" for name, value in settings.held().items())
    return f"""
## Training

An adapter trained{data}: {chosen}.
"""


def _value(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _evidence(findings: Findings, trial: Trial) -> str:
    rows = findings.summary.table
    if not rows:
        return findings.verdict()
    lines = [
        f"Scores on {findings.held_out_items()} held-out items; differences are paired, to the "
        f"{findings.rival_name}.",
        "",
        "| model | score | 95 % interval | difference | interval | p | optimism |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        "p: chance of a difference this large between equals, with Holm's correction over the finalists. "
        "Optimism: by how much the items of the search score the model better than the held-out ones.",
    ]
    winner = findings.winner
    if winner is not None and winner.trial.number == trial.number:
        lines += ["", findings.verdict()]
    elif not any(row.trial.number == trial.number for row in rows):
        lines += ["", f"Trial {trial.number} itself was not scored on the held-out items."]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.score is None:
        return f"| {row.label} | failed | | | | | |"
    span, gap = interval(row.score), row.interval
    cells = (
        row.label,
        number(row.score.value),
        "" if span is None else f"{number(span[0])} to {number(span[1])}",
        "" if gap is None else signed(gap.estimate),
        "" if gap is None else f"{signed(gap.low)} to {signed(gap.high)} ({percent(gap.level)})",
        "" if row.p_value is None else f"{row.p_value:.2g}",
        "" if row.optimism is None else signed(row.optimism),
    )
    return f"| {' | '.join(cells)} |"
