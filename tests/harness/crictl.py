"""Drive a node's containerd over CRI through `crictl`, as kubelet would.

Pods and containers are described by the JSON of CRI's own messages: keyword arguments are laid
over the smallest configuration that works, nested dictionaries key by key.
Source: cri-tools docs/crictl.md; kubernetes/cri-api runtime/v1/api.proto.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

from tests.harness.containerd_daemon import ADDRESS, find_cri_tool
from tests.harness.oci_image import BUSYBOX_IMAGE
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

Json = dict[str, Any]
_FILES = "/run/.node/cri"
_POLL_S = 0.2
_counter = itertools.count(1)


class Crictl:
    """`crictl` on one node with one runtime handler. Every call has a time limit."""

    def __init__(self, node: Node, handler: str = "kata") -> None:
        self.node = node
        self.handler = handler
        self._pods: dict[str, Json] = {}
        endpoint = f"unix://{ADDRESS}"
        settings = {"runtime-endpoint": endpoint, "image-endpoint": endpoint, "timeout": 100}
        node.write("/etc/crictl.yaml", json.dumps(settings))

    def argv(self, *arguments: str) -> list[str]:
        """Return the argv of a crictl command."""
        return [str(find_cri_tool("crictl")), *arguments]

    def call(
        self, *arguments: str, check: bool = True, stdin: bytes = b"", timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a crictl command; with `check` a failure raises AssertionError."""
        return self.node.run(self.argv(*arguments), check=check, stdin=stdin, timeout_s=timeout_s)

    def json(self, command: str, *arguments: str) -> Any:
        """Run a crictl command that prints JSON and return it."""
        return json.loads(self.call(command, "-o", "json", *arguments).stdout)

    def run_pod(self, **settings: Any) -> str:
        """Run a pod sandbox and return its id; `settings` are fields of PodSandboxConfig."""
        done = self.try_run_pod(**settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def try_run_pod(self, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a pod sandbox, which may fail; its id is the output."""
        number = next(_counter)
        name = f"pod-{number}"
        config: Json = {
            "metadata": {"name": name, "namespace": "tests", "uid": f"uid-{number}", "attempt": 0},
            "log_directory": f"{_FILES}/logs/{name}",
            # Below a directory that bears the node's name, so that what is left there is seen.
            "linux": {"cgroup_parent": f"/{self.node.name}"},
        }
        config = _merge(config, settings)
        path = self._write(config)
        done = self.call("runp", "--runtime", self.handler, path, check=False)
        if done.returncode == 0:
            self._pods[done.stdout.strip()] = config
        return done

    def create(self, pod: str, *command: str, image: str = BUSYBOX_IMAGE, **settings: Any) -> str:
        """Create a container of a pod and return its id; fields of ContainerConfig."""
        done = self.try_create(pod, *command, image=image, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def try_create(
        self, pod: str, *command: str, image: str = BUSYBOX_IMAGE, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """Create a container, which may fail; its id is the output."""
        name = f"ctr-{next(_counter)}"
        config: Json = {
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image},
            "log_path": f"{name}.log",
            "linux": {},
        }
        if command:
            config["command"] = list(command)
        paths = self._write(_merge(config, settings)), self._write(self._pods[pod])
        return self.call("create", "--no-pull", pod, *paths, check=False)

    def run(self, pod: str, *command: str, **settings: Any) -> str:
        """Create and start a container of a pod and return its id."""
        container = self.create(pod, *command, **settings)
        self.call("start", container)
        return container

    def exec(
        self,
        container: str,
        *command: str,
        sync: bool = False,
        check: bool = True,
        stdin: bytes = b"",
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command over the streaming server, or by ExecSync as probes do.

        With ExecSync crictl adds an empty line to stdout for each of the two streams.
        """
        options = ["--sync"] if sync else ["-i"] if stdin else []
        return self.call(
            "exec", *options, container, *command, check=check, stdin=stdin, timeout_s=timeout_s
        )

    def output(self, container: str, *command: str) -> str:
        """Return what a command prints on stdout; it must succeed."""
        return self.exec(container, *command).stdout

    def logs(self, container: str, *options: str) -> str:
        """Return the container's log without time stamps, both streams."""
        done = self.call("logs", *options, container)
        return done.stdout + done.stderr

    def container_status(self, container: str) -> Json:
        """Return the `status` part of ContainerStatus."""
        status: Json = self.json("inspect", container)["status"]
        return status

    def pod_status(self, pod: str) -> Json:
        """Return the `status` part of PodSandboxStatus."""
        status: Json = self.json("inspectp", pod)["status"]
        return status

    def addresses(self, pod: str) -> list[str]:
        """Return the pod's addresses, the primary one first."""
        network = self.pod_status(pod)["network"]
        return [network["ip"], *(more["ip"] for more in network.get("additionalIps", []))]

    def wait_exited(self, container: str, timeout_s: float = 60) -> int:
        """Wait until CRI says that the container has ended, and return its exit code."""
        deadline = time.monotonic() + patient(timeout_s)
        while (status := self.container_status(container))["state"] != "CONTAINER_EXITED":
            assert time.monotonic() < deadline, f"{container} runs after {timeout_s} s: {status}"
            time.sleep(_POLL_S)  # as kubelet does: containerd 1.6 sends no events over CRI
        return int(status["exitCode"])

    def remove_pod(self, *pods: str) -> None:
        """Stop and remove pods with their containers, whatever state they are in."""
        for pod in pods:
            self.call("stopp", pod, check=False)
            self.call("rmp", "-f", pod, check=False)
            self._pods.pop(pod, None)

    def remove_all(self) -> None:
        """Remove every pod that this object has run."""
        self.remove_pod(*list(self._pods))

    def _write(self, config: Json) -> str:
        path = f"{_FILES}/{next(_counter)}.json"
        self.node.write(path, json.dumps(config))
        return path


def _merge(base: Json, over: Json) -> Json:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        both = isinstance(known, dict) and isinstance(value, dict)
        merged[key] = _merge(known, value) if both else value
    return merged
