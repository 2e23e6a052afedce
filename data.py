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
        raise InputError(f"{self.prog}: {message} (--help shows the options)")


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
    except MemoryError:
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
        named = re.search(r"GLOBAL \S{1,200}|TorchScript", str(error))  # torch's words, and ours
        if named:
            problem += f" ({named[0]} is refused: only numbers, text and arrays are read)"
        raise InputError(f"{problem}; {remedy}") from None


def write_atomically(path, write, previous=None):
    """`write(file)` into a temporary file beside `path`, then renamed: whole or not at all.

    What stood at `path` is renamed to `previous` before, where that is given. Raises InputError
    where the folder cannot be made or written; whatever stood at `path` then stands there still.
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
        # torch's writers end a full disk in an error of their own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        why = cause.strerror or cause
        raise InputError(f"{path}: cannot be written ({why}); choose another folder") from error
    finally:
        with suppress(OSError):  # renamed already, or never made
            temporary.unlink()


def _existing(path, remedy):
    """The path of a regular file: a pipe waits for its writer, a device never ends."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: not found; {remedy}")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read: not a regular file that you may read; {remedy}")
    return path


def _content(path, remedy):
    try:
        return _existing(path, remedy).read_bytes()
    except MemoryError:
        raise InputError(f"{path}: larger than the memory; name a smaller file") from None


def read_json(path, remedy="name a JSON file"):
    """What a JSON file holds, in UTF-8, 16 or 32; InputError where there is none, or other text."""
    content = _content(path, remedy)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}, line {line}: not JSON; write it again") from None


# --------------------------------------------------------------------------------------------------
# Restricted reading: NumPy's and torch's files may hold pickles, which could run any code.
# Names are resolved to the stand-ins below; every other name is refused.

class _StandIn:
    """What a pickle gets in place of a class or function. Its own state is not to be changed."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes what it may not")


class _DType(_StandIn):
    """A NumPy dtype of numbers, strings or objects. NumPy's own would believe any flags and
    fields, and with those read addresses from the file."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSUO":
            raise pickle.UnpicklingError("values of another type")

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
            raise pickle.UnpicklingError("an array that holds less or more than it claims")
        super().__setstate__((version, shape, kind.dtype, fortran, values))


class _Scalar(_StandIn):
    """A NumPy number."""

    def __new__(cls, kind, value):
        if isinstance(value, str):  # the bytes of Python 2
            value = value.encode("latin1")
        return np.frombuffer(value, kind.dtype)[0]


class _NoBytes(_StandIn):
    """Empty bytes; others are written by _codecs.encode."""

    def __new__(cls):
        return b""


class _Dict(_StandIn):
    """A plain dictionary in place of a defaultdict."""

    def __new__(cls, *_):
        return {}


class _Inert:
    """In place of an object that nobody needs: takes any arguments and state, does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass


READABLE = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,  # NumPy 1
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy._core.multiarray._reconstruct": _Array,  # NumPy 2
    "numpy._core.multiarray.scalar": _Scalar,
    "collections.defaultdict": _Dict,
    "collections.OrderedDict": dict,
    "_codecs.encode": codecs.encode,  # how Python 3 writes bytes with protocol 2
    "builtins.bytes": _NoBytes,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.set": set}
UNREADABLE = "cannot be read: damaged, cut short or of another format"
TORCH_LEGACY = 0x1950a86a20f9469cfc6c  # what torch.save's files before 1.6 begin with
# whole objects that stand in the releases' checkpoints beside the weights
INERT = ("torch.optim.adam.Adam", "numpy.random.__RandomState_ctor",
         "numpy.random.mtrand.RandomState", "numpy.random._pickle.__randomstate_ctor",
         "numpy.random._pickle.__bit_generator_ctor", "numpy.random._mt19937.MT19937")


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, restricted to READABLE."""

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins")  # Python 2
        if name not in READABLE:
            raise pickle.UnpicklingError(f"GLOBAL {name}")
        return READABLE[name]


def _unpickle(file):
    """The next object in a file of pickles; text of Python 2 is Latin-1.

    Its opcodes are looked through first: the unpickler makes room for whatever number of memorised
    objects, or length of bytes, a pickle names.
    """
    start = file.tell()
    for opcode, value, _ in pickletools.genops(file):
        if "PUT" in opcode.name and value > file.tell():
            raise pickle.UnpicklingError("more objects than bytes")
    file.seek(start)
    return _Unpickler(file, encoding="latin1").load()


def _check_zip(path):
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
            raise InputError(f"{path}: packed as NumPy and torch pack nothing; make it again")
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"{path}: {damaged!r} is damaged; fetch or make it again")


def _read_npy(file):
    """The array of an open npy file; objects in it are read by the restricted unpickler."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        array = _unpickle(file)
        if not isinstance(array, np.ndarray) or array.shape != shape:
            raise ValueError("not the array that its header describes")
    else:
        file.seek(0)
        array = np.load(file, allow_pickle=False)
    if file.read(1):
        raise ValueError("more values than its header says")
    return array


def read_npz(path, remedy="check the path"):
    """{key: array} of a NumPy archive, or of one .npy file, read without running code from it.

    Raises InputError where the file is missing, damaged (each member of an archive has a checksum,
    an .npy file has none), unpacks to more than `_check_zip` allows, or names another class.
    """
    path = _existing(path, remedy)
    with described(f"{path}: {UNREADABLE}", "fetch or make it again"):
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                return {path.stem: _read_npy(file)}
        _check_zip(path)
        arrays = {}
        with ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = _read_npy(file)
        return arrays


def read_torch(path, remedy="check the path", inert=False):
    """The object in a `torch.save` file, legacy or zip, on the CPU, without running code from it.

    `inert`: objects of the classes INERT (released checkpoints hold whole optimisers) are read as
    placeholders; every other unknown class is refused by name. Raises InputError like `read_npz`:
    zip files have checksums, which torch.load does not look at; legacy files have none.
    """
    path = _existing(path, remedy)
    allowed = [(stand_in, name) for name, stand_in in READABLE.items()]
    if inert:
        allowed += [(_Inert, name) for name in INERT]
    with described(f"{path}: {UNREADABLE}", "fetch or make it again"):
        if is_zipfile(path):
            _check_zip(path)
        else:
            content = _read_legacy_without_tensors(path)
            if content is not None:
                return content
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the encoding, for byte strings of Python 2
            return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")


def _read_legacy_without_tensors(path):
    """What a legacy torch.save file without tensors holds, or None for any other file.

    Such a file is five pickles: a number, the version, the machine, the object, an empty list.
    GridConv's archives are of this kind: by Python 2, whose long byte strings torch refuses.
    """
    with open(path, "rb") as file:
        try:
            number, _, _, content, storages = [_unpickle(file) for _ in range(5)]
        except Exception:  # tensors, or no such file at all: torch will say
            return None
    return content if number == TORCH_LEGACY and storages == [] else None


# --------------------------------------------------------------------------------------------------
# Skeletons

@dataclass(frozen=True)
class Skeleton:
    """Joint names, left_... and right_... in pairs, and each joint's parent (-1: the root)."""
    name: str
    joints: tuple
    parents: tuple

    @property
    def left(self):
        """The joints of the left side."""
        return tuple(j for j, name in enumerate(self.joints) if name.startswith("left_"))

    @property
    def right(self):
        """The joint that each of `left` mirrors."""
        return tuple(self.joints.index("right_" + self.joints[j][5:]) for j in self.left)

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


