"""Refusals as answers: the one place that knows the form of an error answer."""

from __future__ import annotations

from chutes_proto.errors import Refusal, Unavailable
from chutes_proto.wire import json
from chutes_proto.wire.http import HttpResponse

JSON_HEADERS = (("content-type", "application/json"),)


def error_response(refusal: Refusal, request_id: str) -> HttpResponse:
    """``{"detail","code","request_id"}`` with the refusal's status, and ``Retry-After`` where trying again may help."""
    headers = (*JSON_HEADERS, *refusal.headers)
    if isinstance(refusal, Unavailable):
        headers = (*headers, ("retry-after", str(refusal.retry_after)))
    content = {"detail": refusal.detail, "code": str(refusal.code), "request_id": request_id}
    return HttpResponse(refusal.status, headers, json.encode(content))
