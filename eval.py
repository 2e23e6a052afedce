"""Evaluation: metrics, protocols, tables beside the papers' figures, and checkpoints of this project and both releases.

    python eval.py CHECKPOINT --data DIR                     # the table of one model on one dataset
    python eval.py RELEASED.pth.tar --data DIR --padding circular,zeros
    python eval.py inspect CHECKPOINT                        # the grid a model works on, learnt or given
    python eval.py lift CHECKPOINT --keypoints detections.json --size 1920 1080 --out poses.npz --plot poses.gif
    python eval.py export CHECKPOINT --out model.pt2         # for use without this project

    model = load_model("results/gridconv-mocap/best.pt")
    result = evaluate(model, store)                          # result["mpjpe"], result["actions"]["Walking"]["p_mpjpe"]
    poses = lift(model, read_keypoints("detections.json")[0].keypoints, (1920, 1080))
"""
if __name__ == "__main__":  # torch takes seconds to import: until data.run, Ctrl-C ends them without a traceback
    import os
    import signal
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import io
import json
import math
import re
import reprlib
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import glagcn
import gridconv
from data import InputError, Parser


# --------------------------------------------------------------------------------------------------------------------
# Metrics: (frames, J, 3) tensors in metres in, one Python float out. All arithmetic is float64.

def _pair(prediction, target, frames=1):
    """Both poses in float64; InputError unless both are finite (frames, J, 3) of one shape with enough frames."""
    for name, pose in (("prediction", prediction), ("target", target)):
        if not torch.is_tensor(pose) or pose.dim() != 3 or pose.shape[-1] != 3 or 0 in pose.shape:
            found = tuple(pose.shape) if hasattr(pose, "shape") else type(pose).__name__
            raise InputError(f"{name}: a (frames, joints, 3) tensor in metres expected, {found} found")
    if prediction.shape != target.shape:
        raise InputError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    if len(target) < frames:
        raise InputError(f"at least {frames} frames expected, {len(target)} found")
    for name, pose in (("prediction", prediction), ("target", target)):
        if not torch.isfinite(pose).all():
            bad = int((~torch.isfinite(pose)).flatten(1).any(1).nonzero()[0])
            raise InputError(f"{name}: NaN or infinite coordinates, first in frame {bad}")
    return prediction.detach().double(), target.detach().to(prediction.device).double()


def _distance(prediction, target):
    """Euclidean distance of every joint, (frames, J) in mm."""
    return 1000 * (prediction - target).norm(dim=-1)


def align(prediction, target):
    """Each frame's prediction (frames, J, 3), float64, moved onto its target by the best similarity s p R + t.

    Minimises sum_j ||s p_j R + t - t_j||^2 over rotations R (Umeyama 1991, Eq. 40-42): with the centred poses'
    p^T t = U S V^T, R = U D V^T and s = tr(S D) / sum ||p||^2, where D = diag(1, 1, det(U V^T)) keeps R from
    reflecting. A prediction whose joints all coincide has no scale: it is moved onto the target's mean.
    """
    mean_p, mean_t = prediction.mean(1, keepdim=True), target.mean(1, keepdim=True)
    p, t = prediction - mean_p, target - mean_t
    u, s, vt = torch.linalg.svd(p.transpose(1, 2) @ t)                          # (frames, 3, 3)
    d = torch.ones_like(s)
    d[:, 2] = torch.linalg.det(u @ vt).sign()
    square = p.square().sum((1, 2))
    scale = torch.where(square > 0, (s * d).sum(1) / square, 0.0)
    return scale[:, None, None] * p @ (u * d[:, None]) @ vt + mean_t


def rescale(prediction, target):
    """Each frame's prediction (frames, J, 3), float64, times its best scale <p, t> / <p, p>; 0 for an all-zero pose."""
    square = prediction.square().sum((1, 2), keepdim=True)
    dot = (prediction * target).sum((1, 2), keepdim=True)
    return torch.where(square > 0, dot / square, 0.0) * prediction


def mpjpe(prediction, target):
    """Mean per-joint position error in mm: mean over frames and joints of ||p - t|| (Human3.6M's protocol 1, P1).

    Poses (frames, J, 3) in metres, both root-relative; wrong shapes, NaN and infinities are an InputError (this and
    every metric below)."""
    return _distance(*_pair(prediction, target)).mean().item()


def p_mpjpe(prediction, target):
    """MPJPE in mm after each frame's best similarity alignment: rotation, scale, translation, no reflection (P2).

    The alignment is `align`; the protocol is Human3.6M's second, as in Martinez et al. 2017 and VideoPose3D."""
    prediction, target = _pair(prediction, target)
    return _distance(align(prediction, target), target).mean().item()


def n_mpjpe(prediction, target):
    """MPJPE in mm after each frame's best scale, s = <p, t> / <p, p> (Rhodin et al. 2018, as in VideoPose3D)."""
    prediction, target = _pair(prediction, target)
    return _distance(rescale(prediction, target), target).mean().item()


def mpjve(prediction, target):
    """Mean per-joint velocity error in mm per frame: MPJPE of the first differences over time (VideoPose3D, Sec. 4).

    All frames belong to one sequence; at least two of them, or InputError."""
    prediction, target = _pair(prediction, target, frames=2)
    return _distance(prediction.diff(dim=0), target.diff(dim=0)).mean().item()


def pck(prediction, target, threshold=150.0):
    """Percentage of joints whose error is strictly below `threshold` mm (MPI-INF-3DHP, Mehta et al. 2017)."""
    return _pck(_distance(*_pair(prediction, target)), threshold).mean().item()


def auc(prediction, target):
    """Area under the PCK curve in %: mean PCK over the 31 thresholds 0, 5, ..., 150 mm (MPI-INF-3DHP).

    At 0 mm no joint counts, so a perfect prediction has 96.77, as in the benchmark's own tool."""
    return _auc(_distance(*_pair(prediction, target))).mean().item()


def _pck(errors, threshold=150.0):  # (frames, J) in mm -> (frames,) in %
    return 100 * (errors < threshold).double().mean(1)


def _auc(errors):
    return torch.stack([_pck(errors, threshold) for threshold in range(0, 151, 5)]).mean(0)


# --------------------------------------------------------------------------------------------------------------------
# Models from recipes

def _tuples(value, depth=3):
    """Lists, as a file keeps them, back into the tuples that the models take; ValueError for what no recipe holds."""
    if not isinstance(value, (list, tuple)):
        return value
    if not depth or len(value) > 100:
        raise ValueError("lists nested deeper or longer than a recipe's")
    return tuple(_tuples(v, depth - 1) for v in value)


METHODS = ("gridconv", "gridconv-temporal", "glagcn", "fc", "gcn")
EDGES = {"h36m17": glagcn.H36M_EDGES, "humaneva15": glagcn.HUMANEVA15_EDGES, "3dhp17": glagcn.MPI3DHP_EDGES}


def _layout(recipe, joints, grid):
    """The layout a GridConv recipe names: a nested tuple of joint numbers, or an AutoGrids."""
    designed = {(17, (5, 5)): gridconv.HANDCRAFTED_5X5, (32, (7, 5)): gridconv.HANDCRAFTED_7X5}.get((joints, grid))
    name, seed = recipe.layout, recipe.layout_seed
    if name == "random":
        return gridconv.random_layout(joints, grid, seed)
    if name == "autogrids" and designed:
        return gridconv.AutoGrids(joints, grid, prior=designed)
    if name in ("autogrids", "autogrids-random"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)                                             # which alone decides: see cells_changed
            return gridconv.AutoGrids(joints, grid, prior="random")
    if name not in ("handcrafted", "released", "row", "column", "global"):
        raise InputError(f"layout {name!r} unknown: handcrafted, released, random, row, column, global, autogrids or "
                         f"autogrids-random expected")
    if designed is None or name == "released" and joints != 17:
        raise InputError(f"layout {name!r} is for 17 joints on 5 x 5{' or 32 on 7 x 5' * (name != 'released')}, not "
                         f"for {joints} on {grid[0]} x {grid[1]}: take random or autogrids")
    if name == "released":
        return gridconv.RELEASED_5X5
    return designed if name == "handcrafted" else gridconv.shuffle_layout(designed, name, seed)


def build_model(recipe):
    """The network that a recipe describes, untrained, with `.recipe` set.

    `recipe` is any object with the fields method, skeleton and dropout, and for "gridconv" layout, layout_seed, grid,
    padding, hidden, blocks, kernel_sizes, attention and temperature; for "gridconv-temporal" filter_widths in place of
    blocks, kernel_sizes and attention; for "fc" and "gcn" hidden and blocks; for "glagcn" filter_widths, channels,
    reconstruct, reconstruct_blocks, unshared_weight, causal, adaptive, temporal, head and normalisation. The row, column
    and global layouts are shuffles of the handcrafted one (Table B). Unknown names and impossible sizes are a ValueError.
    """
    if recipe.skeleton not in data.SKELETONS:
        raise InputError(f"skeleton {recipe.skeleton!r} unknown: one of {', '.join(data.SKELETONS)} expected")
    joints = len(data.SKELETONS[recipe.skeleton].joints)
    fields = lambda *names: {name: _tuples(getattr(recipe, name)) for name in names}
    if recipe.method in ("gridconv", "gridconv-temporal"):
        layout = _layout(recipe, joints, _tuples(recipe.grid))
        if recipe.method == "gridconv":
            model = gridconv.GridLiftingNetwork(joints, layout, attention=recipe.attention or None, **fields(
                "hidden", "blocks", "kernel_sizes", "padding", "dropout"))
        else:
            model = gridconv.TemporalGridLiftingNetwork(joints, layout, **fields(
                "filter_widths", "hidden", "padding", "dropout"))
        model.temperature = recipe.temperature
    elif recipe.method == "fc":
        model = gridconv.FullyConnectedLifter(joints, **fields("hidden", "blocks", "dropout"))
    elif recipe.method == "gcn":
        model = gridconv.GraphConvLifter(joints, data.SKELETONS[recipe.skeleton].edges, **fields("hidden", "blocks", "dropout"))
    elif recipe.method == "glagcn":
        if recipe.skeleton not in EDGES:
            raise InputError(f"GLA-GCN: no links for skeleton {recipe.skeleton!r}: one of {', '.join(EDGES)} expected")
        model = glagcn.GLAGCN(joints, EDGES[recipe.skeleton], **fields(
            "filter_widths", "channels", "reconstruct", "reconstruct_blocks", "unshared_weight", "dropout", "causal",
            "adaptive", "temporal", "head", "normalisation"))
    else:
        raise InputError(f"method {recipe.method!r} unknown: one of {', '.join(METHODS)} expected")
    model.recipe = recipe
    return model


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints: this project's, and both releases'

# What the releases' code, rather than their files, fixes for every checkpoint.
_RELEASED_GRIDCONV = dict(
    method="gridconv", skeleton="h36m17", data="h36m", keypoints=None, skip="gridconv", normalise="release-500",
    target="camera", flip_test=False, layout=None, layout_seed=0, grid=None, padding=None, kernel_sizes=(3, (3, 3), 3),
    temperature=30.0, dropout=0.25, name="released GridConv")
