#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#define ATTR_ENGINE_CRC_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#define ATTR_ENGINE_CRC_ARM 1
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

namespace attr_engine {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;

using Table = std::array<uint32_t, 256>;
using Tables = std::array<Table, 8>;

// The functions below work on the inverted register `crc`; the public ones invert on the way in and out.

constexpr Tables MakeTables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  // tables[k][byte]: the register after `byte` followed by k zero bytes.
  for (size_t k = 1; k < tables.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = MakeTables();

inline uint64_t Load64(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

inline uint32_t StepByte(uint32_t crc, uint8_t byte) { return (crc >> 8) ^ kTables[0][(crc ^ byte) & 0xFF]; }

uint32_t ExtendTable(uint32_t crc, const uint8_t* p, size_t size) {
  for (; size >= 8; p += 8, size -= 8) {
    const uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
    crc = kTables[7][low & 0xFF] ^ kTables[6][(low >> 8) & 0xFF] ^ kTables[5][(low >> 16) & 0xFF] ^
          kTables[4][low >> 24] ^ kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^ kTables[0][p[7]];
  }
  for (; size > 0; ++p, --size) crc = StepByte(crc, *p);
  return crc;
}

#if defined(ATTR_ENGINE_CRC_X86) || defined(ATTR_ENGINE_CRC_ARM)

// The instruction takes three cycles but one can start in each: three lanes of kLane bytes run side by side.
// A lane's register is then carried over the kLane bytes that follow it, which is a linear map of its bits
// and therefore four table look-ups.
constexpr size_t kLane = 1024;

uint32_t SkipZeros(uint32_t crc, size_t bytes) {
  for (; bytes > 0; --bytes) crc = (crc >> 8) ^ kTables[0][crc & 0xFF];
  return crc;
}

using SkipTables = std::array<Table, 4>;

SkipTables MakeSkipTables() {
  std::array<uint32_t, 32> columns{};
  for (size_t bit = 0; bit < 32; ++bit) columns[bit] = SkipZeros(uint32_t{1} << bit, kLane);
  SkipTables tables{};
  for (size_t k = 0; k < 4; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      for (size_t bit = 0; bit < 8; ++bit) {
        if ((byte >> bit) & 1) tables[k][byte] ^= columns[8 * k + bit];
      }
    }
  }
  return tables;
}

inline uint32_t SkipLane(const SkipTables& skip, uint32_t crc) {
  return skip[0][crc & 0xFF] ^ skip[1][(crc >> 8) & 0xFF] ^ skip[2][(crc >> 16) & 0xFF] ^ skip[3][crc >> 24];
}

#ifdef ATTR_ENGINE_CRC_X86
#define ATTR_ENGINE_CRC_TARGET __attribute__((target("sse4.2")))
#define ATTR_ENGINE_CRC_STEP64(crc, word) static_cast<uint32_t>(_mm_crc32_u64(crc, word))

const char* HardwareName() { return "sse4.2"; }

bool HasHardware() { return __builtin_cpu_supports("sse4.2"); }
#else
#ifdef __clang__
#define ATTR_ENGINE_CRC_TARGET __attribute__((target("crc")))
#define ATTR_ENGINE_CRC_STEP64(crc, word) __builtin_arm_crc32cd(crc, word)
#else
#define ATTR_ENGINE_CRC_TARGET __attribute__((target("+crc")))
#define ATTR_ENGINE_CRC_STEP64(crc, word) __builtin_aarch64_crc32cx(crc, word)
#endif

const char* HardwareName() { return "armv8-crc"; }

bool HasHardware() {
#ifdef __linux__
  constexpr unsigned long kHwcapCrc32 = 1UL << 7;  // HWCAP_CRC32 of the arm64 kernel interface
  return (getauxval(AT_HWCAP) & kHwcapCrc32) != 0;
#else
  return true;  // every 64-bit Apple processor that runs macOS has it
#endif
}
#endif

ATTR_ENGINE_CRC_TARGET uint32_t ExtendHardware(uint32_t crc, const uint8_t* p, size_t size) {
  static const SkipTables skip = MakeSkipTables();
  for (; size >= 3 * kLane; p += 3 * kLane, size -= 3 * kLane) {
    uint32_t a = crc;
    uint32_t b = 0;
    uint32_t c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      a = ATTR_ENGINE_CRC_STEP64(a, Load64(p + i));
      b = ATTR_ENGINE_CRC_STEP64(b, Load64(p + kLane + i));
      c = ATTR_ENGINE_CRC_STEP64(c, Load64(p + 2 * kLane + i));
    }
    crc = SkipLane(skip, SkipLane(skip, a) ^ b) ^ c;
  }
  for (; size >= 8; p += 8, size -= 8) crc = ATTR_ENGINE_CRC_STEP64(crc, Load64(p));
  for (; size > 0; ++p, --size) crc = StepByte(crc, *p);
  return crc;
}

#else

const char* HardwareName() { return "table"; }
bool HasHardware() { return false; }
uint32_t ExtendHardware(uint32_t crc, const uint8_t* p, size_t size) { return ExtendTable(crc, p, size); }

#endif

#ifdef ATTR_ENGINE_CRC_X86

// x^n mod P, bit-reflected and shifted by one as the carry-less product of reflected numbers wants it (Gopal
// et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009).
uint64_t FoldConstant(unsigned n) {
  uint32_t power = 0x80000000U;  // x^0, reflected
  for (; n > 0; --n) power = (power >> 1) ^ ((power & 1U) != 0 ? kPolynomial : 0U);
  return static_cast<uint64_t>(power) << 1;
}

bool HasFolding() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq") &&
         __builtin_cpu_supports("pclmul");
}

