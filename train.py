"""Training: one recipe for each published row, the loop, resume, ablations, the main job.

    python train.py gridconv-synthetic                  # the embedded default, no data needed
    python train.py glagcn-gt-243 --data data --seed 1  # any field of a recipe is an option
    python train.py glagcn-gt-243 --help                # that recipe's own settings
    torchrun --nproc-per-node 4 train.py glagcn-gt-243  # several GPUs (or CPU processes)
    python train.py --list                              # recipes: row, figure, data here, size
    python train.py ablate gridconv-5 --data data       # the rows of one table, side by side
    python train.py report results                      # the table of every run in a folder
    python train.py reproduce --data data               # what bash reproduce.sh runs
    python train.py bench                               # the fast forms beside the papers'

A run's folder holds last.pt (the whole state: the same command goes on from there), best.pt (the
weights of the epoch that was best on the test set), model.pt (those of the last epoch), log.csv and
result.json. Same recipe, seed, machine and number of
threads: same numbers, bit for bit on the CPU, interrupted or not.
"""
import argparse
import contextlib
import copy
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import zlib
from configparser import ConfigParser
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import data  # before torch: it bounds how long OpenMP's threads spin

import torch
import torch.distributed as dist
from torch import nn

import eval as evaluation
import gridconv
from data import HUMANEVA_ACTIONS, InputError, make_store
from glagcn import GLAGCN, AdaptiveGraphConv, Refinement, mean_distance

# --------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """One training run, whole and flat. The comments are the help texts of the options."""

    name: str = ""  # its words say a published row's data and 2D: eval.compares
    row: str = ""  # the table row it reproduces, or what it is for
    paper_mpjpe: float = 0.0  # the paper's figure in mm; 0: none
    paper_p_mpjpe: float = 0.0  # the paper's figure after alignment in mm; 0: none
    paper_pck: float = 0.0  # the paper's PCK at 150 mm in %; 0: none
    paper_auc: float = 0.0  # the paper's AUC in %; 0: none
    ours: str = ""  # the settings that neither paper nor release gives
    weights: str = ""  # nothing is trained: the recipe whose weights are evaluated on this data
    # data
    data: str = "h36m"  # h36m, gridconv (its archives), humaneva, 3dhp, mocap or synthetic
    keypoints: str = "gt"  # the 2D: gt, hrnet, cpn_ft_h36m_dbb, ...
    skeleton: str = "h36m17"  # h36m17, h36m32, humaneva15 or 3dhp17
    skip: str = ""  # test sequences left out: gridconv (12 of S9 on detected 2D, as released)
    actions: tuple = HUMANEVA_ACTIONS  # of humaneva; the release has Box as well
    normalise: str = "release-500"  # of the 2D: release-500, width or longest
    cameras: str = "recorded"  # recorded, or random: every epoch others for each sequence
    noise: float = 0.0  # of the 2D: standard deviation as a fraction of the person's size
    missing: float = 0.0  # fraction of the 2D lost in gaps and filled by interpolation in time
    target: str = "camera"  # camera: root-relative metres; uvd: pixel u, v, depth (section sign)
    # model
    method: str = "gridconv"  # gridconv, gridconv-temporal, glagcn, fc (fully connected) or gcn
    dropout: float = 0.25
    layout: str = "released"  # handcrafted, released, random, row, column, global, autogrids, ...
    layout_seed: int = 0  # of the random layouts and shuffles
    grid: tuple = (5, 5)  # H,P
    hidden: int = 256
    blocks: int = 2
    kernel_sizes: tuple = (3, (3, 3), 3)  # expand,first:second,shrink (Table E)
    padding: tuple = ("circular", "replicate")  # a branch each; or vertical:horizontal
    attention: str = "grid"  # grid, channel, spatial, spatial+channel, or empty: vanilla GridConv
    temperature: float = 30.0  # of the attention's sigmoid
    anneal_epochs: float = 0.0  # in which the temperature falls to 1, as the release meant; 0: none
    noise_epochs: float = 30.0  # epochs with Gumbel noise in AutoGrids
    grid_lr: float = 1.0  # S_prob's learning rate, times the others'; 0: the grid stays frozen
    filter_widths: tuple = (3, 3, 3, 3, 3)  # T is their product
    channels: int = 96
    input_norm: bool = True  # batch norm of the input; HumanEva-I on detected 2D was without
    reconstruct: bool = False  # the 3D sequence head (Eq. 4) and stage one
    reconstruct_blocks: int = 3
    unshared_weight: float = 0.0  # lambda of Eq. 7
    causal: bool = False  # windows end with the frame that is predicted
    adaptive: bool = True  # no: ST-GCN, without C_k (Table 6)
    temporal: str = "stride"  # stride or mean (Table 6)
    head: str = "individual"  # individual or full (Table 6)
    normalisation: str = "column"  # of the adjacency: column (released) or symmetric (paper)
    swap_sides: bool = False  # left and right of the 2D exchanged, training and test (Table 6)
    head_scale: float = 1.0  # of the head's first weights; the release's start metres off
    # training
    loss: str = "mse"  # mse, grid (mse between grid poses) or mpjpe
    optimizer: str = "adam"  # adam, amsgrad or ranger
    lr: float = 1e-3
    schedule: str = "0.96/1"  # factor/epochs, cosine (an epoch a step), cosine-smooth, or 3dhp
    epochs: float = 100.0
    stage_one_epochs: float = 0.0  # with the global loss beside the local one (Eq. 4)
    refine: bool = False  # a refinement network in stage two: a second figure, with the true root
    batch: int = 200
    micro_batch: int = 0  # samples at a time, gradients accumulated to the batch; 0: all at once
    norm_schedule: bool = False  # batch norm's momentum falls (VideoPose3D, GLA-GCN)
    flips: bool = False  # every sample a second time per epoch, mirrored
    flip_test: bool = False  # average with the mirrored prediction
    jitter: bool = False  # targets' (x, y) rotated and scaled, as GLA-GCN's release does unsaid
    precision: str = "auto"  # auto (tf32 on CUDA, float32 elsewhere), float32, tf32 or bf16
    compile: bool = False  # torch.compile of the model, which takes minutes
    clip: float = 0.0  # largest gradient norm; 0: none
    deterministic: bool = False  # CUDA: the same bits every time, and slower; CPUs always do
    eval_every: int = 1  # epochs between evaluations; the last epoch always is
    seed: int = 0


# How a run is executed: named in the report, no settings, and may differ when it is resumed.
EXECUTION = ("precision", "micro_batch", "compile", "deterministic")
TEXTS = ("row", "ours", "paper_mpjpe", "paper_p_mpjpe", "paper_pck", "paper_auc")
FIGURES = ("mpjpe", "p_mpjpe", "pck", "auc")  # that a paper may give: mm, mm, %, %
JOINTS_32 = dict(skeleton="h36m32", grid=(7, 5))


