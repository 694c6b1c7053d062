# The graph: which notebook makes which file out of which. `make` is its front door, reprolib/graph.py calls it.
import json
import shlex
import sys
from pathlib import Path

import torch

from reprolib import paths, profiles, records

RUN = (
    "exec env OMP_NUM_THREADS={threads} "
    + shlex.quote(sys.executable)
    + " -m reprolib.notebooks {input.notebook:q} {output.notebook:q} --parameters {params.json:q}"
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
            json=lambda wildcards: json.dumps(plan["jobs"][wildcards.point]),
        resources:
            gpu=1,
        shell:
            RUN


else:  # make reproduce, make figures: one profile
    profile = profiles.load(config["profile"])
    RESULTS, FIGURES = str(paths.results(profile.name)), str(paths.figures(profile.name))
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    EXECUTED, TABLES = f"{RESULTS}/notebooks", f"{RESULTS}/tables"
    DENSE = [f"01-{dataset}-seed{seed}" for seed in profile.seeds for dataset in profile.datasets]

    def jobs(section):
        return [f"02-{method}-{dataset}-seed{seed}" for method, dataset, seed in profile.jobs(section)]

    def drawn(*names):
        return [f"{FIGURES}/{name}.{suffix}" for name in names for suffix in ("svg", "png")]

    def tabled(*names):
        return [f"{FIGURES}/{name}.{suffix}" for name in names for suffix in ("md", "tex")]

    parameters = json.dumps({"profile": profile.name})

    wildcard_constraints:
        dataset="[a-z0-9]+",
        seed=r"\d+",

    rule all:
        input:
            f"{RESULTS}/claims.csv",
            drawn("mask_anatomy", "accuracy_vs_sparsity", "bank_block", "variations", "claims"),
            drawn("roofline", "latency_vs_sparsity", "accuracy_vs_latency"),
            tabled("accuracy", "latency", "claims"),

    rule figures:
        input:
            rules.all.input,

    # --- Training -----------------------------------------------------------------------------------------------------

    rule train_dense:
        input:
            notebook=paths.notebook("01"),
        output:
            notebook=f"{EXECUTED}/01-{{dataset}}-seed{{seed}}.ipynb",
            table=f"{TABLES}/01-{{dataset}}-seed{{seed}}.csv",
        params:
            json=lambda wildcards, output: json.dumps(
                {
                    "profile": profile.name,
                    "dataset": wildcards.dataset,
                    "seed": int(wildcards.seed),
                    "table": output.table,
                }
            ),
        threads: profile.threads
        resources:
            gpu=1,
        priority: 1
        shell:
            RUN

    rule prune_and_retrain:
        input:
            notebook=paths.notebook("02"),
            dense=f"{TABLES}/01-{{dataset}}-seed{{seed}}.csv",
        output:
            notebook=f"{EXECUTED}/02-{{method}}-{{dataset}}-seed{{seed}}.ipynb",
            table=f"{TABLES}/02-{{method}}-{{dataset}}-seed{{seed}}.csv",
        params:
            json=lambda wildcards, output: json.dumps(
                {
                    "profile": profile.name,
                    "dataset": wildcards.dataset,
                    "seed": int(wildcards.seed),
                    "table": output.table,
                    **profile.settings(wildcards.method),
                }
            ),
        threads: profile.threads
        resources:
            gpu=1,
        shell:
            RUN

    # --- Tables -------------------------------------------------------------------------------------------------------

    rule accuracy_csv:
        input:
            [f"{TABLES}/{name}.csv" for name in DENSE + jobs("methods")],
        output:
            paths.accuracy_csv(profile.name),
        run:
            records.join([Path(name) for name in input], Path(output[0]))

    rule ablations_csv:
        input:
            [f"{TABLES}/{name}.csv" for name in jobs("ablations")],
        output:
            paths.ablations_csv(profile.name),
        run:
            records.join([Path(name) for name in input], Path(output[0]))

    rule latency_csv:
        output:
            paths.latency_csv(profile.name),
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
            paths.accuracy_csv(profile.name),
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
            paths.accuracy_csv(profile.name),
            paths.ablations_csv(profile.name),
            notebook=paths.notebook("04"),
        output:
            drawn("bank_block", "variations"),
            notebook=f"{EXECUTED}/04.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule kernel_figures:
        input:
            paths.latency_csv(profile.name),
            notebook=paths.notebook("05"),
        output:
            drawn("roofline", "latency_vs_sparsity"),
            tabled("latency"),
            notebook=f"{EXECUTED}/05.ipynb",
        params:
            json=parameters,
        shell:
            RUN

    rule latency_figure:
        input:
            paths.accuracy_csv(profile.name),
            paths.latency_csv(profile.name),
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
            paths.accuracy_csv(profile.name),
            paths.latency_csv(profile.name),
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
