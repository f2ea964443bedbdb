"""All models of the real-model command, the cheap ones first."""

from experiments.real_models.libraries import equinox, haiku, hf, keras, keras_hub, linen, nnx, ours, penzai

TRIED = {
    "equimo's AttNet, FasterViT, SHViT, PartialFormer": "fail in their own call",
    "canvit-nnx, discretax, eqx-zoo, flax-vision-models, norax, sbgm": "have no release for Python 3.11",
    "deepvit-flax, fttjax": "import what they do not have",
    "e1jax, levanter, palm-jax, rnn-jax": "need versions of other packages that cannot be had together",
    "easydel": "ends the process when it is imported, by an XLA flag that jaxlib 0.10.2 does not know",
    "gemma": "pip had not resolved it after four minutes, when it was stopped",
    "maxtext, t5x": "do not install on Python 3.11; a stack along axis 1 as MaxText has it is among ours",
    "neural-tangents": "imports `jax.core.Jaxpr`, which JAX has moved",
    "recurrentgemma": "imports `for_loop` from JAX's own modules, which JAX has dropped",
    "vit-flax": "imports `flax.nn`, which flax has dropped",
}
"""Libraries that were tried with Python 3.11 and jax 0.10.2, and why none of their models is here."""

MODELS = (
    *ours.MODELS,
    *haiku.MODELS,
    *equinox.MODELS,
    *penzai.MODELS,
    *nnx.MODELS,
    *keras.MODELS,
    *hf.MODELS,
    *linen.MODELS,
    *keras_hub.MODELS,
)
