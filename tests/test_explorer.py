"""The attack explorer: what it stores is what the networks were asked about, and the page shows just that."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fortify.attacks import PGD, craft
from fortify.data import Slices, to_tensor
from fortify.evaluation import read_rows
from fortify.examined import explorer
from fortify.examined.protocol import PublishedAttacks, published_fgsm, score_published
from fortify.files import write_csv, write_json
from fortify.models import build_model, load_model, save_model
from fortify.scoring import evaluate
from fortify.splits import grouped_split, random_split, read_split, write_split

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explorer"
BUDGETS = [0.5, 2, 4, 16]
TESTING = {"eps_255": 4, "eps_grid_255": [16, 0.5, 2], "pgd_steps": 3, "pgd_restarts": 1, "seed": 0}


@pytest.fixture(scope="module")
def explored(phantoms, model, tmp_path_factory):
    """A profile's folder as notebooks 1 to 6 leave it; the published training is of one split alone."""
    explored = tmp_path_factory.mktemp("explorer") / "small"
    phantoms.save(explored / "data/slices.npz")
    splits = {
        "random": random_split(phantoms.labels, seed=0),
        "grouped": grouped_split(phantoms.labels, phantoms.groups, seed=0),
    }
    for split, parts in splits.items():
        run, index = explored / f"{split}-s0", parts["test"]
        write_split(explored / f"data/splits/{split}-s0.csv", phantoms, parts)
        write_json(run / "03_attacks.json", {"parameters": TESTING | {"split": split}, "data_sha256": "0"})
        trained = {"normal": model, "adversarial": build_model("resnet_small", num_classes=3, seed=1)}
        trained |= (
            {"published": build_model("resnet_small", num_classes=3, seed=2)} if split == "random" else {}
        )
        for name, network in trained.items():
            save_model(run / f"{name}.safetensors", network)
        images, labels = to_tensor(phantoms.images[index]), phantoms.labels[index]
        about = {"index": index, "split": split, "seed": 0, "model_name": "normal"}
        rows, _ = evaluate(model, images, labels, [PGD(eps, steps=3) for eps in (0.5, 4)], **about)
        write_csv(run / "normal_predictions.csv", rows)
        some = PublishedAttacks(cw_steps=0)
        if split == "random":
            write_csv(
                run / "published_protocol.csv", score_published(model, images, labels, attacks=some, **about)
            )
    return explored


@pytest.fixture(scope="module")
def data(explored):
    assert explorer.main([str(explored), "random-s0", "grouped-s0"]) == 0
    return explorer.read(explored / "explorer/data.js")


def tiles_of(data, name):
    """The tiles (K, H, W) of a sprite, read as any reader of images would."""
    kind, _, text = data[name].partition(",")
    assert kind == "data:image/webp;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L"))
    side = data["size"]
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    assert columns == data["columns"]
    return sheet.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)


