# SPDX-License-Identifier: Apache-2.0
"""`volume`: make a target ours, look at it, verify it, erase it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualblade.cli.output import emit, json_option, table
from dualblade.errors import UsageError, VolumeError
from dualblade.units import format_size, parse_size

if TYPE_CHECKING:
    from dualblade.targets import OpenTarget
    from dualblade.volume import Volume, VolumeReport


def _example(line: str) -> str:
    return f"\b\nExample:\n  dualblade-spdk volume {line}"


@click.group(epilog=_example("create kv.img --capacity 8G"))
def volume() -> None:
    """Make a target ours, look at it, verify it, erase it.

    TARGET is a file or a block device. Nobody else may use it meanwhile.
    """


# commands -----------------------------------------------------------------------------------


@volume.command(epilog=_example("create /dev/nvme1n1"))
@click.argument("target")
@click.option("--capacity", metavar="SIZE", help="Make the file, of this size.")
@click.option(
    "--i-know-this-erases",
    "serial",
    metavar="SERIAL",
    help="Take a target that is not empty; a file's is its name.",
)
@json_option
def create(target: str, capacity: str | None, serial: str | None, as_json: bool) -> None:
    """Make TARGET ours: a new file, or a target that is provably empty.

    Anything else is refused, unless SERIAL names it: a drive's serial number, or a file's name.
    """
    nbytes = parse_size(capacity, "--capacity") if capacity else None
    with _opened(target, nbytes, create=True) as opened:
        emit(_create(opened, serial), as_json, _show_created)


@volume.command(epilog=_example("show kv.img --json"))
@click.argument("target")
@json_option
def show(target: str, as_json: bool) -> None:
    """Show what TARGET holds. Writes nothing."""
    with _opened(target) as opened:
        emit(_shown(opened), as_json, _show_volume)


@volume.command(epilog=_example("check kv.img"))
@click.argument("target")
@json_option
def check(target: str, as_json: bool) -> None:
    """Verify the metadata of TARGET. Writes nothing; exit 1 if something is wrong."""
    with _opened(target) as opened:
        report = _existing(opened).check()
        emit(_checked(opened, report), as_json, _show_report)
    if not report.clean:
        raise VolumeError(f"{target}: {len(report.problems)} problems")


@volume.command(epilog=_example("wipe kv.img"))
@click.argument("target")
@json_option
def wipe(target: str, as_json: bool) -> None:
    """Erase our metadata from TARGET: it is nobody's afterwards. A file stays."""
    with _opened(target) as opened:
        found = _existing(opened)
        found.wipe()
        record = {"target": opened.name, "uuid": found.uuid, "wiped_bytes": found.geometry.metadata_bytes}
        emit(record, as_json, lambda record: click.echo(f"{record['target']} is no volume any more"))


# work ---------------------------------------------------------------------------------------


@contextmanager
def _opened(text: str, capacity: int | None = None, create: bool = False) -> Iterator[OpenTarget]:
    """Imports the engine here, so that --help works without it."""
    from dualblade.targets import TargetKind, find_target, open_target

    target = find_target(text)
    if target.kind is TargetKind.MEMORY:
        raise UsageError(f"{text} lives only as long as a process", "name a file or a block device")
    with open_target(target, capacity=capacity, cache_dir=Path(), create=create) as opened:
        if opened.note:
            click.echo(f"note: {opened.filesystem}: {opened.note}", err=True)
        yield opened


def _existing(opened: OpenTarget) -> Volume:
    from dualblade.volume import Volume

    return Volume.open(opened.queue, opened.capacity, name=opened.name)


def _create(opened: OpenTarget, serial: str | None) -> dict[str, Any]:
    from dualblade.ownership import check_free_to_take, identify_target
    from dualblade.superblock import Geometry
    from dualblade.volume import Volume

    try:
        who = identify_target(opened)
        Geometry.of(opened.capacity)  # before anything is erased
        if check_free_to_take(opened, who, serial):
            opened.erase_edges()
        made = Volume.create(opened.queue, opened.capacity, name=opened.name)
    except BaseException:
        opened.discard()
        raise
    return {"target": opened.name, "model": who.model, "serial": who.serial, "size_bytes": who.size} | _sizes(
        made
    )


def _sizes(found: Volume) -> dict[str, Any]:
    return {
        "uuid": found.uuid,
        "generation": found.generation,
        "capacity_bytes": found.capacity,
        "data_bytes": found.data_bytes,
        "free_bytes": found.free_bytes,
        "max_extents": found.geometry.max_entries,
    }


def _shown(opened: OpenTarget) -> dict[str, Any]:
    found = _existing(opened)
    extents = [
        {
            "tensor": str(record.key),
            "lba": record.extent.first_lba,
            "bytes": record.extent.nbytes,
            "generation": record.generation,
            "session": record.owner,
        }
        for record in found.extents
    ]
    return {"target": opened.name, "filesystem": opened.filesystem, **_sizes(found), "extents": extents}


def _checked(opened: OpenTarget, report: VolumeReport) -> dict[str, Any]:
    return {
        "target": opened.name,
        "ok": report.clean,
        "uuid": report.uuid,
        "generation": report.generation,
        "capacity_bytes": report.capacity,
        "data_bytes": report.data_bytes,
        "free_bytes": report.free_bytes,
        "largest_free_bytes": report.largest_free_bytes,
        "fragmentation": report.fragmentation,
        "copies": [copy.state for copy in report.copies],
        "extents": report.extents,
        "leftovers": report.leftovers,
        "leftover_bytes": report.leftover_bytes,
        "problems": report.problems,
    }


# text ---------------------------------------------------------------------------------------


def _show_created(record: dict[str, Any]) -> None:
    size = format_size(record["size_bytes"])
    click.echo(f"{record['target']}: {record['model']}, serial {record['serial']}, {size}")
    click.echo(f"volume {record['uuid']}, {format_size(record['data_bytes'])} for data")


def _show_volume(record: dict[str, Any]) -> None:
    free, data = format_size(record["free_bytes"]), format_size(record["data_bytes"])
    click.echo(f"{record['target']}: volume {record['uuid']}, generation {record['generation']}")
    click.echo(f"{free} of {data} free, {len(record['extents'])} of {record['max_extents']} extents")
    if record["extents"]:
        click.echo("left by a session that did not tidy up; the next one frees them:")
        rows = [[item["tensor"], item["lba"], format_size(item["bytes"])] for item in record["extents"]]
        table(["tensor", "LBA", "size"], rows)


def _show_report(record: dict[str, Any]) -> None:
    click.echo(f"{record['target']}: volume {record['uuid']}, generation {record['generation']}")
    for number, state in enumerate(record["copies"]):
        click.echo(f"copy {number}: {state}")
    click.echo(
        f"{record['extents']} extents, {record['leftovers']} of them "
        f"({format_size(record['leftover_bytes'])}) left by sessions that died"
    )
    free, largest = format_size(record["free_bytes"]), format_size(record["largest_free_bytes"])
    click.echo(f"{free} free, {largest} of it in one piece (fragmentation {record['fragmentation']:.2f})")
    for problem in record["problems"]:
        click.echo(f"problem: {problem}")
    click.echo("ok" if record["ok"] else "damaged")
