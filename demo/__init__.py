"""Five ways to train one small network on one real data set: `python -m demo --help`."""
