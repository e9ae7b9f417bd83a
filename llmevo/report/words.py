"""Numbers for people: scores, differences, times, confidence levels, money."""

from __future__ import annotations

from llmevo.llm.ledger import Totals
from llmevo.trial import Score

Z95 = 1.959964


def number(value: float) -> str:
    """A score for a person: four decimals, or four digits where it is large or tiny."""
    text = f"{value:.4f}" if 1e-4 <= abs(value) < 1e3 or value == 0 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """A difference for a person, always with its sign."""
    return number(value) if value < 0 else f"+{number(value)}"


def interval(score: Score) -> tuple[float, float] | None:
    """The 95 % interval of a score by its standard error, or None if that is unknown."""
    if score.stderr is None:
        return None
    return score.value - Z95 * score.stderr, score.value + Z95 * score.stderr


def duration(seconds: float) -> str:
    """Seconds for a person: `8.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, thing: str) -> str:
    """A number of things for a person: `1 gene`, `2 genes`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def percent(level: float) -> str:
    """A confidence level for a person: `95 %`."""
    return f"{100 * level:.3g} %"


def spending(money: Totals) -> str:
    """Calls, tokens and dollars for a person; what is unknown is called that."""

    def count(tokens: int | None) -> str:
        return "unknown" if tokens is None else str(tokens)

    parts = [
        f"{counted(money.calls, 'call')} ({counted(money.requests, 'request')}, {money.answered} answered)",
        f"tokens: {count(money.prompt)} prompt (cached {count(money.cached)}), "
        f"{count(money.completion)} completion (reasoning {count(money.reasoning)})",
        "dollars unknown" if money.usd is None else f"${money.usd:.4f}",
    ]
    if money.unsettled:
        most = "an unknown sum" if money.held_usd is None else f"${money.held_usd:.4f}"
        parts.append(f"at most {most} more for {money.unsettled} without an answer")
    return "; ".join(parts)
