"""Data for 2D-to-3D pose lifting: skeletons, cameras, every dataset's files, BVH motion capture, synthetic motion.

    python data.py bvh FOLDER --out data --name mocap --test REGEX    # BVH clips -> training pairs
    python data.py check FOLDER                                       # what is there, what it allows to reproduce
    python data.py scale                                              # seconds and memory of loading as much as Human3.6M

Every loader returns a list of `Sequence`: 2D in pixels, 3D root-relative in the camera frame, in metres. A `FrameStore`
holds such a list once on the device and gathers batches by index. Files with pickled objects are read by an unpickler
that admits arrays, numbers, strings and plain containers and refuses everything else by name.
"""
if __name__ == "__main__":  # torch takes seconds to import: until data.run, Ctrl-C ends them without a traceback
    import os
    import signal
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import collections
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch


# ---------------------------------------------------------------------------------------------------------------------
# Errors and files

class InputError(ValueError):
    """Bad input of any kind: one line that names the file or argument, what was found and expected, and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise InputError(f"{self.prog}: {message} (--help shows the options)")


def run(main):
    """Calls `main()` for a command line: bad input ends in one line on stderr and exit status 2, Ctrl-C in 130.

    A plain ValueError is the user's only where a model file raised it (a layout, a window); others are bugs and keep
    their traceback.
    """
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as it was before the imports
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:
        print(f"error: not enough memory {error}".strip(), file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
        if not isinstance(error, (InputError, OSError)) and raised_in not in ("gridconv.py", "glagcn.py"):
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@contextmanager
def described(expected, remedy):
    """Around what takes a file's content apart: any error of a structure that is not as expected says so."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{expected} ({error}); {remedy}") from None


def write_atomically(path, write, previous=None):
    """`write(file)` into a temporary file beside `path`, flushed to the disk, then renamed: whole or not at all. What
    stood at `path` is renamed to `previous` before, where that is given.

    Raises InputError where the folder cannot be made or written; whatever stood at `path` before then stands there
    still.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch's writers end a full disk in their own
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({cause.strerror or cause}); make room or choose another folder") from error
    finally:
        try:
            temporary.unlink()
        except OSError:  # renamed already, or never made
            pass


def _existing(path, remedy):
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe waits for its writer, a device never ends
            raise InputError(f"{path}: not a regular file; copy what it gives into one, and name that")
        with open(path, "rb"):
            return path
    except FileNotFoundError:
        raise InputError(f"{path}: not found; {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); allow it, or name another") from None


def _content(path, remedy):
    try:
        return _existing(path, remedy).read_bytes()
    except MemoryError:
        raise InputError(f"{path}: larger than the memory; name a smaller file") from None


def read_json(path, remedy="name a JSON file"):
    """What a JSON file holds; InputError where there is none, or something else."""
    text = _content(path, remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: not JSON ({str(error) or type(error).__name__}); write it again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Skeletons

@dataclass(frozen=True)
class Skeleton:
    """Joint names, the parent of each joint (-1 the root), and pairs: joint `left[i]` mirrors `right[i]`."""
    name: str
    joints: tuple
    parents: tuple
    left: tuple
    right: tuple

    @property
    def edges(self):
        """(parent, child) pairs."""
        return tuple((parent, child) for child, parent in enumerate(self.parents) if parent >= 0)

    @property
    def root(self):
        """The joint that poses are relative to."""
        return self.parents.index(-1)

    @property
    def mirror(self):
        """For each joint the one that takes its place in the mirrored pose."""
        swap = dict(zip(self.left + self.right, self.right + self.left))
        return [swap.get(joint, joint) for joint in range(len(self.joints))]


def _both(*names):
    return tuple(f"{side}_{name}" for side in ("right", "left") for name in names)


_LEG, _ARM = ("hip", "knee", "ankle"), ("shoulder", "elbow", "wrist")
_ARM32 = ("collar", *_ARM, "thumb", "thumb_tip", "hand", "hand_tip")
SKELETONS = {s.name: s for s in (
    Skeleton("h36m17", ("pelvis", *_both(*_LEG), "spine", "thorax", "neck", "head", *_both(*_ARM)[3:],
                        *_both(*_ARM)[:3]),
             (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15), (4, 5, 6, 11, 12, 13), (1, 2, 3, 14, 15, 16)),
    Skeleton("h36m32", ("pelvis", *_both(*_LEG, "toe", "toe_tip"), "spine_base", "spine", "thorax", "neck", "head",
                        *_both(*_ARM32)[8:], *_both(*_ARM32)[:8]),
             (-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 12, 16, 17, 18, 19, 20, 19, 22, 12, 24, 25, 26, 27,
              28, 27, 30), (*range(6, 11), *range(16, 24)), (*range(1, 6), *range(24, 32))),
    Skeleton("humaneva15", ("pelvis", "thorax", *_both(*_ARM)[3:], *_both(*_ARM)[:3], *_both(*_LEG)[3:],
                            *_both(*_LEG)[:3], "head"),
             (-1, 0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 0, 11, 12, 1), (2, 3, 4, 8, 9, 10), (5, 6, 7, 11, 12, 13)),
    Skeleton("3dhp17", ("head_top", "neck", *_both(*_ARM), *_both(*_LEG), "pelvis", "spine", "head"),
             (16, 15, 1, 2, 3, 1, 5, 6, 14, 8, 9, 14, 11, 12, -1, 14, 1), (5, 6, 7, 11, 12, 13), (2, 3, 4, 8, 9, 10)),
    Skeleton("coco17", ("nose", "left_eye", "right_eye", "left_ear", "right_ear",
                        *(f"{side}_{name}" for name in (*_ARM, *_LEG) for side in ("left", "right"))),
             (-1, 0, 0, 1, 2, 0, 0, 5, 6, 7, 8, 5, 6, 11, 12, 13, 14), (1, 3, 5, 7, 9, 11, 13, 15),
             (2, 4, 6, 8, 10, 12, 14, 16)),
)}
H36M_17_OF_32 = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)
H36M_17_OF_3DHP = (14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4)  # neck/nose takes 3DHP's head


def flip(pose, skeleton):
    """The mirrored pose (..., J, 2|3), numpy or torch: x negated, left and right joints swapped."""
    pose = pose[..., skeleton.mirror, :]
    sign = [-1.0] + [1.0] * (pose.shape[-1] - 1)
    return pose * (pose.new_tensor(sign) if torch.is_tensor(pose) else np.array(sign, pose.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Cameras: the public calibration of Human3.6M and HumanEva-I

def _float32(values):  # the figures are float32, printed here with as many digits as name one
    return np.array(values, np.float32).astype(np.float64)


def _metres(extrinsics):
    extrinsics = np.array(extrinsics)
    extrinsics[..., 4:] /= 1000
    return extrinsics


H36M_CAMERAS = ("54138969", "55011271", "58860488", "60457274")
H36M_SIZES = ((1000, 1002), (1000, 1000), (1000, 1000), (1000, 1002))
H36M_FPS = 50.0
H36M_INTRINSICS = _float32((  # fx fy cx cy in pixels, radial k1 k2 k3, tangential p1 p2
    (1145.0494, 1143.7811, 512.5415, 515.4515, -0.20709892, 0.24777518, -0.0030751503, -0.0009756989, -0.0014244716),
    (1149.6757, 1147.5917, 508.84863, 508.0649, -0.19421363, 0.24040854, 0.0068199756, -0.0016190266, -0.0027408944),
    (1149.1407, 1148.799, 519.81586, 501.40265, -0.20833819, 0.255488, -0.0024604974, 0.001484387, -0.0007599993),
    (1145.5114, 1144.7739, 514.9682, 501.88202, -0.19838409, 0.21832368, -0.008947807, -0.0005872056, -0.001813362)))
# subject: (4 cameras, 7): camera-to-world quaternion w x y z, then the camera's position, here in mm, kept in metres
H36M_EXTRINSICS = {subject: _metres(_float32(rows)) for subject, rows in {
    "S1": ((0.14070565, -0.15007018, -0.7552408, 0.62232804, 1841.107, 4955.2847, 1563.4454),
           (0.6157188, -0.7648363, -0.14833826, 0.11794741, 1761.2786, -5078.007, 1606.265),
           (0.14651473, -0.14647852, 0.76530236, -0.60941756, -1846.7777, 5215.0464, 1491.9724),
           (0.58340085, -0.7853162, 0.14548823, -0.14749594, -1794.7897, -3722.699, 1574.8927)),
    "S5": ((0.14673772, -0.16237096, -0.7551893, 0.6178939, 2097.3916, 4880.945, 1605.7324),
           (0.61597586, -0.7626792, -0.15728192, 0.1189815, 2031.7008, -5167.933, 1612.9231),
           (0.14291371, -0.12907842, 0.7678385, -0.6110143, -1620.5948, 5171.6587, 1496.437),
           (0.592048, -0.7814218, 0.12747486, -0.15036418, -1637.1737, -3867.3174, 1547.0332)),
    "S6": ((0.13378978, -0.15692396, -0.75710905, 0.61988795, 1935.4518, 4950.2456, 1618.0839),
           (0.61471975, -0.7628813, -0.16174768, 0.11819245, 1969.804, -5128.739, 1632.7788),
           (0.15299481, -0.13529131, 0.76460963, -0.6112781, -1769.5964, 5185.3613, 1476.9934),
           (0.59161013, -0.7804774, 0.1283227, -0.15615939, -1721.6687, -3884.1313, 1540.4879)),
    "S7": ((0.14352418, -0.16313368, -0.75483286, 0.6188825, 1974.513, 4926.3545, 1597.8326),
           (0.6141673, -0.76382625, -0.15966456, 0.117792994, 1937.0585, -5119.79, 1631.5665),
           (0.1455006, -0.12874816, 0.76605165, -0.61271393, -1741.8112, 5208.2495, 1464.8246),
           (0.5912848, -0.78217643, 0.12445474, -0.15196487, -1734.7106, -3832.4214, 1548.583)),
    "S8": ((0.14110588, -0.15589868, -0.75619173, 0.61964405, 2150.6519, 4896.161, 1611.9047),
           (0.61696017, -0.7647668, -0.1484635, 0.11158158, 2219.9656, -5148.453, 1613.0441),
           (0.1471444, -0.1337712, 0.76701283, -0.61003697, -1571.2216, 5137.0186, 1498.1761),
           (0.59278244, -0.78258705, 0.12147816, -0.14631996, -1476.9133, -3896.7412, 1547.9722)),
    "S9": ((0.15540588, -0.15548216, -0.75320953, 0.6199595, 2044.4585, 4935.117, 1481.2275),
           (0.6187845, -0.7634735, -0.14132239, 0.11933968, 1990.9597, -5123.8105, 1568.8048),
           (0.13357827, -0.13671005, 0.76894546, -0.61007386, -1670.9922, 5211.986, 1528.388),
           (0.5879399, -0.7823407, 0.14276144, -0.1479487, -1696.0435, -3827.0999, 1591.4127)),
    "S11": ((0.15232472, -0.1544232, -0.75475633, 0.619107, 2098.4402, 4926.5547, 1500.2786),
            (0.61894494, -0.7600917, -0.15300633, 0.12552583, 2083.1824, -4912.173, 1561.0786),
            (0.14943229, -0.15650228, 0.7681234, -0.60263044, -1609.8153, 5177.336, 1537.8967),
            (0.58942515, -0.7818877, 0.13991211, -0.14715362, -1590.738, -3854.169, 1578.0176))}.items()}

HUMANEVA_CAMERAS, HUMANEVA_SIZE, HUMANEVA_FPS = ("C1", "C2", "C3"), (640, 480), 60.0  # no intrinsics are published
HUMANEVA_EXTRINSICS = {subject: _metres(rows) for subject, rows in {
    "S1": ((0.424207, -0.4983646, -0.5802981, 0.4847012, 4062.227, 663.2477, 1528.397),
           (0.6503354, -0.7481602, -0.0919284, 0.0941766, 844.8131, -3805.2092, 1504.9929),
           (0.0664734, -0.0690535, 0.7416416, -0.6639132, -797.67377, 3916.3174, 1433.6602)),
    "S2": ((0.4214752, -0.4961493, -0.5838273, 0.4851187, 4112.9121, 626.4929, 1545.2988),
           (0.6501393, -0.7476588, -0.0954617, 0.0959808, 923.574, -3877.9243, 1504.5518),
           (0.0699353, -0.0712403, 0.7421637, -0.662742, -781.4915, 3838.8853, 1444.9929)),
    "S3": ((0.424207, -0.4983646, -0.5802981, 0.4847012, 4062.2271, 663.2477, 1528.397),
           (0.6503354, -0.7481602, -0.0919284, 0.0941766, 844.8131, -3805.2092, 1504.9929),
           (0.0664734, -0.0690535, 0.7416416, -0.6639132, -797.6738, 3916.3174, 1433.6602))}.items()}


def project(points, intrinsics):
    """Camera-space points (..., 3) to the image (..., 2), with lens distortion (the Human3.6M camera model).

    `intrinsics` (9,): fx fy cx cy k1 k2 k3 p1 p2; the result is in the units of fx, fy, cx, cy (pixels, or screen
    units). As in the field's preparation, X/Z and Y/Z are clamped to [-1, 1].
    """
    focal, centre, radial, tangential = np.split(np.asarray(intrinsics), (2, 4, 7))
    xy = np.clip(points[..., :2] / points[..., 2:], -1, 1)
    r2 = (xy ** 2).sum(-1, keepdims=True)
    distortion = 1 + r2 * (radial[0] + r2 * (radial[1] + r2 * radial[2])) + (tangential * xy).sum(-1, keepdims=True)
    return focal * (xy * distortion + tangential * r2) + centre


def _rotation(quaternion):
    """The matrix (3, 3) of a quaternion w x y z."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def world_to_camera(points, extrinsics):
    """R^T (X - t) for world points (..., 3); `extrinsics` (7,): camera-to-world quaternion w x y z, position t."""
    extrinsics = np.asarray(extrinsics, np.float64)
    return (points - extrinsics[4:]) @ _rotation(extrinsics[:4])


