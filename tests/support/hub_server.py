"""A hub on this machine: answers what `huggingface_hub` asks when it makes a repository and uploads a folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Keeps what was uploaded."""

    def __init__(self, breaks: bool):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.breaks = breaks
        self.made: list[dict] = []
        self.commits: list[dict[str, bytes]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        known = self.headers.get("authorization") == "Bearer hf_known"
        self._answer(200 if known else 401, {"type": "user", "name": "me", "auth": {}} if known else {"error": "no"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.address}/me/lora"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        elif "/commit/" in self.path and self.server.breaks:
            self._answer(403, {"error": "this repository takes no more"})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                     for line in lines if line["key"] == "file"}  # fmt: skip
            self.server.commits.append(files)
            place = f"{self.server.address}/me/lora/commit/1"
            self._answer(200, {"success": True, "commitOid": "1", "commitUrl": place})
        else:
            self._answer(200, {"errors": [], "warnings": []})

    def _answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(breaks: bool = False) -> Iterator[Hub]:
    hub = Hub(breaks)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
