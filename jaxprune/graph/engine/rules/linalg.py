"""Factorisations and solvers: the axes of the matrices are pinned, batch axes are free."""

from jaxprune.graph.engine.axes import AxisGraph
from jaxprune.graph.engine.facts import Facts
from jaxprune.graph.engine.ir import Op
from jaxprune.graph.engine.rules.base import Rule, emit_unchanged, learn_moved, learn_nothing, register_rule

# How many last axes of the first input belong to one problem.
_TRAILING = {
    **dict.fromkeys(("cholesky", "eig", "eigh", "hessenberg", "householder_product", "lu", "qr"), 2),
    **dict.fromkeys(("schur", "svd", "triangular_solve", "tridiagonal"), 2),
    **dict.fromkeys(("lu_pivots_to_permutation", "tridiagonal_solve"), 1),
}


def _batch(op: Op) -> int:
    """Return the number of batch axes: the first axes of every value."""
    return len(op.inputs[0].shape) - _TRAILING[op.name]


def _columns(op: Op) -> int | None:
    """Return the axis of a triangular system that counts right-hand sides, which are solved separately."""
    if op.name != "triangular_solve":
        return None
    return len(op.inputs[1].shape) - (1 if op.params["left_side"] else 2)


def _link(op: Op, graph: AxisGraph) -> None:
    batch, columns, first = _batch(op), _columns(op), op.inputs[0]
    for value in (*op.inputs, *op.outputs):
        for axis in range(batch):
            graph.same(first.axes[axis], value.axes[axis])
    for place, value in enumerate(op.inputs):
        for axis in range(batch, len(value.shape)):
            if place == 1 and axis == columns:
                graph.same(value.axes[axis], op.outputs[0].axes[axis])
            else:
                graph.pin(value.axes[axis], f"{op} reads all of the matrix")


def _flow(op: Op, facts: Facts) -> None:
    columns = _columns(op)
    if columns is None:
        return learn_nothing(op, facts)
    sides, (output,) = op.inputs[1], op.outputs
    axes = [a if a < _batch(op) or a == columns else None for a in range(len(output.shape))]
    return learn_moved(facts, sides, output, axes)


register_rule(*_TRAILING, rule=Rule(_link, _flow, emit_unchanged, conservative="the matrices are kept whole"))
