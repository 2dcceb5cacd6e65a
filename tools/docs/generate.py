"""Parts of pages that follow from the code: operations, error codes, settings, commands, steps of verification.

A page asks for one with a comment on a line of its own, ``<!-- generate: NAME ARGUMENTS -->``, and the hook puts the
text there when the site is built. So no such text is written twice, and none is in the repository.

Rules kept here:

* everything comes from the value that the program itself uses: the endpoint table, the closed list of codes, the
  classes of the configuration, the parsers of the commands;
* what a setting means is said once, in the comment above it in ``examples/server.toml`` and ``examples/agent.toml``.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs

from chutes_proto.boot import _exchange as exchange
from chutes_proto.boot._settings import AgentSettings
from chutes_proto.gpu import GpuVerificationError
from chutes_proto.gpu import _steps as _gpu_steps
from chutes_proto.quote import VerificationError, _steps
from chutes_proto.quote._measurements import Schedule
from chutes_proto.server._config import ServerConfig
from chutes_proto.server._gpus import Gpu
from chutes_proto.server._profiles import ServedOptions
from chutes_proto.wire import endpoints
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import DESCRIPTION, PLACE, Endpoint, sole_field, wire_name
from tools.docs import commands

ROOT: Final = Path(__file__).resolve().parents[2]
REQUEST: Final = re.compile(r"^<!-- generate: (\w+)((?: [\w./-]+)*) -->$", re.MULTILINE)


def filled(markdown: str) -> str:
    """``markdown`` with every generated part in its place. Raises `ValueError` for a part that does not exist."""

    def part(match: re.Match[str]) -> str:
        name, arguments = match[1], match[2].split()
        if name not in PARTS:
            raise ValueError(f"no part of a page is generated under the name {name!r}; there are {', '.join(PARTS)}")
        return PARTS[name](*arguments)

    return REQUEST.sub(part, markdown)


# --- files ---


def file(path: str, language: str = "") -> str:
    """A file of the repository, in a fence."""
    source = ROOT / path
    return f"```{language or source.suffix.removeprefix('.')}\n{source.read_text('utf-8').rstrip()}\n```"


def picture(name: str) -> str:
    """A picture of ``docs/pictures`` in the colours of the page."""
    from tools.docs.pictures import PICTURES, SITE, boxes

    text = (PICTURES / f"{name}.txt").read_text("utf-8")
    title = text.partition("\n")[0].lstrip("# ")
    return f'<div class="picture">{boxes(text, SITE, title)}</div>'.replace("\n", "")


# --- the wire ---


def operations() -> str:
    """The table of operations, each with a link to its description."""
    lines = ["| # | operation | method and path | authentication |", "|---|---|---|---|"]
    lines += [
        f"| {e.number} | [{e.operation}](#{e.operation}) | `{e.method} {e.path}` | {e.authentication} |"
        for e in endpoints.ENDPOINTS
    ]
    return "\n".join(lines)


def operation_details() -> str:
    """A section for each operation: what goes where, what comes back, which codes."""
    return "\n\n".join(_operation(endpoint) for endpoint in endpoints.ENDPOINTS)


def _operation(endpoint: Endpoint) -> str:
    lines = [
        f"### {endpoint.number}. `{endpoint.method} {endpoint.path}` {{#{endpoint.operation}}}",
        f"{_sentence(endpoint.summary)} Authentication: {endpoint.authentication}.",
    ]
    for title, message in (("Request", endpoint.request), (f"Answer, {endpoint.status}", endpoint.answer)):
        rows = list(_members(message))
        if rows:
            lines.append("\n".join([f"| {title} | in | type | |", "|---|---|---|---|", *rows]))
    codes = sorted(endpoint.codes, key=lambda code: (code.status, code.value))
    lines.append(
        "Errors: " + (", ".join(f"{code.status} {_code_link(code)}" for code in codes) or "the common ones") + "."
    )
    return "\n\n".join(lines)


def _members(message: type[Any], prefix: str = "") -> Iterator[str]:
    for field in attrs.fields(attrs.resolve_types(message)):
        if PLACE not in field.metadata:
            continue
        name = f"{prefix}{wire_name(field)}"
        inner = _inner(field.type)
        shown = "list" if sole_field(message, "LIST") == field.name else f"`{name}`"
        optional = "" if field.default is attrs.NOTHING else ", optional"
        cells = (shown, field.metadata[PLACE] + optional, type_name(field.type), _cell(field.metadata[DESCRIPTION]))
        yield f"| {' | '.join(cells)} |"
        if inner is not None:
            yield from _members(inner, f"{name}.")


def _inner(kind: Any) -> type[Any] | None:
    """The message inside a list, a mapping or an optional, or None."""
    if isinstance(kind, type) and attrs.has(kind):
        return kind
    found = [inner for each in get_args(kind) if (inner := _inner(each)) is not None]
    return found[0] if found else None


def common_codes() -> str:
    """The codes that any request may be answered with."""
    return ", ".join(f"{code.status} {_code_link(code)}" for code in endpoints.COMMON_CODES) + "."


# --- error codes ---


def code_table() -> str:
    """Every code with its status and meaning."""
    lines = ["| code | status | meaning |", "|---|---|---|"]
    lines += [f"| [`{code}`](#{code}) | {code.status} | {_cell(code.meaning)} |" for code in Code]
    return "\n".join(lines)


def code(name: str) -> str:
    """Describe one error code in its own words: under its heading in the page of causes and cures."""
    found = next(code for code in Code if code == name)
    where = [e for e in endpoints.ENDPOINTS if found in e.codes]
    asked = ", ".join(f"[{e.operation}](wire.md#{e.operation})" for e in where)
    anywhere = found in endpoints.COMMON_CODES or not where
    return f"**{found.status}.** {_sentence(found.meaning)} Answered by {'any operation' if anywhere else asked}."


def _code_link(code: Code) -> str:
    return f"[`{code}`](errors.md#{code})"


# --- the verifier ---


def steps() -> str:
    """The numbered steps of the verification of a quote."""
    return _steps_of(VerificationError, _steps.__name__)


def gpu_steps() -> str:
    """The numbered steps of the verification of GPU evidence."""
    return _steps_of(GpuVerificationError, _gpu_steps.__name__)


def _steps_of(root: type[VerificationError | GpuVerificationError], module: str) -> str:
    lines = ["| step | code | what holds once it passes |", "|---|---|---|"]
    found = [each for each in root.__subclasses__() if each.__module__ == module]
    lines += [
        f"| {step.step} | `{step.code}` | {_cell(step.rule)} |" for step in sorted(found, key=lambda each: each.step)
    ]
    return "\n".join(lines)


# --- the boot exchange ---


def transitions() -> str:
    """The transition table of a VM's boot exchange."""
    lines = ["| state | what happens | next state |", "|---|---|---|"]
    for state, row in exchange.TRANSITIONS.items():
        arrows: dict[exchange.State, list[str]] = {}
        for happened, following in row.items():
            arrows.setdefault(following, []).append(happened.value)
        lines += [f"| `{state.value}` | {', '.join(labels)} | `{end.value}` |" for end, labels in arrows.items()]
    return "\n".join(lines)


