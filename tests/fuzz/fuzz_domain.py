"""A fuzz target for what strangers write first: chat bodies to weave into, bearers, and ids. To be run by hand.

    pip install atheris
    python tests/fuzz/fuzz_domain.py -max_total_time=60

atheris is not among the locked dependencies, and pytest does not collect this. libFuzzer's other options work too: a
directory given as an argument keeps the inputs that found something new. Whatever breaks a property is written to a
file `crash-…`, which, given as an argument, is run again alone.

What must hold is what `tests/domain/test_chat.py` and `test_identity.py` say of inputs that they make up: an input is
refused in a known way or woven without losing a value, and what is taken for an id is one in its only spelling.
"""

import json
import random
import re
import sys
from pathlib import Path

import atheris
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["ibex"]):
    from ibex.domain.chat import MAX_DEPTH, MAX_FIELDS, read_chat, weave
    from ibex.domain.directives import Directive, DirectiveMode
    from ibex.domain.identity import DEV_TOKEN, parse_bearer, parse_uuid
    from ibex.domain.turns import is_external_id
    from ibex.errors import InvalidJson, ValidationFailed

DIRECTIVE_TEXT = 'Obey "me".\nAlways – 🦌.'
DIRECTIVES = [Directive(1, mode, DIRECTIVE_TEXT) for mode in DirectiveMode]

SEEDS = [
    b'{"model":"m","messages":[{"role":"user","content":"a"}]}',
    b'{"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"t"}]}],"model":"m"}',
    b'{"model":"m","messages":[{}],"stream":true,"stream_options":{"include_usage":false},"x":1.0,"x":[1e5,{"y":"\\u00e9"}]}',
    b'{ "model" : "m" , "mess\\u0061ges" : [] , "messages" : [ { } ] , "stream" : null }',
    b"ibex_pat_2f1c6a0e-6f0b-4a53-9a0e-0d7f3c1b2a4d_" + b"A" * 43,
    DEV_TOKEN.encode(),
    b"2f1c6a0e-6f0b-4a53-9a0e-0d7f3c1b2a4d",
    b"chat-42:a.b_c",
]

PIECES = [
    *(f'"{name}":'.encode() for name in ("messages", "model", "stream", "stream_options", "role", "content", "x")),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b" ",
        b"\n",
        b"\\",
        b'"',
        b'\\"',
        b"\\u0061",
        b"\\ud83e\\udd8c",
        b"\xf0\x9f\xa6\x8c",
    ),
    *(
        b"true",
        b"false",
        b"null",
        b"1.0",
        b"-0",
        b"1e400",
        b"9" * 40,
        b'"system"',
        b'"user"',
        b'"text"',
        b"{},",
        b"[],",
    ),
]
"""What a body is made of: bytes changed at random alone would hardly ever make another body."""


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Another input: what libFuzzer makes of this one, or this one or a seed with pieces put in, changed or doubled."""
    dice = random.Random(seed)
    if dice.random() < 0.2:
        changed: bytes = atheris.Mutate(data, max_size)
        return changed
    if len(data) < 2 or dice.random() < 0.3:
        data = dice.choice(SEEDS)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(data) + 1)
        end = at + dice.randrange(12)
        piece = data[at:end] if dice.random() < 0.2 else dice.choice(PIECES)
        data = data[:at] + piece + data[at if dice.random() < 0.5 else end :]
    return data[:max_size]


def check_chat(body: bytes) -> None:
    """A body is refused, or every parser finds in what is woven all that the client wrote, and the directive."""
    try:
        request = read_chat(body)
    except (InvalidJson, ValidationFailed):
        return
    given = read_exactly(body)
    assert len(request.fields) <= MAX_FIELDS
    assert given["model"] == request.model
    assert (given.get("stream") is True) == request.is_streaming
    assert read_exactly(weave(request, None, ask_usage=False)) == given
    for directive in DIRECTIVES:
        for ask_usage in (False, True):
            try:
                woven = weave(request, directive, ask_usage=ask_usage)
            except ValidationFailed:
                assert directive.mode is DirectiveMode.USER_PREPEND  # a content that nothing can be put before
                continue
            check_woven(woven, read_exactly(body), directive, asks=ask_usage and request.is_streaming)


def check_woven(woven: bytes, given: dict, directive: Directive, *, asks: bool) -> None:
    """Exactly the directive was added, and, where usage is asked for, that wish."""
    sent = read_exactly(woven)
    messages, originals = sent.pop("messages"), given.pop("messages")
    if asks:
        given["stream_options"] = (given.get("stream_options") or {}) | {"include_usage": True}
    assert sent == given
    if directive.mode is DirectiveMode.USER_PREPEND:
        check_prepended(messages, originals)
        return
    leading = next((at for at, item in enumerate(originals) if item.get("role") != "system"), len(originals))
    at = 0 if directive.mode is DirectiveMode.SYSTEM_FIRST else leading
    message = {"role": "system", "content": DIRECTIVE_TEXT}
    assert messages == [*originals[:at], message, *originals[at:]]
    for parse in (json.loads, orjson.loads):
        try:
            read = parse(woven)
        except ValueError:  # a number or a nesting beyond what this parser holds: the client's, not ours
            continue
        assert read["messages"][at] == message


def check_prepended(messages: list, originals: list) -> None:
    """The first user's message begins with the directive, and goes on as it did; without one there is a new one."""
    prefix = f"[DIRECTIVE]: {DIRECTIVE_TEXT}\n\n"
    at = next((at for at, item in enumerate(originals) if item.get("role") == "user"), None)
    if at is None:
        (new,) = [item for item in messages if item == {"role": "user", "content": prefix}]
        messages.remove(new)
        assert messages == originals
        return
    content, original = messages[at].pop("content"), originals[at].pop("content", None)
    assert messages == originals
    if isinstance(content, str):
        assert content == prefix + (original or "")
    else:
        assert content == [{"type": "text", "text": prefix}, *original]


def check_ids(text: str) -> None:
    """What is taken for an id has one spelling, of ASCII alone, and says the same when it is written again."""
    token_id, uuid = parse_bearer(text), parse_uuid(text)
    if token_id is not None and text != DEV_TOKEN:
        assert re.fullmatch(rf"ibex_pat_{token_id}_[A-Za-z0-9_-]{{43}}", text)
    if uuid is not None:
        assert str(uuid) == text.lower()
        assert text.isascii()
    if is_external_id(text):
        assert 1 <= len(text) <= 64
        assert not set(text) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-")


def read_exactly(data: bytes) -> dict:
    """A body with its numbers as they were written: 1.0 is not 1 here."""
    read: dict = json.loads(data, parse_int=lambda text: ("int", text), parse_float=lambda text: ("float", text))
    return read


def check(data: bytes) -> None:
    """One input, as a body and as an id."""
    check_chat(data)
    check_ids(data.decode("latin-1"))
    check_ids(data.decode("utf-8", "surrogateescape"))


def main() -> None:
    """Check the seeds, then let libFuzzer change them; it never returns."""
    for seed in SEEDS:
        check(seed)
    check_chat(b'{"model":"m","messages":[{}],"x":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")
    atheris.Setup(sys.argv, check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
