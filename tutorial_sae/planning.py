"""Before hours are spent: how much memory, disk and time a training run takes, by arithmetic, and what would fit.

    memory    the language model, four numbers for each of the SAE's (weight, gradient, two moments of Adam), the
              activations that wait, and what a harvest and a step need while they last; or the weights' file, if
              that is more
    time      products of matrices: 2 numbers per weight and token in the model's lower layers, and in an SAE's step 12
              for a dense one, about 3 for the sparse one on a CPU; at a part of the rate that this machine reaches in
              one large product. Without a GPU to measure on, hours on one are arithmetic, good to a factor of 2 or so.

Memory on a CPU is the peak of the process (measured: benchmarks/results/true_size.json), on a GPU that of the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tutorial_sae import ranks
from tutorial_sae.activations import SHARD_TOKENS
from tutorial_sae.models import KNOWN, Shape, shape_of
from tutorial_sae.runtime import TutorialError, fast_bf16, pick_device
from tutorial_sae.training import CALIBRATION_BATCH, CALIBRATION_BATCHES, FULL, RECIPES, Recipe, TrainConfig

PYTHON_GB = 0.55  # with PyTorch and transformers loaded, on the host
HARVEST_GB = 0.2  # what a forward pass of 2,048 tokens needs while it lasts, text and its tokens included
EFFICIENCY = 0.4  # of a large product's rate


class Machine(NamedTuple):
    """`memory_gb` of the device that computes; `flops` of a large product, in the precision that the model runs in."""

    name: str
    memory_gb: float
    flops: float
    bf16: bool
    gpu: bool = True


# by their data sheets: what a large product reaches is less, and counted in EFFICIENCY
MACHINES = [
    Machine("T4 (float32)", 15, 8e12, False),
    Machine("24 GB (L4, A10, 3090, 4090)", 22, 120e12, True),
    Machine("A100 40 GB", 39, 312e12, True),
    Machine("H100 or H200", 78, 790e12, True),
]


def this_machine() -> Machine:
    """Where a run would take place, its free memory, and its speed: half a second of products."""
    import psutil

    device = pick_device()
    gpu, bf16 = device.type == "cuda", fast_bf16(device)
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    side = 8192 if gpu else 1024
    x = torch.ones(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    float((x @ x)[0, 0])
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.4:
        float((x @ x)[0, 0])
        count += 1
    flops = 2 * side**3 * count / (time.perf_counter() - start)
    return Machine(torch.cuda.get_device_name() if gpu else "this CPU", free / 1e9, flops, bf16, gpu)


def in_words(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{max(1, 60 * hours):.0f} minutes"


class Plan(NamedTuple):
    """What a run takes on a machine; `parts` are the gigabytes that make up `memory_gb`."""

    machine: Machine
    parts: dict[str, float]
    disk_gb: float
    hours: float
    advice: str  # settings that would fit, where these do not

    @property
    def memory_gb(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.memory_gb < 0.95 * self.machine.memory_gb

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gb:.2f}" for name, gb in self.parts.items())
        return (
            f"plan for {self.machine.name}: {self.memory_gb:.1f} GB of memory ({parts}), {self.disk_gb:.1f} GB of "
            f"disk, about {in_words(self.hours)}"
        )

    def check(self) -> None:
        """Refuse a run that cannot fit, before anything is loaded."""
        if not self.fits:
            raise TutorialError(
                f"this run needs {self.memory_gb:.1f} GB of memory and {self.machine.memory_gb:.1f} GB are free on "
                f"{self.machine.name}: {self.advice}"
            )


def plan(
    model: str,
    recipe: Recipe,
    config: TrainConfig,
    widths: Sequence[int] = (),
    memory_gb: float = 2.0,
    machine: Machine | None = None,
    source: str | None = None,
) -> Plan:
    """What it takes to train SAEs of these `widths` (by default the recipe's one) together on one harvest."""
    machine, shape, hook = machine or this_machine(), shape_of(source or model), KNOWN[model].hook
    widths = list(widths) or [recipe.d_sae]
    parts = _memory(shape, recipe, config, widths, memory_gb, machine)
    stored = 0.0 if recipe.stream else min(config.tokens, recipe.harvest) * shape.d_model * _size(machine) / 1e9
    each = [2 * width * shape.d_model for width in widths]
    layers = int(hook.split(".")[1]) + hook.endswith("post")
    rate = EFFICIENCY * machine.flops * ranks.size()
    harvest = 2 * layers * shape.block * min(config.tokens, recipe.harvest)
    steps = (6 if machine.gpu else 1.5) * sum(each) * config.tokens
    disk = stored + (0 if model == "smollm2-135m" else shape.params * 4 / 1e9) + sum(each) * 16 / 1e9
    made = Plan(machine, parts, disk, (harvest + steps) / rate / 3600, "")
    return made if made.fits else made._replace(advice=_advice(shape, recipe, config, widths, memory_gb, machine))


def _size(machine: Machine) -> int:
    return 2 if machine.bf16 else 4


def _memory(
    shape: Shape, recipe: Recipe, config: TrainConfig, widths: Sequence[int], memory_gb: float, machine: Machine
) -> dict[str, float]:
    d, size, width = shape.d_model, _size(machine), max(widths)
    distinct, batch = min(config.tokens, recipe.harvest), config.batch_size // ranks.size()
    waiting = min(memory_gb * 1e9, distinct * d * size * (2 if recipe.stream else 1))
    shard = min(SHARD_TOKENS, distinct) * d * size
    calibration = CALIBRATION_BATCHES * CALIBRATION_BATCH * d * (4 + size)
    # matrices of z: three or so in a sparse step, six where theta is calibrated and in a dense step
    step = 4 * width * max((6 if machine.gpu else 3) * batch, 6 * CALIBRATION_BATCH)
    saes = 16 * sum(2 * d * width + width + d for width in widths)
    working = {
        "SAE and Adam": saes,
        "activations": waiting + shard + calibration,
        "a harvest": HARVEST_GB * 1e9,
        "a step": step,
    }
    parts = {"model": float(shape.params * size)}
    if not machine.gpu:
        parts = {"Python": PYTHON_GB * 1e9, **parts}
    if not machine.gpu and shape.file_bytes > sum(working.values()):  # the file that the weights are read from
        working = {"reading the weights": float(shape.file_bytes)}
    return {name: number / 1e9 for name, number in (parts | working).items()}


def _advice(
    shape: Shape, recipe: Recipe, config: TrainConfig, widths: Sequence[int], memory_gb: float, machine: Machine
) -> str:
    least = 2 * SHARD_TOKENS * shape.d_model * _size(machine) / 1e9  # what shuffling needs
    for share in (1, 2, 4, 8):
        alone = len(widths) == 1
        smaller = [widths[0] // share] if alone else list(widths[: max(1, len(widths) // share)])
        for batch in (config.batch_size, config.batch_size // 2, config.batch_size // 4):
            data = max(least, memory_gb / 4)
            parts = _memory(shape, recipe, replace(config, batch_size=batch), smaller, data, machine)
            if sum(parts.values()) < 0.95 * machine.memory_gb:
                width = f" --d-sae {smaller[0]}" if share > 1 and alone else ""
                fewer = f" {len(smaller)} of the {len(widths)} SAEs" if share > 1 and not alone else ""
                return f"`--memory-gb {data:.2f} --batch-size {batch}{width}` would fit{fewer}"
    return f"nothing smaller fits: the language model alone takes {shape.params * _size(machine) / 1e9:.1f} GB"


def recipes_table() -> str:
    """Every recipe: what it trains, and what that takes here and on common GPUs."""
    here = this_machine()
    lines = [f"On {here.name}, {here.memory_gb:.0f} GB free, {here.flops / 1e12:.2f} TFLOP/s in a large product:"]
    named = [*RECIPES.items(), *((f"{name} --full", recipe) for name, recipe in FULL.items())]
    named += [(f"{name} --full --grid paper", recipe) for name, recipe in FULL.items() if recipe.grid]
    for name, recipe in named:
        widths = [width for _, width, _ in recipe.grid] if "grid" in name else [recipe.d_sae]
        what = f"{len(widths)} SAEs" if "grid" in name else f"width {recipe.d_sae}, k {recipe.k}"
        model = name.split()[0]
        lines.append(f"{name}: {what}, {recipe.config.tokens:,} activations seen, {recipe.harvest:,} of them distinct")
        found = plan(model, recipe, recipe.config, widths, machine=here)
        lines.append(f"    {found}" + ("" if found.fits else f"; does not fit: {found.advice}"))
        if model != "smollm2-135m":
            plans = [plan(model, recipe, recipe.config, widths, machine=machine) for machine in MACHINES]
            fitting = [f"{p.machine.name} {p.memory_gb:.0f} GB, {in_words(p.hours)}" for p in plans if p.fits]
            small = [f"{p.machine.name} is too small ({p.advice})" for p in plans if not p.fits]
            lines.append("    by arithmetic: " + "; ".join(fitting + small))
    return "\n".join(lines)
