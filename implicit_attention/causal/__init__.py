"""The causal engine: the exact equilibrium of a causal map, one block of rows after another. See README.md."""
