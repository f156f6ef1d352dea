# SPDX-License-Identifier: Apache-2.0
"""LLM inference on one machine whose KV cache is larger than its memory.

Names that need torch or transformers are loaded on first use, so that host tools start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualblade.hf import DualBladeCache

__version__ = "0.1.0"
__all__ = ["DualBladeCache", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "DualBladeCache":
        from dualblade.hf import DualBladeCache

        return DualBladeCache
    raise AttributeError(f"module 'dualblade' has no attribute {name!r}")
