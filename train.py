"""Training: one recipe for each published row, the loop, resume, ablations, the report.

    python train.py gridconv-synthetic                      # the embedded default, no data needed
    python train.py gridconv-mocap --data data              # after: python data.py bvh FOLDER --out data --name mocap ...
    python train.py glagcn-gt-243 --data data --seed 1      # a published row; any recipe field can be given as an option
    python train.py --list                                  # every recipe, its table row and what data it needs
    python train.py ablate gridconv-5 --data data           # the rows of one table side by side, several seeds
    python train.py report results                          # the table of every run in a folder
    python train.py bench                                   # the fast forms against the plain ones, on this machine

A run's folder holds last.pt (the whole state: continue by giving the same command again), best.pt (the weights of the
epoch that was best on the test set), log.csv and result.json, with matplotlib also curves.png. Same recipe, seed and
machine: same numbers, bit for bit on the CPU, interrupted or not.
"""

import argparse
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
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
import eval as evaluation
import gridconv
from data import InputError
from eval import make_store
from glagcn import Refinement, mean_distance

# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@dataclass(frozen=True)
class Recipe:
    """One training run, whole and flat. The comments are the help texts of the options (--help)."""

    name: str = ""
    row: str = ""  # the table row it reproduces, or what it is for
    paper_mpjpe: float = 0.0  # the paper's figure in mm; 0: none
    paper_p_mpjpe: float = 0.0  # the paper's figure after alignment in mm; 0: none
    ours: str = ""  # the settings that neither paper nor release gives
    # data
    data: str = "h36m"  # h36m, gridconv (its archives), humaneva, 3dhp, mocap or synthetic
    keypoints: str = "gt"  # the 2D: gt, hrnet, cpn_ft_h36m_dbb, ...
    skeleton: str = "h36m17"  # h36m17, h36m32, humaneva15 or 3dhp17
    skip: str = ""  # test sequences left out: gridconv (facts of its release) or none
    normalise: str = "release-500"  # of the 2D: release-500, width or longest
    target: str = "camera"  # camera: root-relative metres; uvd: pixel u, v and depth (the section-sign rows)
    # model
    method: str = "gridconv"  # gridconv or glagcn
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
    clip: float = 0.0  # largest gradient norm; 0: none
    eval_every: int = 1  # epochs between evaluations; the last epoch always is
    seed: int = 0


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
    joints32 = dict(skeleton="h36m32", grid=(7, 5))
    add("gridconv-gt-32", "GridConv Table 6, 32 joints handcrafted, P1*", 35.0, base=gt, layout="handcrafted",
        ours="the 7 x 5 layout", **joints32)
    add("gridconv-gt-32-learnable", "GridConv Table 6, 32 joints learnable, P1*", 33.4, base=gt_learnable,
        ours="the 7 x 5 prior", **joints32)

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

    # Motion that anyone may hold: the open benchmark, and procedural motion that needs no data at all.
    small = Recipe(data="mocap", layout="handcrafted", hidden=64, dropout=0.0, loss="mpjpe", lr=3e-3, epochs=12.0,
                   schedule="cosine-smooth", eval_every=4, ours="everything but the network")
    add("gridconv-mocap", "open mocap benchmark", base=small)
    add("gridconv-mocap-learnable", "open mocap benchmark", base=small, layout="autogrids", noise_epochs=1.2)
    small_gla = Recipe(data="mocap", method="glagcn", normalise="release-500", dropout=0.0, loss="mpjpe",
                       lr=3e-3, batch=64, epochs=3.0, schedule="cosine-smooth", channels=32, head_scale=0.1,
                       filter_widths=(3,) * 3, ours="everything but the network")
    add("glagcn-mocap", "open mocap benchmark", base=small_gla)
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
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fresh = [(p, p.clone()) for p in params if not self.state[p]]
        loss = super().step(closure)
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
    groups = [{"params": [p for name, p in named if name.endswith("s_prob") == grid], "scale": recipe.grid_lr if grid else 1.0}
              for grid in (False, True)]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "ranger":
        return ranger(groups, recipe.lr)
    return torch.optim.Adam(groups, recipe.lr, amsgrad=recipe.optimizer == "amsgrad")


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
    if stage_one:  # global plus local loss (GLA-GCN section 3.2)
        pose, sequence = store.batch(index, T, flip=flip, all_targets=True)
        local, reconstructed = model(pose, return_sequence=True)
        return mean_distance(local, sequence[:, T // 2]) + mean_distance(reconstructed, sequence), local
    pose, target = store.batch(index, T, getattr(model, "causal", False), flip)
    if recipe.jitter:
        target = jitter(target)
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
    """GLA-GCN's release in training: (x, y) of each target (B, J, 3) turned by -5, 0 or 5 degrees about the optical
    axis and scaled by 0.95, 1 or 1.05, the nine combinations alike; z and the 2D stay."""
    choice = torch.randint(3, (2, len(target), 1), device=target.device) - 1
    angle, scale = choice[0] * math.radians(5), 1 + 0.05 * choice[1]
    x, y, z = target.unbind(-1)
    return torch.stack([scale * (angle.cos() * x - angle.sin() * y), scale * (angle.sin() * x + angle.cos() * y), z], -1)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def epoch_order(recipe, frames, epoch):
    """The samples of an epoch in order: a permutation that depends on seed and epoch alone, so a resumed run sees the
    same. With flips there are two samples a frame: number >= frames is the mirrored one."""
    generator = torch.Generator().manual_seed(recipe.seed * 100003 + epoch)
    return torch.randperm(frames * (2 if recipe.flips else 1), generator=generator)


def batches(order, size):
    """The samples in batches; the last partial one is kept, a single left-over sample (which batch norm cannot take)
    joins the batch before it."""
    parts = list(order.split(size))
    return parts if len(parts) == 1 or len(parts[-1]) > 1 else [*parts[:-2], torch.cat(parts[-2:])]


def check_recipe(recipe):
    """InputError where a field of the recipe cannot be meant, before anything is loaded or built."""
    words = {"method": ("gridconv", "glagcn"), "loss": ("mse", "grid", "mpjpe"), "precision": ("float32", "tf32", "bf16"),
             "target": ("camera", "uvd"), "skip": ("", "gridconv"), "optimizer": ("adam", "amsgrad", "ranger"),
             "skeleton": tuple(data.SKELETONS)}
    for name, known in words.items():
        if getattr(recipe, name) not in known:
            raise InputError(f"{name}: unknown {getattr(recipe, name)!r}, expected one of {', '.join(map(repr, known))}")
    bounds = {"epochs": (1e-9, 1e9), "batch": (2, 1e9), "eval_every": (1, math.inf), "lr": (0, 1e31), "seed": (0, 2 ** 40),
              "micro_batch": (0, 1e9), "clip": (0, 1e9), "dropout": (0, 0.999), "temperature": (1e-9, 1e9), "hidden": (1, 1e6),
              "blocks": (0, 1e3), "channels": (1, 1e6), "reconstruct_blocks": (0, 1e3), "noise_epochs": (0, 1e9),
              "anneal_epochs": (0, 1e9), "stage_one_epochs": (0, 1e9), "grid_lr": (0, 1e9), "head_scale": (0, 1e9),
              "layout_seed": (0, 2 ** 40)}
    for name, (least, most) in bounds.items():
        if not least <= getattr(recipe, name) <= most:
            raise InputError(f"{name}: {getattr(recipe, name)!r}, expected a number from {least:g} to {most:g}")
    shapes = {"grid": ("5,5", r"\(\d+, \d+\)"), "kernel_sizes": ("3,3:3,3", r"\(\d+, \(\d+, \d+\), \d+\)"),
              "filter_widths": ("3,3,3", r"\(\d+,( \d+,?)*\)"), "padding": ("circular,replicate", r"\((?!\)).*'.*\)")}
    for name, (example, pattern) in shapes.items():
        if not re.fullmatch(pattern, repr(getattr(recipe, name))):
            raise InputError(f"{name}: {getattr(recipe, name)!r}, expected something like {example}")
    learning_rate(recipe, 0)
    for wrong, why in ((recipe.loss == "grid" and recipe.method != "gridconv", "loss: 'grid' needs a grid, so gridconv"),
                       (recipe.reconstruct and recipe.method != "glagcn", "reconstruct: only glagcn has a sequence head"),
                       (recipe.reconstruct and recipe.causal, "causal: a causal model has no sequence to reconstruct"),
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

    def __init__(self, recipe, store, out, device, trained_on="", data_print=()):
        torch.manual_seed(recipe.seed)
        self.recipe, self.store, self.out, self.device, self.trained_on = recipe, store, Path(out), device, trained_on
        self.data_print = list(data_print)
        self.model = evaluation.build_model(recipe).to(device)
        if recipe.method == "glagcn":
            for weight in self.model.head.parameters():
                weight.data *= recipe.head_scale
        self.refinement = Refinement(self.model.num_joints).to(device) if recipe.refine else nn.Module()
        self.optimizer = make_optimizer(recipe, self.model, self.refinement)
        self.epoch_steps = len(batches(epoch_order(recipe, len(store), 0), recipe.batch))
        self.total_steps = max(1, round(recipe.epochs * self.epoch_steps))
        self.step = 0  # optimiser steps done
        self.losses = torch.zeros(self.epoch_steps, device=device)  # this epoch's, on the device: no synchronisation
        self.history, self.best, self.last, self.seconds = [], None, None, 0.0

    def state(self):
        """Everything that resuming needs, as plain values and tensors."""
        cuda = self.device.type == "cuda"
        return {"format": "poselift", "version": 1, "recipe": dataclasses.asdict(self.recipe), "data": self.trained_on,
                "data_print": self.data_print, "epoch": self.step / self.epoch_steps, "model": self.model.state_dict(),
                "temperature": getattr(self.model, "temperature", None),
                "refinement": self.refinement.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "losses": self.losses, "history": self.history, "best": self.best, "last": self.last,
                "seconds": self.seconds, "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None}

    def save(self):
        """last.pt, written whole or not at all; the one before stays until then."""
        data.write_atomically(self.out / "last.pt", lambda file: torch.save(self.state(), file))

    def save_best(self, epoch, scores):
        """best.pt: the weights that were best on the test set so far, as eval.load_model reads them."""
        self.best = {"epoch": epoch, **scores}
        kept = {k: v for k, v in self.state().items() if k in (
            "format", "version", "recipe", "data", "temperature", "model", "refinement")}
        data.write_atomically(self.out / "best.pt", lambda file: torch.save({**kept, "epoch": epoch}, file))

    def resume(self):
        """Continue from last.pt where there is one. InputError: it belongs to another recipe or other data."""
        path = self.out / "last.pt"
        if not path.exists():
            return
        state = data.read_torch(path)
        if not isinstance(state, dict) or not state.keys() >= self.state().keys():
            raise InputError(f"{path}: not the state of a run: remove it, or give another --out")
        theirs, ours = state["recipe"], dataclasses.asdict(self.recipe)
        differ = [f"{k} {theirs.get(k)!r} there, {v!r} here" for k, v in ours.items() if theirs.get(k) != v]
        if differ:
            raise InputError(f"{path}: a run of another recipe ({'; '.join(differ[:3])}): give another --out, or remove it")
        if state["data_print"] != self.data_print:
            raise InputError(f"{path}: a run on other data ({state['data']}, {state['data_print']}; here {self.trained_on}, "
                             f"{self.data_print}): give another --out, or remove it")
        self.model.load_state_dict(state["model"])
        self.refinement.load_state_dict(state["refinement"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.copy_(state["losses"])
        for name in ("step", "history", "best", "last", "seconds"):
            setattr(self, name, state[name])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def begin_epoch(self, epoch):
        """What changes between epochs: AutoGrids' noise, batch-norm momentum, the sequence head frozen for stage two."""
        recipe, model = self.recipe, self.model
        if getattr(model, "autogrids", None) is not None:
            model.autogrids.noise = epoch < recipe.noise_epochs
        if recipe.norm_schedule:
            for norm in model.scheduled_norms():
                norm.momentum = norm_momentum(epoch, recipe.epochs)
        self.stage_one = recipe.reconstruct and epoch < recipe.stage_one_epochs
        if recipe.reconstruct:
            model.sequence_head.requires_grad_(self.stage_one)
        model.train()
        self.refinement.train()

    def train_step(self, chunk):
        """One optimiser step on the samples `chunk`; its loss goes to self.losses."""
        recipe, epoch = self.recipe, self.step / self.epoch_steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(recipe, epoch)
        if recipe.anneal_epochs:
            self.model.temperature = 1 + 29 * max(0.0, 1 - epoch / recipe.anneal_epochs)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
        total = torch.zeros((), device=self.device)
        for part in batches(chunk, recipe.micro_batch or len(chunk)):
            flip = part >= len(self.store) if recipe.flips else None
            index = part % len(self.store)
            with autocast:
                loss, prediction = batch_loss(self.model, self.store, index, flip, recipe, self.stage_one)
                if recipe.refine and not self.stage_one:  # detached: the figure without it stays what it was
                    better = refined(self.refinement, self.store, prediction.detach(), index, flip)
                    loss = loss + mean_distance(better, self.store.pose_3d[index])
            loss = loss * (len(part) / len(chunk))
            loss.backward()
            total += loss.detach()
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[self.step % self.epoch_steps] = total
        self.step += 1

    def check_finite(self, steps):
        """InputError unless the first `steps` losses of this epoch are finite: which step was not."""
        bad = (~torch.isfinite(self.losses[:steps])).nonzero().flatten().tolist()
        if bad:
            step = (self.step - 1) // self.epoch_steps * self.epoch_steps + bad[0] + 1
            kept = f"{self.out / 'last.pt'} holds the last good state" if (self.out / "last.pt").exists() else "nothing is saved"
            raise InputError(f"the loss of step {step} is {self.losses[bad[0]].item()}: stopped, {kept}; a smaller --lr or "
                             "--clip 1 may help")


@contextmanager
def locked(out):
    """Hold a folder for one run; Busy where another live process holds it. A crash lets go of it by itself."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / "lock", "w")
    except OSError as error:
        raise InputError(f"{out}: cannot make the output folder: {error.strerror}; choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"{out}: another run is writing there; wait for it or choose another --out") from None
        yield


class Busy(InputError):
    """A run's folder that another process holds."""


@contextmanager
def signals():
    """Yields a list that SIGINT and SIGTERM put their number into, instead of ending the process at once."""
    caught = []
    previous = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


SAVE_SECONDS = 600  # at most this much work is lost to a crash


def train(recipe, folder="data", out=None, device=None, quiet=False):
    """Train a recipe on the data in `folder`, continuing what `out` holds, and return the result as a plain dict.

    The result (also out/result.json): recipe, data, frames, parameters, the last and the best epoch's scores on the
    test set (mm, per action and on average), the two yardsticks, time, seed, versions, device. SIGINT and SIGTERM
    finish the step, save and raise SystemExit(128 + signal).
    InputError: missing or broken data, an impossible recipe, a folder with another run, a loss that is not finite.
    """
    check_recipe(recipe)
    device, out = evaluation.pick_device(device), Path(out or Path("results") / recipe.name)
    if device.type == "cuda" and recipe.precision != "float32":
        torch.set_float32_matmul_precision("high")
    stores = {split: make_store(recipe, folder, split, device) for split in ("train", "test")}
    with locked(out), signals() as stop:
        run = Run(recipe, stores["train"], out, device, data.provenance(stores["train"].sequences), fingerprint(stores))
        run.resume()
        show, saved = Progress(run, quiet), time.monotonic()
        while run.step < run.total_steps:
            epoch, first = divmod(run.step, run.epoch_steps)
            last = min(run.epoch_steps, run.total_steps - epoch * run.epoch_steps)
            run.begin_epoch(epoch)
            order, started = epoch_order(recipe, len(run.store), epoch).to(device), time.perf_counter()
            for done, chunk in enumerate(batches(order, recipe.batch)[first:last], first + 1):
                run.train_step(chunk)
                show.step()
                if stop or done == last or time.monotonic() - saved > SAVE_SECONDS:
                    run.check_finite(done)
                    run.seconds += time.perf_counter() - started
                    if done == last:
                        end_epoch(run, stores["test"], last, show)
                    run.save()
                    if stop:
                        raise SystemExit(128 + stop[0])
                    saved, started = time.monotonic(), time.perf_counter()
        result = finish(run, stores)
    data.write_atomically(out / "result.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    if importlib.util.find_spec("matplotlib") and not quiet:
        evaluation.plot_curves(out)
    return result


def end_epoch(run, test_store, steps, show):
    """Score the epoch where it is due, keep the best weights, add a line to the log."""
    recipe, epoch = run.recipe, math.ceil(run.step / run.epoch_steps)
    row = {"epoch": epoch, "loss": run.losses[:steps].mean().item(), "lr": run.optimizer.param_groups[0]["lr"],
           "mpjpe": None, "p_mpjpe": None, "seconds": round(run.seconds, 1)}
    if epoch % recipe.eval_every == 0 or run.step == run.total_steps:
        run.last = evaluation.evaluate(run.model, test_store, flip=recipe.flip_test)
        row["mpjpe"], row["p_mpjpe"] = evaluation.headline(run.last, recipe.data)
        if run.best is None or row["mpjpe"] < evaluation.headline(run.best, recipe.data)[0]:
            run.save_best(epoch, run.last)
    run.history.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, row)
    writer.writeheader()
    writer.writerows(run.history)
    data.write_atomically(run.out / "log.csv", lambda file: file.write(text.getvalue().encode()))
    show.epoch(row)


def finish(run, stores):
    """The result of a finished run: what was trained on what, its scores beside the yardsticks, and where."""
    recipe = run.recipe
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()
    result = {"recipe": dataclasses.asdict(recipe), "data": run.trained_on, "train_frames": len(stores["train"]),
              "test_frames": len(stores["test"]), "parameters": parameters(recipe), "epochs": run.step / run.epoch_steps,
              "last": run.last, "best": run.best, "yardsticks": evaluation.yardsticks(stores["train"], stores["test"]),
              "seconds": run.seconds, "seed": recipe.seed, "commit": commit, "torch": torch.__version__,
              "python": platform.python_version(),
              "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else
              f"{torch.get_num_threads()} CPU thread" + "s" * (torch.get_num_threads() > 1)}
    if recipe.refine:
        pose = evaluation.predict(run.model, stores["test"], flip=recipe.flip_test).to(run.device)
        with torch.no_grad():
            pose = refined(run.refinement.eval(), stores["test"], pose, torch.arange(len(pose), device=run.device))
        result["refined, with the true root position and the intrinsics"] = evaluation.score(pose.cpu(), stores["test"])
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


def plain_network(network):
    """A copy of a GridLiftingNetwork whose layers are plain_grid_conv."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, gridconv.GridConv):
            layer.forward = functools.partial(plain_grid_conv, layer)
    return network


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
        missing = (half - (i - first) if i - first < half else 0, half - (last - i) if last - i < half else 0)
        return np.pad(window, (missing, (0, 0), (0, 0)), mode="edge"), self.target[i]


def interleaved(fast, plain, pairs=7):
    """(seconds of fast, seconds of plain, ratio): medians over interleaved pairs, after one of each to warm up."""
    def clock(run):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started
    clock(fast), clock(plain)
    times = [(clock(fast), clock(plain)) for _ in range(pairs)]
    return (*(statistics.median(column) for column in zip(*times)), statistics.median(p / f for f, p in times))


def bench(device=None):
    """Print how much faster the fast forms are than the plain ones, measured side by side on this machine."""
    device = evaluation.pick_device(device)
    torch.manual_seed(0)
    a = torch.randn(2048, 2048, device=device)
    seconds = interleaved(lambda: a @ a, lambda: a @ a)[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; float32 matrix products at {2 * 2048 ** 3 / seconds / 1e9:.0f} GFLOP/s\n")
    rows = []

    def row(label, fast, plain, samples=None):
        times = interleaved(fast, plain)
        rate = f"{samples / times[0]:,.0f}" if samples else None
        rows.append([label, f"{times[2]:.2f}x", f"{1000 * times[0]:.1f}", f"{1000 * times[1]:.1f}", rate])

    x = torch.randn(200, 256, 5, 5, device=device)
    layer, push = gridconv.DynamicGridConv(256, 256).to(device), torch.randn(200, 256, 5, 5, device=device)
    fast_x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    plain_x = x.clone().requires_grad_()
    row("D-GridConv layer, forward and backward (batch 200, C = 256)", lambda: layer(fast_x).backward(push),
        lambda: plain_grid_conv(layer, plain_x).backward(push))
    network = gridconv.GridLiftingNetwork().to(device)
    pose, target = torch.randn(200, 17, 2, device=device), torch.randn(200, 17, 3, device=device)

    def step(model):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def run():
            optimizer.zero_grad()
            (model(pose) - target).square().mean().backward()
            optimizer.step()
        return run

    def lift(model):
        def run():
            with torch.no_grad():
                model(pose)
        return run

    plain = plain_network(network)
    row("GridConv network, training step (batch 200)", step(network), step(plain), 200)
    row("GridConv network, evaluation (batch 200)", lift(network.eval()), lift(plain.eval()), 200)
    store = data.FrameStore(data.synthesize(0), "width", data.SKELETONS["h36m17"], device)
    for frames, batch in ((1, 200), (27, 64)):
        loader = iter(torch.utils.data.DataLoader(SampleByFrame(store, frames), batch, shuffle=True))
        order = iter(torch.randperm(len(store), device=device).split(batch))
        row(f"feeding, T = {frames} (batch {batch}), against a Dataset and DataLoader", lambda: store.batch(next(order), frames),
            lambda: [part.to(device) for part in next(loader)], batch)
    print(evaluation.markdown(["what", "ratio", "ms", "plain ms", "poses/s"], rows))


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
            return tuple(item(w) for w in word.split(":")) if ":" in word else int(word) if word.isdigit() else word
        return tuple(item(word) for word in text.split(",") if word)
    try:
        return type(default)(text)
    except ValueError:
        raise InputError(f"{text!r} is not a {type(default).__name__}") from None


def add_recipe_options(parser):
    """An option for every recipe field; left out, the recipe's own value stands."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Recipe), re.M))
    for field in dataclasses.fields(Recipe):
        if field.name not in ("name", "row", "ours", "paper_mpjpe", "paper_p_mpjpe"):
            parser.add_argument("--dataset" if field.name == "data" else "--" + field.name.replace("_", "-"), metavar="VALUE",
                                dest="field_" + field.name, help=comments.get(field.name, "").replace("%", "%%") or None)


def with_options(recipe, args):
    """The recipe with the options given."""
    changes = {}
    for field in dataclasses.fields(Recipe):
        text = getattr(args, "field_" + field.name, None)
        if text is not None:
            try:
                changes[field.name] = parse_value(text, field.default)
            except InputError as error:
                raise InputError(f"--{field.name.replace('_', '-')}: {error}") from None
    return dataclasses.replace(recipe, **changes)


def parameters(recipe):
    """The number of parameters that a recipe trains, the refinement network's among them."""
    model = evaluation.build_model(recipe)
    extra = Refinement(model.num_joints).parameters() if recipe.refine else ()
    return sum(p.numel() for p in (*model.parameters(), *extra))


def list_recipes():
    """Print every recipe: the row it reproduces, the paper's figure, the data it needs, its parameters, what is ours."""
    rows = []
    for r in RECIPES.values():
        paper = " / ".join(f"{v:g}" for v in (r.paper_mpjpe, r.paper_p_mpjpe) if v) or None
        rows.append([r.name, paper, f"{parameters(r) / 1e6:.2f} M", f"{r.data} {r.keypoints}", r.row, r.ours or None])
    print(evaluation.markdown(["recipe", "paper, mm", "parameters", "data", "row", "ours"], rows))


# ---------------------------------------------------------------------------------------------------------------------
# Ablations and reports

# noise_epochs is a fraction of the run here
_LAYOUTS = {"random": (38.1, dict(layout="random")), "handcrafted": (37.1, {}),
            "learnable": (36.4, dict(layout="autogrids", noise_epochs=0.1)),
            "learnable from random logits": (None, dict(layout="autogrids-random", grid_lr=3.0)),
            "those random logits, frozen": (None, dict(layout="autogrids-random", grid_lr=0.0))}
_PAIRS = {"#1": "circular", "#2": "replicate", "#3": ("replicate", "circular"), "#4": ("circular", "replicate")}
# table -> (base recipe, what the paper's figures are, {row: (paper's figure or None, fields)})
ABLATIONS = {
    "gridconv-5": ("gridconv-mocap", "P1*, Table 5", _LAYOUTS),
    "gridconv-B": ("gridconv-mocap", "P1*, Table B", {
        "no shuffle": (37.1, {}), **{f"{how} shuffle": (paper, dict(layout=how)) for how, paper in
                                     (("row", 38.4), ("column", 37.7), ("global", 39.4))}}),
    "gridconv-D": ("gridconv-mocap", "P1*, Table D, vanilla", {
        name: (paper, dict(attention="", padding=tuple(_PAIRS[part] for part in name.split("+")))) for name, paper in
        (("#1", 40.8), ("#2", 42.3), ("#1+#2", 39.0), ("#2+#3", 40.6))}),
    "gridconv-E": ("gridconv-mocap", "P1*, Table E", {
        name: (paper, dict(kernel_sizes=sizes)) for name, paper, sizes in
        (("3-33-3", 37.1, (3, (3, 3), 3)), ("3-31-3", 37.2, (3, (3, 1), 3)), ("3-53-3", 37.8, (3, (5, 3), 3)),
         ("3-33-1", 37.7, (3, (3, 3), 1)))}),
    "glagcn-6": ("glagcn-mocap", "P2 on gt, Table 6", {
        "without AGCN (ST-GCN)": (28.0, dict(adaptive=False)), "without strides": (30.6, dict(temporal="mean")),
        "without individual layers": (27.7, dict(head="full")), "GLA-GCN": (25.8, {})}),
    "glagcn-heads": ("glagcn-mocap", "no such table", {
        f"{'with' if reconstruct else 'without'} reconstruction, lambda {weight:g}":
            (None, dict(reconstruct=reconstruct, unshared_weight=weight))
        for reconstruct in (False, True) for weight in (0.0, 0.5, 1.0)}),
}


def step_seconds(recipe, folder, device=None, steps=12):
    """(seconds of a training step, steps an epoch) of the recipe on the data in `folder`: the median of `steps` steps,
    after three others."""
    device = evaluation.pick_device(device)
    run = Run(dataclasses.replace(recipe, epochs=1.0, stage_one_epochs=1.0 * recipe.reconstruct),
              make_store(recipe, folder, "train", device), ".", device)
    run.begin_epoch(0)
    times = []
    for chunk in batches(epoch_order(recipe, len(run.store), 0).to(device), recipe.batch)[:steps + 3]:
        started = time.perf_counter()
        run.train_step(chunk)
        run.losses.sum().item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:] or times), run.epoch_steps


def ablate(table, folder, out, minutes, seeds, base_options, device=None):
    """Train every row of a table for the same time, with several seeds, and return the table as text.

    Each row's number of epochs is what fits into `minutes` by a timing made once and kept (out/epochs.json), so a
    repeated command continues. The same command in a second process takes the runs that the first has not begun.
    """
    if table not in ABLATIONS:
        raise InputError(f"table: unknown {table!r}, expected one of {', '.join(ABLATIONS)}")
    if not 0 < minutes < 1e6 or seeds < 1:
        raise InputError(f"--minutes {minutes:g}, --seeds {seeds}: expected numbers above 0")
    base, paper_is, rows = ABLATIONS[table]
    base, out = base_options(RECIPES[base]), Path(out)
    check_recipe(base)
    plan = out / "epochs.json"
    if not plan.exists():
        epochs = {}
        for label, (_, fields) in rows.items():
            seconds, steps = step_seconds(dataclasses.replace(base, **fields), folder, device)
            epochs[label] = max(0.01, round(minutes * 60 / seconds / steps, 2))
        text = json.dumps({"minutes": minutes, "epochs": epochs}, indent=1)
        data.write_atomically(plan, lambda file: file.write(text.encode()))
    planned = json.loads(plan.read_text())
    if planned["minutes"] != minutes:
        raise InputError(f"{plan}: planned for {planned['minutes']:g} minutes a run, now {minutes:g}: give another --out")
    epochs = planned["epochs"]
    runs = {}
    for seed in range(seeds):  # seed by seed, so that an unfinished table is already fair
        for label, (_, fields) in rows.items():
            recipe = dataclasses.replace(base, **{"seed": seed, "layout_seed": seed, "epochs": epochs[label],
                                                  "eval_every": 10 ** 9, **fields})
            recipe = dataclasses.replace(recipe, name=f"{label}, seed {seed}",
                                         noise_epochs=fields.get("noise_epochs", 0.0) * recipe.epochs,
                                         stage_one_epochs=0.75 * recipe.epochs if recipe.reconstruct else 0.0)
            runs[label, seed] = recipe, out / re.sub(r"[^\w.]+", "-", recipe.name)
    results, waiting = {}, dict(runs)
    while waiting:
        for key, (recipe, place) in list(waiting.items()):
            try:
                results[key] = train(recipe, folder, place, device)
                del waiting[key]
            except Busy:
                continue
        if waiting:
            time.sleep(5)
    header = ["row", "epochs", "MPJPE mean", "spread", *(f"seed {s}" for s in range(seeds)), "P-MPJPE mean",
              "paper (Human3.6M)"]
    learnt = any("autogrids" in result for result in results.values())
    lines = []
    for label, (paper, _) in rows.items():
        mine = [results[label, seed] for seed in range(seeds)]
        scores, aligned = zip(*(evaluation.headline(r["last"], base.data) for r in mine))
        line = [label, f"{epochs[label]:g}", sum(scores) / seeds, max(scores) - min(scores), *scores, sum(aligned) / seeds, paper]
        if learnt:
            line += [", ".join(str(r["autogrids"]["cells_changed"]) for r in mine) if "autogrids" in mine[0] else None,
                     ", ".join(str(r["autogrids"]["dropped"] or "none") for r in mine) if "autogrids" in mine[0] else None]
        lines.append(line)
    if learnt:
        header += ["cells changed", "joints dropped"]
    first = next(iter(results.values()))
    return (f"{table} on {first['data']}: {minutes:g} minutes a run on {first['device']}, last epoch, mm; spread is largest "
            f"minus smallest.\nThe paper's column is {paper_is}, on Human3.6M: other data, so only the order of the rows "
            f"compares.\n\n" + evaluation.markdown(header, lines))


def report_table(results):
    """Finished runs as one markdown table: method, data, frames, errors, yardsticks, time, and the paper's figure only
    where the data is Human3.6M."""
    header = ["run", "data", "test frames", "MPJPE", "P-MPJPE", "best epoch's MPJPE", "mean pose", "affine", "minutes",
              "paper MPJPE", "paper P-MPJPE"]
    lines, other = [], False
    for r in results:
        recipe, true = r["recipe"], r["data"] == evaluation.HUMAN36M
        other |= not true
        paper = [recipe[k] or None if true else None for k in ("paper_mpjpe", "paper_p_mpjpe")]
        lines.append([recipe["name"], r["data"], f"{r['test_frames']:,}", *evaluation.headline(r["last"], recipe["data"]),
                      evaluation.headline(r["best"], recipe["data"])[0], r["yardsticks"]["mean_pose"],
                      r["yardsticks"]["affine"], r["seconds"] / 60, *paper])
    text = evaluation.markdown(header, lines) + (
        "\n\nErrors in mm on the test split, of the last epoch and of the epoch that was best on the test set (what the papers "
        "quote):\nunweighted over the actions on Human3.6M, over all frames elsewhere. Yardsticks, over all frames: predicting "
        "the training\nmean pose, and the best affine map of the 2D pose. Minutes of training, evaluation not counted.")
    if other:
        text += ("\n\nThe data column says what a run was measured on: where it is not Human3.6M, no figure compares with the "
                 "papers'.\nFor the papers' numbers put Human3.6M into data/ (README, section Data) and run bash reproduce.sh again.")
    return text


def write_report(folder):
    """report.md and report.json of every finished run below a folder; returns the table."""
    paths = sorted(Path(folder).glob("*/result.json"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise InputError(f"{folder}: no finished runs (*/result.json); train one first")
    results, parts = [], []
    for path in paths:
        try:
            r = json.loads(path.read_text())
            report_table([r])
            recipe = argparse.Namespace(**r["recipe"])
            parts += [f"## {recipe.name}: {recipe.row}",
                      f"seed {r['seed']}, commit {r['commit'] or 'unknown'}, {r['device']}, torch {r['torch']}, Python "
                      f"{r['python']}, {r['parameters']:,} parameters, {r['epochs']:g} epochs"
                      + (f"; ours: {recipe.ours}" if recipe.ours else ""), evaluation.report(r["last"], r["data"], recipe)]
            if path.with_name("curves.png").exists():
                parts.append(f"![loss and MPJPE of {recipe.name}]({path.parent.name}/curves.png)")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a result of train.py ({error}): remove it") from None
        results.append(r)
    parts = ["# Report", report_table(results), *parts]
    data.write_atomically(Path(folder) / "report.md", lambda file: file.write(("\n\n".join(parts) + "\n").encode()))
    data.write_atomically(Path(folder) / "report.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    return parts[1]


def main(argv=None):
    """Run the command line; see the module's docstring."""
    parser = data.Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a recipe's name (--list shows them), or ablate, report or bench")
    parser.add_argument("what", nargs="?", help="with ablate: the table; with report: the folder")
    parser.add_argument("--list", action="store_true", help="show the recipes")
    parser.add_argument("--data", default="data", metavar="DIR", help="the folder with the data (default: data)")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: results/RECIPE)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--minutes", type=float, default=4.0, help="with ablate: training time of a run (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="with ablate: seeds 0 to N-1 (default: 3)")
    add_recipe_options(parser)
    args = parser.parse_args(argv)
    if args.list:
        list_recipes()
    elif args.recipe == "report":
        print(write_report(args.what or "results"))
    elif args.recipe == "bench":
        bench(args.device)
    elif args.recipe == "ablate":
        print(ablate(args.what, args.data, args.out or f"results/ablate-{args.what}", args.minutes, args.seeds,
                     lambda recipe: with_options(recipe, args), args.device))
    elif args.recipe in RECIPES:
        result = train(with_options(RECIPES[args.recipe], args), args.data, args.out, args.device)
        print(report_table([result]))
    else:
        raise InputError(f"recipe: {'none given' if args.recipe is None else f'unknown {args.recipe!r}'}; "
                         "python train.py --list shows them")


if __name__ == "__main__":
    data.run(main)
