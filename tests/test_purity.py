"""The core never touches the outside world, and rooms depend on one another in one direction only.

The rules stand in the tables below; `violations` holds a module's syntax tree against them, so nothing is imported and
an import inside a function, or only for types, counts like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_cover  # only texts are looked at

SRC = Path(__file__).resolve().parent.parent / "src"
CORE, BINDINGS = "chutes_proto", ("chutes_proto_asyncio", "chutes_proto_trio")

IMPURE = ("chutes_proto.io", "chutes_proto.cli", "chutes_proto.sync", "chutes_proto.__main__")
"""The parts of the core package that may do I/O; nothing pure imports them."""

OUTSIDE_WORLD = frozenset(
    "anyio asyncio builtins click codecs concurrent ctypes fcntl fileinput ftplib getpass glob http.client http.server "
    "httpcore httpx importlib io linecache logging mmap multiprocessing os pathlib platform psycopg pty queue random "
    "requests resource rich sched secrets select selectors shutil signal smtplib socket socketserver sqlite3 ssl "
    "subprocess sys syslog tarfile tempfile threading time trio urllib.request uuid zipfile".split()
)
"""Modules that reach files, sockets, databases, clocks, entropy, processes, threads, event loops or the terminal."""

MAY_IMPORT = frozenset({("chutes_proto._lazy", "importlib.import_module")})
"""Exceptions from `OUTSIDE_WORLD`: the one module that imports by name."""

TYPES = frozenset({"os.PathLike"})
"""Exceptions from `OUTSIDE_WORLD` for every module: what only annotations use."""

LOADERS = frozenset(
    {
        "chutes_proto.quote._collateral.Collateral.load",
        "chutes_proto.quote._policy.Policy.load",
        "chutes_proto.server._asgi.asgi_app",
        "chutes_proto.server._config.ServerConfig.load",
    }
)
"""The functions of pure modules that may import ``chutes_proto.io``: they load a file or a store for their caller."""

FORBIDDEN_CALLS = frozenset("__import__ breakpoint eval exec input open print".split())
CLOCKS = frozenset("now today utcnow".split())
ENTROPY = frozenset("generate_key generate_private_key random_serial_number".split())

ASYNC_FILES = frozenset({"chutes_proto.effects", "chutes_proto.transport.asgi"})
"""Drivers written against awaitables that they are handed."""

YIELD_FILES = frozenset({"chutes_proto.effects", "chutes_proto.store._rows"})
"""Where a bare ``yield`` makes an effect or a row operation; anywhere else it would bypass their types.

