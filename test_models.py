"""Every test: each file held to something slower and plainer - loops over the equations, golden figures, closed forms.

    pytest                  # all but the long forms, some minutes on two cores
    pytest -m slow          # the long forms
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import data
import eval as evaluation
import glagcn
import gridconv
import train
from data import SKELETONS, FrameStore, InputError, Sequence

HERE = Path(__file__).parent
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("fixed")


# ---------------------------------------------------------------------------------------------------------------------
# gridconv.py


def random_network(seed=0, **options):
    """A small network with every parameter and running statistic random, in float64, for evaluation."""
    torch.manual_seed(seed)
    net = gridconv.GridLiftingNetwork(**{"hidden": 6, "blocks": 1, **options}).double()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return net.eval()


MODES = ("circular", "replicate", "zeros")
paddings = st.lists(st.one_of(st.sampled_from(MODES), st.tuples(st.sampled_from(MODES), st.sampled_from(MODES))),
                    min_size=1, max_size=4).map(tuple)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def layouts(draw):
    """(layout, joints): any grid in which every joint has a cell."""
    H, P = draw(grids)
    joints = draw(st.integers(1, H * P))
    return gridconv.random_layout(joints, (H, P), draw(st.integers(0, 10 ** 6))), joints


def source_cell(i, j, grid, mode):
    """The cell that padding puts at (i, j) of an unbounded grid, or None for a zero: index arithmetic, case by case."""
    place = []
    for index, size, how in ((i, grid[0], mode[0]), (j, grid[1], mode[1])):
        if how == "circular":
            while index < 0:
                index += size
            while index >= size:
                index -= size
        elif how == "replicate":
            index = 0 if index < 0 else size - 1 if index >= size else index
        elif not 0 <= index < size:
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
        for i in range(H):
            for j in range(P):
                for a in range(K):
                    for b in range(K):
                        cell = source_cell(i + a - K // 2, j + b - K // 2, (H, P), mode)
                        if cell is not None:
                            value = torch.einsum("oc,bc->bo", weight[branch, :, :, a, b], x[:, :, cell[0], cell[1]])
                            out[:, :, i, j] += alpha[:, i, j, a, b, None] * value
        if bias is not None:
            out += bias[branch][:, None, None]
    return out


@given(layouts(), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 4))
def test_sgt_then_inverse_is_identity(case, dtype, channels):
    layout, joints = case
    S = gridconv.assignment_matrix(layout, joints)
    pose = torch.randn(3, joints, channels, dtype=dtype)
    grid = gridconv.sgt(pose, S, (len(layout), len(layout[0])))
    assert grid.shape == (3, channels, len(layout), len(layout[0])) and grid.dtype == dtype
    for i, row in enumerate(layout):
        for j, joint in enumerate(row):
            assert torch.equal(grid[:, :, i, j], pose[:, joint])
    torch.testing.assert_close(gridconv.inverse_sgt(grid, S), pose, rtol=1e-6, atol=1e-6)


@given(layouts())
def test_inverse_sgt_averages_replicas(case):
    layout, joints = case
    S = gridconv.assignment_matrix(layout, joints)
    grid = torch.randn(2, 3, len(layout), len(layout[0]), dtype=torch.float64)
    for joint in range(joints):
        cells = [grid[:, :, i, j] for i, row in enumerate(layout) for j, cell in enumerate(row) if cell == joint]
        torch.testing.assert_close(gridconv.inverse_sgt(grid, S)[:, joint], torch.stack(cells).mean(0))


def test_averaged_cell_goes_in_as_mean_and_out_not_at_all():
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17)
    pose = torch.randn(2, 17, 3)
    grid = gridconv.sgt(pose, S, (5, 5))
    torch.testing.assert_close(grid[:, :, 2, 2], (pose[:, 8] + pose[:, 9]) / 2)
    grid[:, :, 2, 2] = 1e6
    torch.testing.assert_close(gridconv.inverse_sgt(grid, S), pose)
    S = torch.eye(4)[:, [0, 1, 2]]  # a joint that no cell holds comes out 0, and nothing is divided by 0
    S = torch.cat([S, torch.zeros(4, 1)], 1).requires_grad_()
    out = gridconv.inverse_sgt(torch.ones(1, 2, 2, 2), S)
    assert torch.equal(out[0, 3], torch.zeros(2)) and torch.equal(out[0, 0], torch.ones(2))
    out.sum().backward()
    assert S.grad.isfinite().all() and S.grad[:, 3].abs().sum() > 0  # the loss can ask for the joint back


def plain_topology(S, grid, edges):
    """Eq. 2 and 3, term by term."""
    H, P = grid
    if any(sorted(row) != [0] * (len(row) - 1) + [1] for row in S.tolist()):
        return False
    def neighbours(p):
        return [(p // P + a) * P + p % P + b for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if 0 <= p // P + a < H and 0 <= p % P + b < P]
    return all(any(S[p, i] * sum(S[q, j] for q in neighbours(p)) >= 1 for p in range(H * P)) for i, j in edges)


H36M32_PARENTS = (-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 12, 16, 17, 18, 19, 20, 19, 22, 12, 24, 25, 26, 27,
                  28, 27, 30)


def test_handcrafted_layouts_keep_the_skeleton():
    for layout, joints, edges in ((gridconv.HANDCRAFTED_5X5, 17, gridconv.H36M_EDGES), (
            gridconv.HANDCRAFTED_7X5, 32, [(p, c) for c, p in enumerate(H36M32_PARENTS) if p >= 0])):
        S = gridconv.assignment_matrix(layout, joints)
        grid = len(layout), len(layout[0])
        assert gridconv.satisfies_topology(S, grid, edges) and plain_topology(S, grid, edges)
    assert not gridconv.satisfies_topology(gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17), (5, 5))


@given(layouts(), st.data())
def test_satisfies_topology_is_equations_2_and_3(case, pick):
    layout, joints = case
    edges = pick.draw(st.lists(st.tuples(st.integers(0, joints - 1), st.integers(0, joints - 1)), max_size=4))
    S, grid = gridconv.assignment_matrix(layout, joints), (len(layout), len(layout[0]))
    assert gridconv.satisfies_topology(S, grid, edges) == plain_topology(S, grid, edges)


@given(layouts(), st.sampled_from(["row", "column", "global"]), st.integers(0, 99))
def test_shuffles_permute_rows_columns_or_cells(case, how, seed):
    layout, _ = case
    shuffled = gridconv.shuffle_layout(layout, how, seed)
    if how == "row":
        assert sorted(shuffled) == sorted(layout)
    elif how == "column":
        assert sorted(zip(*shuffled)) == sorted(zip(*layout))
    else:
        assert sorted(sum(shuffled, ())) == sorted(sum(layout, ()))
    assert shuffled == gridconv.shuffle_layout(layout, how, seed)


def test_shuffles_and_random_layouts_vary_with_the_seed():
    for how in ("row", "column", "global"):
        assert len({gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, how, seed) for seed in range(20)}) > 10
    assert len({gridconv.random_layout(17, (5, 5), seed) for seed in range(20)}) == 20


@pytest.mark.parametrize("layout, joints, says", [
    (((0, 1), (2, 17)), 4, "17"), (((0, 1), (2, -1)), 4, "-1"), (((0, 1), (2, 2)), 4, "joint 3"), (((0, 1),), 3, "3 joints"),
    (((0, 1), (2,)), 3, "row"), (((0, 1), ((0, 2), 1)), 3, "joint 2"), (((0, 1), (2, "a")), 3, "a"), (((0, 1), (2, ())), 3, "empty")])
def test_bad_layouts_are_refused(layout, joints, says):
    with pytest.raises(ValueError, match=says):
        gridconv.assignment_matrix(layout, joints)
    with pytest.raises(ValueError, match=says):
        gridconv.GridLiftingNetwork(num_joints=joints, layout=layout, hidden=4)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="mirror"):
        gridconv.GridConv(2, 3, padding=("mirror",))
    with pytest.raises(ValueError, match="tuple"):
        gridconv.GridConv(2, 3, padding="circular")
    with pytest.raises(ValueError, match="4"):
        gridconv.GridConv(2, 3, kernel_size=4)
    with pytest.raises(ValueError, match="16 cells cannot hold 17"):
        gridconv.AutoGrids(17, (4, 4), "random")
    with pytest.raises(ValueError, match="random"):
        gridconv.AutoGrids(17, (6, 4))
    with pytest.raises(ValueError, match="diagonal"):
        gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, "diagonal")
    with pytest.raises(ValueError, match="channels"):
        gridconv.GridConv(2, 3)(torch.zeros(1, 3, 5, 5))
    for shape in ((2, 3, 3, 5, 5), (1, 5, 5, 3, 3)):  # the release's order, one alpha for a batch of two
        with pytest.raises(ValueError, match="alpha"):
            gridconv.DynamicGridConv(2, 3)(torch.zeros(2, 2, 5, 5), torch.ones(shape))
    with pytest.raises(ValueError, match="averages"):
        gridconv.AutoGrids(17, (5, 5), gridconv.RELEASED_5X5)
    with pytest.raises(ValueError, match="rows"):
        gridconv.AutoGrids(17, (5, 5), ())
    with pytest.raises(ValueError, match="expected"):
        gridconv.GridLiftingNetwork(hidden=4)(torch.zeros(1, 16, 2))
    with pytest.raises(ValueError, match="unknown"):
        gridconv.GridLiftingNetwork(hidden=4, attention="gird")
    with pytest.raises(ValueError, match="forward_grid"):
        gridconv.GridLiftingNetwork(hidden=4, layout=None, grid_shape=(5, 5))(torch.zeros(2, 17, 2))


# AutoGrids


def test_autogrids_rows_are_exactly_one_hot_and_nothing_is_random_in_evaluation():
    torch.manual_seed(0)
    grid = gridconv.AutoGrids(17, (5, 5))
    for _ in range(50):
        S = grid()
        assert ((S == 0) | (S == 1)).all() and torch.equal(S.sum(1), torch.ones(25))
    grid.eval()
    before = torch.get_rng_state()
    assert torch.equal(grid(), grid.assignment()) and torch.equal(before, torch.get_rng_state())
    assert torch.equal(grid.assignment(), gridconv.assignment_matrix(gridconv.HANDCRAFTED_5X5, 17)) and grid.dropped() == []
    grid.train()
    grid.noise = False
    assert torch.equal(grid(), grid.assignment())
    assert sum(p.numel() for p in grid.parameters()) == 425
    with torch.no_grad():
        grid.s_prob[10] = torch.eye(17)[0]  # joint 1's only cell
    assert grid.dropped() == [1]


@given(st.integers(2, 6), st.integers(1, 4), st.booleans(), st.integers(0, 10 ** 6))
def test_straight_through_gradient_is_the_softmax_relaxations(joints, rows, noise, seed):
    torch.manual_seed(seed)
    grid = gridconv.AutoGrids(joints, (rows, joints), "random").double()
    grid.noise = noise
    weight = torch.randn(rows * joints, joints, dtype=torch.float64)
    torch.manual_seed(seed + 1)
    (grid() * weight).sum().backward()
    torch.manual_seed(seed + 1)
    logits = grid.s_prob.detach().clone().requires_grad_()
    gumbel = -torch.empty_like(logits).exponential_().log() if noise else 0.0
    exponentials = (logits + gumbel).exp()
    (exponentials / exponentials.sum(1, keepdim=True) * weight).sum().backward()
    torch.testing.assert_close(grid.s_prob.grad, logits.grad, rtol=1e-9, atol=1e-12)


def test_noise_frequencies_follow_the_softmax():
    torch.manual_seed(1)
    grid = gridconv.AutoGrids(4, (1, 4), "random")
    with torch.no_grad():
        grid.s_prob.copy_(torch.tensor([[2.0, 0.0, -1.0, 1.0]] * 4))
        counts = sum(grid() for _ in range(3000)).mean(0) / 3000  # 12,000 draws of one distribution (Gumbel-max)
    torch.testing.assert_close(counts, grid.s_prob[0].softmax(0).detach(), atol=0.02, rtol=0)


def test_autogrids_learns_to_bring_a_dropped_joint_back():
    torch.manual_seed(2)
    grid = gridconv.AutoGrids(3, (2, 2), ((0, 1), (2, 2)))
    with torch.no_grad():
        grid.s_prob[2:] = torch.tensor([[0.9, 0.0, 0.8], [0.0, 0.9, 0.8]])  # joint 2 is dropped
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


# GridConv and D-GridConv


@given(grids, paddings, st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 5]), st.integers(1, 3), st.booleans(),
       st.integers(0, 999))
def test_dgridconv_is_equation_8(grid, padding, K, c_in, c_out, bias, seed):
    torch.manual_seed(seed)
    layer = gridconv.DynamicGridConv(c_in, c_out, K, padding, grid, bias).double()
    x = torch.randn(2, c_in, *grid, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(2, *grid, K, K, dtype=torch.float64, requires_grad=True)
    want = plain_dgridconv(x, layer.weight, layer.bias, padding, alpha)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        got = layer(x.contiguous(memory_format=memory_format), alpha)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        with torch.no_grad():  # scales in place
            torch.testing.assert_close(layer(x.contiguous(memory_format=memory_format), alpha), got, rtol=1e-10, atol=1e-10)
    inputs = [x, alpha, layer.weight] + ([layer.bias] if bias else [])
    push = torch.randn_like(want)
    for mine, plain in zip(torch.autograd.grad((got * push).sum(), inputs), torch.autograd.grad((want * push).sum(), inputs)):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)
    single = copy.deepcopy(layer).float()(x.float(), alpha.float())
    assert (single - want.float()).norm() <= 1e-5 * want.norm() + 1e-7


@given(grids, paddings, st.sampled_from([1, 3, 5]), st.integers(0, 999))
def test_constant_attention_is_vanilla_and_vanilla_is_conv2d_over_the_padded_grid(grid, padding, K, seed):
    torch.manual_seed(seed)
    dynamic = gridconv.DynamicGridConv(2, 3, K, padding, grid).double()
    vanilla = gridconv.GridConv(2, 3, K, padding, grid).double()
    vanilla.load_state_dict({k: v for k, v in dynamic.state_dict().items() if "attention" not in k})
    x, pad = torch.randn(2, 2, *grid, dtype=torch.float64), K // 2
    got = vanilla(x)
    torch.testing.assert_close(dynamic(x, torch.ones(2, *grid, K, K, dtype=torch.float64)), got, rtol=1e-10, atol=1e-10)
    want = 0
    for branch, mode in enumerate(padding):
        mode = (mode, mode) if isinstance(mode, str) else mode
        padded = torch.zeros(2, 2, grid[0] + 2 * pad, grid[1] + 2 * pad, dtype=torch.float64)
        for i in range(padded.shape[2]):
            for j in range(padded.shape[3]):
                cell = source_cell(i - pad, j - pad, grid, mode)
                if cell is not None:
                    padded[:, :, i, j] = x[:, :, cell[0], cell[1]]
        want = want + torch.conv2d(padded, vanilla.weight[branch], vanilla.bias[branch])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_padding_modes_agree_with_torchs_own():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for mode, name in (("circular", "circular"), ("replicate", "replicate"), ("zeros", "constant")):
        layer = gridconv.GridConv(3, 4, 3, (mode,)).double()
        want = torch.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode=name), layer.weight[0], layer.bias[0])
        torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
    # a pair is (vertical, horizontal): replicate the rows, wrap the columns around
    layer = gridconv.GridConv(3, 4, 3, (("replicate", "circular"),)).double()
    padded = torch.nn.functional.pad(torch.nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1), mode="replicate")
    torch.testing.assert_close(layer(x), torch.conv2d(padded, layer.weight[0], layer.bias[0]), rtol=1e-10, atol=1e-10)


def test_281_products_are_left_of_450():
    layer = gridconv.GridConv(1, 1)
    assert sum(cells * taps for cells, taps in layer.classes) == len(layer.source) == 169 + 2 * 56
    assert len(gridconv.GridConv(1, 1, padding=("circular", "zeros")).source) == 169 + 56


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


# The network


def test_network_sizes_of_the_paper():
    def size(**options):
        return sum(p.numel() for p in gridconv.GridLiftingNetwork(**options).parameters())
    assert size() == 4790406
    assert size(layout=gridconv.AutoGrids()) == 4790831
    assert size() - size(attention=None) == 43654
    for sizes, millions in (((3, (3, 1), 3), 2.69), ((3, (5, 3), 3), 9.00), ((3, (3, 3), 1), 4.77)):  # Table E
        assert round(size(kernel_sizes=sizes) / 1e6, 2) == millions
    assert round(size(attention=None, hidden=512) / 1e6, 2) == 18.93  # Figure B


def training_losses(net, pose, target, lr, steps):
    """The losses of `steps` steps of Adam on one batch, in all of which every parameter has a gradient."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr), []
    for _ in range(steps):
        loss = (net(pose) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("attention", ["grid", None, "channel", "spatial", "spatial+channel"])
def test_every_network_trains_and_its_state_goes_out_and_back(attention):
    torch.manual_seed(0)
    options = dict(hidden=8, blocks=1, attention=attention, dropout=0.0)
    net = gridconv.GridLiftingNetwork(**options)
    pose, target = torch.randn(8, 17, 2), torch.randn(8, 17, 3)
    losses = training_losses(net, pose, target, 1e-2, 20)
    assert losses[-1] < 0.8 * losses[0]
    other = gridconv.GridLiftingNetwork(**options)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(pose), net.eval()(pose))


def test_figure_8_attentions_by_loops():
    torch.manual_seed(3)
    layer = gridconv.AttentiveGridConv("spatial+channel", 3, 20).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y = gridconv.GridConv.forward(layer, x)
    got = layer(x)
    first, _, second = layer.channel
    for b in range(2):
        squeezed = torch.stack([y[b, c].mean() for c in range(20)])
        factor = 1 / (1 + torch.exp(-(second.weight @ (first.weight @ squeezed + first.bias).clamp(min=0) + second.bias)))
        z = y[b] * factor[:, None, None]
        maps = torch.stack([z.mean(0), z.max(0).values])[None]
        place = plain_dgridconv(maps, layer.spatial.weight, layer.spatial.bias, ("circular", "replicate"),
                                torch.ones(1, 5, 5, 3, 3, dtype=torch.float64))
        torch.testing.assert_close(got[b], z / (1 + torch.exp(-place[0, 0])))


@pytest.mark.parametrize("attention", ["grid", None, "channel", "spatial+channel"])
def test_an_empty_batch_gives_an_empty_batch(attention):
    assert random_network(attention=attention)(torch.zeros(0, 17, 2, dtype=torch.float64)).shape == (0, 17, 3)


def test_temperature_is_settable_and_30_unless_set():
    net = random_network()
    x = torch.randn(2, 17, 2, dtype=torch.float64)
    assert net.temperature == 30 and "temperature" not in "".join(net.state_dict())
    cold = net(x)
    net.temperature = 1
    assert net.temperature == 1 and not torch.allclose(net(x), cold)


def test_dropout_takes_whole_channels_and_the_last_layer_has_none():
    torch.manual_seed(0)
    net = gridconv.GridLiftingNetwork(hidden=32, blocks=1, dropout=0.5)
    out = net.expand(torch.randn(4, 2, 5, 5) + 3)
    dead = (out == 0).flatten(2).all(2).float().mean()
    assert 0.3 < dead < 0.75
    assert isinstance(net.shrink, gridconv.DynamicGridConv) and net.shrink.bias is None


def test_network_is_equation_9():
    net = random_network(layout=gridconv.RELEASED_5X5)
    pose = torch.randn(2, 17, 2, dtype=torch.float64)
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17).double()
    grid = gridconv.sgt(pose, S, (5, 5))
    x = net.expand(grid)
    x = x + net.blocks[0][1](net.blocks[0][0](x))
    torch.testing.assert_close(net(pose), gridconv.inverse_sgt(net.shrink(x), S))
    for layer in (net.expand, *net.blocks[0]):
        h = torch.randn(2, layer.conv.weight.shape[2], 5, 5, dtype=torch.float64)
        y = layer.conv(h)
        n = layer.norm
        want = (y - n.running_mean[:, None, None]) / (n.running_var[:, None, None] + n.eps).sqrt()
        want = (want * n.weight[:, None, None] + n.bias[:, None, None]).clamp(min=0)
        torch.testing.assert_close(layer(h), want)


# Figures that the authors' code gave on weights made by formula: sin(0.7 i + 1.3 n), see golden_weights.


def golden_weights(shapes, prior=None):
    """Weights by formula: entry n in sorted order is sin(0.7 i + 1.3 n), scaled by its kind."""
    state = {}
    for n, (key, shape) in enumerate(sorted(shapes.items())):
        value = torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + 1.3 * n).reshape(shape)
        if key.endswith("sgt_trans_mat"):
            value = prior + 0.01 * value
        elif len(shape) >= 2:
            value = value / math.sqrt(math.prod(shape) / shape[0])
        else:
            value = 1 + 0.1 * value if key.endswith(("running_var", "weight")) else 0.1 * value
        state[key] = value
        if key.endswith("running_var"):
            state[key.removesuffix("running_var") + "num_batches_tracked"] = torch.tensor(0)
    return state


def golden_input(*shape):
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def released_gridconv_shapes(hidden, blocks, cells, attention=True, learnt=False, names=("branch1_", "branch2_")):
    """The entries of a released GridConv checkpoint."""
    shapes = {}

    def layer(prefix, which, c_in, c_out, last=False):
        for name in names:
            shapes[f"{prefix}w{which}.{name}weight"] = (c_out, c_in, 3, 3)
            if not last:
                shapes[f"{prefix}w{which}.{name}bias"] = (c_out,)
        for entry in () if last else ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}batch_norm{which}.{entry}"] = (c_out,)
        if attention:
            width, unit = max(c_in // 16, 16), f"{prefix}atten_conv{which}."
            shapes[unit + "fc.weight"] = (width, c_in, 1, 1)
            shapes.update({f"{unit}bn.{entry}": (width,) for entry in ("weight", "bias", "running_mean", "running_var")})
            shapes.update({unit + "position_fc.weight": (9 * cells, width, 1, 1), unit + "position_fc.bias": (9 * cells,)})

    layer("", 1, 2, hidden)
    for block in range(blocks):
        layer(f"linear_stages.{block}.", 1, hidden, hidden)
        layer(f"linear_stages.{block}.", 2, hidden, hidden)
    layer("", 2, hidden, 3, last=True)
    if learnt:
        shapes["sgt_layer.sgt_trans_mat"] = (1, cells, 17)
    return shapes

RELEASED_GRIDCONV = {  # case: (hidden, blocks, grid, padding, temperature, names, learnt), what came out: index -> value
    'dgrid_cr': ((16, 2, (5, 5), ('circular', 'replicate'), 30),
        {0: -0.017422179, 1: -0.130722977, 2: -0.234618993, 5: 0.619066598, 34: 0.598753741,
         51: -0.008497242, 68: 0.330846211, 99: -0.10372303, 100: -0.074308632, 101: -0.039548147}),
    'dgrid_cz_t1': ((16, 1, (5, 5), ('circular', 'zeros'), 1),
        {0: -0.016262982, 1: 0.055527581, 2: 0.123323248, 5: -0.314853298, 34: 0.123251218,
         51: -0.021022771, 68: -0.352718726, 99: -0.081920941, 100: -0.110777612, 101: -0.131664458}),
    'dgrid_7x3': ((8, 1, (7, 3), ('circular', 'replicate'), 1),
        {0: 0.214419325, 1: 0.099375023, 2: 0.108775761, 5: -0.021264974, 42: 0.23843736,
         63: -0.229788185, 84: -0.243826748, 123: 0.032840324, 124: -0.017526126, 125: -0.030807091}),
    'autogrids': ((16, 1, (5, 5), ('circular', 'zeros'), 1),
        {0: 0.211980724, 1: 0.144570811, 2: 0.066759844, 5: 0.412005803, 34: 0.627120066,
         51: 0.219488086, 68: 0.05244515, 99: 0.046968953, 100: 0.051463964, 101: 0.052256433}),
    'vanilla_cz': ((16, 1, (5, 5), ('circular', 'zeros'), 1),
        {0: -0.125462892, 1: -0.221975054, 2: -0.189315318, 5: -0.063743752, 50: -0.009635822,
         75: -0.112197807, 100: -0.040193677, 147: 0.187813954, 148: 0.164222917, 149: 0.154378061}),
}
RELEASED_GRIDCONV_TRAINING = 1.861667615922, {
    'w1.branch1_weight': 12.333934722631,
    'w1.branch2_weight': 12.342253869564,
    'batch_norm1.weight': 1.199042174478,
    'atten_conv1.fc.weight': 0.008796087202,
    'atten_conv1.position_fc.bias': 0.15891604805,
    'linear_stages.0.w2.branch2_weight': 9.408043525022,
    'linear_stages.1.atten_conv2.bn.bias': 0.001208389434,
    'linear_stages.1.batch_norm2.bias': 0.162343087773,
    'w2.branch1_weight': 3.840477126495,
    'atten_conv2.position_fc.weight': 0.029468442562,
}


def released_gridconv(case):
    (hidden, blocks, grid, padding, temperature), want = RELEASED_GRIDCONV[case]
    prior = None
    if case == "autogrids":  # the release's prior: the handcrafted layout one-hot and left-right mirrored
        prior = [7] * 5 + [0, 8, 8, 8, 0] + [4, 11, 9, 14, 1] + [5, 12, 9, 15, 2] + [6, 13, 10, 16, 3]
        prior = torch.nn.functional.one_hot(torch.tensor(prior), 17).double()[None]
    shapes = released_gridconv_shapes(hidden, blocks, math.prod(grid), "vanilla" not in case, case == "autogrids",
                                      ("donut_conv.", "tablet_conv.") if "vanilla" in case else ("branch1_", "branch2_"))
    state = golden_weights(shapes, prior)
    net = gridconv.from_released(state, padding, grid)
    assert net.temperature == 30 and net.shrink.weight.dtype == torch.float64
    net.temperature = temperature
    return net, want, state


@pytest.mark.parametrize("case", RELEASED_GRIDCONV)
def test_released_gridconv_weights_give_the_releases_output(case):
    net, want, _ = released_gridconv(case)
    with torch.no_grad():
        if case in ("7x3", "vanilla_cz", "dgrid_7x3"):
            out = net.eval().forward_grid(golden_input(2, 2, *net.grid_shape))
        else:
            out = net.eval()(golden_input(2, 17, 2))
    got = torch.stack([out.flatten()[i] for i in want])
    torch.testing.assert_close(got, torch.tensor(list(want.values()), dtype=torch.float64), rtol=0, atol=1e-7)


def test_released_gridconv_weights_train_as_the_release_does():
    """Training mode, dropout 0, mean square of the grid against zeros: the loss and ten gradients' norms."""
    net, _, state = released_gridconv("dgrid_cr")
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17).double()
    loss = net.train().forward_grid(gridconv.sgt(golden_input(2, 17, 2), S, (5, 5))).square().mean()
    loss.backward()
    want, norms = RELEASED_GRIDCONV_TRAINING
    assert abs(loss.item() - want) < 1e-6
    mine = {"w1": net.expand.conv, "w2": net.shrink, "atten_conv1": net.expand.conv.attention, "atten_conv2": net.shrink.attention,
            "batch_norm1": net.expand.norm, "linear_stages.0.w2": net.blocks[0][1].conv,
            "linear_stages.1.atten_conv2": net.blocks[1][1].conv.attention, "linear_stages.1.batch_norm2": net.blocks[1][1].norm}
    rename = {"fc": "squeeze", "bn": "norm", "position_fc": "position"}
    for key, norm in norms.items():
        unit = max((u for u in mine if key.startswith(u + ".")), key=len)
        *path, entry = key[len(unit) + 1:].split(".")
        module = mine[unit]
        for part in path:
            module = getattr(module, rename[part])
        grad = getattr(module, entry.split("_")[-1]).grad
        grad = grad[int(entry[6]) - 1] if entry.startswith("branch") else grad
        assert abs(grad.norm().item() - norm) < 1e-5 * max(1e-2, norm), key


def test_weights_of_something_else_are_refused():
    state = golden_weights(released_gridconv_shapes(8, 1, 25))
    for broken, says in (({"a": torch.zeros(1)}, "'a'"), ({k: v for k, v in state.items() if "w2" not in k}, "fit|w2"), ({}, "w1")):
        with pytest.raises(ValueError, match=says):
            gridconv.from_released(broken, ("circular", "zeros"))
    with pytest.raises(ValueError, match="fit"):
        gridconv.from_released(state, ("circular",))
    learnt = golden_weights(released_gridconv_shapes(8, 1, 25, learnt=True), prior=0.0)
    fc, S, w1, w2 = "atten_conv1.fc.weight", "sgt_layer.sgt_trans_mat", "w1.branch1_weight", "w2.branch1_weight"
    both = lambda value: {w2: value, "w2.branch2_weight": value}
    for change in ({"atten_conv1.foo.weight": state[fc]}, {"atten_conv1.fc": state[fc]}, {w2: state[w2][:, :4]},
                   both(state[w2][0, 0]), both(None), {w1: 3.0}, {fc: "x"}, {S: learnt[S][0, 0]}, {S: learnt[S][0]},
                   {S: learnt[S].expand(2, -1, -1)}, {S: None}, {7: state[fc]},
                   {name: value[:0] for name, value in state.items() if name.startswith("w1.branch")}):
        with pytest.raises(ValueError, match="released GridConv"):
            gridconv.from_released({**(learnt if S in change else state), **change}, ("circular", "zeros"))
    with pytest.raises(ValueError, match="released GridConv"):
        gridconv.from_released(None, ("circular", "zeros"))


# Variants: Temporal GridConv, training together with a detector, the neighbours


def size(module):
    return sum(p.numel() for p in module.parameters())


def shaken(module, seed=0):
    """The module in float64, for evaluation, every vector and running statistic random."""
    torch.manual_seed(seed)
    for tensor in module.double().state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return module.eval()


VARIANTS = {
    "3-31-3": lambda: gridconv.GridLiftingNetwork(hidden=8, blocks=1, kernel_sizes=(3, (3, 1), 3), dropout=0.0),
    "3-53-3": lambda: gridconv.GridLiftingNetwork(hidden=8, blocks=1, kernel_sizes=(3, (5, 3), 3), dropout=0.0),
    "3-33-1": lambda: gridconv.GridLiftingNetwork(hidden=8, blocks=1, kernel_sizes=(3, (3, 3), 1), dropout=0.0),
    "one branch": lambda: gridconv.GridLiftingNetwork(hidden=8, blocks=1, padding=(("replicate", "circular"),), dropout=0.0),
    "four branches": lambda: gridconv.GridLiftingNetwork(hidden=8, blocks=1, dropout=0.0, padding=(
        "circular", "replicate", ("replicate", "circular"), ("circular", "replicate"))),
    "7 x 3": lambda: gridconv.GridLiftingNetwork(layout=gridconv.random_layout(17, (7, 3)), hidden=8, blocks=1, dropout=0.0),
    "32 joints": lambda: gridconv.GridLiftingNetwork(32, gridconv.HANDCRAFTED_7X5, hidden=8, blocks=1, dropout=0.0),
    "temporal": lambda: gridconv.TemporalGridLiftingNetwork(filter_widths=(3, 3), hidden=8, dropout=0.0),
    "temporal, learnable": lambda: gridconv.TemporalGridLiftingNetwork(
        layout=gridconv.AutoGrids(), filter_widths=(3,), hidden=8, dropout=0.0),
    "fc": lambda: gridconv.FullyConnectedLifter(hidden=16, dropout=0.0),
    "gcn": lambda: gridconv.GraphConvLifter(hidden=16, dropout=0.0),
    "gcn, 32 joints": lambda: gridconv.GraphConvLifter(32, SKELETONS["h36m32"].edges, hidden=16, dropout=0.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_its_state_goes_out_and_back(name):
    torch.manual_seed(0)
    net = VARIANTS[name]()
    J, T = net.num_joints, net.receptive_field
    pose, target = torch.rand(8, *(() if T == 1 else (T,)), J, 2) * 2 - 1, torch.randn(8, J, 3)
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
    if name in ("temporal", "gcn"):
        exported = torch.export.export(net, (pose,)).module()
        torch.testing.assert_close(exported(pose), net(pose))


def test_handcrafted_layouts_keep_left_and_right():
    """The person's right stands left of the middle column, as the person faces the viewer; 5 x 5 mirrors exactly."""
    mirror = SKELETONS["h36m17"].mirror
    for row in gridconv.HANDCRAFTED_5X5:
        assert [mirror[joint] for joint in row] == list(reversed(row))
    for layout, skeleton in ((gridconv.HANDCRAFTED_5X5, "h36m17"), (gridconv.HANDCRAFTED_7X5, "h36m32")):
        skeleton = SKELETONS[skeleton]
        sides = {joint: name.split("_")[0] for joint, name in enumerate(skeleton.joints)}
        for row in layout:
            assert "left" not in [sides[joint] for joint in row[:2]] and "right" not in [sides[joint] for joint in row[3:]]


@given(st.sampled_from([1, 3, 5]), grids, st.lists(st.sampled_from(MODES), min_size=1, max_size=2).map(tuple),
       st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=15)
def test_temporal_gridconv_by_loops(frames, grid, padding, groups, seed):
    conv = shaken(gridconv.TemporalGridConv(2, 3, frames, padding, grid), seed)
    x = torch.randn(2, groups * frames, 2, *grid, dtype=torch.float64)
    got = conv(x.flatten(0, 1)).unflatten(0, (2, groups))
    for group in range(groups):
        want = 0
        for k in range(frames):
            seen = x[:, group * frames + k]
            alpha = conv.frames[k].attention(seen)
            want = want + plain_dgridconv(seen, conv.frames[k].weight, None, padding, alpha)
        torch.testing.assert_close(got[:, group], want, rtol=1e-10, atol=1e-10)


def test_temporal_gridconv_without_attention_is_torchs_conv3d():
    conv = shaken(gridconv.TemporalGridConv(2, 3, 3, ("circular",), (5, 5)))
    for frame in conv.frames:
        nn.init.constant_(frame.attention.position.bias, 1e9)  # alpha = 1
    x = torch.randn(2, 2, 9, 5, 5, dtype=torch.float64)  # (B, C, T, H, P)
    kernel = torch.stack([frame.weight[0] for frame in conv.frames], 2)  # (C_out, C_in, K_t, K_s, K_s)
    want = F.conv3d(F.pad(x.flatten(1, 2), (1, 1, 1, 1), mode="circular").unflatten(1, (2, 9)), kernel, stride=(3, 1, 1))
    got = conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("widths", [(3, 3, 3), (3, 5), (1, 3), (5,)])
def test_temporal_network_is_videopose3ds_dilated_form(widths):
    """Frame by frame, as VideoPose3D writes it: layer i reads frames apart by the product of the widths before it."""
    net = shaken(gridconv.TemporalGridLiftingNetwork(filter_widths=widths, hidden=3))
    T = math.prod(widths)
    pose = torch.randn(2, T, 17, 2, dtype=torch.float64)
    S = gridconv.assignment_matrix(gridconv.HANDCRAFTED_5X5, 17).double()

    def layer(grid_layer, features):
        y, norm = sum(conv(x) for conv, x in zip(grid_layer.conv.frames, features, strict=True)), grid_layer.norm
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        return (y * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)

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
    assert net.receptive_field == 27 and size(net) == 38063324 and round(size(net) / 1e6, 1) == 38.1
    assert [len(layer.conv.frames) for layer in (net.expand, *net.blocks[0], *net.blocks[1])] == [3, 3, 1, 3, 1]
    kernels = 2 * 9 * (3 * 2 * 512 + 2 * (3 + 1) * 512 ** 2 + 512 * 3)  # branches, K_s, K_t
    attention = lambda c, width: c * width + 2 * width + (width + 1) * 225  # of each frame of a kernel
    assert size(net) == kernels + 3 * attention(2, 16) + (3 + 1 + 3 + 1 + 1) * attention(512, 32) + 5 * 2 * 512
    assert net.temperature == 30
    net.temperature = 2.0
    assert all(m.temperature == 2 for m in net.modules() if isinstance(m, gridconv.GridAttention))
    assert len(net.scheduled_norms()) == 5 + 3 + 3 + 1 + 3 + 1 + 1
    for source, paper, padding in (("gt", (33.5, 24.7), "replicate"), ("cpn", (44.3, 33.2), "zeros")):
        recipe = train.RECIPES["gridconv-temporal-" + source]
        assert (recipe.paper_mpjpe, recipe.paper_p_mpjpe) == paper and recipe.padding == ("circular", padding)
        assert train.parameters(recipe) == 38063324 and recipe.filter_widths == (3, 3, 3) and recipe.data == "h36m"
        assert (recipe.optimizer, recipe.lr, recipe.schedule, recipe.epochs, recipe.batch, recipe.dropout) == \
            ("amsgrad", 1e-3, "0.95/1", 80, 1024, 0.25) and recipe.flips and recipe.flip_test
        train.check_recipe(recipe)
        long = dataclasses.replace(recipe, filter_widths=(3,) * 5)  # Table C prints no row by action, GLA-GCN's is another
        assert evaluation.paper_row(recipe) is None and evaluation.paper_row(long) is None
    assert train.RECIPES["gridconv-temporal-gt"].keypoints == "gt"
    assert train.RECIPES["gridconv-temporal-cpn"].keypoints == "cpn_ft_h36m_dbb"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_soft_argmax_by_loops(h, w, seed):
    torch.manual_seed(seed)
    heatmaps = torch.randn(2, 3, h, w, dtype=torch.float64) * 3
    got, longest = gridconv.soft_argmax(heatmaps), max(h, w)
    for b in range(2):
        for j in range(3):
            total, x, y = 0.0, 0.0, 0.0
            for r in range(h):
                for c in range(w):
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
    target_2d, target_3d = torch.rand(2, 4, 2, dtype=torch.float64), torch.rand(2, 4, 3, dtype=torch.float64)

    def loss(heatmaps, lift, **weight):
        pose = gridconv.soft_argmax(heatmaps)
        return gridconv.joint_loss(pose, target_2d, (pose.flatten(1) @ lift).view(2, 4, 3), target_3d, **weight)

    pose = gridconv.soft_argmax(heatmaps).detach()
    off_2d, off_3d = pose - target_2d, (pose.flatten(1) @ lift.detach()).view(2, 4, 3) - target_3d
    want_2d = sum(abs(v) for v in off_2d.flatten().tolist()) / 16
    want_3d = sum(v * v for v in off_3d.flatten().tolist()) / 24
    assert loss(heatmaps, lift).item() == pytest.approx(want_2d + 160 * want_3d)
    assert loss(heatmaps, lift, weight=3.0).item() == pytest.approx(want_2d + 3 * want_3d)
    assert torch.autograd.gradcheck(loss, (heatmaps, lift))
    assert torch.autograd.gradcheck(gridconv.soft_argmax, heatmaps)


def test_a_tiny_detector_learns_together_with_the_lifter():
    """Blurred images of single joints, a detector that is almost blind, a lifter trained on true 2D: under Eq. 13 the 2D
    and the 3D error fall together."""
    torch.manual_seed(0)
    pose_2d = torch.rand(16, 17, 2) * 1.4 - 0.7
    pose_3d = 0.3 * torch.cat([pose_2d, pose_2d @ torch.randn(2, 1)], 2)
    at = (2 * torch.arange(16) + 1 - 16) / 16
    images = torch.exp(-100 * ((at - pose_2d[..., :1])[:, :, None, :] ** 2 + (at - pose_2d[..., 1:])[:, :, :, None] ** 2))
    detector = nn.Conv2d(17, 17, 3, padding=1)
    nn.init.dirac_(detector.weight)
    lifter = gridconv.GridLiftingNetwork(hidden=8, blocks=1, dropout=0.0)
    optimizer = torch.optim.Adam(lifter.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (lifter(pose_2d) - pose_3d).square().mean().backward()
        optimizer.step()
    lifter.eval()
    optimizer = torch.optim.Adam([{"params": detector.parameters(), "lr": 0.1}, {"params": lifter.parameters(), "lr": 1e-3}])
    errors = []
    for _ in range(50):
        found = gridconv.soft_argmax(detector(images))
        lifted = lifter(found)
        errors.append([(found - pose_2d).norm(dim=-1).mean().item(), (lifted - pose_3d).norm(dim=-1).mean().item()])
        optimizer.zero_grad()
        gridconv.joint_loss(found, pose_2d, lifted, pose_3d).backward()
        optimizer.step()
    assert errors[-1][0] < 0.25 * errors[0][0] and errors[-1][1] < 0.25 * errors[0][1]
    loss = (lifter(gridconv.soft_argmax(detector(images))) - pose_3d).square().mean()
    assert torch.autograd.grad(loss, detector.weight)[0].abs().sum() > 0  # the 3D loss alone reaches the detector


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_graph_convolution_is_the_primers_equation_1(joints, c_in, c_out, seed):
    random = np.random.default_rng(seed)
    edges = [(int(random.integers(joint)), joint) for joint in range(1, joints)]
    layer = gridconv.GraphConv(c_in, c_out, edges, joints).double()
    A = [[float((i, j) in edges or (j, i) in edges) for j in range(joints)] for i in range(joints)]
    W = [[A[i][j] + (i == j) for j in range(joints)] for i in range(joints)]
    D = [sum(row) for row in W]
    x = torch.randn(2, c_in, joints, dtype=torch.float64)
    theta, want = layer.theta.weight, torch.zeros(2, c_out, joints, dtype=torch.float64)
    for b in range(2):
        for i in range(joints):
            for o in range(c_out):
                for j in range(joints):
                    for c in range(c_in):
                        want[b, o, i] += D[i] ** -0.5 * W[i][j] * D[j] ** -0.5 * x[b, c, j] * theta[o, c, 0]
    torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)  # the graph is kept in float32
    torch.testing.assert_close(gridconv.GraphConv(c_in, c_out, [(j, i) for i, j in edges], joints).graph, layer.graph.float())


def plain_layer(layer, x):
    """nn.Sequential(linear map, batch norm, ReLU, dropout) in evaluation; x (B, C) or (B, C, J)."""
    linear, norm, _, _ = layer
    y, column = linear(x), (...,) + (None,) * (x.dim() - 2)
    y = (y - norm.running_mean[column]) / (norm.running_var[column] + norm.eps).sqrt()
    return (y * norm.weight[column] + norm.bias[column]).clamp(min=0)


def test_neighbours_layer_by_layer():
    for net in (shaken(gridconv.FullyConnectedLifter(hidden=6, in_dim=2)), shaken(gridconv.GraphConvLifter(hidden=6))):
        pose = torch.randn(3, 17, 2, dtype=torch.float64)
        full = isinstance(net, gridconv.FullyConnectedLifter)
        parts = list(net.network)[1:-1] if full else list(net.network)
        expand, *blocks, shrink = parts
        assert len(blocks) == 2 and sum(isinstance(m, (nn.Linear, gridconv.GraphConv)) for m in net.modules()) == 6
        x = torch.stack([torch.cat([p[j] for j in range(17)]) for p in pose]) if full else pose.transpose(1, 2)
        x = plain_layer(expand, x)
        for first, second in blocks:
            x = x + plain_layer(second, plain_layer(first, x))
        if full:
            y = x @ shrink.weight.T + shrink.bias
            want = torch.stack([torch.stack([row[3 * j:3 * j + 3] for j in range(17)]) for row in y])
        else:
            want = shrink(x).transpose(1, 2)
        torch.testing.assert_close(net(pose), want)
        assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5 if full else 0.25] * 5


def test_neighbours_parameters():
    fc, gcn = gridconv.FullyConnectedLifter(), gridconv.GraphConvLifter()
    assert size(fc) == 35 * 1024 + 4 * 1025 * 1024 + 1025 * 51 + 5 * 2 * 1024 == 4296755
    assert size(gcn) == 2 * 256 + 4 * 256 ** 2 + 256 * 3 + 5 * 2 * 256 == 265984
    assert fc.receptive_field == gcn.receptive_field == 1


@pytest.mark.parametrize("make, says", [
    (lambda: gridconv.TemporalGridLiftingNetwork(filter_widths=(3, 2), hidden=2), r"filter_widths: \(3, 2\)"),
    *((lambda widths=widths: gridconv.TemporalGridLiftingNetwork(filter_widths=widths, hidden=2),
       f"filter_widths: {re.escape(repr(widths))}") for widths in ((), (1,), (1, 1), (3.0,), (None,), 3, None)),
    (lambda: gridconv.TemporalGridLiftingNetwork(filter_widths=(3,), hidden=2)(torch.zeros(2, 9, 17, 2)), r"\(B, 3, 17, 2\)"),
    (lambda: gridconv.TemporalGridLiftingNetwork(filter_widths=(3,), hidden=2)(torch.zeros(2, 17, 2)), r"\(B, 3, 17, 2\)"),
    (lambda: gridconv.FullyConnectedLifter(hidden=2)(torch.zeros(2, 16, 2)), r"\(2, 16, 2\).*\(B, 17, 2\)"),
    (lambda: gridconv.GraphConvLifter(hidden=2)(torch.zeros(17, 2)), r"\(B, 17, 2\)"),
    (lambda: gridconv.GraphConv(1, 1, [(0, 3)], 3), r"\(0, 3\).*0\.\.2")])
def test_variants_refuse_bad_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()


VARIANT_RECIPES = [dict(method="gridconv-temporal", filter_widths=(3, 3)), dict(method="fc"), dict(method="gcn"),
                   dict(method="gcn", skeleton="h36m32"), dict(method="gridconv-temporal", layout="autogrids")]


@pytest.mark.parametrize("fields", VARIANT_RECIPES, ids=str)
def test_variants_are_built_from_recipes_and_read_back(fields, tmp_path):
    torch.manual_seed(0)
    recipe = tiny_recipe(**{"filter_widths": (3,), "temperature": 5.0, **fields})
    train.check_recipe(recipe)
    model = shaken(evaluation.build_model(recipe)).float()
    torch.save({"format": "poselift", "version": 1, "recipe": dataclasses.asdict(recipe), "model": model.state_dict(),
                "epoch": 1, "data": ""}, tmp_path / "m.pt")
    again = evaluation.load_model(tmp_path / "m.pt")
    T, J = model.receptive_field, model.num_joints
    pose = torch.randn(2, *(() if T == 1 else (T,)), J, 2)
    assert torch.equal(again(pose), model(pose)) and size(again) == train.parameters(recipe)
    assert evaluation.inspect(again).startswith(f"tiny ({fields['method']}): {size(model):,} parameters, receptive field {T}")
    assert getattr(model, "temperature", 5.0) == 5.0
    if fields["method"] == "gcn":  # the skeleton's own bones are its graph
        graph = [m for m in model.modules() if isinstance(m, gridconv.GraphConv)][0].graph
        bones = {frozenset(edge) for edge in SKELETONS[recipe.skeleton].edges}
        assert {frozenset(pair) for pair in graph.triu(1).nonzero().tolist()} == bones


@pytest.mark.parametrize("fields", VARIANT_RECIPES[:3], ids=str)
def test_variants_train_on_a_store_and_are_scored(fields, run_folder):
    recipe = tiny_recipe(**{**fields, "flips": True, "flip_test": True, "epochs": 0.01})
    result = train.train(recipe, out=run_folder / "run", quiet=True)
    model = evaluation.load_model(run_folder / "run" / "last.pt")
    store = train.make_store(recipe, "", "test", torch.device("cpu"))
    assert evaluation.evaluate(model, store, flip=True)["mpjpe"] == pytest.approx(result["last"]["mpjpe"], rel=1e-6)
    if fields["method"] == "gridconv-temporal":  # each prediction is that of its own window, edges repeated
        first = store.input[:20]
        window = torch.stack([first[max(0, min(19, 17 + k))] for k in range(-4, 5)])
        torch.testing.assert_close(evaluation.predict(model, store, [17])[0], model(window[None])[0].detach())


def test_neighbours_ablation_builds_its_rows():
    base, _, rows = train.ABLATIONS["neighbours"]
    made = {label: evaluation.build_model(dataclasses.replace(train.RECIPES[base], **fields))
            for label, (_, fields) in rows.items()}
    assert [type(m).__name__ for m in made.values()] == ["GridLiftingNetwork", "FullyConnectedLifter", "GraphConvLifter"]
    assert rows["D-GridConv"][0] == 37.1 and rows["fully connected"][0] == 45.5
    assert size(made["fully connected"]) == 4296755
    for fields in (dict(method="fc", loss="grid"), dict(method="gcn", norm_schedule=True), dict(method="linear")):
        with pytest.raises(InputError, match="grid|norm_schedule|method"):
            train.check_recipe(tiny_recipe(**fields))


# ---------------------------------------------------------------------------------------------------------------------
# glagcn.py


# ---- glagcn: the plain form, in (B, C, T, J) layout, one convolution and one product for each subset


class PlainGraphConv(nn.Module):
    def __init__(self, c_in, c_out, A, dropout=0.0):
        super().__init__()
        self.A, self.embedding = A, c_out // 4 or 3
        self.PA = nn.Parameter(torch.randn(A.shape) * 0.1)
        convs = lambda n: nn.ModuleList(nn.Conv2d(c_in, n, 1) for _ in range(3))
        self.conv_a, self.conv_b, self.conv_d = convs(self.embedding), convs(self.embedding), convs(c_out)
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.BatchNorm2d(c_out)) if c_in != c_out else nn.Identity()
        self.bn, self.dropout = nn.BatchNorm2d(c_out), dropout

    def forward(self, x):
        B, C, T, J = x.shape
        y = 0
        for k in range(3):
            theta = self.conv_a[k](x).permute(0, 3, 1, 2).reshape(B, J, -1)
            phi = self.conv_b[k](x).reshape(B, -1, J)
            attention = torch.softmax(theta @ phi / (self.embedding * T), dim=-2)
            graph = self.A[k].to(x) + self.PA[k] + attention
            y = y + self.conv_d[k]((x.reshape(B, C * T, J) @ graph).reshape(B, C, T, J))
        return torch.relu(F.dropout(self.bn(y), self.dropout, self.training) + self.down(x))


class PlainTemporal(nn.Module):
    def __init__(self, c_in, c_out, kernel=9, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, (kernel, 1), stride=(stride, 1), padding=(kernel // 2, 0))
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return self.bn(self.conv(x))


class PlainBlock(nn.Module):
    def __init__(self, c_in, c_out, A, stride=1, residual=True, dropout=0.0):
        super().__init__()
        self.gcn1, self.tcn1 = PlainGraphConv(c_in, c_out, A, dropout), PlainTemporal(c_out, c_out, stride=stride)
        self.residual = None if not residual else nn.Identity() if c_in == c_out else PlainTemporal(c_in, c_out, 1)

    def forward(self, x):
        y = self.tcn1(self.gcn1(x))
        return torch.relu(y if self.residual is None else y + self.residual(x))


class PlainGLAGCN(nn.Module):
    """Its weights have the release's names, so that from_released reads them."""

    def __init__(self, channels=8, widths=(3, 3), edges=glagcn.H36M_EDGES, joints=17, dropout=0.0):
        super().__init__()
        A = glagcn.spatial_partition(edges, joints)
        self.widths, self.dropout = widths, dropout
        self.data_bn, self.expand_gcn = nn.BatchNorm1d(joints * 2), PlainBlock(2, channels, A, dropout=dropout)
        self.layers_tcngcn = nn.ModuleList()
        for w in widths:
            self.layers_tcngcn += [PlainBlock(channels, channels, A, dropout=dropout),
                                   PlainBlock(channels, channels, A, w, residual=False, dropout=dropout)]
        self.fc = nn.Conv1d(channels, 3, 1)

    def forward(self, x):
        B, T, J, _ = x.shape
        x = self.data_bn(x.permute(0, 2, 3, 1).reshape(B, J * 2, T)).view(B, J, 2, T).permute(0, 2, 3, 1)
        x = self.expand_gcn(x)
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        for i, w in enumerate(self.widths):
            y = drop(self.layers_tcngcn[2 * i + 1](drop(self.layers_tcngcn[2 * i](x))))
            x = x[:, :, w // 2::w] + y
        return self.fc(x.mean(2)).permute(0, 2, 1)


def _gla_shake(model, seed=0):
    """Every weight and statistic moved away from its initial value, batch-norm scales to about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in list(model.named_parameters()) + list(model.named_buffers()):
        if not value.is_floating_point() or name.endswith(".A"):
            continue
        noise = torch.rand(value.shape, generator=generator).to(value) * 2 - 1
        if "running_var" in name or (value.dim() == 1 and name.endswith("weight")):
            value.data = 1 + 0.2 * noise
        elif value.dim() > 2:
            value.data = noise / math.sqrt(value[0].numel())
        else:
            value.data = value.data + 0.2 * noise
    return model


def _gla_pair(dtype, **options):
    torch.manual_seed(0)
    plain = _gla_shake(PlainGLAGCN(**options).to(dtype))
    edges = options.get("edges", glagcn.H36M_EDGES)
    return plain, glagcn.from_released(plain.state_dict(), options.get("widths", (3, 3)), edges)


def _gla_no_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("widths, channels", [((3, 3), 8), ((5,), 12), ((1, 3), 3)])
def test_gla_equals_the_plain_form(dtype, tolerance, widths, channels):
    plain, fast = _gla_pair(dtype, widths=widths, channels=channels)
    x = torch.rand(3, math.prod(widths), 17, 2, dtype=dtype) * 2 - 1
    near = lambda a, b, scale=1.0: (a - b).abs().max() <= tolerance * max(scale, b.abs().max())
    assert near(fast.eval()(x), plain.eval()(x))
    plain.train(), _gla_no_dropout(fast.train())
    weights = torch.randn(3, 17, 3, dtype=dtype)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [plain(inputs[0]), fast(inputs[1])]
    assert near(outputs[1], outputs[0])
    for out in outputs:
        (out * weights).sum().backward()
    assert near(inputs[1].grad, inputs[0].grad)
    gradients = {name: value.grad for name, value in plain.named_parameters()}
    want = glagcn.from_released({**plain.state_dict(), **gradients}, widths)  # the gradients under our names
    largest = max(value.grad.abs().max() for value in fast.parameters())
    for (name, value), (_, other) in zip(fast.named_parameters(), want.named_parameters()):
        assert near(value.grad, other, largest), name
    want = glagcn.from_released(plain.state_dict(), widths)
    for (name, value), (_, other) in zip(fast.named_buffers(), want.named_buffers()):  # running statistics
        assert near(value, other), name


# ---- glagcn: the release's golden figures


def _gla_filled(joints, channels, modules):
    """Weights in the release's names and shapes, filled with sines: no random numbers, so the figures below hold."""
    edges = glagcn.H36M_EDGES if joints == 17 else glagcn.HUMANEVA15_EDGES
    plain = PlainGLAGCN(channels, (3,) * modules, edges, joints)
    state = {}
    for n, key in enumerate(sorted(key for key in plain.state_dict() if "num_batches" not in key)):
        shape = plain.state_dict()[key].shape
        value = torch.sin(0.7 * torch.arange(shape.numel(), dtype=torch.float64) + 1.3 * n).view(shape)
        if len(shape) > 1:
            value = value / math.sqrt(shape.numel() / shape[0])
        else:
            value = 0.1 * value + key.endswith(("running_var", "weight"))
        state["module." + key] = value
        if key.endswith("running_var"):
            state["module." + key[:-11] + "num_batches_tracked"] = torch.tensor(0)
    return state


def _gla_ramp(*shape):
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


GOLDEN_GLA = [
    (17, 16, 3, 2,
     {0: -10.806688, 1: -8.251007, 2: 7.509608, 34: -10.195767, 51: -10.78259, 52: -8.541629,
      98: 3.843101, 99: -4.477578, 100: -3.713305, 101: 3.022849}),
    (15, 12, 3, 2,
     {0: -3.91758, 1: -3.143551, 2: 7.303329, 30: -6.235556, 45: -4.061009, 46: -2.991009,
      86: 10.028183, 87: -4.527346, 88: -3.716108, 89: 8.507739}),
    (17, 8, 5, 1,
     {0: 4.085521, 1: -0.634698, 2: -5.071032, 17: -4.590827, 25: 0.183127, 26: -2.003775,
      47: -3.090962, 48: 2.267489, 49: -1.114872, 50: -3.997812}),
]


@pytest.mark.parametrize("joints, channels, modules, batch, want", GOLDEN_GLA)
def test_gla_released_weights_give_the_released_figures(joints, channels, modules, batch, want):
    edges = glagcn.H36M_EDGES if joints == 17 else glagcn.HUMANEVA15_EDGES
    model = glagcn.from_released(_gla_filled(joints, channels, modules), (3,) * modules, edges).eval()
    out = model(_gla_ramp(batch, 3**modules, joints, 2)).flatten()
    assert out.dtype == torch.float64
    for i, value in want.items():
        assert out[i].item() == pytest.approx(value, abs=2e-6), i


def test_gla_released_training_gradients():
    """Training mode, dropout 0, mean square against zeros: loss and gradient norms of the release."""
    model = _gla_no_dropout(glagcn.from_released(_gla_filled(15, 12, 3), (3, 3, 3), glagcn.HUMANEVA15_EDGES).train())
    loss = model(_gla_ramp(2, 27, 15, 2)).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.338103762, abs=1e-7)
    spatial = model.expand.spatial
    norms = {
        "data_bn.weight": (model.data_norm.weight.grad, 0.214019425),
        "expand_gcn.gcn1.PA": (spatial.B.grad, 0.85768449),
        "expand_gcn.gcn1.conv_a.1.weight": (spatial.embed.weight.grad[3:6], 0.00671887333),
        "expand_gcn.gcn1.conv_b.2.bias": (spatial.embed.bias.grad[15:], 0.0001411041),
        "expand_gcn.gcn1.down.0.weight": (spatial.shortcut[0].weight.grad, 0.122013894),
        "layers_tcngcn.0.gcn1.conv_d.1.weight": (model.strided[0].first.spatial.W.grad[:, :, 1], 0.793644016),
        "layers_tcngcn.1.gcn1.PA": (model.strided[0].second.spatial.B.grad, 0.135098704),
        "layers_tcngcn.3.tcn1.conv.weight": (model.strided[1].second.temporal.weight.grad, 0.77511895),
        "layers_tcngcn.4.gcn1.bn.weight": (model.strided[2].first.spatial.norm.weight.grad, 0.0221015426),
        "fc.weight": (model.head.W_shared.grad, 2.90175851),
        "fc.bias": (model.head.b_shared.grad, 0.517466994),
    }
    for name, (gradient, want) in norms.items():
        assert gradient.norm().item() == pytest.approx(want, abs=1e-6, rel=1e-5), name


# ---- glagcn: the graph


@given(st.integers(2, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_gla_partition(joints, draw):
    parents = [draw.draw(st.integers(0, joint - 1)) for joint in range(1, joints)]
    edges = [(parent, joint + 1) for joint, parent in enumerate(parents)]
    A = glagcn.spatial_partition(edges, joints)
    assert torch.equal(A[0], torch.eye(joints, dtype=torch.float64))
    for joint in range(joints):  # a child takes its parent's feature, a parent the mean of its children's
        children = [c for p, c in edges if p == joint]
        for other in range(joints):
            assert A[1, other, joint] == (joint > 0 and other == parents[joint - 1])
            assert A[2, other, joint] == ((1 / len(children)) if other in children else 0)
    symmetric = glagcn.spatial_partition(edges, joints, "symmetric")
    for k, plain in enumerate((A[0], (A[1] > 0).double(), (A[2] > 0).double())):
        degree = [sum(plain[i].tolist()) + 0.001 for i in range(joints)]
        for i in range(joints):
            for j in range(joints):
                assert symmetric[k, i, j].item() == pytest.approx(plain[i, j].item() / math.sqrt(degree[i] * degree[j]))


@pytest.mark.parametrize("edges, joints", [
    (glagcn.H36M_EDGES, 17), (glagcn.HUMANEVA15_EDGES, 15), (glagcn.MPI3DHP_EDGES, 17)])
def test_gla_edges_connect_every_joint_once(edges, joints):
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
    (((0, 1), (1, 3)), r"\(1, 3\).*0\.\.2"), (((0, 1), (-1, 2)), r"\(-1, 2\).*0\.\.2"), (((0, 1),), r"joints \[2\]"),
    ((), r"joints \[1, 2\]"), (((0, 1), (1, 2), (2, 2)), r"\(2, 2\)"), (((0, 1), (1, 2.0)), r"\(1, 2\.0\)"),
    (((0, 1), (1, "2")), r"\(1, '2'\)"), (((0, 1), (1, 2, 0)), r"\(1, 2, 0\)")])
def test_gla_bad_edges_are_named(edges, message):
    with pytest.raises(ValueError, match=message):
        glagcn.GLAGCN(3, edges, (3,), 4)


def test_gla_cycles_are_fine_and_an_unknown_normalisation_is_not():
    assert glagcn.spatial_partition(((0, 1), (1, 2), (2, 0)), 3).shape == (3, 3, 3)
    edges = glagcn.H36M_EDGES
    assert torch.equal(glagcn.spatial_partition(iter(edges), 17), glagcn.spatial_partition(edges, 17))
    with pytest.raises(ValueError, match="rows.*symmetric"):
        glagcn.spatial_partition(((0, 1),), 2, "rows")


# ---- glagcn: adaptive graph convolution


def _gla_graph_conv(c_in, c_out, joints=4, **options):
    torch.manual_seed(c_in * 10 + c_out)
    A = glagcn.spatial_partition([(i, i + 1) for i in range(joints - 1)], joints)
    return _gla_shake(glagcn.AdaptiveGraphConv(c_in, c_out, A, dropout=0.0, **options).double())


def _gla_loops(conv, x):
    """Eq. 2 and 3 in explicit loops over samples, subsets and joints; the sum before batch norm."""
    B, C, J, T = x.shape
    n, out = conv.embedding, torch.zeros(B, len(conv.W), J, T, dtype=x.dtype)
    for b in range(B):
        for k in range(3):
            embedded = [[conv.embed.weight[part * 3 * n + k * n:part * 3 * n + (k + 1) * n, :, 0, 0] @ x[b, :, j]
                         + conv.embed.bias[part * 3 * n + k * n:part * 3 * n + (k + 1) * n, None] for j in range(J)]
                        for part in (0, 1)]                                     # theta, phi of each joint: (n, T)
            for j in range(J):
                scores = torch.stack([(embedded[0][i] * embedded[1][j]).sum() / (n * T) for i in range(J)])
                attention = scores.exp() / scores.exp().sum()
                mixed = sum((conv.A[k, i, j] + conv.B[k, i, j] + attention[i]) * x[b, :, i] for i in range(J))
                out[b, :, j] += conv.W[:, :, k, 0] @ mixed + conv.bias[k][:, None]
    return out


@pytest.mark.parametrize("c_in, c_out", [(2, 8), (5, 5), (8, 3)])  # more channels, as many, fewer: both orders
def test_gla_graph_convolution_against_loops(c_in, c_out):
    conv, x = _gla_graph_conv(c_in, c_out).train(), torch.randn(2, c_in, 4, 3, dtype=torch.float64)
    want = F.batch_norm(_gla_loops(conv, x), None, None, conv.norm.weight, conv.norm.bias, True)
    want = F.relu(want + conv.shortcut(x))
    assert (conv(x) - want).abs().max() < 1e-10
    assert (conv(x.contiguous(memory_format=torch.channels_last)) - want).abs().max() < 1e-10


def test_gla_st_gcn_is_the_fixed_graph_times_edge_importance():
    conv, x = _gla_graph_conv(3, 3, adaptive=False), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert conv.embed is None and torch.equal(conv.graph(x), conv.A * conv.B)
    fresh = glagcn.AdaptiveGraphConv(3, 3, conv.A, adaptive=False)
    assert torch.equal(fresh.graph(x), fresh.A)


def test_gla_columns_of_C_sum_to_one():
    conv, x = _gla_graph_conv(6, 8), torch.randn(3, 6, 4, 7, dtype=torch.float64)
    C = conv.graph(x) - conv.A - conv.B
    assert (C.sum(-2) - 1).abs().max() < 1e-12 and (C > 0).all() and (C.sum(-1) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("c_in, c_out", [(4, 4), (8, 4)])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_gla_moving_B_moves_its_subset_alone(c_in, c_out, k):
    conv, x = _gla_graph_conv(c_in, c_out).eval(), torch.randn(2, c_in, 4, 3, dtype=torch.float64)
    seen = []
    conv.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        conv(x)
        conv.B[k, 1, 2] += 0.5
        conv(x)
    change = torch.zeros_like(seen[0])
    change[:, :, 2] = 0.5 * torch.einsum("oc,bct->bot", conv.W[:, :, k, 0], x[:, :, 1])
    assert (seen[1] - seen[0] - change).abs().max() < 1e-12 and change.abs().max() > 0


# ---- glagcn: strided modules and the network


@given(st.integers(0, 7), st.integers(1, 4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_gla_strided_module_divides_the_frames(half, groups, causal):
    width = 2 * half + 1
    A = glagcn.spatial_partition([(0, 1)], 2)
    module = glagcn.StridedAGCN(4, A, width, causal=causal).eval()
    x = torch.randn(2, 4, 2, width * groups)
    assert module(x).shape == (2, 4, 2, groups)
    with torch.no_grad():  # the residual alone: the centre frame of each group, the last with causal
        module.second.norm.weight.zero_(), module.second.norm.bias.zero_()
        frame = width - 1 if causal else half
        assert torch.equal(module(x), torch.stack([x[..., g * width + frame] for g in range(groups)], -1))
    if width > 1:
        with pytest.raises(ValueError, match=f"{width * groups + 1} frames.*{width}"):
            module(torch.randn(2, 4, 2, width * groups + 1))


@given(st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3).filter(lambda widths: max(widths) > 1), st.booleans(),
       st.sampled_from(["stride", "mean"]))
@settings(max_examples=12, deadline=None)
def test_gla_any_odd_widths_end_at_one_frame(widths, causal, temporal):
    model = glagcn.GLAGCN(3, ((0, 1), (1, 2)), widths, 4, causal=causal, temporal=temporal).eval()
    T, left = math.prod(widths), []
    assert model.receptive_field == T
    model.strided[-1].register_forward_hook(lambda module, inputs, output: left.append(output))
    pose = model(torch.randn(2, T, 3, 2))
    assert pose.shape == (2, 3, 3) and left[0].shape[-1] == (1 if temporal == "stride" else T)
    assert torch.allclose(pose, model.head(sum(left[0].unbind(-1)).transpose(1, 2) / left[0].shape[-1]), atol=1e-5)
    for wrong in (T + 1, 3 * T):
        with pytest.raises(ValueError, match=rf"2, {wrong}, 3, 2\).*batch, {T}, 3, 2\)"):
            model(torch.randn(2, wrong, 3, 2))


@pytest.mark.parametrize("shape", [(2, 9, 16, 2), (2, 9, 17, 3), (9, 17, 2), (2, 17, 9, 2)])
def test_gla_wrong_shapes_name_both_sizes(shape):
    with pytest.raises(ValueError) as error:
        glagcn.GLAGCN(filter_widths=(3, 3), channels=4)(torch.zeros(shape))
    assert str(tuple(shape)) in str(error.value) and "(batch, 9, 17, 2)" in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(filter_widths=(3, 2)), "width 2"), (dict(filter_widths=(0,)), "width 0"),
    (dict(filter_widths=(-3,)), "width -3"), (dict(filter_widths=()), "filter_widths"),
    (dict(unshared_weight=1.5), "1.5"), (dict(unshared_weight=-0.1), "-0.1"),
    (dict(unshared_weight=float("nan")), "nan"), (dict(temporal="max"), "'max'.*stride.*mean"),
    (dict(unshared_weight=7, head="full"), "unshared_weight 7"), (dict(unshared_weight=float("nan"), head="full"), "nan"),
    (dict(filter_widths=(1,)), r"filter_widths: \(1,\)"), (dict(filter_widths=[1, 1]), r"filter_widths: \[1, 1\]"),
    (dict(filter_widths=(3.0,)), r"filter_widths: \(3\.0,\)"), (dict(filter_widths=(None,)), r"filter_widths: \(None,\)"),
    (dict(filter_widths=3), "filter_widths: 3"), (dict(filter_widths=None), "filter_widths: None"),
    (dict(channels=0), "channels: 0"), (dict(channels=-4), "channels: -4"), (dict(channels=4.0), "channels: 4.0"),
    (dict(reconstruct_blocks=-1), "reconstruct_blocks: -1"), (dict(reconstruct_blocks=0.5), "reconstruct_blocks: 0.5"),
    (dict(normalisation="rows"), "'rows'.*column.*symmetric"), (dict(head="none"), "'none'.*individual.*full")])
def test_gla_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        glagcn.GLAGCN(**{"channels": 4, **options})


@pytest.mark.parametrize("options", [
    dict(reconstruct=True), dict(head="full", temporal="mean", reconstruct=True), dict(adaptive=False, reconstruct=True)])
def test_gla_an_empty_batch_gives_an_empty_batch(options):
    model = glagcn.GLAGCN(filter_widths=(3, 3), channels=8, **options).eval()
    pose, sequence = model(torch.zeros(0, 9, 17, 2), return_sequence=True)
    assert pose.shape == (0, 17, 3) and sequence.shape == (0, 9, 17, 3)


@pytest.mark.parametrize("normalisation", ["column", "symmetric"])
def test_gla_every_layer_has_the_partition_it_was_asked_for_to_the_last_bit(normalisation):
    build = lambda: glagcn.GLAGCN(filter_widths=(3,), channels=4, reconstruct=True, normalisation=normalisation)
    want = glagcn.spatial_partition(glagcn.H36M_EDGES, 17, normalisation)
    for model, A in ((build(), want.float()), (build().double(), want), (copy.deepcopy(build()).half().double(), want)):
        graphs = [module.A for module in model.modules() if isinstance(module, glagcn.AdaptiveGraphConv)]
        assert len(graphs) == 1 + 3 + 1 + 2 and all(torch.equal(graph, A) for graph in graphs)
        assert not any(name.endswith("A") for name in model.state_dict())
    released = glagcn.from_released(PlainGLAGCN(8, (3,)).double().state_dict(), (3,))
    assert torch.equal(released.strided[0].second.spatial.A, glagcn.spatial_partition(glagcn.H36M_EDGES, 17))


def _gla_count(model):
    return sum(p.numel() for p in model.parameters())


def test_gla_parameter_counts():
    """Table 5 of the paper and the release: 0.84, 1.10, 1.35, 1.88 and 48.64 M."""
    for widths, want in (((3,) * 3, 844_076), ((3,) * 4, 1_096_466), ((3,) * 5, 1_348_856)):
        assert _gla_count(glagcn.GLAGCN(filter_widths=widths, unshared_weight=0.0)) == want
    with torch.device("meta"):  # no need to fill 48 million numbers
        refinement = _gla_count(glagcn.Refinement(17))
        assert refinement == 140_322
        for channels, weight, want in ((96, 0.5, 1_876_886), (512, 0.5, 48_641_526),
                                       (96, 1.0, 1_876_595), (512, 1.0, 48_639_987)):
            model = glagcn.GLAGCN(channels=channels, reconstruct=True, unshared_weight=weight)
            assert _gla_count(model) + refinement == want


def test_gla_starts_as_released():
    torch.manual_seed(0)
    model = glagcn.GLAGCN(filter_widths=(3,), channels=96, unshared_weight=0.0)
    conv, embed = model.strided[0].first.spatial, model.strided[0].first.spatial.embed
    assert (conv.B == 1e-6).all() and (conv.norm.weight == 1e-6).all()
    assert (conv.bias == 0).all() and (embed.bias == 0).all()
    for weight, fan in ((conv.W, 96 * 96 * 3), (embed.weight, 24), (model.strided[0].first.temporal.weight, 96 * 9),
                        (model.expand.shortcut[0].weight, 96), (model.head.W_shared, 3)):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.1)
    assert conv.dropout.p == 0.1 and model.expand.norm.weight.eq(1).all()


def test_gla_scheduled_norms_leave_the_changing_shortcuts_out():
    model = glagcn.GLAGCN(filter_widths=(3,), channels=4)
    every = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert len(every) == 1 + 2 * 3 + 2
    assert {*every} - {*model.scheduled_norms()} == {model.expand.shortcut[1], model.expand.spatial.shortcut[1]}


# ---- glagcn: individually connected layers


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gla_individual_layers(weight):
    torch.manual_seed(1)
    head = glagcn.IndividuallyConnected(5, 4, unshared_weight=weight).double()
    v = torch.randn(2, 4, 5, dtype=torch.float64)
    assert (head.W is None) == (weight == 0) and (head.W_shared is None) == (weight == 1)
    for p in head.parameters():
        p.data = torch.randn_like(p)
    out = head(v.requires_grad_())
    for b in range(2):
        for i in range(4):
            want = 0
            if weight > 0:
                want = want + weight * (v[b, i] @ head.W[i] + head.b[i])
            if weight < 1:
                want = want + (1 - weight) * (v[b, i] @ head.W_shared + head.b_shared)
            assert (out[b, i] - want).abs().max() < 1e-12
    gradient, = torch.autograd.grad(out[:, 2].sum(), v, retain_graph=True)  # it never sees another joint's features
    assert (gradient[:, [0, 1, 3]] == 0).all() and (gradient[:, 2] != 0).all()
    if weight == 1:
        assert (torch.autograd.grad(out[:, 2].sum(), head.W)[0][[0, 1, 3]] == 0).all()
    same = head(v[:, :1].expand(2, 4, 5))  # the same features in every joint
    assert torch.equal(same[:, 0], same[:, 3]) == (weight == 0)


def test_gla_full_head_mixes_joints():
    model = glagcn.GLAGCN(filter_widths=(3,), channels=4, head="full")
    assert _gla_count(model.head) == 17 * 4 * 17 * 3 + 17 * 3
    v = torch.randn(1, 17, 4, requires_grad=True)
    gradient, = torch.autograd.grad(model.head(v)[:, 2].sum(), v)
    assert (gradient != 0).all()


# ---- glagcn: reconstruction, two stages, causality


def test_gla_reconstruction_and_stage_two():
    torch.manual_seed(0)
    model = glagcn.GLAGCN(filter_widths=(3, 3), channels=8, reconstruct=True)
    x = torch.randn(4, 9, 17, 2)
    pose, sequence = model(x, return_sequence=True)
    assert pose.shape == (4, 17, 3) and sequence.shape == (4, 9, 17, 3) and len(model.reconstruction) == 3
    for coordinate in sequence.unbind(-1):  # no ReLU after the last sum
        assert coordinate.min() < -0.1 and coordinate.max() > 0.1
    (glagcn.mean_distance(pose, torch.zeros(4, 17, 3)) + glagcn.mean_distance(sequence, torch.zeros(4, 9, 17, 3))
     ).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in model.sequence_head.named_parameters() if "weight" in name)
    model.zero_grad()
    model.sequence_head.register_forward_hook(lambda *_: pytest.fail("the sequence is not needed here"))
    glagcn.mean_distance(model(x), torch.zeros(4, 17, 3)).backward()  # stage two: the local loss alone
    assert all(p.grad is None for p in model.sequence_head.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("sequence_head."))


def test_gla_sequence_is_aligned_with_its_frames():
    """A frame of the sequence depends most on the same frame of the input."""
    torch.manual_seed(0)
    model = _gla_shake(glagcn.GLAGCN(3, ((0, 1), (1, 2)), (3, 7), 4, reconstruct=True, reconstruct_blocks=0)).eval()
    x = torch.randn(1, 21, 3, 2, requires_grad=True)
    sequence = model(x, return_sequence=True)[1]
    reach = torch.autograd.grad(sequence[0, 5, 1].sum(), x)[0][0].abs().sum((1, 2))
    assert reach.argmax() == 5


@pytest.mark.parametrize("options", [dict(), dict(reconstruct=True, causal=True)])
def test_gla_no_sequence_without_reconstruction_or_with_causal(options):
    model = glagcn.GLAGCN(filter_widths=(3,), channels=4, **options)
    with pytest.raises(ValueError, match="reconstruct=True and causal=False"):
        model(torch.zeros(1, 3, 17, 2), return_sequence=True)


def _gla_windows(video, T, causal):
    """Edge-padded windows (N, T, J, 2) about, or with causal ending at, every frame of (N, J, 2)."""
    frames = torch.arange(len(video))[:, None] + torch.arange(T) - (T - 1 if causal else T // 2)
    return video[frames.clamp(0, len(video) - 1)]


@pytest.mark.parametrize("temporal", ["stride", "mean"])
def test_gla_causal_pose_never_depends_on_later_frames(temporal):
    torch.manual_seed(0)
    for causal in (True, False):
        model = _gla_shake(glagcn.GLAGCN(3, ((0, 1), (1, 2)), (3, 3), 4, causal=causal, temporal=temporal)).eval()
        video = torch.randn(20, 3, 2)
        later = video.clone()
        later[12:] += torch.randn(8, 3, 2)
        before, after = (model(_gla_windows(v, 9, causal)) for v in (video, later))
        changed = (before - after).abs().amax((1, 2)) > 0
        assert changed[12:].all() and changed[:12].any() != causal
    model = _gla_shake(glagcn.GLAGCN(3, ((0, 1), (1, 2)), (3, 3), 4, causal=True)).eval()
    x = torch.randn(1, 9, 3, 2, requires_grad=True)  # the frame itself counts most
    assert torch.autograd.grad(model(x).abs().sum(), x)[0].abs().sum((0, 2, 3)).argmax() == 8


# ---- glagcn: saving, exporting, precision


@pytest.mark.parametrize("options", [
    dict(), dict(reconstruct=True, head="full"), dict(adaptive=False, unshared_weight=1.0)])
def test_gla_state_round_trip(options, tmp_path):
    model = _gla_shake(glagcn.GLAGCN(filter_widths=(3,), channels=4, **options)).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = glagcn.GLAGCN(filter_widths=(3,), channels=4, **options).eval()
    x = torch.randn(2, 3, 17, 2)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(x), other(x))


def test_gla_from_released_refuses_what_does_not_fit():
    state = PlainGLAGCN(8, (3, 3)).state_dict()
    with pytest.raises(ValueError, match="3 of them.*2 strided"):
        glagcn.from_released(state, (3, 3, 3))
    with pytest.raises(ValueError, match="fc.weight"):
        glagcn.from_released({key: value for key, value in state.items() if key != "fc.weight"}, (3, 3))
    with pytest.raises(ValueError, match="extra.weight"):
        glagcn.from_released({**state, "extra.weight": torch.zeros(1)}, (3, 3))
    with pytest.raises(ValueError, match="data_norm.bias|data_bn.bias"):
        glagcn.from_released({key: value for key, value in state.items() if key != "data_bn.bias"}, (3, 3))
    with pytest.raises(ValueError, match="0..14"):
        glagcn.from_released(PlainGLAGCN(8, (3,), glagcn.HUMANEVA15_EDGES, 15).state_dict(), (3,))
    fc, PA, tcn = "fc.weight", "expand_gcn.gcn1.PA", "expand_gcn.tcn1.conv.weight"
    for change in ({fc: state[fc][:, :, 0]}, {fc: state[fc].expand(3, 8, 5)}, {fc: state[fc][:, :0]}, {fc: None},
                   {fc: state[fc].int()}, {PA: torch.tensor(0.0)}, {PA: state[PA][0, 0]}, {PA: "x"}, {tcn: 3.0},
                   {"layers_tcngcn.": state[PA]}, {7: state[PA]}):
        with pytest.raises(ValueError, match="no GLA-GCN weights"):
            glagcn.from_released({**state, **change}, (3, 3))
    for weights, widths in ((None, (3, 3)), ([], (3, 3)), (state, 3), (state, (3.0, 3))):
        with pytest.raises(ValueError, match="no GLA-GCN weights"):
            glagcn.from_released(weights, widths)


def test_gla_can_be_exported_and_autocast():
    model = _gla_shake(glagcn.GLAGCN(filter_widths=(3, 3), channels=8, reconstruct=True)).eval()
    x = torch.rand(2, 9, 17, 2) * 2 - 1
    want = model(x)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), want, atol=1e-5)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        pose, sequence = model(x, return_sequence=True)
        loss = glagcn.mean_distance(pose.float(), torch.zeros(2, 17, 3)) + sequence.float().square().mean()
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.eval()(x).float() - model.float()(x)).abs().max() < 0.3 * want.abs().max()


# ---- glagcn: refinement


def _gla_project(points, intrinsics):
    """The Human3.6M camera model, point by point."""
    fx, fy, cx, cy, k1, k2, k3, p1, p2 = intrinsics.tolist()
    out = torch.zeros(len(points), 2, dtype=points.dtype)
    for i, (x, y, z) in enumerate(points.tolist()):
        x, y = x / z, y / z
        r2 = x * x + y * y
        bend = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + p1 * x + p2 * y
        out[i] = torch.tensor([fx * (x * bend + p1 * r2) + cx, fy * (y * bend + p2 * r2) + cy])
    return out


def test_gla_refinement():
    torch.manual_seed(0)
    net = glagcn.Refinement(17).double().eval()
    intrinsics = torch.tensor([[1145, 1143.8, 512.5, 515.5, -0.2071, 0.2478, -0.0031, -0.00098, -0.00142]] * 3).double()
    root = torch.tensor([[0.3, -0.2, 4.5]]).double().repeat(3, 1)
    pose = torch.rand(3, 17, 3, dtype=torch.float64) - 0.5
    uv = torch.stack([_gla_project(p + r, k) for p, r, k in zip(pose, root, intrinsics)])
    assert (net(pose, uv, intrinsics, root) - pose).abs().max() < 1e-6  # exact in, exact out, whatever the blend
    wrong = (pose + 0.1 * torch.randn_like(pose)).requires_grad_()
    wrong.data[..., 2] = pose[..., 2]
    out = net.train()(wrong, uv, intrinsics, root)
    assert out.shape == (3, 17, 3) and torch.equal(out[..., 2], wrong[..., 2])
    error, before = (out - pose)[..., :2], (wrong - pose)[..., :2]
    assert ((error / before > 0) & (error / before < 1)).all()  # between the prediction and the exact projection
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert (wrong.grad[..., 2] != 0).all()


def test_gla_mean_distance():
    prediction = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    loss = glagcn.mean_distance(prediction, torch.zeros(1, 2, 3))
    loss.backward()
    assert loss.item() == 2.5 and torch.isfinite(prediction.grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# data.py


H17 = SKELETONS["h36m17"]


# ---- skeletons, cameras, normalisation, flips

def test_data_skeletons_are_trees_and_mirror_themselves():
    for s in SKELETONS.values():
        assert len(s.joints) == len(s.parents) == len(set(s.joints)) == int(s.name[-2:])
        assert len(s.edges) == len(s.joints) - 1
        for joint in range(len(s.joints)):  # every joint hangs on the root
            for _ in s.joints:
                joint = joint if s.parents[joint] < 0 else s.parents[joint]
            assert joint == s.root
        for left, right in zip(s.left, s.right):
            assert s.joints[left].replace("left", "right") == s.joints[right] != s.joints[left]
        assert not any("left" in s.joints[j] or "right" in s.joints[j] for j in set(range(len(s.joints))) - {*s.left, *s.right})
    assert H17.joints == tuple(SKELETONS["h36m32"].joints[j] for j in data.H36M_17_OF_32)
    assert [H17.joints[i] for i in (0, 3, 4, 10, 11, 16)] == ["pelvis", "right_ankle", "left_hip", "head", "left_shoulder", "right_wrist"]


CAMERA_PARAMETERS = (2.290598750114441, 2.287562370300293, 0.025083, 0.028902752, -0.2070989, 0.2477752, -0.00307515,
                     -0.0009757, -0.00142447)
CAMERA_GOLDEN = [((0.556496, 0.77698, 4.762983), (0.2904045110107589, 0.39884800114767477)),
                 ((-0.287271, 0.056565, 3.953001), (-0.14121131996107592, 0.061583187059144076)),
                 ((0.555088, -0.659843, 4.654396), (0.29634677795787234, -0.29332879249257554)),
                 ((0.126825, 0.873132, 4.275348), (0.09234620267329097, 0.4918808621803816)),
                 ((-0.670435, 0.753866, 5.289457), (-0.26321490535911013, 0.35243777873652027))]


def test_data_projection_golden():
    points, want = (np.array(column) for column in zip(*CAMERA_GOLDEN))
    np.testing.assert_allclose(data.project(points, CAMERA_PARAMETERS), want, atol=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_data_projection_against_scalars(point, camera):
    point[2] = abs(point[2]) + 0.5
    fx, fy, cx, cy, k1, k2, k3, p1, p2 = data.H36M_INTRINSICS[camera]
    x, y = (max(-1.0, min(1.0, v / point[2])) for v in point[:2])
    r2 = x * x + y * y
    gain = 1 + k1 * r2 + k2 * r2 ** 2 + k3 * r2 ** 3 + p1 * x + p2 * y
    want = fx * (x * gain + p1 * r2) + cx, fy * (y * gain + p2 * r2) + cy
    np.testing.assert_allclose(data.project(np.array([point]), data.H36M_INTRINSICS[camera])[0], want, rtol=1e-12)


def test_data_world_to_camera_and_back():
    rng = np.random.default_rng(0)
    world = rng.normal(size=(5, 17, 3))
    for rig in (*data.H36M_EXTRINSICS.values(), *data.HUMANEVA_EXTRINSICS.values()):
        for extrinsics in rig:
            camera = data.world_to_camera(world, extrinsics)
            np.testing.assert_allclose(data.camera_to_world(camera, extrinsics), world, atol=1e-12)
            np.testing.assert_allclose(np.linalg.norm(camera, axis=-1), np.linalg.norm(world - extrinsics[4:], axis=-1))
            np.testing.assert_allclose(data.world_to_camera(extrinsics[4:], extrinsics), 0, atol=1e-12)
            assert camera[..., 2].min() > 0 and data.world_to_camera(extrinsics[4:] - [0, 0, 1], extrinsics)[1] > 0.9  # y is down
    w, x, y, z = (0.5, 0.5, 0.5, 0.5)  # a third of a turn about (1, 1, 1): world X, Y, Z are R's columns
    np.testing.assert_allclose(data.camera_to_world(np.eye(3), (w, x, y, z, 1, 2, 3)), np.roll(np.eye(3), 1, 1) + [1, 2, 3], atol=1e-12)


def test_data_normalise_rules():
    p, size = np.array([[0.0, 0.0], [640, 480], [320, 240]], np.float32), (640, 480)
    np.testing.assert_allclose(data.normalise(p, size, "width"), [[-1, -0.75], [1, 0.75], [0, 0]], atol=1e-7)
    np.testing.assert_allclose(data.normalise(p, size, "longest"), data.normalise(p, size, "width"))
    np.testing.assert_allclose(data.normalise(p, (480, 640), "longest")[0], [-0.75, -1], atol=1e-7)
    np.testing.assert_allclose(data.normalise(p, (480, 640), "width")[0], [-1, -640 / 480], atol=1e-7)
    np.testing.assert_allclose(data.normalise(p, size, "release-500"), (p - 500) / 500)
    for rule in ("width", "longest", "release-500"):
        got = data.normalise(torch.from_numpy(p), size, rule)
        assert got.dtype == torch.float32 and data.normalise(p, size, rule).dtype == np.float32
        np.testing.assert_allclose(got.numpy(), data.normalise(p, size, rule), atol=1e-7)
    with pytest.raises(InputError, match="unknown rule 'height'"):
        data.normalise(p, size, "height")


@given(st.sampled_from(sorted(SKELETONS)), st.sampled_from((2, 3)), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_data_flip(name, channels, seed):
    s = SKELETONS[name]
    pose = np.random.default_rng(seed).normal(size=(4, len(s.joints), channels))
    got = data.flip(pose, s)
    np.testing.assert_array_equal(data.flip(got, s), pose)
    np.testing.assert_array_equal(data.flip(torch.from_numpy(pose), s).numpy(), got)
    np.testing.assert_array_equal(got[:, s.left[0]], pose[:, s.right[0]] * ([-1, 1, 1][:channels]))


# ---- the frame store

def small_sequences(lengths=(7, 1, 4), joints=17, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        pose = rng.normal(0, 0.3, (n, joints, 3)).astype(np.float32)
        pose[:, 0] = 0
        root = (rng.normal(0, 0.3, (n, 3)) + [0, 0, 4]).astype(np.float32)
        pixels = data.project((pose + root[:, None]).astype(float), data.H36M_INTRINSICS[i % 4]).astype(np.float32)
        made.append(Sequence(f"S{i}", f"walk {i}", "54138969", pixels, pose, root,
                             data.H36M_INTRINSICS[i % 4].astype(np.float32), data.H36M_SIZES[i % 4], 50.0))
    return made


@given(st.integers(1, 12), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(("camera", "uvd")), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_data_frame_store_windows_against_a_loop(frames, causal, flips, whole, target, seed):
    sequences = small_sequences()
    store = FrameStore(sequences, "width", H17, target=target)
    assert len(store) == 12 and store.sequence.tolist() == [0] * 7 + [1] + [2] * 4
    index = torch.randint(0, 12, (9,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(9) % 2 == 0 if flips else None
    pose, goal = store.batch(index, frames, causal, mask, whole)
    for b, i in enumerate(index.tolist()):
        number = 0 if i < 7 else 1 if i == 7 else 2
        at = i - (0, 7, 8)[number]
        s, window, goals = sequences[number], [], []
        for step in range(frames):
            j = at + step - (frames - 1 if causal else frames // 2)
            j = min(max(j, 0), len(s.pose_2d) - 1)
            window.append(data.normalise(s.pose_2d[j], s.size, "width"))
            goals.append(store.target[(0, 7, 8)[number] + j].numpy() if target == "uvd" else s.pose_3d[j])
        if not whole or frames == 1:
            goals = [store.target[i].numpy() if target == "uvd" else s.pose_3d[at]]
        if flips and b % 2 == 0:
            window, goals = ([data.flip(p, H17) for p in poses] for poses in (window, goals))
        np.testing.assert_allclose(pose[b].numpy().reshape(-1, 17, 2), window, atol=1e-6)
        np.testing.assert_allclose(goal[b].numpy().reshape(-1, 17, 3), goals, atol=1e-6)
    assert pose.shape == ((9, 17, 2) if frames == 1 else (9, frames, 17, 2))
    assert goal.shape == ((9, frames, 17, 3) if whole and frames > 1 else (9, 17, 3))


@pytest.mark.parametrize("rule", ["release-500", "width", "longest"])
def test_data_uvd_round_trip(rule):
    store = FrameStore(small_sequences(), rule, H17, dtype=torch.float64, target="uvd")
    index = torch.tensor([11, 0, 7, 3])
    got = store.to_camera(store.target[index], index)
    assert (got - store.pose_3d[index]).abs().max() < 1e-9
    s = store.sequences[2]  # the target itself: a pinhole camera, then the rule
    point = (s.pose_3d + s.root[:, None])[0, 5].astype(float)
    u = float(s.intrinsics[0]) * point[0] / point[2] + float(s.intrinsics[2])
    assert store.target[8, 5, 0].item() == pytest.approx(data.normalise(np.array([u, 0.0]), s.size, rule)[0], abs=1e-6)
    assert store.target[8, 5, 2].item() == pytest.approx(float(s.pose_3d[0, 5, 2]), abs=1e-7)
    camera = FrameStore(small_sequences(), rule, H17)
    assert camera.to_camera(camera.target[index], index) is not None and torch.equal(camera.target, camera.pose_3d)


def test_data_frame_store_refuses():
    sequences = small_sequences()
    with pytest.raises(InputError, match="no sequences"):
        FrameStore([], "width", H17)
    with pytest.raises(InputError, match="17 joints.*humaneva15"):
        FrameStore(sequences, "width", SKELETONS["humaneva15"])
    with pytest.raises(InputError, match="unknown target"):
        FrameStore(sequences, "width", H17, target="depth")
    sequences[1].intrinsics = data.UNKNOWN_INTRINSICS
    with pytest.raises(InputError, match="S1 walk 1.*intrinsics"):
        FrameStore(sequences, "width", H17, target="uvd")


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


def test_data_bvh_by_hand(tmp_path):
    (tmp_path / "tiny.bvh").write_text(BVH_TINY)
    names, positions, fps = data.read_bvh(tmp_path / "tiny.bvh")
    assert names == ("Hips", "Chest", "Chest_end") and positions.shape == (2, 3, 3) and fps == pytest.approx(25)
    np.testing.assert_allclose(positions[0], [[0, 0, 0], [0, 1.5, 0], [0.25, 2, 0]], atol=1e-12)
    # 90 degrees about z: up is -x; the Yposition of Chest replaces its OFFSET; its 90 about x turns (.25, .5, 0) to (.25, 0, .5)
    np.testing.assert_allclose(positions[1], [[10, 20, 30], [8, 20, 30], [8, 20.25, 30.5]], atol=1e-12)


@pytest.mark.parametrize("legal", [
    "\ufeff" + BVH_TINY, BVH_TINY.replace("\n", "\r\n"), BVH_TINY.replace("\n", "\n\n"),
    BVH_TINY.replace("ROOT", "root").replace("JOINT", "Joint").replace("End Site", "END SITE").replace("Frames", "FRAMES"),
    BVH_TINY.replace("OFFSET", "offset").replace("CHANNELS", "Channels").replace("Frame Time", "Frame time"),
    BVH_TINY.replace("{\n", "{ ").replace("\n  }", " }"), BVH_TINY.replace("\n{\n", " {\n").replace("\n  {", "{"),
    BVH_TINY.replace("End Site\n    {\n      OFFSET 0.25 0.5 0\n    }", "End Site { OFFSET 0.25 0.5 0 }"),
    BVH_TINY.replace("90", "9.0e1").replace(" 0", "\t+0")])
def test_data_bvh_odd_but_legal(tmp_path, legal):
    for name, text in (("plain", BVH_TINY), ("odd", legal)):
        (tmp_path / f"{name}.bvh").write_bytes(text.encode())
    plain, odd = (data.read_bvh(tmp_path / f"{name}.bvh") for name in ("plain", "odd"))
    assert plain[0] == odd[0] and plain[2] == odd[2]
    np.testing.assert_array_equal(plain[1], odd[1])


def write_bvh(joints, values, newline="\n", space=" ", number="{:.9f}", seconds=0.05):
    """A BVH text from nested [name, offset, channels, children] (a child None is an end site's offset)."""
    lines = ["HIERARCHY"]

    def put(joint, depth):
        name, offset, channels, children = joint
        tab = "\t" * depth
        lines.append(f"{tab}{'ROOT' if depth == 0 else 'JOINT'} {name}")
        lines.append(f"{tab}{{")
        lines.append(f"{tab}\tOFFSET{space}" + space.join(map(str, offset)))
        lines.append(f"{tab}\tCHANNELS{space}{len(channels)}{space}" + space.join(channels))
        for child in children:
            if len(child) == 3:
                lines.extend([f"{tab}\tEnd Site", f"{tab}\t{{", f"{tab}\tOFFSET " + " ".join(map(str, child)), f"{tab}\t}}"])
            else:
                put(child, depth + 1)
        lines.append(f"{tab}}}")
    put(joints, 0)
    lines += ["MOTION", f"Frames:\t{len(values)}", f"Frame Time:{space}{seconds}"]
    lines += [space.join(number.format(v) for v in row) + " " for row in values]
    return newline.join(lines) + newline


def plain_positions(joints, row):
    """World positions of one frame, joint by joint with 3 x 3 loops: the reference."""
    row, out = list(row), []

    def times(a, b):
        return [[sum(a[i][k] * b[k][j] for k in range(3)) for j in range(3)] for i in range(3)]

    def turn(axis, degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return {"X": [[1, 0, 0], [0, c, -s], [0, s, c]], "Y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
                "Z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}[axis]

    def visit(joint, rotation, origin):
        if len(joint) == 3:
            out.append([origin[i] + sum(rotation[i][k] * joint[k] for k in range(3)) for i in range(3)])
            return
        _, offset, channels, children = joint
        offset, own = list(offset), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        for channel in channels:
            value = row.pop(0)
            if channel.endswith("position"):
                offset["XYZ".index(channel[0])] = value
            else:
                own = times(own, turn(channel[0], value))
        at = [origin[i] + sum(rotation[i][k] * offset[k] for k in range(3)) for i in range(3)]
        out.append(at)
        for child in children:
            visit(child, times(rotation, own), at)
    visit(joints, [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 0, 0])
    return out


@st.composite
def bvh_skeletons(draw, depth=0):
    channels = draw(st.permutations(["Xrotation", "Yrotation", "Zrotation"]))[:draw(st.integers(1, 3))]
    channels += draw(st.permutations(["Xposition", "Yposition", "Zposition"]))[:draw(st.integers(0, 3))]
    channels = draw(st.permutations(channels))
    offset = draw(st.lists(st.integers(-9, 9), min_size=3, max_size=3))
    children = [draw(bvh_skeletons(depth + 1)) for _ in range(draw(st.integers(0, 2)) if depth < 2 else 0)]
    name = "j" + str(draw(st.integers(0, 10 ** 9)))
    return [name, offset, channels, children or [tuple(draw(st.lists(st.integers(-9, 9), min_size=3, max_size=3)))]]


@given(bvh_skeletons(), st.integers(0, 99), st.sampled_from(("\n", "\r\n")), st.sampled_from((" ", "\t", "   ")),
       st.sampled_from(("{:.9f}", "{:.12e}", "{:.10E}")))
@settings(max_examples=40, deadline=None)
def test_data_bvh_any_channel_order_against_a_plain_loop(tmp_path_factory, skeleton, seed, newline, space, number):
    def count(joint):
        return 0 if len(joint) == 3 else len(joint[2]) + sum(map(count, joint[3]))
    values = np.random.default_rng(seed).uniform(-180, 180, (3, count(skeleton)))
    path = tmp_path_factory.mktemp("bvh") / "any.bvh"
    path.write_bytes(write_bvh(skeleton, values, newline, space, number).encode())
    names, positions, fps = data.read_bvh(path)
    assert fps == pytest.approx(20) and names[0] == skeleton[0]
    for frame, row in enumerate(values):
        np.testing.assert_allclose(positions[frame], plain_positions(skeleton, row), atol=1e-5)


@pytest.mark.parametrize("change, message", [
    (lambda t: t[:-20], "frame 1: .* values for 10 channels"),
    (lambda t: t[:t.index("10 20")], "1 frames where its header says 2"),
    (lambda t: t[:t.index("MOTION")], "no MOTION"),
    (lambda t: t[:t.index("}")], "no MOTION"),
    (lambda t: "", "not a BVH file"),
    (lambda t: "\x89PNG\r\n\x1a\n", "line 1.*not what a BVH"),
    (lambda t: t.replace("10 20", "nan 20"), "frame 1: NaN"),
    (lambda t: t.replace("10 20", "ten 20"), "not a number"),
    (lambda t: t.replace("Frames: 2", "Frames: 3"), "2 frames where its header says 3"),
    (lambda t: t.replace("Frames: 2", "Frames: x"), "line 17.*'Frames:' and a number"),
    (lambda t: t.replace("Frame Time: 0.04", "Frame Time: 0"), "above 0"),
    (lambda t: t.replace("CHANNELS 4", "CHANNELS 5"), "line 9"),
    (lambda t: t.replace("OFFSET 0 1.5 0", "OFFSET 0 1.5"), "line 8"),
    (lambda t: t.replace("Yposition Zrot", "Yscale Zrot"), "line 9"),
])
def test_data_bvh_bad_files(tmp_path, change, message):
    path = tmp_path / "bad.bvh"
    path.write_text(change(BVH_TINY))
    with pytest.raises(InputError, match=message) as error:
        data.read_bvh(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def person(names, seed=0, frames=6, leg=40.0, end=(0, 12, 0)):
    """A BVH person, y up, that walks off: (skeleton, values). `names`: ours -> theirs."""
    n = names.get
    turns = ["Zrotation", "Xrotation", "Yrotation"]

    def limb(side, first, second, third, at, bone):
        return [n(f"{side}_{first}"), at, turns, [[n(f"{side}_{second}"), bone, turns, [[n(f"{side}_{third}"), bone, turns, [(0, -5, 3)]]]]]]
    x = {"left": 1, "right": -1}
    arms = [[n(f"{side}_collar"), (5 * x[side], 6, 0), turns, [limb(side, "shoulder", "elbow", "wrist", (15 * x[side], 2, 0), (25 * x[side], 0, 0))]]
            for side in x]
    legs = [limb(side, "hip", "knee", "ankle", (10 * x[side], -5, 0), (0, -leg, 1)) for side in x]
    trunk = [n("spine"), (0, 25, 0), turns, [*arms, [n("thorax"), (0, 18, 0), turns, [[n("neck"), (0, 10, 2), turns, [end]]]]]]
    skeleton = [n("pelvis"), (0, 0, 0), ["Xposition", "Yposition", "Zposition", *turns], [trunk, *legs]]
    values = np.random.default_rng(seed).uniform(-20, 20, (frames, 6 + 3 * 17))
    values[:, 0] += np.linspace(0, 900, frames)
    values[:, 1] += 90
    return skeleton, values


def bandai_names():
    limbs = {"collar": "Shoulder", "hip": "UpperLeg", "knee": "LowerLeg", "ankle": "Foot", "shoulder": "UpperArm", "elbow": "LowerArm", "wrist": "Hand"}
    return {"pelvis": "Hips", "spine": "Chest", "thorax": "Neck", "neck": "Head",
            **{f"{side}_{ours}": f"{theirs}_{side[0].upper()}" for side in ("left", "right") for ours, theirs in limbs.items()}}


def sided_names(trunk, *limbs, prefix=""):
    ours = ("hip", "knee", "ankle", "shoulder", "elbow", "wrist", "collar")
    names = {**dict(zip(("pelvis", "spine", "thorax", "neck"), trunk)),
             **{f"{side}_{o}": side.capitalize() + theirs for side in ("left", "right") for o, theirs in zip(ours, limbs)}}
    return {o: prefix + name for o, name in names.items()}


CONVENTIONS = {
    "bandai": bandai_names(),
    "motionbuilder": sided_names(("Hips", "Spine1", "Neck1", "Head"), "UpLeg", "Leg", "Foot", "Arm", "ForeArm", "Hand", "Shoulder"),
    "3dsmax": sided_names(("Hips", "Chest2", "Neck", "Head"), "Hip", "Knee", "Ankle", "Shoulder", "Elbow", "Wrist", "Collar"),
    "mixamo": sided_names(("Hips", "Spine1", "Neck", "Head"), "UpLeg", "Leg", "Foot", "Arm", "ForeArm", "Hand", "Shoulder", prefix="mixamorig:"),
    "lafan1": sided_names(("Hips", "Spine1", "Neck", "Head"), "UpLeg", "Leg", "Foot", "Arm", "ForeArm", "Hand", "Shoulder")}


@pytest.fixture(scope="module")
def bvh_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i, (motion, style) in enumerate([("walk", "normal"), ("bow", "old"), ("run-fast", "normal"), ("walk", "old"), ("bow", "shy"),
                                         ("walk", "shy"), ("bye", "shy"), ("bye", "tired")]):
        skeleton, values = person(bandai_names(), seed=i, frames=5 + i)
        (folder / f"dataset-1_{motion}_{style}_001.bvh").write_text(write_bvh(skeleton, values))
    return folder


def data_command(*arguments):
    return subprocess.run([sys.executable, Path(data.__file__).name, *map(str, arguments)], capture_output=True, text=True,
                          cwd=Path(data.__file__).parent)


def test_data_bvh_command_follows_the_open_benchmark(bvh_folder, tmp_path):
    done = data_command("bvh", bvh_folder, "--out", tmp_path / "out", "--name", "mine", "--test", "_old_")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["data_2d_mine_gt.npz", "data_3d_mine.npz"]
    for name in os.listdir(tmp_path / "out"):  # plain arrays
        with np.load(tmp_path / "out" / name, allow_pickle=False) as archive:
            assert str(archive["made_by"]) == data.MADE_BY and all(archive[key].dtype.kind != "O" for key in archive)
    clips = sorted(bvh_folder.iterdir())
    for split in ("train", "test"):
        sequences = data.load_mocap(tmp_path / "out", "mine", split=split)
        chosen = [i for i, clip in enumerate(clips) if ("_old_" in clip.name) == (split == "test")]
        assert [s.camera for s in sequences[:4]] == list(data.H36M_CAMERAS) and len(sequences) == 4 * len(chosen)
        for number, s in enumerate(sequences):
            i, c = chosen[number // 4], number % 4
            names, raw, fps = data.read_bvh(clips[i])
            joint = lambda name: raw[:, names.index(name)]
            order = ["Hips", "UpperLeg_R", "LowerLeg_R", "Foot_R", "UpperLeg_L", "LowerLeg_L", "Foot_L", "Chest", "Neck", "Head", None,
                     "UpperArm_L", "LowerArm_L", "Hand_L", "UpperArm_R", "LowerArm_R", "Hand_R"]
            leg = np.mean([math.dist(joint(a + side)[0], joint(b + side)[0]) * 2 for side in ("_L", "_R")
                           for a, b in (("UpperLeg", "LowerLeg"), ("LowerLeg", "Foot"))])
            rig = data.H36M_EXTRINSICS[("S1", "S5", "S6", "S7", "S8", "S9", "S11")[i % 7]][c]
            pelvis = joint("Hips") * 0.9 / leg
            centre = pelvis.mean(0)
            assert np.abs(pelvis - centre)[:, 0].max() > 1.5  # the clamp has work to do
            for t in range(len(raw)):
                shift = [min(max(pelvis[t, k] - centre[k], -1.5), 1.5) - pelvis[t, k] for k in (0, 2)]
                pose = []
                for name in order:
                    x, y, z = (joint(name)[t] if name else 2 * joint("Head")[t] - joint("Neck")[t]) * 0.9 / leg
                    x, z = x + shift[0], z + shift[1]
                    pose.append(data.world_to_camera(np.array([x, -z, y]), rig))
                np.testing.assert_allclose(s.pose_3d[t], np.array(pose) - pose[0], atol=1e-5)
                np.testing.assert_allclose(s.root[t], pose[0], atol=1e-5)
                np.testing.assert_allclose(s.pose_2d[t], data.project(np.array(pose), data.H36M_INTRINSICS[c]), atol=1e-3)
            assert s.fps == pytest.approx(20) and s.size == data.H36M_SIZES[c] and s.source.startswith("8 BVH clips")
            np.testing.assert_allclose(s.intrinsics, data.H36M_INTRINSICS[c], rtol=1e-6)
            assert data.provenance(sequences) != "Human3.6M"
    assert {(s.subject, s.action) for s in sequences} == {("Sold", "bow 001"), ("Sold", "walk 001")}


@pytest.mark.parametrize("convention", sorted(CONVENTIONS))
def test_data_bvh_conventions(convention, tmp_path):
    names = CONVENTIONS[convention]
    for i in range(2):
        skeleton, values = person(names, seed=i)
        (tmp_path / f"clip_{i}.bvh").write_text(write_bvh(skeleton, values))
    data.convert_bvh(tmp_path, tmp_path, "one", "_1")
    found, raw, _ = data.read_bvh(tmp_path / "clip_1.bvh")
    s = data.load_mocap(tmp_path, "one", split="test")[0]
    scale = np.linalg.norm(s.pose_3d[0, 12] - s.pose_3d[0, 11]) / np.linalg.norm(np.subtract(*(raw[0, found.index(names[j])] for j in ("left_elbow", "left_shoulder"))))
    end = "Neck" if convention == "bandai" else names["neck"] + "_end"  # Bandai-Namco's end sites mean nothing
    head = raw[:, found.index(end)]
    head = 2 * raw[:, found.index("Head")] - head if convention == "bandai" else head
    theirs = np.stack([head if j == "head" else raw[:, found.index(names[j])] for j in H17.joints], 1) * scale
    distances = lambda pose: np.linalg.norm(pose[:, :, None] - pose[:, None], axis=-1)
    np.testing.assert_allclose(distances(s.pose_3d), distances(theirs), atol=1e-4)


def test_data_bvh_mapping_scale_axis_rate_volume(tmp_path):
    names = {ours: f"bone{i}" for i, ours in enumerate(CONVENTIONS["bandai"])}
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(2):
        skeleton, values = person(names, seed=i, frames=11)
        (clips / f"{'ab'[i]}.bvh").write_text(write_bvh(skeleton, values))
    failed = data_command("bvh", clips, "--out", tmp_path, "--test", "^b")
    assert failed.returncode == 2 and "no joint known for pelvis" in failed.stderr and "--map" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and not list(tmp_path.glob("*.npz"))
    (tmp_path / "map.json").write_text(json.dumps({ours: name for ours, name in names.items() if "collar" not in ours}))
    options = ("--map", tmp_path / "map.json", "--scale", "0.01", "--up", "z", "--fps", "10", "--volume", "0.25")
    done = data_command("bvh", clips, "--out", tmp_path, "--test", "^b", *options)
    assert done.returncode == 0, done.stderr
    s = data.load_mocap(tmp_path, split="test")[2]
    found, raw, _ = data.read_bvh(clips / "b.bvh")
    raw = raw[::2] * 0.01  # 20 Hz to 10 Hz
    assert s.fps == 10 and len(s.pose_3d) == 6
    world = data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), data.H36M_EXTRINSICS["S5"][2])
    pelvis, knee = raw[:, found.index(names["pelvis"])], raw[:, found.index(names["left_knee"])]
    np.testing.assert_allclose(world[:, 5] - world[:, 0], knee - pelvis, atol=1e-5)
    np.testing.assert_allclose(world[:, 0, 2], pelvis[:, 2], atol=1e-5)
    np.testing.assert_allclose(world[:, 0, :2], np.clip(pelvis - pelvis.mean(0), -0.25, 0.25)[:, :2], atol=1e-5)


def test_data_bvh_command_bad_input(bvh_folder, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    for arguments, message in [
            ((tmp_path / "empty", "--test", "a"), "no BVH files"), ((tmp_path / "none", "--test", "a"), "no such folder"),
            ((bvh_folder, "--test", "nothing"), "matches none"), ((bvh_folder, "--test", "bvh"), "matches all"),
            ((bvh_folder, "--test", "(old"), "not a regular expression"), ((bvh_folder, "--test", "old", "--scale", "big"), "--scale"),
            ((bvh_folder, "--test", "old", "--fps", "0"), "--fps"), ((bvh_folder, "--test", "old", "--volume", "-1"), "--volume"),
            ((bvh_folder, "--test", "old", "--scale", "1"), "smaller --volume"),
            ((bvh_folder, "--test", "old", "--map", tmp_path / "list.json"), "list.json"),
            ((bvh_folder, "--test", "old", "--map", tmp_path / "none.json"), "none.json"),
            ((bvh_folder, "--test", "old", "--out", tmp_path / "file" / "x"), "cannot be written")]:
        with pytest.MonkeyPatch.context() as patch:  # in this process: a dozen interpreters take long
            patch.setattr(sys, "argv", ["data.py", "bvh", "--out", str(out), *map(str, arguments)])
            with pytest.raises(InputError, match=message) as error:
                data.main()
        assert "\n" not in str(error.value) and not out.exists(), arguments
    with pytest.raises(InputError, match="unknown joints tail"):
        data.convert_bvh(bvh_folder, out, test="old", mapping={"tail": "Hips"})
    with pytest.raises(InputError, match="no joint 'Nose'"):
        data.convert_bvh(bvh_folder, out, test="old", mapping={"head": "Nose"})


def test_data_mocap_files_that_disagree(bvh_folder, tmp_path):
    data.convert_bvh(bvh_folder, tmp_path, "mocap", "old")
    path = tmp_path / "data_2d_mocap_gt.npz"
    with np.load(path) as archive:
        image = dict(archive)
    with pytest.raises(InputError, match="data_2d_mocap_cpn.npz: not found"):
        data.load_mocap(tmp_path, keypoints="cpn")
    np.savez(tmp_path / "data_2d_mocap_cpn.npz", **{**image, "positions_2d": np.pad(image["positions_2d"], [(0, 0)] * 3 + [(0, 1)])})
    cpn, gt = data.load_mocap(tmp_path, keypoints="cpn"), data.load_mocap(tmp_path)
    assert all(np.array_equal(a.pose_2d, b.pose_2d) and a.pose_2d.shape[2] == 2 for a, b in zip(cpn, gt))  # confidence cut
    np.savez(path, **{**image, "positions_2d": image["positions_2d"][:, :-1]})
    with pytest.raises(InputError, match="data_2d_mocap_gt.npz: its clips or frames are not those"):
        data.load_mocap(tmp_path)
    broken = image["positions_2d"].copy()
    broken[1, 2, 3, 0] = np.nan
    np.savez(path, **{**image, "positions_2d": broken})
    with pytest.raises(InputError, match=r"dataset-1_bow_old_001.bvh: Sold bow 001 camera 55011271, 2D, frame 2: NaN"):
        data.load_mocap(tmp_path, split="test")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="data_2d_mocap_gt.npz: cannot be read"):
        data.load_mocap(tmp_path)


# ---- synthetic motion

@pytest.fixture(scope="module")
def synthetic():
    return data.synthesize(0)


def yardsticks_of(train, test):
    x, y, xt, yt = (np.concatenate(parts).astype(float) for parts in (
        [(s.pose_2d - 500) / 500 for s in train], [s.pose_3d for s in train], [(s.pose_2d - 500) / 500 for s in test], [s.pose_3d for s in test]))
    one = lambda a: np.c_[a.reshape(len(a), -1), np.ones(len(a))]
    error = lambda pose: 1000 * np.linalg.norm(pose - yt, axis=-1).mean()
    return error(y.mean(0)), error((one(xt) @ np.linalg.lstsq(one(x), y.reshape(len(y), -1), rcond=None)[0]).reshape(yt.shape))


@pytest.mark.parametrize("seed", [0, 1])
def test_data_synthetic_yardsticks(seed, synthetic):
    sequences = synthetic if seed == 0 else data.synthesize(seed)
    for held_out in (("S9", "S11"), ("S6",)):
        mean, affine = yardsticks_of([s for s in sequences if s.subject not in held_out], [s for s in sequences if s.subject in held_out])
        assert mean > 120 and 40 < affine < 90, (held_out, mean, affine)


def test_data_synthetic_is_deterministic_anatomical_and_smooth(synthetic):
    again = data.synthesize(0, subjects=("S1", "S5"))
    for a, b in zip(again, [s for s in synthetic if s.subject in ("S1", "S5")], strict=True):
        assert a.action == b.action and np.array_equal(a.pose_2d, b.pose_2d) and np.array_equal(a.pose_3d, b.pose_3d)
    assert not np.array_equal(data.synthesize(1, subjects=1)[0].pose_3d, synthetic[0].pose_3d)
    assert {s.action.split()[0] for s in synthetic} == set(data.MOTIONS) and len({s.subject for s in synthetic}) == 7
    lengths = {}
    for s in synthetic:
        bones = np.linalg.norm(np.stack([s.pose_3d[:, c] - s.pose_3d[:, p] for p, c in H17.edges], 1), axis=-1)
        assert np.ptp(bones, 0).max() < 1e-5
        assert np.abs(lengths.setdefault(s.subject, bones[0]) - bones[0]).max() < 1e-5
        assert 0.7 < bones[0, 1] + bones[0, 2] < 1.1
        world = data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), data.H36M_EXTRINSICS[s.subject][data.H36M_CAMERAS.index(s.camera)])
        assert np.linalg.norm(np.diff(world, axis=0), axis=-1).max() * s.fps < 12  # m/s
        assert np.abs(np.diff(world, 2, axis=0)).max() < 0.1  # no jumps
        assert -0.1 < world[:, [3, 6], 2].min() and world[..., 2].max() < 2.6
        thigh, shank = world[:, [1, 4]] - world[:, [2, 5]], world[:, [3, 6]] - world[:, [2, 5]]
        angle = np.degrees(np.arccos(np.clip((thigh * shank).sum(-1) / np.linalg.norm(thigh, axis=-1) / np.linalg.norm(shank, axis=-1), -1, 1)))
        assert angle.min() > 38  # a knee bends 140 degrees at most
        side = world[:, 4] - world[:, 1]  # from right to left hip
        assert ((np.cross(world[:, 3] - world[:, 2], world[:, 2] - world[:, 1]) * side).sum(-1) < 0.02).all(), "a knee bent forwards"
        if s.action == "walk 1":  # forwards, one foot after the other
            forward = np.cross(side, world[:, 8] - world[:, 0])
            assert (forward[1:] * np.diff(world[:, 0], axis=0)).sum() > 0
            right, left = (((world[:, foot] - world[:, 0]) * forward).sum(-1) for foot in (3, 6))
            assert np.corrcoef(right, left)[0, 1] < 0
        np.testing.assert_allclose(s.pose_2d[0], data.project((s.pose_3d + s.root[:, None])[0].astype(float), s.intrinsics), atol=1e-2)
    subjects = list(lengths.values())
    assert all(np.abs(a - b).max() > 0.005 for i, a in enumerate(subjects) for b in subjects[:i])
    for n in (1, 3):
        assert len({s.subject for s in data.synthesize(0, subjects=n, motions=("walk",), frames=9)}) == n


# ---- published datasets, on files of their layouts

def write_objects(path, numpy1=False, protocol=4, **values):
    """An npz with 0-d object arrays; `numpy1`: the module paths of NumPy 1."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in values.items():
            body = pickle.dumps(np.array(value, dtype=object), protocol=protocol)
            if numpy1:
                body = body.replace(b"numpy._core.", b"numpy.core.").replace(b"\x8c\x16numpy.core.multiarray", b"\x8c\x15numpy.core.multiarray")
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
            archive.writestr(key + ".npy", head.getvalue() + body)


@pytest.fixture
def miniature(synthetic):
    """{subject: {action: world (T, 32, 3) float32}} of all 7 subjects, two actions each."""
    space = {}
    for s in synthetic:
        if s.camera == data.H36M_CAMERAS[0] and s.action in ("walk 1", "sit 1"):
            world = data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), data.H36M_EXTRINSICS[s.subject][0])[:8]
            wide = np.zeros((8, 32, 3), np.float32)
            wide[:, data.H36M_17_OF_32] = world
            wide[:, [4, 16, 24]] = world[:, [3, 8, 8]] + 0.1  # joints that the 17 leave out
            space.setdefault(s.subject, {})["Walking 1" if "walk" in s.action else "Directions"] = wide
    return space


def views_of(space, joints=17, extra=0, confidence=True):
    image = {}
    for subject, actions in space.items():
        for action, world in actions.items():
            pick = world[:, data.H36M_17_OF_32] if joints == 17 else world
            pick = np.concatenate([pick, pick[:1].repeat(extra, 0)])
            pixels = [data.project(data.world_to_camera(pick, e), k) for e, k in zip(data.H36M_EXTRINSICS[subject], data.H36M_INTRINSICS)]
            image.setdefault(subject, {})[action] = [np.pad(p, [(0, 0), (0, 0), (0, int(confidence))]).astype(np.float32) for p in pixels]
    return image


META = {"layout_name": "h36m", "num_joints": 17, "keypoints_symmetry": [[4, 5, 6, 11, 12, 13], [1, 2, 3, 14, 15, 16]]}


@pytest.mark.parametrize("numpy1, protocol", [(False, 4), (True, 2), (False, 2), (True, 3)])
def test_data_h36m_layout(miniature, tmp_path, numpy1, protocol):
    write_objects(tmp_path / "data_3d_h36m.npz", numpy1, protocol, positions_3d=miniature)
    projected = data.load_h36m(tmp_path)  # no file of 2D: through the cameras
    write_objects(tmp_path / "data_2d_h36m_gt.npz", numpy1, protocol, positions_2d=views_of(miniature, confidence=False), metadata=META)
    write_objects(tmp_path / "data_2d_h36m_cpn.npz", numpy1, protocol, positions_2d=views_of(miniature, extra=3), metadata=META)
    gt, cpn = data.load_h36m(tmp_path), data.load_h36m(tmp_path, "cpn", ("S9", "S1"))
    assert len(gt) == 5 * 2 * 4 and len(cpn) == 2 * 2 * 4
    assert [s.subject for s in cpn] == ["S9"] * 8 + ["S1"] * 8
    for a, b in zip(gt, projected, strict=True):
        np.testing.assert_allclose(a.pose_2d, b.pose_2d, atol=1e-3)
    s = next(s for s in cpn if (s.subject, s.action, s.camera) == ("S9", "Walking 1", "58860488"))
    assert s.pose_2d.shape == (8, 17, 2) and s.pose_3d.shape == (8, 17, 3) and s.fps == 50 and s.size == (1000, 1000)
    points = data.world_to_camera(miniature["S9"]["Walking 1"][:, data.H36M_17_OF_32], data.H36M_EXTRINSICS["S9"][2])
    np.testing.assert_allclose(s.pose_3d, points - points[:, :1], atol=1e-6)
    np.testing.assert_allclose(s.root, points[:, 0], atol=1e-6)
    np.testing.assert_allclose(s.pose_2d, data.project(points, data.H36M_INTRINSICS[2]), atol=1e-3)
    wide = data.load_h36m(tmp_path, joints=32)  # the gt file has 17: projected
    assert wide[0].pose_2d.shape == (8, 32, 2) and wide[0].pose_3d.shape == (8, 32, 3)
    np.testing.assert_allclose(wide[0].pose_2d[:, data.H36M_17_OF_32], gt[0].pose_2d, atol=1e-3)
    FrameStore(wide, "release-500", SKELETONS["h36m32"])
    with pytest.raises(InputError, match="17 joints, 3D has 32"):
        data.load_h36m(tmp_path, "cpn", joints=32)
    assert data.provenance(gt) == "files in Human3.6M layout (not Human3.6M: 320 frames)"


def recipe_of(**fields):
    return types.SimpleNamespace(**{**dict(data="h36m", keypoints="gt", skeleton="h36m17", skip="", actions=("Walk", "Jog")), **fields})


def test_data_h36m_protocol_and_refusals(miniature, tmp_path):
    path = tmp_path / "data_3d_h36m.npz"
    with pytest.raises(InputError, match="data_3d_h36m.npz: not found; register at"):
        data.load_h36m(tmp_path)
    write_objects(path, positions_3d=miniature)
    test = data.load_dataset(recipe_of(), tmp_path, "test")  # without S11 Directions
    assert {(s.subject, s.action) for s in test} == {("S9", "Walking 1"), ("S9", "Directions"), ("S11", "Walking 1")}
    assert {s.subject for s in data.load_dataset(recipe_of(), tmp_path, "train")} == {"S1", "S5", "S6", "S7", "S8"}
    with pytest.raises(InputError, match="data_2d_h36m_hrnet.npz: not found"):
        data.load_dataset(recipe_of(keypoints="hrnet"), tmp_path, "train")
    with pytest.raises(InputError, match="expected train or test"):
        data.load_dataset(recipe_of(), tmp_path, "validation")
    with pytest.raises(InputError, match="unknown data 'h37m'"):
        data.load_dataset(recipe_of(data="h37m"), tmp_path, "test")

    def refuse(message, change, **more):
        image = views_of(miniature)
        image = change(image) or image
        write_objects(tmp_path / "data_2d_h36m_x.npz", positions_2d=image, **more)
        with pytest.raises(InputError, match=message) as error:
            data.load_h36m(tmp_path, "x")
        assert "data_2d_h36m_x.npz" in str(error.value) and "\n" not in str(error.value)
    cut = lambda rows: lambda image: image["S5"].update(Directions=[view[rows] for view in image["S5"]["Directions"]])
    refuse("it holds no S6;", lambda image: image.pop("S6") and None)
    refuse("it holds no S6 Directions", lambda image: image["S6"].pop("Directions") and None)
    refuse("S7 Directions has 3 cameras", lambda image: image["S7"]["Directions"].pop() is None)
    refuse("S5 Directions camera 54138969: 2D has 7 frames, 3D has 8", cut(slice(7)))
    refuse("2D has 16 joints", cut((slice(None), slice(16))))
    refuse("2D of shape", cut((slice(None), slice(None), slice(1))))
    refuse("no dictionary", lambda image: {1})

    def poison(image):
        image["S8"]["Walking 1"][3][5, 2, 1] = np.inf
    refuse("S8 Walking 1 camera 60457274, 2D, frame 5: NaN", poison)
    miniature["S1"]["Directions"] = miniature["S1"]["Directions"][:0]
    write_objects(path, positions_3d=miniature)
    with pytest.raises(InputError, match="S1 Directions camera 54138969: no frames"):
        data.load_h36m(tmp_path)
    miniature["S1"]["Directions"] = np.full((8, 32, 3), np.nan)
    write_objects(path, positions_3d=miniature)
    with pytest.raises(InputError, match="S1 Directions.*, frame 0: NaN"):
        data.load_h36m(tmp_path)


def test_data_provenance_is_human36m_only_when_it_is():
    def sequences(frames, subject, source="files in Human3.6M layout"):
        still = np.broadcast_to(np.float32(0), (frames, 17, 3))
        return [Sequence(subject, "a", "c", still[..., :2], still, still[:, 0], data.UNKNOWN_INTRINSICS, (1, 1), 50.0, source)]
    train, test = sequences(1_559_752, "S1"), sequences(543_344, "S9")
    for real in (train, test, train + test, sequences(524_892, "S11")):
        assert data.provenance(real) == "Human3.6M"
    for other in (sequences(1_559_751, "S1"), train + sequences(5, "S9"), sequences(543_344, "S9", "files in Human3.6M layout, made by this project"),
                  sequences(543_344, "S1"), sequences(0, "S1")):
        assert data.provenance(other) != "Human3.6M"


def test_data_files_made_by_this_project_are_marked(miniature, tmp_path):
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature, made_by=data.MADE_BY)
    assert "made by this project" in data.provenance(data.load_h36m(tmp_path))


def gridconv_archives(folder, miniature, subjects, name, legacy):
    image, space = {}, {}
    for subject in subjects:
        for action, world in miniature[subject].items():
            for c, camera in enumerate(data.H36M_CAMERAS):
                points = data.world_to_camera(world[:, data.H36M_17_OF_32], data.H36M_EXTRINSICS[subject][c])
                key = (subject, action.split(" ")[0], f"{action}.{camera}")
                image[key] = data.project(points, data.H36M_INTRINSICS[c]).reshape(8, 34)
                space[key] = {"pelvis": points[:, 0] * 1000, "joints_3d" if c else "joint_3d": (points - points[:, :1]).reshape(8, 51) * 1000,
                              "camera": data.H36M_INTRINSICS[c][:4]}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in (("2d", image), ("3d", space)):
        torch.save(value, folder / f"{name}_custom_{kind}_unnorm.pth.tar", _use_new_zipfile_serialization=not legacy, pickle_protocol=2)
    return image, space


@pytest.mark.parametrize("legacy", [True, False])
def test_data_gridconv_archives(miniature, tmp_path, legacy):
    for actions in miniature.values():
        actions["Greeting"] = actions["Waiting 1"] = actions["Directions 1"] = actions["Directions"]
    gridconv_archives(tmp_path / "gt", miniature, ("S1", "S5"), "train", legacy)
    image, space = gridconv_archives(tmp_path / "gt", miniature, ("S9", "S11"), "test", legacy)
    gridconv_archives(tmp_path / "h36m" / "hrnet", miniature, ("S9", "S11"), "test", legacy)
    train, test = data.load_gridconv(tmp_path), data.load_gridconv(tmp_path / "gt", "test")
    assert len(train) == 2 * 5 * 4 and len(test) == 2 * 5 * 4
    s = test[5]
    key = list(image)[5]
    assert (s.subject, f"{s.action}.{s.camera}") == (key[0], key[2])
    np.testing.assert_allclose(s.pose_2d.reshape(8, 34), image[key], rtol=1e-6)
    np.testing.assert_allclose(s.pose_3d.reshape(8, 51), space[key]["joints_3d"] / 1000, atol=1e-6)
    np.testing.assert_allclose(s.root, space[key]["pelvis"] / 1000, atol=1e-6)
    np.testing.assert_allclose(s.intrinsics, [*space[key]["camera"], 0, 0, 0, 0, 0], rtol=1e-6)
    assert s.size == data.H36M_SIZES[data.H36M_CAMERAS.index(s.camera)]
    skipped = lambda **fields: {(s.subject, s.action) for s in data.load_dataset(recipe_of(data="gridconv", **fields), tmp_path, "test")}
    s9 = {("S9", a) for a in ("Walking 1", "Directions", "Directions 1", "Greeting", "Waiting 1")}
    s11 = {("S11", a) for a in ("Walking 1", "Directions 1", "Greeting", "Waiting 1")}
    assert skipped(skip="gridconv") == s9 | s11
    assert skipped(skip="gridconv", keypoints="hrnet") == s9 - {("S9", "Greeting"), ("S9", "Waiting 1")} | s11
    space.pop(key)
    torch.save(space, tmp_path / "gt" / "test_custom_3d_unnorm.pth.tar")
    with pytest.raises(InputError, match="dictionaries of the same sequences"):
        data.load_gridconv(tmp_path, "test")
    with pytest.raises(InputError, match="train_custom_2d_unnorm.pth.tar: not found"):
        data.load_gridconv(tmp_path, "train", "hrnet")


def test_data_humaneva_layout(tmp_path):
    rng = np.random.default_rng(0)
    space, gt, coco = {}, {}, {}
    for subject in ("Train/S1", "Train/S2", "Train/S3", "Validate/S1", "Validate/S2", "Validate/S3"):
        for action in ("Walking 1 chunk0", "Jog 1 chunk2", "Box 1 chunk0"):
            space.setdefault(subject, {})[action] = rng.normal(size=(4, 15, 3)).astype(np.float32)
            gt.setdefault(subject, {})[action] = [rng.uniform(0, 480, (5, 15, 2)) for _ in range(3)]
            coco.setdefault(subject, {})[action] = [rng.uniform(0, 480, (4, 17, 3)) for _ in range(3)]
    gt["Unlabeled/S4"] = {"Box 1 chunk0": [rng.uniform(0, 480, (5, 15, 2))] * 3}
    write_objects(tmp_path / "data_3d_humaneva15.npz", positions_3d=space)
    with pytest.raises(InputError, match="data_2d_humaneva15_gt.npz: not found"):
        data.load_humaneva(tmp_path)
    write_objects(tmp_path / "data_2d_humaneva15_gt.npz", positions_2d=gt)
    write_objects(tmp_path / "data_2d_humaneva15_detectron_pt_coco.npz", positions_2d=coco)
    sequences = data.load_humaneva(tmp_path)
    assert len(sequences) == 3 * 2 * 3 and sequences[0].size == (640, 480) and sequences[0].fps == 60
    s = sequences[4]
    assert (s.subject, s.action, s.camera) == ("Train/S1", "Jog 1 chunk2", "C2")
    points = data.world_to_camera(space["Train/S1"]["Jog 1 chunk2"], data.HUMANEVA_EXTRINSICS["S1"][1])
    np.testing.assert_allclose(s.pose_3d, points - points[:, :1], atol=1e-5)
    np.testing.assert_allclose(s.pose_2d, gt["Train/S1"]["Jog 1 chunk2"][1][:4], rtol=1e-6)
    assert len(data.load_humaneva(tmp_path, subjects=("Train/S2",), actions=("Walk", "Jog", "Box"))) == 9
    test = data.load_dataset(recipe_of(data="humaneva", keypoints="detectron_pt_coco"), tmp_path, "test")
    assert {s.subject for s in test} == {"Validate/S1", "Validate/S2", "Validate/S3"}
    raw, got = coco["Validate/S1"]["Walking 1 chunk0"][0], test[0].pose_2d
    for joint, want in [(0, (raw[:, 11] + raw[:, 12]) / 2), (1, (raw[:, 5] + raw[:, 6]) / 2), (4, raw[:, 9]), (7, raw[:, 10]), (10, raw[:, 15]),
                        (13, raw[:, 16]), (14, raw[:, 0])]:
        np.testing.assert_allclose(got[:, joint], want[:, :2], rtol=1e-6)
    store = FrameStore(test, "width", SKELETONS["humaneva15"])
    assert store.input.shape == (3 * 2 * 3 * 4, 15, 2) and torch.isnan(store.intrinsics).all()


def test_data_3dhp_layout(tmp_path):
    rng = np.random.default_rng(0)
    view = lambda frames: {"data_3d": rng.normal(0, 300, (frames, 17, 3)) + [0, 0, 3000], "data_2d": rng.uniform(0, 2048, (frames, 17, 2))}
    train = {"S1 Seq1": [{camera: view(4) for camera in "01245678"}, 25], "S2 Seq2": [{"0": view(3)}, 50]}
    test = {f"TS{i}": {**view(6), "valid": np.array([1, 0, 1, 1, 0, 1])} for i in range(1, 7)}
    write_objects(tmp_path / "data_train_3dhp.npz", data=train)
    write_objects(tmp_path / "data_test_3dhp.npz", data=test)
    sequences = data.load_3dhp(tmp_path)
    assert len(sequences) == 9 and [s.fps for s in sequences[-2:]] == [25, 50] and sequences[8].subject == "S2"
    raw = train["S1 Seq1"][0]["4"]
    s = next(s for s in sequences if s.camera == "4")
    assert (s.subject, s.action, s.size) == ("S1", "Seq1", (2048, 2048))
    np.testing.assert_allclose(s.pose_3d, (raw["data_3d"] - raw["data_3d"][:, 14:15]) / 1000, atol=1e-6)
    np.testing.assert_allclose(s.root, raw["data_3d"][:, 14] / 1000, atol=1e-6)
    tests = data.load_3dhp(tmp_path, "test")
    assert [s.size for s in tests] == [(2048, 2048)] * 4 + [(1920, 1080)] * 2
    store = FrameStore(tests, "width", SKELETONS["3dhp17"])
    assert store.valid.tolist() == [True, False, True, True, False, True] * 6
    crossed = data.load_dataset(recipe_of(data="3dhp"), tmp_path, "test")
    names = SKELETONS["3dhp17"].joints
    for ours, theirs in {"pelvis": "pelvis", "left_wrist": "left_wrist", "right_hip": "right_hip", "head": "head_top", "neck": "head",
                         "thorax": "neck", "spine": "spine"}.items():
        np.testing.assert_array_equal(crossed[0].pose_2d[:, H17.joints.index(ours)], tests[0].pose_2d[:, names.index(theirs)])
        np.testing.assert_array_equal(crossed[0].pose_3d[:, H17.joints.index(ours)], tests[0].pose_3d[:, names.index(theirs)])
    assert data.provenance(tests) == "files in MPI-INF-3DHP layout"
    write_objects(tmp_path / "data_test_3dhp.npz", data={"TS1": {**test["TS1"], "valid": np.ones(5)}})
    with pytest.raises(InputError, match="TS1: 5 flags"):
        data.load_3dhp(tmp_path, "test")
    write_objects(tmp_path / "data_test_3dhp.npz", data={"TS1": {"data_2d": 1}})
    with pytest.raises(InputError, match="TS1: not in P-STMO's layout"):
        data.load_3dhp(tmp_path, "test")


# ---- hostile and damaged files

class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


class Unknown:
    def __init__(self):
        self.state = {"weights": [1, 2]}


@pytest.mark.parametrize("value, name", [(Hostile(), r"posix\.system|nt\.system"), (Unknown(), "Unknown"), ({"a": [np.random.RandomState(0)]}, "numpy.random"),
                                         (print, "builtin.*print"), (np.lib.format.open_memmap, "open_memmap")])
def test_data_hostile_pickles_are_refused_by_name(value, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_objects("a.npz", positions_3d={"S1": value})
    with pytest.raises(InputError, match=name) as error:
        data.read_npz("a.npz")
    assert "refused" in str(error.value) and "\n" not in str(error.value)
    for legacy in (True, False):
        torch.save({"model": torch.ones(2), "x": value}, "a.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=name):
            data.read_torch("a.pth")
        assert torch.equal(data.read_torch("a.pth", inert=True)["model"], torch.ones(2))
    assert not os.path.exists("hostile")


@pytest.mark.parametrize("legacy", [True, False])
def test_data_read_torch(legacy, tmp_path):
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    values = {"state_dict": model.state_dict(), "list": [1, 2.5, "three", None, True, (4,), {5}], "array": np.arange(6.0).reshape(2, 3),
              "scalar": np.float64(1.5), "half": torch.ones(2, 2, dtype=torch.float16).t(), "ordered": OrderedDict(a=1), "parameter": torch.nn.Parameter(torch.ones(1))}
    torch.save(values, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    got = data.read_torch(tmp_path / "a.pth")
    assert got["list"] == values["list"] and got["scalar"] == 1.5 and np.array_equal(got["array"], values["array"])
    assert all(torch.equal(got["state_dict"][k], v) for k, v in model.state_dict().items()) and got["half"].dtype == torch.float16
    torch.save({**values, "optimizer": optimiser, "random_state": np.random.RandomState(0)}, tmp_path / "b.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="refused"):
        data.read_torch(tmp_path / "b.pth")
    got = data.read_torch(tmp_path / "b.pth", inert=True)
    assert torch.equal(got["state_dict"]["weight"], model.weight) and not isinstance(got["optimizer"], torch.optim.Optimizer)
    whole = (tmp_path / "b.pth").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "c.pth").write_bytes(whole[:length])
        with pytest.raises(InputError, match="c.pth: cannot be read"):
            data.read_torch(tmp_path / "c.pth", inert=True)
    torch.jit.script(model).save(str(tmp_path / "d.pth"))
    with pytest.raises(InputError, match="TorchScript"):
        data.read_torch(tmp_path / "d.pth")


def test_data_python2_pickle(tmp_path):
    # {'S1': array([1., 2.], dtype=float32)} as Python 2 and NumPy 1 write it, byte strings throughout
    body = (b"\x80\x02}q\x00U\x02S1q\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04"
            b"(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
            + struct.pack("<2f", 1, 2) + b"tbs.")
    array = (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01)cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R"
             b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]" + body[2:-1] + b"atb.")
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", head.getvalue() + array)
    got = data.read_npz(tmp_path / "a.npz")["x"].item()
    assert list(got) == ["S1"] and got["S1"].dtype == np.float32 and got["S1"].tolist() == [1, 2]


def test_data_read_npz_damaged(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(24.0).reshape(2, 3, 4), "b": np.asfortranarray(np.arange(6).reshape(2, 3)), "c": np.array(["x", "yy"]), "d": np.float32(3),
              "e": np.zeros((0, 3))}
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        got = data.read_npz(path)
        assert all(np.array_equal(got[k], v) and got[k].dtype == np.asarray(v).dtype for k, v in arrays.items())
    whole = path.read_bytes()
    for length in (0, 30, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="a.npz: cannot be read"):
            data.read_npz(path)
    for shape in ((10 ** 15,), (3,), (-1,), (2 ** 40, 2 ** 40)):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", head.getvalue() + bytes(16))
        with pytest.raises(InputError, match="claims|negative|shape"):
            data.read_npz(path)
    with pytest.raises(InputError, match="none.npz: not found"):
        data.read_npz(tmp_path / "none.npz")
    with pytest.raises(InputError, match="cannot be read"):
        data.read_npz(tmp_path)


# ---- files and commands

def test_data_write_atomically(tmp_path):
    path = tmp_path / "new" / "a.txt"
    data.write_atomically(path, lambda file: file.write(b"one"))
    with open(path, "rb") as reader:  # who reads the old file goes on reading the old file
        data.write_atomically(path, lambda file: file.write(b"two"))
        assert reader.read() == b"one" and path.read_bytes() == b"two"
    data.write_atomically(path, lambda file: file.write(b"one"))

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, half)
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["a.txt"]

    def full(file):
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="a.txt: cannot be written.*No space left"):
        data.write_atomically(path, full)
    assert os.listdir(path.parent) == ["a.txt"]
    with pytest.raises(InputError, match="cannot be written"):
        data.write_atomically(path / "below" / "a.txt", half)


def test_data_run_exit_statuses(capsys):
    import gridconv

    def fail(error):
        def main():
            raise error
        return main
    for error, status in ((InputError("two\nlines"), 2), (FileNotFoundError(2, "No such file", "x.npz"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop:
            data.run(fail(error))
        assert stop.value.code == status
    assert capsys.readouterr().err == "error: two lines\nerror: [Errno 2] No such file: 'x.npz'\n"
    with pytest.raises(ValueError, match="a bug"):
        data.run(fail(ValueError("a bug")))
    with pytest.raises(SystemExit) as stop:  # a model's refusal is the user's
        data.run(lambda: gridconv.assignment_matrix(((0, 99),), 2))
    assert stop.value.code == 2 and "99" in capsys.readouterr().err


def test_data_check_folder(miniature, bvh_folder, tmp_path):
    assert data_command("check", tmp_path / "none").returncode == 2
    empty = data_command("check", tmp_path)
    assert empty.returncode == 0 and empty.stdout.count("not here") == 8 and "vision.imar.ro" in empty.stdout
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    write_objects(tmp_path / "data_2d_h36m_cpn.npz", positions_2d=views_of(miniature))
    data.convert_bvh(bvh_folder, tmp_path, "mocap", "old")
    lines, unusable = data.check_folder(tmp_path)
    text = "\n".join(lines)
    assert unusable == 0 and "Human3.6M, 2D cpn" in text and "Human3.6M, 2D gt" in text and "HumanEva-I, 2D gt: not here" in text
    assert "train: 40 sequences, 320 frames; files in Human3.6M layout (not Human3.6M: 320 frames)" in text and "8 BVH clips" in text
    (tmp_path / "data_2d_h36m_cpn.npz").write_bytes(b"PK")
    damaged = data_command("check", tmp_path)
    assert damaged.returncode == 2 and "train: cannot be used" in damaged.stdout and damaged.stderr.count("\n") == 1


# ---- random cameras, noise and missing joints

def upright_clips(names=("S1", "S9"), frames=20):
    """Whole bodies moving on procedural clips, one recorded camera each: (Sequences, their worlds (T, 17, 3), z up)."""
    clips = [s for s in data.synthesize(3, names, ("walk", "sit", "kick"), frames=frames) if s.camera == data.H36M_CAMERAS[1]]
    world = lambda s: data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), data.H36M_EXTRINSICS[s.subject][1])
    return clips, [world(s) for s in clips]


def parts_of(store):
    """Camera-space joints, 2D and bounds of each sequence in a store, as (points (T, 17, 3), pose_2d (T, 17, 2))."""
    return [((store.pose_3d + store.root[:, None])[store.sequence == i].double(), store.input[store.sequence == i].double())
            for i in range(len(store.sequences))]


@given(st.integers(0, 2 ** 40))
@settings(max_examples=15)
def test_data_random_cameras_are_what_their_ranges_say(draw):
    """Undone by hand: from the world's z up to the image by the drawn angles, focal length, shape and place."""
    clips, worlds = upright_clips()
    store = FrameStore(clips, "longest", H17, cameras="random")
    store.redraw(draw)
    chances = torch.rand(len(clips), 8, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
    for i, (world, (points, pose_2d)) in enumerate(zip(worlds, parts_of(store), strict=True)):
        drawn = [low + (high - low) * p for (low, high), p in zip(data.CAMERA_RANGES.values(), chances[i].tolist())]
        (heading, tilt, roll), (focal, shape, fill, aside, below) = np.deg2rad(drawn[:3]), drawn[3:]
        width, height = store.sizes[i].tolist()
        assert max(width, height) == 1000 and width / height == pytest.approx(math.exp(shape), rel=2e-3)
        np.testing.assert_allclose(store.intrinsics[i], [1000 * focal] * 2 + [width / 2, height / 2] + [0] * 5, rtol=1e-6)
        edges = [fill * side / 2 / (1000 * focal) for side in (width, height)]
        mean = world[:, 0].mean(0)
        distance = points[:, 0].mean(0)[2].item()
        nearest, outermost = np.inf, 0.0
        for t in range(len(world)):
            for j in range(17):
                x, y, z = world[t, j] - mean
                x, y = math.cos(heading) * x - math.sin(heading) * y, math.sin(heading) * x + math.cos(heading) * y
                x, y, z = x, -z, y  # right, down, forward
                y, z = math.cos(tilt) * y - math.sin(tilt) * z, math.sin(tilt) * y + math.cos(tilt) * z
                x, y = math.cos(roll) * x - math.sin(roll) * y, math.sin(roll) * x + math.cos(roll) * y
                x, y, z = x + distance * aside * edges[0], y + distance * below * edges[1], z + distance
                np.testing.assert_allclose(points[t, j], (x, y, z), atol=2e-5)
                nearest, outermost = min(nearest, z), max(outermost, abs(x / z) / edges[0], abs(y / z) / edges[1])
        assert nearest > 0.999 and outermost < 1.001  # in front of the camera, in its part of the image,
        assert nearest < 1.001 or outermost > 0.999  # and no further off than that needs
        pixels = data.project(points.numpy(), store.intrinsics[i].double().numpy())
        np.testing.assert_allclose(pose_2d, data.normalise(pixels, (width, height), "longest"), atol=2e-5)
        for a, b in H17.edges:
            bone = np.linalg.norm(world[:, a] - world[:, b], axis=-1)
            np.testing.assert_allclose((points[:, a] - points[:, b]).norm(dim=-1), bone, atol=2e-5)
        np.testing.assert_allclose(store.pose_3d[store.sequence == i], points - points[:, :1], atol=1e-6)


def test_data_random_cameras_see_standing_people_upright():
    clips, worlds = upright_clips()
    assert all(world[:, 10, 2].mean() > world[:, [3, 6], 2].mean() + 0.8 for world in worlds)
    store = FrameStore(clips, "longest", H17, cameras="random")
    for draw in range(20):
        store.redraw(draw)
        assert (store.input[:, 10, 1] < store.input[:, [3, 6], 1].mean(1)).float().mean() > 0.95  # y down


def test_data_a_draw_depends_on_its_number_alone():
    clips, _ = upright_clips()
    options = dict(cameras="random", noise=0.02, missing=0.3)
    store, other, uvd = (FrameStore(clips, "longest", H17, target=target, **options) for target in ("camera", "camera", "uvd"))
    seen = []
    for draw in (4, 2, data.TEST_DRAW, 4):
        for one in (store, uvd):
            one.redraw(draw)
        seen.append((store.input.clone(), store.target.clone(), store.intrinsics.clone(), store.root.clone()))
        assert torch.equal(uvd.input, store.input) and torch.equal(uvd.pose_3d, store.target)
        index = torch.arange(len(uvd))
        assert (uvd.to_camera(uvd.target, index) - store.pose_3d).abs().max() < 1e-4
    other.redraw(4)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(
        seen[0], seen[3], (other.input, other.target, other.intrinsics, other.root)))
    focal = [set(draw[2][:, 0].tolist()) for draw in seen[:3]]
    assert not focal[0] & focal[1] and not focal[0] & focal[2] and not focal[1] & focal[2] and len(focal[0]) == len(clips)
    clean = FrameStore(clips, "longest", H17, cameras="random")
    clean.redraw(4)  # the same cameras, whatever noise and gaps
    assert torch.equal(clean.intrinsics, seen[0][2]) and torch.equal(clean.target, seen[0][1])
    assert not torch.equal(clean.input, seen[0][0])
    plain = FrameStore(clips, "width", H17)
    before = plain.input.clone()
    plain.redraw(4)
    assert torch.equal(plain.input, before) and plain.sequences[0].source == clips[0].source
    assert store.sequences[0].source == "synthetic motion (seed 3), random cameras, noise 0.02, missing 0.3"
    human = [dataclasses.replace(s, source=data._layout("Human3.6M", False)) for s in clips]
    assert "noise 0.1" in data.provenance(FrameStore(human, "width", H17, noise=0.1).sequences)  # never "Human3.6M"
    with pytest.raises(InputError, match="S1 walk 1.*random cameras"):
        FrameStore([dataclasses.replace(s, extrinsics=None) for s in clips], "longest", H17, cameras="random")


def test_data_noise_is_as_asked():
    generator = torch.Generator().manual_seed(5)
    scale = torch.tensor([1.0, 3.0, 0.2, 2.0]).repeat_interleave(3000)[:, None, None]
    clean = torch.rand(1, 17, 2, generator=generator) * scale  # one pose at four sizes
    bounds = torch.zeros(12000, dtype=torch.long), torch.full((12000,), 11999)
    size = max((clean[0, :, axis].max() - clean[0, :, axis].min()).item() for axis in (0, 1))
    error = (data.detect(clean, *bounds, 0.01, 0.0, generator) - clean) / (size * scale)
    for part in error.split(3000):
        assert 1.4826 * part.abs().median().item() == pytest.approx(0.01, rel=0.04)  # all but blind to outliers
        assert part.square().mean().sqrt().item() == pytest.approx(0.01 * math.sqrt(0.98 + 0.02 * 100), rel=0.05)
    gross = (error.norm(dim=-1) > 0.05).float().mean().item()  # in both coordinates at once
    assert gross == pytest.approx(0.02 * math.exp(-0.5 * 0.25), rel=0.1)
    assert torch.equal(data.detect(clean, *bounds, 0.0, 0.0, generator), clean)


@pytest.mark.parametrize("missing", [0.02, 0.1, 0.5])
def test_data_gaps_are_as_asked_and_filled_as_a_loop_would(missing):
    lengths = [1, 2, 40, 3000, 7, 900]
    end = np.cumsum(lengths)
    first, last = (torch.from_numpy(np.repeat(bound, lengths)) for bound in (end - lengths, end - 1))
    clean = torch.rand(end[-1], 17, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = data.detect(clean, first, last, 0.0, missing, torch.Generator().manual_seed(2))
    seen, runs = (got == clean).all(-1).numpy(), []
    for start, length in zip(end - lengths, lengths):
        assert seen[start].all()
        for j in range(17):
            time = np.arange(start, start + length)
            known = time[seen[time, j]]
            for axis in (0, 1):
                np.testing.assert_allclose(got[time, j, axis], np.interp(time, known, clean[known, j, axis]), atol=1e-12)
            runs += [gap - 1 for gap in np.diff(known) if gap > 1]
    assert 1 - seen.mean() == pytest.approx(missing, rel=0.1)
    if missing == 0.02:  # gaps hardly overlap
        assert np.mean(runs) == pytest.approx(10, rel=0.15) and min(runs) == 1 and np.quantile(runs, 0.95) <= 19
        assert 15 < np.quantile(runs, 0.9)


def test_data_extrinsics_of_every_loader_put_the_world_upright(miniature, bvh_folder, tmp_path):
    write_objects(tmp_path / "data_3d_h36m.npz", positions_3d=miniature)
    data.convert_bvh(bvh_folder, tmp_path, "mocap", "old")
    for sequences in (data.load_h36m(tmp_path), data.load_mocap(tmp_path), data.synthesize(0, 1, ("walk",), frames=3)):
        for s in sequences:
            same = [data._upright(other) for other in sequences if (other.subject, other.action) == (s.subject, s.action)]
            assert len(same) == 4 and all(np.abs(world - same[0]).max() < 1e-5 for world in same)
            assert abs(same[0][:, 0].mean(0)).max() < 1e-5


WILD = dict(cameras="random", noise=0.01, missing=0.1, normalise="longest", flips=True)


@pytest.mark.parametrize("fields", [WILD, dict(WILD, method="glagcn", filter_widths=(3,), channels=4, batch=32)],
                         ids=["gridconv", "glagcn"])
def test_data_random_cameras_resume_exactly(run_folder, fields, monkeypatch):
    test_training_is_reproducible_and_resumes_exactly(run_folder, fields, monkeypatch)
    done, again = (train.train(tiny_recipe(**{**fields, "epochs": 1.1}), out=run_folder / "done", quiet=True) for _ in range(2))
    assert done == again and done["data"].endswith("random cameras, noise 0.01, missing 0.1")


def test_data_every_epoch_and_the_test_set_have_their_own_cameras(run_folder):
    recipe = tiny_recipe(seed=3, **WILD)
    stores = {split: evaluation.make_store(recipe, "", split, "cpu") for split in ("train", "test")}
    run, drawn = train.Run(recipe, stores["train"], run_folder, torch.device("cpu")), []
    for epoch in (0, 1, 0):
        run.begin_epoch(epoch)
        drawn.append(stores["train"].intrinsics[:, 0].clone())
    assert torch.equal(drawn[0], drawn[2]) and not set(drawn[0].tolist()) & set(drawn[1].tolist())
    tested = stores["test"].intrinsics[:, 0]
    same = FrameStore(data.load_dataset(recipe, "", "test"), "longest", H17, cameras="random", noise=0.01, missing=0.1)
    same.redraw(1)
    assert torch.equal(same.input, stores["test"].input) and not set(tested.tolist()) & set(torch.cat(drawn).tolist())
    for seed, epoch in ((0, 0), (1, 8), (2 ** 40, 10 ** 6 + 1)):  # every number that training may take is even
        numbers = []
        run.recipe, run.store = dataclasses.replace(recipe, seed=seed), SimpleNamespace(redraw=numbers.append)
        run.begin_epoch(epoch)
        assert numbers[0] % 2 == 0 and numbers[0] < 2 ** 63 and data.TEST_DRAW % 2 == 1


def test_data_random_cameras_are_normalised_as_lift_does(run_folder):
    recipe = tiny_recipe(cameras="random")
    assert recipe.normalise == "release-500"
    store = evaluation.make_store(recipe, "", "test", "cpu")
    for s in (0, 7):
        size = store.sizes[s].tolist()
        rule = evaluation._rule(SimpleNamespace(recipe=recipe), size)
        here = store.sequence == s
        pixels = data.project((store.pose_3d + store.root[:, None])[here].numpy(), store.intrinsics[s].numpy())
        np.testing.assert_allclose(store.input[here], data.normalise(pixels, size, rule), atol=1e-5)


def test_data_images_of_another_size_are_normalised_as_lift_does(monkeypatch, synthetic):
    recipe = tiny_recipe()
    for scale, rule in ((1, "release-500"), (2.048, "longest")):
        larger = [dataclasses.replace(s, pose_2d=s.pose_2d * scale, size=tuple(round(side * scale) for side in s.size))
                  for s in synthetic[:2]]
        monkeypatch.setattr(data, "load_dataset", lambda *_: larger)
        store = evaluation.make_store(recipe, "", "train", "cpu")
        assert evaluation._rule(SimpleNamespace(recipe=recipe), larger[0].size) == rule
        np.testing.assert_allclose(store.input[:len(larger[0].pose_2d)],
                                   data.normalise(larger[0].pose_2d, larger[0].size, rule), atol=1e-6)


@pytest.mark.parametrize("name", ["gridconv-wild", "glagcn-wild"])
def test_data_wild_recipes_train_and_are_measured_through_test_cameras(run_folder, name, capsys):
    recipe = dataclasses.replace(train.RECIPES[name], data="synthetic", epochs=0.002, hidden=4, channels=4)
    assert recipe.cameras == "random" and recipe.normalise == "longest" and recipe.flips and recipe.noise and recipe.missing
    train.train(recipe, out=run_folder, quiet=True)
    path, figures = str(run_folder / "best.pt"), []
    for options in ((), ("--noise", "0.01", "--missing", "0.1"), ("--noise", "0.05"), ("--noise", "0"), ("--cameras", "recorded")):
        evaluation.main([path, "--device", "cpu", "--json", str(run_folder / "out.json"), *options])
        figures.append(json.loads((run_folder / "out.json").read_text()))
    assert figures[0]["mpjpe"] == figures[1]["mpjpe"] and len({f["mpjpe"] for f in figures}) == 4
    assert figures[2]["data"].endswith("random cameras, noise 0.05, missing 0.1") and "noise 0.05" in capsys.readouterr().out
    assert figures[4]["data"].endswith("recorded cameras, noise 0.01, missing 0.1")
    for option, value in (("--noise", "2"), ("--missing", "1"), ("--noise", "nan"), ("--missing", "-0.1")):
        with pytest.raises(InputError, match=option):
            evaluation.main([path, "--device", "cpu", option, value])
    for field, value in (("cameras", "moving"), ("noise", -1.0), ("missing", 0.95)):
        with pytest.raises(InputError, match=field):
            train.check_recipe(dataclasses.replace(recipe, **{field: value}))


# ---------------------------------------------------------------------------------------------------------------------
# eval.py


# ---- eval: metrics

def _ev_golden_pair():
    """Four poses of five joints and their targets, by formula; figures below from explicit loops in NumPy."""
    i = np.arange(4 * 5 * 3)
    target = np.sin(0.37 * i).reshape(4, 5, 3)
    prediction = target + 0.11 * np.sin(1.3 * i + 0.5).reshape(4, 5, 3)
    prediction[3, :, 0] *= -1                                                   # a mirrored pose: no rotation mends it
    return prediction, target


def _ev_loop_p_mpjpe(prediction, target):
    """P-MPJPE by Horn's quaternions (1987), which know no reflection: another road to the same optimum."""
    errors = []
    for p, t in zip(prediction, target):
        p0, t0 = p - p.mean(0), t - t.mean(0)
        M = p0.T @ t0
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = M
        N = np.array([[xx + yy + zz, yz - zy, zx - xz, xy - yx], [yz - zy, xx - yy - zz, xy + yx, zx + xz],
                      [zx - xz, xy + yx, yy - xx - zz, yz + zy], [xy - yx, zx + xz, yz + zy, zz - xx - yy]])
        w, x, y, z = np.linalg.eigh(N)[1][:, -1]
        R = np.array([[w*w + x*x - y*y - z*z, 2*(x*y - w*z), 2*(x*z + w*y)],
                      [2*(x*y + w*z), w*w - x*x + y*y - z*z, 2*(y*z - w*x)],
                      [2*(x*z - w*y), 2*(y*z + w*x), w*w - x*x - y*y + z*z]])
        rotated = p0 @ R.T
        scale = (rotated * t0).sum() / (p0 ** 2).sum()
        errors += [np.linalg.norm(scale * a - b) for a, b in zip(rotated, t0)]
    return 1000 * np.mean(errors)


def _ev_random_pair(seed, frames=3, joints=6):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(frames, joints, 3, generator=generator, dtype=torch.float64)
    return target + 0.3 * torch.randn(frames, joints, 3, generator=generator, dtype=torch.float64), target, generator


def _ev_rotation(generator):
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.tensor([1.0, 1.0, torch.linalg.det(q).sign().item()], dtype=torch.float64)


def test_eval_metrics_against_explicit_loops():
    p, t = _ev_golden_pair()
    joint = [np.sqrt(sum((p[f, j, c] - t[f, j, c]) ** 2 for c in range(3))) for f in range(4) for j in range(5)]
    scaled = []
    for f in range(4):
        s = sum((p[f] * t[f]).flatten()) / sum((p[f] * p[f]).flatten())
        scaled += [np.linalg.norm(s * p[f, j] - t[f, j]) for j in range(5)]
    speed = [np.linalg.norm((p[f + 1, j] - p[f, j]) - (t[f + 1, j] - t[f, j])) for f in range(3) for j in range(5)]
    tp, tt = torch.tensor(p), torch.tensor(t)
    assert evaluation.mpjpe(tp, tt) == pytest.approx(1000 * np.mean(joint), abs=1e-9)
    assert evaluation.n_mpjpe(tp, tt) == pytest.approx(1000 * np.mean(scaled), abs=1e-9)
    assert evaluation.mpjve(tp, tt) == pytest.approx(1000 * np.mean(speed), abs=1e-9)
    assert evaluation.p_mpjpe(tp, tt) == pytest.approx(_ev_loop_p_mpjpe(p, t), abs=1e-6)
    assert evaluation.pck(tp, tt) == pytest.approx(100 * np.mean([e < 0.15 for e in joint]))
    assert evaluation.auc(tp, tt) == pytest.approx(100 * np.mean([[1000 * e < k for e in joint] for k in range(0, 151, 5)]))


EV_GOLDEN = {"mpjpe": 442.9327, "p_mpjpe": 131.9719, "n_mpjpe": 391.6575, "mpjve": 507.3372,
             "pck": 80.0, "auc": 10.6452}


def test_eval_metrics_golden():
    p, t = map(torch.tensor, _ev_golden_pair())
    for name, value in EV_GOLDEN.items():
        assert getattr(evaluation, name)(p, t) == pytest.approx(value, abs=1e-3), name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10 ** 6), st.floats(0.1, 10))
def test_eval_p_mpjpe_ignores_similarities_but_not_reflections(seed, scale):
    p, t, generator = _ev_random_pair(seed)
    R, shift = _ev_rotation(generator), torch.randn(3, 1, 3, generator=generator, dtype=torch.float64)
    assert evaluation.p_mpjpe(scale * p @ R + shift, t) == pytest.approx(evaluation.p_mpjpe(p, t), rel=1e-8)
    assert evaluation.p_mpjpe(scale * t @ R + shift, t) == pytest.approx(0, abs=1e-9)
    assert evaluation.p_mpjpe(t * torch.tensor([-1.0, 1.0, 1.0]), t) > 1               # six joints in general position
    assert evaluation.p_mpjpe(p.float(), t.float()) == pytest.approx(_ev_loop_p_mpjpe(p.numpy(), t.numpy()), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10 ** 6), st.floats(0.1, 10), st.floats(-2, 2))
def test_eval_mpjpe_moves_with_translation_n_mpjpe_ignores_scale(seed, scale, shift):
    p, t, _ = _ev_random_pair(seed)
    assert evaluation.mpjpe(t + torch.tensor([0.0, shift, 0.0]), t) == pytest.approx(1000 * abs(shift), abs=1e-4)
    assert evaluation.n_mpjpe(scale * p, t) == pytest.approx(evaluation.n_mpjpe(p, t), rel=1e-8)
    assert evaluation.p_mpjpe(p, t) <= evaluation.mpjpe(p, t) * math.sqrt(p.shape[1]) + 1e-9
    velocity = torch.tensor([0.01, 0.0, -0.02]) * torch.arange(4)[:, None, None]
    line = t[:1] + velocity                                                     # uniform motion: the difference is v
    assert evaluation.mpjve(line, t[:1].expand(4, -1, -1)) == pytest.approx(1000 * math.sqrt(5e-4), rel=1e-5)
    assert evaluation.mpjve(line + shift, line) == pytest.approx(0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_eval_pck_and_auc_closed_forms(millimetres):
    target = torch.zeros(1, len(millimetres), 3, dtype=torch.float64)
    prediction = target.clone()
    prediction[0, :, 1] = torch.tensor(millimetres, dtype=torch.float64) / 1000 - 1e-9 * (torch.tensor(millimetres) > 0)
    # an error of m mm (a hair less) counts at the thresholds max(5 ceil(m / 5), 5) ... 150
    counted = [sum(1 for k in range(0, 151, 5) if k >= m and k > 0) for m in millimetres]
    assert evaluation.auc(prediction, target) == pytest.approx(100 * np.mean(counted) / 31)
    assert evaluation.pck(prediction, target) == pytest.approx(100 * np.mean([m <= 150 for m in millimetres]))
    exactly = torch.tensor([[[0.25, 0.0, 0.0]]], dtype=torch.float64)          # strictly below: 250 mm is not below 250
    assert evaluation.pck(exactly, exactly * 0, threshold=250.0) == 0 and evaluation.pck(exactly, exactly * 0, threshold=250.1) == 100


def test_eval_alignment_of_degenerate_poses():
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(5, 7, 3, generator=generator, dtype=torch.float64)
    spread = 1000 * (t - t.mean(1, keepdim=True)).norm(dim=-1).mean().item()
    for point in (0.0, 1 / 3, 1e6):                                              # every joint in one place
        assert evaluation.p_mpjpe(torch.full_like(t, point), t) == pytest.approx(spread, rel=1e-9)
    line = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 3.0]) * torch.ones(5, 1, 1)
    assert evaluation.p_mpjpe(-2 * line, line) == pytest.approx(0, abs=1e-6)            # collinear: a rotation turns it round
    assert evaluation.p_mpjpe(t[:, :1], t[:, 1:2]) == pytest.approx(0, abs=1e-9)        # one joint
    assert evaluation.p_mpjpe(t, t * 0) == pytest.approx(0, abs=1e-9) and evaluation.n_mpjpe(t * 0, t) == evaluation.mpjpe(t * 0, t)


@pytest.mark.parametrize("name", ["mpjpe", "p_mpjpe", "n_mpjpe", "mpjve", "pck", "auc"])
def test_eval_metrics_refuse_bad_poses(name):
    metric, good = getattr(evaluation, name), torch.ones(3, 4, 3)
    for bad, found in ((good[0], r"\(4, 3\)"), (good[..., :2], r"\(3, 4, 2\)"), (good[:0], r"\(0, 4, 3\)"),
                       (good.numpy()[0], "prediction"), (None, "NoneType")):
        with pytest.raises(data.InputError, match=found):
            metric(bad, good)
    with pytest.raises(data.InputError, match="differ"):
        metric(good, good[:, :2])
    for value in (float("nan"), float("inf")):
        bad = good.clone()
        bad[1, 2, 0] = value
        with pytest.raises(data.InputError, match="target.*frame 1"):
            metric(good, bad)


# ---- eval: a small store

def _ev_sequence(subject, action, frames, seed, joints=17, valid=None):
    generator = np.random.default_rng(seed)
    pose_3d = generator.normal(size=(frames, joints, 3)).astype(np.float32)
    pose_2d = generator.uniform(0, 1000, (frames, joints, 2)).astype(np.float32)
    return data.Sequence(subject=subject, action=action, camera="0", pose_2d=pose_2d, pose_3d=pose_3d,
                         root=np.tile(np.float32([0, 0, 4]), (frames, 1)),
                         intrinsics=np.float32([1000, 1000, 500, 500, 0, 0, 0, 0, 0]), size=(1000, 1000), fps=50.0,
                         valid=valid)


def _ev_store(names, skeleton="h36m17", target="camera"):
    joints = len(data.SKELETONS[skeleton].joints)
    sequences = [_ev_sequence(*name[:3], seed, joints, *name[3:]) for seed, name in enumerate(names)]
    return data.FrameStore(sequences, "release-500", data.SKELETONS[skeleton], target=target)


EV_NAMES = (("S9", "Walking 1", 5), ("S9", "Walking", 2), ("S11", "Walking", 3), ("S11", "Photo 1", 4),
            ("S9", "Posing", 1))


def _ev_recipe(method="gridconv", **fields):
    return SimpleNamespace(**{**dict(
        name="tiny", row="", data="h36m", keypoints="gt", skeleton="h36m17", skip="", normalise="release-500",
        target="camera", flip_test=False, method=method, dropout=0.1, layout="released", layout_seed=0, grid=(5, 5),
        hidden=4, blocks=1,
        kernel_sizes=(3, (3, 3), 3), padding=("circular", "replicate"), attention="grid", temperature=30.0,
        filter_widths=(3,), channels=4, reconstruct=False, reconstruct_blocks=1, unshared_weight=0.0, causal=False,
        adaptive=True, temporal="stride", head="individual", normalisation="column", swap_sides=False), **fields})


# ---- eval: scores

def test_eval_score_averages_over_actions_like_a_plain_loop():
    store = _ev_store(EV_NAMES)
    prediction = store.pose_3d + 0.2 * torch.randn(store.pose_3d.shape, generator=torch.Generator().manual_seed(1))
    result, rows, at = evaluation.score(prediction, store), {}, 0
    for subject, action, frames in EV_NAMES:
        p, t = prediction[at:at + frames].double(), store.pose_3d[at:at + frames].double()
        at += frames
        for f in range(frames):
            rows.setdefault((action.split(" ")[0], subject), []).append([
                metric(p[f:f + 1], t[f:f + 1]) for metric in (evaluation.mpjpe, evaluation.p_mpjpe, evaluation.n_mpjpe)])
    for which, part in (("actions", 0), ("subjects", 1)):
        means = {}
        for key, values in rows.items():
            means.setdefault(key[part], []).extend(values)
        assert set(result[which]) == set(means)
        for name, values in means.items():
            assert result[which][name]["frames"] == len(values)
            for metric, value in zip(("mpjpe", "p_mpjpe", "n_mpjpe"), np.mean(values, 0)):
                assert result[which][name][metric] == pytest.approx(value, rel=1e-9)
        if which == "actions":
            assert result["mpjpe"] == pytest.approx(np.mean([np.mean(v, 0)[0] for v in means.values()]), rel=1e-9)
            assert result["p_mpjpe"] == pytest.approx(np.mean([np.mean(v, 0)[1] for v in means.values()]), rel=1e-9)
    assert result["frames"] == 15 and result["pooled"]["mpjpe"] == pytest.approx(evaluation.mpjpe(prediction, store.pose_3d))
    p, t = prediction.double(), store.pose_3d.double()
    walking = [(evaluation.mpjve(p[a:b], t[a:b]), b - a - 1) for a, b in ((0, 5), (5, 7), (7, 10))]
    walking = sum(v * n for v, n in walking) / 7
    assert result["actions"]["Walking"]["mpjve"] == pytest.approx(walking)
    assert result["actions"]["Posing"]["mpjve"] is None                         # one frame has no velocity
    assert result["mpjve"] == pytest.approx((walking + evaluation.mpjve(p[10:14], t[10:14])) / 2)
    assert result["cells"]["Walking"]["S11"]["mpjpe"] == pytest.approx(evaluation.mpjpe(p[7:10], t[7:10]))
    json.dumps(result)
    with pytest.raises(data.InputError, match="15"):
        evaluation.score(prediction[:3], store)


@pytest.mark.parametrize("skeleton, left_out", [("3dhp17", (14, 15, 16)), ("h36m17", (0, 7, 9))])
def test_eval_score_3dhp_by_sequence_scene_and_joints(skeleton, left_out):
    names = (("TS1", "TS1", 4, np.array([1, 0, 1, 1], bool)), ("TS2", "TS2", 2, np.array([0, 0], bool)),
             ("TS3", "TS3", 3, np.array([1, 1, 0], bool)), ("TS6", "TS6", 2, np.array([0, 1], bool)))
    store = _ev_store(names, skeleton)
    prediction = store.pose_3d + 0.1 * torch.randn(store.pose_3d.shape, generator=torch.Generator().manual_seed(2))
    result = evaluation.score(prediction, store)
    prediction[:, store.skeleton.root] = 0
    groups, at = {}, 0
    for name, _, frames, valid in names:
        for f in range(frames):
            if valid[f]:
                for group in (name, {"1": "studio, green screen", "3": "studio", "6": "outdoor"}[name[2]], "all"):
                    groups.setdefault(group, []).append(at + f)
        at += frames
    benchmark = [j for j in range(17) if j not in left_out]
    for name, index in groups.items():
        got = {**result["sequences"], **result["scenes"], "all": result["all"]}[name]
        p, t = prediction[index].double(), store.pose_3d[index].double()
        assert got["frames"] == len(index)
        for ending, joints in (("", list(range(17))), ("_14", benchmark)):
            for metric in ("mpjpe", "pck", "auc"):
                assert got[metric + ending] == pytest.approx(getattr(evaluation, metric)(p[:, joints], t[:, joints]), rel=1e-9)
    assert result["sequences"]["TS2"]["frames"] == 0 and result["sequences"]["TS2"]["mpjpe"] is None
    moving = ((2, 3), (6, 7))                                                   # pairs of valid neighbours
    p, t = prediction.double(), store.pose_3d.double()
    assert result["pooled"]["mpjve"] == pytest.approx(np.mean([evaluation.mpjve(p[list(i)], t[list(i)]) for i in moving]))
    assert "PCK" in evaluation.report(result, "MPI-INF-3DHP", _ev_recipe(data="3dhp", skeleton=skeleton))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from([3, 64, 65536]))
def test_eval_yardsticks_are_numpys(seed, chunk):
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(34, 51))

    def store(frames):
        s = _ev_sequence("S1", "A", frames, generator.integers(10 ** 9))
        s.pose_2d[:, 3] = s.pose_2d[:, 2]                                       # coinciding joints: a singular system
        linear = ((s.pose_2d.reshape(frames, -1) / 500 - 1) @ mix).reshape(frames, 17, 3)
        s.pose_3d[:] = 0.1 * linear + 0.1 * s.pose_3d + 1
        return data.FrameStore([s], "release-500", data.SKELETONS["h36m17"])

    train, test = store(120), store(30)
    x, y, xt, yt = (a.double().numpy().reshape(len(a), -1) for s in (train, test) for a in (s.input, s.pose_3d))
    solution = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=1e-10)[0]
    error = lambda guess: 1000 * np.linalg.norm((guess - yt).reshape(len(yt), 17, 3), axis=-1).mean()
    got = evaluation.yardsticks(train, test, chunk=chunk)
    assert got["mean_pose"] == pytest.approx(error(y.mean(0)), rel=1e-9)
    assert got["affine"] == pytest.approx(error(np.c_[xt, np.ones(len(xt))] @ solution), rel=1e-6)
    assert got["affine"] < got["mean_pose"]


# ---- eval: predictions

class _EvStub(torch.nn.Module):
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
        return torch.cat([pose * self.weight + 0.1, pose[..., :1] * pose[..., 1:] + torch.arange(17)[:, None]], -1)


@pytest.mark.parametrize("frames, causal", [(1, False), (3, False), (5, True)])
@pytest.mark.parametrize("target", ["camera", "uvd"])
def test_eval_predict_with_flips_is_the_explicit_average(frames, causal, target):
    store, model, skeleton = _ev_store(EV_NAMES, target=target), _EvStub(frames, causal), data.SKELETONS["h36m17"]
    model.train()
    model.drop.eval()
    index = torch.tensor([0, 4, 5, 11, 14, 2])
    got = evaluation.predict(model, store, index, flip=True, batch=4)
    plain = evaluation.predict(model, store, index)
    assert model.training and not model.drop.training                           # left as they were
    order = list(range(17))
    for a, b in zip(skeleton.left, skeleton.right):
        order[a], order[b] = b, a
    for k, i in enumerate(index.tolist()):
        offset = [j - (frames - 1 if causal else frames // 2) for j in range(frames)]
        window = store.input[[min(max(i + o, int(store.first[i])), int(store.last[i])) for o in offset]]

        def network(window):
            pose = sum((n + 1) * w for n, w in enumerate(window))
            x, y = pose[:, 0], pose[:, 1]
            return torch.stack([x + 0.1, 2 * y + 0.1, x * y + torch.arange(17)], -1)

        mirrored = network(window[:, order] * torch.tensor([-1.0, 1.0]))[order] * torch.tensor([-1.0, 1.0, 1.0])
        both = torch.stack([network(window), (network(window) + mirrored) / 2])
        want = store.to_camera(both, torch.tensor([i, i]))
        torch.testing.assert_close(plain[k], want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[k], want[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(evaluation.predict(model, store, batch=2)[index], plain)
    assert evaluation.evaluate(model, store)["mpjpe"] == pytest.approx(evaluation.score(evaluation.predict(model, store), store)["mpjpe"])


# ---- eval: models from recipes and checkpoints

def _ev_save(model, path, **more):
    recipe = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(model.recipe).items()}
    torch.save({"format": "poselift", "version": 1, "recipe": recipe, "model": model.state_dict(), "epoch": 3,
                "data": "synthetic motion", **more}, path)


def _ev_shake(model, seed=0):
    """Random weights and running statistics, so that no two parts can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if value.is_floating_point() and ("weight" in name or "bias" in name or "running" in name or "s_prob" in name):
            value.data += 0.1 * torch.rand(value.shape, generator=generator)
    return model.eval()


EV_GRIDS = [dict(layout=name) for name in ("handcrafted", "released", "random", "row", "column", "global", "autogrids",
                                           "autogrids-random")] + [
    dict(layout="random", grid=(7, 3), attention="", padding=("zeros",)),
    dict(layout="autogrids", grid=(3, 6), attention="channel")]


@pytest.mark.parametrize("fields", EV_GRIDS, ids=str)
def test_eval_gridconv_checkpoint_round_trip(fields, tmp_path):
    torch.manual_seed(0)
    model = _ev_shake(evaluation.build_model(_ev_recipe(layout_seed=3, temperature=7.0, **fields)))
    assert model.recipe.hidden == 4 and (model.temperature == 7.0 or not model.recipe.attention == "grid")
    _ev_save(model, tmp_path / "m.pt")
    again = evaluation.load_model(tmp_path / "m.pt")
    x = torch.randn(2, 17, 2)
    assert torch.equal(again(x), model(x)) and not again.training
    assert again.recipe.padding == model.recipe.padding and again.recipe.kernel_sizes == (3, (3, 3), 3)
    assert again.epoch == 3 and again.trained_on == "synthetic motion"
    text = evaluation.inspect(again)
    assert ("dropped joints" in text) == fields["layout"].startswith("autogrids")


def test_eval_layouts_of_recipes():
    S = lambda layout, **more: evaluation.build_model(_ev_recipe(layout=layout, **more)).assignment()
    same = lambda a, b: torch.equal(a, gridconv.assignment_matrix(b, 17))
    assert same(S("handcrafted"), gridconv.HANDCRAFTED_5X5) and same(S("released"), gridconv.RELEASED_5X5)
    assert same(S("random", layout_seed=5), gridconv.random_layout(17, (5, 5), 5))
    for how in ("row", "column", "global"):
        assert same(S(how, layout_seed=2), gridconv.shuffle_layout(gridconv.HANDCRAFTED_5X5, how, 2))
    starts = [evaluation.build_model(_ev_recipe(layout="autogrids-random", layout_seed=seed)).autogrids.s_prob for seed in (4, 4, 5)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])  # the seed alone decides
    assert 0 <= starts[0].min() and starts[0].max() < 1
    for bad, said in ((dict(layout="spiral"), "spiral"), (dict(grid=(4, 5)), "4 x 5"),
                      (dict(skeleton="robot"), "robot"), (dict(method="linear"), "linear"),
                      (dict(padding=("mirror",)), "mirror")):
        with pytest.raises(ValueError, match=said):
            evaluation.build_model(_ev_recipe(**bad))


@pytest.mark.parametrize("fields", [dict(), dict(skeleton="humaneva15", filter_widths=(3, 3)), dict(
    skeleton="3dhp17", reconstruct=True, unshared_weight=0.5), dict(causal=True, adaptive=False)], ids=str)
def test_eval_glagcn_checkpoint_round_trip(fields, tmp_path):
    model = _ev_shake(evaluation.build_model(_ev_recipe("glagcn", **fields)))
    _ev_save(model, tmp_path / "m.pt")
    again, joints = evaluation.load_model(tmp_path / "m.pt"), len(data.SKELETONS[model.recipe.skeleton].joints)
    x = torch.randn(2, model.receptive_field, joints, 2)
    assert torch.equal(again(x), model(x)) and again.causal == bool(fields.get("causal"))
    assert "glagcn" in evaluation.inspect(again)


def test_eval_load_model_refuses_what_is_no_checkpoint(tmp_path):
    path, model = tmp_path / "m.pt", evaluation.build_model(_ev_recipe())
    _ev_save(model, path)
    whole = path.read_bytes()

    def refused(match, **overrides):
        with pytest.raises(data.InputError, match=match) as caught:
            evaluation.load_model(path, **overrides)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("no colour", colour="red")
    refused("do not fit", hidden=8)
    for part in (whole[:len(whole) // 2], whole[:100], b"", b"not a checkpoint at all"):
        path.write_bytes(part)
        refused("m.pt")
    for content in ({"weights": {}}, [1, 2], {"state_dict": 3}, {"state_dict": {"a": 1}}, {"model_pos": None}):
        torch.save(content, path)
        refused("no checkpoint")
    torch.save({"state_dict": {"conv.weight": torch.ones(2)}}, path)
    refused("w1", padding=("circular",))
    torch.save({"model_pos": {"module.fc.weight": torch.ones(2)}}, path)
    refused("expand_gcn")
    _ev_save(model, path, version=2)
    refused("version 2")
    _ev_save(model, path, recipe={"method": "gridconv"})
    refused("skeleton")
    torch.save({**torch.load(path), "model": {}}, path)
    refused("m.pt")
    path.unlink()
    refused("m.pt")


# ---- eval: the releases' checkpoint files, with random weights

class EvUnknownOptimizer:
    """What a release's file holds beside its weights: an object of a class that the reader need not know."""

    def __init__(self):
        self.param_groups, self.state = [{"lr": 1e-3, "params": [torch.ones(2)]}], {}

    def __reduce__(self):
        return _ev_never, (), self.__dict__


def _ev_never():
    raise AssertionError("reading a checkpoint ran code from it")


def _ev_released_gridconv(kind, hidden=4, blocks=1, grid=(5, 5)):
    """State dicts of the shapes that the release saves, filled with random numbers."""
    generator, state, (H, P) = torch.Generator().manual_seed(len(kind)), {}, grid
    fill = lambda key, *shape: state.__setitem__(key, torch.rand(*shape, generator=generator) - 0.4)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean"):
            fill(f"{name}.{part}", channels)
        state[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name, c_in, c_out, bias=True):
        for branch in ("donut_conv.", "tablet_conv.") if kind == "vanilla" else ("branch1_", "branch2_"):
            fill(f"{name}.{branch}weight", c_out, c_in, 3, 3)
            if bias:
                fill(f"{name}.{branch}bias", c_out)

    def attention(name, c_in):
        if kind != "vanilla":
            width = max(c_in // 16, 16)
            fill(f"{name}.fc.weight", width, c_in, 1, 1)
            norm(f"{name}.bn", width)
            fill(f"{name}.position_fc.weight", 9 * H * P, width, 1, 1)
            fill(f"{name}.position_fc.bias", 9 * H * P)

    conv("w1", 2, hidden)
    norm("batch_norm1", hidden)
    attention("atten_conv1", 2)
    for i in range(blocks):
        for k in (1, 2):
            conv(f"linear_stages.{i}.w{k}", hidden, hidden)
            norm(f"linear_stages.{i}.batch_norm{k}", hidden)
            attention(f"linear_stages.{i}.atten_conv{k}", hidden)
    conv("w2", hidden, 3, bias=False)
    attention("atten_conv2", hidden)
    if kind == "autogrids":
        prior = torch.tensor([7] * 5 + [0, 8, 8, 8, 0] + [4, 11, 9, 14, 1] + [5, 12, 9, 15, 2] + [6, 13, 10, 16, 3])
        state["sgt_layer.sgt_trans_mat"] = torch.nn.functional.one_hot(prior, 17).float()[None]
    return state


@pytest.mark.parametrize("kind", ["dynamic", "vanilla", "autogrids"])
def test_eval_reads_gridconvs_released_files(kind, tmp_path):
    state, path = _ev_released_gridconv(kind, blocks=2), tmp_path / "best.pth.tar"
    torch.save({"epoch": 99, "lr": 1e-4, "error": 37.1, "state_dict": state, "optimizer": EvUnknownOptimizer()}, path,
               _use_new_zipfile_serialization=False, pickle_protocol=2)
    with pytest.raises(data.InputError, match="--padding"):
        evaluation.load_model(path)
    with pytest.raises(data.InputError, match="no filter_widths"):
        evaluation.load_model(path, filter_widths=(3,))
    model, x = evaluation.load_model(path, padding=["circular", "zeros"]), torch.randn(3, 17, 2)
    want = gridconv.from_released(state, ("circular", "zeros")).eval()
    assert torch.equal(model(x), want(x)) and not torch.equal(model(x), model(x * 2))
    other = evaluation.load_model(path, padding=("circular", "replicate"))
    assert not torch.allclose(other(x), want(x), rtol=1e-3)
    recipe = model.recipe
    assert (recipe.normalise, recipe.temperature) == ("release-500", 30.0)
    assert (recipe.keypoints, recipe.skip) == ("gt" if kind == "vanilla" else "hrnet", "gridconv")  # what it was trained on
    assert other.recipe.keypoints == "gt" and evaluation.load_model(path, padding=("zeros",) * 2, keypoints="cpn").recipe.keypoints == "cpn"
    assert recipe.attention == ("" if kind == "vanilla" else "grid") and (recipe.hidden, recipe.blocks) == (4, 2)
    assert recipe.layout == ("autogrids" if kind == "autogrids" else "released") and model.epoch == 99
    assert ("cells changed from the start: not known" in evaluation.inspect(model)) == (kind == "autogrids")


def test_eval_released_gridconv_on_another_grid(tmp_path):
    state, path = _ev_released_gridconv("dynamic", grid=(7, 3)), tmp_path / "m.pth.tar"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False, pickle_protocol=2)
    with pytest.raises(data.InputError, match="--grid"):
        evaluation.load_model(path, padding=("circular", "zeros"))
    with pytest.raises(data.InputError, match="21 cells"):
        evaluation.load_model(path, padding=("circular", "zeros"), grid=(5, 5))
    model, grid = evaluation.load_model(path, padding=("circular", "zeros"), grid=(7, 3)), torch.randn(2, 2, 7, 3)
    want = gridconv.from_released(state, ("circular", "zeros"), (7, 3)).eval()
    assert torch.equal(model.forward_grid(grid), want.forward_grid(grid))


def _ev_released_glagcn(joints, modules, channels=8):
    generator, state = torch.Generator().manual_seed(joints), {}
    fill = lambda key, *shape: state.__setitem__("module." + key, 0.5 * torch.rand(*shape, generator=generator) - 0.2)

    def norm(name, n):
        for part in ("weight", "bias", "running_mean"):
            fill(f"{name}.{part}", n)
        state[f"module.{name}.running_var"] = torch.rand(n, generator=generator) + 0.5
        state[f"module.{name}.num_batches_tracked"] = torch.tensor(5)

    def conv(name, c_in, c_out, time=1):
        fill(f"{name}.weight", c_out, c_in, time, 1)
        fill(f"{name}.bias", c_out)

    norm("data_bn", joints * 2)
    for name, c_in in [("expand_gcn", 2)] + [(f"layers_tcngcn.{i}", channels) for i in range(2 * modules)]:
        fill(f"{name}.gcn1.PA", 3, joints, joints)
        for k in range(3):
            conv(f"{name}.gcn1.conv_a.{k}", c_in, channels // 4)
            conv(f"{name}.gcn1.conv_b.{k}", c_in, channels // 4)
            conv(f"{name}.gcn1.conv_d.{k}", c_in, channels)
        if c_in != channels:
            conv(f"{name}.gcn1.down.0", c_in, channels)
            norm(f"{name}.gcn1.down.1", channels)
            conv(f"{name}.residual.conv", c_in, channels)
            norm(f"{name}.residual.bn", channels)
        norm(f"{name}.gcn1.bn", channels)
        conv(f"{name}.tcn1.conv", channels, channels, 9)
        norm(f"{name}.tcn1.bn", channels)
    fill("fc.weight", 3, channels, 1)
    fill("fc.bias", 3)
    return state


@pytest.mark.parametrize("joints, skeleton", [(17, "h36m17"), (17, "3dhp17"), (15, None)])
def test_eval_reads_glagcns_released_files(joints, skeleton, tmp_path):
    state, path = _ev_released_glagcn(joints, 2), tmp_path / "best_epoch.bin"
    torch.save({"epoch": 60, "lr": 1e-3, "random_state": np.random.RandomState(0), "optimizer": {"state": {}},
                "model_pos": state}, path)
    with pytest.raises(data.InputError, match="--filter-widths 3,3.*--skeleton" if joints == 17 else "--filter-widths"):
        evaluation.load_model(path)
    if joints == 17:
        with pytest.raises(data.InputError, match="--skeleton"):
            evaluation.load_model(path, filter_widths=(3, 3))
    with pytest.raises(data.InputError, match="2 strided modules"):
        evaluation.load_model(path, filter_widths=(3, 3, 3), skeleton=skeleton)
    with pytest.raises(data.InputError, match=f"{joints} joints"):
        evaluation.load_model(path, filter_widths=(3, 3), skeleton="humaneva15" if joints == 17 else "h36m17")
    edges = {"h36m17": glagcn.H36M_EDGES, "3dhp17": glagcn.MPI3DHP_EDGES, None: glagcn.HUMANEVA15_EDGES}[skeleton]
    bare = {key[len("module."):]: value for key, value in state.items()}
    want = glagcn.from_released(bare, filter_widths=(3, 3), edges=edges).eval()
    model, x = evaluation.load_model(path, filter_widths=[3, 3], skeleton=skeleton), torch.randn(2, 9, joints, 2)
    assert torch.equal(model(x), want(x)) and model.receptive_field == 9
    assert (model.recipe.normalise, model.recipe.channels) == ("width", 8)
    assert model.recipe.data == {"h36m17": "h36m", "3dhp17": "3dhp", None: "humaneva"}[skeleton]
    with pytest.raises(data.InputError, match="does not say its 2D poses: give --keypoints"):
        evaluation.main([str(path), "--filter-widths", "3,3", *(["--skeleton", skeleton] if skeleton else [])])


@pytest.mark.parametrize("temperature", ["hot", [1], torch.ones(3), math.nan, 0.0, -3.0])
def test_a_checkpoints_temperature_is_a_number_above_0(temperature, run_folder, tmp_path):
    torch.save({**make_run(run_folder).weights(), "temperature": temperature}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="m.pt: weights and recipe do not fit"):
        evaluation.load_model(tmp_path / "m.pt")


# ---- eval: tables and the command line

def _ev_result(actions, value=50.0):
    row = dict(frames=10, mpjpe=value, p_mpjpe=value - 10, n_mpjpe=value - 1, mpjve=None)
    return {**evaluation.average([row] * len(actions)), "actions": {a: dict(row) for a in actions},
            "subjects": {"S9": dict(row)}, "cells": {a: {"S9": dict(row)} for a in actions}, "pooled": dict(row)}


def test_eval_report_quotes_the_paper_only_for_human36m():
    recipe = _ev_recipe(layout="autogrids", keypoints="hrnet", hidden=256, blocks=2)
    result = _ev_result(evaluation.ACTIONS)
    genuine, other = evaluation.report(result, "Human3.6M", recipe), evaluation.report(result, "synthetic motion", recipe)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in genuine.split("\n") if "|" in line]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["action"] == ["frames", "MPJPE", "paper", "P-MPJPE", "paper", "N-MPJPE", "MPJVE"]
    assert rows["SittingDown"] == ["10", "50.00", "63.90", "40.00", "52.50", "49.00", "-"]
    assert rows["average"] == ["150", "50.00", "47.60", "40.00", "37.40", "49.00", "-"]
    assert "not Human3.6M" not in genuine and "not Human3.6M" in other
    assert "paper |" not in other and not any(figure in other for figure in ("47.60", "63.90", "37.40"))
    plain = evaluation.report(result, "Human3.6M", _ev_recipe(keypoints="hrnet"))       # handcrafted: no per-action row printed
    assert "paper |" not in plain and "not Human3.6M" not in plain
    assert "173.31" in evaluation.report(result, "mocap", recipe, {"mean_pose": 173.31, "affine": 69.9})


def test_eval_paper_figures_are_of_the_2d_trained_on(tmp_path):
    path, recipe = tmp_path / "best.pt", _ev_recipe(keypoints="gt", paper_mpjpe=37.1, row="Table 5")
    _ev_save(evaluation.build_model(recipe), path)
    for options, shown in (({}, True), ({"keypoints": "gt"}, True), ({"keypoints": "hrnet"}, False)):
        text = evaluation.report(_ev_result(evaluation.ACTIONS), "Human3.6M", evaluation.load_model(path, **options).recipe)
        assert ("37.10" in text) == shown == ("Table 5" in text)


def test_eval_report_of_humaneva_by_action_and_subject():
    store = _ev_store((("Validate/S1", "Walking 1 chunk0", 3), ("Validate/S2", "Walking 1 chunk0", 2),
                       ("Validate/S1", "Walking 1 chunk3", 4), ("Validate/S2", "Jog 1 chunk0", 2)), "humaneva15")
    prediction = store.pose_3d + 0.1 * torch.randn(store.pose_3d.shape, generator=torch.Generator().manual_seed(3))
    text = evaluation.report(evaluation.score(prediction, store), "HumanEva-I", _ev_recipe(data="humaneva", skeleton="humaneva15"))
    p, t = prediction.double(), store.pose_3d.double()
    walking = [evaluation.p_mpjpe(p[i], t[i]) for i in ([0, 1, 2, 5, 6, 7, 8], [3, 4])]   # both chunks of S1
    lines = [" ".join(line.replace("|", " ").split()) for line in text.split("\n")]
    assert "action Validate/S1 Validate/S2" in lines and f"Walking {walking[0]:.2f} {walking[1]:.2f}" in lines
    assert f"Jog - {evaluation.p_mpjpe(p[9:], t[9:]):.2f}" in lines


def test_eval_printed_rows_average_to_their_printed_average():
    for row in evaluation.PAPER.values():
        for metric in ("mpjpe", "p_mpjpe"):
            assert len(row[metric]) == 16 and np.mean(row[metric][:15]) == pytest.approx(row[metric][15], abs=0.1)
    whole = dict(hidden=256, blocks=2, reconstruct_blocks=3)
    pick = lambda *args, **fields: (evaluation.paper_row(_ev_recipe(*args, **{**whole, **fields})) or {"mpjpe": [None]})["mpjpe"][-1]
    assert pick("gridconv", keypoints="hrnet", layout="autogrids", target="uvd") == 46.3
    assert pick("glagcn", keypoints="cpn_ft_h36m_dbb", channels=96, filter_widths=(3,) * 5) == 44.4
    assert pick("glagcn", channels=96, filter_widths=(3,) * 5) == 28.5
    assert pick("glagcn", channels=512, reconstruct=True, filter_widths=(3,) * 5) == 21.0
    assert pick("glagcn", channels=96, filter_widths=(3,) * 3) is None and pick("gridconv", layout="autogrids") is None
    for other in (dict(hidden=64), dict(attention=""), dict(kernel_sizes=(3, (3, 1), 3))):
        assert pick("gridconv", keypoints="hrnet", layout="autogrids", **other) is None  # not the network of the row
    for other in (dict(causal=True), dict(adaptive=False), dict(swap_sides=True), dict(normalisation="symmetric")):
        assert pick("glagcn", channels=96, filter_widths=(3,) * 5, **other) is None


def test_eval_inspect_shows_the_grid_and_its_graph():
    text = evaluation.inspect(_ev_with_epoch(evaluation.build_model(_ev_recipe(layout="handcrafted"))))
    assert "   1   14    9   11    4" in text and "16 of 16 skeleton links" in text
    head = next(line for line in text.split("\n") if line.startswith("  10 "))
    assert head.split(": ")[1].split(", ") == ["9 neck", "13 left_wrist", "16 right_wrist"]
    model = evaluation.build_model(_ev_recipe(layout="autogrids-random", layout_seed=1))
    with torch.no_grad():                                                       # move one cell, and drop a joint
        s_prob = model.autogrids.s_prob
        s_prob[s_prob.argmax(1) == 3] = 5 * torch.eye(17)[4]
    start = evaluation.build_model(model.recipe).autogrids.s_prob.argmax(1)
    text, cells = evaluation.inspect(_ev_with_epoch(model)), int((start == 3).sum())
    assert "3 right_ankle" in text.split("dropped joints: ")[1].split("\n")[0] and f"the start: {cells} of 25" in text
    assert f"4 left_hip {math.exp(5) / (math.exp(5) + 16):.3f}" in text


def _ev_with_epoch(model):
    model.epoch, model.trained_on = 0, ""
    return model


def _ev_fake_data(monkeypatch, source="synthetic motion", joints=17, train=True, names=EV_NAMES):
    def load(recipe, folder, split):
        if split == "train" and not train:
            raise data.InputError(f"{folder}: no training data")
        return [_ev_sequence(*name[:3], seed + 100 * (split == "train"), joints) for seed, name in enumerate(names)]

    monkeypatch.setattr(data, "load_dataset", load)
    monkeypatch.setattr(data, "provenance", lambda *_: source, raising=False)


def test_eval_command_line_prints_and_writes_the_table(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "m.pt", tmp_path / "deep" / "figures.json"
    _ev_save(_ev_shake(evaluation.build_model(_ev_recipe(flip_test=True))), path)
    _ev_fake_data(monkeypatch)
    evaluation.main([str(path), "--data", "d", "--json", str(out), "--device", "cpu"])
    text, kept = capsys.readouterr().out, json.loads(out.read_text())
    assert "with flip averaging" in text and "not Human3.6M" in text and f"{kept['mpjpe']:.2f}" in text
    assert f"{kept['yardsticks']['affine']:.2f} mm" in text
    assert kept["data"] == "synthetic motion" and kept["flip"] is True
    store = data.FrameStore(data.load_dataset(None, "", "test"), "release-500", data.SKELETONS["h36m17"])
    assert kept["mpjpe"] == pytest.approx(evaluation.evaluate(evaluation.load_model(path), store, flip=True)["mpjpe"], rel=1e-6)
    _ev_fake_data(monkeypatch, "Human3.6M", train=False)
    evaluation.main([str(path), "--no-flip", "--device", "cpu", "--json", str(out)])
    printed = capsys.readouterr()
    assert "without flip" in printed.out and "not Human3.6M" not in printed.out and "no yardsticks" in printed.err
    assert json.loads(out.read_text())["mpjpe"] != kept["mpjpe"]


def test_eval_command_line_reads_a_release_and_crosses_datasets(tmp_path, monkeypatch, capsys):
    path = tmp_path / "best.pth.tar"
    torch.save({"state_dict": _ev_released_gridconv("dynamic"), "optimizer": EvUnknownOptimizer()}, path,
               _use_new_zipfile_serialization=False, pickle_protocol=2)
    _ev_fake_data(monkeypatch, "MPI-INF-3DHP", names=(("TS1", "TS1", 3), ("TS5", "TS5", 2)))
    evaluation.main([str(path), "--padding", "circular,zeros", "--dataset", "3dhp", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "PCK 14" in text and "outdoor" in text and "not Human3.6M" in text
    with pytest.raises(data.InputError, match="h36m17.*humaneva15"):
        evaluation.main([str(path), "--padding", "circular,zeros", "--dataset", "humaneva", "--device", "cpu"])
    _ev_fake_data(monkeypatch, joints=16)
    with pytest.raises(data.InputError, match="16 joints.*has 17"):
        evaluation.main([str(path), "--padding", "circular,zeros", "--device", "cpu"])
    evaluation.main(["inspect", str(path), "--padding", "circular,zeros"])
    assert "8+9" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    ((), "checkpoint"), (("inspect",), "checkpoint"), (("m.pt", "--flip", "--size"), "--size"),
    (("m.pt", "--filter-widths", "3,x"), "numbers"), (("m.pt", "--dataset", "coco"), "coco")])
def test_eval_command_line_errors_are_one_line(arguments, said):
    with pytest.raises(data.InputError, match=said) as caught:
        evaluation.main(list(arguments))
    assert "\n" not in str(caught.value)


def test_eval_command_line_ends_with_status_2(tmp_path):
    bad = tmp_path / "cut.pt"
    _ev_save(evaluation.build_model(_ev_recipe()), bad)
    bad.write_bytes(bad.read_bytes()[:3000])
    command = [sys.executable, evaluation.__file__, str(bad), "--data", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and str(bad) in done.stderr


def test_eval_headline_is_the_protocols_average():
    row = lambda a, b, n: {"frames": n, "mpjpe": a, "p_mpjpe": b}
    scores = {**row(3.0, 2.0, 30), "pooled": row(4.0, 3.5, 30),
              "cells": {"Walk": {"S1": row(1.0, 0.5, 10), "S2": row(2.0, 1.0, 10)}, "Jog": {"S1": row(6.0, 3.0, 10)}}}
    assert evaluation.headline(scores, "h36m") == (3.0, 2.0) and evaluation.headline(scores, "mocap") == (4.0, 3.5)
    assert evaluation.headline(scores, "humaneva") == (3.0, 1.5)
    assert evaluation.headline({**scores, "all": {"mpjpe": 9.0}}, "3dhp") == (9.0, 3.5)


# ---- eval: looking inside

def _ev_inspected(tmp_path, capsys, *options, **fields):
    """The text of `eval.py inspect` for a shaken model of the recipe's fields, and the model."""
    _ev_save(_ev_shake(evaluation.build_model(_ev_recipe(**fields))), tmp_path / "m.pt")
    evaluation.main(["inspect", str(tmp_path / "m.pt"), *map(str, options)])
    return capsys.readouterr().out, evaluation.load_model(tmp_path / "m.pt")


def _ev_rows(text):
    """{first cell: other cells} of all tables in a text."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_eval_inspect_learnt_grid_as_text_graph_and_probabilities(tmp_path, capsys):
    fields = dict(layout="autogrids", hidden=2)
    model = evaluation.build_model(_ev_recipe(**fields))
    torch.manual_seed(1)
    model.autogrids.s_prob.data = torch.randn(25, 17) * 2
    _ev_save(model, tmp_path / "m.pt")
    evaluation.main(["inspect", str(tmp_path / "m.pt")])
    text = capsys.readouterr().out
    rows, S = _ev_rows(text), model.autogrids.s_prob.tolist()
    p = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in S]
    held = [row.index(max(row)) for row in S]
    shown = [[int(word) for word in line.split()] for line in text.split("grid, 5 x 5:\n")[1].split("\n")[:5]]
    assert sum(shown, []) == held
    names = SKELETONS["h36m17"].joints
    for j, name in enumerate(names):
        column = [row[j] for row in p]
        assert rows[f"{j} {name}"] == [str(held.count(j)), f"{sum(column):.2f}", f"{max(column):.3f}"]
        around = {held[5 * r + c] for i in range(25) if held[i] == j for r, c in (
            (i // 5 - 1, i % 5), (i // 5 + 1, i % 5), (i // 5, i % 5 - 1), (i // 5, i % 5 + 1)) if 0 <= r < 5 and 0 <= c < 5} - {j}
        assert f"  {j} {name}: {', '.join(f'{a} {names[a]}' for a in sorted(around)) or 'none'}\n" in text
        assert {b for a, b in evaluation.grid_links(model) if a == j} == around
    absent = [f"{j} {names[j]}" for j in range(17) if j not in held]
    assert absent and f"dropped joints: {', '.join(absent)}\n" in text


def test_eval_inspect_attention_by_position_and_input(tmp_path, capsys, monkeypatch):
    _ev_fake_data(monkeypatch)
    text, model = _ev_inspected(tmp_path, capsys, "--data", "d", kernel_sizes=(3, (1, 3), 5))
    assert "Attention on 15 test frames of synthetic motion:" in text
    store = evaluation.make_store(model.recipe, "d", "test")
    S, rows = model.assignment(), _ev_rows(text)
    x = gridconv.sgt(store.input[:15], S, (5, 5))
    with torch.no_grad():
        seen = {"expand": (model.expand.conv, x)}
        h = model.expand(x)
        seen["blocks.0.0"] = model.blocks[0][0].conv, h
        seen["blocks.0.1"] = model.blocks[0][1].conv, model.blocks[0][0](h)
        seen["shrink"] = model.shrink, h + model.blocks[0](h)
        assert {name for name, row in rows.items() if "x" in row[0]} == set(seen)
        for name, (conv, x) in seen.items():
            alpha, K = conv.attention(x).double().numpy(), conv.kernel_size
            mean = alpha.mean()
            spread = [100 * np.mean([np.std(alpha[n, :, :, a, b]) for n in range(15) for a in range(K) for b in range(K)]) / mean,
                      100 * np.mean([np.std(alpha[:, i, j, a, b]) for i in range(5) for j in range(5) for a in range(K)
                                     for b in range(K)]) / mean,
                      100 * np.mean([np.std(alpha[n, i, j]) for n in range(15) for i in range(5) for j in range(5)]) / mean]
            kernels = np.abs(conv.weight.detach().double().numpy()).reshape(-1, K * K)
            largest = 100 * np.mean([kernel.max() / kernel.sum() for kernel in kernels])
            assert rows[name][0] == f"{K} x {K}"
            assert [float(v) for v in rows[name][1:]] == pytest.approx([largest, mean, *spread], abs=0.006)


def test_eval_inspect_of_other_models(tmp_path, capsys):
    text, _ = _ev_inspected(tmp_path, capsys, attention="")
    assert "Attention on" not in text and _ev_rows(text)["shrink"][2:] == ["-"] * 4
    text, _ = _ev_inspected(tmp_path, capsys, method="gridconv-temporal", filter_widths=(3, 3))
    assert "227 random inputs" in text and "grid, 5 x 5:" in text
    assert [name for name in _ev_rows(text) if "." in name] == [
        *(f"expand.frames.{k}" for k in range(3)), *(f"blocks.0.0.frames.{k}" for k in range(3)), "blocks.0.1.frames.0"]
    for method in ("fc", "gcn"):
        assert _ev_inspected(tmp_path, capsys, method=method)[0].count("\n") == 1
    torch.save({"state_dict": _ev_released_gridconv("dynamic", grid=(7, 3))}, tmp_path / "7x3")  # no layout: random grids
    evaluation.main(["inspect", str(tmp_path / "7x3"), "--padding", "circular,zeros", "--grid", "7,3"])
    text = capsys.readouterr().out
    assert "grid, " not in text and _ev_rows(text)["expand"][0] == "3 x 3" and "-" not in _ev_rows(text)["expand"]


@pytest.mark.parametrize("fields", [dict(unshared_weight=0.5), dict(head="full"), dict(skeleton="humaneva15")], ids=str)
def test_eval_inspect_similarity_of_joints(fields, tmp_path, capsys):
    text, model = _ev_inspected(tmp_path, capsys, method="glagcn", **fields)
    joints = SKELETONS[model.recipe.skeleton].joints
    generator, J = torch.Generator().manual_seed(0), len(joints)
    x, kept = torch.rand(256, 3, J, 2, generator=generator) * 2 - 1, []
    model.head.forward = lambda v: kept.append(v.detach().double().numpy()) or v  # instead of the head: what it is given
    model(x)
    v = kept[0]
    alike = [[np.mean([a[i] @ a[j] / np.linalg.norm(a[i]) / np.linalg.norm(a[j]) for a in v]) for j in range(J)] for i in range(J)]
    rows = _ev_rows(text)
    for i, name in enumerate(joints):
        assert [float(cell) for cell in rows[f"{i} {name}"]] == pytest.approx(alike[i], abs=0.006)
    pairs = {(i, j): alike[i][j] for j in range(J) for i in range(j)}
    i, j = min(pairs, key=pairs.get)
    assert f"{np.mean(list(pairs.values())):.2f} on average; least {i} {joints[i]} and {j} {joints[j]}" in text
    assert ("unshared weights (Eq. 5):" in text) == ("unshared_weight" in fields)
    if "unshared_weight" in fields:
        W = model.head.W.detach().double().numpy().reshape(J, -1)
        W = W / np.linalg.norm(W, axis=1, keepdims=True)
        mean = np.mean([W[i] @ W[j] for j in range(J) for i in range(j)])
        assert f"unshared weights (Eq. 5):\n{mean:.2f} on average" in text


@pytest.mark.parametrize("fields", [dict(layout="autogrids"), dict(attention="", skeleton="h36m32", layout="handcrafted", grid=(7, 5)),
                                    dict(method="glagcn", unshared_weight=1.0)], ids=str)
def test_eval_inspect_draws(fields, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _ev_inspected(tmp_path, capsys, "--plot", tmp_path / "inside.png", **fields)
    assert (tmp_path / "inside.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    evaluation.main(["inspect", str(tmp_path / "m.pt"), "--plot", str(tmp_path / "again.svg")])
    assert b"<svg" in (tmp_path / "again.svg").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.svg", "inside.png", "m.pt"]


def test_eval_inspect_refuses_what_it_cannot_draw(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="nothing to draw, fc"):
        _ev_inspected(tmp_path, capsys, "--plot", tmp_path / "a.png", method="fc")
    with pytest.raises(InputError, match="h36m17.*humaneva15"):
        _ev_inspected(tmp_path, capsys, "--data", "d", "--dataset", "humaneva")
    with pytest.raises(InputError, match="a.mp9: unknown picture format 'mp9'"):
        _ev_inspected(tmp_path, capsys, "--plot", tmp_path / "a.mp9")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        _ev_inspected(tmp_path, capsys, "--plot", tmp_path / "a.png")




# ---- eval: a user's own keypoints

def _kp_body(frames=12, seed=0, size=(1920, 1080)):
    """COCO-17 keypoints (T, 17, 2) of a body of about 300 pixels that sways in the image, whole numbers of 1/8 pixel."""
    place = dict(nose=(0, -140), eye=(8, -150), ear=(16, -145), shoulder=(40, -110), elbow=(55, -50), wrist=(60, 5), hip=(25, 0),
                 knee=(28, 75), ankle=(30, 150))
    sign = {"left": 1, "right": -1}
    body = np.array([np.multiply(place[j.split("_")[-1]], (sign.get(j.split("_")[0], 0), 1)) for j in SKELETONS["coco17"].joints])
    rng, time = np.random.default_rng(seed), np.arange(frames)[:, None, None]
    moved = body + np.array(size) / 2 + 20 * np.sin(time / 5 + rng.uniform(0, 6, (17, 2))) + time
    return np.round(8 * moved) / 8


def _kp_list(keypoints, skip=(), **more):
    """COCO result entries of keypoints (T, 17, 2|3), without the frames in `skip`."""
    scored = keypoints if keypoints.shape[2] == 3 else np.concatenate((keypoints, np.full((*keypoints.shape[:2], 1), 0.5)), 2)
    return [{"image_id": t, "category_id": 1, "keypoints": k.flatten().tolist(), "score": 0.9, **more}
            for t, k in enumerate(scored) if t not in skip]


def _kp_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_coco_becomes_h36m_by_its_rule():
    coco = dict(zip(SKELETONS["coco17"].joints, np.random.default_rng(0).uniform(0, 1000, (17, 2))))
    middle = lambda part: (coco["left_" + part] + coco["right_" + part]) / 2
    shoulders, nose = middle("shoulder"), coco["nose"]
    want = {"pelvis": middle("hip"), "spine": (middle("hip") + shoulders) / 2, "thorax": shoulders * 2 / 3 + nose / 3,
            "neck": nose * 3 / 4 + shoulders / 4, "head": middle("eye") * 3 / 2 + middle("ear") / 2 - nose}
    got = dict(zip(SKELETONS["h36m17"].joints, evaluation.coco_to_h36m(np.stack(list(coco.values())))))
    for joint, place in got.items():
        assert place == pytest.approx(want.get(joint, coco.get(joint))), joint
    matrix = evaluation.TO_H36M["coco"]
    assert matrix.sum(1) == pytest.approx(np.ones(17))                          # so it commutes with shifts, turns and scales
    mirrored = np.eye(17)[SKELETONS["h36m17"].mirror] @ matrix @ np.eye(17)[SKELETONS["coco17"].mirror]
    assert mirrored == pytest.approx(matrix)


def test_every_dialect_gives_the_same_track(tmp_path):
    body, skip = _kp_body(), (4, 5)
    entries = _kp_list(body, skip)
    split = [np.array(e["keypoints"]).reshape(17, 3) for e in entries]
    instances = [{"frame_id": e["image_id"], "instances": [{"keypoints": k[:, :2].tolist(), "keypoint_scores": k[:, 2].tolist(),
                                                            "track_id": 7}]} for e, k in zip(entries, split)]
    alpha = [{**e, "image_id": f"clip2_{e['image_id']:06d}.jpg", "idx": [7.0]} for e in entries]
    images = [{"id": 90 - t, "width": 640, "height": 480} for t in range(12)]   # the list's order counts, not the ids
    halpe = [{**e, "keypoints": e["keypoints"] + [1.0] * 27} for e in entries]
    files = [("0", None, entries), ("7", None, alpha),
             ("7", None, {"meta_info": {"dataset_name": "coco"}, "instance_info": instances}),
             ("7", None, instances), ("a", None, [{**e, "track_id": "a"} for e in entries]), ("0", None, entries[::-1]),
             ("0", (640, 480), {"images": images, "annotations": [{**e, "image_id": 90 - e["image_id"]} for e in entries]}),
             ("0", None, [{**e, "image_id": 10 + 5 * e["image_id"]} for e in entries]), ("0", None, halpe)]
    for i, (person, size, content) in enumerate(files):
        track, = evaluation.read_keypoints(_kp_json(tmp_path / "k.json", content))
        assert (track.person, track.size) == (person, size), i
        if content is not halpe:
            assert track.joints == "coco"
        assert track.frames == ([90 - t for t in range(12)] if size else list(range(10, 70, 5)) if i == 7 else list(range(12)))
        assert np.isnan(track.keypoints[list(skip)]).all() and len(track.keypoints) == 12, i
        here = [t for t in range(12) if t not in skip]
        assert np.array_equal(track.keypoints[here][:, :17, :2], body[here]), i
        assert (track.keypoints[here][:, :17, 2] == 0.5).all(), i
        pose, gaps = evaluation.prepare(track.keypoints, track.joints)
        assert pose == pytest.approx(evaluation.prepare(np.nan_to_num(track.keypoints[:, :17]))[0])
        assert gaps.all(1).nonzero()[0].tolist() == [4, 5] and gaps.sum() == 34
    video = {"positions_2d": {"a.mp4": {"custom": [body]}, "b.mp4": {"custom": [body[:5], body]}}, "metadata": {
        "layout_name": "coco", "num_joints": 17, "keypoints_symmetry": [[1, 3], [2, 4]],
        "video_metadata": {"a.mp4": {"w": 640, "h": 480}, "b.mp4": {"w": 99, "h": 98}}}}
    np.savez(tmp_path / "data_2d_custom_my.npz", **{key: np.array(value, object) for key, value in video.items()})
    one, two, three = evaluation.read_keypoints(tmp_path / "data_2d_custom_my.npz")
    assert (one.person, one.size, one.joints, two.person, three.size) == ("a.mp4", (640, 480), "coco", "b.mp4 custom 0", (99, 98))
    assert np.array_equal(one.keypoints, body) and len(two.keypoints) == 5
    np.save(tmp_path / "k.npy", body)
    np.savez(tmp_path / "one.npz", anything=body.astype(np.float32))
    np.savez(tmp_path / "two.npz", other=body[:3], keypoints=body)
    for name in ("k.npy", "one.npz", "two.npz"):
        track, = evaluation.read_keypoints(tmp_path / name)
        assert np.array_equal(track.keypoints, body) and track.frames == list(range(12)) and track.size is None


def test_people_are_told_apart_by_number_and_the_best_scored_is_taken_without(tmp_path, capsys):
    one, two = _kp_body(seed=1), _kp_body(seed=2) + 300
    entries = _kp_list(one, track_id=3) + _kp_list(two, skip=(0, 1, 11), track_id=10)
    a, b = evaluation.read_keypoints(_kp_json(tmp_path / "k.json", entries))
    assert (a.person, b.person, b.frames) == ("3", "10", list(range(2, 11))) and np.array_equal(b.keypoints[..., :2], two[2:11])
    assert capsys.readouterr().err == ""
    for e in entries:
        e["score"] = 0.5 + (e.pop("track_id") == 3) * (0.1 if e["image_id"] % 2 else -0.1)
    track, = evaluation.read_keypoints(_kp_json(tmp_path / "k.json", entries))
    taken = [one if t % 2 or t in (0, 11) else two for t in range(12)]
    assert all(np.array_equal(track.keypoints[t, :, :2], taken[t][t]) for t in range(12))
    assert "9 frames have several people" in capsys.readouterr().err


@given(st.integers(0, 10 ** 6), st.integers(1, 9), st.sampled_from(["coco", "h36m"]))
def test_gaps_are_interpolated_in_time_and_reported(seed, frames, joints):
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate((rng.uniform(10, 500, (frames, 17, 2)), np.ones((frames, 17, 1))), 2)
    holes = rng.uniform(size=(frames, 17)) < 0.4
    holes[rng.integers(frames, size=17), range(17)] = False                     # each joint is seen once at least
    for (t, j), how in zip(np.argwhere(holes), rng.integers(5, size=holes.size)):
        keypoints[t, j] = [(np.nan, 5, 1), (7, 7, 0), (0, 0, 1), (7, 7, np.nan), (np.inf, 1, 1)][how]
    filled = keypoints[..., :2].copy()
    for t, j in np.argwhere(holes):                                             # the plain form: look both ways
        before = [s for s in range(t) if not holes[s, j]][-1:]
        after = [s for s in range(t, frames) if not holes[s, j]][:1]
        (a,), (b,) = before or after, after or before
        filled[t, j] = keypoints[a, j, :2] + (0 if a == b else (t - a) / (b - a)) * (keypoints[b, j, :2] - keypoints[a, j, :2])
    pose, gaps = evaluation.prepare(keypoints, joints)
    matrix = evaluation.TO_H36M[joints]
    for t in range(frames):
        assert pose[t] == pytest.approx(matrix @ filled[t])
        assert gaps[t].tolist() == [any(holes[t, j] for j in range(17) if matrix[i, j]) for i in range(17)]


def test_a_face_seen_in_part_is_enough_and_low_scores_are_gaps():
    body = np.concatenate((_kp_body(), np.full((12, 17, 1), 0.8)), 2)
    body[:, [0, 3], 2] = 0                                                      # nose and left ear never seen
    pose, gaps = evaluation.prepare(body, "coco")
    plain = body[..., :2].copy()
    plain[:, [0, 3]] = plain[:, [1, 2, 4]].mean(1, keepdims=True)
    assert pose == pytest.approx(evaluation.TO_H36M["coco"] @ plain)
    assert gaps.any(0).nonzero()[0].tolist() == [8, 9, 10]
    body[3, 9, 2] = 0.3
    assert not evaluation.prepare(body, "coco", 0.2)[1][3, 13] and evaluation.prepare(body, "coco", 0.3)[1][3, 13]
    body[:, 15, 2] = 0
    with pytest.raises(InputError, match="left_ankle never detected"):
        evaluation.prepare(body, "coco")


def test_layouts_are_told_apart(synthetic):
    for sequence in synthetic[::7]:
        assert evaluation.tell_joints(sequence.pose_2d) == "h36m"
    for seed in range(5):
        body = _kp_body(seed=seed)
        assert evaluation.tell_joints(body) == "coco"
        unclear = body.copy()
        unclear[:, 4] += 55                                                     # a face almost a third of the body
        assert evaluation.tell_joints(unclear) is None
        with pytest.raises(InputError, match="--joints coco or --joints h36m"):
            evaluation.prepare(unclear)
        body[1:, 16] = 0
        assert evaluation.tell_joints(body) == "coco"                           # by the one whole frame
        body[0, 16] = np.nan
        assert evaluation.tell_joints(body) is None


def test_one_euro_is_casiez_algorithm():
    x, fps = np.random.default_rng(0).normal(size=(20, 3)), 25.0
    for cutoff, beta in ((2.0, 10.0), (0.3, 0.0)):
        got = evaluation.one_euro(x, fps, cutoff, beta)
        for c in range(3):
            value, speed = x[0, c], 0.0
            for t in range(20):
                if t:
                    alpha = lambda hertz: 1 / (1 + 1 / (2 * math.pi * hertz) * fps)
                    raw = (x[t, c] - value) * fps
                    speed = alpha(1.0) * raw + (1 - alpha(1.0)) * speed
                    a = alpha(cutoff + beta * abs(speed))
                    value = a * x[t, c] + (1 - a) * value
                assert got[t, c] == pytest.approx(value)
    assert np.array_equal(evaluation.one_euro(x, fps), evaluation.one_euro(x, fps, 2.0, 10.0))
    noise = 0.01 * np.random.default_rng(1).normal(size=(200, 1))
    assert np.abs(np.diff(evaluation.one_euro(noise, 30.0), axis=0)).mean() < 0.45 * np.abs(np.diff(noise, axis=0)).mean()


# ---- eval: lifting a video

KP_MODELS = [dict(), dict(flip_test=True, normalise="width"), dict(method="glagcn", filter_widths=(3, 3)),
             dict(method="glagcn", filter_widths=(5,), flip_test=True, normalise="longest"),
             dict(method="glagcn", filter_widths=(3,), causal=True)]


@pytest.mark.parametrize("fields", KP_MODELS, ids=str)
def test_lift_is_the_models_output_for_each_window_and_lifter_gives_the_same(fields):
    model, size = _ev_shake(evaluation.build_model(_ev_recipe(**fields))), (1920, 1080)
    T, causal, flips = model.receptive_field, getattr(model, "causal", False), model.recipe.flip_test
    for frames in (1, 2, 4, 5, 12):
        body = _kp_body(frames)
        if frames > 4:
            body[2, 3:5] = np.nan                                               # a gap that Lifter cannot see the end of:
            body[3, 3:5] = body[1, 3:5]                                         # the same either way
        pose_2d, _ = evaluation.prepare(body)
        x, y = pose_2d[..., 0], pose_2d[..., 1]
        scaled = (np.stack((x / 960 - 1, y / 960 - 1080 / 1920), -1) if model.recipe.normalise == "width" else
                  np.stack(((x - 960) / 960, (y - 540) / 960), -1))
        want = []
        for t in range(frames):
            first = t - (T - 1 if causal else T // 2)
            window = [min(max(s, 0), frames - 1) for s in range(first, first + T)]
            inputs = torch.tensor(scaled[window], dtype=torch.float32)[None]
            run = lambda inputs: model(inputs[:, 0] if T == 1 else inputs)
            with torch.no_grad():
                pose = run(inputs)
                if flips:
                    mirror = SKELETONS["h36m17"].mirror
                    other = run(inputs[..., mirror, :] * torch.tensor([-1.0, 1]))
                    pose = (pose + other[..., mirror, :] * torch.tensor([-1.0, 1, 1])) / 2
            want.append(pose[0].numpy())
        poses = evaluation.lift(model, body, size)
        assert poses.dtype == np.float32 and np.abs(poses - want).max() < 1e-5 and np.abs(want).max() > 1e-2
        lifter = evaluation.Lifter(model, size)
        assert lifter.delay == (0 if causal or T == 1 else T // 2)
        for repeat in range(2):                                                 # flush() makes it ready for another video
            given_out = [lifter(frame) for frame in body]
            assert [pose is None for pose in given_out] == [t < lifter.delay for t in range(frames)]
            given_out = [pose for pose in given_out if pose is not None] + list(lifter.flush())
            assert len(given_out) == frames and np.abs(np.array(given_out) - poses).max() < 1e-5
        assert len(lifter.flush()) == 0
    assert np.abs(evaluation.lift(model, body, size, flip=not flips) - poses).max() > 1e-5


def test_any_image_is_normalised_as_the_model_was_trained():
    body = _kp_body(size=(1000, 1000))
    for fields in (dict(), dict(normalise="longest")):
        model = _ev_shake(evaluation.build_model(_ev_recipe(**fields)))
        small = evaluation.lift(model, body, (1000, 1000))
        for factor, size in ((2, (2000, 2000)), (0.5, (500, 500)), (1, (1000, 400)), (3, (1200, 3000))):
            moved = (body - 500) * factor + np.array(size) / 2                  # the same picture about another image's centre
            assert np.abs(evaluation.lift(model, moved, size) - small).max() < 1e-4, size
        near = np.abs(evaluation.lift(model, body, (1000, 1002)) - small).max()
        assert near < 1e-6 if not fields else 1e-5 < near                       # release-500: Human3.6M's own sizes alike
    width = _ev_shake(evaluation.build_model(_ev_recipe(normalise="width")))
    tall = evaluation.lift(width, body * 2 + (0, 300), (2000, 2600))
    assert np.abs(tall - evaluation.lift(width, body, (1000, 1000))).max() < 1e-4


def test_root_trajectory_is_the_least_squares_solution(synthetic):
    rng = np.random.default_rng(0)
    poses, root = rng.normal(0, 0.4, (6, 17, 3)), rng.uniform((-1, -1, 3), (1, 1, 8), (6, 3))
    focal, centre = 1400.0, np.array((960.0, 540.0))
    points = poses + root[:, None]
    exact = focal * points[..., :2] / points[..., 2:] + centre
    assert evaluation.root_trajectory(exact, poses, focal, centre) == pytest.approx(root)
    noisy = exact + rng.normal(0, 5, exact.shape)
    got = evaluation.root_trajectory(noisy, poses, focal, centre)
    for t in range(6):
        A, b = [], []
        for (u, v), (x, y, z) in zip((noisy[t] - centre) / focal, poses[t]):
            A += [(1, 0, -u), (0, 1, -v)]
            b += [u * z - x, v * z - y]
        assert got[t] == pytest.approx(np.linalg.lstsq(np.array(A), np.array(b), rcond=None)[0])
    assert evaluation.root_trajectory(noisy, poses, 2 * focal, centre)[:, 2].mean() > 1.8 * got[:, 2].mean()
    store = FrameStore(synthetic, "release-500", SKELETONS["h36m17"])
    assert evaluation.root_error(store.pose_3d, store) < 0.08                   # metres, of about 5; what the lens bends
    straight = [dataclasses.replace(s, pose_2d=data.project(s.pose_3d + s.root[:, None], np.r_[s.intrinsics[:4], np.zeros(5)]))
                for s in synthetic[:8]]
    store = FrameStore(straight, "release-500", SKELETONS["h36m17"])
    assert evaluation.root_error(store.pose_3d, store) < 1e-4
    larger = 0.1 * store.root.norm(dim=1).mean().item()
    assert evaluation.root_error(1.1 * store.pose_3d, store) == pytest.approx(larger, rel=0.02)
    store = FrameStore(synthetic[:8], "longest", SKELETONS["h36m17"], cameras="random")    # their rays, not the recorded ones'
    assert evaluation.root_error(store.pose_3d, store) < 1e-4
    noisy = FrameStore(synthetic[:8], "longest", SKELETONS["h36m17"], noise=0.05)          # and the 2D that the model saw
    assert evaluation.root_error(noisy.pose_3d, noisy) > 2 * evaluation.root_error(store.pose_3d, store) + 0.1


# ---- eval: the lift and export commands, pictures

@pytest.fixture
def kp_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    _ev_save(_ev_shake(evaluation.build_model(_ev_recipe(method="glagcn"))), path)
    return path


def test_lift_command_writes_everyone_whole(kp_checkpoint, tmp_path, capsys):
    one, two = _kp_body(seed=1), _kp_body(9, seed=2) + 300
    entries = _kp_list(one, skip=(5,), track_id=3) + _kp_list(two, track_id=10) + _kp_list(one[:1], track_id=11)
    file, out = _kp_json(tmp_path / "k.json", entries), tmp_path / "deep" / "poses.npz"
    options = ["lift", str(kp_checkpoint), "--device", "cpu", "--keypoints", str(file), "--size", "1920", "1080"]
    lift = lambda *more: evaluation.main([*options, *map(str, more)])
    lift("--out", out)
    said, result = capsys.readouterr(), data.read_npz(out)
    assert "person 3: 12 frames; interpolated: 1 whole frames, 0 single joints" in said.out
    assert "diagonal, 2203 pixels, that is 47 degrees across" in said.out
    assert "21 poses" in said.out and "person 11 left out: one frame" in said.err
    assert result["person"].tolist() == ["3"] * 12 + ["10"] * 9 and result["frames"].tolist() == [*range(12), *range(9)]
    assert result["interpolated"].all(1).nonzero()[0].tolist() == [5] and result["interpolated"].sum() == 17
    model, gappy = evaluation.load_model(kp_checkpoint), one.copy()
    gappy[5] = np.nan
    for person, body in (("3", gappy), ("10", two)):
        poses, pose_2d = evaluation.lift(model, body, (1920, 1080)), evaluation.prepare(body)[0]
        mine = result["person"] == person
        assert result["poses"][mine] == pytest.approx(poses, abs=1e-6) and result["keypoints"][mine] == pytest.approx(pose_2d)
        assert result["root"][mine] == pytest.approx(evaluation.root_trajectory(pose_2d, poses, 2202.907, (960, 540)), rel=1e-4)
    assert tuple(result["joints"]) == SKELETONS["h36m17"].joints and np.array_equal(result["edges"], gridconv.H36M_EDGES)
    assert all(str(name) in str(result["source"]) for name in (kp_checkpoint, file))
    assert set(result["focal"]) == {math.hypot(1920, 1080)} and result["size"].tolist() == [[1920, 1080]] * 21
    lift("--out", tmp_path / "p.json", "--person", "10", "--focal", 1500, "--smooth", "--fps", "50", "--benchmark")
    said, smooth = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "smoothed" in said and "frames a second" in said and "diagonal" not in said and smooth["person"] == ["10"] * 9
    assert smooth["poses"][3][4][1] == round(smooth["poses"][3][4][1], 4)
    filtered = evaluation.one_euro(evaluation.prepare(two)[0] / 960, 50.0) * 960
    assert np.array(smooth["keypoints"]) == pytest.approx(filtered, abs=1e-2)
    assert np.array(smooth["poses"]) == pytest.approx(evaluation.lift(model, filtered, (1920, 1080), "h36m"), abs=2e-4)
    assert smooth["focal"] == [1500.0] * 9 and smooth["fps"] == 50 and smooth["interpolated"][0] == [False] * 17
    np.save(tmp_path / "k.npy", one)
    lift("--keypoints", tmp_path / "k.npy", "--size", 300, 200, "--out", out)
    assert "100% of the joints lie more than half an image outside 300 x 200" in capsys.readouterr().err


BODY = _kp_body(3)
KP_BAD = [
    ([], (), "k.json: no person in it"), ({"annotations": []}, (), "no person in it"), ({}, (), "no person in it"),
    (7, (), "entry 0: "),
    ({"a": 1}, (), "no 'instance_info'"), ("text", (), "entry 0"), ([3], (), "entry 0: .*int"),
    ([{"image_id": 0, "score": 0.5}], (), "entry 0: no keypoints, only image_id, score"),
    ([{"image_id": 0, "keypoints": [0.5] * 17}], (), "17 numbers, not x, y and score"),
    (_kp_list(BODY) + [{"image_id": "no number", "keypoints": [1] * 51}], (), "entry 3"),
    ([{**entry, "image_id": f"img{t}_cam3.jpg"} for t, entry in enumerate(_kp_list(BODY))], (),
     "entry 1: image_id 'img1_cam3.jpg' and 'img0_cam3.jpg' are both frame 3"),
    ([{"image_id": "first.jpg", "keypoints": [1] * 51}], (), "entry 0: image_id 'first.jpg' has no number"),
    (_kp_list(BODY, track_id={"a": 1}), (), "entry 0: a person's id is {'a': 1}; expected a number or a word"),
    (_kp_list(BODY, track_id=[]), (), r"entry 0: a person's id is \[\]; expected a number or a word"),
    (_kp_list(BODY, track_id=10 ** 400), (), "entry 0: a person's id has 401 characters; expected at most 100"),
    (_kp_list(BODY, track_id=1e300), (), "entry 0: a person's id has 301 characters; expected at most 100"),
    (_kp_list(np.full((3, 17, 2), 1e7)), (), "no joint has a score above 0 and a position within a million pixels"),
    (_kp_list(BODY) + [{"image_id": 0, "keypoints": [1] * 30}], (), "several sizes"),
    ([{"image_id": 0, "keypoints": [1.0] * 30}, {"image_id": 1, "keypoints": [1.0] * 30}], (), "10 joints are no known layout"),
    ([{"image_id": i, "keypoints": [1] * 51} for i in (0, 1, 10 ** 9)], (), "do not number a video's frames"),
    ({"images": [{"width": 1}], "annotations": []}, (), "no 'id'"),
    ({"images": [{"id": 1, "width": 9, "height": 9}, {"id": 2, "width": 8, "height": 9}], "annotations": []}, (), "several sizes"),
    (_kp_list(BODY)[:1], (), "one frame, where the model looks at 3"),
    (_kp_list(np.concatenate((BODY, 0 * BODY[..., :1]), 2)), (), "no joint has a score"),
    (_kp_list(BODY / 1920), (), "expected pixels"), (_kp_list(BODY), ("--size", "0", "480"), "size 0 x 480: .*1 to a million"),
    (_kp_list(BODY), ("--size", "nan", "480"), "size nan"),
    (_kp_list(BODY), ("--person", "8"), "--person 8: not in .*; it has 0"),
    (_kp_list(BODY), ("--out", "p.txt"), "--out p.txt"), (_kp_list(BODY), ("--plot", "a.jpg"), "--plot a.jpg"),
    (_kp_list(BODY), ("--fps", "0"), "--fps 0"), (_kp_list(BODY), ("--focal", "-3"), "--focal -3"),
    (_kp_list(BODY), ("--focal", "1e-300"), "--focal 1e-300: must be a number from 1 to a million"),
    (_kp_list(BODY), ("--keypoints", "nowhere.json"), "nowhere.json"),
    (_kp_list(BODY), ("--keypoints", "video.mp4"), "not from .mp4"),
    (_kp_list(BODY), ("--joints", "mpii"), "mpii")]


@pytest.mark.parametrize("content, options, said", KP_BAD, ids=[said for *_, said in KP_BAD])
def test_lift_command_bad_input_is_one_line(content, options, said, kp_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = _kp_json(tmp_path / "k.json", content)
    with pytest.raises((InputError, OSError), match=said) as caught:
        evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(file), "--size", "1920", "1080", *options])
    assert "\n" not in str(caught.value) and not (tmp_path / "poses.npz").exists()


def test_a_persons_id_is_printed_in_one_line(kp_checkpoint, tmp_path, capsys):
    entries = _kp_list(BODY, track_id="Ann\n\tBee") + _kp_list(BODY + 300, track_id=[[7.0]])
    evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(_kp_json(tmp_path / "k.json", entries)),
                     "--size", "1920", "1080", "--out", str(tmp_path / "p.npz")])
    assert "person Ann Bee: 3 frames; interpolated: 0" in capsys.readouterr().out
    assert data.read_npz(tmp_path / "p.npz")["person"].tolist() == ["Ann Bee"] * 3 + ["7"] * 3


@pytest.mark.parametrize("change, said", [
    (lambda truth: truth.astype(">f8"), None), (lambda truth: truth.astype(str), "type <U32; expected numbers"),
    (lambda truth: truth.astype(complex), "type complex128"), (lambda truth: truth.astype(object), "type object"),
    (lambda truth: truth.astype("datetime64[s]"), "datetime64"), (lambda truth: truth[0], r"shape \(17, 3\)"),
    (lambda truth: truth * np.where(np.arange(3) == 1, np.nan, 1)[:, None, None], "frame 1: NaN"),
    (lambda truth: truth[:2], r"poses \(2, 17, 3\), lifted were \(3, 17, 3\)")])
def test_truth_is_numbers_or_nothing_is_written(change, said, kp_checkpoint, tmp_path, capsys):
    np.save(tmp_path / "k.npy", BODY)
    poses = evaluation.lift(evaluation.load_model(kp_checkpoint), BODY, (1920, 1080))
    np.save(tmp_path / "truth.npy", change(poses + np.float32([0.003, 0, 0.004])))
    run = lambda: evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(tmp_path / "k.npy"), "--size", "1920",
                                   "1080", "--out", str(tmp_path / "p.npz"), "--truth", str(tmp_path / "truth.npy")])
    if said is None:
        run()
        assert "MPJPE 5.0 mm" in capsys.readouterr().out
    else:
        with pytest.raises(InputError, match=f"truth.npy.*{said}"):
            run()
        assert not (tmp_path / "p.npz").exists()


def test_lift_command_more_bad_input(kp_checkpoint, tmp_path):
    def run(*arguments):
        done = subprocess.run([sys.executable, evaluation.__file__, "lift", *map(str, arguments)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
        return done.stderr

    broken = tmp_path / "broken.json"
    broken.write_text('[{"image_id": 0,\n "keypoints": [1, 2,, 3]}]')
    assert "broken.json: not JSON" in (said := run(kp_checkpoint, "--keypoints", broken)) and "line 2 column 21" in said
    lift = lambda path: evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(path), "--out", str(tmp_path / "o.npz")])
    broken.write_text("[" * 100000)
    scores, custom = tmp_path / "scores.npy", tmp_path / "data_2d_custom_x.npz"
    np.save(scores, BODY[..., 0])
    np.savez(custom, positions_2d=np.array({"a": {"custom": [BODY]}}, object), metadata=np.array({"layout_name": "coco"}, object))
    np.savez(tmp_path / "two.npz", a=BODY, b=BODY)
    np.save(tmp_path / "empty.npy", BODY[:0])
    for path, said in ((broken, "not JSON"), (scores, r"\(3, 17\) \(scores only"), (custom, "not as VideoPose3D"),
                       (tmp_path / "two.npz", r"found a \(3, 17, 2\), b"), (tmp_path / "empty.npy", "no person"),
                       (_kp_json(tmp_path / "k.json", _kp_list(BODY)), "give --size WIDTH HEIGHT")):
        with pytest.raises(InputError, match=said):
            lift(path)
    for fields, said in ((dict(skeleton="humaneva15", method="glagcn"), "humaneva15 joints"), (dict(target="uvd"), "target uvd")):
        other = tmp_path / "other.pt"
        _ev_save(evaluation.build_model(_ev_recipe(**fields)), other)
        with pytest.raises(InputError, match=said):
            evaluation.main(["lift", str(other), "--keypoints", str(tmp_path / "k.json"), "--size", "9", "9"])
    with pytest.raises(InputError, match=r"shape \(17, 2\)"):
        evaluation.lift(evaluation.load_model(kp_checkpoint), BODY[0], (9, 9))


@pytest.mark.parametrize("fields", [dict(layout="autogrids"), dict(method="glagcn")], ids=str)
def test_exported_models_are_the_originals_for_any_batch(fields, tmp_path, capsys, monkeypatch):
    model, path = _ev_shake(evaluation.build_model(_ev_recipe(**fields))), tmp_path / "model.pt2"
    _ev_save(model, tmp_path / "m.pt")
    evaluation.main(["export", str(tmp_path / "m.pt"), "--out", str(path)])
    assert "within" in capsys.readouterr().out
    about = {"poselift.json": ""}
    loaded = torch.export.load(path, extra_files=about).module()
    about = json.loads(about["poselift.json"])
    assert about["normalise"] == "release-500" and about["joints"][0] == "pelvis"
    for batch in (1, 3, 8):
        x = torch.randn(batch, *about["input"][1:])
        assert torch.allclose(loaded(x), model(x), atol=1e-5) and model(x).abs().max() > 1e-2
    with pytest.raises(InputError, match="ending in .pt2"):
        evaluation.main(["export", str(tmp_path / "m.pt"), "--out", "m.onnx"])


def test_an_export_to_a_full_disk_is_one_line(tmp_path):
    _ev_save(_ev_shake(evaluation.build_model(_ev_recipe())), tmp_path / "m.pt")
    kept = tmp_path / "kept.pt2"
    kept.write_text("what stood there")
    room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))      # writing more fails, as on a full disk
    done = subprocess.run([sys.executable, evaluation.__file__, "export", str(tmp_path / "m.pt"), "--out", str(kept)],
                          capture_output=True, text=True, preexec_fn=room, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {kept}: cannot be written (File too large)")
    assert kept.read_text() == "what stood there"


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    model = _ev_shake(evaluation.build_model(_ev_recipe()))
    wrong = SimpleNamespace(module=lambda: lambda x: model(x) + 1e-3)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: wrong)
    with pytest.raises(InputError, match="differs from the original by 0.001"):
        evaluation.export(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_pictures(kp_checkpoint, tmp_path, capsys, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    truth, strip, moving = tmp_path / "t.npy", tmp_path / "strip.png", tmp_path / "moving.gif"
    np.save(tmp_path / "k.npy", _kp_body(14))
    poses = evaluation.lift(evaluation.load_model(kp_checkpoint), _kp_body(14), (1920, 1080))
    np.save(truth, poses + np.float32([0.003, 0, 0.004]))
    evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(tmp_path / "k.npy"), "--size", "1920", "1080", "--out",
                     str(tmp_path / "p.npz"), "--plot", str(strip), str(moving), "--truth", str(truth), "--fps", "25"])
    assert "MPJPE 5.0 mm, P-MPJPE 0.0 mm" in capsys.readouterr().out
    assert Image.open(strip).size == (900, 470)
    with Image.open(moving) as gif:
        assert gif.n_frames == 7 and gif.info["duration"] == 80                # every second frame of 25 a second
    colours = {tuple(c) for c in np.asarray(Image.open(strip).convert("RGB")).reshape(-1, 3).tolist()}
    assert {(31, 119, 180), (255, 127, 14), (64, 64, 64)} <= colours            # left, right, trunk
    evaluation.plot_poses(strip, evaluation.prepare(_kp_body(1))[0], poses[:1])
    assert Image.open(strip).size == (150, 470)
    np.save(truth, poses[:5])
    with pytest.raises(InputError, match=r"poses \(5, 17, 3\), lifted were \(14, 17, 3\)"):
        evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(tmp_path / "k.npy"), "--size", "1920", "1080", "--out",
                         str(tmp_path / "p.npz"), "--truth", str(truth)])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        evaluation.plot_poses(strip, _kp_body(1), poses[:1])


def test_a_video_looked_at_every_second_frame_keeps_its_time(kp_checkpoint, tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    entries = [{**entry, "image_id": 10 + 2 * entry["image_id"]} for entry in _kp_list(_kp_body(8), skip=(3,))]
    _kp_json(tmp_path / "k.json", entries)
    titles, plain = [], evaluation._figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_figure", lambda **options: titles.append(plain(**options)) or titles[-1])
        evaluation.main(["lift", str(kp_checkpoint), "--keypoints", str(tmp_path / "k.json"), "--size", "1920", "1080", "--out",
                         str(tmp_path / "p.npz"), "--plot", str(tmp_path / "a.gif"), str(tmp_path / "a.png"), "--fps", "20",
                         "--smooth"])
    assert "8 frames, one in 2 of the video, smoothed; interpolated: 1 whole" in capsys.readouterr().out
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 8 and gif.info["duration"] == 100                # ten of the video's twenty frames a second
    assert [ax.get_title() for ax in titles[1].axes[:6]] == [f"frame {10 + 2 * t}" for t in (0, 1, 3, 4, 6, 7)]
    with np.load(tmp_path / "p.npz") as out:
        assert out["frames"].tolist() == list(range(10, 26, 2)) and out["fps"] == 20
        clean = evaluation.prepare(evaluation.read_keypoints(tmp_path / "k.json")[0].keypoints, "coco")[0]
        np.testing.assert_allclose(out["keypoints"], evaluation.one_euro(clean / 960, 10.0) * 960, rtol=1e-6)


def test_an_animation_of_sparse_frames_shows_each_as_long_as_a_gif_can(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    evaluation.plot_poses(tmp_path / "a.gif", evaluation.prepare(_kp_body(2))[0], np.ones((2, 17, 3)), fps=0.001)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 655350                                   # a 16-bit count of hundredths of a second


def test_equal_axes_and_one_scale():
    pytest.importorskip("matplotlib")
    kept, original = [], evaluation._figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_figure", lambda **options: kept.append(original(**options)) or kept[-1])
        patch.setattr(data, "write_atomically", lambda *_: None)
        pose_2d, poses = evaluation.prepare(_kp_body(30))[0], np.random.default_rng(0).normal(0, 0.4, (30, 17, 3))
        evaluation.plot_poses("a.png", pose_2d, poses, columns=3)
        evaluation.plot_poses("a.png", pose_2d, poses, poses + 1, columns=1)
    dashed = [[line.get_xydata().mean() for line in ax.lines if line.get_linestyle() == "--"] for ax in kept[1].axes]
    solid = [line.get_xydata().mean() for line in kept[1].axes[1].lines if line.get_linestyle() == "-"]
    assert [len(lines) for lines in dashed] == [0, 16, 16] and np.subtract(dashed[1], solid) == pytest.approx(np.ones(16))
    axes = np.array(kept[0].axes).reshape(3, 3)
    for row in axes:
        assert {ax.get_aspect() for ax in row} == {1.0} and len({(*ax.get_xlim(), *ax.get_ylim()) for ax in row}) == 1
        left, right = row[0].get_xlim()
        bottom, top = row[0].get_ylim()
        assert right == -left == bottom == -top                                 # square, about the root, y downwards
    for column, t in zip(axes.T, (0, 14, 29)):
        for ax, points in zip(column, ((pose_2d - pose_2d[:, :1]), poses[..., [0, 1]], poses[..., [2, 1]])):
            for line, (parent, child) in zip(ax.lines, SKELETONS["h36m17"].edges):
                assert line.get_xydata() == pytest.approx(points[t, [parent, child]])
                side = SKELETONS["h36m17"].joints[child].split("_")[0]
                assert line.get_color() == {"left": "tab:blue", "right": "tab:orange"}.get(side, "0.25")


def test_a_runs_curves_are_drawn_and_reported(run_folder, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    train.train(tiny_recipe(epochs=2.0, eval_every=2), out=tmp_path / "runs" / "one", quiet=False)
    with Image.open(tmp_path / "runs" / "one" / "curves.png") as picture:
        assert picture.size == (720, 270)
    train.write_report(tmp_path / "runs")
    assert "(one/curves.png)" in (tmp_path / "runs" / "report.md").read_text()


def test_lifter_goes_on_where_nobody_is_seen():
    model = _ev_shake(evaluation.build_model(_ev_recipe()))
    model.recipe = _ev_recipe()
    keypoints = 500 + 100 * np.random.default_rng(0).random((6, 17, 3))
    keypoints[..., 2] = 1
    keypoints[3] = 0
    keypoints[4] = np.nan
    lifter = evaluation.Lifter(model, (1000, 1000), "h36m")
    assert lifter(np.zeros((17, 3))) is None                                     # nobody yet
    poses = [lifter(frame) for frame in keypoints]
    assert np.array_equal(poses[3], poses[2]) and np.array_equal(poses[4], poses[2]) and not np.array_equal(poses[5], poses[2])


def test_lifter_gives_no_pose_before_every_joint_was_seen():
    model, size, body = _ev_shake(evaluation.build_model(_ev_recipe())), (1920, 1080), _kp_body(8)
    late = body.copy()
    late[0, [15, 16]] = np.nan                                                  # one ankle comes in frame 1, the other in 2
    late[1, 16], late[2, 15] = 0, 0
    for joints in ("coco", None):
        lifter = evaluation.Lifter(model, size, joints)
        poses = [lifter(frame) for frame in late]
        told = 2 if joints else 3                                               # by the first whole frame, where not given
        assert [pose is None for pose in poses] == [t < told for t in range(8)]
        held = body.copy()
        held[2, 15] = body[1, 15]
        assert np.abs(np.array(poses[told:]) - evaluation.lift(model, held, size)[told:]).max() < 1e-5
    unclear = body[[0] * 8]
    unclear[:, 4] += 70                                                         # unclear: see the test of layouts
    assert [evaluation.Lifter(model, size)(frame) for frame in unclear] == [None] * 8
    with pytest.raises(InputError, match="expected pixels"):
        evaluation.Lifter(model, size)(body[0] / 1920)
    assert evaluation.Lifter(model, size)(np.ones((26, 3)) * (np.arange(26) > 16)[:, None] * 50) is None  # feet alone


def test_joints_that_cannot_be_where_they_are_said_to_be_are_missing():
    model, size, body = _ev_shake(evaluation.build_model(_ev_recipe())), (1920, 1080), _kp_body(6)
    far, gaps = body.copy(), body.copy()
    far[2, 9], far[3, 9], gaps[2:4, 9] = (1e7, 300), (300, -np.inf), np.nan
    assert np.array_equal(evaluation.prepare(far)[0], evaluation.prepare(gaps)[0])
    assert evaluation.prepare(far)[1].sum() == 2 and evaluation.tell_joints(far[2:4]) is None
    lifters = evaluation.Lifter(model, size, "coco"), evaluation.Lifter(model, size, "coco")
    for a, b in zip(far, gaps):
        assert np.array_equal(lifters[0](a), lifters[1](b))
    corner = np.full((17, 2), np.nan)
    corner[9] = 1.5, 1.2                                                        # in pixels, as all before were
    assert np.abs(lifters[0](corner) - lifters[1](body[5])).max() > 1e-5
    corner[9] = 1e7
    assert np.array_equal(lifters[1](corner), lifters[1](np.full((17, 2), np.nan)))


def test_a_recipe_of_lists_within_lists_is_refused(tmp_path):
    bomb = ["circular", "replicate"]
    for _ in range(60):
        bomb = [bomb, bomb]
    _ev_save(evaluation.build_model(_ev_recipe()), tmp_path / "m.pt")
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    content["recipe"]["padding"] = bomb
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(InputError, match="m.pt: weights and recipe do not fit"):
        evaluation.load_model(tmp_path / "m.pt")


def test_large_track_numbers_and_other_things_than_people(tmp_path):
    person = dict(category_id=1, keypoints=[100.0 + i for i in range(51)])
    entries = [dict(person, image_id=frame, track_id=17000000001 + k, score=None) for frame in range(3) for k in (0, 1)]
    images = [dict(id=frame, width=640, height=480) for frame in range(3)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [*entries, dict(image_id=0, category_id=18)]}))
    tracks = evaluation.read_keypoints(tmp_path / "a.json")
    assert [track.person for track in tracks] == ["17000000001", "17000000002"] and all(len(t.keypoints) == 3 for t in tracks)
    for wide in (None, "x", [1]):
        images[0]["width"] = wide
        (tmp_path / "b.json").write_text(json.dumps({"images": images, "annotations": entries}))
        if wide is not None:
            with pytest.raises(InputError, match="b.json"):
                evaluation.read_keypoints(tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------------------------------
# train.py


def tiny_recipe(**fields):
    """A recipe on procedural motion that trains in a second."""
    base = dict(name="tiny", data="synthetic", layout="handcrafted", hidden=4, blocks=1, dropout=0.1, loss="mpjpe", lr=3e-3,
                schedule="cosine-smooth", epochs=0.02, batch=64)
    return train.Recipe(**{**base, **fields})


TINY_GLA = dict(method="glagcn", normalise="width", filter_widths=(3,), channels=4, batch=32, optimizer="ranger", epochs=0.005,
                flips=True, norm_schedule=True)


@pytest.fixture
def run_folder(monkeypatch, tmp_path):
    """An empty folder, and procedural motion cut to short clips: the same generator, less of it."""
    whole = data.synthesize
    monkeypatch.setattr(data, "synthesize", lambda seed, **options: whole(seed, **{"frames": 20, **options}))
    return tmp_path


def test_ranger_follows_the_releases_trajectory():
    """Minimising sum p^4 from (1, -2, 3) with lr 0.01: the release's path, across two Lookahead steps."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = train.ranger([p], lr=0.01)
    path = []
    for _ in range(12):
        optimizer.zero_grad()
        (p ** 4).sum().backward()
        optimizer.step()
        path.append(p.detach().clone())
    want = {0: (0.95999998, -1.67999995, 1.91999996), 4: (0.82198018, -0.9098438, 0.17329334),
            5: (0.91086566, -1.45482609, 1.58658506), 6: (0.91054839, -1.45457458, 1.5864253),
            10: (0.90873635, -1.45306325, 1.58546937), 11: (0.90951741, -1.45370053, 1.58587147)}
    for step, point in want.items():
        torch.testing.assert_close(path[step], torch.tensor(point, dtype=torch.float64), atol=1e-5, rtol=0)
    q = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = train.ranger([q], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = (q ** 4).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert torch.equal(p, q) and losses[0] == 98.0  # as torch's optimisers take one


def test_ranger_state_goes_out_and_back():
    def steps(p, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            (p ** 4).sum().backward()
            optimizer.step()
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = train.ranger([p], 0.01)
    steps(p, optimizer, 9)
    q = torch.nn.Parameter(p.detach().clone())
    other = train.ranger([q], 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(p, optimizer, 9)
    steps(q, other, 9)
    assert torch.equal(p, q)


def test_schedules_by_their_definitions():
    recipe = train.Recipe(lr=1e-3, schedule="0.96/1", epochs=100.0)
    assert train.learning_rate(recipe, 7.9) == pytest.approx(1e-3 * 0.96 ** 7)
    recipe = dataclasses.replace(recipe, schedule="0.96/10")
    assert [train.learning_rate(recipe, e) for e in (0, 9.99, 10, 25)] == pytest.approx([1e-3, 1e-3, 0.96e-3, 0.9216e-3])
    recipe = dataclasses.replace(recipe, schedule="cosine", lr=1e-2, epochs=80.0)
    assert [train.learning_rate(recipe, e) for e in (0, 0.5, 40, 80)] == pytest.approx([1e-2, 1e-2, 5.005e-3, 1e-5])
    recipe = dataclasses.replace(recipe, schedule="3dhp", lr=1.0)
    want, lr = [], 1.0
    for epoch in range(1, 12):
        want.append(lr)
        lr *= 0.5 if epoch % 5 == 0 else 0.95
    assert [train.learning_rate(recipe, e) for e in range(11)] == pytest.approx(want)
    assert [train.norm_momentum(e, 80) for e in (0, 80)] == pytest.approx([0.1, 0.001])
    with pytest.raises(data.InputError, match="schedule"):
        train.learning_rate(dataclasses.replace(recipe, schedule="linear"), 0)


def test_published_settings():
    """facts about every published row's settings, spelled out once more."""
    for name, recipe in train.RECIPES.items():
        assert name == recipe.name and recipe.row
        if recipe.method == "gridconv" and recipe.data == "h36m":
            assert (recipe.epochs, recipe.batch, recipe.lr, recipe.optimizer, recipe.dropout, recipe.temperature) == \
                (100, 200, 1e-3, "adam", 0.25, 30), name
            assert recipe.normalise == "release-500" and recipe.skip == "gridconv" and not recipe.flips
            assert recipe.padding == (("circular", "zeros") if recipe.keypoints == "hrnet" else ("circular", "replicate"))
            learnt = recipe.layout == "autogrids"
            assert recipe.schedule == ("0.96/10" if learnt else "0.96/1") and recipe.loss == ("mse" if learnt else "grid")
            assert recipe.noise_epochs == 30 and recipe.hidden == 256 and recipe.blocks == 2
        if recipe.method == "glagcn" and recipe.data in ("h36m", "humaneva"):
            h36m = recipe.data == "h36m"
            assert (recipe.epochs, recipe.batch) == ((80, 512) if h36m else (1000, 256)), name
            assert (recipe.optimizer, recipe.lr, recipe.schedule, recipe.loss) == ("ranger", 1e-2, "cosine", "mpjpe")
            assert recipe.flips and recipe.flip_test and recipe.norm_schedule and not recipe.jitter and recipe.dropout == 0.1
            assert recipe.normalise == "width"
            assert (recipe.unshared_weight, recipe.stage_one_epochs) == ((0.5, 60) if recipe.reconstruct else (0, 0))
    paper = {r.name: (r.paper_mpjpe, r.paper_p_mpjpe) for r in train.RECIPES.values()}
    assert paper["gridconv-gt"][0] == 37.1 and paper["gridconv-gt-learnable"][0] == 36.4
    assert paper["gridconv-hrnet"] == (47.9, 37.9) and paper["gridconv-hrnet-learnable"] == (47.6, 37.4)
    assert paper["gridconv-gt-uvd"][0] == 29.5 and paper["gridconv-hrnet-uvd"] == (46.3, 37.6)
    assert paper["glagcn-gt-243"] == (28.5, 22.0) and paper["glagcn-cpn-243"] == (44.4, 34.8)
    assert paper["glagcn-gt-243-reconstruct-512"] == (21.0, 17.6) and paper["glagcn-gt-27"][0] == 34.4


def test_parameters_of_table_5_of_glagcn():
    millions = lambda name: round(train.parameters(train.RECIPES[name]) / 1e6, 2)
    assert [millions("glagcn-gt-" + name) for name in ("27", "81", "243", "243-reconstruct", "243-reconstruct-512")] == \
        [0.84, 1.10, 1.35, 1.88, 48.64]


def test_an_epoch_holds_every_sample_once_and_depends_on_seed_and_epoch_alone():
    plain, flips = tiny_recipe(), tiny_recipe(flips=True)
    assert sorted(train.epoch_order(plain, 50, 3).tolist()) == list(range(50))
    assert sorted(train.epoch_order(flips, 50, 3).tolist()) == list(range(100))
    assert torch.equal(train.epoch_order(plain, 50, 3), train.epoch_order(plain, 50, 3))
    others = [train.epoch_order(plain, 50, 4), train.epoch_order(dataclasses.replace(plain, seed=1), 50, 3)]
    assert not any(torch.equal(train.epoch_order(plain, 50, 3), other) for other in others)


@given(st.integers(1, 60), st.integers(2, 20))
def test_batches_cover_everything_and_none_holds_one_sample(samples, size):
    parts = train.batches(torch.arange(samples), size)
    assert torch.equal(torch.cat(parts), torch.arange(samples))
    assert all(len(part) == size for part in parts[:-2]) and all(2 <= len(part) <= size + 1 for part in parts) or samples == 1


def make_run(run_folder, **fields):
    recipe = tiny_recipe(**fields)
    store = data.FrameStore(data.load_dataset(recipe, "", "train"), recipe.normalise, data.SKELETONS["h36m17"])
    run = train.Run(recipe, store, run_folder, torch.device("cpu"))
    run.trained_on = "test"
    return run


def test_losses_by_their_definitions(run_folder):
    index = torch.arange(5)
    run = make_run(run_folder, loss="grid", layout="released", dropout=0.0)
    store, net = run.store, run.model.eval()
    pose, target = store.batch(index)
    S = gridconv.assignment_matrix(gridconv.RELEASED_5X5, 17)
    error = net.forward_grid(gridconv.sgt(pose, S, (5, 5))) - gridconv.sgt(target, S, (5, 5))
    torch.testing.assert_close(train.batch_loss(net, store, index, None, run.recipe)[0], (error ** 2).sum() / error.numel())
    error = net(pose) - target
    mse = dataclasses.replace(run.recipe, loss="mse")
    torch.testing.assert_close(train.batch_loss(net, store, index, None, mse)[0], (error ** 2).sum() / error.numel())
    mpjpe = dataclasses.replace(run.recipe, loss="mpjpe")
    torch.testing.assert_close(train.batch_loss(net, store, index, None, mpjpe)[0], (error ** 2).sum(-1).sqrt().mean())
    run = make_run(run_folder, **{**TINY_GLA, "reconstruct": True, "filter_widths": (3, 3), "dropout": 0.0})
    run.model.eval()
    window, targets = run.store.batch(index, 9, all_targets=True)
    local, sequence = run.model(window, return_sequence=True)
    want = (sequence - targets).norm(dim=-1).mean() + (local - targets[:, 4]).norm(dim=-1).mean()
    torch.testing.assert_close(train.batch_loss(run.model, run.store, index, None, run.recipe, stage_one=True)[0], want)


def test_jitter_is_one_of_nine_rotations_and_scales():
    torch.manual_seed(0)
    target = torch.randn(900, 4, 3)
    torch.manual_seed(1)
    out = train.jitter(target)
    assert torch.equal(out[..., 2], target[..., 2])
    ratio = torch.view_as_complex(out[..., :2].contiguous()) / torch.view_as_complex(target[..., :2].contiguous())
    assert (ratio - ratio[:, :1]).abs().max() < 1e-3  # one for each sample
    found = {(round(z.abs().item(), 2), round(math.degrees(z.angle().item()))) for z in ratio[:, 0]}
    assert found == {(s, a) for s in (0.95, 1.0, 1.05) for a in (-5, 0, 5)}
    torch.manual_seed(1)
    assert torch.equal(train.jitter(target.unflatten(1, (2, 2))).flatten(1, 2), out)  # of a sequence all frames alike


def test_jitter_moves_the_targets_of_both_stages(run_folder):
    index = torch.arange(40)
    for stage_one in (False, True):
        run = make_run(run_folder, **{**TINY_GLA, "reconstruct": True, "dropout": 0.0})
        run.model.eval()
        losses = {jitter: train.batch_loss(run.model, run.store, index, None, dataclasses.replace(run.recipe, jitter=jitter),
                                           stage_one)[0].item() for jitter in (False, True)}
        assert losses[False] != losses[True]


def test_micro_batches_give_the_same_step(run_folder):
    weights = []
    for micro in (0, 16):
        run = make_run(run_folder, micro_batch=micro, dropout=0.0, attention="", optimizer="adam")
        for norm in run.model.modules():  # batch statistics differ between micro-batches by nature
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 0.0
        run.begin_epoch(0)
        run.model.eval()
        run.train_step(torch.arange(56))
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_stage_two_leaves_the_sequence_head_alone(run_folder):
    run = make_run(run_folder, **{**TINY_GLA, "reconstruct": True, "epochs": 2.0, "stage_one_epochs": 1.0})
    head = [p.detach().clone() for p in run.model.sequence_head.parameters()]
    assert head
    run.begin_epoch(0)
    run.train_step(torch.arange(32))
    moved = [p.detach().clone() for p in run.model.sequence_head.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(head, moved))
    run.step = run.epoch_steps
    run.begin_epoch(1)
    run.train_step(torch.arange(32))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(moved, run.model.sequence_head.parameters()))
    assert not any(p.requires_grad for p in run.model.sequence_head.parameters())  # several processes would wait for it
    assert all(p.requires_grad for name, p in run.model.named_parameters() if "sequence_head" not in name)


def test_norm_momentum_reaches_all_but_shortcut_norms(run_folder):
    run = make_run(run_folder, **{**TINY_GLA, "epochs": 80.0})
    run.begin_epoch(40)
    momenta = [m.momentum for m in run.model.modules() if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    assert sum(m == pytest.approx(0.01) for m in momenta) == len(momenta) - 2  # the expanding block's two shortcuts keep 0.1
    assert sum(m == 0.1 for m in momenta) == 2


def test_noise_ends_after_its_epochs(run_folder):
    run = make_run(run_folder, layout="autogrids", noise_epochs=30.5, epochs=100.0)
    for epoch, noise in ((0, True), (29, True), (30, True), (30.49, True), (30.5, False), (99, False)):
        run.reach(epoch)
        assert run.model.autogrids.noise is noise


@pytest.mark.parametrize("fields, told", [
    ({**TINY_GLA, "epochs": 0.1, "reconstruct": True, "stage_one_epochs": 0.075}, lambda model, *rest: rest[-1]),
    ({"layout": "autogrids", "epochs": 0.2, "noise_epochs": 0.15}, lambda model, *rest: model.autogrids.noise)],
    ids=["stages", "noise"])
def test_stages_and_noise_change_within_an_epoch(fields, told, run_folder, monkeypatch):
    seen, real = [], train.batch_loss
    monkeypatch.setattr(train, "batch_loss", lambda *arguments: seen.append(bool(told(*arguments))) or real(*arguments))
    train.train(tiny_recipe(**fields), out=run_folder / "run", quiet=True)
    first = sum(seen)
    assert seen == [True] * first + [False] * (len(seen) - first)
    assert len(seen) >= 8 and abs(first - 0.75 * len(seen)) <= 1


def test_the_grid_has_a_learning_rate_of_its_own(run_folder):
    run = make_run(run_folder, layout="autogrids", grid_lr=0.0)
    before = run.model.autogrids.s_prob.detach().clone(), run.model.expand.conv.weight.detach().clone()
    run.begin_epoch(0)
    run.train_step(torch.arange(32))
    assert torch.equal(run.model.autogrids.s_prob, before[0]) and not torch.equal(run.model.expand.conv.weight, before[1])
    run = make_run(run_folder, layout="autogrids", grid_lr=5.0, schedule="1/1")
    run.begin_epoch(0)
    run.train_step(torch.arange(32))
    rates = {tuple(p.shape): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates.pop((25, 17)) == pytest.approx(1.5e-2) and set(rates.values()) == {3e-3}


def test_head_scale_multiplies_the_first_weights_of_the_head(run_folder):
    plain, small = (make_run(run_folder, **{**TINY_GLA, "head_scale": scale}).model for scale in (1.0, 0.1))
    torch.testing.assert_close(small.head.W_shared, plain.head.W_shared * 0.1)
    assert torch.equal(small.expand.temporal.weight, plain.expand.temporal.weight)


@pytest.mark.parametrize("fields", [dict(), dict(layout="autogrids"), TINY_GLA], ids=["gridconv", "autogrids", "glagcn"])
def test_training_is_reproducible_and_resumes_exactly(run_folder, fields, monkeypatch):
    recipe = tiny_recipe(**{**fields, "epochs": 2.0})
    few = lambda seed, **kw: [s for s in data_synthesize(seed, frames=8) if s.camera == "54138969"]
    data_synthesize = data.synthesize
    monkeypatch.setattr(data, "synthesize", few)
    whole = train.train(recipe, out=run_folder / "whole", quiet=True)
    stop_at = iter((3, 5, 10 ** 9))

    real, step = train.Run.train_step, [next(stop_at)]

    def interrupted(self, chunk):
        real(self, chunk)
        if self.step == step[0]:
            step[0] = next(stop_at)
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(train.Run, "train_step", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            train.train(recipe, out=run_folder / "parts", quiet=True)
        assert stopped.value.code == 143
    parts = train.train(recipe, out=run_folder / "parts", quiet=True)
    assert parts["last"] == whole["last"] and parts["best"] == whole["best"]
    for file in ("last.pt", "best.pt"):
        a, b = (data.read_torch(run_folder / run / file)["model"] for run in ("whole", "parts"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(run_folder / run / "log.csv"))]
            for run in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    again = train.train(recipe, out=run_folder / "whole", quiet=True)  # nothing left to do
    assert again["last"] == whole["last"]
    model = evaluation.load_model(run_folder / "whole" / "best.pt")
    assert model.recipe.name == "tiny"
    with pytest.raises(data.InputError, match="another recipe"):
        train.train(dataclasses.replace(recipe, lr=1e-4), out=run_folder / "whole", quiet=True)


def test_a_run_that_is_not_finite_stops_and_keeps_the_last_good_state(run_folder):
    recipe = tiny_recipe(epochs=1.0, lr=1e30, schedule="1/1", loss="mse", attention="")
    with pytest.raises(data.InputError, match=r"loss of step \d+ is (nan|inf)"):
        train.train(recipe, out=run_folder, quiet=True)
    assert not (run_folder / "last.pt").exists()


def test_a_folder_serves_one_run_at_a_time(run_folder):
    with train.locked(run_folder):
        with pytest.raises(train.Busy, match="another run"):
            train.train(tiny_recipe(), out=run_folder, quiet=True)
    (run_folder / "file").write_text("")
    with pytest.raises(data.InputError, match="--out"):
        train.train(tiny_recipe(), out=run_folder / "file" / "run", quiet=True)


def test_a_file_named_lock_keeps_its_content(run_folder):
    (run_folder / "notes").write_text("mine")
    (run_folder / "lock").symlink_to("notes")
    with train.locked(run_folder):
        pass
    assert (run_folder / "notes").read_text() == "mine"


def test_options_become_recipe_fields():
    assert train.parse_value("3,3:3,1", ()) == (3, (3, 3), 1)
    assert train.parse_value("circular,replicate:circular", ()) == ("circular", ("replicate", "circular"))
    assert train.parse_value("true", False) is True and train.parse_value("0.5", 1.0) == 0.5
    for text, default in (("x", 1), ("maybe", True)):
        with pytest.raises(data.InputError):
            train.parse_value(text, default)


def test_a_switch_of_a_recipe_needs_no_value():
    parser = data.Parser()
    train.add_recipe_options(parser)
    recipe = lambda *argv: train.with_options(train.Recipe(), parser.parse_args(argv))
    for field in (field.name for field in dataclasses.fields(train.Recipe) if field.default is False):
        option = "--" + field.replace("_", "-")
        given = [getattr(recipe(*argv), field) for argv in ((), (option,), (option, "true"), (option, "no"))]
        assert given == [False, True, True, False]
    with pytest.raises(InputError, match="--hidden: expected one argument"):
        recipe("--hidden")


@pytest.mark.parametrize("arguments, says", [
    (["nothing"], "nothing"), ([], "recipe"), (["gridconv-mocap"], "data"), (["gridconv-gt", "--data", "nowhere"], "nowhere"),
    (["gridconv-synthetic", "--epochs", "x"], "--epochs"), (["gridconv-synthetic", "--padding", "mirror"], "mirror"),
    (["gridconv-synthetic", "--layout", "spiral"], "spiral"), (["glagcn-synthetic", "--filter-widths", "3,2"], "2"),
    (["glagcn-synthetic", "--unshared-weight", "1.5"], "1.5"), (["ablate", "table-9"], "table-9"), (["report", "none"], "none"),
    (["gridconv-synthetic", "--out", "/proc/none"], "/proc/none"), (["gridconv-synthetic", "--grid", "4,4"], "4 x 4"),
    (["gridconv-synthetic", "--device", "abacus"], "abacus"), (["gridconv-synthetic", "--device", "meta"], "--device meta"),
    (["gridconv-synthetic", "--device", "hpu"], "--device hpu"), (["gridconv-synthetic", "--out", ""], "--out: empty"),
    (["gridconv-synthetic", "--data", ""], "--data: empty"), (["gridconv-synthetic", "--batch", "1"], "batch"),
    (["gridconv-synthetic", "--epochs", "-1"], "epochs"), (["gridconv-synthetic", "--loss", "l3"], "l3"),
    (["gridconv-synthetic", "--schedule", "linear"], "linear"), (["glagcn-synthetic", "--loss", "grid"], "grid"),
    (["glagcn-synthetic", "--causal", "true", "--reconstruct", "true"], "causal"),
    (["gridconv-synthetic", "--kernel-sizes", "3,3,3"], "kernel_sizes"), (["gridconv-synthetic", "--grid", "5"], "grid"),
    (["gridconv-synthetic", "--epochs", "nan"], "epochs"), (["gridconv-synthetic", "--schedule", "0.96/0"], "schedule"),
    (["gridconv-synthetic", "--skeleton", "robot"], "robot"), (["gridconv-synthetic", "--reconstruct", "true"], "reconstruct"),
    (["ablate", "gridconv-5", "--minutes", "-1"], "--minutes"), (["gridconv-synthetic", "--hidden", "0"], "hidden"),
    (["gridconv-synthetic", "--grid", "²,5"], "grid: ('²', 5)"), (["glagcn-synthetic", "--stage-one-epochs", "9"], "stage_one_epochs: 9"),
    (["glagcn-synthetic", "--skeleton", "3dhp17"], "joints of 3dhp17"), (["glagcn-humaneva-gt", "--refine"], "humaneva gives no"),
    (["gridconv-3dhp-cross", "--noise", "5"], "noise: 5")])
def test_bad_commands_end_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        data.run(functools.partial(train.main, arguments))
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1 and says in told
    assert not list(tmp_path.rglob("*.pt"))


def test_a_bad_command_from_the_shell(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "train.py"), "nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = capsys.readouterr().out
    assert "of the attention's sigmoid" in told and "largest gradient norm" in told


def test_without_git_a_run_ends_well(run_folder, monkeypatch):
    monkeypatch.setenv("PATH", str(run_folder))
    assert train.train(tiny_recipe(), out=run_folder, quiet=True)["commit"] == ""


def test_a_run_continues_on_its_own_data_only(run_folder, monkeypatch):
    recipe, whole = tiny_recipe(), data.synthesize
    train.train(recipe, out=run_folder, quiet=True)
    monkeypatch.setattr(data, "synthesize", lambda seed, **options: whole(seed + 1, **options))
    with pytest.raises(data.InputError, match="other data"):
        train.train(recipe, out=run_folder, quiet=True)
    torch.save([1], run_folder / "last.pt")
    with pytest.raises(data.InputError, match="not the state of a run"):
        train.train(recipe, out=run_folder, quiet=True)


def test_an_annealed_temperature_stays_with_the_weights(run_folder):
    recipe = tiny_recipe(epochs=0.5, anneal_epochs=1.0)
    first = train.train(recipe, out=run_folder, quiet=True)
    model = evaluation.load_model(run_folder / "best.pt")
    assert 1 < model.temperature < 30
    store = train.make_store(recipe, "", "test", torch.device("cpu"))
    assert evaluation.evaluate(model, store)["mpjpe"] == pytest.approx(first["last"]["mpjpe"], rel=1e-6)
    (run_folder / "result.json").unlink()
    assert train.train(recipe, out=run_folder, quiet=True)["last"] == first["last"]


def test_report_of_several_runs(run_folder):
    for name in ("a", "b"):
        train.train(tiny_recipe(name=name), out=run_folder / name, quiet=True)
    text = train.write_report(run_folder)
    result = json.loads((run_folder / "a" / "result.json").read_text())
    assert f"{result['last']['pooled']['mpjpe']:.2f}" in text and f"{result['yardsticks']['affine']:.2f}" in text
    assert "not Human3.6M" in text and (run_folder / "report.md").read_text().count("\n## ") == 2
    assert len(json.loads((run_folder / "report.json").read_text())) == 2
    (run_folder / "b" / "result.json").write_text("{")
    with pytest.raises(data.InputError, match="b/result.json"):
        train.write_report(run_folder)


def test_ablation_runs_every_row_with_every_seed_and_continues(run_folder, monkeypatch):
    rows = {"one": (38.1, dict(layout="random")), "two": (None, dict(layout="autogrids", noise_epochs=0.5))}
    monkeypatch.setitem(train.ABLATIONS, "tiny", ("gridconv-synthetic", "P1*, Table 5", rows))
    monkeypatch.setattr(train, "step_seconds", lambda *arguments: (1.0, 6000))
    small = lambda recipe: dataclasses.replace(recipe, hidden=4, blocks=1)
    text = train.ablate("tiny", "", run_folder / "t", minutes=1, seeds=2, base_options=small)
    results = {p.parent.name: json.loads(p.read_text()) for p in (run_folder / "t").glob("*/result.json")}
    assert set(results) == {f"{row}-seed-{seed}" for row in ("one", "two") for seed in (0, 1)}
    assert all(r["recipe"]["epochs"] == 0.01 and r["recipe"]["layout_seed"] == r["seed"] for r in results.values())
    assert results["two-seed-1"]["recipe"]["noise_epochs"] == 0.005
    scores = [results[f"one-seed-{seed}"]["last"]["pooled"]["mpjpe"] for seed in (0, 1)]
    assert f"{sum(scores) / 2:.2f}" in text and f"{abs(scores[0] - scores[1]):.2f}" in text and "38.10" in text
    assert train.ablate("tiny", "", run_folder / "t", minutes=1, seeds=2, base_options=small) == text
    with pytest.raises(data.InputError, match="planned for"):
        train.ablate("tiny", "", run_folder / "t", minutes=2, seeds=2, base_options=small)
    alone = train.ablate("tiny", "", run_folder / "t", minutes=1, seeds=1, base_options=small, only="two")
    assert "two" in alone and "one" not in alone.split("| two")[0].split("\n\n")[1]
    with pytest.raises(data.InputError, match="--only 'two;three': expected some of 'one;two'"):
        train.ablate("tiny", "", run_folder / "t", minutes=1, seeds=1, base_options=small, only="two;three")
    other, real = json.dumps({"minutes": 1, "epochs": {"one": 0.02, "two": 0.02}}), train.step_seconds
    (run_folder / "u").mkdir()
    monkeypatch.setattr(train, "step_seconds", lambda *rest: ((run_folder / "u" / "epochs.json").write_text(other), real(*rest))[1])
    train.ablate("tiny", "", run_folder / "u", minutes=1, seeds=1, base_options=small)  # another process has timed meanwhile
    assert json.loads((run_folder / "u" / "one-seed-0" / "result.json").read_text())["recipe"]["epochs"] == 0.02
    for broken in ("[]", "{}", '{"minutes": 1, "epochs": {"other": 1}}', '{"minutes": 1, "epochs": {"one": "x", "two": 1}}'):
        (run_folder / "t" / "epochs.json").write_text(broken)
        with pytest.raises(data.InputError, match="epochs.json: planned for other runs"):
            train.ablate("tiny", "", run_folder / "t", minutes=1, seeds=1, base_options=small)


def test_every_ablation_is_of_possible_recipes_and_the_papers_figures():
    for table, (base, paper_is, rows) in train.ABLATIONS.items():
        for label, (_, fields) in rows.items():
            recipe = dataclasses.replace(train.RECIPES[base], epochs=4.0, **{**fields, "noise_epochs": 0.0})
            train.check_recipe(dataclasses.replace(recipe, stage_one_epochs=3.0 * recipe.reconstruct))
            evaluation.build_model(dataclasses.replace(recipe, hidden=4, channels=4))
    papers = {table: [paper for paper, _ in rows.values()] for table, (_, _, rows) in train.ABLATIONS.items()}
    assert papers["gridconv-6"] == [37.1, 36.4, 35.0, 33.4] and papers["glagcn-6"] == [28.0, 30.6, 27.7, 28.1, 25.8]
    assert papers["gridconv-D"] == [40.8, 42.3, 41.1, 40.4, 40.2, 41.2, 41.5, 40.5, 39.0, 39.2, 39.3, 40.6, 39.7, 39.5, 38.9]
    fields = train.ABLATIONS["gridconv-D"][2]["#3+#4"][1]  # the paper writes (horizontal, vertical)
    assert fields["padding"] == (("replicate", "circular"), ("circular", "replicate"))


def test_swapped_sides_reach_training_and_test_but_no_target(run_folder):
    plain, swapped = (evaluation.make_store(tiny_recipe(**TINY_GLA, swap_sides=s), "", "test", "cpu") for s in (False, True))
    assert torch.equal(swapped.input, plain.input[:, list(SKELETONS["h36m17"].mirror)]) and torch.equal(swapped.target, plain.target)
    assert not torch.equal(swapped.input, plain.input)
    swapped.redraw(4)
    assert torch.equal(swapped.input, plain.input[:, list(SKELETONS["h36m17"].mirror)])
    recipe = tiny_recipe(**TINY_GLA, swap_sides=True)
    with pytest.raises(InputError, match="sides swapped"):
        evaluation._rule(SimpleNamespace(recipe=recipe), (640, 480))


def test_benchmark_compares_equal_things(run_folder):
    network = random_network(hidden=8, layout=gridconv.HANDCRAFTED_5X5)
    pose = torch.randn(4, 17, 2, dtype=torch.float64)
    torch.testing.assert_close(train.made_plain(copy.deepcopy(network))(pose), network(pose), rtol=1e-10, atol=1e-10)
    layer = gridconv.DynamicGridConv(3, 5).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(train.plain_grid_conv(layer, x), plain_dgridconv(
        x, layer.weight, layer.bias, ("circular", "replicate"), layer.attention(x)), rtol=1e-10, atol=1e-10)
    store = train.make_store(tiny_recipe(), "", "test", torch.device("cpu"))
    for frames in (1, 9, 51):
        slow = train.SampleByFrame(store, frames)
        for i in (0, 3, 19, 20, len(store) - 1):
            window, target = store.batch(torch.tensor([i]), frames)
            assert np.array_equal(slow[i][0].reshape(-1), window[0].numpy().reshape(-1))
            assert np.array_equal(slow[i][1], target[0].numpy())


def test_training_beats_the_affine_yardstick(run_folder):
    recipe = dataclasses.replace(train.RECIPES["gridconv-synthetic"], epochs=5.0, hidden=16, blocks=1, attention="",
                                 batch=32, lr=5e-3, eval_every=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthesize", functools.partial(data_synthesize_whole, frames=100))
        result = train.train(recipe, out=run_folder, quiet=True)
    assert result["last"]["pooled"]["mpjpe"] < result["yardsticks"]["affine"] < result["yardsticks"]["mean_pose"]
    assert "not Human3.6M" in train.report_table([result])


data_synthesize_whole = data.synthesize


# ---- nothing lost: kill -9, damaged checkpoints, full disks, signals

KILLED_RUN = """
import json, sys, torch._dynamo, test_models  # what an optimiser imports when it is made, once for all
test_models.kill_and_continue(*sys.argv[1:3], **json.loads(sys.argv[3]))
"""


def in_processes(world, function, *arguments):
    """Process numbers of `world` forks of this process, joined as under torchrun where there are two, that run the function."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            status = 1
            try:
                function(*arguments)
                status = 0
            except SystemExit as stopped:
                status = stopped.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
    return children


def killed_recipe(method, epochs):
    fields = dict(layout="autogrids", noise_epochs=1.0) if method == "gridconv" else {
        **TINY_GLA, "reconstruct": True, "reconstruct_blocks": 1, "unshared_weight": 0.5, "stage_one_epochs": epochs / 2, "jitter": True,
        "refine": True}
    return tiny_recipe(**{**fields, "batch": 24, "dropout": 0.1, "epochs": epochs, "eval_every": 2, "noise": 0.01})


def dying_at(operation, writes):
    """From now on the process ends by SIGKILL before (an even number) or after the fsync, rename or, with `writes`, write of half
    that number."""
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
            yield SimpleNamespace(write=deadly(file.write), flush=file.flush, fileno=file.fileno) if "w" in mode else file
    if writes:
        data.open = unbuffered
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def kill_and_continue(method, folder, world=1, kills=5, epochs=4.0, how="time"):
    """In `folder`: the run `whole`, and the same run `killed-1`, ... until `kills` times it was ended by SIGKILL, after a random time
    or at a random file operation, and then continued. Every step is saved."""
    torch.set_num_threads(1)
    folder, rng, recipe = Path(folder), random.Random(0), killed_recipe(method, epochs)
    sequences = data.synthesize(0, subjects=("S1", "S9"), motions=("walk",), frames=24)
    data.synthesize = lambda seed: [s for s in sequences if s.camera == "54138969"] * 2
    train.SAVE_SECONDS = -1
    run = lambda name: train.train(recipe, out=folder / name, device="cpu", quiet=True)
    wait = lambda children: [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    started = time.perf_counter()
    assert wait(in_processes(world, run, "whole")) == [0] * world
    seconds, killed, finished = time.perf_counter() - started, 0, 0
    while killed < kills:
        name = f"killed-{finished}"
        if how == "time":
            children = in_processes(world, run, name)
            time.sleep(rng.uniform(0.1, 0.8) * seconds)
            for child in children:
                os.kill(child, signal.SIGKILL)
        else:
            writes = rng.random() < 0.5
            operation = rng.randrange(1000 if writes else 25)
            children = in_processes(world, lambda: (dying_at(operation, writes), run(name)))
        status = wait(children)
        assert set(status) <= {0, -9}, status
        killed, finished = killed + (-9 in status), finished + (-9 not in status)
    assert wait(in_processes(world, run, f"killed-{finished}")) == [0] * world


def flat(value, place=""):
    """{place: tensor or number} of everything in a nested state but times."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items if key != "seconds" for k, v in flat(part, f"{place}/{key}").items()}
    return {place: value}


def assert_same_run(one, other):
    """Every file of two finished runs holds the same bits, wall-clock times excepted."""
    for file in ("last.pt", "best.pt"):
        a, b = (flat(data.read_torch(run / file)) for run in (one, other))
        assert a.keys() == b.keys() and len(a) > 20
        for key in a:
            assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(open(run / "log.csv"))] for run in (one, other)]
    results = [flat(json.loads((run / "result.json").read_text())) for run in (one, other)]
    assert logs[0] == logs[1] and results[0] == results[1]
    assert not list(other.glob(".*.tmp"))


def killed_run(tmp_path, method, **options):
    driver = tmp_path / "driver.py"
    driver.write_text(KILLED_RUN)
    done = subprocess.run([sys.executable, str(driver), method, str(tmp_path), json.dumps(options)], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for run in tmp_path.glob("killed-*"):
        assert_same_run(tmp_path / "whole", run)


@pytest.mark.parametrize("method, options", [("gridconv", dict(how="file", kills=12)), ("glagcn", dict(kills=2, epochs=2.0)), ("gridconv", dict(world=2, kills=2))],
                         ids=["gridconv-files", "glagcn", "two-processes"])
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path, method, options):
    killed_run(tmp_path, method, **options)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("how", ["time", "file"])
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_killed_at_many_moments_a_run_goes_on_bit_for_bit(tmp_path, method, how, world):
    if how == "file" and world == 2:
        pytest.skip("only the first process writes: the other would wait for it")
    killed_run(tmp_path, method, how=how, world=world, kills=24 // world, epochs=16.0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_torchrun_killed_and_continued_is_the_same_run(tmp_path, method):
    driver, environment = tmp_path / "driver.py", {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    driver.write_text(
        "import sys, data, test_models, train; sequences = data.synthesize(0, subjects=('S1', 'S9'), motions=('walk',), frames=60)\n"
        "data.synthesize = lambda seed: sequences\n"
        "train.SAVE_SECONDS = -1\n"
        "train.train(test_models.killed_recipe(sys.argv[1], 3.0), out=sys.argv[2], device='cpu', quiet=True)")

    def launch(name):
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver), method,
                                 str(tmp_path / name)], cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True)
    started, rng, killed = time.monotonic(), random.Random(1), 0
    whole = launch("whole")
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.monotonic() - started
    while killed < 5:
        run = launch("killed")
        time.sleep(rng.uniform(0.3, 0.9) * seconds)
        workers = [int(child) for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        for process in (run.pid, *workers):
            os.kill(process, signal.SIGKILL)
        run.wait()
        killed += 1
    run = launch("killed")
    assert run.wait() == 0, run.stderr.read()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    terminated = launch("terminated")
    while not (tmp_path / "terminated" / "last.pt").exists():
        time.sleep(0.05)
    terminated.terminate()
    asked = time.monotonic()
    assert terminated.wait() != 0 and time.monotonic() - asked < 15  # torchrun's own status, after its own waiting
    assert launch("terminated").wait() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "terminated")


@pytest.fixture
def small_run(run_folder, monkeypatch):
    """(recipe, train into a folder of that name): 8 steps an epoch, two epochs, every step saved."""
    sequences = data.synthesize(0, subjects=("S1", "S9"), motions=("walk",), frames=32)
    monkeypatch.setattr(data, "synthesize", lambda seed: sequences)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    recipe = tiny_recipe(epochs=2.0, batch=16, anneal_epochs=2.0)
    return recipe, lambda name, **fields: train.train(dataclasses.replace(recipe, **fields), out=run_folder / name, quiet=True)


def stopped_at(monkeypatch, step, number=signal.SIGTERM):
    """From now on that step of a run sends the process a signal."""
    real = train.Run.train_step

    def train_step(self, chunk):
        real(self, chunk)
        if self.step == step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(train.Run, "train_step", train_step)


def interrupted(run, folder, monkeypatch):
    """Stop the run of that folder after its third step; returns the checkpoint it left."""
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        with pytest.raises(SystemExit):
            run(folder.name)
    return folder / "last.pt"


DAMAGE = {"truncated": lambda content: content[:len(content) // 2], "empty": lambda content: b"", "cut by one byte": lambda content: content[:-1],
          "a bit of a weight": lambda content: flipped(content, len(content) // 2), "a bit of the pickle": lambda content: flipped(content, 300)}


def flipped(content, at, bit=3):
    content = bytearray(content)
    content[at] ^= 1 << bit
    return bytes(content)


@pytest.mark.parametrize("how", [*DAMAGE, "missing"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_continues(small_run, run_folder, monkeypatch, capsys, how):
    recipe, run = small_run
    with monkeypatch.context() as patch:
        stopped_at(patch, 11)
        with pytest.raises(SystemExit):
            run("parts")
    last, previous = run_folder / "parts" / "last.pt", run_folder / "parts" / "previous.pt"
    assert (data.read_torch(last)["step"], data.read_torch(previous)["step"]) == (11, 10)
    last.unlink() if how == "missing" else last.write_bytes(DAMAGE[how](last.read_bytes()))
    (run_folder / "parts" / ".last.pt.1.tmp").write_bytes(b"what a killed process was writing")
    again, real = [], train.Run.train_step
    monkeypatch.setattr(train.Run, "train_step", lambda self, chunk: (again.append(self.step), real(self, chunk))[1])
    run("parts")
    told = capsys.readouterr().err
    assert again[0] == 10 and told.startswith("warning: ") and "last.pt: " in told and "continuing from the checkpoint before it" in told
    run("whole")
    assert_same_run(run_folder / "whole", run_folder / "parts")


def test_two_damaged_checkpoints_are_one_clear_line(small_run, run_folder):
    recipe, run = small_run
    run("run")
    for name in ("last.pt", "previous.pt"):
        (run_folder / "run" / name).write_bytes(flipped((run_folder / "run" / name).read_bytes(), 5000))
    with pytest.raises(InputError, match="last.pt: cannot be read: .*previous.pt whole: remove both to begin anew"):
        run("run")


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_whole(small_run, run_folder, monkeypatch):
    recipe, run = small_run
    last = interrupted(run, run_folder / "parts", monkeypatch)
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, len(before) // 3, len(before) - 1):  # every writer ends in an OSError there, as on a full disk
        real = train.Run.save

        def save(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            try:
                real(self)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "save", save)
            with pytest.raises(InputError, match=r"last.pt: cannot be written \(File too large\); make room") as error:
                run("parts")
        assert "\n" not in str(error.value) and last.read_bytes() == before and not list(last.parent.glob(".*tmp"))
    run("parts"), run("whole")
    assert_same_run(run_folder / "whole", run_folder / "parts")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to take its own permission away")
def test_a_read_only_folder_is_one_clear_line_and_the_old_checkpoint_whole(small_run, run_folder, monkeypatch):
    recipe, run = small_run
    last = interrupted(run, run_folder / "parts", monkeypatch)
    before = last.read_bytes()
    run_folder.parent.chmod(0o755), run_folder.chmod(0o755), last.parent.chmod(0o555)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="parts: cannot make the output folder: Permission denied; choose another --out"):
            run("parts")
        with pytest.raises(InputError, match="last.pt: cannot be written .Permission denied.*another folder"):
            data.write_atomically(last, lambda file: file.write(b"new"), last.with_name("previous.pt"))
    finally:
        os.seteuid(0)
    assert last.read_bytes() == before


def test_a_folder_is_refused_while_its_run_lives_and_not_after_it_was_killed(small_run, run_folder):
    recipe, run = small_run
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        with train.locked(run_folder / "run"):
            os.write(says, b".")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        with pytest.raises(train.Busy, match="run: another run is writing there; wait for it or choose another --out"):
            run("run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert run("run")["last"]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["predict", "score", "yardsticks", "save"])
def test_a_signal_ends_steps_evaluations_and_saving_without_a_trace(small_run, run_folder, monkeypatch, number, status, where):
    recipe, run = small_run
    before = signal.getsignal(number)
    run("whole")
    once = []

    def interrupted(real):
        def function(*arguments, **options):
            if not once:
                once.append("asked")
                os.kill(os.getpid(), number)
                for _ in range(1000):  # a signal's handler comes between two of Python's own steps
                    pass
                once.append("went on")
            return real(*arguments, **options)
        return function
    owner = train.Run if where == "save" else evaluation
    monkeypatch.setattr(owner, where, interrupted(getattr(owner, where)))
    with pytest.raises(SystemExit) as stopped:
        run("parts")
    assert stopped.value.code == status and not (run_folder / "parts" / "result.json").exists()
    assert ("went on" in once) == (where == "save")
    state = data.read_torch(run_folder / "parts" / "last.pt")
    assert (state["step"], len(state["history"])) == {"predict": (8, 0), "score": (8, 0), "yardsticks": (16, 2), "save": (2, 0)}[where]
    assert signal.getsignal(number) == before
    run("parts")
    assert_same_run(run_folder / "whole", run_folder / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gridconv-synthetic", "gridconv-synthetic-learnable", "glagcn-synthetic"])
def test_signals_end_the_embedded_default_within_five_seconds(tmp_path, recipe):
    rng = random.Random(recipe)
    for trial in range(4):
        number, status = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[trial % 2]
        run = subprocess.Popen([sys.executable, str(HERE / "train.py"), recipe, "--epochs", "2", "--eval-every", "1", "--out", str(tmp_path)],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while not (tmp_path / "lock").exists():
            time.sleep(0.1)
        time.sleep(rng.uniform(5, 40))
        asked = time.monotonic()
        run.send_signal(number)
        assert run.wait() in (status, 0) and time.monotonic() - asked < 5, (trial, time.monotonic() - asked)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "data.py"])
def test_a_signal_while_torch_is_imported_ends_quietly(tmp_path, script):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    done = subprocess.run([sys.executable, str(HERE / script), "--help"], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_has_pythons_own_handler_of_signals():
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with pytest.raises(SystemExit) as stopped:
            data.run(lambda: signal.raise_signal(signal.SIGINT))
        assert stopped.value.code == 130
    finally:
        signal.signal(signal.SIGINT, before)


# ---- nothing lost: numbers

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(small_run, run_folder, monkeypatch):
    recipe, run = small_run
    real = train.batch_loss
    for what, says in (("loss", "the loss of step 6 is nan: stopped, .*last.pt holds the last good state"),
                       ("weights", "the loss is finite, but some weights after step 6 are not: stopped, .*last.pt holds the last good")):
        count = iter(range(1, 99))

        def batch_loss(*arguments):
            loss, prediction = real(*arguments)
            if next(count) == 6:
                return (loss * math.nan, prediction) if what == "loss" else (loss + (prediction - prediction).sqrt().sum(), prediction)
            return loss, prediction
        with monkeypatch.context() as patch:
            patch.setattr(train, "batch_loss", batch_loss)
            with pytest.raises(InputError, match=says):
                run(what)
        state = data.read_torch(run_folder / what / "last.pt")
        assert state["step"] == 5 and all(torch.isfinite(value).all() for value in state["model"].values())
    broken = state["model"] | {"last.weight": torch.full((1,), math.nan)}
    torch.save({**state, "model": broken}, run_folder / "nan.pt")
    with pytest.raises(InputError, match="nan.pt: last.weight has NaN or infinite weights"):
        evaluation.load_model(run_folder / "nan.pt")


def test_gradients_are_clipped_as_the_recipe_says(run_folder):
    norms = []
    for clip in (0.0, 1e-3):
        run = make_run(run_folder, clip=clip)
        step = run.optimizer.step
        run.optimizer.step = lambda: (norms.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()), step())
        run.begin_epoch(0)
        run.train_step(next(iter(run.batches(train.epoch_order(run.recipe, len(run.store), 0)))))
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-3)


# ---- no one let in: hostile and damaged files of every format

def good_files(folder, frames=4):
    """{name: (loads that file, whether its format has a checksum)}: small files of every format, written to `folder`."""
    rng, files = np.random.default_rng(0), {}
    world = {s: {"Walking 1": rng.normal(0, 0.3, (frames, 32, 3)).astype(np.float32) + [0, 0, 1]} for s in ("S1", "S9")}
    write_objects(folder / "data_3d_h36m.npz", positions_3d=world)
    write_objects(folder / "data_2d_h36m_gt.npz", True, 2, positions_2d=views_of(world), metadata=META)
    h36m = lambda: data.load_h36m(folder, "gt", ("S1", "S9"))
    files |= {"data_3d_h36m.npz": (h36m, True), "data_2d_h36m_gt.npz": (h36m, True)}
    eva = {f"Train/S{i}": {"Jog 1 chunk0": rng.normal(0, 0.4, (frames, 15, 3))} for i in (1, 2, 3)}
    np.savez_compressed(folder / "data_3d_humaneva15.npz", positions_3d=np.array(eva, object))
    write_objects(folder / "data_2d_humaneva15_gt.npz", positions_2d={
        s: {a: [rng.uniform(0, 480, (frames, 15, 2)) for _ in range(3)] for a in actions} for s, actions in eva.items()})
    humaneva = lambda: data.load_humaneva(folder)
    files |= {"data_3d_humaneva15.npz": (humaneva, True), "data_2d_humaneva15_gt.npz": (humaneva, True)}
    write_objects(folder / "data_test_3dhp.npz", data={"TS1": {**raw_3dhp(rng, frames), "valid": np.ones(frames)}})
    files["data_test_3dhp.npz"] = lambda: data.load_3dhp(folder, "test"), True
    (folder / "clips").mkdir()
    for name in ("walk", "bow"):
        (folder / "clips" / f"{name}.bvh").write_text(write_bvh(*person(bandai_names(), seed=1, frames=frames)))
    data.convert_bvh(folder / "clips", folder, "mocap", "bow")
    mocap = lambda: data.load_mocap(folder)
    files |= {"data_3d_mocap.npz": (mocap, True), "data_2d_mocap_gt.npz": (mocap, True)}
    files["clips/walk.bvh"] = lambda: data.read_bvh(folder / "clips" / "walk.bvh"), False
    custom = {"metadata": {"layout_name": "coco", "num_joints": 17, "video_metadata": {"v.mp4": {"w": 1920, "h": 1080}}},
              "positions_2d": {"v.mp4": {"custom": [_kp_body(frames)]}}}
    write_objects(folder / "data_2d_custom_v.npz", **custom)
    np.save(folder / "keypoints.npy", _kp_body(frames))
    _kp_json(folder / "keypoints.json", _kp_list(_kp_body(frames)))
    for name in ("data_2d_custom_v.npz", "keypoints.npy", "keypoints.json"):
        files[name] = lambda path=folder / name: evaluation.read_keypoints(path), name.endswith(".npz")
    for legacy in (True, False):
        place = folder / ("legacy" if legacy else "zip")
        gridconv_archives(place, {"S1": {"Walking 1": np.tile(world["S1"]["Walking 1"], (2, 1, 1))[:8]}}, ("S1",), "train", legacy)
        for kind in ("2d", "3d"):
            files[f"{place.name}/train_custom_{kind}_unnorm.pth.tar"] = lambda place=place: data.load_gridconv(place), not legacy
        save = functools.partial(torch.save, _use_new_zipfile_serialization=not legacy, pickle_protocol=2)
        save({"epoch": 9, "state_dict": _ev_released_gridconv("dynamic", 4), "optimizer": EvUnknownOptimizer()}, place / "gridconv.pth.tar")
        save({"epoch": 6, "random_state": np.random.RandomState(0), "model_pos": _ev_released_glagcn(15, 1, 4)}, place / "glagcn.bin")
        files[f"{place.name}/gridconv.pth.tar"] = lambda place=place: weights_in(place / "gridconv.pth.tar", padding=("zeros",) * 2), not legacy
        files[f"{place.name}/glagcn.bin"] = lambda place=place: weights_in(place / "glagcn.bin", filter_widths=(3,)), not legacy
    (folder / "runs").mkdir()
    train.train(tiny_recipe(name="own", epochs=0.01), out=folder / "runs" / "own", quiet=True)
    files["runs/own/best.pt"] = lambda: weights_in(folder / "runs" / "own" / "best.pt"), True
    files["runs/own/last.pt"] = lambda: flat(data.read_torch(folder / "runs" / "own" / "last.pt")), True
    files["runs/own/result.json"] = lambda: train.write_report(folder / "runs"), False
    return files


def weights_in(path, **options):
    model = evaluation.load_model(path, **options)
    return [vars(model.recipe), model.state_dict()]


def mutated(content, rng):
    """The content with one thing changed: bits, bytes, a length field, a part cut out, repeated, moved or zeroed, the end cut off."""
    content, kind = bytearray(content), rng.randrange(9)
    at, span = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64, 1000))
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        del content[at:at + span]
    elif kind == 4:
        content[at:at] = rng.randbytes(span)
    elif kind == 5:
        content[at:at + span] = bytes(len(content[at:at + span]))
    elif kind == 6:  # a length
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 255, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 10 ** 12))
        content[at:at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    elif kind == 7:
        content[at:at] = content[at:at + span]
    else:  # text: another number or sign
        content[at:at + 1] = rng.choice((b"0", b"9", b"-", b"e", b".", b'"', b"[", b"}", b"NaN", b"1e999", b"999999999999"))
    return bytes(content)


def same_values(one, other):
    """Whether two nested values are equal to the last bit."""
    if dataclasses.is_dataclass(one):
        one, other = vars(one), vars(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    if torch.is_tensor(one):
        return torch.equal(one, other)
    return np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f")


def numbers_in(value):
    """Every float in a nested value."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, (dict, list, tuple)):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers_in(part)]
    value = np.asarray(value)
    return list(value.ravel()) if value.dtype.kind == "f" else []


def fuzz(folder, cases):
    files = good_files(folder)
    noticed = {}
    for name, (load, checksum) in files.items():
        path, rng, good = folder / name, random.Random(name), load()
        content = path.read_bytes()
        assert same_values(good, load())
        for case in range(cases):
            path.write_bytes(mutated(content, rng))
            try:
                got = load()
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000 and Path(name).name in str(error), (name, case, error)
                noticed[name] = noticed.get(name, 0) + 1
                continue
            except BaseException as error:
                error.add_note(f"{name}, case {case}")
                raise
            if checksum:  # what a format without one cannot tell: a changed number or name
                assert same_values(good, got), (name, case)
            elif not name.endswith("json"):
                assert np.isfinite(numbers_in(got[1:] if name.endswith("bvh") else got)).all() or "npy" in name or "tar" in name, (name, case)
        path.write_bytes(content)
    assert all(noticed[name] > cases // 4 for name in files), noticed
    return noticed


def test_mutated_files_of_every_format_load_right_or_are_refused(run_folder):
    fuzz(run_folder, 40)


@pytest.mark.slow
def test_mutated_files_of_every_format_many_times(run_folder):
    print(fuzz(run_folder, 3000))


def crafted(*parts):
    """A pickle of protocol 2 from its parts: bytes as they are, names as globals."""
    return b"\x80\x02" + b"".join(part if isinstance(part, bytes) else b"c%b\n%b\n" % tuple(map(str.encode, part)) for part in parts) + b"."


ARRAY = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), b"K\x00\x85U\x01b\x87R")  # an empty array, to be filled
KIND = (("numpy", "dtype"), b"U\x02O8\x89\x88\x87R", b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")  # objects, without their flags
TRILLION, GIB4 = b"\x8a\x06" + (10 ** 12).to_bytes(6, "little"), b"\x8a\x05" + (2 ** 32).to_bytes(5, "little")
HOSTILE_PICKLES = {
    "objects read from addresses in the file": crafted(*ARRAY, b"(K\x01)", *KIND, b"\x89U\x08AAAAAAAAtb"),
    "a constructor that allocates": crafted(("numpy", "ndarray"), GIB4, b"\x85U\x01O\x86R"),
    "objects of a claimed shape": crafted(*ARRAY, b"(K\x01", GIB4, b"\x85", *KIND, b"\x89]tb"),
    "a memo of a claimed size": crafted(b"Nr" + struct.pack("<I", 2 ** 28), ("os", "getcwd")),
    "bytes of a claimed length": crafted(b"\x8e" + struct.pack("<Q", 10 ** 12)),
    "a structure with fields of its own": crafted(*ARRAY, b"(K\x01)", ("numpy", "dtype"), b"U\x02V8\x89\x88\x87R",
                                                  b"(K\x03U\x01|NU\x01a\x85}U\x01a", *KIND, b"K\x00\x86sK\x08K\x01K\x00tb\x89U\x08AAAAAAAAtb"),
    "a bytearray of a claimed length": crafted(b"\x96" + struct.pack("<Q", 300 << 20), b"x"),
    "a text copied 400 times": crafted(b"](X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00",
                                       *[("_codecs", "encode"), b"h\x00\x85R"] * 400, b"e"),
    "code": crafted(("os", "system"), b"U\x0etouch /tmp/own\x85R"),
}


def npy_header(shape, descr="<f4"):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
    return head.getvalue()


def torch_claiming(folder, legacy, count, size, stride):
    """A torch file of four float32 values, whose storage claims `count` and whose tensor `size` and `stride`."""
    path, values = folder / "claims.pt", io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, values, _use_new_zipfile_serialization=not legacy)
    change = lambda content: content.replace(b"K\x04" + (b"N" if legacy else b"") + b"t", count + (b"N" if legacy else b"") + b"t").replace(
        b"K\x04\x85", size + b"\x85").replace(b"K\x01\x85", stride + b"\x85")
    if legacy:
        path.write_bytes(change(values.getvalue()))
    else:
        with zipfile.ZipFile(values) as source, zipfile.ZipFile(path, "w") as archive:
            for info in source.infolist():
                content = source.read(info)
                archive.writestr(info.filename, change(content) if info.filename.endswith("data.pkl") else content)
    return path


def legacy_file(path, body, keys=(), rest=b""):
    start = b"".join(pickle.dumps(part, 2) for part in (0x1950a86a20f9469cfc6c, 1001, {"little_endian": True}))
    path.write_bytes(start + body + pickle.dumps(list(keys), 2) + rest)
    return path


def npz_of_zeros(path, count, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("keypoints.npy", "w") as member:
        member.write(npy_header((count,)))
        for _ in range(count >> 18):
            member.write(bytes(1 << 20))
    return path


def hostile_files(folder):
    """(what it is, loads it) of files that would run code, read foreign memory, or allocate what they only claim."""
    for what, body in HOSTILE_PICKLES.items():
        for name, kind in (("a.npz", "npz"), ("a.npy", "npy"), ("a.pt", "zip"), ("a.bin", "legacy")):
            path, member = folder / name, npy_header((), "|O") + body
            if kind == "npz":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("positions_3d.npy", member)
            elif kind == "npy":
                path.write_bytes(member)
            elif kind == "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("a/data.pkl", body)
            else:
                legacy_file(path, body)
            yield f"{what} ({kind})", lambda: data.read_npz(path) if "np" in kind else data.read_torch(path)
            if kind in ("zip", "legacy"):  # names it does not know are inert there
                yield f"{what} ({kind}, inert)", lambda: evaluation.load_model(path)
    for name in ("b.npz", "b.npy"):
        for shape in ((10 ** 12, 17, 3), (10 ** 12, 0, 3), (-1, 17, 3)):
            path = folder / name
            if name == "b.npy":
                path.write_bytes(npy_header(shape) + bytes(204))
            else:
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("keypoints.npy", npy_header(shape) + bytes(204))
            yield f"header {shape} in {name}", lambda: evaluation.read_keypoints(path)
    for legacy in (True, False):
        for what, change in {"a storage": (TRILLION, b"K\x04", b"K\x01"), "a storage of gigabytes": (GIB4, GIB4, b"K\x01"),
                             "a tensor": (b"K\x04", TRILLION, b"K\x01"), "a tensor of one value": (b"K\x04", TRILLION, b"K\x00"),
                             "a negative step": (b"K\x04", b"K\x04", b"J\xff\xff\xff\xff")}.items():
            path = torch_claiming(folder, legacy, *change)
            yield f"{what} that claims more than the file holds, {'legacy' if legacy else 'zip'}", lambda: data.read_torch(path)
    many = [part for key in range(400) for part in (b"(U\x07storage", ("torch", "FloatStorage"), b"M%bU\x03cpuJ%bNtQ" % (
        struct.pack("<H", key), struct.pack("<i", 250_000)))]
    path = legacy_file(folder / "many.bin", crafted(b"](", *many, b"e"), rest=bytes(10 ** 6 + 10 ** 5))
    yield "storages that together claim more than the file holds", lambda: data.read_torch(path)
    for fields in ({"hidden": 1800}, {"hidden": 1, "blocks": 3000}, {"hidden": 1, "layout": "random", "grid": (200, 200)}):
        path = folder / "network.pt"
        torch.save({"format": "poselift", "version": 1, "recipe": {**vars(_ev_recipe()), **fields}, "model": {}}, path)
        yield f"a recipe of {fields} without its weights", lambda: evaluation.load_model(path)
    path = folder / "released.pt"
    wide = {f"w1.{branch}_conv.weight": torch.zeros(1800, 2, 3, 3) for branch in ("donut", "tablet")}
    torch.save({"state_dict": {**_ev_released_gridconv("vanilla"), **wide}}, path)
    yield "a release's weights of which the first are wider", lambda: evaluation.load_model(path, padding=("zeros",) * 2)
    path = npz_of_zeros(folder / "bomb.npz", 100 << 20)
    yield "an archive that unpacks to 1,000 times its size", lambda: data.read_npz(path)
    size = struct.pack("<I", (400 << 20) + len(npy_header((100 << 20,))))
    assert size in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 1000)))
    yield "an archive that unpacks to more than it says", lambda: data.read_npz(path)
    path = npz_of_zeros(folder / "lzma.npz", 1 << 18, zipfile.ZIP_LZMA)
    yield "an archive by a method that NumPy does not use", lambda: data.read_npz(path)
    torch.save({"a": torch.zeros(1000)}, folder / "stored.pt")
    path = folder / "deflated.pt"
    with zipfile.ZipFile(folder / "stored.pt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    yield "a compressed torch file", lambda: data.read_torch(path)
    for kind, make in {"pipe": os.mkfifo, "endless": lambda path: path.symlink_to("/dev/zero")}.items():
        for read in (data.read_json, data.read_npz, data.read_torch, data.read_bvh):
            path = folder / f"{kind}.{read.__name__}{'.npy' * (read is data.read_npz)}"
            make(path)
            yield f"{kind} for {read.__name__}", lambda: read(path)
    path = folder / "deep.json"
    path.write_text("[" * 10 ** 6)
    yield "JSON nested a million deep", lambda: evaluation.read_keypoints(path)
    path.write_text(json.dumps([{"image_id": i, "keypoints": [1.0] * 51} for i in (0, 1, 10 ** 12)]))
    yield "JSON of 1e12 frames", lambda: evaluation.read_keypoints(path)
    path = folder / "long.bvh"
    path.write_text(re.sub(r"(?i)Frames:\s*\d+", "Frames: 1000000000000", write_bvh(*person(bandai_names(), frames=2))))
    yield "BVH of 1e12 frames", lambda: data.read_bvh(path)


def test_hostile_files_are_refused_without_effect(tmp_path, monkeypatch):
    """Each is loaded by a process of its own, whose end and peak memory are looked at."""
    monkeypatch.setattr(os, "system", lambda *_: (tmp_path / "ran").write_text("code"))
    mapped, resident = (lambda at=at: int(Path("/proc/self/statm").read_text().split()[at]) * os.sysconf("SC_PAGE_SIZE") for at in (0, 1))
    tried = 0
    for what, load in hostile_files(tmp_path):
        child = os.fork()
        if not child:
            signal.alarm(60)
            torch.set_num_threads(1)  # a fork has none of the threads that its parent's sums waited for
            resource.setrlimit(resource.RLIMIT_AS, (mapped() + 2 ** 30,) * 2)
            try:
                load()
            except InputError as error:
                os._exit(0 if "\n" not in str(error) and len(str(error)) < 1000 else 3)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(2)
        _, status, used = os.wait4(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, what
        assert used.ru_maxrss * 1024 < resident() + 2 ** 27, (what, used.ru_maxrss)
        tried += 1
    assert tried > 50 and not (tmp_path / "ran").exists()


def zip_file(path, body):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/data/0", b"")
    return path


def test_hostile_pickles_change_neither_tensors_nor_the_reader(tmp_path):
    """A tensor's own state could make it any size; a function's attributes are its defaults."""
    def tensor(legacy):  # of no value
        return (("torch._utils", "_rebuild_tensor"), b"((U\x07storage", ("torch", "FloatStorage"), b"U\x010U\x03cpuK\x00", b"N" * legacy,
                b"tQK\x00K\x00\x85K\x01\x85tR")

    for legacy in (True, False):
        resized = *tensor(legacy), b"(", *tensor(legacy), b"K\x00J" + struct.pack("<i", 10 ** 6) + b"\x85K\x01\x85tb"
        for what, parts in {"Tensor": resized, "partial": (("_codecs", "encode"), b"N}X\x0c\x00\x00\x00__defaults__)s\x86b"),
                            "type": (("a", "B"), b"N}U\x06appendNs\x86b")}.items():
            path = legacy_file(tmp_path / "a.bin", crafted(*parts), "0", bytes(8)) if legacy else zip_file(tmp_path / "a.pt", crafted(*parts))
            with pytest.raises(InputError, match=f"changes a {what}, which is refused"):
                data.read_torch(path, inert=True)
    assert data._latin1("\xe9") == b"\xe9" and data._latin1.__defaults__ == ("latin1",)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_damaged_checkpoints_dictionaries_keep_their_methods(legacy, tmp_path):
    model = evaluation.build_model(_ev_recipe())
    state, content = OrderedDict(model.state_dict()), OrderedDict(format="poselift", version=1, recipe=vars(model.recipe))
    for one in (state, content):
        one.values = one.get = 5
    content["model"] = state
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert vars(data.read_torch(tmp_path / "a.pt", inert=True)) == {}
    x = torch.randn(2, 17, 2)
    assert torch.equal(evaluation.load_model(tmp_path / "a.pt")(x), model.eval()(x))
    for field, value in (("version", 1 << 10 ** 5), ("version", torch.ones(2)), ("format", np.ones(2)), (1 << 10 ** 5, 0), ("recipe", {1: 2})):
        torch.save({"format": "poselift", field: value}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match="a.pt"):
            evaluation.load_model(tmp_path / "a.pt")


def test_what_is_not_a_file_or_too_large_is_one_clear_line_of_reading(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "not a regular file"), (Path("/dev/zero"), "not a regular file"), (tmp_path, "Is a directory")):
        for read in (data.read_json, data.read_npz, data.read_torch, data.read_bvh):
            with pytest.raises(InputError, match=f"{path}.*{says}"):
                read(path)

    def full(*_):
        raise MemoryError

    (tmp_path / "a.npy").write_text("[]")
    monkeypatch.setattr(Path, "read_bytes", full)
    for read in (data.read_json, data.read_npz, data.read_bvh):
        with pytest.raises(InputError, match="a.npy.*(memory|MemoryError)"):
            read(tmp_path / "a.npy")
    with pytest.raises(SystemExit, match="2"):
        data.run(full)
    assert capsys.readouterr().err == "error: not enough memory\n"


# ---- nothing lost: NaN, determinism, long runs, scale

def test_values_that_are_not_finite_are_refused_with_file_sequence_and_frame(run_folder):
    good_files(run_folder)

    def in_objects(name, key, *way, legacy=None):
        def change(value):
            content = data.read_npz(run_folder / name)[key].item() if legacy is None else data.read_torch(run_folder / name)
            place = content
            for depth, step in enumerate(way):
                key_there = list(place)[step] if isinstance(place, dict) else step
                if depth == len(way) - 1:
                    place[key_there] = np.array(place[key_there])
                place = place[key_there]
            place[2] = value
            if legacy is None:
                write_objects(run_folder / name, **{key: content})
            else:
                torch.save(content, run_folder / name)
        return change

    def in_mocap(name, key, frame):
        def change(value):
            content = {k: v.copy() for k, v in data.read_npz(run_folder / name).items()}
            content[key][frame] = value
            np.savez(run_folder / name, **content)
        return change

    def in_bvh(value):
        path = run_folder / "clips" / "walk.bvh"
        lines = path.read_text().splitlines()
        lines[-1] = f"{value} " + lines[-1].split(" ", 1)[1]
        path.write_text("\n".join(lines))
    tar = "zip/train_custom_{}_unnorm.pth.tar"
    cases = [
        (in_objects("data_3d_h36m.npz", "positions_3d", 1, 0), lambda: data.load_h36m(run_folder, "gt", ("S1", "S9")),
         "data_3d_h36m.npz: S9 Walking 1: 3D, frame 2"),
        (in_objects("data_2d_h36m_gt.npz", "positions_2d", 0, 0, 3), lambda: data.load_h36m(run_folder, "gt", ("S1",)),
         "data_2d_h36m_gt.npz: S1 Walking 1 camera 60457274, 2D, frame 2"),
        (in_objects("data_3d_humaneva15.npz", "positions_3d", 2, 0), lambda: data.load_humaneva(run_folder),
         "data_3d_humaneva15.npz: Train/S3 Jog 1 chunk0: 3D, frame 2"),
        (in_objects("data_2d_humaneva15_gt.npz", "positions_2d", 1, 0, 1), lambda: data.load_humaneva(run_folder),
         "data_2d_humaneva15_gt.npz: Train/S2 Jog 1 chunk0 camera C2, 2D, frame 2"),
        (in_objects("data_test_3dhp.npz", "data", 0, 0), lambda: data.load_3dhp(run_folder, "test"),
         "data_test_3dhp.npz: TS1 TS1 camera 0, 3D, frame 2"),
        (in_objects(tar.format("2d"), "", 1, legacy=False), lambda: data.load_gridconv(run_folder / "zip"),
         "train_custom_2d_unnorm.pth.tar and train_custom_3d_unnorm.pth.tar: S1 Walking 1 camera 55011271, 2D, frame 2"),
        (in_objects(tar.format("3d"), "", 0, 1, legacy=False), lambda: data.load_gridconv(run_folder / "zip"),
         "train_custom_3d_unnorm.pth.tar: S1 Walking 1 camera 54138969, 3D, frame 2"),
        (in_mocap("data_2d_mocap_gt.npz", "positions_2d", (0, 2)), lambda: [data.load_mocap(run_folder, split=s) for s in ("train", "test")],
         r"data_2d_mocap_gt.npz: \w+.bvh: .* camera 54138969, 2D, frame 2"),
        (in_mocap("data_3d_mocap.npz", "positions_3d", 3), lambda: [data.load_mocap(run_folder, split=s) for s in ("train", "test")],
         r"data_3d_mocap.npz and .*: \w+.bvh: .* camera 54138969, 3D, frame 3"),
        (in_bvh, lambda: data.read_bvh(run_folder / "clips" / "walk.bvh"), "walk.bvh, frame 3")]
    for change, load, says in cases:
        for value in (math.nan, math.inf, -1e300):  # the last is too large for float32
            if not (change is in_bvh and value == -1e300):
                change(value) if "mocap" not in says or value != -1e300 else None
                with np.errstate(over="ignore", invalid="ignore"), pytest.raises(InputError, match=says + ": NaN or infinite"):
                    load()
        change(0.5)
    for change, load, _ in cases:
        load()


def test_the_deterministic_switch_is_torchs_and_changes_nothing_on_the_cpu(small_run, run_folder, monkeypatch):
    recipe, run = small_run
    run("plain")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        run("switched", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    states = [data.read_torch(run_folder / name / "last.pt")["model"] for name in ("plain", "switched")]
    assert same_values(*states)
    result = json.loads((run_folder / "switched" / "result.json").read_text())
    assert "CPU thread" in result["device"]  # whose number decides the last bits
    assert result["recipe"]["deterministic"] and {"seed", "torch", "numpy", "python", "device", "commit"} <= result.keys()


def long_run(run_folder, method, steps, warm_up):
    """(bytes, file handles, tensors) gained between the step `warm_up` and the last of a run that logs, scores and saves often."""
    sequences = data.synthesize(0, subjects=("S1", "S9"), motions=("walk",), frames=10)
    gained = []

    def look(run):
        gc.collect()
        gained.append((int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")),
                       sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthesize", lambda seed: sequences)
        patch.setattr(train, "SAVE_SECONDS", 0.05)
        real = train.Run.train_step

        def train_step(self, chunk):
            real(self, chunk)
            if self.step in (warm_up, steps):
                look(self)
        patch.setattr(train.Run, "train_step", train_step)
        recipe = killed_recipe(method, 1.0)
        per_epoch = make_run(run_folder, **{**dataclasses.asdict(recipe), "name": ""}).epoch_steps
        train.train(dataclasses.replace(recipe, epochs=steps / per_epoch, eval_every=20), out=run_folder / method, quiet=True)
    return tuple(after - before for before, after in zip(*gained))


@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_memory_and_file_handles_do_not_grow(run_folder, method):
    memory, handles, tensors = long_run(run_folder, method, 120, 60)
    assert memory < 2 ** 24 and handles == 0 and tensors == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_memory_and_file_handles_do_not_grow_over_2000_steps(run_folder, method):
    memory, handles, tensors = long_run(run_folder, method, 2200, 200)
    assert memory < 2 ** 23 and handles == 0 and tensors == 0


def run_of_many_steps(run_folder, monkeypatch, steps, capsys):
    """A run of the embedded default's size whose steps do nothing: the bytes of its log and of its state, and its lines on stderr."""
    monkeypatch.setattr(train.Run, "train_step", lambda self, chunk: setattr(self, "step", self.step + 1))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {"pooled": {"mpjpe": 50.0, "p_mpjpe": 40.0}})
    monkeypatch.setattr(train, "finish", lambda *_: {})
    recipe = dataclasses.replace(train.RECIPES["gridconv-synthetic"], hidden=4, blocks=1, eval_every=1)
    per_epoch = train.Run(recipe, train.make_store(recipe, "", "train", torch.device("cpu")), run_folder, torch.device("cpu")).epoch_steps
    train.train(dataclasses.replace(recipe, epochs=steps / per_epoch), out=run_folder / "run")
    lines = (run_folder / "run" / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + math.ceil(steps / per_epoch)
    assert len(capsys.readouterr().err.splitlines()) == len(lines) - 1
    return sum(map(len, lines)), (run_folder / "run" / "last.pt").stat().st_size


def test_the_log_has_a_line_an_epoch(run_folder, monkeypatch, capsys):
    log, _ = run_of_many_steps(run_folder, monkeypatch, 1000, capsys)
    assert log < 5000


@pytest.mark.slow
def test_the_log_of_a_million_steps_stays_small(monkeypatch, tmp_path, capsys):
    log, state = run_of_many_steps(tmp_path, monkeypatch, 10 ** 6, capsys)
    assert log < 10 ** 6 and state < 2 * 10 ** 6, (log, state)


def test_data_scale_measures_files_like_human36ms(tmp_path, monkeypatch, capsys):
    said = data.scale(3 * 840)
    assert re.match(r"2,520 frames of 7 subjects, files of \d+ MB: loaded for training and testing in \d+\.\d s, at most \d\.\d\d GB", said)
    data.write_scale(tmp_path, 840)
    sequences = data.load_dataset(recipe_of(), tmp_path, "train")
    assert len(sequences) == 600 and {len(s.pose_3d) for s in sequences} == {1}
    assert data.provenance(sequences) == "files in Human3.6M layout, made by this project"
    for arguments, says in ((["--frames", "839"], "--frames 839: expected at least 840"), (["--frames", str(10 ** 15)], "GB of room needed")):
        monkeypatch.setattr(sys, "argv", ["data.py", "scale", *arguments])
        with pytest.raises(InputError, match=says):
            data.main()


@pytest.mark.slow
def test_human36m_in_full_loads_in_a_minute_and_six_gigabytes():
    done = data_command("scale")
    seconds, memory = re.search(r"in ([\d.]+) s, at most ([\d.]+) GB", done.stdout).groups()
    assert done.stdout.startswith("2,103,360 frames") and float(seconds) < 60 and float(memory) < 6


@pytest.mark.parametrize("fields", [{"loss": "grid", "layout": "released"}, {**TINY_GLA, "reconstruct": True, "stage_one_epochs": 0.5}],
                         ids=["gridconv", "glagcn"])
def test_a_plain_run_takes_the_same_steps(fields, run_folder):
    losses = []
    for plain in (False, True):
        run = make_run(run_folder, **{**fields, "dropout": 0.0, "epochs": 1.0, "optimizer": "adam"})
        if plain:
            train.made_plain(run.model)
        run.begin_epoch(0)
        for chunk in run.batches(train.epoch_order(run.recipe, len(run.store), 0))[:3]:
            run.train_step(chunk)
        losses.append(run.losses[:3].tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) == 3
    store = make_run(run_folder, **fields).store
    timed = [train.step_seconds(run.recipe, store, torch.device("cpu"), steps=1, plain=plain) for plain in (False, True)]
    assert timed[0][1] == timed[1][1] and min(seconds for seconds, _ in timed) > 0


def test_bench_counts_what_is_outside_the_steps():
    store = FrameStore(data.synthesize(0, subjects=("S1",), motions=("walk",), frames=40), "width", SKELETONS["h36m17"])
    assert 0 <= train.outside_steps(store, torch.device("cpu")) < 0.5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("fields", [
    {"layout": "autogrids", "noise_epochs": 0.0}, {**TINY_GLA, "micro_batch": 16},
    {**TINY_GLA, "reconstruct": True, "unshared_weight": 0.5, "stage_one_epochs": 1.0, "reconstruct_blocks": 1, "refine": True}],
    ids=["gridconv", "glagcn", "reconstruction"])
def test_compiled_training_takes_the_same_steps(run_folder, fields):
    losses, states, graphs = [], [], []
    for compiled in (False, True):
        recipe = tiny_recipe(**{**fields, "epochs": 3.0, "lr": 1e-3, "dropout": 0.0, "compile": compiled})
        store = evaluation.make_store(recipe, "", "train", torch.device("cpu"))
        run = train.Run(recipe, store, run_folder, torch.device("cpu"))
        run.refinement.eval()  # no dropout there either
        for epoch in range(3):
            run.begin_epoch(epoch)
            run.refinement.eval()
            run.step = epoch * run.epoch_steps
            for chunk in run.batches(train.epoch_order(recipe, len(store), epoch))[:2]:
                run.train_step(chunk)
            losses.append(run.losses[:2].tolist())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        states.append(run.model.state_dict())
    assert losses[3:] == [pytest.approx(two, rel=1e-4) for two in losses[:3]] and len({x for two in losses[:3] for x in two}) == 6
    for name, value in states[0].items():  # means move with biases, whose gradient is rounding alone
        if "running_var" in name:
            torch.testing.assert_close(states[1][name], value, rtol=2e-3, atol=2e-4, msg=name)
    assert graphs[2] < graphs[3] and graphs[4] == graphs[5]  # nothing is compiled anew in the third epoch


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
def test_compiled_gradients_with_two_threads_are_the_eager_ones():
    """In a process of its own: where the compiled code stores outside its arrays, the process dies."""
    code = """
import copy, torch, gridconv, train
torch.manual_seed(0)
torch.set_num_threads(2)
for options in (dict(), dict(attention="channel", kernel_sizes=(5, (3, 1), 3), padding=("zeros",))):
    model = gridconv.GridLiftingNetwork(hidden=64, blocks=1, dropout=0.0, **options)
    eager, pose = copy.deepcopy(model).double(), torch.randn(200, 17, 2)
    for net, x in ((train.compiled(model, pose.device), pose), (eager, pose.double())):
        for _ in range(3):
            net.zero_grad()
            net(x).square().mean().backward()
    largest = max(p.grad.abs().max() for p in eager.parameters())
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        assert (p.grad - q.grad).abs().max() < 1e-3 * q.grad.abs().max() + 1e-5 * largest, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr[-2000:]


def test_plain_glagcn_of_the_benchmark_is_the_network():
    for options in (dict(filter_widths=(3, 3)), dict(filter_widths=(3,), reconstruct=True, reconstruct_blocks=1)):
        torch.manual_seed(0)
        model = glagcn.GLAGCN(channels=8, dropout=0.0, **options).double()
        x = torch.rand(3, model.receptive_field, 17, 2, dtype=torch.float64)
        arguments = dict(return_sequence=True) if "reconstruct" in options else {}
        fast, plain = model(x, **arguments), train.plain_glagcn(model, x, **arguments)
        for a, b in zip(fast, plain) if arguments else ((fast, plain),):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("argv, says", [
    (["gridconv-synthetic", "banana"], "banana does not go with gridconv-synthetic"),
    (["gridconv-synthetic", "--quick"], "--quick does not go with gridconv-synthetic"), (["bench", "--seeds", "2"], "--seeds does not"),
    (["bench", "--hidden", "8"], "--hidden does not go with bench"), (["--list", "--lr", "1"], "--lr does not go with --list"),
    (["ablate", "gridconv-5", "--epochs", "3"], "--epochs does not go with ablate"),
    (["ablate", "gridconv-5", "--layout-seed", "3"], "--layout-seed does not go with ablate"),
    (["glagcn-synthetic", "--hidden", "8"], "--hidden: glagcn has none, only gridconv, gridconv-temporal, fc, gcn"),
    (["gridconv-synthetic", "--channels", "8"], "--channels: gridconv has none, only glagcn"),
    (["gridconv-synthetic", "--method", "fc", "--padding", "zeros"], "--padding: fc has none"),
    (["report", "--minutes", "3"], "--minutes does not go with report"), (["ablate", "gridconv-5", "--all"], "--all does not go"),
    (["reproduce", "--seed", "5"], "give --seeds N"), (["gridconv-3dhp-cross", "--out", "x"], "expected a name with")])
def test_options_that_would_do_nothing_are_refused(argv, says, tmp_path):
    with pytest.raises(InputError, match=says):
        train.main([*argv, "--data", str(tmp_path)])


# --- several processes

SHARED_RUN = """
import sys, torch, data, test_models, train
torch.set_default_dtype(torch.float64)
with train.processes(torch.device("cpu")) as (rank, world, device):
    run, store = test_models.shared_run(sys.argv[1], rank, world)
    test_models.train_shared(run, lambda chunk: run.train_step(chunk))
    if rank == 0:
        torch.save([run.history, run.model.state_dict()], sys.argv[2])
"""


def shared_run(method, rank=0, world=1):
    """A float64 run of two epochs with shares of unequal size, every kind of parameter and nothing random in a step."""
    fields = dict(batch=7, dropout=0.0, epochs=2.0, clip=1.0)
    recipe = tiny_recipe(**(fields if method == "gridconv" else {
        **TINY_GLA, **fields, "reconstruct": True, "unshared_weight": 0.5, "stage_one_epochs": 1.0, "reconstruct_blocks": 1}))
    sequences = data.synthesize(0, subjects=("S1",), motions=("walk",), frames=11 if method == "gridconv" else 7)
    store = FrameStore(sequences, recipe.normalise, SKELETONS["h36m17"], dtype=torch.float64)
    return train.Run(recipe, store, ".", torch.device("cpu"), rank=rank, world=world), store


def train_shared(run, step, batches=None):
    for epoch in range(2):
        run.begin_epoch(epoch)
        for chunk in (batches or run.batches)(train.epoch_order(run.recipe, len(run.store), epoch)):
            step(chunk)
        run.history.append(run.losses.clone())


def shares_one_after_the_other(method):
    """What two processes should do, by one: each half of a batch in turn, the gradients averaged."""
    run, store = shared_run(method)
    batches = lambda order: train.batches(order, run.recipe.batch, 4)
    run.epoch_steps = len(batches(train.epoch_order(run.recipe, len(store), 0)))
    run.losses = torch.zeros(run.epoch_steps)

    def step(chunk):
        run.reach(run.step / run.epoch_steps)
        parameters, total, gradients = [p for p in run.model.parameters() if p.requires_grad], 0, 0
        for half in (chunk[:(len(chunk) + 1) // 2], chunk[(len(chunk) + 1) // 2:]):
            flip = half >= len(store) if run.recipe.flips else None
            loss = train.batch_loss(run.model, store, half % len(store), flip, run.recipe, run.stage_one)[0]
            loss = loss * len(half) / len(chunk)
            gradients = [g + new for g, new in zip(gradients or [0] * 999, torch.autograd.grad(loss, parameters))]
            total += loss.item()
        for p, g in zip(parameters, gradients):
            p.grad = g
        nn.utils.clip_grad_norm_(parameters, run.recipe.clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.losses[run.step % run.epoch_steps] = total
        run.step += 1

    train_shared(run, step, batches)
    return run


@pytest.mark.parametrize("method", ["gridconv", "glagcn"])
def test_two_processes_equal_two_shares_one_after_the_other(tmp_path, method):
    driver, out = tmp_path / "driver.py", tmp_path / "out.pt"
    driver.write_text(SHARED_RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, str(driver), method, str(out)], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    losses, weights = torch.load(out, weights_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        alone = shares_one_after_the_other(method)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(alone.history, losses):
        torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-9)
    for name, p in alone.model.named_parameters():
        torch.testing.assert_close(weights[name], p.data, rtol=1e-7, atol=1e-9)


@given(st.integers(4, 60), st.integers(4, 9), st.integers(1, 3))
def test_shares_are_disjoint_and_cover_every_epoch(samples, size, world):
    least = 2 * world
    if size < least or samples < least:
        return
    order = torch.randperm(samples)
    parts = train.batches(order, size, least)
    assert torch.equal(torch.cat(parts), order) and all(len(part) >= least for part in parts)
    for part in parts:
        shares = part.tensor_split(world)
        assert torch.equal(torch.cat(shares), part) and min(map(len, shares)) >= 2


def test_torchrun_has_one_writer_and_saves_everyones_random_state(run_folder):
    driver = run_folder / "driver.py"
    driver.write_text(
        "import sys, data, train; whole = data.synthesize\n"
        "data.synthesize = lambda seed, **o: whole(seed, **{'frames': 8, 'subjects': ('S1', 'S9'), 'motions': ('walk',), **o})\n"
        "data.run(lambda: train.main(sys.argv[1:]))")

    def launch(processes, *options):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(driver)]
        return subprocess.run([*launcher, "gridconv-synthetic", "--out", str(run_folder / "run"), "--hidden", "4", "--dropout", "0.1",
                               "--batch", "16", "--epochs", "2", *options], capture_output=True, text=True, cwd=HERE,
                              env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})

    done = launch(2)
    assert done.returncode == 0 and done.stdout.count("| gridconv-synthetic ") == 1, done.stderr[-2000:]
    state = data.read_torch(run_folder / "run" / "last.pt")
    assert len(state["random"]) == 2 and not torch.equal(state["random"][0][0], state["random"][1][0])
    assert json.loads((run_folder / "run" / "result.json").read_text())["device"].startswith("2 x ")
    assert "2 processes, here 1" in launch(1).stderr
    assert "sync_norm: needs several processes on GPUs" in launch(2, "--sync-norm", "true", "--out", str(run_folder / "b")).stderr


# ---------------------------------------------------------------------------------------------------------------------
# Every dataset, protocol and published row, on miniatures in each layout


def raw_3dhp(rng, frames, joints=17):
    """A view in P-STMO's layout: random people three metres away."""
    return {"data_3d": rng.normal(0, 300, (frames, joints, 3)) + [0, 0, 3000], "data_2d": rng.uniform(0, 1900, (frames, joints, 2))}


@pytest.fixture(scope="module")
def everything(tmp_path_factory, bvh_folder):
    """(folder, raw values): every dataset in miniature. Human3.6M: 7 subjects, 15 actions, 2 takes, 4 cameras, 32 joints."""
    folder, rng, takes = tmp_path_factory.mktemp("everything"), np.random.default_rng(0), {}
    takes = [f"{action}{ending}" for action in evaluation.ACTIONS for ending in ("", " 1")]
    space = {subject: {} for subject in data.H36M_EXTRINSICS}
    for s in data.synthesize(3, takes=3, frames=5):
        if s.camera == data.H36M_CAMERAS[0]:
            world = data.camera_to_world(s.pose_3d + s.root[:, None].astype(float), data.H36M_EXTRINSICS[s.subject][0])
            wide = rng.normal(0, 0.3, (5, 32, 3))  # the joints that the 17 leave out
            wide[:, data.H36M_17_OF_32] = world
            space[s.subject][takes[len(space[s.subject])]] = wide.astype(np.float32)
    gt = views_of(space, confidence=False)
    noisy = {s: {a: [np.pad(v + rng.normal(0, 3, v.shape), [(0, 2), (0, 0), (0, 1)]).astype(np.float32) for v in views]
                 for a, views in actions.items()} for s, actions in gt.items()}
    write_objects(folder / "data_3d_h36m.npz", positions_3d=space)
    for kind, views in (("gt", gt), ("hrnet", noisy), ("cpn_ft_h36m_dbb", noisy)):
        write_objects(folder / f"data_2d_h36m_{kind}.npz", True, 2, positions_2d=views, metadata=META)
    eva, eva_2d, eva_coco = {}, {}, {}
    for subject in [f"{part}/S{i}" for part in ("Train", "Validate") for i in (1, 2, 3)]:
        for action, frames in (("Walking 1 chunk0", 3), ("Walking 1 chunk1", 5), ("Jog 1 chunk2", 4), ("Box 1 chunk0", 2)):
            eva.setdefault(subject, {})[action] = rng.normal(0, 0.4, (frames, 15, 3)).astype(np.float32)
            eva_2d.setdefault(subject, {})[action] = [rng.uniform(0, 480, (frames, 15, 2)) for _ in range(3)]
            eva_coco.setdefault(subject, {})[action] = [rng.uniform(0, 480, (frames, 17, 3)) for _ in range(3)]
    write_objects(folder / "data_3d_humaneva15.npz", positions_3d=eva)
    write_objects(folder / "data_2d_humaneva15_gt.npz", positions_2d=eva_2d)
    write_objects(folder / "data_2d_humaneva15_detectron_pt_coco.npz", positions_2d=eva_coco)
    train_3dhp = {f"S{i} Seq{j}": [{c: raw_3dhp(rng, 2) for c in "01245678"}, 25] for i in range(1, 9) for j in (1, 2)}
    test_3dhp = {f"TS{i}": {**raw_3dhp(rng, 6), "valid": rng.integers(0, 2, 6) | (np.arange(6) == i - 1)} for i in range(1, 7)}
    write_objects(folder / "data_train_3dhp.npz", data=train_3dhp)
    write_objects(folder / "data_test_3dhp.npz", data=test_3dhp)
    data.convert_bvh(bvh_folder, folder, "mocap", "old")
    return folder, SimpleNamespace(space=space, gt=gt, noisy=noisy, eva=eva, eva_2d=eva_2d, train_3dhp=train_3dhp, test_3dhp=test_3dhp)


def plain_camera(world, subject, camera):
    """World points in a camera's frame by its rotation's entries, without data.py's functions."""
    w, x, y, z, *t = data.H36M_EXTRINSICS[subject][camera]
    n = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / n, x / n, y / n, z / n
    R = np.array([[w*w + x*x - y*y - z*z, 2*(x*y - w*z), 2*(x*z + w*y)], [2*(x*y + w*z), w*w - x*x + y*y - z*z, 2*(y*z - w*x)],
                  [2*(x*z - w*y), 2*(y*z + w*x), w*w - x*x - y*y + z*z]])
    return np.einsum("ba,...b->...a", R, world.astype(float) - np.array(t))


PRINTED = {  # the papers' figures as their tables print them, once more
    "gridconv-gt": (37.1,), "gridconv-gt-learnable": (36.4,), "gridconv-hrnet": (47.9, 37.9), "gridconv-hrnet-learnable": (47.6, 37.4),
    "gridconv-gt-uvd": (29.5,), "gridconv-hrnet-uvd": (46.3, 37.6), "gridconv-gt-vanilla": (39.0,), "gridconv-gt-32": (35.0,),
    "gridconv-gt-32-learnable": (33.4,), "gridconv-3dhp-cross": (72.1, 89.2, 57.6), "glagcn-gt-243": (28.5, 22.0),
    "glagcn-cpn-243": (44.4, 34.8), "glagcn-gt-27": (34.4,), "glagcn-gt-81": (31.5,), "glagcn-gt-243-reconstruct": (24.5,),
    "glagcn-gt-243-reconstruct-512": (21.0, 17.6), "glagcn-humaneva-mrcnn": (15.4,), "glagcn-humaneva-gt": (9.2,),
    "glagcn-3dhp-27": (31.36, 98.19, 76.53), "glagcn-3dhp-81": (27.76, 98.53, 79.12)}


def test_rows_quote_the_papers():
    for name, figures in PRINTED.items():
        assert tuple(train.paper_figures(train.RECIPES[name]).values()) == figures, name
    for name in ("glagcn-3dhp-27", "glagcn-3dhp-81"):
        recipe = train.RECIPES[name]
        assert (recipe.channels, recipe.optimizer, recipe.lr, recipe.schedule, recipe.epochs, recipe.batch) == (256, "amsgrad", 1e-3, "3dhp", 50, 256)
        assert recipe.reconstruct and recipe.reconstruct_blocks == 3 and recipe.unshared_weight == 0.5 and not recipe.refine and recipe.ours
        assert recipe.skeleton == "3dhp17" and recipe.flips and recipe.flip_test and not recipe.norm_schedule and recipe.loss == "mpjpe"
        assert math.prod(recipe.filter_widths) == int(name[-2:])
    cross, trained = train.RECIPES["gridconv-3dhp-cross"], train.RECIPES["gridconv-gt-learnable"]
    assert cross.weights == trained.name and cross.skeleton == "h36m17" and cross.normalise == "longest" and cross.ours
    averages = {kind: np.mean([v for row in rows.values() for v in row]) for kind, rows in evaluation.PAPER_HUMANEVA.items()}
    assert averages["detectron_pt_coco"] == pytest.approx(15.4, abs=0.05) and averages["gt"] == pytest.approx(9.2, abs=0.05)


def test_arithmetic_is_that_of_the_products():
    products = 3 * 4 * 281 * 2 * 256 ** 2  # forward and backward, four layers of 281 products with 256 x 256 kernels each
    assert products < train.arithmetic(train.RECIPES["gridconv-gt-vanilla"]) < 1.1 * products
    gla = tiny_recipe(**{**TINY_GLA, "channels": 96, "filter_widths": (3, 3, 3)})
    assert train.arithmetic(dataclasses.replace(gla, filter_widths=(3,) * 4)) == pytest.approx(3 * train.arithmetic(gla), rel=0.05)
    assert train.arithmetic(dataclasses.replace(gla, channels=192)) == pytest.approx(4 * train.arithmetic(gla), rel=0.1)


@pytest.mark.parametrize("name", [n for n, r in train.RECIPES.items() if r.data in ("h36m", "humaneva", "3dhp", "mocap", "synthetic") and not r.weights])
def test_every_recipe_takes_two_steps(name, everything, run_folder):
    published = train.RECIPES[name]
    recipe = dataclasses.replace(published, hidden=4, blocks=1, channels=4, reconstruct_blocks=1, batch=2, micro_batch=0)
    store = store_of(recipe, everything[0])
    run = train.Run(recipe, store, run_folder, torch.device("cpu"))
    before = [p.clone() for p in run.model.parameters()]
    for stage, epoch in enumerate((0, int(published.epochs) - 1)):  # the first and the last epoch: both stages of those that have two
        run.step = epoch * run.epoch_steps + stage
        run.begin_epoch(epoch)
        run.train_step(torch.tensor([0, len(store) - 1]))
        assert run.stage_one == (recipe.reconstruct and stage == 0)
    assert torch.isfinite(run.losses[:2]).all() and run.losses[0] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    if "reconstruct-512" in name:
        assert train.parameters(published) == 48_641_526


STORES = {}


def store_of(recipe, folder, split="train"):
    """The store of a recipe's data, made once for each."""
    key = folder, split, recipe.data, recipe.keypoints, recipe.skeleton, recipe.skip, recipe.normalise, recipe.target
    if key not in STORES:
        STORES[key] = evaluation.make_store(recipe, folder, split, torch.device("cpu"))
    return STORES[key]


@pytest.mark.parametrize("name, train_sequences, test_sequences", [
    ("gridconv-gt", 600, 236), ("gridconv-hrnet-learnable", 600, 224), ("gridconv-gt-32", 600, 236), ("glagcn-gt-243", 600, 236),
    ("glagcn-cpn-243", 600, 236)])
def test_preprocessing_of_human36m_is_the_releases(name, train_sequences, test_sequences, everything):
    folder, raw = everything
    recipe = train.RECIPES[name]
    parts = {split: store_of(recipe, folder, split) for split in ("train", "test")}
    assert [len(parts[split].sequences) for split in parts] == [train_sequences, test_sequences]
    keys = {(s.subject, s.action, s.camera) for s in parts["test"].sequences}
    whole = {(subject, action, camera) for subject in ("S9", "S11") for action in raw.space[subject] for camera in data.H36M_CAMERAS}
    skipped = {("S11", "Directions")} | ({("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")} if "hrnet" in name else set())
    assert whole - keys == {(*key, camera) for key in skipped for camera in ("54138969", "55011271", "58860488", "60457274")}
    assert {s.subject for s in parts["train"].sequences} == {"S1", "S5", "S6", "S7", "S8"}
    joints = slice(None) if recipe.skeleton == "h36m32" else list(data.H36M_17_OF_32)
    for store in parts.values():
        assert len(store) == 5 * len(store.sequences)  # every frame, and of detected 2D no more than the 3D has
        for i, s in enumerate(store.sequences[::7]):
            frames, c = slice(35 * i, 35 * i + 5), data.H36M_CAMERAS.index(s.camera)
            points = plain_camera(raw.space[s.subject][s.action][:, joints], s.subject, c)
            np.testing.assert_allclose(store.target[frames], points - points[:, :1], atol=1e-5)  # the pelvis is the root, metres
            np.testing.assert_allclose(store.root[frames], points[:, 0], atol=1e-5)
            if recipe.skeleton == "h36m32":
                continue
            pixels = (raw.gt if recipe.keypoints == "gt" else raw.noisy)[s.subject][s.action][c][:5, :, :2].astype(float)
            width, height = (1000, 1002) if c in (0, 3) else (1000, 1000)
            want = (pixels - 500) / 500 if recipe.method == "gridconv" else pixels / width * 2 - [1, height / width]
            np.testing.assert_allclose(store.input[frames], want, atol=1e-5)


def test_preprocessing_of_humaneva_and_3dhp(everything):
    folder, raw = everything
    store = store_of(train.RECIPES["glagcn-humaneva-gt"], folder, "test")
    assert len(store.sequences) == 3 * 3 * 3 and {s.action.split(" ")[0] for s in store.sequences} == {"Walking", "Jog"}
    assert {s.subject for s in store_of(train.RECIPES["glagcn-humaneva-gt"], folder).sequences} == {"Train/S1", "Train/S2", "Train/S3"}
    pixels = np.concatenate([raw.eva_2d[s.subject][s.action][data.HUMANEVA_CAMERAS.index(s.camera)] for s in store.sequences])
    np.testing.assert_allclose(store.input, pixels / 640 * 2 - [1, 480 / 640], atol=1e-6)
    store = store_of(train.RECIPES["glagcn-3dhp-27"], folder, "test")
    want = np.concatenate([view["data_3d"] - view["data_3d"][:, 14:15] for view in raw.test_3dhp.values()]) / 1000
    np.testing.assert_allclose(store.target, want, atol=1e-6)
    sizes = [(2048, 2048)] * 4 + [(1920, 1080)] * 2
    want = np.concatenate([v["data_2d"] / w * 2 - [1, h / w] for v, (w, h) in zip(raw.test_3dhp.values(), sizes)])
    np.testing.assert_allclose(store.input, want, atol=1e-5)
    crossed = store_of(train.RECIPES["gridconv-3dhp-cross"], folder, "test")  # H36M joint i is 3DHP's joint order[i]
    order = [14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4]
    np.testing.assert_array_equal(crossed.target, store.target[:, order])
    want = np.concatenate([(v["data_2d"] - [w / 2, h / 2]) / (max(w, h) / 2) for v, (w, h) in zip(raw.test_3dhp.values(), sizes)])
    np.testing.assert_allclose(crossed.input, want[:, order], atol=1e-5)
    assert len(store_of(train.RECIPES["glagcn-3dhp-27"], folder).sequences) == 16 * 8


def test_gridconvs_archives_serve_human36m_rows(everything, tmp_path):
    space = {s: {a: w for a, w in list(actions.items())[:8]} for s, actions in everything[1].space.items()}
    image, _ = {}, None
    for keypoints in ("gt", "hrnet"):
        for split, subjects in data.SPLITS.items():
            eight = {s: {a: np.concatenate((w, w[:3])) for a, w in space[s].items()} for s in subjects}
            image[split], _ = gridconv_archives(tmp_path / "h36m" / keypoints, eight, subjects, split, legacy=keypoints == "gt")
    gt, hrnet = train.RECIPES["gridconv-gt"], train.RECIPES["gridconv-hrnet"]
    assert not train.missing_files(gt, tmp_path) and not train.missing_files(hrnet, tmp_path)
    assert train.missing_files(train.RECIPES["gridconv-gt-32"], tmp_path) == ["data_3d_h36m.npz"]
    assert train.missing_files(gt, tmp_path / "h36m" / "hrnet")  # archives without their keypoints' name may be of any kind
    store = store_of(gt, tmp_path, "test")
    pixels = np.concatenate([p for key, p in image["test"].items() if key[::2] != ("S11", f"Directions.{key[2][-8:]}")])
    np.testing.assert_allclose(store.input.flatten(1), (pixels - 500) / 500, atol=1e-5)
    assert len(store_of(hrnet, tmp_path, "test").sequences) == 2 * 8 * 4 - 4 - 4  # S11 Directions, S9 Greeting of what is there
    lines, unusable = data.check_folder(tmp_path)
    assert unusable == 0 and any(line.startswith("Human3.6M, 2D hrnet: allows GridConv's P1 / P2") for line in lines)


# ---- the main job, whole

TINY_ROWS = dict(hidden=4, blocks=1, channels=4, epochs=0.02, batch=50, filter_widths=(3, 3))


@pytest.fixture
def tiny_rows(monkeypatch, everything):
    """Every published row with a tiny network, and the tables of published frame counts those of the miniatures."""
    rows = {name: dataclasses.replace(recipe, **TINY_ROWS, stage_one_epochs=0.75 * TINY_ROWS["epochs"] * recipe.reconstruct)
            for name, recipe in train.RECIPES.items()}
    monkeypatch.setattr(train, "RECIPES", rows)
    for fields in evaluation._PAPER_MODELS.values():  # these networks stand for the papers'
        for name in fields.keys() & TINY_ROWS.keys():
            monkeypatch.setitem(fields, name, TINY_ROWS[name])

    def genuine():
        monkeypatch.setattr(data, "H36M_FRAMES", {"train": (600 * 5,), "test": (236 * 5, 224 * 5)})
        monkeypatch.setattr(data, "MPI3DHP_VALID", {name: int(v["valid"].sum()) for name, v in everything[1].test_3dhp.items()})
    return genuine


def plain_human36m(model, raw, views, skipped):
    """{action: (MPJPE, P-MPJPE)} of a single-frame model on normalised (p - 500) / 500, and their averages, in plain NumPy."""
    errors, parts = {}, [(s, take, c) for s in ("S9", "S11") for take in raw.space[s] for c in range(4) if (s, take) not in skipped]
    pixels = np.stack([views[s][take][c][:5, :, :2] for s, take, c in parts])
    with torch.no_grad():
        poses = model(torch.tensor((pixels - 500) / 500, dtype=torch.float32).flatten(0, 1)).double().numpy().reshape(-1, 5, 17, 3)
    for (subject, take, c), pose in zip(parts, poses):
        target = plain_camera(raw.space[subject][take][:, data.H36M_17_OF_32], subject, c)
        target -= target[:, :1]
        first = 1000 * np.sqrt(((pose - target) ** 2).sum(-1)).mean(-1)
        second = [_ev_loop_p_mpjpe(p[None], t[None]) for p, t in zip(pose, target)]
        errors.setdefault(take.split(" ")[0], []).extend(zip(first, second))
    actions = {action: np.mean(rows, axis=0) for action, rows in errors.items()}
    return {**actions, "average": sum(actions.values()) / 15}


def table_rows(text):
    """The cells of every table line of a markdown text, by first cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line for line in lines}


def test_main_job_by_independent_arithmetic(tiny_rows, everything, tmp_path, capsys):
    folder, raw = everything
    options = lambda recipe: recipe
    job = lambda out, only, **more: train.reproduce(folder, out, "cpu", only, **{**dict(everything=False, seeds=1, quick=False, options=options), **more})
    table = job(tmp_path / "other", "gridconv-hrnet-learnable")  # not Human3.6M: no paper's figure beside it
    report = (tmp_path / "other" / "report.md").read_text()
    assert "not Human3.6M: 3,000 frames" in table and "within" not in report and not json.loads((tmp_path / "other" / "report.json").read_text())["rows"]
    assert not re.search(r"\b(47\.60?|37\.40?|43\.10|63\.90)\b", report + capsys.readouterr().out)

    tiny_rows()
    out = tmp_path / "results"
    job(out, "gridconv-hrnet-learnable,gridconv-gt", seeds=2)
    said = capsys.readouterr().out
    assert "gridconv-gt-seed-1" in said and "to run" in said and "minutes" in said
    kept, report = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert [r["recipe"]["name"] for r in kept["runs"]] == ["gridconv-gt"] * 2 + ["gridconv-hrnet-learnable"] * 2  # the headline row first
    assert {(r["recipe"], r["figure"][:5]): r["paper"] for r in kept["rows"]} == {
        ("gridconv-gt", "MPJPE"): 37.1, ("gridconv-hrnet-learnable", "MPJPE"): 47.6, ("gridconv-hrnet-learnable", "P-MPJ"): 37.4}
    skipped = {("S11", "Directions"), ("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}
    for name, views, left_out in (("gridconv-gt", raw.gt, {("S11", "Directions")}), ("gridconv-hrnet-learnable", raw.noisy, skipped)):
        measured = []
        for seed, ending in enumerate(("", "-seed-1")):
            run = next(r for r in kept["runs"] if r["recipe"]["name"] == name and r["seed"] == seed)
            assert run["data"] == run["test_data"] == "Human3.6M" and run["torch"] == torch.__version__ and "thread" in run["device"]
            assert run["test_frames"] == 5 * (240 - 4 * len(left_out))
            for which in ("best", "last"):
                plain = plain_human36m(evaluation.load_model(out / (name + ending) / f"{which}.pt"), raw, views, left_out)
                assert [run[which]["mpjpe"], run[which]["p_mpjpe"]] == pytest.approx(plain["average"], rel=1e-4)
                for action in evaluation.ACTIONS:
                    assert [run[which]["actions"][action][m] for m in ("mpjpe", "p_mpjpe")] == pytest.approx(plain[action], rel=1e-4)
                if which == "best":
                    measured.append(plain["average"])
        row = next(r for r in kept["rows"] if r["recipe"] == name and r["figure"].startswith("MPJPE"))
        mean = (measured[0][0] + measured[1][0]) / 2
        assert row["best epoch"] == pytest.approx(mean, rel=1e-4) and row["difference"] == pytest.approx(mean - row["paper"], rel=1e-4)
        assert row["spread"] == pytest.approx(abs(measured[0][0] - measured[1][0]), rel=1e-2, abs=0.01) and row["within tolerance"] is False
        assert row["seeds"] == [0, 1]
        line = next(line for line in report.splitlines() if line.startswith(f"| {name} ") and "MPJPE, mm" in line)
        assert f"{mean:.2f}" in line and f"{mean - row['paper']:+.2f}" in line and "| no " in line
    section = report[report.index("## gridconv-hrnet-learnable, seed 1"):]
    assert section.startswith("## gridconv-hrnet-learnable, seed 1: GridConv Table 1 and A, P1 / P2") and "cells differ from the prior" in section
    row = table_rows(section[:section.index("| subject")])["SittingDown"]
    assert row[2] == f"{kept['runs'][3]['best']['actions']['SittingDown']['mpjpe']:.2f}"
    assert row[3] == "63.90" and row[5] == "52.50"

    before = (out / "gridconv-gt" / "last.pt").stat().st_mtime_ns
    job(out, "gridconv-gt,gridconv-hrnet-learnable", seeds=2)  # nothing is done twice
    assert capsys.readouterr().out.count(" done ") == 4 and (out / "gridconv-gt" / "last.pt").stat().st_mtime_ns == before
    recipe = train.RECIPES["gridconv-gt"]
    assert train.is_done(recipe, folder, out / "gridconv-gt") and not train.is_done(dataclasses.replace(recipe, lr=1.0), folder, out / "gridconv-gt")
    os.utime(folder / "data_3d_h36m.npz", (1, 1))  # other data, though older than the result
    assert not train.is_done(recipe, folder, out / "gridconv-gt")


def test_cross_dataset_3dhp_and_humaneva_rows(tiny_rows, everything, tmp_path, capsys):
    folder, raw = everything
    tiny_rows()
    names = "gridconv-3dhp-cross,glagcn-3dhp-27,glagcn-humaneva-gt,glagcn-gt-243-reconstruct"
    train.reproduce(folder, tmp_path, "cpu", names, False, 1, False, lambda recipe: dataclasses.replace(recipe, eval_every=10 ** 6))
    kept, report = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    runs = {r["recipe"]["name"]: r for r in kept["runs"]}
    assert set(runs) == {*names.split(","), "gridconv-gt-learnable"}  # what the cross-dataset row evaluates was trained first
    valid = np.concatenate([v["valid"] == 1 for v in raw.test_3dhp.values()])
    target = np.concatenate([v["data_3d"] - v["data_3d"][:, 14:15] for v in raw.test_3dhp.values()])
    scene = np.concatenate([np.full(6, name) for name in raw.test_3dhp])

    def plain_scores(pose, chosen):  # millimetres, 3DHP's joint order
        errors = [[math.dist(p, t) for p, t in zip(a, b)] for a, b in zip(pose[chosen], target[chosen])]
        share = lambda threshold: 100 * np.mean([error < threshold for frame in errors for error in frame[:14]])
        return {"mpjpe": np.mean(errors), "pck_14": share(150), "auc_14": np.mean([share(t) for t in range(0, 151, 5)]),
                "pck": 100 * np.mean(np.array(errors) < 150)}
    sizes = [(2048, 2048)] * 4 + [(1920, 1080)] * 2
    order = [14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4]
    for name in ("gridconv-3dhp-cross", "glagcn-3dhp-27"):
        crossed = name == "gridconv-3dhp-cross"
        model = evaluation.load_model(tmp_path / ("gridconv-gt-learnable" if crossed else name) / "last.pt")
        poses = []
        for view, (w, h) in zip(raw.test_3dhp.values(), sizes):
            if crossed:
                pixels = (view["data_2d"][:, order] - [w / 2, h / 2]) / (max(w, h) / 2)
                with torch.no_grad():
                    pose = np.empty((6, 17, 3))
                    pose[:, order] = model(torch.tensor(pixels, dtype=torch.float32)).numpy()
            else:
                pixels = np.pad(view["data_2d"] / w * 2 - [1, h / w], [(4, 4), (0, 0), (0, 0)], mode="edge")
                windows = torch.tensor(np.stack([pixels[i:i + 9] for i in range(6)]), dtype=torch.float32)
                swap = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 14, 15, 16]
                with torch.no_grad():
                    pose = (model(windows) + model((windows * torch.tensor([-1.0, 1]))[:, :, swap])[:, swap] * torch.tensor([-1.0, 1, 1])).numpy() / 2
            pose[:, 14] = 0
            poses.append(1000 * pose)
        last = runs[name]["last"]
        for scores, chosen in ((last["all"], valid), (last["sequences"]["TS2"], valid & (scene == "TS2")),
                               (last["scenes"]["outdoor"], valid & ((scene == "TS5") | (scene == "TS6")))):
            plain = plain_scores(np.concatenate(poses), chosen)
            assert {k: scores[k] for k in plain} == pytest.approx(plain, rel=1e-4) and scores["frames"] == chosen.sum()
        figures = {r["figure"]: r for r in kept["rows"] if r["recipe"] == name}
        assert [r["paper"] for r in figures.values()] == list(PRINTED[name]) and runs[name]["test_data"] == "MPI-INF-3DHP test set"
        plain = plain_scores(np.concatenate(poses), valid)
        assert figures["PCK, %"]["last epoch"] == pytest.approx(plain["pck_14"]) and figures["AUC, %"]["last epoch"] == pytest.approx(plain["auc_14"])
    assert runs["gridconv-3dhp-cross"]["test_frames"] == valid.sum() and runs["gridconv-3dhp-cross"]["yardsticks"]["affine"] is None

    eva = runs["glagcn-humaneva-gt"]
    row = next(r for r in kept["rows"] if r["recipe"] == "glagcn-humaneva-gt")
    cells = [eva["best"]["cells"][action][f"Validate/S{i}"]["p_mpjpe"] for action in ("Walking", "Jog") for i in (1, 2, 3)]
    assert row["paper"] == 9.2 and row["best epoch"] == pytest.approx(sum(cells) / 6)
    assert eva["best"]["cells"]["Walking"]["Validate/S2"]["frames"] == 3 * (3 + 5)  # cameras, both chunks
    assert table_rows(report[report.index("GLA-GCN's Table 2, which"):])["Jog"][1:] == ["10.10", "8.20", "9.90"]
    refined = [r for r in kept["rows"] if r["recipe"] == "glagcn-gt-243-reconstruct"]
    assert [r["figure"] for r in refined] == ["MPJPE, mm", f"MPJPE, mm, {train.REFINED}"] and refined[1]["best epoch"] is None
    assert refined[1]["last epoch"] == runs["glagcn-gt-243-reconstruct"][train.REFINED]["mpjpe"] and "true root position" in report
    (tmp_path / "gridconv-gt-learnable" / "result.json").unlink()
    with pytest.raises(InputError, match="first: python train.py gridconv-gt-learnable"):
        train.run_recipe(train.RECIPES["gridconv-3dhp-cross"], folder, tmp_path / "gridconv-3dhp-cross", "cpu")


def test_which_rows_run(everything, tmp_path):
    folder = everything[0]
    assert train.rows_to_run(folder) == list(train.HEADLINE) and train.rows_to_run(tmp_path) == list(train.EMBEDDED)
    every = train.rows_to_run(folder, everything=True)
    assert every[:3] == list(train.HEADLINE) and set(PRINTED) - set(every) == set(train.ONLY_BY_NAME) and len(set(every)) == len(every)
    assert every.index("gridconv-gt-learnable") < every.index("gridconv-3dhp-cross")
    assert train.rows_to_run(folder, train.ONLY_BY_NAME[0]) == [train.ONLY_BY_NAME[0]]
    assert train.rows_to_run(folder, "gridconv-3dhp-cross") == ["gridconv-gt-learnable", "gridconv-3dhp-cross"]
    (tmp_path / "data_test_3dhp.npz").write_bytes((folder / "data_test_3dhp.npz").read_bytes())
    assert not train.missing_files(train.RECIPES["gridconv-3dhp-cross"], tmp_path) and train.missing_files(train.RECIPES["glagcn-3dhp-27"], tmp_path)
    assert train.rows_to_run(tmp_path, everything=True) == list(train.EMBEDDED)  # 3DHP's test set alone trains nothing
    for only, says in (("gridconv-gt", "gridconv-gt needs data_3d_h36m.npz"), ("gridconv-gtt", "unknown 'gridconv-gtt'")):
        with pytest.raises(InputError, match=says):
            train.rows_to_run(tmp_path, only)
    recipes = [train.RECIPES["gridconv-hrnet"], tiny_recipe(name="mine"), train.RECIPES["glagcn-gt-243"]]
    results = [{"recipe": dataclasses.asdict(recipe), "data": "x", "seed": 0} for recipe in recipes]
    assert [group[0]["recipe"]["name"] for group in train.by_recipe(results)] == ["glagcn-gt-243", "gridconv-hrnet", "mine"]  # headlines first
    quick = train.quickened(train.RECIPES["glagcn-gt-243-reconstruct"])
    assert (quick.epochs, quick.stage_one_epochs) == (8, 6) and train.quickened(train.RECIPES["gridconv-gt-learnable"]).noise_epochs == 3
    assert train.settings_changed(dataclasses.asdict(quick)).startswith("noise_epochs 3.0 (published: 30.0)")
    assert not train.settings_changed(json.loads(json.dumps(dataclasses.asdict(train.RECIPES["gridconv-gt"]))))


def test_list_says_what_is_present_and_what_it_costs(tiny_rows, everything, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "step_seconds", lambda recipe, store, device, steps: (2.0, 1))
    shown = ("gridconv-gt", "gridconv-3dhp-cross", "glagcn-3dhp-81", "glagcn-cpn-243", "glagcn-humaneva-gt")
    monkeypatch.setattr(train, "RECIPES", {name: train.RECIPES[name] for name in shown})
    train.list_recipes(everything[0], "cpu")
    text = capsys.readouterr().out
    rows = table_rows(text)
    assert all(rows[name][4] == "yes" for name in shown) and rows["gridconv-3dhp-cross"][2] == "72.1 / 89.2 / 57.6"
    recipe = train.RECIPES["glagcn-3dhp-81"]
    samples = 2 * 16 * 8 * 2  # flips, sequences, cameras, frames
    assert float(rows[recipe.name][6].replace(",", "")) == pytest.approx(samples * train.arithmetic(recipe) / 1e12, rel=1e-3)
    assert rows["glagcn-3dhp-81"][8].startswith("lambda 0.5") and "within 0.5" in text and train.device_name(torch.device("cpu")) in text
    recipe = train.RECIPES["gridconv-gt"]  # two seconds for 50 samples
    assert float(rows[recipe.name][7]) == pytest.approx(recipe.epochs * 3000 / 50 * 2 / 3600, rel=1e-2)
    train.list_recipes(tmp_path, "cpu")
    rows = table_rows(capsys.readouterr().out)
    assert rows["glagcn-cpn-243"][4] == "no: data_3d_h36m.npz, data_2d_h36m_cpn_ft_h36m_dbb.npz" and rows["glagcn-humaneva-gt"][6] == "-"
    recipe = train.RECIPES["glagcn-cpn-243"]  # as published, where the data is not here
    assert float(rows[recipe.name][6].replace(",", "")) == pytest.approx(2 * 1_559_752 * train.arithmetic(recipe) / 1e12, rel=1e-3)


def test_reproduce_sh_on_a_miniature(everything, tmp_path):
    folder = everything[0]
    shell = lambda *options, data=folder: subprocess.run(
        ["bash", HERE / "reproduce.sh", *options], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "DATA": str(data), "RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"})
    tiny = ("--hidden", "4", "--blocks", "1", "--channels", "4", "--filter-widths", "3,3", "--epochs", "0.2", "--batch", "50", "--quick")
    done = shell(*tiny)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("gridconv-gt-quick ") < done.stdout.index("gridconv-gt-learnable-quick ") < done.stdout.index("glagcn-gt-243-quick ")
    assert "of training, from one short timing" in done.stdout and "a tenth of the epochs" in done.stdout and "not Human3.6M: 3,000 frames" in done.stdout
    report = (tmp_path / "results" / "report.md").read_text()
    assert not re.search(r"\b(37\.10?|36\.40?|28\.50?|26\.50|22\.00?)\b", report) and "epochs 0.02 (published: 100.0)" in report
    bad = shell("--only", "gridconv-gt", data=tmp_path)
    assert bad.returncode == 2 and "needs data_3d_h36m.npz" in bad.stderr and bad.stderr.count("\n") == 1 and bad.stdout == ""
    for options, says in ((["--only", "gridconv-gtt"], "unknown 'gridconv-gtt'"), (["--frob"], "--frob"), (["--seeds", "0"], "--seeds 0"),
                          (["--hidden", "x"], "--hidden")):
        with pytest.raises(InputError, match=says):
            train.main(["reproduce", "--data", str(folder), "--out", str(tmp_path / "none"), *options])
    assert sum(1 for _ in open(HERE / "reproduce.sh")) < 150


# ---- bad input, in every layout

def _broken(draw, value):
    """A copy of a nested value with one part, drawn at random, replaced by something else."""
    other = st.sampled_from([None, 3, "x", [], {}, [[1], [2, 3]], np.zeros(3), np.full((5, 17, 3), np.nan), np.zeros((0, 17, 3)),
                             np.zeros((5, 16, 2)), np.array([None, "a"]), np.zeros((5, 17, 2), complex), float("inf")])
    if isinstance(value, (dict, list)) and len(value) and draw(st.integers(0, 5)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        copied = copy.copy(value)
        if isinstance(value, dict) and not draw(st.integers(0, 5)):
            copied["odd" if draw(st.booleans()) else 7] = copied.pop(key)
        else:
            copied[key] = _broken(draw, value[key])
        return copied
    return draw(other)


@settings(max_examples=100)
@given(st.data())
def test_files_of_any_other_structure_end_in_one_line(tmp_path_factory, everything, pick):
    raw, folder = everything[1], tmp_path_factory.mktemp("broken")
    few = lambda nested, keys: {key: dict(list(nested[key].items())[:2]) for key in keys}
    subjects, people = ("S9", "S11"), [f"Validate/S{i}" for i in (1, 2, 3)]
    image, space = gridconv_archives(folder / "gt", {s: {a: np.tile(w, (2, 1, 1))[:8] for a, w in few(raw.space, subjects)[s].items()}
                                                     for s in subjects}, subjects, "test", False)
    files = {"data_3d_h36m.npz": {"positions_3d": few(raw.space, subjects)}, "data_2d_h36m_gt.npz": {"positions_2d": few(raw.gt, subjects)},
             "data_3d_humaneva15.npz": {"positions_3d": few(raw.eva, people)}, "data_2d_humaneva15_gt.npz": {"positions_2d": few(raw.eva_2d, people)},
             "data_test_3dhp.npz": {"data": raw.test_3dhp}, "gt/test_custom_2d_unnorm.pth.tar": image, "gt/test_custom_3d_unnorm.pth.tar": space}
    name = pick.draw(st.sampled_from(list(files)))
    files[name] = _broken(pick.draw, files[name])
    for path, value in files.items():
        if path.endswith(".tar"):
            torch.save(value, folder / path)
        elif isinstance(value, dict):
            write_objects(folder / path, **{str(k): v for k, v in value.items()})
        else:
            np.savez(folder / path, np.zeros(3))
    kind = {"h36m": "h36m", "huma": "humaneva", "3dhp": "3dhp", "unno": "gridconv"}[re.search("h36m|huma|3dhp|unno", name)[0]]
    recipe = recipe_of(data=kind, skeleton={"humaneva": "humaneva15", "3dhp": "3dhp17"}.get(kind, "h36m17"))
    try:
        wanted = SimpleNamespace(**vars(recipe), normalise="width", target="camera", cameras="recorded", noise=0.0, missing=0.0,
                                 swap_sides=False)
        store = evaluation.make_store(wanted, folder, "test", torch.device("cpu"))
        assert torch.isfinite(store.input).all() and torch.isfinite(store.target).all()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("change, says", [
    (lambda f: (f / "data_3d_humaneva15.npz").unlink(), "data_3d_humaneva15.npz: not found; register at"),
    (lambda f: (f / "data_2d_humaneva15_gt.npz").write_bytes(b""), "data_2d_humaneva15_gt.npz: cannot be read"),
    (lambda f: (f / "data_2d_humaneva15_gt.npz").write_bytes((f / "data_2d_humaneva15_gt.npz").read_bytes()[:900]), "data_2d_humaneva15_gt.npz: cannot be read"),
    (lambda f: np.savez(f / "data_3d_humaneva15.npz"), "no dictionary under the key 'positions_3d'"),
    (lambda f: write_objects(f / "data_3d_humaneva15.npz", positions_3d={"Train/S1": Hostile()}), "system, which is refused"),
    (lambda f: write_objects(f / "data_3d_humaneva15.npz", positions_3d={"Train/S1": None}), "Train/S1 is no dictionary of actions"),
    (lambda f: write_objects(f / "data_3d_humaneva15.npz", positions_3d={"Train/S1": {7: np.zeros((3, 15, 3))}}), "it holds no 7"),
    (lambda f: damage(f, "3d", lambda a: np.full_like(a, np.nan)), "Train/S2 Walking 1 chunk1: 3D, frame 0: NaN"),
    (lambda f: damage(f, "3d", lambda a: a[:0]), "Train/S2 Walking 1 chunk1 camera C1: no frames; remove the sequence"),
    (lambda f: damage(f, "2d", lambda views: views[:2]), "Train/S2 Walking 1 chunk1 has 2 cameras, expected 3"),
    (lambda f: damage(f, "2d", lambda views: [v[:3] for v in views]), "2D has 3 frames, 3D has 5; make both from the same recording"),
    (lambda f: damage(f, "2d", lambda views: [v[:, :14] for v in views]), "2D has 14 joints, 3D has 15"),
    (lambda f: damage(f, "2d", lambda views: None), "Train/S2 Walking 1 chunk1 has no list of cameras")])
def test_bad_humaneva_files_end_the_command_in_one_line(everything, tmp_path, capsys, change, says):
    for name in ("data_3d_humaneva15.npz", "data_2d_humaneva15_gt.npz"):
        (tmp_path / name).write_bytes((everything[0] / name).read_bytes())
    change(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.run(lambda: train.main(["glagcn-humaneva-gt", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--channels", "4"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error and not (tmp_path / "out").exists()


def damage(folder, kind, change):
    """Change one chunk of a HumanEva file."""
    path = folder / ("data_3d_humaneva15.npz" if kind == "3d" else "data_2d_humaneva15_gt.npz")
    value = data.read_npz(path)[f"positions_{kind}"].item()
    value["Train/S2"]["Walking 1 chunk1"] = change(value["Train/S2"]["Walking 1 chunk1"])
    write_objects(path, **{f"positions_{kind}": value})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to take its own permission away")
def test_a_folder_without_permission_is_named(everything, tmp_path):
    (tmp_path / "data").mkdir(mode=0o700)
    tmp_path.parent.chmod(0o755), tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        for call in (lambda: data.check_folder(tmp_path / "data"), lambda: train.rows_to_run(tmp_path / "data"), lambda: train.list_recipes(tmp_path / "data", "cpu"),
                     lambda: data.load_dataset(recipe_of(), tmp_path / "data", "test")):
            with pytest.raises(InputError, match="data: cannot be listed .Permission denied.; name a data folder that you may read"):
                call()
    finally:
        os.seteuid(0)


def test_check_says_what_is_found_allowed_and_missing(everything, tmp_path):
    lines, unusable = data.check_folder(everything[0])
    text = "\n".join(lines)
    assert unusable == 0 and "not here" not in text and "missing" not in text
    for found in ("Human3.6M, 2D gt: allows GridConv's P1* rows", "Human3.6M, 32 joints, 2D gt: allows GridConv's 32-joint rows (Table 6)",
                  "test: 224 sequences, 1,120 frames", "train: 600 sequences, 3,000 frames; files in Human3.6M layout (not Human3.6M",
                  "HumanEva-I, 2D detectron_pt_coco: allows GLA-GCN's MRCNN row", "MPI-INF-3DHP, 2D gt: allows GLA-GCN's rows"):
        assert found in text, found
    for name in ("data_test_3dhp.npz", "data_2d_h36m_gt.npz", "data_3d_h36m.npz"):
        (tmp_path / name).write_bytes((everything[0] / name).read_bytes())
    lines, unusable = data.check_folder(tmp_path)  # 3DHP's test set alone is no fault
    text = "\n".join(lines)
    assert unusable == 0 and "missing: data_train_3dhp.npz; register at https://vcai.mpi-inf.mpg.de" in text and "test: 6 sequences, 36 frames" in text
    assert "missing: data_2d_h36m_hrnet.npz; fetch the archive" in text
    (tmp_path / "data_2d_h36m_detectron.npz").write_bytes(b"")
    lines, unusable = data.check_folder(tmp_path)
    assert unusable == 2 and "Human3.6M, 2D detectron: allows no published row; any recipe with --keypoints detectron" in lines
    names = {one[1:4] for one in data.SETS}
    for recipe in train.RECIPES.values():
        assert not train.paper_figures(recipe) or recipe.weights or (recipe.data, recipe.keypoints, recipe.skeleton) in names, recipe.name


# ---------------------------------------------------------------------------------------------------------------------
# README.md


def test_readme_example_runs_and_its_commands_exist():
    text = (HERE / "README.md").read_text()
    assert "@@" not in text
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(example, "README.md", "exec"), {})
    named = re.findall(r"python train\.py (\w[\w-]*)(?: (\w[\w-]*))?", text)
    assert len(named) > 10
    for first, second in named:
        assert first in {*train.RECIPES, "bench", "ablate", "report", "reproduce"} and (first != "ablate" or second in train.ABLATIONS)


def test_readme_names_a_test_for_every_promise():
    text = (HERE / "README.md").read_text()
    promises = re.search(r"## Promises about files and interrupted runs\n(.*?)\n## ", text, re.S)[1]
    named = re.findall(r"`(test_\w+)`", promises)
    assert len(named) >= 14 and all(callable(globals()[name]) for name in named)


def test_readme_names_every_field_where_paper_and_release_differ():
    text = (HERE / "README.md").read_text()
    fields = {field.name for field in dataclasses.fields(train.Recipe)}
    for name in ("padding", "anneal_epochs", "norm_schedule", "jitter", "skip"):
        assert name in fields and f"`{name}" in text
