"""Data for 2D-to-3D pose lifting: skeletons, cameras, datasets, BVH, synthetic motion.

    python data.py bvh FOLDER --out data --name mocap --test REGEX    # clips -> training pairs
    python data.py check FOLDER                      # what is there, what it allows to reproduce

Every loader returns a list of `Sequence`: 2D in pixels, 3D root-relative in the camera frame, in
metres. A `FrameStore` holds such a list once on the device and gathers batches by index.
"""
import os

# GNU's OpenMP reads this when torch is imported: threads that wait for each other spin for a while.
# Unbounded, they take the processor from one another where other programs run beside them.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import codecs
import json
import math
import pickle
import pickletools
import re
import sys
import traceback
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product, takewhile
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, is_zipfile

import numpy as np
import torch


# --------------------------------------------------------------------------------------------------
# Errors and files

class InputError(ValueError):
    """Bad input: one line that names the file or argument, what was found, expected, and to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise InputError(f"{self.prog}: {message} (see --help)")


def run(main):
    """Calls `main()` for a command line: bad input is one line and exit status 2, Ctrl-C is 130.

    What a terminal cannot show is escaped. A plain ValueError is the user's only where a model
    file raised it (a layout, a window); others are bugs and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, torch.OutOfMemoryError):
        message = "not enough memory"
    except OSError as error:
        message = f"{error.filename or 'reading or writing'}: {error.strerror or error}"
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
        if not isinstance(error, InputError) and raised_in not in ("gridconv.py", "glagcn.py"):
            raise
        message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def described(problem, remedy):
    """Around what reads a file or takes its content apart: what that raises becomes one line.

    A damaged, foreign or hostile file may raise anything; what it names and may not is said.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if named := re.search(r"GLOBAL \S{1,200}|TorchScript", str(error)):  # torch's words, ours
            problem += f" ({named[0]} is refused)"
        raise InputError(f"{problem}; {remedy}") from None


def write_atomically(path, write):
    """`write(file)` into a temporary file beside `path`, then renamed: whole or not at all.

    Raises InputError where the folder cannot be made or written; whatever stood at `path` then
    stands there still.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):  # renamed already, or never made
            temporary.unlink()


def write_text(path, text):
    """A file of text in UTF-8, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _existing(path, remedy):
    """The path of a regular file: a pipe waits for its writer, a device never ends."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found, or no regular file; {remedy}")
    return path


def read_json(path, remedy="name a JSON file"):
    """What a JSON file holds, in UTF-8, 16 or 32; InputError where there is none, or other text."""
    content = _existing(path, remedy).read_bytes()
    with described(f"{path}: not JSON", "write it again"):
        return json.loads(content)


# --------------------------------------------------------------------------------------------------
# Restricted reading: NumPy's and torch's files may hold pickles, which could run any code.
# Names are resolved to READABLE's, every other is refused. A pickle may also hand a state to what
# it names: classes here take one for their objects alone, and functions have none that counts.

class _DType:
    """A NumPy dtype of numbers, strings or objects. NumPy's own would believe any flags and
    fields, and with those read addresses from the file."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO":
            raise ValueError("values of another type")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that a pickle makes empty, and fills with as much as its shape claims."""

    def __new__(cls, *_):
        return super().__new__(cls, 0, "b")

    def __setstate__(self, state):
        version, shape, kind, fortran, values = state
        size = 1 if kind.dtype.hasobject else kind.dtype.itemsize
        if len(values) != math.prod(shape) * size:
            raise ValueError("another size than it claims")
        super().__setstate__((version, shape, kind.dtype, fortran, values))


def _scalar(kind, value):
    """A NumPy number."""
    if isinstance(value, str):  # the bytes of Python 2
        value = value.encode("latin1")
    return np.frombuffer(value, kind.dtype)[0]


def _dict(*_):
    """A plain dictionary in place of a defaultdict."""
    return {}


class _Inert:
    """In place of an object that nobody needs: takes any arguments and state, does nothing."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


READABLE = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,  # NumPy 1
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray._reconstruct": _Array,  # NumPy 2
    "numpy._core.multiarray.scalar": _scalar,
    "collections.defaultdict": _dict,
    "collections.OrderedDict": dict,
    "_codecs.encode": codecs.encode,  # how Python 3 writes bytes with protocol 2
    "builtins.bytes": "".encode,  # empty ones
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.set": set}
# whole objects that stand in the releases' checkpoints beside the weights
INERT = {"torch.optim.adam.Adam": _Inert} | {f"numpy.random.{name}": _Inert for name in (
    "__RandomState_ctor", "mtrand.RandomState", "_pickle.__randomstate_ctor",
    "_pickle.__bit_generator_ctor", "_mt19937.MT19937")}
UNREADABLE = "cannot be read: damaged or of another format"


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, restricted to READABLE."""

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins")  # Python 2
        if name not in READABLE:
            raise ValueError(f"GLOBAL {name}")
        return READABLE[name]


def _unpickle(file):
    """The next object in a file of pickles; text of Python 2 is Latin-1.

    Its opcodes are looked through first: the unpickler makes room for whatever number of memorised
    objects, or length of bytes, a pickle names.
    """
    start = file.tell()
    for opcode, value, _ in pickletools.genops(file):
        if "PUT" in opcode.name and value > file.tell():
            raise ValueError("more objects than bytes")
    file.seek(start)
    return _Unpickler(file, encoding="latin1").load()


def _check_zip(path, remedy):
    """InputError for a zip file with a damaged member, or one that unpacks to far more than it is.

    Motion compresses about 10-fold, zeros 1,000-fold: the bound is 200 times the file's size and
    100 MB. Methods other than NumPy's and torch's may unpack without one, and torch leaves the
    memory of what is marked as a folder (16) as it was.
    """
    with ZipFile(path) as archive:
        members = archive.infolist()
        plain = all(member.compress_type in (ZIP_STORED, ZIP_DEFLATED)
                    and not member.external_attr & 16 for member in members)
        size = sum(member.file_size for member in members)
        if not plain or size > 200 * path.stat().st_size + 10 ** 8:
            raise InputError(f"{path}: packed as neither NumPy nor torch do")
        if damaged := archive.testzip():
            raise InputError(f"{path}: {damaged!r} is damaged; {remedy}")


def _read_npy(file):
    """The array of an open npy file; objects in it are read by the restricted unpickler."""
    np.lib.format.read_magic(file)
    if np.lib.format.read_array_header_1_0(file)[2].hasobject:
        array = np.asarray(_unpickle(file))
    else:
        file.seek(0)
        array = np.load(file, allow_pickle=False)
    if file.read(1):
        raise ValueError("more values than its header says")
    return array


def read_npz(path, remedy="fetch or make it again"):
    """{key: array} of a NumPy archive, or of one .npy file, read without running code from it.

    Raises InputError where the file is missing, damaged (each member of an archive has a checksum,
    an .npy file has none), unpacks to more than `_check_zip` allows, or names another class.
    """
    path = _existing(path, remedy)
    with described(f"{path}: {UNREADABLE}", remedy):
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                return {path.stem: _read_npy(file)}
        _check_zip(path, remedy)
        with ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _read_npy(archive.open(name))
                    for name in archive.namelist()}


def read_torch(path, remedy="fetch or make it again", inert=False):
    """The object in a `torch.save` file, legacy or zip, on the CPU, without running code from it.

    `inert`: objects of the classes INERT (released checkpoints hold whole optimisers) are read as
    placeholders; every other unknown class is refused by name. Raises InputError like `read_npz`:
    zip files have checksums, which torch.load does not look at; legacy files have none.
    """
    path = _existing(path, remedy)
    allowed = READABLE | INERT if inert else READABLE
    allowed = [(stand_in, name) for name, stand_in in allowed.items()]
    with described(f"{path}: {UNREADABLE}", remedy):
        if is_zipfile(path):
            _check_zip(path, remedy)
        else:
            # A legacy file is pickles: a number, the version, the machine, the object, a list of
            # its tensors. GridConv's have none, and byte strings of Python 2, which torch refuses.
            with suppress(Exception), open(path, "rb") as file:
                pickles = [_unpickle(file) for _ in range(5)]
                if pickles[4] == []:
                    return pickles[3]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the encoding, for byte strings of Python 2
            return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")


# --------------------------------------------------------------------------------------------------
# Skeletons

class Skeleton:
    """Joint names, left_... and right_... in pairs, and each joint's parent (-1: the root).

    root: the joint that poses are relative to. edges: (parent, child) pairs. left: the joints of
    the left side; right: the joint that each of them mirrors. mirror: for each joint the one that
    takes its place in the mirrored pose.
    """

    def __init__(self, name, joints, parents):
        self.name, self.joints, self.parents = name, joints, parents
        self.root = parents.index(-1)
        self.edges = tuple((parents[j], j) for j in range(len(joints)) if j != self.root)
        self.left = tuple(j for j, joint in enumerate(joints) if joint.startswith("left_"))
        self.right = tuple(joints.index("right_" + joints[j][5:]) for j in self.left)
        swap = dict(zip(self.left + self.right, self.right + self.left))
        self.mirror = [swap.get(j, j) for j in range(len(joints))]


SKELETONS = {name: Skeleton(name, tuple(joints.split()), parents) for name, joints, parents in (
    ("h36m17", """pelvis right_hip right_knee right_ankle left_hip left_knee left_ankle spine thorax
        neck head left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist""",
     (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)),
    ("h36m32", """pelvis right_hip right_knee right_ankle right_toe right_toe_tip left_hip left_knee
        left_ankle left_toe left_toe_tip spine_base spine thorax neck head left_collar left_shoulder
        left_elbow left_wrist left_thumb left_thumb_tip left_hand left_hand_tip right_collar
        right_shoulder right_elbow right_wrist right_thumb right_thumb_tip right_hand
        right_hand_tip""", (-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 12, 16, 17, 18, 19,
                            20, 19, 22, 12, 24, 25, 26, 27, 28, 27, 30)),
    ("humaneva15", """pelvis thorax left_shoulder left_elbow left_wrist right_shoulder right_elbow
        right_wrist left_hip left_knee left_ankle right_hip right_knee right_ankle head""",
     (-1, 0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 0, 11, 12, 1)),
    ("3dhp17", """head_top neck right_shoulder right_elbow right_wrist left_shoulder left_elbow
        left_wrist right_hip right_knee right_ankle left_hip left_knee left_ankle pelvis spine
        head""", (16, 15, 1, 2, 3, 1, 5, 6, 14, 8, 9, 14, 11, 12, -1, 14, 1)),
    ("coco17", """nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow
        right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle
        right_ankle""", (-1, 0, 0, 1, 2, 0, 0, 5, 6, 7, 8, 5, 6, 11, 12, 13, 14)))}
