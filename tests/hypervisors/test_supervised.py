"""What the common part of a running machine promises whatever a backend's own part does."""

from __future__ import annotations

import pytest
import trio

from hypervisors.child import spawn
from hypervisors.machine import ExitKind, VmEventKind, VmExit
from hypervisors.supervised import SupervisedMachine


class Leaky(SupervisedMachine):
    """One that cannot give back all it has."""

    async def _read_to_end(self):
        await trio.lowlevel.checkpoint()

    async def _release(self):
        await self._child.aclose()
        raise OSError(16, "busy")

    def _judge(self, ending):
        return VmExit(kind=ExitKind.CLEAN, code=ending.code, signal=None, reason="it ended")


async def test_exit_is_told_though_something_could_not_be_released(make_spec, records):
    child = await spawn("vmm", ["/bin/true"], record=records.append)
    machine = Leaky(make_spec(), child, None)
    with trio.fail_after(60):
        with pytest.raises(OSError, match="busy"):
            await machine.run()
        assert (await machine.wait_exited()).reason == "it ended"
        assert [event.kind async for event in machine.events] == [VmEventKind.EXITED]
