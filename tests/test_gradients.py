"""Gradients against what they are gradients of.

A step function has no gradient, so JumpReLU's straight-through estimators are held to the derivative of the expected
loss, found by quadrature; everything smooth is held to central differences, and what is stopped on purpose (AuxK's
residual, Gated's frozen decoder) to gradients worked out on paper. The oracles are float64 and written from the papers:
Rajamanoharan et al. 2024, arXiv 2407.14435 (Eq. 11 and 12) and arXiv 2404.16014 (section 3.2); Gao et al. 2024, arXiv
2406.04093 (AuxK); Anthropic's update of April 2024 (weighted decoder).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tutorial_sae import BatchTopKSAE, TopKSAE, VanillaSAE, sparse
from tutorial_sae.saes import GatedSAE, JumpReLUSAE

Arrays = dict[str, np.ndarray]

D_IN, D_SAE, N = 6, 12, 16
NORMALIZE = ("dataset", "token", "none")
normalizations = pytest.mark.parametrize("normalize", NORMALIZE)


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def parameters(sae: Any) -> Arrays:
    return {name: array(p) for name, p in sae.named_parameters()}


def gradients(sae: Any, value: Any) -> Arrays:
    """What `value.backward()` leaves; a parameter that it does not reach counts as zero."""
    sae.zero_grad(set_to_none=True)
    value.backward(retain_graph=True)
    return {n: np.zeros(p.shape) if p.grad is None else array(p.grad) for n, p in sae.named_parameters()}


def losses(sae: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The loss by each path that this SAE has."""
    by_path = {"reference": sae.loss(x)}
    assert sparse.suits(sae)
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "MOST_KEPT", 1e-9)  # however dense
        patch.setattr(sae, "hint", 1.0)
        patch.setattr(type(sae), "loss", None)  # there is no going back to the reference
        by_path["fast"] = sparse.loss(sae, x)
    return by_path


def tokens(n: int = N, seed: int = 0) -> torch.Tensor:
    """Raw activations, off centre and longer in some directions than in others."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n, D_IN, generator=chance) * torch.linspace(0.5, 2, D_IN) + torch.arange(D_IN) / 4


def shaken(sae: Any, seed: int = 1) -> Any:
    """Every parameter off its start, thresholds of all sizes, normalisation fitted."""
    sae.fit_normalization(tokens(64, seed=99))
    chance = torch.Generator().manual_seed(seed)
    for name, p in sae.named_parameters():
        noise = torch.randn(p.shape, generator=chance)
        p.data = 0.05 + 0.7 * noise.abs() if name == "threshold" else p.data + 0.3 * noise
    return sae


def normalised(sae: Any, x: torch.Tensor) -> np.ndarray:
    raw = array(x)
    if sae.normalize == "token":
        return np.array([(row - row.mean()) / (row.std(ddof=1) + 1e-5) for row in raw])
    if sae.normalize == "dataset":
        return (raw - array(sae.norm_mean)) / float(sae.norm_scale)
    return raw


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """Distance relative to the length of `wanted`, or absolute where that is zero."""
    return float(np.linalg.norm(got - wanted) / (np.linalg.norm(wanted) or 1.0))


def agree(got: Arrays, wanted: Arrays, tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        assert apart(got[name], values) <= tolerance, name


# --- JumpReLU: the estimators on paper -------------------------------------------------------------------


def on_paper(p: Arrays, x: np.ndarray, bandwidth: float, by_l0: float = 0.0) -> Arrays:
    """The gradients of mse + penalty by Eq. 11 and 12; `by_l0` is the penalty's derivative by L0."""
    n, theta = len(x), p["threshold"]
    pi = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    on, near = pi > theta, abs(pi - theta) < bandwidth / 2
    f = np.where(on, pi, 0.0)
    by_x_hat = 2 * (f @ p["W_dec"] + p["b_dec"] - x) / n
    by_f = by_x_hat @ p["W_dec"].T
    by_pi = by_f * on
    return {
        "W_enc": (x - p["b_dec"]).T @ by_pi,
        "b_enc": by_pi.sum(0),
        "W_dec": f.T @ by_x_hat,
        "b_dec": by_x_hat.sum(0) - p["W_enc"] @ by_pi.sum(0),
        "threshold": -(theta * (by_f * near).sum(0) + by_l0 * near.sum(0) / n) / bandwidth,
    }


