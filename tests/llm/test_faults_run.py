"""Whole runs against an endpoint that fails in every way we know of: requests, seconds, labels, resumption.

The endpoint is a real HTTP server, the search, store and proposers are the real ones; only the merged models
are replaced by a function of the weights. Each outage must stop the run before it costs an evaluation, and a
run that goes on after it must end with the trials of one that was never disturbed.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fault_server import (
    FaultServer,
    Step,
    error,
    hang,
    huge,
    ok,
    raw,
    reset,
    serving,
    trickle,
)
from search_run import FunctionExecutor, genome_data

from llmevo import cli, runner
from llmevo import genome as genomes
from llmevo.llm.encode import encode
from llmevo.llm.ledger import Totals
from llmevo.llm.transcript import read, spent
from llmevo.recipe import Recipes
from llmevo.runner import RunSummary
from llmevo.runner.replay import replay
from llmevo.space import Space
from llmevo.store import Store
from llmevo.trial import State, Trial

# Each is a run or two, half a second apiece; `test_openai_chat` has the same faults for single requests.
pytestmark = pytest.mark.slow

KEY = "sk-test-whole-run-0123456789abcdef"
REFERENCES = 5  # baseline, three parents, uniform
BATCH = 2


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def _no_key_anywhere(caplog: pytest.LogCaptureFixture, tmp_path: Path, capfd: Any) -> Iterator[None]:
    """Neither logs at their loudest, nor the terminal, nor any byte of a run directory has the key."""
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


@dataclass
class Notes:
    """An observer that keeps what people would read."""

    lines: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.lines.append(line)

    def started(self, info: Any) -> None: ...

    def asked(self, trials: Any, seconds: float) -> None: ...

    def sifted(self, reached: str, entered: Any, kept: Any) -> None: ...

    def finished(self, trial: Trial, best: Trial | None) -> None: ...

    def ended(self, summary: RunSummary) -> None:
        self.lines.append(summary.reason)


@dataclass
class Search:
    """One run directory and the genome it is driven with."""

    folder: Path
    url: str
    trials: int = 9
    search: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)

    def data(self) -> dict[str, Any]:
        search = {"proposer": "llm", "population": BATCH, "trials": self.trials, **self.search}
        # The mode is given, so that every request counted is one for proposals.
        llm = {"backend": "openai", "model": "m", "base_url": self.url, "mode": "json_schema"}
        llm |= {"timeout": 10, "attempts": 2}
        llm["mode"] = "json_schema"  # no canary: the requests that are counted here are the search's
        return {**genome_data(**search), "llm": {**llm, **self.llm}}

    def go(self) -> RunSummary:
        """One sitting."""
        text = yaml.safe_dump(self.data())
        return runner.run(
            genomes.parse(text),
            text,
            self.folder,
            observer=self.notes,
            executor=FunctionExecutor(),
        )

    def history(self) -> list[Trial]:
        with Store.open(self.folder) as store:
            return store.trials()

    def spent(self) -> Totals:
        """What the ledger on disk adds up to."""
        return spent(self.folder / "llm")

    def searched(self) -> list[Trial]:
        """The trials after the references."""
        return self.history()[REFERENCES:]


def space_of(search: Search) -> Space:
    return Recipes(genomes.parse(yaml.safe_dump(search.data())), 4).space


def asked(request: dict[str, Any]) -> int:
    """How many proposals a prompt wants."""
    return int(re.findall(r"with (\d+) entries", request["messages"][-1]["content"])[-1])


def reply(genomes: list[Any], **extra: Any) -> str:
    return json.dumps(
        {"proposals": [{"genome": genome, "why": "as scripted"} for genome in genomes], **extra}
    )


def sensible(space: Space) -> Step:
    """Valid genomes that follow from the request's seed alone, so that a repeated call is answered alike."""

    def step(request: dict[str, Any]) -> Any:
        rng = np.random.default_rng(request["seed"])
        return ok(reply([encode(space, space.sample(rng)) for _ in range(asked(request))]))(request)

    return step


