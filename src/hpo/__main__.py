"""`python -m hpo` is the command `hpo`."""

from hpo.cli.app import main

if __name__ == "__main__":
    main()
