"""What `cdc init` makes: a configuration, as little as is needed and mostly without passwords, and scripts."""

from __future__ import annotations

import json
from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

import msgspec

from cdc.errors import ConfigError
from cdc.urls import KINDS, MONGODB, kind_of

Secrets = Literal["environment", "file"]


class Script(NamedTuple):
    """What an administrator has to run, and where: a database's url."""

    url: str
    text: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What was answered.

    url, mirror_url: as an administrator connects; `mirror_url` empty: what follows from the source's. tables: globs.
    role: whom the daemon connects as; empty: as in the urls, passwords included.
    secrets: from where the role's password comes: environment variables, or files that hold whole urls.
    """

    name: str
    url: str
    mirror_url: str = ""
    tables: tuple[str, ...] = ()
    role: str = ""
    secrets: Secrets = "environment"
    data_dir: str = "/var/lib/cdc"
    feed: bool = False

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what is no URL."""
        for url in filter(None, (self.url, self.mirror_url)):
            if "://" not in url or kind_of(url) is None:
                raise ConfigError(
                    "not the url of a database", hint=f"one of: {', '.join(f'{each}://' for each in KINDS)}"
                )

    @property
    def as_administrator(self) -> Wanted:
        """The same, with the urls as they were given: to look with, and there is nothing to look at of a feed."""
        return msgspec.structs.replace(self, role="", feed=False)

    @property
    def mirror_name(self) -> str:
        """Of the sink, which must not be called as its source."""
        return "mirror" if self.name != "mirror" else "backup"

    @property
    def feed_name(self) -> str:
        """Likewise."""
        return "changes" if self.name != "changes" else "feed"


def text(wanted: Wanted) -> str:
    """The file."""
    parts = [
        "# Written by `cdc init`; docs/configuration.md tells of every option.",
        f"\n[daemon]\ndata_dir = {_quoted(wanted.data_dir)}",
        f"\n[sources.{wanted.name}]\n{_url(wanted, wanted.name, wanted.url)}",
    ]
    if wanted.tables:
        parts.append(f"\n[sources.{wanted.name}.tables]\ninclude = {json.dumps(wanted.tables)}")
    parts.append(f'\n[sinks.{wanted.mirror_name}]\nfrom = "{wanted.name}"')
    if wanted.mirror_url:
        parts.append(_url(wanted, wanted.mirror_name, wanted.mirror_url))
    else:
        parts.append("# the same server and role; the database's name with _backup behind it")
    if wanted.feed:
        parts.append(f'\n[sinks.{wanted.feed_name}]\nkind = "data_changes"\nfrom = "{wanted.name}"')
    return "\n".join(parts) + "\n"


def secrets(wanted: Wanted) -> list[str]:
    """What has to be done before the daemon finds its passwords, a line each."""
    if not wanted.role:
        return []
    urls = {wanted.name: wanted.url} | ({wanted.mirror_name: wanted.mirror_url} if wanted.mirror_url else {})
    if wanted.secrets == "file":
        return [f"write {as_role(url, wanted.role, 'PASSWORD')} into {_file(name)}" for name, url in urls.items()]
    return [f"export {_variable(name)}=...  # special characters as %XX" for name in urls]


def as_role(url: str, role: str, password: str) -> str:
    """The URL for another user. password: as it stands in the result."""
    parts = urlsplit(url)
    query = parts.query
    if kind_of(url) == MONGODB and "authsource" not in {name.lower() for name, _ in parse_qsl(query)}:
        query = "&".join(filter(None, (query, "authSource=admin")))  # where `cdc init` makes users
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(role, safe='')}:{password}@{host}", query=query))


def _url(wanted: Wanted, name: str, url: str) -> str:
    """The option of a source or a sink that leads to its database. `$` is the file's own sign."""
    if not wanted.role:
        return f"url = {_quoted(url)}"
    if wanted.secrets == "file":
        return f"url_file = {_quoted(_file(name))}"
    return f"url = {json.dumps(as_role(url.replace('$', '$$'), wanted.role, '${' + _variable(name) + '}'))}"


def _variable(name: str) -> str:
    return f"{name.upper()}_PASSWORD"


def _file(name: str) -> str:
    return f"/etc/cdc/{name}_url"


def _quoted(value: str) -> str:
    return json.dumps(value.replace("$", "$$"))
