# What people do: make demo, make test, make laptop, make paper, make lab. `make help` lists all.
.DELETE_ON_ERROR:
.PHONY: help demo test laptop paper resnet18 lungs paper_lungs tables publish pdf html data lab clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= laptop
# Without what is of the paper and of whole slices: the published protocol, the leakage, the claims.
BESIDE := resnet18 lungs paper_lungs
$(BESIDE): GOAL = audited
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
ENV := .venv/.installed
# The environment's programs and kernel before any other.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
# By checksum: slices that were made again, the same, retrain nothing.
SNAKEMAKE = snakemake --cores $(CORES) --nolock --rerun-incomplete --quiet rules --max-checksum-file-size 1000000000
# The slices first, so that what they turn out to be is known when the rest is planned. SEEDS=0,1: these only.
WORKFLOW = $(SNAKEMAKE) data $(CONFIG) && $(SNAKEMAKE) $(GOAL) $(CONFIG)
CONFIG = --config profile=$(or $(RUNS),$@) $(if $(SEEDS),'seeds=[$(SEEDS)]')

help:
	@echo "make demo     the whole paper on embedded phantoms, about 15 minutes on two cores; prints Table 1"
	@echo "make check    ruff and the fast tests, for people at work: under a minute and a half on two cores"
	@echo "make test     ruff, all tests, every notebook twice (papermill and nbmake)"
	@echo "make data     download the IQ-OTH/NCCD slices to data/iq-oth-nccd"
	@echo "make laptop   the real slices, a small ResNet at 112 px, five seeds, an hour and a half on two cores"
	@echo "make paper    the reference run: ResNet-50 at 224 px, five seeds, one GPU"
	@echo "make resnet18 its Table 1 and audit with ResNet-18"
	@echo "make lungs    the laptop profile's on slices cropped to the lungs, an hour and a half"
	@echo "make paper_lungs   the reference run's on slices cropped to the lungs"
	@echo "              of all five, SEEDS=0 or SEEDS=0,1: only these; seeds that are there already are not run again"
	@echo "make tables   results of the seeds that are there, without their weights, of PROFILE=laptop (or paper)"
	@echo "make publish  executed notebooks, figures and tables of PROFILE=laptop (or paper) for committing;"
	@echo "              of PROFILE=resnet18, lungs or paper_lungs figures and tables, to stand beside those"
	@echo "make pdf      paper/paper.pdf from the published tables"
	@echo "make html     build/site: the committed notebooks as pages, Table 1 first"
	@echo "make lab      JupyterLab with the notebooks"
	@echo "make clean    remove build/ (results), not the environment"

$(ENV): requirements.lock requirements-uv.lock install.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python install.py
	@touch $@

demo: $(ENV)
	$(WORKFLOW)
	@cat build/demo/tables/table1.txt
	@echo "Figures: build/demo/figures   Tables: build/demo/tables   Notebooks: build/demo/html/index.html"

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

laptop paper $(BESIDE): $(ENV)
	$(WORKFLOW)
	@cat build/$@/tables/table1.txt

tables: RUNS = $(PROFILE)
tables: SEEDS ?= $(shell ls build/$(PROFILE)/*/adversarial_predictions.csv 2>/dev/null | sed 's/.*-s//; s|/.*||' | sort -nu | paste -sd, -)
tables: $(ENV)
	@test -n "$(SEEDS)" || { echo "build/$(PROFILE) holds no finished seed; run that profile first" >&2; exit 1; }
	$(SNAKEMAKE) data $(CONFIG)
	$(SNAKEMAKE) $(if $(filter $(BESIDE),$(PROFILE)),results,all) --allowed-rules results claims html all $(CONFIG)
	@cat build/$(PROFILE)/tables/table1.txt

publish: $(ENV)
	python -m fortify.workflow.publish commit build/$(PROFILE)
	python -m fortify.workflow.publish pdf

pdf: $(ENV)
	python -m fortify.workflow.publish pdf

html: $(ENV)
	python -m fortify.workflow.site

lab: $(ENV)
	jupyter lab notebooks

clean:
	rm -rf build .snakemake
