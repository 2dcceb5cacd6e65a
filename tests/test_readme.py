"""The README says nothing that the code does not: its examples run, its links lead somewhere."""

import json
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import chutes_proto.sync
from chutes_proto.sync import BootAgent, has_luks_header
from chutes_proto.testing import SimulatedPlatform
from chutes_proto.testing._directory import PLATFORM_FILE, PlatformRecord
from chutes_proto.wire.codes import Code
from tests.dev_server import dev_server
from tests.luks import headers
from tools.docs.pictures import files

HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
ROOT = Path(__file__).resolve().parent.parent
README_FILE = ROOT / "README.md"
README = README_FILE.read_text("utf-8")


def block(number: int) -> str:
    """The README's Python of this number."""
    return str(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number])


@contextmanager
def premises(folder, monkeypatch):
    """A server, and the words for it and for the machine that the agents of the texts name."""
    with dev_server(folder) as server:
        platform = PlatformRecord.decode((server.platform / PLATFORM_FILE).read_bytes()).platform
        monkeypatch.setattr(chutes_proto.sync, "auto_quoter", lambda: platform.quote)
        monkeypatch.setattr(chutes_proto.sync, "BootAgent", partial(BootAgent, images=True))
        monkeypatch.setattr(chutes_proto.sync, "has_luks_header", partial(has_luks_header, images=True))
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca))
        yield {"https://keys.example:8443": server.url, "5Grw…": HOTKEY}, platform.quote


def with_words(text, said):
    for words, meant in said.items():
        assert words in text
        text = text.replace(words, meant)
    return text


def test_the_agent_of_the_readme_opens_its_disks(tmp_path, monkeypatch, require_program):
    """As it stands, but for the address of the server, the hotkey, and disks that are images."""
    _ = require_program("cryptsetup")
    root, storage, cache = (headers.image(tmp_path / name) for name in ("root", "storage", "cache"))
    with premises(tmp_path / "platform", monkeypatch) as (said, quoter):
        with BootAgent(said["https://keys.example:8443"], hotkey=HOTKEY, vm_name="vm-1", quoter=quoter) as agent:
            headers.make_root(root, agent.boot().root_passphrase)
        text = with_words(block(0), said | {"/dev/vda2": root, "/dev/vdb": storage, "/dev/vdc": cache})
        for _boot in range(2):
            exec(text, {})
            assert all(has_luks_header(disk, images=True) for disk in (storage, cache))


def test_the_agent_of_the_reference_is_given_its_keys(tmp_path, monkeypatch):
    """As it stands, too, with a function of its author's for the disks."""
    blank, formatted = (
        headers.image(tmp_path / "blank"),
        headers.image(tmp_path / "formatted", headers.both(headers.told())),
    )
    opened = []

    def open_disk(volume, passphrase, *, may_format):
        opened.append((volume, len(passphrase), may_format))

    page = (ROOT / "docs/reference/api/sync.md").read_text("utf-8").partition("## Keys alone")[2]
    text = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    with premises(tmp_path / "platform", monkeypatch) as (said, _):
        exec(with_words(text, said | {"/dev/vdb": formatted, "/dev/vdc": blank}), {"open_disk": open_disk})
    assert opened == [("storage", 128, False), ("tdx-cache", 128, True)]


def test_the_verifier_of_the_readme_returns_what_the_policy_accepts(vectors, tmp_path, monkeypatch, capsys):
    folder = vectors / "real" / "tdx-v4-00806f050000-00b2526a-20250611"
    report = json.loads((folder / "expected.json").read_bytes())["parsed"]["report"]
    quote, now = (folder / "quote.bin").read_bytes(), int((folder / "now.txt").read_text())
    monkeypatch.chdir(tmp_path)
    collateral, policy = Path("collateral.json"), Path("policy.toml")

    def told(quote, expected):
        """Return the verdict of the example, or the text that it prints."""
        names: dict[str, Any] = {"quote": quote, "now": now, "expected": expected}
        exec(block(1), names)
        return names["verdict"] if "verdict" in names else capsys.readouterr().out

    _ = collateral.write_bytes((folder / "collateral.json").read_bytes())
    _ = policy.write_text('measurements = "unchecked"')
    report_data = bytes.fromhex(report["report_data"])
    verdict = told(quote, report_data)
    assert (verdict.tcb_status, verdict.quote.body.mr_td.hex()) == ("UpToDate", report["mr_td"])
    other = b"another report data, of 64 bytes".ljust(64)
    assert told(quote, other) == f"37 report_data_mismatch {report_data!r} {other!r}\n"
    assert told(quote[:100], report_data) == "0 quote_too_short 100 at least 632\n"
    _ = policy.write_text("")
    assert told(quote, report_data) == "38 no_profiles None None\n"
    platform = SimulatedPlatform(bytes(32))
    _ = collateral.write_bytes(platform.collateral_json(now))
    assert told(platform.quote(bytes(64)), bytes(64)).startswith("6 untrusted_root ")


def test_the_picture_is_drawn_from_its_source():
    for path, picture in files():
        assert path.read_text("utf-8") == picture, "run python -m tools.docs.pictures"


@pytest.mark.parametrize("page", [README_FILE, *sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md"])
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r'(?:\]\(|src="|srcset=")(?!https?:|#)([^)"#]+)', page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_nothing_of_the_reference_is_in_it():
    assert not [code for code in Code if f"`{code}`" in README]
