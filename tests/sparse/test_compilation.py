import sys

import pytest

from reprolib.sparse import compilation


@pytest.mark.parametrize("in_notebook", [False, True])
def test_notes_look_like_errors_nowhere(in_notebook, capsys, monkeypatch):
    """A terminal gets them beside the results; a notebook would show them in a red box there."""
    if in_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", None)
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    compilation._Note().on_start(None)
    compilation._say(f"no folder, told {in_notebook}")
    shown = capsys.readouterr()
    notes, other = (shown.out, shown.err) if in_notebook else (shown.err, shown.out)
    assert notes.splitlines() == [
        "compiling a CPU kernel: some seconds, once on this machine",
        f"no folder, told {in_notebook}",
    ]
    assert other == ""
