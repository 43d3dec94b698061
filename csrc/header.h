// The header of a safetensors file: which tensors lie where. Accepts a subset of what safetensors accepts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace attr_engine {

struct TensorEntry {
  std::string name;
  std::string dtype;           // as it stands there: "F16", "I64", ...
  std::vector<int64_t> shape;  // at most 8 dimensions
  int64_t begin = 0;           // first byte, counted from the end of the header
  int64_t end = 0;             // end - begin is exactly what dtype and shape take
};

// A header of ours has a handful of tensors; the cap keeps a hostile one from filling memory.
constexpr int64_t kMaxHeader = int64_t{1} << 20;

// Bytes of one item of a dtype; 0 for a dtype that is not known.
int64_t ItemBytes(const std::string& dtype);

// Parses `size` bytes of JSON that `payload` bytes of data follow. The tensors are returned in the order of
// their data, which they must fill without a hole or an overlap. Throws std::invalid_argument with what is
// wrong, in a few words.
std::vector<TensorEntry> ParseHeader(const char* text, size_t size, int64_t payload);

}  // namespace attr_engine
