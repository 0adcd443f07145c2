"""A person at a terminal: size, resize, keys, exit status, for run and for exec."""

from __future__ import annotations

import pytest

from tests.harness.ctr import Ctr, Terminal, fresh_id

_SIZE_LOOP = 'while [ "$(stty size)" != "{size}" ]; do :; done; echo "now {size}."\n'


@pytest.mark.smoke
def test_terminal_of_run_has_size_and_sees_resize(ctr: Ctr) -> None:
    container = fresh_id("tty")
    argv = ctr.run_argv(container, ["sh"], ["--rm", "-t"])
    terminal = Terminal(ctr.node, argv, rows=33, columns=101)
    terminal.expect("# ")
    terminal.send("tty; echo out >&2\n")
    terminal.expect("/dev/")
    terminal.send(_SIZE_LOOP.format(size="33 101"))
    terminal.expect("now 33 101.\n")
    terminal.send(_SIZE_LOOP.format(size="44 132"))
    terminal.resize_until(44, 132, "now 44 132.\n")
    terminal.send("echo go; cat\n")
    terminal.expect("\ngo\n")
    terminal.send("typed\n")
    terminal.expect("typed\ntyped\n")
    terminal.send("\x03")
    terminal.expect("# ")
    terminal.send("exit 9\n")
    assert terminal.close() == 9


def test_terminal_of_exec_has_size_and_sees_resize(ctr: Ctr) -> None:
    container = fresh_id("exectty")
    ctr.start(container, "sleep", "1000")
    argv = ["ctr", "task", "exec", "-t", "--exec-id", "shell", container, "sh"]
    terminal = Terminal(ctr.node, argv, rows=20, columns=70)
    terminal.expect("# ")
    terminal.send(_SIZE_LOOP.format(size="20 70"))
    terminal.expect("now 20 70.\n")
    terminal.send(_SIZE_LOOP.format(size="21 71"))
    terminal.resize_until(21, 71, "now 21 71.\n")
    terminal.send("exit 6\n")
    assert terminal.close() == 6
    ctr.remove(container)
