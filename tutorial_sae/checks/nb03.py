"""Checks of lesson 03: TopK.

The docstring of a check holds what it says to known slips, or to wrong letters: a name, and the sentence for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tutorial_sae.checks.core import Case, Failed, call, choose, close, exercise, explain, like, sentences, try_cases
from tutorial_sae.measures import fvu
from tutorial_sae.runtime import generator
from tutorial_sae.saes import TopKSAE, base

PARTS = ("loss", "W_enc", "b_enc", "W_dec", "b_dec")


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "nb03"))


# -- 3.1: the k largest of each row ----------------------------------------------------------------------


def _topk(z: Tensor, k: int) -> Tensor:
    """Each row sorted, largest first and of equals the lower index first; the first k stay."""
    return _at(z, z.sort(dim=1, descending=True, stable=True).indices[:, :k])


def _at(z: Tensor, places: Tensor) -> Tensor:
    """z at these places of each row, 0 elsewhere."""
    return torch.zeros_like(z).scatter(1, places, z.gather(1, places))


@exercise("3.1", "k per token")
def topk(f: Any) -> str:
    """
    whole: You cut the whole matrix at once, so that one token takes another's latents. TopK cuts each row on its own.
    columns: You cut each column (latent): `topk` ran over dimension 0. TopK cuts each row (token).
    high: Of equal entries you keep the one with the higher index. The rule is: the lower index stays.
    next: You keep what is larger than the (k+1)-th largest. Where that one is tied with the k-th, too few stay.
    ties: You keep every entry that equals the k-th largest, so that a tie gives a token more than k. Where there are
        more equals than room, the lower index stays.
    bar: You keep what is larger than the k-th largest, and so lose the k-th itself.
    bent: You lower the entries a little to decide ties, and so put entries in a wrong order that are close but not
        equal. Sort the entries as they are, with `stable=True`.
    plain: `torch.topk` promises nothing about which of several equal entries it takes. The rule is: the lower index
        stays; a sort with `stable=True` keeps it.
    """
    slips = sentences(
        topk,
        whole=base.keep_batch,
        columns=lambda z, k: base.keep_row(z.T, k).T,
        high=lambda z, k: _topk(z.flip(1), k).flip(1),
        next=lambda z, k: torch.where(z > z.topk(k + 1).values[:, -1:], z, 0),
        ties=lambda z, k: torch.where(z >= z.topk(k).values[:, -1:], z, 0),
        bar=lambda z, k: torch.where(z > z.topk(k).values[:, -1:], z, 0),
        bent=lambda z, k: _at(z, (z - 1e-4 * torch.arange(z.shape[1])).topk(k).indices),
        plain=lambda z, k: _at(z, z.topk(k).indices),
    )
    near = torch.zeros(1, 2304)
    near[0, 0], near[0, -1] = 0.5, 0.50001
    plain = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.4, 0.1, 0.2, 0.3]])
    tied = torch.tensor([[0.5, 0.2, 0.5, 0.5], [0.1, 0.9, 0.9, 0.3], [0.0, 0.7, 0.0, 0.0]])
    cases = [Case("values", (plain, 2)), *(Case("ties, fewer positives than k", (tied, k)) for k in (1, 2, 4))]
    wide = _random(2, 40, 96).relu()
    cases += [Case("one token", (wide[:1], 3)), Case("96 latents", (wide, 5)), Case("many ties", (wide.round(), 5))]
    cases += [Case("close but not equal", (near, 1))]
    return try_cases(f, _topk, cases, slips, tol=1e-6)


# -- 3.2: who pays ---------------------------------------------------------------------------------------


@exercise("3.2", "a comma as much as a surname", kind="predict")
def who_pays(answer: Any) -> str:
    """
    a: Punctuation comes in few kinds and is met all the time: 32 latents are more than most of it needs.
    b: Digits come in ten kinds. What is there to say about one that 32 latents do not reach?
    c: Close. But how much does the first piece of a word say, and how much has come together at its second or third?
    """
    return choose(answer, "d", sentences(who_pays), "the later pieces of words, names above all; see the figure below")


# -- 3.3: k at inference ---------------------------------------------------------------------------------


def _error_at(sae: Any, x: Tensor, k: int) -> tuple[float, float]:
    kept = base.keep_row(sae.pre_activations(x), k)
    return fvu(x, sae.decode(kept)), float((kept > 0).sum()) / len(x)


@exercise("3.3", "k after training", kind="measure")
def error_at(f: Any) -> str:
    """
    old: You encode with the k that the SAE came with. Set `sae.k = k` before, and set it back afterwards.
    asked: Your L0 is the k that was asked for. Count what is there: a token with fewer than k positives keeps fewer.
    uncentred: Your FVU divides by the squared length of x. The variance is about the mean: `x - x.mean(dim=0)`.
    """
    x, sae = 3 * _random(5, 60, 12) + 2, TopKSAE(12, 40, k=4, normalize="none").requires_grad_(False)
    slips = sentences(
        error_at,
        old=lambda sae, x, k: _error_at(sae, x, 4),
        asked=lambda sae, x, k: (_error_at(sae, x, k)[0], float(k)),
        uncentred=lambda sae, x, k: (_error_at(sae, x, k)[0] / fvu(x, 0 * x), _error_at(sae, x, k)[1]),
    )
    for k in (2, 8, 4, 40):
        try_cases(f, _error_at, [Case(f"k = {k}", (sae, x, k))], slips)
        if sae.k != 4:
            raise Failed(
                f"The numbers are right, but the SAE came with k = 4 and is left with k = {sae.k}: set it back."
            )
    return "k = 2, 4, 8, 40; fewer positives than k; the SAE left as it was"


# -- 3.4: the wrong choice -------------------------------------------------------------------------------


@exercise("3.4", "make TopK choose wrongly", kind="break it", core=False)
def wrong_choice(x: Any, W_enc: Any, W_dec: Any) -> str:
    x, W_enc, W_dec = (torch.as_tensor(part, dtype=torch.float32) for part in (x, W_enc, W_dec))
    like((x, W_enc, W_dec), (torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, 2)), "the answer")
    z, along = x @ W_enc, W_dec @ x
    kept, other = (x.square().sum() - along.square())[[int(z.argmax()), int(z.argmin())]].tolist()
    if not close(W_dec.norm(dim=1), torch.ones(2), 1e-3) or z.max() <= max(0, z.min()):
        raise Failed("Rows of W_dec need length 1, and one latent a positive z, larger than the other's.")
    if other >= 0.9 * kept:
        raise Failed(f"At their best values the latent TopK keeps leaves {kept:.3g}, the other {other:.3g}: not worse.")
    return f"at their best values the latent TopK keeps leaves {kept:.3g}, and the other {other:.3g}"


# -- 3.5: AuxK -------------------------------------------------------------------------------------------


def _auxk(x: Tensor, W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any, k: int, dead: Any, aux_k: int, slip: str = ""):
    pre = (x - b_dec) @ W_enc + b_enc
    error = x - base.keep_row(pre.relu(), k) @ W_dec - b_dec
    z = torch.where(dead | torch.tensor(slip == "all"), pre if slip == "raw" else pre.relu(), -torch.inf)
    top = z.topk(min(aux_k, int(dead.sum()))).indices
    kept = torch.zeros_like(pre).scatter(1, top, z.gather(1, top))
    error = error if slip == "attached" else error.detach()
    squares = (error - kept @ W_dec - (b_dec if slip == "bias" else 0)).square()
    return squares.mean() if slip == "mean" else squares.sum(dim=1).mean()


def _pulls(f: Any, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The loss, and its gradient on each weight: zeros where none arrives."""
    weights = [weight.clone().requires_grad_() for weight in rest[:4]]
    with torch.enable_grad():
        loss = call(f, x, *weights, *rest[4:])
        like(loss, torch.zeros(()), "the loss")
        if loss.requires_grad:
            loss.backward()
    return float(loss.detach()), *(torch.zeros_like(w) if w.grad is None else w.grad for w in weights)


