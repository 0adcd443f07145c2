"""The program `containerd-shim-kata-v2`: finds out what is asked, and runs it.

Only what a command needs is imported, because `start` and `delete` are on containerd's hot paths.
"""

from __future__ import annotations

import posix
import sys

from shimv2 import bootstrap
from shimv2.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str], program: str = "") -> int:
    """Run one command; return the exit status. Text for humans goes to stderr, as one line.

    `program` is the path by which this was executed: a link's name chooses the configuration.
    """
    try:
        return _dispatch(arguments, program)
    except Exception as error:  # the text is what the user of containerd sees, a traceback isn't
        text = str(error) or type(error).__name__
        line = " ".join(f"{bootstrap.RUNTIME_NAME}: {text}".split())
        posix.write(2, line.encode("utf-8", "replace")[:4000])
        return 1


def _dispatch(arguments: Sequence[str], program: str) -> int:
    flags = bootstrap.parse_flags(arguments)
    flags.program = program
    if flags.boolean("info"):
        from shimv2 import info

        return info.print_runtime_info()
    if flags.boolean("version") or flags.boolean("v"):
        from shimv2 import info

        return info.print_version()
    if flags.command == "start":
        from shimv2 import start

        start.run(flags)
    if flags.command == "delete":
        from shimv2 import cleanup

        return cleanup.run(flags)
    if flags.command == "":
        raise InvalidArgument("no command: containerd runs this program with `start` or `delete`")
    raise InvalidArgument(f"unknown command {flags.command!r}: `start` and `delete` are known")


if __name__ == "__main__":
    posix._exit(main(sys.argv[1:], sys.argv[0]))
