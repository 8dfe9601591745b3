"""calibrate_threshold held to its definitions, mostly on SAEs whose arithmetic is exact in float32."""

import copy
import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    TopKSAE,
    TrainConfig,
    VanillaSAE,
    calibrate_threshold,
    load_sae,
    train,
)

D_IN, D_SAE, K = 5, 12, 1.7
METHODS = ("batch_min_mean", "ema", "target_l0", "learned")

# Small examples are the rule here, and the warning about them has tests of its own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


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


# -- the estimators, slowly ------------------------------------------------------------------------------


def all_z(sae, batches, normalize="none"):
    p = oracles.numbers(sae, normalize)
    rows = [oracles.normalise(p, oracles.array(batch)) for batch in batches]
    return [np.maximum(0, (x_n - p.b_dec) @ p.W_enc + p.b_enc) for x_n in rows]


def smallest_kept(zs, k):
    """The smallest entry kept of each batch in which anything is kept."""
    kept = [oracles.keep_batch(z, k) for z in zs]
    return [float(z[z > 0].min()) for z in kept if z.any()]


def standard_deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def moving_average(minima, decay, bias_correction):
    v = 0.0
    for m in minima:
        v = decay * v + (1 - decay) * m
    return v / (1 - decay ** len(minima)) if bias_correction else v


def next_after_budget(zs, k):
    """The (B+1)-th largest positive entry of the pool; without one, the smallest (and theta is just below it)."""
    positive = sorted((float(v) for z in zs for v in z.ravel() if v > 0), reverse=True)
    return positive[min(oracles.budget(k, sum(len(z) for z in zs)), len(positive) - 1)]


def mean_l0(zs, theta):
    return sum(np.count_nonzero(z > theta) for z in zs) / sum(len(z) for z in zs)


# -- the mean of the batches' smallest kept entries ------------------------------------------------------


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
    assert np.array_equal(kept, oracles.keep_above(z, float(result.theta)))
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


@pytest.mark.parametrize(
    "sae",
    [
        VanillaSAE(D_IN, D_SAE, l1=0.1),
        GatedSAE(D_IN, D_SAE, l1=0.1),
        TopKSAE(D_IN, D_SAE, k=2),
        JumpReLUSAE(D_IN, D_SAE, target_l0=2),
    ],
    ids=lambda sae: sae.variant,
)
def test_only_a_batchtopk_sae_can_be_calibrated(sae):
    with pytest.raises(TypeError, match="BatchTopK"):
        calibrate_threshold(sae, whole_tokens(8))


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="by_guess"):
        calibrate_threshold(exact_sae(), whole_tokens(8), method="by_guess")


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="11"):
        calibrate_threshold(exact_sae(), torch.zeros(8, 11))


# -- ema -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    decay=st.floats(0, 0.995),
    bias_correction=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_ema_matches_the_recurrence(sizes, decay, bias_correction, seed):
    sae, batches = exact_sae(), list(whole_tokens(sum(sizes), seed).split(sizes))
    zs = all_z(sae, batches)
    minima = smallest_kept(zs, K)
    if minima:
        result = calibrate_threshold(sae, batches, method="ema", decay=decay, bias_correction=bias_correction)
        theta = moving_average(minima, decay, bias_correction)
        assert result.theta == pytest.approx(theta, rel=1e-5)
        assert float(sae.threshold) == pytest.approx(theta, rel=1e-5)
        assert result.spread == pytest.approx(standard_deviation(minima), rel=1e-5, abs=1e-5)
        assert result.l0 == pytest.approx(mean_l0(zs, float(sae.threshold)), rel=1e-6)


def batches_of_different_heights():
    """Three batches, one token each, whose smallest kept entries are clearly different."""
    sae = BatchTopKSAE(2, 2, k=1, normalize="none")
    sae.W_enc.data.copy_(torch.eye(2))
    return sae, [torch.tensor([[height, 0.5]]) for height in (8.0, 4.0, 1.0)]


