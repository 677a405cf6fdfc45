// AVX2: eight weights at a time, fp32. A unit is two half registers of 16-bit codes.

#pragma once

#include "layout.h"
#include "portable.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define BD_256 __attribute__((target("avx2,fma,f16c")))
#define BD_INLINE256 __attribute__((always_inline)) static inline

namespace bd {
namespace avx2 {

struct Table {
    __m256 low, high;  // codes 0 .. 7 (repeated to fill) and, at 4 bits, 8 .. 15
};

BD_INLINE256 BD_256 __m256 round_bfloat(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

BD_INLINE256 BD_256 __m256 values_of(const float* a, const float* b, float c, Pair pair, bool round) {
    const __m256 p = _mm256_set1_ps(pair.p), q = _mm256_set1_ps(pair.q);
    const __m256 level = _mm256_fnmadd_ps(_mm256_set1_ps(c), q, _mm256_loadu_ps(a));
    const __m256 value = _mm256_fmadd_ps(level, p, _mm256_mul_ps(_mm256_loadu_ps(b), q));
    return round ? round_bfloat(value) : value;
}

template <int B>
BD_INLINE256 BD_256 Table table_of(const float* a, const float* b, float c, Pair pair, bool round) {
    Table table;
    table.low = values_of(a, b, c, pair, round);
    table.high = B == 4 ? values_of(a + 8, b + 8, c, pair, round) : table.low;
    return table;
}

template <int B>
BD_INLINE256 BD_256 __m256 look_up(const Table& table, __m256i index) {
    if constexpr (B == 2) return _mm256_permutevar_ps(table.low, index);
    const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    if constexpr (B == 3) return low;
    const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

BD_INLINE256 BD_256 __m256i load(const uint8_t* data) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
}

// Half a unit: the codes in the low bits of each 16-bit lane, bits above anything.
template <int B>
BD_INLINE256 BD_256 __m256i half_unit(const uint8_t* pack, int unit) {
    if constexpr (B == 3) {
        if (unit == 15) {
            const __m256i low = _mm256_srli_epi16(load(pack), 15);
            const __m256i middle = _mm256_and_si256(_mm256_srli_epi16(load(pack + 64), 14), _mm256_set1_epi16(2));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(load(pack + 128), 13), _mm256_set1_epi16(4));
            return _mm256_or_si256(low, _mm256_or_si256(middle, high));
        }
        return _mm256_srl_epi16(load(pack + 64 * (unit / 5)), _mm_cvtsi32_si128(3 * (unit % 5)));
    }
    return _mm256_srl_epi16(load(pack), _mm_cvtsi32_si128(B * unit));
}

// x: fp32, in each unit the even columns before the odd ones.
template <int B, int TOK>
BD_256 void strip(const Linear& call, int64_t strip, int64_t token) {
    const BdStream& s = *call.stream;
    const uint8_t* data = call.data + strip * s.strip_bytes;
    const float* x = static_cast<const float*>(call.x) + token * call.ldx;
    for (int row = 0; row < kRows && strip * kRows + row < s.rows; ++row) {
        __m256 sums[TOK][4];
        for (int t = 0; t < TOK; ++t)
            for (int i = 0; i < 4; ++i) sums[t][i] = _mm256_setzero_ps();
        Table table;
        int64_t left = 0, group = 0;
        for (int64_t unit = 0; unit < s.units; ++unit) {
            if (left == 0) {
                table = table_of<B>(s.a, s.b, s.c, portable::stream_pair(s, data, group++, row), call.round_tables);
                left = s.units_per_group;
            }
            --left;
            const portable::Place place = portable::place_of(s.units, B, row, unit);
            const uint8_t* pack = data + s.param_bytes + place.offset;
            for (int half = 0; half < 2; ++half) {
                const __m256i codes = half_unit<B>(pack + 32 * half, place.unit);
                const __m256 even = look_up<B>(table, codes), odd = look_up<B>(table, _mm256_srli_epi32(codes, 16));
                for (int t = 0; t < TOK; ++t) {
                    const float* part = x + t * call.ldx + unit * kUnit + 8 * half;
                    sums[t][2 * half] = _mm256_fmadd_ps(even, _mm256_loadu_ps(part), sums[t][2 * half]);
                    sums[t][2 * half + 1] = _mm256_fmadd_ps(odd, _mm256_loadu_ps(part + 16), sums[t][2 * half + 1]);
                }
            }
        }
        for (int t = 0; t < TOK; ++t) {
            const __m256 all = _mm256_add_ps(_mm256_add_ps(sums[t][0], sums[t][1]), _mm256_add_ps(sums[t][2], sums[t][3]));
            __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
            sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            sum = _mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1));
            store_output(call, token + t, strip * kRows + row, _mm_cvtss_f32(sum));
        }
    }
}

template <int B>
void strips(const Linear& call, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
        int64_t token = 0;
        for (; token + 2 <= call.tokens; token += 2) strip<B, 2>(call, i, token);
        if (token < call.tokens) strip<B, 1>(call, i, token);
    }
}

inline void linear(const Linear& call, int64_t first, int64_t last) {
    if (call.stream->bits == 2) return strips<2>(call, first, last);
    if (call.stream->bits == 3) return strips<3>(call, first, last);
    return strips<4>(call, first, last);
}

}  // namespace avx2
}  // namespace bd
#endif
