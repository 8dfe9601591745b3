"""`python -m benchmarks.panels`: the panels of the paper's figures 1 to 3, on the embedded model, three seeds each.

    width    FVU and CE increase at k = 32, widths 1152, 2304 and 4608 (2, 4 and 8 times d_in): figure 1 left
    k        the same at width 2304, k = 16, 32 and 64, JumpReLU too: figure 1 right, and figure 2
    L0       how many tokens spend how many latents: figure 3
    and      how many latents of one seed have a partner in another, which the paper does not ask

Bussmann, Leask and Nanda 2024, arXiv 2412.06410, section 4; there GPT-2 Small and Gemma 2 2B with a billion tokens. All
SAEs here see the same activations, in an order of the seed's own. BatchTopK is measured as it is used, by its
threshold, and by the batch cut too. Writes `benchmarks/results/panels.json` after each SAE, and goes on from there.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tutorial_sae import ActivationStore, TrainConfig, evaluate, load_model, load_text, train
from tutorial_sae.metrics import Heldout
from tutorial_sae.plots import COLOURS, MARKERS, NAMES, picture
from tutorial_sae.runtime import hardware, versions, write_json
from tutorial_sae.saes import SAE, VARIANTS
from tutorial_sae.training import calibration_activations

RESULTS = Path(__file__).parent / "results" / "panels.json"
RUNS = Path("runs") / "panels"
SEEDS, WIDTHS, WIDTH, KS, K = (0, 1, 2), (1152, 2304, 4608), 2304, (16, 32, 64), 32
DISTINCT, CONFIG = 600_000, TrainConfig(tokens=1_000_000)
TOKENS_FVU, TOKENS_CE, CALIBRATION = 30_000, 6_000, 16 * 1024
THETA = 1.0  # where JumpReLU's thresholds start
CUTS = {"topk": ("row",), "batchtopk": ("threshold", "batch"), "jumprelu": ("own",)}
SHOWN = (
    *("l0", "l0_p1", "l0_p50", "l0_p99", "fvu", "ce_increase", "loss_recovered_zero", "loss_recovered_mean"),
    *("shrinkage", "dead"),
)


class Job(NamedTuple):
    variant: str
    d_sae: int
    k: int
    seed: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def jobs() -> list[Job]:
    """Seed by seed, so that a run that is stopped has whole panels."""
    found = []
    for seed in SEEDS:
        found += [Job(variant, WIDTH, k, seed) for k in (K, *KS) for variant in CUTS]
        found += [Job(variant, width, K, seed) for width in WIDTHS for variant in ("topk", "batchtopk")]
    return list(dict.fromkeys(found))


def made(job: Job, d_in: int) -> SAE:
    options: dict[str, Any] = {"target_l0": job.k, "theta": THETA} if job.variant == "jumprelu" else {"k": job.k}
    return VARIANTS[job.variant](d_in, job.d_sae, seed=job.seed, **options)


@torch.no_grad()
def returning(a: SAE, b: SAE) -> dict[str, Any]:
    """How many of the latents of `a` that fired of late have one in `b` of nearly the same direction."""
    live = a.tokens_since_fired < CONFIG.tokens // 50
    best = (a.W_dec[live] @ b.W_dec.T).amax(dim=1)
    return {f"above_{bar}": float((best > bar).float().mean()) for bar in (0.7, 0.9)} | {"live": int(live.sum())}


def main() -> None:
    model = load_model("smollm2-135m")
    stores = {seed: ActivationStore(model, load_text(), tokens=DISTINCT, seed=seed) for seed in SEEDS}
    store = stores[SEEDS[0]]
    calibration = calibration_activations(model, store.hook, store.norm_limit, CALIBRATION)
    text = load_text(split="heldout")
    heldout = Heldout(model, text, norm_limit=store.norm_limit, tokens=TOKENS_FVU, ce_tokens=TOKENS_CE)
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    rows, histograms, stability = (results.setdefault(name, []) for name in ("rows", "histograms", "stability"))
    results["meta"] = {"hardware": hardware(), "versions": versions("tutorial-sae", "torch", "transformer-lens")}
    results["setting"] = {
        "model": "smollm2-135m",
        "model_note": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1) file",
        "hook": store.hook,
        "dtype": store.card.dtype,
        "tokens_seen": CONFIG.steps * CONFIG.batch_size,
        "tokens_distinct": len(store),
        "tokens_fvu": len(heldout.store),
        "tokens_ce": int(heldout.counted.sum()),
        "tokens_calibration": len(calibration),
        "ce_clean": heldout.clean,
        "seeds": SEEDS,
        "widths": WIDTHS,
        "width": WIDTH,
        "ks": KS,
        "k": K,
        "train": asdict(CONFIG),
    }
    trained: dict[Job, SAE] = {}
    for job in jobs():
        start = time.perf_counter()
        data = calibration if job.variant == "batchtopk" else None
        sae, _, seconds, *_ = train(
            made(job, store.d_in), stores[job.seed], CONFIG, out=RUNS / job.name, calibration=data
        )
        for cut in CUTS[job.variant]:
            key = {"variant": job.variant, "cut": cut} | job._asdict()
            if any(key.items() <= row.items() for row in rows):
                continue
            found = evaluate(sae, model, heldout, cut=cut)
            numbers = {name: value for name, value in found.numbers().items() if name in SHOWN}
            rows.append(key | numbers | {"seconds": round(seconds, 1)})
            histograms.append(key | {"counts": torch.bincount(found.l0_per_token).tolist()})
            print(job.name, cut, f"L0 {found.l0:.1f} FVU {found.fvu:.4f} CE +{found.ce_increase:.3f}", flush=True)
        trained[job] = sae
        for other in SEEDS[: SEEDS.index(job.seed)]:
            key = {name: getattr(job, name) for name in ("variant", "d_sae", "k")} | {"seeds": [other, job.seed]}
            if not any(key.items() <= row.items() for row in stability):
                stability.append(key | returning(trained[job._replace(seed=other)], sae))
        write_json(RESULTS, results)
        print(job.name, f"{seconds:.0f} s training, {time.perf_counter() - start:.0f} s in all", flush=True)


# -- what came out ---------------------------------------------------------------------------------------

OWN = {"topk": "row", "batchtopk": "threshold", "jumprelu": "own"}  # the cut that each is used with


def over_seeds(rows: list[dict[str, Any]], key: str, **wanted: Any) -> list[float]:
    """The values of `key` in the rows that are as wanted, in the order of their seeds."""
    found = [row for row in rows if wanted.items() <= row.items()]
    return [row[key] for row in sorted(found, key=lambda row: row["seed"])]


def settings(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return sorted({(row["d_sae"], row["k"]) for row in rows})


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and in brackets how far apart the seeds lie, for each width, k and SAE as it is used."""
    lines = ["| width | k | SAE | cut | L0 | FVU | CE increase | dead |", "|---:|---:|---|---|" + "---:|" * 4]
    for d_sae, k in settings(rows):
        for variant, cut in OWN.items():
            columns = {
                key: over_seeds(rows, key, d_sae=d_sae, k=k, variant=variant, cut=cut)
                for key in ("l0", "fvu", "ce_increase", "dead")
            }
            if columns["l0"]:
                mean = {key: sum(values) / len(values) for key, values in columns.items()}
                apart = {key: max(values) - min(values) for key, values in columns.items()}
                lines.append(
                    f"| {d_sae} | {k} | {NAMES[variant]} | {cut} | {mean['l0']:.1f} ({apart['l0']:.1f}) | "
                    f"{mean['fvu']:.4f} ({apart['fvu']:.4f}) | {mean['ce_increase']:.3f} "
                    f"({apart['ce_increase']:.3f}) | {mean['dead']:.1%} |"
                )
    return "\n".join(lines)


