// Mixing experts over one vocabulary: probabilities of [rows, width], no [experts, rows, width] in between.

constexpr int MAX_EXPERTS = 64;
constexpr int64_t BLOCK = 2048;  // elements worked on while they are in the first-level cache

using Runs = std::vector<std::pair<int64_t, int64_t>>;

// Runs of allowed tokens, cut into blocks. Vocabularies forbid a few stretches (special tokens, padding).
inline void allowed_runs(const uint8_t* allowed, int64_t width, Runs& runs) {
    runs.clear();
    int64_t i = 0;
    auto skip = [&](uint8_t value) {
        const uint64_t words = value ? 0x0101010101010101ull : 0;
        for (;;) {
            uint64_t word;
            if (i + 8 <= width && (std::memcpy(&word, allowed + i, 8), word == words)) i += 8;
            else if (i < width && allowed[i] == value) i++;
            else return;
        }
    };
    while (skip(0), i < width) {
        int64_t low = i;
        skip(1);
        for (int64_t at = low; at < i; at += BLOCK) runs.emplace_back(at, std::min(at + BLOCK, i));
    }
}

// Memory that is used again for every row.
struct Scratch {
    std::vector<float> powers;  // [experts - 1, width]
    std::vector<std::vector<float>> expert_offsets;
    std::vector<float> offsets;
};

struct Asked {
    const void* row;
    int32_t dtype;
    double weight, temperature;
};

// sum_e (x_e - pivot_e) * scale_e: the exponent, base 2, of what a token's probability is proportional to. The
// difference comes first, or the products of large logits would be rounded. EXPERTS rows of one dtype in registers.
struct Exponent {
    const void* row[MAX_EXPERTS];
    float pivot[MAX_EXPERTS], scale[MAX_EXPERTS];
};

// Exponents of tokens i and on, less the offset.
template <class T, int EXPERTS>
TS_INLINE Floats exponent_at(const Exponent& x, int64_t i, float offset) {
    Floats sum = (T::get(x.row[0], i) - splat(x.pivot[0])) * splat(x.scale[0]) - splat(offset);
    for (int e = 1; e < EXPERTS; e++) sum += (T::get(x.row[e], i) - splat(x.pivot[e])) * splat(x.scale[e]);
    return sum;
}

// The last few elements of a block, padded with minus infinity.
template <class T, int EXPERTS>
TS_INLINE Floats exponent_tail(const Exponent& x, int64_t i, int64_t high, float offset) {
    Floats sum = splat(-INF);
    for (int64_t k = 0; i + k < high; k++) {
        float one = -offset;
        for (int e = 0; e < EXPERTS; e++) one += (T::one(x.row[e], i + k) - x.pivot[e]) * x.scale[e];
        sum[k] = one;
    }
    return sum;
}

struct Block {
    float top;
    bool odd;  // NaN or plus infinity
    double sum;
};

// One block of 2^(exponent - offset): its sum, its largest exponent and, unless out is null, the powers themselves.
template <class T, int EXPERTS, bool STORE>
TS_INLINE Block powers(const Exponent& x, int64_t low, int64_t high, float offset, float* out) {
    Floats top = splat(-INF), even = splat(0.0f), uneven = splat(0.0f);
    int64_t i = low;
    for (; i + 2 * LANES <= high; i += 2 * LANES) {
        for (int e = 0; e < EXPERTS; e++) {
            const auto* own = static_cast<const typename T::Element*>(x.row[e]) + i;
            fetch_ahead(own, 2 * LANES * sizeof *own);
        }
        Floats x0 = exponent_at<T, EXPERTS>(x, i, offset), x1 = exponent_at<T, EXPERTS>(x, i + LANES, offset);
        top = larger(x0, top);
        top = larger(x1, top);
        Floats y0 = power_of_two(x0), y1 = power_of_two(x1);
        if (STORE) {
            store(out + i, y0);
            store(out + i + LANES, y1);
        }
        even += y0;
        uneven += y1;
    }
    for (; i < high; i += LANES) {
        const bool whole = i + LANES <= high;
        Floats exponent = whole ? exponent_at<T, EXPERTS>(x, i, offset) : exponent_tail<T, EXPERTS>(x, i, high, offset);
        top = larger(exponent, top);
        Floats power = power_of_two(exponent);
        if (STORE)
            for (int64_t k = 0; k < LANES && i + k < high; k++) out[i + k] = power[k];
        even += power;
    }
    const double sum = total(even + uneven);
    return {largest(top) + offset, sum != sum, sum};
}

