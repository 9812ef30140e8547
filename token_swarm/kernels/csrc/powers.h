// Softmaxes of rows of logits without a table in between: powers block by block, relative to offsets that rise as needed.
#pragma once
#include "simd.h"
#include "sizes.h"

constexpr int64_t BLOCK = 2048;  // elements worked on while they are in the first-level cache

using Runs = std::vector<std::pair<int64_t, int64_t>>;

// Runs of allowed tokens, cut into blocks. Vocabularies forbid a few stretches (special tokens, padding).
inline void allowed_runs(const uint8_t* allowed, int64_t width, Runs& runs) {
    runs.clear();
    int64_t i = 0;
    auto skip = [&](uint8_t value) {
        const uint64_t words = value ? 0x0101010101010101ull : 0;
        for (;;) {
            uint64_t word;
            if (i + 8 <= width && (std::memcpy(&word, allowed + i, 8), word == words)) i += 8;
            else if (i < width && allowed[i] == value) i++;
            else return;
        }
    };
    while (skip(0), i < width) {
        int64_t low = i;
        skip(1);
        for (int64_t at = low; at < i; at += BLOCK) runs.emplace_back(at, std::min(at + BLOCK, i));
    }
}

struct Asked {
    const void* row;
    int32_t dtype;
    double weight, temperature;
};

// sum_e (x_e - pivot_e) * scale_e: the exponent, base 2, of what a token's probability is proportional to. The
// difference comes first, or the products of large logits would be rounded. EXPERTS rows of one dtype in registers.
struct Exponent {
    const void* row[MAX_EXPERTS];
    float pivot[MAX_EXPERTS], scale[MAX_EXPERTS];
};

// Exponents of tokens i and on, less the offset.
template <class T, int EXPERTS>
TS_INLINE Floats exponent_at(const Exponent& x, int64_t i, float offset) {
    Floats sum = (T::get(x.row[0], i) - splat(x.pivot[0])) * splat(x.scale[0]) - splat(offset);
    for (int e = 1; e < EXPERTS; e++) sum += (T::get(x.row[e], i) - splat(x.pivot[e])) * splat(x.scale[e]);
    return sum;
}

// The last few elements of a block, padded with minus infinity.
template <class T, int EXPERTS>
TS_INLINE Floats exponent_tail(const Exponent& x, int64_t i, int64_t high, float offset) {
    Floats sum = splat(-INF);
    for (int64_t k = 0; i + k < high; k++) {
        float one = -offset;
        for (int e = 0; e < EXPERTS; e++) one += (T::one(x.row[e], i + k) - x.pivot[e]) * x.scale[e];
        sum[k] = one;
    }
    return sum;
}

struct Block {
    float top;
    bool odd;  // NaN or plus infinity
    double sum;
};

// One block of 2^(exponent - offset): its sum, its largest exponent and, unless out is null, the powers themselves.
template <class T, int EXPERTS, bool STORE>
TS_INLINE Block powers(const Exponent& x, int64_t low, int64_t high, float offset, float* out) {
    Floats top = splat(-INF), even = splat(0.0f), uneven = splat(0.0f);
    int64_t i = low;
    for (; i + 2 * LANES <= high; i += 2 * LANES) {
        for (int e = 0; e < EXPERTS; e++) {
            const auto* own = static_cast<const typename T::Element*>(x.row[e]) + i;
            fetch_ahead(own, 2 * LANES * sizeof *own);
        }
        Floats x0 = exponent_at<T, EXPERTS>(x, i, offset), x1 = exponent_at<T, EXPERTS>(x, i + LANES, offset);
        top = larger(x0, top);
        top = larger(x1, top);
        Floats y0 = power_of_two(x0), y1 = power_of_two(x1);
        if (STORE) {
            store(out + i, y0);
            store(out + i + LANES, y1);
        }
        even += y0;
        uneven += y1;
    }
    for (; i < high; i += LANES) {
        const bool whole = i + LANES <= high;
        Floats exponent = whole ? exponent_at<T, EXPERTS>(x, i, offset) : exponent_tail<T, EXPERTS>(x, i, high, offset);
        top = larger(exponent, top);
        Floats power = power_of_two(exponent);
        if (STORE)
            for (int64_t k = 0; k < LANES && i + k < high; k++) out[i + k] = power[k];
        even += power;
    }
    const double sum = total(even + uneven);
    return {largest(top) + offset, sum != sum, sum};
}

// A pivot near the largest logit: the largest of a run's first few. Never mind what comes later.
template <class F>
TS_INLINE float pivot_of(std::pair<int64_t, int64_t> run, F logit) {
    float top = -INF;
    for (int64_t i = run.first; i < std::min(run.first + 128, run.second); i++) {
        const float x = logit(i);
        if (x > top && x < INF) top = x;
    }
    return top > -INF ? top : 0;
}

