"""What lesson 01 claims about activations: sinks, shuffling, superposition.

`python -m benchmarks.lessons.nb01` writes `benchmarks/results/lessons/nb01.json`.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tutorial_sae import ActivationStore, BatchTopKSAE, TrainConfig, heldout_slice, load_model, load_text, sparse
from tutorial_sae.measures import fvu
from tutorial_sae.models import activations_at, token_losses
from tutorial_sae.runtime import generator
from tutorial_sae.training import hand_over, optimizer

from . import write

ROWS, GROUPS, SPLICED = 64, 4, 4  # rows of 128 tokens, in groups for the spread; rows of each group to splice
KINDS = ("wikipedia", "code", "documentation")
TRAIN, BATCH, SEEDS = 102_400, 512, (0, 1, 2)
TOY_COPIES, TOY_STEPS, TOY_SEEDS = 6, 600, (0, 1, 2, 3, 4)
CHANCES = (1.0, 0.3, 0.1)


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation of a few measurements, which are given too."""
    return {"mean": mean(values), "sd": stdev(values), "values": values}


def shares(x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, " d_in"]:
    """The share of the variance that the best 1, 2, 3, ... directions explain."""
    squares = torch.linalg.eigvalsh((x - x.mean(dim=0)).double().T.cov()).flip(0)
    return squares.cumsum(0) / squares.sum()


def sinks(model: Any) -> dict[str, Any]:
    """Norms, variance explained with and without sinks, and what splicing one direction costs, by groups of rows."""
    tokens = next(iter(load_text(split="heldout").rows(model, 128, ROWS, shuffle=True))).tokens.long()
    everything = torch.cat([activations_at(model, part, model.card.hook).float() for part in tokens.split(16)])
    norms = everything.norm(dim=-1)
    large = norms > 10 * norms.median()
    special = torch.isin(tokens, torch.tensor(model.card.special))
    found: dict[str, list[float]] = {}
    for part in torch.arange(ROWS).chunk(GROUPS):
        x, big, ordinary = everything[part], large[part], everything[part][~large[part]]
        centre = x.flatten(0, 1).mean(dim=0)
        direction = torch.linalg.svd(x.flatten(0, 1) - centre, full_matrices=False).Vh[0]
        one = ((x - centre) @ direction)[..., None] * direction + centre
        blank = torch.where(big[..., None], x, ordinary.mean(dim=0))
        gone = torch.where(big[..., None], ordinary.mean(dim=0), x)
        few = part[:SPLICED]
        for name, new in {"clean": x, "one direction": one, "only sinks": blank, "sinks as others": gone}.items():
            losses = token_losses(model, tokens[few], model.card.hook, new[:SPLICED])
            found.setdefault(f"ce, {name}", []).append(float(losses.mean()))
        found.setdefault("one direction, all tokens", []).append(float(shares(x.flatten(0, 1))[0]))
        without = shares(ordinary)
        found.setdefault("one direction, without sinks", []).append(float(without[0]))
        found.setdefault("32 directions, without sinks", []).append(float(without[31]))
    return {
        "tokens": tokens.numel(),
        "tokens spliced": SPLICED * 127,
        "norm of first position": float(norms[:, 0].mean()),
        "median norm": float(norms.median()),
        "norms of the rest, 1 % and 99 %": norms[~large].quantile(torch.tensor([0.01, 0.99])).tolist(),
        "share of tokens that are sinks": float(large.float().mean()),
        "share of sinks that are special tokens": float(special[large].float().mean()),
        "by group of rows": {name: spread(values) for name, values in found.items()},
    }


def kinds_of(store: ActivationStore) -> Int[Tensor, " tokens"]:
    """Which of KINDS each activation comes from, judged by the first one of its row."""
    row = torch.tensor([store.place(i)[0] for i in range(len(store))])
    _, inverse, counts = row.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return torch.tensor([KINDS.index(store.context(int(i)).source) for i in first])[inverse]


def trained(x: Float[Tensor, "tokens d_in"], order: Int[Tensor, " tokens"], seed: int) -> BatchTopKSAE:
    """A BatchTopK SAE that saw `x` once, in this order."""
    config = TrainConfig(tokens=len(x), batch_size=BATCH)
    sae = BatchTopKSAE(x.shape[1], 2304, k=32, seed=seed).train()
    sae.fit_normalization(x)
    adam = optimizer(sae, config)
    for step, batch in enumerate(order.split(BATCH)):
        for group in adam.param_groups:
            group["lr"] = config.lr_at(step)
        sae.zero_grad()
        sparse.loss(sae, x[batch]).total.backward()
        sae.project_decoder_grad()
        hand_over(sae, adam)
        adam.step()
        sae.constrain()
    return sae


