// The C interface: which instruction sets there are, re-layout, multiplication, dequantization, fake quantization.
//
// Pointers and sizes come from Python, which has checked them. Nothing here allocates more than a copy of the inputs,
// throws across the border, or keeps state between calls, so any number of threads may call at once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "avx2.h"
#include "avx512.h"
#include "fake.h"
#include "integers.h"
#include "layout.h"
#include "parallel.h"
#include "portable.h"
#include "ternary.h"

using namespace bd;

namespace {

enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// One row of the stream: codes of every unit, into the strip.
void write_row(const BdWeight& w, const BdStream& s, int64_t row, uint8_t* strip) {
    const int lane_row = static_cast<int>(row % kRows);
    const int64_t group_columns = w.groups == 1 ? w.cols : w.group_size;
    for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t column = group * s.units_per_group * kUnit;
        const int64_t index = w.per_matrix ? 0 : row * w.groups + column / group_columns;
        uint8_t* target = strip + group * param_size(s.scale_type);
        const int size = w.scale_type == kFloat ? 4 : 2;
        std::memcpy(target + 2 * lane_row * size, static_cast<const uint8_t*>(w.scale) + index * size, size);
        uint8_t* second = target + (2 * lane_row + 1) * size;
        if (w.second) std::memcpy(second, static_cast<const uint8_t*>(w.second) + index * size, size);
        if (w.zero) {
            const float q = load_pair(w, row, column / group_columns).q;
            const uint16_t half = w.scale_type == kHalf ? to_half(q) : to_bfloat(q);
            if (w.scale_type == kFloat) std::memcpy(second, &q, 4);
            else std::memcpy(second, &half, 2);
        }
    }
    const uint32_t* words = w.words + row * w.words_per_row;
    uint8_t* codes = strip + s.param_bytes;
    for (int64_t unit = 0; unit < s.units; ++unit) {
        const portable::Place place = portable::place_of(s.units, s.bits, lane_row, unit);
        const int64_t width = std::min<int64_t>(kUnit, w.cols - unit * kUnit);
        for (int lane = 0; lane < width; ++lane) {
            const uint32_t code = load_code(words, unit * kUnit + lane, w.bits);
            portable::set_lane_code(codes + place.offset, place.unit, lane, s.bits, code);
        }
    }
}

// The inputs as a kernel reads them: rows padded with zeros to whole units, bf16 or fp32, perhaps even before odd.
struct Inputs {
    std::unique_ptr<uint8_t[]> storage;
    const void* data = nullptr;
    int64_t stride = 0;
};

bool prepare_inputs(Inputs& made, const void* x, int64_t tokens, int64_t cols, bool bfloat, int isa) {
    const int64_t padded = (cols + kUnit - 1) / kUnit * kUnit;
    const bool keep = bfloat && isa >= kAvx512Bf16;
    made.stride = padded;
    if (keep && padded == cols) {
        made.data = x;
        return true;
    }
    const int64_t size = padded * tokens * (keep ? 2 : 4);
    made.storage.reset(new (std::nothrow) uint8_t[static_cast<size_t>(size)]());
    if (!made.storage) return false;
    made.data = made.storage.get();
    for (int64_t token = 0; token < tokens; ++token) {
        const uint16_t* brains = static_cast<const uint16_t*>(x) + token * cols;
        if (keep) {
            std::memcpy(made.storage.get() + token * padded * 2, brains, static_cast<size_t>(cols) * 2);
            continue;
        }
        const float* floats = static_cast<const float*>(x) + token * cols;
        float* out = reinterpret_cast<float*>(made.storage.get()) + token * padded;
        const bool split = isa >= kAvx2;
        for (int64_t col = 0; col < cols; ++col) {
            const int64_t lane = col % kUnit, place = split ? lane / 2 + 16 * (lane % 2) : lane;
            out[col - lane + place] = bfloat ? from_bfloat(brains[col]) : floats[col];
        }
    }
    return true;
}