def shown(data):
    """(slice, training, attack, budget, entry, clean (H, W), image (3, H, W)) of all; grey levels, as floats.

    By the page's own arithmetic, in numpy.
    """
    tiles, changes = tiles_of(data, "tiles"), tiles_of(data, "changes")
    mean, std = (np.array(data[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    for own in data["slices"]:
        clean = tiles[own["tile"]].astype(float)
        for training, attacks in own["seen"].items():
            for attack, entries in attacks.items():
                for at, entry in enumerate(entries):
                    if attack == "pgd":
                        eps = data["budgets_255"][at]
                        code = changes[entry["tile"]] if at else np.ones_like(clean)
                        image = np.clip(clean + (code - 1.0) * eps, 0, 255)
                        image = np.stack([image] * 3)
                    else:
                        code = tiles[entry["tile"]] if attack == "published_pgd" else np.full(clean.shape, 13)
                        step = np.stack([code // 3**channel % 3 - 1.0 for channel in range(3)])
                        z = (clean / 255 - mean) / std + data["alpha"] * step
                        image = 255 * (z.clip(0, 1) * std + mean)
                    yield own, training, attack, at, entry, clean, image


def test_the_slices_are_chosen_by_class_and_group_and_not_by_how_they_look():
    labels, groups = [0, 0, 0, 0, 1, 1, 1, 0], [5, 5, 2, 2, 9, 9, 9, 7]
    images = np.zeros((8, 4, 4), np.uint8)
    slices = Slices(images, np.array(labels), [*"abcdefgh"], ["x", "y"], "s", "0", groups=np.array(groups))
    test = np.array([1, 2, 3, 4, 5, 7])
    assert explorer.chosen(slices, test, each=2) == [0, 1, 3], "b and c of x; e, the one group of y"
    assert explorer.chosen(slices, test, each=1) == [0, 3]
    assert explorer.chosen(slices, test, each=9) == [0, 1, 5, 3]


def test_both_splits_show_test_slices_of_every_class(data, explored, phantoms):
    for split in ("random", "grouped"):
        parts = read_split(explored / f"data/splits/{split}-s0.csv", phantoms)
        own = [s for s in data["slices"] if s["split"] == split]
        assert [s["label"] for s in own] == [0, 0, 1, 1, 2, 2]
        assert {s["index"] for s in own} <= set(parts["test"].tolist())
        assert len({phantoms.groups[s["index"]] for s in own}) == 6
        for s in own:
            assert s["name"] == phantoms.names[s["index"]] and s["label"] == phantoms.labels[s["index"]]
            assert np.array_equal(tiles_of(data, "tiles")[s["tile"]], phantoms.images[s["index"]])
            assert set(s["seen"]) == {"normal", "adversarial", *(["published"] if split == "random" else [])}
    assert data["budgets_255"] == [0, *BUDGETS] and data["profile"] == "small" and data["credit"] == ""


def test_every_number_is_the_networks_answer_to_the_image_in_the_sprite(data, explored):
    count = 0
    networks = {}
    for own, training, attack, _, entry, clean, image in shown(data):
        path = explored / f"{own['split']}-s0/{training}.safetensors"
        network = networks.setdefault(path, load_model(path))
        network.eval()
        x = torch.tensor(image, dtype=torch.float32)[None] / 255
        with torch.no_grad():
            fresh = network[1:]((x - network[0].mean) / network[0].std).softmax(1)[0].numpy()
        assert np.allclose(entry["p"], fresh, atol=2e-4), (own["name"], training, attack)
        assert entry["linf_255"] == pytest.approx(np.abs(image - clean).max(), abs=2e-3)
        count += 1
    assert count == (6 * 3 + 6 * 2) * (len(BUDGETS) + 3)


def test_pgd_stays_within_its_budget_and_is_notebook_3s(data, explored, phantoms):
    for split in ("random", "grouped"):
        test = read_split(explored / f"data/splits/{split}-s0.csv", phantoms)["test"]
        images, labels = to_tensor(phantoms.images[test]), phantoms.labels[test]
        model = load_model(explored / f"{split}-s0/normal.safetensors")
        for at, eps in enumerate(BUDGETS, 1):
            crafted = craft(model, images, labels, PGD(eps, steps=3), seed=0).images.numpy()[:, 0] * 255
            for own, training, attack, budget, entry, clean, image in shown(data):
                if (own["split"], training, attack, budget) == (split, "normal", "pgd", at):
                    assert 0.75 * eps < entry["linf_255"] <= eps + 1e-4
                    assert np.abs(image - clean).max() <= eps + 1e-9
                    theirs = crafted[test.tolist().index(own["index"])]
                    # Rounded to whole budgets; and a few pixels may step otherwise in another batch.
                    assert (np.abs(image[0] - theirs) <= eps / 2 + 1e-3).mean() > 0.99
    answers = {
        (own["index"], at, np.argmax(entry["p"]) == own["label"])
        for own, training, attack, at, entry, *_ in shown(data)
        if training == "normal" and attack == "pgd"
    }
    right = {at: sum(ok for _, budget, ok in answers if budget == at) for at in (0, len(BUDGETS))}
    assert right[0] > right[len(BUDGETS)], "a large budget breaks slices"


def test_the_published_image_is_that_of_the_examined_code(data, explored, phantoms):
    for own, training, attack, _, _, clean, image in shown(data):
        if attack == "published_pgd":
            model = load_model(explored / f"{own['split']}-s0/{training}.safetensors").eval()
            z = model[0](torch.tensor(clean / 255, dtype=torch.float32)[None, None])
            made = published_fgsm(model, z, torch.tensor([own["label"]]), data["alpha"])
            theirs = (made * model[0].std + model[0].mean)[0].detach().numpy() * 255
            # The sign of a gradient that is 0 but for rounding may differ: the step is half a grey level.
            assert (np.abs(image - theirs) < 1e-3).mean() > 0.99


def test_the_share_of_all_test_slices_is_that_of_the_published_rows(data, explored):
    rows = read_rows(explored / "random-s0/normal_predictions.csv")
    pgd = data["totals"]["random"]["normal"]["pgd"]
    for at, (attack, eps) in {0: ("clean", 0), 1: ("pgd", 0.5), 3: ("pgd", 4)}.items():
        own = rows[rows.attack.eq(attack) & rows.eps_255.eq(eps)]
        assert pgd[at] == [(own.prediction == own.label).sum(), len(own)]
    assert pgd[2] is None and pgd[4] is None, "budgets that no table has"
    clamp = pd.read_csv(explored / "random-s0/published_protocol.csv").query("attack == 'clamp'")
    assert data["totals"]["random"]["normal"]["clamp"] == [[(~clamp.success).sum(), len(clamp)]]
    assert data["totals"]["grouped"]["normal"]["clamp"] == [None]


def test_the_page_is_small_and_stands_alone(data, explored, tmp_path):
    assert len((PAGE / "explorer.js").read_text(encoding="utf-8").splitlines()) <= 100
    for name in explorer.PAGE:
        text = (PAGE / name).read_text(encoding="utf-8")
        assert not re.search(r"https?:|//[a-z]+\.|fetch\(|import\b|@import|url\(", text), name
        assert (explored / "explorer" / name).read_text(encoding="utf-8") == text, "beside its data"
    published = [path for path in [PAGE / "data.js"] if path.is_file()]
    for path in [explored / "explorer/data.js", *published]:
        assert path.stat().st_size + sum((PAGE / name).stat().st_size for name in explorer.PAGE) < 2_000_000
    with pytest.raises(ValueError, match="the page may load 1,990,000"):
        explorer.write(tmp_path, data | {"tiles": "x" * explorer.LIMIT})
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(explored, capsys, tmp_path):
    assert explorer.main([str(explored)]) == 2
    assert "python -m fortify.examined.explorer" in capsys.readouterr().err
    assert explorer.main([str(tmp_path), "random-s0"]) == 1
    assert capsys.readouterr().err.startswith("explorer: ")
    shutil.copytree(explored, tmp_path / "b")
    (tmp_path / "b/random-s0/normal.safetensors").unlink()
    assert explorer.main([str(tmp_path / "b"), "random-s0"]) == 1
    assert "Notebook 02_baseline writes it" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, data, explored):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((explored / "explorer/index.html").as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.find_element("id", "explorer").is_displayed())
    return browser


def press(page, element, *keys):
    """By keyboard alone: Tab to the element, which must be reachable so, then the keys."""
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    for _ in range(12):
        page.switch_to.active_element.send_keys(Keys.TAB)
        if page.switch_to.active_element == element:
            break
    else:
        raise AssertionError(f"Tab does not lead to {element.get_attribute('outerHTML')}")
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineWidth") == "3px"
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def check(page, data, own, training, attack, at):
    """What the page says is what data.js says of this choice."""
    entry = own["seen"][training][attack][at]
    classes, truth = data["classes"], own["label"]
    answer = int(np.argmax(entry["p"]))
    percent = [f"{int(100 * p + 0.5)} %" for p in entry["p"]]
    said = page.find_element("id", "said").text
    assert f"answers {classes[answer]} ({percent[answer]}). That is " in said
    assert said.endswith(f"{'right' if answer == truth else 'wrong'}: the slice is {classes[truth]}.")
    assert page.find_element("css selector", "[aria-live]").get_attribute("aria-live") == "polite"
    whole = page.find_element("id", "all").get_attribute("textContent")
    assert whole == ", ".join(f"{name} {p}" for name, p in zip(classes, percent, strict=True))
    rows = page.find_elements("css selector", "#bars tr")
    before = own["seen"][training]["pgd"][0]["p"]
    for c, row in enumerate(rows):
        assert row.text.split("\n")[0].startswith(classes[c]) and row.text.endswith(percent[c])
        assert ("the true class" in row.text) == (c == truth)
        bar, line = (row.find_element("css selector", f".bar {tag}") for tag in "ib")
        width = row.find_element("class name", "bar").rect["width"]
        assert bar.rect["width"] == pytest.approx(width * entry["p"][c], abs=1)
        assert line.rect["x"] - bar.rect["x"] == pytest.approx(width * before[c], abs=2)
        kinds = {truth: "right"}.get(c, "wrong") if c == answer else ""
        assert bar.get_attribute("class") == kinds
    assert len(rows) == len(classes)
    assert f"{entry['linf_255']:.3g} of 255 grey levels" in page.find_element("id", "size").text
    (image,) = [
        image for s, t, a, b, _, _, image in shown(data) if (s, t, a, b) == (own, training, attack, at)
    ]
    side = data["size"]
    drawn = page.execute_script(
        "return [...document.getElementById('attacked').getContext('2d')"
        f".getImageData(0, 0, {side}, {side}).data]"
    )
    drawn = np.array(drawn, float).reshape(side, side, 4)[..., :3].transpose(2, 0, 1)
    assert np.abs(drawn - image).max() <= 0.5 + 1e-6, "the attacked slice, in whole grey levels"


def test_the_slider_the_training_and_the_attack_by_keyboard(page, data):
    from selenium.webdriver.common.keys import Keys

    own = data["slices"][int(page.find_element("id", "slice").get_attribute("value"))]
    start = data["budgets_255"].index(4)
    broken = [
        np.argmax(of["seen"]["normal"]["pgd"][0]["p"]) == of["label"]
        and np.argmax(of["seen"]["normal"]["pgd"][start]["p"]) != of["label"]
        for of in data["slices"]
    ]
    assert own == data["slices"][broken.index(True) if True in broken else 0], "one that the attack breaks"
    press(page, page.find_element("id", "slice"), Keys.HOME)
    first = data["slices"][0]
    slider = page.find_element("id", "budget")
    check(page, data, first, "normal", "pgd", start)
    press(page, slider, Keys.ARROW_RIGHT)
    check(page, data, first, "normal", "pgd", start + 1)
    assert slider.get_attribute("aria-valuetext") == "16 of 255 grey levels"
    assert page.find_element("id", "magnified").text == "the change, magnified 7 times (mid-grey: unchanged)"
    press(page, slider, Keys.HOME)
    check(page, data, first, "normal", "pgd", 0)
    assert page.find_element("id", "magnified").text == "no change"
    press(page, slider, Keys.END)
    press(page, page.find_element("css selector", "[name=training][value=normal]"), Keys.ARROW_DOWN)
    check(page, data, first, "adversarial", "pgd", len(BUDGETS))
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    check(page, data, first, "published", "pgd", len(BUDGETS))
    press(page, page.find_element("css selector", "[name=attack][value=pgd]"), Keys.ARROW_DOWN)
    check(page, data, first, "published", "published_pgd", 0)
    assert not slider.is_enabled() and page.find_element("id", "budget-shown").text == "this attack has none"
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    check(page, data, first, "published", "clamp", 0)
    # A slice of the other split, where the published training was not run.
    choice = page.find_element("id", "slice")
    press(page, choice, Keys.END)
    last = data["slices"][-1]
    check(page, data, last, "normal", "clamp", 0)
    assert "stand in for patients" in page.find_element("id", "split").text
    assert not page.find_element("css selector", "[value=published]").is_enabled()
    assert not [line for line in page.get_log("browser") if line["level"] == "SEVERE"]


def test_every_setting_shows_its_own_numbers(page, data):
    for i, own in enumerate(data["slices"]):
        for training, attacks in own["seen"].items():
            for attack in attacks:
                page.execute_script(
                    "document.getElementById('slice').value = arguments[0];"
                    "for (const v of arguments[1]) document.querySelector(`[value=${v}]`).checked = true;"
                    "document.getElementById('budget').value = 2;"
                    "document.querySelector('form').dispatchEvent(new Event('input'))",
                    i,
                    [training, attack],
                )
                entry = own["seen"][training][attack][2 if attack == "pgd" else 0]
                answer = data["classes"][int(np.argmax(entry["p"]))]
                assert f" answers {answer} (" in page.find_element("id", "said").text
                total = data["totals"][own["split"]][training][attack][2 if attack == "pgd" else 0]
                text = f"The same setting on all {total[1]} test slices: " if total else ""
                assert page.find_element("id", "total").text.startswith(text)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_on_a_desktop_or_a_phone(page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        fits = "const d = document.documentElement; return d.scrollWidth <= d.clientWidth && d.clientWidth"
        assert width - 20 < page.execute_script(fits) <= width, "but for a scroll bar"
        for element in page.find_elements("css selector", "label, canvas, figcaption, th, td, p, select"):
            box = element.rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, element.get_attribute("outerHTML")
        sizes = page.execute_script(
            "return [...document.querySelectorAll('p, label, figcaption, caption, th, td, small')]"
            ".map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12
        for canvas in page.find_elements("tag name", "canvas"):
            assert canvas.get_attribute("aria-label") and canvas.get_attribute("role") == "img"
        for control in page.find_elements("css selector", "select, input"):
            assert page.execute_script("return arguments[0].labels.length", control) == 1
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_data_the_page_says_so(browser, tmp_path):
    for name in explorer.PAGE:
        shutil.copy(PAGE / name, tmp_path)
    browser.get((tmp_path / "index.html").as_uri())
    assert "No results have been published here yet" in browser.find_element("id", "missing").text
    assert not browser.find_element("id", "explorer").is_displayed()
    assert "Not a medical device" in browser.find_element("tag name", "footer").text
    browser.get_log("browser")  # that data.js is not there
