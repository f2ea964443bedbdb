"""`python -m experiments.one_shot`."""

from experiments.one_shot.study import Config, main, run

__all__ = ["Config", "main", "run"]

if __name__ == "__main__":
    main()