Context managers are not flows, and may. So may a function that returns ``Iterator[str]``: mypy refuses an effect in it,
and refuses to yield its texts from a flow.
"""

NEVER_IMPORTS: dict[str, tuple[str, ...]] = {
    "chutes_proto.wire": ("chutes_proto.boot", "chutes_proto.server", "chutes_proto.effects"),
    "chutes_proto.auth": ("chutes_proto.boot", "chutes_proto.server", "chutes_proto.effects"),
    "chutes_proto.keys": ("chutes_proto.boot", "chutes_proto.server", "chutes_proto.effects"),
    "chutes_proto.boot": ("chutes_proto.server",),
    "chutes_proto.server": ("chutes_proto.boot",),
    "chutes_proto_asyncio": ("chutes_proto_trio",),
    "chutes_proto_trio": ("chutes_proto_asyncio",),
}
"""Which room never imports which others."""

PACKAGES: dict[str, str] = {
    "auth": "wire",
    "boot": "auth luks wire",
    "collateral": "auth gpu quote wire",
    "gpu": "quote",
    "keys": "store",
    "luks": "quote",
    "miner": "auth boot wire",
    "quote": "",
    "server": "auth collateral gpu keys quote store tlog transport units wire",
    "store": "quote",
    "testing": "auth gpu keys quote store units wire",
    "tlog": "",
    "transport": "wire",
    "units": "keys quote store tlog wire",
    "wire": "quote",
}
"""Which others each pure package imports; the modules beside them (errors, effects, log, secret) are for all."""

QUOTE = "chutes_proto.quote"
CONVERTER = f"{CORE}._converter"
QUOTE_MAY_IMPORT = (
    *("attr", "attrs", "cattrs", "cryptography", "msgspec"),
    *(QUOTE, CONVERTER, f"{CORE}._error", f"{CORE}._lazy", f"{CORE}._proof"),
)
"""The verifier can be used alone, with the converter: both import this and the pure part of the standard library."""


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_pure(module: str) -> bool:
    return within(module, CORE) and not any(within(module, impure) for impure in IMPURE)


def imported_names(tree: ast.AST, package: str, scope: str = "") -> Iterator[tuple[int, str, str]]:
    """Every ``module`` of ``import module`` and ``module.name`` of ``from module import name``, made absolute.

    Each with its line before it and, after it, the qualified name of the function or class that it stands in.
    """
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)):
            continue  # no expression has a statement in it
        inner = scope
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, scope) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}", scope) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{scope}.{node.name}" if scope else node.name
        yield from imported_names(node, package, inner)


def _import_violation(module: str, name: str, scope: str) -> str | None:
    if f"{module}.{scope}" in LOADERS and within(name, "chutes_proto.io"):
        return None
    if is_pure(module):
        is_exempt = (module, name) in MAY_IMPORT or name in TYPES
        if any(within(name, outside) for outside in OUTSIDE_WORLD) and not is_exempt:
            return f"imports {name}, which reaches the outside world"
        if any(within(name, impure) for impure in (*IMPURE, *BINDINGS)):
            return f"imports {name}, which is not pure"
    for room, others in NEVER_IMPORTS.items():
        if within(module, room) and any(within(name, other) for other in others):
            return f"imports {name}, of which {room} knows nothing"
    if within(module, QUOTE) or module == CONVERTER:
        root = name.partition(".")[0]
        if root not in sys.stdlib_module_names and not any(within(name, allowed) for allowed in QUOTE_MAY_IMPORT):
            return f"imports {name}, of which {module} knows nothing"
    return None


def _node_violation(module: str, node: ast.AST) -> str | None:
    match node:
        case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
            return f"calls {name}()"
        case ast.Attribute(
            value=ast.Name(id="date" | "datetime") | ast.Attribute(attr="date" | "datetime"), attr=name
        ) if name in CLOCKS:
            return f"reads a clock (.{name})"
        case ast.Attribute(attr=name) | ast.Name(id=name) if name in ENTROPY:
            return f"draws entropy ({name})"
        case ast.AsyncFunctionDef(name=name) if module not in ASYNC_FILES:
            return f"async def {name}"
        case ast.Yield() if module not in YIELD_FILES:
            return "a bare yield"
        case _:
            return None


def _is_never_a_flow(node: ast.AST) -> bool:
    match node:
        case ast.FunctionDef(decorator_list=[ast.Name(id="contextmanager")]):
            return True
        case ast.FunctionDef(returns=ast.Subscript(value=ast.Name(id="Iterator"), slice=ast.Name(id="str"))):
            return True
        case _:
            return False


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return the violations of a module, by its dotted name: one ``line: what`` each."""
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    imports = imported_names(tree, package)
    found = [(line, _import_violation(module, name, scope)) for line, name, scope in imports]
    if is_pure(module):
        exempt = {id(node) for other in ast.walk(tree) if _is_never_a_flow(other) for node in ast.walk(other)}
        nodes = [node for node in ast.walk(tree) if not (isinstance(node, ast.Yield) and id(node) in exempt)]
        found += [(getattr(node, "lineno", 0), _node_violation(module, node)) for node in nodes]
    return [f"{line}: {what}" for line, what in sorted(f for f in found if f[1] is not None)]


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=module_name)
def test_module_keeps_the_rules(path: Path) -> None:
    found = violations(module_name(path), path.read_text("utf-8"), is_package=path.name == "__init__.py")
    assert not found, "\n".join(f"{path.relative_to(SRC.parent)}:{line}" for line in found)


LOAD = "class Policy:\n  def load():\n    "


