"""`python -m tests.mongod`: the stand-in as a process of its own. Prints its port once it accepts connections."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import ssl

from .server import Server, exit_with_parent
from .state import Settings, State
from .versions import VERSIONS, Version


def main() -> None:
    """Serve until killed, or until standard input, if it is a pipe, is closed."""
    options = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING)
    exit_with_parent()
    gc.set_threshold(200_000, 20, 100)  # hundreds of thousands of documents live for long and contain no cycles
    settings = Settings(
        version=Version(options.version),
        standalone=options.standalone,
        oplog_size=options.oplog_size,
        max_event_bytes=options.max_event_bytes,
        noop_seconds=options.noop_seconds,
        set_name=options.set_name,
    )
    server = Server(State(settings), options.port, _tls(options))
    asyncio.run(server.run(lambda port: print(port, flush=True)))


def _tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    if options.tls_certificate_key_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.tls_certificate_key_file)
    if options.tls_ca_file is not None:
        context.load_verify_locations(options.tls_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mongod", description="A stand-in for MongoDB, for tests only."
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; always on 127.0.0.1")
    parser.add_argument("--version", choices=VERSIONS, default="7.0", help="of the server that is emulated")
    parser.add_argument("--standalone", action="store_true", help="no replica set, and so no change streams")
    parser.add_argument("--set-name", default="rs0", help="name of the replica set")
    parser.add_argument("--oplog-size", type=int, default=1_000_000, help="entries kept")
    parser.add_argument("--max-event-bytes", type=int, default=Settings(Version("7.0")).max_event_bytes)
    parser.add_argument(
        "--noop-seconds", type=float, default=10.0, help="how often an idle oplog advances; 0 for never"
    )
    parser.add_argument("--tls-certificate-key-file", help="TLS alone, by this certificate and its key, in one file")
    parser.add_argument("--tls-ca-file", help="clients must show a certificate of this authority")
    parser.add_argument("--no-persist", action="store_true", help="the default: everything is in memory")
    return parser


if __name__ == "__main__":
    main()
