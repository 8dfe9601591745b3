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
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tutorial_sae import ranks, sparse
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
from tutorial_sae.text import Text, load_text
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
    batch_cut: str = "global"  # of BatchTopK on several ranks: over all their batches, or "local": each over its own

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
        if self.batch_cut not in ("global", "local"):
            raise unknown("batch_cut", self.batch_cut, ("global", "local"))
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
    l1: dict[str, float]  # so that L0 comes out near k: found by trying on SmolLM2, only guessed for the others
    harvest: int  # distinct activations
    config: TrainConfig
    theta: float = 1.0  # where JumpReLU's thresholds start: near where they end, so that a short run gets there
    text: str = "embedded"
    stream: bool = False  # harvest while training, and keep nothing on disk
    grid: tuple[tuple[str, int, int], ...] = ()  # variant, d_sae, k: what the paper trained on this model

    def settings(self, variant: str, *, k: int | float | None = None, l1: int | float | None = None) -> dict[str, Any]:
        """The arguments of a variant's constructor; `k` is the L0 that JumpReLU aims at."""
        k = self.k if k is None else k
        if variant in self.l1:
            return {"l1": self.l1[variant] if l1 is None else l1}
        return {"target_l0": k, "theta": self.theta} if variant == "jumprelu" else {"k": k}


def _sweep(variants: str, widths: tuple[int, ...], ks: tuple[int, ...]) -> tuple[tuple[str, int, int], ...]:
    return tuple((variant, width, k) for width in widths for k in ks for variant in variants.split())


