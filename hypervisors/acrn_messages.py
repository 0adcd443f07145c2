"""What acrn-dm's command monitor sends: JSON objects, one behind the other. Pure.

Its guest may have taken it over, so what is held is bounded.
Source: ACRN's devicemodel/core/cmd_monitor/command_handler.c, devicemodel/core/vm_event.c.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .bounded_json import JsonValue

# Source: devicemodel/core/cmd_monitor/socket.h CLIENT_BUF_LEN.
MAX_MESSAGE_BYTES: Final = 4096
# Events. Source: hypervisor/include/public/acrn_common.h.
POWERED_OFF: Final = 1
TRIPLE_FAULT: Final = 2


class MessageStream:
    """Takes JSON objects out of bytes that arrive at any split. Pure."""

    def __init__(self) -> None:
        self._held = b""
        self._decoder = json.JSONDecoder()

    def feed(self, data: bytes) -> list[dict[str, JsonValue]]:
        """Return the objects that are complete.

        Raises:
            ValueError: what is held can't become one.
        """
        text = (self._held + data).decode("latin-1").lstrip()
        found: list[dict[str, JsonValue]] = []
        while text:
            try:
                value, end = self._decoder.raw_decode(text)
            except (ValueError, RecursionError) as error:
                if not text.startswith("{") or len(text) > MAX_MESSAGE_BYTES:
                    raise ValueError("no JSON object") from error
                break
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            found.append(value)
            text = text[end:].lstrip()
        self._held = text.encode("latin-1")
        return found
