"""Which changes a request wants: the parameters that polling and streaming share."""

from __future__ import annotations

import msgspec
from starlette.exceptions import HTTPException

from cdc.api.change import Name, Names
from cdc.feed.store import Wanted
from cdc.feed.visibility import Limits

ALL_CHANNELS = "*"


class Filters(msgspec.Struct, frozen=True, rename="camel"):
    """Each narrows; left out, it does not."""

    entity_types: Names | msgspec.UnsetType = msgspec.UNSET
    channels: Names | msgspec.UnsetType = msgspec.UNSET
    location_id: Name | msgspec.UnsetType = msgspec.UNSET

    def wanted(self, limits: Limits) -> Wanted:
        """Raises 403 for a channel beyond the limits, which is no mistake to be silent about."""
        channels = frozenset(self.channels or {ALL_CHANNELS})
        if ALL_CHANNELS in channels:
            return self._of(limits.channels)
        if limits.channels is not None and not channels <= limits.channels:
            raise HTTPException(403, "channels: the token does not allow all of them")
        return self._of(channels)

    def _of(self, channels: frozenset[str] | None) -> Wanted:
        return Wanted(frozenset(self.entity_types) if self.entity_types else None, channels, self.location_id or None)
