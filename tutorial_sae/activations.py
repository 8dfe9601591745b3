"""ActivationStore: a language model and text in, shuffled batches of activations out.

Harvesting costs far more than reading, so activations are kept on disk in shards, under a key made of everything
that determines them: weights, precision, hook point, corpus, split, seed, context and mask. A shard is written whole
or not at all, so a run that was stopped goes on after its last shard. With `stream=True` nothing is written, for runs
larger than the disk.

The mask: special tokens are left out, and so are tokens whose norm exceeds 10 times the median of the first 50,000.
Those are attention sinks (the first position above all): a handful of vectors a hundred times longer than the rest
would otherwise be most of the variance that an SAE is asked to explain.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tutorial_sae import ranks
from tutorial_sae.models import activations_at, check_hook, describe
from tutorial_sae.runtime import ahead, cache_dir, digest, generator, lock, need_space, progress, save_tensors
from tutorial_sae.text import Rows, Text

NORM_FACTOR, NORM_TOKENS = 10, 50_000
# Of a stream: the part of the epoch, how many of its batches are out, and where the part begins: after so many shards
# and activations, at this place in the text, with what was left of the part before.
START: dict[str, Any] = {"epoch": 0, "part": 0, "batch": 0, "shards": 0, "kept": 0, "text": None, "left": None}
SHARD_TOKENS = 51_200  # at least NORM_TOKENS, and on a slow laptop about a minute of work


class Shard(NamedTuple):
    """Kept activations of some rows, with what is needed to trace each one to its place in the text."""

    activations: Tensor  # (kept, d_in), in the precision of the model
    row: Tensor  # (kept,) which row of `tokens`
    position: Tensor  # (kept,) where in that row
    tokens: Tensor  # (rows, context)
    documents: Tensor  # (rows, context), number of the document in its corpus
    notes: dict[str, Any]  # norm_limit, sources: {document number: label}


class Context(NamedTuple):
    """Where an activation comes from."""

    tokens: list[int]  # the whole row
    position: int  # of the activation in it
    pieces: list[str]  # the row as text, token by token
    source: str  # label of the document
    document: int  # its number in the corpus


class ActivationStore:
    """Activations of `model` at `hook` on `text`, harvested on creation unless the cache has them.

    - `hook`: default, the hook point of the model's card.
    - `tokens`: how many activations to keep; fewer, with a warning, where the text is too short.
    - `context`: tokens in a row, BOS included.
    - `seed`: orders the batches (the text has a seed of its own).
    - `memory_gb`: the most that batches keep in memory at once. A store that fits is shuffled as one; a larger one by
      loading random shards into half of that memory and shuffling across them. Documents are shuffled in either case.
    - `stream`: harvest anew in each epoch instead of writing to disk; `[i]` and `context(i)` need the disk. Activations
      stay on the model's device. Of several ranks each harvests documents of its own, and all make the store together.
    - `norm_limit`: use this limit of the mask, that of a trained SAE, instead of finding one in this text.

    `d_in` is the width, `dropped` the fraction of tokens that the mask left out, `norm_limit` its largest norm.
    """

    def __init__(
        self,
        model: Any,
        text: Text,
        hook: str | None = None,
        *,
        tokens: int,
        context: int = 128,
        seed: int = 0,
        memory_gb: int | float = 2,
        stream: bool = False,
        norm_limit: float | None = None,
    ):
        if tokens < 1:
            raise ValueError(f"tokens={tokens} asks for no activations: give a positive number")
        self.card = describe(model)
        self.model, self.text, self.hook = model, text, hook or self.card.hook
        check_hook(model, self.hook)
        self.d_in: int = model.cfg.d_model
        self.context_length, self.seed, self.stream, self.wanted = context, seed, stream, tokens
        self._rows_per_shard = max(1, SHARD_TOKENS // context)
        self._bytes_each = self.d_in * torch.empty(0, dtype=model.cfg.dtype).element_size()
        self._capacity = int(memory_gb * 1e9 / self._bytes_each)
        least = min(tokens, 2 * SHARD_TOKENS)
        if self._capacity < least:
            raise ValueError(
                f"memory_gb={memory_gb} holds {self._capacity} activations of {self._bytes_each} bytes, and shuffling "
                f"needs at least {least}: give {least * self._bytes_each / 1e9:.2f} or more"
            )
        self.description = {
            **self.card._asdict(),
            "hook": self.hook,
            "text": [text.source, text.split, text.tokens, text.seed, text.identity],
            "context": context,
            "rows": ["shuffled", self._rows_per_shard],
            "mask": [NORM_FACTOR, NORM_TOKENS] if norm_limit is None else norm_limit,
            # a store smaller than one shard has a norm limit of its own, so it never shares with a larger one
            "small": tokens if tokens < SHARD_TOKENS else None,
        }
        self._given_limit = norm_limit
        self._share = -(-tokens // ranks.size()) if stream else tokens
        self._piece = functools.cache(lambda token: model.tokenizer.decode([token]))
        self._cached: Tensor | None = None
        self._shards: list[Path] = []
        self.position: dict[str, Any] = dict(START)
        self._first: Shard | None = None  # of a stream: harvested for the norm limit, kept until batches need it
        if stream:
            self._first = next(self._harvest([], alone=True))
            self._take_notes([self._first])
            self.norm_limit = self._given_limit = ranks.agreed(self.norm_limit)
            self._length = tokens
        else:
            self.folder = cache_dir("activations", digest(self.description)[:16])
            self._open(self._on_disk())

    # -- what a user calls -----------------------------------------------------------------------

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Float[Tensor, "*n d_in"]:
        """float32 activations in the order of the store: a number, a slice, or a list or tensor of numbers."""
        self._needs_disk("store[...]")
        if self._fits():
            return self._memory()[index].float()
        if isinstance(index, int):
            return self[[range(len(self))[index]]][0]
        wanted = torch.arange(len(self))[index if isinstance(index, slice) else torch.as_tensor(index)]
        found = torch.empty(len(wanted), self.d_in)
        shard = torch.bucketize(wanted.contiguous(), self._ends, right=True)
        for number in shard.unique().tolist():
            mine = shard == number
            start = int(self._ends[number - 1]) if number else 0
            found[mine] = _read(self._shards[number]).activations[wanted[mine] - start].float()
        return found

    def batches(
        self, n: int, epochs: int | None = None, start: dict[str, Any] | None = None
    ) -> Iterator[Float[Tensor, "n d_in"]]:
        """Shuffled float32 batches of exactly `n`: for so many epochs, or without end.

        Each epoch has its own order under the seed and leaves out the last few activations that fill no batch. A stream
        keeps its `position` behind the last batch, and can `start` from one that was kept.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"a batch of {n} cannot be drawn from {len(self)} activations: choose between 1 and that")
        if self.stream:
            yield from self._streamed(n, epochs, start or START)
            return
        for epoch in itertools.count() if epochs is None else range(epochs):
            order = generator(self.seed, "batches", epoch)
            left = torch.empty(0, self.d_in, dtype=self.model.cfg.dtype)
            for part in self._parts(order):
                part = torch.cat([left, part]) if len(left) else part
                shuffled = torch.randperm(len(part), generator=order)
                whole = len(part) // n * n
                for first in range(0, whole, n):
                    yield part[shuffled[first : first + n]].float()
                left = part[shuffled[whole:]]

    def sample(self, n: int) -> Float[Tensor, "n d_in"]:
        """`n` activations drawn without replacement, the same ones each time: those at `sample_indices(n)`."""
        if self.stream:
            found: list[Tensor] = []
            for shard in self._harvest([], alone=True):
                found.append(shard.activations)
                if sum(map(len, found)) >= n:
                    break
            several = torch.cat(found)
            chosen = torch.randperm(len(several), generator=generator(self.seed, "sample"))[:n]
            return several[chosen.to(several.device)].float()
        return self[self.sample_indices(n)]

    def sample_indices(self, n: int) -> Int[Tensor, " n"]:
        if not 1 <= n <= len(self):
            raise ValueError(f"a sample of {n} cannot be drawn from {len(self)} activations: choose between 1 and that")
        return torch.randperm(len(self), generator=generator(self.seed, "sample"))[:n]

    def context(self, i: int) -> Context:
        """The row of text that activation `i` comes from, and where in it."""
        number, local = self._locate(i)
        shard = self._index[number]
        row, position = int(shard.row[local]), int(shard.position[local])
        tokens, document = shard.tokens[row].tolist(), int(shard.documents[row, position])
        return Context(
            tokens, position, [self._piece(token) for token in tokens], shard.notes["sources"][str(document)], document
        )

    def place(self, i: int) -> tuple[int, int]:
        """(row, position) of activation `i`; rows are numbered through the whole store."""
        number, local = self._locate(i)
        row, position = self._index[number].row[local], self._index[number].position[local]
        return self._rows_per_shard * number + int(row), int(position)

    def piece(self, i: int) -> str:
        """The text of the token that activation `i` belongs to."""
        number, local = self._locate(i)
        shard = self._index[number]
        return self._piece(int(shard.tokens[int(shard.row[local]), int(shard.position[local])]))

    def _locate(self, i: int) -> tuple[int, int]:
        """The number of the shard that holds activation `i`, and the place of `i` in it."""
        self._needs_disk("tracing an activation")
        if not -len(self) <= i < len(self):
            raise IndexError(f"activation {i} of {len(self)}: choose 0 to {len(self) - 1}")
        i = range(len(self))[i]
        number = int(torch.bucketize(i, self._ends, right=True))
        return number, i - (int(self._ends[number - 1]) if number else 0)

    # -- batches out of parts that fit into memory -------------------------------------------------

    def _fits(self) -> bool:
        return len(self) <= self._capacity

    def _memory(self) -> Tensor:
        if self._cached is None:
            self._cached = torch.empty(len(self), self.d_in, dtype=self.model.cfg.dtype)
            start = 0
            for number in range(len(self._shards)):
                activations = self._trimmed(number)
                self._cached[start : start + len(activations)] = activations
                start += len(activations)
        return self._cached

    def _parts(self, order: torch.Generator) -> Iterator[Tensor]:
        """The epoch's activations in pieces of at most half the memory (the other half is for mixing)."""
        if self._fits():
            yield self._memory()
            return
        waiting: list[Tensor] = []
        for number in torch.randperm(len(self._shards), generator=order).tolist():
            activations = self._trimmed(number)
            if waiting and sum(map(len, waiting)) + len(activations) > self._capacity // 2:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(activations)
        if waiting:
            yield torch.cat(waiting)

    def _streamed(self, n: int, epochs: int | None, here: dict[str, Any]) -> Iterator[Tensor]:
        """Batches of a stream. Each part has an order of its own, so that one that is taken up again harvests no more
        than the part that it stopped in."""
        while epochs is None or here["epoch"] < epochs:
            made = bool(here["part"] or here["batch"])
            for part, behind in self._stream_parts(here):
                part = part if here["left"] is None else torch.cat([here["left"].to(part), part])
                chance = generator(self.seed, "stream", ranks.rank(), here["epoch"], here["part"])
                order = torch.randperm(len(part), generator=chance).to(part.device)
                whole = len(part) // n
                for batch in range(here["batch"], whole):
                    self.position = {**here, "batch": batch + 1}
                    yield part[order[batch * n : (batch + 1) * n]].float()
                    made = True
                here = {**here, **behind, "part": here["part"] + 1, "batch": 0, "left": part[order[whole * n :]]}
                del part, order  # before the next part is put together
            if not made:
                raise ValueError(
                    f"the text gave {here['kept']} activations, too few for a batch of {n}: choose a smaller one"
                )
            if here["kept"] < self._share:
                got = f"{self.text.source} gave {here['kept']:,} activations, fewer than the {self._share:,} asked for"
                warnings.warn(f"{got}: the same text is read again, each epoch so much shorter", stacklevel=4)
            here = {**START, "epoch": here["epoch"] + 1}

    def _stream_parts(self, here: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Parts of at most half the memory (putting one together takes the other half), and what lies behind each."""
        waiting: list[Tensor] = []
        behind, kept, shards_done = here, here["kept"], here["shards"]
        with closing(self._harvest([], here)) as shards:  # type: ignore[arg-type]
            for shard in shards:
                if waiting and sum(map(len, waiting)) + len(shard.activations) > self._capacity // 2:
                    yield torch.cat(waiting), behind
                    waiting = []
                waiting.append(shard.activations[: self._share - kept])
                kept += len(waiting[-1])
                shards_done, self._first = shards_done + 1, None
                behind = {"shards": shards_done, "kept": kept, "text": shard.notes["after"]}
                del shard
        if waiting:
            yield torch.cat(waiting), behind

    def _trimmed(self, number: int) -> Tensor:
        """What of a shard belongs to this store: a larger store may have added to the file since."""
        start = int(self._ends[number - 1]) if number else 0
        return _read(self._shards[number]).activations[: min(int(self._ends[number]), len(self)) - start]

    # -- the cache on disk ---------------------------------------------------------------------------

    def _on_disk(self) -> list[Path]:
        """The shards of this store, harvested where they are missing, half-written or damaged."""
        ready, enough = self._whole_shards()
        if enough:
            return ready
        needed = max(0, self.wanted - SHARD_TOKENS * len(ready)) * self._bytes_each
        need_space(self.folder, needed, f"harvesting {self.wanted:,} activations")
        with lock(self.folder / ".lock"):
            ready, enough = self._whole_shards()
            if not enough:
                for number, shard in enumerate(self._harvest(ready), start=len(ready)):
                    path = self.folder / f"shard-{number:05d}.safetensors"
                    save_tensors(path, {name: getattr(shard, name) for name in shard._fields[:-1]}, shard.notes)
                    ready.append(path)
        return ready

    def _whole_shards(self) -> tuple[list[Path], bool]:
        """Leading shards that can be read and need no rebuilding, and whether they are all that this store needs."""
        whole: list[Path] = []
        kept = 0
        while True:
            path = self.folder / f"shard-{len(whole):05d}.safetensors"
            if not path.exists() or (shard := _try_read(path)) is None:
                return whole, False
            kept += len(shard.row)
            enough = kept >= self.wanted or bool(shard.notes["end"])
            if len(shard.tokens) < self._rows_per_shard and not enough:
                return whole, False  # the last, partial shard of a smaller store: this one needs more of it
            whole.append(path)
            if enough:
                return whole, True

    def _open(self, paths: list[Path]) -> None:
        shards = [_read(path, activations=False) for path in paths]
        self._take_notes(shards)
        self._shards, self._index = paths, shards
        self._ends = torch.tensor([len(shard.row) for shard in shards]).cumsum(0)
        self._length = min(self.wanted, int(self._ends[-1]))
        if self._length < self.wanted:
            warnings.warn(
                f"the {self.text.split} split of {self.text.source} gave {self._length:,} activations, fewer than the "
                f"{self.wanted:,} asked for; the store holds those, and more epochs repeat them",
                stacklevel=3,
            )

    def _take_notes(self, shards: list[Shard]) -> None:
        seen = sum(shard.tokens.numel() for shard in shards)
        self.dropped = 1 - sum(len(shard.row) for shard in shards) / seen
        self.norm_limit: float = shards[0].notes["norm_limit"]

    def _needs_disk(self, what: str) -> None:
        if self.stream:
            raise ValueError(f"{what} needs activations that stay: make the store with stream=False")

    # -- harvest -------------------------------------------------------------------------------------

    def _harvest(self, ready: list[Path], here: dict[str, Any] | None = None, alone: bool = False) -> Iterator[Shard]:
        """Shards after the `ready` ones, or of a stream from `here` on, until enough is kept or the text ends.

        Of several ranks each reads its own documents; `alone` reads what a single process would, so that the norm limit
        and the normalisation do not depend on how many there are.
        """
        done = [_read(path, activations=False) for path in ready]
        share = self.wanted if alone else self._share
        limit = done[0].notes["norm_limit"] if done else self._given_limit
        kept = sum(len(shard.row) for shard in done)
        size = {"context": self.context_length, "rows_at_once": self._rows_per_shard, "shuffle": True}
        if self.stream:
            here = here or START
            rank, world = (0, 1) if alone else (ranks.rank(), ranks.size())
            if self._first is not None and not here["shards"] and world == 1:
                kept_first, after = len(self._first.row), self._first.notes["after"]
                yield self._first  # which forgets it
                here = {**here, "shards": 1, "kept": kept_first, "text": after}
            kept, mine = here["kept"], {"start": here["text"], "rank": rank, "world": world}
            rows = self.text.rows(self.model, **size, **mine)
            # a text that is shuffled as a whole has no place to start from, and is gone through again
            blocks = ahead(itertools.islice(rows, 0 if here["text"] else here["shards"], None))
        else:
            blocks = itertools.islice(self.text.rows(self.model, **size), len(ready), None)
        following = next(blocks, None)
        stop_reading: Any = closing(blocks) if self.stream else nullcontext()  # type: ignore[arg-type]
        what, shown = f"harvesting {self.card.name} {self.hook}", not self.stream
        with stop_reading, progress(share, what, unit="tok", done=kept, shown=shown) as bar:
            while following is not None and kept < share:
                rows, following = following, next(blocks, None)
                shard = self._shard(rows, share - kept, limit, following is None, bar)
                limit = shard.notes["norm_limit"]
                kept += len(shard.row)
                yield shard

    def _shard(self, rows: Rows, wanted: int, limit: float | None, last: bool, bar: Any) -> Shard:
        """Run the model on `rows`, a few at a time, until `wanted` activations are kept or the rows end."""
        special = torch.isin(rows.tokens, torch.tensor(self.card.special, dtype=torch.int32))
        at_once = max(1, (16_384 if str(self.model.cfg.device).startswith("cuda") else 2_048) // self.context_length)
        pieces: list[Tensor] = []
        norms: list[Tensor] = []
        for start in range(0, len(rows.tokens), at_once):
            tokens = rows.tokens[start : start + at_once]
            got = activations_at(self.model, tokens.long(), self.hook)
            pieces.append(got if self.stream else got.cpu())
            norms.append(got.float().norm(dim=-1).cpu())
            bar.update(min(tokens.numel(), max(0, bar.total - bar.n)))
            known = torch.cat(norms)
            used = limit if limit is not None else _norm_limit(known, special[: len(known)])
            keep = ~special[: len(known)] & (known <= used)
            if int(keep.sum()) >= wanted:
                break
        for i, kept in enumerate(keep.split(at_once)):  # in place, for memory
            pieces[i] = pieces[i][kept.to(pieces[i].device)]
        row, position = keep.nonzero(as_tuple=True)
        count = len(keep)
        return Shard(
            activations=torch.cat(pieces),
            row=row.int(),
            position=position.int(),
            tokens=rows.tokens[:count],
            documents=rows.documents[:count],
            notes={
                "norm_limit": used,
                "end": last and count == len(rows.tokens),
                "sources": dict(zip(map(str, rows.numbers), rows.sources, strict=True)),
                "after": rows.after,
            },
        )


def _norm_limit(norms: Float[Tensor, "rows pos"], special: Tensor) -> float:
    """10 times the median norm of the ordinary tokens among the first 50,000."""
    first = norms.flatten()[:NORM_TOKENS][~special.flatten()[:NORM_TOKENS]]
    return NORM_FACTOR * float(first.median()) if len(first) else float("inf")


def _read(path: Path, activations: bool = True) -> Shard:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in Shard._fields[1:-1]}
        kept = file.get_tensor("activations") if activations else torch.empty(0)
        return Shard(kept, **tensors, notes=json.loads(file.metadata()["notes"]))


def _try_read(path: Path) -> Shard | None:
    try:
        return _read(path, activations=False)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
