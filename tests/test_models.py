"""Models: what comes out of TransformerLens is what plain transformers computes, and nothing else is touched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from small_models import ToyModel
from torch import Tensor

from tutorial_sae import load_model, models
from tutorial_sae.models import activations_at, describe, token_losses

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "smollm2-135m"

PARAGRAPH = (
    "The river runs through the middle of the town, and every spring it rises. Most years the water stops a few "
    "steps below the street, where somebody has painted a line and a date on the wall of the old mill. In the year "
    "of the great flood it went higher than that. People carried their chairs and their books upstairs, and the "
    "baker moved his oven to the church, because the church stands on the hill. When the water fell again, it left "
    "mud in the cellars and small silver fish in the gardens, and the children collected them in buckets."
)


class Case(NamedTuple):
    """A model, the hook point of the course, and what plain transformers computes on the same tokens."""

    name: str
    model: Any
    hook: str
    hidden: int  # the index of that place in `hidden_states`
    tokens: Tensor
    hidden_states: tuple[Tensor, ...]
    logits: Tensor


HOOKS = {
    "gpt2": ("blocks.8.hook_resid_pre", 8),
    "gemma": ("blocks.12.hook_resid_post", 13),
    "smollm2": ("blocks.15.hook_resid_post", 16),
}


@pytest.fixture(scope="module", params=list(HOOKS))
def case(request: pytest.FixtureRequest) -> Case:
    from transformers import AutoModelForCausalLM

    model = request.getfixturevalue(request.param)
    folder = (
        models._embedded_folder() if request.param == "smollm2" else request.getfixturevalue(f"{request.param}_folder")
    )
    # TransformerLens chooses eager attention; with another kernel the last digits would differ.
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, plain.config.vocab_size, (2, 12), generator=chance)
    tokens[:, 0] = model.card.bos
    with torch.no_grad():
        out = plain(tokens, output_hidden_states=True)
    return Case(request.param, model, *HOOKS[request.param], tokens, out.hidden_states, out.logits)


def assert_same(case: Case, got: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, but for GPT-2, whose one product for queries, keys and values TransformerLens splits."""
    if case.name == "gpt2":
        assert torch.allclose(got, expected, rtol=1e-5, atol=5e-6)
    else:
        assert torch.equal(got, expected)


def mlps_of_transformers(model: Any) -> Iterator[tuple[int, torch.nn.Module]]:
    """(layer, the MLP that transformers made) for each block, found inside the wrappers."""
    for name, module in model.named_modules():
        found = re.fullmatch(r"blocks\.(\d+)\._original_component\.mlp\._original_component", name)
        if found:
            yield int(found[1]), module


# -- activations ------------------------------------------------------------------------------------


def test_residuals_are_those_of_transformers(case: Case):
    assert_same(case, activations_at(case.model, case.tokens, case.hook), case.hidden_states[case.hidden])


def test_every_block_has_the_residuals_of_transformers(case: Case):
    # The last entry of hidden_states is taken after the final norm, so the last block's output has none.
    last = case.model.cfg.n_layers - 1
    for hook, hidden in ((f"blocks.{last}.hook_resid_pre", last), ("blocks.3.hook_resid_post", 4)):
        assert_same(case, activations_at(case.model, case.tokens, hook), case.hidden_states[hidden])
    assert torch.equal(activations_at(case.model, case.tokens, "blocks.0.hook_resid_pre"), case.hidden_states[0])


def test_the_layers_above_the_hook_are_not_run(case: Case):
    ran = []
    layers = list(mlps_of_transformers(case.model))
    assert len(layers) == case.model.cfg.n_layers
    handles = [module.register_forward_hook(lambda *_, layer=layer: ran.append(layer)) for layer, module in layers]
    try:
        activations_at(case.model, case.tokens, case.hook)
    finally:
        for handle in handles:
            handle.remove()
    # For resid_pre the block itself may run, but none above it.
    assert ran == list(range(int(case.hook.split(".")[1]) + 1))


@pytest.mark.parametrize(
    ("hook", "nearest"),
    [
        ("blocks.8.hook_resid_prev", "blocks.8.hook_resid_pre"),
        ("blocks.3.resid_post", "blocks.3.hook_resid_post"),
        ("blocks.10.hook_resid_pre", "blocks.1.hook_resid_pre"),  # there are ten blocks, 0 to 9
        ("blocks.4.mlp.hook_out", "blocks.4.hook_mlp_out"),
        ("", "blocks."),
    ],
)
def test_an_unknown_hook_is_refused_with_the_nearest(gpt2: Any, hook: str, nearest: str):
    tokens = torch.tensor([[50256, 10, 11]])
    with pytest.raises(ValueError, match=r"unknown hook .*did you mean") as caught:
        activations_at(gpt2, tokens, hook)
    assert nearest in str(caught.value)
    with pytest.raises(ValueError, match="unknown hook"):
        token_losses(gpt2, tokens, hook, torch.zeros(1, 3, 48))


