"""The fast path: the mathematics of `saes/` on the entries that survive a cut, a few in a thousand.

Of the six products of a dense step (encode, decode, two weight gradients, the gradients of the latents and of the
input) only the first needs all entries of z. The others are sums over the kept (token, latent) pairs, which
`embedding_bag` computes without ever forming a matrix of latents. The encoder's weights lie transposed in memory, so
that each latent's weights, and their gradient, are one contiguous row.

`saes/` is the reference; tests hold the two together, selection and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tutorial_sae import ranks
from tutorial_sae.runtime import fast_bf16
from tutorial_sae.saes import SAE, VARIANTS, BatchTopKSAE, GatedSAE, JumpReLUSAE, Loss, TopKSAE, VanillaSAE
from tutorial_sae.saes import base as reference
from tutorial_sae.saes.jumprelu import JumpReLU, Step

MOST_KEPT = 16  # an SAE cut by `own` starts dense: while it keeps more than 1 entry in 16, dense products are faster

_value_gradients = torch.ops.aten._embedding_bag_per_sample_weights_backward


class Kept(NamedTuple):
    """The entries of z that a cut keeps, in row-major order."""

    index: Int[Tensor, " pairs"]  # flat: token * d_sae + latent
    values: Float[Tensor, " pairs"]


def nonzero_above(z: Float[Tensor, "*shape"], low: Any) -> Int[Tensor, " pairs"]:
    """Flat indices of the entries above `low`; NumPy's search is several times faster than PyTorch's on a CPU."""
    return torch.from_numpy(np.flatnonzero(z.detach().numpy() > low))


def keep_positive(z: Float[Tensor, "tokens latents"]) -> Kept:
    index = nonzero_above(z, 0.0)
    return Kept(index, z.view(-1)[index])


def keep_row(z: Float[Tensor, "tokens latents"], k: int) -> Kept:
    """The k largest positive entries of each row; ties go to the lower index."""
    largest, latents = z.topk(min(k + 1, z.shape[1]), dim=-1)
    last, next_one = largest[:, k - 1], largest[:, -1]
    if k < z.shape[1] and ((last == next_one) & (last > 0)).any():  # a tie: which of them topk took is left to chance
        return keep_positive(reference.keep_row(z.relu(), k))
    index = (latents[:, :k].sort(dim=-1).values + z.shape[1] * torch.arange(len(z))[:, None]).view(-1)
    index = index[z.view(-1)[index] > 0]
    return Kept(index, z.view(-1)[index])


def keep_largest(z: Float[Tensor, "tokens latents"], budget: int, guess: float) -> tuple[Kept, float]:
    """The `budget` largest positive entries, ties to the lower index, and the cut to guess from next time.

    Entries above `guess` less some slack are candidates. If they are enough, the exact cut is found among them alone.
    """
    flat, low = z.view(-1), 0.9 * guess
    index = nonzero_above(z, low)
    while int(ranks.total(torch.tensor(len(index)))) < budget and low > 0:
        low = 0.5 * low if low > 1e-3 * guess else 0.0
        index = nonzero_above(z, low)
    return _largest(index, flat[index], budget)


def _largest(index: Int[Tensor, " n"], values: Float[Tensor, " n"], budget: int) -> tuple[Kept, float]:
    """The `budget` largest of these entries, which are in row-major order, and the smallest of them."""
    if ranks.world() > 1:
        cut, room = ranks.batch_cut(values, budget)
        keep = values > cut
        keep[((values == cut) & (values > 0)).nonzero().squeeze(1)[: int(room)]] = True
        return Kept(index[keep], values[keep]), float(cut)
    if len(index) <= budget:
        return Kept(index, values), float(values.min()) if len(index) else 0.0
    cut = float(np.partition(values.numpy(), len(values) - budget)[len(values) - budget])
    keep = values > cut
    keep[(values == cut).nonzero().squeeze(1)[: budget - int(keep.sum())]] = True
    return Kept(index[keep], values[keep]), cut


def keep_largest_rough(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
    budget: int,
    guess: float,
) -> tuple[Kept, float] | None:
    """`keep_largest` of x @ W_enc + bias without computing all of it in float32, where bfloat16 is much faster.

    The product in bfloat16 finds candidates, whose values are then computed in float32. None if the guess was no good:
    the candidates are too few, or end so close to the cut that rounding may have hidden one.
    """
    rough, low = torch.addmm(bias.bfloat16(), x.bfloat16(), W_enc.bfloat16()), torch.tensor(0.9 * guess).bfloat16()
    bits, low_bits = rough.view(torch.int16).numpy(), low.view(torch.int16).item()  # positive floats sort as their bits
    index = torch.from_numpy(np.flatnonzero(bits > low_bits))
    if len(index) < budget:
        return None
    pairs = Pairs(index, len(x), len(bias))
    values = _value_gradients(x, W_enc.T, pairs.latent, pairs.start, pairs.row, 0) + pairs.at(bias)
    error = (values - rough.view(-1)[index]).abs().max()
    kept, cut = _largest(index, values, budget)
    return (kept, cut) if cut > low + 2 * error else None


@cache
def bf16_is_fast() -> bool:
    return fast_bf16(torch.device("cpu"))


class Pairs:
    """The (token, latent) pairs that are kept: `row`, `latent`, and where in them each token starts."""

    def __init__(self, index: Int[Tensor, " pairs"], tokens: int, d_sae: int):
        self.row, self.latent = index // d_sae, index % d_sae
        self.start = torch.searchsorted(self.row, torch.arange(tokens))
        self.tokens, self.d_sae = tokens, d_sae

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " d_sae"]]:
        """The pairs in the order of their latents, and where in it each latent starts: a weight's gradient is a bag."""
        count = torch.bincount(self.latent, minlength=self.d_sae)
        return self.latent.argsort(stable=True), count.cumsum(0) - count

    def outer(
        self, values: Float[Tensor, " pairs"], vectors: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """For each latent the sum over its pairs of value times the token's vector."""
        order, start = self.by_latent
        return F.embedding_bag(self.row[order], vectors, start, mode="sum", per_sample_weights=values[order])

    def dots(
        self, tokens: Float[Tensor, "tokens d_in"], latents: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, " pairs"]:
        """For each pair the product of its token's row and its latent's: by latent, because the larger matrix is then
        read once and in order."""
        order, start = self.by_latent
        found = _value_gradients(latents, tokens, self.row[order], start, self.latent[order], 0)
        return torch.empty_like(found).index_copy_(0, order, found)

    def at(self, parameter: Float[Tensor, " d_sae"]) -> Float[Tensor, " pairs"]:
        return parameter.index_select(0, self.latent)


class _Encode(torch.autograd.Function):
    """The entries of (x - b_dec) @ W_enc + bias that `select` keeps, and where they are."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        bias: Tensor,
        b_dec: Tensor,
        select: Callable[[Tensor, Tensor, Tensor], Kept],
    ) -> tuple[Tensor, Pairs]:
        x = x - b_dec
        index, values = select(x, W_enc, bias)
        ctx.pairs = Pairs(index, len(x), len(bias))
        ctx.save_for_backward(x, W_enc)
        return values, ctx.pairs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, pairs = grads[0], ctx.pairs
        x, W_enc = ctx.saved_tensors
        g_bias = torch.zeros(pairs.d_sae).index_add_(0, pairs.latent, g)
        return None, pairs.outer(g, x).T, g_bias, -(W_enc @ g_bias), None


class _Decode(torch.autograd.Function):
    """x_hat, from the values of the kept pairs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(values, W_dec)
        return F.embedding_bag(pairs.latent, W_dec, pairs.start, mode="sum", per_sample_weights=values) + b_dec

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, pairs = grads[0], ctx.pairs
        values, W_dec = ctx.saved_tensors
        g_values = pairs.dots(g, W_dec)
        if not ctx.needs_input_grad[1]:
            return g_values, None, None, None
        return g_values, pairs.outer(values, g), g.sum(dim=0), None


# -- the variants --------------------------------------------------------------------------------


def _select(sae: SAE) -> Callable[[Tensor, Tensor, Tensor], Kept]:
    """What turns x - b_dec, W_enc and a bias into the entries that a step needs."""

    def matrix(x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
        if sae.scratch.shape != (len(x), len(bias)):
            sae.scratch = torch.empty(len(x), len(bias))
        return torch.mm(x, W_enc, out=sae.scratch).add_(bias)

    if isinstance(sae, BatchTopKSAE):

        def by_batch(x: Tensor, W_enc: Tensor, bias: Tensor) -> Kept:
            with ranks.apart(not sae.global_cut):
                budget, found = reference.budget_of(sae.k, len(x) * ranks.world()), None
                if sae.hint > 0 and bf16_is_fast() and ranks.world() == 1:
                    found = keep_largest_rough(x, W_enc, bias, budget, sae.hint)
                kept, sae.hint = found or keep_largest(matrix(x, W_enc, bias), budget, sae.hint)
                return kept

        return by_batch
    if isinstance(sae, TopKSAE):
        return lambda *encoder: keep_row(matrix(*encoder), int(sae.k))
    if isinstance(sae, JumpReLUSAE):
        reference.check_theta(sae.threshold)
        low = (sae.threshold - sae.bandwidth / 2).detach()  # entries just below theta matter for its gradient

        def by_window(*encoder: Tensor) -> Kept:
            z = matrix(*encoder)
            index = nonzero_above(z, low.numpy())
            return Kept(index, z.view(-1)[index])

        return by_window
    return lambda *encoder: keep_positive(matrix(*encoder))


def _terms(
    sae: SAE, x_n: Float[Tensor, "tokens d_in"], z: Float[Tensor, " pairs"], pairs: Pairs
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, ""], Float[Tensor, ""]]:
    """The latents at the kept pairs, the penalty, and the auxiliary loss that does not depend on the error."""
    none = z.new_zeros(())
    if isinstance(sae, VanillaSAE):
        charged = z if sae.decoder_norm == "unit" else z * pairs.at(sae.W_dec.norm(dim=1))
        return z, sae.l1 * charged.sum() / pairs.tokens, none
    if isinstance(sae, GatedSAE):  # z is the open gate
        latents = (pairs.at(sae.r_mag.exp()) * (z - pairs.at(sae.b_gate)) + pairs.at(sae.b_enc)).relu()
        frozen = _Decode.apply(z, sae.W_dec.detach(), sae.b_dec.detach(), pairs)
        return latents, sae.l1 * z.sum() / pairs.tokens, (x_n - frozen).square().sum(dim=-1).mean()
    if isinstance(sae, JumpReLUSAE):
        theta = pairs.at(sae.threshold)
        l0 = Step.apply(z, theta, sae.bandwidth).sum() / pairs.tokens
        return JumpReLU.apply(z, theta, sae.bandwidth), sae.price(l0), none
    return z, none, none


def suits(sae: SAE) -> bool:
    """Whether there is a fast path for this SAE where it is."""
    return type(sae) in VARIANTS.values() and sae.W_enc.device.type == "cpu" and sae.W_enc.dtype == torch.float32


def path(sae: SAE) -> Callable[[SAE, Tensor], Loss]:
    """The fastest loss for this SAE where it is: the sparse one on a CPU, products in bfloat16 on a GPU that has it."""
    if sae.W_enc.is_cuda and fast_bf16(sae.W_enc.device):
        return mixed
    return loss if suits(sae) else type(sae).loss


def mixed(sae: SAE, x: Float[Tensor, "*batch d_in"]) -> Loss:
    """The reference with its products in bfloat16; weights, sums, errors and the update stay in float32."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return sae.loss(x)


def loss(sae: SAE, x: Float[Tensor, "*batch d_in"]) -> Loss:
    """What `sae.loss(x)` gives in train mode, by the fast path; `backward` on its total leaves the same gradients."""
    own = not isinstance(sae, TopKSAE)
    if own and not 0 < sae.hint < sae.d_sae / MOST_KEPT:
        result = sae.loss(x)
        sae.hint = float(result.l0)
        return result
    rows, _ = sae._rows(x)
    x_n, _, scale = sae._normalized(rows)
    bias = sae.b_gate if isinstance(sae, GatedSAE) else sae.b_enc
    z, pairs = _Encode.apply(x_n, sae.W_enc, bias, sae.b_dec, _select(sae))
    latents, penalty, aux = _terms(sae, x_n, z, pairs)
    error = x_n - _Decode.apply(latents, sae.W_dec, sae.b_dec, pairs)
    mse = error.square().sum(dim=-1).mean()
    on = latents.detach() > 0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool).index_fill_(0, pairs.latent[on], True)
    sae.count_fired(fired, len(rows))
    if isinstance(sae, TopKSAE):
        aux = sae.auxk(x_n, error.detach())
    if own:
        sae.hint = len(z) / len(rows)
    l0 = on.sum() / len(rows)
    return Loss(mse + penalty + aux, mse, sae.fvu(rows, error.detach() * scale), l0, penalty, aux)
