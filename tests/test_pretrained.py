"""The SAEs that come with the project are what their manifest says they are."""

import shutil

import pytest
import torch

from tutorial_sae import compare, pretrained
from tutorial_sae.compare import TIERS, Comparison
from tutorial_sae.metrics import Heldout, evaluate
from tutorial_sae.pretrained import heldout_slice, load_pretrained, manifest
from tutorial_sae.runtime import TutorialError
from tutorial_sae.text import load_text

SHIPPED = manifest()["saes"]
TOKENS, CE_TOKENS = pretrained.SLICE, 1_024


@pytest.fixture(scope="module")
def heldout(smollm2) -> Heldout:
    made = manifest()
    sizes = {"tokens": TOKENS, "ce_tokens": CE_TOKENS}
    return Heldout(smollm2, load_text(split="heldout"), made["hook"], norm_limit=made["mask"]["norm_limit"], **sizes)


def test_variants_are_shipped_and_trained_for_long_enough():
    assert set(SHIPPED) == {"vanilla", "gated", "topk", "batchtopk", "jumprelu"}
    for variant, made in SHIPPED.items():
        least = 20_000_000 if "topk" in variant else 5_000_000
        assert made["tokens_seen"] > 0.999 * least, variant  # whole batches
        assert made["tokens_distinct"] >= 3_000_000, variant


@pytest.mark.parametrize("variant", SHIPPED)
def test_the_manifest_says_how_each_was_made(variant):
    made = SHIPPED[variant]
    assert made["command"].startswith("python -m tutorial_sae train smollm2-135m --full")
    assert f"--sae {variant}" in made["command"]
    assert made["hardware"]["processor"]
    assert made["seed"] == load_pretrained(variant).metadata["seed"]
    assert made["tokens_seen"] == load_pretrained(variant).metadata["tokens"]


@pytest.mark.parametrize("variant", SHIPPED)
def test_a_shipped_sae_is_small_and_ready(variant):
    assert (pretrained.FOLDER / variant / "sae.safetensors").stat().st_size < 6e6
    sae = load_pretrained(variant)
    assert not sae.training
    assert sae.W_enc.dtype == torch.float32
    assert (sae.d_in, sae.d_sae) == (576, 2304)
    assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize("variant", SHIPPED)
def test_shipped_figures_hold_on_held_out_text(variant, smollm2, heldout):
    figures, found = SHIPPED[variant]["heldout"], evaluate(load_pretrained(variant), smollm2, heldout)
    assert figures["l0"] == pytest.approx(32, rel=0.1)
    assert found.cut == figures["cut"]
    assert found.l0 == pytest.approx(figures["l0"], rel=0.08)
    assert found.fvu == pytest.approx(figures["fvu"], rel=0.08)
    assert 0 < found.ce_increase < 2 * figures["ce_increase"]
    assert found.tokens_fvu == TOKENS


def test_all_share_one_model_hook_and_mask(smollm2):
    made = manifest()
    assert made["fingerprint"] == smollm2.card.fingerprint
    for variant in SHIPPED:
        metadata = load_pretrained(variant).metadata
        assert {name: metadata[name] for name in ("model", "fingerprint", "hook")} == {
            name: made[name] for name in ("model", "fingerprint", "hook")
        }
        assert metadata["mask"]["special"] == made["mask"]["special"]
        # found by each training machine in its own precision; between a sink and other tokens lies a factor of ten
        assert metadata["mask"]["norm_limit"] == pytest.approx(made["mask"]["norm_limit"], rel=1e-3)


def test_the_slice_is_held_out_text_at_their_hook(smollm2):
    store = heldout_slice(smollm2, 300)
    assert len(store) == 300
    assert store.text.split == "heldout"
    assert (store.hook, store.norm_limit) == (manifest()["hook"], manifest()["mask"]["norm_limit"])
    assert torch.isfinite(load_pretrained()(store[:])).all()


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="did you mean 'batchtopk'"):
        load_pretrained("batchtop")


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(pretrained.FOLDER, tmp_path / "pretrained")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    load_pretrained("topk")
    with (tmp_path / "pretrained" / "topk" / "sae.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(TutorialError, match="install the package again"):
        load_pretrained("topk")


def test_compare_shows_them_first_and_without_the_training_text(tmp_path, monkeypatch, smollm2, capsys):
    small = TIERS["cpu"]._replace(tokens_fvu=TOKENS, tokens_ce=CE_TOKENS)
    monkeypatch.setitem(TIERS, "cpu", small)
    monkeypatch.setattr(compare, "load_model", lambda _: smollm2)
    monkeypatch.setattr(Comparison, "store", property(lambda _: pytest.fail("harvested the training text")))
    comparison = Comparison("cpu", out=tmp_path)
    rows = comparison._shipped()
    assert [row["variant"] for row in rows] == list(SHIPPED)
    lines = [line for line in capsys.readouterr().err.splitlines() if "FVU" in line]
    assert [line.split(",")[0] for line in lines[: len(SHIPPED)]] == [f"shipped {variant}" for variant in SHIPPED]
    for row in rows:
        assert row["fvu"] == pytest.approx(SHIPPED[row["variant"]]["heldout"]["fvu"], rel=0.08)
        assert row["train_seconds"] == SHIPPED[row["variant"]]["train_seconds"]
    assert comparison._shipped() == rows
