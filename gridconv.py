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
RELEASED_5X5 = (*HANDCRAFTED_5X5[:2], (1, 14, (8, 9), 11, 4), *HANDCRAFTED_5X5[3:])

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


def assignment_matrix(layout, num_joints):
    """The assignment matrix S (H*P, J) of a grid layout (section 3.1).

    layout: H rows of P cells; a cell is a joint, or a tuple of joints whose mean it holds. Rows
    of S sum to 1 (Eq. 3), and S is binary unless a cell averages.
    ValueError: rows of different length, an unknown joint, an empty cell, fewer cells than
    joints, a joint without a cell of its own.
    """
    widths = {len(row) for row in layout}
    if len(widths) != 1:
        raise ValueError(f"layout: rows of {widths} cells, expected one length")

    S = []
    for cell in (cell for row in layout for cell in row):
        joints = cell if isinstance(cell, (tuple, list)) else (cell,)
        if not joints or not all(joint in range(num_joints) for joint in joints):
            raise ValueError(f"layout: cell {cell!r} is empty or not of 0..{num_joints - 1}")
        S.append([joints.count(joint) / len(joints) for joint in range(num_joints)])
    missing = sorted({*range(num_joints)} - {row.index(1) for row in S if 1 in row})
    if missing:
        raise ValueError(f"layout: of {num_joints} joints, joint {missing} lack their own cell")
    return torch.tensor(S)


def sgt(pose, S, grid_shape):
    """SGT, Eq. 1: D = S G. pose (B, J, C), S (H*P, J) -> grid pose (B, C, H, P)."""
    with torch.autocast(pose.device.type, enabled=False):  # bfloat16 would take millimetres
        return F.linear(pose.mT, S.to(pose.dtype)).unflatten(2, grid_shape)


def inverse_sgt(grid, S):
    """Inverse SGT, Eq. 11-12: each joint is the mean of its cells. (B, C, H, P), S -> (B, J, C).

    Cells that average joints (entries of S strictly between 0 and 1) are left out; a joint that no
    cell holds, as AutoGrids may produce while it learns, comes out 0.
    """
    S = S.to(grid.dtype)
    S = S * (S == S.round())  # keeps the zeros, whose gradient tells AutoGrids what to add
    with torch.autocast(grid.device.type, enabled=False):
        return (grid.flatten(2) @ (S / S.sum(0).clamp(min=1))).mT


def satisfies_topology(S, grid_shape, edges=H36M_EDGES):
    """Whether S (H*P, J) keeps the skeleton: each cell holds one joint (Eq. 3), and linked joints
    are adjacent somewhere (Eq. 2)."""
    one_joint = ((S == 0) | (S == 1)).all() and (S.sum(1) == 1).all()
    cells = torch.ones(grid_shape, device=S.device).nonzero().to(S)  # their rows and columns
    adjacent = torch.cdist(cells, cells, p=1) == 1
    together = S.T @ adjacent.to(S) @ S  # (J, J): how often two joints stand side by side
    return bool(one_joint and all(together[i, j] > 0 for i, j in edges))


def random_layout(num_joints, grid_shape, seed=0):
    """A random layout (nested tuple) with every joint at least once (section 4.5, Table 5); the
    same seed gives the same layout. ValueError: fewer cells than joints."""
    H, P = grid_shape
    if H * P < num_joints:
        raise ValueError(f"grid_shape: {H * P} cells cannot hold {num_joints} joints")
    generator = torch.Generator().manual_seed(seed)
    repeats = torch.randint(num_joints, (H * P - num_joints,), generator=generator, device="cpu")
    joints = torch.cat([torch.arange(num_joints, device="cpu"), repeats])
    order = torch.randperm(len(joints), generator=generator, device="cpu")
    return tuple(tuple(row) for row in joints[order].view(H, P).tolist())


