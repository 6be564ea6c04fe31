"""What the project promises about itself: public names, layers, limits, commands and what the README shows."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
import resource
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import typer

import unweave
from unweave import cli, errors
from unweave.zoo.modular_addition import fourier_power

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "unweave").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# a file imports only from files above it; a folder counts as one file
LAYERS = (
    "errors",
    "progress",
    "intervals",
    "tree",
    "files",
    "ops",
    "graph",
    "penalty",
    "zoo",
    "architectures",
    "execution",
    "capture",
    "data",
    "scope",
    "ablation",
    "freezing",
    "statistics",
    "scoring",
    "paths",
    "heads",
    "compression",
    "evaluation",
    "circuits",
    "modules",
    "measures",
    "tasks",
    "hypotheses",
    "falsification",
    "audit",
    "certificates",
    "coarsening",
    "storage",
    "subspaces",
    "kernels",
    "export",
    "generation",
    "drivers",
    "sampling",
    "features",
    "universality",
    "probes",
    "report",
    "checks",
    "annotations",
    "pipeline",
    "dissection",
    "modularisation",
    "frames",
    "tracking",
    "plots",
    "serving",
    "retrodiction",
    "cli",
    "__main__",
)
LONGEST_FUNCTION = 60


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
FILES = pytest.mark.parametrize("module", MODULES)


def imported(module: str) -> Iterator[tuple[str, int]]:
    """(module of ours, line) for every import of a file, wherever in the file it stands."""
    package = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name for name in inner if name in MODULES] or [base]
        else:
            continue
        yield from ((t, node.lineno) for t in targets if t in MODULES and t != "unweave")


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


# ---- public names ---------------------------------------------------------------------------------------


def test_every_public_name_exists() -> None:
    assert len(set(unweave.__all__)) == len(unweave.__all__)
    assert 20 <= len(unweave.__all__) <= 40
    missing = [name for name in unweave.__all__ if not hasattr(unweave, name)]
    assert not missing


def test_lazy_names_are_the_ones_that_editors_see() -> None:
    block = next(n for n in MODULES["unweave"].body if isinstance(n, ast.If))
    seen = {
        alias.name: node.module.removeprefix("unweave.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == unweave._HOME
    assert set(unweave.__all__) == {*seen, "__version__"}


def test_a_public_name_stays_itself_after_its_file_is_imported() -> None:
    # capture is both a function and a file; on import Python puts the file in the function's place
    file = importlib.import_module("unweave.capture")
    setattr(unweave, file.__name__.rpartition(".")[2], file)
    assert unweave.capture is file.capture


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        unweave.nonsense  # noqa: B018


def test_public_functions_say_what_they_are() -> None:
    bare = [name for name in unweave.__all__ if name != "__version__" and not inspect.getdoc(getattr(unweave, name))]
    assert not bare


def test_every_module_says_what_it_exports() -> None:
    for module, tree in MODULES.items():
        if module == "unweave.__main__":
            continue
        assert ast.get_docstring(tree), f"{module} has no docstring"
        listed = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        assert listed, f"{module} has no __all__"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == unweave.__version__
    assert f"## {unweave.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    classes = {n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, Exception)}
    assert classes == set(errors.__all__)
    assert all(issubclass(getattr(errors, n), errors.UnweaveError) for n in classes)
    assert set(re.findall(r"──\s*(\w+Error)", errors.__doc__ or "")) == classes - {"UnweaveError"}


# ---- layers and limits ----------------------------------------------------------------------------------


def test_every_file_has_its_layer() -> None:
    units = {name.split(".")[1] for name in MODULES if name != "unweave"}
    assert units == set(LAYERS)


@FILES
def test_files_import_only_from_files_above(module: str) -> None:
    if module == "unweave":
        return  # the public names, imported when used
    here = LAYERS.index(module.split(".")[1])
    wrong = [f"line {line}: {name}" for name, line in imported(module) if LAYERS.index(name.split(".")[1]) > here]
    assert not wrong, f"{module} imports from files below it: {wrong}"


def test_no_file_imports_itself_by_a_detour() -> None:
    graph = {module: {name for name, _ in imported(module)} - {module} for module in MODULES if module != "unweave"}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError


@FILES
def test_own_modules_are_imported_at_the_top(module: str) -> None:
    if module.startswith("unweave.cli"):
        return  # its commands import what they need, so that --help is quick
    inner = [
        f"line {node.lineno}"
        for function in functions(module)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("unweave"))
    ]
    assert not inner


@FILES
def test_functions_are_short(module: str) -> None:
    def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
        return (function.end_lineno or 0) - body[0].lineno + 1

    long = {f.name: lines(f) for f in functions(module) if lines(f) > LONGEST_FUNCTION}
    assert not long


@FILES
def test_nothing_is_printed_outside_the_command_line(module: str) -> None:
    if module.startswith("unweave.cli"):
        return
    calls = [n for n in ast.walk(MODULES[module]) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
    assert not calls


@FILES
def test_nothing_that_could_run_strangers_code(module: str) -> None:
    banned_calls = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "yaml.load"}
    for node in ast.walk(MODULES[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {n.split(".")[0] for n in names} & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in banned_calls, f"line {node.lineno}"
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert options.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        assert options.get("trust_remote_code", "False") == "False", f"line {node.lineno}"
        assert options.get("shell", "False") == "False", f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert "allow_pickle" in options, f"line {node.lineno}: say allow_pickle=False"


@FILES
def test_errors_are_caught_by_name(module: str) -> None:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ExceptHandler) and ast.unparse(node.body[-1]) != "raise":  # else it only cleans up
            caught = ast.unparse(node.type) if node.type else ""
            broad = {"", "Exception", "BaseException"} & set(caught.strip("()").split(", "))
            assert not broad, f"line {node.lineno} catches everything"


def test_no_file_is_called_utils() -> None:
    assert not [p.name for p in SOURCES if re.fullmatch(r"(utils?|helpers?|misc|common)\.py", p.name)]


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        fourier_power(torch.zeros(113))


# ---- the command line -----------------------------------------------------------------------------------

ROOT_COMMAND: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = dict(ROOT_COMMAND.commands)
CLI_PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")


def options_of(command: Any) -> set[str]:
    return {text for p in command.params if p.param_type_name == "option" for text in (*p.opts, *p.secondary_opts)}


def shell_lines(text: str) -> Iterator[str]:
    """Command lines in the shell blocks of a page, continued lines joined and comments dropped."""
    for block in re.findall(r"```(?:bash|sh|console|shell)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").partition(" #")[0].strip()
            if line and not line.startswith("#"):
                yield line


PAGES = {
    str(p.relative_to(ROOT)): p
    for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def test_every_command_is_documented() -> None:
    sections = re.findall(r"^## unweave (\S+)$", CLI_PAGE, flags=re.MULTILINE)
    assert sections == list(COMMANDS)
    assert not [name for name in COMMANDS if f"unweave {name}" not in README]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    section = CLI_PAGE.split(f"## unweave {name}\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(--?[a-z][a-z-]*)`", section))
    options = options_of(COMMANDS[name])
    assert documented == options, f"undocumented {options - documented}, gone {documented - options}"


def test_every_option_and_argument_has_a_help_text() -> None:
    bare = [f"{n}: {p.name}" for n, c in COMMANDS.items() for p in c.params if not getattr(p, "help", None)]
    assert not bare
    assert options_of(ROOT_COMMAND) <= set(re.findall(r"--[a-z-]+", CLI_PAGE))


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_pages_show_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    for line in shell_lines(PAGES[page].read_text(encoding="utf-8")):
        words = [w for w in shlex.split(line) if "=" not in w or w.startswith("-")]
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        if words[0].rpartition("/")[2] == "unweave" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in COMMANDS, line
            used = {w.partition("=")[0] for w in words[2:] if re.match(r"--?[a-z]", w)}
            assert used <= options_of(COMMANDS[words[1]]), line


def test_help_is_quick_and_does_not_load_torch() -> None:
    code = "import sys, unweave.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    # processor time, least of three: other work on the machine does not count
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "unweave", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(name in done.stdout for name in COMMANDS)
    assert min(spent) < 0.6


# ---- what the pages show --------------------------------------------------------------------------------


def python_blocks(page: str) -> list[str]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if not b.startswith("# not run")]


def test_the_readme_has_an_example() -> None:
    assert python_blocks("README.md")


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "example"}
    for number, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page}, example {number + 1}", "exec"), space)


@pytest.mark.parametrize("page", PAGES)
def test_public_names_that_pages_use_exist(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    used = set(re.findall(r"\bunweave\.([A-Za-z_]+)\b(?!\.[a-z]+\.)", text))
    known = {*unweave.__all__, *LAYERS, "toml", "egg"}
    assert used <= known, f"{page} speaks of unweave.{sorted(used - known)}"
