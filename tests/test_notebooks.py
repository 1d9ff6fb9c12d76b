"""The notebooks, run from top to bottom in kernels of their own, made small by the cell tagged "parameters"."""

import base64
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import av
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from magic141_jax.train import metrics
from tests import published_pipelines

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TAG = "parameters"
PARTS = ("configs", "datasets", "docs", "magic141_jax", "notebooks", "sample.py", "train.py", "weights")
BRIEF = "--config.train.log_every=1 --config.train.sample_every=0 --noprogress"
MOVIE = re.compile(r'src="data:video/mp4;base64,([^"]+)"')
BADGE = re.compile(r"https://colab\.research\.google\.com/github/(\S+?/\S+?)/blob/main/(notebooks/\w+\.ipynb)")


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the repository, with runs/ of its own."""
    for part in PARTS:
        (tmp_path / part).symlink_to(ROOT / part)
    return tmp_path


def execute(name, folder, **parameters):
    """The notebook after its run, with a cell of `parameters` behind its own."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    (place,) = (i for i, cell in enumerate(notebook.cells) if TAG in cell.metadata.get("tags", ()))
    own = {line.split(" = ")[0] for line in notebook.cells[place].source.splitlines()}
    assert parameters.keys() <= {word for names in own for word in names.split(", ")}
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    environment = os.environ | {
        "MAGIC141_JAX_CACHE": str(Path(tempfile.gettempdir()) / "magic141-jax-train-test-cache"),  # as in test_train.py
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment)


def shown(notebook, kind):
    """What its cells displayed of a kind such as "image/svg+xml"."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def said(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def movies(notebook):
    """The frames of each video that it displayed."""
    found = [MOVIE.search(text)[1] for text in shown(notebook, "text/html")]
    return [read_frames(base64.b64decode(movie)) for movie in found]


def read_frames(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_learning_is_shown(notebook, workdir, names):
    """One plot, of finite values of every step."""
    lines = metrics.read(workdir)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line[name]) for line in lines for name in names)
    (plot,) = shown(notebook, "image/svg+xml")
    assert all(f">{name}<" in plot for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_plain(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "committed with outputs"
    assert [TAG in cell.metadata.get("tags", ()) for cell in code].count(True) == 1
    assert code[0].source == nbformat.read(NOTEBOOKS[0], 4).cells[2].source, "all install alike"


def test_badges_lead_to_the_notebooks():
    found = BADGE.findall((ROOT / "README.md").read_text())
    assert sorted(path for _, path in found) == [str(path.relative_to(ROOT)) for path in NOTEBOOKS]
    cloned = re.search(r'REPOSITORY = "https://github.com/(.+)"', nbformat.read(NOTEBOOKS[0], 4).cells[2].source)[1]
    assert {repository for repository, _ in found} == {cloned}


@pytest.mark.heavy
def test_text_to_video(checkout, weights_folder):
    prompts = {"PROMPT": "a red shark moves left", "THEN": "a red shark moves right"}
    notebook = execute("text_to_video", checkout, WEIGHTS=str(weights_folder), SECONDS=2, **prompts)
    assert [movie.shape for movie in movies(notebook)] == [(9, 128, 128, 3), (16, 128, 128, 3)]
    (picture,) = shown(notebook, "image/png")
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (256, 256)


@pytest.mark.heavy
def test_own_clips(checkout):
    notebook = execute("own_clips", checkout, STEPS=2, BATCH=1, OPTIONS=BRIEF)
    assert re.search(r"kept +20 +videos 64x64x17", said(notebook))
    assert_learning_is_shown(notebook, checkout / "runs/mine", ["loss/student", "i2v", "t2i"])
    before, after = movies(notebook)
    assert before.shape == after.shape == (17, 256, 256, 3)
    assert np.any(before != after)


@pytest.mark.heavy
def test_distil(checkout):
    notebook = execute("distil", checkout, CLIPS=8, STEPS=2, IMAGES=1, VIDEOS=1, OPTIONS=BRIEF)
    names = ["student/image_error", "student/video_error", "grad_norm/student"]
    assert_learning_is_shown(notebook, checkout / "runs/student", names)
    made = movies(notebook)
    assert [movie.shape for movie in made] == [(17, 256, 256, 3)] * 3
    teacher, student = (json.loads((checkout / f"runs/{name}.json").read_text()) for name in ("teacher", "student"))
    walks = [
        (about["options"]["num_inference_steps"], about["options"]["guidance_scale"]) for about in (teacher, student)
    ]
    assert walks == [(8, 1.5), (4, 1)]


def test_without_a_tpu_there_is_a_plan(checkout):
    notebook = execute("hunyuan_tpu", checkout)
    text = said(notebook)
    assert "no TPU here" in text and text.count("needs a TPU") == 2
    assert "8 chips, context=8: 3.2 GB" in text and "mesh data=1 fsdp=1 tensor=1 context=8" in text
    (table,) = shown(notebook, "text/markdown")
    assert "v5e:1x1" in table and "h100" not in table


@pytest.mark.heavy
def test_published_weights_are_sampled_where_there_is_a_chip(checkout, tmp_path):
    pytest.importorskip("diffusers")
    published_pipelines.write(tmp_path / "published", "concat")
    Image.radial_gradient("L").save(tmp_path / "first.png")
    sizes = {"SIZE": "32x32", "FRAMES": 9, "STEPS": 2, "CHIPS": 1}
    notebook = execute("hunyuan_tpu", checkout, WEIGHTS="./published", IMAGE="first.png", **sizes)
    (movie,) = movies(notebook)
    assert movie.shape == (5, 32, 32, 3)
    assert "needs a TPU" not in said(notebook) and len(list((checkout / "runs/prompts").iterdir())) >= 1
