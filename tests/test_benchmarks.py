"""The benchmarks run: what they compare does what it must. Their timings are no test."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fortify.attacks import PGD, attacks_over
from fortify.fused import FusedModel, Padded
from fortify.models import build_model
from fortify.objectives import OBJECTIVES
from fortify.runs import declared_parameters
from fortify.splits import near_duplicate_groups
from fortify.training import Recipe, _at_epoch
from fortify.workflow.publish import published_folders

ROOT = Path(__file__).parents[1]
SHIPPED = "16/255, a quarter clean, longest, faster"  # of benchmarks/ablation.py


def shown_in(page, section):
    """What a page of docs/ shows between the markers of a section."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    return text.split(f"<!-- generated: {section} -->\n")[1].split(f"<!-- /generated: {section} -->")[0]


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch):
    """As Python sees them when it runs one."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


LIBRARIES = ("fortify", "fortify, bfloat16", "foolbox")  # measured on a CPU
COMPILED = "fortify, bfloat16, compiled"


@pytest.fixture
def speed(monkeypatch):
    module = importlib.import_module("speed")
    monkeypatch.setitem(module.SHAPES, "cpu", ("resnet_small", 32, 4, 2))
    monkeypatch.setattr(module, "machine", lambda device: (1e11, 1e10))
    monkeypatch.setattr(module, "LIBRARIES", {n: module.LIBRARIES[n] for n in (*LIBRARIES, COMPILED)})
    return module


@pytest.fixture
def without_processes(speed, monkeypatch):
    monkeypatch.setattr(speed, "peak_memory", lambda task, name, device, run: 7.0)


def test_every_library_at_hand_is_measured_and_what_is_missing_is_named(speed, without_processes, capsys):
    def absent(model, x):
        raise ImportError("No module named 'absent'")

    speed.LIBRARIES["absent"] = absent
    table = speed.measure("cpu", rounds=2)
    own = {task: part.library.tolist() for task, part in table.groupby("task")}
    every, reported = list(LIBRARIES), ["fortify", "foolbox"]  # reported evaluation has no low precision
    assert own == {"crafting": every, "accuracy": reported, "training": every, "table1": reported}
    assert list(table.task.unique()) == list(speed.TASKS) and (table.images_per_s > 0).all()
    assert table.bfloat16_is_faster.notna().tolist() == table.task.isin(["crafting", "training"]).tolist()
    ours = table[table.library.eq("fortify")]
    assert (ours.fortify_is_faster == 1).all() and (table.ratio_min <= table.ratio_max).all()
    assert table.share_of_matrix_peak.notna().sum() == 3, "of crafting alone"
    assert "absent is left out: No module named 'absent'" in capsys.readouterr().err
    assert len(speed.figure(table).axes) == 4


def test_what_is_called_bfloat16_is(speed, monkeypatch):
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    model = speed.build_model("resnet_small", num_classes=3, seed=0).eval()
    y, dtypes = torch.tensor([0, 1, 2, 0]), []
    relu = [m for m in model.modules() if isinstance(m, torch.nn.ReLU)][-1]  # the fused's copy has its hook
    relu.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    found = speed.low_attacks(model, x)["pgd"](2)
    dtypes.clear()
    assert found(x, y).shape == x.shape and set(dtypes) == {torch.bfloat16}
    asked = []
    monkeypatch.setattr(speed, "_epoch", lambda *arguments: asked.append(arguments[5].precision))
    for name in ("fortify", "fortify, bfloat16"):
        speed.training(name, None, model, x, y, 2)()
    assert asked == ["auto", "bfloat16"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_what_is_called_compiled_is_and_is_measured_where_it_is_worth_it(
    speed, without_processes, monkeypatch
):
    made = []
    monkeypatch.setattr(speed, "FusedModel", lambda *a, **o: made.append(FusedModel(*a, **o)) or made[-1])
    monkeypatch.setattr(speed, "COMPILES", ("cpu",))
    table = speed.measure("cpu", rounds=1, tasks=["crafting", "accuracy", "training"])
    compiled = [isinstance(getattr(fused.net, "model", None), Padded) for fused in made]
    crafting, training = [False, True], [False, *[False] * 2, *[True] * 2]  # training: one of crafting unused
    assert compiled == crafting + training
    assert set(table.task[table.library.eq(COMPILED)]) == {"crafting", "training"}
    shown = " ".join(speed.section(table, "cpu"))
    for task in ("crafting", "training"):
        row = table[table.library.eq("foolbox") & table.task.eq(task)].iloc[0]
        assert f"Compiled, {task} is {row.compiled_is_faster:.2f}× as fast as foolbox" in shown


def test_memory_is_that_of_the_task(speed):
    """PGD of a larger batch needs more: 64 images of 64 px take the stem's output alone 6 MiB of float32."""
    few = speed.peak_memory("crafting", "fortify", "cpu", None)
    speed.SHAPES["cpu"] = ("resnet_small", 64, 64, 2)
    many = speed.peak_memory("crafting", "fortify", "cpu", None)
    assert 0 < few < many - 6 and many < 2000


