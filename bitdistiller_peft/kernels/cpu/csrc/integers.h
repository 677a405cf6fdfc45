// Sums of 8-bit integers times the ternary weights of a stream, in integers: exact in any order.
//
// Inputs are laid out as the stream is. In a 2-bit pack, byte 2l of its 64 holds column l of units 0 .. 3 in two
// bits each, and byte 2l + 1 that of units 4 .. 7. Shifted by 2j and masked, the pack is 64 codes of units j and j + 4;
// so of every 256 inputs, the 64 bytes from 64j on are those of these units, in turn. Codes are 0, 1, 2 for -1, 0, 1:
// the sum of the inputs is subtracted at the end. What is left of a row after whole packs stays in order.

#pragma once

#include <algorithm>

#include "avx2.h"
#include "layout.h"
#include "portable.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define BD_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#endif

namespace bd {
namespace integers {

constexpr int kUnits = pack_units(2), kBlock = kUnits * kUnit;
constexpr int64_t kCacheBytes = 1 << 17;  // of codes that are read again for the next few tokens

struct Products {
    const BdStream* stream;
    const uint8_t* data;
    const int8_t* inputs;  // [tokens, stride], see place_of
    const int32_t* totals;  // [tokens], sums of the inputs
    int64_t stride, tokens;
    int32_t* sums;  // [tokens, rows]
};

// Where a column is kept.
inline int64_t place_of(int64_t col, int64_t units) {
    if (col / kBlock >= units / kUnits) return col;
    const int64_t unit = col % kBlock / kUnit;
    return col / kBlock * kBlock + unit % 4 * 64 + col % kUnit * 2 + unit / 4;
}

// How far apart the columns of a unit lie.
inline int64_t step_of(int64_t col, int64_t units) { return col / kBlock < units / kUnits ? 2 : 1; }

inline void store(const Products& call, int64_t token, int64_t row, int32_t sum) {
    call.sums[token * call.stream->rows + row] = sum - call.totals[token];
}

// Strips as many at a time as stay in the cache, a few tokens at a time.
template <typename Some, typename One>
inline void each_tile(const Products& call, int64_t first, int64_t last, Some some, One one) {
    const int64_t together = std::max<int64_t>(1, kCacheBytes / call.stream->strip_bytes);
    for (int64_t begin = first; begin < last; begin += together) {
        const int64_t end = std::min(last, begin + together);
        int64_t token = 0;
        for (; token + 4 <= call.tokens; token += 4) {
            for (int64_t strip = begin; strip < end; ++strip) some(strip, token);
        }
        for (; token < call.tokens; ++token) {
            for (int64_t strip = begin; strip < end; ++strip) one(strip, token);
        }
    }
}

inline void portable_sums(const Products& call, int64_t first, int64_t last) {
    const BdStream& s = *call.stream;
    for (int64_t row = first * kRows; row < std::min(last * kRows, s.rows); ++row) {
        const uint8_t* codes = call.data + row / kRows * s.strip_bytes + s.param_bytes;
        for (int64_t token = 0; token < call.tokens; ++token) {
            int32_t sum = 0;
            for (int64_t col = 0; col < s.cols; ++col) {
                const int lane_row = static_cast<int>(row % kRows), lane = static_cast<int>(col % kUnit);
                const portable::Place place = portable::place_of(s.units, 2, lane_row, col / kUnit);
                const uint32_t code = portable::lane_code(codes + place.offset, place.unit, lane, 2);
                sum += static_cast<int32_t>(code) * call.inputs[token * call.stride + place_of(col, s.units)];
            }
            store(call, token, row, sum);
        }
    }
}

#ifdef BD_VNNI

BD_INLINE256 BD_256 int32_t total(__m256i sums) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// AVX2 multiplies bytes into sums of two, of 16 bits: 8 of them a pack, at most 762 each, so five packs fit.
constexpr int64_t kPacksBeforeWidening = 5;

template <int ROWS, int TOK>
BD_INLINE256 BD_256 void add_pack(const uint8_t* pack, const int8_t* x, int64_t stride, __m256i (&sums)[ROWS][TOK]) {
    const __m256i mask = _mm256_set1_epi8(3);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m256i codes[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) codes[r] = avx2::load(pack + 64 * r + 32 * half);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m256i part[TOK];
#pragma GCC unroll 4
            for (int t = 0; t < TOK; ++t) {
                part[t] = avx2::load(reinterpret_cast<const uint8_t*>(x + t * stride + 64 * j + 32 * half));
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m256i code = _mm256_and_si256(_mm256_srli_epi16(codes[r], 2 * j), mask);
#pragma GCC unroll 4
                for (int t = 0; t < TOK; ++t) {
                    sums[r][t] = _mm256_add_epi16(sums[r][t], _mm256_maddubs_epi16(code, part[t]));
                }
            }
        }
    }
}

