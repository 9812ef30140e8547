// The CPU kernels: C functions, no Python and no intrinsics. See kernels/native.py for the calls.
//
// Every kernel is compiled once for each instruction set (unit.h); the best one that the processor has is in use.
#include "kernels.h"

#include <algorithm>

namespace {

Level best_level() {
#ifdef TS_X86
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (wide) return AVX2;
#endif
    return BASELINE;
}

}  // namespace

int32_t level_in_use = best_level();

// The instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512.
TS_API int32_t ts_level() { return level_in_use; }

// Use at most this level from now on; -1 for the best.
TS_API void ts_force_level(int32_t most) {
    const int32_t best = best_level();
    level_in_use = most < 0 ? best : std::min(most, best);
}

TS_API void ts_mix(int64_t rows, int64_t width, int64_t experts, const void* const* logits, const int32_t* dtypes,
                   const int64_t* strides, const double* weights, const double* temperatures, int32_t log_linear,
                   const uint8_t* allowed, float* out) {
    TS_PICK(mix)(rows, width, experts, logits, dtypes, strides, weights, temperatures, log_linear, allowed, out);
}

TS_API void ts_mix_union(int64_t rows, int64_t experts, const void* const* logits, const int32_t* dtypes,
                         const int64_t* strides, const int64_t* widths, const double* weights, const double* temperatures,
                         int32_t log_linear, double floor, const uint8_t* const* allowed, int64_t size, const int32_t* ids,
                         int64_t segments, const int64_t* bounds, const uint64_t* patterns, int64_t twins,
                         const int32_t* twin, float* out) {
    TS_PICK(mix_union)(rows, experts, logits, dtypes, strides, widths, weights, temperatures, log_linear, floor, allowed,
                       size, ids, segments, bounds, patterns, twins, twin, out);
}

TS_API void ts_shape(int64_t rows, int64_t width, float* probabilities, const double* temperature, const int64_t* top_k,
                     const double* top_p, const double* min_p) {
    TS_PICK(shape)(rows, width, probabilities, temperature, top_k, top_p, min_p);
}

TS_API void ts_choose(int64_t rows, int64_t width, const float* probabilities, const double* uniforms,
                      const uint8_t* greedy, int64_t* tokens, double* log_probs) {
    TS_PICK(choose)(rows, width, probabilities, uniforms, greedy, tokens, log_probs);
}

TS_API void ts_prefix_mass(int64_t rows, int64_t width, int64_t tokens, int64_t every, const float* probabilities,
                           const int32_t* order, float* ordered, double* sums) {
    TS_PICK(prefix_mass)(rows, width, tokens, every, probabilities, order, ordered, sums);
}

TS_API void ts_softmax_masses(int64_t rows, int64_t count, int64_t tokens, const void* logits, int32_t dtype,
                              int64_t stride, const double* temperatures, const int32_t* order, float* ordered,
                              double* sums) {
    TS_PICK(softmax_masses)(rows, count, tokens, logits, dtype, stride, temperatures, order, ordered, sums);
}

TS_API void ts_score_linear(int64_t experts, int64_t particles, int64_t items, const float* masses, int64_t stride,
                            const double* weights, const int64_t* offsets, double* out) {
    TS_PICK(score_linear)(experts, particles, items, masses, stride, weights, offsets, out);
}

TS_API void ts_score_log_linear(int64_t experts, int64_t symbols, int64_t particles, int64_t items, const float* log_probs,
                                const int64_t* targets, const double* weights, const int64_t* offsets, double* out) {
    TS_PICK(score_log_linear)(experts, symbols, particles, items, log_probs, targets, weights, offsets, out);
}

TS_API void ts_pack_linear(int64_t inner, int64_t outputs, const float* weights, const int64_t* order, uint32_t* pairs) {
    TS_PICK(pack_linear)(inner, outputs, weights, order, pairs);
}

TS_API void ts_linear(int64_t rows, int64_t inner, int64_t outputs, const uint32_t* weights, const float* bias,
                      const float* inputs, float* out) {
    TS_PICK(linear)(rows, inner, outputs, weights, bias, inputs, out);
}

TS_API void ts_rms_norm(int64_t rows, int64_t width, const float* x, const float* gain, double epsilon, float* out) {
    TS_PICK(rms_norm)(rows, width, x, gain, epsilon, out);
}