@normalizations
@pytest.mark.parametrize("penalty", [{"l0_coefficient": 0.7}, {"target_l0": 2.5}])
@pytest.mark.parametrize("training", [True, False])
def test_jumprelu_gradients_are_those_of_the_paper(normalize, penalty, training, monkeypatch):
    bandwidth = 0.8
    sae = shaken(JumpReLUSAE(D_IN, D_SAE, **penalty, bandwidth=bandwidth, normalize=normalize)).train(training)
    p, x = parameters(sae), tokens(60)
    x_n = normalised(sae, x)
    pi = (x_n - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    away = abs(pi - p["threshold"])
    assert min(away.min(), abs(away - bandwidth / 2).min()) > 2e-6, "float32 must see the same side of every edge"
    below_zero = (pi < 0) & (away < bandwidth / 2)
    assert below_zero.any(), "some window must reach below zero and find something there"
    l0 = (pi > p["threshold"]).sum(1).mean()
    by_l0 = penalty.get("l0_coefficient", 2 * D_IN * (l0 / 2.5 - 1) / 2.5)
    penalty_value = 0.7 * l0 if "l0_coefficient" in penalty else D_IN * (l0 / 2.5 - 1) ** 2
    wanted, without = on_paper(p, x_n, bandwidth, by_l0), on_paper(p, x_n, bandwidth)
    assert apart(without["threshold"], wanted["threshold"]) > 0.1, "the penalty must be felt"
    for loss in losses(sae, x, monkeypatch).values() if training else [sae.loss(x)]:
        assert loss.l0.item() == pytest.approx(l0)
        assert loss.penalty.item() == pytest.approx(penalty_value, rel=1e-5)
        agree(gradients(sae, loss.total), wanted, 2e-6)
        agree(gradients(sae, loss.mse), without, 2e-6)
        # the L0 step has no gradient by the pre-activation, so nothing but the thresholds hears of it
        by_penalty = gradients(sae, loss.penalty)
        assert apart(by_penalty.pop("threshold"), wanted["threshold"] - without["threshold"]) < 2e-6
        assert not any(g.any() for g in by_penalty.values())


def test_the_kernel_window_is_open_at_both_ends_and_counts_both_sides():
    sae = JumpReLUSAE(1, 1, l0_coefficient=3.0, bandwidth=0.5, normalize="none")
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec, sae.threshold):
            p.copy_(torch.full_like(p, 0.5 if p is sae.threshold else 1.0))
    x = torch.tensor([[0.25], [0.375], [0.5], [0.625], [0.75]])  # edge, off, off (not strictly above), on, edge
    loss = sae.loss(x)
    assert loss.l0.item() == pytest.approx(2 / 5)
    assert gradients(sae, loss.penalty)["threshold"] == pytest.approx(-3.0 / 0.5 * 3 / 5)
    # the error x_hat - x is -0.375 and -0.5 on the tokens that are off, 0 on the one that is on
    assert gradients(sae, loss.mse)["threshold"] == pytest.approx(-(0.5 / 0.5) * 2 * (-0.375 - 0.5) / 5)


# --- JumpReLU: the estimators against the derivative of the expected loss --------------------------------