_RELEASED_GLAGCN = dict(
    method="glagcn", skeleton=None, data=None, keypoints=None, skip="", normalise="width", target="camera",
    flip_test=True, filter_widths=None, reconstruct=False, reconstruct_blocks=3, unshared_weight=0.0, causal=False,
    adaptive=True, temporal="stride", head="individual", dropout=0.1, name="released GLA-GCN")
# What neither release's files nor this project's older ones say.
_NOT_SAID = dict(cameras="recorded", noise=0.0, missing=0.0, actions=data.HUMANEVA_ACTIONS, normalisation="column",
                 swap_sides=False)
DATASETS = {"h36m": ("h36m17", "h36m32"), "gridconv": ("h36m17",), "humaneva": ("humaneva15",),
            "3dhp": ("3dhp17", "h36m17"), "mocap": ("h36m17",), "synthetic": ("h36m17",)}


def _released_gridconv(path, state, recipe):
    """GridConv's weights: hidden size, blocks, attention and a learnt grid are in the keys; the padding is not."""
    first = state["w1.branch1_weight" if "w1.branch1_weight" in state else "w1.donut_conv.weight"]  # (C, 2, K, K)
    learnt, attention = state.get("sgt_layer.sgt_trans_mat"), state.get("atten_conv1.position_fc.weight")
    cells = (learnt.shape[-2] if learnt is not None else                        # (1, H*P, J)
             len(attention) // first.shape[-1] ** 2 if attention is not None else     # (K*K*H*P, width, 1, 1)
             math.prod(recipe["grid"] or (5, 5)))
    grid = recipe["grid"] or ((5, 5) if cells == 25 else None)
    _need(path, (recipe["padding"], "padding: give --padding circular,replicate or --padding circular,zeros"),
          (grid, f"grid of {cells} cells: give --grid H,P"))
    if math.prod(grid) != cells:
        raise InputError(f"{path}: its weights are for {cells} cells, --grid {grid[0]},{grid[1]} has {math.prod(grid)}")
    model = gridconv.from_released(state, recipe["padding"], grid_shape=grid)
    model.temperature = recipe["temperature"]
    detected = attention is not None and "zeros" in recipe["padding"]           # the dynamic models on HRNet's 2D alone have it
    return model, {**recipe, "keypoints": recipe["keypoints"] or ("hrnet" if detected else "gt"), "grid": grid,
                   "hidden": len(first), "blocks": len(model.blocks), "attention": "grid" if attention is not None else "",
                   "layout": "released" if learnt is None else "autogrids"}


def _released_glagcn(path, state, recipe):
    """GLA-GCN's weights: channels and modules are in the keys; filter widths, and the links of 17 joints, are not."""
    joints = state["expand_gcn.gcn1.PA"].shape[-1]                              # (3, J, J)
    modules = len({key.split(".")[1] for key in state if key.startswith("layers_tcngcn.")}) // 2
    widths, skeleton = recipe["filter_widths"], recipe["skeleton"] or ("humaneva15" if joints == 15 else None)
    _need(path, (widths, f"filter widths: give {modules}, as --filter-widths {','.join('3' * modules)}"),
          (skeleton, f"links between {joints} joints: give --skeleton h36m17 or --skeleton 3dhp17"))
    if skeleton not in EDGES or len(data.SKELETONS[skeleton].joints) != joints:
        raise InputError(f"{path}: its weights have {joints} joints, which --skeleton {skeleton} does not fit")
    home = {"h36m17": "h36m", "humaneva15": "humaneva", "3dhp17": "3dhp"}[skeleton]
    return glagcn.from_released(state, filter_widths=widths, edges=EDGES[skeleton]), {
        **recipe, "skeleton": skeleton, "data": recipe["data"] or home, "channels": state["fc.weight"].shape[1]}


class _Within(torch.utils._python_dispatch.TorchDispatchMode):
    """Lets tensors be made up to so many values together, each counted as 100 at least for what Python keeps with it."""

    def __init__(self, values):
        super().__init__()
        self.left = values

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        shape = args[0] if args else None                                       # where a tensor is made of none
        if isinstance(shape, (list, tuple)) and all(isinstance(n, int) for n in shape):
            self.left -= max(100, math.prod(shape))
            if self.left < 0:
                raise ValueError("they are fewer than those of the network described")
        return operation(*args, **(kwargs or {}))


def _own(path, state, recipe):
    first, inner, last = recipe.get("kernel_sizes") or (3, (3,), 3)
    if math.prod(recipe.get("grid") or ()) * max(first, *inner, last) ** 2 > Path(path).stat().st_size // 16:
        raise ValueError("its recipe has a larger grid than its weights")
    model = build_model(SimpleNamespace(**recipe))
    model.load_state_dict(state)
    return model, recipe


def _need(path, *needs):
    missing = [text for value, text in needs if not value]
    if missing:
        raise InputError(f"{path}: the file does not say its {'; nor its '.join(missing)}")


