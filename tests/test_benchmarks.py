"""The benchmarks measure what they say: the reference step, the dead that stay dead, rows that are missing and say why.

Nothing here needs the other libraries, and nothing is asserted about time."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import end_to_end, peers, scaling, step
from benchmarks.peers import REFERENCE, Ours, Reference, Size
from tutorial_sae import sparse

TINY = Size(16, 96, 3, 40)
OWN = [name for name in peers.CONTENDERS if name not in peers.LIBRARIES]


# -- the reference step against loops and finite differences -------------------------------------


def reference_loss(p: dict[str, np.ndarray], x: np.ndarray, dead: list[int], k: int, aux_k: int) -> float:
    """The loss of the paper's reference code, one number at a time."""
    n, d = x.shape
    normal = []
    for token in x:
        mean = sum(token) / d
        deviation = math.sqrt(sum((value - mean) ** 2 for value in token) / (d - 1)) + 1e-5
        normal.append((token - mean) / deviation)
    latents = len(p["W_dec"])
    z = [[max(0.0, float((token - p["b_dec"]) @ p["W_enc"][:, j])) for j in range(latents)] for token in normal]
    entries = sorted(((z[t][j], t, j) for t in range(n) for j in range(latents)), reverse=True)
    error = [token - p["b_dec"] for token in normal]
    for value, t, j in entries[: k * n]:
        error[t] = error[t] - value * p["W_dec"][j]
    loss = sum(float(e @ e) for e in error) / (n * d)
    for t in range(n) if dead else ():
        miss = error[t]
        for j in sorted(dead, key=lambda j: -z[t][j])[:aux_k]:
            miss = miss - z[t][j] * p["W_dec"][j]
        loss += float(miss @ miss) / (n * d) / 32
    return loss


def small_reference(dead: int) -> tuple[Reference, torch.Tensor]:
    torch.manual_seed(3)
    reference = Reference(5, 12, k=2, aux_k=2).double()
    with torch.no_grad():
        reference.b_dec.add_(0.1 * torch.randn(5))
    reference.prepare(dead)
    return reference, torch.randn(6, 5, dtype=torch.float64)


@pytest.mark.parametrize("dead", [0, 1, 4])
def test_the_reference_has_the_gradients_of_its_definition(dead):
    reference, x = small_reference(dead)
    loss = reference.loss(x)
    loss.backward()
    p = {name: value.detach().numpy().copy() for name, value in reference.named_parameters()}
    rest = (x.numpy(), list(range(dead)), 2, 2)
    assert loss.item() == pytest.approx(reference_loss(p, *rest), rel=1e-12)
    assert reference.b_enc.grad is None, "it is there and not used"
    for name in ("W_enc", "W_dec", "b_dec"):
        got, wanted = getattr(reference, name).grad.numpy(), np.zeros_like(p[name])
        for place in np.ndindex(wanted.shape):
            ends = []
            for shift in (1e-6, -2e-6):  # there and back
                p[name][place] += shift
                ends.append(reference_loss(p, *rest))
            p[name][place] += 1e-6
            wanted[place] = (ends[0] - ends[1]) / 2e-6
        assert np.linalg.norm(got - wanted) < 1e-7 * np.linalg.norm(wanted), name
        if dead and name == "W_enc":
            assert np.abs(got[:, :dead]).sum() > 0, "AuxK is at work"


def test_the_reference_normalises_its_decoder_before_the_step_of_adam():
    reference, x = small_reference(0)
    with torch.no_grad():
        reference.W_dec.mul_(1.5)
    before = reference.W_dec.detach().clone()
    for group in reference.adam.param_groups:
        group["lr"] = 0.0
    reference.step(x)
    assert reference.W_dec.grad is not None
    torch.testing.assert_close(reference.W_dec.detach(), before / 1.5)
    along = (reference.W_dec.grad * before).sum(dim=1)
    assert along.abs().max() < 1e-12
    assert reference.W_dec.grad.abs().max() > 1e-4
    reference.adam.param_groups[0]["lr"] = 1e-2
    reference.step(x)
    assert (reference.W_dec.norm(dim=1) - 1).abs().max() > 1e-6, "and not after it"


