"""GGUF files read as data: their fields, where each tensor lies, and its values in fp32.

The format and its blocks are llama.cpp's: a header of typed fields, a list of tensors, then their bytes. A quantised
row is cut into blocks of 32 or 256 values; each block has a scale d in fp16, the K kinds 6-bit or 8-bit scales of
their parts besides. Numbers are little-endian. Oracle: the package `gguf`.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def f16(blocks):
    """[blocks, 2] bytes -> [blocks, 1] fp32."""
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def nibbles(packed):
    """[..., n] bytes -> [..., 2n]: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def from_f32(blocks):
    return np.ascontiguousarray(blocks).view(np.float32)


def from_q8_0(blocks):
    """d, 32 signed bytes."""
    return f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8)


def from_q5_0(blocks):
    """d, the fifth bits of 32 values, their low four."""
    fifth = np.unpackbits(np.ascontiguousarray(blocks[:, 2:6]), axis=1, bitorder="little")
    return f16(blocks[:, :2]) * ((nibbles(blocks[:, 6:]) | fifth << 4).astype(np.int8) - 16)


def from_q4_k(blocks):
    """d and the scale of the minima, 8 scales and 8 minima of 6 bits in 12 bytes, 4 x 64 nibbles."""
    low, high, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, rest & 15 | low >> 6 << 4], 1)
    least = np.concatenate([high & 63, rest >> 4 | high >> 6 << 4], 1)
    values = nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    steps, minima = f16(blocks[:, :2]) * scale, f16(blocks[:, 2:4]) * least
    return (steps[..., None] * values - minima[..., None]).reshape(-1, 256)


def from_q6_k(blocks):
    """256 low halves, 256 pairs of high bits, 16 signed scales, d."""
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    values = (low | pairs.reshape(-1, 256) << 4).astype(np.int8) - 32
    scale = f16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)
    return (scale[..., None] * values.reshape(-1, 16, 16)).reshape(-1, 256)


class Kind(NamedTuple):
    """How values are packed; `unpack`: bytes [blocks, bytes] -> fp32 [blocks, values]."""

    name: str
    values: int  # of a block
    bytes: int
    unpack: Callable


KINDS = {  # by their number in the file
    0: Kind("F32", 1, 4, from_f32),
    6: Kind("Q5_0", 32, 22, from_q5_0),
    8: Kind("Q8_0", 32, 34, from_q8_0),
    12: Kind("Q4_K", 256, 144, from_q4_k),
    14: Kind("Q6_K", 256, 210, from_q6_k),
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `shape` with the longest stride first, `kind` a key of KINDS, the `span` of its bytes."""

    shape: tuple[int, ...]
    kind: int
    span: tuple[int, int]


@dataclass(frozen=True)
class Gguf:
    """`fields` by name, arrays as lists; `places` of the tensors by name."""

    path: Path
    fields: dict
    places: dict[str, Place]

    def tensor(self, name: str) -> np.ndarray:
        """fp32, in the tensor's shape."""
        place = self.places[name]
        kind, (start, end) = KINDS[place.kind], place.span
        packed = np.fromfile(self.path, np.uint8, end - start, offset=start)
        return kind.unpack(packed.reshape(-1, kind.bytes)).reshape(place.shape)


class Reader:
    """Numbers and texts, one after the other."""

    def __init__(self, file):
        self.file = file

    def number(self, kind: str):
        (value,) = struct.unpack(f"<{kind}", self.file.read(struct.calcsize(kind)))
        return value

    def text(self) -> str:
        return self.file.read(self.number("Q")).decode()

    def value(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(SCALARS[kind])


def read(path: Path) -> Gguf:
    """The header of a file; ValueError for another format, a kind that is not in KINDS, a file that is cut short."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path.name} is not a GGUF file")
        try:
            return read_header(path, file)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"the header of {path.name} cannot be read: {type(error).__name__} {error}") from None


def read_header(path, file):
    reader = Reader(file)
    version, num_tensors, num_fields = (reader.number(kind) for kind in "IQQ")
    if version not in VERSIONS:
        raise ValueError(f"{path.name} is GGUF version {version}; known: {VERSIONS}")
    fields = {reader.text(): reader.value(reader.number("I")) for _ in range(num_fields)}
    entries = [(reader.text(), read_shape(reader), reader.number("I"), reader.number("Q")) for _ in range(num_tensors)]
    align = fields.get("general.alignment", 32)
    start = -(-file.tell() // align) * align
    places = {name: place(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
    end = max((one.span[1] for one in places.values()), default=start)
    if path.stat().st_size < end:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, but its tensors end at {end}: it is cut short")
    return Gguf(path, fields, places)


def read_shape(reader):
    return tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]


def place(name, shape, number, start):
    if number not in KINDS:
        raise ValueError(f"{name} is of kind {number}; known: {', '.join(kind.name for kind in KINDS.values())}")
    kind, count = KINDS[number], math.prod(shape)
    if shape[-1] % kind.values:
        raise ValueError(f"a row of {name} has {shape[-1]} values, which are no whole blocks of {kind.values}")
    return Place(shape, number, (start, start + count // kind.values * kind.bytes))
