"""Before gated weights are loaded, what is missing is told apart: the real client, against a small hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SECRET = "hf_theSecretOfTheTest"
TOKEN, BAD_TOKEN = f"{SECRET}1", f"{SECRET}2"
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
MISSING = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
# What a hub answers, by repository: status without a token, status with one, headers. Missing repositories are refused
# with 401 too, and a token that is not valid is refused everywhere.
ANSWERS = {
    "open/model": (200, 200, {}),
    "google/gemma-2-2b": (401, 403, GATED),
    "somebody/gated": (401, 403, GATED),
    "nobody/nothing": (401, 404, MISSING),
    "private/token": (401, 403, {}),
    "broken/hub": (503, 503, {}),
    "of-a/mirror": (404, 404, {}),  # knows files, and no such question
    "silent/hub": (0, 0, {}),
}
PROGRAM = """
import json, sys
from tutorial_sae.models import hub_access, load_model, shape_of
from tutorial_sae.runtime import TutorialError
said = {}
for name in sys.argv[1:]:
    what, _, model = name.rpartition(" ")
    try:
        if what == "load":
            said[name] = load_model(model, device="cpu").card[:2]
        else:
            said[name] = str({"": hub_access, "shape": shape_of}[what](model))
    except (TutorialError, ValueError) as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (the server makes the objects)
    released = threading.Event()

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        self.asked.append(self.path if self.path.count("/") < 4 else repo)
        token = self.headers.get("Authorization")
        anonymous, known, headers = ANSWERS.get(repo, (500, 500, {}))
        status = known if token else anonymous
        if token == f"Bearer {BAD_TOKEN}":
            status, headers = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            if repo == "nobody/nothing":  # as older answers had it
                headers = MISSING
        if repo == "silent/hub":
            if not self.released.wait(20):
                self.asked.append("waited for")
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass

    do_HEAD = do_POST = do_GET


@pytest.fixture
def hub():
    Hub.asked.clear()
    Hub.released.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Hub.released.set()
    server.shutdown()
    server.server_close()


