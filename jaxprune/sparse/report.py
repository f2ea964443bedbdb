"""How each kernel is stored, as a table."""

from typing import Any, NamedTuple

from jaxprune.tree.tables import shorten, text_lines, wrapped


class Row(NamedTuple):
    """A kernel.

    Attributes:
      path: its param; with `#2` and so on if the param is several kernels.
      shape: the param's shape.
      sparsity: the fraction of its mask that is False.
      form: how it is stored: "dense", "csr", "windows" or another form that `sparsify` names.
      dense: bytes of the dense kernel, in a scan of the kernels of all steps.
      stored: bytes in this form, indices included.
      gain: how many times as fast as the dense product it was, alone; that of the best form if it stays
        dense; None if it was not measured.
      why: why it has this form.
    """

    path: str
    shape: tuple[int, ...]
    sparsity: float
    form: str
    dense: int
    stored: int
    gain: float | None
    why: str


class SparseReport(NamedTuple):
    """What `sparsify` did; printing it gives a table of at most 80 columns.

    Attributes:
      rows: a `Row` for each param that its mask prunes, and for each kernel of a convolution.
      gain: how many times as fast as dense the whole call was; None if it was not measured, 1.0 if it was
        measured and stays dense.
      rounds: how often each call was timed.
      platform: the platform it was timed on.
    """

    rows: tuple[Row, ...]
    gain: float | None
    rounds: int
    platform: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python values, for JSON."""
        return self._asdict() | {"rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        lines = text_lines(
            "{:<24}{:<14}{:>9} {:<8}{:>9}{:>9}{:>6}",
            ("kernel", "shape", "sparsity", "form", "stored", "of dense", "x"),
            *(
                (
                    shorten(row.path, 23),
                    shorten("x".join(map(str, row.shape)), 13),
                    f"{row.sparsity:.2%}",
                    row.form,
                    _bytes(row.stored),
                    f"{row.stored / row.dense:.0%}" if row.dense else "-",
                    "-" if row.gain is None else f"{row.gain:.2f}",
                )
                for row in self.rows
            ),
        )
        for row in self.rows:
            lines += wrapped(f"{row.path}: {row.form}: {row.why}")
        stored, dense = (sum(getattr(row, name) for row in self.rows) for name in ("stored", "dense"))
        lines.append(f"stored: {_bytes(stored)} of {_bytes(dense)}")
        if self.gain is not None:
            what = f"{self.gain:.2f} x faster than dense" if self.gain != 1 else "dense, nothing is faster"
            lines.append(f"the whole call: {what} (medians of {self.rounds}, {self.platform})")
        return "\n".join(lines)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
