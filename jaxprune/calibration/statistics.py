"""Statistics of what the layers of a network read: `calibrate` and its result."""

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.calibration.batches import Batch, batches_of
from jaxprune.calibration.gathering import Found, gather
from jaxprune.calibration.matrices import UnknownRowsError
from jaxprune.calibration.parts import Part, View, parts_of
from jaxprune.calibration.survey import Site, Survey, survey
from jaxprune.tracing.jaxprs import split_static, trace
from jaxprune.tree.checks import as_integer, check_function, shown
from jaxprune.tree.leaves import array_leaves, describe, is_concrete
from jaxprune.tree.paths import some_of
from jaxprune.tree.tables import shorten, text_lines
from jaxprune.tree.where import check_where, kernels
from jaxprune.typing import Params, Where

What = Literal["squares", "mean", "variance", "rows", "inverse_diagonal"]


class Layer(NamedTuple):
    """The statistics of one layer of one part of a leaf.

    Attributes:
      part: the matrices that products read from the leaf.
      index: the number of the layer along each axis that counts layers.
      rows: (batch,), how many rows were seen, weighted.
      mean: (batch, inputs), the mean row.
      squares: (batch, inputs), the sum over rows of the square of each input.
      gram: (batch, inputs, inputs), the sum over rows of x x^T; None if there are norms alone.
    """

    part: Part
    index: tuple[int, ...]
    rows: jax.Array
    mean: jax.Array
    squares: jax.Array
    gram: jax.Array | None


class _Network:
    """What does not change of a calibrated network; compared by identity, as static data of a pytree."""

    def __init__(
        self,
        parts: dict[str, list[Part]],
        shapes: dict[str, tuple[int, ...]],
        reasons: dict[str, str],
        statistics: str,
        checksums: dict[str, int],
    ):
        self.parts, self.shapes, self.reasons = parts, shapes, reasons
        self.statistics, self.checksums = statistics, checksums


