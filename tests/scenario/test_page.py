"""The page of the admin listener in a real browser: what it shows, what it refuses to run, and how it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing

import httpx
import pytest
from attrs import evolve

from chutes_proto import __version__
from chutes_proto.store._rows import AuditRow, Insert, KeyServer, NoteKeyServer, NoteWhatIf, Vm, WhatIf
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import VM, boot, platform
from tests.scenario.premises import Premises
from tests.scenario.test_admin import listen
from tools.browser import Browser, browser

pytestmark = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)

OWNED = "document.documentElement.dataset.owned=1"
HOSTILE = (
    f"<img src=x onerror={OWNED}>",
    f"</script><script>{OWNED}</script>",
    f"\"'><svg onload={OWNED}>",
    "{{7*7}} ${7*7} &lt;b&gt; \\u003cb\\u003e",
)
TAB, ENTER = 9, 13


def place_of(premises: Premises) -> str:
    """The address of the admin listener of a server that has started."""
    premises.wait_for_log('"serving"')
    log = premises.directory.with_name("log").read_text()
    (found,) = re.findall(r'"admin":\["(http://[0-9.:]+)"\]', log)
    return str(found)


def fill(premises: Premises) -> None:
    """Names and reasons that are markup, as a faulty release or another writer of the store might leave them."""
    with closing(premises.open()) as store:
        for version in (__version__, "0.0.1"):
            row = KeyServer(f"server of {version}", version, "{}", premises.now + 3600)  # it does not end meanwhile
            store.transact(Ask(NoteKeyServer(row)))
        first = [{"vm": text, "hotkey": VM.hotkey, "code": "tcb_rejected", "reason": "OutOfDate"} for text in HOSTILE]
        counts = dict.fromkeys(("warned", "not_judged", "refused_later"), 0) | {"refused": 4, "judged": 9}
        tried = {"policy": "new.toml", "at": premises.now, **counts, "changes": [], "first": first}
        store.transact(Ask(NoteWhatIf(WhatIf(premises.now, json.dumps(tried)))))
        for number, text in enumerate(HOSTILE):
            unit = evolve(boot(text, now=premises.now, vm=Vm(VM.hotkey, text)), platform=platform(text))
            _ = store.transact(evolve(unit, profile_name=text, profile_version=text, tcb_status=text, root=None))
            denial = AuditRow(
                premises.now, "vm", text, "refused", text, Vm(text, text), request_id=text, peer_address=text
            )
            told = evolve(denial, reason=f"measurement_mismatch: {text}") if number % 2 else denial
            store.transact(Ask(Insert(told)))


def test_it_shows_the_fleet_and_runs_nothing_of_what_it_shows(
    premises: Premises, require_program: Callable[[str], str]
) -> None:
    listen(premises, 'listen = "127.0.0.1:0"')
    fill(premises)
    premises.start()
    vm = premises.vm("a-good-vm")
    secrets = vm.sync(vm.boot()["boot_token"])
    url = place_of(premises)
    with browser(require_program("chromium")) as page:
        page.open(f"{url}/")
        said = "document.querySelector('#groups')?.textContent.includes('simulated') && document.body.textContent"
        text = page.wait(f"({said})")
        for hostile in HOSTILE:
            assert text.count(hostile) >= 7, hostile  # in a group and a denial, and of a VM in the last what-if
        assert not any(str(secret) in text for secret in secrets.values())
        assert re.search(rf"server of {__version__}{__version__}differs: ", text)
        assert "server of 0.0.10.0.1not compared: another release" in text
        assert page.evaluate("document.querySelector('#what-if').checkVisibility()")
        assert re.search(r"Last what-if.*: new\.toml, at .*: 4 of 9 VMs refused, 0 warned, ", text, re.DOTALL)
        for plot in ("boots", "denials"):  # all within one half hour, or two
            assert page.evaluate(f"document.querySelectorAll('#{plot} rect').length") in (1, 2)
        timeline = page.evaluate("document.querySelector('#timeline').textContent")
        for what in ("certificate", "collateral"):
            assert timeline.count(f"{what} ") >= 1
            assert re.search(rf"{what}.*20\d\d-", page.evaluate("document.querySelector('#ends').textContent"))
        assert "newest audit row" in page.evaluate("document.querySelector('#facts').textContent")
        assert page.evaluate("document.documentElement.dataset.owned") is None
        assert page.evaluate("document.querySelectorAll('img, iframe, script').length") == 1  # its own script
        asked = {event["params"]["request"]["url"] for event in page.events if is_request(event)}
        assert asked == {f"{url}/", f"{url}/state"}
        assert not [event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        use_it_by_keys(page)
        backgrounds: list[str] = []
        for dark in (False, True):
            page.show(dark=dark)
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert backgrounds == ["rgb(246, 248, 250)", "rgb(13, 17, 23)"]
        # The policy would stop what an escape missed.
        page.evaluate(f"document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"{OWNED}\">')")
        _ = page.wait("document.querySelector('img') !== null")
        assert "violates" in page.wait_for("Log.entryAdded")["params"]["entry"]["text"]
        assert page.evaluate("document.documentElement.dataset.owned") is None
        say_nothing_of_what_is_not_read(page)


def say_nothing_of_what_is_not_read(page: Browser) -> None:
    """Before the first audit rows are read, no denial is shown, and none is denied either."""
    for is_read in ("false", "true"):
        recent = f"{{denied: [], boots: 0, denials: 0, complete: {is_read}, from: null}}"
        page.evaluate(f"fleet({{fleet: {{groups: [], vms: 1}}, recent: {recent}}}), denied({{recent: {recent}}})")
        numbers = page.evaluate("[...document.querySelectorAll('#numbers dd')].map((each) => each.textContent).join()")
        is_denied = page.evaluate("!document.querySelector('#none').hidden")
        assert (numbers.endswith(",0,0"), is_denied) == (is_read == "true", is_read == "true"), numbers


def is_request(event: dict[str, object]) -> bool:
    return event["method"] == "Network.requestWillBeSent"


def use_it_by_keys(page: Browser) -> None:
    page.press("Tab", TAB)
    assert page.evaluate("document.activeElement.className") == "skip"
    page.press("Tab", TAB)
    page.press("Enter", ENTER, "\r")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    for _ in range(12):
        if page.evaluate("document.activeElement.id") == "filter":
            break
        page.press("Tab", TAB)
    for letter in "onload":
        page.press(letter, ord(letter.upper()), letter)
    assert page.evaluate("[...document.querySelectorAll('#denied details')].filter((each) => !each.hidden).length") == 1
    for _ in range(6):
        page.press("Tab", TAB)
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.press("Enter", ENTER, "\r")
    assert page.evaluate("document.activeElement.parentElement.open") is True


def test_it_is_read_only_and_bound_to_its_listener(premises: Premises) -> None:
    listen(premises, 'listen = "127.0.0.1:0"')
    premises.start()
    with httpx.Client(base_url=place_of(premises), trust_env=False, timeout=60) as client:
        page, state = client.get("/"), client.get("/state")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
        assert not re.findall(r"(?:src|href)=\"(?!#)|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page.text)
        assert state.json()["fleet"]["vms"] in (None, 0)
        for path in ("/", "/state"):
            assert client.get(path).headers["cache-control"] == "no-store"
            assert client.post(path).status_code == 405
            assert client.get(path, headers={"host": "evil.example"}).status_code == 421
