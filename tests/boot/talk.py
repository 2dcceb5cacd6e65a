"""The requests and answers of one boot, for the tests of the client's flows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from chutes_proto.boot._flows import BootGrant, BootSettings
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Effect, Entropy, Log, Sleep, Uptime
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Aside
from chutes_proto.wire.http import HttpRequest, HttpResponse

HOTKEY = "5DAAnrj7VHTznn2AWBemMuyBwZWs6FNFjdyVXUeYum3PTXFy"
VM = "miner-vm_1.a"
DIGEST = bytes(range(32))
NONCE = bytes(range(100, 132))
QUOTE = b"a quote, as far as the client knows"
TOKEN = "70" * 32
ROOT = "root-passphrase-canary"
STORAGE, CACHE = "5a" * 64, "c0" * 64
JSON = (("content-type", "application/json"),)

SETTINGS = BootSettings(HOTKEY, VM, DIGEST, retry=RetryPolicy(attempts=4, base=1.0, cap=8.0, deadline=100.0))
GRANT = BootGrant(HOTKEY, VM, Secret(ROOT.encode()), Secret(TOKEN.encode()))

ASK_NONCE = HttpRequest("GET", f"/servers/nonce?miner_hotkey={HOTKEY}")
ASK_PASSPHRASE = HttpRequest("GET", f"/servers/{VM}/luks?hotkey={HOTKEY}", (("x-boot-token", TOKEN),))


def answer(content: object, status: int = 200, **headers: str) -> HttpResponse:
    extra = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return HttpResponse(status, (*JSON, *extra), json.dumps(content, separators=(",", ":")).encode())


def refused(status: int, code: str = "unknown", detail: object = "No.", **headers: str) -> HttpResponse:
    return answer({"detail": detail, "code": code, "request_id": "r-1"}, status, **headers)


def nonce_answer(nonce: bytes = NONCE) -> HttpResponse:
    return answer({"nonce": nonce.hex(), "expires_at": "2026-11-25T00:10:00+00:00"})


def grant_answer(**members: object) -> HttpResponse:
    return answer({"key": ROOT, "boot_token": TOKEN, **members})


def keys_answer(**members: object) -> HttpResponse:
    return answer({"storage": STORAGE, "tdx-cache": CACHE, "in_use": ["storage"], **members})


def sync_request(formatted: Sequence[str] = ()) -> HttpRequest:
    body = {"volumes": ["storage", "tdx-cache"], "formatted": [*formatted]}
    headers = (("x-chutes-hotkey", HOTKEY), ("x-boot-token", TOKEN), *JSON)
    return HttpRequest("POST", f"/servers/{VM}/luks", headers, json.dumps(body, separators=(",", ":")).encode())


def is_attestation(effect: Effect[Any]) -> bool:
    """the boot attestation is sent"""
    request = getattr(effect, "request", None)
    return isinstance(request, HttpRequest) and request.target == "/servers/boot/attestation"


def calm() -> Aside:
    """A console nobody reads, and a clock that stands still."""
    return {Log: lambda _: None, Uptime: lambda _: 0.0, Entropy: lambda effect: bytes(effect.size)}


def patient() -> Aside:
    """The same, and every wait is over at once."""
    return {**calm(), Sleep: lambda _: None}
