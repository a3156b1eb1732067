"""What several test files share: tiny phantoms, a model trained on them for a moment, the real slices."""

import os
import shutil

import numpy as np
import pytest
import torch
from workflow import BUILD, ROOT, clear, snakemake

from fortify.workflow.locks import CALL

# What `make check` leaves out: every notebook, what needs one of these fixtures, and these tests of about
# three seconds or more, all their cases together, on a quiet machine.
SLOW_FIXTURES = {"called", "finished", "honest", "meter", "published", "mutants", "explored"}
SLOW = """
test_a_step_that_is_ended_by_its_limit_leaves_what_was_whole
test_another_seed_than_the_first_is_not_audited
test_nothing_that_a_step_runs_imports_what_is_unused
test_run_sh_asks_for_a_gpu_unless_told_otherwise
test_wheels_are_those_of_the_machine_by_what_they_say_they_need
test_a_cw_that_is_too_short_is_seen
test_an_honest_attack_and_an_undefended_model_are_not_caught
test_no_attack_is_run_twice
test_no_check_that_catches_a_mutant_fails_anyway
test_of_what_is_random_too
test_t7_sees_masked_gradients
test_the_same_audit_twice_says_the_same
test_cw_changes_less_than_the_linf_attacks
test_cw_goes_beyond_the_boundary_by_its_confidence
test_every_library_at_hand_is_measured_and_what_is_missing_is_named
test_folds_of_a_grouping_are_trained_once_and_shown
test_memory_is_that_of_the_task
test_memory_grows_by_the_thumbnails_in_a_fresh_process
test_the_jobs_of_the_workflow_are_put_on_nodes
test_what_is_called_compiled_is_and_is_measured_where_it_is_worth_it
test_every_writer_says_so_and_the_old_file_stays
test_the_last_epoch_is_kept_and_an_interrupted_training_goes_on
test_every_figure_is_of_printed_size_and_saves_to_the_same_bytes
test_a_compiled_fused_model_crafts_alike_and_is_compiled_once_for_sizes_that_differ_by_an_image
test_an_untrained_model_is_fused
test_same_logits_and_same_gradients
test_jupyterlab_listens_on_loopback_and_asks_for_its_token
test_a_cue_in_the_background_is_seen_on_both_splits
test_images_without_a_signal_give_no_accuracy
test_the_command_measures_any_folder
test_the_command_names_a_class_that_cannot_be_split
test_the_command_says_what_is_wrong_in_one_line
test_the_real_slices_leak
test_the_room_knows_no_model
test_convolutions_are_in_float32_whatever_was_set_and_as_before_after_it
test_the_same_model_is_the_same_bytes_whichever_process_writes_it
test_a_network_learns_what_shortcuts_do_not_and_an_attack_undoes_it
test_an_attack_does_not_depend_on_the_batches
test_tables_count_the_rows_they_are_made_of
test_the_examples_run_as_printed
test_adversarial_training_holds_where_normal_training_falls
test_an_interrupted_training_ends_in_the_same_weights
test_precision_is_float32_on_a_cpu_unless_asked_for_and_weights_and_validation_always
test_attacks_go_from_one_row_through_evaluation_table_and_figure
test_an_objective_trains_from_one_row
test_a_recipe_is_that_of_the_notebooks_and_a_slow_batchnorm_is_told_to_follow
test_the_answers_and_figures_are_of_the_tables
test_the_command_takes_patients_and_colours
test_ones_own_images_as_the_page_says
test_make_tables_takes_what_is_whole_of_each_split
test_make_tables_makes_the_claims_where_what_they_read_is_there
test_the_reference_run_is_five_seeds_on_both_splits
test_a_companion_profile_is_a_table_1_with_its_audit
test_a_job_asks_for_what_its_network_wants
test_the_published_training_is_run_on_its_seeds_alone
test_a_model_of_any_kind_is_attacked_and_audited_as_the_plain_one
test_the_audit_is_run_on_its_splits_alone
test_a_blind_detector_and_a_perfect_one_are_told_apart
test_masked_gradients_protect_no_squeezer
test_an_attacker_who_knows_the_detector_does_better_than_one_who_does_not
test_each_strategy_alone_evades
test_a_watched_folder_is_classified_as_slices_come
test_it_is_a_command
test_a_run_shows_its_steps_and_table_1_as_soon_as_it_is_made
""".split()
# With `-n 2` one worker runs what is of one file, or needs the finished run, so that fixtures are made once.
# The longest come first, a short one behind each of the first two: a worker is given two at once.
TOGETHER = dict.fromkeys(
    ("test_hero.py", "test_packed.py", "test_slurm.py", "test_survival.py", "test_workflow.py"), "finished"
)
ORDER = "finished notebooks test_lab.py test_disk.py test_audit.py test_benchmarks.py test_fused.py".split()


