// Prints vectors.json with the tree, proofs and tiles of golang.org/x/mod/sumdb/tlog, an independent implementation:
//
//	apt-get install golang-go golang-golang-x-mod-dev
//	GO111MODULE=off GOPATH=/usr/share/gocode go run vectors.go > vectors.json
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"

	"golang.org/x/mod/sumdb/tlog"
)

const size = 70000

var hashes []tlog.Hash

func read(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		out[i] = hashes[index]
	}
	return out, nil
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func path(proof []tlog.Hash) []string {
	out := []string{}
	for _, hash := range proof {
		out = append(out, hex.EncodeToString(hash[:]))
	}
	return out
}

func main() {
	reader := tlog.HashReaderFunc(read)
	for n := int64(0); n < size; n++ {
		stored, err := tlog.StoredHashes(n, []byte(fmt.Sprintf("entry %d", n)), reader)
		check(err)
		hashes = append(hashes, stored...)
	}
	roots, inclusion, consistency, tiles := [][]any{}, [][]any{}, [][]any{}, [][]any{}
	for _, n := range []int64{1, 2, 255, 256, 257, 65535, 65536, 65537, 69999, size} {
		root, err := tlog.TreeHash(n, reader)
		check(err)
		roots = append(roots, []any{n, hex.EncodeToString(root[:])})
		for _, i := range []int64{0, n / 3, n - 1} {
			proof, err := tlog.ProveRecord(n, i, reader)
			check(err)
			inclusion = append(inclusion, []any{i, n, path(proof)})
		}
		for _, old := range []int64{1, n/2 + 1, n} {
			if old > n {
				continue
			}
			proof, err := tlog.ProveTree(n, old, reader)
			check(err)
			consistency = append(consistency, []any{old, n, path(proof)})
		}
	}
	for _, tile := range tlog.NewTiles(8, 69990, size) {
		data, err := tlog.ReadTileData(tile, reader)
		check(err)
		// Its paths have the height of tiles, which tlog-tiles leaves out.
		digest := sha256.Sum256(data)
		tiles = append(tiles, []any{"tile" + tile.Path()[len("tile/8"):], hex.EncodeToString(digest[:])})
	}
	out, err := json.Marshal(map[string]any{
		"size": size, "roots": roots, "inclusion": inclusion, "consistency": consistency, "tiles": tiles,
	})
	check(err)
	os.Stdout.Write(append(out, '\n'))
}
