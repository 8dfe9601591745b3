"""Definitions: pure functions of activations, reconstructions, latents and weights.

The fraction of variance unexplained has many relatives under similar names, and numbers of one are not numbers of
another. `fvu` is what this package reports; `OTHER_FVU` is there to see how far apart they lie.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tutorial_sae.saes import SAE

REFIT_TOKENS = 256  # at a time: each brings a small system of equations


def fvu(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """sum |x - x_hat|^2 / sum |x - mean|^2, in the units given: 0 is perfect, 1 no better than the mean."""
    x, x_hat = _pair(x, x_hat)
    return float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())


def _pair(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or x.shape != x_hat.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and x_hat {tuple(x_hat.shape)}: both must be (tokens, d_in)")
    return x.detach().double(), x_hat.detach().double()


def _squares(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=-1)


def _token_standardised(x: Tensor, x_hat: Tensor) -> float:
    scale = x.double().std(dim=-1, keepdim=True) + 1e-5
    return float(((x.double() - x_hat.double()) / scale).square().mean())


# Definitions in use elsewhere, for comparison only; in brackets, where one is met. Those that divide token by token are
# infinite or huge where a token is zero, as some are in `toy`.
OTHER_FVU: dict[str, Callable[[Tensor, Tensor], float]] = {
    # divides by the length of the mean too, which in a residual stream flatters
    "uncentred": lambda x, x_hat: float(_squares(x - x_hat).sum() / _squares(x).sum()),
    # [OpenAI's sparse_autoencoder, loss.py] small tokens count as much as large ones
    "token ratio": lambda x, x_hat: float((_squares(x - x_hat) / _squares(x)).mean()),
    # [SAELens, explained_variance_legacy]
    "centred token ratio": lambda x, x_hat: float((_squares(x - x_hat) / _squares(x - x.mean(dim=0))).mean()),
    # [SAELens 6.18, explained_variance] subtracts the square of the mean of x^2 where the mean squared is meant
    "squared mean": lambda x, x_hat: float(
        _squares(x - x_hat).mean() / (_squares(x).mean() - x.double().square().mean().square())
    ),
    # [dictionary_learning, frac_variance_explained] forgives a constant error
    "centred error": lambda x, x_hat: fvu(x, x_hat + (x - x_hat).mean(dim=0)),
    # [reference code of BatchTopK, "normalised MSE"] each token standardised over its dimensions first
    "token standardised": _token_standardised,
}


def shrinkage(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> float:
    """gamma = E|x_hat|^2 / E[x_hat . x] on vectors less the mean of x: below 1, reconstructions are too short.

    The relative reconstruction bias of Rajamanoharan et al. 2024, arXiv 2404.16014, section 4.2; there on vectors as
    they are, here on centred ones, because a long mean, which every SAE gets right, would hide it.
    """
    x, x_hat = _pair(x, x_hat)
    c, c_hat = x - x.mean(dim=0), x_hat - x.mean(dim=0)
    return float(c_hat.square().sum() / (c_hat * c).sum())


def kl(clean: Float[Tensor, "*shape vocab"], other: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """KL(clean || other) of next-token distributions, from logits, in nats."""
    p, q = clean.log_softmax(dim=-1), other.log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


@torch.no_grad()
def refit(sae: SAE, x: Float[Tensor, "tokens d_in"], cut: str | None = None) -> Float[Tensor, "tokens d_sae"]:
    """The codes of `x` with the same latents kept, and the values that reconstruct each token best.

    Least squares with the decoder as it is. How much the error falls tells values from choice: what remains is the
    choice of latents. Values may come out negative. (The inference-time optimisation of arXiv 2404.16014 goes further:
    gradient pursuit chooses the latents too.)
    """
    latents = sae.encode(x, cut)
    target, _, _ = sae._normalized(x)
    refitted = torch.zeros_like(latents)
    for mine in torch.arange(len(x)).split(REFIT_TOKENS):
        on = latents[mine] != 0
        support = on.byte().topk(int(on.sum(dim=1).max()), dim=1).indices  # padded with latents that are not kept
        kept = on.gather(1, support)
        rows = sae.W_dec[support].double() * kept[..., None]
        gram = rows @ rows.mT + torch.diag_embed((~kept).double())  # a padded unknown has the equation v = 0
        wanted = rows @ (target[mine] - sae.b_dec).double()[..., None]
        values = (torch.linalg.pinv(gram, hermitian=True) @ wanted).squeeze(-1)  # rows may be alike
        refitted[mine] = torch.zeros_like(latents[mine]).scatter(1, support, (values * kept).to(latents.dtype))
    return refitted


def decoder_cosine(W_dec: Float[Tensor, "d_sae d_in"]) -> float:
    """Mean |cos| over all pairs of decoder rows: c_dec of Chanin and Garriga-Alonso, Sparse but Wrong, equation 4."""
    rows = torch.nn.functional.normalize(W_dec.detach().double(), dim=1)
    total = sum(float((part @ rows.T).abs().sum()) for part in rows.split(1024))
    return (total - len(rows)) / (len(rows) * (len(rows) - 1))
