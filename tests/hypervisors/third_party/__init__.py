"""A backend as another distribution would bring it, and the VMM that it is for."""
