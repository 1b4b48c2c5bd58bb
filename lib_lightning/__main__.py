"""``python -m lib_lightning`` is the command line."""

from lib_lightning.training.cli import main

if __name__ == "__main__":
    main()
