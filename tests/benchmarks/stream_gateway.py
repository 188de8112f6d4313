"""A gateway, as a process that prints its port. Argument: the URL of a feed, or the folder of one in SQLite."""

from __future__ import annotations

import sys
from pathlib import Path

import uvloop

from cdc.api.app import create_app
from cdc.api.feed import Feed
from cdc.api.server import Server
from cdc.feed.place import Place
from cdc.http_config import Http
from cdc.secret import Secret


async def serve(where: str) -> None:
    place = Place(Secret(where), Path.cwd()) if "://" in where else Place(None, Path(where))
    feed = Feed.at(place)
    feed.start()
    server = Server(create_app(None, Http(), feed), ("127.0.0.1", 0))
    print(server.address[1], flush=True)
    await server.serve()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
