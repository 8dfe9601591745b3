"""Checks of lesson 08: interpreting latents.

What a check says to a known slip, or to a wrong letter, stands in its docstring, under the name by which `sentences`
finds the function that makes the slip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, choose, exercise, like, sentences, try_cases
from tutorial_sae.runtime import generator
from tutorial_sae.saes import BatchTopKSAE


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "nb08"))


def _sae() -> BatchTopKSAE:
    """A small SAE whose units are not those of the activations, and whose encoder is not its decoder's transpose."""
    sae = BatchTopKSAE(6, 10, k=3).requires_grad_(False).eval()
    sae.fit_normalization(4 * _draw(200, 6) + 1)
    sae.threshold.fill_(0.5)
    sae.W_enc.copy_(_draw(6, 10))
    sae.b_dec.copy_(_draw(6))
    sae.W_dec *= torch.linspace(0.5, 2, 10)[:, None]  # rows need not be of length 1
    return sae


def _down(values: Tensor, least: float = 0.0) -> list[int]:
    """Those above `least`, largest first; of equals the earlier first."""
    return [i for i in sorted(range(len(values)), key=lambda i: -float(values[i])) if values[i] > least]


def _firsts(order: list[int], row: Tensor, n: int) -> list[int]:
    """The first of each row in this order, up to n."""
    return [i for j, i in enumerate(order) if all(row[i] != row[other] for other in order[:j])][:n]


def _tops(values: Tensor, row: Tensor, n: int) -> list[int]:
    return _firsts(_down(values), row, n)


