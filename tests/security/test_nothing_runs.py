"""Each loader is given a file that would run code. It says what is wrong with it, and nothing has run."""

import ast
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vaelab
from vaelab import compositions, weights
from vaelab.data import datasets, readers
from vaelab.errors import DataError, RunError, UsageError
from vaelab.evaluation import compare
from vaelab.registry import build, to_spec
from vaelab.run import Run

# --- pickles ---


def torch_pickle(payload) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": payload}, stream)
    return stream.getvalue()


PICKLES = {
    "pickle": pickle.dumps,
    "the oldest pickle": lambda payload: pickle.dumps(payload, protocol=0),
    "torch.save": torch_pickle,
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.jsonl", "evaluation.npz"])
def test_a_pickle_under_the_name_of_any_file_of_a_run(run, marker, payload, kind, name):
    content = PICKLES[kind](payload)
    (run.path / name).write_bytes(content)
    with pytest.raises(RunError) as caught:
        opened = Run.open(run.path)
        opened.history()
        compare.load(opened)
        opened.model()
    assert str(run.path) in str(caught.value)
    assert not marker.exists()
    if kind == "torch.save":
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert marker.exists()  # the payload does work


def test_a_pickle_in_a_data_set(tmp_path, marker, payload):
    objects = np.empty(1, object)
    objects[0] = payload
    np.savez(tmp_path / "d.npz", images=objects)
    (tmp_path / "e.npz").write_bytes(pickle.dumps(payload))
    for name in ("d.npz", "e.npz"):
        with pytest.raises(DataError):
            datasets.load(str(tmp_path / name))
    assert not marker.exists()


def test_a_pickle_in_an_evaluation(run, marker, payload):
    objects = np.empty(1, object)
    objects[0] = payload
    for arrays in ({"described": objects}, {"described": np.array("{}"), "elbo": objects}):
        np.savez(run.path / "evaluation.npz", **arrays)
        with pytest.raises(RunError, match=r"evaluation\.npz"):
            compare.load(run)
    assert not marker.exists()


# --- text that other readers would run ---


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch {0}']",
    "__import__('pathlib').Path('{0}').touch()",
    '{{"format": 1, "model": !!python/object/apply:pathlib.Path.touch ["{0}"]}}',
])  # fmt: skip
def test_yaml_or_python_in_place_of_json(run, marker, text):
    run.config.write_text(text.format(marker))
    with pytest.raises(RunError, match=r"config\.json"):
        Run.open(run.path)
    assert not marker.exists()


@pytest.mark.parametrize("text", [
    "__import__('pathlib').Path('{0}').touch()",
    "ELBO(beta=__import__('pathlib').Path('{0}').touch())",
    "ELBO(beta=[].__class__)",
    "(lambda: 0)()",
])  # fmt: skip
def test_an_expression_on_the_command_line_is_read_and_not_run(marker, text):
    with pytest.raises(UsageError):
        compositions.parse(text.format(marker), "objectives")
    assert not marker.exists()


# --- class paths ---

MODULE = """
import pathlib
import subprocess
from dataclasses import dataclass
from torch import nn
from torch.nn import Identity

pathlib.Path({marker!r}).touch()

@dataclass
class Plain:
    x: int = 0

class Net(nn.Module):
    pass
"""


