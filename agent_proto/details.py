"""What the agent says of itself and its machine, checked and cut to size.

Pure: messages in, plain values out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from agent_proto.errors import AgentMisbehaved, guest_text

if TYPE_CHECKING:
    from agent_proto.pb import agent_pb2, health_pb2

_MAX_NAME: Final = 64
_MAX_NAMES: Final = 64

# x86-64 has memory blocks of 128 MiB to 2 GiB; arm64 from 2 MiB up. Hot-plugged memory is rounded
# up to the block, so a lie costs the host at most the upper bound.
_MIN_BLOCK_BYTES: Final = 1 << 20
_MAX_BLOCK_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class AgentVersion:
    """Versions of the agent's API and program; printable, at most 64 characters."""

    api: str
    agent: str

    @classmethod
    def from_reply(cls, reply: health_pb2.VersionCheckResponse) -> Self:
        """Take the reply's texts, escaped and cut."""
        return cls(_name(reply.grpc_version), _name(reply.agent_version))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDetails:
    """The agent's account of the guest.

    `memory_block_bytes` is a power of two between 1 MiB and 4 GiB, or 0 when the guest has no
    memory hot-plug.
    """

    memory_block_bytes: int
    has_memory_probe: bool
    agent_version: str
    is_init: bool
    device_handlers: tuple[str, ...]
    storage_handlers: tuple[str, ...]
    supports_seccomp: bool
    extra_features: tuple[str, ...]

    @classmethod
    def from_reply(cls, reply: agent_pb2.GuestDetailsResponse) -> Self:
        """Check a reply.

        Raises:
            AgentMisbehaved: a memory block size that no machine has.
        """
        block = reply.mem_block_size_bytes
        if block and not (_MIN_BLOCK_BYTES <= block <= _MAX_BLOCK_BYTES and block.bit_count() == 1):
            raise AgentMisbehaved("GetGuestDetails", f"a memory block of {block} bytes")
        agent = reply.agent_details
        return cls(
            memory_block_bytes=block,
            has_memory_probe=reply.support_mem_hotplug_probe,
            agent_version=_name(agent.version),
            is_init=agent.init_daemon,
            device_handlers=_names(agent.device_handlers),
            storage_handlers=_names(agent.storage_handlers),
            supports_seccomp=agent.supports_seccomp,
            extra_features=_names(agent.extra_features),
        )


def _name(text: str) -> str:
    return guest_text(text, _MAX_NAME)


def _names(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(_name(text) for text, _ in zip(texts, range(_MAX_NAMES), strict=False))
