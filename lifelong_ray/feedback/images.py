"""From untrusted bytes to clean pixels, and from pixels to what a model takes.

Bounds come before work: the body's size, then the size its header claims, then the decoder.
What leaves is pixels, or a JPEG cut down to what its picture needs (`jpeg`), so that metadata (a
GPS position), further frames and trailing bytes stay behind. Knows nothing of HTTP or models.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lifelong_ray.config import ImageConfig
from lifelong_ray.feedback.jpeg import picture_alone
from lifelong_ray.types import BadImageError, ConfigError, Pixels

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HASHED_ALONE = 2_047  # Bytes that hashlib hashes without letting other threads run.
_THUMBNAIL_BYTES = 4_096
_QUICK_BYTES = 32_768  # Of an encoded image that is decoded in about a millisecond.
_QUICK_PIXEL_BYTES = 1_000_000
_AS_JPEG = ("JPEG", "MPO")  # What Pillow calls one, and one with further pictures behind it.
_OTHER_MIME = {"JPEG": ("image/jpg", "image/pjpeg"), "BMP": ("image/x-ms-bmp", "image/x-bmp")}


def decode_image(data: bytes, content_type: str | None, limits: ImageConfig) -> Pixels:
    """Return the first frame, upright, as grey or RGB.

    Transparent parts are laid on white. A colour image whose channels are all equal becomes
    grey, so that the same picture has the same content hash either way.

    Args:
        data: The request body.
        content_type: What the sender says it is; None, empty and
            ``application/octet-stream`` say nothing.
        limits: Bounds and accepted formats.

    Raises:
        BadImageError: With code ``empty_body``, ``body_too_large``,
            ``unsupported_media_type``, ``not_an_image``, ``too_many_pixels`` or
            ``truncated_image``.
    """
    return _decoded(data, content_type, limits)[0]


def _decoded(data: bytes, content_type: str | None, limits: ImageConfig) -> tuple[Pixels, bool]:
    """The pixels, and whether a JPEG shows them as they are, without being turned."""
    if not data:
        raise BadImageError("empty_body", "the body is empty; send the bytes of one image")
    if len(data) > limits.max_bytes:
        raise BadImageError(
            "body_too_large",
            f"the image has {len(data)} bytes; at most {limits.max_bytes} are accepted",
            status=413,
        )
    accepted = _mime_types(limits.formats)
    declared = (content_type or "").partition(";")[0].strip().lower()
    if declared not in {"", "application/octet-stream", "image/*"} and declared not in accepted:
        raise BadImageError(
            "unsupported_media_type",
            f"content type {declared[:80]!r} is not accepted; send one of {', '.join(accepted)}",
            status=415,
        )
    image, upright = _loaded(data, limits)
    return _pixels(upright), upright is image and image.format in _AS_JPEG


def _loaded(data: bytes, limits: ImageConfig) -> tuple[Image.Image, Image.Image]:
    """The image as it lies in the bytes, and upright: the same one if it lies so."""
    formats = ", ".join(limits.formats)
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("more pixels than any decoder takes", limits) from None
    except Exception:  # noqa: BLE001 - decoders fail in many ways on hostile bytes
        raise BadImageError(
            "not_an_image", f"the body is not an image in one of the formats {formats}"
        ) from None
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _too_many_pixels(f"{width} x {height} pixels", limits)
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        return image, image if turn is None else image.transpose(turn)
    except Exception:  # noqa: BLE001 - as above
        raise BadImageError(
            "truncated_image", f"the {image.format} image is cut short or damaged"
        ) from None


def _too_many_pixels(found: str, limits: ImageConfig) -> BadImageError:
    return BadImageError(
        "too_many_pixels",
        f"the image claims {found}; at most {limits.max_pixels} are accepted",
        status=413,
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - broken metadata does not make the picture unusable
        return 1


def _pixels(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):  # 16 bits a pixel
        wide = np.asarray(image).astype(np.int64)
        narrow: Pixels = np.clip(wide >> 8, 0, 255).astype(np.uint8)[:, :, None]
        return narrow
    if image.mode in {"1", "L"}:
        return np.array(_in_mode(image, "L"))[:, :, None]
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", clear.size, "white")
        image.alpha_composite(clear)
    rgb = np.array(_in_mode(image, "RGB"))
    # The first row tells most colour images, without a look at the rest.
    return np.ascontiguousarray(rgb[..., :1]) if _is_grey(rgb[:1]) and _is_grey(rgb) else rgb


def _is_grey(rgb: Pixels) -> bool:
    return bool((rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all())


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    # Pillow would make a copy, and let another thread run meanwhile, which costs more than a
    # thumbnail's decoding.
    return image if image.mode == mode else image.convert(mode)


@lru_cache
def _mime_types(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    unknown = sorted(set(formats) - set(Image.OPEN))
    if unknown or not formats:
        raise ConfigError(
            f"images.formats has {unknown or 'nothing'}; "
            f"Pillow reads {', '.join(sorted(Image.OPEN))}"
        )
    found = [Image.MIME.get(name, f"image/{name.lower()}") for name in formats]
    return (*found, *(mime for name in formats for mime in _OTHER_MIME.get(name, ())))


@dataclass(frozen=True, eq=False)
class CleanImage:
    """An image that holds its picture and nothing else, in few bytes, and its name.

    Attributes:
        content_hash: As `content_hash` gives it for the pixels.
        kept: The pixels, (height, width, 1 or 3), uint8; or a JPEG that decodes to them, as
            `picture_alone` makes it.
    """

    content_hash: str
    kept: Pixels | bytes

    @staticmethod
    def of(pixels: Pixels, jpeg: bytes | None = None) -> CleanImage:
        """Name some pixels, and keep the JPEG they come from if it is smaller."""
        kept = pixels if jpeg is None or len(jpeg) >= pixels.nbytes else jpeg
        return CleanImage(content_hash(pixels), kept)

    @property
    def jpeg(self) -> bytes | None:
        """What is kept, where that is a JPEG."""
        return self.kept if isinstance(self.kept, bytes) else None

    @property
    def pixels(self) -> Pixels:
        """(height, width, 1 or 3), uint8; decoded each time where a JPEG is kept.

        Raises:
            ValueError: If that is damaged.
        """
        return decode_jpeg(self.kept) if isinstance(self.kept, bytes) else self.kept

    @property
    def size_bytes(self) -> int:
        """How much is kept."""
        return len(self.kept) if isinstance(self.kept, bytes) else self.kept.nbytes


class SentImage:
    """An image as it was sent: worked on once, wherever that is needed first.

    Attributes:
        data: Its bytes, unchecked; empty where pixels were sent.
        content_type: What the sender says they are.
    """

    __slots__ = ("_clean", "_input", "_limits", "_pixels", "content_type", "data")

    def __init__(self, data: bytes, content_type: str | None, limits: ImageConfig) -> None:
        """Take unchecked bytes; see `decode_image`."""
        self.data = data
        self.content_type = content_type
        self._limits = limits
        self._pixels: Pixels | None = None
        self._clean: CleanImage | None = None
        self._input: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, pixels: Pixels | CleanImage) -> SentImage:
        """Take what needs no checking."""
        image = cls(b"", None, ImageConfig())
        if isinstance(pixels, CleanImage):
            image.become(pixels)
        else:
            image._pixels = pixels
        return image

    @property
    def is_quick(self) -> bool:
        """Whether there is little to do yet, less than other images should wait for."""
        if self._input is not None:
            return True
        if self._pixels is not None:
            return self._pixels.nbytes <= _QUICK_PIXEL_BYTES
        return self._encoded_bytes <= _QUICK_BYTES

    def clean(self) -> CleanImage:
        """Return what is kept of it, and its name.

        Raises:
            BadImageError: If it is not an acceptable image.
        """
        if self._clean is None:
            jpeg = None
            if self._pixels is None:
                self._pixels, shown = _decoded(self.data, self.content_type, self._limits)
                jpeg = picture_alone(self.data) if shown else None
            self._clean = CleanImage.of(self._pixels, jpeg)
        return self._clean

    def become(self, clean: CleanImage) -> None:
        """Take what another process has made of it."""
        self._clean = clean
        self._pixels = clean.pixels if clean.jpeg is None else None

    @property
    def is_worth_a_thread(self) -> bool:
        """Whether another thread, which costs some 0.1 ms, would do what is left in less time."""
        return not self.is_decoded and self._encoded_bytes > _THUMBNAIL_BYTES

    @property
    def is_decoded(self) -> bool:
        """Whether its pixels, or what a model takes, are here."""
        return self._pixels is not None or self._input is not None

    @property
    def _encoded_bytes(self) -> int:
        return len(self.data) if self._clean is None else self._clean.size_bytes

    @property
    def is_clean(self) -> bool:
        """Whether `clean` has nothing left to do."""
        return self._clean is not None

    @property
    def content_hash(self) -> str:
        """The name of its pixels; raises as `clean` does."""
        return self.clean().content_hash

    def model_input(self, size: int, channels: int) -> NDArray[np.uint8]:
        """Return what a model of this size takes; see `to_model_input`.

        Raises:
            BadImageError: If it is not an acceptable image.
        """
        if self._input is None or self._input.shape != (channels, size, size):
            clean = self.clean()
            pixels = clean.pixels if self._pixels is None else self._pixels
            self._input = to_model_input(pixels, size, channels)
        return self._input


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """What a model needs of an image whose pixels stay where they are.

    Attributes:
        content_hash: The name of its pixels.
        prepared: As `to_model_input` gives it.
    """

    content_hash: str
    prepared: NDArray[np.uint8]

    def model_input(self, size: int, channels: int) -> NDArray[np.uint8]:
        """Return what was prepared.

        Raises:
            ValueError: If it was prepared for another model.
        """
        if self.prepared.shape != (channels, size, size):
            raise ValueError(
                f"the image was prepared as {self.prepared.shape}, not {(channels, size, size)}"
            )
        return self.prepared


def content_hash(pixels: Pixels) -> str:
    """Return the SHA-256 (hex) of shape and bytes: the name of an image in the log.

    >>> content_hash(np.zeros((1, 2, 1), np.uint8)) == content_hash(np.zeros((2, 1, 1), np.uint8))
    False
    """
    _check(pixels)
    digest = hashlib.sha256("x".join(map(str, pixels.shape)).encode() + b":")
    data = pixels.tobytes()
    # Beyond `_HASHED_ALONE` other threads run meanwhile: good for a large image, and for a small
    # one it takes longer to get the interpreter back than to hash.
    step = _HASHED_ALONE if len(data) <= 8 * _HASHED_ALONE else len(data)
    for first in range(0, len(data), step):
        digest.update(data[first : first + step])
    return digest.hexdigest()


def encode_png(pixels: Pixels) -> bytes:
    """Return a PNG with exactly these pixels and nothing else."""
    _check(pixels)
    buffer = io.BytesIO()
    _to_pillow(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(png: bytes) -> Pixels:
    """Return the pixels of a PNG that `encode_png` made; for our own bytes only."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        array = np.array(image)
    return array[:, :, None] if array.ndim == 2 else array