@exercise("3.5", "AuxK, and what it may touch")
def auxk(f: Any) -> str:
    """
    attached: The error is not detached: AuxK then pulls at the living latents too, through x_hat. Use `.detach()`.
    bias: You add b_dec to e_hat. It is in x_hat already, so e has none left in it, and e_hat must have none.
    all: You let all latents rebuild the error. Only the dead may: choose among their entries alone.
    raw: You dropped the ReLU: dead latents are kept with negative values, and a latent never fires negatively.
    mean: You average over the dimensions too. Sum the squares over d_in, then average over tokens.
    """
    slips = {text: lambda *args, slip=slip: _pulls(_auxk, *args, slip) for slip, text in sentences(auxk).items()}
    for seed, (n, d, m, aux_k) in enumerate([(3, 2, 5, 1), (20, 6, 16, 2), (20, 6, 16, 99)]):
        W_dec, dead = torch.nn.functional.normalize(_random(seed, m, d), dim=1), torch.arange(m) % 3 == 1
        biases = 0.1 * _random(20 + seed, m), 0.3 * _random(30 + seed, d)
        args = (_random(9 + seed, n, d), W_dec.T.clone(), biases[0], W_dec, biases[1], 2, dead, aux_k)
        got, want = _pulls(f, *args), _pulls(_auxk, *args)
        wrong = [name for name, g, w in zip(PARTS, got, want, strict=True) if not close(g, w)]
        if wrong and "loss" not in wrong and not any(close(got, slip(*args)) for slip in slips.values()):
            raise Failed(
                f"The loss is right; its gradient on {', '.join(wrong)} is not. Detach the error, and no more."
            )
        if wrong:
            explain(got, want, Case(f"{int(dead.sum())} of {m} latents dead, aux_k = {aux_k}", args), slips)
    return "the loss; its gradient on the dead, on the living, on b_dec; more aux_k than dead"


