"""peft and transformers' Trainer on the batches of a plan: what our loop is held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from llmevo.genome.train import TrainSettings
from llmevo.train.data import Example
from llmevo.train.loop import plan


def of_trainer(
    model: Any,
    examples: list[Example],
    settings: TrainSettings,
    folder: Path,
    collate: Callable[[list[Example]], dict[str, Any]],
    task_type: str = "CAUSAL_LM",
) -> tuple[list[float], Any]:
    """The loss of each step, by the model's own loss on what `collate` makes; and peft's model after it."""
    from transformers import Trainer, TrainingArguments

    losses = []

    class Recording(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [examples[index] for step in plan(examples, settings, 0) for index, _ in step]
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type=task_type
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )

    def whole(batch: list[Example]) -> dict[str, Any]:
        return {key: torch.as_tensor(value) for key, value in collate(batch).items()}

    Recording(wrapped, arguments, train_dataset=rows, data_collator=whole).train()
    return losses, wrapped
