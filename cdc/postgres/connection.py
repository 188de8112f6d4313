"""Connections to PostgreSQL: fixed session settings, and errors sorted into `cdc.errors`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.abc import RV, PQGen
from psycopg.conninfo import make_conninfo

from cdc.errors import CdcError, FatalError, PermanentError, TransientError
from cdc.postgres.url import ADDRESS_HINT, OPTION_HINT, PORT_HINT, parsed
from cdc.pulse import elsewhere

Connection = psycopg.Connection[Any]

SESSION_SETTINGS: Final = {
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "timezone": "UTC",
    "client_encoding": "UTF8",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "row_security": "off",
    "search_path": "",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
"""Sent with every connection, so that a value's text never depends on a role's or a database's defaults.

`row_security = off` makes a filtered read an error instead of half a table.
"""

_LATER_TIMEOUTS: Final = {"idle_session_timeout": 140000, "transaction_timeout": 170000}
"""Time-outs that older servers do not know, and would refuse to connect with; each with the first version that does."""

_TRANSIENT_CLASSES: Final = ("08", "53", "57P", "40", "58")
"""Connection, resources, operator intervention, rollback (deadlock, serialization), system error."""

_LOCK_NOT_AVAILABLE: Final = "55P03"

_TRANSIENT_STATES: Final = frozenset({_LOCK_NOT_AVAILABLE, "55006", "25006", "57014"})
"""lock_not_available, object_in_use, read_only_sql_transaction (a demoted primary), query_canceled."""

_PERMANENT_CLASSES: Final = ("21", "22", "23", "42", "0A", "44", "54", "55", "P0")
"""Cardinality, data, constraint, syntax or access rule, unsupported, check option, limits, state, PL/pgSQL."""

_LOCK_HINT: Final = "somebody holds a lock on it for long: pg_locks and pg_stat_activity tell who"

_FATAL_HINTS: Final = {
    "28": "check user, password and the server's pg_hba.conf; `cdc resume NAME` takes a new password of the url or its "
    "url_file",
    "3D": "create the database, or correct its name in the url",
    "42501": "grant the missing privilege; `cdc check` lists what is needed",
}

_STARTUP_HINTS: Final = {
    r"no encryption": "the server lets this user in with TLS only: sslmode=verify-full in the url",
    r"no password supplied": "give a password in the url, or a passfile that is there, has a line for this server and "
    "user, and cannot be read by others (chmod 600)",
    r"password authentication failed|pg_hba\.conf|role \".*\" does not exist": _FATAL_HINTS["28"],
    r"database \".*\" does not exist": _FATAL_HINTS["3D"],
    r"start WAL ?sender": "ALTER ROLE ... REPLICATION, for the user of the url",
    r"certificate|private key|support SSL|alert (unknown ca|handshake failure|protocol version)": "check sslmode, "
    "sslrootcert, sslcert and sslkey of the url, and until when the certificates are valid",
    r"invalid \"?\w+\"? value|weak sslmode": OPTION_HINT,
    r"invalid port number|could not match \d+ port": PORT_HINT,
    r"of hostaddr|could not match \d+ host": ADDRESS_HINT,
    r"unsupported startup parameter": "the url leads to a connection pooler: connect to the server itself",
}
"""A failed connection attempt carries no SQLSTATE through libpq: these texts mean that trying again is in vain."""


class _Connection(Connection):
    """Its thread waits for a server, and does not hang: an index takes hours, a lock as long as who holds it wants."""

    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        with elsewhere():
            return super().wait(gen, *args, **kwargs)


def connect(url: str, *, application_name: str = "cdc", replication: bool = False, **settings: str) -> Connection:
    """Open a connection in autocommit mode whose session settings are fixed. Raises `CdcError` by the kind of failure.

    replication: a walsender of the url's database (only the simple query protocol works there).
    settings: more session settings, or others than `SESSION_SETTINGS`.
    """
    extra: dict[str, Any] = {"replication": "database"} if replication else {}
    with translated_errors():
        conninfo, arguments = connect_arguments(url, application_name, **settings)
        with elsewhere():
            connection = _Connection.connect(conninfo, **arguments, **extra)
        try:
            lift_later_timeouts(connection)
        except psycopg.Error:
            connection.close()
            raise
    return connection


def connect_arguments(url: str, application_name: str, **settings: str) -> tuple[str, dict[str, Any]]:
    """What `connect` gives to psycopg, for a pool of such connections (to be configured by `lift_later_timeouts`)."""
    options = " ".join(f"-c {name}={_escape(value)}" for name, value in (SESSION_SETTINGS | settings).items())
    given = parsed(url)
    return make_conninfo(url), {
        "autocommit": True,
        "options": f"{given['options']} {options}" if given.get("options") else options,
        "application_name": application_name,
        "connect_timeout": int(given.get("connect_timeout") or 10),
        "keepalives_idle": int(given.get("keepalives_idle") or 30),
        "keepalives_interval": int(given.get("keepalives_interval") or 10),
        "keepalives_count": int(given.get("keepalives_count") or 3),
        "prepare_threshold": None,
    }


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn psycopg's errors into `CdcError`s."""
    try:
        yield
    except psycopg.Error as exc:
        raise to_cdc_error(exc) from exc


