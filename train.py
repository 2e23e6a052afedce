"""Training: one recipe for each published row, the loop, resume, ablations, the report.

    python train.py gridconv-synthetic                      # the embedded default, no data needed
    python train.py gridconv-mocap --data data              # after: python data.py bvh FOLDER --out data --name mocap ...
    python train.py glagcn-gt-243 --data data --seed 1      # a published row; any recipe field can be given as an option
    torchrun --nproc-per-node 4 train.py glagcn-gt-243      # several GPUs (or CPU processes) share the recipe's batch
    python train.py --list                                  # every recipe: row, data and whether it is here, cost
    python train.py ablate gridconv-5 --data data           # the rows of one table side by side, several seeds
    python train.py report results                          # the table of every run in a folder
    python train.py reproduce --data data --quick           # what bash reproduce.sh runs: --only --all --seeds N --quick
    python train.py bench                                   # the fast forms against the plain ones, on this machine

A run's folder holds last.pt (the whole state: continue by giving the same command again), previous.pt (the state before
it), best.pt (the weights of the epoch that was best on the test set), log.csv and result.json, with matplotlib also
curves.png. Same recipe, seed, machine and number of threads: same numbers, bit for bit on the CPU, interrupted or not.
"""
if __name__ == "__main__":  # torch takes seconds to import: until data.run, Ctrl-C ends them without a traceback
    import os
    import signal
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import concurrent.futures
import copy
import csv
import dataclasses
import fcntl
import functools
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import re
import reprlib
import signal
import statistics
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as evaluation
import gridconv
from data import HUMANEVA_ACTIONS, InputError
from eval import make_store
from glagcn import GLAGCN, AGCNBlock, Refinement, mean_distance

# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """One training run, whole and flat. The comments are the help texts of the options (--help)."""

    name: str = ""
    row: str = ""  # the table row it reproduces, or what it is for
    paper_mpjpe: float = 0.0  # the paper's figure in mm; 0: none
    paper_p_mpjpe: float = 0.0  # the paper's figure after alignment in mm; 0: none
    paper_pck: float = 0.0  # the paper's PCK at 150 mm in %; 0: none
    paper_auc: float = 0.0  # the paper's AUC in %; 0: none
    ours: str = ""  # the settings that neither paper nor release gives
    # data
    data: str = "h36m"  # h36m, gridconv (its archives), humaneva, 3dhp, mocap or synthetic
    keypoints: str = "gt"  # the 2D: gt, hrnet, cpn_ft_h36m_dbb, ...
    skeleton: str = "h36m17"  # h36m17, h36m32, humaneva15 or 3dhp17
    skip: str = ""  # further test sequences left out: gridconv (twelve of S9 on detected 2D, as its release) or none
    actions: tuple = HUMANEVA_ACTIONS  # of humaneva; the release has Box as well
    weights: str = ""  # nothing is trained: the recipe whose weights are evaluated on this data
    normalise: str = "release-500"  # of the 2D: release-500, width or longest
    cameras: str = "recorded"  # recorded, or random: every epoch each sequence through another camera
    noise: float = 0.0  # of the 2D: standard deviation as a fraction of the person's size in the image
    missing: float = 0.0  # fraction of the 2D that is lost in gaps and filled by interpolation in time
    target: str = "camera"  # camera: root-relative metres; uvd: pixel u, v and depth (the section-sign rows)
    # model
    method: str = "gridconv"  # gridconv, gridconv-temporal, glagcn, or a neighbour: fc (fully connected) or gcn
    dropout: float = 0.25
    layout: str = "released"  # handcrafted, released, random, row, column, global, autogrids or autogrids-random
    layout_seed: int = 0  # of the random layouts and shuffles
    grid: tuple = (5, 5)  # H,P
    hidden: int = 256
    blocks: int = 2
    kernel_sizes: tuple = (3, (3, 3), 3)  # expand,first:second,shrink (Table E)
    padding: tuple = ("circular", "replicate")  # a branch each; vertical:horizontal where the axes differ
    attention: str = "grid"  # grid, channel, spatial, spatial+channel, or empty: vanilla GridConv
    temperature: float = 30.0  # of the attention's sigmoid
    anneal_epochs: float = 0.0  # epochs over which the temperature falls to 1, as the release meant to; 0: constant
    noise_epochs: float = 30.0  # epochs with Gumbel noise in AutoGrids
    grid_lr: float = 1.0  # S_prob's learning rate as a multiple of the others'; 0: a learnable grid that stays frozen
    filter_widths: tuple = (3, 3, 3, 3, 3)  # T is their product
    channels: int = 96
    reconstruct: bool = False  # the 3D sequence head (Eq. 4) and stage one
    reconstruct_blocks: int = 3
    unshared_weight: float = 0.0  # lambda of Eq. 7
    causal: bool = False
    adaptive: bool = True  # False: ST-GCN, without C_k (Table 6)
    temporal: str = "stride"  # stride or mean (Table 6)
    head: str = "individual"  # individual or full (Table 6)
    normalisation: str = "column"  # of the adjacency: column, as released, or symmetric, as in the paper
    swap_sides: bool = False  # left and right joints of the 2D exchanged, in training and test (Table 6)
    head_scale: float = 1.0  # the head's first weights as a multiple of the release's, which start metres off
    # training
    loss: str = "mse"  # mse, grid (mse between grid poses) or mpjpe
    optimizer: str = "adam"  # adam, amsgrad or ranger
    lr: float = 1e-3
    schedule: str = "0.96/1"  # factor/epochs, cosine (an epoch a step), cosine-smooth, or 3dhp
    epochs: float = 100.0
    stage_one_epochs: float = 0.0  # epochs with the global loss beside the local one (Eq. 4, then Eq. 8 alone)
    refine: bool = False  # train the refinement network in stage two, a second figure that uses the true root
    batch: int = 200
    micro_batch: int = 0  # samples at a time, gradients accumulated to the batch; 0: all at once
    norm_schedule: bool = False  # GLA-GCN's batch-norm momentum schedule
    flips: bool = False  # every sample a second time per epoch, mirrored
    flip_test: bool = False  # average with the mirrored prediction
    jitter: bool = False  # GLA-GCN's release rotates and scales each target's (x, y); off in the published recipes here
    precision: str = "float32"  # float32, tf32 or bf16 (autocast, where the device has it)
    compile: bool = False  # torch.compile for the training step; with CUDA graphs on a GPU
    sync_norm: bool = False  # several GPUs: batch-norm statistics of the whole batch instead of each process's share
    clip: float = 0.0  # largest gradient norm; 0: none
    deterministic: bool = False  # CUDA: the same bits every time, where torch has such an algorithm, and slower; CPUs always do
    eval_every: int = 1  # epochs between evaluations; the last epoch always is
    seed: int = 0


_JOINTS_32 = dict(skeleton="h36m32", grid=(7, 5))


def _recipes():
    rows = []

    def add(name, row, mpjpe=0.0, p_mpjpe=0.0, base=None, **fields):
        recipe = dataclasses.replace(base or Recipe(), name=name, row=row, paper_mpjpe=mpjpe, paper_p_mpjpe=p_mpjpe, **fields)
        rows.append(recipe)
        return recipe

    # GridConv (AAAI 2023). 100 epochs, batch 200, Adam 1e-3, dropout 0.25, temperature 30.
    craft = dict(skip="gridconv", loss="grid", schedule="0.96/1")
    learn = dict(skip="gridconv", layout="autogrids", schedule="0.96/10")
    gt = add("gridconv-gt", "GridConv Table 5, handcrafted, P1*", 37.1, **craft)
    gt_learnable = add("gridconv-gt-learnable", "GridConv Table 5, learnable, P1*", 36.4, **learn)
    zeros = dict(keypoints="hrnet", padding=("circular", "zeros"))
    add("gridconv-hrnet", "GridConv Table 5, handcrafted, P1 / P2", 47.9, 37.9, **craft, **zeros)
    hrnet = add("gridconv-hrnet-learnable", "GridConv Table 1 and A, P1 / P2", 47.6, 37.4, **learn, **zeros)
    add("gridconv-gt-uvd", "GridConv Table 2 §, P1*", 29.5, base=gt_learnable, target="uvd")
    add("gridconv-hrnet-uvd", "GridConv Table 1 and A §, P1 / P2", 46.3, 37.6, base=hrnet, target="uvd")
    add("gridconv-gt-vanilla", "GridConv Table 4, vanilla, P1*", 39.0, base=gt, attention="")
    for n, paper in enumerate((38.5, 38.2, 37.9, 37.8), 1):
        add(f"gridconv-gt-random-{n}", f"GridConv Table 5, random #{n}, P1*", paper, base=gt, layout="random", layout_seed=n,
            ours="the four random layouts")
    add("gridconv-gt-32", "GridConv Table 6, 32 joints handcrafted, P1*", 35.0, base=gt, layout="handcrafted",
        ours="the 7 x 5 layout", **_JOINTS_32)
    add("gridconv-gt-32-learnable", "GridConv Table 6, 32 joints learnable, P1*", 33.4, base=gt_learnable,
        ours="the 7 x 5 prior", **_JOINTS_32)

    # Temporal GridConv (B.3): "the rest settings" are VideoPose3D's.
    temporal = Recipe(method="gridconv-temporal", hidden=512, filter_widths=(3,) * 3, normalise="width", loss="mpjpe",
                      optimizer="amsgrad", schedule="0.95/1", epochs=80.0, batch=1024, micro_batch=256,
                      norm_schedule=True, flips=True, flip_test=True,
                      ours="VideoPose3D's training, the released layout and padding")
    add("gridconv-temporal-gt", "GridConv Table C, T=27, P1* / P2*", 33.5, 24.7, base=temporal)
    add("gridconv-temporal-cpn", "GridConv Table C, CPN, T=27, P1 / P2", 44.3, 33.2, base=temporal,
        keypoints="cpn_ft_h36m_dbb", padding=("circular", "zeros"))

    # GLA-GCN (ICCV 2023). 80 epochs, batch 512, Ranger 1e-2, cosine, flips.
    gla = Recipe(method="glagcn", normalise="width", dropout=0.1, loss="mpjpe", optimizer="ranger", lr=1e-2, batch=512,
                 schedule="cosine", epochs=80.0, norm_schedule=True, flips=True, flip_test=True)
    add("glagcn-gt-27", "GLA-GCN Table 5, T=27, P1", 34.4, base=gla, filter_widths=(3,) * 3)
    add("glagcn-gt-81", "GLA-GCN Table 5, T=81, P1", 31.5, base=gla, filter_widths=(3,) * 4)
    add("glagcn-gt-243", "GLA-GCN Table 1 and 4, gt, P1 / P2", 28.5, 22.0, base=gla)
    add("glagcn-cpn-243", "GLA-GCN Table 1 and 4, CPN, P1 / P2", 44.4, 34.8, base=gla, keypoints="cpn_ft_h36m_dbb")
    two_stages = dict(reconstruct=True, unshared_weight=0.5, stage_one_epochs=60.0, refine=True)
    add("glagcn-gt-243-reconstruct", "GLA-GCN Table 5, reconstruction, C=96, P1", 24.5, base=gla,
        ours="lambda 0.5, stages of 60 and 20 epochs", **two_stages)
    add("glagcn-gt-243-reconstruct-512", "GLA-GCN Table 1 and 4, reconstruction, C=512, P1 / P2", 21.0, 17.6, base=gla,
        channels=512, micro_batch=64, ours="lambda 0.5, stages of 60 and 20 epochs", **two_stages)
    humaneva = dict(data="humaneva", skeleton="humaneva15", filter_widths=(3,) * 3, epochs=1000.0, batch=256,
                    eval_every=20)
    add("glagcn-humaneva-gt", "GLA-GCN Table 2, gt, P2", 0.0, 9.2, base=gla, **humaneva)
    add("glagcn-humaneva-mrcnn", "GLA-GCN Table 2, MRCNN, P2", 0.0, 15.4, base=gla, keypoints="detectron_pt_coco", **humaneva)

    # MPI-INF-3DHP: Adam with amsgrad, 256 channels, 50 epochs; of its two stages only the losses are given. Without
    # intrinsics there is no refinement. The cross-dataset row evaluates what gridconv-gt-learnable trained.
    hp3d = dataclasses.replace(gla, data="3dhp", skeleton="3dhp17", channels=256, optimizer="amsgrad", lr=1e-3, schedule="3dhp",
                               epochs=50.0, batch=256, norm_schedule=False, reconstruct=True, unshared_weight=0.5,
                               stage_one_epochs=38.0, ours="lambda 0.5, stages of 38 and 12 epochs, losses in metres")
    add("glagcn-3dhp-27", "GLA-GCN Table 3, T=27", 31.36, base=hp3d, paper_pck=98.19, paper_auc=76.53, filter_widths=(3,) * 3)
    add("glagcn-3dhp-81", "GLA-GCN Table 3, T=81", 27.76, base=hp3d, paper_pck=98.53, paper_auc=79.12, filter_widths=(3,) * 4)
    add("gridconv-3dhp-cross", "GridConv Table 3, trained on Human3.6M", 72.1, base=gt_learnable, data="3dhp",
        weights="gridconv-gt-learnable", normalise="longest", paper_pck=89.2, paper_auc=57.6,
        ours="gt 2D normalised by the longest side, neck/nose = 3DHP's head, universal annotation")

    # Motion that anyone may hold: the open benchmark, and procedural motion that needs no data at all.
    small = Recipe(data="mocap", layout="handcrafted", hidden=64, dropout=0.0, loss="mpjpe", lr=3e-3, epochs=12.0,
                   schedule="cosine-smooth", eval_every=4, ours="everything but the network")
    add("gridconv-mocap", "open mocap benchmark", base=small)
    add("gridconv-mocap-learnable", "open mocap benchmark", base=small, layout="autogrids", noise_epochs=1.2)
    small_gla = Recipe(data="mocap", method="glagcn", normalise="release-500", dropout=0.0, loss="mpjpe",
                       lr=1.2e-2, batch=64, epochs=3.0, schedule="cosine-smooth", channels=32, head_scale=0.1, unshared_weight=1.0,
                       filter_widths=(3,) * 3, ours="everything but the network")
    mocap_gla = add("glagcn-mocap", "open mocap benchmark", base=small_gla, epochs=4.0, precision="bf16")
    # Any video: other cameras, noise and gaps every epoch, mirrored bodies; flips double an epoch, so half as many
    wild = dict(normalise="longest", cameras="random", noise=0.01, missing=0.1, flips=True)
    add("gridconv-wild", "lifting any video", base=small, **{**wild, "epochs": 6.0, "eval_every": 2})
    add("glagcn-wild", "lifting any video", base=mocap_gla, **{**wild, "epochs": 2.0})
    tiny = dict(data="synthetic", batch=64, eval_every=2)
    grid = add("gridconv-synthetic", "embedded default", base=small, epochs=6.0, hidden=32, **tiny)
    add("gridconv-synthetic-learnable", "embedded default", base=grid, layout="autogrids", noise_epochs=0.6)
    add("glagcn-synthetic", "embedded default", base=small_gla, epochs=3.0, channels=24, **tiny)
    return {recipe.name: recipe for recipe in rows}


