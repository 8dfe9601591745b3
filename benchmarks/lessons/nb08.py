"""`python -m benchmarks.lessons.nb08 draw FOLDER | score EXPLANATIONS GUESSES KEY`: can one say what a latent is?

draw      40 live latents of the shipped BatchTopK SAE, drawn with a seed. For each: contexts to write an explanation
          from (calibration documents), and 20 others to test it on (held-out documents), 10 of them with the
          latent firing on the last token. Writes FOLDER/explain/contexts.txt, FOLDER/test.txt, FOLDER/key.json.
score     EXPLANATIONS is {"421": "a sentence"}, GUESSES {"421": [true, false, ...]}: what a reader who saw only the
          explanation and the 20 contexts said of each. Writes `benchmarks/results/lessons/nb08.json`, with numbers
          in place of text: a context is (row, position) in the rows that `load_text(split="heldout").rows` gives.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lessons import write
from tutorial_sae import ActivationStore, load_model, load_pretrained, load_text, pretrained

SEED, LATENTS = 0, 40
TOKENS = {"calibration": 50_000, "heldout": 60_000}
DENSITY = (1 / 5000, 1 / 20)
LEAST_ROWS = {"calibration": 14, "heldout": 16}  # in which the latent fires: contexts come from one row each
TOP, MIDDLE = 10, 4  # contexts to explain from
FIRES, SAME_PIECE, RELATED, RANDOM = 10, 3, 2, 5  # contexts of the test
BEFORE, AFTER = 24, 6  # tokens shown; the test shows none after
ENOUGH = 14  # right of 20


class Split(NamedTuple):
    """A split's activations, as what the SAE makes of them."""

    store: ActivationStore
    codes: Tensor  # (tokens, latents), 0 where silent
    place: list[tuple[int, int]]  # (row, position) of each activation
    pieces: list[str]
    rows: dict[int, list[str]]  # the pieces of each row, by number


