# The graph: which notebook makes which file out of which. `make` is its front door, reprolib/workflow/graph.py calls it,
# in the folder of results. Paths of what it makes are relative, and those of notebooks are parameters from functions:
# Snakemake takes braces in any other path for wildcards.
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from reprolib.experiments import profiles
from reprolib.files import paths

PYTHON = sys.executable
RUN = (
    "exec env OMP_NUM_THREADS={threads} {PYTHON:q} -m reprolib.workflow.notebooks"
    " {params.notebook:q} {output.notebook:q} --parameters {params.json:q}"
)


def notebook(number):
    """Two parameters of a rule: the notebook that it runs, and what stands in it, a change of which runs it again."""
    path = paths.notebook(number)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"notebook": lambda wildcards: str(path), "content": content}


if "plan" in config:  # make sweep: the points of a grid, each a run of one notebook
    plan = json.loads(Path(config["plan"]).read_text())

    rule sweep:
        input:
            expand("{point}.ipynb", point=plan["jobs"]),

    rule point:
        output:
            notebook="{point}.ipynb",
        params:
            **notebook(plan["notebook"]),
            json=lambda wildcards: json.dumps(plan["jobs"][wildcards.point], sort_keys=True),
        resources:
            gpu=1,
        shell:
            RUN


else:  # make reproduce, make figures: one profile
    profile = profiles.load(config["profile"])
    FIGURES = os.path.relpath(paths.figures(profile.name), paths.results(profile.name))
    EXECUTED, DEVICE = "notebooks", "cuda" if torch.cuda.is_available() else "cpu"
    # Written from the records of the trained networks before the graph runs.
    ACCURACY = paths.accuracy_csv(profile.name).name
    ABLATIONS = [paths.ablations_csv(profile.name).name] if profile.ablations else []
    LATENCY, CLAIMS = paths.latency_csv(profile.name).name, paths.claims_csv(profile.name).name

    def drawn(*names):
        return [f"{FIGURES}/{name}.{suffix}" for name in names for suffix in ("svg", "png")]

    def tabled(*names):
        return [f"{FIGURES}/{name}.{suffix}" for name in names for suffix in ("md", "tex")]

    parameters = json.dumps({"profile": profile.name})
    one = {"profile": profile.name, "dataset": profile.datasets[0], "seed": profile.seeds[0]}

    rule all:
        input:
            f"{EXECUTED}/01.ipynb",
            f"{EXECUTED}/02.ipynb",
            CLAIMS,
            drawn("mask_anatomy", "accuracy_vs_sparsity", "claims"),
            drawn("bank_block", "variations", "retraining_budget") if ABLATIONS else [],
            drawn("latency_vs_sparsity", "accuracy_vs_latency"),
            tabled("accuracy", "latency", "claims"),

    # --- How one network was trained and pruned -----------------------------------------------------------------------

    rule dense_report:
        input:
            ACCURACY,
        output:
            notebook=f"{EXECUTED}/01.ipynb",
        params:
            **notebook("01"),
            json=json.dumps(one),
        threads: profile.threads
        resources:
            gpu=1,
        shell:
            RUN

    rule pruning_report:
        input:
            ACCURACY,
        output:
            notebook=f"{EXECUTED}/02.ipynb",
        params:
            **notebook("02"),
            json=json.dumps(one | profile.settings("hybrid" if "hybrid" in profile.methods else next(iter(profile.methods)))),
        threads: profile.threads
        resources:
            gpu=1,
        shell:
            RUN

    # --- Latencies ----------------------------------------------------------------------------------------------------

    rule latency_csv:
        output:
            LATENCY,
        threads: workflow.cores  # nothing else runs while latencies are measured
        resources:
            gpu=1,
        shell:
            "{PYTHON:q} -m reprolib.bench latency --own --profile {profile.name:q} --device {DEVICE} --output {output:q}"

    # --- Figures: these rules train nothing ---------------------------------------------------------------------------

    rule anatomy:
        output:
            drawn("mask_anatomy"),
            notebook=f"{EXECUTED}/00.ipynb",
        params:
            **notebook("00"),
            json=parameters,
        shell:
            RUN

    rule accuracy_figure:
        input:
            ACCURACY,
        output:
            drawn("accuracy_vs_sparsity"),
            tabled("accuracy"),
            notebook=f"{EXECUTED}/03.ipynb",
        params:
            **notebook("03"),
            json=parameters,
        shell:
            RUN

    rule ablation_figures:
        input:
            ACCURACY,
            ABLATIONS,
        output:
            drawn("bank_block", "variations", "retraining_budget"),
            notebook=f"{EXECUTED}/04.ipynb",
        params:
            **notebook("04"),
            json=parameters,
        shell:
            RUN

    rule kernel_figures:
        input:
            LATENCY,
        output:
            drawn("latency_vs_sparsity"),  # and, where single layers were timed, roofline
            tabled("latency"),
            notebook=f"{EXECUTED}/05.ipynb",
        params:
            **notebook("05"),
            json=parameters,
        shell:
            RUN

    rule latency_figure:
        input:
            ACCURACY,
            LATENCY,
        output:
            drawn("accuracy_vs_latency"),  # and, where make bench-peers was run, figure and table peers
            notebook=f"{EXECUTED}/06.ipynb",
        params:
            **notebook("06"),
            json=parameters,
        shell:
            RUN

    rule claims:
        input:
            ACCURACY,
            LATENCY if config.get("latency", True) else [],  # claim 4 says what is missing
        output:
            drawn("claims"),
            tabled("claims"),
            CLAIMS,
            notebook=f"{EXECUTED}/07.ipynb",
        params:
            **notebook("07"),
            json=parameters,
        shell:
            RUN
