"""The three-cuts explorer: one sentence, one matrix z of pre-activations, cut by row, by batch and by threshold.

    data = explorer_data(model, sae, "The ferry leaves the harbour at seven.", neighbours={"poor": "…", "rich": "…"})
    three_cuts(data, k=32)                   what each cut keeps, in Python
    explorer(data)                           the same under your hands
    explorer(model, sae, "The ferry …")      and under other sentences, which you type
    explorer_html(data).save("page.html")    a page that needs no kernel and no network
    explorer_figure(data)                    a picture

In every one of the three cuts the largest entries of a token go first; the cuts differ in where they stop. So the error
of a token depends only on how many of its latents are kept, and a table of errors (token, number kept) answers for
every position of every slider. And all that neighbours do is to stand in front: for each entry of the sentence the
number of larger ones beside it is all that the batch cut asks of them. The browser gets these lists, in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tutorial_sae.metrics import check_belongs
from tutorial_sae.models import activations_at, describe, prompt_tokens
from tutorial_sae.plots import COLOURS, picture
from tutorial_sae.runtime import unknown
from tutorial_sae.saes import SAE, GatedSAE, keep_above, keep_batch, keep_row
from tutorial_sae.widgets.page import Page

SHOWN = 64  # columns of the view by latent
ALONE = "alone"  # the name of the batch that holds the sentence only
SCRIPT = Path(__file__).with_suffix(".js")
Texts = Mapping[str, str | Tensor] | None  # a neighbour is a text, or the z of one


class ExplorerData(NamedTuple):
    """A sentence as an SAE sees it. The opening BOS is left out, and so are the tokens that the SAE's mask drops."""

    sentence: str
    pieces: list[str]  # the text of each token
    z: Float[Tensor, "tokens latents"]  # pre-activations after the ReLU; latents are numbered as in the SAE
    errors: Float[Tensor, "tokens kept"]  # [t, m]: squared error of token t with its m largest kept, normalised units
    energy: Float[Tensor, " tokens"]  # squared length of each token in the same units
    neighbours: dict[str, Tensor]  # z of each text that can share the batch
    k: int
    theta: float

    def __repr__(self) -> str:
        return f"ExplorerData({len(self.pieces)} tokens, {self.z.shape[1]} latents, k={self.k}, theta={self.theta:.4g})"


class Cut(NamedTuple):
    """What one cut keeps. `error` is the share of the sentence's squared length, in normalised units (so after
    subtracting the data's mean), that is left unexplained: FVU with the mean of the training data as its centre."""

    mask: Bool[Tensor, "tokens latents"]
    l0: Int[Tensor, " tokens"]
    error: float


# -- data ------------------------------------------------------------------------------------------------


@torch.no_grad()
def explorer_data(model: Any, sae: SAE, sentence: str, *, neighbours: Texts = None, latents: int = 512) -> ExplorerData:
    """The sentence, and the texts that may share its batch, at the SAE's hook point.

    `k` and `theta` are the SAE's own; where it has none, k is 32 and theta cuts as many entries as k does. Of each
    token the `latents` largest entries are looked at, so all is exact as long as no token's L0 reaches that number.

    Raises `ValueError`, in one sentence, for a text that is empty or longer than the context, and for an SAE of another
    model or without one matrix to cut (Gated).
    """
    if isinstance(sae, GatedSAE):
        raise ValueError("a Gated SAE chooses by one matrix and takes values from another: the explorer cuts only one")
    check_belongs(sae, model)
    read = functools.partial(_read, model, sae, latents)
    beside = {n: t if isinstance(t, Tensor) else read(t, f"the text {n!r}")[2] for n, t in (neighbours or {}).items()}
    pieces, x, z = read(sentence, "the sentence")
    left, (largest, order) = (x - sae.b_dec.cpu()).double(), z.sort(dim=1, descending=True, stable=True)
    errors = [left.square().sum(dim=1)]
    for m in range(int((z > 0).sum(dim=1).max())):
        left -= largest[:, m, None] * sae.W_dec[order[:, m]].cpu()
        errors.append(left.square().sum(dim=1))
    k, own = min(sae.d_sae, round(getattr(sae, "k", 32)) or 1), torch.as_tensor(getattr(sae, "threshold", math.nan))
    theta = own if own.numel() == 1 and own > 0 else z.flatten().sort(descending=True).values[: k * len(z) + 1][-1]
    curves, energy = torch.stack(errors, dim=1).float(), x.square().sum(dim=1)
    return ExplorerData(sentence, pieces, z, curves, energy, beside, k, float(theta))


