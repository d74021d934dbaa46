"""Benchmarks, one command each; every result goes to `docs/results/` as JSON in one envelope, with its figure."""
