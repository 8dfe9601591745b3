"""Answers to lesson 08."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.answers import Answer
from tutorial_sae.checks import nb08 as check

# -- 8.1 -------------------------------------------------------------------------------------------------


def by_hand(values: Tensor, row: Tensor, n: int) -> list[int]:
    found: list[int] = []
    used = set()
    for i in values.argsort(descending=True, stable=True).tolist():
        if values[i] > 0 and len(found) < n and int(row[i]) not in used:
            found.append(i)
            used.add(int(row[i]))
    return found


def best_of_each_row(values: Tensor, row: Tensor, n: int) -> list[int]:
    """Rows first, then the best of each."""
    best = {}
    for r in row.unique().tolist():
        mine = (row == r).nonzero().flatten()
        best[r] = int(mine[values[mine].argmax()])
    chosen = [i for i in best.values() if values[i] > 0]
    return sorted(chosen, key=lambda i: (-values[i].item(), i))[:n]


def several(values: Tensor, row: Tensor, n: int, bar: float = 0.0) -> list[int]:
    down = values.argsort(descending=True, stable=True).tolist()
    return [i for i in down if values[i] > bar][:n]


def early(values: Tensor, row: Tensor, n: int) -> list[int]:
    return list({int(row[i]): i for i in reversed(several(values, row, n))}.values())[::-1]


def silent(values: Tensor, row: Tensor, n: int) -> list[int]:
    return by_hand(values + 1, row, n)


def first_of_row(values: Tensor, row: Tensor, n: int) -> list[int]:
    seen: dict[int, int] = {}
    for i in range(len(values)):
        if values[i] > 0:
            seen.setdefault(int(row[i]), i)
    return list(seen.values())[:n]


def smallest(values: Tensor, row: Tensor, n: int) -> list[int]:
    used, found = set(), []
    for i in values.argsort(stable=True).tolist():
        if values[i] > 0 and int(row[i]) not in used and len(found) < n:
            used.add(int(row[i]))
            found.append(i)
    return found


CONTEXTS = [
    Answer(check.contexts, "stub", (lambda v, r, n: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.contexts, "down the list", (by_hand,), None),
    Answer(check.contexts, "the best of each row", (best_of_each_row,), None),
    Answer(check.contexts, "several of a row", (several,), "are from one row"),
    Answer(check.contexts, "rows dropped too late", (early,), "drop repeated rows afterwards"),
    Answer(check.contexts, "filled up with zeros", (silent,), "it is silent"),
    Answer(check.contexts, "the first of each row", (first_of_row,), "first token of each row"),
    Answer(check.contexts, "in the order of the text", (lambda v, r, n: sorted(by_hand(v, r, n)),), "largest first"),
    Answer(check.contexts, "from below", (smallest,), "begin with the smallest"),
    Answer(
        check.contexts,
        "later of two equals",
        (lambda v, r, n: [len(v) - 1 - i for i in by_hand(v.flip(0), r.flip(0), n)],),
        "the earlier token comes first",
    ),
    Answer(check.contexts, "a tensor", (lambda v, r, n: torch.tensor(by_hand(v, r, n)),), "must be a list"),
    Answer(check.contexts, "no return", (lambda v, r, n: None,), "is a `return` missing"),
]

# -- 8.2 -------------------------------------------------------------------------------------------------


def written(sae: Any, latent: int, gain: Tensor, W_U: Tensor) -> Tensor:
    logits = (sae.W_dec[latent] * sae.norm_scale * gain) @ W_U
    return logits - logits.mean()


def written_centred(sae: Any, latent: int, gain: Tensor, W_U: Tensor) -> Tensor:
    """The unembedding centred once, the direction as a difference of two decodings."""
    one = torch.nn.functional.one_hot(torch.tensor(latent), sae.d_sae).float()
    raw = sae.decode(one) - sae.decode(0 * one)
    return torch.einsum("d,dv->v", raw * gain, W_U - W_U.mean(dim=1, keepdim=True))


def reads(sae: Any, latent: int, gain: Tensor, W_U: Tensor) -> Tensor:
    logits = sae.norm_scale * (sae.W_enc[:, latent] * gain) @ W_U
    return logits - logits.mean()


def units(sae: Any, latent: int, gain: Tensor, W_U: Tensor) -> Tensor:
    return written(sae, latent, gain, W_U) / sae.norm_scale


WRITES = [
    Answer(check.writes, "stub", (lambda s, j, g, u: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.writes, "row, scale, gain, W_U", (written,), None),
    Answer(check.writes, "a difference of decodings", (written_centred,), None),
    Answer(check.writes, "the encoder", (reads,), "what the latent *reads*"),
    Answer(check.writes, "normalised units", (units,), "`norm_scale` times that"),
    Answer(check.writes, "no gain", (lambda s, j, g, u: written(s, j, torch.ones(6), u),), "by its gain before"),
    Answer(check.writes, "not centred", (lambda s, j, g, u: s.W_dec[j] * s.norm_scale * g @ u,), "is still in"),
    Answer(check.writes, "probabilities", (lambda s, j, g, u: written(s, j, g, u).softmax(0),), "values are off"),
    Answer(check.writes, "transposed", (lambda s, j, g, u: written(s, j, g, u)[None],), "has shape"),
]

# -- 8.3 -------------------------------------------------------------------------------------------------

FIRES = [True, False] * 10
GOOD = "superlatives that rank a place"
GUESS = [
    Answer(check.guess, "untouched", (..., ..., FIRES), "not attempted"),
    Answer(check.guess, "all right", (GOOD, "yn" * 10, FIRES), None),
    Answer(check.guess, "six wrong, in capitals", (GOOD, "Y N " * 7 + "N Y " * 3, FIRES), None),
    Answer(check.guess, "eight wrong", (GOOD, "yn" * 6 + "ny" * 4, FIRES), "12 of 20 are right, 4 missed, 4 false"),
    Answer(check.guess, "always yes", (GOOD, "y" * 20, FIRES), "10 of 20 are right, 0 missed, 10 false"),
    Answer(check.guess, "upside down", (GOOD, "ny" * 10, FIRES), "0 of 20 are right, 10 missed, 10 false"),
    Answer(check.guess, "a word", ("superlatives", "yn" * 10, FIRES), "one word is a label"),
    Answer(check.guess, "nineteen letters", (GOOD, "yn" * 9 + "y", FIRES), "these are 19"),
    Answer(check.guess, "other letters", (GOOD, "tf" * 10, FIRES), "y or n"),
    Answer(check.guess, "a list of bools", (GOOD, FIRES, FIRES), "must be a str"),
]

# -- 8.4 -------------------------------------------------------------------------------------------------


def taken(sae: Any, x: Tensor, latent: int) -> Tensor:
    return x - sae.encode(x)[:, latent, None] * sae.W_dec[latent] * sae.norm_scale


def taken_by_error(sae: Any, x: Tensor, latent: int) -> Tensor:
    """The reconstruction without the latent, and the error put back."""
    latents = sae.encode(x)
    error = x - sae.decode(latents)
    latents = latents.clone()
    latents[:, latent] = 0
    return sae.decode(latents) + error


def reconstruction(sae: Any, x: Tensor, latent: int) -> Tensor:
    latents = sae.encode(x)
    latents[:, latent] = 0
    return sae.decode(latents)


TAKE = [
    Answer(check.take_out, "stub", (lambda s, x, j: (_ for _ in ()).throw(NotImplementedError),), "not attempted"),
    Answer(check.take_out, "value times direction", (taken,), None),
    Answer(check.take_out, "the error put back", (taken_by_error,), None),
    Answer(check.take_out, "the reconstruction", (reconstruction,), "own error is gone too"),
    Answer(check.take_out, "units", (lambda s, x, j: x - s.encode(x)[:, [j]] * s.W_dec[j],), "x is raw"),
    Answer(
        check.take_out,
        "projected out",
        (lambda s, x, j: x - (x @ s.W_dec[j])[:, None] * s.W_dec[j],),
        "all of x along the direction",
    ),
    Answer(
        check.take_out,
        "the pre-activation",
        (lambda s, x, j: x - s.pre_activations(x)[:, [j]] * s.norm_scale * s.W_dec[j],),
        "used the pre-activation",
    ),
    Answer(check.take_out, "added", (lambda s, x, j: 2 * x - taken(s, x, j),), "put the latent's part in"),
    Answer(check.take_out, "what is taken", (lambda s, x, j: x - taken(s, x, j),), "values are off"),
]

# -- questions -------------------------------------------------------------------------------------------

HEALED = {"A": "2", "B": "4", "C": "5", "D": "1"}
QUESTIONS = [
    Answer(check.hurts, "untouched", (...,), "not attempted"),
    Answer(check.hurts, "right", ("b",), None),
    Answer(check.hurts, "at the token itself", ("a",), "was predicted before"),
    Answer(check.hurts, "everywhere", ("c",), "a few places hurt"),
    Answer(check.hurts, "nowhere", ("d",), "nothing makes up for it"),
    Answer(check.hospital, "untouched", (...,), "not attempted"),
    Answer(check.hospital, "right", (HEALED,), None),
    Answer(check.hospital, "right, numbers and small letters", ({"a": 2, "b": 4, "c": 5, "d": 1},), None),
    Answer(check.hospital, "A has a low bar", (HEALED | {"A": "5", "C": "2"},), "Patient A, 2 of 4 right. A bar that"),
    Answer(check.hospital, "B is healthy", (HEALED | {"B": "6"},), "Patient B, 3 of 4 right. A healthy"),
    Answer(check.hospital, "B lacks the mean", (HEALED | {"B": "3"},), "Patient B, 3 of 4 right. A mean"),
    Answer(check.hospital, "C has short values", (HEALED | {"C": "4"},), "Patient C, 3 of 4 right. Values"),
    Answer(check.hospital, "D is half dead", (HEALED | {"D": "2"},), "Patient D, 3 of 4 right. A dead half"),
    Answer(check.hospital, "one patient missing", ({"A": "2", "B": "4", "C": "5"},), "A, B, C and D"),
    Answer(check.hospital, "words", (HEALED | {"A": "dead"},), "the number of a fault"),
    Answer(check.hospital, "a string", ("2451",), "must be a dict"),
]

ANSWERS = CONTEXTS + WRITES + GUESS + TAKE + QUESTIONS
