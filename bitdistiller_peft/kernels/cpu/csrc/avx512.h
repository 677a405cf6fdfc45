// AVX-512: one register holds a unit of 16-bit codes; vpermw and vpermps look 32 and 16 weights up at once. Neither
// looks at the upper bits of an index, and tables repeat to fill the register, so codes are shifted, never masked.

#pragma once

#include "layout.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define BD_X86 1
#include <immintrin.h>

#include <memory>
#include <new>
#include <utility>

#define BD_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define BD_512B __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define BD_INLINE __attribute__((always_inline)) static inline

namespace bd {
namespace avx512 {

constexpr int64_t kPrefetch = 8192;

// (p, q) of four rows in the lower half.
BD_INLINE BD_512 __m512 load_params(const uint8_t* data, int scale_type) {
    if (scale_type == kHalf) {
        return _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data))));
    }
    if (scale_type == kBfloat) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
        return _mm512_castps256_ps512(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
    return _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(data)));
}

BD_INLINE BD_512 __m512i round_bits(__m512 value) {  // bf16 in the upper halves, to nearest, halves to even
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// Everything that does not change while a stream is read.
struct Constants {
    __m512 a, b, c;
    __m512i which[4];  // which lane of the parameters each lane's p is
    int scale_type;
    bool round_tables;
};

template <int B>
BD_INLINE BD_512 Constants constants_of(const BdStream& s, bool round_tables) {
    Constants k;
    k.a = _mm512_loadu_ps(s.a);
    k.b = _mm512_loadu_ps(s.b);
    k.c = _mm512_set1_ps(s.c);
    constexpr int kRowsEach = 16 >> B;  // rows whose tables share a register: 4, 2, 1
    for (int v = 0; v < kRows / kRowsEach; ++v) {
        int32_t lanes[16];
        for (int lane = 0; lane < 16; ++lane) lanes[lane] = 2 * (v * kRowsEach + (lane >> B));
        k.which[v] = _mm512_loadu_si512(lanes);
    }
    k.scale_type = s.scale_type;
    k.round_tables = round_tables;
    return k;
}

// The tables of one group of four rows: register v holds rows v * (16 >> B) and following, fp32.
template <int B>
BD_INLINE BD_512 void make_values(const uint8_t* data, const Constants& k, __m512 (&values)[1 << (B - 2)]) {
    const __m512 params = load_params(data, k.scale_type);
#pragma GCC unroll 4
    for (int v = 0; v < 1 << (B - 2); ++v) {
        const __m512 p = _mm512_permutexvar_ps(k.which[v], params);
        const __m512 q = _mm512_permutexvar_ps(_mm512_add_epi32(k.which[v], _mm512_set1_epi32(1)), params);
        values[v] = _mm512_fmadd_ps(_mm512_fnmadd_ps(k.c, q, k.a), p, _mm512_mul_ps(k.b, q));
    }
}

// All tables of a strip, written before the look-ups begin: loads then repeat a table to fill a register for free, while
// shuffles would share a port with the look-ups. Row r of a group begins at entry r * 2**B.
template <int B>
BD_INLINE BD_512 void write_tables(const BdStream& s, const uint8_t* params, const Constants& k, float* out) {
    for (int64_t group = 0; group < s.groups; ++group, params += param_size(k.scale_type)) {
        __m512 values[1 << (B - 2)];
        make_values<B>(params, k, values);
#pragma GCC unroll 4
        for (int v = 0; v < 1 << (B - 2); ++v, out += 16) {
            _mm512_storeu_ps(out, k.round_tables ? _mm512_castsi512_ps(round_bits(values[v])) : values[v]);
        }
    }
}

template <int B>
BD_INLINE BD_512B void write_tables(const BdStream& s, const uint8_t* params, const Constants& k, uint16_t* out) {
    for (int64_t group = 0; group < s.groups; ++group, params += param_size(k.scale_type)) {
        __m512 values[1 << (B - 2)];
        make_values<B>(params, k, values);
#pragma GCC unroll 4
        for (int v = 0; v < 1 << (B - 2); ++v, out += 16) {
            const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values[v]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
        }
    }
}

template <int B>
BD_INLINE BD_512 void load_tables(const float* data, __m512 (&tables)[kRows]) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        const float* table = data + (r << B);
        if constexpr (B == 2) tables[r] = _mm512_broadcast_f32x4(_mm_loadu_ps(table));
        else if constexpr (B == 3) tables[r] = _mm512_broadcast_f32x8(_mm256_loadu_ps(table));
        else tables[r] = _mm512_loadu_ps(table);
    }
}

