# SPDX-License-Identifier: Apache-2.0
"""Attention over pieces equals attention in one piece, in float64, within the rounding of its dtype."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dualblade import streaming
from dualblade.streaming import Piece, Visible, attend, scratch_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "causal", "window", "padding", "boolean", "additive", "every head", "lowest"]
HALF_ULP = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Case:
    batch: int
    kv_heads: int
    groups: int
    queries: int
    older: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    mask: str
    softcap: float | None
    sinks: bool
    chunk: int
    seed: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def keys(self) -> int:
        return self.older + self.queries


CASES = st.builds(
    Case,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    queries=st.integers(1, 40) | st.just(1),
    older=st.integers(0, 90),
    head_dim=st.sampled_from([4, 16, 33]),
    value_dim=st.sampled_from([4, 16]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(MASKS),
    softcap=st.sampled_from([None, None, 5.0]),
    sinks=st.booleans(),
    chunk=st.integers(1, 140),
    seed=st.integers(0, 1 << 20),
)


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(case.seed)
    query = torch.randn(case.batch, case.heads, case.queries, case.head_dim).to(case.dtype)
    keys = (2 * torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim)).to(case.dtype)
    values = torch.randn(case.batch, case.kv_heads, case.keys, case.value_dim).to(case.dtype)
    return query, keys, values, torch.randn(case.heads) if case.sinks else None


def visible(case: Case) -> Visible:
    batch, n, keys = case.batch, case.queries, case.keys
    if case.mask == "none":
        return Visible()
    if case.mask in ("causal", "window"):
        return Visible(offset=case.older, window=1 + case.seed % 50 if case.mask == "window" else None)
    if case.mask == "padding":
        kept = torch.arange(keys) >= torch.arange(batch)[:, None] * (keys // 3)
        return Visible(kept[:, None, None, :], offset=case.older)
    shape = (batch, case.heads if case.mask == "every head" else 1, n, keys)
    kept = torch.rand(shape) < 0.6
    kept[..., 0, :] = False  # a row that sees nothing
    if case.mask == "additive":
        return Visible(torch.randn(shape).masked_fill(~kept, -torch.inf).to(case.dtype))
    if case.mask == "lowest":  # what transformers' eager masks hold
        return Visible(torch.zeros(shape).masked_fill(~kept, torch.finfo(case.dtype).min).to(case.dtype))
    return Visible(kept)


def plain(case: Case, seen: Visible) -> torch.Tensor:
    """Additive, float64, [batch or 1, query head or 1, query, key]."""
    bias = torch.zeros(1, 1, case.queries, case.keys, dtype=torch.float64)
    if seen.mask is not None and seen.mask.dtype == torch.bool:
        bias = bias.masked_fill(~seen.mask, -torch.inf)
    elif seen.mask is not None:
        bias = bias + seen.mask.double()
    if seen.offset is not None:
        position = torch.arange(case.queries)[:, None] + seen.offset
        key = torch.arange(case.keys)
        bias = bias.masked_fill(key > position, -torch.inf)
        if seen.window is not None:
            bias = bias.masked_fill(key <= position - seen.window, -torch.inf)
    return bias


def reference(case: Case, made: Any, seen: Visible) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far float32 may be from it: see `allowed`."""
    query, keys, values, sinks = made
    k, v = (rows.double().repeat_interleave(case.groups, 1) for rows in (keys, values))
    raw = query.double() @ k.transpose(2, 3) / math.sqrt(case.head_dim)
    scores = raw if case.softcap is None else case.softcap * torch.tanh(raw / case.softcap)
    scores = scores + plain(case, seen)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(case.batch, -1, case.queries, 1)
        scores = torch.cat([scores, extra], -1)
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak.masked_fill(peak == -torch.inf, 0)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    result = weights[..., : case.keys] @ v
    magnitude = (query.double().abs() @ k.abs().transpose(2, 3)).amax() / math.sqrt(case.head_dim)
    hidden = peak.abs().where(peak.abs() < 1e5, 0)  # float16's lowest mask, added to a row that sees nothing
    return result, allowed(case, result, magnitude + hidden, float(v.abs().amax()))


def allowed(case: Case, result: torch.Tensor, magnitude: torch.Tensor, largest: float) -> torch.Tensor:
    """A score is a sum of head_dim products (Higham, 2002, section 3.1): off by (head_dim + a few) u of the
    sum of their magnitudes, so a weight is off by twice that, relatively. Sums over the keys, rescaled once
    a piece, add their own; then the result is rounded to its dtype."""
    u = HALF_ULP[torch.float32]
    score = (case.head_dim + 8) * u * magnitude + 8 * u * (5 + magnitude)
    sums = (2 * case.keys + 4 * math.ceil(case.keys / case.chunk) + 16) * u
    return (2 * torch.expm1(2 * score) + sums) * largest + HALF_ULP[case.dtype] * 1.01 * result.abs() + 1e-7


