"""The backlogs that are drained, by name; the small ones only show that it works."""

from __future__ import annotations

from typing import Final

from tests.benchmarks.table import Backlog

WORKLOADS: Final = {
    "backlog": (
        Backlog(inserts=300_000, updates=160_000),
        Backlog(inserts=3_000, updates=1_000),
    ),
    # half of the updates come a hundred in a transaction, half alone: folding by key pays in both, what a transaction
    # costs counts only in the second
    "hot": (
        Backlog(inserts=10_000, updates=1_000_000, together=500_000, mark=500_000),
        Backlog(inserts=1_000, updates=4_000, together=2_000, mark=2_000),
    ),
    "large": (
        Backlog(inserts=1_000_000, updates=0, transaction_rows=1_000_000),
        Backlog(inserts=5_000, updates=0, transaction_rows=5_000),
    ),
}
"""backlog: what a shop writes that begins with an import. hot: few keys, changed again and again. large: one
transaction."""


def workload(name: str, *, small: bool) -> Backlog:
    """One of them."""
    full, little = WORKLOADS[name]
    return little if small else full