def decode_jpeg(jpeg: bytes) -> Pixels:
    """Return the pixels of a JPEG that `picture_alone` made of one that was decoded before.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return _pixels(image)
    except Exception as error:  # noqa: BLE001 - as in `_loaded`
        raise ValueError(f"the JPEG of {len(jpeg)} bytes is damaged: {error}") from None


def to_model_input(pixels: Pixels, size: int, channels: int) -> NDArray[np.uint8]:
    """Return what models take, the same for serving and training.

    Scaled to a square without keeping the aspect ratio, bilinear with antialiasing; colour
    becomes grey by ITU-R 601 luma, grey becomes colour by repetition.

    Args:
        pixels: Shape (height, width, 1 or 3).
        size: Height and width wanted.
        channels: 1 or 3.

    Returns:
        Shape (channels, size, size), contiguous.
    """
    _check(pixels)
    if channels not in {1, 3}:
        raise ValueError(f"channels is {channels}; 1 (grey) and 3 (colour) are known")
    if pixels.shape[:2] == (size, size) and pixels.shape[2] == channels:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    image = _to_pillow(pixels)
    if channels == 1 and image.mode != "L":
        image = image.convert("L")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    array = np.array(image)
    if array.ndim == 2:
        return np.repeat(array[None], channels, axis=0)
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _to_pillow(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _check(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in {1, 3}:
        raise ValueError(
            f"pixels have shape {pixels.shape} and type {pixels.dtype}; "
            "(height, width, 1 or 3) of uint8 is wanted"
        )
