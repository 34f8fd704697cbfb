"""A real `vllm serve` on a CPU, started as docs/engines.md says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

WORKER = "rlaif_fast.rollout.vllm.worker.WeightUpdates"
LIMIT = 1200  # seconds until it answers; the first start compiles
ON_A_CPU = ["--enforce-eager", "--block-size=32", f"--kv-cache-memory-bytes={1 << 28}"]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class VllmServer:
    """Runs while the block does; `kill` ends it as a machine that fails would.

    Args:
        model: Folder of the model.
        log: File of what it prints.
        port: Where it listens.
    """

    def __init__(self, model: Path, log: Path, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        words = [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(model)),
            *("--host=127.0.0.1", f"--port={self.port}", "--enable-scale-out"),
            *(f"--worker-extension-cls={WORKER}", "--logprobs-mode=processed_logprobs"),
            *("--no-mm-device-do-normalize", "--skip-mm-profiling", "--generation-config=vllm"),
            *("--dtype=float32", "--max-model-len=1024", "--max-num-seqs=64", *ON_A_CPU),
        ]
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
                start_new_session=True,
            )

    @property
    def group(self) -> int:
        """The processes of the server."""
        return self._process.pid

    def __enter__(self) -> VllmServer:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return self
            time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"vllm serve did not begin to answer: {self._log.read_text()[-2000:]}")

    def __exit__(self, *error) -> None:
        self.kill()

    def kill(self) -> None:
        """End all its processes at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()
