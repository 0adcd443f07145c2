"""The shim: composition root. Everything that containerd meets lives here; nobody imports it."""
