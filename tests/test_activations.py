"""The store: what it holds is what the model says at that place, shuffled, masked, cached and never half-written.

Values and mask are tried on the small GPT-2; order, memory and disk on the toy model, whose activations spell out
their token, position and row, and which remembers every row that it was run on.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import ToyModel, toy_documents, write_jsonl
from torch import Tensor

from tutorial_sae import ActivationStore, activations, load_model, load_text, ranks
from tutorial_sae.models import activations_at
from tutorial_sae.text import Text

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 16
SHARD = 256  # tokens in a shard of these tests: 16 rows
LONG_SHARD = 4096  # the model runs on 2,048 tokens at a time
HOOK = "blocks.2.hook_resid_post"

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def toy() -> ToyModel:
    return ToyModel()


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A hundred documents for the toy model: 88 in the split, 31 tokens each with separator, 181 rows of 16."""
    return load_text(write_jsonl(tmp_path_factory.mktemp("numbers") / "numbers.jsonl", toy_documents()))


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Seven hundred documents, 19,000 tokens in the split: enough for several long shards."""
    return load_text(write_jsonl(tmp_path_factory.mktemp("numbers") / "long.jsonl", toy_documents(700)))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHARD_TOKENS", SHARD)


@pytest.fixture
def long_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two steps of the model, so that a store can end, or be stopped, in the middle of one."""
    monkeypatch.setattr(activations, "SHARD_TOKENS", LONG_SHARD)


def make(model: Any, text: Text, tokens: int, **options: Any) -> ActivationStore:
    return ActivationStore(model, text, HOOK, context=CONTEXT, **{"tokens": tokens, **options})


def memory_for(count: int) -> float:
    """`memory_gb` that holds this many activations of the toy model, in float32."""
    return (count + 0.5) * ToyModel.D_IN * 4 / 1e9


def multiset(values: Tensor) -> list[list[float]]:
    return sorted(values.tolist())


def epoch(store: ActivationStore, n: int) -> list[Tensor]:
    return list(store.batches(n, epochs=1))


def harvest(text: Text) -> Tensor:
    """What the toy model says on the whole split, without special tokens, in the order of the rows."""
    model = ToyModel()
    rows = torch.cat([rows.tokens for rows in text.rows(model, CONTEXT, shuffle=True)])
    values = model.run_with_cache(rows.long(), HOOK, 3)[1][HOOK]
    return values[~torch.isin(rows, torch.tensor([0, 1]))]


@pytest.fixture(scope="module")
def everything(numbers: Text) -> Tensor:
    return harvest(numbers)


# -- values and where they come from ----------------------------------------------------------------


def test_activations_are_those_of_the_model_at_the_place_that_context_names(gpt2: Any, corpus: Path):
    text = load_text(corpus)
    store = ActivationStore(gpt2, text, "blocks.8.hook_resid_pre", tokens=500, context=CONTEXT)
    assert len(store) == 500
    assert store.d_in == 48
    documents = dict(text.documents())
    for i in [*range(0, 500, 71), -1]:
        place = store.context(i)
        expected = activations_at(gpt2, torch.tensor([place.tokens]), "blocks.8.hook_resid_pre")[0, place.position]
        assert torch.allclose(store[i], expected, rtol=1e-5, atol=1e-5)
        assert place.source == "notes"
        assert place.tokens[0] == 50256
        assert place.pieces == [gpt2.tokenizer.decode([token]) for token in place.tokens]
        piece = place.pieces[place.position]
        assert store.piece(i) == piece
        assert "\ufffd" in piece or piece in documents[place.document].text


def test_context_and_place_agree_with_the_values(toy: ToyModel, numbers: Text, small_shards: None):
    store = make(toy, numbers, 1000)
    owner = {int(word): number for number, doc in numbers.documents() for word in doc.text.split()}
    rows = torch.cat([rows.tokens for rows in numbers.rows(toy, CONTEXT, shuffle=True)])
    for i in range(0, 1000, 37):
        place, (row, position) = store.context(i), store.place(i)
        token = place.tokens[place.position]
        assert store[i].tolist()[:3] == [token, place.position, sum(place.tokens[: place.position + 1])]
        assert rows[row].tolist() == place.tokens
        assert position == place.position
        assert place.document == owner[token]


def test_activations_are_in_the_order_of_the_rows(toy: ToyModel, numbers: Text, everything: Tensor, small_shards: None):
    assert torch.equal(make(toy, numbers, 1000)[:], everything[:1000])