def figure(results: dict[str, Any]) -> Any:
    """The panels: FVU and CE increase against width at k = 32, and against L0 at width 2304; a point for each seed."""
    rows = results["rows"]
    drawn, axes = picture("FVU and CE increase against width and against L0, for each SAE and seed.", 4, 3.6, 3.4)
    panels = [(key, of) for of in ("d_sae", "l0") for key in ("fvu", "ce_increase")]
    names = {"fvu": "FVU", "ce_increase": "CE increase (nats per token)", "d_sae": "width (latents)", "l0": "L0"}
    for axis, (key, of) in zip(axes, panels, strict=True):
        fixed = {"k": K} if of == "d_sae" else {"d_sae": WIDTH}
        for variant, cut in OWN.items():
            mine = [row for row in rows if ({"variant": variant, "cut": cut} | fixed).items() <= row.items()]
            steps = sorted({row["k" if of == "l0" else "d_sae"] for row in mine})
            if len(steps) > 1:
                groups = [[row for row in mine if row["k" if of == "l0" else "d_sae"] == step] for step in steps]
                means = [[sum(row[name] for row in group) / len(group) for group in groups] for name in (of, key)]
                look = {"color": COLOURS[variant], "marker": MARKERS[cut]}
                axis.plot(*means, label=f"{NAMES[variant]}, cut: {cut}", linewidth=1.5, markersize=5, **look)
                axis.scatter(*([row[name] for row in mine] for name in (of, key)), s=10, alpha=0.5, **look)
        at = f"k = {K}" if of == "d_sae" else f"width {WIDTH}"
        axis.set(xlabel=names[of], ylabel=names[key], xscale="log", title=f"{names[key].split(' (')[0]}, {at}")
        ticks = WIDTHS if of == "d_sae" else KS
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    axes[-1].legend(frameon=False, fontsize=8)
    return drawn


if __name__ == "__main__":
    main()
