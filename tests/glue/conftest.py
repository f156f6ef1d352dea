# SPDX-License-Identifier: Apache-2.0
"""One suite for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import pytest
from media import open_queue

from spdk_glue import Queue, Region

ENGINES = [
    pytest.param("mem", id="mem"),
    pytest.param("uring", id="uring", marks=pytest.mark.needs("uring", "o_direct")),
    pytest.param("buffered", id="buffered", marks=pytest.mark.needs("uring")),
    pytest.param("uring_cmd", id="uring_cmd", marks=pytest.mark.needs("nvme_generic")),
]

OpenQueue = Callable[..., AbstractContextManager[Queue]]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(engine: str, tmp_path: Path) -> OpenQueue:
    """Opens a queue of the engine on a fresh medium."""
    return partial(open_queue, engine, tmp_path)


@pytest.fixture
def regions() -> Iterator[Callable[[int], Region]]:
    """Makes regions that live as long as the test."""
    with ExitStack() as stack:
        yield lambda nbytes: stack.enter_context(Region(nbytes))
