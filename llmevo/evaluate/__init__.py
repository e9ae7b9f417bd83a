"""The evaluate stage: lm-eval tasks, built once, scored item by item."""
