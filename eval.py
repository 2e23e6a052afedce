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
import json
import math
import os
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
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
# Metrics for users: (frames, J, 3) tensors in metres in, a float out; `score` computes the same

def exact(pose):
    """The pose in float64, on its device; on the CPU where the device (Apple's mps) has none."""
    return (pose.cpu() if pose.device.type == "mps" else pose).detach().double()


def check_pair(prediction, target):
    """Both poses in float64; InputError unless both are finite (frames, J, 3) of one shape."""
    for name, pose in (("prediction", prediction), ("target", target)):
        if not torch.is_tensor(pose) or pose.shape[2:] != (3,) or pose.numel() == 0:
            found = f"{type(pose).__name__} {tuple(np.shape(pose))}"
            raise InputError(f"{name}: {found}; expected a tensor (frames, joints, 3)")
        if not pose.isfinite().all():
            raise InputError(f"{name}: NaN or infinite coordinates")
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

def pick_device(name=None, precision="auto"):
    """(device, precision): the one place that picks a device and sets how it multiplies.

    By default CUDA where there is one; under torchrun (LOCAL_RANK) each process takes its own card
    before any context is opened. `precision` "auto" is tf32 on CUDA (as the releases ran, for
    matrix products and convolutions alike) and float32 elsewhere; float32, tf32 and bf16 stay.
    InputError: an unknown or unusable device, an NVIDIA driver or card that this torch cannot use.
    """
    with warnings.catch_warnings():
        # torch's own warnings of a driver too old for it and of a card that it has no code for
        warnings.filterwarnings("error", r"(?s).*(driver|capability)")
        try:
            name = name or ("cuda" if torch.cuda.is_available() else "cpu")
            if name == "cuda":
                name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            device = torch.device(name)
            if device.type == "cuda" and "LOCAL_RANK" in os.environ:
                torch.cuda.set_device(device)
            torch.zeros(1, device=device).cpu()  # a meta device has no numbers to give back
        except (AssertionError, ImportError, RuntimeError, Warning) as error:
            raise InputError(f"--device {name or 'cuda'}: {one_line(error)[:400]}; --device cpu, "
                             f"or an older torch than {torch.__version__} (driver 580)") from None
    if precision == "auto":
        precision = "tf32" if device.type == "cuda" else "float32"
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"  # convolutions', by default on
    return device, precision


def device_name(device):
    """What a device is called in reports."""
    threads = f"{device.type}, threads: {torch.get_num_threads()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else threads


# ----------------------------------------------------------------------------------------------
# Models from recipes

# Each method's network, and the fields of a recipe that it takes as they are.
NETWORKS = {
    "gridconv": (gridconv.GridLiftingNetwork,
                 ("hidden", "blocks", "kernel_sizes", "padding", "dropout")),
    "gridconv-temporal": (gridconv.TemporalGridLiftingNetwork,
                          ("filter_widths", "hidden", "padding", "dropout")),
    "glagcn": (glagcn.GLAGCN, (
        "filter_widths", "channels", "reconstruct", "reconstruct_blocks", "unshared_weight",
        "dropout", "causal", "adaptive", "temporal", "head", "normalisation", "input_norm")),
    "fc": (gridconv.FullyConnectedLifter, ("hidden", "blocks", "dropout")),
    "gcn": (gridconv.GraphConvLifter, ("hidden", "blocks", "dropout"))}
DESIGNED = {("handcrafted", 17, (5, 5)): gridconv.HANDCRAFTED_5X5,
            ("handcrafted", 32, (7, 5)): gridconv.HANDCRAFTED_7X5,
            ("released", 17, (5, 5)): gridconv.RELEASED_5X5}


def grid_layout(recipe):
    """The layout that a GridConv recipe names: a nested tuple of joints, or an AutoGrids.

    One of DESIGNED; "random"; "row", "column" and "global", shuffles of the handcrafted one (Table
    B); "autogrids", which starts from the handcrafted one, or "autogrids-random"."""
    joints = len(data.SKELETONS[recipe.skeleton].joints)
    name, grid, seed = recipe.layout, recipe.grid, recipe.layout_seed
    handcrafted = DESIGNED.get(("handcrafted", joints, grid))
    if name == "random":
        return gridconv.random_layout(joints, grid, seed)
    if name in ("autogrids", "autogrids-random"):
        prior = handcrafted if name == "autogrids" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # which alone decides the start: see learnt_grid
            return gridconv.AutoGrids(joints, grid, prior or "random")
    if name in ("row", "column", "global") and handcrafted:
        return gridconv.shuffle_layout(handcrafted, name, seed)
    if (name, joints, grid) not in DESIGNED:
        raise InputError(f"no layout {name!r} of {joints} joints on {grid[0]} x {grid[1]}; random "
                         "and autogrids fit every one")
    return DESIGNED[name, joints, grid]


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
    if recipe.method not in NETWORKS or recipe.skeleton not in data.SKELETONS:
        raise InputError(f"method {recipe.method!r}, skeleton {recipe.skeleton!r}: expected one of "
                         f"{', '.join(NETWORKS)}; one of {', '.join(data.SKELETONS)}")
    network, fields = NETWORKS[recipe.method]
    skeleton = data.SKELETONS[recipe.skeleton]
    options = {name: getattr(recipe, name) for name in fields}
    if recipe.method == "glagcn":
        options["edges"] = glagcn_edges(recipe.skeleton, recipe.keypoints, recipe.input_norm)
    elif recipe.method == "gcn":
        options["edges"] = skeleton.edges
    elif recipe.method == "gridconv":
        options["attention"] = recipe.attention or None
    if recipe.method.startswith("gridconv"):
        options["layout"] = grid_layout(recipe)
    model = network(len(skeleton.joints), **options)
    if "layout" in options:
        if not 0 < recipe.temperature < math.inf:
            raise InputError(f"temperature {recipe.temperature}: above 0 expected")
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
CHOICES = ("data", "keypoints", "cameras")  # what any model can be measured on
# What data.provenance calls the training data of the papers' models.
TRAINED_ON = {**data.GENUINE, "3dhp": "files in MPI-INF-3DHP layout"}


def released_gridconv(state, recipe):
    """(model, what these fields are) of GridConv's weights, which do not say the padding.

    The 2D follows from the padding where there is attention: zeros went with HRNet's."""
    padding, attention = recipe["padding"], "atten_conv1.fc.weight" in state
    if not padding:
        raise InputError("padding not said: give --padding circular,replicate")
    model = gridconv.from_released(state, padding)
    keypoints = "hrnet" if attention and "zeros" in padding else "gt"
    name, layout = f"gridconv-{keypoints}", "released"
    if model.autogrids is not None:
        name, layout = f"{name}-learnable", "autogrids"
    return model, {"name": name, "keypoints": keypoints, "layout": layout}


def released_glagcn(state, recipe):
    """(model, fields) of GLA-GCN's weights, which say neither filter widths nor 17 joints' links.

    HumanEva-I's 2D decides between two lists of links and about the input's batch norm."""
    widths, skeleton, keypoints = recipe["filter_widths"], recipe["skeleton"], recipe["keypoints"]
    if skeleton is None and state["expand_gcn.gcn1.PA"].shape[-1] == 15:  # of (3, J, J)
        skeleton = "humaneva15"
    if not widths or skeleton is None or (skeleton, keypoints) == ("humaneva15", None):
        raise InputError("give --filter-widths, as 3,3,3, --skeleton h36m17 or 3dhp17, and for "
                         "15 joints --keypoints gt or detectron_pt_coco")
    norm = (skeleton, keypoints) != ("humaneva15", "detectron_pt_coco")
    model = glagcn.from_released(state, widths, glagcn_edges(skeleton, keypoints, norm), norm)

    part = {part: name for name, part in NAMED_2D.items()}.get(keypoints, "other")
    name = f"humaneva-{part}" if skeleton == "humaneva15" else f"{part}-{math.prod(widths)}"
    return model, {"name": f"glagcn-{name}", "skeleton": skeleton, "input_norm": norm,
                   "data": skeleton[:-2]}  # "h36m" of "h36m17"