def camera_to_world(points, extrinsics):
    """R X + t for camera-space points (..., 3): the inverse of `world_to_camera`."""
    extrinsics = np.asarray(extrinsics, np.float64)
    return points @ _rotation(extrinsics[:4]).T + extrinsics[4:]


def _screen(size, rule):
    """(centre x, centre y, scale) of a normalisation rule: normalised = (pixels - centre) / scale."""
    width, height = float(size[0]), float(size[1])
    rules = {"release-500": (500.0, 500.0, 500.0), "width": (width / 2, height / 2, width / 2),
             "longest": (width / 2, height / 2, max(width, height) / 2)}
    if rule not in rules:
        raise InputError(f"normalise: unknown rule {rule!r}; known: {', '.join(rules)}")
    return rules[rule]


def normalise(pose_2d, size, rule):
    """Pixels (..., 2) to about [-1, 1], numpy or torch; `size` (width, height). Raises InputError for another rule.

    `release-500`: (p - 500) / 500 on both axes, whatever the image (GridConv's release). `width`: x / w * 2 - 1 and
    y / w * 2 - h / w (VideoPose3D, GLA-GCN). `longest`: (p - size / 2) / (longest side / 2).
    """
    *centre, scale = _screen(size, rule)
    centre = pose_2d.new_tensor(centre) if torch.is_tensor(pose_2d) else np.array(centre, np.result_type(pose_2d, 0.0))
    return (pose_2d - centre) / scale


# ---------------------------------------------------------------------------------------------------------------------
# Sequences and the frame store

@dataclass
class Sequence:
    """One person's motion as one camera saw it; float32 arrays.

    pose_2d (T, J, 2) pixels; pose_3d (T, J, 3) metres, camera frame, relative to the root joint; root (T, 3) the root
    joint in the camera frame, metres; intrinsics (9,) as `project` takes them, NaN where unknown; size (width, height)
    in pixels; fps in 1/s; source: what the motion is, see `provenance`; valid (T,): frames that count in a score, None
    where all do; extrinsics (7,) as `world_to_camera` takes them, z up, None where unknown.
    """
    subject: str
    action: str
    camera: str
    pose_2d: np.ndarray
    pose_3d: np.ndarray
    root: np.ndarray
    intrinsics: np.ndarray
    size: tuple
    fps: float
    source: str = ""
    valid: np.ndarray | None = None
    extrinsics: np.ndarray | None = None


UNKNOWN_INTRINSICS = np.full(9, np.nan)


def _check_finite(array, where):
    finite = (np.abs(array) <= np.finfo(np.float32).max).all(tuple(range(1, array.ndim)))  # NaN is not
    if not finite.all():
        raise InputError(f"{where}, frame {int(np.argmin(finite))}: NaN or infinite value in float32; repair or remove it")


