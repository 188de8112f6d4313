"""Tables with a column of every type, and rows with the values that break replication tools.

All tables lie in `public`. `fill` after a mirror exists exercises inserts, before it the copy; `rotate` exercises
updates; `contents` on both sides says whether every byte arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql

Connection = psycopg.Connection[Any]

TABLES: Final = ("every_type", "every_type_full", "user_types", "typmods", "odd_keys")

_LARGE: Final = 1000
"""Values longer than this stand alone and not in arrays too."""

_TEXTS: Final = (
    "",
    " ",
    "NULL",
    "null",
    "\\N",
    "\\.",
    "\\",
    "a\tb\nc\r\nd\\e\bf\fg\vh",
    "'single' \"double\" `back` $dollar$ {brace} (round),",
    "\x01\x1f\x7f\u0080\ufeff\ufffe",
    "Grüße, 世界, 🐘, e\u0301, \u202eright to left",
    "x" * 2_000_000,
    "".join(chr(33 + i * i % 90) for i in range(1_000_000)),
)
"""The first long one shrinks to nothing when compressed, the second goes to TOAST as it is."""

_REAL: Final = ("NaN", "Infinity", "-Infinity", "-0", "0.1")

_VALUES: Final[dict[str, Sequence[str]]] = {
    "aclitem": ("postgres=arwdDxt/postgres", "=r*/postgres"),
    "bit": ("0", "1010"),
    "bool": ("t", "f"),
    "box": ("(1,2),(-3,-0)", "(Infinity,1e300),(-Infinity,5e-324)"),
    "bpchar": ("", "trailing   ", "Grüße  "),
    "bytea": ("\\x", "\\x" + bytes(range(256)).hex(), "\\x00", "\\x" + "5c" * 500_000),
    "char": ("a", "", "\\377", "\\", " "),
    "cid": ("0", "4294967295"),
    "cidr": ("0.0.0.0/0", "192.168.100.128/25", "2001:db8::/32"),
    "circle": ("<(0,0),0>", "<(1e-300,-0),Infinity>"),
    "date": (
        "infinity", "-infinity", "4713-11-24 BC", "0001-12-31 BC", "0001-01-01", "10000-01-01", "5874897-12-31",
        "2000-02-29",
    ),
    "float4": (*_REAL, "3.4028235e+38", "1e-45", "1.17549435e-38", "16777217"),
    "float8": (*_REAL, "1.7976931348623157e+308", "5e-324", "2.2250738585072014e-308", "0.30000000000000004"),
    "inet": ("0.0.0.0", "192.168.1.5/24", "::ffff:1.2.3.4", "fe80::1/64"),
    "int2": ("-32768", "32767"),
    "int2vector": ("1 2 -3", ""),
    "int4": ("-2147483648", "2147483647", "0"),
    "int8": ("-9223372036854775808", "9223372036854775807"),
    "interval": (
        "178000000 years", "-178000000 years 2147483647 days", "1 mon -1 day 00:00:00.000001", "00:00:00", "-00:00:01",
        "2562047788:00:54.775807", "infinity", "-infinity",
    ),
    "json": ('{"b":  1, "a": 2,\n "b": 3}', " null ", '"\\u00fc\\n\\\\"', "1E400", "[]", '"' + "j" * 50_000 + '"'),
    "jsonb": ('{"b": 1, "a": 1.10, "": null}', "null", '"\\ud83d\\udc18"', "1E400", '[[[]], -0.0]', '"it\'s \\\\N"'),
    "jsonpath": ("$", 'strict $."a b"[*] ? (@.x > 1.50 && @.y like_regex "^\\\\d+$" flag "i")'),
    "line": ("{1,2,3}", "{-1,0,1e300}"),
    "lseg": ("[(0,0),(0,0)]", "[(-Infinity,NaN),(1,-0)]"),
    "macaddr": ("00:00:00:00:00:00", "08:00:2b:01:02:03"),
    "macaddr8": ("ff:ff:ff:ff:ff:ff:ff:ff", "08:00:2b:01:02:03:04:05"),
    "money": ("-92233720368547758.08", "92233720368547758.07", "0"),
    "name": ("", "it's \"quoted\"", "n" * 63),
    "numeric": (
        "NaN", "Infinity", "-Infinity", "0", "0.000", "1.10", "-1e-16383", "9" * 131_072, "0." + "0" * 16_382 + "1",
        "12345678901234567890.123456789012345678901234567890",
    ),
    "oid": ("0", "4294967295"),
    "oidvector": ("1 4294967295", ""),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,-0),(NaN,Infinity))"),
    "pg_lsn": ("0/0", "FFFFFFFF/FFFFFFFF"),
    "pg_snapshot": ("10:20:10,14,15", "1:1:"),
    "point": ("(-0,0)", "(NaN,Infinity)", "(1e-300,1.7976931348623157e+308)"),
    "polygon": ("((0,0))", "((0,0),(1e300,-1),(-0,2))"),
    "refcursor": ("", "<unnamed portal 1>"),
    "regclass": ("-", "pg_class", "public.odd_keys"),
    "regcollation": ('"C"', "-"),
    "regconfig": ("english", "simple"),
    "regdictionary": ("simple", "english_stem"),
    "regnamespace": ("pg_catalog", "public"),
    "regoper": ("||/", "0"),
    "regoperator": ("+(integer,integer)", "@(none,bigint)"),
    "regproc": ("pg_sleep", "-"),
    "regprocedure": ("sum(integer)", "pg_sleep(double precision)"),
    "regrole": ("postgres", "-"),
    "regtype": ("integer", "timestamp with time zone[]", "public.mood"),
    "text": _TEXTS,
    "tid": ("(0,1)", "(4294967295,65535)"),
    "time": ("00:00:00", "24:00:00", "23:59:59.999999"),
    "timestamp": (
        "infinity", "-infinity", "4713-11-24 00:00:00 BC", "0001-12-31 23:59:59.999999 BC", "10000-01-01 00:00:00",
        "294276-12-31 23:59:59.999999", "2000-01-01 00:00:00.000001",
    ),
    "timestamptz": (
        "infinity", "-infinity", "4713-11-24 00:00:00+00 BC", "0001-01-01 00:00:00+15:59:59 BC",
        "294276-12-31 23:59:59.999999+00", "2025-03-30 02:30:00+01", "1883-11-18 12:03:58-04:56:02",
    ),
    "timetz": ("00:00:00+15:59:59", "24:00:00-15:59:59", "12:34:56.789+00"),
    "tsquery": ("'it''s' & !'b\\\\':*A <2> 'c d'", ""),
    "tsvector": ("'a':1A,16383 'it''s':2B 'sp ace':3 'ü'", ""),
    "txid_snapshot": ("10:20:10,14,15", "1:1:"),
    "uuid": ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    "varbit": ("", "1011", "01" * 3000),
    "varchar": _TEXTS[:11],
    "xid": ("0", "4294967295"),
    "xid8": ("0", "18446744073709551615"),
    "xml": ("", "<a b=\"c\">\n &amp;<!-- d --></a>", "<?xml version=\"1.0\" standalone=\"yes\"?><ü/>", "plain text"),
    # ranges
    "daterange": ("empty", "(,)", "[infinity,infinity]", "[4713-11-24 BC,5874897-12-31)"),
    "int4range": ("empty", "(,)", "[-2147483648,2147483647)", "[,5)"),
    "int8range": ("empty", "[9223372036854775806,)", "[1,2)"),
    "numrange": ("empty", "[1.0,1.00]", "(-Infinity,NaN]", "[0.1,0.10]"),
    "tsrange": ("empty", "[-infinity,infinity]", "(2000-01-01,2000-01-01 00:00:00.000001]"),
    "tstzrange": ("empty", "[2000-01-01 00:00:00+00,)", "(0044-03-15 12:00:00+00 BC,infinity]"),
    "datemultirange": ("{}", "{(,2000-01-01),[2000-01-03,infinity)}"),
    "int4multirange": ("{}", "{[1,2),[5,6)}", "{(,)}"),
    "int8multirange": ("{}", "{[-9223372036854775808,0),[5,)}"),
    "nummultirange": ("{}", "{[1.0,1.00],(2,NaN]}"),
    "tsmultirange": ("{}", "{[2000-01-01,2000-01-02),[2000-01-03,infinity]}"),
    "tstzmultirange": ("{}", "{[-infinity,2000-01-01 00:00:00+00)}"),
    # made by create_types_schema
    "public.address": ('("a ""quoted"" street, \\\\N",-1,"{x,NULL,""y,z""}",)', "(,,,)", '("",0,{},"it\'s fine")'),
    "public.account": ('(7,"(street,1,{},sad)","{""(a,1,,)"",NULL}")', "(,,)"),
    "public.mood": ("sad", "it's fine", "Grüße 🐘", "back\\slash, \"comma\"", "NULL"),
    "public.percentage": ("0", "99.990", "100"),
    "public.labels": ("{}", "{a,NULL,\"\"}", "[0:1]={b,c}"),
    "public.positive_address": ('(street,1,{},)',),
    "public.wordrange": ("empty", '["a,b","c""d"]', "(,)", '["",Z)'),
    "public.wordmultirange": ("{}", '{["",a),["b\\\\","c d"]}'),
    "public.percentagerange": ("[0,99.90)", "(,)"),
}  # fmt: skip

_SCHEMA: Final = """
CREATE TYPE public.mood AS ENUM ('sad', 'it''s fine', 'Grüße 🐘', 'back\\slash, "comma"', 'NULL');
CREATE TYPE public.address AS (street text, number integer, tags text[], mood public.mood);
CREATE TYPE public.account AS (id bigint, home public.address, others public.address[]);
CREATE DOMAIN public.percentage AS numeric(6,3) CHECK (VALUE BETWEEN 0 AND 100);
CREATE DOMAIN public.labels AS text[] CHECK (cardinality(VALUE) < 10);
CREATE DOMAIN public.positive_address AS public.address CHECK ((VALUE).number > 0);
CREATE TYPE public.wordrange AS RANGE (subtype = text, collation = "C", multirange_type_name = public.wordmultirange);
CREATE TYPE public.percentagerange AS RANGE (subtype = public.percentage);