def test_a_task_measured_again_leaves_the_others_rows(speed, without_processes, tmp_path):
    both = speed.measure("cpu", rounds=1, tasks=["training", "accuracy"])
    both.to_csv(tmp_path / "speed_cpu.csv", index=False)
    again = speed.measure("cpu", rounds=2, tasks=["accuracy"])
    table = speed.merged(tmp_path / "speed_cpu.csv", again)
    assert table.task.tolist() == ["accuracy"] * 2 + ["training"] * 3
    assert table.rounds.tolist() == [2, 2, 1, 1, 1]
    shown = "\n".join(speed.section(table, "cpu"))
    assert "Rounds: 1 (adversarial training step), 2 (PGD accuracy)" in shown
    faster = table.bfloat16_is_faster.iloc[-1]
    assert f"In bfloat16 training is {faster:.2f}× as fast as foolbox." in shown
    assert "`--tasks crafting` has not been run" in shown and "`--tasks training`" not in shown


def test_a_library_that_attacks_with_another_budget_is_no_comparison(speed, without_processes):
    speed.LIBRARIES = {"fortify": lambda model, x: {"pgd": lambda steps: lambda images, labels: images}}
    with pytest.raises(RuntimeError, match="fortify moved greys by up to 0, not by the budget of 4"):
        speed.measure("cpu", rounds=1, tasks=["crafting"])


