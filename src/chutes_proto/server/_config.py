"""The key server's configuration file: TOML in, values out; every error names its key.

Rules kept here:

* an unknown key is an error, in every table: an operator who sets one relies on it;
* only `ServerConfig.load` reads a file, the configuration's own: paths stay paths, and ``io/server/setup.py`` makes a
  `ServerSetup` of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from ipaddress import ip_address, ip_network
from operator import attrgetter
from os import PathLike
from typing import Final, Literal, cast

import attrs
from attrs import field, frozen

from chutes_proto._converter import MismatchError, Problem, ProblemsError, StrictConverter, file_array, list_of, string
from chutes_proto.collateral.pcs import Upstream, check_service
from chutes_proto.errors import ConfigurationError
from chutes_proto.keys.generations import RESERVED_VOLUMES
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._measurements import Schedule, read_schedule
from chutes_proto.server._gpus import Gpu
from chutes_proto.server._proxy import CERTIFICATE_HEADERS, GENERATIONS, SECRET_HEADERS, Generation, Network
from chutes_proto.tlog.notes import check_name
from chutes_proto.units.fleet import Window, parse_version
from chutes_proto.wire.evidence import PORT

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, section 5.6.2
_PROXY_NAME = re.compile(r"[a-z0-9_-]{1,32}")
_VOLUME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ANSWER_MEMBERS = frozenset(
    (
        "key boot_token luks_quote_nonce passphrase in_use nonce expires_at detail code request_id "
        "volumes confirm_nonce k3s_encryption_key rotated result current next status"
    ).split()
)
"""Names that no volume may have: deployed clients cut ``"name":"…"`` out of answers and must find it only once."""


@frozen
class TlsFiles:
    """Paths of the server's certificate chain and key, PEM."""

    certificate: str
    key: str


@frozen
class CollateralService:
    """A service of the `CollateralOptions`; ``root_ca_crl`` is the URL of the root CA's CRL, if it is elsewhere."""

    url: str
    root_ca_crl: str | None = None


@frozen
class CollateralOptions:
    """The source of collateral: a ``directory`` of files, or services, asked in the order of ``upstreams``.

    Expired collateral is used for ``grace_seconds`` while nothing fresher is available. The other keys are for
    services: ``cache`` is a directory for fetched collateral, ``ca_file`` the CAs to trust with their TLS certificates
    instead of the system's.
    """

    directory: str | None = None
    upstreams: tuple[CollateralService, ...] = ()
    cache: str | None = None
    ca_file: str | None = None
    update: Literal["standard", "early"] = "standard"
    grace_seconds: int = 0
    fetches_per_minute: int = 30


@frozen
class StoreOptions:
    """The store: its ``url``, ``sqlite:/path`` or ``postgresql://user@host/database``, and how far to trust it.

    A server refuses a database whose clock differs from its own by more than ``clock_difference_seconds``, and with
    ``require_synchronous`` one without a synchronous standby. ``mark_file`` keeps what it last saw of the store, so
    that it refuses a store that went back, or that is no longer sealed; without it, it forgets that when it ends.
    """

    url: str = field(repr=False)  # it may hold a password
    clock_difference_seconds: int = 5
    require_synchronous: bool = False
    mark_file: str | None = None


def _store_options(given: StoreOptions | str) -> StoreOptions:
    return StoreOptions(given) if isinstance(given, str) else given


@frozen
class NonceOptions:
    """Options of nonces."""

    bind_address: bool = False


