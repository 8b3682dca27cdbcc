"""What an operation does with a weight: reads it, passes it on, scales it, looks rows up in it, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from gws_compile.torch_internals.graphs import example_value
from gws_compile.torch_internals.signatures import namespace_of

from .operands import Operand, operands, reflected

# Operation -> names of the operands that make it a read of a weight, as its signature has them: `self` is a method's
# own tensor and a function's `input`. Functions in Python have other names than torch's operators: `a`, `args`.
# `linear` and convolutions read their weight only: a parameter in the place of their input (learned queries, position
# tables) is an activation.
READS: dict[str, str] = {
    "linear": "weight",
    "bilinear": "weight",
    "matmul": "self other",
    "imatmul": "b",
    "inner": "self other",
    "mm": "self mat2",
    "bmm": "self mat2",
    "mv": "self",
    "dot": "self tensor",
    "vdot": "self other",
    "vecdot": "x y",
    "addmm": "mat1 mat2",
    "addmm_": "mat1 mat2",
    "addmv": "mat",
    "addmv_": "mat",
    "addbmm": "batch1 batch2",
    "addbmm_": "batch1 batch2",
    "baddbmm": "batch1 batch2",
    "baddbmm_": "batch1 batch2",
    "einsum": "args tensors",
    "tensordot": "a b self other",
    "multi_dot": "tensors",
    "chain_matmul": "matrices",
    "grouped_mm": "mat_a mat_b",
    "_grouped_mm": "self mat2",
    "transformers::grouped_mm_fallback": "input weight",
    "conv1d": "weight",
    "conv2d": "weight",
    "conv3d": "weight",
    "conv_tbc": "weight",
    "conv_transpose1d": "weight",
    "conv_transpose2d": "weight",
    "conv_transpose3d": "weight",
    "convolution": "weight",
    "multi_head_attention_forward": "in_proj_weight out_proj_weight q_proj_weight k_proj_weight v_proj_weight",
    "_native_multi_head_attention": "qkv_weight proj_weight",
    "_transformer_encoder_layer_fwd": "qkv_weight proj_weight ffn_weight_1 ffn_weight_2",
    "lstm": "params",
    "gru": "params",
    "rnn_tanh": "params",
    "rnn_relu": "params",
    "lstm_cell": "w_ih w_hh",
    "gru_cell": "w_ih w_hh",
    "rnn_tanh_cell": "w_ih w_hh",
    "rnn_relu_cell": "w_ih w_hh",
}

# Reads whose operands are alike, so that only the rest of the graph tells the weight from the activation.
PRODUCTS = frozenset(
    "matmul imatmul inner mm bmm mv dot vdot vecdot addmm addmm_ addmv addmv_ addbmm addbmm_ baddbmm baddbmm_ einsum "
    "tensordot multi_dot chain_matmul".split()
)

# Reads that autocast runs in its lower-precision dtype on every device.
AUTOCAST = frozenset(
    "linear matmul mm bmm addmm addbmm baddbmm einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d multi_head_attention_forward".split()
)

# Those whose weight is a matrix of (out, all the rest); that of `conv_tbc` has one of (in, out) for each tap.
CONVOLUTIONS = frozenset(name for name in READS if name.startswith("conv")) - {"conv_tbc"}

# The value of their first operand goes on, in another shape or dtype or in part. They depend on its values alone, not
# on how these lie in memory: a sample has a storage of its own.
TRANSPARENT = frozenset(
    "view reshape t T mT H mH numpy_T matrix_H transpose permute swapaxes swapdims movedim moveaxis flatten unflatten "
    "ravel unsqueeze squeeze expand expand_as view_as reshape_as contiguous to type type_as float half bfloat16 double "
    "cpu cuda chunk split split_with_sizes tensor_split unsafe_split unsafe_chunk hsplit vsplit dsplit unbind narrow "
    "select slice diagonal unfold getitem index index_select gather take_along_dim clone detach alias lift_fresh cat "
    "concat concatenate stack hstack vstack row_stack dstack column_stack block_diag repeat tile repeat_interleave pad "
    "flip roll rot90 atleast_2d atleast_3d neg negative pos positive real conj conj_physical resolve_conj resolve_neg "
    "to_dense view_as_real "
    "view_as_complex _to_copy broadcast_to adjoint requires_grad_ data _get_data_attr to_local full_tensor "
    "redistribute from_local_like _add_batch_dim _wrap_for_grad".split()
)

# Of these, the ones through which no gradient flows.
DETACHING = frozenset("detach data _get_data_attr".split())

# What looks at how a value lies in memory: what it gives of a sample is something else.
STORAGE = frozenset(
    "as_strided as_strided_ as_strided_copy as_strided_scatter set_ untyped_storage storage data_ptr".split()
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
# (``add_``, ``+=``) take the parameter as another operand than the one they write.
OTHERS = frozenset(
    "add sub subtract mul multiply truediv true_divide div divide floordiv floor_divide mod remainder fmod radd rsub "
    "rmul rtruediv pow rpow square sqrt rsqrt reciprocal abs absolute sign exp exp2 expm1 log log1p log2 log10 "
    "logaddexp erf erfinv sin cos tan sinh cosh asin acos atan atan2 sigmoid logit tanh relu relu6 gelu silu mish elu "
    "selu celu leaky_relu rrelu prelu hardtanh hardswish hardsigmoid logsigmoid softsign softplus softmax log_softmax "
    "gumbel_softmax glu dropout where masked_fill masked_scatter maximum minimum max min fmax fmin amax amin aminmax "
    "clamp clamp_min clamp_max clip nan_to_num round floor ceil trunc lerp addcmul addcdiv normalize norm vector_norm "
    "matrix_norm renorm sum mean prod var std var_mean std_mean median nansum nanmean logsumexp cumsum cumprod sort "
    "argsort topk argmax argmin any all eq ne lt le gt ge isnan isinf isfinite equal allclose isclose dist cdist "
    "pairwise_distance cosine_similarity outer ger addr kron cross layer_norm rms_norm group_norm batch_norm "
    "instance_norm local_response_norm _weight_norm tril triu diag diag_embed matrix_exp inverse inv pinv qr svd "
    "solve solve_triangular cholesky det householder_product interpolate upsample grid_sample copy setitem index_put "
    "index_add index_copy index_fill scatter scatter_add scatter_reduce select_scatter slice_scatter "
    "scaled_dot_product_attention and or xor mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy nll_loss kl_div "
    "binary_cross_entropy rfft irfft fft ifft rfft2 irfft2 fft2 ifft2 rfftn irfftn fftn ifftn complex polar angle "
    "imag".split()
)

# Of these, the ones that give a value of their first operands' kind, element by element or row by row: what is made of
# a weight by them may be a weight.
COMPUTING = OTHERS - frozenset(
    "scaled_dot_product_attention layer_norm group_norm batch_norm instance_norm cross_entropy nll_loss grid_sample "
    "index_put index_add index_copy argmax argmin sort argsort topk cdist setitem copy".split()
)

# Look rows, or elements, up in a table: the names of the table's operand.
EMBEDDINGS: dict[str, str] = {
    "embedding": "weight",
    "embedding_bag": "weight",
    "_embedding_bag": "weight",
    "take": "self",
}

# Between these two a transform of torch.func is at work on everything that is computed.
TRANSFORM_BEGINS = frozenset("_vmap_increment_nesting _grad_increment_nesting _jvp_increment_nesting".split())
TRANSFORM_ENDS = frozenset("_vmap_decrement_nesting _grad_decrement_nesting _jvp_decrement_nesting".split())

_IN_PLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor setitem delitem".split()
)

# What scales by a number: either operand of the first two, the second one of the others.
_MULTIPLICATIONS = frozenset("mul multiply".split())
_DIVISIONS = frozenset("div divide truediv true_divide".split())


def name_of(node: fx.Node) -> str:
    """The bare name of a node's operation: ``linear`` for ``torch._C._nn.linear``, ``T`` for an attribute read.

    An operator of another library than torch has the library in front: ``mylib::linear``.
    """
    target: Any = node.target
    if node.op == "call_method":
        # ``__matmul__`` and ``__rmatmul__`` are ``matmul``; of the second `operands` has the order.
        method = str(target)
        return reflected(method) or (method[2:-2] if method.startswith("__") and method.endswith("__") else method)
    packet = getattr(target, "overloadpacket", target)
    name: str = getattr(packet, "__name__", None) or str(packet)
    if name == "getattr" and len(node.args) > 1:
        return str(node.args[1])
    if name == "__get__":  # a tensor property, read through its descriptor
        return getattr(getattr(target, "__self__", None), "__name__", name)
    # Up to torch 2.12 Dynamo wraps a DTensor's methods in functions called prim_to_local and so on; what lies in
    # torch.linalg is called linalg_matmul and so on, as its operator is.
    name = name.removeprefix("prim_").removesuffix(".default").rsplit(".", 1)[-1]
    # What another library calls `multiply` may do anything.
    library = namespace_of(target)
    return f"{library}::{name}" if library not in ("", "aten", "prims", "gws") else name.removeprefix("linalg_")


def is_known(node: fx.Node) -> bool:
    """Whether the node is known to compute without multiplying by a weight."""
    name = name_of(node)
    plain = name[1:] if name in _IN_PLACE_OPERATORS else name.removesuffix("_")
    return name in OTHERS or plain in OTHERS


def is_computing(node: fx.Node) -> bool:
    """Whether the node may make a weight of a weight: element by element, row by row, or as a view."""
    name = name_of(node)
    plain = name[1:] if name in _IN_PLACE_OPERATORS else name.removesuffix("_")
    return plain in COMPUTING or name in TRANSPARENT


def _holds(value: object, weight: fx.Node) -> bool:
    return value is weight or (isinstance(value, (list, tuple)) and any(_holds(v, weight) for v in value))


def _given(node: fx.Node, weight: fx.Node) -> list[Operand]:
    return [operand for operand in operands(node) if _holds(operand.value, weight)]


def operand_name(node: fx.Node, weight: fx.Node) -> str:
    """As what the node takes a value, such as ``input``; empty where nothing tells."""
    name = next((operand.name for operand in _given(node, weight)), "")
    return "input" if name == "self" else name


def _multiplied(node: fx.Node) -> list[fx.Node]:
    """The operands that the node multiplies with one another, or its weights, in their order."""
    names = READS.get(name_of(node), "").split()
    return [value for operand in operands(node) if operand.name in names for value in _nodes_in(operand.value)]


def _nodes_in(value: object) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _nodes_in(one)


def is_read(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node multiplies or convolves with the value in ``weight``, one of its inputs."""
    return weight in _multiplied(node)