template <int B>
BD_INLINE BD_512 void load_tables(const uint16_t* data, __m512i (&tables)[kRows]) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        const uint16_t* table = data + (r << B);
        if constexpr (B == 2) {
            int64_t four;
            std::memcpy(&four, table, 8);
            tables[r] = _mm512_set1_epi64(four);
        } else if constexpr (B == 3) {
            tables[r] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
        } else {
            tables[r] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
        }
    }
}

BD_INLINE BD_512 __m512i load(const void* data) { return _mm512_loadu_si512(data); }

// The codes of unit U of a pack, in the low bits of each 16-bit lane; the bits above are anything.
template <int B, int U>
BD_INLINE BD_512 __m512i unit_codes(const uint8_t* pack) {
    if constexpr (B != 3) {
        return U == 0 ? load(pack) : _mm512_srli_epi16(load(pack), B * U);
    } else if constexpr (U == 15) {
        const __m512i low = _mm512_srli_epi16(load(pack), 15);
        const __m512i middle = _mm512_srli_epi16(load(pack + 64), 14), high = _mm512_srli_epi16(load(pack + 128), 13);
        const __m512i two = _mm512_ternarylogic_epi32(middle, _mm512_set1_epi16(2), low, 0xea);  // (x & y) | z
        return _mm512_ternarylogic_epi32(high, _mm512_set1_epi16(4), two, 0xea);
    } else {
        return U % 5 == 0 ? load(pack + 64 * (U / 5)) : _mm512_srli_epi16(load(pack + 64 * (U / 5)), 3 * (U % 5));
    }
}

template <int B>
BD_INLINE BD_512 __m512i unit_codes(const uint8_t* pack, int unit) {
    if constexpr (B != 3) {
        return _mm512_srl_epi16(load(pack), _mm_cvtsi32_si128(B * unit));
    } else {
        if (unit == 15) return unit_codes<3, 15>(pack);
        return _mm512_srl_epi16(load(pack + 64 * (unit / 5)), _mm_cvtsi32_si128(3 * (unit % 5)));
    }
}

template <int TOK>
struct Sums {
    static constexpr int kChains = TOK == 1 ? 2 : 1;  // one chain of additions per row would wait for itself
    __m512 sum[kRows][TOK][kChains];
};

// How 16-bit codes meet inputs: bf16 pairs, or fp32 with the even columns of a unit before the odd ones.
struct Bfloat {
    using Table = __m512i;
    using Input = uint16_t;

    template <int TOK, int CHAIN>
    BD_INLINE BD_512B void add(const __m512i (&codes)[kRows], const Table (&tables)[kRows], const Input* x, int64_t ldx,
                               Sums<TOK>& sums) {
        __m512i weights[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) weights[r] = _mm512_permutexvar_epi16(codes[r], tables[r]);
#pragma GCC unroll 4
        for (int t = 0; t < TOK; ++t) {
            const __m512bh part = reinterpret_cast<__m512bh>(load(x + t * ldx));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                __m512& sum = sums.sum[r][t][CHAIN % Sums<TOK>::kChains];
                sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights[r]), part);
            }
        }
    }
};

struct Float {
    using Table = __m512;
    using Input = float;

    template <int TOK, int CHAIN>
    BD_INLINE BD_512 void add(const __m512i (&codes)[kRows], const Table (&tables)[kRows], const Input* x, int64_t ldx,
                              Sums<TOK>& sums) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
            __m512 weights[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const __m512i index = odd ? _mm512_srli_epi32(codes[r], 16) : codes[r];
                weights[r] = _mm512_permutexvar_ps(index, tables[r]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < TOK; ++t) {
                const __m512 part = _mm512_loadu_ps(x + t * ldx + 16 * odd);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    __m512& sum = sums.sum[r][t][odd % Sums<TOK>::kChains];
                    sum = _mm512_fmadd_ps(weights[r], part, sum);
                }
            }
        }
    }
};