// Whether a block that looks odd is not: an exponent far above the offset may look like NaN or plus infinity.
template <class F>
TS_INLINE bool is_sound(std::pair<int64_t, int64_t> run, F logit, Block& done) {
    for (int64_t i = run.first; i < run.second; i++) {
        const float x = logit(i);
        if (x != x || x == INF) return false;
    }
    done.odd = false;
    return true;
}

// Exponents may rise this far above the offset before float32 overflows, and the largest may stay this far below it
// before small powers are lost: probabilities below 2^-106 may come out as 0.
constexpr float HEADROOM = 100, FLOORROOM = 20;

// Runs over all blocks with `block(run, offset)`, raising the offset where needed. offsets[r] is the one that block r was
// done with. False for a bad row, and for one that float32 cannot hold; `repair` looks at a block with NaN or plus infinity.
template <class F, class R>
TS_INLINE bool accumulate(const Runs& runs, std::vector<float>& offsets, F block, R repair, float& offset, double& sum) {
    offsets.resize(runs.size());
    offset = 0;
    for (int attempt = 0; attempt < 2; attempt++) {
        float top = -INF;
        sum = 0;
        for (size_t r = 0; r < runs.size(); r++) {
            Block done = block(runs[r], offset);
            if (done.odd) {
                if (!repair(runs[r], offset, done)) return false;
            }
            if (done.top - offset > HEADROOM) {
                if (done.top == INF) return false;  // finite logits whose product is not
                sum *= std::exp2(double(offset) - double(done.top));
                offset = done.top;
                r--;
                continue;
            }
            offsets[r] = offset;
            sum += done.sum;
            top = done.top > top ? done.top : top;
        }
        if (top == -INF) return false;
        if (top > offset - FLOORROOM) return true;
        offset = top;  // a first guess far too high: once more, with the right one
    }
    return true;
}

// What a block's powers, done with the offset `own`, must be multiplied with to be relative to `offset`. A factor that
// float32 cannot hold is half applied here and now.
TS_INLINE double rescale(float* out, std::pair<int64_t, int64_t> run, float own, float offset) {
    double exponent = double(own) - double(offset);
    if (exponent < -HEADROOM) {
        exponent /= 2;
        const float half = float(std::exp2(exponent));
        for (int64_t i = run.first; i < run.second; i++) out[i] *= half;
    }
    return std::exp2(exponent);
}

// Of a scale below this, 0 times minus infinity would be NaN.
constexpr float LEAST_SCALE = 1e-30f;

// Runs `attempt`, which sets `offset`, again about a pivot at the top where the first guess of one was far off: an exponent
// of some hundreds has lost the digits that tell the likely tokens apart. For a single row, in which nothing cancels.
template <class F>
TS_INLINE bool about_the_top(float& pivot, float scale, const float& offset, F attempt) {
    constexpr float FAR = 64;
    if (!(std::fabs(scale) >= LEAST_SCALE) || !attempt()) return false;
    if (std::fabs(offset) <= FAR) return true;
    const float nearer = float(double(pivot) + double(offset) / double(scale));
    if (!(std::fabs(nearer) < INF)) return false;
    pivot = nearer;
    return attempt();
}

// softmax(x / T) = 2^((x - pivot) * scale - offset) / sum.
struct Normaliser {
    float pivot, scale, offset;
    double sum;
};

// The powers go to `out`, each block relative to its own offset, when STORE is set. False as `accumulate`.
template <class T, bool STORE>
TS_APART bool normalise(const Asked& one, const Runs& runs, std::vector<float>& offsets, float* out, Normaliser& n) {
    Exponent x;
    x.row[0] = one.row;
    auto logit = [&](int64_t i) { return T::one(one.row, i); };
    x.pivot[0] = pivot_of(runs[0], logit);
    n.scale = x.scale[0] = float(1.4426950408889634 / one.temperature);
    auto block = [&](std::pair<int64_t, int64_t> run, float offset) __attribute__((always_inline)) {
        return powers<T, 1, STORE>(x, run.first, run.second, offset, out);
    };
    auto repair = [&](std::pair<int64_t, int64_t> run, float, Block& done) { return is_sound(run, logit, done); };
    const bool good = about_the_top(x.pivot[0], n.scale, n.offset, [&] {
        return accumulate(runs, offsets, block, repair, n.offset, n.sum);
    });
    n.pivot = x.pivot[0];
    return good;
}

template <bool STORE>
TS_INLINE bool normalise_any(const Asked& one, const Runs& runs, std::vector<float>& offsets, float* out, Normaliser& n) {
    if (one.dtype == FLOAT32) return normalise<F32, STORE>(one, runs, offsets, out, n);
    if (one.dtype == BFLOAT16) return normalise<Bf16, STORE>(one, runs, offsets, out, n);
    return normalise<F16, STORE>(one, runs, offsets, out, n);
}
