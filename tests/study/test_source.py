"""A result's key follows from the code that computes it: what it can reach, found from the source, and no less than what runs."""

import functools
import shutil
import subprocess
import sys
import warnings

import pytest
from test_study import TINY, small_world  # noqa: F401 - the fixture is autouse in a module that imports it

from bmoe_utils.study import anatomy, main_table, source
from bmoe_utils.study.output import Store
from bmoe_utils.study.study import Study


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package of these files (name -> text) and have it taken for the study's."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "bmoe_utils" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(source, "PACKAGE", tmp_path / "bmoe_utils")
        forget()
        return tmp_path / "bmoe_utils"

    yield write
    monkeypatch.undo()
    forget()


def forget():
    """As in a process that has just begun."""
    source.modules.cache_clear()
    source._read.cache_clear()
    source._written.clear()


def version(*roots):
    return source.code_version(source.closure([f"bmoe_utils.{root}" for root in roots]))


def reached(*roots):
    return {name.removeprefix("bmoe_utils.") for name in source.closure([f"bmoe_utils.{root}" for root in roots])}


# ---- the closure ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "found"), [
    ("from . import a", {"a"}),
    ("from . import (a,\n  b)", {"a", "b"}),
    ("from .a import f", {"a"}),
    ("import bmoe_utils.a", {"a"}),
    ("from bmoe_utils import a as other", {"a"}),
    ("from bmoe_utils.deep.c import g", {"deep.c", "a"}),  # whose own import counts
    ("from .deep import c", {"deep.c", "a"}),
    ("def f():\n    from .a import g", {"a"}),
    ("try:\n    from .a import f\nexcept ImportError:\n    pass", {"a"}),
    ("if True:\n    from . import a\nelse:\n    from . import b", {"a", "b"}),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a", set()),
    ("import a, torch.nn\nfrom b import x", set()),  # other libraries of that name
    ("from bmoe_utils import Public", {"a", "b", "deep.c"}),  # a public name may stand for anything
])  # fmt: skip
def test_what_a_module_imports(package, text, found):
    package(__init__="", a="", b="", deep__c="from .. import a", it=text)
    assert reached("it") - {"it", "deep"} - ({"bmoe_utils"} if "Public" in text else set()) == found


def test_modules_that_import_each_other_are_found_once(package):
    package(a="from . import b", b="from . import a, c", c="")
    assert reached("a") == reached("b") == {"a", "b", "c"} and reached("c") == {"c"}


@pytest.mark.parametrize(("text", "same"), [
    ('"""Doubles."""\n\n\ndef f(x):\n    """More words."""\n    return (x * 2)  # why\n', True),
    ("def f(x):\n    return x * 3\n", False),
    ("def f(x):\n    return x * 2\n\n\nLIMIT = 3\n", False),
])  # fmt: skip
def test_an_edit_below_changes_the_key_and_a_comment_does_not(package, text, same):
    package(stage="from . import below", below="def f(x):\n    return x * 2\n", beside="")
    before, beside = version("stage"), version("beside")
    package(below=text)
    assert (version("stage") == before) is same and version("beside") == beside


def test_functions_stand_for_their_modules():
    of = lambda function: set(source.closure([function]))
    own = of(Study.map_folder)
    assert {"bmoe_utils.study.stages.map_model", "bmoe_utils.models.training"} <= own and "bmoe_utils.routers.attach" not in own
    assert of(functools.partial(Study.map_folder, 0)) == own
    assert "bmoe_utils.study.source" in of(forget) and "test_source" in of(forget)  # outside the package: the file it is in
    typed = {"__name__": "a_notebook"}
    exec("f = lambda: 1\ng = lambda: 2", typed)
    f, g = (source.closure([typed[name]]) for name in "fg")
    assert set(source.modules()) <= set(f) and source.code_version(f) != source.code_version(g)


def test_libraries_count_with_their_minor_version(monkeypatch):
    found = source.closure(["bmoe_utils.study.stages.base_model"])
    assert {"python", "torch", "transformers", "peft", "tokenizers"} <= set(source.library_versions(found))
    monkeypatch.setattr(source, "version", lambda name: "9.8.7+cpu")
    assert source.library_versions(found)["torch"] == "9.8"
    assert "torch" not in source.library_versions(source.closure(["bmoe_utils.data.world"]))


def test_an_unknown_module_lists_the_known(package):
    package(train="")
    with pytest.raises(ValueError, match="no module 'bmoe_utils.trian'.*bmoe_utils.train"):
        version("trian")


def test_a_file_that_changes_later_is_told_once_and_the_running_code_stays_the_key(package):
    folder = package(a="x = 1\n")
    before = version("a")
    (folder / "a.py").write_text("x = 22\n")
    with pytest.warns(UserWarning, match="a.py has changed since this process read it.*Restart"):
        assert version("a") == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert version("a") == before
    forget()
    assert version("a") != before


# ---- of the study ---------------------------------------------------------------------------------------------------
STAGES = ("data", "base_model", "map_model", "experts", "routers", "joint", "baselines")
EDITS = [  # file, what stands there, what instead, the stages that rest on it
    ("study/stages/routers.py", "seed * 100_003", "seed * 100_004", {"routers", "joint"}),
    ("study/stages/experts.py", "self.mc_samples, captured", "2, captured", {"experts", "joint"}),
    ("study/stages/map_model.py", "lr=self.lr", "lr=1.0", set(STAGES) - {"data", "base_model"}),
    ("scores/predictions.py", "metrics.softmax(logits)", "logits", set(STAGES) - {"data", "base_model"}),
    ("routers/rules.py", "class Rule", "class Rules", {"routers", "joint"}),
    ("data/world.py", "def build_splits", "def splits", set(STAGES)),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "stages"), EDITS, ids=[edit[0] for edit in EDITS])
