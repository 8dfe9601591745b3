"""JumpReLU SAE: the entries above a learned threshold survive, one threshold theta for each latent.

    f = JumpReLU_theta(pi) = pi * H(pi - theta)          pi = (x - b_dec) @ W_enc + b_enc
    loss = |x - x_hat|^2 + l0_coefficient * L0           L0 = sum_i H(pi_i - theta_i)
    loss = |x - x_hat|^2 + d_in * (L0 / target_l0 - 1)^2                           the quadratic form

A step has no gradient, but the expected loss of many tokens has one in theta: the loss jumps for the tokens that cross
it. The straight-through estimators below count the tokens within a window of width `bandwidth` around theta, as a
kernel density estimate does. They need both halves of the window, and so pi before the jump.

Rajamanoharan et al. 2024, arXiv 2407.14435: the loss is its equation 9, the estimators are 11 and 12. Unless told
otherwise theta starts at the bandwidth, as in Gemma Scope (arXiv 2408.05147, section 3.2). Setting L0 by a quadratic
penalty is in Gemma Scope 2 (section 2.3); the strength d_in is ours. Of inputs scaled to E|x|^2 = 1 (one reading of
Gemma Scope's unit mean squared norm; the other is per coordinate, as here), thresholds and bandwidths times sqrt(d_in)
and coefficients times d_in are those here. The default bandwidth is wider than 0.001 in either reading: for short runs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tutorial_sae import ranks
from tutorial_sae.saes.base import SAE, check_theta

LEAST_THETA = 1e-6


class JumpReLU(torch.autograd.Function):
    """pi where pi > theta, else 0; d/d theta := -(theta / eps) K((pi - theta) / eps), K = 1 on (-1/2, 1/2)."""

    @staticmethod
    def forward(ctx: Any, pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pi, theta)
        ctx.bandwidth = bandwidth
        return torch.where(pi > theta, pi, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pi, theta = ctx.saved_tensors
        near = (pi - theta).abs() < ctx.bandwidth / 2
        by_theta = -(theta / ctx.bandwidth) * grads[0] * near
        return torch.where(pi > theta, grads[0], 0), by_theta.sum_to_size(theta.shape), None


class Step(torch.autograd.Function):
    """H(pi - theta), 1 where pi > theta; d/d theta := -(1 / eps) K((pi - theta) / eps), and no gradient for pi."""

    @staticmethod
    def forward(ctx: Any, pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pi, theta)
        ctx.bandwidth = bandwidth
        return (pi > theta).to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pi, theta = ctx.saved_tensors
        near = (pi - theta).abs() < ctx.bandwidth / 2
        return None, (-(1 / ctx.bandwidth) * grads[0] * near).sum_to_size(theta.shape), None


class JumpReLUSAE(SAE):
    """`l0_coefficient` charges for each latent kept, and the L0 it leads to is found by trying; `target_l0` asks for
    an L0. One of the two. `bandwidth` and `theta`, where thresholds start, are in normalised units (E|x|^2 = d_in).
    Thresholds move by about the learning rate in a step: for a few hundred steps start them near where they will end,
    of which 1 is a good guess.
    """

    variant = "jumprelu"
    cuts = ("own",)
    settings = ("l0_coefficient", "target_l0", "bandwidth", "theta")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l0_coefficient: int | float | None = None,
        target_l0: int | float | None = None,
        bandwidth: int | float = 0.5,
        theta: int | float | None = None,
        **options: Any,
    ):
        super().__init__(d_in, d_sae, **options)
        if (l0_coefficient is None) == (target_l0 is None):
            raise ValueError(
                f"l0_coefficient={l0_coefficient} and target_l0={target_l0}: give one of them, a price for each latent "
                "or the L0 to aim at"
            )
        if l0_coefficient is not None and not 0 <= l0_coefficient < float("inf"):
            raise ValueError(f"l0_coefficient={l0_coefficient} cannot be a penalty: choose a number of at least 0")
        if target_l0 is not None and not 0 < target_l0 <= d_sae:
            raise ValueError(f"target_l0={target_l0}: choose a number above 0 and up to d_sae={d_sae}")
        if not 0 < bandwidth < float("inf"):
            raise ValueError(f"bandwidth={bandwidth}: choose a positive number, in units where E|x|^2 = d_in")
        if theta is not None and not 0 < theta < float("inf"):
            raise ValueError(f"theta={theta}: choose a positive number, in units where E|x|^2 = d_in")
        self.l0_coefficient = None if l0_coefficient is None else float(l0_coefficient)
        self.target_l0 = None if target_l0 is None else float(target_l0)
        self.bandwidth, self.theta = float(bandwidth), float(bandwidth if theta is None else theta)
        self.threshold = nn.Parameter(torch.full((self.d_sae,), self.theta))

    def _pre(self, x_n: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_sae"]:
        return self._linear(x_n, self.b_enc)  # pi: no ReLU, for the window may reach below 0

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return super().pre_activations(x).relu()

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        if not (self.training and z.is_cuda):  # where asking is waiting; `constrain` keeps theta positive
            check_theta(self.threshold)
        return JumpReLU.apply(z, self.threshold, self.bandwidth)

    def penalty(self, z: Float[Tensor, "tokens d_sae"], latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, ""]:
        return self.price(Step.apply(z, self.threshold, self.bandwidth).sum(dim=-1).mean())

    def price(self, l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What a mean L0 costs; the square, where ranks step together, is of the mean over all of them."""
        l0 = l0 + (ranks.mean(l0.detach()) - l0.detach())
        if self.target_l0 is None:
            return self.l0_coefficient * l0  # type: ignore[operator]
        return self.d_in * (l0 / self.target_l0 - 1).square()

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_(min=LEAST_THETA)

    @torch.no_grad()
    def restart(self, latents: Int[Tensor, " n"], directions: Float[Tensor, "n d_in"], norm: float) -> None:
        super().restart(latents, directions, norm)
        self.threshold[latents] = self.theta
