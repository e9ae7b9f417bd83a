"""lm-eval's templates are compiled once, and say what they said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from llmevo.evaluate import Evaluator  # noqa: E402
from llmevo.evaluate.templates import compiled_once  # noqa: E402
from llmevo.genome import Genome  # noqa: E402


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The templates that Jinja has compiled since the test began."""
    from jinja2 import Environment

    real, found = Environment.compile, []

    def counting(self: Any, source: Any, *rest: Any, **options: Any) -> Any:
        found.append(source)
        return real(self, source, *rest, **options)

    monkeypatch.setattr(Environment, "compile", counting)
    return found


def test_an_evaluation_compiles_nothing_anew(
    tiny_llamas: Any, task_folder: Path, compiled: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llamas.base)
    genome = Genome.model_validate(
        {
            "genome": {"models": ["a", "b"]},
            "tasks": [{"name": "money", "metric": "acc,none"}],
            "evaluate": {"task_path": [str(task_folder)], "batch_size": 4},
        }
    )
    evaluator = Evaluator(genome, model, tokenizer, device="cpu")
    compiled.clear()
    first = evaluator.evaluate("search")
    assert len(compiled) == len(set(compiled)) <= 4  # what no item before has asked for
    compiled.clear()
    assert evaluator.evaluate("search") == first
    assert not compiled


def test_within_the_block_templates_say_the_same_and_afterwards_lm_eval_is_as_it_was() -> None:
    from jinja2 import UndefinedError
    from lm_eval import utils

    source = "{{ a | regex_replace('o', '0') }} {% for b in bs %}{{ loop.index0 }}{{ b }}{% endfor %}\n"
    docs: list[dict[str, Any]] = [{"a": "foo", "bs": "xy"}, {"a": "go", "bs": ()}]
    plain = [utils.apply_template(source, doc) for doc in docs]
    assert plain == ["f00 0x1y\n", "g0 \n"]
    with compiled_once():
        assert [utils.apply_template(source, doc) for doc in docs] == plain
        with compiled_once():
            assert utils.env.from_string(source) is utils.env.from_string(source)
        assert utils.env.from_string(source) is utils.env.from_string(source)
    with pytest.raises(UndefinedError, match="'c' is undefined"), compiled_once():
        utils.apply_template("{{ c }}", {"a": ""})
    assert utils.env.from_string(source) is not utils.env.from_string(source)
