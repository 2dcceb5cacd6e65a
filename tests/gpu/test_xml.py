"""The XML of RIMs is read and canonicalized before a signature is checked: it is bounded, and so is the work for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chutes_proto.gpu import GpuVerificationError
from chutes_proto.gpu import _xml as xml
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.gpu._xml import XmlError
from tests.gpu.simulated import GPUS, NOW
from tests.work import MIB, work_of

TAG, MIDDLE, END = GPUS.rims(NOW)[0].partition(b"<Payload")
RIM_ROOM = xml.MAX_SIZE - len(TAG + MIDDLE + END) - 100


def rim(declarations: bytes, inside: bytes) -> bytes:
    """A RIM of as many bytes as one may have, with more in its payload."""
    attributes, _, rest = END.partition(b">")
    data = TAG + MIDDLE + attributes + declarations + b">" + inside
    return data + b" " * (xml.MAX_SIZE - len(data) - len(rest)) + rest


def filled(part: bytes, room: int = RIM_ROOM, most: int = xml.MAX_ELEMENTS) -> bytes:
    return part * min(most, room // len(part))


def declared(count: int, uri: bytes = b"u") -> bytes:
    return b"".join(b" xmlns:p%d='%b'" % (number, uri) for number in range(count))


def attributes(count: int, prefixes: int = 0) -> bytes:
    names = (b"p%d:a%d" % (n % prefixes, n) if prefixes else b"a%d" % n for n in range(count))
    return b"".join(b" %b=''" % name for name in names)


QUOTES = b"<a b='" + b'"' * 60 + b"'/>"
HOSTILE = {
    "namespaces that each element knows": rim(declared(4000), filled(b"<a/>", most=3900)),
    "namespaces that each element copies": rim(declared(4000), filled(b"<a xmlns='v'/>", most=3900)),
    "all limits at once": rim(declared(60, b'"' * 200), filled(b"<a b='\"'/>>", most=3000)),
    "all limits, with text": rim(declared(60), filled(b"<a>\n</a>>", most=3900) + filled(b"&gt;", 200_000, 200_000)),
    "attributes of one element": rim(b"", b"<a" + attributes(20_000) + b"/>"),
    "attributes of one element, with long namespaces": rim(
        declared(4, b"u" * 50_000), b"<a" + attributes(3000, prefixes=4) + b"/>"
    ),
    "quotes": rim(b"", filled(QUOTES)),
    "quotes in one value": rim(b"", b"<a b='" + filled(b'"', RIM_ROOM, RIM_ROOM) + b"'/>"),
    "quotes beside a character of four bytes": rim(
        b"", "<a b='\U0001f600".encode() + filled(b'"', RIM_ROOM, RIM_ROOM) + b"'/>"
    ),
    "elements": rim(b"", filled(b"<a/>", most=RIM_ROOM)),
    "text": rim(b"", filled(b">", RIM_ROOM, RIM_ROOM)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_the_work_for_a_rim_is_proportional_to_its_bytes(data: bytes) -> None:
    assert len(data) == xml.MAX_SIZE

    def authenticate() -> None:
        with pytest.raises(GpuVerificationError):
            _ = authenticate_rim(data, roots=GPUS.roots)

    work = work_of(authenticate)
    assert work.calls < len(data)
    assert work.peak < 16 * MIB


LIMITS: dict[str, tuple[Callable[[int], bytes], int]] = {
    "nested deeper than 12 levels": (lambda n: b"<x>" * n + b"</x>" * n, 12),
    "more than 4096 elements": (lambda n: b"<x>" + b"<y/>" * (n - 1) + b"</x>", 4096),
    "more than 4096 attributes": (lambda n: b"<x xmlns=''" + attributes(n - 1) + b"/>", 4096),
    "more than 64 declarations of namespaces": (
        lambda n: b"<x xmlns='u'>" + b"<y" + declared(n - 2) + b"/><z xmlns='v'/></x>",
        64,
    ),
    "a namespace of more than 256 characters": (lambda n: b"<x xmlns='" + b"u" * n + b"'/>", 256),
    "more than 262144 bytes": (lambda n: b"<x>" + b" " * (n - 7) + b"</x>", 262144),
}
"""By what they refuse: documents of so many, and how many there may be."""


@pytest.mark.parametrize("problem", LIMITS)
def test_the_limits_of_xml_are_told(problem: str) -> None:
    document, most = LIMITS[problem]
    assert xml.canonical(xml.read(document(most)), most * 100).startswith(b"<x")
    with pytest.raises(XmlError, match=f"^{problem}$"):
        _ = xml.read(document(most + 1))


def test_a_canonical_form_has_at_most_four_times_the_bytes() -> None:
    document = xml.read(b'<x y=\'"""""\'/>')
    form = b'<x y="' + b"&quot;" * 5 + b'"></x>'
    assert len(form) == 42
    assert xml.canonical(document, 11) == form
    with pytest.raises(XmlError, match=r"^its canonical form has more than 4 times its bytes$"):
        _ = xml.canonical(document, 10)


def test_namespaces_are_rendered_where_they_become_known() -> None:
    document = xml.read(b"<x xmlns='u' xmlns:b='v' xmlns:a='w'><y><z xmlns='' xmlns:b='v'/></y><y xmlns='t'/></x>")
    form = b'<x xmlns="u" xmlns:a="w" xmlns:b="v"><y><z xmlns=""></z></y><y xmlns="t"></y></x>'
    assert xml.canonical(document, 100) == form
    inner = b'<y xmlns="u" xmlns:a="w" xmlns:b="v"><z xmlns=""></z></y>'
    assert xml.canonical(document.elements()[0], 100) == inner
