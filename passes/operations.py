"""What an operation does with a weight: reads it, passes it on, looks rows up, writes it, or something else."""

from __future__ import annotations

from typing import Any

from torch import fx

# Operation -> positions of the operands that make it a read of a weight. `linear` and convolutions read their weight
# only: a parameter in the place of their input (learned queries, position tables) is an activation. Of a recurrent
# layer, whose weights come as one list, `_positions` tells the list from the initial state.
READS: dict[str, tuple[int, ...]] = {
    "linear": (1,),
    "bilinear": (2,),
    "matmul": (0, 1),
    "imatmul": (1,),
    "inner": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0,),
    "addmm": (1, 2),
    "addmv": (1,),
    "addbmm": (1, 2),
    "baddbmm": (1, 2),
    "einsum": (1, 2, 3, 4, 5, 6, 7, 8),
    "tensordot": (0, 1),
    "multi_dot": (0,),
    "chain_matmul": (0, 1, 2, 3, 4, 5, 6, 7),
    "grouped_mm": (0, 1),
    "_grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
    "conv1d": (1,),
    "conv2d": (1,),
    "conv3d": (1,),
    "conv_transpose1d": (1,),
    "conv_transpose2d": (1,),
    "conv_transpose3d": (1,),
    "convolution": (1,),
    "multi_head_attention_forward": (5, 11, 18, 19, 20),
    "_native_multi_head_attention": (5, 7),
    "_transformer_encoder_layer_fwd": (3, 5, 14, 16),
    "lstm": (2, 3),
    "gru": (2, 3),
    "rnn_tanh": (2, 3),
    "rnn_relu": (2, 3),
    "lstm_cell": (2, 3),
    "gru_cell": (2, 3),
    "rnn_tanh_cell": (2, 3),
    "rnn_relu_cell": (2, 3),
}

_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))

# Reads whose operands are alike, so that only the rest of the graph tells the weight from the activation.
PRODUCTS = frozenset(
    "matmul imatmul inner mm bmm mv addmm addmv addbmm baddbmm einsum tensordot multi_dot chain_matmul".split()
)

# Keyword names of the same operands.
_OPERAND_NAMES: dict[str, tuple[int, str]] = {
    "weight": (1, "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"),
    "other": (1, "matmul"),
    "mat1": (1, "addmm"),
    "mat2": (2, "addmm"),
    "batch1": (1, "addbmm baddbmm"),
    "batch2": (2, "addbmm baddbmm"),
    "mat_a": (0, "grouped_mm _grouped_mm"),
    "mat_b": (1, "grouped_mm _grouped_mm"),
    "a": (0, "tensordot"),
    "b": (1, "tensordot"),
    "in_proj_weight": (5, "multi_head_attention_forward"),
    "out_proj_weight": (11, "multi_head_attention_forward"),
    "q_proj_weight": (18, "multi_head_attention_forward"),
    "k_proj_weight": (19, "multi_head_attention_forward"),
    "v_proj_weight": (20, "multi_head_attention_forward"),
}

# Reads that autocast runs in its lower-precision dtype on every device.
AUTOCAST = frozenset(
    "linear matmul mm bmm addmm addbmm baddbmm einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d multi_head_attention_forward".split()
)

CONVOLUTIONS = frozenset(name for name in READS if name.startswith("conv"))

# The value of their first operand goes on, in another shape or dtype or in part.
TRANSPARENT = frozenset(
    "view reshape t T mT H mH transpose permute swapaxes swapdims movedim moveaxis flatten unflatten ravel "
    "unsqueeze squeeze expand expand_as view_as reshape_as contiguous to type type_as float half bfloat16 double "
    "chunk split split_with_sizes tensor_split unsafe_split unsafe_chunk unbind narrow select slice getitem "
    "index_select clone detach alias cat concat concatenate stack hstack vstack repeat tile repeat_interleave "
    "as_strided pad flip _to_copy broadcast_to adjoint requires_grad_ data to_local full_tensor redistribute "
    "from_local_like _add_batch_dim _wrap_for_grad".split()
)

# Of these, the ones that may change the dtype.
CONVERSIONS = frozenset("to type type_as float half bfloat16 double _to_copy".split())

# Only shape, dtype or device of the operand matter.
METADATA = frozenset(
    "size dim ndim shape stride numel nelement element_size dtype device is_contiguous is_floating_point "
    "is_complex layout requires_grad is_cuda is_cpu storage_offset zeros_like ones_like empty_like full_like "
    "rand_like randn_like new_zeros new_ones new_empty new_full new_tensor sym_size sym_stride sym_numel "
    "get_device is_meta itemsize nbytes is_autocast_enabled _enter_autocast isinstance is_grad_enabled "
    # what torch.func.grad does around the function: the weight is what it differentiates by
    "_set_tensor_requires_grad _autograd_grad".split()
)