#define BD_KERNEL(TARGET, KIND)                                                                                       \
    template <int B, int TOK, int U>                                                                                  \
    BD_INLINE TARGET void KIND##_unit(const uint8_t* pack, const KIND::Table(&tables)[kRows],                         \
                                      const KIND::Input* x, int64_t ldx, Sums<TOK>& sums) {                           \
        __m512i codes[kRows];                                                                                         \
        _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r) {                                                     \
            codes[r] = unit_codes<B, U>(pack + r * pack_bytes(B));                                                    \
        }                                                                                                             \
        KIND::add<TOK, U>(codes, tables, x + U * kUnit, ldx, sums);                                                   \
    }                                                                                                                 \
                                                                                                                      \
    template <int B, int TOK, int FIRST, int... J>                                                                    \
    BD_INLINE TARGET void KIND##_group(const uint8_t* pack, const KIND::Input* table, const KIND::Input* x,           \
                                       int64_t ldx, Sums<TOK>& sums, std::integer_sequence<int, J...>) {              \
        KIND::Table tables[kRows];                                                                                    \
        load_tables<B>(table, tables);                                                                                \
        (KIND##_unit<B, TOK, FIRST + J>(pack, tables, x, ldx, sums), ...);                                            \
    }                                                                                                                 \
                                                                                                                      \
    template <int B, int TOK, int GU, int... G>                                                                       \
    BD_INLINE TARGET void KIND##_block(const uint8_t* pack, const KIND::Input* table, const KIND::Input* x,           \
                                       int64_t ldx, Sums<TOK>& sums, std::integer_sequence<int, G...>) {              \
        (KIND##_group<B, TOK, G * GU>(pack, table + G * (kRows << B), x, ldx, sums,                                   \
                                      std::make_integer_sequence<int, GU>{}),                                         \
         ...);                                                                                                        \
    }                                                                                                                 \
                                                                                                                      \
    /* What is left of a row after its blocks. */                                                                     \
    template <int B, int TOK, int GU>                                                                                 \
    BD_INLINE TARGET void KIND##_rest(const BdStream& s, const uint8_t* strip, const KIND::Input* table,              \
                                      const KIND::Input* x, int64_t ldx, Sums<TOK>& sums) {                           \
        const int64_t blocks = s.units / pack_units(B), rest = s.units % pack_units(B);                               \
        const uint8_t* packs = strip + s.param_bytes + blocks * kRows * pack_bytes(B);                                \
        for (int64_t j = 0; j < rest; ++j) {                                                                          \
            const int64_t unit = blocks * pack_units(B) + j;                                                          \
            KIND::Table tables[kRows];                                                                                \
            load_tables<B>(table + unit / GU * (kRows << B), tables);                                                 \
            __m512i codes[kRows];                                                                                     \
            _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r) {                                                 \
                const int64_t index = r * rest + j;                                                                   \
                codes[r] = unit_codes<B>(packs + index / pack_units(B) * pack_bytes(B),                               \
                                         static_cast<int>(index % pack_units(B)));                                    \
            }                                                                                                         \
            KIND::add<TOK, 0>(codes, tables, x + unit * kUnit, ldx, sums);                                            \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    template <int B, int TOK, int GU>                                                                                 \
    TARGET void KIND##_strip(const Linear& call, const KIND::Input* tables, int64_t strip, int64_t token) {           \
        const BdStream& s = *call.stream;                                                                             \
        constexpr int kUnits = pack_units(B), kBlockBytes = kRows * pack_bytes(B);                                    \
        const uint8_t* data = call.data + strip * s.strip_bytes;                                                      \
        const KIND::Input* x = static_cast<const KIND::Input*>(call.x) + token * call.ldx;                            \
        const int64_t blocks = s.units / kUnits, ldx = call.ldx;                                                      \
        const uint8_t* pack = data + s.param_bytes;                                                                   \
        const KIND::Input *table = tables, *part = x;                                                                 \
        Sums<TOK> sums;                                                                                               \
        _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r)                                                       \
            _Pragma("GCC unroll 4") for (int t = 0; t < TOK; ++t)                                                     \
                _Pragma("GCC unroll 2") for (int i = 0; i < Sums<TOK>::kChains; ++i)                                  \
                    sums.sum[r][t][i] = _mm512_setzero_ps();                                                          \
        for (int64_t block = 0; block < blocks; ++block) {                                                            \
            if (TOK == 1 || token == 0) {                                                                             \
                _Pragma("GCC unroll 12") for (int line = 0; line < kBlockBytes; line += 64) {                         \
                    _mm_prefetch(reinterpret_cast<const char*>(pack + kPrefetch + line), _MM_HINT_T0);                \
                }                                                                                                     \
            }                                                                                                         \
            KIND##_block<B, TOK, GU>(pack, table, part, ldx, sums,                                                    \
                                     std::make_integer_sequence<int, kUnits / GU>{});                                 \
            pack += kBlockBytes;                                                                                      \
            table += kUnits / GU * (kRows << B);                                                                      \
            part += kUnits * kUnit;                                                                                   \
        }                                                                                                             \
        if (s.units % kUnits) KIND##_rest<B, TOK, GU>(s, data, tables, x, ldx, sums);                                 \
        _Pragma("GCC unroll 4") for (int r = 0; r < kRows; ++r) {                                                     \
            if (strip * kRows + r >= s.rows) continue;                                                                \
            _Pragma("GCC unroll 4") for (int t = 0; t < TOK; ++t) {                                                   \
                __m512 sum = sums.sum[r][t][0];                                                                       \
                if constexpr (Sums<TOK>::kChains == 2) sum = _mm512_add_ps(sum, sums.sum[r][t][1]);                   \
                store_output(call, token + t, strip * kRows + r, _mm512_reduce_add_ps(sum));                          \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    template <int B, int GU>                                                                                          \
    TARGET void KIND##_strips(const Linear& call, int64_t first, int64_t last) {                                      \
        const BdStream& s = *call.stream;                                                                             \
        const Constants k = constants_of<B>(s, call.bfloat);                                                          \
        std::unique_ptr<KIND::Input[]> tables(new (std::nothrow) KIND::Input[s.groups * (kRows << B) + 16]);          \
        if (!tables) {                                                                                                \
            *call.failed = true;                                                                                      \
            return;                                                                                                   \
        }                                                                                                             \
        for (int64_t strip = first; strip < last; ++strip) {                                                          \
            write_tables<B>(s, call.data + strip * s.strip_bytes, k, tables.get());                                   \
            int64_t token = 0;                                                                                        \
            for (; token + 4 <= call.tokens; token += 4) KIND##_strip<B, 4, GU>(call, tables.get(), strip, token);    \
            if (token + 2 <= call.tokens) KIND##_strip<B, 2, GU>(call, tables.get(), strip, token), token += 2;       \
            if (token < call.tokens) KIND##_strip<B, 1, GU>(call, tables.get(), strip, token);                        \
        }                                                                                                             \
    }                                                                                                                 \
                                                                                                                      \
    inline void KIND##_linear(const Linear& call, int64_t first, int64_t last) {                                    \
        const int bits = call.stream->bits, group = call.stream->units_per_group;                                   \
        if (bits == 2) {                                                                                            \
            if (group == 8) return KIND##_strips<2, 8>(call, first, last);                                          \
            if (group == 4) return KIND##_strips<2, 4>(call, first, last);                                          \
            if (group == 2) return KIND##_strips<2, 2>(call, first, last);                                          \
            return KIND##_strips<2, 1>(call, first, last);                                                          \
        }                                                                                                           \
        if (bits == 3) {                                                                                            \
            if (group == 16) return KIND##_strips<3, 16>(call, first, last);                                        \
            if (group == 4) return KIND##_strips<3, 4>(call, first, last);                                          \
            if (group == 2) return KIND##_strips<3, 2>(call, first, last);                                          \
            return KIND##_strips<3, 1>(call, first, last);                                                          \
        }                                                                                                           \
        if (group == 4) return KIND##_strips<4, 4>(call, first, last);                                              \
        if (group == 2) return KIND##_strips<4, 2>(call, first, last);                                              \
        return KIND##_strips<4, 1>(call, first, last);                                                              \
    }