H36M_17_OF_32 = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)
HUMANEVA_OF_COCO = np.array((  # (15, 2): the mean of two joints, or one
    (11, 5, 5, 7, 9, 6, 8, 10, 11, 13, 15, 12, 14, 16, 0),
    (12, 6, 5, 7, 9, 6, 8, 10, 11, 13, 15, 12, 14, 16, 0))).T
H36M_17_OF_3DHP = (14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4)  # neck: 3DHP's head


# --------------------------------------------------------------------------------------------------
# Cameras: the public calibration of Human3.6M, float32 figures printed with as many digits as name
# one, and of HumanEva-I

H36M_CAMERAS = ("54138969", "55011271", "58860488", "60457274")
H36M_SIZES = ((1000, 1002), (1000, 1000), (1000, 1000), (1000, 1002))
H36M_INTRINSICS = np.float32((  # fx fy cx cy in pixels, radial k1 k2 k3, tangential p1 p2
    (1145.0494, 1143.7811, 512.5415, 515.4515,
     -0.20709892, 0.24777518, -0.0030751503, -0.0009756989, -0.0014244716),
    (1149.6757, 1147.5917, 508.84863, 508.0649,
     -0.19421363, 0.24040854, 0.0068199756, -0.0016190266, -0.0027408944),
    (1149.1407, 1148.799, 519.81586, 501.40265,
     -0.20833819, 0.255488, -0.0024604974, 0.001484387, -0.0007599993),
    (1145.5114, 1144.7739, 514.9682, 501.88202,
     -0.19838409, 0.21832368, -0.008947807, -0.0005872056, -0.001813362))).astype(float)
# of each subject (4 cameras, 7): camera-to-world quaternion w x y z, the camera's position: mm
# here, kept in metres
MILLIMETRES = np.array((1, 1, 1, 1, 1000, 1000, 1000))
H36M_EXTRINSICS = dict(zip(("S1", "S5", "S6", "S7", "S8", "S9", "S11"), np.float32((
    0.14070565, -0.15007018, -0.7552408, 0.62232804, 1841.107, 4955.2847, 1563.4454,  # S1
    0.6157188, -0.7648363, -0.14833826, 0.11794741, 1761.2786, -5078.007, 1606.265,
    0.14651473, -0.14647852, 0.76530236, -0.60941756, -1846.7777, 5215.0464, 1491.9724,
    0.58340085, -0.7853162, 0.14548823, -0.14749594, -1794.7897, -3722.699, 1574.8927,
    0.14673772, -0.16237096, -0.7551893, 0.6178939, 2097.3916, 4880.945, 1605.7324,  # S5
    0.61597586, -0.7626792, -0.15728192, 0.1189815, 2031.7008, -5167.933, 1612.9231,
    0.14291371, -0.12907842, 0.7678385, -0.6110143, -1620.5948, 5171.6587, 1496.437,
    0.592048, -0.7814218, 0.12747486, -0.15036418, -1637.1737, -3867.3174, 1547.0332,
    0.13378978, -0.15692396, -0.75710905, 0.61988795, 1935.4518, 4950.2456, 1618.0839,  # S6
    0.61471975, -0.7628813, -0.16174768, 0.11819245, 1969.804, -5128.739, 1632.7788,
    0.15299481, -0.13529131, 0.76460963, -0.6112781, -1769.5964, 5185.3613, 1476.9934,
    0.59161013, -0.7804774, 0.1283227, -0.15615939, -1721.6687, -3884.1313, 1540.4879,
    0.14352418, -0.16313368, -0.75483286, 0.6188825, 1974.513, 4926.3545, 1597.8326,  # S7
    0.6141673, -0.76382625, -0.15966456, 0.117792994, 1937.0585, -5119.79, 1631.5665,
    0.1455006, -0.12874816, 0.76605165, -0.61271393, -1741.8112, 5208.2495, 1464.8246,
    0.5912848, -0.78217643, 0.12445474, -0.15196487, -1734.7106, -3832.4214, 1548.583,
    0.14110588, -0.15589868, -0.75619173, 0.61964405, 2150.6519, 4896.161, 1611.9047,  # S8
    0.61696017, -0.7647668, -0.1484635, 0.11158158, 2219.9656, -5148.453, 1613.0441,
    0.1471444, -0.1337712, 0.76701283, -0.61003697, -1571.2216, 5137.0186, 1498.1761,
    0.59278244, -0.78258705, 0.12147816, -0.14631996, -1476.9133, -3896.7412, 1547.9722,
    0.15540588, -0.15548216, -0.75320953, 0.6199595, 2044.4585, 4935.117, 1481.2275,  # S9
    0.6187845, -0.7634735, -0.14132239, 0.11933968, 1990.9597, -5123.8105, 1568.8048,
    0.13357827, -0.13671005, 0.76894546, -0.61007386, -1670.9922, 5211.986, 1528.388,
    0.5879399, -0.7823407, 0.14276144, -0.1479487, -1696.0435, -3827.0999, 1591.4127,
    0.15232472, -0.1544232, -0.75475633, 0.619107, 2098.4402, 4926.5547, 1500.2786,  # S11
    0.61894494, -0.7600917, -0.15300633, 0.12552583, 2083.1824, -4912.173, 1561.0786,
    0.14943229, -0.15650228, 0.7681234, -0.60263044, -1609.8153, 5177.336, 1537.8967,
    0.58942515, -0.7818877, 0.13991211, -0.14715362, -1590.738, -3854.169, 1578.0176,
)).reshape(7, 4, 7) / MILLIMETRES))

HUMANEVA_CAMERAS = ("C1", "C2", "C3")
HUMANEVA_EXTRINSICS = dict(zip(("S1", "S2", "S3"), np.array((
    0.424207, -0.4983646, -0.5802981, 0.4847012, 4062.227, 663.2477, 1528.397,  # S1
    0.6503354, -0.7481602, -0.0919284, 0.0941766, 844.8131, -3805.2092, 1504.9929,
    0.0664734, -0.0690535, 0.7416416, -0.6639132, -797.67377, 3916.3174, 1433.6602,
    0.4214752, -0.4961493, -0.5838273, 0.4851187, 4112.9121, 626.4929, 1545.2988,  # S2
    0.6501393, -0.7476588, -0.0954617, 0.0959808, 923.574, -3877.9243, 1504.5518,
    0.0699353, -0.0712403, 0.7421637, -0.662742, -781.4915, 3838.8853, 1444.9929,
    0.424207, -0.4983646, -0.5802981, 0.4847012, 4062.2271, 663.2477, 1528.397,  # S3
    0.6503354, -0.7481602, -0.0919284, 0.0941766, 844.8131, -3805.2092, 1504.9929,
    0.0664734, -0.0690535, 0.7416416, -0.6639132, -797.6738, 3916.3174, 1433.6602,
)).reshape(3, 3, 7) / MILLIMETRES))
UNKNOWN_INTRINSICS = np.full(9, np.nan)  # HumanEva-I's and 3DHP's are not in their files


def project(points, intrinsics):
    """Camera-space points (..., 3) to the image (..., 2), with Human3.6M's lens distortion.

    `intrinsics` (9,): fx fy cx cy k1 k2 k3 p1 p2; the result is in the units of fx, fy, cx, cy
    (pixels, or screen units). As in the field's preparation, X/Z and Y/Z are clamped to [-1, 1].
    """
    focal, centre, k1, k2, k3, tangential = np.split(np.asarray(intrinsics), (2, 4, 5, 6, 7))
    xy = np.clip(points[..., :2] / points[..., 2:], -1, 1)
    r2 = (xy ** 2).sum(-1, keepdims=True)
    distortion = 1 + r2 * (k1 + r2 * (k2 + r2 * k3)) + (tangential * xy).sum(-1, keepdims=True)
    return focal * (xy * distortion + tangential * r2) + centre


def _rotation(quaternion):
    """The matrix (3, 3) of a quaternion w x y z."""
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def world_to_camera(points, extrinsics):
    """R^T (X - t) for world points (..., 3).

    `extrinsics` (7,): camera-to-world quaternion w x y z, position t.
    """
    return (points - np.asarray(extrinsics[4:])) @ _rotation(extrinsics[:4])


def camera_to_world(points, extrinsics):
    """R X + t for camera-space points (..., 3): the inverse of `world_to_camera`."""
    return points @ _rotation(extrinsics[:4]).T + np.asarray(extrinsics[4:])


def _screen(size, rule):
    """(centre x, centre y, scale) of a rule: normalised = (pixels - centre) / scale."""
    if rule == "release-500":
        return 500.0, 500.0, 500.0
    sides = {"width": size[0], "longest": max(size)}
    if rule not in sides:
        raise InputError(f"normalise: unknown rule {rule!r}; known: release-500, width, longest")
    return size[0] / 2, size[1] / 2, sides[rule] / 2


def normalise(pose_2d, size, rule):
    """Pixels (..., 2) to about [-1, 1], numpy or torch; `size` (width, height).

    `release-500`: (p - 500) / 500 on both axes, whatever the image (GridConv's release). `width`:
    x / w * 2 - 1 and y / w * 2 - h / w (VideoPose3D, GLA-GCN). `longest`: (p - size / 2) / (longest
    side / 2). Raises InputError for another rule.
    """
    *centre, scale = _screen(size, rule)
    if torch.is_tensor(pose_2d):
        return (pose_2d - pose_2d.new_tensor(centre)) / scale
    return (pose_2d - np.array(centre, np.result_type(pose_2d, 0.0))) / scale


def fitting_rule(rule, sizes):
    """The rule for images of these sizes (width, height).

    `release-500` is for Human3.6M's 1000 x 1000: about the centre, in half sides. For images of
    other sizes that is `longest`.
    """
    human36m = all(999 < side < 1003 for size in sizes for side in size)
    return "longest" if rule == "release-500" and not human36m else rule


