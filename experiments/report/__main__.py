"""`python -m experiments.report`."""

from experiments.report.command import main

if __name__ == "__main__":
    main()
