"""Looking inside: where a latent fires, with which others, what it writes, and what changes without it or with more.

    index = Latents(sae, store)                       every value on held-out text, by latent: made once, in a second
    index.examples(421)                               contexts of its largest values; at=0.5: from the middle
    index.together(421)                               the latents that fire where it fires
    logit_effects(model, sae, [421])                  what its direction adds to the logits of next tokens
    ablation(model, sae, tokens, 421)                 cross-entropy without it, token by token
    steered(model, sae, "The ferry", 421, value=9)    how the text goes on with its direction added

What a latent is like where it fires is a correlation; ablation and steering are what it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tutorial_sae.activations import ActivationStore
from tutorial_sae.metrics import check_belongs
from tutorial_sae.models import activations_at, continued, describe, prompt_tokens, token_losses, unembedded
from tutorial_sae.saes import SAE


class Example(NamedTuple):
    """A stretch of text around the token on which a latent fires, with the latent's value on each token."""

    pieces: list[str]
    values: list[float]  # 0 where it is silent, and on tokens that the mask leaves out
    peak: int  # which piece the example was chosen for
    source: str


class Together(NamedTuple):
    """A latent that fires on the same tokens as another."""

    latent: int
    share: float  # of the other's tokens
    cosine: float  # tokens of both / sqrt(tokens of one * tokens of the other)


def kind_of(piece: str) -> str:
    """What sort of token a piece of text is: the kinds between which BatchTopK's budget is compared."""
    if not piece.strip():
        return "space"
    if any(c.isdigit() for c in piece):
        return "digits"
    if not any(c.isalnum() for c in piece):
        return "punctuation"
    return "word start" if piece[0].isspace() else "word continuation"


def check_latent(sae: SAE, latent: int) -> None:
    if not 0 <= latent < sae.d_sae:
        raise IndexError(f"latent {latent} of an SAE with d_sae={sae.d_sae}: choose 0 to {sae.d_sae - 1}")


