# SPDX-License-Identifier: Apache-2.0
"""Random operations on a cache beside plain tensors in memory: never a wrong byte."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from transformers import LlamaConfig

from dualblade import DualBladeCache
from dualblade.errors import StorageError
from dualblade.pipeline import Mode
from dualblade.tensors import PathKind
from spdk_glue import READ, WRITE

HEADS, HEAD_DIM = 2, 16


class CacheMachine(RuleBasedStateMachine):
    """`rows` is what the cache must hold: [batch, KV head, tokens, head_dim] for each K and V.

    What is drawn depends on no state: when a scripted fault is noticed is up to the I/O thread.
    """

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.cache: DualBladeCache | None = None
        self.seed = 0

    @initialize(
        layers=st.integers(1, 4),
        batch=st.integers(1, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        known=st.booleans(),
        depth=st.integers(0, 3),
        policy=st.sampled_from(["spread", "first-fit"]),
        share=st.sampled_from(["4K", "40K", "400K"]),
        checksum=st.booleans(),
        pipeline=st.sampled_from(Mode),
    )
    def open(self, layers, batch, dtype, known, depth, policy, share, checksum, pipeline) -> None:
        self.layers, self.batch, self.dtype = layers, batch, dtype
        self.options = {
            "nvme": "mem:64M",
            "mem_budget": "8G",
            "page_cache_budget": share,
            "policy": policy,
            "prefetch_depth": depth,
            "cache_dir": self.folder,
            "dtype": dtype,
            "checksum": checksum,
            "pipeline": pipeline.value,
        }
        if known:
            self.options |= {"max_tokens": 700, "batch_size": batch}
        self.reopen()

    def reopen(self) -> None:
        self.teardown()
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=HEADS * HEAD_DIM,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
        )
        self.cache = DualBladeCache(config, **self.options)
        self.active = self.batch
        self.armed = False
        self.rows = [self.empty() for _ in range(2 * self.layers)]

    def empty(self) -> torch.Tensor:
        return torch.empty(self.batch, HEADS, 0, HEAD_DIM, dtype=self.dtype)

    def fresh(self, tokens: int) -> torch.Tensor:
        self.seed += 1
        random = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.active, HEADS, tokens, HEAD_DIM, generator=random).to(self.dtype)

    def surviving(self, act: Callable[[], None]) -> None:
        """An error is allowed where a fault was scripted; then nothing is served, and a new cache begins."""
        try:
            act()
        except StorageError:
            assert self.armed
            with pytest.raises(StorageError):
                self.cache.update(self.fresh(1), self.fresh(1), 0)
            self.reopen()

    @rule(tokens=st.one_of(st.integers(1, 3), st.integers(1, 150)))
    def append(self, tokens: int) -> None:
        def act() -> None:
            for layer in range(self.layers):
                new = [self.fresh(tokens), self.fresh(tokens)]
                got = self.cache.update(*new, layer)
                for at, (rows, out) in enumerate(zip(new, got, strict=True), 2 * layer):
                    self.rows[at] = torch.cat([self.rows[at], rows], dim=2)
                    assert torch.equal(out, self.rows[at])

        self.surviving(act)

    @rule(tokens=st.integers(1, 200))
    def crop(self, tokens: int) -> None:
        def act() -> None:
            keep = max(0, self.rows[0].shape[2] - tokens)
            self.cache.crop(-tokens)
            self.rows = [rows[:, :, :keep] for rows in self.rows]

        self.surviving(act)

    @rule(sequences=st.lists(st.integers(0, 5), min_size=3, max_size=3))
    def reorder(self, sequences: list[int]) -> None:
        chosen = torch.tensor([sequence % self.active for sequence in sequences[: self.active]])

        def act() -> None:
            self.cache.reorder_cache(chosen)
            self.rows = [rows[chosen] for rows in self.rows]

        self.surviving(act)

    @rule(sequences=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def drop_sequences(self, sequences: list[int]) -> None:
        if not self.rows[0].shape[2]:
            return
        chosen = torch.tensor(list(dict.fromkeys(sequence % self.active for sequence in sequences)))

        def act() -> None:
            self.cache.batch_select_indices(chosen)
            self.rows = [rows[chosen] for rows in self.rows]
            self.active = len(chosen)

        self.surviving(act)

    @rule()
    def reset(self) -> None:
        def act() -> None:
            self.cache.reset()
            self.active = self.batch
            self.rows = [self.empty() for _ in self.rows]

        self.surviving(act)

    @rule(op=st.sampled_from([READ, WRITE]), kind=st.sampled_from(["error", "torn"]), skip=st.integers(0, 4))
    def script_a_fault(self, op: int, kind: str, skip: int) -> None:
        if self.armed or not self.rows[0].shape[2]:
            return
        path = self.cache.storage.paths.get(PathKind.DIRECT)
        if path is not None:
            path.queue.fault(kind, op, skip=skip)
            self.armed = True

    @rule()
    def open_another(self) -> None:
        self.reopen()

    @invariant()
    def lengths_agree(self) -> None:
        if self.cache is not None:
            assert self.cache.get_seq_length() == self.rows[0].shape[2]

    def teardown(self) -> None:
        cache, self.cache = self.cache, None
        if cache is not None:
            try:
                cache.close()
            except StorageError:
                assert self.armed


@pytest.mark.needs("uring", "o_direct")
def test_never_a_wrong_byte(direct_dir: Path) -> None:
    CacheMachine.folder = Path(tempfile.mkdtemp(dir=direct_dir))
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
