"""A transparency log on bytes: the Merkle tree of RFC 6962 in the formats of C2SP, without I/O.

`merkle` has hashes and proofs, `tiles` the tree as files or rows (tlog-tiles), `notes` signed notes and checkpoints
(signed-note, tlog-checkpoint), `proofs` a proof that needs nothing else (tlog-proof). Each parser is
strict: a text has one form, so that no two texts mean the same.
"""
