"""Hypothesis without a deadline an example: on a busy machine that measures the others."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
