"""The configuration: what is accepted, what is refused and how, and the example that lists everything."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from cdc import logs
from cdc.change import TableName
from cdc.config import Config, SinkConfig
from cdc.config_file import load, parse
from cdc.errors import ConfigError
from cdc.secret import Secret
from cdc.urls import redact
from sinks import options_of

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"
MINIMAL = '[sources.shop]\nurl = "postgresql://me:geheim@db/shop"\n'
COMPLETED = {"name", "from", "url"}
"""Filled in by the loader, or without a default."""


def configure(text: str, tmp_path: Path, **environment: str) -> Config:
    path = tmp_path / "cdc.toml"
    path.write_text(text)
    return load(path, environment)


def refusal(text: str, tmp_path: Path, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configure(text, tmp_path, **environment)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'cdc.toml'}: ")
    return str(caught.value).partition("cdc.toml: ")[2]


def test_example_loads() -> None:
    config = load(EXAMPLE, {"SHOP_URL": "postgresql://db/shop"}, options_of=options_of)
    assert config.sinks["mirror"].url == Secret("postgresql://db/shop_backup")


def test_example_lists_every_option_with_its_default() -> None:
    """Of every struct, commented options included; and nothing that does not exist."""
    text = re.sub(r'^#(?=[\w"\[])', "", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert_complete(tomllib.loads(text), Config, "")


def assert_complete(written: dict[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    fields = fields_of(kind, written)
    assert set(written) - {"name"} == set(fields), f"[{where}] lists other options than {kind.__name__} has"
    for name, field in fields.items():
        key = f"{where}.{name}".lstrip(".")
        member = struct_within(field.type)
        if member is None:
            assert_default(written[name], field, key)
        elif get_origin(field.type) is dict:
            for member_name, value in written[name].items():
                assert_complete(value, member, f"{key}.{member_name}")
        else:
            for value in written[name] if isinstance(written[name], list) else [written[name]]:
                assert_complete(value, member, key)


def fields_of(kind: type[msgspec.Struct], written: dict[str, Any]) -> dict[str, msgspec.structs.FieldInfo]:
    """All options of a section; a sink that is no mirror has its kind's own beside what all sinks have."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind) if field.encode_name != "name"}
    if kind is not SinkConfig:
        return fields
    own = options_of(written["kind"]) if written["kind"] else None
    if own is None:
        return {name: field for name, field in fields.items() if name != "options"}
    del written["kind"]
    shared = {name: fields[name] for name in ("from", "url")}
    return shared | {field.encode_name: field for field in msgspec.structs.fields(own)}


