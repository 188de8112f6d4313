from collections.abc import Sequence

from cdc.change import Transaction

def array_items(data: bytes, at: int = 0) -> list[bytes]: ...
def take_plain(
    events: Sequence[bytes], at: int, room: int, table_of: dict[bytes, int], transactions: list[Transaction]
) -> tuple[int, int, bytes | None]: ...
