from __future__ import annotations

import sys

import pytest

from training.errors import UserError
from training.extras import need


def test_a_library_that_is_not_there_is_one_line_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert need("json", "search").dumps([]) == "[]"
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it fails, as where it is not installed
    with pytest.raises(UserError, match=r"^faiss: not usable here \(.+\), wanted: pip install '\.\[search\]'$") as told:
        need("faiss", "search")
    assert "\n" not in str(told.value)
