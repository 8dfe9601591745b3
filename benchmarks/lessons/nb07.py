"""`python -m benchmarks.lessons.nb07 [shipped|toy|start]`: what lesson 07 says of the numbers that describe an SAE.

    shipped   the shipped SAEs, PCA of rank 32 and an untrained TopK SAE on held-out activations: FVU and its relatives,
              L0, CE increase with its standard error over rows of text, KL, loss recovered, shrinkage; and how much
              smaller the standard error of a difference between two SAEs is when it is taken row by row
    toy       BatchTopK SAEs in the toy world, three seeds: squared error, the same for the true features cut at the
              same k, recovery and decoder cosine against k
    start     how many latents of a TopK SAE have a partner in a BatchTopK SAE made with the same seed, and in one made
              with another: they are those of `python -m benchmarks.panels`, which has to run first

Writes `benchmarks/results/lessons/nb07.json`; a part that is not named keeps what the file has.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import panels
from benchmarks.lessons import RESULTS, write
from tutorial_sae import (
    ActivationStore,
    BatchTopKSAE,
    TopKSAE,
    TrainConfig,
    load_model,
    load_pretrained,
    load_sae,
    load_text,
    pretrained,
    train,
)
from tutorial_sae.measures import OTHER_FVU, decoder_cosine, fvu, kl
from tutorial_sae.metrics import CE_ROWS, PCA, Heldout, reconstruction
from tutorial_sae.models import token_logits
from tutorial_sae.saes import SAE
from tutorial_sae.saes.base import keep_batch
from tutorial_sae.toy import ToyWorld, recovery

TOKENS_FVU, TOKENS_CE, TOKENS_COUSINS, TOKENS_FIT, RANK = 30_000, 6_000, 16_384, 100_000, 32
NAMES = ("vanilla", "gated", "topk", "batchtopk", "jumprelu")
SEEDS, KS, TRUE_L0 = (0, 1, 2), (3, 5, 8, 11, 14, 18), 11
TOY = TrainConfig(tokens=200_000, batch_size=512, lr=1e-2)


def by_row(heldout: Heldout, spliced: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cross-entropy and KL from the clean model of each row of text, summed over the targets that count."""
    losses: dict[str, list[Tensor]] = {name: [] for name in spliced}
    distances: dict[str, list[Tensor]] = {name: [] for name in spliced}
    for chosen in torch.arange(len(heldout.tokens)).split(CE_ROWS):
        tokens, counted, clean = heldout.tokens[chosen], heldout.counted[chosen], torch.empty(0)
        for name, activations in spliced.items():  # the clean ones come first
            logits = token_logits(heldout.model, tokens, heldout.hook, activations[chosen])
            clean = logits if name == "clean" else clean
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(counted)
            losses[name].append((loss.double() * counted).sum(dim=1))
            distances[name].append((kl(clean, logits).double() * counted).sum(dim=1))
    return tuple({name: torch.cat(parts) for name, parts in sums.items()} for sums in (losses, distances))  # type: ignore[return-value]


def standard_error(sums: Tensor, counts: Tensor) -> float:
    """Of the mean per token, rows of text taken as independent draws."""
    mean = sums.sum() / counts.sum()
    return float((sums - mean * counts).std() * math.sqrt(len(sums)) / counts.sum())


