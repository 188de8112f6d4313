"""What servers of a version can do, and how they present themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_WIRE: Final = {"5.0": 13, "6.0": 17, "7.0": 21, "8.0": 25}
_FULL: Final = {"5.0": "5.0.31", "6.0": "6.0.20", "7.0": "7.0.16", "8.0": "8.0.4"}
VERSIONS: Final = tuple(_WIRE)


@dataclass(frozen=True, slots=True)
class Version:
    """One of `VERSIONS`."""

    name: str

    @property
    def full(self) -> str:
        """With the patch level."""
        return _FULL[self.name]

    @property
    def max_wire_version(self) -> int:
        """`maxWireVersion` of hello."""
        return _WIRE[self.name]

    @property
    def numbers(self) -> list[int]:
        """`versionArray` of buildInfo."""
        return [*map(int, self.full.split(".")), 0]

    @property
    def token_version(self) -> int:
        """The version of its resume tokens."""
        return 2 if self._major >= 7 else 1

    @property
    def has_expanded_events(self) -> bool:
        """`showExpandedEvents`, wall times, and pre- and post-images in change streams: from 6.0."""
        return self._major >= 6

    @property
    def has_split_events(self) -> bool:
        """`$changeStreamSplitLargeEvent`: 6.0.9 and 7.0."""
        return self._major >= 6

    @property
    def has_disambiguated_paths(self) -> bool:
        """`updateDescription.disambiguatedPaths`: from 6.1."""
        return self._major >= 7

    @property
    def _major(self) -> int:
        return int(self.name.split(".")[0])
