"""`python -m benchmarks.readme`: put the committed results into the README, and draw its figure.

To renew them: `python -m tutorial_sae compare --seed 0`, the same with `--seed 1`, copy each run's `results.json` to
`benchmarks/results/compare-seed0.json` and `compare-seed1.json`, run `python -m benchmarks.calibration`, then this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import calibration
from tutorial_sae.plots import frontier
from tutorial_sae.report import cross_table, results_table, setting

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by `python -m benchmarks.readme` -->", "<!-- end of results -->"


def load(seed: int) -> dict[str, Any]:
    return json.loads((RESULTS / f"compare-seed{seed}.json").read_text(encoding="utf-8"))


def section() -> str:
    """The README's results, from the committed files and from nothing else."""
    first, second = load(0), load(1)
    calibrated = json.loads(calibration.RESULTS.read_text(encoding="utf-8"))
    trained_on, calibrated_on = (calibrated["meta"][key] for key in ("tokens_seen", "tokens_calibration"))
    pairs = list(zip(first["rows"], second["rows"], strict=True))
    apart = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("fvu", "ce_increase")}
    seconds = sum(
        row["train_seconds"] for row in first["rows"] if row["cut"] in ("own", "row") and row["variant"] != "pca"
    )
    return f"""{START}

## What it measures

{setting(first["meta"])} Training took {seconds / 60:.1f} minutes for the SAEs together, on two cores that
were busy with other work as well.

{results_table(first["rows"])}

![FVU and CE increase against L0, one point for each row of the table](benchmarks/results/compare.png)

L0 is the mean number of latents per token (in brackets the 1st and 99th percentile), FVU the fraction of variance left
unexplained, CE increase what the language model loses when the reconstruction is put in place of its activations (nats
per token), dead the share of latents that never fired on the held-out text. Lower is better, at equal L0. "Recovered"
is measured against deleting the activations (zero) or replacing them by their mean, and flatters. A second seed
differs by at most {apart["fvu"]:.4f} in FVU and {apart["ce_increase"]:.3f} in CE increase.

What if an SAE trained with one cut is used with another?

{cross_table(first["rows"])}

Does one number θ keep k latents per token on text that it was not calibrated on? Held-out L0, seeds 0 / 1, of
BatchTopK SAEs trained on {trained_on:,} activations and calibrated on {calibrated_on:,}, in batches of several sizes:

{calibration.table(calibrated["rows"])}

`batch_min_mean` is the paper's estimator, and the default; with small batches it lies too low here, and lets more
latents through. `ema` without its bias correction is on its way up from 0 still. `learned` gives each latent a
threshold of its own.

Two seeds of one small model in a short run: at other widths, budgets and lengths of training the order can change, and
nothing here is measured on GPT-2 or Gemma 2.

{END}"""


def main() -> None:
    frontier(load(0)["rows"]).savefig(RESULTS / "compare.png", dpi=110)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    readme.write_text(before + section() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
