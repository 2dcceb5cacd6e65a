"""The key server's configuration file: TOML in, values out; what it cannot mean is an error that names the key.

Rules kept here:

* an unknown key is an error, in every table;
* a key for something that this version does not do is an error, never ignored: an operator who sets it relies on it;
* only `ServerConfig.load` reads a file, the configuration's own: paths stay paths, and ``io/server/setup.py`` makes a
  `ServerSetup` of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from os import PathLike
from typing import Final, Literal, cast

import attrs
from attrs import field, frozen

from chutes_proto._converter import MismatchError, ProblemsError, StrictConverter, list_of, string
from chutes_proto.collateral.pcs import Upstream
from chutes_proto.errors import ConfigurationError
from chutes_proto.keys.generations import RESERVED_VOLUMES
from chutes_proto.server._gpus import Gpu
from chutes_proto.server._proxy import CERTIFICATE_HEADERS, SECRET_HEADER, Network
from chutes_proto.wire.evidence import PORT

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2
_VOLUME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANSWER_MEMBERS = frozenset(
    (
        "key boot_token luks_quote_nonce passphrase in_use nonce expires_at detail code request_id "
        "volumes confirm_nonce k3s_encryption_key rotated result current next status"
    ).split()
)
"""Names that no volume may bear: deployed clients cut ``"name":"…"`` out of answers and must find it only once."""


@frozen
class TlsFiles:
    """Paths of the server's certificate chain and key, PEM."""

    certificate: str
    key: str


@frozen
class CollateralService:
    """A service of the `CollateralOptions`: ``root_ca_crl`` is for one that has the root CA's CRL elsewhere."""

    url: str
    root_ca_crl: str | None = None


@frozen
class CollateralOptions:
    """Where collateral comes from: a ``directory`` of files, or services, asked in the order of ``upstreams``.

    ``grace_seconds``: how long past its time collateral is used while there is no fresher. The rest is for services:
    ``cache`` is a directory for what was fetched, ``ca_file`` the CAs to trust with their TLS certificates instead of
    the system's.
    """

    directory: str | None = None
    upstreams: tuple[CollateralService, ...] = ()
    cache: str | None = None
    ca_file: str | None = None
    update: Literal["standard", "early"] = "standard"
    grace_seconds: int = 0
    refresh_seconds: int = 86400
    fetches_per_minute: int = 30


@frozen
class NonceOptions:
    """``expected_key_ids``: ids of MAC keys that other processes of this server use already."""

    bind_address: bool = False
    expected_key_ids: tuple[int, ...] = ()


@frozen
class RegistrationOptions:
    """What a registration must show.

    With ``evidence="callback"`` its host is asked, on ``evidence_port``, in the name of the hotkey in ``hotkey_file``.
    Hosts in ``unsafe_private_networks`` count as public ones, for a laboratory.
    """

    evidence: Literal["link", "boot", "callback"] = "link"
    hotkey_file: str | None = None
    evidence_port: int = PORT
    unsafe_private_networks: tuple[str, ...] = ()

    @property
    def parsed_networks(self) -> tuple[Network, ...]:
        """The ``unsafe_private_networks`` as values. Raises `ConfigurationError`."""
        return tuple(_network("registration.unsafe_private_networks", text) for text in self.unsafe_private_networks)


@frozen
class RuntimeOptions:
    """When a runtime attestation counts as fresh."""

    fresh_seconds: int = 3600


@frozen
class ProxyOptions:
    """The proxies that may say who their client is; none where neither ``networks`` nor ``unix`` is given.

    ``networks``: whence they come over TLS, with a secret of ``secret_file``, which holds one, or two while it is being
    changed, each on its line. ``unix``: the path of a socket where they speak plain HTTP. Each proxy sets exactly the
    two headers named here.
    """

    networks: tuple[str, ...] = ()
    unix: str | None = None
    secret_file: str | None = None
    certificate_header: str = "X-Client-Cert"
    address_header: str = "X-Forwarded-For"

    @property
    def parsed_networks(self) -> tuple[Network, ...]:
        """The ``networks`` as values. Raises `ConfigurationError`."""
        return tuple(_network("proxy.networks", text) for text in self.networks)


