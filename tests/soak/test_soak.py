# SPDX-License-Identifier: Apache-2.0
"""Rounds of generation while a controller fails at random: every token is right, or none is given.

`make soak` runs it; SOAK_ROUNDS (1000) and SOAK_SEED in the environment change it. A failure names
its round's seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from spdk.rpc.client import JSONRPCException
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dualblade import DualBladeCache
from dualblade.emulate import EmulatedTarget
from dualblade.errors import DualBladeError, StorageError
from dualblade.settings import CacheSettings
from dualblade.targets import open_target
from dualblade.units import MIB
from dualblade.volume import Volume

pytestmark = [pytest.mark.soak, pytest.mark.needs("spdk")]

ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1000"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
PROMPT, NEW = 160, 16
TIMEOUT_S = 3.0


@dataclass
class Drive:
    """The target of a transport, and what can be done to it."""

    emulated: EmulatedTarget
    transport: str
    target: str = ""

    def make(self) -> None:
        base = self.emulated.malloc(self.name, 32 * MIB)
        self.target = self.emulated.export(self.emulated.error(base), self.transport)
        self.make_volume()

    def make_volume(self) -> None:
        with open_target(self.target, capacity=None, cache_dir=Path(), timeout=TIMEOUT_S) as opened:
            Volume.create(opened.queue, opened.capacity)

    @property
    def name(self) -> str:
        return "v0" if self.transport == "vfio-user" else "t0"

    @property
    def nqn(self) -> str:
        return f"nqn.2016-06.io.spdk:dualblade-EE_{self.name}"

    def inject(self, op: str, **what: object) -> None:
        self.emulated.rpc.bdev_error_inject_error(name=f"EE_{self.name}", io_type=op, **what)

    def calm(self) -> None:
        self.emulated.rpc.bdev_error_inject_error(
            name=f"EE_{self.name}", io_type="clear", error_type="failure"
        )


Fault = Callable[[Drive, random.Random], None]


def nothing(drive: Drive, chance: random.Random) -> None:
    pass


def status(drive: Drive, chance: random.Random) -> None:
    code = chance.choice([(2, 0x81), (2, 0x80), (0, 0x04), (0, 0x06)])
    op = chance.choice(["read", "write"])
    drive.inject(op, error_type="nvme_failure", num=chance.randint(1, 3), nvme_sct=code[0], nvme_sc=code[1])


def corrupt(drive: Drive, chance: random.Random) -> None:
    drive.inject(
        "read", error_type="corrupt_data", num=1, corrupt_offset=3, corrupt_value=chance.randrange(1, 256)
    )


def pause(drive: Drive, chance: random.Random) -> None:
    drive.emulated.stop()
    time.sleep(chance.uniform(0.01, 0.3))
    drive.emulated.cont()


def vanish(drive: Drive, chance: random.Random) -> None:
    drive.emulated.rpc.nvmf_subsystem_remove_ns(nqn=drive.nqn, nsid=1)
    time.sleep(chance.uniform(0, 0.05))
    drive.emulated.rpc.nvmf_subsystem_add_ns(
        nqn=drive.nqn, namespace={"bdev_name": f"EE_{drive.name}", "nsid": 1}
    )


def disconnect(drive: Drive, chance: random.Random) -> None:
    """TCP alone: a vfio-user listener that goes away takes its folder's socket with it."""
    if drive.transport != "tcp":
        pause(drive, chance)
        return
    parts = dict(word.split(":", 1) for word in drive.target.split())
    address = {key: parts[key] for key in ("trtype", "adrfam", "traddr", "trsvcid")}
    drive.emulated.rpc.nvmf_subsystem_remove_listener(nqn=drive.nqn, listen_address=address)
    time.sleep(chance.uniform(0, 0.1))
    drive.emulated.rpc.nvmf_subsystem_add_listener(nqn=drive.nqn, listen_address=address)


def crash(drive: Drive, chance: random.Random) -> None:
    drive.emulated.kill()


FAULTS: list[Fault] = [nothing, status, status, corrupt, corrupt, pause, pause, vanish, disconnect, crash]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def drives() -> Iterator[list[Drive]]:
    with EmulatedTarget(memory_mib=96, hugepages=False) as emulated:
        made = [Drive(emulated, transport) for transport in ("vfio-user", "tcp")]
        for drive in made:
            drive.make()
        yield made


def generate(model: LlamaForCausalLM, cache: object, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=NEW,
        do_sample=False, prefill_chunk_size=40,
    )  # fmt: skip


def opened(model: LlamaForCausalLM, drive: Drive, folder: Path) -> DualBladeCache:
    settings = CacheSettings.checked(
        mem_budget="8G", nvme=drive.target, kv_path="direct", cache_dir=folder, checksum=True
    )
    return DualBladeCache(
        model.config, max_tokens=PROMPT + NEW, batch_size=1, dtype=torch.float32,
        settings=replace(settings, timeout_s=TIMEOUT_S),
    )  # fmt: skip


def play(
    model: LlamaForCausalLM, drive: Drive, fault: Fault, chance: random.Random, folder: Path
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(what is right, what came, or None where it was refused)."""
    prompt = torch.randint(
        2, 199, (1, PROMPT), generator=torch.Generator().manual_seed(chance.getrandbits(31))
    )
    right = generate(model, DynamicCache(config=model.config), prompt)
    trouble: list[BaseException] = []

    def strike() -> None:
        time.sleep(chance.uniform(0, 0.1))
        try:
            fault(drive, chance)
        except (DualBladeError, JSONRPCException) as error:
            trouble.append(error)

    thread = threading.Thread(target=strike)
    came = None
    try:
        with contextlib.suppress(StorageError), opened(model, drive, folder) as cache:
            thread.start()
            came = generate(model, cache, prompt)
    finally:
        thread.join()
    assert not trouble
    return right, came


def mend(drives: list[Drive], fault: Fault) -> None:
    """As it was before the round. After a crash the disks are new and empty."""
    if fault is crash:
        drives[0].emulated.restart()
        for drive in drives:
            drive.make_volume()
        return
    for drive in drives:
        drive.calm()


def test_every_token_is_right_or_refused(
    model: LlamaForCausalLM, drives: list[Drive], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(ROUNDS):
        chance = random.Random(SEED * 1_000_003 + number)
        drive, fault = chance.choice(drives), chance.choice(FAULTS)
        right, came = play(model, drive, fault, chance, tmp_path)
        assert came is None or torch.equal(right, came), (
            f"round {number}: {fault.__name__}, {drive.transport}"
        )
        outcomes[f"{fault.__name__} {'refused' if came is None else 'right'}"] += 1
        mend(drives, fault)
    with capsys.disabled():
        print(
            f"\n{ROUNDS} rounds: " + ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
        )
    assert not outcomes["nothing refused"]
    assert len(os.listdir("/proc/self/task")) < 40