# --------------------------------------------------------------------------------------------------
# Sequences and the frame store

@dataclass
class Sequence:
    """One person's motion as one camera saw it; float32 arrays.

    pose_2d (T, J, 2) pixels; pose_3d (T, J, 3) metres, camera frame, relative to the root joint;
    root (T, 3) the root joint in the camera frame, metres; intrinsics (9,) as `project` takes them,
    NaN where unknown; size (width, height) in pixels; fps in 1/s; source: what the motion is, see
    `provenance`; valid (T,): frames that count in a score, None where all do; extrinsics (7,) as
    `world_to_camera` takes them, z up, None where unknown.
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


def check_finite(array, where):
    """InputError that names the first frame of `array` (T, ...) with a value that is no float32."""
    finite = np.abs(array) <= np.finfo(np.float32).max  # NaN is not
    if not finite.all():
        raise InputError(f"{where}, frame {np.argwhere(~finite)[0, 0]}: NaN or infinite in float32")


def check_poses(value, where, dims):
    """`value` as an array of finite numbers (frames, joints, dims), or InputError.

    2D may come with a confidence, which is cut off.
    """
    where = f"{where}, {dims}D"
    with described(f"{where}: joints or frames of unequal length", "make it again"):
        array = np.asarray(value)
    numbers = array.dtype.kind in "fiu" and array.size
    if not numbers or array.ndim != 3 or not dims <= array.shape[2] <= 3:
        raise InputError(f"{where}: no frames of numbers (joints, {dims}); shape {array.shape}")
    check_finite(array[..., :dims], where)
    return array[..., :dims]


def _sequence(where, pose_2d, points, intrinsics, root_joint=0, **fields):
    """A Sequence from checked 2D (T, J, 2) pixels and camera-space points (T, J, 3) metres."""
    image, space = pose_2d.shape[:2], points.shape[:2]
    if image != space:
        raise InputError(f"{where}: frames and joints are {image} in 2D, {space} in 3D")
    root = points[:, root_joint]
    return Sequence(
        pose_2d=np.float32(pose_2d), pose_3d=np.float32(points - root[:, None]),
        root=np.float32(root), intrinsics=np.float32(intrinsics), **fields)


def _check_joints(sequences, skeleton, where):
    """InputError where there are no sequences, or some of other joints than the skeleton's."""
    joints = {s.pose_2d.shape[1] for s in sequences}
    if joints != {len(skeleton.joints)}:
        raise InputError(f"{where}: no sequences of {skeleton.name}; joints: {sorted(joints)}")


class FrameStore:
    """Every frame of `sequences`, once, on `device`; batches are gathers, without a host copy.

    Attributes, N frames of S sequences: input (N, J, 2) normalised by `rule`; pose_3d (N, J, 3)
    metres; target (N, J, 3): pose_3d for target="camera"; for "uvd" the normalised pinhole
    projection u, v and the root-relative depth in metres (GridConv's rows marked with a section
    sign). sequence (N,) each frame's sequence, first and last (N,) the bounds of that sequence,
    root (N, 3), valid (N,) bool, intrinsics (S, 9); on the CPU sizes (S, 2).
    cameras="random" (see `random_cameras`), `noise` and `missing` (see `detect`) are drawn by the
    number `draw`, and anew by `redraw`. swap_sides exchanges the left and right joints of the input
    alone (GLA-GCN's Table 6, row 4).
    Raises InputError for an empty list, a wrong number of joints, an unknown rule, "uvd"
    without cameras, or random cameras without the recorded ones' extrinsics.
    """

    def __init__(self, sequences, rule, skeleton, device="cpu", target="camera",
                 cameras="recorded", noise=0.0, missing=0.0, swap_sides=False, draw=0):
        _check_joints(sequences, skeleton, "frame store")
        self.sequences, self.skeleton, self.rule = list(sequences), skeleton, rule
        self.noise, self.missing, self.swap_sides = noise, missing, swap_sides
        self.uvd = target == "uvd"

        lengths = torch.tensor([len(s.pose_2d) for s in sequences])
        ends = lengths.cumsum(0)
        of_each = torch.stack((torch.arange(len(lengths)), ends - lengths, ends - 1))
        self.sequence, self.first, self.last = of_each.repeat_interleave(lengths, 1).to(device)
        valid = [np.ones(len(s.pose_2d), bool) if s.valid is None else s.valid for s in sequences]
        self.valid = torch.from_numpy(np.concatenate(valid)).to(device)

        self._clean = _joined([normalise(s.pose_2d, s.size, rule) for s in sequences], device)
        self.pose_3d = _joined([s.pose_3d for s in sequences], device)
        self.root = _joined([s.root for s in sequences], device)
        self.intrinsics = _joined([s.intrinsics[None] for s in sequences], device)
        self.sizes = torch.tensor([s.size for s in sequences])
        self._mirror = torch.tensor(skeleton.mirror, device=device)
        self._sign = torch.tensor([-1.0, 1.0, 1.0], device=device)

        self._world = None
        if cameras == "random":
            self._world = _joined([upright(s) for s in sequences], device)
        if cameras == "random" or noise or missing:  # a figure measured on it is called so
            how = f", {cameras} cameras, noise {noise:g}, missing {missing:g}"
            self.sequences = [replace(s, source=s.source + how) for s in sequences]
        self.redraw(draw)

    def __len__(self):
        return len(self.input)

    def redraw(self, draw=0):
        """Random cameras, noise and missing joints anew, where the store has them.

        They are a function of the number `draw` alone. Training takes an even number each epoch,
        tests TEST_DRAW, an odd one: no model is tested in training's views.
        """
        generator = torch.Generator().manual_seed(draw)  # on the CPU: the same on every device
        if self._world is not None:
            points, self.intrinsics, self.sizes = random_cameras(
                self._world, self.sequence, len(self.sequences), generator)
            self.root = points[:, self.skeleton.root]
            self.pose_3d = points - self.root[:, None]
        screens = [_screen(size, self.rule) for size in self.sizes.tolist()]
        self._screen = self.pose_3d.new_tensor(screens)
        if self._world is not None:
            self._clean = self._to_uvd()[..., :2].contiguous()
        self.target = self._to_uvd() if self.uvd else self.pose_3d
        self.input = self._clean
        if self.noise or self.missing:
            self.input = detect(self._clean, self.first, self.last, self.noise, self.missing,
                                generator)
        if self.swap_sides:
            self.input = self.input.index_select(1, self._mirror)

    def _view(self, index):
        """Each frame's focal length, optical centre, and normalisation, (n, 1, 1|2)."""
        sequence = self.sequence[index]
        intrinsics, screen = self.intrinsics[sequence, None], self._screen[sequence, None]
        return intrinsics[..., :2], intrinsics[..., 2:4], screen[..., :2], screen[..., 2:]

    def normalised_intrinsics(self, index):
        """The intrinsics (n, 9) of frames `index` in the units of `input`."""
        focal, optical, centre, scale = self._view(index)
        pinhole = torch.cat((focal / scale, (optical - centre) / scale), -1)[:, 0]
        return torch.cat((pinhole, self.intrinsics[self.sequence[index], 4:]), -1)

    def _to_uvd(self):
        if not self.intrinsics.isfinite().all():
            raise InputError("frame store: uvd needs every camera's intrinsics")
        focal, optical, centre, scale = self._view(slice(None))
        points = self.pose_3d + self.root[:, None]
        pixels = focal * points[..., :2] / points[..., 2:] + optical
        return torch.cat(((pixels - centre) / scale, self.pose_3d[..., 2:]), -1)

    def to_camera(self, prediction, index):
        """A network's output (n, J, 3) for frames `index` as root-relative camera-space metres.

        The identity for "camera". For "uvd" the pixel is back-projected at the depth of the true
        root plus the predicted depth, then the true root is taken off: such figures use the root's
        position and the camera.
        """
        if not self.uvd:
            return prediction
        focal, optical, centre, scale = self._view(index)
        root = self.root[index, None]
        z = prediction[..., 2:] + root[..., 2:]
        xy = (prediction[..., :2] * scale + centre - optical) / focal * z
        return torch.cat((xy, z), -1) - root

    def batch(self, index, frames=1, causal=False, flip=None, all_targets=False):
        """Input and target of frames `index` (B,): (B, J, 2) and (B, J, 3).

        For frames = T > 1 the input is windows (B, T, J, 2): centred on their frame, or ending with
        it when `causal`; beyond its sequence's ends the first or last frame repeats. `all_targets`
        gives the targets of the whole window (B, T, J, 3). `flip` (B,) bool, on the device: these
        samples mirrored, input and target alike.
        """
        window = index
        if frames > 1:
            before = frames - 1 if causal else frames // 2
            offset = torch.arange(-before, frames - before, device=index.device)
            window = index[:, None] + offset  # (B, T)
            window = window.clamp(self.first[index][:, None], self.last[index][:, None])
        pose = _gather(self.input, window)  # (B, [T,] J, 2)
        target = _gather(self.target, window if all_targets else index)
        if flip is None:
            return pose, target
        return self._mirrored_where(flip, pose), self._mirrored_where(flip, target)

    def mirrored(self, pose):
        """Poses (..., J, 2|3) with x negated, left and right joints exchanged."""
        return pose.index_select(-2, self._mirror) * self._sign[:pose.shape[-1]]

    def _mirrored_where(self, flip, pose):
        flip = flip.view(-1, *[1] * (pose.ndim - 1))
        return torch.where(flip, self.mirrored(pose), pose)


def _joined(arrays, device):
    return torch.from_numpy(np.concatenate(arrays)).to(device, torch.float32)


def _gather(frames, index):
    """frames[index]: index_select is the faster form, on every device."""
    return frames.index_select(0, index.reshape(-1)).reshape(*index.shape, *frames.shape[1:])


# --------------------------------------------------------------------------------------------------
# Random cameras and imperfect 2D, for models that are to lift any video

