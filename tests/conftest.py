"""Pytest wiring shared by every tier: runs coroutine tests under trio.

A coroutine test runs in `trio.run`. When it takes the fixture `autojump_clock`, time is trio's mock
clock with immediate jumps, so that deadlines are tested without waiting for them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import hypothesis
import pytest
import trio
import trio.testing

from tests.harness import vmm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


# Real time without an event after which there is none to come. A jump without it overtook what the
# kernel was about to tell on a busy machine.
_QUIET_S = 0.002


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=_QUIET_S)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the VMM under test can't do, and what needs a KVM where there is none."""
    for marker in item.iter_markers("needs"):
        for ability in marker.args:
            if why := vmm.lacks(ability):
                pytest.skip(why)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    clock = arguments.get("autojump_clock")

    async def main() -> None:
        test: Callable[..., Awaitable[None]] = function
        await test(**arguments)

    trio.run(main, clock=clock, strict_exception_groups=True)
    return True
