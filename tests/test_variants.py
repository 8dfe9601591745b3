"""JumpReLU, gated and norm-weighted vanilla SAEs, BatchTopK's way to JumpReLU, and what every variant promises.

`test_saes.py` holds the common contract on vanilla, TopK and BatchTopK; here are the variants with more parameters,
whose gradients are estimators and stop signs, and the properties that bind all of them.
"""

import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import oracles
import oracles_variants as slow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tutorial_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE, VanillaSAE, load_sae
from tutorial_sae.saes.base import keep_batch

D_IN, D_SAE, L1, PRICE, TARGET, K = 6, 20, 0.3, 0.4, 4, 3
BANDWIDTH = 1.5  # wide: with the thresholds below, many windows reach under zero
THETA = torch.linspace(0.15, 1.45, D_SAE)
BUILD: dict[str, Callable[..., Any]] = {
    "vanilla": lambda *sizes, **options: VanillaSAE(*sizes, l1=L1, **options),
    "weighted": lambda *sizes, **options: VanillaSAE(*sizes, l1=L1, decoder_norm="weighted", **options),
    "gated": lambda *sizes, **options: GatedSAE(*sizes, l1=L1, **options),
    "topk": lambda *sizes, **options: TopKSAE(*sizes, **{"k": K} | options),
    "batchtopk": lambda *sizes, **options: BatchTopKSAE(*sizes, **{"k": K} | options),
    "batchtopk, a theta per latent": lambda *sizes, **options: BatchTopKSAE(*sizes, **{"k": K} | options),
    "jumprelu": lambda *sizes, **options: JumpReLUSAE(
        *sizes, **{"l0_coefficient": PRICE, "bandwidth": BANDWIDTH} | options
    ),
    "jumprelu, target": lambda *sizes, **options: JumpReLUSAE(
        *sizes, **{"target_l0": TARGET, "bandwidth": BANDWIDTH} | options
    ),
}
JUMPS = ("jumprelu", "jumprelu, target")
OWN = ("weighted", "gated", *JUMPS)  # what test_saes.py does not know
NEW = (*OWN, "batchtopk, a theta per latent")
NORMALIZE = ("dataset", "token", "none")
FIVE = ("vanilla", "gated", "topk", "batchtopk", "jumprelu")

few = settings(max_examples=8, deadline=None)  # for each variant
every_kind = pytest.mark.parametrize("kind", BUILD)
new_kinds = pytest.mark.parametrize("kind", NEW)
own_kinds = pytest.mark.parametrize("kind", OWN)
jumps = pytest.mark.parametrize("kind", JUMPS)
normalizations = pytest.mark.parametrize("normalize", NORMALIZE)
seeds = st.integers(0, 2**31)


def fresh(kind, *, d_in=D_IN, d_sae=D_SAE, normalize="none", **options) -> Any:
    return BUILD[kind](d_in, d_sae, normalize=normalize, **options)


def worn(kind, *, training=False, normalize="none", **options) -> Any:
    """An SAE as after some training: every parameter off its start, fitted, with a threshold where it has one."""
    sae = fresh(kind, normalize=normalize, **options).train(training)
    sae.fit_normalization(tokens(64, sae.d_in, seed=99))
    generator = torch.Generator().manual_seed(1)
    for name, p in sae.named_parameters():
        size = 0.5 if name in ("b_enc", "b_gate", "r_mag") else 0.2
        p.data += size * torch.randn(p.shape, generator=generator)
    set_threshold(sae, kind, torch.linspace(0.15, 1.45, sae.d_sae))
    return sae


def exact(kind, *, training=False, seed=0, **options) -> Any:
    """Whole numbers everywhere: on whole tokens nothing is rounded, and z = theta happens often."""
    if kind in JUMPS:
        options.setdefault("bandwidth", 2.0)
    sae = fresh(kind, **options).train(training)
    oracles.make_exact(sae, seed)
    rng = np.random.default_rng(seed)
    if kind == "gated":
        sae.b_gate.data = torch.from_numpy(rng.integers(-2, 3, D_SAE)).float()
    set_threshold(sae, kind, torch.from_numpy(rng.integers(1, 4, D_SAE)).float())
    return sae


def set_threshold(sae, kind, theta):
    if kind == "batchtopk":
        sae.threshold.fill_(theta.mean().round())
    elif kind == "batchtopk, a theta per latent":
        sae.threshold = theta.clone()
    elif kind in JUMPS:
        sae.threshold.data.copy_(theta)


def tokens(n, d_in=D_IN, seed=0):
    """Raw activations: off centre, not of unit scale, more alike in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.linspace(1, 4, d_in) + torch.arange(d_in) % 7


def whole_tokens(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (n, D_IN))).float()


def price_of(kind):
    return slow.price_of_missing(TARGET, D_IN) if kind == "jumprelu, target" else slow.price_per_latent(PRICE)


def oracle(kind, sae, x, normalize="none", price=None) -> slow.Result:
    p, raw = oracles.numbers(sae, normalize), oracles.array(x)
    if kind == "weighted":
        return slow.weighted(p, raw, L1)
    if kind == "gated":
        return slow.gated(p, oracles.array(sae.r_mag), oracles.array(sae.b_gate), raw, L1)
    return slow.jumprelu(p, oracles.array(sae.threshold), raw, sae.bandwidth, price or price_of(kind))


def codes_of(kind, sae, x, normalize="none") -> np.ndarray:
    """The oracle's codes alone."""
    p, raw = oracles.numbers(sae, normalize), oracles.array(x)
    if kind == "weighted":
        return slow.positive_latents(p, raw)
    if kind == "gated":
        return slow.gated_latents(p, oracles.array(sae.r_mag), oracles.array(sae.b_gate), raw)[0]
    return slow.jumprelu_latents(p, oracles.array(sae.threshold), raw)[0]  # BatchTopK in eval mode is no other


