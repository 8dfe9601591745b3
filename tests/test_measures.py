"""The measures held to their definitions: slow float64 loops, and cases whose answer is known on paper."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_sae import BatchTopKSAE, TopKSAE, VanillaSAE
from tutorial_sae.measures import OTHER_FVU, _pair, decoder_cosine, fvu, kl, refit, shrinkage

# -- the definitions, slowly -----------------------------------------------------------------------------


def square(v) -> float:
    return sum(float(a) ** 2 for a in v)


def mean_token(x):
    return sum(x) / len(x)


def slow_fvu(x, x_hat):
    centre = mean_token(x)
    return sum(square(a - b) for a, b in zip(x, x_hat, strict=True)) / sum(square(a - centre) for a in x)


def slow_uncentred(x, x_hat):
    return sum(square(a - b) for a, b in zip(x, x_hat, strict=True)) / sum(square(a) for a in x)


def slow_token_ratio(x, x_hat):
    return sum(square(a - b) / square(a) for a, b in zip(x, x_hat, strict=True)) / len(x)


def slow_centred_token_ratio(x, x_hat):
    centre = mean_token(x)
    return sum(square(a - b) / square(a - centre) for a, b in zip(x, x_hat, strict=True)) / len(x)


def slow_squared_mean(x, x_hat):
    m = sum(square(a) for a in x) / x.size  # the slip: a mean of squares, where the mean was meant, squared again
    error = sum(square(a - b) for a, b in zip(x, x_hat, strict=True)) / len(x)
    return error / (sum(square(a) for a in x) / len(x) - m**2)


def slow_centred_error(x, x_hat):
    e = x - x_hat
    return sum(square(a - mean_token(e)) for a in e) / sum(square(a - mean_token(x)) for a in x)


def slow_token_standardised(x, x_hat):
    total = 0.0
    for a, b in zip(x, x_hat, strict=True):
        mean = sum(a) / len(a)
        std = math.sqrt(sum((v - mean) ** 2 for v in a) / (len(a) - 1))
        total += square((a - b) / (std + 1e-5))
    return total / x.size


SLOW_OTHERS = {
    "uncentred": slow_uncentred,
    "token ratio": slow_token_ratio,
    "centred token ratio": slow_centred_token_ratio,
    "squared mean": slow_squared_mean,
    "centred error": slow_centred_error,
    "token standardised": slow_token_standardised,
}


def slow_kl(clean, other):
    """KL(clean || other) of one position, in nats."""

    def log_probabilities(logits):
        top = max(logits)
        total = math.fsum(math.exp(v - top) for v in logits)
        return [v - top - math.log(total) for v in logits]

    pairs = zip(log_probabilities(clean), log_probabilities(other), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


def slow_cosine(W):
    pairs = [(i, j) for j in range(len(W)) for i in range(j)]
    lengths = [math.sqrt(square(row)) for row in W]
    return sum(abs(float(W[i] @ W[j])) / lengths[i] / lengths[j] for i, j in pairs) / len(pairs)


def least_error(p, x_n, support):
    """The least squared error of each token that its own latents allow, and the values that reach it."""
    errors, values = [], np.zeros(support.shape)
    for t, token in enumerate(x_n):
        left = token - p.b_dec
        if support[t].any():
            rows = p.W_dec[support[t]]
            values[t, support[t]] = np.linalg.lstsq(rows.T, left, rcond=None)[0]
        errors.append(square(left - values[t] @ p.W_dec))
    return np.array(errors), values


# -- data ------------------------------------------------------------------------------------------------


def off_centre(n=40, d=6, seed=0, offset=3.0, noise=0.4):
    """Tokens around a distant mean and a reconstruction with an error whose mean is not 0."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=chance) * torch.linspace(0.5, 2, d) + offset
    return x, x + noise * torch.randn(n, d, generator=chance) + 0.2


# -- FVU and those that are called so too ----------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), d=st.integers(2, 9), seed=st.integers(0, 2**31), offset=st.floats(-20, 20))
def test_fvu_matches_the_definition(n, d, seed, offset):
    x, x_hat = off_centre(n, d, seed, offset)
    assert fvu(x, x_hat) == pytest.approx(slow_fvu(oracles.array(x), oracles.array(x_hat)), rel=1e-9)


