"""Benchmarks of policy servers."""
