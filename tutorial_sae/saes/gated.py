"""Gated SAE: one path decides which entries survive, another how large they are, and only the first is penalised.

    pi = (x - b_dec) @ W_gate + b_gate                           the gate: f is 0 where pi <= 0
    f  = 1[pi > 0] * relu((x - b_dec) @ W_mag + b_mag)           with W_mag = exp(r_mag) * W_gate, per latent
    loss = |x - x_hat|^2 + l1 * sum_i relu(pi_i) + |x - x_hat_frozen(relu(pi))|^2

The L1 norm pulls on the gate alone, so values are not shrunk. A gate has no gradient from f; the last term, in which
the decoder is a constant, teaches it. `W_enc` stores W_gate, `b_enc` stores b_mag. As the paths share their directions,
a gated SAE is a JumpReLU SAE with theta = max(0, b_mag - exp(r_mag) * b_gate). Rajamanoharan et al. 2024, arXiv
2404.16014, sections 3.2.1 and 3.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tutorial_sae.saes.base import SAE
from tutorial_sae.saes.vanilla import check_l1


class GatedSAE(SAE):
    """`l1`: weight of the L1 norm of the open gates, in normalised units. The L0 it leads to is found by trying.

    Inside, z is what both paths share: (x - b_dec) @ W_gate, without a bias.
    """

    variant = "gated"
    cuts = ("own",)
    settings = ("l1",)

    def __init__(self, d_in: int, d_sae: int, *, l1: int | float, **options: Any):
        super().__init__(d_in, d_sae, **options)
        self.l1 = check_l1(l1)
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    def _pre(self, x_n: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_sae"]:
        return self._linear(x_n)

    def magnitude(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return (self.r_mag.exp() * z + self.b_enc).relu()

    def gate(self, z: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, "tokens d_sae"]:
        return (z + self.b_gate).relu()

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.magnitude(super().pre_activations(x))

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        return torch.where(z + self.b_gate > 0, self.magnitude(z), 0)

    def penalty(self, z: Float[Tensor, "tokens d_sae"], latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, ""]:
        return self.l1 * self.gate(z).sum(dim=-1).mean()

    def aux(
        self, x_n: Float[Tensor, "tokens d_in"], z: Float[Tensor, "tokens d_sae"], error: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, ""]:
        frozen = self.gate(z) @ self.W_dec.detach() + self.b_dec.detach()
        return (x_n - frozen).float().square().sum(dim=-1).mean()

    @torch.no_grad()
    def restart(self, latents: Int[Tensor, " n"], directions: Float[Tensor, "n d_in"], norm: float) -> None:
        super().restart(latents, directions, norm)
        self.b_gate[latents] = 0.0
        self.r_mag[latents] = 0.0
