"""The commands of an operator: their options, the store and keys that a configuration names, VMs by name.

Rules kept here:

* each command works on the store that the server's own configuration names, and with its key-encryption keys;
* nothing secret is read from the command line or shown;
* every change is told with a reason, and the operator's user name stands before it in the audit row.
"""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import attrs
import click

from chutes_proto._converter import StrictConverter
from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, Decorator, answer, json_option, parsed, table_options, wants
from chutes_proto.cli.describe import exits
from chutes_proto.errors import (
    FateUnknown,
    KeyUnavailable,
    Refusal,
    Refused,
    RowNotAuthentic,
    SealBroken,
    StoreBusy,
    StoreError,
)
from chutes_proto.io.server.store_setup import StoreSetup, copy_audit, make_store_setup
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import Pin, ReadNames, StoreOp, Vm
from chutes_proto.store._run import Ask, Store, Unit
from chutes_proto.wire.codes import Code
from chutes_proto.wire.names import NAME_PATTERN

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

DAY = 24 * 60 * 60
PAGE = 1000
"""Rows that a command has in memory at a time."""
_COUNT = re.compile(r"[0-9]{1,5}")
_HOTKEY = re.compile(r"[!-~]{1,128}")
_REASON_LENGTH = 500


class OperatorCommand(Command):
    """A command that works on the store; a refusal of it, or of the store, is exit code 1."""

    exits: Mapping[int, str] = exits(
        "done", "refused, or the store cannot be used; nothing is changed by what was refused"
    )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Refusal as exc:
            why = str(exc.detail)
        except (StoreError, KeyUnavailable, SealBroken) as exc:
            why = str(exc)
        if wants("json"):
            console.say_json({"ok": False, "error": why})
        console.complain(why, ctx.command_path)
        return console.REFUSED


@contextmanager
def opened(config: str, *, new: bool = False, in_steps: bool = False) -> Generator[tuple[StoreSetup, DurableStore]]:
    """The store of a configuration, which must exist unless it may be ``new``. Raises `StoreError`.

    ``in_steps`` is for a change in many transactions that may be begun again after any of them.
    """
    setup = make_store_setup(ServerConfig.load(config))
    setup.store.require_made(setup.mark_file, new=new)
    with closing(setup.store.open()) as store:
        copy_audit(setup.config, setup.store.base, store)
        with resumable() if in_steps else nullcontext():
            yield setup, store


@contextmanager
def resumable() -> Generator[None]:
    """Say of a change in many transactions that it may be begun again, where the store fails. Raises `StoreError`."""
    try:
        yield
    except (StoreBusy, FateUnknown) as exc:
        what = "what was done before is kept; run the command again, and it does what is left"
        raise StoreError(f"{exc}; {what}") from None


def require_kept(store: DurableStore, *written: StoreOp[Any]) -> None:
    """Require that the database has kept what this process has just committed. Raises `StoreError`.

    A trigger may leave it out: the rows then agree with older heads. ``written`` read what was written, compared with
    its head, and no more: a row that is not authentic since long ago was not left out.
    """
    try:
        for op in written:
            _ = store.transact(Ask(op))
    except RowNotAuthentic as exc:
        raise _not_kept(exc.table, exc.finding) from None
    except StoreError as exc:
        raise _unread(exc) from None


def require_gone(store: Store, table: str, unit: Unit[T], left: Callable[[T], object]) -> None:
    """Require that the rows of a table are gone that a purge has deleted. Raises `StoreError`.

    No head lists them, so a trigger may keep them as they were. ``unit`` reads again, and ``left`` says what of it was
    to be deleted: meanwhile more rows may have become old.
    """
    try:
        found = left(store.transact(unit))
    except StoreError as exc:
        raise _unread(exc) from None
    if found:
        raise _not_kept(table, "rows that were to be deleted are there")


def _unread(exc: StoreError) -> StoreError:
    return StoreError(f"the last change is done, unless the database has not kept it: {exc}; run the command again")


def _not_kept(table: str, finding: str) -> StoreError:
    return StoreError(
        f"the database has not kept it, or somebody set it back: {finding}; look for triggers"
        f" (`\\d {table}` of psql lists them), remove them, and run the command again"
    )


def find_vm(store: DurableStore, text: str, *, new: bool = False) -> Vm:
    """The VM that an operator names; with its hotkey it may be ``new``. Raises `Refused` for none, or several."""
    hotkey, slash, name = text.rpartition("/")
    if slash and new:
        return Vm(hotkey, name)
    found = store.transact(Ask(ReadNames(name, hotkey)))
    if len(found) == 1:
        return found[0]
    if not found:
        raise Refused(Code.KEY_NOT_FOUND, f"VM {text!r} does not exist; `chutes-proto vm list` shows all")
    hotkeys = ", ".join(vm.hotkey for vm in found)
    raise Refused(Code.KEY_NOT_FOUND, f"several hotkeys have a VM {text!r}; say HOTKEY/{text} with one of: {hotkeys}")