BD_KERNEL(BD_512B, Bfloat)
BD_KERNEL(BD_512, Float)
#undef BD_KERNEL

inline BD_512 uint64_t read(const uint64_t* data, int64_t size) {
    __m512i sums[4];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t i = 0; i + 32 <= size; i += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(data + i) + kPrefetch, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + 8) + kPrefetch, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + 16) + kPrefetch, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + 24) + kPrefetch, _MM_HINT_T0);
        for (int j = 0; j < 4; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(data + i + 8 * j));
    }
    const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3]));
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(all));
}

// 16 codes from bit `16 * B * index` of a row, one per 32-bit lane, bits above anything (exact at 8 bits).
template <int B>
BD_INLINE BD_512 __m512i sixteen_codes(const uint8_t* row, int64_t index) {
    const uint8_t* data = row + index * 2 * B;
    if constexpr (B == 8) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
    } else if constexpr (B == 4) {
        uint64_t both;
        std::memcpy(&both, data, 8);
        const __m512i words = _mm512_set1_epi64(static_cast<int64_t>(both));
        const __m512i spread = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), words);
        const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        return _mm512_srlv_epi32(spread, shifts);
    } else if constexpr (B == 2) {
        uint32_t word;
        std::memcpy(&word, data, 4);
        const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(word)), shifts);
    } else {
        uint32_t low;
        uint16_t high;  // the bits from 16 on, in two parts, so that nothing behind the 48 is read
        std::memcpy(&low, data, 4);
        std::memcpy(&high, data + 4, 2);
        const uint32_t upper = (low >> 24) | (static_cast<uint32_t>(high) << 8);  // bits 24 .. 47
        const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(low)), 0xfc00,
                                                     static_cast<int>(upper));
        const __m512i shifts = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 6, 9, 12, 15, 18, 21);
        return _mm512_srlv_epi32(words, shifts);
    }
}

