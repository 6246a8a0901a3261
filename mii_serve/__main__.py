"""`python -m mii_serve` is the `mii_serve` command."""

from mii_serve.cli import main

if __name__ == "__main__":
    main()
