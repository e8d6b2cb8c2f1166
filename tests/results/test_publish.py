"""Sending a player to the Hub, played by a small server on this machine that keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from avatarl import UserError
from avatarl.cli import main
from avatarl.errors import RunFailed
from avatarl.results import push_to_hub
from avatarl.training import train

REPO = "somebody/a-player"


class Hub(ThreadingHTTPServer):
    """As much of the Hub as uploading a folder takes, by the protocol of Git LFS."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.private: bool | None = None  # None: no such repository
        self.forbidden = self.is_full = False
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}  # by SHA-256
        self.files: dict[str, bytes] = {}  # of the repository


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_GET

    def answer(self) -> None:
        hub, content = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/blobs/") and hub.is_full:
            self.reply(403, {"error": "storage quota exceeded"})
        elif self.path.startswith("/blobs/"):  # an address that the server gave out asks for no token
            hub.blobs[self.path.removeprefix("/blobs/")] = content
            self.reply(200, {})
        elif hub.forbidden or self.headers["Authorization"] != "Bearer hf_secret":
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif self.path == "/api/repos/create":
            asked, is_there = json.loads(content), hub.private is not None
            hub.private = hub.private if is_there else asked.get("visibility") == "private"
            self.reply(409 if is_there else 200, {"url": f"{hub.address}/{asked['organization']}/{asked['name']}"})
        elif self.path == f"/api/models/{REPO}":
            self.reply(200, {"id": REPO, "private": hub.private})
        elif self.path == "/api/validate-yaml":
            ModelCard(json.loads(content)["content"])
            self.reply(200, {})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            mode = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(content)["files"]]
            files = [
                {"path": path, "uploadMode": mode[path.endswith(".safetensors")], "shouldIgnore": False}
                for path in paths
            ]
            self.reply(200, {"files": files})
        elif self.path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(content)["objects"]
            uploads = [{"upload": {"href": f"{hub.address}/blobs/{each['oid']}"}} for each in objects]
            self.reply(
                200, {"objects": [{**each, "actions": upload} for each, upload in zip(objects, uploads, strict=True)]}
            )
        elif self.path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
            self.reply(200, {"commitUrl": f"{hub.address}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.reply(404, {"error": f"no {self.path} here"})

    def reply(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A Hub that knows one token, and a client that is sent there; HF_ENDPOINT is read once, when it is imported."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("published")
    train(tiny_config(folder, steps=2, eval_every_steps=1), quiet=True)
    return folder / "run"


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_arrives_is_the_folder(hub: Hub, run: Path, capsys):
    assert main(["push", str(run), "--repo", REPO]) == 0
    assert capsys.readouterr().out == f"{hub.address}/{REPO}\n"
    assert hub.files == contents_of(run / "player")
    assert set(hub.blobs) == {hashlib.sha256((run / "player" / "model.safetensors").read_bytes()).hexdigest()}
    assert hub.private is False


def test_another_push_replaces_what_is_there(hub: Hub, run: Path):
    hub.private, hub.files = False, {"README.md": b"old", "notes.txt": b"mine"}
    push_to_hub(run / "final", REPO)
    assert hub.files == {**contents_of(run / "final"), "notes.txt": b"mine"}


def test_a_private_player_goes_to_no_public_repository(hub: Hub, run: Path):
    push_to_hub(run, REPO, private=True)
    assert hub.private and hub.files
    hub.private, hub.files = False, {}
    with pytest.raises(UserError, match="repo is 'somebody/a-player', which is there and public"):
        push_to_hub(run, REPO, private=True)
    assert not hub.files


@pytest.mark.parametrize("repo", ["player", "a/b/c", "a/b--c", "a/.b", "a/b.git", "a/\x1bb", ""])
def test_a_name_that_the_hub_does_not_take_is_refused(hub: Hub, run: Path, repo: str):
    with pytest.raises(UserError, match=r"^repo is .*expected OWNER/NAME"):
        push_to_hub(run, repo)
    assert not hub.requests


def test_a_folder_that_nobody_could_open_is_refused(hub: Hub, run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        push_to_hub("nowhere", REPO)
    with pytest.raises(UserError, match="is neither; expected a run folder"):
        push_to_hub(tmp_path, REPO)
    shutil.copytree(run / "player", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be opened as a causal language model"):
        push_to_hub(tmp_path / "cut", REPO)
    shutil.copytree(run / "player", tmp_path / "bare")
    for path in (tmp_path / "bare").glob("token*"):
        path.unlink()
    with pytest.raises(UserError, match="bare has no tokenizer"):
        push_to_hub(tmp_path / "bare", REPO)
    assert not hub.requests


def test_who_is_not_logged_in_is_told_how(hub: Hub, run: Path, monkeypatch, tmp_path: Path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="nobody is logged in at the Hugging Face Hub; run `hf auth login`"):
        push_to_hub(run, REPO)
    assert not hub.requests


def test_what_the_hub_says_is_said(hub: Hub, run: Path, capsys):
    hub.forbidden = True
    assert main(["push", str(run), "--repo", REPO]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "repo is 'somebody/a-player', which the Hub refuses" in line and "don't have the rights" in line


def test_no_network_is_said_in_one_line(hub: Hub, run: Path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "--repo", REPO]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("avatarl: http://127.0.0.1:9 cannot be reached (")


def test_an_upload_that_breaks_off_is_said(hub: Hub, run: Path):
    hub.is_full = True
    with pytest.raises(RunFailed, match="was not uploaded to .*; the same command begins again"):
        push_to_hub(run, REPO)
    assert not hub.files
    hub.is_full = False
    push_to_hub(run, REPO)
    assert hub.files == contents_of(run / "player")
