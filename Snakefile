"""The order of the notebooks: one rule each, papermill runs it. `make demo` calls this with profile=demo.

    snakemake --cores all --config profile=laptop            # one parameter changed: ... profile=laptop epochs=30

Results lie in build/<profile>/: data/, <split>-s<seed>/ per run, tables/, figures/, html/.
A rule is redone when its notebook, one of its parameters, a module it computes with, or an input changes.
"""
import os
import sys
from pathlib import Path

import yaml

from fortify.data import find_data, hash_files
from fortify.workflow.profiles import ProfileError, load_profile
from fortify.workflow.locks import wait_for_lock
from snakemake.exceptions import WorkflowError

# Executed notebooks hold no progress bars, and their kernel is this environment's.
os.environ |= {"TQDM_DISABLE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
# glibc hands each layer's freed output back to the system and takes the next one's anew, page by page.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}

# Snakemake's own lock outlives a killed run (and is off, --nolock in the Makefile); this one does not.
if workflow.is_main_process and not {"-n", "--dry-run", "--dryrun"} & set(sys.argv):
    LOCK = wait_for_lock("build/.lock", what="another run in this checkout")
    wait_for_lock("build/.notebook-lock", what="a notebook whose run was killed").close()

PROFILE = config.get("profile", "demo")
BUILD = f"build/{PROFILE}"
NOTEBOOKS = sorted(Path("notebooks").glob("[0-9]*.ipynb"))
try:
    # --config reads what stands in [a, b] as text.
    lists = {name: list(map(yaml.safe_load, map(str, v))) for name, v in config.items() if isinstance(v, list)}
    changes = {name: value for name, value in (config | lists).items() if name != "profile"}
    PARAMETERS = load_profile(f"notebooks/profiles/{PROFILE}.yaml", NOTEBOOKS, changes=changes)
except ProfileError as error:
    raise WorkflowError(str(error))

SPLITS = PARAMETERS["01_data"]["splits"]
SEEDS = PARAMETERS["01_data"]["seeds"]
RUNS = [f"{split}-s{seed}" for seed in SEEDS for split in SPLITS]
# Where none of the seeds that are run is among them: the first.
PUBLISHED_SEEDS = [s for s in SEEDS if s in PARAMETERS["09_claims"]["published_seeds"]] or SEEDS[:1]
PARAMETERS["09_claims"]["published_seeds"] = PUBLISHED_SEEDS
PARAMETERS["07_leakage"]["seed"] = SEEDS[0]
PUBLISHED_RUNS = [f"{split}-s{seed}" for seed in PUBLISHED_SEEDS for split in SPLITS]
FIRST_RUNS = [f"{split}-s{SEEDS[0]}" for split in SPLITS]  # what is looked at once: leakage, audit


def lib(*modules):
    """The modules whose change makes a result stale; style (figures, tables) and files (runs) retrain nothing."""
    return [f"lib/fortify/{module}.py" for module in modules]


def values(notebook, run):
    """The notebook's parameters as the YAML that papermill takes, with the run's folder, split and seed."""

    def filled(wildcards):
        own = PARAMETERS[notebook] | {"run": run.format(**wildcards)}
        own |= {k: int(v) if k == "seed" else v for k, v in wildcards.items()}
        # YAML's own writer: JSON's 5e-05 would be read back as text. One line, for the shell.
        return yaml.safe_dump(own, default_flow_style=True, width=float("inf")).strip()

    return filled


def papermill(notebook):
    # --cwd makes it run where JupyterLab would; the executed copy is a log so that a failed one is kept.
    return f"python -m fortify.workflow.locks build/.notebook-lock papermill notebooks/{notebook}.ipynb" + (
        " {log.notebook} --kernel python3 --cwd notebooks --no-progress-bar -y {params.values:q}"
        " >{log.text} 2>&1 || {{ tail -n 25 {log.text} >&2; exit 1; }}"
    )


def data_folder(wildcards):
    """Which files notebook 01 reads, so that other ones make its results stale; phantoms have none."""
    own = PARAMETERS["01_data"]
    if own["dataset"] == "phantom":
        return ""
    try:
        folder = Path(own["data_dir"] or find_data())
    except FileNotFoundError:
        return "not there yet"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return f"{len(files)} files, {hash_files(files)[:12]}"


# By name: rules.leakage.output would let the rule run where only those after it may (make tables).
LEAKAGE = expand(
    f"{BUILD}/tables/{{table}}.csv",
    table=["leak_meter", "leak_summary", "leak_twins", "leak_tells", "groups", "group_sensitivity", "lungs_or_scanner"],
)


wildcard_constraints:
    split="[a-z]+",
    seed="[0-9]+",


rule data:
    input:
        "notebooks/01_data.ipynb",
        lib("data", "images", "phantom", "splits", "regions"),
    output:
        f"{BUILD}/data/slices.npz",
        f"{BUILD}/data/01_data.json",
        expand(f"{BUILD}/data/splits/{{split}}-s{{seed}}.csv", split=SPLITS, seed=SEEDS),
    params:
        values=values("01_data", f"{BUILD}/data"),
        files=data_folder,
    log:
        notebook=f"{BUILD}/notebooks/01_data.ipynb",
        text=f"{BUILD}/notebooks/01_data.log",
    benchmark:
        f"{BUILD}/benchmarks/01_data.tsv"
    shell:
        papermill("01_data")


rule baseline:
    input:
        "notebooks/02_baseline.ipynb",
        lib("data", "splits", "models", "attacks", "folding", "augmentation", "training", "evaluation"),
        f"{BUILD}/data/slices.npz",
        f"{BUILD}/data/splits/{{split}}-s{{seed}}.csv",
    output:
        f"{BUILD}/{{split}}-s{{seed}}/normal.safetensors",
        f"{BUILD}/{{split}}-s{{seed}}/normal_history.csv",
        f"{BUILD}/{{split}}-s{{seed}}/02_baseline.json",
    params:
        values=values("02_baseline", f"{BUILD}/{{split}}-s{{seed}}"),
    log:
        notebook=f"{BUILD}/notebooks/{{split}}-s{{seed}}/02_baseline.ipynb",
        text=f"{BUILD}/notebooks/{{split}}-s{{seed}}/02_baseline.log",
    benchmark:
        f"{BUILD}/benchmarks/{{split}}-s{{seed}}/02_baseline.tsv"
    threads: workflow.cores
    shell:
        papermill("02_baseline")


rule attacks:
    input:
        "notebooks/03_attacks.ipynb",
        lib("data", "splits", "models", "attacks", "folding", "evaluation"),
        f"{BUILD}/data/slices.npz",
        f"{BUILD}/data/splits/{{split}}-s{{seed}}.csv",
        f"{BUILD}/{{split}}-s{{seed}}/normal.safetensors",
    output:
        f"{BUILD}/{{split}}-s{{seed}}/normal_predictions.csv",
        f"{BUILD}/{{split}}-s{{seed}}/normal_attacked.npz",
        f"{BUILD}/{{split}}-s{{seed}}/03_attacks.json",
    params:
        values=values("03_attacks", f"{BUILD}/{{split}}-s{{seed}}"),
    log:
        notebook=f"{BUILD}/notebooks/{{split}}-s{{seed}}/03_attacks.ipynb",
        text=f"{BUILD}/notebooks/{{split}}-s{{seed}}/03_attacks.log",
    benchmark:
        f"{BUILD}/benchmarks/{{split}}-s{{seed}}/03_attacks.tsv"
    threads: workflow.cores
    shell:
        papermill("03_attacks")


rule adversarial_training:
    input:
        "notebooks/04_adversarial_training.ipynb",
        lib("data", "splits", "models", "attacks", "folding", "augmentation", "training", "evaluation"),
        f"{BUILD}/data/slices.npz",
        f"{BUILD}/data/splits/{{split}}-s{{seed}}.csv",
        f"{BUILD}/{{split}}-s{{seed}}/normal_attacked.npz",
    output:
        f"{BUILD}/{{split}}-s{{seed}}/adversarial.safetensors",
        f"{BUILD}/{{split}}-s{{seed}}/adversarial_history.csv",
        f"{BUILD}/{{split}}-s{{seed}}/adversarial_predictions.csv",
        f"{BUILD}/{{split}}-s{{seed}}/adversarial_attacked.npz",
        f"{BUILD}/{{split}}-s{{seed}}/04_adversarial_training.json",
    params:
        values=values("04_adversarial_training", f"{BUILD}/{{split}}-s{{seed}}"),
    log:
        notebook=f"{BUILD}/notebooks/{{split}}-s{{seed}}/04_adversarial_training.ipynb",
        text=f"{BUILD}/notebooks/{{split}}-s{{seed}}/04_adversarial_training.log",
    benchmark:
        f"{BUILD}/benchmarks/{{split}}-s{{seed}}/04_adversarial_training.tsv"
    threads: workflow.cores
    shell:
        papermill("04_adversarial_training")


rule results:
    input:
        "notebooks/05_results.ipynb",
        lib("evaluation", "tables", "figures"),
        f"{BUILD}/data/slices.npz",
        expand(f"{BUILD}/{{run}}/normal_predictions.csv", run=RUNS),
        expand(f"{BUILD}/{{run}}/adversarial_predictions.csv", run=RUNS),
        expand(f"{BUILD}/{{run}}/{{model}}_history.csv", run=RUNS, model=["normal", "adversarial"]),
    output:
        expand(f"{BUILD}/tables/table1_{{split}}.{{kind}}", split=SPLITS, kind=["csv", "md", "tex"]),
        f"{BUILD}/tables/table1.txt",
        expand(f"{BUILD}/tables/{{table}}.csv", table=["accuracy", "curve", "kept_epochs", "robustness_scores"]),
        f"{BUILD}/results/05_results.json",
        expand(
            f"{BUILD}/figures/{{figure}}.{{kind}}",
            figure=[
                "fig1_system",
                "fig3_normal_clean",
                "fig4_normal_attacked",
                "fig5_adversarial_benign",
                "fig6_adversarial_malignant_normal",
            ],
            kind=["pdf", "png"],
        ),
    params:
        values=values("05_results", f"{BUILD}/results"),
    log:
        notebook=f"{BUILD}/notebooks/05_results.ipynb",
        text=f"{BUILD}/notebooks/05_results.log",
    benchmark:
        f"{BUILD}/benchmarks/05_results.tsv"
    shell:
        papermill("05_results")


rule published_protocol:
    input:
        "notebooks/06_published_protocol.ipynb",
        lib("data", "splits", "models", "attacks", "folding", "training", "evaluation", "published", "printed"),
        f"{BUILD}/data/slices.npz",
        f"{BUILD}/data/splits/{{split}}-s{{seed}}.csv",
        expand(f"{BUILD}/{{{{split}}}}-s{{{{seed}}}}/{{model}}.safetensors", model=["normal", "adversarial"]),
        expand(f"{BUILD}/{{{{split}}}}-s{{{{seed}}}}/{{model}}_predictions.csv", model=["normal", "adversarial"]),
    output:
        f"{BUILD}/{{split}}-s{{seed}}/published.safetensors",
        f"{BUILD}/{{split}}-s{{seed}}/tone_curves.safetensors",
        f"{BUILD}/{{split}}-s{{seed}}/published_predictions.csv",
        f"{BUILD}/{{split}}-s{{seed}}/published_protocol.csv",
        f"{BUILD}/{{split}}-s{{seed}}/06_published_protocol.json",
    params:
        values=values("06_published_protocol", f"{BUILD}/{{split}}-s{{seed}}"),
    log:
        notebook=f"{BUILD}/notebooks/{{split}}-s{{seed}}/06_published_protocol.ipynb",
        text=f"{BUILD}/notebooks/{{split}}-s{{seed}}/06_published_protocol.log",
    benchmark:
        f"{BUILD}/benchmarks/{{split}}-s{{seed}}/06_published_protocol.tsv"
    threads: workflow.cores
    shell:
        papermill("06_published_protocol")


rule leakage:
    input:
        "notebooks/07_leakage.ipynb",
        lib("data", "splits", "models", "attacks", "folding", "evaluation", "leakage", "regions"),
        f"{BUILD}/data/slices.npz",
        expand(f"{BUILD}/data/splits/{{run}}.csv", run=FIRST_RUNS),
        expand(f"{BUILD}/{{run}}/{{model}}.safetensors", run=FIRST_RUNS, model=["normal", "adversarial"]),
        expand(f"{BUILD}/{{run}}/02_baseline.json", run=FIRST_RUNS),
    output:
        LEAKAGE,
        f"{BUILD}/leakage/07_leakage.json",
    params:
        values=values("07_leakage", f"{BUILD}/leakage"),
    log:
        notebook=f"{BUILD}/notebooks/07_leakage.ipynb",
        text=f"{BUILD}/notebooks/07_leakage.log",
    benchmark:
        f"{BUILD}/benchmarks/07_leakage.tsv"
    threads: workflow.cores
    shell:
        papermill("07_leakage")


rule robustness_audit:
    input:
        "notebooks/08_robustness_audit.ipynb",
        lib("data", "splits", "models", "attacks", "folding", "evaluation", "audit", "audit_checks", "audit_context", "audit_zoo", "autoattack"),
        f"{BUILD}/data/slices.npz",
        f"{BUILD}/data/splits/{{split}}-s{{seed}}.csv",
        expand(f"{BUILD}/{{{{split}}}}-s{{{{seed}}}}/{{model}}.safetensors", model=["normal", "adversarial"]),
    output:
        f"{BUILD}/tables/audit_{{split}}-s{{seed}}.csv",
        f"{BUILD}/tables/audit_zoo_{{split}}-s{{seed}}.csv",
        f"{BUILD}/{{split}}-s{{seed}}/08_robustness_audit.json",
    params:
        values=values("08_robustness_audit", f"{BUILD}/{{split}}-s{{seed}}"),
    log:
        notebook=f"{BUILD}/notebooks/{{split}}-s{{seed}}/08_robustness_audit.ipynb",
        text=f"{BUILD}/notebooks/{{split}}-s{{seed}}/08_robustness_audit.log",
    benchmark:
        f"{BUILD}/benchmarks/{{split}}-s{{seed}}/08_robustness_audit.tsv"
    threads: workflow.cores
    shell:
        papermill("08_robustness_audit")


rule audited:
    input:
        rules.results.output,
        expand(f"{BUILD}/tables/audit_{{run}}.csv", run=FIRST_RUNS),


rule claims:
    input:
        "notebooks/09_claims.ipynb",
        "paper/claims.yaml",
        lib("data", "evaluation", "tables", "published", "printed", "claims"),
        rules.results.output,
        LEAKAGE,
        expand(f"{BUILD}/tables/audit_{{run}}.csv", run=FIRST_RUNS),
        expand(f"{BUILD}/{{run}}/published_protocol.csv", run=PUBLISHED_RUNS),
        expand(f"{BUILD}/{{run}}/published_predictions.csv", run=PUBLISHED_RUNS),
        expand(f"{BUILD}/{{run}}/{{model}}_predictions.csv", run=RUNS, model=["normal", "adversarial"]),
    output:
        expand(f"{BUILD}/tables/published_matrix.{{kind}}", kind=["csv", "md", "tex"]),
        expand(
            f"{BUILD}/tables/{{table}}.csv",
            table=["dataset", "gain", "mcnemar", "printed_arithmetic", "published_attacks"],
        ),
        expand(f"{BUILD}/tables/claims.{{kind}}", kind=["csv", "md"]),
        f"{BUILD}/claims/09_claims.json",
    params:
        values=values("09_claims", f"{BUILD}/claims"),
    log:
        notebook=f"{BUILD}/notebooks/09_claims.ipynb",
        text=f"{BUILD}/notebooks/09_claims.log",
    benchmark:
        f"{BUILD}/benchmarks/09_claims.tsv"
    shell:
        papermill("09_claims")


rule html:
    input:
        lib("site"),
        f"{BUILD}/results/05_results.json",
        f"{BUILD}/claims/09_claims.json",
    output:
        f"{BUILD}/html/index.html",
    params:
        build=BUILD,
    shell:
        "python -m fortify.workflow.site {params.build} >/dev/null"


rule all:
    default_target: True
    input:
        f"{BUILD}/html/index.html",
        # Tables and figures too: one that somebody removed is made again, though the pages are there.
        rules.results.output,
        rules.claims.output,
        LEAKAGE,
        expand(f"{BUILD}/tables/audit_{{run}}.csv", run=FIRST_RUNS),
