"""GridConv, whole: "3D Human Pose Lifting with Grid Convolution", Kang, Liu, Yao, Wang, Wu, AAAI
2023.

A skeleton is woven onto a small grid (SGT), real convolutions lift the 2D grid pose to 3D, and
the inverse SGT unravels it again. This file needs torch alone; copy it into any project:

    net = GridLiftingNetwork()                   # 17 Human3.6M joints, 5 x 5, 4.79 M parameters
    pose_3d = net(pose_2d)                       # (B, 17, 2) in about [-1, 1] -> (B, 17, 3) metres
    loss = (pose_3d - target).square().mean()    # Eq. 10; the target is root-relative

The parts stand in the paper's order: 1. SGT and its inverse (Eq. 1-3, 11-12), 2. AutoGrids (Eq.
4-5), 3. GridConv and D-GridConv (Eq. 6-8), 4. the grid lifting network (Eq. 9), 5. the authors'
weights, 6. variants, 7. Temporal GridConv (B.3), 8. training together with a 2D detector (A.6),
9. lifters without a grid (A.5). Shapes: B batch, J joints, H x P grid, C channels, K kernel size,
T frames.
"""

import math
import re
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

# (parent, child) links of the 17-joint Human3.6M skeleton: 0 pelvis, 1-3 right leg, 4-6 left leg,
# 7 spine, 8 thorax, 9 neck/nose, 10 head, 11-13 left arm, 14-16 right arm.
H36M_EDGES = ((0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9), (9, 10),
              (8, 11), (11, 12), (12, 13), (8, 14), (14, 15), (15, 16))

# Figure 2: the torso is the anchor, kinematic chains run downwards, peers stand side by side.
HANDCRAFTED_5X5 = ((7, 7, 7, 7, 7),
                   (0, 8, 8, 8, 0),
                   (1, 14, 9, 11, 4),
                   (2, 15, 9, 12, 5),
                   (3, 16, 10, 13, 6))

# What the release trained with: the middle cell holds the mean of joints 8 and 9 going in, and is
# ignored coming out.
RELEASED_5X5 = (*HANDCRAFTED_5X5[:2],
                (1, 14, (8, 9), 11, 4),
                *HANDCRAFTED_5X5[3:])

# Table 6, 32 joints. The paper does not print its layout; this one is ours and satisfies Eq. 2
# and 3: arms above, head between them, legs below.
HANDCRAFTED_7X5 = ((29, 28, 21, 22, 23),
                   (26, 27, 20, 19, 18),
                   (25, 30, 14, 13, 17),
                   (24, 31, 15, 12, 16),
                   (12, 1, 0, 6, 7),
                   (3, 2, 11, 12, 8),
                   (4, 5, 0, 10, 9))


# --------------------------------------------------------------------------------------------------
# 1. Semantic grid transformation (section 3.1, A.1)


def check_fits(name, grid_shape, num_joints):
    """ValueError unless the grid has as many cells as there are joints."""
    H, P = grid_shape
    if H * P < num_joints:
        raise ValueError(f"{name}: {H} x {P} = {H * P} cells cannot hold {num_joints} joints")


def assignment_matrix(layout, num_joints):
    """The assignment matrix S (H*P, J) of a grid layout (section 3.1).

    layout: H rows of P cells; a cell is a joint, or a tuple of joints whose mean it holds. Rows
    of S sum to 1 (Eq. 3), and S is binary unless a cell averages.
    ValueError: rows of different length, an unknown joint, an empty cell, fewer cells than
    joints, a joint without a cell of its own.
    """
    widths = [len(row) for row in layout]
    if not widths or widths[0] == 0 or len(set(widths)) > 1:
        raise ValueError(f"layout: every row needs the same number of cells, found {widths}")
    check_fits("layout", (len(widths), widths[0]), num_joints)

    S, alone = [], set()
    for cell in (cell for row in layout for cell in row):
        joints = cell if isinstance(cell, (tuple, list)) else (cell,)
        unknown = [j for j in joints if not hasattr(j, "__index__") or not 0 <= j < num_joints]
        if unknown or not joints:
            raise ValueError(f"layout: unknown or empty cell {cell!r}, not of 0..{num_joints - 1}")
        S.append([joints.count(joint) / len(joints) for joint in range(num_joints)])
        alone |= set(joints) if len(set(joints)) == 1 else set()
    missing = [joint for joint in range(num_joints) if joint not in alone]
    if missing:
        raise ValueError(f"layout: no cell for joint {missing}; every joint needs one of its own")
    return torch.tensor(S)


def outside_autocast(x):
    """A context whose products are not rounded to bfloat16: of a metre, that takes millimetres."""
    return torch.autocast(x.device.type, enabled=False)


def sgt(pose, S, grid_shape):
    """SGT, Eq. 1: D = S G. pose (B, J, C), S (H*P, J) -> grid pose (B, C, H, P)."""
    with outside_autocast(pose):
        grid = F.linear(pose.transpose(1, 2), S.to(pose.dtype))  # (B, C, H*P)
    return grid.unflatten(2, grid_shape)


