"""Set-up of a key server: reads and checks all files that a configuration names.

Rules kept here:

* all problems are reported together, one a line, with the key and the file;
* relative paths begin at the configuration file's directory, or at the working directory if it has no file;
* nothing is made or changed: a check leaves no trace.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from socket import gethostname
from typing import Literal

from attrs import evolve, field, frozen
from cryptography.x509 import load_pem_x509_certificates

from chutes_proto._converter import nearest
from chutes_proto.auth.hotkey import Hotkey, HotkeyError, check_installed
from chutes_proto.collateral.cache import CachePolicy
from chutes_proto.collateral.gpus import GpuService, RimCache, StatusCache
from chutes_proto.collateral.pcs import Upstream
from chutes_proto.collateral.platforms import PlatformCache
from chutes_proto.errors import CollateralUnavailable, ConfigurationError, LocalProtocolError
from chutes_proto.gpu import NVIDIA, GpuPolicy, GpuPolicyError, GpuRoots, parse_gpu_policy
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory, read_gpu_roots
from chutes_proto.io.collateral.gpu_services import GpuServices
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import Files, absolute
from chutes_proto.io.hotkey_file import read_hotkey
from chutes_proto.io.http.bounded import BoundedContext
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.io.server.store_setup import Problems, check_configuration, read_root, read_vault, store_place
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.marks import checkpoint_path
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._measurements import Schedule, check_distinct, own_defaults
from chutes_proto.quote._policy import Policy, TcbPolicy
from chutes_proto.quote._policy_set import PolicySet, parse_policy_set
from chutes_proto.quote._published import ProfileFile, parse_profile_file
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.secret import Secret
from chutes_proto.server._alike import Alike, shared_settings
from chutes_proto.server._config import GpuEvidenceOptions, ProxyOptions, RegistrationOptions, ServerConfig
from chutes_proto.server._gpu_evidence import GpuAppraisal
from chutes_proto.server._gpus import GPUS
from chutes_proto.server._grounds import (
    Documents,
    names_of,
    policy_document,
    reference_values_document,
    scheduled,
)
from chutes_proto.server._nonces import NonceMint
from chutes_proto.server._profiles import EXTRA_KEYS, ServedProfile, check_signing_keys, option_defaults, serve_profile
from chutes_proto.server._proxy import TrustedProxies, TrustedProxy
from chutes_proto.server._service import Callback, Service
from chutes_proto.transport.h1 import Limits
from chutes_proto.transport.tls import ServerContext, server_context
from chutes_proto.units.fleet import parse_version
from chutes_proto.wire.origin import check_socket_path


@frozen
class ServerSetup:
    """A key server that is ready to start."""

    config: ServerConfig
    service: Service
    collateral: CollateralDirectory | UpstreamCollateral
    tls: ServerContext
    admin_tls: ServerContext | None
    store: StorePlace
    base: Path
    alike: Alike
    files: Files = field(repr=False)
    not_served: tuple[str, ...] = ()
    gpus: GpuCollateralDirectory | GpuServices | None = None

    @property
    def limits(self) -> Limits:
        """The limits of each connection."""
        given = self.config.limits
        return Limits(head_bytes=given.head_bytes, body_bytes=given.body_bytes, request_seconds=given.request_seconds)

    @property
    def control_socket(self) -> Path | None:
        """The Unix socket at which `chutes-proto reload` asks."""
        return None if self.config.control is None else self.base / self.config.control

    @property
    def admin_socket(self) -> Path | None:
        """The Unix socket of the admin listener."""
        return None if self.config.admin.unix is None else self.base / self.config.admin.unix

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings for the operator, at a check and at every start."""
        found: list[str] = []
        try:
            check_installed()
        except LocalProtocolError as exc:
            found.append(f"signed requests (operations 5 to 12, and boots that prove their hotkey) get 503: {exc}")
        registration = self.config.registration
        if registration.unsafe_private_networks:
            networks = ", ".join(registration.unsafe_private_networks)
            found.append(f"registration.unsafe_private_networks: hosts in {networks} pass for public ones")
        if registration.evidence == "callback" and self.gpus is None:
            found.append('registration.evidence = "callback": what GPUs say of themselves is fetched and NOT verified')
        if any(policy.attributes.unsafe_allow_debug for policy in self.service.policies.policies):
            found.append(
                "policy: unsafe_allow_debug: hosts can read the memory of VMs that are granted, and their keys"
            )
        found += [f"measurements: not served: {what}" for what in self.not_served]
        return tuple(found)

    @property
    def judged_by(self) -> dict[str, str]:
        """The SHA-256 of what evidence is judged by, by name, for the audit rows of starts and reloads."""
        found = {**self.service.documents.digests, "root": self.service.root.digest.hex()}
        if (policy := self.config.gpu_evidence.policy) is not None:
            found["gpu_policy"] = sha256(self.files.content[absolute(self.base / policy)]).hexdigest()
        return found

    @property
    def checkpoint_file(self) -> Path | None:
        """The file of the audit log's newest signed checkpoint, beside the mark."""
        return checkpoint_path(self.store.mark_file)

    @property
    def proxy_socket(self) -> Path | None:
        """The Unix socket to listen on for proxies."""
        return None if self.config.proxy_unix is None else self.base / self.config.proxy_unix


