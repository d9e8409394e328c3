import subprocess
import sys

import pytest

from hpo.data import sources
from hpo.errors import DataError


def test_medmnist_names_are_all_its_2d_sets():
    info = sources.medmnist_info()
    listed = {flag: facts["license"] for flag, facts in info.items() if not flag.endswith("3d")}
    assert listed == sources._MEDMNIST


def test_medmnist_files_are_those_of_the_installed_package():
    info = sources.medmnist_info()
    for flag in sources._MEDMNIST:
        for size, suffix in ((28, ""), (64, "_64"), (128, "_128"), (224, "_224")):
            (file,) = sources.DATASETS[flag].downloads(size)
            assert (file.url, file.md5) == (info[flag][f"url{suffix}"], info[flag][f"MD5{suffix}"])
            assert f"{flag}{suffix}.npz" in file.url
            assert file.name == f"{flag}{suffix}.npz"
        assert len(sources.DATASETS[flag].class_names()) == len(info[flag]["label"]) >= 2


def test_written_down_urls_and_checksums_are_torchvisions():
    import inspect

    from torchvision.datasets import CIFAR10, EuroSAT, FashionMNIST

    fashion = sources.DATASETS["fashionmnist"]
    assert [(file.url, file.md5) for file in fashion.downloads(28)] == [
        (FashionMNIST.mirrors[0] + name, md5) for name, md5 in FashionMNIST.resources
    ]
    assert fashion.class_names() == tuple(FashionMNIST.classes)
    (cifar,) = sources.DATASETS["cifar10"].downloads(32)
    assert (cifar.url, cifar.md5, cifar.name) == (CIFAR10.url, CIFAR10.tgz_md5, CIFAR10.filename)
    (eurosat,) = sources.DATASETS["eurosat"].downloads(64)
    code = inspect.getsource(EuroSAT.download)
    assert eurosat.url in code
    assert eurosat.md5 in code


def test_listing_data_sets_imports_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'medmnist', 'sklearn', 'PIL', 'pooch'}"
    loaded = f"print({heavy} & sys.modules.keys())"
    code = f"import sys; from hpo.data import prepare, sources; assert sources.DATASETS; {loaded}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "size", "path", "message"),
    [
        ("bloodminst", None, None, "no data set 'bloodminst'. Did you mean bloodmnist?"),
        ("organmnist3d", None, None, "no data set 'organmnist3d'"),
        ("qqq", None, None, "Known: pathmnist"),
        ("bloodmnist", 32, None, "comes at 28 or 64 or 128 or 224 pixels, got 32"),
        ("digits", 28, None, "comes at 8 pixels, got 28"),
        ("fashionmnist", 32, None, "comes at 28 pixels"),
        ("cifar10", 28, None, "comes at 32 pixels"),
        ("eurosat", 32, None, "comes at 64 pixels"),
        ("npz", None, None, "needs the place of your images"),
        ("folder", None, None, "needs the place of your images"),
        ("digits", None, "x.npz", "digits comes with hpo"),
        ("npz", None, "nowhere/x.npz", "nowhere/x.npz: no such file"),
    ],
)
def test_name_size_and_path_that_do_not_fit_are_refused(name, size, path, message):
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        sources.find(name, size=size, path=path)
