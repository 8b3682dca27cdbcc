"""The warning category of the project."""


class GwsWarning(UserWarning):
    """A setting of `gws_compile.backend` has no effect, or a model had nothing to rewrite."""
