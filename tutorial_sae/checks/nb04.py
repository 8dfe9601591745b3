"""Checks of lesson 04: BatchTopK.

What a check says to a known slip, or to a wrong letter, stands in its docstring, under the name by which `_said` finds
the function that makes the slip.
"""

from __future__ import annotations

import html
import math
import re
from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, call, choose, exercise, like, sentences, try_cases
from tutorial_sae.runtime import generator
from tutorial_sae.saes import BatchTopKSAE
from tutorial_sae.saes.base import keep_row


def _z(seed: int, tokens: int, latents: int) -> Tensor:
    """Pre-activations in which some tokens are worth much more than others."""
    order = generator(seed, "nb04")
    return (torch.randn(tokens, latents, generator=order) * torch.rand(tokens, 1, generator=order) * 2).relu()


def _flat(z: Tensor, budget: int, last: int = 1) -> Tensor:
    """The slow and obvious way: all entries in one list, largest first; of equals the lower index first."""
    values = z.flatten().tolist()
    kept = set(sorted(range(len(values)), key=lambda i: (-values[i], last * i))[:budget])
    return torch.tensor([v if i in kept else 0.0 for i, v in enumerate(values)]).view_as(z)


def _cut(z: Tensor, k: float, last: int = 1) -> Tensor:
    return _flat(z, math.floor(k * len(z) + 1e-6), last)


def _by_topk(z: Tensor, k: float) -> Tensor:
    values, chosen = z.flatten().topk(math.floor(k * len(z) + 1e-6))
    return torch.zeros(z.numel()).scatter(0, chosen, values).view_as(z)


@exercise("4.1", "the flat cut")
def flat_cut(batch_topk: Any) -> str:
    """rows: You cut each row on its own: that is TopK. BatchTopK cuts the whole matrix once.
    total: You keep k entries of the whole matrix: the budget is k for each token, so k * len(z) in all.
    float: In floats 2.3 * 100 is 229.99999999999997: take floor(k * tokens + 1e-6), or one entry is lost.
    whole: You round k before you multiply: the budget of 7 tokens at k = 2.3 is floor(16.1), not 7 * 2.
    up: You round the budget up: floor(k * tokens) is meant, so that nothing is spent that is not there.
    equal: You keep every entry that equals the last one kept, so more survive than the budget has: of equals, those
        with the lower flat index stay.
    higher: Among equal entries you keep those with the higher flat index: the lower ones stay.
    topk: Among equal entries you leave the choice to topk, which promises no order: those with the lower flat index
        stay. A stable sort keeps the order of equals.
    mask: You return where entries are kept: return their values.
    """
    slips = sentences(
        flat_cut,
        rows=lambda z, k: keep_row(z, int(k)),
        total=lambda z, k: _flat(z, int(k)),
        float=lambda z, k: _flat(z, int(k * len(z))),
        whole=lambda z, k: _flat(z, int(k) * len(z)),
        up=lambda z, k: _flat(z, math.ceil(k * len(z) - 1e-6)),
        equal=lambda z, k: z * (z >= _cut(z, k)[_cut(z, k) > 0].min()),
        higher=lambda z, k: _cut(z, k, -1),
        topk=_by_topk,
        mask=lambda z, k: (_cut(z, k) > 0).float(),
    )
    small = torch.tensor([[0.9, 0.8, 0.0, 0.1], [0.2, 0.15, 0.12, 0.0], [0.7, 0.65, 0.6, 0.5]])
    cases = [Case("values", (small, 2)), Case("counts", (_z(1, 5, 9), 3)), Case("one token", (_z(2, 1, 6), 2))]
    cases += [Case(f"k = {k}", (_z(3, n, 8), k)) for n, k in ((7, 2.3), (100, 2.3), (4, 2.4), (8, 0.5))]
    cases += [Case("ties", ((4 * _z(7, n, 9)).round() / 4, 2)) for n in (3, 60)]
    cases += [Case("fewer positives than the budget", (_z(8, 4, 6) * (torch.arange(6) < 2), 4))]
    near = torch.zeros(1, 2304)
    near[0, 0], near[0, -1] = 0.5, 0.50001
    cases += [Case("close but not equal", (near, 1))]
    said = try_cases(batch_topk, _cut, cases, slips)
    try:
        call(batch_topk, small, 0.3)
    except ValueError:
        return f"{said}, a budget of 0"
    raise Failed("k = 0.3 for 3 tokens is a budget of 0 entries: raise a ValueError that says so.")


