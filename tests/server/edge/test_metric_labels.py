"""Whatever callers and providers say, a label's value comes from a closed set: no caller makes a series."""

import msgspec
import pytest

from ibex.errors import RequestError
from ibex.server.edge.head import KNOWN_METHODS
from ibex.telemetry.metrics import Family
from tests.server.conftest import Edge

CANARY = "kanarienvogel"
ROUTES = {"chat", "models", "model", "auth_probe", "health", "ready", "metrics", "unmatched"}


def codes() -> set[str]:
    """Every error code there is."""
    found, left = {RequestError.code}, [RequestError]
    while left:
        children = left.pop().__subclasses__()
        found |= {child.code for child in children}
        left += children
    return found


async def drive(edge: Edge) -> None:
    """Everything a caller can name, named anew each time; and a provider's odd answers."""
    for number in range(6):
        name = f"{CANARY}-{number}"
        for method, path in (("GET", f"/{name}"), ("POST", f"/v1/orgs/{name}/chat/completions"), (name, "/health")):
            async with edge.http.request(method, edge.url + path, headers=edge.headers()):
                pass
        async with edge.http.get(f"{edge.url}/v1/models/{name}", headers=edge.headers()):
            pass
        headers = {"X-IBEX-Session-ID": name, "Idempotency-Key": name, "X-Request-ID": name}
        await edge.chat(model=name, headers=headers)
        await edge.chat(model=name, stream=True)
        await edge.chat(headers={"Authorization": f"Bearer {name}"})
    for status in (400, 402, 404, 418, 429, 499, 500, 599):
        await edge.chat(sandbox={"status": status, "error": {"type": CANARY, "code": CANARY, "message": CANARY}})


@pytest.mark.parametrize("edge", [{}], indirect=True)
async def test_nobody_but_ibex_names_a_series(edge: Edge) -> None:
    await drive(edge)

    families = msgspec.msgpack.decode(edge.metrics.snapshot(), type=list[Family])
    values: dict[str, set[str]] = {}
    for family in families:
        for series in family.series:
            for label, value in zip(family.label_names, series.labels, strict=True):
                values.setdefault(label, set()).add(value)
    assert CANARY not in str(values)
    assert values["route"] <= ROUTES
    assert values["method"] <= KNOWN_METHODS | {"other"}
    assert values["code"] <= codes()
    assert values["model"] <= {"other", "gpt-4o-mini"}
    assert values["provider"] == {"openai"}
    assert values["status_class"] <= {"2xx", "3xx", "4xx", "5xx", "error", "timeout"}
    assert all(value.isdigit() and 100 <= int(value) <= 599 for value in values["status_code"])
