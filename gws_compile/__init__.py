"""Pseudo-quantization training by Gaussian weight sampling, as a ``torch.compile`` backend.

model = torch.compile(model, backend=gws_compile.backend(fmt="fp8_e4m3"))
"""

from .api import backend, explain
from .compiler import Backend
from .config import DEFAULT_EXCLUDE
from .entry_point import named_backend
from .formats import FORMATS, FloatFormat
from .learned import LearnedBits
from .metrics import Metrics, WeightMetrics
from .reference import quantize, sample
from .report import BitsSummary, GraphBreak, GraphRecord, ReadRecord, Report, WeightRecord
from .warning import GwsWarning

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_EXCLUDE",
    "FORMATS",
    "Backend",
    "BitsSummary",
    "FloatFormat",
    "GraphBreak",
    "GraphRecord",
    "GwsWarning",
    "LearnedBits",
    "Metrics",
    "ReadRecord",
    "Report",
    "WeightMetrics",
    "WeightRecord",
    "backend",
    "explain",
    "named_backend",
    "quantize",
    "sample",
]
