"""The configuration file: what it says, and that every mistake names its key."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import ConfigurationError
from chutes_proto.server._config import LimitOptions, ServerConfig

GOOD = """
tls = { certificate = "chain.pem", key = "key.pem" }
store = "sqlite:/var/lib/chutes/keys.db"
kek_file = "kek"
collateral = { directory = "collateral" }
measurements = ["profiles.toml"]
hotkeys = "*"
"""


GPU = "memory_gb = 1, processors = 1, max_threads_per_processor = 1, clock_base_mhz = 3, clock_boost_mhz = 9"


def problem(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        ServerConfig.from_toml(text.encode())
    return str(caught.value)


def test_defaults_are_the_documented_ones():
    config = ServerConfig.from_toml(GOOD.encode())
    assert config.volumes == ("storage", "tdx-cache")
    assert config.exchange_downgrade == "refuse"
    assert (config.roots, config.netuid, config.hotkeys) == ("intel", 64, "*")
    assert config.listen_address == ("127.0.0.1", 8443)
    assert config.store.url == "sqlite:/var/lib/chutes/keys.db"


def a_proxy(keys):
    return f'proxy = [{{ name = "p", {keys} }}]'


def two_proxies(second):
    return f'proxy = [{{ name = "p", unix = "s", secret_file = "f" }}, {{ {second} }}]'


@pytest.mark.parametrize(
    ("listen", "address"),
    [("0.0.0.0:8443", ("0.0.0.0", 8443)), ("[::]:0", ("::", 0)), ("host.example:65535", ("host.example", 65535))],
)
def test_listen(listen, address):
    assert ServerConfig.from_toml(f'listen = "{listen}"\n{GOOD}'.encode()).listen_address == address


def test_collateral_from_services():
    services = '["https://pccs", { url = "https://pcs/x", root_ca_crl = "https://crl/root.der" }]'
    text = GOOD.replace('{ directory = "collateral" }', f'{{ upstreams = {services}, update = "early" }}')
    options = ServerConfig.from_toml(text.encode()).collateral
    assert [(service.url, service.root_ca_crl) for service in options.upstreams] == [
        ("https://pccs", None),
        ("https://pcs/x", "https://crl/root.der"),
    ]
    assert (options.directory, options.update, options.grace_seconds) == (None, "early", 0)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("hotkys = 1", "hotkys: Unknown key"),
        ('listen = "8443"', "listen"),
        ('listen = "host:99999"', "listen"),
        ('listen = ":1"', "listen"),
        ('netuid = "64"', "netuid"),
        ("netuid = true", "netuid"),
        ("netuid = 6.4", "netuid"),
        ("limits.pruned = 1", "limits.pruned: Unknown key"),
        ("volumes = []", "volumes"),
        ("volumes = [1]", "volumes.0"),
        ('volumes = "storage"', "volumes"),
        ('volumes = ["root"]', "reserved"),
        ('volumes = ["key"]', "reserved"),
        ('volumes = ["in_use"]', "reserved"),
        ('volumes = ["a b"]', "volumes"),
        ('volumes = ["a", "a"]', "twice"),
        ("retention_days = 0", "retention_days: at least 1"),
        ("rotate_after_hours = -1", "rotate_after_hours: at least 0, which is: at every boot"),
        ("backup_interval_hours = -1", "backup_interval_hours: at least 0, which is: not stated"),
        (
            "backup_interval_hours = 24",
            "rotate_after_hours: 24 is not longer than backup_interval_hours (24), so a restored backup would not",
        ),
        ("audit_days = 0", "audit_days: at least 1"),
        ("audit.required = true", "audit.required: goes with audit.file or audit.journal"),
        ('kek_previous_file = "kek"', "kek_previous_file: the same file as kek_file"),
        ("limits = { body_bytes = 16383 }", "limits.body_bytes: at least 16384"),
        ("limits = { head_bytes = 1023 }", "limits.head_bytes: at least 1024"),
        ("limits = { request_seconds = 0 }", "limits.request_seconds: at least 1"),
        ("limits = { verifications = 0 }", "limits.verifications: at least 1"),
        ("limits = { claims_per_platform = 0 }", "limits.claims_per_platform: at least 1"),
        ("limits = { store_connections = 0 }", "limits.store_connections: at least 1"),
        ("runtime = { fresh_seconds = 0 }", "runtime.fresh_seconds"),
        ("limits = { connections = 0 }", "limits.connections"),
        ("limits = { connexions = 1 }", "limits.connexions"),
        ("limits = 3", "limits"),
        ("nonce = { bind_address = 1 }", "nonce.bind_address"),
        ("limits = { drain_seconds = -1 }", "limits.drain_seconds: at least 0"),
        (a_proxy('networks = ["10.0.0.0/8"]'), "proxy.p.secret_file"),
        (a_proxy('networks = ["10.0.0.1/8"], secret_file = "s"'), "proxy.p.networks: 10.0.0.1/8"),
        (
            a_proxy('networks = ["0.0.0.0/0"], secret_file = "s"'),
            "proxy.p.networks: 0.0.0.0/0 contains every address",
        ),
        (a_proxy('networks = ["host"], secret_file = "s"'), "proxy.p.networks"),
        (a_proxy('secret_file = "s"'), "proxy.p: name networks or a unix socket"),
        (a_proxy('unix = ""'), "proxy.p.unix"),
        (a_proxy('unix = "p", certificate_header = "X-Cert"'), "proxy.p.certificate_header"),
        (a_proxy('unix = "p", address_header = "Client-Cert"'), "proxy.p.address_header"),
        (a_proxy('unix = "p", address_header = "X-Cvm-Proxy-Auth"'), "proxy.p.address_header"),
        (a_proxy('unix = "p", address_header = "a b"'), "proxy.p.address_header"),
        (a_proxy('unix = "p", header = "X-Forwarded-For"'), "proxy.p.header"),
        (a_proxy('unix = "p", serves = []'), 'proxy.p.serves: say ["1.3"]'),
        (a_proxy('unix = "p", serves = ["1.4", "1.4"]'), "proxy.p.serves"),
        (a_proxy('unix = "p", serves = ["1.5"]'), "proxy.0.serves"),
        (a_proxy('unix = "p", secret = "s"'), "proxy.0.secret: Unknown key"),
        ('proxy = { unix = "p" }', "proxy: Input should be a list with an entry for each proxy; write [[proxy]]"),
        ('proxy = [{ unix = "p" }]', "proxy.0.name"),
        ('proxy = [{ name = "P P", unix = "p" }]', "proxy: name 'P P' is not"),
        (two_proxies('name = "p", unix = "s", secret_file = "f"'), "the same name"),
        (two_proxies('name = "q", unix = "s", secret_file = "f"'), "the same secret header"),
        (two_proxies('name = "q", unix = "s", header = "X-Q"'), "each needs a secret_file"),
        (two_proxies('name = "q", unix = "t", secret_file = "f", header = "X-Q"'), "different unix sockets"),
        ('registration = { evidence = "callback" }', "registration.hotkey_file"),
        ('registration = { evidence = "ask" }', "registration.evidence"),
        ('registration = { hotkey_file = "h" }', "registration.hotkey_file: goes with"),
        ("registration = { evidence_port = 1 }", "registration.evidence_port: goes with"),
        (
            'registration = { evidence = "callback", hotkey_file = "h", evidence_port = 65536 }',
            "registration.evidence_port",
        ),
        (
            'registration = { unsafe_private_networks = ["::/0"] }',
            "unsafe_private_networks: ::/0 contains every address",
        ),
        ('registration = { unsafe_private_networks = ["lab"] }', "registration.unsafe_private_networks"),
        ("roots = 1", "roots"),
        ("gpus = 1", "gpus"),
        ("gpus = { a = 1 }", "gpus.a: "),
        (f'gpus = {{ x = {{ model = "(", {GPU} }} }}', "gpus.x.model: not a regular expression"),
        (f'gpus = {{ x = {{ model = "", {GPU} }} }}', "gpus.x.model: a pattern"),
        (f'gpus = {{ X = {{ model = "a", {GPU} }} }}', "gpus: 'X' is not"),
        (f'gpus = {{ x = {{ model = "a", {GPU.replace("= 9", "= 0")} }} }}', "gpus.x.clock_boost_mhz: at least 1"),
        (f'gpus = {{ x = {{ model = "a", {GPU.replace("= 9", "= 2")} }} }}', "gpus.x.clock_boost_mhz: less than"),
    ],
)
def test_a_mistake_names_its_key(line, named):
    assert named in problem(f"{line}\n{GOOD}")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("store", '"postgresql:db"', "postgresql://"),
        ("store", '"keys.db"', "sqlite:"),
        ("store", '"sqlite:"', "sqlite:"),
        ("collateral", '{ directory = "a", upstreams = ["https://pccs"] }', "collateral: say"),
        ("collateral", '{ directory = "a", cache = "b" }', "collateral.cache: goes with"),
        ("collateral", '{ directory = "a", grace_seconds = -1 }', "collateral.grace_seconds"),
        ("collateral", "{ upstreams = [] }", "collateral: say"),
        ("collateral", "{ upstreams = [1] }", "collateral.upstreams.0"),
        ("collateral", '{ upstreams = [{ url = "https://a", x = 1 }] }', "collateral.upstreams.0"),
        ("collateral", '{ upstreams = ["http://pccs.example"] }', "collateral.upstreams: 'http://pccs.example'"),
        ("collateral", '{ upstreams = ["https://a", "https://a"] }', "twice"),
        ("collateral", '{ upstreams = ["https://a"], update = "late" }', "collateral.update"),
        ("collateral", '{ upstreams = ["https://a"], fetches_per_minute = 1 }', "collateral.fetches_per_minute"),
        ("collateral", '"dir"', "collateral"),
        ("collateral", "{ }", "collateral: say"),
        ("hotkeys", "[]", "hotkeys"),
        ("hotkeys", '"5F"', 'hotkeys: Input should be an array, ["5F…"], or "*"'),
        ("measurements", "[]", "measurements"),
        ("tls", '{ certificate = "a" }', "tls.key"),
    ],
)
def test_a_wrong_value_names_its_key(key, value, named):
    lines = [f"{key} = {value}" if line.startswith(f"{key} ") else line for line in GOOD.splitlines()]
    assert named in problem("\n".join(lines))


def test_limits_may_be_the_least_that_works():
    least = (
        "limits = { connections = 1, body_bytes = 16384, head_bytes = 1024, request_seconds = 1, drain_seconds = 0 }"
    )
    limits = ServerConfig.from_toml(f"{least}\n{GOOD}".encode()).limits
    assert (limits.body_bytes, limits.head_bytes, limits.drain_seconds) == (16384, 1024, 0)


def test_every_limit_has_its_floor():
    limits = "".join(f"\n{limit.name} = -1" for limit in attrs.fields(LimitOptions))
    text = problem(f"{GOOD}[limits]{limits}")
    for limit in attrs.fields(LimitOptions):
        assert f"limits.{limit.name}: at least" in text


def test_all_missing_keys_are_named_at_once():
    text = problem("")
    for key in ("tls", "store", "kek_file", "collateral", "measurements", "hotkeys"):
        assert f"{key}: Field required" in text


@given(st.binary(max_size=200))
def test_any_bytes(data):
    with pytest.raises(ConfigurationError):
        ServerConfig.from_toml(data)
