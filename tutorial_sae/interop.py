"""To other libraries' files.

SAELens 6 reads a folder with `cfg.json` and `sae_weights.safetensors` (`sae_lens.SAE.load_from_disk`). Its JumpReLU SAE
computes, with `apply_b_dec_to_input`,

    f = relu(pi) where pi > threshold, else 0      pi = (x - b_dec) @ W_enc + b_enc      x_hat = f @ W_dec + b_dec

on activations as they are. So the mean and the scale of `normalize="dataset"` are folded into the weights, x = mean +
scale * x_n: b_dec becomes b_dec * scale + mean, W_enc becomes W_enc / scale, W_dec becomes W_dec * scale. Latents and
thresholds stay the same numbers, and the decoder's rows get the length `scale`. In `cfg.json` a `sae_lens_version` of 6
or more (in `metadata`) tells SAELens that the file is not of an older format, which would lose what `metadata` holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutorial_sae.runtime import save_tensors, write_json
from tutorial_sae.saes import SAE, BatchTopKSAE, JumpReLUSAE
from tutorial_sae.text import HUB

SAE_LENS = "6.54.12"  # whose format this is, and with which it was tried: benchmarks/sae_lens_roundtrip.py
SAE_LENS_MODELS = {"gpt2": "gpt2-small"}  # where the names differ
TRAINED_WITH = ("fingerprint", "weight_processing", "mask", "data")


def to_sae_lens(sae: SAE, folder: str | Path) -> Path:
    """Write a BatchTopK SAE (as the JumpReLU SAE that its threshold makes of it) or a JumpReLU SAE for SAELens.

    All tensors are written in float32: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), b_enc and threshold
    (d_sae,). SAELens also wants to know the `context_size` for some uses; it is not known here, so name it there.

    Raises `ValueError` for other variants and for `normalize="token"`, `RuntimeError` for a BatchTopK SAE that is not
    calibrated. SAELens' `layer_norm` divides by std + 1e-5 and multiplies by std, so its x_hat would be another one.
    """
    if isinstance(sae, BatchTopKSAE):
        sae = sae.to_jumprelu()
    if not isinstance(sae, JumpReLUSAE):
        raise ValueError(f"a {sae.variant} SAE cannot be exported to SAELens: BatchTopK and JumpReLU SAEs can")
    if sae.normalize == "token":
        why = "SAELens' layer_norm does not give back the scale that it took"
        raise ValueError(f'normalize="token" cannot be exported, for {why}: train with normalize="dataset" or "none"')
    # float64 is not to be had on every device
    scale, mean = sae.norm_scale.cpu().double(), sae.norm_mean.cpu().double()
    folded = {name: parameter.detach().cpu().double() for name, parameter in sae.named_parameters()}
    folded["W_enc"] = folded["W_enc"] / scale
    folded["W_dec"] = folded["W_dec"] * scale
    folded["b_dec"] = folded["b_dec"] * scale + mean
    origin = sae.metadata
    model, text = origin["model"], ((origin["data"] or {}).get("text") or [None])[0]
    on_hub = HUB.fullmatch(text or "")
    metadata: dict[str, Any] = {
        "sae_lens_version": SAE_LENS,
        "sae_lens_training_version": None,
        "model_name": SAE_LENS_MODELS.get(model, model and model.removeprefix("hub:")),
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_name": origin["hook"],
        "hook_head_index": None,
        "prepend_bos": True,
        "exclude_special_tokens": (origin["mask"] or {}).get("special", False),
        "dataset_path": on_hub[1] if on_hub else text,
        "training_tokens": origin["tokens"],
        # SAELens does not know these, and an SAE should not be used without them
        "trained_with": {"package": "tutorial_sae"} | {name: origin[name] for name in TRAINED_WITH},
    }
    sizes = {"architecture": "jumprelu", "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu"}
    plain = {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    save_tensors(Path(folder) / "sae_weights.safetensors", {name: tensor.float() for name, tensor in folded.items()})
    write_json(Path(folder) / "cfg.json", sizes | plain | {"metadata": metadata})
    return Path(folder)
