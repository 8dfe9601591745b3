"""Plans: held against tensors counted one by one, and against themselves; true sizes are in benchmarks/true_size.py."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tutorial_sae import BatchTopKSAE, TrainConfig, TutorialError, cli, planning
from tutorial_sae.models import KNOWN, shape_of
from tutorial_sae.planning import MACHINES, Machine, plan
from tutorial_sae.training import FULL, RECIPES, hand_over, optimizer

CPU = Machine("a CPU", 24, 0.4e12, bf16=False, gpu=False)
GPU = Machine("a GPU", 40, 300e12, bf16=True)


def planned(model: str = "gpt2", machine: Machine = CPU, **changes: Any) -> planning.Plan:
    widths, memory = changes.pop("widths", ()), changes.pop("memory_gb", 2.0)
    recipe = FULL[model]
    return plan(model, recipe, replace(recipe.config, **changes), widths, memory, machine=machine)


def test_the_sae_takes_what_its_tensors_take():
    sae = BatchTopKSAE(24, 96, k=4)
    adam = optimizer(sae, TrainConfig())
    sae.loss(torch.randn(16, 24)).total.backward()
    hand_over(sae, adam)
    adam.step()
    moments = [t for state in adam.state.values() for name, t in state.items() if name != "step"]
    tensors = [*sae.parameters(), *(p.grad for p in sae.parameters() if p.grad is not None), *moments]
    counted = sum(t.numel() * t.element_size() for t in tensors)
    shape = KNOWN["gpt2"].shape._replace(d_model=24)
    recipe = RECIPES["gpt2"]
    assert planning._memory(shape, recipe, recipe.config, [96], 2.0, GPU)["SAE and Adam"] * 1e9 == counted


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_the_sizes_of_a_folder_are_those_of_its_model(name: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(f"{name}_folder")
    model = request.getfixturevalue(name)
    found = shape_of(str(folder))
    assert found.params == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert (found.d_model, found.layers) == (model.cfg.d_model, model.cfg.n_layers)
    assert found.vocab == model.cfg.d_vocab
    assert found.file_bytes == (Path(folder) / "model.safetensors").stat().st_size


def test_more_of_anything_takes_more():
    small = planned(tokens=10_000_000)
    assert planned(tokens=1_000_000_000).hours == pytest.approx(100 * small.hours, rel=1e-6)
    wide = planned(tokens=10_000_000, widths=[24576])
    assert wide.memory_gb > small.memory_gb
    assert wide.hours > small.hours
    two = planned(tokens=10_000_000, widths=[12288, 12288])
    assert small.hours < two.hours < 2 * small.hours, "they share the harvest"
    assert planned(batch_size=65536).memory_gb > planned().memory_gb
    assert planned(memory_gb=4.0).memory_gb > planned(memory_gb=1.0).memory_gb
    assert planned(tokens=100_000).memory_gb < planned().memory_gb, "a short run fills no buffer"
    assert planned("gemma-2-2b", GPU).parts["model"] == pytest.approx(2 * 2.614, rel=1e-3)
    assert planned("gemma-2-2b", GPU._replace(bf16=False)).parts["model"] == pytest.approx(4 * 2.614, rel=1e-3)


@pytest.mark.parametrize("machine", [*MACHINES, CPU], ids=lambda machine: machine.name)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "gemma-2-2b"])
def test_every_recipe_has_settings_that_work_on_every_machine(machine: Machine, model: str, full: bool):
    recipe = (FULL if full else RECIPES)[model]
    found = plan(model, recipe, recipe.config, machine=machine)
    if not found.fits:
        flags = dict(re.findall(r"--([a-z-]+) ([\d.]+)", found.advice))
        config = replace(recipe.config, batch_size=int(flags["batch-size"]))
        widths = [int(flags.get("d-sae", recipe.d_sae))]
        found = plan(model, recipe, config, widths, float(flags["memory-gb"]), machine=machine)
    assert found.fits, str(found)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(monkeypatch, capsys, gpt2_folder):
    monkeypatch.setattr(planning, "this_machine", lambda: CPU._replace(memory_gb=3.2))
    monkeypatch.setattr("tutorial_sae.launch.load_model", lambda *_: pytest.fail("loaded"))
    assert cli.main(["train", "gpt2", "--d-sae", "98304"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"needs [\d.]+ GB of memory and 3.2 GB are free", said)
    assert "would fit" in said


def test_a_machine_too_small_for_the_model_is_told_so():
    found = planned("gemma-2-2b", CPU._replace(memory_gb=4))
    assert not found.fits
    with pytest.raises(TutorialError, match=r"nothing smaller fits: the language model alone takes 10\.5 GB"):
        found.check()


def test_the_list_tells_what_each_recipe_takes_here_and_elsewhere(capsys):
    assert cli.main(["train", "--list"]) == 0
    said = capsys.readouterr().out
    for name in ("smollm2-135m:", "gpt2:", "gemma-2-2b --full:", "gpt2 --full --grid paper: 15 SAEs"):
        assert name in said
    assert said.count("by arithmetic") == 6
    assert re.search(r"T4 \(float32\) [\d.]+ GB", said)


def test_the_papers_grid_is_the_papers():
    grid = FULL["gpt2"].grid
    assert len(grid) == len(set(grid)) == 15
    assert {width for _, width, _ in grid} == {3072, 6144, 12288, 24576}
    assert {(variant, k) for variant, width, k in grid if width == 12288} == {
        (variant, k) for variant in ("topk", "batchtopk", "jumprelu") for k in (16, 32, 64)
    }
    assert {k for _, width, k in grid if width != 12288} == {32}
    gemma = FULL["gemma-2-2b"]
    assert {width for _, width, _ in gemma.grid} == {16384}
    assert len(gemma.grid) == 9
    for recipe in (FULL["gpt2"], gemma):
        assert recipe.config.tokens == 1_000_000_000
        assert (recipe.config.batch_size, recipe.config.lr, recipe.config.betas) == (4096, 3e-4, (0.9, 0.99))
        assert recipe.config.lr_at(0) == recipe.config.lr_at(recipe.config.steps - 1) == 3e-4
