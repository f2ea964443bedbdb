"""What became of each kernel, as a table."""

import textwrap
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A kernel.

    Attributes:
      path: its param; with `#2` and so on if the param is several kernels.
      shape: the param's shape.
      sparsity: the fraction of its mask that is False.
      form: how it is stored: "dense", "csr", "padded", "blocks" or "compact".
      dense: bytes of the dense kernel.
      stored: bytes in this form, indices included.
      gain: how many times faster than the dense product it was, alone; of the best form if it stays
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
      rows: a `Row` for each param that its mask prunes.
      gain: how many times faster than dense the whole call was; None if it was not measured, 1.0 if it
        was, and stays dense.
      rounds: how often each call was timed.
      platform: where.
    """

    rows: tuple[Row, ...]
    gain: float | None
    rounds: int
    platform: str

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values, for JSON."""
        return self._asdict() | {"rows": [row._asdict() for row in self.rows]}

    def __str__(self) -> str:
        lines = [
            f"{'kernel':<24}{'shape':<14}{'sparsity':>9} {'form':<8}{'stored':>9}{'of dense':>9}{'x':>6}"
        ]
        for row in self.rows:
            gain = "-" if row.gain is None else f"{row.gain:.2f}"
            part = f"{row.stored / row.dense:.0%}" if row.dense else "-"
            lines.append(
                f"{_short(row.path, 23):<24}{_short('x'.join(map(str, row.shape)), 13):<14}"
                f"{row.sparsity:>9.2%} {row.form:<8}{_bytes(row.stored):>9}{part:>9}{gain:>6}"
            )
        for row in self.rows:
            text = f"{row.path}: {row.form}: {row.why}"
            lines += textwrap.wrap(text, 78, subsequent_indent="  ")
        stored, dense = (sum(getattr(row, name) for row in self.rows) for name in ("stored", "dense"))
        lines.append(f"stored: {_bytes(stored)} of {_bytes(dense)}")
        if self.gain is not None:
            what = f"{self.gain:.2f} x faster than dense" if self.gain != 1 else "dense, nothing is faster"
            lines.append(f"the whole call: {what} (medians of {self.rounds}, {self.platform})")
        return "\n".join(lines)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[-(width - 3) :]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