def test_ema_by_hand():
    sae, batches = batches_of_different_heights()
    raw = calibrate_threshold(sae, batches, method="ema", decay=0.5, bias_correction=False)
    assert raw.theta == 8 / 8 + 4 / 4 + 1 / 2  # the last batch weighs most
    corrected = calibrate_threshold(sae, batches, method="ema", decay=0.5)
    assert corrected.theta == pytest.approx(2.5 / (1 - 0.5**3), rel=1e-6)
    backwards = calibrate_threshold(sae, batches[::-1], method="ema", decay=0.5)
    assert backwards.theta == pytest.approx((8 / 2 + 4 / 4 + 1 / 8) / (1 - 0.5**3), rel=1e-6)
    assert calibrate_threshold(sae, batches, method="ema", decay=0.0).theta == 1.0
    assert corrected.spread == pytest.approx(np.std([8, 4, 1], ddof=1), rel=1e-6)


def test_ema_decays_by_099_and_corrects_its_bias_unless_told_otherwise():
    sae, batches = batches_of_different_heights()
    theta = calibrate_threshold(sae, batches, method="ema").theta
    assert theta == pytest.approx(moving_average([8, 4, 1], 0.99, True), rel=1e-5)
    assert theta != pytest.approx(sum([8, 4, 1]) / 3, rel=1e-3)


def test_ema_skips_a_batch_in_which_nothing_is_kept():
    sae, batches = batches_of_different_heights()
    silent = -torch.ones(3, 2)
    for bias_correction in (True, False):
        options = {"method": "ema", "decay": 0.7, "bias_correction": bias_correction}
        with_it = calibrate_threshold(sae, [batches[0], silent, *batches[1:], silent], **options)
        without = calibrate_threshold(sae, batches, **options)
        assert (with_it.theta, with_it.spread) == (without.theta, without.spread)


def test_without_bias_correction_a_short_run_keeps_far_too_much():
    sae, x = smooth_sae(), smooth_tokens(8192)
    right = calibrate_threshold(sae, x, method="ema", batch_size=512)
    wrong = calibrate_threshold(sae, x, method="ema", batch_size=512, bias_correction=False)
    assert wrong.theta == pytest.approx(right.theta * (1 - 0.99**16), rel=1e-5)
    assert right.l0 == pytest.approx(4, rel=0.02)
    assert wrong.l0 > 2 * right.l0


# -- target_l0 -------------------------------------------------------------------------------------------


def smooth_sae(k=4.0, normalize="none"):
    """An SAE with latents that fire at different heights, on data without ties."""
    sae = BatchTopKSAE(16, 64, k=k, normalize=normalize)
    chance = torch.Generator().manual_seed(3)
    sae.b_enc.data.copy_(torch.randn(64, generator=chance))
    sae.W_enc.data *= 0.5 + torch.rand(64, generator=chance)
    return sae


def smooth_tokens(n, seed=0):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def check_target(sae, result, batches, k):
    zs = all_z(sae, batches)
    theta = next_after_budget(zs, k)
    total = sum(np.count_nonzero(z) for z in zs)
    if total > oracles.budget(k, sum(len(z) for z in zs)):
        assert result.theta == pytest.approx(theta, rel=1e-6)
    else:
        assert theta * 0.999 < result.theta < theta
        assert result.l0 == total / sum(len(z) for z in zs)
    assert float(sae.threshold) == pytest.approx(result.theta, rel=1e-6)
    assert result.l0 == pytest.approx(mean_l0(zs, float(sae.threshold)), rel=1e-6)
    alone = [next_after_budget([z], k) for z in zs if z.any()]
    assert result.spread == pytest.approx(standard_deviation(alone), rel=1e-3, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    tenths=st.integers(10, 10 * D_SAE),
    seed=st.integers(0, 2**31),
)
def test_target_l0_is_the_entry_after_the_budget_of_the_pool(sizes, tenths, seed):
    sae, batches = exact_sae(k=tenths / 10), list(whole_tokens(sum(sizes), seed).split(sizes))
    if any(sae.pre_activations(batch).any() for batch in batches):
        check_target(sae, calibrate_threshold(sae, batches, method="target_l0"), batches, tenths / 10)


