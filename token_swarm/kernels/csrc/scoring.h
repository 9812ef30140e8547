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
    double pairs[4];  // of factors in [1, 2)
    int64_t exponent = 0;
    for (int k = 0; k < 4; k++) {
        pairs[k] = double(p.mantissa[k]) * double(p.mantissa[k + 4]);
        exponent += int64_t(p.exponent[k]) + p.exponent[k + 4];
    }
    return std::log((pairs[0] * pairs[1]) * (pairs[2] * pairs[3])) + double(exponent) * M_LN2;
}

constexpr int64_t CHUNK = 512;  // positions whose masses stay in the nearest cache while all particles read them

// One particle: its experts, the one with the largest weight first, and the other weights relative to it. That saves a
// multiplication per mixture, which stays between 2^-something small and the number of experts.
struct Relative {
    int64_t expert[MAX_EXPERTS];
    float weight[MAX_EXPERTS];
    double log_heaviest, log_total;
};

inline Relative relative_weights(const double* own, int64_t experts) {
    Relative relative;
    int64_t heaviest = 0;
    for (int64_t e = 1; e < experts; e++)
        if (own[e] > own[heaviest]) heaviest = e;
    double total_weight = 0;
    for (int64_t e = 0; e < experts; e++) {
        relative.expert[e] = e == 0 ? heaviest : e == heaviest ? 0 : e;
        relative.weight[e] = float(own[relative.expert[e]] / own[heaviest]);
        total_weight += double(relative.weight[e]);
    }
    relative.log_heaviest = std::log(own[heaviest]);
    relative.log_total = std::log(total_weight);
    return relative;
}

// Over one chunk: where its columns of scaled masses are.
struct Columns {
    const float* column[MAX_EXPERTS];
    Floats weight[MAX_EXPERTS];
};

template <int EXPERTS>
TS_INLINE Floats mixture(const Columns& own, int64_t experts, int64_t i) {
    Floats x = load(own.column[0] + i);
    for (int64_t e = 1; e < (EXPERTS ? EXPERTS : experts); e++) x += own.weight[e] * load(own.column[e] + i);
    return x;
}

// Log of the product over `full` positions of the mixtures, AT_ONCE vectors between two renormalisations. `lowest` is
// the least product that came up: below 2^-120 float32 may have lost digits.
template <int EXPERTS, int AT_ONCE>
TS_INLINE double log_product(const Columns& own, int64_t experts, int64_t full, float& lowest) {
    Product product = {splat(1.0f), splat(int32_t(0))};
    Floats least = splat(INF);
    int64_t i = 0;
    for (; i + AT_ONCE * LANES <= full; i += AT_ONCE * LANES) {
        Floats x = mixture<EXPERTS>(own, experts, i), y = splat(1.0f);
        if (AT_ONCE > 1) {
            y = mixture<EXPERTS>(own, experts, i + LANES);
            for (int k = 2; k < AT_ONCE; k += 2) {
                x *= mixture<EXPERTS>(own, experts, i + k * LANES);
                y *= mixture<EXPERTS>(own, experts, i + (k + 1) * LANES);
            }
            x *= y;
        }
        least = x < least ? x : least;
        product.mantissa *= x;
        renormalise(product);
    }
    if (i < full) {
        Floats x = mixture<EXPERTS>(own, experts, i);
        while ((i += LANES) < full) x *= mixture<EXPERTS>(own, experts, i);
        least = x < least ? x : least;
        product.mantissa *= x;
        renormalise(product);
    }
    lowest = -largest(-least);
    return logarithm(product);
}

template <int AT_ONCE>
TS_INLINE double log_product_any(const Columns& own, int64_t experts, int64_t full, float& lowest) {
    switch (experts) {
        case 2: return log_product<2, AT_ONCE>(own, experts, full, lowest);
        case 3: return log_product<3, AT_ONCE>(own, experts, full, lowest);
        case 4: return log_product<4, AT_ONCE>(own, experts, full, lowest);
        case 5: return log_product<5, AT_ONCE>(own, experts, full, lowest);
        case 6: return log_product<6, AT_ONCE>(own, experts, full, lowest);
        default: return log_product<0, AT_ONCE>(own, experts, full, lowest);
    }
}