def load_model(path, **overrides):
    """The network in a checkpoint file, in evaluation mode on the CPU, with `.recipe` (a SimpleNamespace).

    Reads this project's checkpoints and both releases', told apart by their contents; nothing in a file is executed.
    Overrides (padding, filter_widths, skeleton, normalise, grid, keypoints, ...; None means not given) are recipe
    fields: they say what a release's file does not. One that is needed and missing, an unknown one, a file that is
    truncated or something else, and weights that do not fit are an InputError that names the file and the remedy.
    """
    content = data.read_torch(path, inert=True)
    try:
        content = content if isinstance(content, dict) else {f"a {type(content).__name__}": None}
        if content.get("format") == "poselift":
            version = content.get("version")
            if version != 1:
                raise InputError(f"{path}: checkpoint version {reprlib.repr(version)}, this code reads version 1")
            build, known, state = _own, content.get("recipe"), content.get("model")
        elif "model_pos" in content:
            build, known, state = _released_glagcn, _RELEASED_GLAGCN, content["model_pos"]
        else:
            build, known, state = _released_gridconv, _RELEASED_GRIDCONV, content.get("state_dict")
        if not isinstance(known, dict) or not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise InputError(f"{path}: no checkpoint of this project, of GridConv's release or of GLA-GCN's: it holds "
                             f"{', '.join(sorted(map(str, content))[:8]) or 'nothing'}")
        known = {**_NOT_SAID, **known}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise InputError(f"{path}: its recipe has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        fixed = sorted(set(overrides) & {"padding", "grid", "filter_widths", "skeleton"}) if build is _own else []
        if fixed:
            raise InputError(f"{path}: its own recipe says its {', '.join(fixed)}; leave the option out")
        broken = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
        if broken:
            raise InputError(f"{path}: {broken} has NaN or infinite weights; take another checkpoint, or train it again")
        state = {key.removeprefix("module."): value for key, value in state.items()}  # DataParallel's prefix
        with _Within(Path(path).stat().st_size):                                # a weight is 4 bytes of it, or 2
            model, recipe = build(path, state, {name: _tuples(value) for name, value in {**known, **overrides}.items()})
        if content.get("temperature") is not None and "temperature" not in overrides:
            model.temperature = content["temperature"]  # that of the epoch, where the recipe anneals it
        if hasattr(model, "temperature") and not 0 < model.temperature < math.inf:
            raise ValueError(f"temperature {model.temperature:g}")
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        reason = f"no entry {reason}" if isinstance(error, KeyError) else reason
        raise InputError(f"{path}: weights and recipe do not fit: {reason}") from error
    crossed = build is _own and recipe.get("keypoints") != known.get("keypoints")  # other 2D than it was trained on
    model.recipe = SimpleNamespace(**recipe, crossed=crossed)
    model.epoch, model.trained_on = content.get("epoch"), content.get("data", "")
    return model.eval()


# --------------------------------------------------------------------------------------------------------------------
# Predictions and scores over a frame store

def _forward(model, pose, skeleton, flip):
    """The model's output (B, J, 3) for its input; with `flip` the mean with the mirrored input's, mirrored back."""
    prediction = model(pose)
    return (prediction + data.flip(model(data.flip(pose, skeleton)), skeleton)) / 2 if flip else prediction


@torch.no_grad()
def predict(model, store, index=None, flip=False, batch=None):
    """Root-relative poses (n, J, 3) in metres, on the CPU, of the store's frames `index` (all of them by default).

    The window around each frame is the model's `receptive_field`. `flip` averages the prediction with that of the
    mirrored input, mirrored back (VideoPose3D's test-time augmentation). The model's training mode is left as it was.
    """
    weight, frames, causal = next(model.parameters()), model.receptive_field, getattr(model, "causal", False)
    index = torch.arange(len(store)) if index is None else torch.as_tensor(index)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    poses = []
    most = (4096, 32768) if weight.is_cuda else (256, 2048)                     # poses, frames; in a CPU's cache: twice as fast
    for part in index.to(store.input.device).split(batch or max(1, min(most[0], most[1] // frames))):
        pose, _ = store.batch(part, frames=frames, causal=causal)               # (B, J, 2) or (B, T, J, 2)
        pose = pose.to(weight)
        poses.append(store.to_camera(_forward(model, pose, store.skeleton, flip).to(store.pose_3d), part))
    for module, mode in modes:
        module.training = mode
    return torch.cat(poses).cpu()


def evaluate(model, store, flip=False):
    """`score` of the model's predictions for every frame of the store."""
    return score(predict(model, store, flip=flip), store)


METRICS = {"mpjpe": "MPJPE", "p_mpjpe": "P-MPJPE", "n_mpjpe": "N-MPJPE", "mpjve": "MPJVE"}
# The 14 joints that MPI-INF-3DHP's own tool counts: all but pelvis, spine and head; in H36M's order those are 0, 7, 9.
JOINTS_3DHP = {"3dhp17": list(range(14)), "h36m17": [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]}
SCENES_3DHP = {"TS1": "studio, green screen", "TS2": "studio, green screen", "TS3": "studio", "TS4": "studio",
               "TS5": "outdoor", "TS6": "outdoor"}


def score(prediction, store):
    """Scores of predictions (N, J, 3) in metres for every valid frame of a store, as a dict of plain numbers.

    "mpjpe", "p_mpjpe", "n_mpjpe" (mm) and "mpjve" (mm per frame; None where no two frames follow each other): the
    unweighted average over the action classes (Human3.6M's protocol); "frames": their number. "actions", "subjects",
    "cells" ({action: {subject: ...}}) hold the same for each group of sequences, "pooled" for all frames as one.
    On MPI-INF-3DHP's test set the predicted root is zeroed first, and "sequences", "scenes" and "all" hold mpjpe, pck
    and auc over 17 joints and, ending in _14, over the benchmark's; frames are pooled.
    """
    if prediction.shape != store.pose_3d.shape:
        raise InputError(f"prediction {tuple(prediction.shape)} for a store of {tuple(store.pose_3d.shape)} poses")
    is_3dhp = all(s.subject in SCENES_3DHP for s in store.sequences)
    if is_3dhp:
        prediction = prediction.clone()
        prediction[:, store.skeleton.root] = 0
    prediction, target = _pair(prediction, store.pose_3d.cpu())
    start, rows = 0, []
    for sequence in store.sequences:
        part = slice(start, start + len(sequence.pose_3d))
        p, t, valid = prediction[part], target[part], store.valid[part].cpu()
        action, subject, start = sequence.action.split(" ")[0], sequence.subject, part.stop  # "Walking 1": Walking
        errors = _distance(p, t)[valid]                                         # (valid frames, J)
        velocity = _distance(p.diff(dim=0), t.diff(dim=0))[valid[1:] & valid[:-1]]
        aligned, scaled = (_distance(move(p[valid], t[valid]), t[valid]) for move in (align, rescale))
        rows.append(([("actions", action), ("subjects", subject), ("cells", action, subject), ("pooled",)],
                     {"mpjpe": errors.mean(1), "p_mpjpe": aligned.mean(1), "n_mpjpe": scaled.mean(1),
                      "mpjve": velocity.mean(1)}))
        if is_3dhp:
            scores = {}
            for ending, some in (("", errors), ("_14", errors[:, JOINTS_3DHP[store.skeleton.name]])):
                scores |= {"mpjpe" + ending: some.mean(1), "pck" + ending: _pck(some), "auc" + ending: _auc(some)}
            rows.append(([("sequences", subject), ("scenes", SCENES_3DHP[subject]), ("all",)], scores))
    result = _pool(rows)
    return {**average(result["actions"].values()), **result}


def _pool(rows):
    """Means over pooled frames of [(groups, {metric: per-frame values})], nested by the parts of each group's name."""
    sums, result = {}, {}
    for groups, scores in rows:
        for group in groups:
            total = sums.setdefault(group, {name: [0.0, 0] for name in scores})
            for name, values in scores.items():
                total[name][0] += values.sum().item()
                total[name][1] += len(values)
    for group, total in sums.items():
        place = result
        for name in group[:-1]:
            place = place.setdefault(name, {})
        means = {name: value / count if count else None for name, (value, count) in total.items()}
        place[group[-1]] = {"frames": total["mpjpe"][1], **means}
    return result


def headline(scores, kind):
    """(MPJPE, P-MPJPE) in mm as the protocol of a recipe's `data` averages them: unweighted over the actions (Human3.6M),
    over the pairs of action and subject (HumanEva-I), over the valid frames (3DHP), else over all frames."""
    if kind in ("h36m", "gridconv"):
        row = scores
    elif kind == "humaneva":
        row = average([cell for subjects in scores["cells"].values() for cell in subjects.values()])
    else:
        row = {**scores["pooled"], **scores.get("all", {})}
    return row["mpjpe"], row["p_mpjpe"]


def quoted(scores, kind):
    """The figures that papers quote for a recipe's `data`, {"mpjpe", "p_mpjpe", "pck", "auc"}: `headline`, and on 3DHP
    PCK and AUC over the benchmark's 14 joints (MPJPE stays over 17)."""
    everything = scores.get("all", {})
    mpjpe_, p_mpjpe_ = headline(scores, kind)
    return {"mpjpe": mpjpe_, "p_mpjpe": p_mpjpe_, "pck": everything.get("pck_14"), "auc": everything.get("auc_14")}


def average(rows):
    """The unweighted average of score rows: each metric over the rows that have it; "frames" is their sum."""
    rows = list(rows)
    mean = {"frames": sum(row["frames"] for row in rows)}
    for name in (key for key in rows[0] if key != "frames"):
        values = [row[name] for row in rows if row[name] is not None]
        mean[name] = sum(values) / len(values) if values else None
    return mean


def yardsticks(train_store, test_store, chunk=65536):
    """What a figure is to be read against, in mm of MPJPE over every valid test frame, unweighted over frames.

    {"mean_pose": the training set's mean pose predicted for every frame; "affine": the least-squares affine map from
    the J*2 normalised inputs to the J*3 coordinates}. Float64 normal equations of the centred training data; input
    directions without variance (coinciding joints) get weight zero.
    """
    def parts(store):
        for start in range(0, len(store), chunk):
            part = slice(start, start + chunk)
            valid = store.valid[part]
            yield store.input[part][valid].flatten(1).double(), store.pose_3d[part][valid].flatten(1).double()

    if train_store.skeleton != test_store.skeleton:
        raise InputError(f"training data of {train_store.skeleton.name}, test data of {test_store.skeleton.name}")
    train_store.redraw()                                                        # not the epoch's that came last
    count = train_store.valid.sum()
    mean_x = sum(x.sum(0) for x, _ in parts(train_store)) / count
    mean_y = sum(y.sum(0) for _, y in parts(train_store)) / count
    gram = sum((x - mean_x).T @ (x - mean_x) for x, _ in parts(train_store))   # (2J, 2J)
    cross = sum((x - mean_x).T @ (y - mean_y) for x, y in parts(train_store))  # (2J, 3J)
    weight = (torch.linalg.pinv(gram.cpu(), rtol=1e-13, hermitian=True) @ cross.cpu()).to(gram.device)
    total = {"mean_pose": 0.0, "affine": 0.0}
    for x, y in parts(test_store):
        for name, guess in (("mean_pose", mean_y.expand_as(y)), ("affine", mean_y + (x - mean_x) @ weight)):
            total[name] += _distance(guess.unflatten(1, (-1, 3)), y.unflatten(1, (-1, 3))).mean(1).sum().item()
    return {name: value / test_store.valid.sum().item() for name, value in total.items()}


# --------------------------------------------------------------------------------------------------------------------
# Tables beside the papers' figures

ACTIONS = ("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing", "Purchases", "Sitting",
           "SittingDown", "Smoking", "Waiting", "WalkDog", "Walking", "WalkTogether")
# Per-action rows of the papers' main Human3.6M tables: the 15 actions above, then the average, in mm.
PAPER = {
    ("gridconv", "hrnet", "camera"): {
        "source": "GridConv, Tables 1 and A",
        "mpjpe": (43.1, 47.7, 44.8, 44.9, 50.7, 55.1, 46.3, 42.6, 53.7, 63.9, 46.3, 45.5, 50.1, 38.6, 40.1, 47.6),
        "p_mpjpe": (33.1, 37.2, 35.7, 36.3, 39.3, 43.8, 34.4, 33.1, 43.0, 52.5, 37.4, 34.8, 39.4, 29.5, 32.2, 37.4)},
    ("gridconv", "hrnet", "uvd"): {
        "source": "GridConv with the (u, v, depth) target, Tables 1 and A",
        "mpjpe": (39.9, 47.7, 44.7, 43.9, 49.2, 53.5, 44.4, 43.7, 53.1, 61.6, 45.4, 44.7, 47.4, 37.7, 37.9, 46.3),
        "p_mpjpe": (33.3, 37.9, 36.4, 36.2, 39.0, 44.6, 34.4, 34.3, 43.2, 52.5, 37.4, 34.7, 38.9, 29.5, 32.0, 37.6)},
    ("glagcn", "cpn", False, 96): {
        "source": "GLA-GCN, T = 243, Tables 1 and 4",
        "mpjpe": (41.3, 44.3, 40.8, 41.8, 45.9, 54.1, 42.1, 41.5, 57.8, 62.9, 45.0, 42.8, 45.9, 29.4, 29.9, 44.4),
        "p_mpjpe": (32.4, 35.3, 32.6, 34.2, 35.0, 42.1, 32.1, 31.9, 45.5, 49.5, 36.1, 32.4, 35.6, 23.5, 24.7, 34.8)},
    ("glagcn", "gt", False, 96): {
        "source": "GLA-GCN, T = 243, Tables 1 and 4",
        "mpjpe": (26.5, 27.2, 29.2, 25.4, 28.2, 31.7, 29.5, 26.9, 37.8, 39.9, 29.9, 27.0, 27.3, 20.5, 20.8, 28.5),
        "p_mpjpe": (20.2, 21.9, 21.7, 19.9, 21.6, 24.7, 22.5, 20.8, 28.6, 33.1, 22.7, 20.6, 20.3, 15.9, 16.2, 22.0)},
    ("glagcn", "gt", True, 512): {
        "source": "GLA-GCN with reconstruction, C = 512, T = 243, Tables 1 and 4",
        "mpjpe": (20.1, 21.2, 20.0, 19.6, 21.5, 26.7, 23.3, 19.8, 27.0, 29.4, 20.8, 20.1, 19.2, 12.8, 13.8, 21.0),
        "p_mpjpe": (16.6, 18.1, 16.2, 17.0, 17.0, 22.2, 19.0, 17.1, 22.4, 25.9, 17.5, 16.4, 16.3, 10.8, 11.6, 17.6)},
}
# GLA-GCN's Table 2 on HumanEva-I: P-MPJPE of S1, S2 and S3 in mm
PAPER_HUMANEVA = {"detectron_pt_coco": {"Walking": (12.5, 9.1, 26.9), "Jog": (18.5, 12.7, 12.8)},
                  "gt": {"Walking": (8.7, 6.8, 11.5), "Jog": (10.1, 8.2, 9.9)}}
HUMAN36M = "Human3.6M"
# What data.provenance calls a recipe's `data` where it is what the papers measured on. No frame counts of HumanEva-I are
# published, so its files are taken at their word.
GENUINE = {"h36m": HUMAN36M, "gridconv": HUMAN36M, "humaneva": "files in HumanEva-I layout", "3dhp": "MPI-INF-3DHP test set"}


_PAPER_MODELS = {
    "gridconv": dict(hidden=256, blocks=2, kernel_sizes=(3, (3, 3), 3), attention="grid", grid=(5, 5)),
    "glagcn": dict(causal=False, adaptive=True, temporal="stride", head="individual", reconstruct_blocks=3,
                   normalisation="column", swap_sides=False)}


def paper_row(recipe):
    """The papers' per-action row that a recipe's settings stand for, as an entry of PAPER, or None."""
    detector, network = recipe.keypoints.split("_")[0], _PAPER_MODELS.get(recipe.method)  # cpn_ft_h36m_dbb -> cpn
    if recipe.skeleton != "h36m17" or not network or any(_tuples(getattr(recipe, k)) != v for k, v in network.items()):
        return None
    if recipe.method == "gridconv":
        return PAPER.get(("gridconv", detector, recipe.target)) if recipe.layout == "autogrids" else None
    key = ("glagcn", detector, recipe.reconstruct, recipe.channels)
    return PAPER.get(key) if math.prod(recipe.filter_widths) == 243 else None


def markdown(header, rows):
    """A markdown table with aligned columns: figures to the right, words to the left; None shows as -."""
    cells = [[f"{c:.2f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row] for row in [header, *rows]]
    columns = list(zip(*cells))
    width = [max(map(len, column)) for column in columns]
    left = [any(re.search("[A-Za-z]", cell) for cell in column[1:]) for column in columns]
    lines = ["| " + " | ".join(c.ljust(w) if l else c.rjust(w) for c, w, l in zip(row, width, left)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) if l else "-" * (w + 1) + ":" for w, l in zip(width, left)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def report(result, source, recipe, yardstick=None):
    """The tables of a `score` as markdown text.

    `source` says what the data is (data.provenance). Only where it is Human3.6M, and the recipe's settings are those of
    a printed per-action row, does the paper's figure stand beside each measured one; other data is called what it is.
    """
    genuine, paper = GENUINE.get(recipe.data) == source and not getattr(recipe, "crossed", False), {}
    if genuine and source == HUMAN36M:  # where no per-action row is printed, the average alone
        average_only = {m: (*[None] * 15, v) for m in METRICS if (v := getattr(recipe, "paper_" + m, 0))}
        paper = paper_row(recipe) or average_only and {"source": recipe.row, **average_only}
    order = sorted(result["actions"], key=lambda name: (ACTIONS.index(name) if name in ACTIONS else 99, name))
    header, rows = ["action", "frames"], [[name, result["actions"][name]["frames"]] for name in order]
    rows.append(["average", result["frames"]])
    for metric, title in METRICS.items():
        header.append(title)
        for row in rows:
            row.append(result["actions"].get(row[0], result)[metric])
        if metric in paper:
            header.append("paper")
            printed = dict(zip((*ACTIONS, "average"), paper[metric]))
            for row in rows:
                row.append(printed.get(row[0]))
    text = [f"Data: {source}, {result['frames']:,} test frames. Errors in mm, MPJVE in mm per frame; the average over "
            f"actions is unweighted.", markdown(header, rows)]
    if paper:
        text.append(f"The paper's figures are those of {paper['source']}.")
    if source != HUMAN36M:
        text.append("This is not Human3.6M: no figure here compares with the papers' Human3.6M tables.")

    def table(first, groups, metrics, header):
        rows = [[name, row["frames"]] + [row[metric] for metric in metrics] for name, row in groups]
        text.append(markdown([first, "frames", *header], rows))

    table("subject", [*sorted(result["subjects"].items()), ("all frames", result["pooled"])], METRICS, METRICS.values())
    if recipe.data == "humaneva":                                               # GLA-GCN's Table 2
        subjects = sorted(result["subjects"])
        cells = [[name] + [result["cells"][name].get(s, {}).get("p_mpjpe") for s in subjects] for name in order]
        text += ["P-MPJPE by action and subject, over all chunks:", markdown(["action", *subjects], cells)]
        if genuine and recipe.keypoints in PAPER_HUMANEVA:
            text += ["GLA-GCN's Table 2, which its release scores on the last chunk alone:",
                     markdown(["action", *subjects], [[name, *row] for name, row in PAPER_HUMANEVA[recipe.keypoints].items()])]
    if "sequences" in result:                                                   # GLA-GCN's and GridConv's Table 3
        text.append("PCK at 150 mm and AUC in %, valid frames pooled, over 17 joints and over the benchmark's 14:")
        table("sequence", [*sorted({**result["sequences"], **result["scenes"]}.items()), ("all", result["all"])],
              [metric + ending for ending in ("", "_14") for metric in ("mpjpe", "pck", "auc")],
              ["MPJPE", "PCK", "AUC", "MPJPE 14", "PCK 14", "AUC 14"])
    if yardstick:
        text.append(f"MPJPE over all frames: this model {result['pooled']['mpjpe']:.2f} mm; yardsticks: training mean "
                    f"pose {yardstick['mean_pose']:.2f} mm, affine map of the 2D pose {yardstick['affine']:.2f} mm.")
    return "\n\n".join(text)


# --------------------------------------------------------------------------------------------------------------------
# Looking inside

def grid_cells(model):
    """The joints of each cell of a GridConv model's grid, row by row, as a list of lists; None without a grid."""
    learnt = getattr(model, "autogrids", None)
    S = learnt.assignment() if learnt is not None else getattr(model, "fixed_assignment", None)
    return None if S is None else [row.nonzero().flatten().tolist() for row in S.cpu()]  # RELEASED_5X5 has a cell of two joints


def grid_links(model):
    """The graph that a grid stands for (GridConv's Figure 6): ordered pairs of joints whose cells touch by a side."""
    (H, P), cells = model.grid_shape, grid_cells(model)
    touching = [(i * P + j, k * P + l) for i in range(H) for j in range(P) for k, l in ((i, j + 1), (i + 1, j))
                if k < H and l < P]
    return {pair for c, d in touching for a in cells[c] for b in cells[d] if a != b for pair in ((a, b), (b, a))}


def probes(model, store=None):
    """(inputs of the model, what they are): frames evenly spaced over a store, or else random poses of seed 0.

    At most 256, fewer for long windows. A model without a layout takes random grids (N, 2, H, P).
    """
    T = model.receptive_field
    count = max(16, min(256, 2048 // T))
    if store is not None:
        index = torch.linspace(0, len(store) - 1, min(count, len(store)), device=store.input.device).long()
        poses = store.batch(index, T, getattr(model, "causal", False))[0]
        return poses, f"{len(index)} test frames of {data.provenance(store.sequences)}"
    shape = (2, *model.grid_shape) if getattr(model, "grid_shape", None) and grid_cells(model) is None else (
        *((T,) if T > 1 else ()), model.num_joints, 2)
    poses = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return poses, f"{count} random inputs, uniform in [-1, 1]"


@torch.no_grad()
def look(model, poses):
    """What a model computes on its inputs: ({layer: attention alpha (n, H, P, K, K) of Eq. 7}, features of every joint
    (N, J, C) before GLA-GCN's last layer, or None)."""
    alpha, features = {}, []
    hooks = [module.register_forward_hook(lambda *call, name=name: alpha.__setitem__(_layer(name), call[-1]))
             for name, module in model.named_modules() if isinstance(module, gridconv.GridAttention)]
    if isinstance(model, glagcn.GLAGCN):
        hooks.append(model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])))
    try:
        poses = poses.to(next(model.parameters()))
        model(poses) if poses.shape[-2:] == (model.num_joints, 2) else model.forward_grid(poses)
    finally:
        for hook in hooks:
            hook.remove()
    return alpha, features[0] if features else None


def _layer(name):  # blocks.0.1.conv.attention -> blocks.0.1
    return re.sub(r"\.(conv|attention)\b", "", name)


def similarity(features):
    """Cosine similarity between joints (GLA-GCN's Figure 4): features (N, J, C) -> (J, J), the mean over N."""
    v = torch.nn.functional.normalize(features, dim=2)
    return (v @ v.mT).mean(0)


def attention_spread(alpha):
    """How an attention map alpha (n, H, P, K, K) varies: its mean, and its standard deviation in % of that over positions
    (same input and tap), over inputs (same position and tap) and over the kernel's taps (same input and position)."""
    spread = lambda *dims: 100 * (alpha.std(dims, correction=0).mean() / alpha.mean()).item()
    return alpha.mean().item(), spread(1, 2), spread(0), spread(3, 4)


def inspect(model, poses=None, said=None):
    """What a model is made of and what it learnt, as text: size, and of GridConv (AAAI) Figures 4, 6 and D-G, of GLA-GCN 4.

    GridConv: the grid, the graph it stands for, of a learnt one also the assignment probabilities (softmax of S_prob,
    Eq. 4-5), the joints dropped and the cells changed; of each layer how its attention varies, and how much of a kernel
    lies in its largest tap. GLA-GCN: how alike joints are before the last layer. `poses`, of which `said` says what they
    are, are what the model is looked at with: by default those of `probes`.
    """
    recipe, skeleton = model.recipe, data.SKELETONS[model.recipe.skeleton]
    if poses is None:
        poses, said = probes(model)
    label = lambda joint: f"{joint} {skeleton.joints[joint]}"
    size = sum(p.numel() for p in model.parameters())
    text = [f"{recipe.name} ({recipe.method}): {size:,} parameters, receptive field {model.receptive_field}, epoch "
            f"{model.epoch}, trained on {model.trained_on or 'unnamed data'}"]
    alpha, features = look(model, poses)
    if grid_cells(model) is not None:
        text += _grid_text(model, label, skeleton)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, gridconv.GridConv):
            seen = attention_spread(alpha[_layer(name)]) if _layer(name) in alpha else [None] * 4
            taps = module.weight.detach().abs().flatten(3)                      # (branches, C_out, C_in, K * K)
            rows.append([_layer(name), f"{module.kernel_size} x {module.kernel_size}",
                         100 * (taps.amax(3) / taps.sum(3).clamp(min=1e-30)).mean().item(), *seen])
    if rows:
        text += ["largest tap: its share of a kernel's weight, in %, on average." + bool(alpha) * (
            f" Attention on {said}: its mean,\nand its standard deviation over positions, inputs and taps in % of that."),
            markdown(["layer", "kernel", "largest tap", "attention", "positions", "inputs", "taps"], rows)]
    if features is not None:
        matrix, unshared = similarity(features), getattr(model.head, "W", None)
        text += [_similarity_text(matrix, f"features before the last layer, {said}", label), markdown(
            ["joint", *map(str, range(len(matrix)))], [[label(j), *(f"{v:.2f}" for v in row)] for j, row in enumerate(matrix)])]
        if unshared is not None:
            text.append(_similarity_text(similarity(unshared.detach().flatten(1)[None]), "unshared weights (Eq. 5)", label))
    return "\n".join(text)


def _grid_text(model, label, skeleton):
    H, P = model.grid_shape
    shown = ["+".join(map(str, cell)).rjust(4) for cell in grid_cells(model)]
    text = [f"grid, {H} x {P}:"] + [" ".join(shown[i * P:i * P + P]) for i in range(H)]
    links = grid_links(model)
    bones = sum(edge in links for edge in skeleton.edges)
    text.append(f"neighbours in the grid ({bones} of {len(skeleton.edges)} skeleton links among them):")
    for joint in range(len(skeleton.joints)):
        text.append(f"  {label(joint)}: {', '.join(label(b) for a, b in sorted(links) if a == joint) or 'none'}")
    learnt = model.autogrids
    if learnt is not None:
        p = learnt.s_prob.detach().softmax(1)                                   # (H*P, J)
        text.append("most probable joints of each cell (row, column):")
        for i, (top, joint) in enumerate(zip(*(t.tolist() for t in p.topk(2)))):
            text.append(f"  {i // P}, {i % P}: " + ", ".join(f"{label(b)} {a:.3f}" for a, b in zip(top, joint)))
        held, total, most = learnt.assignment().sum(0).int().tolist(), p.sum(0), p.amax(0)
        text += ["of each joint the cells it has, its probability summed over all cells, and the largest:", markdown(
            ["joint", "cells", "sum", "largest"], [[label(j), held[j], f"{total[j]:.2f}", f"{most[j]:.3f}"]
                                                   for j in range(len(held))])]
        text.append(f"dropped joints: {', '.join(map(label, learnt.dropped())) or 'none'}")
        changed = cells_changed(model)
        text.append("cells changed from the start: " + ("not known" if changed is None else f"{changed} of {H * P}"))
    return text


def _similarity_text(matrix, what, label):
    pairs = sorted((matrix[i, j].item(), j, i) for i in range(len(matrix)) for j in range(i))
    least, most = (f"{label(i)} and {label(j)} {value:.2f}" for value, i, j in (pairs[0], pairs[-1]))
    mean = sum(value for value, _, _ in pairs) / len(pairs)
    return f"cosine similarity between joints, {what}:\n{mean:.2f} on average; least {least}; most {most}"


# A standing person who faces the reader: where the 17 Human3.6M joints are drawn.
_STANDING = ((0, 0), (-1, -.2), (-1.2, -2.5), (-1.3, -5), (1, -.2), (1.2, -2.5), (1.3, -5), (0, 1.4), (0, 2.9), (0, 3.8),
             (0, 4.8), (1.2, 2.8), (2.1, 1.3), (2.5, -.3), (-1.2, 2.8), (-2.1, 1.3), (-2.5, -.3))


def draw_inside(model, poses, path):
    """The figures of `inspect` as a picture file, its format by the file's suffix; needs matplotlib.

    GridConv: the grid, its graph (bones as lines, the grid's other links dotted), a learnt grid's probabilities, and of
    each attention the mean over inputs, H x P blocks of K x K taps, and its deviation over inputs. GLA-GCN: similarities.
    InputError: no matplotlib, a model that holds none of these, a suffix that matplotlib does not know.
    """
    figure, skeleton, panels = _figure(), data.SKELETONS[model.recipe.skeleton], []

    def heatmap(ax, values, block=None):  # rows are joints, or blocks of K x K taps
        ax.figure.colorbar(ax.imshow(values.cpu().numpy(), interpolation="nearest"), ax=ax, shrink=0.8)
        if block is None:
            names = [f"{name} {j}" for j, name in enumerate(skeleton.joints)]
            ax.set_yticks(range(len(names)), names, fontsize=100 / len(names))
            return
        for line, most in zip((ax.axhline, ax.axvline), values.shape):
            for at in range(block, most, block):
                line(at - 0.5, color="white", linewidth=1)
        ax.set_axis_off()

    def layout(ax):
        (H, P), cells = model.grid_shape, grid_cells(model)
        ax.imshow([[cells[i * P + j][0] for j in range(P)] for i in range(H)], cmap="tab20", alpha=0.5, vmin=0,
                  vmax=len(skeleton.joints) - 1)
        for i, cell in enumerate(cells):
            ax.text(i % P, i // P, "+".join(map(str, cell)), ha="center", va="center")
        ax.set_axis_off()

    def graph(ax):
        count, bones = len(skeleton.joints), {frozenset(edge) for edge in skeleton.edges}
        circle = [(math.sin(2 * math.pi * j / count), math.cos(2 * math.pi * j / count)) for j in range(count)]
        place = _STANDING if skeleton.name == "h36m17" else circle
        links = {frozenset(link) for link in grid_links(model)}
        for link in bones | links:
            style = dict(color="tab:red", linestyle=":", zorder=1) if link not in bones else dict(
                color="0.2", linewidth=2, zorder=2) if link in links else dict(color="0.75", linewidth=4, zorder=2)
            ax.plot(*zip(*(place[joint] for joint in link)), **style)
        for joint, at in enumerate(place):
            ax.text(*at, joint, ha="center", va="center", fontsize=7, bbox=dict(boxstyle="circle", fc="white"), zorder=3)
        ax.set_aspect("equal")
        ax.set_axis_off()

    alpha, features = look(model, poses)
    if grid_cells(model) is not None:
        panels += [("grid", layout), ("bones: in the grid dark, not in it grey;\ndotted: the grid's other links", graph)]
        if model.autogrids is not None:
            p = model.autogrids.s_prob.detach().softmax(1).T                    # (J, H*P)
            panels += [("probability of joint in cell", lambda ax: heatmap(ax, p)),
                       ("its logarithm", lambda ax: heatmap(ax, p.log()))]
    for name, a in alpha.items():
        for what, values in (("attention", a.mean(0)), ("std over inputs", a.std(0, correction=0))):
            (H, P, K, _), values = values.shape, values.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
            panels.append((f"{name}: {what}", lambda ax, values=values, K=K: heatmap(ax, values, K)))
    if features is not None:
        panels.append(("cosine similarity of features", lambda ax: heatmap(ax, similarity(features))))
        if getattr(model.head, "W", None) is not None:
            panels.append(("of unshared weights", lambda ax: heatmap(ax, similarity(model.head.W.detach().flatten(1)[None]))))
    if not panels:
        raise InputError(f"--plot: nothing to draw, {model.recipe.method} has neither a grid nor features of single joints")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(3.6 * columns, 3.4 * rows)
    for place, (title, draw) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, place)
        ax.set_title(title, fontsize=9)
        draw(ax)
    suffix = str(path).rpartition(".")[2].lower()
    if suffix not in figure.canvas.get_supported_filetypes():
        raise InputError(f"--plot {path}: unknown picture format {suffix!r}; png, pdf or svg, for instance")
    data.write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=110))


def cells_changed(model):
    """How many cells of a learnt grid hold another joint than at the start; None where there is no learnt grid, or where
    its start is not known (a release's file)."""
    learnt = getattr(model, "autogrids", None)
    if learnt is None or model.recipe.name == _RELEASED_GRIDCONV["name"]:
        return None
    start = _layout(model.recipe, model.num_joints, model.grid_shape)
    return int((start.assignment().argmax(1) != learnt.assignment().cpu().argmax(1)).sum())


# --------------------------------------------------------------------------------------------------------------------
# A user's own keypoints: what detectors write, read and made whole

@dataclass
class Track:
    """One person's 2D keypoints: keypoints (T, J, 2|3), pixels and score, NaN where nothing was detected; frames, their T
    numbers in the video, of which every `step`-th is here; size (width, height) and joints ("coco" or "h36m") where the file
    says them."""
    person: str
    keypoints: np.ndarray
    frames: list
    size: tuple | None = None
    joints: str | None = None
    step: int = 1

    def __post_init__(self):
        self.person = " ".join(self.person.split())                             # it is printed, in one line


def coco_to_h36m(p):
    """COCO-17 (17, C) to Human3.6M-17 (17, C); every joint is a weighted mean, so no direction in the image is special.

    Pelvis: mid hips; spine: halfway to mid shoulders; thorax and neck/nose by the rule of GAST-Net's and MHFormer's demos:
    mid shoulders moved a third of the way to the nose, the nose a quarter of the way back. The head is ours: the mean of eyes
    and ears, moved on by the step from the nose to mid eyes (theirs does that in y alone).
    """
    nose, eyes, ears, shoulders, hips = p[0], p[1:3].mean(0), p[3:5].mean(0), p[5:7].mean(0), p[11:13].mean(0)
    trunk = ((hips + shoulders) / 2, shoulders + (nose - shoulders) / 3, nose + (shoulders - nose) / 4,
             (eyes + ears) / 2 + eyes - nose)
    return np.stack((hips, *p[[12, 14, 16, 11, 13, 15]], *trunk, *p[[5, 7, 9, 6, 8, 10]]))


LAYOUTS = {"coco": (17, 26, 133, 136), "h36m": (17,)}  # Halpe's 26 and 136, COCO-WholeBody's 133 begin with COCO's 17
TO_H36M = {"coco": coco_to_h36m(np.eye(17)), "h36m": np.eye(17)}                # (17, 17): TO_H36M[joints] @ points


def read_keypoints(path):
    """The people in a file of 2D keypoints, as Tracks.

    .json: COCO results, a list of {image_id, keypoints [x, y, score, ...], score} (Detectron2, MMPose, AlphaPose), with a
    person's number (track_id, idx, person_id or instance_id) or without; a COCO dictionary with "annotations" and "images",
    in its images' order; MMPose's predictions ("instance_info"). image_id counts frames (a file name's last number); where
    all lie in steps of N, every N-th frame was looked at; others left out are gaps. Of several detections with one number, or
    none, the best-scored of each frame is taken.
    .npz: VideoPose3D's data_2d_custom_*.npz, a Track for each video. .npy, .npz: an array (T, J, 2|3).
    InputError: another kind of file, a broken one and where, nobody in it, entries without coordinates.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".json", ".npz", ".npy"):
        raise InputError(f"{path}: keypoints are read from .json, .npz and .npy files, not from {kind or 'this'}")
    arrays = {} if kind == ".json" else data.read_npz(path)
    read = _read_json if kind == ".json" else _read_videopose3d if "positions_2d" in arrays else _read_array
    tracks = [track for track in read(path, arrays) if len(track.keypoints)]
    if not tracks:
        raise InputError(f"{path}: no person in it; run the detector again, with a lower threshold")
    return tracks


def _read_array(path, arrays):
    fits = {key: a for key, a in arrays.items() if a.ndim == 3 and a.shape[2] in (2, 3) and a.dtype.kind in "fiu"}
    keypoints = fits.get("keypoints", next(iter(fits.values())) if len(fits) == 1 else None)
    if keypoints is None:
        found = ", ".join(f"{key} {a.shape}{' (scores only?)' * (a.ndim == 2)}" for key, a in arrays.items())
        raise InputError(f"{path}: found {found or 'nothing'}; expected one array (frames, joints, 2 or 3) of x, y and score, or "
                         "one named keypoints among others")
    return [Track("0", keypoints, list(range(len(keypoints))))]


def _read_videopose3d(path, arrays):
    try:
        videos, about = (arrays[key].item() for key in ("positions_2d", "metadata"))
        sizes = {video: (float(place["w"]), float(place["h"])) for video, place in about["video_metadata"].items()}
        joints = about["layout_name"] if about.get("layout_name") in LAYOUTS else None
        return [Track(str(video) if len(actions) == len(views) == 1 else f"{video} {action} {i}", np.asarray(view, float),
                      list(range(len(view))), sizes[video], joints)
                for video, actions in videos.items() for action, views in actions.items() for i, view in enumerate(views)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not as VideoPose3D's prepare_data_2d_custom.py writes it ({error!r}); use that") from None


def _detection(item):
    """(person's number or None, score, points (J, 3)) of one entry of a detector's JSON; ValueError where it has none."""
    if "keypoints" not in item:
        raise ValueError(f"no keypoints, only {', '.join(item) or 'nothing'}")
    points = np.array(item["keypoints"], float)
    if points.ndim == 1 and len(points) % 3:
        raise ValueError(f"{len(points)} numbers, not x, y and score of each joint")
    points = points.reshape(-1, 3) if points.ndim == 1 else points
    if points.shape[1] == 2:                                                    # MMPose: pairs, their scores beside them
        points = np.column_stack((points, np.array(item.get("keypoint_scores", np.ones(len(points))), float)))
    person = next((item[k] for k in ("track_id", "idx", "person_id", "instance_id") if item.get(k) is not None), None)
    while isinstance(person, list) and person:                                  # AlphaPose writes [7.0]
        person = person[0]
    if not isinstance(person, (str, int, float, type(None))):
        raise ValueError(f"a person's id is {str(person)[:40]}; expected a number or a word")
    if person is not None:
        person = str(int(person) if isinstance(person, float) and person.is_integer() else person)
        if len(person) > 100:
            raise ValueError(f"a person's id has {len(person)} characters; expected at most 100")
    score = item.get("score")
    return person, float(np.mean(points[:, 2]) if score is None else score), points


def _frame(image):
    """The frame number in an image_id: a file name's last number; ValueError where it has none."""
    numbers = re.findall(r"\d+", Path(image).stem) if isinstance(image, str) else [image]
    if not numbers:
        raise ValueError(f"image_id {image!r} has no number")
    return int(numbers[-1])


def _read_json(path, _):
    content = data.read_json(path, "name a file of keypoints")
    about = content if isinstance(content, dict) else {}
    people, images, shapes, number, crowded = {}, {}, set(), 0, set()           # people: {person: {frame: (score, points)}}
    try:
        places = {image["id"]: place for place, image in enumerate(about.get("images", ()))}
        sizes = {(float(image["width"]), float(image["height"])) for image in about.get("images", ()) if image.get("width")}
        told = str(about.get("meta_info", {}).get("dataset_name"))
        for number, entry in enumerate(about["annotations" if "annotations" in about else "instance_info"] if about else content):
            for item in entry.get("instances", [entry]):
                if "annotations" in about and "keypoints" not in item:  # another kind of thing than a person
                    continue
                image = item.get("image_id", entry.get("frame_id", 0))
                frame = places[image] if places else _frame(image)
                if images.setdefault(frame, image) != image:                    # as img0_cam3.jpg and img1_cam3.jpg
                    raise ValueError(f"image_id {image!r} and {images[frame]!r} are both frame {frame} by their last number, "
                                     "which must count frames")
                person, score, points = _detection(item)
                found = people.setdefault(person, {})
                shapes.add(points.shape)
                crowded |= {frame} & found.keys()
                if frame not in found or score > found[frame][0]:
                    found[frame] = score, points
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: entry {number}: {reason}; expected a list of {{image_id, keypoints: [x, y, score, ...]}}, "
                         "alone or as annotations or instance_info") from None
    if len(shapes) > 1 or len(sizes) > 1:
        raise InputError(f"{path}: {'keypoints' if len(shapes) > 1 else 'images'} of several sizes; give one video's file")
    frames = sorted({frame for found in people.values() for frame in found})
    step = 1 if places else math.gcd(*np.diff(frames).tolist()) or 1            # every second frame, say
    if frames and (frames[-1] - frames[0]) // step > 1000 + 10 * len(frames):
        raise InputError(f"{path}: {len(frames)} image_ids from {frames[0]} to {frames[-1]} do not number a video's frames")
    if crowded:
        print(f"warning: {path}: {len(crowded)} frames have several people of one number, or of none; the best-scored of each "
              "frame is taken: track them first to lift each", file=sys.stderr)
    names, tracks = list(places), []
    for person, found in people.items():
        span = range(min(found), max(found) + 1, step)
        keypoints = np.full((len(span), *next(iter(shapes))), np.nan)
        for frame, (_, points) in found.items():
            keypoints[span.index(frame)] = points
        tracks.append(Track(person or ("untracked" if len(people) > 1 else "0"), keypoints,
                            [names[frame] for frame in span] if places else list(span), next(iter(sizes), None),
                            told if told in LAYOUTS else tell_joints(keypoints) or "coco", step))
    return tracks


def tell_joints(keypoints):
    """"coco" or "h36m" for keypoints (T, 17, 2|3), None where it is not clear.

    Joints 0 to 4 are COCO's face, but Human3.6M's pelvis, right leg and left hip. The diagonal of their box against the
    body's, median over the frames with every joint: in the open benchmark's and synthetic clips 0.2 m, a face, make 0.17 at
    most, the leg 0.40 at least. Here COCO is below 0.25, Human3.6M above 0.35.
    """
    xy = np.asarray(keypoints, float)[..., :2]
    xy = xy[_seen(xy).all(1)] if xy.shape[1] == 17 else xy[:0]
    diagonal = lambda points: np.linalg.norm(np.ptp(points, 1), axis=-1)
    part = np.median(diagonal(xy[:, :5]) / np.maximum(diagonal(xy), 1e-9)) if len(xy) else 0.3
    return "coco" if part < 0.25 else "h36m" if part > 0.35 else None


def _seen(points, min_score=0.0):
    """Which of the points (..., 2|3) were detected; (0, 0) is how files without scores say that one was not, and what lies
    beyond a million pixels is a detector's slip."""
    xy = points[..., :2]
    return (np.abs(xy) <= 1e6).all(-1) & (xy != 0).any(-1) & ((points[..., 2:] > min_score).all(-1))


def _pixels(keypoints, joints=None, min_score=0.0):
    """Keypoints (T, J, 2|3) as (xy (T, 17, 2), NaN where missing; "coco", "h36m" or None: not clear); see `prepare`."""
    points = np.asarray(keypoints, float)
    if points.ndim != 3 or points.shape[2] not in (2, 3) or not len(points):
        raise InputError(f"keypoints of shape {points.shape}: expected (frames, joints, 2 or 3), x, y and score in pixels")
    if not any(points.shape[1] in counts for name, counts in LAYOUTS.items() if joints in (None, name)):
        raise InputError(f"{points.shape[1]} joints are no known layout: expected COCO's 17 (or 26, 133 or 136 that begin with "
                         "them) or Human3.6M's 17")
    xy, seen = points[:, :17, :2].copy(), _seen(points[:, :17], min_score)
    xy[~seen] = np.nan
    return xy, joints or ("coco" if points.shape[1] > 17 else tell_joints(xy))


def _check_unit(xy):
    if np.nanmax(np.abs(xy)) <= 2:
        raise InputError(f"keypoints: none beyond {np.nanmax(np.abs(xy)):.2g}; expected pixels, not parts of the image's size")


def _fill(xy, joints):
    """xy (T, 17, 2) with NaN replaced: linear in time between a joint's positions, the first and last held beyond them."""
    xy, time, seen = xy.copy(), np.arange(len(xy)), np.isfinite(xy[..., 0])     # seen (T, 17)
    for joint, channel in np.ndindex(17, 2):
        if seen[:, joint].any():
            xy[:, joint, channel] = np.interp(time, time[seen[:, joint]], xy[seen[:, joint], joint, channel])
    never = ~seen.any(0)
    if joints == "coco" and not never[:5].all():                                # one part of the face is enough
        xy[:, :5][:, never[:5]] = xy[:, :5][:, ~never[:5]].mean(1, keepdims=True)
        never[:5] = False
    if never.any():
        names = [name for name, absent in zip(data.SKELETONS[joints + "17"].joints, never) if absent]
        raise InputError(f"keypoints: {', '.join(names)} never detected; the model needs the whole body")
    return xy


def prepare(keypoints, joints=None, min_score=0.0):
    """A person's keypoints (T, J, 2|3), pixels and score, as models take them: (pose_2d (T, 17, 2) pixels, Human3.6M's joints,
    interpolated (T, 17) bool).

    `joints`: "coco" or "h36m", by default told apart (`tell_joints`). A joint that is NaN, at (0, 0), beyond 1e6 pixels or
    not above `min_score` is missing and interpolated in time; a Human3.6M joint counts as interpolated if any COCO joint
    that it is made of was. InputError: another shape, layout or unit, a joint that no frame has.
    """
    xy, joints = _pixels(keypoints, joints, min_score)
    if np.isnan(xy).all():
        raise InputError(f"keypoints: no joint has a score above {min_score:g} and a position within a million pixels "
                         "in any frame")
    _check_unit(xy)
    if joints is None:
        raise InputError("keypoints: the 17 joints may be COCO's or Human3.6M's; give --joints coco or --joints h36m")
    return TO_H36M[joints] @ _fill(xy, joints), np.isnan(xy[..., 0]) @ (TO_H36M[joints] != 0).T


def one_euro(x, fps, cutoff=2.0, beta=10.0):
    """The One-Euro filter (Casiez et al. 2012) of x (T, ...): exponential smoothing over past frames whose cutoff frequency,
    `cutoff` + `beta` |dx/dt| in Hz, rises with the speed, which is itself smoothed at 1 Hz.

    GridConv's authors smooth 2D with it (OSVAI/GridConv, issue 2) but name no constants. Ours are for half image sides: with
    noise of 0.01 on the open benchmark's test clips they take 60 % off its frame-to-frame error, 20 % off its own.
    """
    weight = lambda hertz: 1 / (1 + fps / (2 * np.pi * hertz))
    value, speed, out = x[0], np.zeros_like(x[0]), np.empty_like(x)
    for t in range(len(x)):
        speed = speed + weight(1.0) * ((x[t] - value) * fps - speed)
        value = out[t] = value + weight(cutoff + beta * np.abs(speed)) * (x[t] - value)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Lifting a video

def _rule(model, size):
    """The model's 2D normalisation for images of that size; InputError for a size or a model that cannot be used."""
    recipe = model.recipe
    if recipe.skeleton != "h36m17" or recipe.target != "camera" or recipe.swap_sides:
        raise InputError(f"the checkpoint was trained on {recipe.skeleton} joints{', sides swapped,' * recipe.swap_sides} with the "
                         f"target {recipe.target}; a video's keypoints need one trained on h36m17 joints with the target camera")
    if len(size) != 2 or not all(1 <= side <= 1e6 for side in size):
        raise InputError(f"size {' x '.join(f'{side:g}' for side in size)}: expected width and height in pixels, 1 to a million")
    return _fitting(recipe.normalise, [size])


def _fitting(rule, sizes):
    """The rule for images of these sizes: `release-500` is for Human3.6M's 1000 x 1000, about the centre, in half sides; for
    other sizes that is `longest`."""
    return "longest" if rule == "release-500" and not all(999 < side < 1003 for size in sizes for side in size) else rule


def lift(model, keypoints, size, joints=None, flip=None):
    """3D poses (T, 17, 3), float32 metres, root-relative, in the camera frame (x right, y down, z away), of a person's 2D
    keypoints (T, J, 2|3) in pixels of a video of `size` (width, height); gaps and joints as in `prepare`.

    `flip` averages with the mirrored input's poses, by default as the model's recipe does. InputError: what `prepare`
    refuses, an impossible size, a model of other joints or with a target that needs the true root.
    """
    rule, (pose_2d, _) = _rule(model, size), prepare(keypoints, joints)
    unknown = np.zeros((*pose_2d.shape[:2], 3), np.float32)
    sequence = data.Sequence("", "", "", pose_2d.astype(np.float32), unknown, unknown[:, 0], data.UNKNOWN_INTRINSICS, size, 0.0)
    store = data.FrameStore([sequence], rule, data.SKELETONS["h36m17"], next(model.parameters()).device)
    return predict(model, store, flip=model.recipe.flip_test if flip is None else flip).numpy()


class Lifter:
    """Lifts frame by frame: lifter(keypoints (J, 2|3)) gives the pose (17, 3) of the frame `delay` frames before, None for the
    first `delay`; flush() ends the video with the poses (n, 17, 3) still owed. Together they are `lift`'s.

    `delay` is half the model's window, 0 for causal and single-frame models. A missing joint, or everyone, stays where it was
    last, as what comes next is not known; before every joint was seen, and where `joints` is not given one whole frame that
    tells them, there are no frames. The model is put into evaluation mode. Arguments and errors as `lift`.
    """

    def __init__(self, model, size, joints=None, flip=None):
        self.model, self.size, self.joints, self.rule = model.eval(), size, joints, _rule(model, size)
        self.flip, T = model.recipe.flip_test if flip is None else flip, model.receptive_field
        self.delay = 0 if getattr(model, "causal", False) else T // 2
        self.window, self.count, self.last = deque(maxlen=T), 0, np.full((1, 17, 2), np.nan)

    def __call__(self, keypoints):
        points = np.asarray(keypoints, float)
        if not _seen(points[:17]).any():
            return self._push(self.window[-1]) if self.window else None
        xy, self.joints = _pixels(points[None], self.joints)
        self.last = np.where(np.isnan(xy), self.last, xy)                       # NaN: never seen
        if self.joints is None:
            return None
        try:
            whole = _fill(self.last, self.joints)[0]
        except InputError:
            return None
        if not self.window:                                                     # later a lone joint may be in the corner
            _check_unit(whole)
        return self._push(data.normalise(TO_H36M[self.joints] @ whole, self.size, self.rule))

    @torch.no_grad()
    def _push(self, frame):
        self.window.extend([frame] * (1 if self.window else self.window.maxlen))  # before the first frame, the first
        self.count += 1
        if self.count <= self.delay:
            return None
        pose = torch.as_tensor(np.stack(self.window)).to(next(self.model.parameters()))  # (T, 17, 2)
        return _forward(self.model, pose if len(pose) == 1 else pose[None], data.SKELETONS["h36m17"], self.flip)[0].cpu().numpy()

    def flush(self):
        poses = [self._push(self.window[-1]) for _ in range(self.delay if self.count else 0)]
        self.window.clear()
        self.count, self.last = 0, np.full_like(self.last, np.nan)
        return np.reshape([pose for pose in poses if pose is not None], (-1, 17, 3))


def root_trajectory(pose_2d, poses, focal, centre):
    """The root's position (T, 3) in the camera frame, metres, from 2D (T, J, 2) in pixels and root-relative 3D (T, J, 3) in
    metres, for a pinhole camera of that focal length and centre in pixels.

    Closed form. With the ray (a, b) = (pixel - centre) / focal, each joint (x, y, z) asks for X - a Z = a z - x and
    Y - b Z = b z - y: linear in the root (X, Y, Z), least squares over the joints of a frame.
    """
    ray = (pose_2d - centre) / focal                                            # (T, J, 2)
    offset = ray * poses[..., 2:] - poses[..., :2]
    r, o = (array - array.mean(1, keepdims=True) for array in (ray, offset))
    depth = -(r * o).sum((1, 2)) / np.maximum((r * r).sum((1, 2)), 1e-12)
    return np.concatenate((offset.mean(1) + ray.mean(1) * depth[:, None], depth[:, None]), 1)


def root_error(poses, store):
    """Mean distance in metres between a store's true roots and `root_trajectory` of poses (N, J, 3) with the store's 2D and
    cameras, as drawn where they are random; lens distortion is ignored."""
    focal, centre = store.normalised_intrinsics(slice(None))[:, None, :4].split(2, -1)  # in the units of store.input
    roots = root_trajectory(*(array.cpu().double().numpy() for array in (store.input, poses, focal, centre)))
    return np.linalg.norm(roots - store.root.cpu().numpy(), axis=1).mean()


# --------------------------------------------------------------------------------------------------------------------
# Pictures, which need matplotlib, and export

def _figure(**options):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    return FigureCanvasAgg(Figure(layout="constrained", **options)).figure      # no display and no global state


def plot_poses(path, pose_2d, poses, truth=None, fps=30.0, frames=None, columns=6):
    """A picture of 2D poses (T, 17, 2) beside their 3D poses (T, 17, 3), root-relative, from the camera and from its right:
    `columns` frames evenly spread (.png), or an animation (.gif) at the speed of `fps` poses a second. Left limbs are blue,
    right ones orange, the ground truth (T, 17, 3) dashed; equal axes about the root, one scale for all. frames (T,): numbers
    to name them by."""
    moving, skeleton = Path(path).suffix.lower() == ".gif", data.SKELETONS["h36m17"]
    step = max(math.ceil(fps / 12.5), math.ceil(len(poses) / 300))              # 12.5 pictures a second, 300 at most
    shown = np.arange(0, len(poses), step) if moving else np.unique(np.linspace(0, len(poses) - 1, columns).round().astype(int))
    views = [("2D input", pose_2d - pose_2d[:, :1], None)] + [
        (f"3D, from {side}", poses[..., axes], None if truth is None else truth[..., axes])
        for side, axes in (("the camera", [0, 1]), ("its right", [2, 1]))]
    figure = _figure(figsize=(7.2, 2.7) if moving else (1.5 * len(shown), 4.7), dpi=100)
    axes = figure.subplots(*((1, 3) if moving else (3, len(shown))), squeeze=False).reshape(3, -1)  # (views, columns)
    for row, (title, points, _) in zip(axes, views):
        reach = 1.08 * np.abs(points[shown]).max()
        for ax in row:
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", xticks=[], yticks=[])
        row[0].set_xlabel(title, fontsize=8) if moving else row[0].set_ylabel(title, fontsize=8)

    def draw(column, t):
        column[0].set_title(f"frame {t if frames is None else frames[t]}", fontsize=8)
        for ax, (_, points, true) in zip(column, views):
            for line in list(ax.lines):
                line.remove()
            for parent, child in skeleton.edges:
                colour = "tab:blue" if child in skeleton.left else "tab:orange" if child in skeleton.right else "0.25"
                ax.plot(*points[t, [parent, child]].T, color=colour, linewidth=1.8, solid_capstyle="round")
                if true is not None:
                    ax.plot(*true[t, [parent, child]].T, color="0.5", linewidth=0.9, linestyle="--")

    if not moving:
        for column, t in zip(axes.T, shown):
            draw(column, t)
        return data.write_atomically(path, lambda file: figure.savefig(file, format="png"))
    from PIL import Image                                                       # matplotlib brings it
    images = []
    for t in shown:
        draw(axes[:, 0], t)
        figure.canvas.draw()
        figure.set_layout_engine("none")                                       # laid out once
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()).quantize(32))
    shown_for = min(1000 * step / fps, 655350)                                  # ms, which a GIF counts in 16 bits of 10 ms
    data.write_atomically(path, lambda file: images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=shown_for, loop=0))