def summary_of(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.origin, t.params, t.score and t.score.value, t.attrs) for t in trials]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[Any, ...]]]:
    """What a run without faults ends with, by its search options."""
    known: dict[str, list[tuple[Any, ...]]] = {}

    def find(**options: Any) -> list[tuple[Any, ...]]:
        name = json.dumps(options, sort_keys=True)
        if name not in known:
            with serving(ok("")) as server:
                search = Search(tmp_path_factory.mktemp("undisturbed") / "run", server.url, **options)
                server.script = [sensible(space_of(search))]
                assert search.go().exit_code == 0
                known[name] = summary_of(search.history())
        return known[name]

    return find


def heal(server: FaultServer, space: Space) -> None:
    server.script = [sensible(space)]
    server.requests.clear()


VALIDATION = "[{'type': 'literal_error', 'msg': \"Input should be 'text' or 'json_object'\"}]"
WHOLE = ok("42")({}).body

# The step, requests until the run stops, the least seconds they take, and what the reason must say.
OUTAGES = {
    "400": (error(400, "no such thing"), 4, 0, "check `llm.model`"),
    "401": (error(401, f"Incorrect API key provided: {KEY}"), 1, 0, "`OPENAI_API_KEY`"),
    "403": (error(403, f"{KEY} has no access"), 1, 0, "`OPENAI_API_KEY`"),
    "404": (error(404, "The model `m` does not exist"), 1, 0, "check `llm.model`"),
    "422": (error(422, "unprocessable"), 4, 0, "check `llm.model`"),
    "429": (error(429, "slow down"), 2, 0, "RateLimitError"),
    "429 wait": (error(429, "slow down", headers={"retry-after": "1"}), 2, 1, "RateLimitError"),
    "429 for an hour": (error(429, "slow", headers={"retry-after": "3600"}), 1, 0, "RateLimitError"),
    "429 quota": (error(429, "exceeded", code="insufficient_quota"), 1, 0, "top it up"),
    "500": (error(500, "oops"), 2, 0, "InternalServerError"),
    "500 validation": (error(500, VALIDATION), 4, 0, "Input should be"),
    "hang": (hang(20), 2, 0.6, "APITimeoutError"),
    "trickle": (trickle("late", 0.1), 2, 0.6, "APITimeoutError"),
    "reset": (reset(), 2, 0, "APIConnectionError"),
    "half a body": (raw(WHOLE, cut=len(WHOLE) // 2), 2, 0, "APIConnectionError"),
}
LONGEST = 30.0  # seconds of any of them: none takes 3, but the cores may be busy
SLOW = ("hang", "trickle")
MAYBE_BILLED = ("500", "500 validation", "hang", "trickle", "reset", "half a body")


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_stops_the_run_and_healing_ends_it(name: str, tmp_path: Path, undisturbed: Any) -> None:
    step, requests, least, said = OUTAGES[name]
    expected = undisturbed()  # before the clock: the first run also imports
    with serving(step) as server:
        search = Search(tmp_path / "run", server.url, llm={"timeout": 0.3} if name in SLOW else {})
        started = time.monotonic()
        summary = search.go()
        took = time.monotonic() - started
        assert (summary.exit_code, summary.resumable) == (3, True)
        assert said in summary.reason
        assert len(server.requests) == requests
        assert least <= took < LONGEST
        # Every request is in the ledger; those that may have been billed hold their price.
        spent = search.spent()
        assert (spent.calls, spent.requests, spent.answered) == (1, requests, 0)
        assert spent.unsettled == (requests if name in MAYBE_BILLED else 0)
        (record,) = read(search.folder / "llm")
        assert record["state"] == "failed"
        assert said in record["error"]["message"]
        # No point of it was made up: the references are done, and nothing else was begun.
        assert [trial.state for trial in search.history()] == [State.COMPLETE] * REFERENCES
        heal(server, space_of(search))
        search.llm = {}
        assert search.go().exit_code == 0
        assert len(server.requests) == 2, "one request a batch, none for what is done"
        after = search.spent()
    assert (after.calls, after.requests, after.answered) == (3, requests + 2, 2)
    assert (after.prompt, after.completion) == (22, 14), "what was answered is counted once"
    assert summary_of(search.history()) == expected
    assert {trial.origin for trial in search.searched()} == {"llm", "llm+noise"}


def test_an_outage_in_the_middle_loses_nothing(tmp_path: Path, undisturbed: Any) -> None:
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url)
        good = sensible(space_of(search))
        server.script = [good, error(401, "revoked")]
        assert search.go().exit_code == 3
        assert [trial.origin for trial in search.searched()] == ["llm", "llm+noise"]
        heal(server, space_of(search))
        assert search.go().exit_code == 0
        assert len(server.requests) == 1
    assert summary_of(search.history()) == undisturbed()


def test_nothing_listens(tmp_path: Path) -> None:
    with serving(ok("")) as server:
        pass
    search = Search(tmp_path / "run", server.url)
    summary = search.go()
    assert summary.exit_code == 3
    assert "APIConnectionError" in summary.reason
    assert not search.searched()


# Answers with nothing to use: the step and the problem it is filed under.
USELESS = {
    "empty choices": (ok("", choices=[]), "empty"),
    "null choices": (ok("", choices=None), "empty"),
    "null content": (ok(None), "empty"),
    "not JSON": (raw(b"<html>Bad gateway</html>"), "malformed"),
    "truncated JSON": (ok('{"proposals":[{"genome":{"merge_method":"ti'), "no_json"),
    "cut off": (ok('{"proposals":[{"genome":{"merge_method":"ti', "length"), "length"),
    "prose": (ok("I would try a larger weight for the German model."), "no_json"),
    "no known key": (ok(reply([{"alpha": 1}, {"beta": 2}])), "no_genome"),
    "NaN and Infinity": (ok('{"proposals":[{"genome":{"german.weight":NaN,"x":-Infinity}}]}'), "no_json"),
    "refusal": (ok("", choices=[{"message": {"content": None, "refusal": "no"}}]), "refusal"),
    "10 MB": (huge(10), "length"),
    "10 MB of text": (raw(ok("word " * 2_000_000)({}).body), "length"),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_useless_answer_is_repaired_once(name: str, tmp_path: Path) -> None:
    """The second request says what was wrong; the run goes on with what it brings."""
    step, problem = USELESS[name]
    started = time.monotonic()
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + BATCH)
        server.script = [step, sensible(space_of(search))]
        assert search.go().exit_code == 0
        assert len(server.requests) == 2
    first, second = (seen.json["messages"][-1]["content"] for seen in server.requests)
    assert len(second) > len(first) - 200, "the whole task again, with what was wrong"
    assert all(len(seen.json["messages"]) == 2 for seen in server.requests), "a fresh conversation"
    made = search.searched()
    assert made[0].origin == "llm"
    assert made[0].attrs["llm"]["repaired"] == problem
    assert search.spent().requests == 2
    assert time.monotonic() - started < LONGEST


@pytest.mark.parametrize("name", ["empty choices", "prose", "NaN and Infinity", "cut off", "10 MB"])
def test_useless_answers_are_labelled_and_the_fifth_stops_the_run(name: str, tmp_path: Path) -> None:
    step, problem = USELESS[name]
    with serving(step) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + 12)
        summary = search.go()
        assert (summary.exit_code, summary.resumable) == (3, True)
        assert "the last 5 answers" in summary.reason
        assert len(server.requests) == 10, "five calls, each with one repair"
        assert search.spent().requests == search.spent().answered == 10
        made = search.searched()
        assert [trial.origin for trial in made] == [f"fallback:{problem}"] * 4 * BATCH
        heal(server, space_of(search))
        assert search.go().exit_code == 0
        assert len(server.requests) == 2
    after = search.searched()
    assert summary_of(after)[: len(made)] == summary_of(made)
    assert {trial.origin for trial in after[len(made) :]} <= {"llm", "llm+noise", "llm+mutated"}


