"""How many examples hypothesis draws: as the test says, or as `tests.soak.golden --examples` asks."""

import os

from hypothesis import HealthCheck, settings


def examples(number, share=1):
    """Return the settings of a property.

    Args:
      number: of examples; the same ones in every run.
      share: where JAXPRUNE_EXAMPLES is set, that many are drawn instead, by hypothesis' own seed, and shared
        out among as many cases of the property as this.
    """
    asked = int(os.environ.get("JAXPRUNE_EXAMPLES", "0"))
    return settings(
        deadline=None,
        derandomize=not asked,
        max_examples=-(-asked // share) if asked else number,
        suppress_health_check=[HealthCheck.too_slow],
    )
