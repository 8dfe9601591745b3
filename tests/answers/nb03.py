"""Answers to the exercises of lesson 03."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import mse_loss, normalize

from tests.answers import Answer
from tutorial_sae.checks import nb03 as check
from tutorial_sae.measures import fvu
from tutorial_sae.saes.base import keep_batch, keep_row

# -- 3.1: k per token --------------------------------------------------------------------------------------


def by_stable_sort(z, k):
    order = z.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order[:, :k], True)
    return z * keep


def by_loop(z, k):
    out = torch.zeros_like(z)
    for i in range(z.shape[0]):
        left = z[i].clone()
        for _ in range(int(k)):
            j = int(np.argmax(left.numpy()))  # the first of the largest
            if left[j] > 0:
                out[i, j] = z[i, j]
            left[j] = -1.0
    return out


def by_nudge(z, k):
    nudged = z.double() - 1e-9 * torch.arange(z.shape[-1])
    index = nudged.topk(k, dim=-1).indices
    return torch.zeros_like(z).scatter(-1, index, z.gather(-1, index))


def by_large_nudge(z, k):
    index = (z - 1e-5 * torch.arange(z.shape[-1])).topk(k, dim=-1).indices
    return torch.zeros_like(z).scatter(-1, index, z.gather(-1, index))


def by_plain_topk(z, k):
    values, index = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, index, values)


def in_place(z, k):
    z[z < z.topk(k, dim=-1).values[:, -1:]] = 0
    return z


def at_least_the_kth(z, k):
    return z * (z >= z.topk(k, dim=-1).values[:, -1:])


def above_the_kth(z, k):
    return z * (z > z.topk(k, dim=-1).values[:, -1:])


def above_the_next(z, k):
    padded = torch.cat([z, torch.zeros(len(z), 1)], dim=1)
    return z * (z > padded.sort(dim=-1, descending=True).values[:, k : k + 1])


def of_columns(z, k):
    index = z.topk(min(k, len(z)), dim=0).indices
    return torch.zeros_like(z).scatter(0, index, z.gather(0, index))


def later_index_first(z, k):
    return by_stable_sort(z.flip(-1), k).flip(-1)


def only_values(z, k):
    return z.topk(k, dim=-1).values


def mask_of_ones(z, k):
    return (by_stable_sort(z, k) > 0).float()


def boolean_mask(z, k):
    return by_stable_sort(z, k) > 0


# -- 3.3: k after training ---------------------------------------------------------------------------------


def set_and_restore(sae, x, k):
    before, sae.k = sae.k, k
    try:
        latents = sae.encode(x)
        x_hat = sae.decode(latents)
    finally:
        sae.k = before
    return fvu(x, x_hat), (latents > 0).float().sum(dim=1).mean()


def by_hand(sae, x, k):
    latents = by_stable_sort(sae.pre_activations(x), k)
    x_hat = sae.decode(latents)
    variance = x.var(dim=0, unbiased=False).sum()
    return [((x - x_hat) ** 2).sum(dim=1).mean() / variance, latents.count_nonzero().item() / x.shape[0]]


def not_restored(sae, x, k):
    sae.k = k
    return fvu(x, sae(x)), (sae.encode(x) > 0).sum().item() / len(x)


def k_forgotten(sae, x, k):
    latents = sae.encode(x)
    return fvu(x, sae.decode(latents)), float((latents > 0).sum(dim=1).float().mean())


def l0_asked_for(sae, x, k):
    return set_and_restore(sae, x, k)[0], k


def uncentred(sae, x, k):
    latents = by_stable_sort(sae.pre_activations(x), k)
    error = (x - sae.decode(latents)).square().sum() / x.square().sum()
    return error, (latents > 0).sum(dim=1).float().mean()


def mean_squared(sae, x, k):
    latents = by_stable_sort(sae.pre_activations(x), k)
    return mse_loss(sae.decode(latents), x), (latents > 0).sum(dim=1).float().mean()


def only_fvu(sae, x, k):
    return set_and_restore(sae, x, k)[0]


# -- 3.5: AuxK ---------------------------------------------------------------------------------------------


def auxk_masked(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    revived = keep_row(z * dead, min(aux_k, int(dead.sum())))
    return (error - revived @ W_dec).square().sum(dim=-1).mean()


def auxk_sliced(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    with torch.no_grad():
        e = x - b_dec - keep_row((x @ W_enc + b_enc - b_dec @ W_enc).relu(), k) @ W_dec
    which = dead.nonzero().flatten()
    z = ((x - b_dec) @ W_enc[:, which] + b_enc[which]).clamp(min=0)
    values, index = z.topk(min(aux_k, len(which)), dim=1)
    e_hat = torch.einsum("nk,nkd->nd", values, W_dec[which][index])
    return ((e - e_hat) ** 2).sum() / len(x)


def auxk_numpy_mask(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.nn.functional.relu(x @ W_enc - b_dec @ W_enc + b_enc)
    e = x - torch.addmm(b_dec, keep_row(z, k), W_dec)
    keep = keep_row(torch.where(dead, z, torch.zeros(())), min(aux_k, int(dead.sum()))) > 0
    return torch.norm(e.detach() - (z * keep) @ W_dec, dim=1).pow(2).mean()


def auxk_attached(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = x - (keep_row(z, k) @ W_dec + b_dec)
    return (error - keep_row(z * dead, min(aux_k, int(dead.sum()))) @ W_dec).square().sum(dim=-1).mean()


def auxk_with_b_dec(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    error_hat = keep_row(z * dead, min(aux_k, int(dead.sum()))) @ W_dec + b_dec
    return (error - error_hat).square().sum(dim=-1).mean()


def auxk_of_all(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    return (error - keep_row(z, min(aux_k, int(dead.sum()))) @ W_dec).square().sum(dim=-1).mean()


def auxk_without_relu(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    pre = (x - b_dec) @ W_enc + b_enc
    error = (x - (keep_row(pre.relu(), k) @ W_dec + b_dec)).detach()
    values, index = pre[:, dead].topk(min(aux_k, int(dead.sum())), dim=1)
    error_hat = torch.zeros_like(pre[:, dead]).scatter(1, index, values) @ W_dec[dead]
    return (error - error_hat).square().sum(dim=-1).mean()


def auxk_mean_of_elements(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    return auxk_masked(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k) / x.shape[1]


def auxk_over_32(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    return auxk_masked(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k) / 32


def auxk_z_detached(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc).detach()
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    return (error - keep_row(z * dead, min(aux_k, int(dead.sum()))) @ W_dec).square().sum(dim=-1).mean()


def auxk_no_gradient(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    return auxk_masked(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k).detach()


def auxk_by_package(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    return (error - keep_row(z * dead, aux_k) @ W_dec).square().sum(dim=-1).mean()


def auxk_too_many(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    values, latents = (z * dead).topk(aux_k)
    e_hat = torch.zeros_like(z).scatter(1, latents, values) @ W_dec
    return (error - e_hat).square().sum(dim=-1).mean()


def auxk_per_token(x, W_enc, b_enc, W_dec, b_dec, k, dead, aux_k):
    z = torch.relu((x - b_dec) @ W_enc + b_enc)
    error = (x - (keep_row(z, k) @ W_dec + b_dec)).detach()
    return (error - keep_row(z * dead, min(aux_k, int(dead.sum()))) @ W_dec).square().sum(dim=-1)


# -- 3.7: post mortem --------------------------------------------------------------------------------------


def kinds(pre, k):
    fired = (keep_row(pre.relu(), k) > 0).any(dim=0)
    ever = pre.amax(dim=0) > 0
    return ~fired & ever, ~fired & ~ever


def kinds_by_loop(pre, k):
    outbid, never = [], []
    kept = by_loop(pre.clamp(min=0), k)
    for j in range(pre.shape[1]):
        silent = not any(float(v) > 0 for v in kept[:, j])
        positive = any(float(v) > 0 for v in pre[:, j])
        outbid.append(silent and positive)
        never.append(silent and not positive)
    return torch.tensor(outbid), torch.tensor(never)


def kinds_swapped(pre, k):
    return kinds(pre, k)[::-1]


def kinds_with_the_living(pre, k):
    return (pre > 0).any(dim=0), ~(pre > 0).any(dim=0)


def kinds_without_relu(pre, k):
    index = pre.topk(k, dim=1).indices
    silent = ~torch.zeros_like(pre, dtype=torch.bool).scatter(1, index, True).any(dim=0)
    positive = (pre > 0).any(dim=0)
    return silent & positive, silent & ~positive


def kinds_on_average(pre, k):
    silent = ~(keep_row(pre.relu(), k) > 0).any(dim=0)
    return silent & (pre.mean(dim=0) > 0), silent & (pre.mean(dim=0) <= 0)


def kinds_as_numbers(pre, k):
    return tuple(int(mask.sum()) for mask in kinds(pre, k))


# -- 3.4: make TopK choose wrongly -------------------------------------------------------------------------

TWO = torch.eye(2)
X = torch.tensor([1.0, 0.1])
SMALL_ONE = torch.tensor([[0.1, 0.0], [0.0, 5.0]])
SLANTED = normalize(torch.tensor([[1.0, 0.2], [0.3, 1.0]]), dim=1)

ANSWERS = [
    Answer(check.topk, "a nudge that reorders", (by_large_nudge,), "close but not"),
    Answer(check.topk, "plain torch.topk", (by_plain_topk,), "promises nothing"),
    Answer(check.topk, "a stable sort and a mask", (by_stable_sort,), None),
    Answer(check.topk, "a loop with NumPy's argmax", (by_loop,), None),
    Answer(check.topk, "ties nudged apart in double precision", (by_nudge,), None),
    Answer(check.topk, "the package's own cut", (keep_row,), None),
    Answer(check.topk, "changes z itself", (in_place,), "changes the tensor"),
    Answer(check.topk, ">= the k-th largest", (at_least_the_kth,), "a tie gives a token more than k"),
    Answer(check.topk, "> the k-th largest", (above_the_kth,), "lose the k-th itself"),
    Answer(check.topk, "> the (k+1)-th largest", (above_the_next,), "too few stay"),
    Answer(check.topk, "BatchTopK", (keep_batch,), "one token takes another's latents"),
    Answer(check.topk, "topk over dimension 0", (of_columns,), "each column"),
    Answer(check.topk, "ties to the higher index", (later_index_first,), "the lower index stays"),
    Answer(check.topk, "the values alone", (only_values,), "has shape (2, 2)"),
    Answer(check.topk, "ones where it keeps", (mask_of_ones,), "The values are off"),
    Answer(check.topk, "a mask", (boolean_mask,), "has dtype torch.bool"),
    Answer(check.topk, "a stub", (None,), "not attempted"),
    *(
        Answer(check.who_pays, f"letter {letter}", (letter,), says)
        for letter, says in [
            ("a", "Punctuation comes in few kinds"),
            ("b", "Digits come in ten kinds"),
            ("c", "Close."),
            ("d", None),
        ]
    ),
    Answer(check.who_pays, "not attempted", (...,), "not attempted"),
    Answer(check.error_at, "sets k and restores it", (set_and_restore,), None),
    Answer(check.error_at, "by hand, as a list of tensors", (by_hand,), None),
    Answer(check.error_at, "k left changed", (not_restored,), "set it back"),
    Answer(check.error_at, "k never set", (k_forgotten,), "You encode with the k that the SAE came with"),
    Answer(check.error_at, "L0 = k", (l0_asked_for,), "Count what is there"),
    Answer(check.error_at, "not centred", (uncentred,), "about the mean"),
    Answer(check.error_at, "a mean squared error", (mean_squared,), "Part 1"),
    Answer(check.error_at, "one number", (only_fvu,), "must be 2 things"),
    Answer(check.auxk, "z of the living set to 0", (auxk_masked,), None),
    Answer(check.auxk, "only the weights of the dead", (auxk_sliced,), None),
    Answer(check.auxk, "a mask of what is kept, and a norm", (auxk_numpy_mask,), None),
    Answer(check.auxk, "error not detached", (auxk_attached,), "not detached"),
    Answer(check.auxk, "b_dec in e_hat", (auxk_with_b_dec,), "You add b_dec to e_hat"),
    Answer(check.auxk, "all latents", (auxk_of_all,), "Only the dead may"),
    Answer(check.auxk, "no ReLU", (auxk_without_relu,), "You dropped the ReLU"),
    Answer(check.auxk, "mean over elements", (auxk_mean_of_elements,), "You average over the dimensions"),
    Answer(check.auxk, "divided by 32 already", (auxk_over_32,), "is right"),
    Answer(check.auxk, "z detached", (auxk_z_detached,), "its gradient on W_enc, b_enc, b_dec is not"),
    Answer(check.auxk, "everything detached", (auxk_no_gradient,), "its gradient on"),
    Answer(check.auxk, "by the package's cut", (auxk_by_package,), None),
    Answer(check.auxk, "more aux_k than latents is not thought of", (auxk_too_many,), "RuntimeError"),
    Answer(check.auxk, "one loss for each token", (auxk_per_token,), "has shape (3,)"),
    *(
        Answer(check.reach, f"letter {letter}", (letter,), says)
        for letter, says in [
            ("a", "No gradient passes"),
            ("b", None),
            ("B ", None),
            ("c", "The wrong way round"),
            ("d", "positive on 300"),
            ("both", "none of the letters"),
        ]
    ),
    Answer(check.post_mortem, "masks", (kinds,), None),
    Answer(check.post_mortem, "loops", (kinds_by_loop,), None),
    Answer(check.post_mortem, "swapped", (kinds_swapped,), "the wrong way round"),
    Answer(check.post_mortem, "living latents count as outbid", (kinds_with_the_living,), "that fire"),
    Answer(check.post_mortem, "cut before the ReLU", (kinds_without_relu,), "You cut before the ReLU"),
    Answer(check.post_mortem, "positive on average", (kinds_on_average,), "is wrong"),
    Answer(check.post_mortem, "two numbers", (kinds_as_numbers,), "must be a tensor"),
    Answer(
        check.wrong_choice,
        "an encoder that likes the small one",
        (X, SMALL_ONE, TWO),
        None,
    ),
    Answer(
        check.wrong_choice, "slanted rows", (torch.tensor([0.0, 2.0]), torch.tensor([[2.0, 1.0]] * 2), SLANTED), None
    ),
    Answer(check.wrong_choice, "encoder = decoder", (X, TWO, TWO), "not worse"),
    Answer(check.wrong_choice, "long rows", (X, 5 * TWO, 2 * TWO), "length 1"),
    Answer(check.wrong_choice, "nothing positive", (-X, TWO, TWO), "a positive z"),
    Answer(check.wrong_choice, "a tie", (torch.ones(2), TWO, TWO), "larger than the other's"),
    Answer(check.wrong_choice, "three latents", (X, torch.ones(2, 3), torch.ones(3, 2)), "has shape (2, 3)"),
    Answer(check.wrong_choice, "not attempted", (..., ..., ...), "not attempted"),
]
