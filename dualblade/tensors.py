# SPDX-License-Identifier: Apache-2.0
"""The frozen values that name one KV tensor through every hop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class PathKind(Enum):
    """Where a tensor lives: an ordinary file in the page cache, or extents that bypass it."""

    PAGE_CACHE = "page-cache"
    DIRECT = "direct"


class TensorKey(NamedTuple):
    """The K or the V of one layer. A tuple, since it is hashed and compared some thirty times a layer."""

    layer: int
    kind: str  # "K" or "V"

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape [batch, KV heads, tokens, head_dim]; itemsize in bytes.

    tokens: what the tensor will hold at the end of the run.
    """

    key: TensorKey
    batch: int
    heads: int
    head_dim: int
    itemsize: int
    tokens: int

    @property
    def row_bytes(self) -> int:
        """One token of one head of one sequence."""
        return self.head_dim * self.itemsize

    @property
    def runs(self) -> int:
        """Rows of heads: batch x KV heads."""
        return self.batch * self.heads

    @property
    def token_bytes(self) -> int:
        """One token of the whole tensor."""
        return self.runs * self.row_bytes

    @property
    def nbytes(self) -> int:
        """All tokens."""
        return self.tokens * self.token_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """What the governor decided for one tensor (or its next segment), and why. bytes: on the path."""

    key: TensorKey
    path: PathKind
    bytes: int
    reason: str
