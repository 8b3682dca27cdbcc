"""The one category of the project's warnings."""


class GwsWarning(UserWarning):
    """A setting of `gws_compile.backend` has no effect, or weights train without the noise that was asked for."""
