"""Pages made of executed notebooks: `report.ipynb` and `latents.ipynb` beside this file, turned into HTML."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tutorial_sae.plots import NAMES
from tutorial_sae.runtime import write_json, write_text


def results_table(rows: list[dict[str, Any]]) -> str:
    """All rows as a Markdown table, which reads well in a terminal too."""
    head = ["SAE", "cut", "L0 (1 %, 99 %)", "FVU", "CE increase", "recovered: zero", "mean", "dead", "training"]
    lines = []
    for row in rows:
        seconds = row["train_seconds"]
        lines.append(
            [
                NAMES[row["variant"]],
                row["cut"],
                f"{row['l0']:.1f} ({row['l0_p1']:.0f}, {row['l0_p99']:.0f})",
                f"{row['fvu']:.4f}",
                f"{row['ce_increase']:.3f}",
                f"{row['loss_recovered_zero']:.1%}",
                f"{row['loss_recovered_mean']:.1%}",
                f"{row['dead']:.1%}",
                f"{seconds:.0f} s" if row["tokens_per_second"] else "",
            ]
        )
    return _markdown(head, lines)


def cross_table(rows: list[dict[str, Any]]) -> str:
    """FVU and CE increase by what an SAE was trained with (down) and what it is cut by (across)."""
    found = {(row["variant"], row["cut"]): row for row in rows}
    lines = []
    for variant in ("topk", "batchtopk"):
        cells = [found[variant, cut] for cut in ("row", "batch")]
        lines.append([NAMES[variant], *(f"{cell['fvu']:.4f} / {cell['ce_increase']:.3f}" for cell in cells)])
    return _markdown(["FVU / CE increase", "cut by row", "cut by batch"], lines)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    bars = ["|" + "|".join("-" * (width + 1) + (":" if i > 1 else "-") for i, width in enumerate(widths)) + "|"]
    padded = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in [head, *lines]
    ]
    return "\n".join([padded[0], *bars, *padded[1:]])


def executed(notebook: str, folder: Path) -> tuple[Any, str]:
    """A notebook of this package, executed in a folder that has the data that it shows; and the same as a page."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    made = nbformat.read(Path(__file__).with_name(notebook), as_version=4)
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns about its own future
    quiet = ["--IPKernelApp.log_level=40"]
    executor = ExecutePreprocessor(timeout=300, kernel_name="python3", record_timing=False, extra_arguments=quiet)
    executor.preprocess(made, {"metadata": {"path": str(folder)}})
    nothing = dict.fromkeys(("require_js_url", "mathjax_url", "mermaid_js_url", "jquery_url"), "")  # from a network
    exporter = HTMLExporter(exclude_input=True, exclude_output_prompt=True, embed_images=True, **nothing)
    return made, exporter.from_notebook_node(made)[0]


def write_report(folder: Path) -> Path:
    """Write `report.ipynb`, executed, and `report.html` into a folder that has the results; gives the HTML's path.

    The notebook reads `results.json` and `details.json` beside it, and needs neither the model nor a network.
    """
    import nbformat

    notebook, html = executed("report.ipynb", folder)
    write_text(folder / "report.ipynb", nbformat.writes(notebook))
    write_text(folder / "report.html", html)
    return folder / "report.html"


def write_latents(data: dict[str, Any], folder: Path) -> Path:
    """Write `latents.html`, the page of all latents, of what `widgets.latents.latents_data` gives; gives its path."""
    with tempfile.TemporaryDirectory() as place:
        write_json(Path(place) / "latents.json", data)
        _, html = executed("latents.ipynb", Path(place))
    write_text(folder / "latents.html", html)
    return folder / "latents.html"


def write_grid(results: dict[str, Any], folder: Path) -> Path:
    """Write `results.json`, and `grid.html`, which draws it beside the paper's claims; gives the page's path."""
    write_json(folder / "results.json", results)
    write_text(folder / "grid.html", executed("grid.ipynb", folder)[1])
    return folder / "grid.html"