# The models, widths, k, batch and Adam of Bussmann et al. 2024, section 4 and appendix A.1; the hook points and the
# constant rate are those of its reference code. What the paper does not say is ours: AuxK after 10 million tokens,
# normalisation by the data set, the quadratic penalty that takes JumpReLU to an L0 of k.
THREE = "topk batchtopk jumprelu"
OPENWEBTEXT = "hub:Skylion007/openwebtext@refs/convert/parquet"
QUICK = TrainConfig(tokens=20_000_000, batch_size=4096, lr=1e-3, checkpoint_seconds=120)
PAPER = TrainConfig(tokens=1_000_000_000, batch_size=4096, lr=3e-4, warmup=0.0, decay=0.0, checkpoint_seconds=600)
GPT2 = Recipe(
    d_sae=12288,
    k=32,
    l1={"vanilla": 2.1, "gated": 3.5},
    harvest=QUICK.tokens,
    config=QUICK,
    text=OPENWEBTEXT,
    stream=True,
    grid=_sweep("topk batchtopk", (3072, 6144, 24576), (32,)) + _sweep(THREE, (12288,), (16, 32, 64)),
)
GEMMA = GPT2._replace(d_sae=16384, grid=_sweep(THREE, (16384,), (16, 32, 64)))
RECIPES = {
    "smollm2-135m": Recipe(d_sae=2304, k=32, l1={"vanilla": 2.1, "gated": 3.5}, harvest=200_000, config=TrainConfig()),
    "gpt2": GPT2,
    "gemma-2-2b": GEMMA,
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
    ),
    "gpt2": GPT2._replace(harvest=PAPER.tokens, config=PAPER),
    "gemma-2-2b": GEMMA._replace(harvest=PAPER.tokens, config=PAPER),
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

    Under `torchrun` every rank calls this: each steps on its share of a batch (a stream's own text, or a part of each
    batch of a tensor or a store on disk), and they end with the same SAE. `out` must be a folder that all of them see.

    Raises `ValueError` for bad settings, for activations that are not finite (naming batch and row), and for a folder
    that holds another run; `TutorialError` when the loss is not finite or memory runs out.
    """
    return train_together([sae], activations, config, outs=[out], calibration=calibration, seed=seed)[0]


def train_together(
    saes: Sequence[SAE],
    activations: ActivationStore | Float[Tensor, "tokens d_in"],
    config: TrainConfig | None = None,
    *,
    outs: Sequence[str | Path | None],
    calibration: Float[Tensor, "_ d_in"] | None = None,
    seed: int = 0,
) -> list[TrainResult]:
    """`train` for several SAEs on the same batches, so that they share one harvest. Each has a folder of its own."""
    config = config or TrainConfig()
    config.check()
    if config.batch_size % ranks.size():
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared among {ranks.size()} processes: choose a multiple of "
            f"{ranks.size()}, or another number of processes"
        )
    if not isinstance(activations, ActivationStore):
        check_activations(activations, saes[0].d_in)
    elif activations.d_in != saes[0].d_in:
        raise ValueError(f"the activations have width {activations.d_in}, and the SAE has d_in={saes[0].d_in}")
    data = [_sketch(x) for x in (activations, calibration) if isinstance(x, Tensor)]
    runs = []
    for sae, out in zip(saes, outs, strict=True):
        sae.metadata.update(_origin(activations, config, seed))
        sae.dead_after_tokens = config.dead_after_tokens or min(10_000_000, max(1, config.tokens // 50))
        resampling = _revive(sae, config) == "resample"
        run = _Run(sae, config, Path(out) if out is not None else None, data)
        if resampling:
            run.resample = lambda step, sae=sae, adam=run.adam: resample(
                sae, _sample(activations, RESAMPLE_TOKENS, seed), adam, step
            )
        runs.append(run)
    first = None  # one sample for all: of a stream it has to be harvested
    for run in runs:
        if run.finished():
            run.sae.load_state_dict(load_sae(run.folder).state_dict())  # type: ignore[arg-type]
        elif not run.resume():
            first = _sample(activations, NORMALIZATION_TOKENS, seed) if first is None else first
            run.sae.fit_normalization(first)
        run.share_state()
    del first
    going = [run for run in runs if not run.done]
    if going:
        step = min(run.step for run in going)  # a kill between two checkpoints leaves some SAEs ahead of others
        behind = next(run for run in going if run.step == step)
        _go_on(going, _batches(activations, config.batch_size, seed, step, behind.position), activations)
    for run in going:
        if isinstance(run.sae, BatchTopKSAE):
            if calibration is None:
                calibration = _sample(activations, CALIBRATION_BATCHES * CALIBRATION_BATCH, seed)
            run.calibration = ranks.agreed(calibrate_threshold(run.sae, calibration, batch_size=CALIBRATION_BATCH))
            run.share_state()
        run.finish()
    return [run.result() for run in runs]


def _go_on(runs: list[_Run], batches: Iterator[Tensor], activations: ActivationStore | Tensor) -> None:
    """Take all the steps that are left. Stopped or failed, it leaves checkpoints of the last whole step."""
    config, step = runs[0].config, min(run.step for run in runs)
    what = f"training {runs[0].sae.variant}" if len(runs) == 1 else f"training {len(runs)} SAEs"
    bar = progress(config.steps * config.batch_size, what, unit="tok", done=step * config.batch_size)
    try:
        with bar, delayed_interrupt() as stop, ranks.together():
            for run in runs:
                run.sae.alive_until = 0
            saved = last = time.perf_counter()
            while step < config.steps:
                stop.wait = ranks.size() > 1  # alone, nothing is half done while a batch is made
                x = next(batches)
                stop.wait = True
                moving = [run for run in runs if run.step == step]
                for run in moving:
                    run.update(x)
                step += 1
                now = time.perf_counter()
                for run in moving:
                    run.position = getattr(activations, "position", None)
                    run.seconds += (now - last) / len(moving)
                last = now
                bar.update(config.batch_size)
                if step % max(1, config.steps // 100) == 0 or step == config.steps:
                    bar.set_postfix_str("; ".join([run.log() for run in moving][:3]), refresh=False)
                # ranks stop and save at the same step, or they would wait for each other for ever
                flags = torch.tensor([stop.asked, now - saved > config.checkpoint_seconds])
                asked, due = ranks.any_of(flags.to(x.device) if ranks.world() > 1 else flags).tolist()
                if asked:
                    raise KeyboardInterrupt
                if due:
                    for run in runs:
                        run.checkpoint()
                    saved = last = time.perf_counter()
    except BaseException as error:  # Ctrl-C above all: what was done is kept
        if ranks.size() == 1 or isinstance(error, KeyboardInterrupt):  # ranks that fail one by one cannot agree
            for run in runs:
                run.checkpoint()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            raise TutorialError(_too_large(runs, config)) from error
        raise


def _too_large(runs: list[_Run], config: TrainConfig) -> str:
    latents, share = max(run.sae.d_sae for run in runs), config.batch_size // ranks.size()
    return (
        f"memory ran out with {share} activations a step, whose z alone takes {share * latents * 4 / 1e9:.1f} GB at "
        f"{latents} latents: choose batch_size={config.batch_size // 2} or d_sae={latents // 2}, or give the data less "
        "with memory_gb; the last checkpoint is kept"
    )


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
        self.sae, self.config, self.folder = sae.train(), config, folder
        self.adam = optimizer(sae, config)
        self.loss = sparse.path(sae) if config.fast else type(sae).loss
        self.resample: Callable[[int], int] | None = None
        self.step, self.done = 0, False
        self.position: dict[str, Any] | None = None  # of a stream, behind the last step
        self.latest: Any = None  # loss
        self.whole = True  # False in the middle of a step
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.calibration: Calibration | None = None
        if isinstance(sae, TopKSAE):
            sae.global_cut = config.batch_cut == "global"
        # everything that determines the result; a folder of another run is never continued
        settings = {name: value for name, value in sae.config.items() if name != "versions"}
        self.key = digest([asdict(config), settings, sae.seed, data])

    def update(self, x: Tensor) -> None:
        """One step: loss, gradients, Adam, and the constraints."""
        x = x.to(self.sae.W_enc.device)
        if not x.is_cuda:  # on a GPU asking is waiting: there the loss tells
            _check_finite(x, self.step)
        self.whole = False
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.sae.zero_grad()
        loss = self.loss(self.sae, x)
        (loss.total - (1 - self.config.penalty_at(self.step)) * loss.penalty).backward()
        self.sae.project_decoder_grad()
        hand_over(self.sae, self.adam)
        for _, parameter in named(self.adam):
            if ranks.world() > 1 and parameter.grad is not None:
                parameter.grad = ranks.mean(parameter.grad)
        self.adam.step()
        self.adam.zero_grad()
        self.sae.constrain()
        self.step += 1
        if self.resample and self.step in {round(part * self.config.steps) for part in RESAMPLE_AT}:
            with ranks.apart():
                self.resample(self.step)
            self.share_state()
        self.latest, self.whole = loss, True

    def share_state(self) -> None:
        """Where ranks differ, as each draws from its own data, rank 0 is right."""
        moments = (m for state in self.adam.state.values() for key, m in state.items() if key != "step")
        ranks.copy_from_first(itertools.chain(self.sae.state_dict().values(), moments))

    def log(self) -> str:
        dead = float((self.sae.tokens_since_fired >= self.sae.dead_after_tokens).float().mean())
        line = {"step": self.step, "tokens": self.step * self.config.batch_size, "seconds": round(self.seconds, 2)}
        terms = self.latest._asdict()
        values = ranks.mean(torch.stack([value.detach().float() for value in terms.values()]))
        line |= dict(zip(terms, values.tolist(), strict=True)) | {"dead": dead}
        self._check_loss(line["total"])
        self.history.append(line)
        return f"FVU {line['fvu']:.3f}, L0 {line['l0']:.1f}, dead {dead:.0%}"

    def _check_loss(self, total: float) -> None:
        if not math.isfinite(total):
            self.whole = False  # and so no checkpoint
            raise TutorialError(
                f"the loss is {total} at step {self.step}: lower the learning rate (lr={self.config.lr}) or "
                "look for extreme activations"
            )

    # -- files -----------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Everything that the rest of the run depends on, in one file that is whole or not there."""
        if self.folder is None or not self.whole or self.done:
            return
        if self.latest is not None:
            self._check_loss(float(ranks.mean(self.latest.total.detach())))
        here = self.position
        if here is not None and here["left"] is not None:  # to the host, for another rank has another GPU
            here = {**here, "left": here["left"].cpu()}
        positions = ranks.gathered(here)
        if ranks.rank() > 0:
            return
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in named(self.adam):
            tensors |= {f"adam.{key}.{name}": value for key, value in self.adam.state[parameter].items()}
        notes = {"step": self.step, "seconds": self.seconds, "key": self.key, "history": self.history}
        # without the hint the next step may take another path, and other roundings
        for rank, here in enumerate(positions):
            if here is not None and here["left"] is not None:
                tensors[f"left.{rank}"] = here["left"]
        notes["positions"] = [here and {**here, "left": None} for here in positions]
        notes |= {"hint": self.sae.hint, "sha256": _tensors_sha256(tensors)}
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
            if notes["sha256"] != _tensors_sha256(tensors):
                raise ValueError("its tensors are not those that were saved")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise TutorialError(f"{path} is damaged ({error}): remove that file to train from the start") from error
        self._same_run(notes["key"])
        self.sae.load_state_dict({n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")})
        for name, parameter in named(self.adam):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := tensors.get(f"adam.{key}.{name}")) is not None:
                    self.adam.state[parameter][key] = saved if key == "step" else saved.to(parameter.device)
        self.step, self.seconds, self.history = notes["step"], notes["seconds"], notes["history"]
        self.sae.hint, self.position = notes["hint"], _own_position(notes["positions"], tensors)
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
            self.seconds, self.step, self.done = notes["seconds"], self.config.steps, True
            self.calibration = Calibration(**notes["calibration"]) if notes["calibration"] else None
        except (json.JSONDecodeError, KeyError, TypeError, FileNotFoundError) as error:
            raise TutorialError(f"{self.folder} is damaged ({error!r}): remove it to train from the start") from error
        return True

    def finish(self) -> None:
        self.done = True
        if self.folder is None or ranks.rank() > 0:
            return
        self.sae.save(self.folder)
        self._write_metrics(self.folder)
        calibration = self.calibration._asdict() if self.calibration else None
        notes = {"key": self.key, "seconds": self.seconds, "calibration": calibration, "train": asdict(self.config)}
        write_json(self.folder / "run.json", notes)
        with writing(self.folder):
            shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)

    def _same_run(self, key: str) -> None:
        if key != self.key:
            raise ValueError(
                f"{self.folder} holds a run with other settings or data: choose another folder, or remove it"
            )

    def result(self) -> TrainResult:
        self.sae.scratch, self.sae.alive_until = torch.empty(0, 0), None
        rate = self.config.steps * self.config.batch_size / max(self.seconds, 1e-9)
        return TrainResult(self.sae.eval(), self.history, self.seconds, rate, self.calibration)


