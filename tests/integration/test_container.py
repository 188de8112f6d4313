"""The container and what is started beside it, as far as that goes without a container engine.

What the image's files say is done here by hand: its commands are run where nothing can be written but the data
directory and a folder for temporary files, with the configuration of compose.yaml, between servers that its own script
has prepared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from cdc import config_file
from cdc.config import Config
from sinks import options_of
from tests.fences import read_only_but
from tests.processes import free_port, kill_tree, wait_until
from tests.servers import PostgresServer, binaries

CHECKOUT: Final = Path(__file__).parents[2]
DEPLOY: Final = CHECKOUT / "deploy"
PORT: Final = "8642"
SECRETS: Final = {
    "CDC_PASSWORD": "geheim",
    "CDC_ADMIN_TOKEN": "open-sesame",
    "CDC_METRICS_TOKEN": "only-numbers",
    "POSTGRES_PASSWORD": "streng-geheim",
    "GRAFANA_PASSWORD": "bunt",
}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, in order; continued lines are one."""
    text = re.sub(r"^\s*#.*\n", "", (CHECKOUT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def stages() -> list[dict[str, list[str]]]:
    """Arguments by instruction; the last is what is shipped. What stands before the first FROM is its own."""
    found: list[dict[str, list[str]]] = [{}]
    for name, arguments in instructions():
        if name == "FROM":
            found.append({})
        found[-1].setdefault(name, []).append(arguments)
    return found[1:]


def health_check() -> list[str]:
    (check,) = stages()[-1]["HEALTHCHECK"]
    argv = json.loads(check.partition("CMD ")[2])
    assert isinstance(argv, list)
    return argv


def compose() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(found, dict)
    return found


def mounts(service: str) -> list[tuple[str, str]]:
    """What of this checkout a service sees, and where."""
    volumes = (volume.split(":") for volume in compose()["services"][service].get("volumes", []))
    return [(source, target) for source, target, *_ in volumes if source.startswith(".")]


def composed_config() -> Config:
    return config_file.load(DEPLOY / "compose" / "cdc.toml", SECRETS, options_of=options_of)


def test_the_dockerfile_keeps_to_the_rules() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    result = subprocess.run([linter, CHECKOUT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_what_is_shipped_is_not_root_and_has_no_compiler() -> None:
    build, shipped = stages()
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", shipped["USER"][-1])
    assert any("gcc" in command for command in build["RUN"])
    assert not any("gcc" in command for command in shipped["RUN"])
    assert shipped["COPY"] == ["--from=build /opt/cdc /opt/cdc"]
    assert shipped["VOLUME"] == [config_file.parse({"sources": {}}, {}).daemon.data_dir]


def test_everything_that_is_packaged_reaches_the_build() -> None:
    """And nothing else: neither tests nor what somebody has lying about."""
    ignored = [line for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for arguments in stages()[0]["COPY"] for name in arguments.split()[:-1]}
    assert ignored[0] == "*"
    assert copied == let_in
    assert all((CHECKOUT / name).exists() for name in copied)
    tracked = subprocess.run(["git", "ls-files", *copied], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    patterns = [line.removeprefix("**/") for line in ignored if line.startswith("**/")]
    lost = [file for file in tracked.stdout.split() if any(fnmatchcase(Path(file).name, each) for each in patterns)]
    assert lost == []


def test_what_is_mounted_is_there() -> None:
    for service in compose()["services"]:
        for source, _ in mounts(service):
            assert (DEPLOY / source).exists(), f"{service}: {source}"


def test_services_volumes_secrets_and_variables_are_known() -> None:
    whole = compose()
    for name, service in whole["services"].items():
        assert set(service.get("depends_on", [])) <= set(whole["services"]), name
        assert set(service.get("secrets", [])) <= set(whole["secrets"]), name
        named = {volume.split(":")[0] for volume in service.get("volumes", []) if volume[0] not in "./"}
        assert named <= set(whole["volumes"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), f"{name} is open to everybody"
        assert "image" not in service or re.search(r":[^:]*\d", service["image"]), f"{name}: any version"
    text = (DEPLOY / "compose.yaml").read_text()
    wanted = set(re.findall(r"\$\{(\w+)", text)) | {each["environment"] for each in whole["secrets"].values()}
    assert wanted == set(re.findall(r"^(\w+)=$", (DEPLOY / ".env.example").read_text(), re.MULTILINE)) == set(SECRETS)


def test_the_daemon_is_fenced_in() -> None:
    daemon = compose()["services"]["cdc"]
    assert daemon["read_only"]
    assert daemon["cap_drop"] == ["ALL"]
    assert daemon["security_opt"] == ["no-new-privileges:true"]
    assert daemon["tmpfs"] == ["/tmp"]
    assert float(daemon["stop_grace_period"].removesuffix("s")) > composed_config().daemon.drain_seconds


def test_addresses_are_those_of_services() -> None:
    config, services = composed_config(), compose()["services"]
    hosts = [re.findall(r"(?:@|//)(\w+)/", source.url.reveal()) for source in config.sources.values() if source.url]
    assert sorted(host for found in hosts for host in found) == ["mongodb", "postgres"]
    assert config.http.address.rpartition(":")[2] == PORT == stages()[-1]["EXPOSE"][0]
    assert ("./compose/cdc.toml", "/etc/cdc/cdc.toml") in mounts("cdc")
    assert "CDC_CONFIG=/etc/cdc/cdc.toml" in stages()[-1]["ENV"][0]
    scraped = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
    ((targets,),) = ([each["static_configs"][0]["targets"]] for each in scraped["scrape_configs"])
    assert targets == [f"cdc:{PORT}"]
    assert {target for _, target in mounts("prometheus")} == {
        f"/etc/prometheus/{n}.yml" for n in ("prometheus", "alerts")
    }
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"].removeprefix("http://").partition(":")[0] in services
    folder = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/cdc.yml").read_text())["providers"][0]
    assert ("./grafana/cdc.json", f"{folder['options']['path']}/cdc.json") in mounts("grafana")


@pytest.fixture
def prepared() -> Iterator[PostgresServer]:
    """A server that the script of compose.yaml has prepared."""
    with PostgresServer(18) as server:
        surroundings = {**SECRETS, "POSTGRES_USER": "postgres", "PGHOST": "127.0.0.1", "PGPORT": str(server.port)}
        path = f"{binaries(18)}:{os.environ['PATH']}"
        subprocess.run([DEPLOY / "compose" / "postgres.sh"], env={"PATH": path, **surroundings}, check=True)
        yield server


class Container:
    """The image's commands, with its environment, on other paths and another port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.data_dir, self.config = folder / "data", folder / "cdc.toml"
        self.temporary = folder / "tmp"
        self.data_dir.mkdir()
        self.temporary.mkdir()

    def run(self, argv: list[str]) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{binaries(18)}:/usr/bin:/bin",
            "CDC_CONFIG": str(self.config),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self.temporary),
            **SECRETS,
        }
        command = [*read_only_but(self.folder, self.data_dir, self.temporary), *argv]
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, cwd=self.data_dir)

    def healthy(self) -> bool:
        argv = [argument.replace(PORT, str(self.port)) for argument in health_check()]
        return self.run(argv).wait(timeout=30) == 0

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def container(tmp_path: Path, prepared: PostgresServer, mongodb: str) -> Container:
    port = free_port()
    container = Container(tmp_path, port)
    text = (DEPLOY / "compose" / "cdc.toml").read_text()
    for one, other in {
        "/var/lib/cdc": str(container.data_dir),
        f"0.0.0.0:{PORT}": f"127.0.0.1:{port}",
        "@postgres/": f"@127.0.0.1:{prepared.port}/",
        "mongodb://mongodb/ordersDB": mongodb.replace("/?", f"/container_{port}?").partition("?")[0],
    }.items():
        assert one in text, one
        text = text.replace(one, other)
    container.config.write_text(text)
    return container


def test_entry_point_health_check_and_stop(container: Container, prepared: PostgresServer) -> None:
    (entry,), (command,) = (map(json.loads, stages()[-1][name]) for name in ("ENTRYPOINT", "CMD"))
    assert container.run([*entry, "check"]).wait(timeout=60) == 0, container.log
    assert not container.healthy()
    daemon = container.run([*entry, *command])
    try:
        wait_until(container.healthy, what=lambda: f"the health check to pass: {container.log}")
        wait_until(lambda: copied(prepared), what=lambda: f"the copy: {container.log}")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=30) == 0, container.log
        assert not container.healthy()
    finally:
        kill_tree(daemon.pid)
    assert not any(secret in container.log for secret in SECRETS.values())


def copied(server: PostgresServer) -> bool:
    with server.connect("shop_backup") as connection:
        if connection.execute("SELECT to_regclass('orders')").fetchall() == [(None,)]:
            return False
        return connection.execute("SELECT count(*) FROM orders").fetchall() == [(2,)]
