"""Brings one virtual machine up to an agent that answers, watches it, and takes it down.

Order, with everything that can overlap overlapped:

    check ──> share prepared ──┬─> virtiofsd ─┬─> VMM launched ──> agent says ready ──> connected
                               ├─> vsock ─────┤        ║
                               └─> network ───┘        ║
                                      rootfs and spec (by the caller, meanwhile)

A `Machine` is used once. The death of any part is reported once, through `on_death`, with the
reason that explains most: a dead VMM also ends the daemons and the agent's connection.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import trio

from agent_proto.client import AgentClient
from agent_proto.errors import AgentError, AgentMisbehaved, AgentTimeout
from agent_proto.readiness import ReadinessListener
from agent_proto.vsock import LONGEST_PAUSE_S, dial, dial_until
from hypervisors.machine import MachineSpec, Rng, SharedDirectory, VmExit
from shimv2 import host_process
from shimv2.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from shimv2.failure import WAITING
from shimv2.guest_vsock import GuestVsock
from shimv2.port_forward import FORWARD_PORT
from shimv2.rootfs import SHARE_TAG
from shimv2.sizing import Size

if TYPE_CHECKING:
    from pathlib import Path

    from agent_proto.limits import AgentTimeouts
    from hypervisors.base import Hypervisor, VirtualMachine
    from hypervisors.child import ChildRecord
    from hypervisors.helper import Helper
    from hypervisors.machine import NetDevice, Vsock
    from hypervisors.virtiofsd import Cache
    from shimv2.journal import Entry, Journal
    from shimv2.kernel_vsock import KernelVsockDescriptor
    from shimv2.machine_plan import MachinePlan
    from shimv2.state_dir import StateDir
    from shimv2.timeline import Timeline

_CONNECT_DEADLINE_S: Final = 5.0
# Not sure to report: dial it after this, or a third of the limit if that is sooner. Most emulated
# guests have reported by then, and dialling ones that do not listen yet costs the daemon work.
_REPORT_PATIENCE_S: Final = 15.0
# An agent that was reached by dialling may be one that reports, just late: its line comes with it.
_LATE_REPORT_S: Final = 0.5
# How long the loss of one part waits for the VMM's own end, which explains it better.
_BETTER_REASON_S: Final = 0.3
# The same where the VMM is on its way out, which takes a large one a while; a daemon that went in
# order says so as well, because its VMM has hung up.
_HUNG_UP_S: Final = 3.0
_STOP_DEADLINE_S: Final = 5.0
_TAIL_LINES: Final = 20
_PANIC_LINES: Final = 100
# Dialling ends before its deadline when its next pause would pass it.
_DIAL_SLACK_S: Final = LONGEST_PAUSE_S
_SHARE_SOCKET: Final = "virtiofsd.sock"


class AgentSilent(DeadlineExceeded):
    """The guest was launched, and `limit_s` later its agent had not answered."""

    limit_name: Final = "`dial_timeout`"

    def __init__(self, limit_s: float, last: Exception) -> None:
        limit = f"{limit_s:g} s ({self.limit_name})"
        super().__init__(f"the agent in the guest did not answer within {limit}: {last}")
        self.limit_s = limit_s


class SupervisedHelper(Protocol):
    """A daemon beside the VMM."""

    @property
    def name(self) -> str: ...
    @property
    def stderr_tail(self) -> list[str]: ...
    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> object: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Machinery:
    """The parts a machine is made of; tests put fakes here."""

    hypervisor: Hypervisor
    start_virtiofsd: Callable[..., Awaitable[Helper]]
    start_vsock_device: Callable[..., Awaitable[Helper]]
    open_kernel_vsock: Callable[[], KernelVsockDescriptor | None]
    check_virtiofsd: Callable[[Path, Cache], None] = lambda binary, cache: None


class MachineNetwork(NamedTuple):
    """What a machine has of its pod's network at its launch."""

    devices: tuple[NetDevice, ...] = ()
    namespace_fd: int | None = None


NetworkOpener = Callable[[bool], Awaitable[MachineNetwork]]


async def _no_network(opens_taps: bool) -> MachineNetwork:
    return MachineNetwork()