def gradients(sae, value) -> dict[str, torch.Tensor]:
    """What one term sends to each parameter; nothing is zero."""
    sae.zero_grad()
    if value.requires_grad:
        value.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}


def close(got, want, tolerance=1e-4):
    """Equal up to rounding, measured by the largest entry wanted."""
    got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).double()
    assert got.shape == want.shape
    size = max(1e-3, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * size)


def same(got, want):
    """Equal in every entry, with nothing forgiven."""
    assert torch.equal(torch.as_tensor(got).double(), torch.as_tensor(want).double())


def bitwise(got, want):
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def state(sae):
    return {name: value.clone() for name, value in sae.state_dict().items()}


def assert_same_state(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name].nan_to_num(-7), value.nan_to_num(-7)), name


# --- construction ----------------------------------------------------------------------------------------


@own_kinds
def test_a_new_sae_has_tied_unit_directions_and_nothing_else(kind):
    sae = fresh(kind)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    more = {"gated": ("r_mag", "b_gate"), "weighted": ()}.get(kind, ("threshold",))
    assert {n: tuple(p.shape) for n, p in sae.named_parameters()} == shapes | {n: (D_SAE,) for n in more}
    close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), 1e-6)
    same(sae.W_enc, sae.W_dec.T)
    for name, p in sae.named_parameters():
        assert name in ("W_enc", "W_dec", "threshold") or not p.any(), name
    same(sae.W_dec, fresh("topk").W_dec)  # the seed decides, not the variant


@pytest.mark.parametrize("bandwidth", [{}, {"bandwidth": 0.25}])
def test_a_new_jumprelu_starts_with_every_threshold_at_the_bandwidth(bandwidth):
    sae = JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.1, **bandwidth)
    assert sae.bandwidth == bandwidth.get("bandwidth", sae.bandwidth)
    assert sae.bandwidth > 0
    assert isinstance(sae.threshold, torch.nn.Parameter)
    close(sae.threshold, torch.full((D_SAE,), sae.bandwidth), 1e-6)
    assert (sae.l0_coefficient, sae.target_l0) == (0.1, None)
    same(JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.1, theta=0.125, **bandwidth).threshold, torch.full((D_SAE,), 0.125))
    assert (fresh("jumprelu, target").l0_coefficient, fresh("jumprelu, target").target_l0) == (None, TARGET)


# --- encode ----------------------------------------------------------------------------------------------


@new_kinds
@settings(few, max_examples=15)
@given(n=st.integers(1, 6), seed=seeds)
def test_codes_are_exactly_the_oracles_ties_with_the_threshold_included(kind, n, seed):
    sae, x = exact(kind, seed=seed), whole_tokens(n, seed)
    same(sae.encode(x), codes_of(kind, sae, x))


@new_kinds
@normalizations
def test_codes_and_reconstruction_match_the_oracle(kind, normalize):
    sae, x = worn(kind, normalize=normalize), tokens(9)
    want = codes_of(kind, sae, x, normalize)
    assert 0 < np.count_nonzero(want) < want.size
    close(sae.encode(x), want)
    close(sae(x), oracles.decode(oracles.numbers(sae, normalize), want, like=oracles.array(x)))


@new_kinds
def test_pre_activations_are_never_negative_and_the_codes_are_among_them(kind):
    sae, x = worn(kind), tokens(9)
    p, raw = oracles.numbers(sae), oracles.array(x)
    z = oracles.pre_activations(p, raw)
    if kind == "gated":
        z = slow.gated_latents(p, oracles.array(sae.r_mag), oracles.array(sae.b_gate), raw)[1]
    close(sae.pre_activations(x), z)
    codes = sae.encode(x)
    same(codes, torch.where(codes > 0, sae.pre_activations(x), 0))