# --- settings ---


def server_settings() -> str:
    """A table for each table of the key server's configuration."""
    meanings = comments(ROOT / "examples" / "server.toml")
    parts = [_settings("", ServerConfig, meanings)]
    for field in attrs.fields(attrs.resolve_types(ServerConfig)):
        options = _inner(field.type)
        if options is not None and options.__name__.endswith("Options"):
            parts.append(_settings(field.name, options, meanings, is_list=options is not field.type))
    parts.append(_settings("gpus.NAME", Gpu, meanings, file_name="gpus.example"))
    parts.append(_settings("schedule.NAME", Schedule, meanings, file_name="schedule.8xh200"))
    parts.append(_settings("profile_defaults", ServedOptions, meanings))
    return "\n\n".join(parts)


def agent_settings() -> str:
    """A table for each table of the boot agent's settings."""
    meanings = comments(ROOT / "examples" / "agent.toml")
    parts = [_settings("", AgentSettings, meanings)]
    for field in attrs.fields(attrs.resolve_types(AgentSettings)):
        if isinstance(field.type, type) and attrs.has(field.type):
            parts.append(_settings(field.name, field.type, meanings))
        elif (disk := _inner(field.type)) is not None:
            parts.append(_settings(f"{field.name}.NAME", disk, meanings, file_name=f"{field.name}.storage"))
    return "\n\n".join(parts)


