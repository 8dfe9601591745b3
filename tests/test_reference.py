"""BatchTopK and TopK held to the conventions of the paper's reference code, derived a second time.

Everything here is float64 and written from a description of those conventions, in an order and with functions unlike
the package's: each token standardised by its mean and its unbiased standard deviation plus 1e-5, latents
relu((x - b_dec) @ W_enc) without an encoder bias, the k*n largest entries of the batch kept, decoded with b_dec, the
standardisation undone. Its losses are means over all elements, ours sums over d_in and means over tokens, so ours are
d_in times as large.

Where that code differs from this package by our choice, the derivation follows the package:
- it renormalises the decoder between the projection and Adam's step, so what it saves is not quite of length 1;
- it does not detach AuxK's residual, so dead latents pull on living ones (one test here shows that this matters);
- it holds a b_enc that its TopK and BatchTopK never use; ours is trained, and starts at zero;
- it counts silent batches, we count silent tokens. Here the dead are set by hand.
"""

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tutorial_sae import BatchTopKSAE, TopKSAE, TrainConfig, sparse, train

SIZES = {"small": (48, 192, 256, 8), "larger": (96, 768, 512, 16.5)}  # d_in, d_sae, tokens, k
WEIGHTS = ("W_enc", "W_dec", "b_dec")
AUX_K = 24

sizes = pytest.mark.parametrize("size", SIZES)
variants = pytest.mark.parametrize("variant", ["batchtopk", "topk"])
paths = pytest.mark.parametrize("fast", [False, True], ids=["reference path", "fast path"])


class Derived(NamedTuple):
    """One batch by the second derivation; `loss` and `aux` are means over all elements, 1/32 included."""

    latents: Tensor
    loss: Tensor
    aux: Tensor
    x_hat: Tensor
    margin: float  # how far the last entry kept is above the first one cut


