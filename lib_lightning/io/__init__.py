"""Files of a run: what they are called, what is in them, and how they are read and written."""
