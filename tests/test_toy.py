"""The toy world, where the true features are known, and what SAEs make of it."""

import math

import numpy as np
import oracles
import pytest
import torch

from tutorial_sae import BatchTopKSAE, TopKSAE, TrainConfig, VanillaSAE, train
from tutorial_sae.toy import ToyWorld, recovery

SHAPES = [{}, {"features": 12, "d_in": 30, "l0": 2.5}, {"features": 8, "d_in": 8, "l0": 1}]

# -- the world -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("correlated", [False, True])
def test_samples_are_sums_of_unit_directions(shape, correlated):
    world = ToyWorld(**shape, correlated=correlated)
    features, d_in = shape.get("features", 50), shape.get("d_in", 100)
    x, values = world.sample(300)
    assert world.directions.shape == (features, d_in)
    assert (x.shape, values.shape) == ((300, d_in), (300, features))
    assert x.dtype == values.dtype == world.directions.dtype == torch.float32
    np.testing.assert_allclose((oracles.array(world.directions) ** 2).sum(axis=1), 1, rtol=1e-5)
    assert (values >= 0).all()
    exact = oracles.array(values) @ oracles.array(world.directions)
    np.testing.assert_allclose(oracles.array(x), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("correlated", [False, True])
def test_the_mean_number_of_active_features_is_l0(shape, correlated):
    values = ToyWorld(**shape, correlated=correlated).sample(40_000)[1]
    per_token = oracles.array((values > 0).sum(dim=1))
    error = per_token.std() / math.sqrt(len(per_token))
    assert per_token.mean() == pytest.approx(shape.get("l0", 11), abs=max(5 * error, 0.02))


@pytest.mark.parametrize("seed", [0, 1])
def test_directions_stand_at_right_angles_and_follow_no_axis(seed):
    D = ToyWorld(seed=seed).directions
    torch.testing.assert_close(D @ D.T, torch.eye(50), rtol=0, atol=1e-5)
    assert D.abs().max() < 0.6  # a coordinate of a random unit vector in 100 dimensions is about 0.1


@pytest.mark.parametrize("wrong", [{"features": 9, "d_in": 8, "l0": 1}, {"l0": 0}, {"l0": -1}, {"l0": 60}])
def test_a_world_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter({"features", "l0"} & set(wrong)))):
        ToyWorld(**wrong)


@pytest.mark.parametrize("correlated", [False, True])
def test_seeds_decide_and_nothing_else(correlated):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two = (ToyWorld(correlated=correlated, seed=3) for _ in range(2))
    assert torch.equal(one.directions, two.directions)
    for seed in (0, 7):
        for a, b in zip(one.sample(50, seed=seed), two.sample(50, seed=seed), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.sample(50)[0], one.sample(50, seed=0)[0])
    assert not torch.equal(one.sample(50, seed=0)[1], one.sample(50, seed=7)[1])
    other = ToyWorld(correlated=correlated, seed=4)
    assert not torch.allclose(one.directions, other.directions)
    assert torch.equal(ToyWorld(seed=0).directions, ToyWorld().directions)


def firing(world, n=50_000, seed=0):
    return oracles.array(world.sample(n, seed=seed)[1] > 0)


