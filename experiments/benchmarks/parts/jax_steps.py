"""Train steps in JAX: dense, pruned by jaxprune, and as jaxpruner does it, in one process."""

import itertools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.sparse import BCSR

import jaxprune as jp

Step = Callable[..., tuple[Any, Any]]
EVERY = 100
SPARSITY = 0.9


def network(params: Any, x: jax.Array) -> jax.Array:
    """Return a perceptron with relu between its layers: (batch, in) -> (batch, out)."""
    for number in range(len(params)):
        x = jax.nn.relu(x) if number else x
        x = x @ params[f"layer{number}"]["kernel"] + params[f"layer{number}"]["bias"]
    return x


def bcsr_network(params: Any, x: jax.Array) -> jax.Array:
    """Return the same of `to_bcsr(params)`, as written by hand."""
    for number in range(len(params)):
        x = jax.nn.relu(x) if number else x
        x = (params[f"layer{number}"]["kernel"] @ x.T).T + params[f"layer{number}"]["bias"]
    return x


def to_bcsr(params: Any) -> Any:
    """Return the params with every kernel transposed and in compressed rows."""
    return {name: p | {"kernel": BCSR.fromdense(p["kernel"].T)} for name, p in params.items()}


def init(key: jax.Array, widths: tuple[int, ...]) -> Any:
    """Return its params, with He's initialisation."""
    keys = jax.random.split(key, len(widths) - 1)
    return {
        f"layer{number}": {
            "kernel": jax.random.normal(keys[number], (m, n)) * np.float32(np.sqrt(2 / m)),
            "bias": jnp.zeros(n),
        }
        for number, (m, n) in enumerate(itertools.pairwise(widths))
    }


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


def train_step(tx: optax.GradientTransformation) -> Step:
    """Return `step(params, opt_state, x, y)` with any optimizer."""

    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


# --- jaxpruner's route, from its description


class ArgsortState(NamedTuple):
    """The wrapped optimizer's state, uint8 masks of the kernels, and the number of steps."""

    inner: Any
    masks: Any
    step: jax.Array


def argsort_masks(params: Any, sparsity: jax.Array) -> Any:
    """Return global masks made as jaxpruner makes them: by an argsort of one vector of all magnitudes."""
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    scores = jnp.concatenate([jnp.abs(kernel).ravel() for kernel in kernels.values()])
    kept = jnp.round((1 - sparsity) * scores.size).astype(jnp.int32)
    order = jnp.argsort(-scores)
    flat = jnp.zeros(scores.size, jnp.uint8).at[order].set((jnp.arange(scores.size) < kept).astype(jnp.uint8))
    ends = np.cumsum([kernel.size for kernel in kernels.values()])[:-1]
    parts = jnp.split(flat, ends.tolist())
    return {name: part.reshape(kernels[name].shape) for name, part in zip(kernels, parts, strict=True)}


def argsort_step(tx: optax.GradientTransformation, schedule: Callable[[Any], Any]) -> tuple[Callable, Step]:
    """Return `init(params)` and a step that multiplies by masks, updated under `lax.cond` by an argsort."""

    def begin(params: Any) -> ArgsortState:
        masks = {name: jnp.ones(layer["kernel"].shape, jnp.uint8) for name, layer in params.items()}
        return ArgsortState(tx.init(params), masks, jnp.zeros((), jnp.int32))

    def step(params: Any, state: ArgsortState, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, y)
        updates, inner = tx.update(grads, state.inner, params)
        params = optax.apply_updates(params, updates)
        number = state.step + 1
        masks = jax.lax.cond(
            number % EVERY == 0,
            lambda masks: argsort_masks(params, jnp.asarray(schedule(number), jnp.float32)),
            lambda masks: masks,
            state.masks,
        )
        params = {
            name: {"kernel": layer["kernel"] * masks[name], "bias": layer["bias"]}
            for name, layer in params.items()
        }
        return params, ArgsortState(inner, masks, number)

    return begin, step


# --- what a branch costs that is not taken


def idle_step(tx: optax.GradientTransformation, pruner: jp.Pruner) -> tuple[Callable, Step]:
    """Return `init(params)` and a train step of `tx` beside which a pruner runs on two entries of each leaf.

    Its masks are used nowhere, and take no time to read: what it adds to a plain step is the time that the
    program of an update takes although it does not run.
    """
    inner = train_step(tx)

    def corners(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[(slice(0, 2),) * leaf.ndim], params)

    def begin(params: Any) -> Any:
        return tx.init(params), pruner.init(corners(params))

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        opt_state, pruned = state
        params, opt_state = inner(params, opt_state, x, y)
        return params, (opt_state, pruner.update(pruned, corners(params)))

    return begin, step


# --- running them


