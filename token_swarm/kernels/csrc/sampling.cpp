// Temperature, min-p, top-k and top-p on rows of probabilities without sorting them, and the choice of a token.
#include "unit.h"

namespace TS_NAMESPACE {
#include "powers.h"

constexpr int CANDIDATES = 4096;  // values of one histogram bin that are looked at one by one
constexpr int BINS = 2048;

// p -> (p / top)^(1 / T). The exponent and the mantissa of p are scaled apart, so that nothing large is rounded.
TS_INLINE void temper(float* row, int64_t width, float top, double temperature) {
    const double inverse = 1.0 / temperature;
    // Sixteen bits of 1 / T: their product with an exponent is exact in float32.
    float high;
    uint32_t bits;
    float rounded = float(inverse);
    std::memcpy(&bits, &rounded, 4);
    bits &= 0xffffff00u;
    std::memcpy(&high, &bits, 4);
    const float low = float(inverse - double(high));
    int64_t i = 0;
    auto power = [&](Floats p) __attribute__((always_inline)) {
        Ints zero = p < splat(1.17549435e-38f);
        Floats m;
        Floats n = split_exponent(p / splat(top), &m);
        Floats f = log2_mantissa(m);
        Floats whole = n * splat(high), rest = n * splat(low) + f * splat(rounded);
        const Floats magic = splat(12582912.0f);
        // Beyond these the power is 0 in float32 anyway, and `magic` would no longer round.
        whole = larger(whole, splat(-100000.0f));
        Floats k = ((whole + rest) + magic) - magic;
        Floats r = (whole - k) + rest;
        Floats y = as_floats(as_ints(exp2_fraction(r)) + (__builtin_convertvector(k, Ints) << 23));
        return as_floats(as_ints(y) & (k > splat(-126.0f)) & ~zero);
    };
    for (; i + LANES <= width; i += LANES) store(row + i, power(load(row + i)));
    for (; i < width; i++) row[i] = power(splat(row[i]))[0];
}

TS_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

TS_INLINE float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Walks values from the largest down and returns the one at which `reached` is fulfilled: top-k counts them, top-p adds
// them up. Positive floats order as their bits do, so a histogram of the upper bits finds the bin; what is in the
// bin is collected and sorted, or, when it is too much for the buffer, divided again by the next bits.
struct Cut {
    double mass_wanted;   // stop when the mass of the values seen reaches this (top-p) ...
    int64_t count_wanted;  // ... or their number reaches this (top-k)
};

inline float cut_at(const float* row, int64_t width, float floor, Cut wanted) {
    static thread_local std::vector<int64_t> counts(BINS);
    static thread_local std::vector<double> masses(BINS);
    static thread_local std::vector<float> found;
    const uint32_t least = bits_of(floor > 0 ? floor : float_of(1));
    uint32_t low = least, high = 0x7f800000;  // the bin under examination, as bits [low, high)
    double mass = 0;
    int64_t count = 0;
    for (int shift : {20, 9, 0}) {
        std::fill(counts.begin(), counts.end(), 0);
        std::fill(masses.begin(), masses.end(), 0.0);
        const uint32_t base = low >> shift;
        for (int64_t i = 0; i < width; i++) {
            uint32_t b = bits_of(row[i]);
            if (b < low || b >= high) continue;
            uint32_t bin = (b >> shift) - base;
            counts[bin]++;
            masses[bin] += row[i];
        }
        int bin = BINS - 1;
        for (; bin >= 0; bin--) {
            if (!counts[bin]) continue;
            if (count + counts[bin] >= wanted.count_wanted || mass + masses[bin] >= wanted.mass_wanted) break;
            count += counts[bin];
            mass += masses[bin];
        }
        if (bin < 0) return 0;  // all of them together do not reach it: keep all
        uint32_t first = std::max(low, (base + uint32_t(bin)) << shift);
        uint32_t last = std::min<uint64_t>(high, uint64_t(base + bin + 1) << shift);
        if (shift == 0) return float_of(first);
        low = first;
        high = last;
        if (counts[bin] <= CANDIDATES) break;
    }
    found.clear();
    for (int64_t i = 0; i < width; i++) {
        uint32_t b = bits_of(row[i]);
        if (b >= low && b < high) found.push_back(row[i]);
    }
    std::sort(found.begin(), found.end(), [](float a, float b) { return a > b; });
    for (float x : found) {
        count++;
        mass += x;
        if (count >= wanted.count_wanted || mass >= wanted.mass_wanted) return x;
    }
    return found.empty() ? 0 : found.back();
}

TS_INLINE double sum_from(const float* row, int64_t width, float threshold) {
    Doubles a = {}, b = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Floats x = load(row + i);
        x = as_floats(as_ints(x) & (x >= splat(threshold)));
        a += widened(half(x, 0));
        b += widened(half(x, 1));
    }
    double sum = total(a + b);
    for (; i < width; i++) sum += row[i] >= threshold ? row[i] : 0.0f;
    return sum;
}

