// Mixing experts over one vocabulary: probabilities of [rows, width], no [experts, rows, width] in between.
#include "unit.h"

namespace TS_NAMESPACE {
#include "powers.h"

// Memory that is used again for every row.
struct Scratch {
    std::vector<float> powers;  // [experts - 1, width]
    std::vector<std::vector<float>> expert_offsets;
    std::vector<float> offsets;
};

// The mixture of one block: every expert's powers, the first one's in `out`, times its scale. EXPERTS 0: any number.
template <int EXPERTS>
TS_INLINE void combine(const float* more, int64_t width, int count, const float* scale, int64_t low, int64_t high, float* out) {
    const int experts = EXPERTS ? EXPERTS : count;
    int64_t i = low;
    for (; i + LANES <= high; i += LANES) {
        fetch_ahead(out + i, sizeof(Floats));
        Floats p = load(out + i) * splat(scale[0]);
        for (int e = 1; e < experts; e++) {
            const float* own = more + (e - 1) * width + i;
            fetch_ahead(own, sizeof(Floats));
            p += load(own) * splat(scale[e]);
        }
        store(out + i, p);
    }
    for (; i < high; i++) {
        float p = out[i] * scale[0];
        for (int e = 1; e < experts; e++) p += more[(e - 1) * width + i] * scale[e];
        out[i] = p;
    }
}

// One read of the logits: every expert's powers are kept for this one row until all normalisers are known (the first
// expert's in the output). A second exponential would cost more than the second read of what is still in the cache.
TS_INLINE bool linear_row(const Asked* asked, int count, const Runs& runs, int64_t width, Scratch& scratch, float* out) {
    Normaliser n[MAX_EXPERTS];
    double weights = 0;
    scratch.powers.resize((count - 1) * width);
    scratch.expert_offsets.resize(count);
    for (int e = 0; e < count; e++) {
        float* to = e == 0 ? out : scratch.powers.data() + (e - 1) * width;
        if (!normalise_any<true>(asked[e], runs, scratch.expert_offsets[e], to, n[e])) return false;
        weights += asked[e].weight;
    }
    for (size_t r = 0; r < runs.size(); r++) {
        auto [low, high] = runs[r];
        float scale[MAX_EXPERTS];
        float* more = scratch.powers.data();
        for (int e = 0; e < count; e++) {
            const double rest = rescale(e == 0 ? out : more + (e - 1) * width, runs[r], scratch.expert_offsets[e][r], n[e].offset);
            scale[e] = float(asked[e].weight / weights / n[e].sum * rest);
        }
        if (count == 2) combine<2>(more, width, count, scale, low, high, out);
        else if (count == 3) combine<3>(more, width, count, scale, low, high, out);
        else combine<0>(more, width, count, scale, low, high, out);
    }
    return true;
}

// A block with odd exponents, element by element: NaN and +inf are bad, -inf excludes whatever the weight's sign. False
// for those, and for finite logits whose products are not.
inline bool repair_joint(const Asked* asked, int count, const Exponent& x, int64_t low, int64_t high, float offset,
                         float* out, Block& done) {
    done = {-INF, false, 0};
    for (int64_t i = low; i < high; i++) {
        float exponent = 0;
        bool excluded = false;
        for (int e = 0; e < count; e++) {
            float v = element(asked[e].dtype, asked[e].row, i);
            if (v != v || v == INF) return false;
            excluded |= v == -INF;
            exponent += (v - x.pivot[e]) * x.scale[e];
        }
        if (excluded) exponent = -INF;
        else if (!(std::fabs(exponent) < INF)) return false;  // a model's own masks, which float32 cannot weigh
        done.top = exponent > done.top ? exponent : done.top;
        out[i] = power_of_two(splat(exponent - offset))[0];
        done.sum += out[i];
    }
    return true;
}

template <class T, int EXPERTS>
TS_APART bool accumulate_joint(const Asked* asked, const Exponent& shared, const Runs& runs, std::vector<float>& offsets,
                               float& offset, double& sum, float* out) {
    Exponent x;  // of our own, which no store to `out` can change: it stays in registers
    for (int e = 0; e < EXPERTS; e++) {
        x.row[e] = shared.row[e];
        x.pivot[e] = shared.pivot[e];
        x.scale[e] = shared.scale[e];
    }
    return accumulate(
        runs, offsets,
        [&](std::pair<int64_t, int64_t> run, float at) __attribute__((always_inline)) {
            return powers<T, EXPERTS, true>(x, run.first, run.second, at, out);
        },
        [&](std::pair<int64_t, int64_t> run, float at, Block& done) {
            return repair_joint(asked, EXPERTS, x, run.first, run.second, at, out, done);
        },
        offset, sum);
}

// Many experts, or several dtypes: the exponents are added up in the output block, which stays in the cache.
template <class T>
TS_INLINE void add_exponent(bool first, const Exponent& x, int e, int64_t low, int64_t high, float* out) {
    Exponent one;
    one.row[0] = x.row[e];
    one.pivot[0] = x.pivot[e];
    one.scale[0] = x.scale[e];
    int64_t i = low;
    for (; i + LANES <= high; i += LANES) {
        Floats y = exponent_at<T, 1>(one, i, 0);
        store(out + i, first ? y : load(out + i) + y);
    }
    Floats y = exponent_tail<T, 1>(one, i, high, 0);
    for (int64_t k = 0; i + k < high; k++) out[i + k] = first ? y[k] : out[i + k] + y[k];
}

inline bool accumulate_many(const Asked* asked, int count, const Exponent& x, const Runs& runs,
                            std::vector<float>& offsets, float& offset, double& sum, float* out) {
    Exponent joint;
    joint.row[0] = out;
    joint.pivot[0] = 0;
    joint.scale[0] = 1;
    return accumulate(
        runs, offsets,
        [&](std::pair<int64_t, int64_t> run, float at) {
            for (int e = 0; e < count; e++) {
                if (asked[e].dtype == FLOAT32) add_exponent<F32>(e == 0, x, e, run.first, run.second, out);
                else if (asked[e].dtype == BFLOAT16) add_exponent<Bf16>(e == 0, x, e, run.first, run.second, out);
                else add_exponent<F16>(e == 0, x, e, run.first, run.second, out);
            }
            return powers<F32, 1, true>(joint, run.first, run.second, at, out);
        },
        [&](std::pair<int64_t, int64_t> run, float at, Block& done) {
            return repair_joint(asked, count, x, run.first, run.second, at, out, done);
        },
        offset, sum);
}

template <class T>
TS_INLINE bool accumulate_few(const Asked* asked, int count, const Exponent& x, const Runs& runs,
                              std::vector<float>& offsets, float& offset, double& sum, float* out) {
    if (count == 1) return accumulate_joint<T, 1>(asked, x, runs, offsets, offset, sum, out);
    if (count == 2) return accumulate_joint<T, 2>(asked, x, runs, offsets, offset, sum, out);
    return accumulate_joint<T, 3>(asked, x, runs, offsets, offset, sum, out);
}

// Of the experts' exponents, weights over temperatures, added up: terms of more would round away what is left of them
// when they cancel.
constexpr double MOST_EXPONENT = 8;
// The largest of their sums, base 2: beyond it float32 has too few digits for the differences.
constexpr float MOST_SUM = 512;

// One read of the logits: the experts' normalisers are constants of the row and cancel. False for a bad row, and for one
// that float32 cannot hold.
TS_INLINE bool log_linear_row(const Asked* asked, int count, const Runs& runs, std::vector<float>& offsets, float* out) {
    Exponent x;
    bool alike = count <= 3, fits = true;
    double exponents = 0;
    for (int e = 0; e < count; e++) {
        exponents += std::fabs(asked[e].weight / asked[e].temperature);
        x.row[e] = asked[e].row;
        x.scale[e] = float(asked[e].weight / asked[e].temperature * 1.4426950408889634);
        x.pivot[e] = pivot_of(runs[0], [&](int64_t i) { return element(asked[e].dtype, asked[e].row, i); });
        alike &= asked[e].dtype == asked[0].dtype;
        fits &= std::fabs(x.scale[e]) >= LEAST_SCALE;
    }
    if (!fits || (count > 1 && exponents > MOST_EXPONENT)) return false;
    float offset;
    double sum;
    auto attempt = [&] {
        return !alike ? accumulate_many(asked, count, x, runs, offsets, offset, sum, out)
               : asked[0].dtype == FLOAT32 ? accumulate_few<F32>(asked, count, x, runs, offsets, offset, sum, out)
               : asked[0].dtype == BFLOAT16 ? accumulate_few<Bf16>(asked, count, x, runs, offsets, offset, sum, out)
                                            : accumulate_few<F16>(asked, count, x, runs, offsets, offset, sum, out);
    };
    const bool good = count == 1 ? about_the_top(x.pivot[0], x.scale[0], offset, attempt) : attempt();
    if (!good || (count > 1 && std::fabs(offset) > MOST_SUM)) return false;
    for (size_t r = 0; r < runs.size(); r++) {
        auto [low, high] = runs[r];
        const float scale = float(rescale(out, runs[r], offsets[r], offset) / sum);
        int64_t i = low;
        for (; i + LANES <= high; i += LANES) store(out + i, load(out + i) * splat(scale));
        for (; i < high; i++) out[i] *= scale;
    }
    return true;
}

// logits[e] points to [rows, width] of dtype dtypes[e] with row stride strides[e] (elements); weights, temperatures:
// double [rows, experts]; out: float [rows, width]. log_linear: 0 for the linear rule. Bad rows are filled with NaN, and those
// that float32 cannot hold.
void mix(int64_t rows, int64_t width, int64_t experts, const void* const* logits, const int32_t* dtypes,
                             const int64_t* strides, const double* weights, const double* temperatures, int32_t log_linear,
                             const uint8_t* allowed, float* out) {
    Runs runs;
    static thread_local Scratch scratch;
    allowed_runs(allowed, width, runs);
    for (int64_t row = 0; row < rows; row++, out += width) {
        Asked asked[MAX_EXPERTS];
        int count = 0;
        for (int64_t e = 0; e < experts; e++) {
            double w = weights[row * experts + e];
            if (w != 0)
                asked[count++] = {row_of(dtypes[e], logits[e], strides[e], row), dtypes[e], w, temperatures[row * experts + e]};
        }
        bool good = count > 0 && !runs.empty();
        if (good) {
            int64_t end = 0;  // forbidden tokens between the runs
            for (auto [low, high] : runs) {
                std::fill(out + end, out + low, 0.0f);
                end = high;
            }
            std::fill(out + end, out + width, 0.0f);
            // One expert with weight 1 is the same law under both rules.
            good = log_linear || count == 1
                       ? (asked[0].weight = log_linear ? asked[0].weight : 1.0, log_linear_row(asked, count, runs, scratch.offsets, out))
                       : linear_row(asked, count, runs, width, scratch, out);
        }
        if (!good) std::fill(out, out + width, NAN_F);
    }
}

}  // namespace TS_NAMESPACE