@pytest.fixture
def module(run, marker, monkeypatch):
    """A module inside the run folder, importable since somebody stands in that folder; importing it makes the marker."""
    (run.path / "hostile_networks.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.chdir(run.path)
    monkeypatch.syspath_prepend("")
    yield "hostile_networks"
    sys.modules.pop("hostile_networks", None)


PATHS = [
    "hostile_networks:Net", "hostile_networks:Plain", "os:system", "posix:system", "subprocess:Popen", "builtins:exec",
    "pathlib:Path", "runpy:run_path", "torch:load", "torch.nn:Module", "torch.distributed.nn:RemoteModule",
    "vaelab:..hostile_networks:Net", "vaelab.run:subprocess.Popen", "vaelab.meter:Progress", "..hostile_networks:Net",
    "hostile_networks", "os.system", "VAE:Net", ":", "::", "vaelab.nn.mlp:MLP.__init__.__globals__",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trusted", ["", "numpy", "hostile", "hostile_networks.deeper,hostile_networks:Other"])
def test_a_run_that_names_a_class_imports_nothing(run, marker, module, change, monkeypatch, path, trusted):
    monkeypatch.setenv("VAELAB_TRUST", trusted)
    change(lambda document: document["model"].update(encoder={"class": path, "args": f"touch {marker}"}))
    before = set(sys.modules)
    with pytest.raises(RunError) as caught:
        Run.open(run.path).model()
    assert str(run.config) in str(caught.value)
    assert not marker.exists() and module not in set(sys.modules) - before


@pytest.mark.parametrize("trusted", ["hostile_networks", " json , hostile_networks ", "hostile_networks:Net"])
def test_a_class_is_imported_where_its_package_is_trusted(marker, module, monkeypatch, trusted):
    monkeypatch.setenv("VAELAB_TRUST", trusted)
    assert type(build({"class": f"{module}:Net"})).__name__ == "Net"
    assert marker.exists()


def test_trust_may_be_given_in_the_call(marker, module, monkeypatch):
    monkeypatch.delenv("VAELAB_TRUST", raising=False)
    with pytest.raises(RunError, match="VAELAB_TRUST='hostile_networks'"):
        build({"class": f"{module}:Net"})
    assert not marker.exists()
    assert type(build({"class": f"{module}:Net"}, trust=[module])).__name__ == "Net"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("Identity", r"defined in 'torch\.nn\.modules\.linear', which is not trusted"), ("nn.Identity", "not a class"),
     ("subprocess.Popen", "not a class"), ("pathlib.Path", "not a class"), ("Net.forward", "cannot import.*it has no forward"),
     ("nn", "not a class"), ("missing", "cannot import")],
)  # fmt: skip
def test_trust_in_a_package_is_no_trust_in_what_it_imports(module, path, reason):
    with pytest.raises(RunError, match=reason):
        build({"class": f"{module}:{path}"}, trust=[module])


def test_a_class_that_this_process_has_written_needs_no_trust(module, marker, monkeypatch):
    """Training with one's own network: it is loaded already, and it is the user's."""
    monkeypatch.delenv("VAELAB_TRUST", raising=False)
    import importlib

    own = importlib.import_module(module)
    with pytest.raises(RunError, match="would run somebody's code"):
        build({"class": f"{module}:Plain"})  # loaded, but never written
    assert type(build(to_spec(own.Plain(3)))) is own.Plain


# --- pictures ---


def test_a_picture_that_is_a_program_is_not_given_to_ghostscript(tmp_path, marker, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\ntouch "{marker}"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    from PIL import EpsImagePlugin, Image

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    picture = tmp_path / "x.png"
    picture.write_text(text)
    with pytest.raises(DataError, match=r"x\.png: not a readable image"):
        readers.read_images([picture])
    assert not marker.exists()
    with pytest.raises(OSError), Image.open(picture) as image:
        image.load()
    assert marker.exists()  # Pillow alone would have run it


# --- the sources ---

CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "os.execv", "shutil.unpack_archive"}
METHODS = {"extractall", "extract", "load_module", "run_path", "run_module"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "runpy"}
IMPORTERS = {
    "registry.py",
    "flows.py",
    "graph.py",
    "__init__.py",
}  # after trust; zuko, onnx and our own by their names


def faults(source: str, name: str) -> list[str]:
    """What a source does that could run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [one for one in names if one.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        method = node.func.attr if isinstance(node.func, ast.Attribute) else function
        if function in CALLS or method in METHODS:
            found.append(function)
        if method == "import_module" and name not in IMPORTERS:
            found.append(ast.unparse(node))
        if function == "torch.load" and keywords.get("weights_only") != "True":
            found.append(ast.unparse(node))
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            found.append(ast.unparse(node))
    return found


SOURCES = sorted(Path(vaelab.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_no_source_unpickles_evaluates_or_extracts(path):
    assert faults(path.read_text(encoding="utf-8"), path.name) == []


@pytest.mark.parametrize("line", [
    "import pickle", "from joblib import load", "torch.load(path)", "torch.load(path, weights_only=False)", "eval(text)",
    "numpy.load(path, allow_pickle=True)", "archive.extractall(folder)", "subprocess.run(line, shell=True)",
    "os.system(line)", "importlib.import_module(name)",
])  # fmt: skip
def test_the_guard_over_the_sources_sees_each_of_them(line):
    assert faults(line, "x.py")


def test_weights_are_read_by_no_name(run, marker, payload):
    """What decides is the content: neither a pickle called .safetensors nor weights of another name are special."""
    hidden = run.path / "model.safetensors"
    hidden.write_bytes(pickle.dumps(payload))
    with pytest.raises(RunError, match=r"model\.safetensors"):
        weights.load_weights(hidden)
    assert not marker.exists()


def test_records_of_a_run_are_data(run, marker):
    line = json.dumps({"epoch": f"__import__('pathlib').Path('{marker}').touch()"})
    (run.path / "metrics.jsonl").write_text(line + "\n")
    assert run.history() == [json.loads(line)] and not marker.exists()
