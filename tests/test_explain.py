"""What `explain` writes for each family, and what it says of wrong input."""

import base64
import dataclasses
import html
import html.parser
import io
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from spvit_jax import config as config_lib
from spvit_jax import plan as plan_lib
from spvit_jax.analysis.selection import parse_numbers, parse_queries
from spvit_jax.augment import mix
from spvit_jax.data import datasets
from spvit_jax.errors import InputError
from spvit_jax.explain import explain, suggest_masks
from spvit_jax.training import checkpoint
from tests.helpers.configs import tiny
from tests.helpers.numpy_models import neighbourhood
from tests.helpers.variables import random_variables

# Images of 12×12 pixels in 6×6 patches.
FAMILIES = {
    "spvit_s": {"depth": 2, "spatial_layers": 1, "stem_width": 4},
    "cait_xxs24": {"depth": 1, "class_layers": 1},
    # Windows that are shifted and padded, then one that spans 3×3 patches.
    "swin_t": {"depths": (2, 1), "window": 4},
    "mait_pyramid_t": {"depths": (1, 1), "masked_heads": ((1, (1,)), (1, ())), "spatial_layers": 1},
}


def with_weights(name, data_dir, folder):
    """A configuration of the digits, for which random weights of a family are in a folder."""
    config = tiny(data_dir)
    config.model.update({"depth": None, "mlp_ratio": 1.0, "num_heads": 2, "name": name})
    config.model.update(FAMILIES[name])
    model = config_lib.model_settings(config, num_classes=10)
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    checkpoint.save_variables(folder, random_variables(name, **fields), model, tuple("0123456789"))
    return config


@pytest.fixture(scope="module", params=FAMILIES)
def explained(request, data_dir, tmp_path_factory):
    """A family's name, and the folder that `explain` wrote for it."""
    folder = epath.Path(tmp_path_factory.mktemp("explain"))
    config = with_weights(request.param, data_dir, folder / "weights")
    if request.param == "spvit_s":
        config.model.image_size = "12x16"  # another size than that of training
    chosen = {"num_images": 16, "shown": (3,), "queries": ((5, 1),)}
    result = explain(config, folder / "weights", folder / "out", **chosen)
    assert json.loads((folder / "out" / "explain.json").read_text()) == result
    return request.param, folder / "out"


def test_every_picture_is_there(explained):
    name, folder = explained
    pictures = {path.stem for path in folder.glob("*.png")}
    expected = {"locality", "distance", "entropy", "similarity", "attention_3_patch_5_1"}
    if name in ("spvit_s", "cait_xxs24"):
        expected.add("attention_3_class")
    if name in ("spvit_s", "mait_pyramid_t"):
        expected |= {"priors", "gain_by_distance", "prior_cosines"}
    if name == "spvit_s":
        expected.add("prior_sizes")
    assert pictures == expected
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 1, path


def test_the_numbers(explained):
    name, folder = explained
    numbers = json.loads((folder / "explain.json").read_text())
    heads = {"spvit_s": [2, 2], "cait_xxs24": [2], "swin_t": [2, 2, 4], "mait_pyramid_t": [2, 4]}
    for field in ("locality_scores", "mean_distance_in_pixels", "entropy_in_nats"):
        assert [len(scores) for scores in numbers[field]] == heads[name]
    assert numbers["num_images"] == 16
    assert all(0 <= score <= 1 for scores in numbers["locality_scores"] for score in scores)
    similarity = numbers["layer_similarity"]
    np.testing.assert_allclose(np.diag(np.array(similarity, float)), 1, rtol=1e-5)
    if name == "swin_t":  # shifted windows, and another grid
        assert similarity[0][1] is None
        assert similarity[0][2] is None
    if name == "spvit_s":
        assert np.shape(numbers["priors"]["0"]) == (2, 11, 15)
        smaller = numbers["priors_at_trained_image_size"]["0"]
        # Offsets are whole patches on any grid.
        np.testing.assert_allclose(np.array(numbers["priors"]["0"])[:, :, 2:-2], smaller, rtol=1e-5)


def test_attention_on_an_image(explained, data_dir):
    """The weights of a patch on all patches sum to what is not on the class token or padding."""
    name, folder = explained
    maps = json.loads((folder / "attention.json").read_text())
    (image,) = maps["images"]
    assert maps["queries"] == [[5, 1]]
    assert image["index"] == 3
    assert image["label"] == str(datasets.load("digits", "test", data_dir).labels()[3])
    grids = {
        "spvit_s": [(6, 8)] * 2,
        "cait_xxs24": [(6, 6)],
        "swin_t": [(6, 6), (6, 6), (3, 3)],
        "mait_pyramid_t": [(6, 6), (3, 3)],
    }[name]
    for grid, layer in zip(grids, image["layers"], strict=True):
        assert np.shape(layer)[0] == 1
        assert np.shape(layer)[2:] == grid
        sums = np.sum(layer, axis=(-2, -1))
        assert (sums < 1.01).all()
        assert (sums > 0.01).all()
    # The class token enters SP-ViT after the layer with SP-SA, and CaiT after all others.
    assert list(image["class_token"]) == {"spvit_s": ["1"], "cait_xxs24": ["1"]}.get(name, [])


