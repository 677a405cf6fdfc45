"""Measurements: `python -m benchmarks.<name> --help`. Each prints a table and writes `results/<name>.<device>.json`."""
