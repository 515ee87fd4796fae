"""A stand-in for the hub: one repository, of a model or a corpus, behind the addresses that its client asks for."""

import functools
import hashlib
import http.server
import json
import threading
import urllib.parse
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0" * 40


APIS = ("/api/models/", "/api/datasets/")


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves /api/KIND/org/name/revision/..., .../tree/... and .../resolve/COMMIT/FILE (or a range) from a folder."""

    def translate_path(self, path):
        return super().translate_path("/" + path.split("/resolve/", 1)[-1].split("/", 1)[-1].split("?")[0])

    def do_GET(self):
        if self.headers.get("Range") and "/resolve/" in self.path:
            return self.send_range(Path(self.translate_path(self.path)))
        if not self.path.startswith(APIS):
            return super().do_GET()
        if "/tree/" not in self.path:
            return self.send_json({"id": "some/repository", "sha": COMMIT, "siblings": []})
        _, _, below = self.path.partition("/tree/")[2].partition("?")[0].partition("/")
        below = urllib.parse.unquote(below)
        if not (Path(self.directory) / below).is_dir():
            return self.send_error(404)
        return self.send_json(
            [entry(path, self.directory) for path in sorted((Path(self.directory) / below).rglob("*"))]
        )

    def do_POST(self):
        """Which of some paths there are, and what they are."""
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        asked = [Path(self.directory) / name for name in form.get("paths", [])]
        self.send_json([entry(path, self.directory) for path in asked if path.exists()])

    def send_range(self, path):
        content = path.read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        piece = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def send_json(self, info):
        content = json.dumps(info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self):
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        super().end_headers()

    def send_error(self, code, message=None, explain=None):
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def entry(path, root):
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "1" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": "1" * 40}


@contextmanager
def serving(folder, cache):
    """The environment of a process that finds `folder` on the hub under any name."""
    handler = functools.partial(Hub, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()
