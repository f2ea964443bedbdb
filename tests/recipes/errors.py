"""What is wrong in a recipe, the line and the key that are named, and what is said."""

HEAD = "version: 1\nprune:\n"
GOOD = HEAD + "  score: magnitude\n  sparsity: 0.5\n"
LAYERWISE = HEAD + "  score: magnitude\n  scope: layerwise\n  sparsity: "
TWO = "prune:\n- {score: magnitude, where: a, sparsity: 0.5}\n- {score: magnitude, where: b, sparsity: 0.5}\n"


def score(text):
    """A section with this score, on line 3."""
    return f"{HEAD}  score: {text}\n  sparsity: 0.5\n"


def sparsity(text):
    """A section with this sparsity, on line 4."""
    return f"{HEAD}  score: magnitude\n  sparsity: {text}\n"


def more(text):
    """A good section with one thing more, on line 5."""
    return f"{GOOD}  {text}\n"


def after(text):
    """A good section and something after it, on line 5."""
    return f"{GOOD}{text}\n"


# Text, line, key, what is said.
WRONG = [
    (more("sparcity: 0.5"), 5, "prune.sparcity", "Did you mean sparsity? Allowed keys: score, sparsity"),
    (more("schedule: 0.5"), 5, "prune.schedule", 'unknown "schedule"'),
    ("prune:\n  score: magnitude\n", 1, "prune", "sparsity must be given"),
    ("version: 2\n" + GOOD[11:], 1, "version", "reads recipes of version 1, got 2"),
    ("version: one\n" + GOOD[11:], 1, "version", 'expected a number, got "one"'),
    ("version: 1\n", None, "", "prune must be given"),
    ("- 1\n", 1, "", "expected a mapping, got a list of 1"),
    ("version: 1\nprune: []\n", 2, "prune", "an empty list prunes nothing"),
    ("study: gradual\nconfig: {}\n", 1, "study", "python -m experiments.gradual --recipe"),
    (score("magnitud"), 3, "prune.score", "Did you mean magnitude?"),
    (score("3"), 3, "prune.score", "expected a text, got 3. Put it in quotes"),
    (HEAD + "  score:\n  sparsity: 0.5\n", 3, "prune.score", "expected a text, got nothing"),
    (score("{a: 1, b: 2}"), 3, "prune.score", "one of the scores with its options"),
    (score("{magnitude: 3}"), 3, "prune.score.magnitude", "has no options, got 3"),
    (score("\n    fisher:\n      chunks: 3"), 5, "prune.score.fisher.chunks", "mean chunk?"),
    (score("\n    fisher:\n      chunk: 2.5"), 5, "prune.score.fisher.chunk", "whole"),
    (score("over_batches"), 3, "prune.score", "over_batches needs score"),
    (score("{over_batches: grasb}"), 3, "prune.score.over_batches", "mean grasp?"),
    (score("{bn_scale: {scales: [a]}}"), 3, "prune.score.bn_scale.scales", "a mapping"),
    (score("{synflow: {rescale: yes}}"), 3, "prune.score.synflow.rescale", "true or false"),
    (sparsity("1.5"), 4, "prune.sparsity", "must be in [0, 1)"),
    (sparsity("-.1"), 4, "prune.sparsity", "must be in [0, 1)"),
    (sparsity(".inf"), 4, "prune.sparsity", "must be in [0, 1)"),
    (sparsity(".nan"), 4, "prune.sparsity", 'expected a number, got ".nan"'),
    (sparsity("on"), 4, "prune.sparsity", 'expected a number, got "on"'),
    (sparsity("true"), 4, "prune.sparsity", "expected a number, got True"),
    (sparsity("010"), 4, "prune.sparsity", "Write plain decimals"),
    (sparsity("1:30"), 4, "prune.sparsity", "Write plain decimals"),
    (sparsity("{}"), 4, "prune.sparsity", "one of per_path, constant"),
    (sparsity("{cubik: 0.5}"), 4, "prune.sparsity.cubik", "Did you mean cubic?"),
    (sparsity("{cubic: 0.5}"), 4, "prune.sparsity.cubic", "needs end_step"),
    (
        sparsity("\n    cubic:\n      sparsity: 0.9\n      end_step: 5\n      begin: 1"),
        8, "prune.sparsity.cubic.begin", "Did you mean begin_step?",
    ),
    (
        sparsity("{cubic: {sparsity: 0.9, begin_step: 9, end_step: 5}}"),
        4, "prune.sparsity.cubic", "begin_step <= end_step",
    ),
    (sparsity("{geometric: 1}"), 4, "prune.sparsity.geometric", "rate in (0, 1)"),
    (sparsity("{erk: 0.5}"), 4, "prune.sparsity", "needs scope='layerwise'"),
    (LAYERWISE + "{erk: 5}\n", 5, "prune.sparsity.erk", "in [0, 1)"),
    (sparsity("{per_path: {}}"), 4, "prune.sparsity.per_path", "it is empty"),
    (
        LAYERWISE + "\n    per_path:\n      a/kernel: 0.5\n      b: 7\n",
        8, "prune.sparsity.per_path.b", "must be in [0, 1)",
    ),
    (
        sparsity("\n    per_path:\n      a: {erk: 0.5}"),
        6, "prune.sparsity.per_path.a", "a number or a schedule",
    ),
    (
        sparsity("\n    per_path: {a: {geometric: 0.5}, b: {one_shot: {sparsity: 0.5, step: 3}}}"),
        5, "prune.sparsity.per_path", "share their begin and end",
    ),
    (more("every: 0"), 5, "prune.every", "every must be an integer of 1 or more"),
    (more("floor: -1"), 5, "prune.floor", "floor must be an integer of 0 or more"),
    (more("memory: 2"), 5, "prune.memory", "memory must be in [0, 1]"),
    (more("of: rest"), 5, "prune.of", "of must be 'total' or 'remaining'"),
    (more("scope: local"), 5, "prune.scope", "scope must be one of"),
    (more("scope: isomorphic"), 5, "prune.scope", "has no kinds"),
    (more("where: []"), 5, "prune.where", "an empty list takes in no leaf"),
    (more("where: {none_of: [a]}"), 5, "prune.where.none_of", "Allowed keys: all_of, any_of, not"),
    (more("where: {any_of: a}"), 5, "prune.where.any_of", "expected a list of predicates"),
    (more("structure: {nm: {n: 4, m: 2}}"), 5, "prune.structure.nm", "0 < n < m"),
    (more("structure: {nm: {n: 3, m: 4}}"), 4, "prune.sparsity", "removes at most 0.25"),
    (more("structure: {slices: {norm: median}}"), 5, "prune.structure.slices.norm", "reductions: max"),
    (more("structure: {slices: {axis: -1.5}}"), 5, "prune.structure.slices.axis", "a whole number"),
    (more("structure: {blocks: [2, x]}"), 5, "prune.structure.blocks[1]", 'a number, got "x"'),
    (more("structure: rows"), 5, "prune.structure", "Allowed structures: "),
    (more("rewire: {rigl: {every: 9, end_step: 5}}"), 5, "prune.rewire.rigl", "end_step must be"),
    (more("rewire: {rigl: 9}"), 5, "prune.rewire.rigl", "rigl needs end_step"),
    (more("every: 3\n  rewire: {rigl: {every: 9, end_step: 50}}"), 5, "prune.every", 'unknown "every"'),
    (
        HEAD + "  score: random\n  sparsity: {geometric: 0.5}\n  rewire: {set: {every: 9, end_step: 50}}\n",
        4, "prune.sparsity", "made once",
    ),
    (after("distillation: 4"), 5, "distillation", "{temperature: 4, alpha: 0.9}, got 4"),
    (after("distillation: {T: 4}"), 5, "distillation.T", "Allowed options of objective: temperature, alpha"),
    (after("distillation: {alpha: 4}"), 5, "distillation", "alpha"),
    (after("stop: 0.9"), 5, "stop", "expected a mapping, got 0.9"),
    (after("stop: {flops: 9}"), 5, "stop.flops", "Allowed keys: sparsity, macs, accuracy"),
    (after("stop: {macs: 0}"), 5, "stop.macs", "1 or more, got 0"),
    (after("stop: {accuracy: 97}"), 5, "stop.accuracy", "(97 % is 0.97)"),
    (after("stop: {sparsity: 0.6}"), 5, "stop.sparsity", "prune.sparsity ends at 0.5"),
    (after("stop: {sparsity: 1}"), 5, "stop.sparsity", "must be in [0, 1)"),
    (more("rewire: {set: {every: 9, end_step: 50}}\nstop: {sparsity: 0.4}"), 6, "stop.sparsity", "same"),
    (
        TWO + "stop:\n  sparsity: 0.4\n",
        5, "stop.sparsity", "several sections",
    ),
    (TWO + "- score: magnitude\n", 4, "prune[2]", "sparsity must be given"),
    (more("sparsity: 0.6"), 5, "prune.sparsity", "the key is there already, at recipe:4"),
    (more("? [a, b]\n  : 3"), 5, "prune", "a key must be a text"),
    (more("where: &all kernels"), 5, "prune", "anchors and aliases"),
    (more("where: *all"), 5, "prune", "anchors and aliases"),
    (more("<<: {a: 1}"), 5, 'prune."<<"', 'unknown "<<"'),
    (more("where: !!python/name:os.system"), 5, "prune", "python/name:os.system"),
    (more("where: !!str kernels"), 5, "prune", "tags"),
    (GOOD + "---\n" + GOOD, 5, "", "a second document"),
    (more("where: [a"), 6, "", "this is not YAML"),
    (GOOD + "\twhere: a\n", 5, "", "this is not YAML"),
    (GOOD + '  where: "\\xZZ"\n', 5, "", "this is not YAML"),
    ("", None, "", "it is empty"),
    ("# nothing\n", None, "", "it is empty"),
]  # fmt: skip


# The same, of what is found when there are params.
UNFIT = [
    (more("where: c/*"), 5, "prune.where", "matches no leaf"),
    (
        LAYERWISE + "{per_path: {c: 0.5}}\n",
        2, "prune", "names 'c', which where= does not take in",
    ),
    (more("structure: {nm: {n: 1, m: 3}}"), 2, "prune", "which 3 does not divide"),
    (more("structure: {slices: 2}"), 2, "prune", "has no axis among"),
    (more("structure: channels"), 5, "prune.structure", "needs groups, which a recipe cannot hold"),
    (score("fisher"), 3, "prune.score", "pass loss_fn=..."),
    (score("synflow"), 3, "prune.score", "pass apply_fn=..., x=..."),
    (
        "prune:\n- {score: magnitude, sparsity: 0.5}\n- score: random\n  where: a/*\n  sparsity: 0.5\n",
        3, "prune[1]", "it takes in a/kernel, which prune[0] (recipe:2) takes in as well",
    ),
    (score("{fisher: {chunk: 0}}"), 3, "prune.score.fisher", "chunk"),
    (more("rewire: {rigl: {every: 9, end_step: 50}}\n  structure: {slices: 2}"), 2, "prune", "has no axis"),
]  # fmt: skip
