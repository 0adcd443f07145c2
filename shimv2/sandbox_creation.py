"""Makes a sandbox's containers, and for the first of them the virtual machine. Undone whole if not.

    first ──> configuration ──> machine booted, its container prepared meanwhile ──> container made
    later ──> waits until the machine is up ──────────────────────────────────────────────┘

Whatever ends a first request early (deadline, Kill, a client that leaves, a part that dies) undoes
it all, and another first may follow. How the end goes is `sandbox_end`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from agent_proto.errors import AgentUnreachable
from shimv2.boot import Machine, check_machine
from shimv2.bundle import Bundle, ContainerKind
from shimv2.errors import FailedPrecondition, ShimError, Unavailable, representative
from shimv2.guest_requests import container_request
from shimv2.lifecycle import State
from shimv2.machine_plan import plan_machine
from shimv2.post_mortem import Scene, failed, late, scene_of, users_mistake
from shimv2.sandbox_resources import SandboxResources
from shimv2.timeline import Timeline

if TYPE_CHECKING:
    from shimv2.bootstrap import ShimInvocation
    from shimv2.config import RuntimeConfig
    from shimv2.container import Container, Log
    from shimv2.container_files import Prepared
    from shimv2.host_resources import HostResources, Parts
    from shimv2.jobs import Jobs
    from shimv2.mounts import RootfsMount
    from shimv2.rootfs import GuestPaths
    from shimv2.sandbox_end import SandboxEnd
    from shimv2.state_dir import StateDir
    from shimv2.stdio import StdioPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """A request to create a container, understood."""

    bundle: Bundle
    stdio: StdioPlan
    rootfs: Sequence[RootfsMount]
    config_path: str | None
    limit_s: float  # what the client waits; inf when it didn't say


class SandboxCreation:
    """What is made in `host`, for the containers in `containers`; `end` takes it down."""

    def __init__(
        self,
        invocation: ShimInvocation,
        state_dir: StateDir,
        parts: Parts,
        host: HostResources,
        end: SandboxEnd,
        containers: Mapping[str, Container],
        jobs: Jobs,
        log: Log,
    ) -> None:
        self.timeline = Timeline()
        self._invocation = invocation
        self._state_dir = state_dir
        self._parts = parts
        self._host = host
        self._end = end
        self._containers = containers
        self._jobs = jobs
        self._log = log
        self._config: RuntimeConfig | None = None
        self._resources: SandboxResources | None = None
        self._is_founding = False  # a machine is being made, or is about to be
        self._is_up = trio.Event()
        self._scene: Scene | None = None  # of a creation that was cut short

    @property
    def resources(self) -> SandboxResources:
        """What the containers may use, from the first one's Create on."""
        if self._resources is None:
            raise FailedPrecondition(f"sandbox {self._invocation.sandbox_id} has no VM")
        return self._resources

    def leave(self, container: Container) -> None:
        """Take a container's limits out of the machine's size."""
        if self.resources.leave(container.id):
            self._jobs.start(self.resources.shrink)

    def neighbours(self) -> list[Bundle]:
        """What runs, or is ready to."""
        alive = (State.CREATED, State.RUNNING)
        return [one.bundle for one in self._containers.values() if one.init.state in alive]

    async def create(self, container: Container | None, creation: Creation) -> None:
        """Create within the client's limit and the configuration's; or be cancelled by `kill`.

        Without a container, the machine alone.

        Raises:
            ShimError: with phase, time and what the guest last said.
        """
        limit_s = min(creation.limit_s, self._configure(creation).agent.create_container_timeout_s)
        with trio.move_on_after(limit_s) as scope:
            if container is not None:
                container.creation = scope
            await self._create(container, creation)
        if scope.cancelled_caught:
            raise self._cut_short(container, creation, limit_s)

    def _configure(self, creation: Creation) -> RuntimeConfig:
        """The sandbox's configuration, read at its first container."""
        if self._config is None:
            config = self._parts.load_config(creation.config_path, creation.bundle.annotations)
            for warning in config.warnings:
                self._log.warning("configuration", text=warning)
            self._config = config
        return self._config

    async def _create(self, container: Container | None, creation: Creation) -> None:
        bundle = creation.bundle
        if self._end.ended.is_set():
            raise Unavailable(self._end.reason)
        if container is not None and bundle.kind is ContainerKind.MEMBER:
            await self._join(container, creation)
        elif self._host.machine is not None or self._is_founding:
            raise FailedPrecondition(
                f"sandbox {self._invocation.sandbox_id} has its VM already; "
                f"container {bundle.container_id} is of kind {bundle.kind.value!r}"
            )
        else:
            self._is_founding = True
            try:
                await self._found(container, creation)
            finally:
                self._is_founding = False

    async def _found(self, container: Container | None, creation: Creation) -> None:
        """Boot the VM, and prepare the container meanwhile, if it has one of its own."""
        bundle, config = creation.bundle, self._configure(creation)
        timeline = self.timeline = Timeline()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._take_down_shielded)
            self._resources = SandboxResources(config, self._log, self._host.cgroup.limit)
            machine = await self._prepare_machine(bundle, config)
            timeline.enter("preparing the container's root filesystem")
            prepared: list[Prepared] = []

            async def prepare(nursery: trio.Nursery) -> None:
                # The guest's kernel takes a second to come up; until it does, this costs nothing.
                await machine.launched.wait()
                if self._host.network is not None:
                    self._host.network.vmm_started()
                    nursery.start_soon(self._host.network.wire)
                if container is not None:
                    await container.open_stdio(container.init)
                    prepared.append(await self._host.files.prepare(bundle, creation.rootfs))
                    timeline.mark("rootfs")

            if container is not None:
                undo.push_async_callback(self._close_stdio, container)
            timeline.mark("prepared")
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(prepare, nursery)
                    await machine.boot(partial(self._host.open_network, bundle, config))
                self._resources.running(machine)
                timeline.enter("setting up the sandbox in the guest")
                await self._host.set_up_guest(self._end.agent, bundle, config, timeline)
                await self._host.run_creation_hooks(bundle)
                if container is not None:
                    paths = await self._host.hand_over(prepared[0])
                    timeline.enter("creating the container in the guest")
                    await self._create_in_guest(container, paths)
            except Exception as exc:
                raise await self._explained(exc) from exc
            except BaseException:
                self._scene = self._look()
                raise
            timeline.mark("created")
            undo.pop_all()
        self._is_up.set()
        if not self._end.ended.is_set():
            self._host.start_followers(self._jobs.start, self._end.agent, config)

    async def _join(self, container: Container, creation: Creation) -> None:
        """Add a container to the VM that is there, or is about to be."""
        if self._host.machine is None:
            raise FailedPrecondition(
                f"container {container.id} belongs to sandbox {creation.bundle.sandbox_id}, "
                "which has no VM"
            )
        await self._wait_up()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._poststop_shielded, container)
            undo.push_async_callback(self._close_stdio, container)
            await container.open_stdio(container.init)
            await self._host.run_creation_hooks(container.bundle)
            undo.push_async_callback(self._host.remove_files, container.id)
            prepared = await self._host.files.prepare(container.bundle, creation.rootfs)
            paths = await self._host.hand_over(prepared)
            undo.callback(self.leave, container)
            await self.resources.join(container.bundle)
            undo.push_async_callback(self._end.remove_in_guest, container)
            await self._create_in_guest(container, paths)
            undo.pop_all()

    async def _wait_up(self) -> None:
        """Wait for the boot that another request is at."""
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self._end.ended.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            await self._is_up.wait()
            nursery.cancel_scope.cancel()
        if self._end.ended.is_set() or not self._is_up.is_set():
            raise Unavailable(self._end.reason or "the sandbox could not be created")

    async def _prepare_machine(self, bundle: Bundle, config: RuntimeConfig) -> Machine:
        """Check what the machine is made of; only then take the first things for it."""
        self.timeline.enter("checking what the virtual machine is made of")
        limits = self.resources.begin(bundle)
        machinery = self._parts.machinery(config)
        try:
            plan = plan_machine(config, limits)
            plan = check_machine(self._invocation.sandbox_id, plan, machinery, self._state_dir)
        except Exception as exc:
            raise await self._explained(exc) from exc
        return await self._host.take(
            bundle,
            config,
            plan,
            machinery,
            jobs=self._jobs.nursery,
            timeline=self.timeline,
            on_death=self._end.fail,
        )

    async def _create_in_guest(self, container: Container, paths: GuestPaths) -> None:
        assert self._config is not None
        request = container_request(
            container.bundle,
            paths,
            terminal=container.init.plan.terminal,
            seccomp=not self._config.runtime.disable_guest_seccomp,
            neighbours=self.neighbours(),
        )
        self.resources.adapt(request.OCI.Linux.Resources, container.id)
        await container.create_in_guest(request)

    async def _explained(self, error: Exception) -> Exception:
        """The error as a user can act on it: a mistake of theirs as it is, else a whole report."""
        mistake = users_mistake(error, is_guest_well=not self._end.ended.is_set())
        if mistake is not None:
            return mistake
        if isinstance(representative(error), AgentUnreachable):
            await self._end.explain()
        assert self._config is not None
        return failed(
            self._look(),
            error,
            reason=self._end.reason,
            limit_s=self._config.agent.create_container_timeout_s,
            reports_root=self._parts.reports_root,
        )

    def _look(self) -> Scene:
        return scene_of(self._invocation.sandbox_id, self.timeline, self._host.machine)

    def _cut_short(
        self, container: Container | None, creation: Creation, limit_s: float
    ) -> ShimError:
        if container is not None and container.kill_requested is not None:
            return Unavailable(
                f"container {container.id} was killed by signal {container.kill_requested} "
                f"while {self.timeline.phase}"
            )
        scene = self._scene or self._look()
        is_clients = limit_s == creation.limit_s
        name = "the client's limit" if is_clients else "`create_container_timeout`"
        return late(scene, limit_s=limit_s, limit_name=name, reports_root=self._parts.reports_root)

    async def _poststop_shielded(self, container: Container) -> None:
        with trio.CancelScope(shield=True):  # each hook has a bound
            await self._host.run_poststop(container.id)

    async def _close_stdio(self, container: Container) -> None:
        with trio.CancelScope(shield=True):  # bounded by a logger's graces
            await container.init.drain()

    async def _take_down_shielded(self) -> None:
        with trio.CancelScope(shield=True):  # every step of it has a bound of its own
            await self._end.take_down("the sandbox could not be created")
            await self._host.run_poststop()
        # Nothing is left of the attempt; another may follow.
        self._host.forget()
        self._config = None
        self._end.reset()
