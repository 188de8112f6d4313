"""Who sees what of the feed. One place for poll, history, WebSocket and SSE alike."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """What somebody may see of the feed. `None`: no limit of that sort.

    channels: by name.
    where: fields of the entity, and the text that each must be equal to.
    """

    channels: frozenset[str] | None = None
    where: Mapping[str, str] | None = None
