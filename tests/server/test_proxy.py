"""Trust in proxies' headers: hostile ones from strangers, mistaken ones from proxies."""

import base64
from ipaddress import ip_network
from urllib.parse import quote

import pytest
from attrs import evolve
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import BadRequest
from chutes_proto.log import Level
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._proxy import TrustedProxies, TrustedProxy
from chutes_proto.wire.http import HttpRequest
from tests.certificates import NEW_KEY, certificate_pem, self_signed
from tests.server.world import PLATFORM, World, refusal, service

CERTIFICATE = self_signed(NEW_KEY["p256"]())
OWN = self_signed(NEW_KEY["p256"]())
PEM = quote(certificate_pem(CERTIFICATE), safe="")
DER = f":{base64.b64encode(CERTIFICATE.public_bytes(Encoding.DER)).decode()}:"
NETWORKS = tuple(map(ip_network, ("10.1.0.0/16", "2001:db8::/32")))
FRONT = TrustedProxy("front", networks=NETWORKS, secrets=(Secret(b"new-secret"), Secret(b"old-secret")))
BY_NETWORK = TrustedProxies((FRONT,))
BY_SOCKET = TrustedProxies((TrustedProxy("front", unix=True),))
ADDRESS = ("x-forwarded-for", "192.0.2.7")
SECRET = ("x-attestation-proxy-auth", "old-secret")
CVM_SECRET = ("x-cvm-proxy-auth", "cvm-secret")
CERT = ("x-client-cert", PEM)


def request(*headers, peer="10.1.2.3"):
    return HttpRequest("GET", "/", (("host", "h"), *headers), peer_certificate=OWN, peer_address=peer)


def refused(proxies, *headers, peer="10.1.2.3"):
    with pytest.raises(BadRequest) as caught:
        proxies.client_request(request(*headers, peer=peer))
    exc = caught.value
    assert (exc.status, exc.detail) == (400, "Bad Request")
    for secret in ("new-secret", "old-secret", "guess"):
        assert secret not in exc.reason
    return exc.reason


@pytest.mark.parametrize("secret", ["old-secret", "new-secret"])
def test_a_proxy_of_the_network_speaks_for_its_client(secret):
    got = BY_NETWORK.client_request(request(ADDRESS, CERT, ("x-attestation-proxy-auth", secret)))
    assert got.peer_certificate == CERTIFICATE
    assert got.peer_address == "192.0.2.7"
    assert got.headers == (("host", "h"),)


def test_a_client_without_a_certificate_has_none_and_not_the_proxys():
    for empty in ([], [("x-client-cert", "")]):
        got = BY_NETWORK.client_request(request(ADDRESS, SECRET, *empty))
        assert got.peer_certificate is None


def test_a_unix_socket_needs_no_secret_but_a_wrong_one_is_wrong():
    got = BY_SOCKET.client_request(request(ADDRESS, CERT, peer=""))
    assert (got.peer_certificate, got.peer_address) == (CERTIFICATE, "192.0.2.7")
    assert "secret" in refused(BY_SOCKET, ADDRESS, CERT, SECRET, peer="")
    assert "names no IP address" in refused(BY_SOCKET, peer="")


def test_rfc_9440():
    proxy = TrustedProxy("front", unix=True, certificate_header="client-cert", address_header="x-real-ip")
    proxies = TrustedProxies((proxy,))
    got = proxies.client_request(request(("client-cert", DER), ("x-real-ip", "2001:DB8::1"), peer=""))
    assert (got.peer_certificate, got.peer_address) == (CERTIFICATE, "2001:db8::1")
    assert "x-client-cert" in refused(proxies, CERT, ("x-real-ip", "192.0.2.7"), peer="")
    assert "x-forwarded-for" in refused(proxies, ADDRESS, ("x-real-ip", "192.0.2.7"), peer="")


@pytest.mark.parametrize("header", [ADDRESS, SECRET, CVM_SECRET, CERT, ("client-cert", DER), ("x-client-cert", "")])
@pytest.mark.parametrize("proxies", [TrustedProxies(), BY_NETWORK, BY_SOCKET])
def test_nobody_else_may_set_any_of_them(proxies, header):
    assert "from another peer; see networks in [[proxy]]" in refused(proxies, header, peer="192.0.2.66")
    if proxies is not BY_SOCKET:
        assert "from another peer; see unix in [[proxy]]" in refused(proxies, header, peer="")