class Latents:
    """The values of `sae`, cut as its mode cuts unless `cut` is named, on all activations of a store.

    - `density` (d_sae,): fraction of the activations on which each latent fires
    - `peak` (d_sae,): its largest value, in normalised units; 0 for a latent that never fires

    A latent that never fires has no examples and no company; one out of range raises `IndexError`.
    """

    density: Float[Tensor, " d_sae"]
    peak: Float[Tensor, " d_sae"]

    @torch.no_grad()
    def __init__(self, sae: SAE, store: ActivationStore, cut: str | None = None, batch: int = 4096):
        self.sae, self.store = sae, store
        places, values = [], []
        for part in torch.arange(len(store)).split(batch):
            latents = sae.encode(store[part].to(sae.W_enc.device), cut).float().cpu()
            on = latents.nonzero()
            places.append(on + torch.tensor([int(part[0]), 0]))
            values.append(latents[on[:, 0], on[:, 1]])
        token, latent = torch.cat(places).T
        order = latent.argsort(stable=True)  # by latent, and in each by token
        self._token, self._value = token[order], torch.cat(values)[order]
        self._latent_of, counts = latent, torch.bincount(latent, minlength=sae.d_sae)
        self._start = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        self._row = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(token, minlength=len(store)).cumsum(0)])
        self.density = counts / len(store)
        self.peak = torch.zeros(sae.d_sae).scatter_reduce(0, latent[order], self._value, "amax")
        self._place = [store.place(i) for i in range(len(store))]

    def fired(self, latent: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """The activations on which a latent fires, in the order of the text, and its values on them."""
        check_latent(self.sae, latent)
        mine = slice(int(self._start[latent]), int(self._start[latent + 1]))
        return self._token[mine], self._value[mine]

    def examples(self, latent: int, examples: int = 5, *, window: int = 12, at: float = 1.0) -> list[Example]:
        """Contexts whose values lie nearest to `at` times the peak, at most one from each row of text."""
        token, value = self.fired(latent)
        wanted = (value - at * self.peak[latent]).abs().argsort(stable=True)
        fired = dict(zip(token.tolist(), value.tolist(), strict=True))
        found: dict[int, Example] = {}
        for i in token[wanted].tolist():
            if len(found) == examples:
                break
            row, position = self._place[i]
            if row not in found:
                context, start = self.store.context(i), max(1, position - window)
                pieces = context.pieces[start : position + window + 1]
                near = range(max(0, i - window), min(len(self._place), i + window + 1))
                at_position = {self._place[j][1]: fired.get(j, 0.0) for j in near if self._place[j][0] == row}
                values = [at_position.get(start + offset, 0.0) for offset in range(len(pieces))]
                found[row] = Example(pieces, values, position - start, context.source)
        return list(found.values())

    def together(self, latent: int, n: int = 5) -> list[Together]:
        """The n latents whose tokens are most alike to this one's, by cosine."""
        token, _ = self.fired(latent)
        if not len(token):
            return []
        entries = [self._latent_of[self._row[i] : self._row[i + 1]] for i in token.tolist()]
        both = torch.bincount(torch.cat(entries), minlength=self.sae.d_sae).double()
        cosine = both / (self._start.diff() * len(token)).clamp(min=1).sqrt()
        cosine[latent] = 0
        best = [other for other in cosine.argsort(descending=True, stable=True)[:n].tolist() if both[other]]
        return [Together(other, float(both[other]) / len(token), float(cosine[other])) for other in best]


# -- what a latent does ----------------------------------------------------------------------------------


def direction(sae: SAE, latent: int) -> Float[Tensor, " d_in"]:
    """What one unit of a latent adds to a raw activation."""
    check_latent(sae, latent)
    if sae.normalize == "token":
        raise ValueError('normalize="token" scales each token by itself, so a latent has no one direction in raw units')
    return (sae.W_dec[latent] * sae.norm_scale).detach().float()


@torch.no_grad()
def logit_effects(model: Any, sae: SAE, latents: Sequence[int]) -> Float[Tensor, "n vocab"]:
    """What one unit of each latent adds to the logits of next tokens if nothing between here and there reads it: its
    direction times the final norm's gain and the unembedding, less the mean over the vocabulary. The length to which
    the final norm scales a token is left out, so the order means something and the unit does not.
    """
    check_belongs(sae, model)
    return unembedded(model, torch.stack([direction(sae, latent) for latent in latents]))


@torch.no_grad()
def ablation(model: Any, sae: SAE, tokens: Int[Tensor, "rows pos"], latent: int) -> Float[Tensor, "rows pos-1"]:
    """How much harder each next token becomes, in nats, once what a latent adds is taken off every activation.

    `tokens` are rows as a store makes them, BOS first. All else stays, the SAE's own error too; so does what the
    SAE's mask leaves out.
    """
    check_belongs(sae, model)
    card, mask = describe(model), sae.metadata.get("mask") or {}
    hook, off = sae.metadata.get("hook") or card.hook, direction(sae, latent)
    x = activations_at(model, tokens, hook)
    kept = ~torch.isin(tokens, torch.tensor(card.special)) & (x.norm(dim=-1).cpu() <= mask.get("norm_limit", math.inf))
    values = sae.encode(x.float())[..., latent, None] * kept[..., None].to(x.device)
    return (token_losses(model, tokens, hook, x - values * off) - token_losses(model, tokens, hook, x)).cpu()


@torch.no_grad()
def steered(
    model: Any,
    sae: SAE,
    prompt: str,
    latent: int,
    value: int | float,
    *,
    tokens: int = 30,
    temperature: int | float = 0.0,
    seed: int = 0,
) -> str:
    """How the model goes on after `prompt` with `value` units of a latent's direction added behind every token but BOS.

    `value` is in the units of `Latents.peak`: about as much as it ever is; 0 gives the text without steering, and the
    larger the value, the sooner the text breaks. `temperature` 0 takes the likeliest token each time.

    Raises `ValueError` for a prompt longer than the context, `IndexError` for a latent out of range.
    """
    check_belongs(sae, model)
    added = value * direction(sae, latent)
    if not math.isfinite(value):
        raise ValueError(f"value={value}: give a finite number, such as the latent's peak")
    hook = sae.metadata.get("hook") or describe(model).hook
    return continued(model, prompt_tokens(model, prompt), hook, added, tokens, temperature, seed)
