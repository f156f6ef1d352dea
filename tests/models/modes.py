# SPDX-License-Identifier: Apache-2.0
"""The pipeline modes, for tests of what must hold in all of them."""

from __future__ import annotations

import pytest

from dualblade.pipeline import Mode

MODES = [mode.value for mode in Mode]
# The default one in `make test`, the others in `make test-full`.
EVERY_MODE = [pytest.param(mode, marks=[] if mode == Mode.ADAPTIVE else [pytest.mark.slow]) for mode in MODES]
