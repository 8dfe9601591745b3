"""`python -m benchmarks.scaling`: what one of our training steps costs as each size doubles, and where the time goes.

From a base, the batch, d_sae, k and d_in are doubled in turn, for BatchTopK and TopK by the fast path. Parts of a step:
the encoder's matrix product (timed by itself, on the same sizes; 0 where bfloat16 is fast, for there the selection of
BatchTopK contains it), the selection, the rest of the forward pass (above all the decoder), the backward pass, and the
update (projection, Adam, decoder norms). All sizes take turns, one step each a round, so that a slow minute of the
machine falls on all of them; medians over rounds. The data are made up, and latents are kept alive, as in
`benchmarks.step`. Writes `benchmarks/results/scaling.json`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tutorial_sae
from benchmarks.peers import Ours, Size
from benchmarks.step import batches
from tutorial_sae import sparse
from tutorial_sae.runtime import hardware, versions, write_json

RESULTS = Path(__file__).parent / "results" / "scaling.json"
BASE = Size(576, 4608, 32, 1024)
QUICK = Size(32, 256, 4, 64)
VARIANTS = ("batchtopk", "topk")
PARTS = ("product", "selection", "rest of forward", "backward", "update")
ROUNDS, WARMUP, BATCHES = 9, 5, 4


def grid(base: Size) -> dict[str, Size]:
    """The base, and each of its sizes doubled."""
    doubled = {
        f"2 × {field}": base._replace(**{field: 2 * getattr(base, field)}) for field in ("batch", "d_sae", "k", "d_in")
    }
    return {"base": base} | doubled


class Watched(Ours):
    """Our step, with a note of when its parts begin and end."""

    def __init__(self, size: Size, variant: str):
        super().__init__(size, variant)
        self.data, _ = batches(size, None, BATCHES)
        self.z = torch.empty(size.batch, size.d_sae)
        self.at = 0

    def parts(self) -> dict[str, float]:
        """Milliseconds of the parts of one more step, and of the whole."""
        x = self.data[self.at % BATCHES]
        self.at += 1
        self.prepare(0)
        marks, rough = {"selection": 0.0}, sparse.keep_largest_rough

        def clocked(select: Any) -> Any:
            def inner(*arguments: Any) -> Any:
                start = time.perf_counter()
                result = select(*arguments)
                marks["selection"] += time.perf_counter() - start
                if select is rough and result is not None:
                    marks["product in selection"] = 1.0
                return result

            return inner

        def backward(loss: torch.Tensor) -> None:
            marks["backward starts"] = time.perf_counter()
            torch.autograd.backward(loss)
            marks["backward ends"] = time.perf_counter()

        with (
            mock.patch.object(sparse, "keep_largest", clocked(sparse.keep_largest)),
            mock.patch.object(sparse, "keep_largest_rough", clocked(rough)),
            mock.patch.object(sparse, "keep_row", clocked(sparse.keep_row)),
            mock.patch.object(torch.Tensor, "backward", backward),
        ):
            start = time.perf_counter()
            self.step(x)
            end = time.perf_counter()
        with torch.no_grad():
            before = time.perf_counter()
            torch.mm(x, self.sae.W_enc, out=self.z)
            product = 0.0 if "product in selection" in marks else time.perf_counter() - before
        seconds = {"product": product, "selection": marks["selection"]}
        seconds["rest of forward"] = marks["backward starts"] - start - sum(seconds.values())
        seconds["backward"] = marks["backward ends"] - marks["backward starts"]
        seconds["update"] = end - marks["backward ends"]
        return {name: 1e3 * value for name, value in (seconds | {"total": end - start}).items()}


def measure(base: Size = BASE, rounds: int = ROUNDS, warmup: int = WARMUP) -> list[dict[str, Any]]:
    cases = {(variant, name): Watched(size, variant) for variant in VARIANTS for name, size in grid(base).items()}
    seen: dict[Any, dict[str, list[float]]] = {case: defaultdict(list) for case in cases}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for case, contender in cases.items():
                parts = contender.parts()
                gc.collect(0)
                for part, ms in parts.items() if i >= warmup else ():
                    seen[case][part].append(ms)
    finally:
        gc.enable()
    rows = []
    for (variant, name), size in zip(cases, len(VARIANTS) * list(grid(base).values()), strict=True):
        mine = seen[variant, name]
        ratio = statistics.median(a / b for a, b in zip(mine["total"], seen[variant, "base"]["total"], strict=True))
        ms = {part: statistics.median(values) for part, values in mine.items()}
        rows.append({"variant": variant, "case": name, **size._asdict(), "ratio": ratio, "ms": ms})
    return rows


def table(results: dict[str, Any]) -> str:
    head = ("variant", "case", "ms", "against base", *PARTS)
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in results["rows"]:
        cells = [row["variant"], row["case"], f"{row['ms']['total']:.4g}", f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells + [f"{row['ms'][part]:.3g}" for part in PARTS]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, nothing written: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rounds, warmup = (2, 3) if options.quick else (ROUNDS, WARMUP)
    meta = {
        "rounds": rounds,
        "hardware": hardware(),
        "versions": versions("torch", "numpy") | {"tutorial-sae": tutorial_sae.__version__},
    }
    results = {"meta": meta, "rows": measure(QUICK if options.quick else BASE, rounds, warmup)}
    if not options.quick:
        write_json(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
