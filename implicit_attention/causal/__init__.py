"""The causal engine: the exact equilibrium of a causal map, block of rows by block of rows. See README.md."""
