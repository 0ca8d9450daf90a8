"""Asking a part of a suite: by name, or as one of several shards whose result files are joined afterwards."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import regex

from qat.behavior.records import CaseResult, ResultKey, ResultMeta, meta_path, read_meta, read_results
from qat.behavior.suite import Suite
from qat.errors import UserError
from qat.storage import write_atomic


class Selection(NamedTuple):
    """Which cases of a suite are asked.

    Attributes:
        only: Patterns (`*`, `?`, `[…]`) for id, category or tag; a case that meets one is in. None: every case.
        shard: Number of this shard, from 1.
        shards: How many there are; each takes every n-th of the cases that `only` leaves, so that together they are
            disjoint and the whole.
    """

    only: tuple[str, ...] = ()
    shard: int = 1
    shards: int = 1

    @classmethod
    def parse(cls, only: Sequence[str], shard: str | None) -> Self:
        """The selection of a command line.

        Raises:
            UserError: `shard` is not `i/n` with 1 <= i <= n.
        """
        if shard is None:
            return cls(tuple(only))
        found = regex.fullmatch(r"(\d+)/(\d+)", shard)
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            raise UserError("This is no shard.", value=shard, remedy="give it as i/n, from 1/n to n/n")
        return cls(tuple(only), number, count)

    @property
    def partial(self) -> bool:
        """Whether it may leave cases out."""
        return bool(self.only) or self.shards > 1

    def ids(self, suite: Suite) -> set[str]:
        """Ids of the cases selected.

        Raises:
            UserError: A pattern that no case meets.
        """
        known = {case.id: (case.id, case.category, *case.tags) for case in suite.cases}
        for pattern in self.only:
            if not any(fnmatch.fnmatchcase(word, pattern) for words in known.values() for word in words):
                raise UserError(
                    "No case, category or tag of the suite is named so.",
                    where=suite.name,
                    value=pattern,
                    remedy=f"categories: {', '.join(dict.fromkeys(case.category for case in suite.cases))}",
                )
        met = [
            identity
            for identity, words in known.items()
            if not self.only or any(fnmatch.fnmatchcase(word, p) for word in words for p in self.only)
        ]
        return set(met[self.shard - 1 :: self.shards])

    def answers(self, suite: Suite, results: Path) -> list[CaseResult]:
        """The results of the cases selected, in the order of the suite and not in that of their coming."""
        chosen = self.ids(suite)
        order = {case.id: place for place, case in enumerate(suite.cases) if case.id in chosen}
        found = [result for result in read_results(results).results.values() if result.case in order]
        return sorted(found, key=lambda result: order[result.case])


EVERYTHING = Selection()


def merge_results(parts: Sequence[Path], out: Path) -> int:
    """Join result files of one arm, asked in shards, into one with its description.

    Args:
        parts: Result files; the same answer may stand in several.
        out: The file to write, whole or not at all.

    Returns:
        Number of results in `out`.

    Raises:
        UserError: They were made with different suites, models or settings, are of different arms, or answer one
            question differently; or `out` exists.
    """
    if out.exists():
        raise UserError("The file to write exists.", where=str(out), remedy="name another one, or remove it")
    merged: dict[ResultKey, CaseResult] = {}
    meta: ResultMeta | None = None
    for part in parts:
        found = read_meta(part)
        if found is None:
            raise UserError("Nothing says what these results were made with.", where=str(meta_path(part)))
        if meta is not None and found != meta:
            keys = [name for name in ResultMeta.model_fields if getattr(found, name) != getattr(meta, name)]
            raise UserError(f"The results were made with another {keys[0]}.", where=f"{part}, {parts[0]}")
        meta = found
        for key, result in read_results(part).results.items():
            _put(merged, key, result, part)
    if meta is None:
        raise UserError("There are no result files to join.")
    write_atomic(meta_path(out), meta.model_dump_json(indent=2) + "\n")
    write_atomic(out, "".join(result.model_dump_json() + "\n" for result in merged.values()))
    return len(merged)


def _put(merged: dict[ResultKey, CaseResult], key: ResultKey, result: CaseResult, part: Path) -> None:
    before = merged.get(key)
    first = next(iter(merged.values()), result)
    if result.arm != first.arm:
        raise UserError("The results are of different arms.", where=str(part), value=f"{first.arm}, {result.arm}")
    if before is None or before.error is not None:
        merged[key] = result
    elif result.error is None and result != before:
        raise UserError(
            "Two of the files answer one question differently.",
            where=str(part),
            value=f"{key.case}, sampling {key.sampling}, seed {key.seed}",
            remedy="shards are disjoint: leave one of the files out",
        )
