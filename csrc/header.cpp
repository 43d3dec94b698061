#include "header.h"

#include <algorithm>
#include <array>
#include <set>
#include <stdexcept>
#include <utility>

namespace attr_engine {
namespace {

constexpr size_t kMaxRank = 8;
constexpr size_t kMaxTensors = 4096;

[[noreturn]] void Refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

// Whether `text` is well-formed UTF-8, as RFC 3629 has it: no overlong forms, no surrogates.
bool IsUtf8(const char* text, size_t size) {
  const auto* p = reinterpret_cast<const unsigned char*>(text);
  const auto* end = p + size;
  while (p < end) {
    const unsigned char lead = *p++;
    if (lead < 0x80) continue;
    const int follow = lead >= 0xF0 ? 3 : (lead >= 0xE0 ? 2 : 1);
    if (lead < 0xC2 || lead > 0xF4 || end - p < follow) return false;
    const unsigned char low = lead == 0xE0 ? 0xA0 : (lead == 0xF0 ? 0x90 : 0x80);
    const unsigned char high = lead == 0xED ? 0x9F : (lead == 0xF4 ? 0x8F : 0xBF);
    if (*p < low || *p > high) return false;
    for (int i = 1; i < follow; ++i) {
      if (p[i] < 0x80 || p[i] > 0xBF) return false;
    }
    p += follow;
  }
  return true;
}

// Reads the JSON that a header can hold and nothing else. There is no recursion, so no depth to overflow.
class Parser {
 public:
  Parser(const char* text, size_t size) : at_(text), end_(text + size) {}

  std::vector<TensorEntry> Header() {
    std::vector<TensorEntry> entries;
    std::set<std::string> names;
    if (at_ == end_ || *at_ != '{') Refuse("it does not start with '{'");
    ForEachKey([&] {
      const std::string name = Text(true);
      if (!names.insert(name).second) Refuse("a name stands twice");
      Expect(':');
      if (name == "__metadata__") {
        Metadata();
      } else {
        if (entries.size() == kMaxTensors) Refuse("it has more than 4096 tensors");
        entries.push_back(Entry(name));
      }
    });
    Space();
    if (at_ != end_) Refuse("something follows the JSON object");
    return entries;
  }

 private:
  void Space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
  }

  bool Take(char c) {
    Space();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }

  void Expect(char c) {
    if (!Take(c)) Refuse(std::string("it is not JSON: '") + c + "' is missing");
  }

  // Calls `item` at each item between `open` and `close`, with the commas taken away.
  template <typename Item>
  void ForEach(char open, char close, Item item) {
    Expect(open);
    if (Take(close)) return;
    do {
      item();
    } while (Take(','));
    Expect(close);
  }

  template <typename Item>
  void ForEachKey(Item item) {
    ForEach('{', '}', item);
  }

  // A string. A `plain` one may hold no escapes: a name that can be spelled in two ways could hide a double.
  std::string Text(bool plain) {
    Expect('"');
    std::string text;
    for (;;) {
      if (at_ == end_) Refuse("it is not JSON: a string does not end");
      const char c = *at_++;
      if (c == '"') return text;
      if (static_cast<unsigned char>(c) < 0x20) Refuse("a string holds a control character");
      if (c == '\\') {
        if (plain) Refuse("a name holds an escape");
        Escape();
      } else if (plain) {
        text.push_back(c);
      }
    }
  }

  void Escape() {
    if (at_ == end_) Refuse("it is not JSON: a string does not end");
    const char c = *at_++;
    if (std::string("\"\\/bfnrt").find(c) != std::string::npos) return;
    const int unit = c == 'u' ? HexUnit() : -1;
    // A half of a surrogate pair is no character without the other.
    if (unit >= 0xD800 && unit < 0xDC00 && end_ - at_ > 2 && at_[0] == '\\' && at_[1] == 'u') {
      at_ += 2;
      const int low = HexUnit();
      if (low >= 0xDC00 && low < 0xE000) return;
    }
    if (unit < 0 || (unit >= 0xD800 && unit < 0xE000)) Refuse("a string holds a wrong escape");
  }