RECIPES = _recipes()


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers and schedules


class Ranger(torch.optim.RAdam):
    """RAdam with Lookahead (k = 6, alpha = 0.5), as GLA-GCN's release sets it; torch's RAdam does the rest.

    Betas 0.95 and 0.999, eps 1e-5, no weight decay, no gradient centralisation. After every sixth step the slow
    weights move halfway to the fast ones, which then continue from there.
    """

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, betas=(0.95, 0.999), eps=1e-5)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = [(p, p.clone()) for p in params if not self.state[p]]
        super().step()
        for p, start in fresh:
            self.state[p]["slow"] = start
        for p in params:
            if self.state[p]["step"] % 6 == 0:
                p.copy_(self.state[p]["slow"].lerp_(p, 0.5))
        return loss


ranger = Ranger  # ranger(params, lr)


def make_optimizer(recipe, *modules):
    """The recipe's optimiser (adam, amsgrad or ranger) over the modules' parameters; S_prob has a rate of its own."""
    named = [pair for module in modules for pair in module.named_parameters()]
    groups = [{"params": [p for name, p in named if not name.endswith("s_prob")], "scale": 1.0}]
    if s_prob := [p for name, p in named if name.endswith("s_prob")]:
        groups.append({"params": s_prob, "scale": recipe.grid_lr})
    if recipe.optimizer == "ranger":
        return ranger(groups, recipe.lr)
    fused = all(p.is_cuda for _, p in named) or None  # one kernel for all parameters; None: what torch does by itself
    return torch.optim.Adam(groups, recipe.lr, amsgrad=recipe.optimizer == "amsgrad", fused=fused)