def own_model(state, recipe):
    """(model, fields to show) of this project's weights."""
    said = {*CHOICES, "name", "method", "skeleton", "target", "normalise", "flip_test"}
    # Even without memory a network takes time for each block, and for each tap of each cell.
    blocks = max(recipe["blocks"], recipe["reconstruct_blocks"])
    taps = math.prod(recipe["grid"]) * np.hstack(recipe["kernel_sizes"]).max() ** 2
    if said - recipe.keys() or blocks > len(state) or taps > 10 ** 5:
        raise InputError("weights and recipe do not fit; take another")
    model = build_model(SimpleNamespace(**recipe))
    model.load_state_dict(state)
    return model, {"name": one_line(recipe["name"])}


def tuples(value, depth=3):
    """Lists, as a file keeps them, back into tuples; what no recipe holds, deeper or longer ones,
    is left out."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(tuples(part, depth - 1) for part in value[:100] if depth)


def recognise(content, size):
    """(build, recipe, state): how to read what a checkpoint file of `size` bytes holds."""
    build, recipe, state = released_gridconv, RELEASED_GRIDCONV, content.get("state_dict")
    if "model_pos" in content:
        build, recipe, state = released_glagcn, RELEASED_GLAGCN, content["model_pos"]
    if (content.get("format"), content.get("version")) == ("poselift", 1):
        build, recipe, state = own_model, content["recipe"], content["model"]
    if sum(value.nbytes for value in state.values()) > size:
        raise InputError("weights claim more than the file holds: fetch it again")
    for name, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{name}: NaN or infinite; take another")
    # DataParallel and torch.compile put a prefix before each name
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): state[name] for name in state}
    recipe = {name: tuples(value) for name, value in (NOT_SAID | recipe).items()}
    if content.get("temperature") is not None:  # of former versions, which annealed it
        recipe["temperature"] = content["temperature"]
    return build, recipe, state


def load_model(path, **overrides):
    """The network in a checkpoint file, in evaluation mode on the CPU.

    It has `.recipe` (a SimpleNamespace; `crossed` says that it is to be measured on other data or
    2D than it was trained on), `.epoch`, `.licence` and `.trained_on`. Reads this project's
    checkpoints and both releases', told apart by their contents; nothing in a file is executed.
    Overrides (None: not given) are recipe fields: what a release's file does not say (None in
    RELEASED_...), and CHOICES of what to measure on. A needed one that is missing, an unknown one,
    a file that is damaged, claims more than it holds or is something else, weights that do not
    fit, NaN and infinities are an InputError that names the file.
    """
    content = data.read_torch(path, remedy="name a checkpoint (lift: --model)", inert=True)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        build, known, state = recognise(content, Path(path).stat().st_size)
        for name, value in given.items():
            if name not in CHOICES and known.get(name, "said") is not None:
                raise InputError(f"its {name} cannot be chosen: leave the option out")
            known[name] = known[name] or tuples(value)
        with warnings.catch_warnings(), torch.device("meta"):  # shapes first, memory after
            warnings.simplefilter("ignore")  # that these tensors take no values
            build(state, known)
        model, said = build(state, known)
    except ValueError as error:
        raise InputError(f"{path}: {one_line(error):.500}") from None
    except Exception:  # what a foreign structure raises where it is taken apart
        raise InputError(f"{path}: no checkpoint of version 1 or a release, or "
                         "weights and recipe do not fit; take another") from None

    recipe = known | said
    measured = recipe | {name: given[name] for name in CHOICES if name in given}
    model.recipe = SimpleNamespace(**measured | {"crossed": measured != recipe})
    model.epoch = content.get("epoch")
    model.licence = one_line(content.get("licence") or "")
    model.trained_on = content.get("data", TRAINED_ON.get(str(recipe["data"]), ""))
    return model.eval()


# ----------------------------------------------------------------------------------------------
# Predictions and scores over a frame store

@torch.no_grad()
def predict(model, store, flip=False, refinement=None, batch=None):
    """Root-relative poses (N, J, 3) in metres of a store's frames, on its device.

    `batch` at a time. The window around each frame is the model's `receptive_field`. `flip`
    averages with the prediction for the mirrored input, mirrored back (VideoPose3D's test-time
    augmentation). `refinement` is GLA-GCN's, which re-projects with the frames' true root
    positions and intrinsics. All are left in the model's mode.
    """
    weight = next(model.parameters())
    frames, causal = model.receptive_field, getattr(model, "causal", False)
    # on a CPU what stays in its cache: twice as fast
    most, most_frames = (4096, 32768) if weight.is_cuda else (256, 2048)
    batch = batch or max(1, min(most, most_frames // frames))
    training = model.training
    networks = torch.nn.ModuleList([model, refinement or torch.nn.Identity()]).eval()
    poses = []
    for part in torch.arange(len(store), device=store.input.device).split(batch):
        window = store.batch(part, frames, causal)[0].to(weight)  # (B, J, 2) or (B, T, J, 2)
        pose = model(window)
        if flip:
            pose = (pose + store.mirrored(model(store.mirrored(window)))) / 2
        pose = store.to_camera(pose.to(store.pose_3d), part)
        if refinement is not None:
            intrinsics = store.normalised_intrinsics(part)
            pose = refinement(pose, store.input[part], intrinsics, store.root[part])
        poses.append(pose)
    networks.train(training)
    return torch.cat(poses)


def evaluate(model, store, flip=False, refinement=None):
    """The `score` of a model's predictions (see `predict`) for every frame of a store."""
    return score(predict(model, store, flip, refinement), store)


METRICS = {"mpjpe": "MPJPE", "pck": "PCK", "auc": "AUC", "p_mpjpe": "P-MPJPE",
           "n_mpjpe": "N-MPJPE", "mpjve": "MPJVE"}
# What a row's figure is a mean over: its frames, or its pairs of consecutive frames.
COUNTED = dict.fromkeys(METRICS, "frames") | {"mpjve": "pairs"}
# The 14 joints that MPI-INF-3DHP's own tool counts: all but pelvis, spine and head, which are 0, 7
# and 9 in Human3.6M's order.
JOINTS_3DHP = {"3dhp17": [*range(14)], "h36m17": [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]}


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
    valid, sequence = store.valid.to(target.device), store.sequence.to(target.device)
    kind = protocol(store)
    if kind == "3dhp":
        prediction = prediction.clone()
        prediction[:, store.skeleton.root] = 0
    sums = 0.0
    for part in torch.arange(len(store), device=target.device).split(chunk):
        pose, true = prediction[part], target[part]
        errors = distance(pose, true)
        figures = {"mpjpe": errors.mean(1)}
        if kind == "3dhp":
            errors = errors[:, JOINTS_3DHP[store.skeleton.name]]
            figures |= {"pck": below(errors, 150), "auc": area(errors)}
        figures["p_mpjpe"] = distance(align(pose, true), true).mean(1)
        figures["n_mpjpe"] = distance(rescale(pose, true), true).mean(1)

        # a velocity belongs to the first of two frames: both valid, and of one sequence
        after = (part + 1).clamp(max=len(store) - 1)
        figures["mpjve"] = distance(prediction[after] - pose, target[after] - true).mean(1)
        paired = valid[part] & valid[after] & (sequence[part] == sequence[after]) & (after > part)

        counts = {"frames": valid[part].double(), "pairs": paired.double()}
        columns = [figure * counts[COUNTED[name]] for name, figure in figures.items()]
        columns += counts.values()
        more = errors.new_zeros(len(store.sequences), len(columns))
        sums = sums + more.index_add_(0, sequence[part], torch.stack(columns, 1))

    rows = []
    for clip, (*totals, frames, pairs) in zip(store.sequences, sums.tolist()):  # to the host once
        row = {"subject": clip.subject, "action": clip.action.split(" ")[0]}  # of "Eating 1"
        row |= {"frames": round(frames), "pairs": round(pairs)}
        for name, total in zip(figures, totals):
            count = row[COUNTED[name]]
            row[name] = total / count if count else None
        rows.append(row)
    return {**headline(rows, kind), "rows": rows}


