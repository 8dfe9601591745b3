"""The contenders of the benchmarks: other libraries, the paper's reference step, ours, and the floor.

sae-lens needs TransformerLens 3, so the other libraries cannot be installed beside this project. They get a virtual
environment of their own, made on first use in the cache folder, and a benchmark that wants them runs itself again in
there (`run_inside`): all contenders share one process, one PyTorch, one number of threads. For `saes/`, `sparse.py` and
the training step this project needs PyTorch, einops, jaxtyping and safetensors alone, and so it runs there too.

Each contender takes one training step as its own library takes it, on a CPU, in float32, with that library's defaults:
forward, loss, backward, whatever it does to the decoder, its Adam. Its own objects are used where they can be; what is
around them here only hands over the batch. Peculiarities:

- sae-lens: its `SAETrainer.step`. No unit decoder: it multiplies by the decoder's norms instead.
- dictionary_learning: its `BatchTopKTrainer.update`, past step 1000, where it starts to track its threshold, as most of
  a run is. The package imports nnsight for its activation buffer and pins a version that would bring a second PyTorch
  and several GB with it; the trainer uses none of it, so it is installed without, and an empty module stands in.
- sparsify has no BatchTopK, so it is TopK. Its `Trainer` is tied to a language model, so its step is written out here
  from calls of its `SparseCoder` in the trainer's order, with `optimizer="adam"` (its default is sign descent) and
  `auxk_alpha=1/32` (its default is no AuxK).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tutorial_sae.runtime import cache_dir, digest, lock
from tutorial_sae.saes import SAE, VARIANTS
from tutorial_sae.training import TrainConfig, _Run

ROOT = Path(__file__).parent.parent

# -- the environment of the peers ----------------------------------------------------------------

TORCH = f"torch=={torch.__version__.split('+')[0]}"
REQUIREMENTS = (
    (TORCH, "numpy", "einops", "jaxtyping", "safetensors", "filelock", "psutil", "tqdm"),
    (TORCH, "sae-lens==6.54.12"),
    (TORCH, "eai-sparsify==1.3.3"),
    ("--no-deps", "dictionary-learning==0.1.0"),
)
PACKAGES = ("torch", "numpy", "sae-lens", "dictionary-learning", "eai-sparsify", "transformer-lens", "transformers")


def folder() -> Path:
    return cache_dir("peers", digest([REQUIREMENTS, platform.python_version()])[:12])


def inside() -> bool:
    return Path(sys.prefix).resolve() == folder().resolve()


def build() -> Path:
    """The Python of the peers' environment, which is made if need be. What cannot be installed is tried again next
    time, and missing until then."""
    home = folder()
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = home / "complete"
    with lock(home / ".lock"):
        if not complete.exists():
            print(f"making an environment for the other libraries in {home}: some minutes, once", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            failed = [names for names in REQUIREMENTS if subprocess.run([*install, *names]).returncode]
            if failed:
                print(f"not installed: {failed}", file=sys.stderr)
            else:
                complete.touch()
    return python


def run_inside(module: str, arguments: list[str]) -> int:
    """Run `python -m module arguments` in the peers' environment; its exit status."""
    calm = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}
    environment = os.environ | calm | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([str(build()), "-m", module, *arguments], cwd=ROOT, env=environment).returncode


# -- what a contender is -------------------------------------------------------------------------

DEAD_SCALE = 0.01  # of a dead latent's encoder, next to its decoder


class Size(NamedTuple):
    d_in: int
    d_sae: int
    k: int
    batch: int
    dead: int = 0  # latents kept dead

    @property
    def name(self) -> str:
        dead = f", {self.dead / self.d_sae:.0%} dead" if self.dead else ""
        return f"{self.d_in}/{self.d_sae}, k {self.k}, batch {self.batch}{dead}"


class Contender:
    """One way to train an SAE. `encoder` and `decoder` are its weights with one row for each latent, `silent` counts
    how long each has not fired, and from `dead_after` on the library itself takes it for dead."""

    dead_after: int
    encoder_bias: Tensor | None = None

    @property
    def encoder(self) -> Tensor:
        raise NotImplementedError

    @property
    def decoder(self) -> Tensor:
        raise NotImplementedError

    @property
    def silent(self) -> Tensor:
        raise NotImplementedError

    def step(self, x: Tensor) -> None:
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor:
        """x_hat, with the cut of training."""
        raise NotImplementedError

    @torch.no_grad()
    def prepare(self, dead: int) -> None:
        """Make the first `dead` latents dead and no other, by the library's own count. To be called before each step.

        They look as dead latents do: outbid, not mute. Their encoder is their decoder's direction, but some 30 to 100
        times shorter than that of the living, so that about half of their pre-activations are positive and AuxK has all
        its work, yet none comes near the cut. A step of Adam lengthens them a little; the next `prepare` undoes it.
        """
        self.encoder[:dead] = DEAD_SCALE * self.decoder[:dead]
        if self.encoder_bias is not None:
            self.encoder_bias[:dead] = 0
        self.silent.zero_()
        self.silent[:dead] = self.dead_after

    def dead(self) -> int:
        """How many latents the library takes for dead."""
        return int((self.silent >= self.dead_after).sum())


