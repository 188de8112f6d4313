from collections.abc import Sequence

from cdc.postgres.fold import Slots

def add_plain(data: bytes, at: int, left: int, slots: Sequence[Slots | None]) -> tuple[int, int]: ...