def shuffle_layout(layout, how, seed=0):
    """The layout with its rows, columns or cells permuted (Table B): "row", "column" or
    "global"."""
    H, P = len(layout), len(layout[0])
    ways = {"row": ((H, P), 0), "column": ((H, P), 1), "global": ((H * P,), 0)}
    if how not in ways:
        raise ValueError(f"how: {how!r}, not one of {*ways,}")
    shape, dim = ways[how]
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(seed), device="cpu")
    places = torch.arange(H * P, device="cpu").view(shape).index_select(dim, order)
    cells = [cell for row in layout for cell in row]
    return tuple(tuple(cells[i] for i in row) for row in places.view(H, P).tolist())


# --------------------------------------------------------------------------------------------------
# 2. AutoGrids: the learnable SGT (section 3.2, A.3)


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
        H, P = self.grid_shape = tuple(grid_shape)
        if H * P < num_joints:
            raise ValueError(f"grid_shape: {H * P} cells cannot hold {num_joints} joints")
        if prior == "handcrafted":
            prior = {17: HANDCRAFTED_5X5, 32: HANDCRAFTED_7X5}.get(num_joints, prior)
        averages = any(isinstance(cell, (tuple, list)) for row in prior for cell in row)
        if prior == "random":
            S = torch.rand(H * P, num_joints)
        elif averages or [len(row) for row in prior] != [P] * H:
            raise ValueError(f"prior: {prior!r}, expected 'random' or {H} x {P} cells, no averages")
        else:
            S = assignment_matrix(prior, num_joints)
        self.s_prob = nn.Parameter(S)
        self.noise = True

    def forward(self):
        """S (H*P, J): a sample with noise in training, the most probable assignment otherwise."""
        soft = self.s_prob
        if self.training and self.noise:
            soft = soft - torch.empty_like(soft).exponential_().log()  # Eq. 4: Gumbel(0, 1) noise
        hard = torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1.0)
        relaxed = soft.softmax(1)  # temperature 1 (A.3)
        # Eq. 5, straight-through. The bracket is exactly 0, which F.gumbel_softmax(hard=True) does
        # not promise: its rows can come out as 1 - 6e-8, and Eq. 11 counts entries equal to 1.
        return hard + (relaxed - relaxed.detach())

    @torch.no_grad()
    def assignment(self):
        """The current binary S (H*P, J), without noise."""
        return F.one_hot(self.s_prob.argmax(1), self.s_prob.shape[1]).to(self.s_prob)

    def dropped(self):
        """The joints that no cell of the current assignment holds, as a list."""
        return (self.assignment().sum(0) == 0).nonzero().flatten().tolist()


# --------------------------------------------------------------------------------------------------
# 3. GridConv (Eq. 6) and D-GridConv (Eq. 7-8)

# Taken at a time, with gradients and without: what they read then stays where it is found quickly.
CPU_SAMPLES = {True: 67, False: 20}


def padding_pairs(padding):
    """The (vertical, horizontal) modes of each branch. ValueError: anything but names and pairs."""
    modes = ("circular", "replicate", "zeros")
    pairs = [tuple(e) if isinstance(e, (tuple, list)) else (e, e) for e in padding]
    if not pairs or any(len(pair) != 2 or not set(pair) <= set(modes) for pair in pairs):
        raise ValueError(f"padding: {padding!r}, expected a tuple of {modes} or pairs of these")
    return pairs