# -- the reference, written anew -----------------------------------------------------------------


class Reference(nn.Module, Contender):
    """The BatchTopK training step of the paper's reference code, from a description of it: all dense.

    Tokens are standardised one by one. The latents are the k*n largest entries of the flattened matrix, scattered into
    zeros. Both losses are means over elements; AuxK lets the 512 largest of the dead (silent for 5 batches) explain the
    error, which is *not* detached. b_enc is there and not used. Before Adam's step the gradient's component along each
    decoder row is removed and the rows are made unit vectors; the limit on the gradient's norm is out of reach.
    """

    dead_after = 5  # batches

    def __init__(self, d_in: int, d_sae: int, k: int, aux_k: int = 512):
        super().__init__()
        self.k, self.aux_k = k, aux_k
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_in, d_sae)))
        self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach().T, dim=1))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.batches_silent = torch.zeros(d_sae)
        self.adam = torch.optim.Adam(self.parameters(), lr=3e-4, betas=(0.9, 0.99))

    encoder = property(lambda self: self.W_enc.data.T)
    decoder = property(lambda self: self.W_dec.data)
    silent = property(lambda self: self.batches_silent)

    def loss(self, x: Tensor) -> Tensor:
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-5)
        z = ((x - self.b_dec) @ self.W_enc).relu()
        top = z.flatten().topk(self.k * len(x))
        latents = torch.zeros_like(z.flatten()).scatter(0, top.indices, top.values).view_as(z)
        error = x - (latents @ self.W_dec + self.b_dec)
        fired = latents.sum(dim=0) > 0
        self.batches_silent = torch.where(fired, 0, self.batches_silent + 1)
        loss = error.square().mean()
        dead = self.batches_silent >= self.dead_after
        if dead.any():
            z_dead = z[:, dead]
            top = z_dead.topk(min(self.aux_k, z_dead.shape[1]), dim=-1)
            revived = torch.zeros_like(z_dead).scatter(1, top.indices, top.values)
            loss = loss + (error - revived @ self.W_dec[dead]).square().mean() / 32
        return loss

    def step(self, x: Tensor) -> None:
        self.adam.zero_grad()
        self.loss(x).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1e5)
        with torch.no_grad():
            unit = self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
            assert self.W_dec.grad is not None
            self.W_dec.grad -= (self.W_dec.grad * unit).sum(dim=-1, keepdim=True) * unit
            self.W_dec.copy_(unit)
        self.adam.step()


# -- ours ----------------------------------------------------------------------------------------


class Ours(Contender):
    """Exactly a step of `train`, by the fast path or by the dense reference path."""

    encoder = property(lambda self: self.sae.W_enc.data.T)
    decoder = property(lambda self: self.sae.W_dec.data)
    encoder_bias = property(lambda self: self.sae.b_enc.data)  # type: ignore[assignment]
    silent = property(lambda self: self.sae.tokens_since_fired)

    def __init__(
        self,
        size: Size,
        variant: str = "batchtopk",
        fast: bool = True,
        lr: float = TrainConfig.lr,
        steps: int = 200,
        seed: int = 0,
    ):
        options: dict[str, Any] = {"k": size.k, "seed": seed}
        self.sae: SAE = VARIANTS[variant](size.d_in, size.d_sae, **options).train()
        self.dead_after = self.sae.dead_after_tokens
        config = TrainConfig(tokens=steps * size.batch, batch_size=size.batch, fast=fast, lr=lr)
        self.run = _Run(self.sae, config, None, [])

    def step(self, x: Tensor) -> None:
        self.run.update(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x)


class Floor(Contender):
    """No training at all: the encoder's matrix product alone, which any exact method needs."""

    def __init__(self, size: Size, dtype: torch.dtype):
        self.dtype, self.none = dtype, torch.zeros(0)
        self.W = torch.randn(size.d_sae, size.d_in).to(dtype).T  # in memory as ours

    def prepare(self, dead: int) -> None:
        self.dead_given = dead

    def dead(self) -> int:
        return self.dead_given

    def step(self, x: Tensor) -> None:
        torch.mm(x.to(self.dtype), self.W)


# -- the other libraries -------------------------------------------------------------------------


