# SPDX-License-Identifier: Apache-2.0
"""What `run` and `plan` are asked to do, and who is told as they do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dualblade import runner
from dualblade.errors import ConfigError, UsageError
from dualblade.settings import CacheSettings


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of `run` and `plan`, as the user gave them. group_size: sequences that are generated at
    once, None to let the budget decide."""

    model: str
    settings: CacheSettings
    prompt: str | None = None
    prompt_file: Path | None = None
    prompt_len: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 1
    group_size: int | None = None
    dtype: str | None = None
    device: str = "cpu"
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


def read_prompt(file: Path | None) -> str:
    """Raises UsageError, ConfigError."""
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
