"""Two shops are copied to mirrors and kept equal while customers buy, although the daemon is killed in the middle.

One shop is in PostgreSQL, the other in MongoDB; one daemon mirrors both. Everything is real: two PostgreSQL servers, a
`mongod` (where there is none on PATH, a stand-in, which the demo then says), the `cdc` command as a user would type it,
`kill -9`. Exit code 0 only if `cdc verify` says at the end that all databases are equal, and the feed has told of every
change once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from tests import orders, shop
from tests.mongo import at
from tests.mongod.process import mongodb_url
from tests.processes import free_port, wait_until
from tests.servers import PostgresServer

CDC: Final = Path(sys.executable).with_name("cdc")
CONFIG: Final = """\
[daemon]
data_dir = {data_dir}

[http]
address = {http}

[queue]
min_free_bytes = 100_000_000

[sources.shop]
url = {source}
pg_dump = {pg_dump}

[sinks.mirror]
from = "shop"
url = {target}

[sinks.changes]
kind = "data_changes"
from = "shop"

[sources.orders]
url = {mongodb}

[sinks.orders_backup]
from = "orders"

[sinks.order_changes]
kind = "data_changes"
from = "orders"
"""

console = Console(highlight=False)


class DemoFailed(Exception):
    """A step did not do what it shows; the message says which."""


@dataclass(frozen=True)
class Sizes:
    """How many rows there are, and how long the customers buy before and after the kill."""

    customers: int
    products: int
    orders: int
    audits: int
    documents: int
    seconds: float
    rate: float


FULL: Final = Sizes(
    customers=50_000, products=3_000, orders=200_000, audits=100_000, documents=50_000, seconds=10, rate=300
)
SMALL: Final = Sizes(customers=500, products=50, orders=1_000, audits=500, documents=1_000, seconds=1.5, rate=100)


class Daemon:
    """`cdc run` in the background."""

    def __init__(self, log: Path, http: str) -> None:
        self.log = log
        self._ready_url = f"http://{http}/ready"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Return its process id when it is connected to the source."""
        show("run", " &")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [CDC, "run"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(lambda: self._ended() or self._ready(), timeout_seconds=60, what="the daemon to be ready")
        if self._ended():
            raise DemoFailed(f"the daemon ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        return self._process.pid

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ask it to finish, and insist if it does not. Safe to call twice."""
        if self._process is None or self._ended():
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()

    def _ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class Demo:
    """The servers, the configuration and the daemon of one demonstration."""

    def __init__(self, folder: Path, sizes: Sizes, *, keep: bool) -> None:
        self.sizes = sizes
        self.config = folder / "cdc.toml"
        self.source = PostgresServer(folder=folder / "source" if keep else None)
        self.target = PostgresServer(folder=folder / "target" if keep else None)
        self._mongodb_url = ""
        self._http = f"127.0.0.1:{free_port()}"
        self.daemon = Daemon(folder / "daemon.log", self._http)

    def start_servers(self) -> None:
        say("Two PostgreSQL 18 servers start: a shop's own, and an empty one for its mirror.")
        for server in (self.source, self.target):
            server.start()
        self.source.create_database("shop")
        console.print(f"  source  {self.source.url('shop')}\n  target  {self.target.url('shop')}")

    def use_mongodb(self, url: str, what: str) -> None:
        say(f"And a MongoDB replica set, for ordersDB and its mirror ordersDB_backup: {what}.")
        self._mongodb_url = at(url, orders.DATABASE)
        console.print(
            f"  source  {self._mongodb_url}\n  target  {at(url, orders.DATABASE + '_backup')}", soft_wrap=True
        )

    def fill_shop(self) -> None:
        size = self.sizes
        say(
            f"The shop opens with {size.customers:,} customers, {size.orders:,} orders of three items each and"
            f" {size.products:,} products, whose manuals are long enough for TOAST."
        )
        with self.source.connect("shop") as connection, console.status("filling the shop"):
            shop.create(connection)
            shop.fill(
                connection, customers=size.customers, products=size.products, orders=size.orders, audits=size.audits
            )
        say(f"ordersDB gets {size.documents:,} orders, each a document, with a unique orderNo.")
        with console.status("filling ordersDB"):
            orders.fill(self._mongodb_url, size.documents)

    def write_config(self) -> None:
        say("This is the whole configuration:")
        values = {
            "data_dir": str(self.config.with_name("data")),
            "http": self._http,
            "source": self.source.url("shop"),
            "target": self.target.url("shop"),
            "mongodb": self._mongodb_url,
            "pg_dump": str(self.source.bin_dir / "pg_dump"),
        }
        self.config.write_text(CONFIG.format_map({key: json.dumps(value) for key, value in values.items()}))
        console.print(self.config.read_text(), style="dim", markup=False, soft_wrap=True)
        console.print(f"[bold cyan]$ export CDC_CONFIG={self.config}", soft_wrap=True)
        os.environ["CDC_CONFIG"] = str(self.config)

    def copy(self) -> None:
        say("Is everything ready for a mirror?")
        run("check")
        say("Then copy what is there.")
        run("copy")

    def mirror_under_load(self) -> None:
        say(f"Customers come: about {self.sizes.rate:.0f} transactions a second, and the daemon mirrors them.")
        with (
            shop.Workload(self.source.url("shop"), rate=self.sizes.rate) as customers,
            orders.Workload(self._mongodb_url, rate=self.sizes.rate / 2) as documents,
        ):
            pid = self.daemon.start()
            console.print(f"  Look at it, as long as it runs: http://{self._http}/")
            self._watch(customers)
            run("status")
            say("Now the power fails, for the daemon only. The customers do not notice.")
            console.print(f"[bold cyan]$ kill -9 {pid}")
            self.daemon.kill()
            self._let_buy(customers, self.sizes.seconds / 3)
            say("It starts again, and asks the mirror where they stopped.")
            self.daemon.start()
            self._watch(customers)
            run("status")
        done = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in customers.counts.most_common(5))
        say(f"The customers leave after {customers.transactions:,} transactions ({done} ...),")
        console.print(f"and after {documents.writes:,} writes to ordersDB.", style="bold")

    def verify(self) -> None:
        wait_until(self._caught_up, timeout_seconds=60, what="the copy of ordersDB to be caught up with")
        say("Are the databases equal? PostgreSQL's servers hash their own rows, MongoDB's documents are hashed here.")
        run("verify")

    def read_feed(self) -> None:
        say("And the feed, which applications poll: was every change told once, across the kill?")
        console.print(f"[bold cyan]$ curl {self._poll_url}?since=0")
        versions: Counter[tuple[str, str, str]] = Counter()
        states: dict[str, list[str]] = {}
        with console.status("reading the feed"):
            for change in self._changes():
                entity = (change["source"], change["entityType"], change["entityId"])
                versions[entity] += 1
                if change["version"] != versions[entity]:
                    raise DemoFailed(f"version {change['version']} of {entity} comes as number {versions[entity]}")
                if change["source"] == "orders" and change["after"] is not None:
                    states.setdefault(change["entityId"], []).append(str(change["after"].get("state")))
        steps = max(states.values(), key=len)
        console.print(
            f"  {versions.total():,} changes of {len(versions):,} entities, and of each entity every version once. The"
            f" document that changed most went {' > '.join(steps[:8])}{' > ...' if len(steps) > 8 else ''}"
        )

    def _changes(self) -> Iterator[Any]:
        """All that the feed has, page by page."""
        cursor, more = "0", True
        while more:
            with urllib.request.urlopen(f"{self._poll_url}?since={cursor}&limit=1000", timeout=10) as response:
                page = json.load(response)
            yield from page["changes"]
            cursor, more = page["cursor"], page["hasMore"]

    @property
    def _poll_url(self) -> str:
        return f"http://{self._http}/api/changes/poll"

    def sync(self) -> None:
        say("Somebody spoils an order on the mirror. Verify finds it, and that one order is synced by hand.")
        orders.spoil(self._mongodb_url)
        show("verify orders_backup")
        if not subprocess.run([CDC, "verify", "orders_backup"], stdin=subprocess.DEVNULL, check=False).returncode:
            raise DemoFailed("cdc verify did not notice it")
        run("sync", "orders_backup", f"{orders.DATABASE}.orders", "--where", '{"orderNo": "ORDER7"}')
        run("verify")

    def _caught_up(self) -> bool:
        status = json.loads(subprocess.run([CDC, "status", "--json"], capture_output=True, check=False).stdout)
        return bool(status["sinks"]["orders_backup"]["state"] == "running")

    def _watch(self, customers: shop.Workload) -> None:
        """Let customers move money about, and count it in the mirror all the while."""
        with self.source.connect("shop") as source, self.target.connect("shop") as target:
            total = shop.balance_total(source)
            looks = 0
            end = time.monotonic() + self.sizes.seconds
            while time.monotonic() < end:
                if (seen := shop.balance_total(target)) != total:
                    raise DemoFailed(f"the mirror shows balances of {seen} in sum, the shop always has {total}")
                looks += 1
                self._let_buy(customers, self.sizes.seconds / 20)
        console.print(
            f"  {customers.transactions:,} transactions so far. Money moves between customers all the time; each of"
            f" {looks} looks at the mirror found the same sum, {total:,}: no transaction is ever seen in half."
        )

    def _let_buy(self, customers: shop.Workload, seconds: float) -> None:
        with console.status(f"{customers.transactions:,} transactions"):
            time.sleep(seconds)


def main() -> int:
    """Run the demonstration and return its exit code."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is ended
    folder = Path(tempfile.mkdtemp(prefix="cdc-demo-"))
    folder.chmod(0o711)  # the servers of a kept demo live in it, perhaps under another user
    with ExitStack() as ending:
        if not options.keep:
            ending.callback(shutil.rmtree, folder, ignore_errors=True)
        demo = Demo(folder, SMALL if options.small else FULL, keep=options.keep)
        if not options.keep:
            ending.callback(demo.source.stop)
            ending.callback(demo.target.stop)
        ending.callback(demo.daemon.stop)
        mongodb = ending.enter_context(mongodb_url())
        return _perform(demo, mongodb, keep=options.keep)


def _perform(demo: Demo, mongodb: tuple[str, str], *, keep: bool) -> int:
    started = time.monotonic()
    try:
        demo.start_servers()
        demo.use_mongodb(*mongodb)
        demo.fill_shop()
        demo.write_config()
        demo.copy()
        demo.mirror_under_load()
        demo.verify()
        demo.read_feed()
        demo.sync()
    except (DemoFailed, TimeoutError) as exc:
        console.print(f"\nThe demo failed: {exc}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if keep:
            _say_what_stays(demo)
    console.print(f"\n[bold green]Equal.[/] {time.monotonic() - started:.0f} seconds, and nothing was lost.")
    return 0


def _say_what_stays(demo: Demo) -> None:
    servers = [server for server in (demo.source, demo.target) if server.running]
    say("The servers stay; the daemon can be started again.")
    console.print(*(server.url("shop") for server in servers), str(demo.config), sep="\n", soft_wrap=True)
    console.print(f"To end them: kill -INT {' '.join(str(server.pid) for server in servers)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--small", action="store_true", help="few rows, a few seconds")
    parser.add_argument("--keep", action="store_true", help="leave the PostgreSQL servers running, say where they are")
    return parser


def show(name: str, suffix: str = "") -> None:
    """Print a command as its user would type it."""
    console.print(f"[bold cyan]$ cdc {name}{suffix}")


def run(name: str, *arguments: str) -> None:
    """Run a `cdc` command in sight; `DemoFailed` if it says that something is wrong."""
    show(shlex.join([name, *arguments]))
    done = subprocess.run([CDC, name, *arguments], stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise DemoFailed(f"cdc {name} ended with exit code {done.returncode}")


def say(text: str) -> None:
    """Tell what comes next."""
    console.print()
    console.print(text, style="bold")


if __name__ == "__main__":
    sys.exit(main())
