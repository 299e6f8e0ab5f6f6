"""The examples of serving: the recommender with its page, the systemd unit, the Kubernetes manifest."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

FOLDER = ROOT / "examples" / "serving"
RECOMMENDER = FOLDER / "movie_recommender.py"
NEEDS = ("torch", "uvicorn", "httptools")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDS), reason="needs torch and the extra serve"
)


class Page:
    """The example, which goes on.

    Attributes:
        address: of its page.   said: what it printed.
    """

    def __init__(self, *options: str) -> None:
        command = [sys.executable, str(RECOMMENDER), "--keep", "--seconds", "0", "--ratings", "20000", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        self.said, self.address = "", ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said += line
            if line.startswith("page: "):
                self.address = line.split()[1]
            if line.startswith("a held-out film"):
                break

    def get(self, path: str) -> tuple[int, str, bytes]:
        """Status, media type and body."""
        try:
            with urllib.request.urlopen(self.address + path, timeout=HANG_SECONDS) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.headers["Content-Type"], answer.read()

    def end(self) -> int:
        """Ctrl-C; its exit code."""
        self._process.send_signal(signal.SIGINT)
        code = self._process.wait(HANG_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    if any(importlib.util.find_spec(name) is None for name in NEEDS):
        pytest.skip("needs torch and the extra serve")
    page = Page()
    try:
        assert page.address, page.said
        yield page
    finally:
        code = page.end()
    assert code == 0


def test_recommendations_for_a_user(page: Page) -> None:
    status, kind, body = page.get("recommendations?user=7")
    told = json.loads(body)
    assert (status, kind, told["user"], told["known"]) == (200, "application/json", 7, True)
    scores = [film["score"] for film in told["films"]]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True) and 0 < scores[-1] < scores[0] < 1
    assert not {film["title"] for film in told["films"]} & set(told["liked"])
    assert json.loads(page.get("recommendations?user=7")[2]) == told
    assert not json.loads(page.get("recommendations?user=123456789")[2])["known"]


def test_hit_rates_are_live(page: Page) -> None:
    before = json.loads(page.get("hits")[2])
    page.get("recommendations?user=11")
    after = json.loads(page.get("hits")[2])
    for table in ("user", "film"):
        asked = after[table]["keys"] - before[table]["keys"]
        assert asked > 100
        found = {where: after[table].get(where, 0) - before[table].get(where, 0) for where in after[table] if where != "keys"}
        assert sum(found.values()) == asked, found
    assert len([where for where, count in after["film"].items() if count]) > 2  # in memory and on disk


@pytest.mark.parametrize(
    ("path", "status"), [("recommendations?user=x", 400), ("recommendations", 400), ("../etc/passwd", 404), ("hits/", 404)]
)
def test_other_questions_are_refused(page: Page, path: str, status: int) -> None:
    assert page.get(path)[0] == status


def test_the_page_in_a_browser(page: Page, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium: apt-get install chromium")
    picture = Path(os.environ.get("HPS_NUMBA_SCREENSHOT", tmp_path / "page.png"))
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/profile"]
    waits = ["--virtual-time-budget=4000", "--window-size=1100,720"]
    command = [browser, *settings, *waits, "--dump-dom", f"--screenshot={picture}", page.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    films = re.search(r'<ol id="films">(.*?)</ol>', done.stdout, re.DOTALL)
    assert films is not None and films[1].count("<li") == 10, done.stdout[-3000:]
    assert re.search(r'id="hits-film">.*?keys</div>', done.stdout, re.DOTALL), done.stdout[-3000:]
    assert '<p id="problem" class="problem" role="alert"></p>' in done.stdout


def test_a_page_without_a_browser() -> None:
    text = (FOLDER / "movie_recommender.html").read_text()
    assert "innerHTML" not in text  # titles are data
    assert not re.search(r"(?:src|href)=", text)  # nothing is loaded from elsewhere
    for path in ("/recommendations?user=", "/hits"):
        assert path in text


@needs_packages
def test_titles_of_a_file_and_an_end_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user, film = rng.integers(1, 40, 6000), rng.integers(1, 300, 6000)
    stars = np.where((user + film) % 2 == 0, 5, 1)  # odd users like odd films
    lines = [f"{one}\t{other}\t{given}\t{number}\n" for number, (one, other, given) in enumerate(zip(user, film, stars))]
    path = tmp_path / "ml-100k.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(lines))
    command = [sys.executable, str(RECOMMENDER), "--movielens", str(path), "--seconds", "0", "--epochs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "epoch 3: loss" in done.stdout and "for user 7: Film " in done.stdout and "of all pairs" in done.stdout


# -- where it runs ---------------------------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(FOLDER / "hps-numba.service")
    return parser


def test_the_unit_is_hardened_and_drains() -> None:
    service = unit()["Service"]
    for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "DynamicUser", "RestrictNamespaces", "LockPersonality"):
        assert service[name] == "true", name
    assert (service["ProtectSystem"], service["CapabilityBoundingSet"], service["KillSignal"]) == ("strict", "", "SIGTERM")
    assert service["ExecStart"].split()[1] == "serve" and "--host 127.0.0.1" in service["ExecStart"]
    assert unit()["Install"]["WantedBy"] == "multi-user.target"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    text = (FOLDER / "hps-numba.service").read_text()
    path = tmp_path / "hps-numba.service"
    path.write_text(text.replace("/opt/hps-numba/bin/hps-numba", sys.executable))  # verify looks for it
    done = subprocess.run([analyze, "verify", "--man=no", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and path.name not in done.stderr, done.stderr
    rated = subprocess.run([analyze, "security", "--offline=true", "--threshold=25", str(path)], capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout[-400:]


def options_of(command: list[str]) -> None:
    """Check that ``hps-numba serve`` has the options of a command."""
    shown = subprocess.run(
        [sys.executable, "-m", "hps_numba", "serve", "--help"], capture_output=True, text=True, env=environment(COLUMNS="200")
    ).stdout
    for option in command:
        if option.startswith("--"):
            assert option.partition("=")[0] in shown, option


def manifests() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


def test_options_of_unit_and_manifest_exist() -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    options_of(unit()["Service"]["ExecStart"].split())
    options_of(manifests()["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"])


def test_parts_of_the_manifest_fit_together() -> None:
    from hps_numba import read_config

    found = manifests()
    assert set(found) == {"ConfigMap", "Deployment", "Service"}
    pods = found["Deployment"]["spec"]["template"]
    labels, spec = pods["metadata"]["labels"], pods["spec"]
    (container,) = spec["containers"]
    for selector in (found["Deployment"]["spec"]["selector"]["matchLabels"], found["Service"]["spec"]["selector"]):
        assert selector.items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in ports and f"--port={ports['http']}" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    for probe, path in (("startupProbe", "live"), ("livenessProbe", "live"), ("readinessProbe", "ready")):
        assert container[probe]["httpGet"] == {"path": f"/v2/health/{path}", "port": "http"}
    drain = next(option for option in container["args"] if option.startswith("--drain-seconds="))
    assert float(drain.partition("=")[2]) < spec["terminationGracePeriodSeconds"]
    assert container["securityContext"]["readOnlyRootFilesystem"] and spec["securityContext"]["runAsNonRoot"]
    (config,) = (volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume)
    assert config == found["ConfigMap"]["metadata"]["name"]
    assert read_config(json.loads(found["ConfigMap"]["data"]["ps.json"]), strict=True).models[0].model == "films"


def test_the_manifest_by_the_schema_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for manifest in manifests().values():
        validate.validate(manifest, "1.30", strict=True)