@exercise("4.2", "commas or surnames", kind="predict")
def budget_goes_to(answer: Any) -> str:
    """a: The same for all is what the row cut does, and the flat cut exists to undo it.
    b: Frequent is not the same as worth much: a comma is nearly the same vector each time, and a few latents say it.
    c: Close: starts of words come second. Of a name in three pieces, on which does the model know whose name it is?
    """
    return choose(
        answer, "d", sentences(budget_goes_to), "the later pieces of a word, where it is known which word it is"
    )


@exercise("4.3", "trained with one cut, used with another", kind="predict")
def other_cut(answer: Any) -> str:
    """a: See TopK's line of the table that the next cell prints: cut by batch, its FVU is not lower. Spending
        freely helps where values are prices that can be compared between tokens, and nothing ever asked TopK's to be.
    c: See BatchTopK's line of the table that the next cell prints: cut by row, its FVU is a fifth higher.
    d: See BatchTopK's line of the table that the next cell prints: a fifth in FVU is not about the same.
    """
    return choose(
        answer, "b", sentences(other_cut), "in FVU each looks best with its own cut; hold TopK's half of that until 4.4"
    )


def _rest(x: Tensor, out: list[int]) -> Tensor:
    return x[[i for i in range(len(x)) if i not in out]]


def _without(x: Tensor, x_hat: Tensor, out: list[int]) -> float:
    x, error = _rest(x, out), _rest(x - x_hat, out)
    return float(error.square().sum() / (x - x.mean(0)).square().sum())


@exercise("4.4", "the thief", kind="diagnose")
def thief(fvu_without: Any, answer: Any) -> str:
    """a: One token does not need sixteen hundred features, and the BatchTopK SAE spends far less on it.
    c: AuxK adds to the loss in training, and nothing is trained here.
    d: The same comes out in float64. Compare the norm of this token with the median.
    none: You leave the tokens in: take their rows out of x and x_hat before anything else.
    above: You leave the tokens out above the line, and in below it: nobody has to explain their variance any more.
    mean: The mean below the line still contains the tokens left out: take them out first, then the mean.
    """
    slips = sentences(
        thief,
        none=lambda x, y, out: _without(x, y, []),
        above=lambda x, y, out: float(_rest(x - y, out).square().sum() / (x - x.mean(0)).square().sum()),
        mean=lambda x, y, out: float(_rest(x - y, out).square().sum() / _rest(x - x.mean(0), out).square().sum()),
    )
    order = generator(5, "nb04")
    x = (torch.randn(12, 6, generator=order) + 2) * torch.where(torch.arange(12) == 7, 20, 1)[:, None]
    x_hat = x + torch.randn(12, 6, generator=order) * x.norm(dim=1, keepdim=True) / 9
    cases = [Case(f"{len(out)} left out", (x, x_hat, out)) for out in ([7], [7, 2], [])]
    praise = "the flat cut compares lengths that the row cut never had to"
    return f"{try_cases(fvu_without, _without, cases, slips)}; {choose(answer, 'b', sentences(thief), praise)}"


def _worth(error: Tensor, latents: Tensor, W_dec: Tensor) -> Tensor:
    without = error[:, None] + latents[..., None] * W_dec  # (tokens, latents, d_in): the error without each entry
    return (without.square().sum(-1) - error.square().sum(-1, keepdim=True)) * (latents > 0)


@exercise("4.5", "what a latent is worth", core=False)
def worth(latent_worth: Any) -> str:
    """square: That is z², right only if nothing is left of the error along the latent: expand |error + z d|² and keep
        the middle term too.
    minus: The middle term has the wrong sign: without the entry the error is error + z d.
    once: The middle term counts twice: |a + b|² = |a|² + 2 a·b + |b|².
    gain: The sign of the whole is wrong: an entry is worth what the error grows by without it.
    """
    slips = sentences(
        worth,
        square=lambda e, z, d: z.square(),
        minus=lambda e, z, d: _worth(-e, z, d),
        once=lambda e, z, d: _worth(e / 2, z, d),
        gain=lambda e, z, d: -_worth(e, z, d),
    )
    cases = []
    for n, m, d in ((1, 3, 2), (6, 10, 4)):
        rows = torch.nn.functional.normalize(torch.randn(m, d, generator=generator(m, "rows")), dim=1)
        error = torch.randn(n, d, generator=generator(n, "nb04"))
        cases.append(Case(f"{n} x {m} entries", (error, _cut(_z(m, n, m), m / 3), rows)))
    return try_cases(latent_worth, _worth, cases, slips)


