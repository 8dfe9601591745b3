"""`python -m benchmarks.lessons.nb06 [PART ...]`: what lesson 06 says of θ, measured on the shipped BatchTopK SAE.

    sizes      θ by estimator and by batch size, 1 to 4096, on calibration text, its tokens shuffled (three seeds) or
               in order; L0 and FVU at θ on held-out text
    ema        the moving average over 10 to 3000 batches of 256 tokens drawn from calibration text, three seeds, with
               and without its bias correction
    training   small runs of 150 and of 1000 steps, three seeds: the bar of every step, and what an average kept during
               training leaves as θ, against calibrating afterwards
    texts      L0 and FVU at the one θ, and at a θ of their own, on Wikipedia, code, documentation, French and Spanish
    learned    a threshold for each latent against one for all, both set to the same L0 on held-out text; calibrated on
               three random three-quarters of the calibration text's rows
    certain    how much θ and held-out L0 vary: by batches, by rows of text (bootstrap)
    attack     04's attack, at batches of 128: entries of a text that change under the batch cut and under θ

Writes `benchmarks/results/lessons/nb06.json`; parts that are not named stay as they are. θ is in normalised units.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.lessons import RESULTS, write
from tutorial_sae import (
    ActivationStore,
    BatchTopKSAE,
    TrainConfig,
    calibrate_threshold,
    heldout_slice,
    load_model,
    load_pretrained,
    load_text,
    pretrained,
    train,
)
from tutorial_sae.measures import fvu
from tutorial_sae.runtime import generator
from tutorial_sae.saes.base import keep_above, keep_batch

K, SEEDS, SIZES = 32, (0, 1, 2), [4**i for i in range(7)]
CALIBRATION, ELSEWHERE, TEST = 16_384, 4096, 8192
EMA_BATCHES, EMA_SIZE, DECAY = (10, 30, 100, 150, 300, 1000, 3000), 256, 0.99
WIDEST = 256
RUNS, RUN_BATCH, WIDTH, HARVEST = (150, 1000), 256, 1152, 200_000


def shipped() -> BatchTopKSAE:
    sae = load_pretrained("batchtopk").requires_grad_(False)
    assert isinstance(sae, BatchTopKSAE)
    return sae


class Data:
    """The shipped SAE, its pre-activations of calibration text, and held-out text."""

    def __init__(self) -> None:
        self.model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
        self.heldout = heldout_slice(self.model)
        self.sae = shipped()
        limit = self.heldout.norm_limit
        text = load_text(split="calibration")
        self.store = ActivationStore(self.model, text, self.heldout.hook, tokens=CALIBRATION, norm_limit=limit)
        self.calibration, self.x = self.store[:], self.heldout[:]
        self.z = self.encoded(self.calibration)
        self.test = torch.randperm(len(self.x), generator=generator(0, "test"))[:TEST]
        self.z_test = self.encoded(self.x[self.test])

    def encoded(self, x: Tensor) -> Tensor:
        return torch.cat([self.sae.pre_activations(part) for part in x.split(2048)])

    def at(self, theta: float | Tensor) -> dict[str, float]:
        """L0 and FVU at a threshold, on held-out text."""
        return measured(self.sae, self.x[self.test], self.z_test, theta)

    def other(self, language: str) -> Tensor:
        limit, text = self.heldout.norm_limit, load_text(f"embedded/{language}", split="heldout")
        return ActivationStore(self.model, text, self.heldout.hook, tokens=ELSEWHERE, norm_limit=limit)[:]


def measured(sae: BatchTopKSAE, x: Tensor, z: Tensor, theta: float | Tensor) -> dict[str, float]:
    kept = keep_above(z, torch.as_tensor(theta))
    return {"l0": float((kept > 0).sum() / len(x)), "fvu": fvu(x, sae.decode(kept))}


def bars(z: Tensor, n: int) -> Tensor:
    """The smallest entry kept in each whole batch of n."""
    kept = (keep_batch(part, K) for part in z[: len(z) // n * n].split(n))
    return torch.stack([part[part > 0].min() for part in kept])


def pooled(z: Tensor, k: float = K) -> float:
    """The largest entry dropped when all tokens are one batch."""
    values = z[z > 0]
    return float(values.kthvalue(len(values) - int(k * len(z))).values)


def ema(minima: list[float], decay: float, start: float = 0.0) -> float:
    for smallest in minima:
        start = decay * start + (1 - decay) * smallest
    return start


def sizes(data: Data) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for seed in (*SEEDS, None):
        order = torch.arange(len(data.z)) if seed is None else torch.randperm(len(data.z), generator=generator(seed))
        z = data.z[order]
        for n in SIZES:
            found = bars(z, n)
            theta, spread = float(found.mean()), float(found.std())
            row = {"batch": n, "tokens": "in order" if seed is None else "shuffled", "seed": seed, "theta": theta}
            row |= {"spread": spread, "lowest": float(found.min()), "highest": float(found.max())}
            rows.append(row | {"l0_calibration": float((z > theta).sum() / len(z))} | data.at(theta))
            print(rows[-1], flush=True)
    theta = pooled(data.z)
    shuffled = data.z[torch.randperm(len(data.z), generator=generator(0))]
    between = []  # entries between the bars and the pool's cut, on either side, and the bars' distances from it
    for n in SIZES:
        own = bars(shuffled, n)
        batches, low = shuffled[: len(own) * n].reshape(len(own), -1), own <= theta
        lost = ((batches >= own[:, None]) & (batches <= theta)).sum(dim=1)
        gained = ((batches < own[:, None]) & (batches > theta)).sum(dim=1)
        distance = (own - theta).abs()
        row = {"batch": n, "entries_low": int(lost[low].sum()), "entries_high": int(gained[~low].sum())}
        row |= {"distance_low": float(distance[low].sum()), "distance_high": float(distance[~low].sum())}
        between.append(row)
        print(row, flush=True)
    quantile = float(torch.quantile(data.z[:4096].flatten()[: 2**24 - 1], 1 - K / data.sae.d_sae))
    few = {"tokens": 4096, "kth": pooled(data.z[:4096]), "quantile": quantile}
    return {"rows": rows, "target_l0": {"theta": theta} | data.at(theta), "between": between, "few": few}


def moving(data: Data) -> list[dict[str, Any]]:
    rows = []
    z = data.z.topk(WIDEST, dim=1).values  # no token keeps more, so the bars are those of all entries
    for seed in SEEDS:
        draw = generator(seed, "nb06")
        minima: list[float] = []
        for count in EMA_BATCHES:
            while len(minima) < count:
                minima += bars(z[torch.randint(len(z), (EMA_SIZE,), generator=draw)], EMA_SIZE).tolist()
            raw = ema(minima, DECAY)
            for corrected, theta in ((False, raw), (True, raw / (1 - DECAY ** len(minima)))):
                rows.append({"batches": count, "seed": seed, "corrected": corrected, "theta": theta} | data.at(theta))
                print(rows[-1], flush=True)
    return rows


def training(data: Data) -> dict[str, Any]:
    """An instance's `constrain` is called after every step, and `hint` is then the bar of that step's batch."""
    model = load_model("smollm2-135m", dtype=torch.bfloat16)
    harvest = ActivationStore(model, load_text(), tokens=HARVEST)[:]
    results: dict[str, Any] = {"rows": [], "bars": {}, "d_sae": WIDTH, "batch": RUN_BATCH, "tokens_distinct": HARVEST}
    for steps in RUNS:
        for seed in SEEDS:
            sae = BatchTopKSAE(harvest.shape[1], WIDTH, k=K, seed=seed)
            seen: list[float] = []

            def constrain(sae: BatchTopKSAE = sae, seen: list[float] = seen) -> None:
                seen.append(sae.hint)
                BatchTopKSAE.constrain(sae)

            sae.constrain = constrain  # type: ignore[method-assign]
            train(sae, harvest, TrainConfig(tokens=steps * RUN_BATCH, batch_size=RUN_BATCH), seed=seed)
            sae.requires_grad_(False)
            ways = {
                "from 0, decay .99": ema(seen, 0.99),
                "from the first bar, decay .999": ema(seen[2:], 0.999, seen[1]),  # the first step has no hint yet
                "after step 1000, unset is -1": -1.0,
                "calibrated afterwards": calibrate_threshold(sae, data.calibration).theta,
            }
            z = torch.cat([sae.pre_activations(part) for part in data.x[data.test].split(2048)])
            for way, theta in ways.items():
                row = {"steps": steps, "seed": seed, "way": way, "theta": float(theta)}
                results["rows"].append(row | measured(sae, data.x[data.test], z, float(theta)))
                print(results["rows"][-1], flush=True)
            results["bars"][f"{steps}, seed {seed}"] = [round(bar, 4) for bar in seen[1 :: max(1, steps // 100)]]
    return results


def sources(store: ActivationStore) -> list[str]:
    names = {"wikipedia": "Wikipedia", "code": "code", "documentation": "documentation"}
    return [names[store.context(i).source.split(":")[0].split("/")[0].split()[0]] for i in range(len(store))]


def texts(data: Data) -> list[dict[str, Any]]:
    theta = float(data.sae.threshold)
    kind = sources(data.heldout)
    kinds: Iterator[tuple[str, Tensor]] = (
        (name, data.x[torch.tensor([k == name for k in kind])]) for name in ("Wikipedia", "code", "documentation")
    )
    rows = []
    for name, x in (*kinds, ("all three", data.x), ("French", data.other("fr")), ("Spanish", data.other("es"))):
        z = data.encoded(x)
        row: dict[str, Any] = {
            "text": name,
            "tokens": len(x),
            "theta": theta,
            "at_theta": measured(data.sae, x, z, theta),
        }
        halves = [float((z[half] > theta).sum() / len(half)) for half in torch.arange(len(x)).chunk(4)]
        row["l0_of_quarters"] = halves
        own = pooled(z)
        row |= {"own_theta": own, "at_own": measured(data.sae, x, z, own)}
        rows.append(row)
        print(row, flush=True)
    return rows


def learned(data: Data) -> list[dict[str, Any]]:
    row_of = torch.tensor([data.store.place(i)[0] for i in range(len(data.store))])
    rows = []
    for seed in SEEDS:
        chosen = torch.randperm(int(row_of.max()) + 1, generator=generator(seed, "rows"))
        mine = torch.isin(row_of, chosen[: len(chosen) * 3 // 4]).nonzero().squeeze(1)
        mine = mine[torch.randperm(len(mine), generator=generator(seed, "shuffle"))]
        sae = shipped()
        theta = calibrate_threshold(sae, data.calibration[mine], method="learned").theta
        many = data.at(theta)
        at_equal = pooled(data.z_test, many["l0"])
        one = data.at(at_equal)
        spread = torch.as_tensor(theta).quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        row = {"seed": seed, "tokens": len(mine), "theta_p1_p50_p99": spread, "learned": many}
        row |= {"one": {"theta": at_equal} | one, "fvu_difference": many["fvu"] - one["fvu"]}
        rows.append(row)
        print(row, flush=True)
    return rows


def certain(data: Data) -> dict[str, Any]:
    """Standard deviations of θ and of held-out L0 over bootstrap draws of rows of text, and of single tokens."""
    row_of = torch.tensor([data.store.place(i)[0] for i in range(len(data.store))])
    result: dict[str, Any] = {"draws": 20, "rows_of_text": int(row_of.max()) + 1, "tokens": len(data.store)}
    result["batches_of_1024"] = {}
    for name, z in (
        ("in order", data.z),
        ("shuffled", data.z[torch.randperm(len(data.z), generator=generator(0))]),
    ):
        found = bars(z, 1024)
        result["batches_of_1024"][name] = {"spread": float(found.std()), "batches": len(found)}
    edges = torch.cat([torch.zeros(1, dtype=torch.long), row_of.bincount().cumsum(0)])
    order = generator(0, "bootstrap")
    own: dict[str, list[float]] = {"rows": [], "tokens": []}
    rows = int(row_of.max()) + 1
    for _ in range(20):
        picks = torch.randint(rows, (rows,), generator=order).tolist()
        own["rows"].append(pooled(torch.cat([data.z[edges[i] : edges[i + 1]] for i in picks])))
        own["tokens"].append(pooled(data.z[torch.randint(len(data.z), (len(data.z),), generator=order)]))
    result["theta_sd"] = {name: statistics.stdev(values) for name, values in own.items()}
    print(result, flush=True)
    return result


def attack(data: Data) -> dict[str, Any]:
    """One text beside poor and beside rich neighbours; the codes under θ are taken from the whole batches too."""
    row_of = torch.tensor([data.heldout.place(i)[0] for i in range(len(data.heldout))])
    z = data.encoded(data.x)
    wealth, texts_, share, moved, entries = (z > data.sae.threshold).sum(dim=1), 40, [], 0, 0
    for text in torch.randperm(int(row_of.max()), generator=generator(0, "texts"))[:texts_].tolist():
        mine = (row_of == text).nonzero().squeeze(1)[:24]
        pool = (row_of != text).nonzero().squeeze(1)
        ranked, beside = pool[wealth[pool].argsort(stable=True)], 128 - len(mine)
        batches = [torch.cat([mine, other]) for other in (ranked[:beside], ranked.flip(0)[:beside])]
        one, two = (keep_batch(z[batch], K)[: len(mine)] > 0 for batch in batches)
        share.append(float((one != two).sum() / (one | two).sum()))
        fixed = [data.sae.encode(data.x[batch], "threshold")[: len(mine)] > 0 for batch in (*batches, mine)]
        moved += int((fixed[0] != fixed[1]).sum() + (fixed[0] != fixed[2]).sum())
        entries += int(fixed[2].sum())
    return {"texts": texts_, "batch": 128, "changed_by_batch": share, "moved_by_theta": moved, "entries": entries}


def main(names: list[str]) -> None:
    path = RESULTS / "nb06.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    made, data = pretrained.manifest(), Data()
    parts: dict[str, Callable[[Data], Any]] = {
        "sizes": sizes,
        "ema": moving,
        "texts": texts,
        "certain": certain,
        "attack": attack,
        "learned": learned,
        "training": training,
    }
    results |= {"model": made["model"], "model_note": made["model_note"], "hook": made["hook"], "d_sae": 2304, "k": K}
    results |= {"seeds": list(SEEDS), "tokens_seen_by_shipped": made["saes"]["batchtopk"]["tokens_seen"]}
    results |= {"tokens_calibration": CALIBRATION, "tokens_heldout": TEST, "theta_shipped": float(data.sae.threshold)}
    for name in names or parts:
        results[name] = parts[name](data)
        write("nb06", {key: value for key, value in results.items() if key != "meta"})


if __name__ == "__main__":
    main(sys.argv[1:])