TEST_DRAW = 1  # see FrameStore.redraw
CAMERA_RANGES = {  # what `random_cameras` draws for each sequence, evenly between the two
    "heading": (-180, 180),  # degrees
    "tilt": (-5, 30),  # degrees; above 0 looks down
    "roll": (-5, 5),  # degrees
    "focal": (0.6, 1.6),  # over the longest side: fields of view of 80 to 35 degrees
    "shape": (-np.log(16 / 9), np.log(16 / 9)),  # ln(width / height): upright to lying 9:16
    "fill": (0.6, 1.0),  # the part of the image, about its centre, that holds every joint
    "aside": (-0.25, 0.25),  # where in it the root's mean position is: 0 its centre, 1 its edge
    "below": (-0.25, 0.25)}
LONGEST_SIDE = 1000  # pixels
OUTLIERS, OUTLIER_SCALE = 0.02, 10.0  # fraction of the joints, times the noise
GAP = 10  # frames, the mean


def upright(s):
    """The joints (T, J, 3) of a Sequence in metres, z up, about the root's mean position."""
    if s.extrinsics is None:
        raise InputError(f"{s.subject} {s.action}: no random cameras here; --cameras recorded")
    points = s.pose_3d + s.root[:, None].astype(np.float64)
    centre = camera_to_world(s.root.mean(0, np.float64), s.extrinsics)
    return camera_to_world(points, s.extrinsics) - centre


def random_cameras(world, sequence, count, generator):
    """World (N, J, 3), metres, z up, through one random camera for each of `count` sequences.

    sequence (N,): which one each frame is of. Returns camera-space joints (N, J, 3), intrinsics
    (count, 9) without distortion, sizes (count, 2) in whole pixels. CAMERA_RANGES says what is
    drawn; the distance, and with it the height, is the least that keeps every joint of every frame
    in the drawn part of the image and at least 1 m in front of the camera.
    """
    low, high = torch.tensor(list(CAMERA_RANGES.values()), dtype=torch.float64).T
    chance = torch.rand(count, len(low), generator=generator, dtype=torch.float64)
    drawn = low + (high - low) * chance
    heading, tilt, roll = drawn[:, :3].T.numpy()
    focal, shape, fill = drawn[:, 3:6, None].unbind(1)
    aim = drawn[:, 6:]

    axes = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # the world's right, down and forward
    rotation = _turns("Z", roll) @ _turns("X", tilt) @ axes @ _turns("Z", heading)
    rotation = torch.from_numpy(rotation).to(world)
    sizes = (LONGEST_SIDE * torch.cat((shape, -shape), 1).clamp(max=0).exp()).round()
    focal = LONGEST_SIDE * focal.expand(-1, 2)
    intrinsics = torch.cat((focal, sizes / 2, torch.zeros(count, 5)), 1).to(world)
    edge = fill * sizes / 2 / focal  # of that part of the image, as x / z and y / z, (count, 2)
    place = torch.cat((aim * edge, torch.ones(count, 1)), 1).to(world)  # the mean, at distance 1

    # no matrix product: tf32 would round it
    points = (world[..., None, :] * rotation[sequence, None]).sum(-1)
    xy, z = points[..., :2], points[..., 2:]
    edge, aim = edge.to(world)[sequence, None], place[sequence, None, :2]
    # |xy + distance aim| <= edge (z + distance) and 1 <= z + distance, solved for the distance
    right, left = (xy - edge * z) / (edge - aim), (-xy - edge * z) / (edge + aim)
    least = torch.cat((right, left, 1 - z), -1).amax((1, 2))
    distance = world.new_zeros(count).scatter_reduce(0, sequence, least, "amax")
    return points + (distance[:, None] * place)[sequence, None], intrinsics, sizes.long()


def detect(pose_2d, first, last, noise, missing, generator):
    """2D (N, J, 2) as a detector with gaps gives it, after interpolation.

    Gaussian noise of `noise` times the person's size (the longer side of the box around a frame's
    joints), ten times that for 2 % of the joints; then the fraction `missing` of all joints is lost
    in gaps of 1 to 19 frames, which may overlap, and filled linearly in time between the frames
    around a gap, held where a sequence ends in one. The first frame of a sequence is whole. first
    and last (N,) bound the sequences.
    """
    error = torch.randn(pose_2d.shape, generator=generator).to(pose_2d)
    gross, begins, length = torch.rand(3, *pose_2d.shape[:2], generator=generator).to(pose_2d)
    size = (pose_2d.amax(1, True) - pose_2d.amin(1, True)).amax(-1, True)  # (N, 1, 1)
    larger = torch.where(gross < OUTLIERS, OUTLIER_SCALE, 1.0)[..., None]
    pose_2d = pose_2d + noise * size * larger * error

    time = torch.arange(len(pose_2d), device=pose_2d.device)[:, None]
    over = time + 1 + (length * (2 * GAP - 1)).long()  # the frame after a gap that begins here
    begins = begins < -np.log1p(-missing) / GAP
    over = torch.where(begins, over, 0).cummax(0).values
    seen = (over <= time) | (time == first[:, None])
    before = torch.where(seen, time, 0).cummax(0).values
    after = torch.where(seen, time, len(time)).flip(0).cummin(0).values.flip(0)
    after = torch.where(after > last[:, None], before, after)

    weight = (time - before).to(pose_2d) / (after - before).clamp(min=1)
    start = pose_2d.gather(0, before[..., None].expand_as(pose_2d))
    end = pose_2d.gather(0, after[..., None].expand_as(pose_2d))
    return start.lerp(end, weight[..., None])


# --------------------------------------------------------------------------------------------------
# BVH motion capture

CHANNELS = {(axis + kind).upper(): (axis, kind)
            for axis, kind in product("XYZ", ("position", "rotation"))}


def _read_hierarchy(text, path):
    """(the joints of a BVH header, the text after its MOTION).

    A joint has a name, parent (-1: none), offset and channels, as CHANNELS' values.
    """
    joints, opened = [], []  # opened: the numbers of the joints that are not closed yet
    matches = re.finditer(r"[{}]|[^\s{}]+", text)
    words = (match[0] for match in matches)
    for match in matches:
        keyword, line = match[0].upper(), text.count("\n", 0, match.start()) + 1
        with described(f"{path}, line {line}: {match[0][:60]!r}", "not as in a BVH header"):
            if keyword in ("ROOT", "JOINT", "END"):
                name = " ".join(takewhile(lambda word: word != "{", words))
                parent = opened[-1] if opened else -1
                if keyword == "END":
                    name = joints[parent]["name"] + "_end"
                opened.append(len(joints))
                joints.append(dict(name=name, parent=parent, offset=np.zeros(3), channels=()))
            elif keyword == "OFFSET":
                joints[opened[-1]]["offset"] = [float(next(words)) for _ in range(3)]
            elif keyword == "CHANNELS":
                channels = [CHANNELS[next(words).upper()] for _ in range(int(next(words)))]
                joints[opened[-1]]["channels"] = channels
            elif keyword == "}":
                opened.pop()
            elif keyword == "MOTION" and joints and not opened:
                return joints, text[match.end():]
            elif keyword != "HIERARCHY":
                raise ValueError
    raise InputError(f"{path}: not a BVH file: no MOTION in it")


def _turns(axis, degrees):
    """Rotation matrices (T, 3, 3) about a coordinate axis."""
    angle = np.deg2rad(degrees)
    turn = np.tile(np.eye(3), (len(degrees), 1, 1))
    j, k = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}[axis]
    turn[:, j, j] = turn[:, k, k] = np.cos(angle)
    turn[:, k, j] = np.sin(angle)
    turn[:, j, k] = -turn[:, k, j]
    return turn


def _read_clip(path):
    """What `read_bvh` returns, and each joint's parent."""
    text = _existing(path, "name a BVH file").read_text("utf-8-sig", "replace")
    joints, motion = _read_hierarchy(text, path)
    with described(f"{path}: {motion[:60]!r}", "expected 'Frames:' and 'Frame Time:' above 0"):
        header = re.match(r"\s*Frames:\s*(\d+)\s+Frame\s+Time:\s*(\S+)", motion, re.I)
        frames, fps = int(header[1]), 1 / float(header[2])
        if not frames or not 0 < fps < math.inf:
            raise ValueError
    rows = [line.split() for line in motion[header.end():].splitlines() if line.strip()]
    if not frames <= len(rows) <= frames + 1:
        raise InputError(f"{path}: {len(rows)} frames, its header says {frames}: truncated?")
    if len(rows) > frames:  # some exporters write one more
        print(f"{path}: {len(rows)} frames where its header says {frames}: read without the last")
    columns = sum(len(joint["channels"]) for joint in joints)
    with described(f"{path}: not a number for each of {columns} channels", "export it again"):
        values = np.array(rows[:frames], np.float64).reshape(frames, columns)

    column = iter(values.T)
    positions = np.zeros((frames, len(joints) + 1, 3))  # the last is the world's origin
    turns = {-1: np.eye(3)}
    for j, joint in enumerate(joints):
        offset, turn = np.tile(joint["offset"], (frames, 1)), np.eye(3)
        for axis, kind in joint["channels"]:
            if kind == "position":
                offset[:, "XYZ".index(axis)] = next(column)
            else:
                turn = turn @ _turns(axis, next(column))
        parent = joint["parent"]
        positions[:, j] = positions[:, parent] + (turns[parent] @ offset[..., None])[..., 0]
        turns[j] = turns[parent] @ turn
    check_finite(positions, path)
    names, parents = zip(*((joint["name"], joint["parent"]) for joint in joints))
    return names, positions[:, :-1], fps, parents


def read_bvh(path):
    """A BVH file as (joint names, world positions (T, joints, 3) in file units, frames a second).

    Rotation channels apply in the order they are listed (R = R_first R_second R_third); position
    channels, on any joint, replace that joint's OFFSET; end sites are joints `<parent>_end`. One
    row more than `Frames:` counts is left out. Raises InputError for anything else.
    """
    return _read_clip(path)[:3]


