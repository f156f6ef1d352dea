# SPDX-License-Identifier: Apache-2.0
"""`run --enforce`: the program under a memory cgroup of its budget, or with a line that says why not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from dualblade import DualBladeCache
from dualblade.errors import BudgetError, EnforcementError
from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.host.cgroup import own_cgroup
from dualblade.host.sysfs import Host
from dualblade.units import GIB, MIB

PROGRAM = [sys.executable, "-m", "dualblade.cli.main"]
RUN = [*PROGRAM, "run", "--model", "tiny", "--enforce", "--json"]
LONG = ["--prompt-len", "4000", "--batch-size", "8", "--max-new-tokens", "20"]  # 64 MiB of KV


def start(folder: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*before, *RUN, "--cache-dir", str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return dict(json.loads(out))


def cgroup_of(process: subprocess.Popen[str]) -> Path:
    own = own_cgroup(Host())
    assert own is not None
    return Path(own.directory) / f"dualblade-{process.pid}"


@pytest.mark.needs("cgroup_v1")
def test_a_tight_budget_is_kept_and_every_token_is_right(direct_dir: Path) -> None:
    """KV beyond the share, which the page cache fills, and the cgroup's own count of it all."""
    budget = 400 * MIB
    process = start(direct_dir, *LONG, "--mem-budget", "400M", "--verify")
    record = finished(process)
    memory, cgroup = record["memory"], record["memory"]["cgroup"]
    assert record["verified"] is True
    assert record["paths"]["direct"]["bytes"] > 0
    assert memory["enforced"] is True
    assert memory["advisory"] is None
    assert cgroup["version"] == 1
    assert cgroup["limit_bytes"] <= budget
    assert cgroup["peak_bytes"] <= cgroup["limit_bytes"]
    assert memory["peak_bytes"] <= budget
    assert cgroup["peak_bytes"] > 0.7 * budget  # what is charged to it is this run
    assert cgroup["oom_kills"] == 0
    assert not cgroup_of(process).exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--prompt-len", "3000", "--batch-size", "16", "--mem-budget", "380M"),
        ("--prompt-len", "4000", "--batch-size", "8", "--mem-budget", "400M", "--checksum"),
        ("--prompt-len", "1200", "--batch-size", "4", "--mem-budget", "340M", "--attention", "eager"),
    ],
)
def test_a_tight_budget_is_kept_where_nothing_enforces_it(direct_dir: Path, words: tuple[str, ...]) -> None:
    """By plan and governor alone, and sampled as the budget counts: no limit makes the kernel help."""
    record = finished(start(direct_dir, *words, "--no-enforce", "--max-new-tokens", "16"))
    memory = record["memory"]
    assert memory["enforced"] is False
    assert 0.5 * memory["budget_bytes"] < memory["peak_bytes"] <= memory["budget_bytes"]


@pytest.mark.needs("cgroup_v1")
def test_a_budget_that_is_too_small_is_refused_in_words(direct_dir: Path) -> None:
    """Not by the kernel's killer while libraries are loaded."""
    process = start(direct_dir, "--prompt", "x", "--mem-budget", "64M")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert "is needed" in err
    assert "--mem-budget" in err


@pytest.mark.needs("cgroup_v1")
def test_an_interrupt_leaves_no_cgroup(direct_dir: Path) -> None:
    process = start(direct_dir, *LONG, "--mem-budget", "1G")
    made = cgroup_of(process)
    give_up = time.monotonic() + 60
    while not made.exists():
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert not made.exists()


@pytest.mark.needs("root", "cgroup_v1")
def test_where_it_cannot_be_the_run_goes_on_and_says_so(direct_dir: Path) -> None:
    """Cgroups that may only be read, as most containers have them."""
    own = own_cgroup(Host())
    assert own is not None
    shell = f'mount --make-rprivate / && mount -o remount,bind,ro {own.top} && exec "$@"'
    process = start(
        direct_dir, "--prompt", "x", "--mem-budget", "1G", "--max-new-tokens", "2",
        before=("unshare", "-m", "sh", "-c", shell, "sh"),
    )  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    memory = json.loads(out)["memory"]
    assert (memory["enforced"], memory["cgroup"]) == (False, None)
    assert "is not writable by this user" in memory["advisory"]
    assert memory["peak_bytes"] > 0
    (line,) = [line for line in err.splitlines() if "not enforced" in line]
    assert memory["advisory"] in line
    assert "hint: " in err


# from Python --------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.needs("cgroup_v1")
def test_the_cache_enforces_until_it_is_closed(direct_dir: Path) -> None:
    before = own_cgroup(Host())
    with DualBladeCache(
        CONFIG, mem_budget=4 * GIB, max_tokens=64, batch_size=1, dtype=torch.float32, cache_dir=direct_dir,
        enforce=True,
    ) as cache:  # fmt: skip
        assert own_cgroup(Host()) != before
        report = cache.report()["memory"]
        assert report["enforced"] is True
        assert report["cgroup"]["limit_bytes"] == 4 * GIB - report["cgroup"]["outside_bytes"]
    assert own_cgroup(Host()) == before


@pytest.mark.needs("cgroup_v1")
def test_a_cache_that_is_refused_leaves_the_cgroup(direct_dir: Path) -> None:
    before = own_cgroup(Host())
    with pytest.raises(BudgetError):
        DualBladeCache(
            CONFIG, mem_budget=32 * MIB, max_tokens=64, batch_size=1, dtype=torch.float32,
            cache_dir=direct_dir, enforce=True,
        )  # fmt: skip
    assert own_cgroup(Host()) == before


def test_a_cache_that_cannot_enforce_warns(direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(host: object = None) -> BudgetCgroup:
        raise EnforcementError("/x is not writable by this user", "be root")

    monkeypatch.setattr(BudgetCgroup, "enter", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = DualBladeCache(
            CONFIG, mem_budget=4 * GIB, max_tokens=64, batch_size=1, dtype=torch.float32,
            cache_dir=direct_dir, enforce=True,
        )  # fmt: skip
    with cache:
        assert cache.report()["memory"]["enforced"] is False
    (said,) = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert said == "the memory budget is not enforced: /x is not writable by this user (be root)"
