"""One real slide beside the project, and what can be made of it: other formats, other scans."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SLIDE_MPP = 0.499


@pytest.fixture(scope="session")
def svs(shared: Path) -> Path:
    """Return the shared slide, 2220 x 2967 px at 0.499 µm/px, or skip."""
    pytest.importorskip("openslide", reason="the extra [slides] is not installed")
    path = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip("no slide beside the project")
    return path


@pytest.fixture(scope="session")
def pixels(svs: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the slide's finest level, [2967, 2220, 3]."""
    import openslide

    with openslide.OpenSlide(svs) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def write_pyramid(path: Path, levels: list[Any], *, mpp: float | None) -> Path:
    """Write a tiled TIFF with these levels, the finest first."""
    tifffile = pytest.importorskip("tifffile")
    stated = {}
    if mpp is not None:
        stated = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as out:
        for number, level in enumerate(levels):
            scale = 2**number
            if stated:
                stated["resolution"] = (1e4 / (mpp or 1) / scale, 1e4 / (mpp or 1) / scale)
            out.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(number > 0),
                **stated,
            )
    return path


def write_header(path: Path, width: int, height: int) -> Path:
    """Write a TIFF of this size without its pixels: for whoever looks at headers alone."""
    tags = b"".join(
        struct.pack("<HHLL", tag, 4, 1, value) for tag, value in ((256, width), (257, height))
    )
    path.write_bytes(b"II*\x00" + struct.pack("<LH", 8, 2) + tags + bytes(4))
    return path


def halved(image: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image at half the magnification, as a scanner makes it: averaged by area."""
    return np.asarray(Image.fromarray(image).reduce(2))


@pytest.fixture(scope="session")
def scans(
    svs: Path, pixels: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, str | None]]:
    """Return the same tissue as file and, where the file states no size, µm/px, by name."""
    folder = tmp_path_factory.mktemp("scans")
    half, quarter = halved(pixels), halved(halved(pixels))
    png = folder / "plain.png"
    Image.fromarray(pixels).save(png, compress_level=1)
    return {
        "svs": (svs, None),
        "one level": (write_pyramid(folder / "one.tif", [pixels], mpp=SLIDE_MPP), None),
        "three levels": (
            write_pyramid(folder / "three.tif", [pixels, half, quarter], mpp=SLIDE_MPP),
            None,
        ),
        "half the magnification": (
            write_pyramid(folder / "half.tif", [half, quarter], mpp=SLIDE_MPP * 2),
            None,
        ),
        "plain": (png, str(SLIDE_MPP)),
        "dicom": (write_dicom(folder / "slide.dcm", pixels[:2048, :2048], mpp=SLIDE_MPP), None),
    }


def write_dicom(path: Path, image: Any, *, mpp: float) -> Path:
    """Write one uncompressed level as a DICOM whole-slide instance (Supplement 145)."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    height, width, _ = image.shape
    side = 256
    tiles = [
        image[top : top + side, left : left + side].tobytes()
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    data = Dataset()
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    data.SOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.FrameOfReferenceUID = generate_uid()
    data.Modality = "SM"
    data.PatientID = data.PatientName = "phantom"
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.Rows = data.Columns = side
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
    data.TotalPixelMatrixFocalPlanes = 1
    data.NumberOfFrames = len(tiles)
    data.DimensionOrganizationType = "TILED_FULL"
    data.NumberOfOpticalPaths = 1
    data.InstanceNumber = 1
    measures = Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    measures.SliceThickness = 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = pydicom.Sequence([measures])
    data.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    optics = Dataset()
    optics.OpticalPathIdentifier = "1"
    data.OpticalPathSequence = pydicom.Sequence([optics])
    data.PixelData = b"".join(tiles)
    data["PixelData"].VR = "OB"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = data.SOPClassUID
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta = meta
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path
