# SPDX-License-Identifier: Apache-2.0
"""Attention over keys and values that come in pieces, none of which is needed again.

The softmax is an online one: a running maximum and a running sum, and an accumulator that is rescaled
whenever the maximum rises (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe &
Staats 2021, "Self-attention does not need O(n^2) memory"; the tiles are FlashAttention's, Dao et al. 2022).
All of it is float32, so the result is that of attention in one piece within the rounding of its dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

# Scores that are computed at a time, and the keys of a tile. Four times as many scores are no faster.
TILE_SCORES = 1 << 20
TILE_KEYS = 512
TILE_BYTES = 4 << 20  # of a tile of keys in float32, where few queries leave room for more of them

Piece = tuple[int, torch.Tensor, torch.Tensor]  # first token; K and V, [batch, KV head, tokens, head_dim]


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys each query may see.

    mask: broadcastable to [batch, query head, query, key]; boolean, True where a key is seen, or additive.
    offset: query i is at position offset + i and sees no key after it; None: it sees all. window: with an
    offset, only the last `window` keys up to its own position.
    """

    mask: torch.Tensor | None = None
    offset: int | None = None
    window: int | None = None

    def hides_all(self, first: int, last: int, begin: int, end: int) -> bool:
        """Do queries [first, last) see none of the keys [begin, end), whatever the mask says?"""
        if self.offset is None:
            return False
        too_late = begin >= self.offset + last
        return too_late or (self.window is not None and end <= self.offset + first - self.window + 1)

    def masks(
        self, first: int, last: int, begin: int, end: int, device: torch.device | None = None
    ) -> Iterator[torch.Tensor]:
        """What hides keys [begin, end) from queries [first, last), if anything; broadcastable."""
        if self.mask is not None:
            rows = slice(first, last) if self.mask.shape[-2] > 1 else slice(None)
            keys = slice(begin, end) if self.mask.shape[-1] > 1 else slice(None)
            yield self.mask[..., rows, keys]
        if self.offset is not None and (self.window is not None or end > self.offset + first + 1):
            yield self._band(first, last, begin, end, device)

    def _band(self, first: int, last: int, begin: int, end: int, device: torch.device | None) -> torch.Tensor:
        assert self.offset is not None
        position = torch.arange(first, last, device=device)[:, None] + self.offset
        key = torch.arange(begin, end, device=device)
        seen = key <= position
        return seen if self.window is None else seen & (key > position - self.window)


