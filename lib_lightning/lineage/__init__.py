"""Features over time: which of one snapshot are those of the next, and when one of them emerges."""