SKELETONS = {name: Skeleton(name, tuple(joints.split()), parents) for name, joints, parents in (
    ("h36m17", """
        pelvis right_hip right_knee right_ankle left_hip left_knee left_ankle spine thorax neck head
        left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist""",
        (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)),
    ("h36m32", """
        pelvis right_hip right_knee right_ankle right_toe right_toe_tip left_hip left_knee
        left_ankle left_toe left_toe_tip spine_base spine thorax neck head left_collar left_shoulder
        left_elbow left_wrist left_thumb left_thumb_tip left_hand left_hand_tip right_collar
        right_shoulder right_elbow right_wrist right_thumb right_thumb_tip right_hand
        right_hand_tip""",
        (-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 12, 16, 17, 18, 19, 20, 19, 22, 12,
         24, 25, 26, 27, 28, 27, 30)),
    ("humaneva15", """
        pelvis thorax left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist
        left_hip left_knee left_ankle right_hip right_knee right_ankle head""",
        (-1, 0, 1, 2, 3, 1, 5, 6, 0, 8, 9, 0, 11, 12, 1)),
    ("3dhp17", """
        head_top neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist
        right_hip right_knee right_ankle left_hip left_knee left_ankle pelvis spine
        head""",
        (16, 15, 1, 2, 3, 1, 5, 6, 14, 8, 9, 14, 11, 12, -1, 14, 1)),
    ("coco17", """
        nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow
        right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle
        right_ankle""",
        (-1, 0, 0, 1, 2, 0, 0, 5, 6, 7, 8, 5, 6, 11, 12, 13, 14)))}
H36M_17_OF_32 = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)
H36M_17_OF_3DHP = (14, 8, 9, 10, 11, 12, 13, 15, 1, 16, 0, 5, 6, 7, 2, 3, 4)  # neck: 3DHP's head


def flip(pose, skeleton):
    """The mirrored pose (..., J, 2|3), numpy or torch: x negated, left and right joints swapped."""
    if torch.is_tensor(pose):
        joints = pose.unbind(-2)  # no index goes to the device
        pose = torch.stack([joints[joint] for joint in skeleton.mirror], -2)
        return torch.cat((-pose[..., :1], pose[..., 1:]), -1)
    pose = pose[..., skeleton.mirror, :]
    return np.concatenate((-pose[..., :1], pose[..., 1:]), -1)


# --------------------------------------------------------------------------------------------------
# Cameras: the public calibration of Human3.6M and HumanEva-I

def _float32(values):
    """float64 values of figures that are float32, printed with as many digits as name one."""
    return np.array(values, np.float32).astype(np.float64)


H36M_CAMERAS = ("54138969", "55011271", "58860488", "60457274")
H36M_SIZES = ((1000, 1002), (1000, 1000), (1000, 1000), (1000, 1002))
H36M_FPS = 50.0
H36M_INTRINSICS = _float32((  # fx fy cx cy in pixels, radial k1 k2 k3, tangential p1 p2
    (1145.0494, 1143.7811, 512.5415, 515.4515,
     -0.20709892, 0.24777518, -0.0030751503, -0.0009756989, -0.0014244716),
    (1149.6757, 1147.5917, 508.84863, 508.0649,
     -0.19421363, 0.24040854, 0.0068199756, -0.0016190266, -0.0027408944),
    (1149.1407, 1148.799, 519.81586, 501.40265,
     -0.20833819, 0.255488, -0.0024604974, 0.001484387, -0.0007599993),
    (1145.5114, 1144.7739, 514.9682, 501.88202,
     -0.19838409, 0.21832368, -0.008947807, -0.0005872056, -0.001813362)))
# (4 cameras, 7): camera-to-world quaternion w x y z, the camera's position: mm here, kept in metres
MILLIMETRES = np.array((1, 1, 1, 1, 1000, 1000, 1000))
H36M_EXTRINSICS = {subject: _float32(rig) / MILLIMETRES for subject, rig in {
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
           (0.58942515, -0.7818877, 0.13991211, -0.14715362, -1590.738, -3854.169, 1578.0176))
}.items()}

HUMANEVA_CAMERAS = ("C1", "C2", "C3")
HUMANEVA_SIZE = (640, 480)
HUMANEVA_FPS = 60.0
HUMANEVA_EXTRINSICS = {subject: np.array(rig) / MILLIMETRES for subject, rig in {
    "S1": ((0.424207, -0.4983646, -0.5802981, 0.4847012, 4062.227, 663.2477, 1528.397),
           (0.6503354, -0.7481602, -0.0919284, 0.0941766, 844.8131, -3805.2092, 1504.9929),
           (0.0664734, -0.0690535, 0.7416416, -0.6639132, -797.67377, 3916.3174, 1433.6602)),
    "S2": ((0.4214752, -0.4961493, -0.5838273, 0.4851187, 4112.9121, 626.4929, 1545.2988),
           (0.6501393, -0.7476588, -0.0954617, 0.0959808, 923.574, -3877.9243, 1504.5518),
           (0.0699353, -0.0712403, 0.7421637, -0.662742, -781.4915, 3838.8853, 1444.9929)),
    "S3": ((0.424207, -0.4983646, -0.5802981, 0.4847012, 4062.2271, 663.2477, 1528.397),
           (0.6503354, -0.7481602, -0.0919284, 0.0941766, 844.8131, -3805.2092, 1504.9929),
           (0.0664734, -0.0690535, 0.7416416, -0.6639132, -797.6738, 3916.3174, 1433.6602))
}.items()}
UNKNOWN_INTRINSICS = np.full(9, np.nan)  # HumanEva-I's and 3DHP's are not in their files


def project(points, intrinsics):
    """Camera-space points (..., 3) to the image (..., 2), with Human3.6M's lens distortion.

    `intrinsics` (9,): fx fy cx cy k1 k2 k3 p1 p2; the result is in the units of fx, fy, cx, cy
    (pixels, or screen units). As in the field's preparation, X/Z and Y/Z are clamped to [-1, 1].
    """
    focal, centre, radial, tangential = np.split(np.asarray(intrinsics), (2, 4, 7))
    k1, k2, k3 = radial
    xy = np.clip(points[..., :2] / points[..., 2:], -1, 1)
    r2 = (xy ** 2).sum(-1, keepdims=True)
    distortion = 1 + r2 * (k1 + r2 * (k2 + r2 * k3)) + (tangential * xy).sum(-1, keepdims=True)
    return focal * (xy * distortion + tangential * r2) + centre


def _rotation(quaternion):
    """The matrix (3, 3) of a quaternion w x y z."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def world_to_camera(points, extrinsics):
    """R^T (X - t) for world points (..., 3).

    `extrinsics` (7,): camera-to-world quaternion w x y z, position t.
    """
    extrinsics = np.asarray(extrinsics, np.float64)
    return (points - extrinsics[4:]) @ _rotation(extrinsics[:4])


def camera_to_world(points, extrinsics):
    """R X + t for camera-space points (..., 3): the inverse of `world_to_camera`."""
    extrinsics = np.asarray(extrinsics, np.float64)
    return points @ _rotation(extrinsics[:4]).T + extrinsics[4:]


def _screen(size, rule):
    """(centre x, centre y, scale) of a rule: normalised = (pixels - centre) / scale."""
    width, height = float(size[0]), float(size[1])
    if rule == "release-500":
        return 500.0, 500.0, 500.0
    if rule == "width":
        return width / 2, height / 2, width / 2
    if rule == "longest":
        return width / 2, height / 2, max(width, height) / 2
    raise InputError(f"normalise: unknown rule {rule!r}; known: release-500, width, longest")


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
    if all(999 < side < 1003 for size in sizes for side in size):
        return rule
    return "longest" if rule == "release-500" else rule


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
    frames = finite.all(tuple(range(1, array.ndim)))
    if not frames.all():
        raise InputError(f"{where}, frame {int(np.argmin(frames))}: NaN or infinite in float32")


def check_poses(value, where, channels):
    """`value` as an array of finite numbers (frames, joints, one of `channels`), or InputError."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal length
        array = np.array(None)
    if array.size == 0:
        raise InputError(f"{where}: no frames or joints; remove it")
    if array.dtype.kind not in "fiu" or array.ndim != 3 or array.shape[2] not in channels:
        expected = f"numbers (frames, joints, {' or '.join(map(str, channels))})"
        raise InputError(f"{where}: shape {array.shape}, expected {expected}")
    check_finite(array, where)
    return array


