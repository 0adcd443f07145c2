"""The host's side of a pod's network.

Knows network namespaces, links and taps; nothing of VMs, agents or containers.
"""
