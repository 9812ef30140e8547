// Mixing byte laws of 257 symbols in float64.

constexpr int SYMBOLS = 257;
constexpr int ROOM = 264;  // of a law: whole vectors of any width, zeros behind the last symbol

#if TS_STEPS == 16
// Sixteenths of [1, 2) are looked up in two registers with one instruction; what is left is small enough for a short
// polynomial (at Chebyshev's nodes).
template <class V>
struct Sixteen {
    V low, high;
    TS_METHOD V operator[](Longs n) const { return __builtin_shuffle(low, high, n); }
};

// log2 of positive normal numbers, to 2e-15.
TS_INLINE Doubles log2_of(Doubles x) {
    // One through the middle of each sixteenth, and minus the logarithms of that.
    constexpr Sixteen<Doubles> INVERSES = {
        {0.9696969696969697, 0.9142857142857143, 0.8648648648648649, 0.8205128205128205, 0.7804878048780488,
         0.7441860465116279, 0.7111111111111111, 0.6808510638297872},
        {0.6530612244897959, 0.6274509803921569, 0.6037735849056604, 0.5818181818181818, 0.5614035087719298,
         0.5423728813559322, 0.5245901639344263, 0.5079365079365079}};
    constexpr Sixteen<Doubles> LOGS = {
        {0.044394119358453395, 0.1292830169449665, 0.2094533656289497, 0.28540221886224837, 0.3575520046180836,
         0.42626475470209796, 0.49185309632967467, 0.5545888516776374},
        {0.6147098441152083, 0.6724253419714956, 0.7279204545631992, 0.7813597135246597, 0.8328900141647417,
         0.8826430493618412, 0.9307373375628862, 0.9772799234999165}};
    const Longs bits = as_longs(x), step = bits >> 48;
    const Doubles m = as_doubles((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull), r = m * INVERSES[step] - 1.0;
    Doubles p = r * 0.20635878589218726 - 0.24074109847558067;
    p = p * r + 0.2885388882366401;
    p = p * r - 0.3606736252921298;
    p = p * r + 0.4808983469768447;
    p = p * r - 0.7213475204600702;
    p = p * r + 1.4426950408889634;
    // In the bits of 1.5 * 2^52 the exponent is a double without an instruction for 64-bit integers.
    return p * r + (as_doubles((bits >> 52) | 0x4338000000000000ull) - (6755399441055744.0 + 1023.0) + LOGS[step]);
}
#else
// log2 of positive normal numbers, to a few units in the last place.
TS_INLINE Doubles log2_of(Doubles x) {
    // The mantissa goes to [sqrt(1/2), sqrt(2)]; 1024 more keeps the exponent positive, for an unsigned shift.
    Longs bits = as_longs(x);
    const Longs exponent = (bits - 0x3fe6a09e667f3bcdull + (1024ull << 52)) >> 52;
    const Doubles m = as_doubles(bits - ((exponent - 1024) << 52));
    // A division in float and one step of Newton's: 48 bits in a fifth of the time of one in double.
    const HalfFloats rough = 1.0f / __builtin_convertvector(m + 1.0, HalfFloats);
    const Doubles estimate = widened(rough), t = (m - 1.0) * (estimate * (2.0 - (m + 1.0) * estimate)), s = t * t;
    // log2((1 + t) / (1 - t)) / t, to 2e-16 (at Chebyshev's nodes).
    Doubles p = s * 0.24293824606326322 + 0.26144245557136553;
    p = p * s + 0.3206164421244846;
    p = p * s + 0.4121984013068434;
    p = p * s + 0.5770780172508729;
    p = p * s + 0.9617966939243245;
    p = p * s + 2.885390081777927;
    // In the bits of 1.5 * 2^52 it is a double without an instruction for 64-bit integers.
    return (as_doubles(exponent + 0x4338000000000000ull) - (6755399441055744.0 + 1024.0)) + p * t;
}
#endif

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

inline double most_of(const double* law) {
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
inline void scale_law(double* law) {
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

inline void set_law(double* law, double weight, const double* other) {
    for (int s = 0; s < ROOM; s += DOUBLES) store(law + s, weight * load(other + s));
}

inline void add_law(double* law, double weight, const double* other) {
    for (int s = 0; s < ROOM; s += DOUBLES) store(law + s, load(law + s) + weight * load(other + s));
}

// laws: [groups] pointers to laws; out: a law, scaled to add up to 1, or zeros when nothing is possible.
// linear: sum_g W_g P_g; log-linear: proportional to prod_g P_g^W_g, without symbols that some group excludes.
inline void mix_bytes(int64_t groups, const double* const* laws, const double* weights, int32_t log_linear, double* out) {
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
