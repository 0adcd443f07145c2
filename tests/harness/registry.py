"""A registry on a loopback interface, enough for pulls: of images from OCI archives.

Inside a node it stands for every registry there is (`mirror_configuration`), so that names of the
world's registries are pulled without a network. It runs there as a program:

    python3 tests/harness/registry.py PORT ARCHIVE…

Standard library only. Source: OCI distribution-spec "Pulling manifests", "Pulling blobs";
containerd docs/hosts.md (`_default`, the query parameter `ns`).
"""

from __future__ import annotations

import json
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: Directory of containerd's registry configuration, as the node's config.toml names it.
CONFIGURATION = "/etc/containerd/certs.d"
PORT = 5000
_NAME = "io.containerd.image.name"
_BLOB = "application/octet-stream"


@dataclass
class Content:
    """What is served: blobs by digest, media types of the manifests, digests by `path:tag`."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    #: With a single archive its image answers to every name and tag.
    only: str = ""

    def add(self, archive: Path) -> None:
        """Add the images of an OCI archive under the names that its index gives."""
        with tarfile.open(archive) as members:
            files = {
                member.name.removeprefix("./"): stream.read()
                for member in members
                if (stream := members.extractfile(member)) is not None
            }
        for name, data in files.items():
            parts = name.split("/")
            if len(parts) == 3 and parts[0] == "blobs":
                self.blobs[f"{parts[1]}:{parts[2]}"] = data
        for manifest in json.loads(files["index.json"])["manifests"]:
            self.manifests[manifest["digest"]] = manifest["mediaType"]
            name = manifest["annotations"][_NAME].partition("/")[2]
            self.tags[name] = manifest["digest"]

    def find(self, path: str) -> tuple[str, str, bytes] | None:
        """Return digest, media type and bytes of what a URL's path names."""
        parts = path.partition("?")[0].removeprefix("/v2/").rsplit("/", 2)
        if len(parts) != 3:
            return None
        name, kind, reference = parts
        digest = reference
        if kind == "manifests" and ":" not in reference:
            digest = self.only or self.tags.get(f"{name}:{reference}", "")
        data = self.blobs.get(digest)
        if data is None:
            return None
        return digest, self.manifests.get(digest, _BLOB) if kind == "manifests" else _BLOB, data


@contextmanager
def serving(archive: Path) -> Iterator[str]:
    """Serve the image of one archive at every name and tag; yield `localhost:PORT`."""
    content = Content()
    content.add(archive)
    content.only = next(iter(content.manifests))
    server = _server(content, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"localhost:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def mirror_configuration() -> str:
    """Return the hosts.toml that sends containerd's pulls from every registry to this one."""
    return f'[host."http://127.0.0.1:{PORT}"]\n  capabilities = ["pull", "resolve"]\n'


def _server(content: Content, port: int) -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", port), _handler(content))


def _handler(content: Content) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            found = content.find(self.path)
            if found is None:
                self.send_error(404)
                return b""
            digest, media_type, data = found
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Docker-Content-Digest", digest)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return data

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a test's output is its assertions."""

    return Handler


def main(port: int, archives: Iterable[str]) -> None:
    """Serve until killed; print `ready` when connections are accepted."""
    content = Content()
    for archive in archives:
        content.add(Path(archive))
    server = _server(content, port)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
