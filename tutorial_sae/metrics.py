"""What an SAE keeps and what it loses, on text it was not trained on.

    FVU             sum |x - x_hat|^2 / sum |x - mean|^2       raw units, one ratio for the whole held-out set
    L0              non-zero latents per token; also its spread, because BatchTopK spends unevenly
    CE increase     cross-entropy with x_hat spliced into the model, less without; nats per token
    KL              KL(clean || spliced) of next-token distributions, nats per token; on request, for it costs as
                    much again as the CE increase
    shrinkage       gamma of arXiv 2404.16014, on centred vectors: below 1, reconstructions are too short
    loss recovered  (CE_ablated - CE_sae) / (CE_ablated - CE_clean), with zero or with mean ablation

One mask serves everywhere: tokens that the SAE was not trained on (special, or of outlying norm) are not
reconstructed but left as they are. Loss recovered flatters: zero ablation is so harmful that almost anything recovers
most of it, so it never stands without the CE increase.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tutorial_sae.activations import ActivationStore
from tutorial_sae.measures import kl
from tutorial_sae.models import activations_at, check_hook, describe, token_logits, token_losses
from tutorial_sae.runtime import generator, progress
from tutorial_sae.saes import SAE
from tutorial_sae.text import Text

EVAL_BATCH = 4096  # tokens; also the batch of cut="batch"
CE_ROWS = 8


class EvalResult(NamedTuple):
    cut: str
    l0: float
    l0_p1: float
    l0_p50: float
    l0_p99: float
    fvu: float
    ce_clean: float  # nats per token
    ce_increase: float  # nats per token
    loss_recovered_zero: float
    loss_recovered_mean: float
    kl: float | None  # nats per token; None where it was not asked for
    shrinkage: float
    dead: float  # fraction of latents silent on all tokens_fvu tokens
    tokens_fvu: int
    tokens_ce: int
    density: Float[Tensor, " d_sae"]  # fraction of tokens on which each latent fires
    l0_per_token: Tensor  # (tokens_fvu,), in the order of the held-out store

    def numbers(self) -> dict[str, Any]:
        """The scalars, for a results file."""
        return {name: value for name, value in self._asdict().items() if not isinstance(value, Tensor)}


class PCA:
    """The linear baseline: the best `rank` directions for all tokens alike. Encodes and decodes as an SAE does."""

    variant, cut, cuts, training = "pca", "own", ("own",), False

    def __init__(self, x: Float[Tensor, "tokens d_in"], rank: int):
        if not 1 <= rank <= min(x.shape):
            raise ValueError(f"rank={rank}: {tuple(x.shape)} activations have 1 to {min(x.shape)} directions")
        self.mean = x.mean(dim=0)
        covariance = (x - self.mean).T.double() @ (x - self.mean).double()
        self.directions = torch.linalg.eigh(covariance).eigenvectors[:, -rank:].float()
        self.d_in, self.d_sae = x.shape[1], rank
        self.metadata: dict[str, Any] = {}

    def encode(self, x: Float[Tensor, "*batch d_in"], cut: str | None = None) -> Float[Tensor, "*batch rank"]:
        return (x - self.mean) @ self.directions

    def decode(self, latents: Float[Tensor, "*batch rank"], like: Tensor | None = None) -> Float[Tensor, "*batch d_in"]:
        return latents @ self.directions.T + self.mean


class Heldout:
    """Held-out activations and the losses without any SAE, made once for all the SAEs that are compared on them.

    `clean`, `zero`, `mean_ablated`: cross-entropy of the model as it is, with its activations at the hook deleted, and
    with them replaced by their mean; nats per token.
    """

    def __init__(
        self,
        model: Any,
        text: Text,
        hook: str | None = None,
        *,
        tokens: int,
        ce_tokens: int,
        context: int = 128,
        norm_limit: float | None = None,
    ):
        self.model, self.card = model, describe(model)
        self.hook = hook or self.card.hook
        self.store = ActivationStore(model, text, self.hook, tokens=tokens, context=context, norm_limit=norm_limit)
        self.mean, self.variance = _mean_and_variance(self.store)
        blocks = text.rows(model, context, rows_at_once=max(1, ce_tokens // context), shuffle=True)
        self.tokens = next(blocks).tokens.long()
        special = torch.tensor(self.card.special)
        self.counted = ~torch.isin(self.tokens[:, 1:], special)  # targets that CE averages over
        self.ordinary = ~torch.isin(self.tokens, special)

    # what splicing needs is made when first asked for: reconstruction alone is much quicker

    @cached_property
    def activations(self) -> Float[Tensor, "rows pos d_in"]:
        return torch.cat([activations_at(self.model, part, self.hook).cpu() for part in self.tokens.split(CE_ROWS)])

    @cached_property
    def mask(self) -> Bool[Tensor, "rows pos"]:
        """Where a reconstruction is put in place of an activation."""
        return self.ordinary & (self.activations.float().norm(dim=-1) <= self.store.norm_limit)

    @cached_property
    def clean(self) -> float:
        return self.ce(self.activations)

    @cached_property
    def zero(self) -> float:
        return self.ce(self.spliced(torch.zeros_like))

    @cached_property
    def mean_ablated(self) -> float:
        return self.ce(self.spliced(lambda x: self.mean.expand_as(x)))

    def spliced(self, change: Any) -> Float[Tensor, "rows pos d_in"]:
        """The activations with those of unmasked tokens replaced: `change` maps (tokens, d_in) to the same."""
        spliced = self.activations.clone()
        for rows, kept in zip(spliced.split(CE_ROWS), self.mask.split(CE_ROWS), strict=True):
            rows[kept] = change(rows[kept].float()).to(rows.dtype)
        return spliced

    def kl(self, activations: Float[Tensor, "rows pos d_in"]) -> float:
        """Mean KL divergence of next-token distributions from the model's own, with `activations` at the hook."""
        total = torch.zeros((), dtype=torch.float64)
        sources = (self.tokens, self.activations, activations, self.counted)
        parts = zip(*(source.split(CE_ROWS) for source in sources), strict=True)
        for tokens, clean, changed, counted in parts:
            logits = (token_logits(self.model, tokens, self.hook, part).cpu() for part in (clean, changed))
            total += kl(*logits)[counted].double().sum()
        return float(total / self.counted.sum())

    def ce(self, activations: Float[Tensor, "rows pos d_in"]) -> float:
        """Mean cross-entropy, nats per token, with `activations` at the hook point."""
        total = torch.zeros((), dtype=torch.float64)
        parts = zip(self.tokens.split(CE_ROWS), activations.split(CE_ROWS), self.counted.split(CE_ROWS), strict=True)
        with progress(len(self.tokens), "measuring cross-entropy", unit="row") as bar:
            for tokens, part, counted in parts:
                losses = token_losses(self.model, tokens, self.hook, part).cpu()
                total += losses[counted].double().sum()
                bar.update(len(tokens))
        return float(total / self.counted.sum())


