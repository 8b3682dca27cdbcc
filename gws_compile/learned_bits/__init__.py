"""Trained bit widths: their parameters, gradients over ranks, the constraint on their average, their pictures."""
