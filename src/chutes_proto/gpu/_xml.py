"""Read and canonicalize XML, as much of it as RIMs need.

Rules kept here:

* UTF-8, bounded in size, depth and number of elements, attributes and namespaces; no DTD, and so no entities of its
  own; no comment, CDATA section or processing instruction, and no attribute ``xml:…``: what nobody writes in a RIM
  cannot hide anything in one;
* a canonical form is bounded by the size of the document. Both are made before a signature is checked, so anyone can
  cause the work: it is proportional to the bytes of the document;
* a name is its namespace and local part; two attributes of one name are refused;
* whatever the bytes, `read` returns or raises `XmlError`.

Without these, Canonical XML comes down to: namespaces where they become known, sorted by prefix, then attributes,
sorted by name, and text with the characters escaped that the recommendation lists.

Sources: Canonical XML 1.1, 2.3; Namespaces in XML 1.0.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn
from xml.parsers import expat

from chutes_proto.gpu._errors import GpuError

MAX_SIZE: Final = 256 * 1024
MAX_DEPTH: Final = 12
MAX_ELEMENTS: Final = 4096
MAX_ATTRIBUTES: Final = 4096
"""In the whole document, with declarations of namespaces. A RIM of NVIDIA has about 500."""
MAX_NAMESPACES: Final = 64
"""Declarations in the whole document: each copies those that it is inside of. A RIM of NVIDIA has six."""
MAX_NAMESPACE_SIZE: Final = 256
"""Characters: sorting attributes compares namespaces again and again."""
MAX_EXPANSION: Final = 4
"""Bytes of a canonical form for each byte of the document. A RIM of NVIDIA has 1.05; escaping quotes alone makes 6."""

_TEXT: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#xD;"})
_ATTRIBUTE: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", '"': "&quot;", "\t": "&#x9;", "\n": "&#xA;", "\r": "&#xD;"}
)
_SPACE: Final = " \t\r\n"


class XmlError(GpuError):
    """The bytes are not the XML that is expected."""


class Element:
    """An element: its name as written, the namespaces known in it by prefix, and its content in order."""

    __slots__ = ("attributes", "content", "name", "namespaces", "written")

    def __init__(self, name: str, attributes: list[tuple[str, str]], namespaces: dict[str, str]) -> None:
        self.written = name
        self.namespaces = namespaces
        self.name = _resolve(name, namespaces, "")
        self.attributes: dict[tuple[str, str], tuple[str, str]] = {}
        """By namespace and local part: the name as written, and the value."""
        for written, value in attributes:
            if written.startswith("xml:"):
                raise XmlError("an attribute of XML itself")
            prefix = written.partition(":")[0] if ":" in written else None
            resolved = ("", written) if prefix is None else _resolve(written, namespaces, prefix)
            if resolved in self.attributes:
                raise XmlError("an attribute twice")
            self.attributes[resolved] = (written, value)
        self.content: list[Element | str] = []

    def get(self, name: str, namespace: str = "") -> str:
        """The value of an attribute. Raises `XmlError` if there is none."""
        try:
            return self.attributes[namespace, name][1]
        except KeyError:
            raise XmlError(f"{self.name[1]} has no attribute {name}") from None

    def elements(self) -> list[Element]:
        """The elements in it. Raises `XmlError` for text beside them."""
        if any(isinstance(part, str) and part.strip(_SPACE) for part in self.content):
            raise XmlError(f"text in {self.name[1]}")
        return [part for part in self.content if isinstance(part, Element)]

    def only(self, namespace: str, name: str) -> Element:
        """The one element of this name in it. Raises `XmlError` for none or several."""
        found = [element for element in self.elements() if element.name == (namespace, name)]
        if len(found) != 1:
            raise XmlError(f"{len(found)} elements {name} in {self.name[1]}")
        return found[0]

    def members(self, namespace: str, *names: str) -> list[Element]:
        """All elements in it, which are of just these names. Raises `XmlError`."""
        found = self.elements()
        if [element.name for element in found] != [(namespace, name) for name in names]:
            raise XmlError(f"{self.name[1]} does not consist of {', '.join(names)}")
        return found

    def text(self) -> str:
        """The text of an element that has nothing else. Raises `XmlError`."""
        if any(isinstance(part, Element) for part in self.content):
            raise XmlError(f"an element in {self.name[1]}")
        return "".join(map(str, self.content))


def read(data: bytes) -> Element:
    """Read a document, and return its element. Raises `XmlError`."""
    if len(data) > MAX_SIZE:
        raise XmlError(f"more than {MAX_SIZE} bytes")
    top: Final = Element("", [], {})
    open_elements = [top]
    elements = attributes = namespaces = 0

    def refuse(*_: object) -> NoReturn:
        raise XmlError("a DTD, comment, CDATA section or processing instruction")

    def declare(_version: str, encoding: str | None, _standalone: int) -> None:
        if encoding is not None and encoding.upper() != "UTF-8":
            raise XmlError("not in UTF-8")

    def start(name: str, written: list[str]) -> None:
        nonlocal elements, attributes, namespaces
        elements += 1
        attributes += len(written) // 2
        if len(open_elements) > MAX_DEPTH:
            raise XmlError(f"nested deeper than {MAX_DEPTH} levels")
        if elements > MAX_ELEMENTS:
            raise XmlError(f"more than {MAX_ELEMENTS} elements")
        if attributes > MAX_ATTRIBUTES:
            raise XmlError(f"more than {MAX_ATTRIBUTES} attributes")
        declared: dict[str, str] = {}
        rest: list[tuple[str, str]] = []
        for key, value in zip(written[::2], written[1::2], strict=True):
            if key == "xmlns" or key.startswith("xmlns:"):
                if key != "xmlns" and (not value or key.startswith("xmlns:xml")):
                    raise XmlError("a prefix without a namespace, or one of XML itself")
                if len(value) > MAX_NAMESPACE_SIZE:
                    raise XmlError(f"a namespace of more than {MAX_NAMESPACE_SIZE} characters")
                declared[key[6:]] = value
            else:
                rest.append((key, value))
        namespaces += len(declared)
        if namespaces > MAX_NAMESPACES:
            raise XmlError(f"more than {MAX_NAMESPACES} declarations of namespaces")
        known = open_elements[-1].namespaces
        element = Element(name, rest, {**known, **declared} if declared else known)
        open_elements[-1].content.append(element)
        open_elements.append(element)

    def end(_: str) -> None:
        del open_elements[-1]

    def text(value: str) -> None:
        open_elements[-1].content.append(value)

    parser: Any = expat.ParserCreate("UTF-8")
    parser.ordered_attributes = True
    parser.buffer_text = True
    parser.XmlDeclHandler = declare
    for forbidden in ("StartDoctypeDecl", "EntityDecl", "ProcessingInstruction", "Comment", "StartCdataSection"):
        setattr(parser, f"{forbidden}Handler", refuse)
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    try:
        parser.Parse(data, True)
    except expat.ExpatError:
        raise XmlError("not well-formed XML") from None
    return top.elements()[0]


def canonical(element: Element, size: int, without: Element | None = None) -> bytes:
    """The canonical form of an element with all in it, but for the element ``without``.

    Namespaces that are known in it from outside are rendered in it, as for a part of a document. ``size`` is that of
    the document in bytes. Raises `XmlError` for a form of more than `MAX_EXPANSION` times as many.
    """
    parts = _Parts(MAX_EXPANSION * size)
    _render(element, without, {}, parts)
    return b"".join(parts.written)


class _Parts:
    """Parts of a canonical form, at most so many bytes."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.written: list[bytes] = []

    def add(self, text: str) -> None:
        part = text.encode()
        self.left -= len(part)
        if self.left < 0:
            raise XmlError(f"its canonical form has more than {MAX_EXPANSION} times its bytes")
        self.written.append(part)


def _render(element: Element, without: Element | None, rendered: dict[str, str], parts: _Parts) -> None:
    parts.add(f"<{element.written}")
    if element.namespaces is not rendered:  # it declares some: others have those of the element that they are in
        for prefix, uri in sorted(element.namespaces.items()):
            if rendered.get(prefix, "") != uri:
                parts.add(f' xmlns{prefix and ":"}{prefix}="{uri.translate(_ATTRIBUTE)}"')
    for _, (written, value) in sorted(element.attributes.items()):
        parts.add(f' {written}="{value.translate(_ATTRIBUTE)}"')
    parts.add(">")
    for part in element.content:
        if isinstance(part, str):
            parts.add(part.translate(_TEXT))
        elif part is not without:
            _render(part, without, element.namespaces, parts)
    parts.add(f"</{element.written}>")


def _resolve(written: str, namespaces: dict[str, str], prefix: str) -> tuple[str, str]:
    """The namespace and local part of a name with this prefix."""
    before, colon, local = written.partition(":")
    if not colon:
        return namespaces.get(prefix, ""), written
    if before not in namespaces or not local or ":" in local:
        raise XmlError("a name with an unknown prefix")
    return namespaces[before], local
