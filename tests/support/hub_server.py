"""A Hugging Face Hub of this process: the few calls that a push and a download make."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """What was pushed, and how."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By repository and name."""
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refusing: int | None = None
    """Status that every call is answered with."""

    def received(self, repo: str, lines: list[bytes]) -> str:
        """Takes a commit; returns its number."""
        header, *operations = (json.loads(line) for line in lines)
        for operation in operations:
            assert operation["key"] == "file", operation
            value = operation["value"]
            self.files[repo][value["path"]] = base64.b64decode(value["content"])
        self.commits.append(header["value"])
        return hashlib.sha1(json.dumps(header).encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            given = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers["Authorization"])
            parts = self.path.strip("/").split("/")
            if hub.refusing:
                return self.answer(hub.refusing, b'{"error": "no"}')
            if self.path == "/api/repos/create":
                asked = json.loads(given)
                repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.files.setdefault(repo, {})
                found: Any = {"url": f"{hub.address}/{repo}", "name": repo}
            elif self.path == "/api/validate-yaml":
                found = {"errors": [], "warnings": []}
            elif parts[4:5] == ["preupload"]:
                names = [file["path"] for file in json.loads(given)["files"]]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                found = {"files": [{"path": name, **mode} for name in names]}
            elif parts[4:5] == ["commit"]:
                repo = "/".join(parts[2:4])
                number = hub.received(repo, given.splitlines())
                found = {
                    "commitUrl": f"{hub.address}/{repo}/commit/{number}",
                    "commitOid": number,
                    "success": True,
                }
            else:
                return self.answer(404, b"{}")
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            parts = self.path.strip("/").split("/")
            repo, name = "/".join(parts[:2]), "/".join(parts[4:])
            if hub.refusing:
                return self.answer(hub.refusing, b'{"error": "no"}')
            if parts[2:3] != ["resolve"] or repo not in hub.files:
                return self.answer(404, b"", X_Error_Code="RepoNotFound")
            if parts[3] != "main":
                return self.answer(404, b"", X_Error_Code="RevisionNotFound")
            if name not in hub.files[repo]:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            body = hub.files[repo][name]
            return self.answer(
                200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit="0" * 40
            )

        do_HEAD = do_GET

    return Handler


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Answers on a port of this machine as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
