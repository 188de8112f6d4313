"""Comparing a collection with its mirror while both go on: there is no moment at which both could be seen.

Ranges of `_id` are hashed on both sides at about the same time. Where they differ, so may documents, for three reasons:
the mirror is late, the document is being written, or the mirror is wrong. They are told apart by reading again:

1. the source's documents, and then its clock;
2. when the mirror has passed that moment, the mirror's documents;
3. the source's once more. One that has stayed the same was the same all the while from 1 to 3, and the mirror has
   applied everything that made it so: if the mirror's is another one, that is a difference. One that has not stayed the
   same tells nothing: it is taken into the next round, and after the last it is reported as still changing.

A difference counts when two rounds in a row have found it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple, Protocol

import msgspec

from cdc.mongodb.digest import Digest, Hashes
from cdc.mongodb.snapshot import IdRange
from cdc.verify_report import Keys

ROUNDS: Final = 8
MAX_SUSPECTS: Final = 100_000
"""So many documents are followed; that there are more is said."""


class Side(Protocol):
    """A collection on one server: see `cdc.mongodb.digest.CollectionDigest`."""

    def split(self) -> list[IdRange]: ...  # noqa: D102

    def digest(self, ids: IdRange) -> Digest: ...  # noqa: D102

    def hashes(self, ids: IdRange) -> Hashes: ...  # noqa: D102

    def lookup(self, ids: Iterable[bytes]) -> Hashes: ...  # noqa: D102

    def now(self) -> int: ...  # noqa: D102


CatchUp = Callable[[int], bool]
"""Wait until the mirror has applied everything up to a moment of the source; False where that cannot be known."""


class Found(msgspec.Struct, frozen=True):
    """What a comparison found out about one collection. Keys are `{_id: value}` as BSON.

    sure: whether the mirror had passed what the source showed, wherever they differ.
    """

    source_rows: int
    target_rows: int
    ranges: int
    differing_ranges: int
    missing: tuple[bytes, ...]
    extra: tuple[bytes, ...]
    different: tuple[bytes, ...]
    changing: tuple[bytes, ...]
    counted: bool
    sure: bool

    @property
    def equal(self) -> bool:
        """Whether every document is known to be equal."""
        return self.counted and not (self.missing or self.extra or self.different or self.changing)


class _Suspects(NamedTuple):
    ids: list[bytes]
    counted: bool


def compare(source: Side, target: Side, catch_up: CatchUp, *, workers: int = 2, rounds: int = ROUNDS) -> Found:
    """Compare all ranges, and look again at what differs until it is known why."""
    with ThreadPoolExecutor(2 * workers, "verify") as pool:
        pairs = list(_digests(source, target, pool, 2 * workers))
        differing = [ids for ids, left, right in pairs if left != right]
        suspects = _suspects(source, target, differing, pool)
        verdict = _settle(source, target, suspects.ids, catch_up, rounds)
    return Found(
        source_rows=sum(left.rows for _, left, _ in pairs),
        target_rows=sum(right.rows for _, _, right in pairs),
        ranges=len(pairs),
        differing_ranges=len(differing),
        missing=tuple(verdict.missing),
        extra=tuple(verdict.extra),
        different=tuple(verdict.different),
        changing=tuple(verdict.changing),
        counted=suspects.counted,
        sure=verdict.sure,
    )


def keys(ids: Sequence[bytes], shown: Callable[[bytes], str], max_keys: int) -> Keys:
    """For a report: how many, and the first of them in a form for people."""
    return Keys(len(ids), tuple(shown(one) for one in ids[:max_keys]))


def _digests(
    source: Side, target: Side, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[IdRange, Digest, Digest]]:
    """Both digests of each range, a few ranges at a time, both sides of one at once."""
    running: deque[tuple[IdRange, Future[Digest], Future[Digest]]] = deque()
    for ids in source.split():
        running.append((ids, pool.submit(source.digest, ids), pool.submit(target.digest, ids)))
        if len(running) >= ahead:
            yield _result(running.popleft())
    while running:
        yield _result(running.popleft())


def _result(
    pair: tuple[IdRange, Future[Digest], Future[Digest]],
) -> tuple[IdRange, Digest, Digest]:
    ids, left, right = pair
    return ids, left.result(), right.result()


def _suspects(source: Side, target: Side, ranges: Sequence[IdRange], pool: ThreadPoolExecutor) -> _Suspects:
    """The documents of these ranges that differ now, within bounds."""
    found: list[bytes] = []
    for ids in ranges:
        both = pool.submit(source.hashes, ids), pool.submit(target.hashes, ids)
        left, right = (side.result() for side in both)
        found += (one for one in left.keys() | right.keys() if left.get(one) != right.get(one))
        if len(found) > MAX_SUSPECTS:
            return _Suspects(found[:MAX_SUSPECTS], counted=False)
    return _Suspects(found, counted=True)


class _Verdict(NamedTuple):
    missing: list[bytes]
    extra: list[bytes]
    different: list[bytes]
    changing: list[bytes]
    sure: bool


def _settle(source: Side, target: Side, suspects: list[bytes], catch_up: CatchUp, rounds: int) -> _Verdict:
    verdict = _Verdict([], [], [], [], sure=True)
    different_once: set[bytes] = set()
    for _ in range(rounds):
        if not suspects:
            return verdict
        before = source.lookup(suspects)
        passed = catch_up(source.now())
        mirrored = target.lookup(suspects)
        after = source.lookup(suspects)
        steady = [one for one in suspects if before.get(one) == after.get(one)]
        different = {one for one in steady if before.get(one) != mirrored.get(one)}
        if different and not passed:
            verdict = verdict._replace(sure=False)
        # twice: a document that was changed and changed back in between looks as if it had stayed the same
        _judge(sorted(different & different_once), before, mirrored, verdict)
        settled = (different & different_once) | (set(steady) - different)
        different_once = different
        suspects = [one for one in suspects if one not in settled]
    verdict.changing.extend(suspects)
    return verdict


def _judge(different: Iterable[bytes], source: Hashes, target: Hashes, verdict: _Verdict) -> None:
    for one in different:
        kind = verdict.missing if one not in target else verdict.extra if one not in source else verdict.different
        kind.append(one)
