"""Everything at once, at random: a busy MongoDB source, servers that fail, a daemon that is killed; then compare.

`cdc` is the real process, the servers are stand-ins, which can be made to fail. Exit code 0 only if the mirror ends as
its source each time, byte by byte and by `cdc verify`, and `cdc verify` finds a document that is made another one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bson
import pymongo
from bson.raw_bson import RawBSONDocument

from tests.command import Cdc
from tests.mongo import at
from tests.mongo_random import RAW, Workload, differences
from tests.mongod.process import StandIn
from tests.processes import kill_tree, wait_until

COMMANDS = (
    "aggregate", "getMore", "find", "insert", "update", "delete", "commitTransaction", "listCollections", "create",
)  # fmt: skip
FAULTS: tuple[dict[str, Any], ...] = (
    {"closeConnection": True}, {"closeConnectionAfter": True}, {"errorCode": 10107}, {"errorCode": 91},
    {"errorCode": 112}, {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
)  # fmt: skip
APPLICATIONS = ("cdc shop", "cdc sink mirror", "cdc-copy", "cdc-copy mirror")


def damage(server: StandIn, chance: random.Random) -> None:
    """Break something for a short while."""
    kind = chance.random()
    if kind < 0.1:
        server.command("cdcTestBlackout", 0.2)
    elif kind < 0.2:
        server.command("replSetStepDown", 0.2)
    else:
        data = {"failCommands": [chance.choice(COMMANDS)], "appName": chance.choice(APPLICATIONS)}
        data |= chance.choice(FAULTS)
        server.command("configureFailPoint", "failCommand", mode={"times": chance.randint(1, 2)}, data=data)


@contextmanager
def busy(server: StandIn, target: StandIn, seed: int, *, moves: bool) -> Iterator[None]:
    """Users at work, and their server failing; afterwards it does no more."""
    stop = threading.Event()

    def work() -> None:
        with pymongo.MongoClient[dict[str, Any]](server.url, heartbeatFrequencyMS=500) as client:
            load = Workload(client, "shop", seed, moves=moves)
            while not stop.wait(0.01):
                load.run(3)

    def fail() -> None:
        chance = random.Random(seed)
        while not stop.wait(0.2):
            damage(chance.choice((server, target)), chance)

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(doing) for doing in (work, fail)]
        try:
            yield
        finally:
            stop.set()
    for each in running:
        each.result()
    for one in (server, target):
        one.command("configureFailPoint", "failCommand", mode="off")


def run(cdc: Cdc, server: StandIn, target: StandIn, *, seed: int, looked_up: bool, kills: int) -> None:
    """Kill the daemon so often under load; then the mirror, and what `cdc verify` says, must be right.

    target: the mirror's server, which may be the source's.
    """
    chance = random.Random(seed)
    with (
        pymongo.MongoClient[dict[str, Any]](server.url, heartbeatFrequencyMS=500) as client,
        pymongo.MongoClient[dict[str, Any]](target.url, heartbeatFrequencyMS=500) as mirror,
    ):
        Workload(client, "shop", seed).run(100)
        images = "updateLookup" if looked_up else "off"
        url = at(target.url, "shop_backup")
        cdc.configure(
            at(server.url, "shop"), url, source=f'full_document = "{images}"\ntables = {{exclude = ["shop.x_*"]}}'
        )
        with busy(server, target, seed, moves=looked_up):
            for _ in range(kills):
                with cdc.running() as process:
                    threading.Event().wait(chance.uniform(0.2, 1.5))  # the time of the crash is what is random
                    assert process.poll() is None, cdc.log[-3000:]
                    kill_tree(process.pid)
                    process.wait()
                (cdc.data_dir / "http").unlink(missing_ok=True)
        client.shop.last.insert_one({"seed": seed})  # there may be nothing else
        with cdc.running() as process:
            found: list[str] = []

            def equal() -> bool:
                found[:] = differences(client.shop, mirror.shop_backup)
                return not found or process.poll() is not None

            wait_until(equal, timeout_seconds=30, what=lambda: f"equality: {found[:5]}\n{cdc.log[-3000:]}")
            assert process.poll() is None, cdc.log[-3000:]
            result = cdc("verify")
            assert result.returncode == 0, result.stdout + result.stderr
            if spoil(mirror.shop_backup, chance):
                assert cdc("verify").returncode == 1


def spoil(mirror: Any, chance: random.Random) -> bool:
    """Make one document of the mirror another one that looks much the same; False if there is none."""
    for name in sorted(mirror.list_collection_names()):
        mirrored: Any = mirror.get_collection(name, codec_options=RAW)
        if name.startswith("cdc_") or not (documents := [bytes(one.raw) for one in mirrored.find()]):
            continue
        document = chance.choice(documents)
        body = document[4:-1] + bson.encode({"more": None})[4:-1]
        other = RawBSONDocument((len(body) + 5).to_bytes(4, "little") + body + b"\0")
        mirrored.replace_one({"_id": bson.decode(document)["_id"]}, other, bypass_document_validation=True)
        return True
    return False


def main() -> None:
    """Run it with one seed after the other; the first that fails ends it."""
    parser = argparse.ArgumentParser(prog="scripts/crash --random", description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="how often the daemon is killed with each seed (3)")
    parser.add_argument("--seed", type=int, default=1, help="the first one: chooses load, faults and moments (1)")
    parser.add_argument("--seeds", type=int, default=10, help="how many, each with fresh servers (10)")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.seeds):
        with tempfile.TemporaryDirectory() as folder, StandIn() as server, StandIn() as other:
            target = server if seed % 4 < 2 else other
            run(Cdc(Path(folder)), server, target, seed=seed, looked_up=bool(seed % 2), kills=options.kills)
        print(f"seed {seed}: equal", flush=True)


if __name__ == "__main__":
    main()
