"""The boot exchange as one table: the states of a VM, the inputs that can happen, and the states they lead to.

Rules kept here:

* the table is the only place that says what follows what; the flows look their next step up by the state, and put
  every outcome to the machine before they act on it;
* an input that is not in the table raises `LocalProtocolError` and changes nothing;
* a lost answer of the attestation costs its nonce, so it begins again; a lost answer of the sync, of the volumes'
  attestation or of their confirmation costs nothing, because the same nonce and body are answered again: so it stays
  where it is and sends the same bytes;
* keys that were handed out are opened with before anything else is asked for: from `State.HANDED` no way leads back to
  the start, and a confirmation that is refused is final.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from attrs import define

from chutes_proto.errors import ChutesError, LocalProtocolError, Refusal, Unavailable
from chutes_proto.wire.codes import Code


class State(Enum):
    """The state of a VM in the exchange; the value is its name in the diagram."""

    START = "start"
    NONCE_HELD = "nonce_held"
    QUOTED = "quoted"
    TOKEN_HELD = "token_held"
    SYNCED = "synced"
    QUOTE_NONCE_HELD = "quote_nonce_held"
    REQUOTED = "requoted"
    HANDED = "handed"
    CONFIRMED = "confirmed"
    STOPPED = "stopped"


class Input(Enum):
    """An input of the exchange; the value is its label in the diagram."""

    NONCE = "nonce"
    QUOTE = "quote"
    GRANT = "grant"
    PASSPHRASE = "cache passphrase"
    KEYS = "keys"
    TWO_PHASE_GRANT = "two-phase grant"
    PAIRS = "key pairs"
    CONFIRMED = "confirmed"
    RETRY_LATER = "retry later"
    TOKEN_GONE = "token gone"
    NONCE_GONE = "nonce gone"
    FINAL = "refused"


_FINAL = {Input.FINAL: State.STOPPED}
_NONCE_GONE = {Input.NONCE_GONE: State.START}
_AGAIN = {Input.RETRY_LATER: State.START, **_FINAL}
_GRANTED = {Input.KEYS: State.SYNCED, Input.TOKEN_GONE: State.START, **_FINAL}

_ROWS: dict[State, dict[Input, State]] = {
    State.START: {Input.NONCE: State.NONCE_HELD, **_AGAIN},
    State.NONCE_HELD: {Input.QUOTE: State.QUOTED, **_AGAIN},
    State.QUOTED: {Input.GRANT: State.TOKEN_HELD, Input.TWO_PHASE_GRANT: State.QUOTE_NONCE_HELD, **_AGAIN},
    State.TOKEN_HELD: {Input.PASSPHRASE: State.TOKEN_HELD, Input.RETRY_LATER: State.TOKEN_HELD, **_GRANTED},
    State.SYNCED: {Input.RETRY_LATER: State.SYNCED, **_GRANTED},
    State.QUOTE_NONCE_HELD: {Input.QUOTE: State.REQUOTED, Input.RETRY_LATER: State.QUOTE_NONCE_HELD, **_FINAL},
    State.REQUOTED: {Input.PAIRS: State.HANDED, Input.RETRY_LATER: State.REQUOTED, **_NONCE_GONE, **_FINAL},
    State.HANDED: {Input.CONFIRMED: State.CONFIRMED, Input.RETRY_LATER: State.HANDED, **_FINAL},
    State.CONFIRMED: {},
    State.STOPPED: {},
}
TRANSITIONS: Mapping[State, Mapping[Input, State]] = MappingProxyType(
    {state: MappingProxyType(row) for state, row in _ROWS.items()}
)
"""The table. `Input.KEYS` redeems the token, `Input.PASSPHRASE` does not; a sync that is repeated is `KEYS` again."""


@define
class Exchange:
    """The machine: one VM's place in the table, which only `take` changes."""

    state: State = State.START

    def take(self, happened: Input) -> State:
        """Move to the state that the table says, and return it. Raises `LocalProtocolError`, then changes nothing."""
        following = TRANSITIONS[self.state].get(happened)
        if following is None:
            raise LocalProtocolError(f"{happened.value!r} cannot happen to a VM in state {self.state.value}")
        self.state = following
        return following


_OTHERS_TOKEN = (Code.HOTKEY_MISMATCH, Code.VM_NAME_MISMATCH)


def may_pass(refusal: Refusal) -> bool:
    """Whether the same request may succeed later: after 5xx and 429.

    And after 408, of a request that did not arrive as a whole (RFC 9110, section 15.5.9).
    """
    return isinstance(refusal, Unavailable) or refusal.status == Code.REQUEST_TIMEOUT.status


def failure(state: State, error: ChutesError) -> Input:
    """Decide which input a failed step is: the one rule of which errors are final and which are tried again.

    A refusal is final unless it `may_pass`, but for a boot token or a quote nonce that the server no longer accepts.
    Everything else may succeed later: no answer, an answer that is not the protocol, no quote.
    """
    if not isinstance(error, Refusal) or may_pass(error):
        return Input.RETRY_LATER
    gone = next((gone for gone in (Input.TOKEN_GONE, Input.NONCE_GONE) if gone in TRANSITIONS[state]), Input.FINAL)
    return gone if error.status == 401 and error.code not in _OTHERS_TOKEN else Input.FINAL
