"""Who imports whom: the algorithm knows nothing of how a run is made, and the ground floor knows no wing."""

import ast

import pytest

from tests.launching import ROOT

WINGS = {"ppo", "environments", "processes", "run", "fast"}


def wings_imported_by(pattern):
    """For each file the wings that it imports anywhere, in functions, too."""
    found = {}
    for path in sorted((ROOT / "rl").glob(pattern)):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{name.name}" for name in node.names}
        found[path.name] = {part for name in names if name.startswith("rl.") for part in name.split(".")[1:2]} & WINGS
    return found


def test_the_algorithm_imports_no_other_wing():
    found = wings_imported_by("ppo/*.py")
    assert "loss.py" in found
    assert {name: wings for name, wings in found.items() if not wings <= {"ppo"}} == {}


@pytest.mark.parametrize("room", ["voice", "seeding", "spaces"])
def test_a_room_on_the_ground_floor_imports_no_wing(room):
    assert wings_imported_by(f"{room}.py") == {f"{room}.py": set()}


def test_imports_are_seen_wherever_they_stand():
    assert {"environments", "ppo", "processes"} <= wings_imported_by("run/run.py")["run.py"]
    assert "run" in wings_imported_by("run/command_line.py")["command_line.py"]