def altered(space: Space, change: Callable[[dict[str, Any]], Any]) -> Step:
    """Valid genomes of which each is changed in one way."""

    def step(request: dict[str, Any]) -> Any:
        rng = np.random.default_rng(request["seed"])
        made = [change(dict(encode(space, space.sample(rng)))) for _ in range(asked(request))]
        return ok(reply(made))(request)

    return step


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda genome: {name: value for name, value in genome.items() if name != key}


INJECTED = {
    "merge_method": "ties'; __import__('os').system('touch PWNED'); '",
    "german.weight": "__import__('os').system('touch PWNED')",
    "run": {"trials": 10_000, "dir": "/"},
    "llm": {"base_url": "http://attacker.invalid/v1", "api_key_env": "HOME"},
}
# What is done to each genome, and the counts that must stand with the call for two of them.
REPAIRED: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, int]]] = {
    "out of range": (lambda g: {**g, "german.weight": 1000, "finnish.weight": -5}, {"clipped": 4}),
    "wrong types": (
        lambda g: {**g, "german.weight": [1], "finnish.weight": "a lot", "merge_method": 7},
        {"wrong_type": 6},
    ),
    "extra keys": (lambda g: {**g, "sigma": 0.5, "note": "trust me"}, {"unknown": 4}),
    "missing keys": (without("german.weight"), {"missing": 2}),
    "NaN as text": (lambda g: {**g, "german.weight": "NaN"}, {"wrong_type": 2}),
    "injected instructions": (lambda g: {**g, **INJECTED}, {"wrong_type": 4, "unknown": 4}),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_bad_genomes_are_mended_and_counted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, counts = REPAIRED[name]
    monkeypatch.chdir(tmp_path)
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + BATCH)
        space = space_of(search)
        server.script = [altered(space, change)]
        assert search.go().exit_code == 0
        assert len(server.requests) == 1, "no repair turn for what can be mended"
    made = search.searched()
    assert {trial.origin for trial in made} <= {"llm", "llm+noise", "llm+mutated"}
    assert made[0].attrs["llm"]["counts"].items() >= counts.items()
    for trial in made:
        assert space.validate(trial.params) == trial.params
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        "```json\n{}\n```",
        "Sure! Here is what I propose.\n\n{}\n\nI hope this helps.",
        "<think>a merge {of} [all]\n</think>\n{}",
        "{} {}",
    ],
    ids=["fenced", "prose around", "thinking", "twice"],
)
def test_wrapped_json_is_found(wrap: str, tmp_path: Path) -> None:
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + BATCH)
        space = space_of(search)
        point = encode(space, space.sample(np.random.default_rng(1)))
        other = encode(space, space.sample(np.random.default_rng(2)))
        server.script = [ok(wrap.replace("{}", reply([point, other])))]
        assert search.go().exit_code == 0
        assert len(server.requests) == 1
    assert encode(space, search.searched()[0].params) == point
    assert [trial.origin for trial in search.searched()] == ["llm", "llm+noise"]


