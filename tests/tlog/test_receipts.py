"""A receipt proves its entry with the log's key alone, and is refused with any bit changed."""

from __future__ import annotations

import base64
import hashlib
import json
import os

import pytest
from attrs import evolve
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from chutes_proto.errors import LogError
from chutes_proto.secret import Secret
from chutes_proto.tlog import merkle
from chutes_proto.tlog.notes import Checkpoint, Signature, Signer, Verifier
from chutes_proto.tlog.proofs import Proof
from chutes_proto.tlog.receipts import FORM, LARGEST, Receipt
from chutes_proto.tlog.witness import read_cosignature, read_size
from tests.tlog.test_tlog import SIGNER, Tree, entry

OTHER = Signer(SIGNER.name, Secret(bytes(32))).verifier
STRIDE = 1 if os.environ.get("CHUTES_PROTO_SOAK") else 13
KEYS = [OTHER, SIGNER.verifier]


def receipt(index: int = 7, size: int = 300) -> Receipt:
    tree = Tree(size)
    checkpoint = Checkpoint(SIGNER.name, size, tree.root())
    proof = Proof(index, merkle.inclusion_proof(tree.read, index, size), SIGNER.sign(checkpoint.text))
    return Receipt(entry(index).decode(), proof)


def holds(data: bytes, key: str) -> bool:
    """Verify a receipt as the reference tells a stranger to, with SHA-256 and Ed25519 alone."""
    members = json.loads(data)
    head, text, lines = members["proof"].split("\n\n")
    form, first, *path = head.split("\n")
    origin, size, root = text.split("\n")
    name, identifier, public = key.split("+", 2)
    raw = base64.b64decode(public)
    assert (members["receipt"], form, raw[0]) == ("chutes-proto receipt 1", "c2sp.org/tlog-proof@v1", 1)
    assert hashlib.sha256(name.encode() + b"\n" + raw).hexdigest()[:8] == identifier
    assert origin == name
    signatures = [base64.b64decode(line.split(" ")[2]) for line in lines.splitlines() if line.split(" ")[1] == name]
    (signature,) = [each[4:] for each in signatures if each[:4].hex() == identifier]
    try:
        Ed25519PublicKey.from_public_bytes(raw[1:]).verify(signature, f"{text}\n".encode())
    except InvalidSignature:
        return False

    def sha256(prefix: int, content: bytes) -> bytes:
        return hashlib.sha256(bytes([prefix]) + content).digest()

    n, last = int(first.removeprefix("index ")), int(size) - 1
    found = sha256(0, members["entry"].encode())
    if n > last:
        return False
    for each in map(base64.b64decode, path):
        if last == 0:
            return False
        if n % 2 or n == last:
            found = sha256(1, each + found)
            while n % 2 == 0 and n:
                n, last = n // 2, last // 2
        else:
            found = sha256(1, found + each)
        n, last = n // 2, last // 2
    return last == 0 and found == base64.b64decode(root)


@pytest.mark.parametrize(("index", "size"), [(0, 1), (7, 300), (299, 300), (256, 257), (4, 7)])
def test_a_stranger_verifies_a_receipt_by_its_description_alone(index: int, size: int) -> None:
    key, data = str(SIGNER.verifier), receipt(index, size).to_bytes()
    assert holds(data, key)
    members = json.loads(data)
    head, _, note = members["proof"].partition("\n\n")
    later = json.loads(receipt(index, size + 1).to_bytes())["proof"].partition("\n\n")[2]
    for changed in (
        {"entry": members["entry"] + " "},
        {"proof": f"{head}\n\n" + note.replace(f"\n{size}\n", f"\n{size + 1}\n")},
        {"proof": f"{head}\n\n{later}"},
    ):
        assert not holds(json.dumps(members | changed).encode(), key)


def test_a_receipt_is_verified_with_the_key_alone() -> None:
    data = receipt().to_bytes()
    assert Receipt.from_bytes(data) == receipt()
    assert Receipt.from_bytes(data).verify(KEYS).size == 300
    with pytest.raises(LogError, match="not signed by a key of this log"):
        receipt().verify([OTHER])


def test_a_receipt_with_any_bit_changed_is_refused() -> None:
    data = receipt().to_bytes()
    for at in range(0, 8 * len(data), STRIDE):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(LogError):
            Receipt.from_bytes(bytes(changed)).verify(KEYS)


WITNESS = Signer("witness.example/w", Secret(b"w" * 32))
WITNESS_KEY = Verifier(WITNESS.name, WITNESS.verifier.key, is_witness=True)
AT = 1_700_000_000


def cosignature(text: str, at: int = AT) -> Signature:
    signed = WITNESS.sign(f"cosignature/v1\ntime {at}\n{text}").signatures[0].value
    return Signature(WITNESS.name, WITNESS_KEY.identifier, at.to_bytes(8, "big") + signed)


