"""The order of the notebooks: one rule each, papermill runs it. `make demo` calls this with profile=demo.

    snakemake --config profile=laptop            # one parameter changed: ... profile=laptop epochs=30

Results lie in build/<profile>/: data/, <split>-s<seed>/ per run, tables/, figures/, html/. A rule is redone
when one of its parameters, code that it computes with (its notebook's cells too), or an input changes.
To add a notebook: its file, and a row in STEPS.
"""
import os
import sys
from pathlib import Path

import yaml

from fortify import lidc
from fortify.evaluation import TRAININGS
from fortify.experiments import experiment_files
from fortify.workflow.locks import join_call, wait_for_profile
from fortify.workflow.notebooks import code_of
from fortify.workflow.profiles import ProfileError, load_profile, read_profile
from fortify.workflow.progress import show_progress
from fortify.workflow.steps import STYLE, Step, each, finished_runs, image_files, needed_for, split_and_seed
from snakemake.exceptions import WorkflowError

# Executed notebooks hold no progress bars, and their kernel is this environment's.
os.environ |= {"TQDM_DISABLE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # so is its python
# glibc hands each layer's freed output back to the system and takes the next one's anew, page by page.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}

PROFILE = config.get("profile", "demo")
BUILD = f"build/{PROFILE}"
FILE = f"notebooks/profiles/{PROFILE}.yaml"
try:
    # --config reads what stands in [a, b] as text.
    lists = {name: list(map(yaml.safe_load, map(str, v))) for name, v in config.items() if isinstance(v, list)}
    changes = {k: v for k, v in (config | lists).items() if k not in ("profile", "finished")}
    PARAMETERS = load_profile(FILE, sorted(Path("notebooks").glob("[0-9]*.ipynb")), changes=changes)
    ABOUT = read_profile(FILE)[1]
    COMPANION = ABOUT["beside"]
except ProfileError as error:
    raise WorkflowError(str(error))

# Snakemake's own lock outlives a killed run (and is off, see profiles/default); this one does not.
if workflow.is_main_process and not workflow.output_settings.dryrun:
    LOCK = wait_for_profile(BUILD)
if not workflow.is_main_process:  # a notebook as a job of its own, on a cluster
    LOCK = join_call(f"{BUILD}/.notebook-lock")

# What Table 1 takes of each run, and what the claims do.
ROWS = [f"{name}_{kind}.csv" for kind in ("predictions", "history") for name in ("normal", "adversarial")]
OF_TABLE1 = [
    f"{name}_{kind}.csv"
    for kind in ("predictions", "logits")
    for name, training in TRAININGS.items()
    if training.table1
]
SIMPLE = ["baselines_predictions.csv", "baselines_logits.csv"]
PROTOCOL = ["published_predictions.csv", "published_protocol.csv"]
MODELS = ["normal.safetensors", "adversarial.safetensors"]

DATA = PARAMETERS["01_data"]
RUNS = [
    f"{split}-s{seed}"
    for seed in DATA["seeds"]
    for split in DATA["splits"]
    if seed in ABOUT["seeds_of"].get(split, [seed])
]
FINISHED = bool(config.get("finished"))  # make tables: what is whole, of each split, whatever the profile's seeds
if FINISHED:
    needs = [*ROWS, *OF_TABLE1, *SIMPLE, "02_baseline.json", "03_attacks.json", "04_adversarial_training.json"]
    RUNS = finished_runs(BUILD, needs, splits=DATA["splits"], seeds=changes.get("seeds"))
    if not RUNS:
        raise WorkflowError(f"{BUILD} holds no finished run; run that profile first")
    DATA["splits"] = [split for split in DATA["splits"] if split in {split_and_seed(run)[0] for run in RUNS}]
    DATA["seeds"] = sorted({split_and_seed(run)[1] for run in RUNS})
SPLITS, SEEDS = DATA["splits"], DATA["seeds"]
# Where none of the seeds, or splits, that are run is among them: the first.
PUBLISHED_SEEDS = [s for s in SEEDS if s in PARAMETERS["09_claims"]["published_seeds"]] or SEEDS[:1]
PARAMETERS["09_claims"]["published_seeds"] = PUBLISHED_SEEDS
PARAMETERS["07_leakage"]["seed"] = SEEDS[0]
PUBLISHED_RUNS = [run for run in RUNS if split_and_seed(run)[1] in PUBLISHED_SEEDS]
FIRST_RUNS = [run for run in RUNS if split_and_seed(run)[1] == SEEDS[0]]  # looked at once: leakage, audit
AUDITED = [split for split in SPLITS if split in PARAMETERS["09_claims"]["audit_splits"]] or SPLITS[:1]
if FINISHED:
    whole = finished_runs(BUILD, [*PROTOCOL, "06_published_protocol.json"], splits=SPLITS)
    PUBLISHED_RUNS = [run for run in PUBLISHED_RUNS if run in whole]
    AUDITED = [split for split in SPLITS if Path(f"{BUILD}/tables/audit_{split}-s{SEEDS[0]}.csv").is_file()]
PARAMETERS["09_claims"]["audit_splits"] = AUDITED


def tables(names):
    return [f"tables/{name}.csv" for name in names.split()]


TABLE1 = [f"table1_{split}{part}" for split in SPLITS for part in ("", "_classes")]
TABLE1 = [f"tables/{name}.{kind}" for name in TABLE1 for kind in ("csv", "md", "tex")]
TABLE1 += ["tables/table1.txt", *tables("table1_gains accuracy curve kept_epochs robustness_scores")]
FIGURES = "fig1_system fig3_normal_clean fig4_normal_attacked fig5_adversarial_benign".split()
FIGURES += ["fig6_adversarial_malignant_normal", "robustness_curves", "training_curves", "failures"]
FIGURES = [f"figures/{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")]
LEAKAGE = tables("leak_meter leak_summary leak_twins leak_tells groups group_sensitivity lungs_or_scanner")
AUDITS = [f"tables/audit_{split}-s{SEEDS[0]}.csv" for split in AUDITED]
# Looked at once too, on the grouped split, where an attacker can have patients of his own.
TRANSFERS = [run for run in FIRST_RUNS if split_and_seed(run)[0] == "grouped"] or FIRST_RUNS[:1]
OF_TRANSFER = "transfer transfer_pooled nodules nodules_groups nodules_gains nodules_attacked".split()
OF_TRANSFER = [f"tables/{name}_{{run}}.csv" for name in OF_TRANSFER]
if FINISHED:
    TRANSFERS = [run for run in TRANSFERS if Path(f"{BUILD}/{run}/11_transfer.json").is_file()]
