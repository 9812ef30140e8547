// Scoring many linear particles against a cache of masses in one read of it.
#include "unit.h"

namespace TS_NAMESPACE {
#include "logarithm.h"
#include "sizes.h"

// A product of floats as mantissas and exponents: one logarithm at the end instead of one per factor.
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

// The products of many particles, and each of them over all lanes. Folded when all are there: by then nothing has to wait
// for them any more.
struct Products {
    std::vector<float> lanes;  // [room, LANES]
    std::vector<int32_t> powers;
    std::vector<double> mantissas, exponents;  // [room]

    explicit Products(int64_t room) : lanes(room * LANES, 1.0f), powers(room * LANES), mantissas(room), exponents(room) {}

    TS_METHOD void set(int64_t p, const Product& product) {
        std::memcpy(&lanes[p * LANES], &product.mantissa, sizeof product.mantissa);
        std::memcpy(&powers[p * LANES], &product.exponent, sizeof product.exponent);
    }

    void fold() {
        for (size_t p = 0; p < mantissas.size(); p += 4) {
            Quads m[4];
            QuadInts n[4];
            for (size_t k = 0; k < 4; k++) {
                Ints power;
                std::memcpy(&power, &powers[(p + k) * LANES], sizeof power);
                m[k] = folded<Quads>(load(&lanes[(p + k) * LANES]), times);
                n[k] = folded<QuadInts>(power, plus);
            }
            const QuadDoubles mantissa = __builtin_convertvector(across(m, times), QuadDoubles);
            const QuadDoubles exponent = __builtin_convertvector(across(n, plus), QuadDoubles);
            std::memcpy(&mantissas[p], &mantissa, sizeof mantissa);
            std::memcpy(&exponents[p], &exponent, sizeof exponent);
        }
    }
};

constexpr int64_t CHUNK = 512;  // positions whose masses stay in the nearest cache while all particles read them

// The masses of one chunk, each position's divided by a power of two that brings its largest into [1, 2). Mixtures then
// stay near 1 and many may be multiplied before the exponent is taken out.
struct Scaled {
    Lines masses;           // [experts, CHUNK]
    int64_t full = 0;       // positions, in whole vectors: those that were added have masses of 1
    int64_t exponent = 0;   // of what they were divided by, over all positions

    explicit Scaled(int64_t experts) : masses(experts * CHUNK, 0) {}

    TS_METHOD const float* column(int64_t expert) const { return masses.data() + expert * CHUNK; }

    // False when nobody gave a position any mass.
    bool read(const float* from, int64_t stride, int64_t experts, int64_t n) {
        Floats least = splat(INF);
        Ints exponents = splat(int32_t(0));
        auto scale = [&](const float* own, int64_t step, int64_t i) __attribute__((always_inline)) {
            Floats top = load(own);
            for (int64_t e = 1; e < experts; e++) top = larger(load(own + e * step), top);
            least = smaller(top, least);
            // A denormal counts as the least normal number: what is left of it is small, but exact.
            const Ints field = as_ints(larger(top, splat(1.17549435e-38f))) >> 23;
            exponents += field - splat(127);
            const Floats factor = as_floats((splat(254) - field) << 23);
            for (int64_t e = 0; e < experts; e++) store(masses.data() + e * CHUNK + i, load(own + e * step) * factor);
        };
        full = 0;
        for (; full + LANES <= n; full += LANES) {
            scale(from + full, stride, full);
            for (int64_t e = 0; e < experts; e++) __builtin_prefetch(from + e * stride + full + n);  // of the next chunk
        }
        if (full < n) {
            float rest[MAX_EXPERTS * LANES];
            std::fill(rest, rest + experts * LANES, 1.0f);
            for (int64_t e = 0; e < experts; e++)
                std::copy(from + e * stride + full, from + e * stride + n, rest + e * LANES);
            scale(rest, LANES, full);
            full += LANES;
        }
        exponent = total(exponents);
        return smallest(least) > 0;
    }
};

// One particle: its experts, the one with the largest weight first, and the other weights relative to it. That saves a
// multiplication per mixture, which stays between 2^-something small and twice the number of experts.
struct Relative {
    int64_t expert[MAX_EXPERTS];
    float weight[MAX_EXPERTS];

    Relative(const double* own, int64_t experts) {
        const int64_t heaviest = std::max_element(own, own + experts) - own;
        for (int64_t e = 0; e < experts; e++) {
            expert[e] = e == 0 ? heaviest : e == heaviest ? 0 : e;
            weight[e] = float(own[expert[e]] / own[heaviest]);
        }
    }

    // Mixtures of vector i of a chunk. EXPERTS 0: any number.
    template <int EXPERTS>
    TS_METHOD Floats mixture(const float* const* columns, int64_t experts, int64_t i) const {
        Floats x = load(columns[0] + i);
        for (int64_t e = 1; e < (EXPERTS ? EXPERTS : experts); e++) x += splat(weight[e]) * load(columns[e] + i);
        return x;
    }

