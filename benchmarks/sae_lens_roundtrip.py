"""`python -m benchmarks.sae_lens_roundtrip`: the shipped SAEs, exported and read by SAELens itself.

SAELens runs in the environment of the peers (see peers.py). On 4,096 held-out activations its codes and
reconstructions are held against ours. Writes `benchmarks/results/sae_lens.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import peers
from tutorial_sae.runtime import save_tensors, versions, write_json
from tutorial_sae.saes import load_sae

RESULTS = Path(__file__).parent / "results" / "sae_lens.json"
FOLDER = Path("runs") / "sae_lens"
SHIPPED = Path("tutorial_sae") / "pretrained"
VARIANTS = ("batchtopk", "jumprelu")


def export() -> None:
    from tutorial_sae import heldout_slice, load_model
    from tutorial_sae.interop import to_sae_lens

    save_tensors(FOLDER / "x.safetensors", {"x": heldout_slice(load_model("smollm2-135m"))[:4096]})
    for variant in VARIANTS:
        to_sae_lens(load_sae(SHIPPED / variant), FOLDER / variant)


@torch.no_grad()
def compare() -> None:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    x = load_file(FOLDER / "x.safetensors")["x"]
    rows = {}
    for variant in VARIANTS:
        theirs, ours = SAE.load_from_disk(FOLDER / variant), load_sae(SHIPPED / variant).float()
        codes, own, x_hat, own_hat = theirs.encode(x), ours.encode(x), theirs(x), ours(x)
        both = (codes > 0) & (own > 0)
        rows[variant] = {
            "class": type(theirs).__name__,
            "hook_name": theirs.cfg.metadata.hook_name,
            "active": int((own > 0).sum()),
            "active_in_one_only": int(((codes > 0) != (own > 0)).sum()),
            "largest_relative_difference_of_codes": float(((codes - own).abs() / own)[both].max()),
            "relative_difference_of_reconstructions": float((x_hat - own_hat).norm() / own_hat.norm()),
        }
        print(variant, rows[variant])
    write_json(RESULTS, {"tokens": len(x), "versions": versions("torch", "sae-lens"), "saes": rows})


if __name__ == "__main__":
    if peers.inside():
        compare()
    else:
        export()
        sys.exit(peers.run_inside("benchmarks.sae_lens_roundtrip", []))
