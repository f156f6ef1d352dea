# SPDX-License-Identifier: Apache-2.0
"""Files of a hub model: from the local copy where it has them, else from the network. Every way this
can fail is one line and a hint."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from dualblade.errors import ModelError
from dualblade.units import MIB, format_size

TIMEOUT_S = 4.0
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*")
# Besides the weights that transformers reads, some repositories hold them once more in another form.
NEVER = ("original/*", "consolidated*", "*/*", "*.safetensors.index.json", "*.bin.index.json")
FORMS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
KEEP_FREE = 256 * MIB
Result = TypeVar("Result")


def small_files(repo: str) -> Path:
    """A folder with the configuration and the tokenizer. Raises ModelError."""
    folder = _local(repo, SMALL)
    if folder and (folder / "config.json").exists():
        return folder
    return _asked(repo, lambda: _download(repo, SMALL))


def weight_folder(repo: str) -> Path:
    """A folder with all of the weights, which are downloaded where they are not there yet.

    Raises ModelError, before the download where the disk has no room for it.
    """
    for form in FORMS:
        folder = _local(repo, form)
        if folder and weight_files(folder):
            return folder
    return _asked(repo, lambda: _download_weights(repo))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors where there are any; none where one is missing."""
    for pattern, index in FORMS:
        names = _indexed(folder / index) or sorted(path.name for path in folder.glob(pattern))
        files = [folder / name for name in names]
        if files:
            return files if all(file.exists() for file in files) else []
    return []


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError):
        return []


def _local(repo: str, patterns: Sequence[str]) -> Path | None:
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError):
        return None


# the network --------------------------------------------------------------------------------


def _quiet_unless_watched() -> None:
    """Sixteen GiB want a progress bar, a log does not."""
    if not sys.stderr.isatty():
        disable_progress_bars()


def _download(repo: str, patterns: Sequence[str], ignore: Sequence[str] = NEVER) -> Path:
    _quiet_unless_watched()
    HfApi().model_info(repo, timeout=TIMEOUT_S)  # fails sooner, and says more, than the download does
    return Path(
        snapshot_download(
            repo, allow_patterns=list(patterns), ignore_patterns=list(ignore), etag_timeout=TIMEOUT_S
        )
    )


def _download_weights(repo: str) -> Path:
    _quiet_unless_watched()
    info = HfApi().model_info(repo, timeout=TIMEOUT_S, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    for form in FORMS:
        wanted = {name: size for name, size in sizes.items() if Path(name).match(form[0]) and "/" not in name}
        if wanted:
            _check_disk(repo, sum(wanted.values()), Path(constants.HF_HUB_CACHE))
            return _download(repo, form, ignore=("*/*",))
    raise ModelError(
        f"{repo} holds neither model*.safetensors nor pytorch_model*.bin",
        "pass another model, or --weights dummy to measure with random values",
    )


def _check_disk(repo: str, needed: int, cache: Path) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed + KEEP_FREE > free:
        raise _disk_full(repo, f"{format_size(needed)}, and {cache} has {format_size(free)} free")


def _disk_full(repo: str, how: str) -> ModelError:
    return ModelError(
        f"the disk is too small for the weights of {repo}: {how}",
        "free space, point HF_HOME at a larger disk, pass a local folder, or --weights dummy",
    )


# errors -------------------------------------------------------------------------------------


def _asked(repo: str, ask: Callable[[], Result]) -> Result:
    try:
        return ask()
    except ModelError:
        raise
    except Exception as error:  # the HTTP library below, and so its classes, changes with the version
        raise explain(repo, error) from error


def explain(repo: str, error: BaseException) -> ModelError:
    """What an exception of huggingface_hub, or of the network below it, means for the user."""
    chain = list(_chain(error))
    page = f"https://huggingface.co/{repo}"
    if any(isinstance(one, GatedRepoError) for one in chain):
        return ModelError(
            f"{repo} is gated: its licence must be accepted, and HF_TOKEN be set to a token of that account",
            f"accept it on {page}; or pass a local folder, or --weights dummy",
        )
    if any(isinstance(one, RepositoryNotFoundError) for one in chain):
        return ModelError(
            f"the hub shows no model {repo}: there is none, or it is private",
            f"look at {page}; set HF_TOKEN for a private one; or pass a local folder",
        )
    for one in chain:
        if isinstance(one, HfHubHTTPError):
            return _refused(repo, one)
        if isinstance(one, OSError) and one.errno == 28:
            return _disk_full(repo, "the download filled it")
    if any(_is_network(one) for one in chain):
        return _no_network(repo, chain[-1])
    return ModelError(f"{repo} cannot be loaded from the hub: {first_line(error)}", "pass a local folder")


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _refused(repo: str, error: HfHubHTTPError) -> ModelError:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return ModelError(
            f"the hub refuses to hand out {repo} (HTTP {status})",
            "set HF_TOKEN to a valid token that may read it; or pass a local folder, or --weights dummy",
        )
    return ModelError(
        f"the hub answers HTTP {status} for {repo}",
        "try again later, pass a local folder, or --weights dummy",
    )


def _is_network(error: BaseException) -> bool:
    """Every HTTP library has its own classes, of these names."""
    names = {cls.__name__ for cls in type(error).__mro__}
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or bool(names & {"TransportError", "TimeoutException", "gaierror"})


def _no_network(repo: str, reason: BaseException) -> ModelError:
    return ModelError(
        f"{repo} is not in the local copy, and the hub cannot be reached: {first_line(reason)}",
        "connect once to download it, pass a local folder, or --weights dummy; "
        "`--model tiny` needs no network",
    )


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
