"""Evaluation: metrics, protocols, checkpoints, tables beside the papers' figures.

    python eval.py CHECKPOINT --data DIR        # the table of one model on one dataset
    python eval.py RELEASED.pth.tar --data DIR --padding circular,zeros
    python eval.py inspect CHECKPOINT           # the grid a model works on, learnt or given
    python eval.py lift KEYPOINTS               # a user's own 2D keypoints to 3D poses

    model = load_model("results/gridconv-mocap/best.pt")
    store = data.make_store(model.recipe, "data", "test")
    scores = evaluate(model, store)             # scores["mpjpe"], in mm
    mean(scores["rows"], by="action")           # {"walk": {"frames": ..., "mpjpe": ...}}

The way of a figure: `predict` poses on the device, `score` them there (one row a sequence), `mean`
of rows for every table, one result (a dict), one `report` of it.
"""
import argparse
import difflib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import data  # before torch: it bounds how long OpenMP's threads spin

import numpy as np
import torch

import glagcn
import gridconv
from data import InputError, Parser

# ----------------------------------------------------------------------------------------------
# Metrics: (frames, J, 3) tensors in metres in, one Python float out

def exact(pose):
    """The pose in float64, on its device; on the CPU where the device (Apple's mps) has none."""
    if pose.device.type == "mps":
        pose = pose.cpu()
    return pose.detach().double()


def check_pair(prediction, target):
    """Both poses in float64; InputError unless both are finite (frames, J, 3) of one shape."""
    for name, pose in (("prediction", prediction), ("target", target)):
        found = tuple(pose.shape) if torch.is_tensor(pose) else type(pose).__name__
        if not torch.is_tensor(pose) or pose.ndim != 3 or pose.shape[2] != 3 or 0 in pose.shape:
            raise InputError(f"{name}: (frames, joints, 3) in metres expected, {found} found")
        bad = (~pose.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            raise InputError(f"{name}: NaN or infinite coordinates in frame {bad[0].item()}")
    if prediction.shape != target.shape:
        raise InputError(f"prediction {[*prediction.shape]} and target {[*target.shape]} differ")
    return exact(prediction), exact(target)


def distance(prediction, target):
    """The Euclidean distance of every joint, (frames, J) in mm."""
    return 1000 * (prediction - target).norm(dim=-1)


def align(prediction, target):
    """Each frame's prediction (frames, J, 3), float64, after the best similarity s p R + t.

    Minimises sum_j ||s p_j R + t - t_j||^2 over rotations R (Umeyama 1991, Eq. 40-42). With the
    centred poses' p^T t = U S V^T: R = U D V^T and s = tr(S D) / sum ||p||^2, where
    D = diag(1, 1, det(U V^T)) keeps R from reflecting. A prediction whose joints all coincide has
    no scale: it is moved onto the target's mean.
    """
    centre = target.mean(1, keepdim=True)
    p = prediction - prediction.mean(1, keepdim=True)
    U, S, Vt = torch.linalg.svd(p.mT @ (target - centre))  # (frames, 3, 3), (frames, 3)
    D = torch.ones_like(S)
    D[:, 2] = torch.linalg.det(U @ Vt).sign()
    square = p.square().sum((1, 2))
    scale = torch.where(square > 0, (S * D).sum(1) / square, 0.0)
    return scale[:, None, None] * p @ (U * D[:, None]) @ Vt + centre


def rescale(prediction, target):
    """Each frame's prediction (frames, J, 3) times its best scale <p, t> / <p, p>; 0 for p = 0."""
    square = prediction.square().sum((1, 2), keepdim=True)
    product = (prediction * target).sum((1, 2), keepdim=True)
    return torch.where(square > 0, product / square, 0.0) * prediction


def below(errors, threshold):
    """The percentage of each frame's errors (frames, J), mm, that are below: (frames,)."""
    return 100 * (errors < threshold).double().mean(1)


def area(errors):
    """The mean of `below` over the 31 thresholds 0, 5, ..., 150 mm: (frames,)."""
    return torch.stack([below(errors, threshold) for threshold in range(0, 151, 5)]).mean(0)


def mpjpe(prediction, target):
    """Mean per-joint position error in mm: the mean of ||p - t|| (Human3.6M's protocol 1, P1).

    Poses (frames, J, 3) in metres, both root-relative; other shapes, NaN and infinities are an
    InputError, here and in every metric below."""
    return distance(*check_pair(prediction, target)).mean().item()


def p_mpjpe(prediction, target):
    """MPJPE in mm after each frame's best similarity alignment, without reflection: `align`.

    Human3.6M's second protocol (P2), as in Martinez et al. 2017 and VideoPose3D."""
    prediction, target = check_pair(prediction, target)
    return distance(align(prediction, target), target).mean().item()


def n_mpjpe(prediction, target):
    """MPJPE in mm after each frame's best scale: `rescale` (Rhodin et al. 2018, VideoPose3D)."""
    prediction, target = check_pair(prediction, target)
    return distance(rescale(prediction, target), target).mean().item()


def mpjve(prediction, target):
    """Mean per-joint velocity error in mm a frame: MPJPE of the differences over time.

    VideoPose3D, Section 4. All frames belong to one sequence; fewer than two are an InputError."""
    prediction, target = check_pair(prediction, target)
    if len(target) < 2:
        raise InputError("prediction: at least 2 frames expected, 1 found")
    return distance(prediction.diff(dim=0), target.diff(dim=0)).mean().item()


def pck(prediction, target, threshold=150.0):
    """The percentage of joints with an error strictly below `threshold` mm (MPI-INF-3DHP)."""
    return below(distance(*check_pair(prediction, target)), threshold).mean().item()


def auc(prediction, target):
    """Mean PCK in % over the thresholds 0, 5, ..., 150 mm (MPI-INF-3DHP's area under the curve).

    At 0 mm no joint counts, so a perfect prediction has 96.77, as in the benchmark's own tool."""
    return area(distance(*check_pair(prediction, target))).mean().item()


# ----------------------------------------------------------------------------------------------
# Devices

OTHERWISE = "install an older torch (pytorch.org: previous versions) or give --device cpu"


def check_driver():
    """InputError where there is an NVIDIA driver that torch cannot use, unless it is hidden."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return
    driver = re.search(r"\d{3}\.\d+(\.\d+)?", said)  # 535.104.05
    if driver:
        raise InputError(f"NVIDIA driver {driver[0]} is of no use to torch {torch.__version__} "
                         f"(CUDA 13 needs 580 or newer): update it, {OTHERWISE}")


def check_card(device):
    """InputError where this build of torch has no code for a CUDA device's architecture."""
    major, minor = torch.cuda.get_device_capability(device)
    least = min(int(re.search(r"\d+", name)[0]) for name in torch.cuda.get_arch_list())  # sm_75
    if 10 * major + minor < least:
        card = torch.cuda.get_device_name(device)
        raise InputError(f"{card} has capability {major}.{minor}, below {least / 10}: {OTHERWISE}")


def pick_device(name=None, precision="auto"):
    """(device, precision): the one place that picks a device and sets how it multiplies.

    By default CUDA where there is one; under torchrun (LOCAL_RANK) each process takes its own card
    before any context is opened. `precision` "auto" is tf32 on CUDA (as the releases ran, for
    matrix products and convolutions alike) and float32 elsewhere; float32, tf32 and bf16 stay.
    InputError: an unknown or unusable device, an NVIDIA driver or card that this torch cannot use.
    """
    if name is None or name.startswith("cuda"):
        check_driver()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(device)
            check_card(device)
        torch.zeros(1, device=device).cpu()  # a meta device has no numbers to give back
    except (AssertionError, ImportError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"--device {name}: unusable here ({reason}); --device cpu works") from None
    if precision == "auto":
        precision = "tf32" if device.type == "cuda" else "float32"
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"  # convolutions', by default on
    return device, precision


def device_name(device):
    """What a device is called in reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {torch.get_num_threads()}"


# ----------------------------------------------------------------------------------------------
# Models from recipes

# Each method's network, and the fields of a recipe that it takes as they are.
NETWORKS = {
    "gridconv": (gridconv.GridLiftingNetwork,
                 ("hidden", "blocks", "kernel_sizes", "padding", "dropout")),
    "gridconv-temporal": (gridconv.TemporalGridLiftingNetwork,
                          ("filter_widths", "hidden", "padding", "dropout")),
    "glagcn": (glagcn.GLAGCN,
               ("filter_widths", "channels", "reconstruct", "reconstruct_blocks",
                "unshared_weight", "dropout", "causal", "adaptive", "temporal", "head",
                "normalisation", "input_norm")),
    "fc": (gridconv.FullyConnectedLifter, ("hidden", "blocks", "dropout")),
    "gcn": (gridconv.GraphConvLifter, ("hidden", "blocks", "dropout"))}
HANDCRAFTED = {(17, (5, 5)): gridconv.HANDCRAFTED_5X5, (32, (7, 5)): gridconv.HANDCRAFTED_7X5}
LAYOUTS = ("handcrafted", "released", "random", "row", "column", "global", "autogrids",
           "autogrids-random")


def tuples(value, depth=3):
    """Lists, as a file keeps them, back into tuples; ValueError for what no recipe holds."""
    if not isinstance(value, (list, tuple)):
        return value
    if depth == 0 or len(value) > 100:
        raise ValueError("lists nested deeper or longer than a recipe's")
    return tuple(tuples(part, depth - 1) for part in value)


def grid_layout(recipe):
    """The layout that a GridConv recipe names: a nested tuple of joints, or an AutoGrids.

    "row", "column" and "global" are shuffles of the handcrafted one (Table B)."""
    joints = len(data.SKELETONS[recipe.skeleton].joints)
    grid, name, seed = tuples(recipe.grid), recipe.layout, recipe.layout_seed
    if name not in LAYOUTS:
        raise InputError(f"layout {name!r}: {', '.join(LAYOUTS)} expected")
    designed = HANDCRAFTED.get((joints, grid))
    if name == "random":
        return gridconv.random_layout(joints, grid, seed)
    if name == "autogrids" and designed:
        return gridconv.AutoGrids(joints, grid, prior=designed)
    if name in ("autogrids", "autogrids-random"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # which alone decides the start: see learnt_grid
            return gridconv.AutoGrids(joints, grid, prior="random")
    if designed is None or (name == "released" and joints != 17):
        raise InputError(f"no {name} layout of {joints} joints on {grid[0]} x {grid[1]}")
    if name == "released":
        return gridconv.RELEASED_5X5
    if name == "handcrafted":
        return designed
    return gridconv.shuffle_layout(designed, name, seed)


def glagcn_edges(skeleton, keypoints, input_norm):
    """GLA-GCN's links for a skeleton.

    The release's HumanEva-I model on MRCNN's 2D, which leaves out the input's batch norm, was
    trained with twelve links that leave two limbs unconnected."""
    edges = {"h36m17": glagcn.H36M_EDGES, "3dhp17": glagcn.MPI3DHP_EDGES,
             "humaneva15": glagcn.HUMANEVA15_EDGES}
    if keypoints == "detectron_pt_coco" and not input_norm:
        edges["humaneva15"] = glagcn.HUMANEVA15_DETECTED_EDGES
    if skeleton not in edges:
        raise InputError(f"GLA-GCN's skeletons are {', '.join(edges)}, not {skeleton!r}")
    return edges[skeleton]


def build_model(recipe):
    """The network that a recipe describes, untrained, with `.recipe` set.

    `recipe` is any object with the fields method, skeleton, keypoints, those that NETWORKS names
    for its method, and for grids layout, layout_seed, grid, temperature and attention. Unknown
    names and impossible sizes are a ValueError.
    """
    if recipe.method not in NETWORKS:
        raise InputError(f"method {recipe.method!r}: {', '.join(NETWORKS)} expected")
    if recipe.skeleton not in data.SKELETONS:
        raise InputError(f"skeleton {recipe.skeleton!r}: {', '.join(data.SKELETONS)} expected")
    method, skeleton = recipe.method, data.SKELETONS[recipe.skeleton]
    network, fields = NETWORKS[method]
    options = {name: tuples(getattr(recipe, name)) for name in fields}
    if method in ("gridconv", "gridconv-temporal"):
        options["layout"] = grid_layout(recipe)
    if method == "gridconv":
        options["attention"] = recipe.attention or None
    if method == "glagcn":
        options["edges"] = glagcn_edges(recipe.skeleton, recipe.keypoints, recipe.input_norm)
    if method == "gcn":
        options["edges"] = skeleton.edges
    model = network(len(skeleton.joints), **options)
    if "layout" in options:
        if not 0 < recipe.temperature < math.inf:
            raise InputError(f"temperature {recipe.temperature}: a number above 0 expected")
        model.temperature = recipe.temperature
    model.recipe = recipe
    return model


# ----------------------------------------------------------------------------------------------
# Checkpoints: this project's, and both releases'

# What the releases' code, rather than their files, fixes for every checkpoint; None: asked for.
RELEASED = dict(row="the authors' weights", released=True, keypoints=None, target="camera")
RELEASED_GRIDCONV = dict(RELEASED, method="gridconv", skeleton="h36m17", data="h36m", padding=None,
                         skip="gridconv", normalise="release-500", flip_test=False)
RELEASED_GLAGCN = dict(RELEASED, method="glagcn", skeleton=None, data=None, filter_widths=None,
                       skip="", normalise="width", flip_test=True)
# What neither release's files nor this project's older ones say.
NOT_SAID = dict(cameras="recorded", noise=0.0, missing=0.0, swap_sides=False, weights="",
                actions=data.HUMANEVA_ACTIONS, normalisation="column", input_norm=True)
FACTS = ("padding", "filter_widths", "skeleton")  # which a release's file does not say
CHOICES = ("data", "keypoints", "cameras")  # what any model can be measured on
# What data.provenance calls the training data of the papers' models.
TRAINED_ON = {"h36m": "Human3.6M", "gridconv": "Human3.6M",
              "humaneva": "files in HumanEva-I layout", "3dhp": "files in MPI-INF-3DHP layout"}


def released_gridconv(state, recipe):
    """(model, recipe) of GridConv's weights, which do not say the padding.

    The 2D follows from the padding where there is attention: zeros went with HRNet's."""
    padding = recipe["padding"]
    if not padding:
        raise InputError("it does not say its padding: give --padding circular,replicate")
    model = gridconv.from_released(state, padding)
    attention = "atten_conv1.fc.weight" in state
    keypoints = "hrnet" if attention and "zeros" in padding else "gt"
    name, layout = f"gridconv-{keypoints}", "released"
    if model.autogrids is not None:
        name, layout = f"{name}-learnable", "autogrids"
    return model, {**recipe, "name": name, "keypoints": keypoints, "layout": layout}


def released_glagcn(state, recipe):
    """(model, recipe) of GLA-GCN's weights, which say neither filter widths nor 17 joints' links.

    HumanEva-I's 2D decides between two lists of links and about the input's batch norm."""
    if "expand_gcn.gcn1.PA" not in state:
        raise InputError("no expand_gcn of a released GLA-GCN in it")
    joints = state["expand_gcn.gcn1.PA"].shape[-1]  # of (3, J, J)
    widths, keypoints = recipe["filter_widths"], recipe["keypoints"]
    skeleton = recipe["skeleton"] or ("humaneva15" if joints == 15 else None)
    if not widths or skeleton is None:
        raise InputError("give --filter-widths, as 3,3,3, and --skeleton h36m17 or 3dhp17")
    if skeleton == "humaneva15" and keypoints is None:
        raise InputError("its 2D decides its links: give --keypoints gt or detectron_pt_coco")

    norm = (skeleton, keypoints) != ("humaneva15", "detectron_pt_coco")
    edges = glagcn_edges(skeleton, keypoints, norm)
    model = glagcn.from_released(state, filter_widths=widths, edges=edges, input_norm=norm)
    home = {"h36m17": "h36m", "humaneva15": "humaneva", "3dhp17": "3dhp"}[skeleton]
    name = {part: name for name, part in NAMED_2D.items()}.get(keypoints, "other")
    name = f"glagcn-humaneva-{name}" if joints == 15 else f"glagcn-{name}-{math.prod(widths)}"
    said = {"name": name, "skeleton": skeleton, "data": home, "input_norm": norm}
    return model, {**recipe, **said}


def own_model(state, recipe):
    """(model, recipe) of this project's weights."""
    for name in (*CHOICES, "name", "method", "skeleton", "target", "normalise", "flip_test"):
        if name not in recipe:
            raise InputError(f"its recipe does not say its {name}; take another")
    # Even without memory a network takes time for each block, and for each tap of each cell.
    blocks = max(recipe.get("blocks", 0), recipe.get("reconstruct_blocks", 0))
    first, inner, last = recipe.get("kernel_sizes", (1, (1,), 1))
    taps = math.prod(recipe.get("grid", ())) * max(first, *inner, last) ** 2
    if blocks > len(state) or taps > 10 ** 5:
        raise InputError("weights and recipe do not fit: a larger network than they are")
    model = build_model(SimpleNamespace(**recipe))
    model.load_state_dict(state)
    return model, recipe


def recognise(content):
    """(build, recipe, state): how to read what a checkpoint holds; InputError: it is none."""
    content = content if isinstance(content, dict) else {type(content).__name__: None}
    build, recipe, state = released_gridconv, RELEASED_GRIDCONV, content.get("state_dict")
    if "model_pos" in content:
        build, recipe, state = released_glagcn, RELEASED_GLAGCN, content["model_pos"]
    if content.get("format") == "poselift":
        if content.get("version") != 1:
            raise InputError(f"version {content.get('version')!s:.20}: take newer code")
        build, recipe, state = own_model, content.get("recipe"), content.get("model")
    weights = state.values() if isinstance(state, dict) else [None]
    if not isinstance(recipe, dict) or not all(map(torch.is_tensor, weights)):
        found = ", ".join(sorted(map(str, content))) or "nothing"
        raise InputError(f"no checkpoint of this project or of a release: it holds {found:.200}")
    recipe = {**NOT_SAID, **recipe}
    if content.get("temperature") is not None:
        recipe["temperature"] = content["temperature"]  # that of the epoch, where it is annealed
    return build, recipe, state


def checked_state(state, size):
    """The weights of a file of `size` bytes by their plain names: DataParallel and torch.compile
    put a prefix before each. InputError: values that the file only claims, NaN and infinities."""
    if sum(value.nbytes for value in state.values()) > size:
        raise InputError("its weights claim more than the file holds: fetch it again")
    for name, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{name}: NaN or infinite weights; take another checkpoint")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): state[name] for name in state}


def load_model(path, **overrides):
    """The network in a checkpoint file, in evaluation mode on the CPU.

    It has `.recipe` (a SimpleNamespace; `crossed` says that it is to be measured on other data or
    2D than it was trained on), `.epoch`, `.licence` and `.trained_on`. Reads this project's
    checkpoints and both releases', told apart by their contents; nothing in a file is executed.
    Overrides (None: not given) are recipe fields: FACTS say what a release's file does not,
    CHOICES what to measure on. A needed one that is missing, an unknown one, a file that is
    damaged or something else, and weights that do not fit are an InputError that names the file.
    """
    content = data.read_torch(path, remedy="name a checkpoint", inert=True)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        build, known, state = recognise(content)
        facts = () if build is own_model else FACTS
        for name in given:
            if name not in known or name not in (*facts, *CHOICES):
                raise InputError(f"its {name} cannot be chosen: leave the option out")
            if name in facts or known[name] is None:
                known[name] = given[name]
        known = {name: tuples(value) for name, value in known.items()}
        state = checked_state(state, Path(path).stat().st_size)
        with warnings.catch_warnings(), torch.device("meta"):  # shapes first, memory after
            warnings.simplefilter("ignore")  # that these tensors take no values
            build(state, known)
        model, recipe = build(state, known)
    except ValueError as error:
        raise InputError(f"{path}: {' '.join(str(error).split()):.500}") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError):
        raise InputError(f"{path}: weights and recipe do not fit; take another") from None
    chosen = {name: given.get(name, recipe[name]) for name in CHOICES}
    chosen["name"] = one_line(recipe["name"])
    crossed = any(chosen[name] != recipe[name] for name in CHOICES)
    licence = content.get("licence")
    model.recipe = SimpleNamespace(**{**recipe, **chosen, "crossed": crossed})
    model.epoch = content.get("epoch")
    model.licence = one_line(licence) if licence else None
    model.trained_on = content.get("data", TRAINED_ON.get(str(recipe["data"]), ""))
    return model.eval()


