"""Alerts and dashboards, with a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.scenario.premises import Premises
from tests.scenario.test_admin import listen
from tests.waiting import wait_until
from tools.docs.pages import DOCS

MONITORING = ROOT / "examples/monitoring"
ALERTS = MONITORING / "alerts.yml"
FIRING = """
rule_files: ["alerts.yml"]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'chutes_proto_check{instance="a", check="store"}'
        values: '0 0 2x10'
      - series: 'chutes_proto_requests_total{operation="verify_boot_attestation", status="503", code="draining"}'
        values: '0+60x20'
      - series: 'chutes_proto_requests_total{operation="verify_boot_attestation", status="403", code="tcb_rejected"}'
        values: '0 30x20'
      - series: 'chutes_proto_check{instance="a", check="collateral"}'
        values: '0 1x20'
      - series: 'chutes_proto_check{instance="b", check="store"}'
        values: '0 1x20'
    alert_rule_test:
      - {eval_time: 1m, alertname: KeyServerCheck, exp_alerts: []}
      - eval_time: 6m
        alertname: KeyServerCheck
        exp_alerts:
          - exp_labels: {severity: page, instance: a, check: store}
            exp_annotations:
              summary: "a: the check store has a problem"
              runbook: monitor.md#keyservercheck
      - eval_time: 12m
        alertname: StoreNote
        exp_alerts:
          - exp_labels: {severity: ticket, instance: b, check: store}
            exp_annotations:
              summary: "b: something about the store is to be mended"
              runbook: monitor.md#storenote
      - eval_time: 12m
        alertname: BootsFail
        exp_alerts:
          - exp_labels: {severity: page, code: draining}
            exp_annotations: {summary: " answers boots with draining", runbook: "monitor.md#bootsfail"}
      - eval_time: 2m
        alertname: BootsDenied
        exp_alerts:
          - exp_labels: {severity: ticket, code: tcb_rejected}
            exp_annotations: {summary: "many boots are denied with tcb_rejected", runbook: "monitor.md#bootsdenied"}
      - eval_time: 12m
        alertname: EndsSoon
        exp_alerts:
          - exp_labels: {severity: ticket, instance: a, check: collateral}
            exp_annotations:
              summary: "a: collateral ends soon, has ended, or cannot be used"
              runbook: monitor.md#endssoon
"""


def test_alerts_fire_when_they_should(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    promtool = require_program("promtool")
    _ = (tmp_path / "alerts.yml").write_bytes(ALERTS.read_bytes())
    _ = (tmp_path / "test.yml").write_text(FIRING)
    for words in (
        ("check", "config", str(MONITORING / "prometheus.yml")),
        ("test", "rules", str(tmp_path / "test.yml")),
    ):
        done = subprocess.run([promtool, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_runbook() -> None:
    page = (DOCS / "how-to" / "monitor.md").read_text()
    headings = [heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)]
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    assert (
        re.findall(r"runbook: monitor.md#(\w+)", ALERTS.read_text()) == [alert.lower() for alert in alerts] == headings
    )


def queries() -> Iterator[str]:
    yield from re.findall(r"^ +expr: (.*)$", ALERTS.read_text(), re.MULTILINE)
    for panel in json.loads((MONITORING / "grafana.json").read_text())["panels"]:
        yield from (target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"])


@pytest.mark.parametrize("premises", ["sqlite"], indirect=True)
def test_a_prometheus_answers_every_query(
    premises: Premises, tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    prometheus = require_program("prometheus")
    premises.start()
    before = premises.vm()
    _ = before.sync(before.boot()["boot_token"])
    premises.stop()
    premises.directory.with_name("log").unlink()
    listen(premises, 'listen = "127.0.0.1:0"')
    premises.start()  # with keys in the store, which are counted once a minute
    premises.wait_for_log('"serving"')
    log = premises.directory.with_name("log").read_text()
    (target,) = re.findall(r'"admin":\["http://([0-9.:]+)"\]', log)
    vm = premises.vm()
    _ = vm.sync(vm.boot()["boot_token"])
    text = (MONITORING / "prometheus.yml").read_text().replace("127.0.0.1:9464", target)
    _ = (tmp_path / "prometheus.yml").write_text(text.replace("15s", "1s"))
    _ = (tmp_path / "alerts.yml").write_bytes(ALERTS.read_bytes())
    command = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    said = (tmp_path / "said").open("w")
    with said, subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stderr=said, stdout=said) as process:
        try:
            place = r'address=(?:")?(127\.0\.0\.1:[1-9][0-9]*)'
            found = wait_until(lambda: re.search(place, (tmp_path / "said").read_text()))
            with httpx.Client(base_url=f"http://{found[1]}", trust_env=False, timeout=60) as client:

                def ask(query: str) -> list[Any]:
                    answer = client.get("/api/v1/query", params={"query": query}).json()
                    assert answer["status"] == "success", f"{query}: {answer}"
                    result: list[Any] = answer["data"]["result"]
                    return result

                _ = wait_until(lambda: client.get("/-/ready").is_success)
                _ = wait_until(lambda: ask("rate(chutes_proto_requests_total[1m])"))
                # The first denials with a code may be all: a rack boots at once, and none of its VMs comes back.
                _ = vm.boot(status=401, nonce="0" * 64)
                denied = [query.partition(" > ")[0] for query in queries() if 'status=~"4.."' in query]
                assert len(denied) == 1
                _ = wait_until(lambda: [one for one in ask(denied[0]) if float(one["value"][1]) > 0])
                rules = wait_until(lambda: client.get("/api/v1/rules").json()["data"]["groups"])
                assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
                for query in queries():
                    _ = ask(query)
                    for name in re.findall(r"chutes_proto_\w+", query):
                        assert ask(name), f"nothing has the name {name}"
        finally:
            process.terminate()