class Statistics:
    """What the products of a network read on some batches, as `calibrate` returns it; printing gives a table.

    A pytree, which may pass through `jit`.
    """

    def __init__(self, network: _Network, sums: dict[str, list[dict[str, Any]]]):
        self._network, self._sums = network, sums

    @property
    def statistics(self) -> str:
        """What they are: "norms" or "gram"."""
        return self._network.statistics

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves that have statistics."""
        return tuple(self._network.parts)

    @property
    def reasons(self) -> dict[str, str]:
        """By path, why another leaf has none."""
        return dict(self._network.reasons)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """By path, the axes of a leaf that count layers."""
        axes = {path: parts[0].matrix.stack_axes for path, parts in self._network.parts.items()}
        return {path: some for path, some in axes.items() if some}

    @property
    def nbytes(self) -> int:
        """The bytes of all statistics."""
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(self._sums))

    @property
    def where(self) -> Where:
        """The predicate of what was calibrated: `where(path, leaf)`."""

        def calibrated(path: str, leaf: Any) -> bool:
            del leaf
            return path in self._network.parts

        return calibrated

    def layers(self, path: str) -> list[Layer]:
        """Return the statistics of a leaf: of each of its parts, for each of its layers.

        Raises:
          ValueError: the leaf has no statistics.
        """
        self._check_path(path)
        made = []
        for part, sums in zip(self._network.parts[path], self._sums[path], strict=True):
            for index in part.layers():
                rows, total = sums["rows"][index], sums["sum"][index]
                mean = total / jnp.where(rows > 0, rows, 1)[:, None]
                gram = sums["gram"][index] if "gram" in sums else None
                squares = sums["squares"][index] if gram is None else jnp.diagonal(gram, axis1=-2, axis2=-1)
                made.append(Layer(part, index, rows, mean, squares, gram))
        return made

    def contracted_axes(self, path: str) -> tuple[int, ...]:
        """Return the axes of a leaf that its products sum over, in ascending order.

        Raises:
          ValueError: the leaf has no statistics, or its products do not sum over whole axes of it.
        """
        self._check_path(path)
        found = {_contracted(part) for part in self._network.parts[path]}
        axes = found.pop()
        if axes is None or found:
            raise ValueError(
                f"the products that read params[{path!r}] do not sum over whole axes of it, so its outputs "
                "are not slices of the leaf. Use scope='layerwise', or prune_layers, which sees its matrices."
            )
        return axes

    def group_axis(self, path: str) -> int:
        """Return the axis of a leaf along which N:M groups run: the last that its products sum over.

        That of a convolution is the axis of its input channels.

        Raises:
          ValueError: as `contracted_axes`.
        """
        self.contracted_axes(path)
        part = self._network.parts[path][0]
        axes = part.site.view.axes
        assert axes is not None
        factors = [factor for factor in axes[part.site.form.group_axis] if factor.axis >= 0]
        return factors[-1].axis if factors else self.contracted_axes(path)[-1]

    def per_entry(self, path: str, what: What, damping: float = 0.01) -> jax.Array:
        """Return a statistic of the input that each entry of a leaf multiplies, of the leaf's shape.

        Args:
          path: the leaf.
          what: "squares", the sum over rows of x^2; "mean"; "variance", the mean of squares minus the square
            of the mean; "rows", how many rows were seen; "inverse_diagonal", the diagonal of the inverse of
            `H + damping * mean(diag H) I`, with H the Gram matrix. Where no row was seen, as by an expert
            without tokens, squares are 1.
          damping: for the inverse.

        Returns:
          float32; entries that no product reads have 0.

        Raises:
          ValueError: the leaf has no statistics; the inverse of statistics without Gram matrices.
        """
        self._check_path(path)
        shape = self._network.shapes[path]
        total: Any = 0
        for number, part in enumerate(self._network.parts[path]):
            axes, layers = part.matrix.stack_axes, part.layers()
            layer_shape = [size for axis, size in enumerate(shape) if axis not in axes]
            values = _statistic(self._sums[path][number], what, damping, path)
            values = values.reshape(len(layers), *values.shape[len(axes) :])

            def spread(value: Any, part: Part = part, layer_shape: Any = layer_shape) -> Any:
                spread, seen = part.matrix.spread(layer_shape, value[:, None, :])
                return jnp.where(seen, spread, 0)

            of_layers = jax.vmap(spread)(values).reshape(*part.site.stack_shape, *layer_shape)
            total = total + jnp.moveaxis(of_layers, range(len(axes)), axes)
        return total

    def map_matrices(self, path: str, leaf: Any, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Apply a function to the matrices that products read from a leaf.

        Args:
          path: the leaf.
          leaf: an array of its shape.
          function: from (batch, outputs, inputs) to the same shape.

        Returns:
          float32 of the leaf's shape: the value at the place of each entry in its matrix, 0 if it has none.

        Raises:
          ValueError: the leaf has no statistics.
        """
        self._check_path(path)
        total: Any = 0
        for part in self._network.parts[path]:
            matrix, axes = part.matrix, part.matrix.stack_axes
            layers = jnp.moveaxis(leaf, axes, range(len(axes)))
            layer_shape = layers.shape[len(axes) :]

            def mapped(layer: jax.Array, matrix: View = matrix, layer_shape: Any = layer_shape) -> jax.Array:
                spread, seen = matrix.spread(layer_shape, function(matrix.array(layer)))
                return jnp.where(seen, spread, 0)

            of_layers = jax.vmap(mapped)(layers.reshape(-1, *layer_shape)).reshape(layers.shape)
            total = total + jnp.moveaxis(of_layers, range(len(axes)), axes)
        return total

    def check_params(self, params: Params) -> None:
        """Check that params are those that were calibrated.

        Raises:
          ValueError: a leaf has another shape, or other values.
        """
        leaves = array_leaves(params)
        for path, shape in self._network.shapes.items():
            if path not in leaves or tuple(leaves[path].shape) != shape:
                got = describe(leaves[path]) if path in leaves else "missing"
                raise ValueError(f"params[{path!r}] is {got}, but it had the shape {shape} in calibrate.")
        changed = [
            p
            for p, c in _checksums({p: leaves[p] for p in self.paths}).items()
            if c != self._network.checksums.get(p, c)
        ]
        if changed:
            raise ValueError(
                f"params changed since calibrate: {some_of(changed)}. What the layers read, and what they "
                "returned, belongs to the params that were calibrated. Pass these, call calibrate again, or "
                "take the statistics for the new params on purpose: stats.for_params(params)."
            )

    def for_params(self, params: Params) -> "Statistics":
        """Return the same statistics for other params of the same shapes, as if these had been calibrated.

        Raises:
          ValueError: a leaf has another shape.
        """
        leaves, network = array_leaves(params), self._network
        other = _Network(network.parts, network.shapes, network.reasons, network.statistics, {})
        Statistics(other, self._sums).check_params(params)
        other.checksums = _checksums({path: leaves[path] for path in self.paths})
        return Statistics(other, self._sums)

    def _check_path(self, path: str) -> None:
        if path not in self._network.parts:
            why = self._network.reasons.get(path, "no product multiplies by it")
            raise ValueError(
                f"params[{path!r}] has no statistics: {why}. The calibrated leaves: {some_of(self.paths)}."
            )

    def __str__(self) -> str:
        rows = [("product", "in x out", "uses", "rows seen", "line")]
        for path, parts in self._network.parts.items():
            for number, part in enumerate(parts):
                form = part.site.form
                shape = f"{form.inputs}x{form.outputs}"
                shape = f"{form.batch} of {shape}" if form.batch > 1 else shape
                seen = np.asarray(self._sums[path][number]["rows"]) if is_concrete(self._sums) else None
                for index in part.layers():
                    name = part.name(index)
                    text = "-" if seen is None else _rows_text(seen[index])
                    rows.append((shorten(name, 31), shape, str(_uses(part)), text, part.site.source[-18:]))
        lines = text_lines("{:<32}{:>12}{:>5}{:>11}  {}", *rows)
        for path, why in self._network.reasons.items():
            lines += wrap(f"{path}: {why}", 80, subsequent_indent="  ", break_on_hyphens=False)
        if self.statistics == "gram":
            lines.append(f"Gram matrices: {_bytes_text(self.nbytes)}")
        return "\n".join(lines)

    __repr__ = __str__


