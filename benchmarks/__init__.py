"""Measurements beside the peers: `python -m benchmarks.memory`, `.speed`, then `.plots`."""