def mean(rows, by=None, weighted=True):
    """The rows as one, each figure the mean over all their frames; with `by` {group: row}.

    `by` names a column ("action", "subject"), or several: then groups are tuples.
    weighted=False is the plain average over the rows that have the figure."""
    if by is not None:
        key = itemgetter(by) if isinstance(by, str) else itemgetter(*by)
        return {group: mean([row for row in rows if key(row) == group], None, weighted)
                for group in dict.fromkeys(map(key, rows))}
    whole = {name: sum(row[name] for row in rows) for name in ("frames", "pairs")}
    for name in METRICS:
        if name in rows[0]:
            counted = [row for row in rows if row[name] is not None]
            weights = [row[COUNTED[name]] if weighted else 1 for row in counted]
            total = sum(row[name] * weight for row, weight in zip(counted, weights))
            whole[name] = total / sum(weights) if counted else None
    return whole


def protocol(store):
    """Whose protocol a store's figures are averaged by: h36m, humaneva, 3dhp, or "" for none."""
    first = store.sequences[0]  # all are of one dataset
    if first.subject in data.MPI3DHP_VALID:
        return "3dhp"
    if store.skeleton.name == "humaneva15":
        return "humaneva"
    return "h36m" if first.source.startswith(data.LAYOUT["h36m"]) else ""


def headline(rows, kind):
    """The figures that papers quote, from rows: unweighted over the actions on Human3.6M, over the
    pairs of action and subject on HumanEva-I; elsewhere over all (3DHP: valid) frames."""
    by = {"h36m": "action", "humaneva": ("action", "subject")}.get(kind)
    groups = list(mean(rows, by).values()) if by else rows
    return mean(groups, weighted=not by)


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
        """Inputs (n, J*2) and poses (n, J, 3) of the valid frames, chunk by chunk."""
        for part in torch.arange(len(store), device=store.input.device).split(chunk):
            part = part[store.valid[part]]
            yield exact(store.input[part].flatten(1)), exact(store.pose_3d[part])

    count = train_store.valid.sum().item()
    mean_x = sum(x.sum(0) for x, _ in parts(train_store)) / count
    mean_y = sum(y.sum(0) for _, y in parts(train_store)) / count
    gram = sum((x - mean_x).T @ (x - mean_x) for x, _ in parts(train_store))  # (2J, 2J)
    cross = sum((x - mean_x).T @ (y - mean_y).flatten(1) for x, y in parts(train_store))  # (2J, 3J)
    weight = torch.linalg.pinv(gram.cpu(), rtol=1e-13, hermitian=True).to(gram.device) @ cross

    totals = {"mean_pose": 0.0, "affine": 0.0}
    for x, y in parts(test_store):
        totals["mean_pose"] += distance(mean_y, y).mean(1).sum()
        affine = mean_y + ((x - mean_x) @ weight).view_as(y)
        totals["affine"] += distance(affine, y).mean(1).sum()
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


def compares(recipe, test_data, trained_on):
    """Whether a figure may stand beside the paper's of the recipe's name.

    test_data and trained_on are what data.provenance calls both sets. They must be the papers'
    own (HumanEva-I's files are taken at their word: no frame counts of it are published), and the
    2D that of the row and that which the model was trained on.
    """
    parts = recipe.name.split("-")
    own_2d = all(NAMED_2D.get(part, recipe.keypoints) == recipe.keypoints for part in parts)
    own_data = all((part in parts) == (recipe.data == part) for part in ("humaneva", "3dhp"))
    source = "h36m" if recipe.weights else recipe.data  # of a cross-dataset row
    return (own_2d and own_data and not getattr(recipe, "crossed", False)
            and test_data == data.GENUINE.get(recipe.data) and trained_on == TRAINED_ON[source])


def markdown(header, rows):
    """A markdown table with aligned columns: figures to the right, words to the left.

    Floats have two decimals, None shows as -."""
    columns = []
    for cells in zip(header, *rows):
        cells = ["-" if cell is None else cell for cell in cells]
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
        width = max(map(len, cells))
        words = any(re.search("[A-Za-z]", cell) for cell in cells[1:])
        cells.insert(1, "-" * width if words else "-" * (width - 1) + ":")
        columns.append([cell.ljust(width) if words else cell.rjust(width) for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns))


def score_table(first, groups, printed):
    """A table of score rows {name: row}; `printed` {metric: {name: the paper's figure}}."""
    rows = list(groups.values())
    columns = {first: groups, "frames": [row["frames"] for row in rows]}
    for metric, title in METRICS.items():
        if metric in rows[0]:
            columns[title] = [row[metric] for row in rows]
        paper = [printed.get(metric, {}).get(name) for name in groups]
        if any(paper):
            columns[title + ", paper"] = paper
    return markdown(columns, zip(*columns.values()))


def scores_text(title, scores, recipe, with_paper):
    """The tables of one epoch's scores: by action (HumanEva-I: and subject; 3DHP: sequence), then
    by subject. The last row is the protocol's."""
    rows, text = scores["rows"], f"### {title} ({scores['epoch']})\n\n"
    groups, subjects = mean(rows, "action"), mean(rows, "subject")
    first, printed_rows, last_row = "action", ACTIONS, "all frames"
    if recipe["data"] in ("h36m", "gridconv"):
        last_row = "average over actions"
    elif recipe["data"] == "humaneva":
        first, printed_rows, last_row = "action and subject", WALK_AND_JOG, "average over both"
        pairs = mean(rows, ("action", "subject"))
        groups = {f"{action} {subject[-2:]}": row for (action, subject), row in pairs.items()}
        text += "Over all chunks, where the paper's release scores the last one alone:\n\n"
    printed = {metric: {last_row: recipe.get("paper_" + metric)} for metric in METRICS}
    for metric, figures in PAPER.get(recipe["name"], {}).items():
        printed[metric] = dict(zip((*printed_rows, last_row), figures))
    text += score_table(first, {**groups, last_row: scores}, printed if with_paper else {})
    if groups.keys() != subjects.keys():
        text += "\n\n" + score_table("subject", {**subjects, "all frames": mean(rows)}, {})
    return text


def report(result):
    """The markdown report of one run's result: what was run, its tables, its yardsticks.

    Keys that are missing (eval.py makes a result of "last" alone) are left out."""
    recipe, last, best = result["recipe"], result["last"], result.get("best")
    seed = f", seed {result['seed']}" if "seed" in result else ""
    parts = [f"## {recipe['name']}{seed}: {recipe.get('row', '')}".rstrip(": ")]

    facts = {**recipe, **result, **(result.get("autogrids") or {}),
             "minutes": round(result.get("seconds", 0) / 60, 1)}
    names = ("commit device precision micro_batch compile torch python parameters epochs minutes "
             "cells_changed dropped settings_changed ours").split()
    said = [f"{name.replace('_', ' ')}: {facts[name]}" for name in names if facts.get(name)]
    parts.append("; ".join(said) + ".")
    note = "It is not Human3.6M, or not the row's data and 2D: figures do not compare."
    if result["compares"]:
        note = f"The paper's figures are those of {recipe.get('row') or recipe['name']}."
    parts.append(f"Data: {result['test_data']}, {last['frames']:,} test frames; trained on "
                 f"{result['data'] or 'unnamed data'}. Errors in mm, MPJVE in mm a frame, PCK at "
                 f"150 mm and AUC in % (of 14 joints). {note}")

    tables = {"Epoch": last}
    if best and best["epoch"] != last["epoch"]:
        tables = {"Best epoch on the test set, as the papers choose it": best, "Last epoch": last}
    for title, scores in tables.items():
        parts.append(scores_text(title, scores, recipe, result["compares"]))
    yardstick = result.get("yardsticks", {})
    if yardstick.get("affine"):
        parts.append(f"MPJPE over all frames: this model {mean(last['rows'])['mpjpe']:.2f} mm; "
                     f"yardsticks: training mean pose {yardstick['mean_pose']:.2f} mm, affine map "
                     f"of the 2D pose {yardstick['affine']:.2f} mm.")
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------------------------
# Looking inside

