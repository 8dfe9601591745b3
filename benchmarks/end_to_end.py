"""`python -m benchmarks.end_to_end`: what a user waits for, the harvest and the training, against other libraries.

Harvest: tokens per second through the embedded model up to its hook point, by threads and rows at once.

Training: seconds until held-out FVU is down to what the least good contender ends with. All train on the same cached
activations of the embedded model (centred and scaled for all alike), width 2304, k = 32, in batches of 1024, with the
same learning-rate schedule, each at two peak rates; of each library the better rate counts, and all are in the results.
The contenders take turns step by step, so that whatever else the machine does slows all of them. The clock runs in
steps only; FVU (centred, a ratio of sums) is measured between them, with the cut that each was trained with: BatchTopK
over batches of 4096, TopK by row.

Paths: 200 steps by our fast path and by our dense one, from two starts; their held-out FVU, side by side.

Writes `benchmarks/results/end_to_end.json`. `--quick` runs a few steps and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import tutorial_sae
from benchmarks import peers
from benchmarks.peers import Contender, Ours, SAELens, Size, Sparsify
from tutorial_sae.measures import fvu
from tutorial_sae.runtime import cache_dir, generator, hardware, save_tensors, set_threads, versions, write_json

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
SIZE = Size(576, 2304, 32, 1024)
TOKENS, DISTINCT, HELDOUT, EVERY, STEPS = 512_000, 200_000, 16_384, 25, 200
RATES = (1e-3, 3e-3)
CONTENDERS: dict[str, Callable[[float, int], Contender]] = {
    "ours (BatchTopK)": lambda lr, steps: Ours(SIZE, lr=lr, steps=steps),
    "ours (TopK)": lambda lr, steps: Ours(SIZE, "topk", lr=lr, steps=steps),
    "sae-lens (BatchTopK)": lambda lr, steps: SAELens(SIZE, lr=lr, steps=steps),
    "sparsify (TopK)": lambda lr, steps: Sparsify(SIZE, lr=lr, steps=steps),
}


def export() -> Path:
    """Training and held-out activations, for a process that has no TransformerLens 4."""
    from tutorial_sae import ActivationStore, load_model, load_text

    model = load_model("smollm2-135m")
    store = ActivationStore(model, load_text(), tokens=DISTINCT)
    held = ActivationStore(model, load_text(split="heldout"), tokens=HELDOUT, norm_limit=store.norm_limit)
    path = cache_dir("peers") / "smollm2-135m-train.safetensors"
    x = store[:]
    mean = x.mean(dim=0)
    scale = ((x - mean).square().sum(dim=1).mean() / store.d_in).sqrt()
    save_tensors(path, {"train": (x - mean) / scale, "heldout": (held[:] - mean) / scale})
    return path


def harvest(seconds: float = 6.0) -> list[dict[str, float]]:
    """Tokens per second to the hook point, by threads and by rows of 128 tokens at once."""
    from tutorial_sae import load_model, load_text
    from tutorial_sae.models import activations_at

    model = load_model("smollm2-135m")
    tokens = next(load_text(tokens=64 * 128).rows(model, 128, 64)).tokens.long()
    used = torch.get_num_threads()
    rows = []
    for threads in sorted({1, used}):
        set_threads(threads)
        for at_once in (4, 8, 16, 32):
            activations_at(model, tokens[:at_once], model.default_hook)
            done, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                first = done % (len(tokens) - at_once + 1)
                activations_at(model, tokens[first : first + at_once], model.default_hook)
                done += at_once
            rate = 128 * done / (time.perf_counter() - start)
            rows.append({"threads": threads, "rows_at_once": at_once, "tokens_per_second": rate})
            print(rows[-1], file=sys.stderr, flush=True)
    set_threads(used)
    return rows


@torch.no_grad()
def heldout_fvu(contender: Contender, x: Tensor) -> float:
    return fvu(x, torch.cat([contender.reconstruct(part) for part in x.split(4096)]))


def race(path: Path, steps: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The curves (seconds, held-out FVU) of every contender and rate, and why some have none."""
    data = load_file(path)
    train, held = data["train"], data["heldout"]
    running: dict[tuple[str, float], Contender] = {}
    missing: dict[str, str] = {}
    for name, make in CONTENDERS.items():
        for lr in RATES:
            torch.manual_seed(0)
            try:
                running[name, lr] = make(lr, steps)
            except ImportError as error:
                missing[name] = str(error)
    seconds = dict.fromkeys(running, 0.0)
    curves: dict[tuple[str, float], list[tuple[float, float]]] = {key: [] for key in running}
    order, chance = list(running), random.Random(0)
    chosen = generator(0, "race")
    for step in range(1, steps + 1):
        x = train[torch.randint(len(train), (SIZE.batch,), generator=chosen)]
        chance.shuffle(order)
        for key in order:
            start = time.perf_counter()
            running[key].step(x)
            seconds[key] += time.perf_counter() - start
        if step % EVERY == 0 or step == steps:
            for key in order:
                curves[key].append((seconds[key], heldout_fvu(running[key], held)))
            shown = {f"{name} {lr:g}": round(curves[name, lr][-1][1], 4) for name, lr in running}
            print(step, shown, file=sys.stderr, flush=True)
    return [{"name": name, "lr": lr, "curve": curve} for (name, lr), curve in curves.items()], missing


