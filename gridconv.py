"""GridConv, whole: "3D Human Pose Lifting with Grid Convolution", Kang, Liu, Yao, Wang, Wu, AAAI 2023.

A skeleton is woven onto a small grid (SGT), real convolutions lift the 2D grid pose to 3D, and the inverse SGT
unravels it again. This file needs torch alone; copy it into any project:

    net = GridLiftingNetwork()                    # 17 Human3.6M joints, 5 x 5 grid, 4.79 M parameters
    pose_3d = net(pose_2d)                        # (B, 17, 2) in about [-1, 1] -> (B, 17, 3) in metres, root-relative
    loss = (pose_3d - target).square().mean()     # Eq. 10

The parts stand in the paper's order: 1. SGT and its inverse (Eq. 1-3, 11-12), 2. AutoGrids (Eq. 4-5),
3. GridConv and D-GridConv (Eq. 6-8), 4. the grid lifting network (Eq. 9), 5. the authors' weights, 6. variants,
7. Temporal GridConv (B.3), 8. training together with a 2D detector (A.6), 9. lifters without a grid (A.5).
Shapes: B batch, J joints, H x P grid, C channels, K kernel size.
"""

import math
import re
from functools import lru_cache, partial

import torch
from torch import nn
from torch.nn import functional as F

# (parent, child) links of the 17-joint Human3.6M skeleton: 0 pelvis, 1-3 right leg, 4-6 left leg, 7 spine, 8 thorax,
# 9 neck/nose, 10 head, 11-13 left arm, 14-16 right arm.
H36M_EDGES = ((0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9), (9, 10),
              (8, 11), (11, 12), (12, 13), (8, 14), (14, 15), (15, 16))

# Figure 2: the torso is the anchor, kinematic chains run downwards, peers stand side by side.
HANDCRAFTED_5X5 = ((7, 7, 7, 7, 7),
                   (0, 8, 8, 8, 0),
                   (1, 14, 9, 11, 4),
                   (2, 15, 9, 12, 5),
                   (3, 16, 10, 13, 6))

# What the release trained with: the middle cell holds the mean of joints 8 and 9 going in, and is ignored coming out.
RELEASED_5X5 = ((7, 7, 7, 7, 7),
                (0, 8, 8, 8, 0),
                (1, 14, (8, 9), 11, 4),
                (2, 15, 9, 12, 5),
                (3, 16, 10, 13, 6))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Semantic grid transformation (section 3.1, A.1)


def assignment_matrix(layout, num_joints):
    """The assignment matrix S (H*P, J) of a grid layout (section 3.1).

    layout: H rows of P cells; a cell is a joint, or a tuple of joints whose mean it holds. Rows of S sum to 1 (Eq. 3),
    and S is binary unless a cell averages.
    ValueError: rows of different length, an unknown joint, fewer cells than joints, a joint without a cell of its own.
    """
    rows = [list(row) for row in layout]
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"layout: every row needs the same number of cells, found {[len(row) for row in rows]}")
    cells = [tuple(cell) if isinstance(cell, (tuple, list)) else (cell,) for row in rows for cell in row]
    if len(cells) < num_joints:
        raise ValueError(f"layout: {len(rows)} x {len(rows[0])} = {len(cells)} cells cannot hold {num_joints} joints")
    for cell in cells:
        for joint in cell:
            if not hasattr(joint, "__index__") or not 0 <= joint < num_joints:
                raise ValueError(f"layout: unknown joint {joint!r}, expected 0 to {num_joints - 1}")
        if not cell:
            raise ValueError("layout: an empty cell; a cell holds a joint or a tuple of joints")
    missing = sorted(set(range(num_joints)) - {cell[0] for cell in cells if len(set(cell)) == 1})
    if missing:
        raise ValueError(f"layout: no cell for joint {', '.join(map(str, missing))}; every joint needs one of its own")
    return torch.stack([F.one_hot(torch.tensor([int(joint) for joint in cell]), num_joints).float().mean(0) for cell in cells])


def sgt(pose, S, grid_shape):
    """SGT, Eq. 1: D = S G. pose (B, J, C), S (H*P, J) -> grid pose (B, C, H, P)."""
    grid = S.to(pose.dtype) @ pose  # (B, H*P, C)
    return grid.transpose(1, 2).unflatten(2, grid_shape)


def inverse_sgt(grid, S):
    """Inverse SGT, Eq. 11-12: each joint is the mean of its cells. grid (B, C, H, P), S (H*P, J) -> (B, J, C).

    Cells that average joints (entries of S strictly between 0 and 1) are left out; a joint that no cell holds, as
    AutoGrids may produce while it learns, comes out 0.
    """
    S = S.to(grid.dtype)
    S = S * (S == S.round())  # drops averaged cells; keeps the zeros, whose gradient tells AutoGrids what to add
    count = S.sum(0).clamp(min=1)
    return (S / count).T @ grid.flatten(2).transpose(1, 2)


