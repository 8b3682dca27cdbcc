"""What a message says of a name that is none."""

from gws_compile.settings.nearest import nearest


def test_nearest():
    assert nearest("GWS_INCLUDES", ["GWS_INCLUDE", "GWS_EXCLUDE"]) == "did you mean 'GWS_INCLUDE'?"
    assert nearest("zzz", ["a", "b"]) == "accepted: a, b"
