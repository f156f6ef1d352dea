# SPDX-License-Identifier: Apache-2.0
"""The governor while a run goes on: between two passes it looks at the memory, decides, and has blocks
moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from dualblade.cycle import Move, TensorState
from dualblade.errors import ConfigError, DualBladeError
from dualblade.governor import Footprint
from dualblade.governor_trace import encode, move_record
from dualblade.host.heap import return_free_memory
from dualblade.host.meminfo import process_memory
from dualblade.host.sysfs import Host
from dualblade.kv_tensor import Tensor
from dualblade.migration import Migrator
from dualblade.paths.base import StoragePath
from dualblade.planner import SegmentPlacer
from dualblade.revision import Decision, Facts, GovernorState, Limits, revise
from dualblade.tensors import PathKind, Placement, TensorKey
from dualblade.units import MIB
from dualblade.watch import Look, MemoryWatch
from spdk_glue import Region

DEMOTE_PART, PROMOTE_PART = 8, 16  # of all KV, copied for one decision and one pass
BAND_PART = 32
LARGEST_BAND = 256 * MIB
PATIENCE = 4  # looks: a second
HEAP_STEP = 16 * MIB  # so near to the plan the heap is trimmed, and again when it has grown by that
MOVES_REPORTED = 1000
# Of what the page cache holds, the kernel's own memory for it, charged to a cgroup: on ext4 104 bytes of
# buffer head for each 4 KiB, tree nodes, page tables. Measured: 65 MB of 2.1 GB.
KERNEL_PART = 32


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take: see Facts. mapped: weights that are mapped, which no other figure includes.
    tokens: the context at the end, None where it is not known. in_place: see Limits. kernel: of the
    footprint, what the kernel is expected to take for all this."""

    budget: int
    cap: int | None
    footprint: Footprint
    mapped: int
    tokens: int | None
    policy: str
    in_place: bool = False
    kernel: int = 0