def is_weight_of(node: fx.Node, value: fx.Node) -> bool:
    """Whether the node reads ``value`` where weights stand: in a product of two matrices, as any but the first."""
    multiplied = _multiplied(node)
    return value in (multiplied[1:] if name_of(node) in PRODUCTS and len(multiplied) > 1 else multiplied)


def is_transparent(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node's result is the value in ``weight``, rearranged, converted or joined with others."""
    name = name_of(node)
    if name not in TRANSPARENT or any(operand.position != 0 for operand in _given(node, weight)):
        return False
    if name == "_add_batch_dim":
        return bool(node.args[1] == 0)  # over another dim than the first the matrices do not lie one behind the other
    return not _reinterprets(node, weight)


def _reinterprets(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node takes the bits of a value for those of another dtype: ``w.view(torch.int32)``."""
    if name_of(node) != "view":
        return False
    before, after = example_value(weight), example_value(node)
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype != after.dtype


def is_scaled(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node's result is the value in ``weight``, multiplied or divided by one number.

    The number is one of Python's, or a tensor of one element, such as a learned gain. Forms that write their first
    operand are no such nodes.
    """
    name = name_of(node)
    given = operands(node)
    if name not in _MULTIPLICATIONS | _DIVISIONS or len(given) != 2:  # with a rounding mode or ``out`` there are more
        return False
    (first, other) = (operand.value for operand in given)
    if name in _MULTIPLICATIONS and other is weight:
        first, other = other, first
    return first is weight and other is not weight and _is_number(other)


def is_number_of(node: fx.Node, value: fx.Node) -> bool:
    """Whether the node takes ``value`` as the number that it scales something by."""
    others = [other for other in node.all_input_nodes if other is not value]
    return any(is_scaled(node, other) for other in others)


def is_embedding(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node looks rows up in ``weight``."""
    table = EMBEDDINGS.get(name_of(node))
    return table is not None and any(operand.name == table for operand in _given(node, weight))


def is_metadata(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node looks only at shape, dtype or device of ``weight``."""
    name = name_of(node)
    return name in METADATA or (name in TRANSPARENT and all(operand.position != 0 for operand in _given(node, weight)))


def is_storage(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node looks at how the value in ``weight`` lies in memory, which a sample of it does not."""
    return name_of(node) in STORAGE or _reinterprets(node, weight)


def is_recorded(node: fx.Node) -> bool:
    """Whether gradients flow through the node, where they are enabled."""
    return name_of(node) not in DETACHING


def is_differentiated_by(node: fx.Node) -> bool:
    """Whether the node hands a value to a transform of `torch.func.grad`, which differentiates by it."""
    return name_of(node) == "_wrap_for_grad" and any(name_of(u) == "_set_tensor_requires_grad" for u in node.users)


def is_in_place(node: fx.Node, weight: fx.Node) -> bool:
    """Whether the node writes into ``weight``."""
    name = name_of(node)
    if _holds(node.kwargs.get("out"), weight):
        return True
    if name == "requires_grad_" or name in STORAGE or all(operand.position != 0 for operand in _given(node, weight)):
        return False
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def written_by(node: fx.Node) -> fx.Node | None:
    """What a node writes into, if it does."""
    return next((value for value in node.all_input_nodes if is_in_place(node, value)), None)


def _is_number(value: object) -> bool:
    if isinstance(value, fx.Node):
        value = example_value(value)
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point and all(isinstance(n, int) and n == 1 for n in value.shape)
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
