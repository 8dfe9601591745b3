"""TopK SAE: the k largest entries of each token survive. No penalty; AuxK revives dead latents.

    f = TopK(z, k)        loss = |x - x_hat|^2 + AuxK / 32

AuxK lets the latents that have been silent for long reconstruct what the living left over, e = x - x_hat:
|e - e_hat|^2 with e_hat made of the `aux_k` largest dead entries of each token. Gao et al. 2024, arXiv 2406.04093,
sections 2.3 and 2.4; aux_k = 512 and 1/32 as in Bussmann et al. 2024, section 2.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tutorial_sae import ranks
from tutorial_sae.saes.base import SAE, keep_batch, keep_row

AUX_COEFFICIENT = 1 / 32


class TopKSAE(SAE):
    """`k`: latents per token. `aux_k`: latents of AuxK, 0 for none. `dead_after_tokens`: silence after which a latent
    counts as dead; `train` sets it."""

    variant = "topk"
    cuts = ("row", "batch")
    settings = ("k", "aux_k", "dead_after_tokens")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | float,
        aux_k: int = 512,
        dead_after_tokens: int = 10_000_000,
        **options: Any,
    ):
        super().__init__(d_in, d_sae, **options)
        if aux_k < 0 or dead_after_tokens < 1:
            raise ValueError(f"aux_k={aux_k}, dead_after_tokens={dead_after_tokens}: choose at least 0, and at least 1")
        self.k, self.aux_k, self.dead_after_tokens = k, int(aux_k), int(dead_after_tokens)
        self.global_cut = True  # where several ranks train: cut their batches as one, or each by itself

    @property
    def k(self) -> int | float:
        return self._k

    @k.setter
    def k(self, k: int | float) -> None:
        if not k > 0:
            raise ValueError(f"k={k} keeps nothing: choose k > 0 (and k <= {self.d_sae})")
        if k > self.d_sae:
            raise ValueError(f"k={k} exceeds d_sae={self.d_sae}: choose k <= {self.d_sae}")
        if k != int(k) and self.variant == "topk":
            raise ValueError(
                f"k={k} is not whole, and TopK counts entries of each token: choose k={max(1, round(k))}, or BatchTopK"
            )
        self._k = int(k) if k == int(k) else float(k)

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        if cut == "batch":
            with ranks.apart(not self.global_cut):
                return keep_batch(z, self.k)
        if self.k != int(self.k):
            raise ValueError(f"k={self.k} is not whole, so no row can keep k entries: cut by batch, or set sae.k")
        return keep_row(z, int(self.k))

    def aux(
        self, x_n: Float[Tensor, "tokens d_in"], z: Float[Tensor, "tokens d_sae"], error: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, ""]:
        return self.auxk(x_n, error)

    def auxk(self, x_n: Float[Tensor, "tokens d_in"], error: Float[Tensor, "tokens d_in"]) -> Float[Tensor, ""]:
        """AuxK by itself, from z of the dead alone: the fast path has no other z."""
        none, waited = error.new_zeros(()), len(x_n) * ranks.world()
        if self.alive_until is not None and self.alive_until > 0:
            self.alive_until -= waited
            if self.alive_until > 0:
                return none
        if not self.training or self.aux_k == 0:
            return none
        dead = (self.tokens_since_fired >= self.dead_after_tokens).nonzero().squeeze(1)
        if len(dead) == 0:
            if self.alive_until is not None:  # the one that is silent for longest cannot be dead before
                self.alive_until = self.dead_after_tokens - int(self.tokens_since_fired.max())
            return none
        W_enc = self.W_enc.T.index_select(0, dead)  # rows, as they lie in memory
        # b_dec by itself: taken off x_n, its gradient would need one more product of matrices
        z = (x_n @ W_enc.T + (self.b_enc.index_select(0, dead) - W_enc @ self.b_dec)).relu()
        revived = keep_row(z, min(self.aux_k, len(dead)))
        error_hat = revived @ self.W_dec.index_select(0, dead)  # without b_dec: the error has none left in it
        return AUX_COEFFICIENT * (error - error_hat.float()).square().sum(dim=-1).mean()