def _sequence(where, pose_2d, points, intrinsics, root_joint=0, **fields):
    """A Sequence from checked 2D (T, J, 2) pixels and camera-space points (T, J, 3) metres."""
    if pose_2d.shape[:2] != points.shape[:2]:
        (found, found_joints), (frames, joints) = pose_2d.shape[:2], points.shape[:2]
        raise InputError(f"{where}: 2D has {found} frames, 3D has {frames}; "
                         f"2D has {found_joints} joints, 3D has {joints}")
    root = points[:, root_joint]
    return Sequence(
        pose_2d=pose_2d.astype(np.float32), pose_3d=(points - root[:, None]).astype(np.float32),
        root=root.astype(np.float32), intrinsics=np.asarray(intrinsics, np.float32), **fields)


class FrameStore:
    """Every frame of `sequences`, once, on `device`; batches are gathers, without a host copy.

    Attributes, N frames of S sequences: input (N, J, 2) normalised by `rule`; pose_3d (N, J, 3)
    metres; target (N, J, 3): pose_3d for target="camera"; for "uvd" the normalised pinhole
    projection u, v and the root-relative depth in metres (GridConv's rows marked with a section
    sign). sequence (N,) each frame's sequence, first and last (N,) the bounds of that sequence,
    root (N, 3), valid (N,) bool, intrinsics (S, 9), sizes (S, 2).
    cameras="random" (see `random_cameras`), `noise` and `missing` (see `detect`) are drawn anew by
    `redraw`. swap_sides exchanges the left and right joints of the input alone (GLA-GCN's Table 6,
    row 4).
    Raises InputError for an empty list, a wrong number of joints, an unknown rule or target, "uvd"
    without cameras, or random cameras without the recorded ones' extrinsics.
    """

    def __init__(self, sequences, rule, skeleton, device="cpu", target="camera",
                 cameras="recorded", noise=0.0, missing=0.0, swap_sides=False):
        if not sequences:
            raise InputError("frame store: no sequences; choose other subjects, actions or split")
        for s in sequences:
            if s.pose_2d.shape[1] != len(skeleton.joints):
                raise InputError(f"{s.subject} {s.action}: its joints are not {skeleton.name}'s")
        if target not in ("camera", "uvd"):
            raise InputError(f"frame store: unknown target {target!r}; known: camera, uvd")
        self.sequences, self.skeleton, self.rule = list(sequences), skeleton, rule
        self.noise, self.missing, self.swap_sides = noise, missing, swap_sides
        self.uvd = target == "uvd"

        lengths = torch.tensor([len(s.pose_2d) for s in sequences])
        ends = lengths.cumsum(0)
        self.sequence = torch.arange(len(sequences)).repeat_interleave(lengths).to(device)
        self.first = (ends - lengths).repeat_interleave(lengths).to(device)
        self.last = (ends - 1).repeat_interleave(lengths).to(device)
        valid = [np.ones(len(s.pose_2d), bool) if s.valid is None else s.valid for s in sequences]
        self.valid = torch.from_numpy(np.concatenate(valid)).to(device)

        self.input = _joined([normalise(s.pose_2d, s.size, rule) for s in sequences], device)
        self.pose_3d = _joined([s.pose_3d for s in sequences], device)
        self.root = _joined([s.root for s in sequences], device)
        self.intrinsics = _joined([s.intrinsics[None] for s in sequences], device)
        self._set_sizes([s.size for s in sequences])
        self._mirror = torch.tensor(skeleton.mirror, device=device)
        self._sign = torch.tensor([-1.0, 1.0, 1.0], device=device)

        self.target = self._to_uvd() if self.uvd else self.pose_3d
        self._clean, self._world = self.input, None
        if cameras == "random":
            self._world = _joined([upright(s) for s in sequences], device)
        if cameras == "random" or noise or missing:  # a figure measured on it is called so
            how = f", {cameras} cameras, noise {noise:g}, missing {missing:g}"
            self.sequences = [replace(s, source=s.source + how) for s in sequences]
        self.redraw()

    def __len__(self):
        return len(self.input)

    def redraw(self, draw=0):
        """Random cameras, noise and missing joints anew, where the store has them.

        They are a function of the number `draw` alone. Training takes an even number each epoch,
        tests TEST_DRAW, an odd one: no model is tested in training's views.
        """
        generator = torch.Generator().manual_seed(draw)  # on the CPU: the same on every device
        if self._world is not None:
            points, self.intrinsics, sizes = random_cameras(
                self._world, self.sequence, len(self.sequences), generator)
            self._set_sizes(sizes.tolist())
            self.root = points[:, self.skeleton.root]
            self.pose_3d = points - self.root[:, None]
            uvd = self._to_uvd()
            self._clean = uvd[..., :2].contiguous()
            self.target = uvd if self.uvd else self.pose_3d
        self.input = self._clean
        if self.noise or self.missing:
            self.input = detect(self._clean, self.first, self.last, self.noise, self.missing,
                                generator)
        if self.swap_sides:
            self.input = self.input.index_select(1, self._mirror)

    def _set_sizes(self, sizes):
        self.sizes = torch.tensor(sizes, device=self.input.device)
        screen = self.input.new_tensor([_screen(size, self.rule) for size in sizes])
        self._centre, self._scale = screen[:, :2], screen[:, 2:]

    def _view(self, index):
        """Each frame's focal length, optical centre, and normalisation, (n, 1, 1|2)."""
        sequence = self.sequence[index]
        intrinsics = self.intrinsics[sequence, None]
        centre, scale = self._centre[sequence, None], self._scale[sequence, None]
        return intrinsics[..., :2], intrinsics[..., 2:4], centre, scale

    def normalised_intrinsics(self, index):
        """The intrinsics (n, 9) of frames `index` in the units of `input`."""
        focal, optical, centre, scale = self._view(index)
        pinhole = torch.cat((focal / scale, (optical - centre) / scale), -1)[:, 0]
        return torch.cat((pinhole, self.intrinsics[self.sequence[index], 4:]), -1)

    def _to_uvd(self):
        for s in self.sequences:
            if not np.isfinite(s.intrinsics).all():
                raise InputError(f"{s.subject} {s.action}: uvd needs the camera's intrinsics")
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
        return self._mirrored(pose, flip), self._mirrored(target, flip)

    def _mirrored(self, pose, flip):
        flip = flip.view(-1, *[1] * (pose.ndim - 1))
        mirrored = pose.index_select(-2, self._mirror) * self._sign[:pose.shape[-1]]
        return torch.where(flip, mirrored, pose)


def _joined(arrays, device):
    return torch.from_numpy(np.concatenate(arrays)).to(device, torch.float32)


def _gather(frames, index):
    """frames[index]: index_select is the faster form, on every device."""
    found = frames.index_select(0, index.reshape(-1))
    return found.reshape(*index.shape, *frames.shape[1:])


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
NEAREST = 1.0  # metres
OUTLIERS, OUTLIER_SCALE = 0.02, 10.0  # fraction of the joints, times the noise
GAP = 10  # frames, the mean


def upright(s):
    """The joints (T, J, 3) of a Sequence in metres, z up, about the root's mean position."""
    if s.extrinsics is None:
        raise InputError(f"{s.subject} {s.action}: random cameras need mocap or h36m data")
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
    # |xy + distance aim| <= edge (z + distance), solved for the distance
    right, left = (xy - edge * z) / (edge - aim), (-xy - edge * z) / (edge + aim)
    least = torch.cat((right, left, NEAREST - z), -1).amax((1, 2))
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

@dataclass
class Joint:
    """A joint of a BVH file; parent -1: a ROOT. Channels are (axis, "rotation" or "position")."""
    name: str
    parent: int
    offset: tuple = (0.0, 0.0, 0.0)
    channels: tuple = ()


# several statements may share a line
_STATEMENTS = re.compile(r"(?=[{}])|(?<=[{}])|(?=\bOFFSET\b|\bCHANNELS\b)", re.I)


def _read_hierarchy(lines, path):
    """The joints of a BVH header; `lines` an iterator of (number, text), left after MOTION."""
    joints, opened = [], []
    for number, line in lines:
        for statement in _STATEMENTS.split(line):
            words = statement.split() or [""]
            if words[0].upper() == "MOTION" and joints and not opened:
                return joints
            try:
                _add_statement(words[0].upper(), words[1:], joints, opened)
            except (ValueError, IndexError):
                found = line.strip()[:60]
                raise InputError(f"{path}, line {number}: {found!r} is no BVH hierarchy") from None
    raise InputError(f"{path}: no MOTION after a complete HIERARCHY: not a BVH file, or truncated")


