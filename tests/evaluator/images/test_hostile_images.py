"""Images that were made to cost much: each is refused for what it is, or decoded, in little memory and time."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from atserving.errors import InvalidArgument
from evaluator.images import Pixels, decode
from evaluator.images.png_data import rows_bytes
from evaluator.limits import Limits

LIMITS = Limits()
SIDE = 64
# In a process of its own, so that one can say what it may take; Python and the libraries are in it already then.
DECODE = """
import math, resource, sys
from atserving.errors import InvalidArgument
from evaluator.images import decode
from evaluator.limits import Limits
import cv2
cv2.setNumThreads(1)
data = sys.stdin.buffer.read()
pages = int(open("/proc/self/statm").read().split()[0])
used = resource.getrusage(resource.RUSAGE_SELF)
memory = pages * resource.getpagesize() + (512 << 20)
seconds = math.ceil(used.ru_utime + used.ru_stime) + 1
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
try:
    print(decode(data, Limits()).shape)
except InvalidArgument as error:
    print(error)
"""


def answer(data: bytes) -> str:
    """What decoding comes to within 512 MiB and one to two seconds of one CPU."""
    assert len(data) <= LIMITS.max_bytes
    done = subprocess.run([sys.executable, "-c", DECODE], input=data, capture_output=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr.decode()[-500:]}"
    return done.stdout.decode().strip()


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(1).integers(0, 255, (height, width, channels), np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    *chunks: bytes, width: int = SIDE, height: int = SIDE, depth: int = 8, colour: int = 2, laced: int = 0
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, laced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


BLACK = chunk(b"IDAT", zlib.compress(bytes(SIDE * (SIDE * 3 + 1))))


def zeros(times: int) -> bytes:
    """A zlib stream, 1000 times as short, of so many times 16 MiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    # Adler's sums of zeros: 1, and how many they are (RFC 1950, 9).
    checksum = ((times << 24) % 65521 << 16) + 1
    return b"\x78\x01" + once * times + b"\x03\x00" + struct.pack(">I", checksum)


