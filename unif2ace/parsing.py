"""The boundary to libraries that parse files from outside: what they raise ends in one line that names the file.

Bytes that are damaged, or that lie, make such a library raise anything: numpy lets the errors of Python's own parser
through, json RecursionError, YAML whatever its values' constructors raise, tokenizers a bare Exception. No list of them
is ever whole. So each call of such a library stands in `parsing` or `reading`, and nothing of this project's own does:
its own mistakes come out as they are.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from unif2ace.errors import UserError

_BEGIN = 10  # bytes of a .npy file before its header: the format's name, its version, the header's length
_LONGEST_HEADER = 512  # a plain array's has 118 bytes; a longer one nests so deep that Python says it has no memory


@contextlib.contextmanager
def parsing(refused: Callable[[str], Exception]) -> Iterator[None]:
    """Around the call of a library that parses what a file holds, and around nothing else.

    Memory that runs out is the machine's affair and goes through: what a file claims is held against its size before.

    Args:
        refused: what to raise, by what the library said in one line.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        told = repr(error) if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise refused(f"{' '.join(told.split()):.200}") from error


@contextlib.contextmanager
def reading(path: Path | str, what: str, mend: str = "copy it again") -> Iterator[None]:
    """`parsing` of a whole file that is opened inside.

    Args:
        what: it should be, in one or two words.
        mend: what the user can do where it is not.

    Raises:
        UserError: it is missing, cannot be read, or is damaged or something else.
    """
    try:
        with parsing(lambda why: UserError(f"{path} is damaged or no {what} ({why}): {mend}")):
            yield
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise UserError(f"{path} is missing") from cause
        # Those without words are a library's for damage; an invalid argument is a place before the file's beginning.
        if isinstance(cause, OSError) and cause.strerror and cause.errno != errno.EINVAL:
            raise UserError(f"cannot read {path}: {cause.strerror}") from cause
        raise


class Whole(io.BufferedReader):
    """A file, opened for reading, of which no more is asked for than it has.

    What reads as many bytes as a header claims, as tarfile and pickles do, would have Python set that memory aside.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = Path(path).stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


@functools.lru_cache(maxsize=256)
def array_header(content: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and shape that a .npy file begins with.

    Few differ, and each takes longer to parse than its values to read: the last ones are kept.

    Raises:
        ValueError: it cannot be read, holds Python objects, or lies in columns.
    """
    file = io.BytesIO(content)
    with parsing(lambda why: ValueError(f"its header cannot be read ({why})")):
        version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError("it is of another version of the format than 1.0")
    with parsing(lambda why: ValueError(f"its header cannot be read ({why})")):
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if columns_first and len(shape) > 1:
        raise ValueError("it lies in columns, not in rows")
    if not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"its header says that it is {list(shape)} of {dtype}")
    return dtype, shape


def array(content: memoryview) -> np.ndarray:
    """What a .npy file holds, in its own bytes; ValueError where it is damaged or holds Python objects."""
    start = _BEGIN + int.from_bytes(content[8:_BEGIN], "little")
    dtype, shape = array_header(bytes(content[:start]))
    with parsing(lambda why: ValueError(f"it has other values than its header says ({why})")):
        return np.frombuffer(content, dtype, offset=start, count=math.prod(shape)).reshape(shape)


def read_arrays(path: Path, what: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by their names, none of which claims more memory than the file has bytes.

    Raises:
        UserError: see `reading`.
    """
    with reading(path, what, "delete it and run again"), np.load(path, allow_pickle=False) as held:
        size = Path(path).stat().st_size
        for each in held.zip.infolist():
            with held.zip.open(each) as member:
                dtype, shape = array_header(member.read(_BEGIN + _LONGEST_HEADER))
            if math.prod(shape) * dtype.itemsize > size:
                raise ValueError(f"{each.filename} claims {list(shape)} of {dtype}, the file has {size} bytes")
        return {name: held[name] for name in held.files}
