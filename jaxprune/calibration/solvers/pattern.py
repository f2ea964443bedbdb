"""What a solver may remove from a matrix."""

from typing import Literal, NamedTuple


class Pattern(NamedTuple):
    """What is removed as a whole from a matrix of outputs x inputs, and from where a count takes it.

    Attributes:
      kind: "elements": single entries; "nm": of each m neighbouring inputs of an output all but n; "blocks":
        rectangles that tile the matrix from its corner.
      per_output: whether each output (row) gives the same number; otherwise the matrix gives it as a whole.
      n: how many of m inputs stay, for "nm".
      m: the size of a group, for "nm".
      block: the sides of a block, outputs x inputs, for "blocks".
    """

    kind: Literal["elements", "nm", "blocks"] = "elements"
    per_output: bool = False
    n: int = 0
    m: int = 0
    block: tuple[int, int] = (1, 1)
