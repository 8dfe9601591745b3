"""The recipes from the command line, offline: the real path, on small models of both kinds and local parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import local_documents
from test_resume import write_parquet

from tutorial_sae import activations, cli, launch, load_sae, training
from tutorial_sae.saes import VARIANTS

HOOKS = {"gpt2": "blocks.8.hook_resid_pre", "gemma-2-2b": "blocks.12.hook_resid_post"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Small shards and little calibration, so that a run takes seconds and still harvests several times."""
    monkeypatch.setattr(activations, "SHARD_TOKENS", 4096)
    monkeypatch.setattr(training, "CALIBRATION_BATCHES", 4)
    monkeypatch.setattr(training, "NORMALIZATION_TOKENS", 3000)
    monkeypatch.setattr(launch, "GRID_TOKENS", 2000)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("text") / "text.parquet", local_documents(400))


@pytest.fixture
def folders(gpt2_folder: Path, gemma_folder: Path) -> dict[str, Path]:
    return {"gpt2": gpt2_folder, "gemma-2-2b": gemma_folder}


def train(recipe: str, model: Path, text: Path, out: Path, *more: str) -> int:
    sizes = ["--tokens", "12288", "--batch-size", "256", "--d-sae", "128", "--k", "8"]
    sizes += [] if "--memory-gb" in more else ["--memory-gb", "0.004"]
    return cli.main(["train", recipe, "--model", str(model), "--text", str(text), "--out", str(out), *sizes, *more])


@pytest.mark.parametrize("sae", ["batchtopk", "jumprelu"])
@pytest.mark.parametrize("recipe", ["gpt2", "gemma-2-2b"])
def test_a_recipe_from_text_to_sae_lens(recipe: str, sae: str, folders: Any, parquet: Path, tmp_path: Path, capsys):
    model, out = folders[recipe], tmp_path / "run"
    assert train(recipe, model, parquet, out, "--sae", sae) == 0
    said = capsys.readouterr()
    assert "plan for" in said.err
    assert f"evaluate {out} --model {model}" in said.out
    found = load_sae(out)
    assert found.metadata["hook"] == HOOKS[recipe]
    assert found.metadata["tokens"] == 12288
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["fvu"] < 0.8 * history[0]["fvu"]
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "run.json",
        "sae.safetensors",
    ]

    assert cli.main(["evaluate", str(out), "--model", str(model)]) == 0
    result = json.loads((out / "eval.json").read_text())
    assert 0 < result["fvu"] < 1
    assert 2 < result["l0"] < 40
    assert cli.main(["export", str(out), "--to", "sae_lens", str(tmp_path / "lens")]) == 0
    weights = load_file(tmp_path / "lens" / "sae_weights.safetensors")
    assert weights["W_enc"].shape == (found.d_in, 128)
    assert torch.equal(weights["threshold"], found.threshold.expand(128))  # type: ignore[union-attr]
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == HOOKS[recipe]


def test_a_folder_with_an_unfinished_run_wants_resume(folders, parquet, tmp_path, monkeypatch, capsys):
    original = training._Run.update

    def stopping(self, x):
        if self.step == 20:
            raise KeyboardInterrupt
        original(self, x)

    monkeypatch.setattr(training._Run, "update", stopping)
    assert train("gpt2", folders["gpt2"], parquet, tmp_path / "run") == 1
    assert "run the same command again to go on" in capsys.readouterr().err
    monkeypatch.setattr(training._Run, "update", original)
    assert train("gpt2", folders["gpt2"], parquet, tmp_path / "run") == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert train("gpt2", folders["gpt2"], parquet, tmp_path / "run", "--resume", "--seed", "1") == 2
    assert "other settings or data" in capsys.readouterr().err
    assert train("gpt2", folders["gpt2"], parquet, tmp_path / "run", "--resume") == 0
    assert train("gpt2", folders["gpt2"], parquet, tmp_path / "straight") == 0
    pair = [load_sae(tmp_path / name).state_dict() for name in ("run", "straight")]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_a_hub_that_is_gone_leaves_a_checkpoint_and_a_sentence(folders, parquet, tmp_path, monkeypatch, capsys):
    from pyarrow.parquet import ParquetFile

    records = [{"text": text} for text in ParquetFile(parquet).read().column("text").to_pylist()]
    gone = {"after": 100}

    def opened(*_: Any):
        yield from records[: gone["after"]]
        if gone["after"]:
            raise ConnectionError("no route to host")
        yield from records

    monkeypatch.setattr("tutorial_sae.text._open_hub", opened)
    monkeypatch.setattr("tutorial_sae.text.time.sleep", lambda seconds: None)
    run: list[Any] = ["gpt2", folders["gpt2"], Path("hub:somebody/words"), tmp_path / "run"]
    run += ["--tokens", "40960", "--memory-gb", "0.0009"]
    calibration = torch.randn(2048, 48)
    monkeypatch.setattr(launch, "calibration_activations", lambda *_, **__: calibration)
    assert train(*run) == 1
    said = capsys.readouterr().err
    assert "no route to host (after 100 documents)" in said
    assert "train --resume" in said
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 1 <= step < 160
    gone["after"] = 0
    assert train(*run, "--resume") == 0
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["step"] == 160