def _poses(value, where, widths):
    """`value` as an array of numbers (frames, joints, one of `widths`); InputError for anything else."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal length
        array = np.array(None)
    if array.dtype.kind not in "fiu" or array.ndim != 3 or array.shape[2] not in widths or array.shape[1] == 0:
        raise InputError(f"{where} of shape {array.shape} and type {array.dtype}; expected numbers (frames, joints, "
                         f"{' or '.join(map(str, widths))})")
    return array


def _sequence(where, pose_2d, points, root_joint, *, valid=None, cut=True, **fields):
    """A checked Sequence from 2D (T', J, 2|3) pixels and camera-space points (T, J, 3) metres; T' > T is cut to T."""
    where = f"{where}: {fields['subject']} {fields['action']} camera {fields['camera']}"
    pose_2d, points = _poses(pose_2d, where + ": 2D", (2, 3)), _poses(points, where + ": 3D", (3,))
    frames, joints = points.shape[:2]
    if pose_2d.shape[1] != joints:
        raise InputError(f"{where}: 2D has {pose_2d.shape[1]} joints, 3D has {joints}; use files of one skeleton")
    if frames == 0:
        raise InputError(f"{where}: no frames; remove the sequence from both files")
    if len(pose_2d) < frames or (len(pose_2d) != frames and not cut):
        raise InputError(f"{where}: 2D has {len(pose_2d)} frames, 3D has {frames}; make both from the same recording")
    pose_2d = pose_2d[:frames, :, :2]  # a third column is a confidence
    _check_finite(pose_2d, where + ", 2D")
    _check_finite(points, where + ", 3D")
    root = points[:, root_joint]
    fields["intrinsics"] = np.asarray(fields["intrinsics"], np.float32)
    return Sequence(pose_2d=pose_2d.astype(np.float32), pose_3d=(points - root[:, None]).astype(np.float32),
                    root=root.astype(np.float32), valid=valid, **fields)


class FrameStore:
    """Every frame of `sequences`, once, on `device`; batches are gathers by frame number, without a host round trip.

    Attributes, N frames of S sequences: input (N, J, 2) normalised by `rule`; pose_3d (N, J, 3) metres; target
    (N, J, 3): pose_3d for target="camera"; for "uvd" the normalised pinhole projection u, v and the root-relative
    depth in metres (GridConv's rows marked with a section sign). sequence (N,) each frame's sequence, first and last
    (N,) the bounds of that sequence, root (N, 3), valid (N,) bool, intrinsics (S, 9), sizes (S, 2).
    cameras="random" (see `random_cameras`), `noise` and `missing` (see `detect`) are drawn anew by `redraw`. swap_sides
    exchanges the left and right joints of the input alone (GLA-GCN's Table 6, row 4).
    Raises InputError for an empty list, a wrong number of joints, an unknown rule or target, "uvd" without cameras, or
    random cameras without the recorded ones' extrinsics.
    """

    def __init__(self, sequences, rule, skeleton, device="cpu", dtype=torch.float32, target="camera",
                 cameras="recorded", noise=0.0, missing=0.0, swap_sides=False):
        if not sequences:
            raise InputError("frame store: no sequences; choose other subjects or actions, or another split")
        for s in sequences:
            if s.pose_2d.shape[1] != len(skeleton.joints):
                raise InputError(f"{s.subject} {s.action}: {s.pose_2d.shape[1]} joints; the skeleton {skeleton.name} "
                                 f"has {len(skeleton.joints)}")
        if target not in ("camera", "uvd"):
            raise InputError(f"frame store: unknown target {target!r}; known: camera, uvd")
        place = lambda array: torch.as_tensor(array).to(device=device, dtype=dtype)
        join = lambda arrays: place(np.concatenate(list(arrays)))
        length = np.array([len(s.pose_2d) for s in sequences])
        end = np.cumsum(length)
        spread = lambda values: torch.from_numpy(np.repeat(values, length)).to(device)
        self.sequences, self.skeleton, self.kind = list(sequences), skeleton, target
        self.sequence = spread(np.arange(len(sequences)))
        self.first, self.last = spread(end - length), spread(end - 1)
        self.valid = torch.from_numpy(np.concatenate(
            [np.ones(len(s.pose_2d), bool) if s.valid is None else s.valid for s in sequences])).to(device)
        self.input = join(normalise(s.pose_2d, s.size, rule) for s in sequences)
        self.pose_3d = join(s.pose_3d for s in sequences)
        self.root = join(s.root for s in sequences)
        self.intrinsics = place(np.stack([s.intrinsics for s in sequences]))
        self.rule, self.noise, self.missing, self.swap_sides = rule, noise, missing, swap_sides
        self._set_sizes([s.size for s in sequences])
        self._mirror = torch.tensor(skeleton.mirror, device=device)
        self._sign = torch.tensor([-1.0, 1.0, 1.0], device=device, dtype=dtype)
        self.target = self.pose_3d if target == "camera" else self._to_uvd()
        self._clean, self._world = self.input, join(map(_upright, sequences)) if cameras == "random" else None
        if cameras == "random" or noise or missing:  # a figure measured on it is called so
            how = f", {cameras} cameras, noise {noise:g}, missing {missing:g}"
            self.sequences = [replace(s, source=s.source + how) for s in sequences]
        self.redraw()

    def __len__(self):
        return len(self.input)

    def redraw(self, draw=0):
        """Random cameras, noise and missing joints anew, where the store has them: a function of the number `draw` alone.

        Training takes an even number each epoch, tests TEST_DRAW, an odd one: no model is tested in training's views.
        """
        generator = torch.Generator().manual_seed(draw)  # on the CPU: the same figures whatever the device
        if self._world is not None:
            points, self.intrinsics, sizes = random_cameras(self._world, self.sequence, len(self.sequences), generator)
            self._set_sizes(sizes.tolist())
            self.root = points[:, self.skeleton.root]
            self.pose_3d = points - self.root[:, None]
            uvd = self._to_uvd()
            self._clean, self.target = uvd[..., :2].contiguous(), self.pose_3d if self.kind == "camera" else uvd
        self.input = self._clean
        if self.noise or self.missing:
            self.input = detect(self._clean, self.first, self.last, self.noise, self.missing, generator)
        if self.swap_sides:
            self.input = self.input.index_select(1, self._mirror)

    def _set_sizes(self, sizes):
        self.sizes = torch.tensor(sizes, device=self.input.device)
        screen = self.input.new_tensor([_screen(size, self.rule) for size in sizes])
        self._centre, self._scale = screen[:, :2], screen[:, 2:]

    def _view(self, index):  # each frame's focal length, optical centre and normalisation, (n, 1, 1|2)
        sequence = self.sequence[index]
        intrinsics = self.intrinsics[sequence, None]
        return intrinsics[..., :2], intrinsics[..., 2:4], self._centre[sequence, None], self._scale[sequence, None]

    def normalised_intrinsics(self, index):
        """The intrinsics (n, 9) of frames `index` in the units of `input`: focal length and centre normalised alike."""
        focal, optical, centre, scale = self._view(index)
        pinhole = torch.cat((focal / scale, (optical - centre) / scale), -1)[:, 0]
        return torch.cat((pinhole, self.intrinsics[self.sequence[index], 4:]), -1)

    def _to_uvd(self):
        for s in self.sequences:
            if not np.isfinite(s.intrinsics).all():
                raise InputError(f"{s.subject} {s.action} camera {s.camera}: the target uvd needs its intrinsics")
        focal, optical, centre, scale = self._view(slice(None))
        points = self.pose_3d + self.root[:, None]
        pixels = focal * points[..., :2] / points[..., 2:] + optical
        return torch.cat(((pixels - centre) / scale, self.pose_3d[..., 2:]), -1)

    def to_camera(self, prediction, index):
        """A network's output (n, J, 3) for frames `index` as root-relative camera-space metres.

        The identity for "camera". For "uvd" the pixel is back-projected at the depth of the true root plus the
        predicted depth, then the true root is taken off: such figures use the root's position and the camera.
        """
        if self.kind == "camera":
            return prediction
        focal, optical, centre, scale = self._view(index)
        root = self.root[index, None]
        z = prediction[..., 2:] + root[..., 2:]
        xy = (prediction[..., :2] * scale + centre - optical) / focal * z
        return torch.cat((xy, z), -1) - root

    def _mirrored(self, pose, flip):
        flip = flip.view(-1, *[1] * (pose.ndim - 1))
        return torch.where(flip, pose.index_select(-2, self._mirror) * self._sign[:pose.shape[-1]], pose)

    def batch(self, index, frames=1, causal=False, flip=None, all_targets=False):
        """Input and target of frames `index` (B,): (B, J, 2) and (B, J, 3), or windows (B, T, J, 2) for frames = T > 1.

        A window is centred on its frame, or ends with it when `causal`; beyond its sequence's ends the first or last
        frame repeats. `all_targets` gives the targets of the whole window (B, T, J, 3). `flip` (B,) bool: these
        samples mirrored, input and target alike.
        """
        gather = lambda store, at: store.index_select(0, at.reshape(-1)).reshape(*at.shape, *store.shape[1:])
        window = index
        if frames > 1:
            before = frames - 1 if causal else frames // 2
            offset = torch.arange(-before, frames - before, device=index.device)
            window = (index[:, None] + offset).clamp(gather(self.first, index[:, None]), gather(self.last, index[:, None]))
        pose, target = gather(self.input, window), gather(self.target, window if all_targets else index)  # (B, T, J, .)
        return (pose, target) if flip is None else (self._mirrored(pose, flip), self._mirrored(target, flip))


# ---------------------------------------------------------------------------------------------------------------------
# Random cameras and imperfect 2D, for models that are to lift any video

TEST_DRAW = 1  # see FrameStore.redraw
CAMERA_RANGES = {  # what `random_cameras` draws for each sequence, evenly between the two
    "heading": (-180, 180), "tilt": (-5, 30), "roll": (-5, 5),  # degrees; a tilt above 0 looks down
    "focal": (0.6, 1.6),  # focal length over the longest side: fields of view of 80 to 35 degrees
    "shape": (-np.log(16 / 9), np.log(16 / 9)),  # ln(width / height): upright to lying 9:16
    "fill": (0.6, 1.0),  # the part of the image, about its centre, that holds every joint of the sequence
    "aside": (-0.25, 0.25), "below": (-0.25, 0.25)}  # where in it the root's mean position is: 0 the centre, 1 its edge
LONGEST_SIDE, NEAREST = 1000, 1.0  # pixels, metres
OUTLIERS, OUTLIER_SCALE, GAP = 0.02, 10.0, 10  # fraction of joints, times the noise, mean frames


def _upright(s):
    """The joints (T, J, 3) of a Sequence in metres, z up, about the root's mean position."""
    if s.extrinsics is None:
        raise InputError(f"{s.subject} {s.action} camera {s.camera}: its extrinsics are unknown, which random cameras need; "
                         "choose mocap, synthetic or h36m data, or recorded cameras")
    return (camera_to_world(s.pose_3d + s.root[:, None].astype(np.float64), s.extrinsics)
            - camera_to_world(s.root.mean(0, np.float64), s.extrinsics))


def random_cameras(world, sequence, count, generator):
    """World (N, J, 3), metres, z up, through one random camera for each of `count` sequences (sequence (N,): which).

    Returns camera-space joints (N, J, 3), intrinsics (count, 9) without distortion, sizes (count, 2) in whole pixels.
    CAMERA_RANGES says what is drawn; the distance, and with it the height, is the least that keeps every joint of every
    frame in the drawn part of the image and at least 1 m in front of the camera.
    """
    low, high = torch.tensor(list(CAMERA_RANGES.values()), dtype=torch.float64).T
    drawn = low + (high - low) * torch.rand(count, len(low), generator=generator, dtype=torch.float64)
    heading, tilt, roll = drawn[:, :3].T.numpy()
    axes = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # the world's right, down and forward: the camera's x, y, z
    rotation = torch.from_numpy(_turns("Z", roll) @ _turns("X", tilt) @ axes @ _turns("Z", heading)).to(world)
    focal, shape, fill = drawn[:, 3:6, None].unbind(1)
    sizes = (LONGEST_SIDE * torch.cat((shape, -shape), 1).clamp(max=0).exp()).round()  # width, height
    focal = LONGEST_SIDE * focal.expand(-1, 2)
    intrinsics = torch.cat((focal, sizes / 2, torch.zeros(count, 5)), 1).to(world)
    edge = fill * sizes / 2 / focal  # of that part of the image, as x / z and y / z, (count, 2)
    place = torch.cat((drawn[:, 6:] * edge, torch.ones(count, 1)), 1).to(world)  # of the root's mean, at distance 1
    points = (world[..., None, :] * rotation[sequence, None]).sum(-1)  # no matrix product: tf32 would round it
    xy, z = points[..., :2], points[..., 2:]
    edge, aim = edge.to(world)[sequence, None], place[sequence, None, :2]
    # |xy + distance aim| <= edge (z + distance), solved for the distance
    least = torch.cat(((xy - edge * z) / (edge - aim), (-xy - edge * z) / (edge + aim), NEAREST - z), -1).amax((1, 2))
    distance = world.new_zeros(count).scatter_reduce(0, sequence, least, "amax")
    return points + (distance[:, None] * place)[sequence, None], intrinsics, sizes.long()


def detect(pose_2d, first, last, noise, missing, generator):
    """2D (N, J, 2) as a detector with gaps gives it, after interpolation; first and last (N,) bound the sequences.

    Gaussian noise of `noise` times the person's size (the longer side of the box around a frame's joints), ten times
    that for 2 % of the joints; then the fraction `missing` of all joints is lost in gaps of 1 to 19 frames, which may
    overlap, and filled linearly in time between the frames around a gap, held where a sequence ends in one. The first
    frame of a sequence is whole.
    """
    error = torch.randn(pose_2d.shape, generator=generator).to(pose_2d)
    gross, begins, length = torch.rand(3, *pose_2d.shape[:2], generator=generator).to(pose_2d)
    size = (pose_2d.amax(1, True) - pose_2d.amin(1, True)).amax(-1, True)  # (N, 1, 1)
    pose_2d = pose_2d + noise * size * torch.where(gross < OUTLIERS, OUTLIER_SCALE, 1.0)[..., None] * error
    time = torch.arange(len(pose_2d), device=pose_2d.device)[:, None]
    over = time + 1 + (length * (2 * GAP - 1)).long()  # the frame after a gap that begins here
    over = torch.where(begins < -np.log1p(-missing) / GAP, over, 0).cummax(0).values
    seen = (over <= time) | (time == first[:, None])
    before = torch.where(seen, time, 0).cummax(0).values
    after = torch.where(seen, time, len(time)).flip(0).cummin(0).values.flip(0)
    after = torch.where(after > last[:, None], before, after)
    weight = (time - before).to(pose_2d) / (after - before).clamp(min=1)
    at = lambda frame: pose_2d.gather(0, frame[..., None].expand_as(pose_2d))
    return at(before).lerp(at(after), weight[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# Restricted reading: files with pickled objects, without running what they contain

class _DType:
    """Stands for a NumPy dtype in a pickle: numbers, strings or objects. NumPy's own would believe any flags and fields,
    and with those read addresses from the file."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO":
            raise pickle.UnpicklingError(f"values of type {self.dtype}, which are refused")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that a pickle makes empty and fills then, once it holds as much as its shape claims."""

    def __setstate__(self, state):
        version, shape, dtype, fortran, values = state
        claimed = int(np.prod(shape, dtype=object)) * (1 if dtype.dtype.hasobject else dtype.dtype.itemsize)
        if len(values) != claimed:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(values)} for {claimed} bytes or objects")
        super().__setstate__((version, shape, dtype.dtype, fortran, values))

    def __reduce_ex__(self, protocol):  # saved again it is an array like others
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _numpy_scalar(kind, value):
    return value if kind.dtype.hasobject else np.frombuffer(
        value.encode("latin1") if isinstance(value, str) else value, kind.dtype)[0]


def _latin1(text, encoding="latin1"):  # how Python 3 writes bytes with protocol 2
    return text.encode("latin1")


def _torch_tensor(values, offset, size, stride, *_):
    if math.prod(size) > len(values):  # stride 0 makes any size of one value
        raise pickle.UnpicklingError(f"a tensor of size {tuple(size)} in a storage of {len(values)} values")
    return values.as_strided(size, stride, offset)  # within the storage, or a RuntimeError


_ADMITTED = {("numpy", "ndarray"): "array", ("numpy", "dtype"): _DType,  # the first is an argument, and cannot be called
             ("collections", "OrderedDict"): collections.OrderedDict,
             ("collections", "defaultdict"): collections.defaultdict, ("_codecs", "encode"): _latin1}
for _module in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _ADMITTED[_module + ".multiarray", "_reconstruct"] = lambda *_: _Array(0, "b")  # filled by its own __setstate__
    _ADMITTED[_module + ".multiarray", "scalar"] = _numpy_scalar
    _ADMITTED[_module + ".numeric", "_frombuffer"] = lambda data, kind, shape, order: (
        np.frombuffer(data, kind.dtype).reshape(shape, order=order))
for _module in ("builtins", "__builtin__"):  # Python 3 and 2
    _ADMITTED.update({(_module, kind.__name__): kind for kind in (list, dict, set, frozenset, complex)})
    _ADMITTED[_module, "bytes"] = lambda: b""
_TORCH = {("torch._utils", "_rebuild_tensor"): _torch_tensor, ("torch._utils", "_rebuild_tensor_v2"): _torch_tensor,
          ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor, ("torch", "Size"): torch.Size,
          ("torch", "device"): torch.device,
          **{("torch", f"{kind}Storage"): getattr(torch, {"Char": "int8", "Byte": "uint8"}.get(kind, kind.lower())) for kind in (
              "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")}}


class _Inert:
    """Stands for an object of an unknown class: takes any arguments and state, does nothing."""

    def __init__(self, *_, **__):
        pass

    __setstate__ = append = extend = add = update = __setitem__ = __init__


def _unpickle(file, admitted, inert=False, storage=None):
    """The next object of a file of pickles: admitted names are resolved, others refused or made inert placeholders.

    Python's own unpickler rather than C's, which allocates as much as a number in the file says.
    """
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    placeholder = functools.cache(lambda name: type(name, (_Inert,), {}))

    class Unpickler(pickle._Unpickler):
        dispatch, left = dict(pickle._Unpickler.dispatch), 10 * size + 10 ** 6

        def find_class(self, module, name):
            if (module, name) in admitted:
                found = admitted[module, name]
                return functools.partial(self.call, found) if callable(found) else found
            if inert:
                return placeholder(name.rpartition(".")[2] or "Inert")
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is refused: only arrays, numbers, "
                                         "strings and plain containers are read")

        def call(self, function, *args):
            self.charge(args)
            return function(*args)

        def charge(self, values):  # a few bytes can name a long value once more, and have it copied once more
            sized = (str, bytes, list, tuple, dict, set, frozenset)
            self.left -= sum(len(value) for value in values if isinstance(value, sized))
            if self.left < 0:
                raise pickle.UnpicklingError("it copies the same values again and again")

        def persistent_load(self, saved):
            return storage(*saved)

        def load_build(self):  # pickle's own sets the attributes of anything, those of functions and tensors too
            state, changed = self.stack.pop(), self.stack[-1]
            if isinstance(changed, (_DType, _Array, _Inert)):
                self.charge(state if isinstance(state, tuple) else ())
                changed.__setstate__(state)
            elif not isinstance(changed, collections.OrderedDict):  # a state_dict's _metadata, which is left out
                raise pickle.UnpicklingError(f"it changes a {type(changed).__name__}, which is refused")
        dispatch[pickle.BUILD[0]] = load_build

        def load_bytearray8(self):  # pickle's own allocates what is claimed
            raise pickle.UnpicklingError("a bytearray, which is refused")
        dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    return Unpickler(file, encoding="latin1").load()


def _unreadable(path, error):
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{path}: cannot be read: {reason}; it is damaged, of another format or "
                      "unsafe: fetch or make it again")


def _read_npy(content):
    """The array of an npy file, given as bytes."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy format {version}")
    shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
    if dtype.hasobject:
        array = _unpickle(file, _ADMITTED)
        if not isinstance(array, np.ndarray) or array.shape != shape:
            raise ValueError("the pickled member is not the array that its header describes")
        return array
    claimed, held = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(content) - file.tell()
    if claimed != held:
        raise ValueError(f"its header claims {claimed} bytes of data, the file holds {held}")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _unpack(archive, size):
    """(name, content) of each member of a zip archive of `size` bytes. Motion compresses about 10-fold, zeros 1,000-fold:
    archives of more than 200 times their size and 100 MB are refused, and methods other than numpy.savez_compressed's."""
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > 200 * size + 10 ** 8:
        raise ValueError(f"{size} bytes that unpack to {claimed}, above the bound of 200 times its size and 100 MB")
    for info in archive.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} is compressed by method {info.compress_type}, which NumPy does not use")
        with archive.open(info) as member:  # the checksum is checked before anything is made of what read() returns
            yield info.filename, member.read(info.file_size)  # no more, whatever it would unpack to


def read_npz(path, remedy="check the path"):
    """{key: array} of a NumPy archive, or of one .npy file. Pickles are read without running code; see `_ADMITTED`.

    Raises InputError where the file is missing, damaged (each member of an archive has a checksum, an .npy file has
    none), claims more data than it holds, unpacks to more than 200 times its size and 100 MB, or names anything else.
    """
    path = _existing(path, remedy)
    try:
        if path.suffix.lower() == ".npy":
            return {path.stem: _read_npy(path.read_bytes())}
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _read_npy(content) for name, content in _unpack(archive, path.stat().st_size)}
    except Exception as error:  # a hostile or damaged pickle may raise anything
        raise _unreadable(path, error) from None


