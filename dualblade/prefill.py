# SPDX-License-Identifier: Apache-2.0
"""Prefill layer by layer: every chunk of the prompt passes one layer before the first passes the next.

One chunk after the other through the whole model reads a layer's K and V again for every chunk: half the
cache times the number of chunks. Here they stay in their slots until all chunks have passed, so every row
is written once and none is read. What is computed for a chunk is the same, in the same shapes, hence the
same bits. Each chunk's forward pass is a greenlet that pauses before every decoder layer, so the model's
own code runs unchanged, masks and all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from transformers.cache_utils import Cache

from dualblade.attention import Mask, masks_made


def by_layers(
    layers: Iterable[torch.nn.Module],
    passes: Sequence[Callable[[], torch.Tensor]],
    lead: int,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """What the last of `passes` returns; each is a forward pass through `layers` in their order. lead:
    layers that a pass must have behind it before the next begins. on_step is called whenever a pass
    has gone through a layer."""
    hub = getcurrent()

    def pause(*_: Any) -> None:
        masks = masks_made.get()
        if masks is None:
            return
        for mask in masks:
            mask.drop()
        hub.switch()
        for mask in masks:
            mask.restore()

    running = [greenlet(partial(_pass, forward)) for forward in passes]
    hooks = [layer.register_forward_pre_hook(pause) for layer in layers]
    try:
        result = _begin(running, lead, on_step)
        while alive := [forward for forward in running if not forward.dead]:
            for forward in alive:
                result = forward.switch()
                on_step()
        return result
    finally:
        for hook in hooks:
            hook.remove()
        for forward in running:
            if not forward.dead:
                forward.throw()


def _pass(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """In a greenlet, which has its own context variables."""
    made: list[Mask] = []
    masks_made.set(made)
    return forward()


def _begin(running: Sequence[greenlet], lead: int, on_step: Callable[[], None]) -> Any:
    result = None
    for forward in running:
        result = forward.switch()
        for _ in range(lead):
            if not forward.dead:
                result = forward.switch()
                on_step()
    return result


def leading_layers(cache: Cache) -> int:
    """Layers from which a model makes its masks and positions: the first of every kind. A pass has to find
    in them all that the passes before it have added."""
    kinds = [(type(layer), getattr(layer, "is_sliding", False)) for layer in cache.layers]
    return max((kinds.index(kind) for kind in kinds), default=0) + 1