def satisfies_topology(S, grid_shape, edges=H36M_EDGES):
    """Whether S (H*P, J) keeps the skeleton: each cell one joint (Eq. 3), linked joints adjacent somewhere (Eq. 2)."""
    H, P = grid_shape
    if not (((S == 0) | (S == 1)).all() and (S.sum(1) == 1).all()):
        return False
    joint = S.argmax(1).view(H, P).tolist()
    adjacent = {(joint[i][j], joint[i + a][j + b]) for i in range(H) for j in range(P)
                for a, b in ((0, 1), (1, 0)) if i + a < H and j + b < P}
    return all((i, j) in adjacent or (j, i) in adjacent for i, j in edges)


def random_layout(num_joints, grid_shape, seed=0):
    """A random layout with every joint at least once (section 4.5, Table 5), as a nested tuple. Same seed, same layout."""
    H, P = grid_shape
    if H * P < num_joints:
        raise ValueError(f"grid_shape: {H} x {P} = {H * P} cells cannot hold {num_joints} joints")
    generator = torch.Generator().manual_seed(seed)
    joints = torch.cat([torch.arange(num_joints), torch.randint(num_joints, (H * P - num_joints,), generator=generator)])
    joints = joints[torch.randperm(H * P, generator=generator)].view(H, P)
    return tuple(tuple(row) for row in joints.tolist())


def shuffle_layout(layout, how, seed=0):
    """The layout with its rows, its columns or all its cells permuted (Table B). how: "row", "column" or "global"."""
    H, P = len(layout), len(layout[0])
    if how not in ("row", "column", "global"):
        raise ValueError(f"how: unknown shuffle {how!r}, expected 'row', 'column' or 'global'")
    order = torch.randperm({"row": H, "column": P, "global": H * P}[how],
                           generator=torch.Generator().manual_seed(seed)).tolist()
    if how == "row":
        return tuple(tuple(layout[i]) for i in order)
    if how == "column":
        return tuple(tuple(row[j] for j in order) for row in layout)
    cells = [cell for row in layout for cell in row]
    return tuple(tuple(cells[order[i * P + j]] for j in range(P)) for i in range(H))


# ---------------------------------------------------------------------------------------------------------------------
# 2. AutoGrids: the learnable SGT (section 3.2, A.3)


class AutoGrids(nn.Module):
    """A learnable assignment matrix: forward() -> S (H*P, J), exactly one-hot rows, straight-through gradients (Eq. 4-5).

    prior: where S_prob starts: "handcrafted" (one-hot; 17 joints on 5 x 5, 32 on 7 x 5), "random" (uniform in [0, 1),
    the paper's choice for other sizes), or a layout (one-hot). S_prob are logits. In training with `noise` on, one
    Gumbel sample is added per forward; the caller switches `noise` off (the paper after epoch 30). Nothing is random
    in evaluation. ValueError: fewer cells than joints, an unknown prior, a prior that does not fit.
    """

    def __init__(self, num_joints=17, grid_shape=(5, 5), prior="handcrafted"):
        super().__init__()
        H, P = self.grid_shape = tuple(grid_shape)
        if H * P < num_joints:
            raise ValueError(f"grid_shape: {H} x {P} = {H * P} cells cannot hold {num_joints} joints")
        if prior == "random":
            S = torch.rand(H * P, num_joints)
        else:
            if prior == "handcrafted":
                prior = {(17, 5, 5): HANDCRAFTED_5X5, (32, 7, 5): HANDCRAFTED_7X5}.get((num_joints, H, P))
            if prior is None or isinstance(prior, str):
                raise ValueError(f"prior: no handcrafted layout of {num_joints} joints on {H} x {P}; "
                                 "expected 'random' or a layout" if prior is None else
                                 f"prior: unknown {prior!r}, expected 'handcrafted', 'random' or a layout")
            if len(prior) != H or any(len(row) != P for row in prior):
                raise ValueError(f"prior: rows of {[len(row) for row in prior]} cells, expected {H} rows of {P}")
            S = assignment_matrix(prior, num_joints)
            if (S.amax(1) < 1).any():
                raise ValueError("prior: a cell that averages joints; AutoGrids starts from one joint a cell")
        self.s_prob = nn.Parameter(S)
        self.noise = True

    def forward(self):
        """S (H*P, J): one sample with noise in training, the most probable assignment otherwise."""
        soft = self.s_prob
        if self.training and self.noise:
            soft = soft - torch.empty_like(soft).exponential_().log()  # Eq. 4: Gumbel(0, 1) noise
        relaxed = soft.softmax(1)  # temperature 1 (A.3)
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)  # Eq. 5
        # Straight-through. The bracket is exactly 0, which F.gumbel_softmax(hard=True) does not promise: its rows can
        # come out as 1 - 6e-8, and Eq. 11 counts entries equal to 1.
        return hard + (relaxed - relaxed.detach())

    @torch.no_grad()
    def assignment(self):
        """The current binary S (H*P, J), without noise."""
        return F.one_hot(self.s_prob.argmax(1), self.s_prob.shape[1]).to(self.s_prob.dtype)

    def dropped(self):
        """The joints that no cell of the current assignment holds, as a list."""
        return (self.assignment().sum(0) == 0).nonzero().flatten().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# 3. GridConv (Eq. 6) and D-GridConv (Eq. 7-8)


