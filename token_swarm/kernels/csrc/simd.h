// Vectors and elementary functions. No intrinsics: GCC and Clang vector extensions, lowered for each target.
#pragma once

// Helpers must be inlined: a function of its own would pass vectors in memory.
#define TS_INLINE static inline __attribute__((always_inline))
#define TS_METHOD inline __attribute__((always_inline))
// A loop worth a call, of which there are many versions: inlined into one function they take several times as long to
// compile.
#define TS_APART __attribute__((noinline))
// The same of a loop so short that the call shows, a twentieth of its time. At the baseline it does not: a vector there
// takes several registers, which makes the loop longer, and the function four times as slow to compile.
#if TS_LEVEL == 0
#define TS_VERSION TS_APART
#else
#define TS_VERSION TS_INLINE
#endif

// Lanes as wide as the registers of the level, 8, or 16 with AVX-512.
constexpr int LANES = TS_LANES;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef float Quads __attribute__((vector_size(16)));
typedef int32_t QuadInts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
constexpr int DOUBLES = LANES / 2;
typedef double Doubles __attribute__((vector_size(8 * DOUBLES)));
typedef double Pairs __attribute__((vector_size(16)));
typedef double QuadDoubles __attribute__((vector_size(32)));
typedef uint64_t QuadLongs __attribute__((vector_size(32)));
typedef uint64_t Longs __attribute__((vector_size(8 * DOUBLES)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NAN_F = std::numeric_limits<float>::quiet_NaN();
constexpr double INF_D = std::numeric_limits<double>::infinity();

#if TS_LEVEL == 0  // register by register: GCC writes wider ones to memory lane by lane, to read them back
TS_INLINE Floats splat(float x) {
    Quads parts[LANES / 4];
    for (Quads& part : parts) part = x - Quads{};
    Floats y;
    std::memcpy(&y, parts, sizeof y);
    return y;
}
TS_INLINE Ints splat(int32_t x) {
    QuadInts parts[LANES / 4];
    for (QuadInts& part : parts) part = x - QuadInts{};
    Ints y;
    std::memcpy(&y, parts, sizeof y);
    return y;
}
#else
TS_INLINE Floats splat(float x) { return x - Floats{}; }  // minus: -0 + 0 would be 0
TS_INLINE Ints splat(int32_t x) { return x - Ints{}; }
#endif
TS_INLINE Floats as_floats(Ints x) { Floats y; std::memcpy(&y, &x, sizeof y); return y; }
TS_INLINE Ints as_ints(Floats x) { Ints y; std::memcpy(&y, &x, sizeof y); return y; }
TS_INLINE Floats load(const float* p) { Floats x; std::memcpy(&x, p, sizeof x); return x; }
TS_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
TS_INLINE Doubles load(const double* p) { Doubles x; std::memcpy(&x, p, sizeof x); return x; }
TS_INLINE void store(double* p, Doubles x) { std::memcpy(p, &x, sizeof x); }

// Floats from the start of a line of the cache on: no vector of them lies in two.
class Lines {
public:
    Lines(int64_t size, float value) : room(size_t(size + LANES), value) {
        void* at = room.data();
        size_t space = room.size() * sizeof(float);
        first = static_cast<float*>(std::align(sizeof(Floats), size_t(size) * sizeof(float), at, space));
    }
    Lines(const Lines&) = delete;
    TS_METHOD float* data() { return first; }
    TS_METHOD const float* data() const { return first; }

private:
    std::vector<float> room;
    float* first;
};

// `choose` of two vectors, register by register. GCC halves sums and products of vectors that are wider than a register,
// but makes of a comparison of them one jump for every lane.
template <class F>
TS_INLINE Floats by_register(Floats a, Floats b, F choose) {
#if TS_LEVEL == 0
    Quads x[LANES / 4], y[LANES / 4];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    for (int k = 0; k < LANES / 4; k++) x[k] = choose(x[k], y[k]);
    std::memcpy(&a, x, sizeof a);
    return a;
#else
    return choose(a, b);
#endif
}

TS_INLINE Floats larger(Floats a, Floats b) {
    return by_register(a, b, [](auto x, auto y) __attribute__((always_inline)) { return x > y ? x : y; });
}
TS_INLINE Floats smaller(Floats a, Floats b) {
    return by_register(a, b, [](auto x, auto y) __attribute__((always_inline)) { return x < y ? x : y; });
}
TS_INLINE HalfFloats half(Floats x, int which) {
    HalfFloats parts[2];
    std::memcpy(parts, &x, sizeof parts);
    return parts[which];
}

// Asks for memory that is needed soon.
TS_INLINE void fetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// Asks for what lies a page ahead: the processor by itself asks only within a page.
TS_INLINE void fetch_ahead(const void* from, int64_t bytes) { fetch(static_cast<const char*>(from) + 4096, bytes); }

TS_INLINE float largest(Floats x) {
    Quads parts[LANES / 4];
    std::memcpy(parts, &x, sizeof parts);
    Quads m = parts[0];
    for (int k = 1; k < LANES / 4; k++) m = m > parts[k] ? m : parts[k];
    const float a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
    return a > b ? a : b;
}

TS_INLINE float smallest(Floats x) { return -largest(-x); }

template <class V>  // Doubles or QuadDoubles, which are the same where LANES is 8
TS_INLINE double total(V x) {
    constexpr int COUNT = sizeof x / sizeof(Pairs);
    Pairs parts[COUNT];
    std::memcpy(parts, &x, sizeof parts);
    Pairs sum = parts[0];
    for (int k = 1; k < COUNT; k++) sum += parts[k];
    return sum[0] + sum[1];
}

TS_INLINE float total(Floats x) {
    Quads parts[LANES / 4];
    std::memcpy(parts, &x, sizeof parts);
    Quads sum = parts[0];
    for (int k = 1; k < LANES / 4; k++) sum += parts[k];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

TS_INLINE int64_t total(Ints x) {
    int64_t sum = 0;
    for (int k = 0; k < LANES; k++) sum += x[k];
    return sum;
}

constexpr auto plus = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
constexpr auto times = [](auto a, auto b) __attribute__((always_inline)) { return a * b; };

// A vector's quarters (or halves) combined: a vector of four.
template <class Four, class V, class F>
TS_INLINE Four folded(V x, F with) {
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof parts);
    if (LANES == 8) return with(parts[0], parts[1]);
    return with(with(parts[0], parts[1]), with(parts[LANES / 4 - 2], parts[LANES / 4 - 1]));
}

#ifdef __clang__
#define TS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadInts{__VA_ARGS__})
#endif

// The lanes of each of four vectors combined: one vector.
template <class Four, class F>
TS_INLINE Four across(const Four* x, F with) {
    const Four left = with(TS_SHUFFLE(x[0], x[1], 0, 4, 1, 5), TS_SHUFFLE(x[0], x[1], 2, 6, 3, 7));
    const Four right = with(TS_SHUFFLE(x[2], x[3], 0, 4, 1, 5), TS_SHUFFLE(x[2], x[3], 2, 6, 3, 7));
    return with(TS_SHUFFLE(left, right, 0, 1, 4, 5), TS_SHUFFLE(left, right, 2, 3, 6, 7));
}

TS_INLINE Doubles as_doubles(Longs x) { Doubles y; std::memcpy(&y, &x, sizeof y); return y; }
TS_INLINE Longs as_longs(Doubles x) { Longs y; std::memcpy(&y, &x, sizeof y); return y; }
TS_INLINE Doubles widened(HalfFloats x) { return __builtin_convertvector(x, Doubles); }

// 2^x for x in [-0.5, 0.5], to 2e-7 (minimax of those that are exact at 0). Estrin's scheme: a short chain of dependent
// operations.
TS_INLINE Floats exp2_fraction(Floats x) {
    Floats xx = x * x;
    Floats low = x * splat(6.931470037e-1f) + splat(1.0f);
    Floats middle = x * splat(5.550733581e-2f) + splat(2.402224243e-1f);
    Floats high = x * splat(1.326472731e-3f) + splat(9.671512991e-3f);
    return (high * xx + middle) * xx + low;
}

// TS_STEPS powers of two between 1 and 2 as bits, each less the bits that its index brings with it when it is shifted to
// the top of the fraction. One register, looked up with one instruction; minimax polynomials do the rest.
#if TS_STEPS == 16
constexpr int STEP_BITS = 4;
TS_INLINE Ints power_steps() {
    return Ints{0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
}
TS_INLINE Floats exp2_rest(Floats x) {  // |x| <= 1/32, to 4.3e-7
    return (x * splat(2.4021946252e-1f) + splat(6.9318783137e-1f)) * x + splat(1.0f);
}
TS_INLINE Ints step_of(Ints n) { return __builtin_shuffle(power_steps(), n); }
#elif TS_STEPS == 8
constexpr int STEP_BITS = 3;
TS_INLINE Ints power_steps() {
    return Ints{0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
}
TS_INLINE Floats exp2_rest(Floats x) {  // |x| <= 1/16, to 1e-7
    return ((x * splat(5.5498900462e-2f) + splat(2.4026407290e-1f)) * x + splat(6.9314720853e-1f)) * x + splat(1.0f);
}
TS_INLINE Ints step_of(Ints n) { return __builtin_shuffle(power_steps(), n); }
#else
constexpr int STEP_BITS = 0;
TS_INLINE Floats exp2_rest(Floats x) { return exp2_fraction(x); }
TS_INLINE Ints step_of(Ints) { return splat(0x3f800000); }
#endif

// 2^x for -127 <= x <= 127; just above -127 something of that order, and 0 there.
TS_INLINE Floats power_within(Floats x) {
    // 1.5 * 2^23 over the number of steps: adding it rounds to a whole number of steps.
    const Floats magic = splat(12582912.0f / (1 << STEP_BITS));
    const Floats shifted = x + magic;
    const Ints n = as_ints(shifted), scale = step_of(n) + (n << (23 - STEP_BITS));
    return as_floats(scale) * exp2_rest(x - (shifted - magic));
}

// The same for all x <= 127; NaN and infinity give NaN.
TS_INLINE Floats power_of_two(Floats x) {
    // The operands in this order keep NaN, with one instruction; of a constant that it knows GCC would make two.
    int32_t bits = int32_t(0xc2fe0000);  // -127
    asm("" : "+r"(bits));
    return power_within(larger(as_floats(splat(bits)), x));
}

// log2(m) of m in [sqrt(1/2), sqrt(2)]: log2((1 + t) / (1 - t)) as an odd series in t.
TS_INLINE Floats log2_mantissa(Floats m) {
    Floats t = (m - splat(1.0f)) / (m + splat(1.0f));
    Floats s = t * t;
    Floats p = splat(0.26230819f);  // 2 / (11 ln 2)
    p = p * s + splat(0.32059890f);
    p = p * s + splat(0.41219858f);
    p = p * s + splat(0.57707802f);
    p = p * s + splat(0.96179669f);
    p = p * s + splat(2.88539008f);
    return p * t;
}

// Splits positive normal x into 2^n * m with m in [sqrt(1/2), sqrt(2)].
TS_INLINE Floats split_exponent(Floats x, Floats* m) {
    Ints bits = as_ints(x);
    Ints n = (bits - splat(0x3f3504f3)) >> 23;
    *m = as_floats(bits - (n << 23));
    return __builtin_convertvector(n, Floats);
}

// Dtypes of logits, by the code the caller passes.
enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct F32 {
    typedef float Element;
    TS_INLINE Floats get(const void* row, int64_t i) { return load(static_cast<const float*>(row) + i); }
    TS_INLINE float one(const void* row, int64_t i) { return static_cast<const float*>(row)[i]; }
};

struct Bf16 {
    typedef uint16_t Element;
    TS_INLINE Floats get(const void* row, int64_t i) {
        Halves h;
        std::memcpy(&h, static_cast<const uint16_t*>(row) + i, sizeof h);
        return as_floats(__builtin_convertvector(h, Ints) << 16);
    }
    TS_INLINE float one(const void* row, int64_t i) {
        uint32_t bits = uint32_t(static_cast<const uint16_t*>(row)[i]) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
};

struct F16 {
    typedef uint16_t Element;
    // Moves exponent and mantissa into place and multiplies by 2^112, which also makes denormals right.
    TS_INLINE Floats widen(Ints h) {
        Ints magnitude = h & splat(0x7fff);
        Floats x = as_floats(magnitude << 13) * as_floats(splat(0x77800000));
        Ints special = magnitude >= splat(0x7c00);  // infinities and NaN keep their mantissa
        Ints bits = (as_ints(x) & ~special) | ((splat(0x7f800000) | (magnitude << 13)) & special);
        return as_floats(bits | ((h & splat(0x8000)) << 16));
    }
    TS_INLINE Floats get(const void* row, int64_t i) {
        Halves h;
        std::memcpy(&h, static_cast<const uint16_t*>(row) + i, sizeof h);
        return widen(__builtin_convertvector(h, Ints));
    }
    TS_INLINE float one(const void* row, int64_t i) {
        return widen(splat(int32_t(static_cast<const uint16_t*>(row)[i])))[0];
    }
};

TS_INLINE float element(int32_t dtype, const void* row, int64_t i) {
    return dtype == FLOAT32 ? F32::one(row, i) : dtype == BFLOAT16 ? Bf16::one(row, i) : F16::one(row, i);
}

TS_INLINE const void* row_of(int32_t dtype, const void* table, int64_t stride, int64_t row) {
    return static_cast<const char*>(table) + row * stride * (dtype == FLOAT32 ? 4 : 2);
}