# Networks of the second dataset, where it is there: notebook 12 explains them too.
NODULES = [f"{{run}}/nodules_{name}" for name in MODELS]
if PARAMETERS["11_transfer"]["second_data"] == "lidc" and not lidc.is_there():
    NODULES = []
DETECTION = [f"tables/detection{part}_{run}.csv" for run in FIRST_RUNS for part in ("", "_implied", "_latency")]
if FINISHED:
    DETECTION = [path for path in DETECTION if Path(f"{BUILD}/{path}").is_file()]
LEDGER = tables("published_matrix dataset gain mcnemar printed_arithmetic published_attacks claims")
LEDGER += ["tables/published_matrix.md", "tables/published_matrix.tex", "tables/claims.md"]
COMPARED_RUNS = PARAMETERS["10_robust_optimisation"]["compared_runs"]
COMPARED = tables("comparison comparison_gains comparison_costs comparison_seconds")
EXPERIMENTS = {name: str(path) for name, path in experiment_files("", PROFILE).items()}  # of benchmarks/
COMPARED += tables(" ".join(f"experiment_{name}" for name in EXPERIMENTS))
EXPLAINED = [f"tables/explanations_{run}.csv" for run in FIRST_RUNS]
if FINISHED:
    COMPARED, EXPLAINED = (
        [path for path in paths if Path(f"{BUILD}/{path}").is_file()] for paths in (COMPARED, EXPLAINED)
    )
EXPLORER = ["explorer/data.js"]
if FINISHED:
    EXPLORER = [path for path in EXPLORER if Path(f"{BUILD}/{path}").is_file()]
# What the ledger reads of notebooks 10 to 13.
CHAPTERS = [*COMPARED, *EXPLAINED, *DETECTION]
CHAPTERS += [path.format(run=run) for run in TRANSFERS for path in OF_TRANSFER]
if FINISHED:
    CHAPTERS = [path for path in CHAPTERS if Path(f"{BUILD}/{path}").is_file()]
# README's figure is of the first run on a random split that the published training was run on.
SHOWN = next((run for run in FIRST_RUNS if run in PUBLISHED_RUNS and split_and_seed(run)[0] == "random"), None)
HERO = ["data/slices.npz", f"data/splits/{SHOWN}.csv"] if SHOWN else []
HERO += [f"{SHOWN}/{n}" for n in (MODELS[0], ROWS[0], PROTOCOL[1], "normal_attacked.npz", "03_attacks.json") if SHOWN]
if FINISHED and not all(Path(f"{BUILD}/{path}").is_file() for path in HERO):  # weights may be gone
    HERO = []
