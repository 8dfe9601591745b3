"""`python -m benchmarks.lessons.nb04 [PART ...]`: what lesson 04 says of the batch cut.

    table        shipped TopK and BatchTopK, cut by row and by batch: FVU, L0 and CE increase on held-out text, and FVU
                 with one token left out, the one that takes most entries from the TopK SAE's batch
    last         what a token's last four latents are worth (how much its squared error grows without them), by how many
                 the flat cut gives it
    attack       one text beside chosen and beside random neighbours: the share of its entries that change
    batch_size   FVU of the shipped BatchTopK SAE when the batch is small, and entries that differ from batches of 4096
    short        TopK and BatchTopK trained for 100,000 activations, three seeds; also without the token of `table`

Writes `benchmarks/results/lessons/nb04.json`; parts that are not named stay as they are.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lessons import RESULTS, write
from tutorial_sae import (
    ActivationStore,
    BatchTopKSAE,
    TopKSAE,
    evaluate,
    load_model,
    load_pretrained,
    load_text,
    pretrained,
    train,
)
from tutorial_sae.measures import fvu
from tutorial_sae.metrics import Heldout
from tutorial_sae.runtime import generator
from tutorial_sae.saes import SAE
from tutorial_sae.saes.base import keep_batch
from tutorial_sae.training import RECIPES

TOKENS, CE_TOKENS, SEEDS, BATCH = pretrained.SLICE, 12_000, (0, 1, 2), 4096
SHORT, SIZES = 100_000, (128, 1024, 4096)
TEXTS, TEXT_TOKENS = 40, 24


def codes(sae: SAE, x: Tensor, cut: str, seed: int) -> Tensor:
    """Codes of held-out activations in shuffled batches of 4096."""
    kept = torch.empty(len(x), sae.d_sae)
    for part in torch.randperm(len(x), generator=generator(seed, "nb04")).split(BATCH):
        kept[part] = sae.encode(x[part], cut)
    return kept


def table(saes: dict[str, SAE], model: Any, heldout: Heldout, x: Tensor) -> dict[str, Any]:
    greedy = int((codes(saes["topk"], x, "batch", 0) > 0).sum(dim=1).argmax())
    others = torch.arange(len(x)) != greedy
    rows = []
    for name, sae in saes.items():
        for cut in sae.cuts:
            result = evaluate(sae, model, heldout, cut=cut)
            row = {key: result.numbers()[key] for key in ("cut", "l0", "l0_p1", "l0_p99", "fvu", "ce_increase")}
            kept = [codes(sae, x, cut, seed) for seed in SEEDS]
            row["fvu_without"] = [fvu(x[others], sae.decode(latents)[others]) for latents in kept]
            row["entries_of_that_token"] = [int((latents[greedy] > 0).sum()) for latents in kept]
            rows.append({"variant": name} | row)
            print(rows[-1], flush=True)
    distance = (x - x.mean(dim=0)).square().sum(dim=1)
    token = {
        "index": greedy,
        "piece": heldout.store.piece(greedy),
        "position": heldout.store.place(greedy)[1],
        "norm": float(x[greedy].norm()),
        "median_norm": float(x.norm(dim=1).median()),
        "share_of_variance": float(distance[greedy] / distance.sum()),
    }
    tokens_ce = int(heldout.counted.sum())
    return {"rows": rows, "left_out": token, "tokens_fvu": len(x), "tokens_ce": tokens_ce}


def last(sae: SAE, x: Tensor, cut: str) -> list[dict[str, Any]]:
    """Mean worth of the four smallest entries kept, for tokens grouped by the flat cut's L0."""
    sums: dict[str, list[float]] = {}
    for part in torch.randperm(len(x), generator=generator(0, "nb04")).split(BATCH):
        kept, flat = sae.encode(x[part], cut), (sae.encode(x[part], "batch") > 0).sum(dim=1)
        error = sae._normalized(x[part])[0] - kept @ sae.W_dec - sae.b_dec
        worth = 2 * kept * (error @ sae.W_dec.T) + kept.square()  # decoder rows have length 1
        four = torch.where(kept > 0, kept, torch.inf).topk(4, dim=1, largest=False)
        mine = worth.gather(1, four.indices).mean(dim=1)
        for name, low, high in (("under 16", 4, 16), ("16-31", 16, 32), ("32-63", 32, 64), ("64-127", 64, 128)):
            chosen = (flat >= low) & (flat < high)
            sums.setdefault(name, []).append(float(mine[chosen].sum()))
            sums.setdefault(name + " n", []).append(int(chosen.sum()))
    return [
        {"l0": name, "worth": sum(sums[name]) / sum(sums[name + " n"]), "tokens": sum(sums[name + " n"])}
        for name in sums
        if not name.endswith(" n")
    ]