def _read(model: Any, sae: SAE, latents: int, text: str, what: str) -> tuple[list[str], Tensor, Tensor]:
    """(pieces, normalised activations, z) of the tokens that the mask lets through."""
    card, limit = describe(model), (sae.metadata.get("mask") or {}).get("norm_limit") or math.inf
    tokens = prompt_tokens(model, text, what)
    x = activations_at(model, tokens, sae.metadata.get("hook") or card.hook)[0, 1:].float()
    ids = tokens[0, 1:].tolist()
    keep = [i for i, token in enumerate(ids) if token not in card.special and x[i].norm() <= limit]
    if not keep:
        raise ValueError(f"{what} is empty{' but for tokens that the mask drops' * bool(ids)}: write a few words")
    pieces, part, rows = [], [], x[keep].to(sae.W_enc.device)
    for token in ids:  # a character of several tokens stands at its last, and dots at those before
        text = model.tokenizer.decode(part := [*part, token])
        pieces.append("⋯" if "\ufffd" in text else text)
        part = part if "\ufffd" in text else []
    z = keep_row(sae.pre_activations(rows).float().cpu(), min(latents, sae.d_sae))
    return [pieces[i] for i in keep], sae._normalized(rows)[0].float().cpu(), z


# -- arithmetic ------------------------------------------------------------------------------------------


def three_cuts(data: ExplorerData, *, k: Any = None, theta: Any = None, neighbours: Any = None) -> dict[str, Cut]:
    """What `row`, `batch` and `threshold` keep of the sentence, by the package's own cuts.

    k is a whole number, theta any number of at least 0; without them the data's own are taken. `neighbours` names the
    text that shares the batch. Ties go to the lower flat index, the sentence before its neighbours.
    """
    k, theta = data.k if k is None else k, data.theta if theta is None else theta
    if not isinstance(k, int | float) or not 1 <= k <= data.z.shape[1] or k != int(k):
        raise ValueError(f"k={k!r} is not a whole number from 1 to {data.z.shape[1]}, the number of latents")
    if not isinstance(theta, int | float) or not 0 <= theta < math.inf:
        raise ValueError(f"theta={theta!r} is not a number of at least 0")
    if (name := neighbours or ALONE) not in (ALONE, *data.neighbours):
        raise unknown("neighbours", str(name), [ALONE, *data.neighbours])
    batch = torch.cat([data.z, data.neighbours.get(name, data.z[:0])])
    kept = {"row": keep_row(data.z, int(k)), "batch": keep_batch(batch, int(k))[: len(data.z)]}
    kept["threshold"] = keep_above(data.z, torch.tensor(float(theta)))
    l0 = {name: (latents > 0).sum(dim=1) for name, latents in kept.items()}
    left = {name: float(data.errors.gather(1, l0[name][:, None]).double().sum()) for name in kept}
    return {name: Cut(kept[name] > 0, l0[name], left[name] / float(data.energy.double().sum())) for name in kept}


def payload(data: ExplorerData) -> dict[str, Any]:
    """What the browser needs. Arrays are bytes, float32 or int32: one token after the other, largest entry first."""
    values, columns = data.z.sort(dim=1, descending=True, stable=True)
    on, listed = values > 0, torch.arange(data.errors.shape[1]) <= (values > 0).sum(dim=1, keepdim=True)
    arrays = {"values": values[on], "columns": columns[on].int(), "errors": data.errors[listed], "energy": data.energy}
    beside = []  # name, tokens, and for each entry of the sentence: how many of theirs are larger
    for name, z in {ALONE: data.z[:0], **data.neighbours}.items():
        larger = z.numel() - torch.searchsorted(z.flatten().sort().values, values[on], right=True)
        beside.append([name, len(z), larger.int().numpy().tobytes()])
    shown = data.z.square().sum(dim=0).argsort(descending=True, stable=True)[:SHOWN].tolist()
    said = {"lengths": on.sum(dim=1).tolist(), "shown": shown, "beside": beside, "latents": data.z.shape[1]}
    said |= {name: getattr(data, name) for name in ("sentence", "pieces", "k", "theta")}
    return said | {name: array.contiguous().numpy().tobytes() for name, array in arrays.items()}


