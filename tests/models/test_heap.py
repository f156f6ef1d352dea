# SPDX-License-Identifier: Apache-2.0
"""Freed tensors are charged to the process as long as that is wanted, whatever was allocated after them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE_HOLES = """
import torch

def make_holes():
    kept, freed = [], []
    for _ in range(20):
        freed.append(torch.ones(16 << 20, dtype=torch.uint8))
        kept.append(torch.ones(1 << 16, dtype=torch.uint8))
    return kept
"""

HOLES = (
    MAKE_HOLES
    + """
import sys
from dualblade.host.heap import keep_large_blocks, return_free_memory, return_large_blocks
from dualblade.host.meminfo import process_memory
from dualblade.host.sysfs import Host
how = sys.argv[1]
if how == "returned":
    assert return_large_blocks()
elif how != "glibc":
    assert return_large_blocks() and keep_large_blocks()
del_later = torch.empty(30 << 20, dtype=torch.uint8)
del del_later  # by now glibc keeps blocks up to this size on its heap
before = process_memory(Host()).anon
kept = make_holes()
if how == "trimmed":
    assert return_free_memory()
if how == "returned later":
    assert return_large_blocks()
print(process_memory(Host()).anon - before)
"""
)


@pytest.mark.parametrize("how", ["glibc", "kept", "returned", "trimmed", "returned later"])
def test_holes_in_the_heap(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True)
    left = int(done.stdout)
    if how in ("glibc", "kept"):
        assert left > 200 << 20
    else:
        assert left < 20 << 20


PROMPT = (
    MAKE_HOLES
    + """
import sys, time
from transformers import LlamaConfig
from dualblade import DualBladeCache
from dualblade.host.heap import keep_large_blocks
from dualblade.host.meminfo import process_memory
from dualblade.host.sysfs import Host
folder, decoding = sys.argv[1], sys.argv[2] == "decoding"
config = LlamaConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, head_dim=64)
row = torch.zeros(1, 4, 1, 64)
keep_large_blocks()
with torch.inference_mode(), DualBladeCache(
    config, mem_budget="8G", dtype=torch.float32, max_tokens=9000, batch_size=1, cache_dir=folder,
    activation_bytes=0,
) as cache:
    if decoding:
        cache.decode_begins(0)
    before = process_memory(Host()).anon
    kept = make_holes()
    looks, deadline = cache.storage.governor.watch.latest[0] + 3, time.monotonic() + 30
    while cache.storage.governor.watch.latest[0] < looks and time.monotonic() < deadline:
        for layer in range(2):
            cache.update(row, row, layer)
        cache.storage.governor.watch.stir()
        time.sleep(0.01)
    print(process_memory(Host()).anon - before)
"""
)


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("phase", ["prompt", "decoding"])
def test_what_a_prompt_frees_goes_back_where_memory_was_planned_for_less(
    phase: str, direct_dir: Path
) -> None:
    """In decoding the heap keeps nothing that large, and what else is held is counted."""
    command = [sys.executable, "-c", PROMPT, str(direct_dir), phase]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    left = int(done.stdout)
    assert left < 40 << 20 if phase == "prompt" else left > 200 << 20
