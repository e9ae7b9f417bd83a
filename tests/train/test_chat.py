"""Chats: what the template is given, what of its text is learnt, and what is said where it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import GenomeError
from llmevo.genome.train import DataSpec
from llmevo.train.data import load
from llmevo.train.example import Example

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
PLAIN = (
    "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}[{{ c.function | tojson }}]{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think></think>{%- generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN


def with_template(tokenizer: Any, template: str) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def example_of(path: Path, row: dict[str, Any] | str, tokenizer: Any) -> Example:
    path.write_text((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return load(DataSpec(train=str(path), validation=str(path), test=str(path)), tokenizer, 512, 0).parts[
        "train"
    ][0]


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.tokens[example.targets])


def test_marks_of_the_template_say_what_is_learnt(tokenizer: Any, tmp_path: Path) -> None:
    marked = with_template(tokenizer, MARKED)
    example = example_of(tmp_path / "a.jsonl", {"messages": ASKED * 2}, marked)
    own = marked.apply_chat_template(ASKED * 2, return_dict=True, return_assistant_tokens_mask=True)
    assert example.tokens.tolist() == own["input_ids"]
    assert example.targets.tolist() == [bool(mark) for mark in own["assistant_masks"]]
    assert learnt(example, marked) == "Hello!<|im_end|>Hello!<|im_end|>"
    nothing = with_template(tokenizer, MARKED.replace("'assistant' %}<", "'model' %}<"))
    with pytest.raises(GenomeError, match=r"line 1: the chat template marks .* nothing of these messages"):
        example_of(tmp_path / "a.jsonl", {"messages": ASKED}, nothing)


@pytest.mark.parametrize("form", [list, json.dumps])
def test_the_template_is_given_the_tools(form: Any, tokenizer: Any, tmp_path: Path) -> None:
    told = with_template(tokenizer, PLAIN)
    example = example_of(tmp_path / "a.jsonl", {"messages": ASKED, "tools": form([TOOL])}, told)
    assert tokenizer.decode(example.tokens) == told.apply_chat_template(ASKED, tools=[TOOL], tokenize=False)
    assert "clock" in tokenizer.decode(example.text.prompt)
    assert learnt(example, tokenizer) == "Hello!<|im_end|>\n"
    with pytest.raises(GenomeError, match=r"`tools` must be a list of JSON schemas, .* got 'hammer'"):
        example_of(tmp_path / "a.jsonl", {"messages": ASKED, "tools": "hammer"}, told)


@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_a_turn_may_be_a_call_alone(content: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    told = with_template(tokenizer, PLAIN)
    turn = {"role": "assistant", "tool_calls": [CALL], **content}
    example = example_of(tmp_path / "a.jsonl", {"messages": [ASKED[0], turn]}, told)
    call = '[{"name": "clock", "arguments": {"zone": "utc"}}]'
    assert learnt(example, tokenizer) == f"{call}<|im_end|>\n"
    assert example.text.answer.strip() == call
    assert example.text.size == len(call) + 1


def test_tables_fill_calls_with_nulls_that_no_template_sees(tokenizer: Any, tmp_path: Path) -> None:
    """A column of a table has one type, so every call has the arguments of all the others."""
    import pyarrow
    import pyarrow.parquet

    other = {"type": "function", "function": {"name": "day", "arguments": {"date": "today"}}}
    calls = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in (CALL, other)]
    rows = [{"messages": [ASKED[0], call, *ASKED]} for call in calls] * 2
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    told = with_template(tokenizer, PLAIN)
    found = load(DataSpec(train=str(file), validation=str(file), test=str(file)), told, 512, 0)
    texts = [tokenizer.decode(example.tokens) for example in found.parts["train"]]
    assert texts == [told.apply_chat_template(row["messages"], tokenize=False) for row in rows]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ALTERNATE, "no system"),
        ("{% for m in messages %}{{ m.nix.nix }}{% endfor %}", "'dict object' has no"),
    ],
)
def test_what_a_template_refuses_is_said_with_the_row(
    template: str, reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    row = {"messages": [{"role": "system", "content": "Be kind."}, *ASKED]}
    with pytest.raises(GenomeError, match=rf"line 1: .* chat template must take .* says: {reason}"):
        example_of(tmp_path / "a.jsonl", row, with_template(tokenizer, template))


def test_half_a_surrogate_pair_is_told(tokenizer: Any, tmp_path: Path) -> None:
    half = r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]}'
    with pytest.raises(GenomeError, match=r"line 1: `messages` must be Unicode text, but has half .*\\ud83d"):
        example_of(tmp_path / "a.jsonl", half, tokenizer)
    whole = example_of(tmp_path / "a.jsonl", half.replace(r"\ud83d", r"\ud83d\ude00"), tokenizer)
    assert "\U0001f600" in tokenizer.decode(whole.tokens)
