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

// One particle over one chunk: columns of scaled masses, the one with the largest weight first, and the other weights
// relative to it. That saves a multiplication per mixture, which stays between 2^-something small and the number of experts.
struct Relative {
    const float* column[MAX_EXPERTS];
    Floats weight[MAX_EXPERTS];
};

template <int EXPERTS>
TS_INLINE Floats mixture(const Relative& own, int64_t experts, int64_t i) {
    Floats x = load(own.column[0] + i);
    for (int64_t e = 1; e < (EXPERTS ? EXPERTS : experts); e++) x += own.weight[e] * load(own.column[e] + i);
    return x;
}

// Log of the product over `full` positions of the mixtures, AT_ONCE vectors between two renormalisations. `lowest` is
// the least product that came up: below 2^-120 float32 may have lost digits.
template <int EXPERTS, int AT_ONCE>
TS_INLINE double log_product(const Relative& own, int64_t experts, int64_t full, float& lowest) {
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
    for (; i < full; i += LANES) {
        Floats x = mixture<EXPERTS>(own, experts, i);
        least = x < least ? x : least;
        product.mantissa *= x;
        renormalise(product);
    }
    lowest = -largest(-least);
    return logarithm(product);
}

template <int AT_ONCE>
TS_INLINE double log_product_any(const Relative& own, int64_t experts, int64_t full, float& lowest) {
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
            // A denormal has no reciprocal: counted as the least normal number, what is left of the mass stays exact.
            for (int64_t i = 0; i < n; i++) top[i] = top[i] < 1.17549435e-38f ? 1.17549435e-38f : top[i];
            for (int64_t i = n; i < full; i++) top[i] = 1.0f;
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
                const double* own = weights + p * experts;
                int64_t heaviest = 0;
                for (int64_t e = 1; e < experts; e++)
                    if (own[e] > own[heaviest]) heaviest = e;
                Relative relative;
                double total_weight = 0;
                for (int64_t e = 0; e < experts; e++) {
                    const int64_t from = e == 0 ? heaviest : e == heaviest ? 0 : e;
                    relative.column[e] = scaled[from];
                    const float weight = float(own[from] / own[heaviest]);
                    relative.weight[e] = splat(weight);
                    total_weight += double(weight);
                }
                constexpr float SAFE = 7.5e-37f;  // 2^-120
                float lowest;
                double logs = log_product_any<8>(relative, experts, full, lowest);
                if (!(lowest >= SAFE)) logs = log_product_any<1>(relative, experts, full, lowest);
                if (lowest >= SAFE) {
                    // The padding of the last vector holds the sum of the weights; it is taken off again.
                    sum += log_scales + logs + double(n) * std::log(own[heaviest]) - double(full - n) * std::log(total_weight);
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

// What an expert adds to a symbol's exponent; a symbol that it excludes stays out whatever the sign of the weight.
TS_INLINE Floats term(const Joint& joint, int k, int64_t i) {
    Floats law = load(joint.law[k] + i);
    return law == splat(-INF) ? law : splat(joint.weight[k]) * law;
}

template <int EXPERTS>
TS_INLINE Floats joint_exponent(const Joint& joint, int64_t i) {
    Floats x = term(joint, 0, i);
    for (int k = 1; k < (EXPERTS ? EXPERTS : joint.count); k++) x += term(joint, k, i);
    return x;
}

TS_INLINE float joint_exponent_one(const Joint& joint, int64_t i) {
    float x = 0;
    for (int k = 0; k < joint.count; k++) {
        if (joint.law[k][i] == -INF) return -INF;
        x += joint.weight[k] * joint.law[k][i];
    }
    return x;
}

template <int EXPERTS>
TS_INLINE Total sum_of_powers(const Joint& joint, int64_t symbols, float offset) {
    Floats top = splat(-INF), sum = splat(0.0f);
    int64_t i = 0;
    for (; i + LANES <= symbols; i += LANES) {
        Floats x = joint_exponent<EXPERTS>(joint, i);
        top = larger(x, top);
        sum += power_of_two(x - splat(offset));
    }
    float best = largest(top);
    double all = total(sum);
    for (; i < symbols; i++) {
        float x = joint_exponent_one(joint, i);
        best = x > best ? x : best;
        all += std::exp2(x - offset);
    }
    return {best, all};
}

// The same for weights that are not negative, relative to a first guess at the largest exponent: nothing overflows while
// the guess is not too far below 0, which no exponent exceeds, and whatever is below 2^-126 may count as that.
template <int EXPERTS>
TS_INLINE double sum_of_small_powers(const Joint& joint, int64_t symbols, float guess) {
    Floats even = splat(0.0f), odd = splat(0.0f);
    auto power = [&](int64_t i) __attribute__((always_inline)) {
        const Floats magic = splat(12582912.0f);
        Floats x = splat(joint.weight[0]) * load(joint.law[0] + i) - splat(guess);
        for (int k = 1; k < (EXPERTS ? EXPERTS : joint.count); k++)
            x += splat(joint.weight[k]) * load(joint.law[k] + i);
        x = larger(x, splat(-126.0f));
        Floats shifted = x + magic;
        return as_floats(as_ints(exp2_fraction(x - (shifted - magic))) + (as_ints(shifted) << 23));
    };
    int64_t i = 0;
    for (; i + 2 * LANES <= symbols; i += 2 * LANES) {
        even += power(i);
        odd += power(i + LANES);
    }
    for (; i + LANES <= symbols; i += LANES) even += power(i);
    double all = total(even + odd);
    for (; i < symbols; i++) all += std::exp2(joint_exponent_one(joint, i) - guess);
    return all;
}

// The sum of all powers relative to `guess`, which is raised where that would overflow.
template <int EXPERTS>
TS_INLINE double powers(const Joint& joint, int64_t symbols, bool negative, float& guess) {
    if (!negative && guess > -HEADROOM) return sum_of_small_powers<EXPERTS>(joint, symbols, guess);
    Total all = sum_of_powers<EXPERTS>(joint, symbols, guess);
    if (all.top - guess > HEADROOM) {
        guess = all.top;
        all = sum_of_powers<EXPERTS>(joint, symbols, guess);
    }
    return all.sum;
}

TS_INLINE double powers_any(const Joint& joint, int64_t symbols, bool negative, float& guess) {
    switch (joint.count) {
        case 1: return powers<1>(joint, symbols, negative, guess);
        case 2: return powers<2>(joint, symbols, negative, guess);
        case 3: return powers<3>(joint, symbols, negative, guess);
        case 4: return powers<4>(joint, symbols, negative, guess);
        case 5: return powers<5>(joint, symbols, negative, guess);
        case 6: return powers<6>(joint, symbols, negative, guess);
        default: return powers<0>(joint, symbols, negative, guess);
    }
}

// What does not change from position to position of one particle.
struct Powers {
    int experts[MAX_EXPERTS];  // those that are asked
    double weight[MAX_EXPERTS];
    Joint joint;
    bool negative;
    // The normalisers so far: their exponents added up, and the sums multiplied, so that few logarithms are taken.
    double exponents, product, logs;
};

// log_probs: float [positions, experts, symbols]; targets: int64 [positions]; weights: double [particles, experts];
// offsets: int64 [items + 1]; out: double [particles, items]. As reference.score_log_linear.
inline void score_log_linear(int64_t experts, int64_t symbols, int64_t particles, int64_t items, const float* log_probs,
                             const int64_t* targets, const double* weights, const int64_t* offsets, double* out) {
    std::vector<int64_t> likeliest(experts);  // symbol of each expert
    std::vector<Powers> all(particles);
    for (int64_t p = 0; p < particles; p++) {
        Powers& own = all[p];
        own.joint.count = 0;
        own.negative = false;
        for (int64_t e = 0; e < experts; e++) {
            const double w = weights[p * experts + e];
            if (w == 0) continue;
            own.experts[own.joint.count] = int(e);
            own.weight[own.joint.count] = w;
            own.joint.weight[own.joint.count++] = float(w * 1.4426950408889634);
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
            const float* laws = log_probs + n * experts * symbols;
            for (int64_t e = 0; e < experts; e++) {
                const float* law = laws + e * symbols;
                Floats most = splat(-INF);
                int64_t i = 0;
                for (; i + LANES <= symbols; i += LANES) most = larger(load(law + i), most);
                float top = largest(most);
                for (; i < symbols; i++) top = law[i] > top ? law[i] : top;
                likeliest[e] = 0;
                while (law[likeliest[e]] != top && likeliest[e] + 1 < symbols) likeliest[e]++;
            }
            for (int64_t p = 0; p < particles; p++) {
                Powers& own = all[p];
                Joint& joint = own.joint;
                double& sum = out[p * items + item];
                double at_target = 0;
                for (int k = 0; k < joint.count; k++) {
                    joint.law[k] = laws + own.experts[k] * symbols;
                    at_target += own.weight[k] * double(joint.law[k][targets[n]]);
                }
                // The joint law is largest at or near what some expert likes best.
                float guess = joint_exponent_one(joint, targets[n]);
                if (guess == -INF || joint.count == 0) {
                    sum = joint.count == 0 ? sum - std::log(double(symbols)) : -INF_D;
                    continue;
                }
                for (int64_t e = 0; e < experts; e++) {
                    const float x = joint_exponent_one(joint, likeliest[e]);
                    guess = x > guess ? x : guess;
                }
                sum += at_target;
                own.product *= powers_any(joint, symbols, own.negative, guess);
                own.exponents += double(guess);
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