@lru_cache(maxsize=None)
def _taps(padding, grid_shape, K):
    """Which cell each (cell, tap) reads, for all branches at once, with products shared where branches read the same.

    padding: per branch a (vertical, horizontal) pair of modes. Returns (mixes, classes): mixes, the sets of branches
    whose kernels are added before use; classes, the cells grouped by the (mix, tap) products they need:
    {((mix, tap), ...): [(cell, (source, ...)), ...]}.
    """
    H, P = grid_shape
    inside = {"circular": lambda i, n: i % n, "replicate": lambda i, n: min(max(i, 0), n - 1),
              "zeros": lambda i, n: i if 0 <= i < n else None}
    mixes, classes = [], {}
    for i in range(H):
        for j in range(P):
            products = []
            for tap in range(K * K):
                a, b = i + tap // K - K // 2, j + tap % K - K // 2
                readers = {}  # source cell -> the branches that read it here
                for branch, (vertical, horizontal) in enumerate(padding):
                    r, c = inside[vertical](a, H), inside[horizontal](b, P)
                    if r is not None and c is not None:
                        readers.setdefault(r * P + c, []).append(branch)
                for source, mix in readers.items():
                    if mix not in mixes:
                        mixes.append(mix)
                    products.append(((mixes.index(mix), tap), source))
            products.sort()
            kernels, sources = zip(*products)
            classes.setdefault(kernels, []).append((i * P + j, sources))
    return mixes, classes


