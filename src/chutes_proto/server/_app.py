"""The key server as one flow per request: route, decode, handle, answer; every error has an answer too.

Rules kept here:

* the peer always gets an answer of the documented form; a fault of ours is a 503, never a 4xx, because deployed clients
  power off on a 4xx and retry on a 5xx;
* the peer gets the refusal's text and code; the log has its reason too, and why, under the same request id, and names
  VM and hotkey as far as the request does;
* what strangers cause hides no line about a VM that is known (``_known.py``);
* a refused attestation ends its connection;
* one address may send a limited number of requests, but deployed clients give up if an operation that they send only
  once gets 429, and so do VMs with a token behind the address of others. So these operations never get it; their 401s
  count against the other operations of the address;
* a server that drains ends as soon as no boot of its own is open (``_open_boots.py``), and none can become open;
* one whose listeners were handed over ends as soon as what it accepted is answered: its successor on the same store
  redeems every token and nonce. Until then it serves all operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import cache, lru_cache
from typing import Any

from attrs import define, field, frozen

from chutes_proto.effects import Entropy, Flow, Log, Now, Uptime
from chutes_proto.errors import (
    BadRequest,
    KeyUnavailable,
    Refusal,
    Refused,
    SealBroken,
    StoreError,
    Unavailable,
    where_raised,
)
from chutes_proto.log import Level, Record, Value
from chutes_proto.server import _host_profiles as host_profiles
from chutes_proto.server import _maintenance as maintenance
from chutes_proto.server import _servers as servers
from chutes_proto.server._boot import attest_boot, issue_boot_nonce
from chutes_proto.server._call import Call, SignedCall, found, ids_of, named
from chutes_proto.server._callers import check_caller
from chutes_proto.server._mismatch import name_mismatch
from chutes_proto.server._observing import Answered, Observer, ignore, traceparent_of
from chutes_proto.server._open_boots import completed_by
from chutes_proto.server._retry import bound_store
from chutes_proto.server._rotation import attest_volumes, confirm_volumes
from chutes_proto.server._runtime import attest_runtime, issue_runtime_nonce, read_status
from chutes_proto.server._service import Service
from chutes_proto.server._volumes import read_cache_passphrase, sync_volumes
from chutes_proto.server._why import Denial, explain
from chutes_proto.store._rows import Vm
from chutes_proto.wire import endpoints, fleet, miners, openapi, public, vms
from chutes_proto.wire.codec import decode_request, encode_answer, error_response
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Endpoint, Message
from chutes_proto.wire.http import TRACEPARENT, HttpRequest, HttpResponse, MalformedRequest
from chutes_proto.wire.public import ApiDescriptionAnswer, PublicRequest

_DRAINED = frozenset({vms.BOOT_NONCE, vms.BOOT_ATTESTATION})
_ASKED_ONCE = frozenset(
    {
        vms.CACHE_PASSPHRASE,
        vms.VOLUME_SYNC,
        vms.VOLUME_ATTESTATION,
        vms.VOLUME_CONFIRMATION,
        vms.PROVISION,
        vms.PROVISION_CONFIRMATION,
    }
)
_PATIENT = _ASKED_ONCE | {vms.BOOT_ATTESTATION}
_GRANTS = frozenset({vms.BOOT_ATTESTATION, vms.VOLUME_ATTESTATION, vms.PROVISION})
_ATTESTATIONS = frozenset({vms.BOOT_ATTESTATION, miners.RUNTIME_ATTESTATION})


def describe_api(service: Service, call: Call[PublicRequest]) -> Flow[ApiDescriptionAnswer]:
    """Operation 16: publish the API description."""
    yield from ()
    return ApiDescriptionAnswer(document=_document())


_document = cache(openapi.document)
"""The document, made once: anyone may ask for it, and nothing else that anyone may ask costs as much."""


_HANDLERS: Mapping[Endpoint, Callable[[Service, Any], Flow[Message]]] = {
    vms.BOOT_NONCE: issue_boot_nonce,
    vms.BOOT_ATTESTATION: attest_boot,
    vms.CACHE_PASSPHRASE: read_cache_passphrase,
    vms.VOLUME_SYNC: sync_volumes,
    vms.VOLUME_ATTESTATION: attest_volumes,
    vms.VOLUME_CONFIRMATION: confirm_volumes,
    vms.PROVISION: attest_volumes,
    vms.PROVISION_CONFIRMATION: confirm_volumes,
    public.MEASUREMENTS: servers.publish_measurements,
    public.API_DESCRIPTION: describe_api,
    public.SIGNING_KEYS: servers.publish_signing_keys,
    miners.REGISTER_SERVER: servers.register_server,
    miners.LIST_SERVERS: servers.list_servers,
    miners.RENAME_SERVER: servers.rename_server,
    miners.SERVER_DETAILS: servers.read_server,
    miners.REMOVE_SERVER: servers.remove_server,
    miners.RUNTIME_NONCE: issue_runtime_nonce,
    miners.RUNTIME_ATTESTATION: attest_runtime,
    miners.ATTESTATION_STATUS: read_status,
    fleet.MAINTENANCE_POLICY: maintenance.read_policy,
    fleet.MAINTENANCE_PREFLIGHT: maintenance.preflight,
    fleet.BEGIN_MAINTENANCE: maintenance.begin,
    fleet.INVENTORY: maintenance.list_inventory,
    fleet.RUNNING_GPUS: maintenance.list_running,
    fleet.TDX_HOST_STATUS: host_profiles.read_status,
    fleet.SNP_HOST_STATUS: host_profiles.read_status,
    fleet.REGISTER_HOST_PROFILE: host_profiles.register,
    fleet.HOST_PROFILES: host_profiles.publish,
    fleet.HOST_PREFLIGHT: host_profiles.preflight,
}


@define
class _Seen:
    """One request: the operation and the refusal, for those who measure, and the VM whose boot it completes.

    ``service`` is the one of the moment at which the request began: a reload replaces none in the middle. Once it is
    handled, ``parameters`` of its path and then its ``message`` name a VM, for the log.
    """

    service: Service
    operation: str = "none"
    code: str = ""
    parameters: Mapping[str, str] | None = None
    message: Message | None = None
    completed: Vm | None = None


@frozen
class _LastAnswer(HttpResponse):
    """An answer that completes the boot of ``vm`` once it is sent."""

    vm: Vm = field(kw_only=True)


@define
class App:
    """One key server.

    While it is ``draining``, boots get 503 and operations that clients send only once are served. Once its listeners
    were ``handed_over``, boots are served, too.
    """

    service: Service
    observe: Observer = ignore
    draining: bool = False
    handed_over: bool = False
    _latest_end: float = field(init=False, default=math.inf)
    _granting: int = field(init=False, default=0)  # pending requests that may open a boot

    def stop(self, now: float, *, handed_over: bool = False) -> float:
        """Begin to drain; returns the latest end, ``limits.drain_seconds`` after ``now``. Called again, end at once.

        A server that drains when its listeners are handed over keeps its latest end, to answer what it has accepted.
        """
        if not self.draining:
            self._latest_end = now + self.service.limits.drain_seconds
        elif self.handed_over or not handed_over:
            self._latest_end = now
        self.draining, self.handed_over = True, handed_over
        return self._latest_end

    def ends_at(self, now: float) -> float:
        """The expiry of the last open boot, ``now`` if none is open, or the latest end if sooner; else infinity.

        ``now`` once the listeners were handed over.
        """
        if self.handed_over:
            return now
        if not self.draining or self._granting:
            return self._latest_end
        return min(self._latest_end, self.service.boots.last_expiry(now))

    def sent(self, response: HttpResponse) -> None:
        """Note that ``response`` was sent as a whole, which may complete a boot."""
        if isinstance(response, _LastAnswer):
            self.service.boots.close(response.vm)

    def complain(self, event: str, error: Exception) -> Flow[None]:
        """Log a fault of a connection; a peer may cause many, and then some are held back and counted."""
        held_back = self.service.faults.admits("", (yield from Uptime()))
        if held_back is not None:
            yield from _log(Level.ERROR, event, {"error": f"{type(error).__name__}: {error}"}, held_back)

    def handle(self, request: HttpRequest | MalformedRequest) -> Flow[HttpResponse]:
        """The answer to ``request``; raises nothing but what ends the process."""
        _ = TRACEPARENT.set(traceparent_of(request) if isinstance(request, HttpRequest) else "")
        seen = _Seen(self.service)
        request_id = (yield from Entropy(16)).hex()
        response = yield from self._respond(request, request_id, seen)
        if self.observe is not ignore:
            arrived = request.arrived if isinstance(request, HttpRequest) else None
            ended = yield from Uptime()
            self.observe(
                Answered(seen.operation, response.status, seen.code, 0.0 if arrived is None else ended - arrived)
            )
        closing = (("connection", "close"),) if self.draining else ()
        date = ("date", _http_date((yield from Now())))  # RFC 9110, section 6.6.1
        headers = (*response.headers, *closing, date)
        if seen.completed is None:
            return HttpResponse(response.status, headers, response.body)
        return _LastAnswer(response.status, headers, response.body, vm=seen.completed)

    def _respond(self, request: HttpRequest | MalformedRequest, request_id: str, seen: _Seen) -> Flow[HttpResponse]:
        """Answer every request, and log a refusal for the operator."""
        try:
            if isinstance(request, MalformedRequest):
                raise request.refusal
            found = endpoints.route(request.method, request.target.partition("?")[0])
            endpoint = found.endpoint if isinstance(found, endpoints.Match) else None
            request = seen.service.proxies.client_request(request, endpoint)  # before anything believes its address
            return (yield from self._answer(request, found, request_id, seen))
        except Refusal as exc:
            refusal = exc if exc.status != 401 else (yield from seen.service.readiness.doubt(exc))
        except StoreError as exc:
            text = "The store does not answer. Retry shortly."
            refusal = Unavailable(Code.STORE_UNAVAILABLE, text, reason=f"{type(exc).__name__}: {exc}")
        except (KeyUnavailable, SealBroken) as exc:
            text = "A key of this server is not available. Retry shortly."
            refusal = Unavailable(Code.KEY_UNAVAILABLE, text, reason=f"{type(exc).__name__}: {exc}", retry_after=30)
        except Exception as exc:  # noqa: BLE001 - a defect of ours must not become a 4xx, nor end the connection silently
            refusal = Unavailable(
                Code.SERVER_FAULT, "A fault of the server's. Retry shortly.", reason=where_raised(exc)
            )
        seen.code = str(refusal.code)
        yield from self._log_refusal(request, request_id, refusal, seen)
        return error_response(refusal, request_id)

    def _answer(
        self, request: HttpRequest, found: endpoints.Routed, request_id: str, seen: _Seen
    ) -> Flow[HttpResponse]:
        endpoint = found.endpoint if isinstance(found, endpoints.Match) else None
        if endpoint is not None:
            seen.operation = endpoint.operation
        if endpoint not in _ASKED_ONCE and (wait := (yield from self._count(request, seen))):
            text = "Too many requests. Retry shortly."
            raise Unavailable(Code.RATE_LIMITED, text, retry_after=math.ceil(wait))
        match found:
            case endpoints.Match() as match:
                pass
            case endpoints.WrongMethod(allow):
                headers = [("allow", ", ".join(allow))]
                raise BadRequest(Code.METHOD_NOT_ALLOWED, "Method Not Allowed", headers=headers)
            case endpoints.Redirect(other):
                _, mark, query = request.target.partition("?")
                return HttpResponse(307, (("location", other + mark + query),))
            case None:
                raise Refused(Code.NOT_FOUND, "Not Found")
        if self.draining and not self.handed_over and match.endpoint in _DRAINED:
            raise Unavailable(Code.DRAINING, "The server is stopping. Retry shortly.", retry_after=5)
        grants = match.endpoint in _GRANTS
        self._granting += grants
        try:
            handling = self._handle(match, request, request_id, seen)
            return (yield from bound_store(handling, request, is_patient=match.endpoint in _PATIENT))
        except Refusal as exc:
            if match.endpoint in _ASKED_ONCE and exc.status == 401:
                _ = yield from self._count(request, seen)
            if match.endpoint in _ATTESTATIONS:
                exc.headers = (*exc.headers, ("connection", "close"))
            raise
        finally:
            self._granting -= grants

    def _count(self, request: HttpRequest, seen: _Seen) -> Flow[float]:
        """Count a request of its address, if it has one; returns the seconds to wait, 0 within the limit."""
        now = yield from Uptime()
        return seen.service.rates.take(request.peer_address, now) if request.peer_address else 0.0

    def _handle(self, match: endpoints.Match, request: HttpRequest, request_id: str, seen: _Seen) -> Flow[HttpResponse]:
        """Decode and handle a request; the caller of a signed one is checked before anything else in it."""
        now = yield from Now()
        seen.parameters = match.parameters
        seen.service.proxies.check_way(request, match.endpoint)
        call: Call[Message]
        if match.endpoint.signed is None:
            call = Call(request, message := decode_request(match, request), request_id, now)
        else:
            caller = check_caller(seen.service, request, match.endpoint.signed, match.endpoint.purpose, now)
            call = SignedCall(request, message := decode_request(match, request), request_id, now, caller)
        seen.message = message
        try:
            answer = yield from _HANDLERS[match.endpoint](seen.service, call)
        except Refusal as exc:
            yield from name_mismatch(call, exc)
            raise
        if match.endpoint in _GRANTS:
            seen.service.boots.note_granted(message, (yield from Uptime()))
        response = encode_answer(match.endpoint, answer)
        seen.completed = completed_by(message)
        return response

    def _log_refusal(
        self, request: HttpRequest | MalformedRequest, request_id: str, refusal: Refusal, seen: _Seen
    ) -> Flow[None]:
        """Log a refusal. Anyone can cause them: many of an address are counted only, unless the store records them.

        A known VM has lines of its own; once others who use its name have taken them, it has those of its address.
        """
        ours, now, vm = refusal.status >= 500, (yield from Uptime()), Vm("", "")
        if isinstance(request, HttpRequest) and seen.parameters is not None:
            vm = named(request, seen.parameters, seen.message)
        is_known = vm in seen.service.known
        if refusal.recorded:
            held_back: int | None = 0
        elif is_known and not seen.service.known.lines.take(f"{vm.hotkey}/{vm.name}", now):
            held_back = 0
        else:
            held_back = (seen.service.faults if ours else seen.service.refusals).admits(request.peer_address, now)
        if held_back is None:
            return
        fields: dict[str, Value] = {**ids_of(request, request_id), "peer": request.peer_address}
        if isinstance(request, HttpRequest):
            fields |= {"method": request.method[:16], "path": request.target.partition("?")[0][:200]}
        fields |= {"vm": vm.name, "hotkey": vm.hotkey}
        why = explain(Denial(str(refusal.code), refusal.reason, request_id, vm.hotkey, vm.name, "", found(refusal)))
        fields |= {"status": refusal.status, "code": str(refusal.code), "reason": refusal.reason}
        fields |= {"step": why.step, "why": str(why)}
        is_noise = not (is_known or refusal.recorded)
        is_fault = ours and refusal.code != Code.DRAINING  # at each restart a load balancer's probe meets that
        yield from _log(Level.ERROR if is_fault else Level.WARNING, "refused", fields, held_back, is_noise=is_noise)


def _log(level: Level, event: str, fields: dict[str, Value], held_back: int, *, is_noise: bool = False) -> Flow[None]:
    yield from Log(Record(level, event, {**fields, "held_back": held_back} if held_back else fields, is_noise))


@lru_cache(maxsize=4)
def _http_date(at: int) -> str:
    """Format unix seconds for a header (RFC 9110, section 5.6.7)."""
    return formatdate(at, usegmt=True)
