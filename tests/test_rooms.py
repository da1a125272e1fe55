"""The package's rooms: a module imports from its own room and those before it, and no two modules need each other."""

from graphlib import TopologicalSorter

from bmoe_utils.study import source

ROOMS = ("", "data", "models", "scores", "experts", "routers", "joint", "baselines", "study")  # "": what stands in no room


def imports():
    """Module -> the modules that it imports, in functions too; not what is for type checkers alone, nor the folders' docstrings."""
    files = {name: path for name, path in source.modules().items() if path.stem not in ("__init__", "__main__") or name.endswith(".plots")}
    return {name: {other for other in source._read(path).modules if other in files and other != name} for name, path in files.items()}


def room(module):
    return ROOMS.index(".".join(module.split(".")[1:2]) if module.count(".") > 1 else "")


def test_imports_go_down_only():
    upward = [f"{name} imports {other}" for name, found in imports().items() for other in found if room(other) > room(name)]
    assert not upward and {room(name) for name in imports()} == set(range(len(ROOMS)))


def test_no_two_modules_need_each_other():
    assert len(list(TopologicalSorter(imports()).static_order())) == len(imports())


def test_the_folders_themselves_import_nothing():
    found = {name: source._read(path) for name, path in source.modules().items() if path.stem == "__init__" and not name.endswith(".plots")}
    assert len(found) == len(ROOMS) + 2 and not any(s.modules or s.libraries for name, s in found.items() if name != "bmoe_utils")
