"""Products with the Jacobian of a section."""
