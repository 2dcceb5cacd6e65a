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
from contextlib import closing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from chutes_proto.cli import console
from chutes_proto.quote._terms import rfc3339

if TYPE_CHECKING:
    from chutes_proto._converter import StrictConverter
    from chutes_proto.io.server.setup import ServerSetup
    from chutes_proto.io.stores.address import DurableStore
    from chutes_proto.store.rows import Platform, Vm

DAY = 24 * 60 * 60
_COUNT = re.compile(r"[0-9]{1,5}")
_HOTKEY = re.compile(r"[!-~]{1,128}")
_REASON_LENGTH = 500
_EXIT_CODES = """\
exit code: 0 done; 1 not possible as asked, and what was refused is as it was; 2 usage, or a file that cannot be read"""


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}\n\n{console.filled(_EXIT_CODES)}"
    console.add(parser, "--config", metavar="FILE", required=True, help="the server's configuration file (TOML)")
    console.add_json(parser)


def add_reason(parser: argparse.ArgumentParser) -> None:
    told = "why; kept in the audit row beside your user name"
    console.add(parser, "--reason", metavar="TEXT", type=_reason, default="", help=told)


def add_vm(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    console.add(
        parser,
        "vm",
        metavar="VM",
        type=vm_name,
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
    from chutes_proto.errors import StoreError
    from chutes_proto.io.server.setup import make_setup
    from chutes_proto.server import ServerConfig

    setup = make_setup(ServerConfig.load(options.config))
    if not setup.store.is_made() and not new:
        raise StoreError(f"store {setup.store.path}: not made yet; a server makes it, or `chutes-proto store migrate`")
    with closing(setup.store.open()) as store:
        yield setup, store


def find_vm(store: DurableStore, text: str, *, new: bool = False) -> Vm:
    """The VM that an operator names; with its hotkey it may be ``new``. Raises `Refused` for none, or several."""
    from chutes_proto.errors import Refused
    from chutes_proto.store.rows import Vm
    from chutes_proto.units.operator import FindNames
    from chutes_proto.wire.codes import Code

    hotkey, slash, name = text.rpartition("/")
    if slash and new:
        return Vm(hotkey, name)
    found = [vm for vm in store.transact(FindNames(name)) if hotkey in ("", vm.hotkey)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise Refused(Code.KEY_NOT_FOUND, f"there is no VM {text!r}; `chutes-proto vm list` shows those there are")
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


def done(options: argparse.Namespace, told: str) -> int:
    """What a command that changes something ends with."""
    if options.json:
        console.say_json({"ok": True})
    else:
        console.say(told)
    return console.GRANTED


def reason(options: argparse.Namespace) -> str:
    """The audit row's reason."""
    import os
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}: {options.reason}" if options.reason else user


def kept_days(options: argparse.Namespace, name: str, least: int, what: str) -> int:
    """Days of ``--older-than``, by default and at least those that the configuration keeps. Raises `Refused`."""
    from chutes_proto.errors import Refused
    from chutes_proto.wire.codes import Code

    days: int = least if options.older_than is None else options.older_than
    if days < least:
        told = f"the configuration keeps {what} for {least} days ({name}); nothing younger is purged"
        raise Refused(Code.KEY_NOT_FOUND, told)
    return days


def now() -> int:
    import time

    return int(time.time())


def shown(at: int | None) -> str:
    """A time for people, RFC 3339 in UTC."""
    return "-" if at is None else rfc3339(at)


# --- types of options ---


def count(text: str) -> int:
    """A number of something."""
    if not _COUNT.fullmatch(text):
        raise argparse.ArgumentTypeError("a whole number, for example 90")
    return int(text)


def generation(text: str) -> int:
    """The number of a generation."""
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError("a generation is a number from 1 on, as `keys history` shows it")
    return int(text)


def vm_name(text: str) -> str:
    """A VM as `find_vm` takes it."""
    from chutes_proto.wire.names import NAME_PATTERN

    hotkey, slash, name = text.rpartition("/")
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII) or (slash and not _HOTKEY.fullmatch(hotkey)):
        raise argparse.ArgumentTypeError(
            "a VM is HOTKEY/NAME or NAME, and its name has letters, digits, _ . and - only"
        )
    return text


def _reason(text: str) -> str:
    if not text.isprintable() or len(text) > _REASON_LENGTH:
        raise argparse.ArgumentTypeError(f"a reason is one line of at most {_REASON_LENGTH} characters")
    return text


def _identifier(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise argparse.ArgumentTypeError("16 bytes, so 32 hex digits")
    return bytes.fromhex(text)


def members(row: object, names: str) -> dict[str, object]:
    """Members of a row for JSON, by name: bytes in hex, ``platform`` in words, ``hotkey`` and ``vm`` of its VM."""
    found: dict[str, Any] = _rows().unstructure(row)
    if "vm" in found:
        found["hotkey"], found["vm"] = found["vm"] or (None, None)
    found["platform"] = found.get("pin")
    return {name: found[name] for name in names.split()}


@cache
def _rows() -> StrictConverter:
    import attrs

    from chutes_proto._converter import StrictConverter
    from chutes_proto.store.rows import Pin, Vm

    return StrictConverter(plain={bytes: bytes.hex, Pin: str, Vm: attrs.astuple})
