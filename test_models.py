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
import warnings
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


def flip(pose, skeleton):
    """The mirror image of poses (..., J, 2|3), numpy or torch, joint by joint."""
    mirrored = pose + 0
    for joint, other in enumerate(skeleton.mirror):
        mirrored[..., joint, 0] = -pose[..., other, 0]
        mirrored[..., joint, 1:] = pose[..., other, 1:]
    return mirrored


def tiny_recipe(**fields):
    """A recipe on procedural motion that trains in a second."""
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
    lines += [f"Frames:\t{len(values)}", f"Frame{space}Time:{space}{seconds}"]
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
        prior = torch.tensor(gridconv.HANDCRAFTED_5X5).flip(1)
        one_hot = F.one_hot(prior.flatten(), 17)
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

def assert_near(got, want, near=1e-10):
    torch.testing.assert_close(got, want, rtol=near, atol=near)


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
    """Vanilla GridConv, Eq. 6, is the same with every alpha 1."""
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
            assert_near(mine, theirs)
    with torch.no_grad():  # scales in place
        assert_near(layer(x, alpha), want)
    single, x, alpha = copy.deepcopy(layer).float(), x.detach().float(), alpha.detach().float()
    x.requires_grad_(), alpha.requires_grad_()
    for form in (single, single.reference):
        for mine, theirs in zip(values_and_gradients(form(x, alpha), x, alpha, single), plain):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6
    vanilla, x = gridconv.GridConv(c_in, c_out, K, padding, grid, bias).double(), last.detach()
    vanilla.load_state_dict(layer.state_dict(), strict=False)
    want = plain_dgridconv(x, layer.weight, layer.bias, padding, torch.ones_like(alpha).double())
    for form in (vanilla, vanilla.reference):
        assert_near(form(x), want)


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


def test_a_joint_that_no_cell_holds_comes_out_0_and_can_come_back():
    S = torch.cat([torch.eye(4)[:, :3], torch.zeros(4, 1)], 1).requires_grad_()
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
    sides = [joint.split("_")[0] for joint in skeleton.joints]
    for row in layout:
        assert "left" not in [sides[joint] for joint in row[:2]]
        assert "right" not in [sides[joint] for joint in row[3:]]
        if name == "h36m17":
            assert [skeleton.mirror[joint] for joint in row] == list(reversed(row))
    released = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17)
    assert not gridconv.satisfies_topology(released, (5, 5))  # a cell holds the mean of two joints
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
    (((0, 1), (2, 17)), 4, "17"), (((0, 1), (2, -1)), 4, "-1"), (((0, 1), (2, "a")), 3, "a"),
    (((0, 1), (2, 2)), 4, r"t \[3"), (((0, 1),), 3, "3 joints"), (((0, 1), (2,)), 3, "row"),
    (((0, 1), ((0, 2), 1)), 3, r"joint \[2"), (((0, 1), (2, ())), 3, "empty")])
def test_bad_layouts_are_refused(layout, joints, says):
    with pytest.raises(ValueError, match=says):
        gridconv.assignment_matrix(layout, joints)


def small(**options):
    return gridconv.GridLiftingNetwork(**{"hidden": 8, "blocks": 1, "dropout": 0.0, **options})


def temporal(**options):
    return gridconv.TemporalGridLiftingNetwork(**{"filter_widths": (3,), "hidden": 2, **options})


@pytest.mark.parametrize("says, make", [
    ("mirror", lambda: gridconv.GridConv(2, 3, padding=("mirror",))),
    (r"padding: \(3,\)", lambda: gridconv.GridConv(2, 3, padding=(3,))),
    ("tuple", lambda: gridconv.GridConv(2, 3, padding="circular")),
    ("kernel_size: 4", lambda: gridconv.GridConv(2, 3, kernel_size=4)),
    ("2, 3, 5, 5", lambda: gridconv.GridConv(3, 3)(torch.zeros(2, 3, 5, 4))),
    ("alpha", lambda: gridconv.DynamicGridConv(2, 3)(  # in the release's order
        torch.zeros(2, 2, 5, 5), torch.ones(2, 3, 3, 5, 5))),
    ("16 cells cannot hold 17", lambda: gridconv.random_layout(17, (4, 4))),
    ("gumbel", lambda: gridconv.AutoGrids(17, (5, 5), "gumbel")),
    ("'handcrafted', .* 5 x 5", lambda: gridconv.AutoGrids(20)),
    ("averages", lambda: gridconv.AutoGrids(17, (5, 5), gridconv.RELEASED_5X5)),
    ("diagonal", lambda: gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, "diagonal")),
    ("unknown", lambda: small(attention="gird")),
    ("grid_shape", lambda: small(layout=None)),
    ("grid_shape", lambda: small(grid_shape=(4, 5))),
    ("AutoGrids of 17", lambda: small(num_joints=32, layout=gridconv.AutoGrids())),
    ("forward_grid", lambda: small(layout=None, grid_shape=(5, 5))(torch.zeros(2, 17, 2))),
    (r"filter_widths: \(3, 2\)", lambda: temporal(filter_widths=(3, 2))),
    (r"filter_widths: \(1,\)", lambda: temporal(filter_widths=(1,))),
    (r"\(B, 3, 17, 2\)", lambda: temporal()(torch.zeros(2, 9, 17, 2))),
    (r"\(2, 16, 2\).*\(B, 17, 2\)", lambda: small()(torch.zeros(2, 16, 2))),
    (r"\(0, 3\).*0\.\.2", lambda: gridconv.GraphConv(1, 1, [(0, 3)], 3))])
def test_bad_gridconv_arguments_are_refused(says, make):
    with pytest.raises(ValueError, match=says):
        make()


# ---- gridconv: AutoGrids


def test_autogrids_start_handcrafted_and_nothing_is_random_in_evaluation():
    grid, before = gridconv.AutoGrids(17, (5, 5)).eval(), torch.get_rng_state()
    handcrafted = gridconv.assignment_matrix(gridconv.HANDCRAFTED_5X5, 17)
    assert torch.equal(grid(), handcrafted) and torch.equal(grid.assignment(), handcrafted)
    assert torch.equal(before, torch.get_rng_state()) and grid.dropped() == []
    with torch.no_grad():
        grid.s_prob[10] = torch.eye(17)[0]  # joint 1's only cell
    assert grid.dropped() == [1]


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


def test_padding_modes_agree_with_torchs_own():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def compare(padding, padded):
        layer = gridconv.GridConv(3, 4, 3, padding).double()
        assert_near(layer(x), torch.conv2d(padded, layer.weight[0], layer.bias[0]))

    for mode, name in (("circular", "circular"), ("replicate", "replicate"), ("zeros", "constant")):
        compare((mode,), F.pad(x, (1, 1, 1, 1), mode=name))
    # a pair is (vertical, horizontal): repeat the rows, wrap the columns around
    wrapped = F.pad(x, (1, 1, 0, 0), mode="circular")
    compare((("replicate", "circular"),), F.pad(wrapped, (0, 0, 1, 1), mode="replicate"))


@pytest.mark.parametrize("padding", [("circular", "replicate"), ("zeros",)])
def test_a_large_batch_with_a_layers_own_attention_is_equation_8(padding):
    """A processor takes some samples at a time: values and gradients do not show it."""
    layer = shake(gridconv.DynamicGridConv(40, 24, 3, padding)).double()
    x, weights = torch.randn(220, 40, 5, 5, dtype=torch.float64), [*layer.parameters()]
    want = plain_dgridconv(x, layer.weight, layer.bias, padding, layer.attention(x))
    plain = torch.autograd.grad(want.square().sum(), weights)
    for form in (layer, layer.reference):
        assert_near(form(x), want)
        mine = torch.autograd.grad(form(x).square().sum(), weights)
        assert_near(mine, plain, 1e-9)
    with torch.no_grad():
        assert_near(layer(x), want)


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


@pytest.mark.parametrize("design", ["channel", "spatial", "spatial+channel"])
def test_figure_8_attentions_by_loops(design):
    torch.manual_seed(3)
    layer = gridconv.AttentiveGridConv(design, 3, 20).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y = gridconv.GridConv.forward(layer, x)
    ones = torch.ones(1, 5, 5, 3, 3, dtype=torch.float64)
    for b in range(2):
        z = y[b]
        if "channel" in design:
            first, _, second = layer.channel
            squeezed = torch.stack([y[b, c].mean() for c in range(20)])
            hidden = (first.weight @ squeezed + first.bias).clamp(min=0)
            z = z * (1 / (1 + torch.exp(-(second.weight @ hidden + second.bias))))[:, None, None]
        if "spatial" in design:
            maps = torch.stack([z.mean(0), z.max(0).values])[None]
            place = plain_dgridconv(
                maps, layer.spatial.weight, layer.spatial.bias, ("circular", "replicate"), ones)
            z = z / (1 + torch.exp(-place[0, 0]))
        for got in (layer(x), layer.reference(x)):
            torch.testing.assert_close(got[b], z)


# ---- gridconv: the network


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_network_sizes_of_the_papers():
    with torch.device("meta"):  # no need to fill 48 million numbers
        def network(**options):
            return size(gridconv.GridLiftingNetwork(**options))

        assert network() == 4790406 and network(layout=gridconv.AutoGrids()) == 4790831
        assert network() - network(attention=None) == 43654
        for inner, last, millions in ((3, 1), 3, 2.69), ((5, 3), 3, 9.00), ((3, 3), 1, 4.77):
            assert round(network(kernel_sizes=(3, inner, last)) / 1e6, 2) == millions  # Table E
        assert round(network(attention=None, hidden=512) / 1e6, 2) == 18.93  # Figure B
        assert size(gridconv.TemporalGridLiftingNetwork()) == 38063324  # Table C: 38.1 M
        assert size(gridconv.FullyConnectedLifter()) == 4296755
        assert size(gridconv.GraphConvLifter()) == 267718

        refinement = size(glagcn.Refinement(17))
        assert refinement == 140_322
        # GLA-GCN, Table 5 of the paper and the release: 0.84, 1.10, 1.35, 1.88 and 48.64 M
        for widths, want in (((3,) * 3, 844_076), ((3,) * 4, 1_096_466), ((3,) * 5, 1_348_856)):
            assert size(glagcn.GLAGCN(filter_widths=widths, unshared_weight=0.0)) == want
        for channels, weight, want in ((96, 0.5, 1_876_886), (512, 0.5, 48_641_526),
                                       (96, 1.0, 1_876_595), (512, 1.0, 48_639_987)):
            model = glagcn.GLAGCN(channels=channels, reconstruct=True, unshared_weight=weight)
            assert size(model) + refinement == want


def shaken(net, dtype=None):
    """The network with other weights and statistics, for evaluation, and its own assignment."""
    S = net.fixed_assignment.clone()
    shake(net, dtype=dtype).fixed_assignment = S.to(dtype)
    return net