# our joint: its names, the first that a file has, by Bandai-Namco, MotionBuilder (CMU, LAFAN1,
# Mixamo) and 3ds Max. A LeftShoulder is the collar where there is a LeftArm too.
BVH_NAMES = {ours: theirs for ours, *theirs in map(str.split, """\
    pelvis Hips
    spine Spine1 Chest2 Chest
    thorax Neck1 Neck
    neck Head
    left_hip UpperLeg_L LeftUpLeg LeftHip
    left_knee LowerLeg_L LeftLeg LeftKnee
    left_ankle Foot_L LeftFoot LeftAnkle
    left_shoulder UpperArm_L LeftArm LeftShoulder
    left_elbow LowerArm_L LeftForeArm LeftElbow
    left_wrist Hand_L LeftHand LeftWrist
    right_hip UpperLeg_R RightUpLeg RightHip
    right_knee LowerLeg_R RightLeg RightKnee
    right_ankle Foot_R RightFoot RightAnkle
    right_shoulder UpperArm_R RightArm RightShoulder
    right_elbow LowerArm_R RightForeArm RightElbow
    right_wrist Hand_R RightHand RightWrist""".splitlines())}
LEG_LENGTH = 0.9  # metres, where no scale is given
SHORTEST_BONE = 1e-3  # as a fraction of the leg
LYING = 0.4  # the head of who lies is no higher above the ankles, as a fraction of the leg
OPEN_BENCHMARK = (174, 24286, 7628)  # clips, training and test frames
MADE_BY = "poselift"  # `made_by` marks files of this project: never taken for a published dataset


def _seventeen_joints(joints, positions, parents, mapping, path):
    """The 17 Human3.6M joints (T, 17, 3) of a BVH file's joints, in file units.

    The head is the head's end site (HeadTop_End, Head_end). Where there is none, where it is the
    Head itself, and in Bandai-Namco's files, whose end sites mean nothing, it is 2 Head - Neck: as
    far above the neck/nose as that is above the thorax. InputError where there are several
    skeletons: another joint beside the top one or the Hips, or two of a name looked for.
    """
    known = {*mapping.values()}.union(*BVH_NAMES.values())
    bare = [name.rpartition(":")[2] for name in joints]  # mixamorig:Hips
    at = {name: j for names in (joints, bare) for j, name in enumerate(names)}
    beside = parents[at.get("Hips", 0)]
    found = [name for name, parent in zip(joints, parents) if parent == beside]
    found += [name for names in (joints, bare) for name in sorted(known) if names.count(name) > 1]
    if len(found) != 1:
        raise InputError(f"{path}: several skeletons ({', '.join(found[:9])}); export one alone")

    ends = () if "UpperLeg_L" in at else ("HeadTop_End", "Head_end")
    names = BVH_NAMES | {ours: (theirs,) for ours, theirs in mapping.items()}
    names.setdefault("head", (*ends, *names["neck"]))
    skeleton = SKELETONS["h36m17"]
    places = {ours: [at[name] for name in names[ours] if name in at] for ours in skeleton.joints}
    if lacking := [f"{ours} ({', '.join(names[ours])})" for ours in places if not places[ours]]:
        found = f"no {', '.join(lacking)} among {', '.join(at)}"
        raise InputError(f"{path}: {found}; name others by --map FILE.json")
    pose = positions.take([here[0] for here in places.values()], 1)  # (T, 17, 3)

    thorax, neck, head = pose[:, 8:11].swapaxes(0, 1)
    above = neck - thorax
    if (_length(head - neck) <= SHORTEST_BONE * _length(above)).any():
        pose[:, 10] = neck + above
    for a, b in (*skeleton.edges, *zip(skeleton.left, skeleton.right)):
        length = _length(pose[:, a] - pose[:, b])
        if (length <= SHORTEST_BONE * _leg_length(pose)).any():
            found = f"{skeleton.joints[a]} to {skeleton.joints[b]}, frame {length.argmin()}"
            raise InputError(f"{path}: no length from {found}; name others by --map FILE.json")
    return pose


def _length(vectors):
    return np.linalg.norm(vectors, axis=-1)


def _leg_length(pose):
    """Thigh and shank at the first frame of (T, 17, 3), the mean of right and left."""
    return _length(np.diff(pose[0, [[1, 2, 3], [4, 5, 6]]], axis=1)).sum(1).mean()


def _clip_name(path):
    """(subject, action) of a clip, from its file name, or its folder and file name."""
    if bandai := re.fullmatch(r"dataset-\d+_(.+)_(.+)_(\d+)", path.stem):  # motion, style, take
        return "S" + bandai[2], f"{bandai[1]} {bandai[3]}"
    return path.parent.name, path.stem.replace(" ", "_")


def _world_poses(path, mapping, scale, up, fps, recorded_fps, skip):
    """(world poses (T, 17, 3) in metres, z up, within the capture volume; frames a second)."""
    joints, positions, rate, parents = _read_clip(path)
    if not 0 <= skip < len(positions):
        raise InputError(f"{path}: --skip {skip} does not fit its {len(positions)} frames")
    pose = _seventeen_joints(joints, positions[skip:], parents, mapping, path)
    if up == "y":
        pose = np.stack((pose[..., 0], -pose[..., 2], pose[..., 1]), -1)
    pose = pose * (LEG_LENGTH / _leg_length(pose) if scale is None else scale)
    if not 0.2 < _leg_length(pose) < 2:
        raise InputError(f"{path}: legs of {_leg_length(pose):.2g} m; give another --scale")
    rate = recorded_fps or rate
    if fps:  # linearly between frames
        count = int((len(pose) - 1) / rate * fps + 1e-3) + 1
        time, known = np.arange(count) * (rate / fps), np.arange(len(pose))
        pose = np.apply_along_axis(lambda x: np.interp(time, known, x), 0, pose)
    pelvis = pose[:, 0, :2]
    pose[..., :2] += (np.clip(pelvis - pelvis.mean(0), -1.5, 1.5) - pelvis)[:, None]  # metres
    return pose, fps or rate


def _check_up(paths, world, up):
    """InputError where most clips are of people who lie: the wrong axis. A warning of a few."""
    lying = []
    for path, pose in zip(paths, world):
        height = pose[:, 10, 2] - pose[:, [3, 6], 2].mean(1)  # the head's, above the ankles
        if (height < LYING * _leg_length(pose)).mean() > 0.6:
            lying.append(path.name)
    found = f"head not above the ankles in {len(lying)} of {len(paths)} clips: {lying[:9]}"
    if len(lying) > len(paths) / 2:
        raise InputError(f"{found}, read with --up {up}: give --up {'z' if up == 'y' else 'y'}")
    if lying:
        print(f"warning: {found}: people who lie or crawl?", file=sys.stderr)


def convert_bvh(folder, out="data", name="mocap", test="", mapping=None, scale=None, up="y",
                fps=None, recorded_fps=None, skip=0):
    """Every BVH clip under `folder` to `out`/data_3d_`name`.npz and data_2d_`name`_gt.npz.

    Clips in the order of their file names; those matching the pattern `test` are the test set.
    `mapping`: {our joint: its joint}. `scale`: metres a file unit; without it each clip so that
    (thigh + shank) at its first frame is 0.90 m. `up`: "y" or "z". `fps`: resample; `recorded_fps`:
    the rate where the file states a wrong one; `skip`: frames left out at the start. The pelvis's
    horizontal position, off its mean, is clamped to +- 1.5 m. Clip i is seen by the four Human3.6M
    cameras of subject i mod 7. Returns what to print. Raises InputError for whatever cannot be
    converted, with nothing written.
    """
    folder, out = Path(folder), Path(out)
    for option, value in (("scale", scale), ("fps", fps), ("recorded-fps", recorded_fps)):
        if value is not None and not 0 < value <= 1000:
            raise InputError(f"--{option} {value}: a number above 0 and up to 1000 expected")
    paths = [path for path in folder.rglob("[!.]*") if path.suffix.lower() == ".bvh"]  # no ._ files
    paths.sort(key=lambda path: (path.name, str(path)))
    names = [path.relative_to(folder).as_posix() for path in paths]
    with described(f"--test {test!r}", "a regular expression expected"):
        found = [bool(re.search(test, name)) for name in names]
    if len(set(found)) < 2:
        raise InputError(f"--test {test!r} fits {sum(found)} of {len(paths)} BVH files of {folder}")
    split = np.where(found, "test", "train")

    options = mapping or {}, scale, up, fps, recorded_fps, skip
    world, rates = zip(*(_world_poses(path, *options) for path in paths))
    _check_up(paths, world, up)
    rigs = [rig for _, rig in zip(paths, cycle(H36M_EXTRINSICS.values()))]
    image = []
    for path, pose, rig in zip(paths, world, rigs):
        views = [world_to_camera(pose, extrinsics) for extrinsics in rig]
        if not min(view[..., 2].min() for view in views) > 0.5:
            raise InputError(f"{path}: a joint less than 0.5 m before a camera; give the --scale")
        image.append([project(*view) for view in zip(views, H36M_INTRINSICS)])

    lengths = np.array([len(pose) for pose in world])
    subjects, actions = zip(*map(_clip_name, paths))
    train, held_out = lengths[split == "train"], lengths[split == "test"]
    source = f"{len(paths)} BVH clips of {folder.resolve().name}"
    counts = len(paths), train.sum(), held_out.sum()
    if counts == OPEN_BENCHMARK and not (mapping or scale or fps):
        source = "open mocap benchmark (Bandai-Namco-Research-Motiondataset-1)"
    both = dict(made_by=MADE_BY, clips=names, offsets=np.cumsum([0, *lengths]))
    path_2d, path_3d = out / f"data_2d_{name}_gt.npz", out / f"data_3d_{name}.npz"
    pixels, world = np.float32(np.concatenate(image, 1)), np.float32(np.concatenate(world))
    write_atomically(path_2d, partial(np.savez, **both, positions_2d=pixels))
    # the 3D last: without it the set is not there
    write_atomically(path_3d, partial(
        np.savez, **both, positions_3d=world, split=split, joints=SKELETONS["h36m17"].joints,
        subjects=subjects, actions=actions, source=source, fps=rates, cameras=H36M_CAMERAS,
        sizes=H36M_SIZES, intrinsics=H36M_INTRINSICS, extrinsics=rigs))
    return (f"{source}: training {len(train)} clips, {train.sum():,} frames, test {len(held_out)} "
            f"clips, {held_out.sum():,} frames, 4 cameras -> {path_3d}, {path_2d}")