def check_machine(
    sandbox_id: str, plan: MachinePlan, machinery: Machinery, state: StateDir
) -> MachinePlan:
    """Refuse what cannot work, and return the plan within what the backend can. Takes nothing.

    Raises:
        PreconditionFailed, Unsupported: as `Hypervisor.check`.
        InvalidArgument: a socket's path would be too long.
        FailedPrecondition: no way for files into the guest.
    """
    hypervisor = machinery.hypervisor
    can = hypervisor.capabilities(machine_spec(sandbox_id, plan, state))
    plan = plan.within(can)
    # The kernel's vsock device, where there is one, is checked by being opened later.
    vsock = GuestVsock.planned(state, can)
    if not plan.shares and not plan.disks:
        raise FailedPrecondition(
            f"{hypervisor.name} has no way to give a container its files: without a shared "
            f"directory it needs block devices; set {plan.disks_need}, or shared_fs = "
            '"virtio-fs"'
        )
    if plan.grows and can.instead and not (can.vcpu_hotplug or can.memory_hotplug):
        raise FailedPrecondition(
            f"{hypervisor.name} gives this VM its size once, and with static_sandbox_resource_mgmt "
            f"= false it would have to grow; set that to true, or {can.instead}"
        )
    hypervisor.check(machine_spec(sandbox_id, plan, state, vsock))
    if plan.shares:
        machinery.check_virtiofsd(plan.virtiofsd, plan.virtiofsd_cache)
    return plan


