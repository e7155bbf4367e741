"""Benchmarks: `make bench`, `make bench-evaluator`, `make bench-converter`. docs/benchmarks.md describes them."""