@pytest.mark.parametrize("memory", [2, memory_for(2 * SHARD)], ids=["in memory", "larger than memory"])
def test_indexing_is_that_of_a_tensor(
    toy: ToyModel, numbers: Text, everything: Tensor, small_shards: None, memory: float
):
    store, expected = make(toy, numbers, 1000, memory_gb=memory), everything[:1000]
    assert store[0].dtype == torch.float32
    for index in (0, 999, -1, -1000, slice(None), slice(230, 520, 7), slice(-5, None), slice(5, 5)):
        assert torch.equal(store[index], expected[index]), index
    for several in ([3, 999, 3, 0, 500], [-1, -1000, 5]):
        assert torch.equal(store[several], expected[several]), several
        assert torch.equal(store[torch.tensor(several)], expected[several]), several


@pytest.mark.parametrize("memory", [2, memory_for(2 * SHARD)], ids=["in memory", "larger than memory"])
@pytest.mark.parametrize("index", [1000, -1001, [0, 1000], [-1001]], ids=str)
def test_an_index_outside_is_an_error(
    toy: ToyModel, numbers: Text, small_shards: None, memory: float, index: int | list[int]
):
    store = make(toy, numbers, 1000, memory_gb=memory)
    with pytest.raises(IndexError):
        _ = store[index]


@pytest.mark.parametrize("index", [1000, -1001])
def test_a_context_outside_is_an_error(toy: ToyModel, numbers: Text, index: int):
    with pytest.raises(IndexError, match="choose 0 to 999"):
        make(toy, numbers, 1000).context(index)


# -- the mask ---------------------------------------------------------------------------------------


def test_special_tokens_and_long_vectors_are_left_out(gpt2: Any, corpus: Path):
    # A comma made enormous, as attention sinks are; the residual stream of its token stays enormous.
    outlier = gpt2.tokenizer.encode(",", add_special_tokens=False)[0]
    weight = gpt2.original_model.transformer.wte.weight
    before = weight[outlier].detach().clone()
    hook, text = "blocks.3.hook_resid_post", load_text(corpus, tokens=4096)
    try:
        with torch.no_grad():
            weight[outlier] *= 1000
        rows = torch.cat([rows.tokens for rows in text.rows(gpt2, CONTEXT, shuffle=True)]).long()
        values = activations_at(gpt2, rows, hook)
        with pytest.warns(UserWarning, match="fewer than"):
            store = ActivationStore(gpt2, text, hook, tokens=4096, context=CONTEXT)
    finally:
        with torch.no_grad():
            weight[outlier] = before

    norms = values.norm(dim=-1)
    ordinary = [norms[r, p].item() for r, p in (rows != 50256).nonzero().tolist()]
    limit = 10 * statistics.median_low(ordinary)
    kept = (rows != 50256) & (norms <= limit)
    assert store.norm_limit == pytest.approx(limit, rel=1e-5)
    assert 0 < ((rows == outlier) & ~kept).sum() == (rows == outlier).sum()
    assert len(store) == kept.sum()
    assert store.dropped == pytest.approx(1 - kept.double().mean().item())
    places = [store.place(i) for i in range(len(store))]
    assert places == [tuple(place) for place in kept.nonzero().tolist()]
    assert torch.allclose(store[:], values[kept], rtol=1e-4, atol=1e-4)


class Growing(ToyModel):
    """Norms grow with the token, so that a median depends on which tokens it is taken of."""

    def run_with_cache(self, tokens: Tensor, names_filter: str, stop_at_layer: int) -> tuple[None, dict]:
        _, cache = super().run_with_cache(tokens, names_filter, stop_at_layer)
        cache[names_filter][..., 4] = tokens**2
        return None, cache


def test_the_limit_comes_from_the_first_tokens_only(numbers: Text, small_shards: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activations, "NORM_TOKENS", 100)
    model = Growing()
    store = make(model, numbers, 1500)
    rows = torch.cat([rows.tokens for rows in numbers.rows(model, CONTEXT, shuffle=True)]).long()
    norms = model.run_with_cache(rows, HOOK, 3)[1][HOOK].norm(dim=-1).flatten().tolist()
    first = [norm for norm, token in zip(norms[:100], rows.flatten().tolist(), strict=False) if token > 1]
    limit = 10 * statistics.median_low(first)
    assert store.norm_limit == pytest.approx(limit, rel=1e-5)
    assert limit != pytest.approx(10 * statistics.median_low(norms), rel=0.01)
    kept = [norm for norm, token in zip(norms, rows.flatten().tolist(), strict=True) if token > 1 and norm <= limit]
    assert store[:].norm(dim=-1).tolist() == pytest.approx(kept[:1500])


