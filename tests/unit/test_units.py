# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.errors import UsageError
from dualblade.units import GIB, KIB, MIB, TIB, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6G", 6 * GIB),
        ("6g", 6 * GIB),
        ("6GiB", 6 * GIB),
        ("6gib", 6 * GIB),
        (" 512M\n", 512 * MIB),
        ("1.5G", 3 * GIB // 2),
        ("4K", 4 * KIB),
        ("2T", 2 * TIB),
        ("0.5K", 512),
        ("007M", 7 * MIB),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "6", "6GB", "6B", "6 G", "6Gi", "-1G", "+1G", "0G", "0.0001K", "1e3", "1e3G", "1_000K",
        "1,5G", ".5G", "5.G", "G", "0x10G", "infG", "nanG", "6G6G", "6P", "٦G", "６G", "²G", "6Ｇ",
        "6\u212a", "6K\x00",
    ],
)  # fmt: skip
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, "--mem-budget")
    assert "--mem-budget" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_a_size_beyond_every_number_is_refused() -> None:
    with pytest.raises(UsageError):
        parse_size("9" * 400 + "G")


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        nbytes = parse_size(text)
    except UsageError:
        return
    assert nbytes > 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536 * MIB, "1.5 GiB"),
        (1023 * MIB, "1023 MiB"),
        (5 * TIB, "5 TiB"),
        (-2 * MIB, "-2 MiB"),
    ],
)
def test_format(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 40))
def test_round_up(value: int, unit: int) -> None:
    rounded = round_up(value, unit)
    assert rounded % unit == 0
    assert 0 <= rounded - value < unit
