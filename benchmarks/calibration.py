"""`python -m benchmarks.calibration`: does a calibrated BatchTopK SAE keep k latents per token on fresh text?

Trains the recipe of the embedded model, half as long, with k = 16, 32 and 64 and two seeds, calibrates every SAE
in several ways on 32 batches of 1024 activations, and counts latents on held-out text. Writes
`benchmarks/results/calibration.json`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutorial_sae import ActivationStore, BatchTopKSAE, calibrate_threshold, load_model, load_text, train
from tutorial_sae.measures import fvu
from tutorial_sae.runtime import hardware, versions, write_json
from tutorial_sae.training import CALIBRATION_BATCH, CALIBRATION_BATCHES, RECIPES, calibration_activations

RESULTS = Path(__file__).parent / "results" / "calibration.json"
K, SEEDS, TOKENS, HELDOUT = (16, 32, 64), (0, 1), 500_000, 30_000
BATCH_SIZES = (1, 4, 16, 64, 256)


@torch.no_grad()
def heldout_row(sae: BatchTopKSAE, x: Tensor) -> dict[str, float]:
    """What one threshold gives on text neither trained nor calibrated on."""
    kept, decoded = 0, []
    for part in x.split(4096):
        latents = sae.encode(part, "threshold")
        kept += int((latents > 0).sum())
        decoded.append(sae.decode(latents))
    return {"l0": kept / len(x), "fvu": fvu(x, torch.cat(decoded))}


def main() -> None:
    recipe = RECIPES["smollm2-135m"]
    config = replace(recipe.config, tokens=TOKENS)
    model = load_model("smollm2-135m")
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        store = ActivationStore(model, load_text(), tokens=recipe.harvest, seed=seed)
        calibration = calibration_activations(model, store.hook, store.norm_limit)
        text = load_text(split="heldout")
        heldout = ActivationStore(model, text, tokens=HELDOUT, norm_limit=store.norm_limit)[:]
        for k in K:
            sae = BatchTopKSAE(store.d_in, recipe.d_sae, k=k, seed=seed)
            train(sae, store, config, calibration=calibration)
            ways: list[tuple[str, dict[str, Any]]] = [("batch_min_mean", {"batch_size": n}) for n in BATCH_SIZES]
            ways += [(method, {}) for method in ("batch_min_mean", "ema", "target_l0", "learned")]
            ways += [("ema", {"bias_correction": False})]
            for method, options in ways:
                theta, l0, spread = calibrate_threshold(sae, calibration, method=method, **options)
                row = {"k": k, "seed": seed, "method": method, **({"batch_size": CALIBRATION_BATCH} | options)}
                row["theta"] = float(torch.as_tensor(theta).mean())
                rows.append(row | {"l0_calibration": l0, "spread": spread} | heldout_row(sae, heldout))
                print(rows[-1], flush=True)
    meta = {
        "model": "smollm2-135m",
        "model_note": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1) file",
        "hook": model.default_hook,
        "d_sae": recipe.d_sae,
        "tokens_seen": config.steps * config.batch_size,
        "tokens_distinct": recipe.harvest,
        "tokens_calibration": CALIBRATION_BATCHES * CALIBRATION_BATCH,
        "tokens_heldout": HELDOUT,
        "hardware": hardware(),
        "versions": versions("tutorial-sae", "torch", "transformer-lens"),
    }
    write_json(RESULTS, {"meta": meta, "rows": rows})


def table(rows: list[dict[str, Any]], key: str = "l0") -> str:
    """Held-out L0 (or FVU) for each way to calibrate and each k, the seeds side by side."""
    ways = list(dict.fromkeys((r["method"], r["batch_size"], r.get("bias_correction", True)) for r in rows))
    lines = ["| method | batch | " + " | ".join(f"k = {k}" for k in K) + " |", "|---|---:|" + "---:|" * len(K)]
    for method, size, corrected in ways:
        cells = []
        for k in K:
            mine = [
                f"{row[key]:.{1 if key == 'l0' else 4}f}"
                for seed, row in itertools.product(SEEDS, rows)
                if (row["k"], row["seed"], row["method"], row["batch_size"]) == (k, seed, method, size)
                and row.get("bias_correction", True) == corrected
            ]
            cells.append(" / ".join(mine))
        lines.append(f"| {method}{'' if corrected else ', uncorrected'} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
