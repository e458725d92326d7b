"""Usage and the wholeness of a stream, as a stranger may write them."""

import pytest

from ibex.domain.completions import Fate, ReplyFacts, StreamReader, Usage, read_reply_facts, read_usage


def test_usage_is_read_from_a_reply() -> None:
    body = (
        b'{"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,'
        b'"prompt_tokens_details":{"cached_tokens":3}}}'
    )

    assert read_usage(body) == Usage(5, 7, 3, 12)
    assert read_usage(body).source == "provider"


@pytest.mark.parametrize(
    "value", ["-1", "1.0", "1e3", "true", '"5"', "null", "[]", "9007199254740993", "1" + "0" * 400]
)
def test_a_count_that_is_no_whole_number_is_unknown(value: str) -> None:
    assert read_usage(f'{{"usage":{{"prompt_tokens":{value},"completion_tokens":2}}}}'.encode()) == Usage(None, 2)


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b"null", b'{"usage":7}', b'{"usage":', b"[" * 100_000, b"\xff"])
def test_a_body_that_says_nothing_sensible_has_no_usage(body: bytes) -> None:
    assert read_usage(body) == Usage()
    assert read_usage(body).source == "none"


def chunk(choices: str, rest: str = "") -> bytes:
    return f'{{"choices":{choices}{rest}}}'.encode()


def test_done_makes_a_stream_whole() -> None:
    seen = StreamReader(hides_usage=False)

    assert seen.take(chunk('[{"index":0,"finish_reason":null}]')) is Fate.RELAY
    assert not seen.is_whole
    assert seen.take(b"[DONE]") is Fate.DONE
    assert seen.is_whole


def test_without_done_every_choice_must_have_finished() -> None:
    seen = StreamReader(hides_usage=False)
    for index in (0, 1):
        seen.take(chunk(f'[{{"index":{index},"finish_reason":null}}]'))
    seen.take(chunk('[{"index":1,"finish_reason":"stop"}]'))
    assert not seen.is_whole

    seen.take(chunk('[{"index":0,"finish_reason":"length"}]'))
    seen.take(chunk('[{"index":0,"finish_reason":null}]'))

    assert seen.is_whole


def test_an_empty_stream_is_not_whole() -> None:
    assert not StreamReader(hides_usage=False).is_whole


def test_exactly_the_usage_chunk_ibex_asked_for_is_hidden() -> None:
    usage = ',"usage":{"prompt_tokens":1,"completion_tokens":2}'
    seen = StreamReader(hides_usage=True)

    assert seen.take(chunk("[]")) is Fate.RELAY
    assert seen.take(chunk("[]", ',"usage":null')) is Fate.RELAY
    assert seen.take(chunk('[{"index":0}]', usage)) is Fate.RELAY
    assert seen.take(chunk("[]", usage)) is Fate.HIDE
    assert seen.usage == Usage(1, 2)
    assert StreamReader(hides_usage=False).take(chunk("[]", usage)) is Fate.RELAY


@pytest.mark.parametrize(
    "data", [b'{"error":{"message":"x"}}', b'{"error":"x","choices":"odd"}', b'{"choices":7,"error":{}}']
)
def test_an_error_item_is_a_failure_in_any_shape(data: bytes) -> None:
    assert StreamReader(hides_usage=False).take(data) is Fate.FAIL


@pytest.mark.parametrize("data", [None, b"", b"hello", b'{"error":null}', b"{", b'{"choices":"odd"}', b"\xff", b"7"])
def test_what_is_not_understood_passes_by(data: bytes | None) -> None:
    assert StreamReader(hides_usage=True).take(data) is Fate.RELAY


@pytest.mark.parametrize(
    ("body", "facts"),
    [
        (
            b'{"id":"c","model":"m","choices":[{"finish_reason":"stop","message":{"content":"x"}}]}',
            ("c", "m", ("stop",)),
        ),
        (b'{"id":1,"model":null,"choices":[{"finish_reason":2},{}]}', (None, None, ())),
        (b'{"id":"c","choices":"none"}', (None, None, ())),
        (b"no json", (None, None, ())),
        (b"[]", (None, None, ())),
        (b'{"id":"\xff"}', (None, None, ())),
    ],
)
def test_a_reply_says_of_itself_what_can_be_believed(body: bytes, facts: tuple[object, ...]) -> None:
    assert read_reply_facts(body) == ReplyFacts(*facts)  # type: ignore[arg-type]


def test_a_stream_says_it_in_its_last_chunk_and_each_choice_in_its_own() -> None:
    reader = StreamReader(hides_usage=False)
    for data in (
        b'{"id":"c","model":"m","choices":[{"index":1,"finish_reason":"length"}]}',
        b'{"id":"c","model":"m","choices":[{"index":0,"finish_reason":"stop"}]}',
        b"[DONE]",
    ):
        reader.take(data)

    assert reader.facts() == ReplyFacts("c", "m", ("stop", "length"))