class GridConv(nn.Module):
    """Grid convolution, Eq. 6: x (B, C_in, H, P) -> (B, C_out, H, P), the sum of one convolution per padding branch.

    padding: one entry for each branch, any number of them; an entry is "circular", "replicate" or "zeros", or a pair
    (vertical, horizontal) of these (Table D writes its pairs the other way round). kernel_size: odd.
    weight (branches, C_out, C_in, K, K), bias (branches, C_out). Any memory format; channels_last is the fast one.
    ValueError: an unknown padding, an even kernel, a grid of another shape.

    The fast form. Branches differ only where a tap leaves the grid. Of the 9 x 25 = 225 (cell, tap) pairs of a 5 x 5
    grid, circular and replicate padding read the same cell in 169: there the two kernels are added first and one
    product serves both. 169 + 2 x 56 = 281 products remain of the plain form's 450. (Zeros cost nothing: such taps
    are left out.) Cells that need the same list of kernels form a class (on 5 x 5: inside, four sides, four corners),
    and a class is one matrix product: its gathered taps (B * cells, taps * C_in) times its stacked kernels. Where
    there is far less to write than to read (the shrinking layer, 256 to 3 channels), every kernel is applied to every
    cell first, and the 281 small products that count are picked, scaled and added.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, padding=("circular", "replicate"), grid_shape=(5, 5),
                 bias=True):
        super().__init__()
        if isinstance(padding, str):
            raise ValueError(f"padding: {padding!r}, expected a tuple with an entry for each branch, as ({padding!r},)")
        modes = tuple((p, p) if isinstance(p, str) else tuple(p) for p in padding)
        for mode in (m for pair in modes for m in pair):
            if mode not in ("circular", "replicate", "zeros"):
                raise ValueError(f"padding: unknown mode {mode!r}, expected 'circular', 'replicate' or 'zeros'")
        if not modes or any(len(pair) != 2 for pair in modes):
            raise ValueError(f"padding: {padding!r}, expected a name or a (vertical, horizontal) pair for each branch")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: {kernel_size}, expected an odd number")
        self.grid_shape, self.kernel_size = tuple(grid_shape), kernel_size
        self.weight = nn.Parameter(torch.empty(len(modes), out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(len(modes), out_channels)) if bias else None
        bound = 1 / math.sqrt(in_channels * kernel_size ** 2)  # as nn.Conv2d: kaiming_uniform_(a=sqrt(5)) per branch
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        mixes, classes = _taps(modes, self.grid_shape, kernel_size)
        taps = kernel_size ** 2
        self.classes = [(len(cells), len(kernels)) for kernels, cells in classes.items()]  # (cells, taps) of each
        # Where each cell stands among the classes' outputs. A list: for the gradient of an index_select here torch.compile
        # (2.13, two threads) writes C++ that stores outside the array.
        self.order = torch.tensor([cell for cells in classes.values() for cell, _ in cells]).argsort().tolist()
        self.multiply_first = 4 * out_channels < in_channels
        products = [(cell, mix * taps + tap, source, cell * taps + tap) for kernels, cells in classes.items()
                    for cell, sources in cells for (mix, tap), source in zip(kernels, sources)]
        cell, kernel, source, pair = zip(*products)
        for name, table in (
                ("mixing", [[float(branch in mix) for branch in range(len(modes))] for mix in mixes]),
                ("cell", cell), ("kernel", kernel), ("source", source), ("pair", pair),  # of each product, class by class
                ("kernels", [mix * taps + tap for kernels in classes for mix, tap in kernels])):  # of each class
            self.register_buffer(name, torch.tensor(table), persistent=False)

    def forward(self, x, alpha=None):
        B, C, H, P = x.shape
        if (H, P) != self.grid_shape or C != self.weight.shape[2]:
            raise ValueError(f"x: {C} channels on a {H} x {P} grid, expected {self.weight.shape[2]} on "
                             f"{self.grid_shape[0]} x {self.grid_shape[1]}")
        cells = x.permute(0, 2, 3, 1).reshape(B, H * P, C)  # a view where x is channels_last
        bank = self.mixing @ self.weight.permute(0, 3, 4, 2, 1).flatten(1)  # the branches' kernels, added
        bank = bank.view(-1, C, self.weight.shape[1])  # (mixes * K * K, C_in, C_out)
        if alpha is not None:
            K = self.kernel_size
            if alpha.shape != (B, H, P, K, K):
                raise ValueError(f"alpha: shape {tuple(alpha.shape)}, expected {(B, H, P, K, K)}")
            alpha = alpha.reshape(B, H * P * K * K, 1)
        out = (self._multiply_first if self.multiply_first else self._gather_first)(cells, bank, alpha)
        if self.bias is not None:
            out = out + self.bias.sum(0)
        return out.view(B, H, P, out.shape[2]).permute(0, 3, 1, 2)

    def _gather_first(self, cells, bank, alpha):
        B, _, C = cells.shape
        out, product, first = [], 0, 0
        for count, taps in self.classes:
            these = slice(product, product + count * taps)
            patch = cells.index_select(1, self.source[these])  # (B, count * taps, C_in)
            if alpha is not None:
                scale = alpha.index_select(1, self.pair[these])  # Eq. 8: alpha scales the kernel's taps
                # No gradient needs the unscaled patch: a tensor less to write. Autocast may mix dtypes.
                in_place = not torch.is_grad_enabled() and patch.dtype == scale.dtype
                patch = patch.mul_(scale) if in_place else patch * scale
            kernel = bank.index_select(0, self.kernels[first:first + taps]).flatten(0, 1)  # (taps * C_in, C_out)
            out.append((patch.view(B * count, taps * C) @ kernel).view(B, count, kernel.shape[1]))
            product, first = product + count * taps, first + taps
        out = torch.cat(out, 1).unbind(1)
        return torch.stack([out[i] for i in self.order], 1)  # (B, H * P, C_out)

    def _multiply_first(self, cells, bank, alpha):
        B, cell_count, _ = cells.shape
        out = cells @ bank.transpose(0, 1).flatten(1)  # every kernel on every cell
        out = out.view(B, cell_count * len(bank), bank.shape[2])
        out = out.index_select(1, self.source * len(bank) + self.kernel)  # (B, products, C_out)
        if alpha is not None:
            out = out * alpha.index_select(1, self.pair)
        return out.new_zeros(B, cell_count, out.shape[2]).index_add(1, self.cell, out)


class GridAttention(nn.Module):
    """The attention module pi of Eq. 7: x (B, C, H, P) -> alpha (B, H, P, K, K) in (0, 1), SE-type.

    Global average pool, linear to max(C / 16, 16), batch norm, ReLU, linear to K * K * H * P, sigmoid(. / temperature).
    The order and the widths are the release's; the paper's text puts batch norm first. The temperature, which the
    paper does not mention, is 30 in every published weight.
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
        return alpha.view(x.shape[0], *self.shape).permute(0, 3, 4, 1, 2)


