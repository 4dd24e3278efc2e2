"""The house holds together: arrows point down, every package is listed, examples run, and no path leaks in."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery
from gradsurgery import get_method, list_methods, registry
from gradsurgery.solvers.accelerator import TRITON

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"gradsurgery": "gradsurgery", "architectures": "gradsurgery.architectures", "recipes": "gradsurgery.recipes"}

# What each part may import of this project. A part is the longest prefix listed here; a missing arrow is forbidden.
ARROWS: dict[str, set[str]] = {
    "stats": set(),
    "registry": {"stats"},
    "draws": set(),
    "losses": set(),
    "graph": {"losses"},
    "distributed": {"losses"},
    "solvers": set(),
    "kernels": set(),
    "methods": {"kernels", "registry", "solvers", "stats"},
    "engines": {"distributed", "draws", "graph", "kernels", "losses", "registry", "stats"},
    "functional": {"kernels", "methods", "registry", "stats"},
    "parameters": {"graph", "losses"},
    "rule": {"losses", "registry", "stats"},
    "tracked": {"distributed", "engines"},
    "surgery": {"distributed", "engines", "losses", "parameters", "registry", "rule", "stats", "tracked"},
    "optimizer": {"engines", "losses", "parameters", "registry", "rule", "stats", "surgery"},
    "compiled": {
        "draws",
        "engines",
        "kernels",
        "losses",
        "optimizer",
        "parameters",
        "registry",
        "rule",
        "stats",
        "surgery",
    },
    "integrations": {"losses", "optimizer", "stats"},
    "__init__": {"compiled", "functional", "losses", "optimizer", "registry", "stats"},
    "architectures": set(),
    "recipes": {"", "architectures", "integrations", "registry", "stats"},
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for everything that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "gradsurgery"}


def part(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("name", modules())
def test_arrows_point_down(name: str) -> None:
    known = set(modules())
    mine = part(name) or "__init__"
    for imported in imports(modules()[name]):
        module = imported if imported in known else imported.rpartition(".")[0]
        other = part(module)
        if other == mine and module != "gradsurgery":
            continue
        names_a_module = f"gradsurgery.{imported.split('.')[1]}" in known and module == "gradsurgery"
        target = imported.split(".")[1] if names_a_module else other
        assert target in ARROWS[mine], f"{name} imports {imported}: {mine} may import {sorted(ARROWS[mine])}"


def test_arrows_catch_a_wrong_import(tmp_path: Path) -> None:
    """The check above can fail: an engine that imports a method, however it spells it."""
    for line in ("import gradsurgery.methods", "from gradsurgery import methods", "from gradsurgery.methods import EW"):
        (tmp_path / "wrong.py").write_text(line)
        (found,) = imports(tmp_path / "wrong.py")
        assert found.split(".")[1] == "methods"
    assert "methods" not in ARROWS["engines"]
    assert "engines" not in ARROWS["methods"]


def test_arrows_have_no_cycle() -> None:
    order = list(ARROWS)
    for name, allowed in ARROWS.items():
        if name not in ("__init__", "recipes"):
            assert all(order.index(other) < order.index(name) for other in allowed)


def test_every_package_is_listed_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^  "(gradsurgery[\w.]*)",$', text, re.MULTILINE))
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert listed == packages


def test_the_core_imports_without_any_extra() -> None:
    extras = ["torchvision", "torchmetrics", "tyro", "rich", "matplotlib", "tensorboard", "sklearn", "cvxpy", "triton"]
    extras += ["lightning", "transformers", "accelerate"]
    code = (
        f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
        "import gradsurgery; gradsurgery.MTLOptimizer\nimport gradsurgery.architectures"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


CORE_MODULES = [
    m.name
    for m in pkgutil.walk_packages([str(ROOT / "gradsurgery")], "gradsurgery.")
    if "recipes" not in m.name and (".device" not in m.name or TRITON)
]


@pytest.mark.parametrize("name", CORE_MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    blocks = readme_blocks()
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    opt, model = scope["opt"], scope["model"]
    for _ in range(3):
        z = model[0](torch.randn(16, 4)).relu()
        opt.step([(t + 1) * head(z).square().mean() for t, head in enumerate(model[1:])])
    norms = opt.info.weights * opt._surgery.rule._state["norms"]
    torch.testing.assert_close(norms[0, 0], norms[0, 1])
    assert list_methods("even") == ["even"]
    assert get_method("Even").hparams == {"beta": 0.9}


def test_a_registered_method_of_the_readme_takes_under_twenty_lines() -> None:
    (block,) = [block for block in readme_blocks() if "@register" in block]
    start = block.index("@register")
    end = block.index("\n\n\n", start)
    assert len(block[start:end].splitlines()) < 20


@pytest.mark.parametrize("path", sorted({*ROOT.glob("*.*"), *ROOT.glob(".ci/*")}), ids=lambda p: p.name)
def test_no_path_of_a_machine_leaks_in(path: Path) -> None:
    if path.is_file() and path.suffix in (".py", ".md", ".toml", ".cff", ""):
        assert str(ROOT) not in path.read_text()
        assert "index-url" not in path.read_text()


def test_public_names() -> None:
    names = [
        "Absent",
        "MTLOptimizer",
        "StepInfo",
        "aggregate",
        "backward",
        "compile_backward",
        "get_method",
        "list_methods",
    ]
    assert sorted(gradsurgery.__all__) == names
    for name in gradsurgery.__all__:
        assert getattr(gradsurgery, name).__doc__


@pytest.mark.parametrize("name", list_methods())
def test_readme_tells_of_every_method(name: str) -> None:
    table = (ROOT / "README.md").read_text().split("| promises |")[1].split("\n\n")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    info = get_method(name)
    assert info.heads in row
    assert all(guarantee.replace("_", "-") in row for guarantee in info.guarantees)
