"""Measurements: run one as ``python -m benchmarks.NAME`` from the repository root."""
