"""What the end-to-end tests stand on: a private node, a real containerd, images, leak checks."""
