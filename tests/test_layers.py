"""The architecture's rules, checked on the source itself: which folder may import which, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("train", "model", "kernels", "data", "configs", "eval", "scripts")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "data": {"data"},
    "model": {"model", "kernels"},
    "eval": {"eval", "model", "data", "kernels"},
    "configs": set(),
    "train": {"train", "model", "kernels", "data", "eval", "configs"},
    "scripts": set(FOLDERS),
}
# kernels knows torch and triton only: what else it imports must come with Python.
KERNEL_PACKAGES = {"torch", "triton", "sieve"}
MAX_LINES = 350


def sources(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module name that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write sieve.<folder>"
            found.add(node.module)
            if node.module == "sieve":
                found |= {f"sieve.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down_the_layers(folder):
    for path in sources(folder):
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top not in FOLDERS, f"{path.relative_to(ROOT)} imports {name}: write sieve.{name}"
            if top == "sieve" and rest:
                used = rest.split(".")[0]
                assert used in MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {name}: {folder} may not use {used}"


def test_kernels_import_torch_and_triton_only():
    import sys

    for path in sources("kernels"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top in KERNEL_PACKAGES or top in sys.stdlib_module_names, f"{path.relative_to(ROOT)} imports {name}"


def test_one_file_imports_deepspeed():
    users = [str(p.relative_to(ROOT)) for f in FOLDERS for p in sources(f)
             if any(n.split(".")[0] == "deepspeed" for n in imported(p))]
    assert users == ["train/engine.py"]


def test_hydra_types_stop_in_the_config():
    allowed = {"train/config.py", "train/overrides.py"}
    users = {str(p.relative_to(ROOT)) for f in FOLDERS for p in sources(f)
             if any(n.split(".")[0] in ("hydra", "omegaconf") for n in imported(p))}
    assert users <= allowed


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for f in (*FOLDERS, "tests") for p in sources(f)
            if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}; split by idea"


def test_namespace_packages_stay_namespaces():
    stray = [str(p.relative_to(ROOT)) for f in (*FOLDERS, "tests") if f != "configs"
             for p in (ROOT / f).rglob("__init__.py")]
    assert not stray, f"{stray}: an __init__.py here breaks `python -m`, pytest or transformers"
    assert (ROOT / "configs" / "__init__.py").exists()


def test_the_package_is_the_checkout():
    import sieve.model.config

    assert Path(sieve.model.config.__file__) == ROOT / "model" / "config.py"