def load_mocap(folder, name="mocap", keypoints="gt", split="train"):
    """The Sequences of a split that `python data.py bvh` wrote; one for each clip and camera."""
    remedy = REGISTER["mocap"]
    path_3d = Path(folder) / f"data_3d_{name}.npz"
    path_2d = Path(folder) / f"data_2d_{name}_{keypoints}.npz"
    space, image = read_npz(path_3d, remedy), read_npz(path_2d, remedy)
    sequences = []
    with described(f"{path_3d}, {path_2d}: not as this project writes them", remedy):
        bounds, clips = space["offsets"].tolist(), space["clips"].tolist()
        world, pixels = space["positions_3d"], image["positions_2d"]
        same = all(np.array_equal(space[key], image[key]) for key in ("clips", "offsets"))
        if not same or not pixels.shape[1] == len(world) == bounds[-1]:
            raise InputError(f"{path_2d}: its clips or frames are not those of {path_3d}")
        for i in np.flatnonzero(space["split"] == split):
            frames = slice(bounds[i], bounds[i + 1])
            points = check_poses(world[frames], f"{path_3d}: {clips[i]}", 3)
            for c, camera in enumerate(space["cameras"].tolist()):
                where = f"{path_2d}: {clips[i]} camera {camera}"
                extrinsics = space["extrinsics"][i, c]
                sequences.append(_sequence(
                    where, check_poses(pixels[c, frames], where, 2),
                    world_to_camera(points, extrinsics), space["intrinsics"][c],
                    subject=str(space["subjects"][i]), action=str(space["actions"][i]),
                    camera=camera, size=tuple(space["sizes"][c].tolist()),
                    fps=float(space["fps"][i]), source=str(space["source"]), extrinsics=extrinsics))
    return sequences


# --------------------------------------------------------------------------------------------------
# Synthetic motion: for the embedded default and the tests

# bone vectors (metres) of the standing body, x forward, y left, z up; the left mirrors the right
_BONES = np.zeros((17, 3))
_BONES[[1, 2, 3]] = (0, -0.13, 0), (0, 0, -0.45), (0, 0, -0.44)
_BONES[[7, 8, 9, 10]] = (0, 0, 0.24), (0, 0, 0.25), (0.04, 0, 0.11), (-0.02, 0, 0.115)
_BONES[[14, 15, 16]] = (0, -0.15, -0.02), (0, 0, -0.28), (0, 0, -0.25)
_BONES[[4, 5, 6, 11, 12, 13]] = _BONES[[1, 2, 3, 14, 15, 16]] * (1, -1, 1)
# degrees: (least, most) of bending forward, raising to the side, turning inwards; knees bend back
RANGES = {
    "pelvis": ((-15, 60), (-12, 12), (0, 0)),
    "spine": ((-20, 50), (-25, 25), (-35, 35)),
    "neck": ((-35, 40), (-20, 20), (-50, 50)),
    "hip": ((-25, 115), (-8, 45), (-25, 25)),
    "knee": ((-140, 0), (0, 0), (0, 0)),
    "shoulder": ((-45, 160), (-5, 120), (-60, 60)),
    "elbow": ((3, 145), (0, 0), (0, 0))}
# motion: (cycles a second, heading turns a second, moves). A move is {joint: (bend, swing, phase in
# cycles, raise, raising swing)} in degrees; a joint without a side moves both sides alike.
MOTIONS = {
    "walk": (0.95, 0.12, {"right_hip": (10, 20, 0), "right_knee": (-26, 20, .3),
        "left_hip": (10, 20, .5), "left_knee": (-26, 20, .8), "right_shoulder": (0, 20, .5),
        "left_shoulder": (0, 20, 1), "elbow": (24, 8, .2)}),
    "turn": (0.7, 0.35, {"right_hip": (12, 13, 0), "right_knee": (-20, 15, .3),
        "left_hip": (12, 13, .5), "left_knee": (-20, 15, .8), "shoulder": (12, 14, 0, 20, 14),
        "elbow": (40, 14, .3)}),
    "reach": (0.3, 0.03, {"right_shoulder": (64, 46, 0, 20, 14),
        "left_shoulder": (48, 42, .4, 16, 14), "elbow": (28, 21, .5), "spine": (8, 10, 0)}),
    "sit": (0.25, 0.02, {"hip": (70, 4, 0, 10, 4), "knee": (-70, 8, .5),
        "shoulder": (32, 20, .2, 10, 7), "elbow": (60, 28, .6), "spine": (10, 8, 0)}),
    "wave": (0.9, 0.03, {"right_shoulder": (48, 8, 0, 76, 10), "right_elbow": (64, 31, 0),
        "left_shoulder": (12, 8, .3), "left_elbow": (28, 14, .5)}),
    "squat": (0.35, 0.02, {"hip": (38, 31, 0, 11, 4), "knee": (-44, 36, .5),
        "shoulder": (40, 29, 0), "elbow": (20, 13, .5), "pelvis": (12, 10, 0)}),
    "bend": (0.3, 0.03, {"pelvis": (19, 18, 0), "spine": (14, 17, 0), "hip": (21, 18, 0),
        "knee": (-10, 7, .5), "shoulder": (44, 31, .1, 10, 6), "elbow": (16, 10, .5)}),
    "phone": (0.4, 0.06, {"right_shoulder": (34, 10, 0, 32, 8), "right_elbow": (102, 8, .2),
        "neck": (8, 8, .1), "left_shoulder": (14, 15, .3, 12, 8), "left_elbow": (48, 28, .6)}),
    "kick": (0.6, 0.08, {"right_hip": (26, 34, 0), "right_knee": (-30, 25, .2),
        "left_knee": (-11, 6, .5), "shoulder": (4, 21, .5, 28, 10), "elbow": (32, 14, .2)}),
    "spread": (0.5, 0.05, {"shoulder": (16, 11, .2, 50, 36), "hip": (6, 4, 0, 14, 10),
        "knee": (-11, 7, .5), "elbow": (16, 10, .4)})}


def _drift(rng, frames, fps, shape, slowest=6.0):
    """Smooth random signals (frames, *shape) of unit variance: four sinusoids each, of periods
    from 1.2 to `slowest` seconds."""
    period = rng.uniform(1.2, slowest, (4, *shape))
    phase = rng.uniform(0, 2 * np.pi, (4, *shape))
    time = np.arange(frames).reshape(-1, 1, *[1] * len(shape)) / fps
    return np.sin(2 * np.pi * time / period + phase).sum(1) / np.sqrt(2)


def _motion(rng, kind, frames, fps, bones, manner):
    """World positions (frames, 17, 3) of a performance, z up, feet on the floor.

    bones (17, 3) in metres and manner (17, 3) in degrees are a subject's.
    """
    skeleton = SKELETONS["h36m17"]
    pace, turning, moves = MOTIONS[kind]
    pace = pace * rng.uniform(0.8, 1.2)
    time = np.arange(frames) / fps
    phase = 2 * np.pi * (pace * time + rng.uniform()) + 0.5 * _drift(rng, frames, fps, ())
    size = rng.uniform(0.75, 1.25, 17)

    turns = [np.eye(3)] * 17
    for j, joint in enumerate(skeleton.joints):
        side, _, part = joint.rpartition("_")
        if part not in RANGES:
            continue
        move = moves.get(joint) or moves.get(part) or (0, 0, 0)
        bend, swing, shift, up, lift = (*move, 0, 0)[:5]
        cycle = np.sin(phase - 2 * np.pi * shift)
        angle = np.array((bend, up, 0)) + size[j] * np.array((swing, lift, 0)) * cycle[:, None]
        angle += manner[j] + rng.uniform(-5, 5, 3) + 3 * _drift(rng, frames, fps, (3,))
        low, high = np.array(RANGES[part], float).T
        middle, half = (low + high) / 2, np.maximum((high - low) / 2, 1e-9)
        angle = middle + half * np.tanh((angle - middle) / half)  # softly inside the joint's range
        outwards = -1 if side == "right" else 1
        # a limb hangs: bending forward turns it the other way
        trunk = 1 if part in ("pelvis", "spine", "neck") else -1
        turns[j] = (_turns("Z", -outwards * angle[:, 2]) @ _turns("X", outwards * angle[:, 1])
                    @ _turns("Y", trunk * angle[:, 0]))

    way = rng.choice((-1, 1))
    heading = 360 * (rng.uniform() + way * turning * time) + 20 * _drift(rng, frames, fps, ())
    turns[0] = _turns("Z", heading) @ turns[0]
    pose = np.zeros((frames, 17, 3))
    for parent, j in skeleton.edges:
        pose[:, j] = pose[:, parent] + turns[parent] @ bones[j]
        turns[j] = turns[parent] @ turns[j]

    feet = pose[:, [3, 6], 2]
    floor = -np.log(np.exp(-feet / 0.03).sum(1)) * 0.03  # a smooth minimum
    place = 0.4 * _drift(rng, frames, fps, (2,), 12.0)
    if kind == "walk":  # on a circle of about 0.9 m, facing along it
        angle = np.deg2rad(heading - way * 90)
        place = 0.3 * place + 0.9 * np.stack((np.cos(angle), np.sin(angle)), -1)
    return pose + np.concatenate((place, 0.08 - floor[:, None]), -1)[:, None]


def synthesize(seed, subjects=tuple(H36M_EXTRINSICS), motions=tuple(MOTIONS), takes=1, frames=150,
               fps=25.0):
    """Procedural motion as Sequences: `takes` of each motion by each subject, in four cameras.

    The cameras are Human3.6M's. Bone lengths vary by subject, angles stay within each joint's
    range, motion is smooth in time and a function of `seed` alone. `subjects`: names (those of
    Human3.6M bring their own cameras) or a number of them. With the defaults 42,000 samples, made
    in a few seconds.
    """
    if isinstance(subjects, int):
        subjects = [f"S{i + 1}" for i in range(subjects)]
    rigs, mirror = list(H36M_EXTRINSICS.values()), SKELETONS["h36m17"].mirror
    source, sequences = f"synthetic motion (seed {seed})", []
    for number, subject in enumerate(subjects):
        rng = np.random.default_rng((seed, number))
        stretch = rng.uniform(0.94, 1.06) * rng.uniform(0.96, 1.04, 17)
        bones = _BONES * ((stretch + stretch[mirror]) / 2)[:, None]
        manner = rng.uniform(-5, 5, (17, 3))
        rig = H36M_EXTRINSICS.get(subject, rigs[number % len(rigs)])
        for kind, take in product(motions, range(takes)):
            world = _motion(rng, kind, frames, fps, bones, manner)
            for c, camera in enumerate(H36M_CAMERAS):
                points = world_to_camera(world, rig[c])
                sequences.append(_sequence(
                    source, project(points, H36M_INTRINSICS[c]), points, H36M_INTRINSICS[c],
                    subject=subject, action=f"{kind} {take + 1}", camera=camera, source=source,
                    size=H36M_SIZES[c], fps=float(fps), extrinsics=rig[c]))
    return sequences


