"""Builds the CPU kernels where there is a compiler; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "token_swarm/kernels/csrc"
LEVELS = ("baseline", "AVX2", "AVX-512")
"""As csrc/unit.h numbers them."""
FOR_ALL_LEVELS = ("dispatch", "walk")
"""Sources compiled once: they pick the version of a kernel at run time."""
SLOWEST = ("score_log_linear", "mix", "walk", "score_linear", "masses")
"""Sources that take longest to compile: they come first, so that no core waits for one of them at the end."""


class Unit(NamedTuple):
    """One call of the compiler: a source for one instruction set."""

    source: str
    level: int

    @property
    def title(self) -> str:
        """What is shown while it compiles."""
        name = Path(self.source).stem
        return name if name in FOR_ALL_LEVELS else f"{name} ({LEVELS[self.level]})"


def units(sources: list[str]) -> Iterator[Unit]:
    """What has to be compiled, in the order in which it is begun."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    for source in sorted(sources, key=lambda source: ranks.get(Path(source).stem, len(SLOWEST))):
        for level in range(1 if Path(source).stem in FOR_ALL_LEVELS else len(LEVELS)):
            yield Unit(source, level)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BuildKernels(build_ext):
    """Compiles every source for every instruction set, on all cores, and says how far it is."""

    def get_ext_filename(self, fullname: str) -> str:
        """No name of a Python version: ctypes loads the library, any Python can."""
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def build_extension(self, ext: Extension) -> None:
        """Compile and link `ext`. Raises a CompileError or LinkError, which `optional` makes a warning."""
        work = list(units(ext.sources))
        arguments = [*ext.extra_compile_args, "-g0"]  # Python's own flags ask for debugging information
        begun = iter(range(1, len(work) + 1))

        def compile_unit(unit: Unit) -> str:
            print(f"[{next(begun)}/{len(work)}] {unit.title}", flush=True)
            (built,) = self.compiler.compile(
                [unit.source],
                output_dir=str(Path(self.build_temp, f"level{unit.level}")),
                macros=[("TS_LEVEL", str(unit.level))],
                extra_postargs=arguments,
                depends=ext.depends,
            )
            return str(built)

        with ThreadPoolExecutor(available_cores()) as pool:
            compiled = [pool.submit(compile_unit, unit) for unit in work]
            try:
                objects = [each.result() for each in compiled]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # one error is enough
                raise
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=ext.extra_link_args, target_lang="c++"
        )


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: the kernels are a C library, not an extension module."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python 3 of any version, no ABI of Python's, this platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "token_swarm.kernels._native",
            sources=sorted(str(path) for path in Path(SOURCES).glob("*.cpp")),
            depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path(SOURCES).glob(pattern)),
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
                "-fvisibility=hidden",
                "-Wno-psabi",
            ],
            # A kernel that is declared but not compiled is an error here, not at the first call.
            extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
            # Without a compiler the install goes on; torch eager takes over and `token-swarm doctor` says so.
            optional=True,
        )
    ],
)
