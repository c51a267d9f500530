"""Which file may import which, so that a reader can skip the rest."""

import ast
import re
import sys

import pytest

from places import ROOT

# What each file, or each file in a folder, may import from the project. The model's files import
# only the extras that are listed below, inside functions.
ROOMS = {
    "af3.py": {"load_weights", "plumbing", "extras"},
    "processor.py": {"af3", "load_weights", "plumbing", "extras"},
    "load_weights.py": {"plumbing", "extras"},
    "generate.py": {"processor", "plumbing", "extras"},
    "plumbing": {"plumbing"},
    "extras": {"af3", "processor", "load_weights", "plumbing", "extras"},
}
# The extras that each of the four files uses.
EXTRAS_OF_THE_MODEL = {
    "af3.py": {"music_flamingo"},
    "processor.py": {"music_flamingo", "answer_labels"},
    "load_weights.py": {"music_flamingo"},
    "generate.py": {"command_line"},
}
# The extras that use other extras.
USES = {
    "command_line": {
        *(
            "answer_lines",
            "chat",
            "explain",
            "explain_page",
            "float32_matmul",
            "long_prompts",
            "lora",
        ),
        *("alignment", "parallel", "quantize", "short_windows"),
    },
    "answer_lines": {"many_recordings", "parallel"},
    "chat": {"many_recordings"},
    "explain": {"alignment", "stage_trace"},
    "explain_page": {"alignment", "stage_trace"},
    "finetune": {"many_recordings", "lora"},
    "int4": {"float32_matmul"},
    "many_recordings": {"alignment"},
    "parallel": {"many_recordings"},
    "quantize": {"float32_matmul", "int4"},
    "score": {"many_recordings"},
}
PACKAGES = {"torch", "numpy", "safetensors", "tiktoken"}


def files_of(room):
    path = ROOT / room
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def imported_modules(tree):
    """Returns the top-level name of every import in a piece of code."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    return modules


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    ours = {name.removesuffix(".py") for name in ROOMS}
    for path in files_of(room):
        assert imported_modules(parse(path)) & ours <= ROOMS[room], path


@pytest.mark.parametrize("room", ROOMS)
def test_no_other_packages_than_the_four_are_imported(room):
    ours = {name.removesuffix(".py") for name in ROOMS}
    for path in files_of(room):
        others = imported_modules(parse(path)) - ours - PACKAGES
        assert others <= sys.stdlib_module_names, path


def test_af3_needs_no_checkpoint_to_be_imported():
    """It imports load_weights only inside from_pretrained."""
    top_level = [node for node in parse(ROOT / "af3.py").body if not isinstance(node, ast.ClassDef)]
    modules = imported_modules(ast.Module(body=top_level, type_ignores=[]))
    assert "load_weights" not in modules


def test_the_processor_takes_only_the_frame_counts_from_the_network():
    names = []
    for node in ast.walk(parse(ROOT / "processor.py")):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name == "af3"]
        if isinstance(node, ast.ImportFrom) and node.module == "af3":
            names += [alias.name for alias in node.names]
    assert names == ["frame_counts"]


def top_level_imports(path):
    modules = set()
    for node in parse(path).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules |= imported_modules(node)
    return modules


def test_the_command_line_imports_other_extras_only_where_a_flag_asks_for_them():
    assert "extras" not in top_level_imports(ROOT / "extras" / "command_line.py")


@pytest.mark.parametrize("name", EXTRAS_OF_THE_MODEL)
def test_the_four_files_use_only_the_extras_that_are_listed_here(name):
    modules = project_imports(ROOT / name)
    used = {module.split(".")[1] for module in modules if module.startswith("extras.")}
    assert {module for module in used if module} == EXTRAS_OF_THE_MODEL[name]
    if name != "generate.py":
        assert "extras" not in top_level_imports(ROOT / name)


@pytest.mark.parametrize("name", ["music_flamingo", "answer_labels"])
def test_the_extras_of_the_model_import_no_file_of_the_project(name):
    modules = imported_modules(parse(ROOT / "extras" / f"{name}.py"))
    assert not modules & {module.removesuffix(".py") for module in ROOMS}


def project_imports(path):
    """Returns the full names of the project's modules that a file imports."""
    modules = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


@pytest.mark.parametrize("path", files_of("extras"), ids=lambda path: path.stem)
def test_an_extra_uses_only_the_extras_that_are_listed_here(path):
    modules = {name.split(".")[1] for name in project_imports(path) if name.startswith("extras.")}
    names = {other.stem for other in files_of("extras")}
    assert modules & names == USES.get(path.stem, set())


def test_no_file_imports_a_file_that_imports_it():
    imports = {}
    for room in ROOMS:
        for path in files_of(room):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            imports[name] = project_imports(path)
    remaining = {name: modules & set(imports) for name, modules in imports.items()}
    while remaining:
        leaves = {name for name, modules in remaining.items() if not modules & set(remaining)}
        assert leaves, f"a circle among {sorted(remaining)}"
        for name in leaves:
            del remaining[name]


def test_tiny_is_smaller_than_16_megabytes():
    files = [path for path in (ROOT / "tiny").rglob("*") if "__pycache__" not in path.parts]
    assert 1e6 < sum(path.stat().st_size for path in files if path.is_file()) < 16e6


# The state of a process, which belongs to its owner: threads, random numbers, warnings, signals.
STATE = re.compile(
    r"torch\.(set_(?!_)\w+|manual_seed|use_\w+)|torch\.cuda\.set_device|signal\.signal\("
    r"|warnings\.(catch_warnings|simplefilter|filterwarnings|showwarning =)"
    r"|np\.(seterr|random\.seed)|random\.seed|os\.(chdir|putenv|umask|environ\[.*\] =)"
)
# Only programs change it. A library must not: not even for a while, since in other threads the
# change would be seen, and two of them would restore the wrong values.
PROGRAMS = {"command_line", "terminal", "chat", "parallel"}


@pytest.mark.parametrize("room", [*ROOMS])
def test_only_programs_change_the_state_of_their_process(room):
    for path in files_of(room):
        found = {match[0] for match in STATE.finditer(path.read_text(encoding="utf-8"))}
        if path.stem == "finetune":
            found.discard("torch.manual_seed")  # within fork_rng, which is tested
        assert not found or path.stem in PROGRAMS, (path, found)


def test_the_table_of_rules_names_only_tests_that_exist():
    spec = ROOT / "tests" / "spec"
    names = set()
    for path in spec.glob("test_*.py"):
        names |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    table = (spec / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", table)) <= names
