"""Names for features."""
