"""For all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _alike_everywhere(tmp_path_factory: pytest.TempPathFactory) -> object:
    """What runs leave for later ones goes where nobody looks for it, and tables are as wide in any terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "120")
        yield
