"""The boot exchange as one table: the states a VM is in, what can happen to it, and where that leads.

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

from chutes_proto.errors import ChutesError, LocalProtocolError, Refusal, Unavailable
from chutes_proto.wire.codes import Code


class State(Enum):
    """Where a VM stands; the value is the name in the documentation."""

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
    """What can happen; the value is its name in the documentation."""

    NONCE = "nonce"
    QUOTE = "quote"
    GRANT = "grant"
    PASSPHRASE = "cache passphrase"
    KEYS = "keys"
    TWO_PHASE_GRANT = "two-phase grant"
    PAIRS = "key pairs"
    CONFIRMED = "confirmed"
    NOT_NOW = "not now"
    TOKEN_GONE = "token gone"
    NONCE_GONE = "nonce gone"
    FINAL = "refused"


_AGAIN = {Input.NOT_NOW: State.START, Input.FINAL: State.STOPPED}
_GRANTED = {Input.KEYS: State.SYNCED, Input.TOKEN_GONE: State.START, Input.FINAL: State.STOPPED}

TRANSITIONS: Mapping[State, Mapping[Input, State]] = MappingProxyType(
    {
        State.START: MappingProxyType({Input.NONCE: State.NONCE_HELD, **_AGAIN}),
        State.NONCE_HELD: MappingProxyType({Input.QUOTE: State.QUOTED, **_AGAIN}),
        State.QUOTED: MappingProxyType(
            {Input.GRANT: State.TOKEN_HELD, Input.TWO_PHASE_GRANT: State.QUOTE_NONCE_HELD, **_AGAIN}
        ),
        State.TOKEN_HELD: MappingProxyType(
            {Input.PASSPHRASE: State.TOKEN_HELD, Input.NOT_NOW: State.TOKEN_HELD, **_GRANTED}
        ),
        State.SYNCED: MappingProxyType({Input.NOT_NOW: State.SYNCED, **_GRANTED}),
        State.QUOTE_NONCE_HELD: MappingProxyType(
            {Input.QUOTE: State.REQUOTED, Input.NOT_NOW: State.QUOTE_NONCE_HELD, Input.FINAL: State.STOPPED}
        ),
        State.REQUOTED: MappingProxyType(
            {
                Input.PAIRS: State.HANDED,
                Input.NOT_NOW: State.REQUOTED,
                Input.NONCE_GONE: State.START,
                Input.FINAL: State.STOPPED,
            }
        ),
        State.HANDED: MappingProxyType(
            {Input.CONFIRMED: State.CONFIRMED, Input.NOT_NOW: State.HANDED, Input.FINAL: State.STOPPED}
        ),
        State.CONFIRMED: MappingProxyType({}),
        State.STOPPED: MappingProxyType({}),
    }
)
"""The table. `Input.KEYS` spends the token, `Input.PASSPHRASE` does not; a sync repeated as it was is `KEYS` again."""


class Exchange:
    """The machine: one VM's place in the table."""

    def __init__(self, state: State = State.START) -> None:
        self._state = state

    @property
    def state(self) -> State:
        """Where the VM stands now."""
        return self._state

    def take(self, happened: Input) -> State:
        """Go where the table says, and say where that is. Raises `LocalProtocolError`, changing nothing."""
        following = TRANSITIONS[self._state].get(happened)
        if following is None:
            raise LocalProtocolError(f"{happened.value!r} cannot happen to a VM in state {self._state.value}")
        self._state = following
        return following


_OTHERS_TOKEN = (Code.HOTKEY_MISMATCH, Code.VM_NAME_MISMATCH)


def failure(state: State, error: ChutesError) -> Input:
    """Which input a failed step is: the one rule of what is final and what is tried again.

    What a server answers with a 4xx other than 429 is final, but for a boot token or a quote nonce that it no longer
    takes. Everything else may go better next time: 5xx, 429, no answer, an answer that is not the protocol, no quote.
    """
    if not isinstance(error, Refusal) or isinstance(error, Unavailable):
        return Input.NOT_NOW
    gone = next((gone for gone in (Input.TOKEN_GONE, Input.NONCE_GONE) if gone in TRANSITIONS[state]), Input.FINAL)
    return gone if error.status == 401 and error.code not in _OTHERS_TOKEN else Input.FINAL
