"""`python -m tinkerbell` is the `tinkerbell` command."""

from tinkerbell.cli.main import main

if __name__ == "__main__":
    main()
