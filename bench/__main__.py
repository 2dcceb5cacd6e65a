"""Run the named subjects, or all of them."""

from __future__ import annotations

import argparse
from importlib import import_module
from pkgutil import iter_modules

import bench


def main() -> None:
    helpers = ("__main__", "floor", "herd", "layers", "measure")
    subjects = sorted(m.name for m in iter_modules(bench.__path__) if m.name not in helpers)
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__)
    _ = parser.add_argument("subject", nargs="*", help=f"of {', '.join(subjects)} (default: all)")
    chosen = parser.parse_args().subject or subjects
    if unknown := set(chosen) - set(subjects):
        parser.error(f"unknown subject {min(unknown)}; choose one of: {', '.join(subjects)}")
    for subject in chosen:
        import_module(f"bench.{subject}").run()


if __name__ == "__main__":
    main()
