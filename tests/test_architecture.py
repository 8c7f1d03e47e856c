"""The layout of the source: who imports whom, what travels with a checkpoint, and that deviations are documented."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from metatokens.graft.bundle import ENTRY, flat_code, flat_name
from metatokens.model.export import AUTO_MAP, REMOTE_CODE

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "metatokens"
METHOD = ROOT / "docs" / "method.md"
MODULES = sorted(SOURCE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "common", "helpers"}

# a part may import itself and the parts of lower or equal stage, those of equal stage without a cycle
STAGES = (
    {"config", "presets", "storage"},
    {"data", "tasks", "model"},
    {"baselines", "graft"},
    {"lens"},
    {"training", "generation", "evaluation", "analysis"},
    {"report"},
    {"bench", "demo", "language_model", "sweep", "verification"},
    {"replication"},
    {"cli", "__main__"},
)
STAGE_OF = {part: stage for stage, parts in enumerate(STAGES) for part in parts}
EVERYWHERE = {"errors", "names", "registration"}
# inside of analysis likewise; but those of equal stage never import one another
ANALYSIS_STAGES = (
    {"inputs", "results"},
    {"measures"},
    {"attention", "representations", "compression", "causal", "graft"},
    {"claims", "kept", "token_view"},
    {"run"},
)
MODEL_MAY_IMPORT = {"torch", "transformers", "huggingface_hub"}
GRAFT_MAY_IMPORT = MODEL_MAY_IMPORT | {"safetensors"}


def part_of(path: Path) -> str:
    """Return the folder or top-level module of the package that a file belongs to."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def module_of(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(("metatokens", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the absolute name of every module that a file imports, at the top or inside a function."""
    package = ("metatokens", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*start, *(node.module.split(".") if node.module else ())))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_parts(path: Path) -> set[str]:
    """Return the parts of the package that a file imports."""
    inside = (name.split(".")[1:] for name in imported_modules(path) if name.split(".")[0] == "metatokens")
    return {names[0] if names and (names[0] in STAGE_OF or names[0] in EVERYWHERE) else "" for names in inside}


def test_every_part_of_the_package_has_a_stage() -> None:
    assert {part_of(path) for path in MODULES} - {""} <= STAGE_OF.keys() | EVERYWHERE


def test_imports_point_one_way() -> None:
    backwards = {
        (module_of(path), other)
        for path in MODULES
        if (part := part_of(path)) != ""
        for other in imported_parts(path) - {part} - EVERYWHERE
        # errors and registration import nothing; "" is the package itself, which is for its users alone
        if other == "" or STAGE_OF[other] > STAGE_OF.get(part, -1)
    }
    assert backwards == set()


def test_rooms_of_the_analysis_import_downwards_and_never_each_other() -> None:
    stage_of = {room: stage for stage, rooms in enumerate(ANALYSIS_STAGES) for room in rooms}
    backwards = set()
    for path in (SOURCE / "analysis").rglob("*.py"):
        inside = {name.split(".")[2] for name in imported_modules(path) if name.startswith("metatokens.analysis.")}
        for room in module_of(path).split(".")[2:3]:  # the folder itself is no room
            backwards |= {(module_of(path), other) for other in inside - {room} if stage_of[other] >= stage_of[room]}
    assert backwards == set()


def test_parts_import_one_another_without_a_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        if part_of(path) not in EVERYWHERE | {""}:
            graph.setdefault(part_of(path), set()).update(imported_parts(path) - {part_of(path)} - EVERYWHERE)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_model_imports_only_torch_transformers_and_itself_as_one_flat_folder() -> None:
    allowed = MODEL_MAY_IMPORT | sys.stdlib_module_names
    refused = set()
    for path in (SOURCE / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                refused |= {(path.name, alias.name) for alias in node.names if alias.name.split(".")[0] not in allowed}
            elif isinstance(node, ast.ImportFrom):
                is_fine = node.level == 1 or (node.level == 0 and str(node.module).split(".")[0] in allowed)
                refused |= set() if is_fine else {(path.name, "." * node.level + str(node.module))}
    assert refused == set()


def test_only_one_file_knows_the_inside_of_transformers() -> None:
    # a name of `import transformers` stays where it is; CONTRIBUTING.md, "A new release of transformers"
    knowing = {
        module_of(path)
        for path in MODULES
        for name in imported_modules(path)
        if name.startswith("transformers.") and name.count(".") > 1
    }
    assert knowing == {"metatokens.model.compatibility"}


def test_code_that_travels_with_a_checkpoint_is_all_that_it_reaches() -> None:
    reached: set[str] = set()
    waiting = [reference.split(".")[0] for reference in AUTO_MAP.values()]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            beside = (
                module.split(".")[2]
                for module in imported_modules(SOURCE / "model" / f"{name}.py")
                if module.startswith("metatokens.model.")
            )
            waiting.extend(beside)
    assert reached == set(REMOTE_CODE)


def test_code_that_travels_with_a_graft_imports_the_libraries_and_itself_as_one_flat_folder() -> None:
    code = flat_code()
    allowed = GRAFT_MAY_IMPORT | sys.stdlib_module_names
    reached = {f"{flat_name(ENTRY)}.py"}
    for name, text in code.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, name
                reached.add(f"{node.module}.py")
    assert reached == code.keys()


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert {path.stem for path in MODULES} & FORBIDDEN_NAMES == set()


def test_test_files_have_names_of_their_own() -> None:
    # without packages, pytest knows a test file by its name alone
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def deviations(text: str) -> set[str]:
    """Return how each "Deviation: ..." of a text starts: its words up to the first mark of punctuation."""
    text = re.sub(r"\n\s*(#\s*)?", " ", text)
    starts = re.findall(r"Deviation:[\s*_]*([^.,;:]+)", text)
    return {" ".join(start.split()).lower() for start in starts}


def test_every_deviation_tagged_in_the_source_is_documented_and_the_other_way_round() -> None:
    tagged = {start for path in MODULES for start in deviations(path.read_text(encoding="utf-8"))}
    assert tagged
    assert deviations(METHOD.read_text(encoding="utf-8")) == tagged
