"""The public functions: `backend` and `explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .compiler.backend import Backend
from .compiler.tracer import explained
from .config import Config
from .numerics.blocks import Block
from .numerics.elements import ElementFormat
from .numerics.noise import Noise
from .report.report import Report
from .settings.arguments import DEFAULTS, Backward, Inner, Resample
from .settings.attention import AttentionLike
from .settings.learned_bits import LearnedBits
from .settings.levels import Levels
from .settings.operands import OperandLike
from .settings.recipe import Recipe
from .settings.rules import RuleLike
from .settings.schedule import Schedule
from .settings.sparsity import SparsityLike
from .settings.weight_settings import DEFAULT_FORMAT, ScaleSetting


def backend(
    fmt: str | ElementFormat | Levels | None = DEFAULTS.fmt,
    *,
    noise: Noise | None = DEFAULTS.noise,
    bits: float | LearnedBits | None = DEFAULTS.bits,
    block: Block | None = DEFAULTS.block,
    scale: ScaleSetting = DEFAULTS.scale,
    sparsity: SparsityLike = DEFAULTS.sparsity,
    rules: Iterable[RuleLike] = DEFAULTS.rules,
    schedule: Schedule | None = DEFAULTS.schedule,
    activations: OperandLike = DEFAULTS.activations,
    gradients: OperandLike = DEFAULTS.gradients,
    attention: AttentionLike = DEFAULTS.attention,
    recipe: str | Recipe | None = DEFAULTS.recipe,
    include: str | Iterable[str] | None = DEFAULTS.include,
    exclude: str | Iterable[str] | None = DEFAULTS.exclude,
    seed: int = DEFAULTS.seed,
    resample: Resample = DEFAULTS.resample,
    backward: Backward = DEFAULTS.backward,
    inner: Inner = DEFAULTS.inner,
    master: bool = DEFAULTS.master,
    strict: bool = DEFAULTS.strict,
) -> Backend:
    """A ``torch.compile`` backend for pseudo-quantization training by Gaussian weight sampling.

    Every weight read ``w`` in the traced graph becomes ``cast(w + R * a * 2**(1 - b))``, with ``a`` the maximum of
    its block, R drawn anew for each optimizer step, and the identity as its gradient (Ahn & Yoo, "Gaussian Weight
    Sampling for Scalable, Efficient and Stable Pseudo-Quantization Training", arXiv 2505.11170). While gradients are
    disabled, and for frozen weights, it becomes ``cast(w)``.

    Args:
        fmt: format of the cast: a name in `FORMATS`, any ``"eXmY"``, ``"int2"`` to ``"int8"``, a `FloatFormat` or
            `IntFormat`; a name in `PRESETS`, which also says block and scale; or `Levels`, which are trained;
            ``"fp8_e4m3"`` when None. With learned widths it is the format of training, and the widest of their formats
            (bf16) when None.
        noise: law of R: ``"rounded_normal"``, round(N(0,1) / 2); ``"uniform"``, DiffQ's U(-1/2, 1/2); ``"none"``, the
            cast alone with a straight-through gradient. When None ``"rounded_normal"``, or what the recipe says; with
            `Levels` ``"none"``.
        bits: bit width b, 2 to 24, of the noise amplitude; when None the format's mantissa bits + 2, and N for intN.
            `LearnedBits` for widths that are trained.
        block: rows and columns that share a maximum and a scale, None for a whole side: (1, None) is a row,
            (None, None) the matrix. The preset's, or (32, 32), when None.
        scale: the block scale's rule: ``"floor"`` (OCP MX v1.0), ``"ceil"``, ``"amax"`` (exact, float32), ``"nvfp4"``
            (two levels), or None for no scale. ``"auto"`` is the preset's, ``"amax"`` for integers, ``"floor"``
            otherwise.
        sparsity: which elements of weights are zero: ``"2:4"`` or another ``"N:M"``, N of M consecutive inputs that are
            kept, or `PrunedGroups` of whole rows or columns. Dense when None.
        rules: settings by name, the first that matches wins: ``(glob, "nvfp4")``, ``(glob, {"fmt": ..., "bits": ...,
            "block": ..., "scale": ..., "noise": ..., "sparsity": ...})``, or ``(glob, None)`` for weights that are left
            alone. Weights that ``exclude`` names stay so.
        schedule: `Schedule` of the noise: from which draw to which, and its bit width over draws; and of the products
            that are rounded.
        activations: how the activations that weights are multiplied with are rounded, an `Operand` or a format, in
            forward and in wgrad. Not at all when None.
        gradients: how the gradients that come in from behind are rounded, an `Operand` or a format, in dgrad and in
            wgrad. Not at all when None.
        attention: how queries, keys, values and probabilities of attention are rounded: `AttentionOperands`, an
            `Operand` or a format for all four, or ``"fp8_tiles"``. Not at all when None.
        recipe: settings of weights, activations, gradients and attention by one name: ``"mxfp8"``, ``"mxfp4"``,
            ``"nvfp4"``, ``"fp8_block"``, ``"fp8_tensor"``, ``"exmy"``, or a `Recipe`. Other arguments win over it.
        include: globs on qualified names; only weights that match one are rewritten. All when None.
        exclude: globs on qualified names that are left alone; output heads and routers by default. It wins over
            ``include``.
        seed: 0 to 2**64 - 1; equal seeds draw equal noise.
        resample: ``"step"``: new noise once per optimizer step; ``"forward"``: in each graph of every training forward.
        backward: ``"save"`` keeps the sampled weight for backward; ``"recompute"`` samples it again there and keeps
            nothing.
        inner: who compiles the rewritten graph: ``"inductor"``, ``"aot_eager"``, ``"eager"``, or a backend of your own,
            a callable ``(gm, example_inputs) -> callable``.
        master: False to train without master weights: behind each optimizer step the sampled parameters are rounded
            stochastically to their format's grid, on which they lie between steps; there is no noise then.
        strict: an error, instead of a warning, when no weight is rewritten or an included one is left alone.

    Returns:
        A `Backend`, for ``torch.compile(model, backend=...)``.

    Raises:
        ValueError: a bad value; the message names it and what is accepted.
    """
    return Backend(
        Config.make(
            fmt,
            noise=noise,
            bits=bits,
            block=block,
            scale=scale,
            sparsity=sparsity,
            rules=rules,
            schedule=schedule,
            activations=activations,
            gradients=gradients,
            attention=attention,
            recipe=recipe,
            include=include,
            exclude=exclude,
            seed=seed,
            resample=resample,
            backward=backward,
            inner=inner,
            master=master,
            strict=strict,
        )
    )


def explain(
    model: Callable[..., Any],
    *args: Any,
    fmt: str | ElementFormat | Levels = DEFAULT_FORMAT,
    backend: Backend | None = None,
    **kwargs: Any,
) -> Report:
    """Say what would be rewritten, without compiling anything.

    Traces ``model(*args, **kwargs)``, rewrites its graphs, and runs the model as it is, once, so that graph breaks are
    followed. The global random state is restored; buffers that the forward updates (batch norm) are updated.

    Of a module every weight is listed: those that no graph has too, under their names in the module.

    Args:
        model: a module or function.
        *args: the call's positional arguments.
        fmt: the format, when no ``backend`` is given.
        backend: a backend whose settings are used; it is not changed.
        **kwargs: the call's keyword arguments.

    Returns:
        The report: every weight, rewritten or with the reason why not; graphs, graph breaks and recompilations.
        `Report.to_html` makes a page of it.
    """
    config = Config.make(fmt) if backend is None else backend.config
    return explained(model, args, kwargs, config)