class DynamicGridConv(GridConv):
    """Dynamic grid convolution, Eq. 7-8: every cell of every pose scales the kernel's K x K taps by its own alpha.

    Arguments and shapes as GridConv. forward(x, alpha=None): alpha (B, H, P, K, K) replaces the attention's own. One
    alpha serves all branches.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, padding=("circular", "replicate"), grid_shape=(5, 5),
                 bias=True):
        super().__init__(in_channels, out_channels, kernel_size, padding, grid_shape, bias)
        self.attention = GridAttention(in_channels, kernel_size, self.grid_shape)

    def forward(self, x, alpha=None):
        return super().forward(x, self.attention(x) if alpha is None else alpha)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The grid lifting network (section 3.4, Figure 1)


def check_pose(pose, *wanted):
    """ValueError unless pose is (B, *wanted)."""
    if tuple(pose.shape[1:]) != wanted:
        raise ValueError(f"pose: shape {tuple(pose.shape)}, expected (B, {', '.join(map(str, wanted))})")


class GridLayer(nn.Module):
    """(D-)GridConv, batch norm, ReLU, dropout of whole channels (section 4.2)."""

    def __init__(self, conv, channels, dropout):
        super().__init__()
        self.conv, self.norm, self.dropout = conv, nn.BatchNorm2d(channels), nn.Dropout2d(dropout)

    def forward(self, x):
        return self.dropout(F.relu(self.norm(self.conv(x))))


class GridLiftingNetwork(nn.Module):
    """The grid lifting network, Eq. 9: pose (B, J, 2) in about [-1, 1] -> (B, J, 3) in metres, root-relative.

    layout: a nested tuple (handcrafted SGT), an AutoGrids (learnable SGT), or None with a grid_shape: then only
    forward_grid works. kernel_sizes (a, (b, c), d): the expanding layer, the two layers of a block, the shrinking one
    (Table E). padding: the branches of every layer, see GridConv. attention: "grid" is D-GridConv, None vanilla
    GridConv, "channel", "spatial" and "spatial+channel" the other designs of Figure 8.
    ValueError: what assignment_matrix and GridConv refuse, a layout of another size, neither layout nor grid_shape, an
    unknown attention, a pose of another shape, a pose where there is no layout.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints=17, layout=HANDCRAFTED_5X5, grid_shape=None, hidden=256, blocks=2,
                 kernel_sizes=(3, (3, 3), 3), padding=("circular", "replicate"), attention="grid", dropout=0.25,
                 in_dim=2, out_dim=3):
        super().__init__()
        if layout is None and grid_shape is None:
            raise ValueError("grid_shape: needed where there is no layout")
        self.num_joints, self.in_dim = num_joints, in_dim
        self.autogrids = layout if isinstance(layout, AutoGrids) else None
        if self.autogrids is not None:
            found, joints = layout.grid_shape, layout.s_prob.shape[1]
            if joints != num_joints:
                raise ValueError(f"layout: an AutoGrids of {joints} joints, expected {num_joints}")
        else:
            S = None if layout is None else assignment_matrix(layout, num_joints)
            self.register_buffer("fixed_assignment", S)
            found = grid_shape if layout is None else (len(layout), len(layout[0]))
        if grid_shape is not None and tuple(grid_shape) != tuple(found):
            raise ValueError(f"grid_shape: {tuple(grid_shape)}, but the layout is {tuple(found)}")
        self.grid_shape = tuple(found)
        if attention not in CONVOLUTIONS:
            raise ValueError(f"attention: unknown {attention!r}, expected one of {list(CONVOLUTIONS)}")

        def conv(c_in, c_out, kernel_size, bias=True):
            return CONVOLUTIONS[attention](c_in, c_out, kernel_size, padding, self.grid_shape, bias)

        expand, (first, second), shrink = kernel_sizes
        self.expand = GridLayer(conv(in_dim, hidden, expand), hidden, dropout)
        self.blocks = nn.ModuleList(
            nn.Sequential(GridLayer(conv(hidden, hidden, first), hidden, dropout),
                          GridLayer(conv(hidden, hidden, second), hidden, dropout)) for _ in range(blocks))
        self.shrink = conv(hidden, out_dim, shrink, bias=False)  # no bias, as released

    @property
    def temperature(self):
        """The temperature of the attention's sigmoid, 30 unless set; without grid attention it has no effect."""
        return next((m.temperature.item() for m in self.modules() if isinstance(m, GridAttention)), 30.0)

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
        x = self.expand(grid)
        for block in self.blocks:
            x = x + block(x)
        return self.shrink(x)

    def forward(self, pose):
        check_pose(pose, self.num_joints, self.in_dim)
        S = self.assignment()  # the same sample goes in and comes out
        if S is None:
            raise ValueError("this network has no layout (layout=None): only forward_grid works")
        return inverse_sgt(self.forward_grid(sgt(pose, S, self.grid_shape)), S)  # Eq. 9


