"""The three-cuts explorer: its arithmetic against loops, its messages, and what it sends to a browser.

What it looks like and how it answers to mouse and keyboard is tested in tests/browser, which needs Chromium.
"""

from __future__ import annotations

import ast
import html
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_explorer import ByteModel, byte_sae, made_up

from tutorial_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE, VanillaSAE
from tutorial_sae.widgets.explorer import (
    SCRIPT,
    ExplorerData,
    explorer,
    explorer_data,
    explorer_figure,
    explorer_html,
    payload,
    three_cuts,
)

SENTENCE = "The ferry leaves the harbour."


@pytest.fixture(scope="module")
def model() -> ByteModel:
    return ByteModel()


@pytest.fixture(scope="module")
def data(model: ByteModel) -> ExplorerData:
    return explorer_data(model, byte_sae(), SENTENCE, neighbours={"poor": "aaaa aaaa", "rich": "Quick, vex my jazz!"})


# -- the three cuts, against loops -----------------------------------------------------------------------


def keep_by_hand(z: list[list[float]], k: int, theta: float, beside: list[list[float]]) -> dict[str, list[list[bool]]]:
    """Which entries are kept, one entry at a time: those with fewer than the budget in front of them."""
    n = len(z)
    flat = [(value, t, i) for t, row in enumerate([*z, *beside]) for i, value in enumerate(row)]

    def in_front(value: float, t: int, i: int, rivals: list[tuple[float, int, int]]) -> int:
        return sum(other > value or (other == value and (s, j) < (t, i)) for other, s, j in rivals)

    row = [
        [v > 0 and in_front(v, t, i, [e for e in flat if e[1] == t]) < k for i, v in enumerate(z[t])] for t in range(n)
    ]
    budget = k * (n + len(beside))
    batch = [[v > 0 and in_front(v, t, i, flat) < budget for i, v in enumerate(z[t])] for t in range(n)]
    return {"row": row, "batch": batch, "threshold": [[v > theta for v in values] for values in z]}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_the_cuts_keep_what_a_loop_keeps(seed: int, step: float):
    made = made_up(tokens=1 + seed, latents=7, seed=seed, beside=[3, 2], step=step, k=2)
    for k, theta in ((1, 0.0), (2, 0.5), (5, 1.0), (7, 9.0)):
        for name in (None, "alone", "text 0", "text 1"):
            beside = made.neighbours[name].tolist() if name in made.neighbours else []
            expected = keep_by_hand(made.z.tolist(), k, theta, beside)
            cuts = three_cuts(made, k=k, theta=theta, neighbours=name)
            assert {cut: found.mask.tolist() for cut, found in cuts.items()} == expected
            assert {cut: found.l0.tolist() for cut, found in cuts.items()} == {
                cut: [sum(row) for row in rows] for cut, rows in expected.items()
            }


def test_the_error_is_that_of_decoding_what_is_kept(model: ByteModel, data: ExplorerData):
    sae = byte_sae()
    x = model.run_with_cache(torch.tensor([[1, *model.tokenizer([SENTENCE])["input_ids"][0]]]), "hook", 1)[1]["hook"][
        0, 1:
    ]
    x_n = (x - sae.norm_mean) / sae.norm_scale
    assert torch.equal(data.z, sae.pre_activations(x).detach())
    for name in (None, "poor", "rich"):
        for k in (1, 6, 30):
            for cut in three_cuts(data, k=k, theta=0.3 * k, neighbours=name).values():
                x_hat = (torch.where(cut.mask, data.z, 0) @ sae.W_dec + sae.b_dec).detach()
                assert cut.error == pytest.approx(float((x_n - x_hat).square().sum() / x_n.square().sum()), rel=1e-5)


def test_without_numbers_the_sae_speaks(data: ExplorerData):
    assert (data.k, data.theta) == (6, pytest.approx(0.9))
    assert three_cuts(data)["row"].error == three_cuts(data, k=6, theta=0.9)["row"].error
    assert three_cuts(data)["threshold"].l0.tolist() == (data.z > torch.tensor(0.9)).sum(dim=1).tolist()


def test_neighbours_move_the_batch_cut_and_nothing_else(data: ExplorerData):
    alone, rich = three_cuts(data), three_cuts(data, neighbours="rich")
    assert alone["row"].error == rich["row"].error
    assert alone["threshold"].error == rich["threshold"].error
    assert int(alone["batch"].l0.sum()) == 6 * len(data.pieces) != int(rich["batch"].l0.sum())


def test_codes_are_nested(data: ExplorerData):
    masks = [three_cuts(data, neighbours=name)["batch"].mask for name in (None, "poor", "rich")]
    masks.sort(key=lambda mask: int(mask.sum()))
    assert not (masks[0] & ~masks[1]).any()
    assert not (masks[1] & ~masks[2]).any()


