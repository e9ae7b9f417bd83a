"""Drawings as inline SVG that follow the page's theme.

Every colour is a role. The SVG names roles as CSS variables, so that one drawing is readable on light and on
dark paper. Series colours are Okabe and Ito's, which colour-blind readers tell apart
(https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import io
import re
from typing import Any

from llmevo.errors import LlmevoError

# role -> (light, dark); the light value is also what the drawing uses until it becomes a variable.
ROLES: dict[str, tuple[str, str]] = {
    "ink": ("#1d2126", "#e8eaed"),
    "muted": ("#69717b", "#9aa3ad"),
    "grid": ("#dde1e6", "#343a41"),
    "paper": ("#fefefe", "#16191d"),
    "blue": ("#0072b2", "#56a8e8"),
    "vermillion": ("#d55e00", "#ff8a3d"),
    "green": ("#009e73", "#2fcf9f"),
    "purple": ("#b0579b", "#dd8fca"),
    "sky": ("#3d9fd6", "#7cc8f5"),
    "yellow": ("#b58900", "#f0c94a"),
}


def colour(role: str) -> str:
    """What the drawing uses for a role until it becomes a CSS variable."""
    return ROLES[role][0]


def pyplot() -> Any:
    """Matplotlib's pyplot, without a window.

    Raises:
        LlmevoError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise LlmevoError(
            "the report's figures need matplotlib, which is not installed; "
            "install it with: pip install 'llmevo[report]'"
        ) from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def style() -> dict[str, Any]:
    """Matplotlib's settings for all drawings."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "llmevo",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": colour("ink"),
        "text.parse_math": False,  # a task or model may be called anything, `$` included
        "axes.labelcolor": colour("muted"),
        "axes.edgecolor": colour("grid"),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.formatter.useoffset": False,
        "figure.facecolor": "none",
        "grid.color": colour("grid"),
        "grid.linewidth": 0.7,
        "xtick.color": colour("grid"),
        "ytick.color": colour("grid"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
        "ytick.left": False,
        "legend.frameon": False,
        "legend.labelcolor": colour("ink"),
    }


def inline(figure: Any, prefix: str) -> str:
    """The figure as an `<svg>` element whose ids start with `prefix` and whose colours are CSS variables."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata=nothing)
    pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{prefix}-", text)
    for role, (light, _) in ROLES.items():
        text = text.replace(light, f"var(--{role})")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{rest}'
