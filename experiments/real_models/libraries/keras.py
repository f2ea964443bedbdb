"""Models of Keras, on JAX: its applications at full size, and networks of its usual layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.real_models.case import Case, Model, is_floating, module, moved, normal, tokens


def keras_case(
    rng: np.random.Generator,
    model: Any,
    *inputs: Any,
    training: bool = False,
    lists: bool = False,
    whole_numbers: bool = False,
) -> Case:
    """Return a built Keras model; all its floating variables are params, by path unless as two lists.

    Args:
      rng: of the values.
      model: the model, built.
      *inputs: what it is called with.
      training: whether in training mode: new moving statistics are part of the output then.
      lists: whether params are Keras' own lists of trainable and other variables.
      whole_numbers: whether variables of whole numbers are params too, as those of a quantized model.
    """
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    names: list[str] = []
    for number, variable in enumerate(variables):
        path = variable.path
        names.append(path if path not in names else f"{path}_{number}")
    values = {name: jnp.asarray(variable.value) for name, variable in zip(names, variables, strict=True)}
    fixed = {n: None if is_floating(value) or whole_numbers else value for n, value in values.items()}
    params = moved({name: value for name, value in values.items() if fixed[name] is None}, rng)
    split = len(model.trainable_variables)

    def apply(params: Any, *xs: Any) -> Any:
        if lists:
            params = dict(zip(floating, [*params[0], *params[1]], strict=True))
        whole = [params[name] if fixed[name] is None else fixed[name] for name in names]
        outputs, others = model.stateless_call(whole[:split], whole[split:], *xs, training=training)
        if not training:
            return outputs
        return outputs, {n: v for n, v in zip(names[split:], others, strict=True) if n in params}

    floating = [name for name in names if fixed[name] is None]
    if lists:
        trainable = [params[name] for name in names[:split]]
        return Case(apply, (trainable, [params[n] for n in floating if n not in names[:split]]), inputs)
    return Case(apply, params, inputs, (lambda out: out[1]) if training else None)


# --- applications

_APPLICATIONS = {
    "ConvNeXtTiny": 96,
    "DenseNet121": 96,
    "DenseNet169": 96,
    "EfficientNetB0": 96,
    "EfficientNetB3": 96,
    "EfficientNetV2B0": 96,
    "EfficientNetV2S": 96,
    "InceptionResNetV2": 96,
    "InceptionV3": 96,
    "MobileNet": 96,
    "MobileNetV2": 96,
    "MobileNetV3Large": 96,
    "MobileNetV3Small": 96,
    "NASNetMobile": 64,
    "ResNet50": 96,
    "ResNet101": 64,
    "ResNet50V2": 96,
    "ResNet101V2": 64,
    "VGG16": 64,
    "VGG19": 64,
    "Xception": 96,
}


def _application(rng: np.random.Generator, name: str, size: int) -> Case:
    make = getattr(module("keras").applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=10)
    return keras_case(rng, model, normal(rng, 1, size, size, 3))


# --- networks of usual layers


def _layers() -> tuple[Any, Any]:
    keras = module("keras")
    return keras, keras.layers


def _sequential(rng: np.random.Generator, layers: list[Any], x: jax.Array, **keywords: Any) -> Case:
    keras, _ = _layers()
    return keras_case(
        rng, keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), *layers]), x, **keywords
    )


def _conv1d(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [
        L.Conv1D(16, 3, activation="relu"),
        L.BatchNormalization(),
        L.SeparableConv1D(24, 3, activation="relu"),
        L.MaxPooling1D(2),
        L.Conv1D(16, 3, dilation_rate=2, padding="causal", activation="gelu"),
        L.DepthwiseConv1D(3, activation="relu"),
        L.Conv1DTranspose(12, 3, strides=2),
        L.GlobalAveragePooling1D(),
        L.Dense(20, activation="relu"),
        L.Dense(5),
    ]
    return _sequential(rng, layers, normal(rng, 2, 32, 8))


def _bi(rng: np.random.Generator, kind: str) -> Case:
    _, L = _layers()
    cell = getattr(L, kind)
    layers = [L.Bidirectional(cell(16, return_sequences=True)), cell(24), L.Dense(12, "relu"), L.Dense(4)]
    return _sequential(rng, layers, normal(rng, 2, 6, 8))


def _stacked_cells(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [L.RNN(L.StackedRNNCells([L.LSTMCell(16), L.GRUCell(12)])), L.Dense(4)]
    return _sequential(rng, layers, normal(rng, 2, 6, 8))


def _embedding_lstm(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [L.Embedding(30, 16, mask_zero=True), L.LSTM(24), L.Dense(4)]
    return _sequential(rng, layers, tokens(rng, 30, 2, 6).at[:, 4:].set(0))


def _attention(rng: np.random.Generator) -> Case:
    keras, L = _layers()
    x = keras.Input((8, 10))
    hidden = L.Dense(24, activation="relu")(x)
    one = L.Attention(use_scale=True)([hidden, hidden])
    other = L.AdditiveAttention()([hidden, hidden])
    model = keras.Model(x, L.Dense(5)(L.Concatenate()([one, other])))
    return keras_case(rng, model, normal(rng, 2, 8, 10))


def _transformer(rng: np.random.Generator) -> Case:
    keras, L = _layers()
    ids = keras.Input((8,), dtype="int32")
    x = L.Embedding(30, 16)(ids)
    y = L.MultiHeadAttention(4, 6)(x, x, use_causal_mask=True)
    x = L.LayerNormalization()(L.Add()([x, y]))
    y = L.Dense(16)(L.Dense(40, activation="gelu")(x))
    x = L.LayerNormalization()(L.Add()([x, y]))
    model = keras.Model(ids, L.Dense(30)(x))
    return keras_case(rng, model, tokens(rng, 30, 2, 8))


def _grouped_query(rng: np.random.Generator) -> Case:
    keras, L = _layers()
    x = keras.Input((8, 12))
    y = L.Dense(16)(x)
    z = L.GroupQueryAttention(6, num_query_heads=6, num_key_value_heads=3)(y, y)
    y = L.LayerNormalization()(L.Add()([y, z]))
    y = L.Dense(24, activation="swish")(y)
    return keras_case(rng, keras.Model(x, L.Dense(4)(y)), normal(rng, 2, 8, 12))


def _einsum_dense(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [
        L.EinsumDense("btd,dhk->bthk", output_shape=(None, 4, 8), bias_axes="hk"),
        L.Activation("relu"),
        L.EinsumDense("bthk,hkd->btd", output_shape=(None, 20), bias_axes="d"),
        L.Activation("gelu"),
        L.EinsumDense("btd,de->bte", output_shape=(None, 5)),
    ]
    return _sequential(rng, layers, normal(rng, 2, 6, 12))


def _norms(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [
        L.Conv2D(16, 3),
        L.GroupNormalization(4),
        L.Activation("relu"),
        L.Conv2D(16, 3),
        L.LayerNormalization(),
        L.PReLU(shared_axes=[1, 2]),
        L.Conv2D(12, 3),
        L.UnitNormalization(),
        L.SpectralNormalization(L.Conv2D(20, 1)),
        L.BatchNormalization(),
        L.GlobalMaxPooling2D(),
        L.Dense(16),
        L.RMSNormalization(),
        L.Dense(4),
    ]
    return _sequential(rng, layers, normal(rng, 2, 12, 12, 3))


def _separable(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [
        L.SeparableConv2D(16, 3, activation="relu"),
        L.DepthwiseConv2D(3, depth_multiplier=2),
        L.ReLU(6.0),
        L.SeparableConv2D(24, 3),
        L.LeakyReLU(),
        L.GlobalAveragePooling2D(),
        L.Dense(5),
    ]
    return _sequential(rng, layers, normal(rng, 2, 12, 12, 3))


def _unet(rng: np.random.Generator) -> Case:
    keras, L = _layers()
    x = keras.Input((16, 16, 3))
    first = L.Conv2D(12, 3, padding="same", activation="relu")(x)
    down = L.Conv2D(16, 3, strides=2, padding="same", activation="relu")(first)
    deep = L.Conv2D(24, 3, strides=2, padding="same", activation="relu")(down)
    up = L.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu")(deep)
    up = L.Conv2D(16, 3, padding="same", activation="relu")(L.Concatenate()([up, down]))
    up = L.UpSampling2D(interpolation="bilinear")(up)
    up = L.Conv2D(12, 3, padding="same", activation="relu")(L.Concatenate()([up, first]))
    return keras_case(rng, keras.Model(x, L.Conv2D(2, 1)(up)), normal(rng, 2, 16, 16, 3))


def _pad_and_crop(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [
        L.ZeroPadding2D(2),
        L.Conv2D(16, 3, dilation_rate=2, activation="relu"),
        L.UpSampling2D(2),
        L.Cropping2D(1),
        L.Conv2D(12, 3, strides=2, activation="elu"),
        L.AveragePooling2D(2),
        L.Conv2D(16, 1, activation="selu"),
        L.GlobalAveragePooling2D(),
        L.Dense(3),
    ]
    return _sequential(rng, layers, normal(rng, 2, 10, 10, 3))


def _convlstm(rng: np.random.Generator) -> Case:
    _, L = _layers()
    layers = [
        L.ConvLSTM2D(12, 3, padding="same", return_sequences=True),
        L.Conv3D(16, 3, padding="same", activation="relu"),
        L.MaxPooling3D((1, 2, 2)),
        L.Conv3D(12, 1, activation="relu"),
        L.GlobalAveragePooling3D(),
        L.Dense(4),
    ]
    return _sequential(rng, layers, normal(rng, 1, 4, 8, 8, 2))


def _lora(rng: np.random.Generator) -> Case:
    keras, L = _layers()
    dense = [L.Dense(24, activation="relu"), L.Dense(20, activation="relu"), L.Dense(4)]
    model = keras.Sequential([keras.Input((10,)), *dense])
    for layer in dense[:2]:
        layer.enable_lora(4)
    return keras_case(rng, model, normal(rng, 3, 10))


def _int8(rng: np.random.Generator) -> Case:
    keras, L = _layers()
    model = keras.Sequential(
        [keras.Input((10,)), L.Dense(24, activation="relu"), L.Dense(20, activation="relu"), L.Dense(4)]
    )
    model.quantize("int8")
    return keras_case(rng, model, normal(rng, 3, 10), whole_numbers=True)


def _mlp(rng: np.random.Generator, mode: str) -> Case:
    keras, L = _layers()
    x = normal(rng, 6, 10)
    dtype = keras.DTypePolicy("mixed_bfloat16") if mode == "bfloat16" else None
    hidden = [L.Dense(24, activation="relu", dtype=dtype), L.BatchNormalization(dtype=dtype)]
    if mode == "bfloat16":
        hidden.append(L.Dense(20, activation="gelu", dtype=dtype))
    layers = [*hidden, L.Dense(4, dtype=dtype)]
    return _sequential(rng, layers, x, training=mode == "training", lists=mode == "lists")


_USUAL = {
    "Attention+AdditiveAttention": _attention,
    "BiGRU-GRU": partial(_bi, kind="GRU"),
    "BiLSTM-LSTM": partial(_bi, kind="LSTM"),
    "Conv1D zoo": _conv1d,
    "ConvLSTM2D+Conv3D": _convlstm,
    "EinsumDense": _einsum_dense,
    "Embedding(mask)-LSTM": _embedding_lstm,
    "GroupQueryAttention": _grouped_query,
    "LoRA dense": _lora,
    "Norms Group/Layer/Unit/RMS/Spectral": _norms,
    "SeparableConv": _separable,
    "StackedRNNCells": _stacked_cells,
    "Transformer MHA": _transformer,
    "UNet Conv2DTranspose/UpSampling": _unet,
    "UpSampling nearest, pad, crop, dilated": _pad_and_crop,
    "int8 quantized": _int8,
    "lists": partial(_mlp, mode="lists"),
    "mixed_bfloat16": partial(_mlp, mode="bfloat16"),
    "train mode BN state": partial(_mlp, mode="training"),
}

MODELS = (
    *(Model(f"usual Keras/{name}", ("keras",), build, "layers", ours=True) for name, build in _USUAL.items()),
    *(
        Model(
            f"keras/{name}",
            ("keras",),
            partial(_application, name=name, size=size),
            "image",
            note=f"images of {size} x {size}",
        )
        for name, size in _APPLICATIONS.items()
    ),
)
