"""What is used of torch beyond its documentation: each name, the feature that it serves, and what else could.

`gws_compile.torch_internals.lookup.find` reads the names, and says with an error which feature is lost where one has
gone. `docs/torch.md` has both lists as tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """One name.

    Attributes:
        feature: what does not work without it.
        public: the public name that comes close, and why it does not serve; empty where there is none.
    """

    feature: str
    public: str = ""


_LOWERING = "Inductor's code for a sample; inner='aot_eager' does without"
_KERNEL = "the C++ kernel of a sample; the code that Inductor generates takes its place"
_GIVEN = "finding the models that a backend was given to, for reports and warnings"
_FAKE = "graphs that are called on fake tensors, and Backend.prepare"
_SIGNATURES = "finding an operation's operands by their names"
_PRODUCTS = "activations and gradients that are rounded (activations=, gradients=, recipe=)"
_ATTENTION = "attention that is rounded (attention=)"
_SHARDS = "blocks and noise of sharded weights (FSDP2, tensor parallelism)"

PRIVATE_NAMES: Mapping[str, PrivateName] = {
    "torch._C._is_alias_of": PrivateName(
        "telling views of a weight from copies", "Tensor.untyped_storage().data_ptr(): fake tensors have none"
    ),
    "torch._C._jit_get_schemas_for_operator": PrivateName(_SIGNATURES),
    "torch._C._set_grad_enabled": PrivateName(
        "regions of no_grad and enable_grad in another form of a graph",
        "torch.set_grad_enabled is a class; this is what Dynamo writes into graphs",
    ),
    "torch._TorchCompileInductorWrapper": PrivateName(
        "inner='inductor' with mode= and options=", "torch.compile, which would trace the graph once more"
    ),
    "torch._TorchCompileWrapper": PrivateName(_GIVEN),
    "torch._dynamo.backends.common.aot_autograd": PrivateName(
        _PRODUCTS, "torch._functorch.aot_autograd is private too"
    ),
    "torch._dynamo.config": PrivateName("the reasons of recurrent layers in reports"),
    "torch._dynamo.eval_frame.OptimizedModule": PrivateName(
        "models made by torch.compile(model), behind their wrapper"
    ),
    "torch._dynamo.eval_frame.skip_code": PrivateName(
        "gws run --auto", "torch.compiler.disable leaves out what is called, too"
    ),
    "torch._dynamo.exc.BackendCompilerFailed": PrivateName("the original error of a backend, in gws run and explain"),
    "torch._dynamo.lookup_backend": PrivateName(
        "inner= by a name other than 'inductor'", "torch.compile, which would trace the graph once more"
    ),
    "torch._dynamo.symbolic_convert.InstructionTranslator": PrivateName(
        "full names of weights that Dynamo reads through attributes, dicts and closures"
    ),
    "torch._dynamo.trace_rules.check": PrivateName("the warning about torch's own modules compiled in place"),
    "torch._dynamo.utils.counters": PrivateName("graph breaks and frames left out, in explain"),
    "torch._dynamo.utils.dynamo_timed": PrivateName("the passes in torch's compile times"),
    "torch._dynamo.utils.get_metrics_context": PrivateName("the causes of recompilations in reports"),
    "torch._functorch.aot_autograd.make_boxed_func": PrivateName(_PRODUCTS),
    "torch._functorch.partitioners.min_cut_rematerialization_partition": PrivateName(_PRODUCTS),
    "torch._guards.CompileContext": PrivateName("the numbers of compilations in reports"),
    "torch._guards.detect_fake_mode": PrivateName(_FAKE),
    "torch._higher_order_ops.wrap.tag_activation_checkpoint": PrivateName("checkpoints inside a graph"),
    "torch._inductor.codegen.cpp_template_kernel.CppTemplateKernel": PrivateName(_KERNEL),
    "torch._inductor.codegen.cpp_utils.DTYPE_TO_CPP": PrivateName(_KERNEL),
    "torch._inductor.config": PrivateName(_KERNEL),
    "torch._inductor.cpu_vec_isa.pick_vec_isa": PrivateName(
        _KERNEL, "torch.backends.cpu.get_cpu_capability(), which does not know Inductor's settings"
    ),
    "torch._inductor.custom_graph_pass.CustomGraphPass": PrivateName(_PRODUCTS),
    "torch._inductor.decomposition.select_decomp_table": PrivateName(
        "the products of graphs in reports; fusing the cast onto levels"
    ),
    "torch._inductor.ir.ComputedBuffer": PrivateName(_LOWERING),
    "torch._inductor.ir.CppTemplateBuffer": PrivateName(_KERNEL),
    "torch._inductor.ir.ExternKernel": PrivateName(_LOWERING),
    "torch._inductor.ir.FixedLayout": PrivateName(_LOWERING),
    "torch._inductor.ir.FlexibleLayout": PrivateName(_LOWERING),
    "torch._inductor.ir.Pointwise": PrivateName(_LOWERING),
    "torch._inductor.ir.Reduction": PrivateName(_LOWERING),
    "torch._inductor.ir.ReductionHint": PrivateName(_LOWERING),
    "torch._inductor.ir.Scatter": PrivateName(_LOWERING),
    "torch._inductor.ir.TensorBox": PrivateName(_LOWERING),
    "torch._inductor.ir.as_storage_and_layout": PrivateName(_LOWERING),
    "torch._inductor.lowering.lowerings": PrivateName(_LOWERING),
    "torch._inductor.lowering.register_lowering": PrivateName(_LOWERING),
    "torch._inductor.lowering.to_dtype": PrivateName(_LOWERING),
    "torch._inductor.utils.Placeholder": PrivateName(_KERNEL),
    "torch._inductor.utils.parallel_num_threads": PrivateName(
        _KERNEL, "torch.get_num_threads(), which does not know Inductor's settings"
    ),
    "torch._inductor.virtualized.V": PrivateName(_LOWERING),
    "torch._inductor.virtualized.ops": PrivateName(_LOWERING),
    "torch._logging.trace_structured": PrivateName("the graphs in torch's structured trace (TORCH_TRACE)"),
    "torch._ops.HigherOrderOperator": PrivateName("telling operators that call a graph from others"),
    "torch._subclasses.fake_tensor.FakeTensor": PrivateName(_FAKE),
    "torch._subclasses.fake_tensor.FakeTensorMode": PrivateName("Backend.prepare"),
    "torch.amp.autocast_mode._enter_autocast": PrivateName(_ATTENTION),
    "torch.amp.autocast_mode._exit_autocast": PrivateName(_ATTENTION),
    "torch.distributed.pipelining.stage._PipelineStageBase": PrivateName(
        "names of weights in pipeline stages", "PipelineStage, which is not the base of traced pipelines' stages"
    ),
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": PrivateName(_SHARDS),
    "torch.utils._pytree.tree_map_only": PrivateName(_FAKE, "torch.utils._pytree has no public name up to 2.15"),
    "torch.utils._python_dispatch._disable_current_modes": PrivateName(
        "making clocks, keys and widths while fake tensors are in force"
    ),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": PrivateName("reasons for tensor subclasses"),
    "torch.utils._sympy.functions.FloorDiv": PrivateName(_LOWERING),
    "torch.utils._sympy.functions.ModularIndexing": PrivateName(_LOWERING),
}
"""The names that `find` reads, by their paths."""

PRIVATE_ATTRIBUTES: Mapping[str, PrivateName] = {
    "_call_impl": PrivateName("gws run --auto, and the warning about torch's own modules compiled in place"),
    "_codegen": PrivateName("copies of Dynamo's graphs"),
    "_compiled_call_impl": PrivateName(_GIVEN),
    "_current_graph_task_id": PrivateName("regions that backward computes again"),
    "_dynamo_source": PrivateName("the names of weights"),
    "_execution_engine": PrivateName("learned widths under DDP and FSDP2", "post-accumulate hooks come too early"),
    "_fsdp_param_group": PrivateName("learned widths under FSDP2"),
    "_get_fsdp_state": PrivateName("learned widths under FSDP2"),
    "_is_tracing": PrivateName("gws run --auto beside torch.jit.trace", "torch.jit.is_tracing, which is not exported"),
    "_local_tensor": PrivateName(_SHARDS, "DTensor.to_local(), which a graph records"),
    "_metrics": PrivateName("the causes of recompilations in reports"),
    "_orig_mod": PrivateName("models made by torch.compile(model), behind their wrapper"),
    "_param_name_to_source": PrivateName("copies of Dynamo's graphs"),
    "_parameters": PrivateName("the place of a weight", "named_parameters(recurse=False): slow, asked at each call"),
    "_qualified_op_name": PrivateName("names of custom operators in reports"),
    "_schema": PrivateName(_SIGNATURES),
    "_torchdynamo_orig_backend": PrivateName(_GIVEN),
    "_torchdynamo_orig_callable": PrivateName("the warning about torch's own modules compiled in place"),
    "_version": PrivateName(
        "the warning of learned widths and levels that no optimizer has",
        "Tensor.register_post_accumulate_grad_hook, which compiled autograd would trace",
    ),
}
"""The attributes of torch's objects that this room reads or writes, by their names."""