def test_target_l0_by_hand():
    sae, batches = batches_of_different_heights()  # 8 .5 | 4 .5 | 1 .5, and a budget of 3 entries
    result = calibrate_threshold(sae, batches, method="target_l0")
    assert result == (0.5, 1.0, 0.0)
    sae.k = 0.7  # int(0.7 * 3) = 2
    result = calibrate_threshold(sae, [torch.cat(batches)], method="target_l0")
    assert (result.theta, result.l0) == (1.0, pytest.approx(2 / 3))


def test_the_batches_are_pooled_and_their_own_estimates_spread():
    sae = BatchTopKSAE(1, 1, k=0.5, normalize="none")
    sae.W_enc.data.fill_(1)
    low, high = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    result = calibrate_threshold(sae, [low, high], method="target_l0")
    assert (result.theta, result.l0) == (4.0, 0.5)  # 40 30 20 10 | 4, and not a mean of the batches' 2 and 20
    assert result.spread == pytest.approx(np.std([2, 20], ddof=1))


@pytest.mark.parametrize("k", [0.3, 1, 2.3, 17.77])
def test_exactly_the_budget_is_above_theta(k):
    sae, x = smooth_sae(k), smooth_tokens(3000)
    result = calibrate_threshold(sae, x, method="target_l0", batch_size=500)
    assert round(result.l0 * 3000) == oracles.budget(k, 3000)
    assert float(sae.eval().loss(x).l0) == pytest.approx(result.l0)


def test_with_too_few_positive_entries_all_of_them_stay():
    sae, x = smooth_sae(k=60), smooth_tokens(300)
    positive = np.concatenate([z.ravel() for z in all_z(sae, [x])])
    positive = positive[positive > 0]
    assert len(positive) < 60 * 300
    result = calibrate_threshold(sae, x, method="target_l0")
    assert result.l0 == pytest.approx(len(positive) / 300)
    assert 0 < result.theta < positive.min()
    assert result.theta == pytest.approx(positive.min(), rel=1e-3)
    # also when the positive entries are exactly as many as the budget
    sae, batches = batches_of_different_heights()
    sae.k = 2
    result = calibrate_threshold(sae, batches, method="target_l0")
    assert result.l0 == 2
    assert 0.499 < result.theta < 0.5


@pytest.mark.parametrize("k", [4, 7.5])
def test_the_estimators_agree_on_large_batches_without_ties(k):
    sae, x = smooth_sae(k), smooth_tokens(16384)
    z = np.concatenate(all_z(sae, [x]))
    quantile = np.quantile(z, 1 - k / z.shape[1])
    theta = {
        method: calibrate_threshold(sae, x, method=method).theta for method in ("batch_min_mean", "ema", "target_l0")
    }
    assert theta["target_l0"] == pytest.approx(quantile, rel=1e-4)
    assert theta["batch_min_mean"] == pytest.approx(quantile, rel=2e-3)
    assert theta["ema"] == pytest.approx(quantile, rel=4e-3)


# -- learned ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """(SAE as it was, SAE calibrated, data, result): made once, and to be left alone."""
    before, x = smooth_sae(), smooth_tokens(2048)
    after = copy.deepcopy(before)
    return before, after, x, calibrate_threshold(after, x, method="learned", batch_size=512)


@pytest.fixture(scope="module")
def trained():
    """The same of an SAE trained for a moment on sparse sums of more directions than dimensions, in other units."""
    chance = torch.Generator().manual_seed(0)
    codes = torch.rand(2048, 48, generator=chance) * (torch.rand(2048, 48, generator=chance) < 0.1)
    x = codes @ torch.randn(48, 16, generator=chance) + 5
    before = train(BatchTopKSAE(16, 64, k=4), x, TrainConfig(tokens=60_000, batch_size=512, lr=1e-2)).sae
    after = copy.deepcopy(before)
    return before, after, x, calibrate_threshold(after, x, method="learned", batch_size=512)


def test_learned_gives_every_latent_a_threshold_of_its_own(learned):
    _, after, _, result = learned
    assert result.theta.shape == (64,)
    assert torch.equal(result.theta, after.threshold)
    assert result.theta.data_ptr() != after.threshold.data_ptr()
    assert after.threshold.dtype == torch.float32
    assert (result.theta > 0).all()
    assert torch.isfinite(result.theta).all()
    assert len(set(result.theta.tolist())) > 32
    assert not result.theta.requires_grad
    assert not after.threshold.requires_grad
    assert "threshold" in dict(after.named_buffers())
    assert isinstance(result.l0, float)
    assert isinstance(result.spread, float)