def struct_within(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that a field holds: itself, as the values of a dict, the entries of a list, or if there is one."""
    candidates = [kind]
    for each in candidates:
        candidates += get_args(each)
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, msgspec.Struct)), None)


def assert_default(value: Any, field: msgspec.structs.FieldInfo, key: str) -> None:
    if field.default in (None, msgspec.NODEFAULT):
        assert value, f"{key} has no default: show what it looks like"
    else:
        assert (tuple(value) if isinstance(value, list) else value) == field.default, key


def test_every_option_of_the_example_says_why() -> None:
    """Above each stands a comment, but where the section's own speaks for all."""
    grouped = "[sinks.mirror.rename]"
    section, before = "", ""
    for line in EXAMPLE.read_text().splitlines():
        is_section = re.match(r"#?\[", line) is not None
        section = line if is_section else section
        if section == grouped if is_section else re.match(r'#?[\w"][^#]* = ', line) and section != grouped:
            assert before.startswith("# "), line
        before = line


def test_a_missing_variable_is_named_as_such_in_the_log(tmp_path: Path) -> None:
    """What stands behind `token:` is struck out of whatever is printed."""
    file = tmp_path / "cdc.toml"
    file.write_text(MINIMAL + "[[http.tokens]]\nname = 'a'\ntoken = '${CDC_T}'\nscopes = ['admin']\n")
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert logs.redact(str(caught.value)).endswith("http.tokens.token needs the environment variable CDC_T")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[daemon]\ndata_dri = '/x'\n", "daemon: Object contains unknown field `data_dri`"),
        (MINIMAL + "slots = 'x'\n", "sources.shop: Object contains unknown field `slots`"),
        ("[daemon]\ndrain_seconds = 'long'\n", "daemon.drain_seconds: Expected `float`, got `str`"),
        ("[daemon]\ndrain_seconds = 0\n", "daemon.drain_seconds: Expected `float` > 0.0"),
        (MINIMAL + "[sources.other]\nurl = 5\n", "sources.other.url: Expected `str`, got `int`"),
        (MINIMAL + "slot = 'Über'\n", "sources.shop.slot: "),
        ("[sources.Shop]\nurl = 'x'\n", "sources: names consist of a-z, 0-9 and _"),
        ("[sources.shop]\n", "sources.shop.url: missing"),
        ("", "Object missing required field `sources`"),
        ("[daemon\n", "not valid TOML"),
        (MINIMAL + "[sinks.m]\nfrom = 'shopp'\n", "sinks.m.from: no source is called 'shopp'"),
        (MINIMAL + "[sinks.m]\nkind = 'kafka'\nfrom = 'shop'\n", "sinks.m.kind: no sink is of kind 'kafka'"),
        (MINIMAL + "[sinks.shop]\nfrom = 'shop'\n", "sinks.shop: a source has the same name"),
        (
            MINIMAL + "[sinks.m]\nfrom = 'shop'\nretry = {initial = 9, max = 3}\n",
            "sinks.m.retry: initial is larger",
        ),
        (MINIMAL + "[sinks.m]\nfrom = 'shop'\nretry = {attempts = 0}\n", "sinks.m.retry.attempts: Expected `int` >= 1"),
        (MINIMAL + "[sinks.m]\nfrom = 'shop'\nrename = {public = 'a.b'}\n", "sinks.m.rename.public: 'a.b'"),
    ],
)
def test_f112_errors_name_file_key_and_reason(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[daemon]\nlog_level = 'loud'\n", "one of: debug, error, info, warning"),
        ("[sinks.m]\nfrom = 'shop'\non_error = 'parkk'\n", "one of: park, stop"),
        ("[[http.tokens]]\nname = 'a'\ntoken = 'x'\nscopes = ['read', 'w']\n", "one of: admin, publish, read"),
        (
            "[sinks.f]\nkind = 'data_changes'\nfrom = 'shop'\nentities.'public.a' = {type = 'A', mask = {b = 'x'}}\n",
            "one of: redact, sha256",
        ),
        (
            "[sinks.f]\nkind = 'data_changes'\nfrom = 'shop'\nretention = '1 fortnight'\n",
            "`90s`, `30m`, `24h`, `7d`, or `never`",
        ),
        ("slot = 'Über'\n", "a-z, 0-9 and _, at most 63 of them"),
        ("[daemon]\nlog_level = 5\n", "config.example.toml lists every option"),
    ],
)
def test_f112_the_hint_lists_what_is_allowed(text: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text(MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load(file, {}, options_of=options_of)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "entities.'public.a' = {mask = {b = 'redact'}}\nentities.'public.o' = {mask = {b = 'redact', c = 'sha'}}\n",
            "sinks.f.entities.\"public.o\".mask.c: Invalid enum value 'sha'",
        ),
        ("entities.a = {type = 5}\n", "sinks.f.entities.a.type: Expected `str`, got `int`"),
        ("retention = '1 fortnight'\n", "sinks.f.retention: not of the expected form"),
        ("tables.'public.a'.columns = [1]\n", 'sinks.f.tables."public.a".columns[0]: Expected `str`, got `int`'),
        ("[sinks.g]\nfrom = 'shop'\nrename.public = 1\n", "sinks.g.rename.public: Expected `str`, got `int`"),
    ],
)
def test_f112_the_key_of_what_is_wrong_within_a_section_is_named(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "cdc.toml"
    file.write_text(f"{MINIMAL}[sinks.f]\nkind = 'data_changes'\nfrom = 'shop'\n{text}")
    with pytest.raises(ConfigError) as caught:
        load(file, {}, options_of=options_of)
    assert str(caught.value) == f"{file}: {complaint}"


@pytest.mark.parametrize(("content", "hint"), [(b"\xff\xfe", "UTF-8"), (None, "readable by this user")])
def test_f112_a_secret_file_that_is_no_text(content: bytes | None, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        configure(f"[sources.shop]\nurl_file = '{file}'\n", tmp_path)
    assert hint in caught.value.hint


def test_f112_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file") as caught:
        load(tmp_path / "missing.toml")
    assert "--config" in caught.value.hint


def test_environment_in_any_string(tmp_path: Path) -> None:
    text = (
        "[sources.shop]\nurl = 'postgresql://${USER_}:${PASS}@db/shop'\n[sources.shop.tables]\ninclude = ['${S}.*']\n"
    )
    source = configure(text, tmp_path, USER_="me", PASS="a$b", S="sales").sources["shop"]
    assert source.url == Secret("postgresql://me:a$b@db/shop")
    assert source.tables.include == ("sales.*",)


def test_two_dollars_are_one(tmp_path: Path) -> None:
    text = MINIMAL + "[sinks.m]\nfrom = 'shop'\n[sinks.m.tables.'public.a']\nwhere = 'x = $${y}$$'\n"
    assert configure(text, tmp_path).sinks["m"].tables["public.a"].where == "x = ${y}$"


def test_f112_missing_variable_is_named(tmp_path: Path) -> None:
    text = "[sources.shop]\nurl = '${NOT_THERE}'\n"
    assert refusal(text, tmp_path) == "sources.shop.url needs the environment variable NOT_THERE"


def test_secrets_from_files(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://me:geheim@db/shop\n")
    config = configure(f"[sources.shop]\nurl_file = '{tmp_path}/url'\n", tmp_path)
    assert config.sources["shop"].url == Secret("postgresql://me:geheim@db/shop")


def test_f112_unreadable_secret_file_is_named(tmp_path: Path) -> None:
    text = f"[sources.shop]\nurl_file = '{tmp_path}/none'\n"
    assert refusal(text, tmp_path) == f"sources.shop.url_file: {tmp_path}/none: No such file or directory"


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "empty"), ("geheim\n", "not an url"), ("mysql://me:geheim@db/shop", "no database has the scheme 'mysql'")],
)
def test_f112_file_of_a_secret_that_is_none_is_named(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(content)
    source = f"[sources.shop]\nurl_file = '{file}'\n"
    assert refusal(source, tmp_path) == f"sources.shop.url_file: {file}: {reason}"
    sink = f"{MINIMAL}[sinks.m]\nfrom = 'shop'\nurl_file = '{file}'\n"
    assert refusal(sink, tmp_path) == f"sinks.m.url_file: {file}: {reason}"
    alerts = f"{MINIMAL}[alerts]\nwebhook_file = '{file}'\n"
    assert refusal(alerts, tmp_path) == f"alerts.webhook_file: {file}: not an URL"


@pytest.mark.parametrize(
    ("url", "reason", "hint"),
    [
        ("postgresql://me:ge%heim@db/shop", "the url cannot be read", "%XX"),
        ("postgresql://me:geh/eim@db/shop", "the url has an invalid port", "%XX"),
        ("postgresql://me:geheim@db:99999/shop", "the url has an invalid port", "from 1 to 65535"),
        ("postgresql://me:geheim@a:1,b:c/shop", "the url has an invalid port", "behind the host"),
        ("host=db password=geheim port=0", "the url has an invalid port", "from 1 to 65535"),
        ("postgresql://me:geheim@db/shop?port=1,2", "the url has not as many ports as hosts", "one for all"),
        (
            "postgresql://me:geheim@db/shop?hostaddr=geheim",
            "hostaddr of the url is no IP address",
            "belong into `host`",
        ),
        ("postgresql://me:geheim@a,b/shop?hostaddr=::1", "the url has not as many hostaddr as hosts", "one for each"),
        ("postgresql://me:geheim@db/shop?sslmodee=geheim", "the url has an unknown option: sslmodee", "behind the `?`"),
        ("postgresql://me:geheim@db/shop?keepalives=geheim", "option keepalives of the url is no whole number", "`?`"),
        ("host=db password='geheim", "the url cannot be read", "%XX"),
        ("postgresql://me:geheim@a\npostgresql://me:geheim@b", "more than one line", "one url"),
        ("mongodb://me:ge%heim@db/shop", "the url of a MongoDB server cannot be read", "%XX"),
        ("mongodb://me:geheim@db:99999/shop", "the url of a MongoDB server cannot be read", "host:27017"),
        ("mongodb+srv://me:ge%heim@db/shop", "the url of a MongoDB server cannot be read", "%XX"),
        ("mongodb+srv://me:geheim@db:27017/shop", "the url of a MongoDB server cannot be read", "without a port"),
    ],
)
def test_f112_f113_mistakes_in_a_url_are_found_when_it_is_read(
    url: str, reason: str, hint: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{url}\n")
    source = f"[sources.shop]\nurl_file = '{file}'\n"
    sink = f"[sources.shop]\nurl = '{url.partition(':')[0]}://db/shop'\n" if "://" in url else MINIMAL
    for place, text in (
        ("sources.shop", source),
        ("sinks.m", f"{sink}[sinks.m]\nfrom = 'shop'\nurl_file = '{file}'\n"),
    ):
        with pytest.raises(ConfigError) as caught:
            configure(text, tmp_path)
        assert str(caught.value) == f"{tmp_path}/cdc.toml: {place}.url_file: {file}: {reason}"
        assert hint in caught.value.hint
        assert "eim" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///shop?host=/run/postgresql&port=5433",
        "postgresql://a:1,b,[::1]:2/shop?connect_timeout=3",
        "postgresql://a,b/shop?port=6432&hostaddr=127.0.0.1,",
        "host=db\nhostaddr=fe80::1%lo port=' 5432'",
        "mongodb://a:1,[::1]:2/shop?replicaSet=rs0&unknown=1",
        "mongodb://a,b/shop?directConnection=false",
        "mongodb://a,b/shop?tls=true&tlsCAFile=/nowhere/authority.pem",
        "mongodb+srv://me:p%40ss@db/?srvServiceName=shop&srvMaxHosts=2",
    ],
)
def test_a_url_of_any_form_is_taken_without_asking_anybody(url: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(url)
    assert configure(f"[sources.shop]\nurl_file = '{file}'\n", tmp_path).sources["shop"].url == Secret(url)


def test_f112_a_mirror_elsewhere_than_in_its_kind_of_database(tmp_path: Path) -> None:
    sink = f"{MINIMAL}[sinks.m]\nfrom = 'shop'\nurl = 'mongodb://me:geheim@db/shop'\n"
    assert refusal(sink, tmp_path) == "sinks.m.url: leads to mongodb, and a mirror of 'shop' is postgres"


def test_a_sink_of_another_kind_judges_its_url_itself(tmp_path: Path) -> None:
    text = f"{MINIMAL}[sinks.f]\nkind = 'data_changes'\nfrom = 'shop'\nurl = 'kafka://a:b/c'\n"
    path = tmp_path / "cdc.toml"
    path.write_text(text)
    assert load(path, {}, options_of=options_of).sinks["f"].url == Secret("kafka://a:b/c")


def test_f112_empty_file_of_a_token_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    text = f"[[http.tokens]]\nname = 'a'\nscopes = ['read']\ntoken_file = '{tmp_path}/token'\n"
    assert refusal(MINIMAL + text, tmp_path) == f"http.tokens[0].token_file: {tmp_path}/token: empty"


def test_url_and_url_file_exclude_each_other(tmp_path: Path) -> None:
    assert refusal(MINIMAL + "url_file = 'x'\n", tmp_path) == "sources.shop.url: excludes url_file"


@pytest.mark.parametrize(
    ("url", "backup"),
    [
        ("postgresql://me:pw@db:5433/shop?sslmode=require", "postgresql://me:pw@db:5433/shop_backup?sslmode=require"),
        ("postgresql://db/shop", "postgresql://db/shop_backup"),
    ],
)
def test_sink_without_url_is_a_backup_on_the_same_server(url: str, backup: str, tmp_path: Path) -> None:
    config = configure(f"[sources.shop]\nurl = '{url}'\n[sinks.m]\nfrom = 'shop'\n", tmp_path)
    assert config.sinks["m"].url == Secret(backup)


@pytest.mark.parametrize("url", ["postgresql://db", "host=db dbname=shop"])
def test_backup_needs_a_database_name(url: str, tmp_path: Path) -> None:
    text = f"[sources.shop]\nurl = '{url}'\n[sinks.m]\nfrom = 'shop'\n"
    assert refusal(text, tmp_path).startswith("sinks.m.url: missing")


def test_slot_and_publication_are_named_after_the_source(tmp_path: Path) -> None:
    source = configure(MINIMAL, tmp_path).sources["shop"]
    assert (source.name, source.slot, source.publication) == ("shop", "cdc_shop", "cdc_shop")


def test_row_filters_of_one_source_must_agree(tmp_path: Path) -> None:
    text = MINIMAL + "[sinks.a]\nfrom = 'shop'\ntables.'public.t'.where = 'x'\n[sinks.b]\nfrom = 'shop'\n"
    assert "differs between the sinks of source 'shop'" in refusal(text, tmp_path)


def test_target_names(tmp_path: Path) -> None:
    text = MINIMAL + "[sinks.m]\nfrom = 'shop'\nrename = {public = 'shop', 'public.a' = 'other.b'}\n"
    sink = configure(text, tmp_path).sinks["m"]
    assert sink.target_name(TableName("public", "a")) == TableName("other", "b")
    assert sink.target_name(TableName("public", "c")) == TableName("shop", "c")
    assert sink.target_name(TableName("sales", "c")) == TableName("sales", "c")


def test_globs_are_case_sensitive_and_excludes_win(tmp_path: Path) -> None:
    tables = configure(MINIMAL + "tables = {exclude = ['public.tmp_*']}\n", tmp_path).sources["shop"].tables
    assert tables.match(TableName("public", "orders"))
    assert not tables.match(TableName("public", "tmp_orders"))
    assert not tables.match(TableName("Public", "orders"))


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:geheim@db:5432/shop",
        "postgresql://me:ge%2Fheim@db/shop?sslpassword=geheim&x=1",
        "host=db user=me password=geheim",
        "host=db password = 'ge heim' user=me",
        "mongodb+srv://me:geheim@cluster/?authSource=admin",
    ],
)
def test_f113_secrets_do_not_show_themselves(text: str) -> None:
    secret = Secret(text)
    for shown in (str(secret), repr(secret), f"{secret}", f"{[secret]}", redact(text)):
        assert "heim" not in shown
        assert "me" in shown


