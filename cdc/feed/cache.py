"""The entities that a writer has seen last, so that it need not ask for them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from cdc.feed.record import EntityState

Key = tuple[str, str]
"""Entity type and key."""

_OVERHEAD_BYTES: Final = 600
"""What an entry weighs besides its documents."""


class StateCache:
    """The most recently used states of one source's entities, bounded by bytes."""

    def __init__(self, max_bytes: int = 8 * 1024**2) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._states: OrderedDict[Key, EntityState] = OrderedDict()

    def find(self, keys: Iterable[Key]) -> tuple[dict[Key, EntityState], list[Key]]:
        """Those that are here, and the keys of those that are not."""
        found: dict[Key, EntityState] = {}
        missing = []
        for key in keys:
            state = self._states.get(key)
            if state is None:
                missing.append(key)
            else:
                self._states.move_to_end(key)
                found[key] = state
        return found, missing

    def put(self, states: Iterable[EntityState]) -> None:
        """Remember, and forget what was not used for longest."""
        kept = self._states
        for state in states:
            key = state.entity_type, state.key
            if (before := kept.pop(key, None)) is not None:
                self._bytes -= _size(before)
            self._bytes += _size(state)
            kept[key] = state
        while self._bytes > self._max_bytes:
            self._bytes -= _size(kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget all."""
        self._states.clear()
        self._bytes = 0


def _size(state: EntityState) -> int:
    return _OVERHEAD_BYTES + len(state.known or b"") + len(state.scope or b"")
