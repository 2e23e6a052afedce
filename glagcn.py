"""GLA-GCN: Global-local Adaptive Graph Convolutional Network for 3D Human Pose Estimation from
Monocular Video. Bruce X.B. Yu, Zhi Zhang, Yongxu Liu, Sheng-hua Zhong, Yan Liu, Chang Wen Chen.
ICCV 2023.

The whole method in the paper's order; it needs torch and nothing else.

    model = GLAGCN(filter_widths=(3, 3, 3))          # a window of 3 * 3 * 3 = 27 frames
    pose = model(torch.rand(8, 27, 17, 2) * 2 - 1)   # (B, T, J, 2) -> (B, J, 3) metres
    mean_distance(pose, torch.zeros(8, 17, 3)).backward()

B batch, T frames, J joints, C channels. Between the layers features are (B, C, J, T) in torch's
channels_last memory format, so in memory they lie as (B, J, T, C): the 1x1 convolutions are one
matrix product over all joints and frames, mixing joints is one product for each sample with T*C
columns, and the temporal convolution runs along unbroken memory. Any other memory format gives
the same numbers, more slowly. Initial weights are those of the authors' release.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# Links as (parent, child).
H36M_EDGES = ((0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9), (9, 10),
              (8, 11), (11, 12), (12, 13), (8, 14), (14, 15), (15, 16))
# The release's list: some links point up the tree, some down, and its weights were trained so.
HUMANEVA15_EDGES = ((1, 14), (2, 1), (3, 2), (4, 3), (5, 1), (6, 5), (7, 6), (0, 1), (11, 0),
                    (12, 11), (13, 12), (8, 0), (9, 8), (10, 9))
# What the release's model on detected 2D was trained with: two links are missing, so that two limbs
# hang in no graph. The one list that may leave joints unconnected.
_MISSING = ((5, 1), (8, 0))
HUMANEVA15_DETECTED_EDGES = tuple(edge for edge in HUMANEVA15_EDGES if edge not in _MISSING)
# The dataset's own tree from the pelvis (14); the release's script passes Human3.6M's links to this
# joint order.
MPI3DHP_EDGES = ((14, 15), (15, 1), (1, 16), (16, 0), (1, 2), (2, 3), (3, 4), (1, 5), (5, 6),
                 (6, 7), (14, 8), (8, 9), (9, 10), (14, 11), (11, 12), (12, 13))

CACHE_FLOATS = 400_000  # of x at a time on a CPU, in AdaptiveGraphConv
TEMPORAL_KERNEL = 9  # Gamma; the release's, where the paper says 9 in one place and 3 in another


# --------------------------------------------------------------------------------------------------
# 1. The graph (section 3.1)


def spatial_partition(edges, num_joints, normalisation="column"):
    """The fixed graphs A_k of Eq. 2: (3, J, J) float64 for the joint itself, its inward and its
    outward links.

    edges: (parent, child) pairs; they need to connect all joints, not to be a tree, and only
    HUMANEVA15_DETECTED_EDGES need not. A[1][parent, child] = 1, so x @ A gives a child its parent's
    feature, and A[2] is the transpose.
    normalisation: "column", A D^-1 with empty columns left 0, is the release's; "symmetric" the
    paper's L^-1/2 A L^-1/2 with L_ii = sum_j A_ij + 0.001.
    ValueError: an edge that is not two different joints of 0..J-1, joints that no path of edges
    connects to joint 0, an unknown normalisation.
    """
    edges = tuple(tuple(edge) for edge in edges)
    inward, reached = torch.zeros(num_joints, num_joints, dtype=torch.float64), {0}
    for edge in edges:
        known = all(joint in range(num_joints) for joint in edge)
        if not known or len(edge) != 2 or edge[0] == edge[1]:
            raise ValueError(f"edges: {edge}, expected two joints of 0..{num_joints - 1}")
        inward[edge] = 1
    for _ in range(num_joints):
        reached |= {joint for edge in edges if reached & set(edge) for joint in edge}
    apart = sorted(set(range(num_joints)) - reached)
    if apart and edges != HUMANEVA15_DETECTED_EDGES:
        raise ValueError(f"edges: joints {apart} are not connected to joint 0")

    A = torch.stack([torch.eye(num_joints, dtype=torch.float64), inward, inward.T])
    if normalisation == "column":
        return A / A.sum(-2, keepdim=True).clamp(min=1)  # entries are 0 or 1
    if normalisation == "symmetric":
        scale = (A.sum(-1) + 0.001).rsqrt()
        return scale[:, :, None] * A * scale[:, None, :]
    raise ValueError(f"normalisation: {normalisation!r}, expected 'column' or 'symmetric'")


# --------------------------------------------------------------------------------------------------
# 2. Adaptive graph convolution (Eq. 1-3)


def conv2d(c_in, c_out, kernel_size=1, **options):
    """nn.Conv2d with the release's initial weights: Kaiming normal over the fan-out, bias 0."""
    conv = nn.Conv2d(c_in, c_out, kernel_size, **options)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    nn.init.zeros_(conv.bias)
    return conv


def shortcut(c_in, c_out):
    """The residual connection: the identity, or a 1x1 convolution and batch norm where channels
    change."""
    if c_in == c_out:
        return nn.Identity()
    return nn.Sequential(conv2d(c_in, c_out), nn.BatchNorm2d(c_out))


class AdaptiveGraphConv(nn.Module):
    """Eq. 2: f_out = sum over k of W_k f_in (A_k + B_k + C_k); features (B, C_in, J, T) -> (B,
    C_out, J, T). `reference` is the equation in code; `forward` gives the same, sooner.

    A (3, J, J): the fixed graphs of spatial_partition. B: learnt. C_k = softmax(theta_k(f)^T
    phi_k(f)) (Eq. 3) compares all pairs of joints over channels and the whole window, divided by
    their number; its columns sum to 1. After the sum come batch norm, dropout, the shortcut and
    ReLU.
    The paper starts B, theta and phi at 0; then theta and phi would have no gradient, so they
    start as released.
    adaptive=False is ST-GCN (Table 6, row 1): no C_k, and B_k becomes that paper's edge
    importance, which multiplies A_k element by element and starts at 1.
    """

    def __init__(self, c_in, c_out, A, dropout=0.1, adaptive=True):
        super().__init__()
        self.exact_A = A
        self.register_buffer("A", A.to(torch.get_default_dtype()), persistent=False)
        self.B = nn.Parameter(torch.full_like(self.A, 1e-6 if adaptive else 1))
        self.embedding = c_out // 4 or 3  # channels of theta and phi, as released
        self.embed = None
        if adaptive:  # theta_0..2 and phi_0..2 in one product, each with the fan-out of one
            self.embed = conv2d(c_in, 6 * self.embedding)
            nn.init.normal_(self.embed.weight, std=math.sqrt(2 / self.embedding))
        std = math.sqrt(2 / (c_out * c_in * 3))
        self.W = nn.Parameter(torch.randn(c_out, c_in, 3, 1) * std)  # W_k is W[:, :, k]
        self.bias = nn.Parameter(torch.zeros(3, c_out))
        self.norm = nn.BatchNorm2d(c_out)
        nn.init.constant_(self.norm.weight, 1e-6)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = shortcut(c_in, c_out)

    def _apply(self, fn, recurse=True):
        """What .to(), .double() and the like call: casts A from its float64 values, not from the
        rounded ones."""
        super()._apply(fn, recurse)
        self.A = self.exact_A.to(self.A)
        return self

    def graph(self, x):
        """A_k + B_k + C_k of each sample, (B, 3, J, J), of which x @ graph is the aggregation; in
        ST-GCN A_k * B_k, (3, J, J)."""
        if self.embed is None:
            return self.A * self.B
        batch, _, joints, frames = x.shape
        embedded = self.embed(x).permute(0, 2, 3, 1)
        embedded = embedded.reshape(batch, joints, frames, 2, 3, self.embedding)
        theta, phi = embedded.permute(3, 0, 4, 1, 2, 5).flatten(4)  # (B, 3, J, T * embedding)
        C = torch.softmax(theta @ phi.transpose(-1, -2) / theta.shape[-1], dim=-2)
        return self.A + self.B + C

    def reference(self, x):
        """What `forward` returns, by Eq. 2 and 3 as written, subset by subset."""
        (batch, c_in, joints, frames), y = x.shape, 0
        for k in range(3):
            graph = self.A[k] * self.B[k]
            if self.embed is not None:
                weight, bias = (p.unflatten(0, (2, 3, -1))[:, k] for p in self.embed.parameters())
                theta, phi = F.conv2d(x, weight[0], bias[0]), F.conv2d(x, weight[1], bias[1])
                similarity = torch.einsum("beit,bejt->bij", theta, phi) / (theta.shape[1] * frames)
                graph = self.A[k] + self.B[k] + torch.softmax(similarity, dim=1)
            rows = x.transpose(2, 3).reshape(batch, c_in * frames, joints)
            mixed = (rows @ graph).view(batch, c_in, frames, joints).transpose(2, 3)
            y = y + F.conv2d(mixed, self.W[:, :, k, :, None], self.bias[k])
        return torch.relu(self.dropout(self.norm(y)) + self.shortcut(x))

    def convolve(self, x):
        """The sum of Eq. 2: (B, C_in, J, T) -> (B, C_out, J, T)."""
        batch, c_in, joints, frames = x.shape
        graph = self.graph(x).expand(batch, 3, joints, joints).transpose(-1, -2)
        if c_in <= len(self.W):
            # x A_k for all three k in one product, then the W_k as the taps of one convolution.
            rows = x.permute(0, 2, 3, 1).reshape(batch, joints, frames * c_in)
            rows = torch.bmm(graph.reshape(batch, 3 * joints, joints), rows)
            rows = rows.view(batch, 3 * joints, frames, c_in).permute(0, 3, 1, 2)
            return F.conv2d(rows, self.W, self.bias.sum(0), dilation=(joints, 1))
        # Fewer channels go out than come in: W_k first.
        W = self.W.permute(2, 0, 1, 3).reshape(-1, c_in, 1, 1)
        y = F.conv2d(x, W).unflatten(1, (3, -1))  # (B, 3, C_out, J, T)
        rows = y.permute(0, 1, 3, 4, 2).flatten(3).flatten(1, 2)  # (B, 3 * J, T * C_out)
        y = torch.bmm(graph.transpose(1, 2).reshape(batch, joints, 3 * joints), rows)
        y = y.unflatten(2, (frames, -1)).permute(0, 3, 1, 2)
        return y + self.bias.sum(0)[:, None, None]

    def forward(self, x):
        if x.is_cuda or torch.compiler.is_compiling():
            y = self.convolve(x)
        else:
            # A few samples at a time: what lies between, six times x, then stays in the cache.
            size = max(1, CACHE_FLOATS // math.prod(x.shape[1:]))
            y = torch.cat([self.convolve(part) for part in x.split(size)])
        return torch.relu_(self.dropout(self.norm(y)).add_(self.shortcut(x)))


class AGCNBlock(nn.Module):
    """AGCN(C_in, C_out, S): adaptive graph convolution, temporal convolution and batch norm,
    shortcut, ReLU.

    Features (B, C_in, J, T) -> (B, C_out, J, ceil(T / stride)). The temporal convolution has 9
    taps; those of output frame t are centred on input frame stride * t. residual=False leaves the
    shortcut out, relu=False the last ReLU.
    """

    def __init__(self, c_in, c_out, A, stride=1, residual=True, relu=True, dropout=0.1,
                 adaptive=True):
        super().__init__()
        self.spatial = AdaptiveGraphConv(c_in, c_out, A, dropout, adaptive)
        self.temporal = conv2d(c_out, c_out, (1, TEMPORAL_KERNEL), stride=(1, stride),
                               padding=(0, TEMPORAL_KERNEL // 2))
        self.norm = nn.BatchNorm2d(c_out)
        self.relu = relu
        self.shortcut = shortcut(c_in, c_out) if residual else None

    def forward(self, x):
        y = self.norm(self.temporal(self.spatial(x)))
        if self.shortcut is not None:
            y = y.add_(self.shortcut(x))
        return torch.relu_(y) if self.relu else y


# --------------------------------------------------------------------------------------------------
# 3. Strided learning (section 3.1, the grey modules of Figure 1)


class StridedAGCN(nn.Module):
    """Two AGCN blocks, dropout after each, and a residual: features (B, C, J, T) -> (B, C, J, T /
    width) exactly.

    The second block's convolution has stride `width` and is centred on the first frame of each
    group of `width` frames, while the residual takes the group's centre frame, as the released
    weights need it; with causal the group's last. stride=False (Table 6, row 2) keeps all frames.
    ValueError: a width that is even or below 1; a T that width does not divide.
    """

    def __init__(self, channels, A, width=3, dropout=0.1, causal=False, adaptive=True,
                 stride=True):
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ValueError(f"filter width {width}: expected odd, above 0")
        self.width = width if stride else 1
        self.frame = self.width - 1 if causal else self.width // 2
        options = dict(dropout=dropout, adaptive=adaptive)
        self.first = AGCNBlock(channels, channels, A, **options)
        self.second = AGCNBlock(channels, channels, A, self.width, residual=False, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        if x.shape[-1] % self.width:
            raise ValueError(f"{x.shape[-1]} frames: not a multiple of the width {self.width}")
        y = self.dropout(self.second(self.dropout(self.first(x))))
        return y + x[..., self.frame::self.width]


# --------------------------------------------------------------------------------------------------
# 4. Individually connected layers (section 3.2)


def check_lambda(unshared_weight):
    """ValueError unless unshared_weight, lambda of Eq. 7, is in [0, 1]."""
    if not 0 <= unshared_weight <= 1:
        raise ValueError(f"unshared_weight {unshared_weight}: expected 0 to 1")


class IndividuallyConnected(nn.Module):
    """Eq. 5-7: every joint's position from that joint's features alone, (B, J, C) -> (B, J, out).

    lambda * (v_i W_i + b_i) + (1 - lambda) * (v_i W_s + b_s) with lambda = unshared_weight: the
    unshared layer has weights for each joint, the shared one the same for all. 0 or 1 builds only
    the layer it needs. ValueError: lambda outside [0, 1].
    """

    def __init__(self, channels, num_joints, out=3, unshared_weight=0.5):
        super().__init__()
        check_lambda(unshared_weight)
        self.unshared_weight = unshared_weight
        self.W = self.b = self.W_shared = self.b_shared = None
        std = math.sqrt(2 / out)  # Kaiming over the fan-out, as released
        if unshared_weight > 0:
            self.W = nn.Parameter(torch.randn(num_joints, channels, out) * std)
            self.b = nn.Parameter(torch.zeros(num_joints, out))
        if unshared_weight < 1:
            self.W_shared = nn.Parameter(torch.randn(channels, out) * std)
            self.b_shared = nn.Parameter(torch.zeros(out))

    def forward(self, v):
        shared = unshared = 0
        if self.W_shared is not None:
            shared = v @ self.W_shared + self.b_shared  # Eq. 6
        if self.W is not None:
            unshared = torch.einsum("bjc,jco->bjo", v, self.W) + self.b  # Eq. 5
        return self.unshared_weight * unshared + (1 - self.unshared_weight) * shared  # Eq. 7


class FullyConnected(nn.Linear):
    """Table 6, row 3: one fully connected layer over the features of all joints, (B, J, C) -> (B,
    J, out)."""

    def __init__(self, channels, num_joints, out=3):
        super().__init__(num_joints * channels, num_joints * out)

    def forward(self, v):
        return super().forward(v.flatten(1)).unflatten(1, (v.shape[1], -1))


def mean_distance(prediction, target):
    """L_global (Eq. 4) and L_local (Eq. 8): the mean Euclidean distance of (..., 3) points, in
    their unit."""
    return torch.linalg.vector_norm(prediction - target, dim=-1).mean()


# --------------------------------------------------------------------------------------------------
# 5. The network (Figure 1)


def check_widths(filter_widths):
    """ValueError unless they are whole numbers whose product is above 1: one frame has nothing to
    convolve over. (StridedAGCN checks that each is odd.)"""
    whole = all(hasattr(width, "__index__") for width in filter_widths)
    if not whole or math.prod(filter_widths) == 1:
        raise ValueError(f"filter_widths: {filter_widths!r}, expected odd, not all 1")


class GLAGCN(nn.Module):
    """GLA-GCN: 2D poses (B, T, J, in_dim) in about [-1, 1] -> the centre frame's 3D pose (B, J,
    3), metres.

    T = receptive_field is the product of filter_widths, one strided module for each. reconstruct:
    `reconstruct_blocks` further AGCN blocks before them, and `sequence_head`, which turns the
    features that they hand on into the poses of all frames: model(x, return_sequence=True)
    returns (pose (B, J, 3), sequence (B, T, J, 3)) for the first stage's loss, mean_distance of
    both. The second stage trains the pose alone: model.sequence_head.requires_grad_(False).
    unshared_weight: lambda of Eq. 7 (not printed in the paper).
    causal: the pose is that of the window's last frame, so that a video is lifted without looking
    ahead; within the window convolutions and C_k see all frames. It has no sequence, whose early
    frames would see later ones.
    Table 6: adaptive=False is ST-GCN, temporal="mean" averages over the frames instead of
    striding, head="full" is one layer for all joints (no lambda then).
    input_norm: batch norm of the input, which the release's HumanEva-I model on detected 2D
    lacks.
    normalisation: of the fixed graphs, "column" as released or "symmetric" as in the paper.
    ValueError: a pose of another T, J or in_dim, return_sequence without reconstruct or with
    causal, an unknown temporal or head, sizes that are not whole numbers or too small, filter
    widths whose product is 1, and what spatial_partition, StridedAGCN and IndividuallyConnected
    refuse.
    """

    def __init__(self, num_joints=17, edges=H36M_EDGES, filter_widths=(3, 3, 3, 3, 3), channels=96,
                 reconstruct=False, reconstruct_blocks=3, unshared_weight=0.5, dropout=0.1,
                 causal=False, adaptive=True, temporal="stride", head="individual", in_dim=2,
                 input_norm=True, normalisation="column"):
        super().__init__()
        if temporal not in ("stride", "mean"):
            raise ValueError(f"temporal: {temporal!r}, expected 'stride' or 'mean'")
        if head not in ("individual", "full"):
            raise ValueError(f"head: {head!r}, expected 'individual' or 'full'")
        if not hasattr(channels, "__index__") or channels < 1:
            raise ValueError(f"channels: {channels}, expected 1 or more")
        if not hasattr(reconstruct_blocks, "__index__") or reconstruct_blocks < 0:
            raise ValueError(f"reconstruct_blocks: {reconstruct_blocks}, expected 0 or more")
        check_lambda(unshared_weight)
        check_widths(filter_widths)

        self.num_joints, self.in_dim, self.causal = num_joints, in_dim, causal
        self.receptive_field = math.prod(filter_widths)
        A = spatial_partition(edges, num_joints, normalisation)
        options = dict(dropout=dropout, adaptive=adaptive)
        self.data_norm = nn.BatchNorm1d(num_joints * in_dim) if input_norm else None
        self.expand = AGCNBlock(in_dim, channels, A, **options)
        self.reconstruction, self.sequence_head = nn.ModuleList(), None
        if reconstruct:
            for _ in range(reconstruct_blocks):
                self.reconstruction.append(AGCNBlock(channels, channels, A, **options))
            # Without a last ReLU: coordinates take both signs.
            self.sequence_head = AGCNBlock(channels, 3, A, relu=False, **options)
        options |= dict(causal=causal, stride=temporal == "stride")
        self.strided = nn.ModuleList(StridedAGCN(channels, A, T, **options) for T in filter_widths)
        if head == "full":
            self.head = FullyConnected(channels, num_joints)
        else:
            self.head = IndividuallyConnected(channels, num_joints, 3, unshared_weight)

    def forward(self, x, return_sequence=False):
        T, J, coordinates = self.receptive_field, self.num_joints, self.in_dim
        if tuple(x.shape[1:]) != (T, J, coordinates):
            raise ValueError(f"pose {tuple(x.shape)}: (batch, {T}, {J}, {coordinates}) expected")
        if return_sequence and (self.sequence_head is None or self.causal):
            raise ValueError("return_sequence: needs reconstruct=True and causal=False")

        if self.data_norm is not None:
            x = self.data_norm(x.flatten(0, 1).flatten(1)).view(x.shape)
        x = x.permute(0, 3, 2, 1).contiguous(memory_format=torch.channels_last)  # (B, 2, J, T)
        x = self.expand(x)  # (B, C, J, T)
        for block in self.reconstruction:
            x = block(x)
        if return_sequence:
            sequence = self.sequence_head(x).permute(0, 3, 2, 1)  # (B, T, J, 3), Eq. 4
        for module in self.strided:
            x = module(x)  # T shrinks by the module's width
        pose = self.head(x.mean(-1).transpose(1, 2))  # (B, J, C) -> (B, J, 3)
        return (pose, sequence) if return_sequence else pose

    def scheduled_norms(self):
        """The batch norms whose momentum the release schedules: all but those of the
        channel-changing shortcuts."""
        return [module for name, module in self.named_modules()
                if hasattr(module, "running_mean") and "shortcut" not in name]


# --------------------------------------------------------------------------------------------------
# 6. What the published parameter counts contain besides: the refinement network


class Refinement(nn.Module):
    """Blends each joint's predicted (x, y) with the (x, y) that the 2D input and the predicted
    depth give.

    pose (B, J, 3) root-relative metres, uv (B, J, 2) and intrinsics (B, 9) (fx fy cx cy k1 k2 k3
    p1 p2) in one image unit, root (B, 3) the root's true position in the camera frame, which a
    user's video does not have -> (B, J, 3).
    The paper never mentions it, but its 1.88 M and 48.64 M parameters contain 140,322 of such a
    network (J = 17), and the release's script trains it in the second stage with the local loss.
    """

    def __init__(self, num_joints=17):
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(6 * num_joints, 1024), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(1024, 2 * num_joints), nn.Sigmoid())

    def forward(self, pose, uv, intrinsics, root):
        focal, centre, k, p = intrinsics[:, None].split((2, 2, 3, 2), dim=-1)  # (B, 1, 2 | 3)
        ray = distorted = (uv - centre) / focal
        for _ in range(10):  # undo the lens by fixed-point iteration
            r2 = ray.square().sum(-1, keepdim=True)
            radial = (k * torch.cat([r2, r2**2, r2**3], -1)).sum(-1, keepdim=True)
            tangential = (p * ray).sum(-1, keepdim=True)
            ray = (distorted - p * r2) / (1 + radial + tangential)
        depth = pose[..., 2:]
        projected = ray * (depth + root[:, None, 2:]) - root[:, None, :2]  # (B, J, 2)
        score = self.score(torch.cat([pose, projected, depth], -1).flatten(1)).view(uv.shape)
        blended = score * pose[..., :2] + (1 - score) * projected
        return torch.cat([blended, depth], -1)


# --------------------------------------------------------------------------------------------------
# 7. The authors' weights

# What the release calls the parts of a block that have the same shape there.
RELEASED_PARTS = {"spatial.B": "gcn1.PA", "spatial.norm": "gcn1.bn", "norm": "tcn1.bn",
                  "spatial.shortcut": "gcn1.down", "temporal": "tcn1.conv",
                  "shortcut.0": "residual.conv", "shortcut.1": "residual.bn"}


def released_views(name, value):
    """An entry of a GLAGCN's state under the names and in the shapes of the release: {name:
    view}."""
    if name == "head.W_shared":
        return {"fc.weight": value.T[..., None]}  # a convolution of one tap
    if name.startswith(("head.", "data_norm.")):
        return {name.replace("head.b_shared", "fc.bias").replace("data_norm", "data_bn"): value}
    block, part = "expand_gcn", name.removeprefix("expand.")
    if name.startswith("strided."):
        _, number, position, part = name.split(".", 3)
        block = f"layers_tcngcn.{2 * int(number) + (position == 'second')}"
    if part.startswith("spatial.embed."):
        letters, views = "ab", value.chunk(6)
    elif part == "spatial.W":
        letters, views = "d", value.split(1, dim=2)
    elif part == "spatial.bias":
        letters, views = "d", value.unbind()
    else:
        ours = max((ours for ours in RELEASED_PARTS if part.startswith(ours)), key=len)
        theirs = f"{block}.{RELEASED_PARTS[ours]}{part.removeprefix(ours)}"
        return {theirs: value.mT if part == "temporal.weight" else value}  # time is third there
    entry = "bias" if part.endswith("bias") else "weight"
    names = [f"{block}.gcn1.conv_{letter}.{k}.{entry}" for letter in letters for k in range(3)]
    return dict(zip(names, views))


def from_released(state_dict, filter_widths=(3, 3, 3, 3, 3), edges=H36M_EDGES, input_norm=True):
    """A GLAGCN with the weights of the authors' release (its `model_pos`), in their dtype; the
    shared head alone.

    filter_widths, edges and input_norm are not in the weights: give those they were trained with.
    The release's HumanEva-I model on detected 2D takes HUMANEVA15_DETECTED_EDGES and
    input_norm=False: it defines the input's batch norm and never calls it, so those weights are
    dropped.
    Prefixes of nn.DataParallel and torch.compile (`module.`, `_orig_mod.`) are taken off.
    ValueError: another number of strided modules than filter_widths, missing, unknown or
    misshapen weights, by name.
    """
    entries = dict(state_dict or {}).items()
    weights = {str(name).replace("module.", "").replace("_orig_mod.", ""): value
               for name, value in entries if isinstance(value, torch.Tensor)}
    if not input_norm:
        weights = {name: weights[name] for name in weights if not name.startswith("data_bn.")}

    check_widths(filter_widths)
    for name in ("fc.weight", "expand_gcn.gcn1.PA"):
        value = weights.get(name, torch.empty(0))
        if value.dim() != 3 or value.numel() == 0 or not value.is_floating_point():
            raise ValueError(f"released GLA-GCN: the weights lack {name} of three sizes")
    head = weights["fc.weight"]
    joints = weights["expand_gcn.gcn1.PA"].shape[2]
    blocks = {name.split(".")[1] for name in weights if name.startswith("layers_tcngcn.")}
    if len(blocks) != 2 * len(filter_widths):
        raise ValueError(f"released GLA-GCN: {len(blocks) / 2:g} strided modules, "
                         f"expected {len(filter_widths)}")
    model = GLAGCN(joints, edges, filter_widths, head.shape[1], unshared_weight=0.0,
                   input_norm=input_norm).to(head.dtype)

    for name, ours in model.state_dict().items():
        for theirs, view in released_views(name, ours).items():
            found = tuple(weights[theirs].shape) if theirs in weights else "missing"
            if found != tuple(view.shape):
                raise ValueError(f"released GLA-GCN: {theirs} is {found}, expected {*view.shape,}")
            view.copy_(weights.pop(theirs))
    if weights:
        raise ValueError(f"released GLA-GCN: unexpected {min(weights)}")
    return model
