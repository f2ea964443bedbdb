"""Whether a leaf is a kernel, read off its name, in the names that many libraries use.

Names are read as whole words: "normal_dense" does not mean a norm, nor "embedding_net" a table that is
looked up. `where.kernels` is the public function.
"""

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache

# Names are split at case changes, digits and punctuation.
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
# Compounds written as one word: "layernorm", "posemb".
_COMPOUND = re.compile(r"(?<!^un)(?<=\w)(norms?|emb|embed|embeddings?)$")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NORM = _set("norm norms ln lnf bn gn rms normalizer normalization stats")
_TABLE = _set("emb embs embed embeds embedding embeddings embedder wte wpe lookup lut codebook codebooks")
_POSITION = _set("pos position positions positional relpos posenc pe")
_ENTRY = _set("token tokens prompt prompts table tables queries freqs")
_VECTOR = _set(
    "bias biases scale scales offset offsets gamma gammas beta betas cls class classes latents log"
)
_ADAPTER = _set("lora dora loha lokr hada ia adapter adapters")
# The last word of a name can mean a layer that multiplies, or a part that holds layers of any kind.
_LAYER = _set(
    "linear dense conv convolution proj projection fc einsum mlp ffn attn attention modulation mixer mixing "
    "out output predictor tagger classifier unembed"
)
_PART = _set("net network model module block blocks layer layers encoder decoder head tower")
_ROW_VECTOR_KERNEL = re.compile(r"^(w|weight)", re.IGNORECASE)


def _words(name: str) -> list[str]:
    """Split a name into words, in lower case and without numbers: "LayerNorm_0" into layer and norm."""
    words = [word.lower() for word in _WORD.findall(name.replace("LoRA", "Lora").replace("DoRA", "Dora"))]
    return [compound[1] if (compound := _COMPOUND.search(word)) else word for word in words]


def _has(words: Sequence[str], known: frozenset[str]) -> bool:
    return any(word in known for word in words)


def is_adapter(path: str) -> bool:
    """Return whether a path names a low-rank or bottleneck adapter.

    One factor of an adapter starts at zero, so that a score of magnitudes would empty it, and it could
    never be trained. Not an adapter is a layer that only *has* one ("lora_dense/kernel"), nor a layer that
    fits inputs or outputs to a network ("input_adapter").
    """
    *parents, name = map(_words, path.split("/"))
    if _has(name, _ADAPTER):
        return True
    return any(
        _has(words, _ADAPTER) and words[-1] not in _LAYER | _PART and words[0] not in ("input", "output")
        for words in parents
        if words
    )


def _parent_says(name: str, child: str) -> bool | None:
    """Return whether a module's name says that the leaves in it are kernels; None if it says nothing."""
    words = _words(name)
    if not words or words[-1] in _PART:
        return None
    # A norm is often named after the layer it serves ("norm_mlp", "ln_attn").
    if _has(words, _NORM) and words[-1] != "modulation":
        return False
    if words[-1] in _LAYER or ("patch" in words and not _has(words, _POSITION)):
        return True
    # "time_embed/0/weight" is a layer of a network that embeds; "embeddings/0/weight" one of several tables.
    if (child.isdigit() or child == "layers") and not words[-1].endswith("s"):
        return None
    spoken = words[-1] in _ENTRY | {"bias"} or _has(words, _TABLE | _POSITION)
    return False if spoken and "wise" not in words else None


@lru_cache(maxsize=4096)  # a pruner asks about the same leaves in every update
def names_kernel(path: str, shape: Sequence[int]) -> bool:
    """Return whether a leaf of this path and shape has a name that layers give to weights: see `kernels`."""
    *parents, name = path.split("/")
    # Boxes around an array (penzai's named arrays, nnx's raw values) have names of their own.
    while parents and name in ("data_array", "raw_value"):
        name = parents.pop()
        name = parents.pop() if name == "value" and parents else name
    if len(shape) < 2 or is_adapter(path):
        return False
    words = _words(name)
    said = _VECTOR | _NORM | _TABLE | _POSITION | _ENTRY
    if words[-1:] == ["kernel"] or (words[:1] == ["kernel"] and not _has(words, said)):
        return True
    layer_like = words[-1:] and words[-1] in _LAYER and not _has(words, _NORM)  # a bare "embed_proj"
    if words[:1] == ["b"] or (_has(words, said) and not layer_like):
        return False
    # T5 and BART call the embedding that encoder and decoder share "shared".
    if (parents[-1:], name) == (["shared"], "weight"):
        return False
    says = [_parent_says(parent, child) for parent, child in itertools.pairwise([*parents, name])]
    if next((kernels for kernels in reversed(says) if kernels is not None), True) is False:
        return False
    length = words[-1:] == ["g"] or name == "original0"  # the lengths that weight normalisation learns
    if _ROW_VECTOR_KERNEL.match(name) and not length:
        return True
    # Without a telling name, (1, d) is a row of biases, (1, n, d) a positional table or a token, and a leaf
    # with one long axis among three or more is a scale for each channel or head.
    is_row = shape[0] == 1 and len(shape) <= 3
    is_vector = len(shape) > (1 if length else 2) and sum(n != 1 for n in shape) <= 1
    return not (is_row or is_vector)