def test_learned_keeps_what_is_strictly_above_each_latents_own(learned):
    before, after, x, result = learned
    z = np.concatenate(all_z(before, [x]))
    theta = oracles.array(result.theta)
    kept = oracles.array(copy.deepcopy(after).eval().encode(x)) > 0
    clear = abs(z - theta) > 1e-5
    assert np.array_equal(kept[clear], (z > theta)[clear])
    assert result.l0 == pytest.approx(mean_l0([z], theta), abs=2e-3)


def test_learned_starts_where_the_mean_of_the_minima_is(learned):
    before, _, x, result = learned
    start = calibrate_threshold(copy.deepcopy(before), x, batch_size=512)
    assert result.spread == pytest.approx(start.spread, rel=1e-5)
    assert float(result.theta.median()) == pytest.approx(start.theta, rel=0.5)
    assert (result.theta - start.theta).abs().max() > 0.05 * start.theta  # and does not end there


def test_thresholds_of_their_own_reconstruct_better_than_one_for_all_with_as_many_latents(learned, trained):
    for (_, after, x, result), at_most in ((learned, 0.98), (trained, 1)):
        sae = copy.deepcopy(after).eval()
        many = float(sae.loss(x).mse)
        sae.k = result.l0
        calibrate_threshold(sae, x, method="target_l0", batch_size=len(x))
        one = sae.loss(x)
        assert float(one.l0) == pytest.approx(result.l0, abs=1e-3)
        assert many < at_most * float(one.mse)


def test_learned_holds_l0_at_k_of_a_trained_sae(trained):
    assert trained[3].l0 == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(("k", "normalize"), [(4, "none"), (20, "none"), (12, "token")])
def test_learned_holds_l0_at_k_of_an_untrained_sae(k, normalize):
    sae, x = smooth_sae(k, normalize), 30 * smooth_tokens(512) + 200
    if normalize == "none":
        x = (x - 200) / 30
    result = calibrate_threshold(sae, x, method="learned", batch_size=256)
    z = np.concatenate(all_z(sae, [x], normalize))
    assert result.l0 == pytest.approx(mean_l0([z], oracles.array(result.theta)), abs=0.02)
    assert result.l0 == pytest.approx(k, rel=0.05)


def test_learned_with_too_few_positive_entries_keeps_them_all():
    sae, x = smooth_sae(k=60), smooth_tokens(256)
    result = calibrate_threshold(sae, x, method="learned")
    assert result.l0 == np.count_nonzero(all_z(sae, [x])[0]) / 256
    assert (torch.as_tensor(result.theta) > 0).all()


def test_learned_touches_nothing_but_the_threshold(learned):
    before, after, _, _ = learned
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old if name != "threshold")
    for name, parameter in after.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is None, name


def test_learned_is_deterministic_draws_no_global_chance_and_runs_where_gradients_are_off(learned):
    before, after, x, result = learned
    again = copy.deepcopy(before).requires_grad_(False).eval()
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    with torch.no_grad():
        repeated = calibrate_threshold(again, (batch for batch in x.split(512)), method="learned")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.as_tensor(repeated.theta), result.theta)
    assert torch.equal(again.threshold, after.threshold)
    assert (repeated.l0, repeated.spread) == (result.l0, result.spread)
    assert not any(p.requires_grad for p in again.parameters())
    assert (again.training, after.training) == (False, True)


def test_one_threshold_can_follow_many(learned):
    _, after, x, _ = learned
    sae = copy.deepcopy(after)
    scalar = calibrate_threshold(sae, x, batch_size=512)
    assert isinstance(scalar.theta, float)
    assert sae.threshold.ndim == 0
    assert float(sae.threshold) == pytest.approx(scalar.theta)


def test_many_thresholds_are_saved_and_loaded(learned, tmp_path):
    _, after, x, _ = learned
    sae = copy.deepcopy(after).eval()
    sae.save(tmp_path)
    loaded = load_sae(tmp_path)
    assert torch.equal(loaded.state_dict()["threshold"], after.threshold)
    assert torch.equal(loaded.encode(x[:64]), sae.encode(x[:64]))