BD_INLINE BD_512 void store_sixteen(void* out, int64_t col, __m512 value, int type) {
    if (type == kDenseFloat) return _mm512_storeu_ps(static_cast<float*>(out) + col, value);
    __m256i* target = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + col);
    if (type == kDenseHalf) return _mm256_storeu_si256(target, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(target, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(value), 16)));
}

// Columns [begin, end) of one row in one group, both multiples of 16.
template <int B, int TYPE>
BD_512 void dequantize_run(const BdWeight& w, const uint32_t* words, Pair pair, int64_t begin, int64_t end, void* out) {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(words);
    const __m512 p = _mm512_set1_ps(pair.p), q = _mm512_set1_ps(pair.q), c = _mm512_set1_ps(w.c);
    const __m512 a = _mm512_loadu_ps(w.a);
    __m512 table = _mm512_fmadd_ps(_mm512_fnmadd_ps(c, q, a), p, _mm512_mul_ps(_mm512_loadu_ps(w.b), q));
    if constexpr (TYPE == kDenseBfloat) table = _mm512_castsi512_ps(round_bits(table));
    const __m512 shift = _mm512_fnmadd_ps(c, q, _mm512_set1_ps(w.a[0]));
    for (int64_t col = begin; col < end; col += 16) {
        const __m512i codes = sixteen_codes<B>(row, col / 16);
        __m512 value;
        if constexpr (B == 8) {
            value = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(codes), shift), p);
            if constexpr (TYPE == kDenseBfloat) value = _mm512_castsi512_ps(round_bits(value));
        } else {
            value = _mm512_permutexvar_ps(codes, table);
        }
        store_sixteen(out, col, value, TYPE);
    }
}

template <int B>
inline void dequantize_typed(const BdWeight& w, const uint32_t* words, Pair pair, int64_t begin, int64_t end, void* out,
                             int type) {
    if (type == kDenseFloat) return dequantize_run<B, kDenseFloat>(w, words, pair, begin, end, out);
    if (type == kDenseBfloat) return dequantize_run<B, kDenseBfloat>(w, words, pair, begin, end, out);
    return dequantize_run<B, kDenseHalf>(w, words, pair, begin, end, out);
}

inline void dequantize(const BdWeight& w, const uint32_t* words, Pair pair, int64_t begin, int64_t end, void* out,
                       int type) {
    if (w.bits == 2) return dequantize_typed<2>(w, words, pair, begin, end, out, type);
    if (w.bits == 3) return dequantize_typed<3>(w, words, pair, begin, end, out, type);
    if (w.bits == 4) return dequantize_typed<4>(w, words, pair, begin, end, out, type);
    return dequantize_typed<8>(w, words, pair, begin, end, out, type);
}

}  // namespace avx512
}  // namespace bd
#endif