def plot_curves(folder):
    """curves.png beside a run's log.csv: the training loss, and the test set's MPJPE and P-MPJPE, by epoch."""
    log, figure = np.genfromtxt(Path(folder) / "log.csv", delimiter=",", names=True, ndmin=1), _figure(figsize=(8, 3), dpi=90)
    for ax, names, title in zip(figure.subplots(1, 2), (("loss",), ("mpjpe", "p_mpjpe")), ("training loss", "test set, mm")):
        for name in names:
            scored = np.isfinite(log[name])
            ax.plot(log["epoch"][scored], log[name][scored], marker="o", markersize=3, label=METRICS.get(name, name))
        ax.set(xlabel="epoch", title=title, xlim=(0, 1.04 * log["epoch"][-1]), ylim=(0, 1.1 * np.nanmax([log[n] for n in names])))
        ax.grid(alpha=0.3)
        ax.legend()
    data.write_atomically(Path(folder) / "curves.png", lambda file: figure.savefig(file, format="png"))


def export(model, path):
    """Writes the model through torch.export, for any batch size; returns the largest difference from itself on random input.
    The file's poselift.json says the input's shape, its joints and its normalisation. InputError where they differ."""
    T, J, random = model.receptive_field, model.num_joints, torch.Generator().manual_seed(0)
    shape = (J, 2) if T == 1 else (T, J, 2)
    inputs = [torch.rand(batch, *shape, generator=random).to(next(model.parameters())) * 2 - 1 for batch in (2, 1, 5)]
    program = torch.export.export(model.eval(), (inputs[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        worst = max((program.module()(x) - model(x)).abs().max().item() for x in inputs)
    if not worst < 1e-4:
        raise InputError(f"{path}: not written: the exported model differs from the original by {worst:.2g}")
    about = {"input": ["batch", *shape], "normalise": model.recipe.normalise, "target": model.recipe.target,
             "causal": getattr(model, "causal", False), "joints": data.SKELETONS[model.recipe.skeleton].joints}
    content = io.BytesIO()                                                      # on a full disk torch's writer aborts
    torch.export.save(program, content, extra_files={"poselift.json": json.dumps(about)})
    data.write_atomically(path, lambda file: file.write(content.getbuffer()))
    return worst


# --------------------------------------------------------------------------------------------------------------------
# Command line

def numbers(text):
    """Comma-separated whole numbers, as a tuple."""
    return tuple(int(part) for part in text.split(","))


def _checkpoint_options(parser):
    """The checkpoint and what a release's file does not say; `_load` reads them back."""
    parser.add_argument("checkpoint", help="a checkpoint of train.py, of GridConv's release or of GLA-GCN's")
    parser.add_argument("--padding", type=lambda text: tuple(text.split(",")),
                        help="GridConv's release: padding of its branches, as circular,zeros")
    parser.add_argument("--grid", type=numbers, help="GridConv's release: grid rows and columns, where not 5,5")
    parser.add_argument("--filter-widths", type=numbers, help="GLA-GCN's release: as 3,3,3,3,3 for T = 243")
    parser.add_argument("--skeleton", help="GLA-GCN's release: h36m17 or 3dhp17 for 17 joints")
    parser.add_argument("--normalise", help="2D normalisation: release-500, width or longest")


def _load(args, **overrides):
    names = ("padding", "grid", "filter_widths", "skeleton", "normalise")
    return load_model(args.checkpoint, **{name: getattr(args, name) for name in names}, **overrides)


def pick_device(name=None):
    """The device of that name, by default CUDA where there is one; an unusable one is an InputError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()                                     # meta has no numbers to give back
    except (AssertionError, ImportError, RuntimeError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def make_store(recipe, folder, split, device="cpu"):
    """The recipe's frames of a split ("train" or "test"), on the device; the test split through its own cameras. InputError
    where the data's joints are not the recipe's."""
    fitting = DATASETS.get(recipe.data, (recipe.skeleton,))
    if recipe.skeleton not in fitting:
        raise InputError(f"the model lifts the joints of {recipe.skeleton}, {recipe.data} data has those of "
                         f"{' or '.join(fitting)}: take other data (--dataset) or, to train, another --skeleton")
    sequences = data.load_dataset(recipe, folder, split)
    sizes = {s.size for s in sequences} if recipe.cameras == "recorded" else [(0, 0)]  # of any size, not drawn yet
    store = data.FrameStore(sequences, _fitting(recipe.normalise, sizes), data.SKELETONS[recipe.skeleton], device,
                            target=recipe.target, cameras=recipe.cameras, noise=recipe.noise, missing=recipe.missing,
                            swap_sides=recipe.swap_sides)
    if split == "test":
        store.redraw(data.TEST_DRAW)
    return store


def evaluate_command(argv):
    """python eval.py CHECKPOINT --data DIR: the table of a model's errors on a dataset's test split."""
    parser = Parser(prog="eval.py", description=evaluate_command.__doc__,
                    epilog="also: eval.py " + ", ".join(COMMANDS) + " (eval.py COMMAND --help)")
    _checkpoint_options(parser)
    parser.add_argument("--data", default="data", help="the folder with the dataset's files (default: data)")
    parser.add_argument("--dataset", choices=DATASETS, help="another dataset than the one trained on")
    parser.add_argument("--keypoints", help="the 2D poses, as gt, hrnet or cpn_ft_h36m_dbb")
    parser.add_argument("--cameras", choices=("recorded", "random"), help="random: test cameras that no training sees")
    parser.add_argument("--noise", type=float, help="2D noise, a fraction of the person's size in the image")
    parser.add_argument("--missing", type=float, help="fraction of the 2D lost in gaps and interpolated in time")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored input's")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    for name, most in (("noise", 1), ("missing", 0.9)):
        if not 0 <= (getattr(args, name) or 0) <= most:
            raise InputError(f"--{name} {getattr(args, name):g}: expected a fraction from 0 to {most:g}")
    model = _load(args, data=args.dataset, keypoints=args.keypoints, cameras=args.cameras, noise=args.noise,
                  missing=args.missing).to(device)
    recipe = model.recipe
    if recipe.keypoints is None:
        raise InputError(f"{args.checkpoint}: the file does not say its 2D poses: give --keypoints, as gt or cpn_ft_h36m_dbb")
    if recipe.data in ("3dhp", "synthetic"):                                    # they have no other 2D
        recipe.keypoints = "gt"
    flip = recipe.flip_test if args.flip is None else args.flip
    store = make_store(recipe, args.data, "test", device)
    source = data.provenance(store.sequences)
    poses = predict(model, store, flip=flip)
    result = score(poses, store)
    try:
        yardstick = yardsticks(make_store(recipe, args.data, "train", device), store)
    except (InputError, OSError) as error:                                      # training data need not be at hand
        yardstick = None
        print(f"no yardsticks: {error}", file=sys.stderr)
    print(f"{args.checkpoint}: {recipe.name}, {recipe.keypoints} 2D, {'with' if flip else 'without'} flip averaging\n")
    print(report(result, source, recipe, yardstick))
    if recipe.target == "camera" and not recipe.swap_sides and torch.isfinite(store.intrinsics).all():
        off, least = (root_error(pose, store) for pose in (poses, store.pose_3d))
        print(f"\nRoot's position from 2D, poses and focal length: off by {off:.3f} m on average, with true poses {least:.3f} m.")
    if args.json:
        kept = {"checkpoint": str(args.checkpoint), "data": source, "flip": flip, "yardsticks": yardstick, **result,
                "recipe": vars(recipe)}
        data.write_atomically(args.json, lambda file: file.write((json.dumps(kept, indent=1) + "\n").encode()))


def inspect_command(argv):
    """python eval.py inspect CHECKPOINT: a model's size, its grid and the equivalent graph, and what it learnt."""
    parser = Parser(prog="eval.py inspect", description=inspect_command.__doc__)
    _checkpoint_options(parser)
    parser.add_argument("--data", metavar="DIR", help="look with test frames of its dataset there (default: random poses)")
    parser.add_argument("--dataset", choices=DATASETS, help="another dataset than the one trained on")
    parser.add_argument("--plot", metavar="FILE", help="draw it as well: a .png, .pdf or .svg (needs matplotlib)")
    args = parser.parse_args(argv)
    model = _load(args, data=args.dataset)
    model.recipe.keypoints = model.recipe.keypoints or "gt"                     # a release's file does not say
    poses, said = probes(model, None if args.data is None else make_store(model.recipe, args.data, "test"))
    print(inspect(model, poses, said))
    if args.plot:
        draw_inside(model, poses, args.plot)


def _lift_track(model, track, args):
    """The rows of the output for one person; prints what was done."""
    size = tuple(args.size or track.size or ())
    if not size:
        raise InputError("the file does not say the image's size: give --size WIDTH HEIGHT")
    if len(track.keypoints) == 1 and model.receptive_field > 1:
        raise InputError(f"one frame, where the model looks at {model.receptive_field}; for single images take a GridConv model")
    pose_2d, interpolated = prepare(track.keypoints, args.joints or track.joints, args.min_score)
    if args.smooth:
        pose_2d = one_euro(pose_2d / (max(size) / 2), args.fps / track.step, args.smooth) * (max(size) / 2)
    poses, centre, focal = lift(model, pose_2d, size, "h36m", args.flip), np.array(size) / 2, args.focal or math.hypot(*size)
    gaps, outside = interpolated.all(1), (np.abs(pose_2d - centre) > 2 * centre).any(2).mean()
    how = f", one in {track.step} of the video" * (track.step > 1) + ", smoothed" * bool(args.smooth)
    print(f"person {track.person}: {len(poses)} frames{how}; interpolated: {gaps.sum()} whole frames, "
          f"{interpolated[~gaps].sum()} single joints")
    if not args.focal:
        print(f"root: focal length taken for the image's diagonal, {focal:.0f} pixels, that is "
              f"{2 * math.degrees(math.atan(centre[0] / focal)):.0f} degrees across; --focal where known")
    if outside:
        print(f"warning: person {track.person}: {outside:.0%} of the joints lie more than half an image outside {size[0]:g} x "
              f"{size[1]:g}; is the size right?", file=sys.stderr)
    column = lambda value: np.array([value] * len(poses))
    return dict(poses=poses, root=root_trajectory(pose_2d, poses, focal, centre).astype(np.float32), interpolated=interpolated,
                keypoints=pose_2d.astype(np.float32), frames=np.array(track.frames), person=column(track.person),
                size=column(size), focal=column(focal))


def lift_command(argv):
    """python eval.py lift CHECKPOINT --keypoints FILE --size W H --out poses.npz: a video's own 2D keypoints to 3D poses."""
    parser = Parser(prog="eval.py lift", description=lift_command.__doc__)
    add = parser.add_argument
    _checkpoint_options(parser)
    add("--keypoints", required=True, metavar="FILE", help="COCO results (.json), VideoPose3D's data_2d_custom (.npz), an array")
    add("--size", nargs=2, type=float, metavar=("W", "H"), help="the video's width and height, where the file does not say")
    add("--joints", choices=LAYOUTS, help="the keypoints' joints (default: told apart)")
    add("--person", help="lift this one alone (default: everyone, each on their own)")
    add("--min-score", type=float, default=0.0, metavar="S", help="joints not above it are interpolated (default: 0)")
    add("--smooth", type=float, nargs="?", const=2.0, metavar="HZ", help="One-Euro filter on the 2D; lowest cutoff (default: 2)")
    add("--fps", type=float, default=30.0, help="of the video, for smoothing and animations (default: 30)")
    add("--focal", type=float, metavar="PIXELS", help="focal length, for the root's position (default: the image's diagonal)")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored input's")
    add("--out", default="poses.npz", metavar="FILE", help=".npz or .json (default: poses.npz)")
    add("--plot", nargs="+", default=[], metavar="FILE", help=".png: a strip of frames; .gif: an animation; of the longest track")
    add("--truth", metavar="FILE", help="array (T, 17, 3), root-relative metres, to draw dashed and to compare with")
    add("--benchmark", action="store_true", help="measure frames per second")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    for name, paths, kinds in (("out", [args.out], (".npz", ".json")), ("plot", args.plot, (".png", ".gif"))):
        for path in paths:
            if Path(path).suffix.lower() not in kinds:
                raise InputError(f"--{name} {path}: expected a name ending in {' or '.join(kinds)}")
    for name, least in (("fps", 0.01), ("focal", 1), ("smooth", 0.01)):
        if getattr(args, name) is not None and not least <= getattr(args, name) <= 1e6:
            raise InputError(f"--{name} {getattr(args, name):g}: must be a number from {least:g} to a million")
    model = _load(args).to(pick_device(args.device))
    _rule(model, args.size or (1, 1))
    for path in (args.out, *args.plot):
        if any(given and Path(path).resolve() == Path(given).resolve() for given in (args.keypoints, args.truth, args.checkpoint)):
            raise InputError(f"{path}: would overwrite what is read; choose another --out or --plot")
    truth = None
    if args.truth:
        truth = data._poses(next(iter(data.read_npz(args.truth).values()), None), args.truth, (3,)).astype(float)
        data._check_finite(truth, args.truth)
    everyone, rows = read_keypoints(args.keypoints), []
    tracks = [track for track in everyone if args.person in (None, track.person)]
    if not tracks:
        known = ", ".join(track.person for track in everyone[:20])
        raise InputError(f"--person {args.person}: not in {args.keypoints}; it has {known}")
    for track in tracks:
        try:
            rows.append(_lift_track(model, track, args))
        except InputError as error:                                             # one bad track does not cost the others
            if track is tracks[-1] and not rows:
                raise InputError(f"{args.keypoints}: person {track.person}: {error}") from None
            print(f"warning: person {track.person} left out: {error}", file=sys.stderr)
    skeleton, longest = data.SKELETONS["h36m17"], max(rows, key=lambda row: len(row["poses"]))
    if truth is not None and truth.shape != longest["poses"].shape:
        raise InputError(f"{args.truth}: poses {truth.shape}, lifted were {longest['poses'].shape}")
    result = {**{key: np.concatenate([row[key] for row in rows]) for key in longest}, "fps": np.array(args.fps), "joints":
              np.array(skeleton.joints), "edges": np.array(skeleton.edges), "source": np.array(
                  f"{args.keypoints} by {args.checkpoint} ({model.recipe.name})")}
    plain = lambda v: (v.astype(float).round(4) if v.dtype.kind == "f" else v).tolist()
    text = lambda: json.dumps({key: plain(value) for key, value in result.items()})
    data.write_atomically(args.out, lambda file: np.savez_compressed(file, **result) if args.out.lower().endswith(".npz") else
                          file.write(text().encode()))
    print(f"{len(result['poses'])} poses -> {args.out}")
    if args.truth:
        errors = [metric(torch.tensor(longest["poses"]), torch.tensor(truth)) for metric in (mpjpe, p_mpjpe)]
        print("against {}: MPJPE {:.1f} mm, P-MPJPE {:.1f} mm".format(args.truth, *errors))
    for path in args.plot:
        plot_poses(path, longest["keypoints"], longest["poses"], truth, args.fps / tracks[0].step, longest["frames"])
        print(f"person {longest['person'][0]} -> {path}")
    if args.benchmark:
        print(speed(model, longest["keypoints"], tuple(longest["size"][0]), args.flip))


def speed(model, pose_2d, size, flip=None):
    """A line that says how many frames a second `lift` and a Lifter take of 2D poses (T, 17, 2), on this machine."""
    lifter, pose_2d, rates = Lifter(model, size, "h36m", flip), np.resize(pose_2d, (300, 17, 2)), []
    for run in (lambda: lift(model, pose_2d, size, "h36m", flip), lambda: [lifter(frame) for frame in pose_2d]):
        run()
        started = time.perf_counter()
        run()
        rates.append(len(pose_2d) / (time.perf_counter() - started))
    return (f"frames a second: {rates[0]:.0f} as a whole, {rates[1]:.0f} one by one with a delay of {lifter.delay} frames; "
            f"{next(model.parameters()).device.type}, {torch.get_num_threads()} threads")


def export_command(argv):
    """python eval.py export CHECKPOINT --out model.pt2: a model for use without this project (torch.export, any batch size)."""
    parser = Parser(prog="eval.py export", description=export_command.__doc__)
    _checkpoint_options(parser)
    parser.add_argument("--out", default="model.pt2", metavar="FILE", help="ending in .pt2 (default: model.pt2)")
    args = parser.parse_args(argv)
    if not args.out.endswith(".pt2"):
        raise InputError(f"--out {args.out}: expected a name ending in .pt2")
    worst = export(_load(args), args.out)
    print(f"{args.out}: equals {args.checkpoint} within {worst:.1e} m on random input of batch 1, 2 and 5")


COMMANDS = {"inspect": inspect_command, "lift": lift_command, "export": export_command}


def main(argv=None):
    """Runs one of COMMANDS, or evaluates the checkpoint that the first argument names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        evaluate_command(argv)


if __name__ == "__main__":
    data.run(main)
