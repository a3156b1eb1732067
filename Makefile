# What people do: make demo, make test, make laptop, make paper, make lab. `make help` lists all.
.DELETE_ON_ERROR:
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= laptop
PROFILES := $(patsubst notebooks/profiles/%.yaml,%,$(wildcard notebooks/profiles/*.yaml))
RUN_PROFILES := $(filter-out demo test,$(PROFILES))
.PHONY: help demo test tables publish pdf html data lidc lab clean $(RUN_PROFILES)
ENV := .venv/.installed
# The environment's programs and kernel before any other.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
# More options in profiles/default, which holds for any call of snakemake here. CORES: all, unless given.
SNAKEMAKE = snakemake $(if $(CORES),--cores $(CORES))
CONFIG = --config profile=$@ $(if $(SEEDS),'seeds=[$(SEEDS)]')
# The slices first, so that what they turn out to be is known when the rest is planned. SEEDS=0,1: these only.
WORKFLOW = $(SNAKEMAKE) data $(CONFIG) && $(SNAKEMAKE) $(CONFIG)

help:
	@echo "make demo     the whole paper on embedded phantoms, Table 1 after about 5 minutes on two cores, the rest by 12"
	@echo "make check    ruff and the fast tests, for people at work: under a minute and a half on two cores"
	@echo "make test     ruff, all tests, every notebook twice (papermill and nbmake)"
	@echo "make data     download the IQ-OTH/NCCD slices to data/iq-oth-nccd"
	@echo "make lidc     download nodules of LIDC-IDRI, the second dataset of notebook 11, to data/lidc-nodules"
	@for name in $(RUN_PROFILES); do \
		printf 'make %-8s %s\n' $$name "$$(sed -n 's/^title: *//p' notebooks/profiles/$$name.yaml)"; done
	@echo "              of a profile, SEEDS=0 or SEEDS=0,1: only these; seeds that are there already are not run again"
	@echo "make tables   results of the runs that are whole, without their weights, of PROFILE=laptop (or another)"
	@echo "make publish  executed notebooks, figures, tables and attack explorer of PROFILE=laptop (or paper) for committing;"
	@echo "              weights of seed 0 with their cards, where they fit into 4 MB;"
	@echo "              of a companion profile (beside: true) figures and tables, to stand beside those"
	@echo "make pdf      paper/paper.pdf from the published tables"
	@echo "make html     build/site: docs/ and the committed notebooks as pages"
	@echo "make lab      JupyterLab with the notebooks"
	@echo "make bundle   one archive with all that a machine without a network lacks: see docs/reproducing.md (HAVE, PYTHON_VERSION, PLATFORM)"
	@echo "make unbundle FILE=results-x.tar.gz: results from there into build/ (FORCE=1 replaces runs that differ)"
	@echo "make clean    remove build/ (results), not the environment"

$(ENV): requirements.lock requirements-uv.lock install.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python install.py
	@touch $@

demo: $(ENV)
	$(WORKFLOW)

.PHONY: check
# Two workers with one thread each: two threads of one test are slower, and wait for each other in a loop.
PYTEST = TQDM_DISABLE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m pytest -n 2

check: $(ENV)
	ruff check
	ruff format --check
	$(PYTEST) -m "not slow"

# While one worker runs the workflow, papermill, the other runs the notebooks by nbmake, on the random split.
test: $(ENV)
	ruff check
	ruff format --check
	rm -rf build/nbmake
	$(PYTEST) --cov --nbmake notebooks tests

data: $(ENV)
	python -m fortify.workflow.download

lidc: $(ENV)
	python -m fortify.workflow.lidc

$(RUN_PROFILES): $(ENV)
	$(WORKFLOW)

tables: CONFIG = --config profile=$(PROFILE) finished=true $(if $(SEEDS),'seeds=[$(SEEDS)]')
tables: $(ENV)
	$(SNAKEMAKE) data $(CONFIG)
	$(SNAKEMAKE) tables --allowed-rules results claims html tables $(CONFIG)

publish: $(ENV)
	python -m fortify.workflow.publish commit build/$(PROFILE)
	python -m fortify.workflow.publish weights build/$(PROFILE)
	python -m fortify.workflow.publish pdf

pdf: $(ENV)
	python -m fortify.workflow.publish pdf

html: $(ENV)
	python -m fortify.workflow.site

lab: $(ENV)
	jupyter lab notebooks

# torch must fit the other machine's driver, and takes gigabytes: that machine has it, unless HAVE= says less.
.PHONY: bundle unbundle
HAVE ?= torch torchvision
bundle: $(ENV)
	python -m fortify.workflow.bundle make --have "$(HAVE)" --with "$(WITH)" --python "$(PYTHON_VERSION)" \
		--platform "$(PLATFORM)" $(if $(filter no,$(DATA)),--no-data)

unbundle: $(ENV)
	python -m fortify.workflow.bundle unbundle "$(FILE)" $(if $(FORCE),--force)

clean:
	rm -rf build .snakemake