@pytest.mark.parametrize("k", [0, -1, 97, 2.5, math.nan, math.inf, "8", None.__class__])
def test_a_wrong_k_is_refused_in_a_sentence(k: Any):
    with pytest.raises(ValueError, match=r"k=.* is not a whole number from 1 to 96"):
        three_cuts(made_up(), k=k)


@pytest.mark.parametrize("theta", [-1, math.nan, math.inf, "high"])
def test_a_wrong_theta_is_refused_in_a_sentence(theta: Any):
    with pytest.raises(ValueError, match=r"theta=.* is not a number of at least 0"):
        three_cuts(made_up(), theta=theta)


def test_unknown_neighbours_are_refused():
    with pytest.raises(ValueError, match="alone"):
        three_cuts(made_up(beside=[2]), neighbours="nobody")


# -- from a sentence to data -------------------------------------------------------------------------------


def test_on_a_model_of_transformers(gemma: Any):
    sae = BatchTopKSAE(64, 128, k=4).eval()
    data = explorer_data(gemma, sae, "Bees dance. 🐝")
    assert "".join(piece for piece in data.pieces if piece != "⋯") == "Bees dance. 🐝"
    assert data.z.shape == (len(data.pieces), 128)
    assert three_cuts(data)["threshold"].l0.sum() == 4 * len(data.pieces)  # without a threshold: as many as k takes


def test_other_variants(model: ByteModel):
    for sae in (TopKSAE(16, 24, k=3), VanillaSAE(16, 24, l1=1.0), JumpReLUSAE(16, 24, target_l0=3.0)):
        data = explorer_data(model, sae.eval(), SENTENCE)
        assert 1 <= data.k <= 24
        assert data.theta >= 0
        assert three_cuts(data).keys() == {"row", "batch", "threshold"}
    with pytest.raises(ValueError, match="Gated"):
        explorer_data(model, GatedSAE(16, 24, l1=1.0), SENTENCE)


def test_the_mask_of_the_sae_holds(model: ByteModel):
    sae = byte_sae()
    x = model.run_with_cache(torch.tensor([[1, *model.tokenizer(["abcde"])["input_ids"][0]]]), "hook", 1)[1]["hook"][
        0, 1:
    ]
    norms = x.norm(dim=1)
    sae.metadata["mask"] = {"norm_limit": float(norms.median()), "special": [0, 1]}
    expected = [c for c, norm in zip("abcde", norms, strict=True) if norm <= norms.median()]
    assert explorer_data(model, sae, "abcde").pieces == expected
    sae.metadata["mask"] = {"norm_limit": 1e-3}
    with pytest.raises(ValueError, match="the sentence is empty but for tokens that the mask drops"):
        explorer_data(model, sae, "abcde")


