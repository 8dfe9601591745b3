"""The fast path: the mathematics of `saes/` on the entries that survive a cut, a few in a thousand.

Of the six products of a dense step (encode, decode, two weight gradients, the gradients of the latents and of the
input) only the first needs all entries of z. The others are sums over the kept (token, latent) pairs, which
`embedding_bag` computes without ever forming a matrix of latents. The encoder's weights lie transposed in memory, so
that each latent's weights, and their gradient, are one contiguous row.

`saes/` is the reference; tests hold the two together, selection and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tutorial_sae.saes import SAE, BatchTopKSAE, Loss, TopKSAE, VanillaSAE
from tutorial_sae.saes import base as reference

MOST_KEPT = 16  # a vanilla SAE starts dense: while it keeps more than 1 entry in 16, dense products are faster

_value_gradients = torch.ops.aten._embedding_bag_per_sample_weights_backward


class Kept(NamedTuple):
    """The entries of z that a cut keeps, in row-major order."""

    index: Int[Tensor, " pairs"]  # flat: token * d_sae + latent
    values: Float[Tensor, " pairs"]


def nonzero_above(z: Tensor, low: float) -> Tensor:
    """Flat indices of the entries above `low`; NumPy's search is several times faster than PyTorch's on a CPU."""
    return torch.from_numpy(np.flatnonzero(z.detach().view(-1).numpy() > low))


def keep_positive(z: Float[Tensor, "tokens latents"]) -> Kept:
    index = nonzero_above(z, 0.0)
    return Kept(index, z.view(-1)[index])


def keep_row(z: Float[Tensor, "tokens latents"], k: int) -> Kept:
    """The k largest positive entries of each row; ties go to the lower index."""
    cut = z.topk(k, dim=-1).values[:, -1:]
    chosen = (z >= cut) & (z > 0)
    if (chosen.sum(dim=-1) > k).any():  # ties
        return keep_positive(reference.keep_row(z, k))
    index = torch.from_numpy(np.flatnonzero(chosen.numpy()))
    return Kept(index, z.view(-1)[index])


def keep_largest(z: Float[Tensor, "tokens latents"], budget: int, guess: float) -> tuple[Kept, float]:
    """The `budget` largest positive entries, ties to the lower index, and the cut to guess from next time.

    Entries above `guess` less some slack are candidates. If they are enough, the exact cut is found among them alone.
    """
    flat, low = z.view(-1), 0.9 * guess
    index = nonzero_above(z, low)
    while len(index) < budget and low > 0:
        low = 0.5 * low if low > 1e-3 * guess else 0.0
        index = nonzero_above(z, low)
    values = flat[index]
    if len(index) <= budget:
        return Kept(index, values), float(values.min()) if len(index) else 0.0
    cut = float(np.partition(values.numpy(), len(values) - budget)[len(values) - budget])
    keep = values > cut
    keep[(values == cut).nonzero().squeeze(1)[: budget - int(keep.sum())]] = True
    return Kept(index[keep], values[keep]), cut


def _batch_cut(sae: BatchTopKSAE) -> Callable[[Tensor], Kept]:
    def select(z: Tensor) -> Kept:
        kept, sae.hint = keep_largest(z, reference.budget_of(sae.k, len(z)), sae.hint)
        return kept

    return select


_SELECT: dict[type[SAE], Callable[[Any], Callable[[Tensor], Kept]]] = {
    VanillaSAE: lambda sae: keep_positive,
    TopKSAE: lambda sae: lambda z: keep_row(z, sae.k),
    BatchTopKSAE: _batch_cut,
}


class _Autoencode(torch.autograd.Function):
    """x_hat and the kept values, from x and the weights; `select` turns z into the kept entries."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        select: Callable[[Tensor], Kept],
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_sae = W_dec.shape[0]
        x = x - b_dec
        z = torch.addmm(b_enc, x, W_enc).relu_()
        index, values = select(z)
        row, latent = index // d_sae, index % d_sae
        start = torch.searchsorted(row, torch.arange(len(x)))
        x_hat = F.embedding_bag(latent, W_dec, start, mode="sum", per_sample_weights=values) + b_dec
        ctx.save_for_backward(x, W_enc, W_dec, row, latent, start, values)
        ctx.mark_non_differentiable(index)
        return x_hat, values, index

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g_hat, g_values, _ = grads
        x, W_enc, W_dec, row, latent, start, values = ctx.saved_tensors
        g = _value_gradients(g_hat, W_dec, latent, start, row, 0)
        if g_values is not None:
            g = g + g_values
        # pairs in the order of their latents, so that each weight's gradient is one bag
        order = torch.from_numpy(np.argsort(latent.numpy(), kind="stable"))
        count = torch.bincount(latent, minlength=len(W_dec))
        first, by_latent = count.cumsum(0) - count, row[order]
        g_dec = F.embedding_bag(by_latent, g_hat, first, mode="sum", per_sample_weights=values[order])
        g_enc = F.embedding_bag(by_latent, x, first, mode="sum", per_sample_weights=g[order])
        g_b_enc = torch.zeros(len(W_dec)).index_add_(0, latent, g)
        g_b_dec = g_hat.sum(dim=0) - W_enc @ g_b_enc
        return None, g_enc.T, g_b_enc, g_dec, g_b_dec, None


def suits(sae: SAE) -> bool:
    """Whether there is a fast path for this SAE where it is."""
    return type(sae) in _SELECT and sae.W_enc.device.type == "cpu" and sae.W_enc.dtype == torch.float32


def loss(sae: SAE, x: Float[Tensor, "*batch d_in"]) -> Loss:
    """What `sae.loss(x)` gives in train mode, by the fast path; `backward` on its total leaves the same gradients."""
    if isinstance(sae, VanillaSAE) and not 0 < sae.hint < sae.d_sae / MOST_KEPT:
        result = sae.loss(x)
        sae.hint = float(result.l0)
        return result
    rows, _ = sae._rows(x)
    x_n, _, scale = sae._normalized(rows)
    x_hat, values, index = _Autoencode.apply(x_n, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, _SELECT[type(sae)](sae))
    error = x_n - x_hat
    mse = error.square().sum(dim=-1).mean()
    penalty = sae.l1 * values.sum() / len(rows) if isinstance(sae, VanillaSAE) else mse.new_zeros(())
    fired = torch.zeros(sae.d_sae, dtype=torch.bool).index_fill_(0, index % sae.d_sae, True)
    sae.count_fired(fired, len(rows))
    aux = sae.aux(x_n, error.detach())
    l0 = torch.tensor(len(index) / len(rows))
    if isinstance(sae, VanillaSAE):
        sae.hint = float(l0)
    return Loss(mse + penalty + aux, mse, sae.fvu(rows, error.detach() * scale), l0, penalty, aux)