// A pivot near the largest logit: the largest of a run's first few. Never mind what comes later.
template <class F>
TS_INLINE float pivot_of(std::pair<int64_t, int64_t> run, F logit) {
    float top = -INF;
    for (int64_t i = run.first; i < std::min(run.first + 128, run.second); i++) {
        const float x = logit(i);
        if (x > top && x < INF) top = x;
    }
    return top > -INF ? top : 0;
}

// Whether a block that looks odd is not: an exponent far above the offset may look like NaN or plus infinity.
template <class F>
TS_INLINE bool is_sound(std::pair<int64_t, int64_t> run, F logit, Block& done) {
    for (int64_t i = run.first; i < run.second; i++) {
        const float x = logit(i);
        if (x != x || x == INF) return false;
    }
    done.odd = false;
    return true;
}

// Exponents may rise this far above the offset before float32 overflows, and the largest may stay this far below it
// before small powers are lost: probabilities below 2^-106 may come out as 0.
constexpr float HEADROOM = 100, FLOORROOM = 20;

// Runs over all blocks with `block(run, offset)`, raising the offset where needed. offsets[r] is the one that block r was
// done with. False for a bad row; `repair` looks at a block with NaN or plus infinity.
template <class F, class R>
TS_INLINE bool accumulate(const Runs& runs, std::vector<float>& offsets, F block, R repair, float& offset, double& sum) {
    offsets.resize(runs.size());
    offset = 0;
    for (int attempt = 0; attempt < 2; attempt++) {
        float top = -INF;
        sum = 0;
        for (size_t r = 0; r < runs.size(); r++) {
            Block done = block(runs[r], offset);
            if (done.odd) {
                if (!repair(runs[r], offset, done)) return false;
            }
            if (done.top - offset > HEADROOM) {
                if (done.top == INF) return false;  // finite logits whose product is not
                sum *= std::exp2(double(offset) - double(done.top));
                offset = done.top;
                r--;
                continue;
            }
            offsets[r] = offset;
            sum += done.sum;
            top = done.top > top ? done.top : top;
        }
        if (top == -INF) return false;
        if (top > offset - FLOORROOM) return true;
        offset = top;  // a first guess far too high: once more, with the right one
    }
    return true;
}

// What a block's powers, done with the offset `own`, must be multiplied with to be relative to `offset`. A factor that
// float32 cannot hold is half applied here and now.
TS_INLINE double rescale(float* out, std::pair<int64_t, int64_t> run, float own, float offset) {
    double exponent = double(own) - double(offset);
    if (exponent < -HEADROOM) {
        exponent /= 2;
        const float half = float(std::exp2(exponent));
        for (int64_t i = run.first; i < run.second; i++) out[i] *= half;
    }
    return std::exp2(exponent);
}

// softmax(x / T) = 2^((x - pivot) * scale - offset) / sum.
struct Normaliser {
    float pivot, scale, offset;
    double sum;
};

// The powers go to `out`, each block relative to its own offset, when STORE is set. False for a bad row.
template <class T, bool STORE>
TS_INLINE bool normalise(const Asked& one, const Runs& runs, std::vector<float>& offsets, float* out, Normaliser& n) {
    Exponent x;
    x.row[0] = one.row;
    auto logit = [&](int64_t i) { return T::one(one.row, i); };
    n.pivot = x.pivot[0] = pivot_of(runs[0], logit);
    n.scale = x.scale[0] = float(1.4426950408889634 / one.temperature);
    auto block = [&](std::pair<int64_t, int64_t> run, float offset) __attribute__((always_inline)) {
        return powers<T, 1, STORE>(x, run.first, run.second, offset, out);
    };
    auto repair = [&](std::pair<int64_t, int64_t> run, float, Block& done) { return is_sound(run, logit, done); };
    return accumulate(runs, offsets, block, repair, n.offset, n.sum);
}

template <bool STORE>
TS_INLINE bool normalise_any(const Asked& one, const Runs& runs, std::vector<float>& offsets, float* out, Normaliser& n) {
    if (one.dtype == FLOAT32) return normalise<F32, STORE>(one, runs, offsets, out, n);
    if (one.dtype == BFLOAT16) return normalise<Bf16, STORE>(one, runs, offsets, out, n);
    return normalise<F16, STORE>(one, runs, offsets, out, n);
}

