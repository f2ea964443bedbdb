"""`sparsify`: the masked network with products that skip its zeros, and faster convolutions."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.counting.timing import latency
from jaxprune.sparse.choice import Chosen, Kernel, by_measure, by_rule, fastest_set, given
from jaxprune.sparse.forms import FORMS
from jaxprune.sparse.layers import Layer, layer
from jaxprune.sparse.patches import CONV_FORMS
from jaxprune.sparse.replay import Network, SparseParams
from jaxprune.sparse.report import Row, SparseReport
from jaxprune.tracing.dataflow import (
    PRODUCTS,
    ConstValue,
    Product,
    Visitor,
    const_after_scan,
    every_step,
    visit_products,
)
from jaxprune.tracing.jaxprs import inner_jaxprs, nested_jaxprs, place, split_static
from jaxprune.tree.calls import check_call, check_masks_third
from jaxprune.tree.checks import as_integer
from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.masks import apply_masks, like_params, ones_masks
from jaxprune.typing import Masks, Params


class Sparsified(NamedTuple):
    """A network with kernels in other forms, as `sparsify` returns it.

    Attributes:
      apply: `apply(params, *inputs)`, compiled; any batch size, also under `jit` and, over the inputs,
        `vmap`. The forms are those chosen for the example inputs.
      params: the `SparseParams`.
      report: the form of each kernel, why, and its bytes; print it.
    """

    apply: Callable[..., Any]
    params: SparseParams
    report: SparseReport

    @property
    def forms(self) -> dict[str, str]:
        """By path, the form of each kernel; pass it as `choose=` to choose the same forms again."""
        return {row.path: row.form for row in self.report.rows}


def sparsify(
    apply_fn: Callable[..., Any],
    params: Params,
    masks: Masks | None,
    *inputs: Any,
    choose: Literal["measure", "rule"] | Mapping[str, str] = "measure",
    rounds: int = 9,
    **keywords: Any,
) -> Sparsified:
    """Return the masked network, for inference, with kernels stored so that their zeros cost nothing.

    The function is traced. A product with an operand that is made of a masked param alone (the param itself,
    or transposed, reshaped, cast, masked again) is replaced by a product with that kernel in a sparse form:

    - "csr": compressed sparse rows, by `jax.experimental.sparse.BCSR`;
    - "padded": the n-th entries of all rows side by side, rows filled up to the longest; N:M sparsity
      needs no filling;
    - "windows": for one row of inputs or few, entries that read the inputs through windows of 256, so that
      an index takes one byte;
    - "blocks": the square blocks of 64, 32 or 16 rows that are not all zero;
    - "compact": a dense kernel without the rows and columns that are zero;
    - "dense": the masked kernel, zeros included.

    So is each convolution, of any stride, padding and dilation, whether or not its kernel is pruned. It has
    these forms too (the rows of its kernel are output channels; in groups, "padded" only), and more that are
    dense, for kernels that XLA's convolution does not suit:

    - "wide2", "wide4", "wide8": 2, 4 or 8 neighbouring places of the output at once, where the output
      channels alone are fewer than a CPU's vector holds numbers;
    - "shifted": for depthwise convolutions, the data times one number for each place of the window;
    - "product": the data's patches written out, and a product.

    So `sparsify(small.apply, small.params, None, x)` makes a compacted network faster without changing it.

    Calls (`jit`, `remat`, custom derivatives) are entered, and so is the body of a `scan`. The kernels of a
    scan over stacked layers are stored together: each array of their form has one more axis, the first, with
    an entry for each step, and is filled up to the step that needs the most; a form that does not suit all
    steps together is refused. A kernel that every step reads, as in a recurrent network, is stored once.
    Batched products and kernels inside `while` and `cond` stay dense, and the report says so. Sums of
    bfloat16 and float16 are in float32.

    Pruned entries are skipped: where the dense network multiplies a zero by infinity or NaN, and gives NaN,
    this one does not, except where a form is filled up with zeros ("csr" never is). The wide forms multiply
    neighbours by zeros of their own, so that an infinity or NaN in a convolution's data makes NaN of up to 7
    more places along the last axis. The network has no derivative: to train, keep the masked one.

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: a pytree of arrays.
      masks: bool masks like `params`; None if nothing is pruned.
      *inputs: example inputs, of the batch size to be fast for. Bools and strings are static.
      choose: "measure", the default, times the forms of each kernel against its dense product, on the
        machine it is called on and on inputs of the kernel's shape (in a scan: one step of it), then the
        whole call against the dense one, and keeps only what is faster. "rule" decides by density and shape,
        without running anything: by break-even densities measured on one CPU (AMD EPYC, Zen 5, float32),
        which another CPU need not share; on other platforms it takes "compact" alone. A dict from paths to
        forms is your own choice; kernels that it does not name stay dense. A param that is read in several
        ways is several kernels: "path" names all of them, and "path#2" the second.
      rounds: how often "measure" times each form, and each call.
      **keywords: none; those of the function go in by `functools.partial(apply_fn, train=False)`.

    Returns:
      A `Sparsified`. It warns (UserWarning) if no kernel could be stored in another form.

    Raises:
      ValueError: masks that do not mirror `params`; `choose` names a form or a kernel that does not exist,
        or a form that does not suit the kernel.
      TypeError: arguments in another order, a keyword; params or masks are traced; "measure" with inputs
        that have no values.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.arange(1.0, 65.0).reshape(8, 8)}
      >>> masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.9)
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["w"])
      >>> fast = jp.sparsify(apply_fn, params, masks, jnp.ones((2, 8)), choose={"w": "csr"})
      >>> print(fast.report)
      kernel                  shape          sparsity form       stored of dense     x
      w                       8x8              90.62% csr          84 B      33%     -
      w: csr: as chosen
      stored: 84 B of 256 B
      >>> fast.apply(fast.params, jnp.ones((5, 8))).shape
      (5, 8)

    References:
      Gale et al. 2020, "Sparse GPU kernels for deep learning": sparse products beat dense ones above a
      sparsity that depends on the shape and the machine. Here it is measured.
    """
    call = "sparsify(apply_fn, params, masks, *inputs)"
    check_call(call, apply_fn, (params, *inputs), keywords, ("choose", "rounds"))
    if masks is None:
        masks = ones_masks(params)
    check_masks_third(call, params, masks, inputs)
    leaves, dead, masked = _checked(params, masks)
    _check_choose(choose, leaves, rounds)
    arrays = split_static(inputs)[0]
    if choose == "measure" and not is_concrete(arrays):
        raise TypeError(
            "choose='measure' runs the function, so it needs inputs with values; 'rule' does not."
        )
    network = Network(apply_fn, jax.tree.structure(params), leaves)
    kernels, reasons = _kernels(network, inputs, dead)
    taken = {kernel.path for kernel in kernels.values()}
    reasons |= {path: "no product multiplies by it" for path in dead if path not in taken | reasons.keys()}
    if not kernels:
        what = "; ".join(f"{path}: {why}" for path, why in reasons.items()) or "the masks prune nothing"
        warnings.warn(f"sparsify leaves the network dense: {what}.", UserWarning, stacklevel=2)
    gain, chosen = None, {}
    if choose == "measure":
        known: dict[Any, dict[str, float]] = {}
        alone = {key: by_measure(kernel, rounds, known) for key, kernel in kernels.items()}

        def time(sets: Mapping[str, Mapping[str, Chosen]]) -> dict[str, float]:
            calls: dict[str, tuple[Any, ...]] = {"dense": (apply_fn, masked, *inputs)}
            for name, some in sets.items():
                calls[name] = (*network.stored(kernels, some, inputs), *inputs)
            times = latency(calls, max(rounds, 5))
            return {name: times["dense"].median / times[name].median for name in sets}

        ruled = {key: by_rule(kernel) for key, kernel in kernels.items()}
        chosen, gain = fastest_set(alone, ruled, time)
    else:
        for key, kernel in kernels.items():
            chosen[key] = by_rule(kernel) if choose == "rule" else given(kernel, choose)
    if isinstance(choose, Mapping):
        names = {name for kernel in kernels.values() for name in (kernel.path, kernel.label)}
        for path in choose:
            if choose[path] != "dense" and path not in names:
                why = reasons.get(path, "its mask prunes nothing")
                raise ValueError(f"choose has {choose[path]!r} for {path!r}, which has to stay dense: {why}.")
    apply, stored = network.stored(kernels, chosen, inputs)
    rows = []
    for key, kernel in kernels.items():
        row = _row(kernel, leaves, dead, chosen[key])
        more = f"; elsewhere dense: {reasons[kernel.path]}" if kernel.path in reasons else ""
        rows.append(row._replace(why=row.why + more))
    for path, why in reasons.items():
        if path not in taken:
            size = _bytes(leaves[path])
            shape = tuple(leaves[path].shape)
            part = dead.get(path, 0) / max(leaves[path].size, 1)
            rows.append(Row(path, shape, part, "dense", size, size, None, why))
    platform = jax.default_backend()
    return Sparsified(apply, stored, SparseReport(tuple(rows), gain, max(rounds, 5), platform))


def _checked(params: Params, masks: Masks) -> tuple[dict[str, Any], dict[str, int], Params]:
    """Return the masked params by path, the pruned entries of each that has some, and the masked params."""
    traced = TypeError(
        "sparsify looks at the values of params and masks, so they cannot be traced or abstract: "
        "call it outside jit, and pass the .params of what it returns through jit."
    )
    if not is_concrete(params, masks):
        raise traced
    alike = like_params(masks, params)
    tree = apply_masks(jax.tree.map(jnp.asarray, params), alike)
    if not is_concrete(tree):  # inside jit even what is made of constants is traced
        raise traced
    removed = {path: int(np.sum(~np.asarray(m))) for path, m in array_leaves(alike, "masks").items()}
    return array_leaves(tree), {path: count for path, count in removed.items() if count}, tree


def _check_choose(choose: Any, leaves: Mapping[str, Any], rounds: int) -> None:
    as_integer(rounds, "rounds", at_least=1, what="times each contender is timed")
    if isinstance(choose, Mapping):
        for path, form in choose.items():
            if path not in leaves and str(path).rpartition("#")[0] not in leaves:
                raise ValueError(f"choose names {path!r}, but params has the leaves {', '.join(leaves)}.")
            if form not in (forms := (*FORMS, *CONV_FORMS, "dense")):
                raise ValueError(f"choose has {form!r} for {path!r}, but the forms are {', '.join(forms)}.")
    elif not isinstance(choose, str) or choose not in ("measure", "rule"):
        raise ValueError(f"choose is 'measure', 'rule' or a dict from paths to forms, got {choose!r}.")


def _kernels(
    network: Network, inputs: Sequence[Any], dead: Mapping[str, int]
) -> tuple[dict[str, Kernel], dict[str, str]]:
    """Return the kernels that another form may suit, by key, and why others stay dense.

    These are kernels of which something is pruned, and all kernels of convolutions.
    """
    found: dict[str, tuple[str, Layer, ConstValue]] = {}
    reasons: dict[str, str] = {}
    leaves = network.leaves

    def pruned(paths: Sequence[str]) -> list[str]:
        return by_size([path for path in paths if path in dead])

    def by_size(paths: Sequence[str]) -> list[str]:
        return sorted(paths, key=lambda path: -leaves[path].size)

    def too_many(product: Product) -> str | None:
        steps = math.prod(loop.length for loop in product.kernel.loops)
        entries = steps * math.prod(product.eqn.invars[product.side].aval.shape)
        if product.kernel.loops and entries > sum(leaves[path].size for path in product.kernel.paths):
            return f"the kernels of its {steps} steps have more entries than the params they are made of"
        return None

    def product(product: Product, data: Any) -> list[Any]:
        del data
        paths = pruned(product.kernel.paths)
        if not paths and product.eqn.primitive.name == "conv_general_dilated":
            paths = by_size(product.kernel.paths)
        if paths:
            made = too_many(product) or layer(product)
            if isinstance(made, str):
                reasons.setdefault(paths[0], f"{made} ({product.source})")
            elif made.key not in found or found[made.key][1].rows < made.rows:
                found[made.key] = paths[0], made, product.kernel
        return [None] * len(product.eqn.outvars)

    def other(eqn: Any, args: list[Any]) -> list[Any]:
        if eqn.primitive.name == "scan" and eqn.params["length"]:
            visit_products(eqn.params["jaxpr"], every_step(eqn, args), visitor, place(eqn))
            return const_after_scan(eqn, args)
        paths = pruned([path for arg in args if isinstance(arg, ConstValue) for path in arg.paths])
        if paths and _has_product(eqn):
            for path in paths:
                reasons.setdefault(path, f"its product is inside {eqn.primitive.name!r}, which runs as it is")
        return [None] * len(eqn.outvars)

    visitor, traced = Visitor(product, other), network.traced(inputs)
    visit_products(traced.closed, traced.inputs(leaves, None), visitor)
    taken = {path for path, _, _ in found.values()}
    for path, _, known in found.values():
        for part in pruned(known.paths):
            if part not in taken:
                reasons.setdefault(part, f"it is a part of the kernel of {path}")
    kernels, times = {}, {}
    for key, (path, made, known) in found.items():
        times[path] = times.get(path, 0) + 1
        label = path if times[path] == 1 else f"{path}#{times[path]}"
        assert known.versions is not None
        arrays = known.versions()
        stack = np.stack([made.matrix(np.asarray(array)) for array in arrays])
        kernels[key] = Kernel(label, path, made, arrays[0], stack if known.loops else stack[0])
    return kernels, reasons


def _has_product(eqn: Any) -> bool:
    bodies = (closed for inner in inner_jaxprs(eqn) for closed in nested_jaxprs(inner))
    return any(inner.primitive.name in PRODUCTS for body in bodies for inner in body.jaxpr.eqns)


def _row(kernel: Kernel, leaves: Mapping[str, Any], dead: Mapping[str, int], chosen: Chosen) -> Row:
    leaf = leaves[kernel.path]
    dense = kernel.matrix.nbytes
    stored = dense if chosen.arrays is None else sum(map(_bytes, jax.tree.leaves(chosen.arrays)))
    sparsity = dead.get(kernel.path, 0) / max(leaf.size, 1)
    return Row(kernel.label, tuple(leaf.shape), sparsity, chosen.form, dense, stored, chosen.gain, chosen.why)


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize
