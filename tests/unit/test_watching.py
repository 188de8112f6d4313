"""What watches the daemon from outside: alerts, scrape configuration and dashboard speak of metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cdc.metrics import APPLY_SECONDS, LATENCY_SECONDS, OF_DAEMON, OF_HTTP, OF_STREAMS, registry
from cdc.queue import QueueStats
from cdc.stats import CaptureStats, CopyStatus, DeliveryStats, OplogStatus, ResyncStatus, SlotStats, State
from cdc.status import DaemonStatus, HttpStatus, StreamsStatus, snapshot

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
PROMETHEUS: Final = DEPLOY / "prometheus"
ADDED_BY_PROMETHEUS: Final = frozenset({"instance", "job"})


def everything() -> DaemonStatus:
    """A daemon of which each metric has a value: both kinds of sources, a copy and a resync."""
    queue = QueueStats(1, 10, 1.5, 7, 0, 100, 1000, full=False, min_free_bytes=50)
    slot = SlotStats("cdc_shop", wal_status="reserved", safe_bytes=9)
    shop = CaptureStats("shop", State.RUNNING, confirmed=90, server_end=100, slot=slot, last_commit_time=1.0)
    orders = CaptureStats("orders", State.RUNNING, oplog=OplogStatus(3600, 1800))
    mirror = DeliveryStats("mirror", "shop", State.RUNNING, position=80, parked=1, last_commit_time=1.0)
    mirror.copy = lambda: CopyStatus(1, 2, 3, 4, 5, 6)
    mirror.resync = ResyncStatus(1, 2, 3, 4, 0)
    sources: list[tuple[CaptureStats, QueueStats | None]] = [(shop, queue), (orders, queue)]
    return snapshot(version="1", started_at=1.0, sources=sources, sinks=[mirror])


def exposed() -> dict[str, dict[str, set[str]]]:
    """By the name of a metric as Prometheus sees it: its labels, and the values that each has."""
    for histogram in (APPLY_SECONDS, LATENCY_SECONDS):
        histogram.labels("mirror").observe(0.02)
    streams = StreamsStatus(1, {}, 2, 3, 4, "5", connected=True)
    found: dict[str, dict[str, set[str]]] = {}
    metrics = generate_latest(registry(everything, lambda: streams, lambda: HttpStatus(6.0)))
    for family in text_string_to_metric_families(metrics.decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


EXPOSED: Final = exposed()


class Expression(NamedTuple):
    """PromQL, where it stands, and what is shown of its result: text with labels in it."""

    where: str
    query: str
    shown: str


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    found = json.loads((DEPLOY / "grafana" / "cdc.json").read_text())
    assert isinstance(found, dict)
    return found


def expressions() -> Iterator[Expression]:
    for name, rule in alerts().items():
        yield Expression(name, rule["expr"], " ".join(rule["annotations"].values()).replace("$labels.", " $labels."))
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield Expression(panel["title"], target["expr"], target["legendFormat"])
    for annotation in dashboard()["annotations"]["list"]:
        yield Expression(annotation["name"], annotation["expr"], "")


def metrics_in(query: str) -> list[tuple[str, str]]:
    """Each metric of a query, beside what is in its braces."""
    return re.findall(r"\b((?:cdc|process)_\w+)(?:\{([^}]*)\})?", re.sub(r'job="cdc"', "", query))


def shown_labels(text: str) -> set[str]:
    return set(chain.from_iterable(re.findall(r"\{\{\s*(\w+)\s*\}\}|\$labels\.(\w+)", text))) - {""}


def matchers(braces: str) -> list[tuple[str, str, str]]:
    return re.findall(r'(\w+)(=~|=)"([^"]*)"', braces)


def test_the_sample_has_every_metric() -> None:
    """Else what follows would prove nothing."""
    wanted = {family.exposed_as for group in OF_DAEMON.values() for family in group}
    wanted |= {family.exposed_as for family in (*OF_HTTP, *OF_STREAMS)}
    assert wanted - set(EXPOSED) == set()


@pytest.mark.parametrize("expression", list(expressions()), ids=lambda expression: expression.where)
def test_each_expression_names_metrics_and_labels_that_exist(expression: Expression) -> None:
    found = metrics_in(expression.query)
    assert found or "up{" in expression.query, expression.query
    labels = set(ADDED_BY_PROMETHEUS)
    for name, braces in found:
        assert name in EXPOSED, f"{expression.where}: no metric is called {name}"
        labels |= set(EXPOSED[name])
        for label, operator, value in matchers(braces):
            if label in ADDED_BY_PROMETHEUS:
                continue
            assert label in EXPOSED[name], f"{expression.where}: {name} has no label {label}"
            values = value.split("|") if operator == "=~" else [value]
            assert set(values) <= EXPOSED[name][label], f"{expression.where}: {name} has no {label} {value}"
    grouping = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression.query)
    named = {label for group in grouping for label in re.findall(r"\w+", group)} | shown_labels(expression.shown)
    assert named - labels == set(), f"{expression.where}: no metric of it has these labels"


@pytest.mark.parametrize(
    "query",
    ["cdc_nothing > 1", 'cdc_sink_state{state="asleep"}', "cdc_queue_bytes{sink='a'}", "sum by (slot) (cdc_ready)"],
)
def test_a_wrong_expression_is_seen(query: str) -> None:
    with pytest.raises(AssertionError):
        test_each_expression_names_metrics_and_labels_that_exist(Expression("here", query.replace("'", '"'), ""))


def test_every_alert_says_what_to_do_and_how_urgent_it_is() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"critical", "warning"}, name
        assert set(rule["annotations"]) == {"summary", "description"}, name


def test_every_alert_has_a_test_that_sets_it_off() -> None:
    cases = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    tested = {
        match[1]
        for case in cases
        for each in case["promql_expr_test"]
        if each["exp_samples"] and (match := re.search(r'alertname="(\w+)"', each["expr"]))
    }
    assert tested == set(alerts())


def test_what_is_scraped_is_what_the_alert_looks_for() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["cdc"]
    assert 'up{job="cdc"}' in alerts()["CdcDown"]["expr"]
    assert config["rule_files"] == ["alerts.yml"]


def promtool(*arguments: str) -> str:
    found = shutil.which("promtool", path=str(Path(sys.executable).parent)) or shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool here (scripts/setup-promtool)")
    result = subprocess.run([found, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_alerts_are_set_off_by_what_they_are_for_and_by_nothing_else() -> None:
    promtool("test", "rules", "alerts.test.yml")


def test_prometheus_takes_the_configuration_and_its_rules() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "config", "prometheus.yml")


def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    """As recording rules, with what Grafana would put in for its variables."""
    rules = [
        {"record": f"query:{number}", "expr": each.query.replace("$__rate_interval", "1m").replace("$instance", ".*")}
        for number, each in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_panels_have_names_of_their_own_and_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"], (panel["title"], taken[x, y])
