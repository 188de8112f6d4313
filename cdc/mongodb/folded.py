"""What folding leaves of one collection's changes."""

from __future__ import annotations

import msgspec

from cdc.change import Change, Image


class Folded(msgspec.Struct):
    """Final states of one collection, to be applied in this order. Only `deltas` depend on each other, and on the rest.

    deletes: document keys, of which `expected_deletes` should be there.
    inserts: documents that are new, if this is no replay. replaces: documents that should be there.
    deltas: UPDATEs whose document's final state is not known, in source order for each document.
    """

    deletes: list[Image]
    replaces: list[tuple[Image, Image]]
    inserts: list[tuple[Image, Image]]
    deltas: list[Change]
    expected_deletes: int
