"""`python -m mdiff`, the form in which launchers of many processes start the command line."""

from mdiff.cli import main

if __name__ == "__main__":
    main()