class SAELens(Contender):
    encoder = property(lambda self: self.trainer.sae.W_enc.data.T)
    decoder = property(lambda self: self.trainer.sae.W_dec.data)
    encoder_bias = property(lambda self: self.trainer.sae.b_enc.data)  # type: ignore[assignment]
    silent = property(lambda self: self.trainer.n_forward_passes_since_fired)

    def __init__(self, size: Size, autocast: bool = False, lr: float = 3e-4, steps: int | None = None):
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k, device="cpu"))
        # for a race, with the warm-up and decay that `train` has; else a constant rate, as by default
        race = {} if steps is None else {"lr_warm_up_steps": steps // 20, "lr_decay_steps": steps // 5}
        config = SAETrainerConfig(
            total_training_samples=(steps or 100_000) * size.batch,
            train_batch_size_samples=size.batch,
            lr=lr,
            lr_end=lr / 10 if steps is None else 0.0,  # a constant rate makes no use of it
            autocast=autocast,
            **race,
        )
        self.trainer: Any = SAETrainer(config, sae, data_provider=iter(()))
        self.dead_after = config.dead_feature_window + 1  # silent for more batches than the window

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1  # its `fit` does so

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae.decode(self.trainer.sae.encode(x))


class DictionaryLearning(Contender):
    encoder = property(lambda self: self.trainer.ae.encoder.weight.data)
    decoder = property(lambda self: self.trainer.ae.decoder.weight.data.T)
    encoder_bias = property(lambda self: self.trainer.ae.encoder.bias.data)  # type: ignore[assignment]
    silent = property(lambda self: self.trainer.num_tokens_since_fired)

    def __init__(self, size: Size):
        empty: Any = types.ModuleType("nnsight")
        empty.LanguageModel = object
        sys.modules.setdefault("nnsight", empty)
        from dictionary_learning.trainers.batch_top_k import (  # pyright: ignore[reportMissingImports]
            BatchTopKTrainer,
        )

        self.trainer: Any = BatchTopKTrainer(
            steps=100_000, activation_dim=size.d_in, dict_size=size.d_sae, k=size.k, layer=0, lm_name="", device="cpu"
        )
        self.dead_after = self.trainer.dead_feature_threshold
        self.at = 0

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.at, x)  # step 0 sets b_dec
        self.at = max(self.at, self.trainer.threshold_start_step) + 1


class Sparsify(Contender):
    encoder = property(lambda self: self.sae.encoder.weight.data)
    decoder = property(lambda self: self.sae.W_dec.data)
    encoder_bias = property(lambda self: self.sae.encoder.bias.data)  # type: ignore[assignment]
    silent = property(lambda self: self.tokens_since_fired)

    def __init__(self, size: Size, lr: float | None = None, steps: int | None = None):
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
        from sparsify import TrainConfig as TheirConfig  # pyright: ignore[reportMissingImports]

        coder = SparseCoderConfig(num_latents=size.d_sae, k=size.k)
        self.config: Any = TheirConfig(coder, optimizer="adam", auxk_alpha=1 / 32, lr=lr)
        self.sae: Any = SparseCoder(size.d_in, coder, dtype=torch.float32)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=lr or 2e-4 / (size.d_sae / 2**14) ** 0.5)
        self.tokens_since_fired = torch.zeros(size.d_sae, dtype=torch.long)
        self.dead_after = self.config.dead_feature_threshold + 1  # silent for more tokens than the threshold
        self.first = True
        shape = TrainConfig(tokens=steps or 1, batch_size=1, lr=1.0)  # warm-up and decay as `train` has them
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, shape.lr_at if steps else lambda _: 1.0)

    def step(self, x: Tensor) -> None:
        sae, alpha = self.sae, self.config.auxk_alpha
        if self.first:
            sae.b_dec.data = x.mean(dim=0)
            self.first = False
        sae.set_decoder_norm_to_unit_norm()
        dead = self.tokens_since_fired > self.config.dead_feature_threshold
        out = sae(x, dead_mask=dead, total_variance=(x - x.mean(dim=0)).pow(2).sum())
        fired = torch.zeros_like(dead)
        fired[out.latent_indices.flatten()] = True
        self.log = float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[fired] = 0

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out


# -- the list ------------------------------------------------------------------------------------

REFERENCE = "reference BatchTopK"
LIBRARIES = ("dictionary_learning", "sae-lens", "sae-lens, bf16 autocast", "sparsify (TopK)")

CONTENDERS: dict[str, Callable[[Size], Contender]] = {
    REFERENCE: lambda size: Reference(size.d_in, size.d_sae, size.k),
    "dictionary_learning": DictionaryLearning,
    "sae-lens": SAELens,
    "sae-lens, bf16 autocast": lambda size: SAELens(size, autocast=True),
    "sparsify (TopK)": Sparsify,
    "ours, dense": lambda size: Ours(size, fast=False),
    "ours": Ours,
    "ours, TopK": lambda size: Ours(size, "topk"),
    "floor: encoder product": lambda size: Floor(size, torch.float32),
    "floor: encoder product, bf16": lambda size: Floor(size, torch.bfloat16),
}


def contenders(fast_bf16: bool) -> list[str]:
    """The names of all that can be told apart here: where bfloat16 is only emulated, it is no contender."""
    return [name for name in CONTENDERS if fast_bf16 or "bf16" not in name]
