"""Running an unmodified module, and cutting it at node layers."""
