"""A four-choice lm-eval task of one's own, as several tests need it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def sums(numbers: Iterable[int], offsets: Sequence[int] = (0, 1, 2, 3)) -> list[dict[str, Any]]:
    """Items that ask what a number plus 1 is; the right choice is the second."""
    return [{"q": f"{n} plus 1 is", "choices": [str(n + k) for k in offsets], "gold": 1} for n in numbers]


def write_choice_task(folder: Path, name: str, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write the items of each split, `test` among them, and the task's YAML beside them."""
    files = {split: folder / f"{name}-{split}.jsonl" for split in splits}
    for split, rows in splits.items():
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
