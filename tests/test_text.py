"""Text: splits by document, packing into rows, and every place that documents may come from."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import httpx
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ToyModel, ToyTokenizer, local_documents, toy_documents, write_jsonl

from tutorial_sae import TutorialError, load_text, text
from tutorial_sae.text import SPLITS, Document, Rows, Text

TOY = ToyModel()


def numbers_of(source: str | Path, split: str, seed: int = 0) -> list[int]:
    return [number for number, _ in load_text(source, split=split, seed=seed).documents()]


def all_rows(corpus: Text, model: Any = TOY, context: int = 16, **options: Any) -> torch.Tensor:
    return torch.cat([rows.tokens for rows in corpus.rows(model, context, **options)])


# -- splits -----------------------------------------------------------------------------------------


def test_splits_share_no_document_and_leave_none_out(corpus: Path):
    splits = {split: numbers_of(corpus, split) for split in SPLITS}
    assert sorted(itertools.chain(*splits.values())) == list(range(60))
    assert all(splits.values())


def test_of_twenty_five_documents_one_calibrates_and_two_are_held_out(tmp_path: Path):
    source = write_jsonl(tmp_path / "x.jsonl", toy_documents(1000, 3))
    sizes = {split: len(numbers_of(source, split)) for split in SPLITS}
    assert sizes == {"train": 880, "calibration": 40, "heldout": 80}


def test_a_seed_orders_the_documents_of_a_split_and_never_moves_one_out(corpus: Path):
    first, again, other = (numbers_of(corpus, "train", seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)
    assert first != sorted(first)


def test_documents_without_text_are_left_out(tmp_path: Path):
    texts = ["", " \n", *toy_documents(30)]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    documents = {number: doc.text for split in SPLITS for number, doc in load_text(source, split=split).documents()}
    assert documents == dict(enumerate(texts[2:]))


# -- packing ----------------------------------------------------------------------------------------


def unpacked(blocks: list[Rows]) -> tuple[list[int], list[int]]:
    """The stream of tokens and of document numbers, with the first column, BOS, taken off."""
    tokens = [token for rows in blocks for token in rows.tokens[:, 1:].flatten().tolist()]
    owners = [owner for rows in blocks for owner in rows.documents[:, 1:].flatten().tolist()]
    return tokens, owners


def test_rows_hold_the_documents_in_order_with_separators(gpt2: Any, corpus: Path):
    mine = load_text(corpus)
    stream: list[int] = []
    owners: list[int] = []
    for number, doc in mine.documents():
        ids = gpt2.tokenizer.encode(doc.text, add_special_tokens=False)
        stream += [*ids, 50256]
        owners += [number] * (len(ids) + 1)
    blocks = list(mine.rows(gpt2, 32, rows_at_once=7))
    packed, packed_owners = unpacked(blocks)
    assert len(stream) - 31 < len(packed) <= len(stream)
    assert packed == stream[: len(packed)]
    assert packed_owners == owners[: len(packed)]
    assert all((rows.tokens[:, 0] == 50256).all() for rows in blocks)
    assert all(torch.equal(rows.documents[:, 0], rows.documents[:, 1]) for rows in blocks)
    assert {len(rows.tokens) for rows in blocks[:-1]} == {7}


def test_bos_and_separator_are_those_of_the_model(gemma: Any, corpus: Path):
    tokens = all_rows(load_text(corpus), gemma)
    assert (tokens[:, 0] == 2).all()
    assert (tokens[:, 1:] == 2).sum() == 0
    assert 0 < (tokens[:, 1:] == 1).sum() < 60


def test_every_block_names_the_documents_in_it(tmp_path: Path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", toy_documents(40, 9))
    for rows in load_text(tmp_path).rows(TOY, 16, rows_at_once=3):
        assert rows.numbers == list(dict.fromkeys(rows.documents.flatten().tolist()))
        assert rows.sources == ["abc"[number // 40] for number in rows.numbers]


lengths = st.lists(st.integers(0, 12), min_size=3, max_size=30)


@settings(deadline=None, max_examples=150)
@given(lengths=lengths, context=st.integers(2, 9), at_once=st.integers(1, 5), tokens=st.none() | st.integers(1, 150))
def test_packing_is_cutting_one_long_list(lengths: list[int], context: int, at_once: int, tokens: int | None):
    counter = itertools.count(2)
    documents = [[next(counter) for _ in range(length)] for length in lengths]
    texts = [Document(" ".join(map(str, ids)) or ".", "here") for ids in documents]
    mine = Text("here", "train", tokens, 0, "", lambda: texts, streamed=True)

    train = [number for number in range(len(documents)) if number % 25 not in (0, 1, 13)]
    stream = [token for number in train for token in [*documents[number], 0]]
    owners = [number for number in train for _ in [*documents[number], 0]]
    count = len(stream) // (context - 1)
    if tokens is not None:
        count = min(count, max(1, tokens // context))

    if count == 0:
        with pytest.raises(ValueError, match="fewer than one row"):
            list(mine.rows(DottedToy(), context, at_once))
        return
    blocks = list(mine.rows(DottedToy(), context, at_once))
    assert unpacked(blocks) == (stream[: count * (context - 1)], owners[: count * (context - 1)])
    assert [len(rows.tokens) for rows in blocks[:-1]] == [at_once] * ((count - 1) // at_once)
    assert all((rows.tokens[:, 0] == 1).all() for rows in blocks)


class DottedToy(ToyModel):
    """To this one a lone dot is a text of no tokens, which real tokenizers have too."""

    def __init__(self) -> None:
        super().__init__()
        plain = self.tokenizer

        class Tokenizer(type(plain)):
            def __call__(self, texts: Any, **options: Any) -> dict[str, list[list[int]]]:
                return super().__call__([text.strip(".") for text in texts], **options)

        self.tokenizer = Tokenizer()


@pytest.mark.parametrize("tokens", [16, 100, 160, 500])
def test_a_limit_of_tokens_counts_whole_rows_with_bos(tmp_path: Path, tokens: int):
    source = write_jsonl(tmp_path / "x.jsonl", toy_documents())
    limited = all_rows(load_text(source, tokens=tokens), rows_at_once=4)
    assert limited.numel() == tokens // 16 * 16
    assert torch.equal(limited, all_rows(load_text(source))[: tokens // 16])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(corpus: Path, gpt2: Any):
    first, again, other = (all_rows(load_text(corpus, seed=seed), gpt2) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first[:10], other[:10])


@pytest.mark.parametrize("tokens", [None, 320])
def test_shuffled_rows_are_the_same_rows_from_all_over_the_corpus(tmp_path: Path, tokens: int | None):
    source = write_jsonl(tmp_path / "x.jsonl", toy_documents())
    mine = load_text(source, tokens=tokens)

    def numbered(corpus: Text, **options: Any) -> list[tuple[list[int], list[int], list[str]]]:
        """Each row with its document numbers and their labels."""
        found = []
        for rows in corpus.rows(TOY, 16, rows_at_once=7, **options):
            label = dict(zip(rows.numbers, rows.sources, strict=True))
            for row, owners in zip(rows.tokens.tolist(), rows.documents.tolist(), strict=True):
                found.append((row, owners, [label[owner] for owner in owners]))
        return found

    ordered, shuffled = numbered(load_text(source)), numbered(mine, shuffle=True)
    assert len(shuffled) == (len(ordered) if tokens is None else 20)
    places = [ordered.index(row) for row in shuffled]
    assert len(set(places)) == len(places)
    # Twenty in order would lie within twenty of each other.
    assert max(places[:20]) - min(places[:20]) > len(ordered) / 2
    assert shuffled == numbered(mine, shuffle=True)
    assert shuffled != numbered(load_text(source, tokens=tokens, seed=1), shuffle=True)


def test_a_stream_is_not_shuffled(tmp_path: Path):
    write_parquet(tmp_path / "x.parquet", toy_documents())
    stream = load_text(f"hub:{tmp_path}")
    assert torch.equal(all_rows(stream, shuffle=True), all_rows(stream))


# -- the embedded corpus ----------------------------------------------------------------------------


def test_the_embedded_corpus_is_the_same_on_every_machine():
    documents = list(text._embedded("embedded"))
    assert len(documents) == 11_284
    joined = hashlib.sha256()
    for doc in documents:
        joined.update(doc.text.encode())
    # A change of recipe changes this digest, and must raise CORPUS_RECIPE with it.
    assert joined.hexdigest() == "77cce941bddaabd680176e9e4b0ff8b008eca6328619af14a53cf24cdd4b3457"
    assert {doc.source for doc in documents} == {"wikipedia", "code", "documentation"}


@pytest.mark.parametrize(("language", "word"), [("fr", "est"), ("es", "es")])
def test_embedded_languages_are_what_they_say(language: str, word: str):
    documents = [doc for _, doc in itertools.islice(load_text(f"embedded/{language}").documents(), 500)]
    assert len(documents) == 500
    assert {doc.source for doc in documents} == {"wikipedia"}
    assert sum(f" {word} " in doc.text for doc in documents) > 250


@pytest.mark.slow
def test_the_embedded_corpus_has_three_million_tokens_to_train_on(smollm2: Any):
    kinds: dict[str, int] = {}
    for rows in load_text().rows(smollm2):
        label = dict(zip(rows.numbers, rows.sources, strict=True))
        owners, counts = rows.documents.unique(return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            kinds[label[owner]] = kinds.get(label[owner], 0) + count
    assert sum(kinds.values()) >= 3_000_000
    assert all(count > 300_000 for count in kinds.values())
    assert set(kinds) == {"wikipedia", "code", "documentation"}


# -- files and streams ------------------------------------------------------------------------------


def texts_of(corpus: Text) -> dict[int, str]:
    return {number: doc.text for number, doc in corpus.documents()}


def write_parquet(path: Path, texts: list[str], column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path)
    return path


DOCUMENTS = local_documents()
TRAIN = {number: text for number, text in enumerate(DOCUMENTS) if number % 25 not in (0, 1, 13)}


@pytest.fixture(params=["jsonl", "parquet", "txt", "jsonl folder", "hub"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The sixty documents in one of the forms that `load_text` reads."""
    if request.param == "jsonl":
        return str(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS))
    if request.param == "parquet":
        return str(write_parquet(tmp_path / "x.parquet", DOCUMENTS))
    if request.param == "txt":
        for number, document in enumerate(DOCUMENTS):
            (tmp_path / f"{number:02d}.txt").write_text(document, encoding="utf-8")
    if request.param == "jsonl folder":
        (tmp_path / "deeper").mkdir()
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:20])
        write_jsonl(tmp_path / "deeper" / "b.jsonl", DOCUMENTS[20:])
        (tmp_path / "notes.md").write_text("not one of them")
    if request.param == "hub":
        # A local folder is a data set to the `datasets` library, so what streams from the hub is tried without it.
        write_parquet(tmp_path / "train.parquet", DOCUMENTS)
        return f"hub:{tmp_path}"
    return str(tmp_path)