using LinearKernel = void (*)(const Linear&, int64_t, int64_t);

LinearKernel linear_kernel(bool bfloat, int isa) {
#ifdef BD_X86
    if (isa >= kAvx512Bf16 && bfloat) return avx512::Bfloat_linear;
    if (isa >= kAvx512) return avx512::Float_linear;
    if (isa >= kAvx2) return avx2::linear;
#endif
    (void)bfloat;
    (void)isa;
    return portable::linear;
}

using IntegerKernel = void (*)(const integers::Products&, int64_t, int64_t);

IntegerKernel integer_sums(int isa) {
#ifdef BD_X86
    if (isa >= kAvx512Bf16) return integers::sums_of_512;
    if (isa >= kAvx2) return integers::sums_of_256;
#endif
    (void)isa;
    return integers::portable_sums;
}

void dequantize_row(const BdWeight& w, int64_t row, void* out, int type, int isa) {
    const uint32_t* words = w.words + row * w.words_per_row;
    const int64_t width = w.groups == 1 ? w.cols : w.group_size;
    uint8_t* target = static_cast<uint8_t*>(out) + row * w.cols * (type == kDenseFloat ? 4 : 2);
    for (int64_t group = 0; group < w.groups; ++group) {
        const int64_t begin = group * width;
        int64_t end = begin + width, middle = begin;
        const Pair pair = load_pair(w, row, group);
#ifdef BD_X86
        if (isa >= kAvx512 && begin % 16 == 0) {
            middle = begin + (end - begin) / 16 * 16;
            avx512::dequantize(w, words, pair, begin, middle, target, type);
        } else if (isa == kAvx2 && begin % 8 == 0) {
            const int64_t safe = w.bits == 3 ? std::min(end, w.cols - 8) : end;  // it reads one byte more
            middle = std::max(begin, begin + (safe - begin) / 8 * 8);
            avx2::dequantize(w, words, pair, begin, middle, target, type);
        }
#else
        (void)isa;
#endif
        portable::dequantize_run(w, words, pair, middle, end, target, type);
    }
}

// The loops of fake.h and ternary.h, compiled once for each instruction set: `BD_EACH_ISA(space, name, parameters,
// arguments)` defines `name` for ranges of runs or tokens.
#ifdef BD_X86
#define BD_EACH_ISA(space, name, parameters, arguments)                                                         \
    void name##_portable parameters { space::name arguments; }                                                  \
    __attribute__((target("avx2,fma"))) void name##_avx2 parameters { space::name arguments; }                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void name##_avx512 parameters {               \
        space::name arguments;                                                                                  \
    }                                                                                                           \
    auto name##_for(int isa) {                                                                                  \
        return isa >= kAvx512 ? name##_avx512 : isa >= kAvx2 ? name##_avx2 : name##_portable;                   \
    }
#else
#define BD_EACH_ISA(space, name, parameters, arguments)                                                         \
    void name##_portable parameters { space::name arguments; }                                                  \
    auto name##_for(int) { return name##_portable; }
#endif

BD_EACH_ISA(fake, forward, (const BdFake& call, int64_t first, int64_t last), (call, first, last))
BD_EACH_ISA(fake, backward, (const BdFake& call, int64_t first, int64_t last), (call, first, last))
BD_EACH_ISA(fake, ends, (const float* w, int64_t size, float* low, float* high, int64_t first, int64_t last),
            (w, size, low, high, first, last))
BD_EACH_ISA(fake, magnitudes, (const float* w, int64_t size, double* sums, int64_t first, int64_t last),
            (w, size, sums, first, last))
BD_EACH_ISA(ternary, activations, (const ternary::Activations& call, int64_t first, int64_t last),
            (call, first, last))
BD_EACH_ISA(ternary, outputs, (const ternary::Finish& call, int64_t first, int64_t last),
            (call, first, last))

}  // namespace

