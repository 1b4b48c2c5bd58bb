"""Pictures: the interaction graph as a figure, and its way to the loggers."""
