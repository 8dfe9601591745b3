"""calibrate_threshold held to its definition, on SAEs whose arithmetic is exact in float32."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_sae import BatchTopKSAE, TopKSAE, VanillaSAE, calibrate_threshold

D_IN, D_SAE, K = 5, 12, 1.7


def exact_sae(k=K, seed=0):
    sae = BatchTopKSAE(D_IN, D_SAE, k=k, normalize="none")
    oracles.make_exact(sae, seed)
    return sae


def silent_sae():
    sae = exact_sae()
    sae.b_enc.data.fill_(-1000.0)
    return sae


def whole_tokens(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (n, D_IN))).float()


def check(sae, result, batches, k=K, normalize="none", rel=1e-6):
    """The result is what the definition gives on these batches."""
    arrays = [oracles.array(batch) for batch in batches]
    theta, l0, spread = oracles.batch_min_mean(oracles.numbers(sae, normalize), arrays, k)
    assert result.theta == pytest.approx(theta, rel=rel)
    assert result.l0 == pytest.approx(l0, rel=1e-6)
    assert result.spread == pytest.approx(spread, rel=10 * rel, abs=10 * rel)
    assert float(sae.threshold) == pytest.approx(theta, rel=rel)


@pytest.mark.parametrize(
    ("n", "batch_size", "used"),
    [(8, 4, [4, 4]), (10, 4, [4, 4]), (3, 4, [3]), (4, 4, [4]), (5, 4, [4]), (5, 1, [1] * 5)],
)
def test_a_tensor_is_cut_in_order_and_a_last_partial_batch_dropped_unless_alone(n, batch_size, used):
    sae, x = exact_sae(), whole_tokens(n)
    result = calibrate_threshold(sae, x, method="batch_min_mean", batch_size=batch_size)
    check(sae, result, x[: sum(used)].split(used))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    tenths=st.integers(10, 10 * D_SAE),
    seed=st.integers(0, 2**31),
)
def test_theta_l0_and_spread_match_the_oracle_on_any_batches(sizes, tenths, seed):
    sae, batches = exact_sae(k=tenths / 10), list(whole_tokens(sum(sizes), seed).split(sizes))
    # A batch without a positive pre-activation can occur by chance; skipping one has its own test.
    batches = [batch for batch in batches if sae.pre_activations(batch).any()]
    if batches:
        check(sae, calibrate_threshold(sae, batches), batches, k=tenths / 10)


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
def test_theta_is_in_normalised_units(normalize):
    sae = BatchTopKSAE(D_IN, D_SAE, k=K, normalize=normalize)
    x = 7 * torch.randn(90, D_IN, generator=torch.Generator().manual_seed(0)) + 20
    sae.fit_normalization(x)
    result = calibrate_threshold(sae, x, batch_size=30)
    check(sae, result, x.split(30), normalize=normalize, rel=1e-3)


def test_the_default_batch_is_1024_tokens():
    sae, x = exact_sae(), whole_tokens(2100)
    assert calibrate_threshold(sae, x) == calibrate_threshold(sae, x, batch_size=1024)
    check(sae, calibrate_threshold(sae, x), x[:2048].split(1024))


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda batches: (batch for batch in batches)])
def test_any_iterable_of_batches_will_do(kind):
    sae, batches = exact_sae(), whole_tokens(30).split([7, 11, 12])
    check(sae, calibrate_threshold(sae, kind(batches)), batches)


def test_one_batch_has_no_spread():
    assert calibrate_threshold(exact_sae(), whole_tokens(8)).spread == 0.0


def test_a_batch_in_which_nothing_is_kept_is_skipped():
    sae, x = exact_sae(), whole_tokens(12)
    sae.b_enc.data.fill_(-1.0)
    nothing = sae.b_dec.detach().repeat(6, 1)  # leaves only the negative biases
    assert not sae.pre_activations(nothing).any()
    with_it = calibrate_threshold(sae, [x[:6], nothing, x[6:]])
    without = calibrate_threshold(sae, [x[:6], x[6:]])
    assert (with_it.theta, with_it.spread) == (without.theta, without.spread)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_changes_nothing_and_is_restored(training):
    sae, x = exact_sae().train(training), whole_tokens(20)
    for _ in range(2):  # the second time with a threshold already there
        check(sae, calibrate_threshold(sae, x, batch_size=5), x.split(5))
        assert sae.training is training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_error_too(training):
    sae = silent_sae().train(training)
    with pytest.raises(ValueError):  # noqa: PT011 (the mode is what counts here)
        calibrate_threshold(sae, whole_tokens(8))
    assert sae.training is training


def test_calibrating_touches_nothing_but_the_threshold():
    sae = exact_sae()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    calibrate_threshold(sae, whole_tokens(20), batch_size=5)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "threshold"), name
    assert not sae.threshold.requires_grad


def test_the_threshold_is_a_nan_until_calibrated_and_a_float32_scalar_always():
    sae = exact_sae()
    assert math.isnan(sae.threshold)
    result = calibrate_threshold(sae, whole_tokens(20), batch_size=5)
    assert "threshold" in dict(sae.named_buffers())
    assert (sae.threshold.dtype, sae.threshold.ndim) == (torch.float32, 0)
    assert [type(value) for value in (result.theta, result.l0, result.spread)] == [float] * 3
    assert math.isfinite(sae.threshold)


def test_after_calibrating_eval_mode_keeps_what_is_strictly_above_theta():
    sae, x = exact_sae(), whole_tokens(20)
    result = calibrate_threshold(sae, x)  # one batch: theta is itself an entry, so strictness shows
    z = oracles.pre_activations(oracles.numbers(sae), oracles.array(x))
    assert (z == result.theta).any()
    kept = oracles.array(sae.eval().encode(x))
    assert np.array_equal(kept, oracles.keep_above(z, result.theta))
    assert np.count_nonzero(kept) / len(x) == pytest.approx(result.l0)
    assert float(sae.loss(x).l0) == pytest.approx(result.l0)


def test_l0_at_theta_is_close_to_k_on_many_like_batches():
    sae, x = BatchTopKSAE(16, 64, k=4), torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    assert calibrate_threshold(sae, x, batch_size=512).l0 == pytest.approx(4, rel=0.03)
    fresh = torch.randn(8192, 16, generator=torch.Generator().manual_seed(1))
    assert float(sae.eval().loss(fresh).l0) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("activations", [whole_tokens(8), [whole_tokens(4), whole_tokens(4)], []])
def test_nothing_kept_at_all_is_an_error(activations):
    with pytest.raises(ValueError):  # noqa: PT011 (the wording is free)
        calibrate_threshold(silent_sae(), activations)


@pytest.mark.parametrize("sae", [VanillaSAE(D_IN, D_SAE, l1=0.1), TopKSAE(D_IN, D_SAE, k=2)])
def test_only_a_batchtopk_sae_can_be_calibrated(sae):
    with pytest.raises(TypeError, match="BatchTopK"):
        calibrate_threshold(sae, whole_tokens(8))


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="by_guess"):
        calibrate_threshold(exact_sae(), whole_tokens(8), method="by_guess")


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="11"):
        calibrate_threshold(exact_sae(), torch.zeros(8, 11))
