"""One process of a container, init or exec: its state, its one exit, its stdio.

The exit is a value that is set once, by `settle`; every Wait, State, Delete and the exit event show
that same value. Only this class changes its state. It doesn't know containerd's messages, nor which
other processes there are.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from agent_proto.errors import AgentError, AgentUnreachable
from shimv2.errors import NotFound
from shimv2.lifecycle import Later, NoOp, Operation, Refused, Role, State, verdict
from shimv2.relay import Relay

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from shimv2.stdio import Stdio, StdioPlan

KILLED_STATUS: Final = 137  # 128 + SIGKILL: what a process that lost its VM reports
UNKNOWN_STATUS: Final = 255  # Source: Kata: the agent could not say
DRAIN_DEADLINE_S: Final = 10.0  # Source: runc's shim, ioutil drain before Delete


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How and when a process ended; the clock is the host's."""

    status: int
    at_ns: int
    reason: str = ""


def exit_now(status: int, reason: str = "") -> ProcessExit:
    """An exit at this moment. The guest's word is data: out of range becomes 255."""
    if not 0 <= status <= 255:
        reason = reason or f"the agent reported exit status {status}"
        status = UNKNOWN_STATUS
    return ProcessExit(status, time.time_ns(), reason)


class GuestProcess:
    """The agent's calls for one process."""

    __slots__ = ("_agent", "_container_id", "_wire_id")

    def __init__(self, agent: AgentClient, container_id: str, wire_id: str) -> None:
        self._agent = agent
        self._container_id = container_id
        self._wire_id = wire_id

    async def read_stdout(self, max_bytes: int) -> bytes:
        return await self._agent.read_stdout(self._container_id, self._wire_id, max_bytes)

    async def read_stderr(self, max_bytes: int) -> bytes:
        return await self._agent.read_stderr(self._container_id, self._wire_id, max_bytes)

    async def write_stdin(self, data: bytes) -> int:
        return await self._agent.write_stdin(self._container_id, self._wire_id, data)

    async def close_stdin(self) -> None:
        await self._agent.close_stdin(self._container_id, self._wire_id)

    async def wait(self) -> int:
        return await self._agent.wait_process(self._container_id, self._wire_id)

    async def signal(self, number: int) -> None:
        await self._agent.signal_process(self._container_id, self._wire_id, number)

    async def resize(self, rows: int, columns: int) -> None:
        await self._agent.tty_win_resize(self._container_id, self._wire_id, rows, columns)


class ContainerProcess:
    """A process by its container's id and, for an exec, its exec id."""

    def __init__(self, container_id: str, exec_id: str, plan: StdioPlan) -> None:
        self.container_id = container_id
        self.exec_id = exec_id
        self.plan = plan
        self.state = State.CREATING if not exec_id else State.CREATED
        self.exit: ProcessExit | None = None
        self.exited = trio.Event()
        self.relay: Relay | None = None
        self.size: tuple[int, int] | None = None  # rows, columns, until the process can be told
        self.is_input_finished = False
        self.is_gone = False
        self._stdio: Stdio | None = None
        self._changed = trio.Event()

    @property
    def role(self) -> Role:
        return Role.EXEC if self.exec_id else Role.INIT

    @property
    def wire_id(self) -> str:
        """The agent's name for it. Source: Kata Go shim: the init process has the container's."""
        return self.exec_id or self.container_id

    def guest(self, agent: AgentClient) -> GuestProcess:
        return GuestProcess(agent, self.container_id, self.wire_id)

    def become(self, state: State) -> None:
        """Change the state and wake whoever waits for a change."""
        self.state = state
        self._changed.set()
        self._changed = trio.Event()

    def vanish(self) -> None:
        """It was deleted, or never came to be: who waits for a change gets NotFound."""
        self.is_gone = True
        self.become(State.DELETING)

    async def wait_changed(self) -> None:
        """Return at the next change of state."""
        await self._changed.wait()

    async def admit(self, operation: Operation) -> bool:
        """Ask the table, waiting out changes under way. False: answer success, do nothing.

        Raises:
            ShimError: the table's refusal.
        """
        while True:
            if self.is_gone:
                raise NotFound(f"{self.describe()} not found")
            self.refuse(operation)
            match verdict(self.role, operation, self.state):
                case NoOp():
                    return False
                case Later():
                    await self._changed.wait()
                case _:
                    return True

    def _because(self) -> str:
        """Why it ended, when that wasn't its own doing."""
        return f" ({self.exit.reason})" if self.exit is not None and self.exit.reason else ""

    def refuse(self, operation: Operation) -> None:
        """Raise the table's refusal, if that is its answer; wait for nothing."""
        match verdict(self.role, operation, self.state):
            case Refused(error=error, text=text):
                raise error(f"{self.describe()}: {text}{self._because()}")

    def describe(self) -> str:
        if self.exec_id:
            return f"exec {self.exec_id} of container {self.container_id}"
        return f"container {self.container_id}"

    def settle(self, process_exit: ProcessExit) -> bool:
        """Set the exit, once; False if there was one."""
        if self.exit is not None:
            return False
        self.exit = process_exit
        if self.state is not State.DELETING:
            self.become(State.STOPPED)
        self.exited.set()
        return True

    def attach(self, stdio: Stdio) -> None:
        """Own open stdio until the process is deleted."""
        self._stdio = stdio
        if self.is_input_finished and stdio.stdin is not None:
            stdio.stdin.finish()

    def make_relay(self, agent: AgentClient) -> Relay:
        """Make the relay over the attached stdio; the caller runs it."""
        assert self._stdio is not None
        self.relay = Relay(self.plan, self._stdio, self.guest(agent))
        return self.relay

    def finish_input(self) -> None:
        """CloseIO: remembered when there is nothing open yet."""
        self.is_input_finished = True
        if self._stdio is not None and self._stdio.stdin is not None:
            self._stdio.stdin.finish()

    def close_stdio(self) -> None:
        """Close what no relay owns: the process did not start."""
        if self._stdio is not None:
            self._stdio.close()

    async def logger_left(self) -> None:
        """Wait until a logger that is written to has left; nothing else is waited for."""
        if self.plan.logger is not None and self.relay is not None and self.relay.is_running:
            await self.relay.finished.wait()

    async def drain(self, deadline_s: float = DRAIN_DEADLINE_S) -> None:
        """Let what was written reach its reader, for so long; then close everything."""
        if self.relay is None:
            if self._stdio is not None:
                await self._stdio.aclose()
            return
        with trio.move_on_after(deadline_s):
            await self.relay.finished.wait()
        self.relay.abandon()
        with trio.CancelScope(shield=True):  # bounded by the relay's own end
            await self.relay.finished.wait()


async def guest_exit(
    process: ContainerProcess, guest: GuestProcess, explain: Callable[[], Awaitable[str]]
) -> ProcessExit:
    """Wait for the guest's word on a process's end; its loss is an end as well.

    `explain` says why the sandbox is gone.
    """
    try:
        return exit_now(await guest.wait())
    except AgentUnreachable:
        return exit_now(KILLED_STATUS, await explain())
    except AgentError as exc:
        return exit_now(UNKNOWN_STATUS, f"{process.describe()}: {exc}")