@jumps
def test_the_jump_is_strict(kind):
    sae = exact(kind)
    sae.b_enc.data.copy_(sae.b_dec.data @ sae.W_enc.data + sae.threshold.data)  # pi = theta for a token of zeros
    sae.b_enc.data[::2] += 1
    codes = sae.encode(torch.zeros(1, D_IN))[0]
    same(codes[1::2], torch.zeros(D_SAE // 2))
    same(codes[::2], sae.threshold[::2] + 1)


def test_a_gate_needs_to_be_strictly_positive_and_says_nothing_of_the_size():
    sae = exact("gated")
    sae.b_enc.data = sae.b_dec.data @ sae.W_enc.data + 5  # for a token of zeros, z = 5 in every latent
    sae.b_gate.data = sae.b_dec.data @ sae.W_enc.data + torch.arange(D_SAE) - 10  # and the gates are -10 ... 9
    same(sae.encode(torch.zeros(1, D_IN))[0], [0.0] * 11 + [5.0] * 9)
    sae.r_mag.data.fill_(1.0)  # the size of the product, -b_dec @ W_enc, and the gates as before
    z = (math.e * (-sae.b_dec @ sae.W_enc) + sae.b_enc).relu()
    close(sae.encode(torch.zeros(1, D_IN))[0], torch.where(torch.arange(D_SAE) > 10, z, 0).detach(), 1e-6)


@normalizations
def test_a_gated_sae_is_a_jumprelu_on_its_magnitudes(normalize):
    sae, x = worn("gated", normalize=normalize), tokens(200)
    theta = (sae.b_enc - sae.r_mag.exp() * sae.b_gate).detach()
    equal = theta > 0
    assert 4 < int(equal.sum()) < D_SAE - 4
    z = sae.pre_activations(x)[:, equal]
    sure = (z - theta[equal]).abs() > 1e-5
    same(sae.encode(x)[:, equal][sure], torch.where(z > theta[equal], z, 0)[sure])


# --- loss and gradients ----------------------------------------------------------------------------------


@own_kinds
@normalizations
@pytest.mark.parametrize("training", [True, False])
def test_loss_matches_the_oracle(kind, normalize, training):
    sae, x = worn(kind, training=training, normalize=normalize), tokens(9)
    want = oracle(kind, sae, x, normalize).terms
    assert want["penalty"] > 0
    assert (want["aux"] > 0) == (kind == "gated")
    for value in (sae.loss(x), sae.loss(x.reshape(3, 3, D_IN))):
        assert set(value._fields) == set(want)
        for name, number in want.items():
            assert getattr(value, name).ndim == 0
            assert getattr(value, name).item() == pytest.approx(number, rel=1e-4, abs=1e-6), name


@own_kinds
@normalizations
@pytest.mark.parametrize("term", ["mse", "penalty", "aux", "total"])
def test_each_term_sends_each_parameter_the_gradient_on_paper(kind, normalize, term):
    sae, x = worn(kind, training=True, normalize=normalize), tokens(9)
    want = oracle(kind, sae, x, normalize).gradient
    parts = want.values() if term == "total" else [want.get(term, {})]
    got = gradients(sae, getattr(sae.loss(x), term))
    for name, p in sae.named_parameters():
        close(got[name], sum((part.get(name, 0 * oracles.array(p)) for part in parts), 0 * oracles.array(p)))


@normalizations
def test_the_cases_that_decide_a_gradient_do_occur(normalize):
    """Without them the test above would also pass for a wrong estimator."""
    sae, x = worn("jumprelu", normalize=normalize), tokens(9)
    p, raw, theta = oracles.numbers(sae, normalize), oracles.array(x), oracles.array(THETA)
    pi = slow.affine(p, raw, p.b_enc)
    u = (pi - theta) / BANDWIDTH
    assert abs(abs(u) - 0.5).min() > 1e-4, "an edge of a window in reach of rounding"
    assert abs(pi - theta).min() > 1e-4
    inside, double = abs(u) < 0.5, abs(u) < 1
    assert (inside & (pi > theta)).any()
    assert (inside & (pi < theta) & (pi > 0)).any()
    assert (inside & (pi < 0)).any(), "windows reach below zero"
    assert (double & ~inside).sum() > 3
    sae = worn("gated", normalize=normalize)
    p, r_mag, b_gate = oracles.numbers(sae, normalize), oracles.array(sae.r_mag), oracles.array(sae.b_gate)
    _, z, gate, _ = slow.gated_latents(p, r_mag, b_gate, raw)
    assert ((gate > 0) & (z == 0)).any()
    assert ((gate < 0) & (z > 0)).any()
    assert abs(gate).min() > 1e-4


@jumps
@settings(few, max_examples=25)
@given(n=st.sampled_from([1, 2, 4]), seed=seeds, bandwidth=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_straight_through_gradients_are_exact_at_the_edges_of_the_window(kind, n, seed, bandwidth):
    prices = {"jumprelu": {"l0_coefficient": 0.25}, "jumprelu, target": {"target_l0": 4}}
    sae, x = exact(kind, seed=seed, bandwidth=bandwidth, **prices[kind]), whole_tokens(n, seed)
    price = slow.price_of_missing(4, D_IN) if "target" in kind else slow.price_per_latent(0.25)
    want, loss = oracle(kind, sae, x, price=price), sae.loss(x)
    for term in ("mse", "penalty"):
        assert getattr(loss, term) == want.terms[term]
        got = gradients(sae, getattr(sae.loss(x), term))
        for name, gradient in want.gradient[term].items():
            same(got[name], gradient)


def test_l0_is_paid_for_by_thresholds_alone():
    for kind in JUMPS:
        sae = worn(kind, training=True)
        reached = {name for name, value in gradients(sae, sae.loss(tokens(9)).penalty).items() if value.any()}
        assert reached == {"threshold"}


def test_a_target_pulls_thresholds_from_both_sides():
    x = tokens(9)
    for target, sign in ((1, -1), (D_SAE, 1)):  # too many active: descent must raise theta
        sae = worn("jumprelu, target", target_l0=target)
        gradient = gradients(sae, sae.loss(x).penalty)["threshold"]
        assert gradient.any()
        assert (gradient * sign >= 0).all()


@given(scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]), latent=st.integers(0, D_SAE - 1))
@few
def test_a_weighted_penalty_does_not_care_where_the_size_of_a_latent_lives(scale, latent):
    losses = []
    for factor in (1.0, scale):
        sae, x = worn("weighted"), tokens(9)
        sae.W_enc.data[:, latent] *= factor
        sae.b_enc.data[latent] *= factor
        sae.W_dec.data[latent] /= factor
        losses.append(torch.stack(list(sae.loss(x))).detach())
    close(losses[0], losses[1], 1e-5)


def test_a_decoder_row_of_zeros_has_a_finite_gradient():
    sae = worn("weighted", training=True)
    sae.W_dec.data[3] = 0
    for value in gradients(sae, sae.loss(tokens(9)).total).values():
        assert value.isfinite().all()


@own_kinds
def test_training_losses_count_silence(kind):
    sae = worn(kind, training=True)
    sae.b_enc.data[:4] = -100.0
    if kind == "gated":
        sae.b_gate.data[4:6] = -100.0
    expected = np.zeros(D_SAE, dtype=np.int64)
    for n, seed in ((3, 0), (5, 1)):
        fired = oracles.array(sae.encode(tokens(n, seed=seed))).any(0)
        sae.loss(tokens(n, seed=seed))
        expected = np.where(fired, 0, expected + n)
        assert sae.tokens_since_fired.tolist() == expected.tolist()
    assert expected[:4].tolist() == [8] * 4
    sae.eval().loss(tokens(5))
    assert sae.tokens_since_fired.tolist() == expected.tolist()


# --- what follows an optimiser's step --------------------------------------------------------------------


@every_kind
def test_constrain_makes_decoder_rows_unit_unless_they_are_weighed(kind):
    sae = worn(kind)
    before = state(sae)
    sae.constrain()
    if kind != "weighted":
        before["W_dec"] = before["W_dec"] / before["W_dec"].norm(dim=1, keepdim=True)
        assert float((sae.W_dec.norm(dim=1) - 1).detach().abs().max()) < 1e-6
    for name, value in sae.state_dict().items():
        close(value, before[name], 1e-6)


@own_kinds
def test_the_decoders_gradient_loses_its_radial_part_unless_rows_are_weighed(kind):
    sae = fresh(kind)
    gradient, rows = gradients(sae, sae.loss(tokens(9)).total)["W_dec"].double(), sae.W_dec.detach().double()
    along = (gradient * rows).sum(1, keepdim=True)
    assert along.abs().max() > 1e-2, "there must be something to remove"
    sae.project_decoder_grad()
    close(sae.W_dec.grad, gradient if kind == "weighted" else gradient - along * rows, 1e-5)


@jumps
def test_constrain_lifts_thresholds_that_a_step_took_too_far_and_leaves_the_rest(kind):
    sae = worn(kind)
    sae.threshold.data[:3] = torch.tensor([-2.0, 0.0, -1e-30])
    sae.constrain()
    assert (sae.threshold[:3] > 0).all()
    assert (sae.threshold[:3] < 1e-3).all(), "a tiny minimum"
    same(sae.threshold[3:], THETA[3:])
    assert sae.encode(tokens(3)).isfinite().all()
    assert sae.threshold.requires_grad


# --- properties of all variants in eval mode -------------------------------------------------------------


@every_kind
@few
@given(n=st.integers(2, 6), seed=seeds)
def test_a_token_alone_is_encoded_as_in_a_batch(kind, n, seed):
    sae, x = exact(kind, seed=seed), whole_tokens(n, seed)
    same(torch.cat([sae.encode(token[None]) for token in x]), sae.encode(x))
    same(sae.encode(x[0]), sae.encode(x)[0])


@new_kinds
def test_the_active_set_of_a_token_does_not_depend_on_its_batch(kind):
    sae, x = worn(kind, normalize="dataset"), tokens(60)
    together, alone = sae.encode(x), torch.cat([sae.encode(token[None]) for token in x])
    edge = torch.zeros(D_SAE) if kind in ("weighted", "gated") else THETA
    sure = (sae.pre_activations(x) - edge).abs() > 1e-4
    assert torch.equal((together > 0) & sure, (alone > 0) & sure)
    close(torch.where(sure, alone, 0), torch.where(sure, together, 0).detach(), 1e-5)


def reorder_latents(sae, order):
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0), ("b_gate", 0), ("r_mag", 0), ("threshold", 0)):
        value = getattr(sae, name, None)
        if value is not None and value.ndim:
            value.data = value.data.index_select(axis, order).contiguous()


