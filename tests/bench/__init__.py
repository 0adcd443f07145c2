"""`make bench`: the figures of the project, measured and set against a peer in the same run."""
