"""Soft ranks in linear time."""