# ---------------------------------------------------------------------------------------------------------------------
# 5. The authors' weights


def from_released(state_dict, padding, grid_shape=(5, 5)):
    """A GridLiftingNetwork with the authors' weights: vanilla, dynamic and AutoGrids alike, in the weights' own dtype.

    padding, which the file does not say: ("circular", "replicate") for the models on ground-truth 2D, ("circular",
    "zeros") for those on HRNet's and for vanilla ones. Without a learnt grid the layout is RELEASED_5X5 on 5 x 5 and
    None on other shapes. ValueError: weights that are not GridConv's, or that do not fit the grid or the branches.
    """
    try:
        return _read_released(state_dict, padding, grid_shape)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"not the weights of a released GridConv that fit padding {padding} on {grid_shape}: {error}") from None


def _read_released(state_dict, padding, grid_shape):
    """from_released, with whatever error reading something else ends in."""
    new = {}
    for key in sorted(state_dict):
        value = state_dict[key]
        found = re.fullmatch(r"(?:linear_stages\.(\d+)\.)?(w|batch_norm|atten_conv)([12])\.(.+)", key)
        if key == "sgt_layer.sgt_trans_mat":  # (1, H*P, J)
            new["autogrids.s_prob"], = value
            continue
        if not found:
            raise ValueError(f"unexpected entry {key!r}")
        block, part, which, rest = found.groups()
        layer = f"blocks.{block}.{int(which) - 1}" if block else ("expand", "shrink")[int(which) - 1]
        conv = layer if layer == "shrink" else f"{layer}.conv"
        if part == "w":  # an entry per branch: branch1_weight, or donut_conv.weight (circular), tablet_conv.weight
            new.setdefault(f"{conv}.{re.split('[._]', rest)[-1]}", []).append(value)
        elif part == "batch_norm":
            new[f"{layer}.norm.{rest}"] = value
        else:
            name, _, entry = rest.partition(".")  # an unknown name stays, and load_state_dict names it
            name = {"fc": "squeeze", "bn": "norm", "position_fc": "position"}.get(name, name)
            new[f"{conv}.attention.{name}.{entry}"] = value.flatten(1) if value.dim() == 4 else value  # 1 x 1 conv
    new = {k: torch.stack(v) if isinstance(v, list) else v for k, v in new.items()}
    if "expand.conv.weight" not in new or "shrink.weight" not in new:
        raise ValueError(f"no w1 and w2 among {len(state_dict)} entries")
    kernel = {k: v.shape[-1] for k, v in new.items() if v.dim() == 5}
    blocks = sum(k.endswith(".0.conv.weight") for k in new)
    S = new.get("autogrids.s_prob")
    if S is not None:
        layout = AutoGrids(S.shape[1], grid_shape, "random")
    else:
        layout = RELEASED_5X5 if tuple(grid_shape) == (5, 5) else None
    _, hidden, in_dim = new["expand.conv.weight"].shape[:3]
    network = GridLiftingNetwork(
        17 if S is None else S.shape[1], layout, grid_shape, hidden, blocks,
        (kernel["expand.conv.weight"], tuple(kernel.get(f"blocks.0.{i}.conv.weight", 3) for i in (0, 1)),
         kernel["shrink.weight"]), padding, "grid" if "expand.conv.attention.squeeze.weight" in new else None,
        in_dim=in_dim, out_dim=new["shrink.weight"].shape[1])
    if network.autogrids is None and layout is not None:
        new["fixed_assignment"] = network.fixed_assignment
    network.load_state_dict(new)
    return network.to(new["expand.conv.weight"].dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Variants and ablations

# Table 6, 32 joints on 7 x 5. The paper does not print its layout; this one is ours and satisfies Eq. 2 and 3.
# Arms above, head between them, legs below.
HANDCRAFTED_7X5 = ((29, 28, 21, 22, 23),
                   (26, 27, 20, 19, 18),
                   (25, 30, 14, 13, 17),
                   (24, 31, 15, 12, 16),
                   (12, 1, 0, 6, 7),
                   (3, 2, 11, 12, 8),
                   (4, 5, 0, 10, 9))


class AttentiveGridConv(GridConv):
    """GridConv with the attention designs that Figure 8 compares with (section 4.5), applied to what the layer puts out.

    "channel": squeeze and excitation (Hu et al. 2018), one factor in (0, 1) for each channel. "spatial": one for each
    cell, from the mean and the maximum over channels (a reduced CBAM, Woo et al. 2018; its convolution is a GridConv of
    the same padding). "spatial+channel": channel first, then spatial, as CBAM. The paper gives no more than these names.
    """

    def __init__(self, design, in_channels, out_channels, kernel_size=3, padding=("circular", "replicate"),
                 grid_shape=(5, 5), bias=True):
        super().__init__(in_channels, out_channels, kernel_size, padding, grid_shape, bias)
        width = max(out_channels // 16, 16)
        self.channel = self.spatial = None
        if "channel" in design:
            self.channel = nn.Sequential(nn.Linear(out_channels, width), nn.ReLU(), nn.Linear(width, out_channels))
        if "spatial" in design:
            self.spatial = GridConv(2, 1, 3, padding, grid_shape)

    def forward(self, x):
        x = super().forward(x)
        if self.channel is not None:
            x = x * torch.sigmoid(self.channel(x.mean((2, 3))))[:, :, None, None]
        if self.spatial is not None:
            x = x * torch.sigmoid(self.spatial(torch.stack([x.mean(1), x.amax(1)], 1)))
        return x


CONVOLUTIONS = {"grid": DynamicGridConv, None: GridConv,
                **{name: partial(AttentiveGridConv, name) for name in ("channel", "spatial", "spatial+channel")}}


# ---------------------------------------------------------------------------------------------------------------------
# 7. Temporal GridConv (B.3, Table C)


class TemporalGridConv(nn.Module):
    """3D D-GridConv (B.3) with K_t = frames and K_s = 3: a D-GridConv for each of K_t frames, added up.

    x (B * T, C_in, H, P), the T frames of a sample in a row -> (B * T / K_t, C_out, H, P). Groups of K_t frames do not
    overlap: for one pose a window the same as VideoPose3D's dilation, and cheaper. K_t = 1 is D-GridConv itself.
    """

    def __init__(self, in_channels, out_channels, frames, padding, grid_shape):
        super().__init__()
        self.frames = nn.ModuleList(  # no bias: batch norm follows
            DynamicGridConv(in_channels, out_channels, 3, padding, grid_shape, bias=False) for _ in range(frames))

    def forward(self, x):
        x = x.unflatten(0, (-1, len(self.frames)))  # (B * T / K_t, K_t, C_in, H, P)
        return sum(conv(x[:, frame]) for frame, conv in enumerate(self.frames))


class TemporalGridLiftingNetwork(GridLiftingNetwork):
    """Temporal GridConv: poses (B, T, J, 2) in about [-1, 1] -> (B, J, 3), the centre frame's, metres, root-relative.

    VideoPose3D (Pavllo et al. 2019) with 3D D-GridConv in place of its convolutions: an expanding layer, then a residual
    block for each further filter width, of K_t = width and then K_t = 1, whose shortcut takes the centre frame of each
    group; T = receptive_field is the product of the widths. One assignment serves all frames.
    With its defaults 38,063,324 parameters (Table C: 38.1 M, which fits hidden = 512; no C is printed). Ours, where the
    paper is silent: every frame of a kernel has an attention of its own, fed by the frame it reads (one for all frames
    would make 38.0 M); dropout takes whole channels, and the shrinking layer has K_t = 1 and K_s = 3, as in the
    single-frame network.
    ValueError: what GridLiftingNetwork refuses; a filter width that is even or below 1, or a product of 1.
    """

    def __init__(self, num_joints=17, layout=HANDCRAFTED_5X5, grid_shape=None, filter_widths=(3, 3, 3), hidden=512,
                 padding=("circular", "replicate"), dropout=0.25, in_dim=2, out_dim=3):
        super().__init__(num_joints, layout, grid_shape, hidden, 0, padding=padding, dropout=dropout, in_dim=in_dim,
                         out_dim=out_dim)
        odd = lambda width: hasattr(width, "__index__") and width > 0 and width % 2 == 1
        if not isinstance(filter_widths, (tuple, list)) or not all(map(odd, filter_widths)) or math.prod(filter_widths) == 1:
            raise ValueError(f"filter_widths: {filter_widths!r}, expected odd numbers above 0 whose product is above 1")
        self.filter_widths, self.receptive_field = tuple(filter_widths), math.prod(filter_widths)

        def layer(c_in, frames):
            return GridLayer(TemporalGridConv(c_in, hidden, frames, padding, self.grid_shape), hidden, dropout)

        self.expand = layer(in_dim, filter_widths[0])
        self.blocks = nn.ModuleList(nn.Sequential(layer(hidden, width), layer(hidden, 1)) for width in filter_widths[1:])

    def forward_grid(self, grid):
        """The network between SGT and inverse SGT: (B * T, 2, H, P) -> (B, 3, H, P)."""
        x = self.expand(grid)
        for width, block in zip(self.filter_widths[1:], self.blocks):
            x = x.unflatten(0, (-1, width))[:, width // 2] + block(x)
        return self.shrink(x)

    def forward(self, pose):
        check_pose(pose, self.receptive_field, self.num_joints, self.in_dim)
        return super().forward(pose.flatten(0, 1))

    def scheduled_norms(self):
        """The batch norms whose momentum VideoPose3D's training schedules: all of them."""
        return [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# ---------------------------------------------------------------------------------------------------------------------
# 8. Training together with a 2D detector (A.6)


def soft_argmax(heatmaps):
    """Soft-argmax (Sun et al. 2018): heatmaps (B, J, h, w), before any softmax -> the mean position (B, J, 2) of each.

    (x, y) from the middle of the map, in units of half its longer side, pixels at their centres: what a lifter takes in
    when the map covers the image (normalisation `longest`).
    """
    h, w = heatmaps.shape[2:]
    p = heatmaps.flatten(2).softmax(2).unflatten(2, (h, w))
    x, y = ((2 * torch.arange(n, device=p.device, dtype=p.dtype) + 1 - n) / max(h, w) for n in (w, h))
    return torch.stack([p.sum(2) @ x, p.sum(3) @ y], 2)


def joint_loss(pose_2d, target_2d, pose_3d, target_3d, weight=160.0):
    """Eq. 13: the mean absolute error of 2D poses (..., 2) plus weight (lambda) times the mean squared error of 3D poses.

    Means over coordinates, as in training with Eq. 10; metres in 3D. The paper prints norms without units. Start from a
    lifter trained alone: against a fresh one the 3D term outweighs the other, and the detector hardly learns.
    """
    return F.l1_loss(pose_2d, target_2d) + weight * F.mse_loss(pose_3d, target_3d)


# ---------------------------------------------------------------------------------------------------------------------
# 9. The neighbours (A.5): lifting without a grid


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


def normalised(layer, channels, dropout):
    """The layer, then batch norm, ReLU and dropout."""
    return nn.Sequential(layer, nn.BatchNorm1d(channels), nn.ReLU(), nn.Dropout(dropout))


class FullyConnectedLifter(nn.Module):
    """The baseline of Martinez et al. 2017: pose (B, J, 2) -> (B, J, 3) by six linear layers, two residual blocks of two.

    Batch norm, ReLU and dropout after every linear layer but the last; without that paper's limit on the weights' norms.
    With its defaults 4,296,755 parameters. ValueError: a pose of another shape.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints=17, hidden=1024, blocks=2, dropout=0.5, in_dim=2, out_dim=3):
        super().__init__()
        self.num_joints, self.in_dim = num_joints, in_dim

        layer = lambda width: normalised(nn.Linear(width, hidden), hidden, dropout)
        self.network = nn.Sequential(
            nn.Flatten(), layer(num_joints * in_dim), *(Residual(layer(hidden), layer(hidden)) for _ in range(blocks)),
            nn.Linear(hidden, num_joints * out_dim), nn.Unflatten(1, (num_joints, out_dim)))

    def forward(self, pose):
        check_pose(pose, self.num_joints, self.in_dim)
        return self.network(pose)


class GraphConv(nn.Module):
    """Graph convolution Z = D^-1/2 W D^-1/2 X Theta, W = A + I, D_ii = sum_j W_ij: features (B, C_in, J) -> (B, C_out, J).

    Kipf and Welling 2017, as Cai et al. 2019 use it on the skeleton. edges: pairs of joints, in either direction.
    ValueError: an edge to a joint outside 0..J-1.
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

    An expanding layer, residual blocks of two layers, a shrinking one; batch norm, ReLU and dropout after all but the last.
    ValueError: a pose of another shape, an edge to an unknown joint.
    """

    receptive_field = 1  # frames

    def __init__(self, num_joints=17, edges=H36M_EDGES, hidden=256, blocks=2, dropout=0.25, in_dim=2, out_dim=3):
        super().__init__()
        self.num_joints, self.in_dim = num_joints, in_dim

        layer = lambda channels: normalised(GraphConv(channels, hidden, edges, num_joints), hidden, dropout)
        self.network = nn.Sequential(layer(in_dim), *(Residual(layer(hidden), layer(hidden)) for _ in range(blocks)),
                                     GraphConv(hidden, out_dim, edges, num_joints))

    def forward(self, pose):
        check_pose(pose, self.num_joints, self.in_dim)
        return self.network(pose.transpose(1, 2)).transpose(1, 2)  # (B, C, J) in between
