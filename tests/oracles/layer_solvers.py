"""Solvers of one layer in numpy float64, as the papers state them, and layers to compare them on."""

import numpy as np


def layer(seed: int, rows: int, inputs: int, outputs: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Make inputs (rows, in) of low rank with noise and features of unequal scale; weights (out, in)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, inputs)) / np.sqrt(rank)
    x = x + 0.05 * rng.normal(size=(rows, inputs))
    x = x * np.exp(0.8 * rng.normal(size=inputs))
    return x.astype(np.float32), (rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)


def output_error(x: np.ndarray, dense: np.ndarray, weight: np.ndarray) -> float:
    """Return `||X (W - V)^T|| / ||X W^T||`."""
    x, dense, weight = (np.asarray(array, np.float64) for array in (x, dense, weight))
    return float(np.linalg.norm(x @ (dense - weight).T) / np.linalg.norm(x @ dense.T))


def lowest_first(scores: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` lowest, of equal ones the first."""
    marked = np.zeros(scores.size, bool)
    marked[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return marked.reshape(scores.shape)


def sparsegpt(
    weight: np.ndarray,
    gram: np.ndarray,
    count: int,
    width: int,
    *,
    group: tuple[int, int] | None = None,
    per_output: bool = False,
    damping: float = 0.01,
    scale: np.ndarray | None = None,
    bits: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Sweep the columns in blocks, with the explicit inverse of H and its Cholesky factor."""
    weight, gram = weight.astype(np.float64).copy(), gram.astype(np.float64).copy()
    inputs, most = weight.shape[1], 2 ** (bits - 1) - 1
    mean, dead = np.mean(np.diag(gram)), np.diag(gram) == 0
    gram[dead, dead] = 1
    gram[np.diag_indices(inputs)] += damping * mean
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    mask = np.ones(weight.shape, bool)
    for start in range(0, inputs, width):
        end = min(start + width, inputs)
        if group is None:
            scores = (weight[:, start:end] / np.diag(upper)[start:end]) ** 2
            quota = count * end // inputs - count * start // inputs
            parts = scores if per_output else [scores]
            mask[:, start:end] = ~np.reshape([lowest_first(part, quota) for part in parts], scores.shape)
        for j in range(start, end):
            if group is not None and j % group[1] == 0:
                scores = (weight[:, j : j + group[1]] / np.diag(upper)[j : j + group[1]]) ** 2
                gone = [lowest_first(row, group[1] - group[0]) for row in scores]
                mask[:, j : j + group[1]] = ~np.array(gone)
            column = weight[:, j].copy()
            rounded = column
            if scale is not None:
                rounded = np.clip(np.round(column / scale), -most, most) * scale
            weight[:, j] = np.where(mask[:, j], rounded, 0)
            error = (column - weight[:, j]) / upper[j, j]
            weight[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return weight, mask


def least_squares(x: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Solve for the kept weights of each output by `lstsq`; `targets` are the outputs (rows, out)."""
    # With X = Q R the errors are those of R and Q^T Y, up to a part that no weight changes: fewer rows.
    turned, rows = np.linalg.qr(x.astype(np.float64))
    wanted = turned.T @ targets.astype(np.float64)
    weight = np.zeros(mask.shape)
    for number, kept in enumerate(mask):
        weight[number, kept] = np.linalg.lstsq(rows[:, kept], wanted[:, number], rcond=None)[0]
    return weight


def error_on(gram: np.ndarray, dense: np.ndarray, kept: np.ndarray) -> float:
    """Return the least squared error of a row, `(w - w0) H (w - w0)`, that the kept entries allow."""
    gone = ~kept
    schur = gram[np.ix_(gone, gone)]
    if kept.any():
        across = gram[np.ix_(kept, gone)]
        schur = schur - across.T @ np.linalg.solve(gram[np.ix_(kept, kept)], across)
    return float(dense[gone] @ schur @ dense[gone])


def obc(
    weight: np.ndarray, gram: np.ndarray, count: int, *, group: tuple[int, int] | None = None
) -> np.ndarray:
    """Remove, `count` times, the entry of the matrix whose removal raises the least squared error least."""
    weight, gram = weight.astype(np.float64), gram.astype(np.float64)
    mask = np.ones(weight.shape, bool)
    for _ in range(count):
        best = (np.inf, 0, 0)
        for row, kept in enumerate(mask):
            now = error_on(gram, weight[row], kept)
            for at in np.flatnonzero(kept):
                if group is not None:
                    first = at // group[1] * group[1]
                    if kept[first : first + group[1]].sum() <= group[0]:
                        continue
                without = kept.copy()
                without[at] = False
                best = min(best, (error_on(gram, weight[row], without) - now, row, int(at)))
        mask[best[1], best[2]] = False
    return mask


def channels(layers: list, num_groups: int, count: int) -> np.ndarray:
    """Remove, `count` times, the group of inputs that raises the summed least squared errors least."""
    kept = np.ones(num_groups, bool)

    def error(kept: np.ndarray) -> float:
        total = 0.0
        for weight, gram, groups in layers:
            inputs = np.array([number < 0 or kept[number] for number in groups])
            total += sum(error_on(gram, row, inputs) for row in np.asarray(weight, np.float64))
        return total

    for _ in range(count):
        tried = []
        for number in np.flatnonzero(kept):
            without = kept.copy()
            without[number] = False
            tried.append((error(without), number))
        kept[min(tried)[1]] = False
    return kept