extern "C" {

// Changes when a structure or a signature does.
int32_t bd_version() { return 3; }

int32_t bd_best_isa() {
#ifdef BD_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
        return kPortable;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
        return kAvx2;
    }
    // no processor has the one without the other, but a virtual one might
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? kAvx512Bf16 : kAvx512;
#else
    return kPortable;
#endif
}

int32_t bd_uses_openmp() { return kUsesOpenMp; }

// Reads every byte once, as fast as this machine can: the limit that a multiplication is measured against.
uint64_t bd_read(const uint64_t* data, int64_t size, int32_t isa) {
#ifdef BD_X86
    if (isa >= kAvx512) return avx512::read(data, size);
    if (isa >= kAvx2) return avx2::read(data, size);
#else
    (void)isa;
#endif
    uint64_t sums[8] = {0};
    for (int64_t i = 0; i + 8 <= size; i += 8) {
        for (int j = 0; j < 8; ++j) sums[j] ^= data[i + j];
    }
    for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
    return sums[0];
}

// Fills in the sizes of a stream; returns the number of bytes that it takes.
int64_t bd_stream_layout(BdStream* s, int64_t rows, int64_t cols) {
    const int64_t per_pack = pack_units(s->bits), units = (cols + kUnit - 1) / kUnit;
    const int64_t blocks = units / per_pack, rest = units % per_pack;
    const int64_t packs = blocks * kRows + (rest * kRows + per_pack - 1) / per_pack;
    s->rows = rows;
    s->cols = cols;
    s->units = units;
    s->groups = (units + s->units_per_group - 1) / s->units_per_group;
    s->param_bytes = (s->groups * param_size(s->scale_type) + 63) / 64 * 64;
    s->strip_bytes = s->param_bytes + packs * pack_bytes(s->bits);
    return (rows + kRows - 1) / kRows * s->strip_bytes;
}

// Writes the stream; `out` is zeroed by the caller.
void bd_write_stream(const BdWeight* w, const BdStream* s, uint8_t* out, int32_t threads) {
    const int64_t strips = (w->rows + kRows - 1) / kRows;
    parallel(strips, threads, [=](int64_t first, int64_t last) {
        for (int64_t row = first * kRows; row < std::min(last * kRows, w->rows); ++row) {
            write_row(*w, *s, row, out + row / kRows * s->strip_bytes);
        }
    });
}

// out[tokens, rows] = x[tokens, cols] * weight' + bias, all of one dtype, contiguous. Returns 0, or 1 without memory.
int32_t bd_linear(const BdStream* s, const uint8_t* data, const void* x, int64_t tokens, const void* bias, void* out,
                  int32_t bfloat, int32_t isa, int32_t threads) {
    Inputs inputs;
    if (!prepare_inputs(inputs, x, tokens, s->cols, bfloat != 0, isa)) return 1;
    std::atomic<bool> failed{false};
    const Linear call{s, data, inputs.data, inputs.stride, tokens, bias, out, bfloat != 0, &failed};
    const LinearKernel kernel = linear_kernel(bfloat != 0, isa);
    parallel((s->rows + kRows - 1) / kRows, threads, [&](int64_t first, int64_t last) { kernel(call, first, last); });
    return failed ? 1 : 0;
}

