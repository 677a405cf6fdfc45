// AVX2: eight weights at a time, fp32. A unit is two half registers of 16-bit codes.
//
// As with AVX-512, the tables of a strip are written to memory before its look-ups begin, and whole packs are unrolled,
// so that shifts are constants and a table is one load. Shuffles across the register take two steps on many of these
// processors; at 2 bits, four entries are enough for the one that stays inside its half.

#pragma once

#include <memory>
#include <new>

#include "layout.h"
#include "portable.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define BD_256 __attribute__((target("avx2,fma,f16c")))
#define BD_INLINE256 __attribute__((always_inline)) static inline

namespace bd {
namespace avx2 {

constexpr int64_t kPrefetch = 4096;

constexpr int kEntries(int bits) { return bits == 4 ? 16 : bits == 3 ? 8 : 4; }  // of one row's table in memory

struct Table {
    __m256 low, high;  // codes 0 .. 7 (repeated to fill) and, at 4 bits, 8 .. 15
};

BD_INLINE256 BD_256 __m256 round_bfloat(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// (p, q) of four rows.
BD_INLINE256 BD_256 __m256 load_params(const uint8_t* data, int scale_type) {
    if (scale_type == kFloat) return _mm256_loadu_ps(reinterpret_cast<const float*>(data));
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
    if (scale_type == kHalf) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// All tables of a strip: row r of a group begins at entry r * kEntries.
template <int B>
BD_INLINE256 BD_256 void write_tables(const BdStream& s, const uint8_t* params, bool round, float* out) {
    const __m256 c = _mm256_set1_ps(s.c);
    constexpr int kRegisters = kRows * kEntries(B) / 8;
    for (int64_t group = 0; group < s.groups; ++group, params += param_size(s.scale_type)) {
        const __m256 all = load_params(params, s.scale_type);
#pragma GCC unroll 8
        for (int v = 0; v < kRegisters; ++v, out += 8) {
            const int low = 8 * v / kEntries(B), high = (8 * v + 4) / kEntries(B), part = B == 4 ? v % 2 * 8 : 0;
            const __m256i which = _mm256_setr_epi32(2 * low, 2 * low, 2 * low, 2 * low, 2 * high, 2 * high, 2 * high,
                                                    2 * high);
            const __m256 p = _mm256_permutevar8x32_ps(all, which);
            const __m256 q = _mm256_permutevar8x32_ps(all, _mm256_add_epi32(which, _mm256_set1_epi32(1)));
            const __m256 level = _mm256_fnmadd_ps(c, q, _mm256_loadu_ps(s.a + part));
            const __m256 value = _mm256_fmadd_ps(level, p, _mm256_mul_ps(_mm256_loadu_ps(s.b + part), q));
            _mm256_storeu_ps(out, round ? round_bfloat(value) : value);
        }
    }
}

template <int B>
BD_INLINE256 BD_256 Table load_table(const float* data) {
    Table table;
    table.low = B == 2 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(data)) : _mm256_loadu_ps(data);
    table.high = B == 4 ? _mm256_loadu_ps(data + 8) : table.low;
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

// The last unit of a 3-bit pack, from the top bits of its three vectors.
BD_INLINE256 BD_256 __m256i top_unit(const uint8_t* pack) {
    const __m256i low = _mm256_srli_epi16(load(pack), 15);
    const __m256i middle = _mm256_and_si256(_mm256_srli_epi16(load(pack + 64), 14), _mm256_set1_epi16(2));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(load(pack + 128), 13), _mm256_set1_epi16(4));
    return _mm256_or_si256(low, _mm256_or_si256(middle, high));
}

// Half a unit: the codes in the low bits of each 16-bit lane, bits above anything.
template <int B>
BD_INLINE256 BD_256 __m256i half_unit(const uint8_t* pack, int unit) {
    if (B == 3 && unit == 15) return top_unit(pack);
    if constexpr (B == 3) return _mm256_srli_epi16(load(pack + 64 * (unit / 5)), 3 * (unit % 5));
    return _mm256_srli_epi16(load(pack), B * unit);
}

// What the registers hold while a stream is read: the sums of some rows' products with some tokens.
template <int ROWS, int TOK>
struct Sums {
    static constexpr int kEach = ROWS * TOK > 2 ? 2 : 4;  // more of them hide how long an addition takes
    __m256 at[ROWS][TOK][kEach];
};

// Half a unit of some rows times its inputs, fp32, in each unit the even columns before the odd ones.
template <int B, int ROWS, int TOK>
BD_INLINE256 BD_256 void add_half(const Table (&tables)[ROWS], const __m256i (&codes)[ROWS], const float* x,
                                  int64_t ldx, int half, Sums<ROWS, TOK>& sums) {
    const int place = 2 * half % Sums<ROWS, TOK>::kEach;
    __m256 even[ROWS], odd[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        even[r] = look_up<B>(tables[r], codes[r]);
        odd[r] = look_up<B>(tables[r], _mm256_srli_epi32(codes[r], 16));
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOK; ++t) {
        const __m256 first = _mm256_loadu_ps(x + t * ldx + 8 * half);
        const __m256 second = _mm256_loadu_ps(x + t * ldx + 8 * half + 16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            sums.at[r][t][place] = _mm256_fmadd_ps(even[r], first, sums.at[r][t][place]);
            sums.at[r][t][place + 1] = _mm256_fmadd_ps(odd[r], second, sums.at[r][t][place + 1]);
        }
    }
}

// Whole packs of some rows; G units share a table. Returns the number of units that are done.
template <int B, int ROWS, int TOK, int G>
BD_INLINE256 BD_256 int64_t whole_packs(const BdStream& s, const uint8_t* packs, const float* tables, const float* x,
                                        int64_t ldx, Sums<ROWS, TOK>& sums) {
    constexpr int kUnits = pack_units(B);
    const int64_t blocks = s.units / kUnits;
    for (int64_t block = 0; block < blocks; ++block, packs += kRows * pack_bytes(B), x += kUnits * kUnit) {
        Table current[ROWS];
        for (int64_t ahead = 0; ahead < ROWS * pack_bytes(B); ahead += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(packs + kPrefetch + ahead), _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int unit = 0; unit < kUnits; ++unit) {
            if (unit % G == 0) {
                for (int r = 0; r < ROWS; ++r) current[r] = load_table<B>(tables + r * kEntries(B));
                tables += kRows * kEntries(B);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                __m256i codes[ROWS];
                for (int r = 0; r < ROWS; ++r) codes[r] = half_unit<B>(packs + r * pack_bytes(B) + 32 * half, unit);
                add_half<B, ROWS, TOK>(current, codes, x + unit * kUnit, ldx, half, sums);
            }
        }
    }
    return blocks * kUnits;
}

template <int B, int ROWS, int TOK>
BD_INLINE256 BD_256 int64_t whole_packs_of_any(const BdStream& s, const uint8_t* packs, const float* tables,
                                               const float* x, int64_t ldx, Sums<ROWS, TOK>& sums) {
    if (s.units_per_group == 1) return whole_packs<B, ROWS, TOK, 1>(s, packs, tables, x, ldx, sums);
    if (s.units_per_group == 2) return whole_packs<B, ROWS, TOK, 2>(s, packs, tables, x, ldx, sums);
    if (s.units_per_group == 4) return whole_packs<B, ROWS, TOK, 4>(s, packs, tables, x, ldx, sums);
    return whole_packs<B, ROWS, TOK, pack_units(B)>(s, packs, tables, x, ldx, sums);
}

template <int EACH>
BD_INLINE256 BD_256 float total(const __m256 (&sums)[EACH]) {
    __m256 all = _mm256_add_ps(sums[0], sums[1]);
    if constexpr (EACH == 4) all = _mm256_add_ps(all, _mm256_add_ps(sums[2], sums[3]));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
}

// A strip, ROWS of its rows at a time; rows beyond the weight's end are there in the stream, and are not stored.
template <int B, int ROWS, int TOK>
BD_256 void strip(const Linear& call, int64_t strip, int64_t token, const float* tables) {
    const BdStream& s = *call.stream;
    const uint8_t* codes = call.data + strip * s.strip_bytes + s.param_bytes;
    const float* x = static_cast<const float*>(call.x) + token * call.ldx;
    for (int row = 0; row < kRows && strip * kRows + row < s.rows; row += ROWS) {
        Sums<ROWS, TOK> sums = {};
        const float* own = tables + row * kEntries(B);
        int64_t unit = whole_packs_of_any<B, ROWS, TOK>(s, codes + row * pack_bytes(B), own, x, call.ldx, sums);
        for (; unit < s.units; ++unit) {
            Table current[ROWS];
            for (int half = 0; half < 2; ++half) {
                __m256i parts[ROWS];
                for (int r = 0; r < ROWS; ++r) {
                    const portable::Place place = portable::place_of(s.units, B, row + r, unit);
                    current[r] = load_table<B>(own + (unit / s.units_per_group * kRows + r) * kEntries(B));
                    parts[r] = half_unit<B>(codes + place.offset + 32 * half, place.unit);
                }
                add_half<B, ROWS, TOK>(current, parts, x + unit * kUnit, call.ldx, half, sums);
            }
        }
        for (int r = 0; r < ROWS && strip * kRows + row + r < s.rows; ++r) {
            for (int t = 0; t < TOK; ++t) store_output(call, token + t, strip * kRows + row + r, total(sums.at[r][t]));
        }
    }
}

template <int B>
BD_256 void strips(const Linear& call, int64_t first, int64_t last) {
    const BdStream& s = *call.stream;
    const std::unique_ptr<float[]> tables(new (std::nothrow) float[s.groups * kRows * kEntries(B)]);
    if (!tables) {
        call.failed->store(true);
        return;
    }
    for (int64_t i = first; i < last; ++i) {
        write_tables<B>(s, call.data + i * s.strip_bytes, call.bfloat, tables.get());
        int64_t token = 0;
        for (; token + 4 <= call.tokens; token += 4) strip<B, 1, 4>(call, i, token, tables.get());
        for (; token + 2 <= call.tokens; token += 2) strip<B, 1, 2>(call, i, token, tables.get());
        if (token < call.tokens) strip<B, 2, 1>(call, i, token, tables.get());
    }
}

BD_INLINE256 BD_256 void store_eight(void* out, int64_t col, __m256 value, int type) {
    if (type == kDenseFloat) return _mm256_storeu_ps(static_cast<float*>(out) + col, value);
    __m128i halves;
    if (type == kDenseHalf) {
        halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(round_bfloat(value)), 16);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + col), halves);
}

// Columns [begin, end) of one row, which lie in one group; both are multiples of 8. Eight codes are B bytes, of which
// the first four (at 8 bits, all) are read: at 3 bits that is one byte more, which has to be there.
template <int B>
BD_256 void dequantize_run(const BdWeight& w, const uint32_t* words, Pair pair, int64_t begin, int64_t end, void* out,
                           int type) {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(words);
    const __m256 p = _mm256_set1_ps(pair.p), q = _mm256_set1_ps(pair.q), c = _mm256_set1_ps(w.c);
    const __m256i shifts = _mm256_setr_epi32(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B);
    Table table;
    for (int part = 0; part < 2; ++part) {
        const __m256 level = _mm256_fnmadd_ps(c, q, _mm256_loadu_ps(w.a + 8 * part));
        const __m256 values = _mm256_fmadd_ps(level, p, _mm256_mul_ps(_mm256_loadu_ps(w.b + 8 * part), q));
        (part ? table.high : table.low) = values;
    }
    const __m256 shift = _mm256_fnmadd_ps(c, q, _mm256_set1_ps(w.a[0]));
    for (int64_t col = begin; col < end; col += 8) {
        if constexpr (B == 8) {
            const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + col)));
            store_eight(out, col, _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(codes), shift), p), type);
        } else {
            int32_t bytes = 0;
            std::memcpy(&bytes, row + col / 8 * B, B == 2 ? 2 : 4);
            const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts);
            store_eight(out, col, look_up<B>(table, codes), type);
        }
    }
}