def learnt_grid(model):
    """A learnt grid for a result: {"cells_changed", "dropped", "layout"}; None: there is none.

    "cells_changed" is "not known" where the start is not (a release's file)."""
    learnt = getattr(model, "autogrids", None)
    if learnt is None:
        return None
    layout = learnt.assignment().argmax(1).view(learnt.grid_shape).cpu()  # each cell's joint
    changed = "not known"
    if not getattr(model.recipe, "released", False):
        start = grid_layout(model.recipe).assignment().argmax(1).view_as(layout)
        changed = (start != layout).sum().item()
    return {"cells_changed": changed, "dropped": learnt.dropped(), "layout": layout.tolist()}


def inspect(model):
    """What a model is made of, as text: its size and, of GridConv, the grid (Figures 4 and 6).

    The cells' joints; each joint's neighbours, those whose cells touch by a side, and the bones
    among them; of a learnt grid the joints dropped and the cells changed."""
    recipe, skeleton = model.recipe, data.SKELETONS[model.recipe.skeleton]
    size = sum(p.numel() for p in model.parameters())
    text = [f"{recipe.name} ({recipe.method}): {size:,} parameters, receptive field "
            f"{model.receptive_field}, epoch {model.epoch}, data: {model.trained_on or 'unnamed'}"]
    if not hasattr(model, "assignment"):
        return text[0]

    H, P = model.grid_shape
    S = model.assignment().view(H, P, -1)  # (H, P, J)
    text.append(f"grid, {H} x {P}:")
    for row in S:
        cells = ["+".join(map(str, cell.nonzero().flatten().tolist())) for cell in row]
        text.append(" ".join(cell.rjust(4) for cell in cells))

    links = torch.einsum("hpj, hpk -> jk", S[:, 1:], S[:, :-1])  # across
    links += torch.einsum("hpj, hpk -> jk", S[1:], S[:-1])  # down
    links = ((links + links.T) > 0).fill_diagonal_(False)  # (J, J)
    labels = [f"{joint} {name}" for joint, name in enumerate(skeleton.joints)]
    bones = sum(links[edge].item() for edge in skeleton.edges)
    text.append(f"neighbours in the grid ({bones} of {len(skeleton.edges)} bones among them):")
    for label, row in zip(labels, links):
        text.append(f"  {label}: {', '.join(labels[k] for k in row.nonzero()) or 'none'}")
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
    """One person in one image: points (J, 2|3) of any layout in JOINTS, kept as (17, 3) like a
    Track's, J as `joints` and where they are seen as `place` (17, 2), else NaN; the number or name
    that the file gives the person, or None; the image's number or name and size. InputError,
    ValueError: points of another shape."""
    points: np.ndarray
    image: int | str
    person: str | None = None
    score: float | None = None
    size: tuple | None = None
    fractions: bool = False

    def __post_init__(self):
        self.joints, _ = self.points.shape
        self.points = to_coco17(self.points)
        if self.score is None:
            self.score = np.nan_to_num(self.points[:, 2]).mean()
        self.place = np.where(is_seen(self.points)[:, None], self.points[:, :2], np.nan)


def one_line(text):
    """Others' text as one printable line."""
    letters = " ".join(str(text).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in letters)


@contextmanager
def reading(where, value, expected):
    """Around what takes a foreign structure apart: one line says where the trouble is, and for an
    error of Python's own what was found and expected."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(where)):
            raise
        raise InputError(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        found = one_line(json.dumps(value, default=str, skipkeys=True))[:80]
        raise InputError(f"{where}: found {found}; expected {expected}") from None


def to_coco17(points):
    """COCO's 17 joints (..., 17, 3) of points (..., J, 2|3) in the layout that has J joints. Where
    there are no scores they are 1, and (-1, -1) says that nothing was detected."""
    count, numbers = points.shape[-2:]
    if count not in JOINTS or numbers not in (2, 3):
        raise InputError(f"{count} joints of {numbers} numbers; expected 2 or 3 of {[*JOINTS]}")
    points = points[..., list(JOINTS[count]), :]
    if numbers == 2:
        score = np.where((points == -1).all(-1, keepdims=True), np.nan, 1.0)
        points = np.concatenate((points * score, score), -1)
    return points


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


# ----------------------------------------------------------------------------------------------
# One small reader a format

FORMATS = "keypoints of COCO, MMPose, AlphaPose, OpenPose, ultralytics or MediaPipe"
ARRAYS = "one array (frames, [people,] joints, 2 or 3), or VideoPose3D's"

# What detectors call the same thing.
POINTS = ("keypoints", "pose_keypoints_2d", "pose_keypoints", "joints")
PERSON = ("track_id", "idx", "person_id", "instance_id")
SCORE = ("score", "confidence", "bbox_score")
PEOPLE = ("instances", "people", "bodies", "landmarks", "landmark", "pose_landmarks",
          "poseLandmarks")
IMAGE = {"image_id", "frame_id", "frame", "image", "file_name"}
NOBODY = {"keypoints": [[np.nan] * 3] * 17}


def first_of(item, keys):
    """The first of these entries that a dictionary has, or None."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def detection(item, image):
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
    if scores is not None:
        points = np.column_stack((points[:, :2], np.array(scores, float)))

    person, score = first_of(item, PERSON), first_of(item, SCORE)
    while isinstance(person, list):  # AlphaPose: [7.0]
        person, = person
    person = int(person) if isinstance(person, float) and person.is_integer() else person
    # OpenPose: -1. A dictionary is a TypeError in a set: no number and no name.
    person = None if person in {None, -1, ""} else one_line(person)
    return Detection(points, image, person, score)


def read_images(images):
    """Yields the Detections of (image's number or name, entry), where an entry is MMPose's
    {frame_id, instances}, OpenPose's {people}, AlphaPose's {bodies}, MediaPipe's {frame,
    landmarks}, or a list of people alone, as MMPose's of one image and ultralytics'. An image of
    nobody is one of NOBODY: it counts where a video is told from single images."""
    for number, (image, people) in enumerate(images):
        with reading(f"entry {number}", people, FORMATS):
            if isinstance(people, dict):
                stated = first_of(people, ("frame_id", "frame"))
                image = image if stated is None else int(stated)
                people = [people[key] for key in PEOPLE if key in people][0]
            image = image if isinstance(image, str) else int(image)
            if people and "x" in people[0]:  # landmarks of one, whom MediaPipe follows itself
                people = [{"keypoints": people, "track_id": "1"}]
            for person in people or [NOBODY]:
                if isinstance(person, list):
                    person = {"keypoints": person}
                if first_of(person, POINTS) == []:  # OpenPose: hands or a face alone
                    person = NOBODY
                yield detection(person, image)


def check_joints(names):
    """InputError where a file's names of its joints do not begin with the nose, as JOINTS do."""
    if names and "hip" in str(names).lower() and "nose" not in str(names[0]).lower():
        raise InputError(f"joints from {one_line(names[0])} on; expected COCO's, nose first")