# ----------------------------------------------------------------------------------------------
# Predictions and scores over a frame store

def mirrored(pose, mirror):
    """Poses (..., J, 2|3) with x negated and left and right exchanged; `mirror` (J,): see Skeleton.

    data.flip for tensors, without a constant to copy to the device at every call."""
    pose = pose.index_select(-2, mirror)
    pose[..., 0] *= -1
    return pose


@torch.no_grad()
def predict(model, store, index=None, flip=False, refinement=None, batch=None):
    """Root-relative poses (n, J, 3) in metres, on the store's device, of its frames `index`.

    All frames by default, `batch` at a time. The window around each is the model's
    `receptive_field`. `flip` averages with the prediction for the mirrored input, mirrored back
    (VideoPose3D's test-time augmentation). `refinement` is GLA-GCN's, which re-projects with the
    frames' true root positions and intrinsics. Modules are left in the mode that they were in.
    """
    weight, device = next(model.parameters()), store.input.device
    frames, causal = model.receptive_field, getattr(model, "causal", False)
    if index is None:
        index = torch.arange(len(store))
    if batch is None:  # on a CPU what stays in its cache: twice as fast
        most, most_frames = (4096, 32768) if weight.is_cuda else (256, 2048)
        batch = max(1, min(most, most_frames // frames))
    mirror = torch.tensor(store.skeleton.mirror, device=device)
    networks = torch.nn.ModuleList([model, refinement or torch.nn.Identity()])
    training = [module for module in networks.modules() if module.training]
    networks.eval()
    poses = []
    for part in torch.as_tensor(index).to(device).split(batch):
        window, _ = store.batch(part, frames=frames, causal=causal)  # (B, J, 2) or (B, T, J, 2)
        window = window.to(weight)
        pose = model(window)
        if flip:
            pose = (pose + mirrored(model(mirrored(window, mirror)), mirror)) / 2
        pose = store.to_camera(pose.to(store.pose_3d), part)
        if refinement is not None:
            intrinsics = store.normalised_intrinsics(part)
            pose = refinement(pose, store.input[part], intrinsics, store.root[part])
        poses.append(pose)
    for module in training:
        module.training = True
    return torch.cat(poses)


def evaluate(model, store, flip=False, refinement=None):
    """The `score` of a model's predictions (see `predict`) for every frame of a store."""
    return score(predict(model, store, flip=flip, refinement=refinement), store)


METRICS = {"mpjpe": "MPJPE", "pck": "PCK", "auc": "AUC", "p_mpjpe": "P-MPJPE",
           "n_mpjpe": "N-MPJPE", "mpjve": "MPJVE"}
# The 14 joints that MPI-INF-3DHP's own tool counts: all but pelvis, spine and head, which are 0, 7
# and 9 in Human3.6M's order.
JOINTS_3DHP = {"3dhp17": [*range(14)], "h36m17": [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]}
SCENES_3DHP = {"TS1": "studio, green screen", "TS2": "studio, green screen", "TS3": "studio",
               "TS4": "studio", "TS5": "outdoor", "TS6": "outdoor"}


@torch.no_grad()
def score(prediction, store, chunk=16384):
    """Scores of predictions (N, J, 3) in metres for every valid frame of a store, on its device.

    "mpjpe", "p_mpjpe", "n_mpjpe" (mm) and "mpjve" (mm a frame; None where no two frames follow
    each other), averaged as the data's protocol does (`headline`); "frames"; "rows": one a
    sequence, with its subject, action, frames, pairs of consecutive frames and means over them.
    On MPI-INF-3DHP's test set the predicted root is zeroed first, and there are "pck" and "auc"
    (%) over the benchmark's 14 joints; MPJPE is over all 17.
    """
    prediction, target = check_pair(prediction, store.pose_3d)
    kind, benchmark = protocol(store), None
    if kind == "3dhp":
        benchmark = JOINTS_3DHP[store.skeleton.name]
        prediction = prediction.clone()
        prediction[:, store.skeleton.root] = 0
    sums = 0.0
    for part in torch.arange(len(store), device=target.device).split(chunk):
        names, more = sums_by_sequence(prediction, target, store, part, benchmark)
        sums = sums + more
    rows = []
    for sequence, values in zip(store.sequences, sums.tolist()):  # the one transfer to the host
        action = sequence.action.split(" ")[0]  # of "Eating 1"
        row = {"subject": sequence.subject, "action": action}
        if kind == "3dhp":
            row["scene"] = SCENES_3DHP[sequence.subject]
        row |= zip(names, values)
        row |= {name: round(row[name]) for name in ("frames", "pairs")}
        for name in METRICS:
            if name in row:
                count = row[weight_of(name)]
                row[name] = row[name] / count if count else None
        rows.append(row)
    return {**headline(rows, kind), "rows": rows}


def sums_by_sequence(prediction, target, store, part, benchmark):
    """(names, (S, names)): sums over each sequence's frames among `part` (n,), consecutive ones.

    A velocity belongs to the first of two frames: both valid, and of one sequence."""
    after = (part + 1).clamp(max=len(store) - 1)
    motion, true_motion = prediction[after] - prediction[part], target[after] - target[part]
    valid, sequence = store.valid.to(part.device), store.sequence.to(part.device)
    paired = valid[part] & valid[after] & (sequence[part] == sequence[after]) & (after > part)

    pose, target = prediction[part], target[part]
    errors = distance(pose, target)
    one = torch.ones_like(errors[:, 0])
    values = {"frames": one, "pairs": one, "mpjpe": errors.mean(1)}
    if benchmark is not None:
        values["pck"] = below(errors[:, benchmark], 150)
        values["auc"] = area(errors[:, benchmark])
    values["p_mpjpe"] = distance(align(pose, target), target).mean(1)
    values["n_mpjpe"] = distance(rescale(pose, target), target).mean(1)
    values["mpjve"] = distance(motion, true_motion).mean(1)
    table = torch.stack(list(values.values()), 1)
    counted = [paired if name in ("pairs", "mpjve") else valid[part] for name in values]
    table = torch.where(torch.stack(counted, 1), table, 0.0)
    sums = table.new_zeros(len(store.sequences), len(values))
    return list(values), sums.index_add_(0, sequence[part], table)


def weight_of(metric):
    """What a row's figure is a mean over: its frames, or its pairs of frames."""
    return "pairs" if metric == "mpjve" else "frames"


def mean(rows, by=None, weighted=True):
    """The rows as one, each figure the mean over all their frames; with `by` {group: row}.

    `by` names a column ("action", "subject", "scene"), or several: then groups are tuples.
    weighted=False is the plain average over the rows that have the figure."""
    if by is not None:
        group_of = itemgetter(by) if isinstance(by, str) else itemgetter(*by)
        groups = {}
        for row in rows:
            groups.setdefault(group_of(row), []).append(row)
        return {group: mean(some, None, weighted) for group, some in groups.items()}
    whole = {name: sum(row[name] for row in rows) for name in ("frames", "pairs")}
    for name in METRICS:
        if name in rows[0]:
            counted = [row for row in rows if row[name] is not None]
            weights = [row[weight_of(name)] if weighted else 1 for row in counted]
            total = sum(row[name] * weight for row, weight in zip(counted, weights))
            whole[name] = total / sum(weights) if counted else None
    return whole


def protocol(store):
    """Whose protocol a store's figures are averaged by: h36m, humaneva, 3dhp, or "" for none."""
    if all(sequence.subject in SCENES_3DHP for sequence in store.sequences):
        return "3dhp"
    if store.skeleton.name == "humaneva15":
        return "humaneva"
    layout = "files in Human3.6M layout"
    return "h36m" if all(s.source.startswith(layout) for s in store.sequences) else ""


def headline(rows, kind):
    """The figures that papers quote, from rows: unweighted over the actions on Human3.6M, over the
    pairs of action and subject on HumanEva-I; elsewhere over all (3DHP: valid) frames."""
    columns = {"h36m": "action", "humaneva": ("action", "subject")}
    if kind not in columns:
        return mean(rows)
    return mean(list(mean(rows, columns[kind]).values()), weighted=False)


@torch.no_grad()
def yardsticks(train_store, test_store, chunk=65536):
    """What a figure is to be read against, in mm of MPJPE over every valid test frame.

    {"mean_pose": the training set's mean pose predicted for every frame; "affine": the
    least-squares affine map from the J*2 normalised inputs to the J*3 coordinates}. Float64 normal
    equations of the centred training data; input directions without variance (coinciding joints)
    get weight zero.
    """
    train_store.redraw(0)  # not the epoch's that came last

    def parts(store):
        """Inputs (n, J*2) and poses (n, J*3) of the valid frames, chunk by chunk."""
        for part in torch.arange(len(store), device=store.input.device).split(chunk):
            part = part[store.valid[part]]
            yield exact(store.input[part].flatten(1)), exact(store.pose_3d[part].flatten(1))

    count = train_store.valid.sum().item()
    mean_x = sum(x.sum(0) for x, _ in parts(train_store)) / count
    mean_y = sum(y.sum(0) for _, y in parts(train_store)) / count
    gram = sum((x - mean_x).T @ (x - mean_x) for x, _ in parts(train_store))  # (2J, 2J)
    cross = sum((x - mean_x).T @ (y - mean_y) for x, y in parts(train_store))  # (2J, 3J)
    weight = torch.linalg.pinv(gram.cpu(), rtol=1e-13, hermitian=True).to(gram.device) @ cross

    totals = {"mean_pose": 0.0, "affine": 0.0}
    for x, y in parts(test_store):
        guesses = {"mean_pose": mean_y.expand_as(y), "affine": mean_y + (x - mean_x) @ weight}
        for name, guess in guesses.items():
            errors = distance(guess.unflatten(1, (-1, 3)), y.unflatten(1, (-1, 3)))
            totals[name] += errors.mean(1).sum()
    return {name: (total / test_store.valid.sum()).item() for name, total in totals.items()}


# ----------------------------------------------------------------------------------------------
# Tables beside the papers' figures

ACTIONS = ("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing",
           "Purchases", "Sitting", "SittingDown", "Smoking", "Waiting", "WalkDog", "Walking",
           "WalkTogether")
WALK_AND_JOG = ("Walking S1", "Walking S2", "Walking S3", "Jog S1", "Jog S2", "Jog S3")
# The papers' rows by recipe, in mm: the 15 actions (GridConv's Tables 1 and A, GLA-GCN's Tables 1
# and 4), or HumanEva-I's pairs of action and subject (GLA-GCN's Table 2); then the average.
PAPER = {
    "gridconv-hrnet-learnable": {
        "mpjpe": (43.1, 47.7, 44.8, 44.9, 50.7, 55.1, 46.3, 42.6,
                  53.7, 63.9, 46.3, 45.5, 50.1, 38.6, 40.1, 47.6),
        "p_mpjpe": (33.1, 37.2, 35.7, 36.3, 39.3, 43.8, 34.4, 33.1,
                    43.0, 52.5, 37.4, 34.8, 39.4, 29.5, 32.2, 37.4)},
    "gridconv-hrnet-uvd": {
        "mpjpe": (39.9, 47.7, 44.7, 43.9, 49.2, 53.5, 44.4, 43.7,
                  53.1, 61.6, 45.4, 44.7, 47.4, 37.7, 37.9, 46.3),
        "p_mpjpe": (33.3, 37.9, 36.4, 36.2, 39.0, 44.6, 34.4, 34.3,
                    43.2, 52.5, 37.4, 34.7, 38.9, 29.5, 32.0, 37.6)},
    "glagcn-cpn-243": {
        "mpjpe": (41.3, 44.3, 40.8, 41.8, 45.9, 54.1, 42.1, 41.5,
                  57.8, 62.9, 45.0, 42.8, 45.9, 29.4, 29.9, 44.4),
        "p_mpjpe": (32.4, 35.3, 32.6, 34.2, 35.0, 42.1, 32.1, 31.9,
                    45.5, 49.5, 36.1, 32.4, 35.6, 23.5, 24.7, 34.8)},
    "glagcn-gt-243": {
        "mpjpe": (26.5, 27.2, 29.2, 25.4, 28.2, 31.7, 29.5, 26.9,
                  37.8, 39.9, 29.9, 27.0, 27.3, 20.5, 20.8, 28.5),
        "p_mpjpe": (20.2, 21.9, 21.7, 19.9, 21.6, 24.7, 22.5, 20.8,
                    28.6, 33.1, 22.7, 20.6, 20.3, 15.9, 16.2, 22.0)},
    "glagcn-gt-243-reconstruct-512": {
        "mpjpe": (20.1, 21.2, 20.0, 19.6, 21.5, 26.7, 23.3, 19.8,
                  27.0, 29.4, 20.8, 20.1, 19.2, 12.8, 13.8, 21.0),
        "p_mpjpe": (16.6, 18.1, 16.2, 17.0, 17.0, 22.2, 19.0, 17.1,
                    22.4, 25.9, 17.5, 16.4, 16.3, 10.8, 11.6, 17.6)},
    "glagcn-humaneva-mrcnn": {"p_mpjpe": (12.5, 9.1, 26.9, 18.5, 12.7, 12.8, 15.4)},
    "glagcn-humaneva-gt": {"p_mpjpe": (8.7, 6.8, 11.5, 10.1, 8.2, 9.9, 9.2)}}
# The 2D that a part of a published row's name stands for.
NAMED_2D = {"gt": "gt", "hrnet": "hrnet", "cpn": "cpn_ft_h36m_dbb", "mrcnn": "detectron_pt_coco"}
BEST = "Best epoch on the test set, as the papers choose it"


def compares(recipe, test_data, trained_on):
    """Whether a figure may stand beside the paper's of the recipe's name.

    test_data and trained_on are what data.provenance calls both sets. They must be the papers'
    own (HumanEva-I's files are taken at their word: no frame counts of it are published), and the
    2D that of the row and that which the model was trained on.
    """
    if data.GENUINE.get(recipe.data) != test_data or getattr(recipe, "crossed", False):
        return False
    parts = recipe.name.split("-")
    if any(part in parts and recipe.keypoints != wanted for part, wanted in NAMED_2D.items()):
        return False
    if any((part in parts) != (recipe.data == part) for part in ("humaneva", "3dhp")):
        return False
    source = "h36m" if getattr(recipe, "weights", "") else recipe.data  # of a cross-dataset row
    return trained_on == TRAINED_ON[source]


def markdown(header, rows):
    """A markdown table with aligned columns: figures to the right, words to the left.

    Floats have two decimals, None shows as -."""
    columns = []
    for cells in zip(header, *rows):
        cells = ["-" if cell is None else cell for cell in cells]
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        width = max(map(len, cells))
        if any(re.search("[A-Za-z]", cell) for cell in cells[1:]):
            cells, rule = [cell.ljust(width) for cell in cells], "-" * width
        else:
            cells, rule = [cell.rjust(width) for cell in cells], "-" * (width - 1) + ":"
        columns.append([cells[0], rule, *cells[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns))


def score_table(first, groups, printed=None):
    """A table of score rows {name: row}; `printed` {metric: {name: the paper's figure}}."""
    rows, printed = list(groups.values()), printed or {}
    columns = {first: list(groups), "frames": [row["frames"] for row in rows]}
    for metric, title in METRICS.items():
        if metric in rows[0]:
            columns[title] = [row[metric] for row in rows]
        if metric in printed:
            columns[title + ", paper"] = [printed[metric].get(name) for name in groups]
    return markdown(columns, zip(*columns.values()))


def printed_figures(recipe, rows, last_row):
    """{metric: {row of the table: the paper's figure}} for a recipe (a dict)."""
    averages = {metric: recipe.get("paper_" + metric) for metric in METRICS}
    printed = {metric: {last_row: figure} for metric, figure in averages.items() if figure}
    for metric, figures in PAPER.get(recipe["name"], {}).items():
        printed[metric] = dict(zip((*rows, last_row), figures))
    return printed


def scores_text(scores, recipe, with_paper):
    """The tables of one epoch's scores: by action (HumanEva-I: and subject), then by subject; on
    3DHP's test set by sequence and scene. The last row is the protocol's."""
    rows, text = scores["rows"], ""
    subjects = dict(sorted(mean(rows, "subject").items()))
    first, printed_rows, last_row = "action", ACTIONS, "all frames"
    groups = mean(rows, "action")
    if "scene" in rows[0]:
        first, groups = "sequence", {**subjects, **mean(rows, "scene")}
        text = "PCK at 150 mm and AUC in %, over the benchmark's 14 joints:\n\n"
    elif recipe["data"] in ("h36m", "gridconv"):
        last_row = "average over actions"
    elif recipe["data"] == "humaneva":
        first, printed_rows, last_row = "action and subject", WALK_AND_JOG, "average over both"
        groups = {f"{action} {subject.split('/')[-1]}": row
                  for (action, subject), row in mean(rows, ("action", "subject")).items()}
        text = "Over all chunks, where the paper's release scores the last one alone:\n\n"
    printed = printed_figures(recipe, printed_rows, last_row) if with_paper else {}
    text += score_table(first, {**groups, last_row: scores}, printed)
    if "scene" not in rows[0]:
        text += "\n\n" + score_table("subject", {**subjects, "all frames": mean(rows)})
    return text


def facts_text(result):
    """How a result came about and what it was measured on, from what of it is known."""
    recipe = result["recipe"]
    minutes = round(result.get("seconds", 0) / 60, 1)
    facts = {**result, "minutes": minutes, "ours": recipe.get("ours")}
    names = ("commit", "device", "precision", "micro_batch", "compile", "torch", "python",
             "parameters", "epochs", "minutes", "settings_changed", "ours")
    said = [f"{name.replace('_', ' ')}: {facts[name]}" for name in names if facts.get(name)]
    frames = mean(result["last"]["rows"])["frames"]
    text = (f"{'; '.join(said)}.\n\nData: {result['test_data']}, {frames:,} test frames; trained "
            f"on {result['data'] or 'unnamed data'}. Errors in mm, MPJVE in mm a frame.")
    if result["compares"]:
        return f"{text} The paper's figures are those of {recipe.get('row') or recipe['name']}."
    if result["test_data"] == TRAINED_ON["h36m"]:
        return f"{text} Other data or 2D than the paper's row: its figures do not compare."
    return f"{text} This is not Human3.6M: no figure compares with the papers' of it."


def report(result):
    """The markdown report of one run's result: what was run, its tables, its yardsticks.

    Keys that are missing (eval.py makes a result of "last" alone) are left out."""
    recipe, last, best = result["recipe"], result["last"], result.get("best")
    seed = "" if result.get("seed") is None else f", seed {result['seed']}"
    parts = [f"## {recipe['name']}{seed}: {recipe.get('row', '')}", facts_text(result)]
    learnt = result.get("autogrids")
    if learnt:
        dropped = ", ".join(map(str, learnt["dropped"])) or "none"
        parts.append(f"Learnt grid: {learnt['cells_changed']} cells changed, dropped: {dropped}.")
    tables = {"Epoch": last}
    if best and best["epoch"] == last["epoch"]:
        tables = {f"{BEST}, and the last": last}
    elif best:
        tables = {BEST: best, "Last epoch": last}
    if result.get("refined"):
        title = "Last epoch, refined: uses the true root position and the intrinsics"
        tables[title] = {**result["refined"], "epoch": last["epoch"]}
    for title, scores in tables.items():
        parts.append(f"### {title} ({scores.get('epoch')})")
        parts.append(scores_text(scores, recipe, result["compares"]))
    yardstick = result.get("yardsticks") or {}
    if yardstick.get("affine") is not None:
        parts.append(f"MPJPE over all frames: this model {mean(last['rows'])['mpjpe']:.2f} mm; "
                     f"yardsticks: training mean pose {yardstick['mean_pose']:.2f} mm, affine map "
                     f"of the 2D pose {yardstick['affine']:.2f} mm.")
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------------------------
# Looking inside

def grid_cells(model):
    """The joints of each cell of a model's grid, row by row: a list of lists."""
    return [row.nonzero().flatten().tolist() for row in model.assignment()]


def grid_links(model):
    """The graph that a grid stands for (GridConv's Figure 6): {(joint, joint)}, both ways.

    Joints are linked whose cells touch by a side."""
    cells, (H, P) = grid_cells(model), model.grid_shape
    across = [(i, i + 1) for i in range(H * P) if (i + 1) % P]
    down = [(i, i + P) for i in range(H * P - P)]
    links = {(a, b) for i, k in across + down for a in cells[i] for b in cells[k] if a != b}
    return links | {(b, a) for a, b in links}


def learnt_grid(model):
    """A learnt grid for a result: {"cells_changed", "dropped", "layout"}; None: there is none.

    "cells_changed" is "not known" where the start is not (a release's file)."""
    learnt = getattr(model, "autogrids", None)
    if learnt is None:
        return None
    layout, changed = learnt.assignment().argmax(1), "not known"  # each cell's joint
    if not getattr(model.recipe, "released", False):
        start = grid_layout(model.recipe).assignment().argmax(1)
        changed = int((start != layout.cpu()).sum())
    layout = layout.view(learnt.grid_shape).tolist()
    return {"cells_changed": changed, "dropped": learnt.dropped(), "layout": layout}


def inspect(model):
    """What a model is made of, as text: its size and, of GridConv, the grid (Figures 4 and 6).

    The cells' joints, the bones among neighbours, each joint's neighbours; of a learnt grid the
    joints dropped and the cells changed."""
    recipe, skeleton = model.recipe, data.SKELETONS[model.recipe.skeleton]
    size = sum(p.numel() for p in model.parameters())
    text = [f"{recipe.name} ({recipe.method}): {size:,} parameters, receptive field "
            f"{model.receptive_field}, epoch {model.epoch}, data: {model.trained_on or 'unnamed'}"]
    if not hasattr(model, "assignment"):
        return text[0]

    labels = [f"{joint} {name}" for joint, name in enumerate(skeleton.joints)]
    (H, P), cells, links = model.grid_shape, grid_cells(model), grid_links(model)
    text.append(f"grid, {H} x {P}:")
    for i in range(0, H * P, P):
        text.append(" ".join("+".join(map(str, cell)).rjust(4) for cell in cells[i:i + P]))
    bones = sum(edge in links for edge in skeleton.edges)
    text.append(f"neighbours in the grid ({bones} of {len(skeleton.edges)} bones among them):")
    for joint, label in enumerate(labels):
        around = [labels[b] for a, b in sorted(links) if a == joint]
        text.append(f"  {label}: {', '.join(around) or 'none'}")
    learnt = learnt_grid(model)
    if learnt:
        dropped = [labels[joint] for joint in learnt["dropped"]]
        text.append(f"dropped joints: {', '.join(dropped) or 'none'}")
        text.append(f"cells changed from the start, of {H * P}: {learnt['cells_changed']}")
    return "\n".join(text)


# ----------------------------------------------------------------------------------------------
# A user's own keypoints: what a detector wrote

# Where COCO's 17 joints stand in OpenPose's 25 and 18 joints and in MediaPipe's 33; Halpe's (26,
# 136) and COCO-WholeBody's (133) begin with them.
BODY_25 = (0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11)
COCO_18 = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
MEDIAPIPE = (0, 2, 5, 7, 8, *range(11, 17), *range(23, 29))
COCO = tuple(range(17))
JOINTS = {17: COCO, 18: COCO_18, 25: BODY_25, 26: COCO, 33: MEDIAPIPE, 133: COCO, 136: COCO}


@dataclass
class Track:
    """One person's 2D keypoints.

    keypoints (T, 17, 3), made of any layout in JOINTS: x, y in pixels and the score (1 where the
    file has none), NaN where nothing was detected; parts of the image's size where `fractions`.
    frames: the T frame numbers in a video, of which every `step`-th was looked at, or the T names
    of single images (step 0). size (width, height) and joints ("coco" or "h36m") where the file
    says them.
    """
    person: str
    keypoints: np.ndarray
    frames: list
    size: tuple | None = None
    joints: str | None = None
    step: int = 1
    fractions: bool = False


@dataclass
class Detection:
    """One person in one image: points (17, 3) as in a Track, made of any layout in JOINTS; the
    number or name that the file gives the person, or None; the image's number or name and size."""
    points: np.ndarray
    image: int | str
    person: str | None = None
    score: float | None = None
    size: tuple | None = None
    fractions: bool = False

    def __post_init__(self):
        self.joints = len(self.points)  # of the detector
        self.points = to_coco17(self.points)
        if self.score is None:
            self.score = np.nan_to_num(self.points[:, 2]).mean()
        if self.person is not None:
            self.person = one_line(self.person)
            if len(self.person) > 100:
                raise InputError(f"a person's id has {len(self.person)} characters; at most 100")

    def place(self):
        """The joints' positions (17, 2), NaN where not seen."""
        return np.where(is_seen(self.points)[:, None], self.points[:, :2], np.nan)


def one_line(text):
    """Others' text as one printable line."""
    letters = " ".join(str(text).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in letters)


@contextmanager
def naming(path):
    """Puts the path before an error's message that does not have it."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InputError(f"{path}: {error}") from None


FORMATS = "keypoints of COCO, MMPose, AlphaPose, OpenPose, ultralytics or MediaPipe"


@contextmanager
def reading(value, expected, where=""):
    """Around what takes a foreign structure apart: one line says what was found instead."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        found = one_line(json.dumps(value, default=str, skipkeys=True))[:80]
        raise InputError(f"{where}found {found}; expected {expected}") from None


def to_coco17(points):
    """COCO's 17 joints of points (..., J, C) in the layout that has J joints."""
    count = points.shape[-2]
    if count not in JOINTS:
        raise InputError(f"{count} joints; expected {', '.join(map(str, JOINTS))}")
    return points[..., list(JOINTS[count]), :]


def scored(points):
    """Points (..., 2|3) as (..., 3). Where there are no scores, (-1, -1) says that nothing was
    detected."""
    if points.ndim < 2 or points.shape[-1] not in (2, 3) or points.shape[-2] == 0:
        raise ValueError("neither x, y nor x, y, score of joints")
    if points.shape[-1] == 3:
        return points
    score = np.where((points == -1).all(-1, keepdims=True), np.nan, 1.0)
    return np.concatenate((points * score, score), -1)


def is_seen(points, min_score=0.0, size=None):
    """Which of points (..., 3) were detected: not (0, 0), NaN, scores not above `min_score`, what
    is beyond a million pixels and, for a known size, outside the image by more than that."""
    xy = points[..., :2]
    seen = (np.abs(points) <= 1e6).all(-1) & (xy != 0).any(-1) & (points[..., 2] > min_score)
    if size is not None:
        seen &= ((xy >= -np.array(size)) & (xy <= 2 * np.array(size))).all(-1)
    return seen


def are_fractions(points):
    """Whether the positions seen are parts of the image's size, not pixels."""
    return bool(np.median(np.abs(points[is_seen(points)][:, :2])) <= 2)


POINTS = ("keypoints", "pose_keypoints_2d", "pose_keypoints", "joints")
PERSON = ("track_id", "idx", "person_id", "instance_id")
SCORE = ("score", "confidence", "bbox_score")
LANDMARKS = ("landmarks", "landmark", "pose_landmarks", "poseLandmarks")
PEOPLE = ("instances", "people", "bodies", *LANDMARKS)


def first_of(item, keys):
    """The first of these entries that a dictionary has, or None."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def detection(item, image, size=None):
    """The Detection in a detector's entry: points flat or in rows, their scores within or beside
    them, or ultralytics' {x, y, visible}, or MediaPipe's [{x, y, visibility}]."""
    points, scores = first_of(item, POINTS), item.get("keypoint_scores")
    if isinstance(points, dict):
        scores = points.get("visible")
        points = list(zip(points["x"], points["y"], strict=True))
    elif isinstance(points[0], dict):
        points = [(mark["x"], mark["y"], mark.get("visibility", 1)) for mark in points]
    points = np.array(points, float)
    if points.ndim == 1:
        points = points.reshape(-1, 3)
    if points.ndim != 2:
        raise ValueError("no rows of one person's joints")
    if scores is not None:
        points = np.column_stack((points[:, :2], np.array(scores, float)))
    person, score = first_of(item, PERSON), first_of(item, SCORE)
    while isinstance(person, list):  # AlphaPose: [7.0]
        person, = person
    if isinstance(person, dict):
        raise TypeError("no number or name")
    if isinstance(person, float) and person.is_integer():
        person = int(person)
    person = None if person in (None, -1, "") else str(person)  # OpenPose: -1
    score = None if score is None else float(score)
    return Detection(scored(points), image, person, score, size)


# ----------------------------------------------------------------------------------------------
# One small reader a format

def read_images(images):
    """The Detections of {image's number or name: entry}, where an entry is MMPose's {frame_id,
    instances}, OpenPose's {people}, AlphaPose's {bodies}, MediaPipe's {frame, landmarks}, or a
    list of people alone, as MMPose's of one image and ultralytics'."""
    detections = []
    for image, people in images.items():
        with reading(people, "the people in an image and their keypoints", f"image {image}: "):
            if isinstance(people, dict):
                stated = first_of(people, ("frame_id", "frame"))
                image = image if stated is None else int(stated)
                people = [people[key] for key in PEOPLE if key in people][0]
            people = people or []
            if people and "x" in people[0]:  # landmarks of one, whom MediaPipe follows itself
                people = [{"keypoints": people, "track_id": "1"}]
            people = [{"keypoints": one} if isinstance(one, list) else one for one in people]
            detections += [detection(one, image) for one in people if first_of(one, POINTS) != []]
    return detections


def coco_results(entries):
    """The Detections of [{image_id, keypoints: [x, y, score, ...], score}]: Detectron2's, MMPose's
    topdown results, and AlphaPose's, which add idx."""
    detections = []
    for number, entry in enumerate(entries):
        with reading(entry, "{image_id, keypoints: [x, y, score, ...]}", f"entry {number}: "):
            if not isinstance(entry["image_id"], (int, float, str)):
                raise TypeError("no number or name")
            detections.append(detection(entry, entry["image_id"]))
    return detections


def check_joints(names):
    """InputError where a file's names of its joints do not begin with the nose, as JOINTS do."""
    if names and "hip" in str(names).lower() and "nose" not in str(names[0]).lower():
        raise InputError(f"joints from {one_line(names[0])} on; convert them to COCO's, nose first")


def coco_annotations(content):
    """The Detections of {images: [{id, width, height}], annotations}; images without a file_name
    are numbered by their order."""
    images, detections = {}, []
    for number, image in enumerate(content["images"]):
        with reading(image, "{id, width, height}", f"image {number}: "):
            size = image.get("width"), image.get("height")
            size = None if None in size else tuple(map(float, size))
            images[image["id"]] = str(image.get("file_name") or number), size
    joints = {kind.get("id"): kind.get("keypoints") for kind in content.get("categories") or []}
    for number, entry in enumerate(content["annotations"]):
        with reading(entry, "{image_id, keypoints}", f"annotation {number}: "):
            if "keypoints" in entry:  # no other kind of thing
                check_joints(joints.get(entry.get("category_id")))
                detections.append(detection(entry, *images[entry["image_id"]]))
    return detections


REFUSED = {
    "pose_world_landmarks": "MediaPipe's landmarks in metres; write the image's, pose_landmarks",
    "preds": "MMPose 0.x's test results; write COCO results",
    "shapes": "LabelMe's drawings; convert them to COCO annotations",
    "box": "boxes alone; run a model of people's keypoints"}


def read_json(path):
    """The Detections in a JSON file, told by the keys of its first entry."""
    content = data.read_json(path, "name a file of keypoints")
    with reading(content, FORMATS):
        if isinstance(content, dict):
            if "annotations" in content and content.get("images"):
                return coco_annotations(content)
            image = next(iter(content.values()), None)
            if isinstance(image, dict) and ("bodies" in image or "people" in image):
                return read_images(content)  # AlphaPose's
            check_joints([*content.get("meta_info", {}).get("keypoint_id2name", {}).values()])
            content = content.get("annotations", content.get("instance_info", [content]))
        first = next((entry for entry in content if entry), None)
        if first is None:
            return []
        probe = first
        while isinstance(probe, list):
            probe = probe[0]
        keys = probe.keys()
        if "image_id" in keys:
            return coco_results(content)
        if keys & {"keypoints", "x"} and probe is first:  # the people of one image
            for key in keys & {"frame", "frame_id", "image", "file_name"}:
                raise InputError(f"people with {key}; expected image_id, as in COCO results")
            content = [content]
        if keys & {"keypoints", "x", *PEOPLE}:
            return read_images(dict(enumerate(content)))
        for key in keys & REFUSED.keys():
            raise InputError(f"this looks like {REFUSED[key]}")
        raise ValueError("unknown")


def mediapipe_csv(path):
    """The Detections in a CSV file of MediaPipe's landmarks, a row a frame."""
    header, *lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    with reading(header, "x_0, y_0, z_0, visibility_0, ... to 32 and a row of numbers a frame"):
        names, rows = header.split(","), [line.split(",") for line in lines]
        points = np.array([[cell or "nan" for cell in row] for row in rows], float)
        parts = [f"{part}_{k}" for k in range(33) for part in ("x", "y", "visibility")]
        detections = array_detections(points[:, list(map(names.index, parts))].reshape(-1, 33, 3))
        for column in [k for k, name in enumerate(names) if name.startswith("frame")][:1]:
            for found, number in zip(detections, points[:, column]):
                found.image = int(number)
        return detections


def ultralytics_labels(path):
    """The Detections in save_txt's lines of an image: class, box, 17 joints, then the box's
    confidence and the person's number where asked for; parts of the image's size."""
    detections = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        with reading(line, "class, box and 17 joints of a pose model", f"line {number}: "):
            values = np.array(line.split(), float)
            columns = 3 if len(values) >= 5 + 17 * 3 else 2
            points, rest = np.split(values[5:], [17 * columns])
            if len(rest) > 2 or columns == 2 and not line.endswith("\n"):
                raise ValueError("more than a confidence and a number, or cut off")
            person = f"{rest[-1]:.0f}" if len(rest) and rest[-1].is_integer() else None
            points = scored(points.reshape(17, columns))
            detections.append(Detection(points, path.stem, person, fractions=True))
    return detections


def detectron2(arrays):
    """The Detections of VideoPose3D's inference by Detectron2: for each frame lists by class, the
    last of them people's boxes (n, 5) and keypoints (n, 4, 17), rows x, y, logit, probability."""
    detections = []
    with reading(arrays, "boxes and keypoints of each frame, metadata {w, h}"):
        about = arrays["metadata"].item()
        size = float(about["w"]), float(about["h"])
        frames = zip(arrays["keypoints"], arrays["boxes"], strict=True)
        for number, (keypoints, boxes) in enumerate(frames):
            if len(keypoints) and len(keypoints[-1]):
                people = np.array(keypoints[-1], float)[:, [0, 1, 3]]  # (n, 3, 17)
                for points, box in zip(people, boxes[-1], strict=True):
                    detections.append(Detection(points.T, number, None, float(box[4]), size))
    return detections


def videopose3d(arrays):
    """The Tracks of VideoPose3D's data_2d_custom_*.npz: positions_2d {video: {action: [(T, 17,
    2)]}}, metadata {layout_name, video_metadata}."""
    tracks = []
    with reading(arrays, "what VideoPose3D's prepare_data_2d_custom.py writes, coco or h36m"):
        about = arrays["metadata"].item()
        joints = {"coco": "coco", "h36m": "h36m", None: None}[about.get("layout_name")]
        for video, actions in arrays["positions_2d"].item().items():
            place = about["video_metadata"][video]
            size = float(place["w"]), float(place["h"])
            views = {f"{video} {action} {number}": view for action, views in actions.items()
                     for number, view in enumerate(views)}
            for name, view in views.items():
                person = name if len(views) > 1 else video
                found = array_detections(np.array(view, float), person, size)
                tracks += [replace(track, joints=joints) for track in tracks_of(found)]
    return tracks


def array_detections(points, person="1", size=None):
    """The Detections in an array (T, J, 2|3) of one person or (T, P, J, 2|3) of several."""
    if points.ndim == 3:
        points = points[:, None]
    else:
        person = None
    return [Detection(one, number, person, None, size)
            for number, people in enumerate(scored(points)) for one in people]


def read_arrays(path):
    """The Tracks or Detections in an .npz or .npy file."""
    arrays = data.read_npz(path, "name a file of keypoints")
    if "positions_2d" in arrays:
        return videopose3d(arrays)
    if {"boxes", "keypoints", "metadata"} <= arrays.keys():
        return detectron2(arrays)
    if {"poses", "root", "keypoints"} <= arrays.keys():
        raise InputError("this looks like what lift has written; name what it was made of")
    found = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
    with reading(found, "one array (frames, joints, 2 or 3) or (frames, people, joints, 2 or 3)"):
        fits = {key: array for key, array in arrays.items()
                if array.dtype.kind in "fiu" and array.ndim in (3, 4)}
        points, = [fits["keypoints"]] if "keypoints" in fits else fits.values()
        points = points.astype(float)
        if points.shape[-2:] == (33, 4):  # x, y, z, visibility
            points = points[..., [0, 1, 3]]
        elif points.shape[-2] == 33 and (points[..., 2:] < 0).any():  # z: depth has both signs
            points = points[..., :2]
        return array_detections(points)


def read_file(path):
    """The Tracks or Detections in one file, told by how it begins."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    with naming(path):
        if head.startswith((b"PK", b"\x93NUMPY")):
            return read_arrays(path)
        if head.startswith((b"[", b"{")) or path.suffix.lower() == ".json":
            return read_json(path)
        if b"\0" in head or head.startswith(b"\x80"):
            raise InputError("this looks like a picture, a video or a pickle; save JSON instead")
        return mediapipe_csv(path) if b"," in head else ultralytics_labels(path)


def read_folder(path):
    """The Detections in a folder with one file an image."""
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    kinds = sorted({file.suffix.lower() for file in files})
    if kinds not in ([".json"], [".txt"]):
        found = " and ".join(kinds) or "no"
        raise InputError(f"{path}: found {found} files; expected .json alone or .txt alone")
    detections = []
    for file in files:
        read = read_file(file)
        count = len({found.image for found in read})
        if count > 1:
            raise InputError(f"{file}: {count} images; expected one a file, or this file alone")
        for found in read:
            found.image = file.stem.removesuffix("_keypoints")
        detections += read
    return detections


# ----------------------------------------------------------------------------------------------
# From images to people

GAP = 15  # frames: who is not seen for longer has left
REACH = 0.5  # body sizes: who is farther from where one was expected is another


def assign(cost):
    """The pairs (row, column) of least total cost in a matrix (n, m): min(n, m) pairs, no row or
    column in two. Row after row takes the column to which the shortest augmenting path leads
    (Bellman-Ford): earlier rows pass from column to column along it."""
    if cost.shape[0] > cost.shape[1]:
        return [(row, column) for column, row in assign(cost.T)]
    row_of = np.full(cost.shape[1], -1)
    for start in range(len(cost)):
        taken = np.flatnonzero(row_of >= 0)
        owners = row_of[taken]
        length, before = cost[start].copy(), np.full(cost.shape[1], -1)
        for _ in taken:  # no path passes more columns than are taken
            through = cost[owners] + (length[taken] - cost[owners, taken])[:, None]  # (taken, m)
            closer = through.min(0) < length - 1e-9
            length[closer] = through.min(0)[closer]
            before[closer] = taken[through.argmin(0)][closer]
        column = np.where(row_of < 0, length, np.inf).argmin()
        while before[column] >= 0:
            row_of[column] = row_of[before[column]]
            column = before[column]
        row_of[column] = start
    return [(row, column) for column, row in enumerate(row_of) if row >= 0]


def distances(before, after):
    """(K, P): how far bodies (K, J, 2) are from bodies (P, J, 2): the mean over the joints seen in
    both, in parts of the larger one's diagonal."""
    apart = np.linalg.norm(before[:, None] - after, axis=-1)  # (K, P, J)
    both = np.isfinite(apart)
    mean = np.where(both, apart, 0).sum(-1) / np.maximum(both.sum(-1), 1)
    old, new = (np.linalg.norm(np.nanmax(bodies, 1) - np.nanmin(bodies, 1), axis=-1)
                for bodies in (before, after))
    size = np.maximum(np.maximum(old[:, None], new), 1e-9)
    return np.where(both.any(-1), mean / size, np.inf)


class Person:
    """Someone who is followed: detections by frame number, where the joints were last (J, 2), NaN
    where never seen, and the body's velocity a frame."""

    def __init__(self, number, found):
        self.found, self.last = {number: found}, number
        self.place, self.velocity = found.place(), 0.0

    def expected(self, number):
        """Where the joints are by then, if the body goes on as it did."""
        return self.place + self.velocity * (number - self.last)

    def add(self, number, found):
        """Sees them again."""
        place, expected = found.place(), self.expected(number)
        moved = np.nanmean(place - self.place, 0) / (number - self.last)
        self.velocity = (self.velocity + moved) / 2
        self.place = np.where(np.isnan(place), expected, place)
        self.found[number], self.last = found, number


def follow(frames, step=1):
    """The people in [(frame number, detections)], in order of time and of every step-th frame, as
    {number: Detection} each, the longest first.

    In each frame detections go to the people followed so that the sum of their `distances` to
    where they are expected is least, if nearer than REACH; the others are new people. Who was not
    seen for more than GAP frames has left.
    """
    people, present = [], []
    for number, detections in frames:
        present = [person for person in present if number - person.last <= (GAP + 1) * step]
        new = list(detections)
        if present and new:
            expected = np.stack([person.expected(number) for person in present])
            cost = distances(expected, np.stack([found.place() for found in new]))
            for row, column in assign(np.minimum(cost, REACH)):
                if cost[row, column] < REACH:
                    present[row].add(number, detections[column])
                    new[column] = None
        new = [Person(number, found) for found in new if found is not None]
        people += new
        present += new
    people.sort(key=lambda person: -len(person.found))
    return [person.found for person in people]


def video_numbers(images):
    """(the numbers in a video of {image's name: its Detections}, step), where every step-th frame
    was looked at; (their places, 0) for single images.

    A video's images are of one size, their names differ in the last number alone, and most of the
    numbers follow the one before by the same step, of at most 60 (after longer ones a person is
    not where they were).
    """
    single = list(range(len(images))), 0
    names = [re.sub(r"\.[^\W\d]\w*$", "", str(name)) for name in images]  # a.0001, a.0001.jpg
    parts = [re.fullmatch(r"(?s)(.*?)(\d{1,18})(\D*)", name) for name in names]
    sizes = {found.size for people in images.values() for found in people}
    alike = {part and (part[1], part[3]) for part in parts}
    if len(alike) > 1 or None in alike or len(sizes) > 1 or len(images) < 2:
        return single
    numbers = [int(part[2]) for part in parts]
    gaps = np.diff(sorted(numbers))
    step = int(np.gcd.reduce(gaps))
    regular = 2 * (gaps == step).sum() >= len(gaps) and gaps.max() <= 1000 * step
    return (numbers, step) if regular and gaps.min() > 0 and step <= 60 else single


def people_of_video(frames, step):
    """[(name, {frame number: Detection})] of [(frame number, Detections)]: the file's own people,
    the best-scored of each frame, and others as they are followed, numbered by length."""
    named, unnamed = {}, []
    for number, people in frames:
        unnamed.append((number, [found for found in people if found.person is None]))
        for found in people:
            if found.person is not None:
                row = named.setdefault(found.person, {})
                row[number] = max(row.get(number, found), found, key=lambda one: one.score)
    prefix = "untracked " if named else ""
    followed = [(f"{prefix}{n}", row) for n, row in enumerate(follow(unnamed, step), 1)]
    return [*named.items(), *followed]


def people_of_images(images):
    """[(name, {place: Detection})] of [(place, Detections)], for images of each size: the file's
    own people, or else the best-scored of each image, the next, ..."""
    rows = {}
    for place, people in images:
        for rank, found in enumerate(sorted(people, key=lambda found: -found.score)):
            rows.setdefault((found.size, found.person or rank), {}).setdefault(place, found)
    longest = sorted(rows.items(), key=lambda item: -len(item[1]))
    return [(person if isinstance(person, str) else str(number), row)
            for number, ((_, person), row) in enumerate(longest, 1)]


def tracks_of(detections):
    """The Tracks of Detections in a video or in single images."""
    counts = sorted({found.joints for found in detections})
    if len(counts) > 1:
        raise InputError(f"people of {counts[0]} and of {counts[1]} joints; take one detector's")
    images, tracks = {}, []
    for found in detections:
        if is_seen(found.points).any():
            images.setdefault(found.image, []).append(found)
    named = [(found.image, found.person) for found in detections if found.person is not None]
    doubled = len(named) - len(set(named))
    if doubled:
        print(f"warning: {doubled} times several people of a frame share a number", file=sys.stderr)
    numbers, step = video_numbers(images)
    frames = sorted(zip(numbers, images.values()), key=lambda pair: pair[0])
    nowhere = np.full((17, 3), np.nan)
    for name, row in people_of_video(frames, step) if step else people_of_images(frames):
        first = row[min(row)]
        span = list(range(min(row), max(row) + 1, step)) if step else list(row)
        keypoints = np.stack([row[n].points if n in row else nowhere for n in span])
        joints = None if counts == [17] else "coco"
        fractions = first.fractions or counts == [33] and are_fractions(keypoints)
        if not step:
            span = [one_line(found.image) for found in row.values()]
        tracks.append(Track(name, keypoints, span, first.size, joints, step, fractions))
    return tracks


def read_keypoints(path):
    """The people in a file or folder of 2D keypoints, as Tracks.

    Files: COCO results and annotations, MMPose (a video, an image), AlphaPose (default, open),
    OpenPose, ultralytics (to_json, save_txt), MediaPipe (JSON, CSV), Detectron2's npz of a video,
    VideoPose3D's data_2d_custom_*.npz, arrays (T, J, 2|3) of one person or (T, P, J, 2|3) of
    several. Folders: OpenPose's, MMPose's or ultralytics' file of each image. Formats are told
    apart by their content, joints by their number (`JOINTS`; 17 are COCO's unless the file says
    otherwise). People without numbers are followed from frame to frame. InputError: another
    format, a broken file, nobody in it.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found; name a file or folder of keypoints")
    with naming(path):
        tracks = read_folder(path) if path.is_dir() else read_file(path)
        if tracks and isinstance(tracks[0], Detection):
            tracks = tracks_of(tracks)
        if not tracks:
            raise InputError("no person in it; run the detector with a lower threshold")
    return tracks


# ----------------------------------------------------------------------------------------------
# What stands between a detector's keypoints and a model

def coco_to_h36m(points):
    """COCO-17 (17, C) to Human3.6M-17 (17, C); every joint is a weighted mean, so no direction in
    the image is special.

    Pelvis: mid hips; spine: halfway to mid shoulders; neck/nose: the nose, a quarter of the way to
    mid shoulders. Thorax: mid shoulders + 1/3 (nose - mid shoulders) + 2/3 (nose - mid eyes), which
    for an upright head is the rule of GAST-Net's and MHFormer's demos (theirs takes the second step
    in y alone); without the eyes it lies higher than in real Human3.6M 2D. Head: the mean of eyes
    and ears, moved on by the step from the nose to mid eyes (theirs, again, in y alone).
    """
    nose, eyes, ears = points[0], points[1:3].mean(0), points[3:5].mean(0)
    shoulders, hips = points[5:7].mean(0), points[11:13].mean(0)
    spine = (hips + shoulders) / 2
    thorax = shoulders + (nose - shoulders) / 3 + (nose - eyes) * 2 / 3
    neck = nose + (shoulders - nose) / 4
    head = (eyes + ears) / 2 + eyes - nose
    legs, arms = points[[12, 14, 16, 11, 13, 15]], points[[5, 7, 9, 6, 8, 10]]
    return np.stack((hips, *legs, spine, thorax, neck, head, *arms))


TO_H36M = {"coco": coco_to_h36m(np.eye(17)), "h36m": np.eye(17)}  # TO_H36M[joints] @ points


def check_settings(size, **settings):
    """InputError for a size, or for a setting given, that is no number which can be meant."""
    if size is None or len(size) != 2:
        raise InputError("size: missing; expected the image's width and height in pixels")
    for name, value in (*zip(("size", "size"), size), *settings.items()):
        least = {"min_score": -1e6, "smooth": 0.01, "fps": 0.01}.get(name, 1)
        if value is not None and not least <= value <= 1e6:
            raise InputError(f"{name.replace('_', '-')} {value:g}: expected {least:g} to a million")


def fill(xy, joints):
    """xy (T, 17, 2) with NaN replaced: linear in time between the frames where a joint was seen,
    held before and after them; a part of the face never seen is the mean of the others."""
    xy, time = xy.copy(), np.arange(len(xy))
    seen = np.isfinite(xy[..., 0])  # (T, 17)
    never = ~seen.any(0)
    for joint, axis in itertools.product(np.flatnonzero(~never), (0, 1)):
        known = seen[:, joint]
        xy[:, joint, axis] = np.interp(time, time[known], xy[known, joint, axis])
    if joints == "coco" and not never[:5].all():
        lost = np.flatnonzero(never[:5])
        xy[:, lost] = np.nanmean(xy[:, :5], 1, keepdims=True)
        never[lost] = False
    if never.any():
        names = np.array(data.SKELETONS[f"{joints}17"].joints)[never]
        raise InputError(f"{', '.join(names)} never detected; the model needs the whole body")
    return xy


def prepare(keypoints, size, joints=None, min_score=0.0, smooth=None, fps=30.0):
    """A person's keypoints (T, J, 2|3), pixels and score in an image of `size` (width, height), as
    models take them: (pose_2d (T, 17, 2) pixels of Human3.6M's joints, interpolated (T, 17) bool).

    What `is_seen` does not take for detected is interpolated in time; a joint counts as
    interpolated if any that it is made of was. `joints`: "coco" (default) or "h36m"; `smooth`: the
    `one_euro` filter's lowest cutoff in Hz. InputError: another shape or unit, a joint that no
    frame has.
    """
    check_settings(size, min_score=min_score, smooth=smooth, fps=fps)
    joints = joints or "coco"
    points = np.asarray(keypoints, float)
    if points.ndim != 3 or points.shape[2] not in (2, 3) or not len(points):
        raise InputError(f"keypoints of shape {points.shape}: expected (frames, joints, 2 or 3)")
    if joints == "h36m" and points.shape[1] != 17:
        raise InputError(f"keypoints: {points.shape[1]} joints; Human3.6M's are 17")
    points = to_coco17(scored(points))
    seen = is_seen(points, min_score, size)
    if not seen.any():
        raise InputError(f"no keypoints in an image of {size[0]:g}x{size[1]:g}; is the size right?")
    if are_fractions(points):
        raise InputError("keypoints: parts of the image's size; expected pixels")
    xy = np.where(seen[..., None], points[..., :2], np.nan)
    pose_2d = TO_H36M[joints] @ fill(xy, joints)
    if smooth is not None:
        half_side = max(size) / 2
        pose_2d = one_euro(pose_2d / half_side, fps, smooth) * half_side
    return pose_2d, ~seen @ (TO_H36M[joints] != 0).T


def one_euro(x, fps, cutoff=2.0, beta=10.0):
    """The One-Euro filter (Casiez et al. 2012) of x (T, ...): exponential smoothing over past
    frames whose cutoff frequency, `cutoff` + `beta` |dx/dt| in Hz, rises with the speed, which is
    itself smoothed at 1 Hz.

    GridConv's authors smooth 2D with it (OSVAI/GridConv, issue 2) but name no constants. Ours are
    for half image sides: with noise of 0.01 on the open benchmark's test clips they take 60 % off
    its frame-to-frame error, 20 % off its own.
    """
    def weight(hertz):
        return 1 / (1 + fps / (2 * np.pi * hertz))

    value, speed, smoothed = x[0], np.zeros_like(x[0]), np.empty_like(x)
    for t in range(len(x)):
        change = (x[t] - value) * fps
        speed = speed + weight(1.0) * (change - speed)
        value = value + weight(cutoff + beta * np.abs(speed)) * (x[t] - value)
        smoothed[t] = value
    return smoothed


# ----------------------------------------------------------------------------------------------
# Lifting

def check_liftable(model):
    """InputError for a model that does not lift a user's own keypoints."""
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise InputError("a model without its recipe, which load_model gives it")
    if recipe.skeleton != "h36m17" or recipe.target != "camera" or recipe.swap_sides:
        sides = "swapped" if recipe.swap_sides else "its own"
        found = f"{recipe.skeleton} joints, target {recipe.target}, {sides} sides"
        raise InputError(f"a model of {found}; take one of h36m17, camera, its own")


def lift_poses(model, pose_2d, size, flip=None):
    """3D poses (T, 17, 3) of 2D poses (T, 17, 2) that `prepare` made."""
    recipe = model.recipe
    unknown = np.zeros((*pose_2d.shape[:2], 3), np.float32)
    sequence = data.Sequence("", "", "", pose_2d.astype(np.float32), unknown, unknown[:, 0],
                             data.UNKNOWN_INTRINSICS, tuple(size), 0.0)
    rule = data.fitting_rule(recipe.normalise, [size])
    device = next(model.parameters()).device
    store = data.FrameStore([sequence], rule, data.SKELETONS["h36m17"], device)
    flip = recipe.flip_test if flip is None else flip
    return predict(model, store, flip=flip).float().cpu().numpy()


def lift(model, keypoints, size, joints=None, flip=None, min_score=0.0, smooth=None, fps=30.0):
    """3D poses (T, 17, 3), float32 metres, root-relative, in the camera frame (x right, y down, z
    away), of a person's 2D keypoints (T, J, 2|3) in pixels of a video of `size` (width, height).

    joints, min_score, smooth, fps: as in `prepare`. `flip` averages with the mirrored input's
    poses, by default as the model's recipe does. InputError: what `prepare` refuses, a model of
    other joints or without a recipe.
    """
    check_liftable(model)
    pose_2d, _ = prepare(keypoints, size, joints, min_score, smooth, fps)
    return lift_poses(model, pose_2d, size, flip)


def root_trajectory(pose_2d, poses, focal, centre):
    """The root's position (T, 3) in the camera frame, metres, from 2D (T, J, 2) in pixels and
    root-relative 3D (T, J, 3) in metres, for a pinhole camera of that focal length and centre in
    pixels.

    Closed form. With the ray (a, b) = (pixel - centre) / focal, each joint (x, y, z) asks for
    X - a Z = a z - x and Y - b Z = b z - y: linear in the root (X, Y, Z), least squares over the
    joints of a frame.
    """
    ray = (pose_2d - centre) / focal  # (T, J, 2)
    offset = ray * poses[..., 2:] - poses[..., :2]
    r, o = ray - ray.mean(1, keepdims=True), offset - offset.mean(1, keepdims=True)
    depth = -(r * o).sum((1, 2)) / np.maximum((r * r).sum((1, 2)), 1e-12)  # (T,)
    across = offset.mean(1) + ray.mean(1) * depth[:, None]
    return np.concatenate((across, depth[:, None]), 1)


# ----------------------------------------------------------------------------------------------
# Output: poses, the page, pictures

HERE = Path(__file__).resolve().parent
SLOT = '<script id="poses" type="application/json">null<'


def as_json(result):
    """JSON that may stand in a page: nothing in it can be taken for markup."""
    text = json.dumps(result, allow_nan=False)  # in ASCII: other letters are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(path, result):
    """The page that shows a result, made of docs/viewer.html: whole or not at all."""
    template = HERE / "docs" / "viewer.html"
    page = template.read_text(encoding="utf-8")
    if page.count(SLOT) != 1:
        raise InputError(f"{template}: no single {SLOT} in it; take the project's")
    page = page.replace(SLOT, SLOT.replace("null", as_json(result)))
    data.write_atomically(path, lambda file: file.write(page.encode()))


def write_poses(path, result):
    """The result as .json, or as the arrays of an .npz: a row a pose."""
    if path.suffix.lower() == ".json":
        data.write_atomically(path, lambda file: file.write(as_json(result).encode()))
        return
    people = result["people"]
    arrays = {key: np.array(result[key])
              for key in ("fps", "joints", "edges", "source", "model", "licence")}
    for key in ("poses", "root", "keypoints", "interpolated", "frames"):
        arrays[key] = np.concatenate([np.array(one[key]) for one in people])
    arrays["interpolated"] = arrays["interpolated"].astype(bool)
    for key, name in (("person", "name"), ("size", "size"), ("focal", "focal")):
        arrays[key] = np.concatenate([[one[name]] * len(one["frames"]) for one in people])
    data.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def draw_pose(ax, pose):
    """A pose (17, 2) in place of another: left limbs blue, right ones orange."""
    skeleton = data.SKELETONS["h36m17"]
    for line in list(ax.lines):
        line.remove()
    for parent, child in skeleton.edges:
        colour = "tab:blue" if child in skeleton.left else "0.25"
        if child in skeleton.right:
            colour = "tab:orange"
        ax.plot(*pose[[parent, child]].T, color=colour, linewidth=1.8, solid_capstyle="round")


def plot_poses(path, pose_2d, poses, fps=30.0, frames=None):
    """A picture of 2D poses (T, 17, 2) beside their 3D poses (T, 17, 3), root-relative, from the
    camera and from its right: six frames evenly spread (.png), or an animation (.gif) at the speed
    of `fps` poses a second. Equal axes about the root, one scale for all. frames (T,): what to
    call them."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    count = len(poses)
    frames = range(count) if frames is None else frames
    step = max(math.ceil(fps / 12.5), math.ceil(count / 300))  # 12.5 pictures a second, 300 at most
    moving = Path(path).suffix.lower() == ".gif"
    if moving:
        times = np.arange(0, count, step)
        figure = Figure((7.2, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)[:, None]
    else:
        times = np.unique(np.linspace(0, count - 1, 6).round().astype(int))
        figure = Figure((1.5 * len(times), 4.7), layout="constrained")
        axes = figure.subplots(3, len(times), squeeze=False)
    views = {"2D input": pose_2d - pose_2d[:, :1], "3D, from the camera": poses[..., [0, 1]],
             "3D, from its right": poses[..., [2, 1]]}
    for row, (title, points) in zip(axes, views.items()):
        reach = 1.08 * np.abs(points[times]).max()
        row[0].set_ylabel(title, fontsize=8)
        for ax in row:
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", xticks=[], yticks=[])

    def draw(t, column):
        column[0].set_title(f"frame {frames[t]}", fontsize=8)
        for ax, points in zip(column, views.values()):
            draw_pose(ax, points[t])

    if not moving:
        for t, column in zip(times, axes.T):
            draw(t, column)
        data.write_atomically(path, lambda file: figure.savefig(file, format="png"))
        return
    animation = FuncAnimation(figure, draw, times, fargs=(axes[:, 0],))
    rate = max(fps / step, 1 / 655)  # a GIF shows no picture for longer than 655 s
    with tempfile.TemporaryDirectory() as folder:
        animation.save(f"{folder}/poses.gif", PillowWriter(rate))
        content = Path(folder, "poses.gif").read_bytes()
    data.write_atomically(path, lambda file: file.write(content))


# ----------------------------------------------------------------------------------------------
# Command line

def numbers(text):
    """Comma-separated whole numbers, as a tuple."""
    return tuple(int(part) for part in text.split(","))


def words(text):
    """Comma-separated words, as a tuple."""
    return tuple(text.split(","))


def checkpoint_parser(prog, about):
    """A parser of a checkpoint and of what a release's file does not say of it."""
    parser = Parser(prog=prog, description=about)
    add = parser.add_argument
    add("checkpoint", help="of train.py, of GridConv's release or of GLA-GCN's")
    add("--padding", type=words, help="GridConv's release: its branches, as circular,zeros")
    add("--filter-widths", type=numbers, help="GLA-GCN's release: as 3,3,3,3,3 for T = 243")
    add("--skeleton", help="GLA-GCN's release: h36m17 or 3dhp17 for 17 joints")
    add("--keypoints", help="the 2D poses: gt, hrnet, cpn_ft_h36m_dbb, detectron_pt_coco, ...")
    return parser


def load_checkpoint(args, **overrides):
    """`load_model` with the options of `checkpoint_parser`."""
    given = {name: getattr(args, name) for name in (*FACTS, "keypoints")}
    return load_model(args.checkpoint, **given, **overrides)


def evaluate_command(argv):
    """The table of a model's errors on a dataset's test split, beside the paper's figures.

    Further commands: eval.py inspect, eval.py lift (each has a --help)."""
    parser = checkpoint_parser("eval.py", evaluate_command.__doc__)
    add = parser.add_argument
    add("--data", default="data", metavar="DIR", help="folder of the data (default: data)")
    add("--dataset", choices=data.DATASETS, help="another than the one trained on")
    add("--cameras", choices=("recorded", "random"), help="random: none that training sees")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored input's")
    add("--json", metavar="FILE", help="write the figures there as well")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)

    device, precision = pick_device(args.device)
    model = load_checkpoint(args, data=args.dataset, cameras=args.cameras).to(device)
    recipe = model.recipe
    recipe.noise = recipe.missing = 0.0  # of training alone; measured is the 2D as the files hold it
    if recipe.data in ("3dhp", "synthetic"):  # they have no other 2D
        recipe.keypoints = "gt"
    if recipe.keypoints is None:
        raise InputError(f"{args.checkpoint}: it does not say its 2D poses: give --keypoints")
    flip = recipe.flip_test if args.flip is None else args.flip
    store = data.make_store(recipe, args.data, "test", device)
    test_data = data.provenance(store.sequences)
    result = {
        "recipe": vars(recipe), "checkpoint": str(args.checkpoint), "flip": flip,
        "data": model.trained_on, "test_data": test_data,
        "compares": compares(recipe, test_data, model.trained_on),
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
        "device": device_name(device), "precision": precision, "autogrids": learnt_grid(model),
        "last": {"epoch": model.epoch, **evaluate(model, store, flip=flip)}}
    try:
        train_store = data.make_store(recipe, args.data, "train", device)
        result["yardsticks"] = yardsticks(train_store, store)
    except (InputError, OSError) as error:  # training data need not be at hand
        print(f"no yardsticks: {error}", file=sys.stderr)
    if args.json:
        text = json.dumps(result, indent=1).encode()
        data.write_atomically(args.json, lambda file: file.write(text))
    print(f"{args.checkpoint}: {recipe.keypoints} 2D, {'with' if flip else 'without'} flips\n")
    print(report(result))


def inspect_command(argv):
    """A model's size, its grid and the graph that this stands for, and what it learnt."""
    parser = checkpoint_parser("eval.py inspect", inspect_command.__doc__)
    print(inspect(load_checkpoint(parser.parse_args(argv))))


# ----------------------------------------------------------------------------------------------
# python eval.py lift

WILD = ("glagcn-wild", "gridconv-wild")  # the pretrained models, of videos and of single images


def load_models(path, device):
    """The named model alone, or the pretrained ones beside this file."""
    paths = [path] if path else [HERE / "pretrained" / f"{name}.pt" for name in WILD]
    models = []
    for place in paths:
        if path is None and not place.is_file():
            raise InputError(f"{place}: not found; name a checkpoint with --model")
        models.append(load_model(place).to(device))
        with naming(place):
            check_liftable(models[-1])
    return models


def model_for(track, models):
    """The model that is named, or the pretrained one that fits: of videos where enough frames in a
    row show the person, with gaps of up to GAP frames between them."""
    video, images = models[0], models[-1]
    if not track.step and images.receptive_field > 1:
        raise InputError(f"single images; the model needs {images.receptive_field} video frames")
    run = 0
    if track.step == 1:
        seen = np.flatnonzero(is_seen(track.keypoints).any(1))
        runs = np.split(seen, np.flatnonzero(np.diff(seen) > GAP + 1) + 1)
        run = max(part[-1] - part[0] + 1 for part in runs)
    return video if run >= video.receptive_field else images


def prepare_track(track, size, args, fps):
    """`prepare` for a video, or for each of single images on its own: (pose_2d, interpolated,
    frames, what was left out and why)."""
    joints = track.joints or args.joints
    if args.joints not in (None, joints):
        raise InputError(f"--joints {args.joints}: the file's are {joints}")
    keypoints = track.keypoints * (*size, 1) if track.fractions else track.keypoints
    settings = size, joints, args.min_score, args.smooth, fps
    if track.step:
        return *prepare(keypoints, *settings), track.frames, []
    made, frames, left_out = [], [], []
    for name, points in zip(track.frames, keypoints):
        try:
            made.append(prepare(points[None], *settings))
            frames.append(name)
        except InputError as error:
            left_out.append(f"person {track.person}: image {name} left out: {error}")
    if not made:
        raise InputError(left_out[0])
    return *map(np.concatenate, zip(*made)), frames, left_out


def lift_track(track, model, args, fps):
    """(one person's entry of the result, a line about it, what was left out). Numbers are rounded
    here, once for all files."""
    size = track.size or args.size
    if size is None:
        raise InputError("the file does not say the image's size: give --size WIDTHxHEIGHT")
    if args.size not in (None, size):
        raise InputError(f"--size: the file says {size[0]:g}x{size[1]:g}; leave it out")
    pose_2d, interpolated, frames, left_out = prepare_track(track, size, args, fps)
    poses = lift_poses(model, pose_2d, size, args.flip).astype(float)
    focal = args.focal or math.hypot(*size)
    root = root_trajectory(pose_2d, poses, focal, np.array(size) / 2)
    person = {
        "name": track.person, "size": size, "focal": focal, "frames": frames,
        "poses": poses.round(4).tolist(), "root": root.round(4).tolist(),
        "keypoints": pose_2d.round(2).tolist(), "interpolated": interpolated.astype(int).tolist()}
    gaps = interpolated.all(1)
    what = "frames" if track.step else "single images"
    line = (f"person {track.person}: {len(poses)} {what}, by {model.recipe.name}; interpolated: "
            f"{gaps.sum()} whole frames, {interpolated[~gaps].sum()} single joints")
    return person, line, left_out


def width_x_height(text):
    """(width, height) of text such as 1920x1080."""
    width, height = text.lower().split("x")
    return float(width), float(height)


def lift_options(argv):
    """The command's options, checked."""
    parser = Parser(prog="eval.py lift", description=lift_command.__doc__)
    add = parser.add_argument
    add("keypoints", metavar="KEYPOINTS", type=Path, help="a detector's file or folder")
    add("--model", type=Path, metavar="CHECKPOINT", help="default: the pretrained one that fits")
    add("--size", type=width_x_height, metavar="WxH", help="the image's, where no file says it")
    add("--joints", choices=TO_H36M, help="what 17 joints are (default: coco)")
    add("--person", help="lift this one alone (default: everyone)")
    add("--min-score", type=float, default=0.0, help="joints not above it are interpolated (0)")
    add("--smooth", type=float, nargs="?", const=2.0, metavar="HZ", help="One-Euro cutoff (2)")
    add("--fps", type=float, default=30.0, help="of the video, for smoothing and playing (30)")
    add("--focal", type=float, metavar="PIXELS", help="for the root (the image's diagonal)")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored input's")
    add("--out", type=Path, default="poses.npz", metavar="FILE", help=".npz or .json (poses.npz)")
    add("--plot", type=Path, nargs="+", default=[], metavar="FILE", help=".png or .gif")
    add("--device", help="cpu, cuda, ... (cuda where there is one)")
    at = argv.index("--size") + 1 if "--size" in argv else len(argv)
    if len(argv) >= at + 2 and all(map(str.isdecimal, argv[at:at + 2])):  # --size W H
        argv = [*argv[:at], "x".join(argv[at:at + 2]), *argv[at + 2:]]
    args = parser.parse_args(argv)
    check_settings(args.size or (1, 1), min_score=args.min_score, smooth=args.smooth, fps=args.fps,
                   focal=args.focal)
    if args.out.suffix.lower() not in (".npz", ".json"):
        raise InputError(f"--out {args.out}: expected a name in .npz or .json")
    args.page = args.out.with_suffix(".html")
    for path in args.plot:
        if path.suffix.lower() not in (".png", ".gif"):
            raise InputError(f"--plot {path}: expected a name in .png or .gif")
    read = [path.resolve() for path in (args.keypoints, args.model) if path]
    for path in (args.out, args.page, *args.plot):
        if path.resolve() in read or path.is_dir():
            raise InputError(f"{path}: would overwrite a folder or what is read; choose another")
    if args.plot and not find_spec("matplotlib"):
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    return args


def lift_command(argv):
    """python eval.py lift KEYPOINTS: any detector's 2D keypoints to 3D poses, and to a page that
    shows them."""
    args = lift_options(list(argv))
    everyone = read_keypoints(args.keypoints)
    tracks = [track for track in everyone if args.person in (None, track.person)]
    if not tracks:
        known = ", ".join(track.person for track in everyone[:20])
        raise InputError(f"--person {args.person}: not in {args.keypoints}; it has {known}")
    device, _ = pick_device(args.device)
    models = load_models(args.model, device)
    fps = args.fps / (tracks[0].step or 1)
    people, lines, cautions, licences = [], [], [], {}
    for track in tracks:
        try:
            model = model_for(track, models)
            person, line, left_out = lift_track(track, model, args, fps)
        except InputError as error:  # one bad track does not cost the others
            cautions.append(f"person {track.person}: left out: {error}")
            continue
        people.append(person)
        lines.append(line)
        cautions += left_out
        licences[model.recipe.name] = model.licence or "not stated"
    if not people:
        raise InputError(f"{args.keypoints}: {cautions[0]}")
    skeleton = data.SKELETONS["h36m17"]
    result = {
        "format": "poselift poses", "source": one_line(args.keypoints.name), "fps": fps,
        "model": ", ".join(licences), "licence": "; ".join(dict.fromkeys(licences.values())),
        "joints": skeleton.joints, "edges": skeleton.edges, "left": skeleton.left,
        "right": skeleton.right, "people": people}
    template = HERE / "docs" / "viewer.html"
    if template.is_file():
        write_page(args.page, result)
        lines.append(f"to open and turn -> {args.page}")
    else:
        lines.append(f"no page: {template} not found")
    write_poses(args.out, result)
    lines.append(f"{sum(len(person['frames']) for person in people)} poses -> {args.out}")
    longest = max(people, key=lambda one: len(one["frames"]))
    for path in args.plot:
        pose_2d, poses = np.array(longest["keypoints"]), np.array(longest["poses"])
        plot_poses(path, pose_2d, poses, fps, longest["frames"])
        lines.append(f"person {longest['name']} -> {path}")
    lines.append(f"root: by a focal length of {longest['focal']:.0f} pixels (--focal where known)")
    lines.append(f"licence of {result['model']}: {result['licence']}")
    for warning in cautions:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(lines))


COMMANDS = {"inspect": inspect_command, "lift": lift_command}


def main(argv=None):
    """Runs one of COMMANDS, or evaluates the checkpoint that the first argument names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = argv[0] if argv else "--help"
    if first in COMMANDS:
        return COMMANDS[first](argv[1:])
    if not Path(first).exists():
        for near in difflib.get_close_matches(first, COMMANDS, n=1):
            raise InputError(f"unknown command {first!r} (nor a file), did you mean {near}?")
    evaluate_command(argv)


if __name__ == "__main__":
    data.run(main)
