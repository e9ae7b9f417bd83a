"""Packed answers are lm-eval's: every kind of request, every shape of sharing, many architectures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from llmevo.evaluate import Evaluator  # noqa: E402
from llmevo.evaluate.lm import ResidentLM  # noqa: E402
from llmevo.evaluate.packing import Limits  # noqa: E402
from llmevo.evaluate.trie import Costs  # noqa: E402
from llmevo.genome import Genome  # noqa: E402

Request = tuple[Any, list[int], list[int]]
LENGTH = 48


@pytest.fixture(scope="module")
def llama(tiny_llamas: Any) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    with torch.no_grad():  # random weights give a flat distribution, on which much could go wrong unseen
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model, transformers.AutoTokenizer.from_pretrained(tiny_llamas.base)


@pytest.fixture(scope="module")
def models(llama: tuple[Any, Any]) -> tuple[ResidentLM, Any]:
    """Ours and lm-eval's own, on the same weights, with a short context."""
    from lm_eval.models.huggingface import HFLM

    options = {"pretrained": llama[0], "tokenizer": llama[1], "batch_size": 3, "max_length": LENGTH}
    return ResidentLM(**options), HFLM(**options)


def compare(ours: ResidentLM, stock: Any, requests: list[Request], most: float = 1e-4) -> None:
    packing = ours.pack(requests)
    assert packing is not None, ours.why_not
    theirs = stock._loglikelihood_tokens(list(requests), disable_tqdm=True)
    for mine, other in zip(ours.answer(packing), theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=most)
        assert mine[1] == other[1]


TOKENS = st.lists(st.integers(3, 6), min_size=1, max_size=14)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(st.integers(3, 300), max_size=30),
    contexts=st.lists(TOKENS, min_size=1, max_size=5),
    data=st.data(),
    costs=st.builds(Costs, st.sampled_from([0.0, 0.001, 0.1]), st.sampled_from([0.0, 16.0, 1e6])),
    limits=st.builds(Limits, st.sampled_from([16, 64, 512]), st.sampled_from([8, 512])),
)
def test_random_requests_of_all_shapes(
    models: tuple[ResidentLM, Any],
    prefix: list[int],
    contexts: list[list[int]],
    data: st.DataObject,
    costs: Costs,
    limits: Limits,
) -> None:
    ours, stock = models
    packed: Any = ours._packed
    requests: list[Request] = []
    for context in contexts:
        whole = prefix + context if data.draw(st.booleans()) else context
        requests += [(None, whole, c) for c in data.draw(st.lists(TOKENS, min_size=1, max_size=4))]
    before = packed._costs, packed._limits
    packed._costs, packed._limits = costs, limits
    # lm-eval 0.4.13 reads the wrong positions where two requests are the same tokens parted in two places,
    # such as [3] + [4, 3] and [3, 4] + [3], unless it computes each by itself.
    stock.logits_cache = False
    try:
        compare(ours, stock, data.draw(st.permutations(requests)))
    finally:
        packed._costs, packed._limits = before
        stock.logits_cache = True


def test_greedy_answers_are_found(models: tuple[ResidentLM, Any]) -> None:
    ours, stock = models
    rng = random.Random(0)
    requests: list[Request] = []
    for _ in range(6):
        context = [rng.randrange(3, 300) for _ in range(10)]
        tokens = ours.model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)[0, 10:]
        likely = tokens.tolist()
        requests += [(None, context, likely), (None, context, [*likely[:-1], (likely[-1] + 1) % 300])]
    compare(ours, stock, requests)
    assert [greedy for _, greedy in ours._loglikelihood_tokens(requests)] == [True, False] * 6


def test_of_equal_logits_the_first_is_greedy() -> None:
    from llmevo.evaluate.packed import _read

    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    rows, targets = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([1, 2, 0, 3, 1])
    many = 40  # more rows than are looked at in one go
    logits, rows = logits.repeat(many, 1), torch.cat([rows + 2 * i for i in range(many)])
    targets = targets.repeat(many)
    expected = torch.log_softmax(logits.float(), -1)[rows, targets]
    values, greedy = _read(logits.clone(), rows, targets)
    assert greedy.tolist() == [True, False, True, False, True] * many
    assert torch.allclose(values, expected)


def test_one_token_answers_share_a_row(models: tuple[ResidentLM, Any]) -> None:
    ours, stock = models
    rng = random.Random(1)
    requests: list[Request] = []
    for _ in range(8):
        context = [rng.randrange(3, 300) for _ in range(20)]
        requests += [(None, context, [letter]) for letter in (10, 11, 12, 13)]
    compare(ours, stock, requests)
    assert ours.pack(requests).computed == 8 * 20  # type: ignore[union-attr]


