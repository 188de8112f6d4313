"""`cdc init`: from nothing to a configuration and a role for it; and what only an administrator may install."""

from __future__ import annotations

import re
import tomllib
from glob import escape
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console

from cdc import config_file, first_config, kinds, preflight
from cdc.config import Config, SourceConfig, TableGlobs
from cdc.config_rules import check_url
from cdc.errors import ConfigError, FatalError
from cdc.first_config import Secrets, Wanted
from cdc.secret import Secret
from cdc.session import NoFacts, Session
from cdc.urls import POSTGRES, database_of, kind_of, redact

app = typer.Typer()

err: Final = Console(stderr=True)
"""For people; what an administrator has to run goes to standard output."""

Flag = typer.Option

_OWN_SCHEMA: Final = "cdc"
"""Of a database that is, or was, a mirror."""

_MOST_NAMED: Final = 10
"""Tables, in a hint."""


@app.command()
def init(
    context: typer.Context,
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="For --ddl-capture; the only one, if left out.")
    ] = None,
    *,
    url: Annotated[
        str, Flag(envvar="CDC_URL", help="Of the database to capture, as an administrator connects. Else it is asked.")
    ] = "",
    mirror_url: Annotated[
        str, Flag(envvar="CDC_MIRROR_URL", help="Of the mirror. By default NAME_backup, on the same server.")
    ] = "",
    name: Annotated[str, Flag(help="Of the source, in the configuration. By default as the database.")] = "",
    tables: Annotated[list[str] | None, Flag(help="Globs over schema.table, or database.collection.")] = None,
    role: Annotated[str, Flag(help="Whom the daemon connects as. Empty: as in the urls, passwords and all.")] = "cdc",
    secrets: Annotated[Secrets, Flag(help="Where the role's passwords come from.")] = "environment",
    data_dir: Annotated[str, Flag(help="Where queue, state and lock are to live.")] = "/var/lib/cdc",
    feed: Annotated[bool, Flag("--feed", help="Also keep a feed of changes, for applications.")] = False,
    force: Annotated[bool, Flag("--force", help="Write over the configuration that is there.")] = False,
    ddl_capture: Annotated[
        bool, Flag("--ddl-capture", help="Instead: let a configured source tell of each DDL, by event triggers.")
    ] = False,
    remove: Annotated[bool, Flag("--remove", help="With --ddl-capture: remove them.")] = False,
    print_only: Annotated[
        bool, Flag("--print", help="With --ddl-capture: only print the SQL, for a superuser.")
    ] = False,
) -> None:
    """Look at a database, write a configuration, and print what makes a role that may do what it must, and no more."""
    if ddl_capture:
        _capture_ddl(context.ensure_object(Session), source, remove=remove, print_only=print_only)
        return
    file = Path(context.find_root().params["config"])
    if file.exists() and not force:
        raise FatalError(f"{file} is there already", hint="--force writes over it, --config names another file")
    given = Wanted(
        url=url or typer.prompt("URL of the database to capture, as an administrator connects", err=True),
        mirror_url=mirror_url,
        name=name,
        tables=tuple(tables or ()),
        role=role,
        secrets=secrets,
        data_dir=data_dir,
        feed=feed,
    )
    _begin(file, _completed(given) if url else _asked(_completed(given)))


def _completed(given: Wanted) -> Wanted:
    """What was left out, by a look at the database."""
    for option, url in (("--url", given.url), ("--mirror-url", given.mirror_url)):
        if url:
            check_url(option, Secret(url))
    kind = str(kind_of(given.url))
    contents = kinds.onboarding(kind).contents(given.url)
    for schema, count in contents.items():
        err.print(f"found {schema}, {count} {'tables' if kind == POSTGRES else 'collections'}", highlight=False)
    tables = given.tables
    if not tables and kind == POSTGRES:  # for MongoDB, what the url leads to is the default
        tables = tuple(f"{escape(schema)}.*" for schema in contents if schema != _OWN_SCHEMA) or ("public.*",)
    return msgspec.structs.replace(given, tables=tables, name=given.name or _name_for(given.url))


