"""Several processes against one: torchrun starts two and four, one with their batches joined is the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_program import RUNS, SETTINGS, cuts, matrix, runs, streamed
from safetensors.torch import load_file
from small_models import toy_documents, write_jsonl
from test_training import activations, batchtopk

from tutorial_sae import BatchTopKSAE, TrainConfig, load_sae, ranks, train
from tutorial_sae.activations import START
from tutorial_sae.saes import keep_batch
from tutorial_sae.training import _own_position

HERE = Path(__file__).resolve().parent


def torchrun(count: int, *program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *program]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    settings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module", params=[2, 4])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    write_jsonl(folder / "numbers.jsonl", toy_documents(800))
    done = torchrun(request.param, str(HERE / "ranks_program.py"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


@cache
def alone() -> dict[str, torch.Tensor]:
    return runs() | cuts()


def by_rank(many: tuple[int, Path]) -> list[dict[str, torch.Tensor]]:
    count, folder = many
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(count)]


def test_all_ranks_end_with_the_same_sae_and_the_same_metrics(many):
    first, *others = by_rank(many)
    for name in first:
        if name != "seen" and (not name.split("/")[0].endswith("cut") or "local" in name):
            assert all(torch.equal(first[name], other[name]) for other in others), name


@pytest.mark.parametrize("run", [name for name in RUNS if "local" not in name])
def test_many_ranks_do_what_one_process_does_with_the_joined_batch(many, run):
    found, wanted = by_rank(many)[0], alone()
    for name in [name for name in wanted if name.startswith(f"{run}/")]:
        if name.endswith("tokens_since_fired"):
            assert torch.equal(found[name], wanted[name]), name
        else:
            torch.testing.assert_close(
                found[name], wanted[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_global_cut_is_exact_ties_included(many):
    parts = by_rank(many)
    for name, whole in alone().items():
        if name.startswith("cut/"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole), name


def test_the_local_cut_gives_each_rank_a_budget_of_its_own(many):
    count, _ = many
    parts = by_rank(many)
    for k in (1, 2.5, 3):
        own = torch.cat([part[f"own cut/{k}"] for part in parts])
        oracle = torch.cat([keep_batch(z, k) for z in matrix().chunk(count)])
        assert torch.equal(own, oracle)
        assert not torch.equal(own, keep_batch(matrix(), k))
    assert not torch.equal(parts[0]["batchtopk, local cut/W_dec"], parts[0]["batchtopk/W_dec"])


def test_a_run_stopped_among_many_goes_on_alone(many):
    _, folder = many
    whole = train(batchtopk(), activations(), TrainConfig(**SETTINGS)).sae
    moved = train(batchtopk(), activations(), TrainConfig(**SETTINGS), out=folder / "stopped")
    assert moved.history[-1]["step"] == 50
    torch.testing.assert_close(moved.sae.W_dec, whole.W_dec, rtol=2e-3, atol=2e-4)
    assert torch.equal(moved.sae.tokens_since_fired, whole.tokens_since_fired)


def test_a_batch_that_the_ranks_cannot_share_is_refused(many):
    count, folder = many
    assert f"batch_size=65 cannot be shared among {count} processes" in (folder / "refused").read_text()


def test_each_rank_streams_documents_of_its_own(many):
    seen = [set(part["seen"].tolist()) for part in by_rank(many)]
    assert all(len(tokens) > 200 for tokens in seen)
    assert not any(a & b for a, b in combinations(seen, 2))


def test_a_stream_stopped_among_many_goes_on_alone(many):
    """Another run from there on, which says so in no way but its data: nothing is left out, some text is read twice."""
    _, folder = many
    moved = streamed(folder, BatchTopKSAE(8, 32, k=3), "stopped stream")
    steps = [line["step"] for line in moved.history]
    assert steps == sorted(set(steps))
    assert steps[-1] == 100
    whole = load_sae(folder / "streamed")
    assert moved.sae.metadata["mask"] == whole.metadata["mask"]
    assert torch.equal(moved.sae.norm_mean, whole.norm_mean), "which does not depend on how many there are"


def test_ranks_of_another_number_begin_with_the_earliest_document(monkeypatch):
    """Where the four of before were at documents 90, 75 (with some of 60 left over), 80 and 95."""
    places = [(90, [88]), (75, [60, 60, 71]), (80, []), (95, [93])]
    positions: list[Any] = [
        {
            **START,
            "part": 3,
            "batch": 7,
            "kept": 1000,
            "text": {"document": at, "tokens": [], "owners": left, "labels": {}},
        }
        for at, left in places
    ]
    monkeypatch.setattr(ranks, "size", lambda: 2)
    here = _own_position(positions, {"left.0": torch.ones(3, 8)})
    assert here is not None
    assert here["text"]["document"] == 60
    assert (here["part"], here["batch"], here["left"], here["kept"]) == (4, 0, None, 2000)
    monkeypatch.setattr(ranks, "size", lambda: 4)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    same = _own_position(positions, {"left.0": torch.ones(3, 8)})
    assert same is not None
    assert (same["part"], same["batch"], same["text"]["document"], len(same["left"])) == (3, 7, 90, 3)