def test_an_edit_changes_the_keys_of_the_stages_that_rest_on_it(root, package, tmp_path, file, old, new, stages):
    shutil.copytree(root / "bmoe_utils", tmp_path / "bmoe_utils", ignore=shutil.ignore_patterns("__pycache__"))
    package()
    before = {stage: version(f"study.stages.{stage}") for stage in STAGES}
    path = tmp_path / "bmoe_utils" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    forget()
    assert {stage for stage in STAGES if version(f"study.stages.{stage}") != before[stage]} == stages


def everything(study):
    """One artefact of every kind that the study has."""
    study.base_predictions()
    study.map_checkpoints(0)
    study.temperature_predictions(0)
    study.laplace_predictions(0)
    study.validation_curve(0)
    study.laplace_predictions(0, tune="val_nll", granularity="global", prior_mean="pretrained", hessian_structure="ekfac", rank=3)
    study.covariances(0, 1.0, "joint")
    for method in ("laplace", "swag"):
        study.router_predictions(0, method)
    study.stability(0, 0.01, "mfvr")
    study.noisy_predictions(0, 0.01, "router")
    study.joint_predictions(0, tune="joint")
    lora = study.regime("lora")
    lora.router_predictions(0, "vtsr", inference="whole-model")
    for name in ("ensemble", "expert_dropout", "mc_dropout", "swag", "last_layer_laplace", "laplace_lora", "blob", "tfb"):
        lora.baseline_predictions(0, name)
    main_table.confined_predictions(study, 0, 0.5)
    anatomy.kernels(study, 0)
    anatomy.mode_curves(study, 0, [anatomy.EXPERTS], [1.0])
    anatomy.variant(study, 0, smoothing=0.1)


# Settings and their names, which are in an artefact's config and not in its code.
SETTINGS = {"study.study", "study.profiles"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_code_runs_that_is_not_in_the_key(tmp_path, monkeypatch):
    """Every function of the package that runs while an artefact is computed is in a module of its key."""
    names = {str(path): name for name, path in source.modules().items()}
    building, ran, keys = [], {"looked up": set()}, {}
    folder = Store.folder

    def count(frame, event, _):
        if event == "call" and building and (name := names.get(frame.f_code.co_filename)):
            ran[building[-1]].add(name)

    def spied(self, kind, config, build, *, code=(), fresh=False):
        @functools.wraps(build)
        def watched(path):
            ran[path.name], keys[path.name] = set(), set(source.closure((Store.folder, build, *code)))
            building.append(path.name)
            try:
                build(path)
            finally:
                building.pop()

        building.append("looked up")
        try:
            return folder(self, kind, config, watched, code=code, fresh=fresh)
        finally:
            building.pop()

    monkeypatch.setattr(Store, "folder", spied)
    tiny = TINY | {"router_epochs": 1, "router_items": 12, "noise_items": 6, "router_validation": 6, "members": 2, "mc_samples": 4,
                   "exact_fit": 6, "exact_items": 4, "dense_fit": 6, "dense_items": 4, "router_precisions": [0.1, 10.0],
                   "router_passes": 2, "validation_passes": 2, "router_samples": 2}  # fmt: skip
    study = Study("smoke", overrides=tiny, store=Store(tmp_path))
    sys.setprofile(count)
    try:
        everything(study)
    finally:
        sys.setprofile(None)
    kinds = {name.removeprefix(".building-").partition("-")[0] for name in keys}
    assert {"base", "map", "laplace", "prior", "routers", "predictions", "covariance", "stability", "joint_grid", "joint_logits",
            "baseline", "kernels", "mode", "variant", "validation_curve", "map_routers"} <= kinds  # fmt: skip
    for name, mine in keys.items():
        assert not {m.removeprefix("bmoe_utils.") for m in ran[name] - mine} - SETTINGS, name


# ---- the process ----------------------------------------------------------------------------------------------------
PROCESS = """
import gc, random, warnings
import numpy, torch
import transformers.utils.logging as logging

def state():
    return dict(random=random.getstate(), numpy=numpy.random.get_state()[1].tolist(), torch=torch.get_rng_state().tolist(),
                threads=torch.get_num_threads(), frozen=gc.get_freeze_count(), collector=gc.get_threshold(),
                bars=logging.is_progress_bar_enabled(), dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled())

def told(what, before):
    print(what, *sorted(key for key, value in state().items() if value != before[key]))

torch.set_num_threads(2)
before = state()
import bmoe_utils as bm
for name in bm.__all__:
    getattr(bm, name)
told("import:", before)
before, filters = state(), list(warnings.filters)
study = bm.Study("smoke")
study.task, study.regime("lora")
assert warnings.filters == filters
bm.Study("gpu").claim_process()
told("study:", before)
study.claim_process()
told("claimed:", before)
"""


def test_the_process_is_changed_where_that_is_asked_for_by_name_alone():
    said = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["import:", "study:", "claimed: bars collector frozen threads"]
