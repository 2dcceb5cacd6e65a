"""A model of a key server: the few rules that a client relies on, and the moods that it must survive.

A nonce is good once, a token dies, a sync that was taken is answered again to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.boot import talk

VOLUMES = ("storage", "tdx-cache")
CANARY = "c4na5y"
K3S_KEY = f"{CANARY}/k3s".ljust(43, "A") + "="
WELL = "well"
BAD_MOODS = (500, 502, 503, 429, "garbage", "empty", "redirect", "endless wait", "token dies", "echo")
FINAL_MOODS = (400, 403, 404, 409, 422)


class ModelServer:
    """One VM's server; every secret it gives away begins with the canary."""

    def __init__(self, moods: Iterator[object], *, in_use: Sequence[str] = (), two_phase: bool = False) -> None:
        self.confirmed: dict[str, object] | None = None
        self._two_phase = two_phase
        self._moods = moods
        self._in_use = [*in_use]
        self._count = 0
        self._nonces = set[str]()
        self._tokens = dict[str, bytes | None]()

    def __call__(self, request: HttpRequest) -> HttpResponse:
        mood = next(self._moods, WELL)
        if mood == "garbage":
            return HttpResponse(200, talk.JSON, f'{{"key":"{CANARY}'.encode())
        if mood == "empty":
            return talk.answer({"key": "", "boot_token": CANARY, "storage": "", "in_use": [], "nonce": CANARY})
        if mood == "redirect":
            return HttpResponse(307, (("location", "http://elsewhere.example/"),))
        if mood == "endless wait":
            return talk.refused(503, "busy", retry_after="99999")
        if mood == "token dies":
            self._tokens.clear()
        if mood == "echo":  # a server that repeats what it was sent, wherever it can
            text = str(request.header_values("x-boot-token")) + request.body.decode()
            return talk.answer({"detail": text, "code": text, "request_id": text}, 500)
        if isinstance(mood, int):
            return talk.refused(mood, retry_after="0")
        return self._serve(request)

    def _serve(self, request: HttpRequest) -> HttpResponse:
        self._count += 1
        if request.target.startswith("/servers/nonce"):
            nonce = hashlib.sha256(b"nonce %d" % self._count).hexdigest()
            self._nonces.add(nonce)
            return talk.nonce_answer(bytes.fromhex(nonce))
        if request.target == "/servers/boot/attestation":
            (nonce,) = request.header_values("x-chutes-nonce")
            if nonce not in self._nonces:
                return talk.refused(401, "nonce_invalid")
            self._nonces.remove(nonce)
            token = hashlib.sha256(b"token %d" % self._count).hexdigest()
            self._tokens[token] = None
            if self._two_phase:
                return talk.answer({"key": f"{CANARY}-root", "boot_token": None, "luks_quote_nonce": token})
            return talk.answer({"key": f"{CANARY}-root", "boot_token": token})
        if request.target.endswith("/luks/confirm"):
            self.confirmed = json.loads(request.body)["volumes"]
            results = {name: {"result": "promoted"} for name in json.loads(request.body)["volumes"]}
            return talk.answer({"status": "confirmed", "volumes": results})
        if request.target.endswith("/luks/attest"):
            return self._hand_out(request)
        (token,) = request.header_values("x-boot-token")
        if token not in self._tokens or self._tokens[token] not in (None, request.body):
            return talk.refused(401, "boot_token_invalid")
        if request.method == "GET":
            return talk.answer({"passphrase": f"{CANARY}-{VOLUMES[0]}"})
        self._tokens[token] = request.body
        return talk.answer(
            {**{name: f"{CANARY}-{name}" for name in json.loads(request.body)["volumes"]}, "in_use": self._in_use}
        )

    def _hand_out(self, request: HttpRequest) -> HttpResponse:
        (nonce,) = request.header_values("x-quote-nonce")
        if nonce not in self._tokens or self._tokens[nonce] not in (None, request.body):
            return talk.refused(401, "quote_nonce_invalid")
        self._tokens[nonce] = request.body
        pairs = {
            name: {"current": f"{CANARY}-{name}", "next": f"{CANARY}-{name}-next"}
            for name in json.loads(request.body)["volumes"]
        }
        confirm = hashlib.sha256(nonce.encode()).hexdigest()
        members = {"volumes": pairs, "confirm_nonce": confirm, "k3s_encryption_key": K3S_KEY}
        return talk.answer({**members, "in_use": self._in_use})

    def tokens(self) -> set[str]:
        return {*self._tokens}
