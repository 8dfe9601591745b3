"""The SAE reference code held to its contract: cuts, loss, AuxK, normalisation, files and errors."""

import json
import math
import re
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_sae import BatchTopKSAE, TopKSAE, VanillaSAE, load_sae
from tutorial_sae.saes.base import keep_above, keep_batch, keep_row

D_IN, D_SAE, L1, THETA = 6, 20, 0.3, 0.75
NORMALIZE = ("dataset", "token", "none")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")

# (variant, training, cut asked for, cut that must happen)
CASES = [
    ("vanilla", True, None, "own"),
    ("vanilla", False, None, "own"),
    ("topk", True, None, "row"),
    ("topk", False, None, "row"),
    ("topk", True, "batch", "batch"),
    ("topk", False, "batch", "batch"),
    ("batchtopk", True, None, "batch"),
    ("batchtopk", False, None, "threshold"),
    ("batchtopk", True, "row", "row"),
    ("batchtopk", False, "row", "row"),
    ("batchtopk", False, "batch", "batch"),
]
TRAIN_CUT = {"vanilla": "own", "topk": "row", "batchtopk": "batch"}
VARIANTS = tuple(TRAIN_CUT)
few = settings(max_examples=30, deadline=None)
cases = pytest.mark.parametrize(("variant", "training", "cut", "expected"), CASES)
variants = pytest.mark.parametrize("variant", VARIANTS)
sparse_variants = pytest.mark.parametrize("variant", VARIANTS[1:])
normalizations = pytest.mark.parametrize("normalize", NORMALIZE)


def fresh(variant, *, k: float = 3, normalize="none", d_in=D_IN, d_sae=D_SAE, seed=0, **options) -> Any:
    if variant == "vanilla":
        return VanillaSAE(d_in, d_sae, l1=L1, normalize=normalize, seed=seed)
    build = TopKSAE if variant == "topk" else BatchTopKSAE
    return build(d_in, d_sae, k=k, normalize=normalize, seed=seed, **options)


def worn(variant, *, training=True, normalize="none", **options):
    """An SAE as after some training: fitted, calibrated (by hand), every parameter off its initial value."""
    sae = fresh(variant, normalize=normalize, **options).train(training)
    sae.fit_normalization(tokens(64, seed=99))
    generator = torch.Generator().manual_seed(1)
    for p in sae.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    if variant == "batchtopk":
        sae.threshold.fill_(THETA)
    return sae


def exact(variant, *, training=True, k=3):
    """An SAE on which whole-number input meets no rounding error and many ties."""
    sae = fresh(variant, k=k).train(training)
    oracles.make_exact(sae)
    if variant == "batchtopk":
        sae.threshold.fill_(2.0)
    return sae


