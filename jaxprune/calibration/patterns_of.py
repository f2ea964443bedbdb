"""What a structure means for the matrices of a leaf."""

import math

from jaxprune.calibration.parts import Part
from jaxprune.calibration.solvers.pattern import Pattern
from jaxprune.selection.exact import removed_count
from jaxprune.structures.base import Structure


def pattern_of(structure: Structure, per_output: bool, part: Part, name: str) -> Pattern:
    """Return the pattern of a structure on the matrices of a part.

    Args:
      structure: of single entries, N:M groups or blocks.
      per_output: whether each output gives the same number.
      part: the part; `name` is the layer that it is of, for messages.

    Raises:
      ValueError: a structure that is no pattern of a matrix, or one that does not fit this one.
    """
    form, view = part.site.form, part.site.view
    if structure.elementwise:
        return Pattern("elements", per_output)
    if structure.n_of_m is not None:
        n, m, axis = structure.n_of_m
        if form.run % m:
            raise ValueError(
                f"{structure.name} on params[{name!r}]: its product ({part.site.source}) sums over an axis "
                f"of size {form.run}, which {m} does not divide. Leave the leaf out with where=, or choose "
                "another group."
            )
        if axis is not None:
            ndim = 0 if view.axes is None else 1 + max(f.axis for fs in view.axes for f in fs)
            factors = [] if view.axes is None else [f.axis for f in view.axes[form.group_axis] if f.axis >= 0]
            if not factors or axis % ndim != factors[-1]:
                raise ValueError(
                    f"{structure.name} on params[{name!r}]: N:M groups run along the axis that the product "
                    f"sums over{f', {factors[-1]}' if factors else ''}. Leave out axis=."
                )
        return Pattern("nm", per_output, n, m)
    if structure.tiles:
        return Pattern("blocks", per_output, block=_block(structure, part, name))
    raise ValueError(
        f"prune_layers takes elements, nm, blocks and channels, got structure={structure.name}. Pass it to "
        "prune_once(..., stats=stats), and what that returns to reconstruct."
    )


def _block(structure: Structure, part: Part, name: str) -> tuple[int, int]:
    """Return the sides of a block, outputs x inputs."""
    axes, form = part.site.view.axes, part.site.form
    refused = ValueError(
        f"{structure.name} on params[{name!r}]: its blocks do not lie along the last axis of its outputs and "
        f"the last that its product ({part.site.source}) sums over, or do not divide them. Leave the leaf "
        "out with where=."
    )
    if axes is None or any(len([f for f in fs if f.size > 1]) > 1 for fs in axes):
        raise refused
    kernel_axis = {f.axis: n for n, fs in enumerate(axes) for f in fs if f.axis >= 0}
    in_layer = sorted(kernel_axis)
    free = [n for n in range(len(axes)) if n not in (*form.summed, *form.batch_axes)]
    sides = {"out": 1, "in": 1}
    for axis, side in structure.tiles.items():
        if not -len(in_layer) <= axis < len(in_layer):
            raise refused
        place = kernel_axis[in_layer[axis]]
        size = math.prod(f.size for f in axes[place])
        which = "in" if place == form.group_axis else "out" if free and place == free[-1] else ""
        if not which or size % side:
            raise refused
        sides[which] = side
    return sides["out"], sides["in"]


def count_of(sparsity: float, pattern: Pattern, part: Part, structure: Structure, name: str) -> int:
    """Return how many units of each matrix, or of each of its outputs, a sparsity removes.

    Raises:
      ValueError: N:M sparsity other than all or no groups.
    """
    form = part.site.form
    outputs = 1 if pattern.per_output else form.outputs // pattern.sides[0]
    units = outputs * (form.inputs // pattern.sides[1])
    if pattern.kind == "nm":
        full = 1 - pattern.n / pattern.m
        if sparsity and abs(sparsity - full) > 1e-9:
            raise ValueError(
                f"{structure.name} prunes {full:g} of params[{name!r}], got sparsity={sparsity:g}: leave out "
                "sparsity=, or pass 0 to leave a layer dense."
            )
        return units if sparsity else 0
    # At least one unit stays, so that no layer is cut.
    return min(removed_count(sparsity, units), units - 1)