def published_recipes():
    """{name: Recipe} of every published row."""
    recipes = {}

    def add(name, row, mpjpe=0.0, p_mpjpe=0.0, base=Recipe(), **fields):
        fields |= dict(name=name, row=row, paper_mpjpe=mpjpe, paper_p_mpjpe=p_mpjpe)
        recipes[name] = replace(base, **fields)
        return recipes[name]

    # GridConv (AAAI 2023): 100 epochs, batch 200, Adam 1e-3, dropout 0.25, temperature 30.
    fixed = dict(skip="gridconv", loss="grid")
    learnt = dict(skip="gridconv", layout="autogrids", schedule="0.96/10")
    zeros = dict(keypoints="hrnet", padding=("circular", "zeros"))
    gt = add("gridconv-gt", "GridConv Table 5, handcrafted, P1*", 37.1, **fixed)
    free = add("gridconv-gt-learnable", "GridConv Table 5, learnable, P1*", 36.4, **learnt)
    add("gridconv-hrnet", "GridConv Table 5, handcrafted, P1 / P2", 47.9, 37.9, **fixed, **zeros)
    hrnet = add("gridconv-hrnet-learnable", "GridConv Table 1 and A, P1 / P2", 47.6, 37.4,
                **learnt, **zeros)
    add("gridconv-gt-uvd", "GridConv Table 2 §, P1*", 29.5, base=free, target="uvd")
    add("gridconv-hrnet-uvd", "GridConv Table 1 and A §, P1 / P2", 46.3, 37.6, hrnet, target="uvd")
    add("gridconv-gt-vanilla", "GridConv Table 4, vanilla, P1*", 39.0, base=gt, attention="")
    for n, paper in enumerate((38.5, 38.2, 37.9, 37.8), 1):
        add(f"gridconv-gt-random-{n}", f"GridConv Table 5, random #{n}, P1*", paper, base=gt,
            layout="random", layout_seed=n, ours="the four random layouts")
    add("gridconv-gt-32", "GridConv Table 6, 32 joints handcrafted, P1*", 35.0, base=gt,
        layout="handcrafted", ours="the 7 x 5 layout", **JOINTS_32)
    add("gridconv-gt-32-learnable", "GridConv Table 6, 32 joints learnable, P1*", 33.4, base=free,
        ours="the 7 x 5 prior", **JOINTS_32)

    # Temporal GridConv (B.3): "the rest settings" are VideoPose3D's.
    dilated = Recipe(method="gridconv-temporal", hidden=512, filter_widths=(3, 3, 3), lr=1e-3,
                     normalise="width", loss="mpjpe", optimizer="amsgrad", schedule="0.95/1",
                     epochs=80.0, batch=1024, micro_batch=256, norm_schedule=True, flips=True,
                     flip_test=True, ours="VideoPose3D's training, the released layout and padding")
    cpn = dict(keypoints="cpn_ft_h36m_dbb")
    add("gridconv-temporal-gt", "GridConv Table C, T=27, P1* / P2*", 33.5, 24.7, dilated)
    add("gridconv-temporal-cpn", "GridConv Table C, CPN, T=27, P1 / P2", 44.3, 33.2, dilated,
        padding=("circular", "zeros"), **cpn)

    # GLA-GCN (ICCV 2023): 80 epochs, batch 512, Ranger 1e-2, cosine, flips.
    gla = Recipe(method="glagcn", normalise="width", dropout=0.1, loss="mpjpe", optimizer="ranger",
                 lr=1e-2, batch=512, schedule="cosine", epochs=80.0, norm_schedule=True,
                 flips=True, flip_test=True)
    short, longer = dict(filter_widths=(3, 3, 3)), dict(filter_widths=(3, 3, 3, 3))
    add("glagcn-gt-27", "GLA-GCN Table 5, T=27, P1*", 34.4, base=gla, **short)
    add("glagcn-gt-81", "GLA-GCN Table 5, T=81, P1*", 31.5, base=gla, **longer)
    add("glagcn-gt-243", "GLA-GCN Table 1 and 4, P1* / P2*", 28.5, 22.0, gla)
    add("glagcn-cpn-243", "GLA-GCN Table 1 and 4, CPN, P1 / P2", 44.4, 34.8, gla, **cpn)
    stages = dict(reconstruct=True, unshared_weight=0.5, stage_one_epochs=60.0, refine=True,
                  ours="lambda 0.5, stages of 60 and 20 epochs")
    add("glagcn-gt-243-reconstruct", "GLA-GCN Table 5, reconstruction, P1*", 24.5, base=gla,
        **stages)
    add("glagcn-gt-243-reconstruct-512", "GLA-GCN Table 1 and 4, C=512, P1* / P2*", 21.0, 17.6, gla,
        channels=512, micro_batch=64, **stages)
    eva = dict(data="humaneva", skeleton="humaneva15", epochs=1000.0, batch=256, eval_every=20)
    add("glagcn-humaneva-gt", "GLA-GCN Table 2, P2*", 0.0, 9.2, gla, **eva, **short)
    add("glagcn-humaneva-mrcnn", "GLA-GCN Table 2, MRCNN, twelve links, P2", 0.0, 15.4, gla,
        keypoints="detectron_pt_coco", input_norm=False, **eva, **short)

    # MPI-INF-3DHP: of its two stages only the losses are given; no intrinsics, so no refinement.
    gla = replace(gla, data="3dhp", skeleton="3dhp17", channels=256, optimizer="amsgrad", lr=1e-3,
                  schedule="3dhp", epochs=50.0, batch=256, norm_schedule=False, reconstruct=True,
                  unshared_weight=0.5, stage_one_epochs=38.0,
                  ours="lambda 0.5, stages of 38 and 12 epochs, losses in metres")
    add("glagcn-3dhp-27", "GLA-GCN Table 3, T=27", 31.36, base=gla, paper_pck=98.19,
        paper_auc=76.53, **short)
    add("glagcn-3dhp-81", "GLA-GCN Table 3, T=81", 27.76, base=gla, paper_pck=98.53,
        paper_auc=79.12, **longer)
    add("gridconv-3dhp-cross", "GridConv Table 3, trained on Human3.6M", 72.1, base=free,
        data="3dhp", weights=free.name, normalise="longest", paper_pck=89.2, paper_auc=57.6,
        ours="2D by the longest side, neck/nose = 3DHP's head, universal annotation")
    return recipes


def open_recipes():
    """{name: Recipe} on motion that anyone may hold: the open benchmark, any video, procedural."""
    grid = Recipe(data="mocap", layout="handcrafted", hidden=64, dropout=0.0, loss="mpjpe", lr=3e-3,
                  epochs=12.0, schedule="cosine-smooth", eval_every=4)
    gla = Recipe(data="mocap", method="glagcn", dropout=0.0, loss="mpjpe", lr=1.2e-2, batch=64,
                 epochs=4.0, schedule="cosine-smooth", channels=32, head_scale=0.1,
                 unshared_weight=1.0, filter_widths=(3, 3, 3))
    # other cameras, noise and gaps every epoch, mirrored bodies; these double an epoch
    wild = dict(normalise="longest", cameras="random", noise=0.01, missing=0.1, flips=True,
                flip_test=True)
    learnt = dict(layout="autogrids", noise_epochs=1.2)
    mocap, video, embedded = "open mocap benchmark", "lifting any video", "embedded default"
    rows = {"gridconv-mocap": (mocap, grid, {}),
            "gridconv-mocap-learnable": (mocap, grid, learnt),
            "glagcn-mocap": (mocap, gla, {}),
            "gridconv-wild": (video, grid, wild | dict(hidden=80, epochs=24.0)),
            "glagcn-wild": (video, gla, wild | dict(channels=48, epochs=5.0, eval_every=1))}
    # both methods in minutes on two CPU cores
    tiny = dict(data="synthetic", eval_every=1)
    grid = replace(grid, hidden=32, batch=64, epochs=3.0, lr=6e-3, **tiny)
    gla = replace(gla, channels=24, epochs=2.0, filter_widths=(3, 3), **tiny)
    learnt = dict(layout="autogrids", noise_epochs=0.3, grid_lr=0.5)
    rows |= {"gridconv-synthetic": (embedded, grid, {}),
             "gridconv-synthetic-learnable": (embedded, grid, learnt),
             "glagcn-synthetic": (embedded, gla, {})}
    return {name: replace(base, name=name, row=row, ours="everything but the network", **fields)
            for name, (row, base, fields) in rows.items()}


RECIPES = published_recipes() | open_recipes()

WORDS = {
    "loss": ("mse", "grid", "mpjpe"), "precision": ("auto", "float32", "tf32", "bf16"),
    "target": ("camera", "uvd"), "skip": ("", "gridconv"), "cameras": ("recorded", "random"),
    "optimizer": ("adam", "amsgrad", "ranger")}
RANGES = {
    "epochs": (1e-9, 1e9), "batch": (2, 1e9), "eval_every": (1, 1e9), "hidden": (1, 1e9),
    "channels": (1, 1e9), "noise": (0, 1), "missing": (0, 0.9), "dropout": (0, 1),
    "lr": (0, 1e31), "seed": (0, 2 ** 40), "layout_seed": (0, 2 ** 40)}
SHAPES = {"grid": "n, n", "kernel_sizes": r"n, \(n, n\), n", "filter_widths": "n(, n)*,?"}


def check_recipe(recipe):
    """InputError for settings of a training that cannot be meant; a model refuses its own."""
    for name, value in vars(recipe).items():
        if value not in WORDS.get(name, [value]):
            raise InputError(f"{name}: unknown {value!r}, one of {WORDS[name]} expected")
        low, high = RANGES.get(name, (0, 1e9))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise InputError(f"{name}: {value!r}, a number from {low:g} to {high:g}")
        if name in SHAPES and not re.fullmatch(SHAPES[name], re.sub(r"\d+", "n", str(value)[1:-1])):
            raise InputError(f"{name}: {value!r}, as in {getattr(Recipe, name)} expected")
    for name in ("norm_schedule", "reconstruct", "refine"):
        if getattr(recipe, name) and not read_by(recipe.method, name):
            raise InputError(f"{name}: not of method {recipe.method}")
    learning_rate(recipe, 0)  # refuses an unknown schedule
    if recipe.micro_batch == 1:
        raise InputError("micro_batch: 1; 0 or at least 2 for batch norm")
    if recipe.loss == "grid" and recipe.method != "gridconv":
        raise InputError("loss: 'grid' needs a grid, so method gridconv")
    stage_one = recipe.stage_one_epochs
    fits = 0 < stage_one < recipe.epochs if recipe.reconstruct else stage_one == 0
    if not fits:
        raise InputError(f"stage_one_epochs: {stage_one:g}; part of the epochs with reconstruct, 0 "
                         "without it expected")
    joints = recipe.target == "camera" and recipe.loss != "grid" and not recipe.swap_sides
    if recipe.refine and (recipe.data in ("humaneva", "3dhp") or not joints):
        raise InputError("refine: needs intrinsics, which humaneva and 3dhp lack, and a loss on "
                         "joints in the camera frame, of their own sides")