// masses: float [experts, positions] with row stride `stride`; weights: double [particles, experts]; offsets: int64
// [items + 1]; out: double [particles, items]. As reference.score_linear.
inline void score_linear(int64_t experts, int64_t particles, int64_t items, const float* masses, int64_t stride,
                         const double* weights, const int64_t* offsets, double* out) {
    // Scaled by the largest mass of the position, mixtures stay near 1 and many may be multiplied before the exponent is
    // taken out; the scales are the same for every particle and are added as logarithms.
    alignas(32) float scaled[MAX_EXPERTS][CHUNK];
    alignas(32) float top[CHUNK], inverse[CHUNK];
    std::vector<Relative> all(particles);
    for (int64_t p = 0; p < particles; p++) all[p] = relative_weights(weights + p * experts, experts);
    for (int64_t item = 0; item < items; item++) {
        for (int64_t p = 0; p < particles; p++) out[p * items + item] = 0;
        for (int64_t low = offsets[item]; low < offsets[item + 1]; low += CHUNK) {
            const int64_t n = std::min(CHUNK, offsets[item + 1] - low), full = (n + LANES - 1) / LANES * LANES;
            std::fill(top, top + full, 0.0f);
            for (int64_t e = 0; e < experts; e++) {
                const float* from = masses + e * stride + low;
                for (int64_t i = 0; i < n; i++) top[i] = from[i] > top[i] ? from[i] : top[i];
            }
            for (int64_t i = n; i < full; i++) top[i] = 1.0f;
            Floats smallest = splat(INF);
            for (int64_t i = 0; i < full; i += LANES) {
                Floats x = load(top + i);
                smallest = x < smallest ? x : smallest;
                // A denormal has no reciprocal: counted as the least normal number, what is left of the mass stays exact.
                store(top + i, larger(x, splat(1.17549435e-38f)));
            }
            if (!(-largest(-smallest) > 0)) {
                for (int64_t p = 0; p < particles; p++) out[p * items + item] = -INF_D;
                continue;
            }
            for (int64_t i = 0; i < full; i++) inverse[i] = 1.0f / top[i];
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
                for (int64_t i = 0; i < n; i++) scaled[e][i] = from[i] * inverse[i];
                for (int64_t i = n; i < full; i++) scaled[e][i] = 1.0f;
            }
            for (int64_t p = 0; p < particles; p++) {
                double& sum = out[p * items + item];
                const Relative& relative = all[p];
                Columns columns;
                for (int64_t e = 0; e < experts; e++) {
                    columns.column[e] = scaled[relative.expert[e]];
                    columns.weight[e] = splat(relative.weight[e]);
                }
                constexpr float SAFE = 7.5e-37f;  // 2^-120
                float lowest;
                double logs = log_product_any<8>(columns, experts, full, lowest);
                if (!(lowest >= SAFE)) logs = log_product_any<1>(columns, experts, full, lowest);
                if (lowest >= SAFE) {
                    // The padding of the last vector holds the sum of the weights; it is taken off again.
                    sum += log_scales + logs + double(n) * relative.log_heaviest - double(full - n) * relative.log_total;
                    continue;
                }
                // A particle whose best experts have next to no weight: one logarithm a position.
                for (int64_t k = 0; k < n; k++) {
                    double x = 0;
                    for (int64_t e = 0; e < experts; e++) x += weights[p * experts + e] * double(masses[e * stride + low + k]);
                    sum += std::log(x);
                }
            }
        }
    }
}

// What does not change from position to position of one particle.
struct Powers {
    int64_t experts[MAX_EXPERTS];  // those that are asked
    double weight[MAX_EXPERTS];
    float scale[MAX_EXPERTS];  // the weight times log2(e)
    int count;
    bool negative;
    // The normalisers so far: their exponents added up, and the sums multiplied, so that few logarithms are taken.
    double exponents, product, logs;
};

// The exponents, base 2, of one particle's joint law at one position; returns the largest. laws: [experts, width], width
// a multiple of LANES. EXPERTS 0: any number.
template <int EXPERTS, bool NEGATIVE>
TS_INLINE float joint_exponents(const Powers& own, const float* laws, int64_t width, float* out) {
    const int count = EXPERTS ? EXPERTS : own.count;
    const float* law[EXPERTS ? EXPERTS : MAX_EXPERTS];
    for (int k = 0; k < count; k++) law[k] = laws + own.experts[k] * width;
    Floats top = splat(-INF);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats x = splat(0.0f);
        for (int k = 0; k < count; k++) {
            Floats l = load(law[k] + i), term = splat(own.scale[k]) * l;
            // A symbol that an expert excludes stays out whatever the sign of the weight.
            x += NEGATIVE ? (l == splat(-INF) ? l : term) : term;
        }
        store(out + i, x);
        top = larger(x, top);
    }
    return largest(top);
}

