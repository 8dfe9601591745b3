"""Vanilla SAE: every positive entry survives, and an L1 penalty makes positive entries few.

    loss = |x - x_hat|^2 + l1 * sum_i f_i        unit decoder rows

The penalty charges for size as well as for number, so values come out too small (shrinkage). Bricken et al. 2023,
Towards Monosemanticity; the plain form of Bussmann et al. 2024, section 2.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tutorial_sae.saes.base import SAE


class VanillaSAE(SAE):
    """`l1`: weight of the L1 norm of a token's latents, in normalised units. The L0 it leads to is found by trying."""

    variant = "vanilla"
    cuts = ("own",)
    settings = ("l1",)

    def __init__(self, d_in: int, d_sae: int, *, l1: int | float, normalize: str = "dataset", seed: int = 0):
        super().__init__(d_in, d_sae, normalize=normalize, seed=seed)
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1={l1} is no penalty: choose a number of at least 0")
        self.l1 = l1

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        return z

    def penalty(self, latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, ""]:
        return self.l1 * latents.sum(dim=-1).mean()