# Two-dimensional Gaussian activations and three latents that overlap, off centre in every way.
MEAN, MIX = np.array([0.3, -0.2]), np.array([[1.0, 0.4], [-0.3, 0.8]])
ANGLES = np.array([3.3, 0.9, 4.8])
SMALL: Arrays = {
    "W_enc": np.array([[0.67, 0.56, 0.39], [0.84, -0.17, -0.38]]),
    "b_enc": np.array([0.1, 0.05, 0.2]),
    "W_dec": np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1),
    "b_dec": np.array([0.15, -0.1]),
}
THETA, NARROW = np.array([1.0, 0.6, 1.1]), 0.02
LOW_THETA, WIDE = np.array([0.05, 0.08, 0.1]), 0.3  # windows from -0.1, -0.07 and -0.05 on


def small(theta: np.ndarray, bandwidth: float, **penalty: float) -> JumpReLUSAE:
    sae = JumpReLUSAE(2, 3, bandwidth=bandwidth, normalize="none", **penalty)
    with torch.no_grad():
        for name, values in {**SMALL, "threshold": theta}.items():
            getattr(sae, name).copy_(torch.from_numpy(values))
    return sae


@functools.cache
def grid(per_side: int = 700, reach: float = 5.5) -> tuple[np.ndarray, np.ndarray]:
    """Points of the plane and their probabilities: the midpoint rule in the directions where x is independent."""
    u = (np.arange(per_side) + 0.5) / per_side * 2 * reach - reach
    weight = np.exp(-(u**2) / 2)
    weight /= weight.sum()
    plane = np.stack(np.meshgrid(u, u, indexing="ij"), axis=-1).reshape(-1, 2)
    return MEAN + plane @ MIX, np.outer(weight, weight).reshape(-1)


@functools.cache
def expected(*theta: float) -> tuple[float, float]:
    """E[mse] and E[L0] at these thresholds."""
    x, chance = grid()
    pi = (x - SMALL["b_dec"]) @ SMALL["W_enc"] + SMALL["b_enc"]
    on = pi > np.array(theta)
    error = np.where(on, pi, 0.0) @ SMALL["W_dec"] + SMALL["b_dec"] - x
    return float(chance @ (error**2).sum(1)), float(chance @ on.sum(1))


def slopes(theta: np.ndarray, of: Callable[[float, float], float], step: float = 0.12) -> np.ndarray:
    """d of(E[mse], E[L0]) / d theta by central differences of fourth order.

    The expectations are smooth in theta at the scale of the Gaussian, so the wide step costs nothing and drowns the
    grid's own roughness.
    """
    slope = []
    for shift in step * np.eye(len(theta)):
        by = {m: of(*expected(*(theta + m * shift))) for m in (-2, -1, 1, 2)}
        slope.append((8 * (by[1] - by[-1]) - (by[2] - by[-2])) / (12 * step))
    return np.array(slope)


