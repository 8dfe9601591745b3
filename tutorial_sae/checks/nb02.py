"""Checks of lesson 02: the vanilla SAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, call, choose, exercise, like, try_cases
from tutorial_sae.runtime import generator

# fmt: off
# A slip stands on one line where it can: the sentence, and the function that makes the mistake.
SIZES = [("two tokens", 2, 3, 4), ("ten tokens", 10, 5, 7), ("one token", 1, 4, 6), ("as many of each", 6, 6, 6)]


def _made(i: int) -> tuple[str, list[Tensor]]:
    """(name, [x, W_enc, b_enc, W_dec with rows of length 1, b_dec, latents]) of some size; no bias is 0."""
    name, n, d, m = SIZES[i % 4]
    shapes = [(n, d), (d, m), (m,), (m, d), (d,)]
    x, W, b, D, c = (torch.randn(*shape, generator=generator(i, "nb02", j)) for j, shape in enumerate(shapes))
    return name, [x + c, W, b, D / D.norm(dim=1, keepdim=True), c, _encode(x + c, W, b, c)]


# -- 2.1, 2.2: the SAE and its loss ----------------------------------------------------------------------


def _encode(x: Tensor, W: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One latent of one token at a time."""
    return torch.tensor([[max(0.0, float((t - c) @ W[:, j] + b[j])) for j in range(len(b))] for t in x])


ENCODE = {
    "Your latents can be negative: the relu is missing.": lambda x, W, b, c: (x - c) @ W + b,
    "First b_dec must be taken off before the encoder: (x - b_dec) @ W_enc.": lambda x, W, b, c: (x @ W + b).relu(),
    "The bias b_enc is missing.": lambda x, W, b, c: ((x - c) @ W).relu(),
    "The bias b_enc comes after your relu, and has to come before.": lambda x, W, b, c: ((x - c) @ W).relu() + b,
}
DECODE = {
    "No b_dec: the encoder takes it off, and the decoder puts it back.": lambda f, D, c: f @ D,
    "Your b_dec is taken off once more: the decoder puts it back.": lambda f, D, c: f @ D - c,
}


@exercise("2.1", "encode and decode")
def encode_decode(encode: Any, decode: Any) -> str:
    made = [_made(i) for i in range(4)]
    try_cases(encode, _encode, [Case(f"encode, {n}", (x, W, b, c)) for n, (x, W, b, _, c, _) in made], ENCODE)
    cases = [Case(n, (f, D, c)) for n, (*_, D, c, f) in made]
    return "both ways, " + try_cases(decode, lambda f, D, c: f @ D + c, cases, DECODE)


def _loss(*given: Any, price: Any = Tensor.abs, d: int = 1, m: int = 1) -> Tensor:
    x, y, f, l1, s = given
    costs = [(a - b).square().sum() / d + s * l1 * price(c).sum() / m for a, b, c in zip(x, y, f, strict=True)]
    return torch.stack(costs).mean()


LOSS = {
    "The squared error is summed over d_in, and averaged over tokens alone.": lambda *a: _loss(*a, d=len(a[0][0])),
    "The penalty is summed over latents, and averaged over tokens alone.": lambda *a: _loss(*a, m=len(a[2][0])),
    "Sum over d_in and over latents: average over tokens alone.": lambda *a: _loss(*a, d=len(a[0][0]), m=len(a[2][0])),
    "You sum over tokens: take the mean, or the loss grows with the batch.": lambda *a: _loss(*a) * len(a[0]),
    "That is the length of the error: square it.": lambda x, y, *a: _loss(x, x, *a) + (x - y).norm(dim=1).mean(),
    "Your `strength` is missing: the penalty has no warm-up.": lambda *a: _loss(*a[:4], 1.0),
    "Your `strength` weakens the whole loss: only the penalty warms up.": lambda *a: a[4] * _loss(*a[:4], 1.0),
    "You count latents, and a count has no slope: add up values.": lambda *a: _loss(*a, price=lambda f: (f > 0) * 1.0),
    "You square the latents: that makes small values, hardly ever 0.": lambda *a: _loss(*a, price=Tensor.square),
}


