"""The paper's algorithm."""
