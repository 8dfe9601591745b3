"""`python -m benchmarks.pretrained [VARIANT ...]`: train the SAEs that are shipped, and write their manifest.

For each variant it runs the command that the manifest names (a run that is finished is not run again), rounds the
weights to bfloat16, calibrates the threshold of the rounded SAE, measures it on held-out text, and writes
`tutorial_sae/pretrained/`. Retrain only with reason: each set stays in the history of the repository.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from tutorial_sae import BatchTopKSAE, calibrate_threshold, cli, evaluate, load_model, load_sae, load_text
from tutorial_sae.metrics import Heldout
from tutorial_sae.pretrained import FOLDER
from tutorial_sae.runtime import file_sha256, hardware, versions, write_json
from tutorial_sae.training import CALIBRATION_BATCH, calibration_activations

RUNS = Path("runs") / "pretrained"
COMMANDS = {
    variant: f"python -m tutorial_sae train smollm2-135m --full --sae {variant}{more}"
    for variant, more in {
        "vanilla": " --tokens 5000000 --threads 1",
        "gated": " --tokens 5000000 --threads 1",
        "topk": "",
        "batchtopk": "",
        "jumprelu": " --tokens 5000000",
    }.items()
}
TOKENS_FVU, TOKENS_CE = 60_000, 12_000
FIGURES = (
    *("l0", "l0_p1", "l0_p50", "l0_p99", "fvu", "ce_clean", "ce_increase", "loss_recovered_zero"),
    *("loss_recovered_mean", "shrinkage", "dead", "tokens_fvu", "tokens_ce"),
)


def ship(variant: str, model: Any, heldout: Heldout) -> dict[str, Any]:
    """Round, calibrate, save and measure the SAE of a finished run; gives its part of the manifest."""
    run = RUNS / variant
    sae = load_sae(run).to(torch.bfloat16).float()
    if isinstance(sae, BatchTopKSAE):
        data = calibration_activations(model, heldout.hook, heldout.store.norm_limit)
        calibrate_threshold(sae, data, batch_size=CALIBRATION_BATCH)
    sae.to(torch.bfloat16).save(FOLDER / variant)
    result = evaluate(load_sae(FOLDER / variant).float(), model, heldout)
    history = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    trained = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {
        "command": COMMANDS[variant],
        "seed": sae.metadata["seed"],
        "tokens_seen": sae.metadata["tokens"],
        "tokens_distinct": sae.metadata["data"]["distinct"],
        "train": trained["train"],
        "train_seconds": trained["seconds"],
        "tokens_per_second": sae.metadata["tokens"] / trained["seconds"],
        "dead_in_training": history["dead"],
        "heldout": {name: result.numbers()[name] for name in ("cut", *FIGURES)},
        "sha256": file_sha256(FOLDER / variant / "sae.safetensors"),
        "hardware": hardware(),
        "versions": versions("tutorial-sae", "torch", "transformer-lens"),
    }


def main(variants: list[str]) -> None:
    for variant in variants:
        if cli.main([*shlex.split(COMMANDS[variant])[3:], "--resume", "--out", str(RUNS / variant)]):
            raise SystemExit(f"training {variant} failed")
    model = load_model("smollm2-135m")
    path = FOLDER / "manifest.json"
    made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else load_sae(RUNS / variants[0]).metadata
    text, limit = load_text(split="heldout"), made["mask"]["norm_limit"]  # one for all, wherever they were trained
    heldout = Heldout(model, text, made["hook"], norm_limit=limit, tokens=TOKENS_FVU, ce_tokens=TOKENS_CE)
    saes = made.get("saes", {})
    for variant in variants:
        saes[variant] = ship(variant, model, heldout)
        print(variant, json.dumps(saes[variant]["heldout"]), flush=True)
    note = "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1) file"
    about = {name: made[name] for name in ("model", "fingerprint", "hook", "mask")}
    saes = {variant: saes[variant] for variant in COMMANDS if variant in saes}
    write_json(path, about | {"model_note": note, "weights": "bfloat16", "saes": saes})


if __name__ == "__main__":
    main(sys.argv[1:] or list(COMMANDS))