# --------------------------------------------------------------------------------------------------
# Published datasets, in the files that the community keeps them in

SPLITS = {"train": ("S1", "S5", "S6", "S7", "S8"), "test": ("S9", "S11")}  # Human3.6M's protocol
HUMANEVA_ACTIONS = ("Walk", "Jog")  # of GLA-GCN's paper
# frames over the four cameras: without S11 Directions, on detected 2D also without twelve of S9
H36M_FRAMES = {"train": (1_559_752,), "test": (543_344, 524_892)}
MPI3DHP_VALID = {"TS1": 603, "TS2": 540, "TS3": 505, "TS4": 553, "TS5": 276, "TS6": 452}
# left out by the published rows: of S11 always, of S9 with GridConv's detected 2D, which drifts
SKIPPED = {("S11", "Directions")}
SKIPPED_DETECTED = {("S9", "Waiting 1"), ("S9", "SittingDown 1"), ("S9", "Greeting")}
# the skeletons that a recipe may ask of its `data`
DATASETS = {
    "h36m": ("h36m17", "h36m32"), "gridconv": ("h36m17",), "humaneva": ("humaneva15",),
    "3dhp": ("3dhp17", "h36m17"), "mocap": ("h36m17",), "synthetic": ("h36m17",)}
HUMAN36M = "Human3.6M"
TITLE = {"h36m": HUMAN36M, "humaneva": "HumanEva-I", "3dhp": "MPI-INF-3DHP",
         "mocap": "motion capture"}
LAYOUT = {data: f"files in {title} layout" for data, title in TITLE.items()}
# what `provenance` calls a recipe's `data` where it is what the papers measured on. No frame counts
# of HumanEva-I are published: its files are taken at their word.
GENUINE = {"h36m": HUMAN36M, "gridconv": HUMAN36M, "humaneva": LAYOUT["humaneva"],
           "3dhp": "MPI-INF-3DHP test set"}
SETS = {  # (data, keypoints): the rows that it allows to reproduce
    ("h36m", "gt"): "GridConv's P1* rows (Tables 2, 4, 5; 6 in 17 joints, and in 32 where the 3D "
                    "has them), GLA-GCN's gt rows (Tables 1, 4, 5)",
    ("h36m", "hrnet"): "GridConv's P1 / P2 rows (Tables 1, 2, 5, A)",
    ("h36m", "cpn_ft_h36m_dbb"): "GLA-GCN's CPN rows (Tables 1, 4)",
    ("humaneva", "gt"): "GLA-GCN's gt row (Table 2)",
    ("humaneva", "detectron_pt_coco"): "GLA-GCN's MRCNN row (Table 2)",
    ("3dhp", "gt"): "GLA-GCN's rows (Table 3), by its test set alone GridConv's cross-dataset row",
    ("mocap", "gt"): "the rows named mocap"}
REGISTER = {  # where a dataset, or its detected 2D, comes from
    "h36m": "register at vision.imar.ro/human3.6m; prepare it as VideoPose3D does",
    "hrnet": "fetch h36m.zip, see the GridConv release",
    "cpn_ft_h36m_dbb": "fetch it, see VideoPose3D's DATASETS.md",
    "humaneva": "register at humaneva.is.tue.mpg.de; prepare it as VideoPose3D does",
    "3dhp": "register at vcai.mpi-inf.mpg.de/3dhp-dataset; prepare it as P-STMO does",
    "mocap": "python data.py bvh FOLDER --test REGEX makes it"}


def provenance(sequences):
    """The honest name of what a figure is measured on.

    "Human3.6M" only for a whole training or test set with the published number of frames, in files
    that this project did not make; "MPI-INF-3DHP test set" by its valid frames; anything else is
    named for the files that it is.
    """
    sources = " and ".join(sorted({s.source for s in sequences}))
    if sources == LAYOUT["h36m"]:
        train, test = (sum(len(s.pose_3d) for s in sequences if s.subject in subjects)
                       for subjects in SPLITS.values())
        whole = train in (0, *H36M_FRAMES["train"]) and test in (0, *H36M_FRAMES["test"])
        if whole and train + test:
            return HUMAN36M
        return f"{sources} (not Human3.6M: {train + test:,} frames)"
    valid = {s.subject: int(s.valid.sum()) for s in sequences if s.valid is not None}
    if sources == LAYOUT["3dhp"] and valid == MPI3DHP_VALID:
        return GENUINE["3dhp"]
    return sources


def _nested(path, key, data):
    """(the dictionary that `key` of an npz holds, the source of its Sequences)."""
    archive = read_npz(path, REGISTER[data])
    with described(f"{path}: no dictionary under {key!r}", REGISTER[data]):
        value = dict(archive[key].item())
    if data == "h36m" and "'layout_name': 'coco'" in str(archive.get("metadata")):
        raise InputError(f"{path}: COCO's joints, not Human3.6M's; {REGISTER[data]}")
    made_here = str(archive.get("made_by")) == MADE_BY
    return value, LAYOUT[data] + (", made by this project" if made_here else "")


def _videopose3d(folder, data, name, keypoints, subjects, cameras):
    """A dataset in VideoPose3D's layout, view by view.

    Yields camera number, world (T, J, 3), 2D (T, J', 2) or None where it is to be projected, where
    it is from, and the fields of a Sequence that say what it is.
    """
    path_3d = Path(folder) / f"data_3d_{name}.npz"
    path_2d = Path(folder) / f"data_2d_{name}_{keypoints}.npz"
    space, source = _nested(path_3d, "positions_3d", data)
    image = None
    if path_2d.exists() or keypoints != "gt" or data != "h36m":
        image, _ = _nested(path_2d, "positions_2d", data)
    for subject in subjects:
        actions = space.get(subject)
        if not isinstance(actions, dict) or not actions:
            raise InputError(f"{path_3d}: no actions of {subject}; {REGISTER[data]}")
        for action, world in actions.items():
            world = check_poses(world, f"{path_3d}: {subject} {action}", 3)
            for c, camera in enumerate(cameras):
                where, pixels = f"{path_2d}: {subject} {action} camera {camera}", None
                if image is not None:
                    with described(f"{where}: no 2D of {len(cameras)} cameras", REGISTER[data]):
                        pixels = check_poses(image[subject][action][c], where, 2)[:len(world)]
                fields = dict(subject=subject, action=str(action), camera=camera, source=source)
                yield c, world, pixels, where, fields


def load_h36m(folder, keypoints="gt", subjects=SPLITS["train"], joints=17):
    """Human3.6M in VideoPose3D's layout: data_3d_h36m.npz and data_2d_h36m_<keypoints>.npz.

    With 17 or 32 joints. Without a file for `gt`, and for 32 joints where it has 17, the 2D is
    projected from the 3D through the cameras, as VideoPose3D's preparation does. Raises InputError
    for missing files, subjects or views, 2D that does not fit, NaN.
    """
    views = _videopose3d(folder, "h36m", "h36m", keypoints, subjects, H36M_CAMERAS)
    sequences = []
    for c, world, pixels, where, fields in views:
        extrinsics, intrinsics = H36M_EXTRINSICS[fields["subject"]][c], H36M_INTRINSICS[c]
        points = world_to_camera(world, extrinsics)
        if pixels is None or keypoints == "gt" and pixels.shape[1] < joints:
            pixels = project(points, intrinsics)
        points, pixels = (pose[:, H36M_17_OF_32] if pose.shape[1] == 32 > joints else pose
                          for pose in (points, pixels))
        sequences.append(_sequence(
            where, pixels, points, intrinsics, size=H36M_SIZES[c], fps=50.0,
            extrinsics=extrinsics, **fields))
    return sequences


def _archives(folder, keypoints):
    """GridConv's archives, training and 2D first: in <keypoints>, h36m/<keypoints> or `folder`."""
    folder = Path(folder)
    for place in (folder / keypoints, folder / "h36m" / keypoints, folder):
        paths = [place / f"{split}_custom_{kind}_unnorm.pth.tar"
                 for split in SPLITS for kind in ("2d", "3d")]
        if any(path.exists() for path in paths):
            break
    return paths


def load_gridconv(folder, split="train", keypoints="gt"):
    """Human3.6M in the archives of GridConv's release, where `_archives` looks for them.

    Two dictionaries of (subject, action, sequence.camera): 2D (T, 34) pixels; 3D with `pelvis`
    (T, 3) and `joint_3d` or `joints_3d` (T, 51) in mm, and `camera`, a dictionary or the list of
    fx, fy, cx, cy.
    """
    archives, remedy = _archives(folder, keypoints), REGISTER["hrnet"]
    path_2d, path_3d = [path for path in archives if path.name.startswith(split)]
    image, space = read_torch(path_2d, remedy), read_torch(path_3d, remedy)
    sequences = []
    with described(f"{path_2d}, {path_3d}: not GridConv's archives of the same clips", remedy):
        if image.keys() != space.keys():
            raise ValueError
        for key, entry in space.items():
            subject, (action, _, camera) = key[0], key[2].rpartition(".")
            joints = np.asarray(entry["joint_3d" if "joint_3d" in entry else "joints_3d"])
            points = joints.reshape(-1, 17, 3) + np.asarray(entry["pelvis"])[:, None]
            pinhole = entry["camera"]
            if isinstance(pinhole, dict):
                pinhole = np.stack([pinhole[name] for name in ("fx", "fy", "cx", "cy")], -1)
            fx, fy, cx, cy = np.atleast_2d(pinhole)[0].astype(float)
            where = f"{subject} {action} camera {camera}"
            points = check_poses(points / 1000, f"{path_3d}: {where}", 3)  # metres
            pixels = np.asarray(image[key]).reshape(-1, 17, 2)
            sequences.append(_sequence(
                where, check_poses(pixels, f"{path_2d}: {where}", 2), points,
                (fx, fy, cx, cy, 0, 0, 0, 0, 0), subject=subject, action=action, camera=camera,
                size=H36M_SIZES[H36M_CAMERAS.index(camera)], fps=50.0, source=LAYOUT["h36m"]))
    return sequences