def _add_statement(word, rest, joints, opened):
    """One statement of a hierarchy, to `joints`; `opened`: the numbers of those still open."""
    if word in ("ROOT", "JOINT", "END"):
        parent = opened[-1] if opened else -1
        name = joints[parent].name + "_end" if word == "END" else " ".join(rest)
        opened.append(len(joints))
        joints.append(Joint(name, parent))
    elif word == "OFFSET":
        joints[opened[-1]].offset = np.array(rest[:3], float).reshape(3)
        check_finite(joints[opened[-1]].offset, word)
    elif word == "CHANNELS":
        channels = [re.fullmatch("([XYZ])(rotation|position)", name, re.I) for name in rest[1:]]
        if int(rest[0]) != len(channels) or None in channels:
            raise ValueError
        joints[opened[-1]].channels = [(name[1].upper(), name[2].lower()) for name in channels]
    elif word == "}":
        opened.pop()
    elif word not in ("", "{", "HIERARCHY"):
        raise ValueError


def _read_motion(lines, columns, path):
    """(values (T, columns), seconds between frames) of a BVH motion block."""
    rows = [line.split() for _, line in lines if line.strip()]
    frames = _declared("Frames:", rows, path)
    seconds = _declared("Frame Time:", rows, path)
    said = f"{path}: {len(rows)} frames where its header says {frames:g}"
    if len(rows) == frames + 1:  # some exporters write one more
        print(f"{said}: read without the last")
        rows.pop()
    for frame, row in enumerate(rows):
        if len(row) != columns:
            raise InputError(f"{path}, frame {frame}: {len(row)} values for {columns} channels")
    if len(rows) != frames:
        raise InputError(f"{said}; it is truncated or damaged: export it again")
    try:
        values = np.array(rows, np.float64)
    except ValueError:
        raise InputError(f"{path}: a motion value is not a number; export it again") from None
    check_finite(values, path)
    return values, seconds


def _declared(key, rows, path):
    """The number above 0 after "Frames:" or "Frame Time:", taken from the first of `rows`."""
    text = " ".join(rows.pop(0)) if rows else "the end of the file"
    value = math.nan
    with suppress(ValueError):
        value = float(re.sub(key, "", text, flags=re.I))
    if not 0 < value < math.inf:
        raise InputError(f"{path}: {text[:60]!r}, expected {key!r} and a number above 0")
    return value


def _turns(axis, degrees):
    """Rotation matrices (T, 3, 3) about a coordinate axis."""
    angle = np.deg2rad(degrees)
    turn = np.zeros((len(degrees), 3, 3))
    i = "XYZ".index(axis)
    j, k = (i + 1) % 3, (i + 2) % 3
    turn[:, i, i] = 1
    turn[:, j, j] = turn[:, k, k] = np.cos(angle)
    turn[:, k, j] = np.sin(angle)
    turn[:, j, k] = -turn[:, k, j]
    return turn


def _read_clip(path):
    """(joints, world positions (T, joints, 3), frames a second) of a BVH file, see `read_bvh`."""
    text = _content(path, "name a BVH file").decode("utf-8-sig", "replace")
    lines = iter(enumerate(text.splitlines(), 1))
    joints = _read_hierarchy(lines, path)
    columns = sum(len(joint.channels) for joint in joints)
    values, seconds = _read_motion(lines, columns, path)
    column = iter(values.T)
    positions, turns = np.empty((len(values), len(joints), 3)), []
    for j, joint in enumerate(joints):
        offset, turn = np.tile(joint.offset, (len(values), 1)), np.eye(3)
        for axis, kind in joint.channels:
            if kind == "position":
                offset[:, "XYZ".index(axis)] = next(column)
            else:
                turn = turn @ _turns(axis, next(column))
        if joint.parent >= 0:
            above = turns[joint.parent]
            offset = positions[:, joint.parent] + (above @ offset[..., None])[..., 0]
            turn = above @ turn
        positions[:, j] = offset
        turns.append(turn)
    return joints, positions, 1 / seconds


def read_bvh(path):
    """A BVH file as (joint names, world positions (T, joints, 3) in file units, frames a second).

    Rotation channels apply in the order they are listed (R = R_first R_second R_third); position
    channels, on any joint, replace that joint's OFFSET; end sites are joints `<parent>_end`. One
    row more than `Frames:` counts is left out. Raises InputError for anything else.
    """
    joints, positions, fps = _read_clip(path)
    return tuple(joint.name for joint in joints), positions, fps


# our joint: its names, the first that a file has, by Bandai-Namco, MotionBuilder (CMU, LAFAN1,
# Mixamo) and 3ds Max. A LeftShoulder is the collar where there is a LeftArm too.
BVH_NAMES = {
    "pelvis": ("Hips",),
    "spine": ("Spine1", "Chest2", "Chest"),
    "thorax": ("Neck1", "Neck"),
    "neck": ("Head",),
    "right_hip": ("UpperLeg_R", "RightUpLeg", "RightHip"),
    "right_knee": ("LowerLeg_R", "RightLeg", "RightKnee"),
    "right_ankle": ("Foot_R", "RightFoot", "RightAnkle"),
    "right_shoulder": ("UpperArm_R", "RightArm", "RightShoulder"),
    "right_elbow": ("LowerArm_R", "RightForeArm", "RightElbow"),
    "right_wrist": ("Hand_R", "RightHand", "RightWrist"),
    "left_hip": ("UpperLeg_L", "LeftUpLeg", "LeftHip"),
    "left_knee": ("LowerLeg_L", "LeftLeg", "LeftKnee"),
    "left_ankle": ("Foot_L", "LeftFoot", "LeftAnkle"),
    "left_shoulder": ("UpperArm_L", "LeftArm", "LeftShoulder"),
    "left_elbow": ("LowerArm_L", "LeftForeArm", "LeftElbow"),
    "left_wrist": ("Hand_L", "LeftHand", "LeftWrist")}
LEG_LENGTH = 0.9  # metres, where no scale is given
CAPTURE_VOLUME = 1.5  # metres
SHORTEST_BONE = 1e-3  # as a fraction of the leg
LYING = 0.4  # the head of who lies is no higher above the ankles, as a fraction of the leg
OPEN_BENCHMARK = (174, 24286, 7628)  # clips, training and test frames
MADE_BY = "poselift"  # `made_by` marks files of this project: never taken for a published dataset


def _below(joints, tops):
    """The numbers of the joints `tops` and of all that hang on them."""
    below = list(tops)
    for j, joint in enumerate(joints):  # parents come first
        if joint.parent in below:
            below.append(j)
    return below


def _one_person(joints, mapping, person, path):
    """{name without its prefix, and with it: joint number} of one skeleton in a BVH file.

    It is what hangs on the joint `person`, or on the top one whose name begins so. InputError
    where there is not one such joint, and where two on it have the same name that is looked for.
    """
    names = [joint.name for joint in joints]
    begin = [j for j, name in enumerate(names) if name == person]
    begin = begin or [j for j, name in enumerate(names) if name.startswith(person)]
    found = [names[j] for j in begin if joints[j].parent not in begin]
    known, at = {*mapping.values()}.union(*BVH_NAMES.values()), {}
    for j in _below(joints, begin[:1]):
        bare = (names[j].removeprefix(person) or names[j]).rpartition(":")[2]  # mixamorig:Hips
        if bare in at and {bare, names[j]} & known:
            found.append(names[j])
        at[bare] = at[names[j]] = j
    if len(found) != 1:
        raise InputError(f"{path}: {len(found)} skeletons ({', '.join(found)}); say how the top "
                         f"joint's name begins by --person, of: {', '.join(names)}")
    return at


