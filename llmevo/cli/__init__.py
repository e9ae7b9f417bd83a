"""The command line: run, validate, status, show, best, export, report, replay, merge-adapters, bench, llm.

Results go to stdout, everything else to stderr. Exit codes: 0 finished, 1 error, 2 usage or genome, 3 stopped
early and resumable, 130 interrupted. Commands import what they need when they run, so that help is quick.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from llmevo.cli import adapters, bench, model, replay
from llmevo.cli.output import say as _print
from llmevo.cli.output import say_json as _print_json
from llmevo.errors import GenomeError, LlmevoError, SpaceError, TrialError

if TYPE_CHECKING:
    from llmevo.genome import Genome
    from llmevo.report.findings import Findings
    from llmevo.trial import Trial

app = typer.Typer(
    name="llmevo",
    help="Evolve language models: search merge recipes with swappable proposers.",
    epilog="Results go to stdout, everything else to stderr. Add -v to any command for tracebacks.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(model.app, name="llm")
app.add_typer(bench.app, name="bench")
app.command()(replay.replay)
app.command()(adapters.merge_adapters)

GenomePath = Annotated[
    Path, typer.Argument(metavar="GENOME", help="The YAML file that says what to search.", show_default=False)
]
RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory.", exists=True, file_okay=False, show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")]
Benchmarks = Annotated[
    bool,
    typer.Option(
        "--allow-benchmark-tasks",
        help="Tune on public benchmarks all the same; their scores then say nothing of the model.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the genome; may be repeated."),
]


@app.command()
def run(
    genome_path: GenomePath,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Where the run lies; runs/<genome> if not given."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Trials, references included.")
    ] = None,
    proposer: Annotated[
        str | None, typer.Option("--proposer", metavar="NAME", help="random, sobol, ga, cma, llm or hybrid.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Everything random follows from it.")
    ] = None,
    overrides: Overrides = None,
    reference_eval: Annotated[
        bool, typer.Option("--reference-eval", help="Score with lm-eval's own forward passes throughout.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; load no weights and write nothing.")
    ] = False,
    display: Annotated[
        Literal["auto", "rich", "plain", "json", "none"],
        typer.Option("--display", help="Progress on stderr; auto is rich on a terminal, else plain."),
    ] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move a run that lies there aside and begin anew.")
    ] = False,
    allow_benchmark_tasks: Benchmarks = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Begin a run, or continue the one that lies in its directory."""
    flags = (("search.trials", trials), ("search.proposer", proposer), ("search.seed", seed))
    given = [f"{key}={value}" for key, value in flags if value is not None]
    given += ["evaluate.reference=true"] if reference_eval else []
    genome = _load(genome_path, [*(overrides or []), *given])
    folder = run_dir or Path(genome.run.dir or Path("runs") / genome_path.stem)
    if dry_run:
        _preview(genome, folder, allow_benchmark_tasks, as_json)
        return
    _search(genome, genome_path, folder, allow_benchmark_tasks, display, fresh, as_json)