@pytest.mark.parametrize("full", [False, True])
def test_the_grid_trains_all_on_one_harvest_and_draws_them(folders, parquet, tmp_path, monkeypatch, capsys, full):
    grid = tuple((v, w, k) for w, k in ((96, 4), (192, 4), (96, 8)) for v in ("topk", "batchtopk"))
    grid += (("jumprelu", 96, 4), ("jumprelu", 96, 8))
    monkeypatch.setitem(training.RECIPES, "gpt2", training.RECIPES["gpt2"]._replace(grid=grid))
    monkeypatch.setitem(training.FULL, "gpt2", training.FULL["gpt2"]._replace(grid=grid))
    harvested = []
    original = activations.activations_at

    def counted(model: Any, tokens: torch.Tensor, hook: str):
        harvested.append(tokens.numel())
        return original(model, tokens, hook)

    monkeypatch.setattr(activations, "activations_at", counted)
    out = tmp_path / "grid"
    command = ["train", "gpt2", "--grid", "paper", "--model", str(folders["gpt2"]), "--text", str(parquet)]
    command += ["--tokens", "12288", "--batch-size", "256", "--memory-gb", "0.004", "--out", str(out)]
    command += ["--full"] * full
    assert cli.main(command) == 0
    assert sum(harvested) < 2.5 * 12288, "one harvest, and little for calibration and evaluation"
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["variant"], row["d_sae"], row["k"]) for row in rows] == list(grid)
    for variant, width, k in grid:
        sae = load_sae(out / f"{variant}-{width}-{k}")
        assert (sae.variant, sae.d_sae) == (variant, width)
    page = (out / "grid.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 1
    assert "One seed decides nothing" in page
    assert page.count("<td>BatchTopK lower</td>") == 10
    assert "Traceback" not in page
    capsys.readouterr()
    assert cli.main([*command, "--resume"]) == 0, "what is finished is read back"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "--grid", "papers"], "did you mean 'paper'"),
        (["smollm2-135m", "--grid", "paper"], "suits gpt2 and gemma-2-2b"),
        (["gpt2", "--batch-size", "0"], "at least 1"),
        (["gpt3"], "did you mean 'gpt2'"),
        (["gpt2", "--sae", "batchtopkk"], "did you mean 'batchtopk'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(launch, "load_model", lambda *_: pytest.fail("loaded"))
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_variant_of_the_grids_is_known():
    for recipe in (*training.RECIPES.values(), *training.FULL.values()):
        for variant, width, k in recipe.grid:
            VARIANTS[variant](1, width, **recipe.settings(variant, k=k))


def test_an_sae_of_a_copy_wants_to_know_where_the_copy_is(folders, parquet, tmp_path, capsys):
    assert train("gpt2", folders["gpt2"], parquet, tmp_path / "run") == 0
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "add --model FOLDER" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "run"), "--model", str(folders["gemma-2-2b"])]) == 2
    assert "reads d_in=48" in capsys.readouterr().err