def _seventeen_joints(joints, positions, mapping, person, path):
    """The 17 Human3.6M joints (T, 17, 3) of a BVH skeleton, in file units.

    The head is the head's end site (HeadTop_End, Head_end). Where there is none, where it is the
    Head itself, and in Bandai-Namco's files, whose end sites mean nothing, it is 2 Head - Neck: as
    far above the neck/nose as that is above the thorax.
    """
    at = _one_person(joints, mapping, person, path)
    if not mapping and "Hips" in at:  # not on another's back
        on_pelvis = _below(joints, [at["Hips"]])
        at = {name: j for name, j in at.items() if j in on_pelvis}
    ends = () if "UpperLeg_L" in at else ("HeadTop_End", "Head_end")
    names = BVH_NAMES | {ours: (str(theirs),) for ours, theirs in mapping.items()}
    names.setdefault("head", (*ends, *names["neck"]))
    place, taken = {}, {}
    for ours, known in names.items():
        here = [at[name] for name in known if name in at]
        if not here:
            raise InputError(f"{path}: no joint for {ours} ({', '.join(known)}); name it by --map "
                             f"FILE.json; it has: {', '.join(joint.name for joint in joints)}")
        place[ours] = positions[:, here[0]]
        other = taken.setdefault(here[0], ours)
        if other != ours and (other, ours) != ("neck", "head"):
            raise InputError(f"{path}: {other} and {ours} are one joint, no length between them; "
                             "name another by --map FILE.json")

    above, head = place["neck"] - place["thorax"], place["head"] - place["neck"]
    if (np.linalg.norm(head, axis=-1) <= SHORTEST_BONE * np.linalg.norm(above, axis=-1)).any():
        place["head"] = place["neck"] + above
    skeleton = SKELETONS["h36m17"]
    pose = np.stack([place[ours] for ours in skeleton.joints], 1)
    for parent, child in skeleton.edges:
        length = np.linalg.norm(pose[:, child] - pose[:, parent], axis=-1)
        if (length <= SHORTEST_BONE * _leg_length(pose)).any():
            bone = f"{skeleton.joints[parent]} to {skeleton.joints[child]}"
            raise InputError(f"{path}: the bone from {bone} has no length in frame "
                             f"{int(np.argmin(length))}; name other joints by --map FILE.json")
    return pose


def _leg_length(pose):
    """Thigh and shank at the first frame of (T, 17, 3), the mean of right and left."""
    legs = np.diff(pose[0, [[1, 2, 3], [4, 5, 6]]], axis=1)
    return np.linalg.norm(legs, axis=-1).sum(1).mean()


def _resample(positions, fps, rate):
    """(T, J, 3) at `fps` to another rate, linearly between frames."""
    frames = int((len(positions) - 1) / fps * rate + 1e-3) + 1
    time, known = np.arange(frames) * (fps / rate), np.arange(len(positions))
    return np.apply_along_axis(partial(np.interp, time, known), 0, positions)


def _clip_name(path):
    """(subject, action) of a clip, from its file name, or its folder and file name."""
    stem = path.stem.replace(" ", "_")
    bandai = re.fullmatch(r"dataset-\d+_(.+)_(.+)_(\d+)", stem)  # motion, style, take
    if bandai:
        return "S" + bandai[2], f"{bandai[1]} {bandai[3]}"
    lafan1 = re.fullmatch(r"(\D+)(\d*)_(subject\d+)", stem)  # motion, take, subject
    if lafan1:
        return lafan1[3], f"{lafan1[1]} {lafan1[2]}".strip()
    return path.parent.name, stem


def _find_clips(folder, test):
    """(the BVH files under a folder by file name, "train" or "test" for each).

    Without macOS's `._` left-overs. InputError where the pattern `test` finds all or none.
    """
    paths = [path for path in folder.rglob("[!.]*") if path.suffix.lower() == ".bvh"]
    paths.sort(key=lambda path: (path.name, str(path)))
    if not paths:
        raise InputError(f"{folder}: no BVH files in it, or no such folder; name one that has some")
    try:
        found = [bool(re.search(test, path.relative_to(folder).as_posix())) for path in paths]
    except re.error:
        raise InputError(f"--test {test!r}: not a regular expression") from None
    if not test or len(set(found)) == 1:
        how_many = "all" if test and found[0] else "none"
        raise InputError(f"--test {test!r} matches {how_many} of {len(paths)} clips in {folder}")
    return paths, np.where(found, "test", "train")


def _world_poses(path, mapping, scale, up, fps, recorded_fps, skip, person):
    """(world poses (T, 17, 3) in metres, z up, within the capture volume; frames a second)."""
    joints, positions, rate = _read_clip(path)
    if not 0 <= skip < len(positions):
        raise InputError(f"{path}: --skip {skip} does not fit its {len(positions)} frames")
    pose = _seventeen_joints(joints, positions[skip:], mapping, person, path)
    if up == "y":
        pose = np.stack((pose[..., 0], -pose[..., 2], pose[..., 1]), -1)
    pose = pose * (scale or LEG_LENGTH / _leg_length(pose))
    if not 0.2 < _leg_length(pose) < 2:
        raise InputError(f"{path}: legs of {_leg_length(pose):.2g} m; give another --scale or none")
    rate = recorded_fps or rate
    if fps:
        pose = _resample(pose, rate, fps)
    pelvis = pose[:, 0, :2]
    moved = np.clip(pelvis - pelvis.mean(0), -CAPTURE_VOLUME, CAPTURE_VOLUME) - pelvis
    pose[..., :2] += moved[:, None]
    return pose, fps or rate


def _check_up(paths, world, up):
    """InputError where most clips are of people who lie: the wrong axis. A warning of a few."""
    lying = []
    for path, pose in zip(paths, world):
        height = pose[:, 10, 2] - pose[:, [3, 6], 2].mean(1)  # the head's, above the ankles
        if (height < LYING * _leg_length(pose)).mean() > 0.6:
            lying.append(path.name)
    found = f"the head is not above the ankles in {len(lying)} of {len(paths)} clips: {lying[:9]}"
    if len(lying) > len(paths) / 2:
        raise InputError(f"{found}, read with --up {up}: give --up {'z' if up == 'y' else 'y'}")
    if lying:
        print(f"warning: {found}: people who lie or crawl?", file=sys.stderr)


def _seen(pose, rig, path):
    """World poses (T, 17, 3) in the pixels (4, T, 17, 2) of Human3.6M's cameras of one subject."""
    views = [world_to_camera(pose, extrinsics) for extrinsics in rig]
    if not min(view[..., 2].min() for view in views) > 0.5:
        raise InputError(f"{path}: a joint is less than 0.5 m before a camera; give the --scale")
    pixels = [project(view, intrinsics) for view, intrinsics in zip(views, H36M_INTRINSICS)]
    return np.stack(pixels).astype(np.float32)


