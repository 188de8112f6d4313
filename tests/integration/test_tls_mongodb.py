"""TLS to MongoDB: with and without a certificate of the client, and what is said where that cannot work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import pymongo
import pytest

from cdc.api.client import Client
from tests.command import Cdc
from tests.mongod.fixture import NewStandIn
from tests.mongod.process import StandIn
from tests.processes import wait_until
from tests.tls import HOST, Authority

CERTIFICATES_HINT: Final = "until when the certificates are valid"


@pytest.fixture
def server(new_stand_in: NewStandIn, authority: Authority) -> StandIn:
    """Wants a certificate of its clients."""
    pair = authority.issue("mongod")
    return new_stand_in("--tls-certificate-key-file", str(pair.in_one_file), "--tls-ca-file", str(authority.file))


def url(server: StandIn, **options: object) -> str:
    return f"mongodb://{HOST}:{server.port}/shop?{urlencode({'replicaSet': 'rs0', 'tls': 'true', **options})}"


def test_copy_and_stream_by_certificates(cdc: Cdc, server: StandIn, authority: Authority) -> None:
    robot = authority.issue("robot").in_one_file
    shop = url(server, tlsCAFile=authority.file, tlsCertificateKeyFile=robot)
    with pymongo.MongoClient[dict[str, Any]](shop) as client:
        client.shop.items.insert_one({"_id": 1, "name": "copied"})
        cdc.configure(shop)
        checked = cdc("check")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with cdc.running():
            daemon = Client((cdc.data_dir / "http").read_text())
            wait_until(lambda: daemon.status().sinks["mirror"].state == "running", what=lambda: cdc.log)
            client.shop.items.insert_one({"_id": 2, "name": "streamed"})
            mirror = client.shop_backup.items
            wait_until(lambda: mirror.count_documents({}) == 2, what=lambda: cdc.log)
            verified = cdc("verify")
            assert verified.returncode == 0, verified.stdout + verified.stderr


def test_what_is_refused_is_said_in_one_line(cdc: Cdc, server: StandIn, authority: Authority, tmp_path: Path) -> None:
    """All in one configuration, since each starts alone."""
    other = Authority(tmp_path, "other")
    robot = authority.issue("robot")
    cases: dict[str, tuple[dict[str, object], str]] = {
        "other_authority": ({"tlsCertificateKeyFile": robot.in_one_file, "tlsCAFile": other.file}, "VERIFY_FAILED"),
        "no_key": ({"tlsCertificateKeyFile": robot.certificate}, "tlsCertificateKeyFile cannot be used"),
        "missing": ({"tlsCertificateKeyFile": tmp_path / "missing.pem"}, "missing.pem: No such file"),
    }
    trusted = {"tlsCAFile": authority.file, "serverSelectionTimeoutMS": 2000}
    cdc.configure_sources({name: url(server, **{**trusted, **options}) for name, (options, _) in cases.items()})
    checked, run = cdc("check", "--json"), cdc("run")
    assert (checked.returncode, run.returncode) == (1, 1), run.stderr
    failed = [json.loads(line) for line in run.stderr.splitlines() if '"event": "failed"' in line]
    for name, (_, error) in cases.items():
        finding = last_findings(checked.stdout)[f"source {name}"]
        said = [(line["error"], line["hint"]) for line in failed if line["name"] == name]
        assert said == [(finding["message"], finding["fix"])], name
        assert error in finding["message"]
        assert CERTIFICATES_HINT in finding["fix"]
    assert "Traceback" not in checked.stderr + run.stderr


def test_certificate_of_ours_that_the_server_does_not_take(
    cdc: Cdc, server: StandIn, authority: Authority, tmp_path: Path
) -> None:
    """Some servers say why, others hang up: then it is tried again."""
    stranger, late = Authority(tmp_path, "other").issue("robot"), authority.issue("late", expired=True)
    shown: dict[str, dict[str, object]] = {"none": {}, "strangers": {"tlsCertificateKeyFile": stranger.in_one_file}}
    shown["expired"] = {"tlsCertificateKeyFile": late.in_one_file}
    trusted = {"tlsCAFile": authority.file, "serverSelectionTimeoutMS": 500}
    cdc.configure_sources({name: url(server, **trusted, **options) for name, options in shown.items()})
    checked = cdc("check", "--json")
    assert checked.returncode == 1
    for name in shown:
        finding = last_findings(checked.stdout)[f"source {name}"]
        assert re.search(f"hangs up|{CERTIFICATES_HINT}", finding["fix"]), finding


def last_findings(checked: str) -> dict[str, dict[str, str]]:
    """By the title of their section."""
    return {section["title"]: section["findings"][-1] for section in json.loads(checked)["sections"]}