@torch.no_grad()
def evaluate(
    sae: SAE | PCA,
    model: Any,
    text: Text | Heldout,
    *,
    cut: str | None = None,
    tokens: int = 60_000,
    ce_tokens: int = 12_000,
    context: int = 128,
    kl: bool = False,
) -> EvalResult:
    """Measure `sae` on held-out `text`: FVU, L0, density and dead latents on `tokens` activations, CE on `ce_tokens`.

    `cut` names another cut than the SAE's own in eval mode. A `Heldout` in place of the text is used as it is, so that
    several SAEs share one harvest. `kl=True` measures the KL divergence too. The SAE's mode is kept.

    Raises `ValueError` for an SAE of another model, hook point or weight processing, `RuntimeError` for a BatchTopK SAE
    without a threshold.
    """
    check_belongs(sae, model, text.hook if isinstance(text, Heldout) else None)
    was_training = sae.training
    if isinstance(sae, SAE):
        sae.eval()
    try:
        if isinstance(sae, SAE):
            sae.encode(torch.zeros(1, sae.d_in, device=sae.W_enc.device), cut)  # not calibrated? say so before the work
        if not isinstance(text, Heldout):
            hook, limit = sae.metadata.get("hook"), (sae.metadata.get("mask") or {}).get("norm_limit")
            sizes = {"tokens": tokens, "ce_tokens": ce_tokens, "context": context}
            text = Heldout(model, text, hook, norm_limit=limit, **sizes)
        return _evaluate(sae, text, cut, kl)
    finally:
        if isinstance(sae, SAE):
            sae.train(was_training)


