"""`python -m benchmarks.lessons.nb02 [runs|pair|shipped]`: what lesson 02 says of the vanilla SAE.

    runs      small vanilla SAEs (half the shipped width, 150,000 activations seen), two seeds: a sweep over l1; the
              same without the penalty's warm-up; one whose decoder's rows are free while the penalty ignores them
    pair      a vanilla and a TopK SAE of the same L0, trained alike (as in `runs`), two seeds: FVU before and after the
              values are refitted
    shipped   the shipped vanilla, Gated and TopK SAEs on held-out activations: L0, FVU, shrinkage; FVU when the values
              are refitted on the latents chosen; and how much of each latent's direction the error still holds

Writes `benchmarks/results/lessons/nb02.json`; a part that is not named keeps what the file has.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.lessons import RESULTS, write
from tutorial_sae import (
    ActivationStore,
    TopKSAE,
    TrainConfig,
    VanillaSAE,
    heldout_slice,
    load_model,
    load_pretrained,
    load_text,
    pretrained,
    train,
)
from tutorial_sae.measures import fvu, refit, shrinkage
from tutorial_sae.saes import SAE

WIDTH, DISTINCT, SEEDS = 1152, 150_000, (0, 1)
CONFIG = TrainConfig(tokens=150_000, batch_size=512)
COLD = TrainConfig(tokens=150_000, batch_size=512, penalty_warmup=0.0)
LEAST_TOKENS = 32  # on which a latent must fire for its mean to be shown
REFIT = 2048  # tokens: each brings a small system of equations


class FreeDecoder(VanillaSAE):
    """L1 on the latents, and nothing that keeps the decoder's rows at length 1: the penalty can be cheated."""

    def project_decoder_grad(self) -> None:
        pass

    def constrain(self) -> None:
        pass


PLAN: list[tuple[str, float, type[VanillaSAE], TrainConfig]] = [
    *(("warm-up", l1, VanillaSAE, CONFIG) for l1 in (1.0, 2.0, 3.0, 5.0, 8.0)),
    *(("no warm-up", l1, VanillaSAE, COLD) for l1 in (2.0, 5.0, 8.0)),
    ("free decoder", 3.0, FreeDecoder, CONFIG),
]


def runs(model: Any, x: Tensor, results: dict[str, Any]) -> None:
    store = ActivationStore(model, load_text(), tokens=DISTINCT)
    training = store[:]
    had = {(row["recipe"], row["l1"], row["seed"]) for row in results.setdefault("runs", [])}  # a run takes its time
    for seed in SEEDS:
        for recipe, l1, kind, config in PLAN:
            if (recipe, l1, seed) in had:
                continue
            sae = kind(store.d_in, WIDTH, l1=l1, seed=seed)
            history = train(sae, training, config, seed=seed).history
            with torch.no_grad():
                latents = sae.encode(x)
                x_hat = sae.decode(latents)
            row = {
                "recipe": recipe,
                "l1": l1,
                "seed": seed,
                "l0": float((latents > 0).sum(dim=1).float().mean()),
                "fvu": fvu(x, x_hat),
                "shrinkage": shrinkage(x, x_hat),
                "dead": float((~(latents > 0).any(dim=0)).float().mean()),
                "l1_norm": float(latents.sum(dim=1).mean()),
                "decoder_norm": float(sae.W_dec.detach().norm(dim=1).mean()),
                "history": [
                    {key: float(f"{line[key]:.4g}") for key in ("tokens", "fvu", "l0", "penalty")}
                    for line in history[::4]
                ],
            }
            results["runs"].append(row)
            write("nb02", results)
            print({key: value for key, value in row.items() if key != "history"}, flush=True)
    results["setting"] = {
        "d_sae": WIDTH,
        "tokens_seen": CONFIG.tokens,
        "tokens_distinct": DISTINCT,
        "batch_size": CONFIG.batch_size,
        "lr": CONFIG.lr,
        "penalty_warmup": CONFIG.penalty_warmup,
        "seeds": list(SEEDS),
        "heldout_tokens": len(x),
    }