jax.tree_util.register_pytree_node(
    Statistics,
    lambda stats: ((stats._sums,), stats._network),
    lambda network, children: Statistics(network, children[0]),
)


def calibrate(
    apply_fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    statistics: Literal["norms", "gram"] = "norms",
    where: Where | None = None,
    weights: Iterable[Any] | Callable[..., Any] | None = None,
    max_bytes: int = 2**33,
) -> Statistics:
    """Run a network on some batches, and return statistics of what each of its products reads.

    For a product of a leaf W (outputs x inputs) with data X (rows x inputs), as `X W^T`, these are the number
    of rows n, the mean row, and

        norms:  sum over rows of x_j^2, for each input j
        gram:   H = X^T X, inputs x inputs

    summed over all batches, and over all products that read the same matrix. The function is traced, and its
    products are found in the trace, so nothing has to be named or wrapped: `dot_general` in any layout,
    convolutions (grouped, strided, dilated, transposed), ragged products, through `jit`, `remat`, custom
    derivatives, `cond`, `vmap` and `scan`; layers stacked along an axis of a leaf have statistics for each
    layer. A kernel may be a transposed, reshaped, cut, cast or scaled leaf. What cannot be calibrated is
    named with the reason in the table that printing gives.

    Args:
      apply_fn: a pure function `apply_fn(params, *batch)`.
      params: a pytree of arrays.
      batches: a list, or any iterable, of batches. A batch is an array, or a tuple that is unpacked as
        `apply_fn(params, *batch)`; a dict is one input. One program is compiled for each shape of batch.
      statistics: "norms", or "gram" for the methods that need Gram matrices (`reconstruct`,
        `scores.obs_diagonal`).
      where: which leaves to calibrate. By default every leaf that is a kernel of a product with data, except
        the last before the output: those whose outputs meet no other leaf in a product.
      weights: for each batch an array that says how much each row counts, with the shape of the first axes of
        an input: an attention mask (batch, length), with 0 for padding. Or a function that returns it, called
        as `weights(*batch)`.
      max_bytes: the most that Gram matrices may take, 8 GiB by default.

    Returns:
      A `Statistics`: `print(stats)`, and pass it as `stats=`.

    Raises:
      ValueError: no batch; batches of different structure; `where` matches no product; Gram matrices larger
        than `max_bytes`; activations that are NaN or infinite, by layer; rows whose weights cannot be told.
      TypeError: `apply_fn` is not a function, `batches` is one array, params are traced.

    Warns:
      UserWarning: an expert, or a branch, saw no row.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.ones((2, 1))}
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> stats = jp.calibrate(apply_fn, params, [jnp.array([[3.0, 0.0], [4.0, 1.0]])])
      >>> stats.paths, stats.per_entry("a", "squares").tolist()
      (('a',), [[25.0, 25.0], [1.0, 1.0]])
      >>> masks = jp.prune_once(params, jp.scores.wanda, sparsity=0.5, scope="output", stats=stats)
      >>> masks["a"].tolist()
      [[True, True], [False, False]]

    References:
      Frantar and Alistarh, "SparseGPT", ICML 2023, and Sun et al., "Wanda", ICLR 2024, which gather them with
      hooks on named modules.
    """
    if statistics not in ("norms", "gram"):
        raise ValueError(f"statistics must be 'norms' or 'gram', got {shown(statistics)}.")
    check_function(apply_fn, "calibrate", "apply_fn(params, *batch)")
    as_integer(max_bytes, "max_bytes", at_least=0)
    leaves = array_leaves(params)
    if not is_concrete(params):
        raise TypeError(
            "calibrate looks at the values of params, so they cannot be traced: call it outside jit."
        )
    gram = statistics == "gram"
    programs: dict[Any, _Pass] = {}
    network: _Network | None = None
    totals: dict[str, list[dict[str, Any]]] = {}
    for batch in batches_of(batches, weights, "calibrate"):
        if batch.key not in programs:
            made = _Pass(apply_fn, params, batch, where, gram)
            if network is None:
                network = _Network(
                    made.parts, {p: tuple(leaves[p].shape) for p in made.parts}, made.reasons, statistics, {}
                )
                _check_bytes(made.parts, gram, max_bytes)
            programs[batch.key] = made
        assert network is not None
        totals = _added(totals, programs[batch.key](params, batch))
    assert network is not None  # batches_of refuses to be empty
    sums = {path: list(map(_finished, each)) for path, each in totals.items()}
    _check_finite(network.parts, sums)
    _warn_about_no_rows(network.parts, sums)
    network.checksums = _checksums({path: leaves[path] for path in network.parts})
    return Statistics(network, sums)


