"""Builds the CPU kernels where there is a compiler; everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, setup

PARTS = ["targets.inc", "simd.h", "mix.h", "sampling.h", "masses.h", "bytes.h"]
PARTS += ["score_linear.h", "score_log_linear.h", "union.h", "linear.h", "norm.h", "walk.h"]
SOURCES = "token_swarm/kernels/csrc"

setup(
    ext_modules=[
        Extension(
            "token_swarm.kernels._native",
            sources=[f"{SOURCES}/kernels.cpp"],
            depends=[f"{SOURCES}/{part}" for part in PARTS],
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
            # Without a compiler the install goes on; torch eager takes over and `token-swarm doctor` says so.
            optional=True,
        )
    ]
)
