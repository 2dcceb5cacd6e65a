"""The audit log's formats: against the vectors of others, against each other, and against bytes that are none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError, LogError
from chutes_proto.secret import Secret
from chutes_proto.tlog import merkle, tiles
from chutes_proto.tlog.merkle import leaf_hash
from chutes_proto.tlog.notes import Checkpoint, Note, Signer, Verifier, check_name, open_checkpoint

# Certificate Transparency's own tests of RFC 6962 use these leaves and roots.
LEAVES = [
    bytes.fromhex(text)
    for text in ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
]
ROOTS = """
    6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d
    fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125
    aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77
    d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7
    4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4
    76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef
    ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c
    5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328
""".split()

# The example of Go's package golang.org/x/mod/sumdb/note.
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
    "\N{EM DASH} PeterNeumann "
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)

SIGNER = Signer("keys.example/audit", Secret(bytes(range(32))))
NO_HASH = bytes(32)


class Tree:
    """A tree as tiles, grown in steps."""

    def __init__(self, size: int = 0) -> None:
        self.size = 0
        self.tiles: dict[tuple[int, int], bytes] = {}
        self.grow(size)

    def grow(self, count: int) -> None:
        partial = [self.tiles[place.level or 0, place.number] for place in tiles.edge(self.size)]
        leaves = [leaf_hash(entry(self.size + number)) for number in range(count)]
        self.tiles |= tiles.grow(self.size, partial, leaves)
        self.size += count

    @property
    def read(self) -> merkle.Read:
        return tiles.reader(lambda level, number: self.tiles[level, number])

    def root(self, size: int | None = None) -> bytes:
        return merkle.root_hash(self.read, self.size if size is None else size)


@cache
def large() -> Tree:
    return Tree(70_000)


def entry(index: int) -> bytes:
    return f"entry {index}".encode()


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962's definition, word for word."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def test_roots_are_those_of_certificate_transparency() -> None:
    for size, root in enumerate(ROOTS, 1):
        hashes = tiles.grow(0, [], map(leaf_hash, LEAVES[:size]))
        read = tiles.reader(lambda level, number, hashes=hashes: hashes[level, number])  # type: ignore[misc]
        assert merkle.root_hash(read, size).hex() == root
    assert merkle.EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_every_proof_of_a_small_tree_is_verified_and_no_altered_one() -> None:
    tree = Tree(70)
    leaves = [leaf_hash(entry(index)) for index in range(70)]
    roots = [merkle.EMPTY_ROOT, *(naive_root(leaves[:size]) for size in range(1, 71))]
    for size in range(71):
        assert tree.root(size) == roots[size]
        for index in range(size):
            path = merkle.inclusion_proof(tree.read, index, size)
            merkle.verify_inclusion(leaves[index], index, size, path, roots[size])
        for old in range(size + 1):
            path = merkle.consistency_proof(tree.read, old, size)
            merkle.verify_consistency(old, roots[old], size, roots[size], path)
    size, index = 70, 41
    path = merkle.inclusion_proof(tree.read, index, size)
    for wrong in (path[:-1], (*path, path[0]), (path[1], path[0], *path[2:]), (bytes(32), *path[1:]), ()):
        refused(merkle.verify_inclusion, leaves[index], index, size, wrong, roots[size])
    refused(merkle.verify_inclusion, leaves[index], index + 1, size, path, roots[size])
    refused(merkle.verify_inclusion, leaves[index], index, index, path, roots[size])
    for old in (32, 41, 64):
        path = merkle.consistency_proof(tree.read, old, size)
        for wrong in (path[:-1], (*path, path[0]), (bytes(32), *path[1:]), ()):
            refused(merkle.verify_consistency, old, roots[old], size, roots[size], wrong)
        refused(merkle.verify_consistency, old, roots[old + 1], size, roots[size], path)
    path = merkle.consistency_proof(tree.read, 32, 64)
    refused(merkle.verify_consistency, 32, roots[32], 70, roots[64], path, why="too few hashes")
    refused(merkle.verify_consistency, 70, roots[70], 70, roots[69], ())
    refused(merkle.verify_consistency, 0, roots[0], 70, roots[70], (bytes(32),))
    refused(merkle.verify_consistency, 0, roots[1], 70, roots[70], (), why="two logs of 0 entries")
    refused(merkle.verify_consistency, 70, roots[70], 69, roots[69], ())
    refused(merkle.inclusion_proof, tree.read, 70, 70)
    refused(merkle.consistency_proof, tree.read, 70, 69)


def test_an_entry_is_proven_at_its_own_index_alone_and_a_subtree_is_no_entry() -> None:
    tree, leaves = Tree(4), [leaf_hash(entry(index)) for index in range(4)]
    path = merkle.inclusion_proof(tree.read, 1, 4)
    for index in (5, 9, -3):  # the path from there would be the same
        refused(merkle.verify_inclusion, leaves[1], index, 4, path, tree.root(4))
    refused(merkle.verify_inclusion, merkle.node_hash(*leaves[:2]), 1, 4, path[1:], tree.root(4))
    refused(merkle.verify_inclusion, tree.root(4), 0, 4, (), tree.root(4))
    refused(merkle.verify_inclusion, leaves[0], 0, 4, leaves[1:2], tree.root(2), why="too few hashes")
    above = merkle.node_hash(*leaves[:2])
    refused(merkle.verify_inclusion, leaves[2], 0, 2, (leaves[3], above), tree.root(4), why="too many hashes")


def test_proofs_are_those_of_go() -> None:
    """The vectors are made by golang.org/x/mod/sumdb/tlog; see vectors.go beside them."""
    vectors = json.loads((Path(__file__).parent / "vectors.json").read_bytes())
    tree = large()
    assert tree.size == vectors["size"]
    for size, root in vectors["roots"]:
        assert tree.root(size).hex() == root
    for index, size, path in vectors["inclusion"]:
        assert [each.hex() for each in merkle.inclusion_proof(tree.read, index, size)] == path
    for old, size, path in vectors["consistency"]:
        assert [each.hex() for each in merkle.consistency_proof(tree.read, old, size)] == path
    for path, digest in vectors["tiles"]:
        place = tiles.Place.parse(path)
        assert place.level is not None
        hashes = tree.tiles[place.level, place.number][: 32 * place.width]
        assert hashlib.sha256(hashes).hexdigest() == digest, path


def test_a_tree_that_grows_in_steps_is_the_one_that_grows_at_once() -> None:
    stepwise, at_once = Tree(), large()
    for count in (1, 254, 1, 1, 255, 256, 3000, 62_000, 4232):
        stepwise.grow(count)
    assert stepwise.tiles == at_once.tiles
    assert [str(place) for place in tiles.edge(70_000)] == ["tile/0/273.p/112", "tile/1/001.p/17", "tile/2/000.p/1"]
    assert len(tiles.places(70_000)) == 273 + 4  # the specification's example
    assert [str(place) for place in tiles.places(256)] == ["tile/0/000", "tile/1/000.p/1"]
    assert str(tiles.places(70_000, since=512)[0]) == "tile/0/002"


def test_a_tile_that_lacks_hashes_is_refused() -> None:
    tree = Tree(300)
    tree.tiles[0, 1] = tree.tiles[0, 1][:-1]
    refused(tree.root)
    refused(tree.grow, 1)


@pytest.mark.parametrize(
    ("place", "path"),
    [
        (tiles.Place(0, 1234067), "tile/0/x001/x234/067"),
        (tiles.Place(63, 0, 255), "tile/63/000.p/255"),
        (tiles.Place(None, 1000, 1), "tile/entries/x001/000.p/1"),
    ],
)
def test_paths_of_tiles(place: tiles.Place, path: str) -> None:
    assert (str(place), tiles.Place.parse(path)) == (path, place)


@pytest.mark.parametrize(
    "path",
    "tile/64/000 tile/00/000 tile/0/0 tile/0/x000/001 tile/0/000.p/256 tile/0/000.p/0 tile/0/000.p/01 tile/x/000"
    " /tile/0/000 tile/0/000/ tile/0/001/000 tile/entries/000.p/300 tile/0/../000 tile/0/٠٠٠".split(),
)
def test_other_texts_are_not_paths_of_tiles(path: str) -> None:
    refused(tiles.Place.parse, path)


def test_bundles() -> None:
    entries = (b"", b"one", b"x" * tiles.LARGEST_ENTRY)
    assert tiles.unbundle(tiles.bundle(entries)) == entries
    for data in (b"\0", b"\0\1", tiles.bundle(entries)[:-1], tiles.bundle([b""] * 257)):
        refused(tiles.unbundle, data)


def test_a_note_of_go_is_verified() -> None:
    verifier = Verifier.parse(GO_KEY)
    note = Note.parse(GO_NOTE.encode())
    verifier.verify(note)
    assert (str(note), str(verifier)) == (GO_NOTE, GO_KEY)
    refused(verifier.verify, Note.parse(GO_NOTE.replace("problem", "Problem").encode()))


def test_a_checkpoint_of_the_specification_is_read() -> None:
    text = (
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "\N{EM DASH} example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGz"
        "Gku9nTo+zyWE+xeMcTOAYQ8=\n"
    )
    note = Note.parse(text.encode())
    checkpoint = Checkpoint.of(note)
    assert (checkpoint.origin, checkpoint.size) == ("example.com/behind-the-sofa", 20852163)
    assert (str(note), checkpoint.text) == (text, note.text)


@pytest.mark.parametrize("name", ["", "two words", "a+b", "a\n", "x" * 256])
def test_other_names_are_not_those_of_logs(name: str) -> None:
    with pytest.raises(ConfigurationError, match="one word"):
        check_name(name)


def test_a_checkpoint_is_of_one_log_and_key() -> None:
    checkpoint = Checkpoint(SIGNER.name, 3, bytes(32))
    data = str(SIGNER.sign(checkpoint.text)).encode()
    assert open_checkpoint(data, SIGNER.verifier)[0] == checkpoint
    assert Verifier.parse(str(SIGNER.verifier)) == SIGNER.verifier
    other_key = Signer(SIGNER.name, Secret(bytes(32)))
    refused(open_checkpoint, data, other_key.verifier, why="no signature of keys.example/audit")
    other_log = Signer("keys.example/other", SIGNER.seed)
    refused(open_checkpoint, data, other_log.verifier, why="checkpoint of another log")
    forged = str(Note(checkpoint.text, other_log.sign(checkpoint.text).signatures)).encode()
    refused(open_checkpoint, forged, SIGNER.verifier, why="no signature")
    assert "***" not in repr(SIGNER)
    assert "seed" not in repr(SIGNER)


def test_a_checkpoint_with_one_bit_changed_is_refused() -> None:
    checkpoint = Checkpoint(SIGNER.name, 300, Tree(300).root())
    data = str(SIGNER.sign(checkpoint.text)).encode()
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        refused(open_checkpoint, bytes(flipped), SIGNER.verifier)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys.example/audit\n3", "keys.example/audit\n03"),
        ("keys.example/audit\n3", "keys.example/audit\n-3"),
        ("keys.example/audit\n3", "keys.example/audit\n9223372036854775808"),
        ("keys.example/audit\n3", "\n3"),
        ("keys.example/audit\n3", "keys.example\taudit\n3"),
        ("A=\n\n", "A=\nextension\n\n"),
        ("A=\n\n", "A\n\n"),
        ("AAA=\n\n", "AAB=\n\n"),
        ("A=\n\n", "A=\r\n\n"),
        ("\n\n\N{EM DASH}", "\n\N{EM DASH}"),
        ("\N{EM DASH} keys", "- keys"),
        ("\N{EM DASH} keys", "\N{EM DASH} ke+ys"),
        ("\N{EM DASH} keys", "\N{EM DASH}  keys"),
    ],
)
def test_other_texts_are_not_checkpoints(old: str, new: str) -> None:
    """Before a signature is looked at, which would be wrong as well."""
    text = str(SIGNER.sign(Checkpoint(SIGNER.name, 3, bytes(32)).text))
    assert old in text
    refused(lambda: Checkpoint.of(Note.parse(text.replace(old, new, 1).encode())))


def test_too_much_is_refused() -> None:
    note = SIGNER.sign("text\n")
    refused(Note.parse, str(Note(note.text, note.signatures * 65)).encode(), why="more than 64 signatures")
    refused(Note.parse, b"x" * 70_000, why="more than 65536 bytes")
    refused(Note.parse, b"\xff\n\n", why="not UTF-8")


@pytest.mark.parametrize(
    "text", ["", "name", "na me+00000000+AQ==", "PeterNeumann+c74f20a4" + GO_KEY[21:], GO_KEY + "="]
)
def test_other_texts_are_not_verifier_keys(text: str) -> None:
    with pytest.raises(ConfigurationError):
        _ = Verifier.parse(text)


def refused(call: Callable[..., object], *values: object, why: str = ".") -> None:
    with pytest.raises(LogError, match=why):
        _ = call(*values)
