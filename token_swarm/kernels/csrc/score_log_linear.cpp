// Scoring many log-linear particles against a cache of laws in one read of it.
#include "unit.h"

namespace TS_NAMESPACE {
#include "logarithm.h"
#include "sizes.h"

// What does not change from position to position of one particle.
struct Powers {
    int64_t expert[MAX_EXPERTS];  // those that are asked
    float scale[MAX_EXPERTS];     // the weight times log2(e)
    int count = 0;
    bool negative = false;

    Powers(const double* weights, int64_t experts) {
        for (int64_t e = 0; e < experts; e++) {
            if (weights[e] == 0) continue;
            expert[count] = e;
            scale[count++] = float(weights[e] * M_LOG2E);
            negative |= weights[e] < 0;
        }
    }

    bool works_as(const Powers& other) const {
        return negative == other.negative && count == other.count && std::equal(expert, expert + count, other.expert);
    }
};

// The laws of one position, whole vectors each: what is added has probability 0.
struct Laws {
    int64_t symbols, width;
    Lines laws;  // [experts, width]
    std::vector<float> high, low;  // an expert's largest and least log-probability, at least LEAST

    static constexpr float LEAST = -3e38f;  // finite: a weight of 0 times it is 0

    Laws(int64_t experts, int64_t symbols)
        : symbols(symbols), width((symbols + LANES - 1) / LANES * LANES), laws(experts * width, -INF),
          high(experts), low(experts) {}

    void read(const float* from, int64_t experts) {
        for (int64_t e = 0; e < experts; e++, from += symbols) {
            float* to = laws.data() + e * width;
            Floats most = splat(-INF), least = splat(INF);
            int64_t i = 0;
            for (; i + LANES <= symbols; i += LANES) {
                const Floats l = load(from + i);
                store(to + i, l);
                most = larger(l, most);
                least = smaller(l, least);
            }
            high[e] = largest(most);
            low[e] = smallest(least);
            for (; i < symbols; i++) {
                to[i] = from[i];
                high[e] = from[i] > high[e] ? from[i] : high[e];
                low[e] = from[i] < low[e] ? from[i] : low[e];
            }
            high[e] = std::max(high[e], LEAST);
            low[e] = std::max(low[e], LEAST);
        }
    }
};

// What a joint law needs: of RANGED ones it is known that all exponents are in the range of powers; SIGNED ones may have
// negative weights.
enum Kind { RANGED, PLAIN, SIGNED };

// The joint laws of one particle or two that read the same experts. EXPERTS 0: any number.
template <int EXPERTS, int PARTICLES>
struct Joint {
    int count;
    const float* law[EXPERTS ? EXPERTS : MAX_EXPERTS];
    const float* scale[PARTICLES];

    TS_METHOD Joint(const Powers* own, const Laws& laws) : count(EXPERTS ? EXPERTS : own->count) {
        for (int k = 0; k < count; k++) law[k] = laws.laws.data() + own->expert[k] * laws.width;
        for (int p = 0; p < PARTICLES; p++) scale[p] = own[p].scale;
    }

    // What expert k adds to the exponents of particle p.
    template <Kind KIND>
    TS_METHOD Floats term(int p, int k, Floats l) const {
        // A symbol that an expert excludes stays out whatever the sign of the weight.
        if (KIND == SIGNED)
            return by_register(l, splat(scale[p][k]) * l, [](auto own, auto term) __attribute__((always_inline)) {
                return own == -INF ? own : term;
            });
        return splat(scale[p][k]) * l;
    }

    // Adds the exponents of symbols i and on to x.
    template <Kind KIND>
    TS_METHOD void add_exponents(int64_t i, Floats* x) const {
        for (int k = 0; k < count; k++) {
            const Floats l = load(law[k] + i);
            for (int p = 0; p < PARTICLES; p++) x[p] += term<KIND>(p, k, l);
        }
    }

    // Adds 2^(exponent - offset) of symbols i and on. Less the offset from the start, so that the sum of the exponent is
    // rounded where it is small.
    template <Kind KIND>
    TS_METHOD void add_powers(int64_t i, const float* offsets, Floats* sums) const {
        Floats x[PARTICLES];
        for (int p = 0; p < PARTICLES; p++) x[p] = splat(-offsets[p]);
        add_exponents<KIND>(i, x);
        for (int p = 0; p < PARTICLES; p++) sums[p] += KIND == RANGED ? power_within(x[p]) : power_of_two(x[p]);
    }

    // The sums of powers over all symbols, to be added up over their lanes.
    template <Kind KIND>
    TS_METHOD void sum_powers(int64_t width, const float* offsets, Floats* out) const {
        Floats sums[PARTICLES] = {};
        int64_t i = 0;
        for (; i + LANES < width; i += LANES) add_powers<KIND>(i, offsets, sums);
        add_powers<KIND == RANGED ? PLAIN : KIND>(i, offsets, sums);  // with what was added, out of range
        for (int p = 0; p < PARTICLES; p++) out[p] = sums[p];
    }

