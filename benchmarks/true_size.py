"""`python -m benchmarks.true_size`: the recipes at their true sizes on a CPU, with random weights and real text.

GPT-2 Small (124 million weights, its own tokenizer), 100 steps of 1024 activations at 768/12288: trained from a local
parquet file as a stream, killed (SIGKILL) after a checkpoint, resumed, killed by SIGTERM, resumed, evaluated, exported.
Gemma 2 2B cut after layer 12, at 2304/16384: 5 steps. For each command its peak memory, beside what `plan` says.
Random weights say nothing about the real models: what is measured is memory, time, and that every step works. Writes
`benchmarks/results/true_size.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import save_gemma_cut, save_gpt2_small, write_parquet
from tutorial_sae.runtime import hardware, versions, write_json

RESULTS = Path(__file__).parent / "results" / "true_size.json"
STEPS, BATCH = 100, 1024


def run(*arguments: str, kill: Any = None) -> dict[str, Any]:
    """One command, its peak memory in GB, its seconds, and what it said. `kill(seconds)` may name a signal to send."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", "tutorial_sae", *arguments], stdout=said, stderr=said)
        sent = None
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if sent is None and kill is not None and (sent := kill()) is not None:
                os.kill(process.pid, sent)
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    planned = re.search(r"plan for .*: ([\d.]+) GB of memory \(([^)]*)\)", text)
    return {
        "command": " ".join(arguments),
        "exit": process.returncode,
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "planned_gb": float(planned[1]) if planned else None,
        "planned": planned[2] if planned else None,
        "seconds": round(time.perf_counter() - start, 1),
        "said": text[-2000:],
    }


def after_checkpoint(folder: Path, signal_: int, count: int = 1) -> Any:
    """A signal once `count` checkpoints have been written in this process's time."""
    path, seen = folder / "checkpoint" / "state.safetensors", [0.0, 0]
    seen[0] = path.stat().st_mtime if path.exists() else 0.0

    def ask() -> int | None:
        now = path.stat().st_mtime if path.exists() else 0.0
        if now > seen[0]:
            seen[0], seen[1] = now, seen[1] + 1
        return signal_ if seen[1] >= count else None

    return ask


def main(names: list[str]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"hardware": hardware(), "versions": versions("tutorial-sae", "torch", "transformers", "safetensors")}
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), write_parquet(Path(place) / "text.parquet")
        recipes = {"gpt2": (save_gpt2_small, STEPS * BATCH, BATCH), "gemma-2-2b": (save_gemma_cut, 5 * BATCH, BATCH)}
        for name, (save, tokens, batch) in recipes.items():
            if names and name not in names:
                continue
            model, out = str(save(folder / name)), folder / f"run-{name}"
            sizes = ["--tokens", str(tokens), "--batch-size", str(batch), "--memory-gb", "1", "--out", str(out)]
            train = ["train", name, "--model", model, "--text", str(text), *sizes, "--checkpoint-seconds", "5"]
            steps = []
            if name == "gpt2":
                steps.append(run(*train, kill=after_checkpoint(out, signal.SIGKILL)))
                steps.append(run(*train, "--resume", kill=after_checkpoint(out, signal.SIGTERM)))
            steps.append(run(*train, "--resume"))
            if name == "gpt2":
                steps.append(run("evaluate", str(out), "--model", model, "--text", str(text)))
                steps.append(run("export", str(out), "--to", "sae_lens", str(folder / "sae_lens")))
            history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            for step in steps:
                step["command"] = step["command"].replace(place, "...")
                print(json.dumps(step, indent=1), flush=True)
            results[name] = {"commands": steps, "last": history[-1]}
            write_json(RESULTS, results)
            shutil.rmtree(model)


if __name__ == "__main__":
    main(sys.argv[1:])
