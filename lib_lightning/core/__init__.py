"""The mathematics, on torch alone: cutting a live model, its moments and Jacobians, bases and edges."""
