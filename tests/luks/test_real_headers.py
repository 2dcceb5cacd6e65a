"""Headers of the real `cryptsetup`: ours pass, others are refused, and the rewritten area opens."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from chutes_proto.errors import HeaderRejected
from chutes_proto.luks.header import HEAD_SIZE, CheckedHeader, check_header
from tests.luks import headers

FAST = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000".split()
SIZE = 40 * 1024 * 1024


class Image:
    """An image file, and the program."""

    def __init__(self, program: str, path: Path) -> None:
        self.program = program
        self.path = path

    def run(self, *arguments: str, key: bytes = b"key") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([self.program, "--batch-mode", *arguments], input=key, capture_output=True, check=False)

    def must(self, *arguments: str) -> Image:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return self

    def format(self, *options: str, pbkdf: Sequence[str] = FAST) -> Image:
        with self.path.open("wb") as file:
            _ = file.truncate(SIZE)
        kind = () if "--type" in options else ("--type", "luks2")
        return self.must("luksFormat", *kind, *pbkdf, *options, "--key-file=-", str(self.path))

    def opens(self, key: bytes = b"key") -> bool:
        return self.run("open", "--test-passphrase", "--key-file=-", str(self.path), key=key).returncode == 0

    def add(self, key: bytes) -> Image:
        file = self.path.with_suffix(".key")
        _ = file.write_bytes(key)
        return self.must("luksAddKey", *FAST, "--key-file=-", str(self.path), str(file))

    def head(self) -> bytes:
        return self.path.read_bytes()[:HEAD_SIZE]

    def check(self) -> CheckedHeader:
        header = check_header(self.head(), SIZE, str(self.path))
        assert header is not None
        return header

    def rejected(self) -> HeaderRejected:
        with pytest.raises(HeaderRejected) as caught:
            _ = self.check()
        return caught.value

    def put(self, head: bytes) -> None:
        with self.path.open("r+b") as file:
            _ = file.write(head)


@pytest.fixture
def image(require_program: Callable[[str], str], tmp_path: Path) -> Image:
    return Image(require_program("cryptsetup"), tmp_path / "disk.img")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--sector-size", "512"),
        ("--sector-size", "4096"),
        ("--hash", "sha512"),
        ("--luks2-metadata-size", "32k"),
        ("--luks2-metadata-size", "64k"),
        ("--luks2-metadata-size", "128k"),
        ("--luks2-keyslots-size", "1m"),
        ("--label", "\x1b[31mred", "--subsystem", "any"),
        ("--uuid", "6f0d31dd-0000-4000-8000-000000000001"),
    ],
    ids=" ".join,
)
def test_ours_are_taken_and_written_anew_they_open(image: Image, options: tuple[str, ...]) -> None:
    header = image.format(*options).add(b"another").check()
    assert header.whole
    assert header.keyslots == (0, 1)
    assert header.cipher == "aes-xts-plain64"
    assert header.sector_size == (512 if "512" in options else 4096)
    assert header.area[: len(header.area) // 2] == image.head()[: len(header.area) // 2]
    image.put(bytes(len(header.area)))
    assert not image.opens()
    image.put(header.area)
    assert image.opens()
    assert image.opens(b"another")
    assert not image.opens(b"no key")
    assert image.run("repair", str(image.path)).returncode == 0
    assert image.check() == header


def test_argon2id_as_deployed_images_have_it(image: Image) -> None:
    options = "--pbkdf argon2id --pbkdf-memory 64 --pbkdf-force-iterations 4 --pbkdf-parallel 1".split()
    assert image.format(pbkdf=options).check().whole


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("version", ("--type", "luks1")),
        ("cipher", ("--cipher", "aes-cbc-essiv:sha256")),
        ("keyslot_key_size", ("--key-size", "256")),
        ("af_hash", ("--hash", "sha3-256")),
        ("checksum", ("--luks2-metadata-size", "256k")),
    ],
)
def test_others_are_refused(image: Image, reason: str, options: tuple[str, ...]) -> None:
    assert image.format(*options).rejected().reason == reason


def test_another_kdf_is_refused(image: Image) -> None:
    options = "--pbkdf argon2i --pbkdf-memory 64 --pbkdf-force-iterations 4 --pbkdf-parallel 1".split()
    assert image.format(pbkdf=options).rejected().reason == "kdf"


def test_a_token_is_refused(image: Image) -> None:
    path = str(image.path)
    error = image.format().must("token", "add", "--key-description", "attacker", path).rejected()
    assert error.reason == "tokens"


def test_too_many_slots_are_refused(image: Image) -> None:
    _ = image.format()
    for number in range(8):
        _ = image.add(str(number).encode())
    assert image.rejected().reason == "keyslots"


def test_a_slot_that_is_to_be_ignored_is_refused(image: Image) -> None:
    path = str(image.path)
    assert image.format().must("config", "--priority", "ignore", "--key-slot", "0", path).rejected().reason == (
        "keyslot_priority"
    )


def test_a_re_encryption_is_refused_until_it_is_done(image: Image) -> None:
    command = ("reencrypt", *FAST, "--key-file=-", "--force-offline-reencrypt", str(image.path))
    assert image.format().must(*command, "--init-only").rejected().reason in ("requirements", "segments")
    assert image.must(*command).check().whole


def test_the_null_cipher_would_be_opened(image: Image) -> None:
    """`cryptsetup` itself is content with it: without the check a disk of the host's would be written in the clear."""
    area = image.format().head()[4096 : headers.AREA].rstrip(b"\0")
    for cipher in (b"cipher_null-ecb", b"aes-xts-plain64"):
        null = area.replace(
            b'"iv_tweak":"0","encryption":"aes-xts-plain64"', b'"iv_tweak":"0","encryption":"%s"' % cipher
        )
        assert (null == area) is (cipher != b"cipher_null-ecb")
        image.put(headers.both(null)[: 2 * headers.AREA])
        assert image.opens()
        if null != area:
            assert image.rejected().reason == "cipher"
    assert image.check().whole


def test_an_update_that_is_cut_off_counts_as_it_does_for_the_program(image: Image) -> None:
    """The newer copy counts, whichever it is, as `cryptsetup` says when it opens the disk with either key."""
    before = image.format().head()
    after = image.add(b"another").head()
    area = headers.AREA
    for head, slots in (
        (after[:area] + before[area:], (0, 1)),
        (before[:area] + after[area:], (0, 1)),
        (before[:area] + bytes(area) + after[2 * area :], (0,)),
        (bytes(area) + after[area:], (0, 1)),
    ):
        image.put(head)
        header = image.check()
        assert header.keyslots == slots
        assert not header.whole
        assert image.opens()
        assert image.opens(b"another") is (slots == (0, 1))
        image.put(header.area)
        assert image.check().whole
        assert image.opens(b"another") is (slots == (0, 1))