def test_latents_limits_what_is_looked_at(model: ByteModel):
    data = explorer_data(model, byte_sae(), SENTENCE, latents=5)
    assert int((data.z > 0).sum(dim=1).max()) == 5


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("", "the sentence is empty: write a few words"),
        (" \n\t", "the sentence is empty: write a few words"),
        ("x" * 128, "the sentence has 128 tokens, and the context holds 127 after BOS: shorten it"),
    ],
)
def test_a_sentence_that_cannot_be_used(model: ByteModel, sentence: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        explorer_data(model, byte_sae(), sentence)
    with pytest.raises(ValueError, match="the text 'long' has 200 tokens"):
        explorer_data(model, byte_sae(), SENTENCE, neighbours={"long": 200 * "x"})


@pytest.mark.parametrize(
    "sentence", ["🎉 party 👩‍👩‍👧", "שלום עולם", "x" * 127, "<b>bold</b></script>", "日本", "e\u0301"]
)
def test_text_of_every_kind(model: ByteModel, sentence: str):
    data = explorer_data(model, byte_sae(), sentence)
    assert len(data.pieces) == len(sentence.encode())
    assert "".join(data.pieces).replace("⋯", "") == sentence


# -- what goes to the browser ------------------------------------------------------------------------------


def test_the_payload_holds_the_entries_in_float32():
    made = made_up(tokens=5, latents=12, beside=[4], step=0.5)
    sent = payload(made)
    values, columns = np.frombuffer(sent["values"], np.float32), np.frombuffer(sent["columns"], np.int32)
    start, z = 0, torch.zeros_like(made.z)
    for t, length in enumerate(sent["lengths"]):
        part = slice(start, start := start + length)
        pairs = list(zip((-values[part]).tolist(), columns[part].tolist(), strict=True))
        assert pairs == sorted(pairs)
        z[t, torch.from_numpy(columns[part].copy()).long()] = torch.from_numpy(values[part].copy())
    assert torch.equal(z, made.z)
    (alone, n, none), (name, many, larger) = sent["beside"]
    assert (alone, n, name, many) == ("alone", 0, "text 0", 4)
    assert not np.frombuffer(none, np.int32).any()
    by_hand = [int((made.neighbours["text 0"] > value).sum()) for value in values.tolist()]
    assert np.frombuffer(larger, np.int32).tolist() == by_hand


def test_the_widget_says_what_it_is(data: ExplorerData):
    widget = explorer(data)
    assert repr(widget) == f"three-cuts explorer: {len(data.pieces)} tokens, 64 latents"
    assert widget._repr_mimebundle_()[0]["text/plain"] == repr(widget)
    assert repr(data) == f"ExplorerData({len(data.pieces)} tokens, 64 latents, k=6, theta=0.9)"
    assert not widget.live


def test_a_typed_sentence_is_answered(model: ByteModel):
    widget = explorer(model, byte_sae(), SENTENCE, neighbours={"poor": "aaaa"}, latents=40)
    before = widget.data
    assert widget.live
    for text, message in (
        ("", "the sentence is empty: write a few words"),
        ("x" * 400, "the sentence has 400 tokens, and the context holds 127 after BOS: shorten it"),
    ):
        widget.sentence = text
        assert widget.answer == {"to": text, "message": message}
        assert widget.data == before
    widget.sentence = "שלום 🎉"
    assert widget.answer == {"to": "שלום 🎉", "message": ""}
    assert widget.data["sentence"] == "שלום 🎉"
    assert [name for name, _, _ in widget.data["beside"]] == ["alone", "poor"]
    fresh = explorer_data(model, byte_sae(), "שלום 🎉", neighbours={"poor": "aaaa"}, latents=40)
    assert widget.data == payload(fresh)


def test_what_goes_wrong_inside_is_told_without_a_trace(model: ByteModel, monkeypatch: pytest.MonkeyPatch):
    widget = explorer(model, byte_sae(), SENTENCE)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a long story\nof many lines")

    monkeypatch.setattr(model, "run_with_cache", broken)
    widget.sentence = "anything"
    assert widget.answer == {"to": "anything", "message": "this cannot be computed (RuntimeError)"}


def test_the_page_holds_all_it_needs(tmp_path: Path):
    made = made_up(tokens=16, latents=2304, beside=[64, 64])
    page = explorer_html(made)
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "import(" not in text
    assert SCRIPT.read_text(encoding="utf-8") in text
    shown = page._repr_html_()
    assert shown.startswith('<iframe srcdoc="')
    assert 'sandbox="allow-scripts"' in shown


def test_the_page_of_a_sentence_is_small():
    """As dense as the shipped SAE's z is (at most about 220 of 2304 entries), and then half as dense again."""
    made = made_up(tokens=16, latents=660, beside=[64, 64])
    assert float((made.z > 0).sum(dim=1).float().mean()) > 220
    assert len(explorer_html(made)._repr_html_()) < 400_000


def test_markup_in_a_sentence_stays_text(model: ByteModel):
    evil = "</script><img src=x onerror=alert(1)>"
    page = explorer_html(explorer_data(model, byte_sae(), evil))
    assert page.page.count("</script>") == 1
    assert "<img" not in page.page
    assert html.unescape(page._repr_html_().split('srcdoc="')[1].split('"')[0]) == page.page


def test_the_picture_says_what_it_shows(data: ExplorerData):
    figure = explorer_figure(data, k=3, neighbours="poor")
    cuts = three_cuts(data, k=3, neighbours="poor")
    for axis, (name, cut) in zip(figure.axes, cuts.items(), strict=True):
        assert axis.get_title() == f"{name}: mean L0 {cut.l0.float().mean():.1f}, error {cut.error:.3f}"
    alt = figure._repr_mimebundle_()[1]["image/png"]["alt"]
    assert all(f"error {cut.error:.3f}" in alt for cut in cuts.values())


@pytest.mark.filterwarnings("error")
def test_the_picture_takes_any_text(model: ByteModel):
    figure = explorer_figure(explorer_data(model, byte_sae(), "$x^2$ 🎉 日本 שלום"))
    assert figure._repr_mimebundle_()[0]["image/png"][:4] == b"\x89PNG"


def test_the_widget_library_loads_when_a_widget_is_made():
    at_the_top = ast.parse(SCRIPT.with_suffix(".py").read_text(encoding="utf-8")).body
    imports = [ast.unparse(node) for node in at_the_top if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    assert not [line for line in imports if "anywidget" in line or "traitlets" in line or "matplotlib" in line]
