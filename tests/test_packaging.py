"""An editable install, a wheel, an sdist and a bare checkout all find core, zoo and recipes, from anywhere."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("gradsurgery", "architectures", "recipes", "pyproject.toml", "README.md", "LICENSE")
PROBE = (
    "import sys, gradsurgery, gradsurgery.architectures.hps as a, gradsurgery.recipes.nyuv2 as r; "
    "import gradsurgery.recipes.harness; assert a.__name__ == 'gradsurgery.architectures.hps'; "
    "print(gradsurgery.__file__, r.__file__); sys.argv[1:] = ['--help']; r.main()"
)


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that builds leave nothing in the working tree."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=checkout)
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def environment(folder: Path) -> Path:
    """A bare virtual environment that sees this one's dependencies, but not its gradsurgery."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    here = next(p for p in sys.path if p.endswith("site-packages"))
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in Path(here).iterdir():
        if "gradsurgery" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def probe(python: Path | str, cwd: Path) -> str:
    return run(python, "-W", "error", "-c", PROBE, cwd=cwd).splitlines()[0]


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable", "editable strict"])
def test_installed(kind: str, checkout: Path, distributions: dict[str, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = ["--editable", checkout] if kind.startswith("editable") else [distributions[kind]]
    options = ["--config-settings", "editable_mode=strict"] if kind == "editable strict" else []
    run(
        python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", *options, *target, cwd=elsewhere
    )
    outside = probe(python, elsewhere)
    assert (str(tmp_path) in outside) == (kind in ("wheel", "sdist")), outside
    assert str(checkout) in probe(python, checkout)  # the checkout shadows what is installed, and must be whole
    assert (checkout / "gradsurgery" / "py.typed").exists()


def test_a_bare_checkout_runs_from_its_root(checkout: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    assert str(checkout) in probe(python, checkout)
    run(python, "-W", "error", "-m", "gradsurgery.recipes.nyuv2", "--help", cwd=checkout)


def test_the_wheel_holds_the_packages_and_nothing_else(distributions: dict[str, Path]) -> None:
    names = run(sys.executable, "-m", "zipfile", "-l", distributions["wheel"], cwd=ROOT)
    assert "gradsurgery/py.typed" in names
    assert "gradsurgery/recipes/harness/" in names
    assert "gradsurgery/architectures/hps.py" in names
    assert not any(line.startswith(("tests", "benchmarks", "architectures", "recipes")) for line in names.splitlines())
