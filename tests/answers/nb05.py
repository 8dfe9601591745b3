"""Answers to lesson 05."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb05 as check
from tutorial_sae.saes.jumprelu import Step


def untouched(*_: Any) -> Any:
    raise NotImplementedError


# -- 5.1 -------------------------------------------------------------------------------------------------


def jump_loop(pi: Tensor, theta: Tensor) -> Tensor:
    out = torch.zeros_like(pi)
    for t in range(pi.shape[0]):
        for j in range(pi.shape[1]):
            if pi[t, j] > theta[j]:
                out[t, j] = pi[t, j]
    return out


def jump_in_place(pi: Tensor, theta: Tensor) -> Tensor:
    pi[pi <= theta] = 0
    return pi


JUMP = [
    Answer(check.jump, "stub", (untouched,), "not attempted"),
    Answer(check.jump, "where", (lambda pi, t: torch.where(pi > t, pi, 0),), None),
    Answer(check.jump, "a product with a mask", (lambda pi, t: pi * (pi > t),), None),
    Answer(check.jump, "a loop", (jump_loop,), None),
    Answer(check.jump, "subtracts the bar", (lambda pi, t: (pi - t).relu(),), "L1's toll again"),
    Answer(check.jump, ">=", (lambda pi, t: pi * (pi >= t),), "the cut is strict"),
    Answer(
        check.jump, "a bar for each token", (lambda pi, t: torch.where(pi > t[:, None], pi, 0),), "belong to latents"
    ),
    Answer(check.jump, "a bar for each token, where it fits", (lambda pi, t: square(pi, t),), "belong to latents"),
    Answer(check.jump, "the mask as floats", (lambda pi, t: (pi > t).float(),), "return their values"),
    Answer(check.jump, "the mask", (lambda pi, t: pi > t,), "dtype"),
    Answer(check.jump, "no bars", (lambda pi, t: pi.relu(),), "the bars are not used"),
    Answer(check.jump, "one bar for all", (lambda pi, t: torch.where(pi > t.mean(), pi, 0),), "is right"),
    Answer(check.jump, "works in place", (jump_in_place,), "changes the tensor"),
    Answer(check.jump, "no return", (lambda pi, t: None,), "is a `return` missing"),
]


def square(pi: Tensor, t: Tensor) -> Tensor:
    return torch.where(pi > (t[:, None] if len(pi) == len(t) else t), pi, 0)


# -- questions -------------------------------------------------------------------------------------------

SICK = (24.0, "r", "s", "q")
QUESTIONS = [
    Answer(check.small_step, "untouched", (...,), "not attempted"),
    Answer(check.small_step, "right", ("b",), None),
    Answer(check.small_step, "right, in brackets", (" (B)",), None),
    Answer(check.small_step, "the true slope", ("a",), "hardly ever does one"),
    Answer(check.small_step, "noise as of a mean", ("c",), "brings a little"),
    Answer(check.small_step, "always 0", ("d",), "now and then"),
    Answer(check.small_step, "no such letter", ("e",), "none of the letters"),
]

# -- 5.3 -------------------------------------------------------------------------------------------------


def first(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> Tensor:
    return (-(theta / width) * ((pi - theta).abs() < width / 2) * g).sum(dim=0)


def first_by_sides(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> Tensor:
    near = (pi > theta - width / 2) & (pi < theta + width / 2)
    return torch.where(near, g, 0).sum(0) * theta / -width


def first_loop(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> Tensor:
    out = torch.zeros(len(theta))
    for t, j in (pi * 0 == 0).nonzero().tolist():
        u = (pi[t, j] - theta[j]) / width
        if -0.5 < u < 0.5:
            out[j] -= theta[j] / width * g[t, j]
    return out


def first_with(near: Any = None, factor: Any = None, g_of: Any = None) -> Any:
    near = near or (lambda pi, t, w: (pi - t).abs() < w / 2)
    factor = factor or (lambda pi, t, w: -t / w)
    return lambda g, pi, t, w: (factor(pi, t, w) * near(pi, t, w) * (g_of(g) if g_of else g)).sum(0)


def after_jump(pi: Tensor, t: Tensor) -> Tensor:
    return torch.where(pi > t, pi, 0)


def upper(pi: Tensor, t: Tensor, w: float) -> Tensor:
    return (after_jump(pi, t) - t).abs() < w / 2


def lower(pi: Tensor, t: Tensor, w: float) -> Tensor:
    return (pi <= t) & ((pi - t).abs() < w / 2)


FIRST = [
    Answer(check.first_estimator, "stub", (untouched,), "not attempted"),
    Answer(check.first_estimator, "a mask", (first,), None),
    Answer(check.first_estimator, "two comparisons", (first_by_sides,), None),
    Answer(check.first_estimator, "a loop", (first_loop,), None),
    Answer(check.first_estimator, "around the latents", (first_with(near=upper),), "before the jump"),
    Answer(check.first_estimator, "a relu first", (lambda g, p, t, w: first(g, p.relu(), t, w),), "cut pi off at 0"),
    Answer(check.first_estimator, "only what is off", (first_with(near=lower),), "above the bar belong"),
    Answer(
        check.first_estimator,
        "epsilon to each side",
        (first_with(near=lambda pi, t, w: (pi - t).abs() < w),),
        "twice as wide",
    ),
    Answer(
        check.first_estimator,
        "edges inside",
        (first_with(near=lambda pi, t, w: (pi - t).abs() <= w / 2),),
        "< and not <=",
    ),
    Answer(check.first_estimator, "no window", (first_with(near=lambda pi, t, w: 1),), "only those in the window"),
    Answer(check.first_estimator, "no theta", (first_with(factor=lambda pi, t, w: -1 / w),), "factor theta is missing"),
    Answer(check.first_estimator, "no width", (first_with(factor=lambda pi, t, w: -t),), "1 / bandwidth is missing"),
    Answer(check.first_estimator, "no minus", (first_with(factor=lambda pi, t, w: t / w),), "The sign is wrong"),
    Answer(check.first_estimator, "pi for theta", (first_with(factor=lambda pi, t, w: -pi / w),), "multiply by pi"),
    Answer(check.first_estimator, "no g", (first_with(g_of=torch.ones_like),), "leave out g"),
    Answer(
        check.first_estimator,
        "mean over tokens",
        (lambda g, pi, t, w: first(g, pi, t, w) / len(g),),
        "divide by the number of tokens",
    ),
    Answer(
        check.first_estimator,
        "not added up",
        (lambda g, pi, t, w: -(t / w) * ((pi - t).abs() < w / 2) * g,),
        "has shape",
    ),
    Answer(
        check.first_estimator,
        "one number",
        (lambda g, pi, t, w: (-(t / w) * ((pi - t).abs() < w / 2) * g).sum(),),
        "has shape",
    ),
]

# -- 5.4 -------------------------------------------------------------------------------------------------


def step(
    backward: Any = None,
    value: Any = lambda pi, t: (pi > t).float(),
    saved: Any = lambda pi, t: pi,
) -> Any:
    """A step with this value; `backward(g, pi, theta, width)` gives its gradients for pi and theta."""

    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
            ctx.save_for_backward(saved(pi, theta), theta)
            ctx.width = bandwidth
            return value(pi, theta)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
            if backward is None:
                raise NotImplementedError
            return *backward(g, *ctx.saved_tensors, ctx.width), None

    return Mine


def second(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> tuple[None, Tensor]:
    return None, -(1 / width) * ((pi - theta).abs() < width / 2) * g


def second_zeros(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
    near = ((pi - theta) / width > -0.5) & ((pi - theta) / width < 0.5)
    return torch.zeros_like(pi), -torch.where(near, g, 0).sum(dim=0) / width


def second_with(**parts: Any) -> Any:
    made = first_with(**({"factor": lambda pi, t, w: -1 / w} | parts))
    return lambda g, pi, t, w: (None, made(g, pi, t, w))


def both(g: Tensor, pi: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
    slope = ((pi - theta).abs() < width / 2) * g / width
    return slope, -slope


def one_short() -> Any:
    class Mine(Step):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return Step.backward(ctx, *grads)[:2]

    return Mine


SECOND = [
    Answer(check.second_estimator, "stub", (step(value=untouched),), "not attempted"),
    Answer(check.second_estimator, "backward untouched", (step(),), "not attempted"),
    Answer(check.second_estimator, "the package's own", (Step,), None),
    Answer(check.second_estimator, "not added up: PyTorch does it", (step(second),), None),
    Answer(check.second_estimator, "zeros for pi", (step(second_zeros),), None),
    Answer(check.second_estimator, "saves latents", (step(second, saved=after_jump),), "before the jump"),
    Answer(check.second_estimator, "upper half", (step(second_with(near=upper)),), "before the jump"),
    Answer(check.second_estimator, "lower half", (step(second_with(near=lower)),), "above the bar belong"),
    Answer(
        check.second_estimator,
        "factor theta",
        (step(second_with(factor=lambda pi, t, w: -t / w)),),
        "factor theta has no place",
    ),
    Answer(
        check.second_estimator,
        "no width",
        (step(second_with(factor=lambda pi, t, w: -1)),),
        "1 / bandwidth is missing",
    ),
    Answer(
        check.second_estimator,
        "no minus",
        (step(second_with(factor=lambda pi, t, w: 1 / w)),),
        "The sign is wrong",
    ),
    Answer(
        check.second_estimator,
        "epsilon to each side",
        (step(second_with(near=lambda pi, t, w: (pi - t).abs() < w)),),
        "twice as wide",
    ),
    Answer(check.second_estimator, "no g", (step(second_with(g_of=torch.ones_like)),), "leave out g"),
    Answer(check.second_estimator, "a gradient for pi", (step(both),), "give pi a gradient"),
    Answer(check.second_estimator, "no gradient at all", (step(lambda g, p, t, w: (None, None)),), "is right"),
    Answer(check.second_estimator, "mean over tokens", (step(second_with(g_of=lambda g: g / len(g))),), "in g already"),
    Answer(check.second_estimator, "values", (step(second, value=after_jump),), "You return values"),
    Answer(
        check.second_estimator, ">=", (step(second, value=lambda pi, t: (pi >= t).float()),), "equals its bar is off"
    ),
    Answer(check.second_estimator, "booleans", (step(second, value=lambda pi, t: pi > t),), "dtype"),
    Answer(check.second_estimator, "the count", (step(second, value=lambda p, t: (p > t).float().sum()),), "has shape"),
    Answer(check.second_estimator, "one gradient too few", (one_short(),), "raised RuntimeError"),
    Answer(check.second_estimator, "no class", (lambda pi, t, w: (pi > t).float(),), "has no attribute 'apply'"),
]

# -- 5.5 -------------------------------------------------------------------------------------------------

SICK_RUNS = [
    Answer(check.sick_runs, "number untouched", (..., "r", "s", "q"), "not attempted"),
    Answer(check.sick_runs, "a letter untouched", (24.0, "r", ..., "q"), "not attempted"),
    Answer(check.sick_runs, "right", SICK, None),
    Answer(check.sick_runs, "right, an expression and capitals", (math.sqrt(576), "R", "S", " (Q)"), None),
    Answer(check.sick_runs, "d", (576, *SICK[1:]), "That is d"),
    Answer(check.sick_runs, "1 / sqrt(d)", (1 / 24, *SICK[1:]), "wrong way round"),
    Answer(check.sick_runs, "something else", (1000.0, *SICK[1:]), "not what this measures to"),
    Answer(check.sick_runs, "rounded: the healthy one", (24, "p", "s", "q"), "do not move at all"),
    Answer(check.sick_runs, "copied: the rounded one", (24, "r", "r", "q"), "hundreds of latents"),
    Answer(check.sick_runs, "covered: half of it", (24, "r", "s", "t"), "whose bars went down"),
    Answer(check.sick_runs, "no such letter", (24, "r", "s", "z"), "none of the letters"),
]

# -- 5.6 -------------------------------------------------------------------------------------------------


def secant(runs: list[tuple[float, float]], target: float) -> float:
    c, l0 = runs[-1]
    if len(runs) == 1:
        return c * l0 / target
    before, l0_before = runs[-2]
    slope = (math.log(l0) - math.log(l0_before)) / (math.log(c) - math.log(before))
    return math.exp(math.log(c) + (math.log(target) - math.log(l0)) / slope)


def secant_from_before(runs: list[tuple[float, float]], target: float) -> Tensor:
    """Starts from the run before, in base 10 and tensors; a made-up run before the first gives slope -1."""
    c, l0 = torch.tensor([(runs[0][0] / 10, runs[0][1] * 10), *runs][-2:]).double().log10().T
    return 10 ** (c[0] + (math.log10(target) - l0[0]) * (c[1] - c[0]) / (l0[1] - l0[0]))


def secant_plain(runs: list[tuple[float, float]], target: float) -> float:
    if len(runs) == 1:
        return secant(runs, target)
    (a, b), (c, d) = runs[-2:]
    return c + (target - d) * (c - a) / (d - b)


SECANT = [
    Answer(check.next_coefficient, "stub", (untouched,), "not attempted"),
    Answer(check.next_coefficient, "logs", (secant,), None),
    Answer(check.next_coefficient, "base 10, tensors", (secant_from_before,), None),
    Answer(check.next_coefficient, "plain numbers", (secant_plain,), "take logarithms"),
    Answer(check.next_coefficient, "the first two", (lambda r, t: secant(r[:2], t),), "the last two are nearest"),
    Answer(check.next_coefficient, "always 1 / c", (lambda r, t: secant(r[-1:], t),), "Every time"),
    Answer(
        check.next_coefficient, "backwards", (lambda r, t: r[-1][0] ** 2 / secant(r, t),), "calls for a higher price"
    ),
    Answer(check.next_coefficient, "no exp", (lambda r, t: math.log(secant(r, t)),), "its exponential"),
    Answer(check.next_coefficient, "ignores the target", (lambda r, t: secant(r, 32),), "is right"),
    Answer(check.next_coefficient, "a list", (lambda r, t: [secant(r, t)],), "must be one number"),
]

ANSWERS = JUMP + QUESTIONS + FIRST + SECOND + SICK_RUNS + SECANT
