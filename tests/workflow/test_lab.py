"""Every notebook in JupyterLab as `make lab` starts it, in a browser: what a reader sees who runs all cells.

The server works on a copy of the checkout.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import chromium
import nbformat
import pytest

from reprolib.files import paths

pytestmark = pytest.mark.skipif(not chromium.found(), reason=chromium.MISSING)

ALL = [path.name for path in paths.notebooks()]
TRAINING = ("01", "02")  # they train: in the copy, for a few steps, with the parameter that they have for it
WITH_SLIDERS = ("00",)
NOTEBOOK = "window.jupyterapp?.shell.currentWidget"
RED = "[data-mime-type$='jupyter.stderr'], [data-mime-type$='jupyter.error'], .jupyter-widgets-error, .jp-RenderedError"
SEEN = f"""(() => {{
  const texts = selector => [...document.querySelectorAll(selector)].map(element => element.innerText);
  return {{
    red: texts({json.dumps(RED)}),
    prompts: texts(".jp-CodeCell .jp-InputPrompt"),
    text: texts(".jp-Notebook").join(),
    blank: [...document.querySelectorAll(".jp-Notebook img")].filter(i => i.complete && !i.naturalWidth).length,
    loading: [...document.querySelectorAll(".jp-Notebook img")].filter(i => !i.complete).length,
  }};
}})()"""


def tracked(folder):
    """The content of each file that git tracks, as it lies in `folder`; not of notebooks, which JupyterLab saves."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.endswith(".ipynb")]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git tracks, in which notebooks that train do so for a few steps only."""
    folder = tmp_path_factory.mktemp("lab") / "checkout"
    for name, content in tracked(paths.ROOT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    shutil.copytree(paths.NOTEBOOKS, folder / "notebooks", ignore=lambda _, names: set(names) - set(ALL))
    for path in (folder / "notebooks").glob("*.ipynb"):
        if path.name.startswith(TRAINING):
            notebook = nbformat.read(path, as_version=4)
            [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
            parameters.source, changed = re.subn(r'^(profile: str = "\w+)"', r'\1-dry-run"', parameters.source)
            assert changed == 1
            nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def lab(checkout):
    """The address of JupyterLab, as `make lab` starts it in the copy, and the token that lets in."""
    home = checkout.parent
    write(home / "config/jupyter_server_config.json", {"ServerApp": {"open_browser": False, "allow_root": True}})
    write(home / "config/jupyter_lab_config.json", {"LabApp": {"expose_app_in_browser": True}})
    tracker = "config/lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    write(home / tracker, {"windowingMode": "none"})  # else the page holds only the cells that are in view
    environment = os.environ | {"REPROLIB_HOME": str(checkout), "IPYTHONDIR": str(home / "ipython")}
    environment |= {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("config", "runtime", "data")}
    command = ["make", "-C", str(checkout), "-o", "env", f"VENV={sys.prefix}", "lab"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for = lambda: list((home / "runtime").glob("jpserver-*.json"))  # noqa: E731
        [told] = chromium.wait(wait_for, chromium.START_S, f"JupyterLab starts, see {home / 'log'}")
        yield json.loads(told.read_text())
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.started(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@contextmanager
def opened(name, lab, browser):
    """The page of a notebook in which all cells have run."""
    with browser(f"{lab['url']}lab/tree/notebooks/{name}?reset&token={lab['token']}") as page:
        page.wait(f"{NOTEBOOK}?.context?.path == 'notebooks/{name}' && {NOTEBOOK}.context.isReady")
        page.wait(f"{NOTEBOOK}.sessionContext.session?.kernel?.status == 'idle'")
        page.value("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
        yield page
        page.value(f"{NOTEBOOK}.sessionContext.shutdown().then(() => true)")


@pytest.mark.parametrize("name", ALL)
def test_runs_in_the_browser_without_a_red_box(name, checkout, lab, browser):
    before = tracked(checkout)
    with opened(name, lab, browser) as page:
        assert problems(page) == []
        if name.startswith(WITH_SLIDERS):
            sliders = page.value("document.querySelectorAll('.widget-slider').length")
            assert sliders
            for slider in range(sliders):
                move(page, slider)
            assert problems(page) == []
    assert tracked(checkout) == before


def test_what_a_reader_should_not_see_is_found(checkout, lab, browser, write_notebook):
    path = checkout / "notebooks" / "wrong.ipynb"
    cells = ["import sys\nprint('look', file=sys.stderr)", "print('Traceback')", "![no](../no.png)", "1 / 0", "2"]
    write_notebook(path, "one: int = 1  # first", *cells)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[3] = nbformat.v4.new_markdown_cell(notebook.cells[3].source)
    nbformat.write(notebook, path)
    with opened(path.name, lab, browser) as page:
        look, zero, *others = problems(page)
    assert look == "look" and "ZeroDivisionError" in zero
    assert others == ["a traceback", "1 pictures are missing", "a cell has not run: [ ]:"]


def problems(page):
    """What a reader should not see in a notebook that has run, in words."""
    page.wait(f"{SEEN}.loading == 0")
    seen = page.value(SEEN)
    assert seen["prompts"], "no cell"
    found = [text.strip() for text in seen["red"]]
    found += ["a traceback"] * ("Traceback" in seen["text"])
    found += re.findall(r"Error (?:displaying|creating) widget.*", seen["text"])
    found += [f"{seen['blank']} pictures are missing"] * bool(seen["blank"])
    found += [f"a cell has not run: {each}" for each in seen["prompts"] if not re.fullmatch(r"\[\d+\]:", each)]
    return found + page.faults


def move(page, number):
    """Move a slider by one step, with the keyboard, and wait until the picture beside it is another one."""
    slider = f"document.querySelectorAll('.widget-slider')[{number}]"
    picture = f"{slider}.closest('.widget-vbox').querySelector('img').src"
    value, shown = page.value(f"{slider}.innerText"), page.value(picture)
    page.value(f"{slider}.querySelector('[role=slider]').focus()")
    page.press("ArrowRight", 39)
    page.wait(f"{slider}.innerText != {json.dumps(value)} && {picture} != {json.dumps(shown)}")