class LiveGovernor:
    """Told by the store of every tensor that is asked for (see store.Mover).

    open_path(kind, grows): makes a path that the plan had no use for; raises DualBladeError. trace: a file
    that gets every decision as a JSON line. waited: see Facts.
    """

    def __init__(
        self,
        tensors: Mapping[TensorKey, Tensor],
        paths: Mapping[PathKind, StoragePath],
        budget: Budget,
        migrator: Migrator,
        watch: MemoryWatch,
        placer: SegmentPlacer | None = None,
        open_path: Callable[[PathKind, bool], None] | None = None,
        trace: Path | None = None,
        waited: Callable[[], float | None] = lambda: None,
    ):
        self.tensors = tensors
        self.paths = paths
        self.migrator = migrator
        self.watch = watch
        self.steps = 0
        self.moves: list[tuple[int, Move]] = []
        self.note: str | None = None
        self.share: int | None = None
        self._budget = budget
        self._reserve: int | None = None
        self._placer = placer
        self._open_path = open_path
        self._trace = _open_trace(trace)
        self._waited = waited
        self._keys = sorted(tensors)
        self._state = GovernorState()
        self._decided = -1
        self._looked = -1
        self._trimmed = 0  # anonymous memory when the heap had just given back what was free
        self._more = False
        self._rate = 0
        self._hurried = False
        self._looks: tuple[Look, Look] | None = None  # decided on before, and now
        self._last: TensorKey | None = None
        self._reasons: dict[tuple[TensorKey, PathKind], str] = {}

    @property
    def region(self) -> Region:
        return self.migrator.region

    # told by the store ----------------------------------------------------------------------

    def reached(self, key: TensorKey) -> None:
        """A tensor is about to be used; the first of a pass is where decisions are made."""
        if self._last is None or key <= self._last:
            self._between_passes()
        self._last = key
        self._trim_heap()
        self.migrator.poll()
        if self._hurried:
            self._hurry()

    def _trim_heap(self) -> None:
        """While a prompt passes the heap keeps what is freed (see heap.py): where all comes near what was
        planned, that goes back."""
        if self.watch.latest is None or self._reserve is not None or self.watch.latest[0] == self._looked:
            return
        self._looked, seen = self.watch.latest
        anon, footprint = seen.snapshot.process_anon, self._footprint()
        near = self._held(seen) + _to_come(footprint, seen) + HEAP_STEP > footprint.total
        if near and anon > self._trimmed + HEAP_STEP:
            return_free_memory()
            self._trimmed = process_memory(Host()).anon

    def _hurry(self) -> None:
        """Where pages are read back over and over, waiting for a chunk to leave takes less time than keeping
        it: its reading, its writing, and the next one is begun."""
        for _ in range(2):
            if (ticket := self.migrator.under_way) is None:
                return
            with suppress(DualBladeError):  # poll() tells of it
                ticket.wait()
            self.migrator.poll()

    def grown(self, tensor: Tensor) -> None:
        if tensor.segments[-1].room.path is PathKind.PAGE_CACHE:
            self.migrator.claim([tensor])

    def spare(self) -> bool:
        return self.migrator.spare()

    def opens(self, kind: PathKind, grows: bool = False) -> bool:
        """The path is there, or could be opened. grows: for more tokens than were planned for."""
        if kind in self.paths:
            return True
        opening, self._open_path = self._open_path, None
        if opening is None:
            return False
        try:
            opening(kind, grows)
            self.migrator.claim(list(self.tensors.values()))
        except DualBladeError as error:
            self.note = f"the {kind.value} path cannot be opened: {error}"
            return False
        return True

    def _between_passes(self) -> None:
        self.steps += 1
        self.migrator.grant = self._rate
        if self.watch.latest is None:
            return
        number, seen = self.watch.latest
        if number != self._decided or (self._more and self.migrator.idle):
            self._decided = number
            self._decide(number, seen)

    def reserve(self, nbytes: int | None) -> None:
        """What a forward pass holds from here on, at most what was planned; None: that."""
        if nbytes != self._reserve:
            self._reserve = nbytes
            self.watch.stir()

    # decide ---------------------------------------------------------------------------------

    def _decide(self, number: int, seen: Look) -> None:
        states = [self._state_of(self.tensors[key]) for key in self._keys]
        facts, limits, before = self._facts(number, seen, states), self._limits(), self._state
        decision = revise(states, facts, before, limits)
        self._state, self._more, self.share = decision.state, decision.more, decision.share
        if decision.moves or decision.state.waiting:
            self.watch.stir()
        if self._trace is not None:
            self._trace.write(encode(self.steps, states, facts, before, limits, decision) + "\n")
        if self._placer is not None:
            self._placer.share = decision.share
            self._placer.used = sum(state.cached * state.block_bytes for state in states)
        self._carry_out(decision, limits, facts.pressed)

    def _carry_out(self, decision: Decision, limits: Limits, pressed: bool) -> None:
        if not self._ready(decision.moves):
            return
        promotes = bool(decision.moves) and decision.moves[0].to is PathKind.PAGE_CACHE
        self._rate = self.migrator.grant = limits.promote if promotes else limits.demote
        self._hurried = pressed and not promotes
        for move in decision.moves:
            if move.to not in self.migrator.refused:
                self._reasons[move.key, move.to] = f"live: {move.reason}"
                self.moves.append((self.steps, move))
        self.migrator.want(decision.moves)

    def _ready(self, moves: Sequence[Move]) -> bool:
        return not moves or self.opens(moves[0].to)

    def _state_of(self, tensor: Tensor) -> TensorState:
        cached = cached_written = 0
        for segment in tensor.segments:
            if segment.room.path is PathKind.PAGE_CACHE:
                cached += segment.blocks
                cached_written += min(segment.blocks, max(0, tensor.stored - segment.first))
        stuck = tensor.blocks - sum(home.blocks for home in tensor.homes.get(PathKind.DIRECT, ()))
        if PathKind.DIRECT not in self.paths and self._open_path:
            stuck = 0  # it will be opened with room for all
        return TensorState(
            tensor.spec.key, tensor.layout.block_bytes, tensor.blocks, tensor.stored, cached, cached_written,
            stuck, tensor.mapped is not None,
        )  # fmt: skip

    def _facts(self, number: int, seen: Look, states: Sequence[TensorState]) -> Facts:
        snapshot, budget = seen.snapshot, self._budget
        refaulted, some, full = self._strain(number, seen)
        # A large folio that was dropped in part stays whole, and counts; what is read in place may be in
        # memory before it is written.
        ours = sum(
            (state.cached if self.tensors[state.key].mapped else state.cached_written) * state.block_bytes
            for state in states
        )
        waste = seen.pages.cached - ours
        held = self._held(seen) + max(0, waste)
        footprint = self._footprint()
        kernel = min(budget.kernel, seen.pages.cached // KERNEL_PART)  # the headroom is less for it already
        # in a forward pass of a prompt the reserve is held already
        to_take = max(0, footprint.total - held - kernel)
        room = snapshot.available
        if snapshot.cgroup_headroom is not None:  # our own dirty pages will be clean, and ours again
            room = min(room, snapshot.cgroup_headroom + seen.pages.dirty)
        return Facts(
            number=number,
            budget=budget.budget,
            cap=budget.cap,
            footprint=footprint.total,
            held=held + _to_come(footprint, seen),
            room=room - to_take,
            room_source=snapshot.headroom_source,
            resident=seen.pages.cached,
            refaulted=refaulted,
            some=some,
            full=full,
            steps_left=self._steps_left(),
            waited=self._waited(),
        )

    def _held(self, seen: Look) -> int:
        """By the process, beside what the page cache holds for it."""
        return seen.snapshot.process_anon + seen.snapshot.process_hugetlb + self._budget.mapped

    def _footprint(self) -> Footprint:
        """With the unfinished blocks that are in memory of their own now, and passes as they are now."""
        planned = self._budget.footprint
        reserve = planned.reserve_bytes if self._reserve is None else self._reserve
        copied = (tensor for tensor in self.tensors.values() if tensor.mapped is None)
        return replace(
            planned,
            tails_bytes=sum(each.layout.block_bytes for each in copied),
            reserve_bytes=min(reserve, planned.reserve_bytes),
        )

    def _strain(self, number: int, seen: Look) -> tuple[int, float, float]:
        """Since the look that was decided on before: bytes read back, and per cent of the time in which some
        task and all of them waited for memory."""
        if self._looks is None or number != self._state.number:
            self._looks = (self._looks[1] if self._looks else seen), seen
        before, now = self._looks
        then, here = before.pressure, now.pressure
        part = 100 / max(now.at - before.at, 0.001)
        return (
            max(0, here.refault_bytes - then.refault_bytes),
            max(0.0, here.some_s - then.some_s) * part,
            max(0.0, here.full_s - then.full_s) * part,
        )

    def _steps_left(self) -> int | None:
        if self._budget.tokens is None:
            return None
        held = max((tensor.tokens for tensor in self.tensors.values()), default=0)
        return max(0, self._budget.tokens - held)

    def _limits(self) -> Limits:
        blocks = [(tensor.blocks, tensor.layout.block_bytes) for tensor in self.tensors.values()]
        total, largest = sum(n * size for n, size in blocks), max((size for _, size in blocks), default=1)
        return Limits(
            demote=max(total // DEMOTE_PART, self.region.size),
            promote=max(total // PROMOTE_PART, self.region.size),
            band=max(2 * largest, min(total // BAND_PART, LARGEST_BAND)),
            patience=PATIENCE,
            policy=self._budget.policy,
            in_place=self._budget.in_place,
        )

    # report ---------------------------------------------------------------------------------

    def placements(self, planned: Sequence[Placement]) -> list[Placement]:
        """Where the tensors are now, each path of each tensor, with the reason of the last decision or of
        the plan."""
        reasons = {(item.key, item.path): item.reason for item in planned} | self._reasons
        found = []
        for key in self._keys:
            sizes: dict[PathKind, int] = defaultdict(int)
            for segment in self.tensors[key].segments:
                sizes[segment.room.path] += segment.blocks * self.tensors[key].layout.block_bytes
            found += [
                Placement(key, path, size, reasons.get((key, path), "live")) for path, size in sizes.items()
            ]
        return found

    def report(self) -> dict[str, Any]:
        """The part "governor" of `run --json`. Bytes demoted and promoted are those that arrived."""
        migrator = self.migrator
        notes = [self.note, self.watch.error, *dict.fromkeys(migrator.refused.values())]
        return {
            "steps": self.steps,
            "share_bytes": self.share,
            "demoted_bytes": migrator.moved_bytes[PathKind.DIRECT],
            "promoted_bytes": migrator.moved_bytes[PathKind.PAGE_CACHE],
            "copied_bytes": migrator.copied_bytes,
            "moves": [_reported(step, move) for step, move in self.moves[-MOVES_REPORTED:]],
            "notes": [note for note in notes if note],
        }

    def close(self) -> None:
        """Before the paths are closed."""
        self.watch.stop()
        if self._trace is not None:
            self._trace.close()


def _to_come(footprint: Footprint, seen: Look) -> int:
    """What no touch had brought in yet of the memory that is planned for slots, tails and migrations."""
    return sum(max(0, getattr(footprint, part) - there) for part, there in seen.touched.items())


def _reported(step: int, move: Move) -> dict[str, Any]:
    record = move_record(move)
    sides = [path.value for path in PathKind if path is not move.to] + [move.to.value]
    return {
        "step": step,
        "tensor": record["tensor"],
        "from": sides[0],
        "to": sides[1],
        "bytes": move.bytes,
        "copied": move.copied,
        "reason": move.reason,
    }


def _open_trace(path: Path | None) -> IO[str] | None:
    if path is None:
        return None
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be written: {error.strerror}") from error
