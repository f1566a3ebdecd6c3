"""Beside the peers: `speed/` on a CPU, `gpu/` on a CUDA device, `quality/` of trained models."""