def load_config(path: str | PathLike[str], files: Files) -> ServerConfig:
    """Read a configuration through ``files``, as `ServerConfig.load` does. Raises the same errors."""
    whole = absolute(path)
    data = files.read(whole)
    try:
        return evolve(ServerConfig.from_toml(data), path=whole)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{whole}: {exc}") from None


def make_setup(config: ServerConfig, files: Files | None = None) -> ServerSetup:
    """Read all files that ``config`` names, through ``files``.

    Raises `ConfigurationError` with all problems, one a line, also for a file that changes meanwhile.
    """
    files = Files() if files is None else files
    problems = Problems()
    base = Path.cwd() if config.path is None else Path(config.path).parent
    _ = problems.attempt("store", lambda: check_configuration(config))
    tls = problems.attempt("tls", lambda: _tls(config.tls.certificate, config.tls.key, base, files))
    admin_tls = problems.attempt("admin", lambda: _admin_tls(config, base, files))
    root = problems.attempt("roots", lambda: read_root(config, base, files))
    vault = read_vault(config, base, files, problems)
    profiles, not_served = read_profiles(config, base, files, problems)
    _ = problems.attempt("measurements", lambda: check_distinct(profile.measurements for profile in profiles))
    policies = problems.attempt("policy", lambda: _policies(config, base, files, profiles))
    _ = problems.attempt("minimum_version", lambda: _check_versions(config, profiles))
    signing_keys = problems.attempt("signing_keys_file", lambda: _signing_keys(config, base, files))
    _ = problems.attempt("blacklist", lambda: _hotkeys(tuple(config.blacklist)))
    hotkeys: frozenset[str] | Literal["*"] | None = problems.attempt("hotkeys", lambda: _hotkeys(config.hotkeys))
    proxies = [
        problems.attempt(f"proxy.{options.name}.secret_file", partial(_proxy, options, base, files))
        for options in config.proxy
    ]
    if config.proxy_unix is not None:
        socket_path = str(base / config.proxy_unix)
        _ = problems.attempt("proxy.unix", lambda: check_socket_path(socket_path))
    if config.control is not None:
        control_path = f"{base / config.control}.{os.getpid()}"
        _ = problems.attempt("control", lambda: check_socket_path(control_path))
    if config.admin.unix is not None:
        admin_path = str(base / config.admin.unix)
        _ = problems.attempt("admin.unix", lambda: check_socket_path(admin_path))
    callback = problems.attempt("registration.hotkey_file", lambda: _callback(config.registration, base, files))
    collateral_key = "collateral.ca_file" if config.collateral.directory is None else "collateral.directory"
    collateral = None
    if root is not None and policies is not None:
        grace = policies.collateral_grace
        collateral = problems.attempt(collateral_key, lambda: _collateral(config, base, files, root, grace))
    gpu_roots = problems.attempt("gpu_evidence.roots", lambda: _gpu_roots(config.gpu_evidence, base, files))
    gpu_policy = problems.attempt("gpu_evidence.policy", lambda: _gpu_policy(config.gpu_evidence, base, files))
    if gpu_roots is None or gpu_policy is None:
        raise problems.error()
    gpu_files = problems.attempt("gpu_evidence.directory", lambda: _gpu_files(config.gpu_evidence, base, gpu_roots))
    gpus = problems.attempt(
        "gpu_evidence.ca_file", lambda: _gpu_source(config.gpu_evidence, base, files, gpu_roots, gpu_policy, gpu_files)
    )
    if tls is None or root is None or vault is None or policies is None or hotkeys is None or collateral is None:
        raise problems.error()
    if problems.found:
        raise problems.error()
    if demanding := [one for one in profiles if one.gpu_evidence == "require"]:
        _check_gpu_sources(config.gpu_evidence, gpu_policy, demanding[0].measurements.name)
    service = Service(
        vault=vault,
        mint=NonceMint.of(vault, bind_address=config.nonce.bind_address),
        root=root,
        trust=trust(root, config.roots),
        policies=policies,
        documents=read_documents(config, base, files),
        profiles={profile.measurements.identity: profile for profile in profiles},
        hotkeys=hotkeys,
        volumes=config.volumes,
        netuid=config.netuid,
        blacklist=config.blacklist,
        minimum_version=config.minimum_version,
        signing_keys=signing_keys,
        maintenance=config.maintenance.window,
        exchange_downgrade=config.exchange_downgrade,
        rotate_after=config.rotate_after_hours * 3600,
        signatures=config.signatures,
        registration_evidence=config.registration.evidence,
        fresh_seconds=config.runtime.fresh_seconds,
        proxies=TrustedProxies(tuple(filter(None, proxies))),
        limits=config.limits,
        gpus=GPUS | dict(config.gpus),
        callback=callback,
        gpu_appraisal=None if gpus is None else GpuAppraisal(gpu_policy, gpu_roots),
        unsafe_networks=config.registration.parsed_networks,
    )
    files.check_settled()
    place = evolve(store_place(config, base, with_mark=True), vault=vault)
    alike = Alike(f"{gethostname()}:{config.path or config.listen}", shared_settings(config, service))
    return ServerSetup(config, service, collateral, tls, admin_tls, place, base, alike, files, not_served, gpus)


