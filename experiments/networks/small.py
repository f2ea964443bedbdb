"""The networks of the studies, in flax linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

NHWC = ("NHWC", "HWIO", "NHWC")


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
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=NHWC) + bias
        h, w = x.shape[1] - k + 1, x.shape[2] - k + 1
        rows = jnp.concatenate([x[:, :, j : j + w] for j in range(k)], axis=-1)
        patches = jnp.concatenate([rows[:, i : i + h] for i in range(k)], axis=-1)
        return patches @ kernel.reshape(k * k * c, self.features) + bias


def max_pool_2x2(x):
    """Take the maximum over 2 x 2 windows: (batch, height, width, c) -> half the height and width."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class PooledConv(nn.Module):
    """A 5 x 5 convolution without padding, then the maximum over 2 x 2 windows.

    Params: kernel (5, 5, in, out), bias (out,). Images are (batch, height, width, channels); with `im2col`
    they are (channels, height, width, batch), and `pooled_conv` computes the layer.
    """

    features: int
    im2col: bool

    @nn.compact
    def __call__(self, x):
        """Height and width become height / 2 - 2 and width / 2 - 2, channels `features`."""
        c = x.shape[0 if self.im2col else -1]
        init = torch_uniform(25 * c)
        kernel = self.param("kernel", init, (5, 5, c, self.features))
        bias = self.param("bias", init, (self.features,))
        if self.im2col:
            return pooled_conv(x, kernel) + bias[:, None, None, None]
        outputs = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=NHWC)
        return max_pool_2x2(outputs + bias)


def pooled_conv(x, kernel):
    """Convolve with 5 x 5 windows and take the maximum over 2 x 2 outputs, by one product.

    (c, height, width, batch), height and width even, and (5, 5, c, out) -> (out, height / 2 - 2,
    width / 2 - 2, batch). Images are the last axis: they fill the vectors of a CPU, however few the channels.

    The four outputs of a pooling window together see 6 x 6 pixels. One product of these patches computes all
    four, with four copies of the kernel, shifted by 0 or 1 and padded with zeros, and the maximum is over
    four blocks of its rows. In blocks of 2 x 2 pixels a patch is 3 x 3, so 9 slices gather all patches, none
    of them strided. That multiplies by 36 pixels instead of 25, but patches have 2.8 times fewer entries.
    """
    c, h, w, batch = x.shape
    out, rows, columns = kernel.shape[-1], h // 2 - 2, w // 2 - 2
    # Pixel (2 i + a, 2 j + b) is at [a, b, :, i, j].
    blocks = x.reshape(c, h // 2, 2, w // 2, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    blocks = blocks.reshape(4 * c, h // 2, w // 2, batch)
    patches = jnp.concatenate([blocks[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)])
    shifted = [jnp.pad(kernel, ((p, 1 - p), (q, 1 - q), (0, 0), (0, 0))) for p in (0, 1) for q in (0, 1)]
    # (6, 6, c, 4, out) -> (3, 3, 2, 2, c, 4 * out): block and pixel in it, in the order of the patches.
    matrix = jnp.stack(shifted, axis=3).reshape(3, 2, 3, 2, c, 4 * out).transpose(0, 2, 1, 3, 4, 5)
    products = matrix.reshape(36 * c, 4 * out).T @ patches.reshape(36 * c, -1)
    return max_of_four(products.reshape(4, out, rows, columns, batch))


@jax.custom_vjp
def max_of_four(x):
    """Return the maximum over the first axis, which has 4 entries; equal ones share the gradient equally."""
    return jnp.maximum(jnp.maximum(x[0], x[1]), jnp.maximum(x[2], x[3]))


def _max_forward(x):
    most = max_of_four(x)
    return most, (x, most)


def _max_backward(saved, grad):
    # JAX's own rule for `max` computes the same, but XLA's sums over such short axes are slow on a CPU.
    x, most = saved
    ties = sum((x[i] == most).astype(grad.dtype) for i in range(4))
    return (jnp.where(x == most, grad / ties, 0),)


max_of_four.defvjp(_max_forward, _max_backward)


class LeNet(nn.Module):
    """The article's LeNet: two 5 x 5 convolutions and two dense layers, 21,840 parameters.

    conv1 (1->10), max-pool, relu; conv2 (10->20), dropout of channels, max-pool, relu; fc1
    (320->50), relu, dropout; fc2 (50->10); log-softmax. `widths` are those of the first three.

    With `im2col` the convolutions are products of patches, which compute the same and are faster on a CPU.
    Accelerators are faster with convolutions, and `channel_groups` and `compact` read those.
    """

    im2col: bool = True
    widths: tuple[int, int, int] = (10, 20, 50)

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, 28, 28, 1), normalised -> log-probabilities (batch, 10)."""
        conv1, conv2, fc1 = self.widths
        x = jnp.swapaxes(x, 0, -1) if self.im2col else x
        x = nn.relu(PooledConv(conv1, self.im2col, name="conv1")(x))
        x = PooledConv(conv2, self.im2col, name="conv2")(x)
        # Whole channels are dropped or doubled, so it is all the same whether before or after the maximum.
        x = nn.relu(nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x))
        x = jnp.swapaxes(x, 0, -1) if self.im2col else x
        x = nn.relu(dense(x.reshape(x.shape[0], -1), fc1, "fc1"))
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


class NormCNN(nn.Module):
    """Three 3 x 3 convolutions with BatchNorm and relu, pooling after the last two, and a dense layer."""

    widths: tuple[int, int, int] = (16, 32, 32)

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (batch, height, width, 1), height and width multiples of 4 -> logits (batch, 10)."""
        for number, features in enumerate(self.widths, start=1):
            x = nn.Conv(features, (3, 3), use_bias=False, name=f"conv{number}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{number}")(x)
            x = nn.relu(x) if number == 1 else max_pool_2x2(nn.relu(x))
        return dense(x.reshape(x.shape[0], -1), 10, "head")