def settings(recipe):
    """What decides a run's numbers, of a Recipe or its stored fields: {field: value as JSON's}."""
    stored = recipe if isinstance(recipe, dict) else vars(recipe)
    kept = {field.name: stored.get(field.name, field.default) for field in fields(Recipe)}
    return {name: value for name, value in json.loads(json.dumps(kept)).items()
            if name not in EXECUTION + TEXTS}


def settings_changed(recipe):
    """How a recipe differs from the published one: "epochs 10.0 (published: 100.0)", ..."""
    published = settings(RECIPES.get(recipe.name, recipe))
    return ", ".join(f"{name} {value} (published: {published[name]})"
                     for name, value in settings(recipe).items()
                     if name != "seed" and value != published[name])


def parameters(recipe):
    """The number of parameters that a recipe trains, the refinement network's among them."""
    with torch.device("meta"):
        modules = [evaluation.build_model(recipe)]
        if recipe.refine:
            modules.append(Refinement(modules[0].num_joints))
    return sum(p.numel() for module in modules for p in module.parameters())


def samples_at_once(recipe):
    """The samples of a forward pass."""
    return min(recipe.micro_batch or recipe.batch, recipe.batch)


def memory(recipe, precision, at_once):
    """About how many GiB a training step takes: an estimate, from counts without a GPU (docs)."""
    sample = 1.25e-5 * recipe.hidden
    if recipe.method == "glagcn":
        sample = 2.4e-6 * recipe.channels * math.prod(recipe.filter_widths)
    if recipe.reconstruct:
        sample *= 1.8
    if precision == "bf16":
        sample *= 0.52
    return 16 * parameters(recipe) / 2 ** 30 + sample * at_once  # weights, gradients, two moments


def out_of_memory(recipe, precision, device):
    """The line that says what would fit where a step did not."""
    at_once = samples_at_once(recipe)
    room = memory(recipe, precision, at_once)
    if device.type == "cuda":
        room = min(room, torch.cuda.get_device_properties(device).total_memory / 2 ** 30)
    tries = []
    for kind in dict.fromkeys((precision, "bf16")):
        fits = at_once
        while fits > 2 and memory(recipe, kind, fits) > 0.75 * room:
            fits = max(2, fits // 2)  # batch norm cannot take a single one
        tries.append(f"--precision {kind} --micro-batch {fits}")
    return (f"{recipe.name}: out of memory with {at_once} samples at once in {precision}; try "
            f"{' or '.join(tries)} (about {0.75 * room:.1f} GiB); what was saved is kept")


# --------------------------------------------------------------------------------------------------
# Optimisers and schedules


class Ranger(torch.optim.RAdam):
    """RAdam with Lookahead (k = 6, alpha = 0.5), as GLA-GCN's release sets it.

    Betas 0.95 and 0.999, eps 1e-5, no weight decay, no gradient centralisation. After every sixth
    step the slow weights move halfway to the fast ones, which then continue from there.
    """

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, betas=(0.95, 0.999), eps=1e-5)

    def step(self, closure=None):
        """One step; a `closure` computes the loss anew, as torch's optimisers take one."""
        params = [p for group in self.param_groups for p in group["params"]]
        start = {p: p.detach().clone() for p in params if p not in self.state}
        loss = super().step(closure)
        stepped = [p for p in params if p in self.state]
        for p in start.keys() & {*stepped}:
            self.state[p]["slow"] = start[p]
        due = [p for p in stepped if self.state[p]["step"] % 6 == 0]
        if due:
            with torch.no_grad():
                slow = [self.state[p]["slow"] for p in due]
                torch._foreach_lerp_(slow, due, 0.5)
                torch._foreach_copy_(due, slow)
        return loss


ranger = Ranger  # ranger(params, lr)


def make_optimizer(recipe, *modules):
    """The recipe's optimiser over the modules' parameters; S_prob has a rate of its own."""
    named = [pair for module in modules for pair in module.named_parameters()]
    weights = [p for name, p in named if not name.endswith("s_prob")]
    s_prob = [p for name, p in named if name.endswith("s_prob")]
    scaled = ((weights, 1.0), (s_prob, recipe.grid_lr))
    groups = [{"params": params, "scale": scale} for params, scale in scaled if params]
    if recipe.optimizer == "ranger":
        return ranger(groups, recipe.lr)
    fused = weights[0].is_cuda or None  # one kernel for all; None: what torch does by itself
    return torch.optim.Adam(groups, recipe.lr, amsgrad=recipe.optimizer == "amsgrad", fused=fused)


