"""``chutes-proto vm``: whose VMs' names are."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console, operating

NAME = "vm"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "list, bind and rebind VMs",
        """
        A VM's name belongs to the platform that booted it first. These commands show which that is, and change it.
        Every change is kept in the audit rows.

        exit code: 0 done; 1 not possible as asked, and nothing was changed; 2 usage, or a file that cannot be read
        """,
        "chutes-proto vm list --config /etc/chutes/server.toml\n"
        "chutes-proto vm rebind 5Grw.../vm-1 --ppid 00ff... --keep-keys --reason 'disk moved' --config server.toml",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    listed = console.command(
        actions,
        "list",
        "show all VMs",
        "Show each VM: its hotkey and name, the platform that it is bound to, its exchange, its last boot.",
        "chutes-proto vm list --config /etc/chutes/server.toml --json",
    )
    bind = console.command(
        actions,
        "bind",
        "bind a name that is bound to no platform, as after an import",
        "Bind a name that is bound to no platform. The keys that it holds go to the next boot on that platform.",
        "chutes-proto vm bind 5Grw.../vm-1 --ppid 00ff... --config /etc/chutes/server.toml",
    )
    rebind = console.command(
        actions,
        "rebind",
        "bind a name to another platform",
        """
        Bind a name to another platform; all tokens that were issued to it are void. Say which it is: the disk moved to
        another machine (--keep-keys), or somebody else had taken the name (--new-keys: all its keys are retired).
        """,
        "chutes-proto vm rebind 5Grw.../vm-1 --ppid 00ff... --keep-keys --config /etc/chutes/server.toml\n"
        "chutes-proto vm rebind 5Grw.../vm-1 --ppid 00ff... --new-keys --config /etc/chutes/server.toml",
    )
    for action in (bind, rebind):
        operating.add_vm(action)
        operating.add_platform(action)
        operating.add_reason(action)
    which = rebind.add_mutually_exclusive_group(required=True)
    _ = which.add_argument("--keep-keys", action="store_true", help="the disk moved: its keys go along")
    _ = which.add_argument("--new-keys", action="store_true", help="the name was another's: its keys are retired")
    for action in (listed, bind, rebind):
        operating.add_config(action)
    return parser


def run(options: argparse.Namespace) -> int:
    return operating.refusing({"list": _list, "bind": _bind, "rebind": _rebind}[options.action], options)


def _list(options: argparse.Namespace) -> int:
    from chutes_proto.store.rows import VmRow
    from chutes_proto.units.operator import Everyone

    with operating.opened(options) as (_, store):
        everyone = store.transact(Everyone())
    claims = [row for row in everyone if isinstance(row, VmRow)]
    unbound = [row for row in everyone if not isinstance(row, VmRow)]
    if options.json:
        names = "hotkey vm platform proven exchange created_at last_boot_at"
        bound = [operating.members(claim, names) | {"last_boot_at": claim.last_boot_at or None} for claim in claims]
        free = [{"hotkey": vm.hotkey, "vm": vm.name, "platform": None} for vm in unbound]
        console.say_json({"ok": True, "vms": [*bound, *free]})
        return console.GRANTED
    if not everyone:
        console.say("no VMs")
    for claim in claims:
        proven = "hotkey proven" if claim.proven else "hotkey not proven"
        last = (
            f"last boot {operating.shown(claim.last_boot_at)}" if claim.last_boot_at else "no boot since it was bound"
        )
        console.say(f"{claim.vm.hotkey}/{claim.vm.name}  {claim.pin}  {claim.exchange}  {proven}  {last}")
    for vm in unbound:
        console.say(f"{vm.hotkey}/{vm.name}  holds keys, and is bound to no platform")
    return console.GRANTED


def _bind(options: argparse.Namespace) -> int:
    from chutes_proto.auth.hotkey import Hotkey, HotkeyError
    from chutes_proto.errors import ConfigurationError
    from chutes_proto.units.operator import BindVm

    platform = operating.platform(options)
    with operating.opened(options) as (_, store):
        vm = operating.find_vm(store, options.vm, new=True)
        try:
            _ = Hotkey.parse(vm.hotkey)
        except HotkeyError as exc:
            raise ConfigurationError(f"{vm.hotkey!r} is no hotkey: {exc}") from None
        store.transact(BindVm(operating.now(), vm, platform, operating.reason(options)))
    return operating.done(options, f"{vm.hotkey}/{vm.name} is bound to {platform.pin}")


def _rebind(options: argparse.Namespace) -> int:
    from chutes_proto.units.operator import RebindVm

    platform = operating.platform(options)
    with operating.opened(options) as (setup, store):
        vm = operating.find_vm(store, options.vm)
        unit = RebindVm(
            operating.now(), vm, platform, options.keep_keys, setup.service.vault, operating.reason(options)
        )
        store.transact(unit)
    how = "with its keys" if options.keep_keys else "its keys are retired"
    return operating.done(options, f"{vm.hotkey}/{vm.name} is bound to {platform.pin}, {how}; its tokens are void")
