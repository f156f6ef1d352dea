# SPDX-License-Identifier: Apache-2.0
"""The governor's decisions as JSON lines, and the same decisions made again from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dualblade.cycle import Move, TensorState
from dualblade.errors import ConfigError
from dualblade.revision import Decision, Facts, GovernorState, Limits, revise
from dualblade.tensors import PathKind, TensorKey


@dataclass(frozen=True, slots=True)
class Replayed:
    """A recorded decision beside the one that `revise` makes of the same facts now."""

    step: int
    recorded: tuple[Move, ...]
    again: tuple[Move, ...]
    share: int
    share_again: int

    @property
    def same(self) -> bool:
        return (self.recorded, self.share) == (self.again, self.share_again)


def encode(
    step: int,
    tensors: Sequence[TensorState],
    facts: Facts,
    before: GovernorState,
    limits: Limits,
    decision: Decision,
) -> str:
    """One line: what was known, and what was decided."""
    record = {
        "step": step,
        "facts": asdict(facts),
        "state": asdict(before),
        "limits": asdict(limits),
        "tensors": [_tensor(tensor) for tensor in tensors],
        "share": decision.share,
        "moves": [move_record(move) for move in decision.moves],
    }
    return json.dumps(record, separators=(",", ":"))


def move_record(move: Move) -> dict[str, Any]:
    return {
        "tensor": str(move.key),
        "to": move.to.value,
        "blocks": move.blocks,
        "cached": move.cached,
        "bytes": move.bytes,
        "copied": move.copied,
        "reason": move.reason,
    }


def replay(lines: Iterable[str]) -> Iterator[Replayed]:
    """Raises ConfigError for a line that is no recorded decision."""
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            yield _again(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"line {number} is no decision of the governor: {error}") from error


def _again(record: dict[str, Any]) -> Replayed:
    tensors = [_state(fields) for fields in record["tensors"]]
    limits, facts = Limits(**record["limits"]), Facts(**record["facts"])
    decision = revise(tensors, facts, GovernorState(**record["state"]), limits)
    recorded = tuple(_move(fields) for fields in record["moves"])
    return Replayed(record["step"], recorded, decision.moves, record["share"], decision.share)


def _tensor(tensor: TensorState) -> list[Any]:
    key = tensor.key
    return [
        key.layer, key.kind, tensor.block_bytes, tensor.blocks, tensor.written, tensor.cached,
        tensor.cached_written, tensor.stuck, int(tensor.in_place),
    ]  # fmt: skip


def _state(fields: list[Any]) -> TensorState:
    layer, kind, size, blocks, written, cached, cached_written, stuck, in_place = fields
    key = TensorKey(layer, kind)
    return TensorState(key, size, blocks, written, cached, cached_written, stuck, bool(in_place))


def _move(fields: dict[str, Any]) -> Move:
    _, layer, kind = fields["tensor"].split()
    rest = {name: fields[name] for name in ("blocks", "cached", "bytes", "copied", "reason")}
    return Move(TensorKey(int(layer), kind), PathKind(fields["to"]), **rest)