def tokens(d_in: int, n: int, seed: int = 0) -> Tensor:
    """Raw activations: a few directions and noise, off centre, each token of a length of its own."""
    chance = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_in // 3, d_in, generator=torch.Generator().manual_seed(77))
    strength = torch.randn(n, d_in // 3, generator=chance).relu()
    noise = torch.randn(n, d_in, generator=chance)
    length = 0.5 + 4 * torch.rand(n, 1, generator=chance)
    return length * (strength @ directions + 0.5 * noise) + torch.linspace(-3, 5, d_in)


def build(variant: str, size: str, *, dead: bool = False) -> tuple[Any, Tensor]:
    """An SAE off its symmetric start, b_enc zero, and a batch. Its dead latents have small encoder weights."""
    d_in, d_sae, n, k = SIZES[size]
    if variant == "topk":
        sae: Any = TopKSAE(d_in, d_sae, k=int(k), aux_k=AUX_K, normalize="token", seed=3)
    else:
        sae = BatchTopKSAE(d_in, d_sae, k=k, aux_k=AUX_K, normalize="token", seed=3)
    chance = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.W_enc += 0.05 * torch.randn(d_in, d_sae, generator=chance)
        sae.b_dec += 0.3 * torch.randn(d_in, generator=chance)
        if dead:
            sae.W_enc[:, 5 : d_sae // 2 : 2] *= 0.02
            sae.tokens_since_fired[: d_sae // 2] = sae.dead_after_tokens
    return sae, tokens(d_in, n)


def exact_weights(sae: Any) -> dict[str, Tensor]:
    return {name: p.detach().double().clone().requires_grad_() for name, p in sae.named_parameters()}


def largest(values: Tensor, budget: int) -> tuple[Tensor, float]:
    """A 0/1 mask of the `budget` largest entries of a vector by sorting them all, and the gap below the last."""
    ranked, order = values.sort(descending=True)
    mask = torch.zeros_like(values)
    mask[order[:budget]] = 1.0
    return mask, float(ranked[budget - 1] - ranked[budget]) if budget < len(ranked) else math.inf


def derive(
    w: dict[str, Tensor],
    x: Tensor,
    k: float,
    *,
    rows: bool = False,
    bias: bool = False,
    dead: Tensor | None = None,
    detach: bool = True,
) -> Derived:
    x = x.double()
    n, d_in = x.shape
    centre = x.sum(1, keepdim=True) / d_in
    spread = (((x - centre) ** 2).sum(1, keepdim=True) / (d_in - 1)) ** 0.5 + 1e-5
    x_n = (x - centre) / spread
    acts = torch.clamp(torch.einsum("td,dm->tm", x_n - w["b_dec"], w["W_enc"]) + (w["b_enc"] if bias else 0.0), min=0)
    if rows:
        cuts = [largest(row, int(k)) for row in acts.detach()]
        mask, margin = torch.stack([cut[0] for cut in cuts]), min(cut[1] for cut in cuts)
    else:
        mask, margin = largest(acts.detach().reshape(n * acts.shape[1]), math.floor(k * n))
        mask = mask.reshape(acts.shape)
    latents = acts * mask
    out = torch.einsum("tm,md->td", latents, w["W_dec"]) + w["b_dec"]
    loss = ((out - x_n) ** 2).mean()
    aux = torch.zeros((), dtype=torch.float64)
    if dead is not None:
        residual = x_n - out
        if detach:
            residual = residual.detach()
        idle = acts[:, dead]
        chosen = torch.stack([largest(row, min(AUX_K, len(dead)))[0] for row in idle.detach()])
        aux = ((residual - (idle * chosen) @ w["W_dec"][dead]) ** 2).mean() / 32
    return Derived(latents, loss, aux, out * spread + centre, margin)


def distance(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None
    assert wanted is not None
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def loss_of(sae: Any, x: Tensor, fast: bool) -> Any:
    return sparse.loss(sae, x) if fast else sae.loss(x)


# --- one batch -------------------------------------------------------------------------------------------


@variants
@sizes
def test_selection_and_reconstruction_are_the_reference_codes(variant, size):
    sae, x = build(variant, size)
    wanted = derive(exact_weights(sae), x, sae.k, rows=variant == "topk")
    assert wanted.margin > 2e-6, "the data must leave no doubt about the last entry kept"
    got = sae.encode(x)
    differ = (got > 0) != (wanted.latents > 0)
    assert int(differ.sum()) == 0
    kept = int((got > 0).sum())
    assert kept == math.floor(sae.k * len(x))
    torch.testing.assert_close(got.double(), wanted.latents, rtol=1e-5, atol=1e-5)
    assert distance(sae(x), wanted.x_hat) < 1e-6


@variants
@sizes
@paths
def test_loss_and_gradients_are_d_in_times_the_reference_codes(variant, size, fast):
    sae, x = build(variant, size)
    w, d_in = exact_weights(sae), x.shape[1]
    wanted = derive(w, x, sae.k, rows=variant == "topk")
    (d_in * wanted.loss).backward()
    got = loss_of(sae, x, fast)
    got.total.backward()
    assert got.aux == 0
    assert got.penalty == 0
    assert got.total.item() == pytest.approx(d_in * wanted.loss.item(), rel=1e-6)
    assert got.mse.item() == pytest.approx(d_in * wanted.loss.item(), rel=1e-6)
    assert got.l0.item() == pytest.approx(math.floor(sae.k * len(x)) / len(x))
    raw = x.double()
    fvu = ((raw - wanted.x_hat) ** 2).sum() / ((raw - raw.mean(0)) ** 2).sum()
    assert got.fvu.item() == pytest.approx(fvu.item(), rel=1e-6)
    for name in WEIGHTS:
        assert distance(getattr(sae, name).grad, w[name].grad) <= 1e-6, name


@paths
@variants
@sizes
def test_auxk_is_d_in_times_the_reference_codes_with_the_residual_detached(variant, size, fast):
    sae, x = build(variant, size, dead=True)
    d_in, d_sae, _, _ = SIZES[size]
    w, rows = exact_weights(sae), variant == "topk"
    silent = (derive(w, x, sae.k, rows=rows).latents > 0).sum(0) == 0
    dead = (silent & (torch.arange(d_sae) < d_sae // 2)).nonzero().squeeze(1)
    assert AUX_K < len(dead) < d_sae // 2, "more dead than AuxK takes, and some that were counted dead do fire"
    wanted = derive(w, x, sae.k, rows=rows, dead=dead)
    (d_in * (wanted.loss + wanted.aux)).backward()
    got = loss_of(sae, x, fast)
    got.total.backward()
    assert got.aux.item() == pytest.approx(d_in * wanted.aux.item(), rel=1e-6)
    assert got.total.item() == pytest.approx(d_in * (wanted.loss + wanted.aux).item(), rel=1e-6)
    for name in WEIGHTS:
        assert distance(getattr(sae, name).grad, w[name].grad) <= 1e-6, name

    attached = exact_weights(sae)
    theirs = derive(attached, x, sae.k, rows=rows, dead=dead, detach=False)
    (d_in * (theirs.loss + theirs.aux)).backward()
    assert theirs.aux.item() == pytest.approx(wanted.aux.item(), rel=1e-12)
    assert distance(sae.W_dec.grad, attached["W_dec"].grad) > 1e-2, "a choice that this test must feel"


# --- twenty steps ----------------------------------------------------------------------------------------


class Adam:
    """Adam as its paper states it, for a dictionary of float64 tensors with gradients."""

    def __init__(self, weights: dict[str, Tensor], lr: float = 3e-4, first: float = 0.9, second: float = 0.99):
        self.weights, self.lr, self.first, self.second, self.t = weights, lr, first, second, 0
        self.mean = {name: torch.zeros_like(p) for name, p in weights.items()}
        self.square = {name: torch.zeros_like(p) for name, p in weights.items()}

    def step(self, gradients: dict[str, Tensor]) -> None:
        self.t += 1
        for name, g in gradients.items():
            self.mean[name] = self.first * self.mean[name] + (1 - self.first) * g
            self.square[name] = self.second * self.square[name] + (1 - self.second) * g**2
            mean = self.mean[name] / (1 - self.first**self.t)
            square = self.square[name] / (1 - self.second**self.t)
            self.weights[name].data -= self.lr * mean / (square.sqrt() + 1e-8)


def derived_steps(sae: Any, batches: list[Tensor], *, rows: bool, bias: bool) -> dict[str, Tensor]:
    w = exact_weights(sae)
    trained: tuple[str, ...] = (*WEIGHTS, "b_enc") if bias else WEIGHTS
    adam = Adam({name: w[name] for name in trained})
    for x in batches:
        d_in = x.shape[1]
        loss = d_in * derive(w, x, sae.k, rows=rows, bias=bias).loss
        by_name = torch.autograd.grad(loss, [w[name] for name in trained])
        gradients: dict[str, Tensor] = dict(zip(trained, by_name, strict=True))
        for row, g in zip(w["W_dec"].detach(), gradients["W_dec"], strict=True):
            g -= (g @ row) / (row @ row) * row
        adam.step(gradients)
        w["W_dec"].data /= (w["W_dec"].detach() ** 2).sum(1, keepdim=True) ** 0.5
    return {name: p.detach() for name, p in w.items()}


@paths
@variants
def test_twenty_steps_of_adam_stay_together(variant, fast):
    sae, _ = build(variant, "small")
    d_in, _, n, _ = SIZES["small"]
    batches = [tokens(d_in, n, seed=100 + step) for step in range(20)]
    start = copy.deepcopy(sae.state_dict())
    wanted = derived_steps(sae, batches, rows=variant == "topk", bias=False)
    sae.b_enc.requires_grad_(False)  # the reference code has none to train
    adam = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=3e-4, betas=(0.9, 0.99))
    for x in batches:
        adam.zero_grad()
        loss_of(sae, x, fast).total.backward()
        sae.project_decoder_grad()
        adam.step()
        sae.normalize_decoder()
    for name in WEIGHTS:
        moved = distance(start[name], wanted[name])
        assert moved > 3e-3, f"{name} must have moved for this to mean anything"
        assert distance(getattr(sae, name), wanted[name]) < 1e-5, name
    assert not sae.b_enc.any()


@paths
@variants
def test_train_takes_the_same_steps_and_trains_the_encoder_bias(variant, fast):
    sae, x = build(variant, "small")
    start = copy.deepcopy(sae.state_dict())
    wanted = derived_steps(sae, [x] * 20, rows=variant == "topk", bias=True)
    config = TrainConfig(
        tokens=20 * len(x),
        batch_size=len(x),
        lr=3e-4,
        betas=(0.9, 0.99),
        warmup=0.0,
        decay=0.0,
        revive="none",
        fast=fast,
    )
    train(sae, x, config)
    for name in (*WEIGHTS, "b_enc"):
        assert distance(getattr(sae, name), wanted[name]) < 1e-5, name
        assert distance(start[name], wanted[name]) > 3e-3, f"{name} must have moved for this to mean anything"
    rows = sae.W_dec.detach().double()
    torch.testing.assert_close((rows @ rows.T).diagonal(), torch.ones(len(rows)).double(), rtol=1e-6, atol=1e-6)
