"""From scores to masks: once, over time, and with masks that move."""
