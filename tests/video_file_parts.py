"""Changed copies of a film, and the frame counters read back from it."""

import random
from pathlib import Path

import av

from rlaif_fast.video import decode
from rlaif_fast.video.testing import counter_frames, read_counter, write_video

H264 = {"codec": "libx264"}
MPEG4 = {"codec": "mpeg4"}


def whole_files(folder: Path) -> dict[str, Path]:
    """One whole file of 40 frames for each container."""
    kinds = {"mp4": H264, "webm": {}, "avi": MPEG4, "mkv": H264, "ts": H264, "mov": H264}
    return {
        ending: write_video(folder / f"good.{ending}", counter_frames(40), **how)
        for ending, how in kinds.items()
    }


def changed(source: Path, target: Path, change) -> Path:
    data = bytearray(source.read_bytes())
    change(data)
    target.write_bytes(data)
    return target


def scramble(source: Path, target: Path, packets) -> Path:
    """Overwrite the payload of the chosen packets with noise, leaving the container whole."""
    noise = random.Random(0)
    with av.open(str(source)) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]

    def change(data):
        for number, (start, size) in enumerate(places):
            if packets is None or number in packets:
                data[start + 12 : start + size] = noise.randbytes(size - 12)

    return changed(source, target, change)


def counters(path, indices):
    return [read_counter(f) for f in decode(str(path), indices)]