// The mixture of one block: every expert's powers, the first one's in `out`, times its scale. EXPERTS 0: any number.
template <int EXPERTS>
TS_INLINE void combine(const float* more, int64_t width, int count, const float* scale, int64_t low, int64_t high, float* out) {
    const int experts = EXPERTS ? EXPERTS : count;
    int64_t i = low;
    for (; i + LANES <= high; i += LANES) {
        fetch_ahead(out + i, sizeof(Floats));
        Floats p = load(out + i) * splat(scale[0]);
        for (int e = 1; e < experts; e++) {
            const float* own = more + (e - 1) * width + i;
            fetch_ahead(own, sizeof(Floats));
            p += load(own) * splat(scale[e]);
        }
        store(out + i, p);
    }
    for (; i < high; i++) {
        float p = out[i] * scale[0];
        for (int e = 1; e < experts; e++) p += more[(e - 1) * width + i] * scale[e];
        out[i] = p;
    }
}

// One read of the logits: every expert's powers are kept for this one row until all normalisers are known (the first
// expert's in the output). A second exponential would cost more than the second read of what is still in the cache.
TS_INLINE bool linear_row(const Asked* asked, int count, const Runs& runs, int64_t width, Scratch& scratch, float* out) {
    Normaliser n[MAX_EXPERTS];
    double weights = 0;
    scratch.powers.resize((count - 1) * width);
    scratch.expert_offsets.resize(count);
    for (int e = 0; e < count; e++) {
        float* to = e == 0 ? out : scratch.powers.data() + (e - 1) * width;
        if (!normalise_any<true>(asked[e], runs, scratch.expert_offsets[e], to, n[e])) return false;
        weights += asked[e].weight;
    }
    for (size_t r = 0; r < runs.size(); r++) {
        auto [low, high] = runs[r];
        float scale[MAX_EXPERTS];
        float* more = scratch.powers.data();
        for (int e = 0; e < count; e++) {
            const double rest = rescale(e == 0 ? out : more + (e - 1) * width, runs[r], scratch.expert_offsets[e][r], n[e].offset);
            scale[e] = float(asked[e].weight / weights / n[e].sum * rest);
        }
        if (count == 2) combine<2>(more, width, count, scale, low, high, out);
        else if (count == 3) combine<3>(more, width, count, scale, low, high, out);
        else combine<0>(more, width, count, scale, low, high, out);
    }
    return true;
}

// A block with odd exponents, element by element: NaN and +inf are bad, -inf excludes whatever the weight's sign.
inline bool repair_joint(const Asked* asked, int count, const Exponent& x, int64_t low, int64_t high, float offset,
                         float* out, Block& done) {
    done = {-INF, false, 0};
    for (int64_t i = low; i < high; i++) {
        float exponent = 0;
        bool excluded = false;
        for (int e = 0; e < count; e++) {
            float v = element(asked[e].dtype, asked[e].row, i);
            if (v != v || v == INF) return false;
            excluded |= v == -INF;
            exponent += (v - x.pivot[e]) * x.scale[e];
        }
        if (excluded) exponent = -INF;
        done.top = exponent > done.top ? exponent : done.top;
        out[i] = power_of_two(splat(exponent - offset))[0];
        done.sum += out[i];
    }
    return true;
}

template <class T, int EXPERTS>
TS_INLINE bool accumulate_joint(const Asked* asked, const Exponent& x, const Runs& runs, std::vector<float>& offsets,
                                float& offset, double& sum, float* out) {
    return accumulate(
        runs, offsets,
        [&](std::pair<int64_t, int64_t> run, float at) __attribute__((always_inline)) {
            return powers<T, EXPERTS, true>(x, run.first, run.second, at, out);
        },
        [&](std::pair<int64_t, int64_t> run, float at, Block& done) {
            return repair_joint(asked, EXPERTS, x, run.first, run.second, at, out, done);
        },
        offset, sum);
}

// Many experts, or several dtypes: the exponents are added up in the output block, which stays in the cache.
template <class T>
TS_INLINE void add_exponent(bool first, const Exponent& x, int e, int64_t low, int64_t high, float* out) {
    Exponent one;
    one.row[0] = x.row[e];
    one.pivot[0] = x.pivot[e];
    one.scale[0] = x.scale[e];
    int64_t i = low;
    for (; i + LANES <= high; i += LANES) {
        Floats y = exponent_at<T, 1>(one, i, 0);
        store(out + i, first ? y : load(out + i) + y);
    }
    Floats y = exponent_tail<T, 1>(one, i, high, 0);
    for (int64_t k = 0; i + k < high; k++) out[i + k] = first ? y[k] : out[i + k] + y[k];
}