@torch.no_grad()
def refitted(sae: SAE, x: Tensor) -> dict[str, float]:
    """FVU before and after the refit, on some of `x`."""
    some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:REFIT]]
    before, after = fvu(some, sae(some)), fvu(some, sae.decode(refit(sae, some)))
    return {"tokens": len(some), "fvu_before": before, "fvu_after": after, "less": 1 - after / before}


def pair(model: Any, x: Tensor, results: dict[str, Any]) -> None:
    training = ActivationStore(model, load_text(), tokens=DISTINCT)[:]
    results["pair"] = []
    for seed in SEEDS:
        vanilla = VanillaSAE(training.shape[1], WIDTH, l1=3.0, seed=seed)
        train(vanilla, training, CONFIG, seed=seed)
        with torch.no_grad():
            k = round(float((vanilla.encode(x) > 0).sum(dim=1).float().mean()))
        topk = TopKSAE(training.shape[1], WIDTH, k=k, seed=seed)
        train(topk, training, CONFIG, seed=seed)
        for sae in (vanilla, topk):
            results["pair"].append({"variant": sae.variant, "seed": seed, "k": k} | refitted(sae, x))
            print(results["pair"][-1], flush=True)
        write("nb02", results)


def left_along(sae: SAE, x: Tensor) -> Tensor:
    """For each latent, the mean over the tokens on which it fires of the error's part along its decoder row."""
    sums, counts = torch.zeros(sae.d_sae, dtype=torch.float64), torch.zeros(sae.d_sae)
    for part in x.split(2048):
        latents = sae.encode(part)
        error = sae._normalized(part)[0] - latents @ sae.W_dec - sae.b_dec
        on = latents > 0
        sums += ((error @ sae.W_dec.T) * on).sum(dim=0).double()
        counts += on.sum(dim=0)
    return (sums / counts)[counts >= LEAST_TOKENS].float()


@torch.no_grad()
def measured(sae: SAE, x: Tensor) -> dict[str, Any]:
    """L0, FVU and shrinkage on all of x; the refit on `REFIT` tokens of it, with the FVU before on the same tokens."""
    latents = torch.cat([sae.encode(part) for part in x.split(2048)])
    x_hat = sae.decode(latents)
    along = left_along(sae, x)
    return {
        "l1": getattr(sae, "l1", None),
        "l0": float((latents > 0).sum(dim=1).float().mean()),
        "fvu": fvu(x, x_hat),
        "shrinkage": shrinkage(x, x_hat),
        "shrinkage_uncentred": float(x_hat.square().sum() / (x_hat * x).sum()),
        "tokens": len(x),
        "refit": refitted(sae, x),
        "left_along": {
            "latents": len(along),
            "median": float(along.median()),
            "p10": float(along.quantile(0.1)),
            "p90": float(along.quantile(0.9)),
        },
    }


def shipped(x: Tensor, results: dict[str, Any]) -> None:
    made = pretrained.manifest()["saes"]
    results["shipped"] = {}
    for name in ("vanilla", "gated", "topk"):
        if name in made:
            start = time.perf_counter()
            results["shipped"][name] = measured(load_pretrained(name), x) | {"tokens_seen": made[name]["tokens_seen"]}
            print(name, f"{time.perf_counter() - start:.0f} s", results["shipped"][name], flush=True)


def main(parts: list[str]) -> None:
    model = load_model("smollm2-135m")
    x = heldout_slice(model)[:]
    path = RESULTS / "nb02.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.pop("meta", None)
    results |= {"model": "smollm2-135m", "hook": pretrained.manifest()["hook"], "dtype_of_activations": "bfloat16"}
    if not parts or "runs" in parts:
        runs(model, x, results)
    if not parts or "shipped" in parts:
        shipped(x, results)
        write("nb02", results)
    if not parts or "pair" in parts:
        pair(model, x, results)
    write("nb02", results)


if __name__ == "__main__":
    main(sys.argv[1:])
