"""The pass that rounds what attention multiplies: queries, keys, values and probabilities.

round_attention  finds attention in Dynamo's graph, and rounds its operands
explicit         attention as a kernel computes it, in two products that can be seen
multi_head       torch's multi-head attention, taken apart into projections and attention
by_hand          attention that a model writes out: a product, a softmax, a product
building         new nodes of Dynamo's graph
"""

from .round_attention import round_attention

__all__ = ["round_attention"]
