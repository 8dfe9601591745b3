"""Gated, JumpReLU and norm-weighted vanilla SAEs in float64: their loss, and its gradient worked out on paper.

As in `oracles`, nothing here comes from the package. Gradients are loops over tokens, latents and dimensions, one
dictionary for each term of the loss, so that what a term must not reach shows as a zero. Where a variant's true
gradient is zero almost everywhere (the jump) the loops follow the estimator that its paper defines instead.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import oracles
from oracles import Numbers

Gradient = dict[str, np.ndarray]


class Result(NamedTuple):
    terms: dict[str, float]  # as the fields of the package's loss
    gradient: dict[str, Gradient]  # term of the loss -> parameter -> array; what is missing is zero
    latents: np.ndarray


def affine(p: Numbers, x: np.ndarray, bias: Sequence[float] | np.ndarray) -> np.ndarray:
    """(x_n - b_dec) @ W_enc + bias, entry by entry."""
    x_n = oracles.normalise(p, x)
    out = np.zeros((len(x), len(p.b_enc)))
    for t, j in np.ndindex(*out.shape):
        out[t, j] = bias[j] + sum((x_n[t, i] - p.b_dec[i]) * p.W_enc[i, j] for i in range(x.shape[1]))
    return out


def zeros(p: Numbers, *per_latent: str) -> Gradient:
    shared = {name: np.zeros_like(getattr(p, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return shared | {name: np.zeros_like(p.b_enc) for name in per_latent}


def terms_of(p: Numbers, x: np.ndarray, latents: np.ndarray, penalty: float, aux: float = 0.0) -> dict[str, float]:
    with np.errstate(divide="ignore", invalid="ignore"):  # one token has no variance, hence no finite fvu
        terms = oracles.loss(p, x, latents, aux=aux)
    return terms | {"penalty": penalty, "total": terms["mse"] + penalty + aux}


def by_reconstruction(p: Numbers, x: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """d mse / d x_hat_n."""
    x_n, n = oracles.normalise(p, x), len(x)
    slope = np.zeros_like(x_n)
    for t, i in np.ndindex(*slope.shape):
        x_hat = p.b_dec[i] + sum(latents[t, j] * p.W_dec[j, i] for j in range(latents.shape[1]))
        slope[t, i] = 2 * (x_hat - x_n[t, i]) / n
    return slope


def by_code(p: Numbers, slope: np.ndarray, t: int, j: int) -> float:
    """d / d f_tj, given d / d x_hat_n."""
    return sum(float(slope[t, i]) * float(p.W_dec[j, i]) for i in range(slope.shape[1]))


def into_decoder(p: Numbers, gradient: Gradient, slope: np.ndarray, latents: np.ndarray) -> None:
    for t, i in np.ndindex(*slope.shape):
        gradient["b_dec"][i] += slope[t, i]
        for j in range(latents.shape[1]):
            gradient["W_dec"][j, i] += slope[t, i] * latents[t, j]


def into_product(p: Numbers, gradient: Gradient, x_n: np.ndarray, t: int, j: int, slope: float) -> None:
    """Add what (x_n - b_dec) @ W_enc passes on of the slope of its entry t, j."""
    for i in range(x_n.shape[1]):
        gradient["W_enc"][i, j] += slope * (x_n[t, i] - p.b_dec[i])
        gradient["b_dec"][i] -= slope * p.W_enc[i, j]


# --- JumpReLU: Rajamanoharan et al. 2024, arXiv 2407.14435, Eq. 11 and 12 --------------------------------


def kernel(u: float) -> float:
    """The rectangle: 1 strictly within half a unit of 0."""
    return 1.0 if -0.5 < u < 0.5 else 0.0


def price_per_latent(coefficient: float) -> Callable[[float], tuple[float, float]]:
    """A penalty as (value, slope) of L0: each active latent costs the same."""
    return lambda l0: (coefficient * l0, coefficient)


def price_of_missing(target: float, d_in: int) -> Callable[[float], tuple[float, float]]:
    """A penalty as (value, slope) of L0: the square of the relative distance to the target."""
    return lambda l0: (d_in * (l0 / target - 1) ** 2, 2 * d_in * (l0 - target) / target**2)


def jumprelu_latents(p: Numbers, theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(latents, what they are before the jump)."""
    pi = affine(p, x, p.b_enc)
    latents = np.zeros_like(pi)
    for t, j in np.ndindex(*pi.shape):
        if pi[t, j] > theta[j]:
            latents[t, j] = pi[t, j]
    return latents, pi