# What the modules under [tool.coverage.run] are tested by. Other tests are not traced: that takes a fifth of
# their time.
COVERING = {f"test_{name}.py" for name in (
    "attacks evaluation scoring splits tables properties hostile extending any_model fused"
).split()}  # fmt: skip


def group_of(nodeid):
    file = nodeid.split("::")[0].split("/")[-1]
    return "notebooks" if file.endswith(".ipynb") else TOGETHER.get(file, file)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the slow tests, and sort the groups."""
    places, order = {}, {}
    for item in items:
        name, group = getattr(item, "originalname", ""), group_of(item.nodeid)
        if group == "notebooks" or name in SLOW or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if group not in COVERING:
            item.add_marker("no_cover")
        place = places.setdefault((item.path, name), len(places))
        # Cases of one test by name: those of a set come in another order in another worker.
        order[item] = (ORDER.index(group) if group in ORDER else len(ORDER), place, item.nodeid)
    items.sort(key=order.get)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By group. xdist's own marks of groups (3.8) are not seen with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


@pytest.fixture(autouse=True)
def nobodys_call():
    """Who held a profile's lock in this process has named a call, which refuses the jobs of every other."""
    os.environ.pop(CALL, None)


@pytest.fixture(scope="session")
def called():
    """The test profile's whole run, each notebook through papermill: the finished process and its output."""
    clear()
    done = snakemake("--forceall", "--quiet", "rules")
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="session")
def finished(called):
    """The folder of that run."""
    return BUILD


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the workflow needs, without results."""
    for name in ("lib", "notebooks", "paper", "profiles", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "Snakefile", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def phantoms():
    """120 phantom slices of 40 patients at 32 px, read-only: a test that changes them changes a copy."""
    from fortify.phantom import phantom_slices

    made = phantom_slices(patients=40, slices_per_patient=3, size=32, seed=0)
    for array in vars(made).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return made


@pytest.fixture(scope="session")
def images(phantoms):
    """The phantoms as the models take them: (120, 1, 32, 32) float32 in [0, 1]."""
    from fortify.data import to_tensor

    return to_tensor(phantoms.images)


@pytest.fixture(scope="session")
def labels(phantoms):
    return torch.tensor(phantoms.labels)


@pytest.fixture(autouse=True)
def shared_ones_stay(request):
    """A test that changes the shared images or labels in place fails itself, and not the tests after it."""
    yield
    given = getattr(request.node, "callspec", None)  # parameters of a test may have the same names
    used = {"images", "labels"} & set(request.fixturenames) - set(given.params if given else ())
    if used:
        from fortify.data import to_tensor

        own = request.getfixturevalue("phantoms")
        whole = {"images": to_tensor(own.images), "labels": torch.tensor(own.labels)}
        for name in used:
            assert torch.equal(request.getfixturevalue(name), whole[name]), f"{name} were changed in place"


@pytest.fixture(scope="session")
def model(phantoms):
    """A small ResNet that learnt 40 of the phantoms by heart, so that attacks have something to break."""
    from fortify.augmentation import Augmentation
    from fortify.models import build_model
    from fortify.training import Recipe, fit

    trained = build_model("resnet_small", num_classes=3, seed=0)
    some = phantoms.subset(range(0, len(phantoms), 3))
    still = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
    recipe = Recipe(epochs=12, batch_size=16, lr=3e-3, class_balance=1.0, augmentation=still)
    fit(trained, some, some, recipe, progress=False)
    return trained


@pytest.fixture(scope="session")
def real_folder():
    """The folder of the real slices, or a skip that says how to get them."""
    from fortify.data import find_data

    try:
        return find_data()
    except FileNotFoundError as error:
        pytest.skip(str(error))
