"""Tests of guest/agent: the real program, as a process in namespaces of its own."""
