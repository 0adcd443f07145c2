"""Speaks to the agent in the guest: how to reach it and what can be asked of it.

Owns no VM and keeps no container state. Everything that comes from the guest is taken for hostile:
bounded before it is read, checked before it is believed. Start at `vsock.dial` and
`client.AgentClient`.
"""