def test_the_reference_takes_a_latent_for_dead_after_five_silent_batches():
    reference, x = small_reference(0)
    with torch.no_grad():
        reference.W_enc[:, 0] = 0
    for batch in range(1, 7):
        reference.loss(x)
        assert int(reference.batches_silent[0]) == batch
        assert (reference.dead() > 0) == (batch >= 5)


# -- the dead ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dead", [0, 24])
def test_the_dead_are_those_that_were_meant_and_stay_dead(name, dead):
    size = TINY._replace(dead=dead)
    contender = peers.CONTENDERS[name](size)
    for x in step.batches(size, None)[0]:
        step.timed(contender, x, dead)
        assert contender.dead() == dead


@pytest.mark.parametrize("name", [REFERENCE, "ours"])
def test_dead_latents_that_fire_are_an_error(name, monkeypatch):
    monkeypatch.setattr(peers, "DEAD_SCALE", 100.0)
    with pytest.raises(RuntimeError, match="24 were meant to be"):
        step.timed(peers.CONTENDERS[name](TINY), step.batches(TINY, None)[0][0], 24)


@pytest.mark.parametrize("fast", [True, False])
def test_auxk_reaches_the_dead_of_ours(fast):
    ours = Ours(TINY, fast=fast)
    for dead in (0, 24):
        ours.prepare(dead)
        before = ours.encoder.clone()
        ours.step(step.batches(TINY, None)[0][0])
        moved = (ours.encoder - before).abs().sum(dim=1) > 0
        assert bool(moved[:24].all()) or not dead


# -- data, time, memory, agreement ---------------------------------------------------------------


def test_batches_are_centred_scaled_and_of_the_size_asked_for(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"activations": 5 + torch.randn(400, 16) * torch.arange(1.0, 17)}, path)
    for file, what in ((path, "activations of"), (None, "Gaussian")):
        data, said = step.batches(TINY, file)
        x = torch.cat(data)
        assert what in said
        assert [len(part) for part in data] == [40] * 8
        assert x.mean(dim=0).abs().max() < 1e-4
        assert float(x.square().sum(dim=1).mean()) == pytest.approx(16, rel=1e-4)
    assert "Gaussian" in step.batches(TINY._replace(d_in=8), path)[1], "the file has another width"


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return step.run(step.QUICK, OWN, rounds=2, warmup=2, with_memory=False)


def test_a_quick_run_has_a_row_for_every_contender_and_survives_json(quick):
    assert quick["meta"]["hardware"]["cores"]
    assert [entry["dead"] for entry in quick["sizes"]] == [0, 64]
    for entry in quick["sizes"]:
        assert list(entry["rows"]) == OWN
        assert not entry["missing"]
        assert entry["rows"][REFERENCE]["ratio"] == 1.0
        assert all(row["ms"] > 0 for row in entry["rows"].values())
    table = step.table(json.loads(json.dumps(quick)))
    assert table == step.table(quick)
    assert all(f"| {name} |" in table for name in OWN)


def test_speed_is_the_median_over_rounds_of_the_reference_time_over_its_own(monkeypatch):
    seconds = {Reference: iter([0.004, 0.008, 0.004]), Ours: iter([0.002, 0.002, 0.004])}
    monkeypatch.setattr(step, "timed", lambda contender, x, dead: next(seconds[type(contender)]))
    rows, missing = step.measure(TINY, [REFERENCE, "ours"], step.batches(TINY, None)[0], rounds=3, warmup=0)
    assert not missing
    assert rows["ours"]["ratio"] == 2.0, "of 2, 4 and 1"
    assert rows["ours"]["ms"] == 2.0


