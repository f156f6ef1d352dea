# SPDX-License-Identifier: Apache-2.0
"""`plan`: which tensor would go where and why. Loads no weights, opens no target."""

from __future__ import annotations

from typing import Any

import click

from dualblade.cli.options import model_options, settings_from
from dualblade.cli.output import describe_device, emit, json_option
from dualblade.stream_choice import choice_words
from dualblade.units import counted, format_size


@click.command(epilog="Example: dualblade-spdk plan --model tiny --mem-budget 1G --context 4096")
@model_options
@click.option(
    "--context", type=click.IntRange(min=2), required=True, metavar="N", help="Prompt and new tokens."
)
@json_option
def plan(as_json: bool, context: int, **options: Any) -> None:
    """Show which KV tensor goes where, and why. Touches nothing."""
    settings = settings_from(options)
    from dualblade.models import quiet_libraries
    from dualblade.run_options import RunOptions
    from dualblade.session import Session

    quiet_libraries()
    session = Session(
        RunOptions(
            model=options["model"],
            settings=settings,
            prompt_len=context - 1,
            max_new_tokens=1,
            batch_size=options["batch_size"],
            group_size=options["group_size"],
            dtype=options["dtype"],
            device=options["device"],
            chunk=options["prefill_chunk"],
            weights=options["weights"],
        ),
        plan_only=True,
    )
    made = session.plan()
    predicted = session.predict(made)
    record = _record(session, made, context) | predicted.record()
    emit(record, as_json, lambda record: _show(record, predicted.words()))


def _record(session: Any, made: Any, context: int) -> dict[str, Any]:
    from dualblade.forecast import device_bytes
    from dualblade.layers import kept_bytes, kept_in_memory
    from dualblade.models import context_limit
    from dualblade.speeds import storage_seconds
    from dualblade.tensors import PathKind

    direct, cached = made.bytes_on(PathKind.DIRECT), made.bytes_on(PathKind.PAGE_CACHE)
    footprint = made.footprint
    copied = session.settings.checksum or made.pipeline.chunk_tokens is not None  # else read in place
    return {
        "model": session.options.model,
        "context": context,
        "batch_size": session.options.batch_size,
        "group_size": session.groups[0],
        "groups": len(session.groups),
        "dtype": str(session.dtype).removeprefix("torch."),
        "weights": "dummy" if session.dummy else "real",
        "prefill_chunk": session.prefill.chunk,
        "prefill_span": session.prefill.span,
        "prefill_reread_bytes": session.prefill.reread(context - 1) * sum(s.token_bytes for s in made.specs),
        "device": session.device,
        "device_bytes": device_bytes(made, session.forecast),
        "memory": {
            "budget_bytes": made.request.budget,
            "weights_bytes": footprint.weights_bytes,
            "runtime_bytes": footprint.runtime_bytes,
            "activation_bytes": footprint.reserve_bytes,
            "staging_bytes": footprint.staging_bytes,
            "tail_bytes": footprint.tails_bytes,
            "migration_bytes": footprint.migration_bytes,
            "page_cache_share_bytes": made.share.bytes,
            "page_cache_share_reason": made.share.reason,
        },
        "kept_in_memory": {
            "layers": kept_in_memory(session.config),
            "bytes": kept_bytes(session.config, session.groups[0], context, session.dtype.itemsize),
        },
        "kv_bytes": sum(spec.nbytes for spec in made.specs),
        "paths": {"page_cache": {"bytes": cached}, "direct": {"bytes": direct}},
        "all_in_page_cache_up_to": session.all_cached_up_to(),
        "context_limit": context_limit(session.config),
        "attention": made.pipeline.attention,
        "chunk_tokens": made.pipeline.chunk_tokens,
        "stream_choice": session.choice.record() if session.choice else None,
        "prefetch_depth": made.pipeline.prefetch_depth,
        "storage_s_per_token": storage_seconds(
            session.settings.cache_dir, session.settings.nvme, cached if copied else 0, direct
        ),
        "placements": [
            {"tensor": str(item.key), "path": item.path.value, "bytes": item.bytes, "reason": item.reason}
            for item in made.placements
        ],
    }


def _show(record: dict[str, Any], predicted: list[str]) -> None:
    memory = record["memory"]
    click.echo(
        f"{record['model']}, {record['context']} tokens, batch {record['batch_size']}, {record['dtype']}"
    )
    if record["groups"] > 1:
        click.echo(_group_words(record))
    click.echo(f"KV cache {format_size(record['kv_bytes'])}, budget {format_size(memory['budget_bytes'])}:")
    for name in ("weights", "runtime", "activation", "staging", "tail", "migration", "page_cache_share"):
        click.echo(f"  {name.replace('_', ' '):17}{format_size(memory[name + '_bytes']):>10}")
    click.echo(f"  ({memory['page_cache_share_reason']})")
    click.echo(f"device {describe_device(record['device_bytes'])}")
    click.echo(_page_cache_words(record))
    click.echo(_prefill_words(record))
    if record["chunk_tokens"]:
        click.echo(f"attention streamed: a layer's K and V pass in chunks of {record['chunk_tokens']} tokens")
    if record["stream_choice"]:
        click.echo(choice_words(record["stream_choice"]))
    for kind, count in record["kept_in_memory"]["layers"].items():
        click.echo(
            f"{counted(count, 'layer')} of {kind} in memory, in a cache that does not grow with the context"
        )
    for line in _placement_lines(record["placements"]):
        click.echo(line)
    for line in predicted:
        click.echo(line)


def _group_words(record: dict[str, Any]) -> str:
    return (
        f"{record['groups']} groups of at most {record['group_size']} sequences, one after another; what "
        "follows is of one group, but for the predicted times"
    )


def _page_cache_words(record: dict[str, Any]) -> str:
    tokens = record["all_in_page_cache_up_to"]
    if tokens is None:
        return "--kv-path sends every tensor one way, whatever the context"
    if not tokens:
        return "at this budget and batch no context keeps all KV in the page cache"
    if tokens == record["context_limit"]:
        return f"all KV stays in the page cache up to the model's own end, {tokens} tokens"
    return f"all KV stays in the page cache up to a context of {tokens} tokens; beyond, some goes direct"


def _prefill_words(record: dict[str, Any]) -> str:
    how = f"prefill layer by layer, {record['prefill_span']} tokens a layer, {record['prefill_chunk']} a pass"
    if record["chunk_tokens"]:
        how = f"prefill {record['prefill_chunk']} tokens a pass"
    again = record["prefill_reread_bytes"]
    return f"{how}: {f'{format_size(again)} of KV read again' if again else 'no KV read again'}"


def _placement_lines(placements: list[dict[str, Any]]) -> list[str]:
    """A line each, or one for all where all go the same way for the same reason."""
    first = placements[0] if placements else {}
    if len({(item["path"], item["bytes"], item["reason"]) for item in placements}) == 1:
        each = f"{len(placements)} tensors, {format_size(first['bytes'])} each"
        return [f"all {each}: {first['path']}  {first['reason']}"]
    return [
        f"{item['tensor']:13}{item['path']:12}{format_size(item['bytes']):>9}  {item['reason']}"
        for item in placements
    ]
