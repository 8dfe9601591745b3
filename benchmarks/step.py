"""`python -m benchmarks.step`: one training step on the CPU, against other libraries, the paper's reference, the floor.

A step is forward, loss, backward, what the library does to its decoder, Adam (`peers.py` says how each is driven).
The measurement is paired: in each round every contender takes one timed step on the same batch, in an order drawn anew,
and its speed is the reference's time in that round over its own; medians over rounds. Before that come untimed steps,
in which threads, memory and Adam settle, and ours finds its cut. All run in one process under the same settings; one of
them, set by `import tutorial_sae`, is that waiting threads sleep. Garbage is collected between steps, not in them.

With a quarter of the latents dead, AuxK is at work in every library that has one, at that library's own aux_k:
`Contender.prepare` tells how latents are made dead and kept so. It runs before each step, outside the clock; without
dead latents it sees to it that none are, for by the reference's rule many would be after five batches.

Memory is measured one contender at a time, each in a fresh process: the most it held during five steps, its parameters
and Adam's state included, above what it held once a tiny one of its kind had taken a step (so: imports, and the data).

Agreement holds our fast path against our dense one, on equal weights and batch: which entries are kept, and for each
parameter |g - g_dense| / |g_dense|, of which the largest counts.

Where d_in is the embedded model's, the data are its activations (from the cache, or a minute of harvest); elsewhere a
Gaussian with a power-law spectrum and a log-normal length. Both are centred and scaled to E|x|^2 = d_in for all.

Writes `benchmarks/results/step.json`. The largest size needs about 12 GB of memory, for all its contenders at once.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

import tutorial_sae
from benchmarks import peers
from benchmarks.peers import CONTENDERS, REFERENCE, Ours, Size
from tutorial_sae import sparse
from tutorial_sae.runtime import TutorialError, cache_dir, generator, hardware, save_tensors, versions, write_json

RESULTS = Path(__file__).parent / "results" / "step.json"
SIZES = (
    Size(768, 12288, 32, 1024),
    Size(576, 4608, 32, 2048),
    Size(2304, 16384, 32, 512),
    Size(576, 4608, 32, 2048, dead=1152),
)
QUICK = (Size(32, 256, 4, 64), Size(32, 256, 4, 64, dead=64))
ROUNDS, WARMUP, BATCHES, MEMORY_STEPS = 9, 5, 8, 5
REAL_TOKENS = 60_000


# -- data ----------------------------------------------------------------------------------------


def export_activations() -> Path | None:
    """A file of the embedded model's activations, for a process that has no TransformerLens 4."""
    from tutorial_sae import ActivationStore, load_model, load_text

    try:
        store = ActivationStore(load_model("smollm2-135m"), load_text(), tokens=REAL_TOKENS)
    except TutorialError as error:
        print(f"no real activations ({error}): made-up ones instead", file=sys.stderr)
        return None
    path = cache_dir("peers") / "smollm2-135m.safetensors"
    save_tensors(path, {"activations": store.sample(BATCHES * max(size.batch for size in SIZES))})
    return path


def batches(size: Size, path: Path | None, count: int = BATCHES) -> tuple[list[Tensor], str]:
    """Batches to cycle through, and what they are."""
    real = load_file(path)["activations"] if path is not None else torch.empty(0, 0)
    if real.shape[1] == size.d_in and len(real) >= count * size.batch:
        x, what = real[: count * size.batch].float(), "activations of smollm2-135m"
    else:
        chance = generator(0, "benchmark", *size)
        x = torch.randn(count * size.batch, size.d_in, generator=chance) * torch.arange(1, size.d_in + 1) ** -0.5
        x *= (0.3 * torch.randn(len(x), 1, generator=chance)).exp()
        what = "power-law Gaussian"
    x = x - x.mean(dim=0)
    x *= (size.d_in / x.square().sum(dim=1).mean()).sqrt()
    return list(x.split(size.batch)), what


# -- time ----------------------------------------------------------------------------------------


def timed(contender: peers.Contender, x: Tensor, dead: int) -> float:
    """Seconds of one step."""
    contender.prepare(dead)
    start = time.perf_counter()
    contender.step(x)
    seconds = time.perf_counter() - start
    if contender.dead() != dead:
        raise RuntimeError(f"it takes {contender.dead()} latents for dead, and {dead} were meant to be")
    return seconds


