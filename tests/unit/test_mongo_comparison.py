"""Telling late, changing and wrong documents apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cdc.mongodb.comparison import Found, compare
from cdc.mongodb.digest import Digest, Hashes
from cdc.mongodb.snapshot import IdRange


class Documents:
    """One side, in memory: `{_id: value}`; `on_lookup` is called before each lookup."""

    def __init__(self, **documents: str) -> None:
        self.documents = documents
        self.on_lookup: Callable[[], None] = lambda: None
        self.clock = 0

    def split(self) -> list[IdRange]:
        return [(None, b"m"), (b"m", None)]

    def digest(self, ids: IdRange) -> Digest:
        hashes = self.hashes(ids)
        return Digest(len(hashes), repr(sorted(hashes.items())).encode())

    def hashes(self, ids: IdRange) -> Hashes:
        low, high = ids
        found = {key.encode(): value.encode() for key, value in self.documents.items()}
        return {key: value for key, value in found.items() if (low or b"") <= key < (high or b"\xff")}

    def lookup(self, ids: Iterable[bytes]) -> Hashes:
        self.on_lookup()
        return {key: value for key, value in self.hashes((None, None)).items() if key in ids}

    def now(self) -> int:
        self.clock += 1
        return self.clock


def compared(source: Documents, target: Documents, catch_up: Callable[[int], bool] = lambda _moment: True) -> Found:
    return compare(source, target, catch_up)


def test_equal_sides_are_equal() -> None:
    found = compared(Documents(a="1", z="2"), Documents(a="1", z="2"))
    assert (found.equal, found.sure, found.source_rows, found.ranges, found.differing_ranges) == (True, True, 2, 2, 0)


def test_missing_extra_and_different_documents_are_told_apart() -> None:
    found = compared(Documents(a="1", b="2", x="3"), Documents(b="other", x="3", y="4"))
    assert (found.missing, found.different, found.extra) == ((b"a",), (b"b",), (b"y",))
    assert (found.equal, found.sure, found.changing, found.differing_ranges) == (False, True, (), 2)


def test_f56_what_is_only_late_is_no_difference() -> None:
    source, target = Documents(a="2", b="1"), Documents(a="1", c="gone")

    def catch_up(_moment: int) -> bool:
        target.documents = dict(source.documents)
        return True

    assert compared(source, target, catch_up).equal


def test_f56_a_difference_that_could_not_be_looked_at_beyond_the_lag_is_not_sure() -> None:
    found = compared(Documents(a="1"), Documents(), lambda _moment: False)
    assert (found.missing, found.sure) == ((b"a",), False)


def test_f56_a_document_that_keeps_changing_is_neither_equal_nor_different() -> None:
    source, target = Documents(a="0", b="1"), Documents(a="-1", b="1")

    def change() -> None:
        source.documents["a"] = str(int(source.documents["a"]) + 1)

    def catch_up(_moment: int) -> bool:
        target.documents["a"] = source.documents["a"]
        return True

    source.on_lookup = change
    found = compared(source, target, catch_up)
    assert (found.changing, found.different, found.equal) == ((b"a",), (), False)


def test_f56_a_document_that_stops_changing_is_compared() -> None:
    source, target = Documents(a="0"), Documents(a="-1")
    left = [5]

    def change() -> None:
        if left[0]:
            left[0] -= 1
            source.documents["a"] += "x"

    def catch_up(_moment: int) -> bool:
        target.documents["a"] = source.documents["a"]
        return True

    source.on_lookup = change
    assert compared(source, target, catch_up).equal


def test_a_document_that_was_changed_and_changed_back_is_no_difference() -> None:
    source, target = Documents(a="1"), Documents(a="0")
    rounds = [0]

    def catch_up(_moment: int) -> bool:
        rounds[0] += 1
        target.documents["a"] = "2" if rounds[0] == 1 else "1"  # the source had "2" for a moment in the first round
        return True

    assert compared(source, target, catch_up).equal
