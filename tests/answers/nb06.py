"""Answers to lesson 06."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb06 as check
from tutorial_sae.saes.base import keep_batch

# -- 6.1 -------------------------------------------------------------------------------------------------


def cuts(z: Tensor, k: float, n: int) -> list[Tensor]:
    return [keep_batch(part, k) for part in z.split(n) if len(part) == n]


def bars_list(z: Tensor, k: float, n: int) -> float:
    found = [kept[kept > 0].min() for kept in cuts(z, k, n) if kept.any()]
    return float(torch.stack(found).mean())


def bars_sorted(z: Tensor, k: float, n: int) -> float:
    """Without the package's cut, in plain Python."""
    found = []
    for start in range(0, len(z) // n * n, n):
        values = sorted((v for v in z[start : start + n].flatten().tolist() if v > 0), reverse=True)
        if values:
            found.append(values[: int(k * n + 1e-6)][-1])
    return sum(found) / len(found)


def bars_inf(z: Tensor, k: float, n: int) -> Tensor:
    """Zeros replaced by infinity; one tensor, no loop over values."""
    whole = z[: len(z) // n * n]
    smallest = torch.stack(
        [torch.where(c > 0, c, torch.inf).amin() for c in (keep_batch(p, k) for p in whole.split(n))]
    )
    return smallest[smallest.isfinite()].double().mean()


def bars_rest(z: Tensor, k: float, n: int) -> float:
    found = [kept[kept > 0].min() for kept in (keep_batch(p, k) for p in z.split(n)) if kept.any()]
    return float(torch.stack(found).mean())


def bars_empty(z: Tensor, k: float, n: int) -> float:
    return sum(float(c[c > 0].min()) if c.any() else 0.0 for c in cuts(z, k, n)) / len(cuts(z, k, n))


def bars_nan(z: Tensor, k: float, n: int) -> float:
    return float(torch.stack([c[c > 0].min() for c in cuts(z, k, n)]).mean())


def bars_dropped(z: Tensor, k: float, n: int) -> float:
    return float(torch.stack([part[c == 0].max() for part, c in zip(z.split(n), cuts(z, k, n), strict=False)]).mean())


def by(reduce: Any) -> Any:
    return lambda z, k, n: reduce([c[c > 0] for c in cuts(z, k, n) if c.any()])


BARS = [
    Answer(check.bars, "stub", (lambda z, k, n: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.bars, "a list of minima", (bars_list,), None),
    Answer(check.bars, "plain Python", (bars_sorted,), None),
    Answer(check.bars, "infinities, float64", (bars_inf,), None),
    Answer(check.bars, "zeros", (lambda z, k, n: torch.stack([c.min() for c in cuts(z, k, n)]).mean(),), "is 0"),
    Answer(check.bars, "mean of all kept", (by(lambda kept: _mean([c.mean() for c in kept])),), "average all that"),
    Answer(check.bars, "the smallest of all", (by(lambda kept: min(float(c.min()) for c in kept)),), "smallest of all"),
    Answer(check.bars, "the highest", (by(lambda kept: max(float(c.min()) for c in kept)),), "largest of the b"),
    Answer(check.bars, "one pool", (lambda z, k, n: bars_list(z, k, len(z)),), "all tokens as one batch"),
    Answer(check.bars, "each token", (lambda z, k, n: bars_list(z, k, 1),), "cut each token by itself"),
    Answer(check.bars, "the largest kept", (by(lambda kept: _mean([c.max() for c in kept])),), "is right"),
    Answer(check.bars, "the largest dropped", (bars_dropped,), "largest entry that is dropped"),
    Answer(check.bars, "with the last batch", (bars_rest,), "the last, smaller batch"),
    Answer(check.bars, "0 for an empty batch", (bars_empty,), "as a bar of 0"),
    Answer(check.bars, "min of nothing", (bars_nan,), "raised"),
    Answer(check.bars, "a list, not a number", (lambda z, k, n: [bars_list(z, k, n)],), "must be one number"),
]


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))


# -- 6.2 -------------------------------------------------------------------------------------------------


def pool_sorted(z: Tensor, k: float) -> float:
    return float(z.flatten().sort(descending=True).values[int(k * len(z) + 1e-6)])


def pool_between(z: Tensor, k: float) -> Tensor:
    """Halfway between the smallest kept and the largest dropped."""
    budget = int(k * len(z) + 1e-6)
    kept, dropped = z.flatten().topk(budget + 1).values[-2:]
    return dropped if kept == dropped or dropped == 0 else (kept + dropped) / 2


def pool_quantile(z: Tensor, k: float) -> float:
    budget = int(k * len(z) + 1e-6)
    return float(torch.quantile(z.flatten(), 1 - (budget + 1) / z.numel(), interpolation="higher"))


def pool_kept(z: Tensor, k: float) -> float:
    kept = keep_batch(z, k)
    return float(kept[kept > 0].min())


POOL = [
    Answer(check.one_pool, "stub", (lambda z, k: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.one_pool, "a sort", (pool_sorted,), None),
    Answer(check.one_pool, "halfway, a tensor", (pool_between,), None),
    Answer(check.one_pool, "a quantile of the budget", (pool_quantile,), None),
    Answer(check.one_pool, "the smallest kept", (pool_kept,), "Nothing is above itself"),
    Answer(check.one_pool, "positives only", (lambda z, k: z[z > 0].quantile(1 - k / z.shape[1]),), "Sort them all"),
    Answer(
        check.one_pool, "k in all", (lambda z, k: z.flatten().sort(descending=True).values[int(k)],), "entries, not"
    ),
    Answer(
        check.one_pool,
        "mean of rows",
        (lambda z, k: z.sort(dim=1, descending=True).values[:, int(k)].mean(),),
        "Sort them all",
    ),
    Answer(check.one_pool, "k / d_sae", (lambda z, k: torch.quantile(z.flatten(), k / z.shape[1]),), "entries, not"),
    Answer(check.one_pool, "nearly 0", (lambda z, k: -1.0,), "Sort them all"),
    Answer(check.one_pool, "no return", (lambda z, k: None,), "is a `return` missing"),
]

# -- 6.3 -------------------------------------------------------------------------------------------------


def ema(bars: Tensor, decay: float, corrected: bool) -> float:
    average = 0.0
    for bar in bars.tolist():
        average = decay * average + (1 - decay) * bar
    return average / (1 - decay ** len(bars)) if corrected else average


def ema_weights(bars: Tensor, decay: float, corrected: bool) -> Tensor:
    """All weights at once; with the correction they are divided by their sum."""
    weights = (1 - decay) * decay ** torch.arange(len(bars) - 1, -1, -1)
    return (weights * bars).sum() / (weights.sum() if corrected else 1)


def ema_swapped(bars: Tensor, decay: float, corrected: bool) -> float:
    average = 0.0
    for bar in bars.tolist():
        average = (1 - decay) * average + decay * bar
    return average / (1 - decay ** len(bars)) if corrected else average


def ema_first(bars: Tensor, decay: float, corrected: bool) -> float:
    average = float(bars[0])
    for bar in bars[1:]:
        average = decay * average + (1 - decay) * float(bar)
    return average / (1 - decay ** len(bars)) if corrected else average


def ema_inside(bars: Tensor, decay: float, corrected: bool) -> float:
    average = 0.0
    for i, bar in enumerate(bars.tolist(), start=1):
        average = decay * average + (1 - decay) * bar
        average = average / (1 - decay**i) if corrected else average
    return average


def ema_off(bars: Tensor, decay: float, corrected: bool) -> float:
    return ema(bars, decay, False) / (1 - decay ** (len(bars) - 1)) if corrected else ema(bars, decay, False)


MEMORY = [
    Answer(check.memory, "letter untouched", (ema, ...), "not attempted"),
    Answer(check.memory, "a loop", (ema, "b"), None),
    Answer(check.memory, "weights", (ema_weights, "b"), None),
    Answer(check.memory, "decay swapped", (ema_swapped, "b"), "changed places"),
    Answer(check.memory, "from the first bar", (ema_first, "b"), "start from the first bar"),
    Answer(check.memory, "corrected at every step", (ema_inside, "b"), "is right"),
    Answer(check.memory, "one too few", (ema_off, "b"), "The exponent is"),
    Answer(check.memory, "never corrected", (lambda b, d, c: ema(b, d, False), "b"), "never correct"),
    Answer(check.memory, "always corrected", (lambda b, d, c: ema(b, d, True), "b"), "is right"),
    Answer(check.memory, "a plain mean", (lambda b, d, c: b.mean(), "b"), "is right"),
    Answer(check.memory, "L0 too low", (ema, "a"), "keeps too much"),
    Answer(check.memory, "the spread", (ema, "c"), "The spread is"),
    Answer(check.memory, "forgotten", (ema, "d"), ".99 ** 100"),
    Answer(check.memory, "the name of a slip is no letter", (ema, "off"), "exponent"),
]

# -- 6.4 -------------------------------------------------------------------------------------------------


def two_kinds(n: int) -> Tensor:
    """Every other token has five large entries, the others many small ones."""
    z = torch.rand(n, 64)
    z[::2] = 0.01 * torch.rand(len(z[::2]), 64)
    z[::2, :5] = 8 + torch.rand(len(z[::2]), 5)
    return z


def by_chance(n: int) -> Tensor:
    """The kind of each token is drawn; the dear ones are rare."""
    dear = torch.rand(n, 1) < 0.2
    large = 50 * (torch.arange(64) < 4) * (1 + torch.rand(n, 64))
    return torch.where(dear, large, torch.randn(n, 64).relu())


def low(n: int) -> Tensor:
    """A few tokens have nearly all the entries: the mean of the bars is too low."""
    rich = torch.rand(n, 1) < 0.25
    return torch.where(rich, 1 + torch.rand(n, 64), 0.1 * torch.rand(n, 64))


BREAK = [
    Answer(check.too_high, "stub", (lambda n: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.too_high, "two kinds of token", (two_kinds,), None),
    Answer(check.too_high, "kinds by chance", (by_chance,), None),
    Answer(check.too_high, "too low", (low,), "the wrong way round"),
    Answer(check.too_high, "all tokens alike", (lambda n: torch.rand(n, 64),), "no more than 3.2"),
    Answer(check.too_high, "heavy tails alone", (lambda n: torch.rand(n, 64).reciprocal(),), None),
    Answer(check.too_high, "three positives", (lambda n: torch.rand(n, 64) * (torch.arange(64) < 3),), "L0 = 4"),
    Answer(check.too_high, "always the same", (lambda n: torch.arange(64.0).expand(n, 64),), "draw new tokens"),
    Answer(check.too_high, "negative entries", (lambda n: torch.randn(n, 64),), "never negative"),
    Answer(check.too_high, "another width", (lambda n: torch.rand(n, 32),), "has shape"),
    Answer(check.too_high, "nothing positive", (lambda n: torch.zeros(n, 64),), "draw new tokens"),
]

# -- 6.5 -------------------------------------------------------------------------------------------------

FRENCH = [
    Answer(check.in_french, "untouched", (...,), "not attempted"),
    Answer(check.in_french, "right", ("c",), None),
    Answer(check.in_french, "right, in brackets", ("(C)",), None),
    Answer(check.in_french, "32 everywhere", ("a",), "θ fixes the bar"),
    Answer(check.in_french, "French is silent", ("b",), "something has to add up"),
    Answer(check.in_french, "code above, French silent", ("d",), "who less"),
    Answer(check.in_french, "no such letter", ("f",), "none of the letters"),
]

# -- 6.6 -------------------------------------------------------------------------------------------------


def share(sae: Any, text: Tensor, one: Tensor, other: Tensor, cut: str) -> float:
    a, b = (sae.encode(torch.cat([text, beside]), cut)[: len(text)] > 0 for beside in (one, other))
    return float((a != b).sum() / (a | b).sum())


def share_nested(sae: Any, text: Tensor, one: Tensor, other: Tensor, cut: str) -> float:
    """By 4.7: codes are nested, so the number of entries is enough."""
    counts = [int(sae.encode(torch.cat([text, b]), cut)[: len(text)].count_nonzero()) for b in (one, other)]
    return 1 - min(counts) / max(counts)


def share_loop(sae: Any, text: Tensor, one: Tensor, other: Tensor, cut: str) -> Tensor:
    code = [sae.encode(torch.cat([text, beside]), cut) for beside in (one, other)]
    moved = either = torch.zeros(())
    for t in range(len(text)):
        a, b = code[0][t] > 0, code[1][t] > 0
        moved, either = moved + (a ^ b).sum(), either + (a | b).sum()
    return moved / either


def share_of(rows: Any, below: Any) -> Any:
    def answer(sae: Any, text: Tensor, one: Tensor, other: Tensor, cut: str) -> float:
        a, b = (sae.encode(torch.cat([text, beside]), cut)[: rows(text)] > 0 for beside in (one, other))
        return float((a != b).sum() / below(a, b))

    return answer


def one_way(way: Any) -> Any:
    def answer(sae: Any, text: Tensor, one: Tensor, other: Tensor, cut: str) -> float:
        a, b = (sae.encode(torch.cat([text, beside]), cut)[: len(text)] > 0 for beside in (one, other))
        return float(way(a, b).sum() / (a | b).sum())

    return answer


AGAIN = [
    Answer(check.attack_again, "either in the denominator", (share,), None),
    Answer(check.attack_again, "nested counts", (share_nested,), None),
    Answer(check.attack_again, "a loop", (share_loop,), None),
    Answer(check.attack_again, "neighbours", (share_of(lambda t: None, lambda a, b: (a | b).sum()),), "neighbours too"),
    Answer(check.attack_again, "all entries below", (share_of(len, lambda a, b: a.numel()),), "divide by all entries"),
    Answer(check.attack_again, "the first below", (share_of(len, lambda a, b: a.sum()),), "is right"),
    Answer(check.attack_again, "no cut", (lambda s, t, a, b, c: share(s, t, a, b, "threshold"),), "Nothing moves"),
    Answer(
        check.attack_again, "always by batch", (lambda s, t, a, b, c: share(s, t, a, b, "batch"),), "whatever `cut`"
    ),
    Answer(check.attack_again, "only what goes", (one_way(torch.gt),), "as well as"),
    Answer(check.attack_again, "only what comes", (one_way(torch.lt),), "as well as"),
    Answer(
        check.attack_again,
        "a zero that is asserted",
        (lambda s, t, a, b, c: 0.0 if c == "threshold" else share(s, t, a, b, c),),
        "with a fault",
    ),
    Answer(
        check.attack_again,
        "the text alone",
        (lambda s, t, a, b, c: share(s, t, t[:0], t[:0], c),),
        "with its neighbours",
    ),
    Answer(check.attack_again, "a count", (share_of(len, lambda a, b: 1),), "is right"),
]

ANSWERS = BARS + POOL + MEMORY + BREAK + FRENCH + AGAIN
