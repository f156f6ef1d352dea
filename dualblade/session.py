# SPDX-License-Identifier: Apache-2.0
"""One `run`: check everything, load the model, generate, report. What a person sees is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualblade import loading, models, runner
from dualblade.device import leave_a_cpu
from dualblade.errors import ConfigError, DualBladeError, UsageError
from dualblade.forecast import Forecast, check_machine, device_bytes
from dualblade.handles import STREAMED, in_memory_cache
from dualblade.hf import DualBladeCache
from dualblade.host.heap import return_large_blocks
from dualblade.host.sysfs import Host
from dualblade.planner import RunPlan
from dualblade.residency import take_snapshot
from dualblade.settings import CacheSettings
from dualblade.targets import find_target
from dualblade.zoo import resolve


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `run` and `plan`, as the user gave them."""

    model: str
    settings: CacheSettings
    prompt: str | None = None
    prompt_file: Path | None = None
    prompt_len: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 1
    dtype: str | None = None
    attention: str = "sdpa"
    chunk: int | None = None
    weights: str = "auto"
    chat: bool = False
    sampling: runner.Sampling = field(default_factory=runner.Sampling)
    verify: bool = False


@dataclass(frozen=True, slots=True)
class Watcher:
    """Called as the run goes on. prefill(done, total) in tokens; text(piece) of the first sequence."""

    stage: Callable[[str], None] = lambda text: None
    prefill: Callable[[int, int], None] = lambda done, total: None
    text: Callable[[str], None] = lambda piece: None


