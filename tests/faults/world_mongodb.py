"""Two MongoDB servers (stand-ins, which can be made to fail), and the load on one."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import pymongo
from pymongo.errors import PyMongoError

from tests.faults.load_mongodb import Load, journal, prepare
from tests.faults.proxy import MONGODB, Proxy
from tests.faults.world import World
from tests.mongo_random import differences
from tests.mongod.process import StandIn
from tests.processes import wait_until

_OPTIONS: Final = "directConnection=true&heartbeatFrequencyMS=500"
"""Past the proxy there is only what the server says of itself. And it is looked at soon again where it failed."""


class MongodbWorld(World):
    """servers: `source` and `target`. The seed decides if they are one, and if updates come with their documents."""

    kind = "mongodb"
    bulk_table = "shop.bulk"
    counters: ClassVar = {"journal": lambda change: (change["delta"] or {}).get("updatedFields", {}).get("seq")}
    servers: Mapping[str, StandIn]

    def begin(self) -> None:
        source = self.stack.enter_context(StandIn())
        target = source if self.seed % 4 < 2 else self.stack.enter_context(StandIn())
        self.servers = {"source": source, "target": target}
        self.clients = {
            name: self.stack.enter_context(pymongo.MongoClient[dict[str, Any]](server.url, heartbeatFrequencyMS=500))
            for name, server in self.servers.items()
        }
        self.source, self.target = self.clients["source"]["shop"], self.clients["target"]["shop_backup"]
        prepare(self.clients["source"], "shop", seed=self.seed)
        self.lines = {
            name: self.stack.enter_context(Proxy(server.port, MONGODB)) for name, server in self.servers.items()
        }
        looked_up = bool(self.seed % 2)
        self.daemon = self.make_daemon(
            f"mongodb://127.0.0.1:{self.lines['source'].port}/shop?{_OPTIONS}",
            f"mongodb://127.0.0.1:{self.lines['target'].port}/shop_backup?{_OPTIONS}",
            options=f'full_document = "{"updateLookup" if looked_up else "off"}"\ntables = {{exclude = ["shop.x_*"]}}',
        )
        client = self.clients["source"]
        self.load = self.stack.enter_context(Load(client, "shop", seed=self.seed))

    def mark(self) -> str:
        text = f"mark {uuid.uuid4()}"
        wait_until(lambda: self._write(text), what="the source to take a mark", timeout_seconds=60)
        return text

    def _write(self, text: str) -> bool:
        try:
            self.source.marks.replace_one({"_id": text}, {}, upsert=True)
        except PyMongoError:
            return False
        return True

    def has_arrived(self, mark: str) -> bool:
        try:
            return self.target.marks.find_one({"_id": mark}) is not None
        except PyMongoError:
            return False

    def differences(self) -> list[str]:
        found = differences(self.source, self.target)
        if found:
            found.append(f"collections of the source: {list(self.source.list_collections())}")
        return found

    def counted(self) -> Mapping[str, Mapping[str, int]]:
        return {"journal": journal(self.clients["source"], "shop")}

    def is_versioned(self, entity_type: str) -> bool:
        return entity_type == "journal"  # elsewhere 7 and 7.0 are names of one document