def inverse_sgt(grid, S):
    """Inverse SGT, Eq. 11-12: each joint is the mean of its cells. (B, C, H, P), S -> (B, J, C).

    Cells that average joints (entries of S strictly between 0 and 1) are left out; a joint that no
    cell holds, as AutoGrids may produce while it learns, comes out 0.
    """
    S = S.to(grid.dtype)
    S = S * (S == S.round())  # keeps the zeros, whose gradient tells AutoGrids what to add
    count = S.sum(0).clamp(min=1)
    with outside_autocast(grid):
        pose = grid.flatten(2) @ (S / count)  # (B, C, J)
    return pose.transpose(1, 2)


def satisfies_topology(S, grid_shape, edges=H36M_EDGES):
    """Whether S (H*P, J) keeps the skeleton: each cell holds one joint (Eq. 3), and linked joints
    are adjacent somewhere (Eq. 2)."""
    if not (((S == 0) | (S == 1)).all() and (S.sum(1) == 1).all()):
        return False
    joints = S.argmax(1).view(*grid_shape)
    beside = torch.stack([joints[:, :-1], joints[:, 1:]], -1).flatten(0, 1)
    below = torch.stack([joints[:-1], joints[1:]], -1).flatten(0, 1)
    adjacent = {frozenset(pair) for pair in torch.cat([beside, below]).tolist()}
    return all(frozenset(edge) in adjacent for edge in edges)


def random_layout(num_joints, grid_shape, seed=0):
    """A random layout (nested tuple) with every joint at least once (section 4.5, Table 5); the
    same seed gives the same layout. ValueError: fewer cells than joints."""
    check_fits("grid_shape", grid_shape, num_joints)
    spare = math.prod(grid_shape) - num_joints
    generator = torch.Generator().manual_seed(seed)
    repeats = torch.randint(num_joints, (spare,), generator=generator, device="cpu")
    joints = torch.cat([torch.arange(num_joints, device="cpu"), repeats])
    order = torch.randperm(len(joints), generator=generator, device="cpu")
    return tuple(tuple(row) for row in joints[order].view(*grid_shape).tolist())


def shuffle_layout(layout, how, seed=0):
    """The layout with its rows, columns or cells permuted (Table B): "row", "column" or
    "global"."""
    H, P = len(layout), len(layout[0])
    counts = {"row": H, "column": P, "global": H * P}
    if how not in counts:
        raise ValueError(f"how: unknown shuffle {how!r}, expected 'row', 'column' or 'global'")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(counts[how], generator=generator, device="cpu").tolist()
    if how == "row":
        return tuple(tuple(layout[i]) for i in order)
    if how == "column":
        return tuple(tuple(row[j] for j in order) for row in layout)
    cells = [cell for row in layout for cell in row]
    return tuple(tuple(cells[i] for i in order[r * P:r * P + P]) for r in range(H))


# --------------------------------------------------------------------------------------------------
# 2. AutoGrids: the learnable SGT (section 3.2, A.3)


def one_hot_rows(scores):
    """1 where a row's largest score is, 0 elsewhere."""
    return torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)


class AutoGrids(nn.Module):
    """A learnable assignment matrix: forward() -> S (H*P, J), exactly one-hot rows with
    straight-through gradients (Eq. 4-5).

    prior: where S_prob starts: "handcrafted" (one-hot; 17 joints on 5 x 5, 32 on 7 x 5), "random"
    (uniform in [0, 1), the paper's choice for other sizes), or a layout (one-hot). S_prob are
    logits. In training with `noise` on, one Gumbel sample is added per forward; the caller
    switches `noise` off (the paper after epoch 30). Nothing is random in evaluation.
    ValueError: fewer cells than joints, an unknown prior, a prior that does not fit or averages.
    """

    def __init__(self, num_joints=17, grid_shape=(5, 5), prior="handcrafted"):
        super().__init__()
        check_fits("grid_shape", grid_shape, num_joints)
        H, P = self.grid_shape = tuple(grid_shape)
        if prior == "handcrafted":
            designed = {(17, 5, 5): HANDCRAFTED_5X5, (32, 7, 5): HANDCRAFTED_7X5}
            prior = designed.get((num_joints, H, P), "none handcrafted")
        if prior == "random":
            S = torch.rand(H * P, num_joints)
        elif isinstance(prior, str) or [len(row) for row in prior] != [P] * H:
            raise ValueError(f"prior: {prior!r}, expected 'random' or a layout of {H} rows of {P}")
        elif any(isinstance(cell, (tuple, list)) for row in prior for cell in row):
            raise ValueError("prior: a cell averages joints; AutoGrids takes one joint a cell")
        else:
            S = assignment_matrix(prior, num_joints)
        self.s_prob = nn.Parameter(S)
        self.noise = True

    def forward(self):
        """S (H*P, J): a sample with noise in training, the most probable assignment otherwise."""
        soft = self.s_prob
        if self.training and self.noise:
            soft = soft - torch.empty_like(soft).exponential_().log()  # Eq. 4: Gumbel(0, 1) noise
        relaxed = soft.softmax(1)  # temperature 1 (A.3)
        # Eq. 5, straight-through. The bracket is exactly 0, which F.gumbel_softmax(hard=True) does
        # not promise: its rows can come out as 1 - 6e-8, and Eq. 11 counts entries equal to 1.
        return one_hot_rows(soft) + (relaxed - relaxed.detach())

    @torch.no_grad()
    def assignment(self):
        """The current binary S (H*P, J), without noise."""
        return one_hot_rows(self.s_prob)

    def dropped(self):
        """The joints that no cell of the current assignment holds, as a list."""
        return (self.assignment().sum(0) == 0).nonzero().flatten().tolist()


