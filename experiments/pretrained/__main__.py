"""`python -m experiments.pretrained`."""

from experiments.pretrained.study import Config, main, run

__all__ = ["Config", "main", "run"]

if __name__ == "__main__":
    main()