def test_fvu_is_a_float_and_1_for_the_mean_and_0_for_x_itself():
    x, _ = off_centre()
    assert type(fvu(x, x)) is float
    assert fvu(x, x) == 0.0
    assert fvu(x, x.mean(dim=0).expand_as(x)) == pytest.approx(1, rel=1e-6)


def test_fvu_adds_up_in_float64():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3000
    x_hat = x + 0.25
    slow = slow_fvu(oracles.array(x), oracles.array(x_hat))
    assert fvu(x, x_hat) == pytest.approx(slow, rel=1e-9)
    assert fvu(x.bfloat16(), x_hat.bfloat16()) == pytest.approx(
        slow_fvu(oracles.array(x.bfloat16()), oracles.array(x_hat.bfloat16())), rel=1e-9
    )


def test_the_other_ratios_are_these():
    assert set(OTHER_FVU) == set(SLOW_OTHERS)


@pytest.mark.parametrize("name", SLOW_OTHERS)
@pytest.mark.parametrize("offset", [0.0, 3.0, -11.0])
def test_each_other_ratio_matches_its_formula(name, offset):
    for n, d, seed in ((2, 2, 0), (40, 6, 1), (7, 30, 2)):
        x, x_hat = off_centre(n, d, seed, offset)
        slow = SLOW_OTHERS[name](oracles.array(x), oracles.array(x_hat))
        got = OTHER_FVU[name](x, x_hat)
        assert isinstance(got, float)
        assert got == pytest.approx(slow, rel=1e-5)


def test_off_centre_the_other_ratios_differ_from_fvu_and_from_each_other():
    x, x_hat = off_centre()
    values = sorted([fvu(x, x_hat), *(ratio(x, x_hat) for ratio in OTHER_FVU.values())])
    assert all(abs(b - a) > 0.02 * abs(a) for a, b in pairwise(values))
    assert OTHER_FVU["uncentred"](x, x_hat) < fvu(x, x_hat) / 3  # a large mean flatters


def test_on_centred_data_uncentred_is_fvu():
    x, x_hat = off_centre()
    mean = x.double().mean(dim=0)
    x, x_hat = (x - mean).double(), (x_hat - mean).double()
    assert OTHER_FVU["uncentred"](x, x_hat) == pytest.approx(fvu(x, x_hat), rel=1e-9)


def test_a_constant_error_is_invisible_to_the_centred_error_only():
    x, _ = off_centre()
    x_hat = x.double() + 0.7
    assert OTHER_FVU["centred error"](x.double(), x_hat) == pytest.approx(0, abs=1e-12)
    assert fvu(x.double(), x_hat) > 0.1


# -- shrinkage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3, 0.05])
def test_a_reconstruction_shrunk_about_the_mean_has_that_factor(factor):
    x, _ = off_centre()
    mean = x.mean(dim=0)
    assert shrinkage(x, mean + factor * (x - mean)) == pytest.approx(factor, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), d=st.integers(1, 9), seed=st.integers(0, 2**31), offset=st.floats(-20, 20))
def test_shrinkage_is_the_factor_by_which_the_reconstruction_is_best_divided(n, d, seed, offset):
    # min over s of |s c_hat - c|^2 is a regression of c on c_hat through 0; gamma is 1/s
    x, x_hat = off_centre(n, d, seed, offset, noise=0.1)
    a, a_hat = oracles.array(x), oracles.array(x_hat)
    c, c_hat = (a - mean_token(a)).ravel(), (a_hat - mean_token(a)).ravel()
    s = np.linalg.lstsq(c_hat[:, None], c, rcond=None)[0][0]
    got = shrinkage(x, x_hat)
    assert isinstance(got, float)
    assert got == pytest.approx(1 / s, rel=1e-6)


def test_the_best_reconstruction_in_a_subspace_is_not_shrunk_whatever_its_error():
    x = off_centre(100, 8, seed=3)[0].double()
    c = x - x.mean(dim=0)
    directions = torch.linalg.svd(c)[2][:3]
    x_hat = x.mean(dim=0) + c @ directions.T @ directions
    assert fvu(x, x_hat) > 0.2
    assert shrinkage(x, x_hat) == pytest.approx(1, rel=1e-6)


