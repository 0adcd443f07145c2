"""A pod made through ctr: a pause container and others, grouped by CRI's annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.harness.ctr import Ctr, fresh_id
from tests.harness.oci_image import BUSYBOX_IMAGE, PAUSE_IMAGE


def bind(source: str, target: str, options: str = "rbind:rw") -> list[str]:
    """Options of `ctr run` for a bind mount."""
    return ["--mount", f"type=bind,src={source},dst={target},options={options}"]


@dataclass
class Pod:
    """Makes the containers of one pod through ctr."""

    ctr: Ctr
    sandbox: str
    members: list[str] = field(default_factory=list)

    def annotations(self, kind: str, name: str) -> list[str]:
        values = {
            "container-type": kind,
            "sandbox-id": self.sandbox,
            "sandbox-name": "pod",
            "sandbox-namespace": "default",
            "sandbox-uid": "u1",
            "container-name": name,
        }
        return [
            word
            for key, value in values.items()
            for word in ("--annotation", f"io.kubernetes.cri.{key}={value}")
        ]

    def start_sandbox(self, options: Sequence[str] = ()) -> None:
        self.ctr.start(
            self.sandbox,
            options=[*self.annotations("sandbox", "pause"), *options],
            image=PAUSE_IMAGE,
        )
        self.members.append(self.sandbox)

    def start(self, name: str, *command: str, options: Sequence[str] = ()) -> str:
        """Start a container that shares IPC and UTS with the pause container."""
        container = fresh_id(name)
        pid = self.ctr.pid(self.sandbox)
        spaces = [
            word
            for kind in ("ipc", "uts", "network")
            for word in ("--with-ns", f"{kind}:/proc/{pid}/ns/{kind[:3]}")
        ]
        self.members.append(container)  # first: ctr leaves its own record if the start fails
        self.ctr.start(
            container,
            *command,
            image=BUSYBOX_IMAGE,
            options=[*self.annotations("container", name), *spaces, *options],
        )
        return container

    def remove(self) -> None:
        self.ctr.remove(*reversed(self.members))
