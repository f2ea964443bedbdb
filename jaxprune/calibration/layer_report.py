"""What `prune_layers` did to each layer."""

from typing import Any, NamedTuple

from jaxprune.tree.tables import csv_table, shorten, text_lines, wrapped


class LayerRow(NamedTuple):
    """One layer, as it was solved.

    Attributes:
      name: the leaf, "mlp/kernel", or one layer of a stacked leaf, "layers/up[2]".
      part: which of several matrices that products read from the leaf; 0 if there is one.
      batch, outputs, inputs: the shape of its matrices.
      sparsity: the fraction of their entries that is pruned.
      masked_error: the relative error of its output, `||Y - X M^T|| / ||Y||` with M the dense weights under
        the mask: what masking alone would leave.
      error: the same with the weights that were solved for, rounded to the leaf's dtype.
      rows: how many rows were seen, of all matrices together.
      damping: what was added to the diagonal of its Gram matrix, a fraction of its mean: the largest of its
        matrices. More than was asked for where that had no factor.
      seconds: how long solving it took.
      note: what was unusual, or nothing.
    """

    name: str
    part: int
    batch: int
    outputs: int
    inputs: int
    sparsity: float
    masked_error: float
    error: float
    rows: float
    damping: float
    seconds: float
    note: str = ""


class LayersReport(NamedTuple):
    """All layers, in the order in which they were solved; printing gives a table.

    Attributes:
      rows: one for each layer.
      reasons: by path, why another leaf was left as it is.
    """

    rows: tuple[LayerRow, ...]
    reasons: dict[str, str]

    def __str__(self) -> str:
        cells = [
            (
                shorten(_label(row), 24),
                f"{f'{row.batch} of ' if row.batch > 1 else ''}{row.inputs}x{row.outputs}",
                f"{100 * row.sparsity:.1f}%",
                f"{row.masked_error:.4f}",
                f"{row.error:.4f}",
                f"{row.rows:g}",
                f"{row.damping:.2g}",
                f"{row.seconds:.1f}",
            )
            for row in self.rows
        ]
        head = ("layer", "in x out", "pruned", "masked", "error", "rows", "damp", "s")
        lines = text_lines("{:<25}{:>12}{:>8}{:>8}{:>8}{:>8}{:>5}{:>5}", head, *cells)
        for row in self.rows:
            lines += wrapped(f"{_label(row)}: {row.note}") if row.note else []
        for path, why in self.reasons.items():
            lines += wrapped(f"{path}: {why}")
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return {"layers": [row._asdict() for row in self.rows], "reasons": dict(self.reasons)}

    def to_csv(self) -> str:
        """Return the layers as CSV, headings first."""
        return csv_table(LayerRow._fields, *self.rows)


def _label(row: LayerRow) -> str:
    return f"{row.name}#{row.part + 1}" if row.part else row.name