@exercise("2.2", "the loss")
def loss(sae_loss: Any) -> str:
    made = [(name, (x, f @ D + c, f, 1.5)) for name, (x, _, _, D, c, f) in map(_made, range(10, 14))]
    said = try_cases(sae_loss, _loss, [Case(name, (*args, s)) for name, args in made for s in (1.0, 0.3)], LOSS)
    x, x_hat, f, l1 = made[0][1]
    if not getattr(sae_loss(x, x_hat, f.requires_grad_(), l1, 1.0), "requires_grad", False):
        raise Failed("the value is right, but has no gradient: return the tensor, without `.item()`, float or detach.")
    return said + ", two strengths, a gradient"


# -- 2.3, 2.4: the decoder's length ----------------------------------------------------------------------

CHEAT = {
    "The bias b_enc must shrink with W_enc: the relu cuts their sum.": lambda W, b, D, c, s: (W / s, b, D * s, c),
    "Smaller latents, and nothing makes up for them: lengthen W_dec.": lambda W, b, D, c, s: (W / s, b / s, D, c),
    "The latents are as they were: shrink what the encoder gives.": lambda W, b, D, c, s: (W, b, D * s, c),
    "Leave b_dec as it was: no latent reaches it.": lambda W, b, D, c, s: (W / s, b / s, D * s, c * s),
    "The wrong way round: latents and penalty grow.": lambda W, b, D, c, s: (W * s, b * s, D / s, c),
}


@exercise("2.3", "cheat the penalty", kind="break it")
def cheat(cheated: Any) -> str:
    x, *weights, _ = _made(21)[1]

    def outcome(change: Any) -> Any:
        def tried(*given: Any) -> tuple[Tensor, float]:
            W, b, D, c = like(call(change, *given), given[:4])
            f = ((x - c) @ W + b).relu()
            return f @ D + c, float(f.sum(1).mean())

        return tried

    right, slips = outcome(lambda W, b, D, c, s: (W / s, b / s, D * s, c)), {k: outcome(v) for k, v in CHEAT.items()}
    cases = [Case(f"s = {s:g}", (*weights, s)) for s in (2.0, 10.0)]
    try:
        said = try_cases(outcome(cheated), right, cases, slips)
    except Failed as failure:
        raise Failed(str(failure).replace("Part 1", "Reconstructions").replace("Part 2", "Penalty")) from None
    return "the same reconstructions, a penalty s times smaller: " + said


def _project(grad: Tensor, W: Tensor) -> Tensor:
    return torch.stack([g - float(g @ w) * w for g, w in zip(grad, W, strict=True)])


PROJECT = {
    "You keep the part along the row, which is the part to remove.": lambda g, W: g - _project(g, W),
    "You add the part along the row: subtract it.": lambda g, W: 2 * g - _project(g, W),
    "You take one product for the whole matrix: each row has its own.": lambda g, W: g - (g * W).sum() * W,
    "You project along columns: a latent's direction is a row of W_dec.": lambda g, W: g - (g * W).sum(0) * W,
    "You remove parts along all rows: from each gradient only its own.": lambda g, W: g - (g @ W.T) @ W,
    "You subtract a number from each entry: multiply it with the row.": lambda g, W: g - (g * W).sum(1)[:, None],
}


@exercise("2.4", "project the gradient")
def projection(project: Any) -> str:
    rows = [_made(i)[1][3] for i in (30, 31)]
    cases = [Case(f"{len(W)} rows", (torch.randn(W.shape, generator=generator(len(W), "grad")), W)) for W in rows]
    return try_cases(project, _project, [*cases, Case("a gradient along its rows", (3 * rows[0], rows[0]))], PROJECT)


# -- 2.5, 2.6: curves and coefficients -------------------------------------------------------------------


@exercise("2.5", "four runs", kind="diagnose")
def four_runs(cheats: Any, cold: Any) -> str:
    wrong = {"a": "A's latents grow as it learns.", "b": "B has few latents: no cheat.", "d": "D's latents are large."}
    said = choose(cheats, "c", wrong, "C has more latents than A, and half as large")
    wrong = {"a": "A keeps a hundred at the end of the warm-up.", "c": "C is the cheat.", "d": "Another fell further."}
    return f"{said}; {choose(cold, 'b', wrong, 'B was cut down before its latents had found a direction')}"


