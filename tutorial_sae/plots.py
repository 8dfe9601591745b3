"""Figures that more than one notebook shows. Each takes plain data and gives a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart; the marker says the cut.
COLOURS = {
    "vanilla": "#E69F00",
    "gated": "#CC79A7",
    "topk": "#0072B2",
    "batchtopk": "#D55E00",
    "jumprelu": "#009E73",
    "pca": "#7f7f7f",
}
NAMES = {
    "vanilla": "vanilla",
    "gated": "Gated",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "pca": "PCA",
}
MARKERS = {"own": "o", "row": "s", "batch": "^", "threshold": "D"}


def picture(alt: str, columns: int = 1, width: float = 4.4, height: float = 3.4) -> tuple[Any, Any]:
    """A figure and its axes. No pyplot: nothing global, nothing shown twice, and the picture has a text alternative."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, bytes], dict[str, Any]]:
            data = io.BytesIO()
            self.savefig(data, dpi=110)
            return {"image/png": data.getvalue()}, {"image/png": {"alt": alt}}

    figure = Picture(figsize=(columns * width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def l0_by_kind(means: Mapping[str, Mapping[str, float]]) -> Any:
    """Mean L0 for each kind of token, as grouped bars: `means[variant][kind]`."""
    figure, (axis,) = picture("Mean latents per token for each kind of token, bars for each variant.", width=7.5)
    kinds = list(next(iter(means.values())))
    wide = 0.8 / len(means)
    for i, (variant, by_kind) in enumerate(means.items()):
        places = [j + (i - (len(means) - 1) / 2) * wide for j in range(len(kinds))]
        axis.bar(places, [by_kind[kind] for kind in kinds], wide * 0.92, color=COLOURS[variant], label=NAMES[variant])
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set(ylabel="mean latents per token", title="Where the budget goes, by kind of token")
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=False, fontsize=9)
    return figure