def cosigned(*signatures: Signature) -> Receipt:
    bare = receipt()
    note = bare.proof.note
    return evolve(bare, proof=evolve(bare.proof, note=note.with_signatures(signatures or [cosignature(note.text)])))


def test_cosignatures_are_verified_by_who_knows_the_witness() -> None:
    data = cosigned().to_bytes()
    assert Receipt.from_bytes(data).cosigned([WITNESS_KEY]) == (AT,)
    assert Receipt.from_bytes(data).verify(KEYS).size == 300, "who does not know it leaves its line out"
    tree, other = Tree(300), Signer("other.example/log", SIGNER.seed)
    older = Checkpoint(SIGNER.name, 299, tree.root(299)).text
    of_another_log = Checkpoint(other.name, 300, tree.root()).text
    text, namesake = receipt().proof.note.text, Verifier(WITNESS.name, bytes(32), is_witness=True)
    for refused, key, why in [
        (receipt(), WITNESS_KEY, "no signature of witness.example/w"),
        (cosigned(), namesake, "no signature of witness.example/w"),
        (cosigned(cosignature(older)), WITNESS_KEY, "does not verify"),
        (cosigned(cosignature(of_another_log)), WITNESS_KEY, "does not verify"),
        (cosigned(cosignature(text), cosignature(older)), WITNESS_KEY, "does not verify"),
        (cosigned(evolve(cosignature(text), value=b"short")), WITNESS_KEY, "does not verify"),
        (cosigned(), SIGNER.verifier, "is not the key of a witness"),
    ]:
        with pytest.raises(LogError, match=why):
            _ = refused.cosigned([key])


def test_a_cosignature_with_any_bit_changed_is_refused() -> None:
    data = cosigned().to_bytes()
    line = str(cosignature(receipt().proof.note.text)).rstrip().encode()
    begin = data.index(line)
    for at in range(8 * begin, 8 * (begin + len(line)), STRIDE):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(LogError):
            _ = Receipt.from_bytes(bytes(changed)).cosigned([WITNESS_KEY])


def test_the_answer_of_a_witness_is_one_of_today() -> None:
    note = receipt().proof.note
    mine, day = cosignature(note.text), 86_400
    namesake = evolve(mine, identifier=bytes(4))
    for now in (AT - day, AT, AT + day):
        assert read_cosignature(f"{namesake}{mine}".encode(), note, WITNESS_KEY, now) == mine
    line = str(mine).encode()
    for answer, now, why in (
        (line, AT + day + 1, "more than a day from"),
        (line, AT - day - 1, "more than a day from"),
        (line[:-1], AT, "not one of signature lines"),
        (b"", AT, "not one of signature lines"),
        (line * 9, AT, "not one of signature lines"),
        (line + bytes(8 * 1024), AT, "more than 8192 bytes"),
        (b"\xff" + line, AT, "not UTF-8"),
        (str(namesake).encode(), AT, "no signature of witness.example/w"),
        (str(cosignature("another\n")).encode(), AT, "does not verify"),
    ):
        with pytest.raises(LogError, match=why):
            _ = read_cosignature(answer, note, WITNESS_KEY, now)


def test_a_witness_names_the_size_that_it_knows() -> None:
    assert (read_size(b"0\n"), read_size(b"70000\n")) == (0, 70_000)
    for body in (b"", b"7", b"07\n", b"-1\n", b"7\n\n", b"1" + b"0" * 19 + b"\n"):
        with pytest.raises(LogError, match="names no size"):
            _ = read_size(body)


def test_a_receipt_that_is_too_large_is_not_read() -> None:
    with pytest.raises(LogError, match=f"more than {LARGEST} bytes"):
        _ = Receipt.from_bytes(b"[" * (LARGEST + 1))


@pytest.mark.parametrize("data", [b"", b"[]", b'{"entry": 1}', b"[" * 100_000, b"x" * 1_000_000])
def test_other_bytes_are_not_receipts(data: bytes) -> None:
    with pytest.raises(LogError, match=r"another file|its bytes are not|a receipt of more than"):
        Receipt.from_bytes(data)


@pytest.mark.parametrize("entry", [5, None, ["{}"]])
def test_an_entry_is_a_text(entry: object) -> None:
    members = {**json.loads(receipt().to_bytes()), "entry": entry}
    with pytest.raises(LogError):
        Receipt.from_bytes(json.dumps(members, ensure_ascii=False).encode() + b"\n").verify(KEYS)


def test_a_receipt_has_no_other_members_and_one_spelling() -> None:
    members = json.loads(receipt().to_bytes())
    for other in (members | {"more": 1}, members | {"receipt": FORM[:-1]}, dict(reversed([*members.items()]))):
        with pytest.raises(LogError, match="not those that a key server writes"):
            Receipt.from_bytes(json.dumps(other).encode() + b"\n")
