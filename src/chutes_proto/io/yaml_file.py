"""YAML as plain tables, lists and texts, for files that others publish.

Rules kept here:

* every scalar is the text that it is: ``1.10`` is a version and no number; ``null`` and nothing, unquoted, are None;
* keys are in lower case; one that comes twice, an anchor's alias and deep nesting are refused.
"""

from __future__ import annotations

from typing import Any, Final, cast

from chutes_proto._extras import missing
from chutes_proto.quote import PolicyError

_DEEPEST: Final = 12


def read_yaml(data: bytes) -> object:
    """Read one YAML document. Raises `PolicyError`."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ModuleNotFoundError as exc:
        raise missing("cli", exc) from None
    try:
        compose: Any = cast("Any", yaml).compose
        node: Any = compose(data.decode("utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise PolicyError(f"not YAML: {' '.join(str(exc).split())[:200]}") from None
    return _plain(node, set(), _DEEPEST)


def _plain(node: Any, seen: set[int], depth: int) -> object:
    import yaml

    if id(node) in seen or depth == 0:
        raise PolicyError(f"line {_line(node)}: an alias, or nested too deep")
    seen.add(id(node))
    match node:
        case yaml.MappingNode():
            table: dict[str, object] = {}
            for key, value in node.value:
                name = _plain(key, seen, depth - 1)
                if not isinstance(name, str) or name.lower() in table:
                    raise PolicyError(f"line {_line(key)}: a key that is not a text, or comes twice")
                table[name.lower()] = _plain(value, seen, depth - 1)
            return table
        case yaml.SequenceNode():
            return [_plain(item, seen, depth - 1) for item in node.value]
        case _:
            return None if node is None or (node.style is None and node.value in _NOTHING) else node.value


_NOTHING: Final = ("", "~", "null", "Null", "NULL")


def _line(node: Any) -> int:
    line: int = node.start_mark.line
    return line + 1
