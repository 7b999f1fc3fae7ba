"""The package as a whole: what it imports, in which direction, what it promises by name, and what its README says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reversa

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "reversa"
FILES = sorted(SOURCE.rglob("*.py"))

# From the bottom to the top; a module imports only from levels below its own part's.
LAYERS = [
    {"errors"},
    {"drawing", "words"},
    {"schemes"},
    {"exact"},
    {"engine"},
    {"sequence"},
    {"check", "models", "convert"},
    {"memory"},
    {"regularise", "schedule", "stability", "compat"},
    {"trajectories"},
    {"train"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

PUBLIC = {
    "BDIA",
    "AdditiveCoupling",
    "AffineCoupling",
    "CheckReport",
    "Dr2Net",
    "Hamiltonian",
    "IResNet",
    "IRevNet",
    "Invert",
    "Leapfrog",
    "McCallumFoster",
    "Midpoint",
    "Mixed",
    "Momentum",
    "Offload",
    "Recompute",
    "RevNet",
    "ReversaError",
    "ReversibleHeun",
    "ReversibleSequence",
    "Store",
    "check",
    "convert",
    "errors",
    "exact",
    "explain",
    "is_replaying",
    "models",
    "restore",
    "schemes",
}


def part_of(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def parts_imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("reversa."):
                yield name.split(".")[1]


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.parent != SOURCE or f.stem != "__init__"], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_point_one_way(path):
    own = part_of(path)
    for part in set(parts_imported_by(path)) - {own, "__version__"}:
        assert LEVEL[part] < LEVEL[own], f"{path.name} ({own}) imports from {part}, which is not below it"


def test_importing_reversa_loads_no_package_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import reversa\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = set(result.stdout.split()) - {"reversa"} - set(sys.stdlib_module_names)
    assert extra <= {"torch"}, f"import reversa loads {sorted(extra)}"
    assert "torch._dynamo" not in result.stdout


def test_importing_reversa_does_not_import_dynamo():
    code = (
        "import sys, torch; d = 'torch._dynamo'; had = d in sys.modules; import reversa; print(had, d in sys.modules)"
    )
    had, has = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert had == has


def test_public_names_change_only_on_purpose():
    added, gone = set(reversa.__all__) - PUBLIC, PUBLIC - set(reversa.__all__)
    message = f"added {sorted(added)}, gone {sorted(gone)}: edit PUBLIC and CHANGELOG.md together"
    assert (added, gone) == (set(), set()), message
    assert all(hasattr(reversa, name) for name in reversa.__all__)


def blocks_of(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


PAGES = (
    "README.md",
    "docs/conversion.md",
    "docs/exact.md",
    "docs/models.md",
    "docs/stability.md",
    "docs/stacks.md",
    "docs/memory.md",
    "docs/migration.md",
)
EXAMPLES = [code for page in PAGES for code in blocks_of(page)]


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_readme_examples_run(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), f"README.md points to {target}, which is not there"


def test_no_file_is_too_long():
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text().splitlines())) > 300}
    assert not long, f"over 300 lines: {long}"
