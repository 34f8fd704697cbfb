"""How a player turns a decoded frame, by the display matrix that FFmpeg attaches to it."""

from __future__ import annotations

import struct
from typing import Any

from rlaif_fast.video.container import BadVideo

MOST_KINDS = 64  # of side data, by FFmpeg's number; it has half as many


def rotation(frame: Any) -> int:
    """Degrees clockwise: 0, 90, 180 or 270.

    Raises:
        BadVideo: It is another angle.
    """
    clockwise = -frame.rotation % 360
    if clockwise % 90:
        raise BadVideo(f"the display rotation of {clockwise} degrees is not a multiple of 90")
    return clockwise


def mirrored(frame: Any) -> bool:
    """Whether the display matrix of a frame mirrors it; FFmpeg's angle then applies after a vertical flip."""
    try:
        side_data = frame.side_data
    except ValueError:
        # PyAV reads none of it if FFmpeg attached a kind that PyAV does not know: EXIF, the views of a 3D film.
        side_data = _without_unknown_side_data(frame).side_data
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return a * d < b * c


def _without_unknown_side_data(frame: Any) -> Any:
    from av.filter import Graph
    from av.sidedata.sidedata import Type

    graph = Graph()
    last = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    unknown = set(range(MOST_KINDS)) - {kind.value for kind in Type}
    steps = [("sidedata", f"mode=delete:type={number}") for number in unknown]
    for step in (*steps, ("buffersink",)):
        following = graph.add(*step)
        last.link_to(following)
        last = following
    graph.configure()
    graph.push(frame)
    return graph.pull()
