"""The ledger: upper bounds before, what was used after, and limits that nothing passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo.errors import GenomeError, LLMBudgetError
from llmevo.genome import LLMSpec, parse
from llmevo.llm import Attempt, Request, Usage
from llmevo.llm.ledger import Ledger, Limits, Price, Row, most, total

ASK = Request(({"role": "user", "content": "ä" * 100},), {"type": "object"})
GOOD = Attempt("ok", 0.1, 200)


def spend(ledger: Ledger, usage: Usage) -> None:
    ledger.open_call()
    ledger.reserve(ASK, 50)
    ledger.settle(GOOD, usage)


def test_the_price_of_a_call() -> None:
    usage = Usage(prompt=1_000_000, completion=500_000, reasoning=400_000, cached=200_000)
    assert Price(2.0, 10.0, 0.5).usd(usage) == pytest.approx(0.8 * 2 + 0.2 * 0.5 + 0.5 * 10)
    assert Price(2.0, 10.0).usd(usage) == pytest.approx(2 + 5), "without a price for it, cached is full price"
    assert Price(2.0, 10.0).usd(Usage(prompt=10)) is None


def test_unknown_stays_unknown_in_sums() -> None:
    ledger = Ledger()
    spend(ledger, Usage(10, 5, 1, 2))
    assert ledger.totals.usd is None, "no price: unknown, not nothing"
    assert (ledger.totals.prompt, ledger.totals.cached) == (10, 2)
    spend(ledger, Usage(10, 5))
    assert (ledger.totals.prompt, ledger.totals.reasoning, ledger.totals.cached) == (20, None, None)
    priced = Ledger(Price(1.0, 1.0))
    spend(priced, Usage(10, 5))
    assert priced.totals.usd == pytest.approx(15e-6)
    spend(priced, Usage())
    assert priced.totals.usd is None
    assert priced.totals.held_tokens == most(ASK, 50).prompt + 50, "it took something, at most this"  # type: ignore[operator]


def test_max_calls_counts_failures_too() -> None:
    ledger = Ledger(limits=Limits(max_calls=2))
    ledger.open_call()
    for status in (500, 429):
        ledger.reserve(ASK, 50)
        ledger.settle(Attempt("no", 0.1, status))
    with pytest.raises(LLMBudgetError, match=r"`llm\.max_calls` is 2"):
        ledger.reserve(ASK, 50)
    assert ledger.totals.requests == 2


def test_a_request_without_an_answer_keeps_its_reservation_but_a_refused_one_does_not() -> None:
    ledger = Ledger(Price(1.0, 1.0))
    ledger.open_call()
    upper = most(ASK, 50)
    assert upper.prompt is not None
    for status, held in ((None, True), (503, True), (408, True), (400, False), (429, False), (401, False)):
        before = ledger.totals
        ledger.reserve(ASK, 50)
        ledger.settle(Attempt("no", 0.1, status))
        more = ledger.totals.held_tokens - before.held_tokens
        assert more == (upper.prompt + 50 if held else 0), status
    assert ledger.totals.unsettled == 3
    assert ledger.totals.usd == 0.0, "nothing was answered"
    assert ledger.totals.held_usd == pytest.approx(3 * (upper.prompt + 50) / 1e6)


def test_an_estimate_is_an_upper_bound() -> None:
    """A byte-level tokenizer makes at most one token of a byte."""
    assert (most(ASK, 50).prompt or 0) >= 200


@given(
    st.lists(
        st.tuples(st.sampled_from([200, 400, 500, None]), st.integers(0, 150), st.integers(0, 50)),
        max_size=40,
    ),
    st.integers(0, 5000),
    st.floats(0, 1e-2),
)
def test_no_limit_is_ever_passed(
    requests: list[tuple[int | None, int, int]], max_tokens: int, max_usd: float
) -> None:
    """Whatever is answered, within what was reserved, the sums stay below the limits."""
    price = Price(2.0, 8.0, 1.0)
    ledger = Ledger(price, Limits(30, max_tokens, max_usd))
    ledger.open_call()
    prompt = completion = 0
    for status, read, written in requests:
        try:
            ledger.reserve(ASK, 50)
        except LLMBudgetError:
            continue
        if status == 200:
            ledger.settle(GOOD, Usage(read, written))
            prompt, completion = prompt + read, completion + written
        else:
            ledger.settle(Attempt("no", 0.0, status))
    totals = ledger.totals
    assert totals.requests <= 30
    assert (totals.prompt, totals.completion) == (prompt, completion)
    assert prompt + completion + totals.held_tokens <= max_tokens
    assert (totals.usd or 0.0) + (totals.held_usd or 0.0) <= max_usd + 1e-12


def test_rows_survive_json_and_a_later_price_fills_what_was_unknown() -> None:
    ledger = Ledger()
    spend(ledger, Usage(10, 5, 1, 2))
    (row,) = ledger.call_rows()
    assert Row.from_json(row.to_json()) == row
    assert total([row], 1, Price(1.0, 2.0)).usd == pytest.approx(20e-6)
    fresh = Ledger(Price(1.0, 2.0), Limits(max_calls=1))
    fresh.restore([row])
    with pytest.raises(LLMBudgetError):
        fresh.reserve(ASK, 1)


def test_the_journal_hears_of_a_request_before_it_is_sent() -> None:
    heard: list[list[str]] = []
    ledger = Ledger()
    ledger.open_call(lambda rows: heard.append([row.attempt.outcome for row in rows]))
    ledger.reserve(ASK, 1)
    ledger.settle(Attempt("no", 0.0, 500))
    ledger.reserve(ASK, 1)
    assert heard == [["sent"], ["no", "sent"]]


_GENOME = "genome: {models: [a, b], merge_method: linear}\ntasks: [t]\nllm: "


def test_a_dollar_limit_without_a_price_is_refused_when_the_genome_is_read() -> None:
    with pytest.raises(GenomeError, match="`max_usd` must come with `price`"):
        parse(_GENOME + "{max_usd: 1}")
    assert parse(_GENOME + "{max_usd: 1, price: {prompt: 1, completion: 2}}").llm.max_usd == 1
    assert parse(_GENOME + "{max_usd: 1, backend: local}").llm.price is None, "nobody is paid"


@pytest.mark.parametrize("line", ["{api_key_env: sk-proj-secret-1}", "{base_url: 'https://u:secret-1@h/v1'}"])
def test_a_key_in_the_genome_is_refused_and_not_repeated(line: str) -> None:
    with pytest.raises(GenomeError) as caught:
        parse(_GENOME + line)
    assert "secret-1" not in str(caught.value)


def test_budgets_may_change_on_resume() -> None:
    from llmevo.genome import resumable_difference

    old = parse(_GENOME + "{max_calls: 1}")
    price = {"prompt": 1, "completion": 1}
    new = old.model_copy(update={"llm": LLMSpec.model_validate({"max_usd": 1, "price": price})})
    assert not resumable_difference(old, new)
