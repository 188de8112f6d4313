"""A source and its mirror as commands see them that look at both: verify, sync, cut-over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cdc.barrier import Barrier
from cdc.change import TableName
from cdc.config import SinkConfig, SourceConfig
from cdc.position import SourcePosition

ReadPosition = Callable[[], SourcePosition | None]


@dataclass(frozen=True, slots=True)
class Mirroring:
    """What is compared with what, and how the mirror is steered.

    tables: asks the source which tables are captured.
    barrier: makes the mirror stand still.
    position: asks where the running mirror stands; `None` where no daemon runs.
    """

    source: SourceConfig
    sink: SinkConfig
    tables: Callable[[], Sequence[TableName]]
    barrier: Barrier
    position: ReadPosition | None
