"""The transcript over real HTTP: nothing is paid twice, no secret is written, a run can be played again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_server import Answer, FaultServer, Step, error, ok, reset, serving
from search_run import FunctionExecutor, genome_data

from llmevo import genome as genomes
from llmevo import runner
from llmevo.cli import main
from llmevo.cli.display import NoDisplay
from llmevo.errors import LLMError, LLMQuotaError
from llmevo.genome import LLMSpec
from llmevo.llm import MODES, Attempt, Reply, Request, canary, client_from
from llmevo.llm.check import check
from llmevo.llm.ledger import Ledger, Limits, Price
from llmevo.llm.transcript import FOLDER, ReplayChat, Transcript, read
from llmevo.report.findings import load
from llmevo.runner import RunSummary
from llmevo.runner.replay import replay
from llmevo.store import Store

KEY = "sk-test-transcript-0123456789abcdef"
ASK = Request(({"role": "user", "content": "Say a number."},), seed=3)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def chat(server: FaultServer, folder: Path, ledger: Ledger | None = None, **options: Any) -> Transcript:
    spec = LLMSpec(backend="openai", model="m", base_url=server.url, attempts=2, **options)
    counted = ledger or Ledger()
    return Transcript(client_from(spec, counted), folder, counted, variable=spec.api_key_env)


def in_range(index: int) -> Step:
    """As many distinct genomes as the schema has room for, each number from the seed."""

    def step(request: dict[str, Any]) -> Answer:
        schema = request["response_format"]["json_schema"]["schema"]
        gene = schema["properties"]["proposals"]["items"]["properties"]["genome"]["properties"]
        count = 6
        proposals = []
        for place in range(count):
            mix = request["seed"] + 17 * place + index
            genome = {
                name: part["enum"][mix % len(part["enum"])] if "enum" in part else (mix + 31 * slot) % 100
                for slot, (name, part) in enumerate(gene.items())
            }
            proposals.append({"genome": genome, "why": f"echo {KEY}"})
        return ok(json.dumps({"proposals": proposals}))(request)

    return step


def run(server: FaultServer, folder: Path, llm: dict[str, Any] | None = None, **search: Any) -> RunSummary:
    options = {
        "backend": "openai",
        "model": "m",
        "base_url": server.url,
        "attempts": 1,
        "mode": "json_schema",
    }
    data = genome_data(**{"proposer": "llm", "trials": 17, **search})
    text = yaml.safe_dump({**data, "llm": {**options, **(llm or {})}})
    genome = genomes.parse(text)
    return runner.run(genome, text, folder, observer=NoDisplay(), executor=FunctionExecutor())


def trials(folder: Path) -> list[dict[str, Any]]:
    with Store.open(folder, readonly=True) as store:
        return [{**trial.to_json(), "cost": None} for trial in store.trials()]


def test_a_record_holds_the_whole_call(tmp_path: Path) -> None:
    with serving(error(500, f"oops {KEY}"), ok(f"42, {KEY}")) as server:
        asked = chat(server, tmp_path, Ledger(Price(1.0, 2.0)))
        asked.complete(ASK)
        port = server.url.split(":")[2].split("/")[0]
    (record,) = read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.json"]
    assert record["state"] == "done"
    assert record["request"]["messages"] == [{"role": "user", "content": "Say a number."}]
    assert record["client"] == {
        "model": "m",
        "host": "127.0.0.1",
        "temperature": 0.7,
        "max_tokens": 2048,
        "small": False,
    }
    assert port not in json.dumps(record), "the host alone"
    assert [row["status"] for row in record["attempts"]] == [500, 200]
    assert record["attempts"][1]["waited"] > 0
    assert record["attempts"][1]["usage"] == {"prompt": 11, "completion": 7, "reasoning": 2, "cached": 3}
    assert record["attempts"][1]["usd"] == pytest.approx(25e-6)
    assert record["reply"]["text"] == "42, ***"
    assert asked.totals.unsettled == 1


class Echo:
    """A model that says the key; it is the last line of defence that is tested."""

    small = False

    def describe(self) -> str:
        return "echo"

    def complete(self, request: Request) -> Reply:
        return Reply(f"the key is {KEY}", attempts=(Attempt("ok", 0.0),))


def test_a_key_in_an_answer_is_not_written(tmp_path: Path) -> None:
    reply = Transcript(Echo(), tmp_path, Ledger(), variable="OPENAI_API_KEY").complete(ASK)
    assert KEY in reply.text
    (record,) = read(tmp_path)
    assert record["reply"]["text"] == "the key is ***"
    assert [row["outcome"] for row in record["attempts"]] == ["ok"], (
        "counted for a client that does not count"
    )


def test_a_recorded_call_is_served_and_counted_once(tmp_path: Path) -> None:
    with serving(ok("1"), ok("2"), ok("3")) as server:
        first = chat(server, tmp_path)
        first.asking(4)
        told = [first.complete(ASK).text, first.complete(ASK).text]
        again = chat(server, tmp_path, ledger := Ledger(limits=Limits(max_calls=3)))
        again.asking(4)
        assert [again.complete(ASK).text, again.complete(ASK).text] == told == ["1", "2"]
        assert len(server.requests) == 2
        assert again.complete(ASK).text == "3", "the third is new"
        assert ledger.totals.requests == 3
        other = chat(server, tmp_path)
        other.asking(5)
        other.complete(ASK)
    assert len(server.requests) == 4, "with another history it is another call"


def test_a_failed_call_is_recorded_and_asked_again(tmp_path: Path) -> None:
    quota = error(429, "pay", code="insufficient_quota")
    with serving(quota, ok("1")) as server:
        with pytest.raises(LLMQuotaError):
            chat(server, tmp_path).complete(ASK)
        with pytest.raises(LLMQuotaError):
            ReplayChat(tmp_path).complete(ASK)
        assert chat(server, tmp_path).complete(ASK).text == "1"
    assert [record["state"] for record in read(tmp_path)] == ["failed", "done"]
    assert ReplayChat(tmp_path).complete(ASK).text == "1", "what came in the end"


def test_a_replay_has_only_what_was_recorded(tmp_path: Path) -> None:
    with serving(ok("1")) as server:
        chat(server, tmp_path).complete(ASK)
    played = ReplayChat(tmp_path)
    assert played.complete(ASK).text == "1"
    for request in (ASK, Request(ASK.messages, seed=4)):
        with pytest.raises(LLMError, match="does not"):
            played.complete(request)


def test_a_run_is_played_again_byte_for_byte(tmp_path: Path) -> None:
    with serving(in_range(0)) as server:
        summary = run(server, tmp_path / "run")
    assert summary.exit_code == 0
    assert summary.money is not None
    assert (summary.money.requests, summary.money.usd) == (len(server.requests), None)
    found = replay(tmp_path / "run", tmp_path / "again", NoDisplay())
    assert (found.identical, found.trials) == (True, 17)
    assert trials(tmp_path / "run") == trials(tmp_path / "again")
    decided = [part["trial"] for record in read(tmp_path / "run" / FOLDER) for part in record["decision"]]
    assert decided == list(range(5, 17))


def test_a_replay_finds_a_record_that_was_changed(tmp_path: Path) -> None:
    with serving(in_range(0)) as server:
        run(server, tmp_path / "run")
    path = tmp_path / "run" / FOLDER / "000001.json"
    record = json.loads(path.read_text())
    record["reply"]["text"] = record["reply"]["text"].replace('"genome"', '"genom"', 1)
    path.write_text(json.dumps(record))
    found = replay(tmp_path / "run", tmp_path / "again", NoDisplay())
    assert not found.identical
    assert "differs in" in found.differences[0]


def test_a_run_with_more_trials_later_is_played_again_too(tmp_path: Path) -> None:
    """The first budget cut a batch short, so the second sitting's batches begin elsewhere."""
    with serving(in_range(0)) as server:
        run(server, tmp_path / "run", trials=8)
        run(server, tmp_path / "run", trials=16)
    found = replay(tmp_path / "run", tmp_path / "again", NoDisplay())
    assert (found.differences, found.trials) == ((), 16)