def _evaluate(sae: SAE | PCA, heldout: Heldout, cut: str | None, with_kl: bool) -> EvalResult:
    found = reconstruction(sae, heldout, cut)

    def reconstruct(x: Tensor) -> Tensor:
        x = x.to(_device(sae))
        return sae.decode(sae.encode(x, cut), like=x).cpu()

    spliced = heldout.spliced(reconstruct)
    ce = heldout.ce(spliced)
    p1, p50, p99 = torch.quantile(found.l0_per_token.float(), torch.tensor([0.01, 0.5, 0.99])).tolist()
    return EvalResult(
        cut=cut or sae.cut,
        l0=float(found.l0_per_token.double().mean()),
        l0_p1=p1,
        l0_p50=p50,
        l0_p99=p99,
        fvu=found.fvu,
        ce_clean=heldout.clean,
        ce_increase=ce - heldout.clean,
        loss_recovered_zero=(heldout.zero - ce) / (heldout.zero - heldout.clean),
        loss_recovered_mean=(heldout.mean_ablated - ce) / (heldout.mean_ablated - heldout.clean),
        kl=heldout.kl(spliced) if with_kl else None,
        shrinkage=found.shrinkage,
        dead=float((found.density == 0).double().mean()),
        tokens_fvu=len(heldout.store),
        tokens_ce=int(heldout.counted.sum()),
        density=found.density,
        l0_per_token=found.l0_per_token,
    )


class Reconstruction(NamedTuple):
    """The part of an evaluation that needs no language model."""

    fvu: float
    shrinkage: float
    density: Float[Tensor, " d_sae"]
    l0_per_token: Tensor


@torch.no_grad()
def reconstruction(sae: SAE | PCA, heldout: Heldout, cut: str | None = None) -> Reconstruction:
    """How well, and with how many latents, `sae` reconstructs the held-out activations."""
    store, device = heldout.store, _device(sae)
    mean = heldout.mean.to(device)
    fired = torch.zeros(sae.d_sae, dtype=torch.long)
    l0 = torch.zeros(len(store), dtype=torch.long)
    squared_error, length, along = torch.zeros(3, dtype=torch.float64)
    # shuffled, so that a batch cut meets the mixture of text that it met in training
    for chosen in torch.randperm(len(store), generator=generator(0, "evaluate")).split(EVAL_BATCH):
        x = store[chosen].to(device)
        latents = sae.encode(x, cut)
        c, c_hat = (x - mean).double(), (sae.decode(latents, like=x) - mean).double()
        squared_error += (c - c_hat).square().sum().cpu()
        length += c_hat.square().sum().cpu()
        along += (c_hat * c).sum().cpu()
        on = (latents != 0).cpu()
        fired += on.sum(dim=0)
        l0[chosen] = on.sum(dim=1)
    density = (fired / len(store)).float()
    return Reconstruction(float(squared_error / heldout.variance), float(length / along), density, l0)


def _device(sae: SAE | PCA) -> torch.device:
    return sae.W_enc.device if isinstance(sae, SAE) else torch.device("cpu")


def _mean_and_variance(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """The mean, and the sum of squared distances to it: float64, because the mean is long."""
    total = torch.zeros(store.d_in, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(len(store)).split(EVAL_BATCH):
        x = store[part].double()
        total += x.sum(dim=0)
        squares += x.square().sum()
    mean = total / len(store)
    return mean.float(), squares - len(store) * mean.square().sum()


def check_belongs(sae: Any, model: Any, hook: str | None = None) -> None:
    """Refuse an SAE with a model, hook point or weight processing other than those it was trained with."""
    card = describe(model)
    used = {"fingerprint": card.fingerprint, "weight_processing": card.weight_processing}
    if hook is not None:
        check_hook(model, hook)
        used["hook"] = hook
    if sae.d_in != model.cfg.d_model:
        raise ValueError(
            f"this SAE reads d_in={sae.d_in}, and {card.name} has d_model={model.cfg.d_model}: load its own"
        )
    for name, here in used.items():
        trained = sae.metadata.get(name)
        if trained is not None and trained != here:
            raise ValueError(
                f"this SAE was trained with {name.replace('_', ' ')} {trained!r} (model {sae.metadata.get('model')}), "
                f"and here it is {here!r} (model {card.name}): use it with what it was trained with"
            )