    // The same for any laws, and the largest exponents, which they are relative to.
    TS_METHOD void sum_signed(int64_t width, float* offsets, Floats* out) const {
        Floats top[PARTICLES];
        for (int p = 0; p < PARTICLES; p++) top[p] = splat(-INF);
        for (int64_t i = 0; i < width; i += LANES) {
            Floats x[PARTICLES] = {};
            add_exponents<SIGNED>(i, x);
            for (int p = 0; p < PARTICLES; p++) top[p] = larger(x[p], top[p]);
        }
        for (int p = 0; p < PARTICLES; p++) offsets[p] = largest(top[p]);
        sum_powers<SIGNED>(width, offsets, out);
    }
};

// Bounds of all particles' exponents at one position, from their experts' own: that saves a pass over each joint law to
// find its largest.
struct Bounds {
    int64_t room;                  // particles, in whole vectors
    std::vector<float> up, down;   // [experts, room]: scales that are positive, and that are negative
    std::vector<float> high, low;  // [room]

    Bounds(const std::vector<Powers>& powers, int64_t experts, int64_t room)
        : room(room), up(experts * room), down(experts * room), high(room), low(room) {
        for (size_t p = 0; p < powers.size(); p++)
            for (int k = 0; k < powers[p].count; k++) {
                const float scale = powers[p].scale[k];
                (scale > 0 ? up : down)[size_t(powers[p].expert[k] * room) + p] = scale;
            }
    }

    void set(const Laws& laws, int64_t experts) {
        for (int64_t p = 0; p < room; p += LANES) {
            Floats most = splat(0.0f), least = splat(0.0f);
            for (int64_t e = 0; e < experts; e++) {
                const Floats u = load(&up[e * room + p]), d = load(&down[e * room + p]);
                most += u * splat(laws.high[e]) + d * splat(laws.low[e]);
                least += u * splat(laws.low[e]) + d * splat(laws.high[e]);
            }
            store(&high[p], most);
            store(&low[p], least);
        }
    }

    template <int PARTICLES>
    TS_METHOD bool ranged(int64_t p) const {
        bool all = true;
        for (int64_t k = p; k < p + PARTICLES; k++) all &= low[k] - high[k] > -126.0f;
        return all;
    }
};

// The sums of particle p, or of it and the next one, relative to bounds.high. Of negative weights the bound would be far
// off: it is lowered.
template <int EXPERTS, int PARTICLES>
TS_VERSION void sum_powers(const Powers* own, const Laws& laws, Bounds& bounds, int64_t p, Floats* sums) {
    const Joint<EXPERTS, PARTICLES> joint(own + p, laws);
    float* offsets = &bounds.high[p];
    if (own[p].negative) joint.sum_signed(laws.width, offsets, sums);
    else if (bounds.ranged<PARTICLES>(p)) joint.template sum_powers<RANGED>(laws.width, offsets, sums);
    else joint.template sum_powers<PLAIN>(laws.width, offsets, sums);
}

template <int PARTICLES>
TS_INLINE void sum_powers_any(const Powers* own, const Laws& laws, Bounds& bounds, int64_t p, Floats* sums) {
    switch (own[p].count) {
        case 1: return sum_powers<1, PARTICLES>(own, laws, bounds, p, sums);
        case 2: return sum_powers<2, PARTICLES>(own, laws, bounds, p, sums);
        case 3: return sum_powers<3, PARTICLES>(own, laws, bounds, p, sums);
        case 4: return sum_powers<4, PARTICLES>(own, laws, bounds, p, sums);
        case 5: return sum_powers<5, PARTICLES>(own, laws, bounds, p, sums);
        case 6: return sum_powers<6, PARTICLES>(own, laws, bounds, p, sums);
        default: return sum_powers<0, PARTICLES>(own, laws, bounds, p, sums);
    }
}

// The joint laws' sums of powers at one position, relative to bounds.high, which is lowered where it has to be. sums:
// [room]. `next`: what the next position reads, fetched on the way.
TS_INLINE void normalise(const std::vector<Powers>& powers, const Laws& laws, Bounds& bounds, const char* next,
                         int64_t fetched, float* sums) {
    constexpr float SAFE = 1e-24f;  // 2^-80: the largest term is not among those that lost digits
    const int64_t particles = int64_t(powers.size());
    for (int64_t p = 0; p < particles; p += 4) {
        fetch(next, fetched);
        next += fetched;
        Floats lanes[4] = {};
        for (int k = 0; k < 4 && p + k < particles; k++) {
            if (powers[p + k].count == 0) {
                lanes[k] = splat(float(laws.symbols) / LANES);
            } else if (k < 3 && p + k + 1 < particles && powers[p + k].works_as(powers[p + k + 1])) {
                sum_powers_any<2>(powers.data(), laws, bounds, p + k, &lanes[k]);
                k++;
            } else {
                sum_powers_any<1>(powers.data(), laws, bounds, p + k, &lanes[k]);
            }
        }
        Quads four[4];
        for (int k = 0; k < 4; k++) four[k] = folded<Quads>(lanes[k], plus);
        const Quads sum = across(four, plus);
        std::memcpy(sums + p, &sum, sizeof sum);
    }
    for (int64_t p = 0; p < particles; p++) {
        if (sums[p] >= SAFE) continue;
        // Experts disagree so much that the bound is far off.
        Floats sum;
        Joint<0, 1>(&powers[p], laws).sum_signed(laws.width, &bounds.high[p], &sum);
        sums[p] = total(sum);
        if (sums[p] >= SAFE) continue;
        bounds.high[p] = NAN_F;  // nothing is possible
        sums[p] = 1;
    }
}

// Logarithms, base 2, of the normalisers of all particles, added up over the positions of an item.
struct Logs {
    std::vector<double> sums;      // [room]
    std::vector<double> products;  // of sums of powers whose logarithms are still to be taken
    int waiting = 0;

