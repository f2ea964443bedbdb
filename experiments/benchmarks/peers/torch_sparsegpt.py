"""SparseGPT in PyTorch, as the paper states it: one matrix, float32, in place.

    python -m experiments.benchmarks.peers.torch_sparsegpt --shapes 512x512 2048x2048

It needs torch and numpy alone.
"""

import argparse
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, sparsity: float, block: int = 128, damping: float = 0.01
) -> torch.Tensor:
    """Prune (out, in) in place to a sparsity, with the Gram matrix (in, in) of its inputs; return the weight.

    The number removed from each block of columns is the sparsity of the columns so far, rounded down, less
    what is gone.
    """
    columns = weight.shape[1]
    gram = gram.clone()
    diagonal = torch.diagonal(gram)
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1
    diagonal += damping * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    count, gone = round(sparsity * weight.numel()), 0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        now, own = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.zeros_like(now)
        scores = (now / torch.diagonal(own)) ** 2
        quota = count * end // columns - gone
        gone += quota
        kept = torch.ones_like(now, dtype=torch.bool)
        if quota:
            kept.view(-1)[torch.topk(scores.view(-1), quota, largest=False).indices] = False
        for j in range(end - start):
            column = now[:, j]
            rounded = torch.where(kept[:, j], column, 0)
            error = (column - rounded) / own[j, j]
            now[:, j:] -= torch.outer(error, own[j, j:])
            weight[:, start + j] = rounded
            errors[:, j] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


class TorchDecoder:
    """A decoder that is pruned block by block, as the paper's published loop does it.

    For each block: all batches run through it, and hooks gather the Gram matrix of each layer's inputs; its
    layers are pruned; all batches run through it again.
    """

    def __init__(self, params: dict[str, Any], batches: list[Any], heads: int, sparsity: float, threads: int):
        """Take params as numpy arrays of (in, out), and token numbers."""
        torch.set_num_threads(threads)
        self.params, self.heads, self.sparsity = params, heads, sparsity
        self.batches = [torch.from_numpy(batch) for batch in batches]

    @torch.no_grad()
    def prune(self) -> float:
        """Return the seconds that it takes."""
        embed = torch.from_numpy(self.params["embed"])
        blocks = [_Block(layer, self.heads) for layer in self.params["layers"]]
        began = time.perf_counter()
        data = [embed[batch] for batch in self.batches]
        for block in blocks:
            grams = {
                name: torch.zeros(layer.in_features, layer.in_features)
                for name, layer in block.named_children()
            }

            hooks = [
                layer.register_forward_hook(_gatherer(grams[name])) for name, layer in block.named_children()
            ]
            for each in data:
                block(each)
            for each in hooks:
                each.remove()
            for name, layer in block.named_children():
                sparsegpt(layer.weight.data, grams[name], self.sparsity)
            data = [block(each) for each in data]
        return time.perf_counter() - began


def _gatherer(gram: torch.Tensor) -> Any:
    """Return a hook that adds what a layer reads to a Gram matrix."""

    def hook(layer: Any, inputs: Any, output: Any) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        gram.addmm_(rows.T, rows)

    return hook


class _Block(torch.nn.Module):
    def __init__(self, params: dict[str, Any], heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q", "k", "v", "out", "up", "down"):
            layer = torch.nn.Linear(*params[name].shape, bias=False)
            layer.weight.data = torch.from_numpy(params[name].T.copy())
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = torch.nn.functional.layer_norm(x, (width,))
        q, k, v = (
            layer(y).reshape(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        y = torch.nn.functional.layer_norm(x, (width,))
        return x + self.down(torch.nn.functional.gelu(self.up(y), approximate="tanh"))


def main() -> None:
    """Print the least time of some runs for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["512x512", "2048x512", "2048x2048"], help="out x in")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    for shape in flags.shapes:
        outputs, columns = map(int, shape.split("x"))
        inputs = torch.randn(2 * columns, columns // 4) @ torch.randn(columns // 4, columns)
        inputs += 0.1 * torch.randn(2 * columns, columns)
        weight, gram = torch.randn(outputs, columns), inputs.T @ inputs
        times = []
        for _ in range(flags.repeat):
            start = time.perf_counter()
            sparsegpt(weight.clone(), gram, 0.5)
            times.append(time.perf_counter() - start)
        print(f"torch {torch.__version__}, {shape}: {min(times):.3f} s")


if __name__ == "__main__":
    main()
