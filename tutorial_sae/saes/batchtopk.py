"""BatchTopK SAE: the n*k largest entries of a whole batch of n tokens survive, so a token spends what it is worth.

    training    f = BatchTopK(z, k)          loss = |x - x_hat|^2 + AuxK / 32
    inference   f = z where z > theta        theta = E[smallest entry kept in a batch], see `calibrate_threshold`

In training a token's code depends on its neighbours in the batch; one calibrated threshold undoes that, and makes it a
JumpReLU SAE whose latents share theta. Bussmann, Leask and Nanda 2024, arXiv 2412.06410, section 3.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae.saes.base import keep_above
from tutorial_sae.saes.jumprelu import JumpReLUSAE
from tutorial_sae.saes.topk import TopKSAE


class BatchTopKSAE(TopKSAE):
    """`k`: mean latents per token, whole or not. Cut by batch in train mode and by the threshold in eval mode."""

    variant = "batchtopk"
    cuts = ("batch", "row", "threshold")

    threshold: Tensor

    def __init__(self, d_in: int, d_sae: int, *, k: int | float, **options: Any):
        super().__init__(d_in, d_sae, k=k, **options)
        self.register_buffer("threshold", torch.tensor(float("nan")))

    @property
    def cut(self) -> str:
        return "batch" if self.training else "threshold"

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        if cut != "threshold":
            return super().keep(z, cut)
        self._check_calibrated()
        return keep_above(z, self.threshold)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (saved := state_dict.get(prefix + "threshold")) is not None:  # one, or one for each latent
            self.threshold = self.threshold.reshape(-1)[:1].expand(saved.numel()).reshape(saved.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_calibrated(self) -> None:
        if self.threshold.isnan().any():
            raise RuntimeError(
                "this BatchTopK SAE has no threshold yet: call calibrate_threshold(sae, activations) first, "
                "or cut by batch (sae.train(), or cut='batch')"
            )

    @torch.no_grad()
    def to_jumprelu(self) -> JumpReLUSAE:
        """The same SAE as a JumpReLU SAE, theta copied to every latent: its codes are equal, bit for bit."""
        self._check_calibrated()
        other = JumpReLUSAE(self.d_in, self.d_sae, target_l0=self.k, normalize=self.normalize)
        other = other.to(device=self.W_enc.device, dtype=self.W_enc.dtype)
        state = self.state_dict()
        other.load_state_dict(state | {"threshold": state["threshold"].expand(self.d_sae)})
        other.metadata = copy.deepcopy(self.metadata)
        return other.eval()