def convert_bvh(folder, out="data", name="mocap", test="", mapping=None, scale=None, up="y",
                fps=None, recorded_fps=None, skip=0, person=""):
    """Every BVH clip under `folder` to `out`/data_3d_`name`.npz and data_2d_`name`_gt.npz.

    Clips in the order of their file names; those matching the pattern `test` are the test set.
    `mapping`: {our joint: its joint}. `scale`: metres a file unit; without it each clip so that
    (thigh + shank) at its first frame is 0.90 m. `up`: "y" or "z". `fps`: resample; `recorded_fps`:
    the rate where the file states a wrong one; `skip`: frames left out at the start; `person`:
    which skeleton, by its top joint or prefix. The pelvis's horizontal position, off its mean, is
    clamped to +- 1.5 m. Clip i is seen by the four Human3.6M cameras of subject i mod 7. Returns
    what to print. Raises InputError for whatever cannot be converted, with nothing written.
    """
    folder, out, ours = Path(folder), Path(out), SKELETONS["h36m17"].joints
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(f"--name {name!r}: expected letters, digits, _ and - alone")
    paths, split = _find_clips(folder, test)
    options = mapping or {}, scale, up, fps, recorded_fps, skip, person
    world, rates = zip(*(_world_poses(path, *options) for path in paths))
    _check_up(paths, world, up)
    rigs = [list(H36M_EXTRINSICS.values())[i % len(H36M_EXTRINSICS)] for i in range(len(paths))]
    image = [_seen(*clip) for clip in zip(world, rigs, paths)]

    frames = np.array([len(pose) for pose in world])
    train, held_out = frames[split == "train"], frames[split == "test"]
    source = f"{len(paths)} BVH clips of {folder.resolve().name}"
    counts = len(paths), train.sum(), held_out.sum()
    if counts == OPEN_BENCHMARK and not (mapping or scale or fps):
        source = "open mocap benchmark (Bandai-Namco-Research-Motiondataset-1)"
    subjects, actions = zip(*map(_clip_name, paths))
    clips = [path.relative_to(folder).as_posix() for path in paths]
    both = dict(made_by=MADE_BY, clips=clips, offsets=np.concatenate(([0], np.cumsum(frames))))
    pose_2d = dict(both, positions_2d=np.concatenate(image, 1))  # (4, frames, 17, 2) pixels
    pose_3d = dict(
        both, positions_3d=np.concatenate(world).astype(np.float32), joints=ours, split=split,
        subjects=subjects, actions=actions, fps=np.array(rates), source=source,
        cameras=H36M_CAMERAS, sizes=np.array(H36M_SIZES), intrinsics=H36M_INTRINSICS,
        extrinsics=np.stack(rigs))
    path_2d, path_3d = out / f"data_2d_{name}_gt.npz", out / f"data_3d_{name}.npz"
    write_atomically(path_2d, lambda file: np.savez(file, **pose_2d))
    # the 3D last: without it the set is not there
    write_atomically(path_3d, lambda file: np.savez(file, **pose_3d))
    return (f"{source}: training {len(train)} clips, {train.sum():,} frames, test {len(held_out)} "
            f"clips, {held_out.sum():,} frames, 4 cameras -> {path_3d}, {path_2d}")


def load_mocap(folder, name="mocap", keypoints="gt", split="train"):
    """The Sequences of a split that `python data.py bvh` wrote; one for each clip and camera."""
    remedy = f"python data.py bvh FOLDER --out {folder} --name {name} --test REGEX makes it"
    path_3d = Path(folder) / f"data_3d_{name}.npz"
    path_2d = Path(folder) / f"data_2d_{name}_{keypoints}.npz"
    space, image = read_npz(path_3d, remedy), read_npz(path_2d, remedy)
    sequences = []
    with described(f"{path_3d}, {path_2d}: not as this project writes them", remedy):
        bounds, clips = space["offsets"].tolist(), space["clips"].tolist()
        world, pixels = space["positions_3d"], image["positions_2d"]
        same = image["clips"].tolist() == clips and image["offsets"].tolist() == bounds
        if not same or not pixels.shape[1] == len(world) == bounds[-1]:
            raise InputError(f"{path_2d}: its clips or frames are not those of {path_3d}; {remedy}")
        for i in np.flatnonzero(space["split"] == split):
            frames = slice(bounds[i], bounds[i + 1])
            points = check_poses(world[frames], f"{path_3d}: {clips[i]}, 3D", (3,))
            for c, camera in enumerate(space["cameras"].tolist()):
                where = f"{path_2d}: {clips[i]} camera {camera}"
                pose_2d = check_poses(pixels[c, frames], f"{where}, 2D", (2, 3))[..., :2]
                extrinsics = space["extrinsics"][i, c]
                sequences.append(_sequence(
                    where, pose_2d, world_to_camera(points, extrinsics), space["intrinsics"][c],
                    subject=str(space["subjects"][i]), action=str(space["actions"][i]),
                    camera=camera, size=tuple(space["sizes"][c].tolist()),
                    fps=float(space["fps"][i]), source=str(space["source"]), extrinsics=extrinsics))
    if not sequences:
        raise InputError(f"{path_3d}: no clips in the split {split!r}; {remedy}")
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
# cycles, raise, raising swing)} in degrees; a joint without a side moves both sides alike, one
# after ~ the left side half a cycle later.
MOTIONS = {
    "walk": (0.95, 0.12, {"~hip": (10, 20, 0), "~knee": (-26, 20, .3), "~shoulder": (0, 20, .5),
        "elbow": (24, 8, .2)}),
    "turn": (0.7, 0.35, {"~hip": (12, 13, 0), "~knee": (-20, 15, .3),
        "shoulder": (12, 14, 0, 20, 14), "elbow": (40, 14, .3)}),
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


def _move_of(joint, part, moves):
    """(bend, swing, phase, raise, raising swing, whether sides alternate) of a joint."""
    for key in (joint, part, "~" + part):
        if key in moves:
            bend, swing, shift, up, lift = (*moves[key], 0, 0)[:5]
            return bend, swing, shift, up, lift, "~" + part in moves
    return 0, 0, 0, 0, 0, False


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

    turns = [None] * 17
    for j, joint in enumerate(skeleton.joints):
        side, _, part = joint.rpartition("_")
        if part not in RANGES:
            continue
        bend, swing, shift, up, lift, alternates = _move_of(joint, part, moves)
        later = 0.5 * (side == "left" and alternates)
        cycle = np.sin(phase - 2 * np.pi * (shift + later))
        bending = bend + size[j] * swing * cycle
        raising = up + size[j] * lift * cycle
        angle = np.stack((bending, raising, 0 * cycle), -1)  # (T, 3)
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
        if turns[j] is None:
            turns[j] = turns[parent]
        else:
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
        for kind, take in ((kind, take) for kind in motions for take in range(takes)):
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
# what `provenance` calls a recipe's `data` where it is what the papers measured on. No frame counts
# of HumanEva-I are published: its files are taken at their word.
HUMAN36M = "Human3.6M"
GENUINE = {"h36m": HUMAN36M, "gridconv": HUMAN36M, "humaneva": "files in HumanEva-I layout",
           "3dhp": "MPI-INF-3DHP test set"}
TITLE = {"h36m": "Human3.6M", "humaneva": "HumanEva-I", "3dhp": "MPI-INF-3DHP",
         "mocap": "motion capture"}
LAYOUT = {data: f"files in {title} layout" for data, title in TITLE.items()}
REGISTER = {  # where a dataset, or its detected 2D, comes from
    "h36m": "register at http://vision.imar.ro/human3.6m; prepare it as VideoPose3D does",
    "gridconv": "fetch h36m.zip, which the GridConv release points to",
    "hrnet": "fetch h36m.zip, which the GridConv release points to",
    "cpn_ft_h36m_dbb": "fetch it from where VideoPose3D's DATASETS.md points to",
    "humaneva": "register at http://humaneva.is.tue.mpg.de; prepare it as VideoPose3D does",
    "3dhp": "register at https://vcai.mpi-inf.mpg.de/3dhp-dataset; prepare as P-STMO does",
    "mocap": "python data.py bvh FOLDER --test REGEX makes it from BVH files"}


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
    value = archive.get(key)
    if value is not None and value.shape == ():
        value = value.item()
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}: no dictionary under {key!r}, or an empty one; {REGISTER[data]}")
    if data == "h36m" and "'layout_name': 'coco'" in str(archive.get("metadata")):
        raise InputError(f"{path}: COCO's joints; expected 2D of Human3.6M's; {REGISTER[data]}")
    if str(archive.get("made_by")) == MADE_BY:
        return value, LAYOUT[data] + ", made by this project"
    return value, LAYOUT[data]


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
            raise InputError(f"{path_3d}: it holds no actions of {subject}; {REGISTER[data]}")
        for action, world in actions.items():
            world = check_poses(world, f"{path_3d}: {subject} {action}, 3D", (3,))
            for c, camera in enumerate(cameras):
                where, pixels = f"{path_2d}: {subject} {action} camera {camera}", None
                if image is not None:
                    with described(f"{where}: no 2D of {len(cameras)} cameras", REGISTER[data]):
                        pixels = image[subject][action][c]
                    pixels = check_poses(pixels, f"{where}, 2D", (2, 3))[:len(world), :, :2]
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
        if joints == 17 and world.shape[1] == 32:
            world = world[:, H36M_17_OF_32]
        points = world_to_camera(world, extrinsics)
        if pixels is None or (keypoints == "gt" and joints == 32 and pixels.shape[1] == 17):
            pixels = project(points, intrinsics)
        elif joints == 17 and pixels.shape[1] == 32:
            pixels = pixels[:, H36M_17_OF_32]
        sequences.append(_sequence(
            where, pixels, points, intrinsics, size=H36M_SIZES[c], fps=H36M_FPS,
            extrinsics=extrinsics, **fields))
    return sequences


