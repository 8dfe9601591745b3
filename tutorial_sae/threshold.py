"""From a batch to a number: the threshold with which a BatchTopK SAE is used after training.

    theta = E_X[ min { z_ij(X) : z_ij(X) kept } ]        the mean, over batches X, of the smallest entry kept

Bussmann, Leask and Nanda 2024, arXiv 2412.06410, section 3. The paper does not say how many batches, or which data;
here they are data that were not trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae.runtime import unknown
from tutorial_sae.saes import SAE, BatchTopKSAE

METHODS = ("batch_min_mean",)


class Calibration(NamedTuple):
    theta: float  # in normalised units
    l0: float  # mean number of latents per token at theta, on the same data
    spread: float  # standard deviation of the per-batch estimates


@torch.no_grad()
def calibrate_threshold(
    sae: SAE,
    activations: Float[Tensor, "tokens d_in"] | Iterable[Float[Tensor, "_ d_in"]],
    *,
    method: str = "batch_min_mean",
    batch_size: int = 1024,
) -> Calibration:
    """Estimate theta for a BatchTopK SAE and set `sae.threshold`. The mode of the SAE does not matter and is kept.

    `activations` is a tensor of raw activations, cut in order into batches of `batch_size` (a last partial one is left
    out unless it is the only one), or anything that yields batches. theta belongs to the distribution of these data.

    Raises `TypeError` for other variants, `ValueError` when no entry of any batch is kept.
    """
    if not isinstance(sae, BatchTopKSAE):
        raise TypeError(f"a {sae.variant} SAE has no batch cut to replace: only BatchTopK SAEs are calibrated")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    if isinstance(activations, Tensor):
        whole = max(len(activations) // batch_size * batch_size, min(len(activations), batch_size))
        batches: Iterable[Tensor] = activations[:whole].split(batch_size)
    else:
        batches = list(activations)  # gone through twice: for theta, then for L0 at theta
    device = sae.W_enc.device
    smallest = []
    for x in batches:
        latents = sae.encode(x.to(device), cut="batch")
        if (latents > 0).any():
            smallest.append(latents[latents > 0].min().float())
    if not smallest:
        raise ValueError(
            "no latent is positive on any of these activations, so there is no smallest entry to average: "
            "check that they come from the SAE's own model and hook, and that the SAE was trained"
        )
    minima = torch.stack(smallest)
    sae.threshold.copy_(minima.mean())
    kept = tokens = 0
    for x in batches:
        kept += int((sae.encode(x.to(device), cut="threshold") > 0).sum())
        tokens += len(x)
    spread = float(minima.std()) if len(minima) > 1 else 0.0
    return Calibration(float(sae.threshold), kept / tokens, spread)