VARIANTS = {
    "grid": small,
    "shrinks before it reads": lambda: small(hidden=16),
    "vanilla": lambda: small(attention=None),
    "figure 8": lambda: small(attention="spatial+channel"),
    "kernel sizes": lambda: small(kernel_sizes=(3, (5, 3), 1)),
    "three branches": lambda: small(padding=("zeros", "circular", ("replicate", "circular"))),
    "7 x 3": lambda: small(layout=gridconv.random_layout(17, (7, 3))),
    "32 joints": lambda: small(num_joints=32, layout=gridconv.HANDCRAFTED_7X5),
    "temporal": lambda: temporal(filter_widths=(3, 3), hidden=8, dropout=0.0),
    "temporal, learnable": lambda: temporal(layout=gridconv.AutoGrids(), hidden=8, dropout=0.0),
    "fc": lambda: gridconv.FullyConnectedLifter(hidden=16, dropout=0.0),
    "gcn": lambda: gridconv.GraphConvLifter(32, SKELETONS["h36m32"].edges, 16, dropout=0.0),
    "glagcn": lambda: glagcn.GLAGCN(filter_widths=(3, 3), channels=8, dropout=0.0),
    "table 6": lambda: glagcn.GLAGCN(filter_widths=(3, 3), channels=8, dropout=0.0, adaptive=False,
                                     temporal="mean", head="full", input_norm=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_network_trains_and_its_state_goes_out_and_back(name, tmp_path):
    torch.manual_seed(0)
    net, other = VARIANTS[name](), VARIANTS[name]()
    J, T = net.num_joints, net.receptive_field
    frames = () if T == 1 else (T,)
    pose, target = torch.rand(8, *frames, J, 2) * 2 - 1, torch.randn(8, J, 3)
    if getattr(net, "autogrids", None) is not None:
        net.autogrids.noise = False
    optimizer, losses = torch.optim.Adam(net.parameters(), 2e-3), []
    for _ in range(25):
        out = net(pose)
        loss = (out - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert out.shape == (8, J, 3) and all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] and losses[-1] < 0.85 * losses[0]
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.eval()(pose), net.eval()(pose))
    assert net(pose[:0]).shape == (0, J, 3)
    if name in ("grid", "temporal", "gcn", "glagcn"):
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(net, (pose,), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(exported(pose[:5]), net(pose[:5]))


def test_dropout_takes_whole_channels():
    torch.manual_seed(0)
    net = small(hidden=32, dropout=0.5)
    out = net.expand(torch.randn(4, 2, 5, 5) + 3)
    dead = (out == 0).flatten(2).all(2).float().mean()
    assert 0.3 < dead < 0.75


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


def test_a_training_step_takes_at_most_1000_operations():
    """Views included; on a GPU each costs a launch or the time to ask for one."""
    asked = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.append(function)
            return function(*args, **(kwargs or {}))
    net = gridconv.GridLiftingNetwork()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    pose, target = torch.randn(200, 17, 2), torch.randn(200, 17, 3)
    for _ in range(2):  # the first makes the optimiser's tensors
        asked.clear()
        with Operations():
            loss = (net(pose) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(asked) <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("padding", [("circular", "replicate"), ("circular", "zeros")])
def test_compiled_gridconv_is_the_same(padding):
    net = shaken(small(hidden=32, padding=padding)).train()
    pose, push, results = torch.randn(64, 17, 2), torch.randn(64, 17, 3), []
    for form in (net, torch.compile(net)):
        out = form(pose)
        results.append([out, *torch.autograd.grad((out * push).sum(), [*net.parameters()])])
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


def assert_golden_training(model, forward, x, loss, norms):
    """Without dropout: the loss against zeros, and the norms of the release's gradients."""
    for module in model.train().modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    found = forward(x).square().mean()
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-9, rel=1e-7)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, part, norm in norms:
        gradient = gradients[name]
        if ".embed." in name:  # of theta_0..2, phi_0..2
            gradient = gradient.unflatten(0, (6, -1))
        assert gradient[part].norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-8), (name, part)


GRIDCONV_GOLDEN = {  # kind, hidden, blocks, grid, padding, temperature, loss, output
    "cr": ("dynamic", 16, 2, (5, 5), ("circular", "replicate"), 30, 1.8616676159,
           [-0.01742218, -0.13072298, 0.6190666, -0.00849724, -0.07430863, -0.03954815]),
    "cz_t1": ("dynamic", 16, 1, (5, 5), ("circular", "zeros"), 1, 1.9871868528,
              [-0.01626298, 0.05552758, -0.3148533, -0.02102277, -0.11077761, -0.13166446]),
    "7x3": ("dynamic", 8, 1, (7, 3), ("circular", "replicate"), 1, 1.5457037943,
            [0.21441932, 0.09937502, -0.02126497, -0.22978819, -0.01752613, -0.03080709]),
    "vanilla_cz": ("vanilla", 16, 1, (5, 5), ("circular", "zeros"), 30, 10.5501018009,
                   [-0.12546289, -0.22197505, -0.06374375, -0.11219781, 0.16422292, 0.15437806]),
    "autogrids": ("autogrids", 16, 1, (5, 5), ("circular", "zeros"), 1, None,
                  [0.21198072, 0.14457081, 0.4120058, 0.21948809, 0.05146396, 0.05225643]),
}
GRIDCONV_GRADIENTS = [  # our parameter, which part of it, the norm in each case with a loss
    ("expand.conv.weight", 0, 12.333935, 3.5288608, 32.038196, 120.74863),
    ("expand.conv.attention.squeeze.weight", ..., 0.0087960872, 0.43073277, 0.0076584183, None),
    ("blocks.0.0.conv.weight", 0, 6.9817357, 2.5074448, 2.5911947, 7.182982),
    ("blocks.0.1.conv.weight", 1, 9.4080435, 3.7462195, 2.5493182, 21.375246),
    ("blocks.0.1.norm.weight", ..., 1.0155184, 0.50548184, 0.3546402, 0.96980356),
    ("blocks.0.0.conv.attention.squeeze.weight", ..., 0.020246375, 0.60659481, 2.4110055, None),
    ("blocks.0.1.conv.attention.norm.bias", ..., 0.0048795247, 0.10792266, 0.18598983, None),
    ("blocks.0.1.conv.attention.position.weight", ..., 0.018586323, 0.5447364, 0.82590152, None),
    ("blocks.1.0.conv.weight", 0, 5.7508531, None, None, None),
    ("shrink.weight", 1, None, 2.5365556, 2.0717253, 14.805056),
]
GLAGCN_GOLDEN = {  # joints, channels, modules, batch, loss, output
    "27": (17, 16, 3, 2, 0.6993974987,
           [-10.8066885, -8.2510066, 7.5096084, -10.1957667, -10.7825895, -4.4775778, -3.7133054,
            3.0228485]),
    "humaneva15_27": (15, 12, 3, 2, 0.3381037619,
                      [-3.9175804, -3.1435512, 7.3033294, -6.2355562, -4.0610088, -4.5273459,
                       -3.7161078, 8.5077393]),
    "243": (17, 8, 5, 1, None,
            [4.0855212, -0.6346984, -5.0710319, -4.5908273, 0.1831269, 2.2674893, -1.1148715,
             -3.9978118]),
}
GLAGCN_GRADIENTS = [
    ("data_norm.weight", ..., 0.19593335, 0.21401942),
    ("expand.spatial.B", ..., 0.40597872, 0.85768449),
    ("expand.spatial.embed.weight", 1, 0.0065960749, 0.0067188733),
    ("expand.spatial.embed.bias", 5, 0.0013872685, 0.0001411041),
    ("expand.spatial.shortcut.0.weight", ..., 0.062151058, 0.12201389),
    ("strided.0.first.spatial.W", np.s_[:, :, 1], 0.34881978, 0.79364402),
    ("strided.0.second.spatial.B", ..., 0.096343669, 0.1350987),
    ("strided.1.second.temporal.weight", ..., 2.031109, 0.77511895),
    ("strided.2.first.spatial.norm.weight", ..., 0.0034974868, 0.022101543),
    ("strided.2.second.spatial.embed.weight", 3, 0.0041396659, 0.0075750594),
    ("head.W_shared", ..., 5.1205778, 2.9017585),
    ("head.b_shared", ..., 0.41988953, 0.51746699),
]


@pytest.mark.parametrize("case", GRIDCONV_GOLDEN)
def test_released_gridconv_weights_give_the_releases_figures(case):
    kind, hidden, blocks, grid, padding, temperature, loss, want = GRIDCONV_GOLDEN[case]
    state = golden(released_gridconv(kind, hidden, blocks, grid))
    wrapped = {"module._orig_mod." + key: value for key, value in state.items()}
    net = gridconv.from_released(wrapped, padding, grid).eval()
    assert net.temperature == 30 and net.shrink.weight.dtype == torch.float64
    net.temperature = temperature
    poses, cells = golden_input(2, 17, 2), golden_input(2, 2, *grid)
    if case in ("cr", "cz_t1"):
        cells = gridconv.sgt(poses, net.fixed_assignment, grid)
    on_poses = case in ("cr", "cz_t1", "autogrids")
    out = (net(poses) if on_poses else net.forward_grid(cells)).flatten()
    for i, value in zip((0, 1, 5, len(out) // 2, -2, -1), want):
        assert out[i].item() == pytest.approx(value, abs=1e-7), i
    if loss:
        column = [*GRIDCONV_GOLDEN].index(case)
        norms = [(name, part, norm[column]) for name, part, *norm in GRIDCONV_GRADIENTS]
        norms = [row for row in norms if row[2] is not None]
        assert_golden_training(net, net.forward_grid, cells, loss, norms)


@pytest.mark.parametrize("case", GLAGCN_GOLDEN)
def test_released_glagcn_weights_give_the_releases_figures(case):
    joints, channels, modules, batch, loss, want = GLAGCN_GOLDEN[case]
    edges = glagcn.H36M_EDGES if joints == 17 else glagcn.HUMANEVA15_EDGES
    state = golden(released_glagcn(joints, modules, channels))
    wrapped = {"_orig_mod.module." + key: value for key, value in state.items()}
    model = glagcn.from_released(wrapped, (3,) * modules, edges).eval()
    x = golden_input(batch, 3**modules, joints, 2)
    out = model(x).flatten()
    assert out.dtype == torch.float64
    for i, value in zip((0, 1, 2, len(out) // 3, len(out) // 2, -3, -2, -1), want):
        assert out[i].item() == pytest.approx(value, abs=2e-6), i
    if loss:
        column = [*GLAGCN_GOLDEN].index(case)
        norms = [(name, part, norm[column]) for name, part, *norm in GLAGCN_GRADIENTS]
        assert_golden_training(model, model, x, loss, norms)


W1, W2 = "w1.branch1_weight", "w2.branch1_weight"
FC, SGT = "atten_conv1.fc.weight", "sgt_layer.sgt_trans_mat"


@pytest.mark.parametrize("kind, change, says", [
    ("dynamic", lambda s: None, "w1.branch1_weight"),
    ("dynamic", lambda s: {**s, "extra.weight": s[FC]}, "unexpected extra.weight"),
    ("vanilla", lambda s: {k: v for k, v in s.items() if k != "batch_norm1.bias"}, "_norm1.bias"),
    ("dynamic", lambda s: {k: v for k, v in s.items() if ".branch2" not in k}, "of 1 branches"),
    ("dynamic", lambda s: released_gridconv("dynamic", grid=(4, 4)), "position_fc.*144.*225"),
    ("dynamic", lambda s: {**s, W2: s[W2][:, :2]}, f"{W2} is .*expected"),
    ("dynamic", lambda s: {**s, W1: s[W1][:0]}, f"{W1} is"),
    ("dynamic", lambda s: {**s, W1: 3.0}, W1),
    ("dynamic", lambda s: {**s, 7: s[FC]}, "7"),
    ("autogrids", lambda s: {**s, SGT: s[SGT][0]}, f"{SGT} is")])
def test_gridconv_weights_of_something_else_are_refused(kind, change, says):
    with pytest.raises(ValueError, match=f"released GridConv.*{says}"):
        gridconv.from_released(change(released_gridconv(kind)), ("circular", "zeros"))


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
        assert_near(got[:, group], want)


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
    assert_near(net(pose), want)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_soft_argmax_by_loops(h, w, seed):
    torch.manual_seed(seed)
    heatmaps = torch.randn(2, 3, h, w, dtype=torch.float64) * 3
    got = gridconv.soft_argmax(heatmaps)
    for b, j in np.ndindex(2, 3):
        total, x, y = 0.0, 0.0, 0.0
        for r, c in np.ndindex(h, w):
            p = math.exp(heatmaps[b, j, r, c])
            total, x, y = total + p, x + p * (c + 0.5), y + p * (r + 0.5)
        want = data.normalise(np.array([x / total, y / total]), (w, h), "longest")
        assert got[b, j].tolist() == pytest.approx(want.tolist(), abs=1e-12)


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


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_graph_convolution_starts_as_the_primers_equation_1(joints, c_in, c_out, seed):
    rng = np.random.default_rng(seed)
    edges = [rng.permutation([rng.integers(joint), joint]) for joint in range(1, joints)]
    layer = gridconv.GraphConv(c_in, c_out, edges, joints).double()
    W = torch.eye(joints, dtype=torch.float64)
    for i, j in edges:
        W[i, j] = W[j, i] = 1
    D = W.sum(1)
    x = torch.randn(2, c_in, joints, dtype=torch.float64)
    theta = layer.theta.weight[..., 0]
    learnt = torch.randn(joints, joints, dtype=torch.float64)
    for scale in (torch.outer(D, D) ** -0.5, learnt):  # the first made in float32
        want = torch.zeros(2, c_out, joints, dtype=torch.float64)
        for i, j in np.ndindex(joints, joints):
            want[:, :, i] += W[i, j] * scale[i, j] * (x[:, :, j] @ theta.T)
        assert_near(layer(x), want, 1e-6)
        layer.aggregate.data.copy_(learnt)  # what stands between other joints has no effect


@pytest.mark.parametrize("make", [gridconv.FullyConnectedLifter, gridconv.GraphConvLifter])
def test_neighbours_layer_by_layer(make):
    net, full = shake(make(hidden=6), dtype=torch.float64), make is gridconv.FullyConnectedLifter
    pose = torch.randn(3, 17, 2, dtype=torch.float64)
    expand, *blocks, shrink = list(net.network)[1:-1] if full else net.network

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


# ---- glagcn: its equations and the release's network by loops


def pointwise(x, weight, bias):
    """A convolution of one tap of features (B, C, J, T)."""
    return torch.einsum("oc,bcjt->bojt", weight.flatten(1), x) + bias[:, None, None]


def plain_graph_conv(x, A, B, kernels, embedded):
    """The sum of Eq. 2 subset by subset, joint by joint; kernels: (W_k, bias) of each subset,
    embedded: (theta_k, phi_k) of x (Eq. 3), None in ST-GCN."""
    total, joints = 0, x.shape[2]
    for k in range(3):
        mixed = []
        for j in range(joints):
            graph = A[k, :, j] * B[k, :, j]
            if embedded:
                theta, phi = embedded[k]
                scores = [(theta[:, :, i] * phi[:, :, j]).sum((1, 2)) for i in range(joints)]
                scores = (torch.stack(scores, 1) / theta[0, :, 0].numel()).exp()
                graph = A[k, :, j] + B[k, :, j] + scores / scores.sum(1, keepdim=True)
            mixed.append((graph.view(-1, 1, joints, 1) * x).sum(2))
        total = total + pointwise(torch.stack(mixed, 2), *kernels[k])
    return total


def plain_agcn(state, block, x, A, stride=1, residual=True):
    """One block on features (B, C, J, T) by the release's equations, in evaluation, tap by tap.
    state: in the release's names."""
    def part(name):
        entries = ("weight", "bias", "running_mean", "running_var")
        return SimpleNamespace(eps=1e-5, **{key: state.get(f"{name}.{key}") for key in entries})

    def conv(name, y):
        return pointwise(y, part(name).weight, part(name).bias)

    def norm(name, y):
        return normalised(y, part(name))

    gcn = f"{block}.gcn1"
    embedded = [[conv(f"{gcn}.conv_{letter}.{k}", x) for letter in "ab"] for k in range(3)]
    kernels = [part(f"{gcn}.conv_d.{k}") for k in range(3)]
    kernels = [(kernel.weight, kernel.bias) for kernel in kernels]
    y = plain_graph_conv(x, A, state[f"{gcn}.PA"], kernels, embedded)
    down = x
    if f"{gcn}.down.0.weight" in state:
        down = norm(f"{gcn}.down.1", conv(f"{gcn}.down.0", x))
    y = (norm(f"{gcn}.bn", y) + down).clamp(min=0)

    T, out, taps = x.shape[3], [], part(f"{block}.tcn1.conv")
    for centre in range(0, T, stride):
        seen = [tap for tap in range(9) if 0 <= centre + tap - 4 < T]
        parts = [taps.weight[:, :, tap, 0] @ y[..., centre + tap - 4] for tap in seen]
        out.append(sum(parts) + taps.bias[:, None])
    y = norm(f"{block}.tcn1.bn", torch.stack(out, 3))
    if residual and f"{block}.residual.conv.weight" in state:
        y = y + norm(f"{block}.residual.bn", conv(f"{block}.residual.conv", x))
    elif residual:
        y = y + x
    return y.clamp(min=0)


def plain_released(state, x, edges, widths, input_norm):
    """The release's network in evaluation: poses (B, T, J, 2) -> (B, J, 3)."""
    state = {key.removeprefix("module."): value.double() for key, value in state.items()}
    J, A = x.shape[2], glagcn.spatial_partition(edges, x.shape[2])
    if input_norm:
        entries = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = [state[f"data_bn.{entry}"].view(J, 2) for entry in entries]
        x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    x = plain_agcn(state, "expand_gcn", x.permute(0, 3, 2, 1), A)
    for i, width in enumerate(widths):
        y = plain_agcn(state, f"layers_tcngcn.{2 * i}", x, A)
        y = plain_agcn(state, f"layers_tcngcn.{2 * i + 1}", y, A, width, residual=False)
        x = y + x[..., width // 2::width]
    x = pointwise(x.mean(3, keepdim=True), state["fc.weight"], state["fc.bias"])
    return x[..., 0].transpose(1, 2)


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
    assert_near(model(poses), want, 1e-9)
    if not input_norm:  # with the other list it is another model
        other = plain_released(state, poses, glagcn.HUMANEVA15_EDGES, (3, 3), False)
        assert (other - want).abs().max() > 1e-3 * want.abs().max()


GLA_FC, GLA_PA = "module.fc.weight", "module.expand_gcn.gcn1.PA"


@pytest.mark.parametrize("change, widths, says", [
    (dict, (3, 3, 3), "2 strided.*expected 3"),
    (lambda s: None, (3, 3), "lack fc.weight"),
    (lambda s: {**s, "extra.weight": torch.zeros(1)}, (3, 3), "unexpected extra.weight"),
    (lambda s: {k: v for k, v in s.items() if "bn.bias" not in k}, (3, 3), "bn.bias is missing"),
    (lambda s: {**s, GLA_FC: s[GLA_FC].expand(3, 8, 5)}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_FC: s[GLA_FC][:, :0]}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_FC: s[GLA_FC].int()}, (3, 3), "fc.weight"),
    (lambda s: {**s, GLA_PA: "x"}, (3, 3), "PA"), (lambda s: {**s, 7: s[GLA_PA]}, (3, 3), "7"),
    (lambda s: released_glagcn(15, 2), (3, 3), r"0\.\.14")])
def test_glagcn_weights_of_something_else_are_refused(change, widths, says):
    with pytest.raises(ValueError, match=says):
        glagcn.from_released(change(released_glagcn(17, 2)), widths)


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


def test_edge_lists_connect_every_joint_but_the_detected_list():
    """There 1-based (2,6) and (1,9) are missing: two limbs hang in no graph; no other may do so."""
    for edges, joints in ((glagcn.H36M_EDGES, 17), (glagcn.MPI3DHP_EDGES, 17),
                          (glagcn.HUMANEVA15_EDGES, 15), (((0, 1), (1, 2), (2, 0)), 3)):
        A = glagcn.spatial_partition(edges, joints)
        assert ((A.sum(1) - 1).abs() < 1e-12).logical_or(A.sum(1) == 0).all()
        if joints == 17:  # trees: every joint but the root has one parent
            assert len(edges) == len({child for _, child in edges}) == 16
    # the released list has links up and links down, so joint 1 is a child three times
    assert [child for _, child in glagcn.HUMANEVA15_EDGES].count(1) == 3
    kept = [edge for edge in glagcn.HUMANEVA15_EDGES if edge not in ((5, 1), (8, 0))]
    assert glagcn.HUMANEVA15_DETECTED_EDGES == tuple(kept) and len(kept) == 12
    assert glagcn.spatial_partition([list(edge) for edge in kept], 15).shape == (3, 15, 15)
    for edges in (kept[:-1], glagcn.HUMANEVA15_EDGES[:-1]):
        with pytest.raises(ValueError, match="not connected"):
            glagcn.spatial_partition(edges, 15)


def test_the_normalisation_asked_for_reaches_every_layer_to_the_last_bit():
    model = tiny_gla(4, reconstruct=True, normalisation="symmetric").half().double()
    graphs = [module.A for module in model.modules() if hasattr(module, "A")]
    want = glagcn.spatial_partition(((0, 1), (1, 2), (2, 3)), 4, "symmetric")
    assert len(graphs) == 1 + 3 + 1 + 4 and all(torch.equal(graph, want) for graph in graphs)


# ---- glagcn: adaptive graph convolution


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans(),
       st.booleans())
@settings(max_examples=25)
def test_graph_convolution_against_loops(joints, c_in, c_out, frames, adaptive, training):
    """Eq. 2 and 3 in loops over subsets and joints, both orders of W_k, values and gradients."""
    torch.manual_seed(c_in * 10 + c_out)
    A = glagcn.spatial_partition([(i, i + 1) for i in range(joints - 1)], joints)
    conv = glagcn.AdaptiveGraphConv(c_in, c_out, A, dropout=0.0, adaptive=adaptive)
    shake(conv, dtype=torch.float64).train(training)
    x = torch.randn(3, c_in, joints, frames, dtype=torch.float64, requires_grad=True)
    weights, embedded = [x, conv.B, conv.W, conv.bias], None
    if adaptive:
        weights += conv.embed.parameters()
        parts = zip(conv.embed.weight.chunk(6), conv.embed.bias.chunk(6))
        parts = [pointwise(x, *part) for part in parts]
        embedded = list(zip(parts[:3], parts[3:]))
    kernels = list(zip(conv.W.unbind(2), conv.bias))
    total = plain_graph_conv(x, A, conv.B, kernels, embedded)
    want = F.relu(copy.deepcopy(conv.norm)(total) + copy.deepcopy(conv.shortcut)(x))
    last = x.contiguous(memory_format=torch.channels_last)
    push = torch.randn_like(want)
    plain = torch.autograd.grad((want * push).sum(), weights)
    for got in (conv.reference(x), conv(x), conv(last)):
        assert_near(got, want)
        mine = torch.autograd.grad((got * push).sum(), weights)
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10)


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


@pytest.mark.parametrize("says, make", [
    (r"\(1, 3\).*0\.\.2", lambda: glagcn.spatial_partition(((0, 1), (1, 3)), 3)),
    (r"joints \[2\]", lambda: glagcn.spatial_partition(((0, 1),), 3)),
    (r"\(2, 2\)", lambda: glagcn.spatial_partition(((0, 1), (1, 2), (2, 2)), 3)),
    (r"\(1, '2'\)", lambda: glagcn.spatial_partition(((0, 1), (1, "2")), 3)),
    (r"\(1, 2, 0\)", lambda: glagcn.spatial_partition(((0, 1), (1, 2, 0)), 3)),
    ("rows.*symmetric", lambda: tiny_gla(normalisation="rows")),
    ("width 2", lambda: tiny_gla(widths=(3, 2))),
    (r"filter_widths: \(3.0,\)", lambda: tiny_gla(widths=(3.0,))),
    (r"filter_widths: \[1, 1\]", lambda: tiny_gla(widths=[1, 1])),
    ("unshared_weight nan", lambda: tiny_gla(unshared_weight=float("nan"), head="full")),
    ("channels: 0", lambda: tiny_gla(channels=0)),
    ("reconstruct_blocks: 0.5", lambda: tiny_gla(reconstruct_blocks=0.5)),
    ("'max'.*stride.*mean", lambda: tiny_gla(temporal="max")),
    ("'none'.*individual.*full", lambda: tiny_gla(head="none")),
    (r"\(9, 3, 2\).*\(batch, 9, 3, 2\)", lambda: tiny_gla()(torch.zeros(9, 3, 2))),
    ("reconstruct=True", lambda: tiny_gla()(torch.zeros(1, 9, 3, 2), return_sequence=True)),
    ("causal=False", lambda: tiny_gla(reconstruct=True, causal=True)(
        torch.zeros(1, 9, 3, 2), return_sequence=True))])
def test_bad_glagcn_arguments_are_named(says, make):
    with pytest.raises(ValueError, match=says):
        make()


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
    assert (glagcn.AdaptiveGraphConv(3, 3, conv.A, adaptive=False).B == 1).all()


def test_scheduled_norms_leave_the_changing_shortcuts_out():
    model, net = glagcn.GLAGCN(filter_widths=(3,), channels=4), temporal(filter_widths=(3, 3))
    shortcuts = {model.expand.shortcut[1], model.expand.spatial.shortcut[1]}
    for network, left in ((model, shortcuts), (net, set())):
        every = {m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert every - {*network.scheduled_norms()} == left


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_individual_layers(weight):
    head = shake(glagcn.IndividuallyConnected(5, 4, unshared_weight=weight), dtype=torch.float64)
    v = torch.randn(2, 4, 5, dtype=torch.float64)
    out = head(v)
    for b, i in np.ndindex(2, 4):
        want = 0
        if weight > 0:
            want = want + weight * (v[b, i] @ head.W[i] + head.b[i])
        if weight < 1:
            want = want + (1 - weight) * (v[b, i] @ head.W_shared + head.b_shared)
        assert (out[b, i] - want).abs().max() < 1e-12


def test_full_head_mixes_joints():
    model = glagcn.GLAGCN(filter_widths=(3,), channels=4, head="full")
    v = torch.randn(1, 17, 4, requires_grad=True)
    gradient, = torch.autograd.grad(model.head(v)[:, 2].sum(), v)
    assert (gradient != 0).all()


def test_reconstruction_and_stage_two():
    torch.manual_seed(0)
    model = glagcn.GLAGCN(filter_widths=(3, 3), channels=8, reconstruct=True)
    x, zeros = torch.randn(4, 9, 17, 2), torch.zeros(4, 17, 3)
    pose, sequence = model(x, return_sequence=True)
    assert pose.shape == (4, 17, 3) and sequence.shape == (4, 9, 17, 3)
    for coordinate in sequence.unbind(-1):  # no ReLU after the last sum
        assert coordinate.min() < -0.1 and coordinate.max() > 0.1
    whole = glagcn.mean_distance(sequence, torch.zeros_like(sequence))
    (glagcn.mean_distance(pose, zeros) + whole).backward()
    assert all(p.grad is not None for p in model.parameters())
    for name, parameter in model.sequence_head.named_parameters():
        assert "weight" not in name or parameter.grad.abs().sum() > 0
    model.zero_grad()
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


@pytest.mark.parametrize("temporal", ["stride", "mean"])
def test_causal_pose_never_depends_on_later_frames(temporal):
    torch.manual_seed(0)
    frames = torch.arange(20)[:, None] + torch.arange(9)  # of the window about every frame
    for causal in (True, False):
        model = shake(tiny_gla(causal=causal, temporal=temporal))
        video = torch.randn(20, 3, 2)
        later = video.clone()
        later[12:] += torch.randn(8, 3, 2)
        windows = (frames - (8 if causal else 4)).clamp(0, 19)
        changed = (model(video[windows]) - model(later[windows])).abs().amax((1, 2)) > 0
        assert changed[12:].all() and changed[:12].any() != causal
    x = torch.randn(1, 9, 3, 2, requires_grad=True)  # a change of the frame itself shows
    model = shake(tiny_gla(causal=True, temporal=temporal))
    assert torch.autograd.grad(model(x).sum(), x)[0][0, 8].abs().sum() > 0


def test_glagcn_under_autocast():
    model = shake(glagcn.GLAGCN(filter_widths=(3, 3), channels=8, reconstruct=True))
    x = torch.rand(2, 9, 17, 2) * 2 - 1
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x).float()
        pose, sequence = model.train()(x, return_sequence=True)
        loss = pose.float().square().mean() + sequence.float().square().mean()
    assert (rounded - want).abs().max() < 0.3 * want.abs().max()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in model.parameters())


# ---- glagcn: refinement


def test_refinement():
    torch.manual_seed(0)
    net = glagcn.Refinement(17).double().eval()
    lens = [1145, 1143.8, 512.5, 515.5, -0.2071, 0.2478, -0.0031, -0.00098, -0.00142]
    intrinsics = torch.tensor([lens] * 3, dtype=torch.float64)
    root = torch.tensor([[0.3, -0.2, 4.5]]).double().repeat(3, 1)
    pose = torch.rand(3, 17, 3, dtype=torch.float64) - 0.5
    uv = torch.from_numpy(data.project((pose + root[:, None]).numpy(), lens))
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
        for joint in range(len(s.joints)):  # every joint hangs on the root
            for _ in s.joints:
                joint = joint if s.parents[joint] < 0 else s.parents[joint]
            assert joint == s.root
        for left, right in zip(s.left, s.right, strict=True):
            assert s.joints[left].replace("left", "right") == s.joints[right] != s.joints[left]
        assert sum("left" in name or "right" in name for name in s.joints) == 2 * len(s.left)
    assert H17.joints == tuple(SKELETONS["h36m32"].joints[j] for j in data.H36M_17_OF_32)


def test_projection_golden():
    camera = (2.290598750114441, 2.287562370300293, 0.025083, 0.028902752,
              -0.2070989, 0.2477752, -0.00307515, -0.0009757, -0.00142447)
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
    for rig in (*data.H36M_EXTRINSICS.values(), *data.HUMANEVA_EXTRINSICS.values()):
        for extrinsics in rig:
            camera = data.world_to_camera(world, extrinsics)
            assert_allclose(camera, plain_camera(world, extrinsics), atol=1e-9)
            assert_allclose(data.camera_to_world(camera, extrinsics), world, atol=1e-12)
            assert camera[..., 2].min() > 0
            below = data.world_to_camera(np.array(extrinsics[4:]) - [0, 0, 1], extrinsics)
            assert below[1] > 0.9  # y is down


def test_normalise_rules():
    point = np.array([480, 120], np.float32)
    for rule, size, want in [
            ("width", (480, 640), (1, -5 / 6)),
            ("longest", (480, 640), (0.75, -0.625)),
            ("release-500", (640, 480), (-0.04, -0.76))]:
        for values in (point, torch.from_numpy(point)):
            got = data.normalise(values, size, rule)
            assert got.dtype == values.dtype
            assert_allclose(got, want, atol=1e-7)
    rejected("height", data.normalise, point, (640, 480), "height")
    other = [(1000, 1002), (2048, 2048)]
    assert data.fitting_rule("release-500", other[:1]) == "release-500"
    assert data.fitting_rule("release-500", other) == "longest"
    assert data.fitting_rule("width", other) == "width"


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
            poses, goals = flip(poses, H17), flip(goals, H17)
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
    store = FrameStore(small_sequences(), rule, H17, target="uvd")
    index = torch.tensor([8, 0, 7])
    back = store.to_camera(store.target[index], index)
    assert (back - store.pose_3d[index]).abs().max() < 5e-6
    s = store.sequences[2]
    fx, _, cx, *_ = s.intrinsics.astype(float)
    x, _, z = (s.pose_3d + s.root[:, None])[0, 5].astype(float)
    u = data.normalise(np.array([fx * x / z + cx, 0.0]), s.size, rule)[0]
    assert_allclose(store.target[8, 5, [0, 2]], [u, s.pose_3d[0, 5, 2]], atol=1e-6)
    k = store.normalised_intrinsics(index)[0].double()
    assert k[0] * x / z + k[2] == pytest.approx(u, abs=1e-6)


@pytest.mark.parametrize("change, name", [
    (dict(sequences=[]), "no sequences"),
    (dict(skeleton=SKELETONS["humaneva15"]), "humaneva15"),
    (dict(target="uvd"), "intrinsics"),
    (dict(cameras="random"), "S0 walk 0")])
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
    BVH_TINY,
    "\ufeff" + BVH_TINY.replace(" 0", "\t+0").replace("\n", "\r\n"),
    BVH_TINY.replace("ROOT", "root").replace("Frames", "FRAMES").replace("\n", "\n\n"),
    BVH_TINY.replace("{\n", "{ ").replace("\n  }", " }").replace("90", "9.0e1"),
    BVH_TINY + "7 " * 10])  # one row more than its header counts
def test_bvh_by_hand_and_odd_but_legal(text, tmp_path, capsys):
    (tmp_path / "tiny.bvh").write_bytes(text.encode())
    names, positions, fps = data.read_bvh(tmp_path / "tiny.bvh")
    assert names == ("Hips", "Chest", "Chest_end") and fps == pytest.approx(25)
    assert_allclose(positions[0], [[0, 0, 0], [0, 1.5, 0], [0.25, 2, 0]], atol=1e-12)
    # 90 degrees about z: up is -x; the Yposition of Chest replaces its OFFSET; its 90 about x
    # turns (.25, .5, 0) to (.25, 0, .5)
    assert_allclose(positions[1], [[10, 20, 30], [8, 20, 30], [8, 20.25, 30.5]], atol=1e-12)
    noted = "3 frames where its header says 2" in capsys.readouterr().out
    assert len(positions) == 2 and noted == ("7" in text)


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


CHANNELS = [axis + kind for axis in "XYZ" for kind in ("rotation", "position")]


@st.composite
def bvh_skeletons(draw, depth=0):
    places = st.lists(st.integers(-9, 9), min_size=3, max_size=3)
    channels = st.lists(st.sampled_from(CHANNELS), min_size=1, unique=True)
    below = draw(st.integers(0, 2)) if depth < 2 else 0
    children = [draw(bvh_skeletons(depth + 1)) for _ in range(below)]
    name = f"j{draw(st.integers(0, 10 ** 9))}"
    return [name, draw(places), draw(channels), children or [tuple(draw(places))]]


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


@pytest.mark.parametrize("old, new, name", [
    ("2 0 90\n", "2", "10 channels"), ("  0 2 0 90", "\n0 2 0 90", "10 channels"),
    ("10 20 30 90 0 0  0 2 0 90\n", "", "truncated"),
    (BVH_TINY[BVH_TINY.index("MOTION"):], "", "MOTION"),
    (BVH_TINY, "\x89PNG\r\n\x1a\n", "line 1"),
    ("10 20", "ten 20", "not a number"),
    ("10 20", "10 nan", "frame 1"),
    ("Frames: 2", "Frames: 1000000000000", "2 frames"),
    ("CHANNELS 4", "CHANNELS 5", "line 9")])
def test_bvh_bad_files_are_one_line(tmp_path, old, new, name):
    path = tmp_path / "bad.bvh"
    path.write_text(BVH_TINY.replace(old, new))
    rejected([path, name], data.read_bvh, path)


# ---- BVH clips to training pairs

def write_clips(folder, names=bandai_names(), z_up=False, seconds=0.05, **options):
    """Two people's clips, a.bvh and b.bvh, y up or the whole turned."""
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate("ab"):
        skeleton, values = person(names, seed, **options)
        if z_up:
            skeleton = ["World", (0, 0, 0), ["Xrotation"], [skeleton]]
            values = np.insert(values, 0, 90, axis=1)
        text = write_bvh(skeleton, values, seconds=seconds)
        (folder / f"{name}.bvh").write_text(text)


def open_benchmark_by_hand(path, rig):
    """(T, 17, 3) in a camera's frame, frame by frame, as the benchmark's description says."""
    names, raw, _ = data.read_bvh(path)
    joints = {name: raw[:, j] for j, name in enumerate(names)}
    leg = 0
    bones = "UpperLeg", "LowerLeg", "Foot"
    for side in "LR":
        hip, knee, ankle = (joints[f"{bone}_{side}"][0] for bone in bones)
        leg += (math.dist(hip, knee) + math.dist(knee, ankle)) / 2
    joints = {name: places * 0.9 / leg for name, places in joints.items()}
    joints[None] = 2 * joints["Head"] - joints["Neck"]
    order = [bandai_names().get(ours) for ours in H17.joints]  # the head: None
    pelvis = joints["Hips"] - joints["Hips"].mean(0)
    assert np.abs(pelvis)[:, 0].max() > 1.5  # the clamp has work to do
    poses = []
    for t in range(len(raw)):
        shift = [min(max(pelvis[t, k], -1.5), 1.5) - joints["Hips"][t, k] for k in (0, 2)]
        places = (joints[name][t] for name in order)
        pose = [(x + shift[0], -(z + shift[1]), y) for x, y, z in places]
        poses.append(plain_camera(np.array(pose), rig))
    return np.array(poses)


def test_the_bvh_command_follows_the_open_benchmark(bvh_folder, tmp_path):
    out = tmp_path / "out"
    with mock.patch.object(data, "OPEN_BENCHMARK", (8, 54, 14)):
        other = data.convert_bvh(bvh_folder, tmp_path, test="_old_", scale=0.01)
        words = ["bvh", bvh_folder, "--out", out, "--name", "mine", "--test", "_old_"]
        status, said, err = command("data.py", *words)
    assert status == 0 and not err
    assert "training 6 clips, 54 frames, test 2 clips, 14 frames" in said
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
    assert {(s.subject, s.action) for s in sequences} == {("Sold", "bow 001"), ("Sold", "walk 001")}
    assert data.provenance(sequences).startswith("open mocap benchmark")
    assert other.startswith("8 BVH clips")  # by another scale


def sided_names(trunk, limbs, prefix=""):
    names = dict(zip(("pelvis", "spine", "thorax", "neck"), trunk.split()))
    parts = "hip knee ankle shoulder elbow wrist collar".split()
    for part, theirs in zip(parts, limbs.split(), strict=True):
        for side in ("left", "right"):
            names[f"{side}_{part}"] = side.capitalize() + theirs
    return {ours: prefix + name for ours, name in names.items()}


def distances(pose):
    return np.linalg.norm(pose[:, :, None] - pose[:, None], axis=-1)


LIMBS = "UpLeg Leg Foot Arm ForeArm Hand Shoulder"
MAX_LIMBS = "Hip Knee Ankle Shoulder Elbow Wrist Collar"


