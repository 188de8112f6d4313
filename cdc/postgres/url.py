"""What stands in a connection string: found wrong here, before libpq is asked to connect, and never quoted."""

from __future__ import annotations

import re
import socket
from typing import Any, Final

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from cdc.errors import FatalError

ESCAPED: Final = "in user and password, special characters are written as %XX"
OPTION_HINT: Final = f"correct that option, behind the `?` of the url; {ESCAPED}"
PORT_HINT: Final = f"a port is a number from 1 to 65535, behind the host (`host:5432`) or `port=` its own; {ESCAPED}"
ADDRESS_HINT: Final = "hostaddr takes IP addresses, one for each host; names belong into `host`"

_NUMBERS: Final = (
    "connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
)  # fmt: skip


def parsed(url: str) -> dict[str, Any]:
    """A connection string's parameters, as libpq takes it apart; ports, addresses and numbers are what they must be.

    Raises `FatalError` without a value: where a special character was not escaped, it is a piece of a password.
    """
    try:
        given = conninfo_to_dict(url)
    except ProgrammingError as exc:
        unknown = re.search(r'invalid URI query parameter: "(\w+)"', str(exc))
        # with an @ behind it, that may be a password's own question mark
        if unknown is not None and "@" not in url.partition("?")[2]:
            raise FatalError(f"the url has an unknown option: {unknown[1]}", hint=OPTION_HINT) from None
        raise FatalError("the url cannot be read", hint="special characters are written as %XX") from None
    _check_hosts(given)
    for option in _NUMBERS:
        if not _is_number(str(given.get(option) or 0)):
            raise FatalError(f"option {option} of the url is no whole number", hint=OPTION_HINT)
    return given


def _check_hosts(given: dict[str, Any]) -> None:
    """What libpq finds out only when it connects (PostgreSQL manual, 34.1.1.3: several hosts)."""
    hosts, addresses, ports = (str(given.get(name) or "").split(",") for name in ("host", "hostaddr", "port"))
    if not all(_is_number(port or "1") and 1 <= int(port or "1") <= 65535 for port in ports):
        raise FatalError("the url has an invalid port", hint=PORT_HINT)
    if not all(map(_is_address, filter(None, addresses))):
        raise FatalError("hostaddr of the url is no IP address", hint=ADDRESS_HINT)
    if given.get("host") and given.get("hostaddr") and len(hosts) != len(addresses):
        raise FatalError("the url has not as many hostaddr as hosts", hint=ADDRESS_HINT)
    if (given.get("host") or given.get("hostaddr")) and len(ports) not in {1, max(len(hosts), len(addresses))}:
        raise FatalError("the url has not as many ports as hosts", hint="one port for each host, or one for all")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", text) is not None


def _is_address(text: str) -> bool:
    """As libpq itself looks, which asks no DNS for it."""
    try:
        socket.getaddrinfo(text, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True
