"""The client, the proposer and a whole run against a real server: llama-cpp-python with SmolLM2-135M.

`make test-servers` compiles the server into an environment of its own and names it in `LLMEVO_SERVER_PYTHON`.
A model of this size is a fixture for the plumbing: what it proposes is grammatical and bad, and nothing here
says otherwise.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from search_run import FunctionExecutor, genome_data

from llmevo import Categorical, LLMError, Optimizer, Space, embedded, runner
from llmevo import genome as genomes
from llmevo.cli.display import NoDisplay
from llmevo.llm import Request, canary
from llmevo.llm.openai import OpenAIChat
from llmevo.llm.transcript import read
from llmevo.proposers.llm import LLM
from llmevo.store import Store
from llmevo.trial import State

PYTHON = os.environ.get("LLMEVO_SERVER_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no llama-cpp-python server; run `make test-servers`"),
]
CONTEXT = 4096
STARTUP = 120.0  # seconds
REFERENCES, BATCH, CALLS = 5, 2, 8


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with one thread: more than there are free cores is four times slower."""
    port = _free_port()
    base = f"http://127.0.0.1:{port}/v1"
    log = tmp_path_factory.mktemp("server") / "log"
    options = {"n_ctx": CONTEXT, "n_threads": 1, "n_threads_batch": 1, "port": port, "seed": 1}
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(embedded.gguf_file()), "--host", "127.0.0.1"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + STARTUP
            while not _answers(base):
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
                time.sleep(0.2)
            yield base
        finally:
            process.terminate()
            process.wait(30)


def test_the_ladder_lands_on_a_schema_beside_json_object(url: str) -> None:
    """json_schema is refused with status 500, once and not four times; the next rung keeps a schema."""
    client = OpenAIChat("smollm2", base_url=url, max_tokens=100)
    found = canary.climb(client)
    assert [(rung.mode, rung.verdict) for rung in found.rungs] == [
        ("json_schema", "refused"),
        ("json_object_schema", "enforced"),
    ]
    assert found.mode == "json_object_schema"
    assert "after 1 request:" in found.rungs[0].detail
    client.close()


def test_a_prompt_that_does_not_fit_is_said_at_once(url: str) -> None:
    client = OpenAIChat("smollm2", base_url=url)
    long = ({"role": "user", "content": "one two three " * CONTEXT},)
    with pytest.raises(LLMError, match=r"after 1 request: .*longer context"):
        client.complete(Request(long))
    client.close()


def test_tokens_are_counted_and_end(url: str) -> None:
    """The same seed does not give the same text here: the prompt cache changes the numbers a little."""
    client = OpenAIChat("smollm2", base_url=url, max_tokens=24)
    ask = Request(({"role": "user", "content": "Tell a long story."},), seed=3)
    reply = client.complete(ask)
    client.close()
    assert reply.finish_reason == "length"
    assert (reply.usage.prompt or 0) > 0
    assert reply.usage.completion == 24


def genome_of(url: str, trials: int) -> str:
    data: dict[str, Any] = genome_data(proposer="llm", population=BATCH, trials=trials)
    data["genome"]["merge_method"] = "task_arithmetic"  # three genes, so that prompts are read in seconds
    data["llm"] = {"backend": "openai", "model": "smollm2", "base_url": url, "timeout": 300}
    return yaml.safe_dump(data)


@pytest.mark.timeout(1800)  # a few minutes; more where cores are shared
def test_a_run_is_stopped_and_continued(url: str, tmp_path: Path) -> None:
    """Eight batches in two sittings: every answer is read, and nothing is evaluated or asked twice."""
    text = genome_of(url, REFERENCES + CALLS * BATCH)

    def sitting(limit: int | None) -> int:
        executor = FunctionExecutor()
        genome = genomes.parse(text)
        run_dir = tmp_path / "run"
        return runner.run(
            genome, text, run_dir, observer=NoDisplay(), executor=executor, limit=limit
        ).exit_code

    assert sitting(REFERENCES + CALLS) == 3
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "llm").glob("0*.json")}
    assert sitting(None) == 0
    with Store.open(tmp_path / "run") as store:
        trials = store.trials()
    assert len(trials) == REFERENCES + CALLS * BATCH
    assert not any(trial.state is State.PENDING for trial in trials)
    searched = trials[REFERENCES:]
    asked = [trial.attrs["llm"] for trial in searched if "asked" in trial.attrs["llm"]]
    assert len(asked) == CALLS
    parsed = sum("repaired" not in notes for notes in asked)
    assert parsed >= 0.95 * CALLS, [notes.get("repaired") for notes in asked]
    assert {notes["mode"] for notes in asked} == {"json_object_schema"}
    assert not any(trial.origin.startswith("fallback") for trial in searched)
    keys = [json.dumps(trial.params, sort_keys=True) for trial in trials if trial.params]
    assert len(set(keys)) == len(keys), "a copied point is moved before it is evaluated"
    calls = [record for record in read(tmp_path / "run" / "llm") if record["request"]["name"] == "propose"]
    assert len(calls) == CALLS
    for name, content in before.items():
        assert (tmp_path / "run" / "llm" / name).read_bytes() == content, (
            "what is recorded is not asked again"
        )


def test_copies_are_declared_mutations(url: str) -> None:
    """A space of twelve points, asked for until it is used up: the model repeats itself long before."""
    space = Space({"method": Categorical("linear", "ties", "dare", "slerp"), "dtype": Categorical(8, 16, 32)})
    client = OpenAIChat("smollm2", base_url=url, max_tokens=300, timeout=300)
    search = Optimizer(
        space, LLM(space, "maximize", client=client, compact=True), direction="maximize", seed=1
    )
    while asked := search.ask(3):
        for trial in asked:
            search.tell(trial, float(space.to_unit(trial.params).sum()))
    client.close()
    assert len({space.key(trial.params) for trial in search.trials}) == len(search.trials) == 12
    origins = [trial.origin for trial in search.trials]
    assert "llm+mutated" in origins, origins