def trust(root: TrustedRoot, name: str) -> str:
    """Return the name of the trusted root for the log, which has it at every start and with every grant."""
    if root == INTEL_ROOT:
        return "Intel SGX Root CA"
    return f"NOT Intel's root but {name}, SHA-256 {root.digest.hex()}"


# --- the parts ---


def _tls(certificate: str, key_file: str, base: Path, files: Files, client_ca: str | None = None) -> ServerContext:
    chain = files.read(base / certificate)
    key = Secret(files.read_private(base / key_file, group_may=True))
    authorities = None if client_ca is None else files.read(base / client_ca)
    try:
        made = server_context(chain, key, client_ca_pem=authorities)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{base / certificate}, {base / key_file}: {exc}") from None
    certificates, now = load_pem_x509_certificates(chain), datetime.now(UTC)
    begin = max(one.not_valid_before_utc for one in certificates)
    end = min(one.not_valid_after_utc for one in certificates)
    if end <= now:  # no VM would connect
        raise ConfigurationError(f"{base / certificate}: expired at {end:%Y-%m-%dT%H:%M:%SZ}; replace it")
    if now < begin:
        when = f"is not valid before {begin:%Y-%m-%dT%H:%M:%SZ}; wait until then, or set the clock right"
        raise ConfigurationError(f"{base / certificate}: {when}")
    return made


def _admin_tls(config: ServerConfig, base: Path, files: Files) -> ServerContext | None:
    admin = config.admin
    if (admin.listen, admin.unix) != (None, None) and find_spec("prometheus_client") is None:
        raise ConfigurationError("the admin listener needs prometheus-client; run pip install 'chutes-proto[metrics]'")
    if admin.certificate is None or admin.key is None or admin.client_ca is None:
        return None
    return _tls(admin.certificate, admin.key, base, files, admin.client_ca)


def _proxy(options: ProxyOptions, base: Path, files: Files) -> TrustedProxy:
    secrets: list[bytes] = []
    if options.secret_file is not None:
        path = base / options.secret_file
        secrets = [line.strip() for line in files.read_private(path, group_may=True).splitlines() if line.strip()]
        if not 1 <= len(secrets) <= 2 or not all(re.fullmatch(rb"[!-~]+", secret) for secret in secrets):
            raise ConfigurationError(f"{path}: not one or two secrets, one a line, in printable ASCII without spaces")
    return TrustedProxy(
        options.name,
        networks=options.parsed_networks,
        unix=options.unix is not None,
        secrets=tuple(map(Secret, secrets)),
        header=options.header.lower(),
        serves=frozenset(options.serves),
        certificate_header=options.certificate_header.lower(),
        address_header=options.address_header.lower(),
    )


