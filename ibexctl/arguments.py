"""What people write on the command line, read once: ids, durations, permission sets, texts."""

import re
import sys
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import typer

from ibex.domain.identity import (
    DEV_TOKEN_ID,
    PERMISSION_SETS,
    PROXY_CHAT,
    Permission,
    TokenId,
    parse_bearer,
    parse_uuid,
)
from ibex.errors import OperatorError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(?:[0-9]{1,9}[smhdw])+", re.ASCII)
_PART = re.compile(r"([0-9]+)([smhdw])", re.ASCII)
_LONGEST = timedelta(days=36_500)


def duration(text: str) -> timedelta:
    """A span of time such as `90s`, `30m`, `24h`, `30d`, `2w` or `1h30m`; positive, at most a hundred years."""
    if _DURATION.fullmatch(text.strip().lower()) is None:
        raise typer.BadParameter(f"{text!r} is not a duration. Write for example 90s, 30m, 24h, 30d, 2w or 1h30m.")
    parts = _PART.findall(text.lower())
    try:
        span = sum((timedelta(**{_UNITS[unit]: int(count)}) for count, unit in parts), timedelta())
    except OverflowError:
        span = _LONGEST * 2
    if not timedelta() < span <= _LONGEST:
        raise typer.BadParameter(f"{text!r} is not more than nothing and at most 36500d.")
    return span


def identifier(text: str) -> UUID:
    """A canonical UUID."""
    found = parse_uuid(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not an id. Ids look like 00000000-0000-0000-0000-000000000003.")
    return found


def token_identifier(text: str) -> TokenId:
    """A token named by its id, by its prefix, or by the whole bearer; the message never quotes what may be a secret."""
    written = text.strip()
    found = parse_uuid(written.removeprefix("ibex_pat_"))
    token_id = parse_bearer(written) if found is None else TokenId(found)
    if token_id is None:
        raise typer.BadParameter(f"Name the token by its id or its prefix, such as ibex_pat_{DEV_TOKEN_ID}.")
    return token_id


def permissions(text: str) -> Permission:
    """A named set, or single permissions joined by `+`: `ProxyChatCompletion`, `ReadOnly+SESSION_CREATE`."""
    granted = Permission(0)
    by_name = {name.lower(): bits for name, bits in PERMISSION_SETS.items()}
    by_name |= {str(bit.name).lower(): bit for bit in Permission}
    for name in text.split("+"):
        bits = by_name.get(name.strip().lower().replace("-", "_"))
        if bits is None:
            raise typer.BadParameter(
                f"{name.strip()!r} is no permission set. The sets are {', '.join(PERMISSION_SETS)}."
            )
        granted |= bits
    return granted


def set_name(granted: int) -> str | None:
    """The name of the set that has exactly these bits, if there is one."""
    return next((name for name, bits in PERMISSION_SETS.items() if bits == granted), None)


DEFAULT_PERMISSIONS = str(set_name(PROXY_CHAT))


def read_text(text: str | None, file: Path | None) -> str:
    """A text given as an argument, in a file (`-`: standard input), or piped in.

    The line end that closes a text file is not part of the text.
    """
    if text is not None and file is not None:
        raise typer.BadParameter("Give the text by --text or by --file, not both.")
    if text is not None:
        return text
    if file is not None and str(file) != "-":
        return _decode(_read_file(file), str(file))
    if sys.stdin.isatty():
        raise typer.BadParameter("Give the text by --text, by --file, or pipe it in.")
    return _decode(sys.stdin.buffer.read(), "standard input")


def read_bearer(source: str) -> str:
    """A bearer in a file, or with `-` on standard input, where a terminal asks for it unseen.

    Never as the argument itself: those are for everybody on the machine to read, and shells remember them.
    """
    if source.startswith("ibex_"):
        raise typer.BadParameter("A token does not belong on a command line: name the file it is in, or - for stdin.")
    if source != "-":
        return _decode(_read_file(Path(source)), source).strip()
    if sys.stdin.isatty():
        from getpass import getpass

        return getpass("Token: ").strip()
    return _decode(sys.stdin.buffer.read(), "standard input").strip()


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OperatorError(
            f"{path} cannot be read: {error.strerror}.", hint="Check the path and its permissions."
        ) from None


def _decode(raw: bytes, source: str) -> str:
    try:
        return re.sub(r"\r?\n\Z", "", raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise OperatorError(f"{source} is not valid UTF-8 at byte {error.start:,}.", hint="Save it as UTF-8.") from None
