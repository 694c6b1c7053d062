"""Run one notebook with papermill: unknown parameters are errors, the output appears whole or not at all.

python -m reprolib.workflow.notebooks 02 out.ipynb --parameters '{"seed": 1}'
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError

from reprolib.files import paths
from reprolib.files.processes import end_with_parent


def known_parameters(notebook: Path) -> dict[str, str]:
    """Names of the notebook's parameters with their defaults, as source text."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: parameter["default"] for name, parameter in found.items()}


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Raise ValueError, naming the known ones, if the notebook lacks one of `parameters`."""
    known = known_parameters(notebook)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it knows {', '.join(known)}")


def run(notebook: Path, output: Path, parameters: dict) -> None:
    """Execute `notebook` and write the executed copy to `output`, renamed from a partial file on success.

    Raises ValueError for an unknown parameter and papermill.PapermillExecutionError where a cell fails; the failed
    copy then stands beside `output`, ending in ``.failed.ipynb``.
    """
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook), str(partial), parameters, kernel_name="python3", cwd=str(paths.ROOT), progress_bar=False
        )
    except papermill.PapermillExecutionError:
        partial.replace(output.with_suffix(".failed.ipynb"))
        raise
    partial.replace(output)
    output.with_suffix(".failed.ipynb").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", help="number, name or path of the notebook")
    parser.add_argument("output", type=Path, help="where the executed notebook goes")
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON object")
    arguments = parser.parse_args()
    end_with_parent()  # and its kernel with it
    try:
        run(paths.notebook(arguments.notebook), arguments.output, arguments.parameters)
    except papermill.PapermillExecutionError as error:
        sys.exit(f"error: {Path(arguments.output).stem}: {error.ename}: {error.evalue}")
    except DeadKernelError:
        sys.exit(f"error: {Path(arguments.output).stem}: the notebook's kernel died; out of memory? Ask again to go on")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
