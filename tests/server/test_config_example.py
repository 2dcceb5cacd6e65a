"""The example of the configuration: it loads, it leaves no key out, and its defaults are the real ones."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest

from chutes_proto.quote._measurements import Schedule
from chutes_proto.server._config import CollateralOptions, ServerConfig
from chutes_proto.server._gpus import Gpu
from chutes_proto.server._profiles import EXTRA_KEYS, ServedOptions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (ROOT / "examples" / "server.toml").read_text("utf-8")
NO_DEFAULTS = {*"policy control minimum_version signing_keys_file kek_previous_file networks unix secret_file".split()}
NO_DEFAULTS |= {"proxy", "mark_file", "origin", "listen", "certificate", "key", "client_ca"}
_ALTERNATIVE = "directory hotkey_file root_passphrase_file root_passphrases_file"
ALTERNATIVES = ("store = ", "collateral = {", *(f"{key} = " for key in _ALTERNATIVE.split()))
"""The beginnings of lines that exclude others."""


def uncommented(*left_out: str) -> str:
    """The example with every key and table that is commented out, but for lines that begin with ``left_out``."""
    whole = re.sub(r"^# (\w+ = .*|\[+[\w.]+\]+)$", r"\1", EXAMPLE, flags=re.MULTILINE)
    return "".join(line for line in whole.splitlines(True) if not line.startswith(left_out))


COMPLETE = uncommented(*ALTERNATIVES)


def leaves(table: Any) -> Iterator[tuple[str, attrs.Attribute[Any]]]:
    """The keys of a table of the configuration and of the tables in it."""
    for key in attrs.fields(attrs.resolve_types(table)):
        for kind in (key.type, *get_args(key.type)):
            if isinstance(kind, type) and attrs.has(kind):
                yield from leaves(kind)
        yield key.name, key


def test_the_complete_configuration_loads():
    config = ServerConfig.from_toml(COMPLETE.encode())
    assert config.proxy[0].parsed_networks
    assert set(config.profile_defaults) | {"root_passphrase_file", "root_passphrases_file"} == EXTRA_KEYS


def test_the_example_is_a_configuration_as_it_stands():
    config = ServerConfig.from_toml(EXAMPLE.encode())
    assert config.collateral == CollateralOptions(directory="collateral")
    assert set(config.profile_defaults) == {"root_passphrase"}


def test_collateral_of_services_loads():
    options = ServerConfig.from_toml(COMPLETE.encode()).collateral
    assert len(options.upstreams) == 1
    assert options.cache == "cache"
    default = CollateralOptions()
    for name in ("update", "grace_seconds", "fetches_per_minute"):
        assert getattr(options, name) == getattr(default, name)


def test_the_profile_of_the_reference_is_toml():
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text("utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (profile,) = tomllib.loads(block)["profile"]
    assert profile["root_passphrase"] == "image"


@pytest.mark.parametrize(
    "name",
    sorted({name for table in (ServerConfig, ServedOptions, Gpu, Schedule) for name, _ in leaves(table)} - {"path"}),
)
def test_no_key_is_left_out(name: str) -> None:
    """But the path, which a file does not say of itself."""
    assert re.search(rf"(?:^|[{{ ]|\[){name}(?: =|\]|\.)", uncommented(), re.MULTILINE), name


def test_what_is_shown_as_a_default_is_one():
    shown = ServerConfig.from_toml(COMPLETE.encode())
    tables: list[attrs.AttrsInstance] = [shown, shown.store, shown.nonce, shown.registration, shown.runtime]
    for table in (*tables, *shown.proxy, shown.limits):
        for key in attrs.fields(type(table)):
            default = key.default
            if default is attrs.NOTHING or isinstance(default, attrs.Factory) or key.name in NO_DEFAULTS:  # type: ignore[arg-type]
                continue
            assert getattr(table, key.name) == default, key.name
