"""The layout of the package, read from its source: order of imports, sizes, public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import tsqlora

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tsqlora"

# Each module imports only modules that stand before it.
ORDER = [
    "errors", "progress", "schema", "conflicts", "config", "artefacts", "seals", "interruption",
    "claims",
    "processes", "checkpoints", "columns", "mapped", "table_files", "sources", "data", "chats",
    "labels", "looking", "losses", "quantized", "batches", "memory", "trials", "heads", "loading",
    "encoding", "encoded", "base_task", "tasks", "generation", "metrics",
    "hooks", "targets", "lora_layers", "factors", "experts",
    "step_progress", "global_batches", "adaptation", "per_sample_grads", "recording",
    "lookahead",
    "credibility", "pairs", "convergence", "calibration",
    "measurements", "quality", "selection", "reported", "mismatch",
    "shingles", "duplicates",
    "measuring", "fitting", "parts", "null", "asking", "collected",
    "scoring", "undisturbed", "samples",
    "trusted", "judging", "suspicion", "rare_classes", "early_learning", "visits",
    "online",
    "estimators", "sensitivity",
    "rank_rules", "allocation", "zero", "sharded", "optimizer_state", "adapter", "directions",
    "merging",
    "export", "pasting", "initial", "observing", "dynamic_rank", "callback",
    "run_folder", "zero_settings", "training", "two_parts", "starting", "cost", "online_training",
    "inputs", "preflight",
    "model_card", "finished", "baseline",
    "figures", "charts", "packed", "report_ranks", "row_texts", "report_texts", "report_table",
    "report_samples", "report", "pipeline", "ranked", "cleaned",
    "packaged", "lengths", "seeing", "first_config", "score_only", "demo_data", "demo",
    "arguments", "completion", "endings", "cli", "__main__",
]  # fmt: skip

PUBLIC = {
    "score_samples", "select_samples", "QualitySampler", "layer_sensitivity", "allocate_ranks",
    "lora_config", "DynamicRank", "DynamicRankCallback", "export_adapter", "write_report", "train",
    "RunConfig", "QualityScores", "LayerSensitivity", "RankPlan", "TsqloraError",
    "start_from_gradient",
}  # fmt: skip

FILE_LINES, FUNCTION_LINES = 350, 60
FILE_BYTES, EVIDENCE_BYTES = 150_000, 700_000
"""The second for benchmarks/results/evidence.jsonl: half a kB for each of 1,100 cells."""

modules = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")
each_module = pytest.mark.parametrize("module", modules)


def tree(module: str) -> ast.Module:
    return ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """Dotted names of all that a module imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    parts = [name.split(".") for name in imported(module)]
    return {name[1] for name in parts if name[0] == "tsqlora" and name[1] in modules}


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(modules) <= set(ORDER), "add the new module to ORDER, below all that it imports"


def test_the_tree_in_the_readme_is_the_order() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^  (\w+)\.py +\S", readme, re.MULTILINE)
    assert listed == ORDER


@each_module
def test_a_module_imports_only_modules_above_it(module: str) -> None:
    below = own_imports(module) - set(ORDER[: ORDER.index(module)])
    assert not below, f"{module}.py imports {sorted(below)}, which stand at or below it"


@each_module
def test_only_declared_dependencies_are_imported(module: str) -> None:
    declared = {normalised(re.split(r"[^\w.-]", line)[0]) for line in dependencies()}
    tops = {name.split(".")[0] for name in imported(module)} - sys.stdlib_module_names
    distributions = packages_distributions()
    for top in tops - {"tsqlora"}:
        providers = {normalised(name) for name in distributions.get(top, [top])}
        assert providers & declared, f"{module}.py imports {top}, which pyproject.toml leaves out"


def dependencies() -> list[str]:
    """All that pyproject.toml declares, the extras' too."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    return sum(project["optional-dependencies"].values(), project["dependencies"])


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@each_module
def test_files_and_functions_stay_short(module: str) -> None:
    lines = (SOURCE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= FILE_LINES, f"{module}.py has {lines} lines"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{module}.{node.name} has {length} lines"


def tracked() -> list[Path]:
    root = SOURCE.parents[1]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [root / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.exists()]


def test_no_tracked_file_is_data_or_a_model() -> None:
    sizes = {file.name: file.stat().st_size for file in tracked()}
    assert sizes.pop("evidence.jsonl", 0) <= EVIDENCE_BYTES
    assert max(sizes.values()) <= FILE_BYTES, max(sizes, key=sizes.__getitem__)


def test_no_tracked_file_holds_both_sides_of_a_conflict() -> None:
    marks = re.compile(rb"^(<{7}|>{7}) ", re.MULTILINE)
    assert not [file.name for file in tracked() if marks.search(file.read_bytes())]


def test_the_light_modules_import_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, tsqlora, tsqlora.errors, tsqlora.config, tsqlora.allocation;"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, f"imported at once: {done.stderr}"


def test_the_public_names_are_those_of_the_design() -> None:
    assert set(tsqlora.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert (getattr(tsqlora, name).__doc__ or "").strip()