class Session:
    """Refuses before anything is loaded, written or reserved where the run cannot succeed.

    Raises UsageError, ModelError, ConfigError, BudgetError, TargetError, StorageError.
    """

    def __init__(self, options: RunOptions, watcher: Watcher = Watcher(), plan_only: bool = False):
        self.options = options
        self.watcher = watcher
        self.dummy = options.weights == "dummy"
        self.ref = resolve(options.model)
        watcher.stage("reading the model's configuration")
        self.config = loading.load_config(self.ref, shapes_only=plan_only or self.dummy)
        self.dtype = models.pick_dtype(self.config, options.dtype)
        self.tokenizer = self._load_tokenizer()
        self.prompt = self._make_prompt()
        self.context = self.prompt.ids.shape[1] + options.max_new_tokens
        models.check_context(self.config, self.context)
        self.forecast = self._forecast()
        tokens = self.prompt.ids.shape[1]
        self.prefill = self.forecast.prefill_for(self.context, tokens, take_snapshot(Host()))
        self.settings = self.forecast.settings_for(self.context, self.prefill)

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
        text = options.prompt if options.prompt is not None else _read(options.prompt_file)
        return runner.encode(self.tokenizer, [text] * options.batch_size, options.chat)

    def _forecast(self) -> Forecast:
        options = self.options
        empty = models.empty_model(self.config, self.dtype, options.attention, shared=self.dummy)
        return Forecast(
            self.config,
            replace(options.settings, weights=models.weight_bytes(empty)),
            options.batch_size,
            self.dtype.itemsize,
            models.attention_of(empty),
            options.chunk,
            all_logits=not models.last_position_only(empty),
            limit=models.context_limit(self.config),
            can_stream=self._can_stream(empty),
        )

    def _can_stream(self, empty: Any) -> bool:
        """Raises ConfigError where that is asked for and cannot be."""
        can = self.options.attention == "sdpa" and models.can_stream(empty)
        if self.options.settings.stream == "always" and not can:
            raise ConfigError(
                f"the attention of {self.ref.name} cannot be streamed ({models.attention_of(empty)})",
                "leave out --stream always and --attention",
            )
        return can

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

    def run(self) -> dict[str, Any]:
        """The record of `run --json`. Everything is reserved before the weights are loaded, so what
        cannot work is refused at once."""
        self.plan()
        if self.settings.cgroup:  # not before: a budget that is too small is refused in words
            self.settings.cgroup.limit(self.settings.budget)
        return_large_blocks()
        folder = None if self.dummy else self._weight_folder()
        nvme = self.settings.nvme
        # Also while it is verified: another number of threads may round differently.
        with leave_a_cpu(nvme is not None and find_target(nvme).by_spdk):
            return self._run(folder)

    def _run(self, folder: Path | None) -> dict[str, Any]:
        with DualBladeCache(
            self.config,
            mem_budget=self.settings.budget,
            max_tokens=self.context,
            batch_size=self.options.batch_size,
            dtype=self.dtype,
            settings=self.settings,
        ) as cache:
            model = self._load(folder)
            result, text = self._generate(model, cache)
            chunks = cache.storage.chunks
            device = {"device_bytes": device_bytes(cache.storage.plan)}
            record = self._record(result, text) | device | cache.report()
        if self.settings.cgroup:
            record["memory"]["cgroup"] = self.settings.cgroup.record(result.decode_s)
            self.settings.cgroup.leave()  # the cache in memory, to verify with, is no part of the budget
        if self.options.verify:
            record["verified"] = self._verify(model, result, chunks)
        return record

    def _weight_folder(self) -> Path:
        if self.ref.folder is None:
            self.watcher.stage("looking at the weights, which are downloaded where they are not here yet")
        return loading.weight_folder(self.ref)

    def _load(self, folder: Path | None) -> Any:
        options = self.options
        if folder is None:
            layers = models.text_config(self.config).num_hidden_layers
            self.watcher.stage(
                f"dummy weights: random values, and one decoder layer shared by all {layers} layers"
            )
            return loading.dummy_model(self.config, self.dtype, self.attention, options.sampling.seed)
        self.watcher.stage("loading the weights")
        return loading.load_model(self.ref, folder, self.config, self.dtype, self.attention)

    def _generate(self, model: Any, cache: Any, quiet: bool = False) -> tuple[runner.Generated, str | None]:
        watcher = Watcher() if quiet else self.watcher
        readable = self.tokenizer and not self.dummy
        stream = runner.TextStream(self.tokenizer, watcher.text) if readable else None

        def on_token(ids: list[int]) -> None:
            if stream and ids[0] >= 0:
                stream.push(ids[0])

        def on_prefill(done: int, total: int) -> None:
            if done == total and self.settings.cgroup and not quiet:
                self.settings.cgroup.decode_begins()
            watcher.prefill(done, total)

        eos = runner.end_tokens(model) if readable else frozenset()
        generation = runner.Generation(
            model,
            cache,
            self.prompt,
            self.options.sampling,
            eos,
            self.prefill.chunk,
            self.prefill.span,
            on_prefill,
            on_token,
        )
        result = generation.run(self.options.max_new_tokens)
        return result, stream.end() if stream else None

    def _verify(self, model: Any, result: runner.Generated, chunks: dict[int, int] | None) -> bool:
        """Generate once more with the whole cache in memory, in the same pieces where it was streamed.
        Raises DualBladeError where a token differs."""
        self.watcher.stage("generating again with the KV cache in memory")
        expected, _ = self._generate(model, in_memory_cache(self.config, chunks), quiet=True)
        if expected.tokens != result.tokens:
            raise DualBladeError(
                "the tokens differ from those with the KV cache in memory",
                "this is a defect: please report it",
            )
        return True

    def _record(self, result: runner.Generated, text: str | None) -> dict[str, Any]:
        new_tokens = max(len(row) for row in result.tokens)
        record: dict[str, Any] = {
            "model": self.options.model,
            "device": "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": "dummy" if self.dummy else "real",
            "prefill_chunk": self.prefill.chunk,
            "prefill_span": self.prefill.span,
            "batch_size": self.options.batch_size,
            "prompt_tokens": self.prompt.ids.shape[1],
            "new_tokens": new_tokens,
            "prefill_s": result.prefill_s,
            "decode_s": result.decode_s,
            "decode_s_per_token": result.decode_s / max(1, result.steps - 1),
        }
        if text is None:
            return record | {"token_ids": result.tokens}
        return record | {"text": text}


def _read(file: Path | None) -> str:
    if file is None:
        raise UsageError("there is no prompt", "pass --prompt TEXT, --prompt-file FILE or --prompt-len N")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the prompt file {file} cannot be read: {error}", "name another with --prompt-file"
        ) from error
    if not text.strip():
        raise ConfigError(f"the prompt file {file} is empty")
    return text