@functools.cache
def sample(power: int = 19) -> torch.Tensor:
    """2^power tokens that fill the same Gaussian evenly (a Sobol sequence), so their means hardly scatter."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=5).draw(2**power, dtype=torch.float64)
    return (torch.from_numpy(MEAN) + torch.special.ndtri(uniform) @ torch.from_numpy(MIX)).float()


def threshold_gradient(theta: np.ndarray, bandwidth: float, **penalty: float) -> np.ndarray:
    sae = small(theta, bandwidth, **penalty)
    return gradients(sae, sae.loss(sample()).total)["threshold"]


def upper_half(theta: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """The estimators as they come out when the step sees values after the jump: 0 wherever a latent is off."""
    x = array(sample())
    pi = (x - SMALL["b_dec"]) @ SMALL["W_enc"] + SMALL["b_enc"]
    after = np.where(pi > theta, pi, 0.0)
    near = abs(after - theta) < bandwidth / 2
    by_f = 2 * (after @ SMALL["W_dec"] + SMALL["b_dec"] - x) @ SMALL["W_dec"].T
    return -theta / bandwidth * (by_f * near).mean(0), -near.mean(0) / bandwidth


def normal_density(values: np.ndarray) -> np.ndarray:
    """Density of each latent's pre-activation, a Gaussian, at these values."""
    mean = (MEAN - SMALL["b_dec"]) @ SMALL["W_enc"] + SMALL["b_enc"]
    spread = np.linalg.norm(MIX @ SMALL["W_enc"], axis=0)
    return np.exp(-(((values - mean) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))


def test_the_quadrature_finds_the_slope_that_is_known_exactly():
    assert slopes(THETA, lambda mse, l0: l0) == pytest.approx(-normal_density(THETA), rel=2e-3)


def test_the_reconstruction_estimator_is_the_slope_of_the_expected_error():
    """Within 3 %: the estimator's own bias and noise.

    The kept half of the window holds theta + bandwidth/4 on average where the limit has theta, at most 1 % here, and
    only one token in a hundred falls into a window.
    """
    got, wanted = threshold_gradient(THETA, NARROW, l0_coefficient=0.0), slopes(THETA, lambda mse, l0: mse)
    assert abs(wanted).min() > 0.3, "every slope must be there to be found"
    assert (wanted > 0).any()
    assert (wanted < 0).any()
    assert got == pytest.approx(wanted, rel=0.03)
    assert (abs(upper_half(THETA, NARROW)[0] / wanted - 1) > 0.2).all(), "half a window must not pass"


def test_the_l0_estimator_is_the_slope_of_the_expected_count():
    """Within 2 %: noise alone, since the bias of a symmetric kernel is of second order in its bandwidth."""
    coefficient = 0.8
    alone = threshold_gradient(THETA, NARROW, l0_coefficient=0.0)
    got = threshold_gradient(THETA, NARROW, l0_coefficient=coefficient) - alone
    wanted = coefficient * slopes(THETA, lambda mse, l0: l0)
    assert got == pytest.approx(wanted, rel=0.02)
    half = coefficient * upper_half(THETA, NARROW)[1]
    assert half == pytest.approx(wanted / 2, rel=0.06), "half a window must not pass"


@pytest.mark.parametrize("target", [0.25, 1.5])
def test_the_target_estimator_is_the_slope_of_the_expected_penalty(target):
    """Too many kept: thresholds must rise. Too few: they must fall. Within 2 %, as the count itself."""
    alone = threshold_gradient(THETA, NARROW, l0_coefficient=0.0)
    got = threshold_gradient(THETA, NARROW, target_l0=target) - alone
    wanted = slopes(THETA, lambda mse, l0: 2 * (l0 / target - 1) ** 2)  # d_in = 2
    assert got == pytest.approx(wanted, rel=0.02)
    l0 = expected(*THETA)[1]
    assert 0.4 < l0 < 0.6
    assert (np.sign(got) == (-1 if l0 > target else 1)).all()


def test_a_window_that_reaches_below_zero_keeps_what_it_finds_there():
    """Thresholds below half of a wide bandwidth: the L0 slope within 4 %, the density being nearly straight there.

    With relu'd pre-activations everything negative would lie at zero, inside the window; without it, the window would
    lose its part below zero. Both are far off.
    """
    assert (LOW_THETA < WIDE / 2).all()
    alone = threshold_gradient(LOW_THETA, WIDE, l0_coefficient=0.0)
    got = threshold_gradient(LOW_THETA, WIDE, l0_coefficient=1.0) - alone
    wanted = slopes(LOW_THETA, lambda mse, l0: l0)
    assert got == pytest.approx(wanted, rel=0.04)
    assert got == pytest.approx(-normal_density(LOW_THETA), rel=0.04)
    x = array(sample())
    pi = (x - SMALL["b_dec"]) @ SMALL["W_enc"] + SMALL["b_enc"]
    for wrong in ((abs(np.maximum(pi, 0) - LOW_THETA) < WIDE / 2), (pi > 0) & (abs(pi - LOW_THETA) < WIDE / 2)):
        assert (abs(-wrong.mean(0) / WIDE / wanted - 1) > 0.1).all()
    # so wide a kernel is not close to the reconstruction's slope, only to the paper's own formula
    exact = on_paper({**SMALL, "threshold": LOW_THETA}, x, WIDE)["threshold"]
    assert alone == pytest.approx(exact, rel=1e-3)


# --- the decoder's directions ----------------------------------------------------------------------------

UNIT_ROWS: dict[str, Callable[[], Any]] = {
    "vanilla": lambda: VanillaSAE(D_IN, D_SAE, l1=0.3),
    "topk": lambda: TopKSAE(D_IN, D_SAE, k=3),
    "batchtopk": lambda: BatchTopKSAE(D_IN, D_SAE, k=2.5),
    "jumprelu": lambda: JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.3, bandwidth=0.3),
    "gated": lambda: GatedSAE(D_IN, D_SAE, l1=0.3),
}


