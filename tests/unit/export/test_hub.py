"""Tests of pushing a folder to the hub, against a server of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from sfed.export import hub
from sfed.utils.errors import UserError

TOKEN = "hf_" + "a1B2" * 8


class Stub(BaseHTTPRequestHandler):
    """What ``create_repo`` and ``upload_folder`` ask of the hub."""

    server: StubServer

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.status:
            self.answer({"error": f"no, {TOKEN}"}, self.server.status)
            return
        answers = {
            "/repos/create": self.create,
            "/validate-yaml": lambda _: {"errors": [], "warnings": []},
            "/preupload/": self.choose_modes,
            "/info/lfs/objects/batch": self.offer_uploads,
            "/commit/": self.commit,
        }
        [answer] = [answer for part, answer in answers.items() if part in self.path]
        self.answer(answer(text.decode()))

    def create(self, text: str) -> dict[str, Any]:
        self.server.created.append(json.loads(text))
        return {"url": f"{self.server.address}/org/name"}

    def choose_modes(self, text: str) -> dict[str, Any]:
        paths = [one["path"] for one in json.loads(text)["files"]]
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False}
                for p in paths
            ]
        }

    def offer_uploads(self, text: str) -> dict[str, Any]:
        upload = f"{self.server.address}/upload"
        objects = [
            {**one, "actions": {"upload": {"href": f"{upload}/{one['oid']}"}}}
            for one in json.loads(text)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, text: str) -> dict[str, Any]:
        seen = self.server
        for entry in map(json.loads, text.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                seen.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                seen.files[value["path"]] = seen.uploads[value["oid"]]
        return {"commitUrl": f"{seen.address}/org/name/commit/1", "commitOid": "1"}

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploads[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            self.answer({"id": "org/name", "private": True, "sha": "1", "siblings": []})
        else:
            self.answer({"error": self.path}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


class StubServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Stub)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.status = 0
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.tokens: set[str] = set()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubServer]:
    server = StubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# x\n", encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    return tmp_path


def test_every_file_arrives_in_a_private_repository(server: StubServer, folder: Path):
    said = hub.push(folder, "org/name")
    assert server.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    [created] = server.created
    assert (created["organization"], created["name"]) == ("org", "name")
    assert created.get("private") is True or created["visibility"] == "private"
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert said.endswith("(private)") and TOKEN not in said


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_one_message_without_the_token(server: StubServer, folder: Path, status: int):
    server.status = status
    with pytest.raises(UserError, match=r"--push-to-hub org/name: the hub did not take it") as seen:
        hub.push(folder, "org/name")
    assert TOKEN not in str(seen.value) and "\n" not in str(seen.value)


def test_offline_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        hub.push(folder, "org/name")


def test_a_server_that_is_not_there_is_said(server: StubServer, folder: Path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="the hub did not take it"):
        hub.push(folder, "org/name")


@pytest.mark.parametrize("name", ["name", "/name", "org/", "a/b/c", "org name/x", "-org/name", ""])
def test_what_is_no_repository_is_refused(name: str):
    with pytest.raises(UserError, match="name the repository as ORG/NAME"):
        hub.check_name(name)
