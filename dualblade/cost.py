# SPDX-License-Identifier: Apache-2.0
"""How long a prompt and a token will take, from a model's shapes and measured rates. Pure arithmetic.

Work divided by the rate at which the machine does work of that kind, as in the roofline model (Williams,
Waterman & Patterson 2009, "Roofline: an insightful visual performance model"). The counts of work are those
of Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1: two operations a parameter and
token; attention four a query, key and channel. Rates are measured on the operations themselves, so what
a kernel reaches of its peak is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# A recomputation or a cache in memory has to be faster by this much before it is worth a word.
WORTH_SAYING = 1.05


@dataclass(frozen=True, slots=True)
class Rate:
    """Work a second, and where the number comes from: "bench io", "run", "measured", or "assumed"."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class StorageRates:
    """Bytes a second over each path."""

    direct_read: Rate
    direct_write: Rate
    cached_read: Rate
    cached_write: Rate


@dataclass(frozen=True, slots=True)
class ComputeRates:
    """linear: (rows, seconds a parameter) of a product of so many rows with a weight matrix, rows ascending.
    scan: bytes of K and V a second that one query row a sequence attends to. attention: operations a second
    of attention with many query rows. layer_s: seconds a decoder layer costs beside these, a pass."""

    linear: tuple[tuple[int, float], ...]
    scan: float
    attention: float
    layer_s: float
    source: str

    def seconds_a_parameter(self, rows: float) -> float:
        """Between two measured numbers of rows a straight line; beyond the last one in proportion."""
        points = self.linear
        if rows <= points[0][0]:
            return points[0][1]
        for (below, low), (above, high) in pairwise(points):
            if rows <= above:
                return low + (high - low) * (rows - below) / (above - below)
        most, seconds = points[-1]
        return seconds * rows / most


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Attention of one layer. width: query heads x head_dim. token_bytes: K and V of one token of one
    sequence. window: tokens it sees, None for all."""

    width: int
    token_bytes: int
    window: int | None = None

    def seen(self, context: float) -> float:
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """layer_parameters: that one token is multiplied with in all decoder layers together; head_parameters:
    in the output head. layers: decoder layers. attention: those that have any that grows or slides."""

    layer_parameters: int
    head_parameters: int
    layers: int
    attention: tuple[LayerShape, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What one group of sequences does. batch: sequences. new_tokens: decoded ones. chunk: prompt tokens of a
    pass. direct_bytes, cached_bytes: of KV on either path with all tokens there. reread: tokens of KV read
    again while the prompt goes through. overlapped: transfers run while layers compute. copied: what the page
    cache holds is copied to slots; else attention reads it where it is."""

    batch: int
    prompt: int
    new_tokens: int
    chunk: int
    direct_bytes: int
    cached_bytes: int
    reread: int
    overlapped: bool
    copied: bool

    @property
    def context(self) -> float:
        """Tokens in the cache half-way through decoding."""
        return self.prompt + self.new_tokens / 2

    def share(self, tokens: float) -> float:
        """What part of the KV bytes so many tokens are."""
        return tokens / (self.prompt + self.new_tokens)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first token, tokens) of every pass of the prompt."""
        for begin in range(0, self.prompt, self.chunk):
            yield begin, min(self.chunk, self.prompt - begin)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, and the parts that they are made of. storage_s: transfers of the direct path. copy_s: copies
    into the page cache and, where it is not read in place, out of it; they take a CPU."""

    seconds: float
    storage_s: float
    copy_s: float
    compute_s: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.storage_s + other.storage_s,
            self.copy_s + other.copy_s,
            self.compute_s + other.compute_s,
        )


NOTHING = Cost(0.0, 0.0, 0.0, 0.0)


def combined(storage_s: float, copy_s: float, compute_s: float, overlapped: bool) -> Cost:
    """Where transfers run while layers compute, the drive and the CPU work side by side and the slower one
    decides. Copies out of the page cache are work of the CPUs that compute (measured: a step over the page
    cache takes its compute and its copies, not the longer of the two)."""
    busy = copy_s + compute_s
    seconds = max(storage_s, busy) if overlapped else storage_s + busy
    return Cost(seconds, storage_s, copy_s, compute_s)