def test_shrinkage_is_about_the_mean_of_x_and_not_of_the_reconstruction():
    x, x_hat = off_centre()
    moved = x_hat + 1.5
    a, b = oracles.array(x), oracles.array(moved)
    c, c_hat = a - mean_token(a), b - mean_token(a)
    assert shrinkage(x, moved) == pytest.approx((c_hat**2).sum() / (c_hat * c).sum(), rel=1e-6)
    assert shrinkage(x, moved) > shrinkage(x, x_hat) + 0.5


# -- KL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_kl_matches_the_definition_at_each_position(lead):
    chance = torch.Generator().manual_seed(0)
    clean, other = (3 * torch.randn(*lead, 11, generator=chance) for _ in range(2))
    got = kl(clean, other)
    assert got.shape == lead
    rows = zip(clean.reshape(-1, 11).tolist(), other.reshape(-1, 11).tolist(), strict=True)
    assert got.reshape(-1).tolist() == pytest.approx([slow_kl(p, q) for p, q in rows], rel=1e-4, abs=1e-6)


def test_kl_from_a_sure_prediction_to_a_uniform_one_is_log_vocab_and_not_the_same_back():
    sure, uniform = torch.tensor([[400.0, 0, 0, 0, 0, 0, 0, 0]]), torch.zeros(1, 8)
    assert float(kl(sure, uniform)) == pytest.approx(math.log(8), rel=1e-5)
    assert float(kl(uniform, sure)) == pytest.approx(7 / 8 * 400 - math.log(8), rel=1e-5)


def test_kl_ignores_what_is_added_to_all_logits_and_never_overflows():
    chance = torch.Generator().manual_seed(1)
    clean, other = (torch.randn(6, 9, generator=chance).double() for _ in range(2))
    torch.testing.assert_close(kl(clean + 1000.0, other - 5000.0), kl(clean, other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl(clean, clean), torch.zeros(6, dtype=torch.float64), check_dtype=False)


def test_kl_is_never_below_zero():
    clean = torch.randn(50, 20, generator=torch.Generator().manual_seed(2))
    assert (kl(clean, clean + 0.5 * torch.randn(50, 20, generator=torch.Generator().manual_seed(3))) > 0).all()


# -- refit -----------------------------------------------------------------------------------------------

D_IN, D_SAE = 10, 24


def trained_like(kind, normalize, seed=0):
    """An SAE whose encoder is not its decoder's transpose, biases included: its own values are far from the best."""
    sae = {
        "topk": lambda: TopKSAE(D_IN, D_SAE, k=3, normalize=normalize),
        "vanilla": lambda: VanillaSAE(D_IN, D_SAE, l1=0.1, normalize=normalize),
        "batchtopk": lambda: BatchTopKSAE(D_IN, D_SAE, k=2.5, normalize=normalize),
    }[kind]()
    chance = torch.Generator().manual_seed(seed)
    for p in (sae.b_enc, sae.b_dec, sae.W_enc):
        p.data += 0.3 * torch.randn(p.shape, generator=chance)
    if kind == "vanilla":
        sae.b_enc.data -= 1.5  # fewer latents than dimensions on most tokens
    return sae


def raw_tokens(sae, n=60, seed=5):
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed))
    if sae.normalize != "none":
        x = 4 * x + 9
    sae.fit_normalization(x)
    return x


