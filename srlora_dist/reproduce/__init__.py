"""A table of the paper once more: a grid of runs, one after the other, and their results beside the paper's."""
