"""The images that critest pulls, made here: same names, what the specs ask of them inside.

Source: cri-tools pkg/validate (names and what is run in them), images/ (users).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.harness import oci_image
from tests.harness.containerd_daemon import find_cri_tool
from tests.harness.oci_image import Entry

_E2E = "registry.k8s.io/e2e-test-images/"
_STAGING = "gcr.io/k8s-staging-cri-tools/"
_SHELL = {"Env": [oci_image.PATH], "Cmd": ["sh"], "WorkingDir": "/"}

_LS = """\
#!/bin/sh
exec busybox ls "$@"
"""
# Debian's busybox has neither pgrep nor ipcs; critest expects what procps and util-linux print.
_PGREP = """\
#!/bin/sh
cd /proc && for pid in [0-9]*; do
    [ "$(cat $pid/comm 2>/dev/null)" != "$1" ] || echo $pid
done | grep .
"""
_IPCS = """\
#!/bin/sh
awk 'NR > 1 { print $2 }' /proc/sysvipc/shm
"""

# $1 is the port. The words "master process" come as an argument, where specs look for them.
_NGINX = """\
#!/bin/sh
echo $$ >/var/run/nginx.pid
trap 'kill $!; exit 0' TERM QUIT
busybox httpd -f -p "$1" -h /www &
wait
"""
_HTTPD = """\
#!/bin/sh
echo httpd serves
exec busybox httpd -f -p 80 -h /www
"""
_USERS = {
    "test-image-user-uid": "1002",
    "test-image-user-username": "www-data",
    "test-image-user-uid-group": "1003:1004",
    "test-image-user-username-group": "www-data:1004",
}
_NAMES = ("1", "2", "3", "latest", *(name.removeprefix("test-image-") for name in _USERS))


def write_images(directory: Path) -> list[Path]:
    """Write an OCI archive for each image of critest into `directory`; return them."""
    directory.mkdir(parents=True, exist_ok=True)
    base = _base()
    images = [
        oci_image.write_image(
            base, f"{_E2E}busybox:1.29-2", _SHELL, directory / "critest-busybox.tar"
        ),
        *_web_servers(base, directory),
        _nonewprivs(directory),
        _predefined_group(base, directory),
    ]
    marks = {f"test-image-{name}": [f"test-image-{name}:latest"] for name in _NAMES}
    marks |= {f"test-image-tag-{tag}": [f"test-image-tag:{tag}"] for tag in ("test", "all")}
    marks["test-image-tags"] = [f"test-image-tags:{number}" for number in (1, 2, 3)]
    images += [_marked(mark, names, directory) for mark, names in marks.items()]
    return images


def _base() -> list[Entry]:
    # Not Debian's static busybox: its shell runs applets without looking at the files, and a spec
    # masks one of them.
    busybox = find_cri_tool("busybox")
    listing = subprocess.run(["ldd", busybox], check=True, capture_output=True, text=True)
    libraries = [Path(word) for word in listing.stdout.split() if word.startswith("/")]
    directories = {str(parent)[1:] for path in libraries for parent in path.parents} - {""}
    # A spec masks /bin/ls, which must not be another name of the shell.
    entries = [each for each in oci_image.busybox_entries(busybox) if each.path != "bin/ls"]
    scripts = {"bin/ls": _LS, "bin/pgrep": _PGREP, "bin/ipcs": _IPCS}
    return [
        *entries,
        *(Entry(path, 0o755) for path in sorted(directories)),
        *(Entry(str(path)[1:], 0o755, data=path.read_bytes()) for path in libraries),
        *(_script(path, text) for path, text in scripts.items()),
    ]


def _script(path: str, text: str) -> Entry:
    return Entry(path, 0o755, data=text.encode())


def _web_servers(base: list[Entry], directory: Path) -> list[Path]:
    page = [Entry("www", 0o755), Entry("www/index.html", 0o644, data=b"served\n")]
    pid_directory = [Entry("var/run", 0o755)]
    nginx = [*base, *page, *pid_directory, _script("usr/sbin/nginx", _NGINX)]
    # The symlink of busybox' own applet has this name.
    httpd = [entry for entry in base if entry.path != "usr/sbin/httpd"]
    httpd += [*page, _script("usr/sbin/httpd", _HTTPD)]

    def process(*entrypoint: str) -> dict[str, object]:
        return {"Env": [oci_image.PATH], "Entrypoint": list(entrypoint), "WorkingDir": "/"}

    def write(entries: list[Entry], name: str, *entrypoint: str) -> Path:
        file = name.rpartition("/")[2].partition(":")[0]
        out = directory / f"critest-{file}.tar"
        return oci_image.write_image(entries, name, process(*entrypoint), out)

    return [
        write(nginx, f"{_E2E}nginx:1.14-2", "nginx", "80", "master process"),
        write(nginx, f"{_STAGING}hostnet-nginx-amd64:latest", "nginx", "12003", "master process"),
        write(httpd, f"{_E2E}httpd:2.4.39-4", "httpd"),
    ]


def _nonewprivs(directory: Path) -> Path:
    source, program = Path(__file__).with_name("nnp.c"), directory / "nnp"
    subprocess.run(["cc", "-static", "-Os", "-s", "-o", program, source], check=True)
    entries = [Entry("dev", 0o755), Entry("proc", 0o755), Entry("sys", 0o755)]
    entries.append(Entry("nnp", 0o4755, data=program.read_bytes()))
    process = {"Env": [oci_image.PATH], "Entrypoint": ["/nnp"], "WorkingDir": "/"}
    out = directory / "critest-nonewprivs.tar"
    return oci_image.write_image(entries, f"{_E2E}nonewprivs:1.3", process, out)


def _predefined_group(base: list[Entry], directory: Path) -> Path:
    added = {
        "etc/passwd": "default-user:x:1000:1000::/home:/bin/sh\n",
        "etc/group": "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n",
    }
    entries = [
        Entry(entry.path, entry.mode, data=entry.data + added[entry.path].encode())
        if entry.data is not None and entry.path in added
        else entry
        for entry in base
    ]
    name = f"{_STAGING}test-image-predefined-group:latest"
    out = directory / "critest-predefined-group.tar"
    return oci_image.write_image(entries, name, {**_SHELL, "User": "1000"}, out)


def _marked(mark: str, names: list[str], directory: Path) -> Path:
    """Write an image that nothing is run in: a file tells it from the others."""
    process = {**_SHELL, "User": _USERS.get(mark, "")}
    first, *more = (_STAGING + name for name in names)
    out = directory / f"critest-{mark}.tar"
    return oci_image.write_image([Entry(mark, 0o644, data=b"")], first, process, out, more)