# -- 3.6, 3.7: two kinds of dead latent ------------------------------------------------------------------


@exercise("3.6", "whom can AuxK reach?", kind="predict")
def reach(answer: Any) -> str:
    """
    a: For A every z is relu of something negative: 0, and flat there. No gradient passes.
    c: The wrong way round: behind a ReLU no gradient passes where z = 0, and A's z is 0 everywhere.
    d: B's z is positive on 300 tokens. On these AuxK can use it, and the gradient passes the ReLU.
    """
    return choose(answer, "b", sentences(reach), "a gradient needs a token on which z is positive")


def _kinds(pre: Tensor, k: int, relu: Any = torch.relu) -> tuple[Tensor, Tensor]:
    silent, positive = ~(_topk(relu(pre), k) != 0).any(dim=0), (pre > 0).any(dim=0)
    return silent & positive, silent & ~positive


@exercise("3.7", "post mortem", kind="diagnose")
def post_mortem(f: Any) -> str:
    """
    swapped: You have the two the wrong way round: outbid is positive somewhere, and comes first in the answer.
    living: Your `outbid` has latents in it that fire. Outbid are those that are positive somewhere and kept nowhere.
    raw: You cut before the ReLU: a token with fewer than k positives then keeps negative ones, and these seem to fire.
    """
    slips = sentences(
        post_mortem,
        swapped=lambda pre, k: _kinds(pre, k)[::-1],
        living=lambda pre, k: ((pre > 0).any(dim=0), _kinds(pre, k)[1]),
        raw=lambda pre, k: _kinds(pre, k, relu=torch.clone),
    )
    small = torch.tensor([[0.9, 0.3, -0.2, 0.8, -0.5], [0.7, -0.4, -0.1, 0.6, -0.3], [-0.2, -0.9, -0.6, 0.4, -0.7]])
    wide = _random(7, 80, 60) + torch.linspace(-4, 1, 60)
    cases = [Case(f"{n} x 5, k = {k}", (small[:n], k)) for n, k in ((3, 2), (1, 2), (3, 5))]
    cases += [Case("60 latents", (wide, 3)), Case("fewer positives than k", (wide[:9] - 2, 9))]
    return try_cases(f, _kinds, cases, slips)