def test_the_two_paths_agree_within_the_bars(quick):
    for entry in quick["sizes"]:
        assert set(entry["agreement"]) == {"0", "64"}
        for dead, found in entry["agreement"].items():
            assert found["kept"] == 4 * 64
            assert found["furthest_from_cut"] <= 1e-6
            assert found["gradient_error"] <= (1e-5 if int(dead) else 1e-6)


def test_candidates_in_bfloat16_are_watched_too(monkeypatch):
    tried = []
    rough = sparse.keep_largest_rough
    monkeypatch.setattr(sparse, "bf16_is_fast", lambda: True)
    monkeypatch.setattr(sparse, "keep_largest_rough", lambda *rest: tried.append(rough(*rest)) or tried[-1])
    found = step.agreement(step.QUICK[0], step.batches(step.QUICK[0], None)[0])
    assert tried[-1] is not None, "it did not have to give up"
    assert found["furthest_from_cut"] <= 1e-6
    assert found["gradient_error"] <= 1e-6
    parts = scaling.Watched(scaling.QUICK, "batchtopk").parts
    assert [parts()["product"] for _ in range(6)][-1] == 0.0


def test_a_path_that_keeps_something_else_is_found_out(monkeypatch):
    keep_largest = sparse.keep_largest
    monkeypatch.setattr(sparse, "bf16_is_fast", lambda: False)  # else candidates are looked for elsewhere
    monkeypatch.setattr(sparse, "keep_largest", lambda z, budget, guess: keep_largest(z, budget - 3, guess))
    found = step.agreement(TINY, step.batches(TINY, None)[0])
    assert found["differ"] == 3
    assert found["furthest_from_cut"] < 1e-2, "the three above the cut"
    assert found["gradient_error"] > 1e-4


def test_a_library_that_fails_costs_its_own_row_only_and_the_table_says_why(monkeypatch):
    def broken(size: Size) -> Any:
        raise ImportError("no such library")

    monkeypatch.setitem(peers.CONTENDERS, "sae-lens", broken)
    results = step.run(step.QUICK[:1], [REFERENCE, "sae-lens", "ours"], rounds=2, warmup=1, with_memory=False)
    assert list(results["sizes"][0]["rows"]) == [REFERENCE, "ours"]
    table = step.table(results)
    assert "| sae-lens | did not run |" in table
    assert "no such library" in table


