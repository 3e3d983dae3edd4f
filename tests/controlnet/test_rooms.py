"""Imports between the folders and root modules of controlnet/ (its rooms) run one way.

`python -m tests.controlnet.test_rooms [FOLDER]` prints the rooms of a checkout by floor.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The list of commands, and names that forward to rooms: no room may read them.
FORWARDING = {"__init__", "__main__", "moved"}
MOST_ROOMS, MOST_FLOORS, MOST_ARROWS = 16, 6, 40  # a new room, floor or arrow wants a reason


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of controlnet/."""
    files = sorted((root / "controlnet").rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules of controlnet/ that a file imports, wherever in it the import stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {each for each in found if each.startswith("controlnet.")}


def rooms(root: Path) -> dict[str, set[str]]:
    """Room -> the other rooms that it imports."""
    files = modules(root)
    arrows: defaultdict[str, set[str]] = defaultdict(set)
    for name, path in files.items():
        room = name.split(".")[1] if "." in name else "__init__"
        if room not in FORWARDING:
            arrows[room] |= {target.split(".")[1] for target in imports(path, name, set(files))} - {room}
    return dict(arrows)


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The rooms by floor: a room stands one above the highest that it imports. Raises ValueError for a circle."""
    left, found = {room: set(targets) & arrows.keys() for room, targets in arrows.items()}, []
    while left:
        floor = sorted(room for room, targets in left.items() if not targets & left.keys())
        if not floor:
            raise ValueError(f"a circle of imports among the rooms {', '.join(sorted(left))}")
        found.append(floor)
        left = {room: targets for room, targets in left.items() if room not in floor}
    return found


def describe(root: Path) -> str:
    arrows = rooms(root)
    lines = [f"{len(arrows)} rooms, {sum(map(len, arrows.values()))} arrows"]
    try:
        for number, floor in enumerate(floors(arrows)):
            lines += [f"floor {number}: {room} <- {', '.join(sorted(arrows[room])) or '-'}" for room in floor]
    except ValueError as error:
        lines.append(str(error))
    return "\n".join(lines)


def test_imports_between_rooms_run_one_way():
    arrows = rooms(ROOT)
    assert not {target for targets in arrows.values() for target in targets} - arrows.keys(), "a room reads an old name"
    found = floors(arrows)  # no circle: each room stands above all that it imports
    assert len(arrows) <= MOST_ROOMS and len(found) <= MOST_FLOORS, describe(ROOT)
    assert sum(map(len, arrows.values())) <= MOST_ARROWS, describe(ROOT)


def test_a_circle_is_seen(tmp_path):
    package = tmp_path / "controlnet"
    package.mkdir()
    (package / "one.py").write_text("from controlnet import two\n")
    (package / "two.py").write_text("def f():\n    from controlnet.one import g\n")
    assert rooms(tmp_path) == {"one": {"two"}, "two": {"one"}}
    try:
        floors(rooms(tmp_path))
    except ValueError as error:
        assert "one, two" in str(error)
    else:
        raise AssertionError("the circle was not seen")


def test_every_folder_of_modules_is_a_package():
    """A folder that git ignores by its name, as build/, would lack its __init__.py in a clone alone."""
    folders = {path.parent for path in (ROOT / "controlnet").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


if __name__ == "__main__":
    print(describe(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