CREATE TABLE public.odd_keys (
    ratio numeric, label text COLLATE "C", at timestamptz, id uuid, raw bytea, mood public.mood,
    "a ""quoted"" name" int2,
    note text,
    PRIMARY KEY (ratio, label, at, id, raw, mood, "a ""quoted"" name")
);
CREATE TABLE public.typmods (
    id integer PRIMARY KEY, v varchar(10), c char(5), n numeric(10,3), rounded numeric(3,-2), tiny numeric(2,5),
    b bit(5), vb bit varying(7), ts timestamp(0), tz timestamptz(3), t time(2), days interval day to second(0),
    matrix integer[3][3]
);
"""

_TYPMODS: Final = """
INSERT INTO public.typmods VALUES
    (1, 'a', 'b', 1, 12345, 0.00001, B'10101', B'', '2000-01-01 00:00:00.6', '2000-01-01 00:00:00.0006+00',
     '23:59:59.999', '1 day 00:00:00.7', '{{1,2},{3,NULL}}'),
    (2, '   ', '', 'NaN', -99900, -0.00099, B'00000', B'1111111', '-infinity', 'infinity', '24:00', '-1 day',
     '[-1:0][2:3]={{1,2},{3,4}}'),
    (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)
"""

_ODD_KEYS: Final = """
INSERT INTO public.odd_keys
SELECT ratio, label, at, id, raw, mood, small, 'row'
  FROM unnest('{NaN,Infinity,0.0,1.10}'::numeric[]) ratio, unnest(ARRAY['', 'a', 'B', 'ü', E'\\t\\\\']) label,
       unnest('{infinity,"0044-03-15 BC"}'::timestamptz[]) at,
       unnest('{00000000-0000-0000-0000-000000000000,ffffffff-ffff-ffff-ffff-ffffffffffff}'::uuid[]) id,
       unnest(ARRAY['\\x', '\\x00ff']::bytea[]) raw, unnest('{sad,"NULL"}'::public.mood[]) mood,
       unnest('{-1,1}'::int2[]) small
