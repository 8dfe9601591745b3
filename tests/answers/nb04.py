"""Answers to lesson 04."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb04 as check
from tutorial_sae.saes.base import keep_batch, keep_row

# -- 4.1 -------------------------------------------------------------------------------------------------


def flat(z: Tensor, budget: int, stable: bool = True) -> Tensor:
    if budget == 0:
        raise ValueError("a budget of 0")
    order = z.flatten().sort(descending=True, stable=stable).indices[:budget]
    return torch.zeros(z.numel()).scatter(0, order, z.flatten()[order]).view_as(z)


def flat_loop(z: Tensor, k: float) -> Tensor:
    entries = [(-float(z[i, j]), i, j) for i in range(z.shape[0]) for j in range(z.shape[1])]
    budget = int(k * z.shape[0] + 1e-6)
    if not budget:
        raise ValueError("nothing to spend")
    kept = z.clone()
    for _, i, j in sorted(entries)[budget:]:
        kept[i, j] = 0
    return kept


def flat_no_error(z: Tensor, k: float) -> Tensor:
    budget = int(k * len(z) + 1e-6)
    return flat(z, budget) if budget else torch.zeros_like(z)


def flat_ties(z: Tensor, k: float) -> Tensor:
    bar = z.flatten().topk(int(k * len(z) + 1e-6)).values[-1]
    return torch.where(z >= bar, z, 0)


def flat_topk(z: Tensor, k: float) -> Tensor:
    values, places = z.flatten().topk(int(k * len(z) + 1e-6))
    out = torch.zeros(z.numel())
    out[places] = values
    return out.view_as(z)


def flat_in_place(z: Tensor, k: float) -> Tensor:
    order = z.flatten().argsort(descending=True, stable=True)[int(k * len(z) + 1e-6) :]
    z.view(-1)[order] = 0
    return z


FLAT = [
    Answer(check.flat_cut, "stub", (lambda z, k: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.flat_cut, "the package's own", (keep_batch,), None),
    Answer(check.flat_cut, "a stable sort", (lambda z, k: flat(z, int(k * len(z) + 1e-6)),), None),
    Answer(check.flat_cut, "a loop over a sorted list", (flat_loop,), None),
    Answer(check.flat_cut, "each row by itself", (lambda z, k: keep_row(z, int(k)),), "cut each row on its own"),
    Answer(check.flat_cut, "k in all", (lambda z, k: flat(z, int(k)),), "k entries of the whole matrix"),
    Answer(check.flat_cut, "int(k * n)", (lambda z, k: flat(z, int(k * len(z))),), "229.99999999999997"),
    Answer(check.flat_cut, "int(k) * n", (lambda z, k: flat(z, int(k) * len(z)),), "round k before"),
    Answer(check.flat_cut, "round(k * n)", (lambda z, k: flat(z, round(k * len(z))),), "round the budget up"),
    Answer(check.flat_cut, "all ties kept", (flat_ties,), "equals the last one kept"),
    Answer(check.flat_cut, "topk's own order of ties", (flat_topk,), "promises no order"),
    Answer(check.flat_cut, "the mask", (lambda z, k: (keep_batch(z, k) > 0).float(),), "return their values"),
    Answer(check.flat_cut, "booleans", (lambda z, k: keep_batch(z, k) > 0,), "dtype"),
    Answer(check.flat_cut, "flattened", (lambda z, k: keep_batch(z, k).flatten(),), "has shape"),
    Answer(check.flat_cut, "works in place", (flat_in_place,), "changes the tensor"),
    Answer(check.flat_cut, "no error for a budget of 0", (flat_no_error,), "raise a ValueError"),
    Answer(check.flat_cut, "no return", (lambda z, k: None,), "is a `return` missing"),
]

# -- questions -------------------------------------------------------------------------------------------

QUESTIONS = [
    Answer(check.budget_goes_to, "untouched", (...,), "not attempted"),
    Answer(check.budget_goes_to, "right", ("d",), None),
    Answer(check.budget_goes_to, "right, in brackets", (" (D) ",), None),
    Answer(check.budget_goes_to, "all the same", ("a",), "what the row cut does"),
    Answer(check.budget_goes_to, "the frequent", ("b",), "Frequent is not"),
    Answer(check.budget_goes_to, "word starts", ("c",), "come second"),
    Answer(check.budget_goes_to, "no such letter", ("x",), "none of the letters"),
    Answer(check.other_cut, "right", ("b",), None),
    Answer(check.other_cut, "flat helps both", ("a",), "ever asked TopK's to be"),
    Answer(check.other_cut, "row helps both", ("c",), "a fifth higher"),
    Answer(check.other_cut, "no difference", ("d",), "not about the same"),
    Answer(check.fair_play, "right", ("c",), None),
    Answer(check.fair_play, "always", ("a",), "Not everywhere"),
    Answer(check.fair_play, "never", ("b",), "does not make it"),
    Answer(check.fair_play, "noise", ("d",), "not noise alone"),
]

# -- 4.4 -------------------------------------------------------------------------------------------------


def fvu_right(x: Tensor, x_hat: Tensor, left_out: list[int]) -> float:
    stays = torch.ones(len(x), dtype=torch.bool)
    stays[left_out] = False
    x, x_hat = x[stays], x_hat[stays]
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


def fvu_loop(x: Tensor, x_hat: Tensor, left_out: list[int]) -> Tensor:
    rows = [i for i in range(len(x)) if i not in left_out]
    mean = torch.stack([x[i] for i in rows]).mean(0)
    above, below = torch.zeros(()), torch.zeros(())
    for i in rows:
        above += (x[i] - x_hat[i]).pow(2).sum()
        below += (x[i] - mean).pow(2).sum()
    return above / below


def fvu_old_mean(x: Tensor, x_hat: Tensor, left_out: list[int]) -> float:
    stays = [i for i in range(len(x)) if i not in left_out]
    return float((x - x_hat)[stays].square().sum() / (x - x.mean(dim=0))[stays].square().sum())


def fvu_above(x: Tensor, x_hat: Tensor, left_out: list[int]) -> float:
    error = (x - x_hat).square().sum(dim=1)
    error[left_out] = 0
    return float(error.sum() / (x - x.mean(dim=0)).square().sum())


def fvu_uncentred(x: Tensor, x_hat: Tensor, left_out: list[int]) -> float:
    stays = [i for i in range(len(x)) if i not in left_out]
    return float((x - x_hat)[stays].square().sum() / x[stays].square().sum())


THIEF = [
    Answer(check.thief, "stub, letter untouched", (fvu_right, ...), "not attempted"),
    Answer(check.thief, "right, by a mask", (fvu_right, "b"), None),
    Answer(check.thief, "right, by a loop", (fvu_loop, "b"), None),
    Answer(check.thief, "the old mean", (fvu_old_mean, "b"), "The mean below the line"),
    Answer(check.thief, "out above, in below", (fvu_above, "b"), "out above the line"),
    Answer(check.thief, "left in", (lambda x, y, out: fvu_right(x, y, []), "b"), "leave the tokens in"),
    Answer(check.thief, "uncentred", (fvu_uncentred, "b"), "is right"),
    Answer(check.thief, "gives the errors", (lambda x, y, out: x - y, "b"), "must be one number"),
    Answer(check.thief, "sixteen hundred features", (fvu_right, "a"), "does not need"),
    Answer(check.thief, "AuxK", (fvu_right, "c"), "nothing is trained"),
    Answer(check.thief, "rounding", (fvu_right, "d"), "float64"),
]

# -- 4.5 -------------------------------------------------------------------------------------------------


def worth_loop(error: Tensor, latents: Tensor, W_dec: Tensor) -> Tensor:
    out = torch.zeros_like(latents)
    for t in range(len(latents)):
        for j in range(latents.shape[1]):
            without = error[t] + latents[t, j] * W_dec[j]
            out[t, j] = without @ without - error[t] @ error[t]
    return out


WORTH = [
    Answer(check.worth, "the formula", (lambda e, z, d: 2 * z * (e @ d.T) + z**2,), None),
    Answer(check.worth, "a loop", (worth_loop,), None),
    Answer(check.worth, "z squared", (lambda e, z, d: z**2,), "That is z²"),
    Answer(check.worth, "the sign of the middle term", (lambda e, z, d: z**2 - 2 * z * (e @ d.T),), "wrong sign"),
    Answer(check.worth, "the middle term once", (lambda e, z, d: z**2 + z * (e @ d.T),), "counts twice"),
    Answer(check.worth, "gain for worth", (lambda e, z, d: -(z**2) - 2 * z * (e @ d.T),), "sign of the whole"),
    Answer(check.worth, "summed over latents", (lambda e, z, d: (2 * z * (e @ d.T) + z**2).sum(1),), "has shape"),
]

# -- 4.6 -------------------------------------------------------------------------------------------------


def neighbours(pool: Tensor, n: int, k: float, rich: bool) -> Tensor:
    return (keep_batch(pool, k) > 0).sum(dim=1).argsort(descending=rich)[:n]


def neighbours_greedy(pool: Tensor, n: int, k: float, rich: bool) -> list[int]:
    """Chooses, cuts what was chosen, and chooses again."""
    chosen = list(range(len(pool)))
    for _ in range(3):
        bar = keep_batch(pool[chosen], k)
        least = float(bar[bar > 0].min())
        wealth = [(int((row > least).sum()), i) for i, row in enumerate(pool)]
        chosen = [i for _, i in sorted(wealth, reverse=rich)[:n]]
    return chosen


def ranked_by(score: Any) -> Any:
    return lambda pool, n, k, rich: score(pool).argsort(descending=rich)[:n]


ATTACK = [
    Answer(check.attack, "places taken in the pool", (neighbours,), None),
    Answer(check.attack, "chosen again and again, a list", (neighbours_greedy,), None),
    Answer(check.attack, "by the sum", (ranked_by(lambda p: p.sum(1)),), "can be had"),
    Answer(check.attack, "by the number of positives", (ranked_by(lambda p: (p > 0).sum(1)),), "can be had"),
    Answer(check.attack, "by the norm", (ranked_by(lambda p: p.norm(dim=1)),), "can be had"),
    Answer(check.attack, "by the largest entry", (ranked_by(lambda p: p.amax(1)),), "can be had"),
    Answer(check.attack, "the wrong way round", (lambda p, n, k, rich: neighbours(p, n, k, not rich),), "wrong way"),
    Answer(check.attack, "ignores rich", (lambda p, n, k, rich: neighbours(p, n, k, True),), "can be had"),
    Answer(
        check.attack, "one row n times", (lambda p, n, k, rich: neighbours(p, 1, k, rich).expand(n),), "different rows"
    ),
    Answer(check.attack, "too many", (lambda p, n, k, rich: neighbours(p, n + 1, k, rich),), "different rows"),
    Answer(
        check.attack, "the rows themselves", (lambda p, n, k, rich: p[neighbours(p, n, k, rich)],), "different rows"
    ),
]

# -- 4.7 -------------------------------------------------------------------------------------------------


def bar_right(z: Tensor, code: Tensor) -> float | None:
    dropped = z[code == 0]
    bar = float(dropped.max()) if len(dropped) else 0.0
    return bar if torch.equal(torch.where(z > bar, z, 0), code) else None


def bar_between(z: Tensor, code: Tensor) -> float | None:
    """Halfway between the smallest kept and the largest dropped."""
    if not torch.equal(code[code > 0], z[code > 0]):
        return None
    kept, dropped = z[code > 0].tolist(), z[code == 0].tolist()
    low, high = max(dropped, default=0.0), min(kept, default=max(dropped, default=0.0) + 1)
    return (low + high) / 2 if low < high else None


def bar_kept(z: Tensor, code: Tensor) -> float | None:
    return float(code[code > 0].min()) if (code > 0).any() else float(z.max())


BAR = [
    Answer(check.one_number, "the largest dropped, tested", (bar_right,), None),
    Answer(check.one_number, "halfway", (bar_between,), None),
    Answer(check.one_number, "the smallest kept", (bar_kept,), "no entry is above itself"),
    Answer(
        check.one_number,
        "always a bar",
        (lambda z, c: float(z[c == 0].max()) if (c == 0).any() else 0.0,),
        "no bar gives",
    ),
    Answer(check.one_number, "never a bar", (lambda z, c: None,), "so a bar exists"),
    Answer(check.one_number, "always 0", (lambda z, c: 0.0,), "keeps"),
    Answer(
        check.one_number,
        "values not compared",
        (lambda z, c: bar_between(z, torch.where(c > 0, z, 0)),),
        "halved: no bar",
    ),
    Answer(check.one_number, "a boolean mask", (lambda z, c: z > c,), "must be one number"),
]

# -- 4.8 -------------------------------------------------------------------------------------------------


def join(sae: Any, parts: list[Tensor], cut: str = "batch") -> Tensor:
    return torch.cat([sae.decode(sae.encode(part, cut)) for part in parts])


def batches_loop(sae: Any, x: Tensor, n: int) -> Tensor:
    error = torch.zeros(())
    for start in range(0, len(x), n):
        part = x[start : start + n]
        error += (part - sae.decode(keep_batch(sae.pre_activations(part), sae.k))).pow(2).sum()
    return error / (x - x.mean(0)).pow(2).sum()


def batches_whole(sae: Any, x: Tensor, n: int) -> float:
    whole = x[: len(x) // n * n]
    return fvu_right(whole, join(sae, list(whole.split(n))), [])


def batches_mean(sae: Any, x: Tensor, n: int) -> float:
    each = [fvu_right(part, join(sae, [part]), []) for part in x.split(n)]
    return sum(each) / len(each)


BATCHES = [
    Answer(check.small_batches, "split, join, divide", (lambda s, x, n: fvu_right(x, join(s, x.split(n)), []),), None),
    Answer(check.small_batches, "a loop of sums", (batches_loop,), None),
    Answer(check.small_batches, "by threshold", (lambda s, x, n: fvu_right(x, s(x), []),), "cut by the threshold"),
    Answer(check.small_batches, "all in one", (lambda s, x, n: fvu_right(x, join(s, [x]), []),), "as one batch"),
    Answer(check.small_batches, "by row", (lambda s, x, n: fvu_right(x, join(s, [x], "row"), []),), "cut by row"),
    Answer(check.small_batches, "without the last batch", (batches_whole,), "the last, smaller batch"),
    Answer(check.small_batches, "mean of FVUs", (batches_mean,), "average the FVU"),
    Answer(
        check.small_batches,
        "mean squared error",
        (lambda s, x, n: (x - join(s, x.split(n))).pow(2).mean(),),
        "is right",
    ),
]

# -- 4.9 -------------------------------------------------------------------------------------------------


def page_of(pieces: list[str], z: Tensor, k: float, cut: Any = keep_batch, escape: Any = html.escape) -> str:
    if k > z.shape[1]:
        return f"k = {k:g} is too large"
    if int(k * len(z) + 1e-6) == 0:
        return f"k = {k:g} is a budget of 0"
    counts = (cut(z, k) > 0).sum(dim=1).tolist()
    rows = [
        f"<tr><td>{escape(p.strip())}</td><td>{'|' * n}</td><td>{n}</td></tr>"
        for p, n in zip(pieces, counts, strict=True)
    ]
    return "<table><tr><th>token</th><th></th><th>kept</th></tr>" + "".join(rows) + "</table>"


def page_compact(pieces: list[str], z: Tensor, k: float) -> str:
    """Other markup: attributes, code, bold, two cells, lines."""
    try:
        if k > z.shape[1]:
            raise ValueError(f"only {z.shape[1]} latents")
        kept = keep_batch(z, k)
    except ValueError as error:
        return f"<p><b>{html.escape(str(error))}</b></p>"
    rows = ""
    for piece, row in zip(pieces, kept, strict=True):
        cells = f'<td style="x"><code> {html.escape(piece)}</code></td>\n<td><b>{int(row.count_nonzero())}</b></td>'
        rows += f'<tr class="a">\n{cells}\n</tr>\n'
    return f'<table border="1"><tbody>{rows}</tbody></table>'


def page_always(pieces: list[str], z: Tensor, k: float) -> str:
    k = min(max(k, 1), z.shape[1])
    return page_of(pieces, z, k)


def page_raises(pieces: list[str], z: Tensor, k: float) -> str:
    return page_of(pieces, z, k) if k <= z.shape[1] and keep_batch(z, k).any() else "too large"


def widget_of(page: Any = page_of, *, slider: Any = None, how: str = "set") -> Any:
    def build(pieces: list[str], z: Tensor) -> Any:
        knob = slider() if slider else ipywidgets.FloatSlider(value=3, min=0, max=z.shape[1] + 1, step=0.5)
        shown = ipywidgets.HTML(page(pieces, z, knob.value))

        def redraw(change: Any) -> None:
            made = page(pieces, z, change["old" if how == "late" else "new"])
            shown.value = shown.value + made if how == "add" else made

        if how != "deaf":
            knob.observe(redraw, "value")
        return knob if how == "bare" else ipywidgets.VBox([ipywidgets.Label("k"), knob, shown])

    return build


def int_slider(low: int, high: int) -> Any:
    return lambda: ipywidgets.IntSlider(value=3, min=low, max=high)


def by_row(pieces: list[str], z: Tensor, k: float) -> str:
    return page_of(pieces, z, k, lambda z, k: keep_row(z, max(1, int(k))))


WIDGET = [
    Answer(check.widget, "stub", (page_of, lambda p, z: (_ for _ in ()).throw(NotImplementedError)), "not attempted"),
    Answer(check.widget, "a float slider", (page_of, widget_of()), None),
    Answer(
        check.widget,
        "an int slider, other markup",
        (page_compact, widget_of(page_compact, slider=int_slider(0, 13))),
        None,
    ),
    Answer(check.widget, "cuts by row", (by_row, widget_of(by_row)), "cut_html at k = 3"),
    Answer(check.widget, "no escape", (lambda p, z, k: page_of(p, z, k, escape=str), widget_of()), "html.escape"),
    Answer(check.widget, "no message", (page_always, widget_of(page_always)), "no such cut"),
    Answer(check.widget, "raises at k = 0", (page_raises, widget_of(page_raises)), "budget of 0"),
    Answer(check.widget, "never observes", (page_of, widget_of(how="deaf")), "the page stayed"),
    Answer(check.widget, "shows the old value", (page_of, widget_of(how="late")), "the new value used"),
    Answer(check.widget, "adds pages", (page_of, widget_of(how="add")), "after the slider moved"),
    Answer(check.widget, "the widget cuts by row", (page_of, widget_of(by_row)), "as the widget opens"),
    Answer(check.widget, "the slider alone", (page_of, widget_of(how="bare")), "ipywidgets.VBox"),
    Answer(check.widget, "slider from 1", (page_of, widget_of(slider=int_slider(1, 13))), "from 0 to"),
    Answer(check.widget, "slider to 12", (page_of, widget_of(slider=int_slider(0, 12))), "from 0 to"),
    Answer(check.widget, "no return", (page_of, lambda p, z: None), "ipywidgets.VBox"),
]

ANSWERS = FLAT + QUESTIONS + THIEF + WORTH + ATTACK + BAR + BATCHES + WIDGET