def pieces(case: Case, keys: torch.Tensor, values: torch.Tensor) -> Iterator[Piece]:
    """Each in memory that is overwritten before the next one."""
    for begin in range(0, case.keys, case.chunk):
        k, v = (rows[:, :, begin : begin + case.chunk].clone() for rows in (keys, values))
        yield begin, k, v
        k.fill_(torch.nan)
        v.fill_(torch.nan)


def streamed(case: Case, made: Any, seen: Visible) -> torch.Tensor:
    query, keys, values, sinks = made
    options = {
        "kv_heads": case.kv_heads,
        "value_dim": case.value_dim,
        "softcap": case.softcap,
        "sinks": sinks,
    }
    return attend(query, pieces(case, keys, values), seen, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share out; threads that wait for each other take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(case=CASES)
@settings(max_examples=200, deadline=None)
def test_any_pieces(case: Case) -> None:
    made = tensors(case)
    seen = visible(case)
    got = streamed(case, made, seen)
    want, error = reference(case, made, seen)
    assert got.dtype == case.dtype
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= error).all()), float((got.double() - want).abs().amax())


@given(case=CASES, tile=st.sampled_from([5, 16, 32]), scores=st.sampled_from([100, 500, 3000]))
@settings(max_examples=60, deadline=None)
def test_any_tiles(case: Case, tile: int, scores: int) -> None:
    """Tiles of a few keys and a few queries, which otherwise only large shapes have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "TILE_KEYS", tile)
        patch.setattr(streaming, "TILE_SCORES", scores)
        patch.setattr(streaming, "TILE_BYTES", 1)
        made = tensors(case)
        seen = visible(case)
        got = streamed(case, made, seen)
    want, error = reference(case, made, seen)
    error += 8 * case.keys * HALF_ULP[torch.float32] * float(made[2].abs().amax())  # rescaled once a tile
    assert bool(((got.double() - want).abs() <= error).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_as_with_sdpa(dtype: torch.dtype) -> None:
    query, rows = torch.randn(2, 4, 3, 16, dtype=dtype), torch.randn(2, 4, 9, 16, dtype=dtype)
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    mask[0, 0, 1] = False
    want = torch.nn.functional.scaled_dot_product_attention(query, rows, rows, attn_mask=mask)
    got = attend(query, [(0, rows[:, :, :4], rows[:, :, :4]), (4, rows[:, :, 4:], rows[:, :, 4:])],
                 Visible(mask), kv_heads=4)  # fmt: skip
    assert bool((want[0, :, 1] == 0).all())
    assert bool((got[0, :, 1] == 0).all())
    torch.testing.assert_close(got, want, rtol=0, atol=8 * torch.finfo(dtype).eps)  # sdpa rounds weights too


def test_the_same_pieces_give_the_same_bits_whatever_their_strides() -> None:
    query, rows = torch.randn(1, 8, 20, 64), torch.randn(1, 2, 700, 64)
    slot = torch.full((1, 2, 900, 64), torch.nan)
    slot[:, :, :700] = rows
    whole = attend(query, [(0, rows, rows)], kv_heads=2)
    strided = attend(query, [(0, slot[:, :, :700], slot[:, :, :700])], kv_heads=2)
    assert torch.equal(whole, strided)


def test_large_scores_do_not_overflow() -> None:
    """The maximum rises from piece to piece by more than float32's exponent holds."""
    query = torch.full((1, 1, 1, 4), 100.0)
    keys = torch.tensor([1.0, 50.0, 200.0])[None, None, :, None].expand(1, 1, 3, 4)
    values = torch.arange(3.0)[None, None, :, None].expand(1, 1, 3, 4)
    split = [(at, keys[:, :, at : at + 1], values[:, :, at : at + 1]) for at in range(3)]
    for order in (split, split[::-1]):
        assert torch.equal(attend(query, order, kv_heads=1), torch.full((1, 1, 1, 4), 2.0))


class Held(TorchDispatchMode):
    """most: bytes of the tensors made within that lived at once."""

    now = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        in_place = func.overloadpacket.__name__.endswith("_")
        if isinstance(out, torch.Tensor) and not func.is_view and not in_place:
            self._count(size := out.untyped_storage().nbytes())
            weakref.finalize(out, self._count, -size)
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def test_nothing_larger_than_promised() -> None:
    """scratch_bytes is an upper bound for a long context, where K, V and the scores would be far more."""
    query = torch.randn(1, 8, 600, 64, dtype=torch.bfloat16)
    rows = torch.randn(1, 2, 1024, 64, dtype=torch.bfloat16)
    with Held() as held:
        attend(query, [(at, rows, rows) for at in range(0, 16384, 1024)], Visible(offset=16384), kv_heads=2)
    result = query.nbytes
    assert 600 * 16384 * 8 * 4 > scratch_bytes(1, 8, 2, 64, 600) + result >= held.most > 0
