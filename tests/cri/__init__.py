"""Kubernetes' own tests of a CRI runtime, critest, against this shim and against runc's."""
