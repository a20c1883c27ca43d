"""Benchmarks, run from a checkout: `python -m benchmarks.resnet18`. Each writes a JSON file with its provenance."""
