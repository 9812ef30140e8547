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

// A product over all lanes, of factors in [1, 2), and the exponent that belongs to it.
struct Folded {
    double mantissa, exponent;
};

TS_INLINE Folded fold(const Product& p) {
    Quads mantissas[LANES / 4];
    QuadInts exponents[LANES / 4];
    std::memcpy(mantissas, &p.mantissa, sizeof mantissas);
    std::memcpy(exponents, &p.exponent, sizeof exponents);
    Quads mantissa = mantissas[0];
    QuadInts exponent = exponents[0];
    for (int k = 1; k < LANES / 4; k++) {
        mantissa *= mantissas[k];
        exponent += exponents[k];
    }
    return {(double(mantissa[0]) * double(mantissa[1])) * (double(mantissa[2]) * double(mantissa[3])),
            double((exponent[0] + exponent[1]) + (exponent[2] + exponent[3]))};
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
    float weight[MAX_EXPERTS];
};

template <int EXPERTS>
TS_INLINE Floats mixture(const Columns& own, int64_t experts, int64_t i) {
    Floats x = load(own.column[0] + i);
    for (int64_t e = 1; e < (EXPERTS ? EXPERTS : experts); e++) x += splat(own.weight[e]) * load(own.column[e] + i);
    return x;
}

// The product over `full` positions of the mixtures, AT_ONCE vectors between two renormalisations. `lowest` is the
// least product that came up: below 2^-120 float32 may have lost digits.
template <int EXPERTS, int AT_ONCE>
TS_INLINE Folded product_of(const Columns& own, int64_t experts, int64_t full, float& lowest) {
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
    lowest = smallest(least);
    return fold(product);
}

template <int AT_ONCE>
TS_INLINE Folded product_of_any(const Columns& own, int64_t experts, int64_t full, float& lowest) {
    switch (experts) {
        case 2: return product_of<2, AT_ONCE>(own, experts, full, lowest);
        case 3: return product_of<3, AT_ONCE>(own, experts, full, lowest);
        case 4: return product_of<4, AT_ONCE>(own, experts, full, lowest);
        case 5: return product_of<5, AT_ONCE>(own, experts, full, lowest);
        case 6: return product_of<6, AT_ONCE>(own, experts, full, lowest);
        default: return product_of<0, AT_ONCE>(own, experts, full, lowest);
    }
}

// The masses of one chunk, each position's divided by its largest.
struct Scaled {
    alignas(64) float column[MAX_EXPERTS][CHUNK];
    int64_t full;      // positions, in whole vectors: those that were added have masses of 1
    double log_scales;  // of what was divided by

    // False when nobody gave a position any mass.
    bool read(const float* masses, int64_t stride, int64_t experts, int64_t n) {
        full = (n + LANES - 1) / LANES * LANES;
        alignas(64) float top[CHUNK];
        std::fill(top, top + full, 0.0f);
        for (int64_t e = 0; e < experts; e++) {
            const float* from = masses + e * stride;
            for (int64_t i = 0; i < n; i++) top[i] = from[i] > top[i] ? from[i] : top[i];
        }
        for (int64_t i = n; i < full; i++) top[i] = 1.0f;
        Floats least = splat(INF);
        Product scales[2] = {{splat(1.0f), splat(int32_t(0))}, {splat(1.0f), splat(int32_t(0))}};
        for (int64_t i = 0; i < full; i += LANES) {
            Floats x = load(top + i);
            least = x < least ? x : least;
            // A denormal has no reciprocal: counted as the least normal number, what is left of the mass stays exact.
            x = larger(x, splat(1.17549435e-38f));
            store(top + i, splat(1.0f) / x);
            Product one = {x, splat(int32_t(0))};
            renormalise(one);  // a mass may be as small as floats are
            Product& own = scales[i / LANES & 1];
            own.mantissa *= one.mantissa;
            own.exponent += one.exponent;
            renormalise(own);
        }
        const Folded even = fold(scales[0]), odd = fold(scales[1]);
        log_scales = std::log(even.mantissa * odd.mantissa) + (even.exponent + odd.exponent) * M_LN2;
        for (int64_t e = 0; e < experts; e++) {
            const float* from = masses + e * stride;
            for (int64_t i = 0; i < n; i++) column[e][i] = from[i] * top[i];
            for (int64_t i = n; i < full; i++) column[e][i] = 1.0f;
        }
        return smallest(least) > 0;
    }
};

