#include "convert.h"

#include <array>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#define ATTR_ENGINE_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace attr_engine {
namespace {

template <typename To, typename From>
To Bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

float Widen(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000U) << 16;
  const uint32_t exponent = (half.bits >> 10) & 0x1FU;
  const uint32_t fraction = half.bits & 0x3FFU;
  if (exponent == 0x1F) return Bits<float>(sign | 0x7F800000U | (fraction << 13) | (fraction ? 1U << 22 : 0));
  if (exponent != 0) return Bits<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;  // subnormal or zero, exact
  return Bits<float>(sign | Bits<uint32_t>(magnitude));
}
float Widen(Brain brain) { return Bits<float>(static_cast<uint32_t>(brain.bits) << 16); }
float Widen(float number) { return number; }

void Narrow(float number, Half& out) {
  const auto bits = Bits<uint32_t>(number);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) {  // NaN
    out.bits = static_cast<uint16_t>(sign | 0x7E00U | ((magnitude >> 13) & 0x3FFU));
  } else if (magnitude >= 0x477FF000U) {  // rounds to beyond 65504
    out.bits = static_cast<uint16_t>(sign | 0x7C00U);
  } else if (magnitude <
             0x38800000U) {  // subnormal: adding 0.5 lets the hardware round to multiples of 2^-24
    const auto shifted = Bits<uint32_t>(Bits<float>(magnitude) + 0.5F);
    out.bits = static_cast<uint16_t>(sign | (shifted - 0x3F000000U));
  } else {
    const uint32_t odd = (magnitude >> 13) & 1U;
    out.bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000U + 0xFFFU + odd) >> 13));
  }
}
void Narrow(float number, Brain& out) {
  const auto bits = Bits<uint32_t>(number);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) {
    out.bits = 0x7FC0U;
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
  }
}
void Narrow(float number, float& out) { out = number; }
void Narrow(float number, double& out) { out = number; }

template <typename From, typename To>
void CastItems(void* out, const void* in, size_t items) {
  const auto* from = static_cast<const uint8_t*>(in);
  auto* to = static_cast<uint8_t*>(out);
  for (size_t i = 0; i < items; ++i) {
    From number;
    To result;
    std::memcpy(&number, from + i * sizeof(From), sizeof(From));
    if constexpr (std::is_same_v<From, double>) {
      if constexpr (std::is_same_v<To, double>) {
        result = number;
      } else {
        Narrow(static_cast<float>(number), result);
      }
    } else {
      Narrow(Widen(number), result);
    }
    std::memcpy(to + i * sizeof(To), &result, sizeof(To));
  }
}

using CastFunction = void (*)(void*, const void*, size_t);

#ifdef ATTR_ENGINE_X86

bool HasF16c() {
  static const bool has = [] {
    // Not every compiler's __builtin_cpu_supports knows f16c; that avx2 is there says that the system keeps
    // the registers.
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  }();
  return has;
}

__attribute__((target("avx2,f16c"))) void HalfToFloat(void* out, const void* in, size_t items) {
  const auto* from = static_cast<const uint16_t*>(in);
  auto* to = static_cast<float*>(out);
  size_t i = 0;
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
    for (; i + 8 <= items; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_stream_ps(to + i, _mm256_cvtph_ps(halves));
    }
    _mm_sfence();
  }
  for (; i + 8 <= items; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  CastItems<Half, float>(to + i, from + i, items - i);
}

__attribute__((target("avx2,f16c"))) void FloatToHalf(void* out, const void* in, size_t items) {
  const auto* from = static_cast<const float*>(in);
  auto* to = static_cast<uint16_t*>(out);
  size_t i = 0;
  for (; i + 8 <= items; i += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), packed);
  }
  CastItems<float, Half>(to + i, from + i, items - i);
}

#endif

CastFunction Choose(DType to, DType from) {
#ifdef ATTR_ENGINE_X86
  if (HasF16c() && from == DType::kF16 && to == DType::kF32) return &HalfToFloat;
  if (HasF16c() && from == DType::kF32 && to == DType::kF16) return &FloatToHalf;
#endif
  static constexpr std::array<std::array<CastFunction, 4>, 4> kTable = {{
      {&CastItems<Half, Half>, &CastItems<Half, Brain>, &CastItems<Half, float>, &CastItems<Half, double>},
      {&CastItems<Brain, Half>, &CastItems<Brain, Brain>, &CastItems<Brain, float>,
       &CastItems<Brain, double>},
      {&CastItems<float, Half>, &CastItems<float, Brain>, &CastItems<float, float>,
       &CastItems<float, double>},
      {&CastItems<double, Half>, &CastItems<double, Brain>, &CastItems<double, float>,
       &CastItems<double, double>},
  }};
  return kTable[static_cast<size_t>(from)][static_cast<size_t>(to)];
}

