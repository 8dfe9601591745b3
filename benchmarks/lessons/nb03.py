"""`python -m benchmarks.lessons.nb03 [SEED ...]`: dead latents of a TopK SAE, their two kinds, AuxK and resampling.

A hard setting on purpose: k = 8, 300 steps of 1024 activations, a window of 20,000 tokens, and three learning rates.
A latent is dead here if it is silent on the whole held-out slice. It is "outbid" if its pre-activation is positive on
some token of that slice nevertheless, and "never positive" otherwise. Seeds that are named are added to the results
that are there, or replace theirs; without any, all are measured.
"""

from __future__ import annotations

import json
import sys
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.lessons import RESULTS, write
from tutorial_sae import (
    ActivationStore,
    TopKSAE,
    TrainConfig,
    heldout_slice,
    load_model,
    load_pretrained,
    load_text,
    set_threads,
    train,
)
from tutorial_sae.measures import fvu, refit
from tutorial_sae.saes.base import keep_row

SEEDS = (0, 1, 2)
D_SAE, K, STEPS, BATCH, WINDOW, DISTINCT = 2304, 8, 300, 1024, 20_000, 100_000
SETTINGS = [*((lr, way) for lr in (0.004, 0.02) for way in ("none", "auxk", "resample")), (0.001, "none")]
FIGURES = ("dead", "outbid", "never_positive", "fvu", "l0")
REFIT_TOKENS, REFIT_K = 1024, (16, 32, 64, 96)


@torch.no_grad()
def measured(sae: Any, x: Tensor) -> dict[str, float]:
    """Shares of dead latents of each kind, and what the SAE loses, on held-out activations."""
    top = torch.full((sae.d_sae,), -torch.inf)
    fired, x_hat, kept = torch.zeros(sae.d_sae, dtype=torch.bool), [], 0
    for part in x.split(4096):
        z = sae._linear(sae._normalized(part)[0], sae.b_enc)
        latents = keep_row(z.relu(), int(sae.k))
        top, fired = torch.maximum(top, z.amax(dim=0)), fired | (latents > 0).any(dim=0)
        x_hat.append(sae.decode(latents))
        kept += int((latents > 0).sum())
    masks = {"dead": ~fired, "outbid": ~fired & (top > 0), "never_positive": ~fired & (top <= 0)}
    shares = {name: float(mask.float().mean()) for name, mask in masks.items()}
    return shares | {"fvu": fvu(x, torch.cat(x_hat)), "l0": kept / len(x)}


@torch.no_grad()
def values_or_choice(x: Tensor) -> list[dict[str, float]]:
    """The shipped TopK SAE cut at several k, with its own values and with the best ones for the latents it keeps."""
    sae: Any = load_pretrained("topk")
    rows = []
    for k in REFIT_K:
        sae.k = k
        latents = sae.encode(x)
        own, best = sae.decode(latents), sae.decode(refit(sae, x))
        l0 = float((latents > 0).sum()) / len(x)
        rows.append({"k": k, "l0": l0, "fvu": fvu(x, own), "fvu_refit": fvu(x, best)})
    return rows


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each setting, the mean over seeds and the distance between the largest and the smallest."""
    rows = []
    for lr, way in SETTINGS:
        mine = [run for run in runs if (run["lr"], run["revive"]) == (lr, way)]
        if mine:
            values = {name: [run[name] for run in mine] for name in FIGURES}
            average = {name: mean(numbers) for name, numbers in values.items()}
            spread = {name: max(numbers) - min(numbers) for name, numbers in values.items()}
            rows.append({"lr": lr, "revive": way, "seeds": len(mine), "mean": average, "range": spread})
    return rows


def main(seeds: list[int]) -> None:
    set_threads(1)
    model = load_model("smollm2-135m", device="cpu")
    training = ActivationStore(model, load_text(), tokens=DISTINCT)[:]
    heldout = heldout_slice(model)[:]
    about = {
        "model": "smollm2-135m, dequantised from a 4-bit (Q4_1) file",
        "hook": model.card.hook,
        "setting": {
            "d_sae": D_SAE,
            "k": K,
            "steps": STEPS,
            "batch_size": BATCH,
            "dead_after_tokens": WINDOW,
            "tokens_seen": STEPS * BATCH,
            "tokens_distinct": len(training),
            "tokens_heldout": len(heldout),
            "dtype_of_activations": str(model.cfg.dtype).removeprefix("torch."),
        },
        "refit": {"tokens": REFIT_TOKENS, "rows": values_or_choice(heldout[:REFIT_TOKENS])},
    }
    for seed in seeds or SEEDS:
        for lr, way in SETTINGS:
            config = TrainConfig(tokens=STEPS * BATCH, batch_size=BATCH, lr=lr, dead_after_tokens=WINDOW, revive=way)
            result = train(TopKSAE(model.cfg.d_model, D_SAE, k=K, seed=seed), training, config, seed=seed)
            run: dict[str, Any] = {"lr": lr, "revive": way, "seed": seed, "seconds": round(result.seconds, 1)}
            run |= measured(result.sae, heldout)
            print(run, flush=True)
            run["curve"] = [[line["tokens"], round(line["dead"], 4)] for line in result.history[2::3]]
            path = RESULTS / "nb03.json"
            there = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
            others = [r for r in there if (r["lr"], r["revive"], r["seed"]) != (lr, way, seed)]
            runs = sorted([*others, run], key=lambda r: (SETTINGS.index((r["lr"], r["revive"])), r["seed"]))
            write("nb03", about | {"summary": summary(runs), "runs": runs})


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
