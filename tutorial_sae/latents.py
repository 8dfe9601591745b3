"""Looking at single latents: where they fire, on text that was not trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae.activations import ActivationStore
from tutorial_sae.saes import SAE


class Example(NamedTuple):
    """A stretch of text around the token on which a latent fires, with the latent's value on each token."""

    pieces: list[str]
    values: list[float]  # 0 where it is silent, and on tokens that the mask leaves out
    peak: int  # which piece the example was chosen for
    source: str


def kind_of(piece: str) -> str:
    """What sort of token a piece of text is: the kinds between which BatchTopK's budget is compared."""
    if not piece.strip():
        return "space"
    if any(c.isdigit() for c in piece):
        return "digits"
    if not any(c.isalnum() for c in piece):
        return "punctuation"
    return "word start" if piece[0].isspace() else "word continuation"


@torch.no_grad()
def latent_values(
    sae: SAE, store: ActivationStore, latents: list[int], cut: str | None = None, batch: int = 4096
) -> Float[Tensor, "tokens chosen"]:
    """The values of a few latents on every activation of a store, in the order of its text."""
    wrong = [latent for latent in latents if not 0 <= latent < sae.d_sae]
    if wrong:
        raise IndexError(f"latent {wrong[0]} of an SAE with d_sae={sae.d_sae}: choose 0 to {sae.d_sae - 1}")
    parts = (store[part].to(sae.W_enc.device) for part in torch.arange(len(store)).split(batch))
    return torch.cat([sae.encode(x, cut)[:, latents].float().cpu() for x in parts])


def top_examples(
    sae: SAE, store: ActivationStore, latents: list[int], *, examples: int = 5, window: int = 12
) -> list[list[Example]]:
    """For each latent the contexts of its largest values, at most one from each row of text."""
    values = latent_values(sae, store, latents)
    found = []
    for column in values.T:
        mine: list[Example] = []
        rows: set[tuple[int, ...]] = set()
        for i in column.argsort(descending=True)[: 20 * examples].tolist():
            if column[i] <= 0 or len(mine) == examples:
                break
            context = store.context(i)
            if (row := tuple(context.tokens)) in rows:
                continue
            rows.add(row)
            start, stop = max(1, context.position - window), context.position + window + 1
            fired = dict(_neighbours(store, column, i, start, stop))
            pieces = context.pieces[start:stop]
            shown = [fired.get(position, 0.0) for position in range(start, start + len(pieces))]
            mine.append(Example(pieces, shown, context.position - start, context.source))
        found.append(mine)
    return found


def _neighbours(store: ActivationStore, column: Tensor, i: int, start: int, stop: int) -> list[tuple[int, float]]:
    """(position, value) of the activations around `i` in its row."""
    row, _ = store.place(i)
    found = []
    for j in range(max(0, i - (stop - start)), min(len(store), i + (stop - start))):
        other_row, other = store.place(j)
        if other_row == row and start <= other < stop:
            found.append((other, float(column[j])))
    return found
