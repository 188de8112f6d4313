"""A gateway: serves a feed without capturing anything. As many as are needed may serve the same one."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from cdc import __version__
from cdc.config import Config
from cdc.errors import CdcError, FatalError
from cdc.feed.place import served
from cdc.process import on_signals, run_in_loop

if TYPE_CHECKING:
    from cdc.web import Web

log = structlog.get_logger()


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises `FatalError` where there is no feed to serve."""
    if served(config) is None:
        raise FatalError(
            "there is no feed to serve", hint='configure a sink of kind = "data_changes", as the daemon has it'
        )
    run_in_loop(_serve(config))


def _renew(web: Web) -> None:
    """On SIGHUP; all else takes a restart."""
    try:
        web.renew_certificate()
    except CdcError as exc:
        log.error("certificate not renewed: all stays as it was", error=str(exc), hint=exc.hint)


async def _serve(config: Config) -> None:
    from cdc.web import listening  # noqa: PLC0415 - as in the daemon

    stopping = asyncio.Event()
    with listening(config, None) as web:
        on_signals(stopping, partial(_renew, web))
        log.info("gateway started", version=__version__, http=web.address.url)
        serving = asyncio.create_task(web.serve(), name="http")
        stopped = asyncio.create_task(stopping.wait(), name="stopping")
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        web.stop()
        await serving
        log.info("gateway stopped")
