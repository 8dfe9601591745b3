"""What the README says is what was measured, and its commands are those that CI runs."""

import json
import re
from pathlib import Path

from benchmarks import calibration, panels, readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_in_the_readme_are_the_committed_ones():
    assert readme.section() in README


def test_the_figure_is_there():
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_three_seeds_of_every_panel_are_committed_with_hardware_and_sizes():
    measured = readme.load()
    assert measured["meta"]["hardware"]["processor"]
    assert measured["setting"]["tokens_seen"] > 900_000
    made = {(row["variant"], row["d_sae"], row["k"], row["seed"]) for row in measured["rows"]}
    assert made == {tuple(job) for job in panels.jobs()}
    assert {row["seed"] for row in measured["rows"]} == {0, 1, 2}


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`((?:tutorial_sae|tests)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name


def test_there_are_exactly_two_commands_for_set_up():
    commands = re.findall(r"^pip install -r requirements\.txt && (.+)$", README, re.MULTILINE)
    assert commands == ["python -m tutorial_sae compare", "pytest"]


def test_python_in_the_readme_runs_on_names_that_exist():
    code, _ = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    compiled = compile(code, "README.md", "exec")
    import tutorial_sae

    imported = re.findall(r"from tutorial_sae import (.+)", code)[0].split(", ")
    assert all(hasattr(tutorial_sae, name) for name in imported)
    assert compiled.co_names


def test_the_toy_world_of_the_readme_is_recovered(capsys):
    _, code = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    exec(code, {})
    said = capsys.readouterr().out
    assert float(re.findall(r"mmcs=([\d.]+)", said)[0]) > 0.95
    assert "JumpReLUSAE(" in said


def test_quality_bars_hold_for_every_seed():
    """Held-out FVU and CE at k = 32, about a million tokens seen, and L0 under the threshold."""
    rows = [row for row in readme.load()["rows"] if (row["d_sae"], row["k"]) == (2304, 32)]
    for row in rows:
        if (row["variant"], row["cut"]) in (("topk", "row"), ("batchtopk", "threshold")):
            assert row["fvu"] <= 0.21, json.dumps(row)
            assert row["ce_increase"] <= 0.32, json.dumps(row)
            assert abs(row["l0"] - 32) <= 3.2, json.dumps(row)


def test_calibrated_on_32_batches_l0_on_fresh_text_is_within_five_percent_of_k():
    rows = json.loads(calibration.RESULTS.read_text(encoding="utf-8"))["rows"]
    mine = [row for row in rows if row["method"] == "batch_min_mean" and row["batch_size"] == 1024]
    assert {(row["k"], row["seed"]) for row in mine} == {(k, seed) for k in (16, 32, 64) for seed in (0, 1)}
    for row in mine:
        assert abs(row["l0"] - row["k"]) <= 0.05 * row["k"], json.dumps(row)
    assert {1, 4, 16} <= {row["batch_size"] for row in rows}, "small batches stand beside it"
