"""From a Firecracker process to a machine that runs: API socket, configuration, start.

The socket has a name until there is a handle on it. The VMM tells that it listens in its log, and
that something was wrong in its answers, its log and on stderr.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from . import fc_config, fc_room
from .disk_lease import lease
from .errors import (
    CommandTimeout,
    ControlError,
    ControlLost,
    HttpRejected,
    LaunchFailed,
    PreconditionFailed,
)
from .fc_devices import NAME, FcDevices
from .http_api import HttpApi
from .machine import BlockDevice, NetDevice
from .supervision import EXIT_GRACE_S
from .vmm_dir import SOCKET_NAME

if TYPE_CHECKING:
    from .bounded_json import JsonValue
    from .child import Child
    from .fc_machine import FcVoices
    from .fc_room import Room
    from .lent_taps import LentTaps
    from .machine import MachineSpec

# Alone it takes 0.1 s; the kernel's image is read on the way.
LAUNCH_DEADLINE_S: Final = 30.0
MIN_VERSION: Final = (1, 12)


class Starting(NamedTuple):
    """A machine on its way."""

    spec: MachineSpec
    room: Room
    child: Child
    voices: FcVoices
    devices: FcDevices
    taps: LentTaps


async def start(machine: Starting, undo: contextlib.AsyncExitStack) -> HttpApi:
    """Build the machine and let it run; returns its API, which `undo` closes.

    Raises:
        PreconditionFailed: the VMM is too old, or a device of the host is not as it must be.
        LaunchFailed: it ended, refused, or stayed mute; its last words inside.
    """
    ending = f"gave no answer within {LAUNCH_DEADLINE_S:g} s"
    cause: Exception | None = None
    with trio.move_on_after(LAUNCH_DEADLINE_S):
        try:
            api = await _connect(machine, undo)
            machine.devices.use(api)
            await _configure(machine, api)
        except HttpRejected as error:
            ending, cause = f"refused {error.target}: {error.text}", error
        except ControlLost as error:
            ending, cause = f"does not serve its API ({error.why})", error
            with trio.move_on_after(EXIT_GRACE_S):
                ending = str(await machine.child.wait())
        except CommandTimeout as error:
            cause = error
        except ControlError as error:
            ending, cause = f"broke its control protocol: {error}", error
        else:
            return api
    raise LaunchFailed(NAME, ending, machine.voices.last_words(machine.child)) from cause


async def _connect(machine: Starting, undo: contextlib.AsyncExitStack) -> HttpApi:
    """Connect as soon as the VMM listens. Raises ControlLost when it has ended before."""
    log = machine.voices.log
    api: HttpApi | None = None
    problem = ControlLost("connect", "it has ended")
    async with trio.open_nursery() as nursery:

        async def watch_end() -> None:
            await machine.child.wait()
            log.wake()

        nursery.start_soon(log.run)
        nursery.start_soon(watch_end)
        handle = _Handle(machine.room, undo)
        # Any line may be the one that it listens: an unknown version's may read otherwise.
        try:
            while (api := await handle.try_to_connect()) is None and machine.child.exit is None:
                await log.grown()
        except ControlLost as error:
            problem = error
        nursery.cancel_scope.cancel()
    if api is None:
        raise problem
    undo.callback(api.close)
    return api


class _Handle:
    """The API's socket: opened once, by name, then without one."""

    def __init__(self, room: Room, undo: contextlib.AsyncExitStack) -> None:
        self._path = room.path(fc_room.API_SOCKET)
        self._undo = undo
        self._fd = -1

    async def try_to_connect(self) -> HttpApi | None:
        """Return a connected client, None while nobody listens. Raises ControlLost."""
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            self._undo.callback(os.close, self._fd)
            if not stat.S_ISSOCK(os.fstat(self._fd).st_mode):
                raise ControlLost("connect", f"{self._path} is no socket")
        api = HttpApi(f"/proc/self/fd/{self._fd}")
        try:
            await api.connect()
        except ControlLost:
            return None  # its name is there before it listens
        self._path.unlink()
        return api


async def _configure(machine: Starting, api: HttpApi) -> None:
    """Say what the machine is made of, and start it."""
    spec, room = machine.spec, machine.room

    async def ask(method: str, target: str, body: fc_config.Body | None = None) -> JsonValue:
        return await api.request(method, target, body, timeout_s=LAUNCH_DEADLINE_S)

    _check_version(spec, await ask("GET", "/version"))
    with contextlib.ExitStack() as shown:
        host = fc_config.HostSide(
            kernel=room.kernel,
            initrd=room.initrd,
            vsock=f"{room.inside}/{SOCKET_NAME}",
            metrics=f"{room.inside}/{fc_room.METRICS}",
            placeholder=room.placeholder,
            images=_show_disks(machine, shown),
            taps={
                device.id: machine.taps.lend(device)
                for device in spec.devices
                if isinstance(device, NetDevice)
            },
        )
        for request in fc_config.requests(spec, host):
            await ask("PUT", request.target, request.body)
        # It has opened all taps, and no guest runs yet that could have changed which.
        machine.taps.take_back(machine.child.pid)
        # It listens where it is to listen, too.
        room.directory.seal()
        await ask("PUT", "/actions", {"action_type": "InstanceStart"})


def _show_disks(machine: Starting, shown: contextlib.ExitStack) -> dict[str, str]:
    """Where the VMM finds the disks of the specification until `shown` is closed."""
    room = machine.room
    images: dict[str, str] = {}
    for device in machine.spec.devices:
        if isinstance(device, BlockDevice):
            leased = lease(device)
            machine.devices.keep(device.id, leased)
            images[device.id] = str(device.path)
            if room.nodes is not None:
                name = shown.enter_context(room.nodes.exposed(device, leased))
                images[device.id] = f"{room.disks_inside}/{name}"
    return images


def _check_version(spec: MachineSpec, answer: JsonValue) -> None:
    found = fc_config.version(answer)
    if found is None or found < MIN_VERSION:
        text = answer.get("firecracker_version") if isinstance(answer, dict) else None
        raise PreconditionFailed(
            "Firecracker",
            path=spec.binary,
            why=f"its version is {text!r:.40}",
            fix="install version {}.{} or newer".format(*MIN_VERSION),
        )
