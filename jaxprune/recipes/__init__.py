"""Recipes: a pruning run as a YAML file or a dict, executed by the same pruner as one in Python.

```yaml
version: 1
prune:                       # one section, or a list of them, of disjoint leaves
  score: magnitude           # of jaxprune.scores, or {fisher: {chunk: 8}}
  structure: {nm: {n: 2, m: 4}}
  scope: global
  where: {all_of: [kernels, {not: head/*}]}
  sparsity: {cubic: {sparsity: 0.5, begin_step: 1000, end_step: 8000}}
  every: 100
distillation: {temperature: 4, alpha: 0.9}
stop: {accuracy: 0.97}
```

```python
recipe = jp.recipes.load("recipe.yaml")
tx = jp.wrap_optax(optax.adamw(1e-3), recipe.pruner(params))
loss_fn = jp.distillation.objective(apply_fn, teacher, **recipe.distillation)
reason_to_stop = recipe.stop.reached(accuracy=accuracy)
```

The keys of a section are the arguments of `jaxprune.pruner`: a name stands for the function of that name,
`{name: {option: value}}` for a call with options, `{name: value}` for a call with the first option alone.
`sparsity` is a number, a schedule, a distribution such as `{erk: 0.9}`, or `{per_path: {...}}`; the
`sparsity` of a schedule may be one of the last two. With `rewire: {rigl: {every: 100, end_step: 8000}}` the
section makes masks once, and these then move. `where` is `kernels`, a pattern of paths, a list of these, or
`all_of`, `any_of`, `not`. `distillation` has the options of `jaxprune.distillation.objective`, `stop` the
fields of `Stop`.

Nothing in a recipe is executed, and a recipe with anything unknown in it is refused, with the line and key.
"""

from jaxprune.recipes.document import RecipeError
from jaxprune.recipes.recipe import Recipe, Stop, load, parse

__all__ = ["Recipe", "RecipeError", "Stop", "load", "parse"]
