"""Looking inside, held against loops over every token, and against plain hooks of TransformerLens."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tutorial_sae import ActivationStore, BatchTopKSAE, VanillaSAE, cli, load_text
from tutorial_sae.latents import Latents, ablation, direction, logit_effects, steered
from tutorial_sae.report import write_latents
from tutorial_sae.widgets.latents import latents_data, latents_html

HOOK, WIDTH = "blocks.3.hook_resid_post", 96


@pytest.fixture(scope="module")
def store(gpt2, corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTORIAL_SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ActivationStore(gpt2, load_text(corpus), HOOK, tokens=700, context=32)


@pytest.fixture(scope="module")
def sae(store):
    """Untrained, but with a threshold of its own: about five latents per token, and one that never fires."""
    made = BatchTopKSAE(store.d_in, WIDTH, k=5).requires_grad_(False).eval()
    made.fit_normalization(store[:])
    made.b_enc[7] = -1000
    z = made.pre_activations(store[:])
    made.threshold.fill_(float(z.flatten().sort(descending=True).values[5 * len(z)]))
    made.metadata |= {"hook": HOOK, "mask": {"norm_limit": store.norm_limit}}
    return made


@pytest.fixture(scope="module")
def index(sae, store):
    return Latents(sae, store)


def test_every_value_is_found_by_latent(index, sae, store):
    latents = sae.encode(store[:])
    assert index.peak.tolist() == latents.amax(dim=0).tolist()
    assert index.density.tolist() == pytest.approx((latents > 0).float().mean(dim=0).tolist())
    for latent in (0, 7, 41, WIDTH - 1):
        token, value = index.fired(latent)
        expected = [(i, float(v)) for i, v in enumerate(latents[:, latent]) if v > 0]
        assert list(zip(token.tolist(), value.tolist(), strict=True)) == expected


def test_another_cut_can_be_named(sae, store):
    by_row = Latents(sae, store, "row")
    assert float(by_row.density.sum()) == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize("at", [1.0, 0.5])
def test_examples_are_the_nearest_values_in_their_contexts(index, sae, store, at):
    latents = sae.encode(store[:])
    latent = int((latents > 0).sum(dim=0).argmax())
    column = latents[:, latent]
    examples = index.examples(latent, 4, window=6, at=at)
    assert len(examples) == 4
    rows, wanted = [], []
    for i in sorted(
        column.nonzero().flatten().tolist(), key=lambda i: abs(float(column[i]) - at * float(column.max()))
    ):
        if store.place(i)[0] not in rows and len(rows) < 4:
            rows.append(store.place(i)[0])
            wanted.append(i)
    for example, i in zip(examples, wanted, strict=True):
        context = store.context(i)
        start = max(1, context.position - 6)
        assert example.pieces == context.pieces[start : context.position + 7]
        assert example.peak == context.position - start
        assert example.source == context.source
        values = dict.fromkeys(range(len(example.pieces)), 0.0)
        for j in range(len(store)):
            row, position = store.place(j)
            if row == store.place(i)[0] and start <= position < start + len(values):
                values[position - start] = float(column[j])
        assert example.values == list(values.values())


def test_company_by_the_definition(index, sae, store):
    on = sae.encode(store[:]) > 0
    latent = int(on.sum(dim=0).argmax())
    cosines = {}
    for other in range(WIDTH):
        both = int((on[:, latent] & on[:, other]).sum())
        if other != latent and both:
            cosines[other] = both / math.sqrt(int(on[:, latent].sum()) * int(on[:, other].sum()))
    found = index.together(latent, 3)
    assert [one.cosine for one in found] == pytest.approx(sorted(cosines.values(), reverse=True)[:3])
    for one in found:
        assert cosines[one.latent] == pytest.approx(one.cosine)
        assert one.share == pytest.approx(float((on[:, latent] & on[:, one.latent]).sum() / on[:, latent].sum()))


def test_a_latent_that_never_fires_has_nothing_to_show(index):
    assert len(index.fired(7)[0]) == 0
    assert index.examples(7) == []
    assert index.together(7) == []
    assert index.peak[7] == 0


@pytest.mark.parametrize("latent", [-1, WIDTH, 10_000])
def test_a_latent_out_of_range_is_refused(index, gpt2, sae, store, latent):
    message = f"latent {latent} of an SAE with d_sae=96: choose 0 to 95"
    for attempt in (
        lambda: index.fired(latent),
        lambda: index.examples(latent),
        lambda: index.together(latent),
        lambda: logit_effects(gpt2, sae, [latent]),
        lambda: ablation(gpt2, sae, torch.ones(1, 4, dtype=torch.long), latent),
        lambda: steered(gpt2, sae, "The ferry", latent, 1.0),
    ):
        with pytest.raises(IndexError, match=re.escape(message)):
            attempt()


# -- what a latent does ----------------------------------------------------------------------------------


def test_ablation_by_hooks(gpt2, sae, store):
    latent = int(sae.encode(store[:]).gt(0).sum(dim=0).argmax())
    tokens = torch.tensor([store.context(i).tokens for i in (0, 300)])
    special = torch.isin(tokens, torch.tensor(gpt2.card.special))
    seen: list[Any] = []

    def take_away(x, hook):
        seen.append(x.clone())
        for row in range(len(x)):
            for position in range(x.shape[1]):
                v = x[row, position]
                if not special[row, position] and v.norm() <= store.norm_limit:
                    x[row, position] = v - sae.encode(v[None])[0, latent] * sae.norm_scale * sae.W_dec[latent]
        return x

    changed = gpt2.run_with_hooks(tokens, fwd_hooks=[(HOOK, take_away)], return_type="logits")
    clean = gpt2(tokens, return_type="logits")
    losses = [F.cross_entropy(o[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none") for o in (changed, clean)]
    found = ablation(gpt2, sae, tokens, latent)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, losses[0] - losses[1], atol=2e-5, rtol=1e-4)
    before_it_fires = (sae.encode(seen[0])[..., latent] > 0).cumsum(dim=1)[:, :-1] == 0
    assert (found[before_it_fires].abs() < 1e-6).all(), "nothing changes before the latent fires"


def test_logit_effects_of_a_direction(gpt2, gemma):
    """Where the last norm divides by the same number with and without, the difference of logits is the effect."""
    for model in (gpt2, gemma):
        sae = VanillaSAE(model.cfg.d_model, 12, l1=1.0, seed=3).requires_grad_(False)
        sae.norm_scale.fill_(2.5)
        effects = logit_effects(model, sae, [4, 9])
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, model.cfg.d_model, generator=generator) * 1e4  # so long that the scale hardly moves
        for row, latent in zip(effects, (4, 9), strict=True):
            d = sae.norm_scale * sae.W_dec[latent]
            step = 1e2
            moved, still = (model.ln_final(y) @ model.W_U.float() for y in (x + step * d, x))
            change = (moved - still)[0, 0]
            change = change - change.mean()
            cosine = F.cosine_similarity(change, row, dim=0)
            base = still[0, 0] - still.mean()  # the norm also shortens what was there
            residual = change - base * (change @ base) / (base @ base)
            wanted = row - base * (row @ base) / (base @ base)
            assert F.cosine_similarity(residual, wanted, dim=0) > 0.999, cosine
        torch.testing.assert_close(effects.mean(dim=1), torch.zeros(2), atol=1e-4, rtol=0)


def test_steering_by_hooks(gpt2, sae):
    prompt, latent, value = "The ferry leaves the harbour", 3, 40.0
    ids = [gpt2.card.bos, *gpt2.tokenizer(prompt)["input_ids"]]
    start = len(ids)

    def push(x, hook):
        x[:, 1:] += value * sae.norm_scale * sae.W_dec[latent]
        return x

    for _ in range(6):
        logits = gpt2.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(HOOK, push)], return_type="logits")
        ids.append(int(logits[0, -1].argmax()))
    pushed = steered(gpt2, sae, prompt, latent, value, tokens=6)
    assert pushed == gpt2.tokenizer.decode(ids[start:])
    assert pushed != steered(gpt2, sae, prompt, latent, 0.0, tokens=6)


def test_steering_without_value_is_the_model_alone(gpt2, sae):
    drawn = [steered(gpt2, sae, "Bees", 3, 0.0, tokens=5, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert steered(gpt2, sae, "Bees", 3, 0, tokens=5) == steered(gpt2, sae, "Bees", 50, 0, tokens=5)


def test_bad_prompts_and_pairs_are_refused(gpt2, gemma, sae):
    with pytest.raises(ValueError, match="the prompt has 300 tokens, and the context holds 127 after BOS: shorten it"):
        steered(gpt2, sae, " bee" * 300, 3, 1.0)
    with pytest.raises(ValueError, match="value=nan: give a finite number"):
        steered(gpt2, sae, "Bees", 3, float("nan"))
    for attempt in (
        lambda: steered(gemma, sae, "Bees", 3, 1.0),
        lambda: logit_effects(gemma, sae, [3]),
        lambda: ablation(gemma, sae, torch.ones(1, 4, dtype=torch.long), 3),
    ):
        with pytest.raises(ValueError, match="this SAE reads d_in=48, and tiny-gemma-2 has d_model=64"):
            attempt()
    token_wise = VanillaSAE(48, 8, l1=1.0, normalize="token")
    with pytest.raises(ValueError, match="no one direction in raw units"):
        direction(token_wise, 0)


# -- the page --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(gpt2, sae, store):
    return latents_data(gpt2, sae, store)


def test_the_page_has_every_latent_as_the_index_has_it(data, index, gpt2, sae):
    assert len(data["latents"]) == WIDTH
    assert json.loads(json.dumps(data))["latents"][41]["count"] == len(index.fired(41)[0])
    for latent in (7, 41):
        one = data["latents"][latent]
        assert one["density"] == float(index.density[latent])
        assert [e[0] for e in one["top"]] == [e.pieces for e in index.examples(latent, 8)]
        assert not [e for e in one["middle"] if e in one["top"]]
        assert [pair[0] for pair in one["near"]] == [other.latent for other in index.together(latent, 4)]
        (effects,) = logit_effects(gpt2, sae, [latent])
        assert one["up"] == [gpt2.tokenizer.decode([t]) for t in effects.topk(8).indices.tolist()]
        assert one["down"] == [gpt2.tokenizer.decode([t]) for t in (-effects).topk(8).indices.tolist()]
    assert data["latents"][7]["top"] == [] == data["latents"][7]["near"]
    assert data["first"] == int(index.density.argmax())


def test_text_ends_no_script(data):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    latents = [one | {"up": [evil]} for one in data["latents"]]
    for page in (latents_html(data | {"latents": latents}).page, latents_html(data | {"latents": latents}).inline):
        assert "<img" not in page
        assert page.count("</script>") == 1
        assert "\\u003c/script>" in page


def test_a_page_opens_at_a_latent_that_is_there(data):
    assert '"first": 41' in latents_html(data, 41).page
    with pytest.raises(IndexError, match="latent 96 of 96: choose 0 to 95"):
        latents_html(data, WIDTH)
    shown = latents_html(data)._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert 'sandbox="allow-scripts"' in shown
    assert "<script" not in shown


def test_the_exported_page_is_one_file(data, tmp_path):
    path = write_latents(data, tmp_path)
    assert path == tmp_path / "latents.html"
    assert sorted(tmp_path.iterdir()) == [path]
    page = path.read_text("utf-8")
    assert data["about"][0] in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert "import numpy" not in page


def test_export_from_the_command_line(tmp_path, capsys, monkeypatch, gpt2, sae, corpus, own_cache):
    monkeypatch.setattr("tutorial_sae.cli.load_model", lambda *_, **__: gpt2)
    monkeypatch.setattr("tutorial_sae.cli.load_text", lambda *_, **__: load_text(corpus))
    monkeypatch.setattr(cli, "PAGE_TOKENS", 300)
    sae.metadata["model"] = "gpt2"
    sae.save(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "html", str(tmp_path / "out" / "deep")]) == 0
    path = tmp_path / "out" / "deep" / "latents.html"
    assert str(path) in capsys.readouterr().out
    assert "300 activations of held-out text" in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "--to", "html", "out"], "not a saved SAE"),
        (["export", "nowhere", "--to", "htm", "out"], "did you mean 'html'"),
        (["export", "nowhere", "--to", "html", __file__], "is a file: name a folder"),
    ],
)
def test_bad_exports_are_refused(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_sae_of_unknown_origin_is_refused(tmp_path, capsys):
    BatchTopKSAE(8, 16, k=2).save(tmp_path)
    assert cli.main(["export", str(tmp_path), "--to", "html", str(tmp_path / "out")]) == 2
    assert "does not say which model" in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()