TS_INLINE void keep_from(float* row, int64_t width, float threshold, double sum) {
    const float scale = float(1.0 / sum);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Floats x = load(row + i);
        store(row + i, as_floats(as_ints(x * splat(scale)) & (x >= splat(threshold))));
    }
    for (; i < width; i++) row[i] = row[i] >= threshold ? row[i] * scale : 0.0f;
}

// The largest of a row of probabilities; NaN for a bad row, which is NaN throughout.
TS_INLINE float largest_of(const float* row, int64_t width) {
    if (row[0] != row[0]) return NAN_F;
    Floats top = splat(-INF);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) top = larger(load(row + i), top);
    float best = largest(top);
    for (; i < width; i++) best = row[i] > best ? row[i] : best;
    return best;
}

// In place on probabilities float [rows, width]; settings [rows]. As reference.shape.
void shape(int64_t rows, int64_t width, float* probabilities, const double* temperature,
                               const int64_t* top_k, const double* top_p, const double* min_p) {
    for (int64_t r = 0; r < rows; r++) {
        float* row = probabilities + r * width;
        const bool plain = temperature[r] == 1 && top_k[r] == 0 && top_p[r] >= 1 && min_p[r] == 0;
        float top = largest_of(row, width);
        if (temperature[r] == 0 || plain || top != top) continue;
        if (temperature[r] != 1) {
            temper(row, width, top, temperature[r]);
            top = 1;
        }
        float threshold = float(min_p[r]) * top;
        if (top_k[r] > 0 && top_k[r] < width)
            threshold = std::max(threshold, cut_at(row, width, threshold, {INF_D, top_k[r]}));
        double sum = sum_from(row, width, threshold);
        if (top_p[r] < 1) {
            float nucleus = cut_at(row, width, threshold, {top_p[r] * sum, std::numeric_limits<int64_t>::max()});
            if (nucleus > threshold) {
                threshold = nucleus;
                sum = sum_from(row, width, threshold);
            }
        }
        keep_from(row, width, threshold, sum);
    }
}

// One token a row. greedy: uint8 [rows]; uniforms: double [rows]; tokens: int64 [rows]; log_probs: double [rows].
void choose(int64_t rows, int64_t width, const float* probabilities, const double* uniforms,
                                const uint8_t* greedy, int64_t* tokens, double* log_probs) {
    std::vector<double> sums;
    for (int64_t r = 0; r < rows; r++) {
        const float* row = probabilities + r * width;
        float top = largest_of(row, width);
        tokens[r] = -1;
        log_probs[r] = std::numeric_limits<double>::quiet_NaN();
        if (top != top || !(top > 0)) continue;
        sums.clear();
        double sum = 0;
        for (int64_t low = 0; low < width; low += BLOCK) {
            sums.push_back(sum);
            sum += sum_from(row + low, std::min(BLOCK, width - low), 0.0f);
        }
        int64_t chosen = -1;
        if (greedy[r]) {
            for (chosen = 0; row[chosen] != top;) chosen++;
        } else {
            const double target = uniforms[r] * sum;
            // The last block that begins at or below the target; in it the first token that passes it.
            int64_t block = std::upper_bound(sums.begin(), sums.end(), target) - sums.begin() - 1;
            double at = sums[block];
            for (int64_t i = block * BLOCK; i < width && chosen < 0; i++) {
                at += row[i];
                if (at > target && row[i] > 0) chosen = i;
            }
            // Rounding can leave the target at the very end: the last token with any probability is meant.
            if (chosen < 0)
                for (chosen = width - 1; row[chosen] <= 0;) chosen--;
        }
        tokens[r] = chosen;
        log_probs[r] = std::log(double(row[chosen]) / sum);
    }
}

}  // namespace TS_NAMESPACE