def coco_annotations(content):
    """Yields the Detections of {images: [{id, width, height}], annotations}; images without a
    file_name are numbered by their order."""
    images = {}
    for number, image in enumerate(content.get("images") or []):
        size = image.get("width"), image.get("height")
        size = None if None in size else tuple(map(float, size))
        images[image["id"]] = str(image.get("file_name") or number), size

    people = [entry for entry in content["annotations"] if "keypoints" in entry]
    used = {entry.get("category_id") for entry in people}
    for kind in content.get("categories") or []:
        if kind.get("id") in used:
            check_joints(kind.get("keypoints"))
    entries = [(entry["image_id"], [entry]) for entry in people]
    for found in read_images(entries + [(image, []) for image in images]):
        if images:
            found.image, found.size = images[found.image]
        yield found


REFUSED = {
    "pose_world_landmarks": "MediaPipe's landmarks in metres; write pose_landmarks",
    "preds": "MMPose 0.x's test results; write COCO results",
    "shapes": "LabelMe's drawings; write COCO annotations",
    "box": "boxes alone; run a pose model"}


def read_json(path):
    """The Detections in a JSON file, told by the keys of its first entry."""
    content = data.read_json(path, "name a file of keypoints")
    with reading(path, content, FORMATS):
        if isinstance(content, dict):
            if "annotations" in content:
                return list(coco_annotations(content))
            image = next(iter(content.values()), None)
            if isinstance(image, dict) and image.keys() & {"bodies", "people"}:
                return list(read_images(content.items()))  # AlphaPose's
            check_joints([*content.get("meta_info", {}).get("keypoint_id2name", {}).values()])
            content = content.get("instance_info", [content])

        first = next(filter(None, content), {})
        probe = first
        while isinstance(probe, list):
            probe = probe[0]
        keys = probe.keys()
        if not keys & {*POINTS, *PEOPLE, "x"}:
            for key in keys & REFUSED.keys():
                raise InputError(f"this looks like {REFUSED[key]}")
        if keys & IMAGE and not keys & {*PEOPLE}:  # COCO results: of Detectron2, MMPose, AlphaPose
            return list(read_images((entry["image_id"], [entry]) for entry in content))
        if keys & {"keypoints", "x"} and probe is first:  # the people of one image
            content = [content]
        return list(read_images(enumerate(content)))


def mediapipe_csv(path):
    """The Detections in a CSV file of MediaPipe's landmarks, a row a frame."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    with reading(path, text, "columns x_0, y_0, visibility_0, ... to 32"):
        names, *rows = [line.split(",") for line in text.splitlines()]
        table = np.array([[cell or "nan" for cell in row] for row in rows], float)
        parts = [f"{part}_{k}" for k in range(33) for part in ("x", "y", "visibility")]
        points = table[:, [names.index(part) for part in parts]].reshape(-1, 33, 3)
        frames = [column for name, column in zip(names, table.T)
                  if name.startswith("frame") and not (column % 1 > 0).any()]  # not their time
        frames.append(range(len(table)))  # where no column numbers them
        return [Detection(one, int(number), "1") for number, one in zip(frames[0], points)]


def ultralytics_labels(path):
    """Yields the Detections in save_txt's lines of an image: class, box, 17 joints, then the box's
    confidence and the person's number where asked for; parts of the image's size."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        with reading(f"{path}, line {number}", line, "class, box and 17 joints"):
            values = np.array(line.split(), float)
            columns = 3 if len(values) >= 5 + 17 * 3 else 2
            points, rest = np.split(values[5:], [17 * columns])
            if len(rest) > 2 or columns == 2 and not line.endswith("\n"):
                raise ValueError("too long, or cut off")
            person = f"{rest[-1]:.0f}" if len(rest) and rest[-1].is_integer() else None
            yield Detection(points.reshape(17, -1), path.stem, person, fractions=True)


def detectron2(arrays):
    """Yields the Detections of VideoPose3D's inference by Detectron2: for each frame lists by
    class, the last of them people's boxes (n, 5) and keypoints (n, 4, 17), rows x, y, logit,
    probability."""
    about = arrays["metadata"].item()
    size = float(about["w"]), float(about["h"])
    frames = zip(arrays["keypoints"], arrays["boxes"], strict=True)
    for number, (keypoints, boxes) in enumerate(frames):
        yield detection(NOBODY, number)
        people = zip(keypoints[-1], boxes[-1], strict=True) if len(keypoints) else ()
        for rows, box in people:
            points = np.array(rows, float)[[0, 1, 3]].T  # (17, 3)
            yield Detection(points, number, None, float(box[4]), size)


def videopose3d(arrays):
    """Yields the Tracks of VideoPose3D's data_2d_custom_*.npz: positions_2d {video: {"custom":
    [(T, 17, 2)]}}, metadata {layout_name, video_metadata}."""
    about = arrays["metadata"].item()
    joints = {"coco": "coco", "h36m": "h36m", None: None}[about.get("layout_name")]
    for video, actions in arrays["positions_2d"].item().items():
        place = about["video_metadata"][video]
        size = float(place["w"]), float(place["h"])
        views = {f"{video} {action} {number}": view for action, views in actions.items()
                 for number, view in enumerate(views)}
        for name, view in views.items():
            person = one_line(name if len(views) > 1 else video)
            detections = [Detection(points, number, person, None, size)
                          for number, points in enumerate(np.array(view, float))]
            yield from tracks_of(detections, joints)


def read_arrays(path):
    """The Tracks or Detections in an .npz or .npy file."""
    arrays = data.read_npz(path, "name a file of keypoints")
    found = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
    with reading(path, found, ARRAYS):
        if "positions_2d" in arrays:
            return list(videopose3d(arrays))
        if {"boxes", "keypoints", "metadata"} <= arrays.keys():
            return list(detectron2(arrays))
        if {"poses", "root", "keypoints"} <= arrays.keys():
            raise InputError("this looks like what lift has written; name its input")
        fits = {key: array.astype(float) for key, array in arrays.items()
                if array.dtype.kind in "fiu" and array.ndim in (3, 4)}
        points, = [fits["keypoints"]] if "keypoints" in fits else fits.values()

        if points.shape[-2:] == (33, 4):  # x, y, z, visibility
            points = points[..., [0, 1, 3]]
        elif points.shape[-2] == 33 and (points[..., 2:] < 0).any():  # z: depth has both signs
            points = points[..., :2]
        scores = [array for array in arrays.values() if array.shape == points.shape[:-1]]
        if scores and points.shape[-1] == 2:
            points = np.concatenate((points, scores[0][..., None]), -1, dtype=float)

        person = "1" if points.ndim == 3 else None
        points = points.reshape(len(points), -1, *points.shape[-2:])  # (T, P, J, C)
        return [Detection(one, number, person)
                for number, people in enumerate(points) for one in people]


def read_file(path):
    """The Tracks or Detections in one file, told by how it begins; some readers yield them."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((b"PK", b"\x93NUMPY")):
        return read_arrays(path)
    if head.startswith((b"[", b"{")) or path.suffix.lower() == ".json":
        return read_json(path)
    if b"\0" in head or head.startswith(b"\x80"):
        raise InputError("this looks like a picture, video or pickle; save JSON")
    return mediapipe_csv(path) if b"," in head else ultralytics_labels(path)


def read_folder(path):
    """Yields the Detections in a folder with one file an image."""
    files = sorted(file for file in path.glob("[!.]*") if file.is_file())
    kinds = " and ".join(sorted({file.suffix.lower() for file in files}))
    if kinds not in (".json", ".txt"):
        raise InputError(f"found {kinds or 'no'} files; expected .json or .txt alone")

    for file in files:
        people = list(read_file(file)) or [detection(NOBODY, 0)]
        count = len({found.image for found in people})
        if count > 1:
            raise InputError(f"{file}: {count} images; expected one a file")
        for found in people:
            found.image = file.stem.removesuffix("_keypoints")
        yield from people


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
    """(K, P): how far bodies (K, 17, 2) are from bodies (P, 17, 2): the mean over the joints seen
    in both, in parts of the larger one's diagonal; infinite where none was."""
    apart = np.linalg.norm(before[:, None] - after, axis=-1)  # (K, P, 17)
    mean = np.ma.masked_invalid(apart).mean(-1)
    old, new = (np.linalg.norm(np.nanmax(bodies, 1) - np.nanmin(bodies, 1), axis=-1)
                for bodies in (before, after))
    return (mean / np.maximum(old[:, None], new).clip(1e-9)).filled(np.inf)


