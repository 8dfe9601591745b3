"""Checks of lesson 05: JumpReLU.

What a check says to a known slip, or to a wrong letter, stands in a docstring, under the name by which `sentences`
finds the function that makes the slip.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, choose, exercise, like, measure, sentences, try_cases
from tutorial_sae.runtime import generator


def _random(seed: int, tokens: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, pre-activations (some negative), bars."""
    order = generator(seed, "nb05")
    g, pi = torch.randn(2, tokens, latents, generator=order)
    return g, 2 * pi + 0.5, 0.3 + torch.rand(latents, generator=order)


def _jump(pi: Tensor, theta: Tensor) -> Tensor:
    return torch.tensor([[p * (p > t) for p, t in zip(row, theta.tolist(), strict=True)] for row in pi.tolist()])


@exercise("5.1", "the jump")
def jump(jumprelu: Any) -> str:
    """toll: You subtract the bar from what is kept: that is L1's toll again. JumpReLU leaves it unchanged.
    equal: You keep entries that equal their bar: the cut is strict, pi > theta.
    tokens: You compare each token with a bar of its own: bars belong to latents, the columns.
    mask: You return where entries are kept: return their values.
    relu: You keep all that is positive: the bars are not used.
    """
    slips = sentences(
        jump,
        toll=lambda pi, t: (pi - t).relu(),
        equal=lambda pi, t: torch.where(pi >= t, pi, 0),
        tokens=lambda pi, t: torch.where(pi > t[:, None], pi, 0),
        mask=lambda pi, t: (pi > t).float(),
        relu=lambda pi, t: pi.relu(),
    )
    small, bars = torch.tensor([[0.9, 0.3, -0.5], [0.4, 2.0, 0.7], [-1.0, 0.6, 0.6]]), torch.tensor([0.5, 1.0, 0.6])
    cases = [Case("two tokens", (small[:2], bars)), Case("on the bar", (small, bars))]
    cases += [Case("one token", _random(1, 1, 6)[1:]), Case("as many tokens as latents", _random(2, 4, 4)[1:])]
    return try_cases(jumprelu, _jump, cases, slips)


@exercise("5.2", "a very small step", kind="predict")
def small_step(answer: Any) -> str:
    """a: The tokens are many, and hardly ever does one of them lie in a stretch of a ten-millionth.
    c: That is the noise of a mean to which every token brings a little. Here only tokens between the two bars do.
    d: Nearly: but now and then a token lies between the two bars, and its loss jumps.
    """
    return choose(answer, "b", sentences(small_step), "no token, or one that counts a hundred times too much")


