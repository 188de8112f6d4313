"""Connection URLs, as far as the configuration has to understand them; nothing here connects or asks DNS."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

POSTGRES: Final = "postgres"
MONGODB: Final = "mongodb"

KINDS: Final = {"postgresql": POSTGRES, "postgres": POSTGRES, "mongodb": MONGODB, "mongodb+srv": MONGODB}
"""The kind of a database by the scheme of its URL: also the name of its folder below `cdc`, and of its sink's file."""


def kind_of(url: str) -> str | None:
    """The kind of the database that an URL leads to; libpq's `name=value` form has no scheme. `None`: unknown."""
    scheme, found, _ = url.partition("://")
    return KINDS.get(scheme.lower()) if found else POSTGRES


def database_of(url: str) -> str | None:
    """The database that an URL names, if it does; MongoDB's `admin` only says where users are kept."""
    try:
        name = unquote(urlsplit(url).path.lstrip("/"))
    except ValueError:
        return None
    return None if not name or (name == "admin" and kind_of(url) == MONGODB) else name


def with_database(url: str, name: str) -> str:
    """The same server's URL, of another database; what names none in its path stays as it is."""
    return url if database_of(url) is None else urlunsplit(urlsplit(url)._replace(path=f"/{quote(name, safe='')}"))


def hosts_of(url: str) -> frozenset[str]:
    """The hosts that an URL names, with their ports; all ways to write this machine's own are one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return frozenset()
    default = {"mongodb": ":27017", "postgres": ":5432", "postgresql": ":5432"}.get(parts.scheme, "")
    hosts = (host.lower() for host in parts.netloc.rpartition("@")[2].split(",") if host)
    with_ports = (host if re.search(r":\d+$", host) else host + default for host in hosts)
    return frozenset(re.sub(r"^(localhost|127\.[\d.]+|\[::1\])(?=:|$)", "localhost", host) for host in with_ports)


def same_postgres_database(one: str, other: str) -> bool:
    """Whether two connection strings, of whatever form, name one database of one server."""
    places, others = _postgres_places(one), _postgres_places(other)
    return bool(places & others)


def _postgres_places(url: str) -> frozenset[tuple[str, str, str]]:
    """Hosts, with port and database: as libpq takes them, which is not always where an URL has them."""
    from psycopg import ProgrammingError  # noqa: PLC0415 - libpq is loaded only for those who have PostgreSQL
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    try:
        found = {name: str(value) for name, value in conninfo_to_dict(url).items() if value}
    except ProgrammingError:
        return frozenset()
    ports = found.get("port", "5432").split(",")
    database = found.get("dbname", found.get("user", ""))
    places = set()
    for number, host in enumerate(found.get("host", found.get("hostaddr", "")).lower().split(",")):
        # a socket, of whatever folder, is this machine's
        own = not host or host.startswith(("/", "@")) or re.fullmatch(r"localhost|127\.[\d.]+|::1", host)
        places.add(("localhost" if own else host, ports[number % len(ports)] or "5432", database))
    return frozenset(places)


def backup_of(url: str) -> str | None:
    """The URL with `_backup` behind the database name; `None` where it names none. Raises `ValueError`."""
    parts = urlsplit(url)
    if not parts.scheme or database_of(url) is None:
        return None
    path = parts.path.lstrip("/")
    query = parts.query
    given = {name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)}
    if kind_of(url) == MONGODB and "@" in parts.netloc and "authsource" not in given:
        # users are looked up in the database of the path, unless told otherwise
        query = f"{query}&authSource={path}" if query else f"authSource={path}"
    return urlunsplit(parts._replace(path=f"/{path}_backup", query=query))


def redact(url: str) -> str:
    """The URL without its password and without query values that may hold one."""
    if "://" not in url:
        return re.sub(r"((?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'|\S+)", r"\1***", url, flags=re.IGNORECASE)
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    user, at, host = parts.netloc.rpartition("@")
    if ":" in user:
        user = user.partition(":")[0] + ":***"
    query = re.sub(r"((?:^|&)[^=&]*(?:password|secret|token)[^=&]*=)[^&]*", r"\1***", parts.query, flags=re.IGNORECASE)
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query=query))
