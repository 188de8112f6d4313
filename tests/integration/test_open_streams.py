"""Streams that are open while the feed comes up, or while tokens change."""

from __future__ import annotations

from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cdc.config import Config
from cdc.config_file import parse
from cdc.feed.place import Place, writer
from cdc.web import Web
from sinks import options_of
from tests.beside import EventLoop
from tests.gateway import Source, receive, subscribe
from tests.processes import wait_until


def configured(folder: Path, token: str) -> Config:
    return parse(
        {
            "daemon": {"data_dir": str(folder)},
            "http": {"address": "127.0.0.1:0", "tokens": [{"name": "reader", "token": token, "scopes": ["read"]}]},
            "sources": {"shop": {"url": "postgresql://nowhere/shop"}},
            "sinks": {"feed": {"from": "shop", "kind": "data_changes"}},
        },
        {},
        options_of=options_of,
    )


def _read_all(stream: ClientConnection) -> None:
    while True:
        stream.recv(10)


def test_f110_a_stream_ends_with_its_token(tmp_path: Path, source: Source) -> None:
    web = Web(configured(tmp_path, "token-1"), None)
    loop = EventLoop("web")
    serving = loop.start(web.serve())
    url = web.address.url.replace("http", "ws") + "/ws"

    def headers(token: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}"}

    try:
        with connect(url, additional_headers=headers("token-1")) as stream:
            loop.call(lambda: web.adopt(configured(tmp_path, "token-1").http))
            stream.ping().wait(10)  # nothing has changed
            loop.call(lambda: web.adopt(configured(tmp_path, "token-2").http))
            with pytest.raises(ConnectionClosed) as closed:
                _read_all(stream)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012
        with pytest.raises(InvalidStatus, match="401"), connect(url, additional_headers=headers("token-1")):
            pass
        with connect(url, additional_headers=headers("token-2")):
            pass
    finally:
        loop.call(web.stop)
        serving.result(60)
        web.close()
        loop.close()


def test_a_stream_that_is_open_before_the_feed_was_reached_stays(tmp_path: Path) -> None:
    web = Web(configured(tmp_path, "token-1"), None)
    loop = EventLoop("web")
    serving = loop.start(web.serve())
    url = web.address.url.replace("http", "ws") + "/ws"
    try:
        with connect(url, additional_headers={"Authorization": "Bearer token-1"}) as stream:
            assert receive(stream)["type"] == "welcome"
            assert subscribe(stream, "clients")["type"] == "error", "there is no feed yet"
            Source(writer(Place(None, tmp_path), "shop")).close()
            wait_until(lambda: subscribe(stream, "clients")["type"] == "subscribed")
    finally:
        loop.call(web.stop)
        serving.result(60)
        web.close()
        loop.close()
