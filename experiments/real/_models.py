"""All models of the real-model command, the cheap ones first."""

from experiments.real import _equinox, _haiku, _hf, _keras, _keras_hub, _linen, _nnx, _ours, _penzai

MODELS = (
    *_ours.MODELS,
    *_haiku.MODELS,
    *_equinox.MODELS,
    *_penzai.MODELS,
    *_nnx.MODELS,
    *_keras.MODELS,
    *_hf.MODELS,
    *_linen.MODELS,
    *_keras_hub.MODELS,
)
