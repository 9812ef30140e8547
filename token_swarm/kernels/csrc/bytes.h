// Mixing byte laws of 257 symbols in float64; loops that the compiler vectorises.

constexpr int SYMBOLS = 257;

// log2 of positive normal numbers, to a few units in the last place.
inline void log2_all(const double* in, double* out, int n) {
    for (int i = 0; i < n; i++) {
        uint64_t bits;
        std::memcpy(&bits, in + i, 8);
        // The mantissa goes to [sqrt(1/2), sqrt(2)]; 1024 more keeps the exponent positive, for an unsigned shift.
        const uint64_t exponent = (bits - 0x3fe6a09e667f3bcdull + (1024ull << 52)) >> 52;
        bits -= (exponent - 1024) << 52;
        double m;
        std::memcpy(&m, &bits, 8);
        const double t = (m - 1.0) / (m + 1.0), s = t * t;
        double p = 1.0 / 21;
        p = p * s + 1.0 / 19;
        p = p * s + 1.0 / 17;
        p = p * s + 1.0 / 15;
        p = p * s + 1.0 / 13;
        p = p * s + 1.0 / 11;
        p = p * s + 1.0 / 9;
        p = p * s + 1.0 / 7;
        p = p * s + 1.0 / 5;
        p = p * s + 1.0 / 3;
        p = p * s + 1.0;
        // In the bits of 1.5 * 2^52 it is a double without an instruction for 64-bit integers.
        const uint64_t shifted = exponent + 0x4338000000000000ull;
        double whole;
        std::memcpy(&whole, &shifted, 8);
        out[i] = (whole - (6755399441055744.0 + 1024.0)) + p * t * 2.8853900817779268;
    }
}

// 2^x for x <= 1023; 0 below -1000.
inline void exp2_all(double* x, int n) {
    for (int i = 0; i < n; i++) {
        const double y = x[i] > -1000.0 ? x[i] : -1000.0;
        const double shifted = y + 6755399441055744.0;
        const double r = (y - (shifted - 6755399441055744.0)) * 0.6931471805599453;
        double p = 1.0 / 6227020800.0;
        p = p * r + 1.0 / 479001600;
        p = p * r + 1.0 / 39916800;
        p = p * r + 1.0 / 3628800;
        p = p * r + 1.0 / 362880;
        p = p * r + 1.0 / 40320;
        p = p * r + 1.0 / 5040;
        p = p * r + 1.0 / 720;
        p = p * r + 1.0 / 120;
        p = p * r + 1.0 / 24;
        p = p * r + 1.0 / 6;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        uint64_t bits, whole;
        std::memcpy(&bits, &p, 8);
        std::memcpy(&whole, &shifted, 8);
        bits += whole << 52;
        double value;
        std::memcpy(&value, &bits, 8);
        x[i] = x[i] > -1000.0 ? value : 0.0;
    }
}

// Four partial sums: one would wait for every addition.
inline double sum_of(const double* x, int n) {
    double a = 0, b = 0, c = 0, d = 0;
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        a += x[i];
        b += x[i + 1];
        c += x[i + 2];
        d += x[i + 3];
    }
    for (; i < n; i++) a += x[i];
    return (a + b) + (c + d);
}

// Scales a law to add up to 1; zeros stay zeros.
inline void scale_law(double* law) {
    const double sum = sum_of(law, SYMBOLS);
    if (!(sum > 0)) return;
    const double inverse = 1.0 / sum;
    for (int s = 0; s < SYMBOLS; s++) law[s] *= inverse;
}

inline void add_law(double* law, double weight, const double* other) {
    for (int s = 0; s < SYMBOLS; s++) law[s] += weight * other[s];
}

// laws: [groups] pointers to 257 probabilities; out: 257, scaled to add up to 1, or zeros when nothing is possible.
// linear: sum_g W_g P_g; log-linear: proportional to prod_g P_g^W_g, without symbols that some group excludes.
inline void mix_bytes(int64_t groups, const double* const* laws, const double* weights, int32_t log_linear, double* out) {
    for (int s = 0; s < SYMBOLS; s++) out[s] = 0;
    if (!log_linear) {
        for (int64_t g = 0; g < groups; g++) add_law(out, weights[g], laws[g]);
        scale_law(out);
        return;
    }
    int16_t possible[SYMBOLS];
    double packed[SYMBOLS], logs[SYMBOLS], joint[SYMBOLS];
    int n = 0;
    for (int s = 0; s < SYMBOLS; s++) {
        bool all = groups > 0;
        for (int64_t g = 0; g < groups; g++) all &= laws[g][s] >= 2.2250738585072014e-308;
        possible[n] = int16_t(s);
        n += all;
    }
    for (int i = 0; i < n; i++) joint[i] = 0;
    for (int64_t g = 0; g < groups; g++) {
        for (int i = 0; i < n; i++) packed[i] = laws[g][possible[i]];
        log2_all(packed, logs, n);
        for (int i = 0; i < n; i++) joint[i] += weights[g] * logs[i];
    }
    double top = -INF_D;
    for (int i = 0; i < n; i++) top = joint[i] > top ? joint[i] : top;
    for (int i = 0; i < n; i++) joint[i] -= top;
    exp2_all(joint, n);
    const double inverse = 1.0 / sum_of(joint, n);
    for (int i = 0; i < n; i++) out[possible[i]] = joint[i] * inverse;
}

// Mass of [low, high) summed itself, for intervals whose difference of sums has lost its digits.
template <class T>
inline double sum_interval(const T* p, int64_t low, int64_t high) {
    double a = 0, b = 0, c = 0, d = 0;
    int64_t i = low;
    for (; i + 4 <= high; i += 4) {
        a += double(p[i]);
        b += double(p[i + 1]);
        c += double(p[i + 2]);
        d += double(p[i + 3]);
    }
    for (; i < high; i++) a += double(p[i]);
    return (a + b) + (c + d);
}

inline double sum_floats(const float* p, int64_t low, int64_t high) { return sum_interval(p, low, high); }
inline double sum_doubles(const double* p, int64_t low, int64_t high) { return sum_interval(p, low, high); }
