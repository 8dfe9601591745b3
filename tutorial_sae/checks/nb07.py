"""Checks of lesson 07: evaluating SAEs.

What a check says to a known slip, or to a wrong letter, stands in its docstring, under the name by which `sentences`
finds the function that makes the slip.
"""

from __future__ import annotations

from statistics import fmean, pstdev, stdev, variance
from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, call, choose, exercise, like, measure, sentences, try_cases
from tutorial_sae.measures import OTHER_FVU
from tutorial_sae.runtime import generator


def _fvu(batches: Any) -> float:
    """Token by token: errors above, distances to one mean below."""
    tokens = [row.double() for x, _ in batches for row in x]
    below = sum(float((row - sum(tokens) / len(tokens)).square().sum()) for row in tokens)
    return sum(float((x - y).double().square().sum()) for x, y in batches) / below


@exercise("7.1", "one FVU from many batches")
def one_fvu(fvu_of: Any) -> str:
    """average: You average the FVU of the batches. A batch of easy tokens then counts as much as one of hard ones, and
        a small batch as much as a large one: add up above and below the line, and divide once.
    own: You measure each batch from a mean of its own. A batch of similar tokens then has little variance to explain:
        one mean, of all tokens.
    uncentred: You divide by the length of x itself: without the mean taken off, this is the "uncentred" cousin.
    ratios: You take a ratio for each token and average those: errors of all tokens above, variance of all below.
    """
    slips = sentences(
        one_fvu,
        average=lambda batches: sum(_fvu([b]) for b in batches) / len(batches),
        own=lambda batches: _fvu([(x - x.double().mean(0), y - x.double().mean(0)) for x, y in batches]),
        uncentred=lambda batches: _fvu([p for x, y in batches for p in ((x, y), (-x, -y))]),  # so their mean is 0
        ratios=lambda batches: OTHER_FVU["centred token ratio"](*map(torch.cat, zip(*batches, strict=True))),
    )
    order, cases = generator(1, "nb07"), []
    for name, mean, sizes in (("two", 1, (5, 5)), ("unequal", 1, (7, 2, 4)), ("a mean long for float32", 3e3, (40, 9))):
        parts = [(i + 1) * torch.randn(n, 6, generator=order) + mean + i for i, n in enumerate(sizes)]
        cases.append(Case(name, ([(x, x + torch.randn(x.shape, generator=order) / 2) for x in parts],)))
    return try_cases(fvu_of, _fvu, cases, slips, tol=1e-3)


@exercise("7.2", "half the error", kind="diagnose")
def half(answer: Any) -> str:
    """a: That moves the number a little, up or down: long tokens count less. See "centred token ratio" in the table.
    c: The error has hardly any mean to take off: see "centred error" in the table, equal to FVU in three digits.
    d: A shift and a scale change the error and the variance alike, so FVU is the same in either units.
    """
    return choose(answer, "b", sentences(half), "what is below the line decides: all of |x|², or its variance")


@exercise("7.3", "a splice that can be trusted")
def splice(trustworthy: Any) -> str:
    x, head, targets = torch.randn(30, 8, generator=generator(3, "nb07")), torch.eye(8) / 2, torch.arange(30) % 8

    def loss(x: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(x @ head, targets))

    x += 6 * head[targets]
    kinds = [  # what it does; whether it may be trusted; what is to be said of the wrong verdict
        ("puts change(x) in the place of x", lambda f: loss(f(x)) + 1e-6, True, "the losses differ by rounding only"),
        ("never changes anything", lambda f: loss(x), False, "it gives the clean loss whatever it is told to put in"),
        ("shifts the tokens by one", lambda f: loss(f(x).roll(1, 0)), False, "handing back x raises the loss"),
        ("puts change(x) in twice", lambda f: loss(2 * f(x)), False, "handing back x *lowers* the loss: take abs()"),
    ]
    for name, ce, trust, why in kinds:
        if bool(like(call(trustworthy, ce, loss(x)), True)) != trust:
            raise Failed(f"a splice that {name} is {'refused' if trust else 'trusted'} by your test, and {why}.")
    return f"{len(kinds)} splices, one of them to be trusted"


@exercise("7.4", "what a percentage hides", kind="measure")
def hidden(hidden_nats: Any, answer: Any) -> str:
    """share: That is the part that was recovered. What is lost is the other part, 1 - recovered.
    level: That is the loss with the SAE in place. Its increase over the clean loss is asked.
    sum: That is how far the ablated loss lies above the clean one. Add the clean loss.
    """
    said, rise = sentences(hidden), (3.44 - 2.54) / (1 - 0.9677)
    slips = {
        said["share"]: lambda r, clean, ablated: r * (ablated - clean),
        said["level"]: lambda r, clean, ablated: clean + (1 - r) * (ablated - clean),
    }
    cases = [Case(f"{r:.0%}", (r, c, a)) for r, c, a in ((0.98, 3.0, 13.0), (0.5, 2.0, 8.0), (1.0, 2.5, 9.0))]
    tried = try_cases(hidden_nats, lambda r, clean, ablated: (1 - r) * (ablated - clean), cases, slips)
    return f"{tried}; {measure(answer, 2.54 + rise, 0.6, {said['sum']: rise}, ' nats')}"


def _share(a: Tensor, b: Tensor, bar: float, change: Any = lambda cosine: cosine) -> float:
    best = [max(change(float(p @ q / p.norm() / q.norm())) for q in b) for p in a]
    return sum(value > bar for value in best) / len(best)


@exercise("7.5", "how many return")
def returns(returning: Any) -> str:
    """lengths: You compare inner products: divide by the lengths of both rows, a cosine does not know them.
    absolute: You take |cos|. A latent adds its row with a positive value, so one that points the other way is no
        partner.
    other: You count the rows of b that have a partner in a. Asked is which rows of a return.
    index: You compare row i with row i. Latents have no order: a partner may have any number.
    pairs: You count pairs: a latent with two partners returns once.
    """
    slips = sentences(
        returns,
        lengths=lambda a, b, bar: float(((a @ b.T).amax(1) > bar).float().mean()),
        absolute=lambda a, b, bar: _share(a, b, bar, change=abs),
        other=lambda a, b, bar: _share(b, a, bar),
        index=lambda a, b, bar: float((torch.cosine_similarity(a[: len(b)], b[: len(a)]) > bar).float().mean()),
        pairs=lambda a, b, bar: float((torch.cosine_similarity(a[:, None], b, dim=2) > bar).sum() / len(a)),
    )
    a, b = (torch.randn(12, 7, generator=generator(i, "nb07")) for i in (5, 6))
    near = torch.tensor([20, 20, 20, 20, 1.6, 20, 20, 20, 20])[:, None]  # no one bar does for both cases
    b = torch.cat([b[:2], a[[3, 3, 3, 0, 7, 9, 5]] * torch.tensor([[2.0, 0.3, 1, -1, 0.2, 1.5, 1]]).T]) + b[3:] / near
    return try_cases(returning, _share, [Case(f"bar {c}", (p, q, c)) for p, q, c in ((a, b, 0.7), (b, a, 0.9))], slips)


@exercise("7.6", "four reports", kind="diagnose")
def reports(*answers: Any) -> str:
    """1: Report 1 says nothing of how many latents each SAE spends. Two errors can be compared at one L0 only.
    2: Report 2 gives a share of an enormous number, and not how much is lost.
    3: Report 3: a latent that fires once in 10,000 tokens is silent on most sets of 2,000 and not dead.
    4: Report 4: both SAEs were drawn from one random decoder, and part of what they share is that.
    """
    for number, right in enumerate("adce"):
        if str(answers[number]).strip().lower() != right:
            raise Failed(sentences(reports)[str(number + 1)])
    return "an error without its L0, a share without nats, rarity taken for death, a shared start"


def _paired(a: list[float], b: list[float], t: float, spread: Any = stdev, power: float = 0.5) -> tuple[float, float]:
    each = [p - q for p, q in zip(a, b, strict=True)]
    return fmean(each), t * spread(each) / len(each) ** power


@exercise("7.7", "an interval over seeds")
def interval(paired_interval: Any) -> str:
    """sign: The difference is a less b: yours is b less a.
    unpaired: You treat the two lists as unrelated. Seed by seed they saw the same data in the same order: take the
        difference of each pair first, then mean and spread of those.
    root: The spread of one seed is not the uncertainty of the mean of n: divide by the square root of n.
    less: The standard deviation of so few is estimated with n - 1 below the line.
    plain: You leave out t, which makes up for how little three seeds say about their own spread.
    """
    slips = sentences(
        interval,
        sign=lambda a, b, t: _paired(b, a, t),
        unpaired=lambda a, b, t: (fmean(a) - fmean(b), t * ((variance(a) + variance(b)) / len(a)) ** 0.5),
        root=lambda a, b, t: _paired(a, b, t, power=0),
        less=lambda a, b, t: _paired(a, b, t, pstdev),
        plain=lambda a, b, t: _paired(a, b, 1.0),
    )
    cases = [Case("three seeds", ([3.0, 5.0, 4.0], [2.5, 4.0, 4.0], 4.3)), Case("two", ([0.2, 0.4], [0.3, 0.9], 12.7))]
    return try_cases(paired_interval, _paired, cases, slips)


@exercise("7.8", "sparse but wrong", kind="predict", core=False)
def wrong(answer: Any) -> str:
    """a: Perfect directions, and yet: six of eleven are missing from each token. Can another direction stand for two?
    c: They would tie if training found the features. At k = 5 it is paid for something else.
    d: At k = 5 it has seen as many tokens as at k = 11, and its loss has settled: this is no lack of training.
    """
    return choose(answer, "b", sentences(wrong), "at too small a k the error itself asks for mixtures")