def _callback(options: RegistrationOptions, base: Path, files: Files) -> Callback | None:
    if options.hotkey_file is None:
        return None
    try:
        pair = read_hotkey(base / options.hotkey_file, files)
    except LocalProtocolError as exc:  # the file, or sr25519 is not installed
        raise ConfigurationError(str(exc)) from None
    return Callback(pair.hotkey, pair.sign, options.evidence_port)


def _policies(config: ServerConfig, base: Path, files: Files, profiles: list[ServedProfile]) -> PolicySet:
    """The policies, each of which is for a profile or hotkey that is served. Raises `ConfigurationError`."""
    if config.policy is None:
        return PolicySet(default=Policy(tcb=TcbPolicy(collateral_grace=config.collateral.grace_seconds)))
    path = base / config.policy
    data = files.read(path)
    try:
        policies = parse_policy_set(data)
        _ = policies.bind(())
    except PolicyError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None
    known = {name for profile in profiles for name in names_of(profile.measurements)[1:]}
    for name in policies.profile_names:
        if name not in known:
            raise ConfigurationError(f"{path}: per_profile.{name!r}: {_not_served(name, known)}")
    for hotkey in policies.hotkeys:
        try:
            _ = _hotkeys((hotkey,))
        except ConfigurationError as exc:
            raise ConfigurationError(f"{path}: per_hotkey: {exc}") from None
        if config.hotkeys != "*" and hotkey not in config.hotkeys:
            raise ConfigurationError(f"{path}: per_hotkey.{hotkey!r}: is not among hotkeys; add it there, or remove it")
    return policies


def read_documents(config: ServerConfig, base: Path, files: Files) -> Documents:
    """Read the files of policy and profiles, as audit rows name them. Raises `FileUnavailable`."""
    policy = None if config.policy is None else files.read(base / config.policy)
    measurements = [files.read(base / name) for name in config.measurements]
    return Documents(
        policy_document(policy, config.collateral.grace_seconds),
        reference_values_document(measurements, config.profile_defaults, config.schedule),
    )


def _collateral(
    config: ServerConfig, base: Path, files: Files, root: TrustedRoot, grace: int
) -> CollateralDirectory | UpstreamCollateral:
    """The source of collateral, which uses what has expired for ``grace`` seconds."""
    options = config.collateral
    if options.directory is not None:
        path = base / options.directory
        if not path.is_dir():
            raise ConfigurationError(f"{path} is not a directory; make it, or name another")
        return CollateralDirectory(path, root, grace=grace)
    cache = PlatformCache(
        [Upstream.parse(service.url, service.root_ca_crl) for service in options.upstreams],
        root=root,
        policy=CachePolicy(grace=grace, fetches_per_minute=options.fetches_per_minute),
        update=options.update,
        seed=os.urandom(16),
    )
    ca_file = None if options.ca_file is None else base / options.ca_file
    kept = None if options.cache is None else base / options.cache
    return UpstreamCollateral(cache, context_trusting(ca_file, read=files.read, kind=BoundedContext), kept)


def _signing_keys(config: ServerConfig, base: Path, files: Files) -> bytes | None:
    if config.signing_keys_file is None:
        return None
    path = base / config.signing_keys_file
    try:
        return check_signing_keys(files.read(path))
    except ValueError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None


def _check_versions(config: ServerConfig, profiles: list[ServedProfile]) -> None:
    if config.minimum_version is None:
        return
    try:
        for version in (config.minimum_version, *(profile.measurements.version for profile in profiles)):
            _ = parse_version(version)
    except ValueError as exc:
        raise ConfigurationError(f"{exc}, so it cannot be compared") from None


def _gpu_files(options: GpuEvidenceOptions, base: Path, roots: GpuRoots) -> GpuCollateralDirectory | None:
    if options.directory is None:
        return None
    files = GpuCollateralDirectory(base / options.directory, roots)
    try:
        _ = files.fetch()
    except CollateralUnavailable as exc:
        raise ConfigurationError(str(exc)) from None
    return files


