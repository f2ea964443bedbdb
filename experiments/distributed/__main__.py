"""`python -m experiments.distributed`."""

from experiments.distributed.study import Config, main

__all__ = ["Config", "main"]

if __name__ == "__main__":
    main()
