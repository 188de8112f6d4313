"""Which collections are captured: globs, matched here exactly and pushed down to the server as far as it helps."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec

from cdc.change import TableName
from cdc.config import Config, SourceConfig, TableGlobs
from cdc.urls import hosts_of

SYSTEM_DATABASES: Final = frozenset({"admin", "config", "local"})
"""Change streams never show them."""

EVERYTHING: Final = TableName("", "")
"""As what is watched: the whole deployment."""

OWN_COLLECTIONS: Final = frozenset({"cdc_positions"})
"""What sinks of ours keep in their targets, and no mirror of a mirror wants."""

_WILD: Final = re.compile(r"\[!?\]?[^]]*\]|[*?]")


class Scope(msgspec.Struct, frozen=True):
    """The captured collections: those that match an include and no exclude, but for our own.

    foreign: databases, and names of collections, that sinks of this source write to on the source's own servers.
    """

    globs: TableGlobs
    foreign: frozenset[str] = frozenset()

    def match(self, name: TableName) -> bool:
        """Whether a collection is captured."""
        return (
            name.name not in OWN_COLLECTIONS
            and not name.name.startswith("system.")
            and name.schema not in SYSTEM_DATABASES
            and name.schema not in self.foreign
            and str(name) not in self.foreign
            and self.globs.match(name)
        )

    def match_database(self, database: str) -> bool:
        """Whether something in a database may be captured."""
        if database in SYSTEM_DATABASES or database in self.foreign:
            return False
        return any(fnmatchcase(database, part) for glob in self.globs.include for part, _ in _split(glob))

    @property
    def target(self) -> TableName:
        """What to watch: one collection, one database (the name is empty), or the deployment (both are).

        The least that holds everything: it takes the least privileges.
        """
        pairs = [pair for glob in self.globs.include for pair in _split(glob)]
        databases = {database for database, _ in pairs}
        if len(databases) != 1 or _is_wild(*databases):
            return EVERYTHING
        collections = {collection for _, collection in pairs}
        name = "" if len(collections) != 1 or _is_wild(*collections) else collections.pop()
        return TableName(databases.pop(), name)

    def pipeline(self) -> list[dict[str, Any]]:
        """The stages behind `$changeStream`: everything that `match` takes passes, and little else.

        What has no collection (dropDatabase, invalidate) passes by its database; a rename also by where it leads to.
        """
        wanted = [pair for glob in self.globs.include for pair in _split(glob)]
        unwanted = [pair for glob in self.globs.exclude for pair in _split(glob)]
        captured = [_names("ns", pair, self.target) for pair in wanted]
        conditions: list[dict[str, Any]] = []
        if {} not in captured:
            renamed = [{"operationType": "rename", **_names("to", pair, EVERYTHING)} for pair in wanted]
            whole = {"operationType": {"$in": ["dropDatabase", "invalidate"]}}
            conditions.append({"$or": [*captured, *renamed, whole]})
        # what is excluded may still be the beginning of a rename that ends with a captured name
        conditions += [{"$or": [{"operationType": "rename"}, {"$nor": [names]}]} for names in self._never(unwanted)]
        return [{"$match": {"$and": conditions}}]

    def _never(self, unwanted: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        for pair in unwanted:
            yield _names("ns", pair, EVERYTHING)
        databases = sorted(name for name in self.foreign if "." not in name)
        if databases:
            yield {"ns.db": {"$in": databases}}
        for name in sorted(self.foreign - set(databases)):
            database, _, collection = name.partition(".")
            yield {"ns.db": database, "ns.coll": collection}
        yield {"ns.coll": {"$in": sorted(OWN_COLLECTIONS)}}


def scope_of(config: Config, source: SourceConfig) -> Scope:
    """What a configuration wants of a source, without the databases that its own sinks fill on the same servers.

    (A deployment-wide source would mirror its mirror for ever.)
    """
    assert source.url is not None
    hosts = hosts_of(source.url.reveal())
    foreign = {str(table) for table in config.own_tables(source)}
    for sink in config.sinks_of(source.name):
        if sink.url is not None and hosts & hosts_of(sink.url.reveal()):
            foreign |= set(sink.rename.values())
    return Scope(source.tables, frozenset(foreign))


def covers(wide: TableGlobs, narrow: TableGlobs) -> bool:
    """Whether all that `narrow` matches is matched by `wide`, as far as the globs by themselves can tell."""
    return _all_covered(narrow.include, wide.include) and _all_covered(wide.exclude, narrow.exclude)


def _all_covered(globs: Collection[str], by: Collection[str]) -> bool:
    # a star swallows whatever stands for more than itself; the other wildcards need not
    stars = [glob for glob in by if not re.search(r"[?\[]", glob)]
    return all(glob in by or any(fnmatchcase(glob, star) for star in stars) for glob in globs)


def _split(glob: str) -> Iterator[tuple[str, str]]:
    """All ways to read a glob over `database.collection` as one over each; database names have no dots."""
    at = 0
    while at < len(glob):
        wild = _WILD.match(glob, at)
        end = wild.end() if wild else at + 1
        part = glob[at:end]
        if part == ".":
            yield glob[:at], glob[end:]
            return  # the first dot of a name ends the database; a later one of the glob cannot
        if part == "*":
            yield glob[:end], glob[at:]
        elif wild and fnmatchcase(".", part):
            yield glob[:at], glob[end:]
        at = end


def _is_wild(text: str) -> bool:
    return _WILD.search(text) is not None


def _names(field: str, pair: tuple[str, str], target: TableName) -> dict[str, Any]:
    """The condition for one pair of globs; what the stream's target says already is left out."""
    database, collection = pair
    condition: dict[str, Any] = {}
    if not target.schema and database != "*":
        condition[f"{field}.db"] = _condition(database)
    if not target.name and collection != "*":
        condition[f"{field}.coll"] = _condition(collection)
    return condition


def _condition(glob: str) -> Any:
    if not _is_wild(glob):
        return glob
    parts = []
    at = 0
    while at < len(glob):
        wild = _WILD.match(glob, at)
        end = wild.end() if wild else at + 1
        parts.append(_as_regex(glob[at:end]) if wild else re.escape(glob[at:end]))
        at = end
    return {"$regex": f"^{''.join(parts)}$", "$options": "s"}


def _as_regex(part: str) -> str:
    if part == "*":
        return ".*"
    if part == "?":
        return "."
    inside = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
    negated, inside = inside.startswith("!"), inside.removeprefix("!")
    inside = inside.replace("]", r"\]").replace("^", r"\^")
    return f"[^{inside}]" if negated else f"[{inside}]"