def _name_for(url: str) -> str:
    """What a source may be called (`cdc.config.Identifier`), by its database."""
    name = re.sub(r"[^a-z0-9_]", "_", (database_of(url) or "source").lower())[:40]
    return name if name[0].isalpha() else f"db_{name}"[:40]


def _asked(wanted: Wanted) -> Wanted:
    """The same, as somebody answers who presses Enter where it is right."""

    def ask(question: str, default: str) -> str:
        return str(typer.prompt(question, default=default, show_default=bool(default), err=True))

    tables = ask("Tables, as globs with a space between them", " ".join(wanted.tables))
    return msgspec.structs.replace(
        wanted,
        name=ask("What the source is to be called", wanted.name),
        tables=tuple(tables.split()),
        mirror_url=ask("URL of the mirror (nothing: NAME_backup on the same server)", wanted.mirror_url),
        role=ask("Role that the daemon connects as", wanted.role),
        data_dir=ask("Folder for queue, state and lock", wanted.data_dir),
        feed=typer.confirm("Also keep a feed of changes, for applications?", wanted.feed, err=True),
    )


def _begin(file: Path, wanted: Wanted) -> None:
    """Show what the databases are like, print the scripts, write the file."""
    config = config_file.parse(tomllib.loads(first_config.text(wanted.as_administrator)), {})
    ((name, source),) = config.sources.items()
    ((mirror, sink),) = config.sinks.items()
    _check_tables(config, source)
    checks = kinds.preflight(source.kind)
    sections = [
        preflight.collect(f"source {name}", checks.check_source(config, source)),
        preflight.collect(f"sink {mirror}", checks.check_sink(config, sink)),
    ]
    err.print(preflight.render(sections))
    if wanted.role:
        onboarding, comment = kinds.onboarding(source.kind), "--" if source.kind == POSTGRES else "//"
        scripts = onboarding.source_role(config, source, wanted.role), onboarding.mirror_role(sink, wanted.role)
        for url, text in scripts:
            print(f"{comment} for an administrator, at {redact(url)}\n{text}")
    _write(file, first_config.text(wanted), private=not wanted.role)
    _tell_what_is_next(file, wanted)


def _check_tables(config: Config, source: SourceConfig) -> None:
    """Raises `ConfigError` where the globs match nothing of what is there. Of an empty database they need not."""
    everything = msgspec.structs.replace(source, tables=TableGlobs(include=("*",)))
    found = kinds.build_source(config, everything, NoFacts()).tables()
    there = [table for table in found if table.schema != _OWN_SCHEMA]
    if there and not any(map(source.tables.match, there)):
        more = [f"{len(there) - _MOST_NAMED} more"] if len(there) > _MOST_NAMED else []
        named = ", ".join([*map(str, there[:_MOST_NAMED]), *more])
        one, form = ("table", "schema.table") if source.kind == POSTGRES else ("collection", "database.collection")
        raise ConfigError(
            f"no {one} matches {', '.join(source.tables.include)}",
            hint=f"there are {named}; --tables takes globs over {form}, in which case counts",
        )


def _write(file: Path, text: str, *, private: bool) -> None:
    """At once or not at all. private: it holds passwords."""
    partial = file.with_name(f"{file.name}.new")
    try:
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600 if private else 0o644)
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as exc:
        raise FatalError(f"{file}: {exc.strerror or exc}", hint="--config names another file") from exc


def _tell_what_is_next(file: Path, wanted: Wanted) -> None:
    steps = ["look through it", *first_config.secrets(wanted), f"cdc --config {file} check", f"cdc --config {file} run"]
    if wanted.role:
        steps.insert(0, f"have an administrator run the statements above, and set the password of {wanted.role}")
    err.print(f"\n{file} is written. Next:", *(f"  {step}" for step in steps), sep="\n", highlight=False, markup=False)


def _capture_ddl(session: Session, source: str | None, *, remove: bool, print_only: bool) -> None:
    """Install event triggers, or remove them. Everything works without them."""
    chosen = session.source(source)
    pair = kinds.pair(chosen.kind)
    script = pair.ddl_capture_script(chosen, remove=remove)
    if print_only:
        print(script)
        return
    pair.run_script(chosen, script)
    print(f"{chosen.name}: DDL {'is no longer' if remove else 'is'} captured by event triggers")
