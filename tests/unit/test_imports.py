# SPDX-License-Identifier: Apache-2.0
"""The walls of the house: who may import whom, checked over the real files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ("dualblade", "spdk_glue")
    for path in (ROOT / top).rglob("*.py")
)
PURE = (
    "governor.py",
    "cycle.py",
    "revision.py",
    "governor_trace.py",
    "layout.py",
    "extents.py",
    "cost.py",
    "groups.py",
    "stream_choice.py",
)
MODEL_SIDE = (
    "attention.py",
    "checkpoint.py",
    "handles.py",
    "hf.py",
    "layers.py",
    "loading.py",
    "models.py",
    "prefill.py",
    "runner.py",
    "streaming.py",
    "bench/",
)
HEAVY = {"torch", "transformers"}


def imports(source: str, file: str) -> set[str]:
    """Dotted names of everything that is imported, wherever in the file; `from a import b` gives a.b too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source, file)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, file)
            found.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            found.update(
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )
    return found


def _base(node: ast.ImportFrom, file: str) -> str:
    if not node.level:
        return node.module or ""
    package = file.split("/")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def reads_environment(source: str) -> bool:
    names = {"environ", "environb", "getenv", "getenvb", "expandvars", "putenv"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names and _name(node.value) in ("os", "path"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "os.path"):
            found = {alias.name for alias in node.names}
            if found & names:
                return True
    return False


def under(file: str, *places: str) -> bool:
    """Is the file of dualblade one of these modules, or in one of these folders?"""
    return any(
        file.startswith(f"dualblade/{place}") if place.endswith("/") else file == f"dualblade/{place}"
        for place in places
    )


def violations(file: str, source: str) -> Iterator[str]:
    names = imports(source, file)
    tops = {name.partition(".")[0] for name in names}
    ours = {name for name in names if name.partition(".")[0] == "dualblade"}
    if under(file, *PURE) and tops & {
        "torch",
        "spdk_glue",
        "os",
    }:
        yield "pure modules know neither torch, spdk_glue nor os"
    if under(file, "host/", "units.py", "errors.py", "trace.py"):
        if foreign := tops - sys.stdlib_module_names - {"dualblade"}:
            yield f"standard library only, not {sorted(foreign)}"
        allowed = ("dualblade.errors", "dualblade.units", "dualblade.trace", "dualblade.host")
        if wrong := [name for name in ours if not name.startswith(allowed) and name != "dualblade"]:
            yield f"may use errors, units, trace and host alone, not {sorted(wrong)}"
    if file.startswith("spdk_glue/") and ours:
        yield "spdk_glue never imports dualblade"
    if file != "spdk_glue/_ffi.py" and "spdk_glue._glue" in names:
        yield "only spdk_glue/_ffi.py imports the compiled module"
    if "torch" in tops and not under(file, "device.py", "device_cuda.py", *MODEL_SIDE):
        yield "torch stays in device.py and the model side"
    if "transformers" in tops and not under(file, *MODEL_SIDE):
        yield "transformers stays on the model side"
    if reads_environment(source) and not (under(file, "config.py", "host/") or file == "spdk_glue/_build.py"):
        yield "the environment is read in config.py, _build.py and host/ alone"


@pytest.mark.parametrize("file", FILES)
def test_walls(file: str) -> None:
    assert list(violations(file, (ROOT / file).read_text())) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dualblade/governor.py", "import os.path"),
        ("dualblade/layout.py", "def f():\n    from torch import nn"),
        ("dualblade/extents.py", "from spdk_glue.queue import Queue"),
        ("dualblade/cost.py", "import torch"),
        ("dualblade/host/pci.py", "import click"),
        ("dualblade/host/pci.py", "from dualblade.store import KVStore"),
        ("dualblade/host/pci.py", "from dualblade import store"),
        ("dualblade/units.py", "from dualblade import tensors"),
        ("spdk_glue/queue.py", "import dualblade.units"),
        ("spdk_glue/queue.py", "from . import _glue"),
        ("spdk_glue/queue.py", "from spdk_glue import _glue"),
        ("dualblade/store.py", "import torch"),
        ("dualblade/cli/run.py", "import importlib\nimportlib.import_module('torch')"),
        ("dualblade/device.py", "import transformers"),
        ("dualblade/store.py", "import os\nos.environ.get('HOME')"),
        ("dualblade/store.py", "from os import getenv"),
    ],
)
def test_the_checker_sees_a_breach(file: str, source: str) -> None:
    assert list(violations(file, source)) != []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dualblade/device.py", "import torch"),
        ("dualblade/bench/step.py", "import torch, transformers"),
        ("dualblade/host/pci.py", "import os\nos.environ\nfrom dualblade.units import GIB"),
        ("dualblade/paths/direct.py", "from .base import Path\nimport os\nos.open"),
        ("spdk_glue/_ffi.py", "from spdk_glue import _glue"),
    ],
)
def test_the_checker_lets_the_rest_pass(file: str, source: str) -> None:
    assert list(violations(file, source)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import dualblade",
        "from dualblade.cli.main import main; assert main(['--help']) == 0",
        "from dualblade.cli.main import main; assert main(['doctor', '--help']) == 0",
    ],
    ids=["import", "help", "doctor-help"],
)
def test_loads_neither_torch_nor_transformers(code: str) -> None:
    show = f"import sys; {code}; print('loaded:', *sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("command", ["bind", "unbind", "status", "hugepages"])
def test_host_tools_start_with_the_standard_library_alone(command: str) -> None:
    """-S: as from a bare checkout, where nothing is installed."""
    code = """
import sys
from dualblade.host.__main__ import main
try:
    main([sys.argv[1], "--help"])
except SystemExit:
    print("loaded:", *{name.partition(".")[0] for name in sys.modules})
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert f"dualblade.host {command}" in done.stdout
    assert loaded - sys.stdlib_module_names == {"dualblade", "__main__"}
