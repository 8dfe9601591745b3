"""From a batch to a number: the threshold with which a BatchTopK SAE is used after training.

    batch_min_mean    theta = E_X[ min { z_ij(X) : z_ij(X) kept } ]     the paper's: the mean over batches X of the
                      smallest entry kept
    ema               the same minima in a moving average that starts at 0, as SAELens keeps one while it trains;
                      without the correction 1 / (1 - decay^t), which it lacks there, a short run ends far too low
    target_l0         the theta that keeps k entries per token of all the data at once: its 1 - k / d_sae quantile
    learned           a theta for each latent, from batch_min_mean's, fine-tuned by JumpReLU's estimator with the
                      weights frozen

Bussmann, Leask and Nanda 2024, arXiv 2412.06410, section 3. The paper does not say how many batches, or which data;
here they are data that were not trained on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae import sparse
from tutorial_sae.runtime import unknown
from tutorial_sae.saes import SAE, BatchTopKSAE, keep_above, keep_batch
from tutorial_sae.saes.base import budget_of, check_activations

METHODS = ("batch_min_mean", "ema", "target_l0", "learned")
FEW_ENTRIES = 100  # kept entries on which no threshold should rest
ENOUGH = "32 batches of 1024 activations"
LEARNED_STEPS = 200
GROUP_TOKENS = 1024


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
        check_activations(activations, sae.d_in)
        whole = max(len(activations) // batch_size * batch_size, min(len(activations), batch_size))
        batches = list(activations[:whole].split(batch_size))
    else:
        batches = list(activations)  # used more than once: for theta, then for L0 at theta
    for i, x in enumerate(batches):
        check_activations(x, sae.d_in)
        if not torch.isfinite(x).all():
            raise ValueError(f"batch {i} holds activations that are not finite (NaN or infinite): drop those rows")
    batches = [x.to(sae.W_enc.device) for x in batches if len(x)]
    tokens = sum(len(x) for x in batches)
    if tokens * sae.k + 1e-6 < 1:
        raise ValueError(
            f"{tokens} activations are too few to calibrate on: k={sae.k} needs {math.ceil(1 / sae.k)} at the very "
            f"least, and {ENOUGH} give a threshold to rely on"
        )
    kept_values = [latents[latents > 0] for z in _matrices(sae, batches) if (latents := keep_batch(z, sae.k)).any()]
    smallest, entries = [values.min() for values in kept_values], sum(map(len, kept_values))
    if not smallest:
        raise ValueError(
            "no latent is positive on any of these activations, so there is no smallest entry to average: "
            "check that they come from the SAE's own model and hook, and that the SAE was trained"
        )
    if entries < FEW_ENTRIES:
        warnings.warn(
            f"the threshold rests on {entries} entries kept of {tokens} activations: {ENOUGH} give one to rely on",
            stacklevel=3,  # above the decorator
        )
    minima = torch.stack(smallest).float()
    theta = minima.mean()
    if method == "ema":
        theta = _moving_average(minima, decay, bias_correction)
    elif method == "target_l0":
        # the cut of the pool lies between its batches' own, give or take an entry
        theta = _pooled(sae, batches, 0.9 * float(minima.min()), float(minima.max()))
        positive = ((z[z > 0].float(), budget_of(sae.k, len(z))) for z in _matrices(sae, batches))
        minima = torch.stack([_cut(values, budget) for values, budget in positive if len(values)])
    elif method == "learned":
        theta = _learned(sae, batches, theta)
    sae.threshold = theta.to(sae.W_enc.device)
    kept = sum(int((keep_above(z, sae.threshold) > 0).sum()) for z in _matrices(sae, batches))
    spread = float(minima.std()) if len(minima) > 1 else 0.0
    result = theta.clone() if theta.dim() else float(theta)
    return Calibration(result, kept / tokens, spread)


def _matrices(sae: SAE, batches: list[Float[Tensor, "_ d_in"]]) -> Iterator[Float[Tensor, "_ d_sae"]]:
    """The pre-activations of each batch; small batches are encoded many at a time."""
    group: list[Tensor] = []
    for x in [*batches, None]:
        if group and (x is None or sum(map(len, group)) + len(x) > GROUP_TOKENS):
            yield from sae.pre_activations(torch.cat(group)).split([len(member) for member in group])
            group = []
        if x is not None:
            group.append(x)


def _moving_average(minima: Float[Tensor, " batches"], decay: float, bias_correction: bool) -> Float[Tensor, ""]:
    average = torch.zeros((), dtype=torch.float64)
    for smallest in minima.cpu().double():
        average = decay * average + (1 - decay) * smallest
    return (average / (1 - decay ** len(minima)) if bias_correction else average).float()


def _pooled(
    sae: BatchTopKSAE,
    batches: list[Float[Tensor, "_ d_in"]],
    low: float = 0.0,
    high: float = math.inf,
    unit: Float[Tensor, "*d_sae"] | None = None,
) -> Float[Tensor, ""]:
    """The theta above which floor(k * tokens) entries lie, of all the batches together.

    It is looked for between `low` and `high`, so that only those entries are sorted; not found there, among all. With
    a `unit` for each latent, what is found is the multiple of it.
    """
    budget = budget_of(sae.k, sum(len(x) for x in batches))
    above, between = 0, []
    for z in _matrices(sae, batches):
        z = z.float() if unit is None else z / unit
        above += int((z > high).sum())
        between.append(z[(z > low) & (z <= high)])
    rest = torch.cat(between)
    if above <= budget < above + len(rest):
        return _cut(rest, budget - above)
    if low > 0 or high < math.inf:
        return _pooled(sae, batches, unit=unit)
    return _cut(rest, len(rest))


def _cut(values: Float[Tensor, " n"], budget: int) -> Float[Tensor, ""]:
    """The number above which `budget` of the positive `values` lie; just below the smallest if they are no more."""
    if budget < len(values):
        return values.kthvalue(len(values) - budget).values
    return torch.nextafter(values.min(), torch.zeros_like(values[0]))


def _learned(
    sae: BatchTopKSAE, batches: list[Float[Tensor, "_ d_in"]], theta: Float[Tensor, ""]
) -> Float[Tensor, " d_sae"]:
    """Thresholds of a JumpReLU SAE with these weights, from `theta`; its quadratic penalty holds L0 near k, and in the
    end one factor for all of them makes it k on these data."""
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
    unit = jump.threshold.detach()
    return unit * _pooled(sae, batches, 0.5, 2.0, unit)
