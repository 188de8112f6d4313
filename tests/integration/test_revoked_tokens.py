"""Tokens that change while streams are open."""

from __future__ import annotations

from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from cdc.config import Config
from cdc.config_file import parse
from cdc.web import Web
from sinks import options_of
from tests.beside import EventLoop
from tests.gateway import Source


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
