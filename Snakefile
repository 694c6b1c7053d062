# The graph: networks, then tables, latencies, figures and claims. `make` is its front door; `snakemake --cores 2`, with
# `--config profile=laptop`, does the same without a bar. Snakemake deletes what a job makes before the job runs, and when
# it fails or is stopped. So what git tracks is made in no such way: tables are updated; notebooks draw into drawn/, from
# where whole files move to their place. Networks are no outputs at all: a job that fails must not delete the others.
# Paths of what is made are relative, others are parameters from functions: Snakemake takes braces in any other path for
# wildcards.
import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from reprolib.experiments import profiles
from reprolib.files import paths
from reprolib.workflow import graph

PYTHON = sys.executable
RUN = (
    "exec env OMP_NUM_THREADS={threads} {PYTHON:q} -m reprolib.workflow.notebooks"
    " {params.notebook:q} {output.notebook:q} --parameters {params.json:q}"
)
DRAW = RUN + " --publish {output.drawn:q} {profile.name:q}"
FRONT = "exec {PYTHON:q} -m reprolib.workflow.graph"


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
    profile = profiles.load(config.get("profile", "quick"))
    RESULTS = paths.results(profile.name)
    workdir: str(RESULTS)
    EXECUTED, DRAWN = paths.executed(profile.name).name, paths.drawn(profile.name).name
    TRAINED = paths.trained(profile.name).name
    ACCURACY = paths.accuracy_csv(profile.name).name
    ABLATIONS = [paths.ablations_csv(profile.name).name] if profile.ablations else []
    LATENCY = paths.latency_csv(profile.name).name
    graph.note_whole(profile)  # without a record, rule networks runs

    PEERS = [path.name for path in [paths.short_latency_csv(profile.name)] if path.exists()]

    def draws(number):
        """The outputs of a rule that draws: the executed notebook, and the folder of its figures and tables."""
        return {"notebook": f"{EXECUTED}/{number}.ipynb", "drawn": directory(f"{DRAWN}/{number}")}

    def drawing(number, **parameters):
        """The parameters of a rule that draws. A notebook runs in the checkout: its folder is seen from there."""
        folder = os.path.relpath(RESULTS / DRAWN / number, paths.ROOT)
        text = json.dumps(parameters | {"folder": folder})
        return notebook(number) | {"json": lambda wildcards: text}

    TIMED = config.get("latency", True)

    one = {"profile": profile.name, "dataset": profile.datasets[0], "seed": profile.seeds[0]}

    rule all:
        input:
            TRAINED,
            f"{EXECUTED}/01.ipynb",
            f"{EXECUTED}/02.ipynb",
            [f"{DRAWN}/{number}" for number in ("00", "03", *["04"] * bool(ABLATIONS), *["05", "06"] * TIMED, "07")],

    # --- Networks, and the tables of what they reach ------------------------------------------------------------------

    rule networks:  # trained and pruned
        # The whole grid: reprolib/experiments/scheduling.py trains what has no record.
        output:
            TRAINED,
        threads: workflow.cores
        resources:
            gpu=1,
        shell:
            f"{FRONT} --cores {{threads}} networks --profile {{profile.name:q}}"

    rule tables:  # accuracy.csv, ablations.csv
        input:
            TRAINED,
        output:
            update(ACCURACY),
            [update(name) for name in ABLATIONS],
        shell:
            f"{FRONT} tables --profile {{profile.name:q}}"

    rule latencies:  # latency.csv
        # Nothing else runs meanwhile. What was measured stays.
        input:
            ancient(TRAINED),
        output:
            update(LATENCY),
        threads: workflow.cores
        resources:
            gpu=1,
        shell:
            f"{FRONT} --cores {{threads}} latencies --profile {{profile.name:q}}"

    # --- How one network was trained and pruned -----------------------------------------------------------------------

    rule dense_report:  # notebook 01
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

    rule pruning_report:  # notebook 02
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

    # --- Figures and tables: these rules train nothing ----------------------------------------------------------------

    rule anatomy:  # mask_anatomy
        output:
            **draws("00"),
        params:
            **drawing("00"),
        shell:
            DRAW

    rule accuracy_figure:  # accuracy_vs_sparsity, accuracy
        input:
            ACCURACY,
        output:
            **draws("03"),
        params:
            **drawing("03", profile=profile.name),
        shell:
            DRAW

    rule ablation_figures:  # bank_block, variations, retraining_budget
        input:
            ACCURACY,
            ABLATIONS,
        output:
            **draws("04"),
        params:
            **drawing("04", profile=profile.name),
        shell:
            DRAW

    rule kernel_figures:  # latency_vs_sparsity, latency; where single layers were timed, roofline
        input:
            LATENCY,
        output:
            **draws("05"),
        params:
            **drawing("05", profile=profile.name),
        shell:
            DRAW

    rule latency_figure:  # accuracy_vs_latency; where make bench-peers was run, peers
        input:
            ACCURACY,
            LATENCY,
            PEERS,
        output:
            **draws("06"),
        params:
            **drawing("06", profile=profile.name),
        shell:
            DRAW

    rule claims:  # claims, claims.csv
        input:
            ACCURACY,
            LATENCY if TIMED else [],  # claim 4 says what is missing
        output:
            **draws("07"),
        params:
            **drawing("07", profile=profile.name),
        shell:
            DRAW
