# SPDX-License-Identifier: Apache-2.0
"""A sweep's record as text for a terminal, as Markdown and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dualblade.bench.baselines import BASELINES, OURS
from dualblade.bench.rest import FAR, ROUNDS
from dualblade.bench.sweep_plots import sweep_pngs
from dualblade.units import GIB, format_size

Row = Mapping[str, Any]
HEADERS = (
    "KV held", "baseline", "rounds", "start s", "prefill s", "prefill x bound", "s/token", "spread",
    "compute", "bound", "x bound", "x shared", "vs flexgen", "vs best other", "GiB/s", "of SSD", "peak",
    "same bits",
)  # fmt: skip
CHANGE_HEADERS = (
    "KV held", "baseline", "s/token", "before", "lowered", "after", "vs static", "peak", "same bits",
)  # fmt: skip
CHANGE_TITLE = "Memory that becomes scarce, and plentiful again"
_CAPTIONS = {
    "decode.png": "Decoding: median of all rounds, bars from the fastest to the slowest.",
    "prefill.png": "Prefill: median of all rounds, bars from the fastest to the slowest.",
    "ssd.png": "Bytes read a second while decode was reading, as a part of the drive's limit then.",
}
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .25em .7em; text-align: right; }
th { border-bottom: 2px solid #888; } td:nth-child(2), th:nth-child(2) { text-align: left; }
tr.first td { border-top: 1px solid #bbb; } tr.ours { background: #eef6ee; }
img { max-width: 100%; } figure { margin: 1.5em 0; } figcaption { color: #555; } code { background: #f3f3f3; }
"""


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the table, under HEADERS."""
    low, high = row["decode_spread_s"]
    return [
        f"{row['budget_fraction']:.2f}",
        row["baseline"],
        str(row["rounds"]),
        _number(row.get("start_s"), 2),
        _number(row["prefill_s"], 2),
        _number(row.get("prefill_vs_bound"), 2),
        _number(row["decode_s_per_token"], 3),
        f"{low:.3f}-{high:.3f}",
        _number(row["compute_s_per_token"], 3),
        _number(row.get("bound_s_per_token"), 3),
        _number(row.get("decode_vs_bound"), 2),
        _number(row.get("decode_vs_shared_bound"), 2),
        _ratio(row.get("decode_vs_flexgen")),
        _ratio(row.get("decode_vs_best_other")),
        _number(row["read_gib_s"], 2),
        _number(row["ssd_utilisation"], 2),
        format_size(row["peak_bytes"]),
        "yes" if row["verified"] else "NO",
    ]


def change_cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the table of runs under a changing limit, under CHANGE_HEADERS."""
    times = [_number(row[name], 3) for name in ("decode_s_per_token", "before_s", "lowered_s", "after_s")]
    return [
        f"{row['budget_fraction']:.2f}",
        row["baseline"],
        *times,
        _ratio(row["decode_vs_static"]) if row["baseline"] == OURS else "-",
        format_size(row["peak_bytes"]),
        "yes" if row["verified"] else "NO",
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    """With its bounds, and whom it is to where that is not told by the column."""
    if not ratio or ratio["ratio"] is None:
        return "-"
    bounds = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    return f"{ratio['ratio']:.2f}{bounds}" + (f" ({ratio['baseline']})" if "baseline" in ratio else "")


# files --------------------------------------------------------------------------------------


def write_report(record: Mapping[str, Any], out: Path) -> list[Path]:
    """results.json, results.md, report.html and the pictures, in `out`. Raises OSError."""
    pictures = sweep_pngs(record)
    texts = {
        "results.json": json.dumps(record, indent=1, default=str) + "\n",
        "results.md": markdown(record, list(pictures)),
        "report.html": html(record, pictures),
    }
    contents = {name: text.encode() for name, text in texts.items()} | pictures
    for name, content in contents.items():
        (out / name).write_bytes(content)
    return [out / name for name in contents]


def markdown(record: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """A fragment for a results page, with links to the pictures beside it."""
    lines = [*(f"- {line}" for line in facts(record)), ""]
    lines += _markdown_table(HEADERS, [cells(row) for row in ordered(record["rows"])])
    if changes := ordered(record["change"]["rows"]):
        lines += ["", f"{CHANGE_TITLE}:", ""]
        lines += _markdown_table(CHANGE_HEADERS, [change_cells(row) for row in changes])
    lines += ["", *(f"- {line}" for line in notes(record)), ""]
    lines += [f"![{_CAPTIONS[name]}]({name})\n" for name in pictures]
    return "\n".join(lines)


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def html(record: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Pictures are inside."""
    figures = "".join(
        f'<figure><img alt="{escape(_CAPTIONS[name])}" src="data:image/png;base64,'
        f'{base64.b64encode(content).decode()}"><figcaption>{escape(_CAPTIONS[name])}</figcaption></figure>\n'
        for name, content in pictures.items()
    )
    title = f"dualblade-spdk: budgets and baselines, {escape(record['model'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_CSS}</style></head><body>\n"
        f"<h1>{title}</h1>\n{_listing(facts(record))}"
        f"{_html_table(HEADERS, ordered(record['rows']), cells)}"
        f"{_html_changes(record)}{figures}<h2>How to read it</h2>\n{_listing(notes(record))}"
        f"<h2>Baselines</h2>\n{_listing(titles(record))}</body></html>\n"
    )


def _html_changes(record: Mapping[str, Any]) -> str:
    rows = ordered(record["change"]["rows"])
    table = _html_table(CHANGE_HEADERS, rows, change_cells)
    return f"<h2>{CHANGE_TITLE}</h2>\n{table}" if rows else ""


def _html_table(headers: Sequence[str], rows: Sequence[Row], cells_of: Callable[[Row], list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    body, before = [], None
    for row in rows:
        marks = ["first"] * (row["budget_bytes"] != before) + ["ours"] * (row["baseline"] == OURS)
        before = row["budget_bytes"]
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells_of(row))
        body.append(f'<tr class="{" ".join(marks)}">{line}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>\n"


def _listing(lines: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By budget, then in the order of the list of baselines."""
    names = list(BASELINES)
    return sorted(rows, key=lambda row: (row["budget_bytes"], names.index(row["baseline"])))


# words --------------------------------------------------------------------------------------


def facts(record: Mapping[str, Any]) -> list[str]:
    """What was run, on what, and what the machine alone can do."""
    work, need, machine = record["workload"], record["need"], record["machine"]
    return [
        f"{work['batch']} x {work['context']} prompt tokens and {work['new_tokens']} new ones, "
        f"{work['dtype']}, {format_size(need['kv'])} of KV, random weights; {record['rounds']} rounds",
        f"{machine['cpus']} CPUs ({machine['cpu']}), {format_size(machine['memory_bytes'])} of memory, "
        f"Linux {machine['kernel']}, torch {machine['torch']}, transformers {machine['transformers']}",
        f"drive: {record['target']}; read {_number(record['ssd_limit_gib_s'], 2)} GiB/s, "
        f"write {_number(record['ssd_write_limit_gib_s'], 2)} GiB/s (sequential, O_DIRECT, 1 MiB, depth 32); "
        f"read beside compute {_number(record['ssd_limit_computing_gib_s'], 2)} GiB/s",
        f"compute alone: prefill {_number(record['compute_prefill_s'], 2)} s, "
        f"{_number(record['compute_s_per_token'], 3)} s a token",
        "budgets enforced by a memory cgroup for each run"
        if record["enforced"]
        else f"budgets NOT enforced ({record['not_enforced']}): buffered files could fill the whole memory",
    ]


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what is missing."""
    need, decoding = record["need"], record["limit_measured"] == "around decode"
    base = (
        f"weights {format_size(need['weights'])}, libraries {format_size(need['runtime'])}, activations "
        f"{format_size(need['activations'])}, K and V of two layers {format_size(need['staging'])}, "
        f"what blocks change paths through {format_size(need['moving'])}"
    )
    lines = [
        f"A budget is what is in memory anyway ({format_size(need['base'])}: {base}) and on top of it the "
        "part of the KV bytes that the first column tells, with a 32nd more for what the kernel takes beside "
        f"cached pages: {_budgets(record)}. It is the same for every baseline.",
        "start s: what a cache takes to be made, before the prompt: files, buffers, and of ours the pages "
        "that the page cache will hold.",
        "bound: the larger of compute alone and of reading, at the drive's limit, the KV that the budget "
        "cannot hold; of prefill, that of compute alone and of writing all KV. x bound: to the mean of "
        "compute alone before and after the run, and of the limits just before and just after "
        f"{'its decoding (for writing: the run)' if decoding else 'it'}.",
        "Ratios are within a round, their median; in brackets 95 % bootstrap bounds, from seven rounds on. "
        f"rounds: what took over {FAR:.0f} times as long a token as {OURS} in each of its first rounds, "
        f"{ROUNDS} at least, was not run again (--all-rounds: it is).",
        "of SSD: bytes that the drive gave a second while reads were under way, whatever lay there, as a "
        "part of its limit, the same mean.",
        "x shared: to a bound that knows that attention and the drive's data share the memory's bandwidth. "
        "While it computes, the drive reads as it does beside compute (with every CPU attending to KV in "
        "memory, measured), and what is left then at its limit.",
        "peak: what the cgroup was charged with and hugepages, or else memory of the process and the cached "
        "pages of its files, sampled up to every 100 ms; the largest of all rounds.",
        "same bits: the logits of every token and a checksum of all K and V, read back at the end, are those "
        "of transformers' own cache (or, where it does not fit, those of most runs).",
    ]
    if record["change"]["rows"]:
        lines.append(
            "Under a changing limit: after a third of the tokens the run's cgroup is lowered to what is "
            "in memory anyway and half of that part of the KV, after two thirds it is lifted again; vs "
            "static is dual beside dual-first-fit-static, over all tokens."
        )
    lines += [
        f"left out: {item['baseline']} at {item['fraction']:.2f}: {item['reason']}"
        for item in record["skipped"]
    ]
    lines += [
        f"failed: {item['baseline']} at {item['fraction']:.2f}, round {item['round'] + 1}: {item['reason']}"
        for item in record["failures"]
    ]
    return lines


def _budgets(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{each['fraction']:.2f} = {each['bytes'] / GIB:.2f} GiB" for each in record["budgets"])


def titles(record: Mapping[str, Any]) -> list[str]:
    """What each baseline is, with what was particular here."""
    found = {row["baseline"]: row["facts"].get("note") for row in record["rows"]}
    return [
        f"{name}: {BASELINES[name].title}" + (f"; {found[name]}" if found[name] else "")
        for name in BASELINES
        if name in found
    ]