def _archives(folder, split, keypoints):
    """GridConv's 2D and 3D archives: in `folder`, its <keypoints> or its h36m/<keypoints>."""
    folder = Path(folder)
    names = [f"{split}_custom_{kind}_unnorm.pth.tar" for kind in ("2d", "3d")]
    for place in (folder / keypoints, folder / "h36m" / keypoints, folder):
        if (place / names[0]).exists():
            return [place / name for name in names]
    return [folder / keypoints / name for name in names]


def load_gridconv(folder, split="train", keypoints="gt"):
    """Human3.6M in the archives of GridConv's release, where `_archives` looks for them.

    Two dictionaries of (subject, action, sequence.camera): 2D (T, 34) pixels; 3D with `pelvis`
    (T, 3) and `joint_3d` or `joints_3d` (T, 51) in mm, and `camera`, a dictionary or the list of
    fx, fy, cx, cy.
    """
    (path_2d, path_3d), remedy = _archives(folder, split, keypoints), REGISTER["gridconv"]
    image, space = read_torch(path_2d, remedy), read_torch(path_3d, remedy)
    two = isinstance(image, dict) and isinstance(space, dict)
    if not two or not space or image.keys() != space.keys():
        raise InputError(f"{path_2d}, {path_3d}: not dictionaries of the same sequences; {remedy}")
    sequences = []
    for key, entry in space.items():
        with described(f"{path_3d}: {key}: not as GridConv's archives are", remedy):
            subject, (action, _, camera) = key[0], key[2].rpartition(".")
            joints = np.asarray(entry["joint_3d" if "joint_3d" in entry else "joints_3d"])
            points = joints.reshape(-1, 17, 3) + np.asarray(entry["pelvis"])[:, None]
            pixels = np.asarray(image[key]).reshape(-1, 17, 2)
            pinhole = entry["camera"]
            if isinstance(pinhole, dict):
                pinhole = np.stack([pinhole[name] for name in ("fx", "fy", "cx", "cy")], -1)
            fx, fy, cx, cy = np.atleast_2d(pinhole)[0].astype(float)
            intrinsics = (fx, fy, cx, cy, 0, 0, 0, 0, 0)
            size = H36M_SIZES[H36M_CAMERAS.index(camera)]
        where = f"{subject} {action} camera {camera}"
        points = check_poses(points / 1000, f"{path_3d}: {where}, 3D", (3,))  # metres
        pixels = check_poses(pixels, f"{path_2d}: {where}, 2D", (2,))
        sequences.append(_sequence(
            where, pixels, points, intrinsics, subject=subject, action=action, camera=camera,
            size=size, fps=H36M_FPS, source=LAYOUT["h36m"]))
    return sequences


def _humaneva_of_coco(pose):
    """COCO-17 (T, 17, 2) to HumanEva's 15 joints, as GLA-GCN does.

    Mid hips, mid shoulders, the limbs, and the nose as the head.
    """
    hips = pose[:, [11, 12]].mean(1, keepdims=True)
    shoulders = pose[:, [5, 6]].mean(1, keepdims=True)
    limbs_and_nose = pose[:, [5, 7, 9, 6, 8, 10, 11, 13, 15, 12, 14, 16, 0]]
    return np.concatenate((hips, shoulders, limbs_and_nose), 1)


def load_humaneva(folder, keypoints="gt", subjects=("Train/S1", "Train/S2", "Train/S3"),
                  actions=HUMANEVA_ACTIONS):
    """HumanEva-I in VideoPose3D's layout, 15 joints: every chunk that begins with one of `actions`.

    `detectron_pt_coco` keypoints (COCO-17) are mapped to the 15 joints. The cameras' intrinsics are
    unknown (NaN).
    """
    views = _videopose3d(folder, "humaneva", "humaneva15", keypoints, subjects, HUMANEVA_CAMERAS)
    sequences = []
    for c, world, pixels, where, fields in views:
        if not fields["action"].startswith(tuple(actions)):
            continue
        if pixels.shape[1] == 17:
            pixels = _humaneva_of_coco(pixels)
        points = world_to_camera(world, HUMANEVA_EXTRINSICS[fields["subject"][-2:]][c])
        sequences.append(_sequence(
            where, pixels, points, UNKNOWN_INTRINSICS, size=HUMANEVA_SIZE, fps=HUMANEVA_FPS,
            **fields))
    if not sequences:
        raise InputError(f"{folder}: no action begins with {' or '.join(actions)}; see --actions")
    return sequences


def load_3dhp(folder, split="train"):
    """MPI-INF-3DHP in P-STMO's layout, 17 joints in its own order, root 14.

    Test frames that do not count: `valid`.
    """
    path, remedy = Path(folder) / f"data_{split}_3dhp.npz", REGISTER["3dhp"]
    recordings, source = _nested(path, "data", "3dhp")
    sequences = []
    for name, recording in recordings.items():
        with described(f"{path}: {name}: not in P-STMO's layout", remedy):
            subject, _, action = name.partition(" ")
            size = (1920, 1080) if subject in ("TS5", "TS6") else (2048, 2048)
            views, fps = ({"0": recording}, math.nan) if split == "test" else recording
            if not views:
                raise InputError(f"{path}: {name} has no cameras; {remedy}")
            for camera, view in views.items():
                where, valid = f"{path}: {name} camera {camera}", None
                points = check_poses(np.asarray(view["data_3d"]) / 1000, f"{where}, 3D", (3,))
                pixels = check_poses(view["data_2d"], f"{where}, 2D", (2,))
                if split == "test":
                    valid = np.asarray(view["valid"]).reshape(-1) == 1
                    if len(valid) != len(points) or not valid.any():
                        found = f"{len(valid)} flags, {valid.sum()} of them 1"
                        raise InputError(f"{where}: {found}, for {len(points)} frames")
                sequences.append(_sequence(
                    where, pixels, points, UNKNOWN_INTRINSICS, 14, subject=subject,
                    action=action or subject, camera=str(camera), size=size, fps=float(fps),
                    source=source, valid=valid))
    return sequences


