"""Tokens of a granted boot: issued for one MAC, and recognised without the store.

A boot token, a quote nonce or a confirm nonce is 32 bytes, on the wire 64 lowercase hex digits::

    0   random               16 bytes
    16  tag                  HMAC-SHA-256 of these, cut to 16 bytes

The store decides what a token is good for, by the SHA-256 of its text. The tag decides one thing before: while the
store does not answer, a request with a token of ours waits apart from those of strangers, who cannot make one. MAC keys
come from the key-encryption keys by label, so all processes of one server agree. A token without a tag, of a release
before these, is valid too, and waits among strangers.
"""

from __future__ import annotations

from hmac import compare_digest
from typing import Final

from attrs import frozen

from chutes_proto.keys.vault import Vault
from chutes_proto.secret import Secret
from chutes_proto.server._tags import TAG_SIZE, TagKey

RANDOM_SIZE: Final = 16

_LABEL: Final = "chutes-proto token v1"
_SIZE: Final = 32
_TEXT: Final = 2 * (RANDOM_SIZE + TAG_SIZE)


@frozen
class _Keys:
    """The keys of one KEK: of tags, and of confirm nonces."""

    tag: TagKey
    confirm: TagKey


@frozen
class TokenMint:
    """Issues and recognises tokens. ``keys`` has those of the current KEK first."""

    keys: tuple[_Keys, ...]

    @classmethod
    def of(cls, vault: Vault) -> TokenMint:
        """The mint whose MAC keys come from the live key-encryption keys of ``vault``."""
        derived = [key.reveal() for _, key in vault.derive(_LABEL, 2 * _SIZE)]
        return cls(tuple(_Keys(TagKey(Secret(each[:_SIZE])), TagKey(Secret(each[_SIZE:]))) for each in derived))

    def issue(self, random: bytes) -> Secret:
        """Make a token, as text, from `RANDOM_SIZE` fresh bytes."""
        return _token(self.keys[0], random)

    def confirm_nonces(self, quote_nonce: bytes) -> tuple[Secret, ...]:
        """The confirm nonces that belong to a quote nonce, one under each live KEK, the current one's first.

        So a lost answer can be given again although no secret is kept.
        """
        return tuple(_token(keys, keys.confirm.tag(quote_nonce)[:RANDOM_SIZE]) for keys in self.keys)

    def recognises(self, token: bytes) -> bool:
        """Whether ``token``, 64 hex digits, was issued by a server with one of these KEKs, perhaps long ago."""
        if len(token) != _TEXT:
            return False
        value = bytes.fromhex(token.decode("ascii"))
        random, tag = value[:RANDOM_SIZE], value[RANDOM_SIZE:]
        return any(compare_digest(keys.tag.tag(random), tag) for keys in self.keys)


def _token(keys: _Keys, random: bytes) -> Secret:
    return Secret((random + keys.tag.tag(random)).hex().encode("ascii"))