def test_flops_are_those_of_the_layers(speed):
    """PGD without weight gradients: twice the forward's arithmetic a step."""
    x = torch.rand(2, 1, 32, 32)
    model = speed.build_model("resnet_small", num_classes=3, seed=0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    flops, moved = speed.per_image("resnet_small", x, 3)
    assert flops == pytest.approx(6 * counter.get_total_flops() / 2, rel=0.01) and moved > 0


@pytest.fixture
def scaling():
    return importlib.import_module("scaling")


def test_scaling_covers_what_it_names_and_finds_the_cost_it_is_given(scaling, monkeypatch):
    monkeypatch.setitem(scaling.SHAPES, "cpu", ("resnet_small", 32, 2, 1))
    for name, values in (("BATCHES", (1, 2)), ("SIDES", (32,)), ("STEPS", (1, 2)), ("IMAGES", (8, 12))):
        monkeypatch.setattr(scaling, name, values)
    monkeypatch.setattr(scaling, "STEPS", (1, 2, 1))
    table = scaling.measure("cpu", rounds=1)
    assert table.groupby("varied", sort=False).size().tolist() == [2, 1, 3, 2]
    assert np.allclose(table.images_per_s[:2] * table.seconds[:2], [1, 2])
    given = pd.DataFrame({"varied": "training: attack steps", "value": [1, 2, 4]})
    start, slope = scaling.cost(given.assign(images_per_s=1000 / (7 + 2 * given.value)))
    assert (start, slope) == pytest.approx((7, 2))


def test_peak_memory_is_that_of_the_call_alone():
    results = importlib.import_module("results")
    np.ones(40_000_000)  # 305 MiB, before
    seconds, peak = results.grown(lambda: np.ones(20_000_000))
    assert seconds > 0 and 150 < peak < 200


def test_growth_is_measured_for_every_size_and_its_power_is_of_the_ends(scaling, monkeypatch):
    monkeypatch.setattr(scaling, "FOLDERS", (300, 600))
    monkeypatch.setattr("fortify.leakage.meter._TREES", 2)
    monkeypatch.setattr(importlib.import_module("results"), "fresh", lambda function, *a: function(*a))
    table = scaling.measure_growth()
    names = [f"{name}: images" for name in scaling.GROWING for _ in range(2)]
    assert table.varied.tolist() == names and table.value.tolist() == [300, 600] * 3
    assert (table.seconds > 0).all()
    assert scaling.exponent([3, 1, 300], [10, 50, 100]) == pytest.approx(2)
    given = table.assign(seconds=[1, 4, 1, 2, 1, 1], peak_mib=[2000, 4000, 1, 1, np.nan, np.nan])
    shown, text = scaling.growth_text(given)
    assert "| grouping: s, as N^2.0 | 1 | 4 |\n| grouping: MiB, as N^1.0 | 2,000 | 4,000 |\n" in shown
    assert "near-duplicates: s, as N^0.0 | 1 | 1 |" in shown and "near-duplicates: MiB" not in shown
    assert "from 300 to 600 images" in text


def test_memory_grows_by_the_thumbnails_in_a_fresh_process(scaling):
    """Of 2,000 images of 56 px they take 24 MiB, and r of a block of 1,024 with all takes 8."""
    seconds, peak = importlib.import_module("results").fresh(scaling.growing, "grouping", 2000)
    assert seconds > 0 and 32 < peak < 150


def test_the_made_up_images_are_alike_within_a_patient_alone(scaling):
    slices = scaling.made_up(500)
    assert (near_duplicate_groups(slices) == slices.patients).all() and len(slices) == 500
    assert set(np.unique(slices.labels)) == {0, 1, 2}


def test_nodes_take_the_job_with_the_longest_chain_behind_it(scaling):
    """Two nodes, one short and one long chain after a: whoever starts with the short one ends later."""
    needs = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a"}, "e": {"d"}, "f": {"b", "c", "e"}}
    seconds = {"a": 1, "b": 2, "c": 2, "d": 2, "e": 3, "f": 0}
    assert scaling.chains(seconds, needs) == {"a": 6, "b": 2, "c": 2, "d": 5, "e": 3, "f": 0}
    same = dict.fromkeys("abcdef", 0)
    assert [scaling.makespan(seconds, needs, nodes, same) for nodes in (1, 2, 3)] == [10, 6, 6]
    assert scaling.makespan(seconds, needs, 2, same | {"b": 1, "c": 1}) == 8


def test_priorities_are_those_of_the_rules(scaling, tmp_path):
    rules = [f"rule {name}:\n    output: '{name}'\n" for name in "abc"]
    parts = [rules[0] + "    priority: 3\n", rules[1] + "    input: 'a'\n", rules[2] + "    input: 'b'\n"]
    parts = [part + "    shell: 'false'\n" for part in parts]
    (tmp_path / "Snakefile").write_text("\n".join(reversed(parts)))
    assert scaling.rule_priorities(tmp_path, "any") == {"a": 3}
    rules, needs = scaling.workflow_jobs(tmp_path, "any", 1)
    assert {rules[job]: {rules[need] for need in own} for job, own in needs.items()} == {
        "a": set(), "b": {"a"}, "c": {"b"}
    }  # fmt: skip


@pytest.fixture
def timed(tmp_path):
    """A checkout whose every notebook took a second."""
    for name in ("Snakefile", "notebooks", "profiles", "lib", "paper"):
        (tmp_path / name).symlink_to(ROOT / name)
    for number, notebook in enumerate(sorted(ROOT.glob("notebooks/[0-9]*.ipynb"))):
        for run, seconds in (("random-s0", 0.5), ("grouped-s0", 1.5)) if number else [("", 1)]:
            file = tmp_path / f"build/test/benchmarks/{run}/{notebook.stem}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"s\th:m:s\n{seconds}\t0:00:01\n")
    (tmp_path / "build/test/random-s0").mkdir()
    (tmp_path / "build/test/random-s0/02_baseline.json").write_text('{"device": "a computer"}')
    return tmp_path


def test_the_jobs_of_the_workflow_are_put_on_nodes(scaling, timed, monkeypatch):
    """Two seeds on two splits: four runs of three steps and the protocol, results, leakage, audits, claims,
    and what looks at the first seed alone.

    On four nodes: data, then three steps of all runs, then fourteen jobs, of which
    the explanations wait for the transfer, then the claims.
    """
    shutil.copytree(ROOT / "benchmarks", timed / "benchmarks")
    (timed / "docs").mkdir()
    (timed / "docs/speed.md").write_text("<!-- generated: cost --><!-- /generated: cost -->")
    monkeypatch.setattr(scaling, "find_root", lambda: timed)
    monkeypatch.setattr(scaling, "SEEDS", (2,))
    monkeypatch.setattr("sys.argv", ["scaling.py", "--parts", "nodes", "--profile", "test"])
    scaling.main()
    before, after = (pd.read_csv(root / "benchmarks/scaling_cpu.csv") for root in (ROOT, timed))
    part, kept = scaling.parts_of(after), ["varied", "value", "seconds", "images_per_s"]
    assert part.tolist() == sorted(part, key=scaling.PARTS["cpu"].index)
    sizes = [table.loc[scaling.parts_of(table).eq("sizes"), kept] for table in (before, after)]
    pd.testing.assert_frame_equal(*sizes)
    assert ",112,32,10," in (timed / "benchmarks/scaling_cpu.csv").read_text(), "the paper shows them as text"
    table = after[part.eq("nodes")]
    jobs = int(table.jobs.iloc[0])
    assert jobs - (1 + 4 * 3 + 4 + 3 + 6) in (1, 2), "an audit of one split, or of both"
    assert (table.jobs == jobs).all() and table.value.tolist() == [1, 2, 4]
    assert table.seconds.tolist()[::2] == [jobs, 1 + 3 + 4 + 1] and (table.chain_s == 7).all()
    assert jobs / 2 <= table.seconds.tolist()[1] < jobs
    shown = (timed / "docs/speed.md").read_text()
    assert f"| 2 × 2 | {jobs} | {jobs / 60:.1f} min | 0.2 min | 0.1 min | 0.1 min |\n" in shown
    assert f"4 nodes finish 2 seeds {jobs / 9:.1f} times faster than 1." in shown
    assert "`build/test` (a computer)" in shown


def test_a_gpu_has_the_sizes_alone(scaling, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling.py", "--device", "cuda", "--parts", "sizes", "nodes"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "nodes: not measured on cuda; leave it out or --device cpu." in capsys.readouterr().err


def test_a_workflow_without_times_is_refused(scaling, timed):
    for file in timed.glob("build/test/benchmarks/*/07_leakage.tsv"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no times of leakage: run make test first"):
        scaling.rule_seconds(timed, "test", {"data", "leakage", "html"})
    assert scaling.rule_seconds(timed, "test", {"data", "attacks", "html"}) == {"data": 1, "attacks": 1}
    with pytest.raises(RuntimeError, match="snakemake cannot plan the profile nobodys"):
        scaling.workflow_jobs(timed, "nobodys", 1)


@pytest.mark.parametrize("name", ["speed", "scaling", "spread", "evaluation", "grouping"])
def test_the_pages_show_what_was_measured(name):
    results = importlib.import_module("results")
    assert shown_in(*results.SECTIONS[name]) == results.section(ROOT, name) != ""


@pytest.mark.parametrize("name", ["recipes", "resolution"])
def test_the_page_of_recipes_shows_them(name):
    path, shown = ROOT / f"benchmarks/{name}.csv", shown_in("recipe", name)
    if path.is_file():
        assert shown == importlib.import_module(name).section(pd.read_csv(path))
    else:
        assert shown == "It has not been run yet.\n"


def test_a_fold_chooses_among_the_recipes_that_all_folds_have():
    recipes = importlib.import_module("recipes")
    rows = [("a", 0, 5), ("a", 1, 9), ("b", 0, 6), ("b", 1, 8), ("c", 1, 10)]
    table = pd.DataFrame(rows, columns=["variant", "fold", "pgd"]).assign(n=10)
    assert recipes.choices(table) == (
        "\nOf the 2 recipes that all folds have, their own validation slices under attack choose "
        "*a* (fold 1), *b* (fold 0).\n"
    )
    assert recipes.choices(table[table.variant != "b"]) == ""


@pytest.fixture
def ablation():
    return importlib.import_module("ablation")


@pytest.fixture
def declared(ablation):
    """Notebook 4's parameters and values, with those that it takes from notebooks 2 and 3."""
    return ablation.parameters_of("paper")["04_adversarial_training"]


def test_runs_that_differ_in_nothing_are_the_same_and_others_say_how_far_apart(phantoms, declared, capsys):
    spread = importlib.import_module("spread")
    few = replace(phantoms, groups=near_duplicate_groups(phantoms)).subset(range(0, 120, 2))
    small = declared | {"arch": "resnet_small", "epochs": 1, "batch_size": 16, "train_pgd_steps": 2}
    table = spread.measure("cpu", 2, small, few)
    assert table.stage.tolist() == ["training", "training", "attack", "attack", "attack", "training"]
    same = table[table.differs.eq("nothing")]
    assert (same.weights_apart == 0).all() and (same[["clean_changed", "pgd_changed"]] == 0).all(axis=None)
    assert (table.weights_apart[table.stage.eq("attack")] == 0).all()
    assert (table.pgd <= table.clean).all() and (table.pgd_changed >= (table.pgd - table.pgd[0]).abs()).all()
    shown = "\n".join(spread.section(table.assign(weights_apart=[0, 0, 0, 0, 0, 2e-4]), "cpu"))
    assert "| training | one thread | 2.0e-04 |" in shown and "| training | nothing | 0 |" in shown


def test_each_run_is_compared_with_the_first(phantoms, declared, monkeypatch):
    spread, seeds = importlib.import_module("spread"), iter((0, 1, 2, 0))
    made = []

    def another(parameters, train, val, seed, device):
        made.append(build_model("resnet_small", num_classes=3, seed=next(seeds)).eval())
        return made[-1], None

    monkeypatch.setattr(spread, "trained", another)
    table = spread.measure("cpu", 3, declared, phantoms)
    apart = table.weights_apart[table.stage.eq("training")].tolist()
    first, second, third = (
        torch.cat([w.flatten() for w in model.state_dict().values() if w.is_floating_point()]).double()
        for model in made[:3]
    )
    expected = [((w - first).norm() / first.norm()).item() for w in (second, third)]
    assert apart[0] == apart[3] == 0 and apart[1:3] == pytest.approx(expected) and min(expected) > 0.1


def test_a_run_is_compared_by_hand():
    spread = importlib.import_module("spread")
    y, weights = torch.tensor([0, 1, 2, 0]), torch.tensor([3.0, 4.0]).double()
    first = (y, torch.tensor([0, 1, 0, 1]), weights)
    own = (torch.tensor([0, 1, 2, 1]), torch.tensor([1, 1, 2, 1]), weights + torch.tensor([0.0, 1.0]))
    found = spread.compared(own, first, y)
    assert found.pop("weights_apart") == pytest.approx(0.2)
    assert found == {"n": 4, "clean": 3, "clean_changed": 1, "pgd": 2, "pgd_changed": 2}


def test_the_shipped_recipe_is_the_one_that_the_page_says_was_chosen(ablation):
    """The best on attacked validation slices, of the folds and of the random split."""
    table = pd.read_csv(ROOT / "benchmarks/ablation_laptop.csv")
    table = table[table.arch.eq("resnet_small")]
    folds = table[table.split.eq("grouped")].groupby("variant").seed.apply(set)
    assert len(folds) > 5 and all(seeds == set(range(5)) for seeds in folds)
    shipped = ablation.digest(ablation.parameters_of("laptop")["04_adversarial_training"])
    assert set(table.recipe[table.variant.eq(SHIPPED)]) == {shipped}
    own = table.groupby(["variant", "split"]).val_pgd.mean().unstack()
    assert own.notna().all(axis=None) and (own.idxmax() == SHIPPED).all()


def test_a_larger_training_budget_reads_more_slices_of_unseen_groups_as_the_page_says():
    table = pd.read_csv(ROOT / "benchmarks/ablation_laptop.csv")
    own = table[table.split.eq("grouped")].groupby("variant")[["clean", "pgd_4", "pgd_8", "n"]].sum()
    own = own.loc[[f"{budget}/255, a quarter clean" for budget in (4, 8, 12, 16)]]
    assert (own.n == 1097).all() and (own[["pgd_4", "pgd_8"]].diff()[1:] > 0).all(axis=None)
    assert own.clean.is_monotonic_increasing  # no fewer clean ones
    random = table[table.split.eq("random")].set_index("variant").clean[own.index]
    assert (random.diff()[1:] < 0).all()  # and there the largest cost most
    short, longer, longest = (
        f"16/255, a quarter clean{more}" for more in ("", ", longer, faster", ", longest, faster")
    )
    reads = table.groupby(["split", "variant"])[["clean", "pgd_4", "n"]].sum()
    counts = ["clean", "pgd_4"]
    lost, left = (
        (reads.loc["random", "4/255, a quarter clean"] - reads.loc["random", v])[counts]
        for v in (short, longest)
    )
    assert (left <= 2).all() and (lost > 20).all()
    for v in (longer, longest):
        assert (reads.loc["grouped", v] - reads.loc["grouped", short])[counts].abs().max() < 0.02 * 1097
    slowly = reads.xs("16/255, a quarter clean, slowly, longer", level="variant")
    assert slowly.pgd_4["grouped"] < reads.pgd_4["grouped", "8/255, a quarter clean"]
    plain = table[table.split.eq("grouped") & table.variant.eq("no attack, augmented alike")]
    assert own.clean.iloc[-1] > plain.clean.sum()


def test_on_unseen_groups_an_early_epoch_is_kept_as_the_page_says():
    """And the budget that it had reached, as notebook 5 says, is the one that training attacked it with."""
    kept = pd.read_csv(ROOT / "paper/tables/laptop/kept_epochs.csv")
    assert len(kept) == 20 and kept.train_eps_255[kept.model.eq("normal")].eq(0).all()
    own = kept[kept.model.eq("adversarial")]
    share = own.epoch / own.epochs
    assert share[own.split.eq("grouped")].max() < 0.5 < share[own.split.eq("random")].min()
    ablation = importlib.import_module("ablation")
    parameters = ablation.parameters_of("laptop")["04_adversarial_training"]
    recipe = ablation.recipe_of(parameters)[0]
    for row in own.itertuples():
        (attack,) = _at_epoch({PGD(parameters["train_eps_255"]): 1.0}, row.epoch, recipe)
        assert row.train_eps_255 == pytest.approx(attack.eps_255)


def test_the_papers_network_takes_to_the_recipe_as_the_page_says():
    table = pd.read_csv(ROOT / "benchmarks/ablation_laptop.csv")
    own = table[table.arch.eq("resnet50")]
    assert set(own.split) == {"random"} and set(own.side) == {112}
    assert (own.clean > 0.9 * own.n).all() and (own.pgd_4 > 0.9 * own.n).all()


def test_the_short_trainings_that_gave_one_answer_are_as_the_page_says():
    table = pd.read_csv(ROOT / "paper/tables/laptop/comparison.csv").set_index(["contender", "split"])
    assert table.one_answer[["AWP"]].to_dict() == {("AWP", "random"): 1, ("AWP", "grouped"): 1}
    assert table.seeds["AWP", "grouped"] == 5 == table.one_answer["squeezenet1_1", "grouped"]
    assert table.one_answer["squeezenet1_1", "random"] == 1
    page = " ".join((ROOT / "docs/recipe.md").read_text(encoding="utf-8").split())
    assert "AWP gave one answer for all slices on the random split and in one of five folds." in page
    assert "SqueezeNet, trained from nothing, gives one answer for all slices." in page


def test_what_features_tell_is_mostly_coarse_as_the_page_says():
    table = pd.read_csv(ROOT / "benchmarks/resolution.csv").set_index("slices")
    small, whole = table.loc["28 px"], table.loc["224 px"]
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    assert f"still give {100 * small.k / small.n:.0f} %, whole ones {100 * whole.k / whole.n:.0f} %" in page
    assert "intervals overlap" in " ".join(page.split()) and small.high > whole.low


def test_the_rare_class_pays_as_the_page_says():
    accuracy = pd.read_csv(ROOT / "paper/tables/laptop/accuracy.csv").set_index(["split", "model", "attack"])
    assert accuracy.loc[("grouped", "adversarial", "clean"), "recall_benign"].eq(0).all()
    stands = pd.read_csv(ROOT / "benchmarks/ablation_laptop.csv").groupby(["split", "variant"]).pgd_4.sum()
    assert stands["grouped", "4/255, all clean, class weights"] < stands["grouped", "4/255, a quarter clean"]


def test_no_recipe_is_ahead_of_a_histogram_as_the_page_says():
    leak = pd.read_csv(ROOT / "paper/tables/laptop/leak_summary.csv").set_index(["classifier", "split"])
    table = pd.read_csv(ROOT / "benchmarks/ablation_laptop.csv").query("split == 'grouped'")
    read = table.groupby("variant")[["clean", "n"]].sum()
    assert (read.clean / read.n).max() < leak.accuracy["histogram", "grouped"]


def test_each_fold_takes_the_variant_that_its_own_validation_slices_choose(ablation):
    rows = [  # variant, split, seed, val_pgd, val_clean, clean
        ("a", "grouped", 0, 0.5, 0.6, 1),
        ("b", "grouped", 1, 0.5, 0.7, 8),  # as good under attack as the other, better clean
        ("b", "grouped", 0, 0.4, 0.9, 4),
        ("a", "grouped", 1, 0.5, 0.6, 2),
        ("c", "grouped", 0, 0.9, 0.9, 16),  # not of every fold
        ("b", "random", 0, 0.9, 0.9, 32),
    ]
    table = pd.DataFrame(rows, columns=["variant", "split", "seed", "val_pgd", "val_clean", "clean"])
    table["arch"] = "resnet_small"
    other = table.tail(2).head(1).assign(variant="a", arch="resnet50", seed=1)
    chosen = ablation.chosen_fold_by_fold(pd.concat([table, other]))
    assert chosen.clean.tolist() == [1, 8]
    every = table.drop(index=4).assign(n=10, **{f"pgd_{eps}": 5 for eps in ablation.BUDGETS_255})
    assert "(2 different ones)" in ablation._fold_by_fold(
        every
    ) and "45.0 % (9/20)" in ablation._fold_by_fold(every)
    assert ablation._fold_by_fold(every[every.variant.eq("a")]) == ""


def test_the_page_of_the_recipe_shows_the_ablation(ablation):
    shown = shown_in("recipe", "ablation")
    assert shown == ablation.sections(ROOT) and "The `laptop` profile's recipe" in shown


def test_the_paper_reads_what_the_folds_choose(ablation):
    for path in (ROOT / "benchmarks").glob("ablation_*.csv"):
        chosen = ablation.chosen_fold_by_fold(pd.read_csv(path)).reset_index(drop=True)
        file = path.with_name(path.name.replace("ablation_", "chosen_"))
        pd.testing.assert_frame_equal(pd.read_csv(file), chosen)


def test_no_row_is_of_another_recipe_than_its_variants_today(ablation):
    """Rows go stale when the profile, a notebook's default or the library's changes: run them again."""
    for file in (ROOT / "benchmarks").glob("ablation_*.csv"):
        table, profile = pd.read_csv(file), file.stem.removeprefix("ablation_")
        parameters = ablation.parameters_of(profile)["04_adversarial_training"]
        today = {name: ablation.digest(ablation.changed(parameters, name)) for name in ablation.VARIANTS}
        assert table.recipe.tolist() == [today[name] for name in table.variant], file.name
        assert ablation.digest(parameters) in today.values()
    for name in ("spread", "grouping"):
        for device, profile in importlib.import_module(name).SHAPES.items():
            file = ROOT / f"benchmarks/{name}_{device}.csv"
            if file.exists():
                parameters = ablation.parameters_of(profile)["04_adversarial_training"]
                assert set(pd.read_csv(file).recipe) == {ablation.digest(parameters)}, file.name


def test_a_recipe_has_its_digest(ablation, declared):
    first = ablation.digest(declared)
    assert first == ablation.digest(dict(declared)) and len(first) == 12
    for name in ("train_eps_255", "ema", "eps_255", "train_pgd_steps", "lr"):
        other = declared[name] + 1 if isinstance(declared[name], int) else declared[name] / 2
        assert ablation.digest(declared | {name: other}) != first, name
    for name in ("train_recipe", "train_shares"):
        for part, value in declared[name].items():
            other = declared[name] | {part: value / 2}
            assert ablation.digest(declared | {name: other}) != first, part
    assert ablation.digest(declared | {"arch": "resnet18"}) != first
    assert ablation.digest(declared | {"cw_l2": 9.0}) == first  # of the test alone


def test_cropped_and_whole_slices_are_compared_pair_by_pair():
    cropped = importlib.import_module("cropped")
    keys = ["split", "model", "seed", "index", "name", "eps_255", "right"]
    rows = [("grouped", "normal", 0, i, f"{i}", 0.0, i < 4) for i in range(8)]
    whole = pd.DataFrame(rows, columns=keys)
    other = whole.assign(right=[False, True, True, True, True, True, True, False])[::-1]
    (row,) = cropped.compared(whole, other, {f"{i}": i // 2 for i in range(8)}).itertuples()
    assert (row.n, row.whole, row.cropped, row.more_percent) == (8, 4, 6, 25.0)
    # Groups gain -1, 0, 2 and 1 of their two slices: the interval is that of their draw, not of the slices'.
    assert -50 <= row.low_percent < 0 < 25 < row.high_percent <= 100
    with pytest.raises(ValueError, match="run both again"):
        cropped.compared(whole, other[:-1], {})


def test_the_page_compares_what_is_published():
    """And the file is what the published predictions say."""
    cropped = importlib.import_module("cropped")
    table = pd.read_csv(ROOT / "benchmarks/cropped.csv")
    shown = shown_in("crop", "cropped")
    assert shown == cropped.section(table)
    again = cropped.measured(ROOT, table.profile[0])
    pd.testing.assert_frame_equal(again, table, check_dtype=False, rtol=1e-6)
    for row in table.itertuples():
        assert row.beside == cropped.PAIRS[row.profile]
        for profile, k in ((row.profile, row.whole), (row.beside, row.cropped)):
            curve = pd.read_csv(published_folders(ROOT, profile)[1] / "curve.csv").query("attack == 'pgd'")
            own = curve[curve.protocol.eq("adaptive") & curve.model.eq(row.model) & curve.split.eq(row.split)]
            assert own[own.eps_255.eq(row.eps_255)][["k", "n"]].values.tolist() == [[k, row.n]]


@pytest.fixture
def grouping():
    return importlib.import_module("grouping")


def test_folds_of_a_grouping_are_trained_once_and_shown(grouping, declared, phantoms, monkeypatch, tmp_path):
    small = declared | {"arch": "resnet_small", "epochs": 1, "batch_size": 16, "train_pgd_steps": 1}
    slices = replace(phantoms, groups=near_duplicate_groups(phantoms))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/groups.md").write_text("<!-- generated: grouping --><!-- /generated: grouping -->")
    monkeypatch.setattr(grouping, "find_root", lambda: tmp_path)
    monkeypatch.setattr(grouping, "profiled", lambda name: (small, slices))
    monkeypatch.setattr(grouping, "GROUPINGS", ((0.93, 0.80), (1.1, 1.1)))
    monkeypatch.setattr(grouping, "FOLDS", 1)
    monkeypatch.setattr("sys.argv", ["grouping.py"])
    grouping.main()
    path = tmp_path / "benchmarks/grouping_cpu.csv"
    table = pd.read_csv(path)
    assert table.groups.tolist() == [len(np.unique(slices.groups)), len(slices)]  # no two are identical
    shown = (tmp_path / "docs/groups.md").read_text()
    assert f"| 0.93 | 0.80 | {table.groups[0]} (ours) |" in shown and f"| – | – | {len(slices)} |" in shown
    marked = table.assign(clean=[0, 1])
    marked.iloc[:1].to_csv(path, index=False)
    grouping.main()
    again = pd.read_csv(path)
    assert again.clean.tolist() == [0, table.clean[1]]  # the first row was kept, the second measured


def test_the_levels_of_the_groupings_are_as_the_page_says(grouping):
    """And the paper: from the exact copies to about as many groups as cases it falls, in no order there."""
    own = declared_parameters(ROOT / "notebooks/01_data.ipynb")
    assert grouping.OURS == (own["group_threshold"], own["neighbour_threshold"])
    table = pd.read_csv(ROOT / "benchmarks/grouping_cpu.csv")
    assert grouping.missing(table, table.recipe[0]) == []
    reads = table.groupby(["threshold", "neighbour_threshold", "groups"])[["clean", "pgd_4", "n"]].sum()
    assert (reads.n == 1097).all()
    reads = reads.reset_index("groups")
    near = reads[reads.groups.between(110 / 2, 110 * 1.5)]
    assert len(near) == 3 and (near.clean / near.n).round(2).agg(["min", "max"]).tolist() == [0.59, 0.69]
    assert (near[["clean", "pgd_4"]].idxmax() == grouping.OURS).all()
    assert not near.sort_values("groups").clean.is_monotonic_increasing
    assert table.groupby("groups").largest.max()[63] == 214
    apart = reads.sort_values("groups").iloc[-1]
    assert apart.groups > 1000 and round(apart.clean / apart.n, 2) == 0.97
    assert near.clean.max() < 0.75 * apart.clean and 5 < 100 * np.ptp(near.clean) / 1097 < 15
    accuracy = pd.read_csv(ROOT / "paper/tables/laptop/accuracy.csv").set_index(["split", "model", "attack"])
    random = accuracy.loc[("random", "adversarial", "clean"), "accuracy"]
    assert (abs(apart.clean / apart.n - random) < 0.01).all()


def test_what_is_missing_of_groupings_is_of_todays_recipe(grouping):
    rows = [(0.9, 0.7, fold, "old" if fold == 2 else "new") for fold in range(5)]
    table = pd.DataFrame(rows, columns=["threshold", "neighbour_threshold", "fold", "recipe"])
    left = grouping.missing(table, "new")
    assert left[0] == (0.9, 0.7, 2) and len(left) == 5 * (len(grouping.GROUPINGS) - 1) + 1


def test_variants_change_parameters_that_notebook_4_has(ablation, declared):
    """Each in a way that its name tells: no two variants are the same recipe."""
    assert all(set(changes) <= set(declared) for changes in ablation.VARIANTS.values())
    laptop = ablation.parameters_of("laptop")["04_adversarial_training"]
    digests = [ablation.digest(ablation.changed(laptop, variant)) for variant in ablation.VARIANTS]
    assert len(set(digests)) == len(digests)


def test_a_recipe_is_that_of_notebook_4(ablation, declared):
    """The notebook's own cell, executed, makes the same recipe and shares of every parameter."""
    notebook = nbformat.read(ROOT / "notebooks/04_adversarial_training.ipynb", as_version=4)
    (cell,) = [c.source for c in notebook.cells if c.source.startswith("recipe = ")]
    odd = {name: value / 2 if isinstance(value, float) else value for name, value in declared.items()}
    odd["train_recipe"] = declared["train_recipe"] | {"blur": 0.25, "cutout": 0.1, "ema": 0.3, "epochs": 7}
    odd["train_shares"] = {"margin": 0.5, "fgsm": 0.0, "pgd": 0.25}
    tools = {"PGD": PGD, "Recipe": Recipe, "attacks_over": attacks_over, "replace": replace}
    space = tools | {"OBJECTIVES": OBJECTIVES, "baseline": odd, "testing": odd} | odd
    exec(cell, space)
    assert ablation.recipe_of(odd) == (space["recipe"], space["shares"], space["val_attack"])
    assert space["recipe"].augmentation.blur == 0.25 and len(space["shares"]) == 2
    for wrong in ({"objective": "trade"}, {"train_shares": {"fgms": 1.0}}):
        with pytest.raises(ValueError, match="trade|fgms"):
            exec(cell, space | wrong)


def test_a_variant_is_trained_attacked_and_summed_up(ablation, declared, phantoms, tmp_path):
    slices = replace(phantoms, groups=near_duplicate_groups(phantoms))
    small = declared | {"arch": "resnet_small", "epochs": 1, "batch_size": 16, "train_pgd_steps": 2}
    rows = []
    variants = ["8/255, a quarter clean", "no attack, augmented alike"]
    for variant in variants:
        row = {"variant": variant, "split": "grouped", "seed": 0, "arch": "resnet_small", "side": 32}
        row |= {"recipe": variant[0], "epochs": 1, "device": "cpu", "val_attack": "PGD-2 at 4/255"}
        rows.append(row | ablation.measure(ablation.changed(small, variant), slices, "grouped", 0, "cpu"))
    table = ablation.merged(tmp_path / "a.csv", rows)
    assert (table.clean <= table.n).all() and (table.pgd_8 <= table.clean).all()
    table.to_csv(tmp_path / "a.csv", index=False)
    again = ablation.merged(tmp_path / "a.csv", [rows[0] | {"clean": 1}])
    assert again.variant.tolist() == variants and again.clean[0] == 1
    more = ablation.merged(tmp_path / "a.csv", [rows[0] | {"seed": 1, "clean": 3, "n": 4}])
    shown = ablation.summary(more.assign(n=4, clean=[1, 3, 2]))
    assert shown[shown.variant.eq(variants[0])].clean.item() == "50.0 (25–75)"
    text = ablation.section(more, "laptop", shipped="8")
    assert "| grouped | no attack, augmented alike | 1 |" in text
    assert "| grouped | **8/255, a quarter clean** (shipped) | 2 |" in text