def load_dataset(recipe, folder, split):
    """The Sequences of `split` ("train" or "test") for a recipe.

    It reads the recipe's `data`, `keypoints`, `skeleton`, `skip` and `actions`. The protocols:
    Human3.6M trains on S1 S5 S6 S7 S8, tests on S9 S11 and leaves out S11's sequence named exactly
    `Directions`, with skip = "gridconv" and detected 2D also 12 of S9; HumanEva-I trains on Train/
    and tests on Validate/ S1 to S3; 3DHP comes in Human3.6M's joint order where the recipe's
    skeleton is h36m17. Raises InputError for another name.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r}: expected train or test")
    if recipe.data == "synthetic":
        return [s for s in synthesize(0) if s.subject in SPLITS[split]]
    listing(folder)  # permitted?
    if recipe.data == "mocap":
        return load_mocap(folder, "mocap", recipe.keypoints, split)
    if recipe.data == "humaneva":
        part = "Train" if split == "train" else "Validate"
        subjects = [f"{part}/S{i}" for i in (1, 2, 3)]
        return load_humaneva(folder, recipe.keypoints, subjects, recipe.actions)
    if recipe.data == "3dhp":
        sequences = load_3dhp(folder, split)
        if recipe.skeleton != "h36m17":
            return sequences
        order = list(H36M_17_OF_3DHP)
        return [replace(s, pose_2d=s.pose_2d[:, order], pose_3d=s.pose_3d[:, order])
                for s in sequences]
    if files_of(recipe, folder)[0].suffix == ".tar":
        sequences = load_gridconv(folder, split, recipe.keypoints)
    else:
        joints = len(SKELETONS[recipe.skeleton].joints)
        sequences = load_h36m(folder, recipe.keypoints, SPLITS[split], joints)
    skipped = SKIPPED
    if recipe.skip == "gridconv" and recipe.keypoints != "gt":
        skipped = SKIPPED | SKIPPED_DETECTED
    kept = [s for s in sequences if (s.subject, s.action) not in skipped]
    if {s.pose_2d.shape[1] for s in kept} != {len(SKELETONS[recipe.skeleton].joints)}:
        found = "poses of other joints" if kept else "no sequences but those always left out"
        raise InputError(f"{folder}: {found}, for {recipe.skeleton}; {REGISTER['h36m']}")
    return kept


def make_store(recipe, folder, split, device="cpu"):
    """The recipe's frames of a split ("train" or "test") on the device: the one place that opens
    a recipe's data. The test split is seen through its own random cameras.

    InputError for unknown data, and where its joints are not the recipe's.
    """
    if recipe.skeleton not in DATASETS.get(recipe.data, ()):
        raise InputError(f"{recipe.skeleton} of {recipe.data!r} data; expected of: {DATASETS}")
    sequences = load_dataset(recipe, folder, split)
    sizes = {s.size for s in sequences}
    if recipe.cameras == "random":  # images of any size
        sizes = {(0, 0)}
    rule = fitting_rule(recipe.normalise, sizes)
    store = FrameStore(
        sequences, rule, SKELETONS[recipe.skeleton], device, recipe.target, recipe.cameras,
        recipe.noise, recipe.missing, recipe.swap_sides)
    if split == "test":
        store.redraw(TEST_DRAW)
    return store


def files_of(recipe, folder):
    """The paths that a recipe's data is read from, the training set's first; there or not.

    Human3.6M comes from GridConv's archives (<keypoints>/ or h36m/<keypoints>/) where they are and
    VideoPose3D's files are not.
    """
    folder, keypoints = Path(folder), recipe.keypoints
    archives = [path for split in SPLITS for path in _archives(folder, split, keypoints)]
    names = {
        "h36m": ["data_3d_h36m.npz", f"data_2d_h36m_{keypoints}.npz"],
        "gridconv": archives,
        "humaneva": ["data_3d_humaneva15.npz", f"data_2d_humaneva15_{keypoints}.npz"],
        "3dhp": ["data_train_3dhp.npz", "data_test_3dhp.npz"],
        "mocap": ["data_3d_mocap.npz", f"data_2d_mocap_{keypoints}.npz"],
        "synthetic": []}
    paths = [folder / name for name in names[recipe.data]]
    if recipe.data == "h36m" and keypoints == "gt":  # can be projected
        paths.pop()
    if recipe.data == "h36m" and recipe.skeleton == "h36m17":
        named = all(path.exists() and path.parent != folder for path in archives)
        if named and not all(path.exists() for path in paths):
            return archives
    return paths


def missing_files(recipe, folder):
    """The names of the files that a recipe needs and `folder` lacks.

    A recipe that evaluates another's weights needs the test set's alone.
    """
    paths = files_of(recipe, folder)
    if recipe.weights:
        paths = paths[-1:]
    return [path.name for path in paths if not path.exists()]


def listing(folder):
    """The sorted names in a data folder, None where there is none; InputError: not readable."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); allow it") from None


# data, keypoints, skeleton, what it allows to reproduce
SETS = (
    ("h36m", "gt", "h36m17",
     "GridConv's P1* rows (Tables 2, 4, 5), GLA-GCN's gt rows (Tables 1, 4, 5)"),
    ("h36m", "gt", "h36m32", "GridConv's 32-joint rows (Table 6)"),
    ("h36m", "hrnet", "h36m17", "GridConv's P1 / P2 rows (Tables 1, 2, 5, A)"),
    ("h36m", "cpn_ft_h36m_dbb", "h36m17", "GLA-GCN's CPN rows (Tables 1, 4)"),
    ("humaneva", "gt", "humaneva15", "GLA-GCN's gt row (Table 2)"),
    ("humaneva", "detectron_pt_coco", "humaneva15", "GLA-GCN's MRCNN row (Table 2)"),
    ("3dhp", "gt", "3dhp17",
     "GLA-GCN's rows (Table 3), by its test set alone GridConv's cross-dataset row (Table 3)"),
    ("mocap", "gt", "h36m17", "the rows named mocap"))


def check_folder(folder):
    """(lines, unusable sets): what a folder holds, what that allows to reproduce, what is missing
    and where it comes from."""
    names = listing(folder)
    if names is None:
        raise InputError(f"{folder}: not found; name the data folder")
    sets = list(SETS)
    for name in names:  # 2D that no published row uses
        match = re.fullmatch(r"data_2d_(h36m|humaneva|mocap)(?:15)?_(.+)\.npz", name)
        if match and match.groups() not in {one[:2] for one in SETS}:
            allows = f"no published row; any recipe with --keypoints {match[2]}"
            sets.append((*match.groups(), DATASETS[match[1]][0], allows))
    lines, unusable = [], 0
    for data, keypoints, skeleton, allows in sets:
        skip = "gridconv" if keypoints == "hrnet" else ""
        recipe = SimpleNamespace(data=data, keypoints=keypoints, skeleton=skeleton, skip=skip,
                                 actions=HUMANEVA_ACTIONS, weights="")
        can, said = "allows", []
        missing = missing_files(recipe, folder)
        if missing:
            can = "not here; it would allow"
            said = [f"missing: {', '.join(missing)}; {REGISTER.get(keypoints, REGISTER[data])}"]
        for split in () if missing else SPLITS:
            try:
                part = load_dataset(recipe, folder, split)
                frames = sum(len(s.pose_3d) for s in part)
                found = f"{len(part)} sequences, {frames:,} frames; {provenance(part)}"
            except InputError as error:
                can, found = "cannot be used; it would allow", f"cannot be used: {error}"
                unusable += 1
            said.append(f"{split}: {found}")
        lines.append(f"{TITLE[data]}, 2D {keypoints}: {can} {allows}")
        lines += [f"    {line}" for line in said]
    return lines, unusable


# --------------------------------------------------------------------------------------------------
# The command line

def above_0(text):
    """The type of a command's rates and scales."""
    value = math.nan
    with suppress(ValueError):
        value = float(text)
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0 and up to 1000")
    return value


def _read_mapping(path):
    """The dictionary {our joint: its joint} of a JSON file."""
    mapping, ours = read_json(path), SKELETONS["h36m17"].joints
    fits = isinstance(mapping, dict) and mapping.keys() <= {*ours}
    if not fits or not all(isinstance(name, str) for name in mapping.values()):
        raise InputError(f'--map {path}: expected {{"our joint": "its joint", ...}}, ours being '
                         + ", ".join(ours))
    return mapping


def main(argv=None):
    """The command line: `bvh` and `check`."""
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("bvh", help="BVH clips to training pairs").add_argument
    add("folder")
    add("--out", default="data", help="folder for the two files (data)")
    add("--name", default="mocap", help="of the set; the recipes read the one called mocap")
    add("--test", required=True, help="regular expression: matching clips are the test set")
    add("--map", dest="mapping", help="JSON file {our joint: its joint} for unusual skeletons")
    add("--person", default="", help="which of several skeletons: how its top joint's name begins")
    add("--scale", type=above_0, help="metres a file unit (such that legs are 0.90 m)")
    add("--up", default="y", choices=("y", "z"), help="the file's upward axis (y)")
    add("--fps", type=above_0, help="resample to this rate (as recorded)")
    add("--recorded-fps", type=above_0, help="the true rate, where the file states a wrong one")
    add("--skip", type=int, default=0, help="frames to leave out at the start, as a T-pose (0)")
    check = commands.add_parser("check", help="what a data folder holds and allows to reproduce")
    check.add_argument("folder")
    options = vars(parser.parse_args(argv))
    if options.pop("command") == "bvh":
        if options["mapping"]:
            options["mapping"] = _read_mapping(options["mapping"])
        print(convert_bvh(**options))
        return
    lines, unusable = check_folder(**options)
    print("\n".join(lines))
    if unusable:
        raise InputError(f"{options['folder']}: some sets cannot be used; see above")


if __name__ == "__main__":
    run(main)