def paths(path: Path, steps: int) -> list[dict[str, Any]]:
    """Held-out FVU after some steps of BatchTopK by either path, from two starts each."""
    data = load_file(path)
    rows = []
    for seed in (0, 1):
        for fast in (True, False):
            contender = Ours(SIZE, fast=fast, steps=steps, seed=seed)
            chosen = generator(seed, "paths")
            for _ in range(steps):
                contender.step(data["train"][torch.randint(len(data["train"]), (SIZE.batch,), generator=chosen)])
            rows.append({"seed": seed, "fast": fast, "fvu": heldout_fvu(contender, data["heldout"])})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def reached(curve: list[list[float]], target: float) -> float:
    """Seconds after which the curve is down to `target`, between its points by a straight line."""
    before = (0.0, float("inf"))
    for seconds, value in curve:
        if value <= target:
            if before[1] == float("inf"):
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - target) / (before[1] - value)
        before = (seconds, value)
    return float("inf")


def best(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each contender the run with the lowest final FVU."""
    runs: dict[str, dict[str, Any]] = {}
    for run in results["runs"]:
        if run["name"] not in runs or run["curve"][-1][1] < runs[run["name"]]["curve"][-1][1]:
            runs[run["name"]] = run
    return runs


def table(results: dict[str, Any]) -> str:
    """Time to the same held-out FVU, and the rates of harvest, as two Markdown tables."""
    runs = best(results)
    target = max(run["curve"][-1][1] for run in runs.values())
    ours = reached(runs["ours (BatchTopK)"]["curve"], target)
    lines = [f"| | rate | final FVU | seconds in all | to FVU {target:.3f} | times ours |", "|---|" + "---:|" * 5]
    for name, run in runs.items():
        needed, (whole, final) = reached(run["curve"], target), run["curve"][-1]
        lines.append(f"| {name} | {run['lr']:g} | {final:.4f} | {whole:.0f} | {needed:.0f} | {needed / ours:.1f} |")
    lines += [f"\n{name} did not run: {why}" for name, why in results["missing"].items()]
    fvus = {(row["seed"], row["fast"]): row["fvu"] for row in results["paths"]}
    shown = [f"seed {seed}: {fvus[seed, True]:.5f} and {fvus[seed, False]:.5f}" for seed in (0, 1)]
    lines += ["", f"FVU after {STEPS} steps by the fast path and by the dense one, " + "; ".join(shown) + "."]
    at_once = sorted({row["rows_at_once"] for row in results["harvest"]})
    lines += ["", "| tokens/s, threads | " + " | ".join(f"{128 * rows:,} at once" for rows in at_once) + " |"]
    lines += ["|---|" + "---:|" * len(at_once)]
    for threads in sorted({row["threads"] for row in results["harvest"]}):
        found = {r["rows_at_once"]: r["tokens_per_second"] for r in results["harvest"] if r["threads"] == threads}
        lines.append(f"| {threads} | " + " | ".join(f"{found[rows]:,.0f}" for rows in at_once) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end")
    parser.add_argument("--quick", action="store_true", help="a few steps, nothing written: does it run?")
    parser.add_argument("--activations", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--harvest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not peers.inside():
        measured = cache_dir("peers") / "harvest.json"
        write_json(measured, harvest(0.5 if options.quick else 6.0))
        try:
            more = ["--activations", str(export()), "--harvest", str(measured)]
            sys.exit(peers.run_inside("benchmarks.end_to_end", arguments + more))
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"no environment for the other libraries: {error}")
    steps = 2 * EVERY if options.quick else TOKENS // SIZE.batch
    both = paths(options.activations, 4 if options.quick else STEPS)
    runs, missing = race(options.activations, steps)
    results = {
        "meta": {
            "size": SIZE._asdict(),
            "tokens_seen": steps * SIZE.batch,
            "tokens_distinct": DISTINCT,
            "tokens_heldout": HELDOUT,
            "hardware": hardware(),
            "versions": versions(*peers.PACKAGES) | {"tutorial-sae": tutorial_sae.__version__},
        },
        "harvest": json.loads(options.harvest.read_text(encoding="utf-8")),
        "paths": both,
        "runs": runs,
        "missing": missing,
    }
    if not options.quick:
        write_json(RESULTS, results)
    print(table(results))


if __name__ == "__main__":
    main()
