"""The daemon by the rules of deploy/cdc.service, as far as these can be had without systemd.

Another user, no capabilities, a credential that only he can read, and nothing to write to but the data directory and a
folder for temporary files. Not here: what a kernel filters for the unit (SystemCallFilter, MemoryDenyWriteExecute).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.command import CHECKOUT
from tests.fences import read_only_but, unprivileged
from tests.processes import UNPRIVILEGED_USER, kill_tree, wait_until
from tests.servers import Database
from tests.service_manager import ServiceManager

CONFIG: Final = """
[daemon]
data_dir = "{data}"
[http]
address = "127.0.0.1:0"
[queue]
min_free_bytes = 0
[sources.shop]
url_file = "${{CREDENTIALS_DIRECTORY}}/shop_url"
pg_dump = "{pg_dump}"
[sinks.mirror]
from = "shop"
url = "{target}"
[sinks.changes]
kind = "data_changes"
from = "shop"
"""


class Service:
    """Commands as the unit has them run. Its folders stand for /etc/cdc, /var/lib/cdc, the credentials and /tmp."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self.etc, self.data, self.credentials, self.temporary = (
            folder / name for name in ("etc", "data", "credentials", "tmp")
        )
        user = pwd.getpwnam(UNPRIVILEGED_USER)
        for path, mode in ((self.etc, 0o755), (self.data, 0o700), (self.credentials, 0o500), (self.temporary, 0o700)):
            path.mkdir(mode)
            if path != self.etc:
                os.chown(path, user.pw_uid, user.pw_gid)
        self._user = user
        self._fences = read_only_but(folder, self.data, self.temporary, mapping=())
        self._command = [python, "-c", "import cli; cli.main()"]

    def configure(self, text: str, shop_url: str) -> None:
        """The configuration is root's, and the group's to read; the credential is the user's alone."""
        config, credential = self.etc / "cdc.toml", self.credentials / "shop_url"
        config.write_text(text)
        os.chown(config, 0, self._user.pw_gid)
        config.chmod(0o640)
        credential.write_text(shop_url)
        os.chown(credential, self._user.pw_uid, self._user.pw_gid)
        credential.chmod(0o400)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        surroundings = {
            "CDC_CONFIG": str(self.etc / "cdc.toml"),
            "CREDENTIALS_DIRECTORY": str(self.credentials),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            **environment,
        }
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                [*self._fences, *unprivileged(), *self._command, *arguments],
                cwd="/", env=surroundings, stdout=log, stderr=log, text=True, umask=0o077,
            )  # fmt: skip

    def run(self, *arguments: str) -> int:
        return self.start(*arguments).wait(timeout=60)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


def python_path() -> str:
    return f"{CHECKOUT}:{sysconfig.get_path('purelib')}"


def python_of_everybody() -> str | None:
    """An interpreter that the other user may run, with what is installed here."""
    version = "python{}.{}".format(*sys.version_info)
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        command = [*unprivileged(), python, "-c", "import cli"]
        environment = {"PYTHONPATH": python_path(), "PYTHONDONTWRITEBYTECODE": "1"}
        if Path(python).exists() and not subprocess.run(command, cwd="/", env=environment, check=False).returncode:
            return python
    return None


@pytest.fixture
def service() -> Iterator[Service]:
    if not unprivileged():
        pytest.skip("only root, with setpriv, can let another user run the daemon")
    if (python := python_of_everybody()) is None:
        pytest.skip(f"{UNPRIVILEGED_USER} may not run this Python")
    folder = Path(tempfile.mkdtemp(prefix="cdc-service-"))  # that of pytest is closed to others
    folder.chmod(0o755)
    yield Service(folder, python)
    shutil.rmtree(folder)


def test_another_user_runs_it_where_nearly_all_is_read_only(
    service: Service, source_db: Database, target_db: Database, pg_dump: Path
) -> None:
    source_db.execute("CREATE TABLE items (id int PRIMARY KEY); INSERT INTO items VALUES (1)")
    service.configure(CONFIG.format(data=service.data, pg_dump=pg_dump, target=target_db.url), source_db.url)
    assert service.run("check") == 0, service.log
    with ServiceManager(service.folder) as manager:
        (service.folder / "notify").chmod(0o777)
        daemon = service.start("run", **manager.environment(30))
        try:
            manager.hear("READY=1")
            wait_until(lambda: copied(target_db), what=lambda: service.log)
            rights = Path(f"/proc/{daemon.pid}/status").read_text()
            assert "NoNewPrivs:\t1\n" in rights
            assert all(f"{kind}:\t0000000000000000\n" in rights for kind in ("CapEff", "CapPrm", "CapBnd"))
            assert service.run("status") == 0, service.log
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(timeout=30) == 0, service.log
        finally:
            kill_tree(daemon.pid)
            daemon.wait()
    left = sorted(service.data.iterdir())
    assert [path.name for path in left] == ["data_changes.sqlite", "lock", "shop.queue"]
    assert {path.owner() for path in left} == {UNPRIVILEGED_USER}
    assert {stat.S_IMODE(path.stat().st_mode) for path in left} == {0o600}
    assert list(service.temporary.iterdir()) == []


def copied(target: Database) -> bool:
    return target.value("SELECT to_regclass('items')") is not None and target.value("SELECT count(*) FROM items") == 1
