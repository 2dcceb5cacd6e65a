"""Reports on verified collateral, as plain data: its content, and until when it verifies."""

from __future__ import annotations

from typing import Any

from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._terms import Term, rfc3339


def described(content: VerifiedCollateral | str) -> dict[str, Any]:
    """The content of collateral, or the problem with it."""
    if isinstance(content, str):
        return {"problem": content}
    info, issue = content.tcb_info, content.issue
    ends = sorted(((term.end, term.subject) for term in content.terms), reverse=True)
    return {
        "fmspc": content.fmspc.hex(),
        "ca": content.ca,
        "tee": content.tee,
        "pce_id": info.pce_id.hex(),
        "tcb_evaluation_number": issue.tcb_info_number,
        "qe_evaluation_number": issue.qe_identity_number,
        "tcb_levels": [f"{level.stated.status} of {rfc3339(level.stated.date)[:10]}" for level in info.levels],
        "tdx_modules": sorted(info.modules),
        "root_crl_number": issue.root_crl_number,
        "revoked_by_root": len(content.revoked_by_root),
        "pck_crl_number": issue.pck_crl_number,
        "revoked_pcks": len(content.revoked_pcks),
        "valid_from": rfc3339(content.window[0]),
        "valid_until": rfc3339(content.window[1]),
        "ends": {subject: rfc3339(end) for end, subject in ends},
    }


def forecast(content: VerifiedCollateral | str, at: int, grace: int) -> dict[str, Any]:
    """From when to when each piece of collateral is valid, and whether all are at ``at``, in unix seconds."""
    if isinstance(content, str):
        return {"verifies": False, "problem": content}

    def end(term: Term) -> int:
        return term.end if term.is_certificate else term.end + grace

    pieces = sorted(dict.fromkeys(content.terms), key=lambda term: (end(term), term.subject))
    return {
        "fmspc": content.fmspc.hex(),
        "ca": content.ca,
        "tee": content.tee,
        "verifies": all(term.begin <= at <= end(term) for term in pieces),
        "verifies_from": rfc3339(max(term.begin for term in pieces)),
        "verifies_until": rfc3339(end(pieces[0])),
        "first_to_end": pieces[0].subject,
        "pieces": [
            {
                "piece": term.subject,
                "from": rfc3339(term.begin),
                "until": rfc3339(end(term)),
                "verifies": term.begin <= at <= end(term),
            }
            for term in pieces
        ],
    }
