// Aligned memory for buckets and scratch, recycled so that a training step allocates nothing.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/types.h"

namespace collective {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t nbytes) : nbytes_(round_up(nbytes)) {
    if (nbytes_ == 0) return;
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment(nbytes_), nbytes_)));
    if (!memory_)
      throw Error(ErrorCode::kInternal, "out of memory: " + std::to_string(nbytes_) + " bytes were requested");
    // Advice only: without transparent huge pages the buffer works just as well, only more slowly.
    if (nbytes_ >= kHugePage) madvise(memory_.get(), nbytes_, MADV_HUGEPAGE);
  }
  std::byte* data() const { return memory_.get(); }
  size_t nbytes() const { return nbytes_; }
  std::byte* release() { return memory_.release(); }  // free with std::free

 private:
  static constexpr size_t kLine = 128;
  static constexpr size_t kHugePage = size_t{2} << 20;
  static size_t alignment(size_t nbytes) { return nbytes >= kHugePage ? kHugePage : kLine; }
  static size_t round_up(size_t nbytes) {
    const size_t unit = alignment(nbytes);
    return (nbytes + unit - 1) / unit * unit;
  }
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  size_t nbytes_ = 0;
};

class BufferPool;

// A buffer on loan, returned to its pool on destruction.
class PooledBuffer {
 public:
  PooledBuffer() = default;
  PooledBuffer(BufferPool* pool, Buffer buffer) : pool_(pool), buffer_(std::move(buffer)) {}
  PooledBuffer(PooledBuffer&& other) noexcept
      : pool_(std::exchange(other.pool_, nullptr)), buffer_(std::move(other.buffer_)) {}
  PooledBuffer& operator=(PooledBuffer&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  inline ~PooledBuffer();
  std::byte* data() const { return buffer_.data(); }

 private:
  BufferPool* pool_ = nullptr;
  Buffer buffer_;
};

class BufferPool {
 public:
  PooledBuffer take(size_t nbytes) {
    const std::lock_guard lock(mutex_);
    // Best fit, but never a buffer more than four times too large: a small scratch must not occupy a whole bucket.
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i)
      if (free_[i].nbytes() >= nbytes && free_[i].nbytes() / 4 <= nbytes &&
          (best == free_.size() || free_[i].nbytes() < free_[best].nbytes()))
        best = i;
    if (best == free_.size()) return {this, Buffer(nbytes)};
    Buffer buffer = std::move(free_[best]);
    free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
    return {this, std::move(buffer)};
  }

 private:
  friend class PooledBuffer;
  static constexpr size_t kKept = 16;
  void give_back(Buffer buffer) {
    const std::lock_guard lock(mutex_);
    if (free_.size() == kKept) free_.erase(free_.begin());
    free_.push_back(std::move(buffer));
  }
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

PooledBuffer::~PooledBuffer() {
  if (pool_ != nullptr && buffer_.nbytes() > 0) pool_->give_back(std::move(buffer_));
}

}  // namespace collective
