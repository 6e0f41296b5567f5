"""Benchmarks of hypergrad: run them with `make bench`."""
