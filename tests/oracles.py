"""Slow, obvious float64 versions of the definitions, for the tests to compare with.

Everything here is plain Python and numpy, written from the formulas and not from the package, so a mistake
would have to be made twice to go unnoticed. `Numbers` is an SAE reduced to its arrays.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass
class Numbers:
    """The arrays of one SAE: all that the formulas need."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    norm_mean: np.ndarray
    norm_scale: float
    per_token: bool


def array(tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def numbers(sae, normalize: str = "none") -> Numbers:
    fitted = normalize == "dataset"
    return Numbers(
        *(array(getattr(sae, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")),
        norm_mean=array(sae.norm_mean) if fitted else np.zeros(sae.W_enc.shape[0]),
        norm_scale=float(sae.norm_scale) if fitted else 1.0,
        per_token=normalize == "token",
    )


def make_exact(sae, seed: int = 0) -> None:
    """Overwrite the parameters with small whole numbers.

    On whole-number input float32 then makes no rounding error before the decoder's output, and ties
    between pre-activations are common and exact.
    """
    rng = np.random.default_rng(seed)
    for name, low, high in (("W_enc", -2, 3), ("b_enc", -2, 3), ("W_dec", -1, 2), ("b_dec", -1, 2)):
        tensor = getattr(sae, name).data
        tensor.copy_(tensor.new_tensor(rng.integers(low, high, tensor.shape)))


# --- normalisation ---------------------------------------------------------------------------------------


def fit_normalization(x: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean token, and the scale that makes the mean squared norm equal the dimension."""
    mean = x.sum(axis=0) / len(x)
    mean_square_norm = sum(float((token - mean) @ (token - mean)) for token in x) / len(x)
    return mean, math.sqrt(mean_square_norm / x.shape[1])


def frame(p: Numbers, token: np.ndarray) -> tuple[np.ndarray | float, float]:
    """What to subtract from this token and what to divide it by."""
    if not p.per_token:
        return p.norm_mean, p.norm_scale
    mean = sum(token) / len(token)
    variance = sum((value - mean) ** 2 for value in token) / (len(token) - 1)
    return mean, math.sqrt(variance) + 1e-5


def normalise(p: Numbers, x: np.ndarray) -> np.ndarray:
    rows = []
    for token in x:
        shift, scale = frame(p, token)
        rows.append((token - shift) / scale)
    return np.array(rows)


# --- encode and decode -----------------------------------------------------------------------------------


def pre_activations(p: Numbers, x: np.ndarray) -> np.ndarray:
    z = np.zeros((len(x), len(p.b_enc)))
    for t, token in enumerate(normalise(p, x)):
        for j in range(len(p.b_enc)):
            z[t, j] = max(0.0, float((token - p.b_dec) @ p.W_enc[:, j]) + p.b_enc[j])
    return z


def decode(p: Numbers, latents: np.ndarray, like: np.ndarray) -> np.ndarray:
    rows = []
    for token, code in zip(like, latents, strict=True):
        shift, scale = frame(p, token)
        rows.append((code @ p.W_dec + p.b_dec) * scale + shift)
    return np.array(rows)


# --- the cuts --------------------------------------------------------------------------------------------


def budget(k: float, n: int) -> int:
    return math.floor(Fraction(k) * n + Fraction(1, 1_000_000))


def keep_own(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, 0.0)


def keep_batch(z: np.ndarray, k: float) -> np.ndarray:
    """Sort all entries, largest first and lower flat index first among equals; keep the first few."""
    pairs = sorted((-value, index) for index, value in enumerate(z.ravel()) if value > 0)
    kept = np.zeros(z.size)
    for negative, index in pairs[: budget(k, len(z))]:
        kept[index] = -negative
    return kept.reshape(z.shape)


def keep_row(z: np.ndarray, k: int) -> np.ndarray:
    return np.array([keep_batch(row[None, :], k)[0] for row in z])


def keep_above(z: np.ndarray, theta: float) -> np.ndarray:
    return np.where(z > theta, z, 0.0)


def keep(z: np.ndarray, cut: str, *, k: float, theta: float) -> np.ndarray:
    if cut == "row":
        return keep_row(z, int(k))
    if cut == "batch":
        return keep_batch(z, k)
    return keep_above(z, theta) if cut == "threshold" else keep_own(z)


# --- the loss --------------------------------------------------------------------------------------------


def loss(p: Numbers, x: np.ndarray, latents: np.ndarray, l1: float = 0.0, aux: float = 0.0) -> dict[str, float]:
    n = len(x)
    x_n, x_hat = normalise(p, x), decode(p, latents, like=x)
    x_hat_n = latents @ p.W_dec + p.b_dec
    mse = sum(float(((x_n[t] - x_hat_n[t]) ** 2).sum()) for t in range(n)) / n
    penalty = l1 * float(latents.sum()) / n
    centre = sum(x) / n
    return {
        "total": mse + penalty + aux,
        "mse": mse,
        "fvu": float(((x - x_hat) ** 2).sum() / ((x - centre) ** 2).sum()),
        "l0": np.count_nonzero(latents) / n,
        "penalty": penalty,
        "aux": aux,
    }


def auxk(
    p: Numbers, x: np.ndarray, latents: np.ndarray, dead: np.ndarray, aux_k: int
) -> tuple[float, dict[str, np.ndarray]]:
    """AuxK as added to the loss, and its gradient worked out on paper for a constant residual e."""
    n, x_n, z = len(x), normalise(p, x), pre_activations(p, x)
    if not dead.any():
        return 0.0, {name: np.zeros_like(getattr(p, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    e = x_n - (latents @ p.W_dec + p.b_dec)
    a = keep_row(np.where(dead, z, 0.0), min(aux_k, int(dead.sum())))
    miss = e - a @ p.W_dec
    by_e_hat = -2 * miss / (32 * n)
    by_z = np.where(a > 0, by_e_hat @ p.W_dec.T, 0.0)
    gradient = {
        "W_dec": a.T @ by_e_hat,
        "W_enc": (x_n - p.b_dec).T @ by_z,
        "b_enc": by_z.sum(0),
        "b_dec": -(by_z @ p.W_enc.T).sum(0),  # only because the encoder sees x - b_dec
    }
    return float((miss**2).sum()) / n / 32, gradient


# --- the threshold ---------------------------------------------------------------------------------------


def batch_min_mean(p: Numbers, batches: list[np.ndarray], k: float) -> tuple[float, float, float]:
    """(theta, L0 at theta on the same tokens, standard deviation of the minima)."""
    minima = []
    for x in batches:
        kept = keep_batch(pre_activations(p, x), k)
        if kept.any():
            minima.append(float(kept[kept > 0].min()))
    theta = sum(minima) / len(minima)
    spread = 0.0
    if len(minima) > 1:
        spread = math.sqrt(sum((m - theta) ** 2 for m in minima) / (len(minima) - 1))
    above = sum(np.count_nonzero(pre_activations(p, x) > theta) for x in batches)
    return theta, above / sum(len(x) for x in batches), spread