def _tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Of names and values: an edited checkpoint is not that of the run that it says."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _own_position(positions: list[dict[str, Any] | None], tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Where in the stream this rank goes on. Saved by another number of ranks, all begin with the earliest document
    that one of them was at: what lies between is read twice, and nothing is left out."""
    known = [here for here in positions if here is not None]
    if len(positions) == ranks.size() or not known:
        here = positions[ranks.rank()] if known else None
        return here and {**here, "left": tensors.get(f"left.{ranks.rank()}")}
    at = [[h["text"]["document"], *h["text"]["owners"]] if h["text"] else [0] for h in known]  # and what is left over
    document, first = min((min(numbers), i) for i, numbers in enumerate(at))
    text = {"document": document, "tokens": [], "owners": [], "labels": {}}
    kept = sum(here["kept"] for here in known) // ranks.size()
    return {**known[first], "part": known[first]["part"] + 1, "batch": 0, "kept": kept, "text": text, "left": None}


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
            stacklevel=4,
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


def _batches(
    activations: ActivationStore | Tensor, n: int, seed: int, step: int, position: dict[str, Any] | None
) -> Iterator[Tensor]:
    """This rank's share of every batch of `n`, from `step` on."""
    share = n // ranks.size()
    if isinstance(activations, ActivationStore) and activations.stream:
        yield from activations.batches(share, start=position)
    mine = slice(ranks.rank() * share, (ranks.rank() + 1) * share)
    whole = activations.batches(n) if isinstance(activations, ActivationStore) else _shuffled(activations, n, seed)
    for batch in itertools.islice(whole, step, None):
        yield batch[mine]


def _shuffled(activations: Tensor, n: int, seed: int) -> Iterator[Tensor]:
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
    model: Any, hook: str, norm_limit: float | None, tokens: int | None = None, text: Text | None = None
) -> Float[Tensor, "tokens d_in"]:
    """Raw activations of documents that are neither trained nor tested on, under the mask of the training data."""
    tokens, text = tokens or CALIBRATION_BATCHES * CALIBRATION_BATCH, text or load_text(split="calibration")
    return ActivationStore(model, text, hook, tokens=tokens, norm_limit=norm_limit)[:]


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
