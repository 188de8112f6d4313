"""Write what is told about options and metrics by their definitions: so it is said once, and cannot be wrong.

docs/configuration.md and the comments in config.example.toml come from the structs of the configuration,
docs/metrics.md from cdc.metrics. `--check` writes nothing, names what is stale, and exits with 1.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from msgspec import inspect as kinds

from cdc.config import Config
from cdc.metrics import HISTOGRAM_LABELS, HISTOGRAMS, OF_DAEMON, OF_HTTP, OF_STREAMS, Family
from cdc.secret import Secret
from sinks import options_of
from sinks.data_changes import DataChangesSink

CHECKOUT: Final = Path(__file__).parents[1]
EXAMPLE: Final = "config.example.toml"
EMPTY: Final = "\n\n"
UNITS: Final = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))

Struct = type[msgspec.Struct]


def options(struct: Struct) -> Iterator[kinds.Field]:
    """What may be written in a section; names are the section's own, and what a kind has besides comes elsewhere."""
    info = kinds.type_info(struct)
    assert isinstance(info, kinds.StructType)
    named_by_section = struct.__annotations__.get("name") == "str"
    for field in info.fields:
        if field.encode_name != "options" and not (field.encode_name == "name" and named_by_section):
            yield field


def meanings(struct: Struct) -> dict[str, str]:
    """What stands below each field, by the option's name."""
    names = {field.name: field.encode_name for field in msgspec.structs.fields(struct)}
    body = ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[names[field.target.id]] = " ".join(str(text.value.value).split())
    return found


def struct_within(kind: Any) -> Struct | None:
    """The struct that an option holds: itself, as the values of a table, the entries of a list, or if there is one."""
    candidates = [kind]
    for each in candidates:
        candidates += get_args(each)
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, msgspec.Struct)), None)


def sections(struct: Struct = Config) -> Iterator[Struct]:
    """All structs of the configuration, in the order of the example; a feed's follow the sinks'."""
    yield struct
    for field in msgspec.structs.fields(struct):
        if (inner := struct_within(field.type)) is not None:
            yield from sections(inner)


def described(kind: kinds.Type) -> str:
    """What a value may be, for people."""
    match kind:
        case kinds.UnionType(types=types):
            return " or ".join(dict.fromkeys(described(each) for each in types if not isinstance(each, kinds.NoneType)))
        case kinds.Metadata(type=inner):
            return described(inner)
        case kinds.LiteralType(values=values):
            return ", ".join(f"`{json.dumps(value)}`" for value in values)
        case kinds.VarTupleType(item_type=item):
            return f"list of {described(item)}"
        case kinds.DictType(value_type=value):
            return f"table of {described(value)}"
        case kinds.StructType(cls=cls):
            return f"section {title(cls)}"
        case kinds.CustomType(cls=cls) if issubclass(cls, Secret):
            return "text, secret"
    named = {
        kinds.StrType: "text",
        kinds.IntType: "integer",
        kinds.FloatType: "number",
        kinds.BoolType: "`true`, `false`",
    }
    return named[type(kind)] + bounds(kind)


def bounds(kind: kinds.Type) -> str:
    """Of a number or a text."""
    signs = {"gt": ">", "ge": "≥", "le": "≤"}
    found = [
        f" {sign} {limit:,.0f}" for name, sign in signs.items() if (limit := getattr(kind, name, None)) is not None
    ]
    if (longest := getattr(kind, "max_length", None)) is not None:
        found.append(f" of at most {longest} characters")
    return ",".join(found)


def default_of(field: kinds.Field) -> str:
    """As it would be written."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None or isinstance(value, msgspec.Struct):
        return ""
    unit = next((f" ({value // size:,} {name})" for name, size in UNITS if is_round(field.name, value, size)), "")
    return f"`{json.dumps(value)}`{unit}"


def is_round(name: str, value: Any, size: int) -> bool:
    return name.endswith("bytes") and value >= size and value % size == 0


def title(struct: Struct) -> str:
    """The section's name in the file; of the whole, none."""
    found = re.match(r"`(\[+[^\]]+\]+)`( of `[^`]+`)?: ", inspect.getdoc(struct) or "")
    return f"`{found[1]}`{found[2] or ''}" if found else ""


def configuration() -> str:
    """docs/configuration.md."""
    intro = """Every option, section by section; [config.example.toml](../config.example.toml) shows them in place.
        `cdc check` reads the file, and looks at the databases as well. An option that has no default, and is not
        required, may be left out."""
    parts = ["# Configuration\n", f"{paragraphs(intro)}\n"]
    for struct in (*sections(), *sections(DataChangesSink.Options)):
        heading = title(struct)
        text = (inspect.getdoc(struct) or "").removeprefix(f"{heading}: ")
        parts += (
            [f"## {heading}\n", f"{paragraphs(text)}\n"] if heading else [f"{paragraphs(text.partition(EMPTY)[2])}\n"]
        )
        if rows := list(rows_of(struct)):
            parts.append(table(("option", "value", "default", "what it means"), rows))
    return "\n".join(parts)


