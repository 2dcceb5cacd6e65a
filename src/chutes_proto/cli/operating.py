"""What the commands of an operator share: the server's store and keys from its configuration, VMs by name, times.

Rules kept here:

* each command works on the store that the server's own configuration names, and with its key-encryption keys;
* nothing secret is read from the command line or shown;
* what a command changes it says with a reason, and the operator's user name stands before it in the audit row.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from chutes_proto.cli import console
from chutes_proto.quote.terms import rfc3339

if TYPE_CHECKING:
    from chutes_proto.blocking.setup import ServerSetup
    from chutes_proto.blocking.stores import DurableStore
    from chutes_proto.store.rows import Platform, Vm

_DAYS = re.compile(r"[0-9]{1,5}")


def add_config(parser: argparse.ArgumentParser) -> None:
    console.add(parser, "--config", metavar="FILE", required=True, help="the server's configuration file (TOML)")
    console.add_json(parser)


def add_reason(parser: argparse.ArgumentParser) -> None:
    console.add(parser, "--reason", metavar="TEXT", default="", help="why; kept in the audit row beside your user name")


def add_vm(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    console.add(
        parser,
        "vm",
        metavar="VM",
        nargs="?" if optional else None,
        help="HOTKEY/NAME, or only NAME where one hotkey has it" + (" (default: all VMs)" if optional else ""),
    )


def add_platform(parser: argparse.ArgumentParser) -> None:
    console.add(parser, "--ppid", metavar="HEX", type=_identifier, required=True, help="the platform's PPID, 16 bytes")
    console.add(
        parser,
        "--instance",
        metavar="HEX",
        type=_identifier,
        help="its platform instance id, 16 bytes, where its PCK certificate has one (`inspect` shows both)",
    )


def platform(options: argparse.Namespace) -> Platform:
    from chutes_proto.store.rows import Platform

    return Platform(instance_id=options.instance, ppid=options.ppid)


@contextmanager
def opened(options: argparse.Namespace, *, new: bool = False) -> Generator[tuple[ServerSetup, DurableStore]]:
    """The server's setup and its store, which must be there unless it may be ``new``. Raises `StoreError`."""
    from chutes_proto.blocking.setup import load_setup
    from chutes_proto.errors import StoreError

    setup = load_setup(options.config)
    if not setup.store.is_made() and not new:
        raise StoreError(f"store {setup.store.path}: not made yet; a server makes it, or `chutes-proto store migrate`")
    store = setup.store.open()
    try:
        yield setup, store
    finally:
        store.close()


def find_vm(store: DurableStore, text: str) -> Vm:
    """The VM that an operator names. Raises `Refused` for none, or more than one."""
    from chutes_proto.codes import Code
    from chutes_proto.errors import Refused
    from chutes_proto.store.rows import Vm, VmRow
    from chutes_proto.units.operator import Everyone

    hotkey, slash, name = text.rpartition("/")
    if slash:
        return Vm(hotkey, name)
    everyone = store.transact(Everyone())
    found = [vm for vm in (row.vm if isinstance(row, VmRow) else row for row in everyone) if vm.name == text]
    if len(found) == 1:
        return found[0]
    if not found:
        raise Refused(Code.KEY_NOT_FOUND, f"no VM is named {text!r}; `chutes-proto vm list` shows those there are")
    hotkeys = ", ".join(vm.hotkey for vm in found)
    raise Refused(Code.KEY_NOT_FOUND, f"several hotkeys have a VM {text!r}; say HOTKEY/{text} with one of: {hotkeys}")


def refusing(work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """``work``, and exit code 1 with a line where it is refused or the store cannot do it."""
    from chutes_proto.errors import KeyUnavailable, Refusal, SealBroken, StoreError

    try:
        return work(options)
    except Refusal as exc:
        told = str(exc.detail)
    except (StoreError, KeyUnavailable, SealBroken) as exc:
        told = str(exc)
    if options.json:
        console.say_json({"ok": False, "error": told})
    console.tell(f"chutes-proto: {told}")
    return console.REFUSED


def reason(options: argparse.Namespace) -> str:
    """The audit row's reason."""
    import os
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}: {options.reason}" if options.reason else user


def now() -> int:
    import time

    return int(time.time())


def shown(at: int | None) -> str:
    """A time for people, RFC 3339 in UTC."""
    return "-" if at is None else rfc3339(at)


def days(text: str) -> int:
    """A whole number of days."""
    if not _DAYS.fullmatch(text):
        raise argparse.ArgumentTypeError("a whole number of days, for example 90")
    return int(text)


def _identifier(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise argparse.ArgumentTypeError("16 bytes, so 32 hex digits")
    return bytes.fromhex(text)