@exercise("2.6", "what an l1 gives", kind="predict")
def what_l1_gives(answer: Any) -> str:
    wrong = {"a": "There are more to choose from, but each token then finds better ones, and needs fewer.",
             "b": "Nothing in the loss says how many. As the directions get better, fewer are needed.",
             "d": "Not so few: the penalty is no stronger than it was."}
    return choose(answer, "c", wrong, "an l1 belongs to its width, its data and its length of training")


# -- 2.7, 2.8, 2.9: values -------------------------------------------------------------------------------


def _best(a: Tensor, l1: float) -> Tensor:
    """Try all values from 0 to 10, in steps of 0.0001."""
    f = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    return torch.stack([f[((v - f) ** 2 + l1 * f).argmin()] for v in a.double()]).float()


BEST = {
    "The derivative of (a - f)^2 is -2 (a - f): half of l1 comes off, not l1.": lambda a, l1: (a - l1).relu(),
    "Below l1 / 2 you go negative: a latent is at least 0.": lambda a, l1: a - l1 / 2,
    "The relu comes before l1 / 2 is taken off, and has to come after.": lambda a, l1: a.relu() - l1 / 2,
    "A penalty on f^2 shrinks in proportion, one on f takes the same off each.": lambda a, l1: a.relu() / (1 + l1),
    "You keep the survivors as they are: the penalty pulls at them too.": lambda a, l1: a * (a > l1 / 2),
    "A negative a has a negative f here: f is at least 0.": lambda a, l1: a.sign() * (a.abs() - l1 / 2).relu(),
}


@exercise("2.7", "one latent, by hand", kind="prove")
def one_latent(best_value: Any) -> str:
    a = torch.tensor([3.0, 1.0, 0.4, 0.0, -1.0, -2.5, 7.25])
    cases = [Case(f"l1 = {l1:g}", (a, l1)) for l1 in (2.0, 0.5, 0.0)]
    return "large, small, negative; " + try_cases(best_value, _best, cases, BEST, tol=2e-4)


def _gamma(x: Tensor, y: Tensor, centre: bool = True, own: bool = False, each: bool = False) -> float:
    mean = x.mean(0) * centre
    y = y - (y.mean(0) if own else mean)
    pairs = [(float(b @ b), float(b @ a)) for a, b in zip(x - mean, y, strict=True)]
    return sum(u / v for u, v in pairs) / len(x) if each else sum(u for u, _ in pairs) / sum(v for _, v in pairs)


GAMMA = {
    "Centre first: the long mean, which every SAE gets right, hides the rest.": lambda x, y: _gamma(x, y, False),
    "You centre x_hat on its own mean: take the mean of x from both.": lambda x, y: _gamma(x, y, own=True),
    "Upside down: E|x_hat|^2 stands above.": lambda x, y: 1 / _gamma(x, y),
    "You average a ratio for each token: divide one mean by another.": lambda x, y: _gamma(x, y, each=True),
    "Divide by E[x_hat . x].": lambda x, y: float((y - x.mean(0)).norm() ** 2 / (x - x.mean(0)).norm() ** 2),
}


@exercise("2.8", "how much too short?", kind="measure")
def how_short(gamma: Any) -> str:
    made = [torch.randn(n, d, generator=generator(n, "x")) + 3 for n, d in ((3, 2), (20, 6))]
    cases = [Case(f"{len(x)} tokens", (x, 3.2 + 0.7 * (x - 3) + 0.3 * x.flip(1).cos())) for x in made]
    return try_cases(gamma, _gamma, [*cases, Case("a perfect SAE", (made[1], made[1]))], GAMMA, tol=1e-3)


def _values(t: Tensor, D: Tensor) -> Tensor:
    return torch.linalg.pinv(D.double().T).float() @ t


VALUES = {
    "Inner products with the rows: right only for rows at right angles.": lambda t, D: D @ t,
    "You cut negative values off: refitted values may be negative.": lambda t, D: _values(t, D).relu(),
    "One factor for all: each latent has its own.": lambda t, D: D @ t * (t @ (h := D.T @ D @ t)) / (h @ h),
}


@exercise("2.9", "the best values", core=False)
def best_values(refitted: Any) -> str:
    small, large = _made(50)[1], _made(51)[1]
    cases = [Case(f"{n} latents", (w[0][0], w[3][:n])) for n, w in ((1, small), (2, small), (4, large))]
    return try_cases(refitted, _values, cases, VALUES, tol=1e-3)
# fmt: on