def read_torch(path, inert=False, remedy="check the path"):
    """The object in a `torch.save` file, legacy or zip, on the CPU, read without running code from the file.

    `inert=True` puts inert placeholders where the file names an unknown class (released checkpoints hold whole
    optimisers); otherwise such a file is refused by that name. Raises InputError like `read_npz`: zip files have
    checksums, which torch.load does not look at; legacy files have none.
    """
    path = _existing(path, remedy)
    read, storages = functools.partial(_unpickle, admitted={**_ADMITTED, **_TORCH}, inert=inert), {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = {name.partition("/")[2]: name for name in archive.namelist()}
                if "constants.pkl" in names:
                    raise ValueError("it is a TorchScript program, which is refused")
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("it is compressed, as torch.save never does")
                if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
                    raise ValueError("its numbers are big-endian")

                def storage(_, dtype, key, place, count):
                    if key not in storages:
                        storages[key] = _values(archive.read(names[f"data/{key}"]), dtype, count)
                    return storages[key]
                return read(io.BytesIO(archive.read(names["data.pkl"])), storage=storage)
        with open(path, "rb") as file:
            return _read_legacy(file, read, storages)
    except Exception as error:
        raise _unreadable(path, error) from None


def _values(content, dtype, count):
    """`count` values of a torch dtype, (count,), from their bytes."""
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"it claims {count} values of {dtype}, and holds {len(content)} bytes of them")
    return torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _read_legacy(file, read, storages):
    """torch.save's format until 1.5: pickles of a number, the version, the machine, the object and its storages' names,
    then for each of these the number of its values and their bytes."""
    if read(file) != 0x1950a86a20f9469cfc6c or read(file) != 1001 or read(file)["little_endian"] is not True:
        raise ValueError("no torch.save file of a version known here")
    left = os.fstat(file.fileno()).st_size

    def storage(kind, *saved):
        nonlocal left
        if kind == "module":  # a whole module's class beside its source
            return saved[0]
        dtype, key, _, count, view = saved
        if key not in storages:
            if not 0 <= count * dtype.itemsize <= left:
                raise ValueError(f"it claims {count} values of {dtype}, and holds at most {left} bytes of them")
            left -= count * dtype.itemsize
            storages[key] = torch.zeros(count, dtype=dtype)
        values = storages[key]
        return values[view[1]:view[1] + view[2]] if view else values
    content = read(file, storage=storage)
    for key in read(file):
        count = int.from_bytes(file.read(8), "little", signed=True)
        if count != len(storages[key]):
            raise ValueError(f"it claims {len(storages[key])} values, then {count}")
        storages[key].copy_(_values(file.read(count * storages[key].itemsize), storages[key].dtype, count))
    return content


# ---------------------------------------------------------------------------------------------------------------------
# BVH motion capture

def _read_hierarchy(lines, path):
    """(names, parents, offsets, channels) of a BVH header; `lines` an iterator of (number, text), left after MOTION."""
    names, parents, offsets, channels, stack = [], [], [], [], []
    for number, line in lines:
        for statement in re.split(r"(?=[{}])|(?<=[{}])|(?=\bOFFSET\b|\bCHANNELS\b)", line, flags=re.I):  # may share a line
            word, *rest = statement.split() or [""]
            word = word.upper()
            try:
                if word in ("ROOT", "JOINT", "END"):
                    parents.append(stack[-1] if stack else -1)
                    names.append(names[stack[-1]] + "_end" if word == "END" else " ".join(rest))
                    stack.append(len(names) - 1)
                    offsets.append(np.zeros(3))
                    channels.append([])
                elif word == "OFFSET":
                    offsets[stack[-1]] = np.array([float(rest[0]), float(rest[1]), float(rest[2])])
                    _check_finite(offsets[stack[-1]], "OFFSET")
                elif word == "CHANNELS":
                    channels[stack[-1]] = [(c[0].upper(), c[1:].lower()) for c in rest[1:]]
                    kinds = {kind for _, kind in channels[stack[-1]]}
                    if int(rest[0]) != len(rest) - 1 or not kinds <= {"rotation", "position"} or any(
                            axis not in "XYZ" for axis, _ in channels[stack[-1]]):
                        raise ValueError
                elif word == "}":
                    stack.pop()
                elif word == "MOTION" and names and not stack:
                    return names, parents, offsets, channels
                elif word not in ("", "{", "HIERARCHY"):
                    raise ValueError
            except (ValueError, IndexError):
                raise InputError(f"{path}, line {number}: {line.strip()[:60]!r} is not what a BVH hierarchy holds here; "
                                 "export the file again") from None
    raise InputError(f"{path}: no MOTION after a complete HIERARCHY: not a BVH file, or a truncated one")


def _read_motion(lines, columns, path):
    """(values (T, columns), seconds between frames) of a BVH motion block."""
    rows, declared = [(number, line.split()) for number, line in lines if line.strip()], {}
    for key in ("Frames:", "Frame Time:"):
        number, words = rows.pop(0) if rows else (0, [])
        try:
            declared[key] = float(re.sub(key, "", " ".join(words), flags=re.I))
        except ValueError:
            found = " ".join(words)[:60]
            raise InputError(f"{path}, line {number}: {found!r}, expected {key!r} and a number") from None
    frames, seconds = declared["Frames:"], declared["Frame Time:"]
    if not (np.isfinite(seconds) and seconds > 0 and frames > 0):
        raise InputError(f"{path}: {frames:g} frames of {seconds:g} seconds; both must be above 0")
    for frame, (number, row) in enumerate(rows):
        if len(row) != columns:
            raise InputError(f"{path}, line {number}, frame {frame}: {len(row)} values for {columns} channels; "
                             "the file is truncated or damaged")
    if len(rows) != frames:
        raise InputError(f"{path}: {len(rows)} frames where its header says {frames:g}; it is truncated or damaged")
    try:
        values = np.array([row for _, row in rows], np.float64)
    except ValueError as error:
        raise InputError(f"{path}: a motion value is not a number ({error})") from None
    _check_finite(values, path)
    return values, seconds


def _turns(axis, degrees):
    """Rotation matrices (T, 3, 3) about a coordinate axis."""
    angle, turn = np.deg2rad(degrees), np.zeros((len(degrees), 3, 3))
    i, j, k = {"X": (0, 1, 2), "Y": (1, 2, 0), "Z": (2, 0, 1)}[axis]
    turn[:, i, i] = 1
    turn[:, j, j] = turn[:, k, k] = np.cos(angle)
    turn[:, k, j] = np.sin(angle)
    turn[:, j, k] = -turn[:, k, j]
    return turn


