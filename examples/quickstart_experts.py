"""The quickstart's parents: one LoRA adapter for each subject, trained with peft in a plain loop.

Each answer is one token, so that only the last position's logits are needed, and of these only the subject's
answers: an expert learns which word of a kind is right, not that such a word is asked for. All of it is in
float32: many CPUs multiply that faster than bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from quickstart_data import Fact


@final
@dataclass(frozen=True, slots=True)
class Training:
    """Settings of a LoRA training.

    Args:
        rank: Of the adapter on every linear layer.
        alpha: Scale of the adapter, divided by `rank`.
        lr: Peak learning rate of AdamW; it rises for five steps and falls linearly.
        epochs: Passes over the facts.
        batch: Facts a step.
        seed: Of the initial adapter and the order of the facts.
    """

    rank: int = 16
    alpha: int = 32
    lr: float = 8e-4
    epochs: int = 1
    batch: int = 16
    seed: int = 0


def key(facts: Sequence[Fact], settings: Training) -> str:
    """SHA-256 of all that an adapter follows from, so that it is trained once and again when that changes."""
    content = json.dumps([[asdict(fact) for fact in facts], asdict(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def expert(
    base: Path,
    folder: Path,
    facts: Sequence[Fact],
    settings: Training,
    progress: Callable[[int, int, float], None],
) -> bool:
    """Train an adapter into `folder` unless the one there came from the same facts and settings.

    Args:
        base: Folder of the model.
        folder: Of the adapter; written atomically.
        facts: To train on.
        settings: How.
        progress: Is told the step, their number and the loss.

    Returns:
        Whether it was trained now.
    """
    stamp = folder / "made_from.json"
    made = key(facts, settings)
    if stamp.is_file() and json.loads(stamp.read_text())["key"] == made:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _train(base, facts, settings, progress).save_pretrained(beside)
        (beside / stamp.name).write_text(json.dumps({"key": made, **asdict(settings), "facts": len(facts)}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def _train(
    base: Path, facts: Sequence[Fact], settings: Training, progress: Callable[[int, int, float], None]
) -> Any:
    """The trained peft model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, lora)
    peft.train()
    weights = [weight for weight in peft.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0)
    answers = sorted({fact.answer for fact in facts})
    tokens = torch.tensor([_token(tokenizer, answer) for answer in answers])
    rows = [
        (tokenizer.encode(fact.prompt, add_special_tokens=False), answers.index(fact.answer))
        for fact in facts
    ]
    rng = random.Random(settings.seed)
    order = [index for _ in range(settings.epochs) for index in rng.sample(range(len(rows)), len(rows))]
    steps = len(order) // settings.batch
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min((step + 1) / 5, 1.0) * (1 - step / steps)
        batch = [rows[i] for i in order[step * settings.batch : (step + 1) * settings.batch]]
        # Padding on the right needs no mask: no position looks at a later one.
        prompts = [torch.tensor(prompt) for prompt, _ in batch]
        inputs = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        hidden = model.model(inputs, use_cache=False).last_hidden_state[torch.arange(len(batch)), last]
        logits = hidden @ model.lm_head.weight[tokens].T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([answer for _, answer in batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, steps, loss.item())
    return peft


def _token(tokenizer: Any, answer: str) -> int:
    (token,) = tokenizer.encode(f" {answer}", add_special_tokens=False)
    return int(token)
