"""A node with KVM on a machine that has none: see node.py."""