def follow(frames, step=1):
    """The people without numbers in [(frame number, Detections)], in order of time and of every
    step-th frame, as {number: Detection} each, the longest first.

    In each frame detections go to the people followed so that the sum of their `distances` to
    where they are expected is least, if nearer than REACH; the others are new people. Who was not
    seen for more than GAP frames has left. Of a person is known: detections by frame number, the
    last of these, where the joints were then (17, 2), or else expected, NaN where never seen, and
    the body's velocity a frame.
    """
    people = []
    for number, detections in frames:
        new = dict(enumerate(found for found in detections if not found.person))
        places = np.array([found.place for found in new.values()]).reshape(-1, 17, 2)
        present = [one for one in people if number - one.last <= (GAP + 1) * step]
        expected = [one.place + one.velocity * (number - one.last) for one in present]
        cost = distances(np.array(expected).reshape(-1, 17, 2), places)
        for row, column in assign(np.minimum(cost, REACH)):
            if cost[row, column] < REACH:
                person, found = present[row], new.pop(column)
                moved = np.nanmean(found.place - person.place, 0) / (number - person.last)
                person.velocity = (person.velocity + moved) / 2
                person.place = np.where(np.isnan(found.place), expected[row], found.place)
                person.found[number], person.last = found, number
        for found in new.values():
            person = {"found": {number: found}, "last": number, "place": found.place}
            people.append(SimpleNamespace(**person, velocity=0.0))
    return sorted((person.found for person in people), key=len, reverse=True)


def video_frames(images):
    """([(number in a video, Detections)] in order, step) of {image's name: its Detections}, where
    every step-th frame was looked at; ([(name, Detections)], 0) of single images.

    A video's images are of one size, their names differ in the last number alone, and most of the
    numbers follow the one before by the same step, of at most 60 (after longer ones a person is
    not where they were).
    """
    name = re.compile(r"(?s)(.*?)(\d{1,18})(\D*?)(\.[^\W\d]\w*)?")  # a.0001, a1_b.mp4
    parts = [name.fullmatch(str(image)) for image in images]
    sizes = {found.size for people in images.values() for found in people}
    alike = {part and part.group(1, 3) for part in parts}
    if len(alike) == len(sizes) == 1 < len(images) and None not in alike:
        numbers = [int(part[2]) for part in parts]
        gaps = np.diff(sorted(numbers))
        step = int(np.gcd.reduce(gaps))
        usual = 2 * (gaps == step).sum() >= len(gaps) and gaps.max() <= 1000 * step
        if usual and gaps.min() > 0 and step <= 60:
            return sorted(zip(numbers, images.values()), key=lambda pair: pair[0]), step
    return list(images.items()), 0


def people_of_video(frames, step):
    """[(name, {frame number: Detection})] of [(frame number, Detections)]: the file's own people,
    the best-scored of each frame, and others as they are followed, numbered by length."""
    named = {}
    for number, people in frames:
        for found in people:
            if found.person:
                row = named.setdefault(found.person, {})
                row[number] = max(row.get(number, found), found, key=lambda one: one.score)
    prefix = "untracked " if named else ""
    followed = [(f"{prefix}{n}", row) for n, row in enumerate(follow(frames, step), 1)]
    return [*named.items(), *followed]


def people_of_images(images):
    """[(name, {image: Detection})] of [(image, Detections)], for images of each size: the file's
    own people, or else the best-scored of each image, the next, ..."""
    rows = {}
    for image, people in images:
        for rank, found in enumerate(sorted(people, key=lambda found: -found.score)):
            rows.setdefault((found.size, found.person or rank), {}).setdefault(image, found)
    longest = sorted(rows.items(), key=lambda item: -len(item[1]))
    return [(person if isinstance(person, str) else str(number), row)
            for number, ((_, person), row) in enumerate(longest, 1)]


def tracks_of(detections, joints=None):
    """Yields the Tracks of Detections in a video or in single images; joints: what 17 are."""
    images = {found.image: [] for found in detections}  # also those of nobody
    detections = [found for found in detections if is_seen(found.points).any()]
    counts = sorted({found.joints for found in detections})
    if len(counts) > 1:
        raise InputError(f"people of {counts[0]} and of {counts[1]} joints; take one detector's")

    named = [(found.image, found.person) for found in detections if found.person]
    doubled = len(named) - len(set(named))
    if doubled:
        print(f"warning: {doubled} times several people of a frame share a number", file=sys.stderr)

    for found in detections:
        images[found.image].append(found)
    frames, step = video_frames(images)
    people = people_of_video(frames, step) if step else people_of_images(frames)

    joints = joints if counts == [17] else "coco"
    nowhere = np.full((17, 3), np.nan)
    for name, row in people:
        first = next(iter(row.values()))
        span = range(min(row), max(row) + 1, step) if step else row
        keypoints = np.stack([row[n].points if n in row else nowhere for n in span])
        fractions = first.fractions or counts == [33] and are_fractions(keypoints)
        images = [n if step else one_line(n) for n in span]
        yield Track(name, keypoints, images, first.size, joints, step, fractions)


def read_keypoints(path):
    """The people in a file or folder of 2D keypoints, as Tracks.

    Files: COCO results and annotations, MMPose (a video, an image), AlphaPose (default, open),
    OpenPose, ultralytics (to_json, save_txt), MediaPipe (JSON, CSV), Detectron2's npz of a video,
    VideoPose3D's data_2d_custom_*.npz, arrays (T, J, 2|3) of one person or (T, P, J, 2|3) of
    several. Folders: OpenPose's, MMPose's or ultralytics' file of each image. Formats are told
    apart by their content, joints by their number (`JOINTS`; 17 are COCO's unless the file says
    otherwise). People without numbers are followed from frame to frame. InputError:
    another format, a broken file, nobody in it.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found; name a file or folder of keypoints")
    with reading(path, path.name, FORMATS):
        tracks = list(read_folder(path) if path.is_dir() else read_file(path))
        if tracks and isinstance(tracks[0], Detection):
            tracks = list(tracks_of(tracks))
        if not tracks:
            raise InputError("no person in it; lower the detector's threshold")
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
        raise InputError("size: missing; give width and height in pixels (--size WxH)")
    for name, value in (*zip(("size", "size"), size), *settings.items()):
        least = {"min_score": -1e6, "smooth": 0.01, "fps": 0.01}.get(name, 1)
        if value is not None and not least <= value <= 1e6:
            raise InputError(f"{name} {value:g}: expected {least:g} to a million")


def fill(xy, joints):
    """xy (T, 17, 2) with NaN replaced: linear in time between the frames where a joint was seen,
    held before and after them; a part of the face never seen is the mean of the others."""
    xy, time = xy.copy(), np.arange(len(xy))
    for column in xy.reshape(len(xy), -1).T:  # one coordinate of a joint, in place
        seen = np.isfinite(column)
        if seen.any():
            column[:] = np.interp(time, time[seen], column[seen])

    face = xy[:, :5]
    if joints == "coco" and np.isfinite(face).any():
        face[:] = np.where(np.isnan(face), np.nanmean(face, 1, keepdims=True), face)

    never = np.isnan(xy[0, :, 0])
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
    if points.ndim != 3 or not len(points) or joints == "h36m" and points.shape[1] != 17:
        raise InputError(f"keypoints {points.shape}: expected (frames, joints, 2 or 3), h36m: 17")

    points = to_coco17(points)
    seen = is_seen(points, min_score, size)
    if not seen.any() or are_fractions(points) or not (
            np.abs(np.median(points[seen][:, :2], 0) / size - 0.5) < 0.5).all():
        raise InputError(f"no body in {size[0]:g}x{size[1]:g}: expected pixels; is the size right?")

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
        speed = speed + weight(1.0) * ((x[t] - value) * fps - speed)
        value = value + weight(cutoff + beta * np.abs(speed)) * (x[t] - value)
        smoothed[t] = value
    return smoothed


# ----------------------------------------------------------------------------------------------
# Lifting

def lift_poses(model, pose_2d, size, flip=None):
    """3D poses (T, 17, 3) of 2D poses (T, 17, 2) that `prepare` made. InputError: a model of other
    joints or targets."""
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise InputError("a model without recipe; load_model gives it")
    found = recipe.skeleton, recipe.target, recipe.swap_sides
    if found != ("h36m17", "camera", False):
        raise InputError(f"model {recipe.name}: skeleton, target, swap_sides are {found}; expected "
                         "h36m17, camera, False")

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

    model: one that `load_model` returns. joints, min_score, smooth, fps: as in `prepare`. `flip`
    averages with the mirrored input's poses, by default as the model's recipe does. InputError:
    what `prepare` refuses, a model of other joints.
    """
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
VIEWER = HERE / "docs" / "viewer.html"
SLOT = '<script id="poses" type="application/json">null<'


