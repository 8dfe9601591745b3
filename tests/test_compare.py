"""The main job and the command line, on the embedded model at a size that says nothing about quality."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from tutorial_sae import cli
from tutorial_sae.compare import TIERS, Comparison, Tier, compare
from tutorial_sae.latents import kind_of
from tutorial_sae.metrics import evaluate
from tutorial_sae.report import cross_table, results_table
from tutorial_sae.runtime import TutorialError
from tutorial_sae.training import Recipe, TrainConfig
from tutorial_sae.widgets.highlight import highlight

TINY = Tier(
    Recipe(
        d_sae=96,
        k=4,
        l1={"vanilla": 2.0, "gated": 2.0},
        harvest=1_500,
        config=TrainConfig(tokens=6_400, batch_size=128),
    ),
    "blocks.1.hook_resid_post",
    calibration=256,
    tokens_fvu=500,
    tokens_ce=256,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smollm2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TIERS, "ci", TINY)
        patch.setattr("tutorial_sae.compare.load_model", lambda _: smollm2)
        folder = tmp_path_factory.mktemp("compare") / "run"
        yield folder, compare("ci", out=folder)


def test_results_have_the_promised_shape(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    pairs = [(row["variant"], row["cut"]) for row in results["rows"]]
    assert pairs == [
        ("pca", "own"),
        ("vanilla", "own"),
        ("topk", "row"),
        ("topk", "batch"),
        ("batchtopk", "threshold"),
        ("batchtopk", "row"),
        ("batchtopk", "batch"),
        ("jumprelu", "own"),
    ]
    wanted = {"variant", "cut", "l0", "l0_p1", "l0_p50", "l0_p99", "fvu", "ce_increase", "loss_recovered_zero"}
    wanted |= {"loss_recovered_mean", "dead", "train_seconds", "tokens_per_second"}
    assert all(set(row) == wanted for row in results["rows"])
    meta = {"seed", "tokens_seen", "tokens_distinct", "tokens_fvu", "tokens_ce", "hardware", "versions"}
    assert meta <= set(results["meta"])
    assert results["meta"]["tokens_distinct"] == TINY.recipe.harvest
    assert results["meta"]["tokens_seen"] == 6_400


def test_counts_are_what_the_cut_promises(finished):
    rows = {(row["variant"], row["cut"]): row for row in finished[1]["rows"]}
    assert rows["topk", "row"]["l0_p99"] <= TINY.recipe.k
    assert rows["batchtopk", "batch"]["l0"] == pytest.approx(TINY.recipe.k, abs=0.01)
    assert rows["pca", "own"]["l0"] == TINY.recipe.k


def test_all_adds_gated_to_a_finished_run_and_renews_the_report(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = {file: file.read_bytes() for file in folder.glob("*/eval.json")}
    results = compare("ci", out=folder, every_variant=True)
    assert ("gated", "own") in [(row["variant"], row["cut"]) for row in results["rows"]]
    assert all(file.read_bytes() == old for file, old in before.items())
    assert "Gated" not in (finished[0] / "report.html").read_text(encoding="utf-8")
    assert "Gated" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_second_run_does_no_work_and_says_the_same(finished, monkeypatch, capsys):
    folder, results = finished
    monkeypatch.setattr("tutorial_sae.compare.load_model", lambda _: pytest.fail("loaded the model again"))
    assert compare("ci", out=folder) == results
    assert results_table(results["rows"]) in capsys.readouterr().out


def test_the_same_seed_gives_the_same_table(finished, tmp_path):
    _, results = finished
    again = Comparison("ci", out=tmp_path / "again").run()
    timing = {"train_seconds", "tokens_per_second"}
    for a, b in zip(results["rows"], again["rows"], strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_an_interrupted_comparison_keeps_what_was_finished(tmp_path, monkeypatch, finished):
    original = Comparison._trained

    def interrupted(self, variant):
        if variant == "topk":
            raise KeyboardInterrupt
        return original(self, variant)

    monkeypatch.setattr(Comparison, "_trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Comparison("ci", out=tmp_path).run()
    assert (tmp_path / "pca.json").exists()
    assert (tmp_path / "vanilla" / "eval.json").exists()
    monkeypatch.setattr(Comparison, "_trained", original)
    before = (tmp_path / "vanilla" / "sae.safetensors").stat().st_mtime_ns
    Comparison("ci", out=tmp_path).run()
    assert (tmp_path / "vanilla" / "sae.safetensors").stat().st_mtime_ns == before


def test_the_report_is_one_file_with_tables_figures_and_contexts(finished):
    folder, _ = finished
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count('src="data:image/png;base64,') == 4
    assert len(re.findall(r'<img[^>]*alt="[^"]{20,}"', html)) == 4
    assert not re.search(r'<(img|link|iframe)[^>]+(src|href)="https?:', html)
    assert "BatchTopK" in html
    assert "do not quote its numbers" in html
    notebook = json.loads((folder / "report.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] in ("error", "stream")]


def test_a_folder_of_other_settings_is_refused(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(ValueError, match="other settings"):
        Comparison("ci", seed=5, out=folder)


def test_a_damaged_step_is_named(finished, tmp_path):
    folder, _ = finished
    Comparison("ci", out=tmp_path)
    (tmp_path / "pca.json").write_text((folder / "pca.json").read_text()[:40])
    with pytest.raises(TutorialError, match=r"pca\.json is damaged"):
        Comparison("ci", out=tmp_path).run()


def test_the_cross_table_reads_down_by_training_and_across_by_cut():
    rows = [
        {"variant": v, "cut": c, "fvu": f, "ce_increase": 0.5}
        for v, c, f in [
            ("topk", "row", 0.1),
            ("topk", "batch", 0.2),
            ("batchtopk", "row", 0.3),
            ("batchtopk", "batch", 0.4),
        ]
    ]
    lines = cross_table(rows).splitlines()
    assert re.findall(r"0\.\d{4}", lines[2]) == ["0.1000", "0.2000"]
    assert re.findall(r"0\.\d{4}", lines[3]) == ["0.3000", "0.4000"]


# -- looking at latents ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (" Paris", "word start"),
        ("ville", "word continuation"),
        ("42", "digits"),
        (",", "punctuation"),
        ("\n\n", "space"),
        (" (", "punctuation"),
    ],
)
def test_kinds_of_token(piece, kind):
    assert kind_of(piece) == kind


def test_highlighted_text_is_escaped_and_marks_its_peak():
    html = highlight(["<script>", " a&b", "\n"], [2.0, 1.0, 0.0], peak=0)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a&amp;b" in html
    assert html.count("underline") == 1
    assert html.count("<span") == 2
    with pytest.raises(ValueError, match=r"3 pieces .* 1 values"):
        highlight(["a", "b", "c"], [1.0])


# -- command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--tier", "cqu"], "did you mean 'cpu'"),
        (["compare", "--threads", "many"], "whole number"),
        (["train", "smollm"], "did you mean 'smollm2-135m'"),
        (["train", "--sae", "topkk"], "did you mean 'topk'"),
        (["train", "--k", "0"], "choose k > 0"),
        (["train", "--k", "99999"], "exceeds d_sae"),
        (["train", "--d-sae", "0"], "at least 1"),
        (["train", "--tokens", "0"], "at least 1"),
        (["evaluate", "nowhere"], "not a saved SAE"),
    ],
)
def test_bad_arguments_exit_with_2_and_a_sentence(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_failure_exits_with_1_and_debug_shows_where(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUTORIAL_SAE_CACHE", str(tmp_path / "file" / "below"))
    assert cli.main(["doctor"]) == 1
    assert "TUTORIAL_SAE_CACHE" in capsys.readouterr().err
    with pytest.raises(TutorialError):
        cli.main(["doctor", "--debug"])


def test_ctrl_c_exits_with_1_and_says_how_to_go_on(capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tutorial_sae.compare.compare", stop)
    assert cli.main(["compare"]) == 1
    assert "run the same command again" in capsys.readouterr().err


def test_doctor_reports_and_clears(capsys, own_cache):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("machine", "memory", "GPU", "torch", "cache", str(own_cache)):
        assert word in said
    (own_cache / "downloads").mkdir()
    (own_cache / "downloads" / "file").write_bytes(b"x" * 2_000_000)
    assert cli.main(["doctor", "--clear-cache"]) == 0
    assert "2 MB freed" in capsys.readouterr().out
    assert not (own_cache / "downloads").exists()


def test_recipes_are_listed(capsys):
    assert cli.main(["train", "--list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_train_and_evaluate_from_the_command_line(tmp_path, capsys, monkeypatch, smollm2):
    monkeypatch.setattr("tutorial_sae.cli.load_model", lambda *_, **__: smollm2)
    monkeypatch.setattr("tutorial_sae.training.CALIBRATION_BATCHES", 1)
    out = tmp_path / "run"
    small = ["--d-sae", "64", "--k", "4", "--tokens", "1024", "--out", str(out)]
    monkeypatch.setitem(smollm2.__dict__, "default_hook", "blocks.1.hook_resid_post")
    assert cli.main(["train", *small]) == 0
    assert f"evaluate {out}" in capsys.readouterr().out
    assert Path(out / "sae.safetensors").exists()
    monkeypatch.setattr("tutorial_sae.cli.evaluate", partial(evaluate, tokens=300, ce_tokens=128))
    assert cli.main(["evaluate", str(out), "--cut", "batch"]) == 0
    assert json.loads((out / "eval.json").read_text())["cut"] == "batch"
