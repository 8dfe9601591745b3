"""What all sparse autoencoders here share: one matrix of pre-activations, a cut, a decoder.

    z      = relu((x - b_dec) @ W_enc + b_enc)      pre-activations, (tokens, latents)
    latent = z where the cut keeps it, else 0       the variants differ here, and in what they add to the loss
    x_hat  = latent @ W_dec + b_dec

All of it in normalised units: an SAE takes raw activations, normalises them itself and gives raw ones back. The cuts
are `own` (each entry on its own merit), `row` (the k largest of a token), `batch` (the n*k largest of n tokens) and
`threshold` (above one number). Bussmann, Leask and Nanda 2024, arXiv 2412.06410, sections 2 and 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from einops import pack, unpack
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tutorial_sae import ranks
from tutorial_sae.runtime import generator, save_tensors, unknown, write_json

NORMALIZATIONS = ("dataset", "token", "none")

EXACT = ("norm_mean", "norm_scale", "threshold")  # float32 whatever the precision of the matrices

# What a saved SAE says of its origin; null where unknown.
ORIGIN = ("model", "fingerprint", "weight_processing", "hook", "mask", "data", "tokens", "seed", "versions")


class Loss(NamedTuple):
    """`total` = `mse` + `penalty` + `aux`; all are means over tokens."""

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]  # squared error summed over d_in, normalised units
    fvu: Float[Tensor, ""]  # fraction of variance unexplained, raw units, centred, a ratio of sums
    l0: Float[Tensor, ""]  # latents kept per token
    penalty: Float[Tensor, ""]  # what sparsity costs, coefficient included
    aux: Float[Tensor, ""]  # the auxiliary loss as added


def keep_row(z: Float[Tensor, "tokens latents"], k: int) -> Float[Tensor, "tokens latents"]:
    """The k largest positive entries of each row, unchanged; the rest 0. Ties go to the lower index."""
    cut = z.topk(min(k, z.shape[-1]), dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return _above(z, cut, k - (z > cut).sum(dim=-1, keepdim=True))


def keep_batch(z: Float[Tensor, "tokens latents"], k: int | float) -> Float[Tensor, "tokens latents"]:
    """The floor(k * tokens) largest positive entries of the whole matrix: the row cut of one very long row.

    In a step that several ranks take together it is the matrix of all of them.
    """
    if len(z) == 0:
        return z
    row = z.reshape(1, -1)
    if ranks.world() == 1:
        return keep_row(row, budget_of(k, len(z))).view_as(z)
    return _above(row, *ranks.batch_cut(row[0], budget_of(k, ranks.world() * len(z)))).view_as(z)


def _above(z: Float[Tensor, "rows entries"], cut: Tensor, room: Tensor) -> Float[Tensor, "rows entries"]:
    """The entries above `cut`, and of those that equal it the first `room` of each row."""
    tied = (z == cut) & (z > 0)
    # on a GPU the question would make the host wait for the answer, which takes longer than counting
    if z.is_cuda or (tied.sum(dim=-1, keepdim=True) > room).any():
        tied &= tied.cumsum(dim=-1, dtype=torch.int32) <= room
    return torch.where((z > cut) | tied, z, 0)


def budget_of(k: int | float, tokens: int) -> int:
    """floor(k * tokens), and an error if that is 0."""
    budget = int(k * tokens + 1e-6)  # 2.3 * 100 is 229.99999999999997 in floats, and 230 is meant
    if budget == 0:
        raise ValueError(f"k={k} for {tokens} tokens is a budget of 0 entries: choose k of at least {1 / tokens:g}")
    return budget


def keep_above(
    z: Float[Tensor, "tokens latents"], theta: float | Float[Tensor, "*latents"]
) -> Float[Tensor, "tokens latents"]:
    """The entries strictly above theta, one number for all latents or one for each."""
    if isinstance(theta, Tensor) and theta.dim() == 0:
        theta = theta.expand(1)  # else PyTorch compares in the precision of z, in which theta may be another number
    return torch.where(z > theta, z, 0)


def check_activations(x: Any, d_in: int) -> None:
    """Refuse what is not a tensor (tokens, d_in), where leading dimensions would be counted as something else."""
    if not isinstance(x, Tensor):
        raise TypeError(f"activations must be a torch tensor, and this is a {type(x).__name__}: torch.as_tensor(x)")
    if x.dim() != 2 or x.shape[1] != d_in:
        raise ValueError(
            f"activations have shape {tuple(x.shape)}: give (tokens, {d_in}), as x.reshape(-1, {d_in}) makes of "
            "activations of this width"
        )


def check_theta(theta: Float[Tensor, "*latents"]) -> None:
    """Refuse a threshold that is not positive and finite, by the first latent that has one."""
    bad = ~((theta > 0) & (theta < float("inf")))
    if bad.any():
        latent = int(bad.reshape(-1).nonzero()[0])
        raise ValueError(
            f"the threshold of latent {latent} is {theta.reshape(-1)[latent]:g}, and must be positive and finite: "
            "train with a lower rate, or keep thresholds in float32 (in low precision a small one rounds to zero)"
        )


class SAE(nn.Module):
    """The base of all variants. A variant names its cuts and says what it keeps and what it adds to the loss.

    - `d_in`, `d_sae`: width of the activations, number of latents.
    - `normalize`: `dataset` subtracts a mean and divides by one scalar, so that E|x|^2 = d_in (`fit_normalization` sets
      both); `token` standardises each token, as the reference code of BatchTopK does; `none`.
    - `seed`: draws the decoder's directions; the encoder starts as the decoder's transpose, the biases at 0.

    Like BatchNorm, an SAE in train mode updates statistics: `loss` counts the tokens since each latent last fired.
    """

    variant: ClassVar[str]
    cuts: ClassVar[tuple[str, ...]]  # the first is the default
    settings: ClassVar[tuple[str, ...]] = ()  # constructor arguments that a saved SAE needs, besides the sizes

    b_enc: nn.Parameter
    norm_mean: Tensor
    norm_scale: Tensor
    tokens_since_fired: Tensor

    def __init__(self, d_in: int, d_sae: int, *, normalize: str = "dataset", seed: int = 0):
        super().__init__()
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in={d_in} and d_sae={d_sae}: both must be at least 1")
        if normalize not in NORMALIZATIONS:
            raise unknown("normalize", str(normalize), NORMALIZATIONS)
        self.d_in, self.d_sae, self.normalize, self.seed = int(d_in), int(d_sae), normalize, seed
        directions = torch.randn(d_sae, d_in, generator=generator(seed, "decoder"))
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        # (d_in, d_sae), but in memory a row for each latent: its gradient arises as one (see sparse.py)
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("norm_mean", torch.zeros(d_in))
        self.register_buffer("norm_scale", torch.tensor(1.0))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.long))
        self.dead_after_tokens = 10_000_000  # silent for so long, a latent counts as dead
        # what the fast path keeps from step to step, for speed: a guess of the cut, and memory for z
        self.hint, self.scratch = 0.0, torch.empty(0, 0)
        # tokens for which no latent can be dead; None: look each time. While `train` runs it is kept, for on a GPU
        # looking is waiting
        self.alive_until: int | None = None
        self.metadata: dict[str, Any] = dict.fromkeys(ORIGIN)

    # -- what a variant supplies -----------------------------------------------------------------

    @property
    def cut(self) -> str:
        """The cut in force when none is named."""
        return self.cuts[0]

    def keep(self, z: Float[Tensor, "tokens d_sae"], cut: str) -> Float[Tensor, "tokens d_sae"]:
        """The latents, from what `_pre` gives: in most variants `z` with only the entries that `cut` keeps."""
        raise NotImplementedError

    def penalty(self, z: Float[Tensor, "tokens d_sae"], latents: Float[Tensor, "tokens d_sae"]) -> Float[Tensor, ""]:
        """What sparsity adds to the loss, coefficient included."""
        return z.new_zeros(())

    def aux(
        self, x_n: Float[Tensor, "tokens d_in"], z: Float[Tensor, "tokens d_sae"], error: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, ""]:
        """An auxiliary loss of normalised activations `x_n`, of which `error` (detached) is not yet explained."""
        return error.new_zeros(())

    # -- encode, decode --------------------------------------------------------------------------

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """z, from raw activations."""
        rows, shape = self._rows(x)
        return unpack(self._pre(self._normalized(rows)[0]), shape, "* d")[0]

    def encode(self, x: Float[Tensor, "*batch d_in"], cut: str | None = None) -> Float[Tensor, "*batch d_sae"]:
        """The latents of raw activations. All leading dimensions together are the batch."""
        rows, shape = self._rows(x)
        return unpack(self._kept(self._pre(self._normalized(rows)[0]), cut), shape, "* d")[0]

    def decode(
        self, latents: Float[Tensor, "*batch d_sae"], like: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Raw activations from latents. With `normalize="token"`, `like` gives the tokens whose scale to restore."""
        if self.normalize == "token" and like is None:
            raise ValueError('normalize="token" keeps no scale of its own: call decode(latents, like=x), or sae(x)')
        _, mean, scale = self._normalized(self.norm_mean if like is None else like)
        return (latents @ self.W_dec + self.b_dec).float() * scale + mean

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstructed raw activations."""
        return self.decode(self.encode(x), like=x).to(x.dtype)

    def loss(self, x: Float[Tensor, "*batch d_in"], cut: str | None = None) -> Loss:
        """The loss of a batch of raw activations; in train mode also counts who fired, and adds AuxK for the dead."""
        rows, _ = self._rows(x)
        x_n, _, scale = self._normalized(rows)
        z = self._pre(x_n)
        latents = self._kept(z, cut)
        error = x_n.float() - (latents @ self.W_dec + self.b_dec).float()
        mse = error.square().sum(dim=-1).mean()
        fired = latents.detach() > 0
        if self.training:
            self.count_fired(fired.any(dim=0), len(rows))
        penalty, aux = self.penalty(z, latents), self.aux(x_n, z, error.detach())
        l0 = fired.sum(dim=-1).float().mean()
        return Loss(mse + penalty + aux, mse, self.fvu(rows, error.detach() * scale), l0, penalty, aux)

    @staticmethod
    def fvu(x: Float[Tensor, "tokens d_in"], error: Float[Tensor, "tokens d_in"]) -> Float[Tensor, ""]:
        """Fraction of the variance of raw activations that `error`, in raw units, leaves unexplained."""
        around = x - ranks.mean(x.mean(dim=0))
        unexplained, variance = ranks.total(torch.stack([error.square().sum(), around.float().square().sum()]))
        return unexplained / variance

    def count_fired(self, fired: Bool[Tensor, " d_sae"], tokens: int) -> None:
        """Keep count of the tokens since each latent last fired, on any rank."""
        self.tokens_since_fired += tokens * ranks.world()
        self.tokens_since_fired.masked_fill_(ranks.any_of(fired), 0)

    def _rows(self, x: Any) -> tuple[Tensor, Any]:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch tensor, and is a {type(x).__name__}: torch.as_tensor(x) makes one")
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x has shape {tuple(x.shape)}, and its last dimension must be d_in={self.d_in}")
        return pack([x], "* d")

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x in normalised units and the precision of the weights, mean, scale); x = normalised * scale + mean."""
        x = x.float()
        mean, scale = self.norm_mean, self.norm_scale
        if self.normalize == "token":
            mean, scale = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True) + 1e-5
        return ((x - mean) / scale).to(self.W_enc.dtype), mean, scale

    def _linear(self, x_n: Float[Tensor, "tokens d_in"], bias: Tensor | float = 0.0) -> Float[Tensor, "tokens d_sae"]:
        # (x - b_dec) @ W_enc, multiplied out: x itself needs no gradient then, which saves a large product per step
        return x_n @ self.W_enc + (bias - self.b_dec @ self.W_enc)

    def _pre(self, x_n: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_sae"]:
        """The matrix that `keep` cuts."""
        return self._linear(x_n, self.b_enc).relu()

    def _kept(self, z: Float[Tensor, "tokens d_sae"], cut: str | None) -> Float[Tensor, "tokens d_sae"]:
        if cut is not None and cut not in self.cuts:
            raise ValueError(f"cut={cut!r} does not suit a {self.variant} SAE: choose from {', '.join(self.cuts)}")
        return self.keep(z, cut or self.cut)

    # -- training --------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_normalization(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Set the mean and the scale of `normalize="dataset"` from raw activations, so that E|x|^2 = d_in."""
        rows = self._rows(x)[0].float().to(self.norm_mean.device)
        if self.normalize == "dataset":
            self.norm_mean.copy_(rows.mean(dim=0))
            scale = ((rows - self.norm_mean).square().sum(dim=-1).mean() / self.d_in).sqrt()
            if not torch.isfinite(scale) or scale == 0:
                raise ValueError(
                    f"{len(rows)} activations have scale {scale:g}: they must be finite, and not all the same"
                )
            self.norm_scale.copy_(scale)

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from the decoder's gradient what would only lengthen its rows (Towards Monosemanticity, 2023)."""
        if self.W_dec.grad is not None:
            # a product of rows, without a matrix between: fresh memory for one takes longer than the arithmetic
            along = torch.bmm(self.W_dec.grad.unsqueeze(1), self.W_dec.unsqueeze(2)).squeeze(2)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make the decoder's rows unit vectors; after the optimiser's step, so that what is saved has norm 1."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def constrain(self) -> None:
        """Bring the parameters back to where they are allowed to be: called after each step of the optimiser."""
        self.normalize_decoder()

    @torch.no_grad()
    def restart(self, latents: Int[Tensor, " n"], directions: Float[Tensor, "n d_in"], norm: float) -> None:
        """Give `latents` new unit `directions`: the decoder's rows, and at length `norm` the encoder's columns."""
        self.W_dec[latents] = directions
        self.W_enc.T[latents] = norm * directions
        self.b_enc[latents] = 0.0
        self.tokens_since_fired[latents] = 0

    def _apply(self, fn: Any, recurse: bool = True) -> SAE:
        """`.to(bfloat16)` is for the matrices: the normalisation and thresholds stay in float32."""
        exact = {name: getattr(self, name).detach() for name in EXACT if hasattr(self, name)}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            getattr(self, name).data = tensor.to(getattr(self, name).device)
        return self

    # -- files -----------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        sizes = {"variant": self.variant, "d_in": self.d_in, "d_sae": self.d_sae, "normalize": self.normalize}
        return sizes | {name: getattr(self, name) for name in self.settings} | self.metadata

    def save(self, path: str | Path) -> None:
        """Write `sae.safetensors` and `config.json` into the folder `path`."""
        folder = Path(path)
        save_tensors(folder / "sae.safetensors", self.state_dict())
        write_json(folder / "config.json", self.config)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config.items() if name not in ORIGIN)
