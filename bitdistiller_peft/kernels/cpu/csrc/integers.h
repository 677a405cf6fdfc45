// Sums of 8-bit integers times the ternary weights of a stream, in integers: exact in any order.
//
// Inputs are laid out as the stream is. In a 2-bit pack, byte 2l of its 64 holds column l of units 0 .. 3 in two
// bits each, and byte 2l + 1 that of units 4 .. 7. Shifted by 2j and masked, the pack is 64 codes of units j and j + 4;
// so of every 256 inputs, the 64 bytes from 64j on are those of these units, in turn. Codes are 0, 1, 2 for -1, 0, 1:
// the sum of the inputs is subtracted at the end. What is left of a row after whole packs stays in order.

#pragma once

#include <algorithm>
#include <memory>
#include <new>

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
constexpr int64_t kTokensWorthUnpacking = 16;

struct Products {
    const BdStream* stream;
    const uint8_t* data;
    const int8_t* inputs;  // [tokens, stride], see place_of; kUnit bytes after the last one may be read
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

// Some strips, a few tokens at a time.
template <typename Some, typename One>
inline void each_token(const Products& call, int64_t begin, int64_t end, Some some, One one) {
    int64_t token = 0;
    for (; token + 4 <= call.tokens; token += 4) {
        for (int64_t strip = begin; strip < end; ++strip) some(strip, token);
    }
    for (; token < call.tokens; ++token) {
        for (int64_t strip = begin; strip < end; ++strip) one(strip, token);
    }
}

// Strips as many at a time as stay in the cache.
template <typename Some, typename One>
inline void each_tile(const Products& call, int64_t first, int64_t last, Some some, One one) {
    const int64_t together = std::max<int64_t>(1, kCacheBytes / call.stream->strip_bytes);
    for (int64_t begin = first; begin < last; begin += together) {
        each_token(call, begin, std::min(last, begin + together), some, one);
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

// sum += products of four. Around the intrinsic GCC 12 copies every sum twice, which costs a third of the time.
BD_INLINE BD_VNNI void add_products(__m512i& sum, __m512i codes, __m512i inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(inputs));
}

// The codes of a unit that is in no whole pack of its row, in 16 bits each.
BD_INLINE BD_VNNI __m512i codes_of_rest(const BdStream& s, const uint8_t* codes, int row, int64_t unit) {
    const portable::Place place = portable::place_of(s.units, 2, row, unit);
    const __m512i packed = _mm512_loadu_si512(codes + place.offset);
    return _mm512_and_si512(_mm512_srl_epi16(packed, _mm_cvtsi32_si128(2 * place.unit)), _mm512_set1_epi16(3));
}

// Stores the sums of a strip's rows for one token, of which each vector has a row's.
BD_VNNI inline void store_rows(const Products& call, int64_t token, int64_t strip, __m512i a, __m512i b, __m512i c,
                               __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i wide = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const int64_t row = strip * kRows, rows = std::min<int64_t>(kRows, call.stream->rows - row);
    int32_t* place = call.sums + token * call.stream->rows + row;
    _mm_mask_storeu_epi32(place, static_cast<__mmask8>((1 << rows) - 1),
                          _mm_sub_epi32(sums, _mm_set1_epi32(call.totals[token])));
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
                for (int t = 0; t < TOK; ++t) add_products(sums[r][t][j % kChains], code, part[t]);
            }
        }
    }
    for (int64_t unit = blocks * kUnits; unit < s.units; ++unit) {
        for (int r = 0; r < kRows; ++r) {
            const __m512i code = codes_of_rest(s, codes, r, unit);
            for (int t = 0; t < TOK; ++t) {
                const int8_t* part = x + t * call.stride + unit * kUnit;
                const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
                sums[r][t][0] = _mm512_add_epi32(sums[r][t][0], _mm512_madd_epi16(code, wide));
            }
        }
    }
    for (int t = 0; t < TOK; ++t) {
        if constexpr (kChains == 2) {
            for (int r = 0; r < kRows; ++r) sums[r][t][0] = _mm512_add_epi32(sums[r][t][0], sums[r][t][1]);
        }
        store_rows(call, token + t, strip, sums[0][t][0], sums[1][t][0], sums[2][t][0], sums[3][t][0]);
    }
}