@pytest.mark.parametrize("variant", UNIT_ROWS)
def test_the_projected_gradient_turns_each_row_and_does_not_lengthen_it(variant):
    sae = shaken(UNIT_ROWS[variant]())
    sae.constrain()
    sae.loss(tokens()).total.backward()
    before = {n: array(p.grad) for n, p in sae.named_parameters() if p.grad is not None}
    sae.project_decoder_grad()
    rows, after = array(sae.W_dec), array(sae.W_dec.grad)
    steps = []
    for row, g, projected in zip(rows, before.pop("W_dec"), after, strict=True):
        assert abs(projected @ row) <= 1e-6 * np.linalg.norm(g)
        # Gram and Schmidt: of the row and the gradient an orthonormal pair, and the gradient's part along the second
        first = row / np.linalg.norm(row)
        second = g - (first @ g) * first
        second /= np.linalg.norm(second) or 1.0
        assert apart(projected, (second @ g) * second) < 2e-6
        if g.any():
            size = np.linalg.norm(projected)
            grown = [np.linalg.norm(row + t / size * projected) - np.linalg.norm(row) for t in (0.02, 0.01)]
            raw = [np.linalg.norm(row + t / size * g) - np.linalg.norm(row) for t in (0.02, 0.01)]
            assert grown[0] / grown[1] == pytest.approx(4, rel=0.01)
            steps.append(abs(raw[0] / raw[1]))
    assert np.median(steps) < 3, "unprojected, the change is of first order"
    for name, g in before.items():
        assert np.array_equal(array(getattr(sae, name).grad), g), name


def test_free_rows_keep_their_gradient_and_their_length():
    sae = shaken(VanillaSAE(D_IN, D_SAE, l1=0.3, decoder_norm="weighted"))
    sae.loss(tokens()).total.backward()
    rows, gradient = array(sae.W_dec), array(sae.W_dec.grad)
    assert abs((rows * gradient).sum(1)).max() > 0.1
    sae.project_decoder_grad()
    sae.constrain()
    assert np.array_equal(array(sae.W_dec.grad), gradient)
    assert np.array_equal(array(sae.W_dec), rows)


# --- AuxK, by hand ---------------------------------------------------------------------------------------


