"""Rules of the house as tests: imports, sizes, linters, generated files."""