def attack(sae: SAE, z: Tensor, store: ActivationStore) -> list[dict[str, Any]]:
    """Share of a text's entries that differ between two batches, of those that are kept in either."""
    row_of = torch.tensor([store.place(i)[0] for i in range(len(store))])
    wealth = (z > float(sae.threshold)).sum(dim=1)  # type: ignore[arg-type]
    results = []
    for n in SIZES:
        rows: dict[str, list[float]] = {"chosen": [], "random": [], "l0_poor": [], "l0_rich": []}
        for text in torch.randperm(int(row_of.max()), generator=generator(0, "texts"))[:TEXTS].tolist():
            mine = (row_of == text).nonzero().squeeze(1)[:TEXT_TOKENS]
            pool = (row_of != text).nonzero().squeeze(1)
            ranked, beside = pool[wealth[pool].argsort(stable=True)], n - len(mine)
            order = generator(text, "neighbours")
            draws = [pool[torch.randperm(len(pool), generator=order)[:beside]] for _ in range(2)]
            poor, rich, one, two = (
                keep_batch(z[torch.cat([mine, other])], 32)[: len(mine)] > 0
                for other in (ranked[:beside], ranked.flip(0)[:beside], *draws)
            )
            rows["chosen"].append(float((poor != rich).sum() / (poor | rich).sum()))
            rows["random"].append(float((one != two).sum() / (one | two).sum()))
            rows["l0_poor"].append(float(poor.sum() / len(mine)))
            rows["l0_rich"].append(float(rich.sum() / len(mine)))
        found = {name: statistics.mean(values) for name, values in rows.items()}
        spread = {f"{name}_sd": statistics.stdev(values) for name, values in rows.items()}
        results.append({"batch": n, "texts": TEXTS, "tokens_of_a_text": TEXT_TOKENS} | found | spread)
        print(results[-1], flush=True)
    return results


def batch_size(sae: SAE, x: Tensor, z: Tensor) -> list[dict[str, Any]]:
    results = []
    for n in [4**i for i in range(7)]:
        row: dict[str, Any] = {"batch": n, "fvu": [], "l0": [], "changed": []}
        for seed in SEEDS:
            mine = torch.randperm(len(x), generator=generator(seed, "nb04"))[:BATCH]
            whole, small = keep_batch(z[mine], 32), torch.cat([keep_batch(part, 32) for part in z[mine].split(n)])
            row["fvu"].append(fvu(x[mine], sae.decode(small)))
            row["l0"].append(float((small > 0).sum() / len(mine)))
            row["changed"].append(float(((small > 0) != (whole > 0)).sum() / ((small > 0) | (whole > 0)).sum()))
        results.append(row)
        print(row, flush=True)
    return results


def short(x: Tensor, left_out: int) -> list[dict[str, Any]]:
    """Two SAEs a seed, on one harvest (in bfloat16, as the shipped SAEs were trained)."""
    others = torch.arange(len(x)) != left_out
    recipe = RECIPES["smollm2-135m"]
    config = replace(recipe.config, tokens=SHORT)
    model = load_model("smollm2-135m", dtype=torch.bfloat16)
    results = []
    for seed in SEEDS:
        store = ActivationStore(model, load_text(), tokens=recipe.harvest, seed=seed)
        for kind in (TopKSAE, BatchTopKSAE):
            sae = kind(store.d_in, recipe.d_sae, k=32, seed=seed)
            train(sae, store, config)
            with torch.no_grad():
                for cut in sae.cuts:
                    kept = codes(sae, x, cut, 0)
                    row = {"variant": sae.variant, "cut": cut, "seed": seed}
                    row |= {"tokens_seen": config.steps * config.batch_size}
                    row |= {"l0": float((kept > 0).sum() / len(x)), "fvu": fvu(x, sae.decode(kept))}
                    row |= {"fvu_without": fvu(x[others], sae.decode(kept[others]))}
                    results.append(row)
                    print(results[-1], flush=True)
    return results


def main(names: list[str]) -> None:
    path = RESULTS / "nb04.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    made = pretrained.manifest()
    model = load_model("smollm2-135m", dtype=torch.float32)
    saes = {name: load_pretrained(name).requires_grad_(False) for name in ("topk", "batchtopk")}
    text, limit = load_text(split="heldout"), made["mask"]["norm_limit"]
    heldout = Heldout(model, text, made["hook"], norm_limit=limit, tokens=TOKENS, ce_tokens=CE_TOKENS)
    x = heldout.store[:]

    def z() -> Tensor:
        return torch.cat([saes["batchtopk"].pre_activations(part) for part in x.split(BATCH)])

    parts: dict[str, Callable[[], Any]] = {
        "table": lambda: table(saes, model, heldout, x),
        "last": lambda: {f"{n}, {cut}": last(sae, x, cut) for n, sae in saes.items() for cut in ("row", "batch")},
        "attack": lambda: attack(saes["batchtopk"], z(), heldout.store),
        "batch_size": lambda: batch_size(saes["batchtopk"], x, z()),
        "short": lambda: short(x, results["table"]["left_out"]["index"]),
    }
    results |= {"model": made["model"], "model_note": made["model_note"], "hook": made["hook"], "d_sae": 2304, "k": 32}
    results |= {"seeds": list(SEEDS), "tokens_seen_by_shipped": made["saes"]["topk"]["tokens_seen"]}
    for name in names or parts:
        results[name] = parts[name]()
        write("nb04", {key: value for key, value in results.items() if key != "meta"})


if __name__ == "__main__":
    main(sys.argv[1:])
