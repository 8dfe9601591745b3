"""Evaluation against slow definitions, on a small random model: what is checked is arithmetic, not quality."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tutorial_sae import ActivationStore, BatchTopKSAE, TopKSAE, TrainConfig, VanillaSAE, evaluate, load_text, train
from tutorial_sae.metrics import PCA, Heldout

HOOK = "blocks.3.hook_resid_post"
SIZES: dict[str, Any] = {"tokens": 600, "ce_tokens": 320, "context": 32}


@pytest.fixture
def heldout(gpt2, corpus, own_cache):
    return Heldout(gpt2, load_text(corpus, split="heldout"), HOOK, **SIZES)


@pytest.fixture
def store(gpt2, corpus, own_cache):
    return ActivationStore(gpt2, load_text(corpus), HOOK, tokens=1500, context=32)


@pytest.fixture
def trained(store):
    sae = BatchTopKSAE(store.d_in, 3 * store.d_in, k=6)
    return train(sae, store, TrainConfig(tokens=6_400, batch_size=64)).sae


def spliced_loss(model, tokens, change):
    """Mean loss over ordinary targets with `change` as a hook: plain TransformerLens, nothing of metrics.py."""
    logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: change(x))], return_type="logits")
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    ordinary = ~torch.isin(tokens[:, 1:].flatten(), torch.tensor(model.card.special))
    return float(losses[ordinary].double().mean())


def test_every_number_equals_its_definition(gpt2, heldout, trained):
    result = evaluate(trained, gpt2, heldout)
    x = heldout.store[:].double()
    latents = trained.encode(heldout.store[:])
    x_hat = trained.decode(latents).double()
    l0 = (latents > 0).sum(dim=1)
    fvu = (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert result.fvu == pytest.approx(float(fvu.detach()), rel=1e-6)
    assert result.l0 == pytest.approx(float(l0.double().mean()))
    assert torch.equal(result.l0_per_token, l0)
    assert result.l0_p50 == pytest.approx(float(l0.float().quantile(0.5)))
    torch.testing.assert_close(result.density, (latents > 0).float().mean(dim=0))
    assert result.dead == pytest.approx(float(((latents > 0).sum(dim=0) == 0).double().mean()))

    c, c_hat = x - x.mean(dim=0), x_hat - x.mean(dim=0)
    assert result.shrinkage == pytest.approx(float(((c_hat**2).sum() / (c_hat * c).sum()).detach()), rel=1e-4)
    assert result.kl is None, "not asked for"

    def by(replacement):
        def change(activations):
            ordinary = ~torch.isin(heldout.tokens, torch.tensor(gpt2.card.special))
            keep = ordinary & (activations.norm(dim=-1) <= heldout.store.norm_limit)
            return torch.where(keep[..., None], replacement(activations), activations)

        return change

    with torch.no_grad():
        clean = spliced_loss(gpt2, heldout.tokens, lambda x: x)
        sae = spliced_loss(gpt2, heldout.tokens, by(trained))
        zero = spliced_loss(gpt2, heldout.tokens, by(torch.zeros_like))
        mean = spliced_loss(gpt2, heldout.tokens, by(lambda a: x.float().mean(dim=0).expand_as(a)))
    assert result.ce_clean == pytest.approx(clean, abs=1e-6)
    assert result.ce_increase == pytest.approx(sae - clean, abs=1e-5)
    assert result.loss_recovered_zero == pytest.approx((zero - sae) / (zero - clean), rel=1e-3)
    assert result.loss_recovered_mean == pytest.approx((mean - sae) / (mean - clean), rel=1e-3)


def test_splicing_the_reconstruction_plus_its_error_changes_nothing(heldout, trained):
    def plus_error(x):
        x_hat = trained(x)
        return x_hat + (x - x_hat)

    with torch.no_grad():
        assert heldout.ce(heldout.spliced(lambda x: x)) == heldout.clean
        assert heldout.ce(heldout.spliced(plus_error)) == pytest.approx(heldout.clean, abs=1e-6)


def test_masked_tokens_are_left_as_they_are(heldout):
    spliced = heldout.spliced(torch.zeros_like)
    assert torch.equal(spliced[~heldout.mask], heldout.activations[~heldout.mask])
    assert (spliced[heldout.mask] == 0).all()
    assert not heldout.mask[:, 0].any()  # BOS


def test_a_perfect_sae_has_no_error_and_a_deaf_one_all_of_it(gpt2, heldout, store):
    perfect = PCA(store[:], store.d_in)
    result = evaluate(perfect, gpt2, heldout)
    assert result.fvu == pytest.approx(0, abs=1e-8)
    assert result.ce_increase == pytest.approx(0, abs=1e-4)
    deaf = VanillaSAE(store.d_in, 8, l1=0.0)
    with torch.no_grad():
        deaf.b_enc.sub_(1e9)
    result = evaluate(deaf, gpt2, heldout)
    assert (result.l0, result.dead) == (0, 1)
    assert result.fvu >= 1
    assert result.loss_recovered_zero == pytest.approx(0, abs=1e-6)


def test_pca_is_the_best_linear_code_of_its_rank(store):
    x = store[:]
    pca = PCA(x, 3)
    centred = x - x.mean(dim=0)
    left = torch.linalg.svdvals(centred.double())[3:].square().sum()
    error = (x - pca.decode(pca.encode(x))).double().square().sum()
    assert float(error) == pytest.approx(float(left), rel=1e-5)


def test_text_and_a_shared_heldout_give_the_same_numbers(gpt2, corpus, heldout, trained):
    text = load_text(corpus, split="heldout")
    trained.metadata["mask"]["norm_limit"] = heldout.store.norm_limit
    direct = evaluate(trained, gpt2, text, **SIZES).numbers()
    assert direct == evaluate(trained, gpt2, heldout).numbers()


def test_each_cut_is_the_cut_that_was_named(gpt2, heldout, trained):
    k = trained.k
    by_row = evaluate(trained, gpt2, heldout, cut="row")
    by_batch = evaluate(trained, gpt2, heldout, cut="batch")
    assert by_row.cut == "row"
    assert by_row.l0_per_token.max() <= k
    assert by_batch.l0 == pytest.approx(k, abs=1e-6)
    assert by_batch.l0_per_token.max() > k
    assert evaluate(trained, gpt2, heldout).cut == "threshold"


def test_the_mode_is_kept_also_when_something_fails(gpt2, heldout, store, trained):
    trained.train()
    evaluate(trained, gpt2, heldout)
    assert trained.training
    with pytest.raises(ValueError, match="own"):
        evaluate(trained, gpt2, heldout, cut="own")
    assert trained.training


def test_an_sae_without_a_threshold_is_refused_before_any_work(gpt2, corpus, own_cache):
    sae = BatchTopKSAE(gpt2.cfg.d_model, 64, k=4)
    with pytest.raises(RuntimeError, match="calibrate_threshold"):
        evaluate(sae, gpt2, load_text(corpus, split="heldout"), **SIZES)
    assert not list(own_cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("fingerprint", "0123456789abcdef"),
        ("hook", "blocks.2.hook_resid_post"),
        ("weight_processing", "TransformerLens compatibility mode"),
    ],
)
def test_an_sae_of_another_model_hook_or_processing_is_refused(gpt2, heldout, trained, entry, value):
    trained.metadata[entry] = value
    with pytest.raises(ValueError, match=f"trained with .*{value}"):
        evaluate(trained, gpt2, heldout)


def test_an_sae_of_another_width_is_refused(gpt2, heldout):
    with pytest.raises(ValueError, match="d_in=7"):
        evaluate(TopKSAE(7, 20, k=3), gpt2, heldout)


def test_nothing_is_nan(gpt2, heldout, trained):
    numbers = evaluate(trained, gpt2, heldout).numbers()
    assert all(math.isfinite(value) for value in numbers.values() if isinstance(value, float))


def test_kl_is_between_the_models_own_predictions_and_the_spliced_ones(gpt2, heldout, trained):
    result = evaluate(trained, gpt2, heldout, kl=True)

    def spliced(activations, hook):
        ordinary = ~torch.isin(heldout.tokens, torch.tensor(gpt2.card.special))
        keep = ordinary & (activations.norm(dim=-1) <= heldout.store.norm_limit)
        return torch.where(keep[..., None], trained(activations), activations)

    with torch.no_grad():
        clean = gpt2(heldout.tokens, return_type="logits")[:, :-1].double().softmax(dim=-1)
        other = gpt2.run_with_hooks(heldout.tokens, fwd_hooks=[(HOOK, spliced)], return_type="logits")[:, :-1]
    other = other.double().softmax(dim=-1)
    counted = ~torch.isin(heldout.tokens[:, 1:], torch.tensor(gpt2.card.special))
    want = sum(
        sum(p * math.log(p / q) for p, q in zip(row.tolist(), mine.tolist(), strict=True))
        for row, mine in zip(clean[counted], other[counted], strict=True)
    ) / int(counted.sum())
    assert result.kl == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert want > 0
