"""The fast path against the reference: same selection, same loss, same gradients."""

import copy

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
    sparse,
    train,
)
from tutorial_sae.saes import keep_batch, keep_row
from tutorial_sae.saes.base import budget_of

D_IN, D_SAE, TOKENS = 24, 96, 64


def activations(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=chance) @ torch.randn(8, D_IN, generator=chance) + 3.0


def small_integers(tokens: int, latents: int):
    """Matrices full of ties and zeros."""
    row = st.lists(st.integers(0, 3), min_size=latents, max_size=latents)
    return st.lists(row, min_size=tokens, max_size=tokens).map(lambda z: torch.tensor(z, dtype=torch.float32))


def dense(kept: sparse.Kept, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.numel()).index_put_((kept.index,), kept.values).view_as(like)


@settings(max_examples=60, deadline=None)
@given(small_integers(5, 7), st.floats(0.3, 7), st.floats(0, 5))
def test_batch_cut_selects_what_the_reference_selects_whatever_the_guess(z, k, guess):
    kept, _ = sparse.keep_largest(z, budget_of(k, len(z)), guess)
    assert torch.equal(dense(kept, z), keep_batch(z, k))


@settings(max_examples=40, deadline=None)
@given(small_integers(5, 7), st.integers(1, 7))
def test_row_cut_selects_what_the_reference_selects(z, k):
    assert torch.equal(dense(sparse.keep_row(z, k), z), keep_row(z, k))


def operands(tokens: int = 200, latents: int = 300):
    chance = torch.Generator().manual_seed(4)
    x, W = torch.randn(tokens, D_IN, generator=chance), torch.randn(latents, D_IN, generator=chance).T / 3
    return x, W, 0.1 * torch.randn(latents, generator=chance)


def test_candidates_found_in_bfloat16_give_the_cut_of_float32():
    x, W, bias = operands()
    z = (x.double() @ W.double() + bias.double()).float()
    for budget in (1, 50, 1000, 4000):
        cut = float(z.flatten().sort(descending=True).values[budget - 1])
        for guess in (0.8 * cut, cut, 1.02 * cut):
            found = sparse.keep_largest_rough(x, W, bias, budget, guess)
            assert found is not None
            kept, mine = found
            assert mine == pytest.approx(cut, rel=1e-6)
            assert len(kept.index) == budget
            assert (kept.index.diff() > 0).all(), "row-major"
            torch.testing.assert_close(kept.values, z.view(-1)[kept.index], rtol=1e-5, atol=1e-5)
            assert float(z.view(-1)[kept.index].min()) >= cut * (1 - 1e-6)


def test_candidates_that_may_be_incomplete_are_refused():
    x, W, bias = operands()
    z = (x @ W + bias).flatten().sort(descending=True).values
    budget = 1000
    cut = float(z[budget - 1])
    assert sparse.keep_largest_rough(x, W, bias, budget, 1.2 * cut) is None, "too few"
    assert sparse.keep_largest_rough(x, W, bias, budget, cut / 0.9) is None, "the cut is where the candidates end"


@pytest.mark.parametrize("drift", [1.0, 0.3, 3.0])
def test_a_step_by_bfloat16_candidates_is_that_of_the_reference(monkeypatch, drift):
    monkeypatch.setattr(sparse, "bf16_is_fast", lambda: True)
    used = []
    rough = sparse.keep_largest_rough
    monkeypatch.setattr(sparse, "keep_largest_rough", lambda *a: used.append(rough(*a)) or used[-1])
    sae, x = BatchTopKSAE(D_IN, D_SAE, k=4.3), activations()
    sae.fit_normalization(x)
    other = copy.deepcopy(sae)
    sparse.loss(sae, x)
    sae.hint *= drift
    got, wanted = sparse.loss(sae, x), other.loss(x)
    assert len(used) == 1
    assert (used[0] is None) == (drift == 3.0), "a guess far too high finds too few"
    got.total.backward()
    wanted.total.backward()
    torch.testing.assert_close(got.total, wanted.total, rtol=1e-6, atol=0)
    for (name, a), b in zip(other.named_parameters(), sae.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).norm() / a.grad.norm()) <= 1e-6, name


