"""`python -m experiments.distributed`."""

from experiments.distributed.study import Config, main, train

__all__ = ["Config", "main", "train"]

if __name__ == "__main__":
    main()
