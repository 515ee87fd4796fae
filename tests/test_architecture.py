"""Rules of the code base: imports go down the layers, libraries stay where they belong, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dbconvert"
FILES = sorted(p for p in ROOT.rglob("*.py") if "shipped" not in p.relative_to(ROOT).parts[:-1])
LAYERS = {
    "amounts": 0, "errors": 0, "events": 0, "files": 0, "shipped": 0,
    "diffusion": 1, "schema": 1,
    "anatomy": 2, "conditioning": 2, "data_options": 2, "overrides": 2, "plan": 2, "recipe": 2, "rounds": 2,
    "tensorfile": 2, "stream": 2, "graph": 3, "checkpoint": 3, "weights": 3,
    "tasks": 4, "sources": 4, "data": 4,
    "engine": 5,
    "cli": 6,
}  # fmt: skip
HOMES = {
    "typer": {"cli"},
    "rich": {"cli"},
    "accelerate": {"engine"},
    "wandb": {"engine"},
    "matplotlib": {"engine"},
    "mauve": {"engine"},
    "torch_fidelity": {"engine"},
    "peft": {"engine"},
    "torchao": {"engine"},
    "transformers": {"sources"},
    "diffusers": {"sources"},
    "huggingface_hub": {"sources"},
    "safetensors": {"checkpoint"},
    "datasets": {"data"},
    "sklearn": {"data"},
    "scipy": {"diffusion"},
    "filelock": {"data"},
    "pydantic": {"schema"},
    "yaml": {"schema", "overrides", "engine"},
}


def part(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """Every module that a file imports, also inside functions and for type checking."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = (ROOT.parent.joinpath(*node.module.split("."), f"{alias.name}.py") for alias in node.names)
            found = [".".join([node.module, file.stem]) for file in inner if file.exists()]
            yield from found or [node.module]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_layers(path):
    here = part(path)
    if here == "__init__":
        return  # the public API names what the engine offers
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "dbconvert" and len(parts) > 1:
            assert LAYERS[parts[1]] <= LAYERS[here], f"{here} imports {module}"
            target = ROOT.joinpath(*parts[1:])
            assert target.with_suffix(".py").exists(), f"{module} is a package: import the file"
        elif parts[0] in HOMES:
            assert here in HOMES[parts[0]], f"{parts[0]} does not belong in {here}"
        if "torch.fx" in module:
            assert here == "graph"


def test_only_graph_uses_fx():
    for path in FILES:
        names = {
            alias.name
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ImportFrom)
            for alias in n.names
        }
        assert "fx" not in names or part(path) == "graph", path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and part(path) != "cli":
            assert node.end_lineno - node.lineno < 75, f"{node.name} is {node.end_lineno - node.lineno} lines"


def test_the_docs_are_up_to_date():
    """The file map and every measured number are what docs/regenerate.py writes."""
    script = ROOT.parent / "docs" / "regenerate.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