def test_a_failure_of_our_own_is_not_taken_for_a_missing_library(monkeypatch):
    def broken(size: Size) -> Any:
        raise ValueError("a fault of ours")

    monkeypatch.setitem(peers.CONTENDERS, "ours", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        step.measure(TINY, [REFERENCE, "ours"], step.batches(TINY, None)[0], rounds=2, warmup=1)


def test_memory_is_at_least_the_parameters_their_gradients_and_adam():
    size = Size(256, 8192, 8, 64)
    least = 4 * 4 * 2 * size.d_in * size.d_sae / 1e6
    used = step.memory(REFERENCE, size, None)
    assert used is not None
    assert least <= used <= 3 * least


# -- scaling -------------------------------------------------------------------------------------


def test_scaling_doubles_one_thing_at_a_time_and_finds_the_parts():
    rows = scaling.measure(scaling.QUICK, rounds=2, warmup=1)
    assert len(rows) == 2 * 5
    for row in rows:
        changed = {field for field in ("d_in", "d_sae", "k", "batch") if row[field] != getattr(scaling.QUICK, field)}
        assert changed == ({row["case"].split()[-1]} if row["case"] != "base" else set())
        assert row["ms"]["selection"] > 0, "the selection has another name now"
        assert row["ratio"] == 1.0 or row["case"] != "base"
    table = scaling.table({"rows": rows})
    assert table.count("\n") == 1 + len(rows)


def test_parts_of_a_step_add_up_to_it():
    parts = scaling.Watched(scaling.QUICK, "batchtopk").parts()
    assert sum(parts[name] for name in scaling.PARTS) == pytest.approx(parts["total"])


# -- what is committed ---------------------------------------------------------------------------


def test_committed_results_are_whole_and_explain_what_is_missing():
    if step.RESULTS.exists():
        results = json.loads(step.RESULTS.read_text(encoding="utf-8"))
        assert [entry["d_sae"] for entry in results["sizes"]] == [size.d_sae for size in step.SIZES]
        for entry in results["sizes"]:
            for name in peers.contenders(results["meta"]["hardware"]["fast_bf16"]):
                assert name in entry["rows"] or entry["missing"][name], name
                assert name not in entry["rows"] or entry["rows"][name]["memory_mb"] is not None, name
        table = step.table(results)
        assert all(f"| {name} |" in table for name in results["sizes"][0]["rows"])
    if scaling.RESULTS.exists():
        results = json.loads(scaling.RESULTS.read_text(encoding="utf-8"))
        assert scaling.table(results).count("\n") == 1 + 2 * len(scaling.grid(scaling.BASE))


# -- time to the same error ----------------------------------------------------------------------


def race(**final: float) -> dict[str, Any]:
    runs = [
        {"name": "ours (BatchTopK)", "lr": 1e-3, "curve": [[1.0, 0.6], [2.0, 0.4], [3.0, final["ours"]]]},
        {"name": "ours (BatchTopK)", "lr": 3e-3, "curve": [[1.0, 0.9], [2.0, 0.8], [3.0, 0.7]]},
        {"name": "sae-lens (BatchTopK)", "lr": 1e-3, "curve": [[10.0, 0.7], [20.0, 0.5], [30.0, final["theirs"]]]},
    ]
    rates = [{"threads": 2, "rows_at_once": rows, "tokens_per_second": 100.0 * rows} for rows in (4, 8)]
    both = [
        {"seed": seed, "fast": fast, "fvu": 0.2 + seed / 100 + fast / 1e4} for seed in (0, 1) for fast in (True, False)
    ]
    return {"runs": runs, "missing": {"sparsify (TopK)": "no module"}, "harvest": rates, "paths": both}


def test_the_time_to_an_error_lies_on_the_line_between_two_measurements():
    curve = [[1.0, 0.6], [2.0, 0.4], [4.0, 0.3]]
    assert end_to_end.reached(curve, 0.5) == pytest.approx(1.5)
    assert end_to_end.reached(curve, 0.35) == pytest.approx(3.0)
    assert end_to_end.reached(curve, 0.7) == 1.0, "not before it was measured"
    assert end_to_end.reached(curve, 0.2) == math.inf


def test_each_library_is_judged_by_its_better_rate_and_all_by_the_error_that_all_reach():
    found = end_to_end.table(race(ours=0.3, theirs=0.4))
    lines = found.splitlines()
    ours, theirs = (next(line for line in lines if line.startswith(f"| {name}")) for name in ("ours", "sae-lens"))
    assert [cell.strip() for cell in ours.split("|")[2:-1]] == ["0.001", "0.3000", "3", "2", "1.0"]
    assert [cell.strip() for cell in theirs.split("|")[2:-1]] == ["0.001", "0.4000", "30", "30", "15.0"]
    assert "to FVU 0.400" in found
    assert "sparsify (TopK) did not run: no module" in found
    assert "| 2 | 400 | 800 |" in found
    assert "seed 0: 0.20010 and 0.20000; seed 1: 0.21010 and 0.21000" in found


def test_a_contender_reconstructs_with_the_cut_it_is_trained_with():
    x = torch.randn(40, 16)
    for variant, kept in (("batchtopk", None), ("topk", 3)):
        ours = Ours(TINY, variant)
        ours.step(x)
        latents = ours.sae.encode(x)
        assert int((latents > 0).sum()) <= 3 * 40
        assert kept is None or int((latents > 0).sum(dim=1).max()) <= kept
        torch.testing.assert_close(ours.reconstruct(x), ours.sae.decode(latents))
