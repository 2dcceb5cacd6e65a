"""Everything that a key server's configuration lacks, for `serve --check` and `doctor`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cryptography import x509

from chutes_proto.errors import CollateralUnavailable, ConfigurationError, StoreError
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import read_file
from chutes_proto.io.finding import Finding, State
from chutes_proto.io.server.setup import ServerSetup
from chutes_proto.io.server.store_setup import check_store
from chutes_proto.quote import VerifiedCollateral
from chutes_proto.quote._measurements import Profile
from chutes_proto.quote._terms import rfc3339

_DAY: Final = 86_400
_EARLY: Final = {"certificate": 30 * _DAY, "collateral": 7 * _DAY, "profile": 30 * _DAY}
"""How long before its end each is worth a note."""


def check_setup(setup: ServerSetup) -> Iterator[Finding]:
    """Everything that `serve --check` reports."""
    yield Finding("ok", "root", str(setup.service.trust))
    for profile in setup.service.policy.profiles:
        yield Finding("ok", "measurements", f"{profile.name}, version {profile.version}")
    yield Finding("ok", "volumes", ", ".join(setup.service.volumes))
    hotkeys = setup.service.hotkeys
    yield Finding("ok", "hotkeys", "any hotkey" if hotkeys == "*" else str(len(hotkeys)))
    if isinstance(setup.collateral, UpstreamCollateral):
        for upstream in setup.collateral.cache.upstreams:
            yield Finding("ok", "collateral", f"from {upstream.url} (not asked now)")
    else:
        path = setup.collateral.path
        fetch = f"chutes-proto collateral fetch --quote QUOTE --upstream URL --out {path}"
        try:
            items = setup.collateral.items(int(time.time()))
            for item in items:
                is_bad = isinstance(item.content, str)
                yield Finding("problem" if is_bad else "ok", "collateral", str(item), fetch if is_bad else "")
            if not items:
                yield Finding("problem", "collateral.directory", f"{path} holds no *.json", fetch)
        except CollateralUnavailable as exc:
            yield Finding.of_problem(str(exc))
    try:
        yield from check_store(setup.store, setup.service.vault, setup.alike)
    except (ConfigurationError, StoreError) as exc:
        yield Finding.of_problem(str(exc))
    for warning in setup.warnings:
        yield Finding("note", "warning", warning)


def check_ends(setup: ServerSetup) -> Iterator[Finding]:
    """When the certificate, each file of collateral and each profile end."""
    yield from _ends_of_profiles([one.measurements for one in setup.service.profiles.values()], int(time.time()))
    path = Path(setup.base, setup.config.tls.certificate)
    for certificate in x509.load_pem_x509_certificates(read_file(path)):
        remedy = f"replace {path}, then run chutes-proto reload, or send SIGHUP"
        yield _end("certificate", str(path), int(certificate.not_valid_after_utc.timestamp()), remedy)
    if not isinstance(setup.collateral, CollateralDirectory):
        return
    for item in setup.collateral.items(int(time.time())):
        if isinstance(content := item.content, VerifiedCollateral):
            fetch = f"chutes-proto collateral fetch --fmspc {content.fmspc.hex()} --ca {content.ca} --tee {content.tee}"
            yield _end(
                "collateral", item.name, content.window[1], f"{fetch} --upstream URL --out {setup.collateral.path}"
            )


def _ends_of_profiles(profiles: list[Profile], now: int) -> Iterator[Finding]:
    if profiles and not any(profile.schedule.accepts(now) for profile in profiles):
        yield Finding("problem", "profiles", "none counts now, so no VM is granted; change their schedule")
    for profile in profiles:
        end = profile.schedule.end
        if end is not None and end - now < _EARLY["profile"]:
            verb = "ended" if end <= now else "ends"
            remedy = "chutes-proto profiles vms --config FILE"
            yield Finding("note", "profile", f"{profile} {verb} at {rfc3339(end)}", remedy)


def _end(what: str, name: str, end: int, remedy: str) -> Finding:
    left = end - int(time.time())
    state: State = "problem" if left < 0 else "note" if left < _EARLY[what] else "ok"
    days = abs(left) // _DAY
    when = f"expired {days} days ago" if left < 0 else f"expires in {days} days"
    return Finding(state, what, f"{name} {when}, at {rfc3339(end)}", "" if state == "ok" else remedy)
