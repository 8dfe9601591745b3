"""Print the table of answers: `python -m tests.answers [04 ...]`; exit status 1 if one is not judged as meant."""

from __future__ import annotations

import sys

from tests.answers import verdicts


def main(names: list[str]) -> int:
    bad = 0
    for answer, number, message, as_meant in verdicts(names):
        bad += not as_meant
        said = " ".join(message.partition(": ")[2].split())
        mark = "ok " if as_meant else "BAD"
        print(f"{mark} {number:<5}{'right' if answer.says is None else 'wrong'}  {answer.label:<44.44} {said:.150}")
    print(f"{bad} not judged as meant")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
