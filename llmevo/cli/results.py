"""The commands that read a run: status, show, best, export, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmevo.cli.options import Json, RunPath, Verbose
from llmevo.cli.output import say, say_json
from llmevo.errors import LlmevoError, TrialError

if TYPE_CHECKING:
    from llmevo.report.findings import Findings
    from llmevo.trial import Trial


def status(run_path: RunPath, as_json: Json = False, verbose: Verbose = False) -> None:
    """Say where a run stands; also while it goes on."""
    from llmevo.cli import console
    from llmevo.report.findings import load

    findings = load(run_path)
    if as_json:
        say_json(findings.to_json())
    else:
        say(console.status(findings))


def show(
    run_path: RunPath,
    number: Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="A trial's number.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show one trial: score, tasks, genes, recipe."""
    from llmevo.cli import console

    findings, trial, recipe = _chosen(run_path, number)
    if as_json:
        say_json({**trial.to_json(), "recipe": recipe})
    else:
        say(console.show(findings, trial, _yaml(recipe)))


def best(
    run_path: RunPath,
    axolotl: Annotated[
        bool, typer.Option("--axolotl", help="A training's settings as YAML for axolotl.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print the best trial's recipe, a mergekit configuration, or its settings for peft and TRL."""
    from llmevo.cli import trained
    from llmevo.cli.console import scored
    from llmevo.report.findings import trial_json

    findings, trial, recipe = _chosen(run_path, None)
    snippets = trained.snippets_of(findings, trial)
    if axolotl and snippets is None:
        raise LlmevoError(
            f"`--axolotl` must be given for a trained trial, but the best, {trial.number} ({trial.origin}), "
            "was not trained; leave it out."
        )
    if as_json:
        verdict = {"headline": findings.headline(), "verdict": findings.verdict()}
        copied: dict[str, str | None] = {"python": None, "axolotl": None, **(snippets or {})}
        say_json({"trial": trial_json(trial), "recipe": recipe, **copied, **verdict})
        return
    if snippets is not None:  # they say in their head what they are
        say(snippets["axolotl" if axolotl else "python"].rstrip())
        return
    print(f"# trial {trial.number} by {trial.origin}: {scored(findings, trial)}", file=sys.stderr)
    say(_yaml(recipe).rstrip())


def export(
    run_path: RunPath,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    number: Annotated[
        int | None, typer.Option("--trial", metavar="N", min=0, help="Which trial; the best if not given.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a trial's weights, tokenizer and a model card with the evidence."""
    from llmevo import merge, quiet
    from llmevo.cli import card, trained

    findings, trial, recipe = _chosen(run_path, number)
    quiet.transformers()
    adapter = trained.adapter_of(findings, trial)
    text = card.render(findings, trial, _yaml(recipe), out.resolve().name)
    genome = findings.genome
    if genome.train is not None and genome.alone and merge.needed(genome.genome, genome.train.head):
        merge.copy_of(genome.genome, out, text)
    else:
        merge.export(recipe, out, card=text, seed=genome.search.seed, device=findings.device)
    if adapter is not None:
        from llmevo.train.fuse import fuse

        fuse(out, adapter)
    if as_json:
        say_json({"out": str(out), "trial": trial.number, "files": sorted(p.name for p in out.iterdir())})
    else:
        say(str(out))


def report(
    run_path: RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="RUN/report.html if not given.")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", metavar="RUN", help="Another run on the same items; may be repeated."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write one HTML file about a run, with its figures inside."""
    from llmevo import report as reports
    from llmevo.report.beside import compare
    from llmevo.report.findings import load

    findings = load(run_path)
    others = [load(other) for other in beside or []]
    path = reports.write(findings, out or run_path / "report.html", others)
    if as_json:
        rivals = [rival.to_json() for rival in compare(findings, others)] if others else []
        say_json({"report": str(path), "beside": rivals, **findings.to_json()})
    else:
        say(str(path))


def _chosen(run_path: Path, number: int | None) -> tuple[Findings, Trial, dict[str, Any]]:
    """A run, its trial `number` or the best, and that trial's mergekit configuration."""
    from llmevo.report.findings import load

    findings = load(run_path)
    trial = _trial(findings, number)
    recipe: dict[str, Any] | None = trial.attrs.get("recipe")
    if recipe is None:
        from llmevo.recipe import Recipes, num_layers

        recipe = Recipes(findings.genome, num_layers(findings.genome)).recipe(trial.params)
    return findings, trial, recipe


def _trial(findings: Findings, number: int | None) -> Trial:
    """Trial `number`, or the best."""
    trials = findings.trials
    if number is None:
        if findings.summary.best is None:
            raise LlmevoError(f"`{findings.summary.run_dir}` has no complete trial yet.")
        return findings.summary.best
    if number >= len(trials):
        raise TrialError(f"`TRIAL` must be one of the run's 0 to {len(trials) - 1}, but got {number}.")
    return trials[number]


def _yaml(recipe: dict[str, Any]) -> str:
    from llmevo.genome.yamltext import dump

    return dump(recipe)
