"""Four losses, one small network, one real data set: `python -m demo --help`."""
