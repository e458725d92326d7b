"""Reading and weaving: nothing the client wrote is lost or altered, and every parser reads the directive first."""

import json

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibex.domain.chat import MAX_DEPTH, MAX_FIELDS, MAX_MESSAGES, read_chat, weave
from ibex.domain.directives import Directive, DirectiveMode
from ibex.errors import InvalidJson, ValidationFailed

DIRECTIVE = Directive(3, DirectiveMode.SYSTEM_FIRST, 'Obey "me".\nAlways – 🦌.')

texts = st.text(st.characters(codec="utf-8"), max_size=30)
numbers = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.sampled_from(["1.0", "1", "1e5", "1E+5", "-0", "-0.0", "0.10", "123456789012345678901234567890.000001"]),
)
space = st.sampled_from(["", " ", "\n", "\t ", "\r\n"])


@st.composite
def strings(draw: st.DrawFn) -> str:
    """A JSON string in one of the spellings JSON allows."""
    text = draw(texts)
    return draw(st.sampled_from([json.dumps(text), json.dumps(text, ensure_ascii=False)]))


@st.composite
def values(draw: st.DrawFn, depth: int = 3) -> str:
    """Any JSON value as text, spaces included."""
    kinds = [strings(), numbers, st.sampled_from(["true", "false", "null"])]
    if depth:
        kinds += [_arrays(depth), _objects(depth)]
    return draw(st.one_of(kinds))


@st.composite
def _arrays(draw: st.DrawFn, depth: int) -> str:
    items = draw(st.lists(values(depth - 1), max_size=4))
    return "[" + draw(space) + f"{draw(space)},{draw(space)}".join(items) + draw(space) + "]"


@st.composite
def _objects(draw: st.DrawFn, depth: int, **fixed: str) -> str:
    members = [(json.dumps(name), value) for name, value in fixed.items()]
    members += draw(st.lists(st.tuples(strings(), values(depth - 1)), max_size=4))
    members = list(draw(st.permutations(members)))
    if fixed:  # of a key given twice the last wins, everywhere: keep the fixed ones last of their name
        members = [(k, v) for k, v in members if json.loads(k) not in fixed or (json.loads(k), v) in fixed.items()]
    return "{" + ",".join(f"{draw(space)}{k}{draw(space)}:{draw(space)}{v}{draw(space)}" for k, v in members) + "}"


ACTED_ON = {"messages", "model", "stream", "stream_options"}


