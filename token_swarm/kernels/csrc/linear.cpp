// Products of a few rows with a matrix of bfloat16 weights, as decoding needs them: as fast as the weights can be read.
//
// The weights lie in panels of 64 outputs, [panel][input][32] pairs: the lower half of a pair is the weight of one of the
// first 32 outputs, the upper half that of the output 32 further on, so that a shift and a mask make floats of them. Every
// step of the inner loop reads the next two lines of memory. A row is summed in the same order whatever other rows there are, in chains of at most CHAIN terms.
#include "unit.h"

namespace TS_NAMESPACE {
#include "simd.h"

constexpr int64_t PANEL = 64, PAIRS = PANEL / 2, CHAIN = 256;
// Sums that fit the registers beside a weight and an input.
constexpr int SUMS = LANES == 16 ? 24 : 12;
constexpr int MOST_ROWS = SUMS / 2;

// What a pass over a panel asks memory for: `step` bytes, at most two lines, for every input. The first passes over a panel
// are as fast as memory, later ones would leave it idle: so each of several asks for its part of the next panel.
struct Ahead {
    const char* from;
    int64_t step;
    TS_METHOD void fetch(int64_t k) const {
        __builtin_prefetch(from + k * step);
        if (step > 64) __builtin_prefetch(from + k * step + 64);
    }
};

// ROWS rows of VECTORS vectors, half of them from the first 32 outputs. inputs [inner, ROWS].
template <int ROWS, int VECTORS>
TS_INLINE void product_of(int64_t inner, const uint32_t* weights, const float* inputs, const float* bias, float* out,
                          int64_t stride, Ahead ahead) {
    const auto place = [](int v) { return v / 2 * LANES + v % 2 * PAIRS; };
    Floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = load(bias + place(v));
    for (int64_t first = 0; first < inner; first += CHAIN) {
        const int64_t last = std::min(first + CHAIN, inner);
        Floats chain[ROWS][VECTORS] = {};
        for (int64_t k = first; k < last; k++) {
            ahead.fetch(k);
            Floats weight[VECTORS];
            for (int v = 0; v < VECTORS; v += 2) {
                Ints pairs;
                std::memcpy(&pairs, weights + k * PAIRS + v / 2 * LANES, sizeof pairs);
                weight[v] = as_floats(pairs << 16);
                weight[v + 1] = as_floats(pairs & splat(int32_t(0xffff0000)));
            }
            for (int r = 0; r < ROWS; r++) {
                const Floats input = splat(inputs[k * ROWS + r]);
                for (int v = 0; v < VECTORS; v++) chain[r][v] += weight[v] * input;
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += chain[r][v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(out + r * stride + place(v), sums[r][v]);
}

// Vectors of outputs that are summed in one pass over a panel.
TS_INLINE constexpr int vectors_of(int64_t rows) {
    return rows * (PANEL / LANES) <= SUMS ? PANEL / LANES : rows * 4 <= SUMS ? 4 : 2;
}

// Block `block` of `blocks`, ROWS rows, of one panel.
template <int ROWS>
void panel_product(int64_t inner, const uint32_t* weights, const float* inputs, const float* bias, float* out,
                   int64_t stride, int64_t block, int64_t blocks) {
    constexpr int VECTORS = vectors_of(ROWS), PASSES = PANEL / (VECTORS * LANES), STEP = VECTORS / 2 * LANES;
    constexpr int64_t LINES = 4 * PAIRS;  // bytes of an input's weights
    const int64_t passes = blocks * PASSES;
    for (int pass = 0; pass < PASSES; pass++) {
        const char* own = reinterpret_cast<const char*>(weights);
        const int64_t step = LINES / passes, at = block * PASSES + pass;
        const Ahead ahead = passes == 1 ? Ahead{own + 4096, LINES} : Ahead{own + inner * LINES + at * inner * step, step};
        product_of<ROWS, VECTORS>(inner, weights + pass * STEP, inputs, bias + pass * STEP, out + pass * STEP, stride,
                                  ahead);
    }
}

template <int ROWS, class... A>
TS_INLINE void few_rows(int64_t rows, A... arguments) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return few_rows<ROWS - 1>(rows, arguments...);
    panel_product<ROWS>(arguments...);
}

// weights [outputs, inner] of which bfloat16 keeps every value, as pairs; order: which row of weights each output is, null
// where they have that order. The last panel is padded with zeros.
void pack_linear(int64_t inner, int64_t outputs, const float* weights, const int64_t* order, uint32_t* pairs) {
    constexpr int64_t BLOCK = 16;  // inputs at a time: a line of memory of each of a panel's rows
    for (int64_t first = 0; first < outputs; first += PANEL, pairs += inner * PAIRS) {
        const float* rows[PANEL];
        for (int64_t o = 0; o < PANEL; o++)
            rows[o] = first + o < outputs ? weights + (order ? order[first + o] : first + o) * inner : nullptr;
        for (int64_t from = 0; from < inner; from += BLOCK) {
            const int64_t to = std::min(from + BLOCK, inner);
            for (int64_t pair = 0; pair < PAIRS; pair++) {
                const float *low = rows[pair], *high = rows[pair + PAIRS];
                for (int64_t k = from; k < to; k++) {
                    uint32_t lower = 0, upper = 0;
                    if (low) std::memcpy(&lower, low + k, 4);
                    if (high) std::memcpy(&upper, high + k, 4);
                    pairs[k * PAIRS + pair] = (lower >> 16) | (upper & 0xffff0000u);
                }
            }
        }
    }
}

// inputs [rows, inner], out [rows, outputs], both without gaps; weights and bias padded to whole panels.
void linear(int64_t rows, int64_t inner, int64_t outputs, const uint32_t* weights, const float* bias, const float* inputs,
            float* out) {
    // Blocks of nearly equal size: two of seven rows rather than twelve and two.
    const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const auto start = [&](int64_t block) { return rows * block / blocks; };
    std::vector<float> turned(size_t(rows * inner));  // of each block [inner, its rows], one after another
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = start(block), some = start(block + 1) - from;
        for (int64_t r = 0; r < some; r++)
            for (int64_t k = 0; k < inner; k++) turned[size_t(from * inner + k * some + r)] = inputs[(from + r) * inner + k];
    }
    float edge[MOST_ROWS * PANEL];
    for (int64_t first = 0; first < outputs; first += PANEL) {
        const int64_t count = std::min(PANEL, outputs - first);
        const uint32_t* panel = weights + first / 2 * inner;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t from = start(block), some = start(block + 1) - from;
            const float* own = turned.data() + from * inner;
            float* to = count == PANEL ? out + from * outputs + first : edge;
            const int64_t stride = count == PANEL ? outputs : PANEL;
            few_rows<MOST_ROWS>(some, inner, panel, own, bias + first, to, stride, block, blocks);
            for (int64_t r = 0; to == edge && r < some; r++)
                std::memcpy(out + (from + r) * outputs + first, edge + r * PANEL, size_t(count) * sizeof(float));
        }
    }
}

}  // namespace TS_NAMESPACE
