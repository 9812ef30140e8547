// Mixing byte laws of 257 symbols in float64.
#include "unit.h"

namespace TS_NAMESPACE {
#include "logarithm.h"
#include "sizes.h"

// 2^x for x <= 1023; 0 below -1000.
#if TS_STEPS == 16
TS_INLINE Doubles exp2_of(Doubles x) {
    // As `power_steps`, sixteenths of doubles.
    constexpr Sixteen<Longs> POWERS = {
        {0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238, 0x3fef06fe0a31b715,
         0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429},
        {0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090, 0x3feee89f995ad3ad,
         0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da}};
    const Doubles y = x > -1000.0 ? x : Doubles{} - 1000.0, magic = Doubles{} + 6755399441055744.0 / 16;
    const Doubles shifted = y + magic, r = y - (shifted - magic);
    const Longs n = as_longs(shifted), scale = POWERS[n] + (n << 48);
    Doubles p = r * 0.0013333744338239965 + 0.009618317140580765;
    p = p * r + 0.05550410866027587;
    p = p * r + 0.24022650691319414;
    p = p * r + 0.6931471805599453;
    p = p * r + 1.0;  // to 9e-15
    return x > -1000.0 ? as_doubles(scale) * p : Doubles{};
}
#else
TS_INLINE Doubles exp2_of(Doubles x) {
    const Doubles y = x > -1000.0 ? x : Doubles{} - 1000.0, shifted = y + 6755399441055744.0;
    const Doubles r = y - (shifted - 6755399441055744.0);
    Doubles p = r * 7.072586657066206e-09 + 1.020869152579221e-07;  // to 4e-16 (at Chebyshev's nodes)
    p = p * r + 1.3215442584382707e-06;
    p = p * r + 1.5252657254071693e-05;
    p = p * r + 0.00015403530441741856;
    p = p * r + 0.001333355823017503;
    p = p * r + 0.009618129107606885;
    p = p * r + 0.05550410866444766;
    p = p * r + 0.24022650695910097;
    p = p * r + 0.69314718055995;
    p = p * r + 1.0;
    return x > -1000.0 ? as_doubles(as_longs(p) + (as_longs(shifted) << 52)) : Doubles{};
}
#endif

double most_of(const double* law) {
    Doubles most = load(law);
    for (int s = DOUBLES; s < ROOM; s += DOUBLES) {
        const Doubles x = load(law + s);
        most = x > most ? x : most;
    }
    double top = most[0];
    for (int k = 1; k < DOUBLES; k++) top = most[k] > top ? most[k] : top;
    return top;
}

// Scales a law to add up to 1; zeros stay zeros.
void scale_law(double* law) {
    Doubles even = {}, odd = {};  // one would wait for every addition
    int s = 0;
    for (; s + 2 * DOUBLES <= ROOM; s += 2 * DOUBLES) {
        even += load(law + s);
        odd += load(law + s + DOUBLES);
    }
    for (; s < ROOM; s += DOUBLES) even += load(law + s);
    const double sum = total(even + odd);
    if (!(sum > 0)) return;
    const double inverse = 1.0 / sum;
    for (s = 0; s < ROOM; s += DOUBLES) store(law + s, load(law + s) * inverse);
}

void set_law(double* law, double weight, const double* other) {
    for (int s = 0; s < ROOM; s += DOUBLES) store(law + s, weight * load(other + s));
}

void add_law(double* law, double weight, const double* other) {
    for (int s = 0; s < ROOM; s += DOUBLES) store(law + s, load(law + s) + weight * load(other + s));
}

// laws: [groups] pointers to laws; out: a law, scaled to add up to 1, or zeros when nothing is possible.
// linear: sum_g W_g P_g; log-linear: proportional to prod_g P_g^W_g, without symbols that some group excludes.
void mix_bytes(int64_t groups, const double* const* laws, const double* weights, int32_t log_linear, double* out) {
    if (!log_linear) {
        set_law(out, weights[0], laws[0]);
        for (int64_t g = 1; g < groups; g++) add_law(out, weights[g], laws[g]);
        scale_law(out);
        return;
    }
    constexpr double LEAST = 2.2250738585072014e-308;
    for (int s = 0; s < ROOM; s += DOUBLES) {
        Doubles joint = {};
        for (int64_t g = 0; g < groups; g++) {
            const Doubles p = load(laws[g] + s), logs = log2_of(p >= LEAST ? p : Doubles{} + 1.0);
            joint += p >= LEAST ? weights[g] * logs : Doubles{} - INF_D;
        }
        store(out + s, joint);
    }
    const double top = most_of(out);
    // Where nothing is possible the difference is NaN, which gives 0.
    for (int s = 0; s < ROOM; s += DOUBLES) store(out + s, exp2_of(load(out + s) - top));
    scale_law(out);
}

}  // namespace TS_NAMESPACE