def learning_rate(recipe, epoch):
    """The learning rate after `epoch` epochs (a fraction within one).

    "F/N": times F every N epochs (GridConv, A.3). "cosine": to 1e-5 over the run, an epoch a step
    (GLA-GCN's release). "cosine-smooth": to 0, every step. "3dhp": times 0.95 an epoch, 0.5 instead
    on every fifth (GLA-GCN's 3DHP script).
    """
    whole = int(epoch)
    if recipe.schedule == "cosine":
        return 1e-5 + (recipe.lr - 1e-5) * (1 + math.cos(math.pi * whole / recipe.epochs)) / 2
    if recipe.schedule == "cosine-smooth":
        return recipe.lr * (1 + math.cos(math.pi * min(epoch / recipe.epochs, 1))) / 2
    if recipe.schedule == "3dhp":
        return recipe.lr * 0.95 ** (whole - whole // 5) * 0.5 ** (whole // 5)
    steps = re.fullmatch(r"([0-9]*\.?[0-9]+)/(0*[1-9][0-9]*)", recipe.schedule)
    if steps:
        return recipe.lr * float(steps[1]) ** (whole // int(steps[2]))
    raise InputError(f"schedule: unknown {recipe.schedule!r}, FACTOR/EPOCHS, cosine, cosine-smooth "
                     "or 3dhp expected")


def norm_momentum(epoch, epochs):
    """GLA-GCN's batch-norm momentum in an epoch from 0 on: 0.1 exp(-epoch / epochs ln 100)."""
    return 0.1 * math.exp(-epoch / epochs * math.log(100))


# --------------------------------------------------------------------------------------------------
# The loss of a batch


class Objective(nn.Module):
    """The loss of some samples as one module, which DistributedDataParallel can wrap.

    `forward(samples, stage_one)`: numbers as in `epoch_order`. Only the model is ever compiled.
    """

    def __init__(self, model, refinement, store, recipe):
        super().__init__()
        self.model, self.refinement, self.store, self.recipe = model, refinement, store, recipe
        self.network = model.forward_grid if recipe.loss == "grid" else model.forward
        if recipe.compile:
            self.network = torch.compile(self.network)

    def forward(self, samples, stage_one=False):
        store = self.store
        flip = samples >= len(store) if self.recipe.flips else None
        index = samples % len(store)
        loss, prediction = self.loss_of(index, flip, stage_one)
        if self.recipe.refine and not stage_one:
            # Detached: the figure without it stays what it was. It re-projects with the true root
            # positions and the intrinsics, so mirrored predictions are mirrored back first.
            prediction = prediction.detach()
            if flip is not None:
                mirrored = store.mirrored(prediction)
                prediction = torch.where(flip[:, None, None], mirrored, prediction)
            intrinsics = store.normalised_intrinsics(index)
            better = self.refinement(prediction, store.input[index], intrinsics, store.root[index])
            loss = loss + mean_distance(better, store.pose_3d[index])
        return loss

    def loss_of(self, index, flip, stage_one=False):
        """The recipe's loss for the frames `index` (B,), those with `flip` mirrored; the poses."""
        model, recipe = self.model, self.recipe
        T, causal = model.receptive_field, getattr(model, "causal", False)
        pose, target = self.store.batch(index, T, causal, flip, all_targets=stage_one)
        if recipe.jitter:
            target = jitter(target)
        if recipe.loss == "grid":  # as released with a handcrafted layout: both sides on the grid
            S, shape = model.assignment(), model.grid_shape
            grid = self.run_network(gridconv.sgt(pose, S, shape))
            return (grid - gridconv.sgt(target, S, shape)).square().mean(), None
        if stage_one:  # global plus local loss (GLA-GCN section 3.2), on whole sequences
            local, sequence = self.run_network(pose, return_sequence=True)
            return mean_distance(local, target[:, T // 2]) + mean_distance(sequence, target), local
        prediction = self.run_network(pose)
        if recipe.loss == "mse":  # GridConv Eq. 10
            return (prediction - target).square().mean(), prediction
        return mean_distance(prediction, target), prediction

    def run_network(self, x, **options):
        """The model in the recipe's precision; coordinates and losses stay outside autocast."""
        half = self.recipe.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return self.network(x, **options)


def jitter(target):
    """GLA-GCN's release in training: (x, y) of each target (B, [T,] J, 3) turned by -5, 0 or 5
    degrees about the optical axis and scaled by 0.95, 1 or 1.05, the nine alike; z stays."""
    shape = (2, len(target), *[1] * (target.ndim - 2))
    angle, scale = torch.randint(3, shape, device=target.device) - 1
    angle, scale = angle * math.radians(5), 1 + 0.05 * scale
    x, y, z = target.unbind(-1)
    turned = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    return torch.stack([scale * turned[0], scale * turned[1], z], -1)


def epoch_order(recipe, frames, epoch):
    """The samples of an epoch in order, a function of seed and epoch alone: a resumed run sees the
    same. With flips there are two samples a frame: number >= frames is the mirrored one."""
    generator = torch.Generator().manual_seed(recipe.seed * 100003 + epoch)
    return torch.randperm(2 * frames if recipe.flips else frames, generator=generator)


def batches(order, size, least=2):
    """The samples in batches; the last partial one is kept, but fewer than `least` left-over
    samples (batch norm cannot take a single one) join the batch before them."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) < least:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


# --------------------------------------------------------------------------------------------------
# A run

SAVE_SECONDS = 600  # at most this much work is lost to a crash
AGREE_STEPS = 10  # several processes agree on stopping and saving once in so many steps


class Run:
    """One training run: its model, what drives it, and all that resuming needs."""

    def __init__(self, recipe, store, out, device, trained_on="", data_print=(), rank=0, world=1):
        if recipe.batch < 2 * world:
            raise InputError(f"batch: {recipe.batch} for {world} processes, 2 each at least")
        if recipe.compile and world > 1 and device.type == "cuda":
            raise InputError("compile: faulty in torch on several GPUs; use one")
        self.recipe, self.store, self.out, self.device = recipe, store, Path(out), device
        self.trained_on, self.data_print = trained_on, list(data_print)
        self.rank, self.world = rank, world
        torch.manual_seed(recipe.seed)
        self.model = evaluation.build_model(recipe).to(device)
        if recipe.method == "glagcn":
            for weight in self.model.head.parameters():
                weight.data *= recipe.head_scale
        self.refinement = nn.Module()
        if recipe.refine:
            self.refinement = Refinement(self.model.num_joints).to(device)
        self.optimizer = make_optimizer(recipe, self.model, self.refinement)
        self.objective = Objective(self.model, self.refinement, store, recipe)
        self.step_loss = self.objective  # or that wrapped for several processes
        self.stage_one = None
        if rank:  # noise of its own; the first process's is that of a single one
            torch.manual_seed(recipe.seed + (rank << 41))

        self.epoch_steps = len(self.batches(epoch_order(recipe, len(store), 0)))
        self.total_steps = max(1, round(recipe.epochs * self.epoch_steps))
        self.epochs = math.ceil(self.total_steps / self.epoch_steps)
        self.step = 0  # optimiser steps done
        self.losses = torch.zeros(self.epoch_steps, device=device)  # of this epoch
        self.history, self.best, self.last, self.seconds = [], None, None, 0.0

    def batches(self, order):
        """The samples of an epoch in batches, of which every process takes its share."""
        return batches(order, self.recipe.batch, 2 * self.world)

    def agreed(self, *values):
        """The largest of each number over all processes, so that all stop after the same step."""
        if self.world == 1:
            return values
        values = torch.tensor([int(value) for value in values])
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def begin_epoch(self, epoch):
        """What changes between epochs: random cameras and batch-norm momentum."""
        recipe = self.recipe
        self.store.redraw(2 * (recipe.seed * 100003 + epoch))  # even: test sets have an odd number
        if recipe.norm_schedule:
            for norm in self.model.scheduled_norms():
                norm.momentum = norm_momentum(epoch, recipe.epochs)
            if recipe.compile:
                torch.compiler.reset()  # to it a momentum is a constant: it compiles once an epoch
        self.objective.train()

    def reach(self, epoch):
        """What changes at a step, `epoch` (a fraction within one) into the run: learning rate,
        AutoGrids' noise, stage two's frozen head."""
        recipe, model = self.recipe, self.model
        rate = learning_rate(recipe, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * rate
        if recipe.anneal_epochs:
            model.temperature = 1 + 29 * max(0.0, 1 - epoch / recipe.anneal_epochs)
        if getattr(model, "autogrids", None) is not None:
            model.autogrids.noise = epoch < recipe.noise_epochs
        before = self.stage_one
        self.stage_one = recipe.reconstruct and epoch < recipe.stage_one_epochs
        if self.stage_one == before:
            return
        if recipe.reconstruct:
            model.sequence_head.requires_grad_(self.stage_one)
        self.refinement.requires_grad_(not self.stage_one)
        if self.world > 1:  # made anew: it waits for every gradient that was wanted then
            self.step_loss = nn.parallel.DistributedDataParallel(
                self.objective, broadcast_buffers=False)

    def train_step(self, chunk):
        """One optimiser step on the samples `chunk`, of which this process takes its share; the
        loss of all goes to self.losses."""
        self.reach(self.step / self.epoch_steps)
        share = chunk.tensor_split(self.world)[self.rank]
        total = torch.zeros((), device=self.device)
        parts = batches(share, self.recipe.micro_batch or len(share))  # in another process fewer
        for part in parts:
            alone = self.world > 1 and part is not parts[-1]  # gradients are exchanged once a step
            with self.step_loss.no_sync() if alone else contextlib.nullcontext():
                loss = self.step_loss(part, self.stage_one) * (len(part) / len(chunk))
                (loss * self.world).backward()  # of which several processes take the mean
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses[self.step % self.epoch_steps] = total
        self.step += 1

    def check_finite(self):
        """InputError, naming the first step, where losses of this epoch or weights are not."""
        first = (self.step - 1) // self.epoch_steps * self.epoch_steps
        finite = self.losses[:self.step - first].isfinite().tolist()
        whole = all(p.isfinite().all() for p in self.objective.parameters())
        if not all(finite) or not whole:
            step = self.step if all(finite) else first + finite.index(False) + 1
            raise InputError(f"the loss of step {step} or what it made of the weights is not "
                             f"finite: stopped, {self.out} holds what was saved before; a smaller "
                             "--lr or --clip 1 may help")

    def weights(self, epoch):
        """What eval.load_model reads."""
        return {"format": "poselift", "version": 1, "recipe": asdict(self.recipe),
                "data": self.trained_on, "model": self.model.state_dict(), "epoch": epoch,
                "temperature": getattr(self.model, "temperature", None),
                "refinement": self.refinement.state_dict()}

    def save(self, stop=0):
        """last.pt, written whole or not at all; SystemExit after the signal `stop`."""
        random = [torch.get_rng_state(), None]
        if self.device.type == "cuda":
            random[1] = torch.cuda.get_rng_state(self.device)
        everyones = [random] * self.world
        if self.world > 1:
            dist.all_gather_object(everyones, random)
        if self.rank == 0:
            kept = ("data_print", "step", "losses", "history", "best", "last", "seconds")
            state = {name: getattr(self, name) for name in kept}
            state |= self.weights(self.step / self.epoch_steps)
            state |= {"optimizer": self.optimizer.state_dict(), "random": everyones}
            write_torch(self.out / "last.pt", state)
        if stop:
            name = signal.Signals(stop).name
            print(f"{self.out}: saved after {name}; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + stop)

    def resume(self, state):
        """Continue from a stored state. InputError: of another recipe or data, or no state."""
        path, remedy = self.out / "last.pt", "remove it, or give another --out"
        if not isinstance(state, dict) or "data_print" not in state:
            raise InputError(f"{path}: not the state of a run; {remedy}")
        theirs = settings(state["recipe"])
        theirs |= {"processes": len(state["random"]), "frames": state["data_print"]}
        ours = settings(self.recipe) | {"processes": self.world, "frames": self.data_print}
        differ = [f"{name} {theirs[name]!r} there, {value!r} here"
                  for name, value in ours.items() if theirs[name] != value]
        if differ:
            raise InputError(f"{path}: of another run ({'; '.join(differ[:3])}); {remedy}")
        self.model.load_state_dict(state["model"])
        self.refinement.load_state_dict(state["refinement"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.copy_(state["losses"])
        for name in ("step", "history", "best", "last", "seconds"):
            setattr(self, name, state[name])
        self.reach(max(0, self.step - 1) / self.epoch_steps)  # the temperature of the last step
        random, random_cuda = state["random"][self.rank]
        torch.set_rng_state(random)
        if random_cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random_cuda, self.device)


def write_torch(path, content):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writer ends a full disk in an error without a name
    torch.save(content, buffer)
    data.write_atomically(path, lambda file: file.write(buffer.getbuffer()))


@contextlib.contextmanager
def locked(out):
    """Hold a folder for one run, without what a killed process was writing.

    InputError where another live process holds it; a crash lets go of it by itself."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a")  # a file of the user's keeps its content
        lock(file)
    except OSError as error:
        raise InputError(f"{out}: another run is writing there, or it cannot be written "
                         f"({error.strerror}); wait, or choose another --out") from None
    with file:
        for name in ("last.pt", "best.pt", "model.pt", "log.csv", "result.json"):
            for leftover in out.glob(f".{name}.*.tmp"):  # of write_atomically
                leftover.unlink()
        yield


def lock(file):
    """Lock a file by what the platform has, until it is closed; OSError: another process does."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        import msvcrt
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


@contextlib.contextmanager
def signals():
    """[0, and the SIGINTs and SIGTERMs that came while this is entered]: they end nothing."""
    caught = [0]

    def catch(number, _):
        caught.append(number)
        print("\nstopping after this step or evaluation", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# The loop


def train(recipe, folder="data", out=None, device=None, quiet=False):
    """Train a recipe on the data in `folder`, continuing what `out` holds; the result as a dict.

    The result (also out/result.json): recipe, data, frames, parameters, the last and the best
    epoch's scores on the test set, the yardsticks, seconds, seed, versions, device and how it ran.
    SIGINT and SIGTERM finish the step or evaluation, save, and raise SystemExit(128 + signal).
    Under torchrun the processes share each batch; the first evaluates,
    writes and returns the result, the others None.
    InputError: missing or broken data, an impossible recipe, a folder with another run, a loss that
    is not finite, a step that does not fit the memory.
    """
    check_recipe(recipe)
    out = Path(out or Path("results") / recipe.name)
    device, precision = evaluation.pick_device(device, recipe.precision)
    if recipe.deterministic:  # an operation without a deterministic form is an error then
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when first used
    torch.use_deterministic_algorithms(recipe.deterministic)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not recipe.deterministic
    with signals() as caught, processes(device) as (rank, world):
        try:
            with locked(out) if rank == 0 else contextlib.nullcontext():  # one process writes
                run, stores = prepare(recipe, folder, out, device, rank, world)
                try:
                    fit(run, stores["test"], caught, quiet or rank > 0)
                finally:
                    run.step_loss = None  # see `processes`
                return finish(run, stores, precision, folder) if rank == 0 else None
        except torch.OutOfMemoryError:
            raise InputError(out_of_memory(recipe, precision, device)) from None


@contextlib.contextmanager
def processes(device):
    """(this process's rank, their number): joined under torchrun, (0, 1) without it.

    What holds the group must be gone at the end: a DistributedDataParallel that outlives it frees
    it with Python's lock held, which torch's own threads may be waiting for (seen in torch 2.13).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # others wait for evaluations
    try:
        yield dist.get_rank(), dist.get_world_size()
        dist.barrier()  # who leaves first would break the others' connections
    finally:
        dist.destroy_process_group()


def prepare(recipe, folder, out, device, rank, world):
    """(a Run, continued from what `out` holds, {"train", "test": its FrameStore})."""
    stores, data_print = {}, []  # frames and checksum: a run is continued on the same data only
    for split in ("train", "test"):
        store = stores[split] = make_store(recipe, folder, split, device)
        values = torch.cat([store.input.flatten(), store.target.flatten()]).cpu()
        data_print.append([split, len(store), zlib.crc32(values.numpy())])
    trained_on = data.provenance(stores["train"].sequences)
    run = Run(recipe, stores["train"], out, device, trained_on, data_print, rank, world)
    if (out / "last.pt").exists():
        run.resume(data.read_torch(out / "last.pt", "remove it to begin anew"))
    return run, stores


def fit(run, test_store, caught, quiet):
    """Train the epochs that are left, score them, save; SystemExit after a signal `caught`."""
    saved, progress = time.monotonic(), Progress(run, quiet)
    while len(run.history) < run.epochs:  # a line of the log ends an epoch
        epoch = len(run.history)
        first = epoch * run.epoch_steps
        last = min(first + run.epoch_steps, run.total_steps)
        run.begin_epoch(epoch)
        order = epoch_order(run.recipe, len(run.store), epoch).to(run.device)
        started = time.perf_counter()
        for chunk in run.batches(order)[run.step - first:last - first]:
            run.train_step(chunk)
            progress.show()
            if run.world > 1 and run.step % AGREE_STEPS and run.step < last:
                continue
            stop, due = run.agreed(caught[-1], time.monotonic() - saved > SAVE_SECONDS)
            if stop or due or run.step == last:
                run.check_finite()
                run.seconds += time.perf_counter() - started
                run.save(stop)  # at an epoch's end too: its evaluation may take long
                saved, started = time.monotonic(), time.perf_counter()
        end_epoch(run, test_store, last - first, progress)
        run.save(*run.agreed(caught[-1]))


def end_epoch(run, test_store, steps, progress):
    """Score the epoch where it is due, keep the best weights, add a line to the log."""
    recipe, epoch = run.recipe, math.ceil(run.step / run.epoch_steps)
    row = {"epoch": epoch, "loss": run.losses[:steps].mean().item(), "mpjpe": None, "p_mpjpe": None,
           "lr": run.optimizer.param_groups[0]["lr"], "seconds": round(run.seconds, 1)}
    if run.rank == 0 and (epoch % recipe.eval_every == 0 or run.step == run.total_steps):
        scores = evaluation.evaluate(run.model, test_store, flip=recipe.flip_test)
        run.last = {"epoch": epoch, **scores}
        row |= {name: scores[name] for name in ("mpjpe", "p_mpjpe")}
        if run.best is None or scores["mpjpe"] < run.best["mpjpe"]:
            run.best = run.last
            write_torch(run.out / "best.pt", run.weights(epoch))
    run.history.append(row)
    if run.rank == 0:
        lines = [row.keys(), *(line.values() for line in run.history)]
        text = "\n".join(",".join(map(str, line)) for line in lines)
        data.write_text(run.out / "log.csv", text.replace("None", "") + "\n")  # empty: not scored
        progress.show(row)


def finish(run, stores, precision, folder):
    """The result of a finished run, also stored: what was trained on what, its scores, how."""
    recipe, test_store = run.recipe, stores["test"]
    write_torch(run.out / "model.pt", run.weights(len(run.history)))
    test_data = data.provenance(test_store.sequences)
    result = {
        "recipe": asdict(recipe), "data": run.trained_on, "test_data": test_data,
        "compares": evaluation.compares(recipe, test_data, run.trained_on),
        "settings_changed": settings_changed(recipe), "parameters": parameters(recipe),
        "epochs": run.step / run.epoch_steps, "seconds": run.seconds, "seed": recipe.seed,
        "commit": commit(), "torch": torch.__version__, "python": sys.version.split()[0],
        "device": f"{run.world} x {evaluation.device_name(run.device)}", "precision": precision,
        "train_frames": len(stores["train"]), "test_frames": int(test_store.valid.sum()),
        "last": run.last, "best": run.best, "autogrids": evaluation.learnt_grid(run.model),
        "yardsticks": evaluation.yardsticks(stores["train"], test_store),
        "files": files_read(recipe, folder)}
    if recipe.refine:
        result["refined"] = evaluation.evaluate(run.model, test_store, flip=recipe.flip_test,
                                                refinement=run.refinement.eval())
    data.write_text(run.out / "result.json", json.dumps(result, indent=1))
    return result


def commit():
    """The commit of this program, or nothing where git or the history is missing."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        here = Path(__file__).parent
        return subprocess.run(words, capture_output=True, text=True, cwd=here).stdout.strip()
    return ""


def files_read(recipe, folder):
    """Name, size and time of the files of a recipe's data: whether it is still the same data."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns]
            for path in data.files_of(recipe, folder) if path.exists()]


class Progress:
    """How far a run is: a line on stderr every 15 seconds, and one at the end of each epoch."""

    def __init__(self, run, quiet):
        self.run, self.quiet, self.first = run, quiet, run.step
        self.started = self.shown = time.perf_counter()

    def show(self, row=None):
        """After a step, if a line is due; after an epoch, with its row of the log."""
        run, now = self.run, time.perf_counter()
        if self.quiet or row is None and now - self.shown < 15:
            return
        self.shown = now
        done = (run.step - 1) % run.epoch_steps + 1
        loss = row["loss"] if row else run.losses[max(0, done - 50):done].mean().item()
        rate = max(run.step - self.first, 1) / (now - self.started)  # evaluation included
        line = (f"{run.recipe.name}  epoch {run.step / run.epoch_steps:.1f} of "
                f"{run.recipe.epochs:g}  loss {loss:.4f}  {rate * run.recipe.batch:.0f} poses/s  "
                f"{(run.total_steps - run.step) / rate / 60:.1f} min left")
        if row and row["mpjpe"] is not None:
            line += f"  MPJPE {row['mpjpe']:.1f} mm  P-MPJPE {row['p_mpjpe']:.1f} mm"
        print(line, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Speed: each fast form beside the paper's, in one run


def by_reference(model):
    """A copy of the model whose layers compute as the papers write them."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, (gridconv.GridConv, AdaptiveGraphConv)):
            layer.forward = layer.reference
    return model


def clock(call, device, times=1):
    """Milliseconds of a call, over so many in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    started = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return 1000 * (time.perf_counter() - started) / times


def bench(device=None):
    """Print how much faster the fast forms are than the papers', side by side on this machine."""
    device, precision = evaluation.pick_device(device)
    torch.manual_seed(0)
    print(f"{evaluation.device_name(device)}, torch {torch.__version__}, {precision}\n")
    small, large = (gridconv.GridLiftingNetwork(hidden=hidden) for hidden in (64, 256))
    gla = GLAGCN(filter_widths=(3, 3, 3), dropout=0.0)  # random numbers cost both the same
    plan = {"D-GridConv layer, C = 256": (large.blocks[0][0].conv, (200, 256, 5, 5)),
            "GridConv, batch 200, C = 64": (small, (200, 17, 2)),
            "GridConv, batch 200, C = 256": (large, (200, 17, 2)),
            "GLA-GCN, batch 64, C = 96, T = 27": (gla, (64, 27, 17, 2))}

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(model, _, x):
        model.eval()(x)

    rows = []
    for name, (model, shape) in plan.items():
        x = torch.randn(shape, device=device)
        if "layer" in name:  # features, which are in channels_last
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        forms = [(form, torch.optim.Adam(form.parameters()), x)
                 for form in (model.to(device), by_reference(model))]
        for what, call in (("training step", step), ("evaluation", evaluate)):
            times = [[clock(lambda: call(*form), device) for form in forms] for _ in range(8)][1:]
            ratio = statistics.median(slow / fast for fast, slow in times)
            medians = [f"{statistics.median(column):.1f}" for column in zip(*times)]
            rows.append([f"{name}: {what}", f"{ratio:.2f}x", *medians])
    print(evaluation.markdown(["what", "ratio", "ms", "the paper's form, ms"], rows))


FULL_SIZE = ("gridconv-gt", "glagcn-gt-27", "glagcn-gt-243", "glagcn-gt-243-reconstruct")


def bench_full_size(device=None, only=""):
    """Print ms a step, hours a run and peak memory of published rows at Human3.6M's size, from a
    few steps timed here: each precision, compiled or not, and the paper's form. Of a recipe with
    two stages the first's."""
    device, _ = evaluation.pick_device(device)
    frames, motion = data.H36M_FRAMES["train"][0], data.synthesize(0)
    motion *= math.ceil(frames / sum(len(s.pose_3d) for s in motion))
    print(f"{evaluation.device_name(device)}, torch {torch.__version__}, as much as Human3.6M\n")
    print(f"| recipe | batch | how | ms a step | hours a run | peak GiB |\n|{'---|' * 6}")
    precisions, forms = ("float32", "tf32", "bf16"), ("", "compiled", "the paper's form")
    if device.type == "cpu":
        precisions, forms = ("float32",), ("", "the paper's form")
    for name, precision, form in itertools.product(only.split(","), precisions, forms):
        recipe = replace(known_recipe(name), precision=precision, compile=form == "compiled")
        store = data.FrameStore(motion, recipe.normalise, data.SKELETONS["h36m17"], device)
        evaluation.pick_device(str(device), precision)
        run = Run(replace(recipe, epochs=1.0, stage_one_epochs=1.0), store, ".", device)
        if form == "the paper's form":
            run.model = by_reference(run.model)
            run.step_loss = Objective(run.model, run.refinement, store, recipe).train()
        run.begin_epoch(0)
        chunks = iter(run.batches(epoch_order(recipe, len(store), 0).to(device)))
        figures, peak = "out of memory | -", math.nan
        with contextlib.suppress(torch.OutOfMemoryError):
            clock(lambda: run.train_step(next(chunks)), device, 3)
            ms = clock(lambda: run.train_step(next(chunks)), device, 20)
            figures = f"{ms:,.1f} | {ms * run.epoch_steps * recipe.epochs / 3.6e6:,.2f}"  # hours
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2 ** 30
            torch.cuda.reset_peak_memory_stats(device)
        print(f"| {name} | {recipe.batch} | {precision} {form} | {figures} | {peak:.1f} |",
              flush=True)


# --------------------------------------------------------------------------------------------------
# Ablations: the rows of one table, trained alike


# {table: (base recipe, what the papers' figures are, {row: (paper's figure, fields)})}. Here
# noise_epochs is a fraction of the run; stage one is three quarters of it.
VANILLA, ONE, TWO = dict(attention=""), dict(padding=("circular",)), dict(padding=("replicate",))
LOGITS = dict(layout="autogrids-random", noise_epochs=0.0, grid_lr=3.0)
ABLATIONS = {
    # 0.33 M each, each at the rate of the lowest training error (docs/results.md)
    "lifters": ("gridconv-mocap", "P1*, Tables 4 and 5, of 4.8 M parameters", {
        "fully connected": (None, dict(method="fc", hidden=272)),
        "graph convolution": (None, dict(method="gcn", hidden=285, lr=3e-2)),
        "vanilla GridConv": (39.0, VANILLA | dict(lr=1e-2)),
        "D-GridConv": (37.1, dict(lr=1e-2))}),
    "gridconv-5": ("gridconv-mocap", "P1*, Table 5", {
        "random": (38.1, dict(layout="random")),  # the mean of four
        "handcrafted": (37.1, {}),
        "learnable": (36.4, dict(layout="autogrids", noise_epochs=2 / 7)),  # about 30 of 100
        "learnable, no noise, rate 0.45": (None, dict(layout="autogrids", grid_lr=0.45)),
        "learnable from random logits": (None, LOGITS)}),
    "gridconv-D-attention": ("gridconv-mocap", "P1*, Tables D and 4", {
        "#1": (40.8, VANILLA | ONE),
        "#1, attention": (None, ONE),
        "#2": (42.3, VANILLA | TWO),
        "#2, attention": (None, TWO),
        "#1+#2": (39.0, VANILLA),
        "#1+#2, attention": (37.1, {})}),
    "glagcn-reconstruct": ("glagcn-mocap", "of no table", {
        "without reconstruction": (None, dict(reconstruct=False)),
        "with reconstruction": (None, dict(reconstruct=True))})}


def ablate(table, folder, out, seeds=3, only="", options=None, device=None):
    """Train the rows of a table (or those of `only`) for the same epochs, one after the other; the
    table as text. Finished runs are not repeated. `options`: recipe fields for every row."""
    name, figures, rows = ABLATIONS[table]
    base = replace(RECIPES[name], **(options or {}))
    wanted = only.split(";") if only else rows
    if odd := [label for label in wanted if label not in rows]:
        raise InputError(f"--only: no row {odd[0]!r} in '{';'.join(rows)}'")
    if own := {key for _, row in rows.values() for key in row} & {*(options or {})}:
        raise InputError(f"{table}: its rows set {listed(sorted(own))}; use train.py {name}")
    results = {label: [] for label in wanted}
    for seed, label in itertools.product(range(seeds), wanted):  # so an unfinished table is fair
        recipe = ablation_recipe(base, f"{label}, seed {seed}", seed, **rows[label][1])
        place = Path(out) / re.sub(r"[^\w.]+", "-", recipe.name).strip("-")
        results[label].append(run_recipe(recipe, folder, place, device))
    lines = []
    for label, group in results.items():
        errors = [result["last"]["mpjpe"] for result in group]
        grids = [result["autogrids"] for result in group if result["autogrids"]]
        lines.append({
            "row": label, "lr": f"{group[0]['recipe']['lr']:g}",
            "parameters": f"{group[0]['parameters']:,}",
            "minutes": statistics.fmean(result["seconds"] for result in group) / 60,
            "MPJPE": statistics.fmean(errors), "spread": max(errors) - min(errors),
            "P-MPJPE": statistics.fmean(result["last"]["p_mpjpe"] for result in group),
            "seeds": listed(f"{error:.2f}" for error in errors), "paper": rows[label][0],
            "cells changed, dropped": listed(f"{grid['cells_changed']}, {grid['dropped']}"
                                             for grid in grids)})
    first = group[0]
    other = "" if first["compares"] else ": other data, so only the order of\nthe rows compares"
    return (f"{table} on {first['data']}: {first['epochs']:g} epochs a run, last epoch, mm; spread "
            f"is largest minus smallest.\nMinutes on {first['device']}. The paper's: {figures}, "
            f"on Human3.6M{other}.\n\n"
            f"{evaluation.markdown(lines[0], [line.values() for line in lines])}")


def ablation_recipe(base, name, seed, noise_epochs=0.0, **fields):
    """The recipe of a row and seed, without its base's own row and figure."""
    recipe = replace(base, name=name, row="", paper_mpjpe=0.0, seed=seed, layout_seed=seed,
                     noise_epochs=noise_epochs * base.epochs, **fields)
    if recipe.reconstruct:
        recipe = replace(recipe, stage_one_epochs=0.75 * recipe.epochs)
    return recipe


def finished(recipe, folder, place):
    """The result in `place` of this recipe on these very files (by size and time), or None."""
    with contextlib.suppress(InputError):  # none there, or not one of this program
        result = read_result(place / "result.json")
        same = settings(result["recipe"]) == settings(recipe)
        if same and result["files"] == files_read(recipe, folder):
            return result
    return None


# --------------------------------------------------------------------------------------------------
# Reports

HEADLINE = ("gridconv-gt", "gridconv-gt-learnable", "glagcn-gt-243")
EMBEDDED = ("gridconv-synthetic", "gridconv-synthetic-learnable", "glagcn-synthetic")
ONLY_BY_NAME = ("glagcn-gt-243-reconstruct-512",)  # days on any single GPU
LEGEND = """Errors in mm, by the data's protocol, means over seeds; spread: largest minus smallest.
The papers quote the epoch that is best on the test set: within 0.5 of it is reproduced. Affine: the
best affine map of the 2D. Minutes of training alone. No paper's figure: other data than its own."""


def listed(values):
    """Values in a cell, None for none."""
    return ", ".join(map(str, values)) or None


def paper_figures(recipe):
    """{figure: the paper's} of a recipe's fields, empty where it reproduces no published row."""
    return {name: recipe["paper_" + name] for name in FIGURES if recipe["paper_" + name]}


def read_result(path):
    """A run's result. InputError: not there, or not one of this program."""
    result = data.read_json(path, "train a recipe first")
    needed = {"recipe", "files", "data", "test_data", "last", "best", "compares", "yardsticks"}
    if not isinstance(result, dict) or not needed <= result.keys():
        raise InputError(f"{path}: not a result of train.py; remove it")
    return result


def summary(results):
    """[a dict for each recipe and figure]: means over seeds, beside the paper's where it compares.

    The headline rows come first, then as --list has them."""
    groups, rows = {}, []
    for result in results:
        same = settings(result["recipe"]) | {"seed": 0}
        key = json.dumps([same, result["data"], result["test_data"]])
        groups.setdefault(key, []).append(result)
    names = [*HEADLINE, *RECIPES, *(result["recipe"]["name"] for result in results)]
    for group in sorted(groups.values(), key=lambda group: names.index(group[0]["recipe"]["name"])):
        figures = {"mpjpe": None, "p_mpjpe": None}
        if all(result["compares"] for result in group):
            figures = paper_figures(group[0]["recipe"]) or figures
        for figure, paper in figures.items():
            rows.append(report_row(group, "last", figure, paper))
        if all("refined" in result for result in group):
            rows += [report_row(group, "refined", *figure) for figure in figures.items()]
    return rows


def report_row(group, kind, figure, paper):
    """One figure's mean over results of a recipe. Compared is the epoch that was best on the test
    set, as the papers do; a refined figure has the last alone."""
    first = group[0]
    title, on, run = evaluation.METRICS[figure], first["data"], first["recipe"]["name"]
    values = [result[kind][figure] for result in group]
    best, last = None, statistics.fmean(values)
    if kind == "refined":
        title += ", refined: true root"
    else:
        best = statistics.fmean(result["best"][figure] for result in group)
    if first["test_data"] != on:
        on += f", tested on {first['test_data']}"
    if first["settings_changed"]:
        run += " (settings changed)"
    difference = reproduced = None
    if paper is not None:
        difference = (last if best is None else best) - paper
        reproduced = abs(difference) <= 0.5 and not first["settings_changed"]  # mm, or points
    return {"run": run, "figure": title, "paper": paper, "best epoch": best,
            "difference": difference, "reproduced": reproduced, "last epoch": last,
            "spread": max(values) - min(values), "affine": first["yardsticks"]["affine"],
            "seeds": listed(sorted(result["seed"] for result in group)), "data": on,
            "minutes": statistics.fmean(result["seconds"] for result in group) / 60,
            "on": f"{first['device']}, {first['precision']}"}


def report_table(results):
    """The summary of finished runs as markdown."""
    rows = summary(results)
    return evaluation.markdown(rows[0], [row.values() for row in rows]) + f"\n\n{LEGEND}"


def write_report(folder):
    """report.md of every finished run in a folder; returns its table."""
    paths = sorted(Path(folder).glob("*/result.json"))
    if not paths:
        raise InputError(f"{folder}: no finished runs (*/result.json); train one first")
    results = [read_result(path) for path in paths]
    table = report_table(results)
    sections = ["# Report", table, *map(evaluation.report, results)]
    data.write_text(Path(folder) / "report.md", "\n\n".join(sections) + "\n")
    return table


# --------------------------------------------------------------------------------------------------
# The main job: what reproduce.sh runs


def known_recipe(name):
    """The recipe of that name. InputError: none, with the nearest names."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, [*RECIPES, *COMMANDS], n=3, cutoff=0.5)
    raise InputError(f"unknown recipe {name!r}, nearest: {listed(near)}; see train.py --list")


def rows_to_run(folder, only="", everything=False):
    """The recipes to run: those named, else the headline rows (with `everything` every published
    row) whose data is here, else the embedded default; what a row evaluates comes before it."""
    names = only.split(",") if only else [*HEADLINE]
    if everything:
        names += [name for name, recipe in RECIPES.items()
                  if paper_figures(vars(recipe)) and name not in ONLY_BY_NAME]
    rows = []
    for name in names:
        chain = [part for part in (known_recipe(name).weights, name) if part]
        missing = [file for part in chain for file in data.missing_files(RECIPES[part], folder)]
        if missing and only:
            raise InputError(f"{name} needs {listed(missing)}, not found in {folder}; "
                             f"python data.py check {folder} says where to get it")
        if not missing:
            rows += chain
    return list(dict.fromkeys(rows or EMBEDDED))


def weights_of(recipe, out):
    """The folder of the run whose weights a result in `out` is of: `out`, or one beside it."""
    name = out.name.replace(recipe.name, recipe.weights or recipe.name)
    return out.with_name(recipe.weights if recipe.weights and name == out.name else name)


def run_recipe(recipe, folder, out=None, device=None):
    """Train a recipe, unless `out` holds its result; or evaluate what another one trained: the best
    and the last weights of the run beside `out` (`weights_of`). Returns the result. InputError:
    that run is not finished."""
    out = Path(out or Path("results") / recipe.name)
    if not recipe.weights:
        return finished(recipe, folder, out) or train(recipe, folder, out, device)
    device, precision = evaluation.pick_device(device, recipe.precision)
    source = weights_of(recipe, out)
    result = data.read_json(source / "result.json",
                            f"first: python train.py {recipe.weights} --out {source}")
    store = make_store(recipe, folder, "test", device)
    for which, name in (("best", "best.pt"), ("last", "model.pt")):
        model = evaluation.load_model(source / name).to(device)
        scores = evaluation.evaluate(model, store, flip=recipe.flip_test)
        result[which] = {"epoch": model.epoch, **scores}
    tested = data.provenance(store.sequences)
    result |= {"recipe": asdict(recipe), "test_data": tested, "precision": precision,
               "compares": evaluation.compares(recipe, tested, result["data"]),
               "settings_changed": settings_changed(recipe) or result["settings_changed"],
               "files": files_read(recipe, folder),
               "test_frames": int(store.valid.sum()), "yardsticks": {"affine": None}}
    data.write_text(out / "result.json", json.dumps(result, indent=1))
    return result


def reproduce(folder, out, device=None, only="", everything=False, seeds=1, options=None):
    """Say what runs, on what and in about how much memory; run it seed by seed, continuing and
    skipping what `out` holds; write the report after every run and return its table. A row that
    fails does not stop the others. `options`: recipe fields. InputError: a row failed."""
    names, out = rows_to_run(folder, only, everything), Path(out)
    plan, lines, failed = [], [], []
    for seed, name in itertools.product(range(seeds), names):
        recipe = replace(RECIPES[name], **(options or {}), seed=seed)
        check_recipe(recipe)
        place = out / (f"{name}-seed-{seed}" if seed else name)
        done = finished(recipe, folder, place)
        plan += [] if done else [(recipe, place)]
        picked, precision = evaluation.pick_device(device, recipe.precision)
        lines.append({"run": place.name, "row": recipe.row, "epochs": f"{recipe.epochs:g}",
                      "state": "done" if done else "to run", "precision": precision,
                      "batch": recipe.batch, "at once": samples_at_once(recipe),
                      "GiB, about": f"{memory(recipe, precision, samples_at_once(recipe)):.1f}"})
    table = evaluation.markdown(lines[0], [line.values() for line in lines])
    if names[0] in EMBEDDED and not only:
        print(f"No published row's data is in {folder}: both methods run on procedural motion.")
    print(f"On {evaluation.device_name(picked)}:\n\n{table}\n\n"
          "Interrupted, the same command goes on.", flush=True)
    for recipe, place in plan:
        try:
            run_recipe(recipe, folder, place, device)
            write_report(out)
        except Exception as error:  # the other rows run on
            said = f"error: {place.name}: {' '.join(str(error).split())}"
            if not isinstance(error, (OSError, ValueError)):  # a fault of ours
                said = traceback.format_exc()
            print(said, file=sys.stderr)
            failed.append(place.name)
    if failed:
        raise InputError(f"{len(failed)} of {len(plan)} runs failed: {listed(failed)}")
    return f"{write_report(out)}\n\nEverything is in {out / 'report.md'}."


def list_recipes(folder="data"):
    """The recipes as text: row, the papers' figures, data here or not, parameters."""
    lines = []
    for recipe in RECIPES.values():
        figures = "/".join(f"{value:g}" for value in paper_figures(vars(recipe)).values())
        here = "no" if data.missing_files(recipe, folder) else "yes"
        size = f"{parameters(recipe) / 1e6:.2f} M"
        lines.append([recipe.name, recipe.row, figures or None, here, size])
    table = evaluation.markdown(["recipe", "row", "paper", "here", "parameters"], lines)
    return f"{table}\n\nPaper: MPJPE/P-MPJPE, on 3DHP MPJPE/PCK/AUC. Here: data is in {folder}."


# --------------------------------------------------------------------------------------------------
# Command line

# The options that several commands share.
SHARED = {"data": dict(default="data", help="the folder with the data"),
          "out": dict(help="where results go"),
          "device": dict(help="cpu, cuda, ...; by default cuda where there is one"),
          "only": dict(default="", help="these rows alone, parted by commas (ablate: semicolons)"),
          "seeds": dict(type=int, choices=range(1, 21), metavar="N", help="seeds 0 to N-1")}


def add(parser, *names, **defaults):
    """Those of SHARED options; their defaults in --help."""
    for name in names:
        how = SHARED[name] | {"default": defaults.get(name, SHARED[name].get("default"))}
        if how["default"]:
            how["help"] += f" [{how['default']}]"
        parser.add_argument("--" + name, **how)


def parse_value(text, default):
    """An option's text as the type of its field: "3,3:3,3" is (3, (3, 3), 3)."""
    if isinstance(default, tuple):
        return tuple(parse_item(word) for word in text.split(",") if word)
    try:
        if isinstance(default, bool):
            return ConfigParser.BOOLEAN_STATES[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}, something as {default!r} expected") from None


def parse_item(word):
    """A word of a list: a number, a name, or several joined by colons."""
    if ":" in word:
        return tuple(parse_item(part) for part in word.split(":"))
    return int(word) if re.fullmatch("[0-9]+", word) else word


def read_by(method, name):
    """Whether a model of that method reads a recipe's field."""
    learnt = ("layout", "layout_seed", "grid", "temperature", "anneal_epochs", "noise_epochs",
              "grid_lr")
    whole = ("head_scale", "stage_one_epochs", "refine", "swap_sides")
    extra = {"gridconv": (*learnt, "attention"), "gridconv-temporal": (*learnt, "norm_schedule"),
             "glagcn": (*whole, "norm_schedule")}
    own = {key: (*fields, *extra.get(key, ())) for key, (_, fields) in evaluation.NETWORKS.items()}
    return name in own[method] or not any(name in fields for fields in own.values())


def add_fields(parser, recipe=None, without=()):
    """An option for every field, or those that the recipe's method reads; --help shows its own."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Recipe), re.M))
    for field in fields(Recipe):
        name, value = field.name, getattr(recipe or Recipe(), field.name)
        taken = not recipe or read_by(recipe.method, name)
        if not taken or name in ("name", "weights", *TEXTS, *without):
            continue
        own = f" [{value}]" if recipe else ""
        how = dict(help=(comments.get(name, "") + own).replace("%", "%%"))
        if isinstance(value, bool):
            how |= dict(nargs="?", const=True)
        parser.add_argument("--dataset" if name == "data" else "--" + name.replace("_", "-"),
                            type=functools.partial(parse_value, default=field.default),
                            default=argparse.SUPPRESS, dest="field " + name, metavar="VALUE", **how)


def fields_given(args):
    """{field: value} of those options that were given."""
    return {name.removeprefix("field "): value for name, value in vars(args).items()
            if name.startswith("field ")}


def train_command(parser, words):
    """Train a recipe, print its table and what comes next."""
    name = words[0]
    recipe = known_recipe(name)
    parser.description = f"Train {name}: {recipe.row}."
    add(parser, "data", "out", "device", out=f"results/{name}")
    add_fields(parser, recipe)
    args = parser.parse_args(words[1:])
    result = run_recipe(replace(recipe, **fields_given(args)), args.data, args.out, args.device)
    weights = weights_of(recipe, Path(args.out)) / "model.pt"
    if result:  # else it is another process's to say
        print(f"{report_table([result])}\n\n"
              f"Next: python eval.py {weights} --data {args.data} (every table)\n"
              f"or python eval.py lift KEYPOINTS --model {weights} (your own 2D)")


def ablate_command(parser, words):
    """The rows of a table, trained for the same epochs."""
    parser.add_argument("table", choices=ABLATIONS, help=listed(ABLATIONS), metavar="TABLE")
    add(parser, "data", "out", "device", "only", "seeds", seeds=3)
    add_fields(parser, without=("seed", "layout_seed", "noise_epochs", "stage_one_epochs"))
    args = parser.parse_args(words[1:])
    out = args.out or f"results/ablate-{args.table}"
    given = fields_given(args)
    print(ablate(args.table, args.data, out, args.seeds, args.only, given, args.device))


def bench_command(parser, words):
    """The fast forms beside the papers', on this machine."""
    parser.add_argument("--full-size", action="store_true", help="steps at Human3.6M's size")
    add(parser, "device", "only", only=",".join(FULL_SIZE))
    args = parser.parse_args(words[1:])
    if args.full_size:
        bench_full_size(args.device, args.only)
    else:
        bench(args.device)


def report_command(parser, words):
    """The table of every run in a folder; writes report.md there."""
    parser.add_argument("folder", nargs="?", default="results", help="where the runs are")
    print(write_report(parser.parse_args(words[1:]).folder))


def reproduce_command(parser, words):
    """The main job: the headline rows of both papers, or the embedded default."""
    add(parser, "data", "out", "device", "only", "seeds", out="results", seeds=1)
    parser.add_argument("--all", action="store_true", help="every published row whose data is here")
    add_fields(parser, without=("seed",))
    args = parser.parse_args(words[1:])
    print(reproduce(args.data, args.out, args.device, args.only, args.all, args.seeds,
                    fields_given(args)))


def list_command(parser, words):
    """Every recipe: row, the paper's figures, data here or not, parameters."""
    add(parser, "data")
    print(list_recipes(parser.parse_args(words[1:]).data))


COMMANDS = {"ablate": ablate_command, "bench": bench_command, "report": report_command,
            "reproduce": reproduce_command, "--list": list_command}


def main(argv=None):
    """Run the command line; see the module's docstring."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if words[0] in ("-h", "--help"):
        print(__doc__)
        return
    command, prog = COMMANDS.get(words[0], train_command), f"train.py {words[0]}"
    command(data.Parser(prog=prog, usage=f"{prog} [options]", description=command.__doc__,
                        allow_abbrev=False), words)


if __name__ == "__main__":
    data.run(main)