def test_documents_come_from_files_of_every_kind_and_from_streams(written: str):
    assert texts_of(load_text(written)) == TRAIN


def test_labels_are_the_names_of_files_unless_a_record_has_its_own(tmp_path: Path):
    lines = [{"text": "a b"}, {"text": "c d", "source": "letters"}]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "story.txt").write_text("e f")
    mine = [load_text(tmp_path, split=split) for split in SPLITS]
    labels = {doc.text: doc.source for each in mine for _, doc in each.documents()}
    assert labels == {"a b": "notes", "c d": "letters", "e f": "story"}


def test_a_parquet_file_of_any_name_is_read(tmp_path: Path):
    path = write_parquet(tmp_path / "part [1] of *.parquet", DOCUMENTS)
    assert texts_of(load_text(path)) == TRAIN


def test_a_corpus_is_known_by_its_content(tmp_path: Path):
    first = load_text(write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)).identity
    assert load_text(tmp_path / "x.jsonl", split="heldout", seed=4).identity == first
    assert load_text(write_jsonl(tmp_path / "x.jsonl", [*DOCUMENTS, "one more"])).identity != first


def endless(asked: list[Any]) -> Any:
    def load_dataset(path: str, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((path, options))
        return ({"text": f"{number + 2} {number + 3}"} for number in itertools.count())

    return load_dataset


def test_a_stream_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", endless(asked))
    rows = all_rows(load_text("hub:somebody/words:clean", tokens=160))
    assert rows.shape == (10, 16)
    assert rows[0, 1:7].tolist() == [4, 5, 0, 5, 6, 0]  # documents 2 and 3: 0 and 1 are in other splits
    assert asked == [("somebody/words", {"name": "clean", "split": "train", "streaming": True})]


# -- streams that go on -----------------------------------------------------------------------------------


def same(found: list[Rows], wanted: list[Rows]) -> None:
    for name in ("tokens", "documents"):
        parts = [[getattr(block, name) for block in blocks] for blocks in (found, wanted)]
        assert torch.equal(*(torch.cat(part) if part else torch.empty(0, 16) for part in parts)), name
    assert [block.sources for block in found] == [block.sources for block in wanted]
    assert [block.numbers for block in found] == [block.numbers for block in wanted]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Two parquet files of a hundred documents each, of unlike length, some without text."""
    folder = tmp_path_factory.mktemp("stream")
    texts = ["" if n % 17 == 5 else " ".join(str(2 + n * 50 + i) for i in range(1 + n * 7 % 40)) for n in range(200)]
    write_parquet(folder / "a.parquet", texts[:100])
    write_parquet(folder / "b.parquet", texts[100:])
    return load_text(folder, stream=True)


@pytest.mark.parametrize("world", [1, 3])
def test_a_stream_goes_on_after_any_block_as_if_it_had_not_stopped(stream: Text, world: int):
    whole = list(stream.rows(TOY, 16, 5, rank=world - 1, world=world))
    assert len(whole) > 6
    for cut in range(len(whole)):
        place = json.loads(json.dumps(whole[cut].after))
        same(list(stream.rows(TOY, 16, 5, start=place, rank=world - 1, world=world)), whole[cut + 1 :])


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 9) | st.integers(60, 200), min_size=30, max_size=60),
    context=st.integers(2, 9),
    at_once=st.integers(1, 5),
    tokens=st.none() | st.integers(100, 400),
    cut=st.integers(0, 10_000),
    rank=st.integers(0, 1),
)
def test_wherever_a_stream_is_cut_it_goes_on_with_the_rows_that_would_have_followed(
    lengths: list[int], context: int, at_once: int, tokens: int | None, cut: int, rank: int
):
    counter = itertools.count(2)
    texts = [" ".join(str(next(counter)) for _ in range(length)) for length in lengths]
    documents = [Document(text, f"label {number % 3}") for number, text in enumerate(["", *texts])]
    mine = Text("here", "train", tokens, 0, "", lambda: documents, streamed=True)
    options: dict[str, Any] = {"context": context, "rows_at_once": at_once, "rank": rank, "world": 2}
    whole = list(mine.rows(TOY, **options))
    cut %= len(whole)
    place = json.loads(json.dumps(whole[cut].after))
    assert set(place["labels"]) == set(map(str, place["owners"]))
    assert len(place["tokens"]) == len(place["owners"])
    found = list(mine.rows(TOY, **options, start=place))
    same(found, whole[cut + 1 :])
    assert [rows.after for rows in found] == [rows.after for rows in whole[cut + 1 :]]


def test_ranks_read_documents_of_their_own_and_together_all(stream: Text):
    parts = [{i for i, _ in stream.documents(rank=rank, world=3)} for rank in range(3)]
    assert all(not a & b for a, b in itertools.combinations(parts, 2))
    assert set.union(*parts) == {i for i, _ in stream.documents()}
    assert min(map(len, parts)) > 40


def test_documents_before_the_start_are_not_tokenised(stream: Text):
    class Counting(ToyTokenizer):
        seen: ClassVar[list[str]] = []

        def __call__(self, texts: Any, **options: Any) -> Any:
            self.seen.extend(texts)
            return super().__call__(texts, **options)

    model = ToyModel()
    *_, late = stream.rows(model, 16, 5)
    model.tokenizer = Counting()
    list(stream.rows(model, 16, 5, start=late.after))
    early = {doc.text for i, doc in stream.documents() if i < late.after["document"]}  # type: ignore[index]
    assert not early & set(Counting.seen)


def test_a_local_stream_keeps_the_order_of_the_files_and_is_known_without_reading_them(stream: Text, tmp_path: Path):
    numbers = [i for i, _ in stream.documents()]
    assert numbers == sorted(numbers)
    path = write_jsonl(tmp_path / "x.jsonl", DOCUMENTS)
    path.rename(tmp_path / "y.jsonl")
    (tmp_path / "y.jsonl").write_bytes(b"\xff" * (tmp_path / "y.jsonl").stat().st_size)
    assert load_text(tmp_path / "y.jsonl", stream=True).streamed
    with pytest.raises(ValueError, match=r"line 1 is not UTF-8"):
        list(load_text(tmp_path / "y.jsonl", stream=True).documents())


def test_a_process_without_documents_says_which(tmp_path: Path):
    few = load_text(write_jsonl(tmp_path / "x.jsonl", toy_documents(30)), stream=True)
    assert len(list(few.documents(rank=1, world=3))) == 3
    with pytest.raises(ValueError, match="no document in its train split for process 2 of 3"):
        list(few.documents(rank=2, world=3))


def test_what_is_no_stream_has_no_place_to_go_on(corpus: Path, gpt2: Any):
    for shuffle in (False, True):
        assert all(rows.after is None for rows in load_text(corpus).rows(gpt2, 16, shuffle=shuffle))
        with pytest.raises(ValueError, match=r"stream=True"):
            next(load_text(corpus).rows(gpt2, 16, shuffle=shuffle, start={"document": 3}))


def test_what_is_no_stream_cannot_be_shared_or_streamed(corpus: Path):
    with pytest.raises(ValueError, match=r"shared by 2 processes.*stream=True"):
        list(load_text(corpus).rows(TOY, 16, world=2))
    with pytest.raises(ValueError, match="leave stream out"):
        load_text("embedded", stream=True)


class Failing:
    """A data set on the hub that stops answering after so many records, so many times."""

    def __init__(self, path: Path, records: int, times: int, error: Exception):
        self.path, self.records, self.times, self.error, self.opened = path, records, times, error, 0

    def __call__(self, name: str, config: str | None, revision: str | None) -> Iterator[dict[str, str]]:
        self.opened += 1
        failing = self.opened <= self.times
        stream = datasets.load_dataset("parquet", data_files=str(self.path), split="train", streaming=True)
        for number, record in enumerate(stream):
            if failing and number == self.records * self.opened:
                raise self.error
            yield dict(record)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("tutorial_sae.text.time", SimpleNamespace(sleep=waited.append))
    return waited


ERRORS = [
    ConnectionError("gone"),
    TimeoutError("too late"),
    RuntimeError("client closed"),
    httpx.ReadError("reset by peer"),
    pyarrow.ArrowInvalid("half a page"),  # a ValueError
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_hub_that_goes_away_is_asked_again_and_no_document_is_lost(tmp_path, monkeypatch, waits, capsys, error):
    write_parquet(tmp_path / "x.parquet", DOCUMENTS)
    hub = Failing(tmp_path / "x.parquet", 7, 4, error)
    monkeypatch.setattr("tutorial_sae.text._open_hub", hub)
    monkeypatch.setattr("tutorial_sae.text.in_notebook", lambda: False)
    found = dict(load_text("hub:somebody/words").documents())
    assert {i: doc.text for i, doc in found.items()} == texts_of(load_text(tmp_path / "x.parquet"))
    assert waits == [1, 1, 1, 1], "progress starts the count anew"
    assert capsys.readouterr().err == f"hub:somebody/words does not answer ({error}): again in 1 s\n" * 4


def test_a_hub_that_stays_away_ends_in_a_sentence(monkeypatch, waits):
    def broken(*_: Any) -> Iterator[dict[str, str]]:
        yield from ({"text": f"document {n}"} for n in range(3))
        raise ConnectionError("gone")

    monkeypatch.setattr("tutorial_sae.text._open_hub", broken)
    with pytest.raises(TutorialError, match=r"gone \(after 3 documents\).*train --resume"):
        list(load_text("hub:somebody/words").documents())
    assert waits == [1, 2, 4, 8, 16, 32]


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Starts, at a port, a server of the sixty documents as JSON lines; it leaves after `lines` of them, if given."""
    servers: list[HTTPServer] = []
    body = [json.dumps({"text": document}).encode() + b"\n" for document in DOCUMENTS]

    def start(port: int = 0, lines: int | None = None) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(sum(map(len, body))))
                self.end_headers()
                self.wfile.write(b"".join(body[:lines]))
                if lines is not None:
                    server.socket.close()

            def log_message(self, *_: Any) -> None: ...

        server = HTTPServer(("127.0.0.1", port), Handler)
        servers.append(server)
        threading.Thread(target=server.handle_request, daemon=True).start()
        return server.server_port

    yield start
    for server in servers:
        server.server_close()