// How many times 64 bytes a row has in bytes: those of its packs, then two units each.
inline int64_t chunks_of(const BdStream& s) { return s.units / kUnits * 4 + (s.units % kUnits + 1) / 2; }

// The codes of a strip in bytes, in the order of the inputs: [chunks][rows][64]. What is past an odd last unit stays.
BD_VNNI inline void unpack(const BdStream& s, const uint8_t* codes, uint8_t* out) {
    const __m512i mask = _mm512_set1_epi8(3);
    const int64_t blocks = s.units / kUnits;
    for (int64_t pack = 0; pack < blocks * kRows; ++pack) {
        const __m512i packed = _mm512_loadu_si512(codes + pack * 64);
        uint8_t* to = out + (pack / kRows * 4 * kRows + pack % kRows) * 64;
        for (int j = 0; j < 4; ++j) {
            _mm512_storeu_si512(to + j * kRows * 64, _mm512_and_si512(_mm512_srli_epi16(packed, 2 * j), mask));
        }
    }
    for (int64_t unit = blocks * kUnits; unit < s.units; ++unit) {
        const int64_t at = unit - blocks * kUnits, chunk = blocks * 4 + at / 2;
        for (int r = 0; r < kRows; ++r) {
            const __m256i code = _mm512_cvtepi16_epi8(codes_of_rest(s, codes, r, unit));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (chunk * kRows + r) * 64 + at % 2 * kUnit), code);
        }
    }
}

template <int TOK>
BD_VNNI void unpacked_strip(const Products& call, const uint8_t* codes, int64_t strip, int64_t token) {
    const int64_t chunks = chunks_of(*call.stream);
    const int8_t* x = call.inputs + token * call.stride;
    __m512i sums[kRows][TOK] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        __m512i code[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) code[r] = _mm512_loadu_si512(codes + (chunk * kRows + r) * 64);
#pragma GCC unroll 4
        for (int t = 0; t < TOK; ++t) {
            const __m512i part = _mm512_loadu_si512(x + t * call.stride + chunk * 64);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) add_products(sums[r][t], code[r], part);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOK; ++t) store_rows(call, token + t, strip, sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
}

// As each_tile, with codes unpacked once for all tokens; returns whether there was memory for them.
inline bool unpacked_tiles(const Products& call, int64_t first, int64_t last) {
    const BdStream& s = *call.stream;
    const int64_t size = chunks_of(s) * kRows * 64, together = std::max<int64_t>(1, kCacheBytes / size);
    const std::unique_ptr<uint8_t[]> codes(new (std::nothrow) uint8_t[static_cast<size_t>(together * size)]());
    if (!codes) return false;
    for (int64_t begin = first; begin < last; begin += together) {
        const int64_t end = std::min(last, begin + together);
        const auto place = [&](int64_t strip) { return codes.get() + (strip - begin) * size; };
        for (int64_t strip = begin; strip < end; ++strip) {
            unpack(s, call.data + strip * s.strip_bytes + s.param_bytes, place(strip));
        }
        each_token(call, begin, end,
                   [&](int64_t strip, int64_t token) { unpacked_strip<4>(call, place(strip), strip, token); },
                   [&](int64_t strip, int64_t token) { unpacked_strip<1>(call, place(strip), strip, token); });
    }
    return true;
}

inline void sums_of_256(const Products& call, int64_t first, int64_t last) {
    each_tile(call, first, last, [&](int64_t strip, int64_t token) { strip_of_256<2, 4>(call, strip, token); },
              [&](int64_t strip, int64_t token) { strip_of_256<4, 1>(call, strip, token); });
}

inline void sums_of_512(const Products& call, int64_t first, int64_t last) {
    if (call.tokens >= kTokensWorthUnpacking && unpacked_tiles(call, first, last)) return;
    each_tile(call, first, last, [&](int64_t strip, int64_t token) { strip_of_512<4>(call, strip, token); },
              [&](int64_t strip, int64_t token) { strip_of_512<1>(call, strip, token); });
}

#endif

}  // namespace integers
}  // namespace bd