def read_bvh(path):
    """A BVH file as (joint names, world positions (T, joints, 3) in file units, frames per second).

    Rotation channels apply in the order they are listed (R = R_first R_second R_third); position channels, on any
    joint, replace that joint's OFFSET; end sites are joints `<parent>_end`. Raises InputError for anything else.
    """
    text = _content(path, "name a BVH file").decode("utf-8-sig", "replace")
    lines = iter(enumerate(text.splitlines(), 1))
    names, parents, offsets, channels = _read_hierarchy(lines, path)
    values, seconds = _read_motion(lines, sum(map(len, channels)), path)
    column, turns, positions = 0, [], np.empty((len(values), len(names), 3))
    for joint, parent in enumerate(parents):
        offset, turn = np.tile(offsets[joint], (len(values), 1)), np.eye(3)
        for axis, kind in channels[joint]:
            if kind == "position":
                offset[:, "XYZ".index(axis)] = values[:, column]
            else:
                turn = turn @ _turns(axis, values[:, column])
            column += 1
        if parent >= 0:
            offset = positions[:, parent] + (turns[parent] @ offset[..., None])[..., 0]
            turn = turns[parent] @ turn
        positions[:, joint] = offset
        turns.append(turn)
    return tuple(names), positions, 1 / seconds


def _sided(joint, *names):
    return {f"{side}_{joint}": tuple(name.format(side=side.capitalize(), s=side[0].upper()) for name in names)
            for side in ("right", "left")}


# our joint: its names, the first that a file has: Bandai-Namco, MotionBuilder (CMU, LAFAN1, Mixamo), 3ds Max
BVH_NAMES = {
    "pelvis": ("Hips",), "spine": ("Spine1", "Chest2", "Chest"), "thorax": ("Neck1", "Neck"), "neck": ("Head",),
    **_sided("hip", "UpperLeg_{s}", "{side}UpLeg", "{side}Hip"),
    **_sided("knee", "LowerLeg_{s}", "{side}Leg", "{side}Knee"),
    **_sided("ankle", "Foot_{s}", "{side}Foot", "{side}Ankle"),
    **_sided("shoulder", "UpperArm_{s}", "{side}Arm", "{side}Shoulder"),  # {side}Shoulder is the collar where an Arm is
    **_sided("elbow", "LowerArm_{s}", "{side}ForeArm", "{side}Elbow"),
    **_sided("wrist", "Hand_{s}", "{side}Hand", "{side}Wrist")}
LEG_LENGTH, CAPTURE_VOLUME = 0.9, 1.5  # metres
MADE_BY = "poselift"  # the key `made_by` marks files that this project wrote: never taken for a published dataset


def _seventeen_joints(names, positions, mapping, path):
    """The 17 Human3.6M joints (T, 17, 3) of a BVH skeleton.

    The head is the head's end site (HeadTop_End, Head_end); where there is none, and in Bandai-Namco's files, whose end
    sites mean nothing, it is 2 Head - Neck: as far above the neck/nose as that is above the thorax.
    """
    at = {name.rpartition(":")[2]: i for i, name in reversed(list(enumerate(names)))}  # `mixamorig:` and other prefixes
    at.update({name: i for i, name in enumerate(names)})
    found = {ours: next((at[name] for name in known if name in at), None) for ours, known in BVH_NAMES.items()}
    for ours, name in mapping.items():
        if name not in at:
            raise InputError(f"{path}: no joint {name!r}, mapped to {ours}; it has: {', '.join(names)}")
        found[ours] = at[name]
    missing = [ours for ours, joint in found.items() if joint is None]
    if missing:
        raise InputError(f"{path}: no joint known for {', '.join(missing)}; pass --map FILE.json with "
                         f'{{"{missing[0]}": "its name", ...}}; it has: {", ".join(names)}')
    for end in ("HeadTop_End", "Head_end"):
        if end in at and "UpperLeg_L" not in at:
            found.setdefault("head", at[end])
    place = {ours: positions[:, theirs] for ours, theirs in found.items()}
    place.setdefault("head", 2 * place["neck"] - place["thorax"])
    return np.stack([place[ours] for ours in SKELETONS["h36m17"].joints], 1)


def _resample(positions, fps, rate):
    """(T, J, 3) at `fps` to another rate, linearly between frames."""
    time = np.arange(int((len(positions) - 1) / fps * rate + 1e-3) + 1) * (fps / rate)
    before = np.minimum(time.astype(int), max(len(positions) - 2, 0))
    weight = np.clip(time - before, 0, 1)[:, None, None]
    return positions[before] * (1 - weight) + positions[np.minimum(before + 1, len(positions) - 1)] * weight


def _clip_name(path, folder):
    """(subject, action) of a clip, from its file name or its folder."""
    stem = path.stem.replace(" ", "_")
    if match := re.fullmatch(r"dataset-\d+_(.+)_(.+)_(\d+)", stem):  # Bandai-Namco: motion, style, take
        return "S" + match[2], f"{match[1]} {match[3]}"
    if match := re.fullmatch(r"(\D+)(\d*)_(subject\d+)", stem):  # LAFAN1: motion, take, subject
        return match[3], f"{match[1]} {match[2]}".strip()
    return path.parent.name if path.parent != folder else stem.split("_")[0], stem


def convert_bvh(folder, out="data", name="mocap", test="", mapping=None, scale="auto", up="y", fps=None,
                volume=CAPTURE_VOLUME):
    """Every BVH clip under `folder` to `out`/data_3d_`name`.npz and data_2d_`name`_gt.npz; returns a line to print.

    Clips in the order of their file names; those matching the pattern `test` are the test set. `scale`: metres a file
    unit, or "auto": each clip so that (thigh + shank) at its first frame is 0.90 m. `up`: "y" or "z". `fps`: resample.
    `volume`: the pelvis's horizontal position, off its mean, is clamped to +- this many metres. Clip i is seen by the
    four Human3.6M cameras of training and test subject i mod 7. `mapping`: {our joint: its joint}.
    Raises InputError for whatever cannot be converted, with nothing written.
    """
    folder, mapping = Path(folder), mapping or {}
    paths = sorted((p for p in folder.rglob("*") if p.suffix.lower() == ".bvh"), key=lambda p: (p.name, str(p)))
    if not paths:
        why = "no BVH files in it" if folder.is_dir() else "a file, expected a folder" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {why}; name a folder of .bvh files")
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(f"--name {name!r}: expected letters, digits, _ and - alone; it becomes part of two file names")
    if fps and not 0 < fps <= 1000:
        raise InputError(f"--fps {fps:g}: expected a rate above 0 and up to 1000")
    unknown = sorted(set(mapping) - set(SKELETONS["h36m17"].joints))
    if unknown:
        raise InputError(f"--map: unknown joints {', '.join(unknown)}; known: {', '.join(SKELETONS['h36m17'].joints)}")
    try:
        held_out = [bool(test and re.search(test, p.relative_to(folder).as_posix())) for p in paths]
    except re.error as error:
        raise InputError(f"--test {test!r}: not a regular expression ({error})") from None
    if len(set(held_out)) == 1:
        raise InputError(f"--test {test!r} matches {'all' if held_out[0] else 'none'} of the {len(paths)} clips in "
                         f"{folder}, such as {paths[0].name}; some must be left for training and some for the test")
    world, image, rate, rigs = [], [], [], list(H36M_EXTRINSICS.values())
    for i, path in enumerate(paths):
        names, positions, recorded = read_bvh(path)
        pose = _seventeen_joints(names, positions, mapping, path)
        if up == "y":
            pose = np.stack((pose[..., 0], -pose[..., 2], pose[..., 1]), -1)
        leg = np.linalg.norm(np.diff(pose[0, [[1, 2, 3], [4, 5, 6]]], axis=1), axis=-1).sum(1).mean()
        if not leg > 0:
            raise InputError(f"{path}: legs of length 0 in its first frame; is its joint mapping right?")
        metres = LEG_LENGTH / leg if scale == "auto" else scale
        pose = pose * metres
        if fps and abs(fps - recorded) > 1e-9:
            pose = _resample(pose, recorded, fps)
        pelvis = pose[:, 0, :2]
        moved = np.clip(pelvis - pelvis.mean(0), -volume, volume) - pelvis
        pose[..., :2] += moved[:, None]
        views = [world_to_camera(pose, extrinsics) for extrinsics in rigs[i % len(rigs)]]
        if not min(view[..., 2].min() for view in views) > 0.5:
            raise InputError(f"{path}: a joint comes within 0.5 m of a camera or behind it; give a smaller --volume, "
                             f"or the unit by --scale (legs are {leg * metres:.2f} m long)")
        _check_finite(pose, path)
        world.append(pose.astype(np.float32))
        image.append(np.stack([project(v, k) for v, k in zip(views, H36M_INTRINSICS)]).astype(np.float32))
        rate.append(fps or recorded)
    frames = np.array([len(pose) for pose in world])
    split = np.where(held_out, "test", "train")
    clips = [path.relative_to(folder).as_posix() for path in paths]
    source = f"{len(paths)} BVH clips of {folder.resolve().name}"
    if (len(paths), frames[split == "train"].sum(), frames[split == "test"].sum(), scale, up, volume, mapping) == (
            174, 24286, 7628, "auto", "y", CAPTURE_VOLUME, {}) and all(clip.startswith("dataset-1_") for clip in clips):
        source = "open mocap benchmark (Bandai-Namco-Research-Motiondataset-1)"
    same = dict(made_by=MADE_BY, clips=clips, offsets=np.concatenate(([0], np.cumsum(frames))))
    subjects, actions = zip(*(_clip_name(path, folder) for path in paths))
    out = Path(out)
    pose_3d = dict(same, positions_3d=np.concatenate(world), joints=SKELETONS["h36m17"].joints, subjects=subjects,
                   actions=actions, split=split, fps=np.array(rate), source=source, cameras=H36M_CAMERAS,
                   sizes=np.array(H36M_SIZES), intrinsics=H36M_INTRINSICS,
                   extrinsics=np.stack([rigs[i % len(rigs)] for i in range(len(paths))]))
    pose_2d = dict(same, positions_2d=np.concatenate(image, 1))  # (4, frames, 17, 2) pixels

    def both(file):  # the second file inside the first one's writing: if either fails, neither appears
        np.savez(file, **pose_3d)
        write_atomically(out / f"data_2d_{name}_gt.npz", lambda second: np.savez(second, **pose_2d))
    write_atomically(out / f"data_3d_{name}.npz", both)
    count = lambda part: f"{(split == part).sum()} clips, {frames[split == part].sum():,} frames"
    return (f"{source}: training {count('train')}, test {count('test')}, 4 cameras -> {out}/data_3d_{name}.npz, "
            f"data_2d_{name}_gt.npz")


