"""`llmevo llm check`: does my language model work, how fast, and what does it cost?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmevo.cli.options import Json, Verbose
from llmevo.cli.output import say, say_json

if TYPE_CHECKING:
    from llmevo.genome import LLMSpec
    from llmevo.llm.check import Check

app = typer.Typer(help="The language model that proposes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def check(
    genome_path: Annotated[
        Path | None,
        typer.Argument(metavar="[GENOME]", help="Take its llm: section.", show_default=False),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", metavar="URL", help="Of the endpoint, with its /v1.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The endpoint's name of the model.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="The variable that holds the key.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Ask the language model a few small questions and say on one screen whether it can be used."""
    from llmevo.llm import check as checks
    from llmevo.llm import client_from
    from llmevo.llm.transcript import Transcript
    from llmevo.runner.opening import ledger

    given = {"base_url": base_url, "model": model, "api_key_env": api_key_env}
    spec = _spec(genome_path, {key: value for key, value in given.items() if value is not None})
    counted = ledger(spec)
    chat = client_from(spec, counted)
    with tempfile.TemporaryDirectory(prefix="llmevo-check-") as folder:
        records = Transcript(
            chat, Path(folder), counted, variable=spec.api_key_env, max_tokens=spec.max_tokens
        )
        found = checks.check(records, spec.mode)
    if as_json:
        say_json(found.to_json())
    else:
        say(_screen(found))
    raise typer.Exit(0 if found.problem is None else 1)


def _spec(genome_path: Path | None, given: dict[str, Any]) -> LLMSpec:
    """The genome's section, or the defaults, with what was given on the command line."""
    from pydantic import ValidationError

    from llmevo.errors import GenomeError
    from llmevo.genome import LLMSpec, load
    from llmevo.genome.explain import explain

    if given.keys() & {"base_url", "model"}:
        given = {"backend": "openai", **given}
    if genome_path is not None:
        return load(genome_path, [f"llm.{key}={value}" for key, value in given.items()]).llm
    try:
        return LLMSpec(**given)
    except ValidationError as error:
        raise GenomeError("; ".join(explain(error, LLMSpec))) from None


def _screen(found: Check) -> str:
    from llmevo.cli.console import pairs, value_text
    from llmevo.report.words import spending

    times = ", ".join(f"{seconds:.1f}" for seconds in found.seconds)
    sample = found.sample or {}
    tried = [(f"  {rung.mode}", f"{rung.verdict}: {rung.detail}") for rung in found.rungs]
    facts = [
        ("model", found.client),
        ("mode", found.mode or "not found"),
        *tried,
        ("seconds a call", times or "none was answered"),
        ("points", f"{found.valid} of {found.requested} asked for could be used"),
        ("sample", ", ".join(f"{name} {value_text(value)}" for name, value in sample.items()) or "none"),
        ("spent", spending(found.totals)),
    ]
    if found.totals.usd is None:
        facts.append(("price", "unknown; give llm.price to count dollars and to use llm.max_usd"))
    if found.problem is not None and found.reply:
        facts.append(("answer", found.reply))
    facts.append(("result", "it works" if found.problem is None else f"it does not work: {found.problem}"))
    return pairs(facts)
