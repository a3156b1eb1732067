"""README's figure: which slice it shows, and that it says what the tables and the rows say."""

import numpy as np
import pandas as pd
import pytest
from workflow import BUILD, ROOT

from fortify.figures import DOUBLE
from fortify.workflow import hero

ALL = np.ones(5, dtype=bool)


def test_the_slice_is_one_that_the_clamp_and_pgd_alone_make_wrong():
    r = np.array([0.95, 0.97, 0.98, 0.99, 1.0])
    at = hero.shown_slice(r, clean=ALL, clamp=~ALL, pgd=~ALL)
    assert at == 2, "as alike as the median"
    for name in ("clamp", "pgd"):
        wrong = {"clamp": ~ALL, "pgd": ~ALL} | {name: np.array([0, 1, 1, 0, 0], dtype=bool)}
        assert hero.shown_slice(r, clean=ALL, **wrong) == 3, "0.98 is nearer, and correct all the same"
    clean = np.array([1, 0, 0, 0, 1], dtype=bool)
    assert hero.shown_slice(r, clean=clean, clamp=~ALL, pgd=~ALL) == 0, (
        "an exact copy shows no near-duplicate"
    )
    assert hero.shown_slice(r[4:], clean=~ALL[:1], clamp=ALL[:1], pgd=ALL[:1]) == 0, "for want of another"


@pytest.fixture(scope="module")
def drawn(finished):
    return hero.hero(ROOT / BUILD, "random-s0")


def test_the_pictures_are_of_the_run(finished, drawn):
    build = ROOT / BUILD
    images = drawn.subfigs[0].axes
    assert [ax.get_title().split("\n")[0] for ax in images] == [
        "a test slice", "its nearest training slice", "the published clamp,", "a real attack:",
    ]  # fmt: skip
    protocol = pd.read_csv(build / "random-s0/published_protocol.csv").query(
        "model == 'normal' and attack == 'clamp'"
    )
    rows = pd.read_csv(build / "random-s0/normal_predictions.csv").query("attack == 'clean'")
    for ax, own in ((images[0], rows), (images[2], protocol)):
        assert ax.get_xlabel().endswith(f"\n{(~own.success).sum()} of {len(own)} correct")
    clean, near, clamped, attacked = (np.asarray(ax.images[0].get_array()).squeeze() for ax in images)
    change = np.abs(attacked - clean).max()
    assert 0 < change * 255 <= 4 + 1e-3 < np.abs(clamped - clean).max() * 255
    assert near.shape == clean.shape[:2] and not np.array_equal(near, clean.mean(2))


def test_the_dots_are_of_the_tables(finished, drawn):
    panels = drawn.subfigs[1].axes
    assert [ax.get_title() for ax in panels] == ["clean", "attacked: PGD 4/255"]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    table = pd.read_csv(ROOT / BUILD / "tables/accuracy.csv").query("protocol == 'adaptive'")
    for ax, attack, black_box in ((panels[0], "clean", "clean"), (panels[1], "pgd", "black-box")):
        for line, split in zip(ax.lines, ("random", "grouped"), strict=True):
            shown = dict(zip(names, line.get_xdata(), strict=True))
            own = table[table.split.eq(split) & table.attack.eq(attack)].set_index("model").accuracy
            for training in ("normal", "adversarial"):
                assert shown[f"{training} training"] == pytest.approx(100 * own[training])
            simple = pd.read_csv(ROOT / BUILD / f"tables/table1_{split}_classes.csv")
            simple = simple[simple.unit.eq("slice") & simple.attack.eq(black_box)]
            forest = simple.set_index("model").accuracy_percent["histogram forest"]
            assert shown["random forest on a grey-level histogram"] == pytest.approx(forest)


def test_it_is_of_printed_size_and_its_words_are_legible(drawn):
    assert drawn.get_size_inches()[0] == DOUBLE
    texts = [
        text
        for text in drawn.findobj(lambda a: hasattr(a, "get_fontsize"))
        if text.get_text().strip() not in ("", "✗")
    ]
    assert len(texts) > 15 and min(text.get_fontsize() for text in texts) >= 8


def test_the_workflow_draws_it(finished):
    assert (ROOT / BUILD / "figures/hero.png").is_file() and (ROOT / BUILD / "figures/hero.pdf").is_file()


def test_the_command_says_what_it_takes(capsys):
    assert hero.main([]) == 2 and "build/laptop random-s0" in capsys.readouterr().err
