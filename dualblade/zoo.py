# SPDX-License-Identifier: Apache-2.0
"""Which model is meant: an alias whose shapes are in the package, a local folder, or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualblade.errors import ModelError

_DATA = Path(__file__).parent / "data"
TINY = _DATA / "tiny"
ALIASES = {
    "tiny": str(TINY),
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-6.7b": "facebook/opt-6.7b",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
}


@dataclass(frozen=True, slots=True)
class ModelRef:
    """name: as the user wrote it. source: a folder or a hub id."""

    name: str
    source: str

    @property
    def folder(self) -> Path | None:
        path = Path(self.source)
        return path if path.is_dir() else None

    @property
    def shapes(self) -> dict[str, Any] | None:
        """The package's own copy of the configuration; None where it has none."""
        file = _DATA / "shapes" / f"{self.name}.json"
        if self.name not in ALIASES or not file.exists():
            return None
        shapes = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(shapes, dict)
        return shapes


def resolve(name: str) -> ModelRef:
    """Raises ModelError for what is neither an alias, nor a folder, nor a hub id."""
    if name in ALIASES:
        return ModelRef(name, ALIASES[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelRef(name, str(path))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelRef(name, name)
    raise ModelError(
        f"unknown model {name!r}: no alias, no folder and no hub id",
        f"aliases: {', '.join(ALIASES)}; or pass a local folder, or a hub id such as facebook/opt-125m",
    )