def listing(store: Store, read: Callable[[T | None], StoreOp[tuple[T, ...]]]) -> Iterator[T]:
    """All that ``read`` finds, of which a page at a time is in memory; it takes the last of the page before."""
    after: T | None = None
    while page := store.transact(Ask(read(after))):
        yield from page
        after = page[-1]


def answer_rows(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    columns: output.Columns,
    empty: str,
    *,
    before: Mapping[str, object] | None = None,
    after: Callable[[], object] = lambda: None,
    ok: Callable[[], bool] = lambda: True,
) -> int:
    """Print rows while they are read: with ``--json`` as the list ``name``, after the members ``before``, else a table.

    After the last, ``after`` says more to people, and ``ok`` is asked.
    """
    if wants("json"):
        console.say_json_list(before or {}, name, rows, ok)
    else:
        output.table(columns, rows, empty=empty)
        _ = after()
    return console.GRANTED if ok() else console.REFUSED


def done(text: str) -> int:
    """Say what was changed; the result is the exit code."""
    return answer({"ok": True}, text)


def kept_days(older_than: int | None, name: str, least: int, what: str) -> int:
    """Days of ``--older-than``, by default and at least those that the configuration keeps. Raises `Refused`."""
    days = least if older_than is None else older_than
    if days < least:
        text = f"--older-than {days}: the configuration keeps {what} for {least} days; say {least} or more, or change"
        raise Refused(Code.KEY_NOT_FOUND, f"{text} {name}")
    return days


def now() -> int:
    return int(time.time())


def members(row: object, names: str) -> dict[str, object]:
    """Members of a row for JSON, by name: bytes in hex, ``platform`` in words, ``hotkey`` and ``vm`` of its VM."""
    found: dict[str, Any] = _rows().unstructure(row)
    if "vm" in found:
        found["hotkey"], found["vm"] = found["vm"] or (None, None)
    found["platform"] = found.get("pin")
    return {name: found[name] for name in names.split()}


@cache
def _rows() -> StrictConverter:
    return StrictConverter(plain={bytes: bytes.hex, Pin: str, Vm: attrs.astuple})


# --- options ---


def count(text: str) -> int:
    """A number of something."""
    if not _COUNT.fullmatch(text):
        raise ValueError("say a whole number, for example 90")
    return int(text)


def at_least_one(text: str) -> int:
    """A number of something, 1 or more."""
    if not (number := count(text)):
        raise ValueError("say 1 or more, for example 20")
    return number


def vm_name(text: str) -> str:
    """A VM as `find_vm` takes it."""
    hotkey, slash, name = text.rpartition("/")
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII) or (slash and not _HOTKEY.fullmatch(hotkey)):
        raise ValueError("a VM is HOTKEY/NAME or NAME, and its name has letters, digits, _ . and - only")
    return text


def _reason(text: str) -> str:
    """The reason of an audit row: who, and why."""
    if not text.isprintable() or len(text) > _REASON_LENGTH:
        raise ValueError(f"a reason is one line of at most {_REASON_LENGTH} characters")
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return f"{user}: {text}" if text else user


def identifier(text: str) -> bytes:
    """An identifier of a platform."""
    if not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise ValueError("say 16 bytes, which is 32 hex digits")
    return bytes.fromhex(text)


config_option: Decorator = click.option(
    "--config", metavar="FILE", required=True, help="the server's configuration file (TOML)"
)
reason_option: Decorator = click.option(
    "--reason",
    metavar="TEXT",
    callback=parsed(_reason),
    default="",
    help="why; the audit row keeps it beside your user name",
)


def shows(function: F) -> F:
    """The options of a command that shows rows of the store."""
    return config_option(table_options(function))


def changes(function: F) -> F:
    """The options of a command that changes rows of the store."""
    return reason_option(config_option(json_option(function)))


def purges(setting: str, days: int, what: str) -> Callable[[F], F]:
    """The options of a command that deletes what is older than a number of days, which ``setting`` of the
    configuration has at least."""
    told = f"{what} at least so many days ago; {setting} of the configuration ({days} by default) or more"

    def decorate(function: F) -> F:
        carry_out = click.option("--yes", is_flag=True, help="delete them")
        return click.option("--older-than", metavar="DAYS", callback=parsed(count), help=told)(carry_out(function))

    return decorate


def vm_argument(*, optional: bool = False) -> Callable[[F], F]:
    """The VM that `find_vm` finds."""
    metavar, everything = ("[VM]", " (default: all VMs)") if optional else ("VM", "")
    told = f"HOTKEY/NAME, or only NAME where one hotkey has it{everything}"
    convert = parsed(vm_name)
    return click.argument("vm", cls=Argument, metavar=metavar, required=not optional, callback=convert, help=told)


def platform_options(function: F) -> F:
    """The options that say a platform."""
    ppid = click.option(
        "--ppid", metavar="HEX", required=True, callback=parsed(identifier), help="the platform's PPID, 16 bytes"
    )
    instance = click.option(
        "--instance",
        metavar="HEX",
        callback=parsed(identifier),
        help="its platform instance id, 16 bytes, if its PCK certificate has one (`inspect` shows both)",
    )
    return ppid(instance(function))
