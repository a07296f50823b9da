"""The causal engine."""
