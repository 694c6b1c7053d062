"""Run one notebook with papermill: unknown parameters are errors, the output appears whole or not at all.

python -m reprolib.workflow.notebooks 02 out.ipynb --parameters '{"seed": 1}'
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError

from reprolib.files import paths, processes, settings
from reprolib.files.atomic import write_atomically
from reprolib.files.settings import Some

KINDS = {"str": str, "int": int, "float": float, "bool": bool, "list": Some[Any]}  # types that a parameter may declare


def known_parameters(notebook: Path) -> dict[str, dict]:
    """Names of the notebook's parameters, with the ``default`` and the type of each as source text."""
    return papermill.inspect_notebook(_literal(notebook))


def _literal(path: Path) -> str:
    """For papermill, which puts values of parameters where a path has braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def check_parameters(notebook: Path, *points: dict) -> None:
    """Raise ValueError if the notebook lacks a parameter of one of the `points`, or declares another type for it."""
    known = known_parameters(notebook)
    unknown = sorted({name for point in points for name in point} - set(known))
    if unknown:
        raise ValueError(f"{notebook.stem} has no parameter {', '.join(unknown)}: it knows {', '.join(known)}")
    for name, value in (item for point in points for item in point.items()):
        declared = known[name]
        try:
            settings.checked(value, KINDS.get(declared["inferred_type_name"], Any), name=name)
        except ValueError as error:
            raise ValueError(f"{error}; its default is {declared['default']}") from None


def run(notebook: Path, output: Path, parameters: dict) -> None:
    """Execute `notebook` and write the executed copy to `output`, renamed from a partial file on success.

    Raises ValueError for an unknown parameter and papermill.PapermillExecutionError where a cell fails; the failed
    copy then stands beside `output`, ending in ``.failed.ipynb``.
    """
    check_parameters(notebook, parameters)
    output = output.resolve()  # a relative one means the working directory of now: the notebook gets another
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial.ipynb")
    try:
        papermill.execute_notebook(
            _literal(notebook),
            _literal(partial),
            parameters,
            kernel_name="python3",
            cwd=str(paths.ROOT),
            progress_bar=False,
            start_timeout=600,  # seconds: on a busy machine or a slow disk, imports take their time
        )
    except papermill.PapermillExecutionError:
        partial.replace(output.with_suffix(".failed.ipynb"))
        raise
    partial.replace(output)
    output.with_suffix(".failed.ipynb").unlink(missing_ok=True)


def publish(drawn: Path, profile: str) -> None:
    """Move what a notebook of a profile has drawn into a folder to its place, whole files.

    Tables of numbers go to the results, all else to the figures; what has not changed is left alone.
    """
    for path in sorted(drawn.glob("[!.]*")):  # not Snakemake's own notes
        home = paths.results if path.suffix == ".csv" else paths.figures
        place, content = home(profile) / path.name, path.read_bytes()
        if not (place.exists() and place.read_bytes() == content):
            write_atomically(place, content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one notebook with papermill.")
    parser.add_argument("notebook", help="number, name or path of the notebook")
    parser.add_argument("output", type=Path, help="where the executed notebook goes")
    parser.add_argument("--parameters", type=settings.json_mapping, default={}, help="JSON object")
    parser.add_argument("--publish", nargs=2, metavar=("FOLDER", "PROFILE"), help="move what it drew to its place")
    arguments = parser.parse_args()
    environment = processes.environment()
    os.environ.clear()
    os.environ.update(environment)
    processes.end_with_parent()  # and the kernel, which it starts, with it
    try:
        run(paths.notebook(arguments.notebook), arguments.output, arguments.parameters)
        if arguments.publish:
            folder, profile = arguments.publish
            publish(Path(folder), profile)
    except papermill.PapermillExecutionError as error:
        sys.exit(f"error: {Path(arguments.output).stem}: {error.ename}: {error.evalue}")
    except DeadKernelError:
        sys.exit(f"error: {Path(arguments.output).stem}: the notebook's kernel died; out of memory? Ask again to go on")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
