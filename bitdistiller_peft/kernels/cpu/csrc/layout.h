// What a packed weight is, how it is laid out for streaming, and how a group's values are computed.
//
// Values. Every grid is one formula of two numbers that a group stores, `p` and `q`:
//
//     table[code] = (a[code] - c * q) * p + b[code] * q
//
// Affine grids: a = code, c = 1, q = zero point. Codebooks: a holds the levels >= 0 (p), b the levels < 0 (q).
// Sums of two scales: a = +-1, b = +-1. In each of them at most one operation rounds, so the fp32 result equals the
// reference's bit for bit, fused or not.
//
// Stream. Four rows make a strip; strips follow each other. A strip is [parameters][codes]. The parameters of group
// `i` are (p, q) of the four rows, in the stored dtype of the scale. A unit is 32 consecutive weights of one row, one
// per 16-bit lane of 64 bytes; a pack holds the units that fill one (2 and 4 bits) or three (3 bits) such vectors:
// unit u of a 2-bit pack lies at bits 2u of every lane; of a 3-bit pack, units 5k .. 5k+4 at bits 0, 3, .. 12 of
// vector k, and the last one in the three top bits. A block is one pack of each row; the rest of the rows, if the
// width is no multiple of a block, is packed together at the end of the strip, row after row.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

enum ScaleType : int32_t { kHalf = 0, kBfloat = 1, kFloat = 2 };

extern "C" struct BdWeight {  // the portable layout, see bitdistiller_peft/packing
    const uint32_t* words;
    const void* scale;
    const void* second;    // another scale, or null
    const uint32_t* zero;  // packed zero points, or null
    int64_t rows, cols, groups, group_size, words_per_row, zero_words;
    int32_t bits, scale_type, per_matrix;
    float c;
    float a[16], b[16];
};

extern "C" struct BdStream {
    int64_t rows, cols, units, groups, param_bytes, strip_bytes;
    int32_t bits, scale_type, units_per_group;
    float c;
    float a[16], b[16];
};

namespace bd {

constexpr int kRows = 4;
constexpr int kUnit = 32;

constexpr int pack_units(int bits) { return bits == 2 ? 8 : bits == 3 ? 16 : 4; }
constexpr int pack_bytes(int bits) { return bits == 3 ? 192 : 64; }
inline int param_size(int scale_type) { return kRows * 2 * (scale_type == kFloat ? 4 : 2); }

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint16_t to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bfloat(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

inline float from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
    if (exponent == 0) {
        const float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2**-24
        return bits_to_float(sign | float_to_bits(small));
    }
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t to_half(float value) {  // to nearest, halves to even
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the mantissa in units of 2**-24
        return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

inline float load_scale(const void* data, int64_t index, int scale_type) {
    if (scale_type == kFloat) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return scale_type == kHalf ? from_half(bits) : from_bfloat(bits);
}

inline uint32_t load_code(const uint32_t* row, int64_t index, int bits) {
    const int64_t start = index * bits;
    const int shift = static_cast<int>(start & 31);
    uint32_t code = row[start >> 5] >> shift;
    if (shift + bits > 32) code |= row[(start >> 5) + 1] << (32 - shift);
    return code & ((1u << bits) - 1u);
}

struct Pair {
    float p, q;
};

inline Pair load_pair(const BdWeight& w, int64_t row, int64_t group) {
    const int64_t index = w.per_matrix ? 0 : row * w.groups + group;
    Pair pair{load_scale(w.scale, index, w.scale_type), 0.0f};
    if (w.second) pair.q = load_scale(w.second, index, w.scale_type);
    if (w.zero) {
        const int64_t zero_row = w.per_matrix ? 0 : row, zero_group = w.per_matrix ? 0 : group;
        pair.q = static_cast<float>(load_code(w.zero + zero_row * w.zero_words, zero_group, w.bits));
    }
    return pair;
}

inline float table_value(const float* a, const float* b, float c, Pair pair, int code) {
    return (a[code] - c * pair.q) * pair.p + b[code] * pair.q;
}

// A dense result and the part of a multiplication that all instruction sets share.
enum DenseType : int32_t { kDenseFloat = 0, kDenseBfloat = 1, kDenseHalf = 2 };

struct Linear {
    const BdStream* stream;
    const uint8_t* data;
    const void* x;  // prepared: see prepare_inputs
    int64_t ldx, tokens;
    const void* bias;
    void* out;
    bool bfloat;  // dtype of inputs, bias and out; tables then hold bf16 values
    std::atomic<bool>* failed;  // set where memory runs out
};

inline void store_output(const Linear& call, int64_t token, int64_t row, float value) {
    const int64_t index = token * call.stream->rows + row;
    if (call.bfloat) {
        if (call.bias) value += from_bfloat(static_cast<const uint16_t*>(call.bias)[row]);
        static_cast<uint16_t*>(call.out)[index] = to_bfloat(value);
    } else {
        if (call.bias) value += static_cast<const float*>(call.bias)[row];
        static_cast<float*>(call.out)[index] = value;
    }
}

}  // namespace bd
