"""Tests of packaging/: what is installed, and the demonstration."""