@pytest.mark.parametrize("names, end", [
    (bandai_names(), 12),
    (sided_names("Hips Spine1 Neck1 Head", LIMBS), 12),
    (sided_names("Hips Spine1 Neck Head", LIMBS, "mixamorig:"), 12),
    (sided_names("Hips Spine1 Neck Head", LIMBS), 0),
    (sided_names("Hips Chest2 Neck Head", MAX_LIMBS), 0.01),
], ids=["bandai", "motionbuilder", "mixamo", "lafan1", "3dsmax"])
def test_bvh_conventions(names, end, tmp_path):
    write_clips(tmp_path, names, end=(0, end, 0))
    (tmp_path / "a.bvh").rename(tmp_path / "walk1_subject1.bvh")  # as LAFAN1's are named
    data.convert_bvh(tmp_path, tmp_path, "one", "^b")
    assert data.load_mocap(tmp_path, "one")[0].action == "walk1_subject1"
    found, raw, _ = data.read_bvh(tmp_path / "b.bvh")
    places = {ours: raw[:, found.index(theirs)] for ours, theirs in names.items()}
    places["head"] = raw[:, found.index(names["neck"] + "_end")]
    if "UpperLeg_L" in found or end < 1:  # Bandai's end sites mean nothing; or it is the head's
        places["head"] = 2 * places["neck"] - places["thorax"]
    theirs = distances(np.stack([places[joint] for joint in H17.joints], 1))
    ours = distances(data.load_mocap(tmp_path, "one", split="test")[0].pose_3d)
    assert_allclose(ours, theirs * (ours[0, 11, 12] / theirs[0, 11, 12]), atol=1e-4)


@pytest.mark.parametrize("joint, mapping, bones", [
    ("LowerArm_L", {}, ["left_shoulder", "left_elbow"]),
    ("nobody", {"left_knee": "LowerLeg_R"}, ["left_knee", "right_knee"])])
def test_bones_without_length_are_named(joint, mapping, bones, tmp_path):
    write_clips(tmp_path)
    path = tmp_path / "a.bvh"
    text = re.sub(rf"({joint}\s+{{\s+OFFSET) .*", r"\1 0 0 0", path.read_text())
    path.write_text(text)
    names = ["a.bvh", "length", *bones]
    rejected(names, data.convert_bvh, tmp_path, tmp_path, test="^b", mapping=mapping)


def test_several_skeletons_in_one_file_are_refused(tmp_path):
    write_clips(tmp_path)
    skeleton, values = person(bandai_names())
    scene = write_bvh(["Scene", (0, 0, 0), [], [skeleton, skeleton]], np.tile(values, 2))
    roots = scene.replace("ROOT Scene\n{\nOFFSET 0 0 0\nCHANNELS 0\n", "")
    roots = roots.replace("JOINT Hips", "ROOT Hips").replace("}\nMOTION", "MOTION")
    for text in (scene, roots):
        (tmp_path / "a.bvh").write_text(text)
        rejected(["a.bvh", "skeletons"], data.convert_bvh, tmp_path, tmp_path, test="^b")


def test_the_wrong_axis_is_noticed(tmp_path, capsys):
    write_clips(tmp_path / "y", frames=60)
    write_clips(tmp_path / "z", frames=60, z_up=True)
    poses = []
    for up, other in ("yz", "zy"):
        convert = functools.partial(data.convert_bvh, tmp_path / up, tmp_path, test="^b")
        rejected([".bvh", "head", f"--up {up}"], convert, up=other)
        convert(up=up)
        poses.append(data.load_mocap(tmp_path)[0].pose_3d)
    assert_allclose(*poses, atol=1e-5)
    (tmp_path / "z" / "a.bvh").rename(tmp_path / "y" / "crawl.bvh")
    data.convert_bvh(tmp_path / "y", tmp_path, test="^b")  # someone who really lies: a warning
    assert "crawl.bvh" in capsys.readouterr().err


def test_mapping_scale_rates_and_skipped_frames(tmp_path):
    names = {ours: f"bone{i}" for i, ours in enumerate(bandai_names())}
    clips = tmp_path / "clips"
    write_clips(clips, names, frames=13, seconds=1 / 30)  # recorded at 20
    (clips / "._a.bvh").write_bytes(b"\0\5\x16\7")  # what macOS leaves in archives
    words = ["bvh", clips, "--out", tmp_path, "--test", "^b"]
    refused("data.py", *words, names=["a.bvh", "--map"])
    mapping = {ours: name for ours, name in names.items() if ours in H17.joints}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    words += ["--map", tmp_path / "map.json", "--scale", "0.01"]
    words += ["--recorded-fps", "20", "--fps", "10", "--skip", "2"]
    assert command("data.py", *words)[0] == 0
    s = data.load_mocap(tmp_path, split="test")[2]
    assert s.fps == 10
    points = s.pose_3d + s.root[:, None].astype(float)
    world = data.camera_to_world(points, data.H36M_EXTRINSICS["S5"][2])
    found, raw, _ = data.read_bvh(clips / "b.bvh")
    pelvis, knee = (raw[2::2, found.index(names[joint])] for joint in ("pelvis", "left_knee"))
    x, y, z = 0.01 * (knee - pelvis).T
    assert_allclose(world[:, 5] - world[:, 0], np.stack((x, -z, y), 1), atol=1e-5)


@pytest.mark.parametrize("words, name", [
    ("CLIPS", "--test"),
    ("FOLDER --test a", "0 BVH files"),
    ("CLIPS --test nothing", "fits 0"),
    ("CLIPS --test old --scale 1", "--scale"),
    ("CLIPS --test old --fps -1", "--fps"),
    ("CLIPS --test old --map FOLDER/tail.json", "tail.json"),
    ("CLIPS --test old --out FOLDER/tail.json/x", "tail.json/x")])
def test_bvh_command_bad_input(words, name, bvh_folder, tmp_path):
    (tmp_path / "tail.json").write_text('{"tail": "Hips"}')
    words = words.replace("FOLDER", str(tmp_path)).replace("CLIPS", str(bvh_folder)).split()
    refused("data.py", "bvh", "--out", tmp_path / "out", *words, names=name)
    assert os.listdir(tmp_path) == ["tail.json"]


def test_mocap_files_that_disagree(bvh_folder, tmp_path):
    data.convert_bvh(bvh_folder, tmp_path, "mocap", "old")
    path = tmp_path / "data_2d_mocap_gt.npz"
    image = data.read_npz(path)
    for key, changed in (("positions_2d", np.s_[:, :-1]), ("clips", np.s_[::-1])):
        np.savez(path, **{**image, key: image[key][changed]})
        rejected([path.name, "clips"], data.load_mocap, tmp_path)


# ---- synthetic motion

def test_synthetic_motion_is_a_function_of_its_seed(synthetic):
    again = data.synthesize(0, subjects=("S1", "S5"))
    some = [s for s in synthetic if s.subject in ("S1", "S5")]
    for a, b in zip(again, some, strict=True):
        assert_array_equal(a.pose_2d, b.pose_2d)
        assert_array_equal(a.pose_3d, b.pose_3d)
    other = data.synthesize(1, subjects=1)[0]
    assert not np.array_equal(other.pose_3d, synthetic[0].pose_3d)
    # the embedded default's very numbers: weights trained on it depend on them
    head = data.synthesize(0, subjects=1, motions=("walk",), frames=3)[0].pose_3d[2, 10]
    assert_allclose(head, (0.01972253, -0.71966143, -0.15120386), atol=1e-6)


def world_of(s):
    return data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), s.extrinsics)


def test_synthetic_motion_is_anatomical_and_smooth(synthetic):
    lengths, (parents, children) = {}, np.array(H17.edges).T
    for s in synthetic:
        world = world_of(s)
        bones = distances(s.pose_3d)[:, children, parents]
        assert np.abs(bones - lengths.setdefault(s.subject, bones[0])).max() < 1e-5
        assert np.linalg.norm(np.diff(world, axis=0), axis=-1).max() * s.fps < 12  # m/s
        assert -0.1 < world[:, [3, 6], 2].min() and world[..., 2].max() < 2.6
        side = world[:, 4] - world[:, 1]  # from right to left hip
        bend = np.cross(world[:, 3] - world[:, 2], world[:, 2] - world[:, 1])
        assert ((bend * side).sum(-1) < 0.02).all(), "a knee bent forwards"
        points = (s.pose_3d + s.root[:, None])[0].astype(float)
        assert_allclose(s.pose_2d[0], data.project(points, s.intrinsics), atol=1e-2)


# ---- published datasets, on files of their layouts

@pytest.fixture
def miniature():
    """{subject: {action: world (8, 32, 3) float32}} of all 7 subjects, five actions each."""
    actions = "Walking 1", "Directions", "Directions 1", "Greeting", "Waiting 1"
    return h36m_space(np.random.default_rng(1), actions, 8)


def test_h36m_layout(miniature, tmp_path):
    def write(kind, **values):
        write_objects(tmp_path / f"data_{kind}.npz", **values)
    views = views_of(miniature)
    write("3d_h36m", positions_3d=miniature)
    projected = data.load_h36m(tmp_path)  # no file of 2D: through the cameras
    write("2d_h36m_gt", positions_2d=views, metadata=META)
    gt, wide = data.load_h36m(tmp_path), data.load_h36m(tmp_path, joints=32)
    assert len(gt) == 5 * 5 * 4 and {s.fps for s in gt} == {50}
    for a, b, c in zip(gt, projected, wide, strict=True):  # 32 joints: projected
        assert_allclose(a.pose_2d, b.pose_2d, atol=1e-3)
        assert_allclose(a.pose_2d, c.pose_2d[:, data.H36M_17_OF_32], atol=1e-3)
        assert c.pose_3d.shape == (8, 32, 3)
    write("2d_h36m_cpn", positions_2d=views)
    assert len(data.load_h36m(tmp_path, "cpn", ("S9", "S1"))) == 2 * 5 * 4
    rejected("(8, 17) in 2D, (8, 32) in 3D", data.load_h36m, tmp_path, "cpn", joints=32)
    write("2d_h36m_cpn", positions_2d=views, metadata={**META, "layout_name": "coco"})
    rejected(["data_2d_h36m_cpn.npz", "COCO"], data.load_h36m, tmp_path, "cpn")
    assert data.provenance(gt) == "files in Human3.6M layout (not Human3.6M: 800 frames)"
    write("3d_h36m", positions_3d=miniature, made_by=data.MADE_BY)
    assert "made by this project" in data.provenance(data.load_h36m(tmp_path))


@pytest.mark.parametrize("change, name", [
    (lambda views: [view[:7] for view in views], "(7, 17) in 2D"),
    (lambda views: [view[:, :16] for view in views], "(8, 16) in 2D"),
    (lambda views: [view[..., :1] for view in views], "(8, 17, 1)"),
    (lambda views: views[:3], "4 cameras")])
def test_2d_that_does_not_fit_is_named(change, name, miniature, tmp_path):
    image = views_of(miniature)
    image["S5"]["Directions"] = change(image["S5"]["Directions"])
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    write_objects(tmp_path / "data_2d_h36m_x.npz", positions_2d=image)
    rejected(["data_2d_h36m_x.npz", "S5 Directions", name], data.load_h36m, tmp_path, "x")


def test_what_a_recipe_cannot_have_is_refused(miniature, tmp_path):
    rejected(["data_3d_h36m.npz: not found", "register at"], data.load_h36m, tmp_path)
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    for fields, split, name in [
            (dict(keypoints="hrnet"), "train", "data_2d_h36m_hrnet.npz"),
            (dict(), "validation", "validation"),
            (dict(data="h37m"), "test", "h37m"),
            (dict(skeleton="coco17"), "test", "coco17")]:
        rejected(name, data.make_store, recipe_of(**fields), tmp_path, split)
    rejected("S2", data.load_h36m, tmp_path, subjects=("S2",))
    miniature["S1"]["Greeting"] = np.zeros((0, 32, 3))
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    rejected(["S1 Greeting", "no frames"], data.load_h36m, tmp_path)


def test_provenance_is_human36m_only_when_it_is():
    def sequences(frames, subject, source="files in Human3.6M layout"):
        still = np.broadcast_to(np.float32(0), (frames, 17, 3))
        return [Sequence(subject, "a", "c", still[..., :2], still, still[:, 0],
                         data.UNKNOWN_INTRINSICS, (1, 1), 50.0, source)]
    train, test = sequences(1_559_752, "S1"), sequences(543_344, "S9")
    for real in (train, test, train + test, sequences(524_892, "S11")):
        assert data.provenance(real) == data.HUMAN36M == data.GENUINE["h36m"]
    made = sequences(543_344, "S9", "files in Human3.6M layout, made by this project")
    for other in (train + made, sequences(1_559_751, "S1"), train + sequences(5, "S9")):
        assert data.provenance(other) != data.HUMAN36M


@pytest.mark.parametrize("how", ["python2", "legacy", "zip"])
def test_gridconv_archives(miniature, tmp_path, how):
    image, space = gridconv_archives(tmp_path / "gt", miniature, ("S9", "S11"), "test", how)
    test = data.load_gridconv(tmp_path / "gt", "test")
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
    eight = {**space[key], "camera": list(range(8))}
    fewer = {k: v for k, v in space.items() if k != key}
    for value in ({**space, key: eight}, {**space, key: {}}, [1], fewer):
        torch.save(value, path)
        rejected([path], data.load_gridconv, tmp_path, "test")
    space[key]["camera"] = dict.fromkeys(("fx", "fy", "cx", "cy"), np.full(8, 5.0))  # each frame
    torch.save(space, path)
    assert data.load_gridconv(tmp_path, "test")[-1].intrinsics[:4].tolist() == [5] * 4


def test_gridconvs_archives_serve_human36m_rows(miniature, tmp_path):
    for keypoints in ("gt", "hrnet"):
        for split, subjects in data.SPLITS.items():
            gridconv_archives(tmp_path / "h36m" / keypoints, miniature, subjects, split)
    gt, hrnet = recipe_of(), recipe_of(keypoints="hrnet", skip="gridconv")
    assert not data.missing_files(gt, tmp_path) and not data.missing_files(hrnet, tmp_path)
    assert data.missing_files(recipe_of(skeleton="h36m32"), tmp_path) == ["data_3d_h36m.npz"]
    # archives without their keypoints' name may be of any kind
    assert data.missing_files(gt, tmp_path / "h36m" / "hrnet")
    tested = []
    for recipe in (gt, hrnet):
        sequences = data.make_store(recipe, tmp_path, "test").sequences
        tested.append({(s.subject, s.action) for s in sequences})
    assert len(tested[0]) == 9 and ("S11", "Directions") not in tested[0]
    assert tested[0] - tested[1] == {("S9", "Greeting"), ("S9", "Waiting 1")}


@pytest.mark.parametrize("fields, sequences", [
    (dict(), (600, 236)), (dict(keypoints="hrnet", skip="gridconv"), (600, 224)),
    (dict(skeleton="h36m32"), (600, 236)),
    (dict(keypoints="cpn_ft_h36m_dbb", normalise="width"), (600, 236))])
def test_preprocessing_of_human36m_is_the_releases(fields, sequences, everything):
    folder, raw = everything
    recipe = recipe_of(**fields)
    stores = [data.make_store(recipe, folder, split) for split in ("train", "test")]
    assert tuple(len(store.sequences) for store in stores) == sequences
    tested = {(s.subject, s.action) for s in stores[1].sequences}
    skipped = {("S11", "Directions")}
    if recipe.keypoints == "hrnet":
        skipped |= {("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}
    assert not skipped & tested
    train = {s.subject for s in stores[0].sequences}
    assert train == {"S1", "S5", "S6", "S7", "S8"}
    wide = recipe.skeleton == "h36m32"
    for store in stores:
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
    for part, split in (("Train", "train"), ("Validate", "test")):
        store = data.make_store(recipe, folder, split)
        assert {s.subject for s in store.sequences} == {f"{part}/S{i}" for i in (1, 2, 3)}
    assert len(store.sequences) == 3 * 3 * 3
    assert {s.action.split(" ")[0] for s in store.sequences} == {"Walking", "Jog"}
    pixels = [raw.eva_2d[s.subject][s.action][data.HUMANEVA_CAMERAS.index(s.camera)]
              for s in store.sequences]
    assert_allclose(store.input, np.concatenate(pixels) / 640 * 2 - [1, 480 / 640], atol=1e-6)
    assert torch.isnan(store.intrinsics).all()
    s = next(s for s in store.sequences if s.action == "Jog 1 chunk2" and s.camera == "C2")
    points = plain_camera(raw.eva[s.subject][s.action], data.HUMANEVA_EXTRINSICS["S1"][1])
    assert_allclose(s.pose_3d, points - points[:, :1], atol=1e-5)
    assert s.size == (640, 480) and s.fps == 60
    coco = data.load_humaneva(folder, "detectron_pt_coco", ("Validate/S1",))[0].pose_2d
    raw_coco = raw.eva_coco["Validate/S1"]["Walking 1 chunk0"][0][..., :2]
    named = dict(zip(SKELETONS["coco17"].joints, raw_coco.swapaxes(0, 1)))
    named["pelvis"] = (named["left_hip"] + named["right_hip"]) / 2
    named["thorax"] = (named["left_shoulder"] + named["right_shoulder"]) / 2
    named["head"] = named["nose"]
    want = np.stack([named[joint] for joint in SKELETONS["humaneva15"].joints], 1)
    assert_allclose(coco, want, rtol=1e-6)


def test_3dhp_is_the_benchmarks(everything):
    folder, raw = everything
    recipe = recipe_of(data="3dhp", skeleton="3dhp17", normalise="width")
    store, views = data.make_store(recipe, folder, "test"), raw.test_3dhp
    sizes = [(2048, 2048)] * 4 + [(1920, 1080)] * 2
    assert [s.size for s in store.sequences] == sizes
    points = np.concatenate([view["data_3d"] for view in views.values()]) / 1000
    assert_allclose(store.target, points - points[:, 14:15], atol=1e-6)
    assert_allclose(store.root, points[:, 14], atol=1e-6)
    pixels = [v["data_2d"] / w * 2 - [1, h / w] for v, (w, h) in zip(views.values(), sizes)]
    pixels = np.concatenate(pixels)
    assert_allclose(store.input, pixels, atol=1e-5)
    assert_array_equal(store.valid, np.concatenate([view["valid"] for view in views.values()]) == 1)
    crossed = data.make_store(recipe_of(data="3dhp"), folder, "test")
    assert crossed.rule == "longest"  # of release-500, for images of this size
    theirs = SKELETONS["3dhp17"].joints
    names = {"neck": "head", "thorax": "neck", "head": "head_top"}
    order = [theirs.index(names.get(joint, joint)) for joint in H17.joints]
    assert_array_equal(crossed.target, store.target[:, order])
    assert_allclose(crossed.input, pixels[:, order], atol=1e-5)  # the width is the longest
    train = data.make_store(recipe, folder, "train").sequences
    assert len(train) == 16 * 8 and {s.fps for s in train} == {25}
    assert data.provenance(store.sequences) == "files in MPI-INF-3DHP layout"
    counted = {name: int(view["valid"].sum()) for name, view in views.items()}
    with mock.patch.object(data, "MPI3DHP_VALID", counted):
        assert data.provenance(store.sequences) == data.GENUINE["3dhp"]


def test_3dhp_files_that_do_not_fit_are_named(everything, tmp_path):
    view = everything[1].test_3dhp["TS1"]
    for change, name in [
            ({**view, "valid": np.ones(5)}, "5 flags"),
            ({**view, "data_3d": np.zeros((6, 51))}, "(6, 51)"),
            ({"data_2d": 1}, "layout")]:
        write_objects(tmp_path / "data_test_3dhp.npz", data={"TS1": change})
        rejected(["data_test_3dhp.npz", "TS1", name], data.load_3dhp, tmp_path, "test")
    crossed = recipe_of(data="3dhp", weights="gridconv-gt-learnable")
    assert not data.missing_files(crossed, tmp_path)  # it needs the test set alone
    assert data.missing_files(recipe_of(data="3dhp"), tmp_path) == ["data_train_3dhp.npz"]


def test_check_says_what_is_there_and_what_is_missing(miniature, tmp_path):
    refused("data.py", "check", tmp_path / "none", names="none")
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    status, out, _ = command("data.py", "check", tmp_path)
    assert status == 0 and "Human3.6M, 2D gt: allows" in out
    assert "HumanEva-I, 2D gt: not here" in out and "missing: data_3d_humaneva15.npz" in out
    assert "train: 100 sequences, 800 frames; files in Human3.6M layout (not Human3.6M" in out
    (tmp_path / "data_2d_h36m_hrnet.npz").write_bytes(b"PK")
    status, out, err = command("data.py", "check", tmp_path)
    assert status == 2 and err.count("\n") == 1 and not PYTHONS_OWN_WORDS.search(out)
    assert "2D hrnet: cannot be used; it would allow" in out and "2D gt: allows" in out


# ---- hostile and damaged files

class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("value, name", [
    (Hostile(), ".system"), (HERE, "Path"), ({"a": [np.random.RandomState(0)]}, "numpy.random")])
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
              "parameter": nn.Parameter(torch.ones(1)).detach(), **model.state_dict()}
    others = {"list": [1, 2.5, "three", None, True, (4,), {5}], "scalar": np.float64(1.5),
              "ordered": OrderedDict(a=1)}
    path = tmp_path / "a.pth"
    torch.save({**arrays, **others}, path, _use_new_zipfile_serialization=zipped)
    got = data.read_torch(path)
    assert {key: got[key] for key in others} == others
    for key, value in arrays.items():
        assert np.array_equal(got[key], value) and got[key].dtype == value.dtype
    torch.jit.script(model).save(str(path))
    rejected("TorchScript", data.read_torch, path)


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
    body = b"\x80\x02"
    for part in parts:
        named = isinstance(part, tuple)
        body += "c{}\n{}\n".format(*part).encode() if named else part
    return body + b"."


GIB4 = b"\x8a\x05" + (2 ** 32).to_bytes(5, "little")
EMPTY_ARRAY = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
               b"K\x00\x85U\x01b\x87R")