def test_a_replay_needs_no_models(tmp_path: Path) -> None:
    """The number of layers came from the first model, which is gone now."""
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    data = genome_data(proposer="ga", trials=8)
    models = [str(parent), "b/finnish"]
    data["genome"] = {**data["genome"], "models": models, "num_layers": None, "layer_granularity": 2}
    text = yaml.safe_dump(data)
    genome = genomes.parse(text)
    runner.run(genome, text, tmp_path / "run", observer=NoDisplay(), executor=FunctionExecutor())
    (parent / "config.json").unlink()
    assert replay(tmp_path / "run", tmp_path / "again", NoDisplay()).identical


def test_an_outage_that_was_waited_out_leaves_no_trace_in_a_replay(tmp_path: Path) -> None:
    with serving(in_range(0), reset(), in_range(0)) as server:
        assert run(server, tmp_path / "run").exit_code == 3
        assert run(server, tmp_path / "run").exit_code == 0
    assert replay(tmp_path / "run", tmp_path / "again", NoDisplay()).identical


def test_outages_that_the_base_stood_in_for_are_played_again_as_such(tmp_path: Path) -> None:
    search = {"proposer": "hybrid", "on_outage": "base", "warmup": 0, "share": 0.5, "trials": 29}
    with serving(in_range(0), reset(), reset(), in_range(0)) as server:
        summary = run(server, tmp_path / "run", {"mode": "auto"}, **search)
    assert summary.exit_code == 0
    assert any(origin.startswith("outage:") for origin in summary.origins)
    assert any(origin.startswith("llm") for origin in summary.origins)
    found = replay(tmp_path / "run", tmp_path / "again", NoDisplay())
    assert (found.differences, found.trials) == ((), 29)


