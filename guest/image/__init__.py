"""Builds the guest's kernel and initrd from the distribution's packages and our agent.

Standard library only: it runs before the project's Python environment exists.
"""