class Page(html.parser.HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(explained):
    """It refers to itself alone, its images are images, and no two parts have the same id."""
    _, folder = explained
    text = (folder / "explain.html").read_text()
    page = Page(text)
    targets = [attrs[key] for _, attrs in page.tags for key in attrs if key in ("src", "href")]
    targets += [attrs["xlink:href"] for _, attrs in page.tags if "xlink:href" in attrs]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = [target[1:] for target in targets if target.startswith("#")]
    used += re.findall(r"url\(#([^)]+)\)", text)
    assert set(used) <= set(ids)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    for source in images:
        content = base64.b64decode(source.removeprefix("data:image/webp;base64,"))
        with Image.open(io.BytesIO(content)) as image:
            assert image.mode == "RGBA"
    figures = {attrs.get("id") for tag, attrs in page.tags if tag == "figure"}
    assert figures == {path.stem for path in folder.glob("*.png")}


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# What a browser has made of a page, as its title.
PROBE = """<script>addEventListener("load", () => {
  const body = getComputedStyle(document.body);
  document.title = JSON.stringify({
    images: [...document.images].map(image => image.complete && image.naturalWidth),
    drawings: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height),
    wide: document.documentElement.scrollWidth - innerWidth,
    colours: [body.color, body.backgroundColor],
    letters: getComputedStyle(document.querySelector("svg text")).fill,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
  });
});</script></body>"""


def luminance(colour):
    """Of a colour as browsers write it, "rgb(20, 23, 27)", by the rules for accessible pages."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    red, green, blue = (x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("explained", ["spvit_s"], indirect=True)
@pytest.mark.parametrize(("scheme", "width"), [("dark", 1200), ("light", 500)])
def test_the_page_in_a_browser(explained, scheme, width, tmp_path):
    """All is drawn, nothing is loaded, nothing sticks out, and letters can be read."""
    text = (explained[1] / "explain.html").read_text()
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE))
    preferred = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", preferred, f"--window-size={width},900"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path}", "--dump-dom", f"file://{page}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL)[1]
    seen = json.loads(html.unescape(title))
    assert seen["images"]
    assert all(seen["images"])
    assert len(seen["drawings"]) == 6
    assert min(seen["drawings"]) > 100
    assert seen["wide"] <= 0
    assert not [name for name in seen["loaded"] if name != "data:"]
    ink, paper = map(luminance, seen["colours"])
    assert (ink > paper) == (scheme == "dark")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
    assert seen["letters"] == seen["colours"][0]


@pytest.fixture(scope="module")
def swin(data_dir, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("swin"))
    return with_weights("swin_t", data_dir, folder), folder


def test_masks_are_suggested_by_the_whole_split(data_dir, tmp_path):
    """Against the score of each head over all 500 images, in NumPy."""
    config = with_weights("cait_xxs24", data_dir, epath.Path(tmp_path))
    found = suggest_masks(config, epath.Path(tmp_path))
    assert found.num_images == 500
    plan = plan_lib.evaluation(config, epath.Path(tmp_path))

    @jax.jit
    def weights(variables, pixels):
        images = mix.normalize(pixels, config.data.mean, config.data.std)
        return variables.model().attention_maps(images, mix_weights=False)[0].weights

    variables, near = plan.load(), neighbourhood((6, 6), (1, 1), 0)
    with plan.batches(504) as batches:  # the last 4 are padding
        (batch,) = batches
    attention = np.asarray(weights(variables, batch["image"]), np.float64)[:500]
    scores = (attention * near).sum(-1).mean((0, 2))
    np.testing.assert_allclose(found.locality[0], scores, rtol=1e-5)
    few = suggest_masks(config, epath.Path(tmp_path), num_images=3)
    scores = (attention * near).sum(-1)[[0, 166, 333]].mean((0, 2))
    np.testing.assert_allclose(few.locality[0], scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"queries": ((6, 0),)}, r"the query 6,0 is outside of the grid of 6×6 patches"),
        ({"queries": ((1, 1), (1, 1))}, "the query 1,1 is named twice"),
        ({"num_images": 0}, "0 images are asked for, and the split has 500"),
        ({"num_images": 501}, "501 images are asked for, and the split has 500"),
        ({"shown": (500,)}, "there is no image 500: the split has 500; expected 0 to 499"),
        ({"layers": (0, 3)}, "there is no layer 3: the model has 3"),
        ({"heads": (4,)}, "there is no head 4: the largest layer that is drawn has 4; expected 0"),
        ({"heads": (2,), "layers": (0, 1)}, "there is no head 2: the largest layer that is drawn"),
        ({"heads": (0, 1, 0)}, "head 0 is named twice"),
    ],
)
def test_what_is_not_there_is_one_line(swin, tmp_path, chosen, words):
    config, folder = swin
    with pytest.raises(InputError, match=words):
        explain(config, folder, epath.Path(tmp_path / "out"), **chosen)
    assert not (tmp_path / "out").exists()


def test_masks_for_one_patch(swin):
    config, folder = swin
    config = config.copy_and_resolve_references()
    config.model.update(window=1)
    with pytest.raises(InputError, match="no mask would change anything"):
        suggest_masks(config, folder)


def test_lists_on_the_command_line():
    assert parse_queries("3,5;7, 7") == ((3, 5), (7, 7))
    assert parse_numbers("heads", ["0", " 2"]) == (0, 2)
    for text in ("3", "3,5;", "a,b", ""):
        with pytest.raises(InputError, match="cannot be read; expected rows and columns"):
            parse_queries(text)
    for values in ([], ["x"], ["-1"]):
        with pytest.raises(InputError, match=r"--heads=.* cannot be read; expected numbers"):
            parse_numbers("heads", values)
