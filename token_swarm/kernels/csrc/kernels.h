// The kernels as their callers see them: TS_PICK(name) is the version for the instruction set in use.
#pragma once

#include <cstdint>

#define TS_API extern "C" __attribute__((visibility("default")))

namespace baseline {
#include "kernels.inc"
}

enum Level : int32_t { BASELINE, AVX2, AVX512 };

// In use: what the processor has, or less where a caller asked for less. dispatch.cpp sets it.
extern int32_t level_in_use;

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TS_X86 1

namespace avx2 {
#include "kernels.inc"
}
namespace avx512 {
#include "kernels.inc"
}

template <class F>
inline F* pick(F* plain, F* wide, F* widest) {
    return level_in_use == AVX512 ? widest : level_in_use == AVX2 ? wide : plain;
}
#define TS_PICK(name) pick(baseline::name, avx2::name, avx512::name)
#else
#define TS_PICK(name) baseline::name
#endif
