"""`python -m experiments.real_models`."""

from experiments.real_models.command import Config, main

__all__ = ["Config", "main"]

if __name__ == "__main__":
    main()
