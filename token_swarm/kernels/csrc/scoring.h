// Scoring many particles against a cache in one read of it.

// A product of floats as mantissa and exponent: one logarithm at the end instead of one per factor.
struct Product {
    Floats mantissa;
    Ints exponent;
};

TS_INLINE void renormalise(Product& p) {
    Ints bits = as_ints(p.mantissa);
    Ints n = (bits >> 23) - splat(127);
    p.exponent += n;
    p.mantissa = as_floats(bits - (n << 23));
}

TS_INLINE double logarithm(const Product& p) {
    double mantissa = 1;  // eight factors in [1, 2)
    int64_t exponent = 0;
    for (int k = 0; k < LANES; k++) {
        mantissa *= double(p.mantissa[k]);
        exponent += p.exponent[k];
    }
    return std::log(mantissa) + double(exponent) * M_LN2;
}

constexpr int64_t CHUNK = 512;  // positions whose masses stay in the nearest cache while all particles read them

template <int EXPERTS>
TS_INLINE Floats mixture(const Floats* w, const float (*scaled)[CHUNK], int64_t experts, int64_t i) {
    Floats x = w[0] * load(scaled[0] + i);
    for (int64_t e = 1; e < (EXPERTS ? EXPERTS : experts); e++) x += w[e] * load(scaled[e] + i);
    return x;
}

// Log of the product over `full` positions of sum_e w_e m_e; the least mixture tells whether that was safe.
template <int EXPERTS>
TS_INLINE double log_product(const Floats* w, const float (*scaled)[CHUNK], int64_t experts, int64_t full, float& lowest) {
    Product product = {splat(1.0f), splat(int32_t(0))};
    Floats least = splat(INF);
    int64_t i = 0;
    // Four mixtures between renormalisations: together at least 2^-120 while each is at least 2^-30.
    for (; i + 4 * LANES <= full; i += 4 * LANES) {
        Floats a = mixture<EXPERTS>(w, scaled, experts, i), b = mixture<EXPERTS>(w, scaled, experts, i + LANES);
        Floats c = mixture<EXPERTS>(w, scaled, experts, i + 2 * LANES), d = mixture<EXPERTS>(w, scaled, experts, i + 3 * LANES);
        Floats ab = a < b ? a : b, cd = c < d ? c : d;
        Floats low = ab < cd ? ab : cd;
        least = low < least ? low : least;
        product.mantissa *= (a * b) * (c * d);
        renormalise(product);
    }
    for (; i < full; i += LANES) {
        Floats a = mixture<EXPERTS>(w, scaled, experts, i);
        least = a < least ? a : least;
        product.mantissa *= a;
        renormalise(product);
    }
    lowest = -largest(-least);
    return logarithm(product);
}

// masses: float [experts, positions] with row stride `stride`; weights: double [particles, experts]; offsets: int64
// [items + 1]; out: double [particles, items]. As reference.score_linear.
inline void score_linear(int64_t experts, int64_t particles, int64_t items, const float* masses, int64_t stride,
                         const double* weights, const int64_t* offsets, double* out) {
    // Scaled by the largest mass of the position, mixtures stay near 1 and many may be multiplied before the exponent is
    // taken out; the scales are the same for every particle and are added as logarithms.
    alignas(32) float scaled[MAX_EXPERTS][CHUNK];
    alignas(32) float top[CHUNK];
    for (int64_t item = 0; item < items; item++) {
        for (int64_t p = 0; p < particles; p++) out[p * items + item] = 0;
        for (int64_t low = offsets[item]; low < offsets[item + 1]; low += CHUNK) {
            const int64_t n = std::min(CHUNK, offsets[item + 1] - low), full = (n + LANES - 1) / LANES * LANES;
            std::fill(top, top + full, 0.0f);
            for (int64_t e = 0; e < experts; e++) {
                const float* from = masses + e * stride + low;
                for (int64_t i = 0; i < n; i++) top[i] = from[i] > top[i] ? from[i] : top[i];
            }
            bool none = false;
            for (int64_t i = 0; i < n; i++) none |= !(top[i] > 0);
            if (none) {
                for (int64_t p = 0; p < particles; p++) out[p * items + item] = -INF_D;
                continue;
            }
            for (int64_t i = n; i < full; i++) top[i] = 1.0f;
            Product scales = {splat(1.0f), splat(int32_t(0))};
            for (int64_t i = 0; i < full; i += LANES) {
                Product one = {load(top + i), splat(int32_t(0))};
                renormalise(one);  // a mass may be as small as floats are
                scales.mantissa *= one.mantissa;
                scales.exponent += one.exponent;
                renormalise(scales);
            }
            const double log_scales = logarithm(scales);
            for (int64_t e = 0; e < experts; e++) {
                const float* from = masses + e * stride + low;
                for (int64_t i = 0; i < n; i++) scaled[e][i] = from[i] / top[i];
                for (int64_t i = n; i < full; i++) scaled[e][i] = 1.0f;
            }
            for (int64_t p = 0; p < particles; p++) {
                double& sum = out[p * items + item];
                const double* own = weights + p * experts;
                double total_weight = 0;
                Floats w[MAX_EXPERTS];
                for (int64_t e = 0; e < experts; e++) {
                    w[e] = splat(float(own[e]));
                    total_weight += double(float(own[e]));
                }
                float lowest;
                const double logs = experts == 2   ? log_product<2>(w, scaled, experts, full, lowest)
                                    : experts == 3 ? log_product<3>(w, scaled, experts, full, lowest)
                                                   : log_product<0>(w, scaled, experts, full, lowest);
                if (lowest >= 9.3e-10f && total_weight < 1e9) {
                    // The padding of the last vector holds the sum of the weights; it is taken off again.
                    sum += log_scales + logs - double(full - n) * std::log(total_weight);
                    continue;
                }
                // A particle whose best experts have next to no weight: one logarithm a position.
                for (int64_t k = 0; k < n; k++) {
                    double x = 0;
                    for (int64_t e = 0; e < experts; e++) x += own[e] * double(masses[e * stride + low + k]);
                    sum += std::log(x);
                }
            }
        }
    }
}

