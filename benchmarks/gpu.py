"""`python -m benchmarks.gpu [PART ...]`: what a GPU makes of it: correctness first, then rates.

    correct      a step in bfloat16 products against the float32 reference, on the GPU and on the CPU; that nothing in
                 a step makes the host wait (PyTorch's own watch on synchronisations)
    step         activations per second of a BatchTopK step, and of the others, at the sizes of the recipes
    harvest      tokens per second of GPT-2 Small up to layer 8, and of Gemma 2 2B up to layer 12 (random weights)
    run          a stream of real text, harvest and training together: one SAE, and several on the same harvest
    quality      TopK, BatchTopK, JumpReLU and vanilla on the embedded model, 100 million activations, three seeds

Each part adds its results to `benchmarks/results/gpu.json`, with the hardware. Without a GPU every part but the last
can be tried on a CPU with `--tiny`, at sizes of no interest; nothing is written then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import save_gemma_cut, save_gpt2_small, write_parquet
from tutorial_sae import ActivationStore, BatchTopKSAE, TopKSAE, TrainConfig, evaluate, load_model, load_text, sparse
from tutorial_sae.metrics import Heldout
from tutorial_sae.models import activations_at
from tutorial_sae.runtime import hardware, pick_device, versions, write_json
from tutorial_sae.saes import SAE, VARIANTS
from tutorial_sae.training import RECIPES, _Run, calibration_activations, train, train_together

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SIZES = [(768, 12288, 4096), (768, 24576, 4096), (2304, 16384, 4096), (2304, 65536, 4096)]
TINY = [(48, 192, 64)]
K = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": K},
    "topk": {"k": K},
    "jumprelu": {"target_l0": K, "theta": 1.0},
    "vanilla": {"l1": 2.1},
}


def activations(d_in: int, count: int, device: torch.device) -> torch.Tensor:
    """Sparse combinations of directions: a step's speed depends on how many entries tie and survive, not on meaning."""
    chance = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=chance)
    codes = torch.rand(count, 4 * d_in, generator=chance) * (torch.rand(count, 4 * d_in, generator=chance) < 0.02)
    return (codes @ directions).to(device)


