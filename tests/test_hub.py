"""Before gated weights are loaded, what is missing is told apart: the real client, against a small hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SECRET = "hf_theSecretOfTheTest"
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
# what a hub answers: status and headers, by repository
ANSWERS = {
    "open/model": (200, {}),
    "google/gemma-2-2b": (401, GATED),  # 403 with a token, below
    "nobody/nothing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "bad/token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "broken/hub": (503, {}),
}
PROGRAM = """
import json, sys
from tutorial_sae.models import hub_access
from tutorial_sae.runtime import TutorialError
said = {}
for name in sys.argv[1:]:
    try:
        said[name] = hub_access(name)
    except TutorialError as error:
        said[name] = f"{error}"
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (the server makes the objects)

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        self.asked.append(repo)
        status, headers = ANSWERS[repo]
        if "Authorization" in self.headers and headers is GATED:
            status = 403
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def access(hub: str, home: Path, *names: str, **environment: str) -> dict[str, str]:
    settings = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    settings |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return json.loads(done.stdout)


def cached(home: Path, repo: str) -> None:
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (folder / "snapshots" / "abc" / file).write_text("{}")


def test_without_a_token(hub: str, tmp_path: Path):
    cached(tmp_path, "openai-community/gpt2")
    names = ["hub:open/model", "gemma-2-2b", "hub:nobody/nothing", "hub:broken/hub", "gpt2", "smollm2-135m"]
    said = access(hub, tmp_path, *names)
    assert said["hub:open/model"] == "within reach"
    assert said["gpt2"] == "in the cache"
    assert said["smollm2-135m"] == "no hub needed"
    assert "openai-community/gpt2" not in Hub.asked, "what is cached is not asked for"
    assert "it is gated, and you have no token here" in said["gemma-2-2b"]
    assert "hf auth login" in said["gemma-2-2b"]
    assert "`train --model`" in said["gemma-2-2b"], "an ungated way"
    assert "from nobody/nothing: the hub has no such model" in said["hub:nobody/nothing"]
    assert "status 503: try again later" in said["hub:broken/hub"]


def test_with_a_token(hub: str, tmp_path: Path):
    said = access(hub, tmp_path, "gemma-2-2b", "hub:bad/token", "hub:open/model", HF_TOKEN=SECRET)
    assert "licence has not been accepted by the owner of your token" in said["gemma-2-2b"]
    assert "hf auth login" not in said["gemma-2-2b"]
    assert "does not accept your token" in said["hub:bad/token"]
    assert said["hub:open/model"] == "within reach"


def test_without_a_network(hub: str, tmp_path: Path):
    said = access("http://127.0.0.1:9", tmp_path, "gpt2")
    assert "cannot be reached" in said["gpt2"]
    assert "check network and proxy" in said["gpt2"]
    before = len(Hub.asked)
    said = access(hub, tmp_path, "gpt2", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said["gpt2"]
    assert len(Hub.asked) == before
