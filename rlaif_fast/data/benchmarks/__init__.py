"""Published benchmarks, read from the files that their authors ship.

| name             | files in the folder                                     | videos                              |
|------------------|---------------------------------------------------------|-------------------------------------|
| `videomme`       | `test-*.parquet` or JSON; `subtitle/{videoID}.srt`       | `{videoID}`                         |
| `nextqa`         | `MC/test-*.parquet`, `test.csv`; `map_vid_vidorID.json` | `{video}`, or as the map says       |
| `mvbench`        | `json/{task}.json`                                      | `video` of the row; folders of frames |
| `msvd_qa`        | `test_qa.json`, or as below; `youtube_mapping.txt`      | as the mapping says, `vid{video_id}` |
| `msrvtt_qa`      | `test_qa.json`, or as below                             | `video{video_id}`                   |
| `activitynet_qa` | `test_q.json` with `test_a.json`                        | `v_{video_name}`                    |
| `jsonl`          | `*.jsonl` in any format of `data.converters`            | as the rows say                     |

"As below" are the evaluation packs of Video-ChatGPT and Video-LLaVA, whose rows hold the `video_name` itself.
Videos are found by name anywhere below the folder, whatever their suffix.
"""

from rlaif_fast.data.benchmarks.base import Benchmark, Item
from rlaif_fast.data.benchmarks.registry import BENCHMARKS, read_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "Item", "read_benchmark"]
