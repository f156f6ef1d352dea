# SPDX-License-Identifier: Apache-2.0
"""One `run`: check everything, load the model, generate, report. What a person sees is the caller's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualblade import models, runner
from dualblade.errors import ConfigError, DualBladeError, UsageError
from dualblade.hf import DualBladeCache
from dualblade.host.sysfs import Host
from dualblade.offload import make_request
from dualblade.planner import RunPlan, make_plan
from dualblade.residency import take_snapshot
from dualblade.settings import CacheSettings

PREFILL_CHUNK = 2048


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
    chunk: int = PREFILL_CHUNK
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

    def __init__(self, options: RunOptions, watcher: Watcher = Watcher()):
        self.options = options
        self.watcher = watcher
        self.ref = models.resolve(options.model)
        watcher.stage("reading the model's configuration")
        self.config = models.load_config(self.ref)
        self.dtype = models.pick_dtype(self.config, options.dtype)
        self.tokenizer = None if options.prompt_len else models.load_tokenizer(self.ref)
        self.prompt = self._make_prompt()
        self.context = self.prompt.ids.shape[1] + options.max_new_tokens
        models.check_context(self.config, self.context)
        self.settings = self._settings()

    def _make_prompt(self) -> runner.Prompt:
        options = self.options
        if options.prompt_len:
            vocabulary = models.text_config(self.config).vocab_size
            return runner.random_prompt(
                options.batch_size, options.prompt_len, vocabulary, options.sampling.seed
            )
        text = options.prompt if options.prompt is not None else _read(options.prompt_file)
        return runner.encode(self.tokenizer, [text] * options.batch_size)

    def _settings(self) -> CacheSettings:
        chunk = min(self.options.chunk, self.prompt.ids.shape[1])
        activations = models.activation_bytes(
            self.config, self.options.batch_size, chunk, self.context, self.dtype.itemsize
        )
        weights = models.weight_bytes(self.config, self.dtype)
        return replace(self.options.settings, weights=weights, activations=activations, loaded=False)

    def plan(self) -> RunPlan:
        """What run() will do, by arithmetic alone. Raises BudgetError."""
        snapshot = take_snapshot(Host())
        request = make_request(self.settings, snapshot, mapped=0)
        specs = models.kv_specs(self.config, self.options.batch_size, self.context, self.dtype.itemsize)
        return make_plan(specs, request, snapshot)

    def run(self) -> dict[str, Any]:
        """The record of `run --json`. Everything is reserved before the weights are loaded, so what
        cannot work is refused at once."""
        if self.ref.folder:
            models.check_weights(self.ref.folder)
        with DualBladeCache(
            self.config,
            mem_budget=self.settings.budget,
            max_tokens=self.context,
            batch_size=self.options.batch_size,
            dtype=self.dtype,
            settings=self.settings,
        ) as cache:
            self.watcher.stage("loading the weights")
            model = models.load_model(self.ref, self.dtype, self.options.attention)
            result, text = self._generate(model, cache)
            record = self._record(result, text) | cache.report()
        if self.options.verify:
            record["verified"] = self._verify(model, result)
        return record

    def _generate(self, model: Any, cache: Any, quiet: bool = False) -> tuple[runner.Generated, str | None]:
        watcher = Watcher() if quiet else self.watcher
        stream = runner.TextStream(self.tokenizer, watcher.text) if self.tokenizer else None

        def on_token(ids: list[int]) -> None:
            if stream and ids[0] >= 0:
                stream.push(ids[0])

        eos = runner.end_tokens(model) if self.tokenizer else frozenset()
        generation = runner.Generation(
            model,
            cache,
            self.prompt,
            self.options.sampling,
            eos,
            self.options.chunk,
            watcher.prefill,
            on_token,
        )
        result = generation.run(self.options.max_new_tokens)
        return result, stream.end() if stream else None

    def _verify(self, model: Any, result: runner.Generated) -> bool:
        """Generate once more with the whole cache in memory. Raises DualBladeError where a token differs."""
        self.watcher.stage("generating again with the KV cache in memory")
        expected, _ = self._generate(model, runner.in_memory_cache(self.config), quiet=True)
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
        raise ConfigError(f"the prompt file {file} cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"the prompt file {file} is empty")
    return text