def test_a_server_that_leaves_and_comes_back_costs_no_document(serve, monkeypatch):
    port = serve(lines=20)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # until then nothing listens at the port
            serve(port)

    def opened(*_: Any) -> Iterator[dict[str, str]]:
        with httpx.stream("GET", f"http://127.0.0.1:{port}/", trust_env=False) as answer:
            yield from map(json.loads, answer.iter_lines())

    monkeypatch.setattr("tutorial_sae.text.time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("tutorial_sae.text._open_hub", opened)
    assert {i: doc.text for i, doc in load_text("hub:somebody/words").documents()} == TRAIN
    assert waited == [1, 2, 4]


def test_a_name_that_is_not_on_the_hub_is_not_asked_for_again(monkeypatch, waits):
    def missing(*_: Any) -> Iterator[dict[str, str]]:
        raise DatasetNotFoundError("no such data set")

    monkeypatch.setattr("tutorial_sae.text._open_hub", missing)
    with pytest.raises(TutorialError, match=r"no such data set .*check the name"):
        list(load_text("hub:somebody/words").documents())
    assert waits == []


def test_a_data_set_without_the_column_says_so(tmp_path, waits):
    write_parquet(tmp_path / "x.parquet", DOCUMENTS, column="content")
    with pytest.raises(ValueError, match=r"row 0: .*'text', got content, id"):
        list(load_text(f"hub:{tmp_path}").documents())
    assert waits == []


def test_a_hub_that_never_answers_is_asked_twice(monkeypatch, waits):
    def broken(*_: Any) -> Iterator[dict[str, str]]:
        raise ConnectionError("no route")

    monkeypatch.setattr("tutorial_sae.text._open_hub", broken)
    with pytest.raises(TutorialError, match="no route"):
        list(load_text("hub:somebody/words").documents())
    assert waits == [1]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("hub:a/b", ("a/b", {})),
        ("hub:a/b:c", ("a/b", {"name": "c"})),
        ("hub:a/b@refs/convert/parquet", ("a/b", {"revision": "refs/convert/parquet"})),
        ("hub:a/b:c@v1.2", ("a/b", {"name": "c", "revision": "v1.2"})),
    ],
)
def test_a_configuration_and_a_revision_can_be_named(monkeypatch: pytest.MonkeyPatch, source: str, wanted: Any):
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", endless(asked))
    next(load_text(source).documents())
    assert asked == [(wanted[0], wanted[1] | {"split": "train", "streaming": True})]


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "nearest"), [("embeded", "'embedded'"), ("embedded/de", "'embedded/"), ("hub/x", "'hub:OWNER/NAME'")]
)
def test_an_unknown_source_is_refused_with_the_nearest(source: str, nearest: str):
    with pytest.raises(ValueError, match=r"unknown source .*did you mean") as caught:
        load_text(source)
    assert nearest in str(caught.value)