def test_a_direct_client_is_itself():
    for proxies, peer in ((TrustedProxies(), "192.0.2.66"), (BY_NETWORK, "10.1.2.3"), (BY_SOCKET, "192.0.2.66")):
        asked = request(peer=peer)
        assert proxies.client_request(asked) is asked


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ([ADDRESS, CERT], "no secret"),
        ([ADDRESS, CERT, ("x-attestation-proxy-auth", "guess")], "no secret that is live"),
        ([ADDRESS, CERT, ("x-attestation-proxy-auth", "")], "no secret that is live"),
        ([ADDRESS, CERT, ("x-attestation-proxy-auth", "é\xff")], "no secret that is live"),
        ([ADDRESS, CERT, SECRET, SECRET], "more than once"),
        ([ADDRESS, CERT, CERT, SECRET], "more than once"),
        ([ADDRESS, ADDRESS, CERT, SECRET], "more than once"),
        ([ADDRESS, CERT, ("client-cert", DER), SECRET], "client-cert"),
        ([CERT, SECRET], "names no IP address"),
        ([("x-forwarded-for", ""), CERT, SECRET], "names no IP address"),
        ([("x-forwarded-for", "192.0.2.7, unknown"), CERT, SECRET], "names no IP address"),
        ([("x-forwarded-for", "192.0.2.7:80"), CERT, SECRET], "names no IP address"),
        ([("x-forwarded-for", "fe80::1%eth0"), CERT, SECRET], "names no IP address"),
        ([ADDRESS, ("x-client-cert", PEM[:-40]), SECRET], "does not hold a certificate"),
        ([ADDRESS, ("x-client-cert", PEM + PEM), SECRET], "does not hold a certificate"),
        ([ADDRESS, ("x-client-cert", DER), SECRET], "does not hold a certificate"),
        ([ADDRESS, ("x-client-cert", "%zz"), SECRET], "does not hold a certificate"),
        ([ADDRESS, ("x-client-cert", PEM.replace("%20", " ")), SECRET], "does not hold a certificate"),
    ],
)
def test_a_proxys_mistakes(headers, told):
    assert told in refused(BY_NETWORK, *headers)


@pytest.mark.parametrize("value", [DER[1:], DER[:-1], ":", "::", ":!:", PEM, DER + DER, DER.replace(":", '"')])
def test_what_is_no_byte_sequence(value):
    proxies = TrustedProxies((TrustedProxy("front", unix=True, certificate_header="client-cert"),))
    assert "does not hold a certificate" in refused(proxies, ADDRESS, ("client-cert", value), peer="")


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("203.0.113.9, 192.0.2.7", "192.0.2.7"),
        ("nonsense, 192.0.2.7,10.1.0.9", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("10.1.0.1, 10.1.0.2", "10.1.0.1"),
        ("192.0.2.7, ::ffff:10.1.0.2, 2001:db8::5", "192.0.2.7"),
    ],
)
def test_the_last_address_that_is_no_proxys(said, address):
    got = BY_NETWORK.client_request(request(("x-forwarded-for", said), SECRET))
    assert got.peer_address == address


# Today's fleet: one proxy for each generation of images, each with its own header and secret, in one network.
FLEET = TrustedProxies(
    (
        TrustedProxy("attestation", NETWORKS, secrets=FRONT.secrets, serves=frozenset({"1.3"})),
        TrustedProxy(
            "cvm", NETWORKS, secrets=(Secret(b"cvm-secret"),), header="x-cvm-proxy-auth", serves=frozenset({"1.4"})
        ),
    )
)
CVM_ALONE = TrustedProxies(FLEET.proxies[1:])
ATTESTATION_ALONE = TrustedProxies(FLEET.proxies[:1])