def tokens(n, seed=0):
    """Raw activations: off centre, not of unit scale, more alike in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D_IN, generator=generator) * torch.linspace(1, 4, D_IN) + torch.arange(D_IN)


def whole_tokens(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (n, D_IN))).float()


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(got).double(), torch.as_tensor(want).double(), rtol=tolerance, atol=tolerance
    )


def same(got, want):
    """Equal in every entry, with nothing forgiven."""
    assert torch.equal(torch.as_tensor(got).double(), torch.as_tensor(want).double())


def names(message, *values):
    """The message contains every value; a number counts only when it is not part of a longer number."""
    return all(re.search(rf"(?<![\w.]){re.escape(str(v))}(?!\w|\.\d)", message) for v in values)


# --- the cuts on a bare matrix ---------------------------------------------------------------------------

CUTS = {
    "row": (lambda z, a: keep_row(z, int(a)), lambda z, a: oracles.keep_row(z, int(a))),
    "batch": (keep_batch, oracles.keep_batch),
    "threshold": (keep_above, oracles.keep_above),
}
every_cut = pytest.mark.parametrize("name", CUTS)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
tied_matrices = shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.integers(0, 3).map(float)))
seeds = st.integers(0, 2**31)


def amounts(width):
    """k, or a threshold: tenths from 1 to the width of the matrix."""
    return st.integers(10, 10 * width).map(lambda tenths: tenths / 10)


def distinct(shape, seed, lowest=0):
    order = np.random.default_rng(seed).permutation(math.prod(shape)) + lowest
    return torch.from_numpy(order.reshape(shape)).float()


@every_cut
@few
@given(z=tied_matrices, data=st.data())
def test_cut_matches_the_oracle_with_ties_and_zeros(name, z, data):
    amount = data.draw(amounts(z.shape[1]))
    cut, oracle = CUTS[name]
    same(cut(torch.from_numpy(z), amount), oracle(z, amount))


@every_cut
@few
@given(shape=shapes, seed=seeds, data=st.data())
def test_cut_commutes_with_reordering_tokens_and_latents(name, shape, seed, data):
    z, amount = distinct(shape, seed), data.draw(amounts(shape[1]))
    rows, columns = (torch.tensor(data.draw(st.permutations(range(size)))) for size in shape)
    cut, _ = CUTS[name]
    same(cut(z[rows][:, columns], amount), cut(z, amount)[rows][:, columns])


@every_cut
def test_cut_leaves_its_input_alone_and_passes_gradient_only_to_kept_entries(name):
    z = distinct((5, 6), seed=0).requires_grad_()
    before, (cut, oracle) = z.detach().clone(), CUTS[name]
    cut(z, 2.5).sum().backward()
    assert z.grad is not None
    same(z.grad, oracle(oracles.array(before), 2.5) > 0)
    same(z, before)


@few
@given(shape=shapes, seed=seeds, data=st.data())
def test_a_positive_matrix_uses_the_whole_budget(shape, seed, data):
    z, k = distinct(shape, seed, lowest=1), data.draw(amounts(shape[1]))
    assert (keep_row(z, int(k)) > 0).sum(1).tolist() == [int(k)] * shape[0]
    assert int((keep_batch(z, k) > 0).sum()) == round(k * 10) * shape[0] // 10


@pytest.mark.parametrize(
    ("k", "n", "kept"),
    [(2.3, 100, 230), (4.35, 100, 435), (1.1, 10, 11), (0.1, 30, 3), (1 / 3, 3, 1), (2.5, 3, 7)],
)
def test_the_budget_survives_binary_fractions(k, n, kept):
    assert int((keep_batch(distinct((n, 8), seed=0, lowest=1), k) > 0).sum()) == kept


def test_equal_values_go_to_the_lower_flat_index():
    ones = torch.ones(3, 4)
    assert keep_batch(ones, 5 / 3).flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert keep_row(ones, 2).nonzero()[:, 1].tolist() == [0, 1] * 3


@pytest.mark.parametrize("n", [1, 70])
def test_ties_follow_the_rule_in_wide_matrices_too(n):
    # Large enough for sort and topk to leave their small-size code: there the order of equals is luck.
    z = np.random.default_rng(n).integers(0, 3, (n, 700)).astype(np.float32)
    same(keep_row(torch.from_numpy(z), 300), oracles.keep_row(z, 300))
    same(keep_batch(torch.from_numpy(z), 300.5), oracles.keep_batch(z, 300.5))


@few
@given(z=tied_matrices, data=st.data())
def test_for_one_token_row_and_batch_are_the_same_cut(z, data):
    row, k = torch.from_numpy(z[:1]), data.draw(st.integers(1, z.shape[1]))
    same(keep_row(row, k), keep_batch(row, k))


@few
@given(z=tied_matrices)
def test_a_budget_of_every_latent_keeps_every_positive(z):
    z = torch.from_numpy(z)
    same(keep_row(z, z.shape[1]), z)
    same(keep_batch(z, z.shape[1]), z)


def test_fewer_positives_than_the_budget_are_all_kept():
    z = torch.zeros(3, 5)
    z[1, 2], z[1, 4] = 0.5, 0.25
    same(keep_row(z, 4), z)
    same(keep_batch(z, 4), z)


def test_the_threshold_is_strict():
    same(keep_above(torch.tensor([[1.0, 2.0, 3.0]]), 2.0), [[0.0, 0.0, 3.0]])


def test_a_budget_of_zero_is_an_error():
    with pytest.raises(ValueError, match=r"0\.3"):
        keep_batch(torch.ones(3, 4), 0.3)
    with pytest.raises(ValueError, match=r"0\.3"):
        fresh("batchtopk", k=0.3).encode(tokens(3))


# --- construction ----------------------------------------------------------------------------------------


@variants
def test_a_new_sae_has_tied_unit_directions_and_zero_biases(variant):
    sae = fresh(variant)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == shapes
    close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), 1e-6)
    same(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    sae.W_dec.data.zero_()
    assert sae.W_enc.any(), "encoder and decoder must not share memory"


@variants
def test_the_seed_decides_the_start(variant):
    same(fresh(variant, seed=3).W_dec, fresh(variant, seed=3).W_dec)
    assert not torch.equal(fresh(variant, seed=3).W_dec, fresh(variant, seed=4).W_dec)


# --- encode and decode -----------------------------------------------------------------------------------


@cases
@few
@given(n=st.integers(1, 7), k=st.integers(1, D_SAE), seed=seeds)
def test_encode_is_the_oracle_cut_of_the_oracle_pre_activations(variant, training, cut, expected, n, k, seed):
    sae, x = exact(variant, training=training, k=k), whole_tokens(n, seed)
    z = oracles.pre_activations(oracles.numbers(sae), oracles.array(x))
    same(sae.pre_activations(x), z)
    same(sae.encode(x, cut=cut), oracles.keep(z, expected, k=k, theta=2.0))


@variants
@normalizations
def test_pre_activations_and_reconstruction_match_the_oracle(variant, normalize):
    sae, x = worn(variant, normalize=normalize, training=False), tokens(9)
    p, raw = oracles.numbers(sae, normalize), oracles.array(x)
    latents = sae.encode(x)
    x_hat = oracles.decode(p, oracles.array(latents), like=raw)
    close(sae.pre_activations(x), oracles.pre_activations(p, raw))
    close(sae.decode(latents, like=x), x_hat)
    close(sae(x), x_hat)


def test_a_fractional_budget_counts_over_the_batch():
    sae, x = worn("batchtopk", k=2.3), tokens(100)
    kept = (sae.encode(x) > 0).sum(1)
    assert int(kept.sum()) == 230
    assert len(kept.unique()) > 1, "tokens should get unequal shares"


@cases
@few
@given(leading=st.lists(st.integers(1, 3), max_size=3), normalize=st.sampled_from(NORMALIZE))
def test_leading_dimensions_are_all_batch_dimensions(variant, training, cut, expected, leading, normalize):
    sae = worn(variant, training=training, normalize=normalize)
    flat = tokens(math.prod(leading))
    x = flat.reshape(*leading, D_IN)
    same(sae.encode(x, cut=cut), sae.encode(flat, cut=cut).reshape(*leading, D_SAE))
    same(sae(x), sae(flat).reshape(x.shape))
    same(sae.pre_activations(x), sae.pre_activations(flat).reshape(*leading, D_SAE))


@cases
def test_reordering_tokens_or_latents_reorders_the_codes(variant, training, cut, expected):
    sae, x = worn(variant, training=training), tokens(12)
    codes = sae.encode(x, cut=cut)
    rows, columns = (torch.from_numpy(np.random.default_rng(0).permutation(size)) for size in (12, D_SAE))
    for name, axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
        p = getattr(sae, name)
        p.data = p.data.index_select(axis, columns).contiguous()
    close(sae.encode(x[rows], cut=cut), codes[rows][:, columns], 1e-5)


@cases
def test_a_batch_in_which_nothing_is_positive(variant, training, cut, expected):
    sae, x = worn(variant, training=training), tokens(4)
    sae.b_enc.data.fill_(-1000.0)
    assert not sae.encode(x, cut=cut).any()
    close(sae(x), sae.b_dec.expand(4, D_IN))
    loss = sae.loss(x, cut=cut)
    assert loss.l0 == 0
    assert all(torch.isfinite(value) for value in loss)


def test_tokens_with_nothing_positive_leave_their_budget_to_the_others():
    sae = exact("batchtopk", k=2)
    sae.b_enc.data.fill_(-1.0)
    x = whole_tokens(6)
    x[:3] = sae.b_dec.detach()
    kept = (sae.encode(x) > 0).sum(1)
    assert kept[:3].tolist() == [0, 0, 0]
    assert int(kept.sum()) == 12


def test_in_eval_mode_a_token_alone_has_the_active_set_it_has_in_a_batch():
    sae, x = worn("batchtopk", normalize="dataset", training=False), tokens(200)
    together, alone = sae.encode(x) > 0, torch.cat([sae.encode(token[None]) for token in x]) > 0
    on_the_edge = (sae.pre_activations(x) - THETA).abs() < 1e-5 * THETA
    assert torch.equal(together & ~on_the_edge, alone & ~on_the_edge)
    assert together.any()
    assert not together.all()


def test_in_train_mode_a_token_competes_with_its_batch():
    sae, x = worn("batchtopk", k=3), tokens(50)
    assert not torch.equal(sae.encode(x) > 0, torch.cat([sae.encode(token[None]) for token in x]) > 0)


@pytest.mark.parametrize("use", ["encode", "loss", "__call__"])
def test_evaluating_before_calibrating_says_how_to_calibrate(use):
    sae = fresh("batchtopk")
    assert torch.isnan(sae.threshold)
    getattr(sae, use)(tokens(3))  # fine in train mode
    with pytest.raises(RuntimeError, match="calibrate_threshold"):
        getattr(sae.eval(), use)(tokens(3))


def test_naming_a_cut_needs_no_threshold():
    sae, x = fresh("batchtopk").eval(), tokens(10)
    for cut in ("row", "batch"):
        assert sae.loss(x, cut=cut).l0 == (sae.encode(x, cut=cut) > 0).sum() / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cases
def test_counts_hold_in_every_dtype(variant, training, cut, expected, dtype):
    sae, x = worn(variant, training=training, normalize="dataset").to(dtype), tokens(40).to(dtype)
    latents, z = sae.encode(x, cut=cut), sae.pre_activations(x)
    assert latents.dtype == z.dtype == dtype
    same(latents, oracles.keep(oracles.array(z), expected, k=3, theta=THETA))
    if expected in ("row", "batch"):
        assert int((latents > 0).sum()) == 3 * 40
    assert sae(x).dtype == dtype
    assert sae.tokens_since_fired.dtype == torch.int64
    if variant == "batchtopk":
        assert sae.threshold.dtype == torch.float32, "theta is compared in full precision"


# --- loss ------------------------------------------------------------------------------------------------


@cases
@normalizations
def test_loss_matches_the_oracle(variant, training, cut, expected, normalize):
    sae, x = worn(variant, training=training, normalize=normalize), tokens(9)
    p, raw = oracles.numbers(sae, normalize), oracles.array(x)
    latents = oracles.keep(oracles.pre_activations(p, raw), expected, k=3, theta=THETA)
    want = oracles.loss(p, raw, latents, l1=L1 if variant == "vanilla" else 0.0)
    for value in (sae.loss(x, cut=cut), sae.loss(x.reshape(3, 3, D_IN), cut=cut)):
        assert set(value._fields) == set(want)
        for name, number in want.items():
            assert getattr(value, name).ndim == 0
            assert getattr(value, name).item() == pytest.approx(number, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("variant", "expected"), TRAIN_CUT.items())
@normalizations
def test_gradient_of_the_loss_matches_finite_differences_of_the_oracle(variant, expected, normalize):
    sae, x = worn(variant, normalize=normalize), tokens(4)
    p, raw, step = oracles.numbers(sae, normalize), oracles.array(x), 1e-5

    def total():
        latents = oracles.keep(oracles.pre_activations(p, raw), expected, k=3, theta=THETA)
        return oracles.loss(p, raw, latents, l1=L1 if variant == "vanilla" else 0.0)["total"]

    sae.loss(x).total.backward()
    rng = np.random.default_rng(0)
    for name in PARAMETERS:
        values, gradient = getattr(p, name).reshape(-1), getattr(sae, name).grad.flatten().tolist()
        for i in rng.permutation(len(values))[:12]:
            middle = values[i]
            values[i] = middle + step
            up = total()
            values[i] = middle - step
            down = total()
            values[i] = middle
            slope = (up - down) / (2 * step)
            assert gradient[i] == pytest.approx(slope, rel=1e-3, abs=1e-3), (name, i)


@variants
def test_tokens_since_fired_counts_tokens_of_training_losses_only(variant):
    sae = worn(variant)
    expected = np.zeros(D_SAE, dtype=np.int64)
    for n, seed in ((3, 0), (5, 1), (2, 2)):
        x = tokens(n, seed)
        fired = oracles.array(sae.encode(x)).any(0)
        sae.loss(x)
        expected = np.where(fired, 0, expected + n)
        assert sae.tokens_since_fired.tolist() == expected.tolist()
    assert expected.any()
    sae(x)
    sae.encode(x)
    sae.eval().loss(x)
    assert sae.tokens_since_fired.tolist() == expected.tolist()


# --- AuxK ------------------------------------------------------------------------------------------------


@sparse_variants
@normalizations
@pytest.mark.parametrize("aux_k", [3, 512])
@pytest.mark.parametrize("cut", [None, "row", "batch"])
def test_auxk_value_and_gradient_match_the_oracle(variant, normalize, aux_k, cut):
    sae, x = worn(variant, k=2, normalize=normalize, aux_k=aux_k, dead_after_tokens=5), tokens(5)
    p, raw = oracles.numbers(sae, normalize), oracles.array(x)
    z = oracles.pre_activations(p, raw)
    latents = oracles.keep(z, cut or TRAIN_CUT[variant], k=2, theta=THETA)
    dead = np.array([not column.any() for column in latents.T])  # silent for 5 tokens, which is enough here
    assert dead.sum() > 3
    assert (z[:, dead] > 0).sum(1).max() > 3, "aux_k = 3 must leave something out"

    value, gradient = oracles.auxk(p, raw, latents, dead, aux_k)
    loss = sae.loss(x, cut=cut)
    assert loss.aux.item() == pytest.approx(value, rel=1e-4)
    assert loss.total.item() == pytest.approx(oracles.loss(p, raw, latents, aux=value)["total"], rel=1e-4)
    loss.aux.backward()
    for name in PARAMETERS:
        close(getattr(sae, name).grad, gradient[name])


@sparse_variants
def test_auxk_gradient_leaves_living_latents_alone(variant):
    sae, x = worn(variant, k=2, dead_after_tokens=5), tokens(5)
    living = (sae.encode(x) > 0).any(0)
    sae.loss(x).aux.backward()
    reached = [sae.W_dec.grad.any(1), sae.W_enc.grad.any(0), sae.b_enc.grad != 0]
    for entries in reached:
        assert not (entries & living).any()
        assert entries.any()


@sparse_variants
def test_a_latent_is_dead_once_its_silence_reaches_the_limit(variant):
    sae, x = worn(variant, k=2, dead_after_tokens=6), tokens(5)
    assert sae.loss(x).aux == 0
    assert sae.loss(x[:1]).aux > 0  # silent for 5 + 1 tokens
    assert sae.eval().loss(x, cut="batch").aux == 0


@sparse_variants
def test_a_dead_latent_that_fires_is_alive_within_the_same_loss(variant):
    sae, x = worn(variant, k=D_SAE, dead_after_tokens=100), tokens(30)
    sae.tokens_since_fired.fill_(1000)
    assert (sae.encode(x) > 0).any(0).all(), "this test needs every latent to fire"
    assert sae.loss(x).aux == 0


# --- the decoder's directions ----------------------------------------------------------------------------


@variants
def test_projection_removes_only_the_gradient_along_each_direction(variant):
    sae = fresh(variant)
    sae.loss(tokens(9)).total.backward()
    gradient, rows = oracles.array(sae.W_dec.grad), oracles.array(sae.W_dec)
    want = np.array([g - (g @ w) * w for g, w in zip(gradient, rows, strict=True)])
    assert abs(gradient - want).max() > 1e-2, "there must be something to remove"
    sae.project_decoder_grad()
    close(sae.W_dec.grad, want, 1e-5)


@variants
def test_normalize_decoder_makes_rows_unit_and_keeps_their_direction(variant):
    sae = worn(variant)
    rows, encoder = oracles.array(sae.W_dec), sae.W_enc.detach().clone()
    sae.normalize_decoder()
    close(sae.W_dec, np.array([row / math.sqrt(row @ row) for row in rows]), 1e-6)
    same(sae.W_enc, encoder)


# --- normalisation ---------------------------------------------------------------------------------------


@variants
def test_fit_normalization_centres_and_gives_mean_square_norm_d_in(variant):
    sae, x = fresh(variant, normalize="dataset"), tokens(50)
    sae.fit_normalization(x)
    mean, scale = oracles.fit_normalization(oracles.array(x))
    assert sae.norm_mean.shape == (D_IN,)
    assert sae.norm_scale.ndim == 0
    close(sae.norm_mean, mean, 1e-5)
    close(sae.norm_scale, scale, 1e-5)
    x_n = (x - sae.norm_mean) / sae.norm_scale
    assert float((x_n**2).sum(1).mean()) == pytest.approx(D_IN, rel=1e-5)


def test_an_unfitted_sae_takes_its_input_as_it_is():
    sae, x = fresh("topk", normalize="dataset"), tokens(5)
    assert not sae.norm_mean.any()
    assert sae.norm_scale == 1
    same(sae.encode(x), fresh("topk", normalize="none").encode(x))


@pytest.mark.parametrize("normalize", ["token", "none"])
def test_fitting_does_nothing_where_there_is_nothing_to_fit(normalize):
    sae, x = fresh("topk", normalize=normalize), tokens(5)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.fit_normalization(tokens(50))
    for name, value in sae.state_dict().items():
        same(value, before[name])
    same(sae(x), fresh("topk", normalize=normalize)(x))


def test_token_normalisation_needs_the_input_to_decode():
    sae, x = fresh("topk", normalize="token"), tokens(5)
    with pytest.raises(ValueError, match="like"):
        sae.decode(sae.encode(x))


@cases
@settings(few, max_examples=10)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1, 1))
def test_rescaled_and_shifted_input_refitted_keeps_its_codes(variant, training, cut, expected, scale, shift):
    sae, x = worn(variant, training=training, normalize="dataset"), tokens(20)
    moved = scale * (x + shift)
    sae.fit_normalization(x)
    codes, x_hat, fvu = sae.encode(x, cut=cut), sae(x), sae.loss(x, cut=cut).fvu
    sae.fit_normalization(moved)
    close(sae.encode(moved, cut=cut), codes)
    close(sae(moved) / scale - shift, x_hat, 1e-3)
    close(sae.loss(moved, cut=cut).fvu, fvu)


# --- files -----------------------------------------------------------------------------------------------


@cases
@normalizations
def test_a_saved_sae_comes_back_bit_for_bit(variant, training, cut, expected, normalize, tmp_path):
    sae, x = worn(variant, training=training, normalize=normalize), tokens(9)
    sae.metadata.update({"hook": "blocks.8", "tokens": {"seen": 12, "distinct": None}})
    sae.save(tmp_path / "run")
    loaded = load_sae(tmp_path / "run")
    assert type(loaded) is type(sae)
    assert not loaded.training
    assert loaded.metadata == sae.metadata
    sae.eval()
    same(loaded.encode(x, cut=cut), sae.encode(x, cut=cut))
    same(loaded(x), sae(x))
    same(torch.stack(list(loaded.loss(x, cut=cut))), torch.stack(list(sae.loss(x, cut=cut))))


def test_a_saved_sae_keeps_what_further_training_needs(tmp_path):
    sae, x = worn("batchtopk", k=2.3, aux_k=3, dead_after_tokens=1), tokens(10)
    sae.save(tmp_path)
    loaded = load_sae(tmp_path).train()
    value = sae.loss(x)
    assert value.aux > 0
    same(torch.stack(list(loaded.loss(x))), torch.stack(list(value)))


def test_an_uncalibrated_sae_stays_uncalibrated_on_disk(tmp_path):
    fresh("batchtopk").save(tmp_path)
    with pytest.raises(RuntimeError, match="calibrate_threshold"):
        load_sae(tmp_path).encode(tokens(2))


@variants
def test_a_saved_sae_is_two_files_of_standard_formats(variant, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    fresh(variant).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]
    json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)


# --- errors ----------------------------------------------------------------------------------------------


@sparse_variants
@pytest.mark.parametrize("k", [0, -1, 21])
def test_a_k_out_of_range_is_named_with_the_range_to_choose_from(variant, k):
    with pytest.raises(ValueError, match="k") as error:
        fresh(variant, k=k)
    assert names(str(error.value), k, D_SAE)
    assert re.search(r"choose|between|at most|from \d", str(error.value), re.I)


def test_a_fractional_k_out_of_range_is_named():
    with pytest.raises(ValueError, match="k") as error:
        fresh("batchtopk", k=20.5)
    assert names(str(error.value), 20.5, D_SAE)


def test_k_must_be_whole_where_each_row_is_cut():
    with pytest.raises(ValueError, match=r"2\.5"):
        fresh("topk", k=2.5)
    sae, x = worn("batchtopk", k=2.5), tokens(4)
    for use in (sae.encode, sae.loss):
        with pytest.raises(ValueError, match=r"2\.5"):
            use(x, cut="row")


@variants
@pytest.mark.parametrize("sizes", [{"d_in": 0}, {"d_sae": 0}, {"d_in": -3}, {"d_sae": -3}])
def test_sizes_below_one_are_refused(variant, sizes):
    (size, value), *_ = sizes.items()
    with pytest.raises(ValueError, match=size) as error:
        fresh(variant, k=1, **sizes)
    assert names(str(error.value), value)


def test_a_negative_l1_is_refused():
    with pytest.raises(ValueError, match=r"l1.*-0\.5|-0\.5.*l1"):
        VanillaSAE(D_IN, D_SAE, l1=-0.5)


@variants
@pytest.mark.parametrize("use", ["encode", "pre_activations", "loss", "__call__", "fit_normalization"])
def test_input_of_another_width_is_named_with_the_width_wanted(variant, use):
    sae = fresh(variant, normalize="dataset")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (checked below)
        getattr(sae, use)(torch.zeros(2, 3, 11))
    assert names(str(error.value), 11, D_IN)


@variants
def test_an_unknown_normalisation_is_named_with_those_there_are(variant):
    with pytest.raises(ValueError, match="layernorm") as error:
        fresh(variant, normalize="layernorm")
    assert all(choice in str(error.value) for choice in NORMALIZE)


@pytest.mark.parametrize(
    ("variant", "cut", "choice"),
    [
        ("vanilla", "colum", "own"),
        ("topk", "colum", "row"),
        ("batchtopk", "colum", "batch"),
        ("vanilla", "row", "own"),
        ("topk", "threshold", "row"),
    ],
)
def test_a_cut_the_variant_does_not_know_is_named_with_one_it_does(variant, cut, choice):
    sae, x = worn(variant), tokens(3)
    for use in (sae.encode, sae.loss):
        with pytest.raises(ValueError, match=cut) as error:
            use(x, cut=cut)
        assert choice in str(error.value)


def test_no_tokens_give_no_codes_in_either_mode():
    sae = BatchTopKSAE(4, 8, k=2)
    sae.threshold.fill_(0.5)
    for mode in (True, False):
        assert sae.train(mode).encode(torch.zeros(3, 0, 4)).shape == (3, 0, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_threshold_for_all_is_compared_in_full_precision_like_one_for_each(dtype):
    theta = torch.tensor(1.3515178)  # the first value of z is above it, and not above it rounded
    z = torch.tensor([[1.3515625, 1.34375]]).to(dtype)
    wanted = z.float() > theta
    assert torch.equal(keep_above(z, theta) > 0, wanted)
    assert torch.equal(keep_above(z, theta.expand(2)) > 0, wanted)


@pytest.mark.parametrize("k", [5, 9])
def test_a_budget_larger_than_the_matrix_keeps_all_that_is_positive(k):
    z = torch.tensor([[0.3, 0.0, 0.2, 0.9], [0.0, 0.1, 0.0, 0.4]])
    assert torch.equal(keep_row(z, k), z)
    assert torch.equal(keep_batch(z, k), z)