def _window(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> Tensor:
    """The sum of g over the tokens in each latent's window, entry by entry."""
    total = [0.0] * len(theta)
    for gs, ps in zip(g.tolist(), pi.tolist(), strict=True):
        total = [s + a * (abs(p - t) < width / 2) for s, a, p, t in zip(total, gs, ps, theta.tolist(), strict=True)]
    return torch.tensor(total)


def _estimator(f: Any, right: Any, wrong: Any, bar: str) -> str:
    """Try `f`, which should give right(theta, width) times the sum of g over the window; wrong has `bar` for its slip.

    upper: Half of your window is covered: it holds no entry below the bar, where the latent is off. Put the window
        around pi, before the jump.
    relu: You cut pi off at 0: a window may reach below 0, and there pi is what it is.
    lower: Half of your window is covered: entries above the bar belong to it too.
    sign: The sign is wrong: a higher bar switches latents off, so there is a minus in front.
    width: The factor 1 / bandwidth is missing: the number in the window is a density only when divided by its width.
    wide: Your window is twice as wide as it should be: half of the bandwidth to each side of the bar.
    all: You add up all tokens: only those in the window count.
    edge: Entries exactly at the edge of the window are outside: < and not <=.
    mean: You divide by the number of tokens: that mean is in g already, so add up.
    pi: You multiply by pi where the formula has theta.
    ones: You leave out g, the gradient that comes in: the chain rule wants it as a factor.
    """
    slips = sentences(
        _estimator,
        relu=lambda g, p, t, w: right(t, w) * _window(g, p.relu(), t, w),
        upper=lambda g, p, t, w: right(t, w) * _window(g, _jump(p, t), t, w),
        lower=lambda g, p, t, w: right(t, w) * _window(g * (p <= t), p, t, w),
        sign=lambda g, p, t, w: -right(t, w) * _window(g, p, t, w),
        width=lambda g, p, t, w: w * right(t, w) * _window(g, p, t, w),
        wide=lambda g, p, t, w: right(t, w) * _window(g, p, t, 2 * w),
        all=lambda g, p, t, w: right(t, w) * g.sum(0),
        edge=lambda g, p, t, w: right(t, w) * _window(g, p, t, w + 1e-5),
        mean=lambda g, p, t, w: right(t, w) * _window(g, p, t, w) / len(g),
        pi=lambda g, p, t, w: right(t, w) / t * _window(g * p, p, t, w),
        ones=lambda g, p, t, w: right(t, w) * _window(torch.ones_like(g), p, t, w),
    )
    slips[bar] = lambda g, p, t, w: wrong(t, w) * _window(g, p, t, w)
    g, pi, one = torch.tensor([[1.0], [-2.5], [2.0], [0.7]]), torch.tensor([[1.4], [0.9], [0.3], [2.9]]), torch.ones(1)
    edges = torch.tensor([[0.75], [1.25], [1.0], [1.4]])
    cases = [Case("one latent", (g, pi, 1.1 * one, 1.0)), Case("the edges", (g, edges, one, 0.5))]
    cases += [Case("three latents", (*_random(3, 8, 3), 0.8)), Case("many tokens", (*_random(4, 200, 7), 0.25))]
    cases += [Case("a window that reaches below 0", (*_random(5, 20, 3), 3.0))]
    return try_cases(f, lambda g, p, t, w: right(t, w) * _window(g, p, t, w), cases, slips)


@exercise("5.3", "the first estimator")
def first_estimator(theta_gradient: Any) -> str:
    said = "The factor theta is missing: what jumps at the bar is a latent of size theta."
    return _estimator(theta_gradient, lambda t, w: -t / w, lambda t, w: -torch.ones_like(t) / w, said)


@exercise("5.4", "the second estimator")
def second_estimator(step: Any) -> str:
    """equal: An entry that equals its bar is off: the step is 1 where pi > theta, strictly.
    values: You return values: the step is 1 where pi > theta, whatever pi is.
    """

    def through(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> tuple[Tensor, ...]:
        pi, theta = pi.clone().requires_grad_(), theta.clone().requires_grad_()
        value = step.apply(pi, theta, width)
        like(value, g, "what forward gives")
        (value * g).sum().backward()
        return value.detach(), *(a.new_zeros(a.shape) if a.grad is None else a.grad for a in (theta, pi))

    slips = sentences(second_estimator, equal=lambda g, p, t, w: 1.0 * (p >= t), values=lambda g, p, t, w: _jump(p, t))
    some, bars = torch.tensor([[0.25, 2.0], [1.0, 0.75], [-1.0, 3.0]]), torch.tensor([0.5, 0.75])
    case = Case("the value", (torch.ones(3, 2), some, bars, 1.0))
    try_cases(lambda *a: through(*a)[0], lambda g, p, t, w: (_jump(p, t) > 0).float(), [case], slips)
    said = "A factor theta has no place here: a count jumps by 1, whatever the bar is."
    tried = _estimator(lambda *a: through(*a)[1], lambda t, w: -torch.ones_like(t) / w, lambda t, w: -t / w, said)
    if through(*case.args)[2].any():
        raise Failed("you give pi a gradient too: give None for it, so that the price moves bars and nothing else.")
    return f"the value; the gradient of theta: {tried}; none for pi"


@exercise("5.5", "sick runs", kind="diagnose")
def sick_runs(factor: Any, rounded: Any, copied: Any, covered: Any) -> str:
    """square: That is d. Which of the two is d times as long: x, or its square? Bars lie on the axis of x.
    upside: The wrong way round: where each coordinate has mean square 1, x is longer, and so are bars and windows.
    rounded: Bars that round away do not move at all: where are they still together, exactly where they started?
    copied: Bars that start at 0.001 keep next to nothing out: where are hundreds of latents on?
    covered: Half a window makes the price smaller, and nothing else: whose bars went down, to where a smaller price
        wants them?
    """
    said, told = sentences(sick_runs), ((rounded, "R", "rounded"), (copied, "S", "copied"), (covered, "Q", "covered"))
    measure(factor, 24.0, 0.1, {said["square"]: 576.0, said["upside"]: 1 / 24})
    for answer, right, name in told:
        choose(answer, right.lower(), {letter: said[name] for letter in "pqrst" if letter != right.lower()}, "")
    return "a factor of 24, and three faults found"


def _next(runs: Any, target: float, secant: bool = True, log: Any = math.log, exp: Any = math.exp) -> float:
    c, d = map(log, runs[-1])
    a, b = map(log, runs[-2]) if secant and len(runs) > 1 else (c - 1, d + 1)
    return exp(c + (log(target) - d) * (c - a) / (d - b))


@exercise("5.6", "the next coefficient")
def next_coefficient(next_run: Any) -> str:
    """plain: You draw the line through coefficients and L0s as they are: take logarithms of both.
    first: You draw the line through the first two runs: the last two are nearest to the target.
    once: Every time you suppose 1 / coefficient: from the second run on, the last two runs tell the slope.
    back: The wrong way: an L0 above the target calls for a higher price.
    log: That is the logarithm of the coefficient: take its exponential.
    """
    slips = sentences(
        next_coefficient,
        plain=lambda r, t: _next(r, t, log=float, exp=float),
        first=lambda r, t: _next(r[:2], t),
        once=lambda r, t: _next(r, t, secant=False),
        back=lambda r, t: r[-1][0] ** 2 / _next(r, t),
        log=lambda r, t: math.log(_next(r, t)),
    )
    runs = [(1.0, 80.0), (2.5, 20.0), (1.6, 37.0), (1.9, 30.0)]
    cases = [Case(f"{n} run{'s' * (n > 1)}", (runs[:n], 32)) for n in (1, 2, 3)] + [
        Case("another target", (runs, 16.0))
    ]
    return try_cases(next_run, _next, cases, slips)