    explicit Logs(int64_t room) : sums(room), products(room, 1.0) {}

    void add(const float* offsets, const float* factors) {
        for (size_t p = 0; p < sums.size(); p++) {
            sums[p] += double(offsets[p]);
            products[p] *= double(factors[p]);
        }
        if (++waiting == 8) settle();  // what fits in the range of doubles
    }

    void settle() {
        for (size_t p = 0; p < sums.size(); p += DOUBLES) {
            store(&sums[p], load(&sums[p]) + log2_of(load(&products[p])));
            store(&products[p], Doubles{} + 1.0);
        }
        waiting = 0;
    }
};

// log_probs: float [positions, experts, symbols]; targets: int64 [positions]; weights: double [particles, experts];
// offsets: int64 [items + 1]; out: double [particles, items]. As reference.score_log_linear.
void score_log_linear(int64_t experts, int64_t symbols, int64_t particles, int64_t items, const float* log_probs,
                             const int64_t* targets, const double* weights, const int64_t* offsets, double* out) {
    if (particles == 0) return;
    const int64_t room = (particles + LANES - 1) / LANES * LANES;  // whole vectors of particles
    Laws laws(experts, symbols);
    std::vector<Powers> powers;
    std::vector<double> columns(experts * room);  // the weights, by expert
    for (int64_t p = 0; p < particles; p++) {
        powers.emplace_back(weights + p * experts, experts);
        for (int64_t e = 0; e < experts; e++) columns[e * room + p] = weights[p * experts + e];
    }
    Bounds bounds(powers, experts, room);
    Logs logs(room);
    std::vector<float> sums(room, 1.0f);
    std::vector<double> joint(room);  // at the targets
    std::vector<uint8_t> excluded(particles);
    const int64_t size = experts * symbols * int64_t(sizeof(float)), fours = (particles + 3) / 4;
    const int64_t fetched = size <= 1 << 16 ? (size / fours + 63) / 64 * 64 : 0;  // for each four particles
    for (int64_t item = 0; item < items; item++) {
        std::fill(logs.sums.begin(), logs.sums.end(), 0.0);
        std::fill(joint.begin(), joint.end(), 0.0);
        std::fill(excluded.begin(), excluded.end(), 0);
        for (int64_t n = offsets[item]; n < offsets[item + 1]; n++) {
            const float* own = log_probs + n * experts * symbols;
            for (int64_t e = 0; e < experts; e++) {
                const double *column = &columns[e * room], at_target = double(own[e * symbols + targets[n]]);
                if (at_target == -INF_D) {
                    for (int64_t p = 0; p < particles; p++) excluded[p] |= column[p] != 0;
                    continue;
                }
                for (int64_t p = 0; p < room; p += DOUBLES) store(&joint[p], load(&joint[p]) + load(column + p) * at_target);
            }
            laws.read(own, experts);
            bounds.set(laws, experts);
            const char* next = reinterpret_cast<const char*>(own) + size;
            normalise(powers, laws, bounds, next, n + 1 < offsets[items] ? fetched : 0, sums.data());
            logs.add(bounds.high.data(), sums.data());
        }
        logs.settle();
        for (int64_t p = 0; p < particles; p++)
            out[p * items + item] = excluded[p] ? -INF_D : joint[p] - logs.sums[p] * M_LN2;
    }
}

}  // namespace TS_NAMESPACE