@st.composite
def messages(draw: st.DrawFn) -> str:
    """A message of a known or an unknown role, with text, parts or tool calls."""
    role = json.dumps(draw(st.sampled_from(["system", "user", "assistant", "tool", "developer", "oracle"])))
    content = draw(
        st.one_of(
            strings(),
            strings().map(
                lambda text: '[{"type":"text","text":' + text + '},{"type":"image_url","image_url":{"url":"x"}}]'
            ),
            st.just("[ ]"),
            st.just("null"),
        )
    )
    return draw(_objects(1, role=role, content=content))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A valid chat request, with fields nobody knows, in any order and spacing."""
    items = draw(st.lists(messages(), min_size=1, max_size=5))
    members = [
        ("messages", "[" + draw(space) + f"{draw(space)},{draw(space)}".join(items) + "]"),
        ("model", draw(strings().filter(lambda text: 1 <= len(json.loads(text)) <= 256))),
    ]
    if draw(st.booleans()):
        members.append(("stream", draw(st.sampled_from(["true", "false", "null"]))))
    if draw(st.booleans()):
        members.append(("stream_options", draw(st.sampled_from(["null", "{}", '{"include_usage":false,"x":1.0}']))))
    extra = draw(st.lists(st.tuples(texts.filter(lambda name: name not in ACTED_ON), values()), max_size=4))
    spelled = [(json.dumps(name), value) for name, value in [*members, *extra]]
    ordered = draw(st.permutations(spelled))
    text = ",".join(f"{draw(space)}{k}{draw(space)}:{draw(space)}{v}{draw(space)}" for k, v in ordered)
    return f"{draw(space)}{{{text}}}{draw(space)}".encode()


def exactly(data: bytes | str) -> object:
    """What a body says, with every number as it was written: 1.0 is not 1 here."""
    return json.loads(data, parse_int=lambda text: ("int", text), parse_float=lambda text: ("float", text))


@given(bodies(), st.sampled_from(DirectiveMode), texts.filter(str.strip), st.booleans())
def test_what_the_provider_gets_is_the_clients_body_and_the_directive(
    body: bytes, mode: DirectiveMode, text: str, ask_usage: bool
) -> None:
    directive = Directive(1, mode, text)

    woven = weave(read_chat(body), directive, ask_usage=ask_usage)

    sent, given_body = exactly(woven), exactly(body)
    assert isinstance(sent, dict)
    assert isinstance(given_body, dict)
    unwoven = _unweave(sent["messages"], given_body["messages"], directive)
    assert unwoven == given_body["messages"]
    options = sent.pop("stream_options", None)
    if given_body.get("stream") is True and ask_usage:
        assert isinstance(options, dict)
        assert options == {**(given_body.pop("stream_options", None) or {}), "include_usage": True}
    else:
        assert options == given_body.pop("stream_options", None)
    assert {**sent, "messages": None} == {**given_body, "messages": None}
    if not ask_usage:
        assert list(sent) == [name for name in given_body if name in sent]


def _unweave(sent: list, given_messages: list, directive: Directive) -> list:
    """The messages with exactly one directive taken out; fails where it does not stand where its mode says."""
    message = {"role": "system", "content": directive.text}
    if directive.mode is DirectiveMode.SYSTEM_FIRST:
        assert sent[0] == message
        return sent[1:]
    leading = next((i for i, item in enumerate(given_messages) if item.get("role") != "system"), len(given_messages))
    if directive.mode is DirectiveMode.SYSTEM_APPEND:
        assert sent[leading] == message
        return sent[:leading] + sent[leading + 1 :]
    prefix = f"[DIRECTIVE]: {directive.text}\n\n"
    user = next((i for i, item in enumerate(given_messages) if item.get("role") == "user"), None)
    if user is None:
        assert sent[leading] == {"role": "user", "content": prefix}
        return sent[:leading] + sent[leading + 1 :]
    content = sent[user]["content"]
    if isinstance(content, str):
        assert content.startswith(prefix)
        original = content.removeprefix(prefix) if given_messages[user].get("content") is not None else None
    else:
        assert content[0] == {"type": "text", "text": prefix}
        original = content[1:]
    return [*sent[:user], {**sent[user], "content": original}, *sent[user + 1 :]]


@given(bodies(), texts.filter(str.strip))
def test_every_parser_reads_the_directive_first(body: bytes, text: str) -> None:
    woven = weave(read_chat(body), Directive(1, DirectiveMode.SYSTEM_FIRST, text), ask_usage=True)

    for parse in (json.loads, orjson.loads, msgspec.json.decode):
        try:
            read = parse(woven)
        except (ValueError, msgspec.DecodeError):  # a number beyond what this parser holds: the client's, not ours
            continue
        assert read["messages"][0] == {"role": "system", "content": text}


@given(bodies())
def test_without_a_directive_the_values_are_the_clients_bytes(body: bytes) -> None:
    request = read_chat(body)

    woven = weave(request, None, ask_usage=False)

    for key, value in request.fields:
        assert key + b":" + value in woven
        assert value in body


@pytest.mark.parametrize("name", sorted(ACTED_ON))
@pytest.mark.parametrize("again", ["same", "longer", "shorter", "escaped"])
def test_a_key_that_decides_is_refused_when_given_twice_or_escaped(name: str, again: str) -> None:
    values = {"messages": '[{"role":"user","content":"a"}]', "model": '"m"', "stream": "true", "stream_options": "{}"}
    other = {
        "messages": '[{"role":"user","content":"ab"}]',
        "model": '"mm"',
        "stream": "false",
        "stream_options": "null",
    }
    key = json.dumps(name)
    first = f"{key}:{values[name] if again != 'longer' else other[name]}"
    spelled = '"\\u00' + f"{ord(name[0]):02x}" + name[1:] + '"' if again == "escaped" else key
    second = f"{spelled}:{other[name] if again == 'shorter' else values[name]}"
    rest = [f"{json.dumps(n)}:{v}" for n, v in values.items() if n != name]
    body = "{" + ",".join([first, *rest, second]) + "}"

    with pytest.raises(ValidationFailed) as caught:
        read_chat(body.encode())

    assert caught.value.param == name


def test_of_another_key_given_twice_the_last_value_goes_on() -> None:
    body = b'{"a":[1,"}]",{"b":2}],"model":"m","a" : 12 ,"a":1,"messages":[{}],"b":"x","b":"x"}'

    fields = dict(read_chat(body).fields)

    assert fields == {b'"a"': b"1", b'"model"': b'"m"', b'"messages"': b"[{}]", b'"b"': b'"x"'}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"m"}', "messages"),
        (b'{"model":"m","messages":{}}', "messages"),
        (b'{"model":"m","messages":[]}', "messages"),
        (b'{"model":"m","messages":["x"]}', "messages[0]"),
        (b'{"messages":[{}]}', "model"),
        (b'{"messages":[{}],"model":""}', "model"),
        (b'{"messages":[{}],"model":7}', "model"),
        (b'{"messages":[{}],"model":"' + b"m" * 257 + b'"}', "model"),
        (b'{"messages":[{}],"model":"m","stream":"yes"}', "stream"),
        (b'{"messages":[{}],"model":"m","stream_options":[]}', "stream_options"),
        (b'{"model":"m","messages":[' + b",".join([b"{}"] * (MAX_MESSAGES + 1)) + b"]}", "messages"),
    ],
)
def test_a_wrong_field_is_named(body: bytes, param: str) -> None:
    with pytest.raises(ValidationFailed) as caught:
        read_chat(body)

    assert caught.value.param == param
    assert caught.value.field_errors[0].field == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a":NaN}',
        b"\xef\xbb\xbf{}",
        b'{"a":"\xff"}',
        b'{"a":1}x',
        b'{"a":01}',
        b'{"a":' + b"[" * 500_000,
        b'{"a":[1,]}',
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        read_chat(body)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValidationFailed):
        read_chat(body)


@pytest.mark.parametrize("mode", DirectiveMode)
def test_a_role_that_python_cannot_hold_is_no_fault_of_ours(mode: DirectiveMode) -> None:
    body = b'{"model":"m","messages":[{"role":1e400,"content":"a"},{"role":"us\\u0065r","content":"b"}]}'

    woven = weave(read_chat(body), Directive(1, mode, "Obey."), ask_usage=False)

    assert b'{"role":1e400,"content":"a"}' in woven
    assert (b"[DIRECTIVE]: Obey.\\n\\nb" in woven) is (mode is DirectiveMode.USER_PREPEND)


@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_nesting_is_counted_to_the_level(pair: str) -> None:
    opening = "[" if pair == "[]" else '{"x":'
    filling = "" if pair == "[]" else "1"

    def nest(levels: int) -> bytes:
        nested = opening * levels + filling + pair[1] * levels
        return f'{{"model":"m","messages":[{{}}],"x":{nested},"s":"[[[[{{{{ \\" ["}}'.encode()

    read_chat(nest(MAX_DEPTH - 1))
    with pytest.raises(InvalidJson):
        read_chat(nest(MAX_DEPTH))


def test_many_flat_brackets_are_not_deep() -> None:
    read_chat(b'{"model":"m","messages":[{}],"x":[' + b",".join([b"[{}]"] * 500) + b"]}")


def test_too_many_fields_are_refused() -> None:
    extra = ",".join(f'"k{i}":1' for i in range(MAX_FIELDS))

    with pytest.raises(ValidationFailed):
        read_chat(f'{{"model":"m","messages":[{{}}],{extra}}}'.encode())


def test_a_clients_own_wish_for_usage_is_left_alone() -> None:
    body = b'{"model":"m","messages":[{}],"stream":true,"stream_options":{"include_usage":true,"x":1}}'
    request = read_chat(body)

    assert request.asks_for_usage
    assert weave(request, None, ask_usage=True) == body


def test_a_repr_shows_no_content() -> None:
    request = read_chat(b'{"model":"secret-model","messages":[{"role":"user","content":"secret"}]}')

    assert "secret" not in repr(request)
    assert "Obey" not in repr(DIRECTIVE)
