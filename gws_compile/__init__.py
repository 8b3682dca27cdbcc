"""Pseudo-quantization training by Gaussian weight sampling, as a ``torch.compile`` backend.

model = torch.compile(model, backend=gws_compile.backend(fmt="fp8_e4m3"))

The rooms, in the order of the data. A graph is compiled: `compiler` gets it from torch.compile, has it rewritten and
keeps a record. `passes` find the reads of weights, select weights and insert their samples. A sample is an operator
of `ops`, with an eager kernel there and Inductor's code in `codegen`; what it computes is written once, in
`numerics`: formats, scales, noise, casts, keys. The compiled graph is called: what the call needs comes from
`runtime` (names and keys of weights, the clock of the draws) and `learned_bits` (trained widths). Seeing: `report`
has records and tables, metrics, histograms and the page. Leaving: `deploy` writes checkpoints that engines load.
Running: `command_line` is ``gws run``, ``gws explain``, ``gws export`` and others; `integrations` serve other packages'
trainers. What a format costs: `comparison` measures it, and `advice` has a scaling law.

The layers, from above; each imports only from those below it:

    api, integrations       the public functions; what other packages' trainers use
    command_line            programs, settings as text, the backend by name
    comparison              the same training under several settings
    compiler                the protocol of torch.compile
    deploy                  what comes out: files of low-bit weights
    report                  what was rewritten and what was not
    learned_levels          trained levels
    learned_bits            trained bit widths
    runtime                 what a call of a compiled graph needs
    passes                  the graph passes, a file each
    codegen                 Inductor's lowerings and loops, the C++ kernel
    ops                     the operators and the public references
    levels                  the cast onto levels, and its operators
    config                  the settings of a backend
    recipes                 named recipes, a file each
    advice                  the scaling law of formats, and fits of it
    settings                what they consist of: settings of a weight, rules, schedules, learned widths
    weight_names            qualified names of weights
    source_names            what Dynamo's sources say of a weight
    numerics                the arithmetic
    torch_internals         every private torch API
    figures, warning        an empty figure of matplotlib; the one category of warnings
"""

from .advice.advise import Advice, advise
from .advice.law import ScalingLaw
from .api import backend, explain
from .command_line.named_backend import named_backend
from .comparison.comparing import compare
from .comparison.intervals import Interval
from .comparison.rows import ComparedRow
from .comparison.summary import Comparison
from .compiler.backend import Backend
from .deploy.export_report import ExportedWeight, ExportReport
from .deploy.manifest import load_export
from .deploy.slicing import slice_pruned
from .learned_bits.summary import BitsSummary
from .numerics.formats import FORMATS, FloatFormat
from .numerics.integers import IntFormat
from .numerics.presets import PRESETS, Preset
from .ops.reference import quantize, sample
from .recipes import RECIPES
from .report.metrics import Metrics, WeightMetrics
from .report.records import GraphBreak, GraphRecord, ProductRecord, ReadRecord, WeightRecord
from .report.report import Report
from .settings.arguments import DEFAULT_EXCLUDE
from .settings.attention import AttentionOperands
from .settings.learned_bits import LearnedBits
from .settings.levels import Levels
from .settings.model_blocks import edge_blocks
from .settings.operands import Operand
from .settings.recipe import Recipe
from .settings.schedule import Schedule
from .settings.sparsity import PrunedGroups
from .warning import GwsWarning

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_EXCLUDE",
    "FORMATS",
    "PRESETS",
    "RECIPES",
    "Advice",
    "AttentionOperands",
    "Backend",
    "BitsSummary",
    "ComparedRow",
    "Comparison",
    "ExportReport",
    "ExportedWeight",
    "FloatFormat",
    "GraphBreak",
    "GraphRecord",
    "GwsWarning",
    "IntFormat",
    "Interval",
    "LearnedBits",
    "Levels",
    "Metrics",
    "Operand",
    "Preset",
    "ProductRecord",
    "PrunedGroups",
    "ReadRecord",
    "Recipe",
    "Report",
    "ScalingLaw",
    "Schedule",
    "WeightMetrics",
    "WeightRecord",
    "advise",
    "backend",
    "compare",
    "edge_blocks",
    "explain",
    "load_export",
    "named_backend",
    "quantize",
    "sample",
    "slice_pruned",
]
