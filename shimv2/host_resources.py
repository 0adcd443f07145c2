"""What one sandbox holds on the host: its state directory, journal, share, network and machine.

    (nothing) ──take──> journal, share, machine ──open_network──> … ──give_back──> (nothing)

Everything is in the journal before it is taken. `give_back` is idempotent and can be followed by
another `take`. Who asks for what and when is the sandbox's business (`sandbox`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent_proto.limits import AgentTimeouts
from shimv2.boot import Machine, MachineNetwork, Machinery
from shimv2.container_files import ContainerFiles, Prepared
from shimv2.errors import FailedPrecondition, Unavailable
from shimv2.guest_requests import sandbox_request
from shimv2.host_cgroup import HostCgroup
from shimv2.journal import DEFERRED, Journal, outlasts
from shimv2.live_undo import remove_state_live, undo_live
from shimv2.logger import start_logger
from shimv2.rootfs import sandbox_dns, sandbox_shm_bytes
from shimv2.sandbox_network import SandboxNetwork, namespace_path

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from hypervisors.child import ChildRecord
    from shimv2.bootstrap import ShimInvocation
    from shimv2.bundle import Bundle
    from shimv2.cgroup_path import Hierarchy
    from shimv2.config import RuntimeConfig
    from shimv2.container import Log
    from shimv2.host_hooks import HostHooks
    from shimv2.journal import Entry
    from shimv2.machine_plan import MachinePlan
    from shimv2.rootfs import GuestPaths, MountCalls
    from shimv2.state_dir import StateDir
    from shimv2.stdio import Logger, LoggerCommand
    from shimv2.timeline import Timeline

# Source: moby daemon/config: containerd-namespace.
_DOCKER = "moby"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a sandbox is built from; tests put fakes here."""

    machinery: Callable[[RuntimeConfig], Machinery]
    load_config: Callable[[str | None, dict[str, str]], RuntimeConfig]
    mounts: MountCalls
    reports_root: str
    hierarchies: Callable[[], tuple[Hierarchy, ...]] = tuple


