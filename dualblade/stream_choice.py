# SPDX-License-Identifier: Apache-2.0
"""One piece or streamed, where a layer's K and V fit the budget: --stream faster. Pure arithmetic.

One piece is exact bit for bit. So streaming has to be clearly faster, by speeds that were measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from dualblade.cost import duration

FASTER = "faster"
# What a prediction may be wrong by before one piece is given up for it.
MARGIN = 1.1
TOO_LARGE = "the budget does not hold one layer's K and V"
FITS_AFTER_ALL = "the budget just holds one layer's K and V"


@dataclass(frozen=True, slots=True)
class Expected:
    """What one of the ways is predicted to take, in seconds. decode_s: one token of every sequence.
    prefill_s: the whole prompt. unmeasured: what of it rests on assumed speeds, in words."""

    decode_s: float
    prefill_s: float
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """whole, chunks: what either way was predicted to take, None where it cannot be or was not asked."""

    streamed: bool
    reason: str
    whole: Expected | None = None
    chunks: Expected | None = None

    def carried_out(self, streamed: bool) -> Choice:
        """As it came: what the process holds may have changed since both ways were planned, and with it
        whether one piece fits."""
        if streamed == self.streamed:
            return self
        return replace(self, streamed=streamed, reason=TOO_LARGE if streamed else FITS_AFTER_ALL)

    def record(self) -> dict[str, Any]:
        """`stream_choice` of `--json`. Seconds."""
        return {
            "attention": "streamed" if self.streamed else "one-piece",
            "reason": self.reason,
            "margin": MARGIN,
            "one_piece": asdict(self.whole) if self.whole else None,
            "streamed": asdict(self.chunks) if self.chunks else None,
        }


def choice_words(record: dict[str, Any]) -> str:
    """A line for people, of what `record` gave."""
    way = "streamed" if record["attention"] == "streamed" else "in one piece"
    return f"--stream {FASTER}: attention {way}, because {record['reason']}"


def choose(whole: Expected | None, chunks: Expected | None, new_tokens: int | None = None) -> Choice:
    """whole: one piece; chunks: streamed; None where the budget does not hold it. new_tokens: with which the
    prompt's rereading has to be won back; None where nobody knows, and then a token alone decides."""
    if whole is None:
        return Choice(True, TOO_LARGE, None, chunks)
    if chunks is None:
        return Choice(False, "the budget does not hold what streaming takes", whole)
    streamed, reason = _compare(whole, chunks, new_tokens)
    return Choice(streamed, reason, whole, chunks)


def _compare(whole: Expected, chunks: Expected, new_tokens: int | None) -> tuple[bool, str]:
    if missing := list(dict.fromkeys(whole.unmeasured + chunks.unmeasured)):
        return False, f"the speeds are not all measured: {'; '.join(missing)}"
    both = (
        f"a token is predicted to take {duration(whole.decode_s)} in one piece and "
        f"{duration(chunks.decode_s)} streamed"
    )
    if chunks.decode_s >= whole.decode_s:
        return False, both
    if chunks.decode_s * MARGIN >= whole.decode_s:
        return False, f"{both}, which is too little to give up exact bits for"
    enough = _pays_from(whole, chunks)
    if new_tokens is not None and new_tokens < enough:
        return False, f"{both}, but the prompt takes longer: it pays from {enough} new tokens on"
    return True, both if enough <= 1 else f"{both}; with its prompt it pays from {enough} new tokens on"


def _pays_from(whole: Expected, chunks: Expected) -> int:
    """New tokens after which what the prompt took longer is won back."""
    lost, won = chunks.prefill_s - whole.prefill_s, whole.decode_s - chunks.decode_s
    return max(1, math.ceil(lost / won))