  // Four hexadecimal digits, or -1.
  int HexUnit() {
    int unit = 0;
    for (int i = 0; i < 4; ++i) {
      const char h = at_ == end_ ? '\0' : *at_++;
      const bool letter = (h >= 'a' && h <= 'f') || (h >= 'A' && h <= 'F');
      if (!letter && (h < '0' || h > '9')) return -1;
      unit = unit * 16 + (letter ? (h | 0x20) - 'a' + 10 : h - '0');
    }
    return unit;
  }

  // A whole number from 0 up.
  int64_t Number() {
    Space();
    const char* start = at_;
    int64_t number = 0;
    while (at_ != end_ && *at_ >= '0' && *at_ <= '9') {
      if (__builtin_mul_overflow(number, int64_t{10}, &number) ||
          __builtin_add_overflow(number, int64_t{*at_ - '0'}, &number)) {
        Refuse("a size or offset does not fit in 64 bits");
      }
      ++at_;
    }
    if (at_ == start) Refuse("a size or offset is not a whole number from 0 up");
    if (*start == '0' && at_ - start > 1) Refuse("a number starts with 0");
    return number;
  }

  void Metadata() {
    std::set<std::string> keys;
    ForEachKey([&] {
      if (!keys.insert(Text(true)).second) Refuse("a name stands twice");
      Expect(':');
      (void)Text(false);
    });
  }

  TensorEntry Entry(const std::string& name) {
    TensorEntry entry;
    entry.name = name;
    std::set<std::string> seen;
    ForEachKey([&] {
      const std::string key = Text(true);
      if (!seen.insert(key).second) Refuse("a name stands twice");
      Expect(':');
      if (key == "dtype") {
        entry.dtype = Text(true);
      } else if (key == "shape") {
        ForEach('[', ']', [&] {
          if (entry.shape.size() == kMaxRank) Refuse("a tensor has more than 8 dimensions");
          entry.shape.push_back(Number());
        });
      } else if (key == "data_offsets") {
        Expect('[');
        entry.begin = Number();
        Expect(',');
        entry.end = Number();
        Expect(']');
      } else {
        Refuse("a tensor has an entry that is not dtype, shape or data_offsets");
      }
    });
    if (seen.size() != 3) Refuse("a tensor lacks dtype, shape or data_offsets");
    return entry;
  }

  const char* at_;
  const char* end_;
};

void CheckSize(const TensorEntry& entry) {
  int64_t bytes = ItemBytes(entry.dtype);
  if (bytes == 0) Refuse("a tensor has an unknown dtype");
  for (const int64_t size : entry.shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) Refuse("the size of a tensor does not fit in 64 bits");
  }
  if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
    Refuse("a tensor does not take the bytes that its shape needs");
  }
}

}  // namespace

int64_t ItemBytes(const std::string& dtype) {
  static constexpr std::array<std::pair<const char*, int64_t>, 13> kSizes = {{{"BOOL", 1},
                                                                              {"U8", 1},
                                                                              {"I8", 1},
                                                                              {"I16", 2},
                                                                              {"U16", 2},
                                                                              {"F16", 2},
                                                                              {"BF16", 2},
                                                                              {"I32", 4},
                                                                              {"U32", 4},
                                                                              {"F32", 4},
                                                                              {"F64", 8},
                                                                              {"I64", 8},
                                                                              {"U64", 8}}};
  for (const auto& [name, size] : kSizes) {
    if (dtype == name) return size;
  }
  return 0;
}

std::vector<TensorEntry> ParseHeader(const char* text, size_t size, int64_t payload) {
  if (!IsUtf8(text, size)) Refuse("it is not UTF-8");
  std::vector<TensorEntry> entries = Parser(text, size).Header();
  for (const TensorEntry& entry : entries) CheckSize(entry);
  // Empty tensors that lie at one byte keep their order.
  std::stable_sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  int64_t reached = 0;
  for (const TensorEntry& entry : entries) {
    if (entry.begin != reached) Refuse("the tensors overlap or leave a hole");
    reached = entry.end;
  }
  if (reached != payload) {
    Refuse("the tensors take " + std::to_string(reached) + " bytes, the file has " + std::to_string(payload) +
           " for them");
  }
  return entries;
}

}  // namespace attr_engine
