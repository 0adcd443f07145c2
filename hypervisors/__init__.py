"""Starts and drives virtual machine monitors; knows nothing of containers, agents or containerd."""
