"""SAELens' files, read here by nothing of ours: the format's specification, and its equations on raw activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tutorial_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE, VanillaSAE, cli, load_pretrained
from tutorial_sae.interop import to_sae_lens
from tutorial_sae.pretrained import FOLDER
from tutorial_sae.saes import SAE, load_sae

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


# what SAELens 6 reads when it loads the model or harvests activations, and what it has no place for
METADATA = {
    "sae_lens_version",
    "sae_lens_training_version",
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_head_index",
    "prepend_bos",
    "exclude_special_tokens",
    "dataset_path",
    "training_tokens",
    "trained_with",
}
SHIPPED = ("batchtopk", "jumprelu")


def used(sae: Any) -> Any:
    """An SAE whose every number matters."""
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=chance)
        sae.b_enc -= 0.3
    sae.fit_normalization(raw(500))
    if isinstance(sae, BatchTopKSAE):
        sae.threshold = torch.tensor(0.7)
    return sae.eval()


def fresh(kind: type[SAE], normalize: str = "dataset") -> Any:
    options = {"k": 5} if kind is BatchTopKSAE else {"target_l0": 5, "theta": 0.6}
    return kind(D_IN, D_SAE, normalize=normalize, **options)  # type: ignore[call-arg]


def raw(tokens: int) -> torch.Tensor:
    return 7 + 3 * torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(1))


def files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    return json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


def check_format(folder: Path, d_in: int, d_sae: int) -> dict[str, Any]:
    """The files are what the specification says, with the settings under which `same_as_theirs` computes."""
    config, w = files(folder)
    assert {name: type(value) for name, value in config.items()} == KEYS
    settings = {name: config[name] for name in KEYS if name != "metadata"}
    assert settings == {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    # an older version, or none, makes SAELens rewrite the file as one of before 6.0
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) == 6
    assert set(config["metadata"]) == METADATA
    shapes = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    assert {name: tuple(tensor.shape) for name, tensor in w.items()} == shapes
    assert {tensor.dtype for tensor in w.values()} == {torch.float32}
    return config["metadata"]


@torch.no_grad()
def same_as_theirs(folder: Path, sae: Any, x: torch.Tensor) -> None:
    """Codes and reconstructions of raw activations, computed from the files as SAELens does, are those of `sae`."""
    w = files(folder)[1]
    pi = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = torch.relu(pi) * (pi > w["threshold"])
    x_hat, ours = latents @ w["W_dec"] + w["b_dec"], sae.encode(x)
    assert 0.001 < float((ours > 0).float().mean()) < 0.8
    at_the_threshold = (pi - w["threshold"]).abs() < 1e-5 * w["threshold"]
    differ = (latents > 0) != (ours > 0)
    assert not (differ & ~at_the_threshold).any()
    torch.testing.assert_close(latents[~differ], ours[~differ], rtol=1e-4, atol=0)
    rows = ~differ.any(dim=1)  # where one keeps an entry more, both are right
    assert int(rows.sum()) > 0.9 * len(x)
    error = (x_hat - sae(x))[rows].norm(dim=1) / sae(x)[rows].norm(dim=1)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("normalize", ["dataset", "none"])
@pytest.mark.parametrize("kind", [BatchTopKSAE, JumpReLUSAE])
def test_codes_and_reconstructions_of_raw_activations_are_the_same(tmp_path, kind, normalize):
    sae = used(fresh(kind, normalize))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    assert to_sae_lens(sae, tmp_path) == tmp_path
    metadata = check_format(tmp_path, D_IN, D_SAE)
    same_as_theirs(tmp_path, sae, raw(400))
    assert (metadata["model_name"], metadata["dataset_path"], metadata["exclude_special_tokens"]) == (None, None, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items()), "it was only read"


@pytest.mark.parametrize("variant", SHIPPED)
def test_the_shipped_ones_are_as_the_format_says(tmp_path, variant):
    assert cli.main(["export", str(FOLDER / variant), "--to", "sae_lens", str(tmp_path)]) == 0
    metadata = check_format(tmp_path, 576, 2304)
    origin = json.loads((FOLDER / variant / "config.json").read_text())
    assert metadata["model_name"] == "smollm2-135m"
    assert metadata["hook_name"] == "blocks.15.hook_resid_post"
    assert metadata["dataset_path"] == "embedded"
    assert metadata["training_tokens"] == origin["tokens"]
    assert metadata["exclude_special_tokens"] == origin["mask"]["special"]
    assert metadata["trained_with"] == {"package": "tutorial_sae"} | {
        name: origin[name] for name in ("fingerprint", "weight_processing", "mask", "data")
    }
    sae = load_pretrained(variant)
    x = sae.norm_mean + sae.norm_scale * torch.randn(200, 576, generator=torch.Generator().manual_seed(0))
    same_as_theirs(tmp_path, sae, x)


@pytest.mark.parametrize("variant", SHIPPED)
def test_a_bfloat16_sae_is_exported_without_a_further_loss(tmp_path, variant):
    low = load_sae(FOLDER / variant)
    assert low.W_enc.dtype == torch.bfloat16
    to_sae_lens(low, tmp_path / "low")
    to_sae_lens(load_pretrained(variant), tmp_path / "float32")
    low_w, w = files(tmp_path / "low")[1], files(tmp_path / "float32")[1]
    assert all(torch.equal(low_w[name], w[name]) for name in w)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("gpt2", "gpt2-small"), ("gemma-2-2b", "gemma-2-2b"), ("hub:owner/name", "owner/name"), (None, None)],
)
def test_models_and_texts_have_the_names_that_sae_lens_looks_up(tmp_path, ours, theirs):
    sae = used(fresh(JumpReLUSAE))
    sae.metadata |= {"model": ours, "data": {"text": ["hub:owner/texts:part@main", "train", None, 0, "0"]}}
    to_sae_lens(sae, tmp_path)
    metadata = files(tmp_path)[0]["metadata"]
    assert (metadata["model_name"], metadata["dataset_path"]) == (theirs, "owner/texts")


def test_what_cannot_be_exported_says_what_can(tmp_path):
    for sae in (TopKSAE(D_IN, D_SAE, k=3), VanillaSAE(D_IN, D_SAE, l1=1.0), GatedSAE(D_IN, D_SAE, l1=1.0)):
        with pytest.raises(ValueError, match=f"{sae.variant} SAE .*BatchTopK and JumpReLU"):
            to_sae_lens(sae, tmp_path)
    for kind in (BatchTopKSAE, JumpReLUSAE):
        with pytest.raises(ValueError, match=r'"token".*"dataset" or "none"'):
            to_sae_lens(used(fresh(kind, "token")), tmp_path)
    with pytest.raises(RuntimeError, match="calibrate_threshold"):
        to_sae_lens(fresh(BatchTopKSAE), tmp_path)
    assert not list(tmp_path.iterdir())
