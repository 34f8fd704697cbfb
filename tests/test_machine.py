"""What the machine says of itself."""

import platform
import subprocess
import sys

from rlaif_fast.machine import cores, keep_freed_memory, peak_rss_bytes


def test_allocator_setting_is_taken_on_glibc():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_cores():
    assert cores() >= 1


def test_peak_memory_is_the_process_s_own():
    """A small process that a large one starts must not show the large one's peak."""
    held = bytearray(300 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])  # touch every page
    code = "from rlaif_fast.machine import peak_rss_bytes; print(peak_rss_bytes())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_rss_bytes() > len(held)
    assert 2**20 < int(answer.stdout) < len(held)