def test_a_copied_point_is_a_declared_mutation(tmp_path: Path) -> None:
    """The model repeats the uniform merge for ever: no trial repeats it, and each says so."""
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url)
        space = space_of(search)
        uniform = {**space.start(), "merge_method": "task_arithmetic"}
        uniform |= {name: 1 / 3 for name in uniform if name.endswith("weight")}
        uniform |= {name: None for name in uniform if name.endswith("density")}
        server.script = [ok(reply([encode(space, space.validate(uniform))] * BATCH))]
        assert search.go().exit_code == 0
    history = search.history()
    keys = [space.key(trial.params) for trial in history if trial.params]
    assert len(set(keys)) == len(keys)
    assert [trial.origin for trial in search.searched()] == ["llm+mutated"] * 4


def test_an_endpoint_that_repeats_the_key(tmp_path: Path) -> None:
    """A gateway that echoes what it was sent: the fixture looks for the key in every byte."""
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + BATCH)
        space = space_of(search)
        point = encode(space, space.sample(np.random.default_rng(1)))
        body = reply([{**point, KEY: KEY}], authorization=f"Bearer {KEY}")
        server.script = [ok(body, model=f"m-{KEY}", id=KEY)]
        assert search.go().exit_code == 0


def test_an_endpoint_that_repeats_the_key_in_useless_answers(tmp_path: Path) -> None:
    """The reason why the run stopped names the model as the endpoint gives it."""
    with serving(ok(f"Bearer {KEY}", model=f"m-{KEY}")) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + 12)
        summary = search.go()
    assert summary.exit_code == 3
    assert KEY not in str(search.notes.lines)