def load_mocap(folder, name="mocap", keypoints="gt", split="train"):
    """The Sequences of a split ("train" or "test") that `python data.py bvh` wrote; one for each clip and camera."""
    remedy = f"python data.py bvh FOLDER --out {folder} --name {name} --test REGEX makes it"
    paths = [Path(folder) / f"data_3d_{name}.npz", Path(folder) / f"data_2d_{name}_{keypoints}.npz"]
    space, image = (read_npz(path, remedy) for path in paths)
    with described(f"{paths[0]}, {paths[1]}: not as this project writes them", remedy):
        bounds, clips, world, pixels = space["offsets"], space["clips"], space["positions_3d"], image["positions_2d"]
        if not (list(image["clips"]) == list(clips) and list(image["offsets"]) == list(bounds)
                and pixels.shape[1] == len(world) == bounds[-1]):
            raise InputError(f"{paths[1]}: its clips or frames are not those of {paths[0]}; {remedy} anew")
        chosen = [i for i in range(len(clips)) if space["split"][i] == split]
        if not chosen:
            raise InputError(f"{paths[0]}: no clips in the split {split!r}; it has {', '.join(set(space['split']))}")
        both = f"{paths[0]} and {paths[1].name}"
        return [_sequence(f"{both}: {clips[i]}", pixels[c, bounds[i]:bounds[i + 1]],
                          world_to_camera(world[bounds[i]:bounds[i + 1]], space["extrinsics"][i, c]), 0, cut=False,
                          subject=str(space["subjects"][i]), action=str(space["actions"][i]), camera=str(camera),
                          intrinsics=space["intrinsics"][c], size=tuple(space["sizes"][c].tolist()),
                          fps=float(space["fps"][i]), source=str(space["source"]), extrinsics=space["extrinsics"][i, c])
                for i in chosen for c, camera in enumerate(space["cameras"])]


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic motion: for the embedded default and the tests

# bone vectors (metres) of the standing body, x forward, y left, z up; the left side mirrors the right
_BONES = np.zeros((17, 3))
_BONES[[1, 2, 3]] = (0, -0.13, 0), (0, 0, -0.45), (0, 0, -0.44)
_BONES[[7, 8, 9, 10]] = (0, 0, 0.24), (0, 0, 0.25), (0.04, 0, 0.11), (-0.02, 0, 0.115)
_BONES[[14, 15, 16]] = (0, -0.15, -0.02), (0, 0, -0.28), (0, 0, -0.25)
_BONES[[4, 5, 6, 11, 12, 13]] = _BONES[[1, 2, 3, 14, 15, 16]] * (1, -1, 1)
# degrees: (least, most) of bending forward, raising to the side and turning inwards; a knee bends back
RANGES = {"pelvis": ((-15, 60), (-12, 12), (0, 0)), "spine": ((-20, 50), (-25, 25), (-35, 35)),
          "neck": ((-35, 40), (-20, 20), (-50, 50)), "hip": ((-25, 115), (-8, 45), (-25, 25)),
          "knee": ((-140, 0), (0, 0), (0, 0)), "shoulder": ((-45, 160), (-5, 120), (-60, 60)),
          "elbow": ((3, 145), (0, 0), (0, 0))}
# motion: (cycles a second, heading turns a second, {joint: (bend, swing, phase in cycles, raise, raising swing)}), in
# degrees; a joint without a side moves both sides alike, one after ~ the left side half a cycle later
MOTIONS = {
    "walk": (0.95, 0.12, {"~hip": (10, 20, 0), "~knee": (-26, 20, .3), "~shoulder": (0, 20, .5), "elbow": (24, 8, .2)}),
    "turn": (0.7, 0.35, {"~hip": (12, 13, 0), "~knee": (-20, 15, .3), "shoulder": (12, 14, 0, 20, 14),
                         "elbow": (40, 14, .3)}),
    "reach": (0.3, 0.03, {"right_shoulder": (64, 46, 0, 20, 14), "left_shoulder": (48, 42, .4, 16, 14),
                          "elbow": (28, 21, .5), "spine": (8, 10, 0)}),
    "sit": (0.25, 0.02, {"hip": (70, 4, 0, 10, 4), "knee": (-70, 8, .5), "shoulder": (32, 20, .2, 10, 7),
                         "elbow": (60, 28, .6), "spine": (10, 8, 0)}),
    "wave": (0.9, 0.03, {"right_shoulder": (48, 8, 0, 76, 10), "right_elbow": (64, 31, 0), "left_shoulder": (12, 8, .3),
                         "left_elbow": (28, 14, .5)}),
    "squat": (0.35, 0.02, {"hip": (38, 31, 0, 11, 4), "knee": (-44, 36, .5), "shoulder": (40, 29, 0),
                           "elbow": (20, 13, .5), "pelvis": (12, 10, 0)}),
    "bend": (0.3, 0.03, {"pelvis": (19, 18, 0), "spine": (14, 17, 0), "hip": (21, 18, 0), "knee": (-10, 7, .5),
                         "shoulder": (44, 31, .1, 10, 6), "elbow": (16, 10, .5)}),
    "phone": (0.4, 0.06, {"right_shoulder": (34, 10, 0, 32, 8), "right_elbow": (102, 8, .2), "neck": (8, 8, .1),
                          "left_shoulder": (14, 15, .3, 12, 8), "left_elbow": (48, 28, .6)}),
    "kick": (0.6, 0.08, {"right_hip": (26, 34, 0), "right_knee": (-30, 25, .2), "left_knee": (-11, 6, .5),
                         "shoulder": (4, 21, .5, 28, 10), "elbow": (32, 14, .2)}),
    "spread": (0.5, 0.05, {"shoulder": (16, 11, .2, 50, 36), "hip": (6, 4, 0, 14, 10), "knee": (-11, 7, .5),
                           "elbow": (16, 10, .4)}),
}


def _drift(rng, frames, fps, shape, slowest=6.0):
    """Smooth random signals (frames, *shape) of unit variance: four sinusoids of 1.2 to `slowest` seconds each."""
    period, phase = rng.uniform(1.2, slowest, (4, *shape)), rng.uniform(0, 2 * np.pi, (4, *shape))
    time = np.arange(frames).reshape(-1, 1, *[1] * len(shape)) / fps
    return np.sin(2 * np.pi * time / period + phase).sum(1) / np.sqrt(2)


def _motion(rng, kind, frames, fps, bones, manner):
    """World positions (frames, 17, 3) of a performance, z up, feet on the floor; `manner` (17, 3) a subject's habit."""
    joints = SKELETONS["h36m17"].joints
    pace, turning, moves = MOTIONS[kind]
    pace, time = pace * rng.uniform(0.8, 1.2), np.arange(frames) / fps
    phase = 2 * np.pi * (pace * time + rng.uniform()) + 0.5 * _drift(rng, frames, fps, ())
    size = rng.uniform(0.75, 1.25, 17)
    turns = []
    for j, joint in enumerate(joints):
        side, _, part = joint.rpartition("_")
        if part not in RANGES:
            turns.append(None)
            continue
        move = next((moves[key] for key in (joint, part, "~" + part) if key in moves), (0, 0, 0))
        bend, swing, shift, up, lift = (*move, 0, 0)[:5]
        cycle = np.sin(phase - 2 * np.pi * (shift + 0.5 * (side == "left" and "~" + part in moves)))
        angle = np.stack((bend + size[j] * swing * cycle, up + size[j] * lift * cycle, 0 * cycle), -1)  # (T, 3)
        angle += manner[j] + rng.uniform(-5, 5, 3) + 3 * _drift(rng, frames, fps, (3,))
        low, high = np.array(RANGES[part], float).T
        half = np.maximum((high - low) / 2, 1e-9)
        angle = (low + high) / 2 + half * np.tanh((angle - (low + high) / 2) / half)  # softly inside the joint's range
        outwards = {"right": -1, "left": 1}.get(side, 1)
        trunk = 1 if part in ("pelvis", "spine", "neck") else -1  # a limb hangs: bending forward turns it the other way
        turns.append(_turns("Z", -outwards * angle[:, 2]) @ _turns("X", outwards * angle[:, 1])
                     @ _turns("Y", trunk * angle[:, 0]))
    way = rng.choice((-1, 1))
    heading = 360 * (rng.uniform() + way * turning * time) + 20 * _drift(rng, frames, fps, ())
    turns[0] = _turns("Z", heading) @ turns[0]
    pose = np.zeros((frames, 17, 3))
    for j, parent in enumerate(SKELETONS["h36m17"].parents):
        if parent >= 0:
            pose[:, j] = pose[:, parent] + turns[parent] @ bones[j]
            turns[j] = turns[parent] if turns[j] is None else turns[parent] @ turns[j]
    feet = pose[:, [3, 6], 2]
    floor = -np.log(np.exp(-feet / 0.03).sum(1)) * 0.03  # a smooth minimum
    place = 0.4 * _drift(rng, frames, fps, (2,), 12.0)
    if kind == "walk":  # on a circle of about 0.9 m, facing along it
        angle = np.deg2rad(heading - way * 90)
        place = 0.3 * place + 0.9 * np.stack((np.cos(angle), np.sin(angle)), -1)
    return pose + np.concatenate((place, 0.08 - floor[:, None]), -1)[:, None]


def synthesize(seed, subjects=tuple(H36M_EXTRINSICS), motions=tuple(MOTIONS), takes=1, frames=150, fps=25.0):
    """Procedural motion as Sequences: `takes` of each motion by each subject, seen by the four Human3.6M cameras.

    Bone lengths vary by subject, angles stay within each joint's range, motion is smooth in time and a function of
    `seed` alone. `subjects`: names (those of Human3.6M bring their own cameras) or a number of them. With the defaults
    42,000 samples, made in a few seconds.
    """
    if isinstance(subjects, int):
        subjects = tuple(f"S{i + 1}" for i in range(subjects))
    rigs, sequences = list(H36M_EXTRINSICS.values()), []
    mirror = SKELETONS["h36m17"].mirror
    for number, subject in enumerate(subjects):
        rng = np.random.default_rng((seed, number))
        stretch = rng.uniform(0.94, 1.06) * rng.uniform(0.96, 1.04, 17)
        bones = _BONES * ((stretch + stretch[mirror]) / 2)[:, None]
        manner = rng.uniform(-5, 5, (17, 3))
        for kind in motions:
            for take in range(takes):
                world = _motion(rng, kind, frames, fps, bones, manner)
                for c, camera in enumerate(H36M_CAMERAS):
                    extrinsics = H36M_EXTRINSICS.get(subject, rigs[number % len(rigs)])[c]
                    points = world_to_camera(world, extrinsics)
                    sequences.append(_sequence(
                        "synthetic", project(points, H36M_INTRINSICS[c]), points, 0, subject=subject,
                        action=f"{kind} {take + 1}", camera=camera, intrinsics=H36M_INTRINSICS[c], size=H36M_SIZES[c],
                        fps=float(fps), source=f"synthetic motion (seed {seed})", extrinsics=extrinsics))
    return sequences


# ---------------------------------------------------------------------------------------------------------------------
# Published datasets, in the files that the community keeps them in

SPLITS = {"train": ("S1", "S5", "S6", "S7", "S8"), "test": ("S9", "S11")}  # Human3.6M's protocol
# frames over the four cameras: without S11 Directions, and on detected 2D also without GridConv's 12 skipped sequences
H36M_FRAMES = {"train": (1_559_752,), "test": (543_344, 524_892)}
MPI3DHP_VALID = {"TS1": 603, "TS2": 540, "TS3": 505, "TS4": 553, "TS5": 276, "TS6": 452}
REGISTER = {"Human3.6M": "register at http://vision.imar.ro/human3.6m and prepare it as VideoPose3D's DATASETS.md says",
            "GridConv": "fetch the archive h36m.zip that the GridConv release points to",
            "HumanEva-I": "register at http://humaneva.is.tue.mpg.de and prepare it as VideoPose3D's DATASETS.md says",
            "motion capture": "python data.py bvh FOLDER --test REGEX makes it from BVH files",
            "MPI-INF-3DHP": "register at https://vcai.mpi-inf.mpg.de/3dhp-dataset and prepare it as P-STMO's README"}


def _layout(name, made_by_this_project):  # see `provenance`
    return f"files in {name} layout" + (", made by this project" if made_by_this_project else "")


