"""What runs inside the virtual machine: the agent (Rust, `agent/`) and the image builder."""