class _Pass:
    """A compiled pass over batches of one shape."""

    def __init__(
        self, apply_fn: Callable[..., Any], params: Params, batch: Batch, where: Where | None, gram: bool
    ):
        closed, inputs = trace(apply_fn, (params, *batch.inputs))
        found = survey(closed, inputs)
        leaves = array_leaves(params)
        self.parts, self.reasons = chosen_parts(found, leaves, where)
        self.batch = batch
        sites = {use.stack: use for parts in self.parts.values() for part in parts for use in part.uses}
        self.names = list(inputs)

        def run(inputs: dict[str, Any], weights: Any) -> Any:
            found = gather(closed, inputs, sites, weights, gram=gram)
            return {path: [_summed(part, found) for part in parts] for path, parts in self.parts.items()}

        self.run = jax.jit(run)

    def __call__(self, params: Params, batch: Batch) -> dict[str, list[dict[str, Any]]]:
        inputs, _ = split_static((params, *batch.inputs))
        try:
            return self.run({name: inputs[name] for name in self.names}, batch.weights)
        except UnknownRowsError as error:
            raise unknown_rows(*error.args) from None


def unknown_rows(path: str, source: str) -> ValueError:
    """Return the error for a product whose rows cannot be weighted."""
    return ValueError(
        f"the weights of the rows that params[{path!r}] multiplies ({source}) cannot be told: an operation "
        "on the way mixes or reorders rows in a way that is not known. Leave the leaf out with where=, or "
        "leave out weights= and pass batches of one size without padding."
    )


