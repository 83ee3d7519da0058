"""`python -m sinder_cli` is `sinder`."""

from sinder_cli.cli.main import main

if __name__ == "__main__":
    main()