def test_the_commands_replay_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(canary_or_genomes) as server:
        run(server, tmp_path / "run", trials=11)
        assert command("llm", "check", "--base-url", server.url, "--model", "m", "--json") == 0
        assert json.loads(capsys.readouterr().out)["mode"] == "json_schema"
        assert command("llm", "check", "--base-url", server.url, "--model", "m") == 0
        assert "result          it works" in capsys.readouterr().out
    assert command("replay", str(tmp_path / "run")) == 0
    assert "all 11 trials came out the same, byte for byte" in capsys.readouterr().out
    assert command("status", str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "llm's own" in out
    assert "dollars unknown" in out
    assert command("llm", "check", "--base-url", "http://u:p@h/v1", "--model", "m") == 2


def command(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_budget_stops_the_run_resumably(tmp_path: Path) -> None:
    with serving(in_range(0)) as server:
        stopped = run(server, tmp_path / "run", {"max_calls": 1})
        assert (stopped.exit_code, stopped.resumable) == (3, True)
        assert "`llm.max_calls` is 1" in stopped.reason
        assert len(server.requests) == 1
        assert len(stopped.trials) == 11, "references and one batch"
        assert run(server, tmp_path / "run", {"max_calls": 1}).exit_code == 3
        assert len(server.requests) == 1
        assert run(server, tmp_path / "run", {"max_calls": 2}).exit_code == 0
        assert len(server.requests) == 2
    with serving(in_range(0)) as server:
        run(server, tmp_path / "straight")
    kept = [[{**t, "attrs": None} for t in trials(tmp_path / name)] for name in ("run", "straight")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"max_total_tokens": 100}, "max_total_tokens"),
        ({"max_usd": 1e-6, "price": {"prompt": 1, "completion": 1}}, "max_usd"),
    ],
)
def test_no_request_is_sent_that_might_pass_a_limit(
    limits: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with serving(in_range(0)) as server:
        stopped = run(server, tmp_path / "run", limits)
    assert stopped.exit_code == 3
    assert f"`llm.{name}`" in stopped.reason
    assert not server.requests


_DRIVER = """
import sys, yaml
sys.path.insert(0, sys.argv[2])
from search_run import FunctionExecutor
from llmevo import genome, runner
from llmevo.cli import main
from llmevo.cli.display import NoDisplay
text = open(sys.argv[1]).read()
run = runner.run(genome.parse(text), text, sys.argv[3], observer=NoDisplay(), executor=FunctionExecutor())
sys.exit(run.exit_code)
"""


@pytest.mark.slow
def test_killed_between_answer_and_store_it_pays_once(tmp_path: Path) -> None:
    """`kill -9` while the repair turn is under way: the first answer is on disk and not asked for again."""
    with serving(ok("no json here"), lambda request: Answer(delay=60)) as server:
        options = {"backend": "openai", "model": "m", "base_url": server.url, "mode": "json_schema"}
        data = {**genome_data(proposer="llm", trials=11), "llm": options}
        (tmp_path / "g.yaml").write_text(yaml.safe_dump(data))
        command = [sys.executable, "-c", _DRIVER, str(tmp_path / "g.yaml"), str(Path(__file__).parents[1])]
        with subprocess.Popen([*command, str(tmp_path / "run")], env={**os.environ}) as process:
            until = time.monotonic() + 60
            while len(server.requests) < 2 and time.monotonic() < until:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        assert [r["state"] for r in read(tmp_path / "run" / FOLDER)] == ["done", "open"]
        server.script = [*server.script, in_range(0)]
        summary = run(server, tmp_path / "run", {"attempts": 4}, trials=11)
    assert summary.exit_code == 0
    assert len(server.requests) == 3, "the first answer came from the record"
    assert summary.money is not None
    assert (summary.money.requests, summary.money.unsettled) == (3, 1), (
        "what was in flight may have been billed"
    )
    made = [trial for trial in summary.trials if "repaired" in trial.attrs.get("llm", {})]
    assert len(made) == 1
    assert replay(tmp_path / "run", tmp_path / "again", NoDisplay()).identical


def test_few_proposals_of_its_own_make_no_llm_run(tmp_path: Path) -> None:
    with serving(in_range(0), ok("prose"), ok("prose")) as server:
        summary = run(server, tmp_path / "run", trials=17)
    assert (summary.intended, summary.proposed) == (12, 6)
    findings = load(tmp_path / "run", summary)
    assert "This is not an LLM run: of 12 trials" in findings.verdict()
    assert findings.to_json()["llm_share"] == pytest.approx(0.5)
    assert "dollars unknown" in findings.money()


def obeys(kind: str, honest: bool = True) -> Step:
    """An endpoint that accepts every response format and enforces those of one kind alone."""

    def step(request: dict[str, Any]) -> Answer:
        given = request.get("response_format", {})
        mode = given.get("type", "text")
        mode = "json_object_schema" if "schema" in given else mode
        schema = given.get("schema") or given.get("json_schema", {}).get("schema")
        if mode != kind:
            return ok("Bread is baked dough.")(request)
        if kind == "json_object":
            return ok('{"answer": "Bread is baked dough."}')(request)
        ((name, part),) = schema["properties"].items()
        return ok(json.dumps({name: part["enum"][0]}))(request)

    return step


def canary_or_genomes(request: dict[str, Any]) -> Answer:
    """An endpoint that enforces a schema and answers with genomes."""
    bread = "bread" in request["messages"][-1]["content"]
    return (obeys("json_schema") if bread else in_range(0))(request)


@pytest.mark.parametrize("mode", MODES)
def test_the_canary_believes_what_it_sees(mode: str, tmp_path: Path) -> None:
    with serving(obeys(mode)) as server:
        ladder = canary.climb(chat(server, tmp_path))
    assert ladder.mode == mode
    assert len(server.requests) == min(MODES.index(mode) + 1, 3)
    assert all(rung.verdict == "ignored" for rung in ladder.rungs[:-1])


def test_the_canary_steps_over_refusals_but_not_over_outages(tmp_path: Path) -> None:
    def picky(request: dict[str, Any]) -> Answer:
        given = request["response_format"]
        return (
            obeys("json_object_schema")(request) if "schema" in given else error(400, "no such type")(request)
        )

    with serving(picky) as server:
        ladder = canary.climb(chat(server, tmp_path / "a"))
    assert [rung.verdict for rung in ladder.rungs] == ["refused", "enforced"]
    for number, fault in enumerate((error(401, "bad key"), error(404, "no such model"), reset())):
        with serving(fault) as server, pytest.raises(LLMError):
            canary.climb(chat(server, tmp_path / f"{number}"))


def test_an_answer_cut_off_before_it_begins_proves_nothing(tmp_path: Path) -> None:
    with serving(ok("", "length")) as server:
        ladder = canary.climb(chat(server, tmp_path))
    assert (ladder.mode, ladder.rungs[0].verdict) == ("json_schema", "cut off")


def test_a_run_asks_the_canary_once(tmp_path: Path) -> None:
    with serving(canary_or_genomes) as server:
        run(server, tmp_path / "run", {"mode": "auto"}, trials=11)
        assert len(server.requests) == 2
        run(server, tmp_path / "run", {"mode": "auto"}, trials=17)
        assert len(server.requests) == 3, "the mode is known from the first sitting"
    assert replay(tmp_path / "run", tmp_path / "again", NoDisplay()).identical


def test_a_dead_endpoint_is_found_before_the_first_trial(tmp_path: Path) -> None:
    with serving(error(401, f"bad key {KEY}")) as server:
        summary = run(server, tmp_path / "run", {"mode": "auto"})
    assert (summary.exit_code, len(summary.trials)) == (3, 0)
    assert "cannot begin" in summary.reason


def test_check_says_what_works_and_what_not(tmp_path: Path) -> None:
    with serving(canary_or_genomes) as server:
        found = check(chat(server, tmp_path / "a", Ledger(Price(1.0, 1.0))))
    assert (found.problem, found.mode, found.valid, found.requested) == (None, "json_schema", 6, 6)
    assert found.totals.requests == len(server.requests) == 4
    assert found.totals.usd == pytest.approx(4 * 18e-6)
    with serving(ok("I cannot help with that.")) as server:
        found = check(chat(server, tmp_path / "b"))
    assert found.mode == "text"
    assert "none of 3 answers could be used" in str(found.problem)
    with serving(error(401, "bad key")) as server:
        found = check(chat(server, tmp_path / "c"))
    assert "`OPENAI_API_KEY`" in str(found.problem)
    assert found.totals.requests == 1
