"""Files that outlive the run."""