def segment(kind: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


def jpeg(*segments: bytes) -> bytes:
    """A small JPEG, with segments of one's own before the others."""
    plain: bytes = cv2.imencode(".jpg", noise(SIDE, SIDE))[1].tobytes()
    return plain[:2] + b"".join(segments) + plain[2:]


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive, black JPEG, whose scans each say of all blocks that there is nothing to add."""
    blocks = (side // 8) ** 2
    frame = struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])
    # A code of one bit: in the first scan of no difference, then of 2^14 blocks to skip, and more in 14 bits.
    tables = segment(0xC4, bytes([0, 1, *[0] * 15, 0])) + segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(math.ceil(blocks / 8))
    runs = "0" * 15 * math.ceil(blocks / (1 << 14))
    runs += "1" * (-len(runs) % 8)
    skip = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + int(runs, 2).to_bytes(len(runs) // 8, "big")
    head = b"\xff\xd8" + segment(0xDB, bytes([0, *[1] * 64])) + segment(0xC2, frame) + tables
    return head + first + skip * (scans - 1) + b"\xff\xd9"


@pytest.mark.parametrize("claimed", [0x10000000, 0x7FFFFFFF, 0xFFFFFFE0, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [b"IDAT", b"tEXt", b"iCCP"])
def test_a_png_chunk_is_not_longer_than_the_png(kind: bytes, claimed: int) -> None:
    data = png(struct.pack(">I", claimed) + kind + bytes(20))
    assert answer(data) == "the image can't be decoded: a PNG chunk is longer than the rest of the image's data"


@pytest.mark.parametrize("times", [32, 300])
def test_a_png_does_not_unpack_to_far_more_than_its_pixels(times: int) -> None:
    said = answer(png(chunk(b"IDAT", zeros(times))))
    # A few bytes of data can't take long, and are not looked at twice.
    assert said == (
        "(64, 64, 3)" if times == 32 else "the image can't be decoded: the PNG has far more data than pixels"
    )


def test_the_rows_of_a_png_count_as_much_as_they_are() -> None:
    most = png(chunk(b"IDAT", zeros(300)), width=4999, height=4999, depth=16, colour=6, laced=1)
    assert answer(most) == "the image can't be decoded: the PNG has far more data than pixels"
    for laced, width, height in ((0, 5, 3), (1, 5, 3), (1, 1, 1), (1, 8, 8), (1, 13, 11)):
        # libpng reads no fewer rows than these, and wants no more.
        for missing in (0, 1):
            packed = zlib.compress(bytes(rows_bytes(width, height, 24, bool(laced)) - missing))
            image = png(chunk(b"IDAT", packed), width=width, height=height, laced=laced)
            if missing:
                with pytest.raises(InvalidArgument, match="broken or cut short"):
                    decode(image, LIMITS)
            else:
                assert decode(image, LIMITS).shape == (height, width, 3)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_what_a_png_says_beside_its_pixels_is_not_unpacked(kind: bytes, behind: bool) -> None:
    start = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    bombs = chunk(kind, start + zlib.compress(bytes(1 << 20), 9)) * 9000
    assert answer(png(*((BLACK, bombs) if behind else (bombs, BLACK)))) == "(64, 64, 3)"


@pytest.mark.parametrize("kind", [b"teSt", b"tEXt", b"IDAT", b"fdAT"])
def test_a_png_of_very_many_chunks_is_refused(kind: bytes) -> None:
    with pytest.raises(InvalidArgument, match="the PNG has more than 10000 chunks"):
        decode(png(chunk(kind, b"") * 10_000, BLACK), LIMITS)
    assert decode(png(chunk(kind, b"") * 9_900, BLACK), LIMITS).shape == (SIDE, SIDE, 3)


def test_a_png_begins_with_its_header_and_ends() -> None:
    whole = png(BLACK)
    for data in (whole[:8] + BLACK + whole[8:], whole[:8] + chunk(b"IHDR", bytes(12)) + BLACK, whole[:20]):
        with pytest.raises(InvalidArgument, match="the PNG does not begin with its header"):
            decode(data, LIMITS)
    for cut in (1, 11, 12):
        with pytest.raises(InvalidArgument, match="the image can't be decoded"):
            decode(whole[:-cut], LIMITS)
    assert (decode(whole + b"PK and more", LIMITS) == 0).all()


def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="more than 1000 segments or 50 scans"):
        decode(jpeg_of_scans(SIDE, 51), LIMITS)
    assert "more than 1000 segments or 50 scans" in answer(jpeg_of_scans(4992, 2000))
    assert answer(jpeg_of_scans(4992, 50)) == "(4992, 4992, 3)"


def test_scans_are_counted_behind_what_looks_like_an_end() -> None:
    scans = jpeg_of_scans(SIDE, 51)
    place = scans.index(b"\xff\xda")
    for hidden in (segment(0xFE, b"\xff\xd9"), segment(0xE1, b"\xff\xd8\xff\xd9"), b"\xff\xd3", b"\xff" * 9 + b"\xd3"):
        with pytest.raises(InvalidArgument, match="more than 1000 segments or 50 scans"):
            decode(scans[:place] + hidden + scans[place:], LIMITS)
    # What other images a file holds behind the end is nobody's matter.
    assert decode(jpeg() + scans, LIMITS).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", [0xC4, 0xE1, 0xE9, 0xFE])
def test_a_jpeg_of_very_many_segments_is_refused(kind: int) -> None:
    with pytest.raises(InvalidArgument, match="more than 1000 segments or 50 scans"):
        decode(jpeg(segment(kind, b"") * 1000), LIMITS)
    assert decode(jpeg(segment(kind, b"") * 900), LIMITS).shape == (SIDE, SIDE, 3)


def test_one_exif_is_looked_at_not_all_of_them_joined() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first = segment(0xE1, exif.tobytes())
    wide = cv2.imencode(".jpg", noise(SIDE, 2 * SIDE))[1].tobytes()
    data = wide[:2] + first + segment(0xE1, b"Exif\0\0" + bytes(10_000)) * 900 + wide[2:]
    assert answer(data) == "(128, 64, 3)"
    joined = jpeg(first, segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 16, segment(0xE1, b"Exif\0\0x") * 200_000)
    assert "more than 1000 segments" in answer(joined)


def test_a_jpeg_may_be_padded() -> None:
    plain = jpeg()
    assert answer(plain[:2] + b"\xff" * (10_000_000) + plain[2:]) == "(64, 64, 3)"
    assert (decode(plain[:2] + b"\xff" * 1000 + plain[2:], LIMITS) == decode(plain, LIMITS)).all()


def test_a_jpeg_whose_segment_is_longer_than_it_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="broken or cut short"):
        decode(jpeg()[:-2] + b"\xff\xfe\xff\xff\xff\xd9", LIMITS)
    with pytest.raises(InvalidArgument, match="an invalid marker"):
        decode(jpeg(segment(0x30, b"")), LIMITS)


@pytest.mark.parametrize("blocks", [b"\x21\xfe" + b"\x01x" * 20_000 + b"\0", b"\x21\xfe\0" * 20_000])
def test_a_gif_of_very_many_blocks_is_refused(blocks: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(SIDE, SIDE)).quantize(256).save(buffer, "GIF")
    plain = buffer.getvalue()
    frame = 13 + 3 * 256
    assert plain[10] & 0x87 == 0x87
    with pytest.raises(InvalidArgument, match="the GIF has more than 10000 blocks before its first frame"):
        decode(plain[:frame] + blocks + plain[frame:], LIMITS)
    few = plain[:frame] + b"\x21\xfe\x05hello\0" * 100 + plain[frame:]
    assert (decode(few, LIMITS) == decode(plain, LIMITS)).all()


def plainly(data: bytes) -> Pixels:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert pixels is not None
    return pixels.astype(np.uint8, copy=False)


DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@pytest.mark.parametrize(("colour", "depth"), [(colour, depth) for colour in DEPTHS for depth in DEPTHS[colour]])
@pytest.mark.parametrize("laced", [0, 1])
def test_pngs_are_decoded_as_with_all_their_chunks(colour: int, depth: int, laced: int) -> None:
    bits = depth * SAMPLES[colour]
    random = np.random.default_rng(1)
    count = rows_bytes(SIDE, SIDE, bits, bool(laced))
    # Filters are 0 to 4, so all bytes are: small values, some of which are filters.
    pixels = chunk(b"IDAT", zlib.compress(random.integers(0, 5, count, np.uint8).tobytes()))
    palette = chunk(b"PLTE", random.bytes(3 << depth)) if colour == 3 else b""
    samples = 1 if colour in (0, 4) else 3
    behind_palette = {0: b"\0\1", 2: b"\0\1" * 3, 3: b"\0\x80"}
    before = [
        chunk(b"gAMA", struct.pack(">I", 100_000)),
        chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
        chunk(b"sBIT", bytes([max(1, min(depth, 8) - 2)] * (3 if colour == 3 else SAMPLES[colour]))),
        chunk(b"tEXt", b"a\0b"),
    ]
    background = chunk(b"bKGD", b"\0" if colour == 3 else b"\0\1" * samples)
    transparency = [chunk(b"tRNS", behind_palette[colour])] if colour in behind_palette else []
    data = png(*before, palette, *transparency, background, pixels, depth=depth, colour=colour, laced=laced)
    assert (decode(data, LIMITS) == plainly(data)).all()


@pytest.mark.parametrize("laced", [0, 1])
@pytest.mark.parametrize(("side", "depth", "colour"), [(700, 8, 2), (500, 16, 6), (1500, 8, 0), (4999, 8, 2)])
def test_pngs_of_much_data_are_decoded_as_they_are(side: int, depth: int, colour: int, laced: int) -> None:
    # The last one's rows are more than are kept. Filters are 0 to 4, so all bytes are; such packs to a third.
    count = rows_bytes(side, side, depth * SAMPLES[colour], bool(laced))
    rows = np.zeros(count, np.uint8)
    rows[: 2 << 20] = np.random.default_rng(1).integers(0, 5, min(count, 2 << 20), np.uint8)
    packed = zlib.compress(rows.tobytes(), 1)
    parts = [chunk(b"IDAT", packed[start : start + 50_000]) for start in range(0, len(packed), 50_000)]
    data = png(*parts, width=side, height=side, depth=depth, colour=colour, laced=laced)
    assert len(packed) > 1 << 19
    assert (decode(data, LIMITS) == plainly(data)).all()


def test_an_encoders_png_of_much_data_is_decoded_as_it_is() -> None:
    data: bytes = cv2.imencode(".png", noise(700, 700))[1].tobytes()
    assert len(data) > 1 << 20
    assert (decode(data, LIMITS) == noise(700, 700)).all()


@pytest.mark.parametrize("where", [0.01, 0.5, 0.999])
def test_a_large_png_that_is_damaged_is_refused(where: float) -> None:
    data = bytearray(cv2.imencode(".png", noise(700, 700))[1].tobytes())
    assert len(data) > 1 << 20
    data[int(len(data) * where)] ^= 0x55
    with pytest.raises(InvalidArgument, match="broken or cut short"):
        decode(bytes(data), LIMITS)


def saved(form: str, **options: object) -> Callable[[], bytes]:
    def save() -> bytes:
        buffer = io.BytesIO()
        image = Image.fromarray(cv2.GaussianBlur(noise(90, 120), (9, 9), 3))
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return save


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(saved("JPEG"), id="jpeg"),
        pytest.param(saved("JPEG", progressive=True), id="progressive jpeg"),
        pytest.param(saved("JPEG", restart_marker_rows=1, comment=b"\xff\xd9"), id="jpeg with restarts"),
        pytest.param(saved("PNG"), id="png"),
        pytest.param(saved("PNG", dpi=(72, 72)), id="png with dpi"),
        pytest.param(saved("WEBP"), id="webp"),
        pytest.param(saved("GIF"), id="gif"),
        pytest.param(saved("BMP"), id="bmp"),
    ],
)
def test_ordinary_images_are_decoded_as_by_opencv(save: Callable[[], bytes]) -> None:
    assert (decode(save(), LIMITS) == plainly(save())).all()


def bmp(width: int, bits: int, data: bytes, masks: tuple[int, ...] = (), header_bytes: int = 40) -> bytes:
    """Of one row; masks, of red, green and blue, are in the header where it is long, else behind it."""
    fields = struct.pack("<IiiHHIIiiII", header_bytes, width, 1, 1, bits, 3 if masks else 0, len(data), 0, 0, 0, 0)
    packed = struct.pack(f"<{len(masks)}I", *masks)
    header = fields + packed + bytes(max(0, header_bytes - len(fields) - len(packed)))
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + data


@pytest.mark.parametrize("header_bytes", [40, 108])
@pytest.mark.parametrize(
    ("bits", "masks", "values"),
    [
        (16, (0xF800, 0x07E0, 0x001F), [0xF800, 0x07E0, 0x001F, 0xFFFF]),
        (16, (0x7C00, 0x03E0, 0x001F), [0x7C00, 0x03E0, 0x001F, 0x7FFF]),
        (32, (0xFF0000, 0xFF00, 0xFF), [0xFF0000, 0xFF00, 0xFF, 0xFFFFFF]),
        (32, (0xFF000000, 0xFF0000, 0xFF00), [0xFF000000, 0xFF0000, 0xFF00, 0xFFFFFF00]),
    ],
)
def test_the_masks_of_a_bmp_count(bits: int, masks: tuple[int, ...], values: list[int], header_bytes: int) -> None:
    data = struct.pack("<4" + ("H" if bits == 16 else "I"), *values)
    pixels = decode(bmp(4, bits, data, masks, header_bytes), LIMITS)
    assert pixels.flags["C_CONTIGUOUS"]
    assert pixels.tolist() == [[[0, 0, 255], [0, 255, 0], [255, 0, 0], [255, 255, 255]]]


def test_five_bits_of_a_bmp_are_spread_to_eight() -> None:
    data = struct.pack("<4H", 0x7C00, 0x7FFF, 0x0010, 0)
    assert decode(bmp(4, 16, data), LIMITS).tolist() == [[[0, 0, 255], [255, 255, 255], [131, 0, 0], [0, 0, 0]]]


def test_a_bmp_of_odd_masks_or_cut_short_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="its header is broken, or its variant of the format is not supported"):
        decode(bmp(2, 32, bytes(8), (0x3FF00000, 0xFFC00, 0x3FF)), LIMITS)
    with pytest.raises(InvalidArgument, match="its data is broken or cut short"):
        decode(bmp(400, 16, bytes(200), (0xF800, 0x07E0, 0x001F)), LIMITS)
    with pytest.raises(InvalidArgument, match="6000x1 pixels, more than 4999x4999"):
        decode(bmp(6000, 16, bytes(12_000), (0xF800, 0x07E0, 0x001F)), LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "GIF"])
def test_what_is_cut_short_is_not_called_another_format(form: str) -> None:
    data = saved(form)()
    for end in range(16, len(data) - 2, max(1, len(data) // 40)):
        with pytest.raises(InvalidArgument, match="the image can't be decoded") as caught:
            decode(data[:end], LIMITS)
        assert "not a JPEG" not in str(caught.value)
