"""Scores say how much each entry of the params matters; the entries with the lowest scores are pruned.

A score is a pure function `score(params, *, grads, key, **extra) -> scores`. It returns a tree like `params`
of real numbers, where larger means keep. It takes the arguments it needs and ignores the others, so a new
score is a plain function:

```python
def distance_from_init(params, *, init_params, **_):
    return jax.tree.map(lambda w, w0: jnp.abs(w - w0), params, init_params)

masks = jp.prune_once(params, distance_from_init, sparsity=0.9, init_params=params_at_init)
```

A criterion that needs the loss function, or the network, is made by a factory: `jp.scores.fisher(loss_fn)`
is a score, and takes `batch=...` from `prune_once`; `loss_fn(params, batch)` returns the mean loss, a scalar.
Such a score raises TypeError if the loss, or a leaf that `where` of the factory selects, is not real, and
ValueError if `batch` is missing or `where` matches nothing. Entries that a criterion does not cover score
NaN, which `prune_once` refuses to rank.
"""

# Of residual blocks, for structures.layers
from jaxprune.scores.blocks import block_influence

# From weights and statistics of what each layer reads
from jaxprune.scores.calibrated import flap, obs_diagonal, ria, wanda

# From whole channels, for structures.slices
from jaxprune.scores.channels import apoz, bn_scale, fpgm, mean_activation

# From the network, without data
from jaxprune.scores.flow import synflow

# From weights and gradients
from jaxprune.scores.gradients import gradient_magnitude, movement, signed_taylor, snip, taylor

# Made from a loss function
from jaxprune.scores.loss import brute_force, fisher, grasp, obd, obs, over_batches

# From the weights alone
from jaxprune.scores.weights import lamp, magnitude, normalized_magnitude, random

__all__ = [
    "apoz",
    "block_influence",
    "bn_scale",
    "brute_force",
    "fisher",
    "flap",
    "fpgm",
    "gradient_magnitude",
    "grasp",
    "lamp",
    "magnitude",
    "mean_activation",
    "movement",
    "normalized_magnitude",
    "obd",
    "obs",
    "obs_diagonal",
    "over_batches",
    "random",
    "ria",
    "signed_taylor",
    "snip",
    "synflow",
    "taylor",
    "wanda",
]