def table_exists(connection: Connection, relation: str) -> bool:
    """Whether there is such a table. relation: its name, as SQL has it."""
    ((found,),) = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [relation]).fetchall()
    return bool(found)


@contextmanager
def while_doing(what: str) -> Iterator[None]:
    """Turn psycopg's errors into `CdcError`s that say what was being done."""
    try:
        with translated_errors():
            yield
    except CdcError as exc:
        raise type(exc)(f"{what}: {exc}", hint=exc.hint) from exc


def to_cdc_error(error: psycopg.Error) -> CdcError:
    """Sort by SQLSTATE (PostgreSQL manual, appendix A); without one, the connection was lost or never made."""
    # the primary message only: DETAIL and CONTEXT quote row values
    text = " ".join((error.diag.message_primary or str(error)).split()) or type(error).__name__
    # what libpq finds wrong by itself has no SQLSTATE: no answer, or one that is no message ("lost synchronization")
    lost = isinstance(error, psycopg.OperationalError) or error.pgresult is not None
    return sorted_error(error.sqlstate, text, connection_lost=lost)


def result_error(result: pq.abc.PGresult) -> CdcError:
    """The error that a result of libpq carries."""
    state = result.error_field(pq.DiagnosticField.SQLSTATE)
    primary = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message
    detail = result.error_field(pq.DiagnosticField.MESSAGE_DETAIL)
    text = " ".join(primary.decode("utf-8", "replace").split())
    # DETAIL quotes row values ("Key (email)=(a@b.c) already exists"): it belongs to the dead letter, not to a log
    error = sorted_error(state.decode() if state else None, text, connection_lost=state is None)
    if detail:
        error.add_note(detail.decode("utf-8", "replace"))
    return error


def sorted_error(state: str | None, text: str, *, connection_lost: bool) -> CdcError:
    """The `CdcError` of an SQLSTATE."""
    if state is None:
        # the value may be a piece of a password whose @ or : was not written as %XX
        text = re.sub(r'(invalid \S+ value|invalid port number):? ".*?"(?= for |$)', r"\1", text)
        text = re.sub(r'(could not parse network address) ".*?"(?=: )', r"\1 of hostaddr", text)
        for pattern, hint in _STARTUP_HINTS.items():
            if re.search(pattern, text, re.IGNORECASE):
                return FatalError(text, hint=hint)
        if connection_lost:
            return TransientError(text, hint="is the server running, and reachable from here?")
        return FatalError(text)
    for prefix, hint in _FATAL_HINTS.items():
        if state.startswith(prefix):
            return FatalError(f"{text} ({state})", hint=hint)
    if state in _TRANSIENT_STATES or state.startswith(_TRANSIENT_CLASSES):
        return TransientError(f"{text} ({state})", hint=_LOCK_HINT if state == _LOCK_NOT_AVAILABLE else "")
    if state.startswith(_PERMANENT_CLASSES):
        return PermanentError(f"{text} ({state})")
    return FatalError(f"{text} ({state})")


def lift_later_timeouts(connection: Connection) -> None:
    """Switch off the time-outs that only newer servers know."""
    version = connection.info.server_version
    known = [name for name, since in _LATER_TIMEOUTS.items() if version >= since]
    if known:
        connection.execute("; ".join(f"SET {name} = 0" for name in known).encode())


def _escape(value: str) -> str:
    """Quote for libpq's `options`: backslash escapes blanks and itself; an empty value needs nothing."""
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
