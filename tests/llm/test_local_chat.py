"""The local client: under a grammar every reply parses, and nothing of torch's global state moves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmevo import Categorical, Condition, Float, Int, LLMError, Optimizer, Space
from llmevo.genome import LLMSpec
from llmevo.llm import Request, client_from
from llmevo.llm.encode import schema
from llmevo.llm.local import LocalChat
from llmevo.proposers.llm import LLM

SPACE = Space(
    {
        "weight": Float(0, 1),
        "rank": Int(4, 64),
        "method": Categorical("linear", "ties"),
        "density": Float(0.1, 1),
    },
    {"density": Condition("method", ("ties",))},
)
ASK = Request(({"role": "user", "content": "Propose."},), schema(SPACE, 2, why=False), max_tokens=150)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On shared cores a second thread makes a small model many times slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_tiny_llama: Callable[..., Path]) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-chat"), seed=5, layers=2)


def check(text: str) -> None:
    """The reply fulfils the schema, bounds included."""
    (key, found), *rest = json.loads(text).items()
    assert (key, len(found), rest) == ("proposals", 2, [])
    for item in found:
        genome = item["genome"]
        assert list(genome) == SPACE.names
        assert 0 <= genome["weight"] <= 100
        assert 4 <= genome["rank"] <= 64
        assert genome["method"] in ("linear", "ties")
        assert genome["density"] is None or 0 <= genome["density"] <= 100


def test_random_weights_cannot_leave_the_grammar(tiny: Path) -> None:
    client = LocalChat(tiny, temperature=1.5)
    replies = [client.complete(Request(ASK.messages, ASK.schema, seed=seed)) for seed in range(5)]
    for reply in replies:
        check(reply.text)
        assert (reply.finish_reason, reply.mode) == ("stop", "grammar")
        assert reply.usage.prompt is not None
    assert len({reply.text for reply in replies}) > 1


def test_seeded_and_without_a_trace(tiny: Path) -> None:
    import torch

    before = torch.get_rng_state()
    client = LocalChat(tiny)
    first = client.complete(Request(ASK.messages, ASK.schema, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1
    assert client.complete(Request(ASK.messages, ASK.schema, seed=1)).text == first.text
    assert LocalChat(tiny).complete(Request(ASK.messages, ASK.schema, seed=1)).text == first.text
    greedy = [client.complete(Request(ASK.messages, ASK.schema, temperature=0, seed=s)).text for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_cut_off_and_too_long(tiny: Path) -> None:
    client = LocalChat(tiny)
    cut = client.complete(Request(ASK.messages, ASK.schema, max_tokens=20))
    assert (cut.finish_reason, cut.usage.completion) == ("length", 20)
    long = Request(({"role": "user", "content": "word " * 400},), ASK.schema)
    assert client.complete(long).finish_reason == "context"
    free = client.complete(Request(ASK.messages, max_tokens=5))
    assert free.mode == "none"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LLMError, match=r"`llm\.local_model` must be a folder"):
        LocalChat(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LLMError, match="can load"):
        LocalChat(tmp_path).complete(ASK)


def test_pickled_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(LLMError, match="can load"):
        LocalChat(folder).complete(ASK)


def test_auto_is_local_without_an_endpoint(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    client = client_from(LLMSpec(local_model=str(tiny)))
    assert "in this process (because neither llm.base_url nor $OPENAI_API_KEY is set)" in client.describe()
    assert client.small
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    assert "llm.model names none" in client_from(LLMSpec(local_model=str(tiny))).describe()


@pytest.mark.slow
def test_smollm2_proposes_for_a_whole_run() -> None:
    """The embedded model as proposer: every answer parses, every label is true. No claim about quality."""
    client = client_from(LLMSpec(backend="local"))
    texts = []

    class Listening:
        small = True

        def complete(self, request: Request) -> Any:
            reply = client.complete(request)
            texts.append(reply.text)
            return reply

    opt = Optimizer(SPACE, LLM(SPACE, "maximize", client=Listening()), direction="maximize", seed=0)
    for _ in range(2):
        for trial in opt.ask(3):
            opt.tell(trial, float(SPACE.to_unit(trial.params)[0]))
    assert client.small
    assert len(texts) == 2
    for text in texts:
        json.loads(text)
    origins = [trial.origin for trial in opt.trials]
    assert origins[0] == "start"
    assert set(origins[1:]) <= {"llm", "llm+noise", "llm+mutated"}
    assert len({SPACE.key(trial.params) for trial in opt.trials}) == 6