class Machine:
    """One VM with its daemons and its agent."""

    def __init__(
        self,
        sandbox_id: str,
        plan: MachinePlan,
        machinery: Machinery,
        *,
        state: StateDir,
        share: Path,
        journal: Journal,
        jobs: trio.Nursery,
        timeline: Timeline,
        on_death: Callable[[str], None],
        timeouts: AgentTimeouts | None = None,
        before_launch: Callable[[], Awaitable[None]] | None = None,
        why_dead: Callable[[], str] = lambda: "",
    ) -> None:
        self._sandbox_id = sandbox_id
        self._plan = plan
        self._machinery = machinery
        self._state = state
        self._share = share
        self._journal = journal
        self._jobs = jobs
        self._timeline = timeline
        self._on_death = on_death
        self._timeouts = timeouts
        self._before_launch = before_launch
        self._why_dead = why_dead
        self._helpers: list[SupervisedHelper] = []
        self._entries: list[Entry] = []
        self._vsock: GuestVsock | None = None
        self._scope = trio.CancelScope()
        self._network = MachineNetwork()
        self._is_closing = False
        self._helper_loss = ""
        self._vmm_hung_up = False
        self._launch_failed = trio.Event()
        self.launched = trio.Event()
        self.vm: VirtualMachine | None = None
        self.agent: AgentClient | None = None
        self.death: str | None = None
        self.boot_ms: dict[str, float] = {}  # the agent's own account of its start
        # Only an agent that reports readiness is known to keep output after a process's exit.
        self.keeps_output = False
        # The same for the order of the network's requests (`AgentClient.do_in_order`).
        self.keeps_order = False

    @property
    def shares(self) -> bool:
        """Whether the guest has a directory of the host's."""
        return self._plan.shares

    @property
    def pid(self) -> int:
        """The VMM's pid: what containerd is told for every process. 0 before the launch."""
        return self.vm.pid if self.vm is not None else 0

    def console_tail(self) -> list[str]:
        """The guest's last console lines, escaped."""
        return self.vm.console.tail(_TAIL_LINES) if self.vm is not None else []

    @property
    def size(self) -> Size:
        """What the machine is launched with."""
        return Size(vcpus=self._plan.vcpus, memory_mib=self._plan.memory_mib)

    @property
    def max_vcpus(self) -> int:
        return self._plan.max_vcpus

    @property
    def vm_exit(self) -> VmExit | None:
        return self.vm.exit if self.vm is not None else None

    async def boot(self, open_network: NetworkOpener = _no_network) -> AgentClient:
        """Boot and connect. On failure the caller calls `aclose`; cancelling is safe.

        `open_network`, which is told whether the VMM opens taps by name, runs beside the daemons'
        start. Its descriptors stay the caller's; when `launched` is set it may close them.

        Raises:
            Unavailable: a part died meanwhile, with its reason.
            HypervisorError, AgentError: a step failed; or what `open_network` raises.
        """
        with self._scope:
            await self._boot(open_network)
        if self.agent is None or self.death is not None:
            raise Unavailable(self.death or "the virtual machine was stopped while it booted")
        return self.agent

    async def dial_loopback(self) -> socket.socket:
        """Connect to the agent's port for connections to the guest's loopback, or AgentError."""
        assert self._vsock is not None
        return await dial(self._vsock.endpoint(FORWARD_PORT), timeout_s=_CONNECT_DEADLINE_S)

    async def aclose(self) -> None:
        """Kill and reap everything. Idempotent; shielded, and bounded part by part."""
        self._is_closing = True
        self._scope.cancel()
        if self.agent is not None:
            self.agent.close()
        if self.vm is not None:
            self.vm.kill()
            # If this fires the VMM hangs in the kernel; its record stays in the journal.
            with trio.move_on_after(_STOP_DEADLINE_S, shield=True):
                await self.vm.wait_exited()
        for helper in reversed(self._helpers):
            await helper.aclose()
        self._helpers.clear()
        if self._vsock is not None:
            self._vsock.close()
        if self.vm is None or self.vm.exit is not None:
            for entry in reversed(self._entries):
                self._journal.release(entry)
            self._entries.clear()

    async def _boot(self, open_network: NetworkOpener) -> None:
        machinery = self._machinery
        can = machinery.hypervisor.capabilities(self._spec())
        vsock = self._vsock = GuestVsock.open(self._state, can, machinery.open_kernel_vsock)
        if vsock.has_socket:
            self._journal_socket(vsock.guest_socket)
        self._timeline.enter("starting the daemons of the virtual machine")
        async with ReadinessListener.listen(vsock.endpoint(self._plan.ready_port)) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._open_network, open_network, can.opens_taps)
                if self._plan.shares:
                    nursery.start_soon(self._start_virtiofsd)
                if vsock.needs_daemon:
                    nursery.start_soon(self._start_vsock_device, vsock)
            self._timeline.mark("helpers")
            await self._launch(self._spec(vsock.device(), listener.port))
            self._timeline.enter(f"{WAITING} in the guest")
            sock = await self._meet_agent(listener, vsock)
        self.agent = AgentClient(sock, timeouts=self._timeouts)
        await self._jobs.start(self._supervise_agent)
        self._timeline.mark("agent_connected")

    async def _meet_agent(self, listener: ReadinessListener, vsock: GuestVsock) -> socket.socket:
        """Connect as soon as the agent reports, or find out by dialling that it serves.

        Raises:
            AgentSilent: neither within the boot's deadline, which counts from the launch.
        """
        plan = self._plan
        endpoint = vsock.endpoint(plan.agent_port)
        give_up_at = trio.current_time() + plan.boot_deadline_s

        def left_s() -> float:
            return max(0.0, give_up_at - trio.current_time())

        try:
            if plan.readiness == "push":
                await self._wait_report(listener, left_s())
            elif plan.readiness == "auto":
                with contextlib.suppress(AgentTimeout):
                    await self._wait_report(
                        listener, min(_REPORT_PATIENCE_S, plan.boot_deadline_s / 3)
                    )
            if self.keeps_output:
                return await dial(endpoint, timeout_s=min(left_s(), _CONNECT_DEADLINE_S))
            sock = await dial_until(endpoint, deadline_s=left_s())
        except AgentError as exc:
            if left_s() > _DIAL_SLACK_S or isinstance(exc, AgentMisbehaved):
                raise
            raise AgentSilent(plan.boot_deadline_s, exc) from exc
        if plan.readiness == "auto":
            with contextlib.suppress(AgentTimeout, AgentMisbehaved):
                await self._wait_report(listener, _LATE_REPORT_S)
        return sock

    async def _wait_report(self, listener: ReadinessListener, limit_s: float) -> None:
        report = await listener.wait(timeout_s=limit_s)
        self.keeps_output = self.keeps_order = True
        self.boot_ms = dict(report.boot_ms)
        since_init_ms = report.boot_ms.get("listening", 0) - report.boot_ms.get("init", 0)
        self._timeline.mark("kernel", ago_s=since_init_ms / 1000)
        self._timeline.mark("agent_ready")

    async def _launch(self, spec: MachineSpec) -> None:
        self._timeline.enter("launching the virtual machine")
        if self._before_launch is not None:
            await self._before_launch()
        self._timeline.mark("launch")
        try:
            self.vm = await self._machinery.hypervisor.launch(spec, record=self._record)
        except BaseException:
            self._launch_failed.set()
            raise
        await self._jobs.start(self._supervise_vm)
        self._timeline.mark("launched")
        self.launched.set()

    async def _open_network(self, open_network: NetworkOpener, opens_taps: bool) -> None:
        self._network = await open_network(opens_taps)
        if self._network.devices:
            self._timeline.mark("network")

    async def _start_virtiofsd(self) -> None:
        path = self._journal_socket(self._state.socket(_SHARE_SOCKET))
        helper = await self._machinery.start_virtiofsd(
            self._plan.virtiofsd,
            self._share,
            path,
            record=self._record,
            cache=self._plan.virtiofsd_cache,
        )
        await self._supervise(helper)

    async def _start_vsock_device(self, vsock: GuestVsock) -> None:
        helper = await self._machinery.start_vsock_device(
            self._plan.vsock_device,
            self._journal_socket(vsock.daemon_socket),
            vsock.guest_socket,
            record=self._record,
        )
        await self._supervise(helper)

    async def _supervise(self, helper: SupervisedHelper) -> None:
        self._helpers.append(helper)
        await self._jobs.start(self._watch_helper, helper)

    async def _watch_helper(
        self, helper: SupervisedHelper, *, task_status: trio.TaskStatus[None]
    ) -> None:
        ended = await helper.run(task_status=task_status)
        said = " | ".join(helper.stderr_tail[-3:])
        # The agent's connection often breaks first, because its helper is gone: this is why.
        self._helper_loss = f"{helper.name} {ended}" + (f": {said}" if said else "")
        self._vmm_hung_up = getattr(ended, "code", None) == 0
        await self._lost(self._helper_loss)

    async def _supervise_vm(self, *, task_status: trio.TaskStatus[None]) -> None:
        vm = self.vm
        assert vm is not None
        await vm.run(task_status=task_status)
        reason = (await vm.wait_exited()).reason
        self._die(f"the virtual machine ended: {reason}{self._panic()}")

    def _panic(self) -> str:
        """The guest kernel's last words: a guest without a panic device just reboots."""
        for line in reversed(self.vm.console.tail(_PANIC_LINES) if self.vm is not None else []):
            _, found, text = line.partition("Kernel panic")
            if found:
                return f" after a kernel panic{text[:200]}"
        return ""

    async def _supervise_agent(self, *, task_status: trio.TaskStatus[None]) -> None:
        assert self.agent is not None
        await self.agent.run(task_status=task_status)
        await self._lost("the connection to the agent in the guest was lost")

    async def _lost(self, reason: str) -> None:
        if self._is_closing:
            return
        if self.vm is None and self._vmm_hung_up:
            # A launch that fails ends its VMM, and then says why.
            with trio.move_on_after(_HUNG_UP_S):
                await self._launch_failed.wait()
                return
        if self.vm is not None:
            # Its own supervisor reports the end.
            with trio.move_on_after(_BETTER_REASON_S):
                await self.vm.wait_exited()
                return
            if self._vmm_hung_up or host_process.is_ending(self.vm.pid):
                with trio.move_on_after(_HUNG_UP_S):
                    await self.vm.wait_exited()
                    return
        self._die(self._helper_loss or reason)

    def _die(self, reason: str) -> None:
        if self._is_closing or self.death is not None:
            return
        host = self._why_dead()
        self.death = f"{reason} ({host})" if host else reason
        self._scope.cancel()
        self._on_death(self.death)

    def _record(self, record: ChildRecord) -> None:
        self._entries.append(
            self._journal.take(
                "process", name=record.name, pid=record.pid, start_time=record.start_time
            )
        )

    def _journal_socket(self, path: Path) -> Path:
        self._entries.append(self._journal.take("socket", path=str(path)))
        return path

    def _spec(self, vsock: Vsock | None = None, ready_port: int | None = None) -> MachineSpec:
        spec = machine_spec(
            self._sandbox_id, self._plan, self._state, vsock, ready_port, self._network.devices
        )
        return replace(spec, network_namespace=self._network.namespace_fd)


