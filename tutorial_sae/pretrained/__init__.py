"""Trained SAEs that come with the project: layer 15 of the embedded model, 2304 latents, about 32 of them per token.

`manifest.json` says of each how it was made (command, seed, activations, hardware), what it reaches on held-out text
and what its file hashes to. The weights are kept in bfloat16. `python -m benchmarks.pretrained` makes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tutorial_sae.activations import ActivationStore
from tutorial_sae.runtime import TutorialError, file_sha256, unknown
from tutorial_sae.saes import SAE, load_sae
from tutorial_sae.text import load_text

FOLDER = Path(__file__).parent
SLICE = 16_384  # held-out activations that a notebook works with


def manifest() -> dict[str, Any]:
    return json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


def load_pretrained(variant: str = "batchtopk") -> SAE:
    """The shipped SAE of this variant, in eval mode and float32; its threshold, where it has one, is calibrated.

    Raises `ValueError` for a variant that is not shipped, `TutorialError` for a file that is not the one shipped.
    """
    shipped = manifest()["saes"]
    if variant not in shipped:
        raise unknown("shipped SAE", variant, shipped)
    if file_sha256(FOLDER / variant / "sae.safetensors") != shipped[variant]["sha256"]:
        raise TutorialError(
            f"{FOLDER / variant / 'sae.safetensors'} is not the file that was shipped: install the package again"
        )
    return load_sae(FOLDER / variant).float()


def heldout_slice(model: Any, tokens: int = SLICE) -> ActivationStore:
    """Held-out activations of `model`, the embedded one, where and under the mask that the shipped SAEs have.

    Harvested on first use, which takes some seconds, and read from the cache from then on.
    """
    made = manifest()
    return ActivationStore(
        model, load_text(split="heldout"), made["hook"], tokens=tokens, norm_limit=made["mask"]["norm_limit"]
    )
