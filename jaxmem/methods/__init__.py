"""Each paper as a composition of blocks; and the baselines."""
