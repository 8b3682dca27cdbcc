"""A fuzzer of the backend: random models, settings and training scripts against an oracle in eager torch.

`case` says what is run, `generate` draws it from a seed, `parts` (with `products`) and `model` build it. The oracle:
each part has an eager form of its forward, which takes what a read multiplies by from `reads`, with `naming` for names
and draws and `widths` for learned widths. `script` runs a case beside it, `compare` compares, `check` says what fails,
and `shrink` makes it small. ``python -m tests.fuzz --help``.
"""
