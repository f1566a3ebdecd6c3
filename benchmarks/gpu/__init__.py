"""What a training step costs on a CUDA device: `python -m benchmarks.gpu`, or `make gpu`."""