// A number is not finite when all bits of its exponent are set.
template <typename Word>
size_t FirstWithExponent(const uint8_t* data, size_t items, Word exponent) {
  for (size_t i = 0; i < items; ++i) {
    Word word;
    std::memcpy(&word, data + i * sizeof(Word), sizeof(Word));
    if ((word & exponent) == exponent) return i;
  }
  return items;
}

size_t FirstInScalar(const uint8_t* data, DType dtype, size_t items) {
  switch (dtype) {
    case DType::kF16:
      return FirstWithExponent<uint16_t>(data, items, 0x7C00);
    case DType::kBF16:
      return FirstWithExponent<uint16_t>(data, items, 0x7F80);
    case DType::kF32:
      return FirstWithExponent<uint32_t>(data, items, 0x7F800000);
    default:
      return FirstWithExponent<uint64_t>(data, items, 0x7FF0000000000000);
  }
}

#ifdef ATTR_ENGINE_X86

// The bits of 32 bytes that stand in numbers which are not finite.
__attribute__((target("avx2"))) inline __m256i Hits(const uint8_t* p, __m256i mask, DType dtype) {
  const __m256i v = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask);
  if (dtype == DType::kF32) return _mm256_cmpeq_epi32(v, mask);
  if (dtype == DType::kF64) return _mm256_cmpeq_epi64(v, mask);
  return _mm256_cmpeq_epi16(v, mask);
}

__attribute__((target("avx2"))) inline __m256i ExponentMask(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return _mm256_set1_epi16(0x7C00);
    case DType::kBF16:
      return _mm256_set1_epi16(0x7F80);
    case DType::kF32:
      return _mm256_set1_epi32(0x7F800000);
    default:
      return _mm256_set1_epi64x(0x7FF0000000000000);
  }
}

// Bytes at the start of `data`, a multiple of 128, that are known to hold finite numbers only.
__attribute__((target("avx2"))) size_t FinitePrefix(const uint8_t* data, DType dtype, size_t size) {
  const __m256i mask = ExponentMask(dtype);
  size_t at = 0;
  for (; at + 128 <= size; at += 128) {
    const __m256i low = _mm256_or_si256(Hits(data + at, mask, dtype), Hits(data + at + 32, mask, dtype));
    const __m256i high =
        _mm256_or_si256(Hits(data + at + 64, mask, dtype), Hits(data + at + 96, mask, dtype));
    const __m256i any = _mm256_or_si256(low, high);
    if (!_mm256_testz_si256(any, any)) break;
  }
  return at;
}

#endif

}  // namespace

std::optional<DType> FloatType(const std::string& name) {
  if (name == "F16") return DType::kF16;
  if (name == "BF16") return DType::kBF16;
  if (name == "F32") return DType::kF32;
  if (name == "F64") return DType::kF64;
  return std::nullopt;
}

size_t SizeOf(DType dtype) { return dtype == DType::kF64 ? 8 : (dtype == DType::kF32 ? 4 : 2); }

void Cast(void* out, DType to, const void* in, DType from, size_t items) {
  if (items == 0) return;
  if (to == from) {
    std::memcpy(out, in, items * SizeOf(to));
  } else {
    Choose(to, from)(out, in, items);
  }
}

size_t FirstNonFinite(const void* data, DType dtype, size_t items) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  size_t skip = 0;
#ifdef ATTR_ENGINE_X86
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) skip = FinitePrefix(bytes, dtype, items * SizeOf(dtype)) / SizeOf(dtype);
#endif
  return skip + FirstInScalar(bytes + skip * SizeOf(dtype), dtype, items - skip);
}

void CopyNonTemporal(void* out, const void* in, size_t size) {
#ifdef ATTR_ENGINE_X86
  auto* to = static_cast<uint8_t*>(out);
  const auto* from = static_cast<const uint8_t*>(in);
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    size_t i = 0;
    for (; i + 64 <= size; i += 64) {
      for (size_t k = 0; k < 64; k += 16) {
        const __m128i piece = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + k));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + k), piece);
      }
    }
    _mm_sfence();
    out = to + i;
    in = from + i;
    size -= i;
  }
#endif
  if (size > 0) std::memcpy(out, in, size);
}

}  // namespace attr_engine
