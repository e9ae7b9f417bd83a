"""`llmevo bench adapters`: what each method of training costs and comes to, on your model and data."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from llmevo.cli.options import Json, Verbose
from llmevo.cli.output import say, say_json
from llmevo.errors import GenomeError

app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def adapters(
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="A model's folder; SmolLM2-135M if not given."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="As `train.data`; words and their languages if not given."
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="Adapters to compare, instead of eleven.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="To train each method on.")] = 4000,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How often each is trained.")] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32; as `evaluate.dtype`.")
    ] = "auto",
    device: Annotated[str, typer.Option("--device", help="As `evaluate.device`.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the results as JSON, too.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train every method on the same tokens: trainable share, time per step, memory, held-out loss."""
    from contextlib import nullcontext

    from transformers.utils import logging

    from llmevo.embedded import smollm2
    from llmevo.train import comparison

    logging.disable_progress_bar()
    chosen = comparison.METHODS if methods is None else tuple(name.strip() for name in methods.split(","))
    examples = comparison.words() if data is None else nullcontext({"train": str(data)})
    with tempfile.TemporaryDirectory(prefix="llmevo-bench-") as folder, examples as given:
        resident, tokenizer = _load(model or smollm2(Path(folder) / "smollm2"), device, dtype)
        found = comparison.compare(
            resident,
            tokenizer,
            given,
            chosen,
            tokens=tokens,
            seeds=seeds,
            note=lambda line: print(line, file=sys.stderr),
        )
    if model is None:
        found["model"] = "SmolLM2-135M-Instruct"
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        say_json(found)
    else:
        say(_table(found))


def _load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """A model on its device, frozen, and its tokenizer."""
    if not (folder / "config.json").is_file():
        raise GenomeError(
            f"`--model` must be a folder with a model, but {str(folder)!r} has no config.json; check the "
            "path."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmevo import evaluate
    from llmevo.genome import EvaluateSpec

    spec = EvaluateSpec.model_validate({"device": device, "dtype": dtype})
    where = evaluate.device(spec)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=evaluate.dtype(spec, where))
    except ValueError as error:  # it names all the kinds that there are
        raise GenomeError(
            f"`--model` must be a model that goes on with a text, but {str(folder)!r} is not "
            f"({str(error).partition(' for this kind of')[0][:300]}); take a Llama, GPT-2 or the like."
        ) from None
    return model.to(where).requires_grad_(False).eval(), AutoTokenizer.from_pretrained(str(folder))


def _table(found: dict[str, Any]) -> str:
    from llmevo.cli.console import table
    from llmevo.report.words import counted

    head = ("method", "lr", "rank", "trained", "s/step", "MB", "held-out loss", "gain")
    rows = [
        (
            row["method"],
            f"{row['learning_rate']:g}",
            "" if row["rank"] is None else str(row["rank"]),
            f"{100 * row['trained']:.3f} %",
            f"{row['seconds']:.3f}",
            "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}",
            f"{row['loss']:.3f} \N{PLUS-MINUS SIGN} {row['stderr']:.3f}",
            f"{row['gain']:+.3f} \N{PLUS-MINUS SIGN} {row['gain_stderr']:.3f}".replace("-", "\N{MINUS SIGN}"),
        )
        for row in found["rows"]
    ]
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join(
        [
            table(head, rows),
            "",
            f"{found['model']}, {found['tokens']} tokens in batches of {found['batch_size']} examples, "
            f"{counted(found['seeds'], 'seed')}; untrained {found['untrained']:.3f} nats a token to learn.",
            f"MB: {found['memory']}, beyond the resident model. gain: paired, with its standard error.",
            machine,
        ]
    )
