// Masses of intervals of sorted tokens, of which a sum is kept for every STRIDE-th.
#pragma once
#include "simd.h"

constexpr int64_t STRIDE = 8;  // the byte walk keeps a sum for every so many tokens, as kernels/reference.py

TS_INLINE QuadDoubles four(const float* p) {
    return QuadDoubles{p[0], p[1], p[2], p[3]};  // __builtin_convertvector makes four instructions of what is one
}

TS_INLINE QuadDoubles four(const double* p) {
    QuadDoubles x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Mass of the sorted tokens [low, high), one by one: for intervals whose difference of sums has lost its digits.
template <class T>
inline double sum_interval(const T* masses, int64_t low, int64_t high) {
    QuadDoubles sums = {};
    for (; low + 4 <= high; low += 4) sums += four(masses + low);
    double sum = total(sums);
    for (; low < high; low++) sum += double(masses[low]);
    return sum;
}
