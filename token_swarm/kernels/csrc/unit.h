// What every unit of the kernels starts with. A unit is one .cpp file compiled for one instruction set: TS_LEVEL is 0 for
// the baseline, 1 for AVX2, 2 for AVX-512, and its code stands in a namespace of that name. dispatch.cpp picks one.
//
// The instruction set is a pragma behind the standard headers rather than an option of the compiler: their functions stay
// baseline code, whichever unit's copy the linker keeps. (target_clones would not do either: GCC lowers vectors to the
// baseline's width inside helper functions before it inlines them into a clone.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

// TS_LANES: floats of a register. TS_STEPS: the floats that one instruction looks up in a register, 1 where there is none
// that does or, as in Clang, no portable name for it.
#if TS_LEVEL == 0
#define TS_NAMESPACE baseline
#define TS_LANES 8
#define TS_STEPS 1
#elif TS_LEVEL == 1
#define TS_NAMESPACE avx2
#define TS_LANES 8
#define TS_STEPS 8
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt")
#endif
#else
#define TS_NAMESPACE avx512
#define TS_LANES 16
#define TS_STEPS 16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif
#endif

#ifdef __clang__
#undef TS_STEPS
#define TS_STEPS 1
#endif