def token_errors(sae, x, latents, normalize):
    """Squared error of each token in normalised units, by the oracles."""
    p = oracles.numbers(sae, normalize)
    miss = oracles.normalise(p, oracles.array(x)) - (oracles.array(latents) @ p.W_dec + p.b_dec)
    return (miss**2).sum(axis=1)


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
@pytest.mark.parametrize(
    ("kind", "cut"), [("topk", None), ("vanilla", None), ("batchtopk", "batch"), ("topk", "batch")]
)
def test_refit_is_the_least_squares_solution_on_the_same_latents(kind, cut, normalize):
    sae = trained_like(kind, normalize)
    x = raw_tokens(sae)
    own, best = sae.encode(x, cut), refit(sae, x, cut)
    assert best.shape == own.shape
    support = oracles.array(own) != 0
    assert np.array_equal(oracles.array(best) != 0, support)
    p = oracles.numbers(sae, normalize)
    least, values = least_error(p, oracles.normalise(p, oracles.array(x)), support)
    unique = support.sum(axis=1) <= D_IN // 2  # well determined
    assert unique.sum() > 15
    np.testing.assert_allclose(oracles.array(best)[unique], values[unique], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(token_errors(sae, x, best, normalize), least, rtol=1e-3, atol=1e-3)
    assert token_errors(sae, x, own, normalize).sum() > 1.2 * least.sum()  # or there was nothing to win


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["topk", "vanilla", "batchtopk"]),
    normalize=st.sampled_from(["dataset", "token", "none"]),
    seed=st.integers(0, 2**31),
)
def test_no_token_gets_a_larger_error_or_a_new_latent(kind, normalize, seed):
    sae = trained_like(kind, normalize, seed)
    x = raw_tokens(sae, 20, seed)
    cut = "batch" if kind == "batchtopk" else None
    own, best = sae.encode(x, cut), refit(sae, x, cut)
    assert not (best != 0)[own == 0].any()
    before, after = (token_errors(sae, x, latents, normalize) for latents in (own, best))
    assert (after <= before * (1 + 1e-4) + 1e-4).all()
    # also in raw units, through the SAE's own decoder
    raw = [(x - sae.decode(latents, like=x)).square().sum(dim=1) for latents in (own, best)]
    assert (raw[1] <= raw[0] * (1 + 1e-3) + 1e-3).all()


def test_values_may_become_negative():
    sae = trained_like("topk", "none")
    assert (refit(sae, raw_tokens(sae)) < 0).any()


def test_the_residual_is_at_right_angles_to_every_latent_used():
    sae = trained_like("topk", "none")
    x = raw_tokens(sae)
    best = refit(sae, x)
    along = (x - sae.decode(best)) @ sae.W_dec.T
    assert along[best != 0].abs().max() < 1e-3


def test_what_the_dictionary_made_is_found_again():
    sae = TopKSAE(D_IN, D_SAE, k=3, normalize="none")
    x = sae.decode(sae.encode(torch.randn(30, D_IN, generator=torch.Generator().manual_seed(0)))).detach()
    sae.W_enc.data *= 0.1  # the same choice at a tenth of the values
    values = refit(sae, x)
    torch.testing.assert_close(sae.decode(values)[:1], x[:1], rtol=1e-3, atol=1e-3)
    support = oracles.array(sae.encode(x)) != 0
    p = oracles.numbers(sae)
    least, _ = least_error(p, oracles.array(x), support)
    np.testing.assert_allclose(token_errors(sae, x, values, "none"), least, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "vanilla", "batchtopk"])
def test_tokens_without_latents_keep_none(kind):
    sae = trained_like(kind, "none")
    x = 8 * raw_tokens(sae, 12)
    sae.b_enc.data -= 5
    x[:4] = sae.b_dec.detach()  # only the negative biases are left
    cut = "batch" if kind == "batchtopk" else None
    own, best = sae.encode(x, cut), refit(sae, x, cut)
    silent = (own == 0).all(dim=1)
    assert silent[:4].all()
    assert not silent.all()
    assert torch.isfinite(best).all()
    assert not best[silent].any()
    least, _ = least_error(oracles.numbers(sae), oracles.array(x), oracles.array(own) != 0)
    np.testing.assert_allclose(token_errors(sae, x, best, "none"), least, rtol=1e-3, atol=1e-3)


def test_a_batch_in_which_nothing_fires_at_all():
    sae = trained_like("vanilla", "none")
    sae.b_enc.data.fill_(-1000)
    assert torch.equal(refit(sae, raw_tokens(sae, 5)), torch.zeros(5, D_SAE))


@pytest.mark.parametrize("tilt", [0.0, 1e-7, 1e-5])
def test_equal_and_nearly_equal_decoder_rows_do_no_harm(tilt):
    sae = trained_like("topk", "none")
    for name in ("W_dec", "b_enc"):
        rows = getattr(sae, name).data
        rows[1::2] = rows[::2]
    sae.W_enc.data[:, 1::2] = sae.W_enc.data[:, ::2]
    sae.W_dec.data[1::2, 0] += tilt
    x = raw_tokens(sae)
    own, best = sae.encode(x), refit(sae, x)
    support = oracles.array(own) != 0
    assert (support[:, ::2] & support[:, 1::2]).any(axis=1).all()  # every token uses a latent and its double
    assert torch.isfinite(best).all()
    assert not (best != 0)[own == 0].any()
    p = oracles.numbers(sae)
    p.W_dec[1::2] = p.W_dec[::2]  # what is reached without telling the two apart
    least, _ = least_error(p, oracles.array(x), support)
    errors = token_errors(sae, x, best, "none")
    assert (errors <= least * 1.05).all()
    if tilt == 0:
        np.testing.assert_allclose(errors, least, rtol=1e-3, atol=1e-3)
        assert best.abs().max() < 10


