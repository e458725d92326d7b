"""What is read of a head before any route: whose address it is, which path, which id."""

import ipaddress
from uuid import UUID

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from ibex.server.edge.head import choose_request_id, find_address, forwardable, is_trusted, read_path

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
PROXY = "10.0.0.1"


def fields(*hops: str) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict([("X-Forwarded-For", hop) for hop in hops]))


@pytest.mark.parametrize(
    ("peer", "hops", "address"),
    [
        ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
        (PROXY, [], PROXY),
        (PROXY, ["198.51.100.7"], "198.51.100.7"),
        (PROXY, ["203.0.113.9, 198.51.100.7"], "198.51.100.7"),
        (PROXY, ["203.0.113.9, 198.51.100.7, 10.0.0.2"], "198.51.100.7"),
        (PROXY, ["203.0.113.9", "198.51.100.7", "10.0.0.2"], "198.51.100.7"),
        (PROXY, ["10.0.0.3, 10.0.0.2"], PROXY),
        (PROXY, ["203.0.113.9, unknown"], PROXY),
        (PROXY, ["203.0.113.9,"], PROXY),
        (PROXY, ["198.51.100.7:1234"], PROXY),
        (PROXY, ["\udcff"], PROXY),
        (PROXY, ["2001:db8::7, fd00::1"], "2001:db8::7"),
        ("local", ["198.51.100.7"], "local"),
    ],
)
def test_the_clients_address_is_the_last_hop_no_trusted_proxy_added(peer: str, hops: list[str], address: str) -> None:
    assert find_address(peer, fields(*hops), TRUSTED) == address


def test_nobody_is_trusted_unless_named() -> None:
    assert find_address(PROXY, fields("198.51.100.7"), ()) == PROXY
    assert not is_trusted(PROXY, ())
    assert not is_trusted("local", TRUSTED)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/models?a=b?c", "/v1/models"),
        ("/", "/"),
        ("//v1/models", "//v1/models"),
        ("/v1/%6dodels", "/v1/%6dodels"),
        ("http://ibex/v1/models?a", "/v1/models"),
        ("HTTPS://[v1.x]:9/v1", "/v1"),
        ("http://ibex", "/"),
        ("http://ibex?a", "/"),
        ("*", "*"),
        ("ftp://ibex/v1", "ftp://ibex/v1"),
    ],
)
def test_a_path_is_taken_from_its_target_and_not_interpreted(target: str, path: str) -> None:
    assert read_path(target) == path


@pytest.mark.parametrize("version", [4, 7])
def test_a_request_id_is_kept_when_it_is_a_random_or_a_timed_uuid(version: int) -> None:
    given = f"0190163d-8694-{version}39b-aea5-966c26f8ad91"

    assert choose_request_id(given) == UUID(given)


@pytest.mark.parametrize(
    "given", [None, "", "x", "0190163d-8694-139b-aea5-966c26f8ad91", "{0190163d-8694-739b-aea5-966c26f8ad91}", "\udcff"]
)
def test_any_other_request_id_is_replaced(given: str | None) -> None:
    assert choose_request_id(given).version == 7


@pytest.mark.parametrize(
    ("value", "is_passed_on"),
    [
        ("assistants=v2", True),
        (None, False),
        ("", False),
        ("é", False),
        ("\udcff", False),
        ("a\tb", False),
        ("a" * 257, False),
    ],
)
def test_what_goes_on_to_a_provider_is_short_and_printable(value: str | None, is_passed_on: bool) -> None:
    assert forwardable(value) == (value if is_passed_on else None)