// masses: float [experts, positions] with row stride `stride`; weights: double [particles, experts]; offsets: int64
// [items + 1]; out: double [particles, items]. As reference.score_linear.
inline void score_linear(int64_t experts, int64_t particles, int64_t items, const float* masses, int64_t stride,
                         const double* weights, const int64_t* offsets, double* out) {
    // Scaled by the largest mass of the position, mixtures stay near 1 and many may be multiplied before the exponent is
    // taken out; the scales are the same for every particle and are added as logarithms.
    static thread_local Scaled scaled;
    std::vector<Relative> all(particles);
    std::vector<double> mantissas(particles), exponents(particles);
    std::vector<float> lowest(particles);
    for (int64_t p = 0; p < particles; p++) all[p] = relative_weights(weights + p * experts, experts);
    for (int64_t item = 0; item < items; item++) {
        for (int64_t p = 0; p < particles; p++) out[p * items + item] = 0;
        for (int64_t low = offsets[item]; low < offsets[item + 1]; low += CHUNK) {
            const int64_t n = std::min(CHUNK, offsets[item + 1] - low);
            if (!scaled.read(masses + low, stride, experts, n)) {
                for (int64_t p = 0; p < particles; p++) out[p * items + item] = -INF_D;
                continue;
            }
            constexpr float SAFE = 7.5e-37f;  // 2^-120
            for (int64_t p = 0; p < particles; p++) {
                Columns columns;
                for (int64_t e = 0; e < experts; e++) {
                    columns.column[e] = scaled.column[all[p].expert[e]];
                    columns.weight[e] = all[p].weight[e];
                }
                Folded product = product_of_any<8>(columns, experts, scaled.full, lowest[p]);
                if (!(lowest[p] >= SAFE)) product = product_of_any<1>(columns, experts, scaled.full, lowest[p]);
                mantissas[p] = product.mantissa;
                exponents[p] = product.exponent;
            }
            log2_all(mantissas.data(), mantissas.data(), particles);
            for (int64_t p = 0; p < particles; p++) {
                double& sum = out[p * items + item];
                if (lowest[p] >= SAFE) {
                    // The padding of the last vector holds the sum of the weights; it is taken off again.
                    sum += scaled.log_scales + (mantissas[p] + exponents[p]) * M_LN2 +
                           double(n) * all[p].log_heaviest - double(scaled.full - n) * all[p].log_total;
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

// What a joint law needs: of RANGED ones it is known that all exponents are in the range of powers, and SIGNED ones have
// negative weights.
enum Kind { RANGED, PLAIN, SIGNED };

// Where the laws of a particle's experts are. laws: [experts, width], width a multiple of LANES. EXPERTS 0: any number.
template <int EXPERTS>
struct Joint {
    int count;
    const float* law[EXPERTS ? EXPERTS : MAX_EXPERTS];
    float scale[EXPERTS ? EXPERTS : MAX_EXPERTS];

    TS_METHOD Joint(const Powers& own, const float* laws, int64_t width) : count(EXPERTS ? EXPERTS : own.count) {
        for (int k = 0; k < count; k++) {
            law[k] = laws + own.experts[k] * width;
            scale[k] = own.scale[k];
        }
    }

    // Exponents, base 2, of symbols i and on: less `offset` from the start, so that the sum is rounded where it is small.
    template <Kind KIND>
    TS_METHOD Floats exponent(int64_t i, float offset) const {
        Floats x = splat(-offset);
        for (int k = 0; k < count; k++) {
            Floats l = load(law[k] + i);
            // A symbol that an expert excludes stays out whatever the sign of the weight.
            x += KIND == SIGNED ? (l == splat(-INF) ? l : splat(scale[k]) * l) : splat(scale[k]) * l;
        }
        return x;
    }

    template <Kind KIND>
    TS_METHOD Floats power(int64_t i, float offset) const {
        const Floats x = exponent<KIND>(i, offset);
        return KIND == RANGED ? power_within(x) : power_of_two(x);
    }

    TS_METHOD float largest_exponent(int64_t symbols) const {
        Floats top = splat(-INF);
        for (int64_t i = 0; i < symbols; i += LANES) top = larger(exponent<SIGNED>(i, 0), top);
        return largest(top);
    }

    // The sum of 2^(exponent - offset) over the symbols and what is added to them, which has probability 0.
    template <Kind KIND>
    TS_METHOD float sum_of_powers(int64_t symbols, float offset) const {
        Floats even = splat(0.0f), odd = splat(0.0f);
        int64_t i = 0;
        for (; i + 2 * LANES <= symbols; i += 2 * LANES) {
            even += power<KIND>(i, offset);
            odd += power<KIND>(i + LANES, offset);
        }
        for (; i < symbols; i += LANES) odd += power<KIND == RANGED ? PLAIN : KIND>(i, offset);
        return total(even + odd);
    }
};

// An expert's largest and least log-probability at one position.
struct Bounds {
    float high, low;

    Bounds(const float* law, int64_t symbols) {
        Floats most = splat(-INF), least = splat(INF);
        int64_t i = 0;
        for (; i + LANES <= symbols; i += LANES) {
            const Floats l = load(law + i);
            most = larger(l, most);
            least = l < least ? l : least;
        }
        high = largest(most);
        low = smallest(least);
        for (; i < symbols; i++) {
            high = law[i] > high ? law[i] : high;
            low = law[i] < low ? law[i] : low;
        }
    }
};

// The sum and the offset that it is relative to. Weights that are not negative bound the joint law by its experts' own
// bounds, which saves a pass over it to find the largest exponent; where experts disagree so much that the bound is far
// off, and for negative weights, that pass is made.
template <int EXPERTS>
TS_INLINE float normaliser(const Powers& own, const float* laws, int64_t width, const Bounds* bounds, int64_t symbols,
                           float& offset) {
    constexpr float SAFE = 1e-24f;  // 2^-80: the largest term is not among those that lost digits
    const Joint<EXPERTS> joint(own, laws, width);
    if (!own.negative) {
        float least = 0;
        offset = 0;
        for (int k = 0; k < joint.count; k++) {
            offset += joint.scale[k] * bounds[own.experts[k]].high;
            least += joint.scale[k] * bounds[own.experts[k]].low;
        }
        const float sum = least - offset > -126.0f ? joint.template sum_of_powers<RANGED>(symbols, offset)
                                                   : joint.template sum_of_powers<PLAIN>(symbols, offset);
        if (sum >= SAFE) return sum;
    }
    offset = joint.largest_exponent(symbols);
    return joint.template sum_of_powers<SIGNED>(symbols, offset);
}

TS_INLINE float normaliser_any(const Powers& own, const float* laws, int64_t width, const Bounds* bounds, int64_t symbols,
                               float& offset) {
    switch (own.count) {
        case 1: return normaliser<1>(own, laws, width, bounds, symbols, offset);
        case 2: return normaliser<2>(own, laws, width, bounds, symbols, offset);
        case 3: return normaliser<3>(own, laws, width, bounds, symbols, offset);
        case 4: return normaliser<4>(own, laws, width, bounds, symbols, offset);
        case 5: return normaliser<5>(own, laws, width, bounds, symbols, offset);
        case 6: return normaliser<6>(own, laws, width, bounds, symbols, offset);
        default: return normaliser<0>(own, laws, width, bounds, symbols, offset);
    }
}

// log_probs: float [positions, experts, symbols]; targets: int64 [positions]; weights: double [particles, experts];
// offsets: int64 [items + 1]; out: double [particles, items]. As reference.score_log_linear.
inline void score_log_linear(int64_t experts, int64_t symbols, int64_t particles, int64_t items, const float* log_probs,
                             const int64_t* targets, const double* weights, const int64_t* offsets, double* out) {
    const int64_t width = (symbols + LANES - 1) / LANES * LANES;
    // One position's laws, of whole vectors: what is added has probability 0.
    std::vector<float> laws(experts * width, -INF);
    std::vector<Bounds> bounds;
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
            bounds.clear();
            for (int64_t e = 0; e < experts; e++) {
                float* law = &laws[e * width];
                std::memcpy(law, log_probs + (n * experts + e) * symbols, symbols * sizeof(float));
                bounds.emplace_back(law, symbols);
            }
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
                float offset;
                own.product *= normaliser_any(own, laws.data(), width, bounds.data(), symbols, offset);
                sum += at_target;
                own.exponents += double(offset);
                if (own.product > 1e200 || own.product < 1e-200) {
                    own.logs += std::log2(own.product);
                    own.product = 1;
                }
            }
        }
        for (int64_t p = 0; p < particles; p++)
            out[p * items + item] -= (all[p].exponents + all[p].logs + std::log2(all[p].product)) * M_LN2;
    }
}
