"""Dynamo at work: which compilation runs, what is not traced, what it makes of errors, torch's own records of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .lookup import find, spared


@spared(lambda: ("", ""))
def compilation() -> tuple[str, str]:
    """Inside a backend: which compilation it is, ``"frame/number"``, and why its frame is compiled again, if it is.

    Relies on ``CompileContext.current_compile_id`` and on the ``recompile_reason`` of the compilation metrics.
    Checked on torch 2.11 to 2.15.
    """
    number = find("torch._guards", "CompileContext").current_compile_id()
    metrics = find("torch._dynamo.utils", "get_metrics_context")()
    reason = getattr(metrics, "_metrics", {}).get("recompile_reason") or ""
    # What was compiled before for another backend is no reason: nothing is compiled twice for this one.
    return "" if number is None else str(number), "" if "BACKEND_MATCH" in reason else reason


@spared(dict)
def not_traced() -> dict[str, int]:
    """What made Dynamo leave a frame so far in this process: cause -> how often.

    Relies on ``torch._dynamo.utils.counters["unimplemented"]``. Checked on torch 2.11 to 2.15.
    """
    return dict(find("torch._dynamo.utils", "counters")["unimplemented"])


@spared(lambda: False)
def traces_recurrent_layers() -> bool:
    """Whether Dynamo traces LSTM, GRU and RNN modules.

    Relies on ``torch._dynamo.config.allow_rnn``. Checked on torch 2.11 to 2.15.
    """
    return bool(getattr(find("torch._dynamo", "config"), "allow_rnn", False))


def skip_frame_of(function: Callable[..., Any]) -> None:
    """Have Dynamo leave out the function's own frame and go on in what it calls.

    Relies on ``torch._dynamo.eval_frame.skip_code``. Checked on torch 2.11 to 2.15.
    """
    find("torch._dynamo.eval_frame", "skip_code")(function.__code__)


def raised_by_backend(error: BaseException) -> BaseException:
    """What a backend raised, out of what Dynamo makes of it; every other error as it is.

    Relies on ``torch._dynamo.exc.BackendCompilerFailed.inner_exception``. Checked on torch 2.11 to 2.15.
    """
    failed = find("torch._dynamo.exc", "BackendCompilerFailed")
    return error.inner_exception if isinstance(error, failed) else error


@spared(lambda: None)
def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``), which tlparse shows; made only if there is a trace.

    Relies on ``torch._logging.trace_structured``. Checked on torch 2.11 to 2.15.
    """
    trace_structured = find("torch._logging", "trace_structured")
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


@spared(nullcontext)
def timed(name: str) -> AbstractContextManager[None]:
    """Have torch's own record of compile times (``torch._dynamo.utils.compile_times``) count what runs inside.

    Relies on ``torch._dynamo.utils.dynamo_timed``. Checked on torch 2.11 to 2.15.
    """
    context: AbstractContextManager[None] = find("torch._dynamo.utils", "dynamo_timed")(name)
    return context


@spared(lambda: None)
def value_of_source(source: str) -> Any:
    """Inside a backend: what a source, such as ``L['self']._modules['fc']``, stands for; None if it cannot be told.

    Relies on ``InstructionTranslator.current_tx`` and the ``local_scope`` and ``global_scope`` of its output, in which
    Dynamo's guards evaluate the same text. Checked on torch 2.11 to 2.15.
    """
    translator = find("torch._dynamo.symbolic_convert", "InstructionTranslator")
    try:
        output = translator.current_tx().output
    except AttributeError:  # nothing is traced in this thread
        return None
    try:
        return eval(source, {"L": output.local_scope, "G": output.global_scope})
    except Exception:  # a source that needs Dynamo's helpers, or whose object has gone
        return None
