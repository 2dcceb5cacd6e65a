"""Everything that a key server's configuration lacks, for `serve --check`."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attrs import evolve

from chutes_proto.errors import CollateralUnavailable, ConfigurationError, FileUnavailable, StoreError
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.finding import Finding
from chutes_proto.io.server.ends import check_profiles, ends_of, fetch_command
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.io.server.store_setup import check_store, erasures_file, make_store_setup, store_place
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.erasures import check_file
from chutes_proto.keys.vault import Vault
from chutes_proto.quote._policy_words import policy_notes
from chutes_proto.server._alike import Alike
from chutes_proto.server._config import ServerConfig


def check_start(path: str) -> Iterator[Finding]:
    """Everything that `serve --check` reports. Raises `FileUnavailable` for the configuration itself."""
    config = None
    try:
        config = ServerConfig.load(path)
        setup = make_setup(config)
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        yield from map(Finding.of_problem, str(exc).splitlines())
        if config is not None:
            yield from _check_store_alone(config)
            yield Finding("note", "configuration", "the rest is looked at once these problems are mended")
        return
    yield from _check_setup(setup)
    yield from check_ends(setup)


def _check_setup(setup: ServerSetup) -> Iterator[Finding]:
    """Everything of files and store."""
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
        fetch = fetch_command(path)
        try:
            items = setup.collateral.items(int(time.time()))
            for item in items:
                is_bad = isinstance(item.content, str)
                yield Finding("problem" if is_bad else "ok", "collateral", str(item), fetch if is_bad else "")
            if not items:
                yield Finding("problem", "collateral.directory", f"{path} holds no *.json", fetch)
        except CollateralUnavailable as exc:
            yield Finding.of_problem(str(exc))
    yield from _check_store(setup.config, setup.store, setup.service.vault, setup.alike)
    yield from check_places(setup)
    yield from check_policy(setup)
    for warning in setup.warnings:
        yield Finding("note", "warning", warning)


def _check_store_alone(config: ServerConfig) -> Iterator[Finding]:
    """Findings about the store of a configuration that no server can be made of; none if the KEK cannot be used."""
    try:
        setup = make_store_setup(config)
    except ConfigurationError:  # which is among the problems of all
        return
    place = evolve(store_place(config, setup.store.base, with_mark=True), vault=setup.vault)
    yield from _check_store(config, place, setup.vault)


def _check_store(
    config: ServerConfig, place: StorePlace, vault: Vault, alike: Alike | None = None
) -> Iterator[Finding]:
    try:
        yield from check_store(place, vault, alike)
    except (ConfigurationError, StoreError) as exc:
        found = Finding.of_problem(str(exc))
        whole = f"{found.remedy} --config {shlex.quote(str(config.path))}"  # a store knows no configuration
        yield evolve(found, remedy=whole) if found.remedy.startswith("chutes-proto store ") else found


def check_places(setup: ServerSetup) -> Iterator[Finding]:
    """Files and sockets that the server makes, where this user can make none, and those of a mark that it cannot read.

    A socket is a note: systemd may make it, or its directory, before the server starts.
    """
    sockets = {
        "proxy.unix": setup.proxy_socket,
        "control": setup.control_socket,
        "admin.unix": setup.admin_socket,
    }
    for key, path in sockets.items():
        if path is not None and not _may_make(path):
            yield Finding("note", key, f"{path}: {_NOWHERE}; if systemd does not make it, the server does not start")
    mark = setup.store.mark_file
    if mark is not None and not _may_make(mark):
        detail = f"{mark}: {_NOWHERE}; after a restart the server knows neither the store that it saw, nor erasures"
        yield Finding("note", "store.mark_file", detail)
    if (erasures := erasures_file(setup.config)) is not None:
        try:
            check_file(erasures, setup.service.vault)
        except StoreError as exc:
            yield Finding.of_problem(str(exc))
    audit = setup.config.audit
    file = None if audit.file is None else setup.base / audit.file
    if file is not None and not (os.access(file, os.W_OK) or _may_make(file)):
        effect = "no boot is granted" if audit.required else "audit rows are not copied there"
        yield Finding("problem" if audit.required else "note", "audit.file", f"{file}: {_NOWHERE}; {effect}")


_NOWHERE: Final = "its directory does not exist, or this user may not write it"


def _may_make(path: Path) -> bool:
    return os.access(path.parent, os.W_OK | os.X_OK)


def check_policy(setup: ServerSetup) -> Iterator[Finding]:
    """Rules of the policy file that are probably not meant, such as a date that refuses every platform."""
    if setup.config.policy is not None:
        for note in policy_notes(setup.service.policies, int(time.time())):
            yield Finding("note", "policy", note)


def check_ends(setup: ServerSetup, *, kept: bool = True) -> Iterator[Finding]:
    """Everything that ends, and when; ``kept`` is as for `ends_of`."""
    now = int(time.time())
    if (none_counts := check_profiles(setup, now)) is not None:
        yield none_counts
    yield from (each.finding(now) for each in ends_of(setup, now, kept=kept))
