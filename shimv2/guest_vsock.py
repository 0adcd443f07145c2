"""How the shim and one guest reach each other, by what the backend and the host can.

The VMM's own vsock device is first choice: nothing else is needed. Else the host kernel's, and
where there is none, a daemon's beside the VMM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from agent_proto.vsock import Endpoint, HybridVsock
from hypervisors.machine import HybridVsock as HybridVsockDevice
from hypervisors.machine import KernelVsock as KernelVsockDevice
from hypervisors.machine import UnixVsock
from shimv2.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypervisors.machine import Capabilities, Vsock
    from shimv2.kernel_vsock import KernelVsockDescriptor
    from shimv2.state_dir import StateDir

_DEVICE_ID: Final = "vsock0"
_DAEMON_SOCKET: Final = "vhost-vsock.sock"
_GUEST_SOCKET: Final = "vsock.sock"
_ANY_CID: Final = 3


class GuestVsock:
    """One guest's vsock: the device to give it and the endpoints to reach it at."""

    def __init__(
        self, state: StateDir, can: Capabilities, kernel: KernelVsockDescriptor | None
    ) -> None:
        self._kernel = kernel
        self._is_hybrid = can.hybrid_vsock
        self.guest_socket: Path = state.socket(_GUEST_SOCKET)
        self.daemon_socket: Path = state.socket(_DAEMON_SOCKET)

    @classmethod
    def open(
        cls,
        state: StateDir,
        can: Capabilities,
        open_kernel_vsock: Callable[[], KernelVsockDescriptor | None],
    ) -> GuestVsock:
        """Take what the host offers. Close it when the VM has ended.

        Raises:
            FailedPrecondition: the VMM has the kernel's device or none, and there is none.
        """
        wanted = can.kernel_vsock and not can.hybrid_vsock
        kernel = open_kernel_vsock() if wanted else None
        if kernel is None and not can.hybrid_vsock and not can.unix_vsock:
            raise FailedPrecondition(
                "this VMM reaches its guest by the host kernel's vsock alone, and /dev/vhost-vsock "
                "gives no context id; load vhost_vsock, or use another VMM"
            )
        return cls(state, can, kernel)

    @staticmethod
    def planned(state: StateDir, can: Capabilities) -> Vsock:
        """A device like the machine's, for a check: nothing is taken, and it can't be used."""
        if can.kernel_vsock and not can.hybrid_vsock and not can.unix_vsock:
            return KernelVsockDevice(id=_DEVICE_ID, cid=_ANY_CID, vhost_fd=-1)
        return GuestVsock(state, can, None).device()

    @property
    def needs_daemon(self) -> bool:
        """Tell whether vhost-device-vsock must listen on `daemon_socket` before the launch."""
        return self._kernel is None and not self._is_hybrid

    @property
    def has_socket(self) -> bool:
        """Tell whether the guest is reached at `guest_socket`."""
        return self._kernel is None

    def device(self) -> Vsock:
        """What the machine is to be built with."""
        if self._kernel is not None:
            return self._kernel.device(_DEVICE_ID)
        if self._is_hybrid:
            return HybridVsockDevice(id=_DEVICE_ID, uds_path=self.guest_socket)
        return UnixVsock(id=_DEVICE_ID, socket=self.daemon_socket, uds_path=self.guest_socket)

    def endpoint(self, port: int) -> Endpoint:
        """Where a port is: the guest's, or ours as the guest calls it."""
        if self._kernel is not None:
            return self._kernel.endpoint(port)
        return HybridVsock(self.guest_socket, port)

    def close(self) -> None:
        """Give the kernel's context id back. Idempotent."""
        if self._kernel is not None:
            self._kernel.close()