@every_kind
@few
@given(n=st.integers(1, 6), seed=seeds)
def test_reordered_tokens_and_latents_have_reordered_codes_and_the_same_loss(kind, n, seed):
    sae, x = worn(kind), tokens(n, seed=seed)
    codes, loss = sae.encode(x).detach(), torch.stack(list(sae.loss(x))).detach()
    rows, columns = (torch.from_numpy(np.random.default_rng(seed).permutation(size)) for size in (n, D_SAE))
    reorder_latents(sae, columns)
    close(sae.encode(x[rows]), codes[rows][:, columns], 1e-5)
    moved = torch.stack(list(sae.loss(x[rows]))).detach()
    close(moved[[0, 1, 3, 4, 5]], loss[[0, 1, 3, 4, 5]], 1e-5)  # all but fvu, infinite for one token


@own_kinds
def test_reordered_latents_have_reordered_gradients(kind):
    sae, x = worn(kind), tokens(9)
    before = gradients(sae, sae.loss(x).total)
    columns = torch.from_numpy(np.random.default_rng(0).permutation(D_SAE))
    reorder_latents(sae, columns)
    for name, value in gradients(sae, sae.loss(x).total).items():
        want = before[name]
        if name != "b_dec":
            want = want.index_select(1 if name == "W_enc" else 0, columns)
        close(value, want, 1e-5)