def auxk_example(variant: str, aux_k: int = 512) -> tuple[Any, torch.Tensor]:
    """Two tokens, one living latent and three dead ones, in numbers that float32 holds exactly.

                 pre-activations              decoder row
    latent 0      8   8    living, kept        (1, 0)
    latent 1      2   4    dead                (0, 1)
    latent 2     -8   2    dead                (-1, 0)
    latent 3     -8  -8    dead, never positive (1, 0)

    With x - b_dec = (8, 0) and (0, 8) the residual is (0, 0) and (-8, 8). b_dec is large, so that it cannot hide.
    """
    options: dict[str, Any] = {"aux_k": aux_k, "dead_after_tokens": 10, "normalize": "none"}
    sae = TopKSAE(2, 4, k=1, **options) if variant == "topk" else BatchTopKSAE(2, 4, k=1, **options)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1, 0.25, -1, -1], [1, 0.5, 0.25, -1]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 0]]))
        sae.b_dec.copy_(torch.tensor([64.0, -32]))
        sae.tokens_since_fired[1:] = 1000
    return sae, torch.tensor([[72.0, -32], [64, -24]])


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_auxk_by_hand(variant, path, monkeypatch):
    """e_hat = (0, 2) and (-2, 4), without b_dec; e - e_hat = (0, -2) and (-6, 4); |.|^2 = 4 and 52, mean 28."""
    sae, x = auxk_example(variant)
    loss = losses(sae, x, monkeypatch)[path]
    assert loss.mse == 128 / 2
    assert loss.aux == 28 / 32
    assert loss.total == 64 + 28 / 32
    got = {name: 32 * g for name, g in gradients(sae, loss.aux).items()}
    # by e_hat: (0, 2) and (6, -4), over 32; by the positive z of latents 1 and 2: 2, -4 and (nothing), -6
    assert got["W_dec"].tolist() == [[0, 0], [24, -12], [12, -8], [0, 0]]
    assert got["b_enc"].tolist() == [0, -2, -6, 0]
    assert got["W_enc"].T.tolist() == [[0, 0], [16, -32], [0, -48], [0, 0]]
    # x_hat and the residual also hold b_dec, and send it nothing: -W_enc @ (0, -2, -6, 0), the encoder's input alone
    assert got["b_dec"].tolist() == [-5.5, 2.5]


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_auxk_of_one_latent_takes_the_largest_of_each_token(variant, path, monkeypatch):
    """Latent 1 for both tokens: e_hat = (0, 2) and (0, 4), so e - e_hat = (0, -2) and (-8, 4), mean |.|^2 = 42."""
    sae, x = auxk_example(variant, aux_k=1)
    loss = losses(sae, x, monkeypatch)[path]
    assert loss.aux == 42 / 32
    got = {name: 32 * g for name, g in gradients(sae, loss.aux).items()}
    assert got["W_dec"].tolist() == [[0, 0], [32, -12], [0, 0], [0, 0]]
    assert got["b_enc"].tolist() == [0, -2, 0, 0]
    assert got["b_dec"].tolist() == [0.5, 1]


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
@normalizations
def test_auxk_reaches_b_dec_through_the_encoders_input_alone(variant, normalize, monkeypatch):
    """Whatever enters as (x - b_dec) @ W_enc + b_enc moves b_dec by -W_enc times what it moves b_enc."""
    kind = TopKSAE if variant == "topk" else BatchTopKSAE
    sae = shaken(kind(D_IN, D_SAE, k=2, aux_k=3, dead_after_tokens=10, normalize=normalize))
    with torch.no_grad():
        sae.b_enc[: D_SAE // 2] -= 1.0
    sae.tokens_since_fired[: D_SAE // 2] = 1000
    for path, loss in losses(sae, tokens(), monkeypatch).items():
        got = gradients(sae, loss.aux)
        assert np.linalg.norm(got["b_dec"]) > 1e-3
        assert apart(got["b_dec"], -parameters(sae)["W_enc"] @ got["b_enc"]) < 2e-6, path
        # and the rest of total is what it would be without AuxK
        agree(gradients(sae, loss.total), {n: g + got[n] for n, g in gradients(sae, loss.mse).items()}, 2e-6)


# --- Gated, term by term ---------------------------------------------------------------------------------


@normalizations
@pytest.mark.parametrize("training", [True, False])
def test_each_term_of_gated_reaches_what_it_should(normalize, training, monkeypatch):
    sae = shaken(GatedSAE(D_IN, D_SAE, l1=0.4, normalize=normalize)).train(training)
    p, x = parameters(sae), tokens()
    x_n, n, scale = normalised(sae, x), N, np.exp(p["r_mag"])
    nothing = {name: np.zeros_like(values) for name, values in p.items()}
    lin = (x_n - p["b_dec"]) @ p["W_enc"]
    gate, magnitude = lin + p["b_gate"], scale * lin + p["b_enc"]
    assert min(abs(gate).min(), abs(magnitude).min()) > 1e-5
    both = (gate > 0) & (magnitude > 0)
    assert ((gate > 0) & (magnitude < 0)).any()
    assert ((gate < 0) & (magnitude > 0)).any()

    def by_the_gate(by_lin: np.ndarray) -> Arrays:
        down = by_lin.sum(0)
        return nothing | {"W_enc": (x_n - p["b_dec"]).T @ by_lin, "b_gate": down, "b_dec": -p["W_enc"] @ down}

    f = np.where(both, magnitude, 0.0)
    by_x_hat = 2 * (f @ p["W_dec"] + p["b_dec"] - x_n) / n
    by_magnitude = (by_x_hat @ p["W_dec"].T) * both
    mse = by_the_gate(by_magnitude * scale) | {
        "b_gate": nothing["b_gate"],  # a step, and no estimator stands in for its gradient
        "b_enc": by_magnitude.sum(0),
        "r_mag": (by_magnitude * scale * lin).sum(0),
        "W_dec": f.T @ by_x_hat,
    }
    mse["b_dec"] = mse["b_dec"] + by_x_hat.sum(0)
    frozen_error = np.maximum(gate, 0) @ p["W_dec"] + p["b_dec"] - x_n
    aux = by_the_gate((2 * frozen_error / n @ p["W_dec"].T) * (gate > 0))
    penalty = by_the_gate(0.4 / n * (gate > 0))

    for path, loss in losses(sae, x, monkeypatch).items() if training else [("reference", sae.loss(x))]:
        assert loss.mse.item() == pytest.approx(((f @ p["W_dec"] + p["b_dec"] - x_n) ** 2).sum() / n, rel=1e-5), path
        assert loss.aux.item() == pytest.approx((frozen_error**2).sum() / n, rel=1e-5), path
        assert loss.penalty.item() == pytest.approx(0.4 * np.maximum(gate, 0).sum() / n, rel=1e-5), path
        for term, wanted in (("mse", mse), ("aux", aux), ("penalty", penalty)):
            agree(gradients(sae, getattr(loss, term)), wanted, 2e-6)
        total = {name: mse[name] + aux[name] + penalty[name] for name in p}
        agree(gradients(sae, loss.total), total, 2e-6)
        by_aux = gradients(sae, loss.aux)
        assert not by_aux["W_dec"].any(), "frozen"


# --- central differences ---------------------------------------------------------------------------------

# A variant's total in float64, and which entries it keeps. `held` are the parameters as they were: what Gated's last
# term holds still. Every oracle takes normalised activations.
Oracle = Callable[[Arrays, Arrays, np.ndarray], tuple[float, np.ndarray]]


def pre(p: Arrays, x: np.ndarray) -> np.ndarray:
    return (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]


def mse(p: Arrays, x: np.ndarray, f: np.ndarray) -> float:
    return float(((x - f @ p["W_dec"] - p["b_dec"]) ** 2).sum() / len(x))


def vanilla_total(p: Arrays, held: Arrays, x: np.ndarray) -> tuple[float, np.ndarray]:
    f = np.maximum(pre(p, x), 0)
    return mse(p, x, f) + 0.4 * f.sum() / len(x), f > 0


def weighted_total(p: Arrays, held: Arrays, x: np.ndarray) -> tuple[float, np.ndarray]:
    f = np.maximum(pre(p, x), 0)
    lengths = np.array([math.sqrt(row @ row) for row in p["W_dec"]])
    return mse(p, x, f) + 0.4 * float((f @ lengths).mean()), f > 0


def gated_total(p: Arrays, held: Arrays, x: np.ndarray) -> tuple[float, np.ndarray]:
    lin = (x - p["b_dec"]) @ p["W_enc"]
    gate, magnitude = lin + p["b_gate"], np.exp(p["r_mag"]) * lin + p["b_enc"]
    on, through = (gate > 0) & (magnitude > 0), np.maximum(gate, 0)
    total = mse(p, x, np.where(on, magnitude, 0)) + 0.4 * through.sum() / len(x) + mse(held, x, through)
    return total, np.concatenate([on, gate > 0])


def topk_total(p: Arrays, held: Arrays, x: np.ndarray) -> tuple[float, np.ndarray]:
    z = np.maximum(pre(p, x), 0)
    on = np.zeros(z.shape, dtype=bool)
    for row, chosen in zip(z, on, strict=True):
        chosen[sorted(range(len(row)), key=lambda i: -row[i])[:3]] = True
    on &= z > 0
    return mse(p, x, np.where(on, z, 0)), on


def batchtopk_total(p: Arrays, held: Arrays, x: np.ndarray) -> tuple[float, np.ndarray]:
    z = np.maximum(pre(p, x), 0)
    on = z >= np.sort(z, axis=None)[-40]  # 2.5 of each of 16 tokens
    return mse(p, x, np.where(on, z, 0)), on


def jumprelu_total(p: Arrays, held: Arrays, x: np.ndarray) -> tuple[float, np.ndarray]:
    pi = pre(p, x)
    on = pi > p["threshold"]
    return mse(p, x, np.where(on, pi, 0)) + 0.3 * on.sum() / len(x), on


SMOOTH: dict[str, tuple[Callable[..., Any], Oracle]] = {
    "vanilla": (lambda **o: VanillaSAE(D_IN, D_SAE, l1=0.4, **o), vanilla_total),
    "vanilla, weighted": (lambda **o: VanillaSAE(D_IN, D_SAE, l1=0.4, decoder_norm="weighted", **o), weighted_total),
    "gated": (lambda **o: GatedSAE(D_IN, D_SAE, l1=0.4, **o), gated_total),
    "topk": (lambda **o: TopKSAE(D_IN, D_SAE, k=3, **o), topk_total),
    "batchtopk": (lambda **o: BatchTopKSAE(D_IN, D_SAE, k=2.5, **o), batchtopk_total),
    "jumprelu": (lambda **o: JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.3, bandwidth=0.2, **o), jumprelu_total),
}


def differences(oracle: Oracle, p: Arrays, x: np.ndarray, step: float = 1e-5) -> Arrays:
    held = {name: values.copy() for name, values in p.items()}
    support = oracle(p, held, x)[1]
    slope = {name: np.zeros_like(values) for name, values in p.items() if name != "threshold"}
    for name, by in slope.items():
        values = p[name]
        for i in np.ndindex(values.shape):
            middle, ends = values[i], []
            for end in (middle + step, middle - step):
                values[i] = end
                total, kept = oracle(p, held, x)
                assert np.array_equal(kept, support), "no entry may cross its cut between the two"
                ends.append(total)
            values[i] = middle
            by[i] = (ends[0] - ends[1]) / (2 * step)
    return slope


@pytest.mark.parametrize("variant", SMOOTH)
@normalizations
def test_gradients_of_the_total_are_central_differences(variant, normalize, monkeypatch):
    make, oracle = SMOOTH[variant]
    sae, x = shaken(make(normalize=normalize)), tokens()
    p, x_n = parameters(sae), normalised(sae, x)
    total, support = oracle(p, p, x_n)
    assert 0 < support.sum() < support.size
    wanted = differences(oracle, p, x_n)
    for path, loss in losses(sae, x, monkeypatch).items():
        assert loss.total.item() == pytest.approx(total, rel=1e-5), path
        got = gradients(sae, loss.total)
        got.pop("threshold", None)  # no derivative: its estimator has tests of its own
        agree(got, wanted, 5e-6)