def not_finite(name: str, source: str) -> ValueError:
    """Return the error for a layer whose data is not finite."""
    return ValueError(
        f"the data that params[{name!r}] multiplies ({source}) is NaN or infinite, or its squares overflow. "
        "Check the params, and the batches, on which the network runs."
    )


def _summed(part: Part, found: Found) -> dict[str, Any]:
    uses = [found[use.stack] for use in part.uses]
    total = uses[0]
    for each in uses[1:]:
        total = jax.tree.map(jnp.add, total, each)
    return total


def chosen_parts(
    found: Survey, leaves: Mapping[str, Any], where: Where | None
) -> tuple[dict[str, list[Part]], dict[str, str]]:
    """Return the parts of the leaves that are calibrated, by path, and why others are not.

    Raises:
      ValueError: `where` matches no leaf that is a kernel of a product with data.
    """
    by_path: dict[str, list[Site]] = {}
    for site in found.sites:
        by_path.setdefault(site.path, []).append(site)
    reasons = dict(found.refused)
    if where is not None:
        check_where(where)
    biases = {site.bias.view.path for site in found.sites if site.bias is not None}
    everything_last = all(site.is_last for site in found.sites)
    parts: dict[str, list[Part]] = {}
    for path in leaves:
        sites = by_path.get(path)
        if sites is None:
            if path not in biases and kernels(path, leaves[path]):
                reasons.setdefault(path, "no product multiplies it by data")
        elif where is None and not everything_last and all(site.is_last for site in sites):
            reasons[path] = (
                f"it is the last product before the output ({sites[0].source}); where= takes it in"
            )
        elif where is not None and not where(path, leaves[path]):
            reasons[path] = "where= leaves it out"
        else:
            made = parts_of(sites, leaves[path].shape)
            if isinstance(made, str):
                reasons[path] = made
            else:
                parts[path] = made
    if not parts:
        name = getattr(where, "__name__", where)
        listing = (
            "; ".join(f"{path}: {why}" for path, why in reasons.items()) or "the function multiplies no leaf"
        )
        which = f"where={name} matches" if where is not None else "the function has"
        raise ValueError(f"{which} no product of a leaf with data that can be calibrated. {listing}.")
    return parts, reasons


def _contracted(part: Part) -> tuple[int, ...] | None:
    """Return the axes of the leaf that a part sums over; None if that is not all of some axes."""
    axes, form = part.site.view.axes, part.site.form
    if axes is None:
        return None
    summed = {f.axis for axis in form.summed for f in axes[axis] if f.axis >= 0}
    free = {
        f.axis for n, fs in enumerate(axes) if n not in form.summed for f in fs if f.axis >= 0 and f.size > 1
    }
    return None if summed & free else tuple(sorted(summed))


def _statistic(sums: Mapping[str, Any], what: str, damping: float, path: str) -> jax.Array:
    """Return a statistic of each input, (layers..., batch, inputs)."""
    rows, total = sums["rows"][..., None], sums["sum"]
    seen = jnp.where(rows > 0, rows, 1)
    if what == "rows":
        return jnp.broadcast_to(rows, total.shape)
    if what == "mean":
        return total / seen
    if what == "inverse_diagonal":
        if "gram" not in sums:
            raise ValueError(
                f"the statistics of params[{path!r}] are norms, and this needs Gram matrices: "
                'calibrate(apply_fn, params, batches, statistics="gram").'
            )
        return _inverse_diagonal(sums["gram"], damping)
    squares = jnp.diagonal(sums["gram"], axis1=-2, axis2=-1) if "gram" in sums else sums["squares"]
    if what == "squares":
        return jnp.where(rows > 0, squares, 1)
    if what == "variance":
        return jnp.maximum(squares / seen - (total / seen) ** 2, 0)
    raise ValueError(
        f"what must be 'squares', 'mean', 'variance', 'rows' or 'inverse_diagonal', got {shown(what)}."
    )