@new_kinds
@few
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1, 1))
def test_rescaled_and_shifted_input_refitted_keeps_its_codes(kind, scale, shift):
    sae, x = worn(kind, normalize="dataset"), tokens(20)
    moved = scale * (x + shift)
    sae.fit_normalization(x)
    codes, loss, x_hat = sae.encode(x).detach(), torch.stack(list(sae.loss(x))).detach(), sae(x).detach()
    sae.fit_normalization(moved)
    close(sae.encode(moved), codes)
    close(torch.stack(list(sae.loss(moved))), loss)  # theta, penalties and mse are in normalised units
    close(sae(moved) / scale - shift, x_hat, 1e-3)


@every_kind
@few
@given(leading=st.lists(st.integers(1, 3), max_size=3), normalize=st.sampled_from(NORMALIZE))
def test_leading_dimensions_are_all_batch_dimensions(kind, leading, normalize):
    sae = worn(kind, normalize=normalize)
    flat = tokens(math.prod(leading))
    x = flat.reshape(*leading, D_IN)
    same(sae.encode(x), sae.encode(flat).reshape(*leading, D_SAE))
    same(sae(x), sae(flat).reshape(x.shape))
    same(sae.pre_activations(x), sae.pre_activations(flat).reshape(*leading, D_SAE))


@every_kind
@normalizations
def test_tokens_that_are_zero_once_normalised_have_the_codes_of_the_biases(kind, normalize):
    sae = worn(kind, training=True, normalize=normalize)
    sae.b_enc.data += 1.0
    row = {"dataset": sae.norm_mean, "token": torch.full((D_IN,), 3.0), "none": torch.zeros(D_IN)}[normalize]
    x = tokens(8)
    x[2:4] = row
    value = sae.loss(x)
    assert all(torch.isfinite(term) for term in value)
    assert all(g.isfinite().all() for g in gradients(sae, value.total).values())
    bias = oracles.array(-sae.b_dec @ sae.W_enc)
    z = np.maximum(bias * np.exp(oracles.array(getattr(sae, "r_mag", torch.zeros(1)))) + oracles.array(sae.b_enc), 0)
    if kind == "gated":
        z = np.where(bias + oracles.array(sae.b_gate) > 0, z, 0)
    elif kind == "topk":
        z = oracles.keep_row(z[None], K)[0]
    elif kind not in ("vanilla", "weighted"):
        z = oracles.keep_above(z, oracles.array(sae.threshold))  # type: ignore[arg-type]
    codes = sae.eval().encode(row.expand(3, D_IN))
    assert codes.any()
    close(codes, np.array([z] * 3))
    assert torch.equal(sae.encode(x)[2:4] > 0, codes[:2] > 0)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_one_token_is_a_batch(kind, training):
    sae, x = worn(kind, training=training), tokens(1)
    p, raw = oracles.numbers(sae), oracles.array(x)
    value, codes = sae.loss(x), sae.encode(x)
    assert codes.shape == (1, D_SAE)
    assert value.l0 == (codes > 0).sum()
    error = oracles.normalise(p, raw) - (oracles.array(codes) @ p.W_dec + p.b_dec)
    assert value.mse.item() == pytest.approx(float((error**2).sum()), rel=1e-4)
    assert value.total.isfinite()
    assert all(g.isfinite().all() for g in gradients(sae, value.total).values())


@few
@given(n=st.integers(1, 6), seed=seeds, lower=st.sampled_from([0, 4, 100]))
def test_a_budget_that_covers_every_positive_entry_is_no_cut(n, seed, lower):
    x = whole_tokens(n, seed)
    for k in (D_SAE, D_SAE - 1):
        for kind in ("topk", "batchtopk"):
            plain, sae = exact("vanilla"), exact(kind, k=k, training=True)
            sae.load_state_dict(plain.state_dict(), strict=False)
            for one in (plain, sae):
                one.b_enc.data -= lower
            codes = plain.encode(x)
            if int((codes > 0).sum(1).max()) <= k:
                same(sae.encode(x), codes)
                assert sae.loss(x).l0 == (codes > 0).sum() / n


@settings(few, max_examples=100)
@given(hundredths=st.integers(1, 400), n=st.integers(1, 700))
def test_budgets_are_counted_as_people_write_them(hundredths, n):
    k, budget = hundredths / 100, hundredths * n // 100
    assert oracles.budget(k, n) == budget, "the oracle's tolerance must not matter here"
    z = 1 + torch.arange(4 * n).reshape(n, 4).float()
    if budget == 0:
        with pytest.raises(ValueError, match="budget"):
            keep_batch(z, k)
    else:
        assert int((keep_batch(z, k) > 0).sum()) == budget


@pytest.mark.parametrize(
    ("k", "n"), [(0.1 * 30, 1), (0.1 * 3, 10), (0.7 + 0.1, 10), (1 / 3, 9), (2 / 3, 1500), (1.15, 1000), (4.1, 10_000)]
)
def test_budgets_survive_sums_and_thirds(k, n):
    meant = Fraction(k).limit_denominator(1000) * n
    assert meant.denominator == 1
    assert int((keep_batch(torch.rand(n, 5) + 1, k) > 0).sum()) == meant


# --- bfloat16 --------------------------------------------------------------------------------------------

HALF = torch.bfloat16


@every_kind
@normalizations
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_for_matrices(kind, normalize, training):
    sae = worn(kind, training=training, normalize=normalize)
    before = state(sae)
    assert sae.to(HALF) is sae
    x = tokens(50).to(HALF)
    assert sae.encode(x).dtype == sae.pre_activations(x).dtype == sae(x).dtype == HALF
    value = sae.loss(x)
    assert all(term.isfinite() for term in value)
    got = gradients(sae, value.total)
    for name, p in sae.named_parameters():
        assert p.dtype == got[name].dtype == (torch.float32 if name == "threshold" else HALF), name
        assert got[name].isfinite().all()
    for name in ("threshold", "norm_mean", "norm_scale"):
        if name in before:
            bitwise(getattr(sae, name).detach(), before[name])
    if "jumprelu" in kind:
        assert got["threshold"].any()


@pytest.mark.parametrize("convert", [lambda sae: sae.to(HALF), lambda sae: sae.bfloat16(), lambda sae: sae.half()])
def test_every_way_to_half_precision_spares_the_thresholds(convert):
    sae = worn("jumprelu")
    threshold = sae.threshold
    sae = convert(sae)
    bitwise(sae.threshold.detach(), THETA)
    assert sae.threshold.requires_grad
    assert sae.threshold.is_leaf
    assert sae.threshold is threshold, "an optimiser may hold it"
    assert sae.W_enc.dtype != torch.float32


@pytest.mark.parametrize("kind", [*JUMPS, "batchtopk, a theta per latent"])
def test_in_half_precision_a_threshold_is_compared_in_full(kind):
    sae, x = worn(kind).to(HALF), tokens(40).to(HALF)
    z = sae.pre_activations(x)
    theta = z.float().max(0).values.detach()  # entries equal to theta are not above it ...
    assert (theta > 0).all()
    for nudge, kept in ((1.0, 0), (1.00001, 0), (0.99999, D_SAE)):  # ... and this nudge is lost in bfloat16
        sae.threshold.data.copy_(theta * nudge)
        codes = sae.encode(x)
        assert int((codes > 0).any(0).sum()) == kept
        same(codes, oracles.keep_above(oracles.array(z), oracles.array(sae.threshold)))  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [3, 2.3, 0.7])
def test_in_half_precision_the_batch_budget_is_still_met(k):
    sae, x = worn("batchtopk", d_in=16, d_sae=256, k=k, training=True).to(HALF), tokens(100, 16).to(HALF)
    z = sae.pre_activations(x).flatten()
    assert len(z.unique()) < len(z) / 4, "ties abound"
    assert int((sae.encode(x) > 0).sum()) == round(100 * k)
    assert float(sae.loss(x).l0) == pytest.approx(k, abs=1e-6)


# --- from BatchTopK to JumpReLU --------------------------------------------------------------------------


def calibrated(vector=False, **options) -> Any:
    sae = worn("batchtopk", **{"d_in": 48, "d_sae": 96, "k": 2.5} | options)
    sae.threshold = torch.linspace(0.3, 2.1, sae.d_sae) if vector else torch.tensor(1.2345)
    return sae


@pytest.mark.parametrize("vector", [False, True])
@normalizations
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_to_jumprelu_changes_no_bit_of_the_output(vector, normalize, dtype):
    sae = calibrated(vector, normalize=normalize).to(dtype)
    jump = sae.to_jumprelu()
    assert type(jump) is JumpReLUSAE
    for n in (1, 7, 200):
        x = tokens(n, 48, seed=n).to(dtype)
        bitwise(jump.encode(x), sae.encode(x))
        bitwise(jump(x), sae(x))
        bitwise(jump.pre_activations(x), sae.pre_activations(x))
    assert 0 < (sae.encode(x) > 0).float().mean() < 1
    bitwise(jump.encode(x.reshape(10, 20, 48)), sae.encode(x.reshape(10, 20, 48)))


