"""The report: honest, self-contained, and safe to open whatever a model or an error is called."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from search_run import NASTY, finished

from llmevo import report
from llmevo.cli import card, console
from llmevo.report import figures, scores, svg
from llmevo.report.findings import Findings, load
from llmevo.report.words import number, signed
from llmevo.trial import Score, State, Trial

pytest.importorskip("mergekit")
pytest.importorskip("matplotlib")

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Notes tags that do not nest, ids given twice, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    return checker


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return load(finished(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def html(findings: Findings) -> str:
    return report.render(findings)


def test_the_file_is_well_formed_and_whole(html: str) -> None:
    page = parsed(html)
    assert not page.wrong
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    text = " ".join(page.text)
    for title in (
        "The search",
        "Held-out items",
        "By task",
        "Where the trials came from",
        "Genes",
        "Failures",
    ):
        assert title in text
    assert "$" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_nothing_comes_from_elsewhere(html: str) -> None:
    page = parsed(html)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    namespaces = set(re.findall(r'xmlns(?::\w+)?="([^"]*)"', html))
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= namespaces
    assert {target.split("#")[0] for target in re.findall(r"url\(([^)]*)\)", html)} <= {""}


def test_names_and_errors_are_text(html: str, findings: Findings) -> None:
    assert any(NASTY in (trial.error or "") for trial in findings.trials)
    assert NASTY not in html
    assert "<i>currency" not in html
    text = " ".join(parsed(html).text)
    assert NASTY in text
    assert "currency</i>" in text


def test_colours_follow_the_theme(html: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--ink)" in drawings
    assert not {light for light, _ in svg.ROLES.values() if light in drawings}
    for role in svg.ROLES:
        assert html.count(f"--{role}:") == 2


def test_a_gain_larger_than_the_noise_is_called_one(findings: Findings, html: str) -> None:
    row = findings.winner
    assert row is not None
    assert row.interval is not None
    assert row.interval.low > 0
    assert findings.headline().startswith("The evolved merge beats the best parent by")
    assert "more than the noise" in findings.verdict()
    assert signed(row.interval.estimate) in html


def test_a_gain_that_is_noise_is_not_called_one(tmp_path: Path) -> None:
    findings = load(finished(tmp_path, gain=0.0))
    row = findings.winner
    assert row is not None
    assert row.interval is not None
    assert row.interval.low <= 0 <= row.interval.high
    assert findings.summary.best is not None
    assert findings.headline() == "No gain over the best parent that is larger than the noise"
    assert "no gain larger than the noise" in findings.verdict()
    assert findings.headline() in report.render(findings)


def test_the_uniform_merge_is_compared_pair_by_pair(findings: Findings) -> None:
    gap = findings.gap_to("uniform")
    rows = {row.label: row.score for row in findings.summary.table}
    evolved, uniform = rows["evolved"], rows["uniform"]
    assert gap is not None
    assert evolved is not None
    assert uniform is not None
    assert gap.estimate == pytest.approx(evolved.value - uniform.value)
    assert gap.low < gap.estimate < gap.high


def test_a_warm_start_that_needed_no_search_is_named(findings: Findings) -> None:
    assert findings.gap_to("warm_start") is None
    rows = [
        replace(row, label=row.label.replace("uniform", "warm_start:0")) for row in findings.summary.table
    ]
    warm = replace(findings, summary=replace(findings.summary, table=tuple(rows)))
    assert warm.gap_to("warm_start") == findings.gap_to("uniform")
    assert "best warm start" in warm.verdict()
    assert "uniform merge" not in warm.verdict()


def test_a_run_that_has_barely_begun_has_a_report(tmp_path: Path) -> None:
    findings = load(finished(tmp_path, limit=1))
    html = report.render(findings)
    assert not parsed(html).wrong
    assert "held-out items have not been scored" in html
    assert "Best so far" in findings.headline()


def test_minimising_turns_the_verdict_round(tmp_path: Path) -> None:
    findings = load(finished(tmp_path, direction="minimize"))
    lowest = min(t.value for t in findings.trials if t.value is not None)
    assert findings.summary.best is not None
    assert findings.summary.best.value == lowest
    row = findings.winner
    assert row is not None
    assert row.interval is not None
    assert row.interval.low > 0  # items that more models answer are better, whatever the score's sign
    assert row.p_value is not None
    assert row.p_value < 0.01
    sure = True
    assert ("beats the best parent" in findings.headline()) == sure
    assert not parsed(report.render(findings)).wrong


def test_write_replaces_a_whole_file(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert report.write(findings, path) == path
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_file(findings: Findings, html: str) -> None:
    assert report.render(findings) == html


def test_without_matplotlib_the_message_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from llmevo.report import svg\n"
        "from llmevo.errors import LlmevoError\n"
        "try:\n    svg.pyplot()\nexcept LlmevoError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'llmevo[report]'" in done.stdout


def test_what_is_far_off_is_named_at_the_edge_and_flattens_nothing() -> None:
    baseline = figures.Estimate("baseline", -14.6, -14.8, -14.4)
    trained = [figures.Estimate("default", -1.4, -1.5, -1.3), figures.Estimate("evolved", -0.9, -1.0, -0.8)]
    gaps = [figures.Estimate("baseline", -13.2, -13.4, -13.0), figures.Estimate("evolved", 0.5, 0.3, 0.7)]
    drawing = scores.intervals([baseline, *trained], gaps, "default", "evolved")
    minus = "\N{MINUS SIGN}"
    assert f"\N{LEFTWARDS ARROW} {minus}14.6000" in drawing
    assert f"\N{LEFTWARDS ARROW} {minus}13.2000" in drawing
    assert f">{minus}12" not in drawing
    assert ">0.0<" in drawing  # no difference is always in sight
    near = [figures.Estimate("baseline", -1.9, -2.0, -1.8), *trained]
    assert "\N{LEFTWARDS ARROW}" not in scores.intervals(near, [], "default", "evolved")
    search = [Trial(n, {"x": n}, "ga", State.COMPLETE, score=Score(-1 - 0.1 * n)) for n in range(4)]
    assert f"baseline {minus}14.6000 \N{DOWNWARDS ARROW}" in figures.progress(search, [baseline], True)
    assert "\N{DOWNWARDS ARROW}" not in figures.progress(search, [near[0]], True)


def test_a_gene_over_decades_has_a_logarithmic_axis() -> None:
    rates = (1e-5, 1e-4, 1e-3)
    search = [Trial(n, {"rate": r}, "ga", State.COMPLETE, score=Score(n)) for n, r in enumerate(rates)]
    drawing, *_ = figures.parameters(search, None, True)
    assert all(f">{tick}<" in drawing for tick in ("1e-05", "0.0001", "0.001"))


def test_labels_are_spread_only_as_far_as_they_collide() -> None:
    assert figures._spread([1.0, 5.0], 0.5) == [1.0, 5.0]
    close = figures._spread([2.0, 1.9, 2.1], 1.0)
    assert close == pytest.approx([2.0, 1.0, 3.0], abs=1e-6)


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    pairs = [(0.1, 3.0), (0.4, 1.0), (0.4, 2.0), (0.9, 2.0), (1.2, 0.5)]
    expected = spearmanr(*zip(*pairs, strict=True)).statistic
    assert figures._rank_correlation(pairs) == pytest.approx(expected)
    assert figures._rank_correlation([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) == 0.0


def test_the_card_has_the_evidence(findings: Findings) -> None:
    best = findings.summary.best
    assert best is not None
    text = card.render(findings, best, "merge_method: ties\n", "my-merge")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert f"{findings.held_out_items()} held-out items" in text
    assert "| evolved |" in text
    assert findings.verdict() in text
    assert "seed 2" in text
    other = next(t for t in findings.trials if t.state is State.COMPLETE and t.number > 5 and t != best)
    assert "was not scored on the held-out items" in card.render(findings, other, "", "my-merge")


def test_numbers_keep_their_meaning() -> None:
    assert number(0.5) == "0.5000"
    assert number(-0.5) == "\N{MINUS SIGN}0.5000"
    assert signed(0.25) == "+0.2500"
    assert number(12345.678) == "1.235e+04"
    assert number(0.0007) == "0.0007"
    assert number(0.00001) == "1e\N{MINUS SIGN}05"


def test_records_are_the_trials_that_were_best(findings: Findings) -> None:
    best: float | None = None
    expected: list[Trial] = []
    for trial in findings.trials:
        if trial.value is not None and (best is None or trial.value > best):
            best = trial.value
            expected.append(trial)
    assert findings.records() == {trial.number for trial in expected}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return load(finished(tmp_path_factory.mktemp("halved"), rungs=(8, 16)))


def test_a_halved_run_says_what_was_saved_and_what_a_score_rests_on(halved: Findings) -> None:
    effort = halved.effort()
    assert effort is not None
    sizes = {0: 16, 1: 32, None: 80}
    scores = [trial.score for trial in halved.trials if trial.score is not None]
    assert (effort.spent, effort.without) == (sum(sizes[s.rung] for s in scores), 80 * len(scores))
    assert effort.spent < 0.7 * effort.without
    saved = effort.without - effort.spent
    text = console.status(halved)
    assert f"{effort.spent} scored; halving saved {saved} of {effort.without}" in text
    assert f"{saved} of {effort.without} saved by halving" in report.render(halved)
    data = halved.to_json()
    assert data["rungs"] == [16, 32, 80]
    assert data["effort"] == {"unit": "items", "spent": effort.spent, "without": effort.without}
    assert data["best"]["score"]["rung"] is None
    dropout = next(trial for trial in halved.trials if trial.score and trial.score.rung == 0)
    assert "(16 of 80 items)" in console.show(halved, dropout, None)
    assert "items)" not in console.scored(halved, halved.summary.best or dropout)


def test_dropouts_are_no_records_and_no_best(halved: Findings) -> None:
    whole = {t.number for t in halved.trials if t.score is not None and t.score.rung is None}
    assert halved.records() <= whole
    numbers, values = figures._best_so_far(halved.trials, maximize=True)
    assert set(numbers) == whole
    assert values == sorted(values)
    page = parsed(report.render(halved))
    assert not page.wrong
    assert "Small marks dropped out early" in " ".join(page.text)


def test_the_table_has_a_p_value_for_each_finalist_and_the_optimism_of_all(findings: Findings) -> None:
    rows = findings.summary.table
    assert [row.label for row in rows if row.p_value is not None] == ["evolved", "evolved:2", "evolved:3"]
    assert all(row.optimism is not None for row in rows)
    text = console.held_out(findings)
    assert "optimism" in text.splitlines()[0]
    for row in rows:
        assert row.optimism is not None
        assert signed(row.optimism) in text
    assert [row["p_value"] for row in findings.to_json()["held_out"]] == [row.p_value for row in rows]


def test_the_verdict_follows_the_corrected_p_value(findings: Findings) -> None:
    """Not the interval alone: with three finalists, one test in seven would call noise a gain."""
    said = findings.verdict()
    assert "Of 3 finalists, with Holm's correction, evolved (p = " in said

    def with_p(value: float) -> Findings:
        rows = [
            replace(row, p_value=value) if row.p_value is not None else row for row in findings.summary.table
        ]
        return replace(findings, summary=replace(findings.summary, table=tuple(rows)))

    unsure = with_p(0.2)
    assert unsure.headline() == "No gain over the best parent that is larger than the noise"
    assert "None of the 3 finalists beats it" in unsure.verdict()
    assert with_p(0.01).headline() == findings.headline()


@pytest.mark.parametrize(
    ("optimism", "stderr", "words"),
    [
        (0.05, 0.01, ": the best of many noisy scores flatters itself."),
        (0.05, 0.04, ": no more than the noise of two sets of items."),
        (-0.05, 0.04, ": no more than the noise of two sets of items."),
        (-0.05, 0.01, ": choosing it by them has not flattered it."),
        (0.05, None, " than them. "),
    ],
)
def test_a_search_flatters_itself_only_beyond_the_noise(
    findings: Findings, optimism: float, stderr: float | None, words: str
) -> None:
    winner = findings.winner
    assert winner is not None
    assert winner.score is not None
    assert winner.trial.score is not None
    trial = replace(winner.trial, score=replace(winner.trial.score, stderr=stderr))
    score = replace(winner.score, stderr=stderr)
    rows = [
        replace(row, trial=trial, score=score, optimism=optimism) if row == winner else row
        for row in findings.summary.table
    ]
    said = replace(findings, summary=replace(findings.summary, table=tuple(rows))).verdict()
    way = "better" if optimism > 0 else "worse"
    assert f"The search had scored the winner 0.0500 {way} than the held-out items do" in said
    assert words in said


def test_answers_that_were_cut_off_are_a_note(findings: Findings) -> None:
    assert findings.notes() == []
    best = findings.summary.best
    assert best is not None

    def cut(trial: Trial) -> Trial:
        share = 0.5 if trial.number == 6 else 0.08 if trial.number == best.number else 0.01
        return replace(trial, metrics={"gsm": {"exact_match,strict": 0.1, "truncated,strict": share}})

    trials = tuple(cut(trial) for trial in findings.trials)
    summary = replace(findings.summary, trials=trials, best=trials[best.number])
    noted = replace(findings, summary=summary)
    (note,) = noted.notes()
    assert note.startswith("gsm: of the answers, 50 % of trial 6 and 8 % of the best trial were cut off")
    for text in (console.status(noted), console.end_of_run(noted), report.render(noted)):
        assert "were cut off" in " ".join(text.split())
    few = tuple(replace(trial, metrics={"gsm": {"truncated,strict": 0.05}}) for trial in trials)
    assert replace(noted, summary=replace(summary, trials=few)).notes() == []
