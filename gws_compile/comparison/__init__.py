"""Comparisons: the same training from the same seeds under several settings, and what came of each."""
