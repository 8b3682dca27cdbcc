"""The operators ``gws::sample_weight`` and ``gws::bits_gradient``, their eager kernels, and the public references."""
