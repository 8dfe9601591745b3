"""From a batch to a number: the threshold with which a BatchTopK SAE is used after training.

    batch_min_mean    theta = E_X[ min { z_ij(X) : z_ij(X) kept } ]     the paper's: the mean over batches X of the
                      smallest entry kept
    ema               the same minima in a moving average, as some libraries do while they train; it starts at 0, and
                      without the correction 1 / (1 - decay^t) it is still on its way up after a short run
    target_l0         the theta that keeps k entries per token of all the data at once: its 1 - k / d_sae quantile
    learned           a theta for each latent, from batch_min_mean's, fine-tuned by JumpReLU's estimator with the
                      weights frozen

Bussmann, Leask and Nanda 2024, arXiv 2412.06410, section 3. The paper does not say how many batches, or which data;
here they are data that were not trained on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae import sparse
from tutorial_sae.runtime import unknown
from tutorial_sae.saes import SAE, BatchTopKSAE
from tutorial_sae.saes.base import budget_of

METHODS = ("batch_min_mean", "ema", "target_l0", "learned")
FEW_ENTRIES = 100  # kept entries on which no threshold should rest
LEARNED_STEPS = 200


class Calibration(NamedTuple):
    theta: float | Float[Tensor, " d_sae"]  # in normalised units; one for each latent where it was learned
    l0: float  # mean number of latents per token at theta, on the same data
    spread: float  # standard deviation of the per-batch estimates


@torch.no_grad()
def calibrate_threshold(
    sae: SAE,
    activations: Float[Tensor, "tokens d_in"] | Iterable[Float[Tensor, "_ d_in"]],
    *,
    method: str = "batch_min_mean",
    batch_size: int = 1024,
    bias_correction: bool = True,
    decay: float = 0.99,
) -> Calibration:
    """Estimate theta for a BatchTopK SAE and set `sae.threshold`. The mode of the SAE does not matter and is kept.

    `activations` is a tensor of raw activations, cut in order into batches of `batch_size` (a last partial one is left
    out unless it is the only one), or anything that yields batches. theta belongs to the distribution of these data.
    `bias_correction` and `decay` are those of `ema`.

    Raises `TypeError` for other variants, `ValueError` for too few tokens and when no entry of any batch is kept.
    """
    if not isinstance(sae, BatchTopKSAE):
        raise TypeError(f"a {sae.variant} SAE has no batch cut to replace: only BatchTopK SAEs are calibrated")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: choose at least 1")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: choose a number from 0 to below 1")
    if isinstance(activations, Tensor):
        whole = max(len(activations) // batch_size * batch_size, min(len(activations), batch_size))
        batches = list(activations[:whole].split(batch_size))
    else:
        batches = list(activations)  # gone through more than once: for theta, then for L0 at theta
    batches = [x.to(sae.W_enc.device) for x in batches if len(x)]
    _check_amount(sae, sum(len(x) for x in batches))

    smallest = [latents[latents > 0].min() for x in batches if (latents := sae.encode(x, cut="batch")).any()]
    if not smallest:
        raise ValueError(
            "no latent is positive on any of these activations, so there is no smallest entry to average: "
            "check that they come from the SAE's own model and hook, and that the SAE was trained"
        )
    minima = torch.stack(smallest).float()
    theta = minima.mean()
    if method == "ema":
        theta = _moving_average(minima, decay, bias_correction)
    elif method == "target_l0":
        batches_kept = [x for x in batches if sae.pre_activations(x).any()]
        theta, minima = _pooled(sae, batches, minima), torch.stack([_pooled(sae, [x]) for x in batches_kept])
    elif method == "learned":
        theta = _learned(sae, batches, theta)
    sae.threshold = theta.to(sae.W_enc.device)
    kept = sum(int((sae.encode(x, cut="threshold") > 0).sum()) for x in batches)
    spread = float(minima.std()) if len(minima) > 1 else 0.0
    result = theta.clone() if theta.dim() else float(theta)
    return Calibration(result, kept / sum(len(x) for x in batches), spread)


def _check_amount(sae: BatchTopKSAE, tokens: int) -> None:
    if tokens * sae.k + 1e-6 < 1:
        raise ValueError(
            f"{tokens} activations are too few to calibrate on: k={sae.k} needs {math.ceil(1 / sae.k)} at the very "
            "least, and 32 batches of 1024 give a threshold to rely on"
        )
    if tokens * sae.k < FEW_ENTRIES:
        warnings.warn(
            f"the threshold rests on {tokens} activations, about {tokens * sae.k:.0f} entries: 32 batches of 1024 "
            "activations give one to rely on",
            stacklevel=3,
        )


def _moving_average(minima: Float[Tensor, " batches"], decay: float, bias_correction: bool) -> Float[Tensor, ""]:
    average = torch.zeros((), dtype=torch.float64)
    for smallest in minima.cpu().double():
        average = decay * average + (1 - decay) * smallest
    return (average / (1 - decay ** len(minima)) if bias_correction else average).float()


def _pooled(
    sae: BatchTopKSAE, batches: list[Float[Tensor, "_ d_in"]], minima: Float[Tensor, " batches"] | None = None
) -> Float[Tensor, ""]:
    """The theta above which floor(k * tokens) entries lie, of all the batches together."""
    budget = budget_of(sae.k, sum(len(x) for x in batches))
    # between the lowest and the highest of the batches' own cuts, give or take an entry: only those are sorted
    low, high = (0.9 * float(minima.min()), float(minima.max())) if minima is not None else (0.0, math.inf)
    above, between = 0, []
    for x in batches:
        z = sae.pre_activations(x).float()
        above += int((z > high).sum())
        between.append(z[(z > low) & (z <= high)])
    rest = torch.cat(between)
    if above + len(rest) > budget:
        return rest.kthvalue(above + len(rest) - budget).values
    if low > 0:
        return _pooled(sae, batches)
    return torch.nextafter(rest.min(), torch.zeros_like(rest[0]))  # all positive entries are kept


def _learned(
    sae: BatchTopKSAE, batches: list[Float[Tensor, "_ d_in"]], theta: Float[Tensor, ""]
) -> Float[Tensor, " d_sae"]:
    """Thresholds of a JumpReLU SAE with these weights, from `theta`; its quadratic penalty holds L0 at k."""
    sae.threshold = theta.to(sae.W_enc.device)
    jump = sae.to_jumprelu().requires_grad_(False)
    jump.threshold.requires_grad_(True)
    jump.bandwidth = float(theta) / 4
    adam = torch.optim.Adam([jump.threshold], lr=float(theta) / 100)
    step_loss = sparse.loss if sparse.suits(jump) else type(jump).loss
    for step in range(LEARNED_STEPS):
        for group in adam.param_groups:
            group["lr"] = float(theta) / 100 * (1 - step / LEARNED_STEPS)
        adam.zero_grad()
        with torch.enable_grad():
            step_loss(jump, batches[step % len(batches)]).total.backward()
        adam.step()
        jump.constrain()
    return jump.threshold.detach()