def pad(x, radius, vertical, horizontal):
    """x (B, C, H, P) with `radius` more cells on every side: (B, C, H + 2 radius, P + 2 radius)."""
    x = F.pad(x, [radius] * 4)  # zeros, which the other modes do not read
    for dim, mode in ((2, vertical), (3, horizontal)):
        size = x.shape[dim] - 2 * radius
        index = torch.arange(-radius, size + radius, device=x.device)
        reads = {"circular": index % size, "replicate": index.clamp(0, size - 1), "zeros": index}
        x = x.index_select(dim, reads[mode] + radius)
    return x


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
        bound = 1 / math.sqrt(in_channels * kernel_size**2)  # as nn.Conv2d does
        self.weight = nn.Parameter(torch.empty(kernels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(kernels[:2]).uniform_(-bound, bound)) if bias else None
        self.attention = None  # what scales the taps, in D-GridConv
        self.multiply_first = 4 * out_channels < in_channels
        self._plan()

    def reference(self, x, alpha=None):
        """What `forward` returns, as the paper writes it: for each branch pad, unfold, multiply by
        alpha (Eq. 8), one product with its kernel; add the branches."""
        (B, C, H, P), K, out = x.shape, self.kernel_size, 0
        alpha = self.attention(x) if alpha is None and self.attention else alpha
        for kernel, modes in zip(self.weight, self.padding):
            patches = F.unfold(pad(x, K // 2, *modes), K).view(B, C, K * K, H * P)
            if alpha is not None:
                patches = patches * alpha.reshape(B, 1, H * P, K * K).transpose(2, 3)
            out = out + kernel.flatten(1) @ patches.flatten(1, 2)  # (B, C_out, H*P)
        if self.bias is not None:
            out = out + self.bias.sum(0)[:, None]
        return out.view(B, -1, H, P)

    def forward(self, x, alpha=None):
        B, K, C = x.shape[0], self.kernel_size, self.weight.shape[2]
        if x.shape != (B, C, *self.grid_shape):
            raise ValueError(f"x: {*x.shape,}, not {B, C, *self.grid_shape}")
        alpha = self.attention(x) if alpha is None and self.attention else alpha
        if alpha is not None:
            if alpha.shape != (B, *self.grid_shape, K, K):
                raise ValueError(f"alpha: {*alpha.shape,}, not {B, *self.grid_shape, K, K}")
            alpha = alpha.reshape(B, math.prod(alpha.shape[1:]), 1)  # (B, H*P * K*K, 1)
        cells = x.flatten(2).mT  # (B, H*P, C_in)
        form = self._multiply_first if self.multiply_first else self._read_first
        bias = 0 if self.bias is None else self.bias.sum(0, keepdim=True)
        return form(cells, alpha, bias).mT.unflatten(2, self.grid_shape)

    def _table(self, name, values):
        """A constant that moves with the layer and is not saved; from a list, for the meta
        device."""
        self.register_buffer(name, torch.tensor(values.tolist()), persistent=False)

    def _plan(self):
        """The tables of the two forms: what each of them reads where."""
        (H, P), K, reach = self.grid_shape, self.kernel_size, self.kernel_size // 2
        # Which cell each tap reads from each cell, 0/1 (branches, H*P, K*K, H*P): found by padding
        # and unfolding the cells' numbers, of which 0 is a zero, and no cell.
        numbers = torch.arange(1.0, H * P + 1, device="cpu").view(1, 1, H, P)
        numbers = torch.cat([pad(numbers, reach, *modes) for modes in self.padding])
        reads = F.one_hot(F.unfold(numbers, K).mT.long(), H * P + 1)[..., 1:]
        if self.multiply_first:
            cell, tap, source, branch = reads.permute(1, 2, 3, 0).nonzero(as_tuple=True)
            self._table("picks", (source * len(reads) + branch) * K * K + tap)
            self._table("pairs", cell * K * K + tap)
            self._table("targets", cell)
            return

        # The base reads as the branch with the fewest zeros, and in their place cell 0.
        base = max(reads, key=torch.sum).argmax(2)
        self._table("sources", base.flatten())

        # The border: a group for each branch that reads otherwise and each side of the grid.
        cell_at = torch.arange(H * P, device="cpu").view(H, P)
        tap_at = torch.arange(K * K, device="cpu").view(K, K)
        every, low, high = slice(None), slice(reach), slice(-reach, None)
        groups = []
        for branch, differences in enumerate(reads - F.one_hot(base, H * P)):
            for side in ((low, every), (high, every), (every, low), (every, high)):
                cells, taps = cell_at[side].reshape(-1, 1), tap_at[side].flatten()
                found = differences[cells, taps]  # (cells, taps, H*P)
                differences[cells, taps] = 0  # a corner's taps count for the first of its sides
                if found.any():
                    groups.append((found, cells * K * K + taps, branch * K * K + taps, cells))
        self.groups = len(groups)
        if groups:  # sides of fewer cells are filled up with zeros: (slots, groups, ...)
            differences, pairs, taps, targets = zip(*groups)
            self._table("differences", pad_sequence(differences).flatten(0, 2).float())
            self._table("pairs", pad_sequence(pairs).flatten())
            self._table("taps", torch.cat(taps))
            self._table("targets", pad_sequence(targets).flatten())

    def _read_first(self, cells, alpha, bias):
        B, places, C_in = cells.shape
        kernels = self.weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
        summed = kernels.sum(0)  # (K * K * C_in, C_out)
        keep = torch.is_grad_enabled()  # else nothing needs what is read unscaled
        # Few channels (the expanding layer) are little to read; a GPU and a compiler need no parts.
        whole = C_in < 16 or cells.is_cuda or torch.compiler.is_compiling()
        size = CPU_SAMPLES[keep]
        parts, out = [cells] if whole else cells.split(size), []
        alphas = [alpha] * len(parts) if whole or alpha is None else alpha.split(size)
        for part, scale in zip(parts, alphas):
            patches = part.index_select(1, self.sources)  # x1 (B, H*P * K*K, C_in)
            if scale is not None:
                patches = patches * scale if keep else patches.mul_(scale)
            out.append(torch.mm(patches.view(-1, len(summed)), summed))
        out = torch.cat(out).add_(bias).unflatten(0, (B, places))
        if self.groups:
            out = out.index_add(1, self.targets, self._border(cells, alpha, kernels))
        return out

    def _border(self, cells, alpha, kernels):
        """W2 (x2 - x1) wherever x2 is not x1: (B, slots * groups, C_out)."""
        (B, _, C_in), C_out = cells.shape, kernels.shape[2]
        kernels = kernels.reshape(-1, C_in, C_out).index_select(0, self.taps)
        kernels = kernels.view(self.groups, -1, C_out)  # (groups, taps * C_in, C_out)
        if alpha is None:
            read = self.differences.expand(B, -1, -1)
        else:
            read = alpha.index_select(1, self.pairs) * self.differences
        read = torch.bmm(read, cells)  # (B, slots * groups * taps, C_in)
        read = read.view(-1, self.groups, kernels.shape[1]).transpose(0, 1)
        added = torch.bmm(read, kernels)  # (groups, B * slots, C_out)
        return added.transpose(0, 1).reshape(B, len(self.targets), C_out)

    def _multiply_first(self, cells, alpha, bias):
        (B, places, _), C_out = cells.shape, self.weight.shape[1]
        kernels = self.weight.permute(2, 0, 3, 4, 1).flatten(1)
        size = (B, places * kernels.shape[1] // C_out, C_out)  # every cell with every kernel
        products = torch.mm(cells.flatten(0, 1), kernels).view(size).index_select(1, self.picks)
        if alpha is not None:
            products = products * alpha.index_select(1, self.pairs)
        return products.new_zeros(B, places, C_out).add_(bias).index_add_(1, self.targets, products)


class GridAttention(nn.Module):
    """The attention module pi of Eq. 7: x (B, C, H, P) -> alpha (B, H, P, K, K) in (0, 1),
    SE-type.

    Global average pool, linear to max(C / 16, 16), batch norm, ReLU, linear to K * K * H * P,
    sigmoid(. / temperature). The order and the widths are the release's; the paper's text puts
    batch norm first. The temperature, which the paper does not mention, is 30 in every published
    weight.
    """

    def __init__(self, channels, kernel_size, grid_shape):
        super().__init__()
        width = max(channels // 16, 16)
        self.shape = (*grid_shape, kernel_size, kernel_size)
        order = torch.arange(math.prod(self.shape)).view(kernel_size**2, -1).T.flatten()
        self.register_buffer("order", order, persistent=False)  # the release's has taps first
        self.squeeze = nn.Linear(channels, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.position = nn.Linear(width, len(order))
        self.register_buffer("temperature", torch.tensor(30.0), persistent=False)
        for linear in (self.squeeze, self.position):
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.position.bias)

    def forward(self, x):
        z = F.relu(self.norm(self.squeeze(x.mean((2, 3)))))  # (B, width)
        alpha = torch.sigmoid(self.position(z) / self.temperature)
        return alpha.index_select(1, self.order).unflatten(1, self.shape)


class DynamicGridConv(GridConv):
    """Dynamic grid convolution, Eq. 7-8: each cell of each pose scales the kernel's taps by its
    alpha.

    Arguments and shapes as GridConv. forward(x, alpha=None), reference(x, alpha=None): an alpha
    (B, H, P, K, K) replaces the attention's own. One alpha serves all branches.
    """

    def __init__(self, in_channels, *args, **options):
        super().__init__(in_channels, *args, **options)
        self.attention = GridAttention(in_channels, self.kernel_size, self.grid_shape)


# --------------------------------------------------------------------------------------------------
# 4. The grid lifting network (section 3.4, Figure 1)


def grid_layer(conv, channels, dropout):
    """(D-)GridConv, batch norm, ReLU, dropout of whole channels (section 4.2)."""
    return nn.Sequential(OrderedDict(
        conv=conv, norm=nn.BatchNorm2d(channels), relu=nn.ReLU(), dropout=nn.Dropout2d(dropout)))


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


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
        self.num_joints, self.pose_shape = num_joints, (num_joints, in_dim)
        self.autogrids, S, found = None, None, grid_shape
        if isinstance(layout, AutoGrids):
            self.autogrids, found, joints = layout, layout.grid_shape, layout.s_prob.shape[1]
            if joints != num_joints:
                raise ValueError(f"layout: an AutoGrids of {joints} joints, not {num_joints}")
        elif layout is not None:
            S = assignment_matrix(layout, num_joints)
            found = (len(layout), len(layout[0]))
        if found is None or tuple(found) != tuple(grid_shape or found):
            raise ValueError(f"grid_shape: {grid_shape}, the layout's is {found}")
        self.grid_shape = tuple(found)
        self.register_buffer("fixed_assignment", S)

        expand, inner, shrink = kernel_sizes
        kinds = {"grid": DynamicGridConv, None: GridConv}
        conv = kinds.get(attention, partial(AttentiveGridConv, attention))
        conv = partial(conv, padding=padding, grid_shape=self.grid_shape)
        self.expand = grid_layer(conv(in_dim, hidden, expand), hidden, dropout)
        self.blocks = nn.Sequential()
        for _ in range(blocks):
            layers = (grid_layer(conv(hidden, hidden, size), hidden, dropout) for size in inner)
            self.blocks.append(Residual(*layers))
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

    def forward_grid(self, grid):
        """The network between SGT and inverse SGT: (B, 2, H, P) -> (B, 3, H, P)."""
        x = self.blocks(self.expand(grid))
        with torch.autocast(x.device.type, enabled=False):  # coordinates are not rounded
            return self.shrink(x.to(self.shrink.weight.dtype))

    def forward(self, pose):
        if pose.shape[1:] != self.pose_shape:
            raise ValueError(f"pose: {*pose.shape,}, expected (B, {str(self.pose_shape)[1:]}")
        S = self.assignment()  # the same sample goes in and comes out
        if S is None:
            raise ValueError("layout=None: only forward_grid works")
        grid = sgt(pose.flatten(0, -3), S, self.grid_shape)  # frames (part 7) are samples in a row
        return inverse_sgt(self.forward_grid(grid), S)  # Eq. 9


# --------------------------------------------------------------------------------------------------
# 5. The authors' weights

# What the release calls the parts of its layers 1 and 2.
RELEASED_PARTS = {"norm": "batch_norm{}", "attention.squeeze": "atten_conv{}.fc",
                  "attention.norm": "atten_conv{}.bn",
                  "attention.position": "atten_conv{}.position_fc"}


def released_views(network, branches):
    """The network's weights under the names and in the shapes of the release: pairs (name,
    view)."""
    if network.autogrids is not None:
        yield "sgt_layer.sgt_trans_mat", network.autogrids.s_prob.data[None]
    # Layers are numbered 1 and 2, in each stage and around all of them.
    layers = {("", 1): network.expand, ("", 2): network.shrink}
    for i, block in enumerate(network.blocks):
        layers[f"linear_stages.{i}.", 1], layers[f"linear_stages.{i}.", 2] = block
    for (stage, number), layer in layers.items():
        for name, value in layer.state_dict().items():
            part, _, entry = name.removeprefix("conv.").rpartition(".")
            if part:
                # Linear layers are convolutions there.
                view = value[..., None, None] if value.dim() == 2 else value
                yield f"{stage}{RELEASED_PARTS[part].format(number)}.{entry}", view
            else:
                for branch, view in zip(branches, value):
                    yield f"{stage}w{number}.{branch}{entry}", view


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
    entries = dict(state_dict or {}).items()
    weights = {str(name).replace("module.", "").replace("_orig_mod.", ""): value
               for name, value in entries if isinstance(value, torch.Tensor)}
    branches = sorted(name[3:-6] for name in weights if name[:3] == "w1." and name[-6:] == "weight")
    if len(branches) != len(padding):
        raise ValueError(f"released GridConv: weights of {len(branches)} branches "
                         f"(w1.branch1_weight, w1.donut_conv.weight), padding {padding}")
    first = weights[f"w1.{branches[0]}weight"]
    stages = {name.split(".")[1] for name in weights if name.startswith("linear_stages.")}
    layout = RELEASED_5X5 if tuple(grid_shape) == (5, 5) else None
    if "sgt_layer.sgt_trans_mat" in weights:
        layout = AutoGrids(17, grid_shape, "random")
    network = GridLiftingNetwork(
        17, layout, grid_shape, max(1, first.shape[:1].numel()), len(stages), padding=padding,
        attention="grid" if "atten_conv1.fc.weight" in weights else None).to((first + 0.0).dtype)

    for name, view in released_views(network, branches):
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, view)  # older releases of torch did not count them
        found = tuple(weights[name].shape) if name in weights else "missing"
        if found != tuple(view.shape):
            raise ValueError(f"released GridConv: {name} is {found}, expected {*view.shape,}")
        view.copy_(weights.pop(name))
    if weights:
        raise ValueError(f"released GridConv: unexpected {min(weights)}")
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
        if design not in ("channel", "spatial", "spatial+channel"):
            raise ValueError(f"attention: unknown {design!r}; see GridLiftingNetwork")
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


class TemporalResidual(nn.Sequential):
    """The centre frames of the groups that the first layer reads, plus layers(x)."""

    def forward(self, x):
        frames = len(self[0].conv.frames)
        return x[frames // 2::frames] + super().forward(x)


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

    def __init__(self, num_joints=17, layout=HANDCRAFTED_5X5, filter_widths=(3, 3, 3), hidden=512,
                 padding=("circular", "replicate"), dropout=0.25):
        super().__init__(num_joints, layout, None, hidden, 0, padding=padding, dropout=dropout)
        odd = all(hasattr(T, "__index__") and T > 0 and T % 2 == 1 for T in filter_widths)
        if not odd or math.prod(filter_widths) == 1:
            raise ValueError(f"filter_widths: {filter_widths!r}, expected odd, not all 1")
        self.receptive_field = math.prod(filter_widths)
        self.pose_shape = (self.receptive_field, *self.pose_shape)

        conv = partial(TemporalGridConv, padding=padding, grid_shape=self.grid_shape)
        self.expand = grid_layer(conv(2, hidden, filter_widths[0]), hidden, dropout)
        for width in filter_widths[1:]:
            layers = (grid_layer(conv(hidden, hidden, T), hidden, dropout) for T in (width, 1))
            self.blocks.append(TemporalResidual(*layers))

    def scheduled_norms(self):
        """The batch norms whose momentum VideoPose3D's training schedules: all of them."""
        return [module for module in self.modules() if hasattr(module, "running_mean")]


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
    x, y = (torch.arange(1 - size, size, 2).to(p) / max(h, w) for size in (w, h))
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


class GridlessLifter(nn.Module):
    """An expanding layer, residual blocks of two layers and a shrinking one, each make(c_in,
    c_out), with batch norm, ReLU and dropout after all but the last.

    A layer sees the coordinates of `joints` joints at once: of all, or of each by itself.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints, make, joints, hidden, blocks, dropout):
        super().__init__()
        self.num_joints = num_joints

        def layer(width):
            after = nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)
            return nn.Sequential(make(width, hidden), *after)

        residuals = (Residual(layer(hidden), layer(hidden)) for _ in range(blocks))
        self.network = nn.Sequential(layer(2 * joints), *residuals, make(hidden, 3 * joints))

    def forward(self, pose):
        return self.network(pose)


class FullyConnectedLifter(GridlessLifter):
    """The baseline of Martinez et al. 2017: pose (B, J, 2) -> (B, J, 3) by six linear layers, two
    residual blocks of two.

    Without that paper's limit on the weights' norms. With its defaults 4,296,755 parameters.
    """

    def __init__(self, num_joints=17, hidden=1024, blocks=2, dropout=0.5):
        super().__init__(num_joints, nn.Linear, num_joints, hidden, blocks, dropout)
        self.network = nn.Sequential(nn.Flatten(), *self.network, nn.Unflatten(1, (num_joints, 3)))


class GraphConv(nn.Module):
    """Graph convolution in two steps (A.5), Z = W_aggr X Theta: features (B, C_in, J) ->
    (B, C_out, J).

    Theta is shared by all joints; W_aggr has a weight for each joint with itself and with each
    neighbour. It starts as Kipf and Welling's D^-1/2 W D^-1/2, W = A + I, D_ii = sum_j W_ij, and is
    learnt: fixed, it takes left and right for the same, so it cannot tell a person's front from the
    back. edges: pairs of joints, in either direction. ValueError: an edge to a joint outside
    0..J-1.
    """

    def __init__(self, in_channels, out_channels, edges, num_joints):
        super().__init__()
        self.register_buffer("W", torch.eye(num_joints), persistent=False)
        for i, j in edges:
            if not 0 <= min(i, j) <= max(i, j) < num_joints:
                raise ValueError(f"edges: {i, j}, not of 0..{num_joints - 1}")
            self.W[i, j] = self.W[j, i] = 1
        D = self.W.sum(1)
        self.aggregate = nn.Parameter(self.W * D.outer(D).rsqrt())
        self.theta = nn.Conv1d(in_channels, out_channels, 1, bias=False)

    def forward(self, x):
        return self.theta(x) @ (self.aggregate * self.W).T


class GraphConvLifter(GridlessLifter):
    """A lifter of graph convolutions, pose (B, J, 2) -> (B, J, 3), as deep as GridLiftingNetwork.
    ValueError: an edge to an unknown joint.
    """

    def __init__(self, num_joints=17, edges=H36M_EDGES, hidden=256, blocks=2, dropout=0.25):
        make = partial(GraphConv, edges=edges, num_joints=num_joints)
        super().__init__(num_joints, make, 1, hidden, blocks, dropout)

    def forward(self, pose):
        return super().forward(pose.mT).mT  # (B, C, J) in between
