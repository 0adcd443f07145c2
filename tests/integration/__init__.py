"""End-to-end tests: real containerd, real virtual machines, from `ctr` to the exit code."""
