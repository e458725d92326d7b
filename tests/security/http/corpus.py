"""The corpus of hostile HTTP: cases are data in corpus/*.toml, and this is how they read.

A case has a `name`, a `why`, and what is sent: `send` as it stands, or the lines of `head` and a `body`. Strings are
Latin-1: `\\u00ff` is the byte FF. `answers` lists the transcripts that are allowed: the statuses in order, then
`closed` or `open`. A file's `[template]` gives what its cases leave out; `<<value>>` stands for a case's `value`.

`<<name>>` stands for a part made here (see `Parts`), `<<3*text>>` for a text three times over.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).with_name("corpus")
FAMILIES = sorted(path.stem for path in DIRECTORY.glob("*.toml"))

SMUGGLED = "smuggled"
"""In every request that must never be served."""
CANARY = "canary-of-a-header"
"""In a header of every request that presents a token: it may be seen nowhere."""
PROMPT = "canary-of-a-prompt"

_PART = re.compile(r"<<(?:(\d+)\*((?:(?!<<|>>).|<<[a-z0-9-]+>>)*)|([a-z0-9-]+))>>", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One thing to send, and what may come back."""

    name: str
    why: str
    data: bytes
    answers: frozenset[str]
    is_head: bool


def load(family: str, parts: Mapping[str, str]) -> list[Case]:
    """The cases of one file."""
    document = tomllib.loads((DIRECTORY / f"{family}.toml").read_text())
    template = document.get("template", {})
    return [_read({**template, **case}, parts) for case in document["case"]]


def make_parts(bearer: str, agent_id: str) -> dict[str, str]:
    """What `<<name>>` can stand for."""
    chat = "/v1/chat/completions"
    token = f"Authorization: Bearer {bearer}\r\nX-Canary: {CANARY}"
    who = f"{token}\r\nX-IBEX-Agent-ID: {agent_id}"
    auth = f"{who}\r\nContent-Type: application/json"
    body, smuggled_body = _body(PROMPT), _body(SMUGGLED)
    request, smuggled = (
        f"POST {chat} HTTP/1.1\r\nHost: ibex\r\n{auth}\r\nContent-Length: {len(text)}\r\n\r\n{text}"
        for text in (body, smuggled_body)
    )
    return {
        "chat": chat,
        "token": token,
        "who": who,
        "auth": auth,
        "agent": agent_id,
        "body": body,
        "body-length": str(len(body)),
        "chunk": f"{len(body):x}\r\n{body}\r\n",
        "chunk-upper": f"{len(body):X}\r\n{body}\r\n",
        "chunk-extended": f'{len(body):x};name="a value";other\r\n{body}\r\n',
        "body-in-chunks-of-one": "".join(f"1\r\n{character}\r\n" for character in body),
        "request": request,
        "smuggled": smuggled,
        "smuggled-length": str(len(smuggled)),
        "smuggled-body": smuggled_body,
        "smuggled-body-length": str(len(smuggled_body)),
        "health": "GET /health HTTP/1.1\r\nHost: ibex\r\n\r\n",
        "models-404": "GET /nowhere HTTP/1.1\r\nHost: ibex\r\n\r\n",
    }


def _body(text: str) -> str:
    return f'{{"model":"gpt-4o-mini","messages":[{{"role":"user","content":"{text}"}}]}}'


def _read(case: Mapping[str, Any], parts: Mapping[str, str]) -> Case:
    value = case.get("value", "").encode(case.get("escape", "latin-1")).decode("latin-1")
    body = _expand(case.get("body", ""), parts)
    known = {**parts, "value": value, "length": str(len(body))}
    text = case["send"] if "send" in case else "\r\n".join(case["head"]) + "\r\n\r\n"
    return Case(
        name=case.get("name", repr(value)),
        why=case["why"],
        data=(_expand(text, known) + body).encode("latin-1"),
        answers=frozenset(_expand(answer, parts) for answer in case["answers"]),
        is_head=case.get("is_head", False),
    )


def _expand(text: str, parts: Mapping[str, str]) -> str:
    """Replace parts until there is none left: a part may stand in another."""

    def replace(match: re.Match[str]) -> str:
        times, repeated, name = match.groups()
        return repeated * int(times) if times else parts[name]

    while (expanded := _PART.sub(replace, text)) != text:
        text = expanded
    return text
