"""Adobe RGB (1998) as an ICC profile, for images that name it in their EXIF block and embed none, as cameras write them."""

import functools
import struct

_D50 = (0.9642, 1.0, 0.8249)
_RED, _GREEN, _BLUE = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
"""XYZ of the primaries seen under D50 (Adobe RGB (1998) Color Image Encoding, annex C)."""

_GAMMA = 563  # of 256: 2.19921875


@functools.cache
def profile() -> bytes:
    """Return the profile (ICC, version 2)."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, _GAMMA) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 10) + b"Adobe RGB\0" + bytes(78), b"wtpt": _xyz(_D50)}
    tags |= {b"rXYZ": _xyz(_RED), b"gXYZ": _xyz(_GREEN), b"bXYZ": _xyz(_BLUE)}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, data, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    header = struct.pack(">4sI4s4s4s", b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    whole = header + _xyz(_D50)[8:] + bytes(48) + table + data
    return struct.pack(">I", len(whole) + 4) + whole


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)
