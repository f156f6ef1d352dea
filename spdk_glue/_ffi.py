# SPDX-License-Identifier: Apache-2.0
"""The one place that imports the compiled module."""

from __future__ import annotations

from typing import Any

from spdk_glue.errors import NotBuiltError

try:
    import spdk_glue._glue as _glue
except ImportError as error:
    if "cannot open shared object" in str(error):  # built, on a machine that had it
        raise NotBuiltError(f"the C engine cannot be loaded: {error}") from error
    raise NotBuiltError(f"the C engine is not built ({error}); `pip install .` builds it") from error

ffi: Any = _glue.ffi
lib: Any = _glue.lib
lib.glue_loaded()