_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def plain_program(text: str) -> dict[str, int]:
    """Return what a step runs in which no masks are updated, from the text of its compiled program.

    `operations` are the fusions, products and copies of the entry computation, and `bytes` are those of their
    operands and results. Branches of a conditional are not among them: the plain step's branch returns its
    operands. `skipped` are the instructions of all other computations, fused ones aside, which a plain step
    does not run, though XLA prepares buffers for them at each call.
    """
    sizes: dict[str, int] = {}
    found = {"operations": 0, "bytes": 0, "skipped": 0}
    entry, fused = False, False
    for line in text.splitlines():
        if line.endswith("{"):
            entry, fused = line.startswith("ENTRY"), "fused_computation" in line or "wrapped_" in line
            continue
        made = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z-]+)\((.*)", line)
        if made is None:
            continue
        name, shape, operation, rest = made.groups()
        found["skipped"] += not entry and not fused and operation not in _FREE
        if entry:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", shape)
            sizes[name] = sum(_ITEM_BYTES[kind] * _product(dims) for kind, dims in shapes)
            if operation not in (*_FREE, "conditional"):
                operands = re.findall(r"%([\w.-]+)", rest.partition(")")[0])
                found["operations"] += 1
                found["bytes"] += sizes[name] + sum(sizes[operand] for operand in operands)
    return found


def _product(dims: str) -> int:
    return int(np.prod([int(size) for size in dims.split(",") if size], dtype=np.int64))


class Contender:
    """A compiled step with its own params and state, which it overwrites."""

    def __init__(self, begin: Callable, step: Step, params: Any, x: Any, y: Any, seeds: int):
        """Compile the step; `seeds` runs side by side by vmap, or one for 0."""
        self.traces = 0

        def counted(*arguments: Any) -> tuple[Any, Any]:
            self.traces += 1
            return step(*arguments)

        own = jax.tree.map(jnp.array, params)  # a copy: steps donate theirs
        if seeds:
            begin, counted = jax.vmap(begin), jax.vmap(counted, in_axes=(0, 0, None, None))
        self.state = (own, jax.jit(begin)(own))
        self.batch, self.updated = (x, y), 0
        self.compiled = jax.jit(counted, donate_argnums=(0, 1))
        self.text = self.compiled.lower(*self.state, x, y).compile().as_text() or ""
        self.traces = 0

    def steps(self, count: int) -> float:
        """Return the seconds per step, of so many in a row; nothing goes to the host or comes from it."""
        with jax.transfer_guard("disallow"):
            began = time.perf_counter()
            for _ in range(count):
                self.state = self.compiled(*self.state, *self.batch)
            jax.block_until_ready(self.state)
            return (time.perf_counter() - began) / count

    def plain(self, count: int) -> float:
        """Return the seconds per step in which no masks are updated."""
        if count >= EVERY:
            raise ValueError(f"of {count} steps in a row one would update masks; at most {EVERY - 1}.")
        self._set_clock(self.updated * EVERY)
        return self.steps(count)

    def update(self) -> float:
        """Return the seconds of a step in which masks are updated, as the schedule goes on."""
        self.updated += 1
        self._set_clock(self.updated * EVERY - 1)
        return self.steps(1)

    def _set_clock(self, number: int) -> None:
        """Make the next step number + 1, for whoever updates masks."""
        params, opt_state = self.state
        clock = optax.tree.get(opt_state, "step", None)
        if clock is not None:
            self.state = params, optax.tree.set(opt_state, step=jnp.full_like(clock, number))
        jax.block_until_ready(self.state)

    def facts(self) -> dict[str, Any]:
        """Return what needs no clock: of the compiled program, how often it was traced, zeros at the end."""
        header = self.text.partition("\n")[0]
        kernels = [layer["kernel"] for layer in self.state[0].values()]
        return {
            "sorts": len(re.findall(r" sort\(", self.text)),
            "host": len(re.findall(r"callback|infeed\(|outfeed\(| send\(| recv\(", self.text)),
            "aliased": len(re.findall(r"(?:may|must)-alias", header)),
            "leaves": len(jax.tree.leaves(self.state)),
            "traces": self.traces,
            "zeros": float(1 - sum(jnp.sum(k != 0) for k in kernels) / sum(k.size for k in kernels)),
            "masks": sum(m.nbytes for m in jax.tree.leaves(optax.tree.get(self.state, "masks", ()))),
            **plain_program(self.text),
        }


class JaxSteps:
    """All contenders in JAX on one network, in a worker process."""

    def __init__(self, widths: tuple[int, ...], batch: int, seeds: int, ways: tuple[str, ...], updates: int):
        """Make and compile them.

        The runs of several seeds go side by side, by vmap; 0 seeds are one run alone. `updates` is how many
        updates of the masks lead to the final sparsity.
        """

        def make(key: jax.Array) -> Any:
            return init(key, widths)

        x = jax.random.normal(jax.random.key(1), (batch, widths[0]))
        y = jax.random.randint(jax.random.key(2), (batch,), 0, widths[-1])
        keys = jax.random.split(jax.random.key(0), seeds) if seeds else jax.random.key(0)
        params = jax.jit(jax.vmap(make) if seeds else make)(keys)
        adam = optax.adam(1e-3)
        schedule = jp.schedules.cubic(SPARSITY, begin_step=0, end_step=updates * EVERY)
        pruner = jp.pruner(jp.scores.magnitude, schedule, every=EVERY)
        self.contenders: dict[str, Contender] = {}
        for way in ways:
            if way == "argsort":
                begin, step = argsort_step(adam, schedule)
            else:
                tx = adam  # for "dense" and its "copy"
                if way in ("fixed", "idle"):
                    one = make(jax.random.key(0))
                    tx = jp.keep_masked(adam, jp.prune_once(one, jp.scores.magnitude, sparsity=SPARSITY))
                elif way in ("masked", "packed"):
                    tx = jp.wrap_optax(adam, pruner, packed=way == "packed")
                begin, step = tx.init, train_step(tx)
                if way == "idle":
                    corners = jp.pruner(jp.scores.magnitude, schedule, every=EVERY, floor=0)
                    begin, step = idle_step(tx, corners)
            self.contenders[way] = Contender(begin, step, params, x, y, seeds)

    def plain(self, way: str, count: int) -> float:
        """Return the seconds of a step in which no masks are updated."""
        return self.contenders[way].plain(count)

    def update(self, way: str) -> float:
        """Return the seconds of a step in which masks are updated."""
        return self.contenders[way].update()

    def facts(self, way: str) -> dict[str, Any]:
        """Return what needs no clock: of the compiled program, how often it was traced, zeros at the end."""
        return self.contenders[way].facts()