def _nested(path, key, remedy):
    """(the dict that `key` of an npz holds as a 0-d object array, whether this project made the file)."""
    archive = read_npz(path, remedy)
    value = archive.get(key)
    value = value.item() if value is not None and value.shape == () else None
    if not isinstance(value, dict):
        raise InputError(f"{path}: no dictionary under the key {key!r}; {remedy}")
    return value, str(archive.get("made_by")) == MADE_BY


def _entry(nested, path, remedy, *keys):
    """nested[key][key]..., or an InputError that names the first missing key."""
    for depth, key in enumerate(keys, 1):
        if not isinstance(nested, dict) or key not in nested:
            raise InputError(f"{path}: it holds no {' '.join(map(str, keys[:depth]))}; {remedy}")
        nested = nested[key]
    return nested


def _videopose3d(folder, name, keypoints, subjects, cameras, remedy):
    """Yields subject, action, world (T, J, 3), each camera's 2D or None, the file of the 2D and the source."""
    paths = [Path(folder) / f"data_3d_{name}.npz", Path(folder) / f"data_2d_{name}_{keypoints}.npz"]
    space, made = _nested(paths[0], "positions_3d", remedy)
    image, made_2d = None, False
    if not (name == "h36m" and keypoints == "gt" and not paths[1].exists()):  # its 2D can be had from cameras and 3D
        image, made_2d = _nested(paths[1], "positions_2d", remedy)
    source = _layout("Human3.6M" if name == "h36m" else "HumanEva-I", made or made_2d)
    for subject in subjects:
        actions = _entry(space, paths[0], remedy, subject)
        if not isinstance(actions, dict):
            raise InputError(f"{paths[0]}: {subject} is no dictionary of actions; {remedy}")
        for action in map(str, actions):
            where = f"{subject} {action}"
            world = _poses(_entry(actions, paths[0], remedy, action), f"{paths[0]}: {where}: 3D", (3,))
            _check_finite(world, f"{paths[0]}: {where}: 3D")
            views = [None] * len(cameras)
            if image is not None:
                views = _entry(image, paths[1], "make it from the same recordings as the 3D", subject, action)
                if not isinstance(views, (list, tuple, np.ndarray)) or len(views) != len(cameras):
                    found = len(views) if hasattr(views, "__len__") else "no list of"
                    raise InputError(f"{paths[1]}: {where} has {found} cameras, expected {len(cameras)}")
                views = [_poses(view, f"{paths[1]}: {where} camera {c}: 2D", (2, 3)) for c, view in zip(cameras, views)]
            yield subject, action, world, views, paths[0 if image is None else 1], source


def load_h36m(folder, keypoints="gt", subjects=SPLITS["train"], joints=17):
    """Human3.6M in VideoPose3D's layout: data_3d_h36m.npz and data_2d_h36m_<keypoints>.npz; 17 or 32 joints.

    Without a file for `gt`, and for 32 joints where it has 17, the 2D is projected from the 3D through the cameras, as
    VideoPose3D's preparation does. Raises InputError for missing files, subjects or views, 2D that does not fit, NaN.
    """
    sequences = []
    for subject, action, world, views, path, source in _videopose3d(
            folder, "h36m", keypoints, subjects, H36M_CAMERAS, REGISTER["Human3.6M"]):
        if subject not in H36M_EXTRINSICS:
            raise InputError(f"subject {subject}: no cameras known; choose among {', '.join(H36M_EXTRINSICS)}")
        select = lambda pose: pose[:, H36M_17_OF_32] if joints == 17 and pose.shape[1] == 32 else pose
        for c, (camera, pixels) in enumerate(zip(H36M_CAMERAS, views)):
            points = world_to_camera(select(world), H36M_EXTRINSICS[subject][c])
            if pixels is None or (keypoints == "gt" and joints == 32 and pixels.shape[1] == 17):
                pixels = project(points, H36M_INTRINSICS[c])
            sequences.append(_sequence(path, select(pixels), points, 0, subject=subject, action=action,
                                       camera=camera, intrinsics=H36M_INTRINSICS[c], size=H36M_SIZES[c], fps=H36M_FPS,
                                       source=source, extrinsics=H36M_EXTRINSICS[subject][c]))
    return sequences


def _archives(folder, split, keypoints):
    """GridConv's 2D and 3D archives of a split: in `folder`, its <keypoints> or its h36m/<keypoints>."""
    places = [Path(folder) / keypoints, Path(folder) / "h36m" / keypoints, Path(folder)]
    name = f"{split}_custom_{{}}_unnorm.pth.tar"
    place = next((place for place in places if (place / name.format("2d")).exists()), places[0])
    return [place / name.format(kind) for kind in ("2d", "3d")]


def load_gridconv(folder, split="train", keypoints="gt"):
    """Human3.6M in the archives of GridConv's release: in `folder`, its <keypoints> or its h36m/<keypoints>."""
    paths, remedy = _archives(folder, split, keypoints), REGISTER["GridConv"]
    image, space = (read_torch(path, remedy=remedy) for path in paths)
    if not (isinstance(space, dict) and isinstance(image, dict) and space and image.keys() == space.keys()):
        raise InputError(f"{paths[0]} and {paths[1].name}: not two dictionaries of the same sequences; {remedy}")
    sequences, source, both = [], _layout("Human3.6M", False), f"{paths[0]} and {paths[1].name}"
    for key, pixels in image.items():
        with described(f"{paths[1]}: {key}: not as GridConv's archives are", remedy):
            subject, _, (action, _, camera) = key[0], key[1], key[2].rpartition(".")
            pelvis, focal_centre = np.asarray(space[key]["pelvis"]), np.asarray(space[key]["camera"]).reshape(-1, 4)[0]
            joints = np.asarray(space[key]["joint_3d" if "joint_3d" in space[key] else "joints_3d"])
            points = (joints.reshape(len(joints), 17, 3) + pelvis[:, None]) / 1000  # (T, 17, 3) metres
            pixels = np.asarray(pixels).reshape(len(pixels), 17, 2)
            size = H36M_SIZES[H36M_CAMERAS.index(camera)]
            intrinsics = np.concatenate((focal_centre, np.zeros(5))).astype(np.float32)
        sequences.append(_sequence(
            both, pixels, points, 0, cut=False, subject=subject, action=action, camera=camera,
            intrinsics=intrinsics, size=size, fps=H36M_FPS, source=source))
    return sequences


def _humaneva_of_coco(pose):
    """COCO-17 (T, 17, 2|3) to HumanEva's 15 joints: mid hips, mid shoulders, limbs, the nose as the head (GLA-GCN)."""
    middle = lambda a, b: pose[:, [a, b]].mean(1, keepdims=True)
    return np.concatenate((middle(11, 12), middle(5, 6), pose[:, [5, 7, 9, 6, 8, 10, 11, 13, 15, 12, 14, 16, 0]]), 1)


HUMANEVA_ACTIONS = ("Walk", "Jog")  # of GLA-GCN's paper


def load_humaneva(folder, keypoints="gt", subjects=("Train/S1", "Train/S2", "Train/S3"), actions=HUMANEVA_ACTIONS):
    """HumanEva-I in VideoPose3D's layout, 15 joints, every chunk whose name begins with one of `actions`.

    `detectron_pt_coco` keypoints (COCO-17) are mapped to the 15 joints. The cameras' intrinsics are unknown (NaN).
    """
    sequences = []
    for subject, action, world, views, path, source in _videopose3d(
            folder, "humaneva15", keypoints, subjects, HUMANEVA_CAMERAS, REGISTER["HumanEva-I"]):
        for c, pixels in enumerate(views) if action.startswith(tuple(actions)) else ():
            pixels = _humaneva_of_coco(pixels) if pixels.shape[1] == 17 else pixels
            points = world_to_camera(world, HUMANEVA_EXTRINSICS[subject.split("/")[-1]][c])
            sequences.append(_sequence(path, pixels, points, 0, subject=subject, action=action,
                                       camera=HUMANEVA_CAMERAS[c], intrinsics=UNKNOWN_INTRINSICS, size=HUMANEVA_SIZE,
                                       fps=HUMANEVA_FPS, source=source))
    return sequences


def load_3dhp(folder, split="train"):
    """MPI-INF-3DHP in P-STMO's layout, 17 joints in its own order, root 14; test frames that do not count: `valid`."""
    path, sequences = Path(folder) / f"data_{split}_3dhp.npz", []
    recordings, made = _nested(path, "data", REGISTER["MPI-INF-3DHP"])
    for name, recording in recordings.items():
        with described(f"{path}: {name}: not in P-STMO's layout", REGISTER["MPI-INF-3DHP"]):
            subject, _, action = name.partition(" ")
            views, fps = ({"0": recording}, np.nan) if split == "test" else recording
            size = (1920, 1080) if subject in ("TS5", "TS6") else (2048, 2048)
            for camera, view in views.items():
                valid = np.asarray(view["valid"]).reshape(-1) == 1 if split == "test" else None
                points = np.asarray(view["data_3d"]) / 1000
                if points.shape[1:] != (17, 3):
                    raise InputError(f"{path}: {name}: 3D of shape {points.shape}; expected (frames, 17, 3)")
                if valid is not None and len(valid) != len(points):
                    raise InputError(f"{path}: {name}: {len(valid)} flags of valid frames for {len(points)} frames")
                sequences.append(_sequence(path, view["data_2d"], points, 14, valid=valid, cut=False, subject=subject,
                                           action=action or subject, camera=str(camera), size=size, fps=float(fps),
                                           intrinsics=UNKNOWN_INTRINSICS, source=_layout("MPI-INF-3DHP", made)))
    return sequences


def provenance(sequences):
    """The honest name of what a figure is measured on.

    "Human3.6M" only for a whole training or test set with the published number of frames, in files that this project
    did not make; "MPI-INF-3DHP test set" by its valid frames; anything else is named for the files that it is.
    """
    sources = sorted({s.source for s in sequences})
    if sources == [_layout("Human3.6M", False)]:
        frames = {split: sum(len(s.pose_3d) for s in sequences if s.subject in SPLITS[split]) for split in SPLITS}
        if any(frames.values()) and all(n in (0, *H36M_FRAMES[split]) for split, n in frames.items()):
            return "Human3.6M"
        return f"{sources[0]} (not Human3.6M: {sum(frames.values()):,} frames)"
    if sources == [_layout("MPI-INF-3DHP", False)] and MPI3DHP_VALID == {
            s.subject: int(s.valid.sum()) for s in sequences if s.valid is not None}:
        return "MPI-INF-3DHP test set"
    return " and ".join(sources)


