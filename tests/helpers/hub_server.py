"""A server that answers as the Hugging Face hub does, for the repositories in a folder."""

import contextlib
import hashlib
import http.server
import json
import threading

COMMIT = "a" * 40


@contextlib.contextmanager
def serving(root):
    """Serves `root/OWNER/REPO/…` on the loopback; gives the address and the paths asked for."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            requests.append((self.command, self.path))

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def _answer(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            is_api = parts[0] == "api"
            owner_repo = parts[2:4] if is_api else parts[:2]
            repository = root.joinpath(*owner_repo)
            if not repository.is_dir():
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if is_api:
                files = [path for path in repository.rglob("*") if path.is_file()]
                names = [{"rfilename": str(path.relative_to(repository))} for path in files]
                answer = {"id": "/".join(owner_repo), "sha": COMMIT, "siblings": names}
                return self._send(200, json.dumps(answer).encode(), {})
            file = repository.joinpath(*parts[4:])
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            etag = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _send(self, code, content, headers):
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
