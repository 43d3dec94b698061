// Reads tracks in the order of a plan into a ring of padded batches, ahead of whoever takes them.
//
// Who owns what: a Stream shares the ShardSet and the Ring; the Ring borrows its memory from the caller, who
// keeps it for as long as the Ring lives. A slot belongs to the Stream while it is filled, to the consumer
// from Next() to Ring::Release(), and to nobody in between. A consumer may keep its slot after the Stream is
// gone.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "error.h"
#include "gather.h"
#include "shards.h"

namespace attr_engine {

// Buffers of one size in one piece of memory, of which some are free.
class Ring {
 public:
  Ring(uint8_t* memory, size_t memory_bytes, size_t slot_bytes);

  size_t slots() const { return slots_.size(); }
  size_t slot_bytes() const { return slot_bytes_; }
  uint8_t* slot(size_t index) const { return memory_ + index * slot_bytes_; }

  // Gives a slot back. `touched` says that its bytes may have been changed by the consumer: padding that is
  // known to be in place is not written again, and what was touched is not known.
  void Release(size_t index, bool touched);

 private:
  friend class Stream;

  struct Slot {
    bool known = false;                        // whether `filled` says what lies in the slot
    std::vector<int64_t> frames;               // [fields] rows a track in the batch it holds
    std::vector<std::vector<int64_t>> filled;  // [fields][tracks] rows from which on padding lies there
  };

  uint8_t* memory_;
  size_t slot_bytes_;
  std::mutex mutex_;
  std::condition_variable freed_;  // a slot was released, or the stream stops
  std::vector<size_t> free_;
  std::vector<Slot> slots_;
};

class Stream {
 public:
  enum class State { kBatch, kEnd, kWaiting, kStarved };
  struct Result {
    State state;
    size_t slot;
    int64_t batch;
  };

  // Checks the plan against itself and the ring; files are opened when their turn comes. `first` is the batch
  // to start with. With no threads, Next() reads in the thread that calls it. Throws ReadError.
  Stream(std::shared_ptr<ShardSet> shards, Plan plan, std::shared_ptr<Ring> ring, size_t threads,
         int64_t first);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // The next batch in plan order; waits for it for at most `milliseconds`. kStarved: not even begun, because
  // every slot is held. Throws the ReadError of the batch whose turn it is, again at every further call.
  Result Next(int64_t milliseconds);

  // Stops the threads and waits for them; each finishes at most the few tracks it is at. Then Next() throws.
  void Close();

 private:
  struct InFlight {
    int64_t batch;
    size_t slot;
    int64_t begun;    // first track that no thread has taken
    int64_t last;     // one past the last track
    int64_t missing;  // tracks that are not done
    std::exception_ptr error;
    int64_t error_track;
  };
  struct Unit {
    int64_t batch;
    size_t slot;
    int64_t first;
    int64_t last;
  };

  void CheckPlan() const;
  int64_t First(int64_t batch) const { return batch == 0 ? 0 : plan_.ends[static_cast<size_t>(batch - 1)]; }
  bool Claim(Unit& unit);
  void Finish(const Unit& unit, const std::exception_ptr& error, int64_t error_track);
  void Work();
  void Run(const Unit& unit, Gatherer& gatherer);
  void ReadUnit(const Unit& unit, Gatherer& gatherer);
  void PadTrack(const Unit& unit, size_t number, int64_t track, uint8_t* out);

  std::shared_ptr<ShardSet> shards_;
  const Plan plan_;
  std::shared_ptr<Ring> ring_;
  int64_t unit_tracks_ = 1;
  std::vector<std::vector<uint8_t>> pad_blocks_;  // [fields]
  std::vector<std::thread> threads_;
  std::mutex close_;

  // All below is guarded by ring_->mutex_.
  std::condition_variable ready_;
  std::deque<InFlight> in_flight_;
  int64_t next_;     // batch to begin next
  int64_t limit_;    // batches to begin at all
  int reading_ = 0;  // consumers that are reading a unit themselves
  bool stop_ = false;
};

}  // namespace attr_engine