def learning_rate(recipe, epoch):
    """The learning rate after `epoch` epochs (a fraction within one).

    "F/N": times F every N epochs (GridConv, A.3). "cosine": to 1e-5 over the run, an epoch a step (GLA-GCN's release).
    "cosine-smooth": to 0, every step. "3dhp": times 0.95 an epoch, 0.5 instead on every fifth (GLA-GCN's 3DHP script).
    """
    if recipe.schedule == "cosine":
        return 1e-5 + (recipe.lr - 1e-5) * (1 + math.cos(math.pi * int(epoch) / recipe.epochs)) / 2
    if recipe.schedule == "cosine-smooth":
        return recipe.lr * (1 + math.cos(math.pi * min(epoch / recipe.epochs, 1))) / 2
    if recipe.schedule == "3dhp":
        return recipe.lr * 0.95 ** (int(epoch) - int(epoch) // 5) * 0.5 ** (int(epoch) // 5)
    if re.fullmatch(r"\d*\.?\d+/0*[1-9]\d*", recipe.schedule):
        factor, every = recipe.schedule.split("/")
        return recipe.lr * float(factor) ** (int(epoch) // int(every))
    raise InputError(f"schedule: unknown {recipe.schedule!r}, expected FACTOR/EPOCHS, cosine, cosine-smooth or 3dhp")


def norm_momentum(epoch, epochs):
    """GLA-GCN's batch-norm momentum in the epoch counted from 0: 0.1 exp(-epoch / epochs ln 100), 0.1 at first."""
    return 0.1 * math.exp(-epoch / epochs * math.log(100))


# ---------------------------------------------------------------------------------------------------------------------
# The loss of a batch


def batch_loss(model, store, index, flip, recipe, stage_one=False):
    """The recipe's loss for the frames `index` (B,) of a store, those with `flip` mirrored, and what was predicted."""
    T = model.receptive_field
    pose, target = store.batch(index, T, getattr(model, "causal", False), flip, all_targets=stage_one)
    if recipe.jitter:
        target = jitter(target)
    if stage_one:  # global plus local loss (GLA-GCN section 3.2), on whole sequences
        local, sequence = model(pose, return_sequence=True)
        return mean_distance(local, target[:, T // 2]) + mean_distance(sequence, target), local
    if recipe.loss == "grid":  # the release's loss with a handcrafted layout: both sides on the grid
        S, shape = model.assignment(), model.grid_shape
        grid = model.forward_grid(gridconv.sgt(pose, S, shape))
        return (grid - gridconv.sgt(target, S, shape)).square().mean(), None
    prediction = model(pose)
    if recipe.loss == "mse":  # GridConv Eq. 10
        return (prediction - target).square().mean(), prediction
    return mean_distance(prediction, target), prediction


def refined(refinement, store, prediction, index, flip=None):
    """GLA-GCN's refinement of predictions (B, J, 3) for frames `index`, mirrored ones mirrored back first.

    It re-projects with the frames' true root positions and intrinsics, which are not known for a user's own video.
    """
    if flip is not None:
        prediction = torch.where(flip[:, None, None], data.flip(prediction, store.skeleton), prediction)
    return refinement(prediction, store.input[index], store.normalised_intrinsics(index), store.root[index])


def jitter(target):
    """GLA-GCN's release in training: (x, y) of each target (B, J, 3) or (B, T, J, 3) turned by -5, 0 or 5 degrees about the
    optical axis and scaled by 0.95, 1 or 1.05, the nine combinations alike; z and the 2D stay."""
    choice = torch.randint(3, (2, len(target), *[1] * (target.ndim - 2)), device=target.device) - 1
    angle, scale = choice[0] * math.radians(5), 1 + 0.05 * choice[1]
    x, y, z = target.unbind(-1)
    return torch.stack([scale * (angle.cos() * x - angle.sin() * y), scale * (angle.sin() * x + angle.cos() * y), z], -1)


class Objective(nn.Module):
    """The loss of some samples (numbers as in `epoch_order`) as one module: what torch's DistributedDataParallel and
    torch.compile wrap."""

    def __init__(self, model, refinement, store, recipe):
        super().__init__()
        self.model, self.refinement, self.store, self.recipe = model, refinement, store, recipe

    def forward(self, samples, stage_one):
        flip = samples >= len(self.store) if self.recipe.flips else None
        index = samples % len(self.store)
        loss, prediction = batch_loss(self.model, self.store, index, flip, self.recipe, stage_one)
        if self.recipe.refine and not stage_one:  # detached: the figure without it stays what it was
            loss = loss + self.refined_loss(prediction.detach(), index, flip)
        return loss

    def refined_loss(self, prediction, index, flip):
        """The refinement's own loss for predictions (B, J, 3), metres, of the frames `index`."""
        better = refined(self.refinement, self.store, prediction, index, flip)
        return mean_distance(better, self.store.pose_3d[index])


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@contextmanager
def processes(device):
    """(this process's rank, their number, its device): joined under torchrun, (0, 1, device) without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1, device
        return
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Two hours: the others wait while one evaluates.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    try:
        yield dist.get_rank(), dist.get_world_size(), device
        dist.barrier()  # who leaves first would break the others' connections
    finally:
        dist.destroy_process_group()


def compiled(module, device):
    """torch.compile for steps of one size; on a GPU with CUDA graphs."""
    return torch.compile(module, mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)


def epoch_order(recipe, frames, epoch):
    """The samples of an epoch in order: a permutation that depends on seed and epoch alone, so a resumed run sees the
    same. With flips there are two samples a frame: number >= frames is the mirrored one."""
    generator = torch.Generator().manual_seed(recipe.seed * 100003 + epoch)
    return torch.randperm(frames * (2 if recipe.flips else 1), generator=generator)


def batches(order, size, least=2):
    """The samples in batches; the last partial one is kept, but fewer than `least` left-over samples (batch norm cannot
    take a single one) join the batch before them."""
    parts = list(order.split(size))
    return parts if len(parts) == 1 or len(parts[-1]) >= least else [*parts[:-2], torch.cat(parts[-2:])]


def check_recipe(recipe):
    """InputError where a field of the recipe cannot be meant, before anything is loaded or built."""
    words = {"method": evaluation.METHODS, "loss": ("mse", "grid", "mpjpe"), "precision": ("float32", "tf32", "bf16"),
             "target": ("camera", "uvd"), "skip": ("", "gridconv"), "optimizer": ("adam", "amsgrad", "ranger"),
             "cameras": ("recorded", "random"), "skeleton": tuple(data.SKELETONS), "normalisation": ("column", "symmetric")}
    for name, known in words.items():
        if getattr(recipe, name) not in known:
            raise InputError(f"{name}: unknown {getattr(recipe, name)!r}, expected one of {', '.join(map(repr, known))}")
    bounds = {"epochs": (1e-9, 1e9), "batch": (2, 1e9), "eval_every": (1, math.inf), "lr": (0, 1e31), "seed": (0, 2 ** 40),
              "micro_batch": (0, 1e9), "clip": (0, 1e9), "dropout": (0, 0.999), "temperature": (1e-9, 1e9), "hidden": (1, 1e6),
              "blocks": (0, 1e3), "channels": (1, 1e6), "reconstruct_blocks": (0, 1e3), "noise_epochs": (0, 1e9),
              "anneal_epochs": (0, 1e9), "stage_one_epochs": (0, 1e9), "grid_lr": (0, 1e9), "head_scale": (0, 1e9),
              "layout_seed": (0, 2 ** 40), "noise": (0, 1), "missing": (0, 0.9)}
    for name, (least, most) in bounds.items():
        if not least <= getattr(recipe, name) <= most:
            raise InputError(f"{name}: {getattr(recipe, name)!r}, expected a number from {least:g} to {most:g}")
    shapes = {"grid": ("5,5", r"\(\d+, \d+\)"), "kernel_sizes": ("3,3:3,3", r"\(\d+, \(\d+, \d+\), \d+\)"),
              "filter_widths": ("3,3,3", r"\(\d+,( \d+,?)*\)"), "padding": ("circular,replicate", r"\((?!\)).*'.*\)"),
              "actions": ("Walk,Jog", r"\(('[^']+',? ?)+\)")}
    for name, (example, pattern) in shapes.items():
        if not re.fullmatch(pattern, repr(getattr(recipe, name))):
            raise InputError(f"{name}: {getattr(recipe, name)!r}, expected something like {example}")
    learning_rate(recipe, 0)
    for wrong, why in ((recipe.loss == "grid" and recipe.method != "gridconv", "loss: 'grid' needs a grid, so gridconv"),
                       (recipe.norm_schedule and recipe.method not in ("glagcn", "gridconv-temporal"),
                        "norm_schedule: only glagcn and gridconv-temporal have one"),
                       (recipe.reconstruct and recipe.method != "glagcn", "reconstruct: only glagcn has a sequence head"),
                       (recipe.reconstruct and recipe.causal, "causal: a causal model has no sequence to reconstruct"),
                       (not 0 < recipe.stage_one_epochs < recipe.epochs if recipe.reconstruct else recipe.stage_one_epochs,
                        f"stage_one_epochs: {recipe.stage_one_epochs:g} of {recipe.epochs:g} epochs; with reconstruct more than 0 "
                        "and fewer than all, without it 0"),
                       (recipe.micro_batch == 1, "micro_batch: 1, expected at least 2 for batch norm, or 0"),
                       (recipe.swap_sides and recipe.refine, "refine: needs the joints' own 2D, so no swap_sides"),
                       (recipe.refine and recipe.data in ("humaneva", "3dhp"), f"refine: {recipe.data} gives no intrinsics"),
                       (recipe.refine and (recipe.loss == "grid" or recipe.target == "uvd"),
                        "refine: needs poses in the camera frame, so target camera and a loss on joints")):
        if wrong:
            raise InputError(why)


def fingerprint(stores):
    """What a run's data is, so that it is continued on the same only: frames and checksum of each split."""
    return [[split, len(store), zlib.crc32(torch.cat([store.input.flatten(), store.target.flatten()]).cpu().numpy())]
            for split, store in stores.items()]


class Run:
    """One training run: the model, what drives it, and all that must be saved to go on as if never interrupted."""

    def __init__(self, recipe, store, out, device, trained_on="", data_print=(), rank=0, world=1):
        if recipe.batch < 2 * world:
            raise InputError(f"batch: {recipe.batch} for {world} processes, at least two samples each expected")
        if recipe.sync_norm and (world == 1 or device.type != "cuda"):
            raise InputError("sync_norm: needs several processes on GPUs (torchrun), torch has none on the CPU")
        if device.type == "cuda":  # also back again: another run of this process may have set it
            exact = recipe.precision == "float32"
            torch.set_float32_matmul_precision("highest" if exact else "high")
            torch.backends.cudnn.allow_tf32 = not exact  # torch's default takes TF32 for convolutions
        torch.manual_seed(recipe.seed)
        self.rank, self.world = rank, world
        self.recipe, self.store, self.out, self.device, self.trained_on = recipe, store, Path(out), device, trained_on
        self.data_print = list(data_print)
        self.model = evaluation.build_model(recipe).to(device)
        if recipe.method == "glagcn":
            for weight in self.model.head.parameters():
                weight.data *= recipe.head_scale
        if recipe.sync_norm:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.refinement = Refinement(self.model.num_joints).to(device) if recipe.refine else nn.Module()
        self.optimizer = make_optimizer(recipe, self.model, self.refinement)
        self.objective = self.step_loss = Objective(self.model, self.refinement, store, recipe)
        if recipe.compile:  # these stay outside: at every step a CUDA graph would copy the whole store, which is no parameter
            store.batch = torch.compiler.disable(store.batch)
            self.objective.refined_loss = torch.compiler.disable(self.objective.refined_loss)
        self.stage_one = None
        if rank:  # noise of its own; the first process's is that of a single one
            torch.manual_seed(recipe.seed + (rank << 41))
        self.epoch_steps = len(self.batches(epoch_order(recipe, len(store), 0)))
        self.total_steps = max(1, round(recipe.epochs * self.epoch_steps))
        self.epochs = math.ceil(self.total_steps / self.epoch_steps)
        self.step = 0  # optimiser steps done
        self.losses = torch.zeros(self.epoch_steps, device=device)  # this epoch's, on the device: no synchronisation
        self.history, self.best, self.last, self.seconds = [], None, None, 0.0

    def batches(self, order):
        """The samples of an epoch in the recipe's batches, of which every process takes its share."""
        return batches(order, self.recipe.batch, 2 * self.world)

    def weights(self):
        """What eval.load_model reads."""
        return {"format": "poselift", "version": 1, "recipe": dataclasses.asdict(self.recipe), "data": self.trained_on,
                "model": self.model.state_dict(), "temperature": getattr(self.model, "temperature", None),
                "refinement": self.refinement.state_dict()}

    def state(self):
        """Everything that resuming needs, as plain values and tensors; every process has to call it."""
        random = [torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None]
        everyones = [random] * self.world
        if self.world > 1:
            dist.all_gather_object(everyones, random)
        return {**self.weights(), "data_print": self.data_print, "epoch": self.step / self.epoch_steps, "step": self.step,
                "optimizer": self.optimizer.state_dict(), "losses": self.losses, "history": self.history,
                "best": self.best, "last": self.last,
                "seconds": self.seconds, "random": everyones}

    def save(self):
        """last.pt, written whole or not at all; the one before stays, as previous.pt."""
        state = self.state()
        if self.rank == 0:
            data.write_atomically(self.out / "last.pt", lambda file: torch.save(state, file), self.out / "previous.pt")

    def resume(self):
        """Continue from last.pt where there is one. InputError: it belongs to another recipe or other data."""
        path = self.out / "last.pt"
        if not path.exists():
            return
        remedy = "remove it, or give another --out"
        state = data.read_torch(path, remedy=remedy)
        with data.described(f"{path}: not the state of a run", remedy):
            theirs, ours = state["recipe"], dataclasses.asdict(self.recipe)
            differ = [f"{k} {reprlib.repr(theirs.get(k))} there, {v!r} here" for k, v in ours.items() if theirs.get(k) != v]
            if differ:
                raise InputError(f"{path}: a run of another recipe ({'; '.join(differ[:3])}): {remedy}")
            if len(state["random"]) != self.world:
                raise InputError(f"{path}: a run of {len(state['random'])} processes, here {self.world}: {remedy}")
            if state["data_print"] != self.data_print:
                raise InputError(f"{path}: a run on other data ({state['data']}, {state['data_print']}; here {self.trained_on}, "
                                 f"{self.data_print}): {remedy}")
            self.model.load_state_dict(state["model"])
            self.refinement.load_state_dict(state["refinement"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.losses.copy_(state["losses"])
            for name in ("step", "history", "best", "last", "seconds"):
                setattr(self, name, state[name])
            if not 0 <= self.step <= self.total_steps or abs(self.step / self.epoch_steps - len(self.history)) > 1:
                raise ValueError(f"step {self.step} with {len(self.history)} epochs in the log")
            for scores in filter(None, (self.best, self.last)):
                evaluation.headline(scores, self.recipe.data)  # has what a report needs
            if state["temperature"] is not None:
                self.model.temperature = state["temperature"]
            random, random_cuda = state["random"][self.rank]
            torch.set_rng_state(random)
            if random_cuda is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(random_cuda, self.device)

    def begin_epoch(self, epoch):
        """What changes between epochs: random cameras and batch-norm momentum."""
        recipe = self.recipe
        self.store.redraw(2 * (recipe.seed * 100003 + epoch))  # even: test sets have an odd number
        if recipe.norm_schedule:
            self.momentum = norm_momentum(epoch, recipe.epochs)
            for norm in self.model.scheduled_norms():
                norm.momentum = 1.0 if recipe.compile else self.momentum  # see averaged_norms
        self.objective.train()

    def reach(self, epoch):
        """What changes at a step, `epoch` (a fraction within one) into the run: learning rate, temperature, AutoGrids' noise,
        stage two's frozen head."""
        recipe, model = self.recipe, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(recipe, epoch)
        if recipe.anneal_epochs:
            model.temperature = 1 + 29 * max(0.0, 1 - epoch / recipe.anneal_epochs)
        if getattr(model, "autogrids", None) is not None:
            model.autogrids.noise = epoch < recipe.noise_epochs
        before, self.stage_one = self.stage_one, recipe.reconstruct and epoch < recipe.stage_one_epochs
        if self.stage_one == before:
            return
        if recipe.reconstruct:
            model.sequence_head.requires_grad_(self.stage_one)
        self.refinement.requires_grad_(not self.stage_one)  # several processes wait for each gradient that is wanted
        self.step_loss = self.objective
        if self.world > 1:
            self.step_loss = nn.parallel.DistributedDataParallel(self.objective)
        if recipe.compile:
            self.step_loss = compiled(self.step_loss, self.device)
            for p in self.objective.parameters():  # in memory of their own: a CUDA graph's is written anew by its next run
                p.grad = torch.zeros_like(p) if p.requires_grad else None

    @contextmanager
    def averaged_norms(self):
        """Around a forward pass: scheduled running statistics of a compiled model. To torch.compile a momentum is a constant,
        and every epoch would compile anew, so the norms keep the batch's own (momentum 1), averaged with the old here."""
        norms = self.model.scheduled_norms() if self.recipe.compile and self.recipe.norm_schedule else []
        running = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        before = [statistic.clone() for statistic in running]
        yield
        for statistic, old in zip(running, before):
            statistic.copy_(old.lerp_(statistic, self.momentum))

    def train_step(self, chunk):
        """One optimiser step on the samples `chunk`, of which this process takes its share; the loss of all goes to
        self.losses."""
        recipe = self.recipe
        self.reach(self.step / self.epoch_steps)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
        share = chunk.tensor_split(self.world)[self.rank]
        parts = batches(share, recipe.micro_batch or len(share))
        total = torch.zeros((), device=self.device)
        for part in parts:
            alone = self.world > 1 and part is not parts[-1]  # gradients are averaged over the processes once a step
            with self.step_loss.no_sync() if alone else nullcontext():
                with autocast, self.averaged_norms():
                    loss = self.step_loss(part, self.stage_one) * (len(part) / len(chunk))
                (loss * self.world).backward()
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.objective.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not recipe.compile)
        self.losses[self.step % self.epoch_steps] = total
        self.step += 1

    def check_finite(self):
        """InputError unless this epoch's losses and the weights are finite: which step was the first that was not."""
        first = (self.step - 1) // self.epoch_steps * self.epoch_steps
        bad = (~torch.isfinite(self.losses[:self.step - first])).nonzero().flatten().tolist()
        if bad:
            wrong = f"the loss of step {first + bad[0] + 1} is {self.losses[bad[0]].item()}"
        elif not all(torch.isfinite(p).all() for p in self.objective.parameters()):
            wrong = f"the loss is finite, but some weights after step {self.step} are not"
        else:
            return
        kept = f"{self.out / 'last.pt'} holds the last good state" if (self.out / "last.pt").exists() else "nothing is saved"
        raise InputError(f"{wrong}: stopped, {kept}; a smaller --lr or --clip 1 may help")


@contextmanager
def locked(out):
    """Hold a folder for one run, and make it whole: without what a killed process was writing, and with previous.pt in
    the place of a last.pt that is missing or damaged. Busy where another live process holds the folder; a crash lets go
    of it by itself."""
    last, previous = Path(out) / "last.pt", Path(out) / "previous.pt"
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / "lock", "a")  # a file of the user's keeps its content
    except OSError as error:
        raise InputError(f"{out}: cannot make the output folder: {error.strerror}; choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{out}: another run is writing there; wait for it or choose another --out") from None
        except OSError as error:
            raise InputError(f"{out}: its file system cannot lock ({error.strerror}); choose another --out") from None
        for name in ("last.pt", "best.pt", "log.csv", "result.json", "curves.png"):  # see data.write_atomically
            for leftover in last.parent.glob(f".{name}.*.tmp"):
                leftover.unlink()
        if previous.exists():
            try:
                data.read_torch(last, remedy="the run was killed while it saved")
            except InputError as error:
                try:
                    data.read_torch(previous)
                except InputError:
                    raise InputError(f"{error}; nor is {previous} whole: remove both to begin anew") from None
                os.replace(previous, last)
                print(f"warning: {error}; continuing from the checkpoint before it", file=sys.stderr)
        yield


class Busy(InputError):
    """A run's folder that another process holds."""


class Signals:
    """SIGINT and SIGTERM while this is entered: `caught` has the last one's number, 0 before; the process goes on, only
    what `unless` runs ends at once."""

    caught, at_once = 0, False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def catch(self, number, _):
        self.caught = number
        if self.at_once:
            self.at_once = False
            raise SystemExit(128 + number)

    def unless(self, function, *arguments):
        """function(*arguments), or None where a signal came before or ended it."""
        try:
            self.at_once = True
            return None if self.caught else function(*arguments)
        except SystemExit:
            return None
        finally:
            self.at_once = False


SAVE_SECONDS = 600  # at most this much work is lost to a crash


def train(recipe, folder="data", out=None, device=None, quiet=False):
    """Train a recipe on the data in `folder`, continuing what `out` holds, and return the result as a plain dict.

    The result (also out/result.json): recipe, data, frames, parameters, the last and the best epoch's scores on the
    test set (mm, per action and on average), the two yardsticks, time, seed, versions, device. SIGINT and SIGTERM
    finish the step, save and raise SystemExit(128 + signal). Under torchrun the processes share each batch; the first
    evaluates, writes and returns the result, the others None.
    InputError: missing or broken data, an impossible recipe, a folder with another run, a loss that is not finite.
    """
    check_recipe(recipe)
    out = Path(out or Path("results") / recipe.name)
    with processes(evaluation.pick_device(device)) as (rank, world, device):
        if recipe.deterministic:  # an operation without a deterministic form is an error then
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
            torch.use_deterministic_algorithms(True)
        stores = {split: make_store(recipe, folder, split, device) for split in ("train", "test")}
        with locked(out) if rank == 0 else nullcontext(), Signals() as signals:  # one process writes
            run = Run(recipe, stores["train"], out, device, data.provenance(stores["train"].sequences), fingerprint(stores),
                      rank, world)
            agreed(world, 0)  # the folder is whole
            run.resume()
            show, saved = Progress(run, quiet or rank > 0), time.monotonic()
            while (epoch := len(run.history)) < run.epochs:  # a line of the log ends an epoch
                first, last = epoch * run.epoch_steps, min((epoch + 1) * run.epoch_steps, run.total_steps)
                run.begin_epoch(epoch)
                order, started = epoch_order(recipe, len(run.store), epoch).to(device), time.perf_counter()
                for chunk in run.batches(order)[run.step - first:last - first]:
                    run.train_step(chunk)
                    show.step()
                    stop, due = agreed(world, signals.caught, time.monotonic() - saved > SAVE_SECONDS)
                    if stop or due or run.step == last:
                        run.check_finite()
                        run.seconds += time.perf_counter() - started
                        run.save()
                        if stop:
                            raise SystemExit(128 + stop)
                        saved, started = time.monotonic(), time.perf_counter()
                signals.unless(end_epoch, run, stores["test"], last - first, show)
                (stop,) = agreed(world, signals.caught)
                if stop:  # nothing is lost: who continues from the last step ends the epoch first
                    raise SystemExit(128 + stop)
                run.save()
            if rank > 0:
                return None
            result = signals.unless(finish, run, stores)
            if result is None:
                raise SystemExit(128 + signals.caught)
            result["files"] = files_read(recipe, folder)
            data.write_atomically(out / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    if importlib.util.find_spec("matplotlib") and not quiet:
        evaluation.plot_curves(out)
    return result


def agreed(world, *values):
    """The largest of each whole number over all processes, so that all of them stop or save after the same step."""
    if world == 1:
        return values
    values = torch.tensor([int(value) for value in values])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def end_epoch(run, test_store, steps, show):
    """Score the epoch where it is due, keep the best weights, add a line to the log."""
    recipe, epoch = run.recipe, math.ceil(run.step / run.epoch_steps)
    row = {"epoch": epoch, "loss": run.losses[:steps].mean().item(), "lr": run.optimizer.param_groups[0]["lr"],
           "mpjpe": None, "p_mpjpe": None, "seconds": round(run.seconds, 1)}
    if run.rank == 0 and (epoch % recipe.eval_every == 0 or run.step == run.total_steps):
        run.last = evaluation.evaluate(run.model, test_store, flip=recipe.flip_test)
        row["mpjpe"], row["p_mpjpe"] = evaluation.headline(run.last, recipe.data)
        if run.best is None or row["mpjpe"] < evaluation.headline(run.best, recipe.data)[0]:
            run.best = {"epoch": epoch, **run.last}
            data.write_atomically(run.out / "best.pt", lambda file: torch.save({**run.weights(), "epoch": epoch}, file))
    run.history.append(row)
    if run.rank:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, row)
    writer.writeheader()
    writer.writerows(run.history)
    data.write_atomically(run.out / "log.csv", lambda file: file.write(text.getvalue().encode()))
    show.epoch(row)


def finish(run, stores):
    """The result of a finished run: what was trained on what, its scores beside the yardsticks, and where."""
    recipe = run.recipe
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True,  # a shell: git may be missing
                            cwd=Path(__file__).parent).stdout.strip()
    result = {"recipe": dataclasses.asdict(recipe), "data": run.trained_on, "train_frames": len(stores["train"]),
              "test_data": data.provenance(stores["test"].sequences), "test_frames": int(stores["test"].valid.sum()),
              "parameters": parameters(recipe), "epochs": run.step / run.epoch_steps,
              "last": run.last, "best": run.best, "yardsticks": evaluation.yardsticks(stores["train"], stores["test"]),
              "seconds": run.seconds, "seed": recipe.seed, "commit": commit, "torch": torch.__version__,
              "numpy": np.__version__, "python": platform.python_version(),
              "device": f"{run.world} x " * (run.world > 1) + device_name(run.device)}
    if recipe.refine:
        pose = evaluation.predict(run.model, stores["test"], flip=recipe.flip_test).to(run.device)
        with torch.no_grad():
            pose = refined(run.refinement.eval(), stores["test"], pose, torch.arange(len(pose), device=run.device))
        result[REFINED] = evaluation.score(pose.cpu(), stores["test"])
    grid = getattr(run.model, "autogrids", None)
    if grid is not None:
        result["autogrids"] = {"cells_changed": evaluation.cells_changed(run.model), "dropped": grid.dropped(),
                               "layout": grid.assignment().argmax(1).view(grid.grid_shape).tolist()}
    return result


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a plain line an epoch."""

    def __init__(self, run, quiet):
        self.run, self.quiet = run, quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self.started, self.first, self.shown = time.perf_counter(), run.step, 0.0

    def line(self, loss, lr):
        run = self.run
        seconds = time.perf_counter() - self.started
        rate = max(run.step - self.first, 1) / seconds  # steps a second, evaluation included
        left = (run.total_steps - run.step) / rate
        return (f"{run.recipe.name}  epoch {run.step / run.epoch_steps:.1f} of {run.recipe.epochs:g}  loss {loss:.4f}  "
                f"lr {lr:.1e}  {rate * run.recipe.batch:.0f} poses/s  {left / 60:.1f} min left")

    def step(self):
        if self.terminal and time.perf_counter() - self.shown > 1:
            self.shown = time.perf_counter()
            run = self.run
            done = (run.step - 1) % run.epoch_steps
            loss = run.losses[max(0, done - 49):done + 1].mean().item()
            print("\r\033[K" + self.line(loss, run.optimizer.param_groups[0]["lr"]), end="", file=sys.stderr, flush=True)

    def epoch(self, row):
        if not self.quiet:
            scores = "" if row["mpjpe"] is None else f"  MPJPE {row['mpjpe']:.1f} mm  P-MPJPE {row['p_mpjpe']:.1f} mm"
            print(("\r\033[K" if self.terminal else "") + self.line(row["loss"], row["lr"]) + scores, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Speed: each fast form against the plain one, in one run


def plain_grid_conv(layer, x):
    """D-GridConv (or GridConv) as one first writes Eq. 8, for padding ("circular", "replicate"): for each branch pad,
    unfold, scale by alpha, one matrix product; add the branches. x (B, C_in, H, P) -> (B, C_out, H, P)."""
    B, C, H, P = x.shape
    K, out = layer.kernel_size, 0
    alpha = 1 if type(layer) is gridconv.GridConv else layer.attention(x).reshape(B, 1, H * P, K * K).transpose(2, 3)
    for branch, mode in enumerate(("circular", "replicate")):
        padded = F.pad(x, (K // 2,) * 4, mode=mode)
        patches = F.unfold(padded, K).view(B, C, K * K, H * P) * alpha
        out = out + (layer.weight[branch].flatten(1) @ patches.flatten(1, 2)).view(B, -1, H, P)
    return out if layer.bias is None else out + layer.bias.sum(0)[:, None, None]


def plain_graph_conv(layer, x):
    """AdaptiveGraphConv as one first writes Eq. 2-3: a product for each subset and embedding. Features (B, C, T, J)."""
    (B, C, T, J), E, out = x.shape, layer.embedding, 0
    weight, bias = layer.embed.weight.view(2, 3, E, C, 1, 1), layer.embed.bias.view(2, 3, E)
    for k in range(3):
        theta = F.conv2d(x, weight[0, k], bias[0, k]).permute(0, 3, 1, 2).reshape(B, J, E * T)
        phi = F.conv2d(x, weight[1, k], bias[1, k]).reshape(B, E * T, J)
        graph = layer.A[k] + layer.B[k] + torch.softmax(theta @ phi / (E * T), dim=-2)
        mixed = (x.reshape(B, C * T, J) @ graph).view(B, C, T, J)
        out = out + F.conv2d(mixed, layer.W[:, :, k, :, None], layer.bias[k])
    return torch.relu(layer.dropout(layer.norm(out)) + layer.shortcut(x))


def plain_block(block, x):
    """AGCNBlock on features (B, C, T, J)."""
    conv = block.temporal
    y = F.conv2d(plain_graph_conv(block.spatial, x), conv.weight.mT, conv.bias, conv.stride[::-1], conv.padding[::-1])
    y = block.norm(y) if block.shortcut is None else block.norm(y) + block.shortcut(x)
    return torch.relu(y) if block.relu else y


def plain_glagcn(model, x, return_sequence=False):
    """GLAGCN on features (B, C, T, J): x (B, T, J, 2) -> (B, J, 3), and the sequence (B, T, J, 3)."""
    x = model.data_norm(x.flatten(0, 1).flatten(1)).view(x.shape).permute(0, 3, 1, 2)
    for block in (model.expand, *model.reconstruction):
        x = plain_block(block, x)
    sequence = plain_block(model.sequence_head, x).permute(0, 2, 3, 1) if return_sequence else None
    for module in model.strided:
        y = module.dropout(plain_block(module.second, module.dropout(plain_block(module.first, x))))
        x = y + x[:, :, module.frame::module.width]
    pose = model.head(x.mean(2).transpose(1, 2))
    return (pose, sequence) if return_sequence else pose


def made_plain(model):
    """The same GridLiftingNetwork or GLAGCN, which from now on computes by the plain forms."""
    for layer in model.modules():
        if isinstance(layer, gridconv.GridConv):
            layer.forward = functools.partial(plain_grid_conv, layer)
    if isinstance(model, GLAGCN):
        model.forward = functools.partial(plain_glagcn, model)
    return model


class SampleByFrame(torch.utils.data.Dataset):
    """Windows fetched one by one on the host, as most code in the field does: what the frame store is measured against."""

    def __init__(self, store, frames):
        self.store, self.frames = store, frames
        self.pose, self.target = store.input.cpu().numpy(), store.target.cpu().numpy()
        self.bounds = list(zip(store.first.tolist(), store.last.tolist()))

    def __len__(self):
        return len(self.pose)

    def __getitem__(self, i):
        (first, last), half = self.bounds[i], self.frames // 2
        window = self.pose[max(first, i - half):min(last, i + half) + 1]
        missing = max(first - (i - half), 0), max(i + half - last, 0)
        return np.pad(window, (missing, (0, 0), (0, 0)), mode="edge"), self.target[i]


def interleaved(fast, plain):
    """(seconds of fast, seconds of plain, ratio): medians over 7 interleaved pairs, after one of each to warm up."""
    def clock(run):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started
    clock(fast), clock(plain)
    times = [(clock(fast), clock(plain)) for _ in range(7)]
    return (*(statistics.median(column) for column in zip(*times)), statistics.median(p / f for f, p in times))


def step_memory(build, device):
    """The most memory in bytes that a training step of the model build() on random poses takes on top of the weights and
    the batch (on a CPU of Linux alone). For a process of its own: there it is the growth of the largest resident size."""
    model = build().to(device)
    shape, batch = ((), 200) if model.receptive_field == 1 else ((model.receptive_field,), 8)
    pose, target = torch.randn(batch, *shape, 17, 2, device=device), torch.randn(batch, 17, 3, device=device)
    cuda, status = device.type == "cuda", Path("/proc/self/status")
    resident = lambda: 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) if status.exists() else math.nan
    held = torch.cuda.memory_allocated(device) if cuda else resident()
    optimizer = torch.optim.Adam(model.parameters())
    mean_distance(model(pose), target).backward()
    optimizer.step()
    return batch, (torch.cuda.max_memory_allocated(device) if cuda else resident()) - held


def bench(device=None, full_size=False, compile=False):
    """Print how much faster the fast forms are than the plain ones, measured side by side on this machine, and what a step
    costs beside: feeding, memory, poses a second. full_size: steps at Human3.6M's size instead, extrapolated to epochs.
    compile: also training steps through torch.compile against those without, after minutes of compiling."""
    device = evaluation.pick_device(device)
    torch.manual_seed(0)
    a = torch.randn(2048, 2048, device=device)
    rate = 2 * 2048 ** 3 / interleaved(lambda: a @ a, lambda: a @ a)[0]  # operations a second: the floor that the hardware sets
    print(f"{device_name(device)}, torch {torch.__version__}; float32 matrix products at {rate / 1e9:.0f} GFLOP/s\n")
    if full_size:
        return bench_full_size(device)
    rows = []

    def row(label, fast, plain, samples=None, flops=None):
        times = interleaved(fast, plain)
        rows.append([label, f"{times[2]:.2f}x", f"{1000 * times[0]:.1f}", f"{1000 * times[1]:.1f}",
                     samples and f"{samples / times[0]:,.0f}", flops and f"{100 * flops / times[0] / rate:.0f} %"])

    def step(model, x, target):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def run():
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        return run

    def network(name, about, model, shape, compile):
        x, target = torch.randn(*shape, 2, device=device), torch.randn(shape[0], shape[-1], 3, device=device)
        plain = made_plain(copy.deepcopy(model))
        row(f"{name}, training step ({about})", step(model, x, target), step(plain, x, target), len(x))
        if compile:
            row(f"{name}, training step, torch.compile against none ({about})", step(compiled(model, device), x, target),
                step(model, x, target))
        model.eval(), plain.eval()
        row(f"{name}, evaluation ({about})", torch.no_grad()(lambda: model(x)), torch.no_grad()(lambda: plain(x)), len(x))

    # GridConv
    layer, push = gridconv.DynamicGridConv(256, 256).to(device), torch.randn(200, 256, 5, 5, device=device)
    fast_x = torch.randn_like(push).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain_x = fast_x.detach().contiguous().requires_grad_()
    row("D-GridConv layer, forward and backward (batch 200, C = 256)", lambda: layer(fast_x).backward(push),
        lambda: plain_grid_conv(layer, plain_x).backward(push), flops=200 * 3 * 2 * 281 * 256 ** 2)
    network("GridConv network", "batch 200", gridconv.GridLiftingNetwork().to(device), (200, 17), compile)

    # GLA-GCN; without dropout, whose random numbers cost both forms the same
    B, T, C, J = 8, 243, 96, 17
    A = GLAGCN(filter_widths=(3,)).expand.spatial.A
    block = AGCNBlock(C, C, A, dropout=0.0).to(device)
    fast_x = torch.randn(B, C, J, T, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    plain_x = fast_x.detach().transpose(2, 3).contiguous().requires_grad_()
    fast_push, plain_push = torch.randn_like(fast_x), torch.randn_like(plain_x)
    row(f"AGCN block, forward and backward (batch {B}, C = {C}, T = {T})", lambda: block(fast_x).backward(fast_push),
        lambda: plain_block(block, plain_x).backward(plain_push),
        flops=B * J * T * 3 * 2 * (3 * C * C + 6 * C * C // 4 + 9 * C * C + 3 * J * C + 3 * J * C // 4))
    for widths, size in (((3,) * 3, 64), ((3,) * 5, 8)):
        model, T = GLAGCN(filter_widths=widths, dropout=0.0, unshared_weight=0.0).to(device), 3 ** len(widths)
        network("GLA-GCN", f"batch {size}, C = {C}, T = {T}", model, (size, T, J), compile and T == 27)

    def endless(batches):
        while True:
            yield from batches()

    store = data.FrameStore(data.synthesize(0), "width", data.SKELETONS["h36m17"], device)
    for frames, size in ((1, 200), (27, 64)):
        loader = endless(lambda: torch.utils.data.DataLoader(SampleByFrame(store, frames), size, shuffle=True))
        order = endless(lambda: torch.randperm(len(store), device=device).split(size))
        row(f"feeding, T = {frames} (40 batches of {size}), against a Dataset and DataLoader",
            lambda: [store.batch(next(order), frames) for _ in range(40)],
            lambda: [[part.to(device) for part in next(loader)] for _ in range(40)], 40 * size)
    print(evaluation.markdown(["what", "ratio", "ms", "plain ms", "poses/s", "of the matrix rate"], rows))
    print(f"\nAn epoch's time outside its steps (gridconv-synthetic): {100 * outside_steps(store, device):.2f} %\n")
    memory = []
    for label, build in (("GridConv network", gridconv.GridLiftingNetwork), ("GLA-GCN, C = 96, T = 27", functools.partial(GLAGCN, filter_widths=(3,) * 3)),
                         ("GLA-GCN, C = 96, T = 243", GLAGCN)):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            batch, taken = fresh.submit(step_memory, build, device).result()
        memory.append([label, batch, f"{taken / 2 ** 20:,.0f}", f"{taken / batch / 2 ** 20:,.2f}"])
    print(evaluation.markdown(["peak memory of a training step", "batch", "MiB", "MiB a sample"], memory))


def outside_steps(store, device):
    """The share of an epoch's time that is not spent in training steps: order, batches, schedules, bookkeeping."""
    run, inside = Run(RECIPES["gridconv-synthetic"], store, ".", device), 0.0

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started = wait()
    run.begin_epoch(0)
    for chunk in run.batches(epoch_order(run.recipe, len(store), 0).to(device)):
        before = wait()
        run.train_step(chunk)
        inside += wait() - before
        agreed(1, 0, False)
    run.check_finite()
    return 1 - inside / (wait() - started)


def bench_full_size(device):
    """Seconds an epoch and hours a run of published rows on as many frames as Human3.6M has, from a few steps timed here, and
    how many times as long the plain forms take, in float32 and not compiled."""
    frames = data.H36M_FRAMES["train"][0]
    motion = data.synthesize(0)
    sequences = motion * math.ceil(frames / sum(len(s.pose_3d) for s in motion))
    rows, stores, plain = [], {}, {}
    faster = dict(precision="bf16", micro_batch=128)
    plan = [("gridconv-gt", {}), ("glagcn-gt-243", dict(micro_batch=64)), ("glagcn-gt-243-reconstruct", dict(micro_batch=64))]
    if device.type == "cuda":
        plan += [("gridconv-gt", dict(precision="tf32", compile=True)), ("glagcn-gt-243", faster),
                 ("glagcn-gt-243", {**faster, "compile": True}), ("glagcn-gt-243-reconstruct", faster)]
    for name, fields in plan:
        recipe = dataclasses.replace(RECIPES[name], **fields)
        if device.type == "cpu":  # memory and patience: more and smaller steps an epoch, the same arithmetic
            recipe = dataclasses.replace(recipe, batch=16 if recipe.method == "glagcn" else 200, micro_batch=0, compile=False)
        if recipe.normalise not in stores:
            stores[recipe.normalise] = data.FrameStore(sequences, recipe.normalise, data.SKELETONS["h36m17"], device)
        store = stores[recipe.normalise]
        count = 20 if device.type == "cuda" else 1
        seconds, steps = step_seconds(recipe, store, device, count)
        if name not in plain:
            simple = dataclasses.replace(recipe, precision="float32", compile=False)
            plain[name] = step_seconds(simple, store, device, count, plain=True)[0]
        rows.append([name, recipe.batch, recipe.precision + ", compiled" * recipe.compile, f"{1000 * seconds:,.1f}",
                     f"{plain[name] / seconds:.2f}x", f"{steps:,}",
                     f"{seconds * steps:,.0f}", f"{recipe.epochs:g}", f"{seconds * steps * recipe.epochs / 3600:,.2f}"])
    print(f"{len(store):,} frames of procedural motion (Human3.6M has {frames:,}); an epoch is steps times the median of the steps "
          "timed.\n")
    print(evaluation.markdown(["recipe", "batch", "precision", "ms a step", "against plain", "steps an epoch", "seconds an epoch",
                               "epochs", "hours"], rows))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_value(text, default):
    """An option's text as the type of the field's default: "3,3:3,3" is (3, (3, 3), 3)."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise InputError(f"{text!r} is not true or false")
        return text.lower() in ("true", "yes", "1")
    if isinstance(default, tuple):
        def item(word):
            return tuple(item(w) for w in word.split(":")) if ":" in word else int(word) if word.isdecimal() else word
        return tuple(item(word) for word in text.split(",") if word)
    try:
        return type(default)(text)
    except ValueError:
        raise InputError(f"{text!r} is not a {type(default).__name__}") from None


def add_recipe_options(parser):
    """An option for every recipe field; left out, the recipe's own value stands."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Recipe), re.M))
    for field in dataclasses.fields(Recipe):
        if field.name not in ("name", "row", "ours", "weights") and not field.name.startswith("paper"):
            switch = dict(nargs="?", const="true") if isinstance(field.default, bool) else {}  # --flips is --flips true
            parser.add_argument("--dataset" if field.name == "data" else "--" + field.name.replace("_", "-"), **switch,
                                metavar="VALUE", dest="field_" + field.name,
                                help=comments.get(field.name, "").replace("%", "%%") or None)


GRIDS = ("gridconv", "gridconv-temporal")
READ_BY = {  # fields that not every method reads
    "layout layout_seed grid padding temperature anneal_epochs noise_epochs grid_lr": GRIDS,
    "kernel_sizes attention": ("gridconv",), "blocks": ("gridconv", "fc", "gcn"), "hidden": (*GRIDS, "fc", "gcn"),
    "filter_widths norm_schedule": ("gridconv-temporal", "glagcn"),
    "channels reconstruct reconstruct_blocks unshared_weight causal adaptive temporal head head_scale normalisation "
    "stage_one_epochs refine swap_sides": ("glagcn",)}


def with_options(recipe, args, strict=False):
    """The recipe with the options given; strict: InputError for one that its method does not read."""
    changes = {}
    for field in dataclasses.fields(Recipe):
        text = getattr(args, "field_" + field.name, None)
        if text is not None:
            try:
                changes[field.name] = parse_value(text, field.default)
            except InputError as error:
                raise InputError(f"--{field.name.replace('_', '-')}: {error}") from None
    recipe = dataclasses.replace(recipe, **changes)
    for fields, methods in READ_BY.items():
        unread = changes.keys() & fields.split() if strict and recipe.method not in methods else ()
        if unread:
            raise InputError(f"--{min(unread).replace('_', '-')}: {recipe.method} has none, only {', '.join(methods)}")
    return recipe


def parameters(recipe):
    """The number of parameters that a recipe trains, the refinement network's among them."""
    model = evaluation.build_model(recipe)
    extra = Refinement(model.num_joints).parameters() if recipe.refine else ()
    return sum(p.numel() for p in (*model.parameters(), *extra))


# ---------------------------------------------------------------------------------------------------------------------
# What a recipe costs, and what of it can be run here

FIGURES = {"mpjpe": "MPJPE, mm", "p_mpjpe": "P-MPJPE, mm", "pck": "PCK, %", "auc": "AUC, %"}  # of papers, see eval.quoted
TOLERANCE = 0.5  # mm, or points of PCK and AUC: a figure this near the paper's counts as reproduced


def paper_figures(recipe):
    """{figure: the paper's value} of a recipe, empty where it reproduces no published row."""
    return {name: value for name in FIGURES if (value := getattr(recipe, "paper_" + name))}


@functools.cache
def arithmetic(recipe):
    """Floating-point operations of a training step on one sample, forward and backward, counted on the meta device."""
    model = evaluation.build_model(recipe).to("meta").train()
    frames = [model.receptive_field] * (model.receptive_field > 1)
    pose = torch.empty(2, *frames, model.num_joints, 2, device="meta")
    with FlopCounterMode(display=False) as counter:
        outputs = model(pose, return_sequence=True) if recipe.reconstruct else [model(pose)]
        sum(out.sum() for out in outputs).backward()
    return counter.get_total_flops() / 2


def missing_files(recipe, folder):
    """The names of the files that a recipe needs and `folder` lacks; evaluating needs the test set's alone."""
    paths = data.files_of(recipe, folder)[-1 if recipe.weights else 0:]
    return [path.name for path in paths if not path.exists()]


def epoch_samples(recipe, folder, counted):
    """Training samples an epoch: of the data in `folder`, of Human3.6M as published where it is not there, else None.
    `counted` keeps the frames of each dataset from one call to the next."""
    key = recipe.data, bool(missing_files(recipe, folder))  # other keypoints of the same data may be here
    if key not in counted:
        absent = data.H36M_FRAMES["train"][0] if recipe.data in ("h36m", "gridconv") else None
        counted[key] = absent if key[1] else sum(len(s.pose_3d) for s in data.load_dataset(recipe, folder, "train"))
    return counted[key] and counted[key] * (2 if recipe.flips else 1)


def speed(recipe, device, timed):
    """Operations a second that training steps of this method and width reach on the device, by one short timing (of 27
    frames at most and up to 96 channels, without reconstruction). `timed` keeps it from one call to the next."""
    most = 512 if device.type == "cuda" else 32 if recipe.method == "glagcn" else 200  # so that it stays short
    small = dataclasses.replace(recipe, filter_widths=recipe.filter_widths[:3], channels=min(recipe.channels, 96), micro_batch=0,
                                batch=min(recipe.batch, most), reconstruct=False, stage_one_epochs=0.0, refine=False)
    key = (small.method, small.hidden, small.channels)
    if key not in timed:
        print(f"timing a step of {small.method} on {device_name(device)} ...", file=sys.stderr, flush=True)
        pose = np.random.default_rng(0).random((256, len(data.SKELETONS[small.skeleton].joints), 3), np.float32)
        sequence = data.Sequence("S1", "timing", "", 1000 * pose[..., :2], pose, pose[:, 0] + 4, data.H36M_INTRINSICS[0],
                                 (1000, 1000), 50.0)
        store = data.FrameStore([sequence] * 8, small.normalise, data.SKELETONS[small.skeleton], device, target=small.target)
        seconds, _ = step_seconds(small, store, device, steps=1)
        timed[key] = small.batch * arithmetic(small) / seconds
    return timed[key]


def cost(recipe, folder, device, counted, timed):
    """(operations an epoch, hours of training) of a recipe on the device, estimated; None where not known."""
    samples = None if recipe.weights else epoch_samples(recipe, folder, counted)
    if not samples:
        return None, None
    total = samples * arithmetic(recipe)
    return total, recipe.epochs * total / speed(recipe, device, timed) / 3600


def list_recipes(folder="data", device=None):
    """Print every recipe: the row it reproduces, the paper's figure, its data and whether that is here, its parameters,
    arithmetic an epoch and hours on this device (one short timing of each method and width), and what of it is ours."""
    device, rows, counted, timed = evaluation.pick_device(device), [], {}, {}
    data.listing(folder)  # permitted?
    for r in RECIPES.values():
        missing = missing_files(r, folder)
        total, hours = cost(r, folder, device, counted, timed)
        rows.append([r.name, r.row, " / ".join(f"{v:g}" for v in paper_figures(r).values()) or None, f"{r.data} {r.keypoints}",
                     f"no: {', '.join(missing)}" if missing else "yes", f"{parameters(r) / 1e6:.2f} M",
                     total and f"{total / 1e12:,.4g}", hours and f"{hours:,.3g}", r.ours or None])
    header = ["recipe", "row", "paper", "data", f"present in {folder}", "parameters", "TFLOP an epoch", "hours here", "ours"]
    print(evaluation.markdown(header, rows))
    print(f"\nPapers' figures: MPJPE / P-MPJPE in mm, on 3DHP MPJPE in mm / PCK / AUC in %; within {TOLERANCE} mm or\n"
          f"points counts as reproduced. Hours of training on {device_name(device)}, from one short timing of each method and\n"
          "width; evaluation is not counted. Rows without hours:\ntheir data is not here, or they evaluate what "
          "another row trained.")


def device_name(device):
    """What a device is called in tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU thread" + "s" * (torch.get_num_threads() > 1)


# ---------------------------------------------------------------------------------------------------------------------
# Ablations and reports

# noise_epochs is a fraction of the run here: one epoch of three and a half, near the paper's 30 of 100
_LAYOUTS = {"random": (38.1, dict(layout="random")), "handcrafted": (37.1, {}),
            "learnable": (36.4, dict(layout="autogrids", noise_epochs=2 / 7)),
            "learnable from random logits": (None, dict(layout="autogrids-random", grid_lr=3.0)),
            "those random logits, frozen": (None, dict(layout="autogrids-random", grid_lr=0.0))}
_LEARN = dict(layout="autogrids", loss="mse", schedule="0.96/10", noise_epochs=0.3)
_PAIRS = {"#1": "circular", "#2": "replicate", "#3": ("replicate", "circular"), "#4": ("circular", "replicate")}
# table -> (base recipe, what the paper's figures are, {row: (paper's figure or None, fields)})
ABLATIONS = {
    "gridconv-5": ("gridconv-mocap", "P1*, Table 5", _LAYOUTS),
    "gridconv-B": ("gridconv-mocap", "P1*, Table B", {
        "no shuffle": (37.1, {}), **{f"{how} shuffle": (paper, dict(layout=how)) for how, paper in
                                     (("row", 38.4), ("column", 37.7), ("global", 39.4))}}),
    "gridconv-6": ("gridconv-gt", "P1*, Table 6", {
        "17 joints, handcrafted": (37.1, {}), "17 joints, learnable": (36.4, _LEARN),
        "32 joints, handcrafted": (35.0, dict(layout="handcrafted", **_JOINTS_32)),
        "32 joints, learnable": (33.4, dict(_LEARN, **_JOINTS_32))}),
    "gridconv-D": ("gridconv-mocap", "P1*, Table D, vanilla", {
        name: (paper, dict(attention="", padding=tuple(_PAIRS[part] for part in name.split("+")))) for name, paper in
        (("#1", 40.8), ("#2", 42.3), ("#3", 41.1), ("#4", 40.4), ("#1+#1", 40.2), ("#2+#2", 41.2), ("#3+#3", 41.5),
         ("#4+#4", 40.5), ("#1+#2", 39.0), ("#1+#3", 39.2), ("#1+#4", 39.3), ("#2+#3", 40.6), ("#2+#4", 39.7), ("#3+#4", 39.5),
         ("#1+#2+#3+#4", 38.9))}),
    "gridconv-E": ("gridconv-mocap", "P1*, Table E", {
        name: (paper, dict(kernel_sizes=sizes)) for name, paper, sizes in
        (("3-33-3", 37.1, (3, (3, 3), 3)), ("3-31-3", 37.2, (3, (3, 1), 3)), ("3-53-3", 37.8, (3, (5, 3), 3)),
         ("3-33-1", 37.7, (3, (3, 3), 1)))}),
    "neighbours": ("gridconv-mocap", "P1*, Tables 2 and 5", {
        "D-GridConv": (37.1, {}), "fully connected": (45.5, dict(method="fc", hidden=1024)),
        "graph convolution": (None, dict(method="gcn", hidden=256))}),
    "glagcn-6": ("glagcn-mocap", "P2 on gt, Table 6", {
        "without AGCN (ST-GCN)": (28.0, dict(adaptive=False)), "without strides": (30.6, dict(temporal="mean")),
        "without individual layers": (27.7, dict(head="full")), "left and right swapped": (28.1, dict(swap_sides=True)),
        "GLA-GCN": (25.8, {})}),
    "glagcn-heads": ("glagcn-mocap", "no such table", {
        f"{'with' if reconstruct else 'without'} reconstruction, lambda {weight:g}":
            (None, dict(reconstruct=reconstruct, unshared_weight=weight))
        for reconstruct in (False, True) for weight in (0.0, 0.5, 1.0)}),
}


def step_seconds(recipe, store, device, steps=12, plain=False):
    """(seconds of a training step, steps an epoch) of the recipe on a store's frames: the median of `steps` steps, after
    three others; of a recipe with two stages the mean of both, as it divides its epochs. plain: of the plain form."""
    share, seconds = recipe.stage_one_epochs / recipe.epochs, 0.0
    for stage_one, weight in ((1.0, share), (0.0, 1 - share)):
        if weight == 0:
            continue
        run, times = Run(dataclasses.replace(recipe, epochs=1.0, stage_one_epochs=stage_one), store, ".", device), []
        if plain:
            made_plain(run.model)
        run.begin_epoch(0)
        for chunk in run.batches(epoch_order(recipe, len(run.store), 0).to(device))[:steps + 3]:
            started = time.perf_counter()
            run.train_step(chunk)
            run.losses.sum().item()  # waits for a GPU
            times.append(time.perf_counter() - started)
        seconds += weight * statistics.median(times[3:] or times)
    return seconds, run.epoch_steps


def ablate(table, folder, out, minutes, seeds, base_options, device=None, only=""):
    """Train the rows of a table (or those that `only` names) for the same time, with several seeds, and return the table.

    Each row's number of epochs is what fits into `minutes` by a timing made once and kept (out/epochs.json), so a
    repeated command continues. The same command in a second process takes the runs that the first has not begun.
    """
    if table not in ABLATIONS:
        raise InputError(f"table: unknown {table!r}, expected one of {', '.join(ABLATIONS)}")
    if not 0 < minutes < 1e6 or seeds < 1:
        raise InputError(f"--minutes {minutes:g}, --seeds {seeds}: expected numbers above 0")
    base, paper_is, rows = ABLATIONS[table]
    base, out = base_options(RECIPES[base]), Path(out)
    wanted = only.split(";") if only else [*rows]
    if not set(wanted) <= rows.keys():
        raise InputError(f"--only {only!r}: expected some of '{';'.join(rows)}'")
    rows = {label: rows[label] for label in wanted}

    def recipe_of(label, epochs, seed=0):
        fields = rows[label][1]
        recipe = dataclasses.replace(base, **{"name": f"{label}, seed {seed}", "seed": seed, "layout_seed": seed, "epochs": epochs,
                                              "eval_every": 10 ** 9, **fields})
        recipe = dataclasses.replace(recipe, noise_epochs=fields.get("noise_epochs", 0.0) * epochs,
                                     stage_one_epochs=0.75 * epochs if recipe.reconstruct else 0.0)
        check_recipe(recipe)
        return recipe

    plan = out / "epochs.json"
    if not plan.exists():
        epochs = {}
        for label in rows:
            timed, place = recipe_of(label, 1.0), evaluation.pick_device(device)
            seconds, steps = step_seconds(timed, make_store(timed, folder, "train", place), place)
            epochs[label] = max(0.01, round(minutes * 60 / seconds / steps, 2))
        text = json.dumps({"minutes": minutes, "epochs": epochs}, indent=1)
        if not plan.exists():  # a second process may have timed as well: the first plan stands
            data.write_atomically(plan, lambda file: file.write(text.encode()))
    with data.described(f"{plan}: planned for other runs", "give another --out, or remove it"):
        planned = data.read_json(plan)
        epochs = {label: float(planned["epochs"][label]) for label in rows}
        if planned["minutes"] != minutes:
            raise ValueError(f"{planned['minutes']:g} minutes a run")
    # seed by seed, so that an unfinished table is already fair
    waiting = {(label, seed): recipe_of(label, epochs[label], seed) for seed in range(seeds) for label in rows}
    results, lines = {}, []
    while waiting:
        for key, recipe in list(waiting.items()):
            try:
                results[key] = train(recipe, folder, out / re.sub(r"[^\w.]+", "-", recipe.name), device)
                del waiting[key]
            except Busy:
                pass
        if waiting:
            time.sleep(60)  # a try loads the data
    learnt = any("autogrids" in result for result in results.values())
    header = ["row", "epochs", "MPJPE mean", "spread", *(f"seed {s}" for s in range(seeds)), "P-MPJPE mean", "paper (Human3.6M)",
              *["cells changed", "joints dropped"] * learnt]
    for label, (paper, _) in rows.items():
        mine = [results[label, seed] for seed in range(seeds)]
        scores, aligned = zip(*(evaluation.headline(r["last"], base.data) for r in mine))
        grids = [r["autogrids"] for r in mine if "autogrids" in r]
        lines.append([label, f"{epochs[label]:g}", sum(scores) / seeds, max(scores) - min(scores), *scores, sum(aligned) / seeds,
                      paper, *[", ".join(str(grid["cells_changed"]) for grid in grids) or None,
                               ", ".join(str(grid["dropped"] or "none") for grid in grids) or None] * learnt])
    first = next(iter(results.values()))
    return (f"{table} on {first['data']}: {minutes:g} minutes a run on {first['device']}, last epoch, mm; spread is largest "
            f"minus smallest.\nThe paper's column is {paper_is}, on Human3.6M: other data, so only the order of the rows "
            f"compares.\n\n" + evaluation.markdown(header, lines))


REFINED = "refined, with the true root position and the intrinsics"  # the second figure of recipes with `refine`


def settings_changed(recipe):
    """How a run's recipe, as a dict, differs from the published one of its name: "epochs 10 (published: 100)", ..."""
    published = dataclasses.asdict(RECIPES.get(recipe["name"], Recipe()))
    if published["name"] != recipe["name"]:
        return ""
    return ", ".join(f"{key} {value} (published: {published[key]})" for key, value in recipe.items()
                     if key in published and key not in ("name", "seed") and evaluation._tuples(value) != published[key])


def measured_on(result):
    """The honest name of the data of a result: the test set's where that decides, else what the model was trained on."""
    recipe, test = result["recipe"], result.get("test_data", result["data"])
    needs_h36m = recipe["data"] in ("h36m", "gridconv") or recipe.get("weights")
    return test if evaluation.GENUINE.get(recipe["data"]) == test and (not needs_h36m or result["data"] == evaluation.HUMAN36M) \
        else result["data"]


def by_recipe(results):
    """Results in lists of the same recipe and data, apart from the seed; the headline rows first, then as --list has them."""
    groups, order = {}, [*HEADLINE, *RECIPES]
    for result in sorted(results, key=lambda r: r["seed"]):
        groups.setdefault(json.dumps([{**result["recipe"], "seed": None}, measured_on(result)]), []).append(result)
    place = lambda group: order.index(group[0]["recipe"]["name"]) if group[0]["recipe"]["name"] in order else len(order)
    return sorted(groups.values(), key=place)


def mean_and_spread(values):
    """(mean, largest minus smallest or None for a single value)."""
    return statistics.fmean(values), max(values) - min(values) if len(values) > 1 else None


def published_rows(results):
    """The papers' figures beside the measured ones, a dict for each figure of each recipe, only where the data is the
    paper's. Compared is the epoch that was best on the test set, as the papers do; a refined figure has the last alone."""
    rows = []
    for group in by_recipe(results):
        recipe = group[0]["recipe"]
        kind, changed = recipe["data"], settings_changed(recipe)
        if evaluation.GENUINE.get(kind) != measured_on(group[0]):
            continue
        pairs = [("", [r["best"] for r in group], [r["last"] for r in group])]
        if all(REFINED in r for r in group):
            pairs.append((f", {REFINED}", None, [r[REFINED] for r in group]))
        for ending, best, last in pairs:
            for name, title in FIGURES.items():
                if not recipe.get("paper_" + name):
                    continue
                figures = lambda scores: mean_and_spread([evaluation.quoted(s, kind)[name] for s in scores])
                (final, final_spread), (top, spread) = figures(last), figures(best) if best else (None, None)
                difference = (final if top is None else top) - recipe["paper_" + name]
                rows.append({"recipe": recipe["name"], "row": recipe["row"], "figure": title + ending,
                             "paper": recipe["paper_" + name], "best epoch": top, "difference": difference,
                             "within tolerance": abs(difference) <= TOLERANCE, "last epoch": final,
                             "seeds": [r["seed"] for r in group], "spread": final_spread if top is None else spread,
                             "settings changed": changed, "ours": recipe["ours"]})
    return rows


def report_table(results):
    """Finished runs as markdown: the papers' figures beside the measured ones where the data is the papers', then every
    run's data, errors, yardsticks and time; means over seeds."""
    rows, parts, lines = published_rows(results), [], []
    seeds = lambda numbers: ", ".join(map(str, numbers))
    if rows:
        header = ["recipe", "row", "figure", "paper", "best epoch", "difference", f"within {TOLERANCE}", "last epoch", "seeds",
                  "spread", "ours"]
        verdict = lambda r: "settings changed" if r["settings changed"] else "yes" if r["within tolerance"] else "no"
        parts += [evaluation.markdown(header, [
            [r["recipe"], r["row"], r["figure"], f"{r['paper']:g}", r["best epoch"], f"{r['difference']:+.2f}", verdict(r),
             r["last epoch"], seeds(r["seeds"]), r["spread"], r["ours"] or None] for r in rows]),
            f"""The papers quote the epoch that was best on the test set, so that one is compared: within {TOLERANCE} mm
(PCK, AUC: {TOLERANCE} points) counts as reproduced. Means over the seeds; spread is largest minus smallest."""]
    for group in by_recipe(results):
        first, kind, mean = group[0], group[0]["recipe"]["data"], statistics.fmean
        scores, aligned = zip(*(evaluation.headline(r["last"], kind) for r in group))
        name = first["recipe"]["name"] + " (settings changed)" * bool(settings_changed(first["recipe"]))
        lines.append([name, measured_on(first), seeds(r["seed"] for r in group), f"{first['test_frames']:,}",
                      *mean_and_spread(scores), mean(aligned), mean(evaluation.headline(r["best"], kind)[0] for r in group),
                      first["yardsticks"]["mean_pose"], first["yardsticks"]["affine"], mean(r["seconds"] for r in group) / 60])
    parts += [evaluation.markdown(["run", "data", "seeds", "test frames", "MPJPE", "spread", "P-MPJPE", "best epoch's MPJPE",
                                   "mean pose", "affine", "minutes"], lines),
              """Errors in mm on the test split, of the last epoch and of the epoch that was best on the test set: unweighted
over the actions on Human3.6M, over actions and subjects on HumanEva-I, over all frames elsewhere; means over the seeds.
Yardsticks, over all frames: predicting the training mean pose, and the best affine map of the 2D pose.
Minutes of training, evaluation not counted."""]
    if any(evaluation.GENUINE.get(r["recipe"]["data"]) != measured_on(r) for r in results):
        parts.append("""The data column says what a run was measured on: where it is not Human3.6M, HumanEva-I or MPI-INF-3DHP
itself, no figure compares with the papers'. For the papers' numbers put Human3.6M into data/ (README, section Data) and run
bash reproduce.sh again.""")
    return "\n\n".join(parts)


def run_section(r):
    """A run's part of the report: what it ran on, and its tables of the best and of the last epoch."""
    recipe, changed, source = argparse.Namespace(**r["recipe"]), settings_changed(r["recipe"]), measured_on(r)
    facts = (f"seed {r['seed']}, commit {r['commit'] or 'unknown'}, {r['device']}, torch {r['torch']}, Python {r['python']}, "
             f"{r['parameters']:,} parameters, {r['epochs']:g} epochs, {r['seconds'] / 60:.1f} minutes")
    facts += f"; ours: {recipe.ours}" * bool(recipe.ours) + f"; settings changed: {changed}" * bool(changed)
    parts = [f"## {recipe.name}, seed {r['seed']}: {recipe.row}", facts]
    if "autogrids" in r:
        dropped = ", ".join(map(str, r["autogrids"]["dropped"])) or "none"
        parts.append(f"Learnt grid: {r['autogrids']['cells_changed']} cells differ from the prior; joints dropped: {dropped}.")
    same = r["best"]["mpjpe"] == r["last"]["mpjpe"]
    best = f"Best epoch, {r['best']['epoch']:g}, chosen on the test set as the papers do" + ", which is the last" * same
    refined_title = f"Last epoch, {REFINED}"
    for title, scores in ((best, r["best"]), ("Last epoch", None if same else r["last"]), (refined_title, r.get(REFINED))):
        if scores:
            parts += [f"### {title}", evaluation.report(scores, source, recipe)]
    if "curves" in r:
        parts.append(f"![loss and MPJPE of {recipe.name}]({r['curves']})")
    return "\n\n".join(parts)


def write_report(folder):
    """report.md and report.json ({"rows": papers' figures beside measured, "runs": results}) of every finished run below a
    folder; returns the tables."""
    paths = sorted(Path(folder).glob("*/result.json"))
    if not paths:
        raise InputError(f"{folder}: no finished runs (*/result.json); train one first")
    results = []
    for path in paths:
        with data.described(f"{path}: not a result of train.py", "remove it"):
            results.append(data.read_json(path))
            report_table(results[-1:]), run_section(results[-1])
            if path.with_name("curves.png").exists():
                results[-1]["curves"] = f"{path.parent.name}/curves.png"
    table, results = report_table(results), [r for group in by_recipe(results) for r in group]
    text = "\n\n".join(["# Report", table, *map(run_section, results)]) + "\n"
    kept = json.dumps({"rows": published_rows(results), "runs": results}, indent=1)
    data.write_atomically(Path(folder) / "report.md", lambda file: file.write(text.encode()))
    data.write_atomically(Path(folder) / "report.json", lambda file: file.write(kept.encode()))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The main job: what reproduce.sh runs

HEADLINE = ("gridconv-gt", "gridconv-gt-learnable", "glagcn-gt-243")
EMBEDDED = ("gridconv-synthetic", "gridconv-synthetic-learnable", "glagcn-synthetic")
ONLY_BY_NAME = ("glagcn-gt-243-reconstruct-512",)  # days on any single GPU


def rows_to_run(folder, only="", everything=False):
    """The recipes to run: those named, else the headline rows (and with `everything` every other published row) whose
    data is here, else the embedded default. What a row evaluates comes before it. InputError: no such row or data."""
    data.listing(folder)
    if only:
        names = only.split(",")
        for name in names:
            if name not in RECIPES:
                raise InputError(f"--only: unknown {name!r}; python train.py --list shows the rows")
            if missing := missing_files(RECIPES[name], folder):
                raise InputError(f"{name} needs {', '.join(missing)}, not found in {folder}; python data.py check {folder} says "
                                 "where to get it")
    else:
        names = [*HEADLINE, *(n for n, r in RECIPES.items() if everything and paper_figures(r) and n not in ONLY_BY_NAME)]
        here = lambda name: not name or not missing_files(RECIPES[name], folder)
        names = [n for n in names if here(n) and here(RECIPES[n].weights)] or EMBEDDED
    return list(dict.fromkeys(n for name in names for n in (RECIPES[name].weights, name) if n))


def quickened(recipe):
    """The recipe with a tenth of its epochs, and of whatever is counted in them."""
    fields = ("epochs", "noise_epochs", "anneal_epochs", "stage_one_epochs")
    return dataclasses.replace(recipe, **{name: getattr(recipe, name) / 10 for name in fields})


def files_read(recipe, folder):
    """Name, size and time of each file that a recipe's data comes from: whether it is still the same data."""
    paths = [path for path in data.files_of(recipe, folder) if path.exists()]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def is_done(recipe, folder, place):
    """Whether `place` holds the result of this recipe on these very data files, going by their sizes and times."""
    try:
        result = data.read_json(place / "result.json")
        kept = Recipe(**{k: evaluation._tuples(v) for k, v in result["recipe"].items()})
        return kept == recipe and result["files"] == files_read(recipe, folder)
    except (ValueError, KeyError, TypeError, AttributeError):  # none there, or not one of this program
        return False


def evaluate_trained(recipe, folder, out, device=None):
    """The result of a recipe that trains nothing: the best and the last weights of the run of `recipe.weights` that stands
    beside `out`, on this recipe's test data. InputError: that run is not finished."""
    check_recipe(recipe)
    out = Path(out or Path("results") / recipe.name)
    source, device = out.with_name(out.name.replace(recipe.name, recipe.weights)), evaluation.pick_device(device)
    if source == out:
        raise InputError(f"--out {out}: expected a name with {recipe.name} in it; beside it, with {recipe.weights} instead, "
                         "stands the run that is evaluated")
    result = data.read_json(source / "result.json", f"first: python train.py {recipe.weights} --out {source}")
    store = make_store(recipe, folder, "test", device)
    for which in ("best", "last"):
        model = evaluation.load_model(source / f"{which}.pt").to(device)
        result[which] = {"epoch": model.epoch, **evaluation.evaluate(model, store, flip=recipe.flip_test)}
    result |= {"recipe": dataclasses.asdict(recipe), "test_data": data.provenance(store.sequences),
               "test_frames": int(store.valid.sum()), "yardsticks": {"mean_pose": None, "affine": None},
               "files": files_read(recipe, folder)}
    data.write_atomically(out / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    return result


def run_recipe(recipe, folder, out=None, device=None):
    """Train a recipe, or evaluate what another one trained; returns the result."""
    return (evaluate_trained if recipe.weights else train)(recipe, folder, out, device)


def reproduce(folder, out, device, only, everything, seeds, quick, options):
    """Say what will run and how long that takes, run it seed by seed, continuing and skipping what `out` holds, and write the
    report after every run; returns its tables. `options(recipe)` applies the command line's."""
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected a number above 0")
    if options(Recipe(seed=-1)).seed != -1:
        raise InputError("--seed: the main job runs seeds 0 to N-1; give --seeds N")
    device, out, names = evaluation.pick_device(device), Path(out), rows_to_run(folder, only, everything)
    plan, lines, hours, counted, timed, total = [], [], {}, {}, {}, 0.0
    for seed in range(seeds):
        for name in names:
            recipe = dataclasses.replace(options(RECIPES[name]), seed=seed)
            recipe = quickened(recipe) if quick else recipe
            check_recipe(recipe)
            place = out / (name + "-quick" * quick + f"-seed-{seed}" * (seed > 0))
            done = is_done(recipe, folder, place)
            if name not in hours:
                hours[name] = cost(recipe, folder, device, counted, timed)[1]
            total += 0.0 if done else hours[name] or 0.0
            state = "done" if done else "to be continued" if (place / "last.pt").exists() else "to run"
            lines.append([place.name, recipe.row, f"{recipe.epochs:g}", state, hours[name] and f"{hours[name]:.2f}"])
            plan += [] if done else [(recipe, place)]
    what = f"data in {folder}"
    if names[0] in EMBEDDED and not only:
        what = f"no published row's data in {folder}, so both methods on procedural motion"
    print(f"To run: {what}, on {device_name(device)}" + ", a tenth of the epochs" * quick + ".\n")
    print(evaluation.markdown(["run", "row", "epochs", "state", "hours"], lines))
    print(f"\nAbout {total * 60:.0f} minutes ({total:.1f} hours) of training, from one short timing of each method here;\n"
          "evaluation comes on top. Interrupted, the same command continues.\n", flush=True)
    for recipe, place in plan:
        run_recipe(recipe, folder, place, device)
        write_report(out)
    return f"{write_report(out)}\n\nEverything is in {out / 'report.md'}."


def main(argv=None):
    """Run the command line; see the module's docstring."""
    parser = data.Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a recipe's name (--list shows them), or reproduce, ablate, report or bench")
    parser.add_argument("what", nargs="?", help="with ablate: the table; with report: the folder")
    parser.add_argument("--list", action="store_true", help="show the recipes")
    parser.add_argument("--data", default="data", metavar="DIR", help="the folder with the data (default: data)")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: results/RECIPE)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--full-size", action="store_true", help="with bench: epochs at Human3.6M's size")
    parser.add_argument("--minutes", type=float, default=4.0, help="with ablate: training time of a run (default: 4)")
    parser.add_argument("--seeds", type=int, help="seeds 0 to N-1 (default: with ablate 3, with reproduce 1)")
    parser.add_argument("--only", metavar="ROW", default="", help="with reproduce (ROW,ROW) or ablate ('ROW;ROW'): these alone")
    parser.add_argument("--all", action="store_true", help="with reproduce: every published row whose data is here")
    parser.add_argument("--quick", action="store_true", help="with reproduce: a tenth of the epochs")
    add_recipe_options(parser)
    args = parser.parse_args(argv)
    command = "--list" if args.list else args.recipe
    takes = {"--list": "list", "report": "what", "bench": "full_size field_compile", "ablate": "what minutes seeds only",
             "reproduce": "only all seeds quick"}
    decided = ("epochs", "seed", "layout_seed", "eval_every", "noise_epochs", "stage_one_epochs")  # by an ablation itself
    for name, value in vars(args).items():
        fits = name in ("recipe", "data", "out", "device", *takes.get(command, "").split()) or (
            name.startswith("field_") and command not in ("--list", "report", "bench")
            and not (command == "ablate" and name.removeprefix("field_") in decided))
        if value != parser.get_default(name) and not fits:
            option = value if name == "what" else "--" + name.removeprefix("field_").replace("_", "-")
            raise InputError(f"{option} does not go with {command or 'no recipe'}")
    for name in ("data", "out"):
        if getattr(args, name) == "":  # an unset variable of a shell's, say
            raise InputError(f"--{name}: empty; name a folder, or leave the option out")
    if args.list:
        list_recipes(args.data, args.device)
    elif args.recipe == "report":
        print(write_report(args.what or "results"))
    elif args.recipe == "bench":
        bench(args.device, args.full_size, with_options(Recipe(), args).compile)
    elif args.recipe == "ablate":
        print(ablate(args.what, args.data, args.out or f"results/ablate-{args.what}", args.minutes,
                     3 if args.seeds is None else args.seeds, lambda recipe: with_options(recipe, args), args.device, args.only))
    elif args.recipe in RECIPES:
        result = run_recipe(with_options(RECIPES[args.recipe], args, strict=True), args.data, args.out, args.device)
        if result:
            print(report_table([result]))
    elif args.recipe == "reproduce":
        print(reproduce(args.data, args.out or "results", args.device, args.only, args.all,
                        1 if args.seeds is None else args.seeds, args.quick, lambda recipe: with_options(recipe, args)))
    else:
        raise InputError(f"recipe: {'none given' if args.recipe is None else f'unknown {args.recipe!r}'}; "
                         "python train.py --list shows them")


if __name__ == "__main__":
    data.run(main)
