"""`python -m experiments.channel_pruning`."""

from experiments.channel_pruning.study import Config, main, run

__all__ = ["Config", "main", "run"]

if __name__ == "__main__":
    main()