@frozen
class LimitOptions:
    """Bounds on what peers can make the server do.

    ``requests_per_minute``: of one address (0: as many as it likes); what clients ask only once counts if it gets 401.
    ``drain_seconds``: how long at most a server that was told to stop waits for its open boots (0: not at all).
    ``store_connections``: how many one process may have open to a store in PostgreSQL.
    """

    connections: int = 1024
    verifications: int = 256
    body_bytes: int = 64 * 1024
    head_bytes: int = 16 * 1024
    request_seconds: int = 30
    requests_per_minute: int = 0
    drain_seconds: int = 25
    claims_per_platform: int = 64
    store_connections: int = 16


@frozen
class ServerConfig:
    """The key server's configuration, checked as far as one can without reading the files that it names.

    ``path`` is the absolute path of the file that it was read from: relative paths begin at that file's directory, or
    at the working directory where there is none.
    """

    tls: TlsFiles
    store: str = field(repr=False)  # a URL may hold a password
    kek_file: str
    collateral: CollateralOptions
    measurements: tuple[str, ...]
    hotkeys: tuple[str, ...] | Literal["*"]
    listen: str = "127.0.0.1:8443"
    kek_previous_file: str | None = None
    roots: str = "intel"
    volumes: tuple[str, ...] = ("storage", "tdx-cache")
    netuid: int = 64
    exchange_downgrade: Literal["refuse", "allow"] = "refuse"
    retention_days: int = 90
    """How long a retired key is kept at least. A server purges nothing: this is for the command ``keys purge``."""
    audit_days: int = 365
    """How long an audit row is kept at least. A server deletes none: this is for the command ``audit purge``."""
    signatures: Literal["compatible", "request"] = "compatible"
    nonce: NonceOptions = field(factory=NonceOptions)
    registration: RegistrationOptions = field(factory=RegistrationOptions)
    runtime: RuntimeOptions = field(factory=RuntimeOptions)
    proxy: ProxyOptions = field(factory=ProxyOptions)
    limits: LimitOptions = field(factory=LimitOptions)
    gpus: Mapping[str, Gpu] = field(factory=dict[str, Gpu])
    """Kinds that the GPU table lacks, by ``gpu_identifier``."""
    profile_defaults: Mapping[str, object] = field(factory=dict[str, object])
    path: str | None = None

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host and port of ``listen``; port 0 means any free one."""
        return _listen_address(self.listen)

    @classmethod
    def from_toml(cls, data: bytes) -> ServerConfig:
        """The configuration in ``data``. Raises `ConfigurationError`, which lists all that is wrong."""
        try:
            return _CONVERTER.from_toml(data, cls, _problems)
        except ProblemsError as exc:
            told = (_GONE.get(str(problem), str(problem)) for problem in exc.problems)
            raise ConfigurationError("; ".join(told)) from None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ServerConfig:
        """Read the configuration file at ``path``; the files that it names are not read yet.

        Raises `FileUnavailable` if it cannot be read, and `ConfigurationError`, which lists all that is wrong with it.
        """
        from chutes_proto.io.files import absolute, read_file

        whole = absolute(path)
        data = read_file(whole)
        try:
            return attrs.evolve(cls.from_toml(data), path=whole)
        except ConfigurationError as exc:
            raise ConfigurationError(f"{whole}: {exc}") from None


_GONE: Final = {
    "platform_binding: Unknown key": "platform_binding: this setting is gone, remove it; a VM's name is served only"
    " from the platform that it is bound to, and `chutes-proto vm rebind` binds it to another one",
    "pruned: Unknown key": "pruned: this setting is gone, remove it; a volume that a sync left out and a later one"
    " lists always gets its old key",
}
"""Problems of older configurations, and the words for them."""

_FLOORS: Final = {
    "connections": (1, "or nobody is served"),
    "verifications": (1, "or no quote is verified"),
    "body_bytes": (16 * 1024, "which a quote in base64 needs"),
    "head_bytes": (1024, "which the head of a request needs"),
    "request_seconds": (1, "or no request is in time"),
    "requests_per_minute": (0, "which is: as many as one likes"),
    "drain_seconds": (0, "which is: not at all"),
    "claims_per_platform": (1, "or no VM can boot"),
    "store_connections": (1, "or no request reaches the store"),
}
"""The least that each of the `LimitOptions` can be, and why."""


def check_store_address(text: str) -> str | None:
    """What is wrong with the address of a store, as far as one can say without opening it."""
    if re.match("sqlite:.|postgresql://", text):
        return None
    return 'say "sqlite:/path/to/keys.db" or "postgresql://user@host/database"'


def _problems(config: ServerConfig) -> list[str]:
    found: list[str] = []
    if config.path is not None:
        found.append("path: Unknown key")  # it is not the file that says where it is
    if problem := check_store_address(config.store):
        found.append(f"store: {problem}")
    if config.kek_previous_file == config.kek_file:
        found.append("kek_previous_file: it is kek_file; name the file of the key before it, or remove this one")
    try:
        _ = config.listen_address
    except ConfigurationError as exc:
        found.append(str(exc))
    if not config.volumes:
        found.append("volumes: name at least one")
    for volume in config.volumes:
        if not _VOLUME.fullmatch(volume):
            found.append(f"volumes: {volume!r} is not [A-Za-z0-9_.-]{{1,64}}")
        if volume in RESERVED_VOLUMES | ANSWER_MEMBERS:
            found.append(f"volumes: {volume!r} is a reserved name")
    if len(set(config.volumes)) != len(config.volumes):
        found.append("volumes: a name is given twice")
    if not config.measurements:
        found.append("measurements: name at least one file of measurement profiles")
    if not config.hotkeys:
        found.append('hotkeys: name at least one, or say "*" for every hotkey')
    if config.runtime.fresh_seconds < 1:
        found.append("runtime.fresh_seconds: at least 1")
    kept = {"retention_days": config.retention_days, "audit_days": config.audit_days}
    found.extend(f"{name}: at least 1" for name, days in kept.items() if days < 1)
    found.extend(_registration_problems(config.registration))
    found.extend(problem for name, gpu in config.gpus.items() for problem in _gpu_problems(name, gpu))
    found.extend(_collateral_problems(config.collateral))
    limits = attrs.asdict(config.limits)
    found.extend(
        f"limits.{name}: at least {least}, {why}" for name, (least, why) in _FLOORS.items() if limits[name] < least
    )
    if any(not 0 <= key_id <= 63 for key_id in config.nonce.expected_key_ids):
        found.append("nonce.expected_key_ids: ids are 0 to 63")
    found.extend(_proxy_problems(config.proxy))
    return found


def _gpu_problems(name: str, gpu: Gpu) -> list[str]:
    found: list[str] = []
    if not re.fullmatch(r"[a-z0-9_]{1,64}", name):
        found.append(f"gpus: {name!r} is not [a-z0-9_]{{1,64}}")
    try:
        if not gpu.model:
            found.append(f"gpus.{name}.model: a pattern of the model's name")
        _ = re.compile(gpu.model)
    except re.error as exc:
        found.append(f"gpus.{name}.model: no regular expression: {exc}")
    numbers = {key: value for key, value in attrs.asdict(gpu).items() if key != "model"}
    found.extend(f"gpus.{name}.{key}: at least 1" for key, value in numbers.items() if value < 1)
    if gpu.clock_boost_mhz < gpu.clock_base_mhz:
        found.append(f"gpus.{name}.clock_boost_mhz: less than clock_base_mhz")
    return found


def _registration_problems(options: RegistrationOptions) -> list[str]:
    found: list[str] = []
    if options.evidence == "callback" and options.hotkey_file is None:
        found.append("registration.hotkey_file: hosts give evidence to a hotkey that they know; name its file")
    if options.evidence != "callback":
        found += _not_default("registration", options, 'evidence = "callback"', "hotkey_file evidence_port")
    if not 1 <= options.evidence_port <= 65535:
        found.append("registration.evidence_port: 1 to 65535")
    try:
        _ = options.parsed_networks
    except ConfigurationError as exc:
        found.append(str(exc))
    return found


def _not_default(table: str, options: attrs.AttrsInstance, companion: str, names: str) -> list[str]:
    """The keys among ``names`` that are set although they go with ``companion``, which is not there."""
    keys = attrs.fields_dict(type(options))
    return [
        f"{table}.{key}: goes with {companion}" for key in names.split() if getattr(options, key) != keys[key].default
    ]


def _collateral_problems(options: CollateralOptions) -> list[str]:
    found: list[str] = []
    if (options.directory is None) == (not options.upstreams):
        found.append('collateral: say { directory = "…" }, or { upstreams = ["https://…", …] }')
    if options.directory is not None:
        names = "cache ca_file update refresh_seconds fetches_per_minute"
        found += _not_default("collateral", options, "collateral.upstreams", names)
    for service in options.upstreams:
        try:
            _ = Upstream.parse(service.url, service.root_ca_crl)
        except ConfigurationError as exc:
            found.append(f"collateral.upstreams: {exc}")
    if len({service.url for service in options.upstreams}) != len(options.upstreams):
        found.append("collateral.upstreams: a service is given twice")
    for name, least in (("grace_seconds", 0), ("refresh_seconds", 60), ("fetches_per_minute", 2)):
        if getattr(options, name) < least:
            found.append(f"collateral.{name}: at least {least}")
    return found


def _proxy_problems(proxy: ProxyOptions) -> list[str]:
    found: list[str] = []
    try:
        _ = proxy.parsed_networks
    except ConfigurationError as exc:
        found.append(str(exc))
    if proxy.networks and proxy.secret_file is None:
        found.append("proxy.secret_file: a proxy that comes over the network shows a secret; name its file")
    if proxy != ProxyOptions() and not proxy.networks and proxy.unix is None:
        found.append("proxy: name networks or a unix socket that proxies come from")
    if proxy.unix == "":
        found.append("proxy.unix: name a path")
    if proxy.certificate_header.lower() not in CERTIFICATE_HEADERS:
        found.append('proxy.certificate_header: say "X-Client-Cert" or "Client-Cert"')
    address_header = proxy.address_header.lower()
    if not _TOKEN.fullmatch(address_header) or address_header in (*CERTIFICATE_HEADERS, SECRET_HEADER):
        found.append('proxy.address_header: name the header of the client\'s address, for example "X-Forwarded-For"')
    return found


def _network(key: str, text: str) -> Network:
    try:
        network = ip_network(text)
    except ValueError as exc:
        raise ConfigurationError(f"{key}: {exc}") from None
    if network.prefixlen == 0:
        raise ConfigurationError(f"{key}: {text} is everybody")
    return network


def _listen_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigurationError('listen: say "address:port", for example "0.0.0.0:8443" or "[::]:8443"')
    return host.removeprefix("[").removesuffix("]"), int(port)


# --- strict structuring ---


def _hotkeys(value: object, _: object) -> tuple[str, ...] | str:
    if value == "*":
        return "*"
    if isinstance(value, str):
        raise MismatchError("hotkeys_type", 'Input should be a list, ["5F…"], or "*" for every hotkey')
    return list_of(string)(value)


def _service(value: object, _: object) -> CollateralService:
    """A service is its URL, or a table."""
    if isinstance(value, str):
        return CollateralService(value)
    members: dict[str, object] = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    match members:
        case {"url": str(url), "root_ca_crl": str(crl)} if len(members) == 2:
            return CollateralService(url, crl)
        case {"url": str(url)} if len(members) == 1:
            return CollateralService(url)
        case _:
            raise MismatchError("service_type", 'Input should be "https://…" or { url = "…", root_ca_crl = "…" }')


_CONVERTER: Final = StrictConverter(
    {tuple[str, ...] | Literal["*"]: _hotkeys, CollateralService: _service}, own_file=True
)
