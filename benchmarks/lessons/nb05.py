"""`python -m benchmarks.lessons.nb05 [search|asked|faults|shipped]`: what lesson 05 says of the JumpReLU SAE.

    search    what reaching L0 = 32 costs with a coefficient: complete runs, 3 seeds, for JumpReLU (`l0_coefficient`)
              and vanilla (`l1`). The rule is fixed beforehand. Run 1 takes coefficient 1. Run 2 supposes that L0 falls
              as 1 / coefficient. Every further run follows the secant through the last two runs, on log coefficient
              against log L0; a secant that rises counts as 1 / coefficient. It ends within 15 % of 32, or after 8 runs
    asked     one run each, with the same seeds: JumpReLU with `target_l0=32`, and BatchTopK with k = 32, whose
              threshold is calibrated on activations that are neither trained on nor measured on
    faults    JumpReLU with `l0_coefficient=2` at the learning rate of the shipped SAE and one thing wrong, two seeds:
              thresholds rounded to bfloat16 after every step; a bandwidth and a start of 0.001 copied from inputs of
              another scale; an L0 step that sees the latents, so that half of its window is covered; both estimators
              with half a window
    shipped   the shipped JumpReLU SAE: FVU before and after the values are refitted on the latents chosen

L0 and FVU are those of the held-out slice. Writes `benchmarks/results/lessons/nb05.json`; a part not named keeps
what the file has, and runs that it has are not repeated.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.lessons import RESULTS, write
from benchmarks.lessons.nb02 import refitted
from tutorial_sae import (
    ActivationStore,
    BatchTopKSAE,
    TrainConfig,
    VanillaSAE,
    calibrate_threshold,
    heldout_slice,
    load_model,
    load_pretrained,
    load_text,
    pretrained,
    train,
)
from tutorial_sae.measures import fvu
from tutorial_sae.saes import SAE, JumpReLUSAE
from tutorial_sae.saes.jumprelu import JumpReLU, Step
from tutorial_sae.training import calibration_activations

WIDTH, DISTINCT, TARGET, SEEDS = 1152, 150_000, 32, (0, 1, 2)
CONFIG = TrainConfig(tokens=150_000, batch_size=512)
SLOWER = TrainConfig(tokens=150_000, batch_size=512, lr=1e-3)
FIRST, WITHIN, MOST_RUNS = 1.0, 0.15, 8
PRICE = 2.0  # of the faulty runs
THETA = 1.0  # where thresholds start
COPIED = 0.001  # bandwidth and start in Gemma Scope, section 3.2, whatever the scale of the inputs


class LowPrecision(JumpReLUSAE):
    """Thresholds as a parameter in bfloat16 would have them: rounded after every step."""

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.copy_(self.threshold.bfloat16())


class HalfCovered(JumpReLUSAE):
    """The L0 step sees latents, which are 0 below the threshold: the window's lower half is empty."""

    def penalty(self, z: Tensor, latents: Tensor) -> Tensor:
        return self.price(Step.apply(latents, self.threshold, self.bandwidth).sum(dim=-1).mean())


class BothHalfCovered(HalfCovered):
    """The jump's estimator sees latents too."""

    def keep(self, z: Tensor, cut: str) -> Tensor:
        return JumpReLU.apply(torch.where(z > self.threshold, z, 0), self.threshold, self.bandwidth)


FAULTS: dict[str, tuple[type[JumpReLUSAE], dict[str, float]]] = {
    "none": (JumpReLUSAE, {"theta": THETA}),
    "bfloat16 thresholds": (LowPrecision, {"theta": THETA}),
    "copied scale": (JumpReLUSAE, {"theta": COPIED, "bandwidth": COPIED}),
    "half covered": (HalfCovered, {"theta": THETA}),
    "both half covered": (BothHalfCovered, {"theta": THETA}),
}


def next_coefficient(runs: list[dict[str, Any]]) -> float:
    """Where the secant through the last two runs, on log coefficient against log L0, meets the target."""
    slope = -1.0
    if len(runs) > 1:
        (a, b), (c, d) = ((math.log(run["coefficient"]), math.log(run["l0"])) for run in runs[-2:])
        slope = (d - b) / (c - a)
    slope = slope if slope < 0 else -1.0
    return runs[-1]["coefficient"] * math.exp((math.log(TARGET) - math.log(runs[-1]["l0"])) / slope)


