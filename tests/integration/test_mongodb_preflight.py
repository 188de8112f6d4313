"""What `cdc check` says of MongoDB: of sources and of mirrors."""

from __future__ import annotations

from typing import Any

import pymongo
import pytest

from cdc import kinds
from cdc.config import Config
from cdc.mongodb.preflight_sink import _allows
from cdc.preflight import Finding, collect
from tests.mongo_source import configure
from tests.mongod.fixture import NewStandIn
from tests.mongod.process import StandIn

Client = pymongo.MongoClient[dict[str, Any]]


def of_source(config: Config) -> list[Finding]:
    source = config.sources["shop"]
    return list(collect("source", kinds.preflight(source.kind).check_source(config, source)).findings)


def of_sink(config: Config, name: str = "mirror") -> list[Finding]:
    sink = config.sinks[name]
    return list(collect("sink", kinds.preflight(sink.kind).check_sink(config, sink)).findings)


def only(findings: list[Finding], *levels: str) -> list[Finding]:
    return [finding for finding in findings if finding.level in levels]


@pytest.fixture
def shop(stand_in_client: Client) -> Any:
    """A database `shop` with two collections."""
    database = stand_in_client.shop
    database.orders.insert_one({"_id": 1})
    database.customers.insert_one({"_id": 1})
    yield database
    for name in ("shop", "shop_backup"):
        stand_in_client.drop_database(name)


def test_all_is_well(stand_in: StandIn, shop: Any) -> None:
    findings = of_source(configure(stand_in.url, "shop.*"))
    assert not only(findings, "error")
    assert {finding.subject for finding in findings} >= {"server", "collections", "change stream", "reading", "oplog"}
    assert any(finding.message == "2 captured" for finding in findings)


def test_one_of_several_globs_that_fits_nothing(stand_in: StandIn, shop: Any) -> None:
    findings = of_source(configure(stand_in.url, "shop.*", "nope.*", "shop.order"))
    (finding,) = (each for each in findings if each.subject == "collections")
    assert (finding.level, finding.message) == ("warning", "2 captured, of which none matches nope.*, shop.order")
    assert "sources.shop.tables.include" in finding.fix


def test_nobody_answers() -> None:
    (finding,) = of_source(configure("mongodb://me:geheim@127.0.0.1:1/shop?serverSelectionTimeoutMS=100"))
    assert finding.level == "error"
    assert "Connection refused" in finding.message
    assert "geheim" not in f"{finding}"


def test_standalone_as_source_and_target(new_stand_in: NewStandIn, stand_in: StandIn) -> None:
    url = new_stand_in("--standalone").url
    (finding,) = of_source(configure(url, "shop.*"))
    assert "rs.initiate()" in finding.fix
    sinks = {"mirror": {"from": "shop", "url": url}}
    assert "rs.initiate()" in only(of_sink(configure(stand_in.url, "shop.*", sinks=sinks)), "error")[0].fix


@pytest.mark.parametrize(("tables", "level"), [(("shop.*",), "warning"), (("shop.view",), "error")])
def test_f78_views_and_time_series_are_named(stand_in: StandIn, shop: Any, tables: tuple[str], level: str) -> None:
    shop.create_collection("view", viewOn="orders", pipeline=[])
    shop.create_collection("series", timeseries={"timeField": "t"})
    found = {finding.subject: finding.level for finding in of_source(configure(stand_in.url, *tables))}
    assert found["shop.view"] == level
    if level == "warning":
        assert found["shop.series"] == "warning"


def test_f69_images_that_are_not_recorded(stand_in: StandIn, shop: Any) -> None:
    shop.create_collection("kept", changeStreamPreAndPostImages={"enabled": True})
    found = only(of_source(configure(stand_in.url, "shop.*", full_document_before_change="required")), "error")
    assert {finding.subject for finding in found} == {"shop.orders", "shop.customers"}
    assert "collMod: 'orders'" in {finding.subject: finding.fix for finding in found}["shop.orders"]
    found = of_source(configure(stand_in.url, "shop.orders", full_document="whenAvailable"))
    assert [finding.subject for finding in only(found, "warning")][-1:] == ["shop.orders"]


def test_options_that_the_server_does_not_know(new_stand_in: NewStandIn) -> None:
    url = new_stand_in("--version", "5.0").url
    (finding,) = only(of_source(configure(url, "shop.*", full_document_before_change="required")), "error")
    assert "5.0" in finding.message
    assert not only(of_source(configure(url, "shop.*")), "error")


def test_missing_privilege_is_found_by_trying(stand_in: StandIn, shop: Any) -> None:
    data = {"failCommands": ["aggregate"], "errorCode": 13, "appName": "cdc check"}
    stand_in.command("configureFailPoint", "failCommand", mode={"times": 1}, data=data)
    (finding,) = only(of_source(configure(stand_in.url, "shop.*")), "error")
    assert (finding.subject, "grant" in finding.fix) == ("change stream", True)


def test_mirror_is_ready(stand_in: StandIn, shop: Any) -> None:
    sinks = {"mirror": {"from": "shop", "url": stand_in.url, "rename": {"shop": "shop_backup"}}}
    assert not only(of_sink(configure(stand_in.url, "shop.*", sinks=sinks)), "error", "warning")


def test_f117_mirror_into_itself_is_refused(stand_in: StandIn, shop: Any) -> None:
    sinks: dict[str, Any] = {"mirror": {"from": "shop", "url": stand_in.url.replace("127.0.0.1", "localhost")}}
    (finding,) = only(of_sink(configure(stand_in.url, "shop.*", sinks=sinks)), "error")
    assert "the same collections as the source: shop.customers, shop.orders" in finding.message


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_f117_mirror_into_what_is_captured_is_refused(stand_in: StandIn, shop: Any, host: str) -> None:
    """Also where the two URLs name the server in ways that only it knows to be one."""
    url = stand_in.url.replace("127.0.0.1", host)
    sinks: dict[str, Any] = {"mirror": {"from": "shop", "url": url, "rename": {"shop.orders": "shop.customers"}}}
    found = only(of_sink(configure(stand_in.url, "shop.orders", "shop.customers", sinks=sinks)), "error")
    assert any("captures itself: shop.orders" in finding.message for finding in found)


def test_two_sinks_into_one_target(stand_in: StandIn, shop: Any) -> None:
    one = {"from": "shop", "url": stand_in.url, "rename": {"shop": "shop_backup"}}
    config = configure(stand_in.url, "shop.*", sinks={"mirror": one, "again": one})
    (finding,) = only(of_sink(config), "error")
    assert "sink again writes to the same: shop_backup.customers, shop_backup.orders" in finding.message


@pytest.mark.parametrize(
    ("resource", "allowed"),
    [
        ({"db": "shop", "collection": ""}, True),
        ({"db": "", "collection": ""}, True),
        ({"anyResource": True}, True),
        ({"db": "other", "collection": ""}, False),
        ({"db": "shop", "collection": "orders"}, False),
        ({"cluster": True}, False),
    ],
)
def test_privileges_by_resource(resource: dict[str, Any], *, allowed: bool) -> None:
    assert _allows([{"resource": resource, "actions": ["insert"]}], "shop", "insert") == allowed
    assert not _allows([{"resource": resource, "actions": ["find"]}], "shop", "insert")
