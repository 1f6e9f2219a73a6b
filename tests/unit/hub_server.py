"""The small part of the hub that downloading a dataset needs, over real HTTP, counting what is downloaded."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "lab/demos"


class Hub:
    """The dataset in `folder` as `lab/demos`; `lab/gated` needs permission, anything else does not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloads = folder, Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, unquote(self.path.partition("?")[0]), body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, unquote(self.path.partition("?")[0]), body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, path: str, body: bool) -> None:
        files = {str(p.relative_to(self.folder)): p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if "lab/gated" in path:
            self._send(request, 403, b'{"error": "gated"}', body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            about = {"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._send(request, 200, json.dumps(about).encode(), body)
        elif path.startswith(f"{api}/revision/"):
            self._send(request, 404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif path == f"{api}/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(data), "oid": _id(data)} for name, data in files.items()]
            self._send(request, 200, json.dumps(tree).encode(), body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in files:
            name = path.removeprefix(resolve)
            self.downloads[name] += body
            self._send(request, 200, files[name], body, {"ETag": f'"{_id(files[name])}"', "X-Repo-Commit": COMMIT})
        else:
            code = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
            self._send(request, 404, b"{}", body, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


def _id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