def jumprelu(
    p: Numbers,
    theta: np.ndarray,
    x: np.ndarray,
    bandwidth: float,
    price: Callable[[float], tuple[float, float]],
) -> Result:
    x_n, n = oracles.normalise(p, x), len(x)
    latents, pi = jumprelu_latents(p, theta, x)
    penalty, per_l0 = price(np.count_nonzero(latents) / n)

    of_mse, of_penalty = zeros(p, "threshold"), zeros(p, "threshold")
    slope = by_reconstruction(p, x, latents)
    into_decoder(p, of_mse, slope, latents)
    for t, j in np.ndindex(*pi.shape):
        by_f = by_code(p, slope, t, j)
        if pi[t, j] > theta[j]:
            into_product(p, of_mse, x_n, t, j, by_f)
            of_mse["b_enc"][j] += by_f
        window = kernel(float(pi[t, j] - theta[j]) / bandwidth)
        of_mse["threshold"][j] -= by_f * theta[j] / bandwidth * window
        of_penalty["threshold"][j] -= per_l0 / n / bandwidth * window
    return Result(terms_of(p, x, latents, penalty), {"mse": of_mse, "penalty": of_penalty}, latents)


# --- gated: Rajamanoharan et al. 2024, arXiv 2404.16014, section 3 --------------------------------------


def gated_latents(p: Numbers, r_mag: np.ndarray, b_gate: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """(latents, magnitudes z, gates before the jump, the product that both paths share)."""
    product = affine(p, x, np.zeros_like(p.b_enc))
    z, gate, latents = (np.zeros_like(product) for _ in range(3))
    for t, j in np.ndindex(*product.shape):
        z[t, j] = max(0.0, math.exp(r_mag[j]) * product[t, j] + p.b_enc[j])
        gate[t, j] = product[t, j] + b_gate[j]
        latents[t, j] = z[t, j] if gate[t, j] > 0 else 0.0
    return latents, z, gate, product


def gated(p: Numbers, r_mag: np.ndarray, b_gate: np.ndarray, x: np.ndarray, l1: float) -> Result:
    x_n, n = oracles.normalise(p, x), len(x)
    latents, z, gate, product = gated_latents(p, r_mag, b_gate, x)
    opened = np.where(gate > 0, gate, 0.0)
    penalty = l1 * float(opened.sum()) / n
    frozen = by_reconstruction(p, x, opened)  # 2 (x_hat - x) / n, of the gates decoded by the frozen decoder
    aux = float(((n * frozen / 2) ** 2).sum()) / n

    of_mse, of_penalty, of_aux = (zeros(p, "r_mag", "b_gate") for _ in range(3))
    slope = by_reconstruction(p, x, latents)
    into_decoder(p, of_mse, slope, latents)
    for t, j in np.ndindex(*gate.shape):
        if gate[t, j] <= 0:
            continue  # the jump itself passes nothing on, and the gate's ReLU is idle here
        if z[t, j] > 0:
            by_f, gain = by_code(p, slope, t, j), math.exp(r_mag[j])
            into_product(p, of_mse, x_n, t, j, by_f * gain)
            of_mse["b_enc"][j] += by_f
            of_mse["r_mag"][j] += by_f * gain * product[t, j]
        for gradient, by_gate in ((of_penalty, l1 / n), (of_aux, by_code(p, frozen, t, j))):
            into_product(p, gradient, x_n, t, j, by_gate)
            gradient["b_gate"][j] += by_gate
    gradients = {"mse": of_mse, "penalty": of_penalty, "aux": of_aux}
    return Result(terms_of(p, x, latents, penalty, aux), gradients, latents)


# --- vanilla with free decoder rows: Anthropic, April 2024 update ----------------------------------------


def positive_latents(p: Numbers, x: np.ndarray) -> np.ndarray:
    return np.maximum(affine(p, x, p.b_enc), 0.0)


def weighted(p: Numbers, x: np.ndarray, l1: float) -> Result:
    x_n, n = oracles.normalise(p, x), len(x)
    latents = positive_latents(p, x)
    lengths = [math.sqrt(sum(value**2 for value in row)) for row in p.W_dec]
    penalty = l1 * sum(float(latents[:, j].sum()) * lengths[j] for j in range(len(lengths))) / n

    of_mse, of_penalty = zeros(p), zeros(p)
    slope = by_reconstruction(p, x, latents)
    into_decoder(p, of_mse, slope, latents)
    for t, j in np.ndindex(*latents.shape):
        if latents[t, j] > 0:
            for gradient, by_f in ((of_mse, by_code(p, slope, t, j)), (of_penalty, l1 * lengths[j] / n)):
                into_product(p, gradient, x_n, t, j, by_f)
                gradient["b_enc"][j] += by_f
            of_penalty["W_dec"][j] += l1 * latents[t, j] / n * p.W_dec[j] / lengths[j]
    return Result(terms_of(p, x, latents, penalty), {"mse": of_mse, "penalty": of_penalty}, latents)