# -- what holds for every method -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS[:3])  # for the fourth, see above
def test_every_method_takes_a_stream_once_restores_the_mode_and_forgets_an_old_threshold(method):
    x, results = smooth_tokens(900), []
    for training, old, data in ((True, math.nan, x), (False, 1e6, (batch for batch in x.split(300)))):
        sae = smooth_sae().train(training)
        sae.threshold.fill_(old)
        before = {name: value.clone() for name, value in sae.state_dict().items() if name != "threshold"}
        result = calibrate_threshold(sae, data, method=method, batch_size=300)
        results.append(tuple(result))
        assert sae.training is training
        assert all(torch.equal(sae.state_dict()[name], value) for name, value in before.items())
        assert [type(value) for value in result] == [float] * 3
        assert result.spread > 0
    assert results[0] == results[1]
    assert results[0][1] == pytest.approx(4, rel=0.06)


@pytest.mark.parametrize("method", METHODS[:3])
def test_no_method_has_a_spread_with_one_batch(method):
    assert calibrate_threshold(smooth_sae(), smooth_tokens(200), method=method).spread == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_kept_is_an_error_of_every_method(method, training):
    sae = silent_sae().train(training)
    with pytest.raises(ValueError):  # noqa: PT011 (the wording is free)
        calibrate_threshold(sae, whole_tokens(200), method=method, batch_size=50)
    assert sae.training is training
    assert math.isnan(sae.threshold)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [lambda: torch.empty(0, D_IN), list, lambda: iter(()), lambda: [torch.empty(0, D_IN)]])
def test_no_tokens_is_an_error_of_every_method(method, make):
    with pytest.raises(ValueError, match=r"(?i)token|activation"):
        calibrate_threshold(exact_sae(), make(), method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("k", "tokens", "needed"), [(0.3, 3, "4"), (0.5, 1, "2"), (0.01, 7, "100")])
def test_fewer_tokens_than_one_entry_needs_are_refused(method, k, tokens, needed):
    with pytest.raises(ValueError, match=rf"\b{needed}\b"):
        calibrate_threshold(exact_sae(k=k), whole_tokens(tokens), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_below_a_hundred_kept_entries_there_is_a_warning(method):
    sae = BatchTopKSAE(16, 64, k=2, normalize="none")
    sae.b_enc.data.fill_(3)  # positive entries enough for the budget
    with pytest.warns(UserWarning, match="98"):
        calibrate_threshold(sae, smooth_tokens(49).split([20, 29]), method=method)
    if method == "learned":
        return  # slow, and no different
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_threshold(sae, smooth_tokens(50).split([20, 30]), method=method)


@pytest.mark.parametrize("method", ["batch_min_mean", "target_l0"])
def test_what_counts_is_the_entries_kept_and_not_the_budget(method):
    sae = BatchTopKSAE(2, 2, k=1, normalize="none")
    sae.W_enc.data.copy_(torch.eye(2))
    x = -torch.ones(500, 2)
    x[::10, 0] = 1 + torch.rand(50, generator=torch.Generator().manual_seed(0))  # 50 positive entries, a budget of 500
    with pytest.warns(UserWarning, match="entries|kept"):
        calibrate_threshold(sae, x, method=method)


@pytest.mark.parametrize("method", ["quantile", ""])
def test_the_methods_are_named_where_one_is_unknown(method):
    with pytest.raises(ValueError, match="batch_min_mean") as error:
        calibrate_threshold(exact_sae(), whole_tokens(8), method=method)
    assert all(name in str(error.value) for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_activations_with_a_dimension_too_many_or_not_finite_are_refused(method):
    x = whole_tokens(64)
    with pytest.raises(ValueError, match=r"shape \(8, 8, 5\).*reshape\(-1, 5\)"):
        calibrate_threshold(exact_sae(), x.reshape(8, 8, 5), method=method)
    x[40, 2] = math.nan
    with pytest.raises(ValueError, match="batch 1 holds activations that are not finite"):
        calibrate_threshold(exact_sae(), x, method=method, batch_size=32)