def test_a_limit_that_is_given_is_used(numbers: Text):
    store = make(Growing(), numbers, 200, norm_limit=100_000.0)
    free = make(Growing(), numbers, 200)
    assert store.norm_limit == 100_000.0 != free.norm_limit
    assert store[:].norm(dim=-1).max() <= 100_000 < free[:].norm(dim=-1).max()


# -- batches ----------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "in memory": {},
    "larger than memory": {"memory_gb": memory_for(2 * SHARD)},
    "streamed": {"stream": True, "memory_gb": memory_for(2 * SHARD)},
}


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest, small_shards: None) -> dict[str, Any]:
    return MODES[request.param]


@pytest.mark.parametrize("n", [1, 7, 64, 200, 257, 300, 1000])
def test_an_epoch_visits_every_activation_once(
    toy: ToyModel, numbers: Text, everything: Tensor, mode: dict[str, Any], n: int
):
    batches = epoch(make(toy, numbers, 1000, **mode), n)
    assert [batch.shape for batch in batches] == [(n, 8)] * (1000 // n)
    assert all(batch.dtype == torch.float32 for batch in batches)
    seen, known = multiset(torch.cat(batches)), multiset(everything[:1000])
    assert len({tuple(value) for value in seen}) == len(seen)
    assert {tuple(value) for value in seen} <= {tuple(value) for value in known}


def test_batches_are_float32_whatever_the_precision_of_the_model(toy: ToyModel, numbers: Text):
    toy.cfg.dtype = torch.bfloat16
    assert next(make(toy, numbers, 300).batches(10)).dtype == torch.float32


def neighbours(values: Tensor) -> float:
    """The fraction of activations whose successor is the next token of the same document."""
    tokens = values[:, 0]
    return (tokens[1:] - tokens[:-1] == 1).double().mean().item()


def test_batches_are_shuffled_across_documents(toy: ToyModel, numbers: Text, everything: Tensor, mode: dict[str, Any]):
    assert neighbours(everything[:1000]) > 0.9
    batches = epoch(make(toy, numbers, 1000, **mode), 100)
    # At random about one activation of a part, the whole or a shard, has its successor behind it.
    assert neighbours(torch.cat(batches)) < 0.03
    documents = [len({int(token - 2) // 30 for token in batch[:, 0]}) for batch in batches]
    # A batch of 100 in order would see four or five documents.
    assert min(documents) >= 7


def test_epochs_differ_and_the_same_seed_repeats_them(toy: ToyModel, numbers: Text, mode: dict[str, Any]):
    def two(seed: int) -> Tensor:
        return torch.stack(list(make(toy, numbers, 1000, seed=seed, **mode).batches(100, epochs=2)))

    first = two(0)
    assert torch.equal(first, two(0))
    assert not torch.equal(first, two(1))
    assert not torch.equal(first[:10], first[10:])
    if "stream" not in mode:
        assert multiset(first[:10].flatten(0, 1)) == multiset(first[10:].flatten(0, 1))


def test_batches_go_on_without_end_unless_epochs_are_given(toy: ToyModel, numbers: Text):
    store = make(toy, numbers, 300)
    endless = store.batches(100)
    assert [len(next(endless)) for _ in range(10)] == [100] * 10
    assert len(list(store.batches(100, epochs=2))) == 6
    assert list(store.batches(100, epochs=0)) == []


def test_chance_elsewhere_has_no_part_in_batches(toy: ToyModel, numbers: Text):
    store = make(toy, numbers, 300)
    first = epoch(store, 100)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = epoch(store, 100)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_than_the_memory_is_loaded_at_once(
    toy: ToyModel, numbers: Text, small_shards: None, monkeypatch: pytest.MonkeyPatch
):
    store = make(toy, numbers, 2000, memory_gb=memory_for(2 * SHARD))
    sizes = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: sizes.append(n) or real(n, **options))
    epoch(store, 50)
    assert max(sizes) <= 2 * SHARD


def test_a_sample_is_drawn_without_replacement_and_always_the_same(toy: ToyModel, numbers: Text, everything: Tensor):
    store = make(toy, numbers, 1000)
    chosen = store.sample_indices(100)
    assert len(set(chosen.tolist())) == 100
    assert torch.equal(store.sample(100), everything[chosen])
    assert torch.equal(store.sample(100), make(toy, numbers, 1000).sample(100))
    assert sorted(store.sample_indices(1000).tolist()) == list(range(1000))
    assert not torch.equal(chosen, make(toy, numbers, 1000, seed=1).sample_indices(100))


# -- streaming --------------------------------------------------------------------------------------


def test_streaming_writes_nothing_and_each_epoch_harvests_again(
    toy: ToyModel, numbers: Text, own_cache: Path, small_shards: None
):
    store = make(toy, numbers, 600, stream=True)
    first = epoch(store, 100)
    ran = len(toy.ran)
    second = epoch(store, 100)
    assert len(toy.ran) == 2 * ran > 0
    assert multiset(torch.cat(first)) == multiset(torch.cat(second))
    assert not own_cache.exists() or not [path for path in own_cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "use", [lambda s: s[0], lambda s: s.context(0), lambda s: s.place(0), lambda s: s.piece(0)], ids=str
)
def test_what_needs_the_disk_says_so(toy: ToyModel, numbers: Text, use: Callable[[ActivationStore], Any]):
    with pytest.raises(ValueError, match="stream=False"):
        use(make(toy, numbers, 100, stream=True))


@pytest.fixture
def short(tmp_path: Path, small_shards: None) -> Text:
    return load_text(write_jsonl(tmp_path / "short.jsonl", toy_documents(40)))


@pytest.fixture
def flow(tmp_path: Path) -> Text:
    return load_text(write_jsonl(tmp_path / "flow.jsonl", toy_documents()), stream=True)


@pytest.mark.parametrize("tokens", [1000, 2600])
@pytest.mark.parametrize("n", [50, 200, 700])
def test_a_stream_taken_up_again_gives_the_batches_that_would_have_followed(
    toy: ToyModel, flow: Text, numbers: Text, small_shards: None, tokens: int, n: int
):
    for text in (flow, numbers):  # one that has places to start from, and one that is shuffled whole
        options = {"stream": True, "memory_gb": memory_for(3 * SHARD), "norm_limit": 1e9}
        store = make(toy, text, tokens, **options)
        batches, places = [], []
        for batch in store.batches(n, epochs=2):
            batches.append(batch)
            places.append(store.position)
        assert len(batches) > 1
        for at in range(0, len(batches), max(1, len(batches) // 5)):
            place = json.loads(json.dumps({**places[at], "left": None})) | {"left": places[at]["left"]}
            toy.ran.clear()
            again = list(make(toy, text, tokens, **options).batches(n, epochs=2, start=place))
            assert len(again) == len(batches) - at - 1
            assert all(torch.equal(a, b) for a, b in zip(again, batches[at + 1 :], strict=True))


def test_ranks_stream_documents_of_their_own(
    toy: ToyModel, flow: Text, small_shards: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "agreed", lambda value: value)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        store = make(toy, flow, 1200, stream=True)
        seen.append({int(token) for token in torch.cat(epoch(store, 50))[:, 0]})
        assert len(seen[-1]) == 600
    assert not seen[0] & seen[1]


def test_a_stream_of_too_little_text_warns(toy: ToyModel, short: Text):
    store = make(toy, short, 3000, stream=True)
    with pytest.warns(UserWarning, match=r"fewer than the 3,000 asked for"):
        epoch(store, 100)


def test_a_stream_that_cannot_fill_a_batch_ends_in_an_error_and_not_in_waiting(toy: ToyModel, short: Text):
    batches = make(toy, short, 3000, stream=True).batches(2000, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="2000"):
            next(batches)


# -- the cache on disk ------------------------------------------------------------------------------


def folders(cache: Path) -> int:
    return len([path for path in (cache / "activations").iterdir() if path.is_dir()])


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "activations").rglob("*.safetensors"))


def test_a_second_store_does_not_run_the_model(toy: ToyModel, numbers: Text, small_shards: None):
    first = make(toy, numbers, 1000)
    toy.ran.clear()
    second = make(toy, numbers, 1000, seed=5)  # the order of batches is no part of what is stored
    assert toy.ran == []
    assert torch.equal(second[:], first[:])
    assert (second.norm_limit, second.dropped) == (first.norm_limit, first.dropped)


def test_more_tokens_reuse_the_whole_shards(toy: ToyModel, long_text: Text, own_cache: Path, long_shards: None):
    expected = harvest(long_text)
    make(toy, long_text, 5000)
    before = toy.ran.copy()
    assert len(before) * CONTEXT < 2 * LONG_SHARD  # the second shard was left unfinished
    toy.ran.clear()
    larger = make(toy, long_text, 10_000)
    assert torch.equal(larger[:], expected[:10_000])
    whole = LONG_SHARD // CONTEXT
    assert set(map(tuple, toy.ran)).isdisjoint(map(tuple, before[:whole]))
    toy.ran.clear()
    smaller = make(toy, long_text, 5000)
    assert torch.equal(smaller[:], expected[:5000])
    assert toy.ran == []
    assert folders(own_cache) == 1


@pytest.mark.parametrize("memory", [2, memory_for(2 * LONG_SHARD)], ids=["in memory", "larger than memory"])
def test_a_larger_store_made_later_leaves_an_open_one_right(
    toy: ToyModel, long_text: Text, long_shards: None, memory: float
):
    expected = harvest(long_text)[:9000]
    open_store = make(toy, long_text, 9000, memory_gb=memory)
    make(toy, long_text, 15_000)
    assert torch.equal(open_store[:], expected)
    assert multiset(torch.cat(epoch(open_store, 100))) == multiset(expected)


def test_a_store_that_grows_keeps_its_limit(
    numbers: Text, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Growing()
    small = make(model, numbers, 300)
    grown = make(model, numbers, 1000)
    monkeypatch.setenv("TUTORIAL_SAE_CACHE", str(tmp_path / "another cache"))
    fresh = make(model, numbers, 1000)
    assert small.norm_limit == grown.norm_limit == fresh.norm_limit
    assert torch.equal(grown[:], fresh[:])
    assert grown.dropped == fresh.dropped


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "noise": lambda path: path.write_bytes(b"\xff" * 1000),
}


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_rebuilt(
    toy: ToyModel, numbers: Text, everything: Tensor, own_cache: Path, small_shards: None, damage: str, which: int
):
    make(toy, numbers, 1000)
    DAMAGE[damage](shards(own_cache)[which])
    toy.ran.clear()
    assert torch.equal(make(toy, numbers, 1000)[:], everything[:1000])
    assert toy.ran
    toy.ran.clear()
    make(toy, numbers, 1000)
    assert toy.ran == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "error"])
def test_a_stopped_harvest_goes_on_after_its_last_shard(
    toy: ToyModel,
    numbers: Text,
    everything: Tensor,
    own_cache: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
):
    def stops(model: ToyModel, tokens: Tensor, hook: str) -> Tensor:
        if len(model.ran) + len(tokens) > 2.5 * SHARD / CONTEXT:
            raise error
        return activations_at(model, tokens, hook)

    with monkeypatch.context() as broken:
        broken.setattr(activations, "activations_at", stops)
        with pytest.raises(type(error)):
            make(toy, numbers, 1000)
    assert len(shards(own_cache)) == 2
    assert not [path for path in own_cache.rglob("*") if "partial" in path.name]
    done = set(map(tuple, toy.ran))
    toy.ran.clear()
    assert torch.equal(make(toy, numbers, 1000)[:], everything[:1000])
    assert toy.ran
    assert done.isdisjoint(map(tuple, toy.ran))


TWO = """
import sys
sys.path.insert(0, "tests")
import torch
from small_models import ToyModel
from tutorial_sae import ActivationStore, activations, load_text

activations.SHARD_TOKENS = 256
model = ToyModel()
print("ready", flush=True)
sys.stdin.readline()
store = ActivationStore(model, load_text(sys.argv[1]), "blocks.2.hook_resid_post", tokens=1000, context=16)
print(len(model.ran), len(store), int(store[:].double().sum()))
"""


def test_two_processes_on_one_key_harvest_once_and_agree(
    numbers: Text, everything: Tensor, own_cache: Path, small_shards: None
):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", TWO, numbers.source]
    both = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    results = sorted([int(word) for word in out.split()] for out, _ in said)
    assert [result[1:] for result in results] == [[1000, int(everything[:1000].double().sum())]] * 2
    assert results[0][0] == 0 < results[1][0]
    assert len(shards(own_cache)) == 5


def test_whatever_determines_the_activations_is_in_the_key(toy: ToyModel, numbers: Text, own_cache: Path):
    def source(**options: Any) -> Text:
        return load_text(numbers.source, **options)

    half = ToyModel()
    half.cfg.dtype = torch.bfloat16
    make(toy, numbers, 100)
    others: list[Callable[[], Any]] = [
        lambda: ActivationStore(toy, numbers, "blocks.1.hook_resid_post", tokens=100, context=CONTEXT),
        lambda: make(toy, source(seed=1), 100),
        lambda: make(toy, source(split="heldout"), 100),
        lambda: make(toy, source(tokens=400), 100),
        lambda: make(half, numbers, 100),
        lambda: make(ToyModel(weight=2.0), numbers, 100),
        lambda: ActivationStore(toy, numbers, HOOK, tokens=100, context=CONTEXT + 1),
        lambda: make(toy, numbers, 100, norm_limit=1e6),
    ]
    for count, other in enumerate(others, start=2):
        other()
        assert folders(own_cache) == count
    for repeat in (lambda: make(ToyModel(), source(), 100, seed=7, memory_gb=1), others[0], others[5]):
        repeat()
    assert folders(own_cache) == 1 + len(others)


def test_a_changed_file_is_another_corpus(toy: ToyModel, tmp_path: Path):
    file = write_jsonl(tmp_path / "x.jsonl", toy_documents(50, 20))
    first = make(toy, load_text(file), 100)[:]
    write_jsonl(file, toy_documents(50, 21))
    assert not torch.equal(make(toy, load_text(file), 100)[:], first)


def test_weights_changed_after_loading_are_seen(gpt2_folder: Path, corpus: Path, own_cache: Path):
    model = load_model(gpt2_folder, device="cpu", dtype=torch.float32)
    hook, text = "blocks.2.hook_resid_post", load_text(corpus)
    first = ActivationStore(model, text, hook, tokens=50, context=CONTEXT)[:]
    with torch.no_grad():
        model.original_model.transformer.wpe.weight *= 2
    second = ActivationStore(model, text, hook, tokens=50, context=CONTEXT)[:]
    assert folders(own_cache) == 2
    assert not torch.allclose(first, second)


# -- too little, too much, and mistakes -------------------------------------------------------------


def test_too_little_text_warns_and_gives_what_there_is(
    toy: ToyModel, numbers: Text, everything: Tensor, small_shards: None
):
    for _ in ("harvested", "from the cache"):
        with pytest.warns(UserWarning, match=rf"gave {len(everything):,} activations, fewer than the 99,000 asked for"):
            store = make(toy, numbers, 99_000)
        assert len(store) == len(everything)
        assert torch.equal(store[:], everything)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(toy, numbers, len(everything))


def test_a_store_runs_little_more_of_the_model_than_it_needs(toy: ToyModel, numbers: Text):
    make(toy, numbers, 100)
    assert len(toy.ran) * CONTEXT < 100 + 2_048 + CONTEXT


@pytest.mark.parametrize("tokens", [0, -1])
def test_no_tokens_are_refused(toy: ToyModel, numbers: Text, tokens: int):
    with pytest.raises(ValueError, match=f"tokens={tokens} asks for no activations"):
        make(toy, numbers, tokens)


DRAWS: dict[str, Callable[[ActivationStore, int], Any]] = {
    "batches": lambda store, n: next(store.batches(n)),
    "sample": lambda store, n: store.sample(n),
    "sample_indices": lambda store, n: store.sample_indices(n),
}


@pytest.mark.parametrize("n", [0, -1, 101])
@pytest.mark.parametrize("draw", DRAWS)
def test_more_than_there_is_cannot_be_drawn(toy: ToyModel, numbers: Text, draw: str, n: int):
    store = make(toy, numbers, 100)
    with pytest.raises(ValueError, match=f"of {n} cannot be drawn from 100 activations"):
        DRAWS[draw](store, n)


def test_too_little_memory_is_refused_with_the_least_that_does(toy: ToyModel, numbers: Text, small_shards: None):
    with pytest.raises(ValueError, match=r"memory_gb=1e-06 holds 31 activations of 32 bytes.*at least 512"):
        make(toy, numbers, 1000, memory_gb=1e-6)
    assert len(make(toy, numbers, 1000, memory_gb=memory_for(512))) == 1000
    assert len(make(toy, numbers, 31, memory_gb=1e-6)) == 31


def test_an_unknown_hook_is_refused_with_the_nearest(toy: ToyModel, numbers: Text):
    with pytest.raises(ValueError, match=r"unknown hook .*'blocks\.2\.hook_resid_post'"):
        ActivationStore(toy, numbers, "blocks.2.resid_post", tokens=100)


def test_a_disk_without_room_is_refused_before_the_harvest(
    toy: ToyModel, numbers: Text, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RuntimeError, match=r"harvesting 100 activations needs .*free some space"):
        make(toy, numbers, 100)
    assert toy.ran == []
