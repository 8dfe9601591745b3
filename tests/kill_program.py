"""What test_resume.py starts: `kill_program.py MODEL TEXT FOLDER`. It loads everything once, and forks runs of
`python -m tutorial_sae train gpt2` that are killed (SIGKILL) at chosen moments and at random ones."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tutorial_sae import activations, cli, launch, load_model, load_sae, runtime, training

MODEL, TEXT, FOLDER = sys.argv[1:4]
OPTIONS = ["--model", MODEL, "--text", TEXT, "--tokens", "9600", "--batch-size", "128", "--d-sae", "96", "--k", "6"]
OPTIONS += ["--checkpoint-seconds", "0.05", "--memory-gb", "0.0016"]


def command(out: Path) -> list[str]:
    return ["train", "gpt2", *OPTIONS, "--out", str(out), "--resume"]


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: Any, name: str, number: int) -> Callable[[], None]:
    """Die at the `number`-th call of a function."""

    def prepare() -> None:
        original, calls = getattr(module, name), iter(range(1, 10**6))

        def dying(*given: Any, **named: Any) -> Any:
            if next(calls) == number:
                die()
            return original(*given, **named)

        setattr(module, name, dying)

    return prepare


def while_renaming(number: int) -> Callable[[], None]:
    """Die when a file is whole, but under its temporary name."""
    return at_call(runtime.os, "replace", number)


def half_written() -> None:
    """Die in the middle of writing a checkpoint."""
    import safetensors.torch

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of a file")
        die()

    safetensors.torch.save_file = save


MOMENTS: dict[str, Callable[[], None]] = {
    "the first harvest": at_call(activations, "activations_at", 2),
    "a later harvest": at_call(activations, "activations_at", 7),
    "a step": at_call(training._Run, "update", 9),
    "a later step": at_call(training._Run, "update", 30),
    "the first checkpoint": half_written,
    "the name of a checkpoint": while_renaming(3),
    "the metrics beside it": while_renaming(4),
    "calibration": at_call(training, "calibrate_threshold", 1),
    "the end": at_call(training, "write_json", 1),
}


def fork(prepare: Callable[[], None] | None, out: Path, seconds: float | None = None) -> int:
    """Run once, and die at the moment prepared or after so long; gives the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        if prepare:
            prepare()
        os._exit(cli.main(command(out)))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(out: Path) -> list[str]:
    """Files under a final name that are not whole."""
    bad = []
    for path in (p for p in out.rglob("*") if p.is_file() and not p.name.endswith(".partial")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
        except Exception as error:
            bad.append(f"{path.name}: {error!r}")
    return bad


def main() -> None:
    torch.set_num_threads(1)
    # small, so that a run takes a second or two and harvests several times
    activations.SHARD_TOKENS, training.CALIBRATION_BATCHES, training.CALIBRATION_BATCH = 2048, 4, 512
    model = load_model(MODEL)
    launch.load_model = lambda name: model
    found: dict[str, Any] = {}
    straight = Path(FOLDER) / "straight"
    start = time.perf_counter()
    assert fork(None, straight) == 0
    seconds = time.perf_counter() - start
    wanted = load_sae(straight).state_dict()
    for name, prepare in MOMENTS.items():
        out = Path(FOLDER) / name.replace(" ", "-")
        killed = fork(prepare, out)
        bad = whole(out)
        again = fork(None, out)
        got = load_sae(out).state_dict()
        same = all(torch.equal(wanted[key], got[key]) for key in wanted)
        found[name] = {"killed": killed, "bad": bad, "again": again, "same": same}
    out, chance, kills = Path(FOLDER) / "random", random.Random(0), []
    for _ in range(6):
        kills.append(fork(None, out, chance.uniform(0.3, 0.9) * seconds))
    bad = whole(out)
    again = fork(None, out)
    got = load_sae(out).state_dict()
    same = all(torch.equal(wanted[key], got[key]) for key in wanted)
    left = [path.name for path in out.rglob("*.partial")]
    found["random"] = {"killed": kills, "bad": bad, "again": again, "same": same, "left": left}
    (Path(FOLDER) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
