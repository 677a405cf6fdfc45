"""The packed models that the tests of the socket use too."""

from tests.hub.conftest import bases, saved

__all__ = ["bases", "saved"]