// One particle at one position: what is multiplied, and where.
struct Joint {
    const float* law[MAX_EXPERTS];
    float weight[MAX_EXPERTS];  // times log2(e)
    int count;
};

struct Total {
    float top;
    double sum;
};

template <int EXPERTS>
TS_INLINE Total sum_of_powers(const Joint& joint, int64_t symbols, float offset) {
    Floats top = splat(-INF), sum = splat(0.0f);
    auto exponent = [&](int64_t i) __attribute__((always_inline)) {
        Floats x = splat(joint.weight[0]) * load(joint.law[0] + i);
        for (int k = 1; k < (EXPERTS ? EXPERTS : joint.count); k++) x += splat(joint.weight[k]) * load(joint.law[k] + i);
        return x;
    };
    int64_t i = 0;
    for (; i + LANES <= symbols; i += LANES) {
        Floats x = exponent(i);
        top = larger(x, top);
        sum += power_of_two(x - splat(offset));
    }
    float best = largest(top);
    double all = total(sum);
    for (; i < symbols; i++) {
        float x = 0;
        for (int k = 0; k < joint.count; k++) x += joint.weight[k] * joint.law[k][i];
        best = x > best ? x : best;
        all += std::exp2(x - offset);
    }
    return {best, all};
}

TS_INLINE Total sum_of_powers_any(const Joint& joint, int64_t symbols, float offset) {
    if (joint.count == 1) return sum_of_powers<1>(joint, symbols, offset);
    if (joint.count == 2) return sum_of_powers<2>(joint, symbols, offset);
    if (joint.count == 3) return sum_of_powers<3>(joint, symbols, offset);
    return sum_of_powers<0>(joint, symbols, offset);
}

// Log2 of the normaliser where some symbols are excluded, symbol by symbol.
inline double log2_normaliser_slow(const Joint& joint, int64_t symbols) {
    double top = -INF_D, sum = 0;
    for (int64_t i = 0; i < symbols; i++) {
        double x = 0;
        for (int k = 0; k < joint.count; k++)
            x = joint.law[k][i] == -INF ? -INF_D : x + double(joint.weight[k]) * double(joint.law[k][i]);
        for (int k = 0; k < joint.count; k++)
            if (joint.law[k][i] == -INF) x = -INF_D;
        if (x == -INF_D) continue;
        if (x > top) {
            sum *= std::exp2(top - x);
            top = x;
        }
        sum += std::exp2(x - top);
    }
    return top + std::log2(sum);
}

// log_probs: float [positions, experts, symbols]; targets: int64 [positions]; weights: double [particles, experts];
// offsets: int64 [items + 1]; out: double [particles, items]. As reference.score_log_linear.
inline void score_log_linear(int64_t experts, int64_t symbols, int64_t particles, int64_t items, const float* log_probs,
                             const int64_t* targets, const double* weights, const int64_t* offsets, double* out) {
    std::vector<uint8_t> whole(experts);
    for (int64_t item = 0; item < items; item++) {
        for (int64_t p = 0; p < particles; p++) out[p * items + item] = 0;
        for (int64_t n = offsets[item]; n < offsets[item + 1]; n++) {
            const float* laws = log_probs + n * experts * symbols;
            for (int64_t e = 0; e < experts; e++) {
                const float* law = laws + e * symbols;
                Floats least = splat(0.0f);
                int64_t i = 0;
                for (; i + LANES <= symbols; i += LANES) least = load(law + i) < least ? load(law + i) : least;
                float bottom = -largest(-least);
                for (; i < symbols; i++) bottom = law[i] < bottom ? law[i] : bottom;
                whole[e] = bottom > -INF;
            }
            for (int64_t p = 0; p < particles; p++) {
                const double* own = weights + p * experts;
                Joint joint;
                joint.count = 0;
                // Excluded symbols come out as 2^-inf = 0 by themselves, unless a negative weight turns them about.
                bool plain = true, excluded = false;
                double at_target = 0;
                for (int64_t e = 0; e < experts; e++) {
                    if (own[e] == 0) continue;
                    const float* law = laws + e * symbols;
                    joint.law[joint.count] = law;
                    joint.weight[joint.count++] = float(own[e] * 1.4426950408889634);
                    plain &= whole[e] || own[e] > 0;
                    excluded |= law[targets[n]] == -INF;
                    at_target += own[e] * double(law[targets[n]]);
                }
                double& sum = out[p * items + item];
                if (excluded || joint.count == 0) {
                    sum = excluded ? -INF_D : sum - std::log(double(symbols));
                    continue;
                }
                double normaliser;
                if (plain) {
                    // Laws are at most 1, so the exponents of useful particles lie near 0; others are done again.
                    float offset = 0;
                    Total all = sum_of_powers_any(joint, symbols, offset);
                    if (all.top > HEADROOM || all.top < -FLOORROOM) {
                        offset = all.top;
                        all = sum_of_powers_any(joint, symbols, offset);
                    }
                    normaliser = double(offset) + std::log2(all.sum);
                } else {
                    normaliser = log2_normaliser_slow(joint, symbols);
                }
                sum += at_target - normaliser * M_LN2;
            }
        }
    }
}
