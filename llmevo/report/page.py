"""Parts of the page: sections, figures, notes and tables; what they are given as text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def section(title: str, body: str) -> str:
    """A section under its heading; nothing where the body, which is HTML already, is empty."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def figure(drawing: str, label: str, caption: str = "") -> str:
    """A drawing as SVG with what it is for those who do not see it, and a caption."""
    text = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>\n<div role="img" aria-label="{escape(label)}">{drawing}</div>{text}\n</figure>'


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """A table whose first column is a name and whose other columns are numbers; cells are HTML already."""
    top = "".join(
        f'<th scope="col"{" class=n" if i else ""}>{escape(text)}</th>' for i, text in enumerate(head)
    )
    lines = []
    for cells, win in rows:
        body = "".join(f'<td class="{"n" if i else "name"}">{cell}</td>' for i, cell in enumerate(cells))
        lines.append(f"<tr{' class=win' if win else ''}>{body}</tr>")
    whole = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{whole}</div>'
