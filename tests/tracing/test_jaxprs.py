"""Walks of jaxprs: values by equation, loops and branches with other bodies, products of kernels and data."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.tracing.dataflow import Product, Visitor, inside_scan, materialised, param, visit_products
from jaxprune.tracing.jaxprs import binder, called_jaxpr, interpret, nested_jaxprs, scan_with, switch_with

X = jnp.arange(6.0).reshape(2, 3)
W = jnp.arange(12.0).reshape(4, 3) / 10


def bind(eqn, values):
    return binder(eqn)(*values)


def test_arrays_as_values_run_the_function():
    table = jnp.arange(3.0)

    def function(x, y):
        return jax.jit(lambda x: x * table)(x) + 2 * y, y, x * x

    closed = jax.make_jaxpr(function)(X, X)
    for got, expected in zip(interpret(closed, [X, X + 1], bind), function(X, X + 1), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_value_is_dropped_after_its_last_read():
    class Value:
        pass

    alive = weakref.WeakSet()
    most = 0

    def handle(eqn, values):
        nonlocal most
        del values
        made = [Value() for _ in eqn.outvars]
        alive.update(made)
        most = max(most, len(alive))
        return made

    def chain(x):
        first = jnp.sin(x)
        for _ in range(20):
            x = jnp.cos(x)
        return x + first

    first = Value()
    interpret(jax.make_jaxpr(chain)(1.0), [first], handle)
    assert most <= 3  # what is read, what is made, and `first`
    assert not alive


def test_a_scan_and_a_cond_with_other_bodies():
    def function(x):
        return jax.lax.scan(lambda c, row: (c + row, 2 * c), jnp.zeros(3), x, reverse=True)

    (eqn,) = [e for e in jax.make_jaxpr(function)(X).eqns if e.primitive.name == "scan"]

    def body(values):
        outputs = interpret(eqn.params["jaxpr"], values, bind)
        return outputs, {"sum": outputs[0].sum()}

    (carry, stacked), extras = scan_with(eqn, [jnp.zeros(3), X], body)
    expected = function(X)
    np.testing.assert_array_equal(carry, expected[0])
    np.testing.assert_array_equal(stacked, expected[1])
    assert extras["sum"].tolist() == [15.0, 12.0]

    (eqn,) = jax.make_jaxpr(lambda n, x: jax.lax.switch(n, [jnp.sin, jnp.cos], x))(0, X).eqns[-1:]
    negated = switch_with(eqn, [1, X], lambda closed, given: [-x for x in interpret(closed, given, bind)])
    np.testing.assert_allclose(negated[0], -jnp.cos(X), rtol=1e-6)


def network(params, x):
    @jax.custom_jvp
    def relu(x):
        return jnp.maximum(x, 0)

    relu.defjvp(lambda primals, tangents: (relu(*primals), tangents[0]))

    def layer(x, w):
        return relu(x @ w)

    x = jax.jit(lambda x: x @ params["a"].T.astype(jnp.float32))(x)  # (2, 4)
    x = jax.checkpoint(lambda x: x @ jnp.where(params["a"] > 0.3, params["a"], 0.0))(x)  # (2, 3)
    # A param that is carried round unchanged is known in every step; a value that changes is not.
    (x, _, _), _ = jax.lax.scan(
        lambda c, w: ((layer(c[0], w) @ c[1].T @ c[1] @ c[2], c[1], 2 * c[2]), None),
        (x, params["a"], params["stack"][0]),
        params["stack"],
    )
    return x @ x.T


PARAMS = {"a": W, "stack": jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])}


def test_products_of_kernels_and_data_are_seen_everywhere():
    """As statistics of what each layer reads are collected: through calls, and by step through a scan."""
    closed = jax.make_jaxpr(network)(PARAMS, X)
    seen, read = [], []

    def product(found: Product, data):
        seen.append((found.kernel.paths, found.side, found.kernel.key))
        read.append(jnp.square(data).sum())  # returns None, which leaves the product to `other`

    def other(eqn, args):
        if eqn.primitive.name != "scan":
            return bind(eqn, map(materialised, args))

        def body(values):
            before = len(read)
            outputs = visit_products(eqn.params["jaxpr"], inside_scan(eqn, args, values), visitor)
            inside = read[before:]
            del read[before:]
            return list(map(materialised, outputs)), inside

        outputs, inside = scan_with(eqn, list(map(materialised, args)), body)
        read.extend(inside)
        return outputs

    visitor = Visitor(product, other)
    inputs = [param("a", lambda: PARAMS["a"]), param("stack", lambda: PARAMS["stack"]), X]
    (got,) = visit_products(closed, inputs, visitor)
    np.testing.assert_allclose(got, network(PARAMS, X), rtol=1e-6)
    assert {paths for paths, *_ in seen} == {("a",), ("stack",)}
    assert all(side == 1 for _, side, _ in seen)
    keys = [key for paths, _, key in seen if paths == ("a",)]
    assert len(set(keys)) == 3  # transposed, in the scan as outside of it; masked; as it is
    hidden = X @ W.T
    masked = hidden @ jnp.where(W > 0.3, W, 0.0)
    first = jax.nn.relu(masked)
    second = first @ W.T @ W
    inside = [
        [masked, second],
        [first, jax.nn.relu(2 * second)],
        [first @ W.T, jax.nn.relu(2 * second) @ W.T],
    ]
    squares = [[jnp.square(x).sum() for x in steps] for steps in inside]
    expected = [jnp.square(X).sum(), jnp.square(hidden).sum(), *squares]
    for figures, wanted in zip(read, expected, strict=True):
        np.testing.assert_allclose(figures, wanted, rtol=1e-5)


def test_keys_tell_how_a_value_is_made_and_not_when():
    def kernels(function):
        closed, found = jax.make_jaxpr(function)(W, X), []
        visitor = Visitor(lambda product, data: found.append(product.kernel.key), lambda *a: [None])
        visit_products(closed, [param("w", lambda: W), X], visitor)
        return found

    def once(w, x):
        return x @ w.T

    def twice(w, x):
        return jax.jit(once)(w, x) @ (2 * w) @ (3 * w.T)

    assert kernels(twice)[:1] == kernels(once)
    assert len(set(kernels(twice))) == 3


def test_nested_jaxprs_are_all_there():
    closed = jax.make_jaxpr(network)(PARAMS, X)
    names = [eqn.primitive.name for inner in nested_jaxprs(closed) for eqn in inner.jaxpr.eqns]
    assert names.count("dot_general") == 7 and names.count("max") >= 1
    (call,) = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name in ("jit", "pjit")][:1]
    assert called_jaxpr(call) in list(nested_jaxprs(closed))
