"""Checks of lesson 06: from a batch to a number.

What a check says to a known slip, or to a wrong letter, stands in its docstring, under the name by which `sentences`
finds the function that makes the slip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, call, choose, exercise, like, sentences, try_cases
from tutorial_sae.runtime import generator
from tutorial_sae.saes import BatchTopKSAE


def _z(seed: int, tokens: int, latents: int) -> Tensor:
    """Pre-activations in which some tokens are worth much more than others, and about half of the entries are 0."""
    order = generator(seed, "nb06")
    return (torch.randn(tokens, latents, generator=order) * (0.2 + torch.rand(tokens, 1, generator=order)) * 2).relu()


def _kept(z: Tensor, k: float, n: int) -> list[list[float]]:
    """What each whole batch of n tokens keeps, largest first; slow and obvious."""
    parts = [z[i : i + n] for i in range(0, len(z) - n + 1, n)]
    return [sorted(p[p > 0].tolist(), reverse=True)[: int(k * n + 1e-6)] for p in parts]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _bars(z: Tensor, k: float, n: int) -> list[float]:
    return [kept[-1] for kept in _kept(z, k, n) if kept]


@exercise("6.1", "the mean of the bars")
def bars(batch_min_mean: Any) -> str:
    """zero: Your smallest entry is 0, which was not kept: take the smallest of the positive entries of the cut matrix.
    all: You average all that is kept: of each batch only the smallest entry kept counts.
    lowest: You take the smallest of all batches together: the mean over batches of each one's smallest is wanted.
    highest: You take the largest of the batches' bars: their mean is wanted.
    pool: You cut all tokens as one batch: that is the pooled cut of 6.2. Cut each batch of n tokens by itself.
    row: You cut each token by itself, as in batches of one: cut the n tokens of a batch together.
    dropped: You take the largest entry that is dropped: the smallest that is kept is meant.
    rest: You count the last, smaller batch too, in which one token weighs more than elsewhere: leave it out.
    empty: You count a batch in which nothing is positive as a bar of 0: it has no bar, so leave it out.
    """
    slips = sentences(
        bars,
        zero=lambda z, k, n: 0.0,
        all=lambda z, k, n: _mean([_mean(kept) for kept in _kept(z, k, n) if kept]),
        lowest=lambda z, k, n: min(_bars(z, k, n)),
        highest=lambda z, k, n: max(_bars(z, k, n)),
        pool=lambda z, k, n: _bars(z, k, len(z))[0],
        row=lambda z, k, n: _mean(_bars(z, k, 1)),
        dropped=lambda z, k, n: _mean([kept[-1] for kept in _kept(z, k + 1 / n, n)]),
        rest=lambda z, k, n: _mean(_bars(z, k, n) + _bars(z[len(z) // n * n :], k, len(z) % n)),
        empty=lambda z, k, n: _mean([kept[-1] if kept else 0.0 for kept in _kept(z, k, n)]),
    )
    cases = [Case("two batches", (_z(1, 4, 5), 1, 2)), Case("k = 2.3", (_z(2, 30, 9), 2.3, 10))]
    cases += [Case("batches of one", (_z(3, 12, 8), 2, 1)), Case("a last, smaller batch", (_z(4, 23, 8), 3, 5))]
    none = _z(5, 12, 6) * (torch.arange(12) > 3)[:, None]
    cases += [Case("a batch without positives", (none, 2, 4)), Case("few positives", (_z(6, 8, 3), 2, 4))]
    return try_cases(batch_min_mean, lambda z, k, n: _mean(_bars(z, k, n)), cases, slips)


@exercise("6.2", "one pool", kind="prove")
def one_pool(pooled_theta: Any) -> str:
    cases = {"values": (_z(11, 4, 6), 2), "k = 0.5 of three tokens": (_z(12, 3, 6), 0.5)}
    cases |= {"k = 2.3": (_z(13, 100, 20), 2.3), "many tokens": (_z(14, 400, 50), 7)}
    cases["a tie at the cut"] = (torch.tensor([[3.0, 2.0, 0.5], [2.0, 2.0, 0.1]]), 1)
    cases["fewer positives than the budget"] = (_z(15, 5, 4), 3)
    for name, (z, k) in cases.items():
        values, theta = sorted(z.flatten().tolist(), reverse=True), like(call(pooled_theta, z, k), 0.0, "θ")
        got, want = (sum(v > bar for v in values) for bar in (theta, values[int(k * len(z) + 1e-6)]))
        if got != want:
            why = "Nothing is above itself: take θ lower." if want - got == 1 else "Sort them all, and count."
            if k == 2.3 and got < want:
                why = "Is your budget floor(2.3 * 100 + 1e-6) = 230? And nothing is above itself."
            raise Failed(f"Above {theta:.4g} lie {got} of {z.numel()} entries, not {want} (tried: {name}). {why}")
    return ", ".join(cases)


def _average(bars: Tensor, decay: float, corrected: bool, power: int = 0, first: int = 0) -> float:
    average = float(bars[0]) * first
    for bar in bars.tolist()[first:]:
        average = decay * average + (1 - decay) * bar
    return average / (1 - decay ** (len(bars) + power)) if corrected else average


@exercise("6.3", "an average with a memory", kind="diagnose")
def memory(moving_average: Any, answer: Any) -> str:
    """a: A bar that is too low keeps too much, not too little. On which side of the bars does an average start at 0?
    c: The spread is that of the bars, which do not change. The average of them does.
    d: After 100 steps the start still weighs .99 ** 100. Work it out.
    swapped: decay and 1 - decay have changed places: the old average keeps the share `decay`.
    first: You start from the first bar: this average starts at 0, as the one in the library does.
    off: The exponent is the number of bars seen, the first included: 1 - decay ** len(bars).
    never: You never correct: where `corrected`, divide in the end by 1 - decay ** len(bars).
    """
    slips = sentences(
        memory,
        swapped=lambda b, d, c: _average(b, 1 - d, False) / (1 - d ** len(b) if c else 1),
        first=lambda b, d, c: _average(b, d, c, first=1),
        off=lambda b, d, c: _average(b, d, c, -1),
        never=lambda b, d, c: _average(b, d, False),
    )
    lists = [(1.0 + torch.rand(n, generator=generator(n, "nb06")), d) for n, d in ((3, 0.5), (40, 0.99), (1, 0.9))]
    cases = [Case(f"decay {d}", (b, d, c)) for b, d in lists for c in (False, True)]
    said = try_cases(moving_average, _average, cases, slips)
    return f"{said}; {choose(answer, 'b', sentences(memory), 'too low, and FVU hides it')}"


@exercise("6.4", "break the mean of the bars", kind="break it")
def too_high(sampler: Any) -> str:
    torch.manual_seed(61)
    one, two = (like(call(sampler, 2048), torch.zeros(2048, 64), "what the sampler gives") for _ in range(2))
    if not torch.isfinite(one).all() or min(one.min(), two.min()) < 0 or torch.equal(one, two):
        raise Failed("pre-activations after a ReLU are finite and never negative, and every call must draw new tokens.")
    one = one[torch.randperm(2048)]
    small, large = (float((two > _mean(_bars(one, 4, n) or [0.0])).sum() / 2048) for n in (1, 512))
    said = f"on fresh tokens θ from batches of one gives L0 {small:.2f}, θ from batches of 512 gives {large:.2f}"
    if abs(large - 4) > 0.4:
        raise Failed(f"{said}: the large batches must find L0 = 4 within a tenth, or it is not the small ones' fault.")
    if small > 3.2:
        way = "the wrong way round: this θ is too low" if small > 4.2 else "no more than 3.2 was wanted"
        raise Failed(f"{said}: {way}. What do the tokens with a high bar have near their bar, and what the others?")
    return said


@exercise("6.5", "the same θ in French", kind="predict")
def in_french(answer: Any) -> str:
    """a: θ fixes the bar, and not how many entries are above it: that is what it was made to let go.
    b: Few latents are *about* French, but the activations are as long as ever, and something has to add up to them.
    d: Not about 32 for either. Think of 04: who got more than k under a common bar, and who less?
    """
    return choose(answer, "c", sentences(in_french), "one bar, and every kind of text its own L0")


class _Leaky(BatchTopKSAE):
    def keep(self, z: Tensor, cut: str) -> Tensor:
        return super().keep(z, "batch")


def _moved(sae: Any, text: Tensor, one: Tensor, other: Tensor, cut: str, rows: int = 0, share: bool = True) -> float:
    a, b = (sae.encode(torch.cat([text, beside]), cut)[: rows or len(text)] > 0 for beside in (one, other))
    return float((a != b).sum() / (a | b if share else torch.ones_like(a)).sum().clamp(min=1))


@exercise("6.6", "the attack again", kind="measure")
def attack_again(share_moved: Any) -> str:
    """neighbours: You compare the codes of the neighbours too: only the first len(text) rows are the text.
    all: You divide by all entries of the matrix: divide by those that are kept beside one company or the other.
    batch: You cut by batch whatever `cut` says: hand it on.
    cut: Nothing moves in yours, and here something must: count the entries that go as well as those that come, hand
        `cut` on (in eval mode the SAE cuts by the threshold unless told otherwise), and encode the text together
        with its neighbours.
    """
    slips = sentences(
        attack_again,
        neighbours=lambda s, t, a, b, cut: _moved(s, t, a, b, cut, len(t) + len(a)),
        all=lambda s, t, a, b, cut: _moved(s, t, a, b, cut, share=False),
        batch=lambda s, t, a, b, cut: _moved(s, t, a, b, "batch"),
        cut=lambda s, t, a, b, cut: _moved(s, t, a, b, "threshold"),
    )
    sae = BatchTopKSAE(8, 24, k=3, seed=6).requires_grad_(False).eval()
    sae.threshold.fill_(0.8)
    leaky = _Leaky(8, 24, k=3, seed=6).requires_grad_(False).eval()
    text, poor, rich = (s * torch.randn(12, 8, generator=generator(int(9 * s), "nb06")) for s in (1, 0.2, 3))
    cases = [Case(f"by {cut}", (sae, text, *pair, cut)) for cut in sae.cuts for pair in ((poor, rich), (rich, poor))]
    cases += [Case("an SAE with a fault, which makes its threshold leak", (leaky, text, poor, rich, "threshold"))]
    return try_cases(share_moved, _moved, cases, slips)
