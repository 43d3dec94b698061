// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of RFC 3720, ext4 and the x86 crc32
// instruction.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attr_engine {

// Returns the CRC-32C of `size` bytes at `data`, carrying on from `value`: Crc32c(ab) is
// Crc32c(b, size_b, Crc32c(a, size_a)). The caller owns `data`; nothing is kept. `data` may be null when
// `size` is 0. Uses the processor's CRC instruction where it has one, chosen once at run time. Thread-safe.
uint32_t Crc32c(const void* data, size_t size, uint32_t value = 0);

// The same from tables alone, on any processor: the reference that the tests compare with.
uint32_t Crc32cPortable(const void* data, size_t size, uint32_t value = 0);

// Names what Crc32c uses here: "sse4.2", "armv8-crc" or "table".
const char* Crc32cImplementation();

}  // namespace attr_engine