# -- losses -----------------------------------------------------------------------------------------


def test_losses_are_the_negative_log_probability_of_the_next_token(case: Case):
    losses = token_losses(case.model, case.tokens)
    log_probabilities = case.logits.double().log_softmax(-1)
    rows, length = case.tokens.shape
    assert losses.shape == (rows, length - 1)
    for row in range(rows):
        for position in range(length - 1):
            expected = -log_probabilities[row, position, case.tokens[row, position + 1]]
            assert losses[row, position].item() == pytest.approx(expected.item(), rel=1e-5)


def places(case: Case) -> list[str]:
    """The hook point of the course, both ends of the residual stream, and two that are not in it."""
    if case.name == "smollm2":
        return [case.hook]  # the rest is the same code, and thirty layers take their time
    last = case.model.cfg.n_layers - 1
    ends = ["blocks.0.hook_resid_pre", f"blocks.{last}.hook_resid_post"]
    return [case.hook, *ends, "blocks.5.hook_mlp_out", "blocks.3.hook_attn_out"]


def test_activations_put_back_unchanged_change_nothing(case: Case):
    clean = token_losses(case.model, case.tokens)
    for hook in places(case):
        same = activations_at(case.model, case.tokens, hook)
        assert torch.equal(token_losses(case.model, case.tokens, hook, same), clean), hook


def test_spliced_values_act_as_in_a_full_forward_pass_with_a_hook(case: Case):
    clean = token_losses(case.model, case.tokens)
    for hook in places(case):
        old = activations_at(case.model, case.tokens, hook)
        new = old + 0.3 * old.std() * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
        losses = token_losses(case.model, case.tokens, hook, new)
        with case.model.hooks(fwd_hooks=[(hook, lambda value, hook, new=new: new)]):
            assert torch.equal(losses, token_losses(case.model, case.tokens)), hook
        assert not torch.allclose(losses, clean, atol=1e-3), hook


def test_a_splice_changes_nothing_before_it(case: Case):
    new = activations_at(case.model, case.tokens, case.hook).clone()
    new[:, 7] *= -1
    changed = token_losses(case.model, case.tokens, case.hook, new) != token_losses(case.model, case.tokens)
    assert not changed[:, :7].any()
    assert changed[:, 7].all()


def test_the_blocks_below_a_splice_are_not_run(case: Case):
    ran = []
    values = activations_at(case.model, case.tokens, case.hook)
    handles = [
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, module in mlps_of_transformers(case.model)
    ]
    try:
        token_losses(case.model, case.tokens, case.hook, values)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(case.hidden, case.model.cfg.n_layers))


def test_an_exception_inside_a_splice_leaves_the_model_whole(case: Case):
    before = token_losses(case.model, case.tokens)
    width = case.model.cfg.d_model
    with pytest.raises(RuntimeError):
        token_losses(case.model, case.tokens, case.hook, torch.zeros(2, 12, width + 1))
    assert torch.equal(token_losses(case.model, case.tokens), before)
    assert_same(case, activations_at(case.model, case.tokens, case.hook), case.hidden_states[case.hidden])


def test_the_embedded_model_predicts_english(smollm2: Any):
    ids = smollm2.tokenizer.encode(PARAGRAPH, add_special_tokens=False)
    losses = token_losses(smollm2, torch.tensor([[smollm2.card.bos, *ids]]))
    assert len(ids) > 100
    assert 2 < losses.mean().item() < 4.5


# -- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bos", "separator", "special"),
    [("smollm2", 1, 0, (0, 1, 2)), ("gpt2", 50256, 50256, (50256,)), ("gemma", 2, 1, (0, 1, 2, 3))],
)
def test_the_card_knows_the_special_tokens(
    request: pytest.FixtureRequest, name: str, bos: int, separator: int, special: tuple[int, ...]
):
    card = request.getfixturevalue(name).card
    assert (card.bos, card.separator, card.special) == (bos, separator, special)
    assert (card.dtype, card.weight_processing) == ("float32", "none")


