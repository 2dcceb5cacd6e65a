"""Disks with the real `cryptsetup`, on image files, loop devices and mappings: each act, whole and cut off anywhere,
and under a host that changes the disk meanwhile."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.errors import DiskError, HeaderRejected
from chutes_proto.io.disks import cryptsetup as module
from chutes_proto.io.disks.cryptsetup import Disks, environment
from chutes_proto.log import Record
from chutes_proto.luks.disk import LOOKED_AT, UNFINISHED, Blank, Foreign, Luks
from chutes_proto.luks.header import HEAD_SIZE, MAX_SLOTS
from chutes_proto.luks.plan import Action, AddKey, Format, KeepKey, Key, Open
from chutes_proto.secret import Secret
from tests.block_devices import attached
from tests.luks import headers

SIZE = 20 * 1024 * 1024
DATA = b"the file system that is on the volume, encrypted"
A, B, C = (bytes([letter]) * 128 for letter in b"abc")
FAST = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --batch-mode --key-file=-".split()


class Bench:
    """One image file as the disk of ``storage``, and the actions on it."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program = program
        self.path = folder / "disk.img"
        self.again()
        with self.path.open("wb") as file:
            _ = file.truncate(SIZE)

    def again(self, program: str | None = None) -> None:
        """Begin a new boot, perhaps with another program in place of `cryptsetup`."""
        self.disks = Disks(program or self.program, images=True)

    @property
    def device(self) -> str:
        return str(self.path)

    def inspect(self) -> Any:
        return self.disks.inspect(self.device)

    def act(self, action: Action[Any], current: bytes | None = None, following: bytes | None = None) -> object:
        keys = {Key.CURRENT: current, Key.NEXT: following}
        return self.disks.act(action, {key: Secret(value) for key, value in keys.items() if value is not None})

    def format(self, key: bytes = A) -> None:
        assert self.act(Format("storage", self.device, Key.CURRENT), key) is None

    def open(self, current: bytes, following: bytes = C) -> object:
        both = (Key.CURRENT, Key.NEXT)
        return self.act(Open("storage", self.device, "storage", both), current, following)

    def add(self, current: bytes, following: bytes) -> None:
        assert self.act(AddKey("storage", self.device, Key.NEXT), current, following) is None

    def keep(self, following: bytes, beside: Key | None = None) -> None:
        assert self.act(KeepKey("storage", self.device, Key.NEXT, beside), A, following) is None

    def opens(self, key: bytes) -> bool:
        """Return whether the real program opens the real disk."""
        command = [self.program, "open", "--test-passphrase", "--key-file=-", self.device]
        return subprocess.run(command, input=key, capture_output=True, check=False).returncode == 0

    def slots(self) -> int:
        return len(self.inspect().header.keyslots)

    def put(self, place: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            _ = file.seek(place)
            _ = file.write(data)

    def refused(self, act: Callable[[], object], reason: str, *, path: str | None = None) -> DiskError:
        """``act`` is refused for this reason, and the disk stays byte for byte as it is."""
        before = self.path.read_bytes()
        with pytest.raises(DiskError) as caught:
            _ = act()
        assert caught.value.reason == reason
        assert str(caught.value).startswith(f"{path or self.device}: ")
        assert self.path.read_bytes() == before
        return caught.value


@pytest.fixture
def bench(require_program: Callable[[str], str], tmp_path: Path) -> Bench:
    return Bench(require_program("cryptsetup"), tmp_path)


# --- the life of a disk ---


def test_first_format_reboot_rotation(bench: Bench) -> None:
    bench.put(17 << 20, DATA)
    assert bench.inspect() == Blank(bench.device, SIZE)
    bench.format()
    found = bench.inspect()
    assert isinstance(found, Luks)
    assert (found.header.whole, found.header.sector_size, found.header.offset) == (True, 4096, 16 << 20)
    assert bench.opens(A)
    assert bench.open(A) is Key.CURRENT
    bench.again()
    assert bench.open(A) is Key.CURRENT
    bench.add(A, B)
    assert bench.opens(A)
    assert bench.opens(B)
    bench.again()
    assert bench.open(C, B) is Key.NEXT
    bench.keep(B)
    assert not bench.opens(A)
    assert bench.opens(B)
    assert (bench.slots(), bench.inspect().header.whole) == (1, True)
    assert bench.path.read_bytes()[17 << 20 :].startswith(DATA)
    assert bench.path.stat().st_size == SIZE


def test_a_disk_of_odd_size_has_small_sectors(bench: Bench) -> None:
    with bench.path.open("r+b") as file:
        _ = file.truncate(SIZE + 512)
    bench.format()
    assert bench.inspect().header.sector_size == 512
    assert bench.open(A) is Key.CURRENT


def test_a_key_that_opens_already_is_not_added_again(bench: Bench) -> None:
    bench.format()
    bench.add(A, B)
    before = bench.path.read_bytes()
    bench.add(A, B)
    bench.add(C, B)  # whatever the current key is
    assert bench.path.read_bytes() == before


def test_doubled_keys_go_together(bench: Bench, tmp_path: Path) -> None:
    """`cryptsetup luksAddKey` of a passphrase that is there makes a second slot; an older agent did that."""
    bench.format()
    file = tmp_path / "key"
    for key in (A, B, B):
        _ = file.write_bytes(key)
        command = [bench.program, "luksAddKey", *FAST, bench.device, str(file)]
        _ = subprocess.run(command, input=A, check=True)
    assert bench.slots() == 4
    whole = bench.path.read_bytes()
    bench.keep(B, beside=Key.CURRENT)
    assert bench.slots() == 2
    assert bench.opens(A)
    assert bench.opens(B)
    _ = bench.path.write_bytes(whole)
    bench.again()
    bench.keep(B)
    assert bench.slots() == 1
    assert bench.opens(B)
    assert not bench.opens(A)


def test_no_key_that_fits(bench: Bench) -> None:
    bench.format()
    error = bench.refused(lambda: bench.open(B), "key_refused")
    assert "no key opens it (current, next tried)" in str(error)
    assert "keys restore" in str(error)
    one = Open("storage", bench.device, "storage", (Key.CURRENT,))
    assert "the current key does not open it: it is another" in str(
        bench.refused(lambda: bench.act(one, B), "key_refused")
    )
    _ = bench.refused(lambda: bench.add(B, C), "key_refused")
    _ = bench.refused(lambda: bench.keep(B), "key_refused")
    assert bench.opens(A)


def test_full_slots_are_freed(bench: Bench) -> None:
    bench.format()
    for number in range(MAX_SLOTS - 1):
        bench.add(A, b"left over %d" % number)
    assert bench.slots() == MAX_SLOTS
    before = bench.path.read_bytes()
    _ = bench.refused(lambda: bench.add(B, C), "key_refused")
    assert bench.path.read_bytes() == before, "no key that is known opens it, so none may go"
    bench.add(A, B)
    assert bench.slots() == 2
    assert bench.opens(A)
    assert bench.opens(B)


@pytest.mark.parametrize("key", [b"", b"x" * 4097])
def test_a_key_of_a_forbidden_size(bench: Bench, key: bytes) -> None:
    _ = bench.refused(lambda: bench.format(key), "key_size")


# --- what is not formatted ---


def test_a_disk_that_is_not_blank(bench: Bench) -> None:
    assert isinstance(bench.inspect(), Blank)
    for place, data in ((0, b"XFSB"), (SIZE - 1, b"x")):
        bench.put(place, data)
        assert isinstance(bench.inspect(), Foreign)
        assert "nothing was written" in str(bench.refused(bench.format, "not_blank"))
        _ = bench.refused(lambda: bench.open(A), "changed")
        bench.put(place, bytes(len(data)))
    bench.format()
    _ = bench.refused(lambda: bench.format(B), "not_blank")


@pytest.mark.parametrize("size", [1, HEAD_SIZE, HEAD_SIZE + 1, LOOKED_AT, LOOKED_AT + 1, 2 * LOOKED_AT + 1, SIZE])
def test_data_anywhere_in_the_inspected_parts_is_found(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disks = Disks("/nowhere", images=True)
    edges = (0, HEAD_SIZE, 2 * HEAD_SIZE, LOOKED_AT, size - LOOKED_AT, size - HEAD_SIZE, size)
    for place in {place for edge in edges for place in (edge - 1, edge) if 0 <= place < size}:
        with disk.open("wb") as file:
            _ = file.truncate(size)
            assert isinstance(disks.inspect(str(disk)), Blank)
            _ = file.seek(place)
            _ = file.write(b"x")
        is_looked_at = place < LOOKED_AT or place >= size - LOOKED_AT
        assert isinstance(disks.inspect(str(disk)), Foreign if is_looked_at else Blank), place


def test_an_unfinished_format_begins_again(bench: Bench) -> None:
    bench.format()
    bench.put(0, UNFINISHED)
    assert bench.inspect() == Blank(bench.device, SIZE, unfinished=True)
    bench.format(B)
    assert bench.opens(B)
    assert not bench.opens(A)


# --- devices ---


def test_a_path_that_is_not_a_block_device(bench: Bench, tmp_path: Path) -> None:
    pipe, listening, link, loop = (tmp_path / name for name in ("pipe", "socket", "link", "loop"))
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(listening))
    link.symlink_to(pipe)
    loop.symlink_to(loop)
    for path, reason, text in (
        (pipe, "kind", "a pipe, not a block device"),
        (link, "kind", "a pipe, not a block device"),
        (tmp_path, "kind", "a directory, not a block device"),
        (Path("/dev/null"), "kind", "a character device, not a block device"),
        (listening, "kind", "a socket, not a block device"),
        (tmp_path / "missing", "unavailable", "No such file or directory"),
        (loop, "unavailable", "symbolic link"),
    ):
        for act in (
            partial(bench.disks.inspect, str(path)),
            partial(bench.act, Format("storage", str(path), Key.CURRENT), A),
            partial(bench.act, Open("storage", str(path), "storage", (Key.CURRENT,)), A),
        ):
            assert text in str(bench.refused(act, reason, path=str(path)))


def test_a_regular_file_is_refused_unless_allowed(bench: Bench) -> None:
    strict = Disks(bench.program)
    action = Format("storage", bench.device, Key.CURRENT)
    for act in (lambda: strict.inspect(bench.device), lambda: strict.act(action, {Key.CURRENT: Secret(A)})):
        assert "a regular file, not a block device" in str(bench.refused(act, "kind"))


def test_a_device_without_bytes(bench: Bench) -> None:
    _ = bench.path.write_bytes(b"")
    _ = bench.refused(bench.inspect, "empty")
    _ = bench.refused(bench.format, "empty")


def test_a_device_that_shrinks(bench: Bench) -> None:
    assert isinstance(bench.inspect(), Blank)
    with bench.path.open("r+b") as file:
        _ = file.truncate(SIZE - 4096)
    assert f"it had {SIZE} bytes, and now has {SIZE - 4096}" in str(bench.refused(bench.format, "shrunk"))
    bench.again()
    bench.format()
    with bench.path.open("r+b") as file:
        _ = file.truncate(1 << 20)
    _ = bench.refused(lambda: bench.open(A), "shrunk")
    bench.again()
    assert bench.refused(lambda: bench.open(A), "keyslots_size")


def test_a_link_that_changes(bench: Bench, tmp_path: Path) -> None:
    link, other = tmp_path / "by-id", tmp_path / "other.img"
    _ = shutil.copyfile(bench.path, other)
    link.symlink_to(bench.path)
    assert isinstance(bench.disks.inspect(str(link)), Blank)
    link.unlink()
    link.symlink_to(other)
    action = Format("storage", str(link), Key.CURRENT)
    error = bench.refused(lambda: bench.act(action, A), "changed", path=str(link))
    assert f"it led to {bench.path}, and now leads to another device, {other}" in str(error)
    assert not any(other.read_bytes())
    _ = bench.path.rename(tmp_path / "first.img")
    _ = other.rename(bench.path)
    link.unlink()
    link.symlink_to(bench.path)
    _ = bench.refused(lambda: bench.act(action, A), "changed", path=str(link))


def test_a_device_that_becomes_a_link_after_it_was_checked(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def swapped(path: str, flags: int, *more: Any) -> int:
        if path == bench.device:
            bench.path.symlink_to(bench.path.rename(tmp_path / "other.img"))
        return real(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", swapped)
        _ = bench.refused(bench.inspect, "unavailable")


def test_a_device_that_forgets_what_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.format()
    write = os.pwrite

    def forget(descriptor: int, data: memoryview, place: int) -> int:
        return len(data) if _is(descriptor, bench.path) else write(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", forget)
    _ = bench.refused(lambda: bench.add(A, B), "write_lost")


def test_a_device_that_forgets_a_key_slot(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.format()
    write, area = os.pwrite, len(bench.inspect().header.area)

    def forget(descriptor: int, data: memoryview, place: int) -> int:
        return len(data) if _is(descriptor, bench.path) and place >= area else write(descriptor, data, place)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="does not keep what was written") as caught:
        patch.setattr(os, "pwrite", forget)
        bench.add(A, B)
    assert caught.value.reason == "write_lost"
    assert bench.opens(A)


def _is(descriptor: int, path: Path) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink() == path


# --- cut off anywhere ---


def cut(bench: Bench, act: Callable[[], None]) -> Iterator[int]:
    """Let ``act`` happen, then have the power go at each instant of it; says how many flushes came before.

    Of what was written since the last flush, any part is kept and the rest is lost; a write has two parts, of which the
    first is one sector. Of many parts, an eighth to all are kept, or either half of each write. Look at the disk with
    our code first: the real program repairs a header that it opens.
    """
    before = bench.path.read_bytes()
    told = writes(bench, act)
    assert bench.path.read_bytes() == _with(before, chain(*told))  # the program has written to its copy only
    flushed = _blocks(before)
    for number, written in enumerate(told):
        step = max(1, -(-len(written) // 8))
        ways: list[Sequence[tuple[int, bytes]]] = [written[: at + step] for at in range(0, len(written), step)]
        ways += [written[::2], written[1::2]]
        if len(written) <= 4:
            ways = [kept for size in range(len(written)) for kept in combinations(written, size + 1)]
        for kept in ways:
            with bench.path.open("wb") as file:
                _ = file.truncate(len(before))
            for place, data in (*flushed, *kept):
                bench.put(place, data)
            bench.again()
            yield number
        flushed += written


def _blocks(image: bytes) -> list[tuple[int, bytes]]:
    """The blocks of a disk that have data, with their offsets: most of it has none."""
    size = 1 << 16
    blocks = ((place, image[place : place + size]) for place in range(0, len(image), size))
    return [(place, block) for place, block in blocks if block.strip(b"\0")]


def _with(image: bytes, written: Iterable[tuple[int, bytes]]) -> bytes:
    disk = bytearray(image)
    for place, data in written:
        disk[place : place + len(data)] = data
    return bytes(disk)


def writes(bench: Bench, act: Callable[[], None]) -> list[list[tuple[int, bytes]]]:
    """Return the writes of ``act`` to the disk, with their offsets, up to each flush."""
    write, flush = os.pwrite, os.fsync
    told: list[list[tuple[int, bytes]]] = [[]]

    def pwrite(descriptor: int, data: memoryview, place: int) -> int:
        if _is(descriptor, bench.path):
            parts = (place, bytes(data[:512])), (place + 512, bytes(data[512:]))
            told[-1] += [part for part in parts if part[1]]
        return write(descriptor, data, place)

    def fsync(descriptor: int) -> None:
        if _is(descriptor, bench.path):
            told.append([])
        flush(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(os, "fsync", fsync)
        bench.again()
        act()
    assert told.pop() == []  # all is flushed when it is done
    return told


def test_a_format_cut_off_anywhere_begins_again_or_is_done(bench: Bench) -> None:
    seen: list[int] = []
    for number in cut(bench, bench.format):
        seen.append(number)
        found = bench.inspect()
        if isinstance(found, Blank):
            bench.format(B)
            assert bench.opens(B)
        else:
            assert bench.open(A) is Key.CURRENT
            assert bench.opens(A)
    assert sorted(seen) == seen
    assert set(seen) == {0, 1, 2, 3}  # the mark, a key slot, two copies
    assert bench.inspect().header.whole


def test_a_format_cut_off_twice(bench: Bench) -> None:
    """The second one finds what is left of the first: its key slot, and a copy of its header that is whole."""
    for _ in cut(bench, bench.format):
        if not isinstance(bench.inspect(), Blank):
            continue
        for _ in cut(bench, lambda: bench.format(B)):
            assert isinstance(bench.inspect(), Blank) or bench.open(B) is Key.CURRENT


def test_a_key_added_and_cut_off_anywhere(bench: Bench) -> None:
    bench.format()
    seen: list[int] = []
    for _ in cut(bench, lambda: bench.add(A, B)):
        assert bench.open(A) is Key.CURRENT
        seen.append(bench.slots())
        bench.add(A, B)
        assert bench.opens(A)
        found = bench.inspect()
        assert (found.header.whole, len(found.header.keyslots)) == (True, 2)
        assert bench.opens(B)
    assert {1, 2} == {*seen}


def test_a_removal_of_keys_cut_off_anywhere(bench: Bench) -> None:
    bench.format()
    bench.add(A, B)
    bench.add(A, C)
    seen: list[int] = []
    for _ in cut(bench, lambda: bench.keep(B)):
        assert bench.open(A, B) in (Key.CURRENT, Key.NEXT)
        seen.append(bench.slots())
        bench.keep(B)
        assert bench.slots() == 1
        assert bench.opens(B)
    assert {1, 3} == {*seen}


def test_slots_freed_and_cut_off_anywhere(bench: Bench) -> None:
    bench.format()
    for number in range(MAX_SLOTS - 1):
        bench.add(A, b"left over %d" % number)
    for _ in cut(bench, lambda: bench.add(A, B)):
        assert bench.open(A) is Key.CURRENT
        bench.add(A, B)
        assert bench.opens(A)
        assert bench.opens(B)


def test_two_updates_in_a_row_cut_off(bench: Bench) -> None:
    """The copies never come two updates apart, which would be refused."""
    bench.format()
    bench.add(A, B)
    copies = bench.path.read_bytes()[: 2 * 16384]
    bench.keep(B)
    bench.put(0, copies[:16384])  # the first copy is still the older one
    assert not bench.inspect().header.whole
    for _ in cut(bench, lambda: bench.add(B, C)):
        assert bench.open(B) is Key.CURRENT
        assert bench.opens(B)


# --- a host that changes the disk meanwhile ---


def _wrapped(bench: Bench, tmp_path: Path, script: str) -> str:
    """The program, after ``script``."""
    program = tmp_path / "wrapped"
    _ = program.write_text(f'#!/bin/sh\n{script}\nexec {bench.program} "$@"\n')
    program.chmod(0o755)
    return str(program)


def _null(bench: Bench) -> bytes:
    """The header of the disk, saying that nothing is encrypted."""
    area = bench.path.read_bytes()[4096:16384].rstrip(b"\0")
    null = area.replace(
        b'"iv_tweak":"0","encryption":"aes-xts-plain64"', b'"iv_tweak":"0","encryption":"cipher_null-ecb"'
    )
    assert null != area
    return headers.both(null)[: 2 * headers.AREA]


def test_a_null_cipher_stops_before_any_key_is_used(bench: Bench, tmp_path: Path) -> None:
    bench.format()
    bench.put(0, _null(bench))
    assert bench.opens(A)  # so would the program
    bench.again(_wrapped(bench, tmp_path, f"touch {tmp_path}/used"))
    for act in (bench.inspect, lambda: bench.open(A), lambda: bench.add(A, B), lambda: bench.keep(A)):
        error = bench.refused(act, "cipher")
        assert isinstance(error, HeaderRejected)
        assert "cipher_null-ecb, which encrypts nothing" in str(error)
    assert not (tmp_path / "used").exists()


def test_a_header_that_is_gone_after_the_check_is_not_missed(bench: Bench, tmp_path: Path) -> None:
    bench.format()
    bench.again(_wrapped(bench, tmp_path, f"dd if=/dev/zero of={bench.path} bs=1M count=16 conv=notrunc status=none"))
    assert bench.open(A) is Key.CURRENT
    assert not bench.opens(A)


@pytest.mark.parametrize("act", ["add", "keep"])
def test_a_header_changed_after_the_check_is_written_over(bench: Bench, tmp_path: Path, act: str) -> None:
    bench.format()
    bench.add(A, B)
    null = tmp_path / "null"
    _ = null.write_bytes(_null(bench))
    bench.again(_wrapped(bench, tmp_path, f"dd if={null} of={bench.path} conv=notrunc status=none"))
    if act == "add":
        bench.add(A, C)
    else:
        bench.keep(B)
    header = bench.inspect().header
    assert (header.cipher, len(header.keyslots)) == ("aes-xts-plain64", 3 if act == "add" else 1)
    assert bench.opens(C if act == "add" else B)


def test_the_copy_that_is_opened_is_sealed(bench: Bench, tmp_path: Path) -> None:
    bench.format()
    told = tmp_path / "told"
    script = f'for last; do :; done; (echo x > "$last") 2> {told} && echo written > {told}'
    bench.again(_wrapped(bench, tmp_path, script))
    assert bench.open(A) is Key.CURRENT
    assert "not permitted" in told.read_text().lower()


# --- secrets, and the program ---


def test_no_key_is_in_an_argument_or_the_environment(bench: Bench, tmp_path: Path) -> None:
    told = tmp_path / "told"
    bench.again(_wrapped(bench, tmp_path, f'echo "$@" >> {told}; env >> {told}'))
    bench.format()
    bench.add(A, B)
    assert bench.open(B, A) is Key.CURRENT
    bench.keep(B)
    text = told.read_bytes()
    assert text.count(b"luksFormat") == text.count(b"luksAddKey") == text.count(b"luksKillSlot") == 1
    assert not any(key in text for key in (A, B, C))
    assert os.environ.keys() - {"PATH"}
    assert b"HOME=" not in text


def test_a_program_that_fails(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(script: str) -> None:
        path = tmp_path / "failing"
        _ = path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        bench.again(str(path))

    program("cat; echo 'out of   memory' >&2; exit 3")
    assert "cryptsetup luksFormat ended with exit status 3: out of memory" in str(
        bench.refused(bench.format, "cryptsetup")
    )
    program("echo 'Device x already exists.' >&2; exit 5")
    assert "Device x already exists.; is it open already?" in str(bench.refused(bench.format, "busy"))
    program("exit 0")
    assert "cryptsetup left no header" in str(bench.refused(bench.format, "cryptsetup"))
    program("kill -9 $$")
    assert "was ended by signal 9, as the kernel does if memory runs out: it wrote no error" in str(
        bench.refused(bench.format, "cryptsetup")
    )
    bench.again(str(tmp_path / "missing"))
    assert "cannot be run: No such file" in str(bench.refused(bench.format, "no_cryptsetup"))
    monkeypatch.setattr(module, "find_cryptsetup", lambda: None)
    bench.disks = Disks(images=True)
    assert "apt-get install cryptsetup-bin" in str(bench.refused(bench.inspect, "no_cryptsetup"))
    assert "apt-get install cryptsetup-bin" in str(bench.refused(bench.format, "no_cryptsetup"))
    monkeypatch.setattr(module, "_SECONDS", 0.1)
    program("exec sleep 1000")
    assert "did not end in 0.1 s" in str(bench.refused(bench.format, "timeout"))
    monkeypatch.undo()
    monkeypatch.setattr(module, "_LATE_SECONDS", 0.2)
    bench.disks = Disks(str(tmp_path / "failing"), images=True, end=time.monotonic() - 1)
    assert "did not end in 0.2 s" in str(bench.refused(bench.format, "timeout"))


def test_what_was_mapped_is_closed_the_last_one_first(bench: Bench, tmp_path: Path) -> None:
    program = tmp_path / "cryptsetup"
    closes = 'echo "$2" >>"$0.closed"; cut -d" " -f5 /proc/$$/stat >"$0.group"; [ "$2" != second ] || exit 4'  # proc(5)
    _ = program.write_text(f'#!/bin/sh\n[ "$1" = close ] || exit 0\n{closes}\n')
    bench.format()
    program.chmod(0o755)
    disks = Disks(str(program), images=True, mapping=True)
    said: list[Record] = []
    disks.close(said.append)
    assert said == []
    for mapping in ("first", "second", "third"):
        open_it = Open("storage", bench.device, mapping, (Key.CURRENT,))
        assert disks.act(open_it, {Key.CURRENT: Secret(A)}) is Key.CURRENT
    for _again in range(2):  # what cannot be closed is not tried again: whoever holds it has been told of
        disks.close(said.append)
    assert Path(f"{program}.closed").read_text().split() == ["third", "second", "first"]
    assert int(Path(f"{program}.group").read_text()) != os.getpgrp()  # no signal to the caller's group ends it
    assert [(record.event, record.fields["mapping"]) for record in said] == [
        ("disk_closed", "third"),
        ("disk_left_open", "second"),
        ("disk_closed", "first"),
    ]
    assert said[1].fields["text"] == "cryptsetup close ended with exit status 4"
    disks.opened = ["first"]
    program.unlink()
    disks.close(said.append)
    assert "No such file" in str(said[-1].fields["text"])


def test_a_program_that_is_given_up_ends_with_its_children(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    watched = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        monkeypatch.setattr(module, "_SECONDS", 2.0)
        bench.again(_wrapped(bench, tmp_path, f"exec 9> {fifo}; echo >&9; sleep 600 & wait"))
        _ = bench.refused(bench.format, "timeout")
        assert os.read(watched, 1) == b"\n"
        _ = select.select([watched], [], [], 20)
        assert os.read(watched, 1) == b""  # nobody holds the other end
    finally:
        os.close(watched)


def test_a_program_that_drops_the_old_key(bench: Bench, tmp_path: Path) -> None:
    """The next key is not confirmed yet: a disk that only it opens could be lost."""
    bench.format()
    path = tmp_path / "dropping"
    drop = f'luksAddKey*) shift $(($# - 2)); {bench.program} luksKillSlot --batch-mode "$1" 0 </dev/null;;'
    _ = path.write_text(f'#!/bin/sh\n{bench.program} "$@" || exit\ncase "$*" in {drop} esac\n')
    path.chmod(0o755)
    bench.again(str(path))
    _ = bench.refused(lambda: bench.add(A, B), "key_refused")


def test_a_program_that_makes_a_forbidden_header(bench: Bench, tmp_path: Path) -> None:
    """A future `cryptsetup` may choose otherwise: what it made is checked before it comes to the disk."""
    path = tmp_path / "other"
    _ = path.write_text(f"#!/bin/sh\nexec {bench.program} $(echo \"$@\" | sed 's/--key-size 512/--key-size 256/')\n")
    path.chmod(0o755)
    bench.again(str(path))
    _ = bench.refused(bench.format, "keyslot_key_size")


# --- block devices ---


@pytest.fixture
def loop(bench: Bench, require_program: Callable[[str], str]) -> Iterator[str]:
    """A block device over the image file."""
    with attached(bench.device, require_program) as device:
        yield device


def test_a_block_device(bench: Bench, loop: str) -> None:
    disks, keys = Disks(bench.program, mapping=False), {Key.CURRENT: Secret(A), Key.NEXT: Secret(B)}
    assert disks.inspect(loop) == Blank(loop, SIZE)
    assert disks.act(Format("storage", loop, Key.CURRENT), keys) is None
    assert disks.act(Open("storage", loop, "storage", (Key.CURRENT, Key.NEXT)), keys) is Key.CURRENT
    assert disks.act(AddKey("storage", loop, Key.NEXT), keys) is None
    assert disks.act(KeepKey("storage", loop, Key.NEXT), keys) is None
    assert disks.act(Open("storage", loop, "storage", (Key.CURRENT, Key.NEXT)), keys) is Key.NEXT
    assert bench.opens(B)
    assert not bench.opens(A)


def test_a_block_device_that_is_in_use_is_not_formatted(bench: Bench, loop: str) -> None:
    holder = os.open(loop, os.O_RDWR | os.O_EXCL)  # as a mounted file system holds it
    try:
        disks = Disks(bench.program, mapping=False)
        assert isinstance(disks.inspect(loop), Blank)
        act = Format("storage", loop, Key.CURRENT)
        error = bench.refused(lambda: disks.act(act, {Key.CURRENT: Secret(A)}), "unavailable", path=loop)
        assert "busy" in str(error)
    finally:
        os.close(holder)


def test_a_block_device_that_is_read_only_is_told(
    bench: Bench, loop: str, require_program: Callable[[str], str]
) -> None:
    program = require_program("blockdev")
    disks, act = Disks(bench.program, mapping=False), Format("storage", loop, Key.CURRENT)
    _ = subprocess.run([program, "--setro", loop], check=True)
    try:
        assert isinstance(disks.inspect(loop), Blank)
        with pytest.raises(DiskError, match=r"; if it is read-only, attach it for writing$"):
            _ = disks.act(act, {Key.CURRENT: Secret(A)})
    finally:
        _ = subprocess.run([program, "--setrw", loop], check=True)  # the next one with this number would be, too


def test_a_mapping(bench: Bench, loop: str) -> None:
    """The data that is written through it comes back from it at the next boot, and is not on the disk in the clear."""
    if "device-mapper" not in Path("/proc/misc").read_text():
        pytest.skip("the kernel has no device mapper, so no volume can be mapped (this holds with CI=true too)")
    name = f"chutes-proto-test-{os.getpid()}"
    mapped = Path("/dev/mapper") / name
    key, action = {Key.CURRENT: Secret(A)}, Open("storage", loop, name, (Key.CURRENT,))
    _ = Disks(bench.program).act(Format("storage", loop, Key.CURRENT), key)
    for boot in range(2):
        disks = Disks(bench.program)
        assert disks.act(action, key) is Key.CURRENT
        try:
            with mapped.open("r+b") as volume:
                assert boot == 0 or volume.read(len(DATA)) == DATA
                _ = volume.seek(0)
                _ = volume.write(DATA)
                os.fsync(volume.fileno())
            act = partial(disks.act, action, key)
            assert "is it open already?" in str(bench.refused(act, "busy", path=loop))
        finally:
            _ = subprocess.run([bench.program, "close", name], check=True)
    assert DATA not in bench.path.read_bytes()


def test_udev_is_used_only_if_it_listens(tmp_path: Path) -> None:
    """An initramfs leaves udev's socket behind; `cryptsetup` would wait there for what nobody does. udev itself hears
    nothing of the question: it would log each connection."""
    place = str(tmp_path / "control")
    assert environment(place)["DM_DISABLE_UDEV"] == "1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as udev:
        udev.bind(place)
        udev.listen(1)
        udev.setblocking(False)
        assert "DM_DISABLE_UDEV" not in environment(place)
        with pytest.raises(BlockingIOError):
            _ = udev.accept()
        with ExitStack() as stack:
            for _ in range(2):  # also while it has no time: its queue is full
                caller = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                caller.connect(place)
            assert "DM_DISABLE_UDEV" not in environment(place)
    assert Path(place).exists()
    assert environment(place)["DM_DISABLE_UDEV"] == "1"


# --- whether a disk has a header, for agents that open disks themselves ---


def test_whether_a_disk_has_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """True and False are for disks that may be opened and formatted; anything else is an error."""
    header = headers.both(headers.told())
    monkeypatch.setattr(module, "find_cryptsetup", lambda: None)  # it opens nothing
    assert module.has_luks_header(headers.image(tmp_path / "luks", header), images=True) is True
    assert module.has_luks_header(headers.image(tmp_path / "blank", b""), images=True) is False
    assert module.has_luks_header(headers.image(tmp_path / "cut", UNFINISHED), images=True) is False
    with pytest.raises(DiskError, match="it is not touched; wipe it") as caught:
        _ = module.has_luks_header(headers.image(tmp_path / "other", b"a file system"), images=True)
    assert caught.value.device == str(tmp_path / "other")
    with pytest.raises(HeaderRejected):
        _ = module.has_luks_header(
            headers.image(tmp_path / "bad", headers.both(headers.told(MAX_SLOTS + 1))), images=True
        )
    with pytest.raises(DiskError, match="block device"):
        _ = module.has_luks_header(headers.image(tmp_path / "image", header))
    with pytest.raises(DiskError, match="No such file"):
        _ = module.has_luks_header(str(tmp_path / "missing"), images=True)
