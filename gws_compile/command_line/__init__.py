"""Running: ``gws run`` and ``gws explain``, settings as text, and the backend behind the name ``"gws"``."""
