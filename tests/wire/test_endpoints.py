"""Routing: what matches, what redirects, what is another verb, and what is nothing."""

import re
from urllib.parse import urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.wire import vms
from chutes_proto.wire.endpoints import ENDPOINTS, Match, Redirect, WrongMethod, largest_body, route


def test_each_operation_is_where_the_table_says() -> None:
    for endpoint in ENDPOINTS:
        path = re.sub(r"\{[a-z_]+\}", "vm-1", endpoint.path)
        assert route(endpoint.method, path) == Match(endpoint, dict.fromkeys(endpoint.parameters, "vm-1"))


def test_head_is_served_wherever_get_is() -> None:
    for endpoint in ENDPOINTS:
        path = re.sub(r"\{[a-z_]+\}", "vm-1", endpoint.path)
        if endpoint.method == "GET":
            assert route("HEAD", path) == route("GET", path)


def test_a_body_is_as_large_as_usual_or_as_its_operation_needs() -> None:
    for endpoint in ENDPOINTS:
        path = re.sub(r"\{[a-z_]+\}", "vm-1", endpoint.path)
        for usual in (1000, 1 << 20):
            assert largest_body(endpoint.method, f"{path}?a=b", usual) == max(usual, endpoint.body_bytes)
    assert largest_body("POST", "/nothing", 1000) == 1000


def test_numbers_and_names_are_unique() -> None:
    assert len({e.number for e in ENDPOINTS}) == len({e.operation for e in ENDPOINTS}) == len(ENDPOINTS)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/servers/nonce", ("GET", "HEAD")),
        ("HEAD", "/servers/boot/attestation", ("POST",)),
        ("PUT", "/servers/vm/luks", ("GET", "HEAD", "POST")),
        ("get", "/openapi.json", ("GET", "HEAD")),
    ],
)
def test_another_verb(method: str, path: str, allow: tuple[str, ...]) -> None:
    assert route(method, path) == WrongMethod(allow)


@pytest.mark.parametrize(
    ("path", "other"),
    [("/servers/nonce/", "/servers/nonce"), ("/servers/vm/luks/", "/servers/vm/luks"), ("/servers", "/servers/")],
)
def test_a_final_slash_is_redirected(path: str, other: str) -> None:
    match route("GET", path):
        case Redirect(reference):
            assert urljoin("https://host" + path, reference) == "https://host" + other
        case found:
            pytest.fail(str(found))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "//",
        "*",
        "/servers//luks",
        "/servers/a/b/luks",
        "/servers/a%2Fb/luks",
        "/servers/a%2fb/luks",
        "/servers/../luks",
        "/servers/%2e%2e/luks",
        "/servers/./luks",
        "/servers/%ff/luks",
        "/servers/%zz/luks",
        "/servers/%/luks",
        "/Servers/nonce",
        "/servers/nonce//",
        "/servers/a%00/luks/b",
        "http://host/servers/nonce",
    ],
)
def test_paths_that_are_nothing(path: str) -> None:
    assert route("GET", path) is None


def test_parameters_are_decoded_once() -> None:
    match route("GET", "/servers/a%2541/luks"):
        case Match(vms.CACHE_PASSPHRASE, {"vm_name": name}):
            assert name == "a%41"
        case other:
            pytest.fail(str(other))


@given(st.text(max_size=60))
def test_any_path(path: str) -> None:
    _ = route("GET", path)
    _ = route("GET", "/servers/" + path + "/luks")
