# SPDX-License-Identifier: Apache-2.0
"""One `run`: check everything, load the model, generate, report. What a person sees is the caller's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dualblade import loading, models, runner
from dualblade.achieved import remember_run
from dualblade.bench.compute import CPU, compute_name, known_compute, measure_compute
from dualblade.cost import ComputeRates
from dualblade.device import leave_a_cpu
from dualblade.device_cuda import find_accelerator
from dualblade.errors import BudgetError, ConfigError, DualBladeError, UsageError
from dualblade.forecast import DEVICE_PART, Forecast, Prefill, check_machine, device_bytes
from dualblade.groups import group_sizes, group_slices, largest_group
from dualblade.handles import STREAMED, in_memory_cache
from dualblade.hf import DualBladeCache
from dualblade.host.heap import keep_large_blocks, return_large_blocks
from dualblade.host.sysfs import Host
from dualblade.offload import by_spdk
from dualblade.planner import RunPlan
from dualblade.predict import Prediction, model_shape, predict
from dualblade.residency import MemorySnapshot, take_snapshot
from dualblade.run_options import RunOptions, Watcher, read_prompt
from dualblade.runner import Generated
from dualblade.speeds import remember_compute, storage_rates
from dualblade.stream_choice import FASTER, Choice, Expected, choice_words
from dualblade.stream_plans import choose_forecast
from dualblade.tensors import PathKind
from dualblade.units import GIB, counted, format_size
from dualblade.zoo import resolve

MUCH = GIB  # of memory: taking it takes long enough to be told of


class Session:
    """Refuses before anything is loaded, written or reserved where the run cannot succeed.

    Raises UsageError, ModelError, ConfigError, BudgetError, TargetError, StorageError.
    """

    def __init__(self, options: RunOptions, watcher: Watcher = Watcher(), plan_only: bool = False):
        self.options = options
        self.watcher = watcher
        self.dummy = options.weights == "dummy"
        self.ref = resolve(options.model)
        self.accelerator = find_accelerator(options.device)
        watcher.stage("reading the model's configuration")
        self.config = loading.load_config(self.ref, shapes_only=plan_only or self.dummy)
        self.dtype = models.pick_dtype(self.config, options.dtype)
        self.tokenizer = self._load_tokenizer()
        self.prompt = self._make_prompt()
        self.context = self.prompt.ids.shape[1] + options.max_new_tokens
        models.check_context(self.config, self.context)
        empty = models.empty_model(self.config, self.dtype, options.attention, shared=self.dummy)
        self.shape = model_shape(self.config, empty, self.dtype.itemsize)
        forecast = self._forecast(empty)
        choice: Choice | None = None
        if options.settings.stream == FASTER:
            new_tokens = None if plan_only else options.max_new_tokens
            choice, forecast = choose_forecast(forecast, self._expect, new_tokens)
        self._take(forecast)
        self.choice = choice.carried_out(self.prefill.streamed) if choice else None

    def _take(self, forecast: Forecast) -> None:
        """Plan for this one from now on."""
        self.groups, self.forecast = self._form_groups(forecast, take_snapshot(Host()))
        self.prefill = self._prefill(self.forecast, take_snapshot(Host()))
        self.settings = self.forecast.settings_for(self.context, self.prefill)

    def _expect(self, forecast: Forecast) -> Expected | None:
        """None where neither the budget nor the machine holds it."""
        self._take(forecast)
        try:
            return self.predict(self.plan()).expected
        except BudgetError:
            return None

    def _load_tokenizer(self) -> Any:
        if self.options.prompt_len:
            return None
        if self.dummy and not loading.has_tokenizer(self.ref):
            raise UsageError(
                f"dummy weights of {self.ref.name} come without a tokenizer",
                "pass --prompt-len N for N random tokens",
            )
        return loading.load_tokenizer(self.ref)

    def _make_prompt(self) -> runner.Prompt:
        options = self.options
        if options.prompt_len:
            vocabulary = models.text_config(self.config).vocab_size
            return runner.random_prompt(
                options.batch_size, options.prompt_len, vocabulary, options.sampling.seed
            )
        text = options.prompt if options.prompt is not None else read_prompt(options.prompt_file)
        return runner.encode(self.tokenizer, [text] * options.batch_size, options.chat)

    def _forecast(self, empty: Any) -> Forecast:
        options = self.options
        weights = models.weight_bytes(empty)
        self._choose_device(weights)
        elsewhere = self.accelerator is not None and not self.accelerator.unified
        return Forecast(
            self.config,
            replace(options.settings, weights=0 if elsewhere else weights),
            options.batch_size,
            self.dtype.itemsize,
            models.attention_of(empty),
            options.chunk,
            all_logits=not models.last_position_only(empty),
            limit=models.context_limit(self.config),
            can_stream=self._can_stream(empty),
            accelerator=self.accelerator,
            on_device=weights if elsewhere else 0,
        )

    def _choose_device(self, weights: int) -> None:
        """`auto` takes a device that holds the weights."""
        found = self.accelerator
        if found is None or self.options.device != "auto" or weights < found.free * DEVICE_PART:
            return
        self.watcher.stage(f"the weights do not fit {found.model}, so the CPU computes")
        self.accelerator = None

    def _can_stream(self, empty: Any) -> bool:
        """Raises ConfigError where that is asked for and cannot be."""
        can = self.options.attention == "sdpa" and models.can_stream(empty)
        if self.options.settings.stream == "always" and not can:
            raise ConfigError(
                f"the attention of {self.ref.name} cannot be streamed ({models.attention_of(empty)})",
                "leave out --stream always and --attention",
            )
        return can

    def _form_groups(self, forecast: Forecast, snapshot: MemorySnapshot) -> tuple[tuple[int, ...], Forecast]:
        """Sizes of the groups, and the forecast of the largest. Layers in one piece in smaller groups come
        before layers that are streamed; where nothing fits, it is told of the smallest group."""
        most = min(self.options.group_size or forecast.batch, forecast.batch)
        if self.options.group_size is None:
            found = (largest_group(most, partial(self._fits, way, snapshot)) for way in forecast.manners())
            most = next((count for count in found if count), 1)
        sizes = group_sizes(forecast.batch, most)
        return sizes, replace(forecast, batch=sizes[0])

    def _fits(self, forecast: Forecast, snapshot: MemorySnapshot, batch: int) -> bool:
        group = replace(forecast, batch=batch)
        return group.fits(self.context, self._prefill(group, snapshot), snapshot)

    def _prefill(self, forecast: Forecast, snapshot: MemorySnapshot) -> Prefill:
        return forecast.prefill_for(self.context, self.prompt.ids.shape[1], snapshot)

    @property
    def device(self) -> str:
        """Where the model computes, as torch names it."""
        return self.accelerator.name if self.accelerator else "cpu"

    @property
    def device_model(self) -> str:
        return self.accelerator.model if self.accelerator else CPU

    @property
    def attention(self) -> str:
        """What the model is built with."""
        return STREAMED if self.prefill.streamed else self.options.attention

    def plan(self) -> RunPlan:
        """What run() will do, by arithmetic alone. Raises BudgetError."""
        snapshot = take_snapshot(Host())
        plan = self.forecast.plan(self.context, self.prefill, snapshot)
        check_machine(plan, snapshot)
        return plan

    def all_cached_up_to(self) -> int | None:
        """The longest context of this batch whose KV the page cache holds entirely."""
        return self.forecast.all_cached_up_to(take_snapshot(Host()))

    def predict(self, plan: RunPlan, compute: ComputeRates | None = None) -> Prediction:
        """What a run of `plan` will take. compute: as measured now; None for what is known of this CPU."""
        folder = self.settings.cache_dir
        if compute is None:
            compute = known_compute(
                self.config, self.dtype, self.prefill.streamed, self.settings, self.device_model
            )
        return predict(
            self.shape,
            plan,
            self.prefill,
            self.prompt.ids.shape[1],
            self.options.max_new_tokens,
            self.groups,
            storage_rates(folder, self.settings.nvme),
            compute,
            self.settings.pipeline,
            self.settings.checksum,
        )

    def run(self) -> dict[str, Any]:
        """The record of `run --json`. Everything is reserved before the weights are loaded, so what
        cannot work is refused at once."""
        plan = self.plan()
        if self.settings.cgroup:  # not before: a budget that is too small is refused in words
            self.settings.cgroup.limit(self.settings.budget)
        return_large_blocks()
        folder = None if self.dummy else self._weight_folder()
        taken = plan.bytes_on(PathKind.PAGE_CACHE) if plan.in_place else 0
        if taken >= MUCH:
            self.watcher.stage(f"taking {format_size(taken)} of memory for K and V")
        # Also while it is verified: another number of threads may round differently.
        with leave_a_cpu(by_spdk(self.settings.nvme)):
            return self._run(folder)

    def _run(self, folder: Path | None) -> dict[str, Any]:
        with DualBladeCache(
            self.config,
            mem_budget=self.settings.budget,
            max_tokens=self.context,
            batch_size=self.groups[0],
            dtype=self.dtype,
            device=self.device,
            settings=self.settings,
        ) as cache:
            model = self._load(folder)
            rates = self._measure(model)
            predicted = self._say_prediction(cache.storage.plan, rates[self.prefill.streamed])
            results, text = self._generate_groups(model, cache)
            chunks = cache.storage.chunks
            device = {"device_bytes": device_bytes(cache.storage.plan, self.forecast)}
            record = self._record(results, text) | predicted.record() | device | cache.report()
            record["pipeline"]["stream_choice"] = self.choice.record() if self.choice else None
            for streamed, each in rates.items():
                name = compute_name(self.config, self.dtype, streamed, self.device_model)
                remember_compute(self.settings.cache_dir, name, each)
            remember_run(cache.storage)
        if self.settings.cgroup:
            record["memory"]["cgroup"] = self.settings.cgroup.record(sum(each.decode_s for each in results))
            self.settings.cgroup.leave()  # the cache in memory, to verify with, is no part of the budget
        if self.options.verify:
            record["verified"] = self._verify(model, results, chunks)
        return record

    def _measure(self, model: Any) -> dict[bool, ComputeRates]:
        """What the CPU does with layers that are streamed (True) or not; both where a choice will ask for it
        the next time."""
        ways = {self.prefill.streamed}
        if self.choice and self.forecast.can_stream:
            ways = {False, True}
        return {way: measure_compute(model, self.shape, self.groups[0], way) for way in sorted(ways)}

    def _say_prediction(self, plan: RunPlan, rates: ComputeRates) -> Prediction:
        predicted = self.predict(plan, rates)
        if self.choice:
            self.watcher.stage(choice_words(self.choice.record()))
        for line in predicted.words():
            self.watcher.stage(line)
        return predicted

    def _weight_folder(self) -> Path:
        if self.ref.folder is None:
            self.watcher.stage("looking at the weights, which are downloaded where they are not here yet")
        return loading.weight_folder(self.ref)

    def _load(self, folder: Path | None) -> Any:
        options = self.options
        if folder is None:
            layers = counted(models.text_config(self.config).num_hidden_layers, "layer")
            self.watcher.stage(f"dummy weights: random values, and one decoder layer shared by all {layers}")
            return loading.dummy_model(
                self.config, self.dtype, self.attention, options.sampling.seed, self.device
            )
        self.watcher.stage("loading the weights")
        return loading.load_model(self.ref, folder, self.config, self.dtype, self.attention, self.device)

    def _generate_groups(self, model: Any, cache: DualBladeCache) -> tuple[list[Generated], str | None]:
        """Group after group from its prompt to its last token, on the same rooms and slots. What each
        generated, and the text of the first sequence."""
        results, texts = [], []
        for number, part in enumerate(group_slices(self.groups)):
            if len(self.groups) > 1:
                self.watcher.stage(
                    f"group {number + 1} of {len(self.groups)}, sequences {part.start + 1} to {part.stop}"
                )
            if number:
                cache.begin(part.stop - part.start)
            result, text = self._generate(model, cache, number, quiet=False)
            results.append(result)
            texts.append(text)
        return results, texts[0]

    def _generate(self, model: Any, cache: Any, group: int, quiet: bool) -> tuple[Generated, str | None]:
        """One group. Its generator is seeded with the run's seed and the group's number, so that it draws
        the same whatever the groups before it drew."""
        watcher = Watcher() if quiet else self.watcher
        readable = self.tokenizer and not self.dummy
        write = watcher.text if group == 0 else Watcher().text
        stream = runner.TextStream(self.tokenizer, write) if readable else None

        def on_token(ids: list[int]) -> None:
            if stream and ids[0] >= 0:
                stream.push(ids[0])

        def on_prefill(done: int, total: int) -> None:
            if done == total and self.settings.cgroup and not quiet:
                self.settings.cgroup.decode_begins()
            watcher.prefill(done, total)

        def on_decode() -> None:
            return_large_blocks()
            if isinstance(cache, DualBladeCache):
                cache.decode_begins(self.forecast.decode_activations(self.context, self.prefill))

        eos = runner.end_tokens(model) if readable else frozenset()
        sampling = self.options.sampling
        generation = runner.Generation(
            model,
            cache,
            self._prompts()[group],
            replace(sampling, seed=sampling.seed + group),
            eos,
            self.prefill.chunk,
            self.prefill.span,
            on_prefill,
            on_token,
            on_decode,
        )
        if isinstance(cache, DualBladeCache) and self.forecast.keeps_heap:
            keep_large_blocks()
        result = generation.run(self.options.max_new_tokens)
        return result, stream.end() if stream else None

    def _prompts(self) -> list[runner.Prompt]:
        """Of each group, in the order of the batch."""
        ids, mask = self.prompt.ids, self.prompt.mask
        return [runner.Prompt(ids[part], mask[part]) for part in group_slices(self.groups)]

    def _verify(self, model: Any, results: list[Generated], chunks: dict[int, int] | None) -> bool:
        """Generate once more, in the same groups, with the whole cache in memory, in the same pieces where
        it was streamed. Raises DualBladeError where a token differs."""
        self.watcher.stage("generating again with the KV cache in memory")
        for group, result in enumerate(results):
            expected, _ = self._generate(model, in_memory_cache(self.config, chunks), group, quiet=True)
            if expected.tokens != result.tokens:
                raise DualBladeError(
                    "the tokens differ from those with the KV cache in memory",
                    "this is a defect: please report it",
                )
        return True

    def _record(self, results: list[Generated], text: str | None) -> dict[str, Any]:
        tokens = [row for result in results for row in result.tokens]
        record: dict[str, Any] = {
            "model": self.options.model,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": "dummy" if self.dummy else "real",
            "prefill_chunk": self.prefill.chunk,
            "prefill_span": self.prefill.span,
            "batch_size": self.options.batch_size,
            "group_size": self.groups[0],
            "groups": [_group_record(result) for result in results],
            "prompt_tokens": self.prompt.ids.shape[1],
            "new_tokens": max(map(len, tokens)),
            "prefill_s": sum(result.prefill_s for result in results),
            "decode_s": sum(result.decode_s for result in results),
            "decode_s_per_token": sum(result.s_per_token for result in results),
        }
        if text is None:
            return record | {"token_ids": tokens}
        return record | {"text": text}


def _group_record(result: Generated) -> dict[str, Any]:
    return {
        "sequences": len(result.tokens),
        "new_tokens": max(map(len, result.tokens)),
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "decode_s_per_token": result.s_per_token,
    }
