"""The host kernel's vsock device: whether it works here, and a context id for one guest."""

from __future__ import annotations

import fcntl
import os
import random
import struct
from typing import Final

from agent_proto.vsock import KernelVsock
from hypervisors.machine import KernelVsock as KernelVsockDevice

_DEVICE: Final = "/dev/vhost-vsock"
_SET_GUEST_CID: Final = 0x4008AF60  # Source: linux/vhost.h VHOST_VSOCK_SET_GUEST_CID
_FIRST_CID: Final = 3  # Source: linux/vm_sockets.h: 0 to 2 are reserved
_LAST_CID: Final = 0xFFFFFFFE
_ATTEMPTS: Final = 64


class KernelVsockDescriptor:
    """An open /dev/vhost-vsock that has a context id; close it when the VM has ended."""

    def __init__(self, descriptor: int, cid: int) -> None:
        self._descriptor = descriptor
        self.cid = cid

    def device(self, device_id: str) -> KernelVsockDevice:
        return KernelVsockDevice(id=device_id, cid=self.cid, vhost_fd=self._descriptor)

    def endpoint(self, port: int) -> KernelVsock:
        return KernelVsock(self.cid, port)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def open_kernel_vsock() -> KernelVsockDescriptor | None:
    """Open the device and take a free context id; None where the kernel has no such device."""
    try:
        descriptor = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    for _ in range(_ATTEMPTS):
        cid = random.randint(_FIRST_CID, _LAST_CID)
        try:
            fcntl.ioctl(descriptor, _SET_GUEST_CID, struct.pack("<Q", cid))
        except OSError:
            continue  # taken by another guest: the space is large, so another draw is free
        return KernelVsockDescriptor(descriptor, cid)
    os.close(descriptor)
    return None
