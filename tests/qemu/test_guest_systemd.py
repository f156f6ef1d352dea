# SPDX-License-Identifier: Apache-2.0
"""A budget enforced through systemd, which is the first process of a container here: own process numbers,
mounts and cgroup tree, and not a single unit but what the tests ask it for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from drives import MIB, drives, wait_until

pytestmark = [pytest.mark.needs("qemu", "systemd"), pytest.mark.machine("iommu")]
TOP = Path("/sys/fs/cgroup")
BUDGET = 64 * MIB
RUN = """
import json, sys
from cgroup_work import facts, open_cold, read_through
from dualblade.errors import EnforcementError
from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.host.sysfs import Host
from dualblade.host.systemd_scope import start_again
budget = int(sys.argv[2])
try:
    group = BudgetCgroup.enter()
except EnforcementError:
    start_again(Host(), budget)
    raise
with group, open_cold(sys.argv[1]) as file:
    group.limit(budget)
    read_through(file, group)
    print(json.dumps(facts(group) | {"cgroup": group.own.directory}))
"""


class Systemd:
    """A manager in namespaces of its own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.cgroup = TOP / "systemd"
        (TOP / "cgroup.subtree_control").write_text("+memory")
        self.cgroup.mkdir()
        units = folder / "units"
        units.mkdir()
        (units / "default.target").write_text("[Unit]\nDefaultDependencies=no\n")
        inside = (
            f"echo $$ > {self.cgroup}/cgroup.procs && exec unshare --cgroup sh -c '"
            "umount /sys/fs/cgroup && mount -t cgroup2 cgroup /sys/fs/cgroup && "
            "mount -t tmpfs run /run/systemd && "
            "exec /lib/systemd/systemd --system --unit=default.target'"
        )
        words = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-c", inside]
        environment = os.environ | {"container": "test", "SYSTEMD_UNIT_PATH": str(units)}
        Path("/run/systemd").mkdir(exist_ok=True)
        with (folder / "log").open("wb") as log:
            self._unshare = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        wait_until("systemd answers", self._answers, 90)

    def _answers(self) -> bool:
        """Not before it is in namespaces of its own: until then systemctl says "offline"."""
        assert self._unshare.poll() is None, (self._folder / "log").read_text()
        said = self._call("systemctl", "is-system-running").stdout.strip() if self._children() else ""
        return said in ("starting", "running", "degraded")

    def _children(self) -> str:
        return Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().strip()

    def _call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", self._children(), "-p", "-m", "-C", *words],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """As from a login: in a cgroup with the shell."""
        at = "/sys/fs/cgroup/session"
        login = f'mkdir -p {at} && echo $$ >{at}/cgroup.procs && "$@"; exit $?'
        return self._call("sh", "-c", login, "sh", *map(str, words))

    def stop(self) -> None:
        self._unshare.send_signal(signal.SIGKILL)
        self._unshare.wait()
        for folder in sorted(self.cgroup.glob("**/"), reverse=True):
            wait_until(f"{folder} is empty", lambda: not (folder / "cgroup.procs").read_text())  # noqa: B023
            folder.rmdir()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    manager = Systemd(tmp_path)
    yield manager
    manager.stop()


def test_the_run_starts_again_in_a_scope(systemd: Systemd, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    done = systemd.run(sys.executable, script, drives()["BLANK0"].block, BUDGET)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    record = json.loads(done.stdout)
    assert record["description"] == "a systemd scope of its own"
    assert record["cgroup"].endswith(".scope")
    assert record["limit_bytes"] == BUDGET
    assert record["outside_bytes"] == 0
    assert 0.8 * BUDGET < record["peak_bytes"] <= BUDGET
    assert record["over_high"] > 0
    assert record["oom_kills"] == 0
    wait_until("systemd has removed the scope", lambda: not list(TOP.glob("systemd/**/dualblade-*")))
