"""What the tests of the train stage share: a tiny Llama in memory, and made-up facts to learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")


@pytest.fixture(scope="session")
def tiny_folder(tiny_llamas: Any) -> Path:
    return tiny_llamas.base


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


def _load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def load_model() -> Callable[[Path], Any]:
    """A folder's model in float32, frozen."""
    return _load_model


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """The resident model of these tests, in float32; every test must leave it as it was."""
    return _load_model(tiny_folder)


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 made-up facts as prompt and completion, of unequal lengths."""
    rows = [
        {"prompt": f"The capital of land{i}" + " far away" * (i % 4) + " is", "completion": f" city{i % 7}"}
        for i in range(80)
    ]
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_spec(facts_file: Path) -> Callable[..., Any]:
    """`TrainSpec` on the facts, small and quick; keywords replace its settings."""
    from llmevo.genome import TrainSpec

    def make(**settings: Any) -> Any:
        given = {"data": str(facts_file), "rank": 4, "learning_rate": 1e-2, "batch_size": 8}
        return TrainSpec.model_validate({**given, **settings})

    return make


@pytest.fixture
def untouched(tiny: Any) -> Any:
    """Fails the test unless the model is afterwards as it was before, weights in the same place included."""
    state = {key: tensor.clone() for key, tensor in tiny.state_dict().items()}
    places = {name: p.data_ptr() for name, p in tiny.named_parameters()}
    modules = [(name, type(module)) for name, module in tiny.named_modules()]
    attributes = set(vars(tiny))
    yield
    assert [(name, type(module)) for name, module in tiny.named_modules()] == modules
    assert {name: p.data_ptr() for name, p in tiny.named_parameters()} == places
    assert set(vars(tiny)) == attributes
    assert all(torch.equal(tensor, state[key]) for key, tensor in tiny.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in tiny.parameters())
    assert not tiny.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())
