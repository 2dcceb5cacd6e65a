"""The closed list of ``code`` words in an error's answer, with the fixed status of each.

A client may branch on a code; the words never change their meaning. They are coarse on purpose: what exactly was wrong
with a quote stands in the operator's log under the verifier's own codes (``quote/_errors.py``).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

NO_CODE: Final = "unknown"
"""A client's code for an error without one: a proxy's page, or an answer of a server of another make."""


class Code(StrEnum):
    """One word per kind of refusal: its value goes on the wire, ``status`` with it, ``meaning`` into the documents."""

    status: int
    meaning: str

    def __new__(cls, value: str, status: int, meaning: str) -> Code:
        self = str.__new__(cls, value)
        self._value_ = value
        self.status = status
        self.meaning = meaning
        return self

    BAD_REQUEST = "bad_request", 400, "not HTTP/1.1 as RFC 9112 has it, or a header given twice"
    BOOT_TOKEN_REQUIRED = "boot_token_required", 400, "the X-Boot-Token header is missing"
    HOTKEY_REQUIRED = "hotkey_required", 400, "no hotkey in header or query"
    HOTKEY_CONFLICT = "hotkey_conflict", 400, "header and query name different hotkeys"
    VOLUMES_REQUIRED = "volumes_required", 400, "volumes is empty"
    VOLUME_UNKNOWN = "volume_unknown", 400, "a volume that this server does not serve"
    REKEY_NOT_SUBSET = "rekey_not_subset", 400, "rekey names a volume that volumes does not"
    HOST_INVALID = "host_invalid", 400, "the host is not a public address, nor a name that has only public ones"
    EVIDENCE_UNAVAILABLE = "evidence_unavailable", 400, "the host that registers does not give its evidence when asked"
    GPU_INVALID = "gpu_invalid", 400, "a declared GPU is not what the GPU table or the measurement profile says"
    NONCE_MISMATCH = "nonce_mismatch", 400, "the quote's report data holds another nonce"
    NONCE_INVALID = "nonce_invalid", 401, "not a nonce of this server, expired, consumed, or bound to another caller"
    CLIENT_CERTIFICATE_REQUIRED = "client_certificate_required", 401, "no client certificate, or a key not accepted"
    BOOT_TOKEN_INVALID = "boot_token_invalid", 401, "unknown, expired or redeemed boot token, or one of another key"
    HOTKEY_MISMATCH = "hotkey_mismatch", 401, "the boot token is another hotkey's"
    VM_NAME_MISMATCH = "vm_name_mismatch", 401, "the boot token is another VM's"
    QUOTE_NONCE_INVALID = "quote_nonce_invalid", 401, "the quote nonce is missing, unknown, expired or consumed"
    CONFIRM_NONCE_INVALID = "confirm_nonce_invalid", 401, "the confirm nonce is missing, expired or another boot's"
    SIGNATURE_INVALID = "signature_invalid", 401, "the hotkey signature is missing or does not hold"
    SIGNATURE_STALE = "signature_stale", 401, "X-Chutes-Nonce is not the present time in unix seconds"
    HOTKEY_UNKNOWN = "hotkey_unknown", 401, "the signature holds, and its hotkey is not known here"
    HOTKEY_BLACKLISTED = "hotkey_blacklisted", 401, "the operator has blacklisted the hotkey; the text says why"
    QUOTE_MALFORMED = "quote_malformed", 403, "not base64, or not a TDX quote"
    CERTIFICATE_MISMATCH = "certificate_mismatch", 403, "the quote's report data binds another TLS key"
    QUOTE_REJECTED = "quote_rejected", 403, "the quote or its platform does not verify"
    TCB_REJECTED = "tcb_rejected", 403, "the platform's TCB status or an advisory is not accepted"
    ATTRIBUTES_REJECTED = "attributes_rejected", 403, "debug, or TD attributes that are not accepted"
    MEASUREMENT_MISMATCH = "measurement_mismatch", 403, "no accepted measurement profile; the text names the register"
    HOTKEY_REJECTED = "hotkey_rejected", 403, "not a canonical SS58 address of prefix 42, or not known here"
    REVOKED = "revoked", 403, "the operator has revoked the VM, its hotkey or its platform; the text says which"
    PLATFORM_MISMATCH = "platform_mismatch", 403, "this VM's name belongs to another platform or owner"
    VERSION_REJECTED = "version_rejected", 403, "a version of the image that may not boot any more; the text names both"
    EXCHANGE_MISMATCH = "exchange_mismatch", 403, "the image speaks another exchange than its profile grants"
    MAINTENANCE_DENIED = "maintenance_denied", 403, "the server may not begin its maintenance; the detail says why"
    EXCHANGE_DOWNGRADE = "exchange_downgrade", 403, "a VM once served two-phase gets no boot token again"
    GPU_EVIDENCE_REJECTED = "gpu_evidence_rejected", 403, "the evidence of the GPUs is missing or not accepted"
    PROXY_REQUIRED = "proxy_required", 403, "the operation is served through another proxy than the request came by"
    BOOT_REQUIRED = "boot_required", 403, "no verified boot of this hotkey belongs to the server"
    NOT_FOUND = "not_found", 404, "no such path"
    KEY_NOT_FOUND = "key_not_found", 404, "no passphrase is kept for this VM"
    SERVER_NOT_FOUND = "server_not_found", 404, "the hotkey has no such server"
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, "another verb; see Allow"
    ROTATION_SUPERSEDED = "rotation_superseded", 409, "the key that the VM reports as added can no longer become active"
    MAINTENANCE_CONFLICT = "maintenance_conflict", 409, "in maintenance already, or as many of the miner's as may be"
    REQUEST_TIMEOUT = "request_timeout", 408, "the request took longer than the server waits"
    HOST_TAKEN = "host_taken", 409, "another server is registered at this address"
    GPU_TAKEN = "gpu_taken", 409, "a GPU belongs to another server"
    SERVER_TAKEN = "server_taken", 409, "the server id is registered"
    NAME_TAKEN = "name_taken", 409, "the name is another server's name or id"
    SERVERS_FULL = "servers_full", 409, "as many servers of this hotkey are registered as the server keeps"
    BODY_TOO_LARGE = "body_too_large", 413, "more body than the server reads"
    VALIDATION_ERROR = "validation_error", 422, "the detail lists each problem of the request"
    RATE_LIMITED = "rate_limited", 429, "more requests of one address than the server takes; try again"
    HEAD_TOO_LARGE = "head_too_large", 431, "more request line and headers than the server reads"
    BUSY = "busy", 503, "too many verifications at once; try again"
    STORE_UNAVAILABLE = "store_unavailable", 503, "the store does not answer; try again"
    COLLATERAL_UNAVAILABLE = "collateral_unavailable", 503, "no collateral for this platform now; try again"
    KEY_UNAVAILABLE = "key_unavailable", 503, "this server lacks a key-encryption key; try again"
    DRAINING = "draining", 503, "the server is stopping; try again"
    PROXY_UNAVAILABLE = "proxy_unavailable", 503, "no proxy that serves this operation is configured"
    SIGNING_KEYS_UNAVAILABLE = "signing_keys_unavailable", 503, "this server has no signing keys to publish"
    HOST_PROFILES_FULL = "host_profiles_full", 503, "as many host profiles are kept as the server keeps"
    SERVER_FAULT = "server_fault", 503, "a fault of the server's; the request id is in its log"
