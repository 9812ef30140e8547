// Mixing byte laws of 257 symbols in float64.

constexpr int SYMBOLS = 257;
constexpr int ROOM = 264;  // of a law: whole vectors of any width, zeros behind the last symbol

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

inline void log2_all(const double* in, double* out, int64_t n) {
    for (int64_t i = 0; i < n; i += DOUBLES) {
        const size_t size = sizeof(double) * size_t(std::min<int64_t>(DOUBLES, n - i));
        Doubles x = Doubles{} + 1.0;
        std::memcpy(&x, in + i, size);
        x = log2_of(x);
        std::memcpy(out + i, &x, size);
    }
}

// 2^x for x <= 1023; 0 below -1000.
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

inline void add_law(double* law, double weight, const double* other) {
    for (int s = 0; s < ROOM; s += DOUBLES) store(law + s, load(law + s) + weight * load(other + s));
}

// laws: [groups] pointers to laws; out: a law, scaled to add up to 1, or zeros when nothing is possible.
// linear: sum_g W_g P_g; log-linear: proportional to prod_g P_g^W_g, without symbols that some group excludes.
inline void mix_bytes(int64_t groups, const double* const* laws, const double* weights, int32_t log_linear, double* out) {
    if (!log_linear) {
        std::fill(out, out + ROOM, 0.0);
        for (int64_t g = 0; g < groups; g++) add_law(out, weights[g], laws[g]);
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