# Known to multiply by no weight: what else uses parameters of two or more dims in real models. Their in-place forms
# (``add_``) take the parameter as another operand than the one they write.
OTHERS = frozenset(
    "add sub mul truediv div rsub neg pow exp log sqrt rsqrt square abs sin cos sigmoid tanh relu gelu silu "
    "softplus softmax log_softmax dropout where masked_fill maximum minimum clamp lerp normalize norm vector_norm sum "
    "mean amax amin max min layer_norm rms_norm group_norm batch_norm instance_norm _weight_norm tril triu roll "
    "matrix_exp interpolate grid_sample gather index_put scatter scatter_add scaled_dot_product_attention eq ne lt gt "
    "prelu".split()
)

# Between these two a transform of torch.func is at work on everything that is computed.
TRANSFORM_BEGINS = frozenset("_vmap_increment_nesting _grad_increment_nesting _jvp_increment_nesting".split())
TRANSFORM_ENDS = frozenset("_vmap_decrement_nesting _grad_decrement_nesting _jvp_decrement_nesting".split())

_IN_PLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor setitem delitem".split()
)


def name_of(node: fx.Node) -> str:
    """The bare name of a node's operation: ``linear`` for ``torch._C._nn.linear``, ``T`` for an attribute read."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    packet = getattr(target, "overloadpacket", target)
    name: str = getattr(packet, "__name__", None) or str(packet)
    if name == "getattr" and len(node.args) > 1:
        return str(node.args[1])
    if name == "__get__":  # a tensor property, read through its descriptor
        return getattr(getattr(target, "__self__", None), "__name__", name)
    # Up to torch 2.12 Dynamo wraps a DTensor's methods in functions called prim_to_local and so on.
    return name.removeprefix("prim_").removesuffix(".default").rsplit(".", 1)[-1]


def _holds(value: object, weight: fx.Node) -> bool:
    return value is weight or (isinstance(value, (list, tuple)) and any(_holds(v, weight) for v in value))


def _operands(node: fx.Node, weight: fx.Node, name: str) -> set[int]:
    positions = {i for i, arg in enumerate(node.args) if _holds(arg, weight)}
    for key, arg in node.kwargs.items():
        if _holds(arg, weight):
            position, operations = _OPERAND_NAMES.get(key, (-1, ""))
            positions.add(position if name in operations.split() else -1)
    return positions


def is_read(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node multiplies or convolves with the value in ``weight``, one of its inputs."""
    name = name_of(node)
    return name in READS and not _operands(node, weight, name).isdisjoint(_positions(node, name))


def is_weight_of(node: fx.Node, value: fx.Node) -> bool:
    """Whether the node reads ``value`` where weights stand: in a product of two matrices, as any but the first."""
    name = name_of(node)
    first = READS[name][0] if name in READS else 0
    if name in PRODUCTS and len(READS[name]) > 1 and first < len(node.args) and node.args[first] is value:
        return _operands(node, value, name) > {first}
    return is_read(node, value)


def _positions(node: fx.Node, name: str) -> tuple[int, ...]:
    if name in _RECURRENT:
        # (input, state, weights, has_biases, ...), or with a packed sequence (data, batch_sizes, state, weights, ...)
        return (2,) if len(node.args) > 3 and isinstance(node.args[3], bool) else (3,)
    return READS[name]


def is_transparent(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node's result is the value in ``weight``, rearranged, converted or joined with others."""
    name = name_of(node)
    if name == "_add_batch_dim" and node.args[1] != 0:
        return False  # vmap over another dim than the first: the matrices do not lie one behind the other
    return name in TRANSPARENT and _operands(node, weight, name) == {0}


def is_metadata(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node looks only at shape, dtype or device of ``weight``."""
    name = name_of(node)
    return name in METADATA or (name in TRANSPARENT and 0 not in _operands(node, weight, name))


def is_embedding(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node looks rows up in ``weight``."""
    name = name_of(node)
    return name in ("embedding", "embedding_bag", "_embedding_bag", "take") and node.args[0] is not weight


def is_in_place(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node writes into ``weight``."""
    name = name_of(node)
    if _holds(node.kwargs.get("out"), weight):
        return True
    if name == "requires_grad_" or (not node.args or node.args[0] is not weight):
        return False
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
