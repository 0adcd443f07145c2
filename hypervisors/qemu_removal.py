"""Unplugging: asks the guest for a device back and recognises its answer among QEMU's events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from .errors import CommandRejected, ControlLost, DetachRefused

if TYPE_CHECKING:
    from .qmp_client import QmpClient
    from .qmp_protocol import Notification

# A guest takes 0.1 s to let go of an idle disk (measured under TCG); a busy one needs a while.
DETACH_DEADLINE_S: Final = 5.0
PERIPHERAL: Final = "/machine/peripheral/"
LAPIC: Final = "/lapic"
# Source: ACPI 6.5 table 6.10: 3 answers an ejection asked by the firmware, 0x103 one by the OS.
OST_EJECT: Final = (3, 0x103)
# Source: ACPI 6.5 table 6.12. 0x84, "in progress", is no answer yet.
OST_REFUSED: Final = {
    0x80: "that it does not support ejection",
    0x81: "that the device is in use by an application",
    0x82: "that the device is busy",
    0x83: "that something the device depends on is busy",
}


class Removals:
    """Asks the guest for devices back and remembers its answers.

    A device with a backend object in it announces that object's removal too, without an id; only
    the event that carries the device's own id counts.
    """

    def __init__(self, qmp: QmpClient) -> None:
        self._qmp = qmp
        self._asked: set[str] = set()
        self._gone: set[str] = set()
        self._answers: dict[str, trio.Event] = {}
        self._refusals: dict[str, str] = {}
        self._machine_ended = False

    def forget(self, device_id: str) -> None:
        """Start afresh for a device that is about to be plugged under a name used before."""
        self._gone.discard(device_id)
        self._asked.discard(device_id)

    async def remove(self, device_id: str, deadline_s: float = DETACH_DEADLINE_S) -> None:
        """Return when `device_id` has left the machine.

        Raises:
            DetachRefused: the guest said no or nothing; may be called again.
            ControlError: the machine ended, or QEMU does not know the device.
        """
        answer = self._answers[device_id] = trio.Event()
        self._refusals.pop(device_id, None)
        try:
            if device_id not in self._gone:
                await self._request(device_id)
                with trio.move_on_after(deadline_s):
                    await answer.wait()
        finally:
            del self._answers[device_id]
        if device_id not in self._gone:
            if self._machine_ended:
                raise ControlLost("device_del")
            why = self._refusals.get(device_id, f"no answer within {deadline_s:g} s")
            raise DetachRefused(device_id, why)
        self.forget(device_id)

    def on_notification(self, notification: Notification) -> None:
        """Take an event; others than unplug answers are ignored."""
        match notification.name, notification.data:
            case "DEVICE_DELETED", {"device": str(device_id)}:
                # Noted even when nobody waits: the guest may answer after the deadline, and it may
                # eject a device unasked.
                self._gone.add(device_id)
            case "DEVICE_DELETED", {"path": str(path)} if path.endswith(LAPIC):
                # A vCPU's own removal is not announced, that of its interrupt controller is.
                # Observed: QEMU 7.2.22.
                device_id = path.removeprefix(PERIPHERAL).removesuffix(LAPIC)
                self._gone.add(device_id)
            case "DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR", {"device": str(device_id)}:
                self._refuse(device_id, str(notification.data.get("msg", "the guest refused")))
            case "ACPI_DEVICE_OST", {
                "info": {"device": str(device_id), "source": int(source), "status": int(status)}
            } if source in OST_EJECT and status in OST_REFUSED:
                self._refuse(device_id, f"the guest answered {OST_REFUSED[status]}")
            case _:
                return
        if device_id in self._answers:
            self._answers[device_id].set()

    def on_end(self) -> None:
        """The machine has ended: nobody will answer any more."""
        self._machine_ended = True
        for answer in self._answers.values():
            answer.set()

    def _refuse(self, device_id: str, why: str) -> None:
        self._refusals[device_id] = why
        self._asked.discard(device_id)

    async def _request(self, device_id: str) -> None:
        again = device_id in self._asked
        self._asked.add(device_id)
        try:
            await self._qmp.execute("device_del", {"id": device_id})
        except CommandRejected:
            # An unplug that is under way is refused a second time; its answer may still come.
            if not again:
                self._asked.discard(device_id)
                raise