@torch.no_grad()
def shuffling(model: Any) -> dict[str, Any]:
    """The same activations, once each, in three orders: held-out error at L0 = 32, and how uneven the batches are."""
    store = ActivationStore(model, load_text(), tokens=TRAIN)
    x, kind = store[:], kinds_of(store)
    held = heldout_slice(model)
    mixed = torch.randperm(len(held), generator=generator(0, "held out"))
    test, test_kind = held[:][mixed], kinds_of(held)[mixed]
    orders = {"rows in order": torch.arange(len(x)), "one kind after the other": kind.argsort(stable=True)}
    found: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        orders["shuffled"] = torch.randperm(len(x), generator=generator(seed, "order"))
        for name, order in orders.items():
            with torch.enable_grad():
                sae = trained(x, order, seed)
            x_hat = torch.cat([sae.decode(sae.encode(part, "batch")) for part in test.split(4096)])
            mine = found.setdefault(name, {})
            mine.setdefault("fvu", []).append(fvu(test, x_hat))
            for number, label in enumerate(KINDS):
                here = test_kind == number
                mine.setdefault(f"fvu of {label}", []).append(fvu(test[here], x_hat[here]))
            print(seed, name, {key: round(values[-1], 4) for key, values in mine.items()}, flush=True)
    return {
        "tokens": len(x),
        "batch": BATCH,
        "l0": 32,
        "seeds": list(SEEDS),
        "heldout tokens": len(test),
        "kinds in training, tokens": dict(zip(KINDS, torch.bincount(kind, minlength=len(KINDS)).tolist(), strict=True)),
        "clumping": {name: clumping(x, order) for name, order in orders.items()},
        "orders": {name: {k: spread(v) for k, v in values.items()} for name, values in found.items()},
    }


def clumping(x: Float[Tensor, "tokens d_in"], order: Int[Tensor, " tokens"], batch: int = 256) -> float:
    """The variance of batch means, as a multiple of what independent draws give: 1 where batches are well mixed."""
    means = torch.stack([x[part].mean(dim=0) for part in order[: len(x) // batch * batch].split(batch)])
    return float(batch * means.var(dim=0).sum() / x.var(dim=0).sum())


def superposition(seed: int) -> dict[str, Any]:
    """Five features in two dimensions, for each chance that a feature is on: how many are kept by the best copy, and in
    how many copies."""
    chance = generator(seed, "toy")
    p = torch.tensor(CHANCES).repeat_interleave(TOY_COPIES)[:, None, None]
    W = (0.5 * torch.randn(len(p), 5, 2, generator=chance)).requires_grad_()
    b = torch.zeros(len(p), 1, 5, requires_grad=True)
    adam = torch.optim.Adam([W, b], lr=0.02)
    losses = torch.empty(0)
    for step in range(TOY_STEPS):
        adam.param_groups[0]["lr"] = 0.02 * (1 - step / TOY_STEPS)
        drawn = torch.rand(2, len(p), 512, 5, generator=chance)
        features = drawn[0] * (drawn[1] < p)
        losses = (features - (features @ W @ W.mT + b).relu()).square().sum(-1).mean(-1)
        adam.zero_grad()
        losses.sum().backward()
        adam.step()
    kept = (W.detach().norm(dim=-1) > 0.7).sum(dim=-1).view(len(CHANCES), TOY_COPIES)
    best = losses.detach().view(len(CHANCES), TOY_COPIES).argmin(dim=1)
    return {
        str(c): {"kept by the best": int(mine[i]), "kept by each copy": mine.tolist()}
        for c, mine, i in zip(CHANCES, kept, best, strict=True)
    }


def main() -> None:
    model = load_model("smollm2-135m")
    write(
        "nb01",
        {
            "model": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1) file",
            "hook": model.card.hook,
            "dtype": model.card.dtype,
            "superposition": {str(seed): superposition(seed) for seed in TOY_SEEDS},
            "sinks": sinks(model),
            "shuffling": shuffling(model),
        },
    )


if __name__ == "__main__":
    main()
