"""Runs from Python: a study from a mapping, images, networks and callbacks that are objects of the caller."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import hpo
from hpo.api.inputs import data_place
from hpo.api.own_model import model_place
from hpo.errors import DataError, SpecError
from hpo.events import EpochEnded, StudyEnded, StudyOpened, TrialEnded

STUDY: dict[str, Any] = {
    "name": "mine",
    "model": {"kind": "mlp", "hidden": 8},
    "training": {"epochs": 2, "precision": "float32"},
    "search": {"trials": 2, "sampler": "random", "space": {"model.dropout": {"float": [0.0, 0.5]}}},
    "keep": {"figures": "none"},
}


def squares(count: int = 120, side: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    images = random.integers(0, 100, (count, side, side))
    images[labels == 1] += 150
    return images.astype(np.uint8), labels


class Items(torch.utils.data.Dataset):
    """As a data set of torchvision with ToTensor gives them: (channels, height, width) in [0, 1], and a number."""

    classes = ("dark", "bright")

    def __init__(self, channels: int = 3) -> None:
        self.images, self.labels = squares()
        self.channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[place]).float().div(255)
        return image.expand(self.channels, -1, -1), int(self.labels[place])


def test_a_mapping_arrays_and_callbacks_make_a_study(empty: Path) -> None:
    events: list[object] = []
    study = hpo.run_study(STUDY, data=squares(), workers=0, callbacks=[events.append])
    assert [type(event) for event in events if isinstance(event, StudyOpened | StudyEnded)] == [StudyOpened, StudyEnded]
    assert sum(isinstance(event, TrialEnded) for event in events) == 2
    assert sum(isinstance(event, EpochEnded) for event in events) == 4
    assert len(study.trials) == 2
    assert study.best_model().predict(squares()[0][:2]) == ["0", "1"]
    # The images were written once: the study resumes with the same, and nothing else.
    files = list((empty / "mlruns" / "inputs").iterdir())
    again = hpo.run_study(STUDY, data=squares(), workers=0, trials=3)
    assert len(again.trials) == 3
    assert list((empty / "mlruns" / "inputs").iterdir()) == files
    images, labels = squares()
    with pytest.raises(hpo.HpoError, match="data"):
        hpo.run_study(STUDY, data=(255 - images, labels), workers=0, trials=4)


def test_a_dataset_of_torch_is_read_item_by_item(tmp_path: Path) -> None:
    place, validated = data_place({"train": Items(), "valid": Items()}, folder=tmp_path, name="mine")
    assert validated
    with np.load(place["path"]) as arrays:
        assert arrays["train_images"].shape == (120, 6, 6, 3)
        assert arrays["train_images"].max() <= 1
        assert arrays["val_labels"].tolist() == squares()[1].tolist()
        assert arrays["class_names"].tolist() == ["dark", "bright"]
        np.testing.assert_allclose(arrays["train_images"][..., 0] * 255, squares()[0], atol=1e-3)


def test_tensors_have_their_channels_first_and_arrays_last(tmp_path: Path) -> None:
    images, labels = squares()
    tensors = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)
    for given in ((tensors, torch.from_numpy(labels)), (np.repeat(images[..., None], 3, 3), labels.tolist())):
        place, _ = data_place(given, folder=tmp_path, name="mine")
        with np.load(place["path"]) as arrays:
            assert arrays["train_images"].shape == (120, 6, 6, 3)
            assert arrays["train_labels"].tolist() == labels.tolist()
    assert len(list(tmp_path.iterdir())) == 1  # the same content is one file


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"test": squares()}, "'train' is missing"),
        ({"train": squares(), "rest": squares()}, "'rest' is unknown"),
        ([1, 2, 3], "an item of the train dataset is not"),
        (5, "train is a int"),
        ([(np.zeros((2, 2)), 0), (np.zeros((3, 3)), 1), (np.zeros((3, 3)), 1)], "images of several shapes"),
    ],
)
def test_images_that_are_none_are_refused_with_an_example(tmp_path: Path, data: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        data_place(data, folder=tmp_path, name="mine")
    assert caught.value.hint


def test_a_network_of_a_module_is_named_and_its_defaults_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nets_of_mine")
    exec("def build(*, image_shape, classes, filters=8, act=len): ...", vars(module))  # noqa: S102
    monkeypatch.setitem(sys.modules, "nets_of_mine", module)
    place = model_place(module.build, {"kind": "mlp", "hidden": 3, "options": {"filters": 9}}, name="mine")
    assert place == {"kind": "nets_of_mine:build", "options": {"filters": 9}}
    partial = functools.partial(module.build, filters=4)
    assert model_place(partial, {}, name="mine") == {"kind": "nets_of_mine:build", "options": {"filters": 4}}
    for nameless in (lambda: None, functools.partial(lambda: None), torch.nn.ReLU()):
        with pytest.raises(SpecError, match="is no function or class of a module"):
            model_place(nameless, {}, name="mine")


SCRIPT = """
import numpy as np
import torch.nn as nn
from torch.nn import functional as F
import hpo

