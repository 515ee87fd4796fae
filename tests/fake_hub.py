"""A stand-in for the hub: one repository behind the addresses that its client asks for."""

import functools
import hashlib
import http.server
import json
import threading
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0" * 40


class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves /api/models/org/name/revision/... and /org/name/resolve/COMMIT/FILE from a folder."""

    def translate_path(self, path):
        return super().translate_path("/" + path.split("/resolve/", 1)[-1].split("/", 1)[-1].split("?")[0])

    def do_GET(self):
        if not self.path.startswith("/api/models/"):
            return super().do_GET()
        info = {"id": "some/model", "sha": COMMIT, "siblings": []}
        if "/tree/" in self.path:
            root = Path(self.directory)
            files = {str(f.relative_to(root)): f.stat().st_size for f in sorted(root.rglob("*")) if f.is_file()}
            info = [{"type": "file", "path": name, "size": size, "oid": "1" * 40} for name, size in files.items()]
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
