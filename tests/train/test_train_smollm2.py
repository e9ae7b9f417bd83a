"""SmolLM2, trained for a few steps in bfloat16: packed, learning, and gone without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from llmevo.genome import TrainSpec  # noqa: E402
from llmevo.train import Trainer  # noqa: E402


@pytest.mark.slow
def test_smollm2_learns_chats_in_bfloat16(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
        return model.requires_grad_(False).eval()

    words = {
        "rouge": "red",
        "bleu": "blue",
        "vert": "green",
        "noir": "black",
        "blanc": "white",
        "gris": "grey",
    }
    rows = [
        {"messages": [{"role": "user", "content": french}, {"role": "assistant", "content": english}]}
        for french, english in words.items()
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "validation": str(path), "test": str(path)}
    spec = TrainSpec(data=data, rank=8, layers=6, batch_size=3, epochs=4, learning_rate=2e-3, warmup=0.1)
    model = load()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = Trainer(spec, model, AutoTokenizer.from_pretrained(smollm2), seed=0)
    assert trainer.describe()["packed"]
    assert trainer.describe()["head_at_targets"]
    before = sum(trainer.losses("test")) / len(rows)
    with trainer.candidate(spec.settings({}), 0, "base", tmp_path / "adapter") as trained:
        after = sum(trainer.losses("test")) / len(rows)
        logits = model(torch.tensor([[1, 2, 3, 4, 5]])).logits
    assert trained.metrics["steps"] == 8
    assert after < before - 1.0
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    alone = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(alone(torch.tensor([[1, 2, 3, 4, 5]])).logits, logits, atol=0, rtol=0)
