# SPDX-License-Identifier: Apache-2.0
"""Where a run can have a memory cgroup of its own, if anywhere. Looks, and changes nothing."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from dualblade.errors import ConfigError, EnforcementError
from dualblade.host.cgroup import OURS, OwnCgroup, is_top, levels_of, own_cgroup
from dualblade.host.command import as_root
from dualblade.host.sysfs import Host

SYSTEMD = "/run/systemd/system"  # there where systemd is the first process
_SCOPE = "systemd-run --user --scope -p Delegate=yes dualblade-spdk run --enforce ..."
_CONTAINER = "give the container the limit: docker run --memory 6G"


@dataclass(frozen=True, slots=True)
class Way:
    """own: the cgroup that the process is in. parent: where the new one is made; None where `own` was made
    for this run already. enable: its children have no memory controller yet. disable: they must lose it
    before the process can go back, as v2 allows processes in leaves alone. words: for people."""

    own: OwnCgroup
    parent: str | None
    words: str
    enable: bool = False
    disable: bool = False


def find_way(host: Host) -> Way:
    """Raises EnforcementError: why there is none, and what would make one."""
    try:
        own = own_cgroup(host)
    except ConfigError as error:
        raise EnforcementError(error.message, error.hint) from error
    if own is None:
        raise EnforcementError(
            "no memory cgroup is over this process", "boot the kernel with cgroup_enable=memory"
        )
    if _made_for_this_process(own):
        return _scope_way(host, own)
    return _v1_way(host, own) if own.version == 1 else _v2_way(host, own)


def _made_for_this_process(own: OwnCgroup) -> bool:
    match = OURS.fullmatch(own.directory.rpartition("/")[2])
    return match is not None and int(match[1]) == os.getpid()


def _scope_way(host: Host, own: OwnCgroup) -> Way:
    if "memory" not in _words(host, f"{own.directory}/cgroup.controllers"):
        raise EnforcementError(
            "the scope that systemd made has no memory controller",
            "let systemd pass it on: Delegate=memory pids in a drop-in for user@.service",
        )
    return Way(own, None, "a systemd scope of its own")


def _v1_way(host: Host, own: OwnCgroup) -> Way:
    if host.writable(own.directory):
        return Way(own, own.directory, "a v1 cgroup below its former one")
    raise _not_writable(own.directory, _v1_hint(own.directory))


def _v2_way(host: Host, own: OwnCgroup) -> Way:
    """Below the own cgroup where no other process is in it, or it is the top, which may hold both; else
    beside it, where no systemd rules and it sets no limit that would be escaped."""
    top = is_top(host, 2, own.directory)
    reasons = [_against_child(host, own, top), _against_sibling(host, own)]
    if reasons[0] is None:
        enable = "memory" not in _words(host, f"{own.directory}/cgroup.subtree_control")
        return Way(own, own.directory, "a v2 cgroup below its former one", enable, disable=enable and not top)
    if reasons[1] is None:
        return Way(own, _parent(own), "a v2 cgroup beside its former one")
    raise EnforcementError(f"{reasons[0]}, and {reasons[1]}", _v2_hint(host, own))


def _against_child(host: Host, own: OwnCgroup, top: bool) -> str | None:
    """Why no cgroup can be made below the own one, or None."""
    at = own.directory
    if not all(map(host.writable, (at, f"{at}/cgroup.procs", f"{at}/cgroup.subtree_control"))):
        return f"{at} is not writable by this user"
    if "memory" not in _words(host, f"{at}/cgroup.controllers"):
        return f"{at} has no memory controller"
    others = set(_words(host, f"{at}/cgroup.procs")) - {str(os.getpid())}
    if others and not top:
        return f"{at} holds {len(others)} other processes, which v2 allows in leaves alone"
    return None


def _against_sibling(host: Host, own: OwnCgroup) -> str | None:
    """Why no cgroup can be made beside the own one, or None."""
    if host.exists(SYSTEMD):
        return "beside it only systemd makes cgroups"
    if own.directory == own.top:
        return "what is above it is not to be seen"
    parent = _parent(own)
    if not all(map(host.writable, (parent, f"{parent}/cgroup.procs"))):
        return f"{parent} is not writable either"
    if "memory" not in _words(host, f"{parent}/cgroup.subtree_control"):
        return f"{parent} gives its children no memory controller"
    if own_limit(host, own):
        return f"beside it the run would escape the limit that {own.directory} sets"
    return None


def own_limit(host: Host, own: OwnCgroup) -> bool:
    """Whether the process's own cgroup, not one above it, sets a limit."""
    return any(level.limit is not None for level in levels_of(host, own) if level.path == own.directory)


# words --------------------------------------------------------------------------------------


def _not_writable(directory: str, hint: str) -> EnforcementError:
    return EnforcementError(f"{directory} is not writable by this user", hint)


def _v1_hint(directory: str) -> str:
    """A cgroup for the shell from which this was started; v1 lets a user move their own processes."""
    if os.geteuid() == 0:
        return _CONTAINER
    own = shlex.quote(f"{directory}/{_user()}")
    made = f"mkdir {own} && chown -R {os.getuid()} {own} && echo {os.getppid()} > {own}/cgroup.procs"
    return as_root(["sh", "-c", made])


def _v2_hint(host: Host, own: OwnCgroup) -> str:
    if host.exists(SYSTEMD):
        return _SCOPE if os.geteuid() else _SCOPE.replace("--user ", "")
    if os.geteuid() == 0:
        return _CONTAINER
    tree = shlex.quote(f"{own.top}/{_user()}")
    steps = [
        f"mkdir -p {tree}/shell", f"echo +memory > {shlex.quote(own.top)}/cgroup.subtree_control",
        f"echo +memory > {tree}/cgroup.subtree_control", f"chown -R {os.getuid()} {tree}",
        f"echo {os.getppid()} > {tree}/shell/cgroup.procs",
    ]  # fmt: skip
    return as_root(["sh", "-c", " && ".join(steps)])


def _user() -> str:
    return f"user-{os.getuid()}"


def _parent(own: OwnCgroup) -> str:
    return own.directory.rpartition("/")[0]


def _words(host: Host, path: str) -> list[str]:
    return host.attribute(path).split()