@few
@given(seed=seeds, theta=st.integers(1, 4))
def test_to_jumprelu_agrees_where_entries_equal_the_threshold(seed, theta):
    sae, x = exact("batchtopk", seed=seed), whole_tokens(8, seed)
    sae.threshold.fill_(theta)
    bitwise(sae.to_jumprelu().encode(x), sae.encode(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("vector", [False, True])
def test_to_jumprelu_takes_everything_along_and_leaves_the_original(vector, training):
    sae = calibrated(vector, normalize="dataset", training=training)
    sae.metadata.update({"hook": "blocks.8", "tokens": {"seen": 12}})
    before = state(sae)
    jump = sae.to_jumprelu()
    assert not jump.training
    assert sae.training is training
    assert_same_state(sae.state_dict(), before)
    assert (jump.d_in, jump.d_sae, jump.normalize) == (48, 96, "dataset")
    assert (jump.target_l0, jump.l0_coefficient) == (2.5, None)
    assert jump.metadata == sae.metadata
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "norm_mean", "norm_scale"):
        bitwise(getattr(jump, name).detach(), before[name])
    bitwise(jump.threshold.detach(), before["threshold"].expand(96))
    assert jump.threshold.requires_grad
    assert all(p.requires_grad for p in sae.parameters())


@pytest.mark.parametrize("vector", [False, True])
def test_to_jumprelu_shares_no_memory_with_the_original(vector):
    sae = calibrated(vector)
    jump = sae.to_jumprelu()
    source, copy = state(sae), state(jump)
    for value in jump.state_dict().values():
        # One entry at a time, as an optimiser's step would: a view of one number cannot have entries of its own.
        value.reshape(-1)[0] = 9 if value.ndim == 0 else value.reshape(-1)[0] + 9
    assert_same_state(sae.state_dict(), source)
    assert (jump.threshold[1:] == copy["threshold"][1:]).all(), "each latent has a threshold of its own"
    jump = sae.to_jumprelu()
    for value in sae.state_dict().values():
        value.copy_(torch.full_like(value, 9))
    assert_same_state(jump.state_dict(), copy)


def test_to_jumprelu_shares_no_metadata_with_the_original():
    sae = calibrated()
    sae.metadata.update({"versions": {"torch": "2"}})
    jump = sae.to_jumprelu()
    jump.metadata["hook"] = "another"
    assert sae.metadata["hook"] is None
    jump.metadata["versions"]["torch"] = "3"
    assert sae.metadata["versions"] == {"torch": "2"}


def test_to_jumprelu_gives_an_sae_that_trains_and_saves(tmp_path):
    sae = calibrated(normalize="dataset", d_in=D_IN, d_sae=D_SAE)
    jump = sae.to_jumprelu()
    jump.save(tmp_path)
    loaded, x = load_sae(tmp_path), tokens(30)
    assert type(loaded) is JumpReLUSAE
    bitwise(loaded.encode(x), sae.encode(x))
    bitwise(loaded(x), sae(x))
    got = gradients(jump.train(), jump.loss(x).total)
    assert all(value.isfinite().all() for value in got.values())
    assert got["W_enc"].any()


@pytest.mark.parametrize("training", [True, False])
def test_to_jumprelu_needs_a_threshold(training):
    with pytest.raises(RuntimeError, match="calibrate_threshold"):
        fresh("batchtopk").train(training).to_jumprelu()


# --- files -----------------------------------------------------------------------------------------------


@new_kinds
@normalizations
@pytest.mark.parametrize("training", [True, False])
def test_a_saved_sae_comes_back_bit_for_bit(kind, normalize, training, tmp_path):
    sae, x = worn(kind, training=training, normalize=normalize), tokens(9)
    sae.loss(x)
    sae.metadata.update({"hook": "blocks.8", "tokens": {"seen": 12, "distinct": None}})
    sae.save(tmp_path / "run")
    loaded = load_sae(tmp_path / "run")
    assert type(loaded) is type(sae)
    assert not loaded.training
    assert loaded.metadata == sae.metadata
    assert_same_state(loaded.state_dict(), sae.state_dict())
    for name in ("l1", "decoder_norm", "l0_coefficient", "target_l0", "bandwidth", "k", "normalize"):
        assert getattr(loaded, name, None) == getattr(sae, name, None), name
    sae.eval()
    bitwise(loaded.encode(x), sae.encode(x))
    bitwise(loaded(x), sae(x))
    bitwise(torch.stack(list(loaded.loss(x))), torch.stack(list(sae.loss(x))))


@own_kinds
def test_training_goes_on_from_a_file_as_if_nothing_had_happened(kind, tmp_path):
    sae, x = worn(kind, training=True, normalize="dataset"), tokens(30)
    sae.save(tmp_path)
    steps = []
    for one in (sae, load_sae(tmp_path).train()):
        for _ in range(3):
            gradients(one, one.loss(x).total)
            one.project_decoder_grad()
            for p in one.parameters():
                assert p.grad is not None
                p.data -= 0.01 * p.grad
            one.constrain()
        steps.append(state(one))
    assert_same_state(steps[1], steps[0])


@every_kind
def test_a_half_precision_sae_comes_back_bit_for_bit(kind, tmp_path):
    sae, x = worn(kind, normalize="dataset").to(HALF), tokens(9).to(HALF)
    sae.save(tmp_path)
    loaded = load_sae(tmp_path)
    assert_same_state(loaded.state_dict(), sae.state_dict())
    bitwise(loaded.encode(x), sae.encode(x))


@pytest.mark.parametrize(("kind", "other"), permutations(FIVE, 2))
def test_a_file_under_the_name_of_another_variant_is_refused(kind, other, tmp_path):
    worn(kind).save(tmp_path)
    rename(tmp_path, variant=other)
    with pytest.raises(ValueError, match=r"config\.json|variant"):
        load_sae(tmp_path)


@pytest.mark.parametrize(("kind", "other"), [("vanilla", "gated"), ("gated", "vanilla"), ("batchtopk", "jumprelu")])
def test_tensors_of_another_variant_are_refused_even_with_every_setting(kind, other, tmp_path):
    worn(kind).save(tmp_path / "a")
    worn(other).save(tmp_path / "b")
    (tmp_path / "a" / "config.json").write_text((tmp_path / "b" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"config\.json"):
        load_sae(tmp_path / "a")


def rename(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("value", [-0.5, 0.0, math.nan, math.inf, -math.inf])
def test_a_tampered_threshold_in_a_file_is_refused(value, tmp_path):
    worn("jumprelu").save(tmp_path)
    stored = load_file(tmp_path / "sae.safetensors")
    stored["threshold"][[7, 11]] = value
    save_file(stored, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"(?<!\d)7(?!\d)") as error:
        load_sae(tmp_path)
    assert re.search(r"precision", str(error.value))


@pytest.mark.parametrize("value", [-0.5, 0.0, math.inf, "one of many is nan"])
def test_a_tampered_threshold_of_batchtopk_is_refused_too(value, tmp_path):
    sae = worn("batchtopk, a theta per latent" if isinstance(value, str) else "batchtopk")
    sae.threshold.reshape(-1)[-1] = math.nan if isinstance(value, str) else value
    sae.save(tmp_path)
    with pytest.raises(ValueError, match="threshold"):
        load_sae(tmp_path)


def test_a_file_whose_thresholds_were_rounded_to_zero_is_refused(tmp_path):
    sae = worn("jumprelu")
    sae.threshold.data[5] = 1e-9
    sae.save(tmp_path)
    assert load_sae(tmp_path).state_dict()["threshold"][5] > 0
    stored = load_file(tmp_path / "sae.safetensors")
    stored["threshold"] = stored["threshold"].half()  # 1e-9 is zero in float16
    save_file(stored, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"precision"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("jumprelu", {"l0_coefficient": None}),
        ("jumprelu", {"target_l0": 3}),
        ("jumprelu", {"bandwidth": 0}),
        ("jumprelu", {"bandwidth": -1.0}),
        ("jumprelu, target", {"target_l0": D_SAE + 1}),
        ("weighted", {"decoder_norm": "heavy"}),
        ("gated", {"l1": -1}),
        ("gated", {"d_sae": D_SAE + 1}),
        ("jumprelu", {"d_sae": D_SAE + 1}),
    ],
)
def test_tampered_settings_in_a_file_are_refused(kind, changes, tmp_path):
    worn(kind).save(tmp_path)
    rename(tmp_path, **changes)
    with pytest.raises(ValueError):  # noqa: PT011 (the settings differ, and so do the sentences)
        load_sae(tmp_path)


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prices", [{}, {"l0_coefficient": 0.1, "target_l0": 3}, {"l0_coefficient": 0, "target_l0": 3}])
def test_a_jumprelu_has_exactly_one_price(prices):
    with pytest.raises(ValueError, match="l0_coefficient") as error:
        JumpReLUSAE(D_IN, D_SAE, **prices)
    assert "target_l0" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("l0_coefficient", value) for value in (-0.1, math.nan, math.inf)),
        *(("target_l0", value) for value in (0, -1, D_SAE + 0.5, math.nan, math.inf)),
        *(("bandwidth", value) for value in (0, -0.1, math.nan, math.inf)),
        *(("theta", value) for value in (0, -0.1, math.nan, math.inf)),
    ],
)
def test_jumprelus_numbers_out_of_range_are_named(name, value):
    price = {"l0_coefficient": 1.0} if name in ("bandwidth", "theta") else {}
    with pytest.raises(ValueError, match=name) as error:
        JumpReLUSAE(D_IN, D_SAE, **price, **{name: value})
    assert str(value) in str(error.value)


