"""What each loss gains on real data, by the number that people are judged by."""