@exercise("4.6", "the neighbour attack", kind="break it")
def attack(neighbours: Any) -> str:
    n, k, text, order = 40, 4.0, _z(31, 10, 60), generator(33, "nb04")
    pool = (torch.randn(300, 60, generator=order) + 2 * torch.rand(300, 1, generator=order) - 1.4).relu()
    pool[::5] *= 0.1
    pool[::5, 0] += 120.0  # one enormous entry: large in sum, norm and maximum, and yet hardly a rival
    pool[1::5] = 0.02 * torch.rand(60, 60, generator=order)  # all positive, and none of them ever above the bar
    l0 = {}
    for rich in (True, False):
        best = (_cut(pool, k) > 0).sum(1).argsort(descending=rich)[:n]
        for _ in range(4):  # the bar depends on the choice, and the choice on the bar
            bar = _cut(torch.cat([text, pool[best]]), k)
            best = (pool > bar[bar > 0].min()).sum(1).argsort(descending=rich, stable=True)[:n]
        mine = torch.as_tensor(call(neighbours, pool, n, k, rich)).flatten()
        if mine.dtype != torch.long or len(mine.unique()) != n or len(mine) != n or int(mine.max()) >= len(pool):
            raise Failed(f"the numbers of {n} different rows of the pool are wanted, and this is something else.")
        l0[rich] = [float((_cut(torch.cat([text, pool[c]]), k)[:10] > 0).sum() / 10) for c in (mine, best)]
    said = f"beside rich neighbours the text keeps {l0[True][0]:.1f} per token, beside poor ones {l0[False][0]:.1f}"
    if l0[True][0] > 0.8 * l0[False][1] and l0[False][0] < 1.15 * l0[True][1] + 0.1:
        raise Failed(f"{said}: the wrong way round. Rich neighbours take much and leave little.")
    why = "A huge entry takes one place, as a small one does, and an entry below the bar none: count those above it."
    if l0[True][0] > 1.15 * l0[True][1] + 0.1:
        raise Failed(
            f"beside your rich neighbours the text keeps {l0[True][0]:.1f}; {l0[True][1]:.1f} can be had. {why}"
        )
    if l0[False][0] < 0.8 * l0[False][1]:
        raise Failed(
            f"beside your poor neighbours the text keeps {l0[False][0]:.1f}; {l0[False][1]:.1f} can be had. {why}"
        )
    return said


@exercise("4.7", "one number", kind="prove")
def one_number(one_bar: Any) -> str:
    z = _z(41, 4, 7)
    codes = [_cut(torch.cat([z, s * _z(42, 30, 7)]), 2)[:4] for s in (0.1, 0.5, 1.0, 3.0)]
    for name, code in zip(("poor", "modest", "common", "rich", "no", "greedy"), [*codes, z, 0 * z], strict=True):
        if (bar := call(one_bar, z, code)) is None:
            raise Failed(f"{name} neighbours: all that is kept is larger than all that is dropped, so a bar exists.")
        if (kept := int((z > like(bar, 0.0)).sum())) != (want := int((code > 0).sum())):
            why = "no entry is above itself, so the bar lies below the smallest kept, and not below one dropped"
            raise Failed(f"{name} neighbours: z > {float(bar):.4g} keeps {kept} entries, the code {want}: {why}.")
    for name, code in (("cut by row", keep_row(z, 2)), ("values halved", codes[1] / 2), ("added", z + (z == 0))):
        if (bar := call(one_bar, z, code)) is not None:
            raise Failed(f"{name}: no bar gives this code (z where z > bar, else 0), and you say {bar:.4g}.")
    return "six kinds of neighbours, and three codes that no bar gives"


def _in_batches(sae: Any, x: Tensor, n: int) -> float:
    return _without(x, torch.cat([sae.decode(_cut(sae.pre_activations(part), sae.k)) for part in x.split(n)]), [])


