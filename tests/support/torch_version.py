"""The installed torch, for what its versions do otherwise."""

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
"""Its major and minor version, as (2, 13)."""