inline bool accumulate_many(const Asked* asked, int count, const Exponent& x, const Runs& runs,
                            std::vector<float>& offsets, float& offset, double& sum, float* out) {
    Exponent joint;
    joint.row[0] = out;
    joint.pivot[0] = 0;
    joint.scale[0] = 1;
    return accumulate(
        runs, offsets,
        [&](std::pair<int64_t, int64_t> run, float at) {
            for (int e = 0; e < count; e++) {
                if (asked[e].dtype == FLOAT32) add_exponent<F32>(e == 0, x, e, run.first, run.second, out);
                else if (asked[e].dtype == BFLOAT16) add_exponent<Bf16>(e == 0, x, e, run.first, run.second, out);
                else add_exponent<F16>(e == 0, x, e, run.first, run.second, out);
            }
            return powers<F32, 1, true>(joint, run.first, run.second, at, out);
        },
        [&](std::pair<int64_t, int64_t> run, float at, Block& done) {
            return repair_joint(asked, count, x, run.first, run.second, at, out, done);
        },
        offset, sum);
}

template <class T>
TS_INLINE bool accumulate_few(const Asked* asked, int count, const Exponent& x, const Runs& runs,
                              std::vector<float>& offsets, float& offset, double& sum, float* out) {
    if (count == 1) return accumulate_joint<T, 1>(asked, x, runs, offsets, offset, sum, out);
    if (count == 2) return accumulate_joint<T, 2>(asked, x, runs, offsets, offset, sum, out);
    return accumulate_joint<T, 3>(asked, x, runs, offsets, offset, sum, out);
}

// One read of the logits: the experts' normalisers are constants of the row and cancel.
TS_INLINE bool log_linear_row(const Asked* asked, int count, const Runs& runs, std::vector<float>& offsets, float* out) {
    Exponent x;
    bool alike = count <= 3;
    for (int e = 0; e < count; e++) {
        x.row[e] = asked[e].row;
        x.scale[e] = float(asked[e].weight / asked[e].temperature * 1.4426950408889634);
        x.pivot[e] = pivot_of(runs[0], [&](int64_t i) { return element(asked[e].dtype, asked[e].row, i); });
        alike &= asked[e].dtype == asked[0].dtype;
    }
    float offset;
    double sum;
    const bool good = !alike ? accumulate_many(asked, count, x, runs, offsets, offset, sum, out)
                      : asked[0].dtype == FLOAT32 ? accumulate_few<F32>(asked, count, x, runs, offsets, offset, sum, out)
                      : asked[0].dtype == BFLOAT16 ? accumulate_few<Bf16>(asked, count, x, runs, offsets, offset, sum, out)
                                                   : accumulate_few<F16>(asked, count, x, runs, offsets, offset, sum, out);
    if (!good) return false;
    for (size_t r = 0; r < runs.size(); r++) {
        auto [low, high] = runs[r];
        const float scale = float(rescale(out, runs[r], offsets[r], offset) / sum);
        int64_t i = low;
        for (; i + LANES <= high; i += LANES) store(out + i, load(out + i) * splat(scale));
        for (; i < high; i++) out[i] *= scale;
    }
    return true;
}

// logits[e] points to [rows, width] of dtype dtypes[e] with row stride strides[e] (elements); weights, temperatures:
// double [rows, experts]; out: float [rows, width]. log_linear: 0 for the linear rule. Bad rows are filled with NaN.
inline void mix(int64_t rows, int64_t width, int64_t experts, const void* const* logits, const int32_t* dtypes,
                             const int64_t* strides, const double* weights, const double* temperatures, int32_t log_linear,
                             const uint8_t* allowed, float* out) {
    Runs runs;
    static thread_local Scratch scratch;
    allowed_runs(allowed, width, runs);
    for (int64_t row = 0; row < rows; row++, out += width) {
        Asked asked[MAX_EXPERTS];
        int count = 0;
        for (int64_t e = 0; e < experts; e++) {
            double w = weights[row * experts + e];
            if (w != 0)
                asked[count++] = {row_of(dtypes[e], logits[e], strides[e], row), dtypes[e], w, temperatures[row * experts + e]};
        }
        bool good = count > 0 && !runs.empty();
        if (good) {
            int64_t end = 0;  // forbidden tokens between the runs
            for (auto [low, high] : runs) {
                std::fill(out + end, out + low, 0.0f);
                end = high;
            }
            std::fill(out + end, out + width, 0.0f);
            // One expert with weight 1 is the same law under both rules.
            good = log_linear || count == 1
                       ? (asked[0].weight = log_linear ? asked[0].weight : 1.0, log_linear_row(asked, count, runs, scratch.offsets, out))
                       : linear_row(asked, count, runs, width, scratch, out);
        }
        if (!good) std::fill(out, out + width, NAN_F);
    }
}