WIDTH = 4


class Block(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.layer = nn.Linear(inside, WIDTH)

    def forward(self, x):
        return F.relu(self.layer(x))


def build(*, image_shape, classes, extra=2):
    height, width, channels = image_shape
    return nn.Sequential(nn.Flatten(), Block(height * width * channels), nn.Linear(WIDTH, classes))


if __name__ == "__main__":
    labels = np.arange(120) % 2
    images = np.zeros((120, 6, 6), np.uint8) + 200 * labels[:, None, None].astype(np.uint8)
    images[:, 0, 0] = np.arange(120)
    search = {"space": {"model.options.extra": {"int": [1, 3]}}, "sampler": "random"}
    study = {"name": "own", "search": search, "training": {"epochs": 1}, "keep": {"figures": "none"}}
    study = hpo.run_study(study, data=(images, labels), model=build, trials=2, workers=1)
    print(len(study.trials), study.count("complete"), study.best_model().predict_proba(images[:2]).shape)
"""


def test_a_network_of_a_script_is_written_to_a_module_that_workers_import(empty: Path) -> None:
    (empty / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "2", "(2,", "2)"], done.stderr
    written = (empty / "own_model.py").read_text(encoding="utf-8")
    assert "class Block" in written
    assert "import torch.nn as nn" in written
    assert "WIDTH = 4" in written
    assert "run_study(" not in written


def test_a_file_of_the_users_own_is_never_overwritten(empty: Path) -> None:
    (empty / "own_model.py").write_text("precious = 1\n")
    (empty / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=False)
    assert "own_model.py: is there already" in done.stderr
    assert (empty / "own_model.py").read_text() == "precious = 1\n"


def test_a_mapping_is_checked_as_a_file_is(empty: Path) -> None:
    spec = hpo.load_spec({**STUDY, "data": {"name": "digits"}}, overrides={"training.epochs": 3})
    assert spec.training.epochs == 3
    assert hpo.load_study is hpo.load_spec
    with pytest.raises(SpecError, match=r"mine: model\.hiden: unknown key 'hiden'"):
        hpo.load_spec({**STUDY, "data": {"name": "digits"}, "model": {"kind": "mlp", "hiden": 3}})
    with pytest.raises(SpecError, match="names code from outside the working directory"):
        hpo.load_spec({**STUDY, "data": {"name": "json.tool:main"}})


def test_a_spec_takes_images_too_and_keeps_what_was_not_given(empty: Path) -> None:
    spec = hpo.load_spec({**STUDY, "data": {"name": "digits"}}, overrides={"search.objective": "valid_macro_f1"})
    study = hpo.run_study(spec, data=squares(), trials=1, workers=0)
    assert study.spec["training"]["monitor"] == "valid_macro_f1"
    assert study.spec["data"]["name"] == "npz"
    assert study.trials[0].result is not None