@torch.no_grad()
def shipped(results: dict[str, Any]) -> None:
    model, made = load_model("smollm2-135m"), pretrained.manifest()
    hook, limit = made["hook"], made["mask"]["norm_limit"]
    heldout = Heldout(model, load_text(split="heldout"), hook, tokens=TOKENS_FVU, ce_tokens=TOKENS_CE, norm_limit=limit)
    fitted = ActivationStore(model, load_text(), hook, tokens=TOKENS_FIT)[:]
    untrained = TopKSAE(heldout.store.d_in, 2304, k=32, seed=5)
    untrained.fit_normalization(fitted)
    contenders: dict[str, SAE | PCA] = {name: load_pretrained(name) for name in NAMES}
    contenders |= {"pca": PCA(fitted, RANK), "untrained": untrained.eval()}
    some, counts = heldout.store[torch.arange(TOKENS_COUSINS)], heldout.counted.sum(dim=1).double()
    spliced = {"clean": heldout.activations, "zero": heldout.spliced(torch.zeros_like)}
    spliced["mean"] = heldout.spliced(lambda x: heldout.mean.expand_as(x))
    for name, sae in contenders.items():
        spliced[name] = heldout.spliced(lambda x, sae=sae: sae.decode(sae.encode(x), like=x))
    losses, distances = by_row(heldout, spliced)
    ce = {name: float(sums.sum() / counts.sum()) for name, sums in losses.items()}
    worse = {name: sums - losses["clean"] for name, sums in losses.items()}
    rows: dict[str, Any] = {}
    for name, sae in contenders.items():
        found = reconstruction(sae, heldout)
        x_hat = torch.cat([sae.decode(sae.encode(part), like=part) for part in some.split(4096)])
        rows[name] = {
            "tokens_seen": made["saes"].get(name, {}).get("tokens_seen"),
            "l0": float(found.l0_per_token.double().mean()),
            "fvu": found.fvu,
            "shrinkage": found.shrinkage,
            "dead": float((found.density == 0).double().mean()),
            "ce_increase": ce[name] - ce["clean"],
            "ce_increase_se": standard_error(worse[name], counts),
            "kl": float(distances[name].sum() / counts.sum()),
            "loss_recovered_zero": (ce["zero"] - ce[name]) / (ce["zero"] - ce["clean"]),
            "loss_recovered_mean": (ce["mean"] - ce[name]) / (ce["mean"] - ce["clean"]),
            "cousins": {"fvu": fvu(some, x_hat)} | {n: f(some, x_hat) for n, f in OTHER_FVU.items()},
        }
        print(name, rows[name], flush=True)
    difference = worse["topk"] - worse["batchtopk"]
    results["shipped"] = {
        "tokens_fvu": len(heldout.store),
        "tokens_cousins": TOKENS_COUSINS,
        "tokens_ce": int(counts.sum()),
        "rows_ce": len(counts),
        "tokens_pca": TOKENS_FIT,
        "ce_clean": ce["clean"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "ce_uniform": math.log(model.cfg.d_vocab),
        "saes": rows,
        "topk_less_batchtopk": {
            "ce": float(difference.sum() / counts.sum()),
            "se_paired": standard_error(difference, counts),
            "se_unpaired": math.hypot(*(rows[name]["ce_increase_se"] for name in ("topk", "batchtopk"))),
        },
    }


def squared_error(x: Tensor, x_hat: Tensor) -> float:
    return float((x.double() - x_hat.double()).square().sum(dim=1).mean())


def toy(results: dict[str, Any]) -> None:
    rows = []
    plan = [(True, k) for k in KS] + [(False, 5), (False, TRUE_L0)]
    for seed in SEEDS:
        for correlated, k in plan:
            world = ToyWorld(l0=TRUE_L0, correlated=correlated, seed=seed)
            x, _ = world.sample(30_000, seed=1)
            sae = train(BatchTopKSAE(100, 50, k=k, seed=seed), x, TOY, seed=seed).sae
            fresh, values = world.sample(4096, seed=3)
            with torch.no_grad():
                own = squared_error(fresh, sae.decode(sae.encode(fresh, cut="batch")))
            # the true features, k of them a token on average, and the constant that suits them best
            left = fresh.double() - keep_batch(values, k).double() @ world.directions.double()
            row = {
                "correlated": correlated,
                "k": k,
                "seed": seed,
                "error": own,
                "error_of_true_features": squared_error(left, left.mean(dim=0).expand_as(left)),
                **recovery(sae, world)._asdict(),
                "decoder_cosine": decoder_cosine(sae.W_dec),
            }
            rows.append(row)
            print(row, flush=True)
    results["toy"] = {"features": 50, "d_in": 100, "l0": TRUE_L0, "tokens_seen": TOY.tokens, "d_sae": 50, "rows": rows}


@torch.no_grad()
def start(results: dict[str, Any]) -> None:
    """The same comparison with and without a shared start."""
    rows = []
    folders = {(name, seed): panels.RUNS / f"{name}-2304-32-{seed}" for name in ("topk", "batchtopk") for seed in SEEDS}
    made = {key: load_sae(folder) for key, folder in folders.items() if (folder / "sae.safetensors").exists()}
    for (name, seed), a in made.items():
        for (other, its_seed), b in made.items():
            if (name, other) == ("topk", "batchtopk"):
                rows.append({"seeds": [seed, its_seed]} | panels.returning(a, b))
                best = (a.W_dec @ b.W_dec.T).argmax(dim=1)
                rows[-1]["same_number"] = float((best == torch.arange(len(best))).float().mean())
                print(rows[-1], flush=True)
    results["start"] = {"tokens_seen": panels.CONFIG.tokens, "d_sae": 2304, "k": 32, "rows": rows}


def main(parts: list[str]) -> None:
    path = RESULTS / "nb07.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.pop("meta", None)
    for name, part in (("toy", toy), ("shipped", shipped), ("start", start)):
        if not parts or name in parts:
            part(results)
            write("nb07", results)


if __name__ == "__main__":
    main(sys.argv[1:])