template <int ROWS, int TOK>
BD_256 void strip_of_256(const Products& call, int64_t strip, int64_t token) {
    const BdStream& s = *call.stream;
    const uint8_t* codes = call.data + strip * s.strip_bytes + s.param_bytes;
    const int8_t* x = call.inputs + token * call.stride;
    const int64_t blocks = s.units / kUnits;
    for (int row = 0; row < kRows && strip * kRows + row < s.rows; row += ROWS) {
        __m256i wide[ROWS][TOK] = {};
        for (int64_t block = 0; block < blocks;) {
            __m256i narrow[ROWS][TOK] = {};
            const int64_t end = std::min(blocks, block + kPacksBeforeWidening);
            for (; block < end; ++block) {
                const uint8_t* pack = codes + (block * kRows + row) * 64;
                for (int r = 0; TOK == 1 && r < ROWS; ++r) {
                    _mm_prefetch(reinterpret_cast<const char*>(pack + avx2::kPrefetch + 64 * r), _MM_HINT_T0);
                }
                add_pack<ROWS, TOK>(pack, x + block * kBlock, call.stride, narrow);
            }
            for (int r = 0; r < ROWS; ++r) {
                for (int t = 0; t < TOK; ++t) {
                    const __m256i pairs = _mm256_madd_epi16(narrow[r][t], _mm256_set1_epi16(1));
                    wide[r][t] = _mm256_add_epi32(wide[r][t], pairs);
                }
            }
        }
        for (int64_t unit = blocks * kUnits; unit < s.units; ++unit) {
            for (int r = 0; r < ROWS; ++r) {
                const portable::Place place = portable::place_of(s.units, 2, row + r, unit);
                for (int half = 0; half < 2; ++half) {
                    const __m256i shifted = _mm256_srl_epi16(avx2::load(codes + place.offset + 32 * half),
                                                             _mm_cvtsi32_si128(2 * place.unit));
                    const __m256i code = _mm256_and_si256(shifted, _mm256_set1_epi16(3));
                    for (int t = 0; t < TOK; ++t) {
                        const int8_t* part = x + t * call.stride + unit * kUnit + 16 * half;
                        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(part));
                        wide[r][t] = _mm256_add_epi32(wide[r][t], _mm256_madd_epi16(code, _mm256_cvtepi8_epi16(bytes)));
                    }
                }
            }
        }
        for (int r = 0; r < ROWS && strip * kRows + row + r < s.rows; ++r) {
            for (int t = 0; t < TOK; ++t) store(call, token + t, strip * kRows + row + r, total(wide[r][t]));
        }
    }
}

template <int TOK>
BD_VNNI void strip_of_512(const Products& call, int64_t strip, int64_t token) {
    const BdStream& s = *call.stream;
    const uint8_t* codes = call.data + strip * s.strip_bytes + s.param_bytes;
    const int8_t* x = call.inputs + token * call.stride;
    const int64_t blocks = s.units / kUnits;
    const __m512i mask = _mm512_set1_epi8(3);
    constexpr int kChains = TOK == 1 ? 2 : 1;  // one chain of additions per row would wait for itself
    __m512i sums[kRows][TOK][kChains] = {};
    for (int64_t block = 0; block < blocks; ++block) {
        const uint8_t* pack = codes + block * kRows * 64;
        __m512i packed[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            if (TOK == 1) _mm_prefetch(reinterpret_cast<const char*>(pack + avx2::kPrefetch + 64 * r), _MM_HINT_T0);
            packed[r] = _mm512_loadu_si512(pack + 64 * r);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512i part[TOK];
#pragma GCC unroll 4
            for (int t = 0; t < TOK; ++t) part[t] = _mm512_loadu_si512(x + t * call.stride + block * kBlock + 64 * j);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const __m512i code = _mm512_and_si512(_mm512_srli_epi16(packed[r], 2 * j), mask);
#pragma GCC unroll 4
                for (int t = 0; t < TOK; ++t) {
                    __m512i& sum = sums[r][t][j % kChains];
                    sum = _mm512_dpbusd_epi32(sum, code, part[t]);
                }
            }
        }
    }
    for (int64_t unit = blocks * kUnits; unit < s.units; ++unit) {
        for (int r = 0; r < kRows; ++r) {
            const portable::Place place = portable::place_of(s.units, 2, r, unit);
            const __m512i shifted = _mm512_srl_epi16(_mm512_loadu_si512(codes + place.offset),
                                                     _mm_cvtsi32_si128(2 * place.unit));
            const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi16(3));
            for (int t = 0; t < TOK; ++t) {
                const int8_t* part = x + t * call.stride + unit * kUnit;
                const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
                sums[r][t][0] = _mm512_add_epi32(sums[r][t][0], _mm512_madd_epi16(code, wide));
            }
        }
    }
    for (int r = 0; r < kRows && strip * kRows + r < s.rows; ++r) {
        for (int t = 0; t < TOK; ++t) {
            __m512i sum = sums[r][t][0];
            if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, sums[r][t][1]);
            store(call, token + t, strip * kRows + r, _mm512_reduce_add_epi32(sum));
        }
    }
}

inline void sums_of_256(const Products& call, int64_t first, int64_t last) {
    each_tile(call, first, last, [&](int64_t strip, int64_t token) { strip_of_256<2, 4>(call, strip, token); },
              [&](int64_t strip, int64_t token) { strip_of_256<4, 1>(call, strip, token); });
}

inline void sums_of_512(const Products& call, int64_t first, int64_t last) {
    each_tile(call, first, last, [&](int64_t strip, int64_t token) { strip_of_512<4>(call, strip, token); },
              [&](int64_t strip, int64_t token) { strip_of_512<1>(call, strip, token); });
}

#endif

}  // namespace integers
}  // namespace bd