def _settings(
    table: str, options: type[Any], meanings: Mapping[str, str], *, file_name: str = "", is_list: bool = False
) -> str:
    brackets = "[[{}]]" if is_list else "[{}]"
    heading = f"### `{brackets.format(table)}`" if table else "### Top level"
    lines = [
        heading,
        "",
        meanings.get(f"[{file_name or table}]", ""),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for field in attrs.fields(attrs.resolve_types(options)):
        is_table = _inner(field.type) is not None and field.default is not attrs.NOTHING
        if field.name == "path" or (is_table and not table) or "Mapping" in str(field.type):
            continue  # each table has a section of its own
        name = f"{file_name or table}.{field.name}".lstrip(".")
        meaning = meanings.get(name, "")
        if not meaning:
            raise ValueError(f"the example file says nothing about {name}; write a comment above the key")
        lines.append(f"| `{field.name}` | {type_name(field.type)} | {_default(field)} | {_cell(meaning)} |")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def comments(path: Path) -> dict[str, str]:
    """Read the comments of a TOML file: by ``key`` or ``table.key``, and of tables by ``[table]``.

    A comment stands in the lines above its key or table. A key that is commented out is a key; lines between two empty
    lines that have no key at their end are about the file.
    """
    found: dict[str, str] = {}
    table, waiting = "", list[str]()
    for line in path.read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"(?:# )?\[{1,2}([\w.-]+)\]{1,2}", line):
            table = heading[1]
            found[f"[{table}]"], waiting = " ".join(waiting), []
        elif key := re.match(r"(?:# )?([a-z0-9_]+) = ", line):
            found[f"{table}.{key[1]}".lstrip(".")] = " ".join(waiting)
            waiting = []
            if behind := re.search(r"\s{2,}# (.+)$", line.removeprefix("# ")):
                name = f"{table}.{key[1]}".lstrip(".")
                found[name] = f"{found[name]} {behind[1]}".strip()
        elif line.startswith("#"):
            waiting.append(line.lstrip("# "))
        elif not line.startswith(" "):
            waiting = []
    return found


def _default(field: attrs.Attribute[Any]) -> str:
    value: Any = field.default
    if value is attrs.NOTHING:
        return "required"
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        value = value.factory()
    return "" if value is None or value == {} else f"`{_toml(value)}`"


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case float() if value.is_integer():
            return str(int(value))
        case _:
            return str(value)


# --- types, for people ---

_NAMES: Final = {str: "text", int: "integer", float: "number", bool: "true or false", bytes: "bytes"}


def type_name(kind: Any) -> str:
    """A type as a reader of TOML or JSON knows it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _NAMES:
        return _NAMES[kind]
    if origin is Literal:
        return " or ".join(f"`{_toml(each)}`" for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(each) for each in arguments if each is not type(None)))
    if origin is tuple or (origin is not None and issubclass(origin, (list, tuple))):
        return f"list of {type_name(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return "object"
    if hasattr(kind, "__supertype__"):
        return type_name(kind.__supertype__)
    name: str = getattr(kind, "__name__", str(kind))
    if isinstance(kind, type) and attrs.has(kind):
        return "table" if name.endswith(("Options", "Files")) else "object"
    return {"Secret": "text", "Annotated": "text", "Any": "any"}.get(name, name)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


PARTS: Final[Mapping[str, Callable[..., str]]] = {
    part.__name__: part
    for part in (
        agent_settings,
        code,
        code_table,
        commands.command_reference,
        common_codes,
        file,
        operation_details,
        operations,
        picture,
        server_settings,
        steps,
        gpu_steps,
        transitions,
    )
}
