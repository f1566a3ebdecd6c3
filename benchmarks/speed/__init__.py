"""Time, memory and accuracy on a CPU: `make bench` runs them all."""