# --------------------------------------------------------------------------------------------------
# 3. GridConv (Eq. 6) and D-GridConv (Eq. 7-8)

# Taken at a time, with gradients and without: what they read then stays where it is found quickly.
CPU_SAMPLES = {True: 100, False: 12}


def padding_pairs(padding):
    """The (vertical, horizontal) modes of each branch. ValueError: anything but names and pairs."""
    modes = ("circular", "replicate", "zeros")
    entries = () if isinstance(padding, str) else padding
    pairs = [(entry, entry) if isinstance(entry, str) else tuple(entry) for entry in entries]
    if not pairs or any(len(pair) != 2 or not set(pair) <= set(modes) for pair in pairs):
        raise ValueError(f"padding: {padding!r}, expected a tuple: a name of {modes} or a "
                         "(vertical, horizontal) pair of these for each branch")
    return pairs


def pad(x, radius, vertical, horizontal):
    """x (B, C, H, P) with `radius` more cells on every side: (B, C, H + 2 radius, P + 2 radius)."""
    for dim, mode in ((2, vertical), (3, horizontal)):
        size = x.shape[dim]
        index = torch.arange(-radius, size + radius, device=x.device)
        inside = index % size if mode == "circular" else index.clamp(0, size - 1)
        x = x.index_select(dim, inside)
        if mode == "zeros":
            x = x * (index == inside).view(-1, *[1] * (3 - dim))
    return x


