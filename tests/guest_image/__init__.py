"""Tests of guest/image."""
