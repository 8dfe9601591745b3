"""Figures that more than one notebook shows. Each takes plain data and gives a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
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


def frontier(rows: Sequence[Mapping[str, Any]]) -> Any:
    """FVU and CE increase against L0: one point for each SAE and cut, without PCA, which would be off the chart."""
    figure, axes = picture("Error against L0, one point for each SAE and cut; the table has the numbers.", columns=2)
    panels = (
        ("fvu", "fraction of variance unexplained", "What is lost"),
        ("ce_increase", "CE increase (nats per token)", "What it costs the language model"),
    )
    for axis, (key, label, title) in zip(axes, panels, strict=True):
        for row in rows:
            if row["variant"] != "pca":
                style = {"color": COLOURS[row["variant"]], "marker": MARKERS[row["cut"]], "s": 70, "alpha": 0.85}
                name = f"{NAMES[row['variant']]}, cut: {row['cut']}"
                axis.scatter(row["l0"], row[key], label=name, edgecolor="white", zorder=3, **style)
        axis.set(xlabel="L0 (latents per token)", ylabel=label, title=title)
        axis.margins(0.2)
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def l0_distribution(l0: Mapping[str, Sequence[int]], k: float) -> Any:
    """How many tokens spend how many latents, one outline for each variant; `l0[variant][i]` counts tokens with i."""
    figure, (axis,) = picture("Share of tokens by number of latents, one outline for each variant.", width=7.5)
    most = max((len(counts) for counts in l0.values()), default=1)
    for variant, counts in l0.items():
        share = [count / sum(counts) for count in counts]
        axis.stairs(share, color=COLOURS[variant], label=NAMES[variant], linewidth=1.6, fill=False)
    axis.axvline(k, color="#444444", linestyle=":", linewidth=1, label=f"k = {k:g}")
    axis.set(xlabel="latents of a token", ylabel="share of tokens", title="Who spends how much", xlim=(0, most))
    axis.set_yscale("symlog", linthresh=0.01)
    axis.legend(frameon=False, fontsize=9)
    return figure


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


def training_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """FVU and L0 of training batches, against activations seen."""
    figure, axes = picture("FVU and L0 of training batches against activations seen.", columns=2)
    for axis, key, label in ((axes[0], "fvu", "FVU of the batch"), (axes[1], "l0", "L0 of the batch")):
        for variant, lines in histories.items():
            seen = [line["tokens"] / 1000 for line in lines]
            axis.plot(seen, [line[key] for line in lines], color=COLOURS[variant], label=NAMES[variant], linewidth=1.6)
        axis.set(xlabel="activations seen (thousands)", ylabel=label, yscale="log", title=f"{label} in training")
    axes[0].legend(frameon=False, fontsize=9)
    return figure
