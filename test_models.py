"""Every test. The design card's four properties come first; then the models, data, evaluation,
lifting and training. `pytest` runs all but the long forms (-m slow) and those on a GPU (-m gpu)."""
import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import html
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if not any(re.fullmatch("(-m)?gpu.*", word) for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests marked gpu run by themselves: pytest -m gpu

import data  # before torch: it bounds how long OpenMP's threads spin

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import glagcn
import gridconv
import train
from data import SKELETONS, FrameStore, InputError, Sequence
from eval import (
    build_model, lift, lift_command, load_model, mpjpe, mpjve, n_mpjpe, one_euro, p_mpjpe,
    pick_device, predict, prepare, read_keypoints, report, root_trajectory, score)

HERE = Path(data.__file__).parent
H17 = SKELETONS["h36m17"]
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=40, database=None)
settings.register_profile("desk", deadline=None, max_examples=40)
settings.load_profile("fixed" if "CI" in os.environ else "desk")


# ---- models

def shake(module, seed=0, dtype=None):
    """The module for evaluation, something random added to every weight and running statistic."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.to(dtype).state_dict().items():
        if tensor.is_floating_point() and not name.endswith("fixed_assignment"):
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator).to(tensor))
    return module.eval()


def tiny_recipe(**fields):
    """A recipe on procedural motion that trains in a second."""
    import train
    base = dict(name="tiny", data="synthetic", layout="handcrafted", hidden=4, blocks=1,
                dropout=0.1, loss="mpjpe", lr=3e-3, schedule="cosine-smooth", epochs=0.02, batch=64)
    return train.Recipe(**{**base, **fields})


TINY_GLA = dict(method="glagcn", normalise="width", filter_widths=(3,), channels=4, batch=32,
                optimizer="ranger", epochs=0.005, flips=True, norm_schedule=True)


def recipe_of(**fields):
    """The fields of a recipe that data.py reads."""
    base = dict(data="h36m", keypoints="gt", skeleton="h36m17", skip="", actions=("Walk", "Jog"),
                weights="", normalise="release-500", target="camera", cameras="recorded", noise=0.0,
                missing=0.0, swap_sides=False)
    return SimpleNamespace(**{**base, **fields})


@pytest.fixture
def run_folder(monkeypatch, tmp_path):
    """An empty folder, and procedural motion cut to short clips: the same generator, less of it."""
    whole = data.synthesize

    def short(seed, **options):
        return whole(seed, **{"frames": 20, **options})
    monkeypatch.setattr(data, "synthesize", short)
    return tmp_path


# ---- commands

PYTHONS_OWN_WORDS = re.compile(
    r"Traceback|has no attribute|not subscriptable|not iterable|unexpected keyword|\[Errno|KeyError"
    r"|positional argument|codec can't|NoneType|invalid literal|could not convert|out of range"
    r"|unhashable|object is not")


def command(program, *words, encoding="utf-8"):
    """(exit status, stdout, stderr) of e.g. command("data.py", "check", folder), in this process.

    `encoding`: of the terminal that it believes to write to.
    """
    module = importlib.import_module(program.removesuffix(".py"))
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", [program, *map(str, words)]):
            try:
                data.run(module.main)
            except SystemExit as stop:
                status = stop.code or 0
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err))


def refused(program, *words, names=()):
    """The one line that a command ends in, with status 2; it is clear and holds `names`."""
    status, _, err = command(program, *words)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, err)
    assert_clear(err, [names] if isinstance(names, str) else names)
    return err


def rejected(names, function, *words, **options):
    """The call is refused in one clear line that holds `names`."""
    with pytest.raises(InputError) as error:
        function(*words, **options)
    assert_clear(error.value, [names] if isinstance(names, str) else names)


def assert_clear(error, names):
    """The message is one line, holds each of `names`, and none of Python's own words."""
    line = str(error).rstrip("\n")
    assert "\n" not in line and len(line) < 2000 and not PYTHONS_OWN_WORDS.search(line), line
    for name in names:
        assert str(name) in line, f"{name!r} is not in {line!r}"


# ---- BVH

def write_bvh(joints, values, newline="\n", space=" ", number="{:.9f}", seconds=0.05):
    """A BVH text from nested [name, offset, channels, children]; a child (x, y, z): an end site."""
    lines = ["HIERARCHY", *bvh_joint(joints, "ROOT", space), "MOTION"]
    lines += [f"Frames:\t{len(values)}", f"Frame Time:{space}{seconds}"]
    lines += [space.join(map(number.format, row)) + " " for row in values]
    return newline.join(lines) + newline


def bvh_joint(joint, word, space):
    """The lines of a joint and all below it."""
    if len(joint) == 3:
        return ["End Site", "{", "OFFSET " + " ".join(map(str, joint)), "}"]
    name, offset, channels, children = joint
    lines = [f"{word} {name}", "{", f"OFFSET{space}" + space.join(map(str, offset))]
    lines.append(space.join(["CHANNELS", str(len(channels)), *channels]))
    for child in children:
        lines += ["\t" + line for line in bvh_joint(child, "JOINT", space)]
    return [*lines, "}"]


def bandai_names():
    """Bandai-Namco's name of each of our joints, and of the collars."""
    names = {"pelvis": "Hips", "spine": "Chest", "thorax": "Neck", "neck": "Head"}
    limbs = {"collar": "Shoulder", "hip": "UpperLeg", "knee": "LowerLeg", "ankle": "Foot"}
    limbs |= {"shoulder": "UpperArm", "elbow": "LowerArm", "wrist": "Hand"}
    for side in ("left", "right"):
        names |= {f"{side}_{ours}": f"{theirs}_{side[0].upper()}" for ours, theirs in limbs.items()}
    return names


def person(names, seed=0, frames=6, leg=40.0, end=(0, 12, 0)):
    """A BVH person, y up, that walks off: (skeleton, values). `names`: ours -> theirs."""
    turns = ["Zrotation", "Xrotation", "Yrotation"]

    def limb(side, parts, start, bone):
        first, second, third = (names.get(f"{side}_{part}") for part in parts)
        return [first, start, turns, [[second, bone, turns, [[third, bone, turns, [(0, -5, 3)]]]]]]
    arms, legs = [], []
    for side, x in (("left", 1), ("right", -1)):
        arm = limb(side, ("shoulder", "elbow", "wrist"), (15 * x, 2, 0), (25 * x, 0, 0))
        arms.append([names.get(f"{side}_collar"), (5 * x, 6, 0), turns, [arm]])
        legs.append(limb(side, ("hip", "knee", "ankle"), (10 * x, -5, 0), (0, -leg, 1)))
    neck = [names.get("neck"), (0, 10, 2), turns, [end]]
    thorax = [names.get("thorax"), (0, 18, 0), turns, [neck]]
    trunk = [names.get("spine"), (0, 25, 0), turns, [*arms, thorax]]
    places = ["Xposition", "Yposition", "Zposition"]
    values = np.random.default_rng(seed).uniform(-20, 20, (frames, 6 + 3 * 17))
    values[:, 0] += np.linspace(0, 900, frames)
    values[:, 1] += 90
    return [names.get("pelvis"), (0, 0, 0), [*places, *turns], [trunk, *legs]], values


@pytest.fixture(scope="session")
def bvh_folder(tmp_path_factory):
    """Eight clips of 5 to 12 frames, named as Bandai-Namco's."""
    folder = tmp_path_factory.mktemp("clips")
    clips = "walk_normal bow_old run-fast_normal walk_old bow_shy walk_shy bye_shy bye_tired"
    for i, clip in enumerate(clips.split()):
        text = write_bvh(*person(bandai_names(), seed=i, frames=5 + i))
        (folder / f"dataset-1_{clip}_001.bvh").write_text(text)
    return folder


# ---- datasets

ACTIONS = ("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing",
           "Purchases", "Sitting", "SittingDown", "Smoking", "Waiting", "WalkDog", "WalkTogether",
           "Walking")
META = {"layout_name": "h36m", "num_joints": 17,
        "keypoints_symmetry": [list(H17.left), list(H17.right)]}


def write_objects(path, numpy1=False, protocol=4, **values):
    """An npz of 0-d object arrays; `numpy1`: with the module paths of NumPy 1 (protocol 2, 3)."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in values.items():
            body = pickle.dumps(np.array(value, dtype=object), protocol)
            if numpy1:
                body = body.replace(b"numpy._core.", b"numpy.core.")
            archive.writestr(key + ".npy", npy_header((), "|O") + body)


def npy_header(shape, descr="<f4"):
    """The header of an npy file."""
    head, fields = io.BytesIO(), {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()


def views_of(space, joints=17, extra=0, confidence=True):
    """{subject: {action: [each camera's 2D (T + extra, J, 3)]}} of Human3.6M's 32 joints."""
    image = {subject: {} for subject in space}
    for subject, actions in space.items():
        for action, world in actions.items():
            pose = world[:, data.H36M_17_OF_32] if joints == 17 else world
            pose = np.concatenate([pose, pose[:1].repeat(extra, 0)])
            rig = zip(data.H36M_EXTRINSICS[subject], data.H36M_INTRINSICS)
            views = [data.project(data.world_to_camera(pose, e), k) for e, k in rig]
            pad = [(0, 0), (0, 0), (0, int(confidence))]
            image[subject][action] = [np.pad(view, pad).astype(np.float32) for view in views]
    return image


def h36m_space(rng, takes, frames):
    """{subject: {action: world (frames, 32, 3)}}: procedural motion under Human3.6M's names."""
    space = {subject: {} for subject in data.H36M_EXTRINSICS}
    clips = data.synthesize(3, takes=-(-len(takes) // len(data.MOTIONS)), frames=frames)
    for s in clips:
        if s.camera == data.H36M_CAMERAS[0] and len(space[s.subject]) < len(takes):
            points = s.pose_3d + s.root[:, None].astype(float)
            wide = rng.normal(0, 0.3, (frames, 32, 3))  # the joints that the 17 leave out
            extrinsics = data.H36M_EXTRINSICS[s.subject][0]
            wide[:, data.H36M_17_OF_32] = data.camera_to_world(points, extrinsics)
            space[s.subject][takes[len(space[s.subject])]] = wide.astype(np.float32)
    return space


def raw_3dhp(rng, frames, joints=17):
    """A view in P-STMO's layout: random people three metres away."""
    points = rng.normal(0, 300, (frames, joints, 3)) + [0, 0, 3000]
    return {"data_3d": points, "data_2d": rng.uniform(0, 1900, (frames, joints, 2))}


@pytest.fixture(scope="session")
def everything(tmp_path_factory, bvh_folder):
    """(folder, raw values): every dataset in miniature, all of Human3.6M's 836 sequences."""
    folder, rng = tmp_path_factory.mktemp("everything"), np.random.default_rng(0)
    space = h36m_space(rng, [f"{action}{ending}" for action in ACTIONS for ending in ("", " 1")], 5)
    gt, noisy = views_of(space, confidence=False), views_of(space, extra=2)
    for view in (v for actions in noisy.values() for views in actions.values() for v in views):
        view[..., :2] += rng.normal(0, 3, view[..., :2].shape)
    write_objects(folder / "data_3d_h36m.npz", positions_3d=space)
    for kind, views in (("gt", gt), ("hrnet", noisy), ("cpn_ft_h36m_dbb", noisy)):
        path = folder / f"data_2d_h36m_{kind}.npz"
        write_objects(path, True, 2, positions_2d=views, metadata=META)
    chunks = {"Walking 1 chunk0": 3, "Walking 1 chunk1": 5, "Jog 1 chunk2": 4, "Box 1 chunk0": 2}

    def humaneva(make):
        return {f"{part}/S{i}": {action: make(n) for action, n in chunks.items()}
                for part in ("Train", "Validate") for i in (1, 2, 3)}
    eva = humaneva(lambda n: rng.normal(0, 0.4, (n, 15, 3)).astype(np.float32))
    eva_2d = humaneva(lambda n: [rng.uniform(0, 480, (n, 15, 2)) for _ in range(3)])
    eva_coco = humaneva(lambda n: [rng.uniform(0, 480, (n, 17, 3)) for _ in range(3)])
    write_objects(folder / "data_3d_humaneva15.npz", positions_3d=eva)
    write_objects(folder / "data_2d_humaneva15_gt.npz", positions_2d=eva_2d)
    write_objects(folder / "data_2d_humaneva15_detectron_pt_coco.npz", positions_2d=eva_coco)
    train_3dhp = {f"S{i} Seq{j}": [{camera: raw_3dhp(rng, 2) for camera in "01245678"}, 25]
                  for i in range(1, 9) for j in (1, 2)}
    test_3dhp = {f"TS{i}": raw_3dhp(rng, 6) for i in range(1, 7)}
    for i, view in enumerate(test_3dhp.values()):
        view["valid"] = rng.integers(0, 2, 6) | (np.arange(6) == i)
    write_objects(folder / "data_train_3dhp.npz", data=train_3dhp)
    write_objects(folder / "data_test_3dhp.npz", data=test_3dhp)
    data.convert_bvh(bvh_folder, folder, "mocap", "old")
    return folder, SimpleNamespace(space=space, gt=gt, noisy=noisy, eva=eva, eva_2d=eva_2d,
                                   eva_coco=eva_coco, train_3dhp=train_3dhp, test_3dhp=test_3dhp)


@pytest.fixture(scope="session")
def synthetic():
    """The embedded default's motion, whole."""
    return data.synthesize(0)


def gridconv_archives(folder, space, subjects, split, how="python2"):
    """GridConv's archives as Python 2 wrote them, or saved again: "legacy" or "zip"; (2D, 3D)."""
    image, points = {}, {}
    sequences = [(s, a, c) for s in subjects for a in space[s] for c in range(4)]
    for subject, action, c in sequences:
        extrinsics, intrinsics = data.H36M_EXTRINSICS[subject][c], data.H36M_INTRINSICS[c]
        view = data.world_to_camera(space[subject][action][:, data.H36M_17_OF_32], extrinsics)
        key = subject, action.split(" ")[0], f"{action}.{data.H36M_CAMERAS[c]}"
        image[key] = data.project(view, intrinsics).reshape(-1, 34)
        fx, fy, cx, cy = intrinsics[:4]
        camera = {"fy": fy, "cx": cx, "fx": fx, "cy": cy} if c != 1 else [fx, fy, cx, cy]
        points[key] = {"pelvis": view[:, 0] * 1000, "camera": camera}
        joints = (view - view[:, :1]).reshape(-1, 51) * 1000
        points[key]["joints_3d" if c else "joint_3d"] = joints
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in (("2d", image), ("3d", points)):
        path = folder / f"{split}_custom_{kind}_unnorm.pth.tar"
        if how == "python2":
            path.write_bytes(legacy_head() + python2(value) + pickle.dumps([], 2))
        else:
            torch.save(value, path, pickle_protocol=2, _use_new_zipfile_serialization=how == "zip")
    return image, points


def legacy_head():
    """What a file of torch.save before 1.6 begins with: three pickles."""
    parts = 0x1950a86a20f9469cfc6c, 1001, {"little_endian": True}
    return b"".join(pickle.dumps(part, 2) for part in parts)


class Python2Pickler(pickle._Pickler):
    """Python's own, with text and bytes as Python 2 writes both: byte strings."""
    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        value = value.encode() if isinstance(value, str) else value
        short = len(value) < 256
        length = bytes([len(value)]) if short else struct.pack("<i", len(value))
        self.write((b"U" if short else b"T") + length + value)
    dispatch[str] = dispatch[bytes] = save_bytes


def python2(value):
    """The pickle of nested values as Python 2 and NumPy 1 write it."""
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


# ---- the releases' checkpoint files, with random weights

def released_gridconv(kind, hidden=4, blocks=1, grid=(5, 5)):
    """A state dict of the shapes of GridConv's release; kind: dynamic, vanilla or autogrids."""
    generator, state, (H, P) = torch.Generator().manual_seed(len(kind)), {}, grid
    branches = ("donut_conv.", "tablet_conv.") if kind == "vanilla" else ("branch1_", "branch2_")

    def fill(key, *shape):
        state[key] = torch.rand(*shape, generator=generator) - 0.4
    layers = [("", 1, 2, hidden), ("", 2, hidden, 3)]
    for i in range(blocks):
        layers[-1:-1] = [(f"linear_stages.{i}.", k, hidden, hidden) for k in (1, 2)]
    for place, number, c_in, c_out in layers:
        last = (place, number) == ("", 2)
        for branch in branches:
            fill(f"{place}w{number}.{branch}weight", c_out, c_in, 3, 3)
            if not last:
                fill(f"{place}w{number}.{branch}bias", c_out)
        if not last:
            released_norm(state, f"{place}batch_norm{number}", c_out, generator)
        if kind != "vanilla":
            name, width = f"{place}atten_conv{number}", max(c_in // 16, 16)
            fill(f"{name}.fc.weight", width, c_in, 1, 1)
            released_norm(state, f"{name}.bn", width, generator)
            fill(f"{name}.position_fc.weight", 9 * H * P, width, 1, 1)
            fill(f"{name}.position_fc.bias", 9 * H * P)
    if kind == "autogrids":
        prior = [[7] * 5, [0, 8, 8, 8, 0], [4, 11, 9, 14, 1], [5, 12, 9, 15, 2], [6, 13, 10, 16, 3]]
        one_hot = F.one_hot(torch.tensor(prior).flatten(), 17)
        state["sgt_layer.sgt_trans_mat"] = one_hot.float()[None]
    return state


def released_norm(state, name, channels, generator):
    """A batch norm's entries."""
    for part in ("weight", "bias", "running_mean"):
        state[f"{name}.{part}"] = torch.rand(channels, generator=generator) - 0.4
    state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def released_glagcn(joints, modules, channels=8):
    """A state dict of the shapes that GLA-GCN's release saves, with its prefix."""
    generator, state = torch.Generator().manual_seed(joints), {}

    def conv(name, c_in, c_out, time=1):
        for part, shape in (("weight", (c_out, c_in, time, 1)), ("bias", (c_out,))):
            state[f"{name}.{part}"] = 0.5 * torch.rand(shape, generator=generator) - 0.2
    released_norm(state, "data_bn", joints * 2, generator)
    layers = {f"layers_tcngcn.{i}": channels for i in range(2 * modules)}
    for name, c_in in {"expand_gcn": 2, **layers}.items():
        graphs = torch.rand(3, joints, joints, generator=generator)
        state[f"{name}.gcn1.PA"] = 0.5 * graphs - 0.2
        for k in range(3):
            conv(f"{name}.gcn1.conv_a.{k}", c_in, channels // 4)
            conv(f"{name}.gcn1.conv_b.{k}", c_in, channels // 4)
            conv(f"{name}.gcn1.conv_d.{k}", c_in, channels)
        if c_in != channels:
            for place, norm in (("gcn1.down.0", "gcn1.down.1"), ("residual.conv", "residual.bn")):
                conv(f"{name}.{place}", c_in, channels)
                released_norm(state, f"{name}.{norm}", channels, generator)
        released_norm(state, f"{name}.gcn1.bn", channels, generator)
        conv(f"{name}.tcn1.conv", channels, channels, 9)
        released_norm(state, f"{name}.tcn1.bn", channels, generator)
    conv("fc", channels, 3)
    state["fc.weight"] = state["fc.weight"][..., 0]
    return {"module." + key: value for key, value in state.items()}


def save_released(path, state):
    """In a file as its release writes it: GridConv's a whole optimiser, GLA-GCN's a RandomState."""
    if any(key.startswith("module.") for key in state):
        torch.save({"epoch": 60, "lr": 1e-3, "random_state": np.random.RandomState(0),
                    "optimizer": {"state": {}}, "model_pos": state}, path)
        return
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    content = {"epoch": 99, "lr": 1e-4, "error": 37.1, "state_dict": state, "optimizer": optimizer}
    torch.save(content, path, _use_new_zipfile_serialization=False, pickle_protocol=2)


# ---- the design card's four properties

MODES = ("circular", "replicate", "zeros")
one_or_two_modes = st.one_of(st.sampled_from(MODES), st.tuples(*[st.sampled_from(MODES)] * 2))
paddings = st.lists(one_or_two_modes, min_size=1, max_size=4).map(tuple)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 10**6)


@st.composite
def layouts(draw, averaged=True):
    """(layout, joints): a grid in which every joint has a cell; the other cells hold any joint, or
    the mean of some."""
    H, P = draw(grids)
    joints = draw(st.integers(1, H * P))
    joint = st.integers(0, joints - 1)
    if averaged:
        joint = st.one_of(joint, st.lists(joint, min_size=2, max_size=3).map(tuple))
    rest = draw(st.lists(joint, min_size=H * P - joints, max_size=H * P - joints))
    cells = draw(st.permutations([*range(joints), *rest]))
    return tuple(tuple(cells[row * P:row * P + P]) for row in range(H)), joints


@given(layouts(), seeds, st.floats(1e-3, 1e3), st.integers(1, 4), st.booleans())
def test_sgt_then_inverse_is_the_identity(case, seed, scale, channels, double):
    layout, joints = case
    torch.manual_seed(seed)
    pose = scale * torch.randn(3, joints, channels, dtype=torch.double if double else torch.float)
    near = 1e-12 * scale if double else 1e-5 * scale
    S = gridconv.assignment_matrix(layout, joints)
    grid = gridconv.sgt(pose, S, (len(layout), len(layout[0])))
    assert grid.shape == (3, channels, len(layout), len(layout[0])) and grid.dtype == pose.dtype
    for i, row in enumerate(layout):
        for j, cell in enumerate(row):
            held = cell if isinstance(cell, tuple) else (cell,)
            want = sum(pose[:, joint] for joint in held) / len(held)
            # S is kept in float32: a third of a cell is one to 3e-8
            torch.testing.assert_close(grid[:, :, i, j], want, rtol=0, atol=max(near, 1e-6 * scale))
            if len(set(held)) > 1:
                grid[:, :, i, j] = 1e6  # averaged cells are ignored coming out
    torch.testing.assert_close(gridconv.inverse_sgt(grid, S), pose, rtol=0, atol=near)


def source_cell(i, j, grid, mode):
    """The cell that padding puts at (i, j) of an unbounded grid, step by step; None for a zero."""
    place = []
    for index, size, how in ((i, grid[0], mode[0]), (j, grid[1], mode[1])):
        while how == "circular" and index < 0:
            index += size
        while how == "circular" and index >= size:
            index -= size
        if how == "replicate" and index < 0:
            index = 0
        if how == "replicate" and index >= size:
            index = size - 1
        if not 0 <= index < size:
            return None
        place.append(index)
    return tuple(place)


def plain_dgridconv(x, weight, bias, padding, alpha):
    """Eq. 8 by loops over branches, cells and taps."""
    B, _, H, P = x.shape
    K = weight.shape[-1]
    out = torch.zeros(B, weight.shape[1], H, P, dtype=x.dtype)
    for branch, mode in enumerate(padding):
        mode = (mode, mode) if isinstance(mode, str) else mode
        for i, j, a, b in np.ndindex(H, P, K, K):
            cell = source_cell(i + a - K // 2, j + b - K // 2, (H, P), mode)
            if cell is not None:
                read = alpha[:, i, j, a, b, None] * x[:, :, cell[0], cell[1]]
                out[:, :, i, j] += read @ weight[branch, :, :, a, b].T
        if bias is not None:
            out += bias[branch][:, None, None]
    return out


@settings(max_examples=25)
@given(grids, paddings, st.sampled_from([1, 3, 5]), st.integers(1, 9), st.integers(1, 3),
       st.booleans(), seeds)
def test_gridconv_is_equation_8_in_every_padding(grid, padding, K, c_in, c_out, bias, seed):
    torch.manual_seed(seed)
    layer = gridconv.DynamicGridConv(c_in, c_out, K, padding, grid, bias).double()
    x = torch.randn(2, c_in, *grid, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(2, *grid, K, K, dtype=torch.float64, requires_grad=True)
    want = plain_dgridconv(x, layer.weight, layer.bias, padding, alpha)
    push = torch.randn_like(want)

    def values_and_gradients(out, x, alpha, layer):
        inputs = [x, alpha, layer.weight] + ([layer.bias] if bias else [])
        return [out, *torch.autograd.grad((out * push.to(out)).sum(), inputs)]

    plain = values_and_gradients(want, x, alpha, layer)
    last = x.contiguous(memory_format=torch.channels_last)
    for out in (layer(x, alpha), layer(last, alpha), layer.reference(x, alpha)):
        for mine, theirs in zip(values_and_gradients(out, x, alpha, layer), plain):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # scales in place
        torch.testing.assert_close(layer(x, alpha), want, rtol=1e-10, atol=1e-10)
    single, x, alpha = copy.deepcopy(layer).float(), x.detach().float(), alpha.detach().float()
    x.requires_grad_(), alpha.requires_grad_()
    for form in (single, single.reference):
        for mine, theirs in zip(values_and_gradients(form(x, alpha), x, alpha, single), plain):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.booleans(),
       st.booleans(), seeds)
def test_strided_agcn_divides_the_frames(half, groups, joints, channels, causal, adaptive, seed):
    torch.manual_seed(seed)
    width = 2 * half + 1
    A = glagcn.spatial_partition([(joint, joint + 1) for joint in range(joints - 1)], joints)
    module = glagcn.StridedAGCN(channels, A, width, causal=causal, adaptive=adaptive).eval()
    x = torch.randn(2, channels, joints, width * groups)
    assert module(x).shape == (2, channels, joints, groups)
    nn.init.zeros_(module.second.norm.weight)  # the residual alone: each group's centre frame,
    with torch.no_grad():  # the last with causal
        frame = width - 1 if causal else half
        kept = [x[..., group * width + frame] for group in range(groups)]
        assert torch.equal(module(x), torch.stack(kept, -1))
    if width > 1:
        with pytest.raises(ValueError, match=f"{width * groups + 1} frames.*{width}"):
            module(torch.randn(2, channels, joints, width * groups + 1))


def softmax_jacobian(grid):
    """(S, Jacobian (rows, J, J) of each row of S by its row of s_prob) of one forward."""
    S = grid()
    columns = [torch.autograd.grad(S[:, k].sum(), grid.s_prob, retain_graph=True)[0]
               for k in range(S.shape[1])]
    return S.detach(), torch.stack(columns, 1)


def probabilities(S, jacobian):
    """The p of which a row's Jacobian is diag(p) - p p^T, if S is one-hot at p's largest."""
    diagonal = jacobian.diagonal(dim1=1, dim2=2)  # p (1 - p), and only the largest is above a half
    p = (1 - (1 - 4 * diagonal).clamp(min=0).sqrt()) / 2
    p = p * (1 - S)
    return p + S * (1 - p.sum(1, keepdim=True))


@given(st.integers(2, 6), st.integers(1, 4), st.booleans(), seeds)
def test_straight_through_gradient_is_the_softmax_relaxations(joints, rows, noise, seed):
    """Whatever the noise was: one-hot, and the Jacobian of one softmax that is largest there."""
    torch.manual_seed(seed)
    grid = gridconv.AutoGrids(joints, (rows, joints), "random").double()
    grid.noise = noise
    S, jacobian = softmax_jacobian(grid)
    assert ((S == 0) | (S == 1)).all() and (S.sum(1) == 1).all()
    p = probabilities(S, jacobian)
    want = p.diag_embed() - p[:, :, None] * p[:, None]
    torch.testing.assert_close(jacobian, want, rtol=1e-6, atol=1e-9)
    assert (p > 0).all() and torch.equal(p.argmax(1), S.argmax(1))
    if not noise:
        torch.testing.assert_close(p, grid.s_prob.exp() / grid.s_prob.exp().sum(1, keepdim=True))


def test_noise_is_one_gumbel_sample_a_forward():
    torch.manual_seed(1)
    grid = gridconv.AutoGrids(4, (1, 4), "random").double()
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    grid.s_prob.data = logits.repeat(4, 1)
    picked, differences = 0, []
    for _ in range(3000):
        S, jacobian = softmax_jacobian(grid)
        noise = probabilities(S, jacobian).log() - logits
        differences.append(noise[:, 1] - noise[:, 2])  # of two Gumbel variables: logistic
        picked = picked + S.mean(0) / 3000
    torch.testing.assert_close(picked, logits.softmax(0), atol=0.02, rtol=0)  # the Gumbel-max rule
    differences = torch.cat(differences)
    assert abs(differences.mean()) < 0.06 and differences.std().item() == pytest.approx(
        math.pi / math.sqrt(3), rel=0.03)


# ---- gridconv: layouts


def test_averaged_and_absent_joints():
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17)
    pose = torch.randn(2, 17, 3)
    grid = gridconv.sgt(pose, S, (5, 5))
    torch.testing.assert_close(grid[:, :, 2, 2], (pose[:, 8] + pose[:, 9]) / 2)
    S = torch.eye(4)[:, :3]  # a joint that no cell holds comes out 0, and nothing is divided by 0
    S = torch.cat([S, torch.zeros(4, 1)], 1).requires_grad_()
    out = gridconv.inverse_sgt(torch.ones(1, 2, 2, 2), S)
    assert torch.equal(out[0, 3], torch.zeros(2)) and torch.equal(out[0, 0], torch.ones(2))
    out.sum().backward()
    assert S.grad.isfinite().all() and S.grad[:, 3].abs().sum() > 0  # the loss can ask for it back


def plain_topology(S, grid, edges):
    """Eq. 2 and 3, term by term."""
    H, P = grid
    if any(sorted(row) != [0] * (len(row) - 1) + [1] for row in S.tolist()):
        return False
    for i, j in edges:
        beside = 0
        for (a, b), (c, d) in ((p, q) for p in np.ndindex(H, P) for q in np.ndindex(H, P)):
            if abs(a - c) + abs(b - d) == 1:
                beside += S[a * P + b, i] * S[c * P + d, j]
        if beside < 1:
            return False
    return True


@settings(max_examples=20)
@given(layouts(averaged=False), st.data())
def test_satisfies_topology_is_equations_2_and_3(case, pick):
    layout, joints = case
    joint = st.integers(0, joints - 1)
    edges = pick.draw(st.lists(st.tuples(joint, joint), max_size=3))
    S, grid = gridconv.assignment_matrix(layout, joints), (len(layout), len(layout[0]))
    assert gridconv.satisfies_topology(S, grid, edges) == plain_topology(S, grid, edges)


@pytest.mark.parametrize("layout, name", [
    (gridconv.HANDCRAFTED_5X5, "h36m17"), (gridconv.HANDCRAFTED_7X5, "h36m32")])
def test_handcrafted_layouts_keep_the_skeleton_and_its_sides(layout, name):
    """The person's right stands left of the middle column; 5 x 5 mirrors exactly."""
    skeleton, grid = SKELETONS[name], (len(layout), len(layout[0]))
    S = gridconv.assignment_matrix(layout, len(skeleton.joints))
    assert gridconv.satisfies_topology(S, grid, skeleton.edges)
    assert plain_topology(S, grid, skeleton.edges)
    sides = [joint.split("_")[0] for joint in skeleton.joints]
    for row in layout:
        assert "left" not in [sides[joint] for joint in row[:2]]
        assert "right" not in [sides[joint] for joint in row[3:]]
        if name == "h36m17":
            assert [skeleton.mirror[joint] for joint in row] == list(reversed(row))
    released = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17)
    assert not gridconv.satisfies_topology(released, (5, 5))
    assert gridconv.H36M_EDGES == tuple(H17.edges)


@given(layouts(), st.sampled_from(["row", "column", "global"]), st.integers(0, 99))
def test_shuffles_permute_rows_columns_or_cells(case, how, seed):
    layout, _ = case
    shuffled = gridconv.shuffle_layout(layout, how, seed)
    before, after = layout, shuffled
    if how == "column":
        before, after = zip(*layout), zip(*shuffled)
    if how == "global":
        before, after = sum(layout, ()), sum(shuffled, ())
    assert sorted(after, key=repr) == sorted(before, key=repr)
    assert shuffled == gridconv.shuffle_layout(layout, how, seed)


def test_shuffles_and_random_layouts_vary_with_the_seed():
    for how in ("row", "column", "global"):
        made = {gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, how, seed) for seed in range(20)}
        assert len(made) > 10
    made = {gridconv.random_layout(17, (5, 5), seed) for seed in range(20)}
    assert len(made) == 20 and all(set(sum(layout, ())) == set(range(17)) for layout in made)


@pytest.mark.parametrize("layout, joints, says", [
    (((0, 1), (2, 17)), 4, "17"), (((0, 1), (2, -1)), 4, "-1"), (((0, 1), (2, 2)), 4, r"t \[3"),
    (((0, 1),), 3, "3 joints"), (((0, 1), (2,)), 3, "row"), (((0, 1), ((0, 2), 1)), 3, r"joint \[2"),
    (((0, 1), (2, "a")), 3, "a"), (((0, 1), (2, ())), 3, "empty")])
def test_bad_layouts_are_refused(layout, joints, says):
    with pytest.raises(ValueError, match=says):
        gridconv.assignment_matrix(layout, joints)
    with pytest.raises(ValueError, match=says):
        gridconv.GridLiftingNetwork(num_joints=joints, layout=layout, hidden=4)


def temporal(**options):
    return gridconv.TemporalGridLiftingNetwork(**{"filter_widths": (3,), "hidden": 2, **options})


@pytest.mark.parametrize("says, make", [
    ("mirror", lambda: gridconv.GridConv(2, 3, padding=("mirror",))),
    ("tuple", lambda: gridconv.GridConv(2, 3, padding="circular")),
    (r"\(\)", lambda: gridconv.GridConv(2, 3, padding=())),
    ("pair", lambda: gridconv.GridConv(2, 3, padding=(("zeros",),))),
    ("4", lambda: gridconv.GridConv(2, 3, kernel_size=4)),
    ("2, 3, 5, 5", lambda: gridconv.GridConv(3, 3)(torch.zeros(2, 2, 5, 5))),
    ("2, 3, 5, 5", lambda: gridconv.GridConv(3, 3)(torch.zeros(2, 3, 5, 4))),
    ("16 cells cannot hold 17", lambda: gridconv.AutoGrids(17, (4, 4), "random")),
    ("16 cells cannot hold 17", lambda: gridconv.random_layout(17, (4, 4))),
    ("random", lambda: gridconv.AutoGrids(17, (6, 4))),
    ("gumbel", lambda: gridconv.AutoGrids(17, (5, 5), "gumbel")),
    ("averages", lambda: gridconv.AutoGrids(17, (5, 5), gridconv.RELEASED_5X5)),
    ("rows", lambda: gridconv.AutoGrids(17, (5, 5), ())),
    ("diagonal", lambda: gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, "diagonal")),
    ("expected", lambda: gridconv.GridLiftingNetwork(hidden=4)(torch.zeros(1, 16, 2))),
    ("unknown", lambda: gridconv.GridLiftingNetwork(hidden=4, attention="gird")),
    ("grid_shape", lambda: gridconv.GridLiftingNetwork(hidden=4, layout=None)),
    ("grid_shape", lambda: gridconv.GridLiftingNetwork(hidden=4, grid_shape=(4, 5))),
    ("AutoGrids of 17", lambda: gridconv.GridLiftingNetwork(32, gridconv.AutoGrids(), hidden=4)),
    ("forward_grid", lambda: gridconv.GridLiftingNetwork(
        hidden=4, layout=None, grid_shape=(5, 5))(torch.zeros(2, 17, 2))),
    (r"filter_widths: \(3, 2\)", lambda: temporal(filter_widths=(3, 2))),
    *((f"filter_widths: {re.escape(repr(widths))}", lambda it=widths: temporal(filter_widths=it))
      for widths in ((), (1,), (1, 1), (3.0,), (None,), 3, None)),
    (r"\(B, 3, 17, 2\)", lambda: temporal()(torch.zeros(2, 9, 17, 2))),
    (r"\(B, 3, 17, 2\)", lambda: temporal()(torch.zeros(2, 17, 2))),
    (r"\(2, 16, 2\).*\(B, 17, 2\)",
     lambda: gridconv.FullyConnectedLifter(hidden=2)(torch.zeros(2, 16, 2))),
    (r"\(B, 17, 2\)", lambda: gridconv.GraphConvLifter(hidden=2)(torch.zeros(17, 2))),
    (r"\(0, 3\).*0\.\.2", lambda: gridconv.GraphConv(1, 1, [(0, 3)], 3))])
def test_bad_gridconv_arguments_are_refused(says, make):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("shape", [(2, 3, 3, 5, 5), (1, 5, 5, 3, 3)])
def test_alpha_of_another_shape_is_refused(shape):
    """In the release's order; one for a batch of two."""
    with pytest.raises(ValueError, match="alpha"):
        gridconv.DynamicGridConv(2, 3)(torch.zeros(2, 2, 5, 5), torch.ones(shape))


# ---- gridconv: AutoGrids


def test_autogrids_rows_are_one_hot_and_nothing_is_random_in_evaluation():
    torch.manual_seed(0)
    grid = gridconv.AutoGrids(17, (5, 5))
    for _ in range(50):
        S = grid()
        assert ((S == 0) | (S == 1)).all() and torch.equal(S.sum(1), torch.ones(25))
    grid.eval()
    before = torch.get_rng_state()
    assert torch.equal(grid(), grid.assignment()) and torch.equal(before, torch.get_rng_state())
    handcrafted = gridconv.assignment_matrix(gridconv.HANDCRAFTED_5X5, 17)
    assert torch.equal(grid.assignment(), handcrafted) and grid.dropped() == []
    grid.train()
    grid.noise = False
    assert torch.equal(grid(), grid.assignment())
    assert sum(p.numel() for p in grid.parameters()) == 425
    with torch.no_grad():
        grid.s_prob[10] = torch.eye(17)[0]  # joint 1's only cell
    assert grid.dropped() == [1]


def test_autogrids_learns_to_bring_a_dropped_joint_back():
    torch.manual_seed(2)
    grid = gridconv.AutoGrids(3, (2, 2), ((0, 1), (2, 2)))
    with torch.no_grad():
        grid.s_prob[2:] = torch.tensor([[0.9, 0.0, 0.8], [0.0, 0.9, 0.8]])
    grid.noise = False
    optimizer = torch.optim.SGD(grid.parameters(), 1.0)
    assert grid.dropped() == [2]
    for _ in range(100):
        pose = torch.randn(64, 3, 2)
        S = grid()
        loss = (gridconv.inverse_sgt(gridconv.sgt(pose, S, (2, 2)), S) - pose).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert grid.dropped() == [] and loss < 1e-10


def test_one_sample_goes_in_and_comes_out():
    torch.manual_seed(0)
    net = gridconv.GridLiftingNetwork(layout=gridconv.AutoGrids(), hidden=4, blocks=1, out_dim=2)
    net.forward_grid = lambda grid: grid
    for _ in range(5):
        pose = torch.randn(2, 17, 2)
        out = net(pose)  # what a sample holds comes back, what it drops is 0
        held = out.abs().sum((0, 2)) > 0
        torch.testing.assert_close(out[:, held], pose[:, held])
        assert 5 < held.sum() < 17


# ---- gridconv: the layers


@settings(max_examples=20)
@given(grids, paddings, st.sampled_from([1, 3, 5]), st.sampled_from([1, 9]), st.integers(0, 999))
def test_vanilla_gridconv_is_conv2d_over_the_padded_grid(grid, padding, K, c_in, seed):
    torch.manual_seed(seed)
    vanilla = gridconv.GridConv(c_in, 2, K, padding, grid).double()
    dynamic = gridconv.DynamicGridConv(c_in, 2, K, padding, grid).double()
    dynamic.load_state_dict(vanilla.state_dict(), strict=False)
    x, pad, want = torch.randn(2, c_in, *grid, dtype=torch.float64), K // 2, 0
    for branch, mode in enumerate(padding):
        mode = (mode, mode) if isinstance(mode, str) else mode
        padded = torch.zeros(2, c_in, grid[0] + 2 * pad, grid[1] + 2 * pad, dtype=torch.float64)
        for i, j in np.ndindex(padded.shape[2:]):
            cell = source_cell(i - pad, j - pad, grid, mode)
            if cell is not None:
                padded[:, :, i, j] = x[:, :, cell[0], cell[1]]
        want = want + torch.conv2d(padded, vanilla.weight[branch], vanilla.bias[branch])
    ones = torch.ones(2, *grid, K, K, dtype=torch.float64)
    for got in (vanilla(x), vanilla.reference(x), dynamic(x, ones)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_padding_modes_agree_with_torchs_own():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def compare(padding, padded):
        layer = gridconv.GridConv(3, 4, 3, padding).double()
        want = torch.conv2d(padded, layer.weight[0], layer.bias[0])
        torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)

    for mode, name in (("circular", "circular"), ("replicate", "replicate"), ("zeros", "constant")):
        compare((mode,), F.pad(x, (1, 1, 1, 1), mode=name))
    # a pair is (vertical, horizontal): repeat the rows, wrap the columns around
    wrapped = F.pad(x, (1, 1, 0, 0), mode="circular")
    compare((("replicate", "circular"),), F.pad(wrapped, (0, 0, 1, 1), mode="replicate"))


@pytest.mark.parametrize("padding", [("circular", "replicate"), ("circular", "zeros"), ("zeros",)])
@pytest.mark.parametrize("c_in, c_out", [(40, 24), (24, 3)])
def test_reference_is_forward_with_a_layers_own_attention(padding, c_in, c_out):
    layer = shake(gridconv.DynamicGridConv(c_in, c_out, 3, padding)).double()
    x = torch.randn(150, c_in, 5, 5, dtype=torch.float64)
    mine, theirs = layer(x), layer.reference(x)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    plain = plain_dgridconv(x, layer.weight, layer.bias, padding, layer.attention(x))
    torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)


def test_a_large_batch_is_the_sum_of_its_parts():
    """A processor takes some samples at a time: values and gradients do not show it."""
    layer = shake(gridconv.DynamicGridConv(256, 256))
    x = torch.randn(220, 256, 5, 5)
    with torch.no_grad():
        apart = torch.cat([layer(x[:30]), layer(x[30:])])
        torch.testing.assert_close(layer(x), apart, rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    for part in x.split(55):
        layer(part).square().sum().backward()
    assert (layer.weight.grad - whole).norm() < 1e-5 * whole.norm()


def test_attention_is_the_releases():
    torch.manual_seed(0)
    attention = gridconv.GridAttention(40, 3, (5, 4)).double().eval()
    attention.norm.running_mean.uniform_(-1, 1)
    attention.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 40, 5, 4, dtype=torch.float64)
    alpha = attention(x)
    assert alpha.shape == (3, 5, 4, 3, 3) and attention.squeeze.weight.shape == (16, 40)
    for b in range(3):
        mean = torch.stack([x[b, c].sum() / 20 for c in range(40)])
        z = attention.squeeze.weight @ mean
        z = (z - attention.norm.running_mean) / (attention.norm.running_var + 1e-5).sqrt()
        z = attention.position.weight @ z.clamp(min=0) + attention.position.bias
        for i, j, a, c in ((0, 0, 0, 0), (4, 3, 2, 2), (1, 2, 2, 0), (3, 1, 0, 1)):
            want = 1 / (1 + torch.exp(-z[(a * 3 + c) * 20 + i * 4 + j] / 30))
            torch.testing.assert_close(alpha[b, i, j, a, c], want)


def test_figure_8_attentions_by_loops():
    torch.manual_seed(3)
    layer = gridconv.AttentiveGridConv("spatial+channel", 3, 20).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y = gridconv.GridConv.forward(layer, x)
    first, _, second = layer.channel
    ones = torch.ones(1, 5, 5, 3, 3, dtype=torch.float64)
    for got in (layer(x), layer.reference(x)):
        for b in range(2):
            squeezed = torch.stack([y[b, c].mean() for c in range(20)])
            z = (first.weight @ squeezed + first.bias).clamp(min=0)
            z = y[b] * (1 / (1 + torch.exp(-(second.weight @ z + second.bias))))[:, None, None]
            maps = torch.stack([z.mean(0), z.max(0).values])[None]
            place = plain_dgridconv(
                maps, layer.spatial.weight, layer.spatial.bias, ("circular", "replicate"), ones)
            torch.testing.assert_close(got[b], z / (1 + torch.exp(-place[0, 0])))


# ---- gridconv: the network


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_network_sizes_of_the_paper_built_on_the_meta_device():
    with torch.device("meta"):
        def network(**options):
            return size(gridconv.GridLiftingNetwork(**options))

        assert network() == 4790406 and network(layout=gridconv.AutoGrids()) == 4790831
        assert network() - network(attention=None) == 43654
        for sizes, millions in (((3, 1), 2.69), ((5, 3), 9.00)):  # Table E
            assert round(network(kernel_sizes=(3, sizes, 3)) / 1e6, 2) == millions
        assert round(network(kernel_sizes=(3, (3, 3), 1)) / 1e6, 2) == 4.77
        assert round(network(attention=None, hidden=512) / 1e6, 2) == 18.93  # Figure B
        layout = gridconv.random_layout(17, (7, 3))
        net = gridconv.GridLiftingNetwork(layout=layout, attention="spatial+channel", hidden=8)
        assert {tensor.device.type for tensor in [*net.parameters(), *net.buffers()]} == {"meta"}


def training_losses(net, pose, target, lr, steps):
    """The losses of `steps` steps of Adam on one batch, in which every parameter has a gradient."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr), []
    for _ in range(steps):
        loss = (net(pose) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


def small(**options):
    return gridconv.GridLiftingNetwork(**{"hidden": 8, "blocks": 1, "dropout": 0.0, **options})


def shaken(net, dtype=None):
    """The network with other weights and statistics, for evaluation, and its own assignment."""
    S = net.fixed_assignment.clone()
    shake(net, dtype=dtype).fixed_assignment = S.to(dtype)
    return net


FOUR = ("circular", "replicate", ("replicate", "circular"), ("circular", "replicate"))
VARIANTS = {
    "grid": small,
    **{str(design): functools.partial(small, attention=design)
       for design in (None, "channel", "spatial", "spatial+channel")},
    "3-31-3": lambda: small(kernel_sizes=(3, (3, 1), 3)),
    "3-53-3": lambda: small(kernel_sizes=(3, (5, 3), 3)),
    "3-33-1": lambda: small(kernel_sizes=(3, (3, 3), 1)),
    "one branch": lambda: small(padding=(("replicate", "circular"),)),
    "four branches": lambda: small(padding=FOUR),
    "7 x 3": lambda: small(layout=gridconv.random_layout(17, (7, 3))),
    "32 joints": lambda: small(num_joints=32, layout=gridconv.HANDCRAFTED_7X5),
    "temporal": lambda: temporal(filter_widths=(3, 3), hidden=8, dropout=0.0),
    "temporal, learnable": lambda: temporal(layout=gridconv.AutoGrids(), hidden=8, dropout=0.0),
    "fc": lambda: gridconv.FullyConnectedLifter(hidden=16, dropout=0.0),
    "gcn": lambda: gridconv.GraphConvLifter(hidden=16, dropout=0.0),
    "gcn, 32": lambda: gridconv.GraphConvLifter(32, SKELETONS["h36m32"].edges, 16, dropout=0.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_trains_and_its_state_goes_out_and_back(name):
    torch.manual_seed(0)
    net = VARIANTS[name]()
    J, T = net.num_joints, net.receptive_field
    frames = () if T == 1 else (T,)
    pose, target = torch.rand(8, *frames, J, 2) * 2 - 1, torch.randn(8, J, 3)
    assert net(pose).shape == (8, J, 3)
    if getattr(net, "autogrids", None) is not None:
        net.autogrids.noise = False
    losses = training_losses(net, pose, target, 2e-3, 25)
    assert losses[1] < losses[0] and losses[-1] < 0.85 * losses[0]
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = VARIANTS[name]()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.eval()(pose), net.eval()(pose))
    assert net(pose[:0]).shape == (0, J, 3)
    assert not [key for key in net.state_dict() if "temperature" in key]
    if name in ("grid", "temporal", "gcn"):
        exported = torch.export.export(net, (pose,)).module()
        torch.testing.assert_close(exported(pose), net(pose))


def test_temperature_is_settable_and_30_unless_set():
    net = shaken(small())
    x = torch.randn(2, 17, 2)
    assert net.temperature == 30
    cold = net(x)
    net.temperature = 1
    assert net.temperature == 1 and not torch.allclose(net(x), cold)
    assert small(attention=None).temperature == 30


def test_dropout_takes_whole_channels_and_the_last_layer_has_none():
    torch.manual_seed(0)
    net = small(hidden=32, dropout=0.5)
    out = net.expand(torch.randn(4, 2, 5, 5) + 3)
    dead = (out == 0).flatten(2).all(2).float().mean()
    assert 0.3 < dead < 0.75
    assert isinstance(net.shrink, gridconv.DynamicGridConv) and net.shrink.bias is None


def normalised(y, norm):
    """Batch norm in evaluation, by its formula; channels second."""
    column = (...,) + (None,) * (y.dim() - 2)
    y = (y - norm.running_mean[column]) / (norm.running_var[column] + norm.eps).sqrt()
    return y * norm.weight[column] + norm.bias[column]


def test_network_is_equation_9():
    net = shaken(small(layout=gridconv.RELEASED_5X5), torch.float64)
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17).double()
    pose = torch.randn(2, 17, 2, dtype=torch.float64)
    x = net.expand(gridconv.sgt(pose, S, (5, 5)))
    x = x + net.blocks[0][1](net.blocks[0][0](x))
    torch.testing.assert_close(net(pose), gridconv.inverse_sgt(net.shrink(x), S))
    for layer in (net.expand, *net.blocks[0]):
        h = torch.randn(2, layer.conv.weight.shape[2], 5, 5, dtype=torch.float64)
        torch.testing.assert_close(layer(h), normalised(layer.conv(h), layer.norm).clamp(min=0))


def test_coordinates_keep_a_tenth_of_a_millimetre_under_bfloat16():
    torch.manual_seed(0)
    net = small(layout=gridconv.HANDCRAFTED_5X5).train()
    S, pose = net.fixed_assignment, 2 * torch.rand(50, 17, 3) - 1
    with torch.autocast("cpu", torch.bfloat16):
        grid = gridconv.sgt(pose, S, (5, 5))
        assert (gridconv.inverse_sgt(grid, S) - pose).abs().max() < 1e-4
        x = pose[..., :2]
        features = net.expand(gridconv.sgt(x, S, (5, 5)))
        out = net(x)
        out.square().mean().backward()
    assert features.dtype == torch.bfloat16 and out.dtype == torch.float32  # products are rounded,
    assert (out.bfloat16() != out).float().mean() > 0.9  # but not what they add up to
    assert all(p.grad.isfinite().all() for p in net.parameters())
    wanted = net(x)
    assert (out - wanted).norm() < 0.05 * wanted.norm()


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, views included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_training_step_takes_at_most_1000_operations():
    net = gridconv.GridLiftingNetwork()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    pose, target = torch.randn(200, 17, 2), torch.randn(200, 17, 3)
    for _ in range(2):  # the first makes the optimiser's tensors
        with Operations() as operations:
            loss = (net(pose) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert operations.count <= 1000


@pytest.mark.slow
def test_compiled_gridconv_is_the_same():
    for padding in (("circular", "replicate"), ("circular", "zeros")):
        net = shaken(small(hidden=32, padding=padding)).train()
        pose, push = torch.randn(64, 17, 2), torch.randn(64, 17, 3)
        results = []
        for form in (net, torch.compile(net)):
            net.zero_grad()
            out = form(pose)
            (out * push).sum().backward()
            results.append([out, *(p.grad.clone() for p in net.parameters())])
        largest = max(value.abs().max() for value in results[0])
        for mine, compiled in zip(*results):
            assert (mine - compiled).abs().max() < 1e-5 * largest


# ---- the releases' golden figures: what their code gave on weights by formula, sin(0.7 i + 1.3 n)


def golden(state):
    """The weights of golden/released.json: entry n in sorted order, scaled by its kind."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    keys = [key for key in sorted(state) if not key.endswith("num_batches_tracked")]
    for n, key in enumerate(keys):
        shape = state[key].shape
        places = torch.arange(shape.numel(), dtype=torch.float64)
        value = torch.sin(0.7 * places + 1.3 * n).view(shape)
        if key.endswith("sgt_trans_mat"):
            state[key] = state[key] + 0.01 * value
        elif len(shape) >= 2:
            state[key] = value / math.sqrt(shape.numel() / shape[0])
        else:
            state[key] = 0.1 * value + key.endswith(("running_var", "weight"))
    return state


def golden_input(*shape):
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


def train_without_dropout(model):
    for module in model.train().modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return model


def assert_gradients(model, norms):
    """Of our parameters or parts of them: (name, index, the norm of the release's gradient)."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, index, want in norms:
        found = gradients[name][index].norm().item()
        assert found == pytest.approx(want, rel=1e-5, abs=1e-8), (name, index)


GRIDCONV_GOLDEN = {  # kind, hidden, blocks, grid, padding, temperature, output, loss, gradients
    'cr': (
        'dynamic', 16, 2, (5, 5), ('circular', 'replicate'), 30,
        {0: -0.01742218, 1: -0.13072298, 5: 0.6190666, 51: -0.00849724, 100: -0.07430863,
         101: -0.03954815},
        1.8616676159, [("expand.conv.weight", 0, 12.333935),
         ("expand.conv.attention.squeeze.weight", ..., 0.0087960872),
         ("blocks.0.0.conv.weight", 0, 6.9817357), ("blocks.0.1.conv.weight", 1, 9.4080435),
         ("blocks.0.1.norm.weight", ..., 1.0155184),
         ("blocks.0.0.conv.attention.squeeze.weight", ..., 0.020246375),
         ("blocks.0.1.conv.attention.norm.bias", ..., 0.0048795247),
         ("blocks.0.1.conv.attention.position.weight", ..., 0.018586323),
         ("blocks.1.0.conv.weight", 0, 5.7508531)]),
    'cz_t1': (
        'dynamic', 16, 1, (5, 5), ('circular', 'zeros'), 1,
        {0: -0.01626298, 1: 0.05552758, 5: -0.3148533, 51: -0.02102277, 100: -0.11077761,
         101: -0.13166446},
        1.9871868528, [("expand.conv.weight", 0, 3.5288608),
         ("expand.conv.attention.squeeze.weight", ..., 0.43073277),
         ("blocks.0.0.conv.weight", 0, 2.5074448), ("blocks.0.1.conv.weight", 1, 3.7462195),
         ("blocks.0.1.norm.weight", ..., 0.50548184),
         ("blocks.0.0.conv.attention.squeeze.weight", ..., 0.60659481),
         ("blocks.0.1.conv.attention.norm.bias", ..., 0.10792266),
         ("blocks.0.1.conv.attention.position.weight", ..., 0.5447364),
         ("shrink.weight", 1, 2.5365556)]),
    '7x3': (
        'dynamic', 8, 1, (7, 3), ('circular', 'replicate'), 1,
        {0: 0.21441932, 1: 0.09937502, 5: -0.02126497, 63: -0.22978819, 124: -0.01752613,
         125: -0.03080709},
        1.5457037943, [("expand.conv.weight", 0, 32.038196),
         ("expand.conv.attention.squeeze.weight", ..., 0.0076584183),
         ("blocks.0.0.conv.weight", 0, 2.5911947), ("blocks.0.1.conv.weight", 1, 2.5493182),
         ("blocks.0.1.norm.weight", ..., 0.3546402),
         ("blocks.0.0.conv.attention.squeeze.weight", ..., 2.4110055),
         ("blocks.0.1.conv.attention.norm.bias", ..., 0.18598983),
         ("blocks.0.1.conv.attention.position.weight", ..., 0.82590152),
         ("shrink.weight", 1, 2.0717253)]),
    'autogrids': (
        'autogrids', 16, 1, (5, 5), ('circular', 'zeros'), 1,
        {0: 0.21198072, 1: 0.14457081, 5: 0.4120058, 51: 0.21948809, 100: 0.05146396,
         101: 0.05225643},
        None, []),
    'vanilla_cz': (
        'vanilla', 16, 1, (5, 5), ('circular', 'zeros'), 30,
        {0: -0.12546289, 1: -0.22197505, 5: -0.06374375, 75: -0.11219781, 148: 0.16422292,
         149: 0.15437806},
        10.5501018009, [("expand.conv.weight", 0, 120.74863),
         ("blocks.0.0.conv.weight", 0, 7.182982),
         ("blocks.0.1.conv.weight", 1, 21.375246),
         ("blocks.0.1.norm.weight", ..., 0.96980356), ("shrink.weight", 1, 14.805056)]),
}
GLAGCN_GOLDEN = {  # joints, channels, modules, batch, output, loss, gradients
    '27': (
        17, 16, 3, 2,
        {0: -10.8066885, 1: -8.2510066, 2: 7.5096084, 34: -10.1957667, 51: -10.7825895,
         99: -4.4775778, 100: -3.7133054, 101: 3.0228485},
        0.6993974987, [("data_norm.weight", ..., 0.19593335), ("expand.spatial.B", ..., 0.40597872),
         ("expand.spatial.embed.weight", np.s_[4:8], 0.0065960749),
         ("expand.spatial.embed.bias", np.s_[20:24], 0.0013872685),
         ("expand.spatial.shortcut.0.weight", ..., 0.062151058),
         ("strided.0.first.spatial.W", np.s_[:, :, 1], 0.34881978),
         ("strided.0.second.spatial.B", ..., 0.096343669),
         ("strided.1.second.temporal.weight", ..., 2.031109),
         ("strided.2.first.spatial.norm.weight", ..., 0.0034974868),
         ("strided.2.second.spatial.embed.weight", np.s_[12:16], 0.0041396659),
         ("head.W_shared", ..., 5.1205778), ("head.b_shared", ..., 0.41988953)]),
    'humaneva15_27': (
        15, 12, 3, 2,
        {0: -3.9175804, 1: -3.1435512, 2: 7.3033294, 30: -6.2355562, 45: -4.0610088,
         87: -4.5273459, 88: -3.7161078, 89: 8.5077393},
        0.3381037619, [("data_norm.weight", ..., 0.21401942), ("expand.spatial.B", ..., 0.85768449),
         ("expand.spatial.embed.weight", np.s_[3:6], 0.0067188733),
         ("expand.spatial.embed.bias", np.s_[15:18], 0.0001411041),
         ("expand.spatial.shortcut.0.weight", ..., 0.12201389),
         ("strided.0.first.spatial.W", np.s_[:, :, 1], 0.79364402),
         ("strided.0.second.spatial.B", ..., 0.1350987),
         ("strided.1.second.temporal.weight", ..., 0.77511895),
         ("strided.2.first.spatial.norm.weight", ..., 0.022101543),
         ("strided.2.second.spatial.embed.weight", np.s_[9:12], 0.0075750594),
         ("head.W_shared", ..., 2.9017585), ("head.b_shared", ..., 0.51746699)]),
    '243': (
        17, 8, 5, 1,
        {0: 4.0855212, 1: -0.6346984, 2: -5.0710319, 17: -4.5908273, 25: 0.1831269,
         48: 2.2674893, 49: -1.1148715, 50: -3.9978118},
        None, []),
}


@pytest.mark.parametrize("case", GRIDCONV_GOLDEN)
def test_released_gridconv_weights_give_the_releases_figures(case):
    kind, hidden, blocks, grid, padding, temperature, want, loss, norms = GRIDCONV_GOLDEN[case]
    state = golden(released_gridconv(kind, hidden, blocks, grid))
    net = gridconv.from_released(state, padding, grid)
    assert net.temperature == 30 and net.shrink.weight.dtype == torch.float64
    net.temperature = temperature
    poses, cells = golden_input(2, 17, 2), golden_input(2, 2, *grid)
    if case in ("cr", "cz_t1"):
        cells = gridconv.sgt(poses, net.fixed_assignment, grid)
    on_poses = case in ("cr", "cz_t1", "autogrids")
    out = net.eval()(poses) if on_poses else net.eval().forward_grid(cells)
    for i, value in want.items():
        assert out.flatten()[i].item() == pytest.approx(value, abs=1e-7), i
    if loss:  # in training mode, of the grid against zeros
        found = train_without_dropout(net).forward_grid(cells).square().mean()
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-9, rel=1e-7)
        assert_gradients(net, norms)


@pytest.mark.parametrize("case", GLAGCN_GOLDEN)
def test_released_glagcn_weights_give_the_releases_figures(case):
    joints, channels, modules, batch, want, loss, norms = GLAGCN_GOLDEN[case]
    edges = glagcn.H36M_EDGES if joints == 17 else glagcn.HUMANEVA15_EDGES
    state = golden(released_glagcn(joints, modules, channels))
    model = glagcn.from_released(state, (3,) * modules, edges).eval()
    x = golden_input(batch, 3**modules, joints, 2)
    out = model(x).flatten()
    assert out.dtype == torch.float64
    for i, value in want.items():
        assert out[i].item() == pytest.approx(value, abs=2e-6), i
    if loss:
        found = train_without_dropout(model)(x).square().mean()
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-9, rel=1e-7)
        assert_gradients(model, norms)


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrapped_released_weights_load(prefix):
    for state, module, argument in ((released_gridconv("vanilla"), gridconv, ("circular", "zeros")),
                                    (released_glagcn(17, 1), glagcn, (3,))):
        def load(state):
            return module.from_released(state, argument)

        state = {key.removeprefix("module."): value for key, value in state.items()}
        plain, wrapped = load(state), load({prefix + key: value for key, value in state.items()})
        assert all(map(torch.equal, plain.state_dict().values(), wrapped.state_dict().values()))


W1, W2, W2B = "w1.branch1_weight", "w2.branch1_weight", "w2.branch2_weight"
FC, SGT = "atten_conv1.fc.weight", "sgt_layer.sgt_trans_mat"


@pytest.mark.parametrize("kind, change, says", [
    ("dynamic", None, "w1.branch1_weight"), ("dynamic", {}, "w1.branch1_weight"),
    ("dynamic", {"a": torch.zeros(1)}, "w1.branch1_weight"),
    ("dynamic", lambda s: {**s, "extra.weight": s[FC]}, "unexpected extra.weight"),
    ("dynamic", lambda s: {**s, "atten_conv1.foo.weight": s[FC]}, "atten_conv1.foo.weight"),
    ("dynamic", lambda s: {k: v for k, v in s.items() if "w2" not in k}, f"{W2} is missing"),
    ("vanilla", lambda s: {k: v for k, v in s.items() if "w1.donut" not in k}, "w1.donut_conv.weigh"),
    ("vanilla", lambda s: {k: v for k, v in s.items() if k != "batch_norm1.bias"}, "_norm1.bias"),
    ("dynamic", lambda s: {**s, W2: s[W2][:, :2]}, f"{W2} is .*expected"),
    ("dynamic", lambda s: {**s, W2: s[W2][0, 0], W2B: s[W2][0, 0]}, f"{W2} is"),
    ("dynamic", lambda s: {**s, W2: None, W2B: None}, W2),
    ("dynamic", lambda s: {**s, W1: 3.0}, W1),
    ("dynamic", lambda s: {**s, FC: "x"}, FC), ("dynamic", lambda s: {**s, 7: s[FC]}, "7"),
    ("dynamic", lambda s: {**s, W1: s[W1][:0]}, f"{W1} is"),
    ("autogrids", lambda s: {**s, SGT: s[SGT][0, 0]}, f"{SGT} is"),
    ("autogrids", lambda s: {**s, SGT: s[SGT][0]}, f"{SGT} is"),
    ("autogrids", lambda s: {**s, SGT: s[SGT].expand(2, -1, -1)}, f"{SGT} is"),
    ("autogrids", lambda s: {**s, SGT: None}, SGT)])
def test_gridconv_weights_of_something_else_are_refused(kind, change, says):
    state = change(released_gridconv(kind)) if callable(change) else change
    with pytest.raises(ValueError, match=f"released GridConv.*{says}"):
        gridconv.from_released(state, ("circular", "zeros"))


def test_gridconv_weights_of_another_grid_or_branch_are_refused():
    state = released_gridconv("dynamic")
    with pytest.raises(ValueError, match="2 branches"):
        gridconv.from_released(state, ("circular",))
    with pytest.raises(ValueError, match="position_fc.* is .*225.*expected.*144"):
        gridconv.from_released(state, ("circular", "zeros"), (4, 4))


# ---- gridconv: temporal, together with a detector, the neighbours


@given(st.sampled_from([1, 3, 5]), grids, st.lists(st.sampled_from(MODES), min_size=1, max_size=2),
       st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=15)
def test_temporal_gridconv_by_loops(frames, grid, padding, groups, seed):
    conv = shake(gridconv.TemporalGridConv(2, 3, frames, tuple(padding), grid), seed, torch.float64)
    x = torch.randn(2, groups * frames, 2, *grid, dtype=torch.float64)
    got = conv(x.flatten(0, 1)).unflatten(0, (2, groups))
    for group in range(groups):
        want = 0
        for k, layer in enumerate(conv.frames):
            seen = x[:, group * frames + k]
            alpha = layer.attention(seen)
            want = want + plain_dgridconv(seen, layer.weight, None, padding, alpha)
        torch.testing.assert_close(got[:, group], want, rtol=1e-10, atol=1e-10)


def test_temporal_gridconv_without_attention_is_torchs_conv3d():
    conv = shake(gridconv.TemporalGridConv(2, 3, 3, ("circular",), (5, 5)), dtype=torch.float64)
    for frame in conv.frames:
        nn.init.constant_(frame.attention.position.bias, 1e9)  # alpha = 1
    x = torch.randn(2, 2, 9, 5, 5, dtype=torch.float64)  # (B, C, T, H, P)
    kernel = torch.stack([frame.weight[0] for frame in conv.frames], 2)
    padded = F.pad(x.flatten(1, 2), (1, 1, 1, 1), mode="circular").unflatten(1, (2, 9))
    want = F.conv3d(padded, kernel, stride=(3, 1, 1))
    got = conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("widths", [(3, 3, 3), (3, 5), (1, 3), (5,)])
def test_temporal_network_is_videopose3ds_dilated_form(widths):
    """Frame by frame: layer i reads frames apart by the product of the widths before it."""
    net = shaken(temporal(filter_widths=widths, hidden=3), torch.float64)
    T = math.prod(widths)
    pose = torch.randn(2, T, 17, 2, dtype=torch.float64)
    S = gridconv.assignment_matrix(gridconv.HANDCRAFTED_5X5, 17).double()

    def layer(grid_layer, seen):
        frames = grid_layer.conv.frames
        y = sum(conv(x) for conv, x in zip(frames, seen, strict=True))
        return normalised(y, grid_layer.norm).clamp(min=0)

    def features(depth, t):
        if depth < 0:
            return gridconv.sgt(pose[:, t], S, (5, 5))
        apart, half = math.prod(widths[:depth]), widths[depth] // 2
        seen = [features(depth - 1, t + k * apart) for k in range(-half, half + 1)]
        if depth == 0:
            return layer(net.expand, seen)
        first, second = net.blocks[depth - 1]
        return seen[half] + layer(second, [layer(first, seen)])

    want = gridconv.inverse_sgt(net.shrink(features(len(widths) - 1, T // 2)), S)
    assert net.receptive_field == T
    torch.testing.assert_close(net(pose), want, rtol=1e-10, atol=1e-10)


def test_temporal_network_of_table_C():
    net = gridconv.TemporalGridLiftingNetwork()
    assert net.receptive_field == 27 and size(net) == 38063324
    layers = (net.expand, *net.blocks[0], *net.blocks[1])
    assert [len(layer.conv.frames) for layer in layers] == [3, 3, 1, 3, 1]

    def attention(c, width):  # of each frame of a kernel
        return c * width + 2 * width + (width + 1) * 225

    kernels = 2 * 9 * (3 * 2 * 512 + 2 * (3 + 1) * 512**2 + 512 * 3)  # branches, K_s, K_t
    attentions = 3 * attention(2, 16) + (3 + 1 + 3 + 1 + 1) * attention(512, 32)
    assert size(net) == kernels + attentions + 5 * 2 * 512
    assert net.temperature == 30
    net.temperature = 2.0
    found = [m.temperature for m in net.modules() if isinstance(m, gridconv.GridAttention)]
    assert found == [2.0] * 12 and len(net.scheduled_norms()) == 5 + 3 + 3 + 1 + 3 + 1 + 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_soft_argmax_by_loops(h, w, seed):
    torch.manual_seed(seed)
    heatmaps = torch.randn(2, 3, h, w, dtype=torch.float64) * 3
    got, longest = gridconv.soft_argmax(heatmaps), max(h, w)
    for b, j in np.ndindex(2, 3):
        total, x, y = 0.0, 0.0, 0.0
        for r, c in np.ndindex(h, w):
            p = math.exp(heatmaps[b, j, r, c])
            total, x, y = total + p, x + p * (c + 0.5), y + p * (r + 0.5)
        want = data.normalise(np.array([x / total, y / total]), (w, h), "longest")
        assert got[b, j].tolist() == pytest.approx(want.tolist(), abs=1e-12)
    sharp = torch.full((1, 1, h, w), -1e4)
    sharp[0, 0, h - 1, 0] = 0  # the lowest row, the leftmost column
    want = [(1 - w) / longest, (h - 1) / longest]
    assert gridconv.soft_argmax(sharp)[0, 0].tolist() == pytest.approx(want, abs=1e-6)


def test_joint_loss_is_equation_13_and_its_gradients_are_right():
    torch.manual_seed(0)
    heatmaps = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    lift = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    target_2d, target_3d = torch.rand(2, 4, 2).double(), torch.rand(2, 4, 3).double()

    def loss(heatmaps, lift, **weight):
        pose = gridconv.soft_argmax(heatmaps)
        lifted = (pose.flatten(1) @ lift).view(2, 4, 3)
        return gridconv.joint_loss(pose, target_2d, lifted, target_3d, **weight)

    pose = gridconv.soft_argmax(heatmaps).detach()
    off_2d = pose - target_2d
    off_3d = (pose.flatten(1) @ lift.detach()).view(2, 4, 3) - target_3d
    want_2d = sum(abs(v) for v in off_2d.flatten().tolist()) / 16
    want_3d = sum(v * v for v in off_3d.flatten().tolist()) / 24
    assert loss(heatmaps, lift).item() == pytest.approx(want_2d + 160 * want_3d)
    assert loss(heatmaps, lift, weight=3.0).item() == pytest.approx(want_2d + 3 * want_3d)
    assert torch.autograd.gradcheck(loss, (heatmaps, lift))
    assert torch.autograd.gradcheck(gridconv.soft_argmax, heatmaps)


def test_a_tiny_detector_learns_together_with_the_lifter():
    """Blurred images of single joints, an almost blind detector, a lifter trained on true 2D: under
    Eq. 13 the 2D and the 3D error fall together."""
    torch.manual_seed(0)
    pose_2d = torch.rand(16, 17, 2) * 1.4 - 0.7
    pose_3d = 0.3 * torch.cat([pose_2d, pose_2d @ torch.randn(2, 1)], 2)
    at = (2 * torch.arange(16) + 1 - 16) / 16
    x, y = (at - pose_2d[..., :1]) ** 2, (at - pose_2d[..., 1:]) ** 2
    images = torch.exp(-100 * (x[:, :, None, :] + y[:, :, :, None]))
    detector, lifter = nn.Conv2d(17, 17, 3, padding=1), small()
    nn.init.dirac_(detector.weight)
    training_losses(lifter, pose_2d, pose_3d, 1e-2, 60)
    lifter.eval()
    optimizer = torch.optim.Adam([{"params": detector.parameters(), "lr": 0.1},
                                  {"params": lifter.parameters(), "lr": 1e-3}])
    errors = []
    for _ in range(50):
        found = gridconv.soft_argmax(detector(images))
        lifted = lifter(found)
        off_2d, off_3d = found - pose_2d, lifted - pose_3d
        errors.append((off_2d.norm(dim=-1).mean(), off_3d.norm(dim=-1).mean()))
        optimizer.zero_grad()
        gridconv.joint_loss(found, pose_2d, lifted, pose_3d).backward()
        optimizer.step()
    assert errors[-1][0] < 0.25 * errors[0][0] and errors[-1][1] < 0.25 * errors[0][1]
    loss = (lifter(gridconv.soft_argmax(detector(images))) - pose_3d).square().mean()
    # the 3D loss alone reaches the detector
    assert torch.autograd.grad(loss, detector.weight)[0].abs().sum() > 0


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_graph_convolution_is_the_primers_equation_1(joints, c_in, c_out, seed):
    rng = np.random.default_rng(seed)
    edges = [(int(rng.integers(joint)), joint) for joint in range(1, joints)]
    layer = gridconv.GraphConv(c_in, c_out, edges, joints).double()
    W = torch.eye(joints, dtype=torch.float64)
    for i, j in edges:
        W[i, j] = W[j, i] = 1
    D = W.sum(1)
    x = torch.randn(2, c_in, joints, dtype=torch.float64)
    theta, want = layer.theta.weight[..., 0], torch.zeros(2, c_out, joints, dtype=torch.float64)
    for i, j in np.ndindex(joints, joints):
        want[:, :, i] += D[i] ** -0.5 * W[i, j] * D[j] ** -0.5 * (x[:, :, j] @ theta.T)
    torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)  # its graph is float32
    other = gridconv.GraphConv(c_in, c_out, [(j, i) for i, j in edges], joints)
    torch.testing.assert_close(other.graph, layer.graph.float())


@pytest.mark.parametrize("make", [gridconv.FullyConnectedLifter, gridconv.GraphConvLifter])
def test_neighbours_layer_by_layer(make):
    net, full = shake(make(hidden=6), dtype=torch.float64), make is gridconv.FullyConnectedLifter
    pose = torch.randn(3, 17, 2, dtype=torch.float64)
    parts = list(net.network)[1:-1] if full else list(net.network)
    expand, *blocks, shrink = parts
    kinds = (nn.Linear, gridconv.GraphConv)
    assert len(blocks) == 2 and sum(isinstance(m, kinds) for m in net.modules()) == 6

    def layer(part, x):
        linear, norm, _, _ = part
        return normalised(linear(x), norm).clamp(min=0)

    x = torch.stack([torch.cat([*p]) for p in pose]) if full else pose.transpose(1, 2)
    x = layer(expand, x)
    for first, second in blocks:
        x = x + layer(second, layer(first, x))
    if full:
        y = x @ shrink.weight.T + shrink.bias
        want = torch.stack([torch.stack([row[3 * j:3 * j + 3] for j in range(17)]) for row in y])
    else:
        want = shrink(x).transpose(1, 2)
    torch.testing.assert_close(net(pose), want)
    drops = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    assert drops == [0.5 if full else 0.25] * 5


def test_neighbours_parameters():
    fc, gcn = gridconv.FullyConnectedLifter(), gridconv.GraphConvLifter()
    assert size(fc) == 35 * 1024 + 4 * 1025 * 1024 + 1025 * 51 + 5 * 2 * 1024 == 4296755
    assert size(gcn) == 2 * 256 + 4 * 256**2 + 256 * 3 + 5 * 2 * 256 == 265984
    assert fc.receptive_field == gcn.receptive_field == 1


# ---- glagcn: the release's equations as a plain loop


def plain_agcn(state, block, x, A, stride=1, residual=True):
    """One block on features (C, T, J) by the release's equations, in evaluation: subset by subset,
    joint by joint, tap by tap. state: in the release's names."""
    def conv(name, y):
        weight = state[f"{name}.weight"].flatten(1)
        return torch.einsum("oc,ctj->otj", weight, y) + state[f"{name}.bias"][:, None, None]

    def norm(name, y):
        entries = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = [state[f"{name}.{entry}"][:, None, None] for entry in entries]
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    gcn, y, J = f"{block}.gcn1", 0, x.shape[2]
    for k in range(3):
        theta, phi = conv(f"{gcn}.conv_a.{k}", x), conv(f"{gcn}.conv_b.{k}", x)
        graph = torch.zeros(J, J, dtype=x.dtype)
        for j in range(J):
            scores = torch.stack([(theta[:, :, i] * phi[:, :, j]).sum() for i in range(J)])
            scores = (scores / (len(theta) * x.shape[1])).exp()
            graph[:, j] = A[k][:, j] + state[f"{gcn}.PA"][k][:, j] + scores / scores.sum()
        mixed = torch.stack([sum(graph[i, j] * x[:, :, i] for i in range(J)) for j in range(J)], 2)
        y = y + conv(f"{gcn}.conv_d.{k}", mixed)
    down = x
    if f"{gcn}.down.0.weight" in state:
        down = norm(f"{gcn}.down.1", conv(f"{gcn}.down.0", x))
    y = (norm(f"{gcn}.bn", y) + down).clamp(min=0)

    T, out = x.shape[1], []
    for centre in range(0, T, stride):
        frame = state[f"{block}.tcn1.conv.bias"][:, None]
        for tap in range(9):
            if 0 <= centre + tap - 4 < T:
                weight = state[f"{block}.tcn1.conv.weight"][:, :, tap, 0]
                frame = frame + weight @ y[:, centre + tap - 4]
        out.append(frame)
    y = norm(f"{block}.tcn1.bn", torch.stack(out, 1))
    if residual and f"{block}.residual.conv.weight" in state:
        y = y + norm(f"{block}.residual.bn", conv(f"{block}.residual.conv", x))
    elif residual:
        y = y + x
    return y.clamp(min=0)


def plain_released(state, poses, edges, widths, input_norm):
    """The release's network in evaluation: poses (B, T, J, 2) -> (B, J, 3)."""
    state = {key.removeprefix("module."): value.double() for key, value in state.items()}
    J, out = poses.shape[2], []
    A = torch.zeros(3, J, J, dtype=torch.float64)
    for parent, child in edges:
        A[1, parent, child] = A[2, child, parent] = 1
    A[0] = torch.eye(J)
    for k, column in np.ndindex(3, J):
        if A[k, :, column].sum() > 0:
            A[k, :, column] /= A[k, :, column].sum().clone()
    for x in poses:
        if input_norm:
            entries = ("weight", "bias", "running_mean", "running_var")
            weight, bias, mean, var = [state[f"data_bn.{entry}"].view(J, 2) for entry in entries]
            x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        x = plain_agcn(state, "expand_gcn", x.permute(2, 0, 1), A)
        for i, width in enumerate(widths):
            y = plain_agcn(state, f"layers_tcngcn.{2 * i}", x, A)
            y = plain_agcn(state, f"layers_tcngcn.{2 * i + 1}", y, A, width, residual=False)
            x = y + x[:, width // 2::width]
        out.append(state["fc.weight"][..., 0] @ x.mean(1) + state["fc.bias"][:, None])
    return torch.stack(out).transpose(1, 2)


@pytest.mark.parametrize("edges, joints, input_norm", [
    (glagcn.H36M_EDGES, 17, True), (glagcn.HUMANEVA15_EDGES, 15, True),
    (glagcn.HUMANEVA15_DETECTED_EDGES, 15, False)])
def test_released_glagcn_weights_by_the_releases_equations(edges, joints, input_norm):
    torch.manual_seed(0)
    state = released_glagcn(joints, 2, 8)
    poses = torch.rand(2, 9, joints, 2, dtype=torch.float64) * 2 - 1
    model = glagcn.from_released(state, (3, 3), edges, input_norm=input_norm).double().eval()
    want = plain_released(state, poses, edges, (3, 3), input_norm)
    assert want.std() > 0.01
    torch.testing.assert_close(model(poses), want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    assert (model.data_norm is None) == (not input_norm)
    if not input_norm:  # with the other list or the norm it is another model
        other = plain_released(state, poses, glagcn.HUMANEVA15_EDGES, (3, 3), False)
        assert (other - want).abs().max() > 1e-3 * want.abs().max()
        bare = {key: value for key, value in state.items() if "data_bn" not in key}
        again = glagcn.from_released(bare, (3, 3), edges, input_norm=False).double().eval()
        assert torch.equal(again(poses), model(poses))


def test_the_detected_list_is_the_other_without_two_links():
    """1-based (2,6) and (1,9) are missing: two limbs hang in no graph; no other list may do so."""
    kept = [edge for edge in glagcn.HUMANEVA15_EDGES if edge not in ((5, 1), (8, 0))]
    assert glagcn.HUMANEVA15_DETECTED_EDGES == tuple(kept) and len(kept) == 12
    assert glagcn.spatial_partition([list(edge) for edge in kept], 15).shape == (3, 15, 15)
    for edges in (kept[:-1], glagcn.HUMANEVA15_EDGES[:-1]):
        with pytest.raises(ValueError, match="not connected"):
            glagcn.spatial_partition(edges, 15)


GLA_FC, GLA_PA = "module.fc.weight", "module.expand_gcn.gcn1.PA"
GLA_TCN, GLA_BN = "module.expand_gcn.tcn1.conv.weight", "module.data_bn.bias"


@pytest.mark.parametrize("change, widths, says", [
    (dict, (3, 3, 3), "2 strided.*expected 3"), (lambda s: None, (3, 3), "lack fc.weight"),
    (lambda s: {k: v for k, v in s.items() if k != GLA_FC}, (3, 3), "lack fc.weight"),
    (lambda s: {**s, "extra.weight": torch.zeros(1)}, (3, 3), "unexpected extra.weight"),
    (lambda s: {k: v for k, v in s.items() if k != GLA_BN}, (3, 3), "data_bn.bias is missing"),
    (lambda s: {**s, GLA_FC: s[GLA_FC][:, :, 0]}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_FC: s[GLA_FC].expand(3, 8, 5)}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_FC: s[GLA_FC][:, :0]}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_FC: None}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_FC: s[GLA_FC].int()}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_PA: torch.tensor(0.0)}, (3, 3), "PA"),
    (lambda s: {**s, GLA_PA: s[GLA_PA][0, 0]}, (3, 3), "PA"),
    (lambda s: {**s, GLA_PA: "x"}, (3, 3), "PA"),
    (lambda s: {**s, GLA_TCN: 3.0}, (3, 3), "tcn1.conv"),
    (lambda s: {**s, "layers_tcngcn.": s[GLA_PA]}, (3, 3), "2.5 strided"),
    (lambda s: {**s, 7: s[GLA_PA]}, (3, 3), "7"), (lambda s: [], (3, 3), "fc.weight"),
    (dict, 3, "filter_widths"), (dict, (3.0, 3), "filter_widths")])
def test_glagcn_weights_of_something_else_are_refused(change, widths, says):
    with pytest.raises(ValueError, match=says):
        glagcn.from_released(change(released_glagcn(17, 2)), widths)
    with pytest.raises(ValueError, match=r"0\.\.14"):
        glagcn.from_released(released_glagcn(15, 1), (3,))


# ---- glagcn: the graph


@given(st.integers(2, 9), st.data())
@settings(max_examples=25)
def test_partition(joints, draw):
    parents = [draw.draw(st.integers(0, joint - 1)) for joint in range(1, joints)]
    edges = [(parent, joint + 1) for joint, parent in enumerate(parents)]
    A = glagcn.spatial_partition(edges, joints)
    assert torch.equal(A[0], torch.eye(joints, dtype=torch.float64))
    for joint, other in np.ndindex(joints, joints):
        # a child takes its parent's feature, a parent the mean of its children's
        children = [c for p, c in edges if p == joint]
        assert A[1, other, joint] == (joint > 0 and other == parents[joint - 1])
        assert A[2, other, joint] == (1 / len(children) if other in children else 0)
    symmetric = glagcn.spatial_partition(edges, joints, "symmetric")
    for k in range(3):
        plain = (A[k] > 0).double()
        degree = [sum(plain[i].tolist()) + 0.001 for i in range(joints)]
        for i, j in np.ndindex(joints, joints):
            want = plain[i, j].item() / math.sqrt(degree[i] * degree[j])
            assert symmetric[k, i, j].item() == pytest.approx(want)


@pytest.mark.parametrize("edges, joints", [
    (glagcn.H36M_EDGES, 17), (glagcn.HUMANEVA15_EDGES, 15), (glagcn.MPI3DHP_EDGES, 17)])
def test_edges_connect_every_joint_once(edges, joints):
    assert len(set(map(frozenset, edges))) == joints - 1
    sums = glagcn.spatial_partition(edges, joints).sum(-2)
    assert ((sums - 1).abs() < 1e-12).logical_or(sums == 0).all() and (sums[0] == 1).all()
    if joints == 17:  # trees: every joint but the root has one parent
        assert len({child for _, child in edges}) == 16
    else:  # the released list: links up and links down, so joint 1 is a child three times
        assert [child for _, child in edges].count(1) == 3
    model = glagcn.GLAGCN(joints, edges, (3,), 4)
    assert model(torch.randn(2, 3, joints, 2)).shape == (2, joints, 3)


@pytest.mark.parametrize("edges, message", [
    (((0, 1), (1, 3)), r"\(1, 3\).*0\.\.2"), (((0, 1), (-1, 2)), r"\(-1, 2\).*0\.\.2"),
    (((0, 1),), r"joints \[2\]"), ((), r"joints \[1, 2\]"), (((0, 1), (1, 2), (2, 2)), r"\(2, 2\)"),
    (((0, 1), (1, 2.0)), r"\(1, 2\.0\)"), (((0, 1), (1, "2")), r"\(1, '2'\)"),
    (((0, 1), (1, 2, 0)), r"\(1, 2, 0\)")])
def test_bad_edges_are_named(edges, message):
    with pytest.raises(ValueError, match=message):
        glagcn.GLAGCN(3, edges, (3,), 4)


def test_cycles_are_fine_and_an_unknown_normalisation_is_not():
    assert glagcn.spatial_partition(((0, 1), (1, 2), (2, 0)), 3).shape == (3, 3, 3)
    again = glagcn.spatial_partition(iter(glagcn.H36M_EDGES), 17)
    assert torch.equal(again, glagcn.spatial_partition(glagcn.H36M_EDGES, 17))
    with pytest.raises(ValueError, match="rows.*symmetric"):
        glagcn.spatial_partition(((0, 1),), 2, "rows")


@pytest.mark.parametrize("normalisation", ["column", "symmetric"])
def test_every_layer_has_the_partition_it_was_asked_for_to_the_last_bit(normalisation):
    def build():
        return glagcn.GLAGCN(
            filter_widths=(3,), channels=4, reconstruct=True, normalisation=normalisation)

    want = glagcn.spatial_partition(glagcn.H36M_EDGES, 17, normalisation)
    halved = copy.deepcopy(build()).half().double()
    for model, A in ((build(), want.float()), (build().double(), want), (halved, want)):
        graphs = [m.A for m in model.modules() if isinstance(m, glagcn.AdaptiveGraphConv)]
        assert len(graphs) == 1 + 3 + 1 + 2 and all(torch.equal(graph, A) for graph in graphs)
        assert not any(name.endswith("A") for name in model.state_dict())
    state = {key: value.double() for key, value in released_glagcn(17, 1).items()}
    released = glagcn.from_released(state, (3,)).strided[0].second.spatial.A
    assert torch.equal(released, glagcn.spatial_partition(glagcn.H36M_EDGES, 17))


# ---- glagcn: adaptive graph convolution


def graph_conv(c_in, c_out, joints=4, **options):
    torch.manual_seed(c_in * 10 + c_out)
    A = glagcn.spatial_partition([(i, i + 1) for i in range(joints - 1)], joints)
    conv = glagcn.AdaptiveGraphConv(c_in, c_out, A, dropout=0.0, **options)
    return shake(conv, dtype=torch.float64)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans(),
       st.booleans())
@settings(max_examples=25)
def test_graph_convolution_against_loops(joints, c_in, c_out, frames, adaptive, training):
    """Eq. 2 and 3 in loops over subsets and joints, both orders of W_k, values and gradients."""
    conv = graph_conv(c_in, c_out, joints, adaptive=adaptive).train(training)
    n, A, B = conv.embedding, conv.A, conv.B
    x = torch.randn(3, c_in, joints, frames, dtype=torch.float64, requires_grad=True)
    total = 0
    for k in range(3):
        mixed = []
        for j in range(joints):
            graph = A[k, :, j] * B[k, :, j]
            if adaptive:
                rows = (slice(k * n, k * n + n), slice((3 + k) * n, (3 + k) * n + n))
                theta, phi = [torch.einsum("ec,bcjt->bejt", conv.embed.weight[part, :, 0, 0], x)
                              + conv.embed.bias[part][:, None, None] for part in rows]
                scores = [(theta[:, :, i] * phi[:, :, j]).sum((1, 2)) for i in range(joints)]
                scores = (torch.stack(scores, 1) / (n * frames)).exp()
                graph = A[k, :, j] + B[k, :, j] + scores / scores.sum(1, keepdim=True)
            mixed.append((graph.view(-1, 1, joints, 1) * x).sum(2))
        weight, bias = conv.W[:, :, k, 0], conv.bias[k]
        total = total + torch.einsum("oc,bcjt->bojt", weight, torch.stack(mixed, 2))
        total = total + bias[:, None, None]
    norm = copy.deepcopy(conv.norm)
    want = F.relu(norm(total) + copy.deepcopy(conv.shortcut)(x))
    last = x.contiguous(memory_format=torch.channels_last)
    push = torch.randn_like(want)
    plain, = torch.autograd.grad((want * push).sum(), x)
    for got in (conv.reference(x), conv(x), conv(last)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        mine, = torch.autograd.grad((got * push).sum(), x)
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("c_in, c_out", [(2, 8), (5, 5), (8, 3)])
@pytest.mark.parametrize("adaptive", [True, False])
def test_reference_gives_what_forward_gives(c_in, c_out, adaptive):
    conv = graph_conv(c_in, c_out, adaptive=adaptive).train()
    x, results = torch.randn(3, c_in, 4, 5, dtype=torch.float64), []
    for form in (conv, conv.reference):
        conv.zero_grad()
        conv.norm.reset_running_stats()
        out = form(x)
        out.square().sum().backward()
        gradients = [p.grad for p in conv.parameters() if p.grad is not None]
        results.append([out, conv.norm.running_mean.clone(), *(g.clone() for g in gradients)])
    assert len(results[0]) == len(results[1]) >= 7
    for mine, plain in zip(*results):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)
    conv, x = conv.float(), x.float()
    assert (conv(x) - conv.reference(x)).norm() < 1e-5 * conv(x).norm()


def test_st_gcn_is_the_fixed_graph_times_edge_importance():
    conv, x = graph_conv(3, 3, adaptive=False), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert conv.embed is None and torch.equal(conv.graph(x), conv.A * conv.B)
    fresh = glagcn.AdaptiveGraphConv(3, 3, conv.A, adaptive=False)
    assert torch.equal(fresh.graph(x), fresh.A)


def test_columns_of_C_sum_to_one():
    conv, x = graph_conv(6, 8), torch.randn(3, 6, 4, 7, dtype=torch.float64)
    C = conv.graph(x) - conv.A - conv.B
    assert (C.sum(-2) - 1).abs().max() < 1e-12 and (C > 0).all()
    assert (C.sum(-1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("c_in, c_out", [(4, 4), (8, 4)])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_moving_B_moves_its_subset_alone(c_in, c_out, k):
    conv, x = graph_conv(c_in, c_out), torch.randn(2, c_in, 4, 3, dtype=torch.float64)
    seen = []
    conv.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        conv(x)
        conv.B[k, 1, 2] += 0.5
        conv(x)
    change = torch.zeros_like(seen[0])
    change[:, :, 2] = 0.5 * torch.einsum("oc,bct->bot", conv.W[:, :, k, 0], x[:, :, 1])
    assert (seen[1] - seen[0] - change).abs().max() < 1e-12 and change.abs().max() > 0


# ---- glagcn: the network


def tiny_gla(joints=3, widths=(3, 3), channels=4, **options):
    edges = [(joint, joint + 1) for joint in range(joints - 1)]
    return glagcn.GLAGCN(joints, edges, widths, channels, **options)


odd_widths = st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3)


@given(odd_widths.filter(lambda widths: max(widths) > 1), st.integers(1, 5), st.integers(1, 9),
       st.booleans(), st.sampled_from(["stride", "mean"]))
@settings(max_examples=12)
def test_any_odd_widths_end_at_one_frame(widths, joints, channels, causal, temporal):
    model = tiny_gla(joints, widths, channels, causal=causal, temporal=temporal).eval()
    T, left = math.prod(widths), []
    assert model.receptive_field == T
    model.strided[-1].register_forward_hook(lambda module, inputs, output: left.append(output))
    pose = model(torch.randn(2, T, joints, 2))
    assert pose.shape == (2, joints, 3)
    assert left[0].shape == (2, channels, joints, 1 if temporal == "stride" else T)
    mean = sum(left[0].unbind(-1)) / left[0].shape[-1]
    assert torch.allclose(pose, model.head(mean.transpose(1, 2)), atol=1e-5)
    for wrong in (T + 1, 3 * T):
        sizes = rf"2, {wrong}, {joints}, 2\).*batch, {T}, {joints}, 2\)"
        with pytest.raises(ValueError, match=sizes):
            model(torch.randn(2, wrong, joints, 2))


@pytest.mark.parametrize("shape", [(2, 9, 16, 2), (2, 9, 17, 3), (9, 17, 2), (2, 17, 9, 2)])
def test_wrong_shapes_name_both_sizes(shape):
    with pytest.raises(ValueError) as error:
        glagcn.GLAGCN(filter_widths=(3, 3), channels=4)(torch.zeros(shape))
    assert str(tuple(shape)) in str(error.value) and "(batch, 9, 17, 2)" in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(filter_widths=(3, 2)), "width 2"), (dict(filter_widths=(0,)), "width 0"),
    (dict(filter_widths=(-3,)), "width -3"), (dict(filter_widths=()), "filter_widths"),
    *((dict(filter_widths=widths), f"filter_widths: {re.escape(repr(widths))}")
      for widths in ((1,), [1, 1], (3.0,), (None,), 3, None)),
    *((dict(unshared_weight=value), str(value)) for value in (1.5, -0.1, float("nan"))),
    (dict(unshared_weight=7, head="full"), "unshared_weight 7"),
    (dict(unshared_weight=float("nan"), head="full"), "nan"),
    *((dict(channels=value), f"channels: {value}") for value in (0, -4, 4.0)),
    *((dict(reconstruct_blocks=value), f"reconstruct_blocks: {value}") for value in (-1, 0.5)),
    (dict(temporal="max"), "'max'.*stride.*mean"), (dict(head="none"), "'none'.*individual.*full"),
    (dict(normalisation="rows"), "'rows'.*column.*symmetric")])
def test_bad_glagcn_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        glagcn.GLAGCN(**{"channels": 4, **options})


@pytest.mark.parametrize("options", [
    dict(), dict(head="full", temporal="mean", input_norm=False), dict(adaptive=False)])
def test_an_empty_batch_gives_an_empty_batch(options):
    model = tiny_gla(reconstruct=True, **options).eval()
    pose, sequence = model(torch.zeros(0, 9, 3, 2), return_sequence=True)
    assert pose.shape == (0, 3, 3) and sequence.shape == (0, 9, 3, 3)


def test_parameter_counts():
    """Table 5 of the paper and the release: 0.84, 1.10, 1.35, 1.88 and 48.64 M."""
    with torch.device("meta"):  # no need to fill 48 million numbers
        for widths, want in (((3,) * 3, 844_076), ((3,) * 4, 1_096_466), ((3,) * 5, 1_348_856)):
            assert size(glagcn.GLAGCN(filter_widths=widths, unshared_weight=0.0)) == want
        refinement = size(glagcn.Refinement(17))
        assert refinement == 140_322
        for channels, weight, want in ((96, 0.5, 1_876_886), (512, 0.5, 48_641_526),
                                       (96, 1.0, 1_876_595), (512, 1.0, 48_639_987)):
            model = glagcn.GLAGCN(channels=channels, reconstruct=True, unshared_weight=weight)
            assert size(model) + refinement == want


def test_input_norm_is_the_first_thing_and_can_be_left_out():
    torch.manual_seed(0)
    model = shake(tiny_gla(), dtype=torch.float64)
    bare = tiny_gla(input_norm=False).double().eval()
    kept = {key: value for key, value in model.state_dict().items() if "data_norm" not in key}
    bare.load_state_dict(kept)
    x = torch.randn(4, 9, 3, 2, dtype=torch.float64)
    flat = normalised(x.flatten(2).transpose(1, 2), model.data_norm).transpose(1, 2)
    torch.testing.assert_close(model(x), bare(flat.reshape(x.shape)))


def test_glagcn_starts_as_released():
    torch.manual_seed(0)
    model = glagcn.GLAGCN(filter_widths=(3,), channels=96, unshared_weight=0.0)
    conv, embed = model.strided[0].first.spatial, model.strided[0].first.spatial.embed
    assert (conv.B == 1e-6).all() and (conv.norm.weight == 1e-6).all()
    assert (conv.bias == 0).all() and (embed.bias == 0).all()
    temporal = model.strided[0].first.temporal.weight
    for weight, fan in ((conv.W, 96 * 96 * 3), (embed.weight, 24), (temporal, 96 * 9),
                        (model.expand.shortcut[0].weight, 96), (model.head.W_shared, 3)):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.1)
    assert conv.dropout.p == 0.1 and model.expand.norm.weight.eq(1).all()


def test_scheduled_norms_leave_the_changing_shortcuts_out():
    model = glagcn.GLAGCN(filter_widths=(3,), channels=4)
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    every = [module for module in model.modules() if isinstance(module, kinds)]
    assert len(every) == 1 + 2 * 3 + 2
    left = {*every} - {*model.scheduled_norms()}
    assert left == {model.expand.shortcut[1], model.expand.spatial.shortcut[1]}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_individual_layers(weight):
    head = shake(glagcn.IndividuallyConnected(5, 4, unshared_weight=weight), dtype=torch.float64)
    v = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert (head.W is None) == (weight == 0) and (head.W_shared is None) == (weight == 1)
    out = head(v)
    for b, i in np.ndindex(2, 4):
        want = 0
        if weight > 0:
            want = want + weight * (v[b, i] @ head.W[i] + head.b[i])
        if weight < 1:
            want = want + (1 - weight) * (v[b, i] @ head.W_shared + head.b_shared)
        assert (out[b, i] - want).abs().max() < 1e-12
    # it never sees another joint's features
    gradient, = torch.autograd.grad(out[:, 2].sum(), v, retain_graph=True)
    assert (gradient[:, [0, 1, 3]] == 0).all() and (gradient[:, 2] != 0).all()
    if weight == 1:
        assert (torch.autograd.grad(out[:, 2].sum(), head.W)[0][[0, 1, 3]] == 0).all()
    same = head(v[:, :1].expand(2, 4, 5))  # the same features in every joint
    assert torch.equal(same[:, 0], same[:, 3]) == (weight == 0)


def test_full_head_mixes_joints():
    model = glagcn.GLAGCN(filter_widths=(3,), channels=4, head="full")
    assert size(model.head) == 17 * 4 * 17 * 3 + 17 * 3
    v = torch.randn(1, 17, 4, requires_grad=True)
    gradient, = torch.autograd.grad(model.head(v)[:, 2].sum(), v)
    assert (gradient != 0).all()


def test_reconstruction_and_stage_two():
    torch.manual_seed(0)
    model = glagcn.GLAGCN(filter_widths=(3, 3), channels=8, reconstruct=True)
    x, zeros = torch.randn(4, 9, 17, 2), torch.zeros(4, 17, 3)
    pose, sequence = model(x, return_sequence=True)
    assert pose.shape == (4, 17, 3) and sequence.shape == (4, 9, 17, 3)
    assert len(model.reconstruction) == 3
    for coordinate in sequence.unbind(-1):  # no ReLU after the last sum
        assert coordinate.min() < -0.1 and coordinate.max() > 0.1
    whole = glagcn.mean_distance(sequence, torch.zeros_like(sequence))
    (glagcn.mean_distance(pose, zeros) + whole).backward()
    assert all(p.grad is not None for p in model.parameters())
    for name, parameter in model.sequence_head.named_parameters():
        assert "weight" not in name or parameter.grad.abs().sum() > 0
    model.zero_grad()
    model.sequence_head.register_forward_hook(lambda *_: pytest.fail("no sequence is needed here"))
    glagcn.mean_distance(model(x), zeros).backward()  # stage two: the local loss alone
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("sequence_head.")


@pytest.mark.parametrize("taps", [1, 9])
def test_sequence_is_aligned_with_its_frames(taps):
    """Where no graph mixes frames: with one tap a frame of the sequence depends on the same frame
    alone; with nine, two blocks see eight frames to either side."""
    model = tiny_gla(widths=(3, 7), reconstruct=True, reconstruct_blocks=0, adaptive=False)
    shake(model)
    for block in (model.expand, model.sequence_head):
        half = taps // 2
        block.temporal.weight.data[..., :4 - half] = 0
        block.temporal.weight.data[..., 5 + half:] = 0
    x = torch.randn(4, 21, 3, 2, requires_grad=True)
    sequence = model(x, return_sequence=True)[1]
    reach = torch.autograd.grad(sequence[:, 9].sum(), x)[0].abs().sum((0, 2, 3))
    seen = range(9, 10) if taps == 1 else range(1, 18)
    assert reach.nonzero().flatten().tolist() == list(seen)


@pytest.mark.parametrize("options", [dict(), dict(reconstruct=True, causal=True)])
def test_no_sequence_without_reconstruction_or_with_causal(options):
    with pytest.raises(ValueError, match="reconstruct=True and causal=False"):
        tiny_gla(**options)(torch.zeros(1, 9, 3, 2), return_sequence=True)


def edge_padded_windows(video, T, causal):
    """Windows (N, T, J, 2) about, or with causal ending at, every frame of (N, J, 2)."""
    frames = torch.arange(len(video))[:, None] + torch.arange(T) - (T - 1 if causal else T // 2)
    return video[frames.clamp(0, len(video) - 1)]


@pytest.mark.parametrize("temporal", ["stride", "mean"])
def test_causal_pose_never_depends_on_later_frames(temporal):
    torch.manual_seed(0)
    for causal in (True, False):
        model = shake(tiny_gla(causal=causal, temporal=temporal))
        video = torch.randn(20, 3, 2)
        later = video.clone()
        later[12:] += torch.randn(8, 3, 2)
        before, after = (model(edge_padded_windows(v, 9, causal)) for v in (video, later))
        changed = (before - after).abs().amax((1, 2)) > 0
        assert changed[12:].all() and changed[:12].any() != causal
    x = torch.randn(1, 9, 3, 2, requires_grad=True)  # a change of the frame itself shows
    model = shake(tiny_gla(causal=True, temporal=temporal))
    assert torch.autograd.grad(model(x).sum(), x)[0][0, 8].abs().sum() > 0


@pytest.mark.parametrize("options", [
    dict(), dict(reconstruct=True, head="full", input_norm=False),
    dict(adaptive=False, unshared_weight=1.0)])
def test_glagcn_state_round_trip(options, tmp_path):
    model, other = shake(tiny_gla(**options)), tiny_gla(**options).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    x = torch.randn(2, 9, 3, 2)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(x), other(x))


def test_glagcn_can_be_exported_and_autocast():
    model = shake(glagcn.GLAGCN(filter_widths=(3, 3), channels=8, reconstruct=True))
    x = torch.rand(2, 9, 17, 2) * 2 - 1
    want = model(x)
    exported = torch.export.export(model, (x,)).module()(x)
    assert (exported - want).abs().max() < 1e-5 * want.abs().max()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        pose, sequence = model(x, return_sequence=True)
        loss = pose.float().square().mean() + sequence.float().square().mean()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x).float()
    assert (rounded - model(x)).abs().max() < 0.3 * want.abs().max()


# ---- glagcn: refinement


def project_by_scalars(points, intrinsics):
    """The Human3.6M camera model, point by point."""
    fx, fy, cx, cy, k1, k2, k3, p1, p2 = intrinsics.tolist()
    out = torch.zeros(len(points), 2, dtype=points.dtype)
    for i, (x, y, z) in enumerate(points.tolist()):
        x, y = x / z, y / z
        r2 = x * x + y * y
        bend = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + p1 * x + p2 * y
        out[i] = torch.tensor([fx * (x * bend + p1 * r2) + cx, fy * (y * bend + p2 * r2) + cy])
    return out


def test_refinement():
    torch.manual_seed(0)
    net = glagcn.Refinement(17).double().eval()
    lens = [1145, 1143.8, 512.5, 515.5, -0.2071, 0.2478, -0.0031, -0.00098, -0.00142]
    intrinsics = torch.tensor([lens] * 3, dtype=torch.float64)
    root = torch.tensor([[0.3, -0.2, 4.5]]).double().repeat(3, 1)
    pose = torch.rand(3, 17, 3, dtype=torch.float64) - 0.5
    seen = [project_by_scalars(p + r, k) for p, r, k in zip(pose, root, intrinsics)]
    uv = torch.stack(seen)
    # exact in, exact out, whatever the blend
    assert (net(pose, uv, intrinsics, root) - pose).abs().max() < 1e-6
    wrong = (pose + 0.1 * torch.randn_like(pose)).requires_grad_()
    wrong.data[..., 2] = pose[..., 2]
    out = net.train()(wrong, uv, intrinsics, root)
    assert out.shape == (3, 17, 3) and torch.equal(out[..., 2], wrong[..., 2])
    ratio = ((out - pose) / (wrong - pose))[..., :2]
    assert ((ratio > 0) & (ratio < 1)).all()  # between the prediction and the exact projection
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert (wrong.grad[..., 2] != 0).all()


def test_mean_distance():
    prediction = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    loss = glagcn.mean_distance(prediction, torch.zeros(1, 2, 3))
    loss.backward()
    assert loss.item() == 2.5 and torch.isfinite(prediction.grad).all()


# --------------------------------------------------------------------------------------------------
# data.py: skeletons, cameras, normalisation

def test_skeletons_are_trees_and_mirror_themselves():
    for s in SKELETONS.values():
        assert len(s.joints) == len(s.parents) == len(set(s.joints)) == int(s.name[-2:])
        assert len(s.edges) == len(s.joints) - 1
        for joint in range(len(s.joints)):  # every joint hangs on the root
            for _ in s.joints:
                joint = joint if s.parents[joint] < 0 else s.parents[joint]
            assert joint == s.root
        for left, right in zip(s.left, s.right, strict=True):
            assert s.joints[left].replace("left", "right") == s.joints[right] != s.joints[left]
        assert sum("left" in name or "right" in name for name in s.joints) == 2 * len(s.left)
    assert H17.joints == tuple(SKELETONS["h36m32"].joints[j] for j in data.H36M_17_OF_32)


def test_projection_golden():
    camera = (2.290598750114441, 2.287562370300293, 0.025083, 0.028902752, -0.2070989, 0.2477752,
              -0.00307515, -0.0009757, -0.00142447)
    points = [(0.556496, 0.77698, 4.762983), (-0.287271, 0.056565, 3.953001)]
    want = [(0.2904045110107589, 0.39884800114767477), (-0.14121131996107592, 0.061583187059144076)]
    assert_allclose(data.project(np.array(points), camera), want, atol=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(0, 3))
def test_projection_against_scalars(point, camera):
    point[2] = abs(point[2]) + 0.5
    fx, fy, cx, cy, k1, k2, k3, p1, p2 = data.H36M_INTRINSICS[camera]
    x, y = (max(-1.0, min(1.0, v / point[2])) for v in point[:2])
    r2 = x * x + y * y
    gain = 1 + k1 * r2 + k2 * r2 ** 2 + k3 * r2 ** 3 + p1 * x + p2 * y
    want = fx * (x * gain + p1 * r2) + cx, fy * (y * gain + p2 * r2) + cy
    got = data.project(np.array([point]), data.H36M_INTRINSICS[camera])[0]
    assert_allclose(got, want, rtol=1e-12)


def plain_camera(world, extrinsics):
    """World points in a camera's frame by its rotation's entries, without data.py's functions."""
    w, x, y, z = np.array(extrinsics[:4]) / np.linalg.norm(extrinsics[:4])
    R = np.array([[w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
                  [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
                  [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z]])
    return (world.astype(float) - extrinsics[4:]) @ R


def test_world_to_camera_and_back():
    world = np.random.default_rng(0).normal(size=(5, 17, 3))
    rigs = [*data.H36M_EXTRINSICS.values(), *data.HUMANEVA_EXTRINSICS.values()]
    for extrinsics in (extrinsics for rig in rigs for extrinsics in rig):
        camera = data.world_to_camera(world, extrinsics)
        assert_allclose(camera, plain_camera(world, extrinsics), atol=1e-9)
        assert_allclose(data.camera_to_world(camera, extrinsics), world, atol=1e-12)
        assert camera[..., 2].min() > 0
        below = data.world_to_camera(np.array(extrinsics[4:]) - [0, 0, 1], extrinsics)
        assert below[1] > 0.9  # y is down


def test_normalise_rules():
    p, size = np.array([[0.0, 0.0], [640, 480], [320, 240]], np.float32), (640, 480)
    for points, size, rule, want in [
            (p, size, "width", [[-1, -0.75], [1, 0.75], [0, 0]]),
            (p[:1], (480, 640), "longest", [[-0.75, -1]]),
            (p[:1], (480, 640), "width", [[-1, -640 / 480]]),
            (p, size, "release-500", (p - 500) / 500)]:
        for values in (points, torch.from_numpy(points)):
            got = data.normalise(values, size, rule)
            assert got.dtype == values.dtype
            assert_allclose(got, want, atol=1e-7)
    rejected("height", data.normalise, p, size, "height")
    other = [(1000, 1002), (2048, 2048)]
    assert data.fitting_rule("release-500", other[:1]) == "release-500"
    assert data.fitting_rule("release-500", other) == "longest"
    assert data.fitting_rule("width", other) == "width"


@given(st.sampled_from(sorted(SKELETONS)), st.sampled_from((2, 3)), st.integers(0, 99))
def test_flip_negates_x_and_swaps_sides(name, channels, seed):
    s = SKELETONS[name]
    pose = np.random.default_rng(seed).normal(size=(4, len(s.joints), channels))
    got, sign = data.flip(pose, s), [-1, 1, 1][:channels]
    assert_array_equal(data.flip(got, s), pose)
    assert_array_equal(data.flip(torch.from_numpy(pose), s), got)
    for left, right in [*zip(s.left, s.right), (s.root, s.root)]:
        assert_array_equal(got[:, left], pose[:, right] * sign)


# ---- the frame store

def small_sequences():
    rng, made = np.random.default_rng(0), []
    for i, n in enumerate((7, 1, 4)):
        pose = rng.normal(0, 0.3, (n, 17, 3)).astype(np.float32)
        pose[:, 0] = 0
        root = (rng.normal(0, 0.3, (n, 3)) + [0, 0, 4]).astype(np.float32)
        camera = data.H36M_INTRINSICS[i].astype(np.float32)
        pixels = data.project((pose + root[:, None]).astype(float), camera).astype(np.float32)
        made.append(Sequence(f"S{i}", f"walk {i}", "54138969", pixels, pose, root, camera,
                             data.H36M_SIZES[i], 50.0))
    return made


@settings(max_examples=60)
@given(st.integers(1, 12), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from(("camera", "uvd")), st.integers(0, 9))
def test_windows_of_the_frame_store_against_a_loop(frames, causal, flips, whole, target, seed):
    sequences = small_sequences()
    store = FrameStore(sequences, "width", H17, target=target)
    assert len(store) == 12 and store.sequence.tolist() == [0] * 7 + [1] + [2] * 4
    index = torch.randint(0, 12, (9,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(9) % 2 == 0 if flips else None
    pose, goal = store.batch(index, frames, causal, mask, whole)
    for b, i in enumerate(index.tolist()):
        number = store.sequence[i]
        first, s = (0, 7, 8)[number], sequences[number]
        poses, goals = data.normalise(s.pose_2d, s.size, "width"), s.pose_3d
        if target == "uvd":
            goals = store.target[first:first + len(poses)].numpy()
        if flips and b % 2 == 0:
            poses, goals = data.flip(poses, H17), data.flip(goals, H17)
        window = []
        for step in range(frames):
            at = i - first + step - (frames - 1 if causal else frames // 2)
            window.append(min(max(at, 0), len(poses) - 1))
        wanted = window if whole and frames > 1 else [i - first]
        assert_allclose(pose[b].reshape(-1, 17, 2), poses[window], atol=1e-6)
        assert_allclose(goal[b].reshape(-1, 17, 3), goals[wanted], atol=1e-6)
    assert pose.shape == ((9, 17, 2) if frames == 1 else (9, frames, 17, 2))
    assert goal.shape == ((9, frames, 17, 3) if whole and frames > 1 else (9, 17, 3))


@pytest.mark.parametrize("rule", ["release-500", "width", "longest"])
def test_uvd_is_a_pinhole_and_comes_back(rule):
    store, index = FrameStore(small_sequences(), rule, H17, target="uvd"), torch.tensor([8, 0, 7])
    back = store.to_camera(store.target[index], index)
    assert (back - store.pose_3d[index]).abs().max() < 5e-6
    s = store.sequences[2]
    fx, _, cx, *_ = s.intrinsics.astype(float)
    x, _, z = (s.pose_3d + s.root[:, None])[0, 5].astype(float)
    u = data.normalise(np.array([fx * x / z + cx, 0.0]), s.size, rule)[0]
    assert_allclose(store.target[8, 5, [0, 2]], [u, s.pose_3d[0, 5, 2]], atol=1e-6)
    k = store.normalised_intrinsics(index)[0].double()
    assert k[0] * x / z + k[2] == pytest.approx(u, abs=1e-6)
    plain = FrameStore(small_sequences(), rule, H17)
    assert torch.equal(plain.to_camera(plain.target[index], index), plain.pose_3d[index])


class NothingFromTheHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on what would wait for a device, or copy to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not re.search("_local_scalar|_to_copy|lift_fresh|nonzero|item", name), name
        return function(*args, **(kwargs or {}))


def test_batches_need_nothing_from_the_host():
    store = FrameStore(small_sequences(), "width", H17, target="uvd")
    index, mask = torch.tensor([11, 0, 7, 3]), torch.tensor([True, False, True, False])
    with NothingFromTheHost():
        for frames in (1, 9):
            pose, target = store.batch(index, frames, flip=mask)
        store.to_camera(target, index)
        store.normalised_intrinsics(index)
        data.flip(pose, H17)


@pytest.mark.parametrize("change, name", [
    (dict(sequences=[]), "no sequences"), (dict(skeleton=SKELETONS["humaneva15"]), "humaneva15"),
    (dict(target="depth"), "depth"), (dict(rule="height"), "height"),
    (dict(target="uvd"), "S1 walk 1"), (dict(cameras="random"), "S0 walk 0")])
def test_the_frame_store_refuses(change, name):
    sequences = small_sequences()
    sequences[1].intrinsics = data.UNKNOWN_INTRINSICS
    options = {"sequences": sequences, "rule": "width", "skeleton": H17, **change}
    rejected(name, FrameStore, **options)


# ---- BVH

BVH_TINY = """HIERARCHY
ROOT Hips
{
  OFFSET 1 2 3
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Chest
  {
    OFFSET 0 1.5 0
    CHANNELS 4 Yrotation Yposition Zrotation Xrotation
    End Site
    {
      OFFSET 0.25 0.5 0
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.04
0 0 0 0 0 0  0 1.5 0 0
10 20 30 90 0 0  0 2 0 90
"""


@pytest.mark.parametrize("text", [
    BVH_TINY, "\ufeff" + BVH_TINY.replace("\n", "\r\n"), BVH_TINY.replace("\n", "\n\n"),
    BVH_TINY.replace("ROOT", "root").replace("JOINT", "Joint").replace("End Site", "END SITE"),
    BVH_TINY.replace("{\n", "{ ").replace("\n  }", " }").replace("Frames", "FRAMES"),
    BVH_TINY.replace("Site\n    {\n      OFFSET 0.25 0.5 0\n    }", "Site { OFFSET 0.25 0.5 0 }"),
    BVH_TINY.replace("\n{\n", " {\n").replace("90", "9.0e1").replace(" 0", "\t+0")])
def test_bvh_by_hand_and_odd_but_legal(tmp_path, text):
    (tmp_path / "tiny.bvh").write_bytes(text.encode())
    names, positions, fps = data.read_bvh(tmp_path / "tiny.bvh")
    assert names == ("Hips", "Chest", "Chest_end") and fps == pytest.approx(25)
    assert_allclose(positions[0], [[0, 0, 0], [0, 1.5, 0], [0.25, 2, 0]], atol=1e-12)
    # 90 degrees about z: up is -x; the Yposition of Chest replaces its OFFSET; its 90 about x
    # turns (.25, .5, 0) to (.25, 0, .5)
    assert_allclose(positions[1], [[10, 20, 30], [8, 20, 30], [8, 20.25, 30.5]], atol=1e-12)


def plain_turn(axis, degrees):
    """The rotation about an axis."""
    i, j = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}[axis]
    R, angle = np.eye(3), math.radians(degrees)
    R[i, i] = R[j, j] = math.cos(angle)
    R[i, j], R[j, i] = -math.sin(angle), math.sin(angle)
    return R


def plain_positions(joint, row, rotation=np.eye(3), origin=np.zeros(3)):
    """World positions of one frame (its values, which it uses up), joint by joint."""
    if len(joint) == 3:
        return [origin + rotation @ joint]
    _, offset, channels, children = joint
    offset, own = list(offset), np.eye(3)
    for channel in channels:
        value = row.pop(0)
        if channel.endswith("position"):
            offset["XYZ".index(channel[0])] = value
        else:
            own = own @ plain_turn(channel[0], value)
    place = origin + rotation @ offset
    below = [plain_positions(child, row, rotation @ own, place) for child in children]
    return [place, *(point for points in below for point in points)]


@st.composite
def bvh_skeletons(draw, depth=0):
    def shuffled(kind, least):
        axes = draw(st.permutations(["X", "Y", "Z"]))[:draw(st.integers(least, 3))]
        return [axis + kind for axis in axes]
    place = st.lists(st.integers(-9, 9), min_size=3, max_size=3)
    channels = draw(st.permutations(shuffled("rotation", 1) + shuffled("position", 0)))
    below = draw(st.integers(0, 2)) if depth < 2 else 0
    children = [draw(bvh_skeletons(depth + 1)) for _ in range(below)]
    name = f"j{draw(st.integers(0, 10 ** 9))}"
    return [name, draw(place), channels, children or [tuple(draw(place))]]


@given(bvh_skeletons(), st.integers(0, 99),
       st.tuples(st.sampled_from(("\n", "\r\n")), st.sampled_from((" ", "\t", "   ")),
                 st.sampled_from(("{:.9f}", "{:.12e}", "{:.10E}"))))
def test_bvh_of_any_channels_against_a_plain_loop(tmp_path_factory, skeleton, seed, writing):
    path = tmp_path_factory.mktemp("bvh") / "any.bvh"
    columns = len(re.findall("rotation|position", write_bvh(skeleton, [])))
    values = np.random.default_rng(seed).uniform(-180, 180, (3, columns))
    path.write_bytes(write_bvh(skeleton, values, *writing).encode())
    names, positions, fps = data.read_bvh(path)
    assert fps == pytest.approx(20) and names[0] == skeleton[0]
    for frame, row in enumerate(values.tolist()):
        assert_allclose(positions[frame], plain_positions(skeleton, row), atol=1e-5)


@pytest.mark.parametrize("old, new, names", [
    ("2 0 90\n", "2", ["frame 1", "channels"]), ("10 20 30 90 0 0  0 2 0 90\n", "", ["truncated"]),
    (BVH_TINY[BVH_TINY.index("MOTION"):], "", ["MOTION"]),
    (BVH_TINY, "", ["not a BVH file"]), (BVH_TINY, "\x89PNG\r\n\x1a\n", ["line 1"]),
    ("10 20", "ten 20", ["not a number"]), ("Frames: 2", "Frames: 1000000000000", ["2 frames"]),
    ("10 20", "nan 20", ["frame 1", "NaN"]),
    ("0 90\n", "0 90\n" + "1 " * 10 + "\n" + "2 " * 10, ["4 frames", "says 2"]),
    ("Frames: 2", "Frames: x", ["Frames: x"]), ("Frame Time: 0.04", "0.04 0", ["Frame Time:"]),
    ("Frame Time: 0.04", "Frame Time: 0", ["above 0"]), ("CHANNELS 4", "CHANNELS 5", ["line 9"]),
    ("OFFSET 0 1.5 0", "OFFSET 0 1.5", ["line 8"]), ("Yposition Zrot", "Yscale Zrot", ["line 9"]),
    ("OFFSET 0 1.5 0", "OFFSET 0 inf 0", ["line 8"])])
def test_bvh_bad_files_are_one_line(tmp_path, old, new, names):
    path = tmp_path / "bad.bvh"
    assert old in BVH_TINY
    path.write_text(BVH_TINY.replace(old, new))
    rejected([path, *names], data.read_bvh, path)


# ---- BVH clips to training pairs

def write_clips(folder, names=bandai_names(), change=str, seconds=0.05, **options):
    """Two people's clips, a.bvh and b.bvh; `change`: what is done to their text."""
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate("ab"):
        text = write_bvh(*person(names, seed, **options), seconds=seconds)
        (folder / f"{name}.bvh").write_text(change(text))


def test_a_bvh_row_more_than_the_header_counts_is_left_out_and_noted(tmp_path):
    write_clips(tmp_path)
    path = tmp_path / "a.bvh"
    path.write_text(path.read_text().replace("Frames:\t6", "Frames:\t5"))
    assert len(data.read_bvh(path)[1]) == 5
    status, out, err = command("data.py", "bvh", tmp_path, "--out", tmp_path, "--test", "^b")
    assert status == 0 and not err and "training 1 clips, 5 frames, test 1 clips, 6 frames" in out
    assert "a.bvh: 6 frames where its header says 5" in out.splitlines()[0]


BANDAI_ORDER = ["Hips", "UpperLeg_R", "LowerLeg_R", "Foot_R", "UpperLeg_L", "LowerLeg_L", "Foot_L",
                "Chest", "Neck", "Head", None, "UpperArm_L", "LowerArm_L", "Hand_L", "UpperArm_R",
                "LowerArm_R", "Hand_R"]


def open_benchmark_by_hand(path, rig):
    """(T, 17, 3) in a camera's frame, frame by frame, as the benchmark's description says."""
    names, raw, _ = data.read_bvh(path)
    joints = {name: raw[:, j] for j, name in enumerate(names)}
    bones = [(f"{a}_{side}", f"{b}_{side}") for side in "LR"
             for a, b in (("UpperLeg", "LowerLeg"), ("LowerLeg", "Foot"))]
    leg = np.mean([2 * math.dist(joints[a][0], joints[b][0]) for a, b in bones])
    joints = {name: places * 0.9 / leg for name, places in joints.items()}
    joints[None] = 2 * joints["Head"] - joints["Neck"]
    pelvis = joints["Hips"] - joints["Hips"].mean(0)
    assert np.abs(pelvis)[:, 0].max() > 1.5  # the clamp has work to do
    poses = []
    for t in range(len(raw)):
        shift = [min(max(pelvis[t, k], -1.5), 1.5) - joints["Hips"][t, k] for k in (0, 2)]
        pose = [(x + shift[0], -(z + shift[1]), y)
                for x, y, z in (joints[name][t] for name in BANDAI_ORDER)]
        poses.append(plain_camera(np.array(pose), rig))
    return np.array(poses)


def test_the_bvh_command_follows_the_open_benchmark(bvh_folder, tmp_path):
    out = tmp_path / "out"
    words = ["bvh", bvh_folder, "--out", out, "--name", "mine", "--test", "_old_"]
    status, said, err = command("data.py", *words)
    assert status == 0 and not err
    assert "training 6 clips, 54 frames, test 2 clips, 14 frames" in said
    assert sorted(os.listdir(out)) == ["data_2d_mine_gt.npz", "data_3d_mine.npz"]
    for name in os.listdir(out):  # plain arrays
        with np.load(out / name, allow_pickle=False) as archive:
            assert str(archive["made_by"]) == data.MADE_BY
            assert all(archive[key].dtype.kind != "O" for key in archive)
    clips = sorted(bvh_folder.iterdir())
    for split in ("train", "test"):
        sequences = data.load_mocap(out, "mine", split=split)
        chosen = [i for i, clip in enumerate(clips) if ("_old_" in clip.name) == (split == "test")]
        assert [s.camera for s in sequences] == list(data.H36M_CAMERAS) * len(chosen)
        for number, s in enumerate(sequences):
            i, c = chosen[number // 4], number % 4
            subject = ("S1", "S5", "S6", "S7", "S8", "S9", "S11")[i % 7]
            pose = open_benchmark_by_hand(clips[i], data.H36M_EXTRINSICS[subject][c])
            assert_allclose(s.pose_3d, pose - pose[:, :1], atol=1e-5)
            assert_allclose(s.root, pose[:, 0], atol=1e-5)
            assert_allclose(s.pose_2d, data.project(pose, data.H36M_INTRINSICS[c]), atol=1e-3)
            assert s.fps == pytest.approx(20) and s.size == data.H36M_SIZES[c]
            assert_allclose(s.intrinsics, data.H36M_INTRINSICS[c], rtol=1e-6)
        assert data.provenance(sequences).startswith("8 BVH clips")
    assert {(s.subject, s.action) for s in sequences} == {("Sold", "bow 001"), ("Sold", "walk 001")}


@pytest.mark.parametrize("options, named", [({}, True), (dict(scale=0.01), False)])
def test_the_open_benchmark_is_named_only_for_its_own_options(
        options, named, bvh_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "OPEN_BENCHMARK", (8, 54, 14))
    said = data.convert_bvh(bvh_folder, tmp_path, test="_old_", **options)
    assert said.startswith("open mocap benchmark") == named


def sided_names(trunk, limbs, prefix=""):
    parts = "hip knee ankle shoulder elbow wrist collar".split()
    names = dict(zip(("pelvis", "spine", "thorax", "neck"), trunk.split()))
    for side in ("left", "right"):
        both = zip(parts, limbs.split(), strict=True)
        names |= {f"{side}_{ours}": side.capitalize() + theirs for ours, theirs in both}
    return {ours: prefix + name for ours, name in names.items()}


LIMBS = "UpLeg Leg Foot Arm ForeArm Hand Shoulder"
CONVENTIONS = {
    "bandai": bandai_names(), "motionbuilder": sided_names("Hips Spine1 Neck1 Head", LIMBS),
    "3dsmax": sided_names("Hips Chest2 Neck Head", "Hip Knee Ankle Shoulder Elbow Wrist Collar"),
    "mixamo": sided_names("Hips Spine1 Neck Head", LIMBS, "mixamorig:")}


def distances(pose):
    return np.linalg.norm(pose[:, :, None] - pose[:, None], axis=-1)


@pytest.mark.parametrize("convention, end", [
    *((name, (0, 12, 0)) for name in CONVENTIONS), ("mixamo", (0, 0, 0)), ("3dsmax", (0, 0.01, 0))])
def test_bvh_conventions(convention, end, tmp_path):
    names = CONVENTIONS[convention]
    write_clips(tmp_path, names, end=end)
    data.convert_bvh(tmp_path, tmp_path, "one", "^b")
    found, raw, _ = data.read_bvh(tmp_path / "b.bvh")
    places = {ours: raw[:, found.index(theirs)] for ours, theirs in names.items()}
    places["head"] = raw[:, found.index(names["neck"] + "_end")]
    if convention == "bandai" or end[1] < 1:  # whose end sites mean nothing, or are the head itself
        places["head"] = 2 * places["neck"] - places["thorax"]
    theirs = distances(np.stack([places[joint] for joint in H17.joints], 1))
    ours = distances(data.load_mocap(tmp_path, "one", split="test")[0].pose_3d)
    assert_allclose(ours, theirs * (ours[0, 11, 12] / theirs[0, 11, 12]), atol=1e-4)


LAFAN1 = """Hips LeftUpLeg LeftLeg LeftFoot LeftToe RightUpLeg RightLeg RightFoot RightToe
    Spine Spine1 Spine2 Neck Head LeftShoulder LeftArm LeftForeArm LeftHand RightShoulder
    RightArm RightForeArm RightHand""".split()


def lafan1():
    """A BVH text with the joints, order and channels of a LAFAN1 file; the offsets are ours."""
    turns = ["Zrotation", "Yrotation", "Xrotation"]

    def chain(names, offset, *more):
        """Joints one below the other, each 20 along x of the last; `more` below the last."""
        below = list(more) or [(0, 0, 0)]
        for name in reversed(names[1:]):
            below = [[name, (20, 0, 0), turns, below]]
        return [names[0], offset, turns, below]
    arms = [chain(LAFAN1[a:a + 4], (18, x, 5)) for a, x in ((14, 1), (18, -1))]
    legs = [chain(LAFAN1[a:a + 4], (0.1, x, 10)) for a, x in ((1, 1), (5, -1))]
    spine = chain(LAFAN1[9:12], (7, 0, 0), chain(LAFAN1[12:14], (25, 0, 0)), *arms)
    values = np.random.default_rng(0).uniform(-5, 5, (4, 3 + 3 * len(LAFAN1)))
    values[:, [1, 3]] += 90  # up; the trunk's x is up
    values[:, [6, 18]] += 180  # a leg's x is down
    channels = ["Xposition", "Yposition", "Zposition", *turns]
    return write_bvh(["Hips", (0, 0, 0), channels, [*legs, spine]], values, seconds=1 / 30)


def test_a_lafan1_file_has_a_head(tmp_path):
    for name in ("walk1_subject1", "dance2_subject5"):
        (tmp_path / f"{name}.bvh").write_text(lafan1())
    names, _, fps = data.read_bvh(tmp_path / "walk1_subject1.bvh")
    assert [name for name in names if not name.endswith("_end")] == LAFAN1
    assert fps == pytest.approx(30)
    data.convert_bvh(tmp_path, tmp_path, test="subject5")
    s = data.load_mocap(tmp_path)[0]
    assert (s.subject, s.action) == ("subject1", "walk 1")
    assert_allclose(*np.diff(s.pose_3d[:, 8:11], axis=1).swapaxes(0, 1), atol=1e-6)
    assert min(distances(s.pose_3d)[:, a, b].min() for a, b in H17.edges) > 0.02


@pytest.mark.parametrize("joint, mapping, bones", [
    ("Head", {}, ["thorax", "neck"]), ("LowerArm_L", {}, ["left_shoulder", "left_elbow"]),
    ("UpperLeg_L", {}, ["pelvis", "left_hip"]), ("", {"spine": "Hips"}, ["pelvis", "spine"]),
    ("", {"left_knee": "LowerLeg_R"}, ["left_knee", "right_knee"]),
    ("", {"head": "Head"}, [])])
def test_bones_without_length_are_named(joint, mapping, bones, tmp_path):
    def without_length(text):
        return re.sub(rf"({joint}\s+{{\s+OFFSET) .*", r"\1 0 0 0", text) if joint else text
    write_clips(tmp_path, change=without_length)
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    words = ["bvh", tmp_path, "--test", "^b", "--map", tmp_path / "map.json", "--out", tmp_path]
    if bones:
        refused("data.py", *words, names=["a.bvh", "length", *bones])
    else:  # a head on the neck: the fallback is taken
        assert command("data.py", *words)[0] == 0
        assert distances(data.load_mocap(tmp_path)[0].pose_3d)[:, 9, 10].min() > 0.02


def several_people(prefixes, scene=False, horse=False):
    """A BVH text with two skeletons; the horse has no arms, and a neck."""
    people, values = [], []
    for seed, prefix in enumerate(prefixes):
        skeleton, rows = person({k: prefix + name for k, name in bandai_names().items()}, seed)
        if horse and seed:
            trunk = skeleton[3][0]
            trunk[3], rows = trunk[3][2:], rows[:, :6 + 3 + 6 + 18]
        people.append(skeleton)
        values.append(rows)
    values = np.concatenate(values, 1)
    if scene:
        return write_bvh(["Scene", (0, 0, 0), [], people], values)
    first, second = (write_bvh(skeleton, values).partition("MOTION") for skeleton in people)
    return first[0] + second[0].removeprefix("HIERARCHY\n") + first[1] + first[2]


@pytest.mark.parametrize("people, chooses", [
    (dict(prefixes=("", "")), []), (dict(prefixes=("", ""), scene=True), []),
    (dict(prefixes=("", "H_"), horse=True), ["Hips"]),
    (dict(prefixes=("A:", "B:"), scene=True), ["B", "B:", "B:Hips"])])
def test_more_than_one_skeleton_is_refused_or_chosen(people, chooses, tmp_path):
    for clip in "ab":
        (tmp_path / f"{clip}.bvh").write_text(several_people(**people))
    words = ["bvh", tmp_path, "--out", tmp_path, "--test", "^b"]
    refused("data.py", *words, names=["a.bvh", "skeleton", "--person", "Hips"])
    for name in ("Nobody", *(["Hips"] if not chooses else [])):
        refused("data.py", *words, "--person", name, names=["a.bvh", "--person"])
    names, raw, _ = data.read_bvh(tmp_path / "a.bvh")
    for name in chooses:
        assert command("data.py", *words, "--person", name)[0] == 0
        s, prefix = data.load_mocap(tmp_path)[0], "" if "horse" in people else "B:"
        theirs = [raw[:, names.index(prefix + joint)] for joint in BANDAI_ORDER if joint]
        theirs, ours = distances(np.stack(theirs, 1)), distances(np.delete(s.pose_3d, 10, 1))
        assert_allclose(ours, theirs * (ours[0, 1, 2] / theirs[0, 1, 2]), atol=1e-4)


def test_people_with_names_of_their_own_are_not_mixed(tmp_path):
    for clip in "ab":
        text = several_people(("", ""), scene=True)
        (tmp_path / f"{clip}.bvh").write_text(re.sub("JOINT ", "JOINT my_", text))
    mapping = {ours: f"my_{name}" for ours, name in bandai_names().items() if ours in H17.joints}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    words = ["bvh", tmp_path, "--test", "^b", "--map", tmp_path / "map.json", "--out", tmp_path]
    refused("data.py", *words, names=["a.bvh", "skeletons", "my_Hips"])


def z_up(text):
    """A BVH text of a person y up, the whole turned so that z is up: one root more."""
    root = "ROOT World\n{\nOFFSET 0 0 0\nCHANNELS 1 Xrotation\nJOINT Hips"
    text = text.replace("ROOT Hips", root).replace("MOTION", "}\nMOTION")
    head, _, rows = text.rpartition("Frame Time: 0.05\n")
    return head + "Frame Time: 0.05\n" + "".join(f"90 {row}\n" for row in rows.splitlines())


def test_the_wrong_axis_is_noticed(tmp_path):
    write_clips(tmp_path / "y", frames=60)
    write_clips(tmp_path / "z", frames=60, change=z_up)
    poses = []
    for up, other in ("yz", "zy"):
        words = ["bvh", tmp_path / up, "--out", tmp_path, "--test", "^b"]
        refused("data.py", *words, "--up", other, names=[".bvh", "head", f"--up {up}"])
        assert command("data.py", *words, "--up", up)[0] == 0
        poses.append(data.load_mocap(tmp_path)[0].pose_3d)
    assert_allclose(*poses, atol=1e-5)
    (tmp_path / "y" / "crawl.bvh").write_text((tmp_path / "z" / "a.bvh").read_text())
    words = ["bvh", tmp_path / "y", "--out", tmp_path, "--test", "^b"]
    status, out, err = command("data.py", *words)  # someone who really lies: a warning
    assert status == 0 and err.count("\n") == 1 and "crawl.bvh" in err and "2 clips" in out


def test_mapping_scale_rates_and_skipped_frames(tmp_path):
    names = {ours: f"bone{i}" for i, ours in enumerate(bandai_names())}
    clips = tmp_path / "clips"
    write_clips(clips, names, frames=13, seconds=1 / 30)  # recorded at 20
    (clips / "._a.bvh").write_bytes(b"\0\5\x16\7")  # what macOS leaves in archives
    words = ["bvh", clips, "--out", tmp_path, "--test", "^b"]
    refused("data.py", *words, names=["a.bvh", "--map"])
    assert not list(tmp_path.glob("*.npz"))
    mapping = {ours: name for ours, name in names.items() if "collar" not in ours}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    words += ["--map", tmp_path / "map.json", "--scale", "0.01", "--recorded-fps", "20"]
    found, raw, _ = data.read_bvh(clips / "b.bvh")
    raw = np.stack((raw[..., 0], -raw[..., 2], raw[..., 1]), -1) * 0.01
    for more, fps, rows in (["--skip", "2", "--fps", "10"], 10, raw[2::2]), ([], 20, raw):
        assert command("data.py", *words, *more)[0] == 0
        s = data.load_mocap(tmp_path, split="test")[2]
        assert s.fps == fps and len(s.pose_3d) == len(rows)
        points = s.pose_3d + s.root[:, None].astype(float)
        world = data.camera_to_world(points, data.H36M_EXTRINSICS["S5"][2])
        pelvis, knee = (rows[:, found.index(names[joint])] for joint in ("pelvis", "left_knee"))
        assert_allclose(world[:, 5] - world[:, 0], knee - pelvis, atol=1e-5)
        clamped = np.clip(pelvis - pelvis.mean(0), -1.5, 1.5)
        clamped[:, 2] = pelvis[:, 2]
        assert_allclose(world[:, 0], clamped, atol=1e-5)
        assert np.abs(clamped[:, :2]).max() == 1.5


@pytest.mark.parametrize("words, names", [
    ("", "folder"), ("CLIPS", "--test"), ("FOLDER/empty --test a", "no BVH files"),
    ("FOLDER/none --test a", "no such folder"), ("CLIPS --test=", "--test"),
    *((f"CLIPS --test old {option}", option.split()[0]) for option in (
        "--test nothing", "--test bvh", "--test (old", "--scale big", "--scale -1", "--scale nan",
        "--scale 1", "--scale 1e-5", "--fps 0", "--fps fast", "--recorded-fps 2000", "--skip -1",
        "--skip 1.5", "--skip 7", "--up x", "--volume 1", "--name a/b", "--map FOLDER/tail.json")),
    *((f"CLIPS --test old --map FOLDER/{name}", name) for name in ("list.json", "none", "text")),
    ("CLIPS --test old --map FOLDER/nose.json", "Nose"),
    ("CLIPS --test old --fps fast", "fast: expected a number above 0"),
    ("CLIPS --test old --out FOLDER/text/x", "text/x")])
def test_bvh_command_bad_input(words, names, bvh_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("{")
    for name, value in (("list", [1]), ("tail", {"tail": "Hips"}), ("nose", {"head": "Nose"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    words = words.replace("FOLDER", str(tmp_path)).replace("CLIPS", str(bvh_folder)).split()
    before = sorted(os.listdir(tmp_path))
    refused("data.py", "bvh", "--out", tmp_path / "out", *words, names=names)
    assert sorted(os.listdir(tmp_path)) == before


def test_mocap_files_that_disagree(bvh_folder, tmp_path):
    data.convert_bvh(bvh_folder, tmp_path, "mocap", "old")
    path = tmp_path / "data_2d_mocap_gt.npz"
    image = data.read_npz(path)
    wide = np.pad(image["positions_2d"], [(0, 0)] * 3 + [(0, 1)])
    np.savez(tmp_path / "data_2d_mocap_cpn.npz", **{**image, "positions_2d": wide})
    cpn, gt = data.load_mocap(tmp_path, keypoints="cpn"), data.load_mocap(tmp_path)
    for a, b in zip(cpn, gt, strict=True):  # the confidence is cut off
        assert_array_equal(a.pose_2d, b.pose_2d)
    rejected("validation", data.load_mocap, tmp_path, split="validation")
    rejected("data_2d_mocap_x.npz: not found", data.load_mocap, tmp_path, keypoints="x")
    for key, changed in (("positions_2d", np.s_[:, :-1]), ("clips", np.s_[::-1])):
        np.savez(path, **{**image, key: image[key][changed]})
        rejected([path.name, "clips"], data.load_mocap, tmp_path)
    np.savez(path, clips=image["clips"])
    rejected([path], data.load_mocap, tmp_path)


# ---- synthetic motion

@pytest.mark.parametrize("seed", [0, 1])
def test_synthetic_motion_is_neither_trivial_nor_noise(seed, synthetic):
    import eval as evaluation
    sequences = synthetic if seed == 0 else data.synthesize(seed)
    for held_out in (("S9", "S11"), ("S6",)):
        stores = [FrameStore([s for s in sequences if (s.subject in held_out) == test],
                             "release-500", H17) for test in (False, True)]
        found = evaluation.yardsticks(*stores)
        assert found["mean_pose"] > 120 and 40 < found["affine"] < 90, (held_out, found)


def test_synthetic_motion_is_a_function_of_its_seed(synthetic):
    some = [s for s in synthetic if s.subject in ("S1", "S5")]
    for a, b in zip(data.synthesize(0, subjects=("S1", "S5")), some, strict=True):
        assert a.action == b.action
        assert np.array_equal(a.pose_2d, b.pose_2d) and np.array_equal(a.pose_3d, b.pose_3d)
    assert not np.array_equal(data.synthesize(1, subjects=1)[0].pose_3d, synthetic[0].pose_3d)
    assert {s.action.split()[0] for s in synthetic} == set(data.MOTIONS)
    made = data.synthesize(0, subjects=3, motions=("walk",), frames=9)
    assert len({s.subject for s in made}) == 3
    # the embedded default's very numbers: weights trained on it depend on them
    head = data.synthesize(0, subjects=1, motions=("walk",), frames=3)[0].pose_3d[2, 10]
    assert_allclose(head, (0.01972253, -0.71966143, -0.15120386), atol=1e-6)


def world_of(s):
    extrinsics = data.H36M_EXTRINSICS[s.subject][data.H36M_CAMERAS.index(s.camera)]
    return data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), extrinsics)


def test_synthetic_motion_is_anatomical_and_smooth(synthetic):
    lengths = {}
    for s in synthetic:
        world, (parents, children) = world_of(s), np.array(H17.edges).T
        bones = distances(s.pose_3d)[:, children, parents]
        assert np.abs(bones - lengths.setdefault(s.subject, bones[0])).max() < 1e-5
        assert 0.7 < bones[0, 1] + bones[0, 2] < 1.1
        assert np.linalg.norm(np.diff(world, axis=0), axis=-1).max() * s.fps < 12  # m/s
        assert np.abs(np.diff(world, 2, axis=0)).max() < 0.1  # no jumps
        assert -0.1 < world[:, [3, 6], 2].min() and world[..., 2].max() < 2.6
        thigh, shank = world[:, [1, 4]] - world[:, [2, 5]], world[:, [3, 6]] - world[:, [2, 5]]
        cosine = (thigh * shank).sum(-1)
        cosine /= np.linalg.norm(thigh, axis=-1) * np.linalg.norm(shank, axis=-1)
        assert cosine.max() < math.cos(math.radians(38))  # a knee bends 140 degrees at most
        side = world[:, 4] - world[:, 1]  # from right to left hip
        bend = np.cross(world[:, 3] - world[:, 2], world[:, 2] - world[:, 1])
        assert ((bend * side).sum(-1) < 0.02).all(), "a knee bent forwards"
        if s.action == "walk 1":  # forwards, one foot after the other
            forward = np.cross(side, world[:, 8] - world[:, 0])
            assert (forward[1:] * np.diff(world[:, 0], axis=0)).sum() > 0
            right, left = (((world[:, j] - world[:, 0]) * forward).sum(-1) for j in (3, 6))
            assert np.corrcoef(right, left)[0, 1] < 0
        points = (s.pose_3d + s.root[:, None])[0].astype(float)
        assert_allclose(s.pose_2d[0], data.project(points, s.intrinsics), atol=1e-2)
    subjects = list(lengths.values())
    assert len(subjects) == 7
    assert all(np.abs(a - b).max() > 0.005 for i, a in enumerate(subjects) for b in subjects[:i])


# ---- published datasets, on files of their layouts

@pytest.fixture
def miniature():
    """{subject: {action: world (8, 32, 3) float32}} of all 7 subjects, five actions each."""
    actions = "Walking 1", "Directions", "Directions 1", "Greeting", "Waiting 1"
    return h36m_space(np.random.default_rng(1), actions, 8)


def test_h36m_layout(miniature, tmp_path):
    def write(kind, **values):
        write_objects(tmp_path / f"data_{kind}.npz", **values)
    write("3d_h36m", positions_3d=miniature)
    projected = data.load_h36m(tmp_path)  # no file of 2D: through the cameras
    write("2d_h36m_gt", positions_2d=views_of(miniature, confidence=False), metadata=META)
    gt, wide = data.load_h36m(tmp_path), data.load_h36m(tmp_path, joints=32)
    assert len(gt) == 5 * 5 * 4 and {s.fps for s in gt} == {50}
    for a, b, c in zip(gt, projected, wide, strict=True):  # 32 joints: projected
        assert_allclose(a.pose_2d, b.pose_2d, atol=1e-3)
        assert_allclose(a.pose_2d, c.pose_2d[:, data.H36M_17_OF_32], atol=1e-3)
        assert c.pose_3d.shape == (8, 32, 3)
    write("2d_h36m_cpn", positions_2d=views_of(miniature))
    cpn = data.load_h36m(tmp_path, "cpn", ("S9", "S1"))
    assert [s.subject for s in cpn] == ["S9"] * 20 + ["S1"] * 20
    rejected("17 joints, 3D has 32", data.load_h36m, tmp_path, "cpn", joints=32)
    assert data.provenance(gt) == "files in Human3.6M layout (not Human3.6M: 800 frames)"
    write("3d_h36m", positions_3d=miniature, made_by=data.MADE_BY)
    assert "made by this project" in data.provenance(data.load_h36m(tmp_path))


def cut(index):
    """A change of a 2D file: S5 Directions cut."""
    def change(image):
        image["S5"]["Directions"] = [view[index] for view in image["S5"]["Directions"]]
    return change


@pytest.mark.parametrize("change, names", [
    (lambda image: image.pop("S6"), ["S6 "]),
    (lambda image: image["S6"].pop("Directions"), ["S6 Directions"]),
    (lambda image: image.update(S6=[1]), ["S6 "]),
    (lambda image: image["S7"]["Directions"].pop(), ["S7 Directions", "4 cameras"]),
    (lambda image: image["S7"].update(Directions=3), ["S7 Directions", "4 cameras"]),
    (cut(np.s_[:7]), ["S5 Directions camera 54138969", "7 frames"]),
    (cut(np.s_[:, :16]), ["S5 Directions", "16 joints"]), (cut(np.s_[..., :1]), ["(8, 17, 1)"]),
    (lambda image: image.clear(), ["positions_2d", "empty"])])
def test_2d_that_does_not_fit_is_named(change, names, miniature, tmp_path):
    image = views_of(miniature)
    change(image)
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    write_objects(tmp_path / "data_2d_h36m_x.npz", positions_2d=image)
    rejected(["data_2d_h36m_x.npz", *names], data.load_h36m, tmp_path, "x")


@pytest.mark.parametrize("subject, name", [
    ({}, "S1"), ([], "S1"), (None, "S1"), ({"Walking 1": np.zeros((0, 32, 3))}, "no frames"),
    ({"Walking 1": np.zeros((8, 96))}, "Walking 1"), ({"Walking 1": [[1], [1, 2]]}, "Walking 1")])
def test_3d_that_is_none_is_named(subject, name, miniature, tmp_path):
    miniature["S1"] = subject
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    rejected(["data_3d_h36m.npz", name], data.load_h36m, tmp_path)


def test_what_a_recipe_cannot_have_is_refused(miniature, tmp_path):
    rejected(["data_3d_h36m.npz: not found", "register at"], data.load_h36m, tmp_path)
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    for fields, split, name in [
            (dict(keypoints="hrnet"), "train", "data_2d_h36m_hrnet.npz"),
            (dict(), "validation", "validation"), (dict(data="h37m"), "test", "h37m"),
            (dict(skeleton="coco17"), "test", "coco17"),
            (dict(data="mocap", skeleton="h36m32"), "test", "h36m32")]:
        rejected(name, data.make_store, recipe_of(**fields), tmp_path, split)
    rejected("S2", data.load_h36m, tmp_path, subjects=("S2",))
    rejected("listed", data.load_dataset, recipe_of(), tmp_path / "data_3d_h36m.npz", "train")


def test_provenance_is_human36m_only_when_it_is():
    def sequences(frames, subject, source="files in Human3.6M layout"):
        still = np.broadcast_to(np.float32(0), (frames, 17, 3))
        return [Sequence(subject, "a", "c", still[..., :2], still, still[:, 0],
                         data.UNKNOWN_INTRINSICS, (1, 1), 50.0, source)]
    train, test = sequences(1_559_752, "S1"), sequences(543_344, "S9")
    for real in (train, test, train + test, sequences(524_892, "S11")):
        assert data.provenance(real) == data.HUMAN36M == data.GENUINE["h36m"]
    made = sequences(543_344, "S9", "files in Human3.6M layout, made by this project")
    for other in (sequences(1_559_751, "S1"), train + sequences(5, "S9"), made, train + made):
        assert data.provenance(other) != data.HUMAN36M


@pytest.mark.parametrize("how", ["python2", "legacy", "zip"])
def test_gridconv_archives(miniature, tmp_path, how):
    gridconv_archives(tmp_path / "gt", miniature, ("S1", "S5"), "train", how)
    image, space = gridconv_archives(tmp_path / "gt", miniature, ("S9", "S11"), "test", how)
    test = data.load_gridconv(tmp_path / "gt", "test")
    assert len(data.load_gridconv(tmp_path)) == 2 * 5 * 4
    for s, key in zip(test, image, strict=True):
        c = data.H36M_CAMERAS.index(s.camera)
        assert (s.subject, f"{s.action}.{s.camera}") == (key[0], key[2])
        assert_allclose(s.pose_2d.reshape(8, 34), image[key], rtol=1e-6)
        joints = space[key]["joints_3d" if c else "joint_3d"]
        assert_allclose(s.pose_3d.reshape(8, 51), joints / 1000, atol=1e-6)
        assert_allclose(s.root, space[key]["pelvis"] / 1000, atol=1e-6)
        # from a dictionary and from a list
        assert_allclose(s.intrinsics, [*data.H36M_INTRINSICS[c][:4], 0, 0, 0, 0, 0], rtol=1e-6)
        assert s.size == data.H36M_SIZES[c]
    path = tmp_path / "gt" / "test_custom_3d_unnorm.pth.tar"
    lacking = {k: v for k, v in space[key].items() if k != "camera"}
    fewer = {k: v for k, v in space.items() if k != key}
    eight = {**lacking, "camera": list(range(8))}
    for value in ({**space, key: lacking}, {**space, key: eight}, {}, [1], fewer):
        torch.save(value, path)
        rejected([path], data.load_gridconv, tmp_path, "test")
    each_frame = {name: np.full(8, k + 1.0) for k, name in enumerate(("fx", "fy", "cx", "cy"))}
    torch.save({**space, key: {**lacking, "camera": each_frame}}, path)
    assert data.load_gridconv(tmp_path, "test")[-1].intrinsics[:4].tolist() == [1, 2, 3, 4]
    rejected("train_custom_2d_unnorm.pth.tar", data.load_gridconv, tmp_path, "train", "hrnet")


def test_an_archive_of_what_is_left_out_alone_allows_nothing(tmp_path):
    key, camera = ("S11", "Directions", "Directions.60457274"), [1000.0, 1000, 500, 500]
    entry = {"joint_3d": np.ones((2, 51)), "pelvis": np.full((2, 3), 3000.0), "camera": camera}
    (tmp_path / "gt").mkdir()
    for split in data.SPLITS:
        for kind, value in (("2d", np.ones((2, 34))), ("3d", entry)):
            torch.save({key: value}, tmp_path / "gt" / f"{split}_custom_{kind}_unnorm.pth.tar")
    status, out, _ = command("data.py", "check", tmp_path)
    assert status == 2 and ": allows" not in out and out.count("left out") == 2


def test_gridconvs_archives_serve_human36m_rows(miniature, tmp_path):
    image = {}
    for keypoints, how in (("gt", "python2"), ("hrnet", "zip")):
        for split, subjects in data.SPLITS.items():
            place = tmp_path / "h36m" / keypoints
            image[split], _ = gridconv_archives(place, miniature, subjects, split, how)
    gt, hrnet = recipe_of(), recipe_of(keypoints="hrnet", skip="gridconv")
    assert not data.missing_files(gt, tmp_path) and not data.missing_files(hrnet, tmp_path)
    assert data.missing_files(recipe_of(skeleton="h36m32"), tmp_path) == ["data_3d_h36m.npz"]
    # archives without their keypoints' name may be of any kind
    assert data.missing_files(gt, tmp_path / "h36m" / "hrnet")
    image = {k: v for k, v in image["test"].items()
             if k[0] == "S9" or not k[2].startswith("Directions.")}
    store = data.make_store(gt, tmp_path, "test")
    want = (np.concatenate(list(image.values())) - 500) / 500
    assert_allclose(store.input.flatten(1), want, atol=1e-5)
    tested = {(s.subject, s.action) for s in data.make_store(hrnet, tmp_path, "test").sequences}
    drifting = {("S9", "Greeting"), ("S9", "Waiting 1")}
    assert tested == {(k[0], k[2].split(".")[0]) for k in image} - drifting
    lines, unusable = data.check_folder(tmp_path)
    assert unusable == 0 and "Human3.6M, 2D hrnet: allows GridConv's P1 / P2" in "\n".join(lines)


@pytest.mark.parametrize("fields, sequences", [
    (dict(), (600, 236)), (dict(keypoints="hrnet", skip="gridconv"), (600, 224)),
    (dict(skeleton="h36m32"), (600, 236)),
    (dict(keypoints="cpn_ft_h36m_dbb", normalise="width"), (600, 236))])
def test_preprocessing_of_human36m_is_the_releases(fields, sequences, everything):
    folder, raw = everything
    recipe = recipe_of(**fields)
    stores = {split: data.make_store(recipe, folder, split) for split in ("train", "test")}
    assert tuple(len(store.sequences) for store in stores.values()) == sequences
    keys = {(s.subject, s.action, s.camera) for s in stores["test"].sequences}
    whole = {(s, a, c) for s in ("S9", "S11") for a in raw.space[s] for c in data.H36M_CAMERAS}
    skipped = {("S11", "Directions")}
    if recipe.keypoints == "hrnet":
        skipped |= {("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}
    cameras = ("54138969", "55011271", "58860488", "60457274")
    assert whole - keys == {(*key, camera) for key in skipped for camera in cameras}
    train = {s.subject for s in stores["train"].sequences}
    assert train == {"S1", "S5", "S6", "S7", "S8"}
    wide = recipe.skeleton == "h36m32"
    for store in stores.values():
        assert len(store) == 5 * len(store.sequences)  # and of detected 2D no more
        for i, s in list(enumerate(store.sequences))[::7]:
            frames, c = slice(5 * i, 5 * i + 5), data.H36M_CAMERAS.index(s.camera)
            world = raw.space[s.subject][s.action]
            world = world if wide else world[:, data.H36M_17_OF_32]
            points = plain_camera(world, data.H36M_EXTRINSICS[s.subject][c])
            assert_allclose(store.target[frames], points - points[:, :1], atol=1e-5)
            assert_allclose(store.root[frames], points[:, 0], atol=1e-5)
            views = raw.gt if recipe.keypoints == "gt" else raw.noisy
            pixels = views[s.subject][s.action][c][:5, :, :2].astype(float)
            width, height = (1000, 1002) if c in (0, 3) else (1000, 1000)
            want = (pixels - 500) / 500
            if recipe.normalise == "width":
                want = pixels / width * 2 - [1, height / width]
            got = store.input[frames]
            assert_allclose(got[:, data.H36M_17_OF_32] if wide else got, want, atol=1e-5)


def test_humaneva_is_the_releases(everything):
    folder, raw = everything
    recipe = recipe_of(data="humaneva", skeleton="humaneva15", normalise="width")
    store = data.make_store(recipe, folder, "test")
    assert len(store.sequences) == 3 * 3 * 3
    assert {s.action.split(" ")[0] for s in store.sequences} == {"Walking", "Jog"}
    for part, split in (("Train", "train"), ("Validate", "test")):
        sequences = data.make_store(recipe, folder, split).sequences
        assert {s.subject for s in sequences} == {f"{part}/S{i}" for i in (1, 2, 3)}
    pixels = [raw.eva_2d[s.subject][s.action][data.HUMANEVA_CAMERAS.index(s.camera)]
              for s in store.sequences]
    assert_allclose(store.input, np.concatenate(pixels) / 640 * 2 - [1, 480 / 640], atol=1e-6)
    assert torch.isnan(store.intrinsics).all()
    s = next(s for s in store.sequences if s.action == "Jog 1 chunk2" and s.camera == "C2")
    points = plain_camera(raw.eva[s.subject][s.action], data.HUMANEVA_EXTRINSICS["S1"][1])
    assert_allclose(s.pose_3d, points - points[:, :1], atol=1e-5)
    assert s.size == (640, 480) and s.fps == 60
    assert len(data.load_humaneva(folder, actions=("Walk", "Jog", "Box"))) == 3 * 4 * 3
    rejected("Swim", data.load_humaneva, folder, actions=("Swim",))
    coco = data.load_humaneva(folder, "detectron_pt_coco", ("Validate/S1",))[0].pose_2d
    raw_coco = raw.eva_coco["Validate/S1"]["Walking 1 chunk0"][0][..., :2]
    named = dict(zip(SKELETONS["coco17"].joints, raw_coco.swapaxes(0, 1)))
    named |= {"pelvis": raw_coco[:, [11, 12]].mean(1), "thorax": raw_coco[:, [5, 6]].mean(1)}
    named["head"] = raw_coco[:, 0]
    want = np.stack([named[joint] for joint in SKELETONS["humaneva15"].joints], 1)
    assert_allclose(coco, want, rtol=1e-6)


def test_3dhp_is_the_benchmarks(everything, tmp_path):
    folder, raw = everything
    recipe, views = recipe_of(data="3dhp", skeleton="3dhp17", normalise="width"), raw.test_3dhp
    store = data.make_store(recipe, folder, "test")
    sizes = [(2048, 2048)] * 4 + [(1920, 1080)] * 2
    assert [s.size for s in store.sequences] == sizes
    points = np.concatenate([view["data_3d"] for view in views.values()]) / 1000
    assert_allclose(store.target, points - points[:, 14:15], atol=1e-6)
    assert_allclose(store.root, points[:, 14], atol=1e-6)
    pixels = [v["data_2d"] / w * 2 - [1, h / w] for v, (w, h) in zip(views.values(), sizes)]
    pixels = np.concatenate(pixels)
    assert_allclose(store.input, pixels, atol=1e-5)
    assert_array_equal(store.valid, np.concatenate([view["valid"] for view in views.values()]) == 1)
    cross = recipe_of(data="3dhp", weights="gridconv-gt-learnable")
    crossed = data.make_store(cross, folder, "test")
    assert crossed.rule == "longest"  # of release-500, for images of this size
    theirs = SKELETONS["3dhp17"].joints
    names = {"neck": "head", "thorax": "neck", "head": "head_top"}
    order = [theirs.index(names.get(joint, joint)) for joint in H17.joints]
    assert_array_equal(crossed.target, store.target[:, order])
    assert_allclose(crossed.input, pixels[:, order], atol=1e-5)  # the width is the longest
    train = data.make_store(recipe, folder, "train").sequences
    assert len(train) == 16 * 8 and {s.fps for s in train} == {25}
    assert (train[4].subject, train[4].action, train[4].camera) == ("S1", "Seq1", "5")
    assert data.provenance(store.sequences) == "files in MPI-INF-3DHP layout"
    counted = {name: int(view["valid"].sum()) for name, view in views.items()}
    with mock.patch.object(data, "MPI3DHP_VALID", counted):
        assert data.provenance(store.sequences) == data.GENUINE["3dhp"]
    for change, name in [
            (dict(valid=np.ones(5)), "5 flags"), (dict(data_3d=np.zeros((0, 17, 3))), "no frames"),
            (dict(data_3d=np.zeros((6, 51))), "(6, 51)")]:
        write_objects(tmp_path / "data_test_3dhp.npz", data={"TS1": {**views["TS1"], **change}})
        rejected(["data_test_3dhp.npz", "TS1", name], data.load_3dhp, tmp_path, "test")
    for view in ({"data_2d": 1}, 3):
        write_objects(tmp_path / "data_test_3dhp.npz", data={"TS1": view})
        rejected(["data_test_3dhp.npz", "TS1"], data.load_3dhp, tmp_path, "test")
    assert not data.missing_files(cross, tmp_path)  # it needs the test set alone
    assert data.missing_files(recipe, tmp_path) == ["data_train_3dhp.npz"]
    write_objects(tmp_path / "data_train_3dhp.npz", data={"S1 Seq1": [{}, 25]})
    rejected("no cameras", data.load_3dhp, tmp_path)


def test_check_says_what_is_there_and_what_is_missing(miniature, bvh_folder, tmp_path):
    refused("data.py", "check", tmp_path / "none", names="none")
    status, out, _ = command("data.py", "check", tmp_path)
    assert status == 0 and out.count("not here") == 8 and "vision.imar.ro" in out
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    write_objects(tmp_path / "data_2d_h36m_cpn.npz", positions_2d=views_of(miniature))
    data.convert_bvh(bvh_folder, tmp_path, "mocap", "old")
    status, out, _ = command("data.py", "check", tmp_path)
    assert status == 0 and "Human3.6M, 2D cpn: allows no published row" in out
    assert "Human3.6M, 2D gt: allows" in out and "HumanEva-I, 2D gt: not here" in out
    assert "train: 100 sequences, 800 frames; files in Human3.6M layout (not Human3.6M" in out
    assert "8 BVH clips" in out and "S11" not in out
    (tmp_path / "data_2d_h36m_cpn.npz").write_bytes(b"PK")
    status, out, err = command("data.py", "check", tmp_path)
    assert status == 2 and "train: cannot be used" in out and err.count("\n") == 1
    assert "Human3.6M, 2D cpn: cannot be used" in out and "2D gt: allows" in out


VIEW = {"data_3d": [[[1.0] * 3] * 17], "data_2d": [[[1.0] * 2] * 17], "valid": [0]}


@pytest.mark.parametrize("files", [
    {"data_3d_h36m": dict(positions_3d={})}, {"data_3d_h36m": dict(positions_3d={"S1": {}})},
    {"data_3d_h36m": dict(
        positions_3d={s: {"Walking": [[[1.0] * 3] * 16]} for s in data.H36M_EXTRINSICS})},
    {"data_test_3dhp": dict(data={"TS1": VIEW}),
     "data_train_3dhp": dict(data={"S1 Seq1": [{"0": VIEW}, 25], "S1 Seq2": [{}, 25]})},
    {"data_train_3dhp": dict(data={1: 2}), "data_test_3dhp": dict(data={1: 2})},
    {"data_train_3dhp": dict(data={}), "data_test_3dhp": dict(data={"TS1": {}})},
    {"data_3d_humaneva15": dict(positions_3d={f"Train/S{i}": {} for i in (1, 2, 3)}),
     "data_2d_humaneva15_gt": dict(positions_2d={1: 2})},
    {"data_3d_mocap": dict(clips=[]), "data_2d_mocap_gt": dict(clips=[])}], ids=str)
def test_check_of_empty_files_allows_nothing(files, tmp_path):
    for name, values in files.items():
        write_objects(tmp_path / f"{name}.npz", **values)
    status, out, err = command("data.py", "check", tmp_path)
    assert status == 2 and err.count("\n") == 1 and ": allows" not in out
    assert ": cannot be used; it would allow" in out and not PYTHONS_OWN_WORDS.search(out)
    assert f"{list(files)[0]}.npz" in out or "h36m17" in out
    assert out.count(": cannot be used: ") == 2 * out.count(": cannot be used; ")  # both splits


def test_coco_joints_are_not_taken_for_human36ms(miniature, tmp_path):
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    for layout in ("h36m", "coco"):
        write_objects(tmp_path / "data_2d_h36m_detectron.npz", positions_2d=views_of(miniature),
                      metadata={**META, "layout_name": layout})
        if layout == "h36m":
            assert data.load_h36m(tmp_path, "detectron")
    rejected(["data_2d_h36m_detectron.npz", "COCO"], data.load_h36m, tmp_path, "detectron")


# ---- hostile and damaged files

class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("value, name", [
    (Hostile(), ".system"), (HERE, "Path"), (print, "print"),
    ({"a": [np.random.RandomState(0)]}, "numpy.random")])
def test_unknown_names_are_refused_by_name(value, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_objects("a.npz", positions_3d={"S1": value})
    np.save("a.npy", np.array({"S1": value}, object))
    for path in ("a.npz", "a.npy"):
        rejected([path, name, "refused"], data.read_npz, path)
    for zipped, weights in ((True, torch.ones(2)), (False, torch.ones(2)), (False, 1.0)):
        content = {"model": weights, "x": value}
        torch.save(content, "a.pth", _use_new_zipfile_serialization=zipped)
        rejected(["a.pth", name, "refused"], data.read_torch, "a.pth")
    assert not os.path.exists("hostile")


@pytest.mark.parametrize("zipped", [False, True])
def test_read_torch(zipped, tmp_path):
    model = nn.Linear(3, 2)
    arrays = {"array": np.arange(900.0).reshape(30, 30).T, "names": np.array(["a", "bc"]),
              "empty": np.zeros((0, 3)), "half": torch.ones(2, 2, dtype=torch.float16).t(),
              "random": torch.get_rng_state(), "parameter": nn.Parameter(torch.ones(1)).detach()}
    others = {"list": [1, 2.5, "three", None, True, (4,), {5}], "scalar": np.float64(1.5),
              "ordered": OrderedDict(a=1)}
    values = {"weights": model.state_dict(), **arrays, **others}
    torch.save(values, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    got = data.read_torch(tmp_path / "a.pth")
    assert {key: got[key] for key in others} == others
    for key, value in arrays.items():
        assert np.array_equal(got[key], value) and got[key].dtype == value.dtype
    assert all(torch.equal(got["weights"][key], value) for key, value in model.state_dict().items())
    torch.jit.script(model).save(str(tmp_path / "b.pth"))
    rejected("TorchScript", data.read_torch, tmp_path / "b.pth")


@pytest.mark.parametrize("state", [released_gridconv("autogrids"), released_glagcn(17, 1)],
                         ids=["gridconv", "glagcn"])
def test_released_checkpoints_are_read(state, tmp_path):
    save_released(tmp_path / "best", state)
    content = data.read_torch(tmp_path / "best", inert=True)
    assert not isinstance(content.get("optimizer"), torch.optim.Optimizer)
    got = content.get("state_dict", content.get("model_pos"))
    assert got.keys() == state.keys() and all(torch.equal(got[key], state[key]) for key in state)
    rejected(["best", "refused"], data.read_torch, tmp_path / "best")


@pytest.mark.parametrize("count", [2, 40, 5000])  # byte strings of 8, 160 and 20,000 bytes
def test_python2_arrays(count, tmp_path):
    values = {"S1": np.arange(count, dtype="f4"), ("S9", 1): [np.float64(1.5), "a" * count, 7],
              "wide": np.arange(count * 3, dtype=">i2").reshape(3, count)}
    body = npy_header((), "|O") + python2(np.array(values, object))
    write_zip(tmp_path / "a.npz", "x.npy", body)
    (tmp_path / "a.tar").write_bytes(legacy_head() + python2(values) + pickle.dumps([], 2))
    for got in (data.read_npz(tmp_path / "a.npz")["x"].item(), data.read_torch(tmp_path / "a.tar")):
        assert list(got) == list(values) and got["S1"].dtype == np.float32
        assert all(np.array_equal(got[key], values[key]) for key in ("S1", "wide"))
        assert got["S9", 1] == [1.5, "a" * count, 7] and isinstance(got["S9", 1][0], float)


def write_zip(path, name, body, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, body)


def test_read_npz_and_its_damage(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(24.0).reshape(2, 3, 4), "c": np.array(["x", "yy"]), "d": np.float32(3),
              "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "e": np.zeros((0, 3))}
    for save in (np.savez_compressed, np.savez):
        save(path, **arrays)
        got = data.read_npz(path)
        for key, value in arrays.items():
            assert np.array_equal(got[key], value) and got[key].dtype == np.asarray(value).dtype
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(np.float64(5).tobytes()) + 6] ^= 1  # NumPy would not see it
    path.write_bytes(flipped)
    rejected(["a.npz", "a.npy"], data.read_npz, path)
    for shape in ((10 ** 15,), (3,), (1,), (-1,), (2 ** 40, 2 ** 40)):
        body = npy_header(shape, "<f8") + bytes(16)
        (tmp_path / "x.npy").write_bytes(body)
        write_zip(tmp_path / "x.npz", "x.npy", body)
        for name in ("x.npz", "x.npy"):
            rejected([name, "cannot be read"], data.read_npz, tmp_path / name)


def crafted(*parts):
    """A pickle of protocol 2 from its parts: bytes as they are, names as globals."""
    body = [part if isinstance(part, bytes) else b"c%b\n%b\n" % tuple(map(str.encode, part))
            for part in parts]
    return b"\x80\x02" + b"".join(body) + b"."


GIB4 = b"\x8a\x05" + (2 ** 32).to_bytes(5, "little")
EMPTY_ARRAY = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
               b"K\x00\x85U\x01b\x87R")
OBJECTS = (("numpy", "dtype"), b"U\x02O8\x89\x88\x87R",  # without their flags
           b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
STRUCTURE = (("numpy", "dtype"), b"U\x02V8\x89\x88\x87R", b"(K\x03U\x01|NU\x01a\x85}U\x01a",
             *OBJECTS, b"K\x00\x86sK\x08K\x01K\x00tb")
HOSTILE_PICKLES = {
    "addresses": crafted(*EMPTY_ARRAY, b"(K\x01)", *OBJECTS, b"\x89U\x08AAAAAAAAtb"),
    "addresses in fields": crafted(
        *EMPTY_ARRAY, b"(K\x01)", *STRUCTURE, b"\x89U\x08AAAAAAAAtb"),
    "a claimed shape": crafted(*EMPTY_ARRAY, b"(K\x01", GIB4, b"\x85", *OBJECTS, b"\x89]tb"),
    "a claimed memo": crafted(b"Nr" + struct.pack("<I", 2 ** 24), ("os", "getcwd")),
    "a changed reader": crafted(("numpy", "dtype"), b"N}U\x0c__setstate__Ns\x86b"),
    "code": crafted(("os", "system"), b"U\x0etouch /tmp/own\x85R")}


def hostile_files(folder):
    """[(reader, path)]: would run code, read foreign memory, or allocate what they claim."""
    found = []
    for what, body in HOSTILE_PICKLES.items():
        member = npy_header((), "|O") + body
        write_zip(folder / f"{what}.npz", "positions_3d.npy", member)
        (folder / f"{what}.npy").write_bytes(member)
        write_zip(folder / f"{what}.pt", "a/data.pkl", body)
        (folder / f"{what}.bin").write_bytes(legacy_head() + body + pickle.dumps([], 2))
        found += [(data.read_npz, folder / f"{what}.{end}") for end in ("npz", "npy")]
        for read in (data.read_torch, functools.partial(data.read_torch, inert=True)):
            found += [(read, folder / f"{what}.{end}") for end in ("pt", "bin")]
    zeros = npy_header((100 << 20,)) + bytes(400 << 20)
    write_zip(folder / "bomb.npz", "a.npy", zeros, zipfile.ZIP_DEFLATED)
    lie = (folder / "bomb.npz").read_bytes()
    lie = lie.replace(struct.pack("<I", len(zeros)), struct.pack("<I", 1000))
    (folder / "lie.npz").write_bytes(lie)  # it unpacks to more than it says
    write_zip(folder / "method.npz", "a.npy", zeros[:1 << 20], zipfile.ZIP_BZIP2)
    torch.save({"a": torch.ones(4)}, folder / "folder.pt")
    content = bytearray((folder / "folder.pt").read_bytes())
    content[content.rindex(b"folder/data/0") - 8] |= 16  # torch would give memory as it was
    (folder / "folder.pt").write_bytes(content)
    (folder / "deep.json").write_text("[" * 10 ** 6)
    found += [(data.read_npz, folder / f"{name}.npz") for name in ("bomb", "lie", "method")]
    found += [(data.read_torch, folder / name) for name in ("bomb.npz", "folder.pt")]
    return [*found, (data.read_json, folder / "deep.json")]


def memory(at):
    """Bytes of this process: mapped (0) or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[at]) * os.sysconf("SC_PAGE_SIZE")


def test_hostile_files_are_refused_without_effect(tmp_path, monkeypatch):
    import resource
    monkeypatch.setattr(os, "system", lambda *_: (tmp_path / "ran").write_text("code"))
    files, child = hostile_files(tmp_path), os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has none of the threads that sums waited for
        resource.setrlimit(resource.RLIMIT_AS, (memory(0) + 2 ** 30,) * 2)
        try:
            for read, path in files:
                rejected([], read, path)
        finally:
            os._exit(path != files[-1][1])
    _, status, used = os.wait4(child, 0)
    assert status == 0 and used.ru_maxrss * 1024 < memory(1) + 2 ** 27
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_or_no_json_or_too_large_is_one_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "cannot be read"),
                       (Path("/dev/zero"), "not a regular file"), (tmp_path / "none", "not found")):
        for read in (data.read_json, data.read_npz, data.read_torch, data.read_bvh):
            rejected([path, says], read, path)

    for text in ("", "{", "NaN5"):
        (tmp_path / "a.json").write_text(text)
        rejected(["a.json", "not JSON"], data.read_json, tmp_path / "a.json")
    (tmp_path / "a.npy").write_text("[]")
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=MemoryError))
    for read in (data.read_json, data.read_bvh):
        rejected(["a.npy", "memory"], read, tmp_path / "a.npy")


def good_files(folder):
    """{name: (loads that file, whether its format has a checksum)}: small files of every format."""
    rng, files = np.random.default_rng(0), {}
    world = h36m_space(rng, ("Walking 1",), 4)
    write_objects(folder / "data_3d_h36m.npz", positions_3d=world)
    write_objects(folder / "data_2d_h36m_gt.npz", True, 2, positions_2d=views_of(world))
    eva = {f"Train/S{i}": {"Jog 1 chunk0": rng.normal(0, 0.4, (4, 15, 3))} for i in (1, 2, 3)}
    np.savez_compressed(folder / "data_3d_humaneva15.npz", positions_3d=np.array(eva, object))
    eva_2d = {s: {"Jog 1 chunk0": list(rng.uniform(0, 480, (3, 4, 15, 2)))} for s in eva}
    write_objects(folder / "data_2d_humaneva15_gt.npz", positions_2d=eva_2d)
    ts1 = {**raw_3dhp(rng, 4), "valid": np.ones(4)}
    write_objects(folder / "data_test_3dhp.npz", data={"TS1": ts1})
    write_clips(folder / "clips", frames=4)
    data.convert_bvh(folder / "clips", folder, "mocap", "^b")
    for names, load, *words in [
            (["3d_h36m", "2d_h36m_gt"], data.load_h36m), (["test_3dhp"], data.load_3dhp, "test"),
            (["3d_humaneva15", "2d_humaneva15_gt"], data.load_humaneva),
            (["3d_mocap", "2d_mocap_gt"], data.load_mocap)]:
        load = functools.partial(load, folder, *words)
        files |= {f"data_{name}.npz": (load, True) for name in names}
    files["clips/a.bvh"] = functools.partial(data.read_bvh, folder / "clips" / "a.bvh"), False
    for how in ("python2", "legacy", "zip"):
        gridconv_archives(folder / how, world, ("S1",), "train", how)
        load = functools.partial(data.load_gridconv, folder / how), how == "zip"
        files |= {f"{how}/train_custom_{kind}_unnorm.pth.tar": load for kind in ("2d", "3d")}
    released = {"legacy.bin": released_gridconv("dynamic"), "zip.bin": released_glagcn(15, 1)}
    for name, state in released.items():
        save_released(folder / name, state)
        read = functools.partial(data.read_torch, folder / name, inert=True)
        files[name] = read, name == "zip.bin"
    return files


def mutated(content, rng):
    """The content with one part flipped, cut, repeated, zeroed, or another text or number."""
    at, span = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 1000))
    text = rng.choice((b"9", b"-", b"e", b'"', b"NaN", b"1e999"))
    part = rng.choice([bytes([content[at] ^ 1 << rng.randrange(8)]), b"", rng.randbytes(span), text,
                       bytes(span), b"\xff" * span, (10 ** 12).to_bytes(8, "little")])
    rest = rng.choice((content[at:], content[at + 1:], content[at + len(part):], b""))
    return content[:at] + part + rest


def frozen(value):
    """What torch.save writes of nested values: equal to the last bit."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("cases", [30, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_files_load_right_or_are_refused(cases, tmp_path):
    for name, (load, checksum) in good_files(tmp_path).items():  # no checksum: it may differ
        path, rng, good, noticed = tmp_path / name, random.Random(name), frozen(load()), 0
        content = path.read_bytes()
        for case in range(cases):
            path.write_bytes(mutated(content, rng))
            try:
                got = load()
            except InputError as error:
                assert_clear(error, [path.name])
                noticed += 1
                continue
            if checksum:
                assert frozen(got) == good, (name, case)
            elif name.endswith("bvh"):
                assert np.isfinite(got[1]).all(), (name, case)
            elif "tar" in name:
                assert all(np.isfinite(a).all() for s in got for a in (s.pose_2d, s.pose_3d))
        path.write_bytes(content)
        assert noticed > cases // 4, name


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e300])  # the last: more than float32 has
def test_values_that_are_not_finite_are_refused_with_file_sequence_and_frame(value, tmp_path):
    files, key = good_files(tmp_path), ("S1", "Walking", "Walking 1.55011271")
    for name, steps, place in [
            ("data_3d_h36m.npz", ["positions_3d", (), "S8", "Walking 1"], "S8 Walking 1, 3D"),
            ("data_2d_h36m_gt.npz", ["positions_2d", (), "S1", "Walking 1", 3],
             "S1 Walking 1 camera 60457274, 2D"),
            ("data_2d_humaneva15_gt.npz", ["positions_2d", (), "Train/S2", "Jog 1 chunk0", 1],
             "Train/S2 Jog 1 chunk0 camera C2, 2D"),
            ("data_test_3dhp.npz", ["data", (), "TS1", "data_3d"], "TS1 camera 0, 3D"),
            ("zip/train_custom_3d_unnorm.pth.tar", [key, "joints_3d"],
             "S1 Walking 1 camera 55011271, 3D"),
            ("data_2d_mocap_gt.npz", ["positions_2d", 0], "a.bvh camera 54138969, 2D"),
            ("data_3d_mocap.npz", ["positions_3d"], "a.bvh, 3D")]:
        reader = "read_npz" if name.endswith("npz") else "read_torch"
        read, path = getattr(data, reader), tmp_path / name

        def spoilt(opened, *rest):
            content = read(opened, *rest)
            if Path(opened) == path:
                functools.reduce(lambda part, step: part[step], steps, content)[2] = value
            return content
        with mock.patch.object(data, reader, spoilt):
            rejected([path.name, f"{place}, frame 2"], files[name][0])


# ---- files and commands

def test_write_atomically(tmp_path):
    path, before = tmp_path / "new" / "a.txt", tmp_path / "new" / "before.txt"

    def write(content):
        data.write_atomically(path, lambda file: file.write(content), before)
    write(b"one")
    assert not before.exists()
    with open(path, "rb") as reader:  # who reads the old file goes on reading the old file
        write(b"two")
        assert reader.read() == b"one" and path.read_bytes() == b"two"
    assert before.read_bytes() == b"one"

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    def full(file):  # torch.save on a full disk
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos")
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, half, before)
    rejected([path, "No space left"], data.write_atomically, path, full, before)
    assert path.read_bytes() == b"two" and before.read_bytes() == b"one"
    assert sorted(os.listdir(path.parent)) == ["a.txt", "before.txt"]
    rejected("cannot be written", data.write_atomically, path / "below" / "a.txt", half)
    with pytest.raises(ZeroDivisionError):  # a bug
        data.write_atomically(path, lambda file: 1 / 0)


def test_a_conversion_that_cannot_be_written_leaves_no_set(bvh_folder, tmp_path, monkeypatch):
    whole = data.write_atomically

    def once(path, *rest):
        if any(tmp_path.iterdir()):
            raise InputError("full")
        whole(path, *rest)
    monkeypatch.setattr(data, "write_atomically", once)
    rejected("full", data.convert_bvh, bvh_folder, tmp_path, "mocap", "old")
    # what is looked for comes last
    assert data.missing_files(recipe_of(data="mocap"), tmp_path) == ["data_3d_mocap.npz"]


@pytest.mark.parametrize("error, status, line", [
    (InputError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, ""),
    (MemoryError(), 2, "error: not enough memory\n"),
    (FileNotFoundError(2, "No such file", "x.npz"), 2, "error: x.npz: No such file\n")])
def test_run_exit_statuses(error, status, line, capsys):
    with pytest.raises(SystemExit) as stop:
        data.run(mock.Mock(side_effect=error))
    assert stop.value.code == status and capsys.readouterr().err == line


def test_run_shows_bugs_and_a_models_refusal():
    with pytest.raises(ValueError, match="a bug"):
        data.run(mock.Mock(side_effect=ValueError("a bug")))
    with pytest.raises(SystemExit, match="2"):
        data.run(lambda: gridconv.assignment_matrix(((0, 99),), 2))


def test_names_that_no_terminal_can_show_end_nothing(tmp_path):
    names = "歩く_a", os.fsdecode("歩く_b".encode("shift-jis")), "lone_\udcff"
    clips = tmp_path / "クリップ"
    for i, name in enumerate(names):
        (clips / f"{name}s").mkdir(parents=True)
        text = write_bvh(*person(bandai_names(), seed=i))
        (clips / f"{name}s" / f"{name}.bvh").write_text(text)
    words = ["data.py", "bvh", clips, "--out", tmp_path, "--test", "_b"]
    status, out, err = command(*words, encoding="ascii")
    assert status == 0 and "\\u30af" in out and not err
    assert {s.action for s in data.load_mocap(tmp_path)} == {names[0], names[2]}
    status, out, _ = command("data.py", "check", tmp_path, encoding="cp1252")
    assert status == 0 and "motion capture, 2D gt: allows" in out
    (clips / f"{names[1]}s" / f"{names[1]}.bvh").write_text("")
    status, _, err = command(*words, encoding="ascii")
    assert status == 2 and err.count("\n") == 1 and "\\udc" in err


@pytest.mark.parametrize("given, want", [
    ({}, "1000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"),
    ({"OMP_WAIT_POLICY": "passive"}, "None passive")])
def test_spinning_is_bounded_before_torch_is_imported_unless_the_user_has(given, want):
    names = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    code = "import sys; sys.modules['torch'] = None\ntry: import data\nexcept ImportError: " \
           f"import os; print(*[os.environ.get(name) for name in {names}])"
    kept = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE,
                          env={**kept, **given})
    assert done.stdout.strip() == want


# ---- random cameras, noise and missing joints

def upright_clips():
    """Whole bodies moving, one recorded camera each."""
    clips = data.synthesize(3, ("S1", "S9"), ("walk", "sit", "kick"), frames=20)
    return [s for s in clips if s.camera == data.H36M_CAMERAS[1]]


@settings(max_examples=15)
@given(st.integers(0, 2 ** 40))
def test_random_cameras_are_what_their_ranges_say(draw):
    """Undone by hand: from the world's z up to the image by the drawn angles, focal length, ..."""
    clips = upright_clips()
    store = FrameStore(clips, "longest", H17, cameras="random")
    store.redraw(draw)
    generator = torch.Generator().manual_seed(draw)
    chances = torch.rand(len(clips), 8, generator=generator, dtype=torch.float64)
    low, high = np.array(list(data.CAMERA_RANGES.values())).T
    for i, clip in enumerate(clips):
        mine, world = store.sequence == i, world_of(clip)
        points = (store.pose_3d + store.root[:, None])[mine].double()
        drawn = low + (high - low) * chances[i].numpy()
        heading, tilt, roll, focal, shape, fill, aside, below = drawn
        width, height = size = store.sizes[i].tolist()
        assert max(size) == 1000 and width / height == pytest.approx(math.exp(shape), rel=2e-3)
        want = [1000 * focal] * 2 + [width / 2, height / 2] + [0] * 5
        assert_allclose(store.intrinsics[i], want, rtol=1e-6)
        edges = [fill * side / 2 / (1000 * focal) for side in size]
        distance = points[:, 0].mean(0)[2].item()
        # right, down, forward
        axes = plain_turn("Z", roll) @ plain_turn("X", tilt) @ plain_turn("X", 90)
        axes = axes @ plain_turn("Z", heading)
        away = np.array([aside * edges[0], below * edges[1], 1]) * distance
        want = (world - world[:, 0].mean(0)) @ axes.T + away
        assert_allclose(points, want, atol=2e-5)
        x, y, z = np.moveaxis(want, -1, 0)
        outermost = max(np.abs(x / z).max() / edges[0], np.abs(y / z).max() / edges[1])
        assert z.min() > 0.999 and outermost < 1.001  # before the camera, in its part of the image,
        assert z.min() < 1.001 or outermost > 0.999  # and no further off than that needs
        pixels = data.project(points.numpy(), store.intrinsics[i].double().numpy())
        assert_allclose(store.input[mine], data.normalise(pixels, size, "longest"), atol=2e-5)
        assert_allclose(store.pose_3d[mine], points - points[:, :1], atol=1e-6)


def test_a_draw_depends_on_its_number_alone():
    clips, options = upright_clips(), dict(cameras="random", noise=0.02, missing=0.3)

    def shown(draw, target="camera", **options):
        store = FrameStore(clips, "longest", H17, target=target, **options)
        store.redraw(data.TEST_DRAW)
        store.redraw(draw)
        return store
    first, second, again = (shown(draw, **options) for draw in (4, 2, 4))
    names = "input", "target", "intrinsics", "root"
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in names)
    focal = [set(store.intrinsics[:, 0].tolist()) for store in (first, second)]
    assert len(focal[0]) == len(clips) and not focal[0] & focal[1]
    uvd = shown(4, "uvd", **options)
    assert torch.equal(uvd.input, first.input) and torch.equal(uvd.pose_3d, first.target)
    back = uvd.to_camera(uvd.target, torch.arange(len(uvd)))
    assert (back - uvd.pose_3d).abs().max() < 1e-4
    clean = shown(4, cameras="random")  # the same cameras, whatever noise and gaps
    assert all(torch.equal(getattr(clean, name), getattr(first, name)) for name in names[1:])
    assert not torch.equal(clean.input, first.input)
    assert torch.equal(shown(4).input, shown(2).input)  # as recorded
    how = "synthetic motion (seed 3), random cameras, noise 0.02, missing 0.3"
    assert first.sequences[0].source == how
    human = [dataclasses.replace(s, source="files in Human3.6M layout") for s in clips]
    noisy = FrameStore(human, "width", H17, noise=0.1)
    assert "noise 0.1" in data.provenance(noisy.sequences)  # never "Human3.6M"
    # the numbers that models being trained see: a draw means the same in every version
    assert_allclose(first.input[7, 3], (-0.0198609, 0.4151172), atol=1e-5)


def test_swapped_sides_are_the_inputs_alone():
    plain, swapped = (
        FrameStore(small_sequences(), "width", H17, swap_sides=s) for s in (False, True))
    assert torch.equal(plain.target, swapped.target)
    sides = [*H17.left, *H17.right], [*H17.right, *H17.left]
    assert torch.equal(plain.input[:, sides[0]], swapped.input[:, sides[1]])


def test_noise_is_as_asked():
    generator = torch.Generator().manual_seed(5)
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0]).repeat_interleave(3000)[:, None, None]
    clean = torch.rand(1, 17, 2, generator=generator) * scale  # one pose at four sizes
    bounds = torch.zeros(12000, dtype=torch.long), torch.full((12000,), 11999)
    size = max((clean[0, :, k].max() - clean[0, :, k].min()).item() for k in (0, 1))
    noisy = data.detect(clean, *bounds, 0.01, 0.0, generator)
    error = (noisy - clean) / (size * scale)
    deviation = pytest.approx(0.01 * math.sqrt(0.98 + 0.02 * 100), rel=0.05)
    for part in error.split(3000):
        middle = 1.4826 * part.abs().median().item()  # all but blind to outliers
        assert middle == pytest.approx(0.01, rel=0.04)
        assert part.square().mean().sqrt().item() == deviation
    gross = (error.norm(dim=-1) > 0.05).float().mean().item()  # in both coordinates at once
    assert gross == pytest.approx(0.02 * math.exp(-0.5 * 0.25), rel=0.1)
    assert torch.equal(data.detect(clean, *bounds, 0.0, 0.0, generator), clean)


@pytest.mark.parametrize("missing", [0.02, 0.1, 0.5])
def test_gaps_are_as_asked_and_filled_as_a_loop_would(missing):
    lengths = [1, 2, 40, 3000, 7, 900]
    end = np.cumsum(lengths)
    first, last = (torch.from_numpy(np.repeat(b, lengths)) for b in (end - lengths, end - 1))
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(end[-1], 17, 2, generator=generator, dtype=torch.float64)
    got = data.detect(clean, first, last, 0.0, missing, generator.manual_seed(2))
    seen, runs = (got == clean).all(-1).numpy(), []
    for start, length in zip(end - lengths, lengths):
        assert seen[start].all()
        time = np.arange(start, start + length)
        for j in range(17):
            known = time[seen[time, j]]
            for axis in (0, 1):
                want = np.interp(time, known, clean[known, j, axis])
                assert_allclose(got[time, j, axis], want, atol=1e-12)
            runs += [gap - 1 for gap in np.diff(known) if gap > 1]
    assert 1 - seen.mean() == pytest.approx(missing, rel=0.1)
    if missing == 0.02:  # gaps hardly overlap
        assert np.mean(runs) == pytest.approx(10, rel=0.15)
        assert min(runs) == 1 and 15 < np.quantile(runs, 0.9) and np.quantile(runs, 0.95) <= 19


def test_extrinsics_of_every_loader_put_the_world_upright(everything):
    h36m = data.load_h36m(everything[0], subjects=("S1", "S9"))
    synthetic = data.synthesize(0, 1, ("walk",), frames=3)
    for sequences in (h36m[:16], h36m[-16:], data.load_mocap(everything[0]), synthetic):
        for i in range(0, len(sequences), 4):  # the four cameras of a clip
            views = [data.upright(s) for s in sequences[i:i + 4]]
            assert np.abs(views[0][:, 0].mean(0)).max() < 1e-5
            assert_allclose(views, [views[0]] * 4, atol=1e-5)


def test_make_store_gives_tests_cameras_of_their_own(run_folder):
    recipe = recipe_of(data="synthetic", cameras="random", noise=0.01, missing=0.1, swap_sides=True)
    stores = {split: data.make_store(recipe, "", split) for split in ("train", "test")}
    test = data.load_dataset(recipe, "", "test")
    assert {s.subject for s in test} == {"S9", "S11"} and stores["test"].rule == "longest"
    same = FrameStore(test, "longest", H17, "cpu", "camera", "random", 0.01, 0.1, swap_sides=True)
    same.redraw(1)
    assert torch.equal(same.input, stores["test"].input) and data.TEST_DRAW % 2 == 1
    drawn = {split: set(store.intrinsics[:, 0].tolist()) for split, store in stores.items()}
    assert not drawn["train"] & drawn["test"]
    assert data.make_store(recipe_of(data="synthetic", target="uvd"), "", "test").uvd


# ----------------------------------------------------------------------------------------------
# eval.py


# ---- metrics

FRAME_METRICS = ("mpjpe", "p_mpjpe", "n_mpjpe")
METRIC_NAMES = (*FRAME_METRICS, "mpjve", "pck", "auc")


def golden_pair():
    """Four poses and their targets, by formula; one is mirrored, which no rotation mends."""
    i = np.arange(4 * 5 * 3)
    target = np.sin(0.37 * i).reshape(4, 5, 3)
    prediction = target + 0.11 * np.sin(1.3 * i + 0.5).reshape(4, 5, 3)
    prediction[3, :, 0] *= -1
    return prediction, target


def horn_p_mpjpe(prediction, target):
    """P-MPJPE by Horn's quaternions (1987), which know no reflection."""
    errors = []
    for p, t in zip(prediction, target):
        p, t = p - p.mean(0), t - t.mean(0)
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = p.T @ t
        N = np.array([[xx + yy + zz, yz - zy, zx - xz, xy - yx],
                      [yz - zy, xx - yy - zz, xy + yx, zx + xz],
                      [zx - xz, xy + yx, yy - xx - zz, yz + zy],
                      [xy - yx, zx + xz, yz + zy, zz - xx - yy]])
        w, x, y, z = np.linalg.eigh(N)[1][:, -1]
        R = np.array([[w*w + x*x - y*y - z*z, 2*(x*y - w*z), 2*(x*z + w*y)],
                      [2*(x*y + w*z), w*w - x*x + y*y - z*z, 2*(y*z - w*x)],
                      [2*(x*z - w*y), 2*(y*z + w*x), w*w - x*x - y*y + z*z]])
        turned = p @ R.T
        scale = (turned * t).sum() / (p ** 2).sum()
        errors += [np.linalg.norm(scale * a - b) for a, b in zip(turned, t)]
    return 1000 * np.mean(errors)


def random_pair(seed, frames=3, joints=6):
    generator = torch.Generator().manual_seed(seed)
    target, noise = torch.randn(2, frames, joints, 3, generator=generator, dtype=torch.float64)
    return target + 0.3 * noise, target, generator


def test_metrics_are_explicit_loops():
    p, t = golden_pair()
    joints = [(f, j) for f in range(4) for j in range(5)]
    errors = [math.sqrt(sum((p[f, j, c] - t[f, j, c]) ** 2 for c in range(3))) for f, j in joints]
    best = [sum((p[f] * t[f]).flatten()) / sum((p[f] ** 2).flatten()) for f in range(4)]
    scaled = [np.linalg.norm(best[f] * p[f, j] - t[f, j]) for f, j in joints]
    pairs = [(f, j) for f, j in joints if f < 3]
    speeds = [np.linalg.norm(p[f + 1, j] - p[f, j] - t[f + 1, j] + t[f, j]) for f, j in pairs]
    shares = [np.mean([1000 * error < k for error in errors]) for k in range(0, 151, 5)]
    wanted = {"mpjpe": 1000 * np.mean(errors), "p_mpjpe": horn_p_mpjpe(p, t),
              "n_mpjpe": 1000 * np.mean(scaled), "mpjve": 1000 * np.mean(speeds),
              "pck": 100 * shares[-1], "auc": 100 * np.mean(shares)}
    golden = {"mpjpe": 442.9327, "p_mpjpe": 131.9719, "n_mpjpe": 391.6575, "mpjve": 507.3372,
              "pck": 80.0, "auc": 10.6452}
    for name in METRIC_NAMES:
        got = getattr(evaluation, name)(torch.tensor(p), torch.tensor(t))
        assert got == pytest.approx(wanted[name], abs=1e-9), name
        assert got == pytest.approx(golden[name], abs=1e-3), name


@settings(max_examples=25)
@given(st.integers(0, 10 ** 6), st.floats(0.1, 10))
def test_p_mpjpe_ignores_similarities_but_not_reflections(seed, scale):
    p, t, generator = random_pair(seed)
    turn = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    R = torch.matrix_exp(turn - turn.T)
    shift = torch.randn(3, 1, 3, generator=generator, dtype=torch.float64)
    aligned = p_mpjpe(p, t)
    assert aligned == pytest.approx(horn_p_mpjpe(p.numpy(), t.numpy()), abs=1e-9)
    assert p_mpjpe(scale * p @ R + shift, t) == pytest.approx(aligned, rel=1e-8)
    assert p_mpjpe(scale * t @ R + shift, t) == pytest.approx(0, abs=1e-9)
    mirrored = t * torch.tensor([-1.0, 1.0, 1.0])
    assert p_mpjpe(mirrored, t) > 1  # six joints in general position
    assert p_mpjpe(p.float(), t.float()) == pytest.approx(aligned, rel=1e-4)


@settings(max_examples=25)
@given(st.integers(0, 10 ** 6), st.floats(0.1, 10), st.floats(-2, 2))
def test_mpjpe_moves_with_translation_and_n_mpjpe_ignores_scale(seed, scale, shift):
    p, t, _ = random_pair(seed)
    moved = t + torch.tensor([0.0, shift, 0.0])
    assert mpjpe(moved, t) == pytest.approx(1000 * abs(shift), abs=1e-4)
    assert n_mpjpe(scale * p, t) == pytest.approx(n_mpjpe(p, t), rel=1e-8)
    velocity = torch.tensor([0.01, 0.0, -0.02]) * torch.arange(4)[:, None, None]
    line, still = t[:1] + velocity, t[:1].expand(4, -1, -1)
    assert mpjve(line, still) == pytest.approx(1000 * math.sqrt(5e-4), rel=1e-5)
    assert mpjve(line + shift, line) == pytest.approx(0, abs=1e-9)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_pck_and_auc_in_closed_form(millimetres):
    target = torch.zeros(1, len(millimetres), 3, dtype=torch.float64)
    prediction, errors = target.clone(), torch.tensor(millimetres, dtype=torch.float64)
    prediction[0, :, 1] = errors / 1000 - 1e-9 * (errors > 0)
    # an error of m mm (a hair less) counts at the thresholds max(5 ceil(m / 5), 5) ... 150
    counted = [sum(k >= m and k > 0 for k in range(0, 151, 5)) for m in millimetres]
    assert evaluation.auc(prediction, target) == pytest.approx(100 * np.mean(counted) / 31)
    share = 100 * np.mean([m <= 150 for m in millimetres])
    assert evaluation.pck(prediction, target) == pytest.approx(share)
    exactly = torch.tensor([[[0.25, 0.0, 0.0]]], dtype=torch.float64)  # 250 mm is not below 250
    shares = [evaluation.pck(exactly, exactly * 0, threshold) for threshold in (250.0, 250.1)]
    assert shares == [0, 100]


def test_alignment_of_degenerate_poses():
    t = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = 1000 * (t - t.mean(1, keepdim=True)).norm(dim=-1).mean().item()
    for point in (0.0, 1 / 3, 1e6):  # every joint in one place
        assert p_mpjpe(torch.full_like(t, point), t) == pytest.approx(spread, rel=1e-9)
    along = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    line = along.expand(5, 7, 3)
    assert p_mpjpe(-2 * line, line) == pytest.approx(0, abs=1e-6)  # a rotation turns it round
    assert p_mpjpe(t[:, :1], t[:, 1:2]) == pytest.approx(0, abs=1e-9)  # one joint
    assert p_mpjpe(t, t * 0) == pytest.approx(0, abs=1e-9)
    assert n_mpjpe(t * 0, t) == mpjpe(t * 0, t)


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_metrics_refuse_bad_poses(name):
    metric, good = getattr(evaluation, name), torch.ones(3, 4, 3)
    bad_poses = {"(4, 3)": good[0], "(3, 4, 2)": good[..., :2], "(0, 4, 3)": good[:0],
                 "ndarray": good.numpy(), "differ": good[:, :2]}
    for said, bad in bad_poses.items():
        rejected(said, metric, bad, good)
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[1, 2, 0] = value
        rejected(["target", "frame 1"], metric, good, bad)
    if name == "mpjve":
        rejected("2 frames", metric, good[:1], good[:1])


class OnMps(torch.Tensor):
    """A tensor that says it is on Apple's mps device, which has no float64."""
    device = torch.device("mps")

    def double(self):
        raise TypeError("mps has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_where_the_device_has_no_float64_the_cpu_scores():
    p, t = (torch.tensor(pose).float() for pose in golden_pair())
    for name in METRIC_NAMES:
        metric = getattr(evaluation, name)
        assert metric(p.as_subclass(OnMps), t.as_subclass(OnMps)) == metric(p, t)


# ---- a small store

def small_sequence(subject, action, frames, valid=None, seed=0, joints=17):
    rng = np.random.default_rng(seed)
    return Sequence(
        subject=subject, action=action, camera="0", valid=valid, size=(1000, 1000), fps=50.0,
        pose_2d=rng.uniform(0, 1000, (frames, joints, 2)).astype(np.float32),
        pose_3d=rng.normal(size=(frames, joints, 3)).astype(np.float32),
        root=np.tile(np.float32([0, 0, 4]), (frames, 1)), source="files in Human3.6M layout",
        intrinsics=np.float32([1000, 1000, 500, 500, 0, 0, 0, 0, 0]))


def small_store(clips, skeleton="h36m17", target="camera"):
    """A store of (subject, action, frames[, valid]), random poses under Human3.6M's name."""
    skeleton = SKELETONS[skeleton]
    sequences = [small_sequence(*clip, seed=seed, joints=len(skeleton.joints))
                 for seed, clip in enumerate(clips)]
    return FrameStore(sequences, "release-500", skeleton, target=target)


def off_by(store, size=0.2):
    """Predictions for a store: its poses and noise."""
    generator = torch.Generator().manual_seed(1)
    return store.pose_3d + size * torch.randn(store.pose_3d.shape, generator=generator)


CLIPS = (("S9", "Walking 1", 5), ("S9", "Walking", 2), ("S11", "Walking", 3),
         ("S11", "Photo 1", 4), ("S9", "Posing", 1))


def eval_recipe(method="gridconv", **fields):
    """A small recipe, with all that build_model and a report read."""
    small = dict(method=method, data="h36m", layout="released", filter_widths=(3,), channels=4)
    return SimpleNamespace(**{**dataclasses.asdict(tiny_recipe(**small)), **fields})


# ---- scores

def test_score_averages_over_actions_as_a_loop_does():
    store = small_store(CLIPS)
    prediction = off_by(store)
    scores, errors, at = score(prediction, store), {}, 0
    p, t = prediction.double(), store.pose_3d.double()
    for subject, action, frames in CLIPS:
        for f in range(at, at + frames):
            row = [getattr(evaluation, name)(p[f:f + 1], t[f:f + 1]) for name in FRAME_METRICS]
            errors.setdefault((action.split(" ")[0], subject), []).append(row)
        at += frames

    for part, column in enumerate(("subject", "action")):
        groups = {}
        for key, rows in errors.items():
            groups.setdefault(key[1 - part], []).extend(rows)
        got = evaluation.mean(scores["rows"], column)
        assert set(got) == set(groups)
        for name, rows in groups.items():
            assert got[name]["frames"] == len(rows)
            figures = [got[name][metric] for metric in FRAME_METRICS]
            assert figures == pytest.approx(np.mean(rows, 0), rel=1e-9)
    unweighted = np.mean([np.mean(rows, 0) for rows in groups.values()], 0)  # over the actions
    assert [scores[metric] for metric in FRAME_METRICS] == pytest.approx(unweighted, rel=1e-9)
    pooled = evaluation.mean(scores["rows"])
    assert scores["frames"] == pooled["frames"] == 15
    assert pooled["mpjpe"] == pytest.approx(mpjpe(prediction, store.pose_3d), rel=1e-9)
    assert abs(pooled["mpjpe"] - scores["mpjpe"]) > 1  # which differ
    cells = evaluation.mean(scores["rows"], ("action", "subject"))
    assert cells["Walking", "S11"]["mpjpe"] == pytest.approx(mpjpe(p[7:10], t[7:10]))
    rejected("15", score, prediction[:3], store)
    prediction[4, 3, 1] = math.nan
    rejected("NaN", score, prediction, store)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_velocities_are_those_within_a_sequence_in_chunks_of_any_size(chunk):
    store = small_store(CLIPS)
    p, t = off_by(store).double(), store.pose_3d.double()
    scores = score(off_by(store), store, chunk=chunk)
    velocity = [mpjve(p[a:b], t[a:b]) for a, b in ((0, 5), (5, 7), (7, 10), (10, 14))]
    rows = scores["rows"]
    assert [row["mpjve"] for row in rows[:4]] == pytest.approx(velocity)
    assert rows[4]["mpjve"] is None  # one frame has no velocity
    assert [row["pairs"] for row in rows] == [4, 1, 2, 3, 0]
    walking = (4 * velocity[0] + velocity[1] + 2 * velocity[2]) / 7
    actions = evaluation.mean(rows, "action")
    assert actions["Walking"]["mpjve"] == pytest.approx(walking)
    assert actions["Posing"]["mpjve"] is None
    assert scores["mpjve"] == pytest.approx((walking + velocity[3]) / 2)
    assert scores["mpjpe"] == pytest.approx(score(off_by(store), store)["mpjpe"], rel=1e-12)


@pytest.mark.parametrize("skeleton, left_out", [("3dhp17", (14, 15, 16)), ("h36m17", (0, 7, 9))])
def test_score_of_3dhp_counts_valid_frames_and_the_benchmarks_joints(skeleton, left_out):
    flags = {"TS1": [1, 0, 1, 1], "TS2": [0, 0], "TS3": [1, 1, 0], "TS6": [0, 1]}
    clips = [(name, name, len(some), np.array(some, bool)) for name, some in flags.items()]
    store = small_store(clips, skeleton)
    prediction = off_by(store, 0.1)
    scores = score(prediction, store)
    assert prediction[:, store.skeleton.root].abs().max() > 0  # the caller's stays
    prediction[:, store.skeleton.root] = 0
    p, t = prediction.double(), store.pose_3d.double()
    index = {"TS1": [0, 2, 3], "TS3": [6, 7], "TS6": [10], "studio, green screen": [0, 2, 3],
             "studio": [6, 7], "outdoor": [10], "all": [0, 2, 3, 6, 7, 10]}
    rows = scores["rows"]
    got = {**evaluation.mean(rows, "subject"), **evaluation.mean(rows, "scene"), "all": scores}
    counted = [j for j in range(17) if j not in left_out]
    for name, some in index.items():
        assert got[name]["frames"] == len(some)
        for metric in ("mpjpe", "p_mpjpe", "pck", "auc"):
            joints = counted if metric in ("pck", "auc") else range(17)
            wanted = getattr(evaluation, metric)(p[some][:, list(joints)], t[some][:, list(joints)])
            assert got[name][metric] == pytest.approx(wanted, rel=1e-9)
    assert got["TS2"]["frames"] == 0 and got["TS2"]["mpjpe"] is None
    moving = [mpjve(p[[a, b]], t[[a, b]]) for a, b in ((2, 3), (6, 7))]  # valid neighbours
    assert scores["mpjve"] == pytest.approx(np.mean(moving))


def test_each_datasets_headline_is_its_protocols_average():
    eva = (("Validate/S1", "Walking 1 chunk0", 3), ("Validate/S2", "Walking 1 chunk0", 2),
           ("Validate/S1", "Walking 1 chunk3", 4), ("Validate/S2", "Jog 1 chunk0", 2))
    store = small_store(eva, "humaneva15")
    p, t = off_by(store).double(), store.pose_3d.double()
    parts = ([0, 1, 2, 5, 6, 7, 8], [3, 4], [9, 10])  # all chunks of S1
    pairs = [p_mpjpe(p[some], t[some]) for some in parts]
    assert score(off_by(store), store)["p_mpjpe"] == pytest.approx(np.mean(pairs))
    store = small_store(CLIPS)
    store.sequences = [dataclasses.replace(s, source="motion capture") for s in store.sequences]
    pooled = mpjpe(off_by(store), store.pose_3d)
    assert score(off_by(store), store)["mpjpe"] == pytest.approx(pooled)


@settings(max_examples=8)
@given(st.integers(0, 10 ** 6), st.sampled_from([3, 64, 65536]))
def test_yardsticks_are_numpys(seed, chunk):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(34, 51))

    def store(frames):
        s = small_sequence("S1", "A", frames, seed=rng.integers(10 ** 9))
        s.pose_2d[:, 3] = s.pose_2d[:, 2]  # coinciding joints: a singular system
        linear = ((s.pose_2d.reshape(frames, -1) / 500 - 1) @ mix).reshape(frames, 17, 3)
        s.pose_3d[:] = 0.1 * linear + 0.1 * s.pose_3d + 1
        s.valid = np.arange(frames) % 7 != 2
        return FrameStore([s], "release-500", H17)

    def error(guess):
        return 1000 * np.linalg.norm((guess - yt).reshape(len(yt), 17, 3), axis=-1).mean()
    train_store, test_store = store(140), store(30)
    x, y, xt, yt = (part[store.valid].double().flatten(1).numpy()
                    for store in (train_store, test_store)
                    for part in (store.input, store.pose_3d))
    solution = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=1e-10)[0]
    got = evaluation.yardsticks(train_store, test_store, chunk=chunk)
    assert got["mean_pose"] == pytest.approx(error(y.mean(0)), rel=1e-9)
    assert got["affine"] == pytest.approx(error(np.c_[xt, np.ones(len(xt))] @ solution), rel=1e-6)
    assert got["affine"] < got["mean_pose"]


# ---- predictions

class SeesItsWindow(torch.nn.Module):
    """Puts out numbers that show which window it saw, and is not symmetric under flips."""

    def __init__(self, frames, causal=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.receptive_field, self.causal, self.drop = frames, causal, torch.nn.Dropout(0.5)

    def forward(self, pose):
        if self.receptive_field > 1:
            assert pose.shape[1] == self.receptive_field
            pose = (pose * torch.arange(1, pose.shape[1] + 1)[:, None, None]).sum(1)
        pose = self.drop(pose)
        depth = pose[..., :1] * pose[..., 1:] + torch.arange(17)[:, None]
        return torch.cat([pose * self.weight + 0.1, depth], -1)


@pytest.mark.parametrize("frames, causal", [(1, False), (3, False), (5, True)])
@pytest.mark.parametrize("target", ["camera", "uvd"])
def test_predict_with_flips_is_the_explicit_average(frames, causal, target):
    store, model = small_store(CLIPS, target=target), SeesItsWindow(frames, causal)
    model.train()
    model.drop.eval()
    index = torch.tensor([0, 4, 5, 11, 14, 2])
    flipped = predict(model, store, index, flip=True, batch=4)
    plain = predict(model, store, index)
    assert model.training and not model.drop.training  # left as they were
    order = list(range(17))
    for left, right in zip(H17.left, H17.right):
        order[left], order[right] = right, left
    negated = torch.tensor([-1.0, 1.0, 1.0])
    model.eval()
    for k, i in enumerate(index.tolist()):
        first, last = int(store.first[i]), int(store.last[i])
        start = i - (frames - 1 if causal else frames // 2)
        window = store.input[[min(max(start + n, first), last) for n in range(frames)]]
        both = torch.stack([window, window[:, order] * negated[:2]])
        with torch.no_grad():
            one, other = model(both if frames > 1 else both[:, 0])
        wanted = torch.stack([one, (one + other[order] * negated) / 2])
        wanted = store.to_camera(wanted, torch.tensor([i, i]))
        got = torch.stack([plain[k], flipped[k]])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predict(model, store, batch=2)[index], plain)
    scores = score(predict(model, store, flip=True), store)
    assert evaluation.evaluate(model, store, flip=True) == scores


def test_a_refined_prediction_uses_each_frames_own_root_and_camera():
    store, model = small_store(CLIPS), SeesItsWindow(3)
    refinement = glagcn.Refinement(17).train()
    got = predict(model, store, refinement=refinement, batch=4)
    assert all(module.training for module in refinement.modules())
    intrinsics = store.normalised_intrinsics(torch.arange(len(store)))
    plain = predict(model, store)
    with torch.no_grad():
        wanted = refinement.eval()(plain, store.input, intrinsics, store.root)
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, plain)
    scores = evaluation.evaluate(model, store, refinement=refinement)
    assert scores["mpjpe"] == pytest.approx(score(wanted, store)["mpjpe"], rel=1e-6)


class CountsConstants(TorchDispatchMode):
    """Counts the tensors made of Python numbers, each of which a GPU would have to be sent."""
    made = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.made += operation.name() in ("aten::lift_fresh", "aten::_to_copy")
        return operation(*args, **(kwargs or {}))


def test_a_flipped_batch_sends_nothing_to_the_device():
    store, refinement = small_store(CLIPS), glagcn.Refinement(17)
    model = build_model(eval_recipe("glagcn"))
    made = []
    for batch in (15, 3):
        with CountsConstants() as mode:
            predict(model, store, flip=True, refinement=refinement, batch=batch)
        made.append(mode.made)
    assert made[0] == made[1]  # not a tensor more for five batches than for one


# ---- devices

@pytest.mark.parametrize("asked", ["auto", "float32", "tf32", "bf16"])
def test_a_cpu_computes_in_float32_unless_told_otherwise(asked):
    got = "float32" if asked == "auto" else asked
    assert pick_device("cpu", asked) == (torch.device("cpu"), got)
    assert torch.backends.cudnn.allow_tf32 == (got != "float32")
    assert torch.get_float32_matmul_precision() == ("highest" if got == "float32" else "high")
    assert "cpu" in evaluation.device_name(torch.device("cpu"))


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "meta", "cuda:99", ""])
def test_a_device_that_is_not_here_is_named(name):
    rejected([f"--device {name}", "--device cpu"], pick_device, name)


def test_a_driver_that_torch_cannot_use_stops_unless_the_cpu_is_asked_for(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 535.104.05\necho 535.104.05\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = ["535.104.05", "580", torch.__version__, "previous versions", "--device cpu"]
    for name in (None, "cuda"):
        rejected(said, pick_device, name)
    assert pick_device("cpu")[0].type == "cpu"
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
        assert pick_device()[0].type == "cpu"
    script.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert pick_device()[0].type == "cpu"
    script.unlink()
    assert pick_device()[0].type == "cpu"


def test_an_unsupported_card_is_named_and_each_process_takes_its_own(monkeypatch):
    taken, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_100", "compute_120"])
    monkeypatch.setenv("LOCAL_RANK", "3")
    rejected(["GeForce GTX 1080", "6.1", "7.5", "--device cpu"], pick_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    assert pick_device() == (torch.device("cuda:3"), "tf32")
    assert pick_device("cuda:1", "bf16") == (torch.device("cuda:1"), "bf16")
    assert taken == [torch.device(name) for name in ("cuda:3", "cuda:3", "cuda:1")]


# ---- models from recipes and checkpoints

def shaken_network(**fields):
    """A recipe's network with random weights and statistics: no two parts are alike."""
    model = build_model(eval_recipe(**fields))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grid = {name: value for name, value in state.items() if "assignment" in name}
    shake(model).load_state_dict(grid, strict=False)  # a grid stays one
    return model


def save_model(path, network, **more):
    """A checkpoint of this project, as train.py writes it."""
    content = {"format": "poselift", "version": 1, "recipe": vars(network.recipe),
               "model": network.state_dict(), "epoch": 3, "data": "synthetic motion",
               "temperature": getattr(network, "temperature", None), "refinement": {}}
    torch.save({**content, **more}, path)


LAYOUTS = ("handcrafted", "released", "random", "row", "column", "global", "autogrids",
           "autogrids-random")
GRIDS = [dict(layout=name) for name in LAYOUTS]
GRIDS += [dict(layout="random", grid=(7, 3), attention="", padding=("zeros",)),
          dict(layout="autogrids", grid=(3, 6), attention="channel"),
          dict(method="gridconv-temporal", filter_widths=(3, 3)),
          dict(method="gridconv-temporal", layout="autogrids")]
OTHERS = [dict(method="fc"), dict(method="gcn", skeleton="h36m32"),
          dict(method="glagcn", skeleton="humaneva15", filter_widths=(3, 3)),
          dict(method="glagcn", skeleton="humaneva15", keypoints="detectron_pt_coco",
               input_norm=False),
          dict(method="glagcn", skeleton="3dhp17", reconstruct=True, unshared_weight=0.5),
          dict(method="glagcn", causal=True, adaptive=False)]


@pytest.mark.parametrize("fields", GRIDS + OTHERS, ids=str)
def test_checkpoints_give_back_the_model(fields, tmp_path):
    model = shaken_network(**{"layout_seed": 3, "temperature": 7.0, **fields})
    save_model(tmp_path / "m.pt", model, licence="CC0")
    again = load_model(tmp_path / "m.pt")
    frames = (model.receptive_field,) if model.receptive_field > 1 else ()
    x = torch.randn(2, *frames, len(SKELETONS[model.recipe.skeleton].joints), 2)
    assert torch.equal(again(x), model(x))
    assert not again.training
    assert not torch.equal(model(x), model(x * 2))
    model.recipe.temperature = getattr(model, "temperature", 7.0)
    assert vars(again.recipe) == {**vars(model.recipe), "crossed": False}
    assert (again.epoch, again.trained_on, again.licence) == (3, "synthetic motion", "CC0")
    text, size = evaluation.inspect(again), sum(p.numel() for p in model.parameters())
    assert text.startswith(f"tiny ({model.recipe.method}): {size:,} parameters")
    assert f"receptive field {model.receptive_field}," in text
    assert ("dropped joints" in text) == fields.get("layout", "").startswith("autogrids")


def test_an_annealed_temperature_and_compiled_or_parallel_names_are_read(tmp_path):
    model = shaken_network()
    model.temperature = 4.5  # that of the epoch; the recipe's is where it started
    x = torch.randn(2, 17, 2)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        state = {prefix + name: value for name, value in model.state_dict().items()}
        save_model(tmp_path / "m.pt", model, model=state)
        again = load_model(tmp_path / "m.pt")
        assert torch.equal(again(x), model(x)) and again.temperature == 4.5


def test_checkpoints_with_fields_of_before_are_read(tmp_path):
    model = build_model(eval_recipe("glagcn"))
    recipe = {**vars(model.recipe), "shown_every": 5}  # no longer a field
    for name in ("input_norm", "normalisation", "cameras", "noise", "swap_sides", "weights"):
        del recipe[name]  # not yet one
    save_model(tmp_path / "m.pt", model, recipe=recipe)
    recipe = load_model(tmp_path / "m.pt").recipe
    assert (recipe.input_norm, recipe.normalisation) == (True, "column")
    assert recipe.cameras == "recorded"


def test_layouts_of_recipes():
    def same(wanted, **fields):
        S = build_model(eval_recipe(**fields)).assignment()
        return torch.equal(S, gridconv.assignment_matrix(wanted, 17))
    assert same(gridconv.HANDCRAFTED_5X5, layout="handcrafted")
    assert same(gridconv.RELEASED_5X5, layout="released")
    assert same(gridconv.random_layout(17, (5, 5), 5), layout="random", layout_seed=5)
    for how in ("row", "column", "global"):
        wanted = gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, how, 2)
        assert same(wanted, layout=how, layout_seed=2)
    starts = []
    for seed in (4, 4, 5):  # the seed alone decides, whatever was drawn before
        torch.rand(1)
        model = build_model(eval_recipe(layout="autogrids-random", layout_seed=seed))
        starts.append(model.autogrids.s_prob)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert 0 <= starts[0].min() and starts[0].max() < 1
    gcn = build_model(eval_recipe("gcn", skeleton="h36m32"))
    graph = next(m.graph for m in gcn.modules() if isinstance(m, gridconv.GraphConv))
    bones = {frozenset(edge) for edge in SKELETONS["h36m32"].edges}
    assert {frozenset(pair) for pair in graph.triu(1).nonzero().tolist()} == bones


@pytest.mark.parametrize("said, fields", [
    ("spiral", dict(layout="spiral")), ("4 x 5", dict(grid=(4, 5))),
    ("robot", dict(skeleton="robot")), ("linear", dict(method="linear")),
    ("mirror", dict(padding=("mirror",))), ("temperature", dict(temperature=0.0)),
    ("released", dict(layout="released", skeleton="h36m32", grid=(7, 5))),
    ("coco17", dict(method="glagcn", skeleton="coco17"))])
def test_recipes_that_cannot_be_built_are_named(said, fields):
    with pytest.raises(ValueError, match=said):
        build_model(eval_recipe(**fields))


def doubled(part):
    """2^60 words in a few bytes."""
    for _ in range(60):
        part = [part, part]
    return part


@pytest.mark.parametrize("field, value", [
    ("hidden", 8), ("hidden", 10 ** 12), ("attention", ""), ("blocks", 3000), ("grid", (200, 200)),
    ("grid", (5, 0)), ("kernel_sizes", (3, 3)), ("kernel_sizes", (99, (99, 99), 99)),
    ("padding", doubled("zeros")), ("layout", 3), ("layout_seed", "x"), ("skeleton", ["h36m17"]),
    ("method", None), ("dropout", "a lot"), ("temperature", "hot"), ("temperature", math.nan)])
def test_a_recipe_that_does_not_fit_its_weights_is_one_line(field, value, tmp_path):
    model = build_model(eval_recipe(layout="random"))
    recipe = {**vars(model.recipe), field: value}
    save_model(tmp_path / "m.pt", model, recipe=recipe, temperature=None)
    rejected("m.pt", load_model, tmp_path / "m.pt")


@pytest.mark.parametrize("said, content", [
    ("no checkpoint", {"weights": {}}),
    ("no checkpoint", [1, 2]),
    ("no checkpoint", {"state_dict": {"a": 1}}),
    ("no checkpoint", {"model_pos": None}),
    ("nothing", {}),
    ("w1", {"state_dict": {"conv.weight": torch.ones(2)}}),
    ("w1.branch1_weight", {"state_dict": {"w1.branch1_weight": torch.ones(2)}}),
    ("expand_gcn", {"model_pos": {"module.fc.weight": torch.ones(2)}}),
    ("fit", {"model_pos": {"expand_gcn.gcn1.PA": torch.ones(())}})])
def test_what_is_no_checkpoint_is_one_line(said, content, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    given = {"padding": ("circular",)} if "state_dict" in content else {}
    rejected(["m.pt", said], load_model, tmp_path / "m.pt", **given)


def test_damaged_and_changed_checkpoints_are_one_line(tmp_path):
    path, model = tmp_path / "m.pt", build_model(eval_recipe())
    save_model(path, model)
    whole = path.read_bytes()
    for name, value in (("colour", "red"), ("hidden", 8), ("padding", ("zeros",)),
                        ("grid", (5, 5)), ("skeleton", "3dhp17")):
        rejected(["m.pt", name, "leave the option out"], load_model, path, **{name: value})
    for part in (whole[:len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(part)
        rejected("m.pt", load_model, path)
    short = {name: value for name, value in vars(model.recipe).items() if name != "hidden"}
    changed = [("version 2", dict(version=2)), ("fit", dict(model={})), ("fit", dict(recipe=short)),
               ("does not say its", dict(recipe={"method": "gridconv"}))]
    changed += [("m.pt", dict(temperature=value)) for value in ("hot", torch.ones(3), 0.0)]
    for value in (math.nan, math.inf):
        weight = model.state_dict()["shrink.weight"].clone()
        weight.view(-1)[5] = value
        state = {**model.state_dict(), "shrink.weight": weight}
        changed.append(("shrink.weight: NaN or infinite", dict(model=state)))
    for said, more in changed:
        save_model(path, model, **more)
        rejected(["m.pt", said], load_model, path)
    path.unlink()
    rejected(["m.pt", "not found"], load_model, path)


CLAIMS = """
import resource, sys, torch, data, eval as evaluation
room = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2 ** 30
resource.setrlimit(resource.RLIMIT_AS, (room, room))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        evaluation.load_model(path, padding=None if "own" in path else ("zeros",) * 2)
        sys.exit(f"{path} was read")
    except data.InputError as error:
        print(error)
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > before + 2 ** 17)
"""


def test_files_that_claim_more_than_they_hold_take_no_memory(tmp_path):
    """Networks of gigabytes without their weights, or with one value repeated by a stride."""
    own = {"format": "poselift", "version": 1, "data": "", "model": {}}
    for i, fields in enumerate(({"hidden": 3000}, {"hidden": 1, "blocks": 30000},
                                {"layout": "random", "grid": (2000, 2000)},
                                {"method": "glagcn", "channels": 10000})):
        torch.save({**own, "recipe": vars(eval_recipe(**fields))}, tmp_path / f"own-{i}")
    wide = eval_recipe(hidden=3000)
    with torch.device("meta"):
        state = build_model(wide).state_dict()
    repeated = {name: torch.ones(()).expand(value.shape) for name, value in state.items()}
    torch.save({**own, "recipe": vars(wide), "model": repeated}, tmp_path / "own-repeated")
    first = {f"w1.{branch}_conv.weight": torch.zeros(3000, 2, 3, 3)
             for branch in ("donut", "tablet")}
    state = {**released_gridconv("vanilla", 4, 2), **first}
    torch.save({"state_dict": state}, tmp_path / "released-wide")
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", CLAIMS, *files], capture_output=True, text=True,
                          cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == len(files) == 6


# ---- the releases' files

@pytest.mark.parametrize("kind", ["dynamic", "vanilla", "autogrids"])
def test_gridconvs_released_files_are_read(kind, tmp_path):
    state, path = released_gridconv(kind, blocks=2), tmp_path / "best.pth.tar"
    save_released(path, state)
    rejected("--padding", load_model, path)
    rejected("filter_widths", load_model, path, filter_widths=(3,))
    model, x = load_model(path, padding=["circular", "zeros"]), torch.randn(3, 17, 2)
    wanted = gridconv.from_released(state, ("circular", "zeros")).eval()
    assert torch.equal(model(x), wanted(x)) and not torch.equal(model(x), model(x * 2))
    other = load_model(path, padding=("circular", "replicate"))
    assert not torch.allclose(other(x), wanted(x), rtol=1e-3)
    recipe = model.recipe
    assert (recipe.normalise, recipe.skip, model.temperature) == ("release-500", "gridconv", 30.0)
    assert recipe.layout == ("autogrids" if kind == "autogrids" else "released")
    assert recipe.keypoints == ("gt" if kind == "vanilla" else "hrnet")
    assert other.recipe.keypoints == "gt"
    assert model.trained_on == "Human3.6M" and not recipe.crossed
    cpn = load_model(path, padding=("circular", "zeros"), keypoints="cpn_ft_h36m_dbb").recipe
    assert cpn.keypoints == "cpn_ft_h36m_dbb" and cpn.crossed
    assert ("not known" in evaluation.inspect(model)) == (kind == "autogrids")


@pytest.mark.parametrize("joints, skeleton, keypoints, data_name, edges", [
    (17, "h36m17", None, "h36m", glagcn.H36M_EDGES),
    (17, "3dhp17", None, "3dhp", glagcn.MPI3DHP_EDGES),
    (15, None, "gt", "humaneva", glagcn.HUMANEVA15_EDGES),
    (15, None, "detectron_pt_coco", "humaneva", glagcn.HUMANEVA15_DETECTED_EDGES)])
def test_glagcns_released_files_are_read(joints, skeleton, keypoints, data_name, edges, tmp_path):
    state, path = released_glagcn(joints, 2), tmp_path / "best_epoch.bin"
    save_released(path, state)
    given = dict(filter_widths=[3, 3], skeleton=skeleton, keypoints=keypoints)
    rejected(["--filter-widths", "--skeleton"], load_model, path)
    unsaid = "--skeleton" if joints == 17 else "--keypoints gt or detectron_pt_coco"
    rejected(unsaid, load_model, path, filter_widths=(3, 3))
    rejected("strided", load_model, path, **{**given, "filter_widths": (3, 3, 3)})
    other = dict(skeleton="humaneva15" if joints == 17 else "h36m17", keypoints="gt")
    rejected("joint", load_model, path, **{**given, **other})
    norm = keypoints != "detectron_pt_coco"  # twelve links, no norm of the input
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = glagcn.from_released(bare, filter_widths=(3, 3), edges=edges, input_norm=norm).eval()
    model, x = load_model(path, **given), torch.randn(2, 9, joints, 2)
    assert torch.equal(model(x), wanted(x)) and model.receptive_field == 9
    assert (model.recipe.normalise, model.recipe.input_norm) == ("width", norm)
    assert model.recipe.data == data_name
    assert model.trained_on == evaluation.TRAINED_ON[data_name]
    if skeleton == "h36m17":
        words = ("--filter-widths", "3,3", "--skeleton", skeleton)
        refused("eval.py", path, *words, names=["2D poses", "--keypoints"])


# ---- whether a figure compares, and tables

HUMAN, OUR_EVA = "Human3.6M", "files in HumanEva-I layout"
TRAIN_3DHP, TEST_3DHP = "files in MPI-INF-3DHP layout", "MPI-INF-3DHP test set"
EVA = dict(name="glagcn-humaneva-mrcnn", data="humaneva", keypoints="detectron_pt_coco")
OUR_3DHP = dict(name="glagcn-3dhp-27", data="3dhp")
CROSSED = dict(name="gridconv-3dhp-cross", data="3dhp", weights="gridconv-gt-learnable")


@pytest.mark.parametrize("fields, test_data, trained_on, wanted", [
    (dict(), HUMAN, HUMAN, True),
    (dict(data="gridconv"), HUMAN, HUMAN, True),
    (dict(), "synthetic motion", HUMAN, False),
    (dict(), HUMAN, "synthetic motion", False),
    (dict(), "files in Human3.6M layout (not Human3.6M: 3,000 frames)", HUMAN, False),
    (dict(crossed=True), HUMAN, HUMAN, False),
    (dict(keypoints="hrnet"), HUMAN, HUMAN, False),
    (dict(name="gridconv-hrnet-learnable", keypoints="hrnet"), HUMAN, HUMAN, True),
    (dict(name="glagcn-cpn-243", keypoints="cpn_ft_h36m_dbb"), HUMAN, HUMAN, True),
    (EVA, OUR_EVA, OUR_EVA, True),
    (EVA, OUR_EVA + ", made by this project", OUR_EVA, False),
    ({**EVA, "keypoints": "gt"}, OUR_EVA, OUR_EVA, False),
    (OUR_3DHP, TEST_3DHP, TRAIN_3DHP, True),
    (OUR_3DHP, TEST_3DHP, TRAIN_3DHP + ", made by this project", False),
    (CROSSED, TEST_3DHP, HUMAN, True),
    (CROSSED, TEST_3DHP, "motion capture", False),
    (dict(data="3dhp"), TEST_3DHP, HUMAN, False),
    (dict(name="gridconv-mocap", data="mocap"), "motion capture", "motion capture", False)])
def test_figures_compare_only_where_data_and_2d_are_the_rows(fields, test_data, trained_on, wanted):
    recipe = eval_recipe(**{"name": "gridconv-gt", **fields})
    assert evaluation.compares(recipe, test_data, trained_on) is wanted


def one_score(value, frames=10, **more):
    """A sequence's row of scores."""
    return dict(frames=frames, pairs=0, mpjpe=value, p_mpjpe=value - 10, n_mpjpe=value - 1,
                mpjve=None, **more)


def result_of(recipe, rows, compares=True, test_data="Human3.6M", kind="h36m", **more):
    """A result with these rows of scores, as train.py and eval.py make it."""
    scores = {**evaluation.headline(rows, kind), "rows": rows, "epoch": 7}
    return {"recipe": vars(recipe), "data": "Human3.6M", "test_data": test_data,
            "compares": compares, "last": scores, **more}


def table_rows(text):
    """The cells of every table line of a markdown text, by first cell."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_report_puts_the_papers_figures_beside_measured_ones():
    rows = [one_score(50.0, subject="S9", action=action) for action in evaluation.ACTIONS]
    recipe = eval_recipe(name="gridconv-hrnet-learnable", keypoints="hrnet", row="Table 1 and A",
                         ours="lambda 0.5")
    text = report(result_of(recipe, rows))
    table = table_rows(text)
    assert table["action"] == ["frames", "MPJPE", "MPJPE, paper", "P-MPJPE", "P-MPJPE, paper",
                               "N-MPJPE", "MPJVE"]
    assert table["SittingDown"] == ["10", "50.00", "63.90", "40.00", "52.50", "49.00", "-"]
    average = ["150", "50.00", "47.60", "40.00", "37.40", "49.00", "-"]
    assert table["average over actions"] == average
    assert table["S9"][:2] == table["all frames"][:2] == ["150", "50.00"]
    assert all(word in text for word in ("Table 1 and A", "lambda 0.5", "(7)"))
    assert "not Human3.6M" not in text
    other = report(result_of(recipe, rows, False, "synthetic motion"))
    assert "not Human3.6M" in other and "synthetic motion" in other
    crossed = report(result_of(recipe, rows, False))
    assert "do not compare" in crossed
    for shown in (other, crossed):
        assert not any(figure in shown for figure in ("paper |", "47.60", "63.90", "37.40"))
    recipe = eval_recipe(name="gridconv-gt", row="Table 5", paper_mpjpe=37.1, paper_p_mpjpe=0.0)
    table = table_rows(report(result_of(recipe, rows)))
    assert table["Walking"][2] == "-" and table["average over actions"][2] == "37.10"
    assert table["action"].count("MPJPE, paper") == 1 and "P-MPJPE, paper" not in table["action"]


def test_report_says_what_was_run_and_labels_best_last_and_refined():
    def scores(value, epoch):
        rows = [one_score(value, subject="S9", action="Walking"),
                one_score(value, 30, subject="S11", action="Photo")]
        return {**evaluation.headline(rows, "h36m"), "rows": rows, "epoch": epoch}
    last = scores(44.0, 7)
    more = dict(seed=2, commit="abc1234", device="NVIDIA H100", precision="tf32", micro_batch=64,
                compile=True, torch="2.13", python="3.12", parameters=4790406, epochs=80.0,
                seconds=90.0, settings_changed="lr 1 (published: 0.001)", best=scores(41.0, 5),
                refined=scores(33.0, 7), yardsticks={"mean_pose": 173.31, "affine": 69.9},
                autogrids={"cells_changed": 4, "dropped": [3], "layout": []})
    text = report(result_of(eval_recipe(row="the row"), last["rows"], **more))
    for fact in ("## tiny, seed 2: the row", "abc1234", "NVIDIA H100", "tf32", "micro batch: 64",
                 "compile: True", "2.13", "3.12", "4790406", "epochs: 80", "minutes: 1.5",
                 "lr 1 (published: 0.001)", "4 cells changed", "dropped: 3", "40 test frames",
                 "this model 44.00 mm", "173.31", "69.90"):
        assert fact in text, fact
    _, *parts = text.split("### ")
    assert [part[:4] for part in parts] == ["Best", "Last", "Last"]
    assert "true root position and the intrinsics" in parts[2].split("\n")[0]
    assert "(5)" in parts[0] and "(7)" in parts[1]
    assert "41.00" in parts[0] and "44.00" in parts[1] and "33.00" in parts[2]
    same = dict(best=last, yardsticks={"affine": None})
    text = report(result_of(eval_recipe(), last["rows"], **same))
    assert text.count("### ") == 1 and "and the last" in text and "yardstick" not in text


def test_report_of_humaneva_by_action_and_subject_and_of_3dhp_by_sequence_and_scene():
    rows = [one_score(value + i, frames, subject=f"Validate/S{i}", action=action)
            for action, value in (("Walking", 20.0), ("Jog", 40.0)) for i in (1, 2, 3)
            for frames in (3, 5)]
    recipe = eval_recipe(name="glagcn-humaneva-gt", data="humaneva", paper_p_mpjpe=9.2)
    text = report(result_of(recipe, rows, kind="humaneva", test_data=OUR_EVA))
    table = table_rows(text)
    assert table["action and subject"][3] == "P-MPJPE, paper"
    assert table["Jog S2"][:4] == ["8", "42.00", "32.00", "8.20"]
    assert table["Walking S3"][3] == "11.50"
    assert table["average over both"][:4] == ["48", "32.00", "22.00", "9.20"]
    assert "last one alone" in text
    rows = [one_score(60.0, subject=name, action=name, scene=scene, pck=90.0 + i, auc=50.0)
            for i, (name, scene) in enumerate(evaluation.SCENES_3DHP.items(), 1)]
    recipe = eval_recipe(name="glagcn-3dhp-27", data="3dhp", paper_mpjpe=31.36, paper_pck=98.19,
                         paper_auc=76.53)
    text = report(result_of(recipe, rows, kind="", test_data=TEST_3DHP))
    table = table_rows(text)
    assert table["sequence"][:7] == ["frames", "MPJPE", "MPJPE, paper", "PCK", "PCK, paper",
                                     "AUC", "AUC, paper"]
    assert table["outdoor"][3] == "95.50" and table["TS2"][3] == "92.00"
    assert table["all frames"][:7] == ["60", "60.00", "31.36", "93.50", "98.19", "50.00", "76.53"]


def test_printed_rows_average_to_their_printed_average():
    for name, metrics in evaluation.PAPER.items():
        for row in metrics.values():
            assert len(row) == (7 if "humaneva" in name else 16)
            assert np.mean(row[:-1]) == pytest.approx(row[-1], abs=0.1), name


def test_markdown_aligns_figures_right_and_words_left():
    table = evaluation.markdown(["name", "mm"], [["a", 1.0], ["longer", None]])
    assert table == ("| name   |   mm |\n| ------ | ---: |\n"
                     "| a      | 1.00 |\n| longer |    - |")


# ---- looking inside

def test_inspect_of_a_learnt_grid_by_loops(tmp_path):
    model = build_model(eval_recipe(layout="autogrids-random", layout_seed=1))
    start = model.autogrids.s_prob.argmax(1).tolist()
    torch.manual_seed(1)
    model.autogrids.s_prob.data = torch.randn(25, 17) * 2
    save_model(tmp_path / "m.pt", model)
    status, text, _ = command("eval.py", "inspect", tmp_path / "m.pt")
    held, names = model.autogrids.s_prob.argmax(1).tolist(), H17.joints
    grid = text.split("grid, 5 x 5:\n")[1].split("\n")[:5]
    assert status == 0 and [int(word) for line in grid for word in line.split()] == held
    links = set()
    for i in range(25):
        for k in ([i + 1] if i % 5 < 4 else []) + ([i + 5] if i < 20 else []):
            links |= {(held[i], held[k]), (held[k], held[i])}
    for joint, name in enumerate(names):
        around = sorted(b for a, b in links if a == joint and b != joint)
        said = ", ".join(f"{b} {names[b]}" for b in around) or "none"
        assert f"  {joint} {name}: {said}\n" in text
    assert f"({sum(edge in links for edge in H17.edges)} of 16 bones" in text
    absent = [f"{joint} {name}" for joint, name in enumerate(names) if joint not in held]
    assert absent and f"dropped joints: {', '.join(absent)}\n" in text
    changed = sum(a != b for a, b in zip(start, held))
    assert f"cells changed from the start, of 25: {changed}\n" in text
    learnt = evaluation.learnt_grid(load_model(tmp_path / "m.pt"))
    assert (learnt["cells_changed"], sum(learnt["layout"], [])) == (changed, held)


# ---- the command line

def plain_3dhp(model, raw):
    """{sequence: errors (valid frames, 17) in mm} of a model of h36m17 on 3DHP's raw views."""
    errors, order = {}, [14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4]
    for name, view in raw.test_3dhp.items():
        w, h = (1920, 1080) if name in ("TS5", "TS6") else (2048, 2048)
        pixels = (view["data_2d"][:, order] - [w / 2, h / 2]) / (max(w, h) / 2)
        with torch.no_grad():
            pose = 1000 * model(torch.tensor(pixels, dtype=torch.float32)).numpy()
        pose[:, 0] = 0
        target = (view["data_3d"] - view["data_3d"][:, 14:15])[:, order]
        errors[name] = np.linalg.norm(pose - target, axis=-1)[view["valid"] == 1]
    return errors


def plain_h36m(model, raw):
    """{action: the views' errors (frames,) in mm} of a model on Human3.6M's raw test views."""
    errors = {}
    for subject in ("S9", "S11"):
        for take, views in raw.gt[subject].items():
            if (subject, take) == ("S11", "Directions"):  # left out by every row
                continue
            world = raw.space[subject][take][:, data.H36M_17_OF_32]
            for camera, view in enumerate(views):
                target = data.world_to_camera(world, data.H36M_EXTRINSICS[subject][camera])
                with torch.no_grad():
                    pose = model(torch.tensor((view[:5, :, :2] - 500) / 500).float()).numpy()
                error = np.linalg.norm(pose - target + target[:, :1], axis=-1)
                errors.setdefault(take.split(" ")[0], []).append(1000 * error.mean(1))
    return {action: np.concatenate(parts) for action, parts in errors.items()}


def test_evaluating_on_human36m_by_plain_arithmetic(everything, tmp_path, monkeypatch):
    folder, raw = everything
    model = shaken_network(name="gridconv-gt", paper_mpjpe=37.1, row="Table 5")
    save_model(tmp_path / "m.pt", model, data="Human3.6M")
    words, figures = (tmp_path / "m.pt", "--data", folder), tmp_path / "deep" / "figures.json"
    status, text, _ = command("eval.py", *words, "--json", figures)
    kept, errors, table = json.loads(figures.read_text()), plain_h36m(model, raw), table_rows(text)
    assert status == 0
    for name, values in errors.items():
        assert float(table[name][1]) == pytest.approx(values.mean(), abs=0.01)
    average = np.mean([values.mean() for values in errors.values()])
    assert kept["last"]["mpjpe"] == pytest.approx(average, rel=1e-4)
    assert f"this model {np.concatenate(list(errors.values())).mean():.2f} mm" in text
    assert f"{kept['yardsticks']['affine']:.2f} mm" in text
    assert kept["compares"] is False and "not Human3.6M" in text  # a miniature is none
    assert "37.10" not in text
    monkeypatch.setattr(data, "provenance", lambda sequences: "Human3.6M")
    _, text, _ = command("eval.py", *words)
    assert table_rows(text)["average over actions"][2] == "37.10"
    assert "not Human3.6M" not in text
    _, text, _ = command("eval.py", *words, "--keypoints", "hrnet")
    assert "37.10" not in text and "do not compare" in text  # other 2D than was trained on


def test_a_release_is_evaluated_on_another_dataset(everything, tmp_path):
    folder, raw = everything
    path = tmp_path / "best.pth.tar"
    save_released(path, released_gridconv("dynamic"))
    words = (path, "--padding", "circular,zeros", "--data", folder, "--dataset")
    status, text, err = command("eval.py", *words, "3dhp")
    assert (status, err) == (0, "")
    errors = plain_3dhp(load_model(path, padding=("circular", "zeros")), raw)
    table = table_rows(text)
    counted = [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    groups = {"TS2": ["TS2"], "outdoor": ["TS5", "TS6"], "all frames": list(errors)}
    for name, parts in groups.items():
        some = np.concatenate([errors[part] for part in parts])
        shares = [100 * np.mean(some[:, counted] < k) for k in range(0, 151, 5)]
        wanted = [len(some), some.mean(), shares[-1], np.mean(shares)]
        assert [float(cell) for cell in table[name][:4]] == pytest.approx(wanted, abs=0.01)
    assert "not Human3.6M" in text and "paper |" not in text
    refused("eval.py", *words, "humaneva", names=["h36m17", "humaneva15"])


def test_flips_and_missing_training_data_are_said(everything, tmp_path, monkeypatch):
    save_model(tmp_path / "m.pt", shaken_network(flip_test=True, data="mocap"))
    words = ("eval.py", tmp_path / "m.pt", "--data", everything[0])
    kept, figures = tmp_path / "f.json", []
    for option, word in ((), "with flips"), (("--no-flip",), "without flips"):
        status, text, _ = command(*words, "--json", kept, *option)
        assert status == 0 and word in text
        figures.append(json.loads(kept.read_text())["last"]["mpjpe"])
    assert figures[0] != figures[1]
    whole = data.make_store

    def test_only(recipe, folder, split, device="cpu"):
        if split == "train":
            raise InputError("data_train: not found")
        return whole(recipe, folder, split, device)
    monkeypatch.setattr(data, "make_store", test_only)
    status, text, err = command(*words)
    assert status == 0 and "no yardsticks: data_train" in err and "yardstick" not in text


@pytest.mark.parametrize("words, names", [
    ("lfit clip.json", ["unknown command 'lfit'", "lift"]),
    ("", ["checkpoint"]),
    ("inspect nowhere.pt", ["nowhere.pt", "not found"]),
    ("cut.pt", ["cut.pt"]),
    ("folder", ["folder"]),
    ("m.pt --size 3", ["--size"]),
    ("m.pt --filter-widths 3,x", ["--filter-widths"]),
    ("m.pt --dataset coco", ["coco"]),
    ("m.pt --device tpu", ["--device tpu"]),
    ("m.pt --padding zeros", ["padding", "leave the option out"]),
    ("m.pt --data nowhere", ["nowhere"]),
    ("m.pt --keypoints psychic", ["psychic"]),
    ("m.pt --cameras random --dataset 3dhp", ["random cameras"])])
def test_bad_commands_of_eval_end_in_one_line(words, names, everything, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(Path("m.pt"), build_model(eval_recipe()))
    Path("cut.pt").write_bytes(Path("m.pt").read_bytes()[:3000])
    Path("folder").mkdir()
    words = words.split()
    if "m.pt" in words[:1]:
        words[1:1] = ["--data", everything[0]]
    refused("eval.py", *words, names=names)


def test_help_names_every_command():
    status, out, _ = command("eval.py", "--help")
    assert status == 0
    assert all(word in out for word in ("inspect", "lift", "--padding", "--keypoints"))


# ---- a drawn person and the layouts that detectors write

SIZE = (1280, 720)
COCO_JOINTS = SKELETONS["coco17"].joints
# COCO's joint at each place of OpenPose's two layouts and of MediaPipe's; -1: none
BODY_25 = [0, -1, 6, 8, 10, 5, 7, 9, -1, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, *[-1] * 6]
COCO_18 = [0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
MEDIAPIPE = [0, -1, 1, -1, -1, 2, -1, 3, 4, -1, -1, *range(5, 11), *[-1] * 6,
             *range(11, 17), *[-1] * 4]
MARK = "x", "y", "z", "visibility"
KP_CSV = ",".join(f"{part}_{k}" for k in range(33) for part in MARK) + "\n"


def kp_body(frames=12, seed=0, size=SIZE):
    """COCO-17 keypoints (T, 17, 3) of a body of 300 pixels that sways, in eighths of a pixel."""
    place = dict(nose=(0, -140), eye=(8, -150), ear=(16, -145), shoulder=(40, -110),
                 elbow=(55, -50), wrist=(60, 5), hip=(25, 0), knee=(28, 75), ankle=(30, 150))
    sign = {"left": 1, "right": -1}
    parts = [name.split("_") for name in COCO_JOINTS]
    body = np.array([np.multiply(place[part[-1]], (sign.get(part[0], 0), 1)) for part in parts])
    rng, time = np.random.default_rng(seed), np.arange(frames)[:, None, None]
    moved = body + np.array(size) / 2 + 20 * np.sin(time / 5 + rng.uniform(0, 6, (17, 2))) + time
    scores = rng.integers(1, 64, (frames, 17, 1)) / 64
    return np.concatenate((np.round(8 * moved) / 8, scores), 2)


def kp_as(layout, body):
    """The body (T, 17, 3) in another layout; joints that COCO has not are far off."""
    padded = np.pad(body, ((0, 0), (0, 1), (0, 0)), constant_values=0.75)
    return padded[:, layout]


def kp_write(folder, files):
    """Writes {name: content}; the path of the one file, or of the folder of several."""
    folder = folder if len(files) == 1 else folder / "d"
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        path = folder / name
        if path.suffix == ".npz" and isinstance(content, dict):
            np.savez(path, **content)
        elif isinstance(content, np.ndarray):
            np.save(path, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if path.suffix in (".csv", ".txt") else json.dumps(content))
    return path if len(files) == 1 else folder


def kp_json(folder, content):
    return kp_write(folder, {"k.json": content})


def kp_list(body, skip=(), **more):
    """COCO result entries of a body, without the frames in `skip`."""
    entries = [{"image_id": t, "category_id": 1, "keypoints": points.flatten().tolist(),
                "score": 0.9, **more} for t, points in enumerate(body)]
    return [entry for entry in entries if entry["image_id"] not in skip]


def kp_named(entries, names):
    """The same entries, of images of other names."""
    return [{**entry, "image_id": name} for entry, name in zip(entries, names)]


def kp_instance(points, **more):
    """A person as MMPose writes them."""
    return {"keypoints": points[:, :2].tolist(), "keypoint_scores": points[:, 2].tolist(),
            "bbox": [[0, 0, 9, 9]], **more}


def kp_label(points, *rest):
    """A line of ultralytics' save_txt."""
    values = (0, 0.5, 0.5, 1, 1, *(points / (*SIZE, 1)).flatten().tolist(), *rest)
    return " ".join(map(str, values)) + "\n"


def kp_openpose(layout, body):
    """What OpenPose writes of each frame."""
    flat = kp_as(layout, body).reshape(len(body), -1).tolist()
    return [dict(version=1.3, people=[dict(person_id=[-1], pose_keypoints_2d=points)])
            for points in flat]


def kp_objects(entries):
    """A list as an array of objects, a place each."""
    array = np.empty(len(entries), object)
    array[:] = entries
    return array


def kp_detectron2(body):
    """Two people, one 400 pixels to the right, in the npz of Detectron2's inference."""
    people = np.stack((body, body + (400, 0, 0)), 1)
    rows = np.insert(people, 2, 0, axis=-1).swapaxes(2, 3)  # (T, 2, 4, 17): x, y, logit, score
    boxes = np.array([[0, 0, 9, 9, 0.99], [0, 0, 9, 9, 0.9]])
    return dict(boxes=kp_objects([[[], boxes]] * len(body)),
                keypoints=kp_objects([[[], row] for row in rows]),
                segments=kp_objects([None] * len(body)),
                metadata=np.array({"w": 1280, "h": 720}, object))


def kp_videopose3d(body, joints="coco", **videos):
    """VideoPose3D's custom npz of a.mp4 and other videos."""
    videos = {"a.mp4": {"custom": [body]}, **videos}
    sizes = {video: {"w": 1280, "h": 720} for video in videos}
    metadata = dict(layout_name=joints, video_metadata=sizes)
    return dict(positions_2d=np.array(videos, object), metadata=np.array(metadata, object))


def kp_files(pattern, contents):
    """{name: content} of numbered images."""
    return {pattern.format(t): content for t, content in enumerate(contents)}


def kp_formats(body):
    """{format: {file's name: content}}: a person as each detector writes them."""
    coco, flat = kp_list(body), body.reshape(len(body), -1).tolist()
    images = [dict(id=70 - t, width=1280, height=720) for t in range(len(body))]
    with_names = [dict(image, file_name=f"a/{t:06d}.jpg") for t, image in enumerate(images)]
    annotations = kp_named(coco, range(70, 0, -1))
    other = dict(image_id=70, category_id=18, bbox=[0, 0, 1, 1])
    alphapose = kp_named(kp_list(body, idx=[7.0]), (f"clip2_{t:03d}.jpg" for t in range(70)))
    bodies = [dict(version="AlphaPose v0.3", bodies=[dict(joints=points)]) for points in flat]
    mmpose = [kp_instance(points) for points in body]
    video = [dict(frame_id=t, instances=[person]) for t, person in enumerate(mmpose)]
    numbered = [dict(frame_id=t + 1, instances=[dict(person, track_id=7)])
                for t, person in enumerate(mmpose)]
    by_axis = [dict(zip(("x", "y", "visible"), points.T.tolist())) for points in body]
    yolo = [[dict(name="person", box=dict(x1=0), keypoints=points)] for points in by_axis]
    marks = np.insert(kp_as(MEDIAPIPE, body) / (*SIZE, 1), 2, -0.1, axis=-1)
    parts = [[dict(zip(MARK, mark)) for mark in person] for person in marks.tolist()]
    rows = [",".join(map(str, row)) + "\n" for row in marks.reshape(len(body), -1).tolist()]
    files = {
        "coco": coco,
        "annotations": dict(images=with_names[::-1], annotations=[other, *annotations]),
        "nameless images": dict(images=images, annotations=annotations),
        "alphapose": alphapose,
        "alphapose open": kp_files("{}.jpg", bodies),
        "alphapose people": kp_files("{}.jpg", kp_openpose(COCO_18, body)),
        "mmpose video": dict(meta_info=dict(dataset_name="coco"), instance_info=video),
        "mmpose list": numbered,
        "ultralytics": [[dict(person, track_id=1)] for person, in yolo],
        "mediapipe": [dict(frame=t, landmarks=person) for t, person in enumerate(parts)],
        "mediapipe tasks": [dict(pose_landmarks=[person]) for person in parts]}
    infos = [dict(meta_info={}, instance_info=[person]) for person in mmpose]
    openpose = kp_files("v_{:012d}_keypoints.json", kp_openpose(BODY_25, body))
    return {
        **{kind: {"k.json": content} for kind, content in files.items()},
        "mmpose images": kp_files("{:06d}.json", [[person] for person in mmpose]),
        "mmpose infos": kp_files("results_{}.json", infos),
        "openpose": {".DS_Store": b"\0", **openpose},
        "openpose 18": kp_files("v_{}_keypoints.json", kp_openpose(COCO_18, body)),
        "ultralytics images": kp_files("im{}.json", yolo),
        "labels": kp_files("v_{}.txt", [kp_label(points) for points in body]),
        "labels, confidence": kp_files("v_{}.txt", [kp_label(points, 0.5) for points in body]),
        "labels, number": kp_files("v_{}.txt", [kp_label(points, 0.5, 7) for points in body]),
        "mediapipe csv": {"k.csv": KP_CSV + "".join(rows)},
        "mediapipe array": {"k.npy": marks},
        "array": {"k.npy": body},
        "named array": {"k.npz": dict(other=body[:3], keypoints=body.astype(np.float32))},
        "stack": {"k.npy": np.stack((np.zeros_like(body), body), 1)},
        "array of 25": {"k.npy": kp_as(BODY_25, body)},
        "detectron2": {"k.npz": kp_detectron2(body)},
        "videopose3d": {"k.npz": kp_videopose3d(body)}}


BODY = kp_body(3)
KP_FORMATS = list(kp_formats(BODY))
KP_SIZED = "annotations", "nameless images", "detectron2", "videopose3d"
KP_PERSON = {"alphapose": "7", "mmpose list": "7", "labels, number": "7", "videopose3d": "a.mp4"}


@pytest.mark.parametrize("kind", KP_FORMATS)
def test_every_format_gives_the_same_track(kind, tmp_path):
    body = kp_body()
    tracks = read_keypoints(kp_write(tmp_path, kp_formats(body)[kind]))
    assert len(tracks) == (2 if kind == "detectron2" else 1)
    track = min(tracks, key=lambda track: track.keypoints[0, 0, 0])  # the one on the left
    assert track.person == KP_PERSON.get(kind, "1") and track.step == 1
    assert track.frames == list(range(track.frames[0], track.frames[0] + 12))
    assert track.size == (SIZE if kind in KP_SIZED else None)
    assert track.fractions == kind.startswith(("labels", "mediapipe"))
    keypoints = track.keypoints * (*SIZE, 1) if track.fractions else track.keypoints
    assert_allclose(keypoints, body, atol=1e-4)


def test_seventeen_joints_are_cocos_unless_told(tmp_path):
    body = kp_body()
    track, = read_keypoints(kp_write(tmp_path, {"k.npz": kp_videopose3d(body, "h36m")}))
    assert track.joints == "h36m" and np.array_equal(track.keypoints, body)
    assert_allclose(prepare(body, SIZE, "h36m")[0], body[..., :2])
    assert_array_equal(prepare(body, SIZE)[0], prepare(body, SIZE, "coco")[0])
    videos = kp_videopose3d(body, **{"b.mp4": {"custom": [body[:5], body]}})
    tracks = read_keypoints(kp_write(tmp_path, {"k.npz": videos}))
    assert [track.person for track in tracks] == ["a.mp4", "b.mp4 custom 0", "b.mp4 custom 1"]
    assert len(tracks[1].keypoints) == 5


@pytest.mark.parametrize("joints", [26, 133, 136])
def test_what_begins_with_cocos_joints_is_read_for_them(joints, tmp_path):
    padded = np.pad(BODY, ((0, 0), (0, joints - 17), (0, 0)))
    track, = read_keypoints(kp_json(tmp_path, kp_list(padded)))
    assert np.array_equal(track.keypoints, BODY) and track.joints == "coco"


def test_a_frame_column_of_csv_and_images_without_a_name_number_frames(tmp_path):
    header, *rows = kp_formats(BODY)["mediapipe csv"]["k.csv"].splitlines(keepends=True)
    rows = [f"{2 * t + 7},{row}" for t, row in enumerate(rows)]
    track, = read_keypoints(kp_write(tmp_path, {"f.csv": "frame," + header + "".join(rows)}))
    assert (track.frames, track.step) == ([7, 9, 11], 2)
    assert_allclose(track.keypoints * (*SIZE, 1), BODY, atol=1e-4)
    images = [dict(id=t, file_name=None) for t in range(3)]
    track, = read_keypoints(kp_json(tmp_path, dict(images=images, annotations=kp_list(BODY))))
    assert (track.frames, track.step) == ([0, 1, 2], 1)


def test_landmarks_without_visibility_have_a_depth_instead(tmp_path):
    pixels = kp_as(MEDIAPIPE, BODY)
    for depth, sure in ((-0.5, 1), (0.5, 0.5)):  # depth about the hips has both signs
        points = pixels / (*SIZE, 1)
        points[..., 2] = depth
        track, = read_keypoints(kp_write(tmp_path, {"k.npy": points}))
        assert (track.keypoints[..., 2] == sure).all() and track.fractions
    track, = read_keypoints(kp_write(tmp_path, {"k.npy": pixels}))
    assert np.array_equal(track.keypoints, BODY) and not track.fractions


# ---- people

def test_the_files_own_people_are_kept(tmp_path, capsys):
    one, two = kp_body(seed=1), kp_body(seed=2) + (300, 0, 0)
    entries = kp_list(one, track_id=3) + kp_list(two, skip=(0, 1, 6, 11), track_id="b")
    a, b, other = read_keypoints(kp_json(tmp_path, entries + kp_list(one + (-300, 0, 0))))
    assert [a.person, b.person, other.person] == ["3", "b", "untracked 1"]
    assert b.frames == list(range(2, 11))
    two[6] = np.nan
    assert_array_equal(a.keypoints, one)
    assert_array_equal(b.keypoints, two[2:11])
    assert capsys.readouterr().err == ""


def test_the_best_scored_of_a_number_is_taken(tmp_path, capsys):
    one, two = kp_body(seed=1), kp_body(seed=2)
    entries = kp_list(one, track_id=3, score=0.5) + kp_list(two, track_id=3, score=0.6)
    for t in (0, 5, 10):
        entries[t]["score"] = 0.7
        two[t] = one[t]
    track, = read_keypoints(kp_json(tmp_path, entries))
    assert_array_equal(track.keypoints, two)
    assert "12 times" in capsys.readouterr().err
    photo, = read_keypoints(kp_json(tmp_path, kp_named(entries[:1] + entries[12:13], ["a", "a"])))
    assert_array_equal(photo.keypoints, one[:1])
    assert "1 times" in capsys.readouterr().err


def test_large_numbers_and_odd_names_of_people(tmp_path):
    names = {17000000001: "17000000001", 17000000002: "17000000002", "Ann\n\tBee": "Ann Bee",
             "\x1b[31m": r"\x1b[31m", "\ud83d": r"\ud83d", "x" * 100: "x" * 100}
    entries = [entry for number in names for entry in kp_list(BODY, track_id=number)]
    entries += kp_list(BODY, track_id=[[8.0]], score=None)
    tracks = read_keypoints(kp_json(tmp_path, entries))
    assert [track.person for track in tracks] == [*names.values(), "8"]


def kp_frames(*people):
    """MMPose frames of people (T, 17, 3), NaN where absent, unnumbered and in no order."""
    rng = np.random.default_rng(3)
    frames = []
    for t in range(len(people[0])):
        seen = [person[t] for person in people if np.isfinite(person[t]).any()]
        rng.shuffle(seen)
        frames.append(dict(frame_id=t, instances=[kp_instance(points) for points in seen]))
    return frames


def kp_walk(start, step, frames=40, seed=0):
    """A body whose middle goes from `start` by `step` a frame."""
    body = kp_body(frames, seed, size=(0, 0))
    body[..., :2] += np.array(start) + np.arange(frames)[:, None, None] * (np.array(step) - 1)
    return body


@pytest.mark.parametrize("walk, other", [
    ((7, 0), dict(start=(700, 400), step=(0, 0))),
    ((7, 0), dict(start=(800, 420), step=(-11, 0))),
    ((7, 0), dict(start=(800, 400), step=(-11, 0), seed=0)),
    ((7, 0), dict(start=(500, 400), step=(4, 1))),
    ((60, 0), dict(start=(500, 400), step=(60, 0), seed=0))], ids=str)  # one's next is two's last
def test_people_without_numbers_are_followed(walk, other, tmp_path):
    one, two = kp_walk((400, 400), walk), kp_walk(**{"seed": 1, **other})
    two[35:] = np.nan  # the shorter one
    first, second = read_keypoints(kp_json(tmp_path, kp_frames(one, two)))
    assert first.person == "1" and np.array_equal(first.keypoints, one)
    assert second.person == "2" and np.array_equal(second.keypoints, two[:35])


def test_a_person_ends_after_a_gap(tmp_path):
    body, gap = kp_walk((400, 400), (3, 0), 60), evaluation.GAP
    body[20:20 + gap] = np.nan
    track, = read_keypoints(kp_json(tmp_path, kp_frames(body)))
    assert_array_equal(track.keypoints, body)
    body[20 + gap] = np.nan
    tracks = read_keypoints(kp_json(tmp_path, kp_frames(body)))
    assert [track.frames[0] for track in tracks] == [21 + gap, 0]  # by length
    assert len(tracks[1].frames) == 20


def test_a_person_who_is_hidden_in_part_is_followed(tmp_path):
    one, two = kp_walk((400, 400), (7, 0)), kp_walk((700, 400), (0, 0), seed=1)
    one[10:14, 5:] = 0  # a head alone
    two[20:30, :11] = 0
    tracks = read_keypoints(kp_json(tmp_path, kp_frames(one, two)))
    tracks.sort(key=lambda track: track.keypoints[0, 16, 0])
    assert_array_equal([track.keypoints for track in tracks], [one, two])


@given(st.integers(0, 10 ** 6), st.integers(1, 5), st.integers(1, 6), st.sampled_from([3, 1000]))
def test_the_assignment_is_the_best_of_all(seed, rows, columns, values):
    rng = np.random.default_rng(seed)
    for cost in rng.integers(values, size=(10, rows, columns)).astype(float):  # few values: ties
        pairs = evaluation.assign(cost)
        total = sum(cost[pair] for pair in pairs)
        for lines in zip(*pairs):  # no row and no column twice
            assert len(lines) == len(set(lines)) == min(rows, columns)
        if rows > columns:
            cost = cost.T
        orders = itertools.permutations(range(cost.shape[1]), len(cost))
        assert total == min(sum(cost[pair] for pair in enumerate(order)) for order in orders)


# ---- videos and single images

@pytest.mark.parametrize("names, frames", [
    (range(5, 11), range(5, 11)), ([10, 20, 30, 50, 60, 70], range(10, 71, 10)),
    ([f"a{t}_x.jpg" for t in range(8, 14)], range(8, 14)), ([0, 1, 2, 3, 4, 9], range(10)),
    ([f"v.{t}.png" for t in range(6)], range(6)),
    ([f"v.{t:04d}" for t in range(6)], range(6))], ids=str)
def test_images_that_number_a_video_are_one(names, frames, tmp_path):
    entries = kp_named(kp_list(kp_body(6), track_id=1), names)
    track, = read_keypoints(kp_json(tmp_path, entries))
    assert track.step and track.frames == list(frames)
    assert np.isfinite(track.keypoints[..., 0]).all(1).sum() == 6


@pytest.mark.parametrize("names", [
    [f"{letter}.jpg" for letter in "abcdef"], [139, 285, 632, 724, 776, 785],
    [f"cam{t}_1.jpg" for t in range(6)], range(0, 600, 100), [0, 1, 2, 3, 4, 10 ** 9],
    ["1.jpg", "01.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]], ids=str)
def test_images_that_number_no_video_are_single(names, tmp_path):
    body = kp_body(6)
    entries = kp_list(body) + kp_list(body + (99, 0, 0), skip=(0, 1, 2, 4, 5), score=0.3)
    one, two = read_keypoints(kp_json(tmp_path, kp_named(entries, [*names, names[3]])))
    assert one.step == 0 and one.frames == [str(name) for name in names]
    assert_array_equal(one.keypoints, body)
    assert two.person == "2" and two.frames == one.frames[3:4]
    assert_array_equal(two.keypoints, body[3:4] + (99, 0, 0))


def test_images_of_several_sizes_are_each_normalised_by_their_own(kp_house, tmp_path):
    body = kp_body(6)
    sizes = [SIZE, (2560, 1440)] * 3
    images = [dict(id=t, file_name=f"{t}.jpg", width=width, height=height)
              for t, (width, height) in enumerate(sizes)]
    body[1::2, :, :2] *= 2
    file = kp_json(tmp_path, dict(images=images, annotations=kp_list(body)))
    small, large = read_keypoints(file)
    assert small.size == SIZE and large.size == (2560, 1440)
    assert small.frames == ["0.jpg", "2.jpg", "4.jpg"]
    out, model = kp_lift(file, size=None), load_model(kp_house.images)
    order = [0, 2, 4, 1, 3, 5]
    assert out["person"].tolist() == ["1"] * 3 + ["2"] * 3
    assert_array_equal(out["size"], [sizes[t] for t in order])
    poses = [lift(model, body[t:t + 1], sizes[t])[0] for t in order]
    assert_allclose(out["poses"], poses, atol=1e-4)


# ---- between detector and model

def kp_h36m(points):
    """The plain rule: COCO's joints (17, C) as Human3.6M's."""
    coco = dict(zip(COCO_JOINTS, points))

    def middle(part):
        return (coco["left_" + part] + coco["right_" + part]) / 2
    shoulders, hips, nose, eyes = middle("shoulder"), middle("hip"), coco["nose"], middle("eye")
    trunk = {"pelvis": hips, "spine": (hips + shoulders) / 2,
             "thorax": shoulders + 1 / 3 * (nose - shoulders) + 2 / 3 * (nose - eyes),
             "neck": nose * 3 / 4 + shoulders / 4, "head": eyes * 3 / 2 + middle("ear") / 2 - nose}
    return np.stack([{**coco, **trunk}[joint] for joint in H17.joints])


NOT_SEEN = [(np.nan, 5, 1), (7, 7, 0), (0, 0, 1), (7, 7, np.nan), (np.inf, 1, 1), (7, 7, 0.25),
            (-1281, 9, 1), (9, 1441, 1), (2561, 9, 1), (9, -721, 1)]


@given(st.integers(0, 10 ** 6), st.integers(1, 9), st.sampled_from(["coco", "h36m"]))
def test_what_was_not_seen_is_interpolated_in_time_and_counted(seed, frames, joints):
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate((rng.uniform(10, 500, (frames, 17, 2)), np.ones((frames, 17, 1))), 2)
    holes = rng.uniform(size=(frames, 17)) < 0.4
    holes[rng.integers(frames, size=17), range(17)] = False  # each joint is seen once at least
    for (t, j), how in zip(np.argwhere(holes), rng.integers(len(NOT_SEEN), size=holes.size)):
        keypoints[t, j] = NOT_SEEN[how]
    filled = keypoints[..., :2].copy()
    for t, j in np.argwhere(holes):  # the plain form: look both ways
        before = [s for s in range(t) if not holes[s, j]][-1:]
        after = [s for s in range(t, frames) if not holes[s, j]][:1]
        (a,), (b,) = before or after, after or before
        share = 0 if a == b else (t - a) / (b - a)
        filled[t, j] = keypoints[a, j, :2] + share * (keypoints[b, j, :2] - keypoints[a, j, :2])
    matrix = np.eye(17) if joints == "h36m" else kp_h36m(np.eye(17))
    pose, gaps = prepare(keypoints, SIZE, joints, min_score=0.25)
    assert_allclose(pose, matrix @ filled)
    assert_array_equal(gaps, [(matrix[:, hole] != 0).any(1) for hole in holes])


def test_minus_one_says_not_detected_only_without_scores(tmp_path):
    body = kp_body(6)
    body[2:4, 9] = -1, -1, 1
    gone = body.copy()
    gone[2:4, 9] = np.nan
    with_scores, without = prepare(body, SIZE), prepare(body[..., :2], SIZE)
    assert without[1].sum() == 2 and np.array_equal(without[0], prepare(gone, SIZE)[0])
    assert with_scores[1].sum() == 0 and np.array_equal(with_scores[0][2, 13], (-1, -1))
    points = body[..., :2].tolist()
    by_axis = [dict(zip("xy", frame.T.tolist())) for frame in body]
    for content in ([[dict(keypoints=frame)] for frame in by_axis],
                    [dict(instances=[dict(keypoints=frame)]) for frame in points]):
        track, = read_keypoints(kp_json(tmp_path, content))
        assert_array_equal(track.keypoints[..., :2], gone[..., :2])


def test_a_face_seen_in_part_is_enough_and_low_scores_are_gaps():
    body = kp_body()
    body[..., 2] = 0.8
    body[:, [0, 3], 2] = 0  # nose and left ear never seen
    pose, gaps = prepare(body, SIZE)
    plain = body[..., :2].copy()
    plain[:, [0, 3]] = plain[:, [1, 2, 4]].mean(1, keepdims=True)
    assert_allclose(pose, [kp_h36m(points) for points in plain])
    assert gaps.any(0).nonzero()[0].tolist() == [8, 9, 10]
    body[3, 9, 2] = 0.3
    assert not prepare(body, SIZE, min_score=0.2)[1][3, 13]
    assert prepare(body, SIZE, min_score=0.3)[1][3, 13]
    body[:, 15, 2] = 0
    rejected("left_ankle", prepare, body, SIZE)


def test_one_euro_is_casiez_algorithm():
    x, fps = np.random.default_rng(0).normal(size=(20, 3)), 25.0

    def alpha(hertz):
        return 1 / (1 + 1 / (2 * math.pi * hertz) * fps)
    for options, cutoff, beta in (((), 2.0, 10.0), ((0.3, 0.0), 0.3, 0.0)):
        got = one_euro(x, fps, *options)
        for c in range(3):
            value, speed = x[0, c], 0.0
            for t in range(20):
                if t:
                    raw = (x[t, c] - value) * fps
                    speed = alpha(1.0) * raw + (1 - alpha(1.0)) * speed
                    a = alpha(cutoff + beta * abs(speed))
                    value = a * x[t, c] + (1 - a) * value
                assert got[t, c] == pytest.approx(value)
    noise = 0.01 * np.random.default_rng(1).normal(size=(200, 1))
    smooth = one_euro(noise, 30.0)
    assert np.abs(np.diff(smooth, axis=0)).mean() < 0.45 * np.abs(np.diff(noise, axis=0)).mean()


# ---- lifting

def kp_model(**fields):
    """A small model with random weights that lifts keypoints."""
    recipe = tiny_recipe(**{"channels": 4, **fields})
    torch.manual_seed(0)
    model = build_model(recipe).eval()
    for name, value in model.state_dict().items():
        if name.endswith(("weight", "bias", "mean", "var")):
            value.add_(torch.rand(value.shape) / 10)
    model.recipe = recipe
    return model


def kp_save(path, licence=None, **fields):
    """A checkpoint of such a model as training writes it, or as it is shipped, with a licence."""
    model = kp_model(**fields)
    content = dict(format="poselift", version=1, recipe=dataclasses.asdict(model.recipe), epoch=3,
                   data="synthetic motion", model=model.state_dict(), licence=licence)
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def kp_models(tmp_path_factory):
    """The folder beside which pretrained models and the page's template are found."""
    folder = tmp_path_factory.mktemp("house")
    fields = dict(name="glagcn-wild", method="glagcn", filter_widths=(3, 3, 3), normalise="longest")
    licence = "CC BY-NC 4.0, as Bandai-Namco-Research-Motiondataset-1"
    video = kp_save(folder / "pretrained" / "glagcn-wild.pt", licence, **fields)
    fields = dict(name="gridconv-wild", normalise="longest")
    images = kp_save(folder / "pretrained" / "gridconv-wild.pt", licence, **fields)
    (folder / "docs").mkdir()
    shutil.copy(HERE / "docs" / "viewer.html", folder / "docs")
    return SimpleNamespace(folder=folder, video=video, images=images)


@pytest.fixture
def kp_house(kp_models, monkeypatch, tmp_path):
    """The same, taken for the folder of eval.py; commands run in a folder of their own."""
    monkeypatch.setattr(evaluation, "HERE", kp_models.folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return kp_models


@pytest.fixture
def kp_file(tmp_path):
    """Three frames of COCO results."""
    return kp_json(tmp_path, kp_list(BODY))


def kp_run(file, *options, size="1280x720"):
    """eval.py lift of a file."""
    said = ["--size", size] if size else []
    lift_command([str(file), "--device", "cpu", *said, *map(str, options)])


def kp_lift(file, *options, size="1280x720"):
    """The arrays that the command writes."""
    kp_run(file, *options, size=size)
    return data.read_npz("poses.npz")


def kp_page(path):
    """What a page holds, which is the template around it; nothing in it can become markup."""
    template = (evaluation.HERE / "docs" / "viewer.html").read_text(encoding="utf-8")
    before, after = template.split(">null<")
    text = Path(path).read_text(encoding="utf-8")
    content = text.removeprefix(before + ">").removesuffix("<" + after)
    assert text == f"{before}>{content}<{after}" and not set("<>&\u2028\u2029") & set(content)
    return json.loads(content)


@pytest.mark.parametrize("fields", [
    dict(), dict(flip_test=True, normalise="width"), dict(method="glagcn", filter_widths=(3, 3)),
    dict(method="glagcn", filter_widths=(5,), flip_test=True, normalise="longest"),
    dict(method="glagcn", filter_widths=(3,), causal=True)], ids=str)
def test_lift_is_the_models_output_for_each_window(fields):
    model, size = kp_model(**fields), (1920, 1080)
    T, causal, flips = model.receptive_field, model.recipe.causal, model.recipe.flip_test

    def run(inputs):
        with torch.no_grad():
            return model(inputs[:, 0] if T == 1 else inputs)
    for frames in (1, 2, 4, 5, 12):
        body = kp_body(frames, size=size)
        scaled = (prepare(body, size)[0] - (960, 540)) / 960
        want = []
        for t in range(frames):
            first = t - (T - 1 if causal else T // 2)
            window = [min(max(s, 0), frames - 1) for s in range(first, first + T)]
            inputs = torch.tensor(scaled[window], dtype=torch.float32)[None]
            pose = run(inputs)
            if flips:
                other = run(inputs[..., H17.mirror, :] * torch.tensor([-1.0, 1]))
                pose = (pose + other[..., H17.mirror, :] * torch.tensor([-1.0, 1, 1])) / 2
            want.append(pose[0].numpy())
        poses = lift(model, body, size)
        assert poses.dtype == np.float32 and np.abs(poses - want).max() < 1e-5
        assert np.abs(want).max() > 1e-2
    assert np.abs(lift(model, body, size, flip=not flips) - poses).max() > 1e-5


def test_any_image_is_normalised_as_the_model_was_trained():
    body = kp_body(size=(1000, 1000))
    for rule in ("release-500", "longest"):
        model = kp_model(normalise=rule)
        small = lift(model, body, (1000, 1000))
        for factor, size in ((2, (2000, 2000)), (0.5, (500, 500)), (1, (1000, 400)),
                             (3, (1200, 3000))):
            moved = body.copy()  # the same picture about another centre
            moved[..., :2] = (body[..., :2] - 500) * factor + np.array(size) / 2
            assert np.abs(lift(model, moved, size) - small).max() < 1e-4, size
        near = np.abs(lift(model, body, (1000, 1002)) - small).max()
        # release-500: Human3.6M's own sizes alike
        assert near < 1e-6 if rule == "release-500" else near > 1e-5
    width = kp_model(normalise="width")
    tall = lift(width, body * (2, 2, 1) + (0, 300, 0), (2000, 2600))
    assert np.abs(tall - lift(width, body, (1000, 1000))).max() < 1e-4


def test_lift_in_python_takes_what_the_command_takes(kp_house, tmp_path):
    body, model = kp_body(12), load_model(kp_house.video)
    file = kp_json(tmp_path, kp_list(body))
    plain = lift(model, body, SIZE)
    for options, taken in (("--min-score 0.5", dict(min_score=0.5)), ("--flip", dict(flip=True)),
                           ("--smooth 1 --fps 50", dict(smooth=1.0, fps=50.0)),
                           ("--joints h36m", dict(joints="h36m"))):
        out = kp_lift(file, "--model", kp_house.video, *options.split())
        poses = lift(model, body, SIZE, **taken)
        assert_allclose(out["poses"], poses, atol=6e-5)
        assert np.abs(poses - plain).max() > 1e-4


def test_root_trajectory_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    poses, root = rng.normal(0, 0.4, (6, 17, 3)), rng.uniform((-1, -1, 3), (1, 1, 8), (6, 3))
    focal, centre = 1400.0, np.array((960.0, 540.0))
    points = poses + root[:, None]
    exact = focal * points[..., :2] / points[..., 2:] + centre
    assert_allclose(root_trajectory(exact, poses, focal, centre), root)
    noisy = exact + rng.normal(0, 5, exact.shape)
    got = root_trajectory(noisy, poses, focal, centre)
    for t in range(6):
        A, b = [], []
        for (u, v), (x, y, z) in zip((noisy[t] - centre) / focal, poses[t]):
            A += [(1, 0, -u), (0, 1, -v)]
            b += [u * z - x, v * z - y]
        assert_allclose(got[t], np.linalg.lstsq(np.array(A), np.array(b), rcond=None)[0])


# ---- the command

def test_the_command_writes_everyone_whole(kp_house, tmp_path, capsys):
    one, two = kp_body(40, seed=1), kp_body(9, seed=2) + (300, 0, 0)
    footless = two[:2] * (np.arange(17) < 15)[:, None]
    entries = kp_list(one, skip=(5,), track_id=3) + kp_list(two, track_id=10)
    file = kp_json(tmp_path, entries + kp_list(footless, track_id=11))
    one[5] = np.nan
    kp_run(file, "--out", "deep/poses.npz")
    said, result = capsys.readouterr(), data.read_npz("deep/poses.npz")
    for words in ("person 3: 40 frames, by glagcn-wild; interpolated: 1 whole frames, 0",
                  "person 10: 9 frames, by gridconv-wild", "49 poses", "1469 pixels"):
        assert words in said.out
    assert "person 11: left out" in said.err and said.err.count("\n") == 1
    assert result["person"].tolist() == ["3"] * 40 + ["10"] * 9
    assert result["frames"].tolist() == [*range(40), *range(9)] and result["fps"] == 30
    assert result["interpolated"].all(1).nonzero()[0].tolist() == [5]
    assert result["interpolated"].sum() == 17
    centre, focal = np.array(SIZE) / 2, math.hypot(*SIZE)
    for person, body, path in (("3", one, kp_house.video), ("10", two, kp_house.images)):
        pose_2d = prepare(body, SIZE)[0]
        poses = lift(load_model(path), body, SIZE)
        root = root_trajectory(pose_2d, poses, focal, centre)
        mine = result["person"] == person
        assert_allclose(result["poses"][mine], poses, atol=0.51e-4)
        assert_allclose(result["root"][mine], root, atol=0.51e-4)
        assert_allclose(result["keypoints"][mine], pose_2d, atol=0.51e-2)
    assert set(result["focal"]) == {focal} and result["size"].tolist() == [[1280, 720]] * 49
    assert str(result["model"]) == "glagcn-wild, gridconv-wild"


def test_the_page_holds_the_very_numbers_of_the_poses(kp_house, tmp_path):
    two = kp_body(4) + (99, 0, 0)
    file = kp_json(tmp_path, kp_list(kp_body(30), track_id=1) + kp_list(two, track_id=2))
    for out in ("a.npz", "b.json"):
        kp_run(file, "--focal", 1000, "--fps", 25, "--out", out)
    page, arrays = kp_page("a.html"), data.read_npz("a.npz")
    assert page == json.loads(Path("b.json").read_text()) == kp_page("b.html")
    assert page["format"] == "poselift poses" and page["source"] == "k.json" and page["fps"] == 25
    for key in ("joints", "left", "right"):
        assert page[key] == list(getattr(H17, key))
    assert_array_equal(page["edges"], H17.edges)
    for key in ("joints", "edges", "source", "fps", "model", "licence"):
        assert arrays[key].tolist() == page[key], key
    assert [person["name"] for person in page["people"]] == ["1", "2"]
    for person in page["people"]:
        mine = arrays["person"] == person["name"]
        for key in ("poses", "root", "keypoints", "interpolated", "frames"):
            assert np.array_equal(arrays[key][mine], person[key]), key
        assert person["size"] == [1280, 720] and np.abs(person["poses"]).max() > 0.01
        assert_array_equal(np.round(person["poses"], 4), person["poses"])
    assert sorted(path.name for path in Path().iterdir()) == ["a.html", "a.npz", "b.html", "b.json"]


def test_no_text_can_become_markup(kp_house, tmp_path):
    evil = "</script><script>alert(1)</script><!--&amp;\u2028\u2029 \ud800"
    files = {"<img src=x>&.json": kp_list(BODY, track_id=evil)}
    model = kp_save(tmp_path / "m.pt", name="<i>")
    kp_run(kp_write(tmp_path, files), "--model", model)
    page = kp_page("poses.html")
    assert page["source"] == "<img src=x>&.json"
    assert page["model"] == "<i>" and page["licence"] == "not stated"
    assert page["people"][0]["name"].startswith("</script><script>alert(1)</script><!--&amp;")


SLOT = '<script id="poses" type="application/json">null</script>'


@pytest.mark.parametrize("page", [
    "", SLOT.replace("null", "{}"), 2 * SLOT, SLOT.replace("json", "js")])
def test_a_page_is_written_whole_or_not_at_all(page, kp_house, kp_file, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "HERE", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "viewer.html").write_text(page)
    Path("poses.html").write_text("before")
    rejected("viewer.html", kp_run, kp_file, "--model", kp_house.images)
    assert Path("poses.html").read_text() == "before"
    assert [path.name for path in Path().iterdir()] == ["poses.html"]


@pytest.mark.parametrize("frames, skip, model", [
    (27, (), "glagcn-wild"), (26, (), "gridconv-wild"), (1, (), "gridconv-wild"),
    (40, range(10, 20), "glagcn-wild"), (40, range(10, 26), "gridconv-wild")])
def test_the_model_fits_the_track(frames, skip, model, kp_house, tmp_path):
    out = kp_lift(kp_json(tmp_path, kp_list(kp_body(frames), skip, track_id=1)))
    assert str(out["model"]) == model and len(out["poses"]) == frames
    assert str(out["licence"]).startswith("CC BY-NC 4.0")
    assert "Bandai-Namco" in str(out["licence"])
    assert kp_page("poses.html")["licence"] == str(out["licence"])


def test_every_fifth_frame_is_a_slower_video(kp_house, tmp_path):
    body = kp_body(40)
    file = kp_json(tmp_path, kp_named(kp_list(body), range(0, 200, 5)))
    out = kp_lift(file, "--smooth", "--fps", 20)
    assert str(out["model"]) == "gridconv-wild" and out["fps"] == 4
    assert out["frames"].tolist() == list(range(0, 200, 5))
    clean = one_euro(prepare(body, SIZE)[0] / 640, 4.0) * 640
    assert_allclose(out["keypoints"], clean, atol=0.006)


def test_single_images_are_lifted_each_on_its_own(kp_house, tmp_path, capsys):
    body = kp_body(26)
    body[3, 16, 2] = 0  # no ankle there, and none is invented
    body[4, 0, 2] = 0  # the face has other parts
    names = [f"photo {letter}.jpg" for letter in "abcdefghijklmnopqrstuvwxyz"]
    file, kept = kp_json(tmp_path, kp_named(kp_list(body), names)), np.delete(np.arange(26), 3)
    out, said = kp_lift(file, "--smooth"), capsys.readouterr()
    assert str(out["model"]) == "gridconv-wild" and "25 single images" in said.out
    assert "image photo d.jpg left out" in said.err and "right_ankle" in said.err
    assert out["frames"].tolist() == [names[t] for t in kept]
    model = load_model(kp_house.images)
    poses = [lift(model, body[t:t + 1], SIZE)[0] for t in kept]
    assert_allclose(out["poses"], poses, atol=6e-5)
    for file in (file, kp_write(tmp_path, {"k.npy": body[:1]})):
        rejected(["single images", "27"], kp_run, file, "--model", kp_house.video)


def test_without_pretrained_models_one_is_asked_for(kp_house, kp_file, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "HERE", kp_file.parent)
    kp_refused(kp_file, names=["glagcn-wild.pt", "--model"])
    kp_run(kp_file, "--model", kp_house.images)
    assert [path.name for path in Path().iterdir()] == ["poses.npz"]
    assert "no page" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    "k.json --size 1280x720", "--size 1280 720 k.json", "k.json --size 1280 720",
    "--size=1280x720 k.json", "--size 1280X720.0 k.json", "annotations/k.json"])
def test_the_size_is_read_in_every_way(words, kp_house, tmp_path):
    kp_json(Path(), kp_list(BODY))
    kp_write(Path("annotations"), kp_formats(BODY)["annotations"])
    lift_command(words.split())
    result = data.read_npz("poses.npz")
    assert result["size"].tolist() == [[1280, 720]] * 3
    model = load_model(kp_house.images)
    assert_allclose(result["poses"], lift(model, BODY, SIZE), atol=6e-5)


def test_what_a_terminal_cannot_show_ends_nothing(kp_house, tmp_path):
    folder = tmp_path / os.fsdecode(b"\x83A")  # Shift-JIS, no UTF-8
    file = kp_write(folder, {"\u30ab.json": kp_list(BODY, track_id="\ud83d\u30ab\u0416")})
    words = ["lift", file, "--size", "1280x720", "--model", kp_house.images, "--device", "cpu"]
    status, said, _ = command("eval.py", *words, "--out", folder / "p.npz", encoding="ascii")
    assert status == 0 and r"person \ud83d\u30ab\u0416: 3 frames" in said
    assert data.read_npz(folder / "p.npz")["person"].tolist() == ["\\ud83d\u30ab\u0416"] * 3


# ---- bad input: one clear line, exit 2, nothing written

def kp_refused(file, *options, names, size="1280x720"):
    """The command ends in a line that holds `names`; nothing is written where it runs."""
    rejected(names, kp_run, file, *options, size=size)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("kind", KP_FORMATS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "nobody", "nan", "cut numbers"])
def test_each_format_damaged_is_one_line(kind, damage, kp_house, tmp_path):
    body = kp_body(4)
    if damage == "nobody":
        body[...] = 0
    if damage == "nan":
        body[:, 16] = np.nan
    path = kp_write(tmp_path, kp_formats(body)[kind])
    file = sorted(path.glob("[!.]*"))[1] if path.is_dir() else path
    whole = file.read_bytes()
    damaged = {"truncated": whole[:len(whole) * 2 // 3], "empty": b"",
               "cut numbers": re.sub(rb"\d\.\d+", b"{}", whole, count=40)}
    file.write_bytes(damaged.get(damage, whole))
    nobody_in_one_image = damage == "empty" and file.suffix == ".txt"
    no_text = damage == "cut numbers" and damaged[damage] == whole
    if not nobody_in_one_image and not no_text:
        kp_refused(path, size=None if kind in KP_SIZED else "1280x720", names=path.name)


KP_ENTRY = kp_list(BODY)[0]
KP_IMAGE = dict(id=0, width=1280, height=720)
KP_KINDS = [dict(id=1, name="person", keypoints=["root", "right_hip"])]  # Human3.6M's joints
KP_META = dict(keypoint_id2name={"0": "root", "1": "right_hip"})
KP_BAD_JSON = [
    ([], "no person"),
    ({"annotations": []}, "no person"),
    (7, "found 7"),
    ([[[]]], "found [[[]]]"),
    ({"a": 1}, 'found {"a": 1}'),
    ([{"image_id": 0, "score": 0.5}], "entry 0"),
    ([{**KP_ENTRY, "keypoints": [[1, 2, 3, 4]] * 17}], "entry 0"),
    ([{**KP_ENTRY, "keypoints": {"x": [1], "y": [1, 2]}}], "entry 0"),
    ([{**KP_ENTRY, "keypoints": [BODY[0].tolist()]}], "entry 0"),
    ([{"frame": t, "keypoints": points.tolist()} for t, points in enumerate(BODY)], "image_id"),
    ({"images": [KP_IMAGE], "annotations": [KP_ENTRY], "categories": KP_KINDS}, "root"),
    (dict(meta_info=KP_META, instance_info=[dict(instances=[kp_instance(BODY[0])])]), "root"),
    ([KP_ENTRY, {**KP_ENTRY, "image_id": None}], "entry 1"),
    ([KP_ENTRY, {"keypoints": [1] * 51}], "entry 1"),
    (kp_list(BODY, track_id={"a": 1}), "entry 0"),
    (kp_list(BODY, track_id=10 ** 400), "401"),
    ([KP_ENTRY, {"image_id": 0, "keypoints": [1] * 54}], "17 and of 18 joints"),
    ([{"image_id": t, "keypoints": [1.0] * 30} for t in (0, 1)], "10 joints"),
    ({"images": [{"width": 1}], "annotations": [KP_ENTRY]}, "image 0"),
    ({"images": [{**KP_IMAGE, "width": 0}], "annotations": [KP_ENTRY]}, "size 0"),
    ({"images": [KP_IMAGE], "annotations": [{**KP_ENTRY, "image_id": 5}]}, "annotation 0"),
    ([dict(instances=7)], "image 0"),
    ([dict(frame_id="x", instances=[])] * 2, "image 0"),
    ([dict(instances=[dict(keypoints=[[1, 2]] * 17, keypoint_scores=[1])])], "image 0"),
    (dict(instance_info="x"), "k.json"),
    (dict(people=[dict(pose_keypoints_2d=[1] * 45)]), "15 joints"),
    ({"0.jpg": dict(bodies=[{}])}, "image 0"),
    ([dict(landmarks=[dict(x=0.5)])], "image 0"),
    ([dict(landmarks=[dict(x=0.5, y=0.5)] * 9)], "9 joints"),
    ([dict(pose_world_landmarks=[])], "metres"),
    ([dict(preds=[], image_paths=[])], "MMPose"),
    (dict(shapes=[1]), "LabelMe"),
    ([[dict(name="person", box=dict(x1=1))]], "boxes"),
    (kp_list(0 * BODY + 1e5), "is the size right?"),
    (kp_list(0 * BODY + 1e7), "no person"),
    (kp_list(BODY * (1, 1, 0)), "no person"),
    (kp_list(BODY / (*SIZE, 1)), "expected pixels")]


@pytest.mark.parametrize("content, said", KP_BAD_JSON, ids=range(len(KP_BAD_JSON)))
def test_a_json_of_something_else_is_one_line(content, said, kp_house, tmp_path):
    size = None if isinstance(content, dict) and "images" in content else "1280x720"
    kp_refused(kp_json(tmp_path, content), size=size, names=["k.json", said])


def kp_arrays(**arrays):
    return {"k.npz": {key: np.array(value) for key, value in arrays.items()}}


KP_TWO_PEOPLE = kp_label(BODY[0]) + kp_label(BODY[1], 1, 2, 3)
KP_TWO_LAYOUTS = {"a.json": [kp_instance(BODY[0])],
                  "b.json": {"people": [{"pose_keypoints_2d": [1] * 75}]}}
KP_BAD_FILES = [
    ({"k.pkl": pickle.dumps([1])}, ["k.pkl", "looks like"]),
    ({"k.h5": b"\x89HDF\r\n\x1a\n\0\0"}, ["k.h5", "looks like"]),
    ({"v.mp4": b"\0\0\0\x18ftypmp42"}, ["v.mp4", "video"]),
    ({"k.bin": b"\xff\xfe\xfd"}, ["k.bin"]),
    ({"k.csv": "scorer,DLC\nx,y\n"}, ["k.csv", "x_0"]),
    ({"k.csv": KP_CSV + "1,2,3\n" * 2}, ["k.csv"]),
    ({"k.txt": "0 0.5 0.5 0.1 0.1\n"}, ["line 1"]),
    ({"k.txt": KP_TWO_PEOPLE}, ["line 2"]),
    ({"k.json": b'[{"image_id": 0,\n "keypoints": [1, 2,, 3]}]'}, ["k.json", "line 2"]),
    ({"k.json": b"[" * 100000}, ["k.json", "JSON"]),
    ({"k.npz": b"PK\3\4 no archive"}, ["k.npz"]),
    (kp_arrays(a=BODY, b=BODY), ["a (3, 17, 3)", "b (3, 17, 3)"]),
    (kp_arrays(keypoints=BODY.astype(str)), ["k.npz"]),
    (kp_arrays(keypoints=BODY[:0]), ["no person"]),
    (kp_arrays(keypoints=BODY[..., :2], poses=BODY, root=BODY[:, 0]), ["what lift has written"]),
    (kp_arrays(keypoints=np.ones((3, 17, 4))), ["3, 17, 4"]),
    (kp_arrays(keypoints=np.ones((3, 12, 2))), ["12 joints"]),
    (kp_arrays(positions_2d=3, metadata=4), ["VideoPose3D"]),
    ({}, ["d: found no files"]),
    ({"a.json": [], "b.txt": ""}, [".json and .txt"]),
    ({"a.jpg": b"x", "b.json": []}, [".jpg"]),
    ({"a.json": [], "b.json": []}, ["no person"]),
    ({"a.txt": "", "b.txt": ""}, ["no person"]),
    ({"a.json": [], "b.json": b"x"}, ["b.json", "JSON"]),
    ({"a.json": kp_list(BODY), "b.json": []}, ["a.json", "3 images"]),
    (KP_TWO_LAYOUTS, ["17 and of 25 joints"])]


@pytest.mark.parametrize("files, said", KP_BAD_FILES, ids=range(len(KP_BAD_FILES)))
def test_a_file_of_something_else_is_one_line(files, said, kp_house, tmp_path):
    kp_refused(kp_write(tmp_path, files), names=said)


KP_SIZES = {"b.mp4": {"w": 1, "h": 1}}
KP_BAD_NPZ = [
    (kp_detectron2, dict(keypoints=kp_objects([[], []]))),
    (kp_detectron2, dict(boxes=kp_objects([[[], np.ones((1, 5))]] * 3))),
    (kp_detectron2, dict(keypoints=kp_objects([[[], np.ones((2, 3, 17))]] * 3))),
    (kp_detectron2, dict(metadata=np.array({"w": 3}, object))),
    (kp_videopose3d, dict(metadata=dict(layout_name="coco", video_metadata=KP_SIZES))),
    (kp_videopose3d, dict(metadata=dict(layout_name="mpii", video_metadata=KP_SIZES))),
    (kp_videopose3d, dict(metadata=dict(layout_name="coco"))),
    (kp_videopose3d, dict(metadata=dict(layout_name="coco", video_metadata=3)))]


@pytest.mark.parametrize("whole, change", KP_BAD_NPZ, ids=range(len(KP_BAD_NPZ)))
def test_detectors_npz_of_another_shape_is_one_line(whole, change, kp_house, tmp_path):
    said = "boxes" if whole is kp_detectron2 else "VideoPose3D"
    file = kp_write(tmp_path, {"k.npz": {**whole(BODY), **change}})
    kp_refused(file, size=None, names=["k.npz", said])


KP_BAD_OPTIONS = {
    "--size 0x480": "size 0", "--size nanx480": "size nan", "--size 1280": "--size",
    "--size axb": "--size", "--size 1280 720 3": "3", "--person 8": "--person 8",
    "--out p.txt": "--out", "--out=": "--out", "--plot a.jpg": "--plot", "--fps 0": "fps 0", "--fps nan": "fps nan",
    "--focal -3": "focal -3", "--focal 1e-300": "focal 1e-300", "--smooth 0": "smooth 0",
    "--min-score nan": "min-score nan", "--joints mpii": "mpii", "--device abacus": "abacus",
    "--model nowhere.pt": "nowhere.pt", "--sise 3": "--sise"}


@pytest.mark.parametrize("options, said", KP_BAD_OPTIONS.items(), ids=KP_BAD_OPTIONS)
def test_a_bad_option_is_one_line(options, said, kp_house, kp_file):
    size = None if options.startswith("--size") else "1280x720"
    kp_refused(kp_file, *options.split(), size=size, names=said)


@pytest.mark.parametrize("fields, said", [
    (dict(skeleton="humaneva15", method="glagcn"), "humaneva15"), (dict(target="uvd"), "uvd"),
    (dict(swap_sides=True), "swapped")], ids=str)
def test_a_model_that_does_not_lift_keypoints_is_one_line(fields, said, kp_house, kp_file):
    model = kp_save(kp_file.parent / "a.pt", **fields)
    kp_refused(kp_file, "--model", model, names=["a.pt", said])


@pytest.mark.parametrize("licence, name", [(5, "a"), (["CC0"], None), ({"a": 1}, "a\n\ud83d")])
def test_odd_texts_of_a_checkpoint_become_lines(licence, name, kp_house, kp_file, capsys):
    kp_run(kp_file, "--model", kp_save(kp_file.parent / "a.pt", licence, name=name))
    texts = [evaluation.one_line(text) for text in (name, licence)]
    assert f"licence of {': '.join(texts)}\n" in capsys.readouterr().out
    assert [kp_page("poses.html")[key] for key in ("model", "licence")] == texts


def test_what_does_not_fit_the_file_is_one_line(kp_house, kp_file, tmp_path):
    formats = kp_formats(BODY)
    kp_refused(tmp_path / "nowhere.json", names="nowhere.json")
    kp_refused(kp_file, size=None, names=["k.json", "--size"])
    kp_refused(kp_file, "--model", kp_file, names="k.json")
    kp_refused(kp_file, "--out", kp_file, names=["k.json", "overwrite"])
    (tmp_path / "f.npz").mkdir()
    kp_refused(kp_file, "--out", tmp_path / "f.npz", names=["f.npz", "folder"])
    assert not (tmp_path / "f.html").exists()
    own = kp_write(tmp_path / "own", formats["annotations"])
    kp_refused(own, size="640x480", names=["--size", "1280x720"])
    h36m = kp_write(tmp_path, {"h.npz": kp_videopose3d(BODY, "h36m")})
    kp_refused(h36m, "--joints", "coco", size=None, names=["--joints", "h36m"])
    wide = kp_write(tmp_path, formats["array of 25"])
    kp_refused(wide, "--joints", "h36m", names=["--joints h36m", "coco"])


def test_what_lift_cannot_take_is_one_line():
    model = kp_model()
    rejected("recipe", lift, torch.nn.Linear(2, 3), BODY, SIZE)
    rejected("size: missing", lift, model, BODY, None)
    for keypoints in (BODY[0], BODY[:0], BODY[..., :1]):
        rejected(keypoints.shape, lift, model, keypoints, SIZE)


# ---- pictures

def test_pictures(kp_house, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image
    body = kp_body(14)
    kp_run(kp_json(tmp_path, kp_list(body)), "--fps", 25, "--plot", "strip.png", "a.gif")
    width, height = Image.open("strip.png").size
    assert width > 1.5 * height  # six frames beside each other
    sparse = kp_named(kp_list(kp_body(8), skip=(3,)), (10, 12, 14, 18, 20, 22, 24))
    kp_run(kp_json(tmp_path, sparse), "--fps", 20, "--plot", "b.gif")
    poses = data.read_npz("poses.npz")
    evaluation.plot_poses("slow.gif", poses["keypoints"][:2], poses["poses"][:2], fps=0.001)
    durations = {}
    for name in ("a.gif", "b.gif", "slow.gif"):
        with Image.open(name) as gif:
            durations[name] = gif.n_frames, gif.info["duration"]
    assert durations["a.gif"] == (7, 80)  # every second frame of 25 a second
    assert durations["b.gif"] == (8, 100)  # ten of the video's twenty frames a second
    assert 600000 <= durations["slow.gif"][1] <= 655350  # 16 bits of hundredths of a second


def test_pictures_without_matplotlib_are_refused_before_the_work(kp_house, kp_file, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    kp_refused(kp_file, "--plot", "a.png", names="pip install matplotlib")


VIEWER = HERE / "docs" / "viewer.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = """<script>
function pixels(change) {
  Object.assign(viewer, change).draw();
  return figure.getContext("2d").getImageData(0, 0, figure.width, figure.height).data;
}
const count = (test) => start.reduce((sum, value, i) => sum + test(value, i), 0);
const differ = (other) => count((value, i) => Math.abs(value - other[i]) > 30);
const start = pixels({ playing: false, yaw: 0, frame: 0 });
const found = { right: count((value, i) => i % 4 === 0 && value - start[i + 2] > 60),
                left: count((value, i) => i % 4 === 2 && value - start[i - 2] > 60),
                turned: differ(pixels({ yaw: 60 })), later: differ(pixels({ yaw: 0, frame: 2 })),
                again: differ(pixels({ frame: 0 })), source: byId("source").textContent };
figure.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
document.querySelector("#people input").click();
read(JSON.stringify({ ...data, fps: 0 }), "broken.json");
const [yaw, people, trouble] = [viewer.yaw, figure.dataset.people, byId("trouble").textContent];
document.body.append("FOUND" + JSON.stringify({ ...found, yaw, people, trouble }) + "FOUND");
</script>"""


def page_data():
    """What lift writes of one person who walks, under a name that tries to be markup."""
    walk = data.synthesize(0, subjects=("S1",), motions=("walk",), frames=3)[0]
    person = dict(name="1", size=[1000, 1000], frames=[0, 1, 2], interpolated=[[0] * 17] * 3,
                  poses=walk.pose_3d.tolist(), root=walk.root.tolist(),
                  keypoints=walk.pose_2d.tolist())
    skeleton = {name: getattr(H17, name) for name in ("joints", "edges", "left", "right")}
    return dict(skeleton, format="poselift poses", source="<b>x", model="glagcn-wild",
                licence="none", fps=30.0, people=[person])


def test_viewer_is_one_page_that_fetches_nothing():
    page = VIEWER.read_text(encoding="utf-8")
    assert page.count('<script id="poses" type="application/json">null</script>') == 1
    assert page.count('id="poses"') == 1
    fetching = r"https?:|\b(src|href)\s*=|url\(|@import|\bimport\b|fetch\(|XMLHttp|innerHTML"
    assert not re.search(fetching, page)
    assert "default-src 'none'" in page
    assert len(page.splitlines()) <= 250


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium here")
def test_viewer_draws_a_figure_that_turns(tmp_path):
    content = json.dumps(page_data()).replace("<", "\\u003c")
    page = tmp_path / "poses.html"
    template = VIEWER.read_text(encoding="utf-8")
    page.write_text(template.replace(">null<", f">{content}<") + LOOK, encoding="utf-8")
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path}/user --dump-dom"
    words = [browser, *options.split(), "--virtual-time-budget=500", page.as_uri()]
    shown = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=60)
    found = json.loads(html.unescape(shown.stdout.rsplit("FOUND", 2)[1]))
    assert min(found["left"], found["right"]) > 500, found  # pixels in their colours
    assert min(found["turned"], found["later"]) > 500, found  # values of pixels that differ
    assert found["again"] == 0  # the same view is the same picture
    assert found["yaw"] == 5  # a key turns it
    assert found["people"] == "0"  # a person's switch takes them away
    assert found["source"] == "<b>x"  # texts cannot become markup
    assert found["trouble"].startswith("broken.json: ")


def test_demo_is_a_whole_person_in_its_image():
    demo = json.loads((HERE / "docs" / "demo.json").read_text(encoding="utf-8"))
    sizes = np.array([(image["width"], image["height"]) for image in demo["images"]])
    points = np.array([one["keypoints"] for one in demo["annotations"]]).reshape(-1, 17, 3)
    assert ((points[..., :2] > 0) & (points[..., :2] < sizes[:, None])).all()


# ---- helpers of the training's tests

CPU = torch.device("cpu")
is_root = hasattr(os, "geteuid") and os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="needs to give up its rights")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")


def on_gpu(test):
    """Marks a test that needs a GPU: `pytest -m gpu` runs these."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(skip(test))


def make_run(folder, device=CPU, **fields):
    """A Run of a tiny recipe on procedural motion."""
    recipe = tiny_recipe(**fields)
    sequences = data.load_dataset(recipe, "", "train")
    store = FrameStore(sequences, recipe.normalise, H17, device)
    return train.Run(recipe, store, folder, device, "procedural")


def first_batches(run, count):
    """The first chunks of an epoch."""
    order = train.epoch_order(run.recipe, len(run.store), 0).to(run.device)
    return run.batches(order)[:count]


def take_steps(run, count=1):
    """That many steps of the first epoch; their losses."""
    run.begin_epoch(0)
    for chunk in first_batches(run, count):
        run.train_step(chunk)
    return run.losses[:count].tolist()


def flat_weights(model):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


def few_clips(monkeypatch, frames=32):
    """From now on procedural motion is one walk of two people."""
    clips = data.synthesize(0, subjects=("S1", "S9"), motions=("walk",), frames=frames)
    monkeypatch.setattr(data, "synthesize", lambda seed: clips)


@pytest.fixture
def small_run(run_folder, monkeypatch):
    """train(folder name, fields): 8 steps an epoch, two epochs, every step saved."""
    few_clips(monkeypatch)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    recipe = tiny_recipe(epochs=2.0, batch=16, anneal_epochs=2.0)

    def run(place, quiet=True, **fields):
        return train.train(replace(recipe, **fields), out=run_folder / place, quiet=quiet)
    return run


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """From now on that step of a run sends the process a signal."""
    real = train.Run.train_step

    def train_step(self, chunk):
        real(self, chunk)
        if self.step == step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(train.Run, "train_step", train_step)


def stopped(run, name, monkeypatch, step=3, number=signal.SIGTERM, **options):
    """Stop the run of that name after a step; returns the exit status."""
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(SystemExit) as stop:
            run(name, **options)
    return stop.value.code


def leaves(value, place=""):
    """{place: tensor or number} of everything in a nested state but times."""
    if not isinstance(value, (dict, list, tuple)):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, part in items:
        if key != "seconds":
            found |= leaves(part, f"{place}/{key}")
    return found


def assert_same_run(one, other):
    """Every file of two finished runs holds the same bits, wall-clock times excepted."""
    for file in ("last.pt", "best.pt", "model.pt"):
        a, b = (leaves(data.read_torch(run / file)) for run in (one, other))
        assert a.keys() == b.keys() and len(a) > 20
        for key, value in a.items():
            assert torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key], key
    logs = [list(csv.DictReader(open(run / "log.csv"))) for run in (one, other)]
    assert [leaves(row) for row in logs[0]] == [leaves(row) for row in logs[1]]
    results = [leaves(data.read_json(run / "result.json")) for run in (one, other)]
    assert results[0] == results[1]
    assert not list(other.glob(".*.tmp"))


# ---- optimisers, schedules, recipes

def minimise(optimizer, p, steps, by_closure=False):
    """The path of steps down the sum of p^4."""
    path = []

    def closure():
        optimizer.zero_grad()
        loss = (p ** 4).sum()
        loss.backward()
        return loss
    for _ in range(steps):
        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        path.append(p.detach().clone())
    return path


@pytest.mark.parametrize("by_closure", [False, True])
def test_ranger_follows_the_releases_trajectory(by_closure):
    """From (1, -2, 3) with lr 0.01, across two Lookahead steps."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    path = minimise(train.ranger([p], lr=0.01), p, 12, by_closure)
    want = {0: (0.95999998, -1.67999995, 1.91999996), 4: (0.82198018, -0.9098438, 0.17329334),
            5: (0.91086566, -1.45482609, 1.58658506), 6: (0.91054839, -1.45457458, 1.5864253),
            10: (0.90873635, -1.45306325, 1.58546937), 11: (0.90951741, -1.45370053, 1.58587147)}
    for step, point in want.items():
        torch.testing.assert_close(path[step].tolist(), list(point), atol=1e-5, rtol=0)


def test_ranger_state_goes_out_and_back():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = train.ranger([p], 0.01)
    minimise(optimizer, p, 9)
    q = nn.Parameter(p.detach().clone())
    other = train.ranger([q], 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    minimise(optimizer, p, 9)
    minimise(other, q, 9)
    assert torch.equal(p, q)


def test_schedules_by_their_definitions():
    def rates(at, **fields):
        return [train.learning_rate(train.Recipe(**fields), epoch) for epoch in at]
    assert rates([7.9], schedule="0.96/1") == pytest.approx([1e-3 * 0.96 ** 7])
    got = rates((0, 9.99, 10, 25), schedule="0.96/10")
    assert got == pytest.approx([1e-3, 1e-3, 0.96e-3, 0.9216e-3])
    got = rates((0, 0.5, 40, 80), schedule="cosine", lr=1e-2, epochs=80.0)
    assert got == pytest.approx([1e-2, 1e-2, 5.005e-3, 1e-5])
    got = rates((0, 20, 40, 90), schedule="cosine-smooth", lr=1e-2, epochs=80.0)
    assert got == pytest.approx([1e-2, 5e-3 * (1 + math.sqrt(0.5)), 5e-3, 0])
    want, lr = [], 1.0
    for epoch in range(1, 12):
        want.append(lr)
        lr *= 0.5 if epoch % 5 == 0 else 0.95
    assert rates(range(11), schedule="3dhp", lr=1.0) == pytest.approx(want)
    assert [train.norm_momentum(e, 80) for e in (0, 80)] == pytest.approx([0.1, 0.001])


PRINTED = {  # the papers' figures as their tables print them
    "gridconv-gt": (37.1,), "gridconv-gt-learnable": (36.4,), "gridconv-hrnet": (47.9, 37.9),
    "gridconv-hrnet-learnable": (47.6, 37.4), "gridconv-gt-uvd": (29.5,),
    "gridconv-hrnet-uvd": (46.3, 37.6), "gridconv-gt-vanilla": (39.0,),
    "gridconv-gt-random-1": (38.5,), "gridconv-gt-random-2": (38.2,),
    "gridconv-gt-random-3": (37.9,), "gridconv-gt-random-4": (37.8,), "gridconv-gt-32": (35.0,),
    "gridconv-gt-32-learnable": (33.4,), "gridconv-3dhp-cross": (72.1, 89.2, 57.6),
    "gridconv-temporal-gt": (33.5, 24.7), "gridconv-temporal-cpn": (44.3, 33.2),
    "glagcn-gt-27": (34.4,), "glagcn-gt-81": (31.5,), "glagcn-gt-243": (28.5, 22.0),
    "glagcn-cpn-243": (44.4, 34.8), "glagcn-gt-243-reconstruct": (24.5,),
    "glagcn-gt-243-reconstruct-512": (21.0, 17.6), "glagcn-humaneva-mrcnn": (15.4,),
    "glagcn-humaneva-gt": (9.2,), "glagcn-3dhp-27": (31.36, 98.19, 76.53),
    "glagcn-3dhp-81": (27.76, 98.53, 79.12)}
PUBLISHED = {  # how its rows are trained: {beginning of the name: fields}
    "gridconv-gt": dict(keypoints="gt", padding=("circular", "replicate"), batch=200, hidden=256),
    "gridconv-hrnet": dict(keypoints="hrnet", padding=("circular", "zeros"), batch=200, hidden=256),
    "gridconv-temporal": dict(batch=1024, epochs=80, schedule="0.95/1", optimizer="amsgrad"),
    "glagcn-gt": dict(epochs=80, batch=512, input_norm=True),
    "glagcn-humaneva": dict(epochs=1000, batch=256, filter_widths=(3, 3, 3), channels=96),
    "glagcn-humaneva-mrcnn": dict(input_norm=False, keypoints="detectron_pt_coco"),
    "glagcn-3dhp": dict(epochs=50, batch=256, channels=256, optimizer="amsgrad", lr=1e-3,
                        schedule="3dhp", reconstruct=True, unshared_weight=0.5, refine=False,
                        skeleton="3dhp17", norm_schedule=False),
    "gridconv-3dhp-cross": dict(weights="gridconv-gt-learnable", normalise="longest")}


@pytest.mark.parametrize("name", PRINTED)
def test_published_rows_have_the_papers_figures_and_settings(name):
    recipe = train.RECIPES[name]
    assert recipe.name == name and recipe.row and recipe.precision == "auto" and recipe.seed == 0
    assert tuple(train.paper_figures(vars(recipe)).values()) == PRINTED[name]
    for start, fields in PUBLISHED.items():
        if name.startswith(start):
            assert {key: getattr(recipe, key) for key in fields} == fields
    if recipe.method == "gridconv":
        learnt = recipe.layout == "autogrids"
        assert (recipe.epochs, recipe.lr, recipe.optimizer) == (100, 1e-3, "adam")
        assert (recipe.dropout, recipe.temperature, recipe.noise_epochs) == (0.25, 30, 30)
        assert recipe.skip == "gridconv" and recipe.blocks == 2 and not recipe.flips
        assert recipe.normalise == ("longest" if recipe.weights else "release-500")
        assert recipe.schedule == ("0.96/10" if learnt else "0.96/1")
        assert recipe.loss == ("mse" if learnt else "grid")
        assert recipe.attention == ("" if name.endswith("vanilla") else "grid")
    if recipe.method == "glagcn":
        assert recipe.flips and recipe.flip_test and not recipe.jitter and recipe.dropout == 0.1
        assert (recipe.normalise, recipe.loss) == ("width", "mpjpe")
    if recipe.method == "glagcn" and recipe.data != "3dhp":
        assert (recipe.optimizer, recipe.lr, recipe.schedule) == ("ranger", 1e-2, "cosine")
        stages = (0.5, 60, True) if recipe.reconstruct else (0, 0, False)
        assert (recipe.unshared_weight, recipe.stage_one_epochs, recipe.refine) == stages
        assert recipe.norm_schedule
    length = name.removesuffix("-reconstruct").removesuffix("-reconstruct-512").split("-")[-1]
    if recipe.method == "glagcn" and length.isdigit():
        assert math.prod(recipe.filter_widths) == int(length)


def test_every_published_row_is_quoted_and_no_recipe_asks_for_half_precision():
    quoted = {name for name, recipe in train.RECIPES.items() if train.paper_figures(vars(recipe))}
    assert quoted == set(PRINTED)
    assert {recipe.precision for recipe in train.RECIPES.values()} == {"auto"}
    for recipe in train.RECIPES.values():
        train.check_recipe(recipe)


def test_parameters_of_the_papers_tables():
    sizes = {"gridconv-gt": 4_790_406, "gridconv-gt-learnable": 4_790_831, "glagcn-gt-27": 844_076,
             "glagcn-gt-81": 1_096_466, "glagcn-gt-243": 1_348_856,
             "glagcn-gt-243-reconstruct": 1_876_886, "glagcn-gt-243-reconstruct-512": 48_641_526}
    for name, size in sizes.items():
        assert train.parameters(train.RECIPES[name]) == size, name


@pytest.mark.parametrize("name, precision, at_once, gib", [
    ("gridconv-gt", "float32", 200, 0.7), ("gridconv-gt", "bf16", 200, 0.5),
    ("glagcn-gt-27", "float32", 512, 3.1), ("glagcn-gt-81", "float32", 512, 9.5),
    ("glagcn-gt-243", "float32", 512, 28.4), ("glagcn-gt-243", "bf16", 512, 14.8),
    ("glagcn-gt-243", "float32", 64, 3.6), ("glagcn-gt-243-reconstruct", "float32", 512, 51.0),
    ("glagcn-gt-243-reconstruct", "bf16", 512, 26.5), ("glagcn-3dhp-81", "float32", 256, 22.6),
    ("glagcn-gt-243-reconstruct-512", "float32", 64, 34.6)])
def test_memory_is_that_counted(name, precision, at_once, gib):
    got = train.memory(train.RECIPES[name], precision, at_once)
    assert got == pytest.approx(gib, rel=0.07, abs=0.1)


# ---- epochs, batches, losses

def test_an_epoch_holds_every_sample_once_and_depends_on_seed_and_epoch_alone():
    plain, flips = tiny_recipe(), tiny_recipe(flips=True)
    assert sorted(train.epoch_order(plain, 50, 3).tolist()) == list(range(50))
    assert sorted(train.epoch_order(flips, 50, 3).tolist()) == list(range(100))
    order = train.epoch_order(plain, 50, 3)
    torch.manual_seed(7)
    assert torch.equal(order, train.epoch_order(plain, 50, 3))
    assert not torch.equal(order, train.epoch_order(plain, 50, 4))
    assert not torch.equal(order, train.epoch_order(tiny_recipe(seed=1), 50, 3))


@given(st.integers(1, 60), st.integers(2, 20), st.integers(1, 3))
def test_batches_and_shares_cover_everything_and_none_holds_one_sample(samples, size, world):
    least = 2 * world
    if size < least:
        return
    order = torch.randperm(samples)
    parts = train.batches(order, size, least)
    assert torch.equal(torch.cat(parts), order)
    assert all(len(part) == size for part in parts[:-2])
    if samples < least:
        return
    assert all(least <= len(part) < size + least for part in parts)
    for part in parts:
        shares = part.tensor_split(world)
        assert torch.equal(torch.cat(shares), part) and min(map(len, shares)) >= 2


def test_losses_by_their_definitions(run_folder):
    index = torch.arange(5)
    run = make_run(run_folder, loss="grid", layout="released", dropout=0.0)
    net = run.model.eval()
    pose, target = run.store.batch(index)
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17)
    grids = [gridconv.sgt(part, S, (5, 5)) for part in (pose, target)]
    error = net.forward_grid(grids[0]) - grids[1]
    torch.testing.assert_close(run.objective(index), (error ** 2).sum() / error.numel())
    error = net(pose) - target
    for loss, want in (("mse", (error ** 2).sum() / error.numel()),
                       ("mpjpe", (error ** 2).sum(-1).sqrt().mean())):
        recipe = replace(run.recipe, loss=loss)
        objective = train.Objective(net, run.refinement, run.store, recipe)
        torch.testing.assert_close(objective(index), want)


def test_stage_one_is_the_local_and_the_global_loss(run_folder):
    index = torch.arange(5)
    fields = dict(reconstruct=True, stage_one_epochs=0.004, filter_widths=(3, 3), dropout=0.0)
    run = make_run(run_folder, **{**TINY_GLA, **fields})
    run.model.eval()
    window, targets = run.store.batch(index, 9, all_targets=True)
    local, sequence = run.model(window, return_sequence=True)
    want = (sequence - targets).norm(dim=-1).mean() + (local - targets[:, 4]).norm(dim=-1).mean()
    torch.testing.assert_close(run.objective(index, stage_one=True), want)
    local_alone = (local - targets[:, 4]).norm(dim=-1).mean()
    torch.testing.assert_close(run.objective(index, stage_one=False), local_alone)


def test_mirrored_samples_are_the_second_half_and_are_mirrored_back_to_be_refined(run_folder):
    fields = dict(reconstruct=True, stage_one_epochs=0.004, dropout=0.0, refine=True)
    run = make_run(run_folder, **{**TINY_GLA, **fields})
    run.objective.eval()
    N, index = len(run.store), torch.tensor([3, 7])
    pose, target = run.store.batch(index, 3)
    pose, target = data.flip(pose, H17), data.flip(target, H17)
    predicted = run.model(pose)
    back = data.flip(predicted, H17)
    better = run.refinement(back, run.store.input[index], run.store.normalised_intrinsics(index),
                            run.store.root[index])
    want = (predicted - target).norm(dim=-1).mean()
    want = want + (better - run.store.pose_3d[index]).norm(dim=-1).mean()
    torch.testing.assert_close(run.objective(index + N), want)


def test_jitter_is_one_of_nine_rotations_and_scales():
    torch.manual_seed(0)
    target = torch.randn(900, 4, 3)
    torch.manual_seed(1)
    out = train.jitter(target)
    assert torch.equal(out[..., 2], target[..., 2])
    before, after = (torch.view_as_complex(x[..., :2].contiguous()) for x in (target, out))
    ratio = after / before
    assert (ratio - ratio[:, :1]).abs().max() < 1e-3  # one for each sample
    found = {(round(z.abs().item(), 2), round(math.degrees(z.angle().item()))) for z in ratio[:, 0]}
    assert found == {(scale, angle) for scale in (0.95, 1.0, 1.05) for angle in (-5, 0, 5)}
    torch.manual_seed(1)
    sequence = train.jitter(target.unflatten(1, (2, 2)))
    assert torch.equal(sequence.flatten(1, 2), out)  # of a sequence all frames alike


@pytest.mark.parametrize("stage_one", [False, True])
def test_jitter_moves_the_targets_of_both_stages(run_folder, stage_one):
    losses = []
    for moved in (False, True):
        fields = dict(reconstruct=True, stage_one_epochs=0.004, dropout=0.0, jitter=moved)
        run = make_run(run_folder, **{**TINY_GLA, **fields})
        run.objective.eval()
        losses.append(run.objective(torch.arange(40), stage_one).item())
    assert losses[0] != losses[1]


# ---- a step

@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_micro_batches_give_the_same_step(run_folder, clip):
    weights = []
    for micro in (0, 16):
        run = make_run(run_folder, micro_batch=micro, dropout=0.0, attention="", clip=clip)
        run.begin_epoch(0)
        run.model.eval()  # batch statistics differ between micro-batches by nature
        run.train_step(torch.arange(56))
        weights.append(flat_weights(run.model))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_as_the_recipe_says(run_folder):
    norms = []
    for clip in (0.0, 1e-3):
        run = make_run(run_folder, clip=clip)
        step = run.optimizer.step

        def looked_at(run=run, step=step):
            norms.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item())
            step()
        run.optimizer.step = looked_at
        take_steps(run)
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_stage_two_leaves_the_sequence_head_alone(run_folder):
    fields = dict(reconstruct=True, epochs=2.0, stage_one_epochs=1.0)
    run = make_run(run_folder, **{**TINY_GLA, **fields})
    head = list(run.model.sequence_head.parameters())
    start = [p.detach().clone() for p in head]
    take_steps(run)
    moved = [p.detach().clone() for p in head]
    assert any(not torch.equal(a, b) for a, b in zip(start, moved))
    run.step = run.epoch_steps
    run.begin_epoch(1)
    run.train_step(torch.arange(32))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(moved, head))
    asleep = {name for name, p in run.model.named_parameters() if not p.requires_grad}
    assert asleep and all(name.startswith("sequence_head") for name in asleep)


def test_norm_momentum_reaches_all_but_shortcut_norms(run_folder):
    run = make_run(run_folder, **{**TINY_GLA, "epochs": 80.0})
    run.begin_epoch(40)
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    momenta = [m.momentum for m in run.model.modules() if isinstance(m, kinds)]
    assert sum(m == 0.1 for m in momenta) == 2  # the expanding block's two shortcuts keep 0.1
    assert sum(m == pytest.approx(0.01) for m in momenta) == len(momenta) - 2


def test_noise_ends_and_the_temperature_falls_as_the_recipe_says(run_folder):
    fields = dict(layout="autogrids", noise_epochs=30.5, epochs=100.0, anneal_epochs=10.0)
    run = make_run(run_folder, **fields)
    for epoch, noise, temperature in ((0, True, 30), (5, True, 15.5), (30, True, 1),
                                      (30.49, True, 1), (30.5, False, 1), (99, False, 1)):
        run.reach(epoch)
        assert run.model.autogrids.noise is noise
        assert run.model.temperature == pytest.approx(temperature)


@pytest.mark.parametrize("fields", [
    {**TINY_GLA, "epochs": 0.1, "reconstruct": True, "stage_one_epochs": 0.075},
    {"layout": "autogrids", "epochs": 0.2, "noise_epochs": 0.15}], ids=["stages", "noise"])
def test_stages_and_noise_change_within_an_epoch(fields, run_folder, monkeypatch):
    seen, real = [], train.Run.train_step

    def train_step(self, chunk):
        real(self, chunk)
        seen.append(self.stage_one if self.recipe.reconstruct else self.model.autogrids.noise)
    monkeypatch.setattr(train.Run, "train_step", train_step)
    train.train(tiny_recipe(**fields), out=run_folder / "run", quiet=True)
    first = sum(seen)
    assert seen == [True] * first + [False] * (len(seen) - first)
    assert len(seen) >= 8 and abs(first - 0.75 * len(seen)) <= 1


def test_the_grid_has_a_learning_rate_of_its_own(run_folder):
    run = make_run(run_folder, layout="autogrids", grid_lr=0.0)
    s_prob = run.model.autogrids.s_prob
    before = s_prob.detach().clone(), flat_weights(run.model)
    take_steps(run)
    assert torch.equal(s_prob, before[0]) and not torch.equal(flat_weights(run.model), before[1])
    run = make_run(run_folder, layout="autogrids", grid_lr=5.0, schedule="1/1")
    take_steps(run)
    groups = run.optimizer.param_groups
    rates = {tuple(p.shape): group["lr"] for group in groups for p in group["params"]}
    assert rates.pop((25, 17)) == pytest.approx(1.5e-2) and set(rates.values()) == {3e-3}


def test_head_scale_multiplies_the_first_weights_of_the_head_alone(run_folder):
    plain, small = (make_run(run_folder, **{**TINY_GLA, "head_scale": s}).model for s in (1.0, 0.1))
    scaled = dict(small.named_parameters())
    for name, p in plain.named_parameters():
        factor = 0.1 if name.startswith("head.") else 1.0
        torch.testing.assert_close(scaled[name], p * factor)


def test_half_precision_takes_nearly_the_same_step(run_folder):
    runs = [make_run(run_folder, precision=p, dropout=0.0) for p in ("float32", "bf16")]
    losses = [take_steps(run, 3) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


@pytest.mark.parametrize("name", [n for n, r in train.RECIPES.items() if not r.weights])
def test_every_recipe_takes_two_steps(name, everything, run_folder):
    published = train.RECIPES[name]
    small = dict(hidden=4, blocks=1, channels=4, reconstruct_blocks=1, batch=2, micro_batch=0)
    recipe = replace(published, **small)
    store = store_for(everything[0], recipe)
    run = train.Run(recipe, store, run_folder, CPU)
    before = flat_weights(run.model)
    for step, epoch in enumerate((0, int(published.epochs) - 1)):  # of both stages
        run.step = epoch * run.epoch_steps + step
        run.begin_epoch(epoch)
        run.train_step(torch.tensor([0, len(store) - 1]))
        assert run.stage_one == (recipe.reconstruct and step == 0)
    assert torch.isfinite(run.losses[:2]).all() and run.losses[0] > 0
    assert not torch.equal(before, flat_weights(run.model))


STORES = {}


def store_for(folder, recipe):
    """The training store of a recipe's data, made once for each."""
    kept = ("data", "keypoints", "skeleton", "skip", "normalise", "target", "cameras")
    key = (folder, *(getattr(recipe, name) for name in kept))
    if key not in STORES:
        STORES[key] = data.make_store(recipe, folder, "train", CPU)
    return STORES[key]


# ---- reproducible, resumed bit for bit

def noisy(method, epochs):
    """A recipe with every kind of randomness and state."""
    fields = dict(layout="autogrids", noise_epochs=1.0)
    if method == "glagcn":
        fields = {**TINY_GLA, "reconstruct": True, "reconstruct_blocks": 1, "unshared_weight": 0.5,
                  "stage_one_epochs": epochs / 2, "jitter": True, "refine": True}
    fields |= dict(batch=24, dropout=0.1, epochs=epochs, eval_every=2, noise=0.01)
    return tiny_recipe(**fields)


@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_training_is_reproducible_and_resumes_exactly(run_folder, method, monkeypatch):
    few_clips(monkeypatch, 24)
    recipe = noisy(method, 2.0)

    def run(name):
        return train.train(recipe, out=run_folder / name, quiet=True)
    whole = run("whole")
    assert stopped(run, "parts", monkeypatch, 3) == 143
    assert stopped(run, "parts", monkeypatch, 6, signal.SIGINT) == 130
    parts = run("parts")
    assert parts["last"] == whole["last"] and parts["best"] == whole["best"]
    run("again")
    assert_same_run(run_folder / "whole", run_folder / "parts")
    assert_same_run(run_folder / "whole", run_folder / "again")
    assert run("whole")["last"] == whole["last"]  # nothing left to do


def test_how_a_run_is_executed_may_change_and_nothing_else(small_run, run_folder, monkeypatch):
    stopped(small_run, "run", monkeypatch)
    with pytest.raises(InputError, match="lr 0.003 there, 0.1 here"):
        small_run("run", lr=0.1)
    result = small_run("run", micro_batch=8, precision="bf16", deterministic=True)
    torch.use_deterministic_algorithms(False)
    assert (result["precision"], result["micro_batch"]) == ("bf16", 8)
    assert result["settings_changed"] == ""


def test_a_state_from_before_a_field_existed_is_continued(small_run, run_folder, monkeypatch):
    stopped(small_run, "run", monkeypatch)
    path = run_folder / "run" / "last.pt"
    state = data.read_torch(path)
    del state["recipe"]["input_norm"]
    state["recipe"] |= {"row": "said otherwise", "workers": 3}
    torch.save(state, path)
    assert small_run("run")["epochs"] == 2


def test_a_run_continues_on_its_own_data_and_processes_only(small_run, run_folder, monkeypatch):
    small_run("run")
    state = data.read_torch(run_folder / "run" / "last.pt")
    for changed, says in (({"data_print": [["train", 1, 2]]}, "other data"),
                          ({"random": [1, 2]}, "2 processes there, 1 here")):
        torch.save({**state, **changed}, run_folder / "run" / "last.pt")
        with pytest.raises(InputError, match=says):
            small_run("run")
    for other in ([1], {"model": {}}, data.read_torch(run_folder / "run" / "best.pt")):
        torch.save(other, run_folder / "run" / "last.pt")
        with pytest.raises(InputError, match="last.pt: not the state of a run"):
            small_run("run")


def test_an_annealed_temperature_stays_with_the_weights(small_run, run_folder):
    first = small_run("run", epochs=0.5, anneal_epochs=1.0)
    for name in ("best.pt", "model.pt"):
        model = evaluation.load_model(run_folder / "run" / name)
        assert 1 < model.temperature < 30 and model.epoch == 1
    store = data.make_store(model.recipe, "", "test", CPU)
    scores = evaluation.evaluate(model, store)
    assert scores["mpjpe"] == pytest.approx(first["last"]["mpjpe"], rel=1e-6)


def test_the_last_weights_stand_alone_beside_the_best(small_run, run_folder, monkeypatch):
    errors, real = iter((50.0, 60.0)), evaluation.evaluate

    def worse(*arguments, **options):
        return {**real(*arguments, **options), "mpjpe": next(errors)}
    monkeypatch.setattr(evaluation, "evaluate", worse)
    result = small_run("run")
    assert (result["best"]["epoch"], result["last"]["epoch"]) == (1, 2)
    best, last = (data.read_torch(run_folder / "run" / name) for name in ("best.pt", "model.pt"))
    assert (best["epoch"], last["epoch"]) == (1, 2) and best.keys() == last.keys()
    state = data.read_torch(run_folder / "run" / "last.pt")["model"]
    assert all(torch.equal(value, last["model"][key]) for key, value in state.items())
    assert any(not torch.equal(value, best["model"][key]) for key, value in state.items())


# ---- killed at any moment

def in_processes(world, function, *arguments):
    """Process numbers of `world` forks of this process, joined as by torchrun, that run it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1]:
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        status = 1
        try:
            function(*arguments)
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return children


def dying_at(operation, writes):
    """From now on the process ends by SIGKILL before (an even number) or after the fsync, rename
    or, with `writes`, write of half that number."""
    count = iter(range(10 ** 9))

    def deadly(real):
        def wrapped(*arguments):
            at = 2 * next(count)
            if at == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            if at + 1 == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped

    @contextlib.contextmanager
    def unbuffered(path, mode="r"):
        with open(path, mode, buffering=0) as file:
            if "w" in mode:
                file = SimpleNamespace(write=deadly(file.write), flush=file.flush,
                                       fileno=file.fileno)
            yield file
    if writes:
        data.open = unbuffered
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def kill_and_continue(method, folder, world=1, kills=5, epochs=4.0, how="time"):
    """In `folder`: the run `whole`, and the same run `killed-1`, ... until `kills` times it was
    ended by SIGKILL, after a random time or at a random file operation, and then continued."""
    torch.set_num_threads(1)
    folder, rng, recipe = Path(folder), random.Random(0), noisy(method, epochs)
    clips = data.synthesize(0, subjects=("S1", "S9"), motions=("walk",), frames=24)
    data.synthesize = lambda seed: [s for s in clips if s.camera == "54138969"] * 2
    train.SAVE_SECONDS = -1

    def run(name):
        train.train(recipe, out=folder / name, device="cpu", quiet=True)

    def doomed(name, operation, writes):
        dying_at(operation, writes)
        run(name)

    def wait(children):
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    started = time.perf_counter()
    assert wait(in_processes(world, run, "whole")) == [0] * world
    seconds, killed, done = time.perf_counter() - started, 0, 0
    while killed < kills:
        name = f"killed-{done}"
        if how == "time":
            children = in_processes(world, run, name)
            time.sleep(rng.uniform(0.1, 0.8) * seconds)
            for child in children:
                os.kill(child, signal.SIGKILL)
        else:
            writes = rng.random() < 0.5
            operation = rng.randrange(1000 if writes else 25)
            children = in_processes(world, doomed, name, operation, writes)
        status = wait(children)
        assert set(status) <= {0, -9}, status
        killed, done = killed + (-9 in status), done + (-9 not in status)
    assert wait(in_processes(world, run, f"killed-{done}")) == [0] * world


def fresh_python(code, *words, threads="1"):
    """What a Python of its own prints for that code, which may use this file's functions."""
    module = Path(__file__).stem
    head = f"import sys, {module} as tests, torch._dynamo\n"  # which optimisers import
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", head + code, *map(str, words)]
    done = subprocess.run(command, cwd=HERE, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def killed_run(tmp_path, method, **options):
    code = "import json; tests.kill_and_continue(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    fresh_python(code, method, tmp_path, json.dumps(options))
    for run in tmp_path.glob("killed-*"):
        assert_same_run(tmp_path / "whole", run)


@pytest.mark.parametrize("method, options", [
    ("gridconv", dict(how="file", kills=12)), ("glagcn", dict(kills=2, epochs=2.0)),
    ("gridconv", dict(world=2, kills=2))], ids=["files", "glagcn", "two-processes"])
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path, method, options):
    killed_run(tmp_path, method, **options)


@pytest.mark.slow
@pytest.mark.parametrize("how, world", [("time", 1), ("file", 1), ("time", 2)])
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_killed_at_many_moments_a_run_goes_on_bit_for_bit(tmp_path, method, how, world):
    killed_run(tmp_path, method, how=how, world=world, kills=24 // world, epochs=16.0)


# ---- damage

def flipped(content, at):
    """The bytes with one bit of one of them turned over."""
    return content[:at] + bytes([content[at] ^ 8]) + content[at + 1:]


@pytest.mark.parametrize("how", ["truncated", "a bit of a weight", "missing"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_continues(
        small_run, run_folder, monkeypatch, capsys, how):
    stopped(small_run, "parts", monkeypatch, 11)
    last, previous = (run_folder / "parts" / name for name in ("last.pt", "previous.pt"))
    assert (data.read_torch(last)["step"], data.read_torch(previous)["step"]) == (11, 10)
    content = last.read_bytes()
    damaged = {"truncated": content[:len(content) // 2],
               "a bit of a weight": flipped(content, len(content) // 2)}
    last.unlink()
    if how != "missing":
        last.write_bytes(damaged[how])
    (run_folder / "parts" / ".last.pt.1.tmp").write_bytes(b"what a killed process was writing")
    steps, real = [], train.Run.train_step

    def train_step(self, chunk):
        steps.append(self.step)
        real(self, chunk)
    monkeypatch.setattr(train.Run, "train_step", train_step)
    small_run("parts")
    told = capsys.readouterr().err
    assert steps[0] == 10 and told.startswith("warning: ") and "last.pt" in told
    assert "continuing from the checkpoint before it" in told and told.count("\n") == 1
    small_run("whole")
    assert_same_run(run_folder / "whole", run_folder / "parts")


def test_two_damaged_checkpoints_are_one_clear_line(small_run, run_folder):
    small_run("run")
    for name in ("last.pt", "previous.pt"):
        path = run_folder / "run" / name
        path.write_bytes(flipped(path.read_bytes(), 5000))
    with pytest.raises(InputError) as error:
        small_run("run")
    assert_clear(error.value, ["previous.pt", "last.pt", "remove both to begin anew"])
    (run_folder / "run" / "previous.pt").unlink()
    with pytest.raises(InputError) as error:
        small_run("run")
    assert_clear(error.value, ["last.pt", "remove it to begin anew"])


def test_a_stored_checkpoint_is_read_once(small_run, run_folder, monkeypatch):
    stopped(small_run, "run", monkeypatch)
    read, real = [], data.read_torch

    def read_torch(path, *rest):
        read.append(path.name)
        return real(path, *rest)
    monkeypatch.setattr(data, "read_torch", read_torch)
    small_run("run")
    assert read == ["last.pt"]


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_whole(
        small_run, run_folder, monkeypatch):
    resource = pytest.importorskip("resource")
    stopped(small_run, "parts", monkeypatch)
    last = run_folder / "parts" / "last.pt"
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    real = train.Run.save
    for room in (100, len(before) // 3, len(before) - 1):  # a full disk: every writer's OSError
        def save(self, room=room):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                real(self)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            patch.setattr(train.Run, "save", save)
            small_run("parts")
        assert_clear(error.value, ["last.pt", "File too large"])
        assert last.read_bytes() == before and not list(last.parent.glob(".*tmp"))
    small_run("parts"), small_run("whole")
    assert_same_run(run_folder / "whole", run_folder / "parts")


@needs_root
def test_a_read_only_folder_is_one_clear_line_and_the_old_checkpoint_whole(
        small_run, run_folder, monkeypatch):
    stopped(small_run, "parts", monkeypatch)
    last = run_folder / "parts" / "last.pt"
    before = last.read_bytes()
    run_folder.parent.chmod(0o755), run_folder.chmod(0o755), last.parent.chmod(0o555)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError) as error:
            small_run("parts")
    finally:
        os.seteuid(0)
    assert_clear(error.value, ["parts", "Permission denied", "--out"])
    assert last.read_bytes() == before


# ---- locks

def test_a_folder_is_refused_while_its_run_lives_and_not_after_it_was_killed(small_run, run_folder):
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        with train.locked(run_folder / "run"):
            os.write(says, b".")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(train.Busy) as error:
            small_run("run")
        assert_clear(error.value, ["run", "another run", "--out"])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert small_run("run")["last"]


def test_a_lock_keeps_a_files_content_and_a_file_is_no_folder(small_run, run_folder):
    (run_folder / "notes").write_text("mine")
    (run_folder / "lock").symlink_to("notes")
    with train.locked(run_folder):
        pass
    assert (run_folder / "notes").read_text() == "mine"
    with pytest.raises(InputError) as error:
        small_run("notes/run")
    assert_clear(error.value, ["notes", "--out"])


@pytest.mark.parametrize("platform", ["windows", "neither"])
def test_commands_run_where_fcntl_is_missing(small_run, run_folder, monkeypatch, platform):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    held = []
    if platform == "windows":
        def locking(number, mode, size):
            if held:
                raise OSError(13, "Permission denied")
            held.append((mode, size))
        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    assert small_run("run")["last"]
    if platform == "windows":
        assert held == [(2, 1)]
        with pytest.raises(train.Busy, match="another run"):
            small_run("run")


# ---- signals

@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["predict", "yardsticks", "save"])
def test_a_signal_ends_steps_evaluations_and_saving_and_says_so(
        small_run, run_folder, monkeypatch, capsys, number, status, where):
    before = signal.getsignal(number)
    small_run("whole")
    once = []
    owner = train.Run if where == "save" else evaluation
    real = getattr(owner, where)

    def interrupted(*arguments, **options):
        if not once:
            once.append("asked")
            os.kill(os.getpid(), number)
            for _ in range(1000):  # a signal's handler comes between two of Python's own steps
                pass
            once.append("went on")
        return real(*arguments, **options)
    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(SystemExit) as stop:
        small_run("parts", quiet=False)
    assert stop.value.code == status and signal.getsignal(number) == before
    assert not (run_folder / "parts" / "result.json").exists()
    assert ("went on" in once) == (where == "save")
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert len(said) == 1 and "saved" in said[0] and "the same command goes on" in said[0]
    state = data.read_torch(run_folder / "parts" / "last.pt")
    reached = {"predict": (8, 0), "yardsticks": (16, 2), "save": (2, 0)}[where]
    assert (state["step"], len(state["history"])) == reached
    small_run("parts")
    assert_same_run(run_folder / "whole", run_folder / "parts")


def test_a_signal_while_data_is_read_ends_at_once(small_run, run_folder, monkeypatch, capsys):
    real = data.provenance

    def interrupted(sequences):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return real(sequences)
    monkeypatch.setattr(data, "provenance", interrupted)
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        small_run("run", quiet=False)
    assert stop.value.code == 143 and time.monotonic() - started < 5
    assert "nothing was begun" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", train.EMBEDDED)
def test_signals_end_the_embedded_default_within_five_seconds(tmp_path, recipe):
    rng = random.Random(recipe)
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)) * 2:
        words = [sys.executable, HERE / "train.py", recipe, "--epochs", "2", "--eval-every", "1",
                 "--out", tmp_path]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        run = subprocess.Popen([*map(str, words)], stderr=pipe, stdout=nowhere)
        while not (tmp_path / "lock").exists():
            time.sleep(0.1)
        time.sleep(rng.uniform(5, 40))
        asked = time.monotonic()
        run.send_signal(number)
        assert run.wait() in (status, 0) and time.monotonic() - asked < 5


# ---- numbers that are none, memory, logs

@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
        small_run, run_folder, monkeypatch, what):
    real, count = train.Objective.forward, iter(range(1, 99))

    def forward(self, *arguments):
        loss = real(self, *arguments)
        if next(count) != 6:
            return loss
        weight = next(self.model.parameters())
        return loss * math.nan if what == "loss" else loss + (weight - weight).sqrt().sum()
    monkeypatch.setattr(train.Objective, "forward", forward)
    with pytest.raises(InputError) as error:
        small_run(what)
    said = "the loss of step 6 is nan" if what == "loss" else "some weights after step 6"
    assert_clear(error.value, [said, "last.pt holds the last good state", "--lr"])
    state = data.read_torch(run_folder / what / "last.pt")
    assert state["step"] == 5
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_run_that_is_never_finite_leaves_nothing(run_folder):
    recipe = tiny_recipe(epochs=1.0, lr=1e30, schedule="1/1", loss="mse", attention="")
    with pytest.raises(InputError, match=r"loss of step \d+ is (nan|inf).*nothing is saved"):
        train.train(recipe, out=run_folder, quiet=True)
    assert not (run_folder / "last.pt").exists()


def test_the_deterministic_switch_is_torchs_and_changes_nothing_on_the_cpu(
        small_run, run_folder, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    small_run("plain")
    try:
        small_run("switched", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        small_run("plain")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    paths = [run_folder / name / "model.pt" for name in ("plain", "switched")]
    states = [data.read_torch(path)["model"] for path in paths]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    result = data.read_json(run_folder / "switched" / "result.json")
    assert "threads" in result["device"]  # whose number decides the last bits
    assert {"seed", "torch", "numpy", "python", "commit", "precision"} <= result.keys()


def test_without_git_a_run_ends_well(small_run, run_folder, monkeypatch):
    monkeypatch.setenv("PATH", str(run_folder))
    assert small_run("run")["commit"] == ""


def gained(run_folder, monkeypatch, method, steps, warm_up):
    """(bytes, file handles, tensors) gained between two steps of a run that saves often."""
    few_clips(monkeypatch, 10)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.05)
    seen, real = [], train.Run.train_step

    def train_step(self, chunk):
        real(self, chunk)
        if self.step in (warm_up, steps):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE")
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            seen.append((resident, len(os.listdir("/proc/self/fd")), tensors))
    recipe = replace(noisy(method, 1.0), eval_every=20)
    per_epoch = make_run(run_folder, **vars(recipe)).epoch_steps
    monkeypatch.setattr(train.Run, "train_step", train_step)
    recipe = replace(recipe, epochs=steps / per_epoch)
    train.train(recipe, out=run_folder / method, quiet=True)
    return [after - before for before, after in zip(*seen)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_memory_and_file_handles_do_not_grow(run_folder, monkeypatch, method):
    memory, handles, tensors = gained(run_folder, monkeypatch, method, 120, 60)
    assert memory < 2 ** 24 and handles == 0 and tensors == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_memory_and_file_handles_do_not_grow_over_2000_steps(run_folder, monkeypatch, method):
    memory, handles, tensors = gained(run_folder, monkeypatch, method, 2200, 200)
    assert memory < 2 ** 23 and handles == 0 and tensors == 0


def empty_steps(folder, monkeypatch, steps):
    """A run of steps that do nothing: (bytes of its log, of its state, epochs)."""
    def train_step(self, chunk):
        self.step += 1
    monkeypatch.setattr(train.Run, "train_step", train_step)
    scores = {"mpjpe": 50.0, "p_mpjpe": 40.0, "rows": []}
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: scores)
    monkeypatch.setattr(train, "finish", lambda *_: {})
    recipe = replace(train.RECIPES["gridconv-synthetic"], hidden=4, blocks=1)
    per_epoch = math.ceil(len(data.make_store(recipe, "", "train", CPU)) / recipe.batch)
    recipe = replace(recipe, epochs=steps / per_epoch)
    train.train(recipe, out=folder / "run")
    lines = (folder / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + math.ceil(steps / per_epoch)
    return sum(map(len, lines)), (folder / "run" / "last.pt").stat().st_size, len(lines) - 1


def test_the_log_has_a_line_an_epoch(run_folder, monkeypatch, capsys):
    log, _, epochs = empty_steps(run_folder, monkeypatch, 1000)
    assert log < 5000 and len(capsys.readouterr().err.splitlines()) == epochs


@pytest.mark.slow
def test_the_log_of_a_million_steps_stays_small(tmp_path, monkeypatch):
    log, state, _ = empty_steps(tmp_path, monkeypatch, 10 ** 6)
    assert log < 10 ** 6 and state < 2 * 10 ** 6


def test_progress_is_shown_every_30_seconds_where_there_is_no_terminal(
        run_folder, monkeypatch, capsys):
    run = make_run(run_folder)
    now = [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    progress = train.Progress(run, quiet=False)
    run.losses[:] = 0.25
    for run.step in range(1, 61):  # two seconds a step
        now[0] += 2
        progress.show()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("loss 0.2500" in line and "min left" in line for line in lines)
    progress.show({"loss": 0.5, "mpjpe": 51.0, "p_mpjpe": 41.0})
    assert "MPJPE 51.0 mm  P-MPJPE 41.0 mm" in capsys.readouterr().err
    quiet = train.Progress(run, quiet=True)
    now[0] += 100
    quiet.show()
    assert capsys.readouterr().err == ""


# ---- out of memory

@pytest.mark.parametrize("fault", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_with_what_fits_and_keeps_what_was_saved(
        fault, small_run, run_folder, monkeypatch):
    stopped(small_run, "run", monkeypatch)

    def train_step(self, chunk):
        raise fault
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(train.Run, "train_step", train_step)
        small_run("run")
    said = ["out of memory", "16 samples", "--micro-batch 8", "--precision bf16", "GiB"]
    assert_clear(error.value, said)
    assert small_run("run")["epochs"] == 2


@pytest.mark.parametrize("name, gib, fits", [
    ("glagcn-gt-243", 80, {"tf32": 256, "bf16": 512}),
    ("glagcn-gt-243", 8, {"tf32": 64, "bf16": 128}),
    ("glagcn-gt-243-reconstruct", 24, {"tf32": 128, "bf16": 256})])
def test_what_would_fit_is_less_than_the_card_has(name, gib, fits, monkeypatch):
    card = SimpleNamespace(total_memory=gib * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    recipe = train.RECIPES[name]
    line = train.out_of_memory(recipe, "tf32", torch.device("cuda"))
    said = dict(re.findall(r"--precision (\w+) --micro-batch (\d+)", line))
    assert {kind: int(n) for kind, n in said.items()} == fits
    for kind, n in fits.items():
        assert train.memory(recipe, kind, n) < 0.8 * gib
    huge = replace(recipe, channels=8192, batch=200)  # fits in no batch; of one there is none
    assert "--micro-batch 2 " in train.out_of_memory(huge, "tf32", torch.device("cuda"))


# ---- several processes

def shared_run(method, rank=0, world=1):
    """A float64 run of two epochs, with unequal shares and nothing random in a step."""
    fields = dict(batch=7, dropout=0.0, epochs=2.0, clip=1.0)
    if method == "glagcn":
        fields = {**TINY_GLA, **fields, "reconstruct": True, "unshared_weight": 0.5,
                  "stage_one_epochs": 1.0, "reconstruct_blocks": 1}
    recipe = tiny_recipe(**fields)
    frames = 11 if method == "gridconv" else 7
    clips = data.synthesize(0, subjects=("S1",), motions=("walk",), frames=frames)
    store = FrameStore(clips, recipe.normalise, H17)
    for name in ("input", "pose_3d", "target", "root", "_sign", "_clean"):
        setattr(store, name, getattr(store, name).double())
    return train.Run(recipe, store, ".", CPU, rank=rank, world=world)


def two_epochs(run, step, batches):
    """The losses of each epoch."""
    losses = []
    for epoch in range(2):
        run.begin_epoch(epoch)
        for chunk in batches(train.epoch_order(run.recipe, len(run.store), epoch)):
            step(chunk)
        losses.append(run.losses.clone())
    return losses


def one_of_two(method, out):
    """What each process of torchrun does in the test below."""
    torch.set_default_dtype(torch.float64)
    with train.processes(CPU) as (rank, world):
        run = shared_run(method, rank, world)
        losses = two_epochs(run, run.train_step, run.batches)
        if rank == 0:
            torch.save([losses, run.model.state_dict()], out)


def shares_in_turn(method):
    """What two processes should do, by one: each half of a batch in turn."""
    run = shared_run(method)

    def batches(order):
        return train.batches(order, run.recipe.batch, 4)
    run.epoch_steps = len(batches(train.epoch_order(run.recipe, len(run.store), 0)))
    run.losses = torch.zeros(run.epoch_steps)

    def step(chunk):
        run.reach(run.step / run.epoch_steps)
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        half = (len(chunk) + 1) // 2
        gradients, total = [torch.zeros_like(p) for p in parameters], 0.0
        for share in (chunk[:half], chunk[half:]):
            loss = run.objective(share, run.stage_one) * len(share) / len(chunk)
            for whole, part in zip(gradients, torch.autograd.grad(loss, parameters)):
                whole += part
            total += loss.item()
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient
        nn.utils.clip_grad_norm_(parameters, run.recipe.clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.losses[run.step % run.epoch_steps] = total
        run.step += 1
    return run.model, two_epochs(run, step, batches)


@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_two_processes_equal_two_shares_one_after_the_other(tmp_path, method):
    out, module = tmp_path / "out.pt", Path(__file__).stem
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys, {module} as tests; tests.one_of_two(*sys.argv[1:])")
    torchrun(2, driver, method, out)
    losses, weights = torch.load(out, weights_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        model, alone = shares_in_turn(method)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(alone, losses):
        torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights[name], p.data, rtol=1e-7, atol=1e-9)


def torchrun(processes, driver, *words, check=True):
    """That many processes of a script, joined."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={processes}", driver, *words]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, launcher)], capture_output=True, text=True, cwd=HERE,
                          env=environment)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def test_torchrun_has_one_writer_and_saves_everyones_random_state(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text("""
import sys, data, train
clips = data.synthesize(0, frames=8, subjects=("S1", "S9"), motions=("walk",))
data.synthesize = lambda seed: clips
data.run(lambda: train.main(sys.argv[1:]))
""")

    def launch(processes, *words, check=True):
        options = ("--hidden", 4, "--dropout", 0.1, "--batch", 16, "--epochs", 2)
        out = ("--out", tmp_path / "run")
        words = ("gridconv-synthetic", *out, *options, *words)
        return torchrun(processes, driver, *words, check=check)
    done = launch(2)
    assert done.stdout.count("| gridconv-synthetic") == 2  # a line each of MPJPE and P-MPJPE
    state = data.read_torch(tmp_path / "run" / "last.pt")
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0][0], state["random"][1][0])
    result = data.read_json(tmp_path / "run" / "result.json")
    assert result["device"].startswith("2 x ")
    assert "2 processes there, 1 here" in launch(1, check=False).stderr
    refused_ones = launch(2, "--sync-norm", "--out", tmp_path / "b", check=False)
    assert "sync_norm: needs several processes on GPUs" in refused_ones.stderr


def test_each_process_has_the_same_weights_and_noise_of_its_own(run_folder):
    recipe = tiny_recipe()
    store = make_run(run_folder).store
    weights, noise = [], []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        run = train.Run(recipe, store, run_folder, CPU, rank=rank, world=world)
        weights.append(flat_weights(run.model))
        noise.append(torch.rand(3))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[1], noise[2])


def test_processes_agree_once_in_so_many_steps(run_folder, monkeypatch):
    """The collective calls of an epoch of two processes: by one that pretends to be two."""
    few_clips(monkeypatch)
    run = make_run(run_folder, batch=4, epochs=1.0)
    run.world, asked = 2, []
    run.train_step = lambda chunk: setattr(run, "step", run.step + 1)
    run.agreed = lambda *values: asked.append(run.step) or values
    run.save = run.check_finite = lambda: None
    monkeypatch.setattr(train, "end_epoch", lambda run, *_: run.history.append({}))
    with train.Signals() as signals:
        train.fit(run, None, signals, train.Progress(run, True))
    assert run.epoch_steps > 25
    tens = list(range(10, run.epoch_steps, 10))
    assert asked == [*tens, run.epoch_steps, run.epoch_steps]


def test_what_does_not_go_with_several_gpus_is_refused(run_folder):
    cuda, recipe = torch.device("cuda"), tiny_recipe(compile=True)
    with pytest.raises(InputError) as error:
        train.Run(recipe, [0] * 100, run_folder, cuda, world=2)
    assert_clear(error.value, ["compile", "several processes", "one GPU"])
    with pytest.raises(InputError) as error:
        train.Run(tiny_recipe(batch=7), [0] * 100, run_folder, CPU, world=4)
    assert_clear(error.value, ["batch: 7", "4 processes"])


def test_wrapping_for_several_gpus_broadcasts_no_buffers(run_folder, monkeypatch):
    options = []

    def wrapped(module, **given):
        options.append(given)
        return module
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", wrapped)
    run = make_run(run_folder)
    run.world = 2
    run.reach(0.0), run.reach(0.5)
    assert options == [{"broadcast_buffers": False}]


# ---- fast forms and compilation

@pytest.mark.parametrize("make, shape", [
    (lambda: gridconv.GridLiftingNetwork(hidden=8, dropout=0.0), (4, 17, 2)),
    (lambda: glagcn.GLAGCN(channels=8, filter_widths=(3, 3), dropout=0.0), (3, 9, 17, 2))],
    ids=["gridconv", "glagcn"])
def test_the_benchmark_compares_equal_things(make, shape):
    model = shake(make(), dtype=torch.float64)
    plain = train.by_reference(model)
    x = torch.rand(shape, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)
    changed = [layer for layer in plain.modules() if "forward" in vars(layer)]
    assert len(changed) > 4 and not any("forward" in vars(layer) for layer in model.modules())


def test_bench_prints_every_layer_and_network(monkeypatch, capsys):
    monkeypatch.setattr(train, "clock", lambda call, device, times=1: 2.0)
    train.main(["bench", "--device", "cpu"])
    told = capsys.readouterr().out
    for what in ("D-GridConv layer", "GridConv, batch 200: training step", "graph convolution",
                 "GridConv, batch 200: evaluation", "AGCN block", "T = 243: training step",
                 "T = 27: evaluation"):
        assert what in told
    assert told.count("1.00x") == 9 and "cpu" in told.lower()


def test_bench_at_full_size_times_each_way_beside_the_papers(run_folder, monkeypatch, capsys):
    few_clips(monkeypatch)
    monkeypatch.setattr(data, "H36M_FRAMES", {"train": (300,)})
    small = dict(hidden=4, blocks=1, channels=4, filter_widths=(3,), reconstruct_blocks=1, batch=4)
    names = ("gridconv-gt", "glagcn-gt-243-reconstruct")
    for name in names:
        monkeypatch.setitem(train.RECIPES, name, replace(train.RECIPES[name], **small))
    train.main(["bench", "--full-size", "--device", "cpu", "--only", ",".join(names)])
    rows = [line for line in capsys.readouterr().out.splitlines() if "float32" in line]
    assert [line.split(" | ")[0].strip("| ") for line in rows] == [names[0]] * 2 + [names[1]] * 2
    assert all(float(line.split(" | ")[3]) > 0 for line in rows)
    assert sum("the paper's form" in line for line in rows) == 2
    refused("train.py", "bench", "--full-size", "--only", "gridconv-gtt", names="gridconv-gt")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fields", [
    {"layout": "autogrids", "noise_epochs": 0.0}, {"loss": "grid"}, {**TINY_GLA, "micro_batch": 16},
    {**TINY_GLA, "reconstruct": True, "stage_one_epochs": 1.0, "reconstruct_blocks": 1}],
    ids=["gridconv", "grid", "glagcn", "reconstruction"])
def test_compiled_training_takes_the_same_steps(run_folder, fields):
    losses = []
    for compiled in (False, True):
        fields = {**fields, "epochs": 3.0, "lr": 1e-3, "dropout": 0.0, "compile": compiled}
        run = make_run(run_folder, **fields)
        for epoch in range(3):
            run.step = epoch * run.epoch_steps
            run.begin_epoch(epoch)
            for chunk in first_batches(run, 2):
                run.train_step(chunk)
            losses.append(run.losses[:2].tolist())
    assert losses[3:] == [pytest.approx(two, rel=1e-3) for two in losses[:3]]
    assert len({loss for two in losses[:3] for loss in two}) == 6


def test_only_the_model_is_compiled(run_folder, monkeypatch):
    compiled = []

    def compile(function, **options):
        compiled.append((function, options))
        return function
    monkeypatch.setattr(torch, "compile", compile)
    for loss, method in (("grid", "forward_grid"), ("mse", "forward")):
        run = make_run(run_folder, loss=loss, compile=True)
        assert compiled == [(getattr(run.model, method), {})]
        compiled.clear()
        take_steps(run)
    assert set(dict(run.objective.named_parameters())) == {
        f"model.{name}" for name, _ in run.model.named_parameters()}


BUSY = """
import os, signal, statistics, subprocess, time
import train
import torch
sequences = train.data.synthesize(0, subjects=("S1",), motions=("walk",), frames=80)
recipe = train.RECIPES["gridconv-synthetic"]
store = train.data.FrameStore(sequences, recipe.normalise, train.data.SKELETONS["h36m17"])
run = train.Run(recipe, store, ".", torch.device("cpu"))
run.begin_epoch(0)
chunk = run.batches(train.epoch_order(recipe, len(store), 0))[0]
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
times = {1: [], 2: []}
try:
    for _ in range(4):
        for threads in (2, 1):
            torch.set_num_threads(threads)
            for _ in range(2):
                started = time.perf_counter()
                run.train_step(chunk)
                times[threads].append(time.perf_counter() - started)
finally:
    for process in busy:
        process.kill()
print(statistics.median(times[2]) / statistics.median(times[1]), os.environ["GOMP_SPINCOUNT"])
"""


def test_beside_busy_processes_two_threads_are_not_much_slower_than_one(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    ratio, spins = fresh_python(BUSY, threads="2").split()
    assert float(ratio) < 3 and int(spins) < 10 ** 6


# ---- reports, ablations, the main job

def test_report_of_several_runs(small_run, run_folder):
    for seed in (0, 1):
        small_run(f"a-{seed}", name="a", seed=seed)
    small_run("b", name="b")
    table = train.write_report(run_folder)
    report = (run_folder / "report.md").read_text()
    kept = data.read_json(run_folder / "report.json")
    results = [data.read_json(run_folder / name / "result.json") for name in ("a-0", "a-1")]
    errors = [result["last"]["mpjpe"] for result in results]
    row = next(row for row in kept["rows"] if row["run"] == "a" and row["figure"] == "MPJPE")
    assert row["last epoch"] == pytest.approx(sum(errors) / 2) and row["seeds"] == "0, 1"
    assert row["spread"] == pytest.approx(abs(errors[0] - errors[1]))
    assert row["affine"] == results[0]["yardsticks"]["affine"] and row["paper"] is None
    assert f"{sum(errors) / 2:.2f}" in table and report.startswith("# Report") and table in report
    assert report.count("\n## ") == 3 and len(kept["runs"]) == 3
    for broken in ("{", "[]", "{}", '{"recipe": 3}'):
        (run_folder / "b" / "result.json").write_text(broken)
        refused("train.py", "report", run_folder, names="result.json")
    refused("train.py", "report", run_folder / "none", names="none")


def fake_result(name, seed, error, **fields):
    """A result of a published row."""
    scores = {"mpjpe": error, "p_mpjpe": error - 10, "epoch": 3, "pck": 90.0, "auc": 60.0}
    recipe = dataclasses.asdict(replace(train.RECIPES[name], seed=seed))
    return dict(recipe=recipe, data="Human3.6M", test_data="Human3.6M", compares=True, seed=seed,
                settings_changed="", last={**scores, "mpjpe": error + 1}, best=scores, seconds=60.0,
                yardsticks={"affine": 70.0}, device="cpu", precision="float32", **fields)


def test_figures_stand_beside_the_papers_only_where_they_compare():
    results = [fake_result("gridconv-gt", seed, error) for seed, error in ((0, 37.0), (1, 38.0))]
    refined = {"mpjpe": 24.8, "p_mpjpe": 20.0}
    results.append(fake_result("glagcn-gt-243-reconstruct", 0, 26.0, refined=refined))
    results.append(fake_result("gridconv-hrnet", 0, 47.9) | {"settings_changed": "epochs 3"})
    rows = {(row["run"], row["figure"]): row for row in train.summary(results)}
    row = rows["gridconv-gt", "MPJPE"]
    got = [row[key] for key in ("paper", "best epoch", "last epoch", "spread")]
    assert got == [37.1, 37.5, 38.5, 1.0]
    assert row["difference"] == pytest.approx(0.4) and row["reproduced"] is True
    row = rows["glagcn-gt-243-reconstruct", "MPJPE"]
    assert row["difference"] == pytest.approx(1.5) and row["reproduced"] is False
    refined = [row for (run, figure), row in rows.items() if "true root" in figure]
    assert len(refined) == 1 and refined[0]["best epoch"] is None
    assert refined[0]["difference"] == pytest.approx(0.3) and refined[0]["reproduced"] is True
    row = rows["gridconv-hrnet (settings changed)", "MPJPE"]
    assert row["difference"] == pytest.approx(0) and row["reproduced"] is False
    results = [{**result, "compares": False} for result in results]
    table = train.report_table(results)
    assert all(row["paper"] is None for row in train.summary(results))
    assert "37.10" not in table and "24.50" not in table


def test_the_headline_rows_come_first():
    names = ("gridconv-hrnet", "glagcn-gt-243", "gridconv-gt")
    rows = train.summary([fake_result(name, 0, 40.0) for name in names])
    order = list(dict.fromkeys(row["run"] for row in rows))
    assert order == ["gridconv-gt", "glagcn-gt-243", "gridconv-hrnet"]


@pytest.fixture
def tiny_table(monkeypatch, run_folder):
    """ablate of a table of two rows."""
    few_clips(monkeypatch, 12)
    rows = {"one": (38.1, dict(layout="random")),
            "two": (None, dict(layout="autogrids", noise_epochs=0.5))}
    monkeypatch.setitem(train.ABLATIONS, "tiny", ("gridconv-synthetic", "P1*, Table 5", rows))
    options = dict(hidden=4, blocks=1, epochs=0.5)

    def run(seeds=2, only="", **more):
        return train.ablate("tiny", "", run_folder / "t", seeds, only, {**options, **more}, "cpu")
    return run


def test_ablation_trains_every_row_for_the_same_epochs_and_continues(
        tiny_table, run_folder, monkeypatch):
    text = tiny_table()
    paths = run_folder.glob("t/*/result.json")
    results = {path.parent.name: data.read_json(path) for path in paths}
    assert set(results) == {f"{row}-seed-{seed}" for row in ("one", "two") for seed in (0, 1)}
    for name, result in results.items():
        recipe = result["recipe"]
        assert recipe["epochs"] == 0.5 and recipe["layout_seed"] == result["seed"]
        assert recipe["noise_epochs"] == (0.25 if name.startswith("two") else 0)
    errors = [results[f"one-seed-{seed}"]["last"]["mpjpe"] for seed in (0, 1)]
    assert f"{sum(errors) / 2:.2f}" in text and f"{abs(errors[0] - errors[1]):.2f}" in text
    assert "38.10" in text and f"{results['two-seed-0']['parameters']:,}" in text
    monkeypatch.setattr(train, "train", None)  # nothing is trained twice
    assert tiny_table() == text
    assert "one" not in tiny_table(only="two").split("| two")[0].split("\n\n")[1]
    with pytest.raises(InputError) as error:
        tiny_table(only="two;three")
    assert_clear(error.value, ["'three'", "one;two"])
    assert "other data" in text
    for name, result in results.items():
        train.write_text(run_folder / "t" / name / "result.json",
                         json.dumps({**result, "compares": True}))
    assert "other data" not in tiny_table()


@pytest.mark.parametrize("table", train.ABLATIONS)
def test_every_ablation_is_of_possible_recipes_of_equal_samples(table):
    base, _, rows = train.ABLATIONS[table]
    recipes = [train.ablation_recipe(train.RECIPES[base], label, 1, **fields)
               for label, (_, fields) in rows.items()]
    for recipe in recipes:
        assert train.parameters(replace(recipe, hidden=8, channels=4)) > 0
        assert (recipe.seed, recipe.layout_seed) == (1, 1)
        assert not train.paper_figures(vars(recipe))  # its base's is another row's
    assert len({(recipe.epochs, recipe.batch, recipe.flips) for recipe in recipes}) == 1


def test_ablations_quote_the_papers_and_lifters_are_of_equal_size():
    papers = {table: [paper for paper, _ in rows.values()]
              for table, (_, _, rows) in train.ABLATIONS.items()}
    assert papers["gridconv-5"] == [38.1, 37.1, 36.4, None, None]
    assert papers["gridconv-B"] == [37.1, 38.4, 37.7, 39.4]
    assert papers["gridconv-6"] == [37.1, 36.4, 35.0, 33.4]
    printed = "40.8 42.3 41.1 40.4 40.2 41.2 41.5 40.5 39.0 39.2 39.3 40.6 39.7 39.5 38.9"
    assert papers["gridconv-D"] == [float(word) for word in printed.split()]
    assert papers["gridconv-E"] == [37.1, 37.2, 37.8, 37.7]
    assert papers["glagcn-6"] == [28.0, 30.6, 27.7, 28.1, 25.8]
    rows = train.ABLATIONS["gridconv-D"][2]  # the paper writes (horizontal, vertical)
    assert rows["#3+#4"][1]["padding"] == (("replicate", "circular"), ("circular", "replicate"))
    base, _, rows = train.ABLATIONS["lifters"]
    sizes = [train.parameters(train.ablation_recipe(train.RECIPES[base], label, 0, **fields))
             for label, (_, fields) in rows.items()]
    assert len(sizes) == 4 and all(300_000 < size < 335_000 for size in sizes)


TINY_ROWS = dict(hidden=4, blocks=1, channels=4, epochs=0.02, batch=50, filter_widths=(3, 3),
                 reconstruct_blocks=1)


@pytest.fixture
def tiny_rows(monkeypatch, everything):
    """Every recipe with a tiny network; a function makes the miniatures the papers' data."""
    for name, recipe in list(train.RECIPES.items()):
        stage_one = 0.015 if recipe.reconstruct else 0.0
        recipe = replace(recipe, **TINY_ROWS, stage_one_epochs=stage_one)
        monkeypatch.setitem(train.RECIPES, name, recipe)

    def genuine():
        valid = {name: int(view["valid"].sum()) for name, view in everything[1].test_3dhp.items()}
        monkeypatch.setattr(data, "H36M_FRAMES", {"train": (600 * 5,), "test": (236 * 5, 224 * 5)})
        monkeypatch.setattr(data, "MPI3DHP_VALID", valid)
    return genuine


def plain_mpjpe(model, raw, views, skipped):
    """The protocol's MPJPE of a single-frame model, in NumPy: over frames, then over actions."""
    errors = {}
    takes = [(s, take) for s in ("S9", "S11") for take in raw.space[s] if (s, take) not in skipped]
    for subject, take in takes:
        for c in range(4):
            pixels = (views[subject][take][c][:5, :, :2] - 500) / 500
            with torch.no_grad():
                pose = model(torch.tensor(pixels, dtype=torch.float32)).double().numpy()
            world = raw.space[subject][take][:, data.H36M_17_OF_32].astype(float)
            target = data.world_to_camera(world, data.H36M_EXTRINSICS[subject][c])
            target = target - target[:, :1]
            distance = np.sqrt(((pose - target) ** 2).sum(-1)).mean(-1)
            errors.setdefault(take.split(" ")[0], []).extend(1000 * distance)
    return np.mean([np.mean(values) for values in errors.values()])


def test_main_job_by_independent_arithmetic(tiny_rows, everything, tmp_path, capsys):
    folder, raw = everything
    tiny_rows()
    only = "gridconv-hrnet-learnable,gridconv-gt"
    train.reproduce(folder, tmp_path, "cpu", only, seeds=2)
    said = capsys.readouterr().out
    for word in ("gridconv-gt-seed-1", "to run", "float32", "GiB", "cpu"):
        assert word in said
    kept = data.read_json(tmp_path / "report.json")
    report = (tmp_path / "report.md").read_text()
    skipped = {("S11", "Directions")}
    drifting = {("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}
    sequences = {"gridconv-gt": (raw.gt, skipped),
                 "gridconv-hrnet-learnable": (raw.noisy, skipped | drifting)}
    for name, (views, skipped) in sequences.items():
        measured = []
        for ending in ("", "-seed-1"):
            place = tmp_path / (name + ending)
            result = data.read_json(place / "result.json")
            assert result["data"] == result["test_data"] == "Human3.6M" and result["compares"]
            assert result["test_frames"] == 5 * (240 - 4 * len(skipped))
            for which, file in (("best", "best.pt"), ("last", "model.pt")):
                plain = plain_mpjpe(evaluation.load_model(place / file), raw, views, skipped)
                assert result[which]["mpjpe"] == pytest.approx(plain, rel=1e-4)
            measured.append(result["best"]["mpjpe"])
        row = next(row for row in kept["rows"] if row["run"] == name and row["figure"] == "MPJPE")
        mean = sum(measured) / 2
        assert row["best epoch"] == pytest.approx(mean)
        assert row["difference"] == pytest.approx(mean - row["paper"])
        assert row["reproduced"] is False
        assert f"{mean:.2f}" in report
    before = (tmp_path / "gridconv-gt" / "last.pt").stat().st_mtime_ns
    train.reproduce(folder, tmp_path, "cpu", only, seeds=2)  # nothing is done twice
    assert capsys.readouterr().out.count(" done ") == 4
    assert (tmp_path / "gridconv-gt" / "last.pt").stat().st_mtime_ns == before
    recipe, place = train.RECIPES["gridconv-gt"], tmp_path / "gridconv-gt"
    assert train.finished(recipe, folder, place)
    assert train.finished(replace(recipe, precision="bf16"), folder, place)
    assert not train.finished(replace(recipe, lr=1.0), folder, place)
    was = (folder / "data_3d_h36m.npz").stat()
    os.utime(folder / "data_3d_h36m.npz", (1, 1))  # other data, though older than the result
    assert not train.finished(recipe, folder, place)
    os.utime(folder / "data_3d_h36m.npz", ns=(was.st_atime_ns, was.st_mtime_ns))


def test_rows_of_other_datasets_and_the_refined_figure(tiny_rows, everything, tmp_path):
    folder = everything[0]
    tiny_rows()
    names = "gridconv-3dhp-cross,glagcn-3dhp-27,glagcn-humaneva-mrcnn,glagcn-gt-243-reconstruct"
    train.reproduce(folder, tmp_path, "cpu", names, options=dict(eval_every=10 ** 6))
    kept = data.read_json(tmp_path / "report.json")
    runs = {result["recipe"]["name"]: result for result in kept["runs"]}
    assert set(runs) == {*names.split(","), "gridconv-gt-learnable"}  # whose weights one takes
    keys = {title: key for key, title in evaluation.METRICS.items()}
    for name in names.split(","):
        rows = [row for row in kept["rows"] if row["run"].split(" ")[0] == name]
        assert {row["paper"] for row in rows} == set(PRINTED[name])
        for row in rows:
            figure = keys[row["figure"].split(",")[0]]
            scores = runs[name]["refined" if "true root" in row["figure"] else "last"]
            assert row["last epoch"] == pytest.approx(scores[figure])
    assert not runs["glagcn-humaneva-mrcnn"]["recipe"]["input_norm"]
    model = evaluation.load_model(tmp_path / "gridconv-gt-learnable" / "model.pt")
    store = data.make_store(train.RECIPES["gridconv-3dhp-cross"], folder, "test", CPU)
    scores = evaluation.evaluate(model, store)
    assert runs["gridconv-3dhp-cross"]["last"]["auc"] == pytest.approx(scores["auc"])
    cross = train.RECIPES["gridconv-3dhp-cross"]
    result = train.run_recipe(cross, folder, tmp_path / "gridconv-3dhp-cross", "cpu")
    assert "eval_every" in result["settings_changed"]  # of the training
    (tmp_path / "gridconv-gt-learnable" / "result.json").unlink()
    with pytest.raises(InputError, match="first: python train.py gridconv-gt-learnable"):
        train.run_recipe(cross, folder, tmp_path / "gridconv-3dhp-cross", "cpu")


def test_a_failing_row_does_not_stop_the_others(tiny_rows, everything, tmp_path, monkeypatch):
    real = train.Run.train_step

    def train_step(self, chunk):
        if self.recipe.name == "gridconv-gt":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.recipe.layout == "autogrids":
            raise RuntimeError("a fault of ours")
        real(self, chunk)
    monkeypatch.setattr(train.Run, "train_step", train_step)
    status, out, err = command("train.py", "reproduce", "--data", everything[0], "--out", tmp_path)
    assert status == 2
    assert "error: gridconv-gt: gridconv-gt: out of memory" in err and "--micro-batch" in err
    assert "a fault of ours" in err and "2 of 3 runs failed" in err.splitlines()[-1]
    kept = data.read_json(tmp_path / "report.json")
    assert [result["recipe"]["name"] for result in kept["runs"]] == ["glagcn-gt-243"]


def test_which_rows_run(everything, tmp_path):
    folder = everything[0]
    assert train.rows_to_run(folder) == list(train.HEADLINE)
    assert train.rows_to_run(tmp_path) == list(train.EMBEDDED)
    every = train.rows_to_run(folder, everything=True)
    assert every[:3] == list(train.HEADLINE) and len(set(every)) == len(every)
    assert set(PRINTED) - set(every) == set(train.ONLY_BY_NAME)
    assert every.index("gridconv-gt-learnable") < every.index("gridconv-3dhp-cross")
    assert train.rows_to_run(folder, train.ONLY_BY_NAME[0]) == list(train.ONLY_BY_NAME)
    chain = ["gridconv-gt-learnable", "gridconv-3dhp-cross"]
    assert train.rows_to_run(folder, "gridconv-3dhp-cross") == chain
    shutil.copy(folder / "data_test_3dhp.npz", tmp_path)  # alone it trains nothing
    assert train.rows_to_run(tmp_path, everything=True) == list(train.EMBEDDED)
    for only, says in (("gridconv-gt", "data_3d_h36m.npz"), ("gridconv-gtt", "gridconv-gt")):
        with pytest.raises(InputError, match=says):
            train.rows_to_run(tmp_path, only)


def test_settings_changed_names_what_differs_from_the_published_row():
    recipe = train.RECIPES["gridconv-gt"]
    assert train.settings_changed(recipe) == ""
    moved = replace(recipe, epochs=10.0, seed=3, precision="bf16", compile=True, micro_batch=9)
    assert train.settings_changed(moved) == "epochs 10.0 (published: 100.0)"
    assert train.settings_changed(tiny_recipe()) == ""


def test_list_says_what_is_here_at_once(everything, tmp_path, capsys):
    started = time.monotonic()
    train.main(["--list", "--data", str(everything[0])])
    assert time.monotonic() - started < 20
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    rows = {row[1]: row for row in cells}
    assert max(map(len, lines)) <= 120 and set(train.RECIPES) < set(rows)
    assert rows["gridconv-3dhp-cross"][3:5] == ["72.1/89.2/57.6", "yes"]
    assert rows["glagcn-gt-243-reconstruct-512"][5] == "48.64 M"
    train.main(["--list", "--data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    here = {line.split("|")[1].strip() for line in lines if "| yes" in line}
    assert here == set(train.EMBEDDED)


def test_training_beats_the_affine_yardstick(tmp_path, monkeypatch, capsys):
    whole = data.synthesize
    monkeypatch.setattr(data, "synthesize", lambda seed: whole(seed, frames=60))
    options = "--epochs 6 --hidden 16 --blocks 1 --attention= --batch 32 --lr 8e-3"
    train.main(["gridconv-synthetic", "--out", str(tmp_path / "run"), *options.split()])
    told = capsys.readouterr().out
    result = data.read_json(tmp_path / "run" / "result.json")
    yardsticks = result["yardsticks"]
    assert result["last"]["mpjpe"] < yardsticks["affine"] < yardsticks["mean_pose"]
    weights = f"{tmp_path / 'run' / 'model.pt'}"
    assert f"python eval.py {weights}" in told and f"lift KEYPOINTS --model {weights}" in told
    assert f"{result['last']['mpjpe']:.2f}" in told


def miniature_of_the_repository(folder):
    """The program's files in a folder of their own."""
    for path in [*HERE.glob("*.py"), HERE / "reproduce.sh", HERE / "requirements.txt"]:
        shutil.copy(path, folder)


def reproduce_sh(place, *words, **environment):
    """bash reproduce.sh of a copy."""
    given = {name: str(value) for name, value in environment.items()}
    ours = ("PYTHON", "DATA", "RESULTS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(["bash", place / "reproduce.sh", *words], capture_output=True, text=True,
                          cwd=place.parent, env={**kept, "OMP_NUM_THREADS": "1", **given})


def test_reproduce_sh_on_a_miniature(everything, tmp_path):
    place = tmp_path / "copy"
    place.mkdir()
    miniature_of_the_repository(place)
    paths = dict(PYTHON=sys.executable, DATA=everything[0], RESULTS=tmp_path / "results")
    tiny = "--hidden 4 --blocks 1 --channels 4 --filter-widths 3,3 --epochs 0.2 --batch 50"
    done = reproduce_sh(place, *tiny.split(), "--quick", **paths)
    assert done.returncode == 0, done.stderr
    assert all(f"{name}-quick " in done.stdout for name in train.HEADLINE)
    assert "a tenth of the epochs" in done.stdout
    report = (tmp_path / "results" / "report.md").read_text()
    assert not re.search(r"\b(37\.10?|36\.40?|28\.50?|26\.50|22\.00?)\b", report)  # the papers'
    assert "epochs 0.02 (published: 100.0)" in report
    bad = reproduce_sh(place, "--only", "gridconv-gt", **{**paths, "DATA": tmp_path})
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    assert "data_3d_h36m.npz" in bad.stderr


@pytest.mark.parametrize("layout", ["bin/python", "Scripts/python.exe"])
def test_reproduce_sh_sets_up_finds_its_python_and_bounds_spinning(tmp_path, layout):
    """With a stand-in for Python that makes a venv and says how it was called."""
    place, made = tmp_path / "copy", tmp_path / "stand-in"
    place.mkdir()
    miniature_of_the_repository(place)
    made.mkdir()
    script = f"""#!/bin/sh
if [ "$2" = venv ]; then mkdir -p .venv/$(dirname {layout}) && cp "$0" .venv/{layout}; exit; fi
echo "$0 $GOMP_SPINCOUNT $*"
"""
    for name in ("python3", "python"):
        (made / name).write_text(script)
        (made / name).chmod(0o755)
    path = f"{made}{os.pathsep}{os.environ['PATH']}"
    done = reproduce_sh(place, "--setup", PATH=path)
    assert done.returncode == 0 and "train.py" not in done.stdout
    installed, wanted = place / ".venv" / "installed.txt", place / "requirements.txt"
    assert installed.read_text() == wanted.read_text()
    done = reproduce_sh(place, "--test", "-x", PATH=path)
    assert f".venv/{layout}" in done.stdout and done.stdout.strip().endswith("-m pytest -x")
    done = reproduce_sh(place, "--quick", PATH=path, GOMP_SPINCOUNT="7")
    assert " 7 train.py reproduce --data data --out results --quick" in done.stdout
    if "GOMP_SPINCOUNT" in os.environ:
        done = reproduce_sh(place, PATH=path, GOMP_SPINCOUNT="")
        assert " 1000 train.py" in done.stdout


# ---- the command line

@pytest.mark.parametrize("words, names", [
    ("nothing", "nothing"), ("gridcnv-gt", "gridconv-gt"), ("abalte gridconv-5", "ablate"),
    ("gridconv-mocap", "data_3d_mocap.npz"), ("gridconv-gt --data nowhere", "nowhere"),
    ("gridconv-synthetic --epochs x", "--epochs"),
    ("gridconv-synthetic --padding mirror", "mirror"),
    ("gridconv-synthetic --layout spiral", "spiral"), ("glagcn-synthetic --filter-widths 3,2", "2"),
    ("glagcn-synthetic --unshared-weight 1.5", "1.5"), ("ablate table-9", "table-9"),
    ("gridconv-synthetic --out /proc/none", "/proc/none"),
    ("gridconv-synthetic --grid 4,4", "4 x 4"),
    ("gridconv-synthetic --device abacus", "abacus"), ("gridconv-synthetic --device meta", "meta"),
    ("gridconv-synthetic --out=", "--out"), ("gridconv-synthetic --data=", "--data"),
    ("gridconv-synthetic --batch 1", "batch: 1"), ("gridconv-synthetic --epochs -1", "epochs"),
    ("gridconv-synthetic --epochs nan", "epochs: nan"), ("gridconv-synthetic --loss l3", "l3"),
    ("gridconv-synthetic --schedule linear", "linear"),
    ("gridconv-synthetic --schedule 0.96/0", "0.96/0"),
    ("gridconv-synthetic --kernel-sizes 3,3,3", "kernel"), ("gridconv-synthetic --grid 5", "grid"),
    ("gridconv-synthetic --grid ²,5", "²"), ("gridconv-synthetic --skeleton robot", "robot"),
    ("gridconv-synthetic --hidden 0", "hidden: 0"), ("gridconv-synthetic --precision half", "half"),
    ("glagcn-synthetic --dropout 2", "dropout: 2"),
    ("gridconv-synthetic --flips maybe", "--flips"),
    ("gridconv-synthetic --micro-batch 1", "micro_batch: 1"),
    ("glagcn-synthetic --loss grid", "loss: 'grid'"),
    ("glagcn-synthetic --stage-one-epochs 9", "stage_one_epochs: 9"),
    ("glagcn-synthetic --causal --reconstruct --stage-one-epochs 1", "causal"),
    ("glagcn-synthetic --skeleton 3dhp17", "3dhp17"), ("gridconv-3dhp-cross --noise 5", "noise: 5"),
    ("glagcn-humaneva-gt --refine", "refine"), ("gridconv-3dhp-cross --out x", "--out x"),
    ("glagcn-synthetic --hidden 8", "--hidden"), ("gridconv-synthetic --channels 8", "--channels"),
    ("gridconv-synthetic banana", "banana"), ("gridconv-synthetic --quick", "--quick"),
    ("bench --seeds 2", "--seeds"), ("bench --hidden 8", "--hidden"), ("--list --lr 1", "--lr"),
    ("--data x", "--data"), ("ablate gridconv-5 --seeds 0", "--seeds"), ("ablate", "TABLE"),
    ("ablate gridconv-5 --layout-seed 3", "--layout-seed"), ("report --minutes 3", "--minutes"),
    ("ablate gridconv-5 --only random;shuffled", "shuffled"), ("reproduce --seed 5", "--seed"),
    ("reproduce --only gridconv-gtt", "gridconv-gt"), ("reproduce --seeds 0", "--seeds"),
    ("reproduce --frob", "--frob"), ("reproduce --hidden x", "--hidden")])
def test_bad_commands_end_in_one_line_and_status_2(tmp_path, monkeypatch, words, names):
    monkeypatch.chdir(tmp_path)
    refused("train.py", *words.split(" "), names=names)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_bad_command_from_the_shell(tmp_path):
    words = [sys.executable, str(HERE / "train.py"), "nothing"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_help_shows_each_recipes_own_settings(capsys):
    helps = {}
    for name in ("gridconv-gt", "glagcn-gt-27", "--help", "ablate", "bench", "report", "reproduce"):
        with contextlib.suppress(SystemExit):
            train.main([name] if name == "--help" else [name, "--help"])
        helps[name] = " ".join(capsys.readouterr().out.split())
    for name, words in {
            "--help": "torchrun", "ablate": "TABLE --epochs", "bench": "--full-size",
            "report": "folder", "reproduce": "--quick --all",
            "glagcn-gt-27": "[ranger] [512] --channels lambda", "gridconv-gt":
            "[adam] [200] --hidden sigmoid norm;"}.items():
        assert all(word in helps[name] for word in words.split()), name
    assert "--hidden" not in helps["glagcn-gt-27"] and "--channels" not in helps["gridconv-gt"]


@pytest.mark.parametrize("words, field, value", [
    ("--kernel-sizes 3,3:3,1", "kernel_sizes", (3, (3, 3), 1)), ("--flips", "flips", True),
    ("--padding circular,replicate:circular", "padding", ("circular", ("replicate", "circular"))),
    ("--flips true", "flips", True), ("--flips no", "flips", False), ("--lr 0.5", "lr", 0.5),
    ("--batch 7", "batch", 7), ("--dataset mocap", "data", "mocap"),
    ("--attention=", "attention", "")])
def test_options_become_recipe_fields(monkeypatch, words, field, value):
    seen = []
    monkeypatch.setattr(train, "run_recipe", lambda recipe, *rest: seen.append((recipe, rest)))
    train.main(["gridconv-gt", *words.split(), "--data", "there", "--device", "cpu"])
    recipe, (folder, out, device) = seen[0]
    assert getattr(recipe, field) == value and (folder, device) == ("there", "cpu")
    assert replace(recipe, **{field: getattr(train.RECIPES["gridconv-gt"], field)}) == \
        train.RECIPES["gridconv-gt"]


# ---- on a GPU: pytest -m gpu

GPU_METHODS = {
    "gridconv": {}, "grid loss": dict(loss="grid", layout="released"),
    "autogrids": dict(layout="autogrids"), "vanilla": dict(attention=""),
    "temporal": dict(method="gridconv-temporal", filter_widths=(3, 3), flips=True),
    "fc": dict(method="fc"), "gcn": dict(method="gcn"), "uvd": dict(target="uvd"),
    "glagcn": TINY_GLA,
    "reconstruct": {**TINY_GLA, "reconstruct": True, "stage_one_epochs": 0.004}}


@on_gpu
@pytest.mark.parametrize("name", GPU_METHODS)
def test_a_step_on_a_gpu_is_the_cpus(run_folder, name):
    fields = {**GPU_METHODS[name], "dropout": 0.0, "noise_epochs": 0.0}
    runs = []
    for device in ("cpu", "cuda"):
        picked, _ = evaluation.pick_device(device, "float32")
        run = make_run(run_folder, picked, **fields)
        losses = take_steps(run, 2)
        runs.append((losses, flat_weights(run.model)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-2, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_a_run_on_a_gpu_is_reproducible_and_resumes(run_folder, method, monkeypatch):
    few_clips(monkeypatch, 24)
    recipe = replace(noisy(method, 2.0), deterministic=True, precision="float32")

    def run(name):
        return train.train(recipe, out=run_folder / name, device="cuda", quiet=True)
    try:
        run("whole")
        assert stopped(run, "parts", monkeypatch, 3) == 143
        run("parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(run_folder / "whole", run_folder / "parts")


@on_gpu
@pytest.mark.parametrize("fields", [dict(precision="bf16"), dict(precision="tf32"),
                                    dict(micro_batch=16), dict(compile=True)], ids=str)
@pytest.mark.parametrize("base", [dict(attention=""), {**TINY_GLA, "batch": 64}],
                         ids=["gridconv", "glagcn"])
def test_every_way_of_executing_takes_nearly_the_same_steps_on_a_gpu(run_folder, base, fields):
    losses = []
    for more in (dict(precision="float32"), fields):
        device, _ = evaluation.pick_device("cuda", more.get("precision", "float32"))
        run = make_run(run_folder, device, **{**base, "dropout": 0.0, **more})
        losses.append(take_steps(run, 3))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@on_gpu
def test_a_step_on_a_gpu_waits_for_nothing(run_folder):
    for fields in GPU_METHODS.values():
        device, _ = evaluation.pick_device("cuda")
        run = make_run(run_folder, device, **fields)
        take_steps(run, 2)
        chunk = first_batches(run, 1)[0]
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.train_step(chunk)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- the README

@pytest.mark.parametrize("module", ["gridconv", "glagcn"])
def test_the_readmes_block_runs_with_that_module_alone(module, tmp_path):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)
    block, = [block for block in blocks if f"from {module} import" in block]
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)


def test_models_go_to_onnx_as_the_readme_says(tmp_path):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    import onnxruntime

    net, pose = gridconv.GridLiftingNetwork(hidden=8).eval(), torch.rand(3, 17, 2)
    torch.onnx.export(net, (pose,), tmp_path / "net.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    got, = session.run(None, {session.get_inputs()[0].name: pose.numpy()})
    assert_allclose(got, net(pose).detach().numpy(), atol=1e-5)
