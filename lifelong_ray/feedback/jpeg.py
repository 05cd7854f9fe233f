"""The part of a JPEG that its picture needs, cut out without decoding anything.

Sources: ITU-T T.81, annex B (markers and segments); ITU-T T.871 (JFIF); ITU-T T.872, 6.5.3 (Adobe's
segment). What libjpeg makes of those two decides the colour space here as well. Knows nothing of
decoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SOI = b"\xff\xd8"
_FILL = b"\xff"
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive; Huffman coding
_TABLES = frozenset({0xC4, 0xDB, 0xDD})  # Huffman, quantisation, restart interval
_SCAN, _END = 0xDA, 0xD9
_APP0, _APP14 = 0xE0, 0xEE
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})  # applications' and comments

_MARKER = re.compile(rb"\xff++([^\xff\x00])")  # any number of fill bytes before it
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither data, nor restart, nor fill
_MOST_SEGMENTS = 1_000  # A progressive JPEG with a profile and a preview has some 50.

_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00%c"
_ADOBE_BYTES = 16


def picture_alone(data: bytes) -> bytes | None:
    """Return a JPEG that shows the first picture of `data` and holds nothing else.

    Tables, frame and scans stay as they are, byte by byte. Where libjpeg would see the segments of
    JFIF and Adobe, which say how colours are meant, fresh ones stand. Position, time and camera,
    thumbnails, profiles, comments, further pictures and trailing bytes stay behind.

    Takes time in proportion to the bytes, whatever they are. Whether the picture can be decoded is
    not looked at.

    Args:
        data: Any bytes.

    Returns:
        None if they are no JPEG of 8 bits with 1 or 3 components in Huffman coding, or not put
        together as T.81 wants.
    """
    pieces: list[bytes] = []
    colours: dict[int, bytes] = {}
    has_frame = has_scan = False
    for marker, segment in _segments(data):
        if marker == _END and has_scan:
            return b"".join((_SOI, *colours.values(), *pieces, segment))
        if marker in _METADATA:
            if not has_scan:  # Later ones come too late to say anything of colours.
                colours |= _colours(marker, segment)
            continue
        if marker in _FRAMES and not has_frame and _is_usual(segment):
            has_frame = True
        elif marker == _SCAN and has_frame:
            has_scan = True
        elif marker not in _TABLES:
            return None
        pieces.append(segment)
    return None


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers with their segments, a scan's data included; stops where they are not well formed."""
    if not data.startswith(_SOI):
        return
    at = len(_SOI)
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.match(data, at)
        if found is None:
            return
        marker, first = found[1][0], found.end()
        length = int.from_bytes(data[first : first + 2], "big") if marker != _END else 0
        at = first + length
        if at > len(data) or (length < 2 and marker != _END):
            return
        segment = data[first - 2 : at]
        if marker == _SCAN:
            end = _AFTER_SCAN.search(data, at)
            if end is None:
                return
            segment += data[at : end.start()].rstrip(_FILL)
            at = end.start()
        yield marker, segment


def _is_usual(frame: bytes) -> bool:
    if len(frame) < 10:
        return False
    bits, height, components = frame[4], frame[5:7], frame[9]
    # Without a height the file says it after the first scan, which hardly any decoder reads.
    is_whole = len(frame) == 10 + 3 * components and height != b"\0\0"
    return bits == 8 and components in {1, 3} and is_whole


def _colours(marker: int, segment: bytes) -> dict[int, bytes]:
    """A fresh segment in place of one that libjpeg takes notice of."""
    if marker == _APP0 and len(segment) >= len(_JFIF) and segment.startswith(b"JFIF\0", 4):
        return {marker: _JFIF}
    if marker == _APP14 and len(segment) >= _ADOBE_BYTES and segment.startswith(b"Adobe", 4):
        return {marker: _ADOBE % segment[_ADOBE_BYTES - 1]}
    return {}