def _gpu_source(
    options: GpuEvidenceOptions,
    base: Path,
    files: Files,
    roots: GpuRoots,
    policy: GpuPolicy,
    directory: GpuCollateralDirectory | None,
) -> GpuCollateralDirectory | GpuServices | None:
    if not options.rim_services and not options.ocsp_services:
        return directory
    seed = os.urandom(16)
    rims = [GpuService.parse(url) for url in options.rim_services if policy.measurements == "rims"]
    status = [GpuService.parse(url) for url in options.ocsp_services if policy.revocation != "off"]
    return GpuServices(
        rims=RimCache(rims, roots=roots, seed=seed) if rims else None,
        status=StatusCache(status, grace=policy.revocation_grace, seed=seed) if status else None,
        context=context_trusting(
            None if options.ca_file is None else base / options.ca_file, read=files.read, kind=BoundedContext
        ),
        directory=None if options.cache is None else base / options.cache,
        beside=directory,
    )


def _check_gpu_sources(options: GpuEvidenceOptions, policy: GpuPolicy, profile: str) -> None:
    """Check that evidence can be accepted at all, because the profile requires it. Raises `ConfigurationError`."""
    if options.directory is not None:
        return
    missing = "" if options.rim_services or options.ocsp_services else "services"
    if not options.rim_services and policy.measurements == "rims" and not policy.pinned:
        missing = missing or "rim_services"
    if not options.ocsp_services and policy.revocation != "off":
        missing = missing or "ocsp_services"
    if missing:
        raise ConfigurationError(
            f'profile {profile!r}: gpu_evidence = "require" needs gpu_evidence.directory, or {missing}'
        )


def _gpu_policy(options: GpuEvidenceOptions, base: Path, files: Files) -> GpuPolicy:
    if options.policy is None:
        return GpuPolicy()
    path = base / options.policy
    try:
        return parse_gpu_policy(files.read(path))
    except GpuPolicyError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None


def _gpu_roots(options: GpuEvidenceOptions, base: Path, files: Files) -> GpuRoots:
    return NVIDIA if options.roots is None else read_gpu_roots(base / options.roots, files.read)


def _hotkeys(addresses: tuple[str, ...] | Literal["*"]) -> frozenset[str] | Literal["*"]:
    if isinstance(addresses, str):
        return "*"
    for address in addresses:
        try:
            _ = Hotkey.parse(address)
        except HotkeyError as exc:
            raise ConfigurationError(f"{address!r} is not a hotkey: {exc}") from None
    return frozenset(addresses)


def read_profiles(
    config: ServerConfig, base: Path, files: Files, problems: Problems
) -> tuple[list[ServedProfile], tuple[str, ...]]:
    """Read the profiles to serve; returns them, and in words what in their files is not served."""

    def read(name: str) -> bytes:
        return files.read_private(base / name)

    served: list[ServedProfile] = []
    not_served: list[str] = []
    where = config.path or "configuration"  # the files of measurements lack a default that is wrong
    defaults = problems.attempt(where, partial(own_defaults, config.profile_defaults, EXTRA_KEYS))
    served_defaults = problems.attempt(where, partial(option_defaults, config.profile_defaults))
    if defaults is None or served_defaults is None:
        return [], ()
    for name in config.measurements:
        data = problems.attempt("measurements", partial(files.read, base / name))
        if data is None:
            continue
        key = f"measurements: {base / name}"
        parse = partial(parse_profile_file, data, read_yaml, extra_keys=EXTRA_KEYS, defaults=defaults)
        parsed = problems.attempt(key, parse) or ProfileFile(())
        not_served += [f"{base / name}: {what}" for what in parsed.not_served]
        for profile, extras in parsed.profiles:
            one = problems.attempt(key, partial(serve_profile, profile, extras, served_defaults, read))
            if one is not None and one.rc and not one.authorized_hotkeys:
                not_served.append(f"{base / name}: {profile}: rc without authorized_hotkeys")
            elif one is not None:
                served.append(one)
    scheduled = problems.attempt("schedule", lambda: _scheduled(config.schedule, served))
    return scheduled or served, tuple(not_served)


def _scheduled(schedules: Mapping[str, Schedule], served: list[ServedProfile]) -> list[ServedProfile]:
    """The profiles with the schedules that the configuration has for them. Raises `ConfigurationError`."""
    named = {one.measurements.identity: names_of(one.measurements) for one in served}
    known = {name for names in named.values() for name in names}
    for name in schedules:
        if name not in known:
            raise ConfigurationError(f"{name!r}: {_not_served(name, known)}")
    return scheduled(served, schedules)


def _not_served(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"no such profile is served; {f'did you mean {near!r}?' if near else 'correct it, or remove it'}"
