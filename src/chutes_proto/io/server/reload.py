"""A running server reads its files again: policy, reference values, hotkeys, GPU kinds, collateral, certificates, KEKs.

Rules kept here:

* all or nothing: the files are read once, into bytes, and checked as at a start; only then does one assignment replace
  the set-up. A request keeps the service of the moment at which it began;
* what cannot be used changes nothing: the last good set-up stays, and the caller hears why;
* settings of sockets, limits, the store and the root of trust stay as they are until a restart, and are named;
* the audit row is written before anything changes, with the digests of both set-ups and who asked.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import evolve, frozen
from cryptography import x509

from chutes_proto.errors import CollateralUnavailable, ConfigurationError, FileUnavailable, QuoteError, StoreError
from chutes_proto.io.collateral.gpu_directory import gpu_root_files
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import Files, absolute
from chutes_proto.io.server.checking import check_ends, check_policy
from chutes_proto.io.server.scrub import Scrubber
from chutes_proto.io.server.setup import ServerSetup, load_config, make_setup
from chutes_proto.io.server.store_setup import check_keys
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.log import Level, Record, Value
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.server._app import App
from chutes_proto.units.operator import RecordReload, RecordStart

_FIXED: Final = ("listen", "store", "control", "roots", "limits", "admin", "audit", "gpu_evidence")
"""Settings that a server keeps until it is started again."""


class Running:
    """The set-up by which a server runs; a reload replaces it whole, in every thread's view at once.

    It is a source of collateral: that of its set-up.
    """

    def __init__(self, setup: ServerSetup) -> None:
        self.setup: ServerSetup = setup
        self.scrubber: Scrubber | None = None
        """The scrub of the store, in a process that has one."""
        self._apps: list[App] = []

    def follow(self, app: App) -> App:
        """Give ``app`` the service of each later set-up."""
        self._apps.append(app)
        return app

    def replace(self, setup: ServerSetup) -> None:
        """Run by ``setup`` from now on."""
        alike = self.setup.alike
        alike.settings = setup.alike.settings  # for the other servers of the store
        self.setup = evolve(setup, alike=alike)
        for app in self._apps:
            app.service = setup.service

    def available(self, identity: PckIdentity, now: int) -> VerifiedCollateral | None:
        """See `CollateralDirectory.available`."""
        source = self.setup.collateral
        return None if isinstance(source, UpstreamCollateral) else source.available(identity, now)

    def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """See `CollateralDirectory.fetch`."""
        source = self.setup.collateral
        if isinstance(source, UpstreamCollateral):
            raise CollateralUnavailable("the collateral of services is fetched on an event loop")
        return source.fetch(identity, now)


# --- what a set-up is made of ---


def parts_of(setup: ServerSetup) -> dict[str, str]:
    """The digest (SHA-256) of each part that a reload can replace.

    A KEK and a hotkey are named by what may be shown of them; of a private key the digest may be.
    """
    config, content, callback = setup.config, setup.files.content, setup.service.callback

    def digest(*names: str | None) -> str:
        found = [content.get(str((setup.base / name).absolute()), b"") for name in names if name is not None]
        return _digest([hashlib.sha256(data).hexdigest() for data in found])

    settings = {name: value for name, value in attrs.asdict(config).items() if name not in (*_FIXED, "path")}
    collateral = settings.pop("collateral")
    apart = ("policy", "measurements", "profile_defaults", "schedule", "hotkeys", "blacklist", "gpus", "tls")
    named = {name: settings.pop(name) for name in (*apart, "kek_file", "kek_previous_file")}
    return {
        "policy": digest(config.policy) if config.policy else "none",
        "reference values": _digest([digest(*config.measurements), named["profile_defaults"], named["schedule"]]),
        "hotkeys": _digest([named["hotkeys"], named["blacklist"]]),
        "GPU kinds": _digest(named["gpus"]),
        "collateral": _digest(collateral),
        "certificate": digest(config.tls.certificate, config.tls.key),
        "admin certificate": digest(config.admin.certificate, config.admin.key, config.admin.client_ca),
        "registration hotkey": "none" if callback is None else callback.hotkey.address,
        "KEK": _digest([key.kek_id for key in setup.service.vault.live]),
        "settings": _digest([settings, digest(config.signing_keys_file)]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(setup: ServerSetup) -> str:
    """The digest of all that a reload can replace, the same in every process that runs by the same files."""
    return _digest(parts_of(setup))


def changes_between(old: ServerSetup, new: ServerSetup) -> tuple[str, ...]:
    """The changes, in words: one for each part that differs, in detail for profiles and hotkeys."""
    before, after = parts_of(old), parts_of(new)
    changed = [part for part in before if before[part] != after[part]]
    # Secrets have no digest that may be shown.
    if "reference values" not in changed and old.service.profiles != new.service.profiles:
        changed.append("reference values")
    told = [_change(part, old, new) for part in changed]
    if "settings" not in changed and old.service.proxies != new.service.proxies:
        told.append("proxy secrets")
    return tuple(told)


def _change(part: str, old: ServerSetup, new: ServerSetup) -> str:
    if part == "reference values":
        was = {str(one.measurements): one for one in old.service.profiles.values()}
        now = {str(one.measurements): one for one in new.service.profiles.values()}
        return f"{part}: {_difference(was, now) or 'no profile differs'}"
    if part == "hotkeys" and old.service.hotkeys != "*" and new.service.hotkeys != "*":
        known, wanted = dict.fromkeys(old.service.hotkeys), dict.fromkeys(new.service.hotkeys)
        return f"{part}: {_difference(known, wanted) or 'the order, or the blacklist'}"
    if part == "certificate":
        (was_for, was_under), (now_for, now_under) = map(_certified, (old, new))
        told = [_difference(was_for, now_for)] if was_for != now_for else []
        if was_under != now_under:  # VMs whose image trusts the CA of before alone do not connect
            told.append(f"issued under {now_under}, and the one before under {was_under}")
        return ": ".join((part, *filter(None, ["; ".join(told)])))
    return part


def _certified(setup: ServerSetup) -> tuple[dict[str, None], str]:
    """The names that the server's certificate is for, and the issuer that its chain leads to."""
    chain = x509.load_pem_x509_certificates(setup.files.read(setup.base / setup.config.tls.certificate))
    try:
        names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        names = x509.SubjectAlternativeName([])
    return {str(name.value): None for name in names}, chain[-1].issuer.rfc4514_string()


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    words = (
        ("added", sorted(new.keys() - old.keys())),
        ("removed", sorted(old.keys() - new.keys())),
        ("changed", sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    )
    told = [f"{_some(names)} {word}" for word, names in words if names]
    return ", ".join(told)


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{len(names)}"


# --- a reload ---


@frozen
class Prepared:
    """A set-up that was read and checked, and can replace the present one."""

    setup: ServerSetup
    changes: tuple[str, ...]
    needs_restart: tuple[str, ...]
    before: str
    after: str
    documents: str
    """A JSON object with the digests of what evidence is judged by, before and after."""


def prepare(running: Running, store: DurableStore | None, files: Files) -> Prepared:
    """Read and check everything through ``files``, and change nothing. Raises `ConfigurationError`, `StoreError`.

    With a ``store``, each of its keys must be opened by the new KEKs.
    """
    old = running.setup
    config = old.config
    if config.path is None:
        raise ConfigurationError("the server has no configuration file to read again")
    given = load_config(config.path, files)
    kept = {name: getattr(config, name) for name in _FIXED}
    if isinstance(old.collateral, UpstreamCollateral) or given.collateral.directory is None:
        kept["collateral"] = config.collateral
    wanted = evolve(given, **kept)
    kept_files = _keep_files(old, files)
    needs_restart = tuple(name for name in kept if name in kept_files or getattr(given, name) != kept[name])
    if given.proxy_unix != config.proxy_unix:
        wanted = evolve(wanted, proxy=config.proxy)
        needs_restart += ("proxy",)
    new = make_setup(wanted, files)
    if store is not None and [key.kek_id for key in new.service.vault.live] != _live(old):
        with store.custody.holding(new.service.vault.unwrap):
            _ = check_keys(store, new.service.vault)
    if isinstance(old.collateral, UpstreamCollateral):
        if new.service.policies.collateral_grace != old.service.policies.collateral_grace:
            needs_restart += ("collateral_grace",)
        new = evolve(new, collateral=old.collateral)
    service = evolve(new.service.in_place_of(old.service), gpu_appraisal=old.service.gpu_appraisal)
    new = evolve(new, service=service, store=evolve(old.store, vault=service.vault), gpus=old.gpus)
    digests = {"before": old.judged_by, "after": new.judged_by}
    documents = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    return Prepared(new, changes_between(old, new), needs_restart, digest_of(old), digest_of(new), documents)


def _keep_files(old: ServerSetup, files: Files) -> tuple[str, ...]:
    """Put the files that go with `_FIXED` into ``files`` as they were; returns the settings of those that differ."""
    config, gpus = old.config, old.config.gpu_evidence
    fixed: dict[str, tuple[str | Path | None, ...]] = {
        "roots": (config.roots,),
        "gpu_evidence": (gpus.policy, gpus.ca_file, *(() if gpus.roots is None else gpu_root_files(gpus.roots))),
        "collateral": (config.collateral.ca_file,),
    }
    differing: dict[str, None] = {}
    for setting, names in fixed.items():
        for name in names:
            path = None if name is None else absolute(old.base / name)
            if path is None or (held := old.files.content.get(path)) is None:
                continue
            try:
                is_same = files.read(path) == held
            except FileUnavailable:
                is_same = False
            if not is_same:
                differing[setting] = None
            files.content[path] = held  # for new workers, too
    return tuple(differing)


def _live(setup: ServerSetup) -> list[str]:
    return [key.kek_id for key in setup.service.vault.live]


class Reloader:
    """Reloads a server of one process; may be asked from any thread, one reload at a time."""

    def __init__(self, running: Running, store: DurableStore, log: Callable[[Record], None]) -> None:
        self._running = running
        self._store = store
        self._log = log
        self._one_at_a_time = threading.Lock()

    def reload(self, caller: str) -> dict[str, object]:
        """Read the files again for ``caller``, and return the outcome as `chutes-proto reload` prints it."""
        with self._one_at_a_time:
            return reported(caller, self._log, lambda: self._reload(caller))

    def _reload(self, caller: str) -> Prepared:
        prepared = prepare(self._running, self._store, Files(plain=True))
        if prepared.changes:
            record(self._store, caller, prepared)
        self._running.replace(prepared.setup)
        return prepared


def record_start(store: DurableStore, setup: ServerSetup) -> None:
    """Write the audit row of a start that judges by other files than before. Raises `StoreError`."""
    _ = store.transact(RecordStart(int(time.time()), setup.alike.name, setup.judged_by))


def record(store: DurableStore, caller: str, prepared: Prepared) -> None:
    """Write the audit row of a reload that is about to happen. Raises `StoreError`."""
    changes = "; ".join(prepared.changes)
    reason = f"{caller}: {prepared.before} to {prepared.after}: {changes}"
    # Where `keys rewrap` came before this reload, the key of this row's MAC is under the new KEK.
    with store.custody.holding(prepared.setup.service.vault.unwrap):
        store.transact(RecordReload(int(time.time()), reason, prepared.documents, prepared.setup.alike.name))


def why_refused(exc: Exception) -> str:
    """The reason for the operator; of a defect its kind alone, because its text could repeat a secret."""
    if isinstance(exc, ConfigurationError | StoreError | QuoteError | OSError):
        return str(exc)
    return f"a defect, {type(exc).__name__}; restart the server to use the files"


def reported(caller: str, log: Callable[[Record], None], attempt: Callable[[], Prepared]) -> dict[str, object]:
    """The outcome of a reload, which is logged, too; an error of it changes nothing."""
    try:
        done = attempt()
    except Exception as exc:  # noqa: BLE001 - a defect of ours must not keep operators from the next reload
        error = why_refused(exc)
        log(Record(Level.ERROR, "reload_refused", {"caller": caller, "error": error}))
        return {"ok": False, "error": error}
    fields: dict[str, Value] = {"caller": caller, "changes": list(done.changes), "before": done.before}
    fields |= {"after": done.after, "needs_restart": list(done.needs_restart)}
    fields["configuration"] = done.setup.config.path
    found = (*check_policy(done.setup), *check_ends(done.setup, kept=False))
    fields["warnings"] = [str(each) for each in found if each.state != "ok"]
    log(Record(Level.INFO, "reloaded", fields))
    return {"ok": True, **{name: value for name, value in fields.items() if name != "caller"}}
