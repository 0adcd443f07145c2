"""`make bench`: measures the figures the project promises, each beside its peer of the same run.

One figure is one function in one of the modules here. `python -m tests.bench` runs them, prints one
table and writes build/bench/bench.json and build/bench/bench.svg.
"""