class _Queries:
    """A few queries of every head, and what they have found so far. Rows are [batch x KV head, query head
    of that KV head x query]."""

    def __init__(self, query: torch.Tensor, first: int, last: int, scale: float, value_dim: int):
        batch, kv_heads, groups, _, dim = query.shape
        self.first, self.last = first, last
        self.shape = (batch, kv_heads, groups, last - first)
        rows = query[..., first:last, :].to(torch.float32) * scale
        self.query = rows.reshape(batch * kv_heads, groups * (last - first), dim)
        self.peak = self.query.new_full((*self.query.shape[:2], 1), float("-inf"))
        self.total = torch.zeros_like(self.peak)
        self.sum = self.query.new_zeros((*self.query.shape[:2], value_dim))

    def add(
        self, keys: torch.Tensor, values: torch.Tensor, masks: Iterable[torch.Tensor], cap: float | None
    ) -> None:
        """keys, values: float32, [batch x KV head, tokens, head_dim]."""
        scores = torch.bmm(self.query, keys.transpose(1, 2))
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        for mask in masks:
            self._hide(scores.view(*self.shape, -1), mask)
        peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        base = peak.masked_fill(peak == float("-inf"), 0.0)  # nothing seen yet: -inf - -inf is not a number
        weights = scores.sub_(base).exp_()
        faded = (self.peak - base).exp_()
        self.total.mul_(faded).add_(weights.sum(-1, keepdim=True))
        self.sum.mul_(faded).baddbmm_(weights, values)
        self.peak = peak

    def _hide(self, scores: torch.Tensor, mask: torch.Tensor) -> None:
        """scores: [batch, KV head, query head of it, query, key]."""
        if mask.dim() == 4:
            heads = (scores.shape[1], scores.shape[2]) if mask.shape[1] > 1 else (1, 1)
            mask = mask.unflatten(1, heads)
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, float("-inf"))
        else:
            scores.add_(mask)

    def result(self, sinks: torch.Tensor | None) -> torch.Tensor:
        """[batch, KV head, query head of it, query, head_dim], float32; 0 for a query that saw no key."""
        total, found = self.total, self.sum
        if sinks is not None:
            total, found = self._with_sinks(sinks.to(torch.float32))
        found = found / total.masked_fill(total == 0, 1.0)
        return found.view(*self.shape, -1)

    def _with_sinks(self, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A score for each query head that takes part in the softmax and has no value."""
        spread = sinks.view(1, *self.shape[1:3], 1, 1).expand(*self.shape, 1).reshape(self.peak.shape)
        peak = torch.maximum(self.peak, spread)
        faded = (self.peak - peak).exp_()
        return self.total * faded + (spread - peak).exp_(), self.sum * faded


def attend(
    query: torch.Tensor,
    pieces: Iterable[Piece],
    visible: Visible = Visible(),
    *,
    kv_heads: int,
    value_dim: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` [batch, query head, queries, head_dim] over all pieces, in its shape and dtype.

    Query head h reads KV head h // (query heads / kv_heads); K and V are not repeated for it. A piece may be
    overwritten as soon as the next one is asked for. Every query head's `sinks` take part in the softmax
    without a value. A query that sees no key gets zeros, as from scaled_dot_product_attention. The same
    shapes and pieces give the same bits.
    """
    batch, heads, count, dim = query.shape
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    step = max(1, TILE_SCORES // (batch * heads * TILE_KEYS))
    factor = dim**-0.5 if scale is None else scale
    tiles = [
        _Queries(grouped, first, min(first + step, count), factor, value_dim or dim)
        for first in range(0, count, step)
    ]
    for begin, keys, values in pieces:
        _add_piece(tiles, begin, keys, values, visible, softcap)
    out = query.new_empty((*grouped.shape[:4], value_dim or dim))
    for tile in tiles:
        out[..., tile.first : tile.last, :] = tile.result(sinks)
    return out.flatten(1, 2)


def _add_piece(
    tiles: list[_Queries],
    begin: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: Visible,
    softcap: float | None,
) -> None:
    step = _keys_at_once(keys, tiles[0].query.shape[1])
    for at in range(0, keys.shape[2], step):
        stop = min(at + step, keys.shape[2])
        span = (begin + at, begin + stop)
        seeing = [tile for tile in tiles if not visible.hides_all(tile.first, tile.last, *span)]
        if not seeing:
            continue
        k = keys[:, :, at:stop].to(torch.float32).flatten(0, 1)
        v = values[:, :, at:stop].to(torch.float32).flatten(0, 1)
        for tile in seeing:
            tile.add(k, v, visible.masks(tile.first, tile.last, *span, k.device), softcap)


def _keys_at_once(keys: torch.Tensor, queries: int) -> int:
    """More than a tile where both the keys and the scores stay small: fewer calls for a single token."""
    runs, dim = keys.shape[0] * keys.shape[1], keys.shape[3]
    most = min(TILE_BYTES // (4 * runs * dim), TILE_SCORES // (runs * queries))
    return max(TILE_KEYS, most // TILE_KEYS * TILE_KEYS)


def scratch_bytes(batch: int, heads: int, kv_heads: int, head_dim: int, queries: int) -> int:
    """What attend() holds beside its arguments and its result, in bytes: every query and its accumulator
    in float32, the scores of a tile, and a tile of K and of V."""
    rows = batch * heads * queries
    tile = max(TILE_BYTES, 4 * batch * kv_heads * head_dim * TILE_KEYS)
    scores = 4 * max(TILE_SCORES, batch * heads * TILE_KEYS)
    return rows * (2 * head_dim + 4) * 4 + 2 * scores + 2 * tile
