"""To other libraries' files.

SAELens 6 reads a folder with `cfg.json` and `sae_weights.safetensors` (`sae_lens.SAE.load_from_disk`). Its JumpReLU SAE
computes, with `apply_b_dec_to_input`,

    f = relu(pi) where pi > threshold, else 0      pi = (x - b_dec) @ W_enc + b_enc      x_hat = f @ W_dec + b_dec

on activations as they are. So the mean and the scale of `normalize="dataset"` are folded into the weights, x = mean +
scale * x_n: b_dec becomes b_dec * scale + mean, W_enc becomes W_enc / scale, W_dec becomes W_dec * scale. Latents and
thresholds stay the same numbers, and the decoder's rows get the length `scale`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutorial_sae.runtime import save_tensors, write_json
from tutorial_sae.saes import SAE, BatchTopKSAE, JumpReLUSAE

SAE_LENS = "6.54.12"  # whose format this is, and with which it was tried: benchmarks/sae_lens_roundtrip.py
SAE_LENS_MODELS = {"gpt2": "gpt2-small"}  # where the names differ


def to_sae_lens(sae: SAE, folder: str | Path) -> Path:
    """Write a BatchTopK SAE (as the JumpReLU SAE that its threshold makes of it) or a JumpReLU SAE for SAELens.

    `normalize="token"` is declared as SAELens' `layer_norm`, which gives the scale back without the 1e-5 added to it.

    Raises `ValueError` for other variants, `RuntimeError` for a BatchTopK SAE that is not calibrated.
    """
    if isinstance(sae, BatchTopKSAE):
        sae = sae.to_jumprelu()
    if not isinstance(sae, JumpReLUSAE):
        raise ValueError(f"a {sae.variant} SAE cannot be exported to SAELens: BatchTopK and JumpReLU SAEs can")
    scale, mean = sae.norm_scale.double(), sae.norm_mean.double()
    weights = {name: parameter.detach().double() for name, parameter in sae.named_parameters()}
    folded = {
        "W_enc": weights["W_enc"] / scale,
        "b_enc": weights["b_enc"],
        "W_dec": weights["W_dec"] * scale,
        "b_dec": weights["b_dec"] * scale + mean,
        "threshold": weights["threshold"],
    }
    origin = sae.metadata
    model, data, mask = origin["model"], origin["data"] or {}, origin["mask"] or {}
    metadata: dict[str, Any] = {
        "sae_lens_version": SAE_LENS,
        "sae_lens_training_version": None,
        "model_name": SAE_LENS_MODELS.get(model, model),
        "hook_name": origin["hook"],
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": (data.get("text") or [None])[0],
        "training_tokens": origin["tokens"],
        # SAELens does not know these, and an SAE should not be used without them
        "trained_with": {"package": "tutorial_sae", "fingerprint": origin["fingerprint"], "mask": mask},
    }
    config = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if sae.normalize == "token" else "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    save_tensors(Path(folder) / "sae_weights.safetensors", {name: tensor.float() for name, tensor in folded.items()})
    write_json(Path(folder) / "cfg.json", config)
    return Path(folder)
