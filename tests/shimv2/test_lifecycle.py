"""The lifecycle table: every combination has an answer, and the answers are runc's."""

from __future__ import annotations

import itertools

import pytest
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from shimv2.errors import FailedPrecondition, NotFound
from shimv2.lifecycle import Allowed, Later, NoOp, Operation, Refused, Role, State, verdict

EVERY = list(itertools.product(Role, Operation, State))


@pytest.mark.parametrize(("role", "operation", "state"), EVERY)
def test_every_combination_has_an_answer(role: Role, operation: Operation, state: State) -> None:
    answer = verdict(role, operation, state)
    assert isinstance(answer, Allowed | NoOp | Later | Refused)
    if isinstance(answer, Refused):
        assert answer.text
        assert answer.text == answer.text.strip().rstrip(".")


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", set(State) - {State.CREATED})
def test_start_is_for_created_processes_only(role: Role, state: State) -> None:
    assert not isinstance(verdict(role, Operation.START, state), Allowed)
    assert isinstance(verdict(role, Operation.START, State.CREATED), Allowed)


@pytest.mark.parametrize("role", Role)
def test_delete_is_refused_while_a_process_runs_in_runcs_words(role: Role) -> None:
    answer = verdict(role, Operation.DELETE, State.RUNNING)
    assert answer == Refused(FailedPrecondition, "cannot delete a running process")


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", [State.CREATED, State.STOPPED])
def test_delete_is_allowed_before_and_after_a_process_runs(role: Role, state: State) -> None:
    assert verdict(role, Operation.DELETE, state) == Allowed()


@pytest.mark.parametrize("state", [State.CREATING, State.STARTING, State.DELETING])
def test_delete_waits_for_a_change_under_way(state: State) -> None:
    assert verdict(Role.INIT, Operation.DELETE, state) == Later()


@pytest.mark.parametrize("role", Role)
def test_kill_of_a_finished_process_is_not_found(role: Role) -> None:
    answer = verdict(role, Operation.KILL, State.STOPPED)
    assert answer == Refused(NotFound, "process already finished")


def test_kill_of_an_exec_that_never_started_is_refused() -> None:
    answer = verdict(Role.EXEC, Operation.KILL, State.CREATED)
    assert answer == Refused(FailedPrecondition, "process not created")


@pytest.mark.parametrize(
    "state",
    [State.CREATING, State.CREATED, State.STARTING, State.RUNNING, State.PAUSED],
)
def test_a_container_can_be_killed_at_any_time_of_its_life(state: State) -> None:
    assert verdict(Role.INIT, Operation.KILL, state) == Allowed()


@pytest.mark.parametrize("state", [State.PAUSED, State.STOPPED])
def test_exec_in_a_container_that_does_not_run_is_refused(state: State) -> None:
    answer = verdict(Role.INIT, Operation.EXEC, state)
    assert answer == Refused(FailedPrecondition, f"cannot exec in a {state.value} container")


@pytest.mark.parametrize("role", Role)
def test_closing_the_input_of_a_stopped_process_does_nothing(role: Role) -> None:
    assert verdict(role, Operation.CLOSE_IO, State.STOPPED) == NoOp()


def test_execs_cannot_be_paused() -> None:
    assert isinstance(verdict(Role.EXEC, Operation.PAUSE, State.RUNNING), Refused)


class LifecycleMachine(RuleBasedStateMachine):
    """A container that does what the table allows never leaves the drawn paths."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State.CREATED
        self.has_run = False

    def allowed(self, operation: Operation) -> bool:
        return verdict(Role.INIT, operation, self.state) == Allowed()

    @rule()
    def start(self) -> None:
        if self.allowed(Operation.START):
            assert not self.has_run
            self.has_run = True
            self.state = State.RUNNING

    @rule()
    def pause(self) -> None:
        if self.allowed(Operation.PAUSE):
            assert self.state is State.RUNNING
            self.state = State.PAUSED

    @rule()
    def resume(self) -> None:
        if self.allowed(Operation.RESUME):
            assert self.state is State.PAUSED
            self.state = State.RUNNING

    @precondition(lambda self: self.state is not State.STOPPED)
    @rule()
    def exit(self) -> None:
        self.state = State.STOPPED

    @rule()
    def delete(self) -> None:
        if self.allowed(Operation.DELETE):
            assert self.state in (State.CREATED, State.STOPPED)
            self.__init__()  # type: ignore[misc]  # its id is free again

    @rule()
    def kill_then_gone(self) -> None:
        answer = verdict(Role.INIT, Operation.KILL, self.state)
        assert (answer == Allowed()) == (self.state is not State.STOPPED)


TestLifecycleMachine = LifecycleMachine.TestCase