def load_humaneva(folder, keypoints="gt", subjects=("Train/S1", "Train/S2", "Train/S3"),
                  actions=HUMANEVA_ACTIONS):
    """HumanEva-I in VideoPose3D's layout, 15 joints: every chunk that begins with one of `actions`.

    `detectron_pt_coco` keypoints (COCO-17) are mapped to the 15 joints as GLA-GCN does: mid hips,
    mid shoulders, the limbs, and the nose as the head. The cameras' intrinsics are unknown (NaN).
    """
    views = _videopose3d(folder, "humaneva", "humaneva15", keypoints, subjects, HUMANEVA_CAMERAS)
    sequences = []
    for c, world, pixels, where, fields in views:
        if not fields["action"].startswith(tuple(actions)):
            continue
        if pixels.shape[1] == 17:
            pixels = pixels[:, HUMANEVA_OF_COCO].mean(2)
        points = world_to_camera(world, HUMANEVA_EXTRINSICS[fields["subject"][-2:]][c])
        sequences.append(_sequence(
            where, pixels, points, UNKNOWN_INTRINSICS, size=(640, 480), fps=60.0, **fields))
    return sequences


def load_3dhp(folder, split="train", skeleton="3dhp17"):
    """MPI-INF-3DHP in P-STMO's layout, 17 joints in its own order, or in h36m17's.

    Test frames that do not count: `valid`.
    """
    path, remedy = Path(folder) / f"data_{split}_3dhp.npz", REGISTER["3dhp"]
    recordings, source = _nested(path, "data", "3dhp")
    root, sequences = SKELETONS[skeleton].root, []
    order = H36M_17_OF_3DHP if skeleton == "h36m17" else slice(None)
    for name, recording in recordings.items():
        with described(f"{path}: {name}: not in P-STMO's layout", remedy):
            subject, _, action = name.partition(" ")
            size = (1920, 1080) if subject in ("TS5", "TS6") else (2048, 2048)
            views, fps = ({"0": recording}, math.nan) if split == "test" else recording
            next(iter(views))  # at least one camera
            for camera, view in views.items():
                where, valid = f"{path}: {name} camera {camera}", None
                points = check_poses(np.asarray(view["data_3d"]) / 1000, where, 3)
                pixels = check_poses(view["data_2d"], where, 2)
                if split == "test":
                    valid = np.asarray(view["valid"]).reshape(-1) == 1
                    if len(valid) != len(points) or not valid.any():
                        flags = f"{valid.sum()} of {len(valid)} flags"
                        raise InputError(f"{where}: {flags}, {len(points)} frames")
                sequences.append(_sequence(
                    where, pixels[:, order], points[:, order], UNKNOWN_INTRINSICS, root,
                    subject=subject, action=action or subject, camera=str(camera), size=size,
                    fps=float(fps), source=source, valid=valid))
    return sequences


def load_dataset(recipe, folder, split):
    """The Sequences of `split` ("train" or "test") for a recipe.

    It reads the recipe's `data`, `keypoints`, `skeleton`, `skip` and `actions`. The protocols:
    Human3.6M trains on S1 S5 S6 S7 S8, tests on S9 S11 and leaves out S11's sequence named exactly
    `Directions`, with skip = "gridconv" and detected 2D also 12 of S9; HumanEva-I trains on Train/
    and tests on Validate/ S1 to S3; 3DHP comes in Human3.6M's joint order where the recipe's
    skeleton is h36m17. Raises InputError for joints that are not the skeleton's.
    """
    data, keypoints, skeleton = recipe.data, recipe.keypoints, SKELETONS[recipe.skeleton]
    if data == "synthetic":
        sequences = [s for s in synthesize(0) if s.subject in SPLITS[split]]
    elif data == "mocap":
        sequences = load_mocap(folder, "mocap", keypoints, split)
    elif data == "humaneva":
        part = {"train": "Train", "test": "Validate"}[split]
        subjects = [f"{part}/S{i}" for i in (1, 2, 3)]
        sequences = load_humaneva(folder, keypoints, subjects, recipe.actions)
    elif data == "3dhp":
        sequences = load_3dhp(folder, split, recipe.skeleton)
    elif files_of(recipe, folder)[0].suffix == ".tar":
        sequences = load_gridconv(folder, split, keypoints)
    else:
        sequences = load_h36m(folder, keypoints, SPLITS[split], len(skeleton.joints))
    drifting = recipe.skip == "gridconv" and keypoints != "gt"
    skipped = SKIPPED | SKIPPED_DETECTED if drifting else SKIPPED
    kept = [s for s in sequences if (s.subject, s.action) not in skipped]
    _check_joints(kept, skeleton, f"{folder}, {split}, less what is always left out")
    return kept


def make_store(recipe, folder, split, device="cpu"):
    """The recipe's frames of a split ("train" or "test") on the device: the one place that opens
    a recipe's data. The test split is seen through its own random cameras.

    InputError for unknown data, and where its joints are not the recipe's.
    """
    if recipe.skeleton not in DATASETS.get(recipe.data, ()) or split not in SPLITS:
        raise InputError(f"no {split} set of {recipe.skeleton} of {recipe.data}; known: {DATASETS}")
    if recipe.cameras == "random" and recipe.keypoints != "gt":
        raise InputError(f"{recipe.keypoints} 2D: not by random cameras; --cameras recorded")
    sequences = load_dataset(recipe, folder, split)
    sizes = {(0, 0)} if recipe.cameras == "random" else {s.size for s in sequences}  # (0, 0): any
    return FrameStore(
        sequences, fitting_rule(recipe.normalise, sizes), SKELETONS[recipe.skeleton], device,
        recipe.target, recipe.cameras, recipe.noise, recipe.missing, recipe.swap_sides,
        draw=TEST_DRAW if split == "test" else 0)


def files_of(recipe, folder):
    """The paths that a recipe's data is read from, the training set's first; there or not.

    Human3.6M comes from GridConv's archives (<keypoints>/ or h36m/<keypoints>/) where they are and
    VideoPose3D's files are not.
    """
    data, folder, keypoints = recipe.data, Path(folder), recipe.keypoints
    archives = _archives(folder, keypoints)
    if data in ("synthetic", "gridconv"):
        return archives if data == "gridconv" else []
    name = "humaneva15" if data == "humaneva" else data
    names = f"data_3d_{name}.npz", f"data_2d_{name}_{keypoints}.npz"
    if data == "3dhp":
        names = "data_train_3dhp.npz", "data_test_3dhp.npz"
    if data == "h36m" and keypoints == "gt" and not (folder / names[1]).exists():  # projected then
        names = names[:1]
    paths = [folder / name for name in names]
    serve = recipe.skeleton == "h36m17" and archives[0].parent != folder
    if data == "h36m" and serve and not all(path.exists() for path in paths):
        return archives
    return paths


def missing_files(recipe, folder):
    """The names of the files that a recipe needs and `folder` lacks.

    A recipe that evaluates another's weights needs the test set's alone.
    """
    first = -1 if recipe.weights else 0
    return [path.name for path in files_of(recipe, folder)[first:] if not path.exists()]


def check_folder(folder):
    """Prints what a folder holds, what that allows to reproduce, what is missing and where it
    comes from. InputError at the end where a set cannot be used."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    unusable = False
    for (data, keypoints), rows in SETS.items():
        recipe = SimpleNamespace(data=data, keypoints=keypoints, skeleton=DATASETS[data][0],
                                 skip="", actions=HUMANEVA_ACTIONS, weights="")
        can, found = "allows", []
        if missing := missing_files(recipe, folder):
            can = "not here; it would allow"
            found = [f"missing: {', '.join(missing)}; {REGISTER.get(keypoints, REGISTER[data])}"]
        for split in () if missing else SPLITS:
            try:
                part = load_dataset(recipe, folder, split)
                frames = f"{sum(len(s.pose_3d) for s in part):,} frames"
                found.append(f"{split}: {len(part)} sequences, {frames}; {provenance(part)}")
            except InputError as error:
                can, unusable = "cannot be used; it would allow", True
                found.append(f"{split}: cannot be used: {error}")
        print(f"{TITLE[data]}, 2D {keypoints}: {can} {rows}", *found, sep="\n    ")
    if unusable:
        raise InputError(f"{folder}: not all can be used; see above")


# --------------------------------------------------------------------------------------------------
# The command line

def main(argv=None):
    """The command line: `bvh` and `check`."""
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("bvh", help="BVH clips to training pairs").add_argument
    add("folder")
    add("--out", default="data", help="folder for the two files (data)")
    add("--name", default="mocap", help="of the set (mocap)")
    add("--test", required=True, help="regular expression: matching clips are the test set")
    add("--map", dest="mapping", help="JSON file {our joint: its joint}")
    add("--scale", type=float, help="metres a file unit (legs of 0.90 m)")
    add("--up", default="y", choices=("y", "z"), help="the file's upward axis (y)")
    add("--fps", type=float, help="resample to this rate (as recorded)")
    add("--recorded-fps", type=float, help="the true rate, where the file states a wrong one")
    add("--skip", type=int, default=0, help="frames to leave out at the start, as a T-pose (0)")
    commands.add_parser("check", help="what a data folder holds").add_argument("folder")
    options = vars(parser.parse_args(argv))
    if options.pop("command") == "check":
        return check_folder(**options)
    if path := options["mapping"]:
        options["mapping"] = mapping = read_json(path)
        ours = SKELETONS["h36m17"].joints
        with described(f"--map {path}", f"expected {{our joint: its joint}} of {ours}"):
            if mapping.keys() - {*ours} or {*map(type, mapping.values())} - {str}:
                raise ValueError
    print(convert_bvh(**options))


if __name__ == "__main__":
    run(main)