def test_f113_config_can_be_printed(tmp_path: Path) -> None:
    tokens = "[[http.tokens]]\nname = 'ops'\ntoken = 'geheim=='\nscopes = ['admin']\n"
    text = tokens + MINIMAL + "[sinks.m]\nfrom = 'shop'\n"
    assert "geheim" not in repr(configure(text, tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "slots = 'x'\n",
        "[sources.shop]\nurl = 'postgresql://me:geheim@[db/shop'\n[sinks.m]\nfrom = 'shop'\n",
        "[sources.shop]\nurl = 'postgresql://me:geheim@db'\n[sinks.m]\nfrom = 'shop'\n",
    ],
)
def test_f113_errors_do_not_quote_secrets(text: str, tmp_path: Path) -> None:
    assert "geheim" not in refusal(text, tmp_path)


def test_parse_works_without_a_file() -> None:
    config = parse({"sources": {"shop": {"url": "postgresql://db/shop"}}}, {})
    assert [sink.name for sink in config.sinks_of("shop")] == []


def test_f98_what_is_refused_is_parked_on_mongodb_and_stops_postgres(tmp_path: Path) -> None:
    mongodb = '[sources.shop]\nurl = "mongodb://me:geheim@db/shop"\n[sinks.mirror]\nfrom = "shop"\n'
    postgres = f'{MINIMAL}[sinks.mirror]\nfrom = "shop"\n'
    assert configure(mongodb, tmp_path).sinks["mirror"].on_error == "park"
    assert configure(f'{mongodb}on_error = "stop"\n', tmp_path).sinks["mirror"].on_error == "stop"
    assert configure(postgres, tmp_path).sinks["mirror"].on_error == "stop"
    assert configure(f'{postgres}on_error = "park"\n', tmp_path).sinks["mirror"].on_error == "park"
    refusal(f'{postgres}on_error = "ignore"\n', tmp_path)


@pytest.mark.parametrize(
    ("source", "feed", "same"),
    [
        ("postgresql://h/shop", "postgres://H:5432/shop", True),
        ("postgresql:///shop", "postgresql:///shop", True),
        ("postgresql:///shop", "postgresql://127.0.0.1/shop", True),
        ("postgresql://u@/shop?host=/run/postgresql", "postgresql://localhost/shop", True),
        ("host=h dbname=shop", "postgresql://h/shop", True),
        ("postgresql://a,b/shop", "postgresql://b/shop", True),
        ("postgresql://h/shop", "postgresql://h:5433/shop", False),
        ("postgresql://h/shop", "postgresql://h/feeds", False),
        ("host=a dbname=shop", "host=b dbname=shop", False),
    ],
)
def test_a_feed_in_its_own_source_is_not_captured_however_it_is_written(source: str, feed: str, same: bool) -> None:
    raw = {"sources": {"shop": {"url": source}}, "sinks": {"c": {"kind": "data_changes", "from": "shop", "url": feed}}}
    config = parse(raw, {}, options_of=options_of)
    assert bool(config.own_tables(config.sources["shop"])) == same