def machine_spec(
    sandbox_id: str,
    plan: MachinePlan,
    state: StateDir,
    vsock: Vsock | None = None,
    ready_port: int | None = None,
    network: tuple[NetDevice, ...] = (),
) -> MachineSpec:
    """What the backend is asked for; without a vsock, what it is asked about. Pure."""
    if ready_port is None:
        ready_port = plan.ready_port
    share = SharedDirectory(id="share0", tag=SHARE_TAG, socket=state.socket(_SHARE_SOCKET))
    shares = (share,) if plan.shares else ()
    return MachineSpec(
        id=sandbox_id,
        kernel=plan.kernel,
        initrd=plan.initrd,
        cmdline=(
            # A guest whose kernel has found a fault in itself must not linger: it stops the process
            # that met it for ever, and who waits for that waits without end.
            f"oops=panic kata.ready_port={ready_port} kata.forward_port={FORWARD_PORT} "
            f"{plan.kernel_params}"
        ).strip(),
        vcpus=plan.vcpus,
        max_vcpus=plan.max_vcpus,
        memory_mib=plan.memory_mib,
        max_memory_mib=plan.max_memory_mib,
        huge_pages=plan.huge_pages,
        prealloc=plan.prealloc,
        binary=plan.binary,
        run_dir=state.directory,
        accelerator=plan.accelerator,  # type: ignore[arg-type]  # checked by the configuration
        machine_type=plan.machine_type,
        devices=(*shares, *([vsock] if vsock else ()), Rng(), *network),
        hotplug_ports=plan.hotplug_ports,
        unprivileged=plan.unprivileged,
    )