def constrained(space: Space, kept: str | None) -> Step:
    """A server that takes every response format and keeps one kind of them, or none.

    Its model answers an unbound request as it is asked to; under a schema it must answer by that.
    """
    good = sensible(space)

    def step(request: dict[str, Any]) -> Any:
        form = request.get("response_format", {"type": "text"})
        if "entries" in request["messages"][-1]["content"]:
            return good(request)
        if form["type"] != kept:
            return ok("Bread is baked dough.")(request)
        properties = form["json_schema"]["schema"]["properties"] if "json_schema" in form else {}
        return ok(json.dumps({name: part["enum"][0] for name, part in properties.items()}))(request)

    return step


@pytest.mark.parametrize(
    ("kept", "mode", "canaries"),
    [("json_schema", "json_schema", 1), ("json_object", "json_object", 3), (None, "text", 3)],
)
def test_formats_that_are_accepted_and_ignored(
    kept: str | None, mode: str, canaries: int, tmp_path: Path
) -> None:
    """The canary finds out once a run, is in the ledger, and is not repeated by a resumed run."""
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url, llm={"mode": "auto"}, trials=REFERENCES + BATCH)
        server.script = [constrained(space_of(search), kept)]
        assert search.go().exit_code == 0
        assert len(server.requests) == canaries + 1
        search.trials += BATCH
        assert search.go().exit_code == 0
        assert len(server.requests) == canaries + 2
    assert {trial.attrs["llm"].get("mode", mode) for trial in search.searched()} == {mode}
    assert search.spent().requests == canaries + 2
    assert any(mode in line for line in search.notes.lines)


def test_an_outage_during_the_canary(tmp_path: Path, undisturbed: Any) -> None:
    with serving(error(503, "loading")) as server:
        search = Search(tmp_path / "run", server.url, llm={"mode": "auto"})
        summary = search.go()
        assert (summary.exit_code, len(server.requests)) == (3, 2)
        server.script = [constrained(space_of(search), "json_schema")]
        assert search.go().exit_code == 0
    assert summary_of(search.history()) == undisturbed()


def test_the_limit_on_requests_stops_the_run_and_a_higher_one_ends_it(
    tmp_path: Path, undisturbed: Any
) -> None:
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url, llm={"max_calls": 1})
        server.script = [sensible(space_of(search))]
        summary = search.go()
        assert (summary.exit_code, summary.resumable) == (3, True)
        assert "`llm.max_calls`" in summary.reason
        assert len(server.requests) == 1
        assert [trial.origin for trial in search.searched()] == ["llm", "llm+noise"]
        search.llm = {"max_calls": 2}
        assert search.go().exit_code == 0
        assert len(server.requests) == 2
    assert summary_of(search.history()) == undisturbed()


def test_a_call_that_was_answered_is_not_paid_again(tmp_path: Path, undisturbed: Any) -> None:
    """The process dies between answer and store: the next sitting takes the answer from the record."""
    with serving(ok("")) as server:
        search = Search(tmp_path / "run", server.url)
        server.script = [sensible(space_of(search))]
        with pytest.MonkeyPatch.context() as patch:
            begin = Store.begin

            def die(store: Store, trials: Any) -> None:
                if server.requests:
                    raise SystemError("power failure")
                begin(store, trials)

            patch.setattr(Store, "begin", die)
            with pytest.raises(SystemError):
                search.go()
        assert len(server.requests) == 1
        assert not search.searched()
        assert search.go().exit_code == 0
        assert len(server.requests) == 2
    assert summary_of(search.history()) == undisturbed()


HYBRID = {"proposer": "hybrid", "base": "random", "share": 0.5, "warmup": REFERENCES, "population": 4}