def test_jumprelus_numbers_at_the_end_of_the_range_are_fine():
    free = JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0)
    assert free.loss(tokens(3)).penalty == 0
    assert JumpReLUSAE(D_IN, D_SAE, target_l0=D_SAE).target_l0 == D_SAE
    assert JumpReLUSAE(D_IN, D_SAE, target_l0=0.5).loss(tokens(3)).penalty.isfinite()


@jumps
@pytest.mark.parametrize("value", [-0.5, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("use", ["encode", "loss", "__call__"])
@pytest.mark.parametrize("training", [True, False])
def test_a_threshold_that_cannot_be_is_named_when_used(kind, value, use, training):
    sae = worn(kind, training=training)
    sae.threshold.data[[4, 13]] = value
    with pytest.raises(ValueError, match=r"(?<!\d)4(?!\d)") as error:
        getattr(sae, use)(tokens(3))
    assert re.search(rf"{value:g}", str(error.value))
    assert re.search(r"precision", str(error.value))
    assert "13" not in str(error.value), "the first bad latent is enough"


@pytest.mark.parametrize("kind", ["weighted", "gated"])
@pytest.mark.parametrize("l1", [-0.5, math.nan, math.inf])
def test_an_l1_that_is_no_penalty_is_refused(kind, l1):
    with pytest.raises(ValueError, match="l1") as error:
        GatedSAE(D_IN, D_SAE, l1=l1) if kind == "gated" else VanillaSAE(D_IN, D_SAE, l1=l1, decoder_norm="weighted")
    assert str(l1) in str(error.value)


def test_an_unknown_decoder_norm_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="heavy") as error:
        VanillaSAE(D_IN, D_SAE, l1=L1, decoder_norm="heavy")
    assert all(choice in str(error.value) for choice in ("unit", "weighted"))


def test_unit_is_the_default_decoder_norm():
    assert fresh("vanilla").decoder_norm == "unit"
    assert fresh("weighted").decoder_norm == "weighted"


@own_kinds
def test_common_mistakes_are_refused_as_by_every_variant(kind):
    with pytest.raises(ValueError, match="d_in"):
        fresh(kind, d_in=0)
    with pytest.raises(ValueError, match="d_sae"):
        fresh(kind, d_sae=0)
    with pytest.raises(ValueError, match="layernorm"):
        fresh(kind, normalize="layernorm")
    sae = worn(kind)
    for use in (sae.encode, sae.loss, sae, sae.pre_activations):
        with pytest.raises(ValueError, match=r"(?<!\d)11(?!\d)"):
            use(torch.zeros(2, 11))
    for cut in ("row", "batch", "threshold"):
        with pytest.raises(ValueError, match=cut) as error:
            sae.encode(tokens(3), cut=cut)
        assert "own" in str(error.value)
    same(sae.encode(tokens(3), cut="own"), sae.encode(tokens(3)))


def test_a_threshold_for_each_latent_loads_into_a_new_sae_and_back():
    sae = BatchTopKSAE(4, 6, k=2)
    sae.threshold = torch.arange(1.0, 7.0)
    other = BatchTopKSAE(4, 6, k=2)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.threshold, sae.threshold)
    other.load_state_dict(BatchTopKSAE(4, 6, k=2).state_dict())
    assert other.threshold.shape == ()
    assert other.threshold.isnan()