def measure(
    size: Size, names: Iterable[str], data: list[Tensor], rounds: int = ROUNDS, warmup: int = WARMUP
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """Time and speed of each contender, and why the others have none."""
    running: dict[str, peers.Contender] = {}
    missing: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            contender = CONTENDERS[name](size)
            for i in range(warmup):
                timed(contender, data[i % len(data)], size.dead)
            running[name] = contender
        except Exception as error:  # of another library: its row says so, the others go on
            if name in (REFERENCE, "ours"):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            missing[name] = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in running}
    order, chance = list(running), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            chance.shuffle(order)
            for name in order:
                seconds[name].append(timed(running[name], data[i % len(data)], size.dead))
                gc.collect(0)
    finally:
        gc.enable()
    rows: dict[str, dict[str, float | None]] = {}
    for name, mine in seconds.items():
        ratios = [reference / own for reference, own in zip(seconds[REFERENCE], mine, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ms, ratio = 1e3 * statistics.median(mine), statistics.median(ratios)
        rows[name] = {"ms": ms, "ratio": ratio, "ratio_q1": low, "ratio_q3": high}
    return rows, missing


# -- memory --------------------------------------------------------------------------------------


def peak_memory(reset: bool = False) -> float:
    """The most memory that this process has held (since the last reset, on Linux), in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def memory_here(name: str, size: Size, path: Path | None) -> float:
    """MB that five steps of a contender need, to be asked of a fresh process."""
    data, _ = batches(size, path, count=MEMORY_STEPS)
    tiny = Size(16, 64, 2, 16, dead=8 if size.dead else 0)
    for wanted, xs in ((tiny, [torch.randn(tiny.batch, tiny.d_in)]), (size, data)):
        gc.collect()
        before = peak_memory(reset=True)
        contender = CONTENDERS[name](wanted)
        for x in xs:
            contender.prepare(wanted.dead)
            contender.step(x)
        del contender
    return peak_memory() - before


def memory(name: str, size: Size, path: Path | None) -> float | None:
    """`memory_here` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--memory", name, json.dumps(size)]
    command += ["--activations", str(path)] if path else []
    child = subprocess.run(command, cwd=peers.ROOT, stdout=subprocess.PIPE, text=True)
    return float(child.stdout.splitlines()[-1]) if child.returncode == 0 else None


# -- agreement -----------------------------------------------------------------------------------


def agreement(size: Size, data: list[Tensor], warmup: int = 4) -> dict[str, float]:
    """How far our fast path and our dense path are apart, from the same weights on the same batch."""
    ours = Ours(size)
    for x in data[:warmup]:
        timed(ours, x, size.dead)
    ours.prepare(size.dead)
    fast, dense = ours.sae, copy.deepcopy(ours.sae)
    x = data[warmup % len(data)]
    with torch.no_grad():
        z = dense._pre(dense._normalized(x)[0]).flatten()
        wanted = dense.encode(x).flatten() > 0
    got = torch.zeros_like(wanted)

    def watched(select: Any) -> Any:
        def inner(*arguments: Any) -> Any:
            result = select(*arguments)
            if result is not None:  # None: it gives up, and another way of selecting takes over
                got.zero_()[result[0].index] = True
            return result

        return inner

    loss = dense.loss(x)
    dense.zero_grad()
    loss.total.backward()
    assert bool(loss.aux > 0) == bool(size.dead)
    fast.zero_grad()
    with (
        mock.patch.object(sparse, "keep_largest", watched(sparse.keep_largest)),
        mock.patch.object(sparse, "keep_largest_rough", watched(sparse.keep_largest_rough)),
    ):
        sparse.loss(fast, x).total.backward()
    assert got.any(), "sparse.py selects by other functions now: watch those"
    cut, other = z[wanted].min(), z[wanted ^ got]
    error = {}
    for (name, a), b in zip(dense.named_parameters(), fast.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        error[name] = float((b.grad - a.grad).norm() / a.grad.norm())
    return {
        "kept": int(wanted.sum()),
        "differ": len(other),
        "furthest_from_cut": float(((other - cut) / cut).abs().max()) if len(other) else 0.0,
        "gradient_error": max(error.values()),
    } | {f"gradient_error_{name}": value for name, value in error.items()}


# -- all of it -----------------------------------------------------------------------------------


def run(
    sizes: Iterable[Size],
    names: list[str],
    path: Path | None = None,
    *,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    with_memory: bool = True,
) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    for size in sizes:
        print(f"{size.name}: time, memory, agreement", file=sys.stderr, flush=True)
        data, what = batches(size, path)
        rows, missing = measure(size, names, data, rounds, warmup)
        for name, row in rows.items():
            row["memory_mb"] = memory(name, size, path) if with_memory else None
        agrees = {str(dead): agreement(size._replace(dead=dead), data) for dead in (0, size.d_sae // 4)}
        results.append({**size._asdict(), "data": what, "rows": rows, "missing": missing, "agreement": agrees})
        print(table({"sizes": results[-1:]}), file=sys.stderr, flush=True)
    return {
        "meta": {
            "rounds": rounds,
            "warmup": warmup,
            "hardware": hardware(),
            "versions": versions(*peers.PACKAGES) | {"tutorial-sae": tutorial_sae.__version__},
        },
        "sizes": results,
    }


def table(results: dict[str, Any]) -> str:
    """Two Markdown tables: speed against the reference, time and memory; and agreement of our two paths."""
    sizes = [(Size(*(entry[field] for field in Size._fields)), entry) for entry in results["sizes"]]
    names = [n for n in CONTENDERS if any(n in entry["rows"] or n in entry["missing"] for _, entry in sizes)]
    lines = ["| speed (ms, MB) | " + " | ".join(size.name for size, _ in sizes) + " |"]
    lines += ["|---|" + "---:|" * len(sizes)]
    for name in names:
        cells = []
        for _, entry in sizes:
            if (row := entry["rows"].get(name)) is None:
                cells.append("did not run" if name in entry["missing"] else "not measured")
                continue
            size_mb = "–" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
            cells.append(f"{row['ratio']:.{2 if row['ratio'] < 2 else 1}f} ({row['ms']:.4g}, {size_mb})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| fast against dense | entries kept | that differ | furthest from the cut | gradient error |"]
    lines += ["|---|" + "---:|" * 4]
    seen = set()
    for size, entry in sizes:
        for dead, found in entry["agreement"].items():
            name = size._replace(dead=int(dead)).name
            if name not in seen:
                cells = (f"{found['kept']:,}", found["differ"], *(f"{found[key]:.1e}" for key in FAR))
                lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
            seen.add(name)
    reasons = {(n, why) for _, entry in sizes for n, why in entry["missing"].items()}
    return "\n".join(lines + [f"\n{name} did not run: {why}" for name, why in sorted(reasons)])


FAR = ("furthest_from_cut", "gradient_error")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, nothing written: does it run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size", type=int, action="append", help="only this one of SIZES, counted from 0")
    parser.add_argument("--no-peers", action="store_true", help="without the other libraries, in this Python")
    parser.add_argument("--out", type=Path, help=f"where to write; default for a whole run: {RESULTS.name}")
    parser.add_argument("--activations", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory:
        name, size = options.memory
        print(memory_here(name, Size(*json.loads(size)), options.activations))
        return
    if options.activations is None and not options.quick and not peers.inside():
        options.activations = export_activations()
        arguments = arguments + (["--activations", str(options.activations)] if options.activations else [])
    names = peers.contenders(hardware()["fast_bf16"])
    if options.no_peers:
        names = [name for name in names if name not in peers.LIBRARIES]
    elif not peers.inside():
        try:
            sys.exit(peers.run_inside("benchmarks.step", arguments))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no environment for the other libraries ({error}): their rows stay empty", file=sys.stderr)
    sizes = QUICK if options.quick else [SIZES[i] for i in options.size or range(len(SIZES))]
    rounds, warmup = (2, 3) if options.quick else (options.rounds, WARMUP)
    results = run(sizes, names, options.activations, rounds=rounds, warmup=warmup)
    whole = not (options.quick or options.size or options.no_peers)
    if out := options.out or (RESULTS if whole else None):
        write_json(out, results)
    print(table(results))


if __name__ == "__main__":
    main()