def write_result(path, result):
    """The result as JSON in which nothing can be taken for markup, or, for .html, the page that
    shows it: docs/viewer.html with that JSON in its slot."""
    text = json.dumps(result, allow_nan=False)  # in ASCII: other letters are escaped
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    if path.suffix == ".html":
        text = VIEWER.read_text(encoding="utf-8").replace(SLOT, SLOT.replace("null", text))
    data.write_text(path, text)


def write_arrays(path, result):
    """The result as the arrays of an .npz: a row a pose."""
    people = result["people"]
    about = ("fps", "joints", "edges", "source", "model", "licence")
    arrays = {key: np.array(result[key]) for key in about}
    for key in ("poses", "root", "keypoints", "interpolated", "frames"):
        arrays[key] = np.concatenate([one[key] for one in people])
    arrays["interpolated"] = arrays["interpolated"].astype(bool)
    for key, name in (("person", "name"), ("size", "size"), ("focal", "focal")):
        arrays[key] = np.concatenate([[one[name]] * len(one["frames"]) for one in people])
    data.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def plot_poses(path, person, fps):
    """A picture of a person's 2D poses beside their 3D poses from the camera and from its right:
    six frames evenly spread (.png), or an animation (.gif) at the speed of `fps` poses a second.
    Equal axes about the root, one scale for all."""
    from matplotlib.animation import PillowWriter
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    pose_2d, poses = np.array(person["keypoints"]), np.array(person["poses"])
    skeleton, count = data.SKELETONS["h36m17"], len(poses)
    edges = np.array(skeleton.edges)  # (16, 2): parent, child
    colours = np.full(17, "0.25", "U10")
    colours[list(skeleton.left)] = "tab:blue"
    colours[list(skeleton.right)] = "tab:orange"
    views = {"2D input": pose_2d - pose_2d[:, :1], "3D, from the camera": poses[..., [0, 1]],
             "3D, from its right": poses[..., [2, 1]]}

    moving = path.suffix.lower() == ".gif"
    times = np.unique(np.linspace(0, count - 1, 6).round().astype(int))
    if moving:
        figure = Figure((7.2, 2.7), layout="constrained")
        axes = figure.subplots(1, 3)[:, None]  # (views, columns)
    else:
        figure = Figure((1.5 * len(times), 4.7), layout="constrained")
        axes = figure.subplots(3, len(times), squeeze=False)
    for row, (title, points) in zip(axes, views.items()):
        row[0].set_ylabel(title, fontsize=8)
        reach = 1.08 * np.abs(points).max()
        for ax in row:
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", xticks=[], yticks=[])
            ax.add_collection(LineCollection([], colors=colours[edges[:, 1]], linewidths=1.8))

    def draw(t, column):
        column[0].set_title(f"frame {person['frames'][t]}", fontsize=8)
        for ax, points in zip(column, views.values()):
            ax.collections[0].set_segments(points[t][edges])  # (16, 2, 2)

    if not moving:
        for t, column in zip(times, axes.T):
            draw(t, column)
        figure.savefig(path)
        return
    step = max(math.ceil(fps / 12.5), math.ceil(count / 300))  # 300 pictures at most
    writer = PillowWriter(max(fps / step, 1 / 655))  # a GIF shows none for longer than 655 s
    with writer.saving(figure, path, dpi=100):
        for t in range(0, count, step):
            draw(t, axes[:, 0])
            writer.grab_frame()


# ----------------------------------------------------------------------------------------------
# Command line

def numbers(text):
    """Comma-separated whole numbers, as a tuple."""
    return tuple(int(part) for part in text.split(","))


def checkpoint_parser(prog, about):
    """A parser of load_model's arguments: a checkpoint and what a release's file does not say."""
    parser = Parser(prog=prog, description=about)
    add = parser.add_argument
    add("path", metavar="checkpoint", help="of train.py, of GridConv's release or of GLA-GCN's")
    add("--padding", type=lambda text: text.split(","),
        help="GridConv's release: its branches, as circular,zeros")
    add("--filter-widths", type=numbers, help="GLA-GCN's release: as 3,3,3,3,3 for T = 243")
    add("--skeleton", help="GLA-GCN's release: h36m17, 3dhp17 or humaneva15")
    add("--keypoints", help="the 2D poses: gt, hrnet, cpn_ft_h36m_dbb, detectron_pt_coco, ...")
    return parser


def evaluate_command(argv):
    """The table of a model's errors on a dataset's test split, beside the paper's figures.

    Further commands: eval.py inspect, eval.py lift (each has a --help)."""
    parser = checkpoint_parser("eval.py", evaluate_command.__doc__)
    add = parser.add_argument
    add("--data", dest="folder", default="data", help="folder of the data (default: data)")
    add("--dataset", dest="data", choices=data.DATASETS, help="another than the one trained on")
    add("--cameras", choices=("recorded", "random"), help="random: none that training sees")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored input's")
    add("--json", metavar="FILE", help="write the figures there")
    add("--device", help="cpu, cuda, ... (cuda where there is one)")
    options = vars(parser.parse_args(argv))
    folder, flip, device, out = map(options.pop, ("folder", "flip", "device", "json"))

    device, precision = pick_device(device)
    model = load_model(**options).to(device)
    recipe = model.recipe
    recipe.noise = recipe.missing = 0.0  # of training alone: measured is the 2D of the files
    recipe.cameras = options["cameras"] or ("recorded" if options["data"] else recipe.cameras)
    if recipe.data in ("3dhp", "synthetic"):  # they have no other 2D
        recipe.keypoints = "gt"
    if recipe.keypoints is None:
        raise InputError(f"{options['path']}: it does not say its 2D poses: give --keypoints")
    flip = recipe.flip_test if flip is None else flip
    store = data.make_store(recipe, folder, "test", device)
    test_data = data.provenance(store.sequences)
    result = {
        "recipe": vars(recipe), "data": model.trained_on, "test_data": test_data,
        "compares": compares(recipe, test_data, model.trained_on),
        "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
        "device": device_name(device), "precision": precision, "autogrids": learnt_grid(model),
        "last": {"epoch": model.epoch, **evaluate(model, store, flip)}}
    try:
        result["yardsticks"] = yardsticks(data.make_store(recipe, folder, "train", device), store)
    except (InputError, OSError) as error:  # training data need not be at hand
        print(f"no yardsticks: {error}", file=sys.stderr)
    if out:
        data.write_text(out, json.dumps(result, indent=1))
    print(f"{options['path']}: {recipe.keypoints} 2D, {'with' if flip else 'without'} flips\n")
    print(report(result))


