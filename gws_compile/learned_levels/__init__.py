"""Levels that are trained: their parameters, how graphs take them, their state."""
