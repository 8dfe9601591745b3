"""The sparse autoencoders, one variant a file, and `load_sae`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from tutorial_sae.runtime import unknown
from tutorial_sae.saes.base import ORIGIN, SAE, Loss, check_theta, keep_above, keep_batch, keep_row
from tutorial_sae.saes.batchtopk import BatchTopKSAE
from tutorial_sae.saes.gated import GatedSAE
from tutorial_sae.saes.jumprelu import JumpReLUSAE
from tutorial_sae.saes.topk import TopKSAE
from tutorial_sae.saes.vanilla import VanillaSAE

__all__ = [
    "SAE",
    "VARIANTS",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "Loss",
    "TopKSAE",
    "VanillaSAE",
    "keep_above",
    "keep_batch",
    "keep_row",
    "load_sae",
]

VARIANTS: dict[str, type[SAE]] = {
    variant.variant: variant for variant in (VanillaSAE, GatedSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE)
}


def load_sae(path: str | Path) -> SAE:
    """The SAE saved in the folder `path`, in eval mode.

    Raises `ValueError`, with what is wrong, for a folder that is not a saved SAE or is damaged.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or not (folder / "sae.safetensors").is_file():
        raise ValueError(f"{folder} is not a saved SAE: expected a folder with config.json and sae.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "sae.safetensors")
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}): save the SAE again, or train it anew") from error
    variant = config.get("variant") if isinstance(config, dict) else None
    if variant not in VARIANTS:
        raise unknown("variant", str(variant), VARIANTS)
    kind = VARIANTS[variant]
    try:
        settings = {name: config[name] for name in ("d_in", "d_sae", "normalize", *kind.settings)}
        sae = kind(settings.pop("d_in"), settings.pop("d_sae"), **settings)
        sae = sae.to(tensors["W_enc"].dtype)
        sae.load_state_dict(tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}: config.json and sae.safetensors do not belong together ({error})") from error
    theta = tensors.get("threshold")
    if theta is not None and not (isinstance(sae, BatchTopKSAE) and theta.isnan().all()):
        check_theta(theta)
    sae.metadata = {name: config.get(name) for name in ORIGIN}
    return sae.eval()
