"""A mirror's target transaction, where the target has such: data, and the position behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog
from pymongo.client_session import ClientSession
from pymongo.errors import OperationFailure, PyMongoError

from cdc.errors import TransientError
from cdc.mongodb.apply import Applier, Misfit
from cdc.mongodb.client import to_cdc_error
from cdc.mongodb.positions import DURABLE, Positions
from cdc.position import Position

log = structlog.get_logger()


@contextmanager
def target_transaction(
    session: ClientSession, positions: Positions, applier: Applier, position: Position | None
) -> Iterator[None]:
    """One transaction, that also stores a position. Raises `Misfit` where what failed may do without it."""
    session.start_transaction(write_concern=DURABLE)
    try:
        with counting(applier):
            if position is not None:
                positions.move(position, session)  # first: an older writer ends here
            yield
            session.commit_transaction()
    except OperationFailure as exc:
        if isinstance(error := to_cdc_error(exc), TransientError):
            raise error from exc
        log.debug("transaction refused", code=exc.code)
        raise Misfit from exc
    finally:
        if session.in_transaction:
            with suppress(PyMongoError):
                session.abort_transaction()


@contextmanager
def counting(applier: Applier) -> Iterator[None]:
    """What did not work counts nothing."""
    missing, healed = applier.missing, applier.healed
    try:
        yield
    except BaseException:
        applier.missing, applier.healed = missing, healed
        raise
