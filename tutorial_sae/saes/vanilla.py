"""Vanilla SAE: every positive entry survives, and an L1 penalty makes positive entries few.

    loss = |x - x_hat|^2 + l1 * sum_i f_i                 decoder_norm="unit": decoder rows are unit vectors
    loss = |x - x_hat|^2 + l1 * sum_i f_i |W_dec,i|       decoder_norm="weighted": they are free

Without either, the penalty could be cheated: halve the latents, double the decoder. It charges for size as well as for
number, so values come out too small (shrinkage). Unit rows: Bricken et al. 2023, Towards Monosemanticity, and the plain
form of Bussmann et al. 2024, section 2 (their code averages the squared error over d_in: its coefficient times d_in is
l1 here). Weighted: Anthropic's Circuits Updates of April 2024.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tutorial_sae.runtime import unknown
from tutorial_sae.saes.base import SAE


class VanillaSAE(SAE):
    """`l1`: weight of the L1 norm of a token's latents, in normalised units. The L0 it leads to is found by trying."""

    variant = "vanilla"
    cuts = ("own",)
    settings = ("l1", "decoder_norm")

    def __init__(self, d_in: int, d_sae: int, *, l1: int | float, decoder_norm: str = "unit", **options: Any):
        super().__init__(d_in, d_sae, **options)
        self.l1, self.decoder_norm = check_l1(l1), decoder_norm
        if decoder_norm not in ("unit", "weighted"):
            raise unknown("decoder_norm", str(decoder_norm), ("unit", "weighted"))

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        return z

    def penalty(self, z: Float[Tensor, "tokens d_sae"], latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, ""]:
        charged = latents if self.decoder_norm == "unit" else latents * self.W_dec.norm(dim=1)
        return self.l1 * charged.sum(dim=-1).mean()

    def project_decoder_grad(self) -> None:
        if self.decoder_norm == "unit":
            super().project_decoder_grad()

    def constrain(self) -> None:
        if self.decoder_norm == "unit":
            super().constrain()


def check_l1(l1: int | float) -> int | float:
    if not 0 <= l1 < float("inf"):
        raise ValueError(f"l1={l1} cannot be a penalty: choose a number of at least 0")
    return float(l1)