@frozen
class RegistrationOptions:
    """The evidence that a registration needs.

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
        return _networks("registration.unsafe_private_networks", self.unsafe_private_networks)


@frozen
class GpuEvidenceOptions:
    """The appraisal of GPU evidence.

    RIMs and OCSP answers come from the files in ``rims`` and ``status`` below ``directory``, and from ``rim_services``
    and ``ocsp_services``, asked in their order; without any of these, evidence is recorded and not verified. ``cache``
    is a directory for what was fetched, ``ca_file`` the CAs to trust with the services' TLS certificates instead of the
    system's. ``policy`` is a file with a policy for GPUs. ``roots`` is a directory with other roots than NVIDIA's.
    """

    directory: str | None = None
    rim_services: tuple[str, ...] = ()
    ocsp_services: tuple[str, ...] = ()
    cache: str | None = None
    ca_file: str | None = None
    policy: str | None = None
    roots: str | None = None


@frozen
class MaintenanceOptions:
    """The window in which a fleet moves to a new image: from ``start`` to ``end``, times of RFC 3339 with an offset.

    In it a miner's tool begins the maintenance of at most ``max_concurrent_per_miner`` servers at once; a boot of
    ``target_version``, or of a newer one, ends that of its server. ``id`` names the window, and is a new one each time.
    """

    id: str | None = None
    target_version: str | None = None
    start: str | None = None
    end: str | None = None
    max_concurrent_per_miner: int = 1

    @property
    def window(self) -> Window | None:
        """The same in unix seconds; None without a window. Raises `ValueError`."""
        if self == MaintenanceOptions():
            return None
        if not self.id or self.target_version is None or self.start is None or self.end is None:
            raise ValueError("id, target_version, start and end go together")
        start, end = _seconds("start", self.start), _seconds("end", self.end)
        if start >= end or self.max_concurrent_per_miner < 1:
            raise ValueError("say start before end, and max_concurrent_per_miner at least 1")
        _ = parse_version(self.target_version)
        return Window(self.id, self.target_version, start, end, self.max_concurrent_per_miner)


def _seconds(name: str, text: str) -> int:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError(f"{name} is a time like 2026-12-01T08:00:00Z")
    return int(at.timestamp())


@frozen
class RuntimeOptions:
    """Options of runtime attestations; one counts as fresh for ``fresh_seconds``."""

    fresh_seconds: int = 3600


@frozen
class ProxyOptions:
    """A trusted proxy, which names its client.

    It comes from ``networks`` over TLS, or over ``unix``, the path of a socket where proxies speak plain HTTP. It shows
    a secret of ``secret_file``, which holds one secret a line: one, or two during a change; without one it must be the
    only proxy on the socket. It sets exactly the three headers that are named here. ``serves`` has the images that it
    is for: those before 1.4.0, those from 1.4.0 on, or both.
    """

    name: str
    networks: tuple[str, ...] = ()
    unix: str | None = None
    secret_file: str | None = None
    header: str = "X-Attestation-Proxy-Auth"
    serves: tuple[Generation, ...] = GENERATIONS
    certificate_header: str = "X-Client-Cert"
    address_header: str = "X-Forwarded-For"

    @property
    def parsed_networks(self) -> tuple[Network, ...]:
        """The ``networks`` as values. Raises `ConfigurationError`."""
        return _networks(f"proxy.{self.name}.networks", self.networks)


@frozen
class AuditOptions:
    """Options of the audit log; ``origin`` names it for all time, and is used when it begins.

    Each audit row is copied to ``file`` and, with ``journal``, to the journal of systemd; with ``required`` no answer
    leaves before that.
    """

    origin: str | None = None
    file: str | None = None
    journal: bool = False
    required: bool = False


@frozen
class LimitOptions:
    """Limits on the resources that peers can use.

    ``requests_per_minute`` is of one address (0: without a limit); requests that clients send only once count if they
    get 401. A server that stops waits at most ``drain_seconds`` for its open boots (0: not at all).
    ``store_connections`` is the most connections of one process to a store in PostgreSQL. ``host_calls`` is how many
    hosts are called at a time, and ``host_profiles_per_hour`` how many requests to register host profiles one hotkey
    may send; all hotkeys together may send twelve times as many.
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
    host_calls: int = 16
    host_profiles_per_hour: int = 10

    def shared(self, workers: int) -> LimitOptions:
        """The limits of each of ``workers`` processes, so that all together keep these, but for rounding up."""

        def share(limit: int) -> int:
            return -(-limit // workers)

        return attrs.evolve(
            self,
            connections=share(self.connections),
            verifications=share(self.verifications),
            requests_per_minute=share(self.requests_per_minute),
            store_connections=share(self.store_connections),
            host_calls=share(self.host_calls),
            host_profiles_per_hour=share(self.host_profiles_per_hour),
        )


@frozen
class AdminOptions:
    """The listener for operators and for programs that watch the server: ``listen`` (address and port) or ``unix``.

    Both may be set. An address that is not loopback needs ``certificate``, ``key`` and ``client_ca``, files in PEM:
    only clients with a certificate of that CA are served. ``hosts`` are further names that requests may give this
    listener.
    """

    listen: str | None = None
    unix: str | None = None
    certificate: str | None = None
    key: str | None = None
    client_ca: str | None = None
    hosts: tuple[str, ...] = ()

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of ``listen``. Raises `ConfigurationError`."""
        return None if self.listen is None else _address("admin.listen", self.listen)


@frozen
class ServerConfig:
    """The key server's configuration, checked as far as possible without reading the files that it names.

    ``path`` is the absolute path of the file that it was read from: relative paths begin at that file's directory, or
    at the working directory without one.
    """

    tls: TlsFiles
    store: StoreOptions = field(converter=_store_options)
    """Also given as its URL alone."""
    kek_file: str
    collateral: CollateralOptions
    measurements: tuple[str, ...]
    hotkeys: tuple[str, ...] | Literal["*"]
    listen: str = "127.0.0.1:8443"
    control: str | None = None
    """The path of a Unix socket at which `chutes-proto reload` asks this server to read its files again."""
    kek_previous_file: str | None = None
    roots: str = "intel"
    volumes: tuple[str, ...] = ("storage", "tdx-cache")
    netuid: int = 64
    blacklist: Mapping[str, str] = field(factory=dict[str, str])
    """Hotkeys that boot and register nothing, each with the reason that it is told."""
    policy: str | None = None
    """The file with the appraisal policy; without one, only what is up to date is accepted."""
    minimum_version: str | None = None
    """The oldest version of the image that may boot."""
    signing_keys_file: str | None = None
    """The JSON bundle that VMs fetch to check what they install."""
    exchange_downgrade: Literal["refuse", "allow"] = "refuse"
    rotate_after_hours: int = 24
    """The least age of a key of a volume that a disk gets in the place of another one (0: any). A backup that is
    younger than this opens every disk."""
    backup_interval_hours: int = 0
    """The time between two backups of the store (0: not stated). It must be shorter than ``rotate_after_hours``."""
    retention_days: int = 90
    """The least age of a retired key that ``keys purge`` deletes. A server itself purges nothing."""
    audit_days: int = 365
    """The least age of an audit row that ``audit purge`` deletes. A server itself deletes none."""
    boot_days: int = 90
    """The least age of a boot, or of a verdict on a quote, that ``vm purge-boots`` deletes. A server deletes none."""
    signatures: Literal["compatible", "request"] = "compatible"
    nonce: NonceOptions = field(factory=NonceOptions)
    registration: RegistrationOptions = field(factory=RegistrationOptions)
    maintenance: MaintenanceOptions = field(factory=MaintenanceOptions)
    gpu_evidence: GpuEvidenceOptions = field(factory=GpuEvidenceOptions)
    runtime: RuntimeOptions = field(factory=RuntimeOptions)
    proxy: tuple[ProxyOptions, ...] = ()
    """The trusted proxies; those with a ``unix`` socket have the same."""
    admin: AdminOptions = field(factory=AdminOptions)
    audit: AuditOptions = field(factory=AuditOptions)
    limits: LimitOptions = field(factory=LimitOptions)
    gpus: Mapping[str, Gpu] = field(factory=dict[str, Gpu])
    """Kinds that the GPU table lacks, by ``gpu_identifier``."""
    profile_defaults: Mapping[str, object] = field(factory=dict[str, object])
    schedule: Mapping[str, Schedule] = field(factory=dict[str, Schedule])
    """When profiles count, by a profile's name, its version, or both: for files of reference values that are published
    without it. It replaces the profile's own."""
    path: str | None = None

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host and port of ``listen``; port 0 means any free one. Raises `ConfigurationError`."""
        return _address("listen", self.listen)

    @property
    def proxy_unix(self) -> str | None:
        """The path of the socket that proxies come over; None without one."""
        return next((proxy.unix for proxy in self.proxy if proxy.unix is not None), None)

    @classmethod
    def from_toml(cls, data: bytes) -> ServerConfig:
        """Parse a configuration. Raises `ConfigurationError`, which lists all problems."""
        try:
            return _CONVERTER.from_toml(data, cls, _problems)
        except ProblemsError as exc:
            raise ConfigurationError("; ".join(map(str, exc.problems))) from None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ServerConfig:
        """Read the configuration file at ``path``; the files that it names are not read yet.

        Raises `FileUnavailable` if it cannot be read, and `ConfigurationError`, which lists all its problems.
        """
        from chutes_proto.io.files import absolute, read_file

        whole = absolute(path)
        data = read_file(whole)
        try:
            return attrs.evolve(cls.from_toml(data), path=whole)
        except ConfigurationError as exc:
            raise ConfigurationError(f"{whole}: {exc}") from None


_LEAST: Final = {
    "rotate_after_hours": (0, ", which is: at every boot"),
    "backup_interval_hours": (0, ", which is: not stated"),
    "retention_days": (1, ""),
    "audit_days": (1, ""),
    "boot_days": (1, ""),
    "runtime.fresh_seconds": (1, ""),
    "collateral.grace_seconds": (0, ""),
    "collateral.fetches_per_minute": (2, ""),
    "store.clock_difference_seconds": (1, ", because times are whole seconds"),
    "limits.connections": (1, ", or nobody is served"),
    "limits.verifications": (1, ", or no quote is verified"),
    "limits.body_bytes": (16 * 1024, ", which a quote in base64 needs"),
    "limits.head_bytes": (1024, ", which the head of a request needs"),
    "limits.request_seconds": (1, ", or no request is in time"),
    "limits.requests_per_minute": (0, ", which is: without a limit"),
    "limits.drain_seconds": (0, ", which is: not at all"),
    "limits.claims_per_platform": (1, ", or no VM can boot"),
    "limits.store_connections": (1, ", or no request reaches the store"),
    "limits.host_calls": (1, ", or no server registers"),
    "limits.host_profiles_per_hour": (1, ", or no host profile is kept"),
}
"""The least value of each number, and why."""


def check_store_address(text: str) -> str | None:
    """The problem of a store's address, as far as it can be found without opening the store; None if it has none."""
    if re.match("sqlite:.|postgresql://", text):
        return None
    return 'say "sqlite:/path/to/keys.db" or "postgresql://user@host/database"'


def _problems(config: ServerConfig) -> Iterator[str]:
    if config.path is not None:
        yield "path: Unknown key"  # the file itself does not say where it is
    if problem := check_store_address(config.store.url):
        yield f"store: {problem}"
    if config.store.require_synchronous and not config.store.url.startswith("postgresql:"):
        yield "store.require_synchronous: goes with a store in PostgreSQL"
    if config.kek_previous_file == config.kek_file:
        yield "kek_previous_file: the same file as kek_file; name the file of the previous KEK, or remove this key"
    yield from _raised(lambda: config.listen_address)
    if not config.volumes:
        yield "volumes: name at least one"
    for volume in config.volumes:
        if not _VOLUME.fullmatch(volume):
            yield f"volumes: {volume!r} is not [A-Za-z0-9_.-]{{1,64}}"
        if volume in RESERVED_VOLUMES | ANSWER_MEMBERS:
            yield f"volumes: {volume!r} is a reserved name"
    if len(set(config.volumes)) != len(config.volumes):
        yield "volumes: a name is given twice"
    if config.policy is not None and config.collateral.grace_seconds:
        yield "collateral.grace_seconds: with policy, the file that it names says this, as tcb.collateral_grace"
    if not config.measurements:
        yield "measurements: name at least one file of measurement profiles"
    if not config.hotkeys:
        yield 'hotkeys: name at least one, or say "*" for every hotkey'
    for path, (least, why) in _LEAST.items():
        if attrgetter(path)(config) < least:
            yield f"{path}: at least {least}{why}"
    if 0 < config.backup_interval_hours >= config.rotate_after_hours:
        yield (
            f"rotate_after_hours: {config.rotate_after_hours} is not longer than backup_interval_hours"
            f" ({config.backup_interval_hours}), so a restored backup would not open every disk; say"
            f" {2 * config.backup_interval_hours}"
        )
    try:
        _ = config.maintenance.window
    except ValueError as exc:
        yield f"maintenance: {exc}"
    yield from _registration_problems(config.registration)
    for name, gpu in config.gpus.items():
        yield from _gpu_problems(name, gpu)
    yield from _collateral_problems(config.collateral)
    yield from _gpu_evidence_problems(config.gpu_evidence)
    if (origin := config.audit.origin) is not None:
        yield from _raised(lambda: check_name(origin), "audit.origin: ")
    yield from _audit_problems(config)
    yield from _proxies_problems(config.proxy)
    yield from _admin_problems(config)


def _audit_problems(config: ServerConfig) -> Iterator[str]:
    audit = config.audit
    if audit.required and audit.file is None and not audit.journal:
        yield "audit.required: goes with audit.file or audit.journal"


def _address(key: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigurationError(f'{key}: say "address:port", for example "0.0.0.0:8443" or "[::]:8443"')
    return host.removeprefix("[").removesuffix("]"), int(port)


def _admin_problems(config: ServerConfig) -> Iterator[str]:
    admin = config.admin
    if config.control is not None and config.control in (admin.unix, config.proxy_unix):
        yield "control: is admin.unix or proxy.unix, too; name another path"
    try:
        address = admin.address
    except ConfigurationError as exc:
        yield str(exc)
        return
    files = (admin.certificate, admin.key, admin.client_ca)
    if admin != AdminOptions() and address is None and admin.unix is None:
        yield "admin: name listen or a unix socket"
    if None in files and any(files):
        yield "admin: certificate, key and client_ca go together"
    if any(files) and address is None:
        yield "admin.certificate: goes with admin.listen"
    if admin.unix == "":
        yield "admin.unix: name a path"
    if admin.unix is not None and admin.unix == config.proxy_unix:
        yield "admin.unix: is proxy.unix, too; the admin listener is never a public one"
    if address is None:
        return
    try:
        is_loopback = address[0] == "localhost" or ip_address(address[0]).is_loopback
    except ValueError:
        yield f'admin.listen: {address[0]!r} is not an IP address; say for example "127.0.0.1:9464"'
        return
    if not is_loopback and None in files:
        yield (
            f"admin.listen: {address[0]} is not loopback: name certificate, key and client_ca, so that only clients"
            " with a certificate are served, or listen on 127.0.0.1"
        )
    if address[1] and admin.listen == config.listen:
        yield "admin.listen: is listen, too; the admin listener is never the public one"


def _raised(read: Callable[[], object], key: str = "") -> Iterator[str]:
    """The text of the `ConfigurationError` that ``read`` raises, after ``key``."""
    try:
        _ = read()
    except ConfigurationError as exc:
        yield f"{key}{exc}"


def _gpu_problems(name: str, gpu: Gpu) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9_]{1,64}", name):
        yield f"gpus: {name!r} is not [a-z0-9_]{{1,64}}"
    try:
        if not gpu.model:
            yield f"gpus.{name}.model: a pattern of the model's name"
        _ = re.compile(gpu.model)
    except re.error as exc:
        yield f"gpus.{name}.model: not a regular expression: {exc}"
    for key, value in attrs.asdict(gpu).items():
        if key != "model" and value < 1:
            yield f"gpus.{name}.{key}: at least 1"
    if gpu.clock_boost_mhz < gpu.clock_base_mhz:
        yield f"gpus.{name}.clock_boost_mhz: less than clock_base_mhz"


def _registration_problems(options: RegistrationOptions) -> Iterator[str]:
    if options.evidence == "callback" and options.hotkey_file is None:
        yield "registration.hotkey_file: hosts give evidence to a hotkey that they know; name its file"
    if options.evidence != "callback":
        yield from _not_default("registration", options, 'evidence = "callback"', "hotkey_file evidence_port")
    if not 1 <= options.evidence_port <= 65535:
        yield "registration.evidence_port: 1 to 65535"
    yield from _raised(lambda: options.parsed_networks)


def _not_default(table: str, options: attrs.AttrsInstance, companion: str, names: str) -> Iterator[str]:
    """The keys among ``names`` that are set although they go with ``companion``, which is not set."""
    keys = attrs.fields_dict(type(options))
    for key in names.split():
        if getattr(options, key) != keys[key].default:
            yield f"{table}.{key}: goes with {companion}"


def _gpu_evidence_problems(options: GpuEvidenceOptions) -> Iterator[str]:
    if not options.rim_services and not options.ocsp_services:
        yield from _not_default("gpu_evidence", options, "rim_services or ocsp_services", "cache ca_file")
    for name in ("rim_services", "ocsp_services"):
        urls: tuple[str, ...] = getattr(options, name)
        for url in urls:
            yield from _raised(partial(check_service, url), f"gpu_evidence.{name}: ")
        if len(set(urls)) != len(urls):
            yield f"gpu_evidence.{name}: a service is given twice"


def _collateral_problems(options: CollateralOptions) -> Iterator[str]:
    if (options.directory is None) == (not options.upstreams):
        yield 'collateral: say { directory = "…" }, or { upstreams = ["https://…", …] }'
    if options.directory is not None:
        names = "cache ca_file update fetches_per_minute"
        yield from _not_default("collateral", options, "collateral.upstreams", names)
    for service in options.upstreams:
        yield from _raised(partial(Upstream.parse, service.url, service.root_ca_crl), "collateral.upstreams: ")
    if len({service.url for service in options.upstreams}) != len(options.upstreams):
        yield "collateral.upstreams: a service is given twice"


def _proxies_problems(proxies: tuple[ProxyOptions, ...]) -> Iterator[str]:
    for name, what in (("name", "name"), ("header", "secret header")):
        given = [getattr(proxy, name).lower() for proxy in proxies]
        if len(set(given)) != len(given):
            yield f"proxy: two proxies have the same {what}; give each its own {name}"
    over_unix = [proxy for proxy in proxies if proxy.unix is not None]
    if len({proxy.unix for proxy in over_unix}) > 1:
        yield "proxy: proxies name different unix sockets; name the same, and tell them apart by header and secret_file"
    if len(over_unix) > 1 and any(proxy.secret_file is None for proxy in over_unix):
        yield "proxy: several proxies share the unix socket, so each needs a secret_file"
    for proxy in proxies:
        if not _PROXY_NAME.fullmatch(proxy.name):
            yield f"proxy: name {proxy.name!r} is not [a-z0-9_-]{{1,32}}"
        else:
            yield from _proxy_problems(proxy)


def _proxy_problems(proxy: ProxyOptions) -> Iterator[str]:
    key = f"proxy.{proxy.name}"
    yield from _raised(lambda: proxy.parsed_networks)
    if proxy.networks and proxy.secret_file is None:
        yield f"{key}.secret_file: a proxy that comes over the network shows a secret; name its file"
    if not proxy.networks and proxy.unix is None:
        yield f"{key}: name networks or a unix socket that the proxy comes from"
    if proxy.unix == "":
        yield f"{key}.unix: name a path"
    if not proxy.serves or len(set(proxy.serves)) != len(proxy.serves):
        yield f'{key}.serves: say ["1.3"] for images before 1.4.0, ["1.4"] for those from 1.4.0 on, or leave it out'
    if proxy.certificate_header.lower() not in CERTIFICATE_HEADERS:
        yield f'{key}.certificate_header: say "X-Client-Cert" or "Client-Cert"'
    header, address_header = proxy.header.lower(), proxy.address_header.lower()
    if not _TOKEN.fullmatch(header) or header in (*CERTIFICATE_HEADERS, address_header):
        yield f'{key}.header: name the header of the proxy\'s secret, for example "X-Cvm-Proxy-Auth"'
    if not _TOKEN.fullmatch(address_header) or address_header in (*CERTIFICATE_HEADERS, *SECRET_HEADERS):
        yield f'{key}.address_header: name the header of the client\'s address, for example "X-Forwarded-For"'


def _networks(key: str, texts: Iterable[str]) -> tuple[Network, ...]:
    try:
        networks = tuple(map(ip_network, texts))
    except ValueError as exc:
        raise ConfigurationError(f"{key}: {exc}") from None
    for network in networks:
        if network.prefixlen == 0:
            raise ConfigurationError(f"{key}: {network} contains every address; name the proxies' or hosts' networks")
    return networks


# --- strict structuring ---


def _hotkeys(value: object, _: object) -> tuple[str, ...] | str:
    if value == "*":
        return "*"
    if isinstance(value, str):
        raise MismatchError("hotkeys_type", 'Input should be an array, ["5F…"], or "*" for every hotkey')
    return list_of(string, file_array)(value)


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


def _store(value: object, _: object) -> StoreOptions:
    """A store is its URL, or a table."""
    return StoreOptions(value) if isinstance(value, str) else _TABLES.structure(value, StoreOptions)


_TABLES: Final = StrictConverter(own_file=True)


def _proxy_entries(value: object, _: object) -> tuple[ProxyOptions, ...]:
    if isinstance(value, dict):
        raise MismatchError("list_type", "Input should be a list with an entry for each proxy; write [[proxy]]")
    return list_of(lambda each: _TABLES.structure(each, ProxyOptions), file_array)(value)


def _schedule(value: object, _: object) -> Schedule:
    try:
        return read_schedule(cast("Mapping[str, object]", value))
    except PolicyError as exc:
        key, _, text = str(exc).partition(": ")
        raise ProblemsError([Problem((key,), "value_error", text)]) from None


_CONVERTER: Final = StrictConverter(
    {
        tuple[str, ...] | Literal["*"]: _hotkeys,
        CollateralService: _service,
        StoreOptions: _store,
        tuple[ProxyOptions, ...]: _proxy_entries,
        Schedule: _schedule,
    },
    own_file=True,
)