def _load(path: Path, overrides: Sequence[str]) -> Genome:
    """The genome, with a proposer that exists."""
    import difflib

    from llmevo.genome import load
    from llmevo.proposers import PROPOSERS

    genome = load(path, overrides)
    for key, name in (("proposer", genome.search.proposer), ("base", genome.search.base)):
        if name not in PROPOSERS:
            near = difflib.get_close_matches(name, PROPOSERS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise GenomeError(
                f"{path}: `search.{key}` must be one of {', '.join(PROPOSERS)}, but got {name!r}.{hint}"
            )
    return genome


def _search(
    genome: Genome,
    genome_path: Path,
    folder: Path,
    allow_benchmark_tasks: bool,
    display: Literal["auto", "rich", "plain", "json", "none"],
    fresh: bool,
    as_json: bool,
) -> None:
    from llmevo import runner
    from llmevo.cli.display import RichDisplay, choose
    from llmevo.evaluate import check_tasks
    from llmevo.report.findings import load

    check_tasks(genome, allow_benchmark_tasks)
    if genome.train is not None:
        from llmevo.train import check_packages

        check_packages(genome.train)
    observer = choose(display)
    try:
        text = genome_path.read_text(encoding="utf-8-sig")
        summary = runner.run(genome, text, folder, observer=observer, fresh=fresh)
    finally:
        if isinstance(observer, RichDisplay):
            observer.close()
    findings = load(folder, summary)
    if as_json:
        _print_json(findings.to_json())
    else:
        from llmevo.cli.console import end_of_run

        _print(end_of_run(findings))
    raise typer.Exit(summary.exit_code)


def _preview(genome: Genome, folder: Path, allow_benchmark_tasks: bool, as_json: bool) -> None:
    from llmevo.cli.console import preview_text
    from llmevo.cli.preview import preview
    from llmevo.evaluate import check_tasks
    from llmevo.recipe import num_layers

    check_tasks(genome, allow_benchmark_tasks)
    found = preview(genome, folder, num_layers(genome))
    if as_json:
        _print_json(found.to_json())
    else:
        _print(preview_text(found))


@app.command()
def validate(
    genome_path: GenomePath,
    offline: Annotated[
        bool, typer.Option("--offline", help="Check the file alone, not the models and tasks it names.")
    ] = False,
    overrides: Overrides = None,
    allow_benchmark_tasks: Benchmarks = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check a genome, its tasks and its models' headers; load no weights."""
    from llmevo.recipe import Recipes, num_layers

    genome = _load(genome_path, overrides or [])
    recipes = Recipes(genome, num_layers(genome, offline=offline))
    facts: dict[str, Any] = {
        "genome": str(genome_path),
        "valid": True,
        "genes": len(recipes.space),
        "references": [reference.origin for reference in recipes.references()],
        "checked": ["genome"],
    }
    if not offline:
        from llmevo.evaluate import check_tasks
        from llmevo.merge import check_parents

        check_tasks(genome, allow_benchmark_tasks)
        facts |= {"parents": check_parents(genome.genome), "checked": ["genome", "tasks", "parents"]}
        if genome.train is not None:
            from llmevo.train import check_data, check_packages

            check_packages(genome.train)
            facts["examples"] = check_data(genome.train.data)
            facts["checked"].append("examples")
    if as_json:
        _print_json(facts)
        return
    checked = ", ".join(facts["checked"])
    _print(f"{genome_path}: valid ({checked}); {facts['genes']} genes, {len(facts['references'])} references")
    for note in facts.get("parents", {}).get("notes", []):
        print(f"note: {note}", file=sys.stderr)


@app.command()
def status(run_path: RunPath, as_json: Json = False, verbose: Verbose = False) -> None:
    """Say where a run stands; also while it goes on."""
    from llmevo.cli import console
    from llmevo.report.findings import load

    findings = load(run_path)
    if as_json:
        _print_json(findings.to_json())
    else:
        _print(console.status(findings))


@app.command()
def show(
    run_path: RunPath,
    number: Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="A trial's number.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show one trial: score, tasks, genes, recipe."""
    from llmevo.cli import console
    from llmevo.report.findings import load

    findings = load(run_path)
    trial = _trial(findings, number)
    recipe = _recipe(findings, trial)
    if as_json:
        _print_json({**trial.to_json(), "recipe": recipe})
    else:
        _print(console.show(findings, trial, _yaml(recipe)))


@app.command()
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
    from llmevo.report.findings import load, trial_json

    findings = load(run_path)
    trial = _trial(findings, None)
    recipe = _recipe(findings, trial)
    snippets = trained.snippets_of(findings, trial)
    if as_json:
        verdict = {"headline": findings.headline(), "verdict": findings.verdict()}
        copied: dict[str, Any] = {"python": None, "axolotl": None, **(snippets or {})}
        _print_json({"trial": trial_json(trial), "recipe": recipe, **copied, **verdict})
        return
    print(f"# trial {trial.number} by {trial.origin}: {scored(findings, trial)}", file=sys.stderr)
    shown = _yaml(recipe) if snippets is None else snippets["axolotl" if axolotl else "python"]
    _print(shown.rstrip())


@app.command()
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
    from llmevo.cli import card, trained
    from llmevo.merge import export as write
    from llmevo.report.findings import load

    findings = load(run_path)
    trial = _trial(findings, number)
    recipe = _recipe(findings, trial)
    adapter = trained.adapter_of(findings, trial)
    text = card.render(findings, trial, _yaml(recipe), out.resolve().name)
    write(recipe, out, card=text, seed=findings.genome.search.seed, device=findings.device)
    if adapter is not None:
        from llmevo.train.fuse import fuse

        fuse(out, adapter)
    if as_json:
        _print_json({"out": str(out), "trial": trial.number, "files": sorted(p.name for p in out.iterdir())})
    else:
        _print(str(out))


@app.command()
def report(
    run_path: RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="RUN/report.html if not given.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write one HTML file about a run, with its figures inside."""
    from llmevo import report as reports
    from llmevo.report.findings import load

    findings = load(run_path)
    path = reports.write(findings, out or run_path / "report.html")
    if as_json:
        _print_json({"report": str(path), **findings.to_json()})
    else:
        _print(str(path))


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


def _recipe(findings: Findings, trial: Trial) -> dict[str, Any]:
    """The mergekit configuration of a trial."""
    known: dict[str, Any] | None = trial.attrs.get("recipe")
    if known is not None:
        return known
    from llmevo.recipe import Recipes, num_layers

    return Recipes(findings.genome, num_layers(findings.genome)).recipe(trial.params)


def _yaml(recipe: dict[str, Any]) -> str:
    from llmevo.genome.yamltext import dump

    return dump(recipe)


def _version(value: bool) -> None:
    if value:
        from llmevo import __version__

        _print(f"llmevo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run a command, say an error in one line, and exit with the documented code."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(given, prog_name="llmevo", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of stdout, `head` say, has seen enough
        sys.stderr.close()
        code = 1
    except Exception as error:
        code = _say(error, verbose=not {"-v", "--verbose"}.isdisjoint(given))
    sys.exit(code or 0)


_EXTRA_LM = ("torch", "transformers", "peft", "safetensors", "mergekit", "lm_eval")


def _say(error: Exception, verbose: bool) -> int:
    """Print an error to stderr; return the exit code."""
    if verbose and not isinstance(error, typer.TyperException):
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, typer.TyperException):
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return error.exit_code
    package = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in _EXTRA_LM:
        print(
            f'error: this needs the package {package}, of the extra `lm`: pip install "llmevo[lm]"',
            file=sys.stderr,
        )
        return 1
    if isinstance(error, LlmevoError):
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (GenomeError, SpaceError, TrialError)) else 1
    hint = "" if verbose else " (-v shows where)"
    print(f"error: {type(error).__name__}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return 1
