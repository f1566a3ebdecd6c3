"""Soft ranks on CUDA devices."""
