# The front door. `make help` lists what it opens; the graph itself is the Snakefile.
PYTHON ?=
PROFILE ?=
BUDGET ?=
CORES ?=
DEVICE ?= cpu
VENV := .venv
SHORT ?=
SCHEDULER ?=
# Without what would make Python look elsewhere or leave things out.
CLEAN := env -u PYTHONPATH -u PYTHONHOME -u PYTHONSTARTUP -u PYTHONOPTIMIZE
BIN := $(CLEAN) $(VENV)/bin
# The shell of a recipe gives way to the program, so that who ends make ends it.
REPROLIB := exec $(BIN)/python -m reprolib
GRAPH := $(REPROLIB).workflow.graph $(if $(CORES),--cores $(CORES))

STRIP := $(BIN)/nbstripout --extra-keys "metadata.papermill cell.metadata.papermill"

.DEFAULT_GOAL := help
.PHONY: help env doctor data test test-faults test-cluster lint strip reproduce figures report site trace sweep bench bench-peers bench-networks bench-trained bench-train lab lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## build the environment in .venv, or again where it has become stale (the others do it themselves)
	@test "$(words GNU make)" = 2 || { echo "error: this is not GNU make: call gmake"; exit 1; }
	@command -v "$(or $(PYTHON),python3)" >/dev/null || \
	  { echo "error: there is no $(or $(PYTHON),python3): name a Python with make PYTHON=python3.12"; exit 1; }
	@$(CLEAN) "$(or $(PYTHON),python3)" -m reprolib.files.environment $(if $(PYTHON),--this-python)

doctor: env ## say what this machine can do, and what each missing part would give
	@$(REPROLIB).workflow.doctor

data: env ## get CIFAR-10 and CIFAR-100 into data/ (or $REPROLIB_DATA)
	@$(REPROLIB).training.data

test: env lint ## run all tests, every notebook included
	exec $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-faults: env ## run the tests of docs/reliability.md, with 20 killed runs; leave the machine alone for an hour
	REPROLIB_KILLS=20 exec $(BIN)/python -m pytest $$(grep -o 'tests/[a-z_/]*\.py::[a-z0-9_]*' docs/reliability.md)

test-cluster: env ## run quick on a SLURM and on machines without a common disk, all here; needs root, slurm-wlm, iproute2
	REPROLIB_CLUSTER=1 exec $(BIN)/python -m pytest tests/cluster

lint: env ## check style, and that notebooks carry no outputs
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(STRIP) --verify notebooks/*.ipynb || { echo "error: these notebooks hold outputs: make strip removes them"; exit 1; }

strip: env ## remove outputs from notebooks, before a commit
	@$(STRIP) notebooks/*.ipynb

reproduce: env ## compute everything: PROFILE=quick, laptop, laptop-cifar100, evening, paper or mine.yaml (default: what fits); BUDGET=20m stops in time; SCHEDULER=tcp://host:8786: elsewhere
	@$(GRAPH) reproduce --profile "$(PROFILE)" $(if $(BUDGET),--budget=$(BUDGET)) $(if $(SCHEDULER),--scheduler "$(SCHEDULER)")

figures: env ## redraw figures and tables from the tables of PROFILE, without training
	@$(GRAPH) figures --profile "$(or $(PROFILE),quick)"

report: env ## make one page of PROFILE (laptop): claims, figures, notebooks, steps and provenance, for any browser
	@$(GRAPH) report --profile "$(or $(PROFILE),laptop)"

site: env ## write README, docs, notebooks, sources and results as pages into site/, for any web server
	@$(REPROLIB).workflow.site

trace: env ## show what a number rests on: CLAIM=1 or CELL=hybrid@95, of PROFILE (laptop)
	@$(REPROLIB).paper.trace --profile "$(or $(PROFILE),laptop)" $(if $(CELL),--cell "$(CELL)",--claim "$(CLAIM)")

sweep: env ## run a notebook over a grid: NOTEBOOK=02 GRID=grid.yaml
	@$(GRAPH) sweep --notebook "$(NOTEBOOK)" --grid "$(GRID)"

bench: env ## measure latencies of sparse kernels and dense rivals: DEVICE=cpu or cuda; leave the machine alone meanwhile
	$(REPROLIB).bench latency --device $(DEVICE) --profile "$(or $(PROFILE),$(if $(filter cuda,$(DEVICE)),paper,laptop))" $(if $(BUDGET),--budget=$(BUDGET))
	$(REPROLIB).bench masks

bench-peers: env ## bench, with DeepSparse, OpenVINO, ONNX Runtime and torch.compile beside it; SHORT=1: one table at 90 %, in minutes
	@$(REPROLIB).files.environment --peers
	$(REPROLIB).bench latency --peers $(if $(SHORT),--short) --profile "$(or $(PROFILE),laptop)" $(if $(BUDGET),--budget=$(BUDGET))
	@$(if $(SHORT),$(REPROLIB).paper.peer_figures $(or $(PROFILE),laptop))

bench-networks: env ## bench-peers with larger networks: ResNet-18 and ResNet-50, images of 224 x 224 pixels
	@$(REPROLIB).files.environment --peers
	$(REPROLIB).bench latency --peers --networks --profile $(or $(PROFILE),laptop) $(if $(BUDGET),--budget=$(BUDGET))
	@$(REPROLIB).paper.peer_figures $(or $(PROFILE),laptop) --networks

bench-trained: env ## bench-peers with trained networks of PROFILE (resnet), beside pruned channels and torch's own masks
	@$(REPROLIB).files.environment --peers
	$(REPROLIB).bench latency --peers --trained --profile $(or $(PROFILE),resnet) $(if $(BUDGET),--budget=$(BUDGET))
	@$(REPROLIB).paper.peer_figures $(or $(PROFILE),resnet) --trained

bench-train: env ## measure training speed beside a plain loop: DEVICE=cpu or cuda, PROFILE; leave the machine alone meanwhile
	$(REPROLIB).bench training --device $(DEVICE) --profile "$(or $(PROFILE),$(if $(filter cuda,$(DEVICE)),paper,laptop))"

lab: env ## open the notebooks in JupyterLab
	exec $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

lock: env ## renew requirements.lock from environment.yml, and requirements-peers.lock from requirements-peers.in
	$(BIN)/python -c 'from ruamel.yaml import YAML; [print(p) for d in YAML().load(open("environment.yml"))["dependencies"] if isinstance(d, dict) for p in d["pip"] if p[0] != "-"]' \
	  | $(BIN)/uv pip compile --universal --python-version 3.11 --no-annotate --no-header --upgrade --quiet - -o requirements.lock
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-annotate --no-header --upgrade --quiet requirements-peers.in -o requirements-peers.lock

clean: ## remove the environments and caches; results stay
	rm -rf $(VENV) $(VENV)-peers .pytest_cache .hypothesis .ruff_cache results/*/.snakemake *.egg-info
