"""What went wrong with a sandbox, told so that its user can act.

    creating the sandbox failed after 12.3 s of 45 s while waiting for the agent: <error>. The VM:
    <exit>. Likely cause: <cause>; <fix>. Console: <last lines>

The text fits into a ttrpc status (2 KiB). The whole report is kept as one
JSON file in /run/kata-reports (root only, the newest 32).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shimv2.errors import MAX_MESSAGE_BYTES, ShimError, clip
from shimv2.state_dir import REPORTS_ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_REPORTS = 32
WAITING = "waiting for the agent"
"""How the phase begins in which a silent guest is a cause of its own."""

_CONSOLE_LINES_IN_TEXT = 6
_TELLING_LINES_IN_TEXT = 3
_MAX_REPORT_BYTES = 64 << 10
_MAX_CONSOLE_LINES = 200


class KnownCause(NamedTuple):
    """When one of `signs` is in the console, the VMM's exit or its last words: why, what helps."""

    signs: tuple[str, ...]
    cause: str
    fix: str


# Foreign text is all there is to go by here; most specific first.
KNOWN_CAUSES: tuple[KnownCause, ...] = (
    KnownCause(
        ("Unable to mount root fs", "No working init found", "Failed to execute /init"),
        "the initrd is not one of ours, or is damaged",
        "rebuild the guest image and check `initrd` in the configuration",
    ),
    KnownCause(
        ("Invalid module format", "invalid module format", "disagrees about version of symbol"),
        "kernel and modules in the initrd are not of one build",
        "rebuild kernel and initrd together (`make guest`)",
    ),
    KnownCause(
        ("Out of memory: Killed process", "Out of memory and no killable processes"),
        "the guest ran out of memory",
        "raise the container's memory limit, or `default_memory`",
    ),
    KnownCause(
        ("Could not access KVM kernel module", "failed to initialize kvm"),
        "/dev/kvm can't be used here",
        'load the kvm module and check the rights on /dev/kvm, or set `accelerator = "tcg"`',
    ),
    KnownCause(
        ("cannot set up guest memory", "Cannot allocate memory"),
        "the host has not enough free memory for the VM",
        "lower `default_memory` or the pod's memory request",
    ),
    KnownCause(
        ("No space left on device",),
        "a file system on the host is full",
        "free space under /run and in containerd's root directory",
    ),
    KnownCause(
        ("virtiofsd", "Failed to write msg. Wrote", "vhost-user: Failed to read"),
        "the file-sharing daemon ended",
        "look for its exit in the shim's log; the usual cause is too low an RLIMIT_NOFILE",
    ),
    KnownCause(
        ("Kernel panic",),
        "the guest's kernel panicked",
        "the console lines say where; a custom `kernel` or `kernel_params` is the usual cause",
    ),
    KnownCause(
        ("vhost-device-vsock was killed", "vhost-device-vsock exited"),
        "the daemon that carries the guest's vsock ended",
        "look for its last lines in the shim's log and for `oom-kill` in the host's kernel log",
    ),
    KnownCause(
        ("SIGKILL", "signal 9"),
        "something killed the VMM; on a machine short of memory that is the OOM killer",
        "look for `oom-kill` in the host's kernel log and raise the pod's memory limit",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """One failure. `vm_exit` and `console_tail` are empty when no VM was involved."""

    sandbox_id: str
    phase: str
    error: str
    elapsed_s: float
    deadline_s: float | None = None
    passed_limit: str = ""  # the name of the limit that ended it, if one did
    vm_exit: str = ""
    console_tail: Sequence[str] = ()
    stderr_tail: Sequence[str] = ()
    hint: str = ""

    @property
    def advice(self) -> str:
        """The hint given, or what the table of known causes says; empty if nothing matches."""
        if self.hint:
            return self.hint
        words = "\n".join([self.error, self.vm_exit, *self.stderr_tail, *self.console_tail])
        for known in KNOWN_CAUSES:
            if any(sign in words for sign in known.signs):
                return f"{known.cause}; {known.fix}"
        if self.passed_limit and self.phase.startswith(WAITING) and not self.vm_exit:
            return self._advice_on_silence()
        return ""

    def _advice_on_silence(self) -> str:
        if not self.console_tail:
            return (
                "the guest printed nothing: its kernel did not start; check that `kernel` is a "
                'vmlinux that boots by PVH, and try `accelerator = "tcg"`'
            )
        return (
            "the guest's kernel runs but its agent did not answer; a slow machine needs more "
            f"time ({self.passed_limit}), otherwise the console lines say why"
        )

    def text(self) -> str:
        """Return the report as one paragraph of at most 2 KiB."""
        limit = f" of {self.deadline_s:g} s" if self.deadline_s is not None else ""
        parts = [f"{self.phase} failed after {self.elapsed_s:.1f} s{limit}: {self.error}"]
        if self.vm_exit and self.vm_exit not in self.error:
            parts.append(f"the VM: {self.vm_exit}")
        if self.stderr_tail:
            parts.append("the VMM said: " + " | ".join(self.stderr_tail[-3:]))
        if self.console_tail:
            parts.append("console: " + " | ".join(_telling_lines(self.console_tail)))
        advice = self.advice
        tail = f"; likely cause: {advice}" if advice else ""
        body = clip("; ".join(parts), MAX_MESSAGE_BYTES - len(tail.encode()))
        return body + tail

    def save(self, root: str = REPORTS_ROOT) -> str | None:
        """Keep the whole report as a file and return its path; None if it could not be kept.

        Never raises: a report must not hide the failure it is about.
        """
        try:
            os.makedirs(root, mode=0o700, exist_ok=True)
            os.chmod(root, 0o700)
            _forget_oldest(root)
            path = f"{root}/{self.sandbox_id[:76]}-{time.time_ns() // 1_000_000}.json"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self._json())
        except OSError:
            return None
        return path

    def _json(self) -> bytes:
        record: dict[str, object] = {
            "sandbox_id": self.sandbox_id,
            "time": time.time(),
            "phase": self.phase,
            "error": self.error,
            "elapsed_s": round(self.elapsed_s, 3),
            "deadline_s": self.deadline_s,
            "vm_exit": self.vm_exit,
            "advice": self.advice,
            "stderr": list(self.stderr_tail),
            "console": list(self.console_tail)[-_MAX_CONSOLE_LINES:],
        }
        data = json.dumps(record, indent=1).encode()
        if len(data) > _MAX_REPORT_BYTES:
            record["console"] = [line[:120] for line in list(self.console_tail)[-40:]]
            record["stderr"] = [line[:120] for line in list(self.stderr_tail)[-40:]]
            record["error"] = self.error[:8192]
            data = json.dumps(record, indent=1).encode()
        return data


def _telling_lines(console: Sequence[str]) -> list[str]:
    """Pick what goes into the text: lines that a cause is known by, and then the last ones.

    A panicking kernel says why first and prints its stack after it.
    """
    lines = [line.strip() for line in console if line.strip()]
    signs = [sign for known in KNOWN_CAUSES for sign in known.signs]
    telling = [line for line in lines if any(sign in line for sign in signs)]
    chosen = telling[:_TELLING_LINES_IN_TEXT]
    last = [line for line in lines[-_CONSOLE_LINES_IN_TEXT:] if line not in chosen]
    return chosen + last[len(chosen) :] if chosen else last


class SandboxFailed(ShimError):
    """A sandbox failed; the text is the report's, the code the original error's."""

    def __init__(self, report: FailureReport, code: int) -> None:
        super().__init__(report.text())
        self.report = report
        self.code = code


def _forget_oldest(root: str) -> None:
    """Leave room for one more of `MAX_REPORTS`; the oldest go."""
    names = [name for name in os.listdir(root) if name.endswith(".json")]
    if len(names) < MAX_REPORTS:
        return
    by_age = sorted(names, key=lambda name: os.lstat(f"{root}/{name}").st_mtime_ns)
    for name in by_age[: len(names) - MAX_REPORTS + 1]:
        os.unlink(f"{root}/{name}")
