"""`python -m experiments.channel_pruning`."""

from experiments.channel_pruning.study import Config, main

__all__ = ["Config", "main"]

if __name__ == "__main__":
    main()