def decode_cost(model: ModelShape, run: Run, compute: ComputeRates, storage: StorageRates) -> Cost:
    """One token of every sequence: all KV is read once, in order."""
    part = run.share(run.context)
    return combined(
        run.direct_bytes * part / storage.direct_read.value,
        run.cached_bytes * part / storage.cached_read.value if run.copied else 0.0,
        decode_compute(model, run.batch, run.context, compute),
        run.overlapped,
    )


def decode_compute(model: ModelShape, batch: int, context: float, rates: ComputeRates) -> float:
    """Seconds of one token of `batch` sequences with `context` tokens each: every weight is read once, and
    every row of K and V."""
    parameters = model.layer_parameters + model.head_parameters
    scanned = sum(layer.token_bytes * layer.seen(context) for layer in model.attention) * batch
    return parameters * rates.seconds_a_parameter(batch) + scanned / rates.scan + model.layers * rates.layer_s


def prefill_cost(model: ModelShape, run: Run, compute: ComputeRates, storage: StorageRates) -> Cost:
    """The whole prompt: every row is written once behind compute, and some are read again."""
    written, again = run.share(run.prompt), run.share(run.reread)
    direct = written / storage.direct_write.value + again / storage.direct_read.value
    cached = written / storage.cached_write.value
    cached += again / storage.cached_read.value if run.copied else 0.0
    return combined(
        run.direct_bytes * direct,
        run.cached_bytes * cached,
        prefill_compute(model, run.batch, run.chunks(), compute),
        run.overlapped,
    )


def prefill_compute(
    model: ModelShape, batch: int, chunks: Iterator[tuple[int, int]], rates: ComputeRates
) -> float:
    """Seconds of a prompt's passes, each (first token, tokens). The head computes one row a sequence."""
    seconds = 0.0
    for begin, tokens in chunks:
        seconds += model.layer_parameters * rates.seconds_a_parameter(batch * tokens)
        seconds += model.head_parameters * rates.seconds_a_parameter(batch) + model.layers * rates.layer_s
        seconds += batch * _attention_operations(model.attention, begin, tokens) / rates.attention
    return seconds


def _attention_operations(layers: Sequence[LayerShape], begin: int, tokens: int) -> float:
    """Of one sequence. The first chunk's causal half is skipped by the kernels; later ones have a mask,
    under which all pairs are computed, those outside a window too."""
    keys = tokens / 2 if begin == 0 else begin + tokens
    return sum(4.0 * layer.width * tokens * keys for layer in layers)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the same run would take without offloading: seconds a token. in_memory_s: None where the KV does
    not fit the budget. recompute_s: every token from the whole context again."""

    in_memory_s: float | None
    recompute_s: float


def elsewhere(model: ModelShape, run: Run, compute: ComputeRates, fits: bool) -> Elsewhere:
    """fits: the budget holds all KV as it is, beside everything else."""
    whole = iter([(0, int(run.context))])
    return Elsewhere(
        decode_compute(model, run.batch, run.context, compute) if fits else None,
        prefill_compute(model, run.batch, whole, compute),
    )


def losses(decode_s: float, other: Elsewhere) -> list[str]:
    """Why offloading does not pay here, in words; nothing where it does."""
    found = []
    if other.in_memory_s is not None:
        found.append(
            "the budget holds the whole KV cache: in memory a token would take about "
            f"{duration(other.in_memory_s)}, offloaded {duration(decode_s)}"
        )
    if other.recompute_s * WORTH_SAYING < decode_s:
        found.append(
            "computing the whole context again for every token would be faster: about "
            f"{duration(other.recompute_s)} a token, offloaded {duration(decode_s)}"
        )
    return found


def duration(seconds: float) -> str:
    """ "12.3 ms", "4.56 s", "12 min" """
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"
