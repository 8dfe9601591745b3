"""A toy world whose features are known, so that an SAE can be held against the truth.

    x = sum_i a_i * direction_i        a few of the features are active in each x, with values around 1

With a real language model nobody knows the features; here a low error with the wrong features can be told from a low
error with the right ones. The sizes are those of Chanin and Garriga-Alonso, Sparse but Wrong: 50 features in 100
dimensions, 11 active on average; frequencies and correlations are drawn in our own way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae.runtime import generator
from tutorial_sae.saes import SAE


class ToyWorld:
    """`features` orthonormal directions in `d_in` dimensions; common features fire more often than rare ones, `l0` of
    them per token on average. `correlated`: which features fire together follows a fixed random pattern."""

    def __init__(
        self, *, features: int = 50, d_in: int = 100, l0: int | float = 11, correlated: bool = False, seed: int = 0
    ):
        if not 0 < l0 <= features / 2 or features > d_in:
            raise ValueError(
                f"l0={l0}, features={features}, d_in={d_in}: choose 0 < l0 <= features / 2 and features <= d_in"
            )
        self.seed = seed
        chance = generator(seed, "toy world")
        self.directions = torch.linalg.qr(torch.randn(d_in, features, generator=chance)).Q.T.contiguous()
        self.frequency = torch.linspace(1.5, 0.5, features) * l0 / features  # a factor of 3 from first to last
        # features fire where a Gaussian is low; its covariance decides which go together
        shared = torch.randn(features, features // 5 + 1, generator=chance)
        loadings = shared if correlated else torch.zeros_like(shared)
        self._mixing = torch.cat([loadings, torch.eye(features)], dim=1)
        self._mixing /= self._mixing.norm(dim=1, keepdim=True)

    def sample(self, n: int, seed: int = 0) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens features"]]:
        """n activations, and the feature values that they are made of."""
        chance = generator(self.seed, "toy sample", seed)
        drawn = torch.randn(n, self._mixing.shape[1], generator=chance) @ self._mixing.T
        active = torch.special.ndtr(drawn) < self.frequency
        values = (1 + 0.15 * torch.randn(n, len(self.directions), generator=chance)).clamp(min=0.05) * active
        return values @ self.directions, values


class Recovery(NamedTuple):
    mmcs: float  # mean max cosine similarity: over features, of the largest cosine with a decoder row
    f1: float  # mean over features of the F1 score of that latent as a detector of its feature


@torch.no_grad()
def recovery(sae: SAE, world: ToyWorld, tokens: int = 10_000) -> Recovery:
    """How well the latents of `sae`, cut as its mode cuts, are the features of `world`."""
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    largest, latent = (world.directions @ rows.T).max(dim=1)
    x, values = world.sample(tokens, seed=-1)
    on, active = sae.encode(x)[:, latent] > 0, values > 0
    both = (on & active).sum(dim=0)
    return Recovery(float(largest.mean()), float((2 * both / (on.sum(dim=0) + active.sum(dim=0)).clamp(min=1)).mean()))