@pytest.mark.parametrize("secret", [SECRET, CVM_SECRET])
def test_each_of_two_proxies_speaks_for_its_client_by_its_own_secret(secret):
    got = FLEET.client_request(request(ADDRESS, CERT, secret))
    assert (got.peer_certificate, got.peer_address, got.headers) == (CERTIFICATE, "192.0.2.7", (("host", "h"),))


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ([SECRET, CVM_SECRET], "x-attestation-proxy-auth and x-cvm-proxy-auth"),
        ([CVM_SECRET, CVM_SECRET], "more than once"),
        ([("x-cvm-proxy-auth", "old-secret")], "no secret that is live"),
        ([("x-attestation-proxy-auth", "cvm-secret")], "no secret that is live"),
        ([], "no secret"),
    ],
)
def test_of_two_proxies_none_may_speak_as_the_other(headers, told):
    assert told in refused(FLEET, ADDRESS, CERT, *headers)


def test_proxies_that_share_a_socket_show_their_secrets():
    proxies = TrustedProxies(tuple(evolve(proxy, networks=(), unix=True) for proxy in FLEET.proxies))
    assert proxies.client_request(request(ADDRESS, CERT, CVM_SECRET, peer="")).peer_certificate == CERTIFICATE
    assert "no secret" in refused(proxies, ADDRESS, CERT, peer="")
    alone = TrustedProxies(proxies.proxies[:1])
    assert alone.client_request(request(ADDRESS, CERT, SECRET, peer="")).peer_certificate == CERTIFICATE
    assert "no secret" in refused(alone, ADDRESS, CERT, peer="")


# By FLEET: which operations each of the two proxies may reach, and what anything else is refused with.
BOOT, VOLUMES = "/servers/boot/attestation", "/servers/vm-1/luks/attest"
PROVISION, PROVISIONED = "/servers/vm-1/provision", "/servers/vm-1/provision/confirm"
GATED = {BOOT: {"attestation", "cvm"}, VOLUMES: {"attestation", "cvm"}, PROVISION: {"cvm"}, PROVISIONED: {"cvm"}}
WAYS = {
    "attestation": {"x-attestation-proxy-auth": "old-secret"},
    "cvm": {"x-cvm-proxy-auth": "cvm-secret"},
    "direct": {},
    "wrong secret": {"x-cvm-proxy-auth": "guess"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", [*GATED, "/servers/nonce", "/servers/vm-1/luks/confirm"])
@pytest.mark.parametrize("proxies", [FLEET, CVM_ALONE, ATTESTATION_ALONE])
def test_each_proxy_reaches_the_operations_of_its_images(proxies, path, way):
    world = World(app=App(service(proxies=proxies)))
    configured = {proxy.name for proxy in proxies.proxies}
    headers = {"x-forwarded-for": "192.0.2.7", **WAYS[way]} if WAYS[way] else {}
    method = "GET" if path == "/servers/nonce" else "POST"
    response = world.ask(method, path, headers=headers, peer_address="10.1.2.3")
    got = (response.status, "" if response.status == 200 else refusal(response)[1])
    serving = GATED.get(path)
    if serving is None:
        is_refused = way == "wrong secret" or (way != "direct" and way not in configured)
        assert (got == (400, "bad_request")) is is_refused
    elif not serving & configured:
        assert got == (503, "proxy_unavailable")
        assert "add one, or remove serves" in str(world.log[-1].fields["reason"])
    elif way in serving & configured:
        assert got[1] not in ("proxy_required", "proxy_unavailable", "bad_request")
    else:
        assert got == (403, "proxy_required")
        assert "is served through " in str(world.log[-1].fields["reason"])
    assert "guess" not in str(world.log)


def test_one_proxy_for_all_images_leaves_every_way_open():
    """A VM may connect to the server itself, too: its handshake proves its key."""
    proxies = TrustedProxies((FRONT, evolve(FLEET.proxies[1], serves=FRONT.serves)))
    for way in ({}, {"x-forwarded-for": "192.0.2.7", "x-attestation-proxy-auth": "new-secret"}):
        world = World(app=App(service(proxies=proxies)))
        for path in GATED:
            code = refusal(world.ask("POST", path, headers=way, peer_address="10.1.2.3"))[1]
            assert code not in ("proxy_required", "proxy_unavailable", "bad_request")


NAMES = st.sampled_from(
    ["x-client-cert", "client-cert", "x-forwarded-for", "x-attestation-proxy-auth", "x-cvm-proxy-auth", "host"]
)
VALUES = st.sampled_from([PEM, DER, "old-secret", "cvm-secret", "192.0.2.7", ""]) | st.text(
    st.characters(max_codepoint=255)
)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5), st.sampled_from(["", "10.1.2.3", "192.0.2.66"]))
def test_whatever_comes_is_a_request_or_a_400(headers, peer):
    proxies = TrustedProxies((evolve(FLEET.proxies[0], unix=True), FLEET.proxies[1]))
    try:
        got = proxies.client_request(request(*headers, peer=peer))
    except BadRequest as exc:
        assert exc.status == 400
        return
    assert {name for name, _ in got.headers} <= {"host"}
    if got.peer_certificate is not OWN:
        shown = {("x-attestation-proxy-auth", "old-secret"), ("x-cvm-proxy-auth", "cvm-secret")}
        assert peer == "" or shown & {*headers}
        assert isinstance(got.peer_certificate, x509.Certificate | None)


