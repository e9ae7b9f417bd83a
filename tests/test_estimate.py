"""What a dry run says of the language model, against what a run then takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_server import genomes as answering
from fault_server import serving
from search_run import FunctionExecutor, genome_data

from llmevo import genome as genomes
from llmevo import runner
from llmevo.cli.console import preview_text
from llmevo.cli.display import NoDisplay
from llmevo.cli.preview import preview
from llmevo.llm.encode import names
from llmevo.recipe import Recipes


def text_of(proposer: str, **llm: Any) -> str:
    price = {"prompt": 1.0, "completion": 4.0}
    options = {"backend": "openai", "model": "m", "mode": "json_schema", "price": price, **llm}
    return yaml.safe_dump({**genome_data(proposer=proposer, trials=41), "llm": options})


@pytest.mark.parametrize("proposer", ["llm", "hybrid", "warmstart"])
def test_a_run_takes_no_more_calls_than_the_dry_run_says(
    proposer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-estimate-0123456789")
    space = Recipes(genomes.parse(text_of(proposer)), 4).space

    def point(index: int) -> dict[str, Any]:
        return {key: (37 * index + 11 * place) % 101 for place, key in enumerate(names(space).values())}

    with serving(answering(point)) as server:
        text = text_of(proposer, base_url=server.url)
        genome = genomes.parse(text)
        found = preview(genome, tmp_path / "run", 4)
        summary = runner.run(
            genome, text, tmp_path / "run", observer=NoDisplay(), executor=FunctionExecutor()
        )
        bodies = [len(json.dumps(seen.json["messages"])) for seen in server.requests]
    assert found.model is not None
    assert summary.money is not None
    assert 1 <= summary.money.calls <= found.model.calls
    assert found.model.usd is not None
    assert found.model.most_usd is not None
    assert found.model.usd < found.model.most_usd
    per_call = found.model.prompt / found.model.calls
    if proposer != "warmstart":  # it asks before there is a history
        assert max(bodies) / 8 < per_call < max(bodies), "tokens have between one and eight bytes"
    assert "up to" in preview_text(found)
    assert found.to_json()["llm"]["calls"] == found.model.calls


def test_without_a_price_dollars_are_unknown_and_without_a_model_there_is_nothing(tmp_path: Path) -> None:
    found = preview(genomes.parse(text_of("llm", price=None)), tmp_path / "run", 4)
    assert found.model is not None
    assert (found.model.usd, found.model.most_usd) == (None, None)
    assert "dollars unknown" in preview_text(found)
    assert preview(genomes.parse(text_of("cma")), tmp_path / "run", 4).model is None
