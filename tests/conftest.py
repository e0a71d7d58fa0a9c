"""For all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """What runs leave for later ones goes where nobody looks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