@exercise("8.1", "contexts by hand")
def contexts(top_contexts: Any) -> str:
    """row: Several of your tokens are from one row of text: ten neighbours show one context ten times. Take the largest
        of each row.
    early: You take the n largest first and drop repeated rows afterwards, so fewer than n are left. Go on down the list
        until n rows are found.
    silent: Where the latent's value is 0 it is silent: there is no context to show, even if fewer than n are left.
    first: You take the first token of each row on which the latent fires: the largest of each row is wanted.
    text: The right tokens in the order of the text: largest first is wanted.
    smallest: You begin with the smallest values. (`argsort` goes up unless told `descending=True`.)
    later: Of two equal values the earlier token comes first. A stable sort keeps the order of equals.
    """
    slips = sentences(
        contexts,
        row=lambda v, row, n: _down(v)[:n],
        early=lambda v, row, n: _firsts(_down(v)[:n], row, n),
        silent=lambda v, row, n: _firsts(_down(v, -1.0), row, n),
        first=lambda v, row, n: _tops((v > 0) / (1.0 + torch.arange(len(v))), row, n),
        text=lambda v, row, n: sorted(_tops(v, row, n)),
        smallest=lambda v, row, n: _firsts(_down(v)[::-1], row, n),
        later=lambda v, row, n: [len(v) - 1 - i for i in _tops(v.flip(0), row.flip(0), n)],
    )
    small, row = torch.tensor([0.0, 2.0, 5.0, 4.0, 0.0, 3.0, 1.0, 0.0]), torch.tensor([4, 4, 4, 4, 5, 5, 6, 7])
    cases = [Case(f"the {n} of a small text", (small, row, n)) for n in (2, 3, 5)]
    cases += [Case("ties", ((2 * _draw(300, seed=3)).relu().round(decimals=1), torch.arange(300) // 20, 10))]
    return try_cases(top_contexts, _tops, [*cases, Case("a latent that never fires", (0 * small, row, 3))], slips)


def _written(sae: Any, latent: int, gain: Tensor, W_U: Tensor, scale: float = 1.0) -> Tensor:
    row = (sae.W_dec[latent] * sae.norm_scale * scale * gain).tolist()
    logits = torch.tensor([sum(a * float(b) for a, b in zip(row, column, strict=True)) for column in W_U.T])
    return logits - logits.mean()


@exercise("8.2", "what a latent writes")
def writes(written: Any) -> str:
    """reads: That is the encoder's column, what the latent *reads*. What it writes is its row of the decoder.
    units: One unit of a latent adds `W_dec[latent]` to the *normalised* activation, so `norm_scale` times that to the
        raw one, which is what the language model goes on with.
    gain: The final norm multiplies each coordinate by its gain before the unembedding: that is missing.
    level: The mean over the vocabulary is still in. What all logits share changes no probability: subtract it.
    """
    slips = sentences(
        writes,
        reads=lambda s, j, g, u: (y := s.W_enc[:, j] * s.norm_scale * g @ u) - y.mean(),
        units=lambda s, j, g, u: _written(s, j, g, u, 1 / float(s.norm_scale)),
        gain=lambda s, j, g, u: _written(s, j, g / g, u),
        level=lambda s, j, g, u: s.W_dec[j] * s.norm_scale * g @ u,
    )
    gain, W_U = 1 + _draw(6, seed=5).abs(), _draw(6, 9, seed=6) + 1
    return try_cases(written, _written, [Case(f"latent {j}", (_sae(), j, gain, W_U)) for j in (0, 7)], slips)


@exercise("8.3", "guess the latent", kind="open-ended")
def guess(explanation: Any, guesses: Any, fires: Any) -> str:
    if len(like(explanation, "", "your explanation").split()) < 3:
        raise Failed("your explanation should say in a few words when the latent fires: one word is a label.")
    said = "".join(like(guesses, "", "your guesses").lower().split())
    if len(said) != len(fires) or set(said) - {"y", "n"}:
        raise Failed(f"{len(fires)} letters are wanted, y or n, one for each context; these are {len(said)}.")
    missed, false = (sum(a == no and on == (no == "n") for a, on in zip(said, fires, strict=True)) for no in "ny")
    told = f"{len(said) - missed - false} of {len(said)} are right, {missed} missed, {false} false alarms"
    if missed + false > 0.3 * len(said):
        raise Failed(f"{told}: luck alone often does as well. What do the contexts share that you left out?")
    return told


def _off(sae: Any, x: Tensor, latent: int) -> Tensor:
    left = sae.encode(x).index_fill(1, torch.tensor([latent]), 0.0)
    return x - (sae.decode(sae.encode(x)) - sae.decode(left))


@exercise("8.4", "take a latent out")
def take_out(without: Any) -> str:
    """error: You give the reconstruction without the latent. Then the SAE's own error is gone too, and you would
        measure both. Take the latent's part off x itself.
    units: The latent's part is in normalised units, x is raw: `norm_scale` is missing.
    line: You took all of x along the direction away. Other latents have parts along it, and where the latent is silent
        there is nothing of its own to take.
    uncut: You used the pre-activation. What the cut does not keep was never in the reconstruction.
    added: The sign: you put the latent's part in once more.
    """
    slips = sentences(
        take_out,
        error=lambda s, x, j: _off(s, x, j) - x + s(x),
        units=lambda s, x, j: x - s.encode(x)[:, [j]] * s.W_dec[j],
        line=lambda s, x, j: x - (x @ s.W_dec[j])[:, None] * s.W_dec[j],
        uncut=lambda s, x, j: x - s.pre_activations(x)[:, [j]] * s.norm_scale * s.W_dec[j],
        added=lambda s, x, j: x + s.encode(x)[:, [j]] * s.norm_scale * s.W_dec[j],
    )
    sae, x = _sae(), 4 * _draw(40, 6, seed=8) + 1
    return try_cases(without, _off, [Case(f"latent {j}", (sae, x, j)) for j in (2, 9)], slips)


@exercise("8.5", "where does it hurt", kind="predict")
def hurts(answer: Any) -> str:
    """a: *both* was predicted before the latent fired on it: the loss of a token is decided at the places before it.
    c: See the figures below: a few places hurt, and the rest hardly move.
    d: So one may fear of any redundant code. But see the texts below: nothing makes up for it at the *and*.
    """
    return choose(answer, "b", sentences(hurts), "where the latent's news is needed")


@exercise("8.6", "the SAE hospital", kind="diagnose")
def hospital(diagnosis: Any) -> str:
    """1: Twins show in the cosines of the decoder: a bar near 1.
    2: A dead half shows in the densities: half of all latents at "never".
    3: A mean that was not subtracted throws FVU far up and γ well above 1, with L0 hardly changed.
    4: Values that are too small show in γ, well below 1, while L0, densities and cosines are those of the healthy SAE.
    5: A bar that is too low shows in L0, with *all* densities moved to the right, and FVU even lower than healthy.
    6: A healthy SAE would agree with the grey one in both figures, and with the first line of the table.
    """
    found, signs = {"A": "2", "B": "4", "C": "5", "D": "1"}, sentences(hospital)
    said = {str(key).strip().upper(): str(value).strip() for key, value in like(diagnosis, {}).items()}
    if sorted(said) != sorted(found) or set(said.values()) - set(signs):
        raise Failed("give each of the patients A, B, C and D the number of a fault, 1 to 6.")
    off = [patient for patient in found if said[patient] != found[patient]]
    if off:
        raise Failed(f"Patient {off[0]}, {4 - len(off)} of 4 right. {signs[said[off[0]]]} Does {off[0]} show that?")
    return "four patients, four faults"
