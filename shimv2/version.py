"""What this build calls itself. Filled in by `make install`; a checkout says so."""

from __future__ import annotations

NAME = "io.containerd.kata.v2"
VERSION = "0.1.0"
COMMIT = "unknown"
