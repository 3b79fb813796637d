"""What a file is that is no image, from its first bytes."""

from __future__ import annotations

# As many bytes tell what a file is.
HEAD = 1024
DOWNLOAD_AGAIN = "download the image again"
REPLACE = "replace the file, or drop such records with --on-bad-sample skip"
NAME_AN_IMAGE = "name an image, or drop such records with --on-bad-sample skip"

# First bytes, what the file is, what to do.
SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, the image is not here", "run: git lfs pull"),
    (b"%PDF", "a PDF", "render its pages, e.g. with pdftoppm -png, and name the images"),
    (b"%!PS", "PostScript", "render it to PNG, and name that"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and name the image in it"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it, and name the images in it"),
    (b"\xff\x0a", "JPEG XL", "convert it to JPEG or PNG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL", "convert it to JPEG or PNG"),
    (b"\x93NUMPY", "a NumPy array", "save it as PNG"),
    (b"{", "JSON, perhaps the error of a download", DOWNLOAD_AGAIN),
)
# Marks of ISO media files, after "ftyp".
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# How files of the usual image formats start.
IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def what_it_is(head: bytes, size: int) -> tuple[str, str]:
    """What was found instead of an image that Pillow opens, and what to do.

    Args:
        head: the first bytes of the file, as many as HEAD.
        size: of the whole file, in bytes.
    """
    if head.startswith(IMAGES):
        return "not a whole image (its first bytes are cut off or damaged)", REPLACE
    if _is_heic(head):
        return "HEIC", "pip install 'vlft[heif]', or convert it to JPEG"
    return other_kind(head, size) or ("not an image of a known format", NAME_AN_IMAGE)


def other_kind(head: bytes, size: int) -> tuple[str, str] | None:
    """What a file is, if its first bytes say that it is no image, and what to do."""
    if not size:
        return "an empty file", "copy or download it again"
    if not head.strip(b"\0"):
        return "zeros alone, so it was not written whole", DOWNLOAD_AGAIN
    for start, found, hint in SIGNATURES:
        if head.startswith(start):
            return found, hint
    return _text(head) or _media(head)


def _text(head: bytes) -> tuple[str, str] | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text:
        return "an SVG drawing", "render it to PNG, and name that"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, so a download failed", DOWNLOAD_AGAIN
    if text.startswith(b"<?xml"):
        return "XML, perhaps the error of a download", DOWNLOAD_AGAIN
    return None


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in HEIC


def _media(head: bytes) -> tuple[str, str] | None:
    if head[4:8] == b"ftyp" and head[8:12] not in (*HEIC, b"avif", b"avis"):
        return "a video", "save the frames that matter as images"
    if head[128:132] == b"DICM":
        return "a DICOM file", "convert it to PNG of 8 bits"
    return None
