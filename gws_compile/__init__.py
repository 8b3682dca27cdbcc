"""Pseudo-quantization training by Gaussian weight sampling, as a torch.compile backend."""

from .config import DEFAULT_EXCLUDE, LearnedBits
from .formats import FORMATS, FloatFormat
from .reference import quantize

__all__ = ["DEFAULT_EXCLUDE", "FORMATS", "FloatFormat", "LearnedBits", "quantize"]