class HostResources:
    """The host's side of one sandbox. Not safe for concurrent `give_back`s: the caller locks."""

    def __init__(
        self, invocation: ShimInvocation, state_dir: StateDir, parts: Parts, log: Log
    ) -> None:
        self._invocation = invocation
        self._state_dir = state_dir
        self._parts = parts
        self._log = log
        self._journal: Journal | None = None
        self._vcpus = 1
        self._files: ContainerFiles | None = None
        self.cgroup = HostCgroup(parts.hierarchies, log)
        self.machine: Machine | None = None
        self.network: SandboxNetwork | None = None
        self._is_given_back = False
        self._hooks: HostHooks | None = None  # from the first container that has some on
        self._enter: Callable[[str], None] = lambda phase: None

    async def take(
        self,
        bundle: Bundle,
        config: RuntimeConfig,
        plan: MachinePlan,
        machinery: Machinery,
        *,
        jobs: trio.Nursery,
        timeline: Timeline,
        on_death: Callable[[str], None],
    ) -> Machine:
        """Make state directory, journal, cgroup and share, and the machine, not yet booted.

        Raises:
            FailedPrecondition: something of an earlier sandbox of this name can't be taken back.
            ShimError: one could not be made; `give_back` then takes the rest back.
        """
        journal = self._journal = await self._open_journal()
        self._vcpus = plan.vcpus
        self._enter = timeline.enter
        self.cgroup.make(bundle, config, journal)
        self._files = ContainerFiles(
            self._invocation.sandbox_id,
            self._state_dir.directory,
            journal,
            self._parts.mounts,
            plan,
            self._log,
        )
        self._files.open(config.runtime.sandbox_bind_mounts, config.hypervisor.guest_modules)
        self.machine = Machine(
            self._invocation.sandbox_id,
            plan,
            machinery,
            state=self._state_dir,
            share=self._files.share.path,
            journal=journal,
            jobs=jobs,
            timeline=timeline,
            on_death=on_death,
            timeouts=AgentTimeouts(
                request_s=config.agent.request_timeout_s,
                create_container_s=config.agent.create_container_timeout_s,
                create_sandbox_s=config.agent.create_container_timeout_s,
            ),
            before_launch=self.cgroup.settle,
            why_dead=self.cgroup.why_dead,
        )
        return self.machine

    async def _open_journal(self) -> Journal:
        for problem in await remove_state_live(self._state_dir):
            self._log.warning("left by an earlier shim", problem=problem)
        self._state_dir.create()
        try:
            return Journal.open(
                self._state_dir.journal,
                namespace=self._invocation.namespace,
                sandbox_id=self._invocation.sandbox_id,
            )
        except FailedPrecondition:
            raise  # the earlier shim's journal is still needed
        except BaseException:
            self._state_dir.remove()
            raise

    async def open_network(
        self, bundle: Bundle, config: RuntimeConfig, opens_taps: bool
    ) -> MachineNetwork:
        """Look into the pod's network namespace: the VMM must have the taps at its launch.

        The container's hooks of before come first: they may be what makes the network.
        `opens_taps` is the backend's capability.

        Raises:
            NetnsError: as `SandboxNetwork.open`.
            HookFailed: a hook did not succeed.
        """
        assert self._journal is not None
        path = namespace_path(bundle.spec)
        if hooks := self._hooks_for(bundle):
            path = await hooks.before_network(bundle, path)
            self._enter("preparing the pod's network")
        network = await SandboxNetwork.open(
            path, config, self._journal, vcpus=self._vcpus, lends_taps=opens_taps
        )
        self.network = network
        for note in network.notes:
            self.tell_network(note)
        return MachineNetwork(network.devices, network.namespace_fd)

    async def adopt_network(self, network: SandboxNetwork, config: RuntimeConfig) -> SandboxNetwork:
        """Docker names no namespace and runs no hook: it looks for the namespace of the task's pid.

        That is the VMM's own. Docker puts interfaces there between Create and Start; for others
        nothing changes. Source: moby daemon/start.go, from version 26 on.
        """
        if network.has_namespace or self._invocation.namespace != _DOCKER:
            return network
        assert self.machine is not None
        assert self._journal is not None
        path = Path(f"/proc/{self.machine.pid}/ns/net")
        self.network = await SandboxNetwork.open(path, config, self._journal, vcpus=self._vcpus)
        self.network.is_late = True
        return self.network

    async def catch_up_network(self, agent: AgentClient) -> None:
        """Before a Start: let the guest have what Docker has made since Create."""
        if self.network is None or not self.network.is_late:
            return
        if self.machine is not None and self.machine.vm is not None:
            await self.network.catch_up(agent, self.machine.vm, self.tell_network)

    async def set_up_guest(
        self, agent: AgentClient, bundle: Bundle, config: RuntimeConfig, timeline: Timeline
    ) -> None:
        """Make the booted guest this sandbox's.

        Raises:
            ExceptionGroup: of AgentError, when the agent refused something.
        """
        assert self.machine is not None
        assert self.network is not None
        network = await self.adopt_network(self.network, config)
        request = sandbox_request(
            bundle,
            sandbox_dns(bundle),
            config.agent.kernel_modules,
            shm_bytes=sandbox_shm_bytes(bundle),
            shares=self.machine.shares,
        )
        # A round trip to a guest that has just started is slow.
        if self.machine.keeps_order:
            await network.configure(agent, request)
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(network.configure, agent)  # neither needs the other
                await agent.create_sandbox(request)
        timeline.mark("sandbox")

    def start_followers(
        self, start_job: Callable[..., None], agent: AgentClient, config: RuntimeConfig
    ) -> None:
        """Begin what keeps the guest in step with the host from now on."""
        machine, network = self.machine, self.network
        assert machine is not None
        assert network is not None
        if not machine.shares:
            start_job(self.files.follow, agent)
        if network.has_namespace:
            start_job(network.forward, machine.dial_loopback, self.tell_network)
            if config.hypervisor.hotplug_ports > 0 and machine.vm is not None:
                start_job(network.follow, agent, machine.vm, self.tell_network)

    async def run_creation_hooks(self, bundle: Bundle) -> None:
        """Run the hooks of a container's creation that are left when the VM is up.

        Raises:
            HookFailed: a hook did not succeed.
        """
        if hooks := self._hooks_for(bundle):
            assert self.machine is not None
            # The VMM is in the namespace by now.
            await hooks.release_holder()
            namespace = self.network.namespace_fd if self.network is not None else None
            await hooks.in_network(bundle, self.machine.pid, namespace)

    async def run_poststart(self, container_id: str) -> None:
        """Run a container's poststart hooks, if it has any."""
        if self._hooks is not None and self.machine is not None:
            await self._hooks.started(container_id, self.machine.pid)
            self._close_journal()  # the container may have come and gone meanwhile

    async def poststart_over(self, container_id: str) -> None:
        """Wait for the poststart hooks of a container that has ended, if it has any."""
        if self._hooks is not None:
            await self._hooks.started_over(container_id)

    async def run_poststop(self, container_id: str | None = None) -> None:
        """Run the poststop hooks of a container, or of all, that haven't been run yet."""
        if self._hooks is not None:
            if container_id is None:
                await self._hooks.all_stopped()
            else:
                await self._hooks.stopped(container_id)
            self._close_journal()

    @property
    def files(self) -> ContainerFiles:
        """The containers' file systems, from `take` on."""
        assert self._files is not None
        return self._files

    def writers(self) -> set[str]:
        """The containers whose disks the guest must unmount before the machine is stopped."""
        return self._files.writers() if self._files is not None else set()

    async def hand_over(self, prepared: Prepared) -> GuestPaths:
        """Give a container's prepared file systems to the guest; as `ContainerFiles.hand_over`."""
        machine = self.machine
        if machine is None or machine.vm is None or machine.agent is None:
            raise Unavailable("the virtual machine is gone")
        return await self.files.hand_over(prepared, machine.vm, machine.agent)

    async def remove_files(self, container_id: str) -> None:
        """Take a container's back; what can't be is logged and stays in the journal. Shielded."""
        if self._files is None:
            return
        vm = self.machine.vm if self.machine is not None else None
        with trio.CancelScope(shield=True):  # each disk has the bound of `detach`
            for problem in await self._files.release(container_id, vm):
                self._log.warning("cleanup", container_id=container_id, problem=problem)

    async def start_logger(
        self, command: LoggerCommand, container_id: str, *, reason: str
    ) -> Logger:
        """Start a `binary://` logger under the journal; `reason` is why there may be none."""
        journal = self._journal
        if journal is None:
            raise Unavailable(reason)
        entries: list[Entry] = []

        def record(child: ChildRecord) -> None:
            entries.append(
                journal.take("process", name=child.name, pid=child.pid, start_time=child.start_time)
            )

        def forget() -> None:
            for entry in entries:
                journal.release(entry)

        try:
            logger = await start_logger(
                command,
                container_id=container_id,
                namespace=self._invocation.namespace,
                record=record,
            )
        except BaseException:
            forget()
            raise
        logger.on_stopped = forget
        return logger

    async def stop_machine(self) -> None:
        """Kill the VM and its daemons, and undo the network's wiring. Idempotent, bounded."""
        if self.machine is not None:
            await self.machine.aclose()
        if self.network is not None:
            for problem in await self.network.aclose():
                self.tell_network(problem)

    async def give_back(self) -> None:
        """Stop the machine, then undo everything that the journal holds. Idempotent.

        Poststop hooks are left to `run_poststop`; until then the journal stays.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stop_machine)
            nursery.start_soon(self.cgroup.leave)
        await self.cgroup.emptied()
        if self._hooks is not None:
            await self._hooks.release_holder()
        if self._files is not None:
            self._files.close()
        if self._journal is not None:
            for problem in await undo_live(self._journal):
                self._log.warning("cleanup", problem=problem)
        # Not before: hooks that end meanwhile would close the journal under the undoing.
        self._is_given_back = True
        self._close_journal()

    def forget(self) -> None:
        """After `give_back` of a failed attempt: the next one starts with nothing."""
        self.machine = None
        self.network = None
        self._files = None
        self._hooks = None
        self._is_given_back = False

    def _hooks_for(self, bundle: Bundle) -> HostHooks | None:
        if not bundle.spec.get("hooks"):
            return None
        if self._hooks is None:
            from shimv2.host_hooks import HostHooks

            assert self._journal is not None
            directory = self._state_dir.directory
            self._hooks = HostHooks(self._journal, directory, self._log, self._enter)
        return self._hooks

    def _close_journal(self) -> None:
        """End the journal, unless something in it is still to come."""
        if self._journal is None or not self._is_given_back:
            return
        if any(entry.kind in DEFERRED for entry in self._journal.held):
            return
        journal, self._journal = self._journal, None
        must_stay = any(outlasts(entry, self._state_dir.path) for entry in journal.held)
        journal.close()
        if not must_stay:
            for problem in self._state_dir.remove():
                self._log.warning("cleanup", problem=problem)

    def tell_network(self, text: str) -> None:
        """Log what the pod's network does not give the guest, or does not give back."""
        self._log.warning("network", text=text)