def _inverse_diagonal(gram: jax.Array, damping: float) -> jax.Array:
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    mean = jnp.mean(diagonal, axis=-1, keepdims=True)
    scale = jnp.where(mean > 0, mean, 1)
    damped = gram + (damping * scale)[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    lower = jnp.linalg.cholesky(damped)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    half = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return jnp.sum(half * half, axis=-2)


def _added(totals: dict[str, list[dict[str, Any]]], more: dict[str, list[dict[str, Any]]]) -> Any:
    """Add the statistics of a batch; rows on the host, in float64, which counts them exactly."""
    if totals and {path: len(parts) for path, parts in totals.items()} != {
        p: len(q) for p, q in more.items()
    }:
        raise ValueError(
            "batches of different shapes multiply different leaves, so their statistics do not add."
        )
    made: dict[str, list[dict[str, Any]]] = {}
    for path, parts in more.items():
        made[path] = []
        for number, sums in enumerate(parts):
            before = totals[path][number] if totals else None
            added = {k: v if before is None else before[k] + v for k, v in sums.items() if k != "rows"}
            rows = np.asarray(sums["rows"], np.float64)
            made[path].append(added | {"rows": rows if before is None else before["rows"] + rows})
    return made


def _finished(sums: dict[str, Any]) -> dict[str, Any]:
    return sums | {"rows": jnp.asarray(sums["rows"], jnp.float32)}


def gram_bytes(parts: Iterable[Part]) -> int:
    """Return the bytes of the Gram matrices of some parts."""
    return sum(
        4 * math.prod(part.site.stack_shape) * part.site.form.batch * part.site.form.inputs**2
        for part in parts
    )


def _check_bytes(parts: Mapping[str, Sequence[Part]], gram: bool, max_bytes: int) -> None:
    if not gram:
        return
    sizes = {path: gram_bytes(each) for path, each in parts.items()}
    if (total := sum(sizes.values())) <= max_bytes:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    listing = ", ".join(f"{path} {_bytes_text(sizes[path])}" for path in largest)
    raise ValueError(
        f"the Gram matrices would take {_bytes_text(total)} ({listing}{', ...' if len(sizes) > 3 else ''}), "
        f"more than max_bytes={max_bytes}, {_bytes_text(max_bytes)}. Raise max_bytes=, take fewer leaves "
        "with where=, "
        'use statistics="norms", or prune_layers, which holds those of one layer at a time.'
    )


def _check_finite(parts: Mapping[str, Sequence[Part]], sums: Mapping[str, Any]) -> None:
    for path, each in parts.items():
        for part, found in zip(each, sums[path], strict=True):
            layers = part.site.stack_shape
            finite = np.ones(layers, bool)
            for array in found.values():
                of_layer = tuple(range(len(layers), array.ndim))
                finite = finite & np.asarray(jnp.all(jnp.isfinite(array), axis=of_layer))
            for index in np.argwhere(~finite).tolist():
                raise not_finite(part.name(index), part.site.source)


def _warn_about_no_rows(parts: Mapping[str, Sequence[Part]], sums: Mapping[str, Any]) -> None:
    for path, each in parts.items():
        for part, found in zip(each, sums[path], strict=True):
            rows = np.asarray(found["rows"])
            if np.any(rows == 0):
                where = ["[" + ",".join(map(str, i)) + "]" for i in np.argwhere(rows == 0)]
                warnings.warn(
                    f"{some_of(where)} of params[{path!r}] saw no row ({part.site.source}): an expert "
                    "without tokens, or a branch that was not taken. Nothing is known of its inputs, so it "
                    "is pruned by magnitude. More batches may reach it.",
                    stacklevel=3,
                )


def checksum(arrays: Iterable[Any]) -> int:
    """Return a checksum of the arrays' bytes; those that this process cannot read do not count."""
    total = 0
    for array in arrays:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            data: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            total = zlib.crc32(data, total)
    return total


def _checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    return {path: checksum([leaf]) for path, leaf in leaves.items()}


def _uses(part: Part) -> int:
    """Return how often a network multiplies by a layer of a part."""
    return sum(
        math.prod(n for level, n in enumerate(use.steps) if level not in use.view.levels) for use in part.uses
    )


def _rows_text(rows: np.ndarray) -> str:
    low, high = rows.min(), rows.max()
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _bytes_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError
