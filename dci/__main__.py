"""`python -m dci` is the command `dci`."""

from dci.cli.main import main

if __name__ == "__main__":
    main()
