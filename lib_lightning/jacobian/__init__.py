"""Products with the Jacobian of the map between two neighbouring node layers."""
