"""`make bench`: measures the figures the project promises, each beside its peer of the same run.

One figure or a few that belong together are one function, in the module named after the subject.
`python -m tests.bench` runs them, prints one table and writes build/bench/bench.json and bench.svg.
"""