@pytest.mark.parametrize(
    ("module", "source", "what"),
    [
        ("chutes_proto.units.boot", "import time", "imports time"),
        ("chutes_proto.units.boot", "import os.path as p", "imports os.path"),
        ("chutes_proto.units.boot", "from io import open as o", "imports io.open"),
        ("chutes_proto.store._sql", "import psycopg", "imports psycopg"),
        ("chutes_proto.units.boot", "from socket import socket", "imports socket.socket"),
        ("chutes_proto.wire.http", "from urllib.request import urlopen", "imports urllib.request.urlopen"),
        ("chutes_proto.wire.http", "def f():\n  import secrets", "2: imports secrets"),
        ("chutes_proto.units.boot", "from chutes_proto.io.stores.sqlite import X", "is not pure"),
        ("chutes_proto.units.boot", "from chutes_proto import cli", "is not pure"),
        ("chutes_proto.units.boot", "from ..io.stores import sqlite", "imports chutes_proto.io.stores.sqlite"),
        ("chutes_proto.units.boot", "from .. import io", "imports chutes_proto.io"),
        ("chutes_proto.testing._playbook", "import chutes_proto_trio", "is not pure"),
        ("chutes_proto.server._asgi", "from chutes_proto.io import files\ndef asgi_app(): ...", "1: imports"),
        ("chutes_proto.server._asgi", "def another():\n  from chutes_proto.io import files", "is not pure"),
        ("chutes_proto.server._app", "def asgi_app():\n  from chutes_proto.io import files", "is not pure"),
        ("chutes_proto.server._asgi", "def asgi_app():\n  from chutes_proto import cli", "is not pure"),
        ("chutes_proto.server._asgi", "def asgi_app():\n  import time", "imports time"),
        ("chutes_proto.units.boot", "from importlib import import_module", "imports importlib.import_module"),
        ("chutes_proto.units.boot", "x = open('f')", "calls open()"),
        ("chutes_proto.units.boot", "print('x')", "calls print()"),
        ("chutes_proto.units.boot", "x = datetime.now(tz=UTC)", "reads a clock (.now)"),
        ("chutes_proto.units.boot", "f = datetime.datetime.utcnow", "reads a clock (.utcnow)"),
        ("chutes_proto.auth.client_identity", "k = ec.generate_private_key(c)", "draws entropy"),
        ("chutes_proto.boot._flows", "async def f(): ...", "async def f"),
        ("chutes_proto.boot._flows", "def f():\n  yield Sleep(1)", "2: a bare yield"),
        ("chutes_proto.boot._flows", "def f():\n  x = yield", "2: a bare yield"),
        ("chutes_proto.boot._flows", "@cache\ndef f():\n  x = yield", "3: a bare yield"),
        ("chutes_proto.boot._flows", "def f() -> Iterator[Effect[int]]:\n  yield Sleep(1)", "2: a bare yield"),
        ("chutes_proto.boot._flows", "def f() -> Flow[str]:\n  yield Sleep(1)", "2: a bare yield"),
        (
            "chutes_proto.quote._verify",
            "from chutes_proto.wire import http",
            "of which chutes_proto.quote._verify knows",
        ),
        ("chutes_proto._converter", "from chutes_proto import errors", "of which chutes_proto._converter knows"),
        ("chutes_proto.quote._verify", "from chutes_proto import errors", "of which chutes_proto.quote._verify knows"),
        ("chutes_proto.quote._verify", "import h11", "of which chutes_proto.quote._verify knows"),
        ("chutes_proto.quote._policy", "from chutes_proto.io.files import read_file", "is not pure"),
        ("chutes_proto.quote._verify", f"{LOAD}from chutes_proto.io.files import read_file", "is not pure"),
        ("chutes_proto.wire.codec", "from chutes_proto.server import app", "of which chutes_proto.wire knows"),
        ("chutes_proto.auth.binding", "import chutes_proto.boot._flows", "of which chutes_proto.auth knows"),
        ("chutes_proto.keys.vault", "from chutes_proto.effects import Flow", "of which chutes_proto.keys knows"),
        ("chutes_proto.boot._flows", "from chutes_proto.server._app import X", "of which chutes_proto.boot knows"),
        ("chutes_proto.server._app", "from ..boot import _flows", "of which chutes_proto.server knows"),
        ("chutes_proto_trio.server", "import chutes_proto_asyncio", "of which chutes_proto_trio knows"),
        ("chutes_proto_asyncio", "from chutes_proto_trio import serve", "of which chutes_proto_asyncio knows"),
    ],
)
def test_violations_are_found(module: str, source: str, what: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert what in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("chutes_proto.io.files", "import os, time\nx = open('f')"),
        ("chutes_proto.cli.main", "import sys\nimport chutes_proto_trio\nprint(1)"),
        ("chutes_proto.io.server.aio", "import trio\nasync def f(): ..."),
        ("chutes_proto.effects", "async def f(): ...\ndef g():\n  yield 1"),
        ("chutes_proto.transport.asgi", "async def f(): ..."),
        ("chutes_proto.store._rows", "def g():\n  yield 1"),
        ("chutes_proto.server._app", "@contextmanager\ndef f():\n  yield"),
        ("chutes_proto.server._config", "def f() -> Iterator[str]:\n  yield 'a problem'"),
        ("chutes_proto.boot._flows", "def f():\n  r = yield from Sleep(1)"),
        ("chutes_proto.units.boot", "x = self.now"),
        ("chutes_proto.wire.http", "from urllib.parse import quote\nimport timeit_like"),
        (
            "chutes_proto.quote._verify",
            "from chutes_proto._error import ChutesError\nfrom .errors import X",
        ),
        ("chutes_proto.quote", "from .verify import verify"),
        ("chutes_proto.server._asgi", "def asgi_app():\n  from chutes_proto.io import files"),
        ("chutes_proto.server._config", "class ServerConfig:\n  def load(cls):\n    import chutes_proto.io.files"),
        ("chutes_proto.server._config", "from os import PathLike"),
        ("chutes_proto.quote._policy", f"{LOAD}from chutes_proto.io.files import read_file"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source, is_package=module.count(".") == 1) == []


def test_the_list_of_loaders_has_no_name_too_many() -> None:
    found: set[str] = set()
    for path in SRC.rglob("*.py"):
        module = module_name(path)
        imports = imported_names(ast.parse(path.read_text("utf-8")), module)
        if is_pure(module):
            found |= {f"{module}.{scope}" for _, name, scope in imports if within(name, "chutes_proto.io")}
    assert found == LOADERS


def test_each_pure_package_imports_these_others_and_no_more() -> None:
    def package_of(name: str) -> str:
        return [*name.split("."), ""][1]

    imports: dict[str, set[str]] = {}
    for path in (SRC / CORE).glob("*/**/*.py"):
        module = module_name(path)
        if is_pure(module):
            parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
            names = [name for _, name, _ in imported_names(ast.parse(path.read_text("utf-8")), parent)]
            used = {package_of(name) for name in names if within(name, CORE)}
            imports.setdefault(package_of(module), set()).update(used - {package_of(module)})
    found = {package: " ".join(sorted(used & {*imports})) for package, used in sorted(imports.items())}
    assert found == PACKAGES


def import_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another, over however many others."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        found, waiting = set[str](), [module]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        reached[module] = found
    circles = {frozenset({other for other in reached[module] if module in reached[other]}) for module in imports}
    return [sorted(circle) for circle in circles if circle]


def test_a_circle_is_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set[str](), "e": {"a"}}
    assert import_circles(imports) == [["a", "b", "c"]]


def test_no_packages_import_one_another() -> None:
    assert import_circles({package: {*used.split()} for package, used in PACKAGES.items()}) == []


def test_no_modules_import_one_another() -> None:
    """Not inside a function and not for types either: of two that do, neither can be read or moved alone."""
    paths = {module_name(path): path for path in SRC.rglob("*.py")}

    def module_of(name: str) -> str:
        return name if name in paths or not name else module_of(name.rpartition(".")[0])

    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = imported_names(ast.parse(path.read_text("utf-8")), package)
        imports[module] = {module_of(name) for _, name, _ in names} - {module, ""}
    assert import_circles(imports) == []
