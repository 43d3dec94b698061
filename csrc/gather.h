// Reads tracks from shards into the places that a plan gives them in a batch: read, check, cast.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "convert.h"
#include "error.h"
#include "shards.h"

namespace attr_engine {

// One tensor of every track: its latent, or a conditioning tensor. Lists are in plan order.
struct Field {
  size_t tensor = 0;                // index in the ShardSet's tensors
  std::optional<DType> to;          // cast to this dtype; nothing to keep the bytes as they are
  std::vector<int64_t> starts;      // [tracks] first row in the shard
  std::vector<int64_t> rows;        // [tracks] rows of the track
  std::vector<uint32_t> checksums;  // [tracks] CRC-32C of the bytes of the track, or empty to skip it
  std::vector<int64_t> frames;      // [batches] rows that each track is padded to
  std::vector<uint8_t> pad_row;     // one row as it stands in the batch, or empty for zeros
  bool refuse_nonfinite = false;    // only where the tensor's dtype is a float
  size_t slot_offset = 0;           // byte of the slot at which its [B, frames, row] block starts
};

struct Plan {
  std::vector<int32_t> shards;  // [tracks]
  std::vector<int64_t> ends;    // [batches] number of tracks up to and with each batch
  std::vector<Field> fields;
};

// Bytes of one row of a field, in the file and in the batch.
int64_t RowIn(const TensorSpec& tensor);
int64_t RowOut(const TensorSpec& tensor, const Field& field);

// Throws the ReadError of an argument that is wrong.
[[noreturn]] void Refuse(const std::string& sentence, int64_t track = ReadError::kNone);

// What one thread reads with. Borrows the set and the plan, which Stream has checked.
class Gatherer {
 public:
  Gatherer(ShardSet& shards, const Plan& plan) : shards_(shards), plan_(plan) {}

  // Reads track `track`, or several small ones up to `last` that lie side by side in file and batch, to
  // `out`, where each has `frames` rows. Returns one past the last track that it read. Padding is left as it
  // is. Throws ReadError, of no particular track of the group.
  int64_t Read(const Field& field, int64_t frames, int64_t track, int64_t last, uint8_t* out);

 private:
  struct Group;

  void Enter(int64_t track);
  Group Begin(const Field& field, int64_t frames, int64_t track, int64_t last) const;
  void CheckPiece(Group& group, const uint8_t* from, int64_t done, size_t size) const;
  void CastPiece(Group& group, uint8_t* to, const uint8_t* from, int64_t done, size_t size) const;

  ShardSet& shards_;
  const Plan& plan_;
  std::shared_ptr<const Shard> shard_;
  int64_t open_ = ReadError::kNone;
  std::vector<uint8_t> bounce_;
};

}  // namespace attr_engine
