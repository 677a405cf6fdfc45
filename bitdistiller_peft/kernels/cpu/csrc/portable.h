// The operations in plain C++: right on every machine, and what the vector code is compared with.

#pragma once

#include "layout.h"

namespace bd {
namespace portable {

// Code of one lane of unit `u` of a pack.
inline uint32_t lane_code(const uint8_t* pack, int u, int lane, int bits) {
    uint16_t v[3];
    if (bits != 3) {
        std::memcpy(v, pack + 2 * lane, 2);
        return (v[0] >> (bits * u)) & ((1u << bits) - 1u);
    }
    for (int k = 0; k < 3; ++k) std::memcpy(v + k, pack + 64 * k + 2 * lane, 2);
    if (u == 15) return (v[0] >> 15) | ((v[1] >> 15) << 1) | ((v[2] >> 15) << 2);
    return (v[u / 5] >> (3 * (u % 5))) & 7u;
}

inline void set_lane_code(uint8_t* pack, int u, int lane, int bits, uint32_t code) {
    auto merge = [&](int k, uint32_t value) {
        uint16_t v;
        std::memcpy(&v, pack + 64 * k + 2 * lane, 2);
        v = static_cast<uint16_t>(v | value);
        std::memcpy(pack + 64 * k + 2 * lane, &v, 2);
    };
    if (bits != 3) return merge(0, code << (bits * u));
    if (u < 15) return merge(u / 5, code << (3 * (u % 5)));
    for (int k = 0; k < 3; ++k) merge(k, ((code >> k) & 1u) << 15);
}

struct Place {
    int64_t offset;  // of the pack, from the codes of the strip
    int unit;        // inside the pack
};

// Where unit `unit` of row `row` of a strip lies.
inline Place place_of(int64_t units, int bits, int row, int64_t unit) {
    const int64_t per_pack = pack_units(bits), blocks = units / per_pack, rest = units % per_pack;
    const int64_t block = unit / per_pack;
    if (block < blocks) {
        return {(block * kRows + row) * pack_bytes(bits), static_cast<int>(unit % per_pack)};
    }
    const int64_t index = row * rest + unit % per_pack;
    return {(blocks * kRows + index / per_pack) * pack_bytes(bits), static_cast<int>(index % per_pack)};
}

inline Pair stream_pair(const BdStream& s, const uint8_t* strip, int64_t group, int row) {
    const uint8_t* data = strip + group * param_size(s.scale_type);
    return {load_scale(data, 2 * row, s.scale_type), load_scale(data, 2 * row + 1, s.scale_type)};
}

// x: fp32 [tokens, units * 32] in order.
inline void linear(const Linear& call, int64_t first, int64_t last) {
    const BdStream& s = *call.stream;
    const float* x = static_cast<const float*>(call.x);
    const int num_codes = 1 << s.bits;
    for (int64_t strip = first; strip < last; ++strip) {
        const uint8_t* data = call.data + strip * s.strip_bytes;
        const uint8_t* codes = data + s.param_bytes;
        for (int row = 0; row < kRows && strip * kRows + row < s.rows; ++row) {
            for (int64_t token = 0; token < call.tokens; ++token) {
                float sums[kUnit] = {0};
                float table[16];
                for (int64_t unit = 0; unit < s.units; ++unit) {
                    if (unit % s.units_per_group == 0) {
                        const Pair pair = stream_pair(s, data, unit / s.units_per_group, row);
                        for (int code = 0; code < num_codes; ++code) {
                            const float value = table_value(s.a, s.b, s.c, pair, code);
                            table[code] = call.bfloat ? from_bfloat(to_bfloat(value)) : value;
                        }
                    }
                    const Place place = place_of(s.units, s.bits, row, unit);
                    const float* part = x + token * call.ldx + unit * kUnit;
                    for (int lane = 0; lane < kUnit; ++lane) {
                        sums[lane] += table[lane_code(codes + place.offset, place.unit, lane, s.bits)] * part[lane];
                    }
                }
                float sum = 0.0f;
                for (int width = kUnit / 2; width; width /= 2) {
                    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
                }
                sum = sums[0];
                store_output(call, token, strip * kRows + row, sum);
            }
        }
    }
}

inline void store_dense(void* out, int64_t index, float value, int type) {
    if (type == kDenseFloat) static_cast<float*>(out)[index] = value;
    if (type == kDenseBfloat) static_cast<uint16_t*>(out)[index] = to_bfloat(value);
    if (type == kDenseHalf) static_cast<uint16_t*>(out)[index] = to_half(value);
}

inline float dense_value(const BdWeight& w, Pair pair, uint32_t code) {
    // 8-bit codes are affine; there is no table of 256
    if (w.bits == 8) return (static_cast<float>(code) + w.a[0] - w.c * pair.q) * pair.p;
    return table_value(w.a, w.b, w.c, pair, static_cast<int>(code));
}

// Columns [begin, end) of one row, which lie in one group.
inline void dequantize_run(const BdWeight& w, const uint32_t* words, Pair pair, int64_t begin, int64_t end, void* out,
                           int type) {
    for (int64_t col = begin; col < end; ++col) {
        store_dense(out, col, dense_value(w, pair, load_code(words, col, w.bits)), type);
    }
}

}  // namespace portable
}  // namespace bd