"""

_BUILT_IN: Final = """
SELECT t.typname::text, format_type(t.oid, -1), t.typdelim::text, t.typarray <> 0
  FROM pg_type t
 WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype IN ('b', 'r', 'm')
   AND NOT EXISTS (SELECT FROM pg_type element WHERE element.typarray = t.oid)
 ORDER BY t.typname
"""


class _Column:
    """A column of one type, or of arrays of it, and what its rows hold."""

    def __init__(self, name: str, type_name: str, values: Sequence[str]) -> None:
        self.name = name
        self.type_name = type_name
        self.values = values


def create_types_schema(connection: Connection) -> None:
    """Create types and tables in an empty UTF8 database."""
    connection.execute(_SCHEMA)
    _create_table(connection, "every_type", list(_built_in(connection)))
    _create_table(connection, "user_types", list(_user_made()))
    connection.execute(
        "CREATE TABLE public.every_type_full (LIKE public.every_type);"
        "ALTER TABLE public.every_type_full REPLICA IDENTITY FULL"
    )


def fill(connection: Connection) -> None:
    """Insert the rows. The tables must be empty."""
    _insert(connection, "every_type", list(_built_in(connection)))
    _insert(connection, "user_types", list(_user_made()))
    connection.execute("INSERT INTO public.every_type_full SELECT * FROM public.every_type")
    connection.execute(_TYPMODS)
    connection.execute(_ODD_KEYS)


def rotate(connection: Connection) -> None:
    """Give every row the values of the next one, in one transaction: an update of every column of every type."""
    with connection.transaction():
        for table, columns in (("every_type", _built_in(connection)), ("user_types", _user_made())):
            _rotate(connection, table, [column.name for column in columns])
        _rotate(connection, "every_type_full", [column.name for column in _built_in(connection)])
        connection.execute(
            'UPDATE public.odd_keys SET ratio = ratio + 1, "a ""quoted"" name" = "a ""quoted"" name" + 10'
        )
        connection.execute("DELETE FROM public.odd_keys WHERE mood = 'NULL' AND id = %s", ["0" * 32])


def contents(connection: Connection) -> dict[str, list[str]]:
    """Every row of every table as text, sorted: equal on both sides if and only if nothing changed on the way."""
    connection.execute("SET timezone = 'UTC'; SET search_path = ''; SET lc_monetary = 'C'")
    query = sql.SQL("SELECT whole::text FROM {} AS whole")
    tables = {name: query.format(sql.Identifier("public", name)) for name in TABLES}
    return {name: sorted(row[0] for row in connection.execute(query)) for name, query in tables.items()}


def _built_in(connection: Connection) -> Iterator[_Column]:
    """A column of every type that this server has, and one of arrays of it."""
    refused = _refused(connection)
    for name, type_name, delimiter, has_array in connection.execute(_BUILT_IN).fetchall():
        values = [value for value in _VALUES.get(name, ()) if (name, value) not in refused]
        yield _Column(f"c_{name}", type_name, values)
        if has_array:
            yield _Column(f"a_{name}", f"{type_name}[]", list(_arrays(values, delimiter)))


def _refused(connection: Connection) -> set[tuple[str, str]]:
    """Values that this server does not accept: infinite intervals before 17, any xml where built without libxml."""
    refused = set()
    if connection.info.server_version < 170000:
        refused |= {("interval", "infinity"), ("interval", "-infinity")}
    if not connection.execute("SELECT 1 FROM pg_config WHERE name = 'CONFIGURE' AND setting ~ 'libxml'").fetchall():
        refused |= {("xml", value) for value in _VALUES["xml"]}
    return refused


def _user_made() -> Iterator[_Column]:
    for name, values in _VALUES.items():
        _, dot, short = name.partition("public.")
        if dot:
            yield _Column(f"c_{short}", name, values)
            yield _Column(f"a_{short}", f"{name}[]", list(_arrays(values, ",")))


def _arrays(values: Sequence[str], delimiter: str) -> Iterator[str]:
    """Array literals: empty, flat with NULL, only NULL, nested, with bounds that do not start at 1."""
    quoted = [_quoted(value) for value in values if len(value) < _LARGE]
    yield "{}"
    yield "{NULL}"
    if quoted:
        first, last = quoted[0], quoted[-1]
        yield "{" + delimiter.join([*quoted, "NULL"]) + "}"
        yield f"{{{{{first}{delimiter}NULL}}{delimiter}{{{last}{delimiter}{first}}}}}"
        yield f"[-5:-4]={{{first}{delimiter}{last}}}"
        yield f"[0:0][7:8]={{{{NULL{delimiter}{last}}}}}"


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _create_table(connection: Connection, table: str, columns: Sequence[_Column]) -> None:
    definitions = [
        sql.SQL("{} {}").format(sql.Identifier(column.name), sql.SQL(column.type_name)) for column in columns
    ]
    connection.execute(
        sql.SQL("CREATE TABLE {} (id integer PRIMARY KEY, {})").format(
            sql.Identifier("public", table), sql.SQL(", ").join(definitions)
        )
    )


def _insert(connection: Connection, table: str, columns: Sequence[_Column]) -> None:
    """The n-th row has the n-th value of every column, NULL where a column has fewer; the last is all NULL."""
    names = sql.SQL(", ").join(sql.Identifier(name) for name in ["id", *(column.name for column in columns)])
    query = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier("public", table), names, sql.SQL(", ").join([sql.Placeholder()] * (len(columns) + 1))
    )
    for number in range(max(len(column.values) for column in columns) + 1):
        values = [column.values[number] if number < len(column.values) else None for column in columns]
        connection.execute(query, [str(number), *values])


def _rotate(connection: Connection, table: str, columns: Sequence[str]) -> None:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    connection.execute(
        sql.SQL(
            "UPDATE {table} AS t SET ({columns}) = (SELECT {columns} FROM {table} AS next"
            " WHERE next.id = (t.id + 1) %% (SELECT count(*) FROM {table}))"
        ).format(table=sql.Identifier("public", table), columns=names),
        [],
    )
