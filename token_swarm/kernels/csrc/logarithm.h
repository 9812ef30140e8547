// Logarithms of doubles.
#pragma once
#include "simd.h"

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