OF_RUN = ["data/slices.npz", "data/splits/{run}.csv"]

STEPS = [  # rule, notebook, folder of its manifest, what it reads, what it writes; {run}: for each split and seed
    Step("data", "01_data", "data", [],
         ["data/slices.npz", *(f"data/splits/{split}-s{seed}.csv" for split in SPLITS for seed in SEEDS)],
         costly=False),
    Step("baseline", "02_baseline", "{run}", OF_RUN,
         each(["{run}"], "normal.safetensors", "normal_history.csv")),
    Step("attacks", "03_attacks", "{run}", [*OF_RUN, "{run}/normal.safetensors"],
         each(["{run}"], "normal_predictions.csv", "normal_logits.csv", "normal_attacked.npz", *SIMPLE)),
    Step("adversarial_training", "04_adversarial_training", "{run}",
         [*OF_RUN, *each(["{run}"], "normal_attacked.npz", "normal_predictions.csv")],
         each(["{run}"], "adversarial.safetensors", *(f"adversarial_{end}" for end in
              ("history.csv", "predictions.csv", "logits.csv", "attacked.npz")))),
    Step("results", "05_results", "results", ["data/slices.npz", *each(RUNS, *dict.fromkeys(ROWS + OF_TABLE1 + SIMPLE))],
         TABLE1 + FIGURES, costly=False),
    Step("published_protocol", "06_published_protocol", "{run}", [*OF_RUN, *each(["{run}"], *MODELS, *ROWS[:2])],
         each(["{run}"], "published.safetensors", "tone_curves.safetensors", *PROTOCOL)),
    Step("leakage", "07_leakage", "leakage",
         ["data/slices.npz", *(f"data/splits/{run}.csv" for run in FIRST_RUNS), *each(FIRST_RUNS, *MODELS)],
         LEAKAGE),
    Step("robustness_audit", "08_robustness_audit", "{run}", [*OF_RUN, *each(["{run}"], *MODELS)],
         ["tables/audit_{run}.csv", "tables/audit_mutants_{run}.csv", "tables/audit_accuracies_{run}.csv"]),
    Step("robust_optimisation", "10_robust_optimisation", "robust_optimisation",
         ["data/slices.npz", *(f"data/splits/{run}.csv" for run in RUNS if run in COMPARED_RUNS),
          *each(FIRST_RUNS, MODELS[1])], COMPARED),
    Step("explanations", "12_explanations", "{run}",
         [*OF_RUN, *each(["{run}"], *MODELS, "normal_attacked.npz", "adversarial_attacked.npz")],
         ["tables/explanations_{run}.csv"]),
    Step("transfer", "11_transfer", "{run}", [*OF_RUN, *each(["{run}"], *MODELS)],
         [*each(["{run}"], "transfer_rows.csv", "nodule_logits.csv", "nodule_rows.csv"), *NODULES, *OF_TRANSFER]),
    Step("detection", "13_detection", "{run}",
         [*OF_RUN, *each(["{run}"], "normal.safetensors", "normal_attacked.npz", "adversarial_predictions.csv")],
         ["{run}/normal_detectors.safetensors", "{run}/detection_rows.csv",
          *(f"tables/detection{part}_{{run}}.csv" for part in ("", "_implied", "_false_alarms", "_latency"))]),
    Step("claims", "09_claims", "claims",
         [*TABLE1, *LEAKAGE, *AUDITS, *each(PUBLISHED_RUNS, *PROTOCOL), *each(RUNS, *ROWS[:2]), *CHAPTERS],
         LEDGER, costly=False),
]  # fmt: skip
FIRST = needed_for("results", STEPS)  # what Table 1 needs runs before all else
show_progress(workflow, BUILD, seeds=SEEDS)


def built(paths):
    return [f"{BUILD}/{path}" for path in paths]


def files_of(step):
    """What a step reads from outside the build: other files make its results stale."""
    if step.name == "transfer" and PARAMETERS["11_transfer"]["second_data"] == "lidc":
        return "there" if lidc.is_there() else "not there yet"  # each file is checked when it is read
    return image_files(DATA) if step.name == "data" else ""


def nodule_networks(wildcards):
    """What notebook 12 reads of notebook 11, which is run on one split."""
    return built(path.format(run=wildcards.run) for path in NODULES if wildcards.run in TRANSFERS)