def test_the_app_answers_and_tells_the_operator_without_the_secret():
    world = World(app=App(service(proxies=BY_NETWORK)))
    headers = {"x-forwarded-for": "192.0.2.7", "x-attestation-proxy-auth": "guess"}
    response = world.ask("GET", "/servers/nonce", headers=headers, peer_address="10.1.2.3")
    assert refusal(response)[:2] == (400, "bad_request")
    assert "no secret that is live" in str(world.log[-1].fields["reason"])
    assert "guess" not in str(world.log)
    headers["x-attestation-proxy-auth"] = "new-secret"
    response = world.ask("GET", "/nowhere", headers=headers, peer_address="10.1.2.3")
    assert response.status == 404
    assert world.log[-1].fields["peer"] == "192.0.2.7"
    assert "new-secret" not in str(world.log)


def a_boot(peer, certificate, proxies=BY_NETWORK, **headers):
    """The answer to a good attestation with the key of `CERTIFICATE`, which comes from ``peer``; and the log."""
    world = World(app=App(service(proxies=proxies)), certificate=CERTIFICATE)
    body, own = world.attestation()
    response = world.ask(
        "POST",
        "/servers/boot/attestation",
        body,
        headers=own | headers,
        peer_address=peer,
        peer_certificate=certificate,
    )
    return response, world.log[-1]


@pytest.mark.parametrize("shown", [None, OWN])
@pytest.mark.parametrize("peer", ["10.1.2.3", "2001:db8::7"])
def test_a_proxy_that_sends_none_of_its_headers_powers_no_vm_off(peer, shown):
    response, record = a_boot(peer, shown)
    assert refusal(response) == (503, "server_fault", "A fault of the server's. Retry shortly.")
    assert (response.header("retry-after"), response.header("connection")) == ("30", "close")
    assert record.level == Level.ERROR
    for told in ("networks of proxy front", "x-client-cert, x-forwarded-for, x-attestation-proxy-auth"):
        assert told in str(record.fields["reason"])


@pytest.mark.parametrize(
    ("peer", "proxies", "headers"),
    [
        ("192.0.2.66", BY_NETWORK, {}),
        ("10.1.2.3", TrustedProxies(), {}),
        ("10.1.2.3", BY_SOCKET, {}),
        ("10.1.2.3", BY_NETWORK, {"x-forwarded-for": "192.0.2.7", "x-attestation-proxy-auth": "new-secret"}),
        ("10.1.2.3", BY_NETWORK, {"x-forwarded-for": "10.1.2.3", "x-attestation-proxy-auth": "new-secret"}),
    ],
)
def test_a_client_without_its_certificate_is_refused(peer, proxies, headers):
    response, _ = a_boot(peer, None, proxies, **headers)
    assert refusal(response)[:2] == (401, "client_certificate_required")


def test_a_client_in_the_networks_is_served_and_refused_as_others_are():
    assert a_boot("10.1.2.3", CERTIFICATE)[0].status == 200
    world = World(app=App(service(proxies=BY_NETWORK)), certificate=CERTIFICATE, platform=PLATFORM.having("rtmr1"))
    body, headers = world.attestation()
    response = world.ask("POST", "/servers/boot/attestation", body, headers=headers, peer_address="10.1.2.3")
    assert refusal(response)[:2] == (403, "measurement_mismatch")