def test_long_requests_lose_their_beginning_as_in_lm_eval(models: tuple[ResidentLM, Any]) -> None:
    ours, stock = models
    rng = random.Random(2)
    context = [rng.randrange(3, 300) for _ in range(100)]
    answers = [[rng.randrange(3, 300) for _ in range(n)] for n in (1, 5, 30, LENGTH - 1, LENGTH)]
    compare(ours, stock, [(None, context, answer) for answer in answers])
    with pytest.raises(AssertionError):  # lm-eval's own
        ours._loglikelihood_tokens([(None, context, context)])
    with pytest.raises(AssertionError):
        ours._loglikelihood_tokens([(None, [], context[:3])])


def test_lm_evals_own_entrances_lead_to_the_packed_path(models: tuple[ResidentLM, Any]) -> None:
    from lm_eval.api.instance import Instance

    ours, stock = models
    texts = ["The capital of France is Paris, and so on. " * 12, "1 + 1 = 2", "x"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        stock.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3
    )
    pairs = [("", "Paris"), ("The capital", " of Finland"), ("The capital", " of"), ("", "<|im_start|>a")]
    plain = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for mine, other in zip(
        ours.loglikelihood(plain, disable_tqdm=True),
        stock.loglikelihood(plain, disable_tqdm=True),
        strict=True,
    ):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])


def test_the_model_is_left_as_it_was(models: tuple[ResidentLM, Any]) -> None:
    ours, _ = models
    before = ours.model.config._attn_implementation
    ours._loglikelihood_tokens([(None, [5, 6, 7], [8, 9])])
    assert ours.model.config._attn_implementation == before
    assert not any(parameter.is_inference() for parameter in ours.model.parameters())


SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
OLD = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("MistralConfig", {**SMALL, "sliding_window": None, "head_dim": 16}, None),
    ("MistralConfig", {**SMALL, "sliding_window": 200, "head_dim": 16}, None),
    ("MistralConfig", {**SMALL, "sliding_window": 16, "head_dim": 16}, "sliding window of 16"),
    ("Qwen2Config", SMALL, None),
    (
        "Qwen2Config",
        {**SMALL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "sliding window of 16",
    ),
    ("Qwen3Config", {**SMALL, "head_dim": 16}, None),
    ("Gemma3TextConfig", {**SMALL, "head_dim": 16, "sliding_window": 512}, None),
    ("Gemma3TextConfig", {**SMALL, "head_dim": 16, "sliding_window": 16}, "sliding window of 16"),
    ("Gemma2Config", {**SMALL, "head_dim": 16, "sliding_window": 512}, "attention uses `softcap`"),
    ("GPT2Config", {**OLD, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, None),
    ("BloomConfig", {**OLD, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "attention is not pluggable"),
    (
        "MambaConfig",
        {**OLD, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "layers of type linear_attention",
    ),
    (
        "LlamaConfig",
        {**SMALL, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "positions (dynamic) depend",
    ),
]


@pytest.mark.parametrize(("name", "options", "why"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_what_cannot_be_packed_falls_back_by_itself(
    llama: tuple[Any, Any], name: str, options: dict[str, Any], why: str | None
) -> None:
    from lm_eval.models.huggingface import HFLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    ours = ResidentLM(pretrained=model, tokenizer=llama[1], batch_size=4, max_length=200)
    stock = HFLM(pretrained=model, tokenizer=llama[1], batch_size=4, max_length=200)
    rng = random.Random(3)
    shared = [rng.randrange(3, 300) for _ in range(24)]
    requests: list[Request] = []
    for number in range(5):
        context = shared[: 24 * (number % 2)] + [rng.randrange(3, 300) for _ in range(15)]
        requests += [(None, context, [rng.randrange(3, 300) for _ in range(1 + i)]) for i in range(4)]
    ours.check(requests[:8])
    packing = ours.pack(requests)
    if why is None:
        assert ours.why_not is None
        compare(ours, stock, requests)
    else:
        assert packing is None
        assert why in str(ours.why_not)
        assert ours._loglikelihood_tokens(list(requests)) == stock._loglikelihood_tokens(list(requests))


def test_a_model_that_answers_otherwise_is_found_out(
    llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a mask wrong, the comparison at the start would say so."""
    from llmevo.evaluate import attention

    whole = attention._mask

    def leaking(seen: Any, *rest: Any) -> Any:
        return whole(torch.full_like(seen, 10_000), *rest)  # choices see those before them

    monkeypatch.setattr(attention, "_mask", leaking)
    ours = ResidentLM(pretrained=llama[0], tokenizer=llama[1], batch_size=4)
    ours.check([(None, [5, 6, 7, 8], [9, 10, 11]), (None, [5, 6, 7, 8], [12, 13, 14])])
    assert "packed and plain log-likelihoods differ" in str(ours.why_not)
    assert ours.pack([(None, [5], [6])]) is None


def test_half_precision_is_close(llama: tuple[Any, Any]) -> None:
    import copy

    from lm_eval.models.huggingface import HFLM

    half = copy.deepcopy(llama[0]).to(torch.bfloat16)
    ours = ResidentLM(pretrained=half, tokenizer=llama[1], batch_size=4)
    exact = HFLM(pretrained=llama[0], tokenizer=llama[1], batch_size=4)
    rng = random.Random(4)
    requests: list[Request] = []
    for _ in range(6):
        context = [rng.randrange(3, 300) for _ in range(20)]
        requests += [(None, context, [rng.randrange(3, 300) for _ in range(3)]) for _ in range(4)]
    mine, theirs = ours._loglikelihood_tokens(requests), exact._loglikelihood_tokens(requests)
    ours.check(requests)
    assert ours.why_not is None
    assert [m[0] for m in mine] == pytest.approx([t[0] for t in theirs], abs=0.5)


SHOTS = [
    {"name": "money", "metric": "acc,none"},
    {"name": "cloze", "metric": "perplexity,none", "weight": 0.001},
    {"name": "prose", "metric": "word_perplexity,none", "weight": 0.01},
    {"name": "sums", "metric": "exact_match,number"},
    {"name": "fixed", "metric": "acc,none"},
    {"name": "letters", "metric": "acc,none"},
    {"name": "mutual", "metric": "acc_mutual_info,none"},
]


@pytest.fixture(scope="module")
def more_tasks(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`money` with the same shots for all items, with letters for choices, and with mutual information."""
    import shutil

    import yaml

    folder = tmp_path_factory.mktemp("more") / "tasks"
    shutil.copytree(task_folder, folder)
    money = yaml.safe_load((folder / "money.yaml").read_text())
    money.pop("tag", None)
    letters = "{{q}}\n{% for c in choices %}{{'ABCD'[loop.index0]}}. {{c}}\n{% endfor %}Answer:"
    variants = {
        "fixed": {"fewshot_config": {"sampler": "first_n"}, "num_fewshot": 3},
        "letters": {"doc_to_text": letters, "doc_to_choice": ["A", "B", "C", "D"], "num_fewshot": 2},
        "mutual": {
            "metric_list": [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}]
        },
    }
    for name, change in variants.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**money, "task": name, **change}))
    return folder


def both_ways(folder: Path, model: Any, tokenizer: Any, **top: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(score, metrics) packed and plain, and what is packed."""
    results = []
    for reference in (False, True):
        evaluate = {"task_path": [str(folder)], "holdout": 0.2, "batch_size": 8, "reference": reference}
        genome = Genome.model_validate(
            {"genome": {"models": ["a", "b"]}, "tasks": SHOTS, **top, "evaluate": evaluate}
        )
        evaluator = Evaluator(genome, model, tokenizer, device="cpu")
        results.append(evaluator.evaluate("search"))
        if not reference:
            packed = evaluator.describe()["packed"]
    return results[0], results[1], packed


def same_scores(packed: Any, plain: Any) -> None:
    for task, items in plain[0].items.items():
        if task in ("cloze", "prose"):
            assert list(packed[0].items[task]) == pytest.approx(list(items), rel=1e-3)
        else:
            assert list(packed[0].items[task]) == list(items), task
    for task, metrics in plain[1].items():
        assert packed[1][task] == pytest.approx(metrics, rel=1e-4, abs=1e-6), task


def test_every_kind_of_task_scores_the_same(llama: tuple[Any, Any], more_tasks: Path) -> None:
    packed, plain, facts = both_ways(more_tasks, *llama, apply_chat_template=False)
    same_scores(packed, plain)
    assert facts["requests"]["plain"] == 0
    assert facts["tokens"]["computed"] < 0.6 * facts["tokens"]["asked"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_task_on_a_real_model(smollm2: Path, more_tasks: Path, dtype: str) -> None:
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=getattr(torch, dtype)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tasks = [task for task in SHOTS if task["name"] != "sums"]  # generation is lm-eval's either way
    packed, plain, facts = both_ways(
        more_tasks, model, tokenizer, limit=6, apply_chat_template=False, tasks=tasks
    )
    assert facts["why_not"] is None
    if dtype == "float32":
        same_scores(packed, plain)
        return
    margins = ("gold_logprob,none", "gold_margin,none")
    for task, metrics in plain[1].items():
        for metric in margins:
            if metric in metrics:
                assert packed[1][task][metric] == pytest.approx(metrics[metric], abs=0.1), (task, metric)