TS_INLINE float joint_exponents_any(const Powers& own, const float* laws, int64_t width, float* out) {
    if (own.negative) return joint_exponents<0, true>(own, laws, width, out);
    switch (own.count) {
        case 1: return joint_exponents<1, false>(own, laws, width, out);
        case 2: return joint_exponents<2, false>(own, laws, width, out);
        case 3: return joint_exponents<3, false>(own, laws, width, out);
        case 4: return joint_exponents<4, false>(own, laws, width, out);
        case 5: return joint_exponents<5, false>(own, laws, width, out);
        case 6: return joint_exponents<6, false>(own, laws, width, out);
        default: return joint_exponents<0, false>(own, laws, width, out);
    }
}

// The sum of 2^(x - offset); the exponents are in the nearest cache. A loop of its own: the processor looks further ahead
// in two short loops than in one that does both.
TS_INLINE double sum_of_powers(const float* x, int64_t width, float offset) {
    Floats even = splat(0.0f), odd = splat(0.0f);
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        even += power_of_two(load(x + i) - splat(offset));
        odd += power_of_two(load(x + i + LANES) - splat(offset));
    }
    for (; i < width; i += LANES) even += power_of_two(load(x + i) - splat(offset));
    return total(even + odd);
}

// log_probs: float [positions, experts, symbols]; targets: int64 [positions]; weights: double [particles, experts];
// offsets: int64 [items + 1]; out: double [particles, items]. As reference.score_log_linear.
inline void score_log_linear(int64_t experts, int64_t symbols, int64_t particles, int64_t items, const float* log_probs,
                             const int64_t* targets, const double* weights, const int64_t* offsets, double* out) {
    const int64_t width = (symbols + LANES - 1) / LANES * LANES;
    // One position's laws, of whole vectors: what is added has probability 0.
    std::vector<float> laws(experts * width, -INF), exponents(width);
    std::vector<Powers> all(particles);
    for (int64_t p = 0; p < particles; p++) {
        Powers& own = all[p];
        own.count = 0;
        own.negative = false;
        for (int64_t e = 0; e < experts; e++) {
            const double w = weights[p * experts + e];
            if (w == 0) continue;
            own.experts[own.count] = e;
            own.weight[own.count] = w;
            own.scale[own.count++] = float(w * 1.4426950408889634);
            own.negative |= w < 0;
        }
    }
    for (int64_t item = 0; item < items; item++) {
        for (int64_t p = 0; p < particles; p++) {
            out[p * items + item] = 0;
            all[p].exponents = all[p].logs = 0;
            all[p].product = 1;
        }
        for (int64_t n = offsets[item]; n < offsets[item + 1]; n++) {
            for (int64_t e = 0; e < experts; e++)
                std::memcpy(&laws[e * width], log_probs + (n * experts + e) * symbols, symbols * sizeof(float));
            for (int64_t p = 0; p < particles; p++) {
                Powers& own = all[p];
                double& sum = out[p * items + item];
                if (own.count == 0) {
                    sum -= std::log(double(symbols));
                    continue;
                }
                double at_target = 0;
                bool excluded = false;
                for (int k = 0; k < own.count; k++) {
                    const float law = laws[own.experts[k] * width + targets[n]];
                    at_target += own.weight[k] * double(law);
                    excluded |= law == -INF;
                }
                if (excluded) {
                    sum = -INF_D;
                    continue;
                }
                const float top = joint_exponents_any(own, laws.data(), width, exponents.data());
                sum += at_target;
                own.product *= sum_of_powers(exponents.data(), width, top);
                own.exponents += double(top);
                if (own.product > 1e200) {
                    own.logs += std::log2(own.product);
                    own.product = 1;
                }
            }
        }
        for (int64_t p = 0; p < particles; p++)
            out[p * items + item] -= (all[p].exponents + all[p].logs + std::log2(all[p].product)) * M_LN2;
    }
}
