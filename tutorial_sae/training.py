"""Training: one loop for every variant.

A step is a batch, the loss, its gradient without what would only lengthen decoder rows, Adam, and decoder rows of
length 1 again (unless the variant leaves them free). The learning rate warms up and decays linearly; so does the
sparsity penalty warm up, because at full strength from the start it kills latents before they have found a direction.
With `out` the run leaves a folder that a later call, or `load_sae`, goes on from: `config.json`, `sae.safetensors`,
`metrics.jsonl`, `checkpoint/`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tutorial_sae import sparse
from tutorial_sae.activations import ActivationStore
from tutorial_sae.runtime import (
    TutorialError,
    delayed_interrupt,
    digest,
    generator,
    progress,
    save_tensors,
    unknown,
    versions,
    write_json,
    write_text,
    writing,
)
from tutorial_sae.saes import SAE, BatchTopKSAE, TopKSAE, load_sae
from tutorial_sae.saes.base import check_activations
from tutorial_sae.text import load_text
from tutorial_sae.threshold import Calibration, calibrate_threshold

NORMALIZATION_TOKENS = 50_000
CALIBRATION_BATCHES, CALIBRATION_BATCH = 32, 1024
RESAMPLE_AT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of the run
RESAMPLE_TOKENS = 32_768  # among which inputs that are badly reconstructed are looked for
REVIVE = {
    "none": "dead latents stay dead",
    "auxk": "the auxiliary loss of TopK and BatchTopK (Gao et al. 2024): revives those that are outbid",
    "resample": "dead latents start again at badly reconstructed inputs (Towards Monosemanticity, 2023)",
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults suit a million activations of the embedded model on a laptop."""

    tokens: int = 1_000_000  # activations seen, repeats included
    batch_size: int = 1024
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam; the paper's
    warmup: float = 0.05  # fraction of the run over which the learning rate rises
    decay: float = 0.2  # fraction of the run, at its end, over which it falls to 0
    penalty_warmup: float = 0.2  # fraction of the run over which the sparsity penalty rises
    dead_after_tokens: int | None = None  # None: 10 million or 2 % of the run, whichever is less
    # what is done for dead latents, see REVIVE; None: AuxK where a variant has it. Other ways set the SAE's aux_k to 0
    revive: str | None = None
    fast: bool = True  # train on the surviving entries where that is possible (sparse.py); False: the reference
    checkpoint_seconds: int | float = 30  # between two checkpoints, where there is a folder for them

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_size)

    def check(self) -> None:
        if self.tokens < 1 or self.batch_size < 1:
            raise ValueError(f"tokens={self.tokens}, batch_size={self.batch_size}: both must be at least 1")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise ValueError(f"dead_after_tokens={self.dead_after_tokens}: choose at least 1, or None")
        if not (0 < self.lr < math.inf):
            raise ValueError(f"lr={self.lr}: choose a positive number, such as {TrainConfig.lr}")
        if self.revive not in (None, *REVIVE):
            raise unknown("revive", self.revive, REVIVE)
        if min(self.warmup, self.decay, self.penalty_warmup) < 0 or self.warmup + self.decay > 1:
            raise ValueError("warmup, decay and penalty_warmup are fractions of the run; the first two share it")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = (step + 1) / max(1, self.warmup * self.steps)
        falling = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * min(1.0, rising, falling)

    def penalty_at(self, step: int) -> float:
        """Fraction of the sparsity penalty in force at a step."""
        return min(1.0, (step + 1) / max(1, self.penalty_warmup * self.steps))


class Recipe(NamedTuple):
    """What is trained on a model by default."""

    d_sae: int
    k: int
    l1: dict[str, float]  # found by trying, so that L0 comes out near k
    harvest: int  # distinct activations
    config: TrainConfig
    theta: float = 1.0  # where JumpReLU's thresholds start: near where they end, so that a short run gets there

    def settings(self, variant: str, *, k: int | float | None = None, l1: int | float | None = None) -> dict[str, Any]:
        """The arguments of a variant's constructor; `k` is the L0 that JumpReLU aims at."""
        k = self.k if k is None else k
        if variant in self.l1:
            return {"l1": self.l1[variant] if l1 is None else l1}
        return {"target_l0": k, "theta": self.theta} if variant == "jumprelu" else {"k": k}


