"""``python -m vlft``."""

from vlft.cli.app import main

if __name__ == "__main__":
    main()