OBJECTS = (("numpy", "dtype"), b"U\x02O8\x89\x88\x87R",  # without their flags
           b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
HOSTILE_PICKLES = {
    "addresses": crafted(*EMPTY_ARRAY, b"(K\x01)", *OBJECTS, b"\x89U\x08AAAAAAAAtb"),
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


def test_what_is_no_file_or_no_json_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.json").write_text("{")
    for read in (data.read_json, data.read_npz, data.read_torch, data.read_bvh):
        for name in ("", "pipe", "none"):
            rejected("not found, or no regular file", read, tmp_path / name)
    rejected(["a.json", "not JSON"], data.read_json, tmp_path / "a.json")


def good_files(folder):
    """{name: (loads that file, whether its format has a checksum)}: small files of every format."""
    rng, files = np.random.default_rng(0), {}
    world = h36m_space(rng, ("Walking 1",), 4)
    np.savez_compressed(folder / "data_3d_h36m.npz", positions_3d=np.array(world, object))
    write_objects(folder / "data_2d_h36m_gt.npz", True, 2, positions_2d=views_of(world))
    ts1 = {**raw_3dhp(rng, 4), "valid": np.ones(4)}
    write_objects(folder / "data_test_3dhp.npz", data={"TS1": ts1})
    write_clips(folder / "clips", frames=4)
    data.convert_bvh(folder / "clips", folder, "mocap", "^b")
    for names, load, *words in [
            (["3d_h36m", "2d_h36m_gt"], data.load_h36m), (["test_3dhp"], data.load_3dhp, "test"),
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
    path = tmp_path / "new" / "a.txt"
    for text in (b"one", b"two"):
        data.write_atomically(path, lambda file: file.write(text))

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    def full(file):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, half)
    rejected([path, "No space left"], data.write_atomically, path, full)
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error, status, line", [
    (InputError("two\nlines"), 2, "error: two lines\n"),
    (KeyboardInterrupt(), 130, ""),
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
    clips.mkdir()
    for i, name in enumerate(names):
        text = write_bvh(*person(bandai_names(), seed=i))
        (clips / f"{name}.bvh").write_text(text)
    words = ["data.py", "bvh", clips, "--out", tmp_path, "--test", "_b"]
    status, out, err = command(*words, encoding="ascii")
    assert status == 0 and "\\u30af" in out and not err
    assert {s.action for s in data.load_mocap(tmp_path)} == {names[0], names[2]}
    (clips / f"{names[1]}.bvh").write_text("")
    status, _, err = command(*words, encoding="ascii")
    assert status == 2 and err.count("\n") == 1 and "\\udc" in err


@pytest.mark.parametrize("given, want", [
    ([], "1000 None"), (["GOMP_SPINCOUNT=7"], "7 None"),
    (["OMP_WAIT_POLICY=passive"], "None passive")])
def test_spinning_is_bounded_before_torch_is_imported_unless_the_user_has(given, want):
    code = "import os, sys; sys.modules['torch'] = None\n" \
           "try: import data\n" \
           "except ImportError: print(*map(os.environ.get, sys.argv[1:]))"
    names = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    words = ["env", "-u", names[0], "-u", names[1], *given, sys.executable, "-c", code, *names]
    assert subprocess.check_output(words, text=True, cwd=HERE).strip() == want


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

    def shown(draw, **options):
        store = FrameStore(clips, "longest", H17, **options)
        store.redraw(data.TEST_DRAW)
        store.redraw(draw)
        return store
    first, second, again = (shown(draw, **options) for draw in (4, 2, 4))
    clean = shown(4, cameras="random")  # the same cameras, whatever noise and gaps
    assert torch.equal(first.input, again.input) and not torch.equal(clean.input, first.input)
    for name in ("target", "intrinsics", "root"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(clean, name))
    focal = [set(store.intrinsics[:, 0].tolist()) for store in (first, second)]
    assert len(focal[0]) == len(clips) and not focal[0] & focal[1]
    how = "synthetic motion (seed 3), random cameras, noise 0.02, missing 0.3"
    assert data.provenance(first.sequences) == how
    # the numbers that models being trained see: a draw means the same in every version
    assert_allclose(first.input[7, 3], (-0.0198609, 0.4151172), atol=1e-5)


def test_swapped_sides_are_the_inputs_alone():
    plain = FrameStore(small_sequences(), "width", H17)
    swapped = FrameStore(small_sequences(), "width", H17, swap_sides=True)
    assert torch.equal(plain.target, swapped.target)
    assert torch.equal(plain.input[:, H17.left + H17.right],
                       swapped.input[:, H17.right + H17.left])


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
    recipe = recipe_of(data="synthetic", cameras="random", noise=0.01, missing=0.1)
    stores = [data.make_store(recipe, "", split) for split in ("train", "test")]
    test = data.load_dataset(recipe, "", "test")
    assert {s.subject for s in test} == {"S9", "S11"} and stores[1].rule == "longest"
    same = FrameStore(test, "longest", H17, "cpu", "camera", "random", 0.01, 0.1)
    same.redraw(1)
    assert torch.equal(same.input, stores[1].input) and data.TEST_DRAW % 2 == 1
    drawn = [set(store.intrinsics[:, 0].tolist()) for store in stores]
    assert not drawn[0] & drawn[1]


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
    errors = [sum((p[f, j, c] - t[f, j, c]) ** 2 for c in range(3)) ** 0.5 for f, j in joints]
    best = [sum((p[f] * t[f]).flatten()) / sum((p[f] ** 2).flatten()) for f in range(4)]
    scaled = [np.linalg.norm(best[f] * p[f, j] - t[f, j]) for f, j in joints]
    pairs = [(f, j) for f, j in joints if f < 3]
    speeds = [np.linalg.norm(p[f + 1, j] - p[f, j] - t[f + 1, j] + t[f, j]) for f, j in pairs]
    shares = [np.mean([1000 * error < k for error in errors]) for k in range(0, 151, 5)]
    wanted = {  # by the loops, and golden
        "mpjpe": (1000 * np.mean(errors), 442.9327),
        "p_mpjpe": (horn_p_mpjpe(p, t), 131.9719),
        "n_mpjpe": (1000 * np.mean(scaled), 391.6575),
        "mpjve": (1000 * np.mean(speeds), 507.3372),
        "pck": (100 * shares[-1], 80.0),
        "auc": (100 * np.mean(shares), 10.6452)}
    for name, (by_loops, golden) in wanted.items():
        got = getattr(evaluation, name)(torch.tensor(p), torch.tensor(t))
        assert got == pytest.approx(by_loops, abs=1e-9), name
        assert got == pytest.approx(golden, abs=1e-3), name


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


@settings(max_examples=25)
@given(st.integers(0, 10 ** 6), st.floats(0.1, 10), st.floats(-2, 2))
def test_mpjpe_moves_with_translation_and_n_mpjpe_ignores_scale(seed, scale, shift):
    p, t, _ = random_pair(seed)
    moved = t + torch.tensor([0.0, shift, 0.0])
    assert mpjpe(moved, t) == pytest.approx(1000 * abs(shift), abs=1e-4)
    assert n_mpjpe(scale * p, t) == pytest.approx(n_mpjpe(p, t), rel=1e-8)
    velocity = torch.tensor([0.01, 0.0, -0.02]) * torch.arange(4)[:, None, None]
    line, still = t[:1] + velocity, t[:1].expand(4, -1, -1)
    assert mpjve(line + shift, still) == pytest.approx(1000 * math.sqrt(5e-4), rel=1e-5)
    rejected("2 frames", mpjve, t[:1], t[:1])


@settings(max_examples=25)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_pck_and_auc_in_closed_form(millimetres):
    errors = torch.tensor(millimetres, dtype=torch.float64)
    target = torch.zeros(1, len(errors), 3, dtype=torch.float64)
    prediction = target.clone()
    prediction[0, :, 1] = errors / 1000 - 1e-9 * (errors > 0)
    # an error of m mm (a hair less) counts at the thresholds max(5 ceil(m / 5), 5) ... 150
    counted = [sum(k >= m and k > 0 for k in range(0, 151, 5)) for m in millimetres]
    assert evaluation.auc(prediction, target) == pytest.approx(100 * np.mean(counted) / 31)
    share = 100 * np.mean([m <= 150 for m in millimetres])
    assert evaluation.pck(prediction, target) == pytest.approx(share)
    exactly = torch.tensor([[[0.25, 0.0, 0.0]]], dtype=torch.float64)
    assert evaluation.pck(exactly, 0 * exactly, 250.0) == 0  # it is not below


def test_alignment_of_degenerate_poses():
    _, t, _ = random_pair(0, frames=5, joints=7)
    spread = 1000 * (t - t.mean(1, keepdim=True)).norm(dim=-1).mean().item()
    for point in (0.0, 1 / 3, 1e6):  # every joint in one place
        assert p_mpjpe(torch.full_like(t, point), t) == pytest.approx(spread, rel=1e-9)
    line = torch.arange(7.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    line = line.double().expand(5, 7, 3)
    assert p_mpjpe(-2 * line, line) == pytest.approx(0, abs=1e-6)  # a rotation turns it round
    assert n_mpjpe(t * 0, t) == mpjpe(t * 0, t)


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_metrics_refuse_bad_poses(name):
    metric, good = getattr(evaluation, name), torch.ones(3, 4, 3)
    bad_poses = {"(4, 3)": good[0], "(3, 4, 2)": good[..., :2], "(0, 4, 3)": good[:0],
                 "ndarray": good.numpy(), "differ": good[:, :2]}
    for said, bad in bad_poses.items():
        rejected(said, metric, bad, good)
    bad = good.clone()
    bad[1, 2, 0] = math.nan
    rejected(["target", "NaN"], metric, good, bad)


def test_where_the_device_has_no_float64_the_cpu_scores():
    """Apple's mps has none."""
    pose = mock.Mock(device=torch.device("mps"))
    pose.cpu.return_value = torch.ones(2)
    assert torch.equal(evaluation.exact(pose), torch.ones(2).double())


# ---- a small store

def small_sequence(subject, action, frames, valid=None, seed=0, joints=17):
    rng = np.random.default_rng(seed)
    pose_2d = rng.uniform(0, 1000, (frames, joints, 2)).astype(np.float32)
    pose_3d = rng.normal(size=(frames, joints, 3)).astype(np.float32)
    return Sequence(
        subject, action, "0", pose_2d, pose_3d, np.tile(np.float32([0, 0, 4]), (frames, 1)),
        np.float32([1000, 1000, 500, 500, 0, 0, 0, 0, 0]), (1000, 1000), 50.0, valid=valid,
        source="files in Human3.6M layout")


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
    recipe = tiny_recipe(method=method, data="h36m", layout="released", filter_widths=(3,),
                         channels=4)
    return SimpleNamespace(**{**dataclasses.asdict(recipe), **fields})


# ---- scores

def test_score_averages_over_actions_as_a_loop_does():
    store = small_store(CLIPS)
    prediction = off_by(store)
    scores, errors, at = score(prediction, store), {}, 0
    p, t = prediction.double(), store.pose_3d.double()
    for _, action, frames in CLIPS:
        for f in range(at, at + frames):
            row = [getattr(evaluation, name)(p[f:f + 1], t[f:f + 1]) for name in FRAME_METRICS]
            errors.setdefault(action.split(" ")[0], []).append(row)
        at += frames
    actions = evaluation.mean(scores["rows"], "action")
    assert set(actions) == set(errors)
    for name, rows in errors.items():
        assert actions[name]["frames"] == len(rows)
        figures = [actions[name][metric] for metric in FRAME_METRICS]
        assert figures == pytest.approx(np.mean(rows, 0), rel=1e-9)
    unweighted = np.mean([np.mean(rows, 0) for rows in errors.values()], 0)
    figures = [scores[metric] for metric in FRAME_METRICS]
    assert figures == pytest.approx(unweighted, rel=1e-9)
    pooled = evaluation.mean(scores["rows"])
    assert scores["frames"] == pooled["frames"] == 15
    assert pooled["mpjpe"] == pytest.approx(mpjpe(p, t), rel=1e-9)
    cells = evaluation.mean(scores["rows"], ("action", "subject"))
    walking = cells["Walking", "S11"]["mpjpe"]
    assert walking == pytest.approx(mpjpe(p[7:10], t[7:10]))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_velocities_are_those_within_a_sequence_in_chunks_of_any_size(chunk):
    store = small_store(CLIPS)
    p, t = off_by(store).double(), store.pose_3d.double()
    scores = score(off_by(store), store, chunk=chunk)
    velocity = [mpjve(p[a:b], t[a:b]) for a, b in ((0, 5), (5, 7), (7, 10), (10, 14))]
    rows = scores["rows"]
    assert [row["mpjve"] for row in rows[:4]] == pytest.approx(velocity)
    walking = (4 * velocity[0] + velocity[1] + 2 * velocity[2]) / 7
    actions = evaluation.mean(rows, "action")
    assert actions["Walking"]["mpjve"] == pytest.approx(walking)
    assert actions["Posing"]["mpjve"] is None  # one frame has none
    assert scores["mpjve"] == pytest.approx((walking + velocity[3]) / 2)
    whole = score(off_by(store), store)
    assert scores["mpjpe"] == pytest.approx(whole["mpjpe"], rel=1e-12)


@pytest.mark.parametrize("skeleton, left_out", [
    ("3dhp17", (14, 15, 16)), ("h36m17", (0, 7, 9))])
def test_score_of_3dhp_counts_valid_frames_and_the_benchmarks_joints(skeleton, left_out):
    flags = {"TS1": [1, 0, 1, 1], "TS2": [0, 0], "TS3": [1, 1, 0], "TS6": [0, 1]}
    clips = [(name, name, len(some), np.array(some, bool)) for name, some in flags.items()]
    store = small_store(clips, skeleton)
    prediction = off_by(store, 0.1)
    scores = score(prediction, store)
    assert prediction[:, store.skeleton.root].abs().max() > 0  # the caller's stays
    prediction[:, store.skeleton.root] = 0
    p, t = prediction.double(), store.pose_3d.double()
    rows = scores["rows"]
    got = {**evaluation.mean(rows, "subject"), "all": scores}
    index = {"TS1": [0, 2, 3], "TS6": [10], "all": [0, 2, 3, 6, 7, 10]}
    counted = [j for j in range(17) if j not in left_out]
    for name, some in index.items():
        assert got[name]["frames"] == len(some)
        for metric in ("mpjpe", "p_mpjpe", "pck", "auc"):
            joints = counted if metric in ("pck", "auc") else list(range(17))
            wanted = getattr(evaluation, metric)(p[some][:, joints], t[some][:, joints])
            assert got[name][metric] == pytest.approx(wanted, rel=1e-9)
    assert got["TS2"]["frames"] == 0 and got["TS2"]["mpjpe"] is None
    neighbours = [2, 3], [6, 7]  # both valid
    moving = [mpjve(p[some], t[some]) for some in neighbours]
    assert scores["mpjve"] == pytest.approx(np.mean(moving))


def test_each_datasets_headline_is_its_protocols_average():
    eva = [("Validate/S1", "Walking 1 chunk0", 3), ("Validate/S2", "Walking 1 chunk0", 2),
           ("Validate/S1", "Walking 1 chunk3", 4)]
    store = small_store(eva, "humaneva15")
    p, t = off_by(store).double(), store.pose_3d.double()
    parts = [0, 1, 2, 5, 6, 7, 8], [3, 4]  # all chunks of S1
    pairs = [p_mpjpe(p[some], t[some]) for some in parts]
    assert score(p, store)["p_mpjpe"] == pytest.approx(np.mean(pairs))
    store = small_store(CLIPS)
    store.sequences = [replace(s, source="motion capture") for s in store.sequences]
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
        linear = (s.pose_2d.reshape(frames, -1) / 500 - 1) @ mix
        s.pose_3d[:] = 0.1 * linear.reshape(frames, 17, 3) + 0.1 * s.pose_3d + 1
        s.valid = np.arange(frames) % 7 != 2
        return FrameStore([s], "release-500", H17)

    def error(guess):
        return 1000 * np.linalg.norm((guess - yt).reshape(-1, 17, 3), axis=-1).mean()
    stores = store(140), store(30)
    x, y, xt, yt = (part[store.valid].double().flatten(1).numpy()
                    for store in stores for part in (store.input, store.pose_3d))
    solution = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=1e-10)[0]
    got = evaluation.yardsticks(*stores, chunk=chunk)
    assert got["mean_pose"] == pytest.approx(error(y.mean(0)), rel=1e-9)
    affine = np.c_[xt, np.ones(len(xt))] @ solution
    assert got["affine"] == pytest.approx(error(affine), rel=1e-6)


# ---- predictions

class SeesItsWindow(torch.nn.Module):
    """Puts out numbers that show which window it saw, and is not symmetric under flips."""

    def __init__(self, frames, causal=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.receptive_field, self.causal = frames, causal

    def forward(self, pose):
        if self.receptive_field > 1:
            pose = (pose * torch.arange(1, pose.shape[1] + 1)[:, None, None]).sum(1)
        depth = pose[..., :1] * pose[..., 1:] + torch.arange(17)[:, None]
        return torch.cat([pose * self.weight + 0.1, depth], -1)


@pytest.mark.parametrize("frames, causal", [(1, False), (3, False), (5, True)])
@pytest.mark.parametrize("target", ["camera", "uvd"])
def test_predict_with_flips_is_the_explicit_average(frames, causal, target):
    store, model = small_store(CLIPS, target=target), SeesItsWindow(frames, causal)
    index = torch.tensor([0, 4, 5, 11, 14, 2])
    flipped = predict(model, store, flip=True, batch=4)[index]
    plain = predict(model, store)[index]
    order = list(range(17))
    for left, right in zip(H17.left, H17.right):
        order[left], order[right] = right, left
    negated = torch.tensor([-1.0, 1.0, 1.0])
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


def test_a_refined_prediction_uses_each_frames_own_root_and_camera():
    store, model = small_store(CLIPS), SeesItsWindow(3)
    refinement = glagcn.Refinement(17).train()
    got = predict(model, store, refinement=refinement, batch=4)
    modules = [model, *refinement.modules()]
    assert all(module.training for module in modules)  # left as they were
    intrinsics = store.normalised_intrinsics(torch.arange(len(store)))
    plain = predict(model, store)
    with torch.no_grad():
        wanted = refinement.eval()(plain, store.input, intrinsics, store.root)
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(got, plain)


# ---- devices

@pytest.mark.parametrize("asked", ["auto", "float32", "tf32", "bf16"])
def test_a_cpu_computes_in_float32_unless_told_otherwise(asked):
    got = "float32" if asked == "auto" else asked
    assert pick_device("cpu", asked) == (torch.device("cpu"), got)
    assert torch.backends.cudnn.allow_tf32 == (got != "float32")
    wanted = "highest" if got == "float32" else "high"
    assert torch.get_float32_matmul_precision() == wanted


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_named(name):
    rejected([f"--device {name}", "--device cpu"], pick_device, name)


def test_a_driver_that_torch_cannot_use_stops_unless_the_cpu_is_asked_for(monkeypatch):
    def available():
        said = "CUDA initialization: The NVIDIA driver on your system is too old (found 12020)"
        warnings.warn(said)  # as torch does
        return False
    monkeypatch.setattr(torch.cuda, "is_available", available)
    rejected(["12020", torch.__version__, "580", "--device cpu"], pick_device)
    assert pick_device("cpu")[0].type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device()[0].type == "cpu"


def test_an_unsupported_card_is_named_and_each_process_takes_its_own(monkeypatch):
    taken, zeros, cuda = [], torch.zeros, torch.cuda

    def too_old(size, device):
        warnings.warn("\n    Found GPU3 GTX 1080 which is of cuda capability 6.1.\n    Minimum")
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", too_old)
    rejected(["GTX 1080", "6.1", "cuda:3", "--device cpu"], pick_device)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    assert pick_device() == (torch.device("cuda:3"), "tf32")
    assert pick_device("cuda:1", "bf16") == (torch.device("cuda:1"), "bf16")
    assert [device.index for device in taken] == [3, 3, 1]


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


@pytest.mark.parametrize("fields", [
    dict(layout="handcrafted"), dict(layout="row"), dict(layout="autogrids-random"),
    dict(layout="random", grid=(7, 3), attention="", padding=("zeros",)),
    dict(method="gridconv-temporal", layout="autogrids", filter_widths=(3, 3)),
    dict(method="fc"), dict(method="gcn", skeleton="h36m32"),
    dict(method="glagcn", skeleton="humaneva15", keypoints="detectron_pt_coco",
         input_norm=False),
    dict(method="glagcn", skeleton="3dhp17", reconstruct=True, unshared_weight=0.5),
    dict(method="glagcn", causal=True, adaptive=False)], ids=str)
def test_checkpoints_give_back_the_model(fields, tmp_path):
    model = shaken_network(**{"layout_seed": 3, "temperature": 7.0, **fields})
    save_model(tmp_path / "m.pt", model, licence="CC0")
    again = load_model(tmp_path / "m.pt")
    frames = (model.receptive_field,) if model.receptive_field > 1 else ()
    x = torch.randn(2, *frames, len(SKELETONS[model.recipe.skeleton].joints), 2)
    assert torch.equal(again(x), model(x)) and not again.training
    assert not torch.equal(model(x), model(x * 2))
    model.recipe.temperature = getattr(model, "temperature", 7.0)
    assert vars(again.recipe) == {**vars(model.recipe), "crossed": False}
    about = again.epoch, again.trained_on, again.licence
    assert about == (3, "synthetic motion", "CC0")
    size = sum(p.numel() for p in model.parameters())
    assert f"{size:,} parameters" in evaluation.inspect(again)


def test_checkpoints_of_before_and_of_compiled_or_parallel_models_are_read(tmp_path):
    model = shaken_network()
    model.temperature = 4.5  # that of the epoch; the recipe's is where it started
    recipe = {**vars(model.recipe), "shown_every": 5}  # no longer a field
    for name in ("input_norm", "normalisation", "cameras", "noise", "weights"):
        del recipe[name]  # not yet one
    x = torch.randn(2, 17, 2)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        state = {prefix + name: value for name, value in model.state_dict().items()}
        save_model(tmp_path / "m.pt", model, model=state, recipe=recipe)
        again = load_model(tmp_path / "m.pt")
        assert torch.equal(again(x), model(x)) and again.temperature == 4.5
    assert again.recipe.input_norm and again.recipe.cameras == "recorded"


@pytest.mark.parametrize("name, wanted", [
    ("handcrafted", gridconv.HANDCRAFTED_5X5), ("released", gridconv.RELEASED_5X5),
    ("random", gridconv.random_layout(17, (5, 5), 2)),
    ("row", gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, "row", 2))])
def test_layouts_of_recipes(name, wanted):
    S = build_model(eval_recipe(layout=name, layout_seed=2)).assignment()
    assert torch.equal(S, gridconv.assignment_matrix(wanted, 17))


# 2^60 words in a few bytes
DOUBLED = functools.reduce(lambda part, _: [part, part], range(60), "zeros")


@pytest.mark.parametrize("said, fields", [
    ("spiral", dict(layout="spiral")), ("layout 3", dict(layout=3)),
    ("4 x 5", dict(layout="handcrafted", grid=(4, 5))), ("method None", dict(method=None)),
    ("coco17", dict(method="glagcn", skeleton="coco17")), ("nan", dict(temperature=math.nan)),
    ("fit", dict(hidden=8)), ("fit", dict(grid=(200, 200))), ("fit", dict(blocks=3000)),
    ("fit", dict(kernel_sizes=(99, (99, 99), 99))), ("padding", dict(padding=DOUBLED))])
def test_a_recipe_that_does_not_fit_its_weights_is_one_line(said, fields, tmp_path):
    model = build_model(eval_recipe(layout="random"))
    recipe = {**vars(model.recipe), **fields}
    save_model(tmp_path / "m.pt", model, recipe=recipe, temperature=None)
    rejected(["m.pt", said], load_model, tmp_path / "m.pt")


@pytest.mark.parametrize("said, content", [
    ("no checkpoint", [1, 2]), ("no checkpoint", {"model_pos": None}), ("no checkpoint", {}),
    ("w1", {"state_dict": {"conv.weight": torch.ones(2)}}),
    ("fit", {"model_pos": {"module.fc.weight": torch.ones(2)}}),
    ("fit", {"model_pos": {"expand_gcn.gcn1.PA": torch.ones(())}})])
def test_what_is_no_checkpoint_is_one_line(said, content, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    given = {"padding": ("circular",)} if "state_dict" in content else {}
    rejected(["m.pt", said], load_model, tmp_path / "m.pt", **given)


def test_damaged_and_changed_checkpoints_are_one_line(tmp_path):
    path, model = tmp_path / "m.pt", build_model(eval_recipe())
    rejected(["m.pt", "not found"], load_model, path)
    save_model(path, model)
    rejected(["hidden", "leave the option out"], load_model, path, hidden=8)
    for part in (path.read_bytes()[:2000], b"", b"not a checkpoint at all"):
        path.write_bytes(part)
        rejected("m.pt", load_model, path)
    name = "shrink.weight"
    state = {**model.state_dict(), name: model.state_dict()[name] * math.nan}
    changed = {
        "version 1": dict(version=2), "fit": dict(model={}),
        "weights and recipe": dict(recipe={"method": "gridconv"}),
        "do not fit": dict(temperature="hot"),
        "shrink.weight: NaN or infinite": dict(model=state)}
    for said, more in changed.items():
        save_model(path, model, **more)
        rejected(["m.pt", said], load_model, path)


CLAIMS = """
import sys, torch, data, eval as evaluation
from resource import *
pages = int(open("/proc/self/statm").read().split()[0])
setrlimit(RLIMIT_AS, [pages * getpagesize() + 2 ** 30] * 2)
before = getrusage(RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        evaluation.load_model(path, padding=None if "own" in path else ("zeros",) * 2)
    except data.InputError:
        print("refused")
sys.exit(getrusage(RUSAGE_SELF).ru_maxrss > before + 2 ** 17)
"""


def test_files_that_claim_more_than_they_hold_take_no_memory(tmp_path):
    """Networks of gigabytes without their weights, or with one value repeated by a stride."""
    own = {"format": "poselift", "version": 1, "data": "", "model": {}}
    for i, fields in enumerate(({"hidden": 3000}, {"hidden": 1, "blocks": 30000},
                                {"layout": "random", "grid": (2000, 2000)})):
        content = dict(own, recipe=vars(eval_recipe(**fields)))
        torch.save(content, tmp_path / f"own-{i}")
    wide = eval_recipe(hidden=3000)
    with torch.device("meta"):
        state = build_model(wide).state_dict()
    one = torch.ones(())
    repeated = {name: one.expand(value.shape) for name, value in state.items()}
    content = dict(own, recipe=vars(wide), model=repeated)
    torch.save(content, tmp_path / "own-repeated")
    state = released_gridconv("vanilla", 4, 2)
    for branch in ("donut", "tablet"):
        state[f"w1.{branch}_conv.weight"] = torch.zeros(3000, 2, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "released-wide")
    words = [sys.executable, "-c", CLAIMS, *map(str, tmp_path.iterdir())]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused") == 5


# ---- the releases' files

@pytest.mark.parametrize("kind", ["dynamic", "vanilla", "autogrids"])
def test_gridconvs_released_files_are_read(kind, tmp_path):
    state, path = released_gridconv(kind, blocks=2), tmp_path / "best.pth.tar"
    save_released(path, state)
    rejected("--padding", load_model, path)
    model, x = load_model(path, padding=["circular", "zeros"]), torch.randn(3, 17, 2)
    wanted = gridconv.from_released(state, ("circular", "zeros")).eval()
    assert torch.equal(model(x), wanted(x)) and not torch.equal(model(x), model(x * 2))
    recipe, learnt = model.recipe, kind == "autogrids"
    assert (recipe.normalise, model.temperature) == ("release-500", 30.0)
    assert recipe.layout == ("autogrids" if learnt else "released")
    assert recipe.keypoints == ("gt" if kind == "vanilla" else "hrnet")
    assert model.trained_on == "Human3.6M" and not recipe.crossed
    assert ("not known" in evaluation.inspect(model)) == learnt
    other = load_model(path, padding=("circular", "zeros"), keypoints="cpn_ft_h36m_dbb")
    assert other.recipe.keypoints == "cpn_ft_h36m_dbb" and other.recipe.crossed


DETECTRON = "detectron_pt_coco"


@pytest.mark.parametrize("joints, skeleton, keypoints, home, edges", [
    (17, "h36m17", None, "h36m", glagcn.H36M_EDGES),
    (17, "3dhp17", None, "3dhp", glagcn.MPI3DHP_EDGES),
    (15, None, "gt", "humaneva", glagcn.HUMANEVA15_EDGES),
    (15, None, DETECTRON, "humaneva", glagcn.HUMANEVA15_DETECTED_EDGES)])
def test_glagcns_released_files_are_read(joints, skeleton, keypoints, home, edges, tmp_path):
    state, path = released_glagcn(joints, 2), tmp_path / "best_epoch.bin"
    save_released(path, state)
    unsaid = "--skeleton" if joints == 17 else "--keypoints gt or detectron_pt_coco"
    rejected(unsaid, load_model, path, filter_widths=(3, 3))
    given = dict(skeleton=skeleton, keypoints=keypoints)
    other = "humaneva15" if joints == 17 else "h36m17"
    rejected("joint", load_model, path, filter_widths=(3, 3), skeleton=other, keypoints="gt")
    norm = keypoints != DETECTRON  # twelve links, no norm of the input
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = glagcn.from_released(bare, filter_widths=(3, 3), edges=edges, input_norm=norm)
    model = load_model(path, filter_widths=[3, 3], **given)
    x = torch.randn(2, 9, joints, 2)
    assert torch.equal(model(x), wanted.eval()(x)) and model.receptive_field == 9
    assert (model.recipe.normalise, model.recipe.input_norm) == ("width", norm)
    assert model.recipe.data == home
    if skeleton == "h36m17":
        words = ("--filter-widths", "3,3", "--skeleton", skeleton)
        refused("eval.py", path, *words, names=["2D poses", "--keypoints"])


# ---- whether a figure compares, and tables

HUMAN, EVA_FILES = "Human3.6M", "files in HumanEva-I layout"
TRAIN_3DHP, TEST_3DHP = "files in MPI-INF-3DHP layout", "MPI-INF-3DHP test set"
EVA = dict(name="glagcn-humaneva-mrcnn", data="humaneva", keypoints=DETECTRON)
CROSSED = dict(name="gridconv-3dhp-cross", data="3dhp", weights="gridconv-gt-learnable")


@pytest.mark.parametrize("fields, tested, trained, wanted", [
    (dict(), HUMAN, HUMAN, True),
    (dict(), "synthetic motion", HUMAN, False),
    (dict(crossed=True), HUMAN, HUMAN, False),
    (dict(keypoints="hrnet"), HUMAN, HUMAN, False),
    (EVA, EVA_FILES, EVA_FILES, True),
    (EVA, EVA_FILES + ", made by this project", EVA_FILES, False),
    (dict(name="glagcn-3dhp-27", data="3dhp"), TEST_3DHP, TRAIN_3DHP, True),
    (CROSSED, TEST_3DHP, HUMAN, True),
    (CROSSED, TEST_3DHP, "motion capture", False)])
def test_figures_compare_only_where_data_and_2d_are_the_rows(fields, tested, trained, wanted):
    recipe = eval_recipe(**{"name": "gridconv-gt", **fields})
    assert evaluation.compares(recipe, tested, trained) is wanted


def one_score(value, frames=10, **more):
    """A sequence's row of scores."""
    return dict(more, frames=frames, pairs=0, mpjpe=value, p_mpjpe=value - 10,
                n_mpjpe=value - 1, mpjve=None)


def result_of(recipe, rows, compares=True, test_data="Human3.6M", kind="h36m", **more):
    """A result with these rows of scores, as train.py and eval.py make it."""
    last = {**evaluation.headline(rows, kind), "rows": rows, "epoch": 7}
    return dict(more, recipe=vars(recipe), data="Human3.6M", test_data=test_data,
                compares=compares, last=last)


def table_rows(text):
    """The cells of every table line of a markdown text, by first cell."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_report_puts_the_papers_figures_beside_measured_ones():
    rows = [one_score(50.0, subject="S9", action=action) for action in evaluation.ACTIONS]
    recipe = eval_recipe(name="gridconv-hrnet-learnable", row="Table 1 and A")
    text = report(result_of(recipe, rows))
    table = table_rows(text)
    titles = ["frames", "MPJPE", "MPJPE, paper", "P-MPJPE", "P-MPJPE, paper"]
    assert table["action"][:5] == titles
    sitting = ["10", "50.00", "63.90", "40.00", "52.50", "49.00", "-"]
    assert table["SittingDown"] == sitting
    average = ["150", "50.00", "47.60", "40.00", "37.40", "49.00", "-"]
    assert table["average over actions"] == average
    assert table["S9"][:2] == ["150", "50.00"]
    assert "Table 1 and A" in text and "not Human3.6M" not in text
    other = report(result_of(recipe, rows, False, "synthetic motion"))
    assert "not Human3.6M" in other and "synthetic motion" in other
    crossed = report(result_of(recipe, rows, False))
    assert "do not compare" in crossed
    assert not any(figure in other + crossed for figure in ("paper |", "47.60"))


def test_report_says_what_was_run_and_labels_best_and_last():
    def scores(value, epoch):
        rows = [one_score(value, 40, subject="S9", action="Walking")]
        return {**evaluation.headline(rows, "h36m"), "rows": rows, "epoch": epoch}
    more = dict(seed=2, commit="abc1234", device="NVIDIA H100", epochs=80.0, seconds=90.0,
                settings_changed="lr 1", best=scores(41.0, 5),
                yardsticks={"mean_pose": 173.31, "affine": 69.9},
                autogrids={"cells_changed": 4, "dropped": [3], "layout": []})
    text = report(result_of(eval_recipe(), scores(44.0, 7)["rows"], **more))
    for fact in ("seed 2", "abc1234", "NVIDIA H100", "epochs: 80", "minutes: 1.5", "lr 1",
                 "cells changed: 4", "dropped: [3]", "40 test frames", "173.31", "69.90"):
        assert fact in text, fact
    _, best, final = text.split("### ")
    assert "(5)" in best and "41.00" in best
    assert "(7)" in final and "44.00" in final


def test_report_of_humaneva_by_action_and_subject_and_of_3dhp_by_sequence():
    pairs = [(action, i) for action in ("Walking", "Jog") for i in (1, 2, 3)]
    rows = [one_score(20.0 * len(action) + i, subject=f"Validate/S{i}", action=action)
            for action, i in pairs for chunk in range(2)]
    recipe = eval_recipe(name="glagcn-humaneva-gt", data="humaneva", paper_p_mpjpe=9.2)
    text = report(result_of(recipe, rows, kind="humaneva", test_data=EVA_FILES))
    table = table_rows(text)
    assert table["action and subject"][3] == "P-MPJPE, paper"
    assert table["Jog S2"][:4] == ["20", "62.00", "52.00", "8.20"]
    assert table["average over both"][:4] == ["120", "102.00", "92.00", "9.20"]
    rows = [one_score(60.0, subject=f"TS{i}", action=f"TS{i}", pck=90.0 + i, auc=50.0)
            for i in range(1, 7)]
    recipe = eval_recipe(data="3dhp", paper_mpjpe=31.36, paper_pck=98.19)
    text = report(result_of(recipe, rows, kind="", test_data=TEST_3DHP))
    table = table_rows(text)
    assert table["TS2"][3] == "92.00"
    whole = ["60", "60.00", "31.36", "93.50", "98.19", "50.00"]
    assert table["all frames"][:6] == whole


def test_printed_rows_average_to_their_printed_average():
    for name, metrics in evaluation.PAPER.items():
        for row in metrics.values():
            assert len(row) == (7 if "humaneva" in name else 16)
            assert np.mean(row[:-1]) == pytest.approx(row[-1], abs=0.1), name


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


# ---- the command line

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
    model = shaken_network(name="gridconv-gt", paper_mpjpe=37.1)
    save_model(tmp_path / "m.pt", model, data="Human3.6M")
    figures = tmp_path / "deep" / "figures.json"
    words = ("eval.py", tmp_path / "m.pt", "--data", folder, "--json", figures)
    status, text, _ = command(*words)
    kept, errors = json.loads(figures.read_text()), plain_h36m(model, raw)
    table = table_rows(text)
    assert status == 0 and "without flips" in text
    for name, values in errors.items():
        assert float(table[name][1]) == pytest.approx(values.mean(), abs=0.01)
    average = np.mean([values.mean() for values in errors.values()])
    assert kept["last"]["mpjpe"] == pytest.approx(average, rel=1e-4)
    pooled = np.concatenate(list(errors.values())).mean()
    assert f"this model {pooled:.2f} mm" in text
    assert f"{kept['yardsticks']['affine']:.2f} mm" in text
    assert "not Human3.6M" in text and "37.10" not in text  # a miniature is none
    _, text, _ = command(*words, "--flip")
    flipped = json.loads(figures.read_text())["last"]["mpjpe"]
    assert "with flips" in text and flipped != kept["last"]["mpjpe"]
    monkeypatch.setattr(data, "provenance", lambda sequences: "Human3.6M")
    assert "37.10" in command(*words)[1]
    _, text, _ = command(*words, "--keypoints", "hrnet")
    assert "37.10" not in text and "do not compare" in text  # other 2D than was trained on
    model.recipe.cameras = "random"  # another dataset is seen through its own
    save_model(tmp_path / "m.pt", model)
    command(*words, "--dataset", "h36m")
    assert json.loads(figures.read_text())["last"]["mpjpe"] == kept["last"]["mpjpe"]


def test_a_release_is_evaluated_on_another_dataset(everything, tmp_path):
    path, raw, errors = tmp_path / "best.pth.tar", everything[1], {}
    save_released(path, released_gridconv("dynamic"))
    shutil.copy(everything[0] / "data_test_3dhp.npz", tmp_path)
    words = (path, "--padding", "circular,zeros", "--data", tmp_path, "--dataset")
    status, text, err = command("eval.py", *words, "3dhp")
    assert status == 0 and "no yardsticks" in err and "yardstick" not in text
    model = load_model(path, padding=("circular", "zeros"))
    order = [14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4]
    for name, view in raw.test_3dhp.items():
        w, h = (1920, 1080) if name in ("TS5", "TS6") else (2048, 2048)
        pixels = (view["data_2d"][:, order] - [w / 2, h / 2]) / (max(w, h) / 2)
        with torch.no_grad():
            pose = 1000 * model(torch.tensor(pixels).float()).numpy()
        pose[:, 0] = 0
        target = (view["data_3d"] - view["data_3d"][:, 14:15])[:, order]
        errors[name] = np.linalg.norm(pose - target, axis=-1)[view["valid"] == 1]
    counted = [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    groups = {"TS2": ["TS2"], "all frames": list(errors)}
    for name, parts in groups.items():
        some = np.concatenate([errors[part] for part in parts])
        shares = [100 * np.mean(some[:, counted] < k) for k in range(0, 151, 5)]
        wanted = [len(some), some.mean(), shares[-1], np.mean(shares)]
        cells = [float(cell) for cell in table_rows(text)[name][:4]]
        assert cells == pytest.approx(wanted, abs=0.01)
    assert "not Human3.6M" in text and "paper |" not in text
    refused("eval.py", *words, "humaneva", names=["h36m17", "humaneva15"])


@pytest.mark.parametrize("words, names", [
    ("lfit clip.json", ["unknown command 'lfit'", "lift"]),
    ("", ["checkpoint"]), ("inspect nowhere.pt", ["nowhere.pt", "not found"]),
    ("m.pt --filter-widths 3,x", ["--filter-widths"]), ("m.pt --data nowhere", ["nowhere"]),
    ("m.pt --keypoints psychic", ["psychic"]),
    ("m.pt --cameras random --dataset h36m --keypoints hrnet", ["hrnet 2D", "--cameras recorded"]),
    ("m.pt --cameras random --dataset 3dhp", ["random cameras"])])
def test_bad_commands_of_eval_end_in_one_line(words, names, everything, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(Path("m.pt"), build_model(eval_recipe()))
    words = words.split()
    if "m.pt" in words[:1]:
        words[1:1] = ["--data", everything[0]]
    refused("eval.py", *words, names=names)


# ---- a drawn person and the layouts that detectors write

SIZE = (1280, 720)
COCO_JOINTS = SKELETONS["coco17"].joints
# COCO's joint at each place of OpenPose's two layouts and of MediaPipe's; -1: none
BODY_25 = [0, -1, 6, 8, 10, 5, 7, 9, -1, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
BODY_25 += [-1] * 6
COCO_18 = [0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
MEDIAPIPE = [0, -1, 1, -1, -1, 2, -1, 3, 4, -1, -1, *range(5, 11), *[-1] * 6,
             *range(11, 17), *[-1] * 4]
MARK = "x", "y", "z", "visibility"
KP_CSV = ",".join(f"{part}_{k}" for k in range(33) for part in MARK)


def kp_body(frames=12, seed=0, size=SIZE):
    """COCO-17 keypoints (T, 17, 3) of a body of 300 pixels that sways, in eighths of a pixel."""
    place = dict(nose=(0, -140), eye=(8, -150), ear=(16, -145), shoulder=(40, -110),
                 elbow=(55, -50), wrist=(60, 5), hip=(25, 0), knee=(28, 75),
                 ankle=(30, 150))
    sign = {"left": 1, "right": -1}
    body = []
    for side, _, part in (name.rpartition("_") for name in COCO_JOINTS):
        x, y = place[part]
        body.append((sign.get(side, 0) * x, y))
    rng, time = np.random.default_rng(seed), np.arange(frames)[:, None, None]
    sway = 20 * np.sin(time / 5 + rng.uniform(0, 6, (17, 2)))
    moved = body + np.array(size) / 2 + sway + time
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
    rows, scores = points[:, :2].tolist(), points[:, 2].tolist()
    return dict(more, keypoints=rows, keypoint_scores=scores, bbox=[[0, 0, 9, 9]])


def kp_label(points, *rest):
    """A line of ultralytics' save_txt."""
    values = (0, 0.5, 0.5, 1, 1, *(points / (*SIZE, 1)).flatten().tolist(), *rest)
    return " ".join(map(str, values)) + "\n"


def kp_openpose(layout, body):
    """What OpenPose writes of each frame."""
    people = [dict(person_id=[-1], pose_keypoints_2d=points.flatten().tolist())
              for points in kp_as(layout, body)]
    return [dict(people=[person]) for person in people]


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


def kp_annotations(body):
    """COCO annotations of a body's images, which are numbered from 70 down."""
    images = [dict(id=70 - t, width=1280, height=720, file_name=f"a/{t:06d}.jpg")
              for t in range(len(body))]
    no_person = dict(image_id=70, category_id=18, bbox=[0, 0, 1, 1])
    entries = kp_named(kp_list(body), range(70, 0, -1))
    return dict(images=images[::-1], annotations=[no_person, *entries])


def kp_formats(body):
    """{format: {file's name: content}}: a person as each detector writes them."""
    names = [f"clip2_{t:03d}.jpg" for t in range(len(body))]
    flat = body.reshape(len(body), -1).tolist()
    bodies = [dict(bodies=[dict(joints=points)]) for points in flat]
    mmpose = [kp_instance(points, track_id=7) for points in body]
    video = [dict(frame_id=t + 1, instances=[one]) for t, one in enumerate(mmpose)]
    axes = [dict(zip(("x", "y", "visible"), points.T.tolist())) for points in body]
    yolo = [[dict(box=dict(x1=0), keypoints=points)] for points in axes]
    marks = np.insert(kp_as(MEDIAPIPE, body) / (*SIZE, 1), 2, -0.1, axis=-1)
    parts = [[dict(zip(MARK, mark)) for mark in one] for one in marks.tolist()]
    lines = [",".join(map(str, one.flatten().tolist())) for one in marks]
    whole = {
        "coco": kp_list(body),
        "annotations": kp_annotations(body),
        "alphapose": kp_named(kp_list(body, idx=[7.0]), names),
        "alphapose open": dict(zip(names, bodies)),
        "alphapose people": dict(zip(names, kp_openpose(COCO_18, body))),
        "mmpose video": dict(meta_info={}, instance_info=video),
        "mmpose list": video,
        "ultralytics": [[dict(person, track_id=1)] for person, in yolo],
        "mediapipe": [dict(frame=t, landmarks=one) for t, one in enumerate(parts)],
        "mediapipe tasks": [dict(pose_landmarks=[one]) for one in parts]}
    of_images = {
        "mmpose images": ("{:06d}.json", [[one] for one in mmpose]),
        "mmpose infos": ("r_{}.json", [dict(instance_info=[one]) for one in mmpose]),
        "openpose": ("v_{:012d}_keypoints.json", kp_openpose(BODY_25, body)),
        "ultralytics images": ("im{}.json", yolo),
        "labels": ("v_{}.txt", [kp_label(points) for points in body]),
        "labels, number": ("v_{}.txt", [kp_label(points, 0.5, 7) for points in body])}
    folders = {kind: {pattern.format(t): content for t, content in enumerate(contents)}
               for kind, (pattern, contents) in of_images.items()}
    folders["openpose"][".DS_Store"] = b"\0"
    return {
        **{kind: {"k.json": content} for kind, content in whole.items()},
        **folders,
        "mediapipe csv": {"k.csv": "\n".join([KP_CSV, *lines, ""])},
        "mediapipe array": {"k.npy": marks},
        "array": {"k.npy": body},
        "named array": {"k.npz": dict(other=body[:3], keypoints=body)},
        "array, scores": {"k.npz": dict(keypoints=body[..., :2], scores=body[..., 2])},
        "stack": {"k.npy": np.stack((np.zeros_like(body), body), 1)},
        "array of 25": {"k.npy": kp_as(BODY_25, body)},
        "detectron2": {"k.npz": kp_detectron2(body)},
        "videopose3d": {"k.npz": kp_videopose3d(body)}}


BODY = kp_body(3)
KP_FORMATS = list(kp_formats(BODY))
KP_SIZED = "annotations", "detectron2", "videopose3d"
KP_PERSON = {"alphapose": "7", "labels, number": "7", "videopose3d": "a.mp4"}


@pytest.mark.parametrize("kind", KP_FORMATS)
def test_every_format_gives_the_same_track(kind, tmp_path):
    body = kp_body()
    tracks = read_keypoints(kp_write(tmp_path, kp_formats(body)[kind]))
    assert len(tracks) == (2 if kind == "detectron2" else 1)
    track = min(tracks, key=lambda track: track.keypoints[0, 0, 0])  # the left one
    assert track.person == KP_PERSON.get(kind, "7" if "mmpose" in kind else "1")
    assert track.step == 1
    assert track.frames == list(range(track.frames[0], track.frames[0] + 12))
    assert track.size == (SIZE if kind in KP_SIZED else None)
    assert track.fractions == kind.startswith(("labels", "mediapipe"))
    keypoints = track.keypoints * (*SIZE, 1) if track.fractions else track.keypoints
    assert_allclose(keypoints, body, atol=1e-4)


KP_EMPTIED = {  # one image's entry, made an entry of nobody
    "annotations": lambda content, t: content["annotations"][1 + t].pop("keypoints"),
    "alphapose open": lambda content, t: content[f"clip2_{t:03d}.jpg"].update(bodies=[]),
    "mmpose video": lambda content, t: content["instance_info"][t].update(instances=[]),
    "mmpose infos": lambda content, t: content[f"r_{t}.json"]["instance_info"].clear(),
    "ultralytics": lambda content, t: content[t].clear(),
    "labels": lambda content, t: content.update({f"v_{t}.txt": ""}),
    "openpose": lambda content, t: content[f"v_{t:012d}_keypoints.json"].update(people=[]),
    "mediapipe": lambda content, t: content[t].update(landmarks=[]),
    "detectron2": lambda content, t: content["keypoints"].__setitem__(t, []),
    "array": lambda content, t: content.put(range(51 * t, 51 * t + 51), 0)}


@pytest.mark.parametrize("kind", KP_EMPTIED)
def test_an_image_of_nobody_is_a_frame_of_the_video(kind, tmp_path):
    files, nobody = kp_formats(kp_body())[kind], [1, 2, 3, 5, 6, 8, 9]
    for t in nobody:
        KP_EMPTIED[kind](files if len(files) > 1 else next(iter(files.values())), t)
    for track in read_keypoints(kp_write(tmp_path, files)):
        assert track.step == 1 and len(track.frames) == 12
        assert np.flatnonzero(np.isnan(track.keypoints).all((1, 2))).tolist() == nobody


def test_seventeen_joints_are_cocos_unless_told(tmp_path):
    body = kp_body()
    assert_allclose(prepare(body, SIZE, "h36m")[0], body[..., :2])
    assert_array_equal(prepare(body, SIZE)[0], prepare(body, SIZE, "coco")[0])
    videos = kp_videopose3d(body, "h36m", **{"b.mp4": {"custom": [body[:5], body]}})
    tracks = read_keypoints(kp_write(tmp_path, {"k.npz": videos}))
    people = [track.person for track in tracks]
    assert people == ["a.mp4", "b.mp4 custom 0", "b.mp4 custom 1"]
    assert tracks[0].joints == "h36m" and np.array_equal(tracks[0].keypoints, body)
    wide = np.pad(body, ((0, 0), (0, 133 - 17), (0, 0)))  # COCO-WholeBody begins with COCO's
    track, = read_keypoints(kp_json(tmp_path, kp_list(wide)))
    assert np.array_equal(track.keypoints, body) and track.joints == "coco"


def test_a_frame_column_of_csv_and_images_without_a_name_number_frames(tmp_path):
    header, *rows = kp_formats(BODY)["mediapipe csv"]["k.csv"].splitlines()
    lines = ["frame," + header, *(f"{2 * t + 7},{row}" for t, row in enumerate(rows))]
    track, = read_keypoints(kp_write(tmp_path, {"f.csv": "\n".join(lines)}))
    assert (track.frames, track.step) == ([7, 9, 11], 2)
    lines = ["frame_time," + header, *(f"{t / 30},{row}" for t, row in enumerate(rows))]
    assert read_keypoints(kp_write(tmp_path, {"f.csv": "\n".join(lines)}))[0].frames == [0, 1, 2]
    assert_allclose(track.keypoints * (*SIZE, 1), BODY, atol=1e-4)
    images = [dict(id=t, file_name=None) for t in range(3)]
    nameless = dict(images=images, annotations=kp_list(BODY))
    track, = read_keypoints(kp_json(tmp_path, nameless))
    assert (track.frames, track.step) == ([0, 1, 2], 1)


def test_landmarks_without_visibility_have_a_depth_instead(tmp_path):
    for depth, sure in ((-0.5, 1), (0.5, 0.5)):  # depth about the hips has both signs
        points = kp_as(MEDIAPIPE, BODY) / (*SIZE, 1)
        points[..., 2] = depth
        track, = read_keypoints(kp_write(tmp_path, {"k.npy": points}))
        assert (track.keypoints[..., 2] == sure).all() and track.fractions
    track, = read_keypoints(kp_write(tmp_path, {"k.npy": kp_as(MEDIAPIPE, BODY)}))
    assert np.array_equal(track.keypoints, BODY) and not track.fractions


# ---- people

def test_the_files_own_people_are_kept(tmp_path, capsys):
    one, two = kp_body(seed=1), kp_body(seed=2) + (300, 0, 0)
    entries = kp_list(one, track_id=3) + kp_list(two, skip=(0, 1, 6, 11), track_id="b")
    a, b, other = read_keypoints(kp_json(tmp_path, entries + kp_list(one + (-300, 0, 0))))
    assert [a.person, b.person, other.person] == ["3", "b", "untracked 1"]
    assert b.frames == list(range(2, 11)) and capsys.readouterr().err == ""
    two[6] = np.nan
    assert_array_equal(a.keypoints, one)
    assert_array_equal(b.keypoints, two[2:11])
    ids = 7.0, 7, "7.0"  # a number is one person however written, a text is its own
    entries = [kp_list(one, track_id=name)[t] for t, name in enumerate(ids)]
    assert [t.person for t in read_keypoints(kp_json(tmp_path, entries))] == ["7", "7.0"]


def test_the_best_scored_of_a_number_is_taken(tmp_path, capsys):
    one, two = kp_body(seed=1), kp_body(seed=2)
    entries = kp_list(one, track_id=3, score=0.5) + kp_list(two, track_id=3, score=0.6)
    entries[5]["score"] = 0.7
    two[5] = one[5]
    track, = read_keypoints(kp_json(tmp_path, entries))
    assert_array_equal(track.keypoints, two)
    assert "12 times" in capsys.readouterr().err


def kp_frames(*people):
    """MMPose frames of people (T, 17, 3), NaN where absent, unnumbered and in no order."""
    rng = np.random.default_rng(3)
    frames = []
    for t in range(len(people[0])):
        seen = [person[t] for person in people if np.isfinite(person[t]).any()]
        rng.shuffle(seen)
        instances = [kp_instance(points) for points in seen]
        frames.append(dict(frame_id=t, instances=instances))
    return frames


def kp_walk(start, step, frames=40, seed=0):
    """A body whose middle goes from `start` by `step` a frame."""
    body = kp_body(frames, seed, size=(0, 0))
    time = np.arange(frames)[:, None, None]
    body[..., :2] += np.array(start) + time * (np.array(step) - 1)
    return body


@pytest.mark.parametrize("walk, other", [
    ((7, 0), dict(start=(700, 400), step=(0, 0), seed=1)),
    ((7, 0), dict(start=(800, 400), step=(-11, 0))),
    ((60, 0), dict(start=(500, 400), step=(60, 0)))], ids=str)  # one's next is two's last
def test_people_without_numbers_are_followed(walk, other, tmp_path):
    one, two = kp_walk((400, 400), walk), kp_walk(**other)
    one[10:14, 5:] = 0  # a head alone
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


@given(st.integers(0, 10 ** 6), st.integers(1, 5), st.integers(1, 6), st.sampled_from([3, 1000]))
def test_the_assignment_is_the_best_of_all(seed, rows, columns, values):
    rng = np.random.default_rng(seed)
    # few values: ties
    for cost in rng.integers(values, size=(10, rows, columns)).astype(float):
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
    ([10, 20, 30, 50, 60, 70], range(10, 71, 10)), ([0, 1, 2, 3, 4, 9], range(10)),
    ([f"a{t}_x.jpg" for t in range(8, 14)], range(8, 14)),
    ([f"v.{t:04d}" for t in range(6)], range(6))], ids=str)
def test_images_that_number_a_video_are_one(names, frames, tmp_path):
    entries = kp_named(kp_list(kp_body(6), track_id=1), names)
    track, = read_keypoints(kp_json(tmp_path, entries))
    assert track.step and track.frames == list(frames)
    assert np.isfinite(track.keypoints[..., 0]).all(1).sum() == 6


@pytest.mark.parametrize("names", [
    [f"{letter}.jpg" for letter in "abcdef"], [139, 285, 632, 724, 776, 785],
    [f"cam{t}_1.jpg" for t in range(6)], range(0, 600, 100),
    ["1.jpg", "01.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]], ids=str)
def test_images_that_number_no_video_are_single(names, tmp_path):
    body = kp_body(6)
    other = body[3:4] + (99, 0, 0)
    entries = kp_list(body) + kp_list(other, score=0.3)
    one, two = read_keypoints(kp_json(tmp_path, kp_named(entries, [*names, names[3]])))
    assert one.step == 0 and one.frames == [str(name) for name in names]
    assert_array_equal(one.keypoints, body)
    assert two.person == "2" and two.frames == one.frames[3:4]
    assert_array_equal(two.keypoints, other)


def test_images_of_several_sizes_are_each_normalised_by_their_own(kp_house, tmp_path):
    body, sizes = kp_body(6), [SIZE, (2560, 1440)] * 3
    body[1::2, :, :2] *= 2
    images = [dict(id=t, file_name=f"{t}.jpg", width=width, height=height)
              for t, (width, height) in enumerate(sizes)]
    file = kp_json(tmp_path, dict(images=images, annotations=kp_list(body)))
    small, large = read_keypoints(file)
    assert small.size == SIZE and large.size == (2560, 1440)
    assert small.frames == ["0.jpg", "2.jpg", "4.jpg"]
    out, model = kp_lift(file, size=None), load_model(kp_house.images)
    order = [0, 2, 4, 1, 3, 5]
    assert_array_equal(out["size"], [sizes[t] for t in order])
    poses = [lift(model, body[t:t + 1], sizes[t])[0] for t in order]
    assert_allclose(out["poses"], poses, atol=1e-4)


# ---- between detector and model

def kp_h36m(points):
    """The plain rule: COCO's joints (17, C) as Human3.6M's."""
    coco = dict(zip(COCO_JOINTS, points))

    def middle(part):
        return (coco["left_" + part] + coco["right_" + part]) / 2
    shoulders, hips, eyes = middle("shoulder"), middle("hip"), middle("eye")
    nose = coco["nose"]
    trunk = {"pelvis": hips, "spine": (hips + shoulders) / 2,
             "thorax": shoulders + 1 / 3 * (nose - shoulders) + 2 / 3 * (nose - eyes),
             "neck": nose * 3 / 4 + shoulders / 4,
             "head": eyes * 3 / 2 + middle("ear") / 2 - nose}
    return np.stack([{**coco, **trunk}[joint] for joint in H17.joints])


NOT_SEEN = [(np.nan, 5, 1), (7, 7, 0), (0, 0, 1), (7, 7, np.nan), (np.inf, 1, 1), (7, 7, 0.25),
            (-1281, 9, 1), (9, 1441, 1), (2561, 9, 1), (9, -721, 1)]


@given(st.integers(0, 10 ** 6), st.integers(1, 9), st.sampled_from(["coco", "h36m"]))
def test_what_was_not_seen_is_interpolated_in_time_and_counted(seed, frames, joints):
    rng = np.random.default_rng(seed)
    keypoints = rng.uniform(10, 500, (frames, 17, 3))
    keypoints[..., 2] = 1
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
        start, end = keypoints[[a, b], j, :2]
        filled[t, j] = start + share * (end - start)
    matrix = np.eye(17) if joints == "h36m" else kp_h36m(np.eye(17))
    pose, gaps = prepare(keypoints, SIZE, joints, min_score=0.25)
    assert_allclose(pose, matrix @ filled)
    assert_array_equal(gaps, [(matrix[:, hole] != 0).any(1) for hole in holes])


def test_minus_one_says_not_detected_only_without_scores():
    body = kp_body(6)
    body[2:4, 9] = -1, -1, 1
    gone = body.copy()
    gone[2:4, 9] = np.nan
    with_scores, without = prepare(body, SIZE), prepare(body[..., :2], SIZE)
    assert without[1].sum() == 2 and np.array_equal(without[0], prepare(gone, SIZE)[0])
    assert with_scores[1].sum() == 0 and np.array_equal(with_scores[0][2, 13], (-1, -1))


def test_a_face_seen_in_part_is_enough():
    body = kp_body()
    body[:, [0, 3], 2] = 0  # nose and left ear never seen
    pose, gaps = prepare(body, SIZE)
    plain = body[..., :2].copy()
    plain[:, [0, 3]] = plain[:, [1, 2, 4]].mean(1, keepdims=True)
    assert_allclose(pose, [kp_h36m(points) for points in plain])
    assert gaps.any(0).nonzero()[0].tolist() == [8, 9, 10]
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


# ---- lifting

def kp_model(**fields):
    """A small model with random weights that lifts keypoints."""
    torch.manual_seed(0)
    model = build_model(eval_recipe(**fields)).eval()
    for value in model.parameters():
        value.data += torch.rand(value.shape) / 10
    return model


@pytest.fixture(scope="module")
def kp_models(tmp_path_factory):
    """The folder beside which pretrained models and the page's template are found."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "docs").mkdir()
    shutil.copy(HERE / "docs" / "viewer.html", folder / "docs")
    (folder / "pretrained").mkdir()
    paths = []
    for method in ("glagcn", "gridconv"):
        fields = dict(name=f"{method}-wild", normalise="longest", filter_widths=(3, 3, 3))
        paths.append(folder / "pretrained" / f"{method}-wild.pt")
        save_model(paths[-1], kp_model(method=method, **fields), licence="CC BY-NC, as Bandai")
    return SimpleNamespace(folder=folder, video=paths[0], images=paths[1])


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
    dict(), dict(flip_test=True, normalise="width"), dict(method="glagcn", causal=True),
    dict(method="glagcn", filter_widths=(3, 3)),
    dict(method="glagcn", filter_widths=(5,), flip_test=True, normalise="longest")], ids=str)
def test_lift_is_the_models_output_for_each_window(fields):
    model, size = kp_model(**fields), (1920, 1080)
    T, flips = model.receptive_field, model.recipe.flip_test
    before = T - 1 if model.recipe.causal else T // 2
    sign = torch.tensor([-1.0, 1, 1])

    def run(inputs):
        with torch.no_grad():
            return model(inputs[:, 0] if T == 1 else inputs)
    for frames in (1, 2, 4, 5, 12):
        body, want = kp_body(frames, size=size), []
        scaled = (prepare(body, size)[0] - (960, 540)) / 960
        padded = np.pad(scaled, ((before, T), (0, 0), (0, 0)), mode="edge")
        for t in range(frames):
            window = torch.tensor(padded[None, t:t + T]).float()
            pose = run(window)
            if flips:
                other = run(window[..., H17.mirror, :] * sign[:2])
                pose = (pose + other[..., H17.mirror, :] * sign) / 2
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
        for factor, size in ((2, (2000, 2000)), (1, (1000, 400)), (3, (1200, 3000))):
            moved = body.copy()  # the same picture about another centre
            moved[..., :2] = (body[..., :2] - 500) * factor + np.array(size) / 2
            assert np.abs(lift(model, moved, size) - small).max() < 1e-4, size
        near = np.abs(lift(model, body, (1000, 1002)) - small).max()
        # release-500: Human3.6M's own sizes alike
        assert near < 1e-6 if rule == "release-500" else near > 1e-5


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
    poses = rng.normal(0, 0.4, (6, 17, 3))
    points = poses + rng.uniform((-1, -1, 3), (1, 1, 8), (6, 1, 3))
    focal, centre = 1400.0, np.array((960.0, 540.0))
    image = focal * points[..., :2] / points[..., 2:] + centre
    image += rng.normal(0, 5, image.shape)
    got = root_trajectory(image, poses, focal, centre)
    for t in range(6):
        A, b = [], []
        for (u, v), (x, y, z) in zip((image[t] - centre) / focal, poses[t]):
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
    for words in ("person 3: 40 frames, by glagcn-wild; interpolated: 1 whole frames",
                  "person 10: 9 frames, by gridconv-wild", "49 poses"):
        assert words in said.out
    assert "person 11: left out" in said.err and said.err.count("\n") == 1
    assert result["frames"].tolist() == [*range(40), *range(9)]
    assert result["interpolated"].all(1).nonzero()[0].tolist() == [5]
    centre, focal = np.array(SIZE) / 2, math.hypot(*SIZE)
    for person, body, path in (("3", one, kp_house.video), ("10", two, kp_house.images)):
        pose_2d = prepare(body, SIZE)[0]
        poses = lift(load_model(path), body, SIZE)
        root = root_trajectory(pose_2d, poses, focal, centre)
        mine = result["person"] == person
        assert_allclose(result["poses"][mine], poses, atol=0.51e-4)
        assert_allclose(result["root"][mine], root, atol=0.51e-4)
        assert_allclose(result["keypoints"][mine], pose_2d, atol=0.51e-2)


def test_the_page_holds_the_very_numbers_of_the_poses(kp_house, tmp_path):
    two = kp_body(4) + (99, 0, 0)
    file = kp_json(tmp_path, kp_list(kp_body(30), track_id=1) + kp_list(two, track_id=2))
    for out in ("a.npz", "b.json"):
        kp_run(file, "--focal", 1000, "--fps", 25, "--out", out)
    page, arrays = kp_page("a.html"), data.read_npz("a.npz")
    assert page == json.loads(Path("b.json").read_text()) == kp_page("b.html")
    for key in ("joints", "edges", "left", "right"):
        assert_array_equal(page[key], getattr(H17, key))
    assert page["source"] == "k.json" and page["fps"] == 25
    for key in ("joints", "edges", "source", "fps", "model", "licence"):
        assert arrays[key].tolist() == page[key], key
    for person, name in zip(page["people"], ("1", "2"), strict=True):
        assert person["size"] == [1280, 720] and person["name"] == name
        mine = arrays["person"] == name
        for key in ("poses", "root", "keypoints", "interpolated", "frames"):
            assert np.array_equal(arrays[key][mine], person[key]), key


def test_no_text_can_become_markup(kp_house, tmp_path):
    evil = "</script><script>alert(1)</script><!--&amp;\u2028\u2029 \ud800"
    file = kp_write(tmp_path, {"<img src=x>&.json": kp_list(BODY, track_id=evil)})
    save_model(tmp_path / "m.pt", kp_model(name="<i>\n"), licence=["CC0"])
    kp_run(file, "--model", tmp_path / "m.pt")
    page = kp_page("poses.html")
    assert page["source"] == "<img src=x>&.json"
    assert page["model"] == "<i>" and page["licence"] == "['CC0']"
    assert page["people"][0]["name"].startswith("</script><script>alert(1)</script><!--&amp;")


@pytest.mark.parametrize("frames, skip, model", [
    (27, (), "glagcn-wild"), (26, (), "gridconv-wild"),
    (40, range(10, 20), "glagcn-wild"), (40, range(10, 26), "gridconv-wild")])
def test_the_model_fits_the_track(frames, skip, model, kp_house, tmp_path):
    out = kp_lift(kp_json(tmp_path, kp_list(kp_body(frames), skip, track_id=1)))
    assert str(out["model"]) == model and len(out["poses"]) == frames
    licence = "CC BY-NC, as Bandai"
    assert str(out["licence"]) == kp_page("poses.html")["licence"] == licence


def test_every_fifth_frame_is_a_slower_video(kp_house, tmp_path):
    body = kp_body(40)
    file = kp_json(tmp_path, kp_named(kp_list(body), range(0, 200, 5)))
    out = kp_lift(file, "--smooth", "--fps", 20)
    assert str(out["model"]) == "gridconv-wild" and out["fps"] == 4
    assert out["frames"].tolist() == list(range(0, 200, 5))
    clean = one_euro(prepare(body, SIZE)[0] / 640, 4.0) * 640
    assert_allclose(out["keypoints"], clean, atol=0.006)


def test_single_images_are_lifted_each_on_its_own(kp_house, tmp_path, capsys):
    body, kept = kp_body(26), np.delete(np.arange(26), 3)
    body[3, 16, 2] = 0  # no ankle there, and none is invented
    names = [f"photo {letter}.jpg" for letter in "abcdefghijklmnopqrstuvwxyz"]
    file = kp_json(tmp_path, kp_named(kp_list(body), names))
    out, said = kp_lift(file, "--smooth"), capsys.readouterr()
    assert str(out["model"]) == "gridconv-wild" and "25 single images" in said.out
    assert "photo d.jpg left out" in said.err and "right_ankle" in said.err
    assert out["frames"].tolist() == [names[t] for t in kept]
    model = load_model(kp_house.images)
    poses = [lift(model, body[t:t + 1], SIZE)[0] for t in kept]
    assert_allclose(out["poses"], poses, atol=6e-5)
    rejected(["single images", "27"], kp_run, file, "--model", kp_house.video)


def test_without_pretrained_models_one_is_asked_for(kp_house, kp_file, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "HERE", kp_file.parent)
    monkeypatch.setattr(evaluation, "VIEWER", kp_file.parent / "viewer.html")
    kp_refused(kp_file, names=["glagcn-wild.pt", "--model"])
    kp_run(kp_file, "--model", kp_house.images)
    assert [path.name for path in Path().iterdir()] == ["poses.npz"]
    assert "no page" in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    "k.json --size 1280x720", "--size 1280 720 k.json", "--size=1280X720.0 k.json", "own.json"])
def test_the_size_is_read_in_every_way(words, kp_house):
    kp_write(Path(), {"k.json": kp_list(BODY)})
    kp_write(Path(), {"own.json": kp_annotations(BODY)})
    lift_command(words.split())
    assert data.read_npz("poses.npz")["size"].tolist() == [[1280, 720]] * 3


# ---- bad input: one clear line, exit 2, nothing written

def kp_refused(file, *options, names, size="1280x720"):
    """The command ends in a line that holds `names`; nothing is written where it runs."""
    rejected(names, kp_run, file, *options, size=size)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("kind", KP_FORMATS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "nobody"])
def test_each_format_damaged_is_one_line(kind, damage, kp_house, tmp_path):
    body = kp_body(4) * (damage != "nobody")
    path = kp_write(tmp_path, kp_formats(body)[kind])
    file = sorted(path.glob("[!.]*"))[1] if path.is_dir() else path
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:len(whole) * 2 // 3])
    if damage == "empty":
        file.write_bytes(b"")
    if damage != "empty" or file.suffix != ".txt":  # which means nobody in one image
        size = None if kind in KP_SIZED else "1280x720"
        kp_refused(path, size=size, names=path.name)


KP_ENTRY = kp_list(BODY)[0]
KP_BAD_JSON = {
    "found 7": 7,
    "no person": [],
    "entry 0": [{**KP_ENTRY, "keypoints": [[1, 2, 3, 4]] * 17}],
    "17 and of 18 joints": [KP_ENTRY, {"image_id": 0, "keypoints": [1] * 54}],
    "10 joints": [{"image_id": 0, "keypoints": [1.0] * 30}],
    "root": dict(meta_info=dict(keypoint_id2name={"0": "root", "1": "hip"})),
    "metres": [dict(pose_world_landmarks=[])],
    "is the size right?": kp_list(0 * BODY + 1e5),
    "in 1280x720": kp_list(BODY - (*SIZE, 0)),
    "expected pixels": kp_list(BODY / (*SIZE, 1))}
KP_BAD_FILES = [
    *(({"k.json": content}, ["k.json", said]) for said, content in KP_BAD_JSON.items()),
    ({"k.json": b"[" * 100000}, ["k.json", "JSON"]),
    ({"k.pkl": pickle.dumps([1])}, ["k.pkl", "looks like"]),
    ({"k.csv": "scorer,DLC\nx,y\n"}, ["k.csv", "x_0"]),
    ({"k.txt": kp_label(BODY[0]) + kp_label(BODY[1], 1, 2, 3)}, ["line 2"]),
    ({"k.npz": dict(a=BODY, b=BODY)}, ["a (3, 17, 3)", "b (3, 17, 3)"]),
    ({"k.npz": dict(keypoints=BODY, poses=BODY, root=BODY)}, ["lift has written"]),
    ({"k.npz": {**kp_detectron2(BODY), "boxes": kp_objects([[], []])}}, ["boxes"]),
    ({"k.npz": kp_videopose3d(BODY, "mpii")}, ["VideoPose3D"]),
    ({"a.json": [], "b.txt": ""}, [".json and .txt"]),
    ({"a.json": kp_list(BODY), "b.json": []}, ["a.json", "3 images"])]


@pytest.mark.parametrize("files, said", KP_BAD_FILES, ids=range(len(KP_BAD_FILES)))
def test_a_file_of_something_else_is_one_line(files, said, kp_house, tmp_path):
    kp_refused(kp_write(tmp_path, files), names=said)


KP_BAD_OPTIONS = {
    "--size 0x480": "size 0", "--size axb": "--size", "--size 1280 720 3": "3",
    "--person 8": "--person 8", "--out p.txt": "--out", "--plot a.jpg": "--plot",
    "--fps nan": "fps nan", "--focal -3": "focal -3", "--joints mpii": "mpii",
    "--model nowhere.pt": "nowhere.pt"}


@pytest.mark.parametrize("options, said", KP_BAD_OPTIONS.items(), ids=KP_BAD_OPTIONS)
def test_a_bad_option_is_one_line(options, said, kp_house, kp_file):
    size = None if options.startswith("--size") else "1280x720"
    kp_refused(kp_file, *options.split(), size=size, names=said)


@pytest.mark.parametrize("fields, said", [
    (dict(skeleton="humaneva15", method="glagcn"), "humaneva15"),
    (dict(target="uvd"), "uvd"), (dict(swap_sides=True), "swap_sides")], ids=str)
def test_a_model_that_does_not_lift_keypoints_is_one_line(fields, said, kp_house, kp_file):
    path = kp_file.parent / "a.pt"
    save_model(path, kp_model(**fields))
    kp_refused(kp_file, "--model", path, names=["model tiny", said])


def test_what_does_not_fit_the_file_is_one_line(kp_house, kp_file, tmp_path):
    kp_refused(tmp_path / "nowhere.json", names="nowhere.json")
    kp_refused(kp_file, size=None, names=["k.json", "--size"])
    kp_refused(kp_file, "--out", kp_file, names=["k.json", "overwrite"])
    own = kp_write(tmp_path, {"own.json": kp_annotations(BODY)})
    kp_refused(own, size="640x480", names=["--size", "1280x720"])
    h36m = kp_write(tmp_path, {"h.npz": kp_videopose3d(BODY, "h36m")})
    kp_refused(h36m, "--joints", "coco", size=None, names=["--joints", "h36m"])


def test_what_lift_cannot_take_is_one_line():
    rejected("recipe", lift, torch.nn.Linear(2, 3), BODY, SIZE)
    rejected("size: missing", lift, kp_model(), BODY, None)
    for keypoints in (BODY[0], BODY[:0], BODY[..., :1]):
        rejected(keypoints.shape, lift, kp_model(), keypoints, SIZE)


# ---- pictures

def test_pictures(kp_house, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image
    file = kp_json(tmp_path, kp_list(kp_body(14)))
    kp_run(file, "--fps", 25, "--plot", "strip.png", "a.gif")
    width, height = Image.open("strip.png").size
    assert width > 1.5 * height  # six frames beside each other
    with Image.open("a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (7, 80)  # every second frame of 25


def test_pictures_without_matplotlib_are_refused_before_the_work(kp_house, kp_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
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


def test_viewer_is_one_page_that_fetches_nothing():
    page = VIEWER.read_text(encoding="utf-8")
    fetching = r"https?:|\b(src|href)\s*=|url\(|@import|\bimport\b|fetch\(|XMLHttp|innerHTML"
    assert not re.search(fetching, page)
    assert "default-src 'none'" in page
    assert len(page.splitlines()) <= 250


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium here")
def test_viewer_draws_a_figure_that_turns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kp_run(kp_write(tmp_path, {"<b>x.json": kp_list(kp_body(30))}))
    page = tmp_path / "poses.html"
    page.write_text(page.read_text(encoding="utf-8") + LOOK, encoding="utf-8")
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
    assert found["source"] == "<b>x.json"  # texts cannot become markup
    assert found["trouble"].startswith("broken.json: ")


def test_demo_is_a_whole_person_in_its_image():
    demo = json.loads((HERE / "docs" / "demo.json").read_text(encoding="utf-8"))
    sizes = np.array([(image["width"], image["height"]) for image in demo["images"]])
    points = np.array([one["keypoints"] for one in demo["annotations"]])
    points = points.reshape(-1, 17, 3)[..., :2]
    assert ((points > 0) & (points < sizes[:, None])).all()


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
    store = data.make_store(recipe, "", "train", device)
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


def stopped(run, name, monkeypatch, step=3, number=signal.SIGTERM, **options):
    """Send the run of that name a signal after a step; returns the exit status."""
    real = train.Run.train_step

    def train_step(self, chunk):
        real(self, chunk)
        if self.step == step:
            os.kill(os.getpid(), number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train.Run, "train_step", train_step)
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

def test_ranger_follows_the_releases_trajectory():
    """Down the sum of p^4 from (1, -2, 3) with lr 0.01, across two Lookahead steps."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer, path = train.ranger([p], lr=0.01), []
    for _ in range(12):
        optimizer.zero_grad()
        (p ** 4).sum().backward()
        optimizer.step()
        path.append(p.tolist())
    want = {0: (0.95999998, -1.67999995, 1.91999996), 4: (0.82198018, -0.9098438, 0.17329334),
            5: (0.91086566, -1.45482609, 1.58658506), 6: (0.91054839, -1.45457458, 1.5864253),
            10: (0.90873635, -1.45306325, 1.58546937), 11: (0.90951741, -1.45370053, 1.58587147)}
    for step, point in want.items():
        torch.testing.assert_close(path[step], list(point), atol=1e-5, rtol=0)


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
PUBLISHED = {  # how the rows are trained: {pattern of names: fields}
    "gridconv-(gt|hrnet).*": dict(
        batch=200, epochs=100, lr=1e-3, optimizer="adam", dropout=0.25, temperature=30,
        noise_epochs=30, hidden=256, blocks=2, skip="gridconv", normalise="release-500"),
    "gridconv-gt.*": dict(keypoints="gt", padding=("circular", "replicate")),
    "gridconv-hrnet.*": dict(keypoints="hrnet", padding=("circular", "zeros")),
    "gridconv-.*(learnable|uvd)": dict(layout="autogrids", schedule="0.96/10", loss="mse"),
    "gridconv-(gt|hrnet)(-vanilla|-random.*|-32)?": dict(schedule="0.96/1", loss="grid"),
    "gridconv-gt-vanilla": dict(attention=""),
    "gridconv-temporal.*": dict(batch=1024, epochs=80, schedule="0.95/1", optimizer="amsgrad"),
    "gridconv-3dhp-cross": dict(weights="gridconv-gt-learnable", normalise="longest"),
    "glagcn-.*": dict(flips=True, flip_test=True, jitter=False, dropout=0.1, loss="mpjpe",
                      normalise="width"),
    "glagcn-(gt|cpn|humaneva).*": dict(optimizer="ranger", lr=1e-2, schedule="cosine",
                                       norm_schedule=True),
    "glagcn-(gt|cpn).*": dict(epochs=80, batch=512, input_norm=True),
    "glagcn-.*-reconstruct.*": dict(unshared_weight=0.5, stage_one_epochs=60, refine=True),
    "glagcn-(gt|cpn|humaneva)-[^-]*": dict(unshared_weight=0, stage_one_epochs=0, refine=False),
    "glagcn-humaneva.*": dict(epochs=1000, batch=256, filter_widths=(3, 3, 3), channels=96),
    "glagcn-humaneva-mrcnn": dict(input_norm=False, keypoints="detectron_pt_coco"),
    "glagcn-3dhp.*": dict(epochs=50, batch=256, channels=256, optimizer="amsgrad", lr=1e-3,
                          schedule="3dhp", reconstruct=True, unshared_weight=0.5, refine=False,
                          skeleton="3dhp17", norm_schedule=False),
    "glagcn-.*-27": dict(filter_widths=(3,) * 3), "glagcn-.*-81": dict(filter_widths=(3,) * 4),
    "glagcn-.*-243.*": dict(filter_widths=(3,) * 5)}


@pytest.mark.parametrize("name", PRINTED)
def test_published_rows_have_the_papers_figures_and_settings(name):
    recipe = train.RECIPES[name]
    assert recipe.name == name and recipe.row and recipe.seed == 0
    assert tuple(train.paper_figures(vars(recipe)).values()) == PRINTED[name]
    for pattern, fields in PUBLISHED.items():
        if re.fullmatch(pattern, name):
            assert {key: getattr(recipe, key) for key in fields} == fields


def test_every_published_row_is_quoted_and_no_recipe_asks_for_half_precision():
    recipes = train.RECIPES.items()
    quoted = {name for name, recipe in recipes if train.paper_figures(vars(recipe))}
    assert quoted == set(PRINTED)
    assert {recipe.precision for recipe in train.RECIPES.values()} == {"auto"}
    for recipe in train.RECIPES.values():
        train.check_recipe(recipe)


def test_parameters_of_the_papers_tables():
    sizes = {"gridconv-gt": 4_790_406, "gridconv-gt-learnable": 4_790_831,
             "glagcn-gt-27": 844_076, "glagcn-gt-81": 1_096_466, "glagcn-gt-243": 1_348_856,
             "glagcn-gt-243-reconstruct": 1_876_886,
             "glagcn-gt-243-reconstruct-512": 48_641_526}
    for name, size in sizes.items():
        assert train.parameters(train.RECIPES[name]) == size, name


@pytest.mark.parametrize("name, precision, at_once, gib", [
    ("gridconv-gt", "float32", 200, 0.7), ("glagcn-gt-27", "float32", 512, 3.1),
    ("glagcn-gt-243", "bf16", 512, 14.8), ("glagcn-gt-243-reconstruct", "float32", 512, 51.0),
    ("glagcn-3dhp-81", "float32", 256, 22.6)])
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
def test_batches_cover_everything_and_none_holds_one_sample(samples, size, world):
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
    local_loss = (local - targets[:, 4]).norm(dim=-1).mean()
    global_loss = (sequence - targets).norm(dim=-1).mean()
    both = run.objective(index, stage_one=True)
    torch.testing.assert_close(both, local_loss + global_loss)
    torch.testing.assert_close(run.objective(index, stage_one=False), local_loss)


def test_mirrored_samples_are_mirrored_back_to_be_refined(run_folder):
    fields = dict(reconstruct=True, stage_one_epochs=0.004, dropout=0.0, refine=True)
    run = make_run(run_folder, **{**TINY_GLA, **fields})
    run.objective.eval()
    N, index = len(run.store), torch.tensor([3, 7])
    pose, target = run.store.batch(index, 3)
    pose, target = flip(pose, H17), flip(target, H17)
    predicted = run.model(pose)
    back = flip(predicted, H17)
    intrinsics, root = run.store.normalised_intrinsics(index), run.store.root[index]
    better = run.refinement(back, run.store.input[index], intrinsics, root)
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
    scales, angles = ratio[:, 0].abs(), ratio[:, 0].angle().rad2deg()
    found = {(round(scale, 2), round(angle))
             for scale, angle in zip(scales.tolist(), angles.tolist())}
    assert found == {(scale, angle) for scale in (0.95, 1.0, 1.05) for angle in (-5, 0, 5)}
    torch.manual_seed(1)
    sequence = train.jitter(target.unflatten(1, (2, 2)))
    assert torch.equal(sequence.flatten(1, 2), out)  # of a sequence all frames alike


# ---- a step

@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_micro_batches_give_the_same_step_and_gradients_are_clipped(run_folder, clip):
    weights = []
    for micro in (0, 16):
        run = make_run(run_folder, micro_batch=micro, dropout=0.0, attention="", clip=clip)
        run.begin_epoch(0)
        run.model.eval()  # batch statistics differ between micro-batches by nature
        run.optimizer.zero_grad = lambda: None  # the gradients stay, to be looked at
        run.train_step(torch.arange(56))
        norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()
        assert norm == pytest.approx(clip, rel=1e-3) if clip else norm > 0.02
        weights.append(flat_weights(run.model))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_stage_two_leaves_the_sequence_head_alone(run_folder):
    fields = dict(reconstruct=True, epochs=2.0, stage_one_epochs=1.0)
    run = make_run(run_folder, **{**TINY_GLA, **fields})
    head = run.model.sequence_head
    start = flat_weights(head)
    take_steps(run)
    moved = flat_weights(head)
    assert not torch.equal(start, moved)
    run.step = run.epoch_steps
    run.begin_epoch(1)
    run.train_step(torch.arange(32))
    assert torch.equal(moved, flat_weights(head))
    assert all(p.grad is None for p in head.parameters())


def test_norm_momentum_reaches_all_but_shortcut_norms(run_folder):
    run = make_run(run_folder, **{**TINY_GLA, "epochs": 80.0})
    run.begin_epoch(40)
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    momenta = [m.momentum for m in run.model.modules() if isinstance(m, kinds)]
    assert sum(m == 0.1 for m in momenta) == 2  # the expanding block's two shortcuts keep 0.1
    assert sum(m == pytest.approx(0.01) for m in momenta) == len(momenta) - 2


def test_every_epoch_sees_other_cameras_than_the_test(run_folder):
    run = make_run(run_folder, cameras="random", normalise="longest", seed=2)
    seen = []
    for epoch in (0, 1):
        run.begin_epoch(epoch)
        drawn = run.store.input.clone()
        run.store.redraw(2 * (2 * 100003 + epoch))  # a function of seed and epoch, and even
        assert torch.equal(run.store.input, drawn)
        seen.append(drawn)
    assert not torch.equal(*seen)


def test_noise_temperature_and_stages_change_within_an_epoch(run_folder):
    fields = dict(layout="autogrids", noise_epochs=30.5, epochs=100.0, anneal_epochs=10.0)
    run = make_run(run_folder, **fields)
    for epoch, noise, temperature in ((0, True, 30), (5, True, 15.5), (30, True, 1),
                                      (30.49, True, 1), (30.5, False, 1), (99, False, 1)):
        run.reach(epoch)
        assert run.model.autogrids.noise is noise
        assert run.model.temperature == pytest.approx(temperature)
    fields = dict(reconstruct=True, epochs=2.0, stage_one_epochs=0.75)
    run = make_run(run_folder, **{**TINY_GLA, **fields})
    for epoch, stage_one in ((0, True), (0.74, True), (0.75, False), (1, False)):
        run.reach(epoch)
        assert run.stage_one is stage_one


def test_the_grid_has_a_learning_rate_of_its_own(run_folder):
    run = make_run(run_folder, layout="autogrids", grid_lr=0.0)
    s_prob = run.model.autogrids.s_prob
    grid, weights = s_prob.detach().clone(), flat_weights(run.model)
    take_steps(run)
    assert torch.equal(s_prob, grid)
    assert not torch.equal(flat_weights(run.model), weights)
    run = make_run(run_folder, layout="autogrids", grid_lr=5.0, schedule="1/1")
    take_steps(run)
    groups = run.optimizer.param_groups
    rates = {tuple(p.shape): group["lr"] for group in groups for p in group["params"]}
    assert rates.pop((25, 17)) == pytest.approx(1.5e-2) and set(rates.values()) == {3e-3}


def test_head_scale_multiplies_the_first_weights_of_the_head_alone(run_folder):
    plain = make_run(run_folder, **TINY_GLA)
    small = make_run(run_folder, **TINY_GLA, head_scale=0.1)
    scaled = dict(small.model.named_parameters())
    for name, p in plain.model.named_parameters():
        factor = 0.1 if name.startswith("head.") else 1.0
        torch.testing.assert_close(scaled[name], p * factor)


def test_half_precision_takes_nearly_the_same_step(run_folder):
    runs = [make_run(run_folder, precision=p, dropout=0.0) for p in ("float32", "bf16")]
    losses = [take_steps(run, 3) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_every_recipe_takes_two_steps(everything, run_folder):
    small = dict(hidden=4, blocks=1, channels=4, reconstruct_blocks=1, batch=2, micro_batch=0)
    read = ("data", "keypoints", "skeleton", "skip", "normalise", "target", "cameras")
    stores = {}
    for name, recipe in train.RECIPES.items():
        if recipe.weights:
            continue
        recipe = replace(recipe, **small)
        kind = tuple(getattr(recipe, field) for field in read)
        if kind not in stores:
            stores[kind] = data.make_store(recipe, everything[0], "train", CPU)
        run = train.Run(recipe, stores[kind], run_folder, CPU)
        before = flat_weights(run.model)
        for step, epoch in enumerate((0, int(recipe.epochs) - 1)):  # of both stages
            run.step = epoch * run.epoch_steps + step
            run.begin_epoch(epoch)
            run.train_step(torch.tensor([0, len(run.store) - 1]))
            assert run.stage_one == (recipe.reconstruct and step == 0), name
        assert torch.isfinite(run.losses[:2]).all() and run.losses[0] > 0, name
        assert not torch.equal(before, flat_weights(run.model)), name


# ---- reproducible, resumed bit for bit

def noisy(method, epochs):
    """A recipe with every kind of randomness and state."""
    fields = dict(layout="autogrids", noise_epochs=1.0)
    if method == "glagcn":
        fields = {**TINY_GLA, "reconstruct": True, "reconstruct_blocks": 1, "unshared_weight": 0.5,
                  "stage_one_epochs": epochs / 2, "jitter": True, "refine": True}
    fields |= dict(batch=24, dropout=0.1, epochs=epochs, eval_every=2, noise=0.01)
    return tiny_recipe(**fields)


def run_twice(folder, monkeypatch, recipe, device="cpu"):
    """The same run in `whole`, and interrupted and continued in `parts`; compared."""
    few_clips(monkeypatch, 24)

    def run(name):
        return train.train(recipe, out=folder / name, device=device, quiet=True)
    whole = run("whole")
    assert stopped(run, "parts", monkeypatch, 3) == 143
    assert stopped(run, "parts", monkeypatch, 6, signal.SIGINT) == 130
    run("parts")
    assert_same_run(folder / "whole", folder / "parts")
    assert run("whole")["last"] == whole["last"]  # nothing left to do


@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_training_is_reproducible_and_resumes_exactly(run_folder, method, monkeypatch):
    run_twice(run_folder, monkeypatch, noisy(method, 2.0))


def test_how_a_run_is_executed_may_change_and_nothing_else(small_run, run_folder, monkeypatch):
    stopped(small_run, "run", monkeypatch)
    path = run_folder / "run" / "last.pt"
    state = data.read_torch(path)
    del state["recipe"]["input_norm"]  # a field that came later is no difference
    for other, says in (([1], "last.pt: not the state of a run"),
                        ({"model": {}}, "last.pt: not the state of a run"),
                        ({**state, "data_print": [["train", 1, 2]]}, "frames"),
                        ({**state, "random": [1, 2]}, "processes 2 there, 1 here"),
                        (state, "lr 0.003 there, 0.1 here")):
        torch.save(other, path)
        with pytest.raises(InputError, match=says):
            small_run("run", lr=0.1)
    result = small_run("run", micro_batch=8, precision="bf16", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert (result["precision"], result["recipe"]["micro_batch"]) == ("bf16", 8)
    small_run("run")
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_annealed_temperature_stays_with_the_weights(small_run, run_folder):
    result = small_run("run", epochs=0.5, anneal_epochs=1.0)
    model = evaluation.load_model(run_folder / "run" / "model.pt")
    assert 1 < model.temperature < 30 and model.epoch == 1
    scores = evaluation.evaluate(model, data.make_store(model.recipe, "", "test", CPU))
    assert scores["mpjpe"] == pytest.approx(result["last"]["mpjpe"], rel=1e-6)


def test_the_last_weights_stand_alone_beside_the_best(small_run, run_folder, monkeypatch):
    errors, real = iter((50.0, 60.0)), evaluation.evaluate

    def worse(*arguments, **options):
        return {**real(*arguments, **options), "mpjpe": next(errors)}
    monkeypatch.setattr(evaluation, "evaluate", worse)
    result = small_run("run")
    assert (result["best"]["epoch"], result["last"]["epoch"]) == (1, 2)
    best, last, state = (data.read_torch(run_folder / "run" / name)
                         for name in ("best.pt", "model.pt", "last.pt"))
    assert (best["epoch"], last["epoch"]) == (1, 2) and best.keys() == last.keys()
    flat = [torch.cat([value.flatten().double() for value in one["model"].values()])
            for one in (best, last, state)]
    assert torch.equal(flat[1], flat[2]) and not torch.equal(flat[0], flat[1])


# ---- killed at any moment

def in_processes(world, function, *arguments):
    """`world` forks of this process, joined as by torchrun, that run the function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork, children = torch.multiprocessing.get_context("fork"), []
    for rank in map(str, range(world)):
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        children.append(fork.Process(target=function, args=arguments))
        children[-1].start()
    return children


def statuses(children):
    """Their exit statuses; a killed one's is -9. Who hangs is killed, so that a test can fail."""
    for child in children:
        child.join(240)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def dying_at(operation):
    """From now on the process ends by SIGKILL before the fsync or rename of that number."""
    count = iter(range(10 ** 9))

    def deadly(real):
        def wrapped(*arguments):
            if next(count) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        return wrapped
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def kill_and_continue(method, folder, world=1, kills=5, epochs=4.0, how="time"):
    """In `folder`: the run `whole`, and the same run `killed-1`, ... until `kills` times it was
    ended by SIGKILL, after a random time or at a random file operation, and then continued."""
    torch.set_num_threads(1)
    folder, rng, recipe = Path(folder), random.Random(0), noisy(method, epochs)
    clips = data.synthesize(0, subjects=("S1", "S9"), motions=("walk",), frames=24)
    data.synthesize = lambda seed: [s for s in clips if s.camera == "54138969"] * 2
    train.SAVE_SECONDS = -1

    def run(name, operation=-1):
        dying_at(operation)
        train.train(recipe, out=folder / name, device="cpu", quiet=True)
    started = time.perf_counter()
    assert statuses(in_processes(world, run, "whole")) == [0] * world
    seconds, killed, done = time.perf_counter() - started, 0, 0
    while killed < kills:
        operation = rng.randrange(20) if how == "file" else -1
        children = in_processes(world, run, f"killed-{done}", operation)
        if how == "time":
            time.sleep(rng.uniform(0.1, 0.8) * seconds)
            for child in children:
                child.kill()
        status = statuses(children)
        assert set(status) <= {0, -9}, status
        killed, done = killed + (-9 in status), done + (-9 not in status)
    assert statuses(in_processes(world, run, f"killed-{done}")) == [0] * world


def fresh_python(code, *words, threads="1"):
    """What a Python of its own prints for that code, which may use this file's functions."""
    module = Path(__file__).stem
    head = f"import sys, {module} as tests, torch._dynamo\n"  # which optimisers import
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", head + code, *map(str, words)]
    done = subprocess.run(command, cwd=HERE, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("method, options", [
    ("gridconv", dict(how="file", kills=12)), ("glagcn", dict(kills=2, epochs=2.0)),
    ("gridconv", dict(world=2, kills=1)),
    pytest.param("gridconv", dict(how="file", kills=24, epochs=16.0), marks=pytest.mark.slow),
    pytest.param("glagcn", dict(world=2, kills=12, epochs=16.0), marks=pytest.mark.slow)],
    ids=["files", "glagcn", "two-processes", "many-files", "many-times"])
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path, method, options):
    code = "import json; tests.kill_and_continue(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    fresh_python(code, method, tmp_path, json.dumps(options))
    for run in tmp_path.glob("killed-*"):
        assert_same_run(tmp_path / "whole", run)


# ---- damage

def flipped(content, at):
    """The bytes with one bit of one of them turned over."""
    return content[:at] + bytes([content[at] ^ 8]) + content[at + 1:]


@pytest.mark.parametrize("how", ["truncated", "a bit of a weight"])
def test_a_damaged_checkpoint_is_noticed_in_one_line(small_run, run_folder, monkeypatch, how):
    stopped(small_run, "run", monkeypatch, 1)
    last = run_folder / "run" / "last.pt"
    content = last.read_bytes()
    half = len(content) // 2
    last.write_bytes(content[:half] if how == "truncated" else flipped(content, half))
    rejected(["last.pt", "remove it to begin anew"], small_run, "run")
    last.unlink()
    assert small_run("run")["epochs"] == 2


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_whole(
        small_run, run_folder, monkeypatch):
    resource = pytest.importorskip("resource")
    stopped(small_run, "parts", monkeypatch)
    last = run_folder / "parts" / "last.pt"
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, len(before) // 3, len(before) - 1):  # a full disk: every writer's OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            rejected(["last.pt", "File too large"], small_run, "parts")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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
        rejected(["parts", "Permission denied", "--out"], small_run, "parts")
    finally:
        os.seteuid(0)
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
        rejected(["run", "another run", "--out"], small_run, "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert small_run("run")["last"]


def test_commands_run_where_fcntl_is_missing(small_run, monkeypatch):
    """By the lock of Windows, held by another process."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    held = mock.Mock(side_effect=PermissionError)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=held, LK_NBLCK=2))
    rejected("another run", small_run, "run")


# ---- signals

@pytest.mark.parametrize("owner, where, number, reached", [
    (data, "provenance", signal.SIGTERM, (1, 0)),
    (evaluation, "predict", signal.SIGINT, (8, 1)),
    (train, "write_torch", signal.SIGINT, (2, 0))])
def test_a_signal_ends_a_run_after_its_step_or_evaluation(
        small_run, run_folder, monkeypatch, capsys, owner, where, number, reached):
    before, asked, real = signal.getsignal(number), [], getattr(owner, where)

    def interrupted(*arguments, **options):
        if not asked:
            asked.append(number)
            os.kill(os.getpid(), number)
        return real(*arguments, **options)
    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(SystemExit) as stop:
        small_run("parts", quiet=False)
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    said = capsys.readouterr().err
    assert "stopping" in said and "the same command goes on" in said
    state = data.read_torch(run_folder / "parts" / "last.pt")
    assert (state["step"], len(state["history"])) == reached
    small_run("parts"), small_run("whole")
    assert_same_run(run_folder / "whole", run_folder / "parts")


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
    rejected(["step 6", "not finite", "saved before", "--lr"], small_run, "run")
    state = data.read_torch(run_folder / "run" / "last.pt")
    assert state["step"] == 5
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_result_says_how_it_came_about(small_run, run_folder, monkeypatch):
    monkeypatch.setenv("PATH", str(run_folder))
    result = small_run("run")
    assert result["commit"] == ""  # where there is no git
    assert "threads" in result["device"]  # whose number decides the last bits
    assert {"seed", "torch", "python", "precision"} <= result.keys()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_file_handles_do_not_grow(run_folder, monkeypatch):
    few_clips(monkeypatch, 10)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.05)
    seen, real = [], train.Run.train_step

    def train_step(self, chunk):
        real(self, chunk)
        if self.step in (60, 120):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            handles = len(os.listdir("/proc/self/fd"))
            seen.append((pages * os.sysconf("SC_PAGE_SIZE"), handles, tensors))
    recipe = replace(noisy("gridconv", 1.0), eval_every=20)
    per_epoch = make_run(run_folder, **vars(recipe)).epoch_steps
    monkeypatch.setattr(train.Run, "train_step", train_step)
    train.train(replace(recipe, epochs=120 / per_epoch), out=run_folder / "run", quiet=True)
    memory, handles, tensors = (after - before for before, after in zip(*seen))
    assert memory < 2 ** 24 and handles == 0 and tensors == 0


def test_the_log_has_a_line_an_epoch(small_run, run_folder, capsys):
    small_run("run", quiet=False, epochs=3.0)
    assert len((run_folder / "run" / "log.csv").read_text().splitlines()) == 1 + 3
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_progress_is_shown_every_15_seconds(
        run_folder, monkeypatch, capsys):
    run, now = make_run(run_folder), [0.0]
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    progress, quiet = train.Progress(run, quiet=False), train.Progress(run, quiet=True)
    run.losses[:] = 0.25
    for run.step in range(1, 61):  # two seconds a step
        now[0] += 2
        progress.show(), quiet.show()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert all("loss 0.2500" in line and "min left" in line for line in lines)
    progress.show({"loss": 0.5, "mpjpe": 51.0, "p_mpjpe": 41.0})
    assert "MPJPE 51.0 mm  P-MPJPE 41.0 mm" in capsys.readouterr().err


# ---- out of memory

def test_out_of_memory_is_one_line_with_what_fits_and_keeps_what_was_saved(
        small_run, monkeypatch):
    fault = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    stopped(small_run, "run", monkeypatch)
    said = ["out of memory", "16 samples", "--micro-batch 8", "--precision bf16", "GiB"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", mock.Mock(side_effect=fault))
        rejected(said, small_run, "run")
    assert small_run("run")["epochs"] == 2


@pytest.mark.parametrize("gib, fits", [(80, {"tf32": 256, "bf16": 512}),
                                       (8, {"tf32": 64, "bf16": 128})])
def test_what_would_fit_is_less_than_the_card_has(gib, fits, monkeypatch):
    card = SimpleNamespace(total_memory=gib * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    recipe = train.RECIPES["glagcn-gt-243"]
    line = train.out_of_memory(recipe, "tf32", torch.device("cuda"))
    for kind, number in fits.items():
        assert f"--precision {kind} --micro-batch {number} " in line
        assert train.memory(recipe, kind, number) < 0.8 * gib
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


def two_epochs(run):
    """The losses of each epoch."""
    losses = []
    for epoch in range(2):
        run.begin_epoch(epoch)
        for chunk in run.batches(train.epoch_order(run.recipe, len(run.store), epoch)):
            run.train_step(chunk)
        losses.append(run.losses.clone())
    return losses


def one_of_two(method, out):
    """What each of two processes does in the test below."""
    with train.processes(CPU) as (rank, world):
        run = shared_run(method, rank, world)
        losses = two_epochs(run)
        if rank == 0:
            torch.save([losses, run.model.state_dict()], out)
        run.step_loss = None  # as in train.train


def shares_in_turn(method):
    """What two processes should do, by one: each half of a batch in turn; the model, its losses."""
    run = shared_run(method)

    def step(chunk):
        run.reach(run.step / run.epoch_steps)
        half, total = (len(chunk) + 1) // 2, 0.0
        for share in (chunk[:half], chunk[half:]):
            loss = run.objective(share, run.stage_one) * len(share) / len(chunk)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.losses[run.step % run.epoch_steps] = total
        run.step += 1
    run.batches = lambda order: train.batches(order, run.recipe.batch, 4)
    run.train_step = step
    run.epoch_steps = len(run.batches(train.epoch_order(run.recipe, len(run.store), 0)))
    run.losses = torch.zeros(run.epoch_steps)
    return run.model, two_epochs(run)


def two_and_one(method, out):
    """Two processes and the explicit loop take the same steps."""
    torch.set_default_dtype(torch.float64)
    assert statuses(in_processes(2, one_of_two, method, out)) == [0, 0]
    losses, weights = torch.load(out, weights_only=True)
    model, alone = shares_in_turn(method)
    torch.testing.assert_close(losses, alone, rtol=1e-9, atol=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights[name], p.data, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_two_processes_equal_two_shares_one_after_the_other(tmp_path, method):
    fresh_python("tests.two_and_one(*sys.argv[1:])", method, tmp_path / "out.pt")


def test_torchrun_has_one_writer_and_saves_everyones_random_state(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text("""
import gc, data, train
clips = data.synthesize(0, frames=8, subjects=("S1", "S9"), motions=("walk",))
data.synthesize = lambda seed: clips
leave = train.dist.destroy_process_group
def nothing_holds_it():
    held = [1 for thing in gc.get_objects() if "DistributedDataParallel" in type(thing).__name__]
    leave()
    assert not held, "who frees the group last hangs now and then"
train.dist.destroy_process_group = nothing_holds_it
data.run(train.main)
""")
    options = f"--hidden 4 --dropout 0.1 --batch 16 --epochs 2 --out {tmp_path / 'run'}"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", driver,
             "gridconv-synthetic", *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *words]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| gridconv-synthetic") == 2  # a line each of MPJPE and P-MPJPE
    one, other = data.read_torch(tmp_path / "run" / "last.pt")["random"]
    assert not torch.equal(one[0], other[0])
    assert data.read_json(tmp_path / "run" / "result.json")["device"].startswith("2 x ")


def test_what_does_not_go_with_several_processes_is_refused(run_folder):
    for fields, device, says in (
            (dict(compile=True), "cuda", ["compile", "several GPUs", "use one"]),
            (dict(batch=7), "cpu", ["batch: 7", "4 processes"])):
        recipe, device = tiny_recipe(**fields), torch.device(device)
        rejected(says, train.Run, recipe, [0] * 100, run_folder, device, world=4)


# ---- fast forms and compilation

def test_bench_prints_every_layer_and_network(monkeypatch, capsys):
    monkeypatch.setattr(train, "clock", lambda call, device, times=1: 2.0)
    train.main(["bench", "--device", "cpu"])
    told = capsys.readouterr().out
    for what in ("D-GridConv layer", "C = 256: training step", "T = 27: evaluation"):
        assert what in told
    assert told.count("1.00x") == 8 and "cpu" in told.lower()


def test_bench_at_full_size_times_each_way_beside_the_papers(monkeypatch, capsys):
    few_clips(monkeypatch)
    monkeypatch.setattr(data, "H36M_FRAMES", {"train": (300,)})
    small = dict(channels=4, filter_widths=(3,), reconstruct_blocks=1, batch=4)
    name = "glagcn-gt-243-reconstruct"
    monkeypatch.setitem(train.RECIPES, name, replace(train.RECIPES[name], **small))
    train.main(["bench", "--full-size", "--device", "cpu", "--only", name])
    rows = [line for line in capsys.readouterr().out.splitlines() if "float32" in line]
    assert len(rows) == 2 and "the paper's form" in rows[1]
    assert all(float(row.split(" | ")[3]) > 0 for row in rows)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fields", [
    {"layout": "autogrids", "noise_epochs": 0.0}, {"loss": "grid"},
    {**TINY_GLA, "reconstruct": True, "stage_one_epochs": 1.0, "reconstruct_blocks": 1}],
    ids=["gridconv", "grid", "reconstruction"])
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
            losses += run.losses[:2].tolist()
    assert losses[6:] == pytest.approx(losses[:6], rel=1e-3)
    assert len(set(losses[:6])) == 6


def slowness_beside_busy_processes():
    """The time of a step with two threads by that with one, beside three busy processes."""
    recipe = train.RECIPES["gridconv-synthetic"]
    clips = data.synthesize(0, subjects=("S1",), motions=("walk",), frames=80)
    run = train.Run(recipe, FrameStore(clips, recipe.normalise, H17), ".", CPU)
    run.begin_epoch(0)
    chunk, = first_batches(run, 1)
    words = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(words) for _ in range(3)]
    times = {1: [], 2: []}
    try:
        for threads in (2, 2, 1, 1) * 4:
            torch.set_num_threads(threads)
            started = time.perf_counter()
            run.train_step(chunk)
            times[threads].append(time.perf_counter() - started)
    finally:
        for process in busy:
            process.kill()
    return np.median(times[2]) / np.median(times[1])


def test_beside_busy_processes_two_threads_are_not_much_slower_than_one(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    code = "print(tests.slowness_beside_busy_processes(), tests.os.environ['GOMP_SPINCOUNT'])"
    ratio, spins = fresh_python(code, threads="2").split()
    assert float(ratio) < 3 and int(spins) < 10 ** 6


# ---- reports, ablations, the main job

def results_in(folder):
    """The results of every run in a folder."""
    return [data.read_json(path) for path in sorted(folder.glob("*/result.json"))]


def test_report_of_several_runs(small_run, run_folder):
    for seed in (0, 1):
        small_run(f"a-{seed}", name="a", seed=seed)
    small_run("b", name="b")
    table = train.write_report(run_folder)
    report = (run_folder / "report.md").read_text()
    results = results_in(run_folder)
    errors = [result["last"]["mpjpe"] for result in results[:2]]
    row = train.summary(results)[0]
    assert (row["run"], row["figure"], row["paper"]) == ("a", "MPJPE", None)
    assert row["last epoch"] == pytest.approx(sum(errors) / 2) and row["seeds"] == "0, 1"
    assert row["spread"] == pytest.approx(abs(errors[0] - errors[1]))
    assert f"{sum(errors) / 2:.2f}" in table and table in report
    assert report.count("\n## ") == 3
    for broken in ("{", "[]", '{"recipe": {}, "files": [], "best": {}, "compares": false}'):
        (run_folder / "b" / "result.json").write_text(broken)
        refused("train.py", "report", run_folder, names="result.json")
    refused("train.py", "report", run_folder / "none", names="none")


def fake_result(name, seed, error, **fields):
    """A result of a published row."""
    scores = {"mpjpe": error, "p_mpjpe": error - 10, "epoch": 3, "pck": 90.0, "auc": 60.0}
    recipe = dataclasses.asdict(replace(train.RECIPES[name], seed=seed))
    last = {**scores, "mpjpe": error + 1}
    return dict(recipe=recipe, data="Human3.6M", test_data="Human3.6M", compares=True,
                seed=seed, settings_changed="", last=last, best=scores, seconds=60.0,
                yardsticks={"affine": 70.0}, device="cpu", precision="float32", **fields)


def test_figures_stand_beside_the_papers_only_where_they_compare():
    refined = {"mpjpe": 24.8, "p_mpjpe": 20.0}
    results = [fake_result("gridconv-hrnet", 0, 47.9) | {"settings_changed": "epochs 3"},
               fake_result("glagcn-gt-243-reconstruct", 0, 26.0, refined=refined),
               fake_result("glagcn-gt-243", 0, 28.5),
               fake_result("gridconv-gt", 0, 37.0), fake_result("gridconv-gt", 1, 38.0)]
    rows = train.summary(results)
    got = [[row[key] for key in ("run", "figure", "difference", "reproduced")] for row in rows]
    assert got == [  # the headline rows come first
        ["gridconv-gt", "MPJPE", pytest.approx(0.4), True],
        ["glagcn-gt-243", "MPJPE", 0, True], ["glagcn-gt-243", "P-MPJPE", -3.5, False],
        ["gridconv-hrnet (settings changed)", "MPJPE", 0, False],
        ["gridconv-hrnet (settings changed)", "P-MPJPE", pytest.approx(0), False],
        ["glagcn-gt-243-reconstruct", "MPJPE", 1.5, False],
        ["glagcn-gt-243-reconstruct", "MPJPE, refined: true root", pytest.approx(0.3), True]]
    got = [rows[0][key] for key in ("paper", "best epoch", "last epoch", "spread")]
    assert got == [37.1, 37.5, 38.5, 1.0]
    others = [{**result, "compares": False} for result in results]
    assert all(row["paper"] is None for row in train.summary(others))
    assert "37.10" not in train.report_table(others)


def test_ablation_trains_every_row_for_the_same_epochs_and_continues(run_folder, monkeypatch):
    few_clips(monkeypatch, 12)
    rows = {"one": (38.1, dict(layout="random")),
            "two": (None, dict(layout="autogrids", noise_epochs=0.5))}
    monkeypatch.setitem(train.ABLATIONS, "tiny", ("gridconv-synthetic", "P1*, Table 5", rows))
    out, options = run_folder / "t", dict(hidden=4, blocks=1, epochs=0.5)

    def ablate(only=""):
        return train.ablate("tiny", "", out, 2, only, options, "cpu")
    text, results = ablate(), results_in(out)
    places = [path.name for path in sorted(out.iterdir())]
    assert places == ["one-seed-0", "one-seed-1", "two-seed-0", "two-seed-1"]
    for result, noise, seed in zip(results, (0, 0, 0.25, 0.25), (0, 1, 0, 1)):
        recipe = result["recipe"]
        assert (recipe["epochs"], recipe["noise_epochs"]) == (0.5, noise)
        assert recipe["layout_seed"] == result["seed"] == seed
    errors = [result["last"]["mpjpe"] for result in results[:2]]
    assert f"{sum(errors) / 2:.2f}" in text and f"{abs(errors[0] - errors[1]):.2f}" in text
    assert "38.10" in text and "other data" in text
    assert f"{results[2]['parameters']:,}" in text
    monkeypatch.setattr(train, "train", None)  # nothing is trained twice
    assert ablate() == text and "| one" not in ablate(only="two")
    rejected(["'three'", "one;two"], ablate, only="two;three")


@pytest.mark.parametrize("table", train.ABLATIONS)
def test_every_ablation_is_of_possible_recipes_of_equal_samples(table):
    base, _, rows = train.ABLATIONS[table]
    samples = set()
    for label, (_, fields) in rows.items():
        recipe = train.ablation_recipe(train.RECIPES[base], label, 1, **fields)
        assert train.parameters(replace(recipe, hidden=8, channels=4)) > 0
        assert (recipe.seed, recipe.layout_seed) == (1, 1)
        assert not train.paper_figures(vars(recipe))  # its base's is another row's
        samples.add((recipe.epochs, recipe.batch, recipe.flips))
    assert len(samples) == 1


def test_ablations_quote_the_papers_and_lifters_are_of_equal_size():
    printed = {table: [paper for paper, _ in rows.values() if paper]
               for table, (_, _, rows) in train.ABLATIONS.items()}
    assert printed == {"lifters": [39.0, 37.1], "gridconv-5": [38.1, 37.1, 36.4],
                       "gridconv-D-attention": [40.8, 42.3, 39.0, 37.1], "glagcn-reconstruct": []}
    base, _, rows = train.ABLATIONS["lifters"]
    for label, (_, fields) in rows.items():
        recipe = train.ablation_recipe(train.RECIPES[base], label, 0, **fields)
        assert 300_000 < train.parameters(recipe) < 335_000, label


@pytest.fixture
def tiny_rows(monkeypatch, everything):
    """(folder, raw values) of the miniatures, now of the papers' sizes; every network is tiny."""
    tiny = dict(hidden=4, blocks=1, channels=4, epochs=0.02, batch=50, filter_widths=(3, 3),
                reconstruct_blocks=1)
    for name, recipe in list(train.RECIPES.items()):
        stage_one = 0.015 if recipe.reconstruct else 0.0
        recipe = replace(recipe, **tiny, stage_one_epochs=stage_one)
        monkeypatch.setitem(train.RECIPES, name, recipe)
    valid = {name: int(view["valid"].sum()) for name, view in everything[1].test_3dhp.items()}
    monkeypatch.setattr(data, "H36M_FRAMES", {"train": (600 * 5,), "test": (236 * 5, 224 * 5)})
    monkeypatch.setattr(data, "MPI3DHP_VALID", valid)
    return everything


def plain_mpjpe(model, raw, views, skipped):
    """The protocol's MPJPE of a single-frame model, in NumPy: over frames, then over actions."""
    errors = {}
    takes = [(subject, take) for subject in ("S9", "S11") for take in raw.space[subject]]
    for subject, take in [one for one in takes if one not in skipped]:
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


def test_main_job_by_independent_arithmetic(tiny_rows, tmp_path, capsys):
    folder, raw = tiny_rows
    drifting = {("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}
    rows = {"gridconv-gt": (raw.gt, {("S11", "Directions")}),
            "gridconv-hrnet-learnable": (raw.noisy, {("S11", "Directions"), *drifting})}

    def reproduce():
        train.reproduce(folder, tmp_path, "cpu", ",".join(rows), seeds=2)
        return capsys.readouterr().out
    said = reproduce()
    assert all(word in said for word in ("gridconv-gt-seed-1", "to run", "float32", "GiB", "cpu"))
    table = {row["run"]: row for row in train.summary(results_in(tmp_path))
             if row["figure"] == "MPJPE"}
    for name, (views, skipped) in rows.items():
        measured = []
        for place in (tmp_path / name, tmp_path / f"{name}-seed-1"):
            result = data.read_json(place / "result.json")
            assert result["data"] == result["test_data"] == "Human3.6M" and result["compares"]
            assert result["test_frames"] == 5 * (240 - 4 * len(skipped))
            for which, file in (("best", "best.pt"), ("last", "model.pt")):
                plain = plain_mpjpe(load_model(place / file), raw, views, skipped)
                assert result[which]["mpjpe"] == pytest.approx(plain, rel=1e-4)
            measured.append(result["best"]["mpjpe"])
        mean = sum(measured) / 2
        assert table[name]["best epoch"] == pytest.approx(mean)
        assert table[name]["difference"] == pytest.approx(mean - PRINTED[name][0])
        assert f"{mean:.2f}" in (tmp_path / "report.md").read_text()
    place = tmp_path / "gridconv-gt"
    before = (place / "last.pt").stat().st_mtime_ns
    assert reproduce().count(" done ") == 4  # nothing is done twice
    assert (place / "last.pt").stat().st_mtime_ns == before
    recipe = train.RECIPES["gridconv-gt"]
    again = train.run_recipe(replace(recipe, precision="bf16"), folder, place)
    assert again == data.read_json(place / "result.json") and again["precision"] == "float32"
    assert not train.finished(replace(recipe, lr=1.0), folder, place)
    for path in (folder / "data_3d_h36m.npz", folder / "data_2d_h36m_gt.npz"):
        was = path.stat()
        os.utime(path, (1, 1))  # other data, though older than the result
        assert not train.finished(recipe, folder, place)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_rows_of_other_datasets_and_the_refined_figure(tiny_rows, tmp_path):
    folder, _ = tiny_rows
    names = ("gridconv-3dhp-cross", "glagcn-3dhp-27", "glagcn-humaneva-mrcnn",
             "glagcn-gt-243-reconstruct")
    options = dict(eval_every=10 ** 6)
    train.reproduce(folder, tmp_path, "cpu", ",".join(names), options=options)
    runs = {result["recipe"]["name"]: result for result in results_in(tmp_path)}
    source = "gridconv-gt-learnable"  # whose weights one row takes
    assert set(runs) == {*names, source}
    keys = {title: key for key, title in evaluation.METRICS.items()}
    for name in names:
        rows = train.summary([runs[name]])
        assert {row["paper"] for row in rows} == set(PRINTED[name])
        for row in rows:
            figure = keys[row["figure"].split(",")[0]]
            scores = runs[name]["refined" if "true root" in row["figure"] else "last"]
            assert row["last epoch"] == pytest.approx(scores[figure])
    cross = train.RECIPES["gridconv-3dhp-cross"]
    store = data.make_store(cross, folder, "test", CPU)
    scores = evaluation.evaluate(load_model(tmp_path / source / "model.pt"), store)
    assert runs[cross.name]["last"]["auc"] == pytest.approx(scores["auc"])
    assert "eval_every" in runs[cross.name]["settings_changed"]  # of the training
    (tmp_path / source / "result.json").unlink()
    says = f"first: python train.py {source}"
    rejected(says, train.run_recipe, cross, folder, tmp_path / cross.name, "cpu")


def test_a_failing_row_does_not_stop_the_others(tiny_rows, tmp_path, monkeypatch):
    real = train.Run.train_step

    def train_step(self, chunk):
        if self.recipe.name == "gridconv-gt":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.recipe.layout == "autogrids":
            raise RuntimeError("a fault of ours")
        real(self, chunk)
    monkeypatch.setattr(train.Run, "train_step", train_step)
    words = ("reproduce", "--data", tiny_rows[0], "--out", tmp_path)
    status, _, err = command("train.py", *words)
    assert status == 2 and "error: gridconv-gt: gridconv-gt: out of memory" in err
    assert "a fault of ours" in err and "2 of 3 runs failed" in err.splitlines()[-1]
    result, = results_in(tmp_path)
    assert result["recipe"]["name"] == "glagcn-gt-243"
    assert "glagcn-gt-243" in (tmp_path / "report.md").read_text()


def test_which_rows_run(everything, tmp_path):
    folder = everything[0]
    assert train.rows_to_run(folder) == list(train.HEADLINE)
    assert train.rows_to_run(tmp_path) == list(train.EMBEDDED)
    every = train.rows_to_run(folder, everything=True)
    assert every[:3] == list(train.HEADLINE) and len(set(every)) == len(every)
    assert set(PRINTED) - set(every) == {"glagcn-gt-243-reconstruct-512"}
    chain = ["gridconv-gt-learnable", "gridconv-3dhp-cross"]
    assert train.rows_to_run(folder, "gridconv-3dhp-cross") == chain
    shutil.copy(folder / "data_test_3dhp.npz", tmp_path)  # alone it trains nothing
    assert train.rows_to_run(tmp_path, everything=True) == list(train.EMBEDDED)
    rejected("data_3d_h36m.npz", train.rows_to_run, tmp_path, "gridconv-gt")


def test_settings_changed_names_what_differs_from_the_published_row():
    recipe = train.RECIPES["gridconv-gt"]
    assert train.settings_changed(recipe) == ""
    moved = replace(recipe, epochs=10.0, seed=3, precision="bf16", compile=True, micro_batch=9)
    assert train.settings_changed(moved) == "epochs 10.0 (published: 100.0)"
    assert train.settings_changed(tiny_recipe()) == ""


def test_list_says_what_is_here(everything, tmp_path, capsys):
    here = {}
    for folder in (everything[0], tmp_path):
        train.main(["--list", "--data", str(folder)])
        lines = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
        cells = [[cell.strip() for cell in line.split("|")] for line in lines]
        rows = {row[1]: row[3:6] for row in cells}
        here[folder] = {name for name, row in rows.items() if row[1] == "yes"}
    assert max(map(len, lines)) <= 120 and set(train.RECIPES) < set(rows)
    assert rows["gridconv-3dhp-cross"][:2] == ["72.1/89.2/57.6", "no"]
    assert rows["glagcn-gt-243-reconstruct-512"][2] == "48.64 M"
    assert here[tmp_path] == set(train.EMBEDDED) and set(PRINTED) < here[everything[0]]


def test_training_beats_the_affine_yardstick(tmp_path, monkeypatch, capsys):
    whole = data.synthesize
    monkeypatch.setattr(data, "synthesize", lambda seed: whole(seed, frames=60))
    options = "--hidden 16 --blocks 1 --attention= --batch 32 --epochs 5 --lr 1e-2 --eval-every 9"
    train.main(["gridconv-synthetic", "--out", str(tmp_path), *options.split()])
    told = capsys.readouterr().out
    result = data.read_json(tmp_path / "result.json")
    yardsticks = result["yardsticks"]
    assert result["last"]["mpjpe"] < yardsticks["affine"] < yardsticks["mean_pose"]
    weights = tmp_path / "model.pt"
    assert f"python eval.py {weights}" in told
    assert f"lift KEYPOINTS --model {weights}" in told
    assert f"{result['last']['mpjpe']:.2f}" in told


def reproduce_sh(place, *words, **environment):
    """bash reproduce.sh of a copy of the program in a folder."""
    place.mkdir(exist_ok=True)
    for path in [*HERE.glob("*.py"), HERE / "reproduce.sh", HERE / "requirements.txt"]:
        shutil.copy(path, place)
    unset = dict(PYTHON="", DATA="", RESULTS="", OMP_NUM_THREADS="1")
    words = ["bash", place / "reproduce.sh", *words]
    return subprocess.run(words, capture_output=True, text=True, cwd=place.parent,
                          env={**os.environ, **unset, **environment})


def test_reproduce_sh_on_a_miniature(everything, tmp_path):
    paths = dict(PYTHON=sys.executable, DATA=str(everything[0]), RESULTS=str(tmp_path / "r"))
    tiny = "--hidden 4 --blocks 1 --channels 4 --filter-widths 3,3 --epochs 0.02 --batch 50"
    done = reproduce_sh(tmp_path / "copy", *tiny.split(), **paths)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "r" / "report.md").read_text()
    assert all(name in done.stdout and name in report for name in train.HEADLINE)
    assert not re.search(r"\b(37\.10?|36\.40?|28\.50?|22\.00?)\b", report)  # the papers'
    assert "epochs 0.02 (published: 100.0)" in report
    paths["DATA"] = str(tmp_path)
    bad = reproduce_sh(tmp_path / "copy", "--only", "gridconv-gt", **paths)
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    assert "data_3d_h36m.npz" in bad.stderr


@pytest.mark.parametrize("layout", ["bin/python", "Scripts/python.exe"])
def test_reproduce_sh_sets_up_finds_its_python_and_bounds_spinning(tmp_path, layout):
    """With a stand-in for Python that makes a venv and says how it was called."""
    place, python = tmp_path / "copy", tmp_path / "python3"
    python.write_text(f"""#!/bin/sh
if [ "$2" = venv ]; then mkdir -p .venv/$(dirname {layout}) && cp "$0" .venv/{layout}; exit; fi
echo "$0 $GOMP_SPINCOUNT $*"
""")
    python.chmod(0o755)
    environment = dict(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", OMP_WAIT_POLICY="")
    done = reproduce_sh(place, "--setup", **environment)
    assert done.returncode == 0 and "train.py" not in done.stdout
    installed, wanted = place / ".venv" / "installed.txt", place / "requirements.txt"
    assert installed.read_text() == wanted.read_text()
    done = reproduce_sh(place, "--test", "-x", **environment)
    assert f".venv/{layout}" in done.stdout and done.stdout.strip().endswith("-m pytest -x")
    for spins, bounded in (("7", "7"), ("", "1000")):
        done = reproduce_sh(place, "--all", **environment, GOMP_SPINCOUNT=spins)
        assert f" {bounded} train.py reproduce --data data --out results --all" in done.stdout


# ---- the command line

@pytest.mark.parametrize("words, names", [
    ("gridcnv-gt", "gridconv-gt"), ("gridconv-gt --data nowhere", "nowhere"),
    ("glagcn-synthetic --out /proc/no", "/proc/no"), ("glagcn-synthetic --epochs x", "--epochs"),
    ("gridconv-synthetic --epochs nan", "epochs: nan"),
    ("gridconv-synthetic --schedule odd", "odd"), ("gridconv-synthetic --padding odd", "odd"),
    ("gridconv-synthetic --device abacus", "abacus"), ("gridconv-synthetic --grid 5", "grid"),
    ("glagcn-synthetic --hidden 8", "--hidden"), ("glagcn-humaneva-gt --refine", "refine"),
    ("gridconv-3dhp-cross --out x", "--out gridconv-gt-learnable"), ("--list --lr 1", "--lr"),
    ("ablate", "TABLE"), ("ablate table-9", "table-9"), ("ablate lifters --lr 1", "rows set lr"),
    ("ablate gridconv-5 --seeds 0", "--seeds"), ("bench --seeds 2", "--seeds"),
    ("ablate gridconv-5 --only random;shuffled", "shuffled"),
    ("report --minutes 3", "--minutes"), ("reproduce --only gridconv-gtt", "gridconv-gt"),
    ("reproduce --seed 5", "--seed"), ("reproduce --hidden x", "--hidden")])
def test_bad_commands_end_in_one_line_and_status_2(tmp_path, monkeypatch, words, names):
    monkeypatch.chdir(tmp_path)
    refused("train.py", *words.split(" "), names=names)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("name, words", [
    ("ablate", "TABLE --epochs"), ("bench", "--full-size"), ("report", "folder"),
    ("reproduce", "--all --seeds"), ("glagcn-gt-27", "[ranger] [512] --channels lambda"),
    ("gridconv-gt", "[adam] [200] --hidden sigmoid")])
def test_help_shows_each_commands_own_settings(name, words):
    status, told, _ = command("train.py", name, "--help")
    assert status == 0 and all(word in told for word in words.split())
    assert {"glagcn-gt-27": "--hidden", "gridconv-gt": "--channels"}.get(name, "--x") not in told
    assert "torchrun" in command("train.py", "--help")[1]


@pytest.mark.parametrize("words, field, value", [
    ("--kernel-sizes 3,3:3,1", "kernel_sizes", (3, (3, 3), 1)),
    ("--padding zeros,replicate:zeros", "padding", ("zeros", ("replicate", "zeros"))),
    ("--flips", "flips", True), ("--flips no", "flips", False),
    ("--lr 0.5", "lr", 0.5), ("--batch 7", "batch", 7),
    ("--dataset mocap", "data", "mocap"), ("--attention=", "attention", "")])
def test_options_become_recipe_fields(monkeypatch, words, field, value):
    seen = mock.Mock(return_value=None)
    monkeypatch.setattr(train, "run_recipe", seen)
    train.main(["gridconv-gt", *words.split(), "--data", "there", "--device", "cpu"])
    want = replace(train.RECIPES["gridconv-gt"], **{field: value})
    seen.assert_called_once_with(want, "there", "results/gridconv-gt", "cpu")


# ---- on a GPU: pytest -m gpu

GPU_METHODS = {
    "gridconv": {}, "grid loss": dict(loss="grid", layout="released"),
    "autogrids": dict(layout="autogrids"), "uvd": dict(target="uvd"),
    "temporal": dict(method="gridconv-temporal", filter_widths=(3, 3), flips=True),
    "fc": dict(method="fc"), "gcn": dict(method="gcn"), "glagcn": TINY_GLA,
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
    recipe = replace(noisy(method, 2.0), deterministic=True, precision="float32")
    try:
        run_twice(run_folder, monkeypatch, recipe, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.parametrize("fields", [dict(precision="bf16"), dict(precision="tf32"),
                                    dict(micro_batch=16), dict(compile=True)], ids=str)
@pytest.mark.parametrize("base", [dict(attention=""), {**TINY_GLA, "batch": 64}],
                         ids=["gridconv", "glagcn"])
def test_every_way_of_executing_takes_nearly_the_same_steps(run_folder, base, fields):
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
    any_batch = ({0: "batch"},)
    torch.onnx.export(net, (pose,), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=any_batch)
    session, pose = onnxruntime.InferenceSession(tmp_path / "net.onnx"), torch.rand(5, 17, 2)
    got, = session.run(None, {session.get_inputs()[0].name: pose.numpy()})
    assert_allclose(got, net(pose).detach().numpy(), atol=1e-5)
