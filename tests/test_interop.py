"""SAELens' files, read here by nothing of ours: the format's specification, and its equations on raw activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tutorial_sae import BatchTopKSAE, JumpReLUSAE, TopKSAE, VanillaSAE, cli, load_pretrained
from tutorial_sae.interop import to_sae_lens
from tutorial_sae.pretrained import FOLDER

D_IN, D_SAE = 12, 40
# what sae_lens.saes.sae.SAEConfig of SAELens 6 holds, with the types it has there
KEYS = {
    "architecture": str,
    "d_in": int,
    "d_sae": int,
    "dtype": str,
    "device": str,
    "apply_b_dec_to_input": bool,
    "normalize_activations": str,
    "reshape_activations": str,
    "metadata": dict,
}


def used(sae: Any) -> Any:
    """An SAE whose every number matters."""
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=chance)
        sae.b_enc -= 0.3
    if sae.normalize == "dataset":
        sae.fit_normalization(raw(500))
    if isinstance(sae, BatchTopKSAE):
        sae.threshold = torch.tensor(0.7)
    return sae.eval()


def raw(tokens: int) -> torch.Tensor:
    return 7 + 3 * torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(1))


def as_sae_lens_does(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    mean, std = torch.zeros(1), torch.ones(1)
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        std = (x - mean).std(dim=-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    pi = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = torch.relu(pi) * (pi > w["threshold"])
    return latents, (latents @ w["W_dec"] + w["b_dec"]) * std + mean


@pytest.mark.parametrize("normalize", ["dataset", "token", "none"])
@pytest.mark.parametrize("kind", [BatchTopKSAE, JumpReLUSAE])
def test_codes_and_reconstructions_of_raw_activations_are_the_same(tmp_path, kind, normalize):
    options = {"k": 5} if kind is BatchTopKSAE else {"target_l0": 5, "theta": 0.6}
    sae = used(kind(D_IN, D_SAE, normalize=normalize, **options))
    x = raw(400)
    latents, x_hat = as_sae_lens_does(to_sae_lens(sae, tmp_path), x)
    ours = sae.encode(x)
    assert 0 < int((ours > 0).sum()) < 0.8 * ours.numel()
    assert float(((latents > 0) != (ours > 0)).float().mean()) < 1e-4, "but for rounding at the threshold"
    torch.testing.assert_close(latents[ours > 0], ours[ours > 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_the_shipped_ones_are_as_the_format_says(tmp_path, variant):
    assert cli.main(["export", str(FOLDER / variant), "--to", "sae_lens", str(tmp_path)]) == 0
    config, w = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    assert {name: type(value) for name, value in config.items()} == KEYS
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["hook_name"] == "blocks.15.hook_resid_post"
    assert config["metadata"]["sae_lens_version"] >= "6"
    shapes = {"W_enc": (576, 2304), "b_enc": (2304,), "W_dec": (2304, 576), "b_dec": (576,), "threshold": (2304,)}
    assert {name: tuple(tensor.shape) for name, tensor in w.items()} == shapes
    assert {tensor.dtype for tensor in w.values()} == {torch.float32}
    sae = load_pretrained(variant)
    x = sae.norm_mean + sae.norm_scale * torch.randn(200, 576, generator=torch.Generator().manual_seed(0))
    latents, x_hat = as_sae_lens_does(tmp_path, x)
    assert float(((latents > 0) != (sae.encode(x) > 0)).float().mean()) < 1e-4
    torch.testing.assert_close(x_hat, sae(x), rtol=1e-3, atol=1e-2 * float(sae.norm_scale))


def test_what_cannot_be_exported_says_what_can(tmp_path):
    for sae in (TopKSAE(D_IN, D_SAE, k=3), VanillaSAE(D_IN, D_SAE, l1=1.0)):
        with pytest.raises(ValueError, match=f"{sae.variant} SAE .*BatchTopK and JumpReLU"):
            to_sae_lens(sae, tmp_path)
    with pytest.raises(RuntimeError, match="calibrate_threshold"):
        to_sae_lens(BatchTopKSAE(D_IN, D_SAE, k=3), tmp_path)
    assert not list(tmp_path.iterdir())