def test_a_mistyped_file_is_refused_with_the_nearest(corpus: Path):
    with pytest.raises(ValueError, match=re.escape(str(corpus))):
        load_text(str(corpus).replace("notes", "note"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"split": "held-out"}, "did you mean 'heldout'"),
        ({"tokens": 0}, "tokens=0 asks for no text"),
        ({"tokens": -5}, "tokens=-5 asks for no text"),
    ],
)
def test_bad_options_are_refused_at_once(corpus: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_text(corpus, **options)


@pytest.mark.parametrize("context", [1, 0, -3])
def test_a_context_too_short_for_text_is_refused(corpus: Path, context: int):
    with pytest.raises(ValueError, match=f"context={context} leaves no room"):
        next(load_text(corpus).rows(TOY, context))


def test_text_shorter_than_a_row_is_refused(tmp_path: Path):
    source = write_jsonl(tmp_path / "x.jsonl", toy_documents(5, 4))
    with pytest.raises(ValueError, match=r"has 15 tokens, fewer than one row of 100; give more text or a shorter"):
        next(load_text(source).rows(TOY, 100))


FILES = {
    "empty": ("x.jsonl", b"", "0 documents with text"),
    "blank": ("x.txt", b" \n\n", "0 documents with text"),
    "one document": ("x.txt", b"All there is.", "1 document with text.*splits are made by document"),
    "latin-1": ("x.txt", "Müller".encode("latin-1"), "not UTF-8 .byte 1 is 0xfc.*iconv"),
    "latin-1 lines": ("x.jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8.*iconv"),
    "broken line": ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
    "no text column": ("x.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', "line 2: .*'text', got body, id"),
    "no object": ("x.jsonl", b'"a"\n', "line 1: .*'text', got str"),
    "text is no string": ("x.jsonl", b'{"text": 5}\n', "line 1: .*string under 'text'"),
    "no parquet": ("x.parquet", b"not parquet at all", "x.parquet"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_gives_no_documents_says_why(tmp_path: Path, case: str):
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, TutorialError), match=f"(?s){message}"):
        list(load_text(tmp_path / name).documents())


def test_parquet_without_the_column_says_so(tmp_path: Path):
    path = write_parquet(tmp_path / "x.parquet", DOCUMENTS, column="content")
    with pytest.raises(ValueError, match=r"row 0: .*'text', got content, id"):
        list(load_text(path).documents())


def test_a_row_of_parquet_is_counted_from_the_start_of_the_file(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 70_000 + [None]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row 70000: .*string under 'text'"):
        list(load_text(tmp_path / "x.parquet", stream=True).documents())


def test_a_folder_without_text_says_what_is_wanted(tmp_path: Path):
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl, \.parquet file"):
        load_text(tmp_path)


def test_a_stream_without_documents_in_the_split_says_so(tmp_path: Path):
    write_parquet(tmp_path / "x.parquet", ["only one"])
    with pytest.raises(ValueError, match="no document in its train split"):
        list(load_text(f"hub:{tmp_path}").documents())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:nobody/nothing", r"could not read hub:nobody/nothing: .*load_text\('embedded'\)"),
        ("hub:nobody/nothing:small", r"could not read hub:nobody/nothing:small: .*load_text\('embedded'\)"),
        ("hub:", "hub:OWNER/NAME"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_a_sentence(source: str, message: str):
    # conftest.py tells the hub's client that it is offline.
    with pytest.raises((TutorialError, ValueError), match=message):
        next(load_text(source).documents())