# -- in a notebook, on a page, as a picture --------------------------------------------------------------


@functools.cache
def _widget() -> Any:
    from anywidget import AnyWidget
    from traitlets import Bool, Dict, Unicode

    class ThreeCuts(AnyWidget):
        _esm = SCRIPT
        data, answer = Dict().tag(sync=True), Dict().tag(sync=True)  # answer: {"to": sentence, "message": its fault}
        live, sentence = Bool(False).tag(sync=True), Unicode().tag(sync=True)  # can it take another one; the one typed

        def __repr__(self) -> str:
            return f"three-cuts explorer: {len(self.data['pieces'])} tokens, {self.data['latents']} latents"

    return ThreeCuts


def explorer(source: Any, sae: Any = None, sentence: str = "", **options: Any) -> Any:
    """The widget, of an `ExplorerData`; or of a model, an SAE, a sentence and the options of `explorer_data`, and then
    it takes other sentences too."""
    data = source if isinstance(source, ExplorerData) else explorer_data(source, sae, sentence, **options)
    widget = _widget()(live=data is not source, sentence=data.sentence, data=payload(data))
    options["neighbours"] = data.neighbours  # their z, for they stay

    def typed(change: Any) -> None:
        message = ""
        try:
            widget.data = payload(explorer_data(source, sae, change["new"], **options))
        except Exception as error:  # whatever it is, the learner gets a sentence
            message = str(error) if type(error) is ValueError else f"this cannot be computed ({type(error).__name__})"
        widget.answer = {"to": change["new"], "message": message}

    widget.observe(typed, "sentence")
    return widget


def explorer_html(data: ExplorerData) -> Page:
    """The explorer as a page that needs no kernel and no network: shown in a notebook, or `.save(path)`."""
    return Page("Three cuts", SCRIPT, payload(data), 370 + len(data.pieces) * (20 if len(data.pieces) <= 24 else 15))


def explorer_figure(data: ExplorerData, **options: Any) -> Any:
    """Each token's entries, largest first, in colour where a cut keeps them: one panel for each cut. `options` are
    those of `three_cuts`: k, theta, neighbours."""
    from matplotlib.colors import to_rgb
    from matplotlib.font_manager import findfont, get_font

    cuts = three_cuts(data, **options)
    known = get_font(findfont("DejaVu Sans")).get_char_index
    names = ["".join(c if known(ord(c)) else "□" for c in piece.strip()) or "␣" for piece in data.pieces]
    wide = min(data.z.shape[1], 8 + max(int(cut.l0.max()) for cut in cuts.values()))
    shade = 0.4 * (data.z.sort(dim=1, descending=True).values[:, :wide, None] / data.z.max().clamp(min=1e-9)).sqrt()
    told = {name: f"{name}: mean L0 {cut.l0.float().mean():.1f}, error {cut.error:.3f}" for name, cut in cuts.items()}
    figure, axes = picture(f"Three cuts of a sentence. {'; '.join(told.values())}.", 3, 4.0, 1 + 0.2 * len(names))
    for axis, (name, cut), kin in zip(axes, cuts.items(), ("topk", "batchtopk", "jumprelu"), strict=True):
        kept = (torch.arange(wide) < cut.l0[:, None])[..., None]
        dye = 1 - torch.where(kept, torch.tensor(to_rgb(COLOURS[kin])), 0.45)
        image = (1 - dye * torch.where(kept, 0.2 + 2 * shade, shade)).numpy()
        axis.imshow(image, aspect="auto", interpolation="nearest", zorder=2)  # above the grid
        axis.set(title=told[name], xlabel="entries of the token, largest first")
        axis.set_yticks(range(len(names)), names if name == "row" else [""] * len(names), parse_math=False, fontsize=8)
    return figure