@torch.no_grad()
def judged(sae: SAE, x: Tensor) -> dict[str, float]:
    latents = torch.cat([sae.encode(part) for part in x.split(2048)])
    row = {"l0": float((latents > 0).sum(dim=1).float().mean()), "fvu": fvu(x, sae.decode(latents))}
    row["dead"] = float((~(latents > 0).any(dim=0)).float().mean())
    if isinstance(sae, JumpReLUSAE):
        bars = sae.threshold.detach()
        row |= {"theta_mean": float(bars.mean()), "theta_std": float(bars.std()), "theta_min": float(bars.min())}
        row |= {"theta_max": float(bars.max())}
    return row


def run(
    sae: SAE, training: Tensor, x: Tensor, seed: int, config: TrainConfig = CONFIG, **options: Any
) -> dict[str, Any]:
    done = train(sae, training, config, seed=seed, **options)
    history = [{key: float(f"{line[key]:.4g}") for key in ("tokens", "fvu", "l0")} for line in done.history[::4]]
    row = {"variant": sae.variant, "seed": seed} | judged(sae, x) | {"seconds": round(done.seconds, 1)}
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row | {"history": history}


def search(training: Tensor, x: Tensor, results: dict[str, Any]) -> None:
    rows = results.setdefault("search", [])
    for seed in SEEDS:
        for variant in ("jumprelu", "vanilla"):
            while True:
                mine = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
                if mine and (abs(mine[-1]["l0"] / TARGET - 1) <= WITHIN or len(mine) == MOST_RUNS):
                    break
                at = next_coefficient(mine) if mine else FIRST
                options = {"l1": at} if variant == "vanilla" else {"l0_coefficient": at, "theta": THETA}
                kind = VanillaSAE if variant == "vanilla" else JumpReLUSAE
                sae = kind(training.shape[1], WIDTH, seed=seed, **options)  # type: ignore[arg-type]
                rows.append({"run": len(mine) + 1, "coefficient": at} | run(sae, training, x, seed))
                del rows[-1]["history"]
                write("nb05", results)


def asked(model: Any, training: Tensor, x: Tensor, results: dict[str, Any]) -> None:
    made = pretrained.manifest()
    quiet = calibration_activations(model, made["hook"], made["mask"]["norm_limit"])
    rows = results.setdefault("asked", [])
    for seed in SEEDS:
        had = {row["variant"] for row in rows if row["seed"] == seed}
        for sae in (
            JumpReLUSAE(training.shape[1], WIDTH, target_l0=TARGET, theta=THETA, seed=seed),
            BatchTopKSAE(training.shape[1], WIDTH, k=TARGET, seed=seed),
        ):
            if sae.variant not in had:
                rows.append(run(sae, training, x, seed, calibration=quiet))
                if isinstance(sae, BatchTopKSAE):
                    rows[-1]["theta"] = calibrate_threshold(sae, quiet).theta
                write("nb05", results)


def faults(training: Tensor, x: Tensor, results: dict[str, Any]) -> None:
    rows = results.setdefault("faults", [])
    for seed in SEEDS[:2]:
        had = {row["fault"] for row in rows if row["seed"] == seed}
        for fault, (kind, options) in FAULTS.items():
            if fault not in had:
                sae = kind(training.shape[1], WIDTH, l0_coefficient=PRICE, seed=seed, **options)
                rows.append({"fault": fault} | run(sae, training, x, seed, SLOWER))
                write("nb05", results)


def main(parts: list[str]) -> None:
    parts = parts or ["search", "asked", "faults", "shipped"]
    model = load_model("smollm2-135m")
    x = heldout_slice(model)[:]
    path = RESULTS / "nb05.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.pop("meta", None)
    results |= {"model": "smollm2-135m", "hook": pretrained.manifest()["hook"], "dtype_of_activations": "bfloat16"}
    results["setting"] = {
        "d_sae": WIDTH,
        "tokens_seen": CONFIG.tokens,
        "tokens_distinct": DISTINCT,
        "batch_size": CONFIG.batch_size,
        "lr": CONFIG.lr,
        "penalty_warmup": CONFIG.penalty_warmup,
        "bandwidth": 0.5,
        "theta_at_start": THETA,
        "target": TARGET,
        "within": WITHIN,
        "first_coefficient": FIRST,
        "faults": {"l0_coefficient": PRICE, "lr": SLOWER.lr, "copied": COPIED},
        "seeds": list(SEEDS),
        "heldout_tokens": len(x),
    }
    training = ActivationStore(model, load_text(), tokens=DISTINCT)[:]
    if "search" in parts:
        search(training, x, results)
    if "asked" in parts:
        asked(model, training, x, results)
    if "faults" in parts:
        faults(training, x, results)
    if "shipped" in parts:
        results["shipped"] = {name: refitted(load_pretrained(name), x) for name in ("jumprelu", "vanilla")}
        print(results["shipped"], flush=True)
    write("nb05", results)


if __name__ == "__main__":
    main(sys.argv[1:])