@exercise("4.8", "batches of one", kind="measure")
def small_batches(fvu_in_batches: Any) -> str:
    """threshold: You cut by the threshold, as the SAE does in eval mode unless it is told cut='batch'.
    whole: You cut all tokens as one batch: split x into batches of n first.
    row: You cut by row: the batch cut is meant, in each batch by itself.
    rest: You leave the last, smaller batch out: it has a budget of its own.
    mean: You average the FVU of batches: put the reconstructions together, then divide once.
    """
    slips = sentences(
        small_batches,
        threshold=lambda s, x, n: _without(x, s(x), []),
        whole=lambda s, x, n: _in_batches(s, x, len(x)),
        row=lambda s, x, n: _in_batches(s, x, 1),
        rest=lambda s, x, n: _in_batches(s, x[: len(x) // n * n], n),
        mean=lambda s, x, n: sum(_in_batches(s, part, n) for part in x.split(n)) / math.ceil(len(x) / n),
    )
    sae = BatchTopKSAE(8, 24, k=3, seed=5).requires_grad_(False).eval()
    sae.threshold.fill_(0.7)
    x = torch.randn(50, 8, generator=generator(51, "nb04")) * _z(52, 50, 1) + 1
    cases = [Case(f"batches of {n}", (sae, x, n)) for n in (25, 50, 16, 1)]
    return try_cases(fvu_in_batches, _in_batches, cases, slips)


def _read(page: Any, pieces: list[str], z: Tensor, k: float, where: str) -> None:
    """Refuse a page that does not show the counts of the batch cut, or a message where there are none."""
    rows = [row.replace("</td>", "\n") for row in like(page, "", where).split("<tr") if "<td" in row]
    lines = [html.unescape(re.sub(r"<?[^<>]*>", "", row)).strip().split("\n") for row in rows]
    shown = [f"{line[0].strip()} {line[-1].strip()}" for line in lines]
    if k * len(z) < 1 or k > z.shape[1]:
        if shown or not page.strip():
            raise Failed(f"{where}: there is no such cut, so a sentence that says why is wanted, and no table.")
    elif shown != (want := [f"{p.strip()} {n}" for p, n in zip(pieces, (_cut(z, k) > 0).sum(1), strict=True)]):
        asked = "Is the page filled from the start, and is `html.escape` put on the pieces?"
        raise Failed(f"{where}: the rows' first and last cells read {shown}, and {want} was wanted. {asked}")


@exercise("4.9", "a widget of your own")
def widget(cut_html: Any, cut_widget: Any) -> str:
    import ipywidgets

    pieces, z = ["The", " comma", ",", "<b>", " &"], _z(61, 5, 12)
    for k in (3, 1, 2.4, 0, 0.1, 12.5):
        _read(call(cut_html, pieces, z, k), pieces, z, k, f"the page of cut_html at k = {k}")
    parts = list(getattr(call(cut_widget, pieces, z), "children", ()))
    sliders = [p for p in parts if isinstance(p, ipywidgets.IntSlider | ipywidgets.FloatSlider)]
    pages = [p for p in parts if isinstance(p, ipywidgets.HTML)]
    if len(sliders) != 1 or len(pages) != 1:
        raise Failed("return ipywidgets.VBox([slider, page]): a box that holds one slider and one ipywidgets.HTML.")
    slider, page = sliders[0], pages[0]
    if slider.min > 0 or slider.max <= 12:
        raise Failed("let the slider run from 0 to z.shape[1] + 1, so that both messages can be seen.")
    _read(page.value, pieces, z, slider.value, f"the page as the widget opens, at k = {slider.value}")
    for k in (1, 5, 0, 3, 13, 2):
        before, slider.value = page.value, k
        if page.value == before:
            raise Failed(f"the slider moved to {k}, and the page stayed: is redraw observed, and the new value used?")
        _read(page.value, pieces, z, k, f"the page after the slider moved to {k}")
    return "the page at six k, the slider moved six times"


@exercise("4.10", "fair play", kind="diagnose")
def fair_play(answer: Any) -> str:
    """a: Not everywhere: look at the shortest run.
    b: One setting in which TopK wins does not make it the better one: look at the longer runs.
    d: In every line the seeds of the two SAEs stand apart, in the longer runs far apart: this is not noise alone.
    """
    return choose(answer, "c", sentences(fair_play), "a claim with its conditions")
