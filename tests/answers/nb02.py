"""Wrong and right answers to the exercises of lesson 02."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb02 as check


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    return torch.relu((x - b_dec) @ W_enc + b_enc)


def encode_columns(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    columns = [(x - b_dec).matmul(w) + b for w, b in zip(W_enc.unbind(1), b_enc, strict=True)]
    return torch.stack(columns, dim=1).clamp_min(0)


def decode(latents: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return latents @ W_dec + b_dec


def decode_einsum(latents: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return torch.einsum("tm,md->td", latents, W_dec) + b_dec


def in_place(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    x -= b_dec
    return torch.relu(x @ W_enc + b_enc)


def loss(x: Tensor, x_hat: Tensor, latents: Tensor, l1: float, strength: float) -> Tensor:
    return (x - x_hat).square().sum(dim=-1).mean() + strength * l1 * latents.sum(dim=-1).mean()


def loss_by_total(x: Tensor, x_hat: Tensor, latents: Tensor, l1: float, strength: float) -> Tensor:
    return ((x - x_hat).pow(2).sum() + l1 * strength * latents.abs().sum()) / x.shape[0]


def cheated(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, s: float) -> tuple[Tensor, ...]:
    return W_enc / s, b_enc / s, W_dec * s, b_dec


def cheated_half(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, s: float) -> tuple[Tensor, ...]:
    """Another order of the latents cheats as well."""
    new = torch.arange(len(b_enc)).flip(0)
    return W_enc[:, new] / s, b_enc[new] / s, W_dec[new] * s, b_dec


def project(grad: Tensor, W_dec: Tensor) -> Tensor:
    return grad - (grad * W_dec).sum(dim=1, keepdim=True) * W_dec


def project_rows(grad: Tensor, W_dec: Tensor) -> Tensor:
    out = grad.clone()
    for row, w in zip(out, W_dec, strict=True):
        row -= (row @ w) / (w @ w) * w
    return out


def best(a: Tensor, l1: float) -> Tensor:
    return (a - l1 / 2).clamp(min=0)


def best_where(a: Tensor, l1: float) -> Tensor:
    return torch.where(2 * a > l1, a - 0.5 * l1, torch.zeros_like(a))


def gamma(x: Tensor, x_hat: Tensor) -> float:
    c, c_hat = x - x.mean(dim=0), x_hat - x.mean(dim=0)
    return float(c_hat.square().sum() / (c_hat * c).sum())


def gamma_means(x: Tensor, x_hat: Tensor) -> Tensor:
    mean = x.mean(0, keepdim=True)
    return (x_hat - mean).pow(2).sum(-1).mean() / ((x_hat - mean) * (x - mean)).sum(-1).mean()


def values(target: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve(rows @ rows.T, rows @ target)


def values_lstsq(target: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.lstsq(rows.T, target[:, None]).solution.squeeze(1)


def one_factor(target: Tensor, rows: Tensor) -> Tensor:
    values = rows @ target
    guess = values @ rows
    return values * (target @ guess) / (guess @ guess)


def untouched(*_: object) -> Tensor:
    raise NotImplementedError


both, code, price, rows = check.encode_decode, check.four_runs, check.loss, check.projection
ANSWERS: list[Answer] = [
    Answer(both, "right", (encode, decode), None),
    Answer(both, "right, a column at a time", (encode_columns, decode_einsum), None),
    Answer(both, "untouched", (untouched, untouched), "not attempted"),
    Answer(both, "no relu", (lambda x, W, b, c: (x - c) @ W + b, decode), "the relu is missing"),
    Answer(both, "b_dec not taken off", (lambda x, W, b, c: (x @ W + b).relu(), decode), "taken off before"),
    Answer(both, "no b_enc", (lambda x, W, b, c: ((x - c) @ W).relu(), decode), "b_enc is missing"),
    Answer(both, "b_enc after relu", (lambda x, W, b, c: ((x - c) @ W).relu() + b, decode), "has to come before"),
    Answer(both, "in place", (in_place, decode), "changes the tensor"),
    Answer(both, "one token's shape", (lambda x, W, b, c: encode(x, W, b, c)[0], decode), "has shape"),
    Answer(both, "sigmoid", (lambda x, W, b, c: ((x - c) @ W + b).sigmoid(), decode), "values are off"),
    Answer(both, "decode without b_dec", (encode, lambda f, D, c: f @ D), "puts it back"),
    Answer(both, "decode takes b_dec off", (encode, lambda f, D, c: f @ D - c), "taken off once more"),
    Answer(both, "decode with relu", (encode, lambda f, D, c: (f @ D + c).relu()), "values are off"),
    Answer(price, "right", (loss,), None),
    Answer(price, "right, divided at the end", (loss_by_total,), None),
    Answer(price, "untouched", (untouched,), "not attempted"),
    Answer(
        price, "mse over dimensions", (lambda x, y, f, p, s: (x - y).square().mean() + s * p * f.sum(1).mean(),), "d_in"
    ),
    Answer(
        price,
        "penalty over latents",
        (lambda x, y, f, p, s: (x - y).square().sum(1).mean() + s * p * f.mean(),),
        "penalty is summed over latents",
    ),
    Answer(
        price, "both means", (lambda x, y, f, p, s: (x - y).square().mean() + s * p * f.mean(),), "over latents: av"
    ),
    Answer(price, "sum over tokens", (lambda *a: loss(*a) * len(a[0]),), "grows with the batch"),
    Answer(price, "no strength", (lambda x, y, f, p, s: loss(x, y, f, p, 1.0),), "no warm-up"),
    Answer(price, "strength on all", (lambda x, y, f, p, s: s * loss(x, y, f, p, 1.0),), "weakens the whole"),
    Answer(price, "L0", (lambda x, y, f, p, s: loss(x, y, (f > 0).float(), p, s),), "no slope"),
    Answer(price, "L2", (lambda x, y, f, p, s: loss(x, y, f.square(), p, s),), "square the latents"),
    Answer(price, "norm", (lambda x, y, f, p, s: (x - y).norm(dim=1).mean() + s * p * f.sum(1).mean(),), "square it"),
    Answer(price, "a float", (lambda *a: loss(*a).item(),), "must be a tensor"),
    Answer(price, "detached", (lambda *a: loss(*a).detach(),), "has no gradient"),
    Answer(check.cheat, "right", (cheated,), None),
    Answer(check.cheat, "right, latents in another order", (cheated_half,), None),
    Answer(check.cheat, "untouched", (untouched,), "not attempted"),
    Answer(check.cheat, "as it was", (lambda W, b, D, c, s: (W, b, D, c),), "Penalty: "),
    Answer(check.cheat, "bias forgotten", (lambda W, b, D, c, s: (W / s, b, D * s, c),), "b_enc must shrink"),
    Answer(check.cheat, "decoder forgotten", (lambda W, b, D, c, s: (W / s, b / s, D, c),), "lengthen W_dec"),
    Answer(check.cheat, "encoder forgotten", (lambda W, b, D, c, s: (W, b, D * s, c),), "as they were"),
    Answer(check.cheat, "the wrong way", (lambda W, b, D, c, s: (W * s, b * s, D / s, c),), "wrong way round"),
    Answer(check.cheat, "b_dec too", (lambda W, b, D, c, s: (W / s, b / s, D * s, c * s),), "Leave b_dec"),
    Answer(
        check.cheat, "all zero", (lambda W, b, D, c, s: (0 * W, 0 * b, D, c),), "Reconstructions: The values are off"
    ),
    Answer(check.cheat, "two things", (lambda W, b, D, c, s: (W / s, D * s),), "must be 4 things"),
    Answer(rows, "right", (project,), None),
    Answer(rows, "right, a row at a time", (project_rows,), None),
    Answer(rows, "untouched", (untouched,), "not attempted"),
    Answer(rows, "the part along", (lambda g, W: g - project(g, W),), "part to remove"),
    Answer(rows, "added", (lambda g, W: 2 * g - project(g, W),), "subtract it"),
    Answer(rows, "whole matrix", (lambda g, W: g - (g * W).sum() * W,), "each row has its own"),
    Answer(rows, "columns", (lambda g, W: g - (g * W).sum(0) * W,), "row of W_dec"),
    Answer(rows, "all rows", (lambda g, W: g - (g @ W.T) @ W,), "only its own"),
    Answer(rows, "a number off each", (lambda g, W: g - (g * W).sum(1, keepdim=True),), "multiply it with the row"),
    Answer(rows, "in place", (lambda g, W: g.sub_((g * W).sum(1, keepdim=True) * W),), "changes the tensor"),
    Answer(code, "right", ("c", "b"), None),
    Answer(code, "right, in brackets", ("(C)", "(b)"), None),
    Answer(code, "untouched", (..., ...), "not attempted"),
    Answer(code, "A cheats", ("a", "b"), "A's latents grow"),
    Answer(code, "B cheats", ("b", "c"), "B has few latents"),
    Answer(code, "D cheats", ("d", "b"), "D's latents are large"),
    Answer(code, "A is cold", ("c", "a"), "A keeps a hundred"),
    Answer(code, "C is cold", ("c", "c"), "C is the cheat"),
    Answer(code, "D is cold", ("c", "d"), "fell further"),
    Answer(code, "no letter", ("e", "b"), "none of the letters"),
    Answer(check.what_l1_gives, "right", ("c",), None),
    Answer(check.what_l1_gives, "untouched", (...,), "not attempted"),
    Answer(check.what_l1_gives, "twice", ("a",), "finds better ones"),
    Answer(check.what_l1_gives, "the same", ("b",), "how many"),
    Answer(check.what_l1_gives, "next to none", ("d",), "no stronger"),
    Answer(check.one_latent, "right", (best,), None),
    Answer(check.one_latent, "right, by cases", (best_where,), None),
    Answer(check.one_latent, "untouched", (untouched,), "not attempted"),
    Answer(check.one_latent, "l1 off", (lambda a, p: (a - p).relu(),), "half of l1"),
    Answer(check.one_latent, "not cut at 0", (lambda a, p: a - p / 2,), "at least 0"),
    Answer(check.one_latent, "relu first", (lambda a, p: a.relu() - p / 2,), "has to come after"),
    Answer(check.one_latent, "in proportion", (lambda a, p: a.relu() / (1 + p),), "in proportion"),
    Answer(check.one_latent, "survivors kept", (lambda a, p: a * (a > p / 2),), "pulls at them"),
    Answer(check.one_latent, "both sides", (lambda a, p: a.sign() * (a.abs() - p / 2).relu(),), "f is at least 0"),
    Answer(check.how_short, "right", (gamma,), None),
    Answer(check.how_short, "right, of means, a tensor", (gamma_means,), None),
    Answer(check.how_short, "untouched", (untouched,), "not attempted"),
    Answer(check.how_short, "not centred", (lambda x, y: float((y * y).sum() / (x * y).sum()),), "Centre first"),
    Answer(check.how_short, "own mean", (lambda x, y: gamma(x, y - y.mean(0) + x.mean(0)),), "from both"),
    Answer(check.how_short, "upside down", (lambda x, y: 1 / gamma(x, y),), "Upside down"),
    Answer(
        check.how_short,
        "mean of ratios",
        (lambda x, y: float(((y - x.mean(0)).square().sum(1) / ((y - x.mean(0)) * (x - x.mean(0))).sum(1)).mean()),),
        "one mean by another",
    ),
    Answer(
        check.how_short,
        "over |x|^2",
        (lambda x, y: (y - x.mean(0)).square().sum() / (x - x.mean(0)).square().sum(),),
        "x_hat . x",
    ),
    Answer(check.how_short, "one a token", (lambda x, y: (x * y).sum(1),), "one number"),
    Answer(check.best_values, "right", (values,), None),
    Answer(check.best_values, "right, by lstsq", (values_lstsq,), None),
    Answer(check.best_values, "untouched", (untouched,), "not attempted"),
    Answer(check.best_values, "inner products", (lambda t, D: D @ t,), "right angles"),
    Answer(check.best_values, "over squared lengths", (lambda t, D: D @ t / D.square().sum(1),), "right angles"),
    Answer(check.best_values, "cut at 0", (lambda t, D: values(t, D).relu(),), "may be negative"),
    Answer(
        check.best_values,
        "one factor",
        (one_factor,),
        "has its own",
    ),
    Answer(check.best_values, "the reconstruction", (lambda t, D: values(t, D) @ D,), "has shape"),
]
