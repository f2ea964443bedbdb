"""The networks of the studies, in flax linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def torch_uniform(fan_in: int):
    """Return PyTorch's default initialisation of dense and conv layers, `U(-1/sqrt(n), 1/sqrt(n))`."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(x, features: int, name: str, glorot: bool = False):
    """Return a dense layer, applied: (..., in) -> (..., features).

    Initialised as PyTorch does by default, or by Glorot's normal distribution with biases of 0.
    """
    if glorot:
        return nn.Dense(features, kernel_init=nn.initializers.glorot_normal(), name=name)(x)
    init = torch_uniform(x.shape[-1])
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)


class ValidConv(nn.Module):
    """A stride-1 convolution without padding: kernel (side, side, in, out), bias (out,).

    With `im2col` it gathers the patches by slices and multiplies once. For networks as small as
    LeNet this is several times faster than `lax.conv` on a CPU, and gives the same numbers.
    """

    features: int
    side: int
    im2col: bool

    @nn.compact
    def __call__(self, x):
        """x: (batch, height, width, in) -> (batch, height - side + 1, width - side + 1, features)."""
        k, c = self.side, x.shape[-1]
        init = torch_uniform(k * k * c)
        kernel = self.param("kernel", init, (k, k, c, self.features))
        bias = self.param("bias", init, (self.features,))
        if not self.im2col:
            dims = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims) + bias
        h, w = x.shape[1] - k + 1, x.shape[2] - k + 1
        rows = jnp.concatenate([x[:, :, j : j + w] for j in range(k)], axis=-1)
        patches = jnp.concatenate([rows[:, i : i + h] for i in range(k)], axis=-1)
        return patches @ kernel.reshape(k * k * c, self.features) + bias


def max_pool_2x2(x):
    """Take the maximum over 2 x 2 windows: (batch, height, width, c) -> half the height and width."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class LeNet(nn.Module):
    """The article's LeNet: two 5 x 5 convolutions and two dense layers, 21,840 parameters.

    conv1 (1->10), max-pool, relu; conv2 (10->20), dropout of channels, max-pool, relu; fc1
    (320->50), relu, dropout; fc2 (50->10); log-softmax. `widths` are those of the first three.
    """

    im2col: bool = True
    widths: tuple[int, int, int] = (10, 20, 50)

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, 28, 28, 1), normalised -> log-probabilities (batch, 10)."""
        conv1, conv2, fc1 = self.widths
        x = nn.relu(max_pool_2x2(ValidConv(conv1, 5, self.im2col, name="conv1")(x)))
        x = ValidConv(conv2, 5, self.im2col, name="conv2")(x)
        x = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.relu(max_pool_2x2(x)).reshape(x.shape[0], -1)
        x = nn.relu(dense(x, fc1, "fc1"))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.log_softmax(dense(x, 10, "fc2"))


class MLP(nn.Module):
    """A multi-layer perceptron with relu between layers (784-300-100-10 is LeNet-300-100)."""

    widths: tuple[int, ...] = (300, 100, 10)
    logits: bool = False
    glorot: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, ...) -> log-probabilities (batch, widths[-1]), or logits."""
        del train
        x = x.reshape(x.shape[0], -1)
        for index, width in enumerate(self.widths, start=1):
            x = dense(x, width, f"fc{index}", self.glorot)
            x = nn.relu(x) if index < len(self.widths) else x
        return x if self.logits else nn.log_softmax(x)
