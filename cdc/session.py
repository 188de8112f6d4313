"""What a command works with: the configuration, and a running daemon or its data directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import msgspec

from cdc import kinds, logs
from cdc.api.client import Client, DaemonSilent, DaemonUnreachable
from cdc.barrier import Barrier, HttpBarrier, NoBarrier
from cdc.config import Config, SinkConfig, SourceConfig
from cdc.directory import DirectoryLock, lock_directory, owner_of, read_address
from cdc.errors import CdcError, DirectoryInUse, FatalError
from cdc.kinds import build_source
from cdc.letter import DeadLetters
from cdc.mirroring import Mirroring
from cdc.offline import letters_on_disk, offline_status, opened_letters
from cdc.position import SourcePosition, parse_position
from cdc.sink import Sink
from cdc.status import DaemonStatus

_DOWN: Final = "the daemon is not running"
_START: Final = "start it with `cdc run`"
_ASTRAY: Final = (
    "cdc answers at %s: if it is a daemon whose data directory was removed, end its process, and start it anew"
)


class Session:
    """What a command works with; the configuration is read when it is first needed."""

    def __init__(
        self, load: Callable[[], Config], build_sink: Callable[[Config, SinkConfig], Sink], *, debug: bool
    ) -> None:
        self._load = load
        self._build_sink = build_sink
        self._debug = debug
        self._config: Config | None = None

    @property
    def config(self) -> Config:
        """The checked configuration."""
        if self._config is None:
            self._config = self.reload()
        return self._config

    def reload(self) -> Config:
        """Read the configuration again. Raises `ConfigError`."""
        config = self._load()
        if self._debug:
            config = msgspec.structs.replace(config, daemon=msgspec.structs.replace(config.daemon, log_level="debug"))
        return config

    @property
    def data_dir(self) -> Path:
        """Where queues, lock and address file are."""
        return Path(self.config.daemon.data_dir)

    def log_as_configured(self) -> None:
        """For commands that run for long."""
        options = self.config.daemon
        logs.configure(options.log_format, options.log_level)

    def sinks(self, name: str | None) -> list[SinkConfig]:
        """One sink by name, or all. Raises `FatalError` for an unknown one."""
        if name is None:
            return list(self.config.sinks.values())
        if name not in self.config.sinks:
            raise FatalError(f"no sink is called {name!r}", hint=f"one of: {', '.join(self.config.sinks) or 'none'}")
        return [self.config.sinks[name]]

    def source(self, name: str | None) -> SourceConfig:
        """One source by name, or the only one. Raises `FatalError` for an unknown one."""
        sources = self.config.sources
        if name is None and len(sources) == 1:
            return next(iter(sources.values()))
        if name not in sources:
            raise FatalError(
                "there are several sources" if name is None else f"no source is called {name!r}",
                hint=f"name one of: {', '.join(sources)}",
            )
        return sources[name]

    def mirrors(self, name: str | None) -> list[SinkConfig]:
        """One mirror by name, or all. Raises `FatalError` for a sink that is none."""
        chosen = self.sinks(name)
        if name is not None and not chosen[0].is_mirror:
            raise FatalError(f"{name} is no mirror, but a sink of kind {chosen[0].kind}", hint="name a mirror")
        return [sink for sink in chosen if sink.is_mirror]

    def build_sink(self, sink: SinkConfig) -> Sink:
        """The sink itself, not yet open."""
        return self._build_sink(self.config, sink)

    def client(self) -> Client:
        """The running daemon, which answers.

        Raises `DaemonUnreachable` where there is none, `DaemonSilent` where it hangs, and `FatalError` where nobody can
        tell.
        """
        try:
            address = read_address(self.data_dir)
        except PermissionError as exc:
            raise FatalError(
                f"cannot look into the data directory {self.data_dir}: {exc.strerror}",
                hint="run this as the daemon's user",
            ) from exc
        except OSError as exc:
            if (astray := self._without_directory()) is not None:
                return astray
            raise DaemonUnreachable(_DOWN, hint=_START) from exc
        client = Client(address.url, self.config.http.admin_token, address.certificate)
        try:
            client.greet()
        except DaemonSilent as exc:
            if (owner := owner_of(self.data_dir)) is None:  # the address is that of a daemon that was killed
                raise DaemonUnreachable(_DOWN, hint=_START) from exc
            raise DaemonSilent(f"the daemon (process {owner}) does not answer", hint=exc.hint) from exc
        return client

    def _without_directory(self) -> Client | None:
        """A daemon of this configuration whose data directory was removed: it listens where it is to.

        It is asked without the token, since anybody may listen there. Raises `DaemonUnreachable` where it wants one.
        """
        address = self.config.http.address
        client = Client(f"http://{address}")
        if self.config.http.host_and_port[1] == 0 or owner_of(self.data_dir) is not None or not client.is_cdc():
            return None
        try:
            found = client.status()
        except DaemonSilent:
            return None
        except CdcError as exc:
            raise DaemonUnreachable(f"nothing in {self.data_dir} tells of a daemon", hint=_ASTRAY % address) from exc
        ours = set(found.sources) == set(self.config.sources) and set(found.sinks) == set(self.config.sinks)
        return client if ours else None

    def status(self) -> DaemonStatus:
        """From the daemon, or from the data directory where it is down."""
        try:
            return self.client().status()
        except DaemonUnreachable:
            return offline_status(self.config)

    def lock(self) -> DirectoryLock:
        """Keep the daemon out meanwhile. Raises `DirectoryInUse` where it runs."""
        try:
            return lock_directory(self.data_dir)
        except DirectoryInUse as exc:
            raise DirectoryInUse(str(exc), hint="stop the daemon first") from exc

    @contextmanager
    def alone_or_beside_daemon(self) -> Iterator[None]:
        """Keep a daemon from starting meanwhile, unless one runs: then it keeps the order."""
        with self.lock() if self._running_client() is None else nullcontext():
            yield

    def dead_letters(self) -> DeadLetters:
        """To look at: the running daemon's, or what the data directory tells where it is down."""
        client = self._running_client()
        return letters_on_disk(self.config) if client is None else client.dead_letters

    @contextmanager
    def changing_dead_letters(self) -> Iterator[DeadLetters]:
        """The same to act on; where no daemon runs, it is kept out meanwhile."""
        client = self._running_client()
        if client is not None:
            yield client.dead_letters
            return
        with self.lock(), opened_letters(self.config) as found:
            yield found

    def _running_client(self) -> Client | None:
        try:
            client = self.client()
            client.status()
        except DaemonUnreachable:
            return None
        return client

    def barrier(self, sink: SinkConfig) -> Barrier:
        """Makes the sink stand still: by way of the daemon, or by itself where none runs."""
        client = self._running_client()
        if client is None:
            return NoBarrier(lambda: kinds.pair(sink.kind).stored_position(sink))
        token = self.config.http.admin_token
        return HttpBarrier(client.url, sink.name, token.reveal() if token else None, client.certificate)

    def mirroring(self, sink: SinkConfig) -> Mirroring:
        """A source and its mirror, as the commands that compare them need them."""
        source = self.config.sources[sink.source]
        barrier = self.barrier(sink)

        def position() -> SourcePosition | None:
            text = self.client().status().sinks[sink.name].position
            return None if text is None else parse_position(text)

        return Mirroring(
            source=source,
            sink=sink,
            tables=build_source(self.config, source, NoFacts()).tables,
            barrier=barrier,
            position=None if isinstance(barrier, NoBarrier) else position,
        )


class NoFacts:
    """For sources that are only asked, not streamed from."""

    def get(self, _key: str) -> None:
        """Nothing is known."""

    def set(self, _key: str, _value: str | None) -> None:
        """Nothing is kept."""
