"""Local lm-eval tasks of every request type, as a user would write them: JSONL and YAML in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

_FACTS = [
    ("Japan", "yen"),
    ("Sweden", "krona"),
    ("India", "rupee"),
    ("Poland", "zloty"),
    ("Israel", "shekel"),
    ("Turkey", "lira"),
    ("China", "yuan"),
    ("Brazil", "real"),
    ("Mexico", "peso"),
    ("Hungary", "forint"),
    ("Ghana", "cedi"),
    ("Kenya", "shilling"),
]
_COMMON = {"dataset_path": "json", "test_split": "test", "fewshot_split": "train"}


def _choice_rows(count: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i in range(count):
        country, currency = _FACTS[i % len(_FACTS)]
        wrong = [_FACTS[(i + k) % len(_FACTS)][1] for k in (1, 3, 5)]
        gold = i % 4
        choices = [*wrong[:gold], currency, *wrong[gold:]]
        rows.append({"q": f"{i}. What is the currency of {country}?", "choices": choices, "gold": gold})
    return rows


def _text_rows(count: int) -> list[dict[str, object]]:
    return [
        {"q": f"{i} + {i} =", "a": str(2 * i), "text": f"{c} pays in {m}, for {i} reasons. " * (1 + i % 3)}
        for i, (c, m) in ((i, _FACTS[i % len(_FACTS)]) for i in range(count))
    ]


def write_task(folder: Path, name: str, rows: list[dict[str, object]], **config: object) -> None:
    """Write one task: NAME.yaml, its items, and its few-shot examples."""
    files = {}
    for split, part in (("test", rows[4:]), ("train", rows[:4])):
        path = folder / f"{name}.{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        files[split] = str(path)
    task = {"task": name, **_COMMON, "dataset_kwargs": {"data_files": files}, **config}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{q}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
        {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    ],
}
_GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
        {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
    ],
    "filter_list": [
        {"name": "raw", "filter": [{"function": "take_first"}]},
        {"name": "number", "filter": [
            {"function": "regex", "regex_pattern": "(\\d+)"}, {"function": "take_first"},
        ]},
    ],
}  # fmt: skip
_ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
_LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{q}}",
    "doc_to_target": " {{a}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `money`, `money2`, `sums`, `prose`, `cloze`, the group `coins` and the tag `easy`."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "money", _choice_rows(24), **_CHOICE, tag="easy")
    write_task(folder, "money2", _choice_rows(14), **_CHOICE)
    write_task(folder, "sums", _text_rows(12), **_GENERATE)
    write_task(folder, "prose", _text_rows(12), **_ROLLING)
    write_task(folder, "cloze", _text_rows(14), **_LIKELIHOOD)
    group = {
        "group": "coins",
        "task": ["money", "money2"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "coins.yaml").write_text(yaml.safe_dump(group))
    (folder / "holds_benchmark.yaml").write_text(
        yaml.safe_dump({"group": "mine", "task": ["money", "gsm8k"]})
    )
    return folder
