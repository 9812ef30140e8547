// Token laws in the order of their bytes, with float64 sums from which the mass of any interval of tokens follows.
#include "unit.h"

namespace TS_NAMESPACE {
#include "intervals.h"
#include "powers.h"

TS_INLINE QuadDoubles masked(QuadDoubles x, const uint64_t* mask) {
    QuadLongs bits, kept;
    std::memcpy(&bits, &x, sizeof bits);
    std::memcpy(&kept, mask, sizeof kept);
    bits &= kept;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Mass of the sorted tokens before one of them.
template <class T>
TS_INLINE double mass_before(const T* masses, const double* sums, uint64_t tokens, uint64_t token) {
    static_assert(STRIDE == 8);
    static const uint64_t before[2 * STRIDE] = {~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull};
    const uint64_t stride = token / STRIDE, place = token % STRIDE;
    const T* own = masses + stride * STRIDE;
    if (token >= tokens / STRIDE * STRIDE) return sums[stride] + sum_interval(own, 0, int64_t(place));
    // The whole stride with zeros for what comes after: a loop of unforeseen length costs more.
    const uint64_t* mask = before + STRIDE - place;
    return sums[stride] + total(masked(four(own), mask) + masked(four(own + 4), mask + 4));
}

// Adds `weight` times the masses of `count` intervals that follow upon one another to out[symbols[i]]. low, high: their
// sorted tokens; exact_below: a smaller mass is summed itself.
template <class T>
void add_masses(const T* masses, const double* sums, int64_t tokens, int64_t count, const int32_t* low,
                       const int32_t* high, const uint8_t* symbols, double exact_below, double weight, double* out) {
    if (count == 0) return;
    double below = mass_before(masses, sums, uint64_t(tokens), uint64_t(low[0]));
    constexpr int64_t AHEAD = 8;  // children whose sums and masses are asked for: they lie all over the table
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count) {
            const uint64_t later = uint32_t(high[i + AHEAD]) / STRIDE;
            __builtin_prefetch(sums + later);
            __builtin_prefetch(masses + later * STRIDE);
        }
        const double above = mass_before(masses, sums, uint64_t(tokens), uint64_t(uint32_t(high[i])));
        const double mass = above - below;
        out[symbols[i]] += weight * (mass >= exact_below ? mass : sum_interval(masses, low[i], high[i]));
        below = above;
    }
}

template void add_masses(const float*, const double*, int64_t, int64_t, const int32_t*, const int32_t*, const uint8_t*,
                         double, double, double*);
template void add_masses(const double*, const double*, int64_t, int64_t, const int32_t*, const int32_t*, const uint8_t*,
                         double, double, double*);

// Multiplies masses [count] by a scale, and continues the sums over whole strides of the first `tokens` of them.
TS_INLINE void scale_masses(float* masses, int64_t count, int64_t tokens, float scale, double& sum, double*& sums) {
    static_assert(LANES == STRIDE || LANES == 2 * STRIDE);
    int64_t i = 0;
    for (; i + LANES <= tokens; i += LANES) {
        const Floats x = load(masses + i) * splat(scale);
        store(masses + i, x);
        const Doubles low = widened(half(x, 0)), high = widened(half(x, 1));
        if (LANES == STRIDE) {
            *sums++ = sum += total(low + high);
        } else {
            *sums++ = sum += total(low);
            *sums++ = sum += total(high);
        }
    }
    int64_t whole = tokens / STRIDE * STRIDE;
    for (double part = 0; i < count; i++) {
        masses[i] *= scale;
        if (i >= whole) continue;
        part += double(masses[i]);
        if (i % STRIDE < STRIDE - 1) continue;
        *sums++ = sum += part;
        part = 0;
    }
}

