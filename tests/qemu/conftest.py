# SPDX-License-Identifier: Apache-2.0
"""Tests marked `machine(name)` run in a guest: pytest there, started once a machine with all of them.

Here each of them is an item that waits for the guest's word, so selection, markers and needs work as
everywhere; fixtures are the guest's alone (guest_plugin.py).
"""

from __future__ import annotations

from typing import Any

import pytest
from guests import Guest

_GUESTS = pytest.StashKey[dict[str, Guest]]()


class GuestFailure(Exception):
    """A test failed in the guest."""


class GuestItem(pytest.Item):
    """One test of the guest, under the name that it has there."""

    def __init__(self, *, item: pytest.Item, **words: Any):
        super().__init__(**words)
        self.own_markers = item.own_markers
        self.keywords.update(item.keywords)
        (self.machine,) = next(item.iter_markers("machine")).args
        self._location = item.location

    def reportinfo(self) -> tuple[str, int | None, str]:
        return self._location

    def runtest(self) -> None:
        outcome = guest_of(self).outcome(self.nodeid)
        if outcome.kind == "skipped":
            pytest.skip(outcome.text)
        if outcome.kind == "failed":
            raise GuestFailure(outcome.text)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any) -> Any:
        if isinstance(excinfo.value, GuestFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args)


def guest_of(item: GuestItem) -> Guest:
    """The machine's guest. The first test that asks starts all, each with the tests selected for it: one
    keeps little more than one core busy."""
    guests = item.config.stash[_GUESTS]
    if not guests:
        selected: dict[str, list[str]] = {}
        for other in item.session.items:
            if isinstance(other, GuestItem):
                selected.setdefault(other.machine, []).append(other.nodeid)
        factory: pytest.TempPathFactory = item.config._tmp_path_factory  # type: ignore[attr-defined]
        for machine, tests in selected.items():
            guests[machine] = Guest(machine, tests, factory.mktemp(machine))
    return guests[item.machine]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "machine(name): runs in a guest; see tests/qemu/machines.py")
    config.stash[_GUESTS] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        GuestItem.from_parent(item.parent, name=item.name, item=item)
        if item.get_closest_marker("machine")
        else item
        for item in items
    ]


def pytest_unconfigure(config: pytest.Config) -> None:
    for guest in config.stash[_GUESTS].values():
        guest.stop()