wildcard_constraints:
    run="[a-z]+-s[0-9]+",


for step in STEPS:

    rule:
        name:
            step.name
        input:
            ancient(step.source) if step.costly else step.source,  # params.code holds its cells
            ["paper/claims.yaml"] if step.name == "claims" else [],
            [*EXPERIMENTS.values()] if step.name == "robust_optimisation" else [],
            nodule_networks if step.name == "explanations" else [],
            built(step.reads),
        output:
            built([*step.writes, f"{step.folder}/{step.notebook}.json"]),
        params:
            values=step.values(PARAMETERS, BUILD),
            inherited=step.inherited(PARAMETERS),
            code=step.code(),
            files=files_of(step),
            lock=f"{BUILD}/.notebook-lock",
        log:
            notebook=f"{BUILD}/notebooks/{step.below}.ipynb",
            text=f"{BUILD}/notebooks/{step.below}.log",
        benchmark:
            f"{BUILD}/benchmarks/{step.below}.tsv"
        threads: workflow.cores if step.costly else 1
        priority: int(step.name in FIRST)
        resources:
            gpu=step.gpus(PARAMETERS),
        # --cwd makes it run where JupyterLab would; the executed copy is a log so that a failed one is kept.
        shell:
            "python -m fortify.workflow.locks {params.lock} python -m fortify.workflow.papermill {input[0]} {log.notebook}"
            " --kernel python3 --cwd notebooks --no-progress-bar -y {params.values:q} >{log.text} 2>&1"
            " || {{ tail -n 25 {log.text} >&2; exit 1; }}"


ATTACKS = next(step for step in STEPS if step.name == "attacks")


rule explorer:  # what the attack explorer shows, of the networks that are looked at once
    input:
        built(["data/slices.npz", *(f"data/splits/{run}.csv" for run in FIRST_RUNS)]),
        built(each(FIRST_RUNS, *MODELS, *ROWS[:2])),
        built(each([run for run in FIRST_RUNS if run in PUBLISHED_RUNS], "published.safetensors", *PROTOCOL)),
    output:
        f"{BUILD}/explorer/data.js",
    params:
        runs=FIRST_RUNS,
        build=BUILD,
        values=[PARAMETERS["03_attacks"][n] for n in ("eps_255", "eps_grid_255", "pgd_steps", "pgd_restarts")],
        code=code_of("fortify.examined.explorer", without=STYLE),
        lock=f"{BUILD}/.notebook-lock",
    log:
        f"{BUILD}/explorer/data.log",
    threads: workflow.cores
    resources:
        gpu=ATTACKS.gpus(PARAMETERS),
    shell:
        "python -m fortify.workflow.locks {params.lock} python -m fortify.examined.explorer {params.build} {params.runs}"
        " >{log} 2>&1 || {{ cat {log} >&2; exit 1; }}"


localrules:
    html,


rule html:
    input:
        built(["results/05_results.json", "claims/09_claims.json"]),
        built([*COMPARED, *EXPLAINED, *DETECTION, *[f"{run}/11_transfer.json" for run in TRANSFERS]]),  # have pages
        built(EXPLORER),
        built(HERO),
    output:
        f"{BUILD}/html/index.html",  # README's figure is no output: without weights the pages are made, it is not
    params:
        build=BUILD,
        hero=f"python -m fortify.workflow.hero {BUILD} {SHOWN} >/dev/null && " if HERO else "",
        code=[code_of(f"fortify.workflow.{name}") for name in ("site", *(["hero"] if HERO else []))],
    shell:
        "{params.hero}python -m fortify.workflow.site {params.build} >/dev/null"


# Tables and figures too: one that somebody removed is made again, though the pages are there. Paths and not
# rules.x.output, which would let x run where only those after it may (make tables).
WHOLE = [*TABLE1, *FIGURES, *LEDGER, *LEAKAGE, *AUDITS, *COMPARED, *EXPLAINED, *DETECTION, "html/index.html"]
WHOLE += EXPLORER + [path.format(run=run) for run in TRANSFERS for path in OF_TRANSFER]


rule audited:
    input:
        built([*TABLE1, *FIGURES, *AUDITS]),


rule all:
    default_target: True
    input:
        rules.audited.input if COMPANION else built(WHOLE),


# Without what the claims read: Table 1 alone.
CLAIMED = not COMPANION and PUBLISHED_RUNS and AUDITED and all(Path(p).is_file() for p in built(LEAKAGE))


rule tables:
    input:
        built(WHOLE if CLAIMED else [*TABLE1, *FIGURES]),
