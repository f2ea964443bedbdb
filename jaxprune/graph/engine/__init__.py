"""The constraint graph of a function: which slices it needs, and the function without the others.

In reading order:

- `ir`: values, ops, regions, and loops over layers; `axes`: the graph of constraints between axes.
- `tracing` makes a program from a function, with `building` (values and stacks), `layerwise` and `peeling`
  (ops on stacks, layer by layer), `derivatives`, `stacking` (which params are stacks), `liveness`.
- `readers` and `origins`: what several layers read must not tie them.
- `rules/`: what each primitive asks of the axes, learns of zeros, and does on smaller arrays.
- `facts`: what is known of values, zero slices above all.
- `program`: a function with all of this, `TracedNetwork`; `solving`: the fewest slices that it needs.
- `replay` runs a program on what is left, with `rolling`, `positions` and `same_program` (one loop for all
  layers), `representatives` (dropped slices that are not zero) and `placing` (shardings).
- `divisors`, `singular`, `finite`: where a zero would make the function NaN or infinite.
- `identity`, `passage`, `shortening`: residual blocks that can be removed with all their params.
"""
