"""Load tests and side-by-side benchmarks. Each prints its machine, its command and its table."""
