"""The algorithm of the Local Interaction Basis (arXiv 2405.10928); `build.py` has its steps in order."""