def test_a_hybrid_stops_too(tmp_path: Path, undisturbed: Any) -> None:
    """The base does not quietly stand in for a guest that cannot be reached."""
    with serving(error(401, "revoked")) as server:
        search = Search(tmp_path / "run", server.url, trials=17, search=HYBRID)
        summary = search.go()
        assert summary.exit_code == 3
        assert len(server.requests) == 1
        assert not any(trial.attrs["guest"] for trial in search.searched())
        heal(server, space_of(search))
        assert search.go().exit_code == 0
    assert summary_of(search.history()) == undisturbed(trials=17, search=HYBRID)
    guests = [trial for trial in search.searched() if trial.attrs["guest"]]
    assert guests
    assert all(trial.origin.startswith("llm") for trial in guests)


def test_a_disturbed_run_is_replayed_without_a_network(tmp_path: Path) -> None:
    """Outage, useless answers and a stop in the middle: all of it comes out again of the records."""
    with serving(error(500, "oops")) as server:
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + 3 * BATCH)
        assert search.go().exit_code == 3
        good = sensible(space_of(search))
        server.script = [good] * len(server.requests) + [ok("prose"), ok("more prose"), good]
        assert search.go().exit_code == 0
    found = replay(search.folder, tmp_path / "again", Notes())
    assert found.identical, found.differences


@pytest.fixture
def llmevo(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert KEY not in out + err
        return int(ended.value.code or 0), out, err

    return call


@pytest.mark.parametrize(
    "step", [error(401, f"bad key {KEY}"), ok(f"Bearer {KEY}"), error(500, KEY), reset()]
)
def test_the_check_shows_no_key(step: Step, llmevo: Any) -> None:
    with serving(step) as server:
        code, out, _ = llmevo("llm", "check", "--base-url", server.url, "--model", "m", "-v")
    assert code == 1
    assert "m at 127.0.0.1" in out


def test_a_verbose_run_shows_no_key(llmevo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line over a run that is refused, and one in which something unforeseen breaks in a call."""
    monkeypatch.setattr("llmevo.runner.workers.LocalExecutor", lambda *given, **options: FunctionExecutor())
    monkeypatch.setattr("llmevo.evaluate.check_tasks", lambda *given: None)
    with serving(error(401, f"bad key {KEY}")) as server:
        search = Search(tmp_path / "run", server.url)
        path = tmp_path / "genome.yaml"
        path.write_text(yaml.safe_dump(search.data()))
        command = ("run", str(path), "--run-dir", str(search.folder), "--display", "plain", "-v")
        code, _, err = llmevo(*command)
        assert code == 3
        assert "`OPENAI_API_KEY`" in err

        def burst(*given: Any, **options: Any) -> Any:
            raise ZeroDivisionError("unforeseen")

        monkeypatch.setattr("llmevo.llm.body.reply", burst)
        server.script = [ok("")]
        code, _, err = llmevo(*command)
        assert code == 1
        assert "Traceback" in err
        assert "unforeseen" in err


@pytest.mark.parametrize("step", [error(401, "revoked"), error(503, "busy"), reset()])
def test_a_hybrid_that_may_goes_on_without_the_model_and_says_so(step: Step, tmp_path: Path) -> None:
    with serving(step) as server:
        options = {**HYBRID, "on_outage": "base"}
        search = Search(tmp_path / "run", server.url, trials=17, search=options)
        assert search.go().exit_code == 0
        assert server.requests
    labels = {trial.origin for trial in search.searched()}
    assert labels == {"random", "outage:random"}
    stood_in = [trial for trial in search.searched() if trial.origin == "outage:random"]
    assert all("Error" in json.dumps(trial.attrs) for trial in stood_in), stood_in[0].attrs


def test_useless_answers_stop_a_hybrid_even_where_an_outage_may_not(tmp_path: Path) -> None:
    with serving(ok("prose")) as server:
        options = {**HYBRID, "on_outage": "base", "adapt": False}
        search = Search(tmp_path / "run", server.url, trials=REFERENCES + 24, search=options)
        summary = search.go()
        assert summary.exit_code == 3
        assert "the last 5 answers" in summary.reason
        assert len(server.requests) == 10
    assert "outage:random" not in {trial.origin for trial in search.searched()}