def co_firing(active):
    """Correlations between the firing of each pair of features."""
    return np.corrcoef(active.T)[np.triu_indices(active.shape[1], 1)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correlated_features_fire_as_often_but_together(seed):
    alone, together = (firing(ToyWorld(correlated=correlated, seed=seed)) for correlated in (False, True))
    # five standard deviations of a frequency near 11/50 in 50,000 tokens are 0.0093, of a difference 0.013
    np.testing.assert_allclose(together.mean(axis=0), alone.mean(axis=0), atol=0.013)
    assert co_firing(together).std() > 5 * co_firing(alone).std()
    assert abs(co_firing(alone)).max() < 0.05
    assert co_firing(together).max() > 0.15
    assert together.sum(axis=1).std() > 0  # a token's number of features is not fixed


def test_the_pattern_of_correlations_belongs_to_the_world_and_not_to_the_sample():
    world = ToyWorld(correlated=True)
    first, second = (co_firing(firing(world, seed=seed)) for seed in (0, 1))
    other = co_firing(firing(ToyWorld(correlated=True, seed=1)))
    assert np.corrcoef(first, second)[0, 1] > 0.9
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.5


def test_values_are_spread_and_of_order_1():
    values = oracles.array(ToyWorld().sample(2000)[1])
    values = values[values > 0]
    assert 0.2 < values.mean() < 5
    assert len(np.unique(values)) > 100


# -- recovery --------------------------------------------------------------------------------------------


def built_by_hand(world, extra=0, order=None, floor=1e-3):
    """The SAE of somebody who knows the world: its encoder undoes the directions, its decoder has them as rows."""
    D = world.directions
    sae = VanillaSAE(D.shape[1], len(D) + extra, l1=0.0, normalize="none", seed=9)
    order = torch.arange(len(D) + extra) if order is None else order
    sae.W_dec.data[order[: len(D)]] = D
    sae.W_enc.data[:, order[: len(D)]] = torch.linalg.pinv(D.double()).float()
    sae.b_enc.data.fill_(-floor)
    return sae.eval()


@pytest.mark.parametrize("correlated", [False, True])
def test_an_sae_made_of_the_true_directions_is_perfect(correlated):
    world = ToyWorld(correlated=correlated)
    result = recovery(built_by_hand(world), world)
    assert result.mmcs == pytest.approx(1, abs=1e-5)
    assert result.f1 == pytest.approx(1, abs=0.01)
    assert isinstance(result.mmcs, float)
    assert isinstance(result.f1, float)


def test_the_order_of_latents_and_further_latents_do_not_matter():
    world = ToyWorld(seed=2)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    result = recovery(built_by_hand(world, extra=30, order=order), world, tokens=2000)
    assert result.mmcs == pytest.approx(1, abs=1e-5)
    assert result.f1 == pytest.approx(1, abs=0.01)


def test_the_true_decoder_with_a_silent_encoder_has_the_directions_only():
    world = ToyWorld()
    sae = built_by_hand(world)
    sae.b_enc.data.fill_(-1000)
    result = recovery(sae, world)
    assert result.mmcs == pytest.approx(1, abs=1e-5)
    assert result.f1 == 0


def test_a_random_sae_recovers_little():
    world = ToyWorld()
    sae = TopKSAE(100, 50, k=11, normalize="none", seed=5).eval()
    result = recovery(sae, world)
    assert 0.1 < result.mmcs < 0.4
    assert 0.1 < result.f1 < 0.6


def test_a_direction_turned_round_is_not_recovered():
    world = ToyWorld(features=4, d_in=4, l0=1)
    sae = built_by_hand(world)
    D = oracles.array(world.directions)
    sae.W_dec.data.mul_(-1)
    expected = (-D @ D.T).max(axis=1).mean()
    assert recovery(sae, world, tokens=500).mmcs == pytest.approx(expected, abs=1e-5)


class Scripted(ToyWorld):
    """A world whose samples are told."""

    def script(self, values):
        self.values = values
        return self

    def sample(self, n, seed=0):
        assert n == len(self.values)
        return self.values @ self.directions, self.values


def slow_recovery(W_dec, directions, latent_active, feature_active):
    cosines, f1 = [], []
    for f, direction in enumerate(directions):
        found = [float(direction @ row) / math.sqrt(row @ row) / math.sqrt(direction @ direction) for row in W_dec]
        best = found.index(max(found))
        cosines.append(max(found))
        pairs = list(zip(latent_active[:, best], feature_active[:, f], strict=True))
        tp, fp = sum(a and b for a, b in pairs), sum(a and not b for a, b in pairs)
        fn = sum(b and not a for a, b in pairs)
        precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
        f1.append(0.0 if tp == 0 else 2 * precision * recall / (precision + recall))
    return sum(cosines) / len(cosines), sum(f1) / len(f1)


@pytest.mark.parametrize("seed", range(8))
def test_recovery_matches_its_definition(seed):
    chance = torch.Generator().manual_seed(seed)
    active = torch.rand(400, 9, generator=chance) < torch.linspace(0.05, 0.9, 9)
    values = torch.rand(400, 9, generator=chance) * active + 0.2 * active
    world = Scripted(features=9, d_in=14, l0=3, seed=seed).script(values)
    sae = VanillaSAE(14, 12, l1=0.0, normalize="none", seed=seed).eval()
    # rows near the true ones, one of them twice, of any length; features that share their nearest row
    sae.W_dec.data[:6] = world.directions[:6] + 0.15 * torch.randn(6, 14, generator=chance)
    sae.W_dec.data[6] = world.directions[2] + 0.15 * torch.randn(14, generator=chance)
    sae.W_dec.data[7] = world.directions[7] + world.directions[8]
    sae.W_enc.data.copy_(sae.W_dec.data.T)
    sae.W_dec.data *= 0.2 + 3 * torch.rand(12, 1, generator=chance)
    sae.b_enc.data.fill_(-0.3)
    latents = oracles.pre_activations(oracles.numbers(sae), oracles.array(values @ world.directions))
    mmcs, f1 = slow_recovery(
        oracles.array(sae.W_dec), oracles.array(world.directions), latents > 1e-7, oracles.array(values) > 0
    )
    result = recovery(sae, world, tokens=400)
    assert 0.3 < f1 < 0.95
    assert result.mmcs == pytest.approx(mmcs, abs=1e-5)
    assert result.f1 == pytest.approx(f1, abs=2e-3)


def test_latents_that_always_or_half_the_time_fire():
    world = ToyWorld(correlated=False)
    values = oracles.array(world.sample(20_000, seed=11)[1])
    always, half = built_by_hand(world), built_by_hand(world)
    always.b_enc.data.fill_(1000)
    p = (values > 0).mean(axis=0)
    assert recovery(always, world).f1 == pytest.approx((2 * p / (p + 1)).mean(), abs=0.02)
    median = float(np.median(values[values > 0]))
    half.b_enc.data.fill_(-median)
    recall = (values > median).sum(axis=0) / (values > 0).sum(axis=0)
    assert recovery(half, world).f1 == pytest.approx((2 * recall / (1 + recall)).mean(), abs=0.02)


def test_recovery_is_the_same_twice_and_leaves_the_sae_alone():
    world = ToyWorld()
    sae = built_by_hand(world)
    sae.b_enc.data.fill_(-0.9)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    assert recovery(sae, world, tokens=1000) == recovery(sae, world, tokens=1000)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


# -- what training finds ---------------------------------------------------------------------------------


def by_batch(values, k):
    """Codes with only the n*k largest entries."""
    return torch.from_numpy(oracles.keep_batch(oracles.array(values), k))


def squared_error(x, x_hat):
    return float((x.double() - x_hat.double()).square().sum(dim=1).mean())


@pytest.mark.parametrize(("correlated", "tokens"), [(False, 120_000), (True, 200_000)])
def test_the_right_k_finds_the_features_and_a_small_k_reconstructs_better_than_they_do(correlated, tokens):
    world = ToyWorld(correlated=correlated)
    x, _ = world.sample(30_000, seed=1)
    config = TrainConfig(tokens=tokens, batch_size=512, lr=1e-2)
    right, small = (train(BatchTopKSAE(100, 50, k=k), x, config).sae for k in (11, 5))
    found, missed = recovery(right, world), recovery(small, world)
    assert found.mmcs > 0.95
    assert found.f1 > 0.9

    fresh, values = world.sample(4000, seed=3)
    with torch.no_grad():
        own = squared_error(fresh, small.decode(small.encode(fresh, cut="batch")))
    # the true features, five entries a token on average, with the constant that suits them best: the SAE has one too
    left = fresh.double() - by_batch(values, 5) @ world.directions.double()
    assert own < 0.95 * squared_error(left, left.mean(dim=0).expand_as(left))
    assert missed.mmcs < found.mmcs - 0.08
    assert missed.f1 < found.f1 - 0.2
