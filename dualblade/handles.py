# SPDX-License-Identifier: Apache-2.0
"""What a cache returns instead of K and V where a layer is streamed: their shapes, and the way to their rows.

A model's attention code looks at shape, dtype and device of what `update()` returned and passes it on to the
attention function. So a handle is a tensor without memory (torch's wrapper subclass): whatever asks for its
shape gets the true one, and whatever would compute with its values is refused by torch's dispatcher before it
runs. An expanded or an uninitialised tensor would have looked the same and given wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dualblade.errors import ConfigError
from dualblade.streaming import Piece

STREAMED = "dualblade"  # the attention that takes handles, as transformers finds it

NO_STREAM = "raise the memory budget until K and V of a layer fit"


class Source(Protocol):
    """The rows of one layer. tokens: how many. pieces() may be called any number of times."""

    @property
    def tokens(self) -> int: ...
    def pieces(self) -> Iterator[Piece]: ...


class Handle(torch.Tensor):
    """K or V of a layer, [batch, KV head, tokens, head_dim], without their values."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source, rows: torch.Tensor) -> Handle:
        """rows: like the new ones, in everything but the number of tokens."""
        batch, heads, _, dim = rows.shape
        shape = (batch, heads, source.tokens, dim)
        made: Handle = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device)
        made.source = source
        return made

    def __init__(self, source: Source, rows: torch.Tensor): ...

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ConfigError(
            f"a layer's K and V are streamed in chunks, and this attention wants them whole ({func})",
            f"build the model with attn_implementation={STREAMED!r}, or {NO_STREAM}",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<Handle of {tuple(self.shape)}, {self.dtype}>"


@dataclass(frozen=True, slots=True)
class StreamedRows:
    """The rows of a layer: the `older` ones from wherever older_pieces() has them, then the new ones."""

    older: int
    older_pieces: Callable[[], Iterator[Piece]]
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.older + self.keys.shape[2]

    def pieces(self) -> Iterator[Piece]:
        yield from self.older_pieces()
        yield self.older, self.keys, self.values

    def handles(self) -> tuple[Handle, Handle]:
        return Handle(self, self.keys), Handle(self, self.values)


class _InMemoryLayer(DynamicLayer):
    """Gives its rows in pieces of chunk_tokens."""

    def __init__(self, chunk_tokens: int):
        super().__init__()
        self.chunk_tokens = chunk_tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        older, step = keys.shape[2] - key_states.shape[2], self.chunk_tokens

        def pieces() -> Iterator[Piece]:
            for at in range(0, older, step):
                stop = min(at + step, older)
                yield at, keys[:, :, at:stop], values[:, :, at:stop]

        return StreamedRows(older, pieces, key_states, value_states).handles()


def in_memory_cache(config: Any, chunks: Mapping[int, int] | None = None) -> Cache:
    """transformers' own cache, all in memory: the reference. chunks: the tokens of a chunk of each layer that
    is given in the pieces of a streamed run, so that the same arithmetic gives the same bits."""
    cache = DynamicCache(config=config)
    for layer, tokens in (chunks or {}).items():
        cache.layers[layer] = _InMemoryLayer(tokens)
    return cache
