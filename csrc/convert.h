// What happens to latents on their way from the file to the batch: casts, the search for NaN, copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace attr_engine {

enum class DType : uint8_t { kF16, kBF16, kF32, kF64 };

// By the name that safetensors uses; nothing for any other dtype.
std::optional<DType> FloatType(const std::string& name);

size_t SizeOf(DType dtype);

// Casts `items` numbers; rounds to nearest even, as torch does (float64 goes to the 16-bit types by way of
// float32). Neither pointer need be aligned; the two must not overlap.
void Cast(void* out, DType to, const void* in, DType from, size_t items);

// Index of the first NaN or infinity, or `items` where there is none. `data` need not be aligned.
size_t FirstNonFinite(const void* data, DType dtype, size_t items);

// memcpy past the caches where the processor can; the two must not overlap.
void CopyNonTemporal(void* out, const void* in, size_t size);

}  // namespace attr_engine
