# SPDX-License-Identifier: Apache-2.0
"""Both plans of a run, with layers in one piece and with layers that are streamed, for --stream faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dualblade.attention import streams
from dualblade.bench.compute import known_compute
from dualblade.errors import BudgetError, ModelError
from dualblade.forecast import Forecast, Prefill
from dualblade.host.maps import mapped_weights
from dualblade.host.sysfs import Host
from dualblade.models import empty_model
from dualblade.offload import make_request
from dualblade.planner import RunPlan, make_plan
from dualblade.predict import model_shape, predict
from dualblade.residency import take_snapshot
from dualblade.settings import CacheSettings
from dualblade.speeds import storage_rates
from dualblade.stream_choice import Choice, Expected, choose
from dualblade.tensors import TensorSpec

CANNOT = "this model's attention cannot be streamed"


def choose_forecast(
    forecast: Forecast, expect: Callable[[Forecast], Expected | None], new_tokens: int | None
) -> tuple[Choice, Forecast]:
    """expect: what a run like that will take, None where the budget does not hold it. What is not streamed by
    choice goes on as with "auto"."""
    auto = replace(forecast, settings=replace(forecast.settings, stream="auto"))
    if not forecast.can_stream:
        return Choice(False, CANNOT), auto
    whole, streamed = forecast.manners()
    choice = choose(expect(whole), expect(streamed), new_tokens)
    return choice, streamed if choice.streamed and choice.whole else auto


def settings_for_cache(
    config: Any, specs: Sequence[TensorSpec], dtype: Any, settings: CacheSettings, grows: bool
) -> tuple[CacheSettings, Choice]:
    """Settings of a cache with stream="faster", and why. grows: nobody knows how many tokens come."""
    if not streams(config):
        return replace(settings, stream="never"), Choice(False, CANNOT)
    if grows or not specs:
        why = "max_tokens was not given" if grows else "nothing of this model is offloaded"
        return replace(settings, stream="auto"), Choice(False, why)
    choice = _choose_for_cache(config, specs, dtype, settings)
    stream = "always" if choice.streamed and choice.whole else "auto"
    return replace(settings, stream=stream), choice


def _choose_for_cache(
    config: Any, specs: Sequence[TensorSpec], dtype: Any, settings: CacheSettings
) -> Choice:
    """By what a token takes when `specs` are full. How the prompt goes through, and how many tokens follow,
    is the caller's to know."""
    try:
        shape = model_shape(config, empty_model(config, dtype), dtype.itemsize)
    except ModelError as error:
        return Choice(False, f"nothing can be predicted: {error}")
    storage = storage_rates(settings.cache_dir, settings.nvme)
    prompt, batch = specs[0].tokens - 1, specs[0].batch

    def expect(streamed: bool) -> Expected | None:
        plan = _plan(specs, replace(settings, stream="always" if streamed else "never"))
        if plan is None:
            return None
        compute = known_compute(config, dtype, streamed, settings)
        once = Prefill(prompt, prompt, streamed)
        return predict(
            shape, plan, once, prompt, 1, [batch], storage, compute, settings.pipeline, settings.checksum
        ).expected

    return choose(expect(False), expect(True))


def _plan(specs: Sequence[TensorSpec], settings: CacheSettings) -> RunPlan | None:
    host = Host()
    snapshot = take_snapshot(host)
    try:
        return make_plan(specs, make_request(settings, snapshot, mapped_weights(host)), snapshot)
    except BudgetError:
        return None
