"""Runs side by side: the same held-out items, paired, and what each was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_run import finished

from llmevo.cli import main
from llmevo.errors import LlmevoError
from llmevo.report import findings as reports
from llmevo.report.beside import compare
from llmevo.report.words import signed

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that gains, one in which nothing matters, one that is not finished."""
    root = tmp_path_factory.mktemp("beside")
    found = []
    for name, gain, limit in (("good", 1.0, None), ("idle", 0.0, None), ("begun", 1.0, 8)):
        (root / name).mkdir()
        found.append(finished(root / name, gain, limit))
    return found


def test_the_lead_is_the_paired_difference_on_the_held_out_items(runs: list[Path]) -> None:
    good, idle, _ = map(reports.load, runs)
    mine, other = compare(good, [idle])
    assert (mine.lead, mine.label, other.label) == (None, "evolved", "evolved")
    assert other.lead is not None
    # Two tasks of equal weight: the score is their weighted sum.
    assert other.lead.estimate == pytest.approx(mine.score - other.score)
    assert other.lead.low < other.lead.estimate < other.lead.high
    assert other.lead.low > 0
    assert mine.trials == other.trials == 24 - len(good.summary.references)
    back = compare(idle, [good])[1]
    assert back.lead is not None
    assert back.lead.estimate == pytest.approx(-other.lead.estimate)


def test_the_report_has_the_other_runs(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["report", str(runs[0]), "--out", str(tmp_path / "report.html"), *arguments])
        return int(left.value.code or 0)

    assert command() == 0
    assert "Beside other runs" not in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert command("--beside", str(runs[1]), "--json") == 0
    beside = json.loads(capsys.readouterr().out)["beside"]
    text = (tmp_path / "report.html").read_text()
    assert "Beside other runs" in text
    assert signed(beside[1]["lead"]["estimate"]) in text
    assert command("--beside", str(runs[2])) == 1
    assert "has none; let it finish" in capsys.readouterr().err


def test_runs_on_other_items_are_refused(runs: list[Path]) -> None:
    from dataclasses import replace

    good, idle, _ = map(reports.load, runs)
    with pytest.raises(LlmevoError, match="its tasks, weights or data are others"):
        compare(good, [replace(idle, fingerprint="another")])
