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

from llmevo.cli import adapters, bench, model, replay, results
from llmevo.cli.options import Json, Verbose
from llmevo.cli.output import say as _print
from llmevo.cli.output import say_json as _print_json
from llmevo.errors import GenomeError, LlmevoError, SpaceError, TrialError

if TYPE_CHECKING:
    from llmevo.genome import Genome, TrainSpec

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

GenomePath = Annotated[
    Path, typer.Argument(metavar="GENOME", help="The YAML file that says what to search.", show_default=False)
]
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
    from llmevo.report.words import counted

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
            facts["examples"] = _check_training(genome, genome.train)
            facts["checked"] += ["examples", "hyperparameters"]
    if as_json:
        _print_json(facts)
        return
    checked = ", ".join(facts["checked"])
    found = counted(facts["genes"], "gene"), counted(len(facts["references"]), "reference")
    _print(f"{genome_path}: valid ({checked}); {', '.join(found)}")
    for note in facts.get("parents", {}).get("notes", []):
        print(f"note: {note}", file=sys.stderr)


def _check_training(genome: Genome, spec: TrainSpec) -> dict[str, int]:
    """Check the examples and hyperparameters against a model without weights; return examples by part."""
    from transformers.utils import logging

    from llmevo.merge import skeleton
    from llmevo.train import check_packages, prepare

    check_packages(spec)
    logging.set_verbosity_error()  # that an example is longer than the context is said below
    model, tokenizer = skeleton(genome.genome, spec.head)
    names = [task.name for task in genome.own_tasks]
    halving, seed = genome.search.halving, genome.search.seed
    found = prepare(spec, model, tokenizer, seed=seed, metrics=names, halving=halving)
    return {part: len(examples) for part, examples in found.data.parts.items()}


for _read in (results.status, results.show, results.best, results.export, results.report, replay.replay):
    app.command()(_read)
app.command()(adapters.merge_adapters)


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
