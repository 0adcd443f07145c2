"""A registry of one image on the loopback interface, enough for a pull.

Source: OCI distribution-spec "Pulling manifests", "Pulling blobs".
"""

from __future__ import annotations

import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serving(layout: Path) -> Iterator[str]:
    """Serve the OCI layout in the tar `layout` at every name and tag; yield `localhost:PORT`."""
    with tarfile.open(layout) as archive:
        files = {
            member.name.removeprefix("./"): stream.read()
            for member in archive
            if (stream := archive.extractfile(member)) is not None
        }
    blobs = {
        f"{parts[1]}:{parts[2]}": data
        for name, data in files.items()
        if len(parts := name.split("/")) == 3 and parts[0] == "blobs"
    }
    manifest = json.loads(files["index.json"])["manifests"][0]
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(blobs, manifest))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(blobs: dict[str, bytes], manifest: dict[str, str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            kind, reference = self.path.split("/")[-2:]
            is_manifest = kind == "manifests"
            digest = reference if ":" in reference or not is_manifest else manifest["digest"]
            data = blobs.get(digest.partition("?")[0])
            if data is None:
                self.send_error(404)
                return b""
            self.send_response(200)
            media_type = manifest["mediaType"] if is_manifest else "application/octet-stream"
            self.send_header("Content-Type", media_type)
            self.send_header("Docker-Content-Digest", digest)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return data

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a test's output is its assertions."""

    return Handler