# sequences that the published rows leave out: of S11 always, of S9 with GridConv's detected 2D (drifting annotation)
SKIPPED, SKIPPED_DETECTED = {("S11", "Directions")}, {("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}


def load_dataset(recipe, folder, split):
    """The Sequences of `split` ("train" or "test") for a recipe's `data`, `keypoints`, `skeleton` and `skip`.

    The protocols: Human3.6M trains on S1 S5 S6 S7 S8, tests on S9 S11 and leaves out S11's sequence named exactly
    `Directions`, with skip = "gridconv" and detected 2D also 12 of S9; HumanEva-I trains on Train/ and tests on
    Validate/ S1 to S3 (`actions` of the recipe); 3DHP comes in Human3.6M's joint order where the
    recipe's skeleton is h36m17. Raises InputError for another name.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r}: expected train or test")
    keypoints = recipe.keypoints
    if recipe.data == "synthetic":
        return [s for s in synthesize(0) if s.subject in SPLITS[split]]
    listing(folder)
    if recipe.data == "mocap":
        return load_mocap(folder, "mocap", keypoints, split)
    if recipe.data == "humaneva":
        subjects = tuple(f"{'Train' if split == 'train' else 'Validate'}/S{i}" for i in (1, 2, 3))
        return load_humaneva(folder, keypoints, subjects, recipe.actions)
    if recipe.data == "3dhp":
        sequences = load_3dhp(folder, split)
        if recipe.skeleton == "h36m17":
            order = list(H36M_17_OF_3DHP)
            sequences = [replace(s, pose_2d=s.pose_2d[:, order], pose_3d=s.pose_3d[:, order]) for s in sequences]
        return sequences
    if recipe.data not in ("h36m", "gridconv"):
        raise InputError(f"unknown data {recipe.data!r}; known: h36m, gridconv, humaneva, 3dhp, mocap, synthetic")
    if files_of(recipe, folder)[0].suffix == ".tar":
        sequences = load_gridconv(folder, split, keypoints)
    else:
        sequences = load_h36m(folder, keypoints, SPLITS[split], len(SKELETONS[recipe.skeleton].joints))
    skipped = SKIPPED | (SKIPPED_DETECTED if recipe.skip == "gridconv" and keypoints != "gt" else set())
    return [s for s in sequences if (s.subject, s.action) not in skipped]


def files_of(recipe, folder):
    """The files that a recipe's data is read from, the training set's first; they need not be there.

    Human3.6M comes from GridConv's archives (<keypoints>/ or h36m/<keypoints>/) where they are and VideoPose3D's files
    are not.
    """
    folder, k = Path(folder), recipe.keypoints
    archives = [path for split in SPLITS for path in _archives(folder, split, k)]
    names = {"h36m": ["data_3d_h36m.npz", *[f"data_2d_h36m_{k}.npz"] * (k != "gt")],
             "humaneva": ["data_3d_humaneva15.npz", f"data_2d_humaneva15_{k}.npz"],
             "3dhp": ["data_train_3dhp.npz", "data_test_3dhp.npz"], "mocap": ["data_3d_mocap.npz", f"data_2d_mocap_{k}.npz"]}
    paths = archives if recipe.data == "gridconv" else [folder / name for name in names.get(recipe.data, ())]
    if (recipe.data == "h36m" and recipe.skeleton == "h36m17" and not all(path.exists() for path in paths)
            and all(path.exists() and path.parent != folder for path in archives)):
        return archives
    return paths


def listing(folder):
    """The sorted names in a data folder, None where there is no such folder; InputError where it may not be read."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); name a data folder that you may read") from None


# what can be had: name, data, keypoints, skeleton, what it allows to reproduce, where it comes from
_CPN = "fetch data_2d_h36m_cpn_ft_h36m_dbb.npz, which VideoPose3D's DATASETS.md points to"
SETS = (
    ("Human3.6M", "h36m", "gt", "h36m17", "GridConv's P1* rows (Tables 2, 4, 5); GLA-GCN's gt rows (Tables 1, 4, 5)",
     "Human3.6M"),
    ("Human3.6M, 32 joints", "h36m", "gt", "h36m32", "GridConv's 32-joint rows (Table 6)", "Human3.6M"),
    ("Human3.6M", "h36m", "hrnet", "h36m17", "GridConv's P1 / P2 rows (Tables 1, 2, 5, A)", "GridConv"),
    ("Human3.6M", "h36m", "cpn_ft_h36m_dbb", "h36m17", "GLA-GCN's CPN rows (Tables 1, 4)", _CPN),
    ("GridConv archives", "gridconv", "gt", "h36m17", "the rows on Human3.6M's gt 2D, 17 joints", "GridConv"),
    ("GridConv archives", "gridconv", "hrnet", "h36m17", "the rows on Human3.6M's hrnet 2D", "GridConv"),
    ("HumanEva-I", "humaneva", "gt", "humaneva15", "GLA-GCN's gt row (Table 2)", "HumanEva-I"),
    ("HumanEva-I", "humaneva", "detectron_pt_coco", "humaneva15", "GLA-GCN's MRCNN row (Table 2)", "HumanEva-I"),
    ("MPI-INF-3DHP", "3dhp", "gt", "3dhp17", "GLA-GCN's rows (Table 3); its test set and a model trained on Human3.6M: "
     "GridConv's cross-dataset row (Table 3)", "MPI-INF-3DHP"),
    ("motion capture", "mocap", "gt", "h36m17", "the rows named mocap", "motion capture"))


def check_folder(folder):
    """(lines, unusable sets): what a folder holds, what that allows to reproduce, what is missing and where it is."""
    sets, names = list(SETS), listing(folder)
    if names is None:
        raise InputError(f"{folder}: not found; name the data folder")
    for name in names:  # 2D that no published row uses
        match = re.fullmatch(r"data_2d_(h36m|humaneva15|mocap)_(.+)\.npz", name)
        if match and not any(one[1] == match[1].removesuffix("15") and one[2] == match[2] for one in SETS):
            title, kind, _, skeleton = next(one[:4] for one in SETS if one[1] == match[1].removesuffix("15"))
            sets.append((title, kind, match[2], skeleton, f"no published row; any recipe with --keypoints {match[2]}", title))
    lines, unusable = [], 0
    for title, kind, keypoints, skeleton, allows, source in sets:
        recipe = types.SimpleNamespace(data=kind, keypoints=keypoints, skeleton=skeleton,
                                       skip="gridconv" * (keypoints == "hrnet"), actions=HUMANEVA_ACTIONS)
        paths = files_of(recipe, folder)
        missing = [str(path.relative_to(folder)) for path in paths if not path.exists()]
        if kind == "gridconv" and len(missing) == len(paths):  # its rows stand under Human3.6M
            continue
        lines.append(f"{title}, 2D {keypoints}: " + ("not here; it would allow " if missing else "allows ") + allows)
        if missing:
            lines.append(f"    missing: {', '.join(missing)}; {REGISTER.get(source, source)}")
        found = SPLITS if not missing else [split for split, path in zip(SPLITS, paths) if kind == "3dhp" and path.exists()]
        for split in found:
            try:
                part = load_dataset(recipe, folder, split)
                lines.append(f"    {split}: {len(part)} sequences, {sum(len(s.pose_3d) for s in part):,} frames; "
                             f"{provenance(part)}")
            except InputError as error:
                lines.append(f"    {split}: cannot be used: {error}")
                unusable += 1
    lines.append(f"python train.py --list --data {folder} names the recipe of every row.")
    return lines, unusable


# ---------------------------------------------------------------------------------------------------------------------
# Scale

def write_scale(folder, frames):
    """Procedural motion in Human3.6M's two files: its seven subjects, 15 actions, two takes, four cameras and 32 joints, with
    `frames` frames over all of them, in VideoPose3D's layout and marked as made by this project."""
    space, image, wide = {}, {}, np.zeros(32, int)
    wide[list(H36M_17_OF_32)] = range(17)
    for number, subject in enumerate(H36M_EXTRINSICS):
        for take in range(30):
            world = _motion(np.random.default_rng((number, take)), list(MOTIONS)[take % len(MOTIONS)], 150, H36M_FPS, _BONES,
                            np.zeros((17, 3))).astype(np.float32)
            views = [project(world_to_camera(world, e), k) for e, k in zip(H36M_EXTRINSICS[subject], H36M_INTRINSICS)]
            repeat = np.arange(frames // 840) % 150
            name = f"action{take // 2} {take % 2}"
            space.setdefault(subject, {})[name] = world[repeat][:, wide]
            image.setdefault(subject, {})[name] = [view[repeat].astype(np.float32) for view in views]
    np.savez(Path(folder) / "data_3d_h36m.npz", made_by=MADE_BY, positions_3d=np.array(space, object))
    np.savez(Path(folder) / "data_2d_h36m_gt.npz", made_by=MADE_BY, positions_2d=np.array(image, object))


def scale(frames):
    """One line: how long loading `frames` frames of Human3.6M's size takes as training does it, and the most memory. The
    files are written to a temporary folder and removed. InputError: too few frames, too little room there."""
    import resource  # Linux and macOS
    if frames < 840:
        raise InputError(f"--frames {frames}: expected at least 840, a frame for each subject, action, take and camera")
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 300 * frames:
            raise InputError(f"{folder}: {300 * frames / 1e9:.1f} GB of room needed; name another folder by TMPDIR")
        writer = multiprocessing.get_context("spawn").Process(target=write_scale, args=(folder, frames))  # its memory is its own
        writer.start()
        writer.join()
        megabytes, started = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6, time.perf_counter()
        recipe = types.SimpleNamespace(data="h36m", keypoints="gt", skeleton="h36m17", skip="")
        stores = [FrameStore(load_dataset(recipe, folder, split), "width", SKELETONS["h36m17"]) for split in SPLITS]
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (f"{sum(map(len, stores)):,} frames of {len(H36M_EXTRINSICS)} subjects, files of {megabytes:,.0f} MB: loaded for training "
            f"and testing in {seconds:.1f} s, at most {peak / 1e9:.2f} GB of memory")


def main():
    """The command line: `bvh`, `check` and `scale`."""
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    bvh = commands.add_parser("bvh", help="BVH clips to training pairs")
    bvh.add_argument("folder")
    bvh.add_argument("--out", default="data", help="folder for the two files (data)")
    bvh.add_argument("--name", default="mocap", help="what the set is called; the recipes read the one called mocap")
    bvh.add_argument("--test", required=True, help="regular expression: matching clips are the test set")
    bvh.add_argument("--map", help="JSON file {our joint: its joint} for unusual skeletons")
    bvh.add_argument("--scale", type=auto_or_metres, default="auto", help="metres a file unit, or auto: legs of 0.90 m (auto)")
    bvh.add_argument("--up", default="y", choices=("y", "z"), help="the file's upward axis (y)")
    bvh.add_argument("--fps", type=positive_number, help="resample to this rate (as recorded)")
    bvh.add_argument("--volume", type=positive_number, default=CAPTURE_VOLUME, help="the pelvis stays within +- this (1.5 m)")
    check = commands.add_parser("check", help="what a data folder holds and allows to reproduce")
    check.add_argument("folder")
    size = commands.add_parser("scale", help="seconds and memory of loading motion of Human3.6M's size")
    size.add_argument("--frames", type=int, default=2_103_360, help="over the four cameras (2,103,360)")
    args = parser.parse_args()
    if args.command == "scale":
        print(scale(args.frames))
    elif args.command == "check":
        lines, unusable = check_folder(args.folder)
        print("\n".join(lines))
        if unusable:
            raise InputError(f"{args.folder}: {unusable} of the sets found cannot be used; see above")
    else:
        mapping = read_json(args.map) if args.map else {}
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise InputError(f'{args.map}: expected {{"our joint": "its joint", ...}}')
        print(convert_bvh(args.folder, args.out, args.name, args.test, mapping, args.scale, args.up, args.fps, args.volume))


def positive_number(text):
    """An option's type: a number above 0. ArgumentTypeError otherwise, which argparse reports with the option's name."""
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")


def auto_or_metres(text):
    """An option's type: "auto" or a number above 0, see positive_number."""
    return text if text == "auto" else positive_number(text)


if __name__ == "__main__":
    run(main)