def read_cells(grid_shape, K, modes):
    """Which cell each tap reads from each cell: 0/1 (H*P, K*K, H*P), found by padding and unfolding
    the cells' numbers. On the CPU, whatever the default device."""
    cells = math.prod(grid_shape)
    numbers = torch.arange(1.0, cells + 1, device="cpu").view(1, 1, *grid_shape)
    numbers = F.unfold(pad(numbers, K // 2, *modes), K)[0].T.long()
    return F.one_hot(numbers, cells + 1)[..., 1:]  # number 0 is a zero, and no cell


class GridConv(nn.Module):
    """Grid convolution, Eq. 6: x (B, C_in, H, P) -> (B, C_out, H, P), the sum of one convolution
    per padding branch. `reference` is the equation in code; `forward` gives the same, sooner.

    padding: one entry for each branch, any number of them; an entry is "circular", "replicate" or
    "zeros", or a pair (vertical, horizontal) of these (Table D writes its pairs the other way
    round).
    kernel_size: odd. Any memory format; channels_last is the fast one.
    weight (branches, C_out, C_in, K, K), bias (branches, C_out).
    ValueError: an unknown padding, an even kernel; an x or alpha of another shape.

    The fast form. A branch with kernel W2 that reads x2, beside one with W1 that reads x1, gives
    W1 x1 + W2 x2 = (W1 + W2) x1 + W2 (x2 - x1). The first term is one product for all branches,
    which read as one of them pads (the base). In the second, x2 - x1 is 0 but where a tap leaves
    the grid: on 5 x 5 for 56 of the 225 (cell, tap) pairs, found at its four sides in 5 cells x 3
    taps each (a corner's tap in two sides, where it counts once). All sides together are one
    batched product. 225 + 60 products of C_in x C_out take the place of 450; alpha scales what is
    read, before both. Where there is far less to write than to read (the shrinking layer, 256 to
    3 channels) every kernel is applied to every cell first, and the small products are picked,
    scaled and added.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, padding=("circular", "replicate"),
                 grid_shape=(5, 5), bias=True):
        super().__init__()
        self.padding = padding_pairs(padding)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: {kernel_size}, expected an odd number")
        self.grid_shape, self.kernel_size = tuple(grid_shape), kernel_size
        kernels = (len(self.padding), out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(kernels))
        self.bias = nn.Parameter(torch.empty(kernels[:2])) if bias else None
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        for parameter in self.parameters(recurse=False):  # as nn.Conv2d does
            nn.init.uniform_(parameter, -bound, bound)

        self.multiply_first = 4 * out_channels < in_channels
        self._plan()

    def reference(self, x, alpha=None):
        """What `forward` returns, as the paper writes it: for each branch pad, unfold, multiply by
        alpha (Eq. 8), one product with its kernel; add the branches."""
        (B, C, H, P), K, out = x.shape, self.kernel_size, 0
        alpha = self.alpha(x) if alpha is None else alpha
        for kernel, modes in zip(self.weight, self.padding):
            patches = F.unfold(pad(x, K // 2, *modes), K).view(B, C, K * K, H * P)
            if alpha is not None:
                patches = patches * alpha.reshape(B, 1, H * P, K * K).transpose(2, 3)
            out = out + kernel.flatten(1) @ patches.flatten(1, 2)  # (B, C_out, H*P)
        if self.bias is not None:
            out = out + self.bias.sum(0)[:, None]
        return out.view(B, -1, H, P)

    def alpha(self, x):
        """What scales the taps where none is given: nothing, in vanilla GridConv."""

    def forward(self, x, alpha=None):
        B, K, C = len(x), self.kernel_size, self.weight.shape[2]
        if tuple(x.shape) != (B, C, *self.grid_shape):
            raise ValueError(f"x: {tuple(x.shape)}, expected {(B, C, *self.grid_shape)}")
        alpha = self.alpha(x) if alpha is None else alpha
        if alpha is not None:
            if tuple(alpha.shape) != (B, *self.grid_shape, K, K):
                raise ValueError(f"alpha: {tuple(alpha.shape)}, not {B, *self.grid_shape, K, K}")
            alpha = alpha.reshape(B, math.prod(alpha.shape[1:]), 1)  # (B, H*P * K*K, 1)
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*P, C_in); of channels_last, a view
        form = self._multiply_first if self.multiply_first else self._read_first
        return form(cells, alpha).unflatten(1, self.grid_shape).permute(0, 3, 1, 2)

    def _table(self, name, values):
        """A constant that moves with the layer and is not saved; from a list, for the meta
        device."""
        self.register_buffer(name, torch.tensor(values.tolist()), persistent=False)

    def _plan(self):
        """The tables of the two forms: what each of them reads where."""
        (H, P), K, reach = self.grid_shape, self.kernel_size, self.kernel_size // 2
        reads = [read_cells((H, P), K, modes) for modes in self.padding]
        if self.multiply_first:
            cell, branch, tap, source = torch.stack(reads, 1).nonzero(as_tuple=True)
            self._table("picks", (source * len(reads) + branch) * K * K + tap)
            self._table("pairs", cell * K * K + tap)
            self._table("targets", cell)
            return

        # The base reads no zeros: the first branch of that kind, or else as `replicate`.
        reads.append(read_cells((H, P), K, ("replicate", "replicate")))
        base = next(read for read in reads if read.sum() == H * P * K * K)
        self._table("sources", base.argmax(2).flatten())

        # The border: a group for each branch that reads otherwise and each side of the grid.
        cell_at = torch.arange(H * P, device="cpu").view(H, P)
        tap_at = torch.arange(K * K, device="cpu").view(K, K)
        pair_at = cell_at[..., None, None] * K * K + tap_at
        every, low, high = slice(None), slice(0, reach), slice(-reach, None)
        differences, pairs, taps, targets = [], [], [], []
        for branch, read in enumerate(reads[:-1]):
            difference = (read - base).view(H, P, K, K, H * P)
            for side in ((low, every), (high, every), (every, low), (every, high)):
                pair = side + side  # rows and columns of cells, rows and columns of taps
                if difference[pair].any():
                    differences.append(difference[pair].clone().flatten(2, 3).flatten(0, 1))
                    difference[pair] = 0  # a corner's taps count for the first of its sides
                    pairs.append(pair_at[pair].flatten(2).flatten(0, 1))
                    taps.append(branch * K * K + tap_at[side].flatten())
                    targets.append(cell_at[side].flatten())
        self.groups = len(taps)
        if self.groups:  # sides of fewer cells are filled up with zeros: (slots, groups, ...)
            self._table("differences", pad_sequence(differences).flatten(0, 2).float())
            self._table("pairs", pad_sequence(pairs).flatten())
            self._table("taps", torch.cat(taps))
            self._table("targets", pad_sequence(targets).flatten())

    def _read_first(self, cells, alpha):
        (B, places, C_in), (branches, C_out, *_, K) = cells.shape, self.weight.shape
        kernels = self.weight.permute(0, 3, 4, 2, 1).reshape(branches, K * K * C_in, C_out)
        summed = kernels.sum(0)
        keep = torch.is_grad_enabled()  # else nothing needs what is read unscaled
        whole = cells.is_cuda or torch.compiler.is_compiling()
        size = B if whole else CPU_SAMPLES[keep]
        parts, out = cells.split(size), []
        alphas = [None] * len(parts) if alpha is None else alpha.split(size)
        for part, scale in zip(parts, alphas):
            patches = part.index_select(1, self.sources)  # x1 (B, H*P * K*K, C_in)
            if scale is not None:
                patches = patches * scale if keep else patches.mul_(scale)
            out.append(torch.mm(patches.view(-1, K * K * C_in), summed))
        out = torch.cat(out).view(B, places, C_out)
        if self.groups:
            out = out.index_add(1, self.targets, self._border(cells, alpha, kernels))
        return out if self.bias is None else out + self.bias.sum(0).to(out.dtype)

    def _border(self, cells, alpha, kernels):
        """W2 (x2 - x1) wherever x2 is not x1: (B, slots * groups, C_out)."""
        (B, _, C_in), C_out = cells.shape, kernels.shape[2]
        kernels = kernels.reshape(-1, C_in, C_out).index_select(0, self.taps)
        kernels = kernels.view(self.groups, -1, C_out)  # (groups, taps * C_in, C_out)
        read = self.differences.expand(B, -1, -1)
        if alpha is not None:
            read = alpha.index_select(1, self.pairs) * self.differences
        read = torch.bmm(read, cells)  # (B, slots * groups * taps, C_in)
        read = read.view(-1, self.groups, kernels.shape[1]).transpose(0, 1)
        added = torch.bmm(read, kernels)  # (groups, B * slots, C_out)
        return added.transpose(0, 1).reshape(B, len(self.targets), C_out)

    def _multiply_first(self, cells, alpha):
        (B, places, C_in), C_out = cells.shape, self.weight.shape[1]
        kernels = self.weight.permute(2, 0, 3, 4, 1).reshape(C_in, -1)
        products = torch.mm(cells.reshape(B * places, C_in), kernels)
        products = products.view(B, places * len(kernels[0]) // C_out, C_out)
        products = products.index_select(1, self.picks)  # those that a cell, branch and tap read
        if alpha is not None:
            products = products * alpha.index_select(1, self.pairs)
        out = products.new_zeros(B, places, C_out).index_add(1, self.targets, products)
        return out if self.bias is None else out + self.bias.sum(0).to(out.dtype)


class GridAttention(nn.Module):
    """The attention module pi of Eq. 7: x (B, C, H, P) -> alpha (B, H, P, K, K) in (0, 1),
    SE-type.

    Global average pool, linear to max(C / 16, 16), batch norm, ReLU, linear to K * K * H * P,
    sigmoid(. / temperature). The order and the widths are the release's; the paper's text puts
    batch norm first. The temperature, which the paper does not mention, is 30 in every published
    weight.
    """

    def __init__(self, channels, kernel_size, grid_shape, temperature=30.0):
        super().__init__()
        width = max(channels // 16, 16)
        self.shape = (kernel_size, kernel_size, *grid_shape)
        self.squeeze = nn.Linear(channels, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.position = nn.Linear(width, math.prod(self.shape))
        self.register_buffer("temperature", torch.tensor(float(temperature)), persistent=False)
        for linear in (self.squeeze, self.position):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.position.bias)

    def forward(self, x):
        z = F.relu(self.norm(self.squeeze(x.mean((2, 3)))))  # (B, width)
        alpha = torch.sigmoid(self.position(z) / self.temperature)
        return alpha.view(len(x), *self.shape).permute(0, 3, 4, 1, 2)


class DynamicGridConv(GridConv):
    """Dynamic grid convolution, Eq. 7-8: each cell of each pose scales the kernel's taps by its
    alpha.

    Arguments and shapes as GridConv. forward(x, alpha=None), reference(x, alpha=None): an alpha
    (B, H, P, K, K) replaces the attention's own. One alpha serves all branches.
    """

    def __init__(self, in_channels, *args, **options):
        super().__init__(in_channels, *args, **options)
        self.attention = GridAttention(in_channels, self.kernel_size, self.grid_shape)

    def alpha(self, x):
        return self.attention(x)


# --------------------------------------------------------------------------------------------------
# 4. The grid lifting network (section 3.4, Figure 1)


def check_pose(pose, *wanted):
    """ValueError unless pose is (B, *wanted)."""
    if tuple(pose.shape[1:]) != wanted:
        raise ValueError(f"pose: {tuple(pose.shape)}, expected (B, {', '.join(map(str, wanted))})")


def grid_layer(conv, channels, dropout):
    """(D-)GridConv, batch norm, ReLU, dropout of whole channels (section 4.2)."""
    return nn.Sequential(OrderedDict(
        conv=conv, norm=nn.BatchNorm2d(channels), relu=nn.ReLU(), dropout=nn.Dropout2d(dropout)))


class GridLiftingNetwork(nn.Module):
    """The grid lifting network, Eq. 9: pose (B, J, 2) in about [-1, 1] -> (B, J, 3), metres from
    root.

    layout: a nested tuple (handcrafted SGT), an AutoGrids (learnable SGT), or None with a
    grid_shape: then only forward_grid works. kernel_sizes (a, (b, c), d): the expanding layer,
    the two layers of a block, the shrinking one (Table E). padding: the branches of every layer,
    see GridConv.
    attention: "grid" is D-GridConv, None vanilla GridConv, "channel", "spatial" and
    "spatial+channel" the other designs of Figure 8.
    ValueError: what assignment_matrix and GridConv refuse, a layout of another size, neither
    layout nor grid_shape, an unknown attention, a pose of another shape, a pose where there is no
    layout.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints=17, layout=HANDCRAFTED_5X5, grid_shape=None, hidden=256, blocks=2,
                 kernel_sizes=(3, (3, 3), 3), padding=("circular", "replicate"), attention="grid",
                 dropout=0.25, in_dim=2, out_dim=3):
        super().__init__()
        self.num_joints, self.in_dim = num_joints, in_dim
        self.autogrids = layout if isinstance(layout, AutoGrids) else None
        if self.autogrids is not None:
            found, joints = layout.grid_shape, layout.s_prob.shape[1]
            if joints != num_joints:
                raise ValueError(f"layout: an AutoGrids of {joints} joints, expected {num_joints}")
        elif layout is not None:
            self.register_buffer("fixed_assignment", assignment_matrix(layout, num_joints))
            found = (len(layout), len(layout[0]))
        elif grid_shape is not None:
            self.register_buffer("fixed_assignment", None)
            found = grid_shape
        else:
            raise ValueError("grid_shape: needed where there is no layout")
        self.grid_shape = tuple(found)
        if tuple(grid_shape or found) != self.grid_shape:
            raise ValueError(f"grid_shape: {grid_shape}, but the layout is {self.grid_shape}")
        if attention not in CONVOLUTIONS:
            raise ValueError(f"attention: unknown {attention!r}, not of {list(CONVOLUTIONS)}")

        def conv(c_in, c_out, kernel_size, bias=True):
            make = CONVOLUTIONS[attention]
            return make(c_in, c_out, kernel_size, padding, self.grid_shape, bias)

        expand, inner, shrink = kernel_sizes
        self.expand = grid_layer(conv(in_dim, hidden, expand), hidden, dropout)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            layers = (grid_layer(conv(hidden, hidden, size), hidden, dropout) for size in inner)
            self.blocks.append(nn.Sequential(*layers))
        self.shrink = conv(hidden, out_dim, shrink, bias=False)  # no bias, as released

    @property
    def temperature(self):
        """The temperature of the attention's sigmoid, 30 unless set; only grid attention has
        one."""
        found = [m.temperature for m in self.modules() if isinstance(m, GridAttention)]
        return found[0].item() if found else 30.0

    @temperature.setter
    def temperature(self, value):
        for module in self.modules():
            if isinstance(module, GridAttention):
                module.temperature.fill_(value)  # in place: a captured CUDA graph sees the change

    def assignment(self):
        """S (H*P, J) of this forward: fixed, or one sample of AutoGrids."""
        return self.fixed_assignment if self.autogrids is None else self.autogrids()

    def coordinates(self, x):
        """The shrinking layer, features (B, C, H, P) -> (B, 3, H, P); never rounded to bfloat16."""
        with outside_autocast(x):
            return self.shrink(x.to(self.shrink.weight.dtype))

    def forward_grid(self, grid):
        """The network between SGT and inverse SGT: (B, 2, H, P) -> (B, 3, H, P)."""
        x = self.expand(grid)
        for block in self.blocks:
            x = x + block(x)
        return self.coordinates(x)

    def forward(self, pose):
        check_pose(pose, self.num_joints, self.in_dim)
        S = self.assignment()  # the same sample goes in and comes out
        if S is None:
            raise ValueError("this network has no layout (layout=None): only forward_grid works")
        grid = self.forward_grid(sgt(pose, S, self.grid_shape))
        return inverse_sgt(grid, S)  # Eq. 9


# --------------------------------------------------------------------------------------------------
# 5. The authors' weights

RELEASED_PARTS = {"norm": "batch_norm", "attention.squeeze": "atten_conv.fc",
                  "attention.norm": "atten_conv.bn", "attention.position": "atten_conv.position_fc"}


def released_views(name, value, branches):
    """An entry of our state under the names and in the shapes of the release: {name: view}."""
    if name == "autogrids.s_prob":
        return {"sgt_layer.sgt_trans_mat": value[None]}
    # Layers are numbered 1 and 2, in each stage and around all of them.
    layer = r"(?:expand|(shrink)|blocks\.(\d+)\.(\d+))\.(?:conv\.)?(?:(.+)\.)?(\w+)"
    last, block, position, part, entry = re.fullmatch(layer, name).groups()
    stage = f"linear_stages.{block}." if block else ""
    number = 2 if last or position == "1" else 1
    if part is None:
        return {f"{stage}w{number}.{branch}{entry}": view for branch, view in zip(branches, value)}
    if value.dim() == 2:
        value = value[..., None, None]  # linear layers are convolutions there
    module, *inner = RELEASED_PARTS[part].split(".")
    return {".".join([f"{stage}{module}{number}", *inner, entry]): value}


def from_released(state_dict, padding, grid_shape=(5, 5)):
    """A GridLiftingNetwork with the authors' weights: vanilla, dynamic or AutoGrids, in their
    dtype.

    padding and grid_shape are not in the weights: give those they were trained with. On 5 x 5
    without a learnt grid the layout is RELEASED_5X5; on other grids there is none, and only
    forward_grid works. Prefixes of nn.DataParallel and torch.compile (`module.`, `_orig_mod.`)
    are taken off.
    ValueError: weights that are not a released GridConv's or do not fit grid or branches, by
    name.
    """
    weights = {}
    for name, value in dict(state_dict or {}).items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"released GridConv: {name} is {value!r}, expected a tensor")
        weights[re.sub(r"^((module|_orig_mod)\.)+", "", str(name))] = value

    branches = sorted(name[3:-6] for name in weights if re.fullmatch(r"w1\..*weight", name))
    if len(branches) != len(padding):
        raise ValueError(
            f"released GridConv: weights of {len(branches)} branches, padding {padding}: expected "
            "w1.branch1_weight and so on, or w1.donut_conv.weight and w1.tablet_conv.weight")
    first = weights[f"w1.{branches[0]}weight"]
    stages = {name.split(".")[1] for name in weights if name.startswith("linear_stages.")}
    layout = RELEASED_5X5 if tuple(grid_shape) == (5, 5) else None
    if "sgt_layer.sgt_trans_mat" in weights:
        layout = AutoGrids(17, grid_shape, "random")
    network = GridLiftingNetwork(
        17, layout, grid_shape, max(1, first.shape[:1].numel()), len(stages), padding=padding,
        attention="grid" if "atten_conv1.fc.weight" in weights else None)

    state = network.to((first + 0.0).dtype).state_dict()
    state.pop("fixed_assignment", None)
    views = {}
    for name, ours in state.items():
        views |= released_views(name, ours, branches)
    for theirs, view in views.items():
        if theirs not in weights and theirs.endswith("num_batches_tracked"):
            continue  # older releases of torch did not count them
        found = tuple(weights[theirs].shape) if theirs in weights else "missing"
        if found != tuple(view.shape):
            raise ValueError(f"released GridConv: {theirs} is {found}, expected {(*view.shape,)}")
        view.copy_(weights.pop(theirs))
    if weights:
        raise ValueError(f"released GridConv: unexpected {min(weights)} ({len(weights)} in all)")
    return network


