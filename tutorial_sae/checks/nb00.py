"""Checks of notebook 00: a warm-up, whose stub is wrong on purpose."""

from __future__ import annotations

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, exercise, try_cases


def _l0(latents: Tensor) -> float:
    """The definition, by counting."""
    counts = [sum(value != 0 for value in row) for row in latents.tolist()]
    return sum(counts) / len(counts)


SLIPS = {
    "This is the share of all entries that are not 0, a number between 0 and 1. L0 counts latents per token: sum over "
    "the latents first, then average over the tokens.": lambda f: float((f != 0).float().mean()),
    "This is the count over all tokens together. L0 is a mean: divide by the number of tokens.": lambda f: float(
        (f != 0).sum()
    ),
    "This adds up the values of the latents. L0 counts them: how large a value is does not matter, only that it is "
    "not 0.": lambda f: float(f.sum(dim=-1).mean()),
    "This counts, for each latent, the tokens on which it is on. L0 counts, for each token, the latents.": lambda f: (
        float((f != 0).sum(dim=0).float().mean())
    ),
    "This is the count of one token only. L0 is the mean over all of them.": lambda f: float((f[0] != 0).sum()),
    "This is the largest count. L0 is the mean of the counts.": lambda f: float((f != 0).sum(dim=-1).max()),
}


@exercise("0.1", "how many latents?")
def l0(answer: object) -> str:
    small = torch.tensor([[0.9, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.7], [0.3, 0.1, 0.4, 0.0]])
    large = torch.rand(64, 256, generator=torch.Generator().manual_seed(0))
    cases = [
        Case("three tokens", (small,)),
        Case("one token", (small[:1],)),
        Case("a token with nothing", (torch.cat([small, torch.zeros(1, 4)]),)),
        Case("64 tokens", (large * (large > 0.9),)),
        Case("values far above 1", (50 * small,)),
    ]
    return try_cases(answer, _l0, cases, SLIPS)