def access(hub: str, home: Path, *names: str, **environment: str) -> dict[str, str]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    settings |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1", "OMP_NUM_THREADS": "1"}
    settings |= {"PYTHONPATH": str(Path(__file__).parent.parent), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr + "".join(Hub.asked)
    said = json.loads(done.stdout.splitlines()[-1])
    assert not any("\n" in sentence for sentence in said.values())
    return said


def cached(home: Path, repo: str, *missing: str, model: Path | None = None, shards: int = 1) -> None:
    """A model in the local hub cache: one of the tests' own, or one that is empty files."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in model.iterdir() if model else ():
        (snapshot / file.name).symlink_to(file)
    if model is None:
        weights = [f"model-{shard}.safetensors" for shard in range(shards)] if shards > 1 else ["model.safetensors"]
        for file in {"config.json", "tokenizer.json", *weights} - {*missing}:
            (snapshot / file).write_text("{}")
        if shards > 1:
            index = {"weight_map": {f"weight {number}": weights[number % shards] for number in range(5)}}
            (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))


def test_without_a_token(hub: str, tmp_path: Path):
    names = ["hub:open/model", "gemma-2-2b", "hub:somebody/gated", "hub:nobody/nothing", "hub:broken/hub"]
    names += ["hub:of-a/mirror", "hub:silent/hub", "smollm2-135m", str(tmp_path), "hub:a/b/c", "hub:private/token"]
    said = access(hub, tmp_path, *names, "load gemma-2-2b", "shape hub:somebody/gated")
    assert said["hub:open/model"] == said["hub:of-a/mirror"] == "within reach"
    assert said["smollm2-135m"] == said[str(tmp_path)] == "no hub needed"
    for name in ("gemma-2-2b", "hub:somebody/gated"):
        assert "it is gated, and you have no token here: open its page" in said[name]
        assert "hf auth login" in said[name]
        for way in ("`--model`: a FOLDER, or hub:OWNER/NAME", "its licence still applies", "`train gpt2` needs no acc"):
            assert way in said[name], "an ungated way"
    assert "such as hub:unsloth/gemma-2-2b" in said["gemma-2-2b"]
    assert "unsloth" not in said["hub:somebody/gated"]
    assert said["load gemma-2-2b"] == said["gemma-2-2b"], "users see these sentences"
    assert said["shape hub:somebody/gated"] == said["hub:somebody/gated"], "also where the sizes are asked for first"
    missing = "the hub has no such model, or none that you may see: check the name, or run `hf auth login`"
    assert f"from nobody/nothing: {missing}" in said["hub:nobody/nothing"]
    assert missing in said["hub:private/token"]
    assert "status 503: look at its page on the hub, or try again later" in said["hub:broken/hub"]
    assert "the hub cannot be reached" in said["hub:silent/hub"]
    assert "waited for" not in Hub.asked
    assert said["hub:a/b/c"].startswith("ValueError: hub:a/b/c cannot be a model on the hub: write hub:OWNER/NAME")


def test_with_a_token_and_half_of_some_models_in_the_cache(hub: str, tmp_path: Path):
    cached(tmp_path, "google/gemma-2-2b", "model-2.safetensors", shards=3)
    cached(tmp_path, "open/model", "tokenizer.json")
    cached(tmp_path, "broken/hub", "model.safetensors")
    names = ["gemma-2-2b", "hub:open/model", "hub:broken/hub", "hub:nobody/nothing", "hub:private/token"]
    said = access(hub, tmp_path, *names, HF_TOKEN=TOKEN)
    # the client also asks, for itself, by which agent it is run
    assert [f"hub:{repo}" for repo in Hub.asked if repo[0] != "/"] == ["hub:google/gemma-2-2b", *names[1:]]
    assert "licence has not been accepted by the owner of your token: open its page" in said["gemma-2-2b"]
    assert "`train gpt2` needs no account" in said["gemma-2-2b"]
    assert said["hub:open/model"] == "within reach"
    assert "the hub has no such model, or none that you may see: check the name." in said["hub:nobody/nothing"]
    assert "status 403: look at its page on the hub" in said["hub:private/token"]
    assert not any("hf auth login" in sentence for sentence in said.values())


@pytest.mark.parametrize("token", [BAD_TOKEN, f"{SECRET}é"])
def test_with_a_token_that_is_not_valid(hub: str, tmp_path: Path, token: str):
    said = access(hub, tmp_path, "gemma-2-2b", "hub:open/model", "hub:nobody/nothing", HF_TOKEN=token)
    for sentence in said.values():
        assert "the hub does not accept your token: run `hf auth login` with a new one" in sentence
        assert "gated" not in sentence
        assert "no such model" not in sentence


def test_without_a_network(hub: str, tmp_path: Path):
    said = access("http://127.0.0.1:9", tmp_path, "gpt2", "gemma-2-2b", HF_TOKEN=TOKEN)
    for sentence in said.values():
        assert "the hub cannot be reached" in sentence
        assert "check network and proxy" in sentence
    said = access(hub, tmp_path, "gpt2", "load gemma-2-2b", HF_HUB_OFFLINE="1")
    for sentence in said.values():
        assert "HF_HUB_OFFLINE is set): unset it where there is a network" in sentence
    assert Hub.asked == []


def test_what_is_in_the_cache_is_not_asked_for(hub: str, tmp_path: Path, gpt2_folder: Path):
    cached(tmp_path, "openai-community/gpt2")
    cached(tmp_path, "google/gemma-2-2b", model=gpt2_folder)  # which model it is does not matter here
    cached(tmp_path, "of/shards", shards=3)
    names = ["gpt2", "gemma-2-2b", "hub:of/shards", "load gemma-2-2b", "load hub:google/gemma-2-2b"]
    said = access(hub, tmp_path, *names, HF_TOKEN=BAD_TOKEN)  # gated, and a bad token: nobody asks
    assert [said[name] for name in names[:3]] == ["in the cache"] * 3
    assert said["load gemma-2-2b"] == ["gemma-2-2b", "blocks.12.hook_resid_post"]
    assert said["load hub:google/gemma-2-2b"] == ["hub:google/gemma-2-2b", "blocks.5.hook_resid_post"]
    assert Hub.asked == []
