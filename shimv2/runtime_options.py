"""The runtime options of containerd's configuration: they come with a request or with `start`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shimv2.errors import InvalidArgument
from shimv2.pb import runtime_options_pb2
from ttrpc.pb import well_known_pb2

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any

OPTIONS_TYPE: Final = "runtimeoptions.v1.Options"


def config_path(options: Any) -> str | None:
    """The configuration file that the runtime options name; options of other kinds mean nothing.

    Raises:
        InvalidArgument: what says that it is of our kind is not.
    """
    if options.type_url.rpartition("/")[2] != OPTIONS_TYPE:
        return None
    try:
        return runtime_options_pb2.Options.FromString(options.value).config_path or None
    except Exception as exc:
        raise InvalidArgument(f"the runtime options are no {OPTIONS_TYPE}") from exc


def config_path_of_start(data: bytes) -> str | None:
    """The same for an encoded Any, as `start` was given it.

    Raises:
        InvalidArgument: the bytes are none.
    """
    try:
        options = well_known_pb2.Any.FromString(data)
    except Exception as exc:
        raise InvalidArgument("what `start` was given on its standard input is no Any") from exc
    return config_path(options)