def test_more_latents_than_dimensions_leave_no_error():
    sae = trained_like("vanilla", "none")
    sae.b_enc.data += 30
    x = raw_tokens(sae, 20)
    own, best = sae.encode(x), refit(sae, x)
    assert (own > 0).sum(dim=1).min() > D_IN
    assert torch.isfinite(best).all()
    assert token_errors(sae, x, best, "none").max() < 1e-2 < token_errors(sae, x, own, "none").min()


def test_refitted_codes_are_not_shrunk():
    sae = trained_like("vanilla", "none")
    sae.b_dec.data.zero_()
    x = raw_tokens(sae, 400)
    sae.W_enc.data *= 0.5
    x_own, x_best = (sae.decode(latents).detach() for latents in (sae.encode(x), refit(sae, x)))
    # each token is projected onto what its latents span, so up to the mean gamma is 1
    assert shrinkage(x, x_best.detach()) == pytest.approx(1, abs=0.03)
    assert abs(shrinkage(x, x_own) - 1) > 0.1


def test_refit_changes_nothing_in_the_sae():
    sae = trained_like("topk", "dataset").train()
    x = raw_tokens(sae)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    refit(sae, x)
    assert sae.training
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert all(p.grad is None for p in sae.parameters())


def test_the_cut_is_the_one_in_force_unless_named():
    sae = trained_like("batchtopk", "none")
    x = raw_tokens(sae)
    supports = {}
    for cut in ("batch", "threshold"):
        sae.threshold.fill_(float(sae.pre_activations(x).detach().quantile(0.8)))
        supports[cut] = refit(sae, x, cut) != 0
        assert torch.equal(supports[cut], sae.encode(x, cut) > 0)
    assert torch.equal(refit(sae.train(), x) != 0, supports["batch"])
    assert torch.equal(refit(sae.eval(), x) != 0, supports["threshold"])
    assert not torch.equal(supports["batch"], supports["threshold"])


# -- cosines of the decoder ------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), width=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_decoder_cosine_matches_the_definition(rows, width, seed):
    W = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    W = W / W.norm(dim=1, keepdim=True)
    assert float(decoder_cosine(W)) == pytest.approx(slow_cosine(oracles.array(W)), rel=1e-4, abs=1e-6)


def test_decoder_cosine_of_known_dictionaries():
    assert float(decoder_cosine(torch.eye(7))) == pytest.approx(0, abs=1e-7)
    one = torch.tensor([[0.6, 0.8]])
    assert float(decoder_cosine(torch.cat([one, -one, one]))) == pytest.approx(1, rel=1e-6)
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # pairs: 0, 1, 0
    assert float(decoder_cosine(mixed)) == pytest.approx(1 / 3, rel=1e-6)


def test_decoder_cosine_of_many_rows():
    W = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))
    W = W / W.norm(dim=1, keepdim=True)
    a = oracles.array(W)
    pairs = np.abs(a @ a.T)[np.triu_indices(len(a), 1)]
    assert float(decoder_cosine(W)) == pytest.approx(pairs.mean(), rel=1e-5)


def test_decoder_cosine_is_of_directions_not_lengths():
    W = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    scaled = W * torch.linspace(0.1, 5, 20)[:, None]
    assert float(decoder_cosine(scaled)) == pytest.approx(slow_cosine(oracles.array(W)), rel=1e-5)


def test_shapes_that_do_not_match_are_refused():
    x = torch.randn(8, 4)  # the checks of types in tests would be quicker, so the users' check is called by itself
    with pytest.raises(ValueError, match=r"\(8, 4\).*\(1, 4\)"):
        _pair(x, x[:1])
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        _pair(x.view(2, 4, 4), x.view(2, 4, 4))