def test_the_default_hooks_are_those_of_the_course(smollm2: Any, gpt2: Any):
    assert {name: known.hook for name, known in models.KNOWN.items()} == {
        "smollm2-135m": "blocks.15.hook_resid_post",
        "gpt2": "blocks.8.hook_resid_pre",
        "gemma-2-2b": "blocks.12.hook_resid_post",
    }
    assert (smollm2.card.name, smollm2.card.hook) == (EMBEDDED, "blocks.15.hook_resid_post")
    assert (gpt2.card.name, gpt2.card.hook) == ("tiny-gpt2", "blocks.5.hook_resid_post")


def test_a_fingerprint_is_of_the_weights_and_not_of_their_precision(gpt2: Any, gpt2_folder: Path, gemma: Any):
    half = load_model(gpt2_folder, device="cpu", dtype=torch.bfloat16)
    assert half.card.dtype == "bfloat16"
    assert activations_at(half, torch.tensor([[50256, 1]]), "blocks.0.hook_resid_post").dtype == torch.bfloat16
    assert half.card.fingerprint == gpt2.card.fingerprint != gemma.card.fingerprint
    for name in ("wte.weight", "h.4.attn.q.weight", "h.9.mlp.c_proj.weight", "h.0.ln_1.weight", "ln_f.bias"):
        weight = parameter(half, name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight += 0.5
            assert describe(half).fingerprint != gpt2.card.fingerprint, name
            weight.copy_(before)
        assert describe(half).fingerprint == gpt2.card.fingerprint, name


def parameter(model: Any, name: str) -> Tensor:
    """A weight by its name in transformers, whatever TransformerLens wraps around it."""
    names = {found.replace("._original_component", ""): value for found, value in model.named_parameters()}
    return names[f"transformer.{name}"]


def test_folded_weights_are_another_model(gpt2_folder: Path, gpt2: Any):
    folded = load_model(gpt2_folder, device="cpu", dtype=torch.float32)
    folded.enable_compatibility_mode()
    card = describe(folded)
    assert card.weight_processing != "none"
    assert card.fingerprint != gpt2.card.fingerprint


@pytest.mark.parametrize(("name", "nearest"), [("gpt-2", "gpt2"), ("smollm2", EMBEDDED), ("gemma2-2b", "gemma-2-2b")])
def test_an_unknown_model_is_refused_with_the_nearest(name: str, nearest: str):
    with pytest.raises(ValueError, match=r"unknown model .*did you mean") as caught:
        load_model(name)
    assert repr(nearest) in str(caught.value)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"{tmp_path} has no config\.json.*smollm2-135m"):
        load_model(tmp_path)


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
def test_an_incomplete_folder_is_a_sentence(gpt2_folder: Path, tmp_path: Path, missing: str):
    files = {
        "model": {"model.safetensors"},
        "tokenizer": {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"},
    }
    for file in gpt2_folder.iterdir():
        if file.name not in files[missing]:
            (tmp_path / file.name).symlink_to(file)
    # Without its files transformers makes a tokenizer of one word, which would turn any text into nonsense.
    with pytest.raises((models.TutorialError, ValueError), match=f"{tmp_path}.*{missing}"):
        load_model(tmp_path)


def test_a_tokenizer_without_special_tokens_is_refused():
    model: Any = ToyModel()
    model.tokenizer = SimpleNamespace(get_vocab=dict, bos_token_id=None, eos_token_id=None, all_special_ids=[])
    with pytest.raises(ValueError, match="no BOS, EOS"):
        describe(model)


# -- networks ---------------------------------------------------------------------------------------

WITHOUT_NETWORK = """
import json, socket
asked = []
def refuse(*args, **options):
    asked.append(str(args))
    raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

from tutorial_sae import TutorialError, load_model
load_model("smollm2-135m", device="cpu")
result = {"asked": list(asked), "errors": {}}

# From here on the hub is told to be offline, for it would go on trying for a minute.
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = True
for name in ("gpt2", "gemma-2-2b"):
    try:
        load_model(name)
    except TutorialError as error:
        result["errors"][name] = str(error)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def without_network(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process sees whose network refuses and whose hub cache is empty; the embedded model is cached."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment["HF_HOME"] = str(tmp_path_factory.mktemp("empty-hub"))
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_embedded_model_asks_no_network_once_cached(without_network: dict[str, Any]):
    assert without_network["asked"] == []


@pytest.mark.parametrize("name", ["gpt2", "gemma-2-2b"])
def test_without_a_hub_its_models_fail_with_a_helpful_sentence(without_network: dict[str, Any], name: str):
    message = without_network["errors"][name]
    assert message.startswith(f"could not load {name} from ")
    assert "load_model('smollm2-135m')" in message
    assert "the hub cannot be reached" in message
    assert "hf auth login" not in message, "it is the network that is missing: see test_hub.py"
    assert "\n" not in message
    assert ".." not in message
