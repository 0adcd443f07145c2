"""Conversations with a real Cloud Hypervisor: what was asked, what it said, how it ended.

Recorded with version 53 on a KVM node. `tests/vectors/clh/life.json` is a machine with hot-plug,
resizing and pause; the others end by what their guest does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hypervisors.child import ChildExit
from hypervisors.clh_config import device_addresses, guest_address
from hypervisors.clh_events import EndFacts, EventStream, classify

from . import openapi

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "clh").glob("*.json"))
API = "/api/v1"


@pytest.fixture(params=VECTORS, ids=lambda path: path.stem)
def vector(request):
    return json.loads(request.param.read_text())


def events_of(vector):
    stream = EventStream()
    found = stream.feed(vector["events"].encode())
    assert stream.dropped == 0
    return [(event.source, event.name) for event in found], found


def test_recorded_request_is_what_the_vmm_describes(vector):
    document = openapi.load("cloud-hypervisor.openapi.yaml")
    for one in vector["requests"]:
        path = one["target"].removeprefix(API)
        schema = openapi.request_schema(document, one["method"], path)
        assert (schema is None) == (one["body"] is None), path
        if schema is not None:
            assert openapi.problems(document, schema, one["body"]) == []


def test_launch_is_answered_in_order_and_every_device_has_an_address(vector):
    paths = [one["target"].removeprefix(API) for one in vector["requests"]]
    assert paths[:2] == ["/vmm.ping", "/vm.create"]
    boot = paths.index("/vm.boot")
    assert set(paths[2:boot]) <= {"/vm.add-net"}
    # Before the boot there is no address yet.
    assert [one["status"] for one in vector["requests"][1 : boot + 1]] == [204] * boot
    assert vector["requests"][0]["answer"]["version"].startswith("53.")
    addresses = device_addresses(vector["requests"][boot + 1]["answer"])
    cold = [one["body"]["id"] for one in vector["requests"][2:boot]]
    assert {"rng", "vsock0", *cold} <= set(addresses)


def test_recorded_end_is_classified_from_the_recorded_events(vector):
    names, _ = events_of(vector)
    kind, code, number = vector["exit"]
    facts = EndFacts(
        panicked=("guest", "panic") in names,
        rebooted=("vm", "rebooting") in names,
        told_to_quit=vector["scenario"] == "",
    )
    assert classify(ChildExit(code=code, signal=number), facts, []).kind.value == kind
    assert kind == {"": "killed", "poweroff": "clean"}.get(vector["scenario"], vector["scenario"])


def test_hot_plugged_devices_come_with_an_address_and_go_with_an_event():
    vector = json.loads(next(path for path in VECTORS if path.stem == "life").read_text())
    plugged = [
        one for one in vector["requests"]
        if one["target"] in (f"{API}/vm.add-disk", f"{API}/vm.add-net") and one["status"] == 200
    ]  # fmt: skip
    assert [one["answer"]["id"] for one in plugged] == ["disk0", "net0"]
    assert all(guest_address(one["answer"]["bdf"]) for one in plugged)
    refused = [one for one in vector["requests"] if one["status"] >= 400]
    assert [one["target"].removeprefix(API) for one in refused] == ["/vm.pause"]
    assert all(isinstance(text, str) for one in refused for text in one["answer"])
    names, events = events_of(vector)
    removed = [event.properties for event in events if event.name == "device-removed"]
    assert [one["id"] for one in removed] == ["disk0", "net0"]
    assert [one["bdf"] for one in removed] == [one["answer"]["bdf"] for one in plugged]
    for name in ("paused", "resumed", "resized"):
        assert ("vm", name) in names