# --------------------------------------------------------------------------------------------------
# 6. Variants and ablations


class AttentiveGridConv(GridConv):
    """GridConv with the attention designs that Figure 8 compares with (section 4.5), applied to
    what the layer puts out.

    "channel": squeeze and excitation (Hu et al. 2018), one factor in (0, 1) for each channel.
    "spatial": one for each cell, from the mean and the maximum over channels (a reduced CBAM, Woo
    et al. 2018; its convolution is a GridConv of the same padding). "spatial+channel": channel
    first, then spatial, as CBAM. The paper gives no more than these names.
    """

    def __init__(self, design, in_channels, out_channels, *args, **options):
        super().__init__(in_channels, out_channels, *args, **options)
        width = max(out_channels // 16, 16)
        self.channel = self.spatial = None
        if "channel" in design:
            self.channel = nn.Sequential(
                nn.Linear(out_channels, width), nn.ReLU(), nn.Linear(width, out_channels))
        if "spatial" in design:
            self.spatial = GridConv(2, 1, 3, self.padding, self.grid_shape)

    def reference(self, x, alpha=None):
        return self.attend(super().reference(x, alpha))

    def forward(self, x, alpha=None):
        return self.attend(super().forward(x, alpha))

    def attend(self, x):
        """x (B, C_out, H, P) times its attention."""
        if self.channel is not None:
            x = x * torch.sigmoid(self.channel(x.mean((2, 3))))[:, :, None, None]
        if self.spatial is not None:
            maps = torch.stack([x.mean(1), x.amax(1)], 1)
            x = x * torch.sigmoid(self.spatial(maps))
        return x


CONVOLUTIONS = {"grid": DynamicGridConv, None: GridConv}
for _design in ("channel", "spatial", "spatial+channel"):
    CONVOLUTIONS[_design] = partial(AttentiveGridConv, _design)


# --------------------------------------------------------------------------------------------------
# 7. Temporal GridConv (B.3, Table C)


class TemporalGridConv(nn.Module):
    """3D D-GridConv (B.3) with K_t = frames and K_s = 3: a D-GridConv for each of K_t frames,
    added.

    x (B * T, C_in, H, P), the T frames of a sample in a row -> (B * T / K_t, C_out, H, P). Groups
    of K_t frames do not overlap: for one pose a window the same as VideoPose3D's dilation, and
    cheaper. K_t = 1 is D-GridConv itself.
    """

    def __init__(self, in_channels, out_channels, frames, padding, grid_shape):
        super().__init__()
        shape = (in_channels, out_channels, 3, padding, grid_shape, False)  # no bias
        self.frames = nn.ModuleList(DynamicGridConv(*shape) for _ in range(frames))

    def forward(self, x):
        x = x.unflatten(0, (-1, len(self.frames)))  # (B * T / K_t, K_t, C_in, H, P)
        return sum(conv(x[:, frame]) for frame, conv in enumerate(self.frames))


class TemporalGridLiftingNetwork(GridLiftingNetwork):
    """Temporal GridConv: poses (B, T, J, 2) about [-1, 1] -> the centre frame's (B, J, 3),
    metres.

    VideoPose3D (Pavllo et al. 2019) with 3D D-GridConv in place of its convolutions: an expanding
    layer, then a residual block for each further filter width, of K_t = width and then K_t = 1,
    whose shortcut takes the centre frame of each group; T = receptive_field is the product of the
    widths.
    One assignment serves all frames.
    With its defaults 38,063,324 parameters (Table C: 38.1 M, which fits hidden = 512; no C is
    printed). Ours, where the paper is silent: every frame of a kernel has an attention of its
    own, fed by the frame it reads (one for all frames would make 38.0 M); dropout takes whole
    channels, and the shrinking layer has K_t = 1 and K_s = 3, as in the single-frame network.
    ValueError: what GridLiftingNetwork refuses; a filter width that is even or below 1, or a
    product of 1.
    """

    def __init__(self, num_joints=17, layout=HANDCRAFTED_5X5, grid_shape=None,
                 filter_widths=(3, 3, 3), hidden=512, padding=("circular", "replicate"),
                 dropout=0.25, in_dim=2, out_dim=3):
        super().__init__(num_joints, layout, grid_shape, hidden, 0, padding=padding,
                         dropout=dropout, in_dim=in_dim, out_dim=out_dim)
        odd = isinstance(filter_widths, (tuple, list)) and all(
            hasattr(width, "__index__") and width > 0 and width % 2 for width in filter_widths)
        if not odd or math.prod(filter_widths) == 1:
            raise ValueError(f"filter_widths: {filter_widths!r}, expected odd numbers, not all 1")
        self.filter_widths, self.receptive_field = tuple(filter_widths), math.prod(filter_widths)

        def layer(c_in, frames):
            conv = TemporalGridConv(c_in, hidden, frames, padding, self.grid_shape)
            return grid_layer(conv, hidden, dropout)

        self.expand = layer(in_dim, filter_widths[0])
        blocks = [nn.Sequential(layer(hidden, T), layer(hidden, 1)) for T in filter_widths[1:]]
        self.blocks = nn.ModuleList(blocks)

    def forward_grid(self, grid):
        """The network between SGT and inverse SGT: (B * T, 2, H, P) -> (B, 3, H, P)."""
        x = self.expand(grid)
        for width, block in zip(self.filter_widths[1:], self.blocks):
            x = x.unflatten(0, (-1, width))[:, width // 2] + block(x)  # the centre frames
        return self.coordinates(x)

    def forward(self, pose):
        check_pose(pose, self.receptive_field, self.num_joints, self.in_dim)
        return super().forward(pose.flatten(0, 1))

    def scheduled_norms(self):
        """The batch norms whose momentum VideoPose3D's training schedules: all of them."""
        norms = (nn.BatchNorm1d, nn.BatchNorm2d)
        return [module for module in self.modules() if isinstance(module, norms)]


# --------------------------------------------------------------------------------------------------
# 8. Training together with a 2D detector (A.6)


def soft_argmax(heatmaps):
    """Soft-argmax (Sun et al. 2018): heatmaps (B, J, h, w), before any softmax -> the mean
    position (B, J, 2) of each.

    (x, y) from the middle of the map, in units of half its longer side, pixels at their centres:
    what a lifter takes in when the map covers the image (normalisation `longest`).
    """
    h, w = heatmaps.shape[2:]
    p = heatmaps.flatten(2).softmax(2).unflatten(2, (h, w))
    centres = torch.arange(max(h, w), device=p.device, dtype=p.dtype) * 2 + 1
    x, y = (centres[:w] - w) / max(h, w), (centres[:h] - h) / max(h, w)
    return torch.stack([p.sum(2) @ x, p.sum(3) @ y], 2)


def joint_loss(pose_2d, target_2d, pose_3d, target_3d, weight=160.0):
    """Eq. 13: the mean absolute error of 2D poses (..., 2) plus weight (lambda) times the mean
    squared error of 3D poses (..., 3).

    Means over coordinates, as in training with Eq. 10; metres in 3D. The paper prints norms
    without units. Start from a lifter trained alone: against a fresh one the 3D term outweighs
    the other, and the detector hardly learns.
    """
    return F.l1_loss(pose_2d, target_2d) + weight * F.mse_loss(pose_3d, target_3d)


# --------------------------------------------------------------------------------------------------
# 9. The neighbours (A.5): lifting without a grid


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


def hidden_layers(make, c_in, hidden, blocks, dropout):
    """An expanding layer and residual blocks of two: make(c_in, c_out), batch norm, ReLU,
    dropout."""
    def layer(width):
        after = nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)
        return nn.Sequential(make(width, hidden), *after)

    return [layer(c_in), *(Residual(layer(hidden), layer(hidden)) for _ in range(blocks))]


class FullyConnectedLifter(nn.Module):
    """The baseline of Martinez et al. 2017: pose (B, J, 2) -> (B, J, 3) by six linear layers, two
    residual blocks of two.

    Batch norm, ReLU and dropout after every linear layer but the last; without that paper's limit
    on the weights' norms. With its defaults 4,296,755 parameters. ValueError: a pose of another
    shape.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints=17, hidden=1024, blocks=2, dropout=0.5, in_dim=2, out_dim=3):
        super().__init__()
        self.num_joints, self.in_dim = num_joints, in_dim
        self.network = nn.Sequential(
            nn.Flatten(), *hidden_layers(nn.Linear, num_joints * in_dim, hidden, blocks, dropout),
            nn.Linear(hidden, num_joints * out_dim), nn.Unflatten(1, (num_joints, out_dim)))

    def forward(self, pose):
        check_pose(pose, self.num_joints, self.in_dim)
        return self.network(pose)


class GraphConv(nn.Module):
    """Graph convolution Z = D^-1/2 W D^-1/2 X Theta, W = A + I, D_ii = sum_j W_ij: features
    (B, C_in, J) -> (B, C_out, J).

    Kipf and Welling 2017, as Cai et al. 2019 use it on the skeleton. edges: pairs of joints, in
    either direction. ValueError: an edge to a joint outside 0..J-1.
    """

    def __init__(self, in_channels, out_channels, edges, num_joints):
        super().__init__()
        W = torch.eye(num_joints)
        for i, j in edges:
            if not (0 <= i < num_joints and 0 <= j < num_joints):
                raise ValueError(f"edges: {(i, j)} names a joint outside 0..{num_joints - 1}")
            W[i, j] = W[j, i] = 1
        scale = W.sum(1).rsqrt()
        self.register_buffer("graph", scale[:, None] * W * scale, persistent=False)
        self.theta = nn.Conv1d(in_channels, out_channels, 1, bias=False)

    def forward(self, x):
        return self.theta(x) @ self.graph  # symmetric, so the same from either side


class GraphConvLifter(nn.Module):
    """A lifter of graph convolutions, pose (B, J, 2) -> (B, J, 3), as deep as GridLiftingNetwork.

    An expanding layer, residual blocks of two layers, a shrinking one; batch norm, ReLU and dropout
    after all but the last. ValueError: a pose of another shape, an edge to an unknown joint.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints=17, edges=H36M_EDGES, hidden=256, blocks=2, dropout=0.25,
                 in_dim=2, out_dim=3):
        super().__init__()
        self.num_joints, self.in_dim = num_joints, in_dim
        make = partial(GraphConv, edges=edges, num_joints=num_joints)
        self.network = nn.Sequential(
            *hidden_layers(make, in_dim, hidden, blocks, dropout), make(hidden, out_dim))

    def forward(self, pose):
        check_pose(pose, self.num_joints, self.in_dim)
        return self.network(pose.transpose(1, 2)).transpose(1, 2)  # (B, C, J) in between
