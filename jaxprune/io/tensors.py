"""safetensors: dense files that other programs read and write."""

import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.files.atomic import replacing
from jaxprune.files.opened import FileError, open_file
from jaxprune.io.format import DTYPES
from jaxprune.io.read import Saved
from jaxprune.tree.leaves import array_leaves, describe, is_array, is_concrete
from jaxprune.tree.masks import apply_masks
from jaxprune.tree.paths import leaf_paths
from jaxprune.typing import Masks, Params

# By the format's name of a dtype, that of numpy and JAX.
_NAMES = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def save_safetensors(
    path: str | os.PathLike[str],
    params: Params,
    masks: Masks | None = None,
    *,
    metadata: dict[str, str] | None = None,
) -> int:
    """Write params to a safetensors file, with zeros where masks prune.

    The format is dense and knows no masks, so the file is as large as that of the dense network. As with
    `save`, it is written completely or not at all.

    Args:
      path: of the file.
      params: a pytree of arrays; the name of each is its path.
      masks: bool masks like `params`.
      metadata: a dict of strings.

    Returns:
      The size of the file in bytes.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: masks that do not mirror `params`; two leaves of the same path.
      TypeError: a dtype that the format does not have; metadata that is not strings.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxprune as jp
      >>> file = os.path.join(tempfile.mkdtemp(), "params.safetensors")
      >>> size = jp.io.save_safetensors(file, {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}})
      >>> jp.io.load_safetensors(file).params["dense/kernel"].dtype
      dtype(bfloat16)
    """
    package = _package()
    tensors = {}
    for name, leaf in array_leaves(params if masks is None else apply_masks(params, masks)).items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"params[{name!r}] is {leaf.dtype}, a typed PRNG key. Save jax.random.key_data(key) in its "
                "place."
            )
        if str(leaf.dtype) not in _NAMES.values():
            raise TypeError(
                f"params[{name!r}] is {describe(leaf)}; safetensors holds {', '.join(_NAMES.values())}."
            )
        if not is_concrete(leaf):
            raise TypeError(f"params[{name!r}] holds no values now. Save outside of jit.")
        tensors[name] = np.asarray(leaf, order="C")
    given = {} if metadata is None else metadata
    if not isinstance(given, dict) or not all(
        isinstance(text, str) for pair in given.items() for text in pair
    ):
        raise TypeError(f"metadata of safetensors is strings by strings, got {metadata!r:.200}")
    with replacing(path) as new:
        package.numpy.save_file(tensors, new, metadata=metadata)
        return new.stat().st_size


def load_safetensors(path: str | os.PathLike[str], like: Any = None) -> Saved:
    """Read a safetensors file.

    Args:
      path: of the file.
      like: a tree of arrays or `jax.ShapeDtypeStruct` that gives the result its structure; the tensors must
        have its paths, shapes and dtypes. Without it, params are a flat dict by name.

    Returns:
      A `Saved` of numpy arrays, without masks.

    Raises:
      ImportError: safetensors is not installed.
      FileError: the file is damaged, or does not match `like`.
    """
    package = _package()
    name = os.fspath(path)
    with open_file(path) as file:
        data = file.read()
    try:
        tensors = {key: _array(key, view) for key, view in package.deserialize(data)}
    except (package.SafetensorError, FileError) as error:
        raise FileError(f"{name}: {error}.") from None
    # The header, which has been checked by now: its length in 8 bytes, and JSON.
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    if like is None:
        return Saved(tensors, None, metadata)
    wanted = dict(zip(leaf_paths(like), jax.tree.leaves(like), strict=True))
    if wanted.keys() != tensors.keys():
        only = ", ".join(sorted(wanted.keys() - tensors.keys())) or "none"
        missing = ", ".join(sorted(tensors.keys() - wanted.keys())) or "none"
        raise FileError(
            f"{name}: its tensors are not like's. Missing from like: {missing}. Only in like: {only}."
        )
    for key, leaf in wanted.items():
        if not is_array(leaf) or describe(leaf) != describe(tensors[key]):
            is_ = describe(leaf) if is_array(leaf) else f"a {type(leaf).__name__}"
            raise FileError(f"{name}: {key!r} is {describe(tensors[key])}, but {is_} in like.")
    return Saved(
        jax.tree.unflatten(jax.tree.structure(like), [tensors[key] for key in wanted]), None, metadata
    )


def _array(name: str, view: dict[str, Any]) -> np.ndarray:
    if view["dtype"] not in _NAMES:
        raise FileError(f"{name!r} is of dtype {view['dtype']}, which is not read")
    dtype = DTYPES[_NAMES[view["dtype"]]]
    if view["dtype"] == "BOOL" and np.frombuffer(view["data"], np.uint8).max(initial=0) > 1:
        raise FileError(f"{name!r} is of bools, and has bytes that are neither 0 nor 1")
    array = np.frombuffer(view["data"], dtype) if len(view["data"]) else np.zeros(0, dtype)
    return (array if sys.byteorder == "little" else array.byteswap()).reshape(view["shape"])


def _package() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "safetensors files need the package safetensors: pip install 'jaxprune[safetensors]'"
        ) from None
    return safetensors
