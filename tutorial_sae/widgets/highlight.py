"""Text with a value on each token, as HTML: the darker the ground, the larger the value."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, GROUND = "#1a1a1a", (0, 114, 178)  # Okabe and Ito's blue


def highlight(
    pieces: Sequence[str], values: Sequence[float], *, top: float | None = None, peak: int | None = None
) -> str:
    """One line of HTML. Text is escaped, so nothing in it is ever run; the value is in each token's title.

    `top` is the value of full colour (default: the largest). The token at `peak` is underlined, so that it can be
    found without colour.
    """
    if len(pieces) != len(values):
        raise ValueError(f"{len(pieces)} pieces of text and {len(values)} values: one value for each piece is wanted")
    top = top or max([*values, 0.0]) or 1.0
    spans = []
    for i, (piece, value) in enumerate(zip(pieces, values, strict=True)):
        shown = escape(piece).replace("\n", "&#8629;")
        if value <= 0:
            spans.append(shown)
            continue
        share = min(1.0, value / top)
        ink = "white" if share > 0.6 else INK
        line = ";text-decoration:underline" if i == peak else ""
        style = f"background:rgba({GROUND[0]},{GROUND[1]},{GROUND[2]},{share:.2f});color:{ink}{line}"
        spans.append(f'<span title="{value:.2f}" style="{style}">{shown}</span>')
    return f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.6">{"".join(spans)}</div>'
