"""What test_ranks.py starts with torchrun: `ranks_program.py FOLDER`. Each rank writes what it ended with."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_models import ToyModel
from test_training import activations, batchtopk, stop_at

from tutorial_sae import (
    ActivationStore,
    BatchTopKSAE,
    JumpReLUSAE,
    TopKSAE,
    TrainConfig,
    VanillaSAE,
    load_text,
    ranks,
    train,
)
from tutorial_sae.saes import keep_batch

D_IN, D_SAE = 16, 48
SETTINGS: dict[str, Any] = {"tokens": 3_200, "batch_size": 64, "lr": 2e-3, "dead_after_tokens": 200}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "batchtopk": (lambda: dead_in(batchtopk()), {}),
    "batchtopk, reference": (lambda: dead_in(batchtopk()), {"fast": False}),
    "batchtopk, local cut": (batchtopk, {"batch_cut": "local"}),
    "topk": (lambda: dead_in(TopKSAE(D_IN, D_SAE, k=4)), {}),
    "jumprelu": (lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=0.5), {}),
    "vanilla": (lambda: VanillaSAE(D_IN, D_SAE, l1=0.5), {}),
    "resampled": (lambda: dead_in(VanillaSAE(D_IN, D_SAE, l1=0.5)), {"revive": "resample"}),
}


def dead_in(sae: Any) -> Any:
    """Some latents that cannot fire, so that what is done for the dead is done."""
    with torch.no_grad():
        sae.b_enc[:6] = -100.0
    return sae


def matrix(tokens: int = 64) -> torch.Tensor:
    """Few distinct values, so that the cut runs through many equal entries."""
    return (torch.randn(tokens, 12, generator=torch.Generator().manual_seed(5)).relu() * 2).round() / 2


def own(x: torch.Tensor) -> torch.Tensor:
    share = len(x) // ranks.size()
    return x[ranks.rank() * share : (ranks.rank() + 1) * share]


def runs() -> dict[str, torch.Tensor]:
    """The end of every run, and the last line of its metrics."""
    found = {}
    for name, (make, options) in RUNS.items():
        result = train(make(), activations(), TrainConfig(**SETTINGS | options))
        found |= {f"{name}/{key}": value.contiguous() for key, value in result.sae.state_dict().items()}
        line = [value for key, value in result.history[-1].items() if key != "seconds"]
        found[f"{name}/log"] = torch.tensor(line, dtype=torch.float64)
        assert result.calibration is None or result.calibration.theta > 0
    return found


def cuts() -> dict[str, torch.Tensor]:
    found = {}
    with ranks.together():
        for k in (0.1, 1, 2.5, 3, 11.9):
            found[f"cut/{k}"] = keep_batch(own(matrix()), k).contiguous()
            with ranks.apart():
                found[f"own cut/{k}"] = keep_batch(own(matrix()), k).contiguous()
    return found


def stopped(folder: Path) -> None:
    """A run that one rank alone is asked to stop: all of them leave at the same step."""
    sae = batchtopk()
    if ranks.rank() == ranks.size() - 1:
        stop_at(sae, 20)
    try:
        train(sae, activations(), TrainConfig(**SETTINGS), out=folder / "stopped")
    except KeyboardInterrupt:
        return
    raise AssertionError("nobody stopped")


def store(folder: Path) -> ActivationStore:
    """A stream of which each rank reads documents of its own."""
    text = load_text(folder / "numbers.jsonl", stream=True)
    return ActivationStore(ToyModel(), text, "blocks.2.hook_resid_post", tokens=6_400, context=16, stream=True)


def streamed(folder: Path, sae: Any, name: str) -> Any:
    settings = TrainConfig(tokens=6_400, batch_size=64, lr=2e-3)
    return train(sae, store(folder), settings, out=folder / name)


def streams(folder: Path) -> dict[str, torch.Tensor]:
    """A whole run on a stream, one that is stopped, and which tokens this rank saw first."""
    seen = torch.cat(list(islice(store(folder).batches(32), 10)))[:, 0].long()
    result = streamed(folder, BatchTopKSAE(8, 32, k=3), "streamed")
    sae = BatchTopKSAE(8, 32, k=3)
    stop_at(sae, 40)
    try:
        streamed(folder, sae, "stopped stream")
    except KeyboardInterrupt:
        found = {f"stream/{key}": value.contiguous() for key, value in result.sae.state_dict().items()}
        return found | {"seen": seen}
    raise AssertionError("nobody stopped")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks.joined():
        found = runs() | cuts() | streams(folder)
        stopped(folder)
        if ranks.rank() == 0:
            try:
                train(batchtopk(), activations(), replace(TrainConfig(**SETTINGS), batch_size=65))
            except ValueError as error:
                (folder / "refused").write_text(str(error))
        save_file(found, folder / f"rank{ranks.rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
