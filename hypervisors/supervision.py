"""What supervising any VMM has in common: events out, console in, the end awaited."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import trio

from .machine import VmEvent, VmEventKind

if TYPE_CHECKING:
    import socket

    from .child import Child
    from .console import ConsoleRing

EVENT_BACKLOG: Final = 64
CONSOLE_CHUNK_BYTES: Final = 65536
# A VMM hands over an emulated UART's bytes one by one; taking a guest's output in lots keeps a
# chatty guest from waking us for each. Far below what a reader notices.
CONSOLE_LOT_S: Final = 0.005
# From the last event or the end of the control connection to the process's end. A VMM takes
# milliseconds; longer means that it hangs in its own exit.
EXIT_GRACE_S: Final = 3.0


class VmEvents:
    """The events of one machine; a reader that falls behind loses the oldest, never the last."""

    def __init__(self) -> None:
        self.dropped = 0
        self._send, self.receive = trio.open_memory_channel[VmEvent](EVENT_BACKLOG)

    def emit(self, kind: VmEventKind, detail: str = "") -> None:
        """Tell the reader, without waiting for him."""
        event = VmEvent(kind=kind, detail=detail)
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            # The newest matters most: EXITED is the last one and must not be lost.
            self.receive.receive_nowait()
            self.dropped += 1
            self._send.send_nowait(event)
        except trio.BrokenResourceError:
            # The reader has closed its end.
            self.dropped += 1

    def end(self, reason: str) -> None:
        """The last event."""
        self.emit(VmEventKind.EXITED, reason)
        self._send.close()


async def read_console(sock: socket.socket, ring: ConsoleRing, child: Child) -> None:
    """Feed what the guest writes to `ring` until the console's end, or until `sock` is closed."""
    while True:
        try:
            data = sock.recv(CONSOLE_CHUNK_BYTES)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        except OSError:
            return
        if not data:
            return
        ring.feed(data)
        # Pacing, not waiting for anything: the socket buffer holds what comes meanwhile, and a
        # guest that fills it is slowed down by its own UART.
        if child.exit is None:
            await trio.sleep(CONSOLE_LOT_S)


async def wait_process(child: Child, ending: trio.Event) -> None:
    """Return when the process has ended; end it when it outlives `ending`, its announcement."""
    async with trio.open_nursery() as nursery:

        async def enforce() -> None:
            await ending.wait()
            await trio.sleep(EXIT_GRACE_S)
            child.send_signal(signal.SIGKILL)

        nursery.start_soon(enforce)
        await child.wait()
        nursery.cancel_scope.cancel()


def close_socket(sock: socket.socket) -> None:
    """Close a socket that a task may be waiting for. Idempotent."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        sock.close()
