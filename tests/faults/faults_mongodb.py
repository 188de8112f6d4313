"""What happens to MongoDB servers, besides `tests.faults.faults`."""

from __future__ import annotations

import random
from typing import Any, Final

import psutil

from tests.faults.faults import Fault
from tests.faults.world_mongodb import MongodbWorld

_COMMANDS: Final = (
    "aggregate", "getMore", "find", "insert", "update", "delete", "commitTransaction", "listCollections", "create",
)  # fmt: skip
_RESUMABLE: Final = ["ResumableChangeStreamError"]
_FAILURES: Final[tuple[dict[str, Any], ...]] = (
    {"closeConnection": True},
    {"closeConnectionAfter": True},
    {"errorCode": 10107, "errorLabels": _RESUMABLE},  # NotWritablePrimary
    {"errorCode": 91},  # ShutdownInProgress
    {"errorCode": 112, "errorLabels": ["TransientTransactionError"]},  # WriteConflict
    {"errorCode": 43, "errorLabels": _RESUMABLE},  # CursorNotFound
    {"errorCode": 262, "errorLabels": _RESUMABLE},  # ExceededTimeLimit
    {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
)
_APPLICATIONS: Final = ("cdc shop", "cdc sink mirror", "cdc-copy", "cdc-copy mirror")


def commands_fail(world: MongodbWorld, rng: random.Random) -> None:
    """Some of the daemon's commands, and only of it."""
    for _ in range(rng.randint(2, 6)):
        server = world.servers[rng.choice(("source", "target"))]
        data = {"failCommands": [rng.choice(_COMMANDS)], "appName": rng.choice(_APPLICATIONS), **rng.choice(_FAILURES)}
        mode = rng.choice(({"times": 1}, {"times": 3}, {"activationProbability": 0.2}))
        server.command("configureFailPoint", "failCommand", mode=mode, data=data)
        world.rest(rng.uniform(0.1, 0.7))
        server.command("configureFailPoint", "failCommand", mode="off")


def primary_steps_down(world: MongodbWorld, rng: random.Random) -> None:
    """And is elected again."""
    server = world.servers[rng.choice(("source", "target"))]
    server.command("replSetStepDown", rng.uniform(0.2, 2.0))


def server_away(world: MongodbWorld, rng: random.Random) -> None:
    """No connection survives, and none can be made for a while."""
    server = world.servers[rng.choice(("source", "target"))]
    server.command("cdcTestBlackout", seconds := rng.uniform(0.2, 4.0))
    world.rest(seconds)


def server_suspended(world: MongodbWorld, rng: random.Random) -> None:
    """SIGSTOP: connections stay, nothing answers."""
    process = psutil.Process(world.servers[rng.choice(("source", "target"))].pid)
    process.suspend()
    world.rest(rng.choice((0.5, 2.0, 8.0)))
    process.resume()


def no_majority(world: MongodbWorld, rng: random.Random) -> None:
    """The source is written, and its change streams show nothing of it."""
    server = world.servers["source"]
    server.command("cdcTestHoldMajority", value=True)
    world.rest(rng.uniform(0.5, 3.0))
    server.command("cdcTestHoldMajority", value=False)


def poison(world: MongodbWorld, rng: random.Random) -> None:
    """A change that the mirror refuses is parked, what comes later for its document behind it; the rest flows on."""
    value = rng.getrandbits(40)
    mirrored = world.target.poisoned
    mirrored.create_index("p", unique=True, sparse=True, name="of the mirror alone")
    bad = f"b{value}"
    world.source.poisoned.insert_many([{"_id": f"a{value}", "p": value}, {"_id": bad, "p": value}])
    for number in range(3):
        world.source.poisoned.update_one({"_id": bad}, {"$set": {"n": number}})
    world.wait(lambda: world.parked >= 4, "changes to be parked")
    world.arrive()
    mirrored.drop_index("of the mirror alone")
    world.wait(lambda: not world.parked, "parked changes to be applied")
    world.source.poisoned.delete_many({"p": value})
    world.arrive()


MONGODB: Final = (
    Fault("commands fail", commands_fail),
    Fault("primary steps down", primary_steps_down),
    Fault("server away", server_away),
    Fault("server suspended", server_suspended),
    Fault("no majority", no_majority),
    Fault("poison", poison),
)
