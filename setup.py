"""Builds the extension rlaif_fast._C: the C++ kernels always, the CUDA ones where torch has CUDA and nvcc is found.

RLAIF_FAST_EXT=0 skips it: a CPU then runs the plain PyTorch references, a GPU the Triton kernels. RLAIF_FAST_EXT=cpu
builds the C++ kernels alone, where nvcc is of another CUDA version than torch. TORCH_CUDA_ARCH_LIST overrides the CUDA
architectures, MAX_JOBS the number of parallel compilers. An extension that was built in this folder from the same
sources, torch and flags is reused. The metadata is in pyproject.toml.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.sdist import sdist

CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"

# One object of row kernels per instruction set, so that one build runs on any processor of its family
# (csrc/cpu/row_kernels.h).
X86_INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
CXX_FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    # Many Pythons pass on their own -g: twice the compile time, 16 MB instead of 1. CFLAGS=-g asks for it.
    *([] if "-g" in os.environ.get("CFLAGS", "").split() else ["-g0"]),
]

# Where an editable install leaves the extension, and digests of what it was built from and of the file itself.
BUILT = Path("rlaif_fast", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
STAMP = Path("rlaif_fast", "_C.stamp")


def digest(*parts: object) -> str:
    """Return one hash of texts and of the contents of files."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        whole.update(len(content).to_bytes(8, "big") + content)
    return whole.hexdigest()


def name_toolkit() -> None:
    """Set CUDA_HOME to the toolkit of the nvcc on the PATH.

    torch takes the folder above nvcc's. If that nvcc is a script that calls another, the libraries are elsewhere.
    """
    nvcc = shutil.which("nvcc")
    if nvcc and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        plan = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        found = re.search(r"^#\$ TOP=(.*\S)", plan.stderr, re.MULTILINE)
        if found and Path(found[1], "bin", "nvcc").exists():
            os.environ["CUDA_HOME"] = str(Path(found[1]).resolve())


def build_arguments() -> dict:
    """Return what setup() needs to build the extension, or nothing where it is not to be built."""
    kinds = ("1", "cpu", "0")
    kind = os.environ.get("RLAIF_FAST_EXT") or "1"
    if kind not in kinds:
        raise SystemExit(f"RLAIF_FAST_EXT: expected one of {', '.join(kinds)}, got {kind!r}")
    if kind == "0":
        return {}
    name_toolkit()  # before torch reads it
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
    with_cuda = kind != "cpu" and torch.version.cuda is not None and CUDA_HOME is not None
    macros = [("RLAIF_X86_KERNELS", None)] if x86 else []
    sources = [
        "csrc/module.cpp",
        "csrc/cpu/decode_layer.cpp",
        "csrc/cpu/rank_penalty.cpp",
        "csrc/cpu/row_ops.cpp",
        "csrc/cpu/token_loss.cpp",
    ]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += ["csrc/cuda/rank_penalty.cu", "csrc/cuda/row_loss.cu"]
        macros += [
            ("RLAIF_WITH_CUDA", None),
            ("RLAIF_CUDA_VERSION", torch.version.cuda),
            ("RLAIF_CUDA_ARCHITECTURES", os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")),
        ]

    def inputs() -> str:
        files = sorted(path for path in Path("csrc").rglob("*") if path.is_file())
        return digest(
            torch.__version__, sys.version, macros, CUDA_HOME, Path("setup.py"), *files, *map(str, files)
        )

    class Build(BuildExtension):
        """Compiles the row kernels once for each instruction set before the rest, or nothing where nothing changed."""

        def run(self) -> None:
            built = STAMP.exists() and BUILT.exists()
            if built and STAMP.read_text().split() == [inputs(), digest(BUILT)] and not self.force:
                target = Path(self.get_ext_fullpath("rlaif_fast._C"))
                if target.resolve() != BUILT.resolve():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(BUILT, target)
                return
            super().run()
            if BUILT.exists():
                STAMP.write_text(f"{inputs()} {digest(BUILT)}\n")

        def build_extensions(self) -> None:
            standard = ["-std=c++20" if torch.__version__ >= (2, 10) else "-std=c++17"]
            sets = {"default": [], **(X86_INSTRUCTION_SETS if x86 else {})}
            (extension,) = self.extensions

            def objects_of(name: str) -> list[str]:
                return self.compiler.compile(
                    [f"csrc/cpu/row_kernels_{name}.cpp"],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_postargs=[
                        *CXX_FLAGS,
                        *standard,
                        *sets[name],
                        f"-DCPU_CAPABILITY={name.upper()}",
                        f"-DCPU_CAPABILITY_{name.upper()}",
                    ],
                )

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as compilers:
                for objects in compilers.map(objects_of, sets):
                    extension.extra_objects += objects
            super().build_extensions()

    extension = (CUDAExtension if with_cuda else CppExtension)(
        "rlaif_fast._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-Xptxas", "-v"]},
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


class Sources(sdist):
    """Includes all of csrc: another machine may compile more of it. Leaves out tests: they need the whole checkout."""

    def make_distribution(self) -> None:
        self.filelist.graft("csrc")
        self.filelist.prune("tests")
        super().make_distribution()


arguments = build_arguments()
rooms = find_namespace_packages(include=["rlaif_fast", "rlaif_fast.*"], exclude=["*.__pycache__"])
setup(
    packages=[*rooms, "rlaif_fast_configs", "rlaif_fast_kernels"],
    ext_modules=arguments.get("ext_modules"),
    cmdclass={"sdist": Sources} | arguments.get("cmdclass", {}),
)
