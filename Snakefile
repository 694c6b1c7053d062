# The graph: which notebook makes which file out of which. `make` is its front door, reprolib/workflow/graph.py calls it.
import json
import shlex
import sys
from pathlib import Path

import torch

from reprolib.experiments import profiles
from reprolib.files import paths

RUN = (
    "exec env OMP_NUM_THREADS={threads} "
    + shlex.quote(sys.executable)
    + " -m reprolib.workflow.notebooks {input.notebook:q} {output.notebook:q} --parameters {params.json:q}"
)


if "plan" in config:  # make sweep: the points of a grid, each a run of one notebook
    plan = json.loads(Path(config["plan"]).read_text())

    rule sweep:
        input:
            expand("{point}.ipynb", point=plan["jobs"]),

    rule point:
        input:
            notebook=plan["notebook"],
        output:
            notebook="{point}.ipynb",
        params:
            json=lambda wildcards: json.dumps(plan["jobs"][wildcards.point], sort_keys=True),
        resources:
            gpu=1,
        shell:
            RUN


else:  # make reproduce, make figures: one profile
    profile = profiles.load(config["profile"])
    RESULTS, FIGURES = str(paths.results(profile.name)), str(paths.figures(profile.name))
    EXECUTED, DEVICE = f"{RESULTS}/notebooks", "cuda" if torch.cuda.is_available() else "cpu"
    # Written from the records of the trained networks before the graph runs.
    ACCURACY = paths.accuracy_csv(profile.name)
    ABLATIONS = [paths.ablations_csv(profile.name)] if profile.ablations else []
    LATENCY = paths.latency_csv(profile.name)

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
            f"{RESULTS}/claims.csv",
            drawn("mask_anatomy", "accuracy_vs_sparsity", "claims"),
            drawn("bank_block", "variations", "retraining_budget") if ABLATIONS else [],
            drawn("latency_vs_sparsity", "accuracy_vs_latency"),
            tabled("accuracy", "latency", "claims"),

    # --- How one network was trained and pruned -----------------------------------------------------------------------

    rule dense_report:
        input:
            ACCURACY,
            notebook=paths.notebook("01"),
        output:
            notebook=f"{EXECUTED}/01.ipynb",
        params:
            json=json.dumps(one),
        threads: profile.threads
        resources:
            gpu=1,
        shell:
            RUN

    rule pruning_report:
        input:
            ACCURACY,
            notebook=paths.notebook("02"),
        output:
            notebook=f"{EXECUTED}/02.ipynb",
        params:
            json=json.dumps(one | profile.settings("hybrid")),
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
            shlex.quote(sys.executable)
            + f" -m reprolib.bench latency --own --profile {profile.name} --device {DEVICE} --output {{output:q}}"

    # --- Figures: these rules train nothing ---------------------------------------------------------------------------

    rule anatomy:
        input:
            notebook=paths.notebook("00"),
        output:
            drawn("mask_anatomy"),
            notebook=f"{EXECUTED}/00.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule accuracy_figure:
        input:
            ACCURACY,
            notebook=paths.notebook("03"),
        output:
            drawn("accuracy_vs_sparsity"),
            tabled("accuracy"),
            notebook=f"{EXECUTED}/03.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule ablation_figures:
        input:
            ACCURACY,
            ABLATIONS,
            notebook=paths.notebook("04"),
        output:
            drawn("bank_block", "variations", "retraining_budget"),
            notebook=f"{EXECUTED}/04.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule kernel_figures:
        input:
            LATENCY,
            notebook=paths.notebook("05"),
        output:
            drawn("latency_vs_sparsity"),  # and, where single layers were timed, roofline
            tabled("latency"),
            notebook=f"{EXECUTED}/05.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule latency_figure:
        input:
            ACCURACY,
            LATENCY,
            notebook=paths.notebook("06"),
        output:
            drawn("accuracy_vs_latency"),
            notebook=f"{EXECUTED}/06.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule claims:
        input:
            ACCURACY,
            LATENCY if config.get("latency", True) else [],  # claim 4 says what is missing
            notebook=paths.notebook("07"),
        output:
            drawn("claims"),
            tabled("claims"),
            f"{RESULTS}/claims.csv",
            notebook=f"{EXECUTED}/07.ipynb",
        params:
            json=parameters,
        shell:
            RUN