// Probabilities [rows, width] in byte-sorted order and their sums. order: null where that is the order they have;
// ordered: float [rows, tokens]; sums: double [rows, tokens / every + 1], what comes before tokens 0, every, 2 * every and
// so on.
void prefix_mass(int64_t rows, int64_t width, int64_t tokens, int64_t every, const float* probabilities,
                        const int32_t* order, float* ordered, double* sums) {
    for (int64_t r = 0; r < rows; r++) {
        const float* row = probabilities + r * width;
        double sum = 0;
        *sums++ = 0;
        if (!order && every == STRIDE) {
            std::copy(row, row + tokens, ordered);
            scale_masses(ordered, tokens, tokens, 1, sum, sums);
            ordered += tokens;
            continue;
        }
        int64_t left = every;
        for (int64_t i = 0; i < tokens; i++) {
            // The order jumps about in a table larger than the nearest caches.
            if (order && i + 48 < tokens) __builtin_prefetch(row + order[i + 48]);
            const float p = row[order ? order[i] : i];
            *ordered++ = p;
            sum += double(p);
            if (--left == 0) {
                *sums++ = sum;
                left = every;
            }
        }
    }
}

// The powers 2^((x - pivot) * scale - offset) of a row's tokens in `order`, to out: [count]. False as `accumulate`.
template <class T>
TS_APART bool ordered_powers(const Asked& one, const int32_t* order, const Runs& runs, std::vector<float>& offsets,
                              float* out, Normaliser& n) {
    const auto* row = static_cast<const typename T::Element*>(one.row);
    // The order jumps about in the row: it is fetched from first to last beforehand.
    fetch(row, runs.back().second * int64_t(sizeof *row));
    typename T::Element picked[BLOCK];
    Exponent x;
    x.row[0] = picked;
    auto logit = [&](int64_t i) { return T::one(row, order[i]); };
    x.pivot[0] = pivot_of(runs[0], logit);
    x.scale[0] = n.scale = float(1.4426950408889634 / one.temperature);
    auto block = [&](std::pair<int64_t, int64_t> run, float offset) __attribute__((always_inline)) {
        const auto [low, high] = run;
        for (int64_t i = low; i < high; i++) picked[i - low] = row[order[i]];
        return powers<T, 1, true>(x, 0, high - low, offset, out + low);
    };
    auto repair = [&](std::pair<int64_t, int64_t> run, float, Block& done) { return is_sound(run, logit, done); };
    const bool good = about_the_top(x.pivot[0], n.scale, n.offset, [&] {
        return accumulate(runs, offsets, block, repair, n.offset, n.sum);
    });
    n.pivot = x.pivot[0];
    return good;
}

// The softmax of logits / temperature over the tokens in `order` (int32 [count], at least one; null for the first
// `count`), in that order, and the sums of the first `tokens` of them. logits: [rows, any] of `dtype` with row stride
// `stride` (elements); temperatures: double [rows]; ordered: float [rows, count]; sums: double
// [rows, tokens / STRIDE + 1]. A bad row is NaN throughout, and so is one that float32 cannot hold.
void softmax_masses(int64_t rows, int64_t count, int64_t tokens, const void* logits, int32_t dtype, int64_t stride,
                           const double* temperatures, const int32_t* order, float* ordered, double* sums) {
    static thread_local std::vector<float> offsets;
    Runs runs;
    for (int64_t low = 0; low < count; low += BLOCK) runs.emplace_back(low, std::min(low + BLOCK, count));
    for (int64_t r = 0; r < rows; r++, ordered += count) {
        const Asked one = {row_of(dtype, logits, stride, r), dtype, 1.0, temperatures[r]};
        Normaliser n;
        const bool good = !order              ? normalise_any<true>(one, runs, offsets, ordered, n)
                          : dtype == FLOAT32  ? ordered_powers<F32>(one, order, runs, offsets, ordered, n)
                          : dtype == BFLOAT16 ? ordered_powers<Bf16>(one, order, runs, offsets, ordered, n)
                                              : ordered_powers<F16>(one, order, runs, offsets, ordered, n);
        double sum = 0;
        *sums++ = 0;
        for (size_t b = 0; b < runs.size(); b++) {
            const auto [low, high] = runs[b];
            const float scale = good ? float(rescale(ordered, runs[b], offsets[b], n.offset) / n.sum) : NAN_F;
            scale_masses(ordered + low, high - low, std::min(high, tokens) - low, scale, sum, sums);
        }
    }
}

}  // namespace TS_NAMESPACE