def rows_of(struct: Struct) -> Iterator[tuple[str, ...]]:
    """One an option; what is told of in a section of its own has none."""
    texts = meanings(struct)
    for field in options(struct):
        if field.encode_name in texts:
            yield f"`{field.encode_name}`", described(field.type), default_of(field), texts[field.encode_name]
        elif "section" not in described(field.type):
            raise SystemExit(f"{struct.__name__}.{field.name}: it is not said what it means")


def paragraphs(text: str) -> str:
    """Wrapped again; the first letter a capital one."""
    text = text.strip()
    found = [" ".join(part.split()) for part in (text[:1].upper() + text[1:]).split(EMPTY)]
    return EMPTY.join(textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in found)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def metrics() -> str:
    """docs/metrics.md."""
    intro = """`GET /metrics` tells them in Prometheus's text format or in OpenMetrics; they are the same numbers that
        `cdc status` and the web page show. A gauge whose value is not known is absent, never 0. Besides, there are
        `process_*` (memory, CPU, open files) and `python_info`. [alerts.yml](../deploy/prometheus/alerts.yml) and
        [the dashboard](../deploy/grafana/cdc.json) are made of these."""
    parts = ["# Metrics\n", f"{paragraphs(intro)}\n"]
    for heading, families in OF_DAEMON.items():
        parts += [f"## {heading}\n", table(_METRIC, [row_of(family) for family in families])]
    timed = [metric for histogram in HISTOGRAMS for metric in histogram.describe()]
    rows = [(f"`{metric.name}`", "histogram", marked(HISTOGRAM_LABELS), metric.documentation) for metric in timed]
    parts += ["## Times of delivery\n", table(_METRIC, rows)]
    parts += [
        "## The HTTP interface, of a daemon or a gateway\n",
        table(_METRIC, [row_of(family) for family in OF_HTTP]),
    ]
    parts += ["## Live streams, of a daemon or a gateway\n", table(_METRIC, [row_of(family) for family in OF_STREAMS])]
    return "\n".join(parts)


_METRIC: Final = ("metric", "kind", "labels", "what it means")


def row_of(family: Family[Any]) -> tuple[str, ...]:
    kind = "counter" if family.counter else "gauge"
    return f"`{family.exposed_as}`", kind, marked(family.labels), family.text


def marked(labels: tuple[str, ...]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def example() -> str:
    """The example as it is, with each option's meaning above it. What stands above a section is its own."""
    text = (CHECKOUT / EXAMPLE).read_text(encoding="utf-8")
    kinds_of_sinks = {name: sink.get("kind", "") for name, sink in tomllib.loads(text)["sinks"].items()}
    lines: list[str] = []
    texts: Mapping[str, str] = {}
    for line in text.splitlines():
        if header := re.match(r"#?\[+(.+?)\]+$", line):
            texts = texts_of(re.findall(r'"[^"]*"|[^.]+', header[1]), kinds_of_sinks)
        elif (option := re.match(r"#?(\w+) = ", line)) and option[1] in texts:
            while lines[-1].startswith("# "):
                lines.pop()
            lines += textwrap.wrap(texts[option[1]], 118, initial_indent="# ", subsequent_indent="# ")
        lines.append(line)
    return "\n".join(lines) + "\n"


def texts_of(path: list[str], kinds_of_sinks: Mapping[str, str]) -> Mapping[str, str]:
    """What the options of a section mean. path: its name in the file, in parts."""
    structs: list[Struct] = [Config]
    for part in path:
        fields = {field.encode_name: field.type for struct in structs for field in msgspec.structs.fields(struct)}
        if part in fields:
            structs = [inner] if (inner := struct_within(fields[part])) is not None else []
        elif kinds_of_sinks.get(part) and (own := options_of(kinds_of_sinks[part])) is not None:
            structs.append(own)
    return {option: text for struct in structs for option, text in meanings(struct).items()}


def main() -> int:
    written = {"docs/configuration.md": configuration(), "docs/metrics.md": metrics(), EXAMPLE: example()}
    stale = [name for name, text in written.items() if not is_current(CHECKOUT / name, text)]
    for name in stale:
        print(f"{name} is stale: run python scripts/reference.py" if "--check" in sys.argv else f"{name} written")
        if "--check" not in sys.argv:
            (CHECKOUT / name).write_text(written[name], encoding="utf-8")
    return int(bool(stale) and "--check" in sys.argv)


def is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
