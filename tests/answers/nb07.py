"""Answers to lesson 07."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb07 as check
from tutorial_sae.measures import OTHER_FVU, fvu

Batches = list[tuple[Tensor, Tensor]]


def untouched(*_: Any) -> Any:
    raise NotImplementedError


# -- 7.1 -------------------------------------------------------------------------------------------------


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def fvu_two_passes(batches: Batches) -> Tensor:
    """In float32, the mean first: gives a tensor."""
    centre = sum(x.sum(dim=0) for x, _ in batches) / sum(len(x) for x, _ in batches)
    above, below = torch.zeros(()), torch.zeros(())
    for x, x_hat in batches:
        above += (x - x_hat).pow(2).sum()
        below += (x - centre).pow(2).sum()
    return above / below


def fvu_one_pass(batches: Batches, dtype: torch.dtype = torch.float64) -> float:
    n, total, squares, errors = 0, torch.zeros(6, dtype=dtype), torch.zeros((), dtype=dtype), 0.0
    for x, x_hat in batches:
        n, total, squares = n + len(x), total + x.to(dtype).sum(0), squares + x.to(dtype).square().sum()
        errors += float((x - x_hat).square().sum())
    return errors / float(squares - total.square().sum() / n)


def fvu_numpy(batches: Batches) -> float:
    x, x_hat = (part.double().numpy() for part in joined(batches))
    return float(np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(axis=0)) ** 2))


def fvu_running(batches: Batches) -> float:
    """Sums over batches, each batch measured from its own mean."""
    above = sum(((x - y) ** 2).sum() for x, y in batches)
    return float(above / sum(((x - x.mean(0)) ** 2).sum() for x, _ in batches))


def fvu_all_entries(batches: Batches) -> float:
    """One mean for all dimensions together."""
    x, x_hat = joined(batches)
    return float((x - x_hat).square().sum() / (x - x.mean()).square().sum())


FVU = [
    Answer(check.one_fvu, "stub", (untouched,), "not attempted"),
    Answer(check.one_fvu, "join, then divide", (lambda batches: fvu(*joined(batches)),), None),
    Answer(check.one_fvu, "two passes in float32", (fvu_two_passes,), None),
    Answer(check.one_fvu, "one pass in float64", (fvu_one_pass,), None),
    Answer(check.one_fvu, "numpy", (fvu_numpy,), None),
    Answer(check.one_fvu, "mean of FVUs", (lambda b: sum(fvu(*p) for p in b) / len(b),), "average the FVU"),
    Answer(check.one_fvu, "own means", (fvu_running,), "a mean of its own"),
    Answer(check.one_fvu, "uncentred", (lambda b: OTHER_FVU["uncentred"](*joined(b)),), "length of x itself"),
    Answer(check.one_fvu, "ratios", (lambda b: OTHER_FVU["centred token ratio"](*joined(b)),), "ratio for each token"),
    Answer(check.one_fvu, "one pass in float32", (lambda b: fvu_one_pass(b, torch.float32),), "long for float32"),
    Answer(check.one_fvu, "explained", (lambda b: 1 - fvu(*joined(b)),), "is right"),
    Answer(check.one_fvu, "one mean of everything", (fvu_all_entries,), "is right"),
    Answer(check.one_fvu, "the last batch", (lambda b: fvu(*b[-1]),), "is right"),
    Answer(check.one_fvu, "no return", (lambda b: None,), "is a `return` missing"),
]

# -- questions -------------------------------------------------------------------------------------------

QUESTIONS = [
    Answer(check.half, "right", ("b",), None),
    Answer(check.half, "token by token", ("a",), "centred token ratio"),
    Answer(check.half, "the error's mean", ("c",), "centred error"),
    Answer(check.half, "units", ("d",), "in either units"),
    Answer(check.wrong, "right", ("B",), None),
    Answer(check.wrong, "the truth wins", ("a",), "stand for two"),
    Answer(check.wrong, "a tie", ("c",), "paid for something else"),
    Answer(check.wrong, "not trained enough", ("d",), "no lack of training"),
    Answer(check.reports, "untouched", ("a", ..., "c", "e"), "not attempted"),
    Answer(check.reports, "right", ("a", "d", "c", "e"), None),
    Answer(check.reports, "right, capitals", ("A", "D", " c", "E"), None),
    Answer(check.reports, "no L0", ("d", "d", "c", "e"), "Report 1"),
    Answer(check.reports, "no nats", ("a", "a", "c", "e"), "Report 2"),
    Answer(check.reports, "more training", ("a", "d", "b", "e"), "Report 3"),
    Answer(check.reports, "a lower bar", ("a", "d", "c", "b"), "Report 4"),
]

# -- 7.3 -------------------------------------------------------------------------------------------------


def trust(ce: Any, clean: float) -> bool:
    return abs(ce(lambda x: x) - clean) < 1e-3 and abs(ce(torch.zeros_like) - clean) > 0.1


def trust_noise(ce: Any, clean: float) -> bool:
    """Identity by way of an error, and noise in place of deletion."""
    same = ce(lambda x: torch.ones_like(x) + (x - torch.ones_like(x)))
    other = ce(lambda x: 10 * torch.randn_like(x))
    return bool(math.isclose(same, clean, abs_tol=1e-4) and not math.isclose(other, clean, abs_tol=1e-2))


SPLICE = [
    Answer(check.splice, "stub", (untouched,), "not attempted"),
    Answer(check.splice, "identity and deletion", (trust,), None),
    Answer(check.splice, "identity by an error, and noise", (trust_noise,), None),
    Answer(check.splice, "a tensor", (lambda ce, c: torch.tensor(trust(ce, c)),), "must be a bool"),
    Answer(check.splice, "identity only", (lambda ce, c: abs(ce(lambda x: x) - c) < 1e-3,), "whatever it is told"),
    Answer(check.splice, "deletion only", (lambda ce, c: ce(torch.zeros_like) > c + 0.1,), "shifts the tokens"),
    Answer(
        check.splice,
        "equal to the last bit",
        (lambda ce, c: ce(lambda x: x) == c and ce(torch.zeros_like) != c,),
        "differ by rounding",
    ),
    Answer(
        check.splice,
        "no abs",
        (lambda ce, c: ce(lambda x: x) - c < 1e-3 and ce(torch.zeros_like) - c > 0.1,),
        "take abs()",
    ),
    Answer(check.splice, "trusts all", (lambda ce, c: True,), "whatever it is told"),
    Answer(check.splice, "trusts none", (lambda ce, c: False,), "differ by rounding"),
    Answer(check.splice, "gives the difference", (lambda ce, c: ce(lambda x: x) - c,), "must be a bool"),
]

# -- 7.4 -------------------------------------------------------------------------------------------------


def nats(recovered: float, clean: float, ablated: float) -> float:
    return (1 - recovered) * (ablated - clean)


def nats_by_level(recovered: float, clean: float, ablated: float) -> float:
    ce = ablated - recovered * (ablated - clean)
    return ce - clean


ABLATED = 2.54 + 0.9 / 0.0323
HIDDEN = [
    Answer(check.hidden, "stub", (untouched, 30.4), "not attempted"),
    Answer(check.hidden, "number untouched", (nats, ...), "not attempted"),
    Answer(check.hidden, "right", (nats, ABLATED), None),
    Answer(check.hidden, "right, by the loss, rounded", (nats_by_level, 30), None),
    Answer(check.hidden, "the part recovered", (lambda r, c, a: r * (a - c), ABLATED), "1 - recovered"),
    Answer(check.hidden, "the loss", (lambda r, c, a: c + nats(r, c, a), ABLATED), "with the SAE in place"),
    Answer(check.hidden, "of the ablated loss", (lambda r, c, a: (1 - r) * a, ABLATED), "is right"),
    Answer(check.hidden, "negative", (lambda r, c, a: (1 - r) * (c - a), ABLATED), "is right"),
    Answer(check.hidden, "a percentage", (lambda r, c, a: (100 - r) / 100 * (a - c), ABLATED), "is right"),
    Answer(check.hidden, "without the clean loss", (nats, ABLATED - 2.54), "Add the clean loss"),
    Answer(check.hidden, "divided by the share", (nats, 2.54 + 0.9 / 0.9677), "divided by what"),
]

# -- 7.5 -------------------------------------------------------------------------------------------------


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def return_loop(a: Tensor, b: Tensor, bar: float) -> float:
    count = 0
    for p in a:
        if any(float(torch.nn.functional.cosine_similarity(p, q, dim=0)) > bar for q in b):
            count += 1
    return count / len(a)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return unit(a) @ unit(b).T


RETURNS = [
    Answer(check.returns, "stub", (untouched,), "not attempted"),
    Answer(check.returns, "right", (lambda a, b, bar: (cosines(a, b).amax(1) > bar).float().mean(),), None),
    Answer(check.returns, "a loop", (return_loop,), None),
    Answer(check.returns, "any", (lambda a, b, bar: float((cosines(a, b) > bar).any(1).double().mean()),), None),
    Answer(check.returns, "not normalised", (lambda a, b, bar: ((a @ b.T).amax(1) > bar).float().mean(),), "lengths"),
    Answer(check.returns, "|cos|", (lambda a, b, bar: (cosines(a, b).abs().amax(1) > bar).float().mean(),), "|cos|"),
    Answer(
        check.returns, "rows of b", (lambda a, b, bar: (cosines(a, b).amax(0) > bar).float().mean(),), "rows of b that"
    ),
    Answer(
        check.returns,
        "same index",
        (lambda a, b, bar: (cosines(a, b).diagonal() > bar).float().mean(),),
        "row i with row i",
    ),
    Answer(check.returns, "pairs", (lambda a, b, bar: (cosines(a, b) > bar).sum() / len(a),), "count pairs"),
    Answer(check.returns, "the mean cosine", (lambda a, b, bar: cosines(a, b).amax(1).mean(),), "is right"),
    Answer(check.returns, "how many", (lambda a, b, bar: (cosines(a, b).amax(1) > bar).sum(),), "is right"),
    Answer(check.returns, "which", (lambda a, b, bar: cosines(a, b).amax(1) > bar,), "must be one number"),
]

# -- 7.7 -------------------------------------------------------------------------------------------------


def paired(a: list[float], b: list[float], t: float) -> tuple[float, float]:
    each = [p - q for p, q in zip(a, b, strict=True)]
    return mean(each), t * stdev(each) / math.sqrt(len(each))


def paired_torch(a: list[float], b: list[float], t: float, ddof: int = 1) -> tuple[Tensor, Tensor]:
    each = torch.tensor(a) - torch.tensor(b)
    return each.mean(), t * each.std(correction=ddof) / len(each) ** 0.5


def paired_numpy(a: list[float], b: list[float], t: float) -> list[Any]:
    each = np.asarray(a) - np.asarray(b)
    return [each.mean(), t * each.std(ddof=1) / np.sqrt(len(each))]


def unpaired(a: list[float], b: list[float], t: float) -> tuple[float, float]:
    return mean(a) - mean(b), t * math.sqrt((stdev(a) ** 2 + stdev(b) ** 2) / len(a))


def ends(a: list[float], b: list[float], t: float) -> tuple[float, float]:
    middle, half = paired(a, b, t)
    return middle - half, middle + half


INTERVAL = [
    Answer(check.interval, "stub", (untouched,), "not attempted"),
    Answer(check.interval, "right", (paired,), None),
    Answer(check.interval, "torch", (paired_torch,), None),
    Answer(check.interval, "numpy, a list", (paired_numpy,), None),
    Answer(check.interval, "the other way round", (lambda a, b, t: paired(b, a, t),), "less b"),
    Answer(check.interval, "unpaired", (unpaired,), "as unrelated"),
    Answer(
        check.interval,
        "no square root of n",
        (lambda a, b, t: (paired(a, b, t)[0], paired(a, b, t)[1] * len(a) ** 0.5),),
        "square root of n",
    ),
    Answer(check.interval, "n below the line", (lambda a, b, t: paired_torch(a, b, t, 0),), "n - 1"),
    Answer(check.interval, "without t", (lambda a, b, t: paired(a, b, 1),), "leave out t"),
    Answer(check.interval, "1.96 for t", (lambda a, b, t: paired(a, b, 1.96),), "is right"),
    Answer(check.interval, "both ends", (ends,), "is right"),
    Answer(check.interval, "the mean alone", (lambda a, b, t: paired(a, b, t)[0],), "must be 2 things"),
]

ANSWERS = FVU + QUESTIONS + SPLICE + HIDDEN + RETURNS + INTERVAL
