// Verifies an exported log, and proofs of its entries, with nothing of this project: Go's own client of transparency
// logs, golang.org/x/mod/sumdb/note and /tlog, which guards the downloads of every Go program.
//
//	apt-get install golang-go golang-golang-x-mod-dev
//	GO111MODULE=off GOPATH=/usr/share/gocode go run client.go LOG-DIRECTORY KEY [PROOF…]
package main

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// openCheckpoint is tlog.ParseTree, whose first line is fixed to that of Go's log.
func openCheckpoint(text []byte, key string) tlog.Tree {
	verifier, err := note.NewVerifier(key)
	check(err)
	opened, err := note.Open(text, note.VerifierList(verifier))
	check(err)
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() {
		check(fmt.Errorf("not a checkpoint of %s", verifier.Name()))
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	check(err)
	root, err := tlog.ParseHash(lines[2])
	check(err)
	return tlog.Tree{N: size, Hash: root}
}

// directory reads tiles. Go's paths have the height of tiles, which tlog-tiles leaves out.
type directory string

func (d directory) path(tile tlog.Tile) string {
	return filepath.Join(string(d), "tile"+strings.TrimPrefix(tile.Path(), "tile/8"))
}

func (d directory) Height() int                     { return 8 }
func (d directory) SaveTiles([]tlog.Tile, [][]byte) {}
func (d directory) ReadTiles(tiles []tlog.Tile) (all [][]byte, err error) {
	for _, tile := range tiles {
		data, err := os.ReadFile(d.path(tile))
		if err != nil {
			return nil, err
		}
		all = append(all, data)
	}
	return all, nil
}

// entries reads a bundle: each entry has its length, 16 bits, before it.
func (d directory) entries(tile tlog.Tile) (all [][]byte) {
	name := strings.Replace(d.path(tile), "/tile/0/", "/tile/entries/", 1)
	data, err := os.ReadFile(name)
	check(err)
	for len(data) > 0 {
		if len(data) < 2 || len(data)-2 < int(binary.BigEndian.Uint16(data)) {
			check(fmt.Errorf("%s is cut", name))
		}
		length := int(binary.BigEndian.Uint16(data))
		all, data = append(all, data[2:2+length]), data[2+length:]
	}
	if len(all) != tile.W {
		check(fmt.Errorf("%s has %d entries, not %d", name, len(all), tile.W))
	}
	return all
}

func verifyLog(d directory, tree tlog.Tree) {
	reader := tlog.TileHashReader(tree, d) // checks each tile against the checkpoint
	for first := int64(0); first < tree.N; first += 256 {
		tile := tlog.Tile{H: 8, L: 0, N: first / 256, W: int(min(256, tree.N-first))}
		for at, entry := range d.entries(tile) {
			index := first + int64(at)
			hashes, err := reader.ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
			check(err)
			if hashes[0] != tlog.RecordHash(entry) {
				check(fmt.Errorf("entry %d is not that of the tree", index))
			}
		}
	}
}

func verifyProof(path string, key string) {
	data, err := os.ReadFile(path)
	check(err)
	head, checkpoint, _ := strings.Cut(string(data), "\n\n")
	tree := openCheckpoint([]byte(checkpoint), key)
	lines := strings.Split(head, "\n")
	if len(lines) < 3 || lines[0] != "c2sp.org/tlog-proof@v1" || !strings.HasPrefix(lines[1], "extra ") || !strings.HasPrefix(lines[2], "index ") {
		check(fmt.Errorf("not a tlog-proof"))
	}
	entry, err := base64.StdEncoding.Strict().DecodeString(lines[1][len("extra "):])
	check(err)
	index, err := strconv.ParseInt(lines[2][len("index "):], 10, 64)
	check(err)
	proof := tlog.RecordProof{}
	for _, line := range lines[3:] {
		hash, err := base64.StdEncoding.Strict().DecodeString(line)
		check(err)
		if len(hash) != tlog.HashSize {
			check(fmt.Errorf("a hash of %d bytes", len(hash)))
		}
		proof = append(proof, tlog.Hash(hash))
	}
	check(tlog.CheckRecord(proof, tree.N, tree.Hash, index, tlog.RecordHash(entry)))
	fmt.Printf("entry %d is in the log of %d entries\n", index, tree.N)
}

func main() {
	d, key := directory(os.Args[1]), os.Args[2]
	checkpoint, err := os.ReadFile(filepath.Join(string(d), "checkpoint"))
	check(err)
	tree := openCheckpoint(checkpoint, key)
	verifyLog(d, tree)
	fmt.Printf("the log of %d entries is whole\n", tree.N)
	for _, path := range os.Args[3:] {
		verifyProof(path, key)
	}
}
