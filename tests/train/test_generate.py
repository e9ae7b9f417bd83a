"""Answers: greedy, the same in a batch as alone, without prompts, ended where the model ends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from test_heads import make  # noqa: E402

from llmevo.train import Trainer, generate, metrics  # noqa: E402
from llmevo.train.data import Example  # noqa: E402
from llmevo.train.example import Text  # noqa: E402


def asked(prompts: list[Any], border: bool = False) -> list[Example]:
    """Examples that ask these tokens; what is wanted is not looked at."""
    return [
        Example(
            np.array([*p, 2]),
            np.arange(len(p) + 1) == len(p),
            len(p) * border,
            text=Text(np.array(p), "x", 1),
        )
        for p in prompts
    ]


def prompts(count: int, vocabulary: int, longest: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, int(rng.integers(1, longest))).tolist() for _ in range(count)]


def greedy(model: Any, prompt: list[int], most: int) -> list[int]:
    """Token by token, each from a whole pass over all that stands before it."""
    said: list[int] = []
    while len(said) < most and said[-1:] != [2]:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = [model.config.decoder_start_token_id, *said]
                logits = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits
            else:
                logits = model(torch.tensor([prompt + said])).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_batch_says_what_each_says_alone_and_no_prompt(
    kind: str, tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny if kind == "llama" else make("t5", len(tokenizer))
    given = prompts(11, len(tokenizer), 20)
    monkeypatch.setattr(generate, "_TOKENS_AT_ONCE", 100)  # several batches, padded differently
    own = model.generation_config
    answers, cut = generate.generate(model, tokenizer, asked(given, kind == "t5"), 9, 256)
    assert model.generation_config is own
    for prompt, answer, truncated in zip(given, answers, cut, strict=True):
        said = greedy(model, prompt, 9)
        assert truncated == (2 not in said)
        assert answer == tokenizer.decode([t for t in said if t != 2], skip_special_tokens=True)
        assert tokenizer.decode(prompt) not in answer


def test_sampling_and_penalties_of_the_models_files_do_not_count(tiny: Any, tokenizer: Any) -> None:
    given = asked(prompts(3, len(tokenizer), 9))
    plain = generate.generate(tiny, tokenizer, given, 8, 256)
    before = tiny.generation_config.to_dict()
    tiny.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3)
    try:
        assert generate.generate(tiny, tokenizer, given, 8, 256) == plain
    finally:
        tiny.generation_config.update(**before)


def test_a_prompt_near_the_end_of_the_context_leaves_less_room(tiny: Any, tokenizer: Any) -> None:
    long, short = [5] * 14, [5] * 3
    answers, cut = generate.generate(tiny, tokenizer, asked([long, short]), 8, 16)
    alone = [generate.generate(tiny, tokenizer, asked([p]), most, 99) for p, most in ((long, 2), (short, 8))]
    assert answers == [said[0][0] for said in alone]
    assert cut == [said[1][0] for said in alone]


def test_metrics_are_of_the_answers_and_of_the_learnt_tokens(
    tiny: Any, tokenizer: Any, make_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["exact_match", "rouge1", "chrf", "perplexity", "bits_per_byte", "validation_loss"]
    trainer = Trainer(make_spec(max_new_tokens=5), tiny, tokenizer, seed=0, metrics=names)
    part = trainer._data.parts["test"]
    found, truncated = trainer.measure("holdout", names)
    answers, cut = generate.generate(tiny, tokenizer, part, 5, 256)
    wanted = [example.text.answer for example in part]
    assert all(text.startswith(" city") for text in wanted)
    assert truncated == sum(cut) / len(cut)
    assert found["chrf"] == metrics.chrf(answers, wanted)
    # Bits and perplexity are of the same losses: bytes of the completion, tokens with the end.
    tokens = sum(int(example.targets.sum()) for example in part)
    size = sum(len(text.encode()) for text in wanted)
    bits = np.log(found["perplexity"][0]) * tokens / size / np.log(2)
    assert found["bits_per_byte"][0] == pytest.approx(bits)
    # Whoever says what is wanted is told so.
    monkeypatch.setattr("llmevo.train.measure.generate", lambda *_: (wanted, [False] * len(wanted)))
    right, truncated = trainer.measure("holdout", names)
    assert (right["exact_match"][0], right["rouge1"][0], truncated) == (1.0, 1.0, 0.0)
