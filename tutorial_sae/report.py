"""The report of `compare`: `report.ipynb` beside this file, executed in the folder of a run, and turned into HTML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tutorial_sae.plots import NAMES
from tutorial_sae.runtime import atomic


def setting(meta: dict[str, Any]) -> str:
    """One paragraph: what was measured, on what, and how much of it."""
    hardware = meta["hardware"]
    small = "**A small run for checks: do not quote its numbers.** " if meta["tier"] == "ci" else ""
    return (
        f"{small}{meta['model_note']}, `{meta['hook']}`; SAEs of width {meta['d_sae']}, k = {meta['k']}; "
        f"{meta['tokens_seen']:,} activations seen in training, {meta['tokens_distinct']:,} of them distinct; "
        f"held-out: FVU and L0 on {meta['tokens_fvu']:,} tokens, CE on {meta['tokens_ce']:,}. Seed {meta['seed']}. "
        f"{hardware['processor']}, {hardware['threads']} threads{', ' + hardware['gpu'] if hardware['gpu'] else ''}; "
        f"tutorial_sae {meta['versions']['tutorial-sae']}, torch {meta['versions']['torch']}."
    )


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


def write_report(folder: Path) -> Path:
    """Write `report.ipynb`, executed, and `report.html` into a folder that has the results; gives the HTML's path.

    The notebook reads `results.json` and `details.json` beside it, and needs neither the model nor a network.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(Path(__file__).with_suffix(".ipynb"), as_version=4)
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns about its own future
    quiet = ["--IPKernelApp.log_level=40"]
    executor = ExecutePreprocessor(timeout=300, kernel_name="python3", record_timing=False, extra_arguments=quiet)
    executor.preprocess(notebook, {"metadata": {"path": str(folder)}})
    html, _ = HTMLExporter(exclude_input=True, exclude_output_prompt=True, embed_images=True).from_notebook_node(
        notebook
    )
    for name, content in (("report.ipynb", nbformat.writes(notebook)), ("report.html", html)):
        with atomic(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return folder / "report.html"