def test_the_cut_found_is_the_smallest_entry_kept():
    z = torch.rand(50, 80, generator=torch.Generator().manual_seed(1))
    kept, cut = sparse.keep_largest(z, 200, guess=0.0)
    assert cut == kept.values.min() == z.flatten().sort(descending=True).values[199]


VARIANTS = {
    "vanilla": lambda: VanillaSAE(D_IN, D_SAE, l1=0.4),
    "vanilla, weighted": lambda: VanillaSAE(D_IN, D_SAE, l1=0.4, decoder_norm="weighted"),
    "gated": lambda: GatedSAE(D_IN, D_SAE, l1=0.4),
    "jumprelu": lambda: JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.7, bandwidth=0.5),
    "jumprelu, target": lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=5, bandwidth=2.0),
    "topk": lambda: TopKSAE(D_IN, D_SAE, k=5, aux_k=8, dead_after_tokens=100),
    "batchtopk": lambda: BatchTopKSAE(D_IN, D_SAE, k=4.3, aux_k=8, dead_after_tokens=100),
    "batchtopk, token": lambda: BatchTopKSAE(D_IN, D_SAE, k=4.3, aux_k=8, dead_after_tokens=100, normalize="token"),
}


@pytest.mark.parametrize("dead", [0, 30])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_the_reference(name, dead, monkeypatch):
    monkeypatch.setattr(sparse, "MOST_KEPT", 0.5)  # the own cuts too, however dense
    reference = VARIANTS[name]()
    reference.fit_normalization(activations())
    with torch.no_grad():  # away from the symmetric start, with biases at work
        chance = torch.Generator().manual_seed(2)
        for label, parameter in reference.named_parameters():
            if label != "W_dec" or "weighted" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=chance)
        reference.b_enc[:dead] -= 1.0
        reference.tokens_since_fired[:dead] = 1000
    fast = copy.deepcopy(reference)
    for seed in range(3):  # the second and third batch start from the cut of the one before
        x = activations(seed=seed)
        wanted, got = reference.loss(x), sparse.loss(fast, x)
        for term, a, b in zip(wanted._fields, wanted, got, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-6, msg=lambda text, term=term: f"{term}: {text}")
        assert torch.equal(fast.tokens_since_fired, reference.tokens_since_fired)
        wanted.total.backward()
        got.total.backward()
        limit = 1e-5 if dead and isinstance(reference, TopKSAE) else 1e-6
        for (label, a), b in zip(reference.named_parameters(), fast.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert float((a.grad - b.grad).norm() / a.grad.norm()) <= limit, label
            a.grad = b.grad = None
    assert wanted.aux > 0 or not dead or not isinstance(reference, TopKSAE)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_training_by_the_fast_path_ends_where_the_reference_ends(name):
    x = activations(2048)
    config = {"tokens": 12_800, "batch_size": 128, "lr": 1e-3}
    fvu = {}
    for fast in (True, False):
        sae = VARIANTS[name]()
        fvu[fast] = train(sae, x, TrainConfig(**config, fast=fast)).history[-1]["fvu"]
    assert fvu[True] == pytest.approx(fvu[False], rel=0.02)
    assert fvu[True] < 0.5, "and it learned something"


def test_the_fast_path_is_deterministic():
    runs = [train(VARIANTS["batchtopk"](), activations(1024), TrainConfig(tokens=6_400, batch_size=128)) for _ in "ab"]
    assert torch.equal(runs[0].sae.W_dec, runs[1].sae.W_dec)
    assert runs[0].history[-1]["total"] == runs[1].history[-1]["total"]


def test_it_is_used_only_where_it_applies():
    assert sparse.suits(VARIANTS["batchtopk"]())
    assert not sparse.suits(VARIANTS["batchtopk"]().to(torch.bfloat16))
    assert not sparse.suits(BatchTopKSAE(D_IN, D_SAE, k=3).to("meta"))
