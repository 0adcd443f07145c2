"""Conversations with a real Firecracker: what was asked, what it said, how it ended.

Recorded with version 1.16.1 in its jail on a KVM node. `tests/vectors/fc/life.json` is a machine
with a disk that comes and goes, pauses and an end by the keyboard; the others end by what their
guest does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hypervisors import fc_config
from hypervisors.child import ChildExit
from hypervisors.fc_exit import EndFacts, classify, faults

from . import openapi

VECTORS = sorted((Path(__file__).parents[1] / "vectors" / "fc").glob("*.json"))
GROUPS = {"drives": "/drives/{drive_id}", "network-interfaces": "/network-interfaces/{iface_id}"}


@pytest.fixture(params=VECTORS, ids=lambda path: path.stem)
def vector(request):
    return json.loads(request.param.read_text())


def life():
    return json.loads(next(path for path in VECTORS if path.stem == "life").read_text())


def test_recorded_request_is_what_the_vmm_describes(vector):
    document = openapi.load("firecracker.swagger.yaml")
    for one in vector["requests"]:
        path = GROUPS.get(one["target"].split("/")[1], one["target"])
        schema = openapi.request_schema(document, one["method"], path)
        assert (schema is None) == (one["body"] is None), path
        if schema is not None:
            assert openapi.problems(document, schema, one["body"]) == []


def test_launch_is_accepted_word_by_word_and_tells_the_version(vector):
    requests = vector["requests"]
    assert fc_config.version(requests[0]["answer"]) == (1, 16)
    start = [one["target"] for one in requests].index("/actions")
    assert requests[start]["body"] == {"action_type": "InstanceStart"}
    assert {one["status"] for one in requests[1 : start + 1]} == {204}
    assert all(one["answer"] is None for one in requests[1 : start + 1])


def test_recorded_end_is_judged_from_what_was_recorded(vector):
    kind, code, number = vector["exit"]
    counted: dict[str, int] = {}
    for line in vector["metrics"]:
        counted |= faults(line.encode())
    facts = EndFacts(told_to_end=vector["scenario"] == "life", faults=counted)
    ending = classify(ChildExit(code=code, signal=number), facts, vector["console"], [])
    assert ending.kind.value == kind
    assert kind == {"life": "clean"}.get(vector["scenario"], vector["scenario"])
    # A guest's own end is no fault of the VMM's.
    assert counted == {}
    assert vector["metrics"], "the last metrics come at the end"


def test_slot_is_filled_refused_and_emptied_and_pausing_twice_is_no_mistake():
    patched = [one for one in life()["requests"] if one["method"] == "PATCH"]
    drives = [one for one in patched if one["target"] == "/drives/slot1"]
    assert [one["status"] for one in drives] == [204, 204]
    wrong = next(one for one in patched if one["status"] == 400)
    assert list(wrong["answer"]) == ["fault_message"]
    states = [(one["body"]["state"], one["status"]) for one in patched if one["target"] == "/vm"]
    assert states == [("Paused", 204), ("Paused", 204), ("Resumed", 204)]