inline void dequantize(const BdWeight& w, const uint32_t* words, Pair pair, int64_t begin, int64_t end, void* out,
                       int type) {
    if (w.bits == 2) return dequantize_run<2>(w, words, pair, begin, end, out, type);
    if (w.bits == 3) return dequantize_run<3>(w, words, pair, begin, end, out, type);
    if (w.bits == 4) return dequantize_run<4>(w, words, pair, begin, end, out, type);
    return dequantize_run<8>(w, words, pair, begin, end, out, type);
}

inline BD_256 uint64_t read(const uint64_t* data, int64_t size) {
    __m256i sums[4] = {};
    for (int64_t i = 0; i + 16 <= size; i += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(data + i) + kPrefetch, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + i + 8) + kPrefetch, _MM_HINT_T0);
        for (int j = 0; j < 4; ++j) {
            sums[j] = _mm256_xor_si256(sums[j], load(reinterpret_cast<const uint8_t*>(data + i + 4 * j)));
        }
    }
    uint64_t parts[4];
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), all);
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
}

inline void linear(const Linear& call, int64_t first, int64_t last) {
    if (call.stream->bits == 2) return strips<2>(call, first, last);
    if (call.stream->bits == 3) return strips<3>(call, first, last);
    return strips<4>(call, first, last);
}

}  // namespace avx2
}  // namespace bd
#endif