RECIPES = {
    "smollm2-135m": Recipe(d_sae=2304, k=32, l1={"vanilla": 2.1, "gated": 3.5}, harvest=200_000, config=TrainConfig())
}
SHORT = RECIPES["smollm2-135m"]._replace(
    l1={"vanilla": 2.75, "gated": 4.7}, harvest=64_000, config=TrainConfig(tokens=300_000, batch_size=512)
)
# with --full; the embedded model's is what the shipped SAEs were trained with, see pretrained/
FULL = {
    "smollm2-135m": Recipe(
        d_sae=2304,
        k=32,
        l1={"vanilla": 2.12, "gated": 3.1},  # for the 5 million of the shipped ones
        harvest=3_000_000,
        config=TrainConfig(tokens=20_000_000, lr=1e-3, decay=0.3),
    )
}


class TrainResult(NamedTuple):
    sae: SAE
    history: list[dict[str, float]]  # the lines of metrics.jsonl
    seconds: float  # in training steps, resumed parts included
    tokens_per_second: float
    calibration: Calibration | None  # of a BatchTopK SAE


def train(
    sae: SAE,
    activations: ActivationStore | Float[Tensor, "tokens d_in"],
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    calibration: Float[Tensor, "_ d_in"] | None = None,
    seed: int = 0,
) -> TrainResult:
    """Train `sae` in place, calibrate it if it is a BatchTopK SAE, and give it back in eval mode.

    `activations` is a store, or a tensor of raw activations. `out` is the folder of the run: a run of the same settings
    found there goes on from its last checkpoint and ends as if it had never stopped. The threshold is calibrated on
    `calibration` (raw activations, best from documents not trained on), by default on a sample of the training data.
    `seed` orders a tensor's batches; a store has a seed of its own.

    Raises `ValueError` for bad settings, for activations that are not finite (naming batch and row), and for a folder
    that holds another run; `TutorialError` when the loss is not finite.
    """
    config = config or TrainConfig()
    config.check()
    if not isinstance(activations, ActivationStore):
        check_activations(activations, sae.d_in)
    elif activations.d_in != sae.d_in:
        raise ValueError(f"the activations have width {activations.d_in}, and the SAE has d_in={sae.d_in}")
    sae.metadata.update(_origin(activations, config, seed))
    sae.dead_after_tokens = config.dead_after_tokens or min(10_000_000, max(1, config.tokens // 50))
    resampling = _revive(sae, config) == "resample"
    data = [_sketch(x) for x in (activations, calibration) if isinstance(x, Tensor)]
    run = _Run(sae, config, Path(out) if out is not None else None, data)
    if resampling:
        run.resample = lambda step: resample(sae, _sample(activations, RESAMPLE_TOKENS, seed), run.adam, step)
    if run.finished():
        finished = load_sae(run.folder)  # type: ignore[arg-type]
        sae.load_state_dict(finished.state_dict())
        return run.result(sae.eval())
    sae.train()
    if not run.resume():
        sae.fit_normalization(_sample(activations, NORMALIZATION_TOKENS, seed))
    try:
        run.go_on(itertools.islice(_batches(activations, config.batch_size, seed), run.step, None))
    except BaseException:  # Ctrl-C above all: what was done is kept
        run.checkpoint()
        raise
    if isinstance(sae, BatchTopKSAE):
        if calibration is None:
            calibration = _sample(activations, CALIBRATION_BATCHES * CALIBRATION_BATCH, seed)
        run.calibration = calibrate_threshold(sae, calibration, batch_size=CALIBRATION_BATCH)
    sae.scratch = torch.empty(0, 0)
    run.finish()
    return run.result(sae.eval())


def optimizer(sae: SAE, config: TrainConfig) -> torch.optim.Adam:
    """Adam over the parameters by name, each with a row for each latent: W_enc.T, in the same memory, for W_enc.

    So W_enc lies in memory (see sparse.py), and Adam would copy a matrix that is not contiguous, its gradient and its
    moments in every step. Before `step`, its gradient must be handed over.
    """
    row_wise = (
        (name, p if p.is_contiguous() else torch.nn.Parameter(p.detach().T)) for name, p in sae.named_parameters()
    )
    return torch.optim.Adam(row_wise, lr=config.lr, betas=config.betas, fused=True)


def named(adam: torch.optim.Adam) -> Iterator[tuple[str, Tensor]]:
    return zip(adam.param_groups[0]["param_names"], adam.param_groups[0]["params"], strict=True)


def hand_over(sae: SAE, adam: torch.optim.Adam) -> None:
    """Give the rows that `adam` steps the gradients of the parameters of `sae` that they are."""
    for (_, row_wise), parameter in zip(named(adam), sae.parameters(), strict=True):
        if row_wise is not parameter and parameter.grad is not None:
            row_wise.grad = parameter.grad.T


class _Run:
    """The state of one training run, and its folder."""

    def __init__(self, sae: SAE, config: TrainConfig, folder: Path | None, data: list[str]):
        self.sae, self.config, self.folder = sae, config, folder
        self.adam = optimizer(sae, config)
        self.loss = sparse.loss if config.fast and sparse.suits(sae) else type(sae).loss
        self.resample: Callable[[int], int] | None = None
        self.step = 0
        self.whole = True  # False in the middle of a step
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.calibration: Calibration | None = None
        # everything that determines the result; a folder of another run is never continued
        settings = {name: value for name, value in sae.config.items() if name != "versions"}
        self.key = digest([asdict(config), settings, sae.seed, data])

    def go_on(self, batches: Iterator[Tensor]) -> None:
        config, sae = self.config, self.sae
        every = max(1, config.steps // 100)
        device = sae.W_enc.device
        done = self.step * config.batch_size
        bar = progress(config.steps * config.batch_size, f"training {sae.variant}", unit="tok", done=done)
        with bar, delayed_interrupt() as stop_here:
            saved = last = time.perf_counter()
            while self.step < config.steps:
                stop_here()
                x = next(batches)
                _check_finite(x, self.step)
                loss = self._update(x.to(device))
                now = time.perf_counter()
                self.seconds += now - last
                last = now
                bar.update(len(x))
                if self.step % every == 0 or self.step == config.steps:
                    bar.set_postfix_str(self._log(loss), refresh=False)
                if self.folder is not None and now - saved > config.checkpoint_seconds:
                    self.checkpoint()
                    saved = last = time.perf_counter()
            stop_here()

    def _update(self, x: Tensor) -> Any:
        self.whole = False
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.sae.zero_grad()
        loss = self.loss(self.sae, x)
        (loss.total - (1 - self.config.penalty_at(self.step)) * loss.penalty).backward()
        self.sae.project_decoder_grad()
        hand_over(self.sae, self.adam)
        self.adam.step()
        self.adam.zero_grad()
        self.sae.constrain()
        self.step += 1
        if self.resample and self.step in {round(part * self.config.steps) for part in RESAMPLE_AT}:
            self.resample(self.step)
        self.whole = True
        return loss

    def _log(self, loss: Any) -> str:
        dead = float((self.sae.tokens_since_fired >= self.sae.dead_after_tokens).float().mean())
        line = {"step": self.step, "tokens": self.step * self.config.batch_size, "seconds": round(self.seconds, 2)}
        line |= {name: float(value.detach()) for name, value in loss._asdict().items()} | {"dead": dead}
        if not math.isfinite(line["total"]):
            self.whole = False  # and so no checkpoint
            raise TutorialError(
                f"the loss is {line['total']} at step {self.step}: lower the learning rate (lr={self.config.lr}) or "
                "look for extreme activations"
            )
        self.history.append(line)
        return f"FVU {line['fvu']:.3f}, L0 {line['l0']:.1f}, dead {dead:.0%}"

    # -- files -----------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Everything that the rest of the run depends on, in one file that is whole or not there."""
        if self.folder is None or not self.whole:
            return
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in named(self.adam):
            tensors |= {f"adam.{key}.{name}": value for key, value in self.adam.state[parameter].items()}
        notes = {"step": self.step, "seconds": self.seconds, "key": self.key, "history": self.history}
        notes["hint"] = self.sae.hint  # without it the next step may take another path, and other roundings
        save_tensors(self.folder / "checkpoint" / "state.safetensors", tensors, notes)
        self._write_metrics(self.folder)

    def _write_metrics(self, folder: Path) -> None:
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def resume(self) -> bool:
        """Go back to the last checkpoint; False if there is none."""
        path = self.folder / "checkpoint" / "state.safetensors" if self.folder else None
        if path is None or not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                notes = json.loads(file.metadata()["notes"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise TutorialError(f"{path} is damaged ({error}): remove that file to train from the start") from error
        self._same_run(notes["key"])
        self.sae.load_state_dict({n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")})
        for name, parameter in named(self.adam):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := tensors.get(f"adam.{key}.{name}")) is not None:
                    self.adam.state[parameter][key] = saved if key == "step" else saved.to(parameter.device)
        self.step, self.seconds, self.history = notes["step"], notes["seconds"], notes["history"]
        self.sae.hint = notes.get("hint", 0.0)
        return True

    def finished(self) -> bool:
        path = self.folder / "run.json" if self.folder else None
        if path is None or not path.exists():
            return False
        try:
            notes = json.loads(path.read_text(encoding="utf-8"))
            self._same_run(notes["key"])
            lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            self.history = [json.loads(line) for line in lines]
            self.seconds, self.step = notes["seconds"], self.config.steps
            self.calibration = Calibration(**notes["calibration"]) if notes["calibration"] else None
        except (json.JSONDecodeError, KeyError, TypeError, FileNotFoundError) as error:
            raise TutorialError(f"{self.folder} is damaged ({error!r}): remove it to train from the start") from error
        return True

    def finish(self) -> None:
        if self.folder is None:
            return
        self.sae.save(self.folder)
        self._write_metrics(self.folder)
        calibration = self.calibration._asdict() if self.calibration else None
        notes = {"key": self.key, "seconds": self.seconds, "calibration": calibration, "train": asdict(self.config)}
        write_json(self.folder / "run.json", notes)
        with writing(self.folder):
            (self.folder / "checkpoint" / "state.safetensors").unlink(missing_ok=True)

    def _same_run(self, key: str) -> None:
        if key != self.key:
            raise ValueError(
                f"{self.folder} holds a run with other settings or data: choose another folder, or remove it"
            )

    def result(self, sae: SAE) -> TrainResult:
        rate = self.config.steps * self.config.batch_size / max(self.seconds, 1e-9)
        return TrainResult(sae, self.history, self.seconds, rate, self.calibration)


# -- dead latents --------------------------------------------------------------------------------


def _revive(sae: SAE, config: TrainConfig) -> str:
    """What is done for dead latents, and set up for it."""
    way = config.revive or ("auxk" if isinstance(sae, TopKSAE) and sae.aux_k else "none")
    if way == "auxk" and not (isinstance(sae, TopKSAE) and sae.aux_k):
        raise ValueError(
            f"revive='auxk' suits TopK and BatchTopK SAEs with aux_k > 0, and this is {sae}: try revive='resample'"
        )
    if way != "auxk" and isinstance(sae, TopKSAE):
        sae.aux_k = 0
    if way != "none" and sae.dead_after_tokens > config.tokens:
        warnings.warn(
            f"dead_after_tokens={sae.dead_after_tokens:,} is longer than the run of {config.tokens:,} tokens: no latent"
            f" will ever count as dead, and revive={way!r} does nothing; leave dead_after_tokens out, or lower it",
            stacklevel=3,
        )
    return way


@torch.no_grad()
def resample(sae: SAE, x: Float[Tensor, "tokens d_in"], adam: torch.optim.Adam, seed: int) -> int:
    """Let dead latents start again where `sae` fails, and forget what Adam knew of them; returns how many.

    Inputs are drawn with probability proportional to their squared loss. Such an input, at length 1, becomes the
    decoder's row; at 0.2 times the mean length of the living, the encoder's column; the bias becomes 0. Bricken et al.
    2023, Towards Monosemanticity; unlike there, b_dec is taken off the input first, as the encoder does.
    """
    dead = sae.tokens_since_fired >= sae.dead_after_tokens
    latents = dead.nonzero().squeeze(1)
    if len(latents) == 0 or dead.all():
        return 0
    losses, inputs = [], []
    for part in x.to(sae.W_enc.device).split(CALIBRATION_BATCH):
        part_n = sae._normalized(part)[0]
        kept = sae.keep(sae._pre(part_n), sae.cut)
        losses.append((part_n - kept @ sae.W_dec - sae.b_dec).float().square().sum(dim=-1))
        inputs.append(part_n - sae.b_dec)
    loss = torch.cat(losses).cpu()
    drawn = torch.multinomial(
        loss.square(), len(latents), len(latents) > len(loss), generator=generator(seed, "resample")
    )
    directions = torch.nn.functional.normalize(torch.cat(inputs)[drawn.to(latents.device)], dim=1)
    sae.restart(latents, directions, 0.2 * float(sae.W_enc.norm(dim=0)[~dead].mean()))
    for name, parameter in named(adam):
        if name != "b_dec":
            for key in ("exp_avg", "exp_avg_sq"):
                adam.state[parameter][key][latents] = 0.0
    return len(latents)


# -- data ----------------------------------------------------------------------------------------


def _batches(activations: ActivationStore | Tensor, n: int, seed: int) -> Iterator[Tensor]:
    if isinstance(activations, ActivationStore):
        yield from activations.batches(n)
        return
    if n > len(activations):
        raise ValueError(f"batch_size={n} exceeds the {len(activations)} activations given: choose a smaller one")
    for epoch in itertools.count():
        for chosen in torch.randperm(len(activations), generator=generator(seed, "batches", epoch)).split(n):
            if len(chosen) == n:
                yield activations[chosen].float()


def _sample(activations: ActivationStore | Tensor, n: int, seed: int) -> Tensor:
    if isinstance(activations, ActivationStore):
        return activations.sample(min(n, len(activations)))
    return activations[torch.randperm(len(activations), generator=generator(seed, "sample"))[:n]].float()


def calibration_activations(
    model: Any, hook: str, norm_limit: float | None, tokens: int | None = None
) -> Float[Tensor, "tokens d_in"]:
    """Raw activations of documents that are neither trained nor tested on, under the mask of the training data."""
    tokens = tokens or CALIBRATION_BATCHES * CALIBRATION_BATCH
    return ActivationStore(model, load_text(split="calibration"), hook, tokens=tokens, norm_limit=norm_limit)[:]


def _sketch(x: Float[Tensor, "tokens d_in"]) -> str:
    """A digest of a tensor's size and of some hundred of its rows: another tensor has another."""
    rows = x[:: max(1, len(x) // 256)].detach().float().cpu()
    return digest([list(x.shape), hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()])


def _check_finite(x: Tensor, step: int) -> None:
    if not torch.isfinite(x).all():
        row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
        raise ValueError(
            f"row {row} of batch {step} is not finite (NaN or infinite): a model in float16 may overflow, so harvest "
            "in bfloat16 or float32, or drop that row"
        )


def _origin(activations: ActivationStore | Tensor, config: TrainConfig, seed: int) -> dict[str, Any]:
    """What a saved SAE says of where it comes from."""
    origin: dict[str, Any] = {
        "tokens": config.steps * config.batch_size,
        "seed": seed,
        "versions": versions("torch", "tutorial-sae"),
    }
    if isinstance(activations, ActivationStore):
        card = activations.card
        origin |= {
            "model": card.name,
            "fingerprint": card.fingerprint,
            "weight_processing": card.weight_processing,
            "hook": activations.hook,
            "mask": {"norm_limit": activations.norm_limit, "special": list(card.special)},
            "data": {"text": activations.description["text"], "distinct": len(activations), "seed": activations.seed},
            "seed": activations.seed,
        }
    return origin