def inspect_command(argv):
    """A model's size, its grid and the graph that this stands for, and what it learnt."""
    parser = checkpoint_parser("eval.py inspect", inspect_command.__doc__)
    print(inspect(load_model(**vars(parser.parse_args(argv)))))


# ----------------------------------------------------------------------------------------------
# python eval.py lift

def model_for(track, models):
    """The model that is named, or of the two pretrained ones that of videos, where enough frames
    in a row show the person, with gaps of up to GAP frames, or that of single images."""
    video, images = models[0], models[-1]
    if not track.step and images.receptive_field > 1:
        raise InputError(f"single images; the model needs {images.receptive_field} video frames")
    if track.step != 1:
        return images
    seen = np.flatnonzero(is_seen(track.keypoints).any(1))
    runs = np.split(seen, np.flatnonzero(np.diff(seen) > GAP + 1) + 1)
    longest = max(np.ptp(run) + 1 for run in runs)
    return video if longest >= video.receptive_field else images


def lift_track(track, model, args, fps, lines, cautions):
    """One person's entry of the result; `lines` gets one about it, `cautions` the single images
    left out and why. These are prepared each on its own. Numbers are rounded here, once for all
    files."""
    size, joints = track.size or args.size, track.joints or args.joints
    check_settings(size, focal=args.focal)
    if args.size not in (None, size):
        raise InputError(f"--size: the file says {size[0]:g}x{size[1]:g}; leave it out")
    if args.joints not in (None, joints):
        raise InputError(f"--joints {args.joints}: the file's are {joints}")
    keypoints = track.keypoints * (*size, 1) if track.fractions else track.keypoints

    made, frames = [], []
    at_once = len(keypoints) if track.step else 1
    for t in range(0, len(keypoints), at_once):
        part = slice(t, t + at_once)
        try:
            made.append(prepare(keypoints[part], size, joints, args.min_score, args.smooth, fps))
            frames += track.frames[part]
        except InputError as error:
            if track.step:
                raise
            cautions.append(f"person {track.person}: image {track.frames[t]} left out: {error}")
    if not made:
        raise InputError("no image of theirs is left")
    pose_2d, interpolated = map(np.concatenate, zip(*made))

    poses = lift_poses(model, pose_2d, size, args.flip).astype(float)
    focal = args.focal or math.hypot(*size)
    root = root_trajectory(pose_2d, poses, focal, np.array(size) / 2)
    gaps = interpolated.all(1)
    what = "frames" if track.step else "single images"
    lines.append(f"person {track.person}: {len(poses)} {what}, by {model.recipe.name}; interpolated"
                 f": {gaps.sum()} whole frames, {interpolated[~gaps].sum()} single joints")
    return {
        "name": track.person, "size": size, "focal": focal, "frames": frames,
        "poses": poses.round(4).tolist(), "root": root.round(4).tolist(),
        "keypoints": pose_2d.round(2).tolist(), "interpolated": interpolated.astype(int).tolist()}


def width_x_height(text):
    """(width, height) of text such as 1920x1080."""
    return tuple(map(float, text.lower().split("x")))


def lift_options(argv):
    """The command's options; what depends on the file is checked with it."""
    both = [HERE / "pretrained" / f"{name}-wild.pt" for name in ("glagcn", "gridconv")]
    parser = Parser(prog="eval.py lift", description=lift_command.__doc__)
    add = parser.add_argument
    add("keypoints", metavar="KEYPOINTS", type=Path, help="a file or folder")
    add("--model", type=Path, nargs=1, default=both, help="(the pretrained one that fits)")
    add("--size", type=width_x_height, metavar="WxH", help="the image's, if not in the file")
    add("--joints", choices=TO_H36M, help="what 17 joints are (coco)")
    add("--person", help="this one alone (everyone)")
    add("--min-score", type=float, default=0.0, help="joints not above it are gaps (0)")
    add("--smooth", type=float, nargs="?", const=2.0, help="One-Euro cutoff in Hz (2)")
    add("--fps", type=float, default=30.0, help="the video's (30)")
    add("--focal", type=float, help="in pixels (the image's diagonal)")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored input's")
    add("--out", type=Path, default="poses.npz", help=".npz or .json (poses.npz)")
    add("--plot", type=Path, nargs="+", default=[], help=".png or .gif")
    add("--device", help="cpu, cuda, ...")
    at = argv.index("--size") + 1 if "--size" in argv else len(argv)
    if len(argv) >= at + 2 and all(map(str.isdecimal, argv[at:at + 2])):  # --size W H
        argv = [*argv[:at], "x".join(argv[at:at + 2]), *argv[at + 2:]]
    args = parser.parse_args(argv)

    if args.out.suffix.lower() not in (".npz", ".json"):
        raise InputError(f"--out {args.out}: expected .npz or .json")
    args.page = args.out.with_suffix(".html")
    for path in (args.out, args.page, *args.plot):
        if path.is_dir() or path.resolve() in (args.keypoints.resolve(), args.model[0].resolve()):
            raise InputError(f"{path}: would overwrite a folder or what is read")
    for path in args.plot:
        if path.suffix.lower() not in (".png", ".gif") or not find_spec("matplotlib"):
            raise InputError(f"--plot {path}: needs .png or .gif, and pip install matplotlib")
    return args


def lift_command(argv):
    """python eval.py lift KEYPOINTS: any detector's 2D keypoints to 3D poses, and to a page that
    shows them."""
    args = lift_options(argv)
    everyone = read_keypoints(args.keypoints)
    tracks = [track for track in everyone if args.person in (None, track.person)]
    if not tracks:
        known = ", ".join(track.person for track in everyone[:20])
        raise InputError(f"--person {args.person}: not in {args.keypoints}; it has {known}")
    device, _ = pick_device(args.device)
    models = [load_model(path).to(device) for path in args.model]
    fps = args.fps / (tracks[0].step or 1)

    people, lines, cautions, licences = [], [], [], {}
    for track in tracks:
        try:
            model = model_for(track, models)
            people.append(lift_track(track, model, args, fps, lines, cautions))
            licences[model.recipe.name] = model.licence or "not stated"
        except InputError as error:  # one bad track does not cost the others
            cautions.append(f"person {track.person}: left out: {error}")
    if not people:
        raise InputError(f"{args.keypoints}: {cautions[0]}")

    skeleton = data.SKELETONS["h36m17"]
    result = {
        "format": "poselift poses", "source": one_line(args.keypoints.name), "fps": fps,
        "model": ", ".join(licences), "licence": "; ".join(dict.fromkeys(licences.values())),
        "joints": skeleton.joints, "edges": skeleton.edges, "left": skeleton.left,
        "right": skeleton.right, "people": people}
    if args.out.suffix.lower() == ".json":
        write_result(args.out, result)
    else:
        write_arrays(args.out, result)
    lines.append(f"{sum(len(person['frames']) for person in people)} poses -> {args.out}")
    page = f"no page: {VIEWER} not found"
    if VIEWER.is_file():
        write_result(args.page, result)
        page = f"to open and turn -> {args.page}"
    longest = max(people, key=lambda one: len(one["frames"]))
    for path in args.plot:
        plot_poses(path, longest, fps)
        lines.append(f"person {longest['name']} -> {path}")
    for warning in cautions:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join([*lines, page]))
    print(f"root: by a focal length of {longest['focal']:.0f} pixels (--focal where known)")
    print(f"licence of {result['model']}: {result['licence']}")


COMMANDS = {"inspect": inspect_command, "lift": lift_command}


def main():
    """Runs one of COMMANDS, or evaluates the checkpoint that the first argument names."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first in COMMANDS:
        return COMMANDS[first](rest)
    if not Path(first).exists():
        for near in difflib.get_close_matches(first, COMMANDS, n=1):
            raise InputError(f"unknown command {first!r}, did you mean {near}?")
    evaluate_command(sys.argv[1:])


if __name__ == "__main__":
    data.run(main)