// Sixteen 128-bit lanes side by side: each is multiplied by x^2048, which moves it over the 256 bytes that
// come next. What is left at the end stands for all that went before, and goes through the instruction.
constexpr size_t kFold = 256;

__attribute__((target("avx512f,vpclmulqdq,pclmul"))) inline __m512i Fold(__m512i lanes, __m512i k,
                                                                         const uint8_t* p) {
  const __m512i next = _mm512_loadu_si512(p);
  const __m512i low = _mm512_clmulepi64_epi128(lanes, k, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(lanes, k, 0x11);
  return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

__attribute__((target("avx512f,vpclmulqdq,pclmul"))) uint32_t ExtendFolding(uint32_t crc, const uint8_t* p,
                                                                            size_t size) {
  if (size < 4 * kFold) return ExtendHardware(crc, p, size);
  static const auto low = static_cast<int64_t>(FoldConstant(8 * kFold + 32));
  static const auto high = static_cast<int64_t>(FoldConstant(8 * kFold - 32));
  const __m512i k = _mm512_set_epi64(high, low, high, low, high, low, high, low);
  __m512i a = _mm512_xor_si512(_mm512_loadu_si512(p),
                               _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  __m512i b = _mm512_loadu_si512(p + 64);
  __m512i c = _mm512_loadu_si512(p + 128);
  __m512i d = _mm512_loadu_si512(p + 192);
  for (p += kFold, size -= kFold; size >= kFold; p += kFold, size -= kFold) {
    a = Fold(a, k, p);
    b = Fold(b, k, p + 64);
    c = Fold(c, k, p + 128);
    d = Fold(d, k, p + 192);
  }
  uint8_t rest[kFold];
  _mm512_storeu_si512(rest, a);
  _mm512_storeu_si512(rest + 64, b);
  _mm512_storeu_si512(rest + 128, c);
  _mm512_storeu_si512(rest + 192, d);
  return ExtendHardware(ExtendHardware(0, rest, kFold), p, size);
}

#endif

struct Implementation {
  const char* name;
  uint32_t (*extend)(uint32_t crc, const uint8_t* p, size_t size);
};

Implementation Choose() {
#ifdef ATTR_ENGINE_CRC_X86
  if (HasHardware() && HasFolding()) return {"avx512 folding", &ExtendFolding};
#endif
  if (HasHardware()) return {HardwareName(), &ExtendHardware};
  return {"table", &ExtendTable};
}

const Implementation& Best() {
  static const Implementation best = Choose();
  return best;
}

}  // namespace

uint32_t Crc32c(const void* data, size_t size, uint32_t value) {
  return ~Best().extend(~value, static_cast<const uint8_t*>(data), size);
}

uint32_t Crc32cPortable(const void* data, size_t size, uint32_t value) {
  return ~ExtendTable(~value, static_cast<const uint8_t*>(data), size);
}

const char* Crc32cImplementation() { return Best().name; }

}  // namespace attr_engine
