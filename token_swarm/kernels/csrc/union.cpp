// Mixing over the union of vocabularies, gathered segment by segment: within one, the same experts have every token.
#include "unit.h"

namespace TS_NAMESPACE {
#include "powers.h"

// ids: int32 [experts, size]; segments: int64 [count, 2] and their experts as bit masks [count]; twins: int32 [n, 3]
// (expert, union token, id), sorted by union token. allowed[e]: uint8 [width of e], ids that take part.
// floor: log-probability that stands for "does not have it" under the log-linear rule. out: float [rows, size].
// Bad rows are filled with NaN, and those that float32 cannot hold.
void mix_union(int64_t rows, int64_t experts, const void* const* logits, const int32_t* dtypes,
                                   const int64_t* strides, const int64_t* widths, const double* weights,
                                   const double* temperatures, int32_t log_linear, double floor,
                                   const uint8_t* const* allowed, int64_t size, const int32_t* ids, int64_t segments,
                                   const int64_t* bounds, const uint64_t* patterns, int64_t twins, const int32_t* twin,
                                   float* out) {
    std::vector<Runs> runs(experts);
    std::vector<float> offsets;
    for (int64_t e = 0; e < experts; e++) allowed_runs(allowed[e], widths[e], runs[e]);
    for (int64_t r = 0; r < rows; r++, out += size) {
        struct Used {
            Asked asked;
            Normaliser n;
            const int32_t* ids;
            int64_t index;
            float weight, shift;  // log2 of the probability of x: (x - pivot) * scale - shift
        };
        std::vector<Used> used;
        double total_weight = 0, exponents = 0;
        bool good = true;
        for (int64_t e = 0; e < experts && good; e++) {
            double w = weights[r * experts + e];
            if (w == 0) continue;
            Used u{{row_of(dtypes[e], logits[e], strides[e], r), dtypes[e], w, temperatures[r * experts + e]},
                   {}, ids + e * size, e, 0, 0};
            good = !runs[e].empty() && normalise_any<false>(u.asked, runs[e], offsets, nullptr, u.n);
            if (!good) break;
            total_weight += w;
            exponents += std::fabs(w / u.asked.temperature);
            u.shift = float(double(u.n.offset) + std::log2(u.n.sum));
            used.push_back(u);
        }
        // Of larger exponents float32 has too few digits, as in mix.cpp.
        if (!good || used.empty() || (log_linear && exponents > 8)) {
            std::fill(out, out + size, NAN_F);
            continue;
        }
        for (auto& u : used) u.weight = float(log_linear ? u.asked.weight : u.asked.weight / total_weight);
        const float least = float(floor * 1.4426950408889634);
        double missing_floor = 0;
        for (int64_t s = 0; s < segments; s++) {
            const int64_t low = bounds[2 * s], high = bounds[2 * s + 1];
            missing_floor = 0;
            bool first = true;
            for (auto& u : used) {
                if (!(patterns[s] >> u.index & 1)) {
                    if (log_linear) missing_floor += u.asked.weight * floor * 1.4426950408889634;
                    continue;
                }
                const float pivot = u.n.pivot, scale = u.n.scale, shift = u.shift, weight = u.weight;
                for (int64_t i = low; i < high; i += LANES) {
                    const int64_t n = std::min<int64_t>(LANES, high - i);
                    Floats x = splat(-INF);
                    for (int64_t k = 0; k < n; k++) x[k] = element(u.asked.dtype, u.asked.row, u.ids[i + k]);
                    Floats l = (x - splat(pivot)) * splat(scale) - splat(shift);
                    Floats y = log_linear ? larger(l, splat(least)) * splat(weight) : power_of_two(l) * splat(weight);
                    for (int64_t k = 0; k < n; k++) out[i + k] = first ? y[k] : out[i + k] + y[k];
                }
                first = false;
            }
            if (first) std::fill(out + low, out + high, 0.0f);
            if (log_linear && missing_floor != 0)
                for (int64_t i = low; i < high; i++) out[i] += float(missing_floor);
        }
        // Ids that write the same bytes add up: the few tokens that have such twins are done again, in float64.
        for (int64_t t = 0; t < twins;) {
            const int64_t token = twin[3 * t + 1];
            int64_t last = t;
            while (last < twins && twin[3 * last + 1] == token) last++;
            double joint = 0;
            for (auto& u : used) {
                double mass = 0;
                auto add = [&](int64_t id) {
                    float x = element(u.asked.dtype, u.asked.row, id);
                    mass += std::exp2((double(x) - u.n.pivot) * u.n.scale - u.n.offset) / u.n.sum;
                };
                if (u.ids[token] >= 0) add(u.ids[token]);
                for (int64_t k = t; k < last; k++)
                    if (twin[3 * k] == u.index) add(twin[3 * k + 2]);
                joint += log_linear ? u.asked.weight * std::max(std::log(mass), floor) * 1.4426950408889634
                                    : u.asked.weight / total_weight * mass;
            }
            out[token] = float(joint);
            t = last;
        }
        if (!log_linear) continue;
        float top = -INF;
        for (int64_t i = 0; i < size; i++) top = out[i] > top ? out[i] : top;
        double sum = 0;
        for (int64_t i = 0; i + LANES <= size; i += LANES) {
            Floats p = power_of_two(load(out + i) - splat(top));
            store(out + i, p);
            sum += total(p);
        }
        for (int64_t i = size / LANES * LANES; i < size; i++) sum += out[i] = power_of_two(splat(out[i] - top))[0];
        const float scale = float(1.0 / sum);
        for (int64_t i = 0; i < size; i++) out[i] *= scale;
    }
}

}  // namespace TS_NAMESPACE