    // The product over a chunk of the mixtures, AT_ONCE vectors between two renormalisations. `least` is lowered to the
    // least product that came up.
    template <int EXPERTS, int AT_ONCE>
    TS_METHOD Product product(const Scaled& scaled, int64_t experts, Floats& least) const {
        const float* columns[EXPERTS ? EXPERTS : MAX_EXPERTS];
        for (int64_t e = 0; e < (EXPERTS ? EXPERTS : experts); e++) columns[e] = scaled.column(expert[e]);
        Product product = {splat(1.0f), splat(int32_t(0))};
        auto include = [&](Floats x) __attribute__((always_inline)) {
            least = smaller(x, least);
            product.mantissa *= x;
            renormalise(product);
        };
        int64_t i = 0;
        for (; i + AT_ONCE * LANES <= scaled.full; i += AT_ONCE * LANES) {
            Floats x = mixture<EXPERTS>(columns, experts, i), y = splat(1.0f);
            if (AT_ONCE > 1) {
                y = mixture<EXPERTS>(columns, experts, i + LANES);
                for (int k = 2; k < AT_ONCE; k += 2) {
                    x *= mixture<EXPERTS>(columns, experts, i + k * LANES);
                    y *= mixture<EXPERTS>(columns, experts, i + (k + 1) * LANES);
                }
                x *= y;
            }
            include(x);
        }
        if (i < scaled.full) {
            Floats x = mixture<EXPERTS>(columns, experts, i);
            while ((i += LANES) < scaled.full) x *= mixture<EXPERTS>(columns, experts, i);
            include(x);
        }
        return product;
    }

    template <int AT_ONCE>
    TS_METHOD Product product_of_any(const Scaled& scaled, int64_t experts, Floats& least) const {
        switch (experts) {
            case 2: return product<2, AT_ONCE>(scaled, experts, least);
            case 3: return product<3, AT_ONCE>(scaled, experts, least);
            case 4: return product<4, AT_ONCE>(scaled, experts, least);
            case 5: return product<5, AT_ONCE>(scaled, experts, least);
            case 6: return product<6, AT_ONCE>(scaled, experts, least);
            default: return product<0, AT_ONCE>(scaled, experts, least);
        }
    }
};

// masses: float [experts, positions] with row stride `stride`; weights: double [particles, experts]; offsets: int64
// [items + 1]; out: double [particles, items]. As reference.score_linear.
void score_linear(int64_t experts, int64_t particles, int64_t items, const float* masses, int64_t stride,
                         const double* weights, const int64_t* offsets, double* out) {
    static_assert(DOUBLES % 4 == 0);
    constexpr float SAFE = 7.5e-37f;  // 2^-120: a product above it has all its digits
    Scaled scaled(experts);
    const int64_t room = (particles + DOUBLES - 1) / DOUBLES * DOUBLES;  // whole vectors of particles
    std::vector<Relative> relative;
    Products products(room);
    std::vector<double> sums(room);
    std::vector<std::pair<int64_t, double>> exact;  // particles of which every position takes a logarithm, their sums
    std::vector<double> heaviest(room), added(room);  // logarithms of the largest weight; of all, relative to it
    for (int64_t p = 0; p < particles; p++) {
        const double* own = weights + p * experts;
        relative.emplace_back(own, experts);
        heaviest[p] = std::log(own[relative[p].expert[0]]);
        double all = 0;
        for (int64_t e = 0; e < experts; e++) all += double(relative[p].weight[e]);
        added[p] = std::log(all);
    }
    for (int64_t item = 0; item < items; item++) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t low = offsets[item]; low < offsets[item + 1]; low += CHUNK) {
            const int64_t n = std::min(CHUNK, offsets[item + 1] - low);
            if (!scaled.read(masses + low, stride, experts, n)) {
                std::fill(sums.begin(), sums.end(), -INF_D);
                break;
            }
            Floats least = splat(INF);
            for (int64_t p = 0; p < particles; p++)
                products.set(p, relative[p].product_of_any<8>(scaled, experts, least));
            exact.clear();
            // Somewhere the best experts have next to no weight: the particles that this concerns go more slowly.
            for (int64_t p = 0; !(smallest(least) >= SAFE) && p < particles; p++) {
                Floats own = splat(INF);
                products.set(p, relative[p].product_of_any<1>(scaled, experts, own));
                if (smallest(own) >= SAFE) continue;
                double sum = sums[p];
                for (int64_t i = low; i < low + n; i++) {
                    double x = 0;
                    for (int64_t e = 0; e < experts; e++) x += weights[p * experts + e] * double(masses[e * stride + i]);
                    sum += std::log(x);
                }
                exact.emplace_back(p, sum);
            }
            products.fold();
            const double taken = double(scaled.exponent), positions = double(n), padding = double(scaled.full - n);
            for (int64_t p = 0; p < room; p += DOUBLES) {
                // The padding of the last vector holds the sum of the weights; it is taken off again.
                const Doubles logs = (log2_of(load(&products.mantissas[p])) + load(&products.exponents[p]) + taken) * M_LN2;
                store(&sums[p], load(&sums[p]) + logs + positions * load(&heaviest[p]) - padding * load(&added[p]));
            }
            for (const auto& [p, sum] : exact) sums[p] = sum;
        }
        for (int64_t p = 0; p < particles; p++) out[p * items + item] = sums[p];
    }
}

}  // namespace TS_NAMESPACE
