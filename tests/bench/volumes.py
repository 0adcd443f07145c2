"""How soon a container sees what kubelet has changed: a configmap's update, at random moments."""

from __future__ import annotations

import json
import random
import select
import subprocess
import time
from typing import IO, TYPE_CHECKING

from tests.bench.figure import Aim, Figure, rounds
from tests.harness.ctr import KATA, RUNC, Ctr, fresh_id
from tests.harness.ctr_pod import bind
from tests.harness.kubelet import PodVolumes
from tests.harness.patience import patient
from tests.integration.volumes import PYTHON, probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.node import Node

_TURN_S = 1.1  # what lies between two of the agent's looks: updates fall anywhere within


def measure(node: Node) -> Iterator[Figure]:
    """The update's last step on the host → the container's program has read the new content."""
    yield Figure(
        name="configmap updated → seen inside",
        unit="ms",
        samples=_updates(Ctr(node, KATA)),
        peer="runc",
        peer_samples=_updates(Ctr(node, RUNC)),
        aim=Aim(of="max", limit=3000),
        note="looks every 1.1 s; a tree of more than 128 entries is read over virtio-fs, "
        "where a name is asked for again after 1 s",
    )


def _updates(ctr: Ctr) -> list[float]:
    volumes = PodVolumes(ctr.node)
    config = volumes.volume("configmap", "config")
    volumes.write_atomically(config, {"key": "first"})
    container = fresh_id("configmap")
    process = ctr.popen(
        container,
        *probe("watch", "/config/key", "/config"),
        options=["--rm", *PYTHON, *bind(config, "/config", "rbind:rprivate:ro")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # that the container was removed under it
    )
    assert process.stdout is not None
    samples = []
    try:
        _line(process.stdout)
        for turn in rounds(20, 30):
            time.sleep(random.uniform(0, _TURN_S))
            volumes.write_atomically(config, {"key": f"turn {turn}"})
            began = time.perf_counter()
            assert json.loads(_line(process.stdout))[0] == f"turn {turn}"
            samples.append((time.perf_counter() - began) * 1000)
    finally:
        ctr.remove(container)
        process.wait(patient(30))
        process.stdout.close()
        volumes.remove()
    return samples


def _line(stream: IO[bytes]) -> bytes:
    """Return the next of the lines that come one at a time, a whole one each."""
    ready, _, _ = select.select([stream], [], [], patient(60))
    assert ready, f"the container has said nothing for {patient(60):g} s"
    return stream.readline()
