# SPDX-License-Identifier: Apache-2.0
"""--stream faster: streamed only by measured speeds, by a margin, and where the prompt does not eat it up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dualblade.stream_choice import MARGIN, Choice, Expected, choice_words, choose

SECONDS = st.floats(1e-6, 1e6)
EXPECTED = st.builds(Expected, SECONDS, SECONDS)


def test_streaming_that_is_clearly_faster() -> None:
    made = choose(Expected(1.0, 10.0), Expected(0.5, 10.0), new_tokens=1)
    assert made.streamed
    assert made.reason == "a token is predicted to take 1 s in one piece and 500 ms streamed"


def test_one_piece_where_it_is_as_fast_or_nearly() -> None:
    slower = choose(Expected(0.5, 10.0), Expected(1.0, 1.0))
    assert not slower.streamed
    assert slower.reason.endswith("500 ms in one piece and 1 s streamed")
    for decode_s in (1.0, 1.0 / MARGIN + 1e-9):
        made = choose(Expected(1.0, 10.0), Expected(decode_s, 1.0))
        assert not made.streamed
    assert "too little to give up exact bits for" in made.reason
    assert choose(Expected(1.0, 10.0), Expected(1.0 / MARGIN - 1e-9, 10.0)).streamed


def test_the_prompt_has_to_be_won_back() -> None:
    """Half a second a token against 10 s of prompt: 20 tokens."""
    whole, chunks = Expected(1.0, 10.0), Expected(0.5, 20.0)
    short, long, unknown = (choose(whole, chunks, tokens) for tokens in (19, 20, None))
    assert [made.streamed for made in (short, long, unknown)] == [False, True, True]
    assert all("pays from 20 new tokens on" in made.reason for made in (short, long, unknown))


def test_one_piece_where_a_speed_is_assumed() -> None:
    """Each of them said once, whichever way rests on it."""
    whole, chunks = Expected(1.0, 1.0, ("drive",)), Expected(0.1, 0.1, ("drive", "CPU"))
    made = choose(whole, chunks)
    assert not made.streamed
    assert made.reason == "the speeds are not all measured: drive; CPU"
    assert not choose(Expected(1.0, 1.0), chunks).streamed
    assert not choose(whole, Expected(0.1, 0.1)).streamed


def test_the_only_way_there_is() -> None:
    """Whatever its speed, and whether it was measured."""
    slow = Expected(9.0, 9.0, ("drive",))
    assert choose(None, slow).streamed
    assert "does not hold one layer's K and V" in choose(None, slow).reason
    assert not choose(slow, None).streamed
    assert "does not hold what streaming takes" in choose(slow, None).reason


def test_what_came_of_it() -> None:
    """One piece that fits no more, or again, when the run begins is told as it is."""
    piece, chunks = Choice(False, "why"), Choice(True, "why")
    assert piece.carried_out(False) == piece
    assert chunks.carried_out(True) == chunks
    assert piece.carried_out(True).streamed
    assert "does not hold" in piece.carried_out(True).reason
    assert not chunks.carried_out(False).streamed


def test_the_record_and_its_words() -> None:
    record = choose(Expected(1.0, 10.0), Expected(0.5, 10.0), 5).record()
    assert record["attention"] == "streamed"
    assert record["one_piece"] == {"decode_s": 1.0, "prefill_s": 10.0, "unmeasured": ()}
    assert record["streamed"]["decode_s"] == 0.5
    assert choice_words(record).startswith("--stream faster: attention streamed, because a token ")
    other = choose(None, None).record() | {"attention": "one-piece"}
    assert choice_words(other).startswith("--stream faster: attention in one piece, because ")


@given(whole=EXPECTED, chunks=EXPECTED, tokens=st.none() | st.integers(1, 10**6))
def test_streamed_means_faster(whole: Expected, chunks: Expected, tokens: int | None) -> None:
    """A token by the margin; with the prompt no slower as a whole."""
    if not choose(whole, chunks, tokens).streamed:
        return
    assert chunks.decode_s * MARGIN < whole.decode_s
    if tokens:
        took, other = (each.prefill_s + tokens * each.decode_s for each in (chunks, whole))
        assert took <= other * (1 + 1e-6)


@given(whole=EXPECTED, chunks=EXPECTED, tokens=st.integers(1, 10**6), more=st.integers(0, 10**6))
def test_more_tokens_never_end_it(whole: Expected, chunks: Expected, tokens: int, more: int) -> None:
    assert choose(whole, chunks, tokens).streamed <= choose(whole, chunks, tokens + more).streamed
    assert choose(whole, chunks, tokens).streamed <= choose(whole, chunks).streamed