// out = (codes of x) * (signs of the weight)' * scale * step + bias, exactly; see ternary.h. The stream has 2 bits; out
// has the dtype of x. Returns 0, or 1 without memory.
int32_t bd_ternary_int8(const BdStream* s, const uint8_t* data, const void* x, int64_t tokens, const void* scale,
                        int32_t scale_type, int32_t per_matrix, const float* bias, void* out, int32_t bfloat,
                        int32_t isa, int32_t threads) {
    const int64_t width = s->units * kUnit;
    const auto bytes = static_cast<size_t>(tokens * width + kUnit), whole = static_cast<size_t>(tokens * (s->rows + 1));
    const std::unique_ptr<int8_t[]> codes(new (std::nothrow) int8_t[bytes]());
    const std::unique_ptr<int32_t[]> numbers(new (std::nothrow) int32_t[whole]);
    const std::unique_ptr<float[]> floats(new (std::nothrow) float[static_cast<size_t>(tokens + s->rows)]);
    if (!codes || !numbers || !floats) return 1;
    int32_t *totals = numbers.get(), *sums = totals + tokens;
    float *steps = floats.get(), *scales = steps + tokens;
    for (int64_t row = 0; row < s->rows; ++row) scales[row] = load_scale(scale, per_matrix ? 0 : row, scale_type);
    const ternary::Activations given{x, bfloat != 0, s->cols, s->units, codes.get(), totals, steps};
    const integers::Products products{s, data, codes.get(), totals, width, tokens, sums};
    const ternary::Finish call{sums, scales, steps, bias, out, bfloat != 0, s->rows};
    const auto quantize = activations_for(isa);
    const auto multiply = integer_sums(isa);
    const auto finish = outputs_for(isa);
    parallel(tokens, threads, [&](int64_t first, int64_t last) { quantize(given, first, last); });
    const int64_t strips = (s->rows + kRows - 1) / kRows;
    parallel(strips, threads, [&](int64_t first, int64_t last) { multiply(products, first, last); });
    parallel(tokens, threads, [&](int64_t first, int64_t last) { finish(call, first, last); });
    return 0;
}

// Rows [first, last) of the dense weight, as contiguous rows from `out`.
void bd_dequantize(const BdWeight* w, int64_t first, int64_t last, void* out, int32_t type, int32_t isa,
                   int32_t threads) {
    uint8_t* base = static_cast<uint8_t*>(out) - first * w->cols * (type == kDenseFloat ? 4 : 2);
    parallel(last - first, threads, [=](int64_t begin, int64_t end) {
        for (int64_t row = first + begin; row < first + end; ++row) dequantize_row(*w, row, base, type, isa);
    });
}

// The values that the codes of a weight stand for.
void bd_fake_quantize(const BdFake* call, int32_t isa, int32_t threads) {
    const auto kernel = forward_for(isa);
    parallel(call->runs, threads, [=](int64_t first, int64_t last) { kernel(*call, first, last); });
}

// The gradients of the weight and of its parameters, these held fixed.
void bd_fake_quantize_backward(const BdFake* call, int32_t isa, int32_t threads) {
    const auto kernel = backward_for(isa);
    parallel(call->runs, threads, [=](int64_t first, int64_t last) { kernel(*call, first, last); });
}

// Lowest and highest weight of every run.
void bd_ends(const float* weight, int64_t runs, int64_t size, float* low, float* high, int32_t isa, int32_t threads) {
    const auto kernel = ends_for(isa);
    parallel(runs, threads, [=](int64_t first, int64_t last) { kernel(weight, size, low, high, first, last); });
}

// Sums of magnitudes of every run.
void bd_magnitudes(const float* weight, int64_t runs, int64_t size, double* sums, int32_t isa, int32_t threads) {
    const auto kernel = magnitudes_for(isa);
    parallel(runs, threads, [=](int64_t first, int64_t last) { kernel(weight, size, sums, first, last); });
}

// Where each run first holds its lowest and highest weight.
void bd_places(const float* weight, int64_t runs, int64_t size, const float* low, const float* high, int64_t* lowest,
               int64_t* highest, int32_t threads) {
    parallel(runs, threads, [=](int64_t first, int64_t last) {
        for (int64_t run = first; run < last; ++run) {
            lowest[run] = fake::place_of(weight + run * size, size, low[run]);
            highest[run] = fake::place_of(weight + run * size, size, high[run]);
        }
    });
}

}  // extern "C"
