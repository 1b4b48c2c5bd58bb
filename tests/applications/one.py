"""Runs one application, whose name is the argument, and prints the result as the last line."""

from __future__ import annotations

import json
import sys
import warnings

from tests.applications.running import run

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\nRESULT " + json.dumps(run(sys.argv[1])))