def made(variant: str, d_in: int, d_sae: int, x: torch.Tensor) -> SAE:
    sae = VARIANTS[variant](d_in, d_sae, **SETTINGS[variant]).to(x.device)
    sae.fit_normalization(x)
    return sae.train()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def correct(sizes: list[Any], device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for d_in, d_sae, batch in sizes[:1] + sizes[2:3]:
        x = activations(d_in, batch, device)
        for variant in SETTINGS:
            rough, exact = made(variant, d_in, d_sae, x), made(variant, d_in, d_sae, x.cpu())
            losses = [sparse.mixed(rough, x), exact.loss(x.cpu())]
            for loss in losses:
                loss.total.backward()
            pairs = zip(rough.named_parameters(), exact.parameters(), strict=True)
            off = {
                name: float((p.grad.cpu() - q.grad).norm() / q.grad.norm())  # type: ignore[union-attr]
                for (name, p), q in pairs
                if q.grad is not None and q.grad.norm() > 0
            }
            row = {"variant": variant, "d_in": d_in, "d_sae": d_sae, "loss_relative": float(losses[0].total.detach())}
            row["loss_relative"] = row["loss_relative"] / float(losses[1].total.detach()) - 1
            rows.append(row | {"l0": [float(loss.l0) for loss in losses], "gradients_relative": off})
            if device.type == "cuda":
                run = _Run(made(variant, d_in, d_sae, x), TrainConfig(batch_size=batch), None, [])
                run.update(x)
                run.sae.alive_until = 10**9
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run.update(x)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                rows[-1]["host_waits"] = 0
    return rows


def step(sizes: list[Any], device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for d_in, d_sae, batch in sizes:
        x = activations(d_in, batch, device)
        for variant in SETTINGS:
            run = _Run(made(variant, d_in, d_sae, x), TrainConfig(batch_size=batch), None, [])
            run.sae.alive_until = 10**12  # none dead, as in most of a run

            def once(run: _Run = run, x: torch.Tensor = x) -> None:
                run.update(x)

            seconds = timed(once, device)
            row = {"variant": variant, "d_in": d_in, "d_sae": d_sae, "batch": batch, "ms": 1000 * seconds}
            rows.append(row | {"tokens_per_second": batch / seconds, "path": run.loss.__name__})
            if device.type == "cuda":
                rows[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
            print(rows[-1], flush=True)
    return rows


def timed(once: Callable[[], None], device: torch.device, rounds: int = 5, each: int = 20) -> float:
    """Median seconds of one call, after a warm-up."""
    found = []
    for _ in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        for _ in range(each if device.type == "cuda" else 2):
            once()
        wait(device)
        found.append((time.perf_counter() - start) / (each if device.type == "cuda" else 2))
    return statistics.median(found[1:])


def models(folder: Path, tiny: bool) -> dict[str, tuple[str, str]]:
    """Model folders and hook points."""
    if tiny:
        from tests.small_models import save_gpt2

        return {"gpt2": (str(save_gpt2(folder / "gpt2")), "blocks.8.hook_resid_pre")}
    return {
        "gpt2": (str(save_gpt2_small(folder / "gpt2")), "blocks.8.hook_resid_pre"),
        "gemma-2-2b": (str(save_gemma_cut(folder / "gemma")), "blocks.12.hook_resid_post"),
    }


def harvest(folder: Path, tiny: bool, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name, (path, hook) in models(folder / "harvest", tiny).items():
        model = load_model(path, device=device)
        count = 2 if tiny else 128
        tokens = torch.randint(5, 300, (count, 128), generator=torch.Generator().manual_seed(0))

        def once(model: Any = model, tokens: torch.Tensor = tokens, hook: str = hook) -> None:
            activations_at(model, tokens, hook)

        seconds = timed(once, device)
        rows.append({"model": name, "dtype": model.card.dtype, "tokens_per_second": tokens.numel() / seconds})
        print(rows[-1], flush=True)
    return rows


def run(folder: Path, tiny: bool, device: torch.device) -> list[dict[str, Any]]:
    rows, text = [], load_text(write_parquet(folder / "text.parquet"), stream=True)
    for name, (path, hook) in models(folder / "run", tiny).items():
        model = load_model(path, device=device)
        d_sae, tokens = (192, 20_000) if tiny else (RECIPES[name].d_sae, 2_500_000)
        config = TrainConfig(tokens=tokens, batch_size=256 if tiny else 4096, lr=3e-4)
        for count in (1, 2 if tiny else 4):
            store = ActivationStore(model, text, hook, tokens=tokens, stream=True, memory_gb=0.1 if tiny else 2)
            kinds = [BatchTopKSAE, TopKSAE] * count
            saes: list[SAE] = [kind(store.d_in, d_sae, k=K, seed=i).to(device) for i, kind in enumerate(kinds[:count])]
            wait(device)
            start = time.perf_counter()
            train_together(saes, store, config, outs=[None] * count)
            wait(device)
            seconds = time.perf_counter() - start
            rows.append({"model": name, "saes": count, "d_sae": d_sae, "tokens": tokens, "seconds": seconds})
            rows[-1]["tokens_per_second"] = tokens / seconds
            print(rows[-1], flush=True)
    return rows


def quality(device: torch.device) -> list[dict[str, Any]]:
    """100 million activations seen, of 3 million: what more training does to the order of the variants."""
    model, rows = load_model("smollm2-135m", device=device), []
    heldout = None
    for seed in range(3):
        store = ActivationStore(model, load_text(), tokens=3_000_000, seed=seed, memory_gb=8)
        heldout = heldout or Heldout(
            model, load_text(split="heldout"), norm_limit=store.norm_limit, tokens=60_000, ce_tokens=12_000
        )
        calibration = calibration_activations(model, store.hook, store.norm_limit)
        for variant, settings in SETTINGS.items():
            sae = VARIANTS[variant](store.d_in, 4608, seed=seed, **settings).to(device)
            config = TrainConfig(tokens=100_000_000, batch_size=4096, lr=1e-3)
            result = train(sae, store, config, calibration=calibration if variant == "batchtopk" else None)
            row = {"variant": variant, "seed": seed, "seconds": result.seconds}
            rows.append(row | evaluate(result.sae, model, heldout).numbers())
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What a GPU makes of it.")
    parser.add_argument("parts", nargs="*", default=["correct", "step", "harvest", "run"])
    parser.add_argument("--tiny", action="store_true", help="try it out on any machine; nothing is written")
    options = parser.parse_args()
    device = pick_device()
    if device.type != "cuda" and not options.tiny:
        raise SystemExit("there is no GPU here: --tiny tries the script out")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    sizes = TINY if options.tiny else SIZES
    with tempfile.TemporaryDirectory() as place:
        parts: dict[str, Callable[[], Any]] = {
            "correct": lambda: correct(sizes, device),
            "step": lambda: step(sizes, device),
            "harvest": lambda: harvest(Path(place), options.tiny, device),
            "run": lambda: run(Path(place), options.tiny, device),
            "quality": lambda: quality(device),
        }
        for name in options.parts:
            results[name] = parts[name]()
            results["hardware"] = hardware()
            results["versions"] = versions("tutorial-sae", "torch", "transformers", "transformer-lens")
            if not options.tiny:
                write_json(RESULTS, results)
            print(name, json.dumps(results[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
