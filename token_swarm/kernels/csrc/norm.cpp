// x / sqrt(mean(x^2) + epsilon) * gain, row by row; x and out [rows, width] without gaps.
#include "unit.h"

namespace TS_NAMESPACE {
#include "simd.h"

void rms_norm(int64_t rows, int64_t width, const float* x, const float* gain, double epsilon, float* out) {
    for (int64_t row = 0; row < rows; row++, x += width, out += width) {
        Floats squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * LANES <= width; i += 4 * LANES)
            for (int v = 0; v < 4; v++) {
                const Floats part = load(x + i + v * LANES);
                squares[v] += part * part;
            }
        double sum = total((squares[0] + squares[1]) + (squares[2] + squares[3]));
        for (; i < width; i++) sum += double(x[i]) * x[i];
        const float scale = float(1 / std::sqrt(sum / double(width) + epsilon));
        for (i = 0; i < width; i++) out[i] = x[i] * scale * gain[i];
    }
}

}  // namespace TS_NAMESPACE
