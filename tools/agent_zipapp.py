"""The boot agent as one file: ``python -m tools.agent_zipapp OUT --python TARGET``, or ``make zipapp``.

The file runs with the target's own Python, 3.11 or newer, and cryptography, 38 or newer; it contains everything else
that it needs, in pure Python, with byte code for the target beside the source.

Rules kept here:

* its content follows from the imports of its commands: a module that needs a missing package is left out;
* byte code is not checked against its source (PEP 552, unchecked), so that it is valid whatever the clock shows;
* the same sources and the same target give the same bytes: names sorted, times from ``SOURCE_DATE_EPOCH``, and no
  compression, because an initramfs is compressed.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "chutes_proto"
ROOTS = (f"{PACKAGE}.cli.main", f"{PACKAGE}.cli.agent.running")
BUNDLED = ("attr", "attrs", "cattrs", "h11", "typing_extensions")
LEFT_OUT = frozenset({"preconf", "strategies", "tests"})
"""Folders of bundled packages that no command imports."""
THERE = ("cryptography",)
"""Packages of the target."""

OLDEST = (3, 11)
NEEDED = f"the agent needs Python {OLDEST[0]}.{OLDEST[1]} or newer"
MAIN = f"""\
import sys

if sys.version_info < {OLDEST}:
    sys.stderr.write("chutes-proto: this is Python %d.%d; {NEEDED}\\n" % sys.version_info[:2])
    sys.exit(2)

from {PACKAGE}.cli.agent import main_of_file
from {PACKAGE}.cli.main import guarded

sys.exit(guarded(main_of_file, sys.argv[1:]))
"""
"""Code that older Pythons can read too."""
_FIRST_TIME = 315_532_800  # 1980-01-01, the first time that a ZIP file can have


def build(out: Path, python: str) -> None:
    """Make the file at ``out`` for the interpreter ``python``. Raises `subprocess.CalledProcessError`, `OSError`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="chutes-proto-zipapp-") as folder:
        tree = Path(folder)
        _gather(tree)
        _compile(tree, python)
        partial = out.with_name(f".{out.name}.partial")
        _pack(tree, partial, python)
        _ = partial.replace(out)


def _gather(tree: Path) -> None:
    for name in sorted(modules()):
        source = _source(name)
        _copy(source, tree / Path(*name.split(".")) / source.name if _is_package(source) else _target_path(tree, name))
    for bundled in BUNDLED:
        origin = _source(bundled)
        if not _is_package(origin):
            _copy(origin, _target_path(tree, bundled))
            continue
        for source in sorted(origin.parent.rglob("*.py")):
            path = source.relative_to(origin.parent)
            if LEFT_OUT.isdisjoint(path.parts):
                _copy(source, tree / bundled / path)
    _ = (tree / "__main__.py").write_text(MAIN, "utf-8")


def _target_path(tree: Path, name: str) -> Path:
    return tree.joinpath(*name.split(".")).with_suffix(".py")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _ = shutil.copyfile(source, target)


def _compile(tree: Path, python: str) -> None:
    """Put ``module.pyc`` beside each ``module.py``, where `zipimport` looks first; it has no path of this machine.

    Docstrings and column numbers are left out: in an initramfs they would only take memory. So are assertions, which
    the project does not use.
    """
    options = ["-q", "-b", "-o", "2", "--invalidation-mode", "unchecked-hash", "-s", str(tree)]
    command = [python, "-s", "-X", "no_debug_ranges", "-m", "compileall", *options, str(tree)]
    _ = subprocess.run(command, check=True, env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"})


def _pack(tree: Path, out: Path, python: str) -> None:
    moment = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", _FIRST_TIME)), _FIRST_TIME))[:6]
    with out.open("wb") as file:
        _ = file.write(f"#!{shutil.which(python) or python} -I\n".encode())
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(tree.rglob("*.py*")):
                entry = zipfile.ZipInfo(path.relative_to(tree).as_posix(), moment)
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, path.read_bytes())
    out.chmod(0o755)


# --- content ---


def modules() -> set[str]:
    """Return the modules of the project that the commands need, with their packages."""
    found: set[str] = set()
    waiting = [*ROOTS]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        here = _imports(name)
        waiting += [other for other in here if other.startswith(PACKAGE) and _fits(other)]
        waiting += [name.rpartition(".")[0]] if "." in name else []
    return found


def _fits(name: str) -> bool:
    """Return whether everything that a module imports, directly or not, is available."""
    allowed = {PACKAGE, *BUNDLED, *THERE, *sys.stdlib_module_names}
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        here = set(_imports(waiting.pop(), later=False)) - needed
        needed |= here
        waiting += [other for other in here if other.startswith(PACKAGE)]
    return all(other.partition(".")[0] in allowed for other in needed)


def _imports(name: str, *, later: bool = True) -> list[str]:
    """Return the modules that a module imports, at once or also ``later``, but not for types alone."""
    tree = ast.parse(_source(name).read_bytes())
    return [found for node in _statements(tree, later=later) for found in _named(node)]


def _statements(tree: ast.AST, *, later: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not later:
                continue
            case _:
                yield node
                yield from _statements(node, later=later)


def _named(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), level=0, names=names):
            yield module
            if module.startswith(PACKAGE):
                submodules = (f"{module}.{alias.name}" for alias in names)
                yield from (submodule for submodule in submodules if _is_module(submodule))
        case _:
            pass


def _is_module(name: str) -> bool:
    parent = find_spec(name.rpartition(".")[0])
    return parent is not None and parent.submodule_search_locations is not None and find_spec(name) is not None


def _is_package(source: Path) -> bool:
    return source.name == "__init__.py"


def _source(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"module {name} not found; install the project first: make install")
    return Path(spec.origin)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.agent_zipapp", description=(__doc__ or "").partition("\n")[0]
    )
    _ = parser.add_argument("out", type=Path, help="the file to make")
    _ = parser.add_argument("--python", default=sys.executable, help="the target's interpreter (default: this one)")
    options = parser.parse_args()
    version, cryptography = _target(options.python)
    build(options.out, options.python)
    has = f"which has cryptography {cryptography}" if cryptography else "which lacks cryptography (install 38 or newer)"
    print(f"{options.out}: {options.out.stat().st_size // 1024} KiB, byte code for Python {version}, {has}")


def _target(python: str) -> tuple[str, str]:
    """Return the versions of an interpreter that can run the agent, and of its cryptography, empty if missing."""
    ask = f"import sys; print(sys.version.split()[0], sys.version_info >= {OLDEST})"
    ask += "; import cryptography; print(cryptography.__version__)"
    try:
        done = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=False)
    except OSError as exc:
        sys.exit(f"{python} cannot be run: {exc.strerror}; name the target's interpreter (make zipapp TARGET_PYTHON=…)")
    match done.stdout.split():
        case [version, "True", *cryptography]:
            return version, "".join(cryptography)
        case [version, *_]:
            sys.exit(f"{python} is Python {version}; {NEEDED}")
        case _:
            sys.exit(f"{python} does not run as Python; name the target's interpreter (make zipapp TARGET_PYTHON=…)")


if __name__ == "__main__":
    main()