@torch.no_grad()
def read(model: Any, sae: Any, split: str) -> Split:
    made = pretrained.manifest()
    text = load_text(split=split)
    store = ActivationStore(model, text, made["hook"], tokens=TOKENS[split], norm_limit=made["mask"]["norm_limit"])
    codes = torch.cat([sae.encode(store[part.tolist()]) for part in torch.arange(len(store)).split(2048)])
    place = [store.place(i) for i in range(len(store))]
    count = place[-1][0] + 1
    blocks = text.rows(model, 128, 512, shuffle=True)
    tokens = torch.cat([block.tokens for block, _ in zip(blocks, range(count // 512 + 1), strict=False)])[:count]
    decode = {int(token): model.tokenizer.decode([int(token)]) for token in tokens.unique()}
    rows = {row: [decode[token] for token in tokens[row].tolist()] for row in range(count)}
    return Split(store, codes, place, [rows[row][at] for row, at in place], rows)


def shown(data: Split, i: int, after: int = 0) -> str:
    """One line: the text around activation i, its own token marked."""
    row, at = data.place[i]
    pieces = data.rows[row]
    before = "".join(pieces[max(1, at - BEFORE) : at])
    word = pieces[at]
    blank = len(word) - len(word.lstrip()) if word.strip() else 0
    marked = word[:blank] + "**" + (word[blank:] if word.strip() else word.replace(" ", "_")) + "**"
    return (before + marked + "".join(pieces[at + 1 : at + 1 + after])).replace("\r", "").replace("\n", "\\n")


def one_a_row(data: Split, numbers: list[int]) -> list[int]:
    """The first of each row."""
    first: dict[int, int] = {}
    for i in numbers:
        first.setdefault(data.place[i][0], i)
    return list(first.values())


def spread(data: Split, latent: int, numbers: list[int], count: int, low: float, high: float) -> list[int]:
    """`count` of the activations, whose values lie nearest to evenly spaced ones from high to low."""
    left, found = list(numbers), []
    value = data.codes[:, latent]
    for target in torch.linspace(high, low, count).tolist():
        best = min(left, key=lambda i: abs(float(value[i]) - target))
        left.remove(best)
        found.append(best)
    return found


def rows_fired(data: Split) -> Tensor:
    """In how many rows each latent fires."""
    row = torch.tensor([row for row, _ in data.place])
    on = torch.zeros(int(row.max()) + 1, data.codes.shape[1])
    return (on.index_add_(0, row, (data.codes > 0).float()) > 0).sum(dim=0)


def related_to(data: Split, latent: int) -> list[int]:
    """The latents that fire where this one does, by the cosine of their firing."""
    fired = data.codes[:, latent] > 0
    both = (data.codes[fired] > 0).sum(dim=0)
    cosine = both / ((data.codes > 0).sum(dim=0) * fired.sum()).clamp(min=1).sqrt()
    cosine[latent] = 0
    return cosine.topk(5).indices.tolist()


def drawn(explain: Split, test: Split, latent: int, order: random.Random) -> dict[str, Any]:
    """The contexts of one latent: numbers of activations to explain from, and 20 for the test with their kinds."""
    value = explain.codes[:, latent]
    firing = one_a_row(explain, value.argsort(descending=True)[: int((value > 0).sum())].tolist())
    peak = float(value.max())
    top = firing[:TOP]
    middle = sorted(firing[TOP:], key=lambda i: abs(float(value[i]) - peak / 2))[:MIDDLE]
    words = {explain.pieces[i] for i in top + middle}

    value = test.codes[:, latent]
    firing = value.nonzero().squeeze(1).tolist()
    order.shuffle(firing)
    firing = one_a_row(test, firing)
    peak_test, least = max(float(value[i]) for i in firing), min(float(value[i]) for i in firing)
    chosen = [(i, "fires") for i in spread(test, latent, firing, FIRES, least, peak_test)]
    silent = [i for i in range(len(test.pieces)) if not value[i]]
    order.shuffle(silent)
    others = set(related_to(explain, latent))
    beside = (test.codes[:, sorted(others)] > 0).any(dim=1)

    def add(kind: str, count: int, fits: Any) -> None:
        """Silent contexts of a kind, from rows that are not used yet."""
        rows = {test.place[j][0] for j, _ in chosen}
        for i in silent:
            if count and test.place[i][0] not in rows and fits(i):
                chosen.append((i, kind))
                rows.add(test.place[i][0])
                count -= 1

    add("same piece", SAME_PIECE, lambda i: test.pieces[i] in words)
    add("related", SAME_PIECE + RELATED - (len(chosen) - FIRES), lambda i: bool(beside[i]))
    add("random", FIRES + SAME_PIECE + RELATED + RANDOM - len(chosen), lambda i: True)
    order.shuffle(chosen)
    return {
        "explain": top + middle,
        "density": float((value > 0).float().mean()),
        "peak": peak_test,
        "test": [i for i, _ in chosen],
        "kinds": [kind for _, kind in chosen],
        "places": [list(test.place[i]) for i, _ in chosen],
        "values": [round(float(value[i]), 3) for i, _ in chosen],
        "key": [kind == "fires" for _, kind in chosen],
        "keyword": [test.pieces[i] in words for i, _ in chosen],
    }


def draw(folder: Path) -> None:
    model = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    sae = load_pretrained("batchtopk")
    explain, test = (read(model, sae, split) for split in ("calibration", "heldout"))
    density = (test.codes > 0).float().mean(dim=0)
    live = (density >= DENSITY[0]) & (density <= DENSITY[1])
    live &= (rows_fired(explain) >= LEAST_ROWS["calibration"]) & (rows_fired(test) >= LEAST_ROWS["heldout"])
    pool = live.nonzero().squeeze(1)
    latents = sorted(pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(SEED))[:LATENTS]].tolist())
    print(f"{len(pool)} of {sae.d_sae} latents qualify")
    order = random.Random(SEED)
    key: dict[str, Any] = {"seed": SEED, "pool": len(pool), "latents": {}}
    (folder / "explain").mkdir(parents=True, exist_ok=True)
    lines, tests = [], []
    for latent in latents:
        key["latents"][str(latent)] = made = drawn(explain, test, latent, order)
        lines += [f"\n== latent {latent} (fires on {made['density']:.2%} of the tokens)"]
        for n, i in enumerate(made["explain"]):
            head = {0: "largest values:", TOP: "from the middle of its range:"}.get(n)
            lines += [head] if head else []
            source = explain.store.context(i).source
            lines += [f"  {float(explain.codes[i, latent]):6.2f}  [{source[:13]}]  {shown(explain, i, AFTER)}"]
        tests += [f"\n== latent {latent}"]
        tests += [f"{n:>4}. {shown(test, i)}" for n, i in enumerate(made["test"], start=1)]
    (folder / "explain" / "contexts.txt").write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")
    (folder / "test.txt").write_text("\n".join(tests).lstrip() + "\n", encoding="utf-8")
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")


def luck(least: int, of: int, fires: int, yes: int) -> float:
    """The probability of at least so many right for one who says yes to `yes` contexts, whichever they are."""
    ways = {hits: math.comb(fires, hits) * math.comb(of - fires, yes - hits) for hits in range(min(fires, yes) + 1)}
    good = sum(n for hits, n in ways.items() if hits + of - fires - (yes - hits) >= least)
    return good / math.comb(of, yes)


def told(keys: list[list[bool]], said: list[list[bool]]) -> dict[str, Any]:
    """Over the latents, how the right guesses are spread, and what one would reach who says yes as often by luck."""
    rights = [sum(a == b for a, b in zip(key, one, strict=True)) for key, one in zip(keys, said, strict=True)]
    mean = sum(rights) / len(rights)
    deviation = (sum((n - mean) ** 2 for n in rights) / (len(rights) - 1)) ** 0.5
    by_luck = sum(luck(ENOUGH, len(key), sum(key), sum(one)) for key, one in zip(keys, said, strict=True))
    return {
        "mean": round(mean, 2),
        "standard_error": round(deviation / len(rights) ** 0.5, 2),
        "lowest": min(rights),
        "highest": max(rights),
        "at_least_14": sum(n >= ENOUGH for n in rights),
        "at_least_14_by_luck": round(by_luck, 1),
        "yes_lowest": min(map(sum, said)),
        "yes_highest": max(map(sum, said)),
    }


def score(explanations: dict[str, str], guesses: dict[str, list[bool]], key: dict[str, Any]) -> dict[str, Any]:
    latents, by_kind = [], dict[str, dict[str, list[bool]]]()
    for latent, made in key["latents"].items():
        if len(guesses[latent]) != len(made["key"]):
            raise ValueError(f"latent {latent}: {len(guesses[latent])} guesses for {len(made['key'])} contexts")
        hits = {
            name: [said == truth for said, truth in zip(said_all, made["key"], strict=True)]
            for name, said_all in (("reader", guesses[latent]), ("keyword", made["keyword"]))
        }
        for name, each in hits.items():
            for kind, hit in zip(made["kinds"], each, strict=True):
                by_kind.setdefault(kind, {"reader": [], "keyword": []})[name].append(hit)
        latents.append(
            {
                "latent": int(latent),
                "explanation": explanations[latent],
                "right": sum(hits["reader"]),
                "keyword_right": sum(hits["keyword"]),
                "density": float(f"{made['density']:.3g}"),
                "guesses": guesses[latent],
            }
            | {name: made[name] for name in ("key", "keyword", "kinds", "places", "values")}
        )
    of = len(latents[0]["key"])
    return {
        "model": "smollm2-135m",
        "hook": pretrained.manifest()["hook"],
        "sae": "the shipped BatchTopK SAE, cut by its threshold",
        "reader": "a language model wrote each explanation from contexts of calibration documents (10 of the largest "
        "values, 4 from the middle); another one, which saw the explanation and 20 held-out contexts, guessed. It "
        "knew that ten of them fire: see yes_lowest and yes_highest, how often yes was said of a latent",
        "seed": key["seed"],
        "latents_that_qualify": key["pool"],
        "tokens": TOKENS,
        "density_between": DENSITY,
        "contexts_of_each": of,
        "summary": {
            name: told([one["key"] for one in latents], [one[field] for one in latents])
            for name, field in (("reader", "guesses"), ("keyword", "keyword"))
        },
        "right_by_kind": {
            kind: {"contexts": len(each["reader"])} | {n: round(sum(hit) / len(hit), 3) for n, hit in each.items()}
            for kind, each in sorted(by_kind.items())
        },
        "latents": latents,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["draw"] and len(sys.argv) == 3:
        draw(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["score"] and len(sys.argv) == 5:
        write("nb08", score(*(json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[2:])))
    else:
        raise SystemExit(__doc__)
